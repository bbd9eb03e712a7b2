"""``consumed.jsonl``: every prompt that the run consumed, once, with what became of it.

One JSON object a line: ``{"step": 3, "position": 17, "prompt_id": "game-17", "fate": "trained"}``;
fates are those of ``types.Fate``. A line is on disk before the checkpoint that counts its prompt as
consumed; lines after the checkpoint that a run is resumed from are removed, for its prompts are
played again.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_spear.tracking.jsonl import LineFile
from megatron_spear.types import ConsumedPrompt

log = logging.getLogger(__name__)


class ConsumptionLog:
    """Appends the prompts of each step.

    ``resumed`` is the step of the checkpoint that the run is resumed from, and how many prompts had
    been consumed by then: those of later steps are removed, and a log that has not just these is
    told of, since somebody has changed it.
    """

    def __init__(self, path: Path, *, resumed: tuple[int, int] | None = None) -> None:
        self._lines = LineFile(path, resumed_step=resumed[0] if resumed is not None else None)
        self._lines.open()
        if resumed is not None:
            step, expected = resumed
            found = len(read_consumed(path))
            if found != expected:
                log.warning(
                    "%s names %d prompts up to step %d, expected %d: it was changed since; the run "
                    "itself goes on from its checkpoint, which loses and repeats none",
                    path,
                    found,
                    step,
                    expected,
                )

    def log(self, step: int, consumed: Iterable[ConsumedPrompt]) -> None:
        """Append a step's prompts, on disk before this returns. Raises OSError: a run that cannot
        say what it consumed must not go on."""
        self._lines.append({"step": step, **asdict(prompt)} for prompt in consumed)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_consumed(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``consumed.jsonl``, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
