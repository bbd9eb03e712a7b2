"""The watch over a launch's ranks: a heart for each, and errors of a lost peer told as such."""

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from megatron_spear.errors import PeerLost, SpearError
from megatron_spear.heartbeats.heart import Heart, begin
from megatron_spear.heartbeats.record import HeartbeatFolder

_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
_LATE = ("Timed out waiting", "operation timeout", "wait timeout")

COLLECTIVE_LIMIT_S = 7 * 86400.0
"""A collective's own deadline. Ranks wait in one for the controller's whole rollout stage, which
has no limit; what hangs is the watchdog's to tell, long before."""


@contextlib.contextmanager
def watched(limit_s: float, folder: Path | None) -> Iterator[Heart]:
    """This rank's heart, for the length of the block; ``folder`` is where heartbeats lie.

    The controller makes the folder. A collective that failed since a rank is gone is raised as
    PeerLost, which says which; one that failed by its own deadline ends the process as a hang.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    shared = None
    if folder is not None:
        shared = HeartbeatFolder(folder, _launch())
        if rank == 0:
            shared.begin()
    with Heart(limit_s, rank=rank, world_size=world_size, folder=shared) as heart:
        try:
            yield heart
        except Exception as error:
            if world_size > 1:
                _tell_of_peers(error, heart, rank)
            raise


def _tell_of_peers(error: Exception, heart: Heart, rank: int) -> None:
    """Raise PeerLost, or end the process, if the error is that of a collective."""
    gone, late = _says(error, _GONE), _says(error, _LATE)
    if late or (gone and heart.knows_of_a_hang()):
        traceback.print_exc()
        heart.expire()
    if not gone:
        return
    begin("looks for the rank that is gone")
    lost = heart.lost_ranks()
    if isinstance(error, SpearError) and not lost:
        return  # an engine's connection, not a rank's
    told = "; ".join(lost) or "another has ended, and says why in its own log"
    raise PeerLost(f"rank {rank} ends because the ranks are not all there: {told}") from error


def _launch() -> str:
    """The same on all ranks of a launch, and another one the next time."""
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_RESTART_COUNT",
    )
    return "/".join(os.environ[name] for name in names if name in os.environ)


def _says(error: BaseException | None, words: tuple[str, ...]) -> bool:
    """Whether the error, or one behind it, is a RuntimeError of torch with such words."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
