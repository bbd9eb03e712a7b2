"""The drift counts tokens of what is trained on that the engine did not see."""

import numpy as np
import pytest

from megatron_spear.config.rollout import RolloutSection
from megatron_spear.rollout import trajectory as trajectory_module
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.drift import SeenTokens, TokenDrift
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.summary import rollout_metrics
from megatron_spear.testing.fakes import CHATML, ScriptedEngine
from megatron_spear.testing.market_environment import MarketView
from megatron_spear.testing.templates import byte_tokenizer
from megatron_spear.types import Prompt, Segment, Status, Turn, VersionSpan

MARKET = "megatron_spear.testing.market_environment:MarketEnvironment"


def _tokens(*values):
    return np.asarray(values, np.int32)


def _segment(*turns):
    return Segment(
        turns=tuple(
            Turn(
                observation_tokens=_tokens(*seen),
                action_tokens=_tokens(*said),
                action_logprobs=np.zeros(len(said), np.float32),
                finish_reason="stop",
                versions=(VersionSpan(0, len(said)),),
            )
            for seen, said in turns
        )
    )


def _seen(*requests):
    seen = SeenTokens()
    for given, sampled, begins in requests:
        seen.note(_tokens(*given), _tokens(*sampled), begins_segment=begins)
    return seen


TWO_TURNS = (([5, 6], [9], True), ([5, 6, 9, 7], [8, 2], False))


@pytest.mark.parametrize(
    ("requests", "segments", "drift"),
    [
        (TWO_TURNS, [_segment(([5, 6], [9]), ([7], [8, 2]))], 0),
        (TWO_TURNS, [_segment(([5, 6], [9]), ([7], [8]))], 1),
        (TWO_TURNS, [_segment(([5, 6], [4]), ([7], [8, 3, 3]))], 3),
        (TWO_TURNS, [], 6),
        (TWO_TURNS, [_segment(([5, 6], [9]), ([7], [8, 2])), _segment(([1], [2]))], 2),
        # The second prompt does not begin with what came before it.
        ((TWO_TURNS[0], ([5, 6, 3, 7], [8, 2], False)), [_segment(([5, 6, 3, 7], [8, 2]))], 1),
        # A branch is a context of its own.
        (
            (TWO_TURNS[0], ([5, 7], [8], True)),
            [_segment(([5, 6], [9])), _segment(([5, 7], [8]))],
            0,
        ),
        ((([5, 6], [9], True),), [_segment(([5, 7], [9, 2]))], 2),
    ],
)
def test_by_hand(requests, segments, drift):
    assert _seen(*requests).drift(segments) == drift


def test_a_trajectory_that_drifted_is_counted_and_not_trained_on(monkeypatch):
    """A record that keeps another token than was sampled, as a defect of ours would."""
    real = Turn

    def changed(**fields):
        return real(**(fields | {"action_tokens": fields["action_tokens"] + 1}))

    renderer = ChatRenderer(byte_tokenizer(CHATML))
    answer = renderer.encode_action("42").tolist()
    engine = ScriptedEngine(lambda request: answer, max_context=10_000)
    section = RolloutSection(max_context=10_000)
    prompt = Prompt(prompt_id="p", env="market", metadata={"item": "fig"})
    with EnvironmentPool(MARKET, workers=1, deadline_s=20.0) as pool:
        rollouter = Rollouter(
            engine, pool, renderer, MarketView(), section, history="full", max_turns=1
        )
        settings = {"seed": (0,), "temperature": 1.0}
        (good,) = rollouter.collect_sync([prompt], group_size=2, **settings)
        monkeypatch.setattr(trajectory_module, "Turn", changed)
        (bad,) = rollouter.collect_sync([prompt], group_size=2, all_may_fail=True, **settings)
        with pytest.raises(TokenDrift, match=f"{len(answer)} tokens of trajectory 0/p/0 differ"):
            rollouter.collect_sync([prompt], group_size=1, **settings)
    assert len(good.members) == 2 and rollout_metrics([good])["rollout/token_drift"] == 0.0
    assert not bad.members and {f.status for f in bad.failures} == {Status.FAILED_ENGINE}
    assert rollout_metrics([good, bad])["rollout/token_drift"] == 2.0 * len(answer)
