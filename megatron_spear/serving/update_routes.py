"""Routes of SGLang's contract that change or check the weights."""

import asyncio
from hashlib import sha256
from math import prod

from aiohttp import web

from megatron_spear.errors import EngineError
from megatron_spear.serving.control_routes import Handler
from megatron_spear.serving.payloads import dtype_of
from megatron_spear.serving.state import Served
from megatron_spear.serving.updates import WeightUpdates
from megatron_spear.serving.wire import Body, read_body, schema_error, take, weights_error

_COMMON = (
    "load_format",
    "flush_cache",
    "abort_all_requests",
    "weight_version",
    "torch_empty_cache",
)
_RANK = {
    "role": "target",
    "tp_rank": 0,
    "tp_size": 1,
    "dp_rank": 0,
    "dp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "rank": 0,
    "size": 1,
}
_GROUP = "weight_update_group"


class UpdateRoutes:
    """The handlers, over what they share."""

    def __init__(self, served: Served, updates: WeightUpdates) -> None:
        self._served = served
        self._updates = updates

    def routes(self) -> list[web.RouteDef]:
        """All of them."""
        return [
            web.post("/init_weights_update_group", _finished(self._init_group)),
            web.post("/destroy_weights_update_group", _finished(self._destroy_group)),
            web.post("/begin_weight_update", _finished(self._begin)),
            web.post("/end_weight_update", _finished(self._end)),
            web.post("/update_weights_from_tensor", _finished(self._from_tensor)),
            web.post("/update_weights_from_distributed", _finished(self._from_distributed)),
            web.post("/update_weights_from_disk", _finished(self._from_disk)),
            web.post("/update_weight_version", self._update_version),
            web.get("/weights_checker", self._check),
            web.post("/weights_checker", self._check),
        ]

    async def _init_group(self, request: web.Request) -> web.Response:
        known = ("master_address", "master_port", "rank_offset", "world_size", "group_name")
        body = await read_body(request, (*known, "backend"))
        backend = take(body, "backend", "a string", "nccl")
        if backend != "gloo":
            raise weights_error(
                f"Failed to initialize custom process group: backend {backend!r}, but this server "
                "runs on a CPU; give backend gloo."
            )
        rank = take(body, "rank_offset", "an integer")
        size = take(body, "world_size", "an integer")
        if not 1 <= rank < size:
            raise weights_error(
                f"Failed to initialize custom process group: rank_offset={rank} of world_size="
                f"{size}; rank 0 is the trainer's, so expected 1 to {size - 1}."
            )
        try:
            await self._updates.groups.join(
                host=take(body, "master_address", "a string"),
                port=take(body, "master_port", "an integer"),
                rank=rank,
                world_size=size,
                name=take(body, "group_name", "a string", _GROUP),
                backend=backend,
            )
        except EngineError as error:
            raise weights_error(f"Failed to initialize custom process group: {error}.") from None
        return _done("Succeeded to initialize custom process group.")

    async def _destroy_group(self, request: web.Request) -> web.Response:
        body = await read_body(request, ("group_name",))
        await self._updates.groups.leave(take(body, "group_name", "a string", _GROUP))
        return _done("Succeeded to destroy custom process group.")

    async def _begin(self, request: web.Request) -> web.Response:
        body = await read_body(request, ("selector",))
        _require_target(body)
        await self._updates.begin()
        return _done("Success")

    async def _end(self, request: web.Request) -> web.Response:
        await read_body(request, ())
        await self._updates.end()
        return _done("Success")

    async def _from_tensor(self, request: web.Request) -> web.Response:
        body = await read_body(request, ("serialized_named_tensors", "selector", *_COMMON))
        _require_target(body)
        payloads = take(body, "serialized_named_tensors", "a list")
        if len(payloads) != 1:
            raise weights_error(
                f"serialized_named_tensors has {len(payloads)} entries; expected one a tensor "
                "parallel rank, and this server has one"
            )
        label = take(body, "weight_version", "a string", None)
        await self._updates.from_tensors(
            payloads[0],
            take(body, "load_format", "a string", None),
            label,
            aborts=take(body, "abort_all_requests", "true or false", False),
        )
        return _done("Success", label)

    async def _from_distributed(self, request: web.Request) -> web.Response:
        known = ("names", "dtypes", "shapes", "group_name", "selector", *_COMMON)
        body = await read_body(request, known)
        _require_target(body)
        names, dtypes, shapes = (
            take(body, name, "a list") for name in ("names", "dtypes", "shapes")
        )
        if not len(names) == len(dtypes) == len(shapes):
            raise schema_error(
                f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes; expected as many"
            )
        load_format = take(body, "load_format", "a string", None)
        if load_format not in (None, "flattened_bucket"):
            raise weights_error(
                f"load_format {load_format!r} is not supported here; expected null or "
                "flattened_bucket (SGLang would take it for null)"
            )
        types = [dtype_of(name) for name in dtypes]
        self._require_sane(shapes)
        label = take(body, "weight_version", "a string", None)
        await self._updates.from_group(
            take(body, "group_name", "a string", _GROUP),
            names,
            types,
            shapes,
            label,
            flattened=load_format == "flattened_bucket",
            aborts=take(body, "abort_all_requests", "true or false", False),
        )
        return _done("Succeeded to update parameter online.", label)

    async def _from_disk(self, request: web.Request) -> web.Response:
        more = ("model_path", "is_async", "keep_pause", "recapture_cuda_graph", "token_step")
        body = await read_body(request, (*more, *_COMMON))
        for name in ("is_async", "keep_pause"):
            if take(body, name, "true or false", False):
                raise weights_error(f"{name} is not supported", num_paused_requests=0)
        load_format = take(body, "load_format", "a string", None)
        if load_format not in (None, "auto", "safetensors"):
            raise weights_error(
                f"load_format {load_format!r} is not supported; expected auto or safetensors",
                num_paused_requests=0,
            )
        label = take(body, "weight_version", "a string", None)
        try:
            await self._updates.from_folder(
                take(body, "model_path", "a string"),
                label,
                aborts=take(body, "abort_all_requests", "true or false", False),
            )
        except EngineError as error:
            raise weights_error(str(error), num_paused_requests=0) from None
        return _done("Succeeded to update model weights.", label, num_paused_requests=0)

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await read_body(request, ("new_version", "abort_all_requests"))
        label = take(body, "new_version", "a string")
        if take(body, "abort_all_requests", "true or false", True):
            self._served.engine.abort()
        self._updates.set_label(label)
        return web.json_response(
            {
                "success": True,
                "message": f"Weight version updated to {label}",
                "new_version": label,
            }
        )

    async def _check(self, request: web.Request) -> web.Response:
        known = ("action", "allow_quant_error", "skip_tensor_list", "selector")
        body = await read_body(request, known)
        action = take(body, "action", "a string", "checksum")
        if action != "checksum":
            raise weights_error(f"action {action!r} is not supported; expected checksum")
        if self._served.engine.released:
            raise weights_error("the memory of the weights is released; resume it first")
        skipped = take(body, "skip_tensor_list", "a list", [])
        sums = self._updates.parameters.checksums()
        sums = {name: each for name, each in sums.items() if not any(s in name for s in skipped)}
        whole = sha256("".join(f"{name} {sums[name]}\n" for name in sorted(sums)).encode())
        rank = {
            "checksums": sums,
            "per_gpu_checksum": whole.hexdigest(),
            "parallelism_info": [_RANK],
        }
        engine = sha256(whole.hexdigest().encode()).hexdigest()
        return _done("Success", ranks=[rank], per_engine_checksum=engine)

    def _require_sane(self, shapes: list[object]) -> None:
        """Shapes are lists of sizes, and all of them no more than two models."""
        most = 2 * sum(view.numel() for view in self._served.engine.weights.views.values())
        total = 0
        for shape in shapes:
            if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
                raise schema_error(f"shape {shape!r} is no list of sizes")
            total += prod(shape)
        if total > most:
            raise weights_error(f"{total} values in one bucket; the model has {most // 2}")


def _finished(handler: Handler) -> Handler:
    """A handler that is carried out to its end even if the client goes away, and whose EngineError
    is told as SGLang tells it."""

    async def handle(request: web.Request) -> web.Response:
        try:
            return await asyncio.shield(asyncio.ensure_future(handler(request)))
        except EngineError as error:
            raise weights_error(str(error)) from None

    return handle


def _done(message: str, label: str | None = None, **more: object) -> web.Response:
    if label is not None:
        message += f" Weight version updated to {label}."
    return web.json_response({"success": True, "message": message, **more})


def _require_target(body: Body) -> None:
    selector = take(body, "selector", "a string", "all")
    if selector not in ("all", "target"):
        raise weights_error(f"selector {selector!r} is not supported; expected all or target")
