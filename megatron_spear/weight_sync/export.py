"""The policy's export, run to its end on every rank whatever becomes of the update.

The export is collective: a rank that stopped in the middle would leave the others waiting. So the
controller runs it to its end also when no engine is left, then tells all ranks how it went.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_spear.errors import EngineError, SpearError
from megatron_spear.weight_sync.transport import WeightSource

Exported = tuple[str, torch.Tensor | None]


class Export:
    """The stream of one export; ``broken`` once the export itself has failed."""

    def __init__(self, source: WeightSource) -> None:
        self.broken = False
        self._stream = iter(source.export_weights())

    def __iter__(self) -> Iterator[Exported]:
        return self

    def __next__(self) -> Exported:
        try:
            return next(self._stream)
        except StopIteration:
            raise
        except BaseException:
            self.broken = True
            raise

    def run_out(self) -> None:
        """Take part in what is left of it."""
        for _ in self:
            pass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What the controller tells the other ranks."""

    error: str | None


def publish_together(
    source: WeightSource,
    control: dist.ProcessGroup | None,
    update: Callable[[Export], dict[str, float]] | None,
) -> dict[str, float]:
    """Run ``update`` on the controller (None on other ranks), which takes tensors from the export.

    ``control`` is a gloo group of all training ranks, None where there is one rank. Returns
    ``update``'s metrics, on other ranks that nothing was sent. Raises EngineError on every rank if
    ``update`` raised a SpearError; anything else it raised as it is, and EngineError elsewhere.
    """
    export = Export(source)
    if update is None:
        export.run_out()
        outcome = _told(control, None)
        if outcome.error is not None:
            raise EngineError(outcome.error)
        return {"weight_sync/bytes": 0.0}
    outcome = _Outcome(error="the controller failed in the middle of the weight update; see rank 0")
    try:
        metrics = update(export)
        outcome = _Outcome(error=None)
    except SpearError as error:
        outcome = _Outcome(error=str(error))
        raise EngineError(str(error)) from error
    finally:
        if not export.broken:  # else the other ranks' exports have failed too
            export.run_out()
            _told(control, outcome)
    return metrics


def _told(control: dist.ProcessGroup | None, outcome: _Outcome | None) -> _Outcome:
    """The controller's outcome, on every rank."""
    if control is None:
        assert outcome is not None, "one rank is the controller"
        return outcome
    box: list[Any] = [outcome]
    dist.broadcast_object_list(box, src=0, group=control)
    told = box[0]
    assert isinstance(told, _Outcome)
    return told
