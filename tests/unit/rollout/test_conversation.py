"""Where a context ends and another begins, in rollouts and in demonstrations alike."""

import numpy as np
import pytest

from megatron_spear.config.environments.base import WindowHistory
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.conversation import Conversation
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.summary import rollout_metrics
from megatron_spear.testing.fakes import CHATML, ScriptedEngine
from megatron_spear.testing.market_environment import MarketEnvironment, MarketView
from megatron_spear.testing.templates import byte_tokenizer, trl_template
from megatron_spear.trainer.demonstrations import to_samples
from megatron_spear.types import Prompt, Status

MARKET = "megatron_spear.testing.market_environment:MarketEnvironment"
OPTIONS = {"item": "fig", "count": 4, "price": 43}
THOUGHT = "<think>\nlet me see\n</think>\n\n"
PRICE = '<tool_call>\n{"name": "price", "arguments": {"item": "fig"}}\n</tool_call>'
TWICE = f"{PRICE}\n{PRICE}"
ASKS = [THOUGHT + PRICE, THOUGHT + TWICE]
SLIPS = [THOUGHT + "It is a lot.", THOUGHT + PRICE]


@pytest.fixture(scope="module")
def pool():
    with EnvironmentPool(MARKET, workers=1, deadline_s=20.0) as pool:
        yield pool


def _renderer(name):
    template = CHATML if name == "chatml" else trl_template(name)
    if template is None:
        pytest.skip("the package trl is not installed (pip install --no-deps trl)")
    return ChatRenderer(byte_tokenizer(template))


def _encoded(renderer, answers):
    return [renderer.encode_action(answer).tolist() for answer in answers]


def _play(pool, renderer, history, answers, **settings):
    """(group, requests) of one attempt that answers with these tokens."""
    engine = ScriptedEngine(lambda request: answers[request.seed[-1]], max_context=100_000)
    section = RolloutSection(max_context=100_000, max_new_tokens=500)
    rollouter = Rollouter(
        engine, pool, renderer, MarketView(), section, history=history, max_turns=len(answers)
    )
    prompt = Prompt(prompt_id="p", env="market", metadata=OPTIONS)
    (group,) = rollouter.collect_sync([prompt], group_size=1, seed=(0,), temperature=1.0)
    assert {request.session for request in engine.requests} == engine.released
    return group, engine.requests


@pytest.mark.parametrize(
    ("template", "history", "answers", "turns_of_segments"),
    [
        ("qwen3", "full", SLIPS, [3]),
        # Thoughts since the last user's message stay; those before it are dropped.
        ("qwen3", "rendered", ASKS, [3]),
        ("qwen3", "rendered", SLIPS, [1, 2]),
        ("qwen3_training", "rendered", SLIPS, [3]),
        ("qwen2_5", "rendered", SLIPS, [3]),
        ("chatml", "rendered", SLIPS, [3]),
        ("chatml", WindowHistory(window=1), ASKS, [1, 1, 1]),
    ],
)
def test_turns_fall_into_segments(pool, template, history, answers, turns_of_segments):
    renderer = _renderer(template)
    answers = [*answers, "42"]
    group, requests = _play(pool, renderer, history, _encoded(renderer, answers))
    (member,) = group.members
    assert member.status is Status.COMPLETED
    assert [len(segment.turns) for segment in member.segments] == turns_of_segments
    assert [turn.text for turn in member.turns] == answers
    # What is trained on is what the engine was given and sampled.
    seen = [
        [*request.token_ids, *turn.action_tokens]
        for request, turn in zip(requests, member.turns, strict=True)
    ]
    last = np.cumsum(turns_of_segments) - 1
    assert [s.token_ids.tolist() for s in member.segments] == [seen[number] for number in last]
    sessions = [request.session for request in requests]
    assert len(set(sessions)) == len(turns_of_segments)
    metrics = rollout_metrics([group])
    assert metrics["rollout/branches"] == len(turns_of_segments) - 1
    assert metrics["rollout/token_drift"] == 0.0


def test_a_branch_is_rendered_whole_and_the_thought_is_gone(pool):
    renderer = _renderer("qwen3")
    _, requests = _play(pool, renderer, "rendered", _encoded(renderer, [*SLIPS, "42"]))
    first, second, third = (renderer.decode_action(request.token_ids) for request in requests)
    assert '"multiply"' in first and second.startswith(first)
    assert "let me see" not in second and "It is a lot." in second
    assert third.startswith(second) and third.count("let me see") == 1
    assert third.count("<tool_response>\n43\n</tool_response>") == 1


def test_tokens_that_do_not_survive_a_round_trip_branch(pool):
    renderer = _renderer("chatml")
    # The same text, a character a token.
    spelled = [t for c in "It is a lot." for t in renderer.encode_action(c)[:-1].tolist()]
    assert spelled != renderer.encode_action("It is a lot.")[:-1].tolist()
    answers = [[*spelled, renderer.end_token_id], *_encoded(renderer, ["42"])]
    group, requests = _play(pool, renderer, "rendered", answers)
    assert [len(segment.turns) for segment in group.members[0].segments] == [1, 1]
    assert requests[0].session != requests[1].session
    group, _ = _play(pool, renderer, "full", answers)
    assert len(group.members[0].segments) == 1


@pytest.mark.parametrize("history", ["full", "rendered"])
def test_an_answer_cut_by_its_length_is_closed_and_extended(history):
    renderer = _renderer("chatml")
    conversation = Conversation(renderer, MarketView(), (), history)
    first = conversation.next_prompt("What?", {})
    assert first.begins_segment and first.token_ids.tolist() == first.new_tokens.tolist()
    cut = renderer.encode_action("It is")[:-1]
    conversation.answered(cut, "It is")
    second = conversation.next_prompt("Go on.", {})
    assert not second.begins_segment and second.new_tokens[0] == renderer.end_token_id
    assert second.token_ids.tolist() == [*first.token_ids, *cut, *second.new_tokens]


def test_replies_of_parallel_calls_are_messages_of_their_own(pool):
    renderer = _renderer("qwen3")
    group, requests = _play(pool, renderer, "full", _encoded(renderer, [TWICE, "172"]))
    assert group.members[0].won and group.members[0].env_reward == 1.0
    reply = "<tool_response>\n43\n</tool_response>"
    said = renderer.decode_action(requests[1].token_ids)
    assert said.endswith(f"user\n{reply}\n{reply}\nassistant\n")
    assert [call.succeeded for call in group.members[0].turns[0].tool_calls] == [True, True]


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
@pytest.mark.parametrize("history", ["full", "rendered", WindowHistory(window=2)])
@pytest.mark.parametrize("answers", [ASKS, SLIPS])
def test_demonstrations_have_the_segments_of_a_rollout(pool, template, history, answers):
    renderer = _renderer(template)
    answers = [*answers, "172"]
    group, _ = _play(pool, renderer, history, _encoded(renderer, answers))
    environment, turns = MarketEnvironment(), []
    observation, info = environment.reset(seed=0, options=OPTIONS)
    for answer in answers:
        turns.append(DemonstrationTurn(observation, answer, True, info))
        result = environment.step(answer)
        observation, info = result.observation, result.info
    rows = to_samples(
        Demonstration(tuple(turns)),
        "sft/0",
        renderer,
        MarketView(),
        history=history,
        observation_weight=0.0,
        max_tokens=100_000,
    )
    segments = group.members[0].segments
    assert len(rows) == len(segments)
    for (sample, _), segment in zip(rows, segments, strict=True):
        assert sample.token_ids.tolist() == segment.token_ids.tolist()
        assert sample.response_mask.tolist() == segment.response_mask.tolist()
