"""Whether tests can run programs of a model on this machine."""

import functools

from megatron_spear.config.environments.sandbox import SandboxSection
from megatron_spear.envs.sandbox.make import check_sandbox
from megatron_spear.errors import ConfigError


@functools.cache
def why_no_sandbox() -> str:
    """Why the default sandbox cannot be used here, in words; "" where it can."""
    try:
        check_sandbox(SandboxSection())
    except ConfigError as error:
        return f"no sandbox here: {error}"
    return ""
