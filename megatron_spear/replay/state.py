"""Strict checks of saved state, shared by everything that is restored from a checkpoint."""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_spear.errors import CheckpointError


def require_keys(state: Mapping[str, Any], expected: Collection[str], owner: str) -> None:
    """Raise CheckpointError unless ``state`` has exactly the ``expected`` keys."""
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{owner}: saved state has keys {sorted(state)}, expected {sorted(expected)} "
            f"(missing {missing}, unknown {unknown}); resume with the version that wrote it"
        )
