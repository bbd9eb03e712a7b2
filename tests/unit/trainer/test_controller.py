"""Rank 0's stages: loss weights over all samples, dealing, replay, covariance drops, log-probs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.policy_loss import ClippedLoss
from megatron_spear.config.method import AlgorithmSection, CovarianceClipSection, RewardSection
from megatron_spear.config.schema import RolloutSection
from megatron_spear.data.packing import pack
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.testing.hand_made import make_prompt, make_sample, make_trajectory
from megatron_spear.trainer.controller import (
    Controller,
    MiniBatch,
    logprob_gap,
    with_gradient,
    with_old_logprobs,
)
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import (
    Coefficients,
    Origin,
    ScoredGroup,
    Status,
    StepContext,
    TrainSample,
    TrajectoryGroup,
    Update,
)

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)


class _Rollouter:
    """Answers with ready groups; keeps how it was called."""

    def __init__(self, groups: Sequence[TrajectoryGroup] = ()) -> None:
        self._groups = list(groups)
        self.calls: list[dict[str, Any]] = []

    def collect_sync(self, prompts: Any, **settings: Any) -> list[TrajectoryGroup]:
        self.calls.append({"prompts": prompts, **settings})
        return self._groups


class _Drop(Hook):
    """Goes on without the first group it sees, and adds a ready update."""

    def __init__(self, update: Update) -> None:
        self.seen: list[list[str]] = []
        self._update = update

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        self.seen.append([group.group_id for group in groups])
        return groups[1:]

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        return [self._update]


def _controller(
    *,
    rollouter: Any = None,
    hooks: Sequence[Hook] = (),
    clip: CovarianceClipSection | None = None,
    **algorithm: Any,
) -> Controller:
    return Controller(
        cursor=PromptCursor(FreshPrompts(lambda i: make_prompt(str(i)))),
        rollouter=rollouter or _Rollouter(),
        hooks=hooks,
        rollout=RolloutSection(prompts_per_step=2, group_size=3, temperature=0.9),
        reward=RewardSection(intrinsic_per_action=0.2, intrinsic_max=1.0),
        algorithm=AlgorithmSection(
            **({"norm_length": 10, "keep_groups_fraction": 1.0} | algorithm)
        ),
        covariance_clip=clip,
    )


def _replay(count: int, weight: float = 0.5) -> Update:
    samples = tuple(make_sample("old", i) for i in range(count))
    return Update(samples=samples, origin=Origin.REPLAY, weight=weight)


def _group(name: str, wins: Sequence[bool], failed: int = 0) -> TrajectoryGroup:
    """A group of one-turn members; its failures had won when they failed."""
    count = len(wins)
    return TrajectoryGroup(
        group_id=name,
        prompt=make_prompt(name),
        members=tuple(make_trajectory(name, i, won=won) for i, won in enumerate(wins)),
        failures=tuple(
            make_trajectory(name, count + i, won=True, status=Status.FAILED_ENGINE)
            for i in range(failed)
        ),
    )


def _loss(batch: MiniBatch) -> float:
    """The real clipped loss of a mini-batch under drawn log-probs, keyed by the trajectory."""
    packed = pack(batch.samples, batch.weights, batch.origins, tokens_per_microbatch=10_000)
    ((micro,),), ((members,),) = packed.micro_batches, packed.members
    rows = []
    for index in members:
        sample = batch.samples[index]
        draw = np.random.default_rng(sample.trajectory_id.member)
        rows += [*draw.normal(-0.5, 0.3, len(sample.token_ids))[1:], 0.0]
    loss = ClippedLoss(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    return float(loss(torch.tensor(rows), None, micro)[0])


def test_collect_takes_the_next_prompts_and_keys_the_draws_by_seed_and_step() -> None:
    rollouter = _Rollouter([_group("a", [True, False], failed=1)])
    controller = _controller(rollouter=rollouter)
    seen: list[int] = []
    groups, metrics = controller.collect(CTX, seen.append)
    assert [group.group_id for group in groups] == ["a"]
    assert metrics["rollout/success"] == 0.5 and metrics["rollout/failed"] == 1
    assert rollouter.calls == [
        {
            "prompts": [make_prompt("0"), make_prompt("1")],
            "group_size": 3,
            "seed": (7, 3),
            "temperature": 0.9,
            "progress": seen.append,
        }
    ]
    assert controller.cursor.state_dict() == {"consumed": 2}


def test_failures_are_never_scored() -> None:
    samples, metrics = _controller().samples(CTX, [_group("a", [True, False], failed=2)])
    assert [str(s.trajectory_id) for s in samples] == ["a/0", "a/1"]
    assert [s.advantages.tolist() for s in samples] == [[0, 0.5, 0.5], [0, -0.5, -0.5]]
    # Shaped: (1 + 0.5 * 0.2 + 0 + 0.5 * 0.2) / 2, the two failed wins left out.
    assert metrics["reward/mean"] == pytest.approx(0.6) and metrics["reward/outcome"] == 0.5


def test_a_step_in_which_everything_failed_has_no_samples() -> None:
    samples, metrics = _controller().samples(CTX, [_group("a", [], failed=2)])
    assert samples == [] and metrics["filter/num_empty_groups"] == 1


def test_hooks_choose_among_the_scored_groups_in_turn_and_add_updates() -> None:
    update = _replay(1)
    hooks = [_Drop(update), _Drop(update)]
    controller = _controller(hooks=hooks)
    won = {"a": [True, True], "b": [True, False], "c": [True, False]}
    samples, metrics = controller.samples(CTX, [_group(g, w) for g, w in won.items()])
    assert [hook.seen for hook in hooks] == [[["a", "b", "c"]], [["b", "c"]]]
    assert {s.trajectory_id.group for s in samples} == {"c"}
    assert metrics["reward/outcome"] == pytest.approx(4 / 6), "of all, before the hooks"
    assert metrics["filter/num_groups"] == 1
    assert controller.updates(CTX) == [update, update]


@pytest.mark.parametrize(
    ("aggregation", "weight"), [("seq-mean-token-sum-norm", 1 / 30), ("token-mean", 1 / 8)]
)
def test_weights_count_samples_without_gradient_too(aggregation: str, weight: float) -> None:
    samples = [
        make_sample("g", 0, mask=[0, 1, 1]),
        make_sample("g", 1, mask=[0, 1, 1], advantage=0.0),
        make_sample("g", 2, mask=[0, 1, 0, 1, 1, 1], advantage=-2.0),
    ]
    controller = _controller(aggregation=aggregation)
    active = with_gradient(samples)
    assert [s.trajectory_id.member for s in active] == [0, 2]
    (batch,), metrics = controller.mini_batches(CTX, samples, active, [], [])
    assert batch.samples == tuple(active) and metrics == {}
    assert batch.origins == (Origin.ON_POLICY, Origin.ON_POLICY)
    assert batch.weights[0] == pytest.approx(np.array([0, weight, weight]))
    assert batch.weights[1] == pytest.approx(weight * np.array([0, 1, 0, 1, 1, 1]))
    (full,), _ = controller.mini_batches(CTX, samples, samples, [], [])
    assert len(full.samples) == 3 and _loss(batch) == pytest.approx(_loss(full), rel=1e-6) != 0.0


def test_what_is_trained_are_the_active_samples_with_their_final_logprobs() -> None:
    samples = [make_sample("g", i, advantage=i - 1.0) for i in range(3)]
    active = with_old_logprobs(with_gradient(samples), [np.full(3, -2.0), np.full(3, -3.0)])
    (batch,), _ = _controller().mini_batches(CTX, samples, active, [], [])
    assert [s.old_logprobs.tolist() for s in batch.samples] == [[0, -2, -2], [0, -3, -3]]


def _seats(batches: Sequence[MiniBatch]) -> dict[str, int]:
    """Trajectory -> mini-batch; fails where one is in two."""
    found = {(str(s.trajectory_id), i) for i, batch in enumerate(batches) for s in batch.samples}
    assert len(dict(found)) == len(found)
    return dict(found)


def test_several_mini_batches_deal_every_trajectory_exactly_once() -> None:
    samples = [
        make_sample("g", i, segment=part, num_segments=2) for i in range(8) for part in (0, 1)
    ]
    controller = _controller(mini_batches=3)
    batches, _ = controller.mini_batches(CTX, samples, samples, [], [])
    dealt = Counter((s.trajectory_id, s.segment) for batch in batches for s in batch.samples)
    assert dealt == Counter((s.trajectory_id, s.segment) for s in samples)
    seats = _seats(batches)
    assert sorted(Counter(seats.values()).values()) == [2, 3, 3]
    for batch in batches:
        trajectories = len(batch.samples) // 2
        for weights in batch.weights:
            assert weights == pytest.approx(np.array([0, 1, 1]) / (10 * trajectories))
    backwards, _ = controller.mini_batches(CTX, samples[::-1], samples[::-1], [], [])
    assert _seats(backwards) == seats, "the order in which trajectories came in decides nothing"
    for other in (replace(CTX, step=4), replace(CTX, seed=8)):
        assert _seats(controller.mini_batches(other, samples, samples, [], [])[0]) != seats


def test_a_mini_batch_counts_its_own_samples_without_gradient() -> None:
    samples = [make_sample("g", i, advantage=float(i == 0)) for i in range(6)]
    batches, _ = _controller(mini_batches=2).mini_batches(CTX, samples, samples[:1], [], [])
    assert sorted(len(batch.samples) for batch in batches) == [0, 1]
    (weights,) = (w for batch in batches for w in batch.weights)
    assert weights == pytest.approx(np.array([0, 1, 1]) / (10 * 3))


@pytest.mark.parametrize("count", [1, 2])
def test_replayed_rows_are_scaled_and_normalised_by_their_own_counts(count: int) -> None:
    samples = [make_sample("new", i) for i in range(6)]
    update = _replay(4, weight=0.5)
    batches, metrics = _controller(mini_batches=count).mini_batches(
        CTX, samples, samples, [update], [[]]
    )
    assert metrics == {"replay/cov_dropped_fraction": 0.0}
    replayed = []
    for batch in batches:
        rows = [
            (sample, weights)
            for sample, weights, origin in zip(
                batch.samples, batch.weights, batch.origins, strict=True
            )
            if origin is Origin.REPLAY
        ]
        assert len(rows) == 4 // count and len(batch.samples) == 10 // count
        # gamma * tokens / (rows * norm_length), two tokens a row.
        total = sum(weights.sum() for _, weights in rows)
        assert total == pytest.approx(0.5 * 2 * len(rows) / (len(rows) * 10)) == 0.1
        replayed += [str(sample.trajectory_id) for sample, _ in rows]
    assert sorted(replayed) == [f"old/{i}" for i in range(4)]
    own = sum(
        w.sum()
        for b in batches
        for w, o in zip(b.weights, b.origins, strict=True)
        if o is Origin.ON_POLICY
    )
    assert own == pytest.approx(0.2 * count)


def test_replay_alone_makes_an_update() -> None:
    (batch,), _ = _controller().mini_batches(CTX, [], [], [_replay(2)], [[]])
    assert batch.origins == (Origin.REPLAY, Origin.REPLAY)


def test_covariance_dropped_tokens_have_weight_0_and_the_rest_keep_theirs() -> None:
    # Means -8 and 2: the covariances are 2.5, 2.5, -2.5 and 7.5; only the last is in the band.
    current = [np.array([0, -10.5, -10.5]), np.array([0, -10.5, -0.5])]
    rows = [make_sample("old", 0, advantage=1.0), make_sample("old", 1, advantage=3.0)]
    update = Update(
        samples=tuple(with_old_logprobs(rows, current)), origin=Origin.REPLAY, weight=0.5
    )
    controller = _controller(clip=CovarianceClipSection(fraction=0.02, low=5.0, high=60.0))
    (batch,), metrics = controller.mini_batches(CTX, [], [], [update], [current])
    kept = 0.5 / (2 * 10)
    assert batch.weights[0] == pytest.approx(np.array([0, kept, kept]))
    assert batch.weights[1] == pytest.approx(np.array([0, kept, 0]))
    assert metrics == {"replay/cov_dropped_fraction": 0.25}


def test_with_gradient_keeps_whole_trajectories() -> None:
    """In window mode a segment without advantage stays with the others of its trajectory."""
    samples = [
        make_sample("a", 0, segment=0, num_segments=2, advantage=0.0),
        make_sample("b", 0, advantage=0.0),
        make_sample("a", 0, segment=1, num_segments=2, advantage=-1.0),
        make_sample("b", 1, advantage=2.0),
    ]
    assert with_gradient(samples) == [samples[0], samples[2], samples[3]]
    assert with_gradient(samples[:2]) == []


def test_old_logprobs_are_0_outside_the_mask() -> None:
    sample = make_sample(mask=[0, 1, 0, 1])
    (made,) = with_old_logprobs([sample], [np.array([-9.0, -0.25, -9.0, -1.0])])
    assert made.old_logprobs.tolist() == [0, -0.25, 0, -1.0]
    assert made.old_logprobs.dtype == np.float32
    assert replace(made, old_logprobs=sample.old_logprobs) == sample


def _gap_sample(mask: Sequence[int], old: Sequence[float]) -> TrainSample:
    return make_sample(mask=mask, old_logprobs=np.array(old, np.float32))


def test_logprob_gap_by_hand() -> None:
    # The engine gave -0.5 on every masked token; what lies outside the mask does not count.
    samples = [_gap_sample([0, 1, 1], [-9, -0.25, -0.5]), _gap_sample([0, 1], [-9, -1.25])]
    assert logprob_gap(samples) == pytest.approx(
        {"mismatch/logprob_gap_mean": 1 / 3, "mismatch/max_logprob_gap": 0.75}
    )
    assert logprob_gap([]) == logprob_gap([_gap_sample([0, 0], [0, 0])]) == {}
