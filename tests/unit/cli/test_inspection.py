"""What `inspect` takes, and what it says of words that it does not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.cli import main
from megatron_spear.config.schema import RunConfig
from megatron_spear.deadlines import StopFlag
from megatron_spear.errors import CheckpointError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path, dict[str, Any]]]:
    """What `inspect logprobs` calls the job with; it finds everything normal but for --top 9."""
    from megatron_spear.trainer import jobs

    calls: list[tuple[RunConfig, Path, dict[str, Any]]] = []

    def compare(config: RunConfig, model: Path, stop: Any, **options: Any) -> bool:
        calls.append((config, model, options))
        return bool(options["top"] != 9)

    monkeypatch.setattr(jobs, "compare_logprobs", compare)
    monkeypatch.setattr("megatron_spear.deadlines.install_stop_signals", StopFlag)
    return calls


def test_a_model_alone_answers_drawn_tokens(compared: list[Any], tmp_path: Path) -> None:
    assert main.run(["inspect", "logprobs", str(tmp_path), "-n", "3", "--run.threads", "1"]) == 0
    ((config, model, options),) = compared
    assert (model, options) == (tmp_path, {"num_drawn": 3, "top": 5})
    assert config.run.threads == 1


@pytest.mark.parametrize("words", [("--env", "webshop"), ("env.type=webshop",)])
def test_with_an_environment_its_panel_is_played(
    words: tuple[str, ...], compared: list[Any], tmp_path: Path
) -> None:
    assert main.run(["inspect", "logprobs", str(tmp_path), *words, "-n", "4", "--top", "9"]) == 1
    ((config, _, options),) = compared
    assert options == {"num_drawn": None, "top": 9}
    assert (config.env.type, config.evaluation.games) == ("webshop", 4)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    for words in (["replay", "absent"], ["diff", "absent", "absent"], ["logprobs", "absent"]):
        with pytest.raises(CheckpointError, match="absent: no such folder"):
            main.run(["inspect", *words])
    (tmp_path / "config.yaml").write_text("run: {steps: 3}\n")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        main.run(["inspect", "diff", str(tmp_path), str(tmp_path)])


@pytest.mark.parametrize("words", [[], ["nothing"], ["replay"], ["plot", "x", "--smooth", "0"]])
def test_wrong_words_show_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.run(["inspect", *words])
    assert "usage: megatron-spear inspect" in capsys.readouterr().err


def test_output_that_nobody_reads_ends_as_that_of_any_command(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    line = [sys.executable, "-m", "megatron_spear.cli.main", "inspect", "plot", ".", "--list"]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        told = "stopped: nobody reads the output any more\n"
        assert (process.wait(120), process.stderr.read()) == (141, told)


def test_the_module_hides_none_of_pythons(tmp_path: Path) -> None:
    """The file can be run by its path, which puts its folder before everything else."""
    done = subprocess.run(
        [sys.executable, ROOT / "megatron_spear" / "cli" / "main.py", "--version"],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("megatron-spear "), done.stderr
