"""What a checkpoint of a run holds, and which one a resumed run takes."""

import errno
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_spear.config.load import load_config
from megatron_spear.data.prompts import FreshPrompts, PoolPrompts, PromptCursor, PromptSource
from megatron_spear.envs.math_code.family import loaded_prompt
from megatron_spear.envs.math_code.problems import load_problems
from megatron_spear.errors import CheckpointError, ConfigError, HookError
from megatron_spear.testing.hand_made import make_prompt
from megatron_spear.tracking.wandb_sink import read_run_id, write_run_id
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.run_checkpoints import Progress, RunCheckpoints
from megatron_spear.trainer.run_directory import RunDirectory


class _Pending:
    """A save that is written when the test says so; ``abandoned`` if it was told so."""

    def __init__(self, folder: Path, state: int) -> None:
        self.writing: Future[None] = Future()
        self.abandoned = False
        self._folder, self._state = folder, state

    def finish(self) -> None:
        self.writing.result()
        (self._folder / "state").write_text(str(self._state))

    def abandon(self) -> None:
        self.abandoned = True


class _Policy:
    """Its state is one number; ``refused`` are those it cannot load."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.state, self._refused = 0, refused
        self.pending: list[_Pending] = []

    def begin_save(self, folder: Path) -> _Pending:
        folder.mkdir()
        self.pending.append(_Pending(folder, self.state))
        return self.pending[-1]

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "state").write_text(str(self.state))

    def load(self, folder: Path) -> None:
        state = int((folder / "state").read_text())
        if state in self._refused:
            raise CheckpointError(f"policy {state} does not fit")
        self.state = state


class _Hook(Hook):
    """Its state is one number with a file of its own outside the checkpoint, as replay rows are."""

    def __init__(self, folder: Path) -> None:
        self.state, self.kept, self._folder = 0, [], folder

    def write(self, state: int) -> None:
        self.state = state
        self._folder.mkdir(exist_ok=True)
        (self._folder / str(state)).touch()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not (self._folder / str(state["state"])).is_file():
            raise CheckpointError(f"row file {state['state']} is gone")
        self.state = state["state"]

    def prune(self, kept: Any) -> None:
        self.kept = [state["state"] for state in kept]


class _Run:
    """One launch of a run in ``path``."""

    def __init__(
        self,
        path: Path,
        *settings: str,
        panel: str = "ab",
        refused: Any = (),
        name: str = "rows",
        prompts: PromptSource | None = None,
    ) -> None:
        config = load_config(None, ["checkpoint.keep=3", *settings])
        self.directory = RunDirectory(path)
        self.directory.checkpoints.mkdir(parents=True, exist_ok=True)
        self.policy, self.hook = _Policy(refused), _Hook(path / "rows")
        self.cursor = PromptCursor(prompts or FreshPrompts(lambda i: make_prompt(str(i))))
        controller = SimpleNamespace(
            cursor=self.cursor, hooks=HookCalls({name: self.hook}), ahead=None
        )
        step: Any = SimpleNamespace(policy=self.policy, controller=controller)
        self.checkpoints = RunCheckpoints(config, step, self.directory, panel)

    def save(self, *steps: int) -> None:
        for step in steps:
            self.policy.state = step
            self.hook.write(step)
            self.cursor.consumed = 8 * step
            self.checkpoints.save(_progress(step))

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.directory.checkpoints.iterdir())

    def poll_until_committed(self, step: int) -> None:
        """The manifest is written by a thread, so a poll may come too early."""
        deadline = time.monotonic() + 30
        while f"step_{step}" not in self.folders():
            assert time.monotonic() < deadline
            self.checkpoints.poll()
            time.sleep(0.005)


def _progress(step: int) -> Progress:
    return Progress(step=step, policy_version=step, won_before=(True, None, False), wall_s=9.5)


def test_everything_comes_back(tmp_path: Path) -> None:
    _Run(tmp_path).save(1, 2)
    resumed = _Run(tmp_path)
    assert resumed.checkpoints.resume() == _progress(2)
    assert (resumed.policy.state, resumed.hook.state, resumed.cursor.consumed) == (2, 2, 16)


def test_a_run_without_a_checkpoint_is_at_its_start(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    (run.directory.checkpoints / "step_1.tmp").mkdir()
    assert run.checkpoints.resume() == Progress() and run.folders() == []


def test_what_the_checkpoint_belongs_to_is_in_it(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    write_run_id(tmp_path, "1234abcd")
    run.save(1)
    state = json.loads((run.directory.checkpoints / "step_1" / "trainer.json").read_text())
    assert state["panel_sha256"] == "ab" and state["wandb_id"] == "1234abcd"
    assert state["versions"]["torch"] and state["versions"]["python"]


def test_wandb_goes_on_under_the_same_id(tmp_path: Path) -> None:
    write_run_id(tmp_path, "1234abcd")
    _Run(tmp_path).save(1)
    (tmp_path / "wandb_id.txt").unlink()
    _Run(tmp_path).checkpoints.resume()
    assert read_run_id(tmp_path) == "1234abcd"


def test_hooks_hear_which_checkpoints_are_kept(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.save(1, 2, 3, 4)
    assert run.hook.kept == [2, 3, 4]


@pytest.mark.parametrize("what", ["a hook's file", "the policy", "a file of the checkpoint"])
def test_one_that_cannot_be_used_costs_its_steps_only(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _Run(tmp_path)
    run.save(1, 2, 3)
    told = {"a hook's file": "row file 3 is gone", "the policy": "policy 3 does not fit"}
    if what == "a hook's file":
        (tmp_path / "rows" / "3").unlink()
    elif what == "a file of the checkpoint":
        (run.directory.checkpoints / "step_3" / "policy" / "state").write_text("7")
    resumed = _Run(tmp_path, refused=(3,) if what == "the policy" else ())
    with caplog.at_level(logging.WARNING):
        assert resumed.checkpoints.resume() == _progress(2)
    assert (resumed.policy.state, resumed.hook.state, resumed.cursor.consumed) == (2, 2, 16)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("passing over checkpoint ") and "step_3" in message
    assert told.get(what, "sha256") in message
    assert resumed.folders() == ["step_1", "step_2", "step_3.damaged"]


def test_it_goes_back_as_far_as_it_must(tmp_path: Path) -> None:
    _Run(tmp_path).save(1, 2, 3)
    (tmp_path / "rows" / "3").unlink()
    assert _Run(tmp_path, refused=(2,)).checkpoints.resume().step == 1


def test_none_left_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.save(1, 2)
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole.*restore one"):
        _Run(tmp_path).checkpoints.resume()
    assert run.folders() == ["step_1", "step_2"]


def test_another_panel_is_refused(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.save(1, 2)
    with pytest.raises(ConfigError, match=r"panel have changed: their sha256 was ab, is now cd.*"):
        _Run(tmp_path, panel="cd").checkpoints.resume()
    assert run.folders() == ["step_1", "step_2"]


def test_other_prompts_to_train_on_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [json.dumps({"problem": f"What is {i}?", "answer": i}) + "\n" for i in range(9)]

    def launch(*rows: str) -> _Run:
        file.write_text("".join(rows))
        pool = [loaded_prompt(problem) for problem in load_problems([file])]
        return _Run(tmp_path / "run", prompts=PoolPrompts(pool, seed=0))

    launch(*rows).save(1, 2)
    told = r"prompts to train on have changed: their sha256 was .*put the files .* another run\.dir"
    with pytest.raises(ConfigError, match=told):
        launch(*rows[1:]).checkpoints.resume()
    with pytest.raises(ConfigError, match=told):
        launch(*rows, rows[0].replace("0", "9")).checkpoints.resume()
    again = launch(*rows)
    assert again.folders() == ["step_1", "step_2"]
    assert again.checkpoints.resume() == _progress(2) and again.cursor.consumed == 16


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.save(1)
    with pytest.raises(ConfigError, match="by a run with other settings"):
        _Run(tmp_path, "run.seed=5").checkpoints.resume()
    assert run.folders() == ["step_1"]


def test_states_of_hooks_are_kept_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _Run(tmp_path)
    run.save(1)
    state = json.loads((run.directory.checkpoints / "step_1" / "trainer.json").read_text())
    assert state["hooks"] == {"rows": {"state": 1}}
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        _Run(tmp_path, name="cells").checkpoints.resume()
    assert "missing ['cells'], unknown ['rows']" in caplog.text


def test_a_hook_without_a_state_costs_no_checkpoint(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.save(1)
    run.hook.state_dict = lambda: {"state": {1, 2}}
    with pytest.raises(HookError, match=r"hook 'rows' \(_Hook\): state_dict after step 2 gave"):
        run.save(2)
    assert run.folders() == ["step_1"]
    assert _Run(tmp_path).checkpoints.resume() == _progress(1)


def test_a_fault_while_a_hook_takes_its_state_back_ends_the_resume(tmp_path: Path) -> None:
    """It is no damaged checkpoint: none is set aside."""
    _Run(tmp_path).save(1, 2)
    run = _Run(tmp_path)
    run.hook.write = None
    run.hook.load_state_dict = lambda state: state["column"]
    with pytest.raises(HookError, match="load_state_dict at the resume raised KeyError: 'column'"):
        run.checkpoints.resume()
    assert run.folders() == ["step_1", "step_2"]


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.hook.write(1)
    folder = run.directory.checkpoints
    store = run.checkpoints._store
    with store.saving(1) as tmp:
        (tmp / "trainer.json").write_text('{"progress": {}}')
    with pytest.raises(CheckpointError, match="none of its checkpoints"):
        run.checkpoints.resume()
    assert (folder / "step_1").is_dir()


ASYNC = "checkpoint.async_save=true"


def test_a_save_in_the_background_is_of_the_moment_it_was_begun(tmp_path: Path) -> None:
    run = _Run(tmp_path, ASYNC)
    progress = _progress(1)
    run.policy.state, run.cursor.consumed = 1, 8
    run.hook.write(1)
    run.checkpoints.save(progress)
    (pending,) = run.policy.pending
    progress.step, progress.wall_s = 2, 99.0  # the run goes on
    run.policy.state, run.cursor.consumed = 2, 16
    run.hook.write(2)
    run.checkpoints.poll()
    assert run.folders() == ["step_1.tmp"]
    pending.writing.set_result(None)
    run.poll_until_committed(1)
    assert run.folders() == ["step_1"] and run.hook.kept == [1]
    run.checkpoints.poll()
    run.checkpoints.finish()
    resumed = _Run(tmp_path)
    assert resumed.checkpoints.resume() == _progress(1)
    assert (resumed.policy.state, resumed.hook.state, resumed.cursor.consumed) == (1, 1, 8)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    run = _Run(tmp_path, ASYNC)
    run.save(1)
    run.policy.pending[0].writing.set_result(None)
    run.save(2)
    assert run.folders() == ["step_1", "step_2.tmp"]
    run.policy.pending[1].writing.set_result(None)
    run.checkpoints.finish()
    assert run.folders() == ["step_1", "step_2"] and run.hook.kept == [1, 2]


@pytest.mark.parametrize("where", ["files", "manifest"])
@pytest.mark.parametrize("call", ["poll", "finish", "save"])
def test_a_full_disk_in_the_background_is_told(
    where: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _Run(tmp_path, ASYNC)
    run.save(1)
    run.policy.pending[0].writing.set_result(None)
    run.save(2)
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args: Any) -> None:
        raise full

    if where == "files":
        run.policy.pending[1].writing.set_exception(full)
    else:
        monkeypatch.setattr("megatron_spear.trainer.commit.write_manifest", refuse)
        run.policy.pending[1].writing.set_result(None)
    told = r"checkpoint of step 2 was not written: the disk is full.*No space left"
    with pytest.raises(CheckpointError, match=told):
        if call == "poll":
            run.poll_until_committed(2)
        elif call == "finish":
            run.checkpoints.finish()
        else:
            run.save(3)
    monkeypatch.undo()
    assert run.folders() == ["step_1"]
    run.checkpoints.finish()
    run.save(4)
    run.policy.pending[-1].writing.set_result(None)
    run.checkpoints.finish()
    assert run.folders() == ["step_1", "step_4"]


def test_a_hook_at_fault_ends_a_save_that_was_just_begun(tmp_path: Path) -> None:
    run = _Run(tmp_path, ASYNC)
    run.hook.state_dict = lambda: {"state": {1, 2}}
    with pytest.raises(HookError, match="state_dict after step 1 gave"):
        run.save(1)
    assert run.policy.pending[0].abandoned and run.folders() == []


def test_an_abandoned_save_leaves_nothing(tmp_path: Path) -> None:
    run = _Run(tmp_path, ASYNC)
    run.checkpoints.abandon()
    run.save(1)
    run.policy.pending[0].writing.set_result(None)
    run.save(2)
    run.checkpoints.abandon()
    run.checkpoints.poll()
    assert run.policy.pending[1].abandoned and not run.policy.pending[0].abandoned
    assert run.folders() == ["step_1"]
