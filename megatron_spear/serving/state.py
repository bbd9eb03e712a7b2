"""What the routes share: the engine, the labels of its weights, and who holds it still."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.types import VersionSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """What ``megatron-spear serve`` was told.

    ``deadline_s`` is for a generation, its waiting included; ``update_deadline_s`` for each part of
    a weight update. ``threads`` 0 = all cores; ``quantization`` is ``fp8`` or None;
    ``custom_weight_loaders`` are dotted names of functions.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 30000
    max_slots: int = 32
    max_context: int = 2048
    deadline_s: float = 600.0
    update_deadline_s: float = 120.0
    threads: int = 0
    quantization: str | None = None
    custom_weight_loaders: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Served:
    """The engine, and what a client may ask about it.

    The engine counts updates; clients know them by ``labels``, one an update. ``tokenizer`` is None
    where the folder has none, ``config`` the folder's transformers config. ``sessions`` are the
    engine's sessions by the ``rid`` of each request under way.
    """

    settings: ServeSettings
    quantization: str | None
    engine: EmbeddedEngine
    config: Any
    tokenizer: Any
    stop_token_ids: frozenset[int]
    model_path: str
    paused: bool = False
    labels: list[str] = field(default_factory=lambda: ["default"])
    sessions: dict[str, str] = field(default_factory=dict)
    _holds: int = 0

    @property
    def is_updating(self) -> bool:
        """True while a weight update holds the engine."""
        return self._holds > 0

    @property
    def held_by(self) -> str | None:
        """Why nothing is drawn at present; None if something could be."""
        if self.is_updating:
            return "a weight update is open, and holds the server still"
        return "the server is paused until /continue_generation" if self.paused else None

    @property
    def label(self) -> str:
        """The present weights' ``weight_version``."""
        return self.labels[self.engine.policy_version]

    def next_version(self, label: str | None) -> int:
        """The number of an update to come; without a label it goes by the one before."""
        del self.labels[self.engine.policy_version + 1 :]
        self.labels.append(self.label if label is None else label)
        return len(self.labels) - 1

    def relabel(self, label: str) -> None:
        """Call the present weights by another label from now on."""
        self.engine.policy_version = self.next_version(label)

    def spans(self, versions: tuple[VersionSpan, ...]) -> list[dict[str, Any]]:
        """Half-open ranges of output tokens with their labels, neighbours of one label joined."""
        spans: list[dict[str, Any]] = []
        at = 0
        for version, count in versions:
            label = self.labels[version]
            if spans and spans[-1]["version"] == label:
                spans[-1]["end"] = at + count
            else:
                spans.append({"version": label, "start": at, "end": at + count})
            at += count
        return spans

    async def pause(self, mode: str) -> None:
        """``retract`` or ``abort``; what comes later waits."""
        self.paused = True
        if mode == "abort":
            self.engine.abort()
        await self.engine.pause("retract")

    async def resume(self) -> None:
        """Go on, unless a weight update still holds the engine."""
        self.paused = False
        if not self.is_updating:
            await self.engine.resume()

    async def hold(self) -> None:
        """Keep the engine still until ``let_go``. Without a pause what runs comes to its end first;
        EngineError where it does not in time."""
        limit_s = self.settings.update_deadline_s
        self._holds += 1
        try:
            if not self.paused:
                async with asyncio.timeout(limit_s):
                    await self.engine.drain()
        except BaseException as error:
            await self.let_go()
            if not isinstance(error, TimeoutError):
                raise
            raise EngineError(
                f"the generations under way did not end within {limit_s} s; pause_generation first"
            ) from None

    async def let_go(self) -> None:
        """Undo one ``hold``."""
        self._holds -= 1
        if not self.is_updating and not self.paused:
            await self.engine.resume()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """``hold`` for a while."""
        await self.hold()
        try:
            yield
        finally:
            await self.let_go()
