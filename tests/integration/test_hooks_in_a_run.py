"""A user's hooks in a real run: from a file, over a stop, with the fault told when they fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Spear = Callable[..., Any]
Records = Callable[[Path], dict[int, dict[str, Any]]]

SETTINGS = (
    "policy.optimizer.lr=0.002",
    "algorithm.keep_groups_fraction=1.0",
    "checkpoint.every=1",
    "checkpoint.keep=4",
)

DRIFT = '''
from dataclasses import replace
from pathlib import Path

from megatron_spear.replay.state import require_keys
from megatron_spear.trainer.hooks.base import Hook


class Drift(Hook):
    """Pays the first attempt of each group more and more, as long as no file is called "broken"."""

    class Settings(Hook.Settings):
        rise: float

    def __init__(self, settings):
        self.rise, self.seen = settings.rise, 0

    def on_scored(self, ctx, groups):
        self.seen += 1
        return tuple(self.paid(group) for group in groups)

    def paid(self, group):
        first, *others = group.members
        outcome = first.reward.outcome + self.rise * self.seen
        first = replace(first, reward=replace(first.reward, outcome=outcome))
        return replace(group, members=(first, *others))

    def metrics(self):
        return {"drift/seen": float(self.seen)}

    def on_step_end(self, ctx, report):
        if ctx.step == 2 and Path("broken").exists():
            raise LookupError("no table for this step")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        require_keys(state, ("seen",), "Drift")
        self.seen = state["seen"]
'''


@pytest.fixture
def drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The setting that switches the hook on; its file is in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drift.py").write_text(DRIFT)
    return _setting([{"name": "drift", "path": "./drift.py:Drift", "settings": {"rise": 0.25}}])


def _setting(entries: list[dict[str, Any]]) -> str:
    return f"hooks={json.dumps(entries)}"


def _told(done: Any, *words: str) -> None:
    assert done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    for word in words:
        assert word in done.err, done.err


def test_resumed_with_a_users_hook_is_not_stopped(
    drift: str,
    spear: Spear,
    tmp_path: Path,
    training_records: Records,
    same_run: Callable[[Path, Path], None],
) -> None:
    """A fault in step 2 is the stop: it costs that step, and the message says whose it was."""
    settings = ("run.steps=3", *SETTINGS, drift)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    spear("train", f"run.dir={whole}", *settings)
    records = training_records(whole)
    assert [record["drift/seen"] for record in records.values()] == [1.0, 2.0, 3.0]
    p50 = [record["replay/p50"] for record in records.values()]
    # Replay's baseline knows the hook's rewards: without them it stays near 0 here. Of four members
    # one gets 0.25 times the step.
    assert p50[0] > 0.25 / 4 and p50[0] < p50[1] < p50[2]

    (tmp_path / "broken").touch()
    done = spear("train", f"run.dir={stopped}", *settings, status=2)
    _told(
        done,
        "hook 'drift' (Drift): on_step_end in step 2 raised LookupError: no table for this step",
        "(drift.py:",
        "What was saved is untouched",
        "resume=DIR",
    )
    assert "Traceback" in done.out and 'raise LookupError("no table' in done.out
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["step_1"]
    assert not (stopped / "summary.json").exists()

    (tmp_path / "broken").unlink()
    done = spear("train", f"resume={stopped}", *settings)
    assert "continuing after step 1 of 3" in done.out
    same_run(whole, stopped)

    for other in ("hooks=[]", drift.replace("0.25", "0.5"), drift.replace('"drift"', '"dirft"')):
        done = spear("train", f"resume={stopped}", *settings, other, status=2)
        _told(done, "started with other settings", "hooks: was [{'name': 'drift'", "now [")


def test_the_page_on_hooks(
    documented_hook: Any,
    spear: Spear,
    tmp_path: Path,
    training_records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example, two steps long, with the settings that the page says."""
    monkeypatch.chdir(documented_hook.folder)
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", "run.steps=2", _setting(documented_hook.entries))
    for record in training_records(run_dir).values():
        shares = [v for name, v in record.items() if name.startswith("rare_types/success_")]
        assert shares and all(0.0 <= share <= 1.0 for share in shares)
        assert record["rare_types/num_bonuses"] >= 0.0
    (file,) = (run_dir / "checkpoints").glob("step_*/trainer.json")
    states = json.loads(file.read_text())["hooks"]
    assert set(states) == {"rare_types", "built_in.self_imitation"}
    assert sum(states["rare_types"]["played"].values()) == 16.0


@pytest.mark.parametrize("command_name", ["train", "check-config"])
def test_a_hook_that_cannot_be_made_ends_it_at_the_start(
    command_name: str, drift: str, spear: Spear, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    entries = [
        {"name": "a", "path": "absent.py:Hook"},
        {"name": "b", "path": "drift.py:Drift", "settings": {"rise": "fast"}},
    ]
    done = spear(command_name, f"run.dir={run_dir}", _setting(entries), status=2)
    _told(
        done,
        "these hooks cannot be used (docs/hooks.md)",
        "hooks[0].path: absent.py:Hook: there is no file absent.py",
        "hooks[1].settings.rise: got 'fast' (text), expected a number",
    )
    assert "Initial model" not in done.out and not run_dir.exists()


def test_an_evaluation_and_a_warm_start_leave_hooks_alone(spear: Spear) -> None:
    """They have no steps; the warm start is in the cache."""
    entries = [{"name": "a", "path": "absent.py:Hook"}]
    assert "warm start:" in spear("sft", _setting(entries)).out
