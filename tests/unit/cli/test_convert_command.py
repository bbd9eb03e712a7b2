"""``megatron-spear convert`` as a user gives it: what it says, and its exit status."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_spear.cli.main import main
from megatron_spear.testing.tiny import tiny_hf_folder


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, words)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_hf_folder(tmp_path / "hf")
    return tmp_path / "hf"


def test_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back, fp8 = (tmp_path / name for name in ("there", "back", "fp8"))
    assert run("hf-to-megatron", folder, there, "--tensor-parallel", 2) == 0
    assert run("megatron-to-hf", there, back) == 0
    assert run("megatron-to-hf", there, fp8, "--dtype", "fp8-block") == 0
    capsys.readouterr()
    assert run("verify", folder, back) == 0
    assert capsys.readouterr().out == "verify: 25 of 25 tensors equal\n"
    assert run("verify", there, fp8) == 0
    assert capsys.readouterr().out == (
        "verify: 25 of 25 tensors equal, 11 after rounding to the coarser dtype, 14 within FP8 "
        "rounding\n"
    )


def test_differences_are_exit_status_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("hf-to-megatron", folder, tmp_path / "there")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + torch.ones(64)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run("verify", folder, tmp_path / "there") == 1
    told = capsys.readouterr().out
    assert "model.norm.weight: 64 of 64 values differ, by up to 1" in told
    assert "verify: 24 of 25 tensors equal" in told


def test_mistakes_are_one_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hf-to-megatron", folder, tmp_path / "there", "--tensor-parallel", 3) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: this layout cannot work:") and "Traceback" not in told
    assert run("hf-to-megatron", folder, tmp_path / "there", "--tensor-parallel", 0) == 2
    assert "got 0, expected 1 or more" in capsys.readouterr().err
    assert run("hf-to-megatron", folder) == 2
    assert "the following arguments are required: DST" in capsys.readouterr().err
    assert run("megatron-to-hf", folder, tmp_path / "back") == 2
    assert "expected a torch_dist checkpoint" in capsys.readouterr().err


SLOW = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from megatron_spear.cli.main import main
from megatron_spear.conversion import convert
write = convert._write_distcp
def slowly(*args):
    print("writing", flush=True)
    time.sleep(30)
convert._write_distcp = slowly
main(["convert", "hf-to-megatron", {source!r}, {target!r}])
"""


def test_ctrl_c_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    script = SLOW.format(source=str(folder), target=str(tmp_path / "there"))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: the same command goes on with what is not finished yet" in told
    assert "Traceback" not in told
    assert run("hf-to-megatron", folder, tmp_path / "there") == 0
