"""A run on games of the official download (a sample of valid_seen, packed as both splits)."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

GAMES = Path(__file__).parents[3] / "shared" / "data" / "alfworld" / "valid_seen.jsonl.xz"
TYPES = ("pick_and_place_simple", "look_at_obj_in_light")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and valid_seen.jsonl, 12 rows each, half of them of TYPES."""
    if not GAMES.is_file():
        pytest.skip(f"needs the official games in {GAMES}")
    with lzma.open(GAMES, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    wanted = [r for r in rows if r["id"].startswith(TYPES) and r["problem"].count("(") < 2500]
    other = [r for r in rows if not r["id"].startswith(TYPES)]
    folder = tmp_path_factory.mktemp("games")
    for split, first in (("train", 0), ("valid_seen", 6)):
        chosen = wanted[first : first + 6] + other[:6]
        lines = [json.dumps(row) + "\n" for row in chosen]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_real_games(
    sample: Path,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Callable[[Path], dict[int, dict[str, Any]]],
) -> None:
    run_dir = tmp_path / "run"
    settings = (
        f"env.games={sample}",
        "env.max_turns=20",
        "rollout.max_context=1024",
        "sft.steps=2",
    )
    spear("train", f"run.dir={run_dir}", "run.steps=1", *settings)
    (record,) = training_records(run_dir).values()
    assert record["rollout/num_trajectories"] == 8 and record["rollout/failed"] == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["panel_games"] == 4
    assert set(summary["success_by_task_type"]) <= set(TYPES)
