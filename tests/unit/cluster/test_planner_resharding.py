"""The closed form of a weight update against the plan that is executed."""

import pytest

from megatron_spear.cluster.planner.efficiency import CONSTANTS
from megatron_spear.cluster.planner.figures import machines, model
from megatron_spear.cluster.planner.machines import Ranks
from megatron_spear.cluster.planner.resharding import Resharding, reshard
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.plan import plan_resharding

DENSE = model(8, 512, 1536, 16, 8, 4096, head=32)
EXPERTS = model(8, 256, 128, 16, 4, 4096, experts=8, chosen=2, head=32)


@pytest.mark.parametrize(
    ("shape", "training", "tensor", "replicas"),
    [
        (DENSE, Ranks(data=4), 2, 1),
        (DENSE, Ranks(tensor=2, pipeline=2, data=2), 4, 4),
        (DENSE, Ranks(tensor=4, pipeline=4), 8, 2),
        (DENSE, Ranks(tensor=2, context=2, data=2), 16, 1),
        (EXPERTS, Ranks(data=8, expert=8), 2, 4),
        (EXPERTS, Ranks(pipeline=2, data=4, expert=4), 8, 2),
    ],
)
def test_bytes_are_those_of_the_plan(
    shape: ModelShape, training: Ranks, tensor: int, replicas: int
) -> None:
    layout = TrainingLayout(
        tensor=training.tensor,
        context=training.context,
        data=training.data,
        pipeline=training.pipeline,
        expert=training.expert,
    )
    plan = plan_resharding(shape, layout, EngineLayout(tensor=tensor, replicas=replicas))
    found = reshard(
        shape,
        training,
        machines(CONSTANTS),
        tensor=tensor,
        replicas=replicas,
        transport="sharded",
    )
    assert found.needed_bytes == pytest.approx(plan.needed.sum(), rel=1e-3)
    assert found.total_bytes == pytest.approx(plan.num_bytes.sum(), rel=1e-3)
    assert found.most_received_bytes == pytest.approx(plan.received.max(), rel=0.01)
    assert found.most_sent_bytes == pytest.approx(plan.sent.max(), rel=0.12)


def test_seconds_are_above_the_floor_and_fp8_halves_it() -> None:
    def update(fp8: bool, transport: str = "sharded") -> Resharding:
        return reshard(
            DENSE,
            Ranks(tensor=2, data=4),
            machines(CONSTANTS),
            tensor=2,
            replicas=4,
            transport=transport,  # type: ignore[arg-type]
            fp8=fp8,
        )

    bf16, fp8, whole = update(False), update(True), update(False, "whole")
    assert bf16.seconds > bf16.floor_s
    assert 0.5 < fp8.floor_s / bf16.floor_s < 0.75  # words stay in bf16
    assert whole.most_received_bytes == pytest.approx(2 * bf16.most_received_bytes, rel=0.01)
    assert whole.most_sent_bytes == pytest.approx(8 * bf16.most_sent_bytes, rel=0.01)
    assert whole.floor_s == pytest.approx(8 * bf16.floor_s, rel=0.01)
