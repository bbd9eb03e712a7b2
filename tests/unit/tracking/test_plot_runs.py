"""Curves of several runs: what is chosen, what is drawn, and what a wrong name is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.cli import main
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.tracking.plot_runs import (
    choose_metrics,
    metric_names,
    plot_runs,
    read_runs,
)
from megatron_spear.tracking.series import series


def _run(folder: Path, values: list[float | None], end: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"step": step, "time": 1.0, "reward/mean": value, "replay/rows": step})
        for step, value in enumerate(values, 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + end)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The second is being written: its last line is half there."""
    return [
        _run(tmp_path / "a" / "run", [0.0, None, 0.5]),
        _run(tmp_path / "b" / "run", [0.25, 1.0], end='{"step": 3, "rew'),
    ]


def test_runs_are_named_by_what_tells_them_apart(two: list[Path]) -> None:
    assert list(read_runs(two)) == ["a/run", "b/run"]
    assert list(read_runs(two[:1])) == ["run"]
    runs = read_runs(two)
    assert series(runs["a/run"], "reward/mean")[0].tolist() == [1, 3], "null is no value"
    assert series(runs["b/run"], "reward/mean")[1].tolist() == [0.25, 1.0]
    assert metric_names(runs) == ["replay/rows", "reward/mean"]


def test_patterns_choose_in_their_order(two: list[Path]) -> None:
    runs = read_runs(two)
    assert choose_metrics(runs, ["reward/mean", "re*"]) == ["reward/mean", "replay/rows"]
    assert choose_metrics(runs, []) == ["reward/mean", "replay/rows"], "the default ones there are"
    with pytest.raises(ConfigError, match=r"no run has a metric 'reward/men'; did you mean reward"):
        choose_metrics(runs, ["reward/men"])
    with pytest.raises(ConfigError, match=r"'zzz'; there are replay/rows, reward/mean"):
        choose_metrics(runs, ["zzz"])
    many: dict[str, list[dict[str, Any]]] = {"x": [{f"m/{i}": 1.0 for i in range(41)}]}
    with pytest.raises(ConfigError, match="41 metrics chosen, expected at most 40"):
        choose_metrics(many, ["m/*"])
    with pytest.raises(ConfigError, match="none of the default metrics"):
        choose_metrics(many, [])


def test_each_run_is_a_line_in_each_panel(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    plot_runs(read_runs(two), ["reward/mean", "replay/rows"], tmp_path / "x.png", smooth=2)
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["reward/mean", "replay/rows"]
    drawn = [np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines]
    assert drawn == [[0.0, 0.5], [0.0, 0.25], [0.25, 1.0], [0.25, 0.625]], "faint, then smoothed"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a/run", "b/run"]


def test_the_command_draws_and_tells(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, data = tmp_path / "out" / "x.png", tmp_path / "numbers" / "of" / "x.json"
    words = ["inspect", "plot", *map(str, two), "--metrics", "re*", "--out", str(picture)]
    assert main.run([*words, "--data", str(data)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(data.read_text())["b/run"]["reward/mean"] == [[1.0, 0.25], [2.0, 1.0]]
    told = capsys.readouterr().out
    assert "a/run (step 3)" in told and f"picture: {picture}" in told
    (row,) = [line for line in told.splitlines()[:4] if line.startswith("reward/mean")]
    assert row.split() == ["reward/mean", "2", "0", "0.5", "0", "0.5"]
    assert main.run(["inspect", "plot", str(two[0]), "--list"]) == 0
    assert capsys.readouterr().out.split() == ["replay/rows", "reward/mean"]
    with pytest.raises(ConfigError, match=r"x\.gif: expected a name that ends in"):
        main.run([*words[:-1], str(tmp_path / "x.gif")])


def test_paths_that_are_no_runs(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        read_runs([two[0], two[0] / ".." / "run"])
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        read_runs([tmp_path])
