"""Thoughts that the chat template opens are judged, shown and demonstrated as the policy's own."""

import contextlib

import pytest

from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn
from megatron_spear.envs.plain_view import PlainView
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.testing.fakes import CHATML, ScriptedEngine
from megatron_spear.testing.market_environment import MarketEnvironment, MarketView
from megatron_spear.testing.templates import byte_tokenizer, trl_template
from megatron_spear.testing.toy_environment import CorridorEnvironment
from megatron_spear.trainer.demonstrations import to_samples
from megatron_spear.types import Prompt, Status

HEAD = "<|im_start|>assistant\n{% endif %}"
OPENED = CHATML.replace(HEAD, HEAD.replace("{%", "<think>\n{%"))
CLOSED = CHATML.replace(HEAD, HEAD.replace("{%", "<think>\n\n</think>\n\n{%"))
# As R1-Distill's: after the reply of a tool the answer goes on where it was.
SILENT = OPENED.replace(
    "{% if add_generation_prompt", "{% if messages[-1].role != 'tool' and add_generation_prompt"
)
PURCHASE = {"item": "fig", "count": 4, "price": 43}
PRICE = '<tool_call>\n{"name": "price", "arguments": {"item": "fig"}}\n</tool_call>'
RENDERERS = {
    name: ChatRenderer(byte_tokenizer(template))
    for name, template in (("policy", CHATML), ("template", OPENED))
}


class _Pool:
    """An environment pool without processes."""

    def __init__(self, make):
        self._make = make

    @contextlib.asynccontextmanager
    async def slot(self):
        yield self._make()

    async def reset(self, slot, *, seed, options):
        return slot.reset(seed=seed, options=options)

    async def step(self, slot, action):
        return slot.step(action)


def _play(opened_by, make, view, bodies, *, options, history="full", cut=False):
    """The attempt that thinks and answers with ``bodies``, each behind ``<think>\\n``.

    ``cut`` = the one answer has no end: its length is all that there is room for.
    """
    renderer = RENDERERS[opened_by]
    head = "<think>\n" if opened_by == "policy" else ""
    answers = [renderer.encode_action(head + body).tolist() for body in bodies]
    answers = [answers[0][:-1]] if cut else answers
    section = RolloutSection(
        max_context=100_000, max_new_tokens=len(answers[0]) if cut else 500, max_slots=1
    )
    rollouter = Rollouter(
        ScriptedEngine(lambda request: answers[request.seed[-1]], max_context=100_000),
        _Pool(make),
        renderer,
        view,
        section,
        history=history,
        max_turns=len(answers),
    )
    prompt = Prompt(prompt_id="p", env="market", metadata=options)
    (group,) = rollouter.collect_sync([prompt], group_size=1, seed=(0,), temperature=1.0)
    (member,) = group.members
    assert [turn.action_tokens.tolist() for turn in member.turns] == answers, "sampled, kept"
    return member


def _judged(member):
    turns = [(t.valid, t.void, t.tool_calls, t.action_text) for t in member.turns]
    return member.status, member.won, member.env_reward, turns


@pytest.mark.parametrize(
    ("make", "view", "bodies", "options", "valid", "won"),
    [
        (
            *(MarketEnvironment, MarketView()),
            ["ask</think>" + PRICE, PRICE, "172", "</think>172"],
            *(PURCHASE, [True, False, False, True], True),
        ),
        (
            *(CorridorEnvironment, alfworld_view("official")),
            ["I go.</think><action>right</action>", "I go. <action>right</action>"],
            *({"length": 4, "start": 0}, [True, False], False),
        ),
        (
            *(CorridorEnvironment, PlainView(tag="answer")),
            ["I go.</think><answer>right</answer>", "say <answer>right</answer>, no"],
            *({"length": 3, "start": 0}, [True, False], False),
        ),
    ],
)
def test_a_thought_is_judged_alike_whoever_opened_it(make, view, bodies, options, valid, won):
    members = [_play(by, make, view, bodies, options=options) for by in ("policy", "template")]
    assert _judged(members[0]) == _judged(members[1])
    assert [turn.valid for turn in members[1].turns] == valid and members[1].won is won


@pytest.mark.parametrize("opened_by", ["policy", "template"])
def test_a_thought_that_is_cut_is_no_answer(opened_by):
    member = _play(opened_by, MarketEnvironment, MarketView(), ["172"], options=PURCHASE, cut=True)
    (turn,) = member.turns
    assert turn.finish_reason == "length" and member.status is Status.TRUNCATED_TURNS
    assert (turn.valid, turn.void, member.won) == (False, True, False)


@pytest.mark.parametrize("opened_by", ["policy", "template"])
def test_a_conversation_rendered_anew_has_the_opened_thoughts(opened_by):
    bodies = ["ask</think>" + PRICE, "so</think>172"]
    member = _play(
        opened_by, MarketEnvironment, MarketView(), bodies, options=PURCHASE, history="rendered"
    )
    (segment,) = member.segments
    assert RENDERERS[opened_by].text_of(segment.token_ids).count("<think>\nask</think>") == 1


def _opening_after(template, roles):
    renderer = ChatRenderer(byte_tokenizer(template))
    chat = [{"role": role, "content": "a <think>"} for role in roles]
    answer = renderer.encode_action("b")
    return renderer.opening(renderer.initial(chat[:1])), renderer.opening(
        renderer.extend(answer, chat[1:])
    )


@pytest.mark.parametrize(
    ("template", "openings"),
    [
        (CHATML, ("", "")),
        (OPENED, ("<think>\n", "<think>\n")),
        (CLOSED, ("", "")),
        (SILENT, ("<think>\n", "")),
    ],
)
def test_each_prompt_says_whether_it_opens_a_thought(template, openings):
    assert _opening_after(template, ("user", "tool")) == openings


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3_5_think"])
def test_published_templates_of_thinking_models_open_it(name):
    template = trl_template(name)
    if template is None:
        pytest.skip("the package trl is not installed (pip install --no-deps trl)")
    assert _opening_after(template, ("user", "user")) == ("<think>\n", "<think>\n")


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("official", "The next thing to do is: right.</think><action>right</action>"),
        ("compact", "\n</think>\n\nright"),
    ],
)
def test_a_demonstration_goes_on_with_the_opened_thought(style, expected):
    view, renderer = alfworld_view(style), RENDERERS["template"]
    turns = (DemonstrationTurn("You are at place 0.", "right", True),)
    ((sample, _),) = to_samples(
        *(Demonstration(turns=turns), "p", renderer, view),
        history="full",
        observation_weight=0.0,
        max_tokens=1000,
    )
    answer = renderer.text_of(sample.token_ids[sample.response_mask])
    assert answer == f"{expected}<|im_end|>"
    assert renderer.text_of(sample.token_ids).endswith(f"assistant\n<think>\n{answer}")
    assert view.parse(f"<think>\n{expected}") == ("right", True)
