"""What the policy sends, held against what a server holds, before anything is sent.

SGLang answers 200 to names it does not know and leaves the parameters as they were, and dies of a
tensor of the wrong shape. So names are compared before a server's first update, and each tensor
with the weight table before it leaves.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import Shape
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.receivers.places import OF_THE_ENGINE, engine_name

Precision = Literal["model", "fp8"]
"""``model``: weights as the policy exports them; ``fp8``: linear layers in blocks of 128 x 128
(``conversion.fp8_blocks``), with their scales as ``NAME_scale_inv``."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The tensors of an update: ``shapes`` of those exported, by Hugging Face name in their order,
    and which of them are ``quantized`` on the way."""

    shapes: Mapping[str, Shape]
    quantized: frozenset[str] = frozenset()

    @classmethod
    def of_model(cls, model: ModelShape, precision: Precision) -> "Manifest":
        """What a policy of this shape exports."""
        items = [item for item in weight_table(model) if not item.tied]
        return cls(
            shapes={
                name: shape
                for item in items
                for name, shape in zip(item.sources, item.shapes, strict=True)
            },
            quantized=frozenset(
                name
                for item in items
                if precision == "fp8" and fp8_blocks.is_quantized(item)
                for name in item.sources
            ),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that are sent, scales included."""
        scaled = (name for name in self.shapes if name in self.quantized)
        return (*self.shapes, *(name + fp8_blocks.SCALE for name in scaled))

    def problem(self, held: Iterable[str] | None) -> str | None:
        """Why a server that holds parameters of these names cannot be updated, or None.

        ``held`` may have the engines' fused names or Hugging Face's own; None says nothing. Scales
        are compared only where some are among ``held``: SGLang names its weights without them.
        """
        if held is None:
            return None
        held = frozenset(held)
        scales = any(name.endswith(fp8_blocks.SCALE) for name in held)
        unknown = [
            name
            for name in self.names
            if (scales or not name.endswith(fp8_blocks.SCALE))
            and not held.intersection((name, engine_name(name)))
        ]
        sent = {*self.names, *map(engine_name, self.names)}
        missing = sorted(n for n in held - sent if not OF_THE_ENGINE.search(n))
        if not unknown and not missing:
            return None
        told = "the server does not hold what the policy exports: "
        if unknown:
            told += f"it has no parameter for {_some(unknown)}; "
        if missing:
            told += f"nothing is sent for {_some(missing)}; "
        return told + _what_to_do(unknown, missing)

    def tensors(
        self, export: Iterable[tuple[str, torch.Tensor | None]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors to send, quantized where the manifest says so.

        Raises EngineError for a tensor that is unknown, doubled, missing, of another shape or of a
        dtype engines do not take.
        """
        open_names = dict.fromkeys(self.shapes)
        for name, tensor in export:
            assert tensor is not None, "the controller has all tensors"
            self._check(name, tensor, name in open_names)
            del open_names[name]
            if name not in self.quantized:
                yield name, tensor
                continue
            values, scales = fp8_blocks.quantize(tensor)
            yield name, values
            yield name + fp8_blocks.SCALE, scales
        if open_names:
            raise EngineError(f"the policy did not export {_some(list(open_names))}")

    def _check(self, name: str, tensor: torch.Tensor, is_open: bool) -> None:
        problem = None
        if name not in self.shapes:
            problem = "which its model does not have"
        elif not is_open:
            problem = "twice"
        elif tuple(tensor.shape) != tuple(self.shapes[name]):
            problem = f"of shape {tuple(tensor.shape)}; expected {tuple(self.shapes[name])}"
        elif tensor.dtype not in _DTYPES:
            problem = f"in {tensor.dtype}; expected one of {', '.join(map(str, _DTYPES))}"
        if problem is not None:
            raise EngineError(f"the policy exported {name} {problem}")


def _what_to_do(unknown: list[str], missing: list[str]) -> str:
    if any(name.endswith(fp8_blocks.SCALE) for name in missing):
        return "the server runs in FP8: set weight_sync.precision=fp8"
    if unknown and all(name.endswith(fp8_blocks.SCALE) for name in unknown):
        return "the server does not run in FP8: set weight_sync.precision=model, or start it so"
    return "start it with the model that is trained"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
