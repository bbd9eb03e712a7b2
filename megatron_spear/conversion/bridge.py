"""Conversion through NVIDIA's megatron-bridge, for model families without a weight table here.

An optional dependency (``pip install megatron-spear[bridge]``, Python 3.12 and a GPU stack). Such
checkpoints can be carried to and from Megatron; the policy trains only families with a table.
"""

from pathlib import Path
from typing import Any

from megatron_spear.conversion.shape import SUPPORTED, load_config
from megatron_spear.errors import CheckpointError, ConfigError


def has_table(folder: Path) -> bool:
    """Whether the folder's model is of a family with a weight table."""
    return getattr(load_config(folder), "model_type", None) in SUPPORTED


def hf_to_megatron(source: Path, target: Path, unread: dict[str, Any]) -> None:
    """As ``convert.hf_to_megatron``. ``unread`` are settings by option, which must be unset."""
    _refuse(source, unread)
    _auto_bridge(source).import_ckpt(str(source), str(target))


def megatron_to_hf(source: Path, target: Path, config: Path, unread: dict[str, Any]) -> None:
    """As ``convert.megatron_to_hf``."""
    _refuse(config, unread)
    bridge = _auto_bridge(config).from_hf_pretrained(str(config))
    bridge.export_ckpt(str(source), str(target), show_progress=False, strict=True)


def _auto_bridge(folder: Path) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        family = getattr(load_config(folder), "model_type", None)
        raise ConfigError(
            f"model_type {family!r} has no weight table; expected one of {', '.join(SUPPORTED)}, "
            "or megatron-bridge installed, which converts more families (pip install "
            f"'megatron-spear[bridge]'; {error})"
        ) from error
    if not AutoBridge.can_handle(str(folder)):
        raise ConfigError(f"{folder}: neither a weight table nor megatron-bridge knows this model")
    return AutoBridge


def _refuse(folder: Path, unread: dict[str, Any]) -> None:
    if wrong := [name for name, value in unread.items() if value]:
        raise CheckpointError(
            f"{folder} is converted by megatron-bridge, which takes no {', '.join(wrong)}; leave "
            "it out"
        )
