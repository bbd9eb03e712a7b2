"""What a step's record says of each trajectory, and that a record never ends a run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.filters import keep_groups
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection, ReplaySection, RowFiltersSection
from megatron_spear.replay.released import ReplaySource
from megatron_spear.rewards.row_marks import mark_rows
from megatron_spear.rollout.rollouter import collected_in
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.testing.hooks import check_hook
from megatron_spear.tracking.recorded import RecordedStep, RecordedTrajectory
from megatron_spear.tracking.recorded_files import list_steps, read_step
from megatron_spear.trainer.controller import with_gradient, with_old_logprobs
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.hooks.official_replay import OfficialReplayHook
from megatron_spear.trainer.hooks.recording import RecordingHook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.trainer.marking import counted, filters_in_force
from megatron_spear.types import (
    Coefficients,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    Status,
    StepContext,
    StepReport,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
)

ALGORITHM = AlgorithmSection(
    keep_groups_fraction=0.5, row_filters=RowFiltersSection(void=True), advantage="grpo"
)
TEXTS = TokenTexts(lambda ids: "".join(f"<{i}>" for i in ids))


def _ctx(step: int, replay_weight: float = 0.5) -> StepContext:
    return StepContext(
        step=step,
        policy_version=step - 1,
        coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=replay_weight),
        seed=7,
    )


def _group(name: str, outcomes: str, *, version: int = 0, void: int = -1) -> TrajectoryGroup:
    """A letter a member: ``+`` won, ``-`` lost, ``~`` lost with half an intrinsic reward, ``x``
    failed; member ``void`` has a void turn."""
    played = []
    for member, letter in enumerate(outcomes):
        turn = make_turn(policy_version=version, void=member == void)
        trajectory = make_trajectory(name, member, ((turn,), (turn,)), won=letter == "+")
        if letter == "x":
            trajectory = replace(
                trajectory,
                segments=(),
                status=Status.FAILED_ENGINE,
                info={"error": "EngineError: gone"},
            )
        elif letter == "~":
            trajectory = replace(trajectory, env_reward=0.25)
        played.append(trajectory)
    return TrajectoryGroup(
        group_id=name,
        prompt=make_prompt(name),
        members=tuple(t for t in played if not t.status.failed),
        failures=tuple(t for t in played if t.status.failed),
    )


def _scored(group: TrajectoryGroup, parts: Mapping[str, float]) -> ScoredGroup:
    def reward(trajectory: Trajectory) -> Reward:
        outcome, intrinsic = float(trajectory.won), 2 * trajectory.env_reward
        return Reward(outcome=outcome, intrinsic=intrinsic, parts=parts)

    members = tuple(ScoredTrajectory(trajectory=t, reward=reward(t)) for t in group.members)
    return ScoredGroup(group_id=group.group_id, prompt=group.prompt, members=members)


def _play(
    calls: HookCalls,
    step: int,
    played: Sequence[TrajectoryGroup],
    *,
    replaced: int = 0,
    algorithm: AlgorithmSection = ALGORITHM,
    parts: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """A step as the trainer has it; the first ``replaced`` groups are a round of their own, and not
    gone on with."""
    ctx = _ctx(step)
    for groups in (played[:replaced], played[replaced:]) if replaced else (played,):
        calls.on_played(ctx, tuple(groups))
        scored = calls.on_scored(ctx, tuple(_scored(group, parts) for group in groups))
    marked, _ = mark_rows(scored, filters_in_force(algorithm))
    kept, _ = keep_groups(counted(scored, marked, algorithm), algorithm.keep_groups_fraction, 0.5)
    names = {group.group_id for group in kept}
    whole = [group for group in scored if group.group_id in names]
    samples = with_gradient(make_samples(whole, turn_advantages(kept, algorithm, 0.5), marked))
    logprobs = [np.full(len(sample.token_ids), -0.25, np.float32) for sample in samples]
    calls.on_samples(ctx, with_old_logprobs(samples, logprobs))
    calls.extra_updates(ctx)
    report = StepReport(step=step, policy_version=step, metrics={})
    calls.on_step_end(ctx, report)


def _hook(folder: Path, replay: ReplaySource | None = None, **changes: Any) -> RecordingHook:
    values: dict[str, Any] = {"algorithm": ALGORITHM, "group_size": 4, "texts": TEXTS}
    return RecordingHook(folder, changes.pop("groups", 9), replay=replay, **(values | changes))


def _calls(folder: Path, **changes: Any) -> HookCalls:
    section = ReplaySection(capacity=50, max_age=5, rows_per_step=8, baseline_history=20)
    replay = SelfImitationHook(section, folder / "replay")
    return HookCalls({"replay": replay, "recording": _hook(folder / "t", replay, **changes)})


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RecordedStep:
    """Six groups of two-segment trajectories: what became of each is in its name."""
    folder = tmp_path_factory.mktemp("first")
    played = [
        _group("0.1/replaced", "--"),
        _group("0.1/taught", "+-x-", void=1),
        _group("0.1/wide", "+--"),
        _group("0.1/equal", "--"),
        _group("0.1/small", "-~"),
        _group("0.1/failed", "xx"),
        _group("0.1/void", "+", void=0),
    ]
    _play(_calls(folder), 1, played, replaced=1)
    return read_step(folder / "t", 1)


def _of(step: RecordedStep, name: str) -> list[RecordedTrajectory]:
    return [t for t in step.trajectories if t.group == f"0.1/{name}"]


def test_the_step_says_what_was_played_and_at_which_weights(first: RecordedStep) -> None:
    assert (first.step, first.policy_version) == (1, 0)
    assert (first.intrinsic_weight, first.replay_weight) == (0.5, 0.5)
    assert (first.num_groups, first.num_trajectories) == (7, 16)
    assert len(first.trajectories) == 16 and first.replayed == ()


def test_each_group_says_why_it_taught_nothing(first: RecordedStep) -> None:
    found = {t.group.removeprefix("0.1/"): t.left_out for t in first.trajectories}
    assert found == {
        "replaced": "replaced",
        "taught": "",
        "wide": "",
        "equal": "equal_rewards",
        "small": "small_spread",
        "failed": "all_failed",
        "void": "all_marked",
    }
    assert [t.group_mean for t in _of(first, "taught")] == [0.5] * 4, "a void member never counts"
    assert [t.group_mean for t in _of(first, "small")] == [0.125] * 2, "mu is 0.5"
    assert [t.group_mean for t in (*_of(first, "failed"), *_of(first, "void"))] == [None] * 3


def test_a_failed_attempt_has_its_error_and_no_reward(first: RecordedStep) -> None:
    failed = _of(first, "taught")[2]
    assert failed.member == 2, "members are in order, failed ones in their place"
    assert (failed.status, failed.error) == ("failed_engine", "EngineError: gone")
    assert failed.reward is None and failed.turns == () and not failed.trained
    assert (failed.prompt, failed.prompt_id) == ("", "prompt-0.1/taught")


def test_rewards_marks_and_what_was_trained_on(first: RecordedStep) -> None:
    won, void, _, lost = _of(first, "taught")
    assert won.reward and (won.reward.outcome, won.reward.total) == (1.0, 1.0)
    assert won.won and won.trained and won.stored and won.error == ""
    assert lost.trained and not lost.stored
    assert void.segment_marks == (("void",), ("void",)) and void.marks == ("void",)
    assert not void.trained and won.segment_marks == ((), ())
    small = _of(first, "small")[1]
    assert small.reward and (small.reward.intrinsic, small.reward.total) == (0.5, 0.25)


def test_turns_have_their_tokens_with_numbers(first: RecordedStep) -> None:
    won, void, *_ = _of(first, "taught")
    assert won.prompt == "<7>"
    assert [turn.segment for turn in won.turns] == [0, 1]
    for turn in won.turns:
        assert (turn.tokens, turn.text) == (("<1>", "<2>"), "<1><2>")
        assert turn.rollout_logprobs == (-0.5, -0.5) and turn.old_logprobs == (-0.25, -0.25)
        assert turn.advantages == (0.5, 0.5)
        assert turn.versions == (VersionSpan(0, 2),) and turn.num_observation_tokens == 1
        assert turn.tool_calls[0].succeeded
    assert void.turns[0].advantages is None and void.turns[0].old_logprobs is None
    assert void.turns[0].rollout_logprobs == (-0.5, -0.5)


def test_replayed_rows_say_where_they_come_from(tmp_path: Path) -> None:
    calls = _calls(tmp_path)
    _play(calls, 1, [_group("0.1/a", "+---")])
    _play(calls, 2, [_group("0.2/b", "++--", version=1), _group("0.2/c", "+-", version=1)])
    (row,) = read_step(tmp_path / "t", 2).replayed
    assert (row.id, row.step, row.policy_version, row.age) == ("0.1/a/0", 1, 0, 1)
    # Group means 0.25, 0.5 and 0.5 have the median 0.5.
    assert (row.stored_advantage, row.baseline, row.advantage) == (0.75, 0.5, 0.5)
    assert (row.weight, row.reward.total, row.segments) == (0.5, 1.0, (0, 1))
    assert (row.num_tokens, row.num_tool_calls) == (4, 2)
    assert (row.old_logprob_mean, row.rollout_logprob_mean) == (-0.25, -0.5)
    assert row.ratio_mean == pytest.approx(np.exp(0.25), abs=1e-6)


def test_a_part_that_is_not_finite_costs_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"won": 1.0, "per_token": float("nan"), "odds": float("inf")}
    calls = _calls(tmp_path)
    for step, name in ((1, "a"), (2, "b")):
        played = [_group(f"0.{step}/{name}", "+---", version=step - 1)]
        _play(calls, step, played, parts=parts)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    step = read_step(tmp_path / "t", 2)
    rewards = [*(t.reward for t in step.trajectories), *(row.reward for row in step.replayed)]
    assert len(rewards) == 5
    for reward in rewards:
        assert reward and reward.parts == {"won": 1.0, "per_token": None, "odds": None}


def test_kept_advantages_have_no_baseline(tmp_path: Path) -> None:
    section = ReplaySection(
        capacity=50, max_age=5, rows_per_step=8, baseline_history=20, baseline="decay", decay=0.5
    )
    replay = SelfImitationHook(section, tmp_path / "replay")
    calls = HookCalls({"replay": replay, "recording": _hook(tmp_path / "t", replay)})
    for step in (1, 2):
        _play(calls, step, [_group(f"0.{step}/a", "+---", version=step - 1)])
    (row,) = read_step(tmp_path / "t", 2).replayed
    assert (row.stored_advantage, row.baseline, row.advantage) == (0.75, None, 0.375)


def test_official_replay_tells_its_rows_too(tmp_path: Path) -> None:
    algorithm = AlgorithmSection(
        compat="official", official={"tree": "agent"}, advantage="grpo", keep_groups_fraction=1.0
    )
    section = ReplaySection(capacity=2, max_age=5, baseline_history=20)
    replay = OfficialReplayHook(section, algorithm, 4, tmp_path / "replay")
    recording = _hook(tmp_path / "t", replay, algorithm=algorithm)
    calls = HookCalls({"replay": replay, "recording": recording})
    for step in (1, 2, 3):
        played = [_group(f"0.{step}/{name}", "+---", version=step - 1) for name in "ab"]
        _play(calls, step, played, algorithm=algorithm)
    stored = [t.id for t in read_step(tmp_path / "t", 1).trajectories if t.stored]
    assert stored == ["0.1/a/0", "0.1/b/0"]
    replayed = [row for step in (2, 3) for row in read_step(tmp_path / "t", step).replayed]
    assert replayed and {len(row.segments) for row in replayed} == {1}, "a row is a segment"
    assert {(row.baseline, row.advantage, row.stored_advantage) for row in replayed} == {
        (0.25, 0.75, 0.75)
    }


def test_only_so_many_groups_are_recorded(tmp_path: Path) -> None:
    calls = _calls(tmp_path, groups=1)
    _play(calls, 1, [_group("0.1/a", "+-"), _group("0.1/b", "+-")])
    step = read_step(tmp_path / "t", 1)
    assert {t.group for t in step.trajectories} == {"0.1/a"}
    assert (step.num_groups, step.num_trajectories) == (2, 4)


def test_a_record_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t").write_text("a file where the folder should be")
    calls = _calls(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            _play(calls, step, [_group(f"0.{step}/a", "+-")])
    (told,) = caplog.messages
    assert told.startswith("the trajectories of step 1 could not be recorded, and the run goes on")
    assert "FileExistsError" in told
    (tmp_path / "t").unlink()
    _play(calls, 3, [_group("0.3/a", "+-")])
    assert list_steps(tmp_path / "t") == [3], "once there is room again, it goes on"


def test_a_tokenizer_that_fails_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(ids: list[int]) -> str:
        raise OverflowError("no such token")

    calls = HookCalls({"recording": _hook(tmp_path / "t", texts=TokenTexts(broken))})
    with caplog.at_level(logging.WARNING):
        _play(calls, 1, [_group("0.1/a", "+-")])
    assert "OverflowError: no such token" in caplog.text


def test_it_keeps_the_contract_of_hooks() -> None:
    check_hook(lambda folder: _hook(folder / "t"))


def test_the_step_of_a_group_is_in_its_name() -> None:
    names = ("0.3/a", "7.12.1/a#1", "g", "0/a", "a.3/b", "0.3.1.2/a", "")
    assert [collected_in(name) for name in names] == [3, 12, None, None, None, None, None]
