"""The settings of a tiny run, and the command in this process."""

import contextlib
import io
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "examples" / "alfworld" / "quickstart.yaml"

TINY = (
    "model.tiny.hidden_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.num_heads=4",
    "model.tiny.num_kv_heads=2",
    "model.tiny.ffn_size=64",
    "env.max_turns=8",
    "env.task_types=[pick_and_place_simple, look_at_obj_in_light]",
    "sft.steps=100",  # enough for some valid actions, so that rewards differ
    "sft.trajectories_per_step=8",
    "sft.explore=0",
    "sft.decision_weight=1",
    "sft.observation_weight=0.3",
    "algorithm.mini_batches=1",
    "reward.invalid_action_penalty=0",
    "sft.optimizer.lr=0.01",
    "sft.optimizer.warmup_steps=2",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "rollout.max_slots=8",
    "curriculum.replay_warmup_steps=0",
    "evaluation.games=4",
    "tracking.wandb=false",
    "tracking.curves=false",
    "run.threads=1",
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit status and the two streams."""

    status: int
    out: str
    err: str


def arguments(command: str, cache: Path, settings: tuple[str, ...]) -> list[str]:
    """The command line of a tiny run; later settings win."""
    return [command, str(QUICKSTART), *TINY, f"model.cache_dir={cache}", *settings]


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Signals and logging as before: the command sets both for a process of its own."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    root, package = logging.getLogger(), logging.getLogger("megatron_spear")
    loggers, levels = list(root.handlers), (root.level, package.level)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers[:] = loggers
        root.setLevel(levels[0])
        package.setLevel(levels[1])


def run_here(command_line: list[str]) -> Outcome:
    """The command in this process, as a user sees it: status, stdout, stderr."""
    from megatron_spear.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    status = 0
    with _process_as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command_line)
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())
