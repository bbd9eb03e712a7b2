"""The weights of a decoder in the layout that decodes fast, addressed by Hugging Face names.

Query, key and value projections lie in one matrix, gate and up projections in another. Each Hugging
Face parameter is a view into these, so a weight update is one copy and nothing is held twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.linear import Linear

LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(slots=True)
class LayerWeights:
    """One layer. H = hidden, Q/K = query/key-value heads, D = head size, F = inner width.

    ``qkv`` maps H to (Q + 2K) * D, ``output`` Q * D to H; each pair of ``mlps`` maps H to 2F (gate
    and up) and F to H (down). There is one pair, or one an expert with ``router`` ``[experts, H]``.
    ``qk_scale`` ``[Q + K, D]`` repeats the query and key norms over the heads.
    """

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    mlps: list[tuple[Linear, Linear]]
    router: torch.Tensor | None = None
    qk_scale: torch.Tensor | None = None


class DecoderWeights:
    """All weights of a decoder; ``views`` maps each Hugging Face name to the part that holds it."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.views: dict[str, torch.Tensor] = {}
        self.embedding = self._new(EMBEDDING, shape.vocab_size, shape.hidden_size)
        self.layers = [self._new_layer(f"model.layers.{i}.") for i in range(shape.num_layers)]
        self.final_norm = self._new("model.norm.weight", shape.hidden_size)
        head = None if shape.tied else self._new(LM_HEAD, shape.vocab_size, shape.hidden_size)
        self.head = Linear(self.embedding if head is None else head)

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy a full set of weights in place; every parameter once.

        Raises EngineError naming what is unknown, doubled, missing or of the wrong shape; they are
        then a mixture and must not be used. A tied ``lm_head.weight`` may come along; it must
        equal the embedding.
        """
        seen: set[str] = set()
        tied_head: torch.Tensor | None = None
        for name, tensor in named_tensors:
            if name in seen:
                raise EngineError(f"the weights hold {name} twice; send every parameter once")
            seen.add(name)
            if name == LM_HEAD and self.shape.tied:
                self._check_shape(name, tensor, self.embedding)
                tied_head = tensor
            elif name in self.views:
                self._check_shape(name, tensor, self.views[name])
                self.views[name].copy_(tensor.detach())
            else:
                raise EngineError(
                    f"the weights hold {name}, which this model does not have; "
                    f"expected Hugging Face names such as {next(iter(self.views))}"
                )
        missing = [name for name in self.views if name not in seen]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise EngineError(
                f"the weights lack {len(missing)} of {len(self.views)} parameters: {shown}; "
                "send the full set"
            )
        if tied_head is not None and not torch.equal(tied_head.to(self.dtype), self.embedding):
            raise EngineError(
                f"the weights hold a {LM_HEAD} that differs from {EMBEDDING}, but the model ties "
                "them; leave it out or send the same values"
            )
        self._refresh()

    def _refresh(self) -> None:
        """Remake what is derived: packed matrices, and the norms repeated over the heads."""
        self.head.pack()
        for i, layer in enumerate(self.layers):
            for linear in (layer.qkv, layer.output, *chain.from_iterable(layer.mlps)):
                linear.pack()
            if self.shape.qk_norm:
                query = self.views[f"model.layers.{i}.self_attn.q_norm.weight"]
                key = self.views[f"model.layers.{i}.self_attn.k_norm.weight"]
                rows = [query] * self.shape.num_heads + [key] * self.shape.num_groups
                layer.qk_scale = torch.stack(rows)

    @staticmethod
    def _check_shape(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        if got.shape != expected.shape:
            raise EngineError(
                f"the weights hold {name} of shape {tuple(got.shape)}; "
                f"expected {tuple(expected.shape)}"
            )

    def _new(self, name: str, *size: int) -> torch.Tensor:
        self.views[name] = torch.zeros(*size, dtype=self.dtype)
        return self.views[name]

    def _fused(self, names: list[str], sizes: list[int], *rest: int) -> torch.Tensor:
        """One tensor ``[sum(sizes), *rest]`` whose parts carry the given names."""
        whole = torch.zeros(sum(sizes), *rest, dtype=self.dtype)
        self.views.update(zip(names, whole.split(sizes), strict=True))
        return whole

    def _new_layer(self, prefix: str) -> LayerWeights:
        s = self.shape
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        sizes = [n * s.head_dim for n in (s.num_heads, s.num_groups, s.num_groups)]
        if s.qk_norm:
            self._new(f"{attention}q_norm.weight", s.head_dim)
            self._new(f"{attention}k_norm.weight", s.head_dim)
        return LayerWeights(
            input_norm=self._new(f"{prefix}input_layernorm.weight", s.hidden_size),
            qkv=self._linear(
                [f"{attention}{x}_proj" for x in "qkv"], sizes, s.hidden_size, s.qkv_bias
            ),
            output=self._linear([f"{attention}o_proj"], [s.hidden_size], sizes[0]),
            mlp_norm=self._new(f"{prefix}post_attention_layernorm.weight", s.hidden_size),
            mlps=[self._new_mlp(f"{mlp}experts.{i}.") for i in range(s.num_experts)]
            or [self._new_mlp(mlp)],
            router=self._new(f"{mlp}gate.weight", s.num_experts, s.hidden_size)
            if s.num_experts
            else None,
        )

    def _new_mlp(self, prefix: str) -> tuple[Linear, Linear]:
        s = self.shape
        names = [f"{prefix}gate_proj", f"{prefix}up_proj"]
        return (
            self._linear(names, [s.ffn_size] * 2, s.hidden_size),
            self._linear([f"{prefix}down_proj"], [s.hidden_size], s.ffn_size),
        )

    def _linear(
        self, names: list[str], sizes: list[int], inputs: int, bias: bool = False
    ) -> Linear:
        """One product whose parts (rows of the weight, of the bias) carry the given names."""
        weight = self._fused([f"{name}.weight" for name in names], sizes, inputs)
        return Linear(
            weight, self._fused([f"{name}.bias" for name in names], sizes) if bias else None
        )
