"""A user's mistake ends in one message: what, got, expected and what to do; no traceback."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Spear = Callable[..., Any]


def told(done: Any, *words: str) -> str:
    """The message of a refused command, with all ``words`` in it."""
    message: str = done.err
    assert message.startswith("error: "), message
    for word in words:
        assert word in message, message
    assert "Traceback" not in done.out + done.err
    assert len(message.splitlines()) <= 12, message
    return message


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("rollout.group_sise=4",),
            ("rollout.group_sise: no such key", "did you mean rollout.group_size?"),
        ),
        (("rollout.quokka=red",), ("rollout.quokka: no such key", "expected one of engine,")),
        (("group_size=4",), ("group_size: no such key", "did you mean rollout.group_size?")),
        (("rollout.group_size=many",), ("rollout.group_size: got 'many' (text)", "integer")),
        (("run.steps=0",), ("run.steps: got 0", "expected an integer >= 1")),
        (("env.task_types=[pick_two]",), ("env.task_types[0]", "'pick_two'", "pick_two_obj")),
        (
            ("rollout.group_sise=4", "run.steps=0", "policy.precision=fp8"),
            ("3 mistakes", "rollout.group_sise", "run.steps: got 0", "fp8", "fp32"),
        ),
        (
            ("rollout.max_context=8", "rollout.group_size=1"),
            ("these settings cannot work", "rollout.max_new_tokens=10 leaves no room", ">= 2"),
        ),
        (("policy.tensor_parallel=2",), ("world size 1", "start 2 ranks")),
    ],
)
def test_settings(
    settings: tuple[str, ...], words: tuple[str, ...], spear: Spear, run_dir: Path
) -> None:
    told(spear("train", f"run.dir={run_dir}", *settings, status=2), *words)
    assert not run_dir.exists()


def test_check_config_finds_impossible_combinations_too(spear: Spear) -> None:
    told(spear("check-config", "rollout.group_size=1", status=2), "rollout.group_size=1")
    assert "group_size: 4" in spear("check-config").out


@pytest.mark.parametrize(
    ("ranks", "layout", "words"),
    [
        (3, "policy.tensor_parallel=3", ("model.tiny.num_kv_heads=2 is not a multiple", "=3")),
        (4, "policy.pipeline_parallel=4", ("model.tiny.num_layers=2 is not a multiple", "=4")),
        (3, "policy.tensor_parallel=2", ("world size 3 is not a multiple", "2 x 1")),
    ],
)
def test_layouts(
    ranks: int,
    layout: str,
    words: tuple[str, ...],
    spear: Spear,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    told(spear("train", f"run.dir={run_dir}", layout, status=2), *words)


def test_missing_files(command: Callable[..., Any], tmp_path: Path) -> None:
    told(command("train", "absent.yaml", status=2), "absent.yaml: cannot be read", "YAML file")
    told(command("train", f"resume={tmp_path / 'x'}", status=2), "x/config.yaml: cannot be read")
    assert "no YAML file" in command("train", status=2).err
    (tmp_path / "broken.yaml").write_text("run: {steps: 3\nenv: [")
    told(command("train", str(tmp_path / "broken.yaml"), status=2), "broken.yaml line 2", "YAML")


# Models


@pytest.fixture
def model(cache: Path, tmp_path: Path) -> Path:
    """The tiny model once more, in two or more shards with an index."""
    from transformers import AutoModelForCausalLM

    (tiny,) = cache.glob("tiny-*")
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize("warm", [True, False])
def test_a_missing_shard(warm: bool, model: Path, spear: Spear, run_dir: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    shard.unlink()
    settings = (f"run.dir={run_dir}", f"model.path={model}", f"sft.enabled={warm}".lower())
    told(spear("train", *settings, status=2), shard.name, "copy or download")


@pytest.mark.parametrize("warm", [True, False])
def test_a_truncated_shard(warm: bool, model: Path, spear: Spear, run_dir: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    settings = (f"run.dir={run_dir}", f"model.path={model}", f"sft.enabled={warm}".lower())
    told(spear("train", *settings, status=2), shard.name, "truncated", "bytes")


def test_a_corrected_launch_may_follow(spear: Spear, run_dir: Path, tmp_path: Path) -> None:
    """A launch that failed before its first record leaves no run directory in the way."""
    done = spear("train", f"run.dir={run_dir}", f"model.path={tmp_path / 'absent'}", status=2)
    told(done, "absent")
    assert not run_dir.exists()
    spear("train", f"run.dir={run_dir}", "run.steps=1")


def test_a_tokenizer_of_a_larger_model(model: Path, spear: Spear, run_dir: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    size = config["vocab_size"]
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": size - 5}))
    done = spear("train", f"run.dir={run_dir}", f"model.path={model}", status=2)
    told(done, str(model), f"ids up to {size - 1}", f"vocab_size {size - 5}")


def test_a_folder_that_is_no_model(
    spear: Spear, command: Spear, run_dir: Path, tmp_path: Path
) -> None:
    done = spear("train", f"run.dir={run_dir}", f"model.path={tmp_path / 'absent'}", status=2)
    told(done, "absent", "config.json", "Hugging Face")
    done = command("evaluate", str(tmp_path), "--env", "alfworld", status=2)
    told(done, str(tmp_path), "config.json", "Hugging Face")


# Games


def test_missing_or_empty_games(spear: Spear, run_dir: Path, tmp_path: Path) -> None:
    games = tmp_path / "games"
    settings = (f"run.dir={run_dir}", f"env.games={games}")
    told(spear("train", *settings, status=2), "games: no such file or folder", "alfworld-download")
    games.mkdir()
    told(spear("train", *settings, status=2), "games: no split 'valid_seen'", "alfworld-download")


@pytest.mark.parametrize("command_name", ["train", "sft"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("not JSON", ("train.jsonl, row 2", "not JSON")),
        ("no goal", ("train.jsonl, row 2", "goal")),
        ("unsolvable", ("train.jsonl, row 2", "unsolvable", "skip_unsolvable")),
    ],
)
def test_bad_games(
    command_name: str,
    damage: str,
    words: tuple[str, ...],
    spear: Spear,
    run_dir: Path,
    tmp_path: Path,
) -> None:
    folder = _games(tmp_path / "games")
    first, second, *rest = (folder / "train.jsonl").read_text().splitlines()
    if damage == "not JSON":
        second = second[:100]
    elif damage == "no goal":
        second = second.replace("(:goal", "(:gaol")
    else:
        second = second.replace('"solvable": true', '"solvable": false')
    (folder / "train.jsonl").write_text("\n".join([first, second, *rest]) + "\n")
    settings = (f"run.dir={run_dir}", f"env.games={folder}", "sft.steps=2")
    told(spear(command_name, *settings, status=2), *words)


def test_too_few_games_for_the_panel(spear: Spear, run_dir: Path, tmp_path: Path) -> None:
    """Found before the warm start."""
    settings = (f"run.dir={run_dir}", f"env.games={_games(tmp_path / 'games')}")
    done = spear("train", *settings, "evaluation.games=64", status=2)
    told(done, "evaluation.games: got 64", "only 4", "lower evaluation.games")
    assert "Warm start" not in done.out


def _games(folder: Path) -> Path:
    """Four generated games, packed, as both splits."""
    from megatron_spear.config.environments.alfworld import GeneratorSection
    from megatron_spear.envs.alfworld.task import fresh_game

    games = [fresh_game(7, i, ("pick_and_place_simple",), GeneratorSection()) for i in range(4)]
    folder.mkdir()
    for split in ("train", "valid_seen"):
        lines = [json.dumps(game.to_fields()) + "\n" for game in games]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


# Run directories


@pytest.fixture(scope="module")
def stopped(spear: Spear, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    spear("train", f"run.dir={run_dir}", "run.steps=2", "run.stop_after=1")
    return run_dir


def test_a_run_directory_of_another_run(stopped: Path, spear: Spear) -> None:
    done = spear("train", f"run.dir={stopped}", "run.steps=2", "rollout.group_size=8", status=2)
    told(done, "rollout.group_size: was 4, now 8", "another run.dir", f"resume={stopped}")
    done = spear("train", f"run.dir={stopped}", "run.steps=2", status=2)
    told(done, "with checkpoints", f"resume={stopped}", "another run.dir")
    done = spear("train", f"resume={stopped}", "run.steps=1", status=2)
    told(done, "run.steps: was 2, now 1", "without resume")


def test_resume_of_what_is_no_run(spear: Spear, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    told(
        spear("train", f"resume={tmp_path}", status=2), "no run directory", "run.dir of an earlier"
    )
    done = spear("train", f"run.dir={tmp_path}", status=2)
    told(done, "is not empty and no run directory", "thesis.tex", "another run.dir")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_only_checkpoint_is_damaged(stopped: Path, spear: Spear, run_dir: Path) -> None:
    shutil.copytree(stopped, run_dir)
    step = run_dir / "checkpoints" / "step_1"
    file = max(step.rglob("*.distcp"), key=lambda f: f.stat().st_size)
    os.truncate(file, 100)
    done = spear("train", f"resume={run_dir}", "run.steps=2", status=2)
    told(done, f"resume={run_dir}", "none of its checkpoints is whole", "restore one")
    assert f"{file.name} has 100 bytes" in done.out
    assert step.is_dir()


def test_a_run_directory_that_cannot_be(spear: Spear) -> None:
    told(spear("train", "run.dir=/dev/null/run", status=2), "/dev/null/run", "Not a directory")


# Full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "spear-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("free", [0, 200_000])
def test_a_full_disk_costs_no_checkpoint(free: int, small_disk: Path, spear: Spear) -> None:
    """With 200 kB free the checkpoint of step 2 does not fit; with none not even replay rows."""
    run_dir = small_disk / "run"
    settings = ("run.steps=2", "checkpoint.every=1")
    spear("train", f"run.dir={run_dir}", *settings, "run.stop_after=1")
    before = {p: p.read_bytes() for p in (run_dir / "checkpoints").rglob("*") if p.is_file()}
    filler = small_disk / "filler"
    _fill(filler, free)

    done = spear("train", f"resume={run_dir}", *settings, status=2)
    message = told(done, "the disk is full", "free some space", "resume")
    if free:
        assert "checkpoint of step 2 was not written" in message
        assert f"are free in {run_dir / 'checkpoints'}" in message
    after = {p: p.read_bytes() for p in (run_dir / "checkpoints").rglob("*") if p.is_file()}
    assert after == before

    filler.unlink()
    done = spear("train", f"resume={run_dir}", *settings)
    assert "continuing after step 1 of 2" in done.out
    assert (run_dir / "summary.json").is_file()


def test_a_full_disk_at_the_export(small_disk: Path, spear: Spear) -> None:
    """The earlier export stays whole; with some space the run is finished."""
    run_dir, filler = small_disk / "run", small_disk / "filler"
    settings = (f"run.dir={run_dir}", "run.steps=1")
    spear("train", *settings)
    before = _contents(run_dir / "model")
    _fill(filler, 60_000)  # enough for what a launch writes before

    done = spear("train", f"resume={run_dir}", "run.steps=1", status=2)
    told(done, f"{run_dir / 'model'} was not written", "the disk is full", "Free some space")
    assert [p.name for p in run_dir.glob(".model*")] == [] and not (run_dir / "model").exists()
    (kept,) = run_dir.glob("model.before-*")
    assert _contents(kept) == before

    filler.unlink()
    spear("train", f"resume={run_dir}", "run.steps=1")
    assert _contents(run_dir / "model") == before


@pytest.mark.parametrize("what", ["tiny", "warm-start"])
def test_a_full_disk_in_the_cache(what: str, cache: Path, small_disk: Path, spear: Spear) -> None:
    """A model is there whole or not at all, whichever library writes it."""
    folder, filler = small_disk / "cache", small_disk / "filler"
    folder.mkdir()
    if what == "warm-start":
        (tiny,) = cache.glob("tiny-*")
        shutil.copytree(tiny, folder / tiny.name)
    before = _contents(folder)
    _fill(filler, 60_000)
    settings = (f"model.cache_dir={folder}", "sft.steps=2")
    done = spear("sft", *settings, status=2)
    message = done.err[done.err.index("error: ") :]  # behind transformers' own progress bar
    assert "the disk is full" in message and "Free some space" in message
    assert str(folder) in message and what in message and "Traceback" not in done.err
    assert _contents(folder) == before
    assert [p.name.split("-")[0] for p in folder.iterdir()] == ["tiny"] * bool(before)

    filler.unlink()
    spear("sft", *settings)
    assert {p.name.split("-")[0] for p in folder.iterdir()} == {"tiny", "warm"}


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _fill(file: Path, free: int) -> None:
    """Write until the disk is full, then give ``free`` bytes back."""
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"\0" * 4096) == 4096:
            pass
    os.truncate(file, file.stat().st_size - free)
