"""Kills a tiny training job (SIGKILL) at random moments, resumes it each time, and compares it with
the same job left alone: metrics of every step, consumed prompts and weights.

    python tools/kill_test.py                       # 200 kills of each mode, about half an hour
    python tools/kill_test.py --kills 20 --mode deterministic --folder /tmp/kills

The job has replay, a learning rate that moves and two optimizer steps a rollout. Modes:

    synchronous     rollout.max_lag=0                                    the very same run
    deterministic   rollout.max_lag=2 rollout.schedule=deterministic     the very same run
    continuous      rollout.max_lag=2                                    no prompt lost or doubled

It can be stopped and started again: finished rounds are in FOLDER/kills.jsonl and count.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from megatron_spear.testing.kills import (
    MODES,
    PROMPTS_PER_STEP,
    Killed,
    differences,
    same_weights,
    twice_or_missing,
)


def main() -> int:
    """Rounds of one job each until every mode has its kills; 1 if a run is not as it should be."""
    parser = argparse.ArgumentParser(description="Kill a training job and compare what it becomes.")
    parser.add_argument("--kills", type=int, default=200, help="of each mode (default %(default)s)")
    parser.add_argument("--mode", choices=[*MODES, "all"], default="all")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    modes = list(MODES) if options.mode == "all" else [options.mode]
    wrong = False
    for mode in modes:
        wrong = not _enough(mode, options.kills, options.folder) or wrong
    return int(wrong)


def _enough(mode: str, kills: int, folder: Path) -> bool:
    """Whether all rounds of one mode were as they should be; plays those that are missing."""
    rounds = _played(folder / "kills.jsonl", mode)
    while sum(len(r["killed_after"]) for r in rounds) < kills:
        rounds.append(_play(mode, len(rounds), folder))
        with (folder / "kills.jsonl").open("a") as file:
            file.write(json.dumps(rounds[-1]) + "\n")
    after = [step for r in rounds for step in r["killed_after"]]
    wrong = [r for r in rounds if r["wrong"]]
    bitwise = sum(r["same_weights"] for r in rounds)
    print(
        f"{mode}: {len(after)} kills in {len(rounds)} runs, {len(wrong)} runs are not as they "
        f"should be; weights the same to the last bit in {bitwise}"
    )
    for r in wrong:
        print(f"  {r['folder']}: {r['wrong'][:3]}")
    return not wrong


def _play(mode: str, number: int, folder: Path) -> dict[str, Any]:
    own = folder / f"{mode}-{number}-{int(time.time())}"
    job = Killed(MODES[mode], own, cache=folder / "cache", seed=number)
    alone = job.left_alone()
    killed, report = job.killed()
    wrong = twice_or_missing(killed, PROMPTS_PER_STEP)
    if mode != "continuous":
        wrong += differences(alone, killed)
    print(f"{mode} {number}: {len(report.killed_after)} kills", *wrong[:3], flush=True)
    return {
        "mode": mode,
        "folder": str(own),
        "killed_after": report.killed_after,
        "wrong": wrong,
        "same_weights": same_weights(alone, killed),
    }


def _played(file: Path, mode: str) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [r for r in map(json.loads, file.read_text().splitlines()) if r["mode"] == mode]


if __name__ == "__main__":
    sys.exit(main())
