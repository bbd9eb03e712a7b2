"""Prompt order: every prompt once an epoch, a function of the position alone."""

from dataclasses import replace

import pytest

from megatron_spear.data.prompts import CheckedPrompts, FreshPrompts, PoolPrompts, PromptCursor
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.testing.hand_made import make_prompt
from megatron_spear.types import Prompt

POOL = [make_prompt(str(i)) for i in range(7)]


def _ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_every_prompt_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    source = PoolPrompts(POOL, seed=0)
    epochs = [[source.at(7 * epoch + i) for i in range(7)] for epoch in range(20)]
    assert all(sorted(_ids(epoch)) == sorted(_ids(POOL)) for epoch in epochs)
    assert len({tuple(_ids(epoch)) for epoch in epochs}) > 15


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    ahead, back = PoolPrompts(POOL, seed=3), PoolPrompts(POOL, seed=3)
    expected = [ahead.at(i) for i in range(30)]
    assert [back.at(i) for i in reversed(range(30))] == expected[::-1]
    other = PoolPrompts(POOL, seed=4)
    assert [other.at(i) for i in range(30)] != expected


@pytest.mark.parametrize("stopped", [0, 1, 6, 7, 8, 20])
def test_a_resumed_cursor_goes_on_identically(stopped: int) -> None:
    straight = PromptCursor(PoolPrompts(POOL, seed=1))
    expected = straight.take(stopped + 15)[stopped:]
    cursor = PromptCursor(PoolPrompts(POOL, seed=1))
    cursor.take(stopped)
    resumed = PromptCursor(PoolPrompts(POOL, seed=1))
    resumed.load_state_dict(cursor.state_dict())
    assert resumed.take(10) + resumed.take(5) == expected
    assert resumed.state_dict() == straight.state_dict()
    assert straight.state_dict()["consumed"] == stopped + 15


@pytest.mark.parametrize(
    "changed",
    [
        POOL[1:],
        [*POOL, make_prompt("7")],
        POOL[::-1],
        [*POOL[:6], replace(POOL[6], metadata={"problem": "another"})],
    ],
)
def test_a_cursor_does_not_go_on_in_another_list(changed: list[Prompt]) -> None:
    cursor = PromptCursor(PoolPrompts(POOL, seed=1))
    cursor.take(3)
    other = PromptCursor(CheckedPrompts(PoolPrompts(changed, seed=1), lambda prompt: None))
    told = (
        r"prompts to train on have changed: their sha256 was \w{16}, is now \w{16},.*put the files"
    )
    with pytest.raises(ConfigError, match=told):
        other.load_state_dict(cursor.state_dict())
    assert other.consumed == 0
    with pytest.raises(ConfigError, match=r"was \w{16}, is now None"):
        PromptCursor(FreshPrompts(lambda i: POOL[i])).load_state_dict(cursor.state_dict())


def test_fresh_prompts_are_no_list() -> None:
    assert PromptCursor(FreshPrompts(lambda i: POOL[i])).state_dict() == {"consumed": 0}


def test_prompts_that_cannot_be_told_apart_are_refused_at_the_start() -> None:
    odd = [replace(POOL[0], metadata={"seen": {1, 2}})]
    with pytest.raises(DataError, match=r"prompt prompt-0: its metadata are no plain values"):
        PromptCursor(PoolPrompts(odd, seed=0))


def test_a_cursor_asks_for_each_position_once() -> None:
    asked: list[int] = []

    def make(index: int) -> Prompt:
        asked.append(index)
        return make_prompt(f"fresh {index}")

    cursor = PromptCursor(FreshPrompts(make))
    assert _ids(cursor.take(2) + cursor.take(0) + cursor.take(3))[-1] == "prompt-fresh 4"
    assert asked == [0, 1, 2, 3, 4]


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(DataError, match="got 0 prompts"):
        PoolPrompts([], seed=0)


def test_a_checked_prompt_is_checked_once() -> None:
    seen: list[str] = []
    prompts = CheckedPrompts(PoolPrompts(POOL, seed=0), lambda p: seen.append(p.prompt_id))
    drawn = [prompts.at(i).prompt_id for i in range(14)]
    assert sorted(seen) == sorted(set(drawn)) and seen == drawn[:7]
