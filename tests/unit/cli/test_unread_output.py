"""Output that is piped to a program which ends early, as ``| head`` does."""

import os
import subprocess
import sys

import pytest

from megatron_spear.cli import main


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_it_ends_with_one_line_and_no_traceback(unbuffered: str) -> None:
    nobody_reads, output = os.pipe()
    os.close(nobody_reads)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_spear.cli.main", "examples"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=120,
        )
    finally:
        os.close(output)
    assert done.stderr == "stopped: nobody reads the output any more\n"
    assert done.returncode == 141


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(main, "run", run)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main.main(["examples"])
