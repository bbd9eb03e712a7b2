"""The official mode's optimizer steps: the loss of each is the official functions' own number."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.official.filters import shuffled
from megatron_spear.algorithms.official.losses import OfficialClip, clip_cov
from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.loss_batch import LossFields
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches
from megatron_spear.trainer.official_mini_batches import OfficialMiniBatches
from megatron_spear.types import Coefficients, Origin, StepContext, TrainSample, Update

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)
GAMMA, WIDTH = 0.5, 6
CLIP = ClipCovLossSection(fraction=0.2, low=0.01, high=5.0)
KNOBS = OfficialClip(clip_low=0.2, clip_high=0.28, fraction=0.2, low=0.01, high=5.0)


def _rules(micro_batch_rows: int, kind: type[MiniBatches] = OfficialMiniBatches) -> MiniBatches:
    algorithm = AlgorithmSection(
        compat="official",
        official={"micro_batch_rows": micro_batch_rows},
        loss=CLIP,
        norm_length=WIDTH,
    )
    replay = ReplaySection(loss=CLIP, combine="separate_step", ratio_filter=None)
    return kind(algorithm=algorithm, replay=replay)


def _rows(group: str, count: int) -> list[TrainSample]:
    """Rows of one observation and 2 to 6 response tokens; every third has no advantage."""
    rows = []
    for member in range(count):
        draw = np.random.default_rng([len(group), member])
        mask = np.array([0, *[1] * int(draw.integers(2, WIDTH + 1))])
        old = np.where(mask, draw.normal(-1.0, 0.5, len(mask)), 0.0).astype(np.float32)
        advantage = draw.normal() if member % 3 else 0.0
        rows.append(make_sample(group, member, mask=mask, advantage=advantage, old_logprobs=old))
    return rows


def _present(row: TrainSample) -> np.ndarray:
    """float64 ``[L]``: log-probs of the present weights, drawn by the trajectory."""
    draw = np.random.default_rng([len(row.trajectory_id.group), row.trajectory_id.member, 1])
    return row.old_logprobs + draw.normal(0.0, 0.3, len(row.token_ids))


def _batches(rules: MiniBatches, new: Sequence[TrainSample], old: Update) -> list[MiniBatch]:
    return [
        rules.finish(
            CTX,
            plan,
            [
                [_present(s) for s in part.trained] if rules.needs_current(part) else []
                for part in plan.parts
            ],
            {},
        )
        for plan in rules.plan(CTX, new, new, [old])
    ]


def _loss(batch: MiniBatch, rules: MiniBatches) -> float:
    """What training sums up, at the present log-probs."""
    joined: dict[str, Any] = {
        "old_logprobs": [s.old_logprobs for s in batch.samples],
        "advantages": [s.advantages for s in batch.samples],
        "token_weight": batch.weights,
    }
    fields = {k: torch.from_numpy(np.concatenate(v)).double() for k, v in joined.items()}
    origin = np.concatenate(
        [
            np.full(len(s.token_ids), int(o is Origin.REPLAY))
            for s, o in zip(batch.samples, batch.origins, strict=True)
        ]
    )
    loss = PolicyLoss.from_sections(rules.algorithm, rules.replay.loss, temperature=1.0)
    logprobs = torch.from_numpy(np.concatenate([_present(s) for s in batch.samples]))
    return loss(logprobs, None, LossFields(**fields, origin=torch.from_numpy(origin)))[0].item()


def _official(
    rows: Sequence[TrainSample],
    covariance_at: Sequence[np.ndarray],
    micro: int,
    origin: Origin,
) -> float:
    """The official clip_cov of each micro-batch, scaled; drops decided at ``covariance_at``."""
    total = 0.0
    for number, start in enumerate(range(0, len(rows), micro)):
        own = rows[start : start + micro]
        at = covariance_at[start : start + micro]
        drops = clip_cov(*_padded(own, at), KNOBS, aggregation="token-mean")[1]
        order = shuffled(
            np.arange(len(drops.eligible)), 7, 3, origin.value, "official clip_cov", number
        )
        dropped = drops.eligible[torch.from_numpy(order)[: drops.quota]]
        kept = _padded(own, [_present(s) for s in own])
        kept[3][dropped[:, 0], dropped[:, 1]] = 0.0
        loss, _ = clip_cov(
            *kept,
            replace(KNOBS, low=np.inf),
            aggregation="seq-mean-token-sum-norm",  # no drop
        )
        total += loss.loss.item() * len(own) / len(rows)
    return total


def _padded(rows: Sequence[TrainSample], logprobs: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """[log-probs, old log-probs, advantages, mask], each ``[B, WIDTH]``."""
    columns = (
        logprobs,
        [s.old_logprobs for s in rows],
        [s.advantages for s in rows],
        [s.response_mask for s in rows],
    )
    result = []
    for column in columns:
        out = torch.zeros(len(rows), WIDTH, dtype=torch.float64)
        for index, values in enumerate(column):
            out[index, : len(values) - 1] = torch.from_numpy(np.asarray(values, np.float64)[1:])
        result.append(out)
    return result


@pytest.mark.parametrize("micro", [3, 4, 100])
def test_new_rows_and_then_replayed_rows_have_the_official_loss(micro: int) -> None:
    """On-policy: drops by old log-probs, which are the present ones before the first update."""
    new, old = _rows("new", 9), _rows("replayed", 7)
    rules = _rules(micro)
    update = Update(samples=tuple(old), origin=Origin.REPLAY, weight=GAMMA)
    first, second = _batches(rules, new, update)
    assert (first.scheduled, second.scheduled) == (True, False)
    assert len(first.samples) == 9, "rows without advantage are trained too"
    expected = _official(new, [s.old_logprobs for s in new], micro, Origin.ON_POLICY)
    assert _loss(first, rules) == pytest.approx(expected, rel=1e-9)
    expected = _official(old, [_present(s) for s in old], micro, Origin.REPLAY) * GAMMA
    assert _loss(second, rules) == pytest.approx(expected, rel=1e-9)
    assert second.metrics["replay/cov_dropped_fraction"] > 0


def test_defects_11_and_12_the_micro_batch_decides() -> None:
    """Size and dropped tokens of the official loss follow the cut; the corrected mode has none."""
    update = Update(samples=tuple(_rows("replayed", 8)), origin=Origin.REPLAY, weight=GAMMA)

    def sizes(kind: type[MiniBatches]) -> list[tuple[float, int]]:
        found = []
        for micro in (2, 4, 8):
            batch = _batches(_rules(micro, kind), _rows("new", 8), update)[1]
            dropped = sum(
                int((s.response_mask & (w == 0)).sum())
                for s, w in zip(batch.samples, batch.weights, strict=True)
            )
            found.append((float(max(w.max() for w in batch.weights)), dropped))
        return found

    official = sizes(OfficialMiniBatches)
    weights = [weight for weight, _ in official]
    assert weights == pytest.approx([GAMMA / WIDTH * micro / 8 for micro in (2, 4, 8)])
    assert len({dropped for _, dropped in official}) > 1
    corrected = sizes(MiniBatches)
    assert len(set(corrected)) == 1
    assert corrected[0][0] == pytest.approx(GAMMA / WIDTH / 8)
