"""Defects of the released code around the optimizer step, and what happens here instead.

The numbers are those of docs/official-mode.md; other defects have tests beside their own stage.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.aggregation import token_weights
from megatron_spear.algorithms.filters import keep_groups
from megatron_spear.algorithms.official.filters import keep_spread_blocks
from megatron_spear.algorithms.policy_loss import PolicyLoss, finish_metrics
from megatron_spear.algorithms.ratio_filter import within_ratio
from megatron_spear.config.check import check_config
from megatron_spear.config.load import load_config
from megatron_spear.config.losses import (
    ClipCovLossSection,
    ClippedLossSection,
    RatioFilterSection,
)
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.data.packing import pack
from megatron_spear.errors import ConfigError
from megatron_spear.replay.official import OfficialReplayBuffer, OfficialReplayRules, OfficialRows
from megatron_spear.testing.hand_made import make_group, make_sample
from megatron_spear.testing.loss_batch import LossFields
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches
from megatron_spear.types import Coefficients, Origin, StepContext, TrainSample, Update

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.0, replay_weight=1.0),
    seed=7,
)
VOCAB, LEARNING_RATE = 12, 0.01


def test_defect_01_blocks_of_reordered_rows_mix_prompts() -> None:
    """Sorted by length, rows of an easy and a hard prompt share blocks: their spread is nobody's.

    Prompt a is always solved, b never; each has short and long answers.
    """
    rewards = [1.0, 1.0, 0.0, 0.0]  # a, a, b, b
    by_length = [0, 2, 1, 3]
    mixed = keep_spread_blocks([rewards[i] for i in by_length], 2, 1.0)[1]
    assert mixed["filter/spread_mean"] == pytest.approx(0.5**0.5), "looks as if both taught much"
    _, found = keep_groups([make_group("a", [1.0, 1.0]), make_group("b", [0.0, 0.0])], 1.0, 0.0)
    assert found["filter/spread_mean"] == 0.0, "nothing to learn in either"


@pytest.mark.parametrize("combine", ["separate_step", "joint"])
def test_defect_02_adam_undoes_the_weight_of_a_separate_step(combine: str) -> None:
    """How far replay of weight 0.001 moves the policy, as a share of what weight 1 does.

    In optimizer steps of its own a thousandth of the gradient still moves it a third as far, since
    Adam steps on at nearly full size; in the shared step the move is as small as the weight.
    """
    nothing, small, full = (_trained(combine, weight) for weight in (0.0, 0.001, 1.0))
    share = float(torch.dist(small, nothing) / torch.dist(full, nothing))
    assert share > 0.2 if combine == "separate_step" else share < 0.01


def _trained(combine: str, gamma: float, steps: int = 5) -> torch.Tensor:
    """A policy without context, theta ``[V]``, after a few steps of new and replayed samples."""
    rules = MiniBatches(
        algorithm=AlgorithmSection(norm_length=4),
        replay=ReplaySection(loss=ClippedLossSection(), ratio_filter=None, combine=combine),
    )
    theta = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([theta], lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        extra = (
            [Update(samples=tuple(_drawn("old", step, theta)), origin=Origin.REPLAY, weight=gamma)]
            if gamma
            else []
        )
        new = _drawn("new", step, theta)
        for plan in rules.plan(CTX, new, new, extra):
            batch = rules.finish(CTX, plan, [[] for _ in plan.parts], {})
            adam.zero_grad()
            _loss(batch, theta, rules).backward()
            adam.step()
    return theta.detach()


def _drawn(kind: str, step: int, theta: torch.Tensor) -> list[TrainSample]:
    """Four samples; new ones praise or blame drawn tokens, replayed ones praise the last few."""
    draw = np.random.default_rng([step, len(kind), ord(kind[0])])
    tokens = draw.integers(0, VOCAB, (4, 4)) if kind == "new" else draw.integers(8, VOCAB, (4, 4))
    advantages = draw.normal(size=4) if kind == "new" else np.full(4, 0.5)
    logprobs = torch.log_softmax(theta.detach(), 0).numpy()
    return [
        replace(
            make_sample(f"{kind}{step}", i, mask=[1] * 4, advantage=float(a)),
            token_ids=row.astype(np.int32),
            old_logprobs=logprobs[row].astype(np.float32),
        )
        for i, (row, a) in enumerate(zip(tokens, advantages, strict=True))
    ]


def _loss(batch: MiniBatch, theta: torch.Tensor, rules: MiniBatches) -> torch.Tensor:
    tokens = np.concatenate([s.token_ids for s in batch.samples])
    origin = np.repeat([int(o is Origin.REPLAY) for o in batch.origins], 4)
    fields = LossFields(
        old_logprobs=_joined([s.old_logprobs for s in batch.samples]),
        advantages=_joined([s.advantages for s in batch.samples]),
        token_weight=_joined(batch.weights),
        origin=torch.from_numpy(origin),
    )
    loss = PolicyLoss.from_sections(rules.algorithm, rules.replay.loss, temperature=1.0)
    return loss(torch.log_softmax(theta, 0)[torch.from_numpy(tokens).long()], None, fields)[0]


def _joined(rows: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(rows)).double()


def test_defect_03_replay_reads_its_own_covariance_settings() -> None:
    """A fraction for replay alone drops replayed tokens; the official math tree never read it, so
    the official mode refuses to pass over it."""
    rules = MiniBatches(
        algorithm=AlgorithmSection(loss=ClipCovLossSection(fraction=0.0, low=-9, high=9)),
        replay=ReplaySection(
            loss=ClipCovLossSection(fraction=0.5, low=-9, high=9), ratio_filter=None
        ),
    )
    new = [make_sample("new", i, advantage=i - 0.5) for i in range(4)]
    old = tuple(make_sample("old", i, advantage=i + 0.5) for i in range(4))
    (plan,) = rules.plan(CTX, new, new, [Update(samples=old, origin=Origin.REPLAY)])
    current = [[s.old_logprobs for s in old] if rules.needs_current(p) else [] for p in plan.parts]
    metrics = rules.finish(CTX, plan, current, {}).metrics
    dropped = {o: metrics.get(f"{o}/cov_dropped_fraction") for o in ("policy", "replay")}
    assert dropped == {"policy": 0.0, "replay": 0.5}
    official = [
        "algorithm.compat=official",
        "algorithm.official.tree=math",
        "algorithm.loss={type: clip_cov, fraction: 0.0002, low: 1, high: 5}",
        "replay.combine=separate_step",
        "replay.ratio_filter=null",
    ]
    (line,) = check_config(load_config(None, [*official, "replay.loss.type=clip_cov"]), 1)
    assert "its replay reads algorithm.loss" in line
    same = "replay.loss={type: clip_cov, fraction: 0.0002, low: 1, high: 5}"
    assert check_config(load_config(None, [*official, same]), 1) == []


def test_defect_05_a_short_history_loses_nothing_that_is_stored() -> None:
    """A history of two groups forgets steps whose rows are still in the buffer; the released code
    then looks these up and ends with KeyError. Repaired in both modes."""
    rules = OfficialReplayRules(
        tree="agent", capacity=4, max_history_groups=2, tolerate_steps=10, group_size=2
    )
    buffer = OfficialReplayBuffer(rules)
    for step in range(1, 9):
        buffer.add(
            step,
            OfficialRows(
                row_ids=np.array([f"{step}a", f"{step}b"]),
                uid=np.array([f"g{step}"] * 2),
                traj_uid=np.array([f"{step}a", f"{step}b"]),
                rewards=np.array([1.0, 0.0]),
                has_tool_call=np.array([True, True]),
                mask=np.ones((2, 1)),
                advantages=np.array([[0.5], [-0.5]]),
            ),
        )
    assert min(buffer.steps) < min(step for step, _ in buffer.group_means)
    release = buffer.take(lambda count: np.arange(count))
    assert release is not None and len(release.rows.row_ids) == 4


def test_defect_13_old_rows_cannot_overflow() -> None:
    """A token 200 nats more likely than when it was stored: inf officially, bounded here; for a
    negative advantage the dual clip bounds it too."""
    fields = LossFields(
        old_logprobs=torch.tensor([-1000.0, -1000.0], dtype=torch.float64),
        advantages=torch.tensor([-1.0, -1.0], dtype=torch.float64),
        token_weight=torch.ones(2, dtype=torch.float64),
        origin=torch.ones(2, dtype=torch.long),
    )
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    clip = ClipCovLossSection()
    official = PolicyLoss.from_sections(AlgorithmSection(compat="official"), clip, temperature=1.0)
    assert official(logprobs, None, fields)[0].item() == np.inf
    loss, _ = PolicyLoss.from_sections(AlgorithmSection(), clip, temperature=1.0)(
        logprobs, None, fields
    )
    assert loss.item() == pytest.approx(2 * 10.0), "dual_clip 10 times advantage, twice"
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [0.0, 0.0]


def test_defect_14_silent_replay_is_counted_and_left_out() -> None:
    """Tokens above the upper clip with a positive advantage have no gradient: their share is a
    metric, and a trajectory that is like that as a whole is not trained on."""
    old, present = torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -1.0])
    fields = LossFields(
        old_logprobs=old,
        advantages=torch.ones(2),
        token_weight=torch.ones(2),
        origin=torch.ones(2, dtype=torch.long),
    )
    loss = PolicyLoss.from_sections(AlgorithmSection(), ClippedLossSection(), temperature=1.0)
    metrics = finish_metrics(loss(present, None, fields)[1])
    assert metrics["replay/zero_gradient_fraction"] == 0.5
    far = make_sample(mask=[1, 1, 1], old_logprobs=np.full(3, -3.0, np.float32))
    near = make_sample(member=1, mask=[1, 1, 1], old_logprobs=np.full(3, -1.1, np.float32))
    kept, found = within_ratio([far, near], [np.full(3, -1.0)] * 2, RatioFilterSection())
    assert kept == [False, True] and found["replay/ratio_dropped_fraction"] == 0.5


@pytest.mark.parametrize("data_parallel", [1, 2, 3])
def test_defect_19_rows_are_never_doubled_to_fill_a_batch(data_parallel: int) -> None:
    """Seven rows over any number of ranks: each once, what fills up weighs nothing."""
    samples = [make_sample("g", i, mask=[0, 1, 1, 1]) for i in range(7)]
    weights = token_weights(samples, "token-mean", 1)
    packed = pack(
        samples,
        weights,
        (Origin.ON_POLICY,) * 7,
        data_parallel=data_parallel,
        tokens_per_microbatch=9,
        pad_multiple=8,
    )
    counts = Counter(i for rank in packed.members for micro in rank for i in micro)
    assert counts == dict.fromkeys(range(7), 1)
    total = sum(float(b.token_weight.sum()) for rank in packed.micro_batches for b in rank)
    assert total == pytest.approx(1.0)


def test_defect_22_a_replay_step_trains_the_replayed_rows() -> None:
    rules = MiniBatches(
        algorithm=AlgorithmSection(),
        replay=ReplaySection(combine="separate_step", loss=ClippedLossSection(), ratio_filter=None),
    )
    new = [make_sample("new", i) for i in range(3)]
    old = tuple(make_sample("old", i) for i in range(2))
    plans = rules.plan(CTX, new, new, [Update(samples=old, origin=Origin.REPLAY)])
    trained = [[s.trajectory_id.group for p in plan.parts for s in p.trained] for plan in plans]
    assert trained == [["new"] * 3, ["old"] * 2]


@pytest.mark.parametrize("knob", ["trajectory_score_threshold", "enable_trajectory_posadv"])
def test_defect_28_a_knob_nobody_reads_is_refused(knob: str) -> None:
    with pytest.raises(ConfigError, match=knob):
        load_config(None, [f"replay.{knob}=1"])
