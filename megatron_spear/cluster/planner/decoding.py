"""Time of the rollout stage: decode steps, prompts, and the longest trajectory at the end.

A decode step reads the weights once and every context's keys and values, or has its products to do,
whichever takes longer. Of a mixture's experts those are read that some context asks for.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_spear.cluster.planner.engine_memory import cache_bytes
from megatron_spear.cluster.planner.long_tail import LongTail
from megatron_spear.cluster.planner.machines import Machines
from megatron_spear.cluster.planner.passes import flops_a_token
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import layer_parameters

Floats = NDArray[np.float64]
_PARTS = 128
"""Parts that a distribution of lengths, and a rollout's end, are reckoned in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A server: the model over ``tensor`` GPUs, ``slots`` contexts at once."""

    model: ModelShape
    machines: Machines
    tensor: int
    slots: int
    fp8: bool = False

    def decode_s(self, contexts: Floats, length: Floats | float) -> Floats:
        """Seconds of a decode step with so many contexts of a mean ``length``."""
        parts = self.parts_of_decode(contexts, length)
        read = parts["reading weights"] + parts["reading keys and values"]
        others = parts["between its GPUs"] + parts["host work"]
        return np.asarray(np.maximum(read, parts["products"]) + others)

    def parts_of_decode(self, contexts: Floats, length: Floats | float) -> dict[str, Floats]:
        """What a decode step is made of; products run while weights and contexts are read."""
        model, machines, constants = self.model, self.machines, self.machines.constants
        layer = layer_parameters(model)
        size = 1 if self.fp8 else 2
        asked: Floats | float = 1.0
        if model.num_experts:
            asked = 1 - (1 - model.experts_per_token / model.num_experts) ** contexts
        weights = model.num_layers * (layer.linears + layer.experts * asked) * size
        weights = weights + 2 * model.hidden_size * model.vocab_size + 0 * contexts
        cache = contexts * length * self.cache_bytes
        chip = machines.chip
        peak = (self.fp8 and chip.fp8_flops) or chip.bf16_flops
        flops = contexts * flops_a_token(model, 0)
        moved = 4 * contexts * model.hidden_size / machines.rate(self.tensor)
        exchanges = 2 * model.num_layers * (self.tensor > 1)
        host = model.num_layers * constants.decode_layer_s
        return {
            "reading weights": machines.memory_s(1) * weights / self.tensor,
            "reading keys and values": machines.memory_s(1) * cache / self.tensor,
            "products": flops / (self.tensor * peak * constants.matmul),
            "between its GPUs": exchanges * (machines.latency_s(self.tensor) + moved),
            "host work": host + contexts * constants.decode_context_s,
        }

    @property
    def cache_bytes(self) -> float:
        """Keys and values of one token, all ranks together, in bf16."""
        return float(self.tensor * cache_bytes(self.model, self.tensor))

    def prefill_s(self, tokens: float, keys: float) -> float:
        """Reading ``tokens`` of prompts or of what the environment said."""
        chip = self.machines.chip
        peak = chip.fp8_flops if self.fp8 and chip.fp8_flops else chip.bf16_flops
        share = peak * self.machines.constants.matmul * self.tensor
        return tokens * flops_a_token(self.model, keys) / share


@dataclass(frozen=True, kw_only=True, slots=True)
class Play:
    """What a set of trajectories is.

    Of a trajectory's tokens ``prompt`` are read once a group, ``observed`` ones by itself, and
    ``lengths`` are sampled. It has ``contexts`` of the same size, one after the other.
    """

    num_prompts: int
    group_size: int
    prompt: float
    observed: float
    lengths: LongTail
    contexts: int = 1
    num_turns: int = 1
    env_s: float = 0.0

    @property
    def num_trajectories(self) -> int:
        """Of a set."""
        return self.num_prompts * self.group_size

    @property
    def mean_tokens(self) -> float:
        """Of a trajectory: what is sampled, what the environment says, and its prompt."""
        return self.prompt + self.observed + self.lengths.mean

    @property
    def longest(self) -> float:
        """Sampled tokens of the longest trajectory, as it is expected to be."""
        return self.lengths.quantile(1 - 0.5 / self.num_trajectories)

    @property
    def mean_context(self) -> float:
        """Tokens a context has on average while it decodes: those of long trajectories count for
        as long as they take."""
        sampled = self.lengths.mean_square / self.lengths.mean / self.contexts
        if self.contexts > 1:
            return (self.prompt + self.observed) / self.contexts + sampled / 2
        return self.prompt + (self.observed + sampled) / 2

    @property
    def mean_keys(self) -> float:
        """Tokens that one of a context sees on average: half of them, and more in long ones."""
        given = (self.prompt + self.observed) / self.contexts
        mean = self.lengths.mean / self.contexts
        square = self.lengths.mean_square / self.contexts**2
        return (given**2 + 2 * given * mean + square) / (given + mean) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutTime:
    """Seconds of a set of trajectories.

    ``alone_s``: from the first token to the end of the last trajectory. ``work_s``: what the
    engines would need if always as full as in the beginning. ``prefill_s``: of both, reading
    prompts and observations.
    """

    alone_s: float
    work_s: float
    prefill_s: float


def rollout_time(engine: Engine, num_engines: int, play: Play) -> RolloutTime:
    """How long a set takes if nothing else is to be done."""
    count = play.num_trajectories / num_engines
    first = max(1.0, min(count, engine.slots))
    full_s = float(engine.decode_s(np.array([first]), play.mean_context)[0])
    prompts = play.num_prompts * play.prompt + play.num_trajectories * play.observed
    prefill_s = engine.prefill_s(prompts / num_engines, play.mean_context)
    queue_s = max(0.0, count - first) * play.lengths.mean / first * full_s
    tail_s = _tail_s(engine, play, first, queued=count > first)
    waits_s = (play.num_turns - 1) * play.env_s
    return RolloutTime(
        alone_s=prefill_s + queue_s + tail_s + waits_s,
        work_s=prefill_s + count * play.lengths.mean / first * full_s,
        prefill_s=prefill_s,
    )


def _tail_s(engine: Engine, play: Play, first: float, *, queued: bool) -> float:
    """From the filling of the last slot to the end: decode steps with ever fewer contexts.

    Without a queue all began together, and after n tokens those longer than n are left. With one
    they have been at it for some time, and after n more the share is left of all trajectories'
    tokens that are beyond n.
    """
    lengths = play.lengths.quantiles(_PARTS)
    steps = np.linspace(0.0, play.longest, _PARTS + 1)
    middles = (steps[1:] + steps[:-1]) / 2
    context = np.full_like(middles, play.mean_context)
    if queued:
        left = np.maximum(lengths[None, :] - middles[:, None], 0).mean(axis=1) / play.lengths.mean
    else:
        left = 1 - np.searchsorted(lengths, middles) / len(lengths)
        if play.contexts == 1:
            context = play.prompt + play.observed * middles / play.longest + middles
    seconds = engine.decode_s(np.maximum(first * left, 1.0), context)
    return float((seconds * np.diff(steps)).sum())
