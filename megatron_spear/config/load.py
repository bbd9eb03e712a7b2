"""From a YAML file and overrides to a checked ``RunConfig``, and back to YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_spear.config.complaints import validated
from megatron_spear.config.layers import read_layers, split_files
from megatron_spear.config.presets.layouts import PRESETS
from megatron_spear.config.schema import RunConfig
from megatron_spear.config.sources import Settings, merged, read_overrides
from megatron_spear.errors import ConfigError

CONFIG_NAME = "config.yaml"
"""File in a run directory that holds its resolved configuration."""


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run: defaults, the preset, the YAML files, the overrides in order.

    A YAML file comes over those that it names as its ``base``, and further files among the
    overrides (words that end in .yaml or .yml) come over it, the last over all. Overrides are
    ``a.b=c``, ``--a.b=c`` or ``--a.b c``; values are YAML (``null``, ``[a, b]``, ``{window: 2}``).
    A map changes the keys it names and leaves its neighbours alone. Relative paths start at the
    current directory, also those written in the files, but for ``base``.

    ``resume=DIR`` without a file takes ``DIR/config.yaml`` as the file, except ``run.stop_after``,
    which belongs to one launch. With ``resume`` the run directory is ``DIR``, whatever ``run.dir``
    says. That file has a value for every setting: a ``preset`` among the overrides comes over it.

    Raises ConfigError naming every mistake at once.

    Example: ``load_config("quickstart.yaml", ["run.steps=3", "--replay.capacity", "64"])``.
    """
    given = Settings()
    files, overrides = split_files(overrides)
    read_overrides(overrides, given)
    settings = Settings(problems=given.problems)
    resumed = given.tree.get("resume")
    if path is not None:
        read_layers(Path(path), settings)
    elif isinstance(resumed, str):
        read_layers(Path(resumed) / CONFIG_NAME, settings)
        _forget_launch(settings.tree)
    for file in files:
        read_layers(file, settings)
    settings.origins.update(given.origins)
    preset = _preset_layer(given.tree.get("preset", settings.tree.get("preset")))
    if path is None and "preset" in given.tree:
        settings.tree = merged(settings.tree, preset)
    else:
        settings.tree = merged(preset, settings.tree)
    settings.tree = merged(settings.tree, given.tree)
    return _validated(settings)


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, every value in schema order; ``load_config`` reads it back."""
    return yaml.safe_dump(
        config.model_dump(mode="json"),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


def _validated(settings: Settings) -> RunConfig:
    tree = merged(RunConfig().model_dump(), settings.tree)
    config, lines = validated(RunConfig, tree, settings)
    if lines or config is None:
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "1 mistake"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  {x}" for x in lines))
    if config.resume is not None and config.run.dir != config.resume:
        run = config.run.model_copy(update={"dir": config.resume})
        config = config.model_copy(update={"run": run})
    return config


def _preset_layer(name: Any) -> dict[str, Any]:
    """The settings of a preset; nothing without one, or for a name that the schema refuses."""
    known = isinstance(name, str) and name in PRESETS
    return {"policy": dict(PRESETS[name].policy)} if known else {}


def _forget_launch(tree: dict[str, Any]) -> None:
    """Drop what the last launch was told, not what the run is."""
    tree.pop("resume", None)
    if isinstance(tree.get("run"), dict):
        tree["run"].pop("stop_after", None)
