"""The rollouter with a scripted engine and the corridor: statuses, tokens, seeds, failures."""

import asyncio
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from megatron_spear.config.environments.base import WindowHistory
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.errors import EngineError, EnvironmentsLost, StopRequested
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.summary import rollout_metrics
from megatron_spear.testing.fakes import CHATML, ScriptedEngine, answer_text, word_tokenizer
from megatron_spear.types import Prompt, Status, ToolCall

WORDS = "walk to place left right nothing happens you are at crash exit calls 0 1 2 3 4 5 6 7 8"
TOKENIZER = word_tokenizer(WORDS.split(), CHATML)
RIGHT, LEFT, CRASH, EXIT, CALLS = (
    answer_text(TOKENIZER, word).tolist() for word in ("right", "left", "crash", "exit", "calls")
)
TOY = "megatron_spear.testing.toy_environment:FaultyCorridor"
SYSTEM = {"role": "system", "content": "walk"}


@pytest.fixture(scope="module")
def pool():
    with EnvironmentPool(TOY, workers=1, deadline_s=20.0) as pool:
        yield pool


@pytest.fixture
def rollouter(pool):
    def make(engine, *, history="full", max_turns=10, **settings):
        rollout = RolloutSection(**settings)
        renderer, view = ChatRenderer(TOKENIZER), alfworld_view("compact")
        return Rollouter(
            engine, pool, renderer, view, rollout, history=history, max_turns=max_turns
        )

    return make


def _prompts(count=1, **metadata):
    metadata = {"length": 4, "start": 0, **metadata}
    return [
        Prompt(prompt_id=f"p{i}", env="corridor", messages=(SYSTEM,), metadata=metadata)
        for i in range(count)
    ]


def _collect(rollouter, prompts, group_size=1, seed=(0, 1), temperature=1.0, progress=None):
    return rollouter.collect_sync(
        prompts, group_size=group_size, seed=seed, temperature=temperature, progress=progress
    )


def _text(request):
    return TOKENIZER.decode(request.token_ids)


def test_a_won_game_in_full_mode(rollouter):
    engine = ScriptedEngine(lambda request: RIGHT)
    (group,) = _collect(rollouter(engine), _prompts())
    (member,) = group.members
    assert (member.status, member.won, member.env_reward) == (Status.COMPLETED, True, 1.0)
    assert group.group_id == "0.1/p0" and str(member.id) == "0.1/p0/0"
    (segment,) = member.segments
    assert [turn.action_text for turn in segment.turns] == ["right"] * 3
    assert [turn.anchor for turn in segment.turns] == [f"you are at place {i}" for i in range(3)]
    walked = ToolCall(name="walk", arguments="right", succeeded=True)
    assert all(turn.valid and turn.tool_calls == (walked,) for turn in segment.turns)
    assert segment.response_mask.sum() == 6 and segment.rollout_logprobs.sum() == -3.0
    # One session, kept over the turns and released at the end.
    assert {request.session for request in engine.requests} == {"0.1/p0/0"} == engine.released
    # The whole context is what the template gives for the whole chat.
    messages = [SYSTEM, {"role": "user", "content": "walk to place 3 you are at place 0"}]
    for place in (1, 2):
        messages += [{"role": "assistant", "content": "right"}]
        messages += [{"role": "user", "content": f"you are at place {place}"}]
    expected = [*ChatRenderer(TOKENIZER).initial(messages), *RIGHT]
    assert segment.token_ids.tolist() == expected


def test_a_tool_call_that_is_none_is_the_environments_fault(rollouter):
    answers = iter([CALLS, RIGHT, RIGHT, RIGHT])
    engine = ScriptedEngine(lambda request: next(answers))
    (group,) = _collect(rollouter(engine, max_slots=1), _prompts(), group_size=2)
    (failed,) = group.failures
    assert failed.status is Status.FAILED_TOOL and len(group.members) == 1
    assert "expected dicts of name, arguments and succeeded" in failed.info["error"]


def test_each_prompt_starts_with_the_turn_before(rollouter):
    answers = [LEFT, RIGHT[:-1] * 20, RIGHT, RIGHT]
    engine = ScriptedEngine(lambda request: answers[request.seed[-1]])
    (group,) = _collect(rollouter(engine, max_turns=4, max_new_tokens=5), _prompts())
    turns = group.members[0].turns
    assert [turn.finish_reason for turn in turns] == ["stop", "length", "stop", "stop"]
    assert [turn.valid for turn in turns] == [False, False, True, True]
    assert [[call.succeeded for call in turn.tool_calls] for turn in turns[1:3]] == [
        [False],
        [True],
    ]
    requests = engine.requests
    for before, after, turn in zip(requests, requests[1:], turns, strict=False):
        known = np.concatenate([before.token_ids, turn.action_tokens])
        assert np.array_equal(after.token_ids[: len(known)], known)
    assert group.members[0].segments[0].num_tokens == len(requests[-1].token_ids) + 2
    # The cut answer was closed with the end token before the next observation.
    assert turns[2].observation_tokens[0] == TOKENIZER.eos_token_id


def test_a_turn_keeps_its_text_and_whether_that_is_void(rollouter):
    end = RIGHT[-1:]
    answers = [RIGHT, end, [*LEFT[:-1], *RIGHT], RIGHT]
    engine = ScriptedEngine(lambda request: answers[request.seed[-1]])
    (group,) = _collect(rollouter(engine, max_turns=4), _prompts())
    turns = group.members[0].turns
    assert [turn.text.split() for turn in turns[:3]] == [["right"], [], ["left", "right"]]
    assert [turn.void for turn in turns[:3]] == [False, True, False]


def test_window_mode_renders_each_turn_anew(rollouter):
    engine = ScriptedEngine(lambda request: RIGHT)
    make = rollouter(engine, history=WindowHistory(window=1))
    (group,) = _collect(make, _prompts(length=5))
    (member,) = group.members
    assert [len(segment.turns) for segment in member.segments] == [1] * 4
    for segment, request in zip(member.segments, engine.requests, strict=True):
        assert np.array_equal(segment.turns[0].observation_tokens, request.token_ids)
    last = _text(engine.requests[-1])
    for shown in ("walk to place 4", "you are at place 2", "right", "you are at place 3"):
        assert shown in last
    assert "place 1" not in last and last.count("right") == 1
    sessions = [request.session for request in engine.requests]
    assert len(set(sessions)) == 4 and set(sessions) == engine.released


def test_turn_limit(rollouter):
    (group,) = _collect(rollouter(ScriptedEngine(lambda request: LEFT), max_turns=3), _prompts())
    (member,) = group.members
    assert member.status is Status.TRUNCATED_TURNS and not member.won
    assert [turn.valid for turn in member.turns] == [False] * 3


@pytest.mark.parametrize("limited_by", ["settings", "engine"])
def test_a_full_context_keeps_the_cut_action_but_does_not_play_it(rollouter, limited_by):
    first = len(ChatRenderer(TOKENIZER).initial([SYSTEM, _first_message()]))
    limit = first + 1
    engine = ScriptedEngine(
        lambda request: RIGHT, max_context=limit if limited_by == "engine" else 512
    )
    settings = {} if limited_by == "engine" else {"max_context": limit}
    (group,) = _collect(rollouter(engine, **settings), _prompts())
    (member,) = group.members
    assert member.status is Status.TRUNCATED_LENGTH
    (turn,) = member.turns
    assert turn.action_tokens.tolist() == RIGHT[:1]
    assert not turn.valid and turn.tool_calls == () and member.env_reward == 0.0


def test_no_room_for_another_turn(rollouter):
    first = len(ChatRenderer(TOKENIZER).initial([SYSTEM, _first_message()]))
    engine = ScriptedEngine(lambda request: RIGHT, max_context=first + 4)
    (group,) = _collect(rollouter(engine), _prompts())
    assert group.members[0].status is Status.TRUNCATED_LENGTH
    assert len(group.members[0].turns) == 1 and group.members[0].turns[0].valid


def test_a_first_prompt_that_does_not_fit_is_an_error(rollouter):
    with pytest.raises(EngineError, match="max_context"):
        _collect(rollouter(ScriptedEngine(lambda request: RIGHT), max_context=5), _prompts())


def _first_message():
    return {"role": "user", "content": "walk to place 3 you are at place 0"}


def test_seeds_do_not_depend_on_layout(rollouter):
    def seeds(prompts, group_size):
        engine = ScriptedEngine(lambda request: RIGHT)
        _collect(rollouter(engine), prompts, group_size, seed=(7, 3))
        return {(r.session, r.seed[-1]): r.seed for r in engine.requests}

    prompts = _prompts(3)
    together = seeds(prompts, 2)
    apart = seeds(prompts[::-1][:2], 2) | seeds(prompts[:1], 1)
    assert all(together[key] == seed for key, seed in apart.items())
    assert len(set(together.values())) == len(together) == 3 * 2 * 3
    assert all(seed[:2] == (7, 3) for seed in together.values())


def test_a_group_plays_one_task_and_repeated_prompts_are_groups_of_their_own(rollouter):
    engine = ScriptedEngine(lambda request: RIGHT)
    (prompt,) = _prompts(start=None, length=9)
    groups = _collect(rollouter(engine), [prompt, prompt], group_size=4)
    assert [group.group_id for group in groups] == ["0.1/p0", "0.1/p0#1"]
    for group in groups:
        assert len({member.turns[0].anchor for member in group.members}) == 1
    assert len({request.seed for request in engine.requests}) == len(engine.requests)


@pytest.mark.parametrize(
    ("failing", "status"),
    [("engine", Status.FAILED_ENGINE), ("crash", Status.FAILED_TOOL), ("bug", Status.FAILED_PARSE)],
)
def test_a_failure_costs_one_trajectory(rollouter, failing, status):
    def answer(request):
        member, turn = request.seed[-2:]
        if (member, turn) != (1, 1):
            return RIGHT
        if failing == "engine":
            raise EngineError("out of luck")
        return CRASH if failing == "crash" else ["not a token"]

    engine = ScriptedEngine(answer)
    finished = []
    (group,) = _collect(rollouter(engine), _prompts(), group_size=3, progress=finished.append)
    assert [member.id.member for member in group.members] == [0, 2]
    (failure,) = group.failures
    assert failure.status is status and failure.id.member == 1
    assert failure.info["error"]
    assert str(failure.id) in engine.released
    assert finished == [1, 2, 3]
    metrics = rollout_metrics([group])
    assert metrics["rollout/failed"] == 1 and metrics["rollout/success"] == 1.0


def test_where_all_may_fail_the_failures_come_back(rollouter):
    def answer(request):
        raise EngineError("out of luck")

    play, settings = rollouter(ScriptedEngine(answer)), {"seed": (0, 1, 1), "temperature": 1.0}
    with pytest.raises(EngineError, match="out of luck"):
        play.collect_sync(_prompts(), group_size=2, **settings)
    (group,) = play.collect_sync(_prompts(), group_size=2, all_may_fail=True, **settings)
    assert group.group_id == "0.1.1/p0" and not group.members
    assert [failure.status for failure in group.failures] == [Status.FAILED_ENGINE] * 2


def _contents(groups):
    """Everything of the members but the time they took."""
    return {
        str(member.id): (
            member.status,
            member.env_reward,
            member.info,
            [replace(turn, time_s=0.0, **_as_lists(turn)) for turn in member.turns],
        )
        for group in groups
        for member in group.members
    }


def _as_lists(turn):
    names = ("observation_tokens", "action_tokens", "action_logprobs")
    return {name: getattr(turn, name).tolist() for name in names}


def _walk(request):
    """Left and right by the request's seed, so that the attempts differ."""
    return LEFT if sum(request.seed) % 3 == 0 else RIGHT


@pytest.mark.parametrize("at", [2, 9, 20])
def test_killing_the_only_worker_costs_one_trajectory_at_most(rollouter, pool, at):
    def collect(kill_at):
        def answer(request):
            if len(engine.requests) == kill_at:
                os.kill(pool._links[0]._process.pid, signal.SIGKILL)
            return _walk(request)

        engine = ScriptedEngine(answer)
        groups = _collect(rollouter(engine), _prompts(2, length=7), group_size=4)
        return groups, len(engine.requests)

    undisturbed, asked = collect(0)
    disturbed, asked_again = collect(at)
    assert asked > 40 and asked_again <= asked, "a token was sampled anew"
    expected, found = _contents(undisturbed), _contents(disturbed)
    assert len(expected) == 8 and len(found) >= 7
    assert all(expected[name] == content for name, content in found.items())


@pytest.mark.parametrize("deadly", [{1}, {0, 2}])
def test_an_action_that_kills_the_only_worker_costs_its_own_trajectory(rollouter, deadly):
    def answer(request):
        member, turn = request.seed[-2:]
        return EXIT if member in deadly and turn == 2 else _walk(request)

    (spared,) = _collect(rollouter(ScriptedEngine(_walk)), _prompts(length=7), group_size=4)
    (group,) = _collect(rollouter(ScriptedEngine(answer)), _prompts(length=7), group_size=4)
    assert {failure.id.member for failure in group.failures} == deadly
    assert {failure.status for failure in group.failures} == {Status.FAILED_TOOL}
    assert all("exit status 3" in failure.info["error"] for failure in group.failures)
    expected, found = _contents([spared]), _contents([group])
    assert len(found) == 4 - len(deadly)
    assert all(expected[name] == content for name, content in found.items())


def test_workers_that_cannot_be_kept_alive_end_the_run():
    renderer, view = ChatRenderer(TOKENIZER), alfworld_view("compact")
    with EnvironmentPool(TOY, workers=1, deadline_s=20.0, max_restarts=2) as pool:
        rollouter = Rollouter(
            ScriptedEngine(_walk), pool, renderer, view, RolloutSection(), history="full",
            max_turns=3,
        )  # fmt: skip
        prompts = [*_prompts(first="exit"), *_prompts()]
        with pytest.raises(EnvironmentsLost, match="ended 3 times in a row"):
            _collect(rollouter, prompts, group_size=4)


def test_stop_requests_pass_through_and_release_everything(rollouter):
    engine = ScriptedEngine(lambda request: LEFT)

    def stop(finished):
        raise StopRequested("enough")

    with pytest.raises(StopRequested):
        _collect(rollouter(engine, max_turns=5), _prompts(3), group_size=2, progress=stop)
    assert {request.session for request in engine.requests} <= engine.released


def test_cancellation_passes_through(rollouter):
    async def run():
        engine = ScriptedEngine(lambda request: LEFT)
        play = rollouter(engine, max_turns=10_000, max_context=10_000).collect(
            _prompts(), group_size=2, seed=(0,), temperature=1.0
        )
        engine.max_context = 10_000
        await asyncio.wait_for(play, timeout=0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_metrics_by_hand(rollouter):
    """Two members: one wins in 3 turns, one is cut off after 4, two tokens a turn."""
    engine = ScriptedEngine(lambda request: (RIGHT, LEFT)[request.seed[-2]])
    groups = _collect(rollouter(engine, max_turns=4), _prompts(), group_size=2)
    metrics = rollout_metrics(groups)
    expected = {
        "rollout/success": 0.5,
        "rollout/turns_mean": 3.5,
        "rollout/action_tokens": 14.0,
        "rollout/valid_fraction": 3 / 7,
        "rollout/tool_calls_mean": 3.5,
        "rollout/tool_success_fraction": 3 / 7,
        "rollout/truncated_fraction": 0.5,
        "rollout/context_full_fraction": 0.0,
        "rollout/failed": 0.0,
        "rollout/num_trajectories": 2.0,
        "rollout/env_reward": 0.5,
        "rollout/branches": 0.0,
        "rollout/token_drift": 0.0,
    }
    assert expected == {name: metrics[name] for name in expected}
    lengths = [member.segments[0].num_tokens for member in groups[0].members]
    assert metrics["rollout/context_tokens_mean"] == sum(lengths) / 2
    assert metrics["rollout/max_context"] == max(lengths)
    assert rollout_metrics([]) == {
        "rollout/failed": 0.0,
        "rollout/token_drift": 0.0,
        "rollout/num_trajectories": 0.0,
    }


def test_collects_of_one_loop_share_the_slots_in_the_order_they_came(rollouter):
    order = []

    def answer(request):
        order.append(request.seed[1])
        return RIGHT

    play = rollouter(ScriptedEngine(answer), max_slots=2)
    prompts = _prompts(3)

    async def both():
        settings = {"group_size": 1, "temperature": 1.0}
        first = play.collect(prompts, seed=(0, 1), **settings)
        second = play.collect(prompts, seed=(0, 2), **settings)
        return await asyncio.gather(first, second)

    one, two = asyncio.run(both())
    assert len(one) == len(two) == 3 and not any(group.failures for group in one + two)
    assert order.index(2) > order.count(1) * 2 / 3, "two slots: the first collect's go first"
    assert order[-1] == 2
