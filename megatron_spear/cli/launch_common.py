"""What all ways of launching do first: settings, checks, the run directory."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_spear.config.schema import RunConfig

CONFIG_HELP = "YAML file; none with resume=DIR, which continues a run"


def launchable(
    config_file: str | None,
    settings: Sequence[str],
    *checks: "Callable[[RunConfig], Iterator[str]]",
) -> "RunConfig":
    """The settings of a launch; ConfigError with all that cannot work. ``checks`` give further
    problems, a line each."""
    from megatron_spear.cluster.roles import role_problems
    from megatron_spear.config.check import check_config
    from megatron_spear.config.load import load_config
    from megatron_spear.errors import ConfigError

    config = load_config(config_file, settings)
    if config_file is None and config.resume is None:
        raise ConfigError("no YAML file, and no resume=DIR that would have one")
    problems = [
        *check_config(config, config.cluster.world_size),
        *(line for check in (role_problems, *checks) for line in check(config)),
    ]
    if problems:
        raise ConfigError("these settings cannot work:\n" + "\n".join(f"  {p}" for p in problems))
    return config


def make_run_directory(config: "RunConfig") -> Path:
    """The absolute run directory, made or taken again; ``train resume=`` goes on in it."""
    from megatron_spear.trainer.run_directory import RunDirectory

    if config.resume is not None:
        return RunDirectory.resume(config.resume, config).path.resolve()
    return RunDirectory.create(config.run.dir, config).path.resolve()
