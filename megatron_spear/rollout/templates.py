"""A chat template as text: what it can do, and what is done where it cannot.

Templates differ in what they know. What is missing is found out by rendering, and made up for:

| the template has no         | then                                                            |
|-----------------------------|-----------------------------------------------------------------|
| branch for ``tools``        | the system message describes them (Hermes form)                 |
| role ``tool``               | replies stand in a user message, each in ``<tool_response>``    |
| role ``system``             | what it says opens the first user message                       |
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from megatron_spear.errors import ConfigError
from megatron_spear.types import Message

_USER, _ANSWER = "UserPlaceholder", "AnswerPlaceholder"
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_placeholder",
        "description": "a probe",
        "parameters": {"type": "object", "properties": {}},
    },
}
# What a template that cannot render something raises.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)

_Form = Callable[[str], str]


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# How a template may write a content: as it is, as JSON (Llama 3.1's replies), or trimmed.
_FORMS: tuple[_Form, ...] = (str, _as_json, str.strip)


class Glue(NamedTuple):
    """The text around the contents of new messages: one piece more than there are messages.

    Example (ChatML, one user message): pieces ``<|im_end|>\\n<|im_start|>user\\n`` and
    ``<|im_end|>\\n<|im_start|>assistant\\n``. ``forms`` says how each content is written.
    """

    pieces: tuple[str, ...]
    forms: tuple[_Form, ...]

    def join(self, contents: Sequence[str]) -> str:
        """The text of messages with these contents."""
        parts = [self.pieces[0]]
        for form, content, piece in zip(self.forms, contents, self.pieces[1:], strict=True):
            parts += [form(content), piece]
        return "".join(parts)


class ChatTemplate:
    """The template of a Hugging Face tokenizer. Raises ConfigError where there is none."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template; expected one in tokenizer_config.json or "
                "chat_template.jinja beside the tokenizer: use an instruction-tuned model's folder"
            )
        self._tokenizer = tokenizer

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The chat as text, with the opening of the assistant's answer."""
        if tools and not self._has_tools:
            messages, tools = _with_tools_described(messages, tools), ()
        messages = self.adapted(messages)
        if messages and messages[0]["role"] == "system" and not self._has_system:
            messages = _without_system(messages)
        return self._apply(messages, tools)

    def adapted(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Message]:
        """The messages with replies of tools in user messages, where there is no role for them."""
        if all(message["role"] != "tool" for message in messages) or self._has_tool_role:
            return messages
        made: list[Message] = []
        replies: list[str] = []
        for message in [*messages, None]:
            if message is not None and message["role"] == "tool":
                replies.append(f"<tool_response>\n{message['content']}\n</tool_response>")
                continue
            if replies:
                made.append({"role": "user", "content": "\n".join(replies)})
                replies = []
            if message is not None:
                made.append(message)
        return made

    def glue(self, roles: Sequence[str]) -> Glue:
        """What stands between an answer, new messages of these roles, and the next answer.

        Raises ConfigError where the template shows a content otherwise than in a known form.
        """
        contents = [f' \tPlaceholder "{number}" here\t ' for number in range(len(roles))]
        new = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            text = self._apply([_said("user", _USER), _said("assistant", _ANSWER), *new])
        except _REFUSALS as error:
            raise ConfigError(
                f"the chat template refuses messages of roles {', '.join(roles)} after an answer "
                f"({error}); use a model whose template takes several turns"
            ) from error
        _, found, rest = text.partition(_ANSWER)
        pieces: list[str] = []
        forms: list[_Form] = []
        for content in contents:
            form = next((form for form in _FORMS if found and form(content) in rest), None)
            if form is None:
                raise ConfigError(
                    "the chat template does not render message contents as they are; got "
                    f"{text!r} for contents {_USER}, {_ANSWER}, {', '.join(map(repr, contents))}"
                )
            piece, _, rest = rest.partition(form(content))
            pieces.append(piece)
            forms.append(form)
        return Glue((*pieces, rest), tuple(forms))

    @cached_property
    def _has_tools(self) -> bool:
        """Whether it lists tools that it is given."""
        text = self._try([_said("user", _USER)], [_TOOL])
        return text is not None and _TOOL["function"]["name"] in text

    @cached_property
    def _has_tool_role(self) -> bool:
        """Whether it knows replies of tools: it takes them, and not just like any word as role."""
        chat = [_said("user", _USER), _said("assistant", _USER)]
        text = self._try([*chat, _said("tool", _ANSWER)])
        if text is None or _ANSWER not in text:
            return False
        unknown = self._try([*chat, _said("unknownrole", _ANSWER)])
        return unknown is None or unknown.replace("unknownrole", "tool") != text

    @cached_property
    def _has_system(self) -> bool:
        text = self._try([_said("system", _ANSWER), _said("user", _USER)])
        return text is not None and _ANSWER in text

    def _try(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str | None:
        """The text; None where the template refuses."""
        try:
            return self._apply(messages, tools)
        except _REFUSALS:
            return None

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools in a system message, and how to call them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "These tools can be called; each line describes one in JSON.\n"
        f"<tools>\n{listed}\n</tools>\n"
        "A call is a JSON object with the tool's name and its arguments, inside tags of its own:\n"
        '<tool_call>\n{"name": "a tool", "arguments": {"an argument": "its value"}}\n</tool_call>\n'
        "What a tool gives comes back inside <tool_response> tags."
    )


def _with_tools_described(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        said = f"{messages[0]['content']}\n\n{describe_tools(tools)}"
        return [{**messages[0], "content": said}, *messages[1:]]
    return [_said("system", describe_tools(tools)), *messages]


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    system, *others = messages
    if others and others[0]["role"] == "user":
        said = f"{system['content']}\n\n{others[0]['content']}"
        return [{**others[0], "content": said}, *others[1:]]
    return [_said("user", system["content"]), *others]


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
