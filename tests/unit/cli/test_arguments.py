"""From a command line to a configuration: where the YAML file is, and runs that need none."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.cli import main
from megatron_spear.config.load import dump_config, load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.deadlines import StopFlag


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """``trained("a.yaml", "run.seed=1")``: the configuration that ``train`` is called with."""
    from megatron_spear.trainer import jobs

    configs: list[RunConfig] = []

    def take(config: RunConfig, stop: Any, attempt: Any) -> None:
        assert attempt is None
        configs.append(config)

    monkeypatch.setattr(jobs, "train", take)
    monkeypatch.setattr("megatron_spear.deadlines.install_stop_signals", StopFlag)

    def run(*arguments: str) -> RunConfig:
        assert main.run(["train", *arguments]) == 0
        return configs[-1]

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory, as far as its settings go."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config(None, ["run.seed=5", f"run.dir={folder}"])
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.mark.parametrize("form", ["resume={}", "--resume={}", "--resume {}"])
@pytest.mark.parametrize("more", [(), ("--run.stop_after", "3"), ("run.stop_after=3",)])
def test_resume_needs_no_file(
    form: str, more: tuple[str, ...], trained: Callable[..., RunConfig], run_dir: Path
) -> None:
    resume = [part.format(run_dir) for part in form.split(" ")]
    for arguments in ([*resume, *more], [*more, *resume]):
        config = trained(*arguments)
        assert (config.resume, config.run.dir, config.run.seed) == (run_dir, run_dir, 5)
        assert config.run.stop_after == (3 if more else None)


@pytest.mark.parametrize("before", [True, False])
def test_the_file_is_the_one_word_that_is_no_setting(
    before: bool, trained: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / "a=b.yaml"
    file.write_text("run: {steps: 7}\n")
    settings = ["--run.seed", "3", "run.stop_after=2", "--run.name=x"]
    config = trained(*([str(file), *settings] if before else [*settings, str(file)]))
    assert (config.run.steps, config.run.seed) == (7, 3)
    assert (config.run.stop_after, config.run.name) == (2, "x")


def test_further_files_come_over_the_first(
    trained: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for name, text in (("a", "{steps: 7, seed: 1}"), ("b", "{seed: 2}"), ("c=d", "{name: c}")):
        (tmp_path / f"{name}.yaml").write_text(f"run: {text}\n")
    first, *further = (str(tmp_path / f"{name}.yaml") for name in ("a", "b", "c=d"))
    for words in ([first, *further, "run.steps=8"], ["--run.steps", "8", first, *further]):
        config = trained(*words)
        assert (config.run.steps, config.run.seed, config.run.name) == (8, 2, "c")


def test_a_rank_of_a_launch_knows_its_attempt_and_ends_with_torchrun(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.trainer import jobs

    called: list[Any] = []
    monkeypatch.setattr(jobs, "train", lambda config, stop, attempt: called.append(attempt))
    monkeypatch.setattr("megatron_spear.deadlines.install_stop_signals", StopFlag)
    monkeypatch.setattr(
        "megatron_spear.cluster.processes.end_with_parent", lambda: called.append("with parent")
    )
    attempt = run_dir / "attempt_2"
    assert main.run(["train", f"resume={run_dir}", "--attempt", str(attempt)]) == 0
    assert called == ["with parent", Attempt(attempt)]


def test_no_file_and_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train"], ["train", "run.seed=1"], ["train", "--run.name", "resume=no"]):
        with pytest.raises(SystemExit, match="2"):
            main.run(arguments)
        assert "train: no YAML file, and no --resume DIR" in capsys.readouterr().err


def test_help_still_helps(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["evaluate", "--help", "x.yaml"]):
        with pytest.raises(SystemExit, match="0"):
            main.run(arguments)
    told = capsys.readouterr().out
    assert "train --resume DIR" in " ".join(told.split()) and "--panel PATH" in told


@pytest.mark.parametrize(
    ("own", "settings", "value"),
    [
        (None, ("policy.tensor_parallel=2",), "1"),
        (None, ("policy.context_parallel=2",), "1"),
        (None, ("policy.pipeline_parallel=2",), None),
        ("8", ("policy.tensor_parallel=2",), "8"),
    ],
)
def test_kernels_of_a_rank_start_in_order_where_they_overlap_with_messages(
    own: str | None,
    settings: tuple[str, ...],
    value: str | None,
    trained: Callable[..., RunConfig],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever starts it; what the user has set stays."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    trained(str(run_dir / "config.yaml"), *settings)
    assert os.environ.get(name) == value
