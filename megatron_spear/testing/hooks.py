"""What every hook must keep to, as checks to run against your own (docs/hooks.md).

    from megatron_spear.testing.hooks import check_hook

    def test_my_hook():
        check_hook(lambda folder: MyHook(MyHook.Settings(bonus=0.5)))

Each check plays a few made-up steps with hooks of its own, called as a run calls them, and raises
ContractViolation with what was got and expected. ``folder`` is an empty folder for a hook that
keeps files; two hooks made with the same one share them, as a resumed run does with its files.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.errors import CheckpointError, HookError
from megatron_spear.testing.contract import ContractViolation, fail
from megatron_spear.testing.hand_made import make_trajectory, make_turn
from megatron_spear.trainer.controller import with_gradient, with_old_logprobs
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.types import (
    TASK_TYPES,
    Coefficients,
    Prompt,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryGroup,
    Update,
)

Make = Callable[[Path], Hook]
Groups = Callable[[int], tuple[ScoredGroup, ...]]

STEPS = 6
"""Steps that each check plays."""
_ABANDONED = 1000
"""Added to the step whose groups a future sees that a resume throws away."""


def made_up_groups(step: int) -> tuple[ScoredGroup, ...]:
    """Three groups of four attempts, one or two of them won; task types take turns.

    Example: step 1 has the prompts ``look_at_obj_in_light-1-0``, ``pick_clean_...-1-1``, ...
    """
    return tuple(_group(step, index, wins=1 + index % 2) for index in range(3))


def check_hook(make: Make, *, groups: Groups = made_up_groups) -> None:
    """All checks below. ``groups(step)`` gives the groups of a step, the same for the same step."""
    check_returns(make, groups=groups)
    check_records_unchanged(make, groups=groups)
    check_metrics(make, groups=groups)
    check_updates(make, groups=groups)
    check_state(make, groups=groups)
    check_resume(make, groups=groups)


def check_returns(make: Make, *, groups: Groups = made_up_groups) -> None:
    """No point raises, each gives the type that its signature says, metrics have a prefix."""
    with _folder() as folder:
        calls = _calls(make, folder)
        for step in range(1, STEPS + 1):
            _play(calls, step, groups(step))
            state = _state(calls, step)
            with _violations():
                calls.prune([state])


def check_records_unchanged(make: Make, *, groups: Groups = made_up_groups) -> None:
    """What a hook is shown stays as it was; a changed record is a new one."""
    shown: list[tuple[str, Any, Any]] = []

    def note(what: str, record: Any) -> None:
        shown.append((what, record, _plain(record)))

    with _folder() as folder:
        calls = _calls(make, folder)
        for step in range(1, STEPS + 1):
            _play(calls, step, groups(step), note)
            for what, record, before in shown:
                if _plain(record) != before:
                    fail(what, f"was changed by the end of step {step}", "it as it was shown")


def check_metrics(make: Make, *, groups: Groups = made_up_groups) -> None:
    """Metrics are finite numbers."""
    for played in _played(make, groups):
        for name, value in played.metrics.items():
            if not isfinite(value):
                fail(f"in step {played.step} the metric {name!r} is", str(value), "a finite number")


def check_updates(make: Make, *, groups: Groups = made_up_groups) -> None:
    """The samples of extra updates can be trained on: arrays ``[L]``, finite, each segment once."""
    for played in _played(make, groups):
        for update in played.updates:
            seen = set()
            for sample in update.samples:
                what = f"in step {played.step}, {sample.trajectory_id} segment {sample.segment}"
                _check_sample(sample, what)
                if (sample.trajectory_id, sample.segment) in seen:
                    fail(what, "is twice in one update", "it once")
                seen.add((sample.trajectory_id, sample.segment))


def check_state(make: Make, *, groups: Groups = made_up_groups) -> None:
    """The state is plain JSON, comes back as it was, and is refused with other keys."""
    with _folder() as folder:
        calls = _calls(make, folder)
        for step in range(1, STEPS + 1):
            _play(calls, step, groups(step))
            state = _state(calls, step)
            again = _calls(make, folder)
            _load(again, state)
            if (got := _state(again, step)) != state:
                fail(f"after step {step} the state comes back as", _short(got), _short(state))
        own = state.get(_NAME, {})  # none of a hook that looks on only
        for key in own:
            wrong = {name: value for name, value in own.items() if name != key}
            _expect_refused(_calls(make, folder), wrong, f"a state without {key!r}")
        _expect_refused(_calls(make, folder), {**own, "no such key": 0}, "a state with another key")


def check_resume(make: Make, *, groups: Groups = made_up_groups) -> None:
    """Restored from its state, a hook does what the one that was not stopped does.

    What happened after the checkpoint and was thrown away leaves no trace.
    """
    straight = _played(make, groups)
    for stop in range(1, STEPS):
        with _folder() as folder:
            calls = _calls(make, folder)
            for step in range(1, stop + 1):
                _play(calls, step, groups(step))
            state = _state(calls, stop)
            for step in (stop + 1, stop + 2):
                _play(calls, step, groups(step + _ABANDONED))
            resumed = _calls(make, folder)
            _load(resumed, state)
            for expected in straight[stop:]:
                got = _play(resumed, expected.step, groups(expected.step))
                _expect_same(got, expected, f"stopped after step {stop}, in step {got.step}")
            last, known = _state(resumed, STEPS), straight[-1].state
            if last != known:
                fail(f"stopped after step {stop}, the last state is", _short(last), _short(known))


_NAME = "checked"


@dataclass(frozen=True, kw_only=True)
class _Played:
    """What a hook gave in one step."""

    step: int
    groups: tuple[ScoredGroup, ...]
    updates: list[Update]
    metrics: dict[str, float]
    state: dict[str, Any]


def _group(step: int, index: int, wins: int) -> ScoredGroup:
    task_type = TASK_TYPES[(step + index) % len(TASK_TYPES)]
    name = f"{step}-{index}"
    prompt = Prompt(prompt_id=f"{task_type}-{name}", env="toy", metadata={"index": index})
    turn = make_turn(policy_version=step - 1)
    members = []
    for member in range(4):
        won = (member + step) % 4 < wins
        trajectory = make_trajectory(name, member, ((turn,),), won=won)
        reward = Reward(outcome=float(won), intrinsic=0.1 * member)
        members.append(
            ScoredTrajectory(trajectory=replace(trajectory, prompt=prompt), reward=reward)
        )
    return ScoredGroup(group_id=name, prompt=prompt, members=tuple(members))


def _played(make: Make, groups: Groups) -> list[_Played]:
    """All steps, not stopped."""
    with _folder() as folder:
        calls = _calls(make, folder)
        return [
            replace(_play(calls, step, groups(step)), state=_state(calls, step))
            for step in range(1, STEPS + 1)
        ]


def _play(
    calls: HookCalls,
    step: int,
    groups: tuple[ScoredGroup, ...],
    shown: Callable[[str, Any], None] = lambda what, record: None,
) -> _Played:
    """One step as the trainer has it; ``shown`` hears of every record before the hook sees it."""
    ctx = StepContext(
        step=step,
        policy_version=step - 1,
        coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
        seed=7,
    )
    with _violations():
        played = tuple(map(_as_played, groups))
        # The two share their trajectories; the one that hooks go on with is named first.
        shown(f"what on_scored was shown in step {step}", groups)
        shown(f"what on_played was shown in step {step}", played)
        calls.on_played(ctx, played)
        chosen = calls.on_scored(ctx, groups)
        advantages = turn_advantages(chosen, AlgorithmSection(), ctx.coefficients.intrinsic_weight)
        samples = with_gradient(make_samples(chosen, advantages))
        logprobs = [np.full(len(sample.token_ids), -0.5 - 0.01 * step) for sample in samples]
        samples = with_old_logprobs(samples, logprobs)
        shown(f"what on_samples was shown in step {step}", samples)
        calls.on_samples(ctx, samples)
        updates = calls.extra_updates(ctx)
        metrics = calls.metrics(ctx)
        report = StepReport(step=step, policy_version=step, metrics=dict(metrics))
        shown(f"what on_step_end was shown in step {step}", report)
        calls.on_step_end(ctx, report)
    return _Played(step=step, groups=chosen, updates=updates, metrics=metrics, state={})


def _as_played(group: ScoredGroup) -> TrajectoryGroup:
    members = tuple(member.trajectory for member in group.members)
    return TrajectoryGroup(group_id=group.group_id, prompt=group.prompt, members=members)


def _check_sample(sample: TrainSample, what: str) -> None:
    size = (len(sample.token_ids),)
    for name in (
        "token_ids",
        "response_mask",
        "rollout_logprobs",
        "old_logprobs",
        "advantages",
    ):
        array = getattr(sample, name)
        if not isinstance(array, np.ndarray) or array.shape != size:
            fail(f"{what}: {name} is", _short(array), f"an array of {size[0]} entries")
        if not np.isfinite(array).all():
            fail(f"{what}: {name} is", _short(array), "finite numbers")
    if sample.response_mask.dtype != np.bool_:
        fail(f"{what}: response_mask is", str(sample.response_mask.dtype), "bool")
    if sample.advantages[~sample.response_mask].any():
        fail(f"{what}: advantages are", _short(sample.advantages), "0 outside response_mask")
    if not 0 <= sample.segment < sample.num_segments:
        fail(f"{what}: it is", f"one of {sample.num_segments} segments", "segment < num_segments")


def _expect_same(got: _Played, expected: _Played, when: str) -> None:
    for name in ("groups", "updates", "metrics"):
        one, other = _plain(getattr(got, name)), _plain(getattr(expected, name))
        if one != other:
            fail(f"{when}, {name} are", _short(one), f"as without the stop, {_short(other)}")


def _expect_refused(calls: HookCalls, state: Mapping[str, Any], what: str) -> None:
    try:
        calls.load_state_dict({_NAME: state})
    except CheckpointError:
        return
    except HookError as error:
        raise ContractViolation(f"{what}: {error}; expected a CheckpointError") from error
    fail(what, "was taken", "a CheckpointError (see replay.state.require_keys)")


def _calls(make: Make, folder: Path) -> HookCalls:
    return HookCalls({_NAME: make(folder)})


def _state(calls: HookCalls, step: int) -> dict[str, Any]:
    """The state as it comes back from a checkpoint's file."""
    with _violations():
        state: dict[str, Any] = json.loads(json.dumps(calls.state_dict(step)))
        return state


def _load(calls: HookCalls, state: Mapping[str, Any]) -> None:
    with _violations():
        calls.load_state_dict(state)


@contextlib.contextmanager
def _violations() -> Iterator[None]:
    """What a run would end with, as the contract's own error."""
    try:
        yield
    except (HookError, CheckpointError) as error:
        raise ContractViolation(str(error)) from error


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="spear-hook-") as folder:
        yield Path(folder)


def _plain(record: Any) -> Any:
    """Lists, dicts and scalars that compare by value."""
    if isinstance(record, np.ndarray):
        return [str(record.dtype), record.tolist()]
    if is_dataclass(record):
        return [type(record).__name__, *(_plain(getattr(record, f.name)) for f in fields(record))]
    if isinstance(record, Mapping):
        return {key: _plain(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [_plain(item) for item in record]
    return record.value if isinstance(record, Enum) else record


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 300 else text[:297] + "..."
