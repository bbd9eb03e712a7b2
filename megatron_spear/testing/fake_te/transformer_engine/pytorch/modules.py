"""Linears, norms and the padding of experts' tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import TransformerEngineBaseModule
from .fp8 import FP8GlobalStateManager


class RMSNorm(torch.nn.Module):  # type: ignore[misc]
    """``x / rms(x) * weight``; like TE's, it has an extra state."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        size = normalized_shape if normalized_shape is not None else hidden_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


class LayerNorm(torch.nn.Module):  # type: ignore[misc]
    """A name Megatron asks for; no model here has one."""


class Linear(TransformerEngineBaseModule):
    """``x @ weight.T + bias``, split over ranks by ``parallel_mode``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        column, row = parallel_mode == "column", parallel_mode == "row"
        self.in_features = in_features // (tp_size if row else 1)
        self.out_features = out_features // (tp_size if column else 1)
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias = bias
        self.apply_bias = bias and not return_bias
        dtype = params_dtype or torch.float32
        sizes = (self.out_features, self.in_features)
        self.make_weight("weight", *sizes, dtype, init_method, int(row))
        self.bias = None
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype))
            if column:
                self.bias.tensor_model_parallel = True
                self.bias.partition_dim, self.bias.partition_stride = 0, 1

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        from megatron.core.tensor_parallel import mappings

        self.init_fp8_metadata()
        group = {"group": self.tp_group}
        split = self.parallel_mode if self.tp_size > 1 else None
        if split == "column" and self.sequence_parallel:
            inp = mappings.gather_from_sequence_parallel_region(inp, **group)
        elif split == "column":
            inp = mappings.copy_to_tensor_model_parallel_region(inp, **group)
        out = self.product(inp, self.weight)
        if split == "row" and self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(out, **group)
        elif split == "row":
            out = mappings.reduce_from_tensor_model_parallel_region(out, **group)
        if self.apply_bias:
            return out + self.bias
        return (out, self.bias) if self.use_bias else out


class LayerNormLinear(Linear):
    """``Linear`` of the input's RMSNorm."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        assert normalization == "RMSNorm"
        super().__init__(in_features, out_features, params_dtype=params_dtype, **settings)
        self.eps = eps
        weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_weight = weight

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight = self.layer_norm_weight
        return super().forward(F.rms_norm(inp, weight.shape, weight, self.eps))


class GroupedLinear(TransformerEngineBaseModule):
    """``num_gemms`` linears, each for its share of the rows; whole on each rank."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        tp_size: int = 1,
        init_method: Any = None,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not bias, "the stand-in's experts are whole and have no bias"
        self.num_gemms, self.use_bias = num_gemms, bias
        axis = int(parallel_mode == "row")
        dtype = params_dtype or torch.float32
        for number in range(num_gemms):
            name = f"weight{number}"
            self.make_weight(name, out_features, in_features, dtype, init_method, axis)

    def forward(
        self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        self.init_fp8_metadata(self.num_gemms)
        parts = [
            self.product(rows, getattr(self, f"weight{number}"), str(number))
            for number, rows in enumerate(inp.split(list(m_splits)))
        ]
        return torch.cat(parts)


class Fp8Padding(torch.nn.Module):  # type: ignore[misc]
    """Zero rows after each expert's, up to the multiple that FP8 needs."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        size = self.align_size or (32 if recipe.mxfp8() else 16)
        padded = [-(-count // size) * size for count in m_splits]
        parts = [
            F.pad(rows, (0, 0, 0, more - len(rows)))
            for rows, more in zip(inp.split(list(m_splits)), padded, strict=True)
        ]
        return torch.cat(parts), padded


class Fp8Unpadding(torch.nn.Module):  # type: ignore[misc]
    """``Fp8Padding`` undone."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        size = self.align_size or (32 if recipe.mxfp8() else 16)
        padded = [-(-count // size) * size for count in m_splits]
        parts = zip(inp.split(padded), m_splits, strict=True)
        return torch.cat([rows[:count] for rows, count in parts])
