"""metrics.jsonl is right after any kill; no sink can stop a run."""

import json
import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_spear.config.schema import TrackingSection
from megatron_spear.tracking.jsonl import JsonlSink, read_metrics
from megatron_spear.tracking.sinks import Tracker, build_tracker


class Collector:
    """A sink that fails at one step, if told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.fail_at = fail_at
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fail_at:
            raise RuntimeError("server gone")
        self.records.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True


@contextmanager
def disk_full_at(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: a write stops there, in the middle of a line too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_record_is_a_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"reward/mean": 0.25, "replay/rows": 3})
    assert lines(path)[0] | {"time": 0} == {
        "step": 1, "time": 0, "reward/mean": 0.25, "replay/rows": 3
    }  # fmt: skip
    sink.log(2, {"a": np.float32(0.5), "b": float("nan"), "c": float("inf")})
    assert (lines(path)[1]["a"], lines(path)[1]["b"], lines(path)[1]["c"]) == (0.5, None, None)
    sink.close()


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(0, {"eval/success": 0.1})
    for step in (1, 2, 3, 4):
        sink.log(step, {"loss/policy": float(step)})
        if step % 2 == 0:
            sink.log(step, {"eval/success": 0.1, "time/eval_s": 9.0})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "loss/pol')  # killed while writing
    sink = JsonlSink(path, resumed_step=2)
    sink.log(3, {"loss/policy": 30.0})
    sink.close()
    assert [(r["step"], r.get("loss/policy")) for r in lines(path)] == [
        (0, None), (1, 1), (2, 2), (3, 30)
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 3])
def test_a_record_after_a_cut_file_has_a_line_of_its_own(tmp_path: Path, cut: int) -> None:
    """A kill takes the last line break alone, or more of the line."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n'
    path.write_text(whole[:-cut])
    sink = JsonlSink(path, resumed_step=2)
    sink.log(3, {"x": 3.0})
    sink.close()
    assert [line["step"] for line in lines(path)] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "m.jsonl", resumed_step=7).close()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_reading_merges_the_lines_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2, "a": 1}\n{"step": 1, "a": 5}\n{"step": 2, "b": 2, "a": 3}\n{"st')
    assert read_metrics(path) == [{"step": 1, "a": 5}, {"step": 2, "a": 3, "b": 2}]


def test_a_failing_sink_is_left_out_with_one_warning(caplog) -> None:
    good, bad = Collector(), Collector(fail_at=2)
    tracker = Tracker({"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log(step, {"x": 1.0})
        tracker.close()
    assert [step for step, _ in good.records] == [1, 2, 3]
    assert [step for step, _ in bad.records] == [1]
    assert [r.getMessage() for r in caplog.records] == [
        "bad failed at step 2 and gets no further metrics: RuntimeError: server gone"
    ]
    assert good.closed
    assert not bad.closed


def test_the_built_tracker_always_has_the_jsonl(tmp_path: Path) -> None:
    tracker = build_tracker(TrackingSection(wandb=False), folder=tmp_path, name="r", config={})
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["x"] == 1.0


def test_a_sink_that_cannot_be_made_is_told(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "sideways")
    tracker = build_tracker(TrackingSection(), folder=tmp_path, name="r", config={})
    assert tracker.sinks == ("metrics.jsonl",)
    assert "wandb cannot be used" in caplog.text
    tracker.close()


@pytest.mark.parametrize("room", [0, 10, 70])
def test_a_disk_that_is_full_for_a_while_costs_no_record(
    room: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no room, or room for a part of a line or for more than one."""
    tracker = build_tracker(TrackingSection(wandb=False), folder=tmp_path, name="r", config={})
    path = tmp_path / "metrics.jsonl"
    tracker.log(1, {"x": 1.0})
    with disk_full_at(path.stat().st_size + room):
        for step in (2, 3, 4):
            tracker.log(step, {"x": float(step)})
    assert len(path.read_bytes()) - len(path.read_bytes().splitlines(True)[0]) == room
    assert [record["step"] for record in read_metrics(path)] == ([1] if room < 70 else [1, 2])
    for step in (5, 6):
        tracker.log(step, {"x": float(step)})
    tracker.close()
    assert [(line["step"], line["x"]) for line in lines(path)] == [(n, n) for n in range(1, 7)]
    first = 2 if room < 70 else 3
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"metrics.jsonl failed at step {first} and is tried again each time: "
        "OSError: [Errno 27] File too large",
        "metrics.jsonl could be used again at step 5",
    ]


def test_what_waits_is_written_at_the_end(tmp_path: Path) -> None:
    tracker = build_tracker(TrackingSection(wandb=False), folder=tmp_path, name="r", config={})
    with disk_full_at(3):
        tracker.log(1, {"x": 1.0})
    tracker.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["x"] == 1.0


def test_a_file_that_opens_late_has_every_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder is a file system that is not there for a moment; later steps are dropped then."""
    folder = tmp_path / "later"
    tracker = build_tracker(
        TrackingSection(wandb=False), folder=folder, name="r", config={}, resumed_step=1
    )
    tracker.log(2, {"x": 2.0})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 9.0}\n')
    tracker.log(3, {"x": 3.0})
    tracker.close()
    assert [(r["step"], r["x"]) for r in lines(folder / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]
    assert "metrics.jsonl cannot be opened yet: FileNotFoundError" in caplog.text
