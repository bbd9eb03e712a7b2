"""The requests of the embedded engine that wait and run, and the steps that bring them forward.

waiting -> score the prompt, if asked for -> slot, shared prefix, prefill -> running
running -> decode, draw -> answered
"""

import asyncio

import numpy as np
import torch

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import PauseMode
from megatron_spear.rollout.engines.decoder import Decoder
from megatron_spear.rollout.engines.jobs import Job, prefill_chunks, shared_prompts
from megatron_spear.rollout.engines.kv_cache import KVCache
from megatron_spear.rollout.engines.sampling import sample, uniforms

# New requests wait until they are this share of the running ones, so that prefills are batched; but
# never longer than this many decode steps.
_ADMIT_FRACTION = 0.25
_ADMIT_STEPS = 16

COUNTED = (
    "prefill_tokens",
    "reused_tokens",
    "shared_tokens",
    "sampled_tokens",
    "decode_steps",
    "prefill_calls",
)


class Batch:
    """Requests ``waiting`` and ``running``; ``stats`` counts ``COUNTED`` since the start.

    A request that waits longer than ``patience_s`` may take the slot of a session that waits too.
    While ``holding`` none of the waiting ones begins.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, *, max_context: int, patience_s: float
    ) -> None:
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.holding = False
        self.stats = dict.fromkeys(COUNTED, 0)
        self.max_context = max_context
        self.patience_s = patience_s
        self._decoder = decoder
        self._cache = cache
        self._waited_steps = 0
        self._policy_version = 0

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All that are not answered."""
        return (*self.waiting, *self.running)

    @property
    def can_step(self) -> bool:
        """True while there is something to do."""
        return bool(self.running or (self.waiting and not self.holding))

    def step(self, policy_version: int) -> None:
        """Score, admit and decode once; tokens are drawn as of ``policy_version``."""
        self._policy_version = policy_version
        if not self.holding:
            self._score()
            self._admit()
        self._decode()

    def retract(self, mode: PauseMode) -> None:
        """All that runs waits again, at the head of the queue; see ``PauseMode``."""
        for job in self.jobs:
            job.back_to_waiting(mode)
        self.waiting = self.running + self.waiting
        self.running = []

    def remove(self, job: Job) -> None:
        """Forget a request."""
        self.waiting = [other for other in self.waiting if other is not job]
        self.running = [other for other in self.running if other is not job]

    def fail_all(self, why: str) -> None:
        """Fail every request and give its session's slot back."""
        for job in self.jobs:
            job.fail(EngineError(f"generation of session {job.session!r} failed: {why}"))
            self._cache.release(job.session)
        self.waiting, self.running = [], []

    def _score(self) -> None:
        """Compute the log-probs of one waiting prompt; that may be all that is asked for."""
        job = next((job for job in self.waiting if job.unscored), None)
        if job is None:
            return
        job.prompt_logprobs = self._decoder.score(job.request.token_ids)
        reason = job.request.finish_reason(job.tokens, self.max_context)
        if reason is not None:
            self.remove(job)
            self._end(job, reason)

    def _admit(self) -> None:
        """Give waiting requests a slot and prefill them, when it is worth a prefill call."""
        enough = len(self.waiting) >= _ADMIT_FRACTION * len(self.running)
        if not self.waiting or not (enough or self._waited_steps >= _ADMIT_STEPS):
            self._waited_steps += bool(self.waiting)
            return
        admitted = self._take_slots()
        if not admitted:
            return
        self.waiting = [job for job in self.waiting if job.slot < 0]
        self._waited_steps = 0
        self.running.extend(admitted)
        self.running.sort(key=lambda job: job.slot)
        for groups in prefill_chunks(self._share(admitted)):
            self._prefill(groups)

    def _take_slots(self) -> list[Job]:
        """Waiting requests that got a slot, in the order they came.

        The idle slot of a session that waits itself is left to it, except by a request that has
        waited for a quarter of its deadline.
        """
        busy = {job.slot for job in self.running}
        owned = (self._cache.slot_of(job.session) for job in self.waiting)
        wanted = {slot for slot in owned if slot is not None}
        now, admitted = asyncio.get_running_loop().time(), []
        for job in self.waiting:
            if job.unscored:
                continue
            impatient = now - job.queued_s > self.patience_s
            job.returning = self._cache.slot_of(job.session) is not None
            slot = self._cache.acquire(job.session, busy if impatient else busy | wanted)
            if slot is not None:
                job.slot = slot
                busy.add(slot)
                admitted.append(job)
        return admitted

    def _share(self, jobs: list[Job]) -> list[list[Job]]:
        """Jobs with equal prompts, the one to be computed first, their slots cut to what is usable.

        Afterwards each leader's slot holds all that any slot held of its prompt, but for the last
        token, whose logits are needed.
        """
        for job in jobs:
            job.cached = int(self._cache.common_prefix(job.prompt)[job.slot])
            self._cache.truncate(job.slot, job.cached)
        groups = shared_prompts(jobs)
        for leader, *_ in groups:
            prefixes = self._cache.common_prefix(leader.prompt)
            source, limit = int(prefixes.argmax()), len(leader.prompt) - 1
            found = min(int(prefixes[source]), limit)
            leader.cached = min(leader.cached, limit)
            self._cache.truncate(leader.slot, leader.cached)
            self._count_cached(leader, found)
            if found > leader.cached:
                self._cache.copy(source, [leader.slot], leader.cached, found)
                leader.cached = found
        return groups

    def _count_cached(self, job: Job, found: int) -> None:
        """Count ``found`` tokens not computed: those of its own session reused, others shared."""
        job.note_cached(found)
        reused = job.cached if job.returning else 0
        self.stats["reused_tokens"] += reused
        self.stats["shared_tokens"] += found - reused

    def _prefill(self, groups: list[list[Job]]) -> None:
        """Compute each group's prompt once, copy it to its members, draw the first tokens."""
        groups.sort(key=lambda group: group[0].slot)
        leaders = [group[0] for group in groups]
        slots = np.array([job.slot for job in leaders])
        new = [job.prompt[job.cached :] for job in leaders]
        logits = self._decoder.prefill(self._cache, slots, new)
        self.stats["prefill_calls"] += 1
        for leader, tokens in zip(leaders, new, strict=True):
            self._cache.append(leader.slot, tokens)
            self.stats["prefill_tokens"] += len(tokens)
        for leader, *members in groups:
            for job in members:
                self._cache.copy(leader.slot, [job.slot], job.cached, len(job.prompt))
                self._count_cached(job, len(job.prompt))
        jobs = [job for group in groups for job in group]
        rows = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        each = logits if len(jobs) == len(groups) else logits[torch.from_numpy(rows)]
        self._draw(jobs, each)

    def _decode(self) -> None:
        """One further token for every running request."""
        if not self.running:
            return
        slots = np.array([job.slot for job in self.running])
        tokens = np.array([job.tokens[-1] for job in self.running])
        logits = self._decoder.decode(self._cache, slots, tokens)
        self._cache.tokens[slots, self._cache.length[slots]] = tokens
        self._cache.length[slots] += 1
        self.stats["decode_steps"] += 1
        self._draw(list(self.running), logits)

    def _draw(self, jobs: list[Job], logits: torch.Tensor) -> None:
        """Sample a token for each job from ``logits`` ``[B, V]`` and finish those that end."""
        keys = np.array([job.key for job in jobs], np.uint64)
        counters = np.array([len(job.tokens) for job in jobs], np.uint64)
        temperatures = torch.tensor([job.request.sampling.temperature for job in jobs])
        shares = [job.request.sampling.top_p for job in jobs]
        top_ps = torch.tensor(shares, dtype=torch.float64) if min(shares) < 1 else None
        with torch.inference_mode():
            draws = torch.from_numpy(uniforms(keys, counters))
            drawn = sample(logits, temperatures, draws, top_ps)
        columns = (column.tolist() for column in drawn)
        for job, token, logprob, finite in zip(jobs, *columns, strict=True):
            if not finite:
                self._cache.wipe(job.slot)
                self._cache.release(job.session)
                self._end(job, None)
                continue
            job.draw(token, logprob, self._policy_version)
            self.stats["sampled_tokens"] += 1
            reason = job.request.finish_reason(job.tokens, self.max_context)
            if reason is not None:
                self._end(job, reason)
        if any(job.finished for job in jobs):
            self.running = [job for job in self.running if not job.finished]

    def _end(self, job: Job, reason: str | None) -> None:
        """Answer a job; ``reason`` None = its logits were not finite."""
        if reason is not None:
            job.succeed(reason, self._policy_version)
            return
        job.fail(
            EngineError(
                f"logits of session {job.session!r} are not finite after {len(job.tokens)} new "
                f"tokens at policy version {self._policy_version}; check the weights of that update"
            )
        )
