"""The protocol between the rollouter and any rollout engine: token in, token out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.types import FloatArray, TokenArray


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to draw tokens. ``temperature`` 0 is greedy (log-probs are then of the raw distribution).

    Log-probs are of the distribution drawn from: log-softmax of logits / temperature.
    """

    temperature: float = 1.0
    max_new_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One generation. ``seed`` keys the draw, so that batching does not change what is drawn.

    ``session`` names the context that grows over turns; an engine may keep its KV cache under it.
    ``token_ids`` int32 ``[P]`` is always the whole prompt.
    """

    session: str
    token_ids: TokenArray
    sampling: SamplingParams
    seed: tuple[int, ...]

    def check(self) -> None:
        """Raise EngineError where no engine could serve this."""
        tokens, sampling, problem = np.asarray(self.token_ids), self.sampling, None
        if tokens.ndim != 1 or len(tokens) == 0:
            problem = f"token_ids has shape {tokens.shape}; expected [P] with P >= 1"
        elif sampling.max_new_tokens < 1:
            problem = f"max_new_tokens={sampling.max_new_tokens}; expected 1 or more"
        elif not 0 <= sampling.temperature < float("inf"):
            problem = f"temperature={sampling.temperature}; expected a number >= 0"
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
    without tokens where the prompt fills it). ``policy_version`` is the first and last version the
    tokens were drawn from.
    """

    token_ids: TokenArray
    logprobs: FloatArray
    finish_reason: str
    policy_version: tuple[int, int]


class RolloutEngine(Protocol):
    """A server of one policy; ``policy_version`` counts the weight updates it holds."""

    policy_version: int
    max_context: int

    async def generate(self, request: GenerationRequest) -> Generation:
        """Draw one generation; raises EngineError, never waits for ever."""
        ...

    def release(self, session: str) -> None:
        """Forget a session's cache (unknown sessions are fine)."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Take a full set of weights by Hugging Face name, streamed, and a new version."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
