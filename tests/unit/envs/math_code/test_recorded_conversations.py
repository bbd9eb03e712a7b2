"""Recorded conversations are read as demonstrations, and rendered as the policy will see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.config.environments.math_code import MathCodeSection
from megatron_spear.config.schema import SftSection
from megatron_spear.envs.family import family_of
from megatron_spear.envs.math_code.conversations import read_conversation
from megatron_spear.errors import DataError
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.testing.templates import byte_tokenizer
from megatron_spear.trainer.demonstrations import to_samples

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": "f(1)"}}}
USER = {"role": "user", "content": "What is f(1)?"}
CALLS = {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "42"}
END = {"role": "assistant", "content": "\\boxed{42}", "tool_calls": None}
CHAT = [{"role": "system", "content": "Be brief."}, USER, CALLS, TOOL, END]


def of(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def test_turns_are_what_was_read_and_written() -> None:
    first, last = read_conversation(of(*CHAT), "a row").turns
    call = '{"name": "code_interpreter", "arguments": {"code": "f(1)"}}'
    assert first.observation == "What is f(1)?"
    assert first.action == f"Let me see.\n<tool_call>\n{call}\n</tool_call>"
    assert (last.observation, last.action) == ("42", "\\boxed{42}")
    assert (first.info, last.info) == ({}, {"replies": ("42",)})
    assert first.trained and last.trained


def test_the_view_shows_them_as_in_a_rollout() -> None:
    played = read_conversation(of(*CHAT), "a row")
    view = family_of(MathCodeSection(prompt="official")).view()
    first, last = (view.full(t.observation, t.info, i) for i, t in enumerate(played.turns))
    assert [message["role"] for message in first] == ["system", "user"]
    assert last == ({"role": "tool", "content": "42"},)


def test_arguments_as_text_and_several_calls_in_an_answer() -> None:
    text = {"name": "code_interpreter", "arguments": '{"code": "g(2)"}'}
    both = CALLS | {"tool_calls": [CALL, text], "content": None}
    first, last = read_conversation(of(USER, both, TOOL, TOOL, END), "a row").turns
    assert first.action.count("<tool_call>") == 2 and "g(2)" in first.action
    assert last.info == {"replies": ("42", "42")}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "x"}, "has no list of messages"),
        (of(), "does not begin with the user's problem"),
        (of(CALLS, TOOL, END), "does not begin with the user's problem"),
        (of(USER), "does not end with an answer without calls"),
        (of(USER, CALLS), "does not end with an answer without calls"),
        (of(USER, CALLS, END), "1 calls have 0 replies"),
        (of(USER, CALLS, TOOL, TOOL, END), "1 calls have 1 replies"),
        (of(USER, END, END), "0 calls have 0 replies"),
        (of(USER, END, USER, END), "of role 'user'"),
        (of(USER | {"content": None}, END), "content of a message of role 'user' is None"),
        (of(USER, END | {"content": ""}), "neither text nor calls"),
        (of(USER, END | {"content": ["x"]}), "content is ['x']"),
        (of(USER, CALLS | {"tool_calls": [{"name": "search", "arguments": {}}]}), "search"),
        (of(USER, CALLS | {"tool_calls": [{"function": {"arguments": "{"}}]}), "expected the fu"),
    ],
)
def test_rows_that_cannot_be_learned_are_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as told:
        read_conversation(row, "chats.jsonl, row 3")
    assert str(told.value).startswith("chats.jsonl, row 3: ") and words in str(told.value)


def _chat(number: int) -> dict[str, Any]:
    return of(USER | {"content": f"problem {number}"}, END)


def test_a_file_is_learned_epoch_by_epoch(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(_chat(number)) + "\n" for number in range(7)))
    family = family_of(MathCodeSection(demonstrations=(file,)))
    epochs = [
        [family.demonstration(SftSection(), 0, 7 * e + i).turns[0].observation for i in range(7)]
        for e in range(3)
    ]
    assert all(sorted(epoch) == [f"problem {n}" for n in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    before = family.contents()
    file.write_text(json.dumps(_chat(9)) + "\n")
    assert set(before) == {"demonstrations"} and before != family.contents()
    assert family_of(MathCodeSection()).contents() == {}


def test_parquet_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([of(*CHAT), of(USER, END)])
    parquet.write_table(table, tmp_path / "chats.parquet")
    family = family_of(MathCodeSection(demonstrations=(tmp_path,)))
    made = [family.demonstration(SftSection(), 0, index) for index in range(2)]
    assert sorted(len(played.turns) for played in made) == [1, 2]
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "chats.parquet")
    with pytest.raises(DataError, match="has the columns text, and no messages"):
        family_of(MathCodeSection(demonstrations=(tmp_path / "chats.parquet",))).demonstration(
            SftSection(), 0, 0
        )


def test_what_is_no_file_of_conversations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; .* Correct env\.demonstrations"):
        family_of(MathCodeSection(demonstrations=(tmp_path / "a.jsonl",))).contents()
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no conversation"):
        family_of(MathCodeSection(demonstrations=(tmp_path / "a.jsonl",))).demonstration(
            SftSection(), 0, 0
        )


def test_answers_alone_are_learned_in_the_models_own_form() -> None:
    renderer = ChatRenderer(byte_tokenizer(TEMPLATE))
    view = family_of(MathCodeSection(prompt="official")).view()
    ((sample, weights),) = to_samples(
        read_conversation(of(*CHAT), "a row"),
        "sft/0/0",
        renderer,
        view,
        history="full",
        observation_weight=0.0,
        max_tokens=100_000,
    )
    text = renderer.decode_action(sample.token_ids)
    learned = renderer.decode_action(sample.token_ids[weights > 0])
    assert "What is f(1)?" in text and "42" in text.partition("</tool_call>")[2]
    call = '{"name": "code_interpreter", "arguments": {"code": "f(1)"}}'
    assert learned == f"Let me see.\n<tool_call>\n{call}\n</tool_call>\\boxed{{42}}"
