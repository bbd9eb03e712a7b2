"""Recomputation that runs in the FP8 state of the first time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint

from .fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    """A name Megatron subclasses."""


@contextmanager
def activation_recompute_forward(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Megatron opens it around what it recomputes by itself; nothing to remember here."""
    yield


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """``function(*args)``, whose activations are computed again in the backward pass."""
    assert not distribute_saved_activations, "the stand-in keeps inputs whole"
    state = FP8GlobalStateManager
    again = fp8_autocast(enabled=state.enabled, fp8_recipe=state.recipe)
    return torch.utils.checkpoint.checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), again),
        **kwargs,
    )
