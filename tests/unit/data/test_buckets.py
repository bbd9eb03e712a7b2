"""Prompts over buckets: each bucket in its own order, exactly once, the same after a resume."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_spear.data.buckets import BucketCursor
from megatron_spear.data.prompts import FreshPrompts, PoolPrompts, PromptSource
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.testing.hand_made import make_prompt
from megatron_spear.types import Prompt


def _sources() -> dict[str, PromptSource]:
    """An endless bucket and one of three prompts."""
    pool = [make_prompt(f"pool {i}") for i in range(3)]
    return {
        "fresh": FreshPrompts(lambda i: make_prompt(f"fresh {i}")),
        "pool": PoolPrompts(pool, seed=0),
    }


def _third(uniforms: np.ndarray) -> list[str]:
    """One draw in three from the pool."""
    return ["pool" if number < 1 / 3 else "fresh" for number in uniforms]


def _cursor(seed: int = 0) -> BucketCursor:
    return BucketCursor(_sources(), _third, seed)


def _of(kind: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if kind in prompt.prompt_id]


def test_each_bucket_goes_on_in_its_order() -> None:
    cursor = _cursor()
    taken = [prompt for count in (4, 0, 7, 1, 30) for prompt in cursor.take(count)]
    assert len(taken) == 42
    for kind, source in _sources().items():
        own = _of(kind, taken)
        assert own == [source.at(i) for i in range(len(own))] and len(own) > 5
        assert cursor.consumed[kind] == len(own)


def test_the_example_of_the_docstring() -> None:
    cursor = BucketCursor(_sources(), lambda uniforms: ["fresh", "pool", "fresh"], 0)
    assert [prompt.prompt_id for prompt in cursor.take(3)][::2] == [
        "prompt-fresh 0",
        "prompt-fresh 1",
    ]
    assert cursor.state_dict()["consumed"] == {"fresh": 2, "pool": 1}


def test_draws_are_uniform_and_new_for_every_take() -> None:
    seen: list[np.ndarray] = []

    def choose(uniforms: np.ndarray) -> list[str]:
        seen.append(uniforms)
        return ["fresh"] * len(uniforms)

    cursor = BucketCursor(_sources(), choose, 0)
    for _ in range(200):
        cursor.take(8)
    numbers = np.concatenate(seen)
    assert len(np.unique(numbers)) == 1600 and numbers.min() >= 0.0 and numbers.max() < 1.0
    # 1600 uniform numbers: the mean's standard error is 0.007, the share's below 1/4 0.011
    assert abs(numbers.mean() - 0.5) < 0.03 and abs((numbers < 0.25).mean() - 0.25) < 0.05


@pytest.mark.parametrize("stopped", [0, 1, 5, 12])
def test_a_resumed_cursor_goes_on_identically(stopped: int) -> None:
    whole, parted = _cursor(), _cursor()
    expected = [whole.take(4) for _ in range(stopped + 5)][stopped:]
    for _ in range(stopped):
        parted.take(4)
    resumed = _cursor()
    resumed.load_state_dict(json.loads(json.dumps(parted.state_dict())))
    assert [resumed.take(4) for _ in range(5)] == expected
    assert resumed.state_dict() == whole.state_dict()


def test_seeds_draw_differently() -> None:
    assert [_of("pool", _cursor(s).take(30)) for s in (0, 0)] == [
        _of("pool", _cursor().take(30))
    ] * 2
    assert len({len(_of("pool", _cursor(s).take(30))) for s in range(8)}) > 2


def test_positions_of_other_buckets_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\['fresh', 'wet'\], expected \['fresh', 'pool'\]"):
        _cursor().load_state_dict({**_cursor().state_dict(), "consumed": {"fresh": 3, "wet": 1}})


def test_a_bucket_with_other_prompts_is_refused() -> None:
    saved = _cursor().state_dict()
    fewer = {**_sources(), "pool": PoolPrompts([make_prompt(f"pool {i}") for i in (0, 2)], seed=0)}
    with pytest.raises(ConfigError, match="prompts to train on have changed"):
        BucketCursor(fewer, _third, 0).load_state_dict(saved)
    renamed = dict(zip(("fresh", "pond"), _sources().values(), strict=True))
    with pytest.raises(ConfigError, match="prompts to train on have changed"):
        BucketCursor(renamed, _third, 0).load_state_dict(saved)


def test_buckets_of_fresh_prompts_are_no_list() -> None:
    fresh = {"fresh": _sources()["fresh"]}
    assert BucketCursor(fresh, _third, 0).state_dict() == {"consumed": {"fresh": 0}}
