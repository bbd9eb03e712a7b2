"""The word list is closed, and a word is the same token on a page and in an action."""

import random

import pytest

from megatron_spear.config.environments.webshop import WebshopSection
from megatron_spear.config.schema import SftSection
from megatron_spear.conversion.word_tokenizer import make_tokenizer
from megatron_spear.envs.family import family_of
from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.words import split_words

SECTION = WebshopSection()
VOCABULARY = family_of(SECTION).vocabulary()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(VOCABULARY.words, VOCABULARY.phrases, VOCABULARY.names)


def texts(count):
    """Everything read and written in random visits and demonstrations."""
    family, rng = family_of(SECTION), random.Random(0)
    view, found = family.view(), []
    environment = WebshopEnvironment(**{**family.factory_options, "show_attributes": True})
    source = family.training(0, 0)
    for number in range(count):
        options = {**source.at(number).metadata, "admissible": True}
        observation, info = environment.reset(seed=number, options=options)
        found.append(observation)
        for _ in range(6):
            action = rng.choice(info["admissible"]).replace("...", info["task"].split(",")[0])
            if action == "click[buy now]":
                break
            found.append(view.demonstrate(action))
            result = environment.step(action)
            info = result.info
            found.append(view.full(result.observation, info, 1)[0]["content"])
        for turn in family.demonstration(SftSection(), 0, number).turns:
            found.append(view.demonstrate(turn.action))
    return found


def test_words_are_sorted_single_and_without_white_space():
    assert list(VOCABULARY.words) == sorted(set(VOCABULARY.words))
    assert all(word and word == word.strip() for word in VOCABULARY.words)
    assert 700 < len(VOCABULARY.words) < 900


def test_no_text_holds_another_word(tokenizer):
    for text in texts(40):
        if "click[ b0" in text:
            continue  # products stand in small letters among the possible actions alone
        tokens = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in tokens, text
        assert tokenizer.decode(tokens) == text


def test_a_product_is_the_same_token_on_its_page_and_in_a_click(tokenizer):
    product = " " + next(word for word in VOCABULARY.words if word.startswith("B0"))
    page = tokenizer.tokenize(f"Next > [SEP]{product} [SEP] Acorn slim fitting shirt")
    click = tokenizer.tokenize(f"click[{product} ]")
    assert product in page
    assert click == ["click[", product, " ]"]
    assert tokenizer.tokenize("click[ buy now ]") == ["click[ buy now ]"]
    assert " slim fitting" in page


def test_the_official_prompt_is_in_the_list():
    view = family_of(WebshopSection(prompt="official")).view()
    info = {"task": "", "admissible": ["click[back to search]"]}
    for messages in (view.full("", info, 0), view.window("", [("", "")], "", info, 3)):
        assert not set(split_words(messages[0]["content"])) - set(VOCABULARY.words)
