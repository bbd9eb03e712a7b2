"""Texts of tokens add up to the whole text, half characters and odd tokenizers included."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models

from megatron_spear.rollout.token_texts import TokenTexts

TEXT = "a duck 🦆, 左 and é\n"


def _bytes() -> tuple[Callable[[list[int]], str], list[int]]:
    """A byte-level BPE tokenizer in which every byte is a token, and TEXT in it."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.decode, tokenizer.encode(TEXT).ids


def test_half_characters_are_told_at_their_last_token() -> None:
    decode, ids = _bytes()
    whole, texts = TokenTexts(decode).of(ids)
    assert whole == TEXT == "".join(texts)
    duck = TEXT.index("🦆")
    assert texts[duck : duck + 4] == ("", "", "", "🦆")
    assert texts[:6] == tuple("a duck"), "a byte that is a character is its own text"


@pytest.mark.parametrize("cut", range(1, 4))
def test_an_answer_cut_in_a_character_keeps_the_whole_text(cut: int) -> None:
    decode, ids = _bytes()
    ids = ids[: TEXT.index("🦆") + cut]
    whole, texts = TokenTexts(decode).of(ids)
    assert whole.startswith("a duck ") and "\ufffd" in whole
    assert len(texts) == len(ids) and "".join(texts) == whole


def test_a_blank_that_shows_behind_another_token_only_is_kept() -> None:
    vocabulary = {"▁go": 0, "▁to": 1, "▁desk": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "to", "alone it has no blank"
    assert TokenTexts(tokenizer.decode).of([0, 1, 2]) == ("go to desk", ("go", " to", " desk"))


def test_texts_that_never_add_up_are_each_their_own() -> None:
    def backwards(ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in reversed(ids))

    assert TokenTexts(backwards).of([0, 1, 2]) == ("cba", ("a", "b", "c"))


def test_no_tokens_are_no_text() -> None:
    assert TokenTexts(lambda ids: "x" * len(ids)).of([]) == ("", ())


def test_a_token_is_decoded_alone_once() -> None:
    asked: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        asked.append(ids)
        return "ab" * len(ids)

    texts = TokenTexts(decode)
    assert texts.of([5, 5, 7]) == ("ababab", ("ab", "ab", "ab"))
    texts.of([7, 5])
    assert sorted(asked) == [[5], [5, 5, 7], [7], [7, 5]]
