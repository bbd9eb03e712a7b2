"""The one place that calls hooks: in order, each with its name, and with a check of what it gives.

A hook that raises, or returns what its point does not take, ends the run with a HookError that
names hook, point and step; the traceback goes to the log. A stop that was asked for and a full disk
are nobody's fault and pass through.
"""

import contextlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

from megatron_spear.errors import CheckpointError, HookError, StopRequested, describe
from megatron_spear.files import says_disk_full
from megatron_spear.metrics import RUN_PREFIXES
from megatron_spear.replay.state import require_keys
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import (
    Origin,
    ScoredGroup,
    ScoredTrajectory,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryGroup,
    Update,
)

log = logging.getLogger(__name__)

_METRIC = re.compile(r"([a-z][a-z0-9_]*)/\S+")
_WHAT_TO_DO = (
    "What was saved is untouched: repair the hook and continue with resume=DIR of the run, or "
    "start again if it has no checkpoint yet"
)


class HookCalls:
    """The hooks of a run by name, in the order in which they are called.

    Example: ``HookCalls({"a": A(), "b": B()}).on_scored(ctx, groups)`` gives what B makes of what A
    made of the groups.
    """

    def __init__(self, hooks: Mapping[str, Hook]) -> None:
        self._hooks = dict(hooks)
        self._in_checkpoints = tuple(name for name, hook in hooks.items() if hook.keeps_state)

    def on_played(self, ctx: StepContext, groups: tuple[TrajectoryGroup, ...]) -> None:
        """Show every hook what was played."""
        for name in self._hooks:
            with self._calling(name, "on_played", _in(ctx)) as (hook, where):
                given = hook.on_played(ctx, groups)
            _require_nothing(given, where)

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        """The groups to go on with, each hook seeing those of the one before it."""
        for name in self._hooks:
            with self._calling(name, "on_scored", _in(ctx)) as (hook, where):
                groups = hook.on_scored(ctx, groups)
            _require_all(groups, tuple, ScoredGroup, where)
            for group in groups:
                _require_members(group, where)
        return groups

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        """Show every hook the step's samples."""
        for name in self._hooks:
            with self._calling(name, "on_samples", _in(ctx)) as (hook, where):
                given = hook.on_samples(ctx, samples)
            _require_nothing(given, where)

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        """All the updates that hooks add to the step."""
        updates: list[Update] = []
        for name in self._hooks:
            with self._calling(name, "extra_updates", _in(ctx)) as (hook, where):
                added = hook.extra_updates(ctx)
            _require_all(added, list, Update, where)
            for update in added:
                _require_update(update, where)
            updates += added
        return updates

    def metrics(self, ctx: StepContext) -> dict[str, float]:
        """What all hooks report of the step; no name comes twice or is the run's own."""
        found: dict[str, float] = {}
        reporter: dict[str, str] = {}
        for name in self._hooks:
            with self._calling(name, "metrics", _in(ctx)) as (hook, where):
                given = hook.metrics()
            if not isinstance(given, dict):
                _wrong(where, _kind(given), "a dict of numbers by metric name")
            for key, value in given.items():
                _require_metric(key, value, where, own_prefix=not _is_built_in(hook))
                if key in found:
                    taken = f"{key!r}, which hook {reporter[key]!r} reports too"
                    _wrong(where, taken, "names of its own")
                found[key], reporter[key] = float(value), name
        return found

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        """Tell every hook that the step is done."""
        for name in self._hooks:
            with self._calling(name, "on_step_end", _in(ctx)) as (hook, where):
                given = hook.on_step_end(ctx, report)
            _require_nothing(given, where)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The hooks' states by name, after this step."""
        states = {}
        for name in self._in_checkpoints:
            with self._calling(name, "state_dict", f"after step {step}") as (hook, where):
                states[name] = hook.state_dict()
            if not isinstance(states[name], dict) or not _is_plain(states[name]):
                _wrong(where, repr(states[name])[:200], _PLAIN)
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give each hook the state saved under its name.

        Raises CheckpointError where names are missing or unknown, or a hook refuses its state.
        """
        require_keys(states, self._in_checkpoints, "hooks")
        for name in self._in_checkpoints:
            with self._calling(name, "load_state_dict", "at the resume") as (hook, where):
                given = hook.load_state_dict(states[name])
            _require_nothing(given, where)

    def prune(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Let the hooks free what no state of the kept checkpoints needs."""
        for name in self._in_checkpoints:
            with self._calling(name, "prune", "after a checkpoint") as (hook, where):
                given = hook.prune([states[name] for states in kept])
            _require_nothing(given, where)

    @contextlib.contextmanager
    def _calling(self, name: str, point: str, when: str) -> Iterator[tuple[Any, str]]:
        """(The hook, words for where we are); what it raises becomes a HookError.

        A CheckpointError stays one, for a resume goes back to an older checkpoint then. The hook is
        Any: its annotations are a promise that is checked here.
        """
        hook = self._hooks[name]
        where = f"hook {name!r} ({type(hook).__name__}): {point} {when}"
        try:
            yield hook, where
        except StopRequested:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except Exception as error:
            if says_disk_full(error):
                raise
            log.error("%s raised:", where, exc_info=error)
            raise HookError(
                f"{where} raised {describe(error)}; the traceback is in the log above. "
                f"{_WHAT_TO_DO}"
            ) from error


_PLAIN = (
    "a dict of plain JSON values (lists, dicts with text keys, texts, finite numbers, true, false, "
    "null), which comes back from a file as it was"
)


def _in(ctx: StepContext) -> str:
    return f"in step {ctx.step}"


def _is_built_in(hook: Hook) -> bool:
    """The package's own hooks report under the run's prefixes (``replay/rows``)."""
    return type(hook).__module__.startswith("megatron_spear.")


def _is_plain(state: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(state)) == state)
    except (TypeError, ValueError):
        return False


def _require_all(
    given: Any, container: type[tuple[Any, ...]] | type[list[Any]], kind: type, where: str
) -> None:
    expected = f"a {container.__name__} of {kind.__name__}"
    if not isinstance(given, container):
        _wrong(where, _kind(given), expected)
    for index, item in enumerate(given):
        if not isinstance(item, kind):
            _wrong(where, f"{_kind(item)} at index {index} of a {container.__name__}", expected)


def _require_members(group: ScoredGroup, where: str) -> None:
    _require_all(group.members, tuple, ScoredTrajectory, f"{where}: as members of a group")
    for member in group.members:
        reward = member.reward
        if not all(map(_is_finite, (reward.outcome, reward.intrinsic, reward.format))):
            _wrong(where, f"{reward} to {member.trajectory.id}", "finite numbers")


def _require_update(update: Update, where: str) -> None:
    _require_all(update.samples, tuple, TrainSample, f"{where}: as samples of an update")
    if not isinstance(update.origin, Origin):
        _wrong(where, f"an update of origin {update.origin!r}", "a member of Origin")
    if not _is_finite(update.weight) or update.weight < 0.0:
        _wrong(where, f"an update of weight {update.weight!r}", "a finite number >= 0")


def _require_metric(name: Any, value: Any, where: str, *, own_prefix: bool) -> None:
    match = _METRIC.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        _wrong(where, f"the metric name {name!r}", "prefix/what, as in 'rare_types/bonus'")
    if own_prefix and match[1] in RUN_PREFIXES:
        run = ", ".join(sorted(RUN_PREFIXES))
        _wrong(where, f"the metric name {name!r}", f"a prefix that is not the run's own ({run})")
    if not _is_number(value):
        _wrong(where, f"{_kind(value)} as {name!r}", "a number (float)")


def _require_nothing(given: Any, where: str) -> None:
    if given is not None:
        _wrong(where, _kind(given), "nothing: this point gives no value, the run would drop it")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _wrong(where: str, got: str, expected: str) -> NoReturn:
    raise HookError(f"{where} gave {got}; expected {expected}. {_WHAT_TO_DO}")
