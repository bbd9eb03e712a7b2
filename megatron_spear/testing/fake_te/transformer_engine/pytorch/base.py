"""What all linears share: weights, FP8 state, the matrix product."""

import math
import pickle
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..common.recipe import Recipe
from .fp8 import FP8GlobalStateManager
from .rounding import rounded, scales_of
from .tensor import QuantizedTensor


class TransformerEngineBaseModule(torch.nn.Module):  # type: ignore[misc]
    """A module with ``fp8``, ``fp8_meta`` and an extra state for checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = False
        self.fp8_calibration = False
        self.save_original_input = False  # Megatron sets it; what is saved is the same here
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.scales: dict[str, Tensor] = {}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Take over the process's FP8 state."""
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        if self.fp8:
            self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()
            self.fp8_meta["num_gemms"] = num_gemms

    def make_weight(
        self, name: str, rows: int, columns: int, dtype: torch.dtype, init_method: Any, axis: int
    ) -> None:
        """A parameter, held in FP8 inside ``fp8_model_init``."""
        values = torch.empty(rows, columns, dtype=dtype)
        if init_method is not None:
            init_method(values)
        if FP8GlobalStateManager.with_fp8_parameters():
            exact = values
            values = QuantizedTensor.of(values.nan_to_num(), FP8GlobalStateManager.get_fp8_recipe())
        parameter = torch.nn.Parameter(values)
        if isinstance(values, QuantizedTensor):
            parameter._high_precision_init_val = exact
            parameter.get_high_precision_init_val = MethodType(_exact, parameter)
            parameter.clear_high_precision_init_val = MethodType(_forget_exact, parameter)
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = axis, 1
        self.register_parameter(name, parameter)

    def product(self, x: Tensor, weight: Tensor, key: str = "") -> Tensor:
        """``x @ weight.T`` of ``[..., in]``, in FP8 if the process's state says so."""
        if not self.fp8:
            return torch.nn.functional.linear(x, weight)
        recipe = self.fp8_meta["recipe"]
        multiple = (32, 32) if recipe.mxfp8() else (8, 16)
        for size in (x.shape, weight.shape):
            if math.prod(size[:-1]) % multiple[0] or size[-1] % multiple[1]:
                raise ValueError(f"FP8 takes no {list(size)}: multiples of {multiple} are needed")
        flat = x.reshape(-1, x.shape[-1])
        out = _Fp8Product.apply(flat, weight, recipe, self, key)
        return out.view(*x.shape[:-1], weight.shape[0])

    def delayed_scale(self, values: Tensor, key: str, recipe: Recipe, largest: float) -> Any:
        """The scale of this tensor's last use (1 at first), to be told of the present values."""
        if not recipe.delayed():
            return None
        scale = self.scales.get(key, torch.ones(()))
        self.scales[key] = scales_of(values.float(), recipe, largest=largest)
        return scale

    def get_extra_state(self) -> Tensor:
        """Bytes that hold recipe and scales; none out of FP8."""
        if not self.fp8:
            return torch.empty(0, dtype=torch.uint8)
        gemms = self.fp8_meta["num_gemms"]
        state = {
            "recipe": self.fp8_meta["recipe"],
            "extra_fp8_variables": {"num_gemms": gemms},
            "scales": self.scales,
            "scale_fwd": torch.ones(3 * gemms),
            "scale_bwd": torch.ones(2 * gemms),
            "amax_history_fwd": torch.zeros(1, 3 * gemms),
            "amax_history_bwd": torch.zeros(1, 2 * gemms),
        }
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """What ``get_extra_state`` gave; None and empty ones are passed over."""
        if state is None or state.numel() == 0:
            return
        loaded = pickle.loads(state.numpy().tobytes())
        self.fp8_meta["recipe"] = loaded["recipe"]
        self.scales = loaded.get("scales", {})


class _Fp8Product(torch.autograd.Function):  # type: ignore[misc]
    """``x @ weight.T`` of rounded values; so are both products of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, owner: Any, key: str
    ) -> Tensor:
        ctx.recipe, ctx.owner, ctx.key, ctx.dtype = recipe, owner, key, x.dtype
        scale = owner.delayed_scale(x, f"input{key}", recipe, 448.0)
        x_rounded = rounded(x, recipe, scale=scale)
        if isinstance(weight, QuantizedTensor):
            w_rounded, for_backward = weight.dequantize(dtype=torch.float32), weight.held["columns"]
        else:
            scale = owner.delayed_scale(weight, f"weight{key}", recipe, 448.0)
            w_rounded = for_backward = rounded(weight, recipe, weight=True, scale=scale)
        ctx.save_for_backward(x_rounded, for_backward)
        return (x_rounded @ w_rounded.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        recipe = ctx.recipe
        scale = ctx.owner.delayed_scale(
            grad, f"grad{ctx.key}", recipe, recipe.fp8_format.value.max_bwd
        )
        grad = rounded(grad, recipe, gradient=True, scale=scale)
        return (grad @ weight).to(ctx.dtype), (grad.t() @ x).to(ctx.dtype), None, None, None


def _exact(parameter: Any) -> Tensor | None:
    return getattr(parameter, "_high_precision_init_val", None)


def _forget_exact(parameter: Any) -> None:
    if hasattr(parameter, "_high_precision_init_val"):
        del parameter._high_precision_init_val
