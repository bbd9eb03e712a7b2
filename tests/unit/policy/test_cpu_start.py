"""What a process that trains on the CPU imports, and what it is left with."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

PROGRAM = """
import sys
import torch
compiler = torch.compile
import megatron_spear.policy.policy
print("compiler" if "torch._inductor.compile_fx" in sys.modules else "no compiler")
print("wandb" if "wandb" in sys.modules else "no wandb")
from megatron.core.activations import squared_relu
assert squared_relu(torch.tensor(3.0)) == 9.0
print("compiler" if "torch._inductor.compile_fx" in sys.modules else "no compiler")
assert torch.compile is compiler
import wandb
assert wandb.init
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA: megatron is as it comes")
def test_the_policy_starts_without_compiler_and_wandb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["no compiler", "no wandb", "no compiler"]
