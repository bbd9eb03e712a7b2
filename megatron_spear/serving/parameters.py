"""The embedded engine's weights under the names and in the shapes that SGLang holds them in.

Query, key and value are one ``qkv_proj``, gate and up one ``gate_up_proj``, a layer's experts
``w13_weight`` and ``w2_weight``; vocabularies are padded to a multiple of 64. The decoder keeps its
weights in this very layout, so that each parameter here is the memory it computes with.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.decoder_weights import DecoderWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    """``tensor``, whose rows are those of the Hugging Face tensors ``parts`` one after the other
    (and padding)."""

    tensor: torch.Tensor
    parts: tuple[str, ...]


class FusedParameters:
    """What a custom weight loader gets as ``model``: ``named_parameters``, and ``put`` for one."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._parameters = dict(_parameters(weights))

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, the memory computed with), as ``torch.nn.Module`` gives them."""
        for name, parameter in self._parameters.items():
            yield name, parameter.tensor

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a whole parameter in place; EngineError as ``DecoderWeights.put``."""
        parameter = self._parameters.get(name)
        if parameter is None:
            raise EngineError(
                f"the weights hold {name}, which is no parameter of this server; expected names "
                f"such as {next(iter(self._parameters))} (/weights_checker lists them)"
            )
        if tensor.shape != parameter.tensor.shape:
            raise EngineError(
                f"the weights hold {name} of shape {tuple(tensor.shape)}; "
                f"expected {tuple(parameter.tensor.shape)}"
            )
        rows = tensor.flatten(0, 1) if tensor.dim() == 3 else tensor
        sizes = [len(self._weights.views[part]) for part in parameter.parts]
        for part, piece in zip(parameter.parts, rows[: sum(sizes)].split(sizes), strict=True):
            self._weights.put(part, piece)

    def checksums(self) -> Mapping[str, str]:
        """SHA-256 of each parameter's bytes, in hexadecimal."""
        return {name: _hash(tensor) for name, tensor in self.named_parameters()}


def _hash(tensor: torch.Tensor) -> str:
    # Of a copy: a storage that numpy has seen can never be given back.
    values = tensor.detach().contiguous().clone().view(torch.uint8).numpy()
    return hashlib.sha256(values.data).hexdigest()


def _parameters(weights: DecoderWeights) -> Iterator[tuple[str, _Parameter]]:
    """In SGLang's order: embedding, layers, norm, output layer."""
    vocab = {
        name: _Parameter(tensor=rows, parts=(name,)) for name, rows in weights.vocab_rows.items()
    }
    embedding, *head = vocab.items()
    yield embedding
    for number in range(weights.shape.num_layers):
        yield from _layer(weights, number)
    yield "model.norm.weight", _Parameter(tensor=weights.final_norm, parts=("model.norm.weight",))
    yield from head


def _layer(weights: DecoderWeights, number: int) -> Iterator[tuple[str, _Parameter]]:
    prefix, layer, shape = f"model.layers.{number}.", weights.layers[number], weights.shape

    def fused(name: str, tensor: torch.Tensor, *parts: str) -> tuple[str, _Parameter]:
        whole = tuple(f"{prefix}{part}" for part in parts or (name,))
        return f"{prefix}{name}", _Parameter(tensor=tensor, parts=whole)

    yield fused("input_layernorm.weight", layer.input_norm)
    for kind, tensor in (("weight", layer.qkv.weight), ("bias", layer.qkv.bias)):
        if tensor is not None:
            parts = [f"self_attn.{part}_proj.{kind}" for part in "qkv"]
            yield fused(f"self_attn.qkv_proj.{kind}", tensor, *parts)
    yield fused("self_attn.o_proj.weight", layer.output.weight)
    if shape.qk_norm:
        for part in "qk":
            name = f"self_attn.{part}_norm.weight"
            yield fused(name, weights.views[prefix + name])
    yield fused("post_attention_layernorm.weight", layer.mlp_norm)
    gate_up, down = layer.stacked
    if layer.router is None:
        parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        yield fused("mlp.gate_up_proj.weight", gate_up[0], *parts)
        yield fused("mlp.down_proj.weight", down[0])
        return
    yield fused("mlp.gate.weight", layer.router)
    experts = [f"mlp.experts.{number}." for number in range(shape.num_experts)]
    inner = [f"{expert}{part}_proj.weight" for expert in experts for part in ("gate", "up")]
    yield fused("mlp.experts.w13_weight", gate_up, *inner)
    yield fused("mlp.experts.w2_weight", down, *(f"{expert}down_proj.weight" for expert in experts))
