"""Which rows are unfit to learn from."""

import time
from collections import Counter

import numpy as np
import pytest

from megatron_spear.rewards.row_filters import (
    overlong,
    repetitive,
    unreadable,
    void_answer,
)


def test_overlong_includes_the_limit() -> None:
    assert [overlong(n, 10) for n in (9, 10, 11)] == [False, True, True]


@pytest.mark.parametrize(
    ("text", "num_tool_calls", "void"),
    [
        ("I give up", 0, True),
        ("I give up", 1, False),
        ("\\boxed{42}", 0, False),
        ("\\boxed{42", 0, True),
        ("Answer: 42", 0, False),
    ],
)
def test_void_answer_is_neither_a_call_nor_an_answer(
    text: str, num_tool_calls: int, void: bool
) -> None:
    """Defect 7: the official filter of mathematics never fires."""
    assert void_answer(text, num_tool_calls) is void


def _repetitive_by_hand(tokens: list[int], length: int, times: int) -> bool:
    runs = Counter(tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))
    return any(count >= times for count in runs.values())


def test_repetitive_against_a_slow_count() -> None:
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        tokens = draw.integers(0, draw.integers(1, 6), draw.integers(0, 60)).tolist()
        length, times = int(draw.integers(1, 6)), int(draw.integers(1, 6))
        expected = _repetitive_by_hand(tokens, length, times)
        assert repetitive(np.array(tokens, np.int32), length, times) is expected
        seen.add(expected)
    assert seen == {True, False}


def test_repetitive_edges() -> None:
    assert not repetitive([7] * 28) and repetitive([7] * 29)
    assert not repetitive([]) and not repetitive([], 1, 1)
    # neighbours in memory are not runs: ids that share bytes differ
    assert not repetitive([1, 256, 65536, 16777216] * 2, 2, 3)


@pytest.mark.parametrize("vocabulary", [1, 3, 150_000])
def test_repetitive_is_quick_on_a_long_response(vocabulary: int) -> None:
    tokens = np.random.default_rng(1).integers(0, vocabulary, 32_768)
    start = time.process_time()
    assert repetitive(tokens) is (vocabulary == 1)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "text", ["a\ufffdb", "cafÃ©", "itâ€™s", "ï»¿start", "ï¿½", "锟斤拷", "Â©", "烫烫烫"]
)
def test_unreadable(text: str) -> None:
    assert unreadable(text)


@pytest.mark.parametrize(
    "text", ["", "café", "it’s", "NÃO", "Âge", "中文", "π ≈ 3.14 ✓", "naïve 🙂"]
)
def test_readable(text: str) -> None:
    assert not unreadable(text)


@pytest.mark.parametrize("text", ["é", "à", "ñ", "°", "’", "“", "…"])
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_utf8_read_wrongly_is_unreadable(text: str, wrong: str) -> None:
    broken = text.encode().decode(wrong, errors="replace")
    assert unreadable(broken)
    assert not unreadable(text)
