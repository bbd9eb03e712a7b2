"""Calls a second of an environment pool: workers of its own against workers behind a server (TCP).

Both kinds take turns in one run, on the same machine, over loopback; so their ratio says what the
way costs, without a network's latency. The environment is a corridor, which costs next to nothing:
with real ones the difference is smaller. On a machine that others use too, the CPU time that the
pool's process takes for a call is the steadier figure.

    python tools/benchmarks/environment_workers.py --workers 1 --slots 64 --rounds 5
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from megatron_spear.rollout.env_pool import EnvironmentPool, Slot
from megatron_spear.rollout.env_remote import RemoteWorkers
from megatron_spear.testing.environment_servers import environment_server

TOY = "megatron_spear.testing.toy_environment:CorridorEnvironment"
OPTIONS = {"length": 1000, "start": 500}


def make_pool(workers: int, remote: RemoteWorkers | None) -> EnvironmentPool:
    """A pool of corridors."""
    return EnvironmentPool(TOY, workers=workers, deadline_s=60.0, remote=remote)


async def measure(pool: EnvironmentPool, slots: list[Slot], calls: int) -> tuple[float, float]:
    """Calls a second and microseconds of our own CPU a call, for ``calls`` steps of each slot, all
    slots at once; resets are not timed."""

    async def play(slot: Slot) -> None:
        for number in range(calls):
            await pool.step(slot, "left" if number % 2 else "right")

    await asyncio.gather(*(pool.reset(slot, seed=0, options=OPTIONS) for slot in slots))
    began, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(play(slot) for slot in slots))
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    count = len(slots) * calls
    return count / wall_s, 1e6 * cpu_s / count


async def compare(args: argparse.Namespace, remote: RemoteWorkers) -> None:
    """One line a number of slots: the median of the rounds, and the ratio of each pair."""
    pools = {"own": make_pool(args.workers, None), "remote": make_pool(args.workers, remote)}
    try:
        for num_slots in args.slots:
            slots = {k: [await p.open() for _ in range(num_slots)] for k, p in pools.items()}
            found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in pools}
            for number in range(args.rounds + 1):
                for kind, pool in pools.items():
                    figures = await measure(pool, slots[kind], args.calls)
                    if number:  # the first one warms up
                        found[kind].append(figures)
            pairs = zip(found["own"], found["remote"], strict=True)
            ratio = statistics.median(remote[0] / own[0] for own, remote in pairs)
            own, behind = (
                [statistics.median(column) for column in zip(*found[kind], strict=True)]
                for kind in ("own", "remote")
            )
            print(
                f"{args.workers} worker(s), {num_slots:4} slots: own processes {own[0]:7.0f} "
                f"calls/s, {own[1]:4.0f} us CPU a call; TCP {behind[0]:7.0f} calls/s, "
                f"{behind[1]:4.0f} us; ratio of calls/s {ratio:.2f}"
            )
            for kind, pool in pools.items():
                for slot in slots[kind]:
                    pool.close_slot(slot)
    finally:
        for pool in pools.values():
            pool.close()


def main() -> None:
    """Start a server, compare, end it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each kind")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 64], help="calls at once")
    parser.add_argument("--calls", type=int, default=300, help="steps of each slot a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, environment_server(Path(folder)) as remote:
        asyncio.run(compare(args, remote))


if __name__ == "__main__":
    main()
