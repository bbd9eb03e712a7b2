"""The policy's export, run to its end on every rank whatever becomes of the update.

The export is collective: a rank that stopped in the middle would leave the others waiting. So the
controller runs it to its end also when no engine is left, then tells all ranks how it went.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_spear.errors import EngineError, SpearError
from megatron_spear.heartbeats.heart import beat
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
        beat()
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


def require_newer(policy_version: int, last: int) -> None:
    """Raise EngineError for a version that is not above the last one published."""
    if policy_version <= last:
        raise EngineError(
            f"policy version {policy_version} is published after {last}; versions have to grow, "
            "for engines name what they hold by them"
        )


class PublishingRanks:
    """The training ranks' part of every transport: versions that grow, one export, one outcome.

    ``control`` is a gloo group of all ranks, None where there is one.
    """

    def __init__(self, source: WeightSource, control: dist.ProcessGroup | None) -> None:
        self._source = source
        self._control = control
        self._version = -1

    def publish(
        self, policy_version: int, update: Callable[[Export], dict[str, float]] | None
    ) -> dict[str, float]:
        """Run ``update`` on the controller (None on other ranks), which takes tensors from the
        export; collective.

        Returns ``update``'s metrics, on other ranks that nothing was sent. Raises EngineError on
        every rank if the version is not above all before or ``update`` raised a SpearError;
        anything else it raised as it is, and EngineError elsewhere.
        """
        require_newer(policy_version, self._version)
        export = Export(self._source)
        if update is None:
            export.run_out()
            outcome = self._told(None)
            if outcome.error is not None:
                raise EngineError(outcome.error)
            metrics = {"weight_sync/bytes": 0.0}
        else:
            metrics = self._lead(export, update)
        self._version = policy_version
        return metrics

    def _lead(
        self, export: Export, update: Callable[[Export], dict[str, float]]
    ) -> dict[str, float]:
        """The controller's part."""
        outcome = _Outcome(error="the controller failed in a weight update; see the log of rank 0")
        try:
            metrics = update(export)
            outcome = _Outcome(error=None)
        except SpearError as error:
            outcome = _Outcome(error=str(error))
            raise EngineError(str(error)) from error
        finally:
            if not export.broken:  # else the other ranks' exports have failed too
                export.run_out()
                self._told(outcome)
        return metrics

    def _told(self, outcome: _Outcome | None) -> _Outcome:
        """The controller's outcome, on every rank."""
        box: list[_Outcome | None] = [outcome]
        if self._control is not None:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0] or _Outcome(error=None)
