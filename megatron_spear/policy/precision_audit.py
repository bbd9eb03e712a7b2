"""At the start of an FP8 run: the precision each linear really runs in, seen in a forward pass.

Settings say what should be; what a layer does is decided by contexts, by TransformerEngine (TE) and
by the module that the layer spec put there. So a few tokens go through the model without gradient
while a hook on every linear notes what TE did, or for other modules the dtype that came out. Each
rank sees its own pieces; the table is gathered, and a wrong linear anywhere stops all ranks.

    layers 1-30: linear_qkv, linear_proj, linear_fc1, linear_fc2: fp8 (tensorwise, hybrid)
    layers 0, 31: linear_qkv, linear_proj, linear_fc1, linear_fc2: bf16
    output_layer: bf16
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_spear.config.schema import Fp8Section
from megatron_spear.data.packing import PackedStep
from megatron_spear.errors import ConfigError
from megatron_spear.policy.pack_for import pack_for
from megatron_spear.types import Origin, Reward, TrainSample, TrajectoryId

logger = logging.getLogger(__name__)

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
NOT_RUN = "not run"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Seen:
    """One linear: ``layer`` is the decoder layer's global number, or -1 outside of them.

    ``precision`` is ``fp8 (recipe, format)``, ``bf16``, ``fp32`` or ``not run``; ``held`` says
    whether the weight itself is in FP8.
    """

    layer: int
    name: str
    precision: str
    held: bool = False

    @property
    def words(self) -> str:
        """Precision and how the weight is held."""
        return f"{self.precision}, weights in fp8" if self.held else self.precision


def audit(policy: Any, fp8: Fp8Section) -> None:
    """Log the table of ``policy``'s linears; ConfigError on every rank if one is not as it should.

    Collective. The decoder layers' linears should be in FP8, except those of the first and last
    layers that are to stay in bf16, and the router.
    """
    mine = observe(policy)
    everything: list[Any] = [None] * policy.ctx.world_size
    dist.all_gather_object(everything, mine, group=policy.ctx.control)
    seen = sorted({entry for part in everything for entry in part})
    if policy.ctx.is_controller:
        logger.info("precision of the linears, as seen:\n%s", "\n".join(table(seen)))
    if wrong := list(complaints(seen, fp8, policy.shape.num_layers)):
        raise ConfigError(
            "linears that should run in FP8 do not:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nfind what keeps them from it, or set policy.fp8.recipe=none"
        )


def observe(policy: Any) -> list[Seen]:
    """What each linear of this rank does in a forward pass of a few tokens. Collective."""
    with _watched(policy._chunks) as seen:
        policy.logprobs(_few_tokens(policy) if policy.ctx.is_controller else None, 1.0)
    return list(seen.values())


def table(seen: Iterable[Seen]) -> list[str]:
    """A line for all layers with the same precision, then one for each other linear."""
    by_layer: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in seen:
        by_layer[entry.layer][entry.words].append(entry.name)
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for layer, groups in by_layer.items():
        for words, members in groups.items():
            alike[", ".join(sorted(members)), words].append(layer)
    lines = []
    for (names, words), layers in sorted(alike.items(), key=lambda item: item[1]):
        where = "" if layers == [-1] else f"layers {ranges(layers)}: "
        lines.append(f"  {where}{names}: {words}")
    return lines


def complaints(seen: Iterable[Seen], fp8: Fp8Section, num_layers: int) -> Iterator[str]:
    """A line for each linear that is not as the settings say."""
    first, last = fp8.bf16_layers_at_start, num_layers - fp8.bf16_layers_at_end
    for entry in seen:
        if entry.layer < 0 or entry.name == "router":
            continue
        wanted = first <= entry.layer < last
        what = f"layer {entry.layer} {entry.name}: {entry.words}"
        if wanted and not entry.precision.startswith(f"fp8 ({fp8.recipe},"):
            yield f"{what}, expected fp8 ({fp8.recipe})"
        elif wanted and fp8.parameters and not entry.held:
            yield f"{what}, expected weights in fp8 (policy.fp8.parameters=true)"
        elif not wanted and entry.precision != "bf16":
            yield f"{what}, expected bf16 (one of the first {first} or last {num_layers - last})"


def ranges(numbers: Iterable[int]) -> str:
    """Example: 0, 1, 2, 5, 7, 8 are ``0-2, 5, 7-8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@contextmanager
def _watched(chunks: Iterable[Any]) -> Iterator[dict[str, Seen]]:
    """Inside, linears that run leave their ``Seen`` in the result, by piece and module."""
    seen: dict[str, Seen] = {}
    handles = []
    for number, chunk in enumerate(chunks):
        for path, module in chunk.named_modules():
            if not _is_linear(path, module):
                continue
            layer, name = _place(path, chunk.first_layer)
            key = f"{number}.{path}"
            seen[key] = Seen(layer=layer, name=name, precision=NOT_RUN)

            def note(
                module: Any, inputs: Any, output: Any, key: str = key, seen: Any = seen
            ) -> None:
                before = seen[key]
                seen[key] = Seen(
                    layer=before.layer,
                    name=before.name,
                    precision=_precision(module, output),
                    held=_held_in_fp8(module),
                )

            handles.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(path: str, module: Any) -> bool:
    """Modules with a matrix of their own, the embedding apart; a tied output layer has none."""
    own = any(p.dim() == 2 for p in module.parameters(recurse=False))
    return path == "output_layer" or (own and not path.startswith("embedding"))


def _place(path: str, first_layer: int) -> tuple[int, str]:
    """(global layer, short name) of a module; (-1, path) outside of the layers."""
    match = _LAYER.match(path)
    if match is None:
        return -1, path
    within = match[2].removeprefix("self_attention.").removeprefix("mlp.")
    return first_layer + int(match[1]), within


def _precision(module: Any, output: Any) -> str:
    """What TransformerEngine's module did last; of another module, the dtype it gave."""
    if getattr(module, "fp8", False):
        recipe = module.fp8_meta["recipe"]
        return f"fp8 ({_recipe_name(recipe)}, {recipe.fp8_format.name.lower()})"
    first = output[0] if isinstance(output, tuple) else output
    return DTYPE_NAMES.get(first.dtype, str(first.dtype))


def _recipe_name(recipe: Any) -> str:
    """The setting's word for one of TransformerEngine's recipes."""
    kinds = {
        "delayed": recipe.delayed,
        "tensorwise": recipe.float8_current_scaling,
        "blockwise": recipe.float8_block_scaling,
        "mxfp8": recipe.mxfp8,
    }
    return next((name for name, is_one in kinds.items() if is_one()), type(recipe).__name__)


def _held_in_fp8(module: Any) -> bool:
    from megatron.core.fp8_utils import is_float8tensor

    matrices = [p for p in module.parameters(recurse=False) if p.dim() == 2]
    return bool(matrices) and all(is_float8tensor(p) for p in matrices)


def _few_tokens(policy: Any) -> PackedStep:
    """A short sequence for each data-parallel rank."""
    length = max(policy.pad_multiple, 16)
    samples = [
        _sample(number, length, policy.shape.vocab_size) for number in range(policy.ctx.data_size)
    ]
    return pack_for(
        policy,
        samples,
        [np.zeros(length, np.float32)] * len(samples),
        [Origin.ON_POLICY] * len(samples),
        tokens_per_microbatch=length,
    )


def _sample(number: int, length: int, vocab_size: int) -> TrainSample:
    zeros = np.zeros(length, np.float32)
    return TrainSample(
        trajectory_id=TrajectoryId(group="audit", member=number),
        segment=0,
        num_segments=1,
        prompt_id="audit",
        token_ids=(np.arange(length) % vocab_size).astype(np.int32),
        response_mask=np.ones(length, bool),
        rollout_logprobs=zeros,
        old_logprobs=zeros,
        advantages=zeros,
        reward=Reward(outcome=0.0),
        turn_starts=np.zeros(1, np.int32),
        anchors=(),
        policy_version=0,
    )
