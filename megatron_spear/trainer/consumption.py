"""``consumed.jsonl``: every prompt that the run consumed, once, with what became of it.

One JSON object a line: ``{"step": 3, "position": 17, "prompt_id": "game-17", "fate": "trained"}``;
fates are those of ``types.Fate``. A line is on disk before the checkpoint that counts its prompt as
consumed; lines after the checkpoint that a run is resumed from are removed, for its prompts are
played again.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_spear.tracking.jsonl import drop_after
from megatron_spear.types import ConsumedPrompt

log = logging.getLogger(__name__)


class ConsumptionLog:
    """Appends the prompts of each step.

    ``resumed`` is the step of the checkpoint that the run is resumed from, and how many prompts had
    been consumed by then: those of later steps are removed, and a log that has not just these is
    told of, since somebody has changed it.
    """

    def __init__(self, path: Path, *, resumed: tuple[int, int] | None = None) -> None:
        if resumed is not None:
            step, expected = resumed
            drop_after(path, step)
            found = len(read_consumed(path)) if path.exists() else 0
            if found != expected:
                log.warning(
                    "%s names %d prompts up to step %d, expected %d: it was changed since; the run "
                    "itself goes on from its checkpoint, which loses and repeats none",
                    path,
                    found,
                    step,
                    expected,
                )
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, consumed: Iterable[ConsumedPrompt]) -> None:
        """Append a step's prompts, on disk before this returns. Raises OSError: a run that cannot
        say what it consumed must not go on."""
        self._file.writelines(
            json.dumps({"step": step, **asdict(prompt)}) + "\n" for prompt in consumed
        )
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_consumed(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``consumed.jsonl``, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
