"""What a node was found to be: one check, and all checks of one node as they travel in a file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at; ``found`` and ``expected`` are for people.

    Example: ``Check(name="GPUs", good=False, found="7", expected="8 or more")``.
    """

    name: str
    good: bool
    found: str
    expected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResult:
    """All that one node found out about itself; ``versions`` are compared between nodes."""

    node: str
    index: int
    checks: tuple[Check, ...]
    versions: Mapping[str, str]

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "NodeResult":
        """Back from ``to_tree``; raises KeyError or TypeError where it is none."""
        return cls(
            node=str(tree["node"]),
            index=int(tree["index"]),
            checks=tuple(Check(**check) for check in tree["checks"]),
            versions=dict(tree["versions"]),
        )


def read_tree(text: str) -> dict[str, Any]:
    """A file's JSON object; ValueError where it is none."""
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError(f"got {type(tree).__name__}, expected an object")
    return tree
