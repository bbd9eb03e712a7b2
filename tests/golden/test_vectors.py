"""The official mode against every recorded case of ../shared/golden.

The comparisons are those of ``tools/check_golden.py``; the default method, where it differs, is in
``test_method`` and ``test_losses``.
"""

from typing import Any

import pytest
from golden_vectors import GOLDEN, cases

from megatron_spear.testing.golden import CHECKS, Case, case_differences


def _every_case() -> list[Any]:
    return [
        pytest.param(stem, *param.values, marks=param.marks, id=f"{stem}-{param.id}")
        for stem in CHECKS
        for param in cases(stem)
    ]


@pytest.mark.parametrize(("stem", "case"), _every_case())
def test_official_mode(stem: str, case: Case) -> None:
    assert case_differences(CHECKS[stem], case) == []


def test_every_file_has_a_check() -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"{GOLDEN} is absent (recorded outside results)")
    stems = {path.stem for path in GOLDEN.glob("*.json")}
    assert stems == set(CHECKS)
