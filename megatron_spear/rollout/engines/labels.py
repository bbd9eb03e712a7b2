"""Which weights a server holds, as the label it answers with: ``<launch>/<policy version>``."""

import re
import uuid

from megatron_spear.errors import EngineError
from megatron_spear.types import VersionSpan

_LABEL = re.compile(r"([0-9a-f]{8})/(\d+)")


class ForeignLabel(EngineError):
    """The server does not hold the weights that this run gave it."""


class OtherTrainer(ForeignLabel):
    """Another run has updated the server."""


class Labels:
    """The labels of one run; ``launch`` (8 hex digits) is drawn anew for each.

    Example: launch ``1f00ab2c`` labels version 7 ``1f00ab2c/7``.
    """

    def __init__(self, launch: str | None = None) -> None:
        self.launch = uuid.uuid4().hex[:8] if launch is None else launch
        self._versions: dict[str, int] = {}

    def label(self, policy_version: int) -> str:
        """What a server is told to call these weights."""
        return f"{self.launch}/{policy_version}"

    def version(self, label: str, server: str) -> int:
        """The policy version of a label; raises ForeignLabel where it is not of this run."""
        known = self._versions.get(label)
        if known is not None:
            return known
        found = _LABEL.fullmatch(label)
        if found is None:
            raise ForeignLabel(
                f"{server} holds the weights {label!r}; expected a label of this run, "
                f"{self.launch}/<version>: it was restarted or updated by hand, and serves again "
                "after the next weight update"
            )
        if found[1] != self.launch:
            raise OtherTrainer(
                f"{server} holds the weights {label!r} of another run, while this one is "
                f"{self.launch}: give each run servers of its own"
            )
        self._versions[label] = int(found[2])
        return int(found[2])

    def spans(self, labelled: list[tuple[str, int]], server: str) -> tuple[VersionSpan, ...]:
        """Version spans of ``(label, number of tokens)`` runs."""
        return tuple(VersionSpan(self.version(label, server), size) for label, size in labelled)
