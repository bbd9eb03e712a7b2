"""How the shipped contract checks speak."""

from typing import NoReturn


class ContractViolation(AssertionError):
    """Something breaks what its protocol promises."""


def fail(what: str, got: str, expected: str) -> NoReturn:
    """Raise ContractViolation: ``what got; expected ...``."""
    raise ContractViolation(f"{what} {got}; expected {expected}")
