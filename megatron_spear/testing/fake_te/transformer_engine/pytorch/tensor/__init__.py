"""Tensors held in FP8, which pass for their high-precision dtype."""

from typing import Any

import torch
from torch import Tensor

from ...common.recipe import Recipe
from ..rounding import scales_of, spread

_AS_HELD = torch.float8_e4m3fn


class QuantizedTensor(torch.Tensor):  # type: ignore[misc]
    """``[rows, columns]`` of float8 with scales, seen by torch as a ``dtype`` tensor.

    The backward pass multiplies with a copy of its own (TE's lies column by column), which
    rounding renews, and ``renew_columns`` after the data was changed otherwise. ``copy_`` into it
    rounds; every other operation works on plain values. Aliases (``detach``, ``data``) share what
    is held.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls: Any, shape: Any, dtype: torch.dtype, recipe: Recipe, held: dict[str, Tensor]
    ) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        made.recipe, made.held = recipe, held
        return made

    @classmethod
    def of(cls, values: Tensor, recipe: Recipe) -> "QuantizedTensor":
        """``values`` rounded."""
        held = {"data": torch.empty(values.shape, dtype=torch.uint8)}
        made: QuantizedTensor = cls(values.shape, values.dtype, recipe, held)
        made.round_(values)
        return made

    def round_(self, values: Tensor) -> None:
        """Hold these values."""
        amax_scales = scales_of(values.float(), self.recipe, weight=True)
        self.write_(values, amax_scales)
        self.renew_columns()

    def renew_columns(self) -> None:
        """Make the backward pass's copy from the data."""
        self.held["columns"] = self.dequantize(dtype=torch.float32)

    def write_(self, values: Tensor, scales: Tensor) -> None:
        """Hold these values with these scales (a value is held as value x scale)."""
        scaled = values.float() * spread(scales, values.shape, self.recipe, weight=True)
        self.held["data"].copy_(scaled.to(_AS_HELD).view(torch.uint8))
        self.held["scales"] = scales

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor."""
        scales = spread(self.held["scales"], self.shape, self.recipe, weight=True)
        values = self.held["data"].view(_AS_HELD).float() / scales
        return values.to(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"QuantizedTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (one,) = args
            return cls(one.shape, one.dtype, one.recipe, one.held)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].round_(_plain(args[1]))
            return args[0]
        kwargs = {name: _plain(value) for name, value in (kwargs or {}).items()}
        return func(*(_plain(value) for value in args), **kwargs)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value.dequantize() if isinstance(value, QuantizedTensor) else value
