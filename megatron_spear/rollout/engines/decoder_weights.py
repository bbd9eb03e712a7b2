"""The weights of a decoder in the layout that decodes fast, addressed by Hugging Face names.

Query, key and value projections lie in one matrix, gate and up projections in another. Each Hugging
Face parameter is a view into these, so a weight update is one copy and nothing is held twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.rollout.engines.linear import Linear

SUPPORTED = ("qwen3", "qwen2", "llama")
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Sizes and switches of a decoder-only transformer of the Llama kind."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: Any) -> "DecoderShape":
        """Read a Hugging Face config; raises ConfigError where the decoder has no path for it."""
        kind = config.model_type
        if kind not in SUPPORTED:
            raise ConfigError(
                f"the embedded engine has no decoder for model_type={kind!r}; "
                f"supported: {', '.join(SUPPORTED)}; use another rollout engine for this model"
            )
        if config.hidden_act not in ("silu", "swish"):
            raise ConfigError(
                f"the embedded engine needs hidden_act='silu', got {config.hidden_act!r}"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ConfigError(
                "the embedded engine has no sliding-window attention; got layer_types with "
                "'sliding_attention'; set use_sliding_window=false or use another engine"
            )
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            ffn_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qk_norm=kind == "qwen3",
            qkv_bias=bias or kind == "qwen2",
            output_bias=bias and kind != "qwen2",
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
        )


@dataclass(slots=True)
class LayerWeights:
    """One layer. H = hidden, Q/K = query/key-value heads, D = head size, F = inner width.

    ``qkv`` maps H to (Q + 2K) * D, ``output`` Q * D to H, ``gate_up`` H to 2F, ``down`` F to H;
    ``qk_scale`` ``[Q + K, D]`` repeats the query and key norms over the heads.
    """

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    qk_scale: torch.Tensor | None = None


class DecoderWeights:
    """All weights of a decoder; ``views`` maps each Hugging Face name to the part that holds it."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
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
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                linear.pack()
            if self.shape.qk_norm:
                query = self.views[f"model.layers.{i}.self_attn.q_norm.weight"]
                key = self.views[f"model.layers.{i}.self_attn.k_norm.weight"]
                rows = [query] * self.shape.num_heads + [key] * self.shape.num_kv_heads
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
        sizes = [n * s.head_dim for n in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
        if s.qk_norm:
            self._new(f"{attention}q_norm.weight", s.head_dim)
            self._new(f"{attention}k_norm.weight", s.head_dim)
        return LayerWeights(
            input_norm=self._new(f"{prefix}input_layernorm.weight", s.hidden_size),
            qkv=self._linear(
                [f"{attention}{x}_proj" for x in "qkv"], sizes, s.hidden_size, s.qkv_bias
            ),
            output=self._linear([f"{attention}o_proj"], [s.hidden_size], sizes[0], s.output_bias),
            mlp_norm=self._new(f"{prefix}post_attention_layernorm.weight", s.hidden_size),
            gate_up=self._linear(
                [f"{mlp}gate_proj", f"{mlp}up_proj"],
                [s.ffn_size] * 2,
                s.hidden_size,
                s.mlp_bias,
            ),
            down=self._linear([f"{mlp}down_proj"], [s.hidden_size], s.ffn_size, s.mlp_bias),
        )

    def _linear(self, names: list[str], sizes: list[int], inputs: int, bias: bool) -> Linear:
        """One product whose parts (rows of the weight, of the bias) carry the given names."""
        weight = self._fused([f"{name}.weight" for name in names], sizes, inputs)
        return Linear(
            weight, self._fused([f"{name}.bias" for name in names], sizes) if bias else None
        )
