"""Defects of the released code's replay: each shown on its buffer, and absent from ours.

The numbers are those of docs/official-mode.md. Both sides see the same groups of trajectories, each
of one token; ours goes through history, store and selection as the self-imitation hook does it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.method import ReplaySection
from megatron_spear.replay.official import (
    OfficialRelease,
    OfficialReplayBuffer,
    OfficialReplayRules,
    OfficialRows,
)
from megatron_spear.testing.hand_made import make_group, make_sample
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import Coefficients, Reward, StepContext, StepReport

Group = Sequence[Reward | float]


class Official:
    """The official buffer; a row is named by (step, group, member)."""

    def __init__(self, **changes: Any) -> None:
        rules: dict[str, Any] = {"tree": "agent", "capacity": 4, "max_history_groups": 1000}
        rules |= {"tolerate_steps": 5, "group_size": 2}
        self.buffer = OfficialReplayBuffer(OfficialReplayRules(**(rules | changes)))

    def step(self, step: int, groups: Sequence[Group], mu: float = 0.0) -> OfficialRelease | None:
        """Release, then evict, remember and insert; scores are shaped with the step's mu."""
        release = self.buffer.take(_even_first)
        rewards = [[_reward(r).total(mu) for r in group] for group in groups]
        names = [f"{step}-{g}/{m}" for g, group in enumerate(groups) for m in range(len(group))]
        uid = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        centred = [np.array(group) - np.mean(group) for group in rewards]
        self.buffer.add(
            step,
            OfficialRows(
                row_ids=np.array(names),
                uid=uid,
                traj_uid=np.array(names),
                rewards=np.concatenate([np.array(group, np.float64) for group in rewards]),
                has_tool_call=np.ones(len(names), np.bool_),
                mask=np.ones((len(names), 1)),
                advantages=np.concatenate(centred)[:, None],
            ),
        )
        return release


class Ours:
    """The default hook on the same groups."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        values = {"capacity": 100, "max_age": 5, "rows_per_step": 100} | changes
        self.hook = SelfImitationHook(ReplaySection(**values), folder)
        self.metrics: dict[str, float] = {}

    def step(self, step: int, groups: Sequence[Group], mu: float = 0.0) -> dict[str, float]:
        """What is replayed: its name and its new advantage."""
        weights = Coefficients(intrinsic_weight=mu, replay_weight=1.0)
        ctx = StepContext(step=step, policy_version=step - 1, coefficients=weights, seed=0)
        scored = tuple(make_group(f"{step}-{g}", list(group)) for g, group in enumerate(groups))
        self.hook.on_scored(ctx, scored)
        samples = []
        for group in scored:
            totals = [member.reward.total(mu) for member in group.members]
            samples += [
                make_sample(
                    group.group_id,
                    number,
                    mask=[1],
                    advantage=total - float(np.mean(totals)),
                    reward=member.reward,
                    policy_version=step - 1,
                )
                for number, (member, total) in enumerate(zip(group.members, totals, strict=True))
            ]
        self.hook.on_samples(ctx, samples)
        updates = self.hook.extra_updates(ctx)
        self.metrics = self.hook.metrics()
        self.hook.on_step_end(ctx, StepReport(step=step, policy_version=step, metrics={}))
        return {str(s.trajectory_id): float(s.advantages[0]) for u in updates for s in u.samples}


def _reward(value: Reward | float) -> Reward:
    return value if isinstance(value, Reward) else Reward(outcome=value)


def _even_first(count: int) -> np.ndarray:
    """The permutation 0, 2, 4, ..., 1, 3, ..."""
    return np.argsort(np.arange(count) % 2, kind="stable")


NOTHING: Sequence[Group] = ([0.0, 0.0],)
"""A step in which nothing is good enough to be stored."""


def test_defect_04_a_release_that_drops_rows_keeps_the_right_rewards() -> None:
    """Of three stored rows the one below the median goes; the released code indexes the others'
    rewards by the old positions and ends with IndexError. Repaired in both modes."""
    official = Official(capacity=1)
    official.step(1, [(1.0, 0.2), (3.0, 2.0), (9.0, 8.0)])
    release = official.step(2, [(0.0, 0.0)])
    assert release is not None and release.num_kept < release.num_stored
    rewards = {"1-0/0": 1.0, "1-1/0": 3.0, "1-2/0": 9.0}
    for name, reward in zip(release.rows.row_ids.tolist(), release.rows.rewards, strict=True):
        assert reward == rewards[name]


def test_defect_23_without_its_state_a_resumed_replay_starts_from_nothing(tmp_path: Path) -> None:
    """The released code saves neither buffer nor history; ours goes on where it was."""
    ours = Ours(tmp_path)
    for step in (1, 2, 3):
        ours.step(step, [(1.0, 0.0), (0.0, 0.0)])
    forgetful, resumed = Ours(tmp_path / "empty"), Ours(tmp_path)
    resumed.hook.load_state_dict(ours.hook.state_dict())
    groups = [(1.0, 0.0), (0.0, 0.0)]
    assert forgetful.step(4, groups) == {}
    assert resumed.step(4, groups) == ours.step(4, groups) != {}


def test_defect_09_rows_older_than_the_limit_stay_and_are_replayed(tmp_path: Path) -> None:
    """Limit 2, rows of step 1, then steps without good rows. There the age is the distance to the
    newest stored chunk, which is the rows themselves, so they are 0 old for ever."""
    official, ours = Official(tolerate_steps=2, capacity=2), Ours(tmp_path, max_age=2)
    good = [[1.0, 0.0]] * 3  # not above 1.5 * 2 yet
    official.step(1, good)
    stored = []
    for step in range(2, 7):
        assert official.step(step, NOTHING) is None
        stored.append(len(official.buffer))
    assert stored == [3] * 5
    official.step(7, [[1.0, 0.0]])
    release = official.step(8, NOTHING)
    assert release is not None and "1-0/0" in release.rows.row_ids.tolist(), "seven steps old"

    ours.step(1, good)
    for step in range(2, 4):  # the baseline is 2 and nothing beats it
        assert ours.step(step, [[2.0, 2.0]] * 9) == {}
        assert ours.metrics["replay/num_candidates"] == 3, "ages 1 and 2"
    assert ours.step(4, [[-9.0, -9.0]] * 99) == {}
    assert ours.metrics["replay/num_candidates"] == 0
    assert ours.metrics["replay/evicted_by_age"] == 3


def test_defect_09_limits_above_ten_are_ten(tmp_path: Path) -> None:
    """Limit 50, a good row in step 1 and in steps 12 and 13, where the first is 11 steps old."""
    official, ours = Official(tolerate_steps=50, capacity=100), Ours(tmp_path, max_age=50)
    for step in (1, 12, 13):
        official.step(step, [[1.0, 0.0]])
    assert official.buffer.row_ids == ["12-0/0", "13-0/0"]
    ours.step(1, [[1.0, 0.0]])
    assert ours.step(12, [[0.0, 0.0]]) == {"1-0/0": pytest.approx(0.75)}
    assert ours.metrics["replay/age_max"] == 11


def test_defect_10_good_rows_are_wasted_and_replay_comes_in_bursts(tmp_path: Path) -> None:
    """Fourteen good rows at capacity 9, stored in two steps. There nothing is replayed until there
    are more than 13.5, then 8 of them (the power of two below), and 6 are forgotten. Here every row
    is replayed once, five a step."""
    groups = [[1.0, 0.0]] * 7
    official, ours = Official(capacity=9), Ours(tmp_path, capacity=14, rows_per_step=5)
    bursts, counts, seen = [], [], []
    for step in range(1, 6):
        given = groups if step < 3 else NOTHING
        release = official.step(step, given)
        bursts.append((release.num_kept, len(release.rows.row_ids)) if release else (0, 0))
        replayed = ours.step(step, given)
        counts.append(len(replayed))
        seen += list(replayed)
    assert bursts == [(0, 0), (0, 0), (14, 8), (0, 0), (0, 0)]
    assert len(official.buffer) == 0
    assert counts == [0, 5, 5, 4, 0]
    assert sorted(seen) == [f"{step}-{g}/0" for step in (1, 2) for g in range(7)]


def test_defect_10_a_burst_of_ours_is_not_cut_to_a_power_of_two(tmp_path: Path) -> None:
    """The same rows at the same moment, but as many as the capacity has."""
    ours = Ours(tmp_path, release="burst", capacity=9)
    counts = [len(ours.step(step, [[1.0, 0.0]] * 7)) for step in (1, 2)]
    counts.append(len(ours.step(3, NOTHING)))
    assert counts == [0, 0, 9]
    assert ours.metrics["replay/cleared"] == 5 and ours.metrics["replay/stored"] == 0


def test_defect_15_early_rows_look_better_than_later_ones(tmp_path: Path) -> None:
    """Wins and losses with a tool bonus of 0.5, first at mu = 1 and then at mu = 0.

    There the bonus of step 1 is stored for good: P50 of the group means 1, 1, 0.5, 0.5 is 0.75, and
    an early win is worth 0.75, a later one 0.25. Here both are worth the same.
    """
    groups = [[Reward(outcome=1.0, intrinsic=0.5), Reward(outcome=0.0, intrinsic=0.5)]] * 2
    official, ours = Official(capacity=2), Ours(tmp_path)
    assert official.step(1, groups, mu=1.0) is None
    assert official.step(2, groups, mu=0.0) is None
    release = official.step(3, NOTHING)
    assert release is not None and release.baseline == 0.75
    assert release.rows.row_ids.tolist() == ["1-0/0", "2-0/0"]
    assert release.advantages[:, 0].tolist() == [0.75, 0.25]

    ours.step(1, groups, mu=1.0)
    assert ours.step(2, groups, mu=0.0) == {"1-0/0": 0.5, "1-1/0": 0.5}
    assert ours.metrics["replay/p50"] == 0.5
    assert ours.step(3, [[0.5, 0.5]]) == {"2-0/0": 0.5, "2-1/0": 0.5}


def test_defect_15_losses_with_an_old_bonus_are_replayed(tmp_path: Path) -> None:
    """A lost game with the bonus of mu = 1 beats the games of now as if it were nearly a win."""
    early = [[Reward(outcome=0.0, intrinsic=0.8), 0.0]]
    late: list[Group] = [[1.0, 0.0], *[[0.0, 0.0]] * 9]
    official, ours = Official(capacity=1), Ours(tmp_path)
    official.step(1, early, mu=1.0)
    official.step(2, late)
    release = official.step(3, NOTHING)
    assert release is not None and release.baseline == 0.0 and release.num_kept == 2
    assert release.rows.row_ids.tolist() == ["1-0/0"]
    assert release.advantages.tolist() == [[0.8]]

    ours.step(1, early, mu=1.0)
    assert ours.step(2, late) == {}
    assert ours.metrics["replay/num_candidates"] == 1
    assert ours.step(3, NOTHING) == {"2-0/0": 1.0}, "the win, and not the loss"


def test_defect_16_with_many_easy_prompts_nothing_is_replayed(tmp_path: Path) -> None:
    """Three of five prompts are always solved: P50 is the highest reward, so no success beats it.
    Ours does the same by default, with a metric that says so; ``per_prompt`` goes on with what was
    hard."""
    groups = [[1.0, 1.0]] * 3 + [[1.0, 0.0, 0.0, 0.0]] * 2
    official = Official(capacity=1)
    for step in range(1, 30):
        assert official.step(step, groups) is None
        assert official.buffer.count() == 0 and len(official.buffer) >= 2

    p50 = Ours(tmp_path / "p50")
    p50.step(1, groups)
    assert p50.step(2, groups) == {}
    assert p50.metrics["replay/num_candidates"] == 2
    assert p50.metrics["replay/kept_fraction"] == 0.0 and p50.metrics["replay/p50"] == 1.0

    per_prompt = Ours(tmp_path / "per_prompt", baseline="per_prompt")
    per_prompt.step(1, groups)
    assert per_prompt.step(2, groups) == {"1-3/0": 0.75, "1-4/0": 0.75}
    assert per_prompt.metrics["replay/p50"] == 1.0
    assert per_prompt.metrics["replay/baseline_mean"] == 0.25


def test_defect_01_batch_mean_is_what_mixed_blocks_compare_with(tmp_path: Path) -> None:
    """Blocks that each hold an even mixture of an easy and a hard prompt all have the step's mean,
    and so has their median; ``batch_mean`` compares with it on purpose."""
    easy, hard = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]
    mixed = [[easy[0], hard[2]], [easy[1], hard[1]], [easy[3], hard[0]], [easy[2], hard[3]]]
    official = Official(tree="math", capacity=1)
    official.step(1, mixed)
    release = official.step(2, NOTHING)
    assert release is not None and release.baseline == 0.5
    ours = Ours(tmp_path, baseline="batch_mean")
    ours.step(1, [easy, hard])
    assert set(ours.step(2, [easy, hard]).values()) == {0.5}
    assert ours.metrics["replay/baseline_mean"] == 0.5
