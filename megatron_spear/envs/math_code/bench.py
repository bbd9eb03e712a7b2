"""What the environments of one worker process share: a sandbox and a grader."""

import json
import threading
from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.math_code.grading import Grader, GraderName
from megatron_spear.envs.sandbox.execution import Sandbox
from megatron_spear.envs.sandbox.make import make_sandbox


class Bench:
    """A sandbox and a grader with the number of environments that use them."""

    def __init__(self, sandbox: Sandbox, grader: Grader) -> None:
        self.sandbox, self.grader = sandbox, grader
        self.users = 0

    def close(self) -> None:
        """End their processes."""
        self.sandbox.close()
        self.grader.close()


_BENCHES: dict[str, Bench] = {}
_LOCK = threading.Lock()


def take_bench(sandbox: Mapping[str, Any], grader: GraderName, limit_s: float) -> Bench:
    """The bench of these settings, made for its first user; give it back with `leave_bench`."""
    key = json.dumps([dict(sandbox), grader, limit_s], sort_keys=True, default=str)
    with _LOCK:
        if key not in _BENCHES:
            _BENCHES[key] = Bench(make_sandbox(sandbox), Grader(grader, limit_s=limit_s))
        bench = _BENCHES[key]
        bench.users += 1
    return bench


def leave_bench(bench: Bench) -> None:
    """The last user's leave ends the bench's processes."""
    with _LOCK:
        bench.users -= 1
        if bench.users:
            return
        for key in [key for key, other in _BENCHES.items() if other is bench]:
            del _BENCHES[key]
    bench.close()
