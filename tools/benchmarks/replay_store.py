#!/usr/bin/env python3
"""The replay store at scale: against plain files, and against a list of tensors in memory.

    python tools/benchmarks/replay_store.py [--rows 100000] [--rounds 5]

Rows are trajectories of 4,096 tokens (70 kB). A step adds 2,048 and draws 1,024 of those above the
median reward. Both sides of a ratio run in turns in one process; medians over rounds.

- *plain file*: the same bytes in one ``write``, and those of 1,024 rows in one ``read``; what is
  read is in the page cache on both sides, and what is written takes memory that older files gave
  back, as in a store that is full. Memory is what no file backs (``RssAnon``, sampled) while
  the store is filled, drawn from and resumed, in a process without torch; the 2,048 rows that are
  added count too.
- *list of tensors*: the official code's way: dicts of tensors, ``copy.deepcopy`` on the way in and
  out, ``torch.save`` of everything as a checkpoint. Same arrays and dtypes as a sample's.

At 100,000 rows it needs 15 GB of disk, 9 GB of memory (the list's) and some minutes.
"""

import argparse
import copy
import json
import multiprocessing
import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.files import sync_file, sync_folder, write_whole
from megatron_spear.replay.store import ReplayStore
from megatron_spear.types import Reward, TrainSample, TrajectoryId

Times = dict[str, list[float]]
Trajectories = list[list[TrainSample]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows that are held, added and drawn, their length, and how often each is timed."""

    rows: int = 100_000
    tokens: int = 4096
    added: int = 2048
    drawn: int = 1024
    rounds: int = 5


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table; ``ratio`` is how many times faster the store is."""

    what: str
    store: str
    against: str = ""
    ratio: float | None = None
    aim: str = ""

    @property
    def verdict(self) -> str:
        """The ratio, and what it should be."""
        ratio = f"{self.ratio:.2f}x" if self.ratio else ""
        return f"{ratio} ({self.aim})".strip() if self.aim else ratio

    def __str__(self) -> str:
        ratio = f"{self.ratio:.2f}x" if self.ratio else ""
        return f"{self.what:46}{self.store:>26}{self.against:>26}{ratio:>10}  {self.aim}"


HEADER = f"{'what':46}{'store':>26}{'against':>26}{'ratio':>10}  aim"


def measure(sizes: Sizes, folder: Path) -> list[Line]:
    """All lines: the store alone in a process of its own, then beside the list of tensors."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        lines, state = pool.submit(against_plain_files, sizes, folder).result()
    return lines + against_list(sizes, folder, state)


def rows(num_held: int, folder: Path) -> list[tuple[str, str, str, str]]:
    """The lines as rows of ``method.py``'s table."""
    lines = measure(Sizes(rows=num_held), folder)
    return [(line.what.strip(), line.store, line.against, line.verdict) for line in lines]


def against_plain_files(sizes: Sizes, folder: Path) -> tuple[list[Line], dict[str, Any]]:
    """Lines, and the state of the store that is left, full, in ``folder / "replay"``."""
    times: Times = defaultdict(list)
    with anonymous_mib() as memory:
        trajectories = make_trajectories(sizes)
        store = ReplayStore(folder / "replay", sizes.rows)
        steps = 1 + sizes.rows // sizes.added
        for step in range(steps):
            store.add(renamed(trajectories, step))
            store.state_dict()
        store.prune([])
        draw_from_store(store, sizes, steps)
        state = store.state_dict()
        timed(times, "resume", lambda: ReplayStore(folder / "replay", None).load_state_dict(state))
    content = max((folder / "replay").iterdir()).read_bytes()
    drawn = content[: len(content) * sizes.drawn // sizes.added]
    read = folder / "read"
    read.write_bytes(drawn)
    for step in range(sizes.rounds):
        timed(times, "read", read.read_bytes)
        timed(times, "draw", partial(draw_from_store, store, sizes, steps + step))
        timed(times, "index", store.index)
    for step in range(steps, steps + sizes.rounds):
        rows, plain = renamed(trajectories, step), folder / f"plain-{step}"
        # As a run that is full: what leaves gives its memory to what comes, on both sides.
        (folder / f"plain-{step - 2}").unlink(missing_ok=True)
        store.prune([])
        turns: list[tuple[str, Callable[[], object]]] = [
            ("write", partial(plain.write_bytes, content)),
            ("add", partial(store.add, rows)),
        ]
        syncs: dict[str, Callable[[], object]] = {
            "write": partial(sync_both, plain, folder),
            "add": store.state_dict,
        }
        for name, work in turns[:: 1 - 2 * (step % 2)]:  # who is first has the warmer memory
            timed(times, name, work)
            timed(times, f"{name} sync", syncs[name])
    store.prune([])
    state = store.state_dict()
    held = sum(path.stat().st_size for path in (folder / "replay").iterdir())
    gigabytes = {"add": len(content) / 1e9, "draw": len(drawn) / 1e9, "resume": held / 1e9}
    return plain_lines(sizes, times, gigabytes, max(memory), len(json.dumps(state))), state


def plain_lines(
    sizes: Sizes, times: Times, gigabytes: Mapping[str, float], memory: float, state: int
) -> list[Line]:
    def line(what: str, ours: list[float], theirs: list[float], rows: int, size: float) -> Line:
        middle = statistics.median(ours)
        return Line(
            what=what,
            store=f"{rows / middle:,.0f} rows/s {size / middle:.2f} GB/s",
            against=f"{size / statistics.median(theirs):.2f} GB/s",
            ratio=ratio(ours, theirs),
            aim="0.5x",
        )

    added, drawn = f"add {sizes.added:,} rows", f"draw {sizes.drawn:,} of {sizes.rows:,} rows"
    add, write = times["add"], times["write"]
    synced_add, synced_write = total(add, times["add sync"]), total(write, times["write sync"])
    resume = times["resume"][0]
    return [
        line(f"{added}, a plain file", add, write, sizes.added, gigabytes["add"]),
        cpu_line(times["add cpu"], times["write cpu"]),
        line(f"{added}, both synced", synced_add, synced_write, sizes.added, gigabytes["add"]),
        line(f"{drawn}, a file", times["draw"], times["read"], sizes.drawn, gigabytes["draw"]),
        cpu_line(times["draw cpu"], times["read cpu"]),
        Line(what="peak memory no file backs", store=f"{memory:.0f} MiB", aim="512 MiB"),
        Line(what="index()", store=f"{1e3 * statistics.median(times['index']):.1f} ms"),
        Line(what="a checkpoint's state", store=f"{state / 1e3:.1f} kB"),
        Line(
            what="resume, every row verified",
            store=f"{resume:.1f} s {gigabytes['resume'] / resume:.2f} GB/s",
        ),
    ]


def cpu_line(ours: list[float], theirs: list[float]) -> Line:
    """Processor time of the line above: what a busy machine does not change much."""
    return Line(
        what="  processor time",
        store=f"{1e3 * statistics.median(ours):.0f} ms",
        against=f"{1e3 * statistics.median(theirs):.0f} ms",
        ratio=ratio(ours, theirs),
    )


def against_list(sizes: Sizes, folder: Path, state: Mapping[str, Any]) -> list[Line]:
    """Lines; ``state`` is that of a full store in ``folder / "replay"``."""
    import torch

    require_memory(1.1 * sizes.rows * sizes.tokens * 17 + 2e9)
    times: Times = defaultdict(list)
    trajectories = make_trajectories(sizes)
    beside = ReplayStore(folder / "beside", 2 * sizes.added)
    store = ReplayStore(folder / "replay", sizes.rows)
    store.load_state_dict(state)
    held: list[dict[str, Any]] = []
    step = sizes.rows  # later than all steps of the full store
    for _ in range(sizes.rounds):
        step += 1
        rows = renamed(trajectories, step)
        tensors = [as_tensors(sample) for (sample,) in rows]
        del held[: -sizes.added]
        beside.prune([])
        timed(times, "list add", partial(extend_by_copies, held, tensors))
        timed(times, "add", partial(beside.add, rows))
        timed(times, "add sync", beside.state_dict)
    while len(held) < sizes.rows:
        rows = renamed(trajectories, len(held))
        held += [copy.deepcopy(as_tensors(sample)) for (sample,) in rows]
    for _ in range(2):
        step += 1
        rows = renamed(trajectories, step)
        store.add(rows)
        held = held[sizes.added + len(held) - sizes.rows :]
        held += [copy.deepcopy(as_tensors(sample)) for (sample,) in rows]
        timed(times, "list save", partial(torch.save, held, folder / "list.pt"))
        timed(times, "list save sync", lambda: sync_file(folder / "list.pt"))
        (folder / "list.pt").unlink()
        timed(times, "list draw", partial(draw_from_list, held, sizes, step))
        timed(times, "save", lambda: write_whole(folder / "s", json.dumps(store.state_dict())))
        timed(times, "draw", partial(draw_from_store, store, sizes, step))
    return list_lines(sizes, times)


def list_lines(sizes: Sizes, times: Times) -> list[Line]:
    synced = total(times["add"], times["add sync"])
    ours = total(times["save"], times["draw"])
    theirs = total(times["list save"], times["list save sync"], times["list draw"])

    def line(what: str, ours: list[float], theirs: list[float], aim: str) -> Line:
        return Line(
            what=what,
            store=f"{statistics.median(ours):.3f} s",
            against=f"{statistics.median(theirs):.3f} s",
            ratio=ratio(ours, theirs),
            aim=aim,
        )

    added = f"add {sizes.added:,} rows, a list"
    return [
        line(added, times["add"], times["list add"], "1.5x"),
        line(f"{added}; the store synced", synced, times["list add"], "1.5x"),
        line(f"checkpoint + draw at {sizes.rows:,} rows, a list", ours, theirs, "20x"),
        line("  draw alone", times["draw"], times["list draw"], ""),
    ]


def make_trajectories(sizes: Sizes) -> Trajectories:
    """``sizes.added`` rows of one segment with masked turns of 64 to 512 tokens."""
    draw, result = np.random.default_rng(0), []
    for member in range(sizes.added):
        edges = np.cumsum(draw.integers(64, 512, 2 + sizes.tokens // 64))
        mask = np.searchsorted(edges, np.arange(sizes.tokens), side="right") % 2 == 1
        logprobs = -draw.random(sizes.tokens, np.float32) * mask
        sample = TrainSample(
            trajectory_id=TrajectoryId(group="", member=member % 8),
            segment=0,
            num_segments=1,
            prompt_id=f"prompt-{member // 8}",
            token_ids=draw.integers(0, 150_000, sizes.tokens).astype(np.int32),
            response_mask=mask,
            rollout_logprobs=logprobs,
            old_logprobs=logprobs * np.float32(1.01),
            advantages=mask.astype(np.float32),
            reward=Reward(outcome=0.0),
            turn_starts=edges[edges < sizes.tokens].astype(np.int32),
            anchors=("kitchen", "drawer 3"),
            policy_version=0,
        )
        result.append([sample])
    return result


def sync_both(path: Path, folder: Path) -> None:
    """A new file's content and its name to disk."""
    sync_file(path)
    sync_folder(folder)


def extend_by_copies(held: list[dict[str, Any]], tensors: list[dict[str, Any]]) -> None:
    """Append a copy of each."""
    held.extend(map(copy.deepcopy, tensors))


def renamed(trajectories: Trajectories, step: int) -> Trajectories:
    """The same rows as those of a step: other ids, versions and rewards, shared arrays."""
    rewards = np.random.default_rng(step).random(len(trajectories)).tolist()
    return [
        [
            replace(
                sample,
                trajectory_id=TrajectoryId(group=f"{step}-{at // 8}", member=at % 8),
                reward=Reward(outcome=rewards[at]),
                policy_version=step,
            )
        ]
        for at, (sample,) in enumerate(trajectories)
    ]


def as_tensors(sample: TrainSample) -> dict[str, Any]:
    """The sample's arrays as tensors that share their memory, and what selection needs."""
    import torch

    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    arrays = {k: torch.from_numpy(v) for k, v in values.items() if isinstance(v, np.ndarray)}
    return arrays | {"reward": sample.reward.total(0.0), "version": sample.policy_version}


def draw_from_store(store: ReplayStore, sizes: Sizes, step: int) -> None:
    """Take rows drawn from those above the median reward."""
    index = store.index()
    rewards = index.rewards(0.0)
    kept = np.flatnonzero((rewards > np.median(rewards)) & (index.policy_versions <= step))
    chosen = np.random.default_rng(step).choice(kept, sizes.drawn, replace=False)
    store.take(index.row_ids[np.sort(chosen)])


def draw_from_list(held: list[dict[str, Any]], sizes: Sizes, step: int) -> None:
    """The same from the list: a copy of each, and the list without them."""
    median = np.median([row["reward"] for row in held])
    kept = [i for i, row in enumerate(held) if row["reward"] > median and row["version"] <= step]
    chosen = set(random.Random(step).sample(kept, sizes.drawn))
    [copy.deepcopy(held[i]) for i in sorted(chosen)]
    held[:] = [row for i, row in enumerate(held) if i not in chosen]


def timed(times: Times, name: str, work: Callable[[], object]) -> None:
    """Append the seconds that ``work`` takes, and those of processor time below ``name cpu``."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    times[name].append(time.perf_counter() - start)
    times[f"{name} cpu"].append(time.process_time() - cpu)


def total(*parts: list[float]) -> list[float]:
    return [sum(round_) for round_ in zip(*parts, strict=True)]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of how many times faster ours is."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


@contextmanager
def anonymous_mib() -> Iterator[list[float]]:
    """Samples, every 5 ms, of this process's memory that no file backs."""
    samples: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            samples.append(kibibytes("/proc/self/status", "RssAnon") / 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def kibibytes(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def require_memory(needed: float) -> None:
    available = 1024 * kibibytes("/proc/meminfo", "MemAvailable")
    if available < needed:
        raise SystemExit(
            f"the list of tensors needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB "
            "are available; give a smaller --rows"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    sizes = Sizes(**vars(parser.parse_args()))
    needed = 2 * sizes.drawn * (sizes.rounds + 2)
    if sizes.rows < needed:
        parser.error(f"--rows: got {sizes.rows}, expected at least {needed} (twice what is drawn)")
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="replay") as folder:
        for line in measure(sizes, Path(folder)):
            print(line)


if __name__ == "__main__":
    main()
