"""Each intrinsic reward by hand, on the same turns; with mu it is added where it is used."""

from typing import Any

import pytest

from megatron_spear.config.load import load_config
from megatron_spear.config.method import (
    DistinctCallsSection,
    IntrinsicSection,
    PlainIntrinsicSection,
    RewardSection,
)
from megatron_spear.errors import ConfigError
from megatron_spear.rewards.compose import trajectory_reward
from megatron_spear.rewards.intrinsic import intrinsic_reward
from megatron_spear.testing.hand_made import make_trajectory, make_turn
from megatron_spear.types import ToolCall, Turn

GAME = [*map(make_turn, ["look", "look", "take pen 1"]), make_turn("fly", valid=False)]


def _plain(kind: Any) -> PlainIntrinsicSection:
    return PlainIntrinsicSection(type=kind)


def _calling(*codes: str, valid: bool = True) -> Turn:
    """A turn with a successful call for each code."""
    calls = tuple(ToolCall(name="python", arguments=code, succeeded=True) for code in codes)
    return Turn(
        observation_tokens=GAME[0].observation_tokens,
        action_tokens=GAME[0].action_tokens,
        action_logprobs=GAME[0].action_logprobs,
        finish_reason="stop",
        versions=GAME[0].versions,
        valid=valid,
        tool_calls=calls,
    )


@pytest.mark.parametrize(
    ("section", "lost", "won"),
    [
        (DistinctCallsSection(), 0.02, 0.02),
        (DistinctCallsSection(per_call=0.5, max=0.7), 0.7, 0.7),
        (_plain("official_linear"), 0.4, 0.4),
        (_plain("official_qwen3"), 0.4, 1.0),
        (_plain("official_steps"), 0.4, 0.4),
        (_plain("none"), 0.0, 0.0),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_a_game_of_four_turns(section: IntrinsicSection, lost: float, won: float) -> None:
    assert intrinsic_reward(GAME, 0.0, section) == pytest.approx(lost)
    assert intrinsic_reward(GAME, 1.0, section) == pytest.approx(won)
    assert intrinsic_reward(GAME * 5, -1.0, section) <= 1.0


def test_turns_with_several_calls_and_with_none() -> None:
    """Three calls in one turn, two of them alike, and a turn of words."""
    turns = [_calling("f()", "f() ", "g()"), _calling(), _calling("f()")]
    assert intrinsic_reward(turns, 0.0, DistinctCallsSection(per_call=0.1)) == pytest.approx(0.1)
    wide = DistinctCallsSection(per_call=0.1, max=1.0)
    assert intrinsic_reward(turns, 0.0, wide) == pytest.approx(0.2)
    assert intrinsic_reward(turns, 0.0, _plain("official_linear")) == pytest.approx(0.2)
    assert intrinsic_reward(turns, 0.0, _plain("official_steps")) == pytest.approx(0.3)
    assert intrinsic_reward([_calling()] * 9, 1.0, _plain("official_qwen3")) == 0.0


def test_a_call_in_a_form_that_was_not_asked_for_earns_nothing() -> None:
    turns = [_calling("f()", valid=False)]
    assert intrinsic_reward(turns, 0.0, DistinctCallsSection()) == 0.0
    assert intrinsic_reward(turns, 0.0, _plain("official_linear")) == pytest.approx(0.1)


def test_the_part_is_weighed_when_it_is_used() -> None:
    section = RewardSection(success=10.0, intrinsic=_plain("official_steps"))
    reward = trajectory_reward(make_trajectory("g", 0, [GAME], won=True), section)
    assert [reward.total(mu) for mu in (1.0, 0.5, 0.0)] == pytest.approx([10.4, 10.2, 10.0])


def test_settings_choose_it_and_have_no_others() -> None:
    chosen = load_config(None, ["reward.intrinsic.type=official_linear"]).reward.intrinsic
    assert chosen == _plain("official_linear")
    own = load_config(None, ["reward.intrinsic.per_call=0.2"]).reward.intrinsic
    assert own == DistinctCallsSection(per_call=0.2)
    for override, told in (
        ("reward.intrinsic={type: none, max: 1}", "reward.intrinsic.type=none has no such key"),
        ("reward.intrinsic.type=offical_steps", "'distinct_calls', or one of 'official_linear'"),
        ("reward.intrinsic_max=1", "no such key"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_config(None, [override])
        assert told in str(refused.value)
