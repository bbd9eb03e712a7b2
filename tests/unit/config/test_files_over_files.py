"""Files over files: what a file names as its base, and several on a command line."""

from pathlib import Path

import pytest

from megatron_spear.config.layers import split_files
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        place = folder / f"{name.replace('__', '/')}.yaml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as told:
        load_config(path, overrides)
    return str(told.value)


def test_a_file_comes_over_its_bases_in_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        task="run: {steps: 5, seed: 1}\nreplay: {capacity: 7}\n",
        method__own="base: [../task.yaml, other.yaml]\nrun: {steps: 7}\n",
        method__other="run: {steps: 6, name: other}\n",
    )
    config = load_config(tmp_path / "method/own.yaml")
    assert (config.run.steps, config.run.seed, config.run.name) == (7, 1, "other")
    assert config.replay.capacity == 7


def test_bases_have_bases_and_a_choice_replaces_another(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="algorithm: {loss: {type: clipped, clip_high: 0.3}}\n",
        b="base: a.yaml\nalgorithm: {loss: {type: clip_cov, fraction: 0.1}}\n",
        c="base: b.yaml\nalgorithm: {loss: {clip_high: 0.2}}\n",
    )
    loss = load_config(tmp_path / "c.yaml").algorithm.loss
    assert (loss.type, loss.fraction, loss.clip_high) == ("clip_cov", 0.1, 0.2)
    assert load_config(tmp_path / "b.yaml").algorithm.loss.clip_high == 0.28


def test_further_files_come_over_the_first_and_under_overrides(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="run: {steps: 1, seed: 1, name: a}\n",
        b="run: {steps: 2, seed: 2}\n",
        c="preset: qwen2.5-7b-8gpus\nrun: {steps: 3}\npolicy: {tensor_parallel: 1}\n",
    )
    files = [str(tmp_path / name) for name in ("b.yaml", "c.yaml")]
    config = load_config(tmp_path / "a.yaml", ["run.steps=4", *files])
    assert (config.run.steps, config.run.seed, config.run.name) == (4, 2, "a")
    assert (config.policy.tensor_parallel, config.policy.precision) == (1, "bf16")


def test_which_words_are_files() -> None:
    words = ["--env.games", "games.yaml", "b.yml", "run.name=x.yaml", "--run.seed=3", "c.yaml", "d"]
    files, rest = split_files(words)
    assert files == [Path("b.yml"), Path("c.yaml")]
    assert rest == ["--env.games", "games.yaml", "run.name=x.yaml", "--run.seed=3", "d"]


def test_mistakes_of_bases_are_told_with_the_others(tmp_path: Path) -> None:
    write(
        tmp_path,
        own="base: [one.yaml, gone.yaml]\nrun: {seed: x}\n",
        one="base: {a: 1}\nrun:\n  steps: 0\n",
    )
    told = mistakes(tmp_path / "own.yaml", "further.yaml")
    for part in (
        "gone.yaml: cannot be read",
        "further.yaml: cannot be read",
        "base: got {'a': 1}, expected a YAML file or a list of them",
        "(one.yaml line 1)",
        "run.steps: got 0 (integer), expected an integer >= 1 (one.yaml line 3)",
        "run.seed: got 'x'",
    ):
        assert part in told, part


def test_a_circle_is_told(tmp_path: Path) -> None:
    write(tmp_path, a="base: b.yaml\n", b="base: a.yaml\n")
    assert "circle: a.yaml -> b.yaml -> a.yaml" in mistakes(tmp_path / "a.yaml")


def test_base_is_no_setting_of_a_command_line(tmp_path: Path) -> None:
    write(tmp_path, a="run: {steps: 1}\n")
    assert "base: no such key" in mistakes(tmp_path / "a.yaml", "base=b.yaml")
