"""Recorded conversations as demonstrations for the warm start: a cold start on published data.

A row's ``messages`` are a chat with calls of the interpreter, as chat templates take it: perhaps a
system message, which is left out since ``env.prompt`` has its own; the user's problem; answers of
the assistant, with ``tool_calls`` or without; a message of role ``tool`` for each call. That is the
form into which verl's recipe brings ReTool-SFT (arXiv 2504.11536). Files are ``.jsonl`` or
``.parquet``.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn
from megatron_spear.envs.math_code.parquet import table_rows
from megatron_spear.envs.math_code.problems import json_rows, problem_files
from megatron_spear.envs.math_code.prompts import call_text
from megatron_spear.errors import DataError

TOOL = "code_interpreter"
_FORM = (
    'a row with "messages": the user\'s problem, then answers of the assistant, each but the last '
    'followed by a message of role "tool" for each of its "tool_calls"'
)


def load_conversations(paths: Sequence[Path]) -> list[Demonstration]:
    """The conversations of all files, in order; DataError names the first that cannot be read."""
    found = []
    for file in problem_files(paths, "env.demonstrations"):
        read = [read_conversation(row, f"{file}, row {number}") for number, row in _rows(file)]
        if not read:
            raise DataError(f"{file}: has no conversation; expected {_FORM}. Fetch the file again.")
        found += read
    return found


def conversations_sha256(paths: Sequence[Path]) -> str:
    """Of the contents of all files."""
    digest = hashlib.sha256()
    for file in problem_files(paths, "env.demonstrations"):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_conversation(row: Any, where: str) -> Demonstration:
    """One row as a demonstration of which all answers are learned.

    Example: ``user: 2 * 21?``, ``assistant: [calls print(2 * 21)]``, ``tool: 42``, ``assistant:
    \\boxed{42}`` gives the turns (``2 * 21?``, the call) and (``42``, ``\\boxed{42}``).
    """
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise DataError(f"{where}: has no list of messages; expected {_FORM}")
    told = [message for message in messages if message.get("role") != "system"]
    if not told or told[0].get("role") != "user":
        raise DataError(f"{where}: does not begin with the user's problem; expected {_FORM}")
    turns: list[DemonstrationTurn] = []
    replies: list[str] = []
    observation, calls = _content(told[0], where), 0
    for message in told[1:]:
        role = message.get("role")
        if role == "tool" and len(replies) < calls:
            replies.append(_content(message, where))
        elif role == "assistant" and len(replies) == calls and (calls or not turns):
            shown = {"replies": tuple(replies)} if replies else {}
            seen = "\n".join(replies) if replies else observation
            action, calls = _answer(message, where)
            turns.append(DemonstrationTurn(seen, action, True, shown))
            replies = []
        else:
            raise DataError(
                f"{where}: a message of role {role!r} after {len(turns)} answers, where {calls} "
                f"calls have {len(replies)} replies; expected {_FORM}"
            )
    if not turns or calls:
        raise DataError(f"{where}: does not end with an answer without calls; expected {_FORM}")
    return Demonstration(tuple(turns))


def _answer(message: Mapping[str, Any], where: str) -> tuple[str, int]:
    """(what the model is to write, number of calls in it)."""
    calls = [_call(call, where) for call in message.get("tool_calls") or ()]
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: an answer's content is {content!r}; expected a text")
    parts = [*filter(None, [(content or "").strip()]), *calls]
    if not parts:
        raise DataError(f"{where}: an answer has neither text nor calls; expected {_FORM}")
    return "\n".join(parts), len(calls)


def _call(call: Any, where: str) -> str:
    """The call as the model is to write it."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    code = arguments.get("code") if isinstance(arguments, Mapping) else None
    if not isinstance(code, str) or function.get("name") != TOOL:
        raise DataError(
            f'{where}: got the call {call!r}; expected the function {TOOL} with {{"code": text}}'
        )
    return call_text(code)


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(
            f"{where}: the content of a message of role {message.get('role')!r} is {content!r}; "
            "expected a text"
        )
    return content


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    return table_rows(file, "messages") if file.suffix == ".parquet" else json_rows(file, _FORM)
