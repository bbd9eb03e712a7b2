"""Groups of equal rewards make room for further prompts: bounded, once each, and resumable."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from megatron_spear.config.method import AlgorithmSection, RewardSection
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.trainer.controller import Controller
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.types import (
    Coefficients,
    Prompt,
    ScoredGroup,
    Status,
    StepContext,
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
    """Keeps the groups it is shown."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        self.seen += [group.group_id for group in groups]
        return groups


def _ctx(step: int) -> StepContext:
    coefficients = Coefficients(intrinsic_weight=0.0, replay_weight=0.0)
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
    assert _prompts(groups) == ["3", "1"]
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
    ("rounds", "kept", "consumed"), [(0, "01", 2), (1, "23", 4), (2, "43", 5), (9, "53", 6)]
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


def test_hooks_see_the_groups_that_stay_and_group_ids_are_unique() -> None:
    hook = _Sees()
    controller, _ = _controller([WON] * 4, hook=hook)
    names: list[str] = []
    for step in (1, 2):
        groups, _ = _collect(controller, _ctx(step))
        controller.samples(_ctx(step), groups)
        names += [group.group_id for group in groups]
    assert hook.seen == names and len(set(names)) == 4
    assert names[0].startswith("7.1.2/") and names[2].startswith("7.2/")


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
    assert _prompts(groups) == [kept, "1"]


def test_a_round_in_which_everything_failed_is_like_one_of_equal_rewards() -> None:
    controller, _ = _controller([WON, MIXED, FAILED])
    groups, metrics = _collect(controller, _ctx(1))
    assert _prompts(groups) == ["3", "1"] and metrics["rollout/failed"] == 2
    controller, _ = _controller([WON, MIXED, FAILED], rounds=1)
    groups, metrics = _collect(controller, _ctx(1))
    assert _prompts(groups) == ["2", "1"] and groups[0].members == ()
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
