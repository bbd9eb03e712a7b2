"""How old the tokens are: the docstring's numbers, and versions that cannot be."""

import numpy as np
import pytest

from megatron_spear.errors import EngineError
from megatron_spear.rollout.summary import lag_metrics
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.types import TrajectoryGroup, VersionSpan


def _group(*spans):
    size = sum(span.num_tokens for span in spans)
    turn = make_turn(num_tokens=size, versions=spans, action_tokens=np.arange(size, dtype=np.int32))
    return TrajectoryGroup(
        group_id="g",
        prompt=make_prompt("g"),
        members=(make_trajectory("g", 0, ((turn,),)),),
        failures=(),
    )


def test_by_hand():
    metrics = lag_metrics([_group(VersionSpan(6, 43), VersionSpan(7, 21))], 7, 2)
    assert metrics == {
        "rollout/lag_0_fraction": 21 / 64,
        "rollout/lag_1_fraction": 43 / 64,
        "rollout/lag_2_fraction": 0.0,
        "rollout/lag_mean": 43 / 64,
        "rollout/mixed_versions_fraction": 1.0,
    }


@pytest.mark.parametrize("version", [4, 8])
def test_tokens_of_weights_that_should_not_be_served_end_the_run(version):
    with pytest.raises(EngineError, match=f"version {version}; expected 5 to 7"):
        lag_metrics([_group(VersionSpan(version, 3))], 7, 2)


def test_nothing_played_has_no_age():
    assert lag_metrics([], 3, 1) == {}
