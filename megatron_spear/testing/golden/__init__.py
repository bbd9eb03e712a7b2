"""Checks of the official mode against recorded vector files: one function for each file.

``CHECKS[stem](case)`` yields a line for each thing that differed; none means that the case matched.
"""

from megatron_spear.testing.golden import advantages, losses, method, replay, rewards
from megatron_spear.testing.golden.compare import Case, Check

CHECKS: dict[str, Check] = {
    **losses.CHECKS,
    **advantages.CHECKS,
    **rewards.CHECKS,
    **method.CHECKS,
    **replay.CHECKS,
}

# What a check raises on a case that lacks a field or holds a value of another kind.
CASE_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def case_differences(check: Check, case: Case) -> list[str]:
    """The lines of one case; one more where the check could not be carried out."""
    lines = []
    try:
        for line in check(case):
            lines.append(line)
    except CASE_FAULTS as error:
        lines.append(f"could not be checked: {type(error).__name__}: {error}")
    return lines
