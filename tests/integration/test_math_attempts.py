"""Whole attempts at math problems: scripted answers, real workers, sandbox and grader."""

import pytest

from megatron_spear.config.load import load_config
from megatron_spear.conversion.word_tokenizer import make_tokenizer
from megatron_spear.envs.family import family_of
from megatron_spear.envs.math_code.grading import has_math_verify
from megatron_spear.envs.math_code.prompts import answer_text, call_text
from megatron_spear.rewards.compose import trajectory_reward
from megatron_spear.rewards.row_marks import row_marks
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.testing.environments import check_environment
from megatron_spear.testing.fakes import ScriptedEngine
from megatron_spear.testing.sandboxes import why_no_sandbox
from megatron_spear.testing.templates import byte_tokenizer, trl_template
from megatron_spear.types import Prompt, Status

pytestmark = pytest.mark.skipif(bool(why_no_sandbox()), reason=why_no_sandbox())
CONFIG = load_config(
    None,
    [
        *("env.type=math_code", "env.stderr_lines=1", "env.max_turns=4"),
        *("env.sandbox.timeout_s=5", "env.sandbox.memory_mb=256", "env.prelude=import math"),
        *("rollout.max_context=4000", "rollout.max_new_tokens=200", "rollout.env_deadline_s=120"),
        *("reward.failure=-1", "env.grader_limit_s=2"),
    ],
)
PROBLEM = Prompt(
    prompt_id="p",
    env="math_code",
    kind="sum",
    answer="2146",
    metadata={"problem": "What is 37 times 58?", "answer": "2146"},
)


@pytest.fixture(scope="module")
def pool():
    family = family_of(CONFIG.env)
    options = family.factory_options
    with EnvironmentPool(family.factory, options=options, workers=1, deadline_s=120.0) as pool:
        yield pool


def tiny_renderer():
    words = family_of(CONFIG.env).vocabulary()
    return ChatRenderer(
        make_tokenizer(words.words, words.phrases, roles=words.roles, single_digits=True)
    )


def qwen_renderer():
    template = trl_template("qwen3")
    if template is None:
        pytest.skip("the package trl is not installed (pip install --no-deps trl)")
    return ChatRenderer(byte_tokenizer(template))


def play(pool, renderer, answers, style="compact"):
    """The trajectory of one attempt that answers with these texts."""
    tokens = [renderer.encode_action(text).tolist() for text in answers]
    engine = ScriptedEngine(lambda request: tokens[request.seed[-1]], max_context=4000)
    env = CONFIG.env.model_copy(update={"prompt": style})
    rollouter = Rollouter(
        engine,
        pool,
        renderer,
        family_of(env).view(),
        CONFIG.rollout,
        history="full",
        max_turns=env.max_turns,
    )
    (group,) = rollouter.collect_sync([PROBLEM], group_size=1, seed=(0, 1), temperature=1.0)
    assert not group.failures, group.failures[0].info
    return group.members[0]


def seen(renderer, member, turn):
    """What was read before an answer, as text."""
    return renderer._tokenizer.decode(member.turns[turn].observation_tokens)


def test_a_slip_a_program_and_the_right_answer(pool):
    renderer = tiny_renderer()
    answers = [call_text("37 * 58"), call_text("print(37 * 58)"), answer_text(2146)]
    member = play(pool, renderer, answers)
    assert (member.status, member.won, member.env_reward) == (Status.COMPLETED, True, 1.0)
    assert seen(renderer, member, 0) == "<|user|>What is 37 times 58?<|assistant|>"
    assert seen(renderer, member, 1) == (
        "<|tool|>(no output; print what you want to see)<|assistant|>"
    )
    assert seen(renderer, member, 2) == "<|tool|>2146<|assistant|>"
    assert [turn.valid for turn in member.turns] == [True] * 3
    assert [len(turn.tool_calls) for turn in member.turns] == [1, 1, 0]
    reward = trajectory_reward(member, CONFIG.reward)
    assert (reward.outcome, reward.intrinsic) == (1.0, pytest.approx(0.02))


def test_with_a_published_template_and_the_official_prompt(pool):
    renderer = qwen_renderer()
    answers = [
        "<think>\nmultiply\n</think>\n\n" + call_text("```python\nprint(math.comb(4, 2))\n```"),
        "<think>\nso\n</think>\n\nIt is $\\boxed{2{,}146}$.",
    ]
    member = play(pool, renderer, answers, style="official")
    assert member.won and [turn.valid for turn in member.turns] == [True, True]
    opening = seen(renderer, member, 0)
    assert "code_interpreter" in opening and "<tools>" in opening and "\\boxed{}" in opening
    assert "<tool_response>\n6\n</tool_response>" in seen(renderer, member, 1)


@pytest.mark.parametrize(
    ("answers", "void", "valid"),
    [
        ([answer_text(2145)], False, True),
        (["print"], True, False),
        (["<tool_call>\n{}\n</tool_call>", answer_text(7)], True, True),
        ([call_text("print(1)")] * 4, False, True),
    ],
)
def test_lost_attempts(pool, answers, void, valid):
    member = play(pool, tiny_renderer(), answers)
    assert not member.won and member.turns[-1].valid is valid
    (segment,) = member.segments
    assert row_marks(member, segment, CONFIG.algorithm.row_filters).void is void
    assert trajectory_reward(member, CONFIG.reward).outcome == -1.0
    ended = Status.COMPLETED if len(answers) < 4 else Status.TRUNCATED_TURNS
    assert member.status is ended


@pytest.mark.skipif(not has_math_verify(), reason="math-verify is not installed (extra math)")
def test_bombs_for_sandbox_and_grader_cost_no_attempt(pool):
    renderer = qwen_renderer()
    member = play(pool, renderer, [call_text("while True: pass"), answer_text("9^{9^{9}}")])
    assert "stopped" in seen(renderer, member, 1)
    assert not member.won and member.turns[-1].valid
    assert member.info["grading_fault"]
    assert play(pool, renderer, [call_text("print(6 * 7)"), answer_text(2146)]).won


def test_it_keeps_the_contract_with_the_real_sandbox():
    from megatron_spear.envs.math_code.environment import MathCodeEnvironment

    options = family_of(CONFIG.env).factory_options
    check_environment(
        lambda: MathCodeEnvironment(**options),
        options=PROBLEM.metadata,
        actions=[call_text("print(37 * 58)"), call_text("1 / 0"), answer_text(2146)],
    )
