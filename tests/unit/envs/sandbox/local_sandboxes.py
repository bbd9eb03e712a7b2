"""Local sandboxes with the settings of a test."""

from megatron_spear.envs.sandbox.local import LocalSandbox


def make_local(**changes: object) -> LocalSandbox:
    """A sandbox with the settings' defaults but for changes."""
    settings: dict[str, object] = {
        "python": None,
        "jailed": True,
        "workers": 1,
        "timeout_s": 30.0,
        "memory_mb": 1024,
        "disk_mb": 64,
        "max_processes": 64,
        "max_output_chars": 10_000,
        "preload": (),
    }
    return LocalSandbox(**{**settings, **changes})  # type: ignore[arg-type]
