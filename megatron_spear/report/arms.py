"""Which runs belong together: equal settings but the seed, or as the user says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.config.fingerprint import defining_settings
from megatron_spear.errors import ConfigError
from megatron_spear.report.runs import Run

SEED = "run.seed"
_MAX_IN_NAME = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Runs that differ in their seed only; ``runs`` are positions in the list of runs.

    ``differing`` are its settings that not all arms share.
    """

    name: str
    runs: tuple[int, ...]
    differing: Mapping[str, Any]


def arms_of(runs: Sequence[Run], groups: Mapping[str, Sequence[Path]]) -> tuple[Arm, ...]:
    """The arms of a comparison, in the order of their first runs.

    Runs of ``groups`` are in the arm of that name; others go together by their settings. One
    without ``config.yaml`` is an arm of its own: nothing says what it shares. Raises ConfigError
    for a run in two groups.
    """
    members: dict[Any, list[int]] = {}
    names: dict[Any, str] = {}
    for position, run in enumerate(runs):
        key = _group(run, groups) or _fingerprint(run) or run.path
        members.setdefault(key, []).append(position)
        if isinstance(key, str):
            names[key] = key
    differing = _differing([runs[positions[0]] for positions in members.values()])
    titles = [runs[positions[0]].title for positions in members.values()]
    arms = []
    for index, (key, positions) in enumerate(members.items()):
        name = names.get(key) or _name(titles, index, differing[index])
        arms.append(Arm(name=name, runs=tuple(positions), differing=differing[index]))
    return _apart(arms)


def _group(run: Run, groups: Mapping[str, Sequence[Path]]) -> str | None:
    found = [
        name
        for name, paths in groups.items()
        if run.path.resolve() in [path.resolve() for path in paths]
    ]
    if len(found) > 1:
        raise ConfigError(f"{run.path}: is in the groups {' and '.join(found)}; expected one")
    return found[0] if found else None


def _settings(run: Run) -> dict[str, Any]:
    found = defining_settings(run.settings)
    found.pop(SEED, None)
    return found


def _fingerprint(run: Run) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((path, repr(value)) for path, value in _settings(run).items()))


def _differing(firsts: Sequence[Run]) -> list[dict[str, Any]]:
    tables = [_settings(run) for run in firsts]
    paths = dict.fromkeys(path for table in tables for path in table)
    unlike = [p for p in paths if len({repr(table.get(p)) for table in tables}) > 1]
    return [{path: table.get(path) for path in unlike} for table in tables]


def _name(titles: Sequence[str], index: int, differing: Mapping[str, Any]) -> str:
    """``run.name`` where no other arm has it, else what differs, behind it where names differ."""
    if titles.count(titles[index]) == 1 or not differing:
        return titles[index]
    shown = [f"{path}={value}" for path, value in list(differing.items())[:_MAX_IN_NAME]]
    name = "" if len(set(titles)) == 1 else f"{titles[index]}: "
    return name + ", ".join(shown)


def _apart(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms with a number behind a name that is there already."""
    seen: dict[str, int] = {}
    named = []
    for arm in arms:
        seen[arm.name] = seen.get(arm.name, 0) + 1
        name = arm.name if seen[arm.name] == 1 else f"{arm.name} ({seen[arm.name]})"
        named.append(Arm(name=name, runs=arm.runs, differing=arm.differing))
    return tuple(named)
