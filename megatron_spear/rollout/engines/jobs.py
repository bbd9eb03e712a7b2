"""Requests inside the embedded engine: their state, and how they are grouped for prefill."""

import asyncio

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, PauseMode
from megatron_spear.rollout.engines.sampling import seed_key
from megatron_spear.types import FloatArray, VersionSpan

# Most cells of one prefill's attention: sequences x new tokens x context.
_MAX_CELLS = 4 << 20
_MAX_TOKENS = 8192


class Job:
    """One request on its way: ``tokens`` and ``logprobs`` drawn; its ``slot``, -1 without one.

    ``prompt`` are the tokens to prefill: the request's, and after a pause those drawn before it.
    ``cached`` counts the first tokens of the prompt that the slot holds before the prefill;
    ``returning`` says that they are the session's own. ``prompt_logprobs`` are missing until they
    are computed, if they are asked for.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.session = request.session
        self.prompt = np.ascontiguousarray(request.token_ids, np.int32)
        self.key = seed_key(request.seed)
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Generation] = loop.create_future()
        self.queued_s = loop.time()
        self.slot = -1
        self.cached = 0
        self.returning = False
        self.prompt_logprobs: FloatArray | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self._versions: list[VersionSpan] = []
        self._cached_at_first: int | None = None
        self._num_retractions = 0

    @property
    def finished(self) -> bool:
        """True once it was answered, failed or cancelled."""
        return self.future.done()

    @property
    def answered(self) -> bool:
        """True once it was answered or failed; the engine holds nothing of it any more."""
        return self.future.done() and not self.future.cancelled()

    @property
    def unscored(self) -> bool:
        """True while the prompt's log-probs are asked for and missing."""
        return self.request.score_prompt and self.prompt_logprobs is None

    def note_cached(self, num_tokens: int) -> None:
        """Note how much of the prompt was not computed; that of the first prefill stays."""
        if self._cached_at_first is None:
            self._cached_at_first = num_tokens

    def draw(self, token: int, logprob: float, policy_version: int) -> None:
        """Note a drawn token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._versions and self._versions[-1].policy_version == policy_version:
            self._versions[-1] = VersionSpan(policy_version, self._versions[-1].num_tokens + 1)
        else:
            self._versions.append(VersionSpan(policy_version, 1))

    def back_to_waiting(self, mode: PauseMode) -> None:
        """To be prefilled again, from the beginning or with what was drawn."""
        if mode == "abort":
            self.tokens, self.logprobs, self._versions = [], [], []
        elif self.slot >= 0:
            self._num_retractions += 1
        if not self.tokens:
            self.prompt_logprobs = None
        drawn = np.array(self.tokens, np.int32)
        self.prompt = np.concatenate([self.request.token_ids, drawn]).astype(np.int32)
        self.slot, self.cached = -1, 0

    def generation(self, reason: str, policy_version: int) -> Generation:
        """The answer as it stands; ``policy_version`` is the present one."""
        return Generation(
            token_ids=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            finish_reason=reason,
            versions=tuple(self._versions) or (VersionSpan(policy_version, 0),),
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=self._cached_at_first or 0,
            num_retractions=self._num_retractions,
        )

    def succeed(self, reason: str, policy_version: int) -> None:
        """Answer whoever waits."""
        if not self.future.done():
            self.future.set_result(self.generation(reason, policy_version))

    def fail(self, error: EngineError) -> None:
        """Raise ``error`` where the answer is awaited."""
        if not self.future.done():
            self.future.set_exception(error)


def shared_prompts(jobs: list[Job]) -> list[list[Job]]:
    """Jobs grouped by equal prompts; first in each group the one with most of it cached."""
    groups: dict[bytes, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.prompt.tobytes(), []).append(job)
    return [sorted(group, key=lambda job: -job.cached) for group in groups.values()]


def prefill_chunks(groups: list[list[Job]]) -> list[list[list[Job]]]:
    """Split groups into prefill calls of bounded padded size, prompts of like length together."""
    ordered = sorted(groups, key=lambda group: len(group[0].prompt) - group[0].cached)
    chunks: list[list[list[Job]]] = []
    longest = 0
    for group in ordered:
        size, new = len(group[0].prompt), len(group[0].prompt) - group[0].cached
        longest = max(longest, size)
        # Ascending order: ``new`` is the most of its chunk.
        tokens = (len(chunks[-1]) + 1) * new if chunks else 0
        if chunks and tokens <= _MAX_TOKENS and tokens * longest <= _MAX_CELLS:
            chunks[-1].append(group)
        else:
            chunks.append([group])
            longest = size
    return chunks
