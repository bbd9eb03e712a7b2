"""A run whose rollouts come from a server over HTTP is the run with the engine in its process."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.testing.serve import serve_in_process

LOADER = "megatron_spear.weight_sync.receivers.sglang.load"
pytestmark = pytest.mark.timeout(300)

SETTINGS = ("run.steps=3", "policy.optimizer.lr=0.002", "algorithm.keep_groups_fraction=1.0")
Records = Callable[[Path], dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def in_process(spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("in-process") / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS)
    return run_dir


@pytest.fixture
def server(cache: Path, spear: Callable[..., Any]) -> Iterator[str]:
    """The URL of a server with the tiny model's first weights."""
    spear("sft")  # the model folder, if it is not there yet
    (folder,) = [path.parent for path in cache.glob("tiny-*/config.json")]
    with serve_in_process(folder, "--max-context", 512, "--custom-weight-loader", LOADER) as served:
        yield served.url


@pytest.mark.parametrize("transport", ["broadcast", "disk", "ipc", "sharded"])
def test_training_through_a_server_gives_the_same_run(
    transport: str,
    server: str,
    in_process: Path,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Callable[[Path, Path, float], None],
) -> None:
    run_dir = tmp_path / "run"
    spear(
        "train",
        f"run.dir={run_dir}",
        *SETTINGS,
        "rollout.engine=sglang",
        f"rollout.servers=[{server}]",
        f"weight_sync.transport={transport}",
    )
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
