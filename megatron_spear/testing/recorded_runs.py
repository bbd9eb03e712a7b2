"""Run directories that no run wrote: metrics and recorded trajectories of any size, in no time.

    folder = made_run(tmp_path / "seed0", seed=0, steps=20)

Same arguments, same files. Rewards, log-probs and texts are drawn; counts and cross references
(who is replayed where) agree with each other as a run's do.
"""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_spear.config.load import CONFIG_NAME, dump_config, load_config
from megatron_spear.tracking.recorded import (
    RecordedReplay,
    RecordedReward,
    RecordedStep,
    RecordedTrajectory,
    RecordedTurn,
)
from megatron_spear.tracking.recorded_files import FOLDER, write_step
from megatron_spear.tracking.summary import REQUIRED, write_summary
from megatron_spear.types import ToolCall, VersionSpan

KINDS = ("pick_and_place_simple", "look_at_obj_in_light", "pick_heat_then_place_in_recep")
_NOUNS = ("desk", "mug", "shelf", "lamp", "drawer", "fridge", "apple", "knife", "sofa", "bed")
_VERBS = ("go to", "take", "open", "close", "use", "put", "heat", "examine")
_REPLAYED = 4
_SEGMENT_TURNS = 8


def made_run(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 12,
    groups: int = 4,
    members: int = 4,
    turns: int = 6,
    settings: tuple[str, ...] = (),
    gain: float = 0.5,
    ended: bool = True,
    recorded: bool = True,
) -> Path:
    """Write a run directory; returns it. ``gain`` is what success grows to."""
    folder.mkdir(parents=True)
    given = [f"run.seed={seed}", f"run.dir={folder}", f"run.steps={steps}", *settings]
    (folder / CONFIG_NAME).write_text(dump_config(load_config(None, given)))
    rng = random.Random(f"{seed} {gain}")
    evaluations = {0, steps // 2, steps}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            if step:
                file.write(json.dumps(_metrics(rng, step, gain * step / steps)) + "\n")
            if step in evaluations:
                record = {"step": step, "time": 1e9 + step, "eval/success": gain * step / steps}
                file.write(json.dumps(record) + "\n")
    if ended:
        write_summary(folder / "summary.json", {**dict.fromkeys(REQUIRED, 0.5), "steps": steps})
    before: tuple[RecordedTrajectory, ...] = ()
    for step in range(1, steps + 1 if recorded else 1):
        made = made_step(rng, step, groups, members, turns, before)
        write_step(folder / FOLDER, made)
        before = made.trajectories
    return folder


def made_step(
    rng: random.Random,
    step: int,
    groups: int,
    members: int,
    turns: int,
    before: tuple[RecordedTrajectory, ...],
) -> RecordedStep:
    """A step whose replayed rows are of the best of ``before``, the trajectories of the step
    before."""
    played = tuple(
        _trajectory(rng, step, group, member, turns)
        for group in range(groups)
        for member in range(members)
    )
    best = sorted((t for t in before if t.reward), key=lambda t: -_total(t))[:_REPLAYED]
    return RecordedStep(
        step=step,
        policy_version=step - 1,
        intrinsic_weight=max(0.0, 1 - step / 100),
        replay_weight=1.0,
        num_groups=groups,
        num_trajectories=groups * members,
        trajectories=played,
        replayed=tuple(_replayed(trajectory, step) for trajectory in best),
    )


def _trajectory(
    rng: random.Random, step: int, group: int, member: int, turns: int
) -> RecordedTrajectory:
    won, failed = rng.random() < 0.4, rng.random() < 0.03
    kind = KINDS[group % len(KINDS)]
    played = 0 if failed else rng.randint(max(1, turns // 2), turns)
    trained = not failed and group > 0
    advantage = round(rng.uniform(-1, 1), 4)
    intrinsic = round(rng.random() * 0.1, 4)
    reward = RecordedReward(
        outcome=float(won),
        intrinsic=intrinsic,
        format=0.0,
        total=won + intrinsic,
        parts={"won": won},
    )
    made = tuple(
        _turn(rng, step, number, won and number == played - 1, advantage if trained else None)
        for number in range(played)
    )
    segments = max((turn.segment for turn in made), default=-1) + 1
    marks = ("overlong",) if rng.random() < 0.1 else ()
    return RecordedTrajectory(
        group=f"0.{step}/{kind}-{group}",
        member=member,
        prompt_id=f"{kind}-{group}",
        kind=kind,
        env="alfworld",
        status="failed_engine" if failed else "completed" if won else "truncated_turns",
        won=won and not failed,
        env_reward=None if failed else float(won),
        reward=None if failed else reward,
        group_mean=None if failed else 0.4,
        left_out="" if group else "equal_rewards",
        segment_marks=((marks,) + ((),) * (segments - 1)) if segments else (),
        trained=trained,
        stored=trained and won,
        error="EngineError: gone" if failed else "",
        prompt=f"<|user|>{_sentence(rng, 40)}<|assistant|>",
        turns=made,
    )


def _turn(
    rng: random.Random, step: int, number: int, last: bool, advantage: float | None
) -> RecordedTurn:
    action = f"{rng.choice(_VERBS)} {rng.choice(_NOUNS)} {rng.randint(1, 9)}"
    thought = _sentence(rng, rng.randint(8, 20))
    text = f"<think>{thought}</think><action>{action}</action><|im_end|>"
    tokens = _pieces(text)
    logprobs = tuple(round(math.log(rng.uniform(0.02, 1.0)), 4) for _ in tokens)
    old = tuple(round(value + rng.gauss(0, 0.001), 4) for value in logprobs)
    half = len(tokens) // 2
    return RecordedTurn(
        segment=number // _SEGMENT_TURNS,
        observation=_sentence(rng, 30),
        num_observation_tokens=33,
        text=text,
        action=action,
        tokens=tokens,
        rollout_logprobs=logprobs,
        old_logprobs=None if advantage is None else old,
        advantages=None if advantage is None else (advantage,) * len(tokens),
        versions=(VersionSpan(step - 1, half), VersionSpan(step, len(tokens) - half)),
        tool_calls=(ToolCall(name="act", arguments=action, succeeded=last or number % 3 != 2),),
        finish_reason="stop",
        time_s=0.25,
        valid=True,
        void=False,
    )


def _replayed(trajectory: RecordedTrajectory, step: int) -> RecordedReplay:
    assert trajectory.reward is not None
    source = int(trajectory.group.partition("/")[0].partition(".")[2])
    return RecordedReplay(
        group=trajectory.group,
        member=trajectory.member,
        prompt_id=trajectory.prompt_id,
        step=source,
        policy_version=source - 1,
        age=step - source,
        reward=trajectory.reward,
        stored_advantage=0.75,
        advantage=round(_total(trajectory) - 0.5, 6),
        baseline=0.5,
        weight=1.0,
        segments=(0,),
        num_tokens=40,
        num_tool_calls=len(trajectory.turns),
        old_logprob_mean=-0.3,
        rollout_logprob_mean=-0.31,
        ratio_mean=1.01,
    )


def _metrics(rng: random.Random, step: int, success: float) -> Mapping[str, Any]:
    return {
        "step": step,
        "time": 1e9 + step,
        "rollout/success": min(1.0, max(0.0, success + rng.gauss(0, 0.05))),
        "rollout/action_tokens": 1000 + step,
        "rollout/turns_mean": 6.0 + rng.random(),
        "rollout/tool_calls_mean": 5.0 + rng.random(),
        "reward/mean": success,
        "reward/outcome": success * 0.9,
        "reward/intrinsic": 0.05,
        "reward/format": 0.0,
        "policy/entropy": 1.0 / (1 + step / 20) + rng.gauss(0, 0.02),
        "policy/kl": None if step == 2 else 1e-4 * step,
        "policy/clip_fraction": 0.01,
        "mismatch/logprob_gap_mean": 1e-6 * (1 + rng.random()),
        "mismatch/max_logprob_gap": 1e-4 * (1 + rng.random()),
        "replay/rows": min(step, 8),
        "replay/age_mean": 1.0 + rng.random(),
        "curriculum/replay_weight": min(1.0, step / 10),
        "curriculum/intrinsic_weight": max(0.0, 1 - step / 100),
        "train/tokens": 900,
        "time/rollout_s": 4.0 + rng.random(),
        "time/train_s": 2.0,
        "time/weight_sync_s": 0.1,
        "time/step_s": 6.5,
    }


def _total(trajectory: RecordedTrajectory) -> float:
    return trajectory.reward.total if trajectory.reward else 0.0


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(f"{rng.choice(_NOUNS)} {rng.randint(1, 20)}" for _ in range(words // 2)) + "."


def _pieces(text: str) -> tuple[str, ...]:
    """A text in tokens, a word each with the blank before it."""
    words = text.split(" ")
    return (words[0], *(f" {word}" for word in words[1:]))
