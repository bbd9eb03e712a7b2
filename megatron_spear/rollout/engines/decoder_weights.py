"""The weights of a decoder in the layout that decodes fast, addressed by Hugging Face names.

Query, key and value projections lie in one matrix, gate and up projections in another. Each Hugging
Face parameter is a view into these, so a weight update is one copy and nothing is held twice. The
experts of a layer are stacked and a vocabulary is padded with zero rows, as in SGLang and vLLM.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from megatron_spear.conversion.mapping import ENGINE_VOCAB_MULTIPLE
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import padded_vocab
from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.linear import Linear

LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(slots=True)
class LayerWeights:
    """One layer. H = hidden, Q/K = query/key-value heads, D = head size, F = inner width.

    ``qkv`` maps H to (Q + 2K) * D, ``output`` Q * D to H; each pair of ``mlps`` maps H to 2F (gate
    and up) and F to H (down). There is one pair, or one an expert with ``router`` ``[experts, H]``.
    ``stacked`` are these as ``[pairs, 2F, H]`` and ``[pairs, H, F]``. ``qk_scale`` ``[Q + K, D]``
    repeats the query and key norms over the heads.
    """

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    mlps: list[tuple[Linear, Linear]]
    stacked: tuple[torch.Tensor, torch.Tensor]
    router: torch.Tensor | None = None
    qk_scale: torch.Tensor | None = None


class DecoderWeights:
    """All weights of a decoder; ``views`` maps each Hugging Face name to the part that holds it."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.views: dict[str, torch.Tensor] = {}
        self._wholes: list[torch.Tensor] = []
        self._seen: set[str] = set()
        self._tied_head: torch.Tensor | None = None
        self.vocab_rows: dict[str, torch.Tensor] = {}
        """Embedding and output layer with their padding, by Hugging Face name."""
        self.embedding = self._new_vocab(EMBEDDING)
        self.layers = [self._new_layer(f"model.layers.{i}.") for i in range(shape.num_layers)]
        self.final_norm = self._new("model.norm.weight", shape.hidden_size)
        self.head = Linear(self.embedding if shape.tied else self._new_vocab(LM_HEAD))

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy a full set of weights in place: ``begin``, ``put`` of each, ``finish``."""
        self.begin()
        for name, tensor in named_tensors:
            self.put(name, tensor)
        self.finish()

    def begin(self) -> None:
        """Expect a full set of weights anew; what was put before no longer counts."""
        self._seen.clear()
        self._tied_head = None

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise EngineError for a name or shape that ``put`` would refuse."""
        if name == LM_HEAD and self.shape.tied:
            expected = self.embedding.shape
        elif name in self.views:
            expected = self.views[name].shape
        else:
            raise EngineError(
                f"the weights hold {name}, which this model does not have; "
                f"expected Hugging Face names such as {next(iter(self.views))}"
            )
        if tuple(shape) != tuple(expected):
            raise EngineError(
                f"the weights hold {name} of shape {tuple(shape)}; expected {tuple(expected)}"
            )

    def require_all(self, names: Collection[str]) -> None:
        """Raise EngineError if a parameter is not among the names."""
        missing = [name for name in self.views if name not in names]
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise EngineError(
                f"the weights lack {len(missing)} of {len(self.views)} parameters: {shown}; "
                "send the full set"
            )

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one parameter in place; every parameter once.

        Raises EngineError naming what is unknown, doubled or of the wrong shape. A tied
        ``lm_head.weight`` may come along; it must equal the embedding.
        """
        if name in self._seen:
            raise EngineError(f"the weights hold {name} twice; send every parameter once")
        self.check(name, tensor.shape)
        self._seen.add(name)
        if name in self.views:
            self.views[name].copy_(tensor.detach())
        else:
            self._tied_head = tensor.detach().to(self.dtype, copy=True)

    def count_all(self) -> None:
        """Take every parameter for put: they were written to in place."""
        self._seen.update(self.views)

    def finish(self) -> None:
        """Make the weights put since ``begin`` the ones that are computed with.

        Raises EngineError naming what is missing; they are then a mixture and must not be used.
        """
        self.require_all(self._seen)
        tied_head, self._tied_head = self._tied_head, None
        if tied_head is not None and not torch.equal(tied_head, self.embedding):
            raise EngineError(
                f"the weights hold a {LM_HEAD} that differs from {EMBEDDING}, but the model ties "
                "them; leave it out or send the same values"
            )
        self._refresh()

    def free(self) -> None:
        """Give the memory back; every view stays, and must not be used before ``restore``."""
        for linear in self._linears():
            linear.unpack()
        for whole in self._wholes:
            whole.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Memory again, all zeros: a full set of weights has to follow."""
        for whole in self._wholes:
            whole.untyped_storage().resize_(whole.numel() * whole.itemsize)
            whole.zero_()

    def _linears(self) -> Iterable[Linear]:
        yield self.head
        for layer in self.layers:
            yield from (layer.qkv, layer.output, *chain.from_iterable(layer.mlps))

    def _refresh(self) -> None:
        """Remake what is derived: packed matrices, and the norms repeated over the heads."""
        for linear in self._linears():
            linear.pack()
        for i, layer in enumerate(self.layers):
            if self.shape.qk_norm:
                query = self.views[f"model.layers.{i}.self_attn.q_norm.weight"]
                key = self.views[f"model.layers.{i}.self_attn.k_norm.weight"]
                rows = [query] * self.shape.num_heads + [key] * self.shape.num_groups
                layer.qk_scale = torch.stack(rows)

    def _zeros(self, *size: int) -> torch.Tensor:
        whole = torch.zeros(*size, dtype=self.dtype)
        self._wholes.append(whole)
        return whole

    def _new(self, name: str, *size: int) -> torch.Tensor:
        self.views[name] = self._zeros(*size)
        return self.views[name]

    def _new_vocab(self, name: str) -> torch.Tensor:
        """``[V, H]`` at the head of the padded rows."""
        size = self.shape.vocab_size
        rows = self._zeros(padded_vocab(size, ENGINE_VOCAB_MULTIPLE), self.shape.hidden_size)
        self.vocab_rows[name] = rows
        self.views[name] = rows[:size]
        return self.views[name]

    def _new_layer(self, prefix: str) -> LayerWeights:
        s = self.shape
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        if s.qk_norm:
            self._new(f"{attention}q_norm.weight", s.head_dim)
            self._new(f"{attention}k_norm.weight", s.head_dim)
        count = s.num_experts or 1
        gate_up = self._zeros(count, 2 * s.ffn_size, s.hidden_size)
        down = self._zeros(count, s.hidden_size, s.ffn_size)
        owners = [f"{mlp}experts.{i}." for i in range(s.num_experts)] or [mlp]
        return LayerWeights(
            input_norm=self._new(f"{prefix}input_layernorm.weight", s.hidden_size),
            qkv=self._qkv(attention),
            output=self._linear(
                (f"{attention}o_proj.weight",), self._zeros(s.hidden_size, s.num_heads * s.head_dim)
            ),
            mlp_norm=self._new(f"{prefix}post_attention_layernorm.weight", s.hidden_size),
            mlps=[self._mlp(*each) for each in zip(owners, gate_up, down, strict=True)],
            router=self._new(f"{mlp}gate.weight", s.num_experts, s.hidden_size)
            if s.num_experts
            else None,
            stacked=(gate_up, down),
        )

    def _mlp(self, prefix: str, gate_up: torch.Tensor, down: torch.Tensor) -> tuple[Linear, Linear]:
        names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
        return (
            self._linear(names, gate_up),
            self._linear((f"{prefix}down_proj.weight",), down),
        )

    def _qkv(self, prefix: str) -> Linear:
        s = self.shape
        sizes = [n * s.head_dim for n in (s.num_heads, s.num_groups, s.num_groups)]
        weight = self._zeros(sum(sizes), s.hidden_size)
        bias = self._zeros(sum(sizes)) if s.qkv_bias else None
        for whole, kind in ((weight, "weight"), (bias, "bias")):
            if whole is not None:
                names = [f"{prefix}{x}_proj.{kind}" for x in "qkv"]
                self.views.update(zip(names, whole.split(sizes), strict=True))
        return Linear(weight, bias)

    def _linear(self, names: Sequence[str], weight: torch.Tensor) -> Linear:
        """A product whose weight's rows, in equal parts, carry the given names."""
        self.views.update(zip(names, weight.chunk(len(names)), strict=True))
        return Linear(weight)
