"""Demonstrations as samples: the tokens of a rollout of the same actions, weights by hand."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.environments.alfworld import AlfworldSection, GeneratorSection
from megatron_spear.config.environments.base import WindowHistory
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.config.schema import SftSection
from megatron_spear.conversion.word_tokenizer import make_tokenizer
from megatron_spear.envs.alfworld.demonstrations import demonstrate
from megatron_spear.envs.alfworld.environment import AlfworldEnvironment
from megatron_spear.envs.alfworld.game import GameFile, parse_game
from megatron_spear.envs.alfworld.phrases import NAMES, PHRASES
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.envs.alfworld.task import fresh_game, game_prompt
from megatron_spear.envs.alfworld.vocabulary import alfworld_words
from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn
from megatron_spear.envs.protocol import StepResult
from megatron_spear.errors import DataError, EnvironmentsLost
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.testing.fakes import ScriptedEngine
from megatron_spear.trainer.demonstrations import (
    DemonstrationSource,
    make_demonstrations,
    to_samples,
)
from megatron_spear.types import Trajectory

RENDERER = ChatRenderer(make_tokenizer(alfworld_words(), PHRASES, NAMES))
SMALL = GeneratorSection(max_receptacles=8, min_objects=4, max_objects=6)
SFT = SftSection(steps=3, trajectories_per_step=2, noise=0.3)

HAND_MADE = Demonstration(
    turns=(
        DemonstrationTurn("You are in the middle of a room.", "go to desk 4", False),
        DemonstrationTurn("Nothing happens.", "go to shelf 1", True),
        DemonstrationTurn("You arrive at shelf 1.", "look", True),
    ),
)


class _Pool:
    """An environment pool without processes."""

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[AlfworldEnvironment]:
        environment = AlfworldEnvironment()
        yield environment
        environment.close()

    async def reset(
        self, slot: AlfworldEnvironment, *, seed: int, options: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        return slot.reset(seed=seed, options=options)

    async def step(self, slot: AlfworldEnvironment, action: str) -> StepResult:
        return slot.step(action)


def _env(**changes: Any) -> AlfworldSection:
    return AlfworldSection(**({"generator": SMALL, "max_turns": 60} | changes))


def _game(env: AlfworldSection, seed: int = 0) -> tuple[GameFile, Demonstration]:
    """A game and its demonstration, with slips."""
    game = fresh_game(seed, 5, env.task_types, env.generator)
    played = demonstrate(
        parse_game(game),
        random.Random(1),
        explore=2.0,
        noise=0.4,
        max_turns=env.max_turns,
        admissible=env.prompt == "official",
    )
    assert played is not None and len({turn.trained for turn in played.turns}) == 2
    return game, played


def _rollout(
    env: AlfworldSection, game: GameFile, played: Demonstration, messages: Any
) -> Trajectory:
    """A rollout in which the engine answers with the demonstration's actions."""
    view = alfworld_view(env.prompt)
    answers = [RENDERER.encode_action(view.demonstrate(t.action)).tolist() for t in played.turns]
    rollouter = Rollouter(
        ScriptedEngine(lambda request: answers[request.seed[-1]], max_context=100_000),
        _Pool(),
        RENDERER,
        view,
        RolloutSection(max_context=100_000, max_new_tokens=100),
        history=env.history,
        max_turns=env.max_turns,
    )
    prompt = replace(game_prompt(game), messages=messages)
    (group,) = rollouter.collect_sync([prompt], group_size=1, seed=(0,), temperature=1.0)
    return group.members[0]


def _shown(env: AlfworldSection) -> dict[str, Any]:
    return {"view": alfworld_view(env.prompt), "history": env.history}


def _samples(
    played: Demonstration, env: AlfworldSection, weight: float = 0.25, limit: int = 100_000
) -> list[Any]:
    return to_samples(
        played, "sft/0", RENDERER, **_shown(env), observation_weight=weight, max_tokens=limit
    )


@pytest.mark.parametrize("prompt", ["compact", "official"])
@pytest.mark.parametrize("history", ["full", "rendered", WindowHistory(window=2)])
@pytest.mark.parametrize("messages", [(), ({"role": "system", "content": "take mug 1"},)])
def test_tokens_are_those_of_a_rollout_of_the_same_actions(
    prompt: str, history: Any, messages: Any
) -> None:
    env = _env(prompt=prompt, history=history)
    game, played = _game(env)
    trajectory = _rollout(env, game, played, messages)
    assert trajectory.won and len(trajectory.turns) == len(played.turns)
    options = {"observation_weight": 0.25, "max_tokens": 100_000, **_shown(env)}
    shown = replace(played, messages=messages)
    samples = [sample for sample, _ in to_samples(shown, "sft/0", RENDERER, **options)]
    plain = _samples(played, env)[0][0]
    assert (len(samples[0].token_ids) > len(plain.token_ids)) == bool(messages)
    assert len(samples) == (len(played.turns) if isinstance(history, WindowHistory) else 1)
    for number, (sample, segment) in enumerate(zip(samples, trajectory.segments, strict=True)):
        assert sample.token_ids.tolist() == segment.token_ids.tolist()
        assert sample.response_mask.tolist() == segment.response_mask.tolist()
        assert sample.turn_starts.tolist() == segment.turn_starts.tolist()
        assert (sample.segment, sample.num_segments) == (number, len(samples))
        assert str(sample.trajectory_id) == "sft/0/0"


def test_full_history_and_its_weights_by_hand() -> None:
    chat = [
        {"role": "user", "content": "You are in the middle of a room."},
        {"role": "assistant", "content": "go to desk 4"},
        {"role": "user", "content": "Nothing happens."},
        {"role": "assistant", "content": "go to shelf 1"},
        {"role": "user", "content": "You arrive at shelf 1."},
    ]
    end = RENDERER.end_token_id
    ((sample, weights),) = _samples(HAND_MADE, _env())
    look = RENDERER.encode_action("look").tolist()
    assert sample.token_ids.tolist() == [*RENDERER.initial(chat), *look] and look[-1] == end
    # The slip with its end token weighs nothing, what is read 0.25, learned actions 1.
    slip, learned = (len(RENDERER.encode_action(a)) for a in ("go to desk 4", "go to shelf 1"))
    read = [len(RENDERER.initial(chat[:1]))]
    read += [len(RENDERER.extend([end], [chat[i]])) for i in (2, 4)]
    expected = [0, *[0.25] * (read[0] - 1), *[0] * slip, *[0.25] * read[1], *[1] * learned]
    expected += [*[0.25] * read[2], *[1] * len(look)]
    assert weights.tolist() == expected
    assert (sample.token_ids == end).sum() == 3 and weights[sample.token_ids == end].sum() == 2


def test_a_window_has_one_sample_a_turn() -> None:
    rows = _samples(HAND_MADE, _env(history=WindowHistory(window=1)), weight=0.0)
    first, last = HAND_MADE.turns[0].observation, HAND_MADE.turns[2].observation
    text = "\n".join([first, "Nothing happens.", "go to shelf 1", last])
    prompt = RENDERER.initial([{"role": "user", "content": text}]).tolist()
    actions = [len(RENDERER.encode_action(turn.action)) for turn in HAND_MADE.turns]
    assert rows[2][0].token_ids.tolist() == [*prompt, *RENDERER.encode_action("look")]
    assert [weights.sum() for _, weights in rows] == [0, actions[1], actions[2]]
    for sample, weights in rows[1:]:
        assert weights.tolist() == sample.response_mask.tolist()


@pytest.mark.parametrize("history", ["full", "rendered", WindowHistory(window=1)])
def test_the_first_token_of_a_learned_action_weighs_the_decision(history: Any) -> None:
    shown = _shown(_env(history=history))
    options = {"observation_weight": 0.25, "max_tokens": 100_000, **shown}
    weighed = to_samples(HAND_MADE, "a", RENDERER, decision_weight=3.0, **options)
    plain = to_samples(HAND_MADE, "a", RENDERER, **options)
    decisions = []
    for (sample, weights), (_, before) in zip(weighed, plain, strict=True):
        changed = np.flatnonzero(weights != before)
        assert set(changed) <= set(sample.turn_starts.tolist())
        assert weights[changed].tolist() == [3.0] * len(changed)
        decisions += [RENDERER.decode_action([token]) for token in sample.token_ids[changed]]
    assert decisions == ["go to", "look"], "each one token; not that of the slip"


@pytest.mark.parametrize("history", ["full", "rendered", WindowHistory(window=1)])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_nothing_predicts_the_first_token(history: Any, weight: float) -> None:
    for sample, weights in _samples(HAND_MADE, _env(history=history), weight=weight):
        assert weights[0] == 0.0 and len(weights) == len(sample.token_ids)
        assert not sample.advantages.any() and not sample.old_logprobs.any()
        assert ((weights[1:] > 0) | sample.response_mask[1:]).all() == bool(weight)


def test_a_long_demonstration_is_cut() -> None:
    ((whole, whole_weights),) = _samples(HAND_MADE, _env())
    start = int(whole.turn_starts[2])
    for limit in (1, start, start + 1):
        ((sample, weights),) = _samples(HAND_MADE, _env(), limit=limit)
        assert sample.token_ids.tolist() == whole.token_ids[:limit].tolist()
        assert weights.tolist() == whole_weights[:limit].tolist()
        kept = [at for at in whole.turn_starts.tolist() if at < limit]
        assert sample.turn_starts.tolist() == kept and len(sample.anchors) == len(kept)
    assert len(_samples(HAND_MADE, _env(), limit=len(whole.token_ids))[0][1]) == len(whole_weights)


def test_a_demonstration_depends_on_its_number_and_the_seeds_only() -> None:
    env = _env()
    four = make_demonstrations(env, SFT, 1, 0, 4)
    assert make_demonstrations(env, SFT, 1, 2, 2) == four[2:]
    assert len({demonstration.turns[0].observation for demonstration in four}) == 4
    assert make_demonstrations(env, SFT, 2, 0, 4) != four
    assert make_demonstrations(env, SFT.model_copy(update={"seed": 1}), 1, 0, 4) != four


def test_loaded_games_are_demonstrated(tmp_path: Path) -> None:
    tasks = []
    for seed in (1, 2):
        game = fresh_game(seed, 0, _env().task_types, SMALL)
        tasks.append(game.task)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps(game.to_fields()))
    for seed, task in zip((1, 2), tasks, strict=True):
        played = make_demonstrations(_env(games=tmp_path / str(seed)), SFT, 0, 0, 3)
        assert all(task in shown.turns[0].observation for shown in played)
        assert played[0].turns != played[1].turns or played[1].turns != played[2].turns


def test_settings_that_allow_no_demonstration_are_refused() -> None:
    with pytest.raises(DataError, match="max_turns=1"):
        make_demonstrations(_env(max_turns=1), SFT, 0, 0, 1)


def test_batches_are_those_made_directly() -> None:
    env = _env()
    with contextlib.closing(DemonstrationSource(env, SFT, 1, limit_s=60.0)) as source:
        batches = list(source.batches())
    assert batches == [make_demonstrations(env, SFT, 1, first, 2) for first in (0, 2, 4)]


def test_the_worker_needs_no_torch() -> None:
    code = "import sys, megatron_spear.trainer.demonstrations; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    """Killed while it waits for games that never come (a pipe nobody writes to)."""
    os.mkfifo(tmp_path / "train.jsonl")
    env = _env(games=tmp_path)
    with contextlib.closing(DemonstrationSource(env, SFT, 1, limit_s=60.0)) as source:
        threading.Timer(0.3, os.kill, (_worker(source), signal.SIGKILL)).start()
        with pytest.raises(EnvironmentsLost, match=r"ended before those of warm-start step 1 .*"):
            next(source.batches())


def test_a_worker_that_hangs_is_told_and_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    env = _env(games=tmp_path)
    with contextlib.closing(DemonstrationSource(env, SFT, 1, limit_s=0.5)) as source:
        worker = _worker(source)
        with pytest.raises(EnvironmentsLost, match=r"step 1 within 0\.5 s; raise run.hang_lim"):
            next(source.batches())
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _worker(source: DemonstrationSource) -> int:
    (worker,) = source._workers
    assert worker.pid is not None
    return worker.pid


def test_a_game_that_cannot_be_won_is_named(tmp_path: Path) -> None:
    game = fresh_game(0, 0, ("pick_and_place_simple",), SMALL)
    broken = replace(game, problem=re.sub(r"\(canContain [^)]*\)", "", game.problem))
    assert broken.solvable and broken.walkthrough
    (tmp_path / "train.jsonl").write_text(json.dumps(broken.to_fields()))
    with pytest.raises(DataError, match=f"game {game.id} cannot be won"):
        make_demonstrations(_env(games=tmp_path), SFT, 0, 0, 1)
