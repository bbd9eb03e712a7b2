"""A server that speaks SGLang's HTTP API and draws from a hash: for tests of clients and updates.

    server = FakeSGLang()
    loop.run(server.start())                  # listens at server.url
    server.faults += ["busy", "drop"]         # what becomes of the next two generations
    loop.run(server.kill())                   # connections drop, nobody listens
    loop.run(server.start())                  # again on its port, with its first weights

A token depends on the weights' name, the context and the seed (not at temperature 0 or a tiny
top_p); so a generation that is gone on with, or drawn again, gives the same tokens. ``step_s`` is
the time of a token. As SGLang does, it stops at its ``eos_token_ids`` unless told otherwise, holds
requests back while paused, and dies of a token id outside its vocabulary.
"""

import asyncio
import contextlib
import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Literal

from aiohttp import web

Fault = Literal[
    "busy", "error", "refuse", "drop", "garbage", "truncated", "abort", "foreign", "hang"
]

_Body = dict[str, Any]
_ONE_TOKEN = 1e-3
"""A top_p that no second token gets into."""


class _Drawing:
    """A generation under way."""

    def __init__(self, body: _Body) -> None:
        self.body = body
        self.tokens: list[int] = []
        self.spans: list[dict[str, Any]] = []
        self.aborted = False

    def draw(self, token: int, label: str) -> None:
        self.tokens.append(token)
        size = len(self.tokens)
        if self.spans and self.spans[-1]["version"] == label:
            self.spans[-1]["end"] = size
        else:
            self.spans.append({"version": label, "start": size - 1, "end": size})


class FakeSGLang:
    """One server; all methods belong to one event loop.

    ``calls`` are the paths and bodies of all requests that came, ``faults`` what is done to the
    next generations. Set ``label`` to play another trainer.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 100,
        max_context: int = 64,
        tp_size: int = 1,
        eos_token_ids: tuple[int, ...] = (),
        step_s: float = 0.0,
        first_weights: str = "first",
    ) -> None:
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.tp_size = tp_size
        self.eos_token_ids = eos_token_ids
        self.step_s = step_s
        self.first_weights = first_weights
        self.port = 0
        self.calls: list[tuple[str, _Body]] = []
        self.faults: list[Fault] = []
        self._reset()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_running(self) -> int:
        """Generations that it works at or holds back."""
        return len(self._drawings)

    def bodies(self, path: str) -> list[_Body]:
        """What came to ``path``."""
        return [body for called, body in self.calls if called == path]

    async def start(self) -> None:
        """Listen, on the port of the last time if there was one."""
        self._reset()
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([web.get("/model_info", self._info), web.get("/server_info", self._info)])
        app.add_routes([web.post(path, self._post) for path in _POSTS])
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.0, handler_cancellation=True
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=4096, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Drop every connection and stop listening."""
        server = self._runner.server
        assert server is not None
        for connection in tuple(server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    def _reset(self) -> None:
        self.label = "default"
        self.weights = self.first_weights
        self.paused: str | None = None
        self.in_update = False
        self.groups: set[str] = set()
        self._drawings: dict[str, _Drawing] = {}

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "weight_version": self.label,
                "tp_size": self.tp_size,
                "dp_size": 1,
                "max_req_input_len": self.max_context,
            }
        )

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        self.calls.append((request.path, body))
        if request.path == "/generate":
            return await self._generate(request, body)
        answer: web.Response = _POSTS[request.path](self, body)
        return answer

    async def _generate(self, request: web.Request, body: _Body) -> web.StreamResponse:
        fault = self.faults.pop(0) if self.faults else None
        if fault in _BAD_ANSWERS:
            return _BAD_ANSWERS[fault]()
        if fault == "drop" or any(t >= self.vocab_size or t < 0 for t in body["input_ids"]):
            assert request.transport is not None
            request.transport.abort()
            if fault is None:
                asyncio.get_running_loop().create_task(self.kill())
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(3600.0)
        if not body["input_ids"]:
            return _error(400, {"error": {"message": "input_ids cannot be empty."}})
        if len(body["input_ids"]) >= self.max_context:
            return _error(400, {"error": {"message": "The input is longer than the context"}})
        drawing = _Drawing(body)
        self._drawings[body["rid"]] = drawing
        try:
            reason = {"type": "abort", "message": "Aborted"}
            if fault != "abort":
                reason = await self._draw(drawing)
        finally:
            del self._drawings[body["rid"]]
        answer = self._answer(drawing, reason)
        if fault == "foreign":
            answer["meta_info"]["weight_versions"][-1]["version"] = f"{0xDEADBEEF:x}/3"
        if fault == "truncated":
            return await _truncated(request, answer)
        return web.json_response(answer)

    async def _draw(self, drawing: _Drawing) -> dict[str, Any]:
        """Draw until something ends it: the finish reason."""
        params, prompt = drawing.body["sampling_params"], drawing.body["input_ids"]
        stops = set() if params["ignore_eos"] else {*params["stop_token_ids"], *self.eos_token_ids}
        while True:
            if self.step_s:
                await asyncio.sleep(self.step_s)
            while self.paused is not None and not drawing.aborted:
                await asyncio.sleep(0.002)
            if drawing.aborted:
                return {"type": "abort", "message": "Aborted", "status_code": None}
            token = self.token([*prompt, *drawing.tokens], params)
            drawing.draw(token, self.label)
            if token in stops:
                return {"type": "stop", "matched": token}
            if len(drawing.tokens) >= params["max_new_tokens"]:
                return {"type": "length", "length": params["max_new_tokens"]}

    def token(self, context: list[int], params: _Body) -> int:
        """The next token of a context."""
        greedy = not params["temperature"] or params["top_p"] < _ONE_TOKEN
        seed = 0 if greedy else params["sampling_seed"]
        key = repr((self.weights, len(context), context[-1], seed))
        return zlib.crc32(key.encode()) % self.vocab_size

    def _answer(self, drawing: _Drawing, reason: dict[str, Any]) -> dict[str, Any]:
        spans = drawing.spans or [{"version": self.label, "start": 0, "end": 0}]
        return {
            "text": "",
            "output_ids": drawing.tokens,
            "meta_info": {
                "finish_reason": reason,
                "weight_version": self.label,
                "weight_versions": spans,
                "output_token_logprobs": [[logprob(t), t, None] for t in drawing.tokens],
            },
        }

    def _abort(self, body: _Body) -> web.Response:
        drawings = self._drawings.values() if body.get("abort_all") else ()
        for drawing in (*drawings, self._drawings.get(body.get("rid", ""))):
            if drawing is not None:
                drawing.aborted = True
        return web.Response()

    def _pause(self, body: _Body) -> web.Response:
        self.paused = body["mode"]
        if self.paused == "abort":
            for drawing in self._drawings.values():
                drawing.aborted = True
        return web.json_response({"status": "ok"})

    def _continue(self, body: _Body) -> web.Response:
        self.paused = None
        return web.json_response({"status": "ok"})

    def _flush(self, body: _Body) -> web.Response:
        if self._drawings and self.paused is None:
            return web.Response(status=400, text="Flush cache failed.")
        return web.Response(text="Cache flushed.")

    def _check_weights(self, body: _Body) -> web.Response:
        names = {"model.embed_tokens.weight": "00", "model.norm.weight": "01"}
        return web.json_response({"success": True, "message": "", "ranks": [{"checksums": names}]})

    def _begin(self, body: _Body) -> web.Response:
        if self.in_update:
            return _failed(
                "a weight-update session is already open; call end_weight_update() first"
            )
        self.in_update = True
        return _done()

    def _end(self, body: _Body) -> web.Response:
        if not self.in_update:
            return _failed("no weight-update session is open; call begin_weight_update() first")
        self.in_update = False
        return _done()

    def _from_disk(self, body: _Body) -> web.Response:
        self.weights = body["model_path"]
        return self._relabel({"new_version": body["weight_version"]})

    def _relabel(self, body: _Body) -> web.Response:
        self.label = body["new_version"]
        return _done()

    def _join(self, body: _Body) -> web.Response:
        self.groups.add(body["group_name"])
        return _done()

    def _leave(self, body: _Body) -> web.Response:
        if body["group_name"] not in self.groups:
            return _failed("The group to be destroyed does not exist.")
        self.groups.remove(body["group_name"])
        return _done()

    def _from_payload(self, body: _Body) -> web.Response:
        """From tensors or a broadcast, of which nothing but a hash is kept."""
        if not self.in_update:
            return _failed(
                "an update must run between begin_weight_update() and end_weight_update()"
            )
        self.weights = hashlib.sha256(repr(sorted(body.items())).encode()).hexdigest()
        return _done()

    def _memory(self, body: _Body) -> web.Response:
        return web.json_response(None)


def logprob(token: int) -> float:
    """The log-prob that the server gives a token."""
    return -(1 + token % 16) / 16


def _done() -> web.Response:
    return web.json_response({"success": True, "message": "Success"})


def _failed(why: str) -> web.Response:
    return _error(400, {"success": False, "message": why})


def _error(status: int, body: _Body) -> web.Response:
    return web.json_response(body, status=status)


async def _truncated(request: web.Request, answer: _Body) -> web.StreamResponse:
    """Half of the body that was announced, then the end of the connection."""
    whole = web.json_response(answer).body
    assert isinstance(whole, bytes)
    response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    assert request.transport is not None
    with contextlib.suppress(ConnectionError):
        request.transport.abort()
    return response


_BAD_ANSWERS: dict[str | None, Callable[[], web.Response]] = {
    "busy": lambda: _error(503, {"error": {"message": "The server is overloaded."}}),
    "error": lambda: _error(500, {"detail": "Internal Server Error"}),
    "refuse": lambda: _error(400, {"error": {"message": "This request is not for us."}}),
    "garbage": lambda: web.Response(text="<html>it works</html>"),
}

_POSTS: dict[str, Any] = {
    "/generate": None,
    "/abort_request": FakeSGLang._abort,
    "/pause_generation": FakeSGLang._pause,
    "/continue_generation": FakeSGLang._continue,
    "/flush_cache": FakeSGLang._flush,
    "/weights_checker": FakeSGLang._check_weights,
    "/begin_weight_update": FakeSGLang._begin,
    "/end_weight_update": FakeSGLang._end,
    "/update_weights_from_disk": FakeSGLang._from_disk,
    "/update_weights_from_distributed": FakeSGLang._from_payload,
    "/update_weights_from_tensor": FakeSGLang._from_payload,
    "/update_weight_version": FakeSGLang._relabel,
    "/init_weights_update_group": FakeSGLang._join,
    "/destroy_weights_update_group": FakeSGLang._leave,
    "/release_memory_occupation": FakeSGLang._memory,
    "/resume_memory_occupation": FakeSGLang._memory,
}
