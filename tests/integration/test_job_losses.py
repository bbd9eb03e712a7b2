"""Every loss and what is added to it, from settings to metrics, in whole runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Records = Callable[[Path], dict[int, dict[str, Any]]]
KL = ("algorithm.kl.coef=0.1", "algorithm.kl.estimator=k3", "policy.optimizer.lr=1e-3")


@pytest.mark.parametrize(
    ("settings", "named", "told"),
    [
        (
            (
                "algorithm.loss={type: clip_cov, low: 0.001, fraction: 0.1}",
                "algorithm.mini_batches=2",
                "algorithm.entropy_coef=0.01",
                "algorithm.off_policy_correction.mode=token-mask",
                "replay.loss={type: kl_cov, fraction: 0.1}",
                "replay.gradient_norms=true",
                *KL,
            ),
            "policy/cov_dropped_fraction replay/kl_selected_fraction loss/entropy loss/kl "
            "policy/ref_kl mismatch/masked_fraction mismatch/effective_sample_fraction "
            "optimizer/grad_norm_policy optimizer/grad_norm_replay replay/ratio_dropped_fraction",
            "new trajectories: clip_cov (clip_low 0.2, clip_high 0.28, dual_clip 10, "
            "fraction 0.1, low 0.001, high 60)",
        ),
        (
            ("algorithm.loss.type=gpg", "replay.loss.type=gpg", "replay.combine=separate_step"),
            "loss/policy loss/replay replay/ratio_mean",
            "replayed: gpg, in optimizer steps of their own",
        ),
        (
            (
                "algorithm.loss={type: kl_cov, fraction: 0.1}",
                "algorithm.off_policy_correction.mode=sequence-truncate",
                "replay.ratio_filter=null",
            ),
            "policy/kl_selected_fraction mismatch/truncated_fraction replay/cov_dropped_fraction",
            "new trajectories: kl_cov (fraction 0.1, coef 0.1)",
        ),
    ],
    ids=["clip_cov-kl_cov", "gpg-gpg", "kl_cov-clip_cov"],
)
def test_a_run_with_this_loss(
    settings: tuple[str, ...],
    named: str,
    told: str,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
) -> None:
    run_dir = tmp_path / "run"
    done = spear("train", f"run.dir={run_dir}", "run.steps=3", *settings)
    assert told in " ".join(done.out.split())
    seen: dict[str, float] = {}
    for record in training_records(run_dir).values():
        seen |= record
    assert {name for name in named.split() if name not in seen} == set()
    assert all(math.isfinite(value) for value in seen.values())


def test_a_resumed_run_has_the_same_reference(
    stopped_and_resumed: Callable[..., tuple[Path, Path]], training_records: Records
) -> None:
    whole, parted = stopped_and_resumed("run.steps=3", *KL, after=2)
    expected, found = training_records(whole)[3], training_records(parted)[3]
    assert found["policy/ref_kl"] == pytest.approx(expected["policy/ref_kl"], rel=1e-5) != 0.0
