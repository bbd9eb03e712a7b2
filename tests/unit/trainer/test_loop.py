"""One whole step with a fake policy, rollouter, engine and hook: what is called, and with what."""

from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.losses import ClipCovLossSection, ClippedLossSection, KlSection
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
from megatron_spear.trainer.loop import SpearStep, finish_step_metrics
from megatron_spear.trainer.work import forward_flops
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


class _World:
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
    def __init__(self, world: _World) -> None:
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

    def __init__(self, world: _World) -> None:
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

    def __init__(self, world: _World) -> None:
        self._world = world

    def load_weights(self, named_tensors: Iterable[Any], policy_version: int) -> None:
        self._world.calls.append("load_weights")
        assert [name for name, _ in named_tensors] == ["a"]
        self.version = policy_version


class _Hook(Hook):
    def __init__(self, world: _World) -> None:
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


def _group(name: str, wins: Sequence[bool], failed: int = 0) -> TrajectoryGroup:
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


def _world(*groups: TrajectoryGroup, replay: int = 0) -> _World:
    rows = tuple(make_sample("old", i, mask=[0, 1, 1, 1]) for i in range(replay))
    update = Update(samples=rows, origin=Origin.REPLAY, weight=0.25)
    return _World(groups, [update] if replay else [])


def _step(
    world: _World, *, clip: bool = False, replay: dict[str, Any] | None = None, **algorithm: Any
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


PUBLISHED = ["load_weights", "exported", "metrics", "on_step_end"]


def test_the_order_of_a_step_with_replay_and_covariance_clipping() -> None:
    world = _world(_group("a", [True, False]), _group("b", [True, True]), replay=2)
    report = _step(world, clip=True).run(CTX)
    assert world.calls == [
        "collect",
        "on_played",
        "on_scored",
        "logprobs",
        "on_samples",
        "extra_updates",
        "logprobs",
        "train_step",
        *PUBLISHED,
    ]
    own, replayed = world.asked
    # Group b compares equal rewards: it has no gradient, and no log-probs are asked for.
    assert own[0].lengths == (3, 3) and replayed[0].lengths == (4, 4)
    assert own[1] == replayed[1] == LOSS.temperature
    assert world.engine.version == report.policy_version == 3 and report.step == 3
    assert world.hook.report is report
    assert report.example is world.hook.scored[-1].members[-1]


def test_what_is_trained_by_hand() -> None:
    world = _world(_group("a", [True, False]), _group("b", [True, True]), replay=2)
    _step(world).run(CTX)
    assert world.calls.count("logprobs") == 1, "without covariance clipping replay needs none"
    (packed,) = world.trained
    ((micro,),) = packed.micro_batches
    assert sorted(packed.lengths) == [3, 3, 4, 4]
    weights = {origin: micro.token_weight[micro.origin == origin] for origin in (0, 1)}
    # Of four trajectories of two tokens, two are trained; gamma / 2 rows * 3 tokens replayed.
    assert weights[0][weights[0] > 0].tolist() == pytest.approx([1 / 40] * 4)
    assert weights[1][weights[1] > 0].tolist() == pytest.approx([0.25 / 20] * 6)
    old = {o: micro.old_logprobs[(micro.origin == o) & (micro.token_weight > 0)] for o in (0, 1)}
    assert set(old[0].tolist()) == {NEW_LOGPROB}, "the policy's own, before the update"
    assert set(old[1].tolist()) == {-0.5}, "those of collection"
    assert {s.old_logprobs[-1] for s in world.hook.samples} == {NEW_LOGPROB}


def test_metrics_of_a_step() -> None:
    world = _world(_group("a", [True, False], failed=1), _group("b", [True, True]), replay=2)
    metrics = dict(_step(world, clip=True).run(CTX).metrics)
    new, replayed = forward_flops(ONE_LAYER, [3]), forward_flops(ONE_LAYER, [4])
    rollout = forward_flops(ONE_LAYER, [3] * 4, num_logits=8)
    expected = {
        "rollout/failed": 1.0,
        "rollout/success": 0.75,
        "reward/outcome": 0.75,
        "filter/num_groups": 2.0,
        "mismatch/logprob_gap_mean": 0.25,
        "mismatch/max_logprob_gap": 0.25,
        "replay/cov_dropped_fraction": 0.0,
        "train/num_rows": 4.0,
        "train/tokens": 14.0,
        "train/num_updates": 1.0,
        "optimizer/grad_norm": 1.0,
        "optimizer/lr": 1e-3,
        "optimizer/num_skipped": 1.0,
        "loss/policy": 0.5,
        "policy/clip_fraction": 0.25,
        "weight_sync/bytes": 12.0,
        "work/rollout_tokens": 12.0,
        "work/old_logprobs_tokens": 6.0,
        "work/ref_logprobs_tokens": 0.0,
        "work/current_logprobs_tokens": 8.0,
        "work/train_tokens": 14.0,
        "work/replay_tokens": 8.0,
        "work/replay_train_fraction": replayed / (replayed + new),
        "work/replay_flops": 8 * replayed,
        "work/replay_step_fraction": 8 * replayed / (rollout + 8 * new),
        "curriculum/intrinsic_weight": 0.5,
        "curriculum/replay_weight": 0.25,
        "mine/number": 5.0,
    }
    assert {name: metrics.get(name) for name in expected} == pytest.approx(expected)
    forward = "old_logprobs ref_logprobs current_logprobs"
    phases = f"rollout advantages {forward} replay train weight_sync step"
    assert {f"time/{phase}_s" for phase in phases.split()} <= set(metrics)
    assert "loss/total" not in metrics


def test_several_mini_batches_are_several_optimizer_steps() -> None:
    world = _world(_group("a", [True, False]), _group("b", [False, True]))
    metrics = _step(world, mini_batches=2).run(CTX).metrics
    assert [len(packed.lengths) for packed in world.trained] == [2, 2]
    assert metrics["train/num_updates"] == 2 and metrics["optimizer/num_skipped"] == 1
    assert metrics["optimizer/grad_norm"] == 1.5 and metrics["loss/policy"] == 0.75
    assert metrics["policy/num_tokens"] == 8


def test_an_empty_step_trains_nothing_and_still_publishes() -> None:
    world = _world(_group("a", [True, True]), _group("b", [False, False]))
    report = _step(world, clip=True, mini_batches=2).run(CTX)
    before = ["collect", "on_played", "on_scored", "on_samples", "extra_updates"]
    assert world.calls == [*before, *PUBLISHED]
    assert world.engine.version == report.policy_version == 3
    assert report.metrics["train/num_updates"] == report.metrics["train/num_rows"] == 0
    assert "time/train_s" in report.metrics
    assert world.hook.samples == []
    assert not any(name.startswith(("loss/", "mismatch/")) for name in report.metrics)


def test_a_step_of_replayed_rows_only_is_trained() -> None:
    world = _world(_group("a", [True, True]), replay=3)
    metrics = _step(world).run(CTX).metrics
    (packed,) = world.trained
    assert packed.lengths == (4, 4, 4) and metrics["train/num_updates"] == 1


def test_failures_are_never_scored() -> None:
    world = _world(_group("a", [True, False], failed=2), _group("b", [], failed=2))
    metrics = _step(world).run(CTX).metrics
    scored = [str(m.trajectory.id) for group in world.hook.scored for m in group.members]
    assert scored == [str(s.trajectory_id) for s in world.hook.samples] == ["a/0", "a/1"]
    assert metrics["rollout/failed"] == 4 and metrics["rollout/num_trajectories"] == 2


def test_the_engines_own_logprobs_save_the_forward_pass() -> None:
    world = _world(_group("a", [True, False]))
    metrics = _step(world, old_logprobs="engine").run(CTX).metrics
    assert "logprobs" not in world.calls and metrics["work/old_logprobs_tokens"] == 0
    ((micro,),) = world.trained[0].micro_batches
    assert set(micro.old_logprobs[micro.token_weight > 0].tolist()) == {-0.5}
    assert "mismatch/logprob_gap_mean" not in metrics, "nothing was compared"


def test_a_rank_without_data_takes_part_in_publishing_only() -> None:
    world = _world()
    step = SpearStep(
        policy=world.policy,
        weight_sync=InProcess(source=world.policy, receiver=None),
        controller=None,
        loss=LOSS,
        algorithm=AlgorithmSection(),
        replay=ReplaySection(),
        tokens_per_microbatch=100,
    )
    assert step.run(CTX).policy_version == 3 and world.calls == ["exported"]


def test_numbers_of_the_optimizer_step_by_hand() -> None:
    sums = {"grad_norm": 2.0, "lr": 0.1, "skipped": 0.0, "loss/total": 3.0}
    sums |= {"replay/num_tokens": 4.0, "replay/sum_kl": 1.0, "policy/num_tokens": 0.0}
    assert finish_step_metrics(sums) == {
        "optimizer/grad_norm": 2.0,
        "optimizer/lr": 0.1,
        "optimizer/num_skipped": 0.0,
        "replay/num_tokens": 4.0,
        "replay/kl": 0.25,
    }


def test_a_kl_asks_the_reference_and_trains_samples_without_advantage() -> None:
    world = _world(_group("a", [True, False]), _group("b", [True, True]))
    metrics = _step(world, kl=KlSection(coef=0.1)).run(CTX).metrics
    assert world.calls[3:5] == ["logprobs", "ref_logprobs"]
    assert metrics["work/ref_logprobs_tokens"] == metrics["work/old_logprobs_tokens"] == 12
    ((micro,),) = world.trained[0].micro_batches
    assert len(world.trained[0].lengths) == 4, "equal rewards move the policy back to the reference"
    weights = micro.regularizer_weight
    assert weights[weights > 0].tolist() == pytest.approx([1 / 40] * 8)
    assert set(micro.ref_logprobs[weights > 0].tolist()) == {NEW_LOGPROB}


def test_norms_of_new_and_replayed_gradients_are_taken_apart() -> None:
    world = _world(_group("a", [True, False]), replay=3)
    _step(world, replay={"gradient_norms": True}).run(CTX)
    (own,), (replayed,) = world.trained, world.apart
    assert replayed is not None and own.lengths == (3, 3) and replayed.lengths == (4, 4, 4)


def test_a_separate_step_of_replayed_rows() -> None:
    world = _world(_group("a", [True, False]), replay=3)
    metrics = _step(world, replay={"combine": "separate_step"}).run(CTX).metrics
    assert [call for call in world.calls if "step" in call][:2] == ["train_step", "own step"]
    assert metrics["train/num_updates"] == 2 and metrics["train/num_rows"] == 5


def test_covariance_of_later_mini_batches_reads_the_weights_of_then() -> None:
    world = _world(_group("a", [True, False]), _group("b", [False, True]))
    _step(world, mini_batches=2, loss=ClipCovLossSection()).run(CTX)
    assert world.calls[3:9] == [
        "logprobs",
        "on_samples",
        "extra_updates",
        "train_step",
        "logprobs",
        "train_step",
    ]
