"""Thoughts, tool calls and final answers in a generated text (Hermes and Qwen form).

    <think>I need the price.</think>
    <tool_call>
    {"name": "price", "arguments": {"item": "pear"}}
    </tool_call>

The text is hostile: any str gives a result, in time linear in its length.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from megatron_spear.envs.tools.texts import plain, shortened

MAX_CALLS = 32
"""Calls read in one answer; those after it are one faulty call."""
MAX_DEPTH = 32
"""Levels of lists and objects in the arguments of a call."""

_TAG = re.compile(r"<think>|</?tool_call>")
_CALL_TAG = re.compile(r"</?tool_call>")
_SPACE = re.compile(r"[ \t\r\n]*")
_KEPT_CHARS = 1000
_FORM = '{"name": "...", "arguments": {...}}'


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call as the model wrote it.

    ``text`` is what to keep of it: its arguments as JSON, or for a call that could not be read the
    first 1000 characters between its tags. ``error`` tells the model what is wrong; None = nothing
    is, as far as the form goes.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    error: str | None = None


class ParsedAnswer(NamedTuple):
    """The parts of a generated text; ``content`` is what stands outside thoughts and calls."""

    thought: str
    calls: tuple[ParsedCall, ...]
    content: str


def parse_answer(text: str) -> ParsedAnswer:
    """The parts of any text; never raises.

    Everything up to the last ``</think>`` is thought (a template may have opened it), as is what
    follows a ``<think>`` that is never closed; a call in a thought does not count. Each
    ``<tool_call>`` is a call, faulty ones with an ``error``. An answer that is nothing but one
    object of a name and its parameters, without tags, is a call as well (Llama 3.1's form).

    Example: ``"<think>hm</think>So: <tool_call>{"name": "look"}</tool_call>"`` has the thought
    ``hm``, the content ``So:`` and a call of ``look`` with no arguments.
    """
    thought, _, rest = text.rpartition("</think>")
    thoughts, outside = [thought.strip().removeprefix("<think>")], list[str]()
    calls: list[ParsedCall] = []
    at = 0
    while tag := _TAG.search(rest, at):
        outside.append(rest[at : tag.start()])
        at = tag.end()
        if tag[0] == "<think>":
            thoughts.append(rest[at:])
            at = len(rest)
        elif len(calls) == MAX_CALLS:
            calls.append(_faulty("", f"only {MAX_CALLS} calls are allowed in one answer"))
            at = len(rest)
        elif tag[0] == "<tool_call>":
            call, at = _read_call(rest, at)
            calls.append(call)
        else:
            calls.append(_faulty("", "</tool_call> has no <tool_call> before it"))
    content = "".join([*outside, rest[at:]]).strip()
    if not calls and (bare := _bare_call(content)) is not None:
        calls, content = [bare], ""
    return ParsedAnswer("\n".join(thoughts).strip(), tuple(calls), content)


def _read_call(text: str, start: int) -> tuple[ParsedCall, int]:
    """The call that begins at ``start``, behind its opening tag, and where the text goes on.

    The object is read first, so that tags within its strings do not end it.
    """
    begin = _SPACE.match(text, start).end()  # type: ignore[union-attr]  # it matches anywhere
    try:
        value, end = _DECODER.raw_decode(text, begin)
        fault = None
    except (ValueError, RecursionError) as error:
        value, end, fault = None, start, _json_fault(error, begin)
    tag = _CALL_TAG.search(text, end)
    closed = tag is not None and tag[0] == "</tool_call>"
    stop = len(text) if tag is None else tag.start()
    raw = text[start:stop]
    if not closed:
        fault = "the call has no </tool_call> at its end"
    elif fault is None and text[end:stop].strip():
        fault = f"expected nothing but one JSON object {_FORM} between the tags"
    at = tag.end() if tag is not None and closed else stop
    return (_faulty(raw, fault) if fault is not None else _call_of(value, raw)), at


def _call_of(value: Any, raw: str) -> ParsedCall:
    """The call that a decoded value stands for."""
    if not isinstance(value, dict):
        return _faulty(raw, f"expected a JSON object {_FORM}, got {_kind(value)}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return _faulty(raw, f'"name" must say which tool to call: {_FORM}')
    name = plain(name)
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):  # an object written out as a string, as APIs pass it
        try:
            given = _DECODER.decode(given)
        except (ValueError, RecursionError):
            return _faulty(raw, '"arguments" is a string; expected a JSON object', name)
    if not isinstance(given, dict):
        return _faulty(raw, f'"arguments" is {_kind(given)}; expected a JSON object', name)
    if _too_deep(given):
        return _faulty(raw, f'"arguments" is nested deeper than {MAX_DEPTH} levels', name)
    return ParsedCall(name, given, plain(json.dumps(given, ensure_ascii=False)))


def _bare_call(content: str) -> ParsedCall | None:
    """The call of an answer that is one object of exactly a name and arguments; else None."""
    if not (content.startswith("{") and content.endswith("}")):
        return None
    try:
        value = _DECODER.decode(content)
    except (ValueError, RecursionError):
        return None
    if set(value) not in ({"name", "parameters"}, {"name", "arguments"}):
        return None
    call = _call_of(value, content)
    return call if call.error is None else None


def _faulty(raw: str, error: str, name: str = "") -> ParsedCall:
    return ParsedCall(name, {}, plain(raw.strip()[:_KEPT_CHARS]), error)


def _json_fault(error: Exception, begin: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at character {error.pos - begin + 1})"
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_DEPTH} levels"
    return f"not valid JSON ({shortened(str(error))})"


def _kind(value: Any) -> str:
    """A JSON value's type in words, for messages."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
