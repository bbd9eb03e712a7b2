"""From samples to packed micro-batches and back: the only place with the next-token shift.

A ``TrainSample``'s entry ``t`` speaks of token ``t``; a ``TrainBatch``'s entry ``t`` speaks of
label ``t``, which is token ``t + 1`` of the same sequence. The last position of each sequence has
no label and weight 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_spear.data.balance import Plan, plan_micro_batches, up_to
from megatron_spear.errors import DataError
from megatron_spear.types import FloatArray, Origin, TrainSample

EXTRA_COLUMNS = ("regularizer_weight", "ref_logprobs", "kl_selected")
"""Columns of a batch that are 0 everywhere unless ``pack`` is given them."""

_Columns = Mapping[str, Sequence[np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """One micro-batch: S sequences one after another, T tokens in all; or a context-parallel rank's
    T tokens of one (``data.zigzag``), where ``cu_seqlens`` and ``max_seqlen`` are the whole's.

    ``token_ids``, ``labels``, ``position_ids`` int64 ``[T]``; ``cu_seqlens`` int32 ``[S + 1]``;
    ``old_logprobs``, ``advantages``, ``token_weight``, ``regularizer_weight``, ``ref_logprobs``
    float32 ``[T]``; ``origin`` uint8 ``[T]`` (0 on-policy, 1 replay); ``kl_selected`` bool ``[T]``.
    Padding has token 0 and weight 0; it is at a sequence's end, where no other token sees it, or a
    last sequence of its own.

    Example: tokens ``[5, 6, 7]`` with weights ``[0, 0.5, 0.5]`` give labels ``[6, 7, 0]`` and
    token_weight ``[0.5, 0.5, 0]``.
    """

    token_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    token_weight: Tensor
    origin: Tensor
    regularizer_weight: Tensor
    ref_logprobs: Tensor
    kl_selected: Tensor
    max_seqlen: int

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.token_ids.shape[0])

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_seqlen"}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStep:
    """The micro-batches of one optimizer step.

    ``micro_batches[d][m]`` is what data-parallel rank ``d`` runs as its m-th micro-batch; every
    rank has the same number. ``members[d][m]`` are the indices of the samples in it, in packed
    order.
    """

    micro_batches: tuple[tuple[TrainBatch, ...], ...]
    members: Plan
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(self.lengths)

    @property
    def padding_fraction(self) -> float:
        """Share of the packed positions that are padding."""
        total = sum(batch.num_tokens for rank in self.micro_batches for batch in rank)
        return 1.0 - self.num_tokens / total

    def unpack(self, values: Sequence[Sequence[Tensor]]) -> list[FloatArray]:
        """Per-label values back to the samples, un-shifted.

        ``values[d][m]`` is ``[T]``, aligned with the labels of ``micro_batches[d][m]``. Gives one
        float32 ``[L]`` per sample, in the order ``pack`` got them; entry 0 is 0 (token 0 has no
        prediction).
        """
        result: list[FloatArray | None] = [None] * len(self.lengths)
        for rank, rank_values, rank_members in zip(
            self.micro_batches, values, self.members, strict=True
        ):
            for batch, value, members in zip(rank, rank_values, rank_members, strict=True):
                flat = value.detach().to("cpu", torch.float32).numpy()
                starts = batch.cu_seqlens[: len(members)].tolist()
                for index, start in zip(members, starts, strict=True):
                    length = self.lengths[index]
                    sample = np.zeros(length, np.float32)
                    sample[1:] = flat[start : start + length - 1]
                    result[index] = sample
        assert all(sample is not None for sample in result), "every sample is packed once"
        return [sample for sample in result if sample is not None]


def pack(
    samples: Sequence[TrainSample],
    token_weights: Sequence[np.ndarray],
    origins: Sequence[Origin],
    *,
    data_parallel: int = 1,
    tokens_per_microbatch: int,
    pad_multiple: int = 1,
    sequence_multiple: int = 1,
    mix_lengths: bool = False,
    microbatch_multiple: int = 1,
    columns: _Columns | None = None,
    dtype: type[np.floating] = np.float32,
) -> PackedStep:
    """Distribute samples over data-parallel ranks and micro-batches.

    ``token_weights[i]`` float ``[L]`` is the final loss weight of each token of sample ``i``
    (index t speaks of token t; entry 0 must be 0, nothing predicts token 0). Ranks have about equal
    cost, attention included, and micro-batches at most ``tokens_per_microbatch`` tokens unless one
    sample alone is longer (``data.balance``). Each is padded to a multiple of ``pad_multiple``
    (sequence parallelism needs the tensor-parallel size), and before that each sequence to one of
    ``sequence_multiple`` (context parallelism cuts it into that many chunks). Where attention lays
    sequences out to the longest of a micro-batch, those of like length should share one;
    ``mix_lengths`` is for where it does not: it fills micro-batches better and ranks more evenly.
    Every rank gets a multiple of ``microbatch_multiple`` of them (an interleaved pipeline needs its
    number of ranks), some being padding alone if samples are few.

    ``columns[name][i]`` ``[L]`` are further values of each token, ``name`` of ``EXTRA_COLUMNS``;
    those not given are 0. ``dtype`` is that of the batch's floats.

    Raises DataError for no or empty samples and for weights that do not fit.
    """
    _check(samples, token_weights, origins)
    given = _check_columns(samples, columns or {})
    lengths = [len(sample.token_ids) for sample in samples]
    padded = [up_to(length, sequence_multiple) for length in lengths]
    plan = plan_micro_batches(
        padded,
        data_parallel=data_parallel,
        tokens_per_microbatch=tokens_per_microbatch,
        microbatch_multiple=microbatch_multiple,
        mix_lengths=mix_lengths,
    )
    values = {"token_weight": token_weights, **given}
    multiple = math.lcm(pad_multiple, sequence_multiple)
    micro_batches = tuple(
        tuple(_build(samples, values, origins, group, padded, multiple, dtype) for group in rank)
        for rank in plan
    )
    return PackedStep(micro_batches=micro_batches, members=plan, lengths=tuple(lengths))


def _check(
    samples: Sequence[TrainSample], weights: Sequence[np.ndarray], origins: Sequence[Origin]
) -> None:
    if not samples:
        raise DataError("got no samples to pack; expected at least one")
    if not len(samples) == len(weights) == len(origins):
        raise DataError(
            f"got {len(samples)} samples, {len(weights)} token_weights and {len(origins)} origins; "
            "expected one of each per sample"
        )
    for sample, weight in zip(samples, weights, strict=True):
        name = f"sample {sample.trajectory_id} segment {sample.segment}"
        if len(sample.token_ids) == 0:
            raise DataError(f"{name} has no tokens; leave it out")
        if len(weight) != len(sample.token_ids):
            raise DataError(
                f"{name}: got {len(weight)} weights for {len(sample.token_ids)} tokens; "
                "expected one per token"
            )
        if weight[0] != 0:
            raise DataError(
                f"{name}: token 0 has weight {weight[0]}, but nothing predicts it; set it to 0 "
                "before the weights are normalised"
            )


def _check_columns(samples: Sequence[TrainSample], columns: _Columns) -> _Columns:
    """The columns, if each is known and has one value per token."""
    for name, values in columns.items():
        assert name in EXTRA_COLUMNS, f"unknown column {name}"
        got, expected = [len(v) for v in values], [len(s.token_ids) for s in samples]
        if got != expected:
            raise DataError(f"{name}: got {got} values, expected one per token: {expected}")
    return columns


def _build(
    samples: Sequence[TrainSample],
    given: _Columns,
    origins: Sequence[Origin],
    group: tuple[int, ...],
    padded: Sequence[int],
    multiple: int,
    dtype: type[np.floating],
) -> TrainBatch:
    """Concatenate, shift and pad one micro-batch: its sequences to their ``padded`` lengths, their
    sum to a multiple."""
    lengths = [padded[i] for i in group]
    used = sum(lengths)
    total = max(up_to(used, multiple), multiple)
    if total > used:
        lengths.append(total - used)
    columns: dict[str, Any] = {
        "token_ids": np.zeros(total, np.int64),
        "labels": np.zeros(total, np.int64),
        "old_logprobs": np.zeros(total, dtype),
        "advantages": np.zeros(total, dtype),
        "token_weight": np.zeros(total, dtype),
        "origin": np.zeros(total, np.uint8),
        "regularizer_weight": np.zeros(total, dtype),
        "ref_logprobs": np.zeros(total, dtype),
        "kl_selected": np.zeros(total, np.bool_),
    }
    start = 0
    for index in group:
        sample, end = samples[index], start + len(samples[index].token_ids)
        columns["token_ids"][start:end] = sample.token_ids
        columns["origin"][start:end] = origins[index] is Origin.REPLAY
        shifted = {
            "labels": sample.token_ids,
            "old_logprobs": sample.old_logprobs,
            "advantages": sample.advantages,
            **{name: values[index] for name, values in given.items()},
        }
        for name, values in shifted.items():  # a sequence's last position keeps its 0
            columns[name][start : end - 1] = values[1:]
        start += padded[index]
    return TrainBatch(
        **{name: torch.from_numpy(column) for name, column in columns.items()},
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_seqlen=max(lengths),
    )
