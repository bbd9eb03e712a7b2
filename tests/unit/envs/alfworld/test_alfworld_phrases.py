"""Phrases as tokens: each is one, and no text of a game loses anything."""

import random

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.conversion.word_tokenizer import UNKNOWN, make_tokenizer
from megatron_spear.envs.alfworld.demonstrations import demonstrate
from megatron_spear.envs.alfworld.game import parse_game
from megatron_spear.envs.alfworld.generator import generate_game
from megatron_spear.envs.alfworld.phrases import NAMES, PHRASES
from megatron_spear.envs.alfworld.prompts import OfficialView
from megatron_spear.envs.alfworld.vocabulary import alfworld_words
from megatron_spear.types import TASK_TYPES

TOKENIZER = make_tokenizer(alfworld_words(), PHRASES, NAMES)
PLAIN = make_tokenizer(alfworld_words())

ROOM = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a desk 2, "
    "and a shelf 3.\n\nYour task is to: put a clean mug in desk."
)


def _pieces(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_phrase_is_one_token_with_and_without_its_space(phrase: str) -> None:
    assert _pieces(phrase) == [phrase]
    assert _pieces(f"mug {phrase} 1") == ["mug", f" {phrase}", " 1"]


def test_phrases_are_single_and_stripped() -> None:
    assert len(set(PHRASES)) == len(PHRASES)
    assert all(phrase == phrase.strip() != "" for phrase in PHRASES)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "You arrive at desk 1. On the desk 1, you see a mug 2, a pen 1, and a bowl 3.",
            "You arrive at| desk 1|. On the| desk 1|, you see a| mug 2|, a| pen 1|, and a"
            "| bowl 3|.",
        ),
        (
            "The drawer 12 is open. In it, you see nothing.",
            "The| drawer 12| is open. In it, you see nothing.",
        ),
        (
            "You open the fridge 1. The fridge 1 is open. In it, you see a apple 1.",
            "You open the| fridge 1|. The| fridge 1| is open. In it, you see a| apple 1|.",
        ),
        ("go to desk 1", "go to| desk 1"),
        ("move mug 1 to desk 1", "move| mug 1| to| desk 1"),
    ],
)
def test_pieces_by_hand(text: str, pieces: str) -> None:
    assert _pieces(text) == pieces.split("|")


def test_a_room_is_a_third_as_long() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(ROOM)) == ROOM
    assert len(TOKENIZER.encode(ROOM)) < 0.4 * len(PLAIN.encode(ROOM))


def test_texts_of_games_come_back_whole() -> None:
    view, unknown = OfficialView(), TOKENIZER.convert_tokens_to_ids(UNKNOWN)
    for index in range(12):
        game = generate_game(7, index, task_types=TASK_TYPES, settings=GeneratorSection())
        shown = demonstrate(
            parse_game(game),
            random.Random(index),
            explore=4.0,
            noise=0.4,
            max_turns=80,
            admissible=True,
        )
        assert shown is not None
        texts = []
        for number, turn in enumerate(shown.turns):
            past = [(turn.observation, turn.action)] * min(number, 2)
            texts += [turn.observation, turn.action, view.demonstrate(turn.action)]
            (message,) = view.window(ROOM, past, turn.observation, turn.info, number)
            texts.append(message["content"])
        for text in texts:
            ids = TOKENIZER.encode(text, add_special_tokens=False)
            assert unknown not in ids
            assert TOKENIZER.decode(ids) == text
