"""Memory that a rank's allocator keeps and others on the same GPU have need of."""

import gc

import torch

from megatron_spear.trainer.ranks import all_true


def give_back() -> None:
    """Collective: what holds nothing goes back to the GPU, on every rank before any goes on.

    torch keeps what was freed, and a module's cycles keep it from being freed.
    """
    gc.collect()
    torch.cuda.empty_cache()
    all_true(True)
