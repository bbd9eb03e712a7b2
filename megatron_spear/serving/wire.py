"""Reading requests strictly, and refusing them in SGLang's four shapes of an error."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

Body = Mapping[str, Any]


class Refused(Exception):
    """An answer that is no success, as ``body`` and HTTP ``status``."""

    def __init__(self, body: Mapping[str, Any], status: int = 400) -> None:
        super().__init__(str(body))
        self.body = body
        self.status = status

    @property
    def response(self) -> web.Response:
        """What the client gets."""
        return web.json_response(self.body, status=self.status)


def generate_error(message: str, status: int = 400) -> Refused:
    """What is wrong with a generation, or why the server cannot serve it (503)."""
    return Refused({"error": {"message": message}}, status)


def sampling_error(message: str) -> Refused:
    """What is wrong with ``sampling_params``."""
    return Refused({"error": message})


def schema_error(message: str) -> Refused:
    """A body that is not what the route takes."""
    return Refused(
        {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}
    )


def weights_error(message: str, **more: Any) -> Refused:
    """A weight update, or something around one, that failed."""
    return Refused({"success": False, "message": message, **more})


async def read_body(request: web.Request, known: Iterable[str]) -> Body:
    """The JSON object of a request, ``{}`` without one; only ``known`` fields are taken."""
    raw = await request.read()
    try:
        body = json.loads(raw) if raw.strip() else {}
    except ValueError as error:
        raise schema_error(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise schema_error(f"the body is {type(body).__name__}; expected a JSON object")
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise schema_error(
            f"unknown field {', '.join(unknown)}; {request.path} takes {', '.join(sorted(known))}"
        )
    return body


_KINDS: Mapping[str, tuple[type, ...]] = {
    "a string": (str,),
    "a number": (int, float),
    "an integer": (int,),
    "true or false": (bool,),
    "a list": (list,),
    "an object": (dict,),
}


def take(body: Body, name: str, kind: str, default: Any = ...) -> Any:
    """A field of the given kind; without a default it has to be there. None is the default."""
    value = body.get(name)
    if value is None:
        if default is ...:
            raise schema_error(f"field {name} is missing; expected {kind}")
        return default
    wrong = not isinstance(value, _KINDS[kind])
    if wrong or (isinstance(value, bool) and kind != "true or false"):
        raise schema_error(f"field {name} is {value!r}"[:200] + f"; expected {kind}")
    return value


def require_neutral(body: Body, neutral: Mapping[str, tuple[Any, ...]], why: str) -> None:
    """Refuse settings that would change the answer and that this server does not have."""
    for name, values in neutral.items():
        given = body.get(name)
        if given is not None and not any(given == value for value in values):
            expected = " or ".join(map(repr, values)) if values else "nothing"
            raise generate_error(f"{name}={given!r} is not supported: {why}; expected {expected}")
