"""The warm start, stopped and made again; games of one file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.deadlines import StopFlag

pytestmark = pytest.mark.timeout(300)

Spear = Callable[..., Any]


class StopsLater(StopFlag):
    """Ctrl-C comes while the program looks for it the third time."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = 0

    def __bool__(self) -> bool:
        self._looks += 1
        if self._looks == 3:
            self.request("SIGINT")
        return super().__bool__()


@pytest.mark.parametrize("name", ["train", "sft"])
def test_the_same_command_again_after_ctrl_c(
    name: str, spear: Spear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    settings = (f"run.dir={tmp_path / 'run'}", f"model.cache_dir={cache}", "sft.steps=4")
    settings = (*settings, "run.steps=1")
    with monkeypatch.context() as stopping:
        stopping.setattr("megatron_spear.deadlines.install_stop_signals", StopsLater)
        done = spear(name, *settings, status=130)
    assert done.err.endswith(
        "stopped: SIGINT in the warm start, of which nothing is kept; give the same command again "
        "to make it from its beginning\n"
    )
    assert [entry.name.split("-")[0] for entry in cache.iterdir()] == ["tiny"]
    spear(name, *settings)
    assert sorted(entry.name[:5] for entry in cache.iterdir()) == ["tiny-", "warm-"]
    assert (tmp_path / "run" / "summary.json").is_file() == (name == "train")


def test_two_runs_may_make_it_at_the_same_time(
    spear: Spear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_spear.policy import cpu

    cpu.install()
    from megatron_spear.trainer import sft

    write, cache = sft.write_hf_folder, tmp_path / "cache"

    def write_late(work: Path, *rest: Any) -> None:
        write(work, *rest)
        target = cache / work.name.removeprefix(".").partition(".")[0]
        shutil.copytree(work, target)
        (target / "first").touch()

    monkeypatch.setattr(sft, "write_hf_folder", write_late)
    spear("sft", f"model.cache_dir={cache}", "sft.steps=2")
    (folder,) = cache.glob("warm-start-*")
    assert (folder / "first").exists(), "the other run's folder stays"
    assert len(list(cache.iterdir())) == 2


def test_ctrl_c_at_once_says_what_to_do(spear: Spear, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_spear.trainer import jobs

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "warm_start", interrupted)
    done = spear("sft", status=130)
    assert done.err == (
        "stopped at once; what came after the last checkpoint is lost. Continue a run that has one "
        "with resume=DIR, else give the same command again\n"
    )


@pytest.fixture
def games(tmp_path: Path) -> Path:
    """Four games in one file."""
    from megatron_spear.config.environments.alfworld import GeneratorSection
    from megatron_spear.envs.alfworld.task import fresh_game

    file = tmp_path / "mine.jsonl"
    made = [fresh_game(7, i, ("pick_and_place_simple",), GeneratorSection()) for i in range(4)]
    file.write_text("".join(json.dumps(game.to_fields()) + "\n" for game in made))
    return file


def test_one_file_of_games(games: Path, spear: Spear, command: Spear, tmp_path: Path) -> None:
    """It is demonstrated and evaluated, but not both trained on and the panel."""
    settings = (f"env.games={games}", f"model.cache_dir={tmp_path / 'cache'}", "sft.steps=2")
    done = spear("train", *settings, f"run.dir={tmp_path / 'run'}", status=2)
    assert f"env.games={games} is one file, which has no splits" in done.err
    assert not (tmp_path / "run").exists()
    spear("sft", *settings)
    (model,) = (tmp_path / "cache").glob("warm-start-*")
    done = command("evaluate", str(model), "--env", "alfworld", "--panel", str(games))
    assert "pick_and_place_simple" in done.out
