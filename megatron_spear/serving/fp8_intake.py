"""Weights in FP8 blocks, as a quantised SGLang takes them: e4m3 values and their scales."""

from collections.abc import Callable

import torch

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.fp8_blocks import (
    SCALE,
    dequantize,
    is_quantized,
    quantize,
    scale_shape,
)
from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.decoder_weights import DecoderWeights

Put = Callable[[str, torch.Tensor], None]


class Fp8Intake:
    """Takes a full set of weights in FP8 in any order and puts what it stands for.

    The decoder computes in its own precision with the values that e4m3 and scale stand for. Where
    a value or a scale comes first, it is kept until the other has come.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._quantized = {
            source
            for item in weight_table(weights.shape)
            if is_quantized(item)
            for source in item.sources
        }
        self._waiting: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Expect a full set anew."""
        self._waiting.clear()

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; EngineError as ``DecoderWeights.put``, and for a weight of another
        dtype than the quantised server holds."""
        weight = name.removesuffix(SCALE)
        if weight not in self._quantized:
            self._weights.put(name, tensor)
            return
        is_scale = weight != name
        expected = torch.float32 if is_scale else torch.float8_e4m3fn
        if tensor.dtype != expected:
            raise EngineError(
                f"the weights hold {name} as {tensor.dtype}; this server is quantised (fp8) and "
                f"expects {expected}"
            )
        shape = tuple(self._weights.views[weight].shape)
        if is_scale and tuple(tensor.shape) != scale_shape(shape):
            raise EngineError(
                f"the weights hold {name} of shape {tuple(tensor.shape)}; "
                f"expected {scale_shape(shape)}"
            )
        if not is_scale:
            self._weights.check(name, tensor.shape)
        other = self._waiting.pop(weight if is_scale else weight + SCALE, None)
        if other is None:
            if name in self._waiting:
                raise EngineError(f"the weights hold {name} twice; send every parameter once")
            self._waiting[name] = tensor.detach().clone()
            return
        values, scales = (other, tensor) if is_scale else (tensor, other)
        self._weights.put(weight, dequantize(values, scales, self._weights.dtype))

    def put_rounded(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor in full precision, rounded to FP8 where the server is quantised."""
        if name in self._quantized:
            tensor = dequantize(*quantize(tensor), self._weights.dtype)
        self._weights.put(name, tensor)

    def finish(self) -> None:
        """EngineError where a value or a scale is left over."""
        if self._waiting:
            lone = sorted(self._waiting)
            shown = ", ".join(lone[:5]) + (", ..." if len(lone) > 5 else "")
            self._waiting.clear()
            raise EngineError(
                f"the weights hold {shown} without the other half: a weight in FP8 is NAME.weight "
                f"(e4m3) and NAME.weight{SCALE}"
            )
