"""Which rows of a mini-batch are trained: those with a gradient, and it is that of all rows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from step_world import group, make_step, make_world

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.losses import ClipCovLossSection, KlCovLossSection, KlSection
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.loss_batch import LossFields
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches
from megatron_spear.types import Coefficients, Fate, Origin, StepContext, TrainSample, Update

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)
VOCAB = 8
CLIP_COV = ClipCovLossSection(fraction=0.02, low=0.5, high=9.0)
# Twelve tokens, of which KL-Cov selects the three of highest covariance.
KL_COV = KlCovLossSection(fraction=0.25)


GROUPS = (group("a", [True, False]), group("b", [True, True]))
"""The second compares equal rewards: nothing to learn."""


class _AllRows(MiniBatches):
    def has_gradient(self, *row: Any) -> bool:
        return True


def _rows() -> list[TrainSample]:
    """``up`` and ``down`` have an advantage, ``even`` has none, ``marked`` not even a response."""
    rows = [
        make_sample("up", mask=[0, 1, 1, 1, 1], advantage=1.0),
        make_sample("down", mask=[0, 1, 1, 1, 1], advantage=0.5),
        make_sample("even", mask=[0, 1, 1, 1, 1], advantage=0.0),
        make_sample("marked", mask=[0, 0, 0, 0, 0], advantage=0.0),
    ]
    old = {"up": -0.5, "down": -1.0, "even": -6.0, "marked": 0.0}
    return [
        replace(s, old_logprobs=np.where(s.response_mask, value, 0.0).astype(np.float32))
        for s, value in zip(rows, old.values(), strict=True)
    ]


def _batch(kind: type[MiniBatches], algorithm: dict[str, Any]) -> MiniBatch:
    section = AlgorithmSection(norm_length=10, **algorithm)
    rules = kind(algorithm=section, replay=ReplaySection(ratio_filter=None))
    (plan,) = rules.plan(CTX, _rows(), _rows(), [])
    reference = {(s.trajectory_id, s.segment): s.old_logprobs - 0.3 for s in _rows()}
    return rules.finish(CTX, plan, [[]], reference)


def _gradient(batch: MiniBatch, algorithm: dict[str, Any]) -> torch.Tensor:
    """Of the real loss, for a policy without context: theta ``[V]``."""
    theta = torch.linspace(-0.5, 0.5, VOCAB, dtype=torch.float64, requires_grad=True)
    table = torch.log_softmax(theta, 0)

    def joined(rows: Any) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(rows)).double()

    fields = LossFields(
        old_logprobs=joined([s.old_logprobs for s in batch.samples]),
        advantages=joined([s.advantages for s in batch.samples]),
        token_weight=joined(batch.weights),
        origin=torch.zeros(sum(len(s.token_ids) for s in batch.samples), dtype=torch.long),
        kl_selected=joined(batch.kl_selected).bool(),
        regularizer_weight=joined(batch.regularizer_weights),
        ref_logprobs=joined(batch.ref_logprobs),
    )
    loss = PolicyLoss.from_sections(
        AlgorithmSection(**algorithm), ReplaySection().loss, temperature=1.0
    )
    tokens = joined([s.token_ids for s in batch.samples]).long()
    entropy = -(table.exp() * table).sum().expand(len(tokens))
    loss(table[tokens], entropy, fields)[0].backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize(
    ("algorithm", "trained"),
    [
        ({"loss": CLIP_COV}, ["up", "down"]),
        ({"loss": KL_COV}, ["up", "down", "even"]),
        ({"loss": CLIP_COV, "entropy_coef": 0.01}, ["up", "down", "even"]),
        ({"loss": CLIP_COV, "kl": KlSection(coef=0.1)}, ["up", "down", "even"]),
        ({"entropy_coef": 0.01}, ["up", "down", "even"]),
    ],
    ids=["clip_cov", "kl_cov", "entropy", "kl", "entropy alone"],
)
def test_rows_without_a_gradient_are_left_out_and_the_gradient_is_that_of_all(
    algorithm: dict[str, Any], trained: list[str]
) -> None:
    batch, full = (_batch(kind, algorithm) for kind in (MiniBatches, _AllRows))
    assert [s.trajectory_id.group for s in batch.samples] == trained
    assert len(full.samples) == 4
    assert batch.metrics == full.metrics, "covariance is that of all rows"
    gradient = _gradient(batch, algorithm)
    torch.testing.assert_close(gradient, _gradient(full, algorithm), rtol=1e-12, atol=0.0)
    assert gradient.any()


def test_what_covariance_chose_are_tokens_of_all_rows() -> None:
    assert _batch(MiniBatches, {"loss": CLIP_COV}).metrics["policy/cov_dropped_fraction"] == 1 / 12
    selected = _batch(MiniBatches, {"loss": KL_COV}).kl_selected
    assert [int(row.sum()) for row in selected] == [0, 0, 3]


def test_a_replayed_row_whose_tokens_are_all_dropped_is_left_out() -> None:
    """Covariances 0.2 and 0.2 of the first row are in the band, -0.2 and 0.6 of the second not."""
    loss = ClipCovLossSection(fraction=1.0, low=0.1, high=0.3)
    rules = MiniBatches(
        algorithm=AlgorithmSection(), replay=ReplaySection(loss=loss, ratio_filter=None)
    )
    current = [np.array([0.0, -0.2, -0.2]), np.array([0.0, -0.2, -1.8])]
    rows = tuple(
        make_sample(name, advantage=advantage, old_logprobs=values.astype(np.float32))
        for name, advantage, values in zip("ab", (2.0, 1.0), current, strict=True)
    )
    (plan,) = rules.plan(CTX, [], [], [Update(samples=rows, origin=Origin.REPLAY)])
    batch = rules.finish(CTX, plan, [[], current], {})
    assert batch.metrics == {"replay/cov_dropped_fraction": 0.5}
    assert batch.samples == rows[1:]


def test_a_step_with_covariance_reads_all_rows_and_trains_those_with_an_advantage() -> None:
    world = make_world(*GROUPS)
    metrics = make_step(world, loss=CLIP_COV).run(CTX).metrics
    ((asked, _),), (trained,) = world.asked, world.trained
    assert len(asked.lengths) == 4 and len(trained.lengths) == 2
    assert metrics["train/num_rows"] == 2 and metrics["work/train_tokens"] == 6
    assert {s.trajectory_id.group for s in world.hook.samples} == {"a"}
    ((micro,),) = trained.micro_batches
    weights = micro.token_weight[micro.token_weight > 0]
    assert weights.tolist() == pytest.approx([1 / 40] * 4), "all four trajectories count"


def test_a_mini_batch_of_equal_rewards_alone_is_no_optimizer_step() -> None:
    world = make_world(GROUPS[1])
    metrics = make_step(world, loss=CLIP_COV).run(CTX).metrics
    assert world.trained == [] and metrics["train/num_updates"] == 0


@pytest.mark.parametrize("algorithm", [{}, {"loss": CLIP_COV}, {"entropy_coef": 0.01}])
def test_a_prompt_of_equal_rewards_is_filtered_whatever_the_loss(algorithm: dict[str, Any]) -> None:
    report = make_step(make_world(*GROUPS), **algorithm).run(CTX)
    assert [prompt.fate for prompt in report.consumed] == [Fate.TRAINED, Fate.FILTERED]
    assert report.metrics["prompts/trained"] == report.metrics["prompts/filtered"] == 1


def test_with_an_entropy_bonus_hooks_see_and_the_step_trains_all_rows() -> None:
    world = make_world(*GROUPS)
    make_step(world, loss=CLIP_COV, entropy_coef=0.01).run(CTX)
    assert len(world.hook.samples) == len(world.trained[0].lengths) == 4
