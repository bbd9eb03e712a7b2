"""The corrected loss and gradient do not depend on how a step is cut up: micro-batches, padding,
order of rows, data-parallel ranks. In float64 on gloo ranks, to a relative 1e-10.

The policy is a table: logits = E[token] @ W, so that nothing but the method is compared. Log-probs
of the present weights come from the layout under test, as in training.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_spear.algorithms.logprobs import token_logprobs
from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.losses import (
    ClipCovLossSection,
    KlCovLossSection,
    KlSection,
    OffPolicyCorrectionSection,
)
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches, Plan
from megatron_spear.types import Coefficients, Origin, StepContext, TrainSample, Update

VOCAB, WIDTH, TEMPERATURE = 97, 8, 0.9
CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)
CLIP_COV = ClipCovLossSection(fraction=0.1, low=0.05, high=5.0)
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip_cov": (
        {"loss": CLIP_COV, "entropy_coef": 0.01, "kl": KlSection(coef=0.1, estimator="k3")},
        {"loss": CLIP_COV},
    ),
    "token-mean, corrected": (
        {
            "aggregation": "token-mean",
            "off_policy_correction": OffPolicyCorrectionSection(
                mode="sequence-mask", low=0.9, high=1.1
            ),
        },
        {"loss": KlCovLossSection(fraction=0.1)},
    ),
    "seq-mean-token-mean, kl_cov": (
        {"aggregation": "seq-mean-token-mean", "loss": KlCovLossSection(fraction=0.2)},
        {"loss": CLIP_COV, "ratio_filter": None},
    ),
}
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one micro-batch": (1, {"tokens_per_microbatch": 100_000}),
    "a micro-batch a row": (1, {"tokens_per_microbatch": 1}),
    "small micro-batches, padded": (1, {"tokens_per_microbatch": 90, "pad_multiple": 32}),
    "rows reversed": (1, {"tokens_per_microbatch": 90, "reverse": True}),
    "two ranks": (2, {"tokens_per_microbatch": 100_000}),
    "two ranks, lengths mixed": (2, {"tokens_per_microbatch": 90, "mix_lengths": True}),
    "four ranks, small, padded, reversed": (
        4,
        {"tokens_per_microbatch": 60, "pad_multiple": 8, "reverse": True},
    ),
}


def made_samples(group: str, count: int) -> list[TrainSample]:
    """Trajectories of one or two segments, lengths 3 to 40, log-probs near the policy's."""
    samples = []
    for member in range(count):
        draw = np.random.default_rng([ord(group[0]), member])
        parts = 1 + member % 2
        for segment in range(parts):
            length = int(draw.integers(3, 40))
            mask = draw.random(length) < 0.6
            mask[0] = False
            logprobs = draw.normal(-4.5, 0.4, length)
            sample = make_sample(
                group,
                member,
                mask=mask,
                segment=segment,
                num_segments=parts,
                token_ids=draw.integers(0, VOCAB, length).astype(np.int32),
                old_logprobs=np.where(mask, logprobs, 0).astype(np.float32),
                rollout_logprobs=np.where(mask, logprobs + draw.normal(0, 0.05, length), 0).astype(
                    np.float32
                ),
                advantages=np.where(mask, draw.normal(0.0, 1.0), 0).astype(np.float32),
            )
            samples.append(sample)
    return samples


class Table:
    """The policy on one rank, in float64."""

    def __init__(self, ranks: int, rank: int, cut: dict[str, Any]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64)
        self.output = 0.3 * torch.randn(WIDTH, VOCAB, generator=draw, dtype=torch.float64)
        self.embedding.requires_grad_()
        self.output.requires_grad_()
        self.settings = {"data_parallel": ranks}
        self.settings |= {k: v for k, v in cut.items() if k != "reverse"}
        self.ranks, self.rank = ranks, rank

    def logprobs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        """Of each sample, from this layout's micro-batches of all ranks."""
        weights = [np.zeros(len(s.token_ids)) for s in samples]
        packed = pack(samples, weights, [Origin.ON_POLICY] * len(samples), **self.settings)
        with torch.no_grad():
            values = [[self(b, False)[0] for b in rank] for rank in packed.micro_batches]
        return packed.unpack(values)

    def __call__(self, batch: Any, entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.embedding[batch.token_ids] @ self.output
        return token_logprobs(
            logits,
            batch.labels,
            temperature=TEMPERATURE,
            with_entropy=entropy,
            entropy_grad=entropy,
        )

    def gradient(self, batch: MiniBatch, loss: PolicyLoss) -> tuple[float, np.ndarray]:
        """(loss, gradient) of a mini-batch, added over this rank's micro-batches and all ranks."""
        packed = packed_batch(batch, **self.settings)
        total = torch.zeros((), dtype=torch.float64)
        for micro in packed.micro_batches[self.rank]:
            value, _ = loss(*self(micro, entropy=True), micro)
            value.backward()
            total += value.detach()
        flat = torch.cat([total[None], self.embedding.grad.ravel(), self.output.grad.ravel()])
        if self.ranks > 1:
            dist.all_reduce(flat)
        return flat[0].item(), flat[1:].numpy()


def run_cuts(cuts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank: each cut's and each loss's (loss, gradient, dropped tokens, selected)."""
    dist.init_process_group("gloo")
    return [{name: _one(cut, *sections) for name, sections in LOSSES.items()} for cut in cuts]


def method(algorithm: dict[str, Any], replay: dict[str, Any]) -> MiniBatches:
    """The rules of one of ``LOSSES``."""
    return MiniBatches(
        algorithm=AlgorithmSection(**({"norm_length": 50} | algorithm)),
        replay=ReplaySection(**replay),
    )


def planned(rules: MiniBatches, *, reverse: bool = False) -> Plan:
    """The one optimizer step of the made samples: new ones, and replayed ones of half weight."""
    own, old = made_samples("new", 14), made_samples("old", 10)
    if reverse:
        own, old = own[::-1], old[::-1]
    update = Update(samples=tuple(old), origin=Origin.REPLAY, weight=0.5)
    (plan,) = rules.plan(CTX, own, own, [update])
    return plan


def finished(rules: MiniBatches, plan: Plan, current: list[list[np.ndarray]]) -> MiniBatch:
    """The mini-batch, with log-probs of a reference near the old ones."""
    own = plan.parts[0].trained
    reference = {(s.trajectory_id, s.segment): s.old_logprobs - 0.1 for s in own}
    batch = rules.finish(CTX, plan, current, reference)
    assert set(batch.origins) == {Origin.ON_POLICY, Origin.REPLAY}
    return batch


def packed_batch(batch: MiniBatch, **settings: Any) -> PackedStep:
    """All its columns packed, in float64."""
    columns = {
        "regularizer_weight": batch.regularizer_weights,
        "ref_logprobs": batch.ref_logprobs,
        "kl_selected": batch.kl_selected,
    }
    return pack(
        batch.samples, batch.weights, batch.origins, columns=columns, dtype=np.float64, **settings
    )


def marks_of(batch: MiniBatch) -> dict[Any, tuple[list[int], list[int]]]:
    """By trajectory and segment: the tokens that are dropped, and those that KL-Cov selects."""
    rows = zip(batch.samples, batch.weights, batch.kl_selected, strict=True)
    return {
        (str(s.trajectory_id), s.segment): (
            np.flatnonzero(s.response_mask & (w == 0)).tolist(),
            np.flatnonzero(k).tolist(),
        )
        for s, w, k in rows
    }


def _one(cut: dict[str, Any], algorithm: dict[str, Any], replay: dict[str, Any]) -> Any:
    table = Table(dist.get_world_size(), dist.get_rank(), cut)
    rules = method(algorithm, replay)
    plan = planned(rules, reverse=cut.get("reverse", False))
    current = [
        table.logprobs(list(part.trained)) if rules.needs_current(part) else []
        for part in plan.parts
    ]
    batch = finished(rules, plan, current)
    loss = PolicyLoss.from_sections(rules.algorithm, rules.replay.loss, temperature=TEMPERATURE)
    return *table.gradient(batch, loss), marks_of(batch)


@cache
def results_of(ranks: int) -> dict[str, dict[str, Any]]:
    cuts = {name: cut for name, (count, cut) in CUTS.items() if count == ranks}
    found = run_ranks(run_cuts, ranks, list(cuts.values()), timeout_s=120)[0]
    return dict(zip(cuts, found, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cut", [name for name in CUTS if name != "one micro-batch"])
def test_the_cut_changes_nothing(cut: str, loss: str) -> None:
    value, gradient, marks = results_of(1)["one micro-batch"][loss]
    got = results_of(CUTS[cut][0])[cut][loss]
    assert abs(got[0] - value) < 1e-10 * abs(value)
    assert np.linalg.norm(got[1] - gradient) < 1e-10 * np.linalg.norm(gradient)
    assert got[2] == marks, "the same tokens are dropped and selected"


def test_what_is_compared_is_something() -> None:
    found = results_of(1)["one micro-batch"]
    for value, gradient, _ in found.values():
        assert abs(value) > 1e-4 and np.linalg.norm(gradient) > 1e-3
    assert sum(len(dropped) for dropped, _ in found["clip_cov"][2].values()) >= 4
    corrected = found["token-mean, corrected"][2]
    left = sum(trajectory.startswith("new") for trajectory, _ in corrected)
    assert 4 < left < len(made_samples("new", 14)) - 4, "the mask leaves out trajectories"
    assert sum(len(chosen) for _, chosen in corrected.values()) >= 4


def test_a_weight_by_micro_batch_would_be_seen() -> None:
    """The test's power: dividing by each micro-batch's own tokens moves the gradient."""
    own = made_samples("new", 14)
    gradients = []
    for limit in (100_000, 90):
        table = Table(1, 0, {"tokens_per_microbatch": limit})
        packed = pack(
            own,
            [s.response_mask.astype(float) for s in own],
            [Origin.ON_POLICY] * len(own),
            **table.settings,
        )
        loss = PolicyLoss.from_sections(
            AlgorithmSection(), ReplaySection().loss, temperature=TEMPERATURE
        )
        micros = packed.micro_batches[0]
        for micro in micros:
            weight = micro.token_weight / micro.token_weight.sum() / len(micros)
            value, _ = loss(*table(micro, True), replace(micro, token_weight=weight))
            value.backward()
        gradients.append(table.output.grad)
    assert torch.dist(*gradients) > 1e-3 * gradients[0].norm()
