"""The sandbox that the settings ask for, and whether it can run on this machine."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_spear.envs.sandbox.bubblewrap import INSTALL, find_bubblewrap
from megatron_spear.envs.sandbox.execution import Execution, Sandbox
from megatron_spear.envs.sandbox.fusion import FusionSandbox
from megatron_spear.envs.sandbox.local import LocalSandbox
from megatron_spear.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from megatron_spear.config.environments.sandbox import SandboxSection

log = logging.getLogger(__name__)

_OTHERWISE = "or use sandbox.backend=sandbox_fusion, or accept the risk with sandbox.unsafe=true"
_TRIAL = ("print(6 * 7)", "42\n")
_shared: dict[str, _Shared] = {}
_lock = threading.Lock()


def make_sandbox(options: Mapping[str, Any]) -> Sandbox:
    """The sandbox of a section's fields (``SandboxSection.model_dump()``).

    Sandboxes of a process with the same options are one and share its workers; it ends when the
    last of them is closed. Raises ConfigError where code could only be run unprotected and
    ``unsafe`` is not set.
    """
    key = json.dumps(options, sort_keys=True, default=str)
    with _lock:
        if key not in _shared:
            _shared[key] = _Shared(key, _make(options))
        shared = _shared[key]
        shared.users += 1
    return _Share(shared)


def check_sandbox(section: SandboxSection) -> None:
    """Run a line of code as the environments will. Raises ConfigError that says what to do where
    that does not work."""
    sandbox = make_sandbox(section.model_dump())
    try:
        execution = sandbox.run(_TRIAL[0])
    except EnvironmentFault as fault:
        advice = f"{INSTALL} and allow user namespaces, {_OTHERWISE}"
        if section.backend == "sandbox_fusion":
            advice = f"expected a SandboxFusion server at sandbox.url={section.url}"
        raise ConfigError(f"{fault}; {advice}") from fault
    finally:
        sandbox.close()
    if execution.stdout != _TRIAL[1]:
        raise ConfigError(
            f"the sandbox answered {_TRIAL[0]} with {execution}; expected {_TRIAL[1]!r} "
            "(too little of sandbox.memory_mb, or of sandbox.timeout_s?)"
        )


def _make(options: Mapping[str, Any]) -> Sandbox:
    settings = _Settings(options)
    if settings.backend == "sandbox_fusion":
        return FusionSandbox(
            url=settings.url,
            timeout_s=settings.timeout_s,
            memory_mb=settings.memory_mb,
            max_output_chars=settings.max_output_chars,
            attempts=settings.request_attempts,
        )

    def local(*, jailed: bool) -> LocalSandbox:
        return LocalSandbox(
            python=settings.python and str(settings.python),
            jailed=jailed,
            workers=settings.workers,
            timeout_s=settings.timeout_s,
            memory_mb=settings.memory_mb,
            disk_mb=settings.disk_mb,
            max_processes=settings.max_processes,
            max_output_chars=settings.max_output_chars,
            preload=settings.preload,
        )

    if settings.unsafe:
        return _protected_if_possible(local)
    if find_bubblewrap() is None:
        raise ConfigError(
            "bubblewrap is not installed, and code written by a model is not run without it; "
            f"{INSTALL}, {_OTHERWISE}"
        )
    return local(jailed=True)


def _protected_if_possible(local: Callable[..., LocalSandbox]) -> Sandbox:
    """Plain processes where bubblewrap is missing or cannot start."""
    why = "bubblewrap is not installed"
    if find_bubblewrap() is not None:
        jailed = local(jailed=True)
        try:
            jailed.run(_TRIAL[0])
            return jailed
        except EnvironmentFault as fault:
            jailed.close()
            why = str(fault)
    log.warning(
        "sandbox.unsafe=true: code written by a model runs as plain processes, which can read what "
        "this user can and use the network (%s)",
        why,
    )
    return local(jailed=False)


class _Settings:
    """The fields of a SandboxSection, without pydantic."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def __getattr__(self, name: str) -> Any:
        return self._options[name]


class _Shared:
    """A sandbox, and how many use it."""

    def __init__(self, key: str, sandbox: Sandbox) -> None:
        self.key, self.sandbox, self.users = key, sandbox, 0


class _Share:
    """One user's part in a sandbox."""

    def __init__(self, shared: _Shared) -> None:
        self._shared: _Shared | None = shared

    def run(self, code: str) -> Execution:
        """See ``execution.Sandbox``."""
        if self._shared is None:
            raise EnvironmentFault("the sandbox was closed")
        return self._shared.sandbox.run(code)

    def close(self) -> None:
        """Give up the part; may be called again."""
        with _lock:
            shared, self._shared = self._shared, None
            if shared is None:
                return
            shared.users -= 1
            if shared.users:
                return
            del _shared[shared.key]
        shared.sandbox.close()
