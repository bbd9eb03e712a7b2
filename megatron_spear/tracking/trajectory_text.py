"""A trajectory in two lines of plain text, whatever is in it."""

import unicodedata

from megatron_spear.types import ScoredTrajectory

_LONGEST = 300
"""Characters of one text that are looked at; a line on a screen has fewer."""
_LAST_ACTIONS = 3


def plain(text: str, longest: int = _LONGEST) -> str:
    """The text as one line that cannot do anything to a terminal.

    Line breaks and what is not to be printed (escape codes, control and direction characters,
    halves of characters) become blanks, blanks in a row one, and accents in a row one.

    Example: ``"go\\x1b[2J to\\n  desk"`` gives ``"go [2J to desk"``.
    """
    kept: list[str] = []
    was_accent = False
    for character in unicodedata.normalize("NFC", text[:longest]):
        is_accent = unicodedata.category(character).startswith("M")
        if not (is_accent and (was_accent or not kept)):
            kept.append(character if character.isprintable() else " ")
        was_accent = is_accent
    return " ".join("".join(kept).split())


def trajectory_lines(scored: ScoredTrajectory) -> tuple[str, str]:
    """What was to be done and how it ended; the last actions.

    Example: ``look_at_obj_in_light: won in 4 turns; outcome 1, intrinsic 0.03, format 0`` and
    ``go to desk 1 > take pen 1 > use desklamp 1``.
    """
    trajectory, reward = scored.trajectory, scored.reward
    turns = trajectory.turns
    name = plain(trajectory.prompt.kind or trajectory.prompt.prompt_id, 60)
    end = "won" if trajectory.won else trajectory.status.value.replace("_", " ")
    parts = ", ".join(f"{part} {getattr(reward, part):.3g}" for part in _PARTS)
    actions = [plain(turn.action_text or turn.text, 100) or "(empty)" for turn in turns]
    more = "... " if len(actions) > _LAST_ACTIONS else ""
    return (
        f"{name}: {end} in {len(turns)} turn{'s' * (len(turns) != 1)}; {parts}",
        more + " > ".join(actions[-_LAST_ACTIONS:]),
    )


_PARTS = ("outcome", "intrinsic", "format")
