"""reasoning-gym for real: its questions as prompts, its scorers as rewards."""

import pytest

from megatron_spear.config.environments.adapters import ReasoningGymSection
from megatron_spear.config.schema import SftSection
from megatron_spear.envs.adapters.reasoning_gym import ReasoningGymEnvironment
from megatron_spear.envs.family import family_of
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.testing.families import check_family

pytest.importorskip(
    "reasoning_gym", reason="reasoning-gym is not installed (the extra reasoning-gym)"
)

SUMS = {"chain_sum": {"max_terms": 3, "max_digits": 2}}


def _environment(datasets=SUMS, won_at=1.0):
    return ReasoningGymEnvironment(datasets=datasets, size=100, seed=0, won_at=won_at)


def test_the_family_keeps_the_contract():
    section = ReasoningGymSection(datasets={**SUMS, "letter_counting": {}}, size=1000)
    check_family(section, free_text=True, distinct=4)


def test_a_question_and_its_answers():
    family = family_of(ReasoningGymSection(datasets=SUMS))
    played = family.demonstration(SftSection(), 1, 0)
    (turn,) = played.turns
    assert "arithmetic problem" in turn.observation and int(turn.action) is not None
    (message,) = family.view().full(turn.observation, {}, 0)
    assert "<answer>" in message["content"]
    for answer, reward, won in ((turn.action, 1.0, True), ("no idea", 0.0, False)):
        environment = _environment()
        environment._size = 10_000
        environment.reset(seed=0, options=played.prompt.metadata)
        result = environment.step(answer)
        assert (result.reward, result.info["won"], result.terminated) == (reward, won, True)


def test_equal_questions_are_on_one_side():
    """A data set of few questions: none of the panel's is ever trained on."""
    section = ReasoningGymSection(datasets={"chain_sum": {"max_terms": 2, "max_digits": 1}})
    family = family_of(section)
    environment = ReasoningGymEnvironment(**family.factory_options)

    def question(prompt):
        return environment.reset(seed=0, options=prompt.metadata)[0]

    held_out = {question(prompt) for prompt in family.panel(12, 1).prompts}
    assert len(held_out) == 12
    source = family.training(0, 1)
    trained = [question(source.at(position)) for position in range(300)]
    assert len(set(trained)) < 300 and not held_out & set(trained)
    with pytest.raises(DataError, match="held out"):
        family.panel(300, 1)


@pytest.mark.parametrize("text", ["x", "9**9**9", "{}", "()"])
def test_a_scorer_that_raises_is_a_wrong_answer(text):
    environment = _environment({"prime_factorization": {}})
    environment.reset(seed=0, options={"dataset": "prime_factorization", "index": 3})
    result = environment.step(text)
    assert (result.reward, result.terminated, result.info["valid"]) == (0.0, True, False)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"chain_sun": {}}, "env.datasets.chain_sun: ValueError"),
        ({"chain_sum": {"max_term": 3}}, "max_term"),
        ({"chain_sum": {"min_terms": 0}}, "min_terms must be positive"),
    ],
)
def test_wrong_data_sets_are_told(datasets, message):
    with pytest.raises(ConfigError, match=message):
        family_of(ReasoningGymSection(datasets=datasets))
