"""Executions a second of the local sandbox on one core: warm workers against a cold interpreter.

Cold: ``python -c CODE`` in bubblewrap, started anew for each execution. Both take turns in one run,
and all processes are kept on one core, so the ratio says what a warm worker saves. On a machine
that others use too, the fastest executions are the least disturbed; their ratio is printed as well.

    python tools/benchmarks/sandbox.py --rounds 5
"""

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable

from megatron_spear.config.environments.sandbox import SandboxSection
from megatron_spear.envs.sandbox.bubblewrap import find_bubblewrap, shut_in
from megatron_spear.envs.sandbox.interpreter import find_interpreter
from megatron_spear.envs.sandbox.make import make_sandbox

CODES = {
    "print(1)": "print(1)",
    "imports": "import collections, itertools, math, random\nprint(math.comb(40, 20))",
    "work of a few ms": "print(sum(i * i for i in range(50_000)))",
}


def measure(run: Callable[[str], None], code: str, count: int) -> list[float]:
    """Seconds of each of ``count`` executions."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run(code)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Print a line a piece of code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=100, help="warm executions a round")
    parser.add_argument("--cold", type=int, default=20, help="cold executions a round")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bwrap = find_bubblewrap()
    if bwrap is None:
        raise SystemExit("bubblewrap is not installed (apt-get install bubblewrap)")
    section = SandboxSection()
    sandbox = make_sandbox(section.model_dump())

    def warm(code: str) -> None:
        execution = sandbox.run(code)
        assert execution.status == "ok", execution

    def cold(code: str) -> None:
        arguments = ["-s", "-B", "-c", code]
        start = shut_in(bwrap, find_interpreter(None), arguments, section.disk_mb << 20)
        rights = (
            {} if start.uid is None else {"user": start.uid, "group": start.uid, "extra_groups": []}
        )
        subprocess.run(start.command, capture_output=True, check=True, **rights)  # type: ignore[call-overload]

    began = time.perf_counter()
    warm("print(1)")
    print(f"a worker is up after {1000 * (time.perf_counter() - began):.0f} ms")
    for name, code in CODES.items():
        found: dict[str, list[float]] = {"warm": [], "cold": []}
        measure(warm, code, 5)
        measure(cold, code, 2)
        ratios = []
        for _ in range(args.rounds):
            parts = measure(warm, code, args.warm), measure(cold, code, args.cold)
            ratios.append(statistics.mean(parts[1]) / statistics.mean(parts[0]))
            found["warm"] += parts[0]
            found["cold"] += parts[1]
        rates = {kind: 1 / statistics.mean(times) for kind, times in found.items()}
        best = {kind: 1000 * min(times) for kind, times in found.items()}
        print(
            f"{name:17} warm {rates['warm']:6.1f}/s, cold {rates['cold']:5.1f}/s, ratio of a round "
            f"(median) {statistics.median(ratios):.1f}x; fastest {best['warm']:.1f} against "
            f"{best['cold']:.1f} ms, {best['cold'] / best['warm']:.1f}x"
        )
    sandbox.close()


if __name__ == "__main__":
    main()
