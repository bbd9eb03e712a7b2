"""The embedded engine as a server of SGLang's HTTP contract: start, serve, stop.

    serve(settings) -> bind the port -> load the model -> listen -> ready -> SIGINT, SIGTERM -> stop

All of it runs on one event loop, the engine's steps too; only what waits for a trainer has threads.
"""

import asyncio
import errno
import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
from aiohttp import web

from megatron_spear.conversion.end_tokens import end_token_ids
from megatron_spear.conversion.fp8_blocks import CONFIG
from megatron_spear.conversion.shape import load_config
from megatron_spear.errors import ConfigError, EngineError, describe
from megatron_spear.rollout.engines.decoder import Decoder
from megatron_spear.rollout.engines.embedded import EmbeddedEngine, empty_weights
from megatron_spear.serving.control_routes import ControlRoutes
from megatron_spear.serving.state import Served, ServeSettings
from megatron_spear.serving.update_routes import UpdateRoutes
from megatron_spear.serving.updates import Loader, WeightUpdates
from megatron_spear.serving.wire import Refused, generate_error

log = logging.getLogger(__name__)

# For requests to be answered after the engine has failed them.
_STOP_S = 1.0
_BODY_BYTES = 64 << 20


class PortTaken(EngineError):
    """The address is in use, or not one of this machine."""


async def serve(
    settings: ServeSettings, ready: Callable[[str], object], stop: asyncio.Event
) -> None:
    """Serve until ``stop``; ``ready`` gets the URL once requests are answered.

    Raises PortTaken before anything is loaded, else what ``EmbeddedEngine.from_hf`` raises.
    """
    listener = _bind(settings.host, settings.port)
    try:
        torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
        app, served = make_app(settings)
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_STOP_S
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            port = listener.getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            ready(f"http://{host}:{port}")
            await stop.wait()
        finally:
            await served.engine.close()
            await runner.cleanup()
    finally:
        listener.close()


def run(settings: ServeSettings, ready: Callable[[str], object]) -> None:
    """``serve`` in this thread until SIGINT or SIGTERM."""

    async def until_signalled() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await serve(settings, ready, stop)

    asyncio.run(until_signalled())


def make_app(settings: ServeSettings) -> tuple[web.Application, Served]:
    """The application, with the model loaded."""
    loaders = {name: _loader(name) for name in settings.custom_weight_loaders}
    config = load_config(settings.model)
    quantization = _quantization(settings, config)
    if quantization and loaders:
        raise ConfigError(
            "--custom-weight-loader on a server with quantization: its weights are held dequantised"
            ", so a loader would not find the parameters that SGLang has; leave one of them out"
        )
    weights = empty_weights(settings.model, settings.max_context)
    engine = EmbeddedEngine(
        Decoder(weights, settings.max_context),
        max_slots=settings.max_slots,
        max_context=settings.max_context,
        deadline_s=settings.deadline_s,
    )
    served = Served(
        settings=settings,
        quantization=quantization,
        engine=engine,
        config=config,
        tokenizer=_tokenizer(settings),
        stop_token_ids=end_token_ids(settings.model, config),
        model_path=str(settings.model),
    )
    updates = WeightUpdates(served, loaders)
    updates.load_first(settings.model)
    size = sum(view.nbytes for view in weights.views.values())
    app = web.Application(middlewares=[_told], client_max_size=_BODY_BYTES + 4 * size)
    app.add_routes([*ControlRoutes(served).routes(), *UpdateRoutes(served, updates).routes()])
    return app, served


@web.middleware
async def _told(request: web.Request, handler: Any) -> web.StreamResponse:
    """Refusals as the answers they stand for; a fault of the server as 500 with its place."""
    try:
        response: web.StreamResponse = await handler(request)
    except Refused as refused:
        log.warning("%s %s: %d %s", request.method, request.path, refused.status, refused)
        return refused.response
    except web.HTTPException as error:
        return web.json_response({"detail": error.reason}, status=error.status)
    # A server answers every request, whatever it ran into.
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return generate_error(describe(error), 500).response
    return response


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: whoever calls too early is refused, not kept."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        taken = "another process has it" if error.errno == errno.EADDRINUSE else error.strerror
        raise PortTaken(f"cannot serve at {host}:{port}: {taken}; give another address") from None
    return listener


def _loader(name: str) -> Loader:
    module, _, function = name.rpartition(".")
    try:
        found: Loader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--custom-weight-loader {name}: {error}; expected the dotted name of a function "
            "(model, named_tensors)"
        ) from None
    return found


def _quantization(settings: ServeSettings, config: Any) -> str | None:
    """As told, or as the folder's weights are."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return settings.quantization
    different = {key: found.get(key) for key, value in CONFIG.items() if found.get(key) != value}
    if different:
        raise ConfigError(
            f"{settings.model} has a quantization_config with {different}; expected {CONFIG}"
        )
    return "fp8"


def _tokenizer(settings: ServeSettings) -> Any:
    if not (settings.model / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
