"""Demonstrations as training samples, made ahead of time by worker processes (no torch in them)."""

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from megatron_spear.algorithms.aggregation import WeightArray
from megatron_spear.config.schema import AlfworldSection, SftSection, WindowHistory
from megatron_spear.envs.alfworld.demonstrations import Demonstration, demonstrate
from megatron_spear.envs.alfworld.game import GameFile, parse_game
from megatron_spear.envs.alfworld.generator import generate_game
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.envs.alfworld.task import training_games
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import DataError
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.types import Reward, Segment, TrainSample, TrajectoryId, Turn

_MAX_TRIES = 50
_PREFETCH = 4


class DemonstrationSource:
    """Demonstration ``i`` depends on (``sft.seed``, i) alone; step ``s`` takes the next ones.

    ``game_seed`` is the seed of generated games; loaded games come from ``env.games``.
    """

    def __init__(self, env: AlfworldSection, sft: SftSection, game_seed: int) -> None:
        self._env, self._sft, self._seed = env, sft, game_seed
        self._executor = ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_end_with,
            initargs=(os.getpid(),),
        )
        with _stop_signals_blocked():  # the worker starts now, and inherits that
            self._executor.submit(os.getpid)

    def batches(self) -> Iterator[list[Demonstration]]:
        """One list of demonstrations a step, ``sft.steps`` times, made ahead in the background."""
        size, waiting = self._sft.trajectories_per_step, deque[Future[list[Demonstration]]]()
        for step in range(self._sft.steps + _PREFETCH):
            if step < self._sft.steps:
                first = step * size
                waiting.append(
                    self._executor.submit(
                        make_demonstrations, self._env, self._sft, self._seed, first, size
                    )
                )
            if step >= _PREFETCH:
                yield waiting.popleft().result(timeout=300)

    def close(self) -> None:
        """End the worker."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def make_demonstrations(
    env: AlfworldSection, sft: SftSection, game_seed: int, first: int, count: int
) -> list[Demonstration]:
    """Demonstrations ``first`` to ``first + count - 1``; runs in the worker."""
    return [_one(env, sft, game_seed, index) for index in range(first, first + count)]


@functools.lru_cache(maxsize=1)
def _loaded_games(env: AlfworldSection) -> list[GameFile]:
    """The training games of ``env.games``, read once in a process."""
    return training_games(env)


def _one(env: AlfworldSection, sft: SftSection, game_seed: int, index: int) -> Demonstration:
    rng = random.Random(f"sft/{sft.seed}/{index}")
    for attempt in range(_MAX_TRIES):
        if env.games is None:
            game = generate_game(
                game_seed,
                index + attempt * 1_000_003,
                task_types=env.task_types,
                settings=env.generator,
            )
        else:
            game = rng.choice(_loaded_games(env))
        played = demonstrate(
            parse_game(game),
            rng,
            explore=sft.explore,
            noise=sft.noise,
            max_turns=env.max_turns,
            admissible=env.prompt == "official",
        )
        if played is not None:
            return played
    raise DataError(
        f"sft: got no demonstration within env.max_turns={env.max_turns} in {_MAX_TRIES} games; "
        "raise env.max_turns or lower sft.explore and sft.noise"
    )


def _end_with(parent: int) -> None:
    """Start of the worker: it ends when its parent is gone, also after a kill."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


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
    env: AlfworldSection,
    *,
    observation_weight: float,
    max_tokens: int,
    decision_weight: float = 1.0,
) -> list[tuple[TrainSample, WeightArray]]:
    """The samples of one demonstration (one per segment), rendered exactly as rollouts are.

    Weights ``[L]`` are not normalised yet: 1 on learned actions (``decision_weight`` on their first
    token), 0 on slips, ``observation_weight`` on what is read. Segments are cut at ``max_tokens``.
    """
    view = alfworld_view(env.prompt)
    segments: list[list[Turn]] = []
    for index in range(len(demonstration.turns)):
        observation = _observation_tokens(demonstration, index, renderer, view, env, segments)
        action = renderer.encode_action(view.demonstrate(demonstration.turns[index].action))
        turn = Turn(
            observation_tokens=observation,
            action_tokens=action,
            action_logprobs=np.zeros(len(action), np.float32),
            finish_reason="stop",
            policy_version=(0, 0),
            valid=demonstration.turns[index].trained,
        )
        if isinstance(env.history, WindowHistory) or not segments:
            segments.append([])
        segments[-1].append(turn)
    return [
        _sample(
            (name, number, len(segments)), turns, (observation_weight, decision_weight), max_tokens
        )
        for number, turns in enumerate(segments)
    ]


def _observation_tokens(
    played: Demonstration,
    index: int,
    renderer: ChatRenderer,
    view: AgentView,
    env: AlfworldSection,
    segments: list[list[Turn]],
) -> Any:
    turn = played.turns[index]
    info: dict[str, Any] = {"admissible": list(turn.admissible)}
    if isinstance(env.history, WindowHistory):
        past = [(t.observation, t.action) for t in played.turns[:index]][-env.history.window :]
        text = view.window(played.turns[0].observation, past, turn.observation, info, index)
        return renderer.initial([{"role": "user", "content": text}])
    text = view.full(turn.observation, info, index)
    if index == 0:
        return renderer.initial([{"role": "user", "content": text}])
    return renderer.extend(segments[-1][-1].action_tokens, text)


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
