"""What published figures are of, as steps that the planner can predict."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_spear.cluster.planner.chips import CHIPS
from megatron_spear.cluster.planner.decoding import Engine, Play, rollout_time
from megatron_spear.cluster.planner.efficiency import Constants
from megatron_spear.cluster.planner.engine_memory import engine_weights
from megatron_spear.cluster.planner.job import LENGTH_SPREAD
from megatron_spear.cluster.planner.long_tail import LongTail
from megatron_spear.cluster.planner.machines import Machines, Ranks
from megatron_spear.cluster.planner.resharding import reshard
from megatron_spear.cluster.planner.step import Step
from megatron_spear.cluster.planner.times import times_of
from megatron_spear.cluster.planner.training import Trainer, logprob_time, train_time
from megatron_spear.conversion.shape import ModelShape

PROMPT = 100
"""Tokens of a prompt, where a source does not give them (short mathematics questions)."""

Role = Literal["fixes", "check", "miss"]
Prediction = Callable[[Constants], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A published figure. ``role``: it fixes ``constant``; or it is a check, within 30 %; or the
    prediction misses it, for the reason in ``note``."""

    name: str
    published: float
    unit: str
    source: str
    predict: Prediction
    role: Role = "check"
    constant: str = ""
    note: str = ""

    def error(self, constants: Constants) -> float:
        """Prediction over figure, less 1."""
        return self.predict(constants) / self.published - 1


def model(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    vocab: int,
    *,
    experts: int = 0,
    chosen: int = 0,
    head: int = 128,
) -> ModelShape:
    """A model by its sizes."""
    return ModelShape(
        family="qwen3_moe" if experts else "llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_groups=groups,
        head_dim=head,
        vocab_size=vocab,
        norm_eps=1e-6,
        rope_theta=1e6,
        num_experts=experts,
        experts_per_token=chosen,
    )


def machines(constants: Constants, chip: str = "h100", node: int = 8) -> Machines:
    """Nodes of ``node`` GPUs; those of an NVL72 rack count as one node."""
    return Machines(chip=CHIPS[chip], gpus_per_node=node, constants=constants)


def pretraining(
    shape: ModelShape,
    ranks: Ranks,
    *,
    batch: int,
    length: int,
    sequences: int = 1,
    fp8: bool = False,
    hides_tensor_exchange: bool = False,
) -> Prediction:
    """Tokens a second and GPU of training on ``batch`` sequences of one ``length`` a step,
    ``sequences`` a micro-batch. An exchange run in as many parts as there are tensor-parallel ranks
    beside the products hides all but one of them."""

    def predict(constants: Constants) -> float:
        trainer = Trainer(
            model=shape,
            ranks=ranks,
            machines=machines(constants),
            microbatch_tokens=sequences * length,
            keys=length / 2,
            fp8=fp8,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            hidden_exchange=1 - 1 / ranks.tensor if hides_tensor_exchange else 0.0,
        )
        tokens = batch * length
        return tokens / train_time(trainer, tokens).total_s / ranks.world_size

    return predict


def decoding(
    shape: ModelShape, tensor: int, chip: str, *, contexts: int, prompt: int, answer: int
) -> Prediction:
    """Seconds from ``contexts`` prompts to the end of their answers, all of one length."""

    def predict(constants: Constants) -> float:
        engine = Engine(
            model=shape, machines=machines(constants, chip), tensor=tensor, slots=contexts
        )
        step_s = float(engine.decode_s(np.array([contexts]), prompt + answer / 2)[0])
        return engine.prefill_s(contexts * prompt, prompt / 2) + answer * step_s

    return predict


@dataclass(frozen=True, kw_only=True, slots=True)
class RlRun:
    """A run of NeMo-RL: GRPO with a reference policy, gradients reduced in bf16 beside the backward
    pass, sequences packed; ``answer`` and ``longest`` are sampled tokens."""

    shape: ModelShape
    ranks: Ranks
    tensor: int
    engines: int
    prompts: int
    answer: float
    longest: int
    packed: int
    """Tokens of a training micro-batch."""
    logprob_packs: int = 1
    """Times as many in one of a log-prob pass."""
    updates: int = 4
    recompute: bool = False
    chip: str = "h100"
    node: int = 8
    memory: float = 0.6
    max_lag: int = 0

    def step(self, constants: Constants) -> Step:
        """As the planner takes it."""
        gpus = machines(constants, self.chip, self.node)
        play = Play(
            num_prompts=self.prompts,
            group_size=32,
            prompt=PROMPT,
            observed=0,
            lengths=LongTail(mean=self.answer, longest=self.longest, spread=LENGTH_SPREAD),
        )
        engine = Engine(model=self.shape, machines=gpus, tensor=self.tensor, slots=1)
        room = self.memory * gpus.chip.memory_bytes * self.tensor
        room = (room - engine_weights(self.shape, fp8=False)) / engine.cache_bytes
        slots = int(np.clip(room / play.mean_context, 1, 256))
        update = reshard(
            self.shape,
            self.ranks,
            gpus,
            tensor=self.tensor,
            replicas=self.engines,
            transport="whole",
            same_nodes=self.max_lag == 0,
            sends=1,
        )
        return Step(
            trainer=Trainer(
                model=self.shape,
                ranks=self.ranks,
                machines=gpus,
                microbatch_tokens=self.packed,
                keys=play.mean_keys,
                recompute=self.recompute,
                grad_bytes=2,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
            ),
            engine=replace(engine, slots=slots),
            num_engines=self.engines,
            play=play,
            update=update,
            trained=play.num_trajectories,
            updates=self.updates,
            logprob_passes=0,
            max_lag=self.max_lag,
        )

    def rollout_s(self, constants: Constants) -> float:
        """Generation alone."""
        step = self.step(constants)
        return rollout_time(step.engine, step.num_engines, step.play).alone_s

    def train_s(self, constants: Constants) -> float:
        """Training alone."""
        step = self.step(constants)
        return train_time(step.trainer, self._tokens(step), step.updates).total_s

    def logprobs_s(self, constants: Constants) -> float:
        """The log-probs of the policy and of the reference."""
        step = self.step(constants)
        packed = self.logprob_packs * self.packed
        trainer = replace(step.trainer, microbatch_tokens=packed, recompute=False)
        return 2 * logprob_time(trainer, self._tokens(step)).total_s

    def total_s(self, constants: Constants) -> float:
        """A whole step."""
        step = self.step(constants)
        passes_s = self.logprobs_s(constants)
        times = times_of(replace(step, others_s=passes_s))
        return times.total_s

    @staticmethod
    def _tokens(step: Step) -> float:
        return step.trained * step.play.mean_tokens


def update(
    shape: ModelShape,
    ranks: Ranks,
    tensor: int,
    replicas: int,
    *,
    whole_share: float,
    chip: str = "h100",
) -> Prediction:
    """Seconds of a shard-to-shard update of which ``whole_share`` of the bytes are broadcast whole,
    as NeMo-RL's ``nccl_reshard`` does with all but MLPs and experts."""

    def predict(constants: Constants) -> float:
        gpus = machines(constants, chip)
        found = reshard(shape, ranks, gpus, tensor=tensor, replicas=replicas, transport="sharded")
        rate = gpus.chip.nic_bytes_per_s * constants.between_nodes
        launches_s = shape.num_layers * constants.sync_layer_s
        whole = whole_share * engine_weights(shape, fp8=False)
        return launches_s + (1 - whole_share) * (found.seconds - launches_s) + whole / rate

    return predict


def whole_update(shape: ModelShape, tensor: int, replicas: int) -> Prediction:
    """Seconds of an update that broadcasts whole tensors to all servers at once."""

    def predict(constants: Constants) -> float:
        found = reshard(
            shape,
            Ranks(),
            machines(constants),
            tensor=tensor,
            replicas=replicas,
            transport="whole",
            sends=1,
        )
        return found.seconds

    return predict
