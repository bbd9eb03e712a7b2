"""Which row filters are in force, and who counts in statistics once rows are marked."""

from collections.abc import Sequence

from megatron_spear.algorithms.filters import counted_groups
from megatron_spear.config.method import AlgorithmSection, RowFiltersSection
from megatron_spear.types import RowKey, ScoredGroup


def filters_in_force(algorithm: AlgorithmSection) -> RowFiltersSection:
    """``algorithm.row_filters``; the official math tree's void filter never fires (defect 7)."""
    section = algorithm.row_filters
    if algorithm.compat == "official" and algorithm.official.tree == "math":
        return section.model_copy(update={"void": False})
    return section


def counted(
    groups: Sequence[ScoredGroup], marked: frozenset[RowKey], algorithm: AlgorithmSection
) -> Sequence[ScoredGroup]:
    """The groups as statistics count them: without the members whose rows are all marked, unless
    ``algorithm`` counts everyone."""
    official = algorithm.compat == "official"
    everyone = official or algorithm.row_filters.in_group_statistics
    return groups if everyone else counted_groups(groups, marked)
