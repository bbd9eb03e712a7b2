"""The environment: what it reports, what it refuses, and one shop for many."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webshop_cases import CHAIR, LAMP, SHIRT, goal, write_files

from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.errors import DataError, EnvironmentFault


@pytest.fixture
def make(tmp_path):
    paths = write_files(tmp_path)

    def environment(**changes):
        return WebshopEnvironment(
            products=str(paths["products"]),
            attributes=str(paths["attributes"]),
            num_products=None,
            **changes,
        )

    return environment


def enter(environment, **changes):
    options = {"goal": goal(**changes).to_fields(), "admissible": True}
    return environment.reset(seed=0, options=options)


def test_info_at_reset(make):
    observation, info = enter(make())
    assert info == {
        "won": False,
        "valid": True,
        "score": 0.0,
        "task": goal().instruction,
        "anchor": f"{observation}\n[chosen: nothing]",
        "admissible": ["search[...]"],
    }


def test_info_after_a_step(make):
    environment = make()
    enter(environment)
    info = environment.step("search[lamp]").info
    assert info["tool_calls"] == [{"name": "act", "arguments": "search[lamp]", "succeeded": True}]
    assert f"click[{LAMP.lower()}]" in info["admissible"]
    info = environment.step("click[nothing] ").info
    assert info["valid"] is False
    assert info["tool_calls"][0] == {
        "name": "act",
        "arguments": "click[nothing]",
        "succeeded": False,
    }


def test_the_anchor_knows_what_was_chosen(make):
    environment = make()
    enter(environment)
    environment.step("search[lamp]")
    before = environment.step(f"click[{LAMP}]")
    after = environment.step("click[large]")
    again = environment.step("click[large]")
    assert after.observation == before.observation
    assert after.info["anchor"] != before.info["anchor"]
    assert after.info["anchor"].endswith("[chosen: size: large]")
    assert again.info["anchor"] == after.info["anchor"]


@pytest.mark.parametrize(
    ("actions", "score"),
    [
        (["search[lamp]", f"click[{LAMP}]", "click[navy blue]"], 1.0),
        (["search[lamp]", f"click[{LAMP}]", "click[black | gold]"], 2 / 3),
        # another product, no noun in common
        (["search[shirt]", f"click[{SHIRT}]"], 0.0),
    ],
)
def test_the_score_of_a_purchase(make, actions, score):
    environment = make()
    enter(environment)
    for action in actions:
        assert environment.step(action).info["valid"]
    result = environment.step("click[buy now]")
    assert result.reward == result.info["score"] == pytest.approx(score)
    assert result.terminated
    assert result.info["won"] is (score == 1.0)
    assert result.info["admissible"] == []
    with pytest.raises(EnvironmentFault, match="call reset"):
        environment.step("search[lamp]")


def test_rich_observations_and_attributes(make):
    environment = make(observation="text_rich", show_attributes=True)
    observation, _ = enter(environment)
    assert observation.endswith("[button] Search [button_]\n")
    environment.step("search[chair]")
    assert "[button] Attributes [button_]" in environment.step(f"click[{CHAIR}]").observation


def test_environments_share_a_shop(make):
    assert make()._shop is make()._shop
    assert WebshopEnvironment()._shop is WebshopEnvironment()._shop
    assert WebshopEnvironment()._shop is not WebshopEnvironment(seed=1)._shop


def test_before_a_reset():
    with pytest.raises(EnvironmentFault, match="call reset"):
        WebshopEnvironment().step("search[x]")


@pytest.mark.parametrize("options", [{}, {"goal": "lamp"}, {"goal": {"id": "x"}}])
def test_a_goal_that_cannot_be_read(options):
    with pytest.raises(DataError):
        WebshopEnvironment().reset(seed=0, options=options)


@pytest.mark.parametrize("changes", [{"products": "x"}, {"num_products": None}])
def test_half_a_shop(changes):
    with pytest.raises(DataError, match="expected both files"):
        WebshopEnvironment(**changes)


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "\ud800",
        "search[\x00]x" * 3,
        "click[" * 200_000,
        "]" * 1_000_000,
        "[" * 1_000_000,
        "search[" + "a b " * 300_000 + "]",
        "\u202ehcraes[x]",
        "click[\ud800]",
        " " * 1_000_000,
    ],
)
def test_hostile_text_is_invalid_and_quick(make, text):
    environment = make()
    observation, _ = enter(environment)
    started = time.perf_counter()
    result = environment.step(text)
    assert time.perf_counter() - started < 1.0
    assert result.info["valid"] is False
    assert result.observation == observation


@pytest.mark.parametrize(
    "words", ["\x00", "\ud800 lamp", "\u202e", "<a>", "<q>", "<c>", "<r>", "(((("]
)
def test_any_words_can_be_searched_for(make, words):
    environment = make()
    enter(environment)
    result = environment.step(f"search[{words}]")
    assert result.info["valid"]
    assert "Page 1" in result.observation


_ANYTHING = st.text(alphabet=st.characters(codec=None), max_size=40)
_FORMS = st.sampled_from(["{}", "search[{}]", "click[{}]", "search[{}", "click[[{}]]", "{}]click["])


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.tuples(_FORMS, _ANYTHING), min_size=1, max_size=8), rich=st.booleans())
def test_any_text_is_answered(texts, rich):
    environment = WebshopEnvironment(observation="text_rich" if rich else "text")
    seen, _ = enter(environment)
    for form, text in texts:
        result = environment.step(form.replace("{}", text))
        assert not result.terminated
        assert result.reward == 0.0
        if not result.info["valid"]:
            assert result.observation == seen
        seen = result.observation
