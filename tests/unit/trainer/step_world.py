"""A fake policy, rollouter, engine and hook for one whole step: what is called, and with what."""

from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.losses import ClippedLossSection
from megatron_spear.config.method import AlgorithmSection, ReplaySection, RewardSection
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.packing import PackedStep
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.testing.hand_made import (
    ONE_LAYER,
    make_prompt,
    make_sample,
    make_trajectory,
    make_turn,
)
from megatron_spear.trainer.controller import Controller
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.loop import SpearStep
from megatron_spear.types import (
    Coefficients,
    Origin,
    ScoredGroup,
    Status,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryGroup,
    Update,
)
from megatron_spear.weight_sync.in_process import InProcess

PLAYED = ((make_turn(policy_version=2),),)
CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.25),
    seed=7,
)
LOSS = PolicyLoss.from_sections(AlgorithmSection(), ReplaySection().loss, temperature=0.9)
NEW_LOGPROB = -0.75


class World:
    """Policy, engine, rollouter and hook in one place, with one common list of calls."""

    def __init__(self, groups: Sequence[TrajectoryGroup], updates: Sequence[Update]) -> None:
        self.calls: list[str] = []
        self.trained: list[PackedStep] = []
        self.apart: list[PackedStep | None] = []
        self.asked: list[tuple[PackedStep, float]] = []
        self.groups, self.updates = list(groups), list(updates)
        self.policy, self.engine = _Policy(self), _Engine(self)
        self.rollouter, self.hook = _Rollouter(self), _Hook(self)


class _Rollouter:
    def __init__(self, world: World) -> None:
        self._world = world

    def collect_sync(self, prompts: Any, **settings: Any) -> list[TrajectoryGroup]:
        self._world.calls.append("collect")
        return self._world.groups


class _Policy:
    """Gives the same log-prob to every token, and ready numbers for a training step."""

    pad_multiple = 1
    sequence_multiple = 1
    mix_lengths = False
    microbatch_multiple = 1
    shape = ONE_LAYER
    ctx = SimpleNamespace(data_size=1)

    def __init__(self, world: World) -> None:
        self._world = world

    def logprobs(
        self, packed: PackedStep, temperature: float, *, reference: bool = False
    ) -> list[np.ndarray]:
        self._world.calls.append("ref_logprobs" if reference else "logprobs")
        self._world.asked.append((packed, temperature))
        return [np.full(length, NEW_LOGPROB, np.float32) for length in packed.lengths]

    def train_step(
        self, packed: PackedStep, loss: Any, apart: PackedStep | None, *, scheduled: bool
    ) -> dict[str, float]:
        assert loss is LOSS
        self._world.calls.append("train_step" if scheduled else "own step")
        self._world.apart.append(apart)
        self._world.trained.append(packed)
        number = len(self._world.trained)
        return {
            "grad_norm": 1.0 * number,
            "lr": 1e-3,
            "skipped": float(number == 1),
            "loss/total": 99.0,
            "policy/num_tokens": 4.0,
            "policy/sum_loss": 0.5 * number,
            "policy/sum_clipped": 1.0,
        }

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        self._world.calls.append("exported")


class _Engine:
    version = 2

    def __init__(self, world: World) -> None:
        self._world = world

    def load_weights(self, named_tensors: Iterable[Any], policy_version: int) -> None:
        self._world.calls.append("load_weights")
        assert [name for name, _ in named_tensors] == ["a"]
        self.version = policy_version


class _Hook(Hook):
    def __init__(self, world: World) -> None:
        self._world = world
        self.scored: tuple[ScoredGroup, ...] = ()
        self.samples: list[TrainSample] = []
        self.report: StepReport | None = None

    def on_played(self, ctx: StepContext, groups: tuple[TrajectoryGroup, ...]) -> None:
        self._world.calls.append("on_played")
        assert list(groups) == self._world.groups

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        self._world.calls.append("on_scored")
        self.scored = groups
        return groups

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        self._world.calls.append("on_samples")
        self.samples = list(samples)

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        self._world.calls.append("extra_updates")
        return self._world.updates

    def metrics(self) -> dict[str, float]:
        self._world.calls.append("metrics")
        return {"mine/number": 5.0}

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        self._world.calls.append("on_step_end")
        self.report = report


def group(name: str, wins: Sequence[bool], failed: int = 0) -> TrajectoryGroup:
    """A group of one-turn members; its failures had won when they failed."""
    count = len(wins)
    return TrajectoryGroup(
        group_id=name,
        prompt=make_prompt(name),
        members=tuple(make_trajectory(name, i, PLAYED, won=won) for i, won in enumerate(wins)),
        failures=tuple(
            make_trajectory(name, count + i, won=True, status=Status.FAILED_TOOL)
            for i in range(failed)
        ),
    )


def make_world(*groups: TrajectoryGroup, replay: int = 0) -> World:
    rows = tuple(make_sample("old", i, mask=[0, 1, 1, 1]) for i in range(replay))
    update = Update(samples=rows, origin=Origin.REPLAY, weight=0.25)
    return World(groups, [update] if replay else [])


def make_step(
    world: World, *, clip: bool = False, replay: dict[str, Any] | None = None, **algorithm: Any
) -> SpearStep:
    none = {"loss": ClippedLossSection(), "ratio_filter": None}
    settings = {"ratio_filter": None} if clip else none
    section = AlgorithmSection(**({"norm_length": 10, "keep_groups_fraction": 1.0} | algorithm))
    controller = Controller(
        cursor=PromptCursor(FreshPrompts(lambda i: make_prompt(str(i)))),
        rollouter=world.rollouter,
        hooks=HookCalls({"mine": world.hook}),
        rollout=RolloutSection(prompts_per_step=max(1, len(world.groups)), group_size=2),
        reward=RewardSection(),
        algorithm=section,
    )
    return SpearStep(
        policy=world.policy,
        weight_sync=InProcess(source=world.policy, receiver=world.engine),
        controller=controller,
        loss=LOSS,
        algorithm=section,
        replay=ReplaySection(**(settings | (replay or {}))),
        tokens_per_microbatch=100,
    )
