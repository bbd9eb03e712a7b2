"""WebShop for the trainer: training prompts, the panel, the split of the official files."""

import json
import lzma
from pathlib import Path

import pytest
from pydantic import ValidationError
from webshop_cases import row, write_files

from megatron_spear.config.environments.webshop import WebshopSection
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import SftSection
from megatron_spear.envs.family import family_of
from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.webshop.family import WebshopFamily
from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import PRODUCT_CATEGORIES

SHARED = Path(__file__).parents[5] / "shared" / "data" / "webshop"
GENERATED = WebshopSection()


@pytest.fixture
def loaded(tmp_path):
    """Makes sections over files of 30 products with a goal each, in two categories."""
    rows = [row(f"B{i:02}", f"Lamp {i}", category=("garden", "fashion")[i % 2]) for i in range(30)]
    human = {
        f"B{i:02}": [
            {
                "instruction": f"i need lamp {i}",
                "instruction_attributes": ["lamp"],
                "instruction_options": [],
            }
        ]
        for i in range(30)
    }
    known = {
        f"B{i:02}": {
            "attributes": ["lamp"],
            "instruction": f"Find me lamp {i}",
            "instruction_attributes": ["lamp"],
        }
        for i in range(30)
    }
    paths = write_files(tmp_path, rows, known, human)

    def section(**changes):
        return WebshopSection(**({**paths, "num_test_goals": 10} | changes))

    return section


def ids(source, count):
    return [source.at(position).prompt_id for position in range(count)]


def test_fresh_goals_by_seed():
    family = family_of(GENERATED)
    source = family.training(0, 7)
    assert ids(source, 20) == ids(family.training(5, 7), 20)
    assert len(set(ids(source, 50))) == 50
    assert ids(family.training(0, 8), 20) != ids(source, 20)
    prompt = source.at(3)
    assert prompt.env == "webshop"
    assert prompt.kind in PRODUCT_CATEGORIES
    assert Goal.from_fields(prompt.metadata["goal"]).id == prompt.prompt_id


def test_fresh_goals_by_category():
    sources = family_of(WebshopSection(categories=["grocery", "beauty"])).training_by_kind(0, 7)
    assert list(sources) == ["grocery", "beauty"]
    assert {sources["beauty"].at(i).kind for i in range(20)} == {"beauty"}
    assert not set(ids(sources["beauty"], 20)) & set(ids(sources["grocery"], 20))


def test_the_panel_is_the_same_everywhere_and_held_out():
    family = family_of(GENERATED)
    panel = family.panel(64, 20260101)
    assert panel == family_of(WebshopSection()).panel(64, 20260101)
    assert panel.sha256 != family.panel(63, 20260101).sha256
    assert len(panel.prompts) == 64

    def asked(prompt):
        goal = prompt.metadata["goal"]
        return goal["asin"], frozenset(goal["attributes"]), goal["options"]

    trained = {asked(family.training(0, 7).at(i)) for i in range(400)}
    assert not trained & {asked(prompt) for prompt in panel.prompts}


def test_the_official_split(loaded):
    family = family_of(loaded())
    panel = family.panel(10, 0)
    source = family.training(0, 0)
    tested = {prompt.prompt_id for prompt in panel.prompts}
    assert len(tested) == 10
    epoch = set(ids(source, 20))
    assert len(epoch) == 20
    assert not epoch & tested
    assert ids(source, 20) != ids(family.training(1, 0), 20)
    with pytest.raises(DataError, match="only 10 goals"):
        family.panel(11, 0)


def test_a_panel_is_the_test_split_or_all_goals_of_a_file(loaded):
    section = loaded()
    split = family_of(section).panel(None, 0)
    assert len(split.prompts) == 10
    assert family_of(section.with_panel("test")).panel(None, 0) == split
    whole = family_of(section.with_panel(str(section.instructions))).panel(None, 0)
    assert len({prompt.prompt_id for prompt in whole.prompts}) == 30
    with pytest.raises(ConfigError, match=r"--panel dev: expected `test`"):
        section.with_panel("dev")


def test_loaded_goals_by_category(loaded):
    sources = family_of(loaded()).training_by_kind(0, 0)
    assert list(sources) == ["fashion", "garden"]
    panel = family_of(loaded(categories=["garden"])).panel(3, 0)
    assert {prompt.kind for prompt in panel.prompts} == {"garden"}


def test_synthetic_goals(loaded):
    family = family_of(loaded(goals="synthetic", instructions=None))
    assert family.training(0, 0).at(0).prompt_id.startswith("synthetic/")


def test_nothing_left_to_train_on(loaded):
    with pytest.raises(DataError, match="num_test_goals"):
        family_of(loaded(num_test_goals=30)).training(0, 0)


def test_loaded_goals_are_played_in_the_loaded_shop(loaded):
    family = family_of(loaded())
    environment = WebshopEnvironment(**family.factory_options)
    environment.reset(seed=0, options=family.training(0, 0).at(0).metadata)
    assert "Total results: 30" in environment.step("search[lamp]").observation
    played = family.demonstration(SftSection(noise=0.0), 0, 0)
    assert played.turns[-1].action == "click[buy now]"


def test_demonstrations_depend_on_the_arguments_alone():
    sft = SftSection(seed=3)
    first = [family_of(GENERATED).demonstration(sft, 1, i) for i in range(5)]
    assert first == [family_of(WebshopSection()).demonstration(sft, 1, i) for i in range(5)]
    assert first[0] != family_of(GENERATED).demonstration(SftSection(seed=4), 1, 0)


def test_demonstrations_that_cannot_be(loaded):
    with pytest.raises(DataError, match=r"raise env\.max_turns"):
        family_of(WebshopSection(max_turns=1)).demonstration(SftSection(), 0, 0)


def test_contents_are_of_the_files(loaded, tmp_path):
    section = loaded()
    before = family_of(section).contents()
    assert set(before) == {"products", "attributes", "instructions"}
    (tmp_path / "instructions.json").write_text("{}", encoding="utf-8")
    assert family_of(section).contents()["instructions"] != before["instructions"]
    assert family_of(GENERATED).contents() == {}


def test_no_tiny_tokenizer_for_loaded_products(loaded):
    with pytest.raises(ConfigError, match=r"model\.path"):
        family_of(loaded()).vocabulary()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"products": "a"}, "products without attributes"),
        ({"products": "a", "attributes": "b"}, "goals=human without instructions"),
        ({"num_products": 3}, "num_products without products"),
        ({"attributes": "b", "instructions": "c"}, "attributes and instructions without"),
        ({"categories": []}, "categories has nothing"),
        ({"categories": ["toys"]}, "beauty"),
    ],
)
def test_settings_that_do_not_fit(values, message):
    with pytest.raises(ValidationError, match=message):
        WebshopSection(**values)


def test_settings_by_type():
    config = load_config(None, ["env.type=webshop", "env.shop.products=50"])
    assert isinstance(config.env, WebshopSection)
    assert config.env.max_turns == 15
    with pytest.raises(ConfigError, match=r"env\.games: env\.type=webshop has no such key"):
        load_config(None, ["env.type=webshop", "env.games=x"])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bm25s, Stemmer, rapidfuzz.*megatron-spear\[webshop\]"):
        WebshopFamily(GENERATED)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the human goals of ../shared/data/webshop")
def test_real_goal_sentences_go_through_search_and_views():
    with lzma.open(SHARED / "human_goals.json.xz", "rt", encoding="utf-8") as stream:
        sentences = json.load(stream)
    with lzma.open(SHARED / "goal_query_map.json.xz", "rt", encoding="utf-8") as stream:
        queries = [query for found in json.load(stream).values() for query in found]
    environment = WebshopEnvironment()
    shown = Goal.from_fields(family_of(GENERATED).training(0, 0).at(0).metadata["goal"]).to_fields()
    views = [family_of(WebshopSection(prompt=style)).view() for style in ("compact", "official")]
    assert len(sentences) > 12_000 and len(queries) > 1_400
    for sentence in [*sentences[::4], *queries]:
        options = {"goal": shown | {"instruction": sentence}, "admissible": True}
        first, _ = environment.reset(seed=0, options=options)
        result = environment.step(f"search[{sentence.replace('[', '(').replace(']', ')')}]")
        assert result.info["valid"], sentence
        for view in views:
            history = [(first, "search[x]")]
            (message,) = view.window(first, history, result.observation, result.info, 1)
            assert message["content"].count(sentence.strip()) == 1, sentence
