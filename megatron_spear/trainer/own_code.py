"""The user's own environment and hooks, made before anything else; every mistake told at once."""

from megatron_spear.config.check import task_kind_problems
from megatron_spear.config.environments.custom import CustomSection
from megatron_spear.config.schema import RunConfig
from megatron_spear.envs.family import family_of
from megatron_spear.errors import ConfigError
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.user import user_hooks
from megatron_spear.user_code import load_callable


def own_code(config: RunConfig, *, environment_too: bool = False) -> dict[str, Hook]:
    """The user's hooks by name, once the environment's family could be made as well.

    ``environment_too`` also finds what the workers will make environments with. Raises ConfigError.
    """
    hooks: dict[str, Hook] = {}
    problems: list[str] = []
    try:
        _check_family(config, environment_too)
    except ConfigError as error:
        problems.append(
            "this environment cannot be used (docs/environments.md):\n"
            + "\n".join(f"  {line}" for line in str(error).splitlines())
        )
    try:
        hooks = user_hooks(config.hooks)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return hooks


def _check_family(config: RunConfig, environment_too: bool) -> None:
    family = family_of(config.env)
    if not isinstance(config.env, CustomSection):
        return
    lines = list(task_kind_problems(config.curriculum.tasks, family.task_kinds))
    if environment_too:
        try:
            load_callable(family.factory, f"env.family: {config.env.family}: {family.factory}")
        except ConfigError as error:
            lines.append(str(error))
    if lines:
        raise ConfigError("\n".join(lines))
