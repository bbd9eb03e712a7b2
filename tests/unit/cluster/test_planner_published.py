"""Predictions against published figures: what fixes constants, what checks them, what is missed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_spear.cluster.planner.efficiency import CONSTANTS
from megatron_spear.cluster.planner.figures import Figure
from megatron_spear.cluster.planner.published import FIGURES, solved

PAGE = Path(__file__).parents[3] / "docs" / "planner-times.md"
MOST = 0.30
CHECKS = [figure for figure in FIGURES if figure.role == "check"]
FIXED = {figure.constant: figure for figure in FIGURES if figure.role == "fixes"}


def test_four_figures_fix_the_constants() -> None:
    assert len(FIXED) == 4
    found = solved()
    for constant, figure in FIXED.items():
        assert getattr(found, constant) == pytest.approx(getattr(CONSTANTS, constant), rel=2e-3)
        assert abs(figure.error(CONSTANTS)) < 0.01


@pytest.mark.parametrize("figure", CHECKS, ids=lambda figure: figure.name)
def test_checks_are_met_within_30_percent(figure: Figure) -> None:
    assert abs(figure.error(CONSTANTS)) <= MOST


def test_checks_are_of_different_kinds() -> None:
    kinds = Counter(figure.name.rsplit(", ", 1)[-1] for figure in CHECKS)
    assert {"training", "generation", "log-probs", "latency", "step", "weight update"} <= set(kinds)


@pytest.mark.parametrize(
    "figure",
    [figure for figure in FIGURES if figure.role == "miss"],
    ids=lambda figure: figure.name,
)
def test_misses_are_misses_and_say_why(figure: Figure) -> None:
    assert abs(figure.error(CONSTANTS)) > MOST
    assert figure.note


@pytest.mark.parametrize("constant", sorted(FIXED))
@pytest.mark.parametrize("factor", [0.05, 2.0])
def test_another_constant_would_be_noticed(constant: str, factor: float) -> None:
    other = replace(CONSTANTS, **{constant: factor * getattr(CONSTANTS, constant)})
    wrong = [figure.name for figure in CHECKS if abs(figure.error(other)) > MOST]
    assert wrong, f"no check depends on {constant}"


def test_names_are_unique_and_sources_given() -> None:
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)
    assert all(figure.source and figure.published > 0 for figure in FIGURES)


def test_the_page_shows_every_figure_with_its_error() -> None:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 5 and cells[0] not in ("figure", "---"):
            rows[cells[0]] = cells
    for figure in FIGURES:
        _, published, _, error, role = rows.pop(figure.name)
        seen = float(published.split()[0].replace(",", ""))
        assert seen == pytest.approx(figure.published, rel=5e-3)
        assert int(error.rstrip("%")) == pytest.approx(100 * figure.error(CONSTANTS), abs=0.6)
        assert role == (f"fixes `{figure.constant}`" if figure.constant else figure.role)
    assert not rows
