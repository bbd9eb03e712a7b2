"""SPEAR's own schedule against recorded numbers."""

from collections.abc import Iterator

from megatron_spear.curriculum.schedules import cosine_warmup
from megatron_spear.testing.golden.compare import Case, Check, number_differences


def check_replay_weight(case: Case) -> Iterator[str]:
    params = case["params"]
    got = [
        params["replay_loss_coef"] * cosine_warmup(step, params["max_replay_loss_steps"])
        for step in case["inputs"]["global_steps"]
    ]
    yield from number_differences("weight", got, case["expected"]["weight"], "float64")


CHECKS: dict[str, Check] = {"sil_weight_schedule": check_replay_weight}
