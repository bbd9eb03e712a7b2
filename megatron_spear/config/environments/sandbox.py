"""Settings of the sandbox that runs code written by a model."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_spear.config.base import PositiveFloat, PositiveInt, Section

_LOCAL_ONLY = ("unsafe", "python", "preload", "workers", "disk_mb", "max_processes")
_FUSION_ONLY = ("url", "request_attempts")


class SandboxSection(Section):
    """Where code written by a model runs, and how much it may take (docs/sandbox.md)."""

    backend: Literal["local", "sandbox_fusion"] = "local"
    """``local``: on the environment worker's machine, shut in by bubblewrap. ``sandbox_fusion``: on
    a SandboxFusion server."""
    url: str = ""
    """Address of the SandboxFusion server, ``http://HOST:PORT``."""
    request_attempts: PositiveInt = 4
    """How often a request is sent to the SandboxFusion server before the trajectory fails, within
    ``timeout_s`` and a minute of waiting."""
    unsafe: bool = False
    """Where bubblewrap is missing or cannot start, run code as plain processes that can read files
    and use the network. Without it such a machine runs no code."""
    timeout_s: PositiveFloat = 30.0
    """Seconds a piece of code may take, of wall-clock time and of a process's CPU time."""
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    """MiB of memory for a piece of code: for each process of it, and for all together."""
    disk_mb: PositiveInt = 64
    """MiB that a piece of code may write to its temporary folder."""
    max_processes: Annotated[int, Field(ge=8)] = 64
    """Processes and threads of a worker, of which it needs four itself."""
    max_output_chars: PositiveInt = 10_000
    """Characters that are kept: of stdout the first, of stderr the last."""
    workers: PositiveInt = 1
    """Warm workers of each environment worker; it runs one piece of code at a time, so more are of
    use only to an environment with threads."""
    python: Path | None = None
    """Interpreter that runs the code, with the packages that it has, such as one of a virtual
    environment made for it. None = the system's ``/usr/bin/python3``."""
    preload: tuple[str, ...] = ()
    """Modules that are imported before any code comes, so that importing them costs it nothing."""

    @model_validator(mode="after")
    def _of_the_backend(self) -> "SandboxSection":
        if self.backend == "sandbox_fusion" and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"url={self.url!r} with backend=sandbox_fusion; expected http://HOST:PORT"
            )
        other = _LOCAL_ONLY if self.backend == "sandbox_fusion" else _FUSION_ONLY
        for name in other:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r} is not used with backend={self.backend}; leave it out"
                )
        return self
