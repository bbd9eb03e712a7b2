"""``evaluations.jsonl``: each game of the panel at every evaluation of a run.

One JSON object a line: ``{"step": 20, "eval/panel": "2a7a9e..", "eval/won": [1.0, 0.0, null]}``.
``eval/won`` is the share of attempts won, game by game in the panel's order, null where all
attempts failed. Comparisons of runs pair their games by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.tracking.jsonl import LineFile, read_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelRecord:
    """What the panel came to after ``step`` trainer steps."""

    step: int
    panel_sha256: str
    won: tuple[float | None, ...]

    @property
    def success(self) -> float | None:
        """Mean share won over the games that have one; None where all attempts failed.

        Example: (1, 0, None) gives 0.5.
        """
        return None if all(share is None for share in self.won) else share_won(self.won)


def share_won(won: Sequence[float | None]) -> float:
    """Mean share won over the games that have one. Example: (1, 0, None) gives 0.5."""
    played = [share for share in won if share is not None]
    assert played, "a rollout in which everything failed raises"
    return sum(played) / len(played)


class EvaluationLog:
    """Appends an evaluation a line, on disk before ``log`` returns.

    With ``resumed_step`` k the evaluations after the checkpoint of step k are removed first, for
    the resumed run makes them again.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        self._lines = LineFile(path, resumed_step=resumed_step)
        self._lines.open()

    def log(self, step: int, panel_sha256: str, won: Sequence[float | None]) -> None:
        """Append one evaluation. Raises OSError."""
        self._lines.append([{"step": step, "eval/panel": panel_sha256, "eval/won": list(won)}])

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_evaluations(path: Path) -> list[PanelRecord]:
    """The evaluations of a run by step, the last of each; a line cut off by a kill is left out."""
    return [
        PanelRecord(
            step=record["step"],
            panel_sha256=record["eval/panel"],
            won=tuple(record["eval/won"]),
        )
        for record in read_metrics(path)
    ]
