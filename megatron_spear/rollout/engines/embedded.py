"""The embedded engine: batched generation in this process, on the event loop's own thread.

    generate() -> waiting -> admit: slot, shared prefix, prefill -> running -> decode, draw -> done
                     ^  ^                                              |                    |
                     |  +---------------- at a pause -----------------+                    |
                     +--- next turn of the session: only its new tokens are prefilled <-----+

One task steps the model while there is work and gives way to the other coroutines between steps, so
that environments advance. It starts with the first request and ends when nothing is left to do.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, PauseMode
from megatron_spear.rollout.engines.decoder import Decoder
from megatron_spear.rollout.engines.decoder_weights import DecoderWeights
from megatron_spear.rollout.engines.jobs import Job, prefill_chunks, shared_prompts
from megatron_spear.rollout.engines.kv_cache import KVCache
from megatron_spear.rollout.engines.sampling import sample, uniforms

# New requests wait until they are this share of the running ones, so that prefills are batched; but
# never longer than this many decode steps.
_ADMIT_FRACTION = 0.25
_ADMIT_STEPS = 16


class EmbeddedEngine:
    """A rollout engine (see ``rollout.engine``) in this process.

    ``stats`` counts tokens since the start: ``prefill_tokens`` (computed), ``reused_tokens``
    (cached for their session), ``shared_tokens`` (taken from another context): these add up to the
    prompts' tokens. Also ``sampled_tokens``, ``decode_steps`` and ``prefill_calls``.
    """

    def __init__(
        self, decoder: Decoder, *, max_slots: int, max_context: int, deadline_s: float
    ) -> None:
        shape = decoder.shape
        self.policy_version = 0
        self.max_context = max_context
        self.deadline_s = deadline_s
        self.stats = dict.fromkeys(
            (
                "prefill_tokens",
                "reused_tokens",
                "shared_tokens",
                "sampled_tokens",
                "decode_steps",
                "prefill_calls",
            ),
            0,
        )
        self._decoder = decoder
        self._cache = KVCache(
            layers=shape.num_layers,
            slots=max_slots,
            kv_heads=shape.num_groups,
            max_context=max_context,
            head_dim=shape.head_dim,
            dtype=decoder.weights.dtype,
        )
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._waited_steps = 0
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._unusable: str | None = None

    @classmethod
    def from_hf(
        cls, path: Path | str, *, max_slots: int, max_context: int, deadline_s: float
    ) -> "EmbeddedEngine":
        """An engine with the weights of a Hugging Face folder (config.json, safetensors).

        Takes what the policy takes, in fp32 or bf16 (``dtype`` in config.json). Raises
        ConfigError, CheckpointError, or EngineError where config and weights do not agree.
        """
        config = load_config(Path(path))
        shape = model_shape(config)
        if max_context > shape.max_length:
            raise ConfigError(
                f"max_context={max_context} is above the model's max_position_embeddings="
                f"{shape.max_length} in {path}; lower max_context"
            )
        dtype = config.dtype or torch.float32
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"{path} has dtype={dtype}; the embedded engine takes fp32 or bf16")
        weights = DecoderWeights(shape, dtype)
        with HfReader(Path(path)) as reader:
            weights.load((name, reader.get(name)) for name in reader.names)
        decoder = Decoder(weights, max_context)
        return cls(decoder, max_slots=max_slots, max_context=max_context, deadline_s=deadline_s)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Draw one generation; see ``RolloutEngine``.

        Raises EngineError: malformed request, a session that is already generating, non-finite
        logits, or ``deadline_s`` passed. A cancelled call gives its slot back.
        """
        self._check(request)
        job = Job(request)
        if len(job.prompt) >= self.max_context:
            return job.generation("context", self.policy_version)
        self._waiting.append(job)
        self._work()
        try:
            async with asyncio.timeout(self.deadline_s):
                return await job.future
        except TimeoutError:
            raise EngineError(
                f"generation of session {request.session!r} took more than {self.deadline_s} s "
                f"({len(job.tokens)} tokens drawn, {len(self._waiting)} waiting, "
                f"{len(self._running)} running); raise the deadline or lower the load"
            ) from None
        finally:
            if not job.answered:
                self._drop(job)

    def release(self, session: str) -> None:
        """Forget a session (unknown ones are fine); a generation under way fails."""
        for job in (*self._waiting, *self._running):
            if job.session == session:
                job.fail(EngineError(f"session {session!r} was released while it was generating"))
                self._remove(job)
        self._cache.release(session)

    async def pause(self, mode: PauseMode) -> None:
        """Stop stepping; see ``RolloutEngine``. What runs waits again, what waits goes on to."""
        self._paused = True
        for job in self._running:
            job.back_to_waiting(mode)
        for job in self._waiting if mode == "abort" else ():
            job.back_to_waiting(mode)
        self._waiting = self._running + self._waiting
        self._running = []

    async def resume(self) -> None:
        """Go on after a pause; fails what waits if an update was not completed."""
        self._paused = False
        if self._unusable is not None:
            self._fail_all(self._unusable)
        self._work()

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Take a full set of weights in place and drop every cached context.

        Another thread than the event loop's may call it while the engine is paused or idle.
        Raises EngineError when a generation is under way and not paused, or the set is not exactly
        the model's parameters; after the latter the engine refuses to generate until a full set has
        arrived.
        """
        if not self._paused and (self._waiting or self._running):
            raise EngineError(
                f"weights of version {policy_version} arrived while {len(self._running)} "
                f"generations run and {len(self._waiting)} wait; await them or pause first"
            )
        self._unusable = f"the update to policy version {policy_version} was not completed"
        self._decoder.weights.load(named_tensors)
        self._cache.clear()
        self.policy_version = policy_version
        self._unusable = None

    async def close(self) -> None:
        """Fail what is under way and refuse further requests."""
        self._unusable, self._paused = "the engine is closed", False
        self._fail_all("the engine was closed")
        self._task = None

    def _check(self, request: GenerationRequest) -> None:
        """Raise EngineError for a request that cannot be served."""
        if self._unusable is not None and not self._paused:
            raise EngineError(f"the engine cannot generate: {self._unusable}")
        request.check()
        tokens, vocab, problem = request.token_ids, self._decoder.shape.vocab_size, None
        if tokens.min() < 0 or tokens.max() >= vocab:
            problem = (
                f"token ids span {tokens.min()}..{tokens.max()}; the vocabulary is 0..{vocab - 1}"
            )
        elif any(job.session == request.session for job in (*self._waiting, *self._running)):
            problem = "it is already generating; await one turn before the next"
        if problem is not None:
            raise EngineError(f"request of session {request.session!r}: {problem}")

    def _work(self) -> None:
        """See to it that a task steps while there is work."""
        if self._paused or not (self._waiting or self._running):
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="embedded-engine")
            self._task.add_done_callback(self._on_task_end)

    async def _run(self) -> None:
        """Step while there is work; other coroutines advance between the steps."""
        while self._waiting or self._running:
            await asyncio.sleep(0)
            if self._paused:
                return
            self._admit()
            self._decode()

    def _admit(self) -> None:
        """Give waiting requests a slot and prefill them, when it is worth a prefill call."""
        enough = len(self._waiting) >= _ADMIT_FRACTION * len(self._running)
        if not self._waiting or not (enough or self._waited_steps >= _ADMIT_STEPS):
            self._waited_steps += bool(self._waiting)
            return
        admitted = self._take_slots()
        if not admitted:
            return
        self._waiting = [job for job in self._waiting if job.slot < 0]
        self._waited_steps = 0
        self._running.extend(admitted)
        self._running.sort(key=lambda job: job.slot)
        for groups in prefill_chunks(self._share(admitted)):
            self._prefill(groups)

    def _take_slots(self) -> list[Job]:
        """Waiting requests that got a slot, in the order they came.

        The idle slot of a session that waits itself is left to it, except by a request that has
        waited for a quarter of its deadline.
        """
        busy = {job.slot for job in self._running}
        owned = (self._cache.slot_of(job.session) for job in self._waiting)
        wanted = {slot for slot in owned if slot is not None}
        now, admitted = asyncio.get_running_loop().time(), []
        for job in self._waiting:
            impatient = now - job.queued_s > self.deadline_s / 4
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
        self._draw(jobs, logits if len(jobs) == len(groups) else logits[torch.from_numpy(rows)])

    def _decode(self) -> None:
        """One further token for every running request."""
        if not self._running:
            return
        slots = np.array([job.slot for job in self._running])
        tokens = np.array([job.tokens[-1] for job in self._running])
        logits = self._decoder.decode(self._cache, slots, tokens)
        self._cache.tokens[slots, self._cache.length[slots]] = tokens
        self._cache.length[slots] += 1
        self.stats["decode_steps"] += 1
        self._draw(list(self._running), logits)

    def _draw(self, jobs: list[Job], logits: torch.Tensor) -> None:
        """Sample a token for each job from ``logits`` ``[B, V]`` and finish those that end."""
        keys = np.array([job.key for job in jobs], np.uint64)
        counters = np.array([len(job.tokens) for job in jobs], np.uint64)
        temperatures = torch.tensor([job.request.sampling.temperature for job in jobs])
        with torch.inference_mode():
            drawn = sample(logits, temperatures, torch.from_numpy(uniforms(keys, counters)))
        columns = (column.tolist() for column in drawn)
        for job, token, logprob, finite in zip(jobs, *columns, strict=True):
            if not finite:
                self._cache.wipe(job.slot)
                self._cache.release(job.session)
                self._end(job, None)
                continue
            job.draw(token, logprob, self.policy_version)
            self.stats["sampled_tokens"] += 1
            reason = job.request.finish_reason(job.tokens, self.max_context)
            if reason is not None:
                self._end(job, reason)
        if any(job.finished for job in jobs):
            self._running = [job for job in self._running if not job.finished]

    def _end(self, job: Job, reason: str | None) -> None:
        """Answer a job; ``reason`` None = its logits were not finite."""
        if reason is not None:
            job.succeed(reason, self.policy_version)
            return
        job.fail(
            EngineError(
                f"logits of session {job.session!r} are not finite after {len(job.tokens)} new "
                f"tokens at policy version {self.policy_version}; check the weights of that update"
            )
        )

    def _drop(self, job: Job) -> None:
        """Forget a job nobody waits for any more, with its slot."""
        job.future.cancel()
        self._remove(job)
        self._cache.release(job.session)

    def _remove(self, job: Job) -> None:
        self._waiting = [other for other in self._waiting if other is not job]
        self._running = [other for other in self._running if other is not job]

    def _fail_all(self, why: str) -> None:
        for job in (*self._waiting, *self._running):
            job.fail(EngineError(f"generation of session {job.session!r} failed: {why}"))
            self._cache.release(job.session)
        self._waiting, self._running = [], []

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """Nobody may wait for a task that died."""
        if task is not self._task:
            return
        if task.cancelled():
            self._fail_all("the engine's task was cancelled")
        elif (error := task.exception()) is not None:
            self._fail_all(f"the engine's task died: {type(error).__name__}: {error}")
