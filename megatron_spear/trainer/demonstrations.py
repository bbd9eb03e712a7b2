"""Demonstrations as training samples, made ahead of time by worker processes (no torch in them)."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from megatron_spear.algorithms.aggregation import WeightArray
from megatron_spear.config.environments.base import EnvironmentSection, History
from megatron_spear.config.schema import SftSection
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.family import family_of
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import EnvironmentsLost
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.conversation import Conversation
from megatron_spear.rollout.env_worker import exit_with_parent
from megatron_spear.types import (
    Reward,
    Segment,
    TrainSample,
    TrajectoryId,
    Turn,
    VersionSpan,
)

_PREFETCH = 4


class DemonstrationSource:
    """Demonstration ``i`` depends on (``sft.seed``, i) alone; step ``s`` takes the next ones.

    ``made_seed`` is the seed of tasks that are made. ``limit_s`` is the longest wait for one step's
    demonstrations.
    """

    def __init__(
        self, env: EnvironmentSection, sft: SftSection, made_seed: int, *, limit_s: float
    ) -> None:
        self._env, self._sft, self._seed = env, sft, made_seed
        self._limit_s = limit_s
        others = set(multiprocessing.active_children())
        self._executor = ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_end_with,
            initargs=(os.getpid(),),
        )
        with _stop_signals_blocked():  # the worker starts now, and inherits that
            self._executor.submit(os.getpid)
        self._workers = set(multiprocessing.active_children()) - others

    def batches(self) -> Iterator[list[Demonstration]]:
        """One list of demonstrations a step, ``sft.steps`` times, made ahead in the background.

        Raises EnvironmentsLost when the worker ends or makes none within the limit.
        """
        waiting = deque[Future[list[Demonstration]]]()
        for step in range(self._sft.steps):
            try:
                while len(waiting) <= _PREFETCH and step + len(waiting) < self._sft.steps:
                    waiting.append(self._submit(step + len(waiting)))
                made = waiting.popleft().result(timeout=self._limit_s)
            except BrokenProcessPool:
                raise EnvironmentsLost(
                    f"the process that makes demonstrations ended before those of warm-start step "
                    f"{step + 1} were there: killed, or out of memory; give the same command again"
                ) from None
            except TimeoutError:
                for worker in self._workers:
                    worker.kill()
                raise EnvironmentsLost(
                    f"got no demonstrations for warm-start step {step + 1} within "
                    f"{self._limit_s:g} s; raise run.hang_limit_s, or lower "
                    "sft.trajectories_per_step"
                ) from None
            yield made

    def _submit(self, step: int) -> Future[list[Demonstration]]:
        size = self._sft.trajectories_per_step
        return self._executor.submit(
            make_demonstrations, self._env, self._sft, self._seed, step * size, size
        )

    def close(self) -> None:
        """End the worker."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def make_demonstrations(
    env: EnvironmentSection, sft: SftSection, made_seed: int, first: int, count: int
) -> list[Demonstration]:
    """Demonstrations ``first`` to ``first + count - 1``; runs in the worker."""
    family = family_of(env)
    return [family.demonstration(sft, made_seed, index) for index in range(first, first + count)]


def _end_with(parent: int) -> None:
    """Start of the worker: it ends when its parent is gone, also after a kill."""
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Ctrl-C and its like wait until the end of the block; a process started in it never gets one.

    They go to the whole process group, and are the parent's business alone.
    """
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def to_samples(
    demonstration: Demonstration,
    name: str,
    renderer: ChatRenderer,
    view: AgentView,
    *,
    history: History,
    observation_weight: float,
    max_tokens: int,
    decision_weight: float = 1.0,
) -> list[tuple[TrainSample, WeightArray]]:
    """The samples of one demonstration (one per segment), rendered as rollouts are.

    ``history`` is ``env.history``. Weights ``[L]`` are not
    normalised yet: 1 on learned actions (``decision_weight`` on their first token), 0 on slips,
    ``observation_weight`` on what is read. Segments are cut at ``max_tokens``.
    """
    conversation = Conversation(renderer, view, demonstration.messages, history)
    segments: list[list[Turn]] = []
    for played in demonstration.turns:
        prompt = conversation.next_prompt(played.observation, played.info)
        opening = renderer.opening(prompt.token_ids)
        answer = renderer.encode_action(view.demonstrate(played.action), opening)
        conversation.answered(answer, played.action)
        turn = Turn(
            observation_tokens=prompt.new_tokens,
            action_tokens=answer,
            action_logprobs=np.zeros(len(answer), np.float32),
            finish_reason="stop",
            versions=(VersionSpan(0, len(answer)),),
            valid=played.trained,
        )
        if prompt.begins_segment:
            segments.append([])
        segments[-1].append(turn)
    return [
        _sample(
            (name, number, len(segments)), turns, (observation_weight, decision_weight), max_tokens
        )
        for number, turns in enumerate(segments)
    ]


def _sample(
    name: tuple[str, int, int], turns: Sequence[Turn], weight: tuple[float, float], limit: int
) -> tuple[TrainSample, WeightArray]:
    """``name`` is (prompt id, segment, number of segments), ``weight`` (observation, decision)."""
    segment = Segment(turns=tuple(turns))
    parts: list[WeightArray] = []
    for turn in turns:
        action = np.full(len(turn.action_tokens), float(turn.valid))
        action[0] *= weight[1]
        parts += [np.full(len(turn.observation_tokens), weight[0]), action]
    weights = np.concatenate(parts)
    length = min(segment.num_tokens, limit)
    starts = segment.turn_starts[segment.turn_starts < length]
    weights[0] = 0.0
    zeros = np.zeros(length, np.float32)
    sample = TrainSample(
        trajectory_id=TrajectoryId(group=name[0], member=0),
        segment=name[1],
        num_segments=name[2],
        prompt_id=name[0],
        token_ids=segment.token_ids[:length],
        response_mask=segment.response_mask[:length],
        rollout_logprobs=zeros,
        old_logprobs=zeros,
        advantages=zeros,
        reward=Reward(outcome=1.0),
        turn_starts=starts,
        anchors=("",) * len(starts),
        policy_version=0,
    )
    return sample, weights[:length]
