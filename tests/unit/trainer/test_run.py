"""The run around the steps: when it evaluates and saves, and what its summary says."""

import errno
import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole

from megatron_spear.background import nothing_to_do
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.deadlines import StopFlag
from megatron_spear.envs.family import Panel
from megatron_spear.errors import CheckpointError, StopRequested
from megatron_spear.testing.hand_made import make_prompt, make_trajectory
from megatron_spear.tracking.bars import StepsBar
from megatron_spear.tracking.live_view import LiveView
from megatron_spear.tracking.progress import Console
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.run import SpearRun
from megatron_spear.trainer.run_directory import RunDirectory
from megatron_spear.types import Prompt, Status, StepContext, StepReport, TrajectoryGroup
from megatron_spear.weight_sync.in_process import InProcess

IDS = ("look-Pen-1/t1", "pick-Mug-2/t2", "pick-Pan-3/t3", "pick-Cup-4/t4")
PANEL = Panel(
    tuple(Prompt(prompt_id=i, env="alfworld", kind=i.split("-")[0]) for i in IDS), sha256="ab" * 32
)
LOST = "----"


class _Console(Console):
    """A clock that is set by hand."""

    elapsed_s = 0.0

    def __init__(self) -> None:
        super().__init__(file=io.StringIO())
        self.views: list[LiveView] = []

    @contextmanager
    def steps(self, total: int, *, done: int = 0) -> Iterator[StepsBar]:
        with super().steps(total, done=done) as bar:
            self.views.append(bar.view)
            yield bar


class _Policy:
    """``written`` is what the files of a save in the background wait for; None = nothing."""

    written: Future[None] | None = None

    def save(self, folder: Path) -> None:
        folder.mkdir()

    def begin_save(self, folder: Path) -> Any:
        folder.mkdir()
        writing = self.written or nothing_to_do()
        return SimpleNamespace(writing=writing, finish=writing.result, abandon=lambda: None)

    def load(self, folder: Path) -> None:
        assert folder.is_dir()

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.zeros(2)


class _Step:
    """Notes the steps it was asked for; ``at`` is called at the end of each."""

    def __init__(self, events: list[str], at: Callable[[int], None]) -> None:
        self.policy = _Policy()
        self.weight_sync = InProcess(source=self.policy, receiver=None)
        cursor = PromptCursor(FreshPrompts(lambda i: make_prompt(str(i))))
        self.controller = SimpleNamespace(cursor=cursor, hooks=HookCalls({}), ahead=None)
        self._events, self._at = events, at

    def run(self, ctx: StepContext, progress: Any) -> StepReport:
        self._events.append(f"step {ctx.step}")
        self._at(ctx.step)
        metrics = {"time/step_s": 1.0, "time/rollout_s": 0.5, "time/train_s": 0.5}
        metrics |= {"work/replay_train_fraction": 0.1 * ctx.step, "work/replay_step_fraction": 0.5}
        return StepReport(step=ctx.step, policy_version=ctx.step, metrics=metrics)


class _Rollouter:
    """Plays the panels it is given, a letter a game: ``+`` won, ``-`` lost, ``x`` failed."""

    def __init__(self, panels: Callable[[], str]) -> None:
        self._panels = panels

    def collect_sync(
        self, prompts: Any, *, progress: Callable[[int], None], **settings: Any
    ) -> list[TrajectoryGroup]:
        groups = []
        for number, (prompt, letter) in enumerate(zip(prompts, self._panels(), strict=True)):
            status = Status.FAILED_TOOL if letter == "x" else Status.COMPLETED
            played = make_trajectory(prompt.prompt_id, 0, won=letter == "+", status=status)
            members, failures = ((), (played,)) if letter == "x" else ((played,), ())
            groups.append(
                TrajectoryGroup(
                    group_id=prompt.prompt_id, prompt=prompt, members=members, failures=failures
                )
            )
            progress(number + 1)
        return groups


class _Launch:
    """One launch of the run in ``path``; ``events`` are its steps and evaluations in order."""

    def __init__(
        self,
        path: Path,
        *settings: str,
        panels: Callable[[], str] = lambda: LOST,
        at: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.events: list[str] = []
        self.stop, self.console = StopFlag(), _Console()
        model = path / "start"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text("{}")
        config: RunConfig = load_config(None, ["run.steps=4", "checkpoint.every=1", *settings])
        step: Any = _Step(self.events, at)
        self.run = SpearRun(
            config,
            step,
            directory=RunDirectory(path),
            rollout=SimpleNamespace(rollouter=_Rollouter(panels)),
            panel=PANEL,
            console=self.console,
            stop=self.stop,
            model=model,
        )
        self.run.tracker = SimpleNamespace(log=self._log)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if "eval/success" in metrics:
            self.events.append(f"evaluation {step}")


def test_evaluations_come_between_the_steps(tmp_path: Path) -> None:
    launch = _Launch(tmp_path, "evaluation.every=2")
    launch.run.run()
    assert launch.events == [
        "evaluation 0", "step 1", "step 2", "evaluation 2", "step 3", "step 4", "evaluation 4"
    ]  # fmt: skip


def test_the_screen_shows_the_panel_before_and_of_late(tmp_path: Path) -> None:
    answers = iter(["----", "+---", "++--"])
    launch = _Launch(tmp_path, "evaluation.every=2", panels=lambda: next(answers))
    launch.run.run()
    (view,) = launch.console.views
    file = io.StringIO()
    RichConsole(file=file, width=120).print(view)
    assert "panel 0.000 before, 0.500 at step 4" in file.getvalue()


@pytest.mark.parametrize("every", [0, 1])
def test_a_kill_in_an_evaluation_costs_no_evaluation(every: int, tmp_path: Path) -> None:
    """Also where the checkpoint of the evaluated step was there, or an older one."""
    answers = iter([LOST, KeyboardInterrupt])

    def panels() -> str:
        answer = next(answers)
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return str(answer)

    settings = ("evaluation.every=3", f"checkpoint.every={every or 2}")
    launch = _Launch(tmp_path, *settings, panels=panels)
    with pytest.raises(KeyboardInterrupt):
        launch.run.run()
    assert launch.events[-1] == "step 3"
    resumed = _Launch(tmp_path, *settings)
    assert resumed.run.resume().step == (3 if every else 2)
    resumed.run.run()
    again = [] if every else ["step 3"]
    assert resumed.events == [*again, "evaluation 3", "step 4", "evaluation 4"]


def test_a_stop_at_an_evaluated_step_puts_the_evaluation_off(tmp_path: Path) -> None:
    launch = _Launch(
        tmp_path,
        "evaluation.every=2",
        "checkpoint.every=0",
        at=lambda step: launch.stop.request("SIGTERM") if step == 2 else None,
    )
    with pytest.raises(StopRequested, match="SIGTERM; saved at step 2"):
        launch.run.run()
    assert launch.events == ["evaluation 0", "step 1", "step 2"]
    resumed = _Launch(tmp_path, "evaluation.every=2", "checkpoint.every=0")
    assert resumed.run.resume().step == 2
    resumed.run.run()
    assert resumed.events == ["evaluation 2", "step 3", "step 4", "evaluation 4"]


def test_a_stop_in_an_evaluation_saves_the_steps_before_it(tmp_path: Path) -> None:
    settings = ("evaluation.every=2", "checkpoint.every=0")
    answers = iter([LOST, "stop"])

    def panels() -> str:
        if next(answers) == "stop":
            launch.stop.request("SIGINT")
        return LOST

    launch = _Launch(tmp_path, *settings, panels=panels)
    with pytest.raises(StopRequested, match="SIGINT during an evaluation"):
        launch.run.run()
    resumed = _Launch(tmp_path, *settings)
    assert resumed.run.resume().step == 2
    resumed.run.run()
    assert resumed.events == ["evaluation 2", "step 3", "step 4", "evaluation 4"]


ASYNC = "checkpoint.async_save=true"


def _committed(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path / "checkpoints").iterdir())


@pytest.mark.parametrize("ends", ["the end", "stop_after", "a stop", "a stop in an evaluation"])
def test_a_save_in_the_background_is_committed_at_the_end(ends: str, tmp_path: Path) -> None:
    settings = [ASYNC, "checkpoint.every=4", "checkpoint.keep=4", "evaluation.every=3"]
    panels = iter([LOST, "", LOST])

    def at(step: int) -> None:
        if (ends, step) == ("a stop", 3):
            launch.stop.request("SIGTERM")

    def panel() -> str:
        if ends == "a stop in an evaluation" and not next(panels):
            launch.stop.request("SIGTERM")
        return LOST

    if ends == "stop_after":
        settings.append("run.stop_after=3")
    launch = _Launch(tmp_path, *settings, panels=panel, at=at)
    if ends.startswith("a stop"):
        with pytest.raises(StopRequested, match="SIGTERM"):
            launch.run.run()
    else:
        launch.run.run()
    step = 4 if ends == "the end" else 3
    assert _committed(tmp_path) == [f"step_{step}"]
    assert _Launch(tmp_path, *settings).run.resume().step == step


def test_a_second_ctrl_c_gives_up_the_save_in_the_background(tmp_path: Path) -> None:
    def at(step: int) -> None:
        launch.run._step.policy.written = Future()  # nothing is written from now on
        if step == 4:
            raise KeyboardInterrupt

    launch = _Launch(tmp_path, ASYNC, "checkpoint.every=3", "evaluation.every=0", at=at)
    with pytest.raises(KeyboardInterrupt):
        launch.run.run()
    assert _committed(tmp_path) == []


def test_a_fault_in_the_background_ends_the_run(tmp_path: Path) -> None:
    def at(step: int) -> None:
        written: Future[None] = Future()
        written.set_exception(OSError(errno.ENOSPC, "No space left on device"))
        launch.run._step.policy.written = written if step == 2 else None

    launch = _Launch(tmp_path, ASYNC, "run.steps=9", "checkpoint.keep=9", at=at)
    with pytest.raises(CheckpointError, match="step 2 was not written: the disk is full"):
        launch.run.run()
    assert launch.events[-1] == "step 3"
    assert _committed(tmp_path) == ["step_1"]


def test_failed_games_are_told_and_count_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    panels = iter(["x--+", "-+x+"])
    launch = _Launch(tmp_path, panels=lambda: next(panels))
    with caplog.at_level(logging.WARNING):
        summary = launch.run.run()
    assert (summary["success_before"], summary["success_after"]) == (1 / 3, 2 / 3)
    assert summary["success_by_task_type"] == {"look": 0.0, "pick": 1.0}
    assert (summary["failed_before"], summary["failed_after"]) == (1, 1)
    # The second and the fourth game were played both times: one newly won, one won again.
    assert summary["success_gain"] == 0.5
    assert summary["success_gain_95"] == pytest.approx([0.5 - 0.98, 0.5 + 0.98])
    assert caplog.text.count("1 of the 4 attempts failed") == 2
    assert json.loads(json.dumps(summary)) == summary


def test_wall_time_and_means_are_those_of_all_launches(tmp_path: Path) -> None:
    def at(step: int) -> None:
        launch.console.elapsed_s = 10.0 * step

    launch = _Launch(tmp_path, "run.stop_after=2", at=at)
    launch.console.elapsed_s = 5.0
    assert launch.run.run() == {}
    resumed = _Launch(tmp_path)
    resumed.run.resume()
    resumed.console.elapsed_s = 7.0
    summary = resumed.run.run()
    assert summary["wall_s"] == 27.0
    assert summary["replay_train_fraction"] == pytest.approx(0.25)
    assert summary["replay_step_fraction"] == 0.5
