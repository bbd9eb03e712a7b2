"""Packing as a policy's layout wants it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.types import Origin, TrainSample


def pack_for(
    policy: Any,
    samples: Sequence[TrainSample],
    token_weights: Sequence[np.ndarray],
    origins: Sequence[Origin],
    *,
    tokens_per_microbatch: int,
    columns: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> PackedStep:
    """``data.packing.pack`` for the data-parallel ranks and the paddings of ``policy`` (a
    ``MegatronPolicy``, or what stands for one)."""
    return pack(
        samples,
        token_weights,
        origins,
        data_parallel=policy.ctx.data_size,
        tokens_per_microbatch=tokens_per_microbatch,
        pad_multiple=policy.pad_multiple,
        sequence_multiple=policy.sequence_multiple,
        mix_lengths=policy.mix_lengths,
        microbatch_multiple=policy.microbatch_multiple,
        columns=columns,
    )
