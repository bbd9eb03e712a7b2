"""What SGLang's and vLLM's loaders keep of a model on each tensor-parallel rank, by their names.

Cuts whole Hugging Face tensors, so that whatever arrives slice by slice can be compared with it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.fp8_blocks import SCALE, is_quantized, quantize
from megatron_spear.conversion.shape import ModelShape


def engine_parameters(
    weights: Mapping[str, Tensor],
    shape: ModelShape,
    *,
    rank: int,
    size: int,
    expert_groups: int = 1,
    fp8: bool = False,
) -> dict[str, Tensor]:
    """The parameters of rank ``rank`` of ``size``; vocabulary padding is zero.

    With ``fp8`` whole tensors are quantized before they are cut.
    """
    stored = dict(_stored(weights, shape) if fp8 else weights)
    found: dict[str, Tensor] = {}
    for name, weight in stored.items():
        part = _part(name, weight, shape, rank, size, expert_groups)
        if part is not None:
            found[name] = part
    return _fused(found)


def _stored(weights: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    quantized = {n for item in weight_table(shape) if is_quantized(item) for n in item.sources}
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in quantized:
            stored[name], stored[name + SCALE] = quantize(weight)
        else:
            stored[name] = weight
    return stored


def _part(
    name: str, weight: Tensor, shape: ModelShape, rank: int, size: int, expert_groups: int
) -> Tensor | None:
    if ".experts." in name:
        inner = size // expert_groups
        expert = int(name.split(".experts.")[1].split(".")[0])
        if expert // (shape.num_experts // expert_groups) != rank // inner:
            return None
        return weight.chunk(inner, 1 if "down_proj" in name else 0)[rank % inner]
    if "embed_tokens" in name or "lm_head" in name:
        padded = -(-len(weight) // 64) * 64
        if padded % size:
            padded = -(-len(weight) // (64 * size)) * 64 * size
        rows = padded // size
        own = weight[rank * rows : (rank + 1) * rows]
        return torch.cat((own, own.new_zeros(rows - len(own), *own.shape[1:])))
    if "norm" in name or ".gate." in name:
        return weight
    if "k_proj" in name or "v_proj" in name:
        ways = min(size, shape.num_groups)
        return weight.chunk(ways, 0)[rank * ways // size]
    return weight.chunk(size, 1 if "o_proj" in name or "down_proj" in name else 0)[rank]


def _fused(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections and experts put together."""
    fused: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, part in found.items():
        owner, _, last = name.rpartition("q_proj.")
        if owner and ".experts." not in name:
            others = [found[f"{owner}{other}_proj.{last}"] for other in "kv"]
            fused[f"{owner}qkv_proj.{last}"] = torch.cat([part, *others])
        elif match := re.match(r"(.*\.experts\.)\d+\.gate_proj\.(.*)", name):
            both = torch.cat([part, found[name.replace("gate_proj", "up_proj")]])
            experts.setdefault(f"{match[1]}w13_{match[2]}", []).append(both)
        elif match := re.match(r"(.*\.experts\.)\d+\.down_proj\.(.*)", name):
            experts.setdefault(f"{match[1]}w2_{match[2]}", []).append(part)
        elif "gate_proj" in name:
            both = torch.cat([part, found[name.replace("gate_proj", "up_proj")]])
            fused[name.replace("gate_proj", "gate_up_proj")] = both
        elif not re.search(r"(k|v|up)_proj\.", name):
            fused[name] = part
    return fused | {name: torch.stack(parts) for name, parts in experts.items()}
