"""What a model can call: a name, what it is for, what it takes, and what it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_spear.envs.tools.texts import shortened

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class ToolFailure(Exception):
    """Raised by a tool whose work failed; the message is the reply that the model reads."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool of an environment.

    Attributes:
        name: what the model calls it; letters, digits, ``_`` and ``-``.
        description: what it does, for the model.
        parameters: JSON schema of its arguments: an object with ``properties`` (each with a
            ``type``, perhaps an ``enum``) and ``required``.
        function: called with the environment and the arguments by name; gives the reply. A failure
            the model should read is a `ToolFailure`; any other exception is told it as well.

    Example::

        Tool("price", "Price of one item, in cents.",
             {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
             MyEnvironment.price)
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str]

    def schema(self) -> dict[str, Any]:
        """The tool as chat templates and APIs take it (OpenAI's function form)."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }

    def problem(self, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the arguments, for the model; None where they fit.

        Example: ``{"itme": "pear"}`` gives ``missing argument "item"; unknown argument "itme"``.
        """
        properties: Mapping[str, Any] = self.parameters.get("properties", {})
        missing = [name for name in self.parameters.get("required", ()) if name not in arguments]
        unknown = [name for name in arguments if name not in properties]
        wrong = [
            fault
            for name, value in arguments.items()
            if name in properties and (fault := _misfit(name, value, properties[name]))
        ]
        found = [f'missing argument "{name}"' for name in missing]
        found += [f'unknown argument "{shortened(name)}"' for name in unknown[:3]]
        return "; ".join([*found, *wrong]) or None


def _misfit(name: str, value: Any, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with one argument: its type, or that it is none of an ``enum``."""
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f'argument "{name}" must be of type {" or ".join(kinds)}'
    allowed = schema.get("enum")
    if allowed is not None and value not in allowed:
        return f'argument "{name}" must be one of {", ".join(map(repr, allowed))}'
    return None


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # which Python takes for a number
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])
