"""A report stays below its limit, says what it left out, and takes any text."""

import gzip
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.errors import ConfigError
from megatron_spear.report import keeping
from megatron_spear.report.runs import read_run
from megatron_spear.report.write import MAX_BYTES, ReportWriter
from megatron_spear.testing.hostile_texts import hostile_text
from megatron_spear.testing.recorded_runs import made_run
from megatron_spear.tracking.recorded import RecordedStep
from megatron_spear.tracking.recorded_files import read_step, step_file, write_step
from megatron_spear.types import ToolCall

Read = Callable[[Path], Any]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose files are read, in order."""
    found: list[int] = []

    def noted(folder: Path, step: int) -> RecordedStep:
        found.append(step)
        return read_step(folder, step)

    monkeypatch.setattr(keeping, "read_step", noted)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("limit") / "run", steps=20, groups=4)


def test_newest_and_best_are_kept_below_the_limit(run: Path, read_report: Read) -> None:
    out = run.parent / "report.html"
    whole = ReportWriter([run], out).write()
    assert whole.notes == () and whole.num_bytes == out.stat().st_size
    limit = whole.num_bytes * 3 // 4
    written = ReportWriter([run], out, max_bytes=limit).write()
    assert limit * 0.9 < written.num_bytes <= limit
    assert written.num_trajectories == whole.num_trajectories == 320, "all are listed"
    report = read_report(out)
    columns = report.listing["trajectories"]
    kept: dict[int, list[int]] = {}
    for place, step in enumerate(columns["step"]):
        if columns["chunk"][place] >= 0:
            kept.setdefault(step, []).append(place)
            assert report.body(place)["prompt"]
    assert len(kept[20]) == 16, "the newest step is whole"
    partly = [step for step, places in kept.items() if len(places) == keeping.BEST_A_STEP]
    assert partly and max(partly) < min(s for s, places in kept.items() if len(places) == 16)
    step = max(partly)
    totals = sorted(
        t or 0 for s, t in zip(columns["step"], columns["total"], strict=True) if s == step
    )
    assert sorted(columns["total"][place] for place in kept[step]) == totals[-4:]
    left_out = 320 - sum(map(len, kept.values()))
    (note,) = report.listing["notes"]
    assert note.startswith(f"{left_out:,} of 320 listed trajectories are here without their turns")


def test_ten_thousand_trajectories_fit(tmp_path: Path) -> None:
    """Of 7 to 14 turns, by what a step of a hundred adds. Their log-probs are drawn evenly, which
    compresses worse than a model's."""
    sizes = [
        ReportWriter(
            [made_run(tmp_path / f"{steps}", steps=steps, groups=25, turns=14)],
            tmp_path / f"{steps}.html",
        ).write()
        for steps in (1, 2)
    ]
    assert [written.num_trajectories for written in sizes] == [100, 200]
    added = sizes[1].num_bytes - sizes[0].num_bytes
    assert 10e6 < sizes[0].num_bytes + 99 * added < MAX_BYTES
    assert added > 100 * 1000, "their turns are there"


def test_a_limit_that_the_curves_alone_exceed_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"curves and list alone take .* MB; raise --max-mb"):
        ReportWriter([run], run.parent / "small.html", max_bytes=50_000).write()
    assert not (run.parent / "small.html").exists()


def test_a_list_that_is_too_long_loses_its_oldest_steps(
    run: Path, read_report: Read, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "MAX_ROWS", 100)
    out = run.parent / "short.html"
    writer = ReportWriter([run], out)
    written = writer.write()
    assert writer.write().notes == written.notes
    assert read == [20, 19, 18, 17, 16, 15], "no more than it takes to fill the list"
    assert set(read_report(out).listing["trajectories"]["step"]) == {16, 17, 18, 19, 20}
    assert "The list begins with step 16" in written.notes[0]
    assert "15 older recorded steps are not in it" in written.notes[0]


def test_a_damaged_file_is_named_and_costs_its_step_only(tmp_path: Path, read_report: Read) -> None:
    run = made_run(tmp_path / "run", steps=3)
    step_file(run / "trajectories", 2).write_bytes(gzip.compress(b"{half"))
    written = ReportWriter([run], tmp_path / "report.html").write()
    assert written.notes == ("Recorded trajectories that could not be read: run, step 2.",)
    assert set(read_report(tmp_path / "report.html").listing["trajectories"]["step"]) == {1, 3}


def test_memory_grows_with_the_limit_and_not_with_the_run(run: Path) -> None:
    limit, read_now = 40_000, read_run(run)
    reader = keeping.StepReader(limit)
    tracemalloc.start()
    try:
        assert len(reader.read([read_now])) == 20
        packed = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(True, gzip.__file__)]
        )
    finally:
        tracemalloc.stop()
    held = sum(trace.size for trace in packed.traces)
    on_disk = sum(path.stat().st_size for path in (run / "trajectories").iterdir())
    assert limit < held <= 2 * limit * 3 / 4 < on_disk / 4, "whole steps, and the best of steps"


def test_a_run_that_goes_on_or_back_has_the_report_of_a_new_writer(
    run: Path, tmp_path: Path, read_report: Read
) -> None:
    """What is kept for the next time is enough, also where a resumed run takes steps back."""
    going, files = tmp_path / "going", run / "trajectories"
    shutil.copytree(run, going, ignore=shutil.ignore_patterns("trajectories"))
    (going / "trajectories").mkdir()
    writer = ReportWriter([going], tmp_path / "going.html", max_bytes=260_000)
    kept = []
    for last in (8, 14, 20, 9, 4, 20):
        for step in range(1, 21):
            step_file(going / "trajectories", step).unlink(missing_ok=True)
            if step <= last:
                shutil.copy2(step_file(files, step), going / "trajectories")
        notes = writer.write().notes
        fresh = ReportWriter([going], tmp_path / "fresh.html", max_bytes=260_000)
        assert fresh.write().notes == notes
        one, other = (read_report(tmp_path / name) for name in ("going.html", "fresh.html"))
        assert one.listing == other.listing
        assert one.blocks.keys() == other.blocks.keys()
        assert all(one.blocks[k] == other.blocks[k] for k in one.blocks if k.startswith("chunk"))
        kept.append(len({c for c in one.listing["trajectories"]["chunk"] if c >= 0}))
    assert len(set(kept)) > 2, kept


def test_steps_are_read_once(tmp_path: Path, read: list[int], read_report: Read) -> None:
    run = made_run(tmp_path / "run", steps=3)
    writer = ReportWriter([run], tmp_path / "report.html")
    writer.write()
    write_step(run / "trajectories", replace(read_step(run / "trajectories", 3), step=4))
    writer.write()
    assert read == [3, 2, 1, 4]
    listed = read_report(tmp_path / "report.html").listing["trajectories"]["step"]
    assert set(listed) == {1, 2, 3, 4}


def test_no_text_of_a_model_reaches_the_markup(tmp_path: Path, read_report: Read) -> None:
    run = made_run(tmp_path / "run", steps=1, groups=1, members=1)
    step = read_step(run / "trajectories", 1)
    nasty = (
        "</script><script>alert(1)</script>",
        "\ud800",
        "\u202eevil",
        "<img src=x onerror=a()>",
    )
    texts = [*nasty, *(json.loads(json.dumps(hostile_text(number))) for number in range(60))]
    (first,) = step.trajectories
    turn = first.turns[0]
    turns = tuple(
        replace(turn, observation=text, text=text, action=text, tokens=(text[:1], text[1:]),
                rollout_logprobs=(-0.5, None), old_logprobs=None, advantages=None,
                tool_calls=(ToolCall(name=text, arguments=text, succeeded=False),))
        for text in texts
    )  # fmt: skip
    hostile = replace(first, prompt=texts[0], prompt_id=texts[0], kind=texts[1], error=texts[2],
                      group=f"0.1/{texts[3]}", turns=turns)  # fmt: skip
    write_step(run / "trajectories", replace(step, trajectories=(hostile,)))
    config = (run / "config.yaml").read_text()
    name = "'</title><script>alert(2)</script>'"
    (run / "config.yaml").write_text(
        re.sub(r"^  name: .*$", f"  name: {name}", config, count=1, flags=re.M)
    )
    ReportWriter([run], tmp_path / "report.html").write()
    report = read_report(tmp_path / "report.html")
    assert "alert" not in report.html.replace("&lt;script&gt;alert(2)&lt;/script&gt;", "")
    assert report.html.count("</script>") == 4 and report.html.count("</title>") == 1
    body = report.body(0)
    assert [turn["text"] for turn in body["turns"]] == texts
    assert [turn["calls"][0][1] for turn in body["turns"]] == texts
