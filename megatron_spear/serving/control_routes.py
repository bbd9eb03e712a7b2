"""Routes of SGLang's contract around generation: pausing, aborting, health, what is served."""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from aiohttp import web

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.serving.generation import generate
from megatron_spear.serving.state import Served
from megatron_spear.serving.wire import generate_error, read_body, schema_error, take

Handler = Callable[[web.Request], Awaitable[web.Response]]

_MEMORY = ("weights", "kv_cache", "cuda_graph")
_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class ControlRoutes:
    """The handlers, over what they share."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._engine = served.engine

    def routes(self) -> list[web.RouteDef]:
        """All of them."""
        return [
            web.post("/generate", self._generate),
            web.post("/abort_request", self._abort),
            web.post("/pause_generation", self._pause),
            web.post("/continue_generation", self._continue),
            *_both("/flush_cache", self._flush_cache),
            *_both("/release_memory_occupation", self._release_memory),
            *_both("/resume_memory_occupation", self._resume_memory),
            web.get("/health", self._health),
            web.get("/health_generate", self._health),
            web.get("/ready", self._ready),
            web.get("/ping", self._ping),
            *(web.get(path, self._model_info) for path in ("/model_info", "/get_model_info")),
            *(web.get(path, self._server_info) for path in ("/server_info", "/get_server_info")),
        ]

    async def _generate(self, request: web.Request) -> web.Response:
        return await generate(self._served, request)

    async def _abort(self, request: web.Request) -> web.Response:
        body = await read_body(request, ("rid", "abort_all", "abort_message"))
        if take(body, "abort_all", "true or false", False):
            self._engine.abort()
        elif (rid := take(body, "rid", "a string", "")) in self._served.sessions:
            self._engine.abort(self._served.sessions[rid])
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = await read_body(request, ("mode",))
        mode = take(body, "mode", "a string", "abort")
        if mode == "in_place":
            raise schema_error(
                "mode in_place is not supported: it goes on over keys and values of the old "
                "weights, so that no weights reproduce the log-probs; use retract or abort"
            )
        if mode not in ("retract", "abort"):
            raise schema_error(f"mode {mode!r} is not known; expected retract or abort")
        await self._served.pause(mode)
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await read_body(request, ("torch_empty_cache",))
        await self._served.resume()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, request: web.Request) -> web.Response:
        if not self._engine.is_still:
            return web.Response(text="Flush cache failed.\n", status=400)
        self._engine.flush_cache()
        return web.Response(text=_FLUSHED)

    async def _release_memory(self, request: web.Request) -> web.Response:
        tags, idle = await _tags(request), "should be called only when server is idle"
        if self._served.is_updating:
            raise generate_error(f"release_memory_occupation {idle}: a weight update is open")
        try:
            self._engine.release_memory(tags)
        except EngineError as error:
            raise generate_error(f"release_memory_occupation {idle}: {error}") from None
        return web.json_response(None)

    async def _resume_memory(self, request: web.Request) -> web.Response:
        self._engine.resume_memory(await _tags(request))
        return web.json_response(None)

    async def _health(self, request: web.Request) -> web.Response:
        """One token is drawn, unless some are being drawn anyway."""
        why = self._served.held_by or self._engine.unusable
        if why is not None:
            return web.Response(status=503, text=f"{why}\n")
        if self._engine.is_still:
            ask = GenerationRequest(
                session="health check",
                token_ids=np.zeros(1, np.int32),
                sampling=SamplingParams(temperature=0.0, max_new_tokens=1),
                seed=0,
            )
            try:
                await self._engine.generate(ask)
            except EngineError as error:
                return web.Response(status=503, text=f"{error}\n")
            self._engine.release(ask.session)
        return web.Response()

    async def _ready(self, request: web.Request) -> web.Response:
        fit = self._served.held_by is None and self._engine.unusable is None
        return web.Response(status=200 if fit else 503)

    async def _ping(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _model_info(self, request: web.Request) -> web.Response:
        served, config = self._served, self._served.config
        return web.json_response(
            {
                "model_path": served.model_path,
                "served_model_name": served.model_path,
                "tokenizer_path": str(served.settings.model),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": served.label,
                "load_format": "auto",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": config.model_type,
                "architectures": config.architectures,
            }
        )

    async def _server_info(self, request: web.Request) -> web.Response:
        """Of SGLang's some 500 keys those that a trainer may want."""
        settings = self._served.settings
        return web.json_response(
            {
                "version": "megatron-spear",
                "model_path": str(settings.model),
                "tokenizer_path": str(settings.model),
                "host": settings.host,
                "port": settings.port,
                "tp_size": 1,
                "pp_size": 1,
                "dp_size": 1,
                "ep_size": 1,
                "device": "cpu",
                "dtype": str(self._engine.weights.dtype).removeprefix("torch."),
                "quantization": self._served.quantization,
                "custom_weight_loader": list(settings.custom_weight_loaders),
                "context_length": settings.max_context,
                "max_req_input_len": settings.max_context - 1,
                "max_running_requests": settings.max_slots,
                "max_total_num_tokens": settings.max_slots * settings.max_context,
                "vocab_size": self._served.config.vocab_size,
                "internal_states": [dict(self._engine.stats)],
            }
        )


def _both(path: str, handler: Handler) -> Sequence[web.RouteDef]:
    return web.get(path, handler), web.post(path, handler)


async def _tags(request: web.Request) -> frozenset[str]:
    """What of the memory is meant; all without a word. There are no CUDA graphs here."""
    body = await read_body(request, ("tags",))
    tags = take(body, "tags", "a list", []) or list(_MEMORY)
    unknown = [tag for tag in tags if tag not in _MEMORY]
    if unknown:
        raise schema_error(f"tags {unknown} are not known; expected some of {', '.join(_MEMORY)}")
    return frozenset(tags) - {"cuda_graph"}
