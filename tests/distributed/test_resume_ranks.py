"""Which checkpoint is taken is known to one rank only; all take the same."""

import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_spear.config.load import load_config
from megatron_spear.errors import CheckpointError, SpearError
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls


class _Policy:
    """Remembers the steps it was asked to load."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save(self, folder: Path) -> None:
        """Nothing to save."""

    def load(self, folder: Path) -> None:
        self.loaded.append(folder.parent.name)


class _Refusing(Hook):
    """Cannot take back what it saved at the steps in ``refused``."""

    def __init__(self, refused: tuple[int, ...]) -> None:
        self.step, self._refused = 0, refused

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Any) -> None:
        if state["step"] in self._refused:
            raise CheckpointError(f"rows of step {state['step']} are damaged")


def _save_and_resume(path: Path, refused: tuple[int, ...]) -> tuple[list[str], int | str]:
    import torch.distributed as dist

    from megatron_spear.trainer.run_checkpoints import Progress, RunCheckpoints
    from megatron_spear.trainer.run_directory import RunDirectory

    dist.init_process_group("gloo")
    policy, hook = _Policy(), _Refusing(refused)
    cursor = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    hooks = HookCalls({"refusing": hook})
    controller = (
        SimpleNamespace(cursor=cursor, hooks=hooks, ahead=None) if dist.get_rank() == 0 else None
    )
    step: Any = SimpleNamespace(policy=policy, controller=controller)
    run = RunCheckpoints(load_config(), step, RunDirectory(path), "ab" if controller else None)
    for number in (1, 2):
        hook.step = number
        run.save(Progress(step=number))
    try:
        found: int | str = run.resume().step
    except CheckpointError as error:
        found = str(error)
    dist.destroy_process_group()
    return policy.loaded, found


def test_both_fall_back_to_the_same(tmp_path: Path) -> None:
    assert run_ranks(_save_and_resume, 2, tmp_path, (2,), timeout_s=60) == [(["step_1"], 1)] * 2
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step_1", "step_2.damaged"]


def test_both_hear_that_none_is_left(tmp_path: Path) -> None:
    for loaded, told in run_ranks(_save_and_resume, 2, tmp_path, (1, 2), timeout_s=60):
        assert loaded == [] and "none of its checkpoints is whole" in str(told)


def _save_with_a_faulty_hook(path: Path, beside: bool = False) -> str:
    import torch.distributed as dist

    from megatron_spear.trainer.run_checkpoints import Progress, RunCheckpoints
    from megatron_spear.trainer.run_directory import RunDirectory

    dist.init_process_group("gloo")
    hook = _Refusing(())
    cursor = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    hooks = HookCalls({"faulty": hook})
    controller = (
        SimpleNamespace(cursor=cursor, hooks=hooks, ahead=None) if dist.get_rank() == 0 else None
    )
    policy = _Beside() if beside else _Policy()
    step: Any = SimpleNamespace(policy=policy, controller=controller)
    config = load_config(None, [f"checkpoint.async_save={str(beside).lower()}"])
    run = RunCheckpoints(config, step, RunDirectory(path), "ab" if controller else None)
    run.save(Progress(step=1))
    if isinstance(policy, _Beside):
        policy.writing.set_result(None)
        run.finish()
    hook.step = 1j  # type: ignore[assignment]
    try:
        run.save(Progress(step=2))
    except SpearError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "saved"


def test_a_hook_at_fault_in_a_save_ends_all_ranks_and_costs_no_checkpoint(tmp_path: Path) -> None:
    told = run_ranks(_save_with_a_faulty_hook, 2, tmp_path, timeout_s=60)
    assert told[0].startswith(
        "hook 'faulty' (_Refusing): state_dict after step 2 gave {'step': 1j}"
    )
    assert "another rank could not write its part" in told[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


class _Beside(_Policy):
    """Saves in the background; rank 1 is the last to write, and may find its disk full."""

    def begin_save(self, folder: Path) -> Any:
        writing: Future[None] = Future()
        self.writing = writing
        return SimpleNamespace(writing=writing, finish=writing.result, abandon=writing.cancel)


def _save_beside(path: Path) -> list[Any]:
    """On each rank: after each poll whether step 1 is committed, then what the fault gave."""
    import torch.distributed as dist

    from megatron_spear.trainer.ranks import all_true
    from megatron_spear.trainer.run_checkpoints import Progress, RunCheckpoints
    from megatron_spear.trainer.run_directory import RunDirectory

    dist.init_process_group("gloo")
    policy, last = _Beside(), dist.get_rank() == 1
    cursor = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    controller = None if last else SimpleNamespace(cursor=cursor, hooks=HookCalls({}), ahead=None)
    step: Any = SimpleNamespace(policy=policy, controller=controller)
    config = load_config(None, ["checkpoint.async_save=true"])
    run = RunCheckpoints(config, step, RunDirectory(path), None if last else "ab")

    def poll() -> bool:
        run.poll()
        return all_true((path / "checkpoints" / "step_1").is_dir())

    run.save(Progress(step=1))
    found: list[Any] = [poll()]
    if not last:
        policy.writing.set_result(None)
    found.append(poll())
    if last:
        policy.writing.set_result(None)
    deadline = time.monotonic() + 30
    while not poll() and time.monotonic() < deadline:
        time.sleep(0.01)
    found.append(poll())
    run.save(Progress(step=2))
    if last:
        policy.writing.set_exception(CheckpointError("disk of rank 1"))
    else:
        policy.writing.set_exception(CheckpointError("heard of rank 1"))
    try:
        run.finish()
    except CheckpointError as error:
        found.append(str(error))
    dist.destroy_process_group()
    return found


def test_a_save_in_the_background_counts_when_all_ranks_have_written(tmp_path: Path) -> None:
    first, second = run_ranks(_save_beside, 2, tmp_path, timeout_s=60)
    assert first == [False, False, True, "heard of rank 1"]
    assert second == [False, False, True, "disk of rank 1"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_a_hook_at_fault_as_a_save_in_the_background_begins_ends_all_ranks(
    tmp_path: Path,
) -> None:
    told = run_ranks(_save_with_a_faulty_hook, 2, tmp_path, True, timeout_s=60)
    assert told[0].startswith("hook 'faulty' (_Refusing): state_dict after step 2 gave")
    assert "another rank could not write its part" in told[1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
