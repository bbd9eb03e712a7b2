"""What is embedded in a report is what the run's files say."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.errors import ConfigError
from megatron_spear.report.write import ReportWriter
from megatron_spear.testing.recorded_runs import made_run
from megatron_spear.tracking.jsonl import read_metrics
from megatron_spear.tracking.recorded_files import read_step

Read = Callable[[Path], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("one") / "run", steps=12, groups=3)


@pytest.fixture(scope="module")
def report(run: Path, read_report: Read) -> Any:
    ReportWriter([run], run / "report.html").write()
    return read_report(run / "report.html")


def test_every_metric_has_its_numbers(run: Path, report: Any) -> None:
    records = read_metrics(run / "metrics.jsonl")
    metrics = report.data["runs"][0]["metrics"]
    names = {name for record in records for name in record} - {"step", "time"}
    made = {name for name in metrics if name.startswith("throughput/")}
    assert set(metrics) - made == names and len(made) == 3
    for name in names:
        expected = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        assert list(zip(*metrics[name], strict=True)) == expected, name
    steps, rates = metrics["throughput/rollout_tokens_per_s"]
    third = next(r for r in records if r["step"] == 3)
    assert rates[steps.index(3)] == third["rollout/action_tokens"] / third["time/rollout_s"]


def test_every_chart_has_its_series(report: Any) -> None:
    titles = [chart["title"] for chart in report.data["charts"]]
    for title in ("Success", "Reward by part", "Entropy", "Log-prob gap of engine and trainer",
                  "Replayed rows", "Age of replayed rows", "Schedules", "Turns and tool calls",
                  "Clipped and dropped shares", "Tokens a second", "Time by phase"):  # fmt: skip
        assert title in titles
    phases = next(c for c in report.data["charts"] if c["title"] == "Time by phase")
    assert [label for _, label in phases["series"]] == ["rollout", "train", "weight sync"]


def test_every_trajectory_is_listed_with_its_turns(run: Path, report: Any) -> None:
    columns, place = report.listing["trajectories"], 0
    for step in range(1, 13):
        for played in read_step(run / "trajectories", step).trajectories:
            listed = {name: column[place] for name, column in columns.items()}
            assert (listed["step"], listed["group"], listed["member"]) == (
                step,
                played.group,
                played.member,
            )
            assert listed["total"] == (played.reward.total if played.reward else None)
            assert listed["turns"] == len(played.turns) and listed["won"] is played.won
            body = report.body(place)
            assert body["prompt"] == played.prompt
            for turn, recorded in zip(body["turns"], played.turns, strict=True):
                assert _tokens(turn) == list(recorded.tokens)
                assert [value / 10_000 for value in turn["rollout"]] == list(
                    recorded.rollout_logprobs
                )
                advantage = recorded.advantages and recorded.advantages[0]
                assert turn["advantages"] == advantage
            place += 1
    assert place == len(columns["step"]) == 12 * 12


def test_every_replayed_row_is_there(run: Path, report: Any) -> None:
    columns, place = report.listing["replayed"], 0
    own = set(zip(*(report.listing["trajectories"][n] for n in ("group", "member")), strict=True))
    for step in range(1, 13):
        for row in read_step(run / "trajectories", step).replayed:
            assert columns["at"][place] == step and columns["from"][place] == row.step
            for name in ("age", "advantage", "stored_advantage", "baseline", "weight", "group"):
                assert columns[name][place] == getattr(row, name)
            assert (columns["group"][place], columns["member"][place]) in own
            place += 1
    assert place == len(columns["at"]) == 4 * 11


def test_the_page_reads_what_it_has_of_a_step(report: Any) -> None:
    (program,) = re.findall(r"<script>(.*?)</script>", report.html, re.DOTALL)
    assert len(report.listing["steps"]) == 12
    for name in report.listing["steps"][0]:
        assert re.search(rf"\b(s|step)\.{name}\b", program), name


def test_the_page_asks_for_nothing_and_runs_its_own_program_only(report: Any) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', report.html)
    assert policy and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    (program,) = re.findall(r"<script>(.*?)</script>", report.html, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", report.html, re.DOTALL)
    for text in (program, style):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy[1]
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "<!--"):
        assert word not in program
    assert "http" not in report.html.replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )


def test_a_comparison_has_the_bands_of_its_arms(tmp_path: Path, read_report: Read) -> None:
    runs = [made_run(tmp_path / f"s{n}", seed=n, steps=4, recorded=False) for n in range(3)]
    runs.append(made_run(tmp_path / "other", steps=6, gain=0.9, settings=("replay.enabled=false",)))
    ReportWriter(runs, tmp_path / "report.html").write()
    data = read_report(tmp_path / "report.html").data
    first, second = data["arms"]
    assert (first["runs"], second["runs"]) == ([0, 1, 2], [3])
    band = first["bands"]["rollout/success"]
    series = [
        dict(zip(*data["runs"][n]["metrics"]["rollout/success"], strict=True)) for n in range(3)
    ]
    assert band["steps"] == [1, 2, 3, 4] and band["n"] == 3
    assert band["mean"][2] == pytest.approx(sum(table[3] for table in series) / 3)
    assert band["low"][2] < band["mean"][2] < band["high"][2]
    assert second["bands"]["rollout/success"]["low"] == [None] * 6
    panel = next(f for f in data["figures"] if f["name"] == "panel success")
    assert [interval["mean"] for interval in panel["arms"]] == [0.5, 0.9]
    assert [interval["n"] for interval in panel["arms"]] == [3, 1]


def test_a_run_that_goes_on_is_read_as_far_as_it_is(tmp_path: Path, read_report: Read) -> None:
    run = made_run(tmp_path / "run", steps=3, ended=False)
    writer = ReportWriter([run], tmp_path / "report.html", reload_s=5)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 4, "rollout/succ')
    (run / "summary.json.tmp").write_text('{"success')
    assert not writer.write().ended
    data = read_report(tmp_path / "report.html").data
    assert data["runs"][0]["last_step"] == 3 and data["reload_s"] == 5
    assert data["runs"][0]["ended"] is False and data["runs"][0]["summary"] == []
    (run / "metrics.jsonl").write_text(whole + '{"step": 4, "rollout/success": 0.75}\n')
    (run / "summary.json").write_text(json.dumps({"steps": 4}))
    assert writer.write().ended
    data = read_report(tmp_path / "report.html").data
    assert data["runs"][0]["metrics"]["rollout/success"][1][-1] == 0.75
    assert data["reload_s"] == 0, "an ended run's page stays as it is"


def test_a_run_that_only_began_has_a_report(tmp_path: Path, read_report: Read) -> None:
    run = made_run(tmp_path / "run", steps=1, ended=False, recorded=False)
    (run / "metrics.jsonl").unlink()
    written = ReportWriter([run], tmp_path / "report.html").write()
    assert (written.num_trajectories, written.notes) == (0, ())
    assert read_report(tmp_path / "report.html").data["charts"] == []


@pytest.mark.parametrize("section", ["", "{}", "3"])
def test_a_run_with_an_empty_section_has_a_report(
    tmp_path: Path, read_report: Read, section: str
) -> None:
    run = made_run(tmp_path / "run", steps=1, recorded=False)
    (run / "config.yaml").write_text(f"run: {section}\n")
    ReportWriter([run], tmp_path / "report.html").write()
    (found,) = read_report(tmp_path / "report.html").data["runs"]
    assert (found["title"], found["seed"], found["planned_steps"]) == ("run", None, None)


def test_numbers_that_are_not_finite_count_as_not_there(tmp_path: Path, read_report: Read) -> None:
    run = made_run(tmp_path / "run", steps=1, recorded=False)
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "time": 5.0, "reward/mean": 0.5, "loss/policy": NaN}\n'
        '{"step": 2, "time": Infinity, "reward/mean": NaN, "optimizer/grad_norm": -Infinity, '
        '"rollout/action_tokens": NaN, "time/rollout_s": 2.0}\n'
    )
    ReportWriter([run], tmp_path / "report.html").write()
    (found,) = read_report(tmp_path / "report.html").data["runs"]
    assert found["metrics"] == {"reward/mean": [[1], [0.5]], "time/rollout_s": [[2], [2.0]]}
    assert found["last_time"] == 5.0


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither config\.yaml nor metrics\.jsonl"):
        ReportWriter([tmp_path], tmp_path / "report.html").write()


def _tokens(turn: dict[str, Any]) -> list[str]:
    """The texts of a turn's tokens, cut by UTF-16 units as the page does."""
    units, at, found = turn["text"].encode("utf-16-le", "surrogatepass"), 0, []
    for length in turn["lengths"]:
        found.append(units[2 * at : 2 * (at + length)].decode("utf-16-le", "surrogatepass"))
        at += length
    return found
