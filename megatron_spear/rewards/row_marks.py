"""Which rows of a step are unfit to learn from: Dr.BoT's row filters (SPEAR, arXiv 2509.22601).

A row is a segment: the whole trajectory with ``env.history: full``, one turn with a window, as in
the two official trees; with ``rendered`` the turns between two branches. A stage of its own between
scoring and advantages: it reads trajectories alone, so it acts whoever gave the rewards.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_spear.config.method import RowFiltersSection
from megatron_spear.rewards.row_filters import repetitive, unreadable
from megatron_spear.types import RowKey, ScoredGroup, Segment, Status, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMarks:
    """What is wrong with one row."""

    overlong: bool
    void: bool
    repetitive: bool
    unreadable: bool


def mark_rows(
    groups: Sequence[ScoredGroup], section: RowFiltersSection
) -> tuple[frozenset[RowKey], dict[str, float]]:
    """The rows with any mark, and the metrics of all rows; a filter that is off marks nothing.

    Example: two trajectories of one segment each, the first with an empty answer and a replacement
    character: its row is marked; ``filter/void_rows`` and ``filter/unreadable_rows`` 1, the other
    counts 0, ``filter/marked_fraction`` 0.5 (no such metric where there are no rows).
    """
    marks = {
        (member.trajectory.id, index): row_marks(member.trajectory, segment, section)
        for group in groups
        for member in group.members
        for index, segment in enumerate(member.trajectory.segments)
    }
    found = {key: asdict(row) for key, row in marks.items()}
    marked = frozenset(key for key, row in found.items() if any(row.values()))
    metrics = {
        f"filter/{name}_rows": float(sum(row[name] for row in found.values()))
        for name in RowMarks.__dataclass_fields__
    }
    if marks:
        metrics["filter/marked_fraction"] = len(marked) / len(marks)
    return marked, metrics


def row_marks(trajectory: Trajectory, segment: Segment, section: RowFiltersSection) -> RowMarks:
    """The marks of one segment of a trajectory.

    - overlong: see ``used_up_budget``.
    - void: some turn neither acts nor answers, as the environment's view has it.
    - repetitive: some turn repeats itself. Turns are judged apart: an agent that takes the same
      short action again is not garbled.
    - unreadable: some turn's text was decoded wrongly.
    """
    turns = segment.turns
    return RowMarks(
        overlong=section.overlong and used_up_budget(trajectory, segment),
        void=section.void and any(turn.void for turn in turns),
        repetitive=section.repetitive and any(repetitive(turn.action_tokens) for turn in turns),
        unreadable=section.unreadable and any(unreadable(turn.text) for turn in turns),
    )


def used_up_budget(trajectory: Trajectory, segment: Segment) -> bool:
    """Whether a row ended because its tokens did.

    A row of one turn has the budget of an answer (``rollout.max_new_tokens``); every row has that
    of its context (``rollout.max_context``). A conversation that grows may also end between turns,
    where its next prompt finds no room: its status then says so (of the last segment, where it has
    branched). A long answer in the middle of a
    conversation that goes on did not end the row.
    """
    turns = segment.turns
    answer_was_cut = len(turns) == 1 and turns[0].finish_reason == "length"
    is_last = segment is trajectory.segments[-1]
    grows = is_last and (len(turns) > 1 or len(trajectory.segments) == 1)
    context_is_full = turns[-1].finish_reason == "context" or (
        grows and trajectory.status is Status.TRUNCATED_LENGTH
    )
    return answer_was_cut or context_is_full
