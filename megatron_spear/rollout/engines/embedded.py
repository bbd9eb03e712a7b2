"""The embedded engine: batched generation in this process, on the event loop's own thread.

    generate() -> waiting -> admit: slot, shared prefix, prefill -> running -> decode, draw -> done
                     ^  ^                                              |                    |
                     |  +---------------- at a pause -----------------+                    |
                     +--- next turn of the session: only its new tokens are prefilled <-----+

One task steps the model while there is work and gives way to the other coroutines between steps, so
that environments advance. It starts with the first request and ends when nothing is left to do.
"""

import asyncio
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, PauseMode
from megatron_spear.rollout.engines.batch import Batch
from megatron_spear.rollout.engines.decoder import Decoder
from megatron_spear.rollout.engines.decoder_weights import DecoderWeights
from megatron_spear.rollout.engines.jobs import Job
from megatron_spear.rollout.engines.kv_cache import KVCache

_DRAIN_POLL_S = 0.002


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
        self._decoder = decoder
        self._cache = KVCache(
            layers=shape.num_layers,
            slots=max_slots,
            kv_heads=shape.num_groups,
            max_context=max_context,
            head_dim=shape.head_dim,
            dtype=decoder.weights.dtype,
        )
        self._batch = Batch(
            decoder, self._cache, max_context=max_context, patience_s=deadline_s / 4
        )
        self.stats = self._batch.stats
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._unusable: str | None = None
        self.released: set[str] = set()
        """Of ``weights`` and ``kv_cache``, whose memory is given back."""

    @classmethod
    def from_hf(
        cls, path: Path | str, *, max_slots: int, max_context: int, deadline_s: float
    ) -> "EmbeddedEngine":
        """An engine with the weights of a Hugging Face folder (config.json, safetensors).

        Takes what the policy takes, in fp32 or bf16 (``dtype`` in config.json). Raises
        ConfigError, CheckpointError, or EngineError where config and weights do not agree.
        """
        weights = empty_weights(Path(path), max_context)
        with HfReader(Path(path)) as reader:
            weights.load((name, reader.get(name)) for name in reader.names)
        decoder = Decoder(weights, max_context)
        return cls(decoder, max_slots=max_slots, max_context=max_context, deadline_s=deadline_s)

    @property
    def weights(self) -> DecoderWeights:
        """What the decoder computes with; to be written to between ``begin_update`` and
        ``end_update`` only."""
        return self._decoder.weights

    @property
    def unusable(self) -> str | None:
        """Why the engine cannot generate; None if it can (paused or not)."""
        if self._unusable is None and self.released:
            return f"the memory of {' and '.join(sorted(self.released))} is released"
        return self._unusable

    @property
    def is_still(self) -> bool:
        """True while nothing is under way, but for what waits during a pause."""
        return not self._batch.running and (self._paused or not self._batch.waiting)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Draw one generation; see ``RolloutEngine``.

        Raises EngineError: malformed request, a session that is already generating, non-finite
        logits, or ``deadline_s`` passed. A cancelled call gives its slot back.
        """
        self._check(request)
        job = Job(request)
        if len(job.prompt) >= self.max_context and not request.score_prompt:
            return job.generation("context", self.policy_version)
        self._batch.waiting.append(job)
        self._work()
        try:
            async with asyncio.timeout(self.deadline_s):
                return await job.future
        except TimeoutError:
            raise EngineError(
                f"generation of session {request.session!r} took more than {self.deadline_s} s "
                f"({len(job.tokens)} tokens drawn, {len(self._batch.waiting)} waiting, "
                f"{len(self._batch.running)} running); raise the deadline or lower the load"
            ) from None
        finally:
            if not job.answered:
                self._drop(job)

    def release(self, session: str) -> None:
        """Forget a session (unknown ones are fine); a generation under way fails."""
        for job in self._batch.jobs:
            if job.session == session:
                job.fail(EngineError(f"session {session!r} was released while it was generating"))
                self._batch.remove(job)
        self._cache.release(session)

    def abort(self, session: str | None = None) -> None:
        """Answer a generation under way, or all, with what was drawn so far (``abort``)."""
        for job in self._batch.jobs:
            if session is None or job.session == session:
                job.succeed("abort", self.policy_version)
                self._batch.remove(job)

    async def pause(self, mode: PauseMode) -> None:
        """Stop stepping; see ``RolloutEngine``. What runs waits again, what waits goes on to."""
        self._paused = True
        self._batch.retract(mode)

    async def drain(self) -> None:
        """Pause once what runs has come to its end (at most ``deadline_s``); the rest waits."""
        self._batch.holding = True
        try:
            while self._batch.running and not self._paused:
                await asyncio.sleep(_DRAIN_POLL_S)
        finally:
            self._batch.holding = False
            self._work()
        await self.pause("retract")

    async def resume(self) -> None:
        """Go on after a pause; fails what waits if an update was not completed."""
        self._paused = False
        if self.unusable is not None:
            self._batch.fail_all(self.unusable)
        self._work()

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Take a full set of weights in place and drop every cached context.

        Another thread than the event loop's may call it while the engine is paused or idle.
        Raises EngineError when a generation is under way and not paused, or the set is not exactly
        the model's parameters; after the latter the engine refuses to generate until a full set has
        arrived.
        """
        self.begin_update(policy_version)
        for name, tensor in named_tensors:
            self.weights.put(name, tensor)
        self.end_update(policy_version)

    def begin_update(self, policy_version: int) -> None:
        """Begin what ``load_weights`` does, in pieces: ``weights.put`` any number of times, then
        ``end_update``. Until that the engine refuses to generate."""
        if not self.is_still:
            raise EngineError(
                f"weights of version {policy_version} arrived while {len(self._batch.running)} "
                f"generations run and {len(self._batch.waiting)} wait; await them or pause first"
            )
        self._unusable = f"the update to policy version {policy_version} was not completed"
        self.weights.begin()

    def end_update(self, policy_version: int) -> None:
        """Generate from the weights put since ``begin_update``; EngineError if any is missing."""
        self.weights.finish()
        self._cache.clear()
        self.policy_version = policy_version
        self._unusable = None

    def flush_cache(self) -> None:
        """Drop every cached context, which nothing under way may use."""
        assert self.is_still, "generations are under way"
        self._cache.clear()

    def release_memory(self, tags: Collection[str]) -> None:
        """Give back the memory of ``weights`` or ``kv_cache``; EngineError while anything runs."""
        if not self.is_still:
            raise EngineError(
                f"{len(self._batch.jobs)} generations are under way; await them or pause first"
            )
        if "kv_cache" in tags and "kv_cache" not in self.released:
            self._cache.free()
        if "weights" in tags and "weights" not in self.released:
            self.weights.free()
            self._unusable = "its weights were released; a full update has to follow"
        self.released.update(tags)

    def resume_memory(self, tags: Collection[str]) -> None:
        """Take memory again; weights are then zeros, and a full update has to follow."""
        if "kv_cache" in self.released.intersection(tags):
            self._cache.restore()
        if "weights" in self.released.intersection(tags):
            self.weights.restore()
        self.released.difference_update(tags)

    async def close(self) -> None:
        """Fail what is under way and refuse further requests."""
        self._unusable, self._paused = "the engine is closed", False
        self._batch.fail_all("the engine was closed")
        self._task = None

    def _check(self, request: GenerationRequest) -> None:
        """Raise EngineError for a request that cannot be served."""
        if self.unusable is not None and not self._paused:
            raise EngineError(f"the engine cannot generate: {self.unusable}")
        request.check()
        tokens, vocab, problem = request.token_ids, self._decoder.shape.vocab_size, None
        if tokens.min() < 0 or tokens.max() >= vocab:
            problem = (
                f"token ids span {tokens.min()}..{tokens.max()}; the vocabulary is 0..{vocab - 1}"
            )
        elif request.score_prompt and len(tokens) > self.max_context:
            problem = f"{len(tokens)} tokens to score; max_context is {self.max_context}"
        elif any(job.session == request.session for job in self._batch.jobs):
            problem = "it is already generating; await one turn before the next"
        if problem is not None:
            raise EngineError(f"request of session {request.session!r}: {problem}")

    def _work(self) -> None:
        """See to it that a task steps while there is work."""
        if self._paused or not self._batch.can_step:
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="embedded-engine")
            self._task.add_done_callback(self._on_task_end)

    async def _run(self) -> None:
        """Step while there is work; other coroutines advance between the steps."""
        while self._batch.can_step:
            await asyncio.sleep(0)
            if self._paused:
                return
            self._batch.step(self.policy_version)

    def _drop(self, job: Job) -> None:
        """Forget a job nobody waits for any more, with its slot."""
        job.future.cancel()
        self._batch.remove(job)
        self._cache.release(job.session)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """Nobody may wait for a task that died."""
        if task is not self._task:
            return
        if task.cancelled():
            self._batch.fail_all("the engine's task was cancelled")
        elif (error := task.exception()) is not None:
            self._batch.fail_all(f"the engine's task died: {type(error).__name__}: {error}")


def empty_weights(path: Path, max_context: int) -> DecoderWeights:
    """Room for the weights of a Hugging Face folder; ConfigError for what the decoder does not run
    and for a context longer than the model's."""
    config = load_config(path)
    shape = model_shape(config)
    if max_context > shape.max_length:
        raise ConfigError(
            f"max_context={max_context} is above the model's max_position_embeddings="
            f"{shape.max_length} in {path}; lower max_context"
        )
    dtype = config.dtype or torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"{path} has dtype={dtype}; the embedded engine takes fp32 or bf16")
    return DecoderWeights(shape, dtype)
