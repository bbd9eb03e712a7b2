"""Where slices of Hugging Face tensors lie in an engine's parameters: SGLang's and vLLM's fusions.

    qkv_proj      rows of q, of k, of v            (weights, biases, FP8 scales alike)
    gate_up_proj  rows of gate, of up
    experts       w13 [experts here, gate and up rows, H], w2 [experts here, H, columns]
    embeddings    rows of the vocabulary, then padding
    all others    by their own name

The trainer says which part of each tensor a rank holds, so nothing here knows tensor parallelism.
Imported in the engines' environments: standard library, torch and light modules of this package.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spear.weight_sync.sharded.records import HeldTensor

FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""The parameter that a projection is part of, and its place there."""
EXPERTS = {"gate_proj": ("w13_", 0), "up_proj": ("w13_", 1), "down_proj": ("w2_", 0)}
"""The same of an expert's."""
_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<number>\d+)\.(?P<part>\w+)\.(?P<kind>\w+)$")
_EXPERT_MODULES = ("", "routed_experts.")
"""Where the experts' parameters are below ``experts``: SGLang's, vLLM's."""
OF_THE_ENGINE = re.compile(r"rotary_emb\.|\.(?:[qkv]|prob|input)_scale$|\.w(?:13|2)_input_scale$")
"""Names of an engine's own, which no trainer sends: caches, and scales that it chooses."""
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_MAX_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A tensor's place in a parameter: which of its parts, and of which expert."""

    parameter: str
    order: int
    expert: int | None = None


def locate(
    tensors: Sequence[HeldTensor],
    parameters: Mapping[str, Tensor],
    up_first: Callable[[str], bool] = lambda parameter: False,
) -> list[Tensor]:
    """For each tensor a view, of its held shape, of the parameter it belongs to.

    Together they are every parameter exactly, but for vocabulary padding and what is the engine's
    own (``OF_THE_ENGINE``), which stays as it is. ``up_first`` says of an
    expert parameter whether the engine keeps up before gate. Raises ValueError with all that does
    not fit, in which case nothing may be received.
    """
    parts = [_part_of(held.name, parameters) for held in tensors]
    members: dict[str, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        members[part.parameter].append(number)
    problems = [
        f"{name} is a parameter of the engine that the trainer does not send"
        for name in parameters
        if name not in members and not OF_THE_ENGINE.search(name)
    ]
    views: list[Tensor] = [torch.empty(0)] * len(tensors)
    for name, numbers in members.items():
        if name not in parameters:
            problems += [f"{tensors[n].name}: the engine has no {name}" for n in numbers]
            continue
        own = [(tensors[n], parts[n], n) for n in numbers]
        problems += _fill(parameters[name].detach(), name, own, views, up_first)
    if problems:
        shown = problems[:_MAX_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError("the trainer's weights do not fit the engine's: " + "; ".join(shown))
    return views


def engine_name(name: str) -> str:
    """The name of the parameter that holds a Hugging Face tensor; engines' own names stay.

    Example: ``model.layers.3.mlp.experts.7.up_proj.weight`` is part of
    ``model.layers.3.mlp.experts.w13_weight``.
    """
    return _part_of(name, {}).parameter


def _part_of(name: str, parameters: Mapping[str, Tensor]) -> _Part:
    if found := _EXPERT.match(name):
        group = EXPERTS.get(found["part"])
        if group is not None:
            names = [found["layer"] + m + group[0] + found["kind"] for m in _EXPERT_MODULES]
            parameter = next((n for n in names if n in parameters), names[0])
            return _Part(parameter=parameter, order=group[1], expert=int(found["number"]))
    module, _, kind = name.rpartition(".")
    owner, _, last = module.rpartition(".")
    if last in FUSED:
        fused, order = FUSED[last]
        return _Part(parameter=f"{owner}.{fused}.{kind}", order=order)
    return _Part(parameter=name, order=0)


_Own = tuple[HeldTensor, _Part, int]


def _fill(
    parameter: Tensor,
    name: str,
    own: Sequence[_Own],
    views: list[Tensor],
    up_first: Callable[[str], bool],
) -> Iterator[str]:
    """Put the views of one parameter's tensors into ``views``; gives what does not fit."""
    wrong_dtype = {held.dtype for held, _, _ in own if held.torch_dtype is not parameter.dtype}
    if wrong_dtype:
        have = str(parameter.dtype).removeprefix("torch.")
        yield f"{name} is {have} in the engine and {'/'.join(sorted(wrong_dtype))} in the trainer"
        return
    if own[0][1].expert is None:
        yield from _fill_rows(parameter, name, own, views, swapped=False)
        return
    by_expert: dict[int, list[_Own]] = defaultdict(list)
    for member in own:
        assert member[1].expert is not None
        by_expert[member[1].expert].append(member)
    experts = sorted(by_expert)
    if experts != list(range(experts[0], experts[0] + len(parameter))):
        yield f"{name} has {len(parameter)} experts; the trainer sends {experts}"
        return
    swapped = up_first(name)
    for number, expert in enumerate(experts):
        yield from _fill_rows(parameter[number], name, by_expert[expert], views, swapped=swapped)


def _fill_rows(
    parameter: Tensor, name: str, own: Sequence[_Own], views: list[Tensor], *, swapped: bool
) -> Iterator[str]:
    """The same for tensors that follow each other along axis 0."""
    ordered = sorted(own, key=lambda member: member[1].order, reverse=swapped)
    shapes = [held.held_shape for held, _, _ in ordered]
    rows = sum(shape[0] for shape in shapes)
    if any(shape[1:] != parameter.shape[1:] for shape in shapes) or not (
        _fits_vocabulary(ordered[0][0], len(parameter))
        if name.endswith(VOCABULARY)
        else rows == len(parameter)
    ):
        parts = " + ".join(f"{held.name} {held.held_shape}" for held, _, _ in ordered)
        yield f"{name} is {tuple(parameter.shape)} in the engine, the trainer sends {parts}"
        return
    start = 0
    for (_, _, number), shape in zip(ordered, shapes, strict=True):
        views[number] = parameter[start : start + shape[0]]
        start += shape[0]


def _fits_vocabulary(held: HeldTensor, rows: int) -> bool:
    """Whether the held part is what a rank with ``rows`` rows, padding included, has to hold."""
    full = held.stop == held.shape[0]
    count = held.stop - held.start
    return held.start % rows == 0 and (count == rows or (full and count < rows))
