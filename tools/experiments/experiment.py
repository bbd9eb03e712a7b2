"""An experiment as its YAML file describes it: arms (methods) that differ in some settings.

title: Two methods on generated games
config: examples/alfworld/quickstart.yaml   # from the project's root
settings: [run.steps=40, evaluation.every=10]
parts:                                      # settings under a name, for several arms
  plain: [replay.enabled=false]
arms:
  grpo: {title: GRPO, settings: [examples/methods/grpo.yaml]}
  ablation: {title: without replay, settings: [plain, curriculum.intrinsic_schedule=constant]}
  spear: {title: SPEAR, seeds: 3}
compare:
  - {arm: spear, reference: grpo, aim: 0.10}

``base: FILE`` takes all from another file, beside this one, but for what is given here; parts, arms
and settings are added to those there (later settings win), and ``only: [grpo, spear]`` keeps these
arms and their comparisons.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from megatron_spear.config.base import NonNegativeInt, PositiveInt, Section
from megatron_spear.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Arm(Section):
    """One method: what it is called, its settings (``a.b=c``, a file of settings, or the name of a
    part), its seeds."""

    title: str
    """Name in tables and pictures."""
    settings: tuple[str, ...] = ()
    """In order; later ones win, and all ``a.b=c`` over all files."""
    seeds: PositiveInt | None = None
    """How many; None = the experiment's number."""


class Comparison(Section):
    """A difference that the table tells: ``arm`` minus ``reference``."""

    arm: str
    reference: str
    aim: float | None = None
    """Least difference hoped for; None = none was named."""
    published: str = ""
    """The same difference in the paper, in words."""


class Experiment(Section):
    """All of the file."""

    title: str
    config: Path
    needs: tuple[str, ...] = ()
    """Settings that the command has to give, such as where data lie: ``env.games``."""
    settings: tuple[str, ...] = ()
    seeds: PositiveInt = 3
    """Seeds of each arm."""
    first_seed: NonNegativeInt = 0
    """The seeds are first_seed, first_seed + 1, ..; settings are tried out on others."""
    parts: dict[str, tuple[str, ...]] = Field(default={})
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    compare: tuple[Comparison, ...] = ()
    pictures: dict[str, tuple[str, ...]] = Field(default={})
    """Which arms a picture shows, by its name; {} = all in one, ``curves``."""

    @model_validator(mode="after")
    def _known_names(self) -> "Experiment":
        for name, arm in self.arms.items():
            for entry in arm.settings:
                if not _is_setting(entry) and entry not in self.parts:
                    raise ValueError(
                        f"arms.{name}: {entry!r} is neither a setting (a.b=c), a file (.yaml) nor "
                        f"one of the parts ({', '.join(self.parts) or 'there are none'})"
                    )
        compared = [name for pair in self.compare for name in (pair.arm, pair.reference)]
        shown = [name for arms in self.pictures.values() for name in arms]
        for key, names in (("compare", compared), ("pictures", shown)):
            for name in names:
                if name not in self.arms:
                    raise ValueError(f"{key}: no arm {name!r}; there are {', '.join(self.arms)}")
        return self

    def require_given(self, further: Sequence[str]) -> None:
        """Raises ConfigError unless the command gives all that is needed."""
        given = {setting.partition("=")[0] for setting in further}
        if missing := [name for name in self.needs if name not in given]:
            raise ConfigError(
                f"{self.title}: got no {', '.join(missing)}; give "
                + " ".join(f"{name}=PATH" for name in missing)
            )

    def require_arms(self, names: Sequence[str]) -> None:
        """Raises ConfigError where there is no such arm."""
        if unknown := [name for name in names if name not in self.arms]:
            raise ConfigError(
                f"--arms: no arm {', '.join(unknown)}; there are {', '.join(self.arms)}"
            )

    def seeds_of(self, name: str) -> range:
        """The seeds of an arm."""
        number = self.arms[name].seeds or self.seeds
        return range(self.first_seed, self.first_seed + number)

    def settings_of(self, name: str) -> tuple[str, ...]:
        """All settings of an arm behind those of the configuration file; files from the current
        directory."""
        entries = list(self.settings)
        for entry in self.arms[name].settings:
            entries += (entry,) if _is_setting(entry) else self.parts[entry]
        return tuple(os.path.relpath(ROOT / x) if _is_file(x) else x for x in entries)


def _is_setting(entry: str) -> bool:
    return "=" in entry or _is_file(entry)


def _is_file(entry: str) -> bool:
    return "=" not in entry and entry.endswith(".yaml")


def read_experiment(path: Path) -> Experiment:
    """Raises ConfigError with every mistake in the file."""
    try:
        return Experiment.model_validate(_tree(path))
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'experiment'}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError(f"{path}:\n" + "\n".join(lines)) from None


def _tree(path: Path) -> dict[str, Any]:
    """The file's values over those of its base."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}, expected a map with 'arms:'")
    if "base" not in tree:
        return tree
    below = _tree(path.parent / str(tree.pop("base")))
    only = tree.pop("only", None)
    added = {key: {**(below.get(key) or {}), **(tree.get(key) or {})} for key in ("parts", "arms")}
    settings = [*(below.get("settings") or ()), *(tree.get("settings") or ())]
    merged = {**below, **tree, **added, "settings": settings}
    return merged if only is None else _part(merged, [str(name) for name in only], path)


def _part(tree: dict[str, Any], names: Sequence[str], path: Path) -> dict[str, Any]:
    """The experiment with these arms alone."""
    arms = tree.get("arms") or {}
    if unknown := [name for name in names if name not in arms]:
        raise ConfigError(f"{path}: only: no arm {', '.join(unknown)}; there are {', '.join(arms)}")
    compare = [
        pair
        for pair in tree.get("compare") or ()
        if {pair.get("arm"), pair.get("reference")} <= set(names)
    ]
    shown = {
        picture: [name for name in there if name in names]
        for picture, there in (tree.get("pictures") or {}).items()
    }
    pictures = {picture: there for picture, there in shown.items() if len(there) > 1}
    kept = {name: arms[name] for name in names}
    return {**tree, "arms": kept, "compare": compare, "pictures": pictures}
