"""Groups of equal rewards make room for further prompts: bounded, once each, and resumable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.config.method import AlgorithmSection, ReplaySection, RewardSection
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.trainer.controller import Controller
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import (
    Coefficients,
    Prompt,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    Status,
    StepContext,
    StepReport,
    TrajectoryGroup,
)

GROUP_SIZE = 2
MIXED, WON, LOST, FAILED, VOID = "+-", "++", "--", "xx", "+v"


class _Rollouter:
    """Plays prompt ``i`` as ``plays[i]`` says, a letter a member: ``+`` won, ``-`` lost, ``v`` lost
    by an empty answer, ``x`` failed; MIXED where it says nothing."""

    def __init__(self, plays: Sequence[str] = ()) -> None:
        self._plays = {f"prompt-{i}": letters for i, letters in enumerate(plays)}
        self.calls: list[tuple[list[str], tuple[int, ...], bool]] = []

    def collect_sync(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: tuple[int, ...],
        temperature: float,
        progress: Callable[[int], None] | None,
        all_may_fail: bool,
    ) -> list[TrajectoryGroup]:
        assert group_size == GROUP_SIZE
        names = [prompt.prompt_id for prompt in prompts]
        self.calls.append((names, seed, all_may_fail))
        for finished in range(len(prompts) * group_size):
            if progress:
                progress(finished + 1)
        return [self._group(prompt, ".".join(map(str, seed))) for prompt in prompts]

    def _group(self, prompt: Prompt, prefix: str) -> TrajectoryGroup:
        name = f"{prefix}/{prompt.prompt_id}"
        played = [
            make_trajectory(
                name,
                member,
                [[make_turn(void=letter == "v")]],
                won=letter == "+",
                status=Status.FAILED_TOOL if letter == "x" else Status.COMPLETED,
            )
            for member, letter in enumerate(self._plays.get(prompt.prompt_id, MIXED))
        ]
        return TrajectoryGroup(
            group_id=name,
            prompt=prompt,
            members=tuple(t for t in played if not t.status.failed),
            failures=tuple(t for t in played if t.status.failed),
        )


class _Sees(Hook):
    """Keeps the prompts it is shown, a text a call; pays the first member of groups in ``paid``,
    and all of those in ``levelled`` alike."""

    def __init__(self, paid: str = "", levelled: str = "") -> None:
        self.calls: list[str] = []
        self._paid, self._levelled = paid, levelled

    def on_played(self, ctx: StepContext, groups: tuple[TrajectoryGroup, ...]) -> None:
        self.calls.append("played " + "".join(g.prompt.prompt_id[-1] for g in groups))

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        self.calls.append("scored " + "".join(_prompts(groups)))
        return tuple(replace(group, members=self._members(group)) for group in groups)

    def _members(self, group: ScoredGroup) -> tuple[ScoredTrajectory, ...]:
        (name,) = _prompts([group])
        if name in self._levelled:
            return tuple(replace(m, reward=Reward(outcome=0.5)) for m in group.members)
        first, *others = group.members
        if name in self._paid:
            first = replace(first, reward=Reward(outcome=0.25))
        return first, *others


def _ctx(step: int, replay_weight: float = 0.0) -> StepContext:
    coefficients = Coefficients(intrinsic_weight=0.0, replay_weight=replay_weight)
    return StepContext(step=step, policy_version=0, coefficients=coefficients, seed=7)


def _controller(
    plays: Sequence[str] = (), rounds: int = 2, hook: Hook | None = None, **algorithm: Any
) -> tuple[Controller, _Rollouter]:
    rollouter: Any = _Rollouter(plays)
    controller = Controller(
        cursor=PromptCursor(FreshPrompts(lambda i: make_prompt(str(i)))),
        rollouter=rollouter,
        hooks=HookCalls({"hook": hook or Hook()}),
        rollout=RolloutSection(prompts_per_step=2, group_size=GROUP_SIZE),
        reward=RewardSection(),
        algorithm=AlgorithmSection(dynamic_sampling_rounds=rounds, **algorithm),
    )
    return controller, rollouter


def _collect(
    controller: Controller, ctx: StepContext
) -> tuple[tuple[ScoredGroup, ...], dict[str, float]]:
    collected = controller.collect(ctx)
    return collected.groups, collected.metrics


def _prompts(groups: Sequence[ScoredGroup]) -> list[str]:
    return [group.prompt.prompt_id.removeprefix("prompt-") for group in groups]


def _filter(metrics: Mapping[str, float]) -> tuple[float, float]:
    names = ("filter/num_sampling_rounds", "filter/num_resampled_groups")
    return metrics[names[0]], metrics[names[1]]


def test_equal_groups_are_replaced_round_by_round() -> None:
    controller, rollouter = _controller([WON, MIXED, LOST, MIXED])
    groups, metrics = _collect(controller, _ctx(3))
    # 0 (all won) makes room for 2 (all lost), which makes room for 3.
    assert _prompts(groups) == ["1", "3"]
    assert rollouter.calls == [
        (["prompt-0", "prompt-1"], (7, 3), False),
        (["prompt-2"], (7, 3, 1), True),
        (["prompt-3"], (7, 3, 2), True),
    ]
    assert controller.cursor.consumed == 4 and _filter(metrics) == (2, 2)
    # Metrics are over all four groups, replaced ones too.
    assert metrics["rollout/num_trajectories"] == 8 and metrics["rollout/success"] == 0.5
    assert metrics["reward/outcome"] == 0.5


@pytest.mark.parametrize(
    ("rounds", "kept", "consumed"), [(0, "01", 2), (1, "23", 4), (2, "34", 5), (9, "35", 6)]
)
def test_rounds_are_bounded_and_the_last_one_stays(rounds: int, kept: str, consumed: int) -> None:
    controller, rollouter = _controller([WON, LOST, WON, MIXED, LOST], rounds)
    groups, metrics = _collect(controller, _ctx(1))
    assert _prompts(groups) == list(kept) and controller.cursor.consumed == consumed
    further = len(rollouter.calls) - 1
    assert further == min(rounds, 3)
    if rounds:
        assert _filter(metrics) == (further, consumed - 2)
    else:
        assert not {name for name in metrics if name.startswith("filter")}


def test_where_nothing_is_equal_one_round_is_enough() -> None:
    controller, rollouter = _controller()
    _, metrics = _collect(controller, _ctx(1))
    assert len(rollouter.calls) == 1 and _filter(metrics) == (0, 0)


def test_hooks_see_each_group_once_and_group_ids_are_unique() -> None:
    hook = _Sees()
    controller, _ = _controller([WON] * 4, hook=hook)
    names: list[str] = []
    for step in (1, 2):
        groups, _ = _collect(controller, _ctx(step))
        controller.samples(_ctx(step), groups)
        names += [group.group_id for group in groups]
    shown = ("01", "23", "45", "67")  # three rounds of the first step, one of the second
    assert hook.calls == [f"{what} {both}" for both in shown for what in ("played", "scored")]
    assert len(set(names)) == 4
    assert names[0].startswith("7.1.2/") and names[2].startswith("7.2/")


def test_rewards_are_equal_or_not_as_the_hooks_leave_them() -> None:
    """A lost group with partial credit stays, a mixed one that a hook levels makes room; the
    report's rewards are those before hooks."""
    controller, rollouter = _controller([LOST, MIXED], hook=_Sees(paid="0", levelled="1"))
    groups, metrics = _collect(controller, _ctx(1))
    assert _prompts(groups) == ["0", "2"] and len(rollouter.calls) == 2
    assert [m.reward.outcome for m in groups[0].members] == [0.25, 0.0]
    assert metrics["reward/outcome"] == pytest.approx(2 / 6) and _filter(metrics) == (1, 1)


@pytest.mark.parametrize("baseline", ["p50", "batch_mean"])
def test_replaced_groups_are_in_the_baselines(tmp_path: Path, baseline: str) -> None:
    """Three of the four prompts of step 1 are won throughout: the median group mean is 1, and of
    the two gone on with it would be 0.75."""
    replay = SelfImitationHook(ReplaySection(baseline=baseline), tmp_path)
    controller, _ = _controller([WON, MIXED, WON, WON], rounds=2, hook=replay)
    ctx = _ctx(1, replay_weight=1.0)
    groups, _ = _collect(controller, ctx)
    assert _prompts(groups) == ["1", "3"]
    samples, _ = controller.samples(ctx, groups)
    replay.on_samples(ctx, samples)
    replay.extra_updates(ctx)
    assert replay.metrics()["replay/p50"] == 1.0 and replay.metrics()["replay/inserted"] == 1
    replay.on_step_end(ctx, StepReport(step=1, policy_version=1, metrics={}))
    # Step 2 plays two mixed groups: means 1, 1, 1, 0.5, 0.5, 0.5.
    ctx = _ctx(2, replay_weight=1.0)
    _collect(controller, ctx)
    (update,) = replay.extra_updates(ctx)
    expected = {"p50": 0.25, "batch_mean": 0.5}[baseline]
    assert float(update.samples[0].advantages.max()) == expected


def test_progress_counts_up_over_the_rounds() -> None:
    controller, _ = _controller([WON, MIXED, LOST, MIXED])
    seen: list[int] = []
    controller.collect(_ctx(1), seen.append)
    assert seen == list(range(1, 9))


def test_a_resumed_run_takes_the_same_prompts() -> None:
    plays = [WON, MIXED, MIXED, LOST, LOST, MIXED, MIXED]
    whole, played = _controller(plays)
    groups = [_collect(whole, _ctx(step))[0] for step in (1, 2, 3)]
    parted, _ = _controller(plays)
    parted.collect(_ctx(1))
    resumed, again = _controller(plays)
    resumed.cursor.load_state_dict(parted.cursor.state_dict())
    rest = [_collect(resumed, _ctx(step))[0] for step in (2, 3)]
    assert [_prompts(g) for g in rest] == [_prompts(g) for g in groups[1:]]
    assert again.calls == played.calls[-len(again.calls) :]
    taken = [name for names, _, _ in played.calls for name in names]
    assert taken == [f"prompt-{i}" for i in range(whole.cursor.consumed)], "each exactly once"


@pytest.mark.parametrize(("in_statistics", "kept"), [(False, "2"), (True, "0")])
def test_marked_members_count_as_in_the_statistics(in_statistics: bool, kept: str) -> None:
    """One win beside a void loss has nothing to be compared with."""
    filters = {"in_group_statistics": in_statistics}
    controller, _ = _controller([VOID], row_filters=filters)
    groups, _ = _collect(controller, _ctx(1))
    assert sorted(_prompts(groups)) == sorted([kept, "1"])


def test_a_round_in_which_everything_failed_is_like_one_of_equal_rewards() -> None:
    controller, _ = _controller([WON, MIXED, FAILED])
    groups, metrics = _collect(controller, _ctx(1))
    assert _prompts(groups) == ["1", "3"] and metrics["rollout/failed"] == 2
    controller, _ = _controller([WON, MIXED, FAILED], rounds=1)
    groups, metrics = _collect(controller, _ctx(1))
    assert _prompts(groups) == ["1", "2"] and groups[1].members == ()
    samples, _ = controller.samples(_ctx(1), groups)
    assert {s.prompt_id for s in samples} == {"prompt-7.1/prompt-1"}


def test_each_prompt_has_one_fate_whatever_round_it_was_played_in() -> None:
    controller, _ = _controller([WON, MIXED, FAILED, LOST])
    collected = controller.collect(_ctx(1))
    samples, _ = controller.samples(_ctx(1), collected.groups)
    trained = {s.trajectory_id.group for s in samples if s.advantages.any()}
    consumed = collected.consumed(trained)
    assert [(c.position, c.prompt_id, str(c.fate)) for c in consumed] == [
        (0, "prompt-0", "filtered"),
        (1, "prompt-1", "trained"),
        (2, "prompt-2", "failed"),
        (3, "prompt-3", "filtered"),
    ]
