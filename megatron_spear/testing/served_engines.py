"""Engines over servers for the engine contract: a new fleet over the same servers each time.

with serve_in_process(folder) as served, ServedEngines(loop, "sglang", [served.url], folder) as e:
    check_engine(loop, e.make, update=e.update)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.rollout.engine import RolloutEngine
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.trainer.engines import MadeEngine, make_engine, serve_folder


class ServedEngines:
    """Makes engines over the servers at ``urls``, with the weights of a Hugging Face folder.

    A context manager: it closes what it made.
    """

    def __init__(self, loop: EventLoop, kind: Any, urls: Sequence[str], folder: Path) -> None:
        self._loop, self._folder = loop, folder
        self._rollout = RolloutSection(engine=kind, servers=tuple(urls), engine_deadline_s=60)
        self._made: list[MadeEngine] = []

    def __enter__(self) -> "ServedEngines":
        return self

    def __exit__(self, *exc: object) -> None:
        for made in self._made:
            self._loop.run(made.engine.close())

    def make(self) -> RolloutEngine:
        """An engine of version 0."""
        made = make_engine(
            self._rollout, WeightSyncSection(deadline_s=60), self._folder, self._loop
        )
        self._made.append(made)
        assert made.updates is not None
        serve_folder(made.updates, self._folder, 0)
        return made.engine

    def update(self, engine: RolloutEngine, policy_version: int) -> None:
        """Load the folder's weights again, as another version."""
        (updates,) = [made.updates for made in self._made if made.engine is engine]
        assert updates is not None
        serve_folder(updates, self._folder, policy_version)
