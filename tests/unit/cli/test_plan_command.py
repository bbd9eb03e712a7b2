"""``megatron-spear plan``: arguments, exit status, and how long it takes."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_spear.cli import main, plan
from megatron_spear.errors import CheckpointError, ConfigError

QUICKSTART = str(Path(__file__).parents[3] / "examples" / "alfworld" / "quickstart.yaml")
SERVERS = ("rollout.engine=sglang", "cluster.engine_nodes=32", "cluster.servers.count=64",
           "cluster.servers.tensor_parallel=4")  # fmt: skip


def values(
    capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0
) -> dict[str, object]:
    assert plan.run([*arguments, "--json"]) == status
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_file_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", QUICKSTART, "--rollout.max_context", "600"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny model, 1.0 M parameters; 1 x CPU ranks\n")
    assert "mean context length 300 tokens is assumed" in text


def test_a_published_model_on_so_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, "--model", "qwen2.5-7b", "--gpus", "32", "--chip", "h200",
                   "preset=qwen2.5-7b-32gpus", "--mean-length", "200")  # fmt: skip
    assert (found["model"], found["chip"]) == ("qwen2.5-7b", "h200")
    assert found["gpus"] == {"total": 32, "train": 32, "generate": 1}
    assert not any("is assumed" in str(line) for line in found["warnings"])  # type: ignore[union-attr]


def test_gpus_are_whole_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    few = values(capsys, "--model=qwen2.5-1.5b", "--gpus=2", "policy.precision=bf16")
    assert few["gpus"] == {"total": 2, "train": 2, "generate": 1}
    four = values(capsys, "--model=qwen2.5-1.5b", "--gpus=8", "--chip=gb200")
    assert four["gpus"] == {"total": 8, "train": 8, "generate": 1}
    with pytest.raises(ConfigError, match="--gpus 12 are no whole nodes of 8"):
        plan.run(["--model=qwen2.5-1.5b", "--gpus=12"])
    with pytest.raises(ConfigError, match="at least 16"):
        plan.run(["--gpus=8", *SERVERS[:1], "cluster.engine_nodes=1"])


def test_what_cannot_fit_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model=qwen2.5-32b", "--gpus=8", "preset=qwen2.5-32b-16gpus")
    found = values(capsys, *arguments, status=1)
    assert "short by" in str(found["refusals"])
    assert values(capsys, *arguments, "policy.optimizer_offload=1.0")["refusals"] == []


@pytest.mark.parametrize("arguments", [("--gpus=0",), ("--gpus=many",), ("--mean-length=0",)])
def test_numbers_are_positive(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        plan.run(arguments)


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="published models: qwen"):
        plan.run(["--model=none-of-them"])
    with pytest.raises(CheckpointError, match="expected a Hugging Face model folder"):
        plan.run([f"model.path={tmp_path}"])
    with pytest.raises(ConfigError, match=r"cluster\.chip"):
        plan.run(["--chip=tpu"])


def test_70b_on_1024_gpus_takes_under_two_seconds_with_the_process() -> None:
    """And imports no torch, which alone would take that long."""
    arguments = ["plan", "--model", "llama-3.1-70b", "--gpus", "1024", "--json", *SERVERS,
                 "preset=llama-3.1-70b-512gpus", "rollout.max_context=16384",
                 "rollout.max_new_tokens=8192"]  # fmt: skip
    code = (
        "import sys; from megatron_spear.cli import main; "
        f"assert main.run({arguments!r}) == 0; assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()
    # seconds of this process's own work, whatever else the machine does
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    assert json.loads(done.stdout)["gpus"]["total"] == 1024
