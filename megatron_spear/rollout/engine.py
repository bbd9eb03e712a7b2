"""The protocol between the rollouter and any rollout engine: token in, token out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.types import FloatArray, TokenArray, VersionSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to draw tokens. ``temperature`` 0 is greedy (log-probs are then of the raw distribution).

    Log-probs are of the distribution drawn from: log-softmax of logits / temperature. ``top_p``
    below 1 draws from the nucleus alone: the fewest likeliest tokens whose probabilities add up to
    it. That is for evaluation: the loss takes log-probs of the whole distribution, and here they
    are the whole one's (embedded engine, SGLang) or the nucleus's own (vLLM), so training rollouts
    have 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One generation. ``seed`` keys the draw, so that batching does not change what is drawn.

    ``session`` names the context that grows over turns; an engine may keep its KV cache under it.
    ``token_ids`` int32 ``[P]`` is always the whole prompt. A ``seed`` that is an int is the key
    itself, 0 to 2^64 - 1 (``engines.sampling.seed_key`` makes one of a tuple). ``score_prompt``
    asks for the prompt's log-probs too; ``max_new_tokens`` may then be 0. ``step`` is the trainer
    step that it is for, 0 for none: where requests queue, the lowest goes first.
    """

    session: str
    token_ids: TokenArray
    sampling: SamplingParams
    seed: tuple[int, ...] | int
    score_prompt: bool = False
    step: int = 0

    def check(self) -> None:
        """Raise EngineError where no engine could serve this."""
        tokens, sampling, problem = np.asarray(self.token_ids), self.sampling, None
        if tokens.ndim != 1 or len(tokens) == 0:
            problem = f"token_ids has shape {tokens.shape}; expected [P] with P >= 1"
        elif sampling.max_new_tokens < (0 if self.score_prompt else 1):
            problem = f"max_new_tokens={sampling.max_new_tokens}; expected 1 or more"
        elif not 0 <= sampling.temperature < float("inf"):
            problem = f"temperature={sampling.temperature}; expected a number >= 0"
        elif not 0 < sampling.top_p <= 1:
            problem = f"top_p={sampling.top_p}; expected a number above 0, at most 1"
        elif isinstance(self.seed, int) and not 0 <= self.seed < 1 << 64:
            problem = f"seed={self.seed}; a key is 0 to 2^64 - 1"
        if problem is not None:
            raise EngineError(f"request of session {self.session!r}: {problem}")

    def finish_reason(self, token_ids: Sequence[int], max_context: int) -> str | None:
        """``stop``, ``length`` or ``context`` where these tokens end the generation, else None."""
        if len(token_ids) and token_ids[-1] in self.sampling.stop_token_ids:
            return "stop"
        if len(token_ids) >= self.sampling.max_new_tokens:
            return "length"
        return "context" if len(self.token_ids) + len(token_ids) >= max_context else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What came back: sampled tokens int32 ``[A]`` (stop token included), float32 ``[A]``
    log-probs.

    ``finish_reason`` is ``stop``, ``length`` (max_new_tokens) or ``context`` (the context is full;
    without tokens where the prompt fills it); one that was called off says ``abort``. ``versions``
    says which weights the tokens were drawn from: spans in order that add up to A tokens, one of 0
    tokens where there are none. ``prompt_logprobs`` float32 ``[P]``, if asked for, are of the raw
    distribution (temperature 1), 0 for the first token. ``cached_tokens`` of the prompt were not
    computed; ``num_retractions`` counts the pauses that it went through with its tokens kept.

    Example: 43 tokens at version 6, then an update, then 21 at version 7:
    ``(VersionSpan(6, 43), VersionSpan(7, 21))``.
    """

    token_ids: TokenArray
    logprobs: FloatArray
    finish_reason: str
    versions: tuple[VersionSpan, ...]
    prompt_logprobs: FloatArray | None = None
    cached_tokens: int = 0
    num_retractions: int = 0


PauseMode = Literal["retract", "abort"]
"""What becomes of generations under way at a pause: ``retract`` keeps their tokens and computes
their keys and values anew after it, ``abort`` draws them from the beginning. Both keep each token
reproducible from the weights of its version; going on over old keys and values would not."""


class RolloutEngine(Protocol):
    """A server of one policy, or several of the same. All methods belong to one event loop."""

    @property
    def policy_version(self) -> int:
        """How many weight updates it holds."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Draw one generation; raises EngineError, never waits for ever."""
        ...

    def release(self, session: str) -> None:
        """Forget a session's cache (unknown sessions are fine)."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Stop drawing tokens until ``resume``; requests that come meanwhile wait.

        Afterwards no step is under way, so that the weights may change.
        """
        ...

    async def resume(self) -> None:
        """Go on after a pause, whatever the weights are now."""
        ...

    async def close(self) -> None:
        """Fail what is under way and free what the engine holds."""
        ...
