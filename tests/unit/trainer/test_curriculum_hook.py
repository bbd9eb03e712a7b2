"""Hook, sampler and cursor together: what was won decides what comes next, also after a resume."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.config.load import load_config
from megatron_spear.config.method import TaskSamplingSection
from megatron_spear.config.schema import RunConfig
from megatron_spear.curriculum.task_sampling import TaskSampler
from megatron_spear.envs.alfworld.task import fresh_game
from megatron_spear.errors import CheckpointError
from megatron_spear.testing.hand_made import make_trajectory
from megatron_spear.trainer import build
from megatron_spear.trainer.hooks.curriculum import CurriculumHook
from megatron_spear.types import (
    Coefficients,
    Prompt,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    StepContext,
)

CTX = StepContext(
    step=1,
    policy_version=0,
    coefficients=Coefficients(intrinsic_weight=1.0, replay_weight=1.0),
    seed=0,
)
KINDS = ("pick_and_place_simple", "look_at_obj_in_light", "pick_two_obj_and_place")
ON = (f"env.task_types=[{', '.join(KINDS)}]", "curriculum.tasks.enabled=true")


def _group(prompt: Prompt, *won: bool) -> ScoredGroup:
    """Attempts at a prompt; a lost one has the higher reward, which must not count."""
    return ScoredGroup(
        group_id=prompt.prompt_id,
        prompt=prompt,
        members=tuple(
            ScoredTrajectory(
                trajectory=make_trajectory(prompt.prompt_id, i, won=w), reward=Reward(outcome=1 - w)
            )
            for i, w in enumerate(won)
        ),
    )


def _hook(decay: float = 0.5) -> CurriculumHook:
    section = TaskSamplingSection(enabled=True, decay=decay, min_share=0.1)
    return CurriculumHook(TaskSampler(("a", "b"), section), lambda prompt: prompt.prompt_id[0])


def _prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, env="toy")


def test_metrics_tell_the_draw_and_the_success_by_hand() -> None:
    hook = _hook()
    groups = (
        _group(_prompt("a1"), True, True),
        _group(_prompt("a2"), True, False),
        _group(_prompt("b1")),
    )
    assert hook.on_scored(CTX, groups) is groups
    assert hook.metrics() == {
        "curriculum/share_a": 0.5,
        "curriculum/share_b": 0.5,
        "curriculum/success_a": 0.75,
    }
    hook.on_scored(CTX, (_group(_prompt("b2"), False, True),))
    # a had 3/4, b was unknown: signals 3/16 and 1/4
    assert hook.metrics() == pytest.approx(
        {
            "curriculum/share_a": 0.1 + 0.8 * 3 / 7,
            "curriculum/share_b": 0.1 + 0.8 * 4 / 7,
            "curriculum/success_a": 0.75,
            "curriculum/success_b": 0.5,
        }
    )


def test_state_of_other_buckets_is_refused() -> None:
    hook = _hook()
    state = json.loads(json.dumps(hook.state_dict()))
    hook.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"CurriculumHook\.wins"):
        hook.load_state_dict({**state, "wins": {"a": 1.0, "c": 1.0}})
    with pytest.raises(CheckpointError, match="missing"):
        hook.load_state_dict({"wins": state["wins"]})


def _run(config: RunConfig, steps: int, state: str = "") -> tuple[list[list[str]], str]:
    """Prompt ids of some steps in which only the first kind is ever lost, and the state after."""
    cursor, hooks = build.make_cursor(config)
    (hook,) = hooks.values()
    if state:
        saved = json.loads(state)
        cursor.load_state_dict(saved["cursor"])
        hook.load_state_dict(saved["hook"])
    drawn = []
    for _ in range(steps):
        prompts = cursor.take(8)
        drawn.append([prompt.prompt_id for prompt in prompts])
        hook.on_scored(
            CTX,
            tuple(_group(p, True, p.kind != KINDS[0]) for p in prompts),
        )
    return drawn, json.dumps({"cursor": cursor.state_dict(), "hook": hook.state_dict()})


def test_a_resumed_run_draws_the_same() -> None:
    config = load_config(None, [*ON, "run.seed=3"])
    whole, at_the_end = _run(config, 6)
    first, saved = _run(config, 2)
    rest, resumed_end = _run(config, 4, saved)
    assert first + rest == whole and resumed_end == at_the_end
    flat = [prompt for step in whole for prompt in step]
    assert len(set(flat)) == len(flat), "every game is new"
    counts = Counter(prompt.split("-")[0] for step in whole[1:] for prompt in step)
    assert counts[KINDS[0]] > 25, "of 40; the others are always won and get 0.05 each"


def test_off_is_the_order_of_the_source() -> None:
    config = load_config(None, [ON[0]])
    cursor, hooks = build.make_cursor(config)
    source = build.training_prompts(config)
    assert hooks == {} and cursor.take(3) == [source.at(i) for i in range(3)]


def test_generated_games_of_two_kinds_never_share_a_number() -> None:
    buckets = build.training_buckets(load_config(None, list(ON)))
    assert tuple(buckets) == KINDS
    numbers = {
        int(source.at(i).prompt_id.rpartition("_")[2])
        for source in buckets.values()
        for i in range(4)
    }
    assert numbers == set(range(12))
    for kind, source in buckets.items():
        assert {source.at(i).kind for i in range(4)} == {kind}


def test_loaded_games_are_buckets_too(tmp_path: Path) -> None:
    """Only of the kinds there are; each kind's games come once an epoch."""
    kinds = (KINDS[0], KINDS[0], KINDS[1])
    games = [fresh_game(0, i, (kind,), GeneratorSection()) for i, kind in enumerate(kinds)]
    rows = "".join(json.dumps(game.to_fields()) + "\n" for game in games)
    (tmp_path / "train.jsonl").write_text(rows)
    buckets = build.training_buckets(load_config(None, [*ON, f"env.games={tmp_path}"]))
    assert tuple(buckets) == KINDS[:2]
    for kind, source in buckets.items():
        own = [game.id for game in games if game.task_type == kind]
        assert sorted(source.at(i).prompt_id for i in range(len(own))) == sorted(own)
