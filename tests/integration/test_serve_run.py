"""A run whose rollouts come from a server over HTTP is the run with the engine in its process."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.testing.serve import serve_in_process

LOADER = "megatron_spear.weight_sync.receivers.sglang.load"
pytestmark = pytest.mark.timeout(300)

SETTINGS = ("run.steps=3", "policy.optimizer.lr=0.002", "algorithm.keep_groups_fraction=1.0")
Records = Callable[[Path], dict[int, dict[str, Any]]]
ROOM = ("--max-context", 512)


@pytest.fixture(scope="module")
def in_process(spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("in-process") / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS)
    return run_dir


@pytest.fixture(scope="module")
def folder(cache: Path, in_process: Path) -> Path:
    """The tiny model before its warm start: other weights than a run begins with."""
    (config,) = cache.glob("tiny-*/config.json")
    return config.parent


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The URL of a server for one run after the other."""
    with serve_in_process(folder, *ROOM, "--custom-weight-loader", LOADER) as served:
        yield served.url


def through(url: str, *more: str) -> tuple[str, ...]:
    """The settings of a run through a server."""
    return (*SETTINGS, "rollout.engine=sglang", f"rollout.servers=[{url}]", *more)


@pytest.mark.parametrize(
    "settings",
    [
        ("weight_sync.transport=broadcast",),
        ("weight_sync.transport=broadcast", "rollout.colocated=true"),
        ("weight_sync.transport=disk",),
        ("weight_sync.transport=ipc",),
        ("weight_sync.transport=sharded",),
    ],
    ids=["broadcast", "colocated", "disk", "ipc", "sharded"],
)
def test_training_through_a_server_gives_the_same_run(
    settings: tuple[str, ...],
    server: str,
    in_process: Path,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Callable[[Path, Path, float], None],
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", *through(server, *settings))
    assert not list(run_dir.glob("weights/*")), "the transport was closed"
    expected, found = training_records(in_process), training_records(run_dir)
    assert sorted(found) == sorted(expected)
    for step, record in expected.items():
        for name, value in record.items():
            if name.startswith("weight_sync/"):
                continue
            rounding = 1e-5 if name.startswith("mismatch/") else 1e-7
            told = f"{name} at step {step}"
            assert found[step][name] == pytest.approx(value, rel=1e-5, abs=rounding), told
    same_weights(in_process, run_dir, 1e-5)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (in_process, run_dir)]
    assert summaries[0]["success_after"] == summaries[1]["success_after"]
    assert not (run_dir / "weights").exists() or not any((run_dir / "weights").iterdir())


@pytest.mark.parametrize("mode", ["retract", "abort"])
def test_rollouts_run_ahead_over_updates_of_a_server(
    mode: str, server: str, spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    ahead = ("rollout.max_lag=1", f"rollout.pause_mode={mode}")
    spear("train", f"run.dir={run_dir}", *through(server, *ahead))
    records = training_records(run_dir)
    assert records[1]["rollout/lag_0_fraction"] == 1.0
    assert any(records[step]["rollout/lag_1_fraction"] > 0 for step in (2, 3))
    assert all(record["rollout/failed"] == 0 for record in records.values())


def test_a_server_in_fp8_gets_fp8_and_nothing_else(
    folder: Path, spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    with serve_in_process(folder, *ROOM, "--quantization", "fp8") as served:
        run_dir = tmp_path / "run"
        spear("train", f"run.dir={run_dir}", *through(served.url, "weight_sync.precision=fp8"))
        for record in training_records(run_dir).values():
            # Rounded weights are a slightly other policy, and the gap says so.
            assert 1e-4 < record["mismatch/logprob_gap_mean"] < 0.1
            assert record["rollout/failed"] == 0
        done = spear("train", f"run.dir={tmp_path / 'other'}", *through(served.url), status=2)
        assert "fp8" in done.err and served.url in done.err


def test_a_run_goes_on_when_a_server_dies_and_takes_it_back(
    folder: Path,
    launch: Callable[..., Any],
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
) -> None:
    run_dir = tmp_path / "run"
    with (
        serve_in_process(folder, *ROOM) as stays,
        serve_in_process(folder, *ROOM) as dies,
    ):
        settings = through(
            stays.url,
            "run.steps=4",
            f"rollout.servers=[{stays.url},{dies.url}]",
            "rollout.prompts_per_step=4",
            "checkpoint.every=1",
        )
        launched = launch(f"run.dir={run_dir}", *settings)
        _wait_for(lambda: _num_steps(run_dir) >= 1, launched)
        dies.process.kill()
        assert launched.wait(200).status == 0, launched.err
        assert f"{dies.url} is taken out" in launched.out
    records = training_records(run_dir)
    assert sorted(records) == [1, 2, 3, 4]
    assert records[1]["weight_sync/num_servers"] == 2
    assert records[4]["weight_sync/num_servers"] == 1
    failed = [record["rollout/failed"] for record in records.values()]
    assert failed == [0, 0, 0, 0], "what the dead server had is drawn again elsewhere"


def test_without_a_server_the_run_ends_and_can_be_resumed(
    folder: Path, spear: Callable[..., Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with serve_in_process(folder, *ROOM) as served:
        settings = through(served.url, "checkpoint.every=1", "rollout.engine_deadline_s=5")
        spear("train", f"run.dir={run_dir}", *settings, "run.stop_after=1")
    done = spear("train", f"resume={run_dir}", *settings, status=2)
    assert f"{served.url}" in done.err and "answered within 5 s" in done.err
    with serve_in_process(folder, *ROOM, "--port", served.url.rpartition(":")[2]):
        spear("train", f"resume={run_dir}", *settings)
    assert (run_dir / "summary.json").exists()


def _num_steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("rollout/num_trajectories") if metrics.exists() else 0


def _wait_for(condition: Callable[[], bool], launched: Any) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert launched.process.poll() is None, launched.out + launched.err
        assert time.monotonic() < limit, launched.out + launched.err
        time.sleep(0.05)
