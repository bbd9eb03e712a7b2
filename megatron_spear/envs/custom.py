"""An environment of the user's own: from ``env.type=custom`` to its family."""

from megatron_spear.config.environments.custom import CustomSection
from megatron_spear.config.user_settings import checked_settings
from megatron_spear.envs.family import EnvironmentFamily
from megatron_spear.errors import ConfigError, SpearError
from megatron_spear.user_code import is_code_path, load_class, one_line


def custom_family(section: CustomSection) -> EnvironmentFamily:
    """The user's family, made as ``Class(settings)``, or as ``Class()`` where it has no Settings.

    Raises ConfigError with a line for each mistake.
    """
    place = f"env.family: {section.family}"
    kind: type[EnvironmentFamily] = load_class(
        section.family, place, EnvironmentFamily, "environment families"
    )
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"{place}: {kind.__name__} has no {' and no '.join(missing)}; add it")
    arguments = checked_settings(kind, EnvironmentFamily, section.settings, "env.settings")
    made = f"{kind.__name__}({'settings' if arguments else ''})"
    try:
        family = kind(*arguments)
    except SpearError:
        raise
    except Exception as error:
        raise ConfigError(f"{place}: {made} raised {one_line(error)}; repair the class") from error
    factory = getattr(family, "factory", None)
    if not isinstance(factory, str) or not is_code_path(factory):
        raise ConfigError(
            f"{place}: {made}.factory is {factory!r}, expected a text, 'package.module:callable' "
            "or 'FILE.py:callable', that names what makes one environment"
        )
    return family
