"""Weight updates: a session, its parts, and what the server may answer meanwhile.

    begin -> [update_weights_from_tensor | update_weights_from_distributed] ... -> end
    update_weights_from_disk is all of that in one

The engine is held still from begin to end. A part that fails fails the session; once a value was
written only a whole set makes the engine generate again, so no answer comes of mixed weights.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_spear.conversion.fp8_blocks import SCALE
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.errors import CheckpointError, EngineError, describe
from megatron_spear.serving.fp8_intake import Fp8Intake
from megatron_spear.serving.groups import UpdateGroups, in_thread
from megatron_spear.serving.parameters import FusedParameters
from megatron_spear.serving.payloads import NamedTensors, bucket_of, named_tensors
from megatron_spear.serving.state import Served

Loader = Callable[[FusedParameters, NamedTensors], object]

_OPEN = "a weight-update session is already open; call end_weight_update() first"
_NONE_OPEN = "no weight-update session is open; call begin_weight_update() first"
_BUSY = "another call of this weight-update session is under way; wait for its answer"
_MIXED = (
    "The full weights of the ModelRunner are partially updated. Please discard the whole weights."
)
# A receive ends by its group's deadline; this is for what comes after it.
_GRACE_S = 10.0


@dataclass(slots=True)
class _Session:
    """An open update. ``version`` is set once values are written, ``failed`` says why it cannot
    come to a good end; ``busy`` while one of its calls is under way."""

    label: str | None = None
    version: int | None = None
    failed: str | None = None
    busy: bool = False


class WeightUpdates:
    """All that changes the engine's weights; methods raise EngineError with SGLang's texts."""

    def __init__(self, served: Served, loaders: Mapping[str, Loader]) -> None:
        self._served = served
        self._loaders = loaders
        self._weights = served.engine.weights
        self._intake = Fp8Intake(self._weights) if served.quantization else None
        self._session: _Session | None = None
        self.parameters = FusedParameters(self._weights)
        self.groups = UpdateGroups(served.settings.update_deadline_s)

    async def begin(self) -> None:
        """Open a session; the engine stands still from here on."""
        self._require_none_open()
        session = self._session = _Session(busy=True)
        try:
            await self._served.hold()
        except BaseException:
            self._session = None
            raise
        session.busy = False

    async def end(self) -> None:
        """Close the session: the engine generates from the new weights, or refuses to."""
        session = self._session
        if session is None:
            raise EngineError(_NONE_OPEN)
        if session.busy:
            raise EngineError(_BUSY)
        self._session = None
        try:
            await self._finish(session)
        finally:
            await self._served.let_go()

    async def from_tensors(
        self, payload: str, load_format: str | None, label: str | None, *, aborts: bool
    ) -> None:
        """A part that came in the request."""
        session = self._require_open("update_weights_from_tensor", label)
        if load_format == "direct" and self._intake is not None:
            raise EngineError("load_format direct is not supported on a quantised server")
        if load_format not in (None, "direct", "flattened_bucket", *self._loaders):
            raise EngineError(
                f"Unknown load_format={load_format}; expected null, direct, flattened_bucket or "
                f"one given by --custom-weight-loader ({', '.join(self._loaders) or 'none was'})"
            )
        if aborts:
            self._served.engine.abort()

        def work() -> None:
            read = bucket_of if load_format == "flattened_bucket" else named_tensors
            tensors = read(payload)
            self._write(session)
            if load_format == "direct":
                self._put(tensors, self.parameters.put)
            elif (loader := self._loaders.get(load_format or "")) is not None:
                loader(self.parameters, tensors)
                self._weights.count_all()
            else:
                self._put(tensors, self._take)

        await self._part(session, lambda: in_thread(work, "load"), label)

    async def from_group(
        self,
        group: str,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sequence[int]],
        label: str | None,
        *,
        flattened: bool,
        aborts: bool,
    ) -> None:
        """A part that rank 0 of a group broadcasts."""
        session = self._require_open("update_weights_from_distributed", label)
        if aborts:
            self._served.engine.abort()

        async def work() -> None:
            try:
                tensors = await self.groups.receive(
                    group, names, dtypes, shapes, flattened=flattened
                )
            except RuntimeError as error:
                raise EngineError(f"Failed to receive weights: {error}") from None
            self._write(session)
            await in_thread(lambda: self._put(tensors, self._take), "load")

        await self._part(session, work, label)

    async def from_folder(self, folder: str, label: str | None, *, aborts: bool) -> None:
        """All weights of a Hugging Face folder."""
        self._require_none_open()
        session = self._session = _Session(label=label, busy=True)
        try:
            if aborts:
                self._served.engine.abort()
            async with self._served.held():
                await in_thread(
                    lambda: self._load_folder(Path(folder), lambda: self._write(session)), "load"
                )
                await self._finish(session)
        except CheckpointError as error:
            raise EngineError(f"Failed to get weights iterator: {error}") from None
        finally:
            self._session = None
        self._served.model_path = folder

    def set_label(self, label: str) -> None:
        """Label the weights, or those of the open session."""
        if self._session is None:
            self._served.relabel(label)
        else:
            self._session.label = label

    def load_first(self, folder: Path) -> None:
        """The weights that the server starts with; a quantised server rounds full precision."""
        self._load_folder(folder, lambda: self._start(0), rounds=True)
        if self._intake is not None:
            self._intake.finish()
        self._served.engine.end_update(0)

    def _load_folder(
        self, folder: Path, start: Callable[[], None], *, rounds: bool = False
    ) -> None:
        """Write a folder's tensors, after a look at all names and shapes and ``start``."""
        with HfReader(folder) as reader:
            put, names = self._take, reader.names
            in_fp8 = any(name.endswith(SCALE) for name in names)
            if self._intake is None or (rounds and not in_fp8):
                self._weights.require_all(names)
                for name in names:
                    self._weights.check(name, reader.get(name).shape)
                put = self._weights.put if self._intake is None else self._intake.put_rounded
            elif not in_fp8:
                raise EngineError(f"{folder} has no weights in FP8, as this quantised server needs")
            start()
            for name in names:
                put(name, reader.get(name))

    async def _part(
        self, session: _Session, work: Callable[[], Coroutine[Any, Any, None]], label: str | None
    ) -> None:
        """Do a part of a session; whatever goes wrong fails the session.

        What is late may still write, so the session stays busy until it has ended.
        """
        session.busy = True
        part = asyncio.ensure_future(work())
        part.add_done_callback(lambda _: setattr(session, "busy", False))
        limit_s = self._served.settings.update_deadline_s + _GRACE_S
        await asyncio.wait({part}, timeout=limit_s)
        if not part.done():
            session.failed = f"a part was not received within {limit_s} s"
            raise EngineError(f"Failed to receive weights: {session.failed}")
        try:
            part.result()
        except EngineError as error:
            session.failed = str(error)
            raise
        # A loader is the user's code and may raise anything.
        except Exception as error:
            session.failed = describe(error)
            raise EngineError(f"{describe(error)}. {_MIXED}") from error
        session.label = label or session.label

    def _write(self, session: _Session) -> None:
        """Values are about to change: from here on only a whole set will do."""
        if session.version is None:
            session.version = self._served.next_version(None)
            self._start(session.version)

    def _start(self, version: int) -> None:
        self._served.engine.begin_update(version)
        if self._intake is not None:
            self._intake.begin()

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        if self._intake is not None:
            self._intake.put(name, tensor)
        else:
            self._weights.put(name, tensor)

    def _put(self, tensors: NamedTensors, put: Callable[[str, torch.Tensor], None]) -> None:
        for name, tensor in tensors:
            try:
                put(name, tensor)
            except EngineError as error:
                raise EngineError(f"Failed to update parameter online: {error}. {_MIXED}") from None

    async def _finish(self, session: _Session) -> None:
        if session.failed is not None:
            raise EngineError(f"the update failed and was given up: {session.failed}")
        if session.version is None:  # nothing was sent
            if session.label is not None:
                self._served.relabel(session.label)
            return

        def work(version: int) -> None:
            if self._intake is not None:
                self._intake.finish()
            self._served.engine.end_update(version)

        version = session.version
        await in_thread(lambda: work(version), "finish")
        if session.label is not None:
            self._served.labels[version] = session.label

    def _require_none_open(self) -> None:
        if self._session is not None:
            raise EngineError(_OPEN)
        if "weights" in self._served.engine.released:
            raise EngineError("the weights' memory is released; resume_memory_occupation first")

    def _require_open(self, what: str, label: str | None) -> _Session:
        session = self._session
        if session is None:
            raise EngineError(
                f"{what} must run between begin_weight_update() and end_weight_update()"
            )
        if session.busy:
            raise EngineError(_BUSY)
        if session.failed is not None:
            raise EngineError(
                f"this weight-update session failed ({session.failed}); call end_weight_update() "
                "and begin another"
            )
        if label is not None and session.label not in (None, label):
            raise EngineError(
                f"weight_version {label!r} in a session that has {session.label!r}; one session "
                "is one version"
            )
        return session
