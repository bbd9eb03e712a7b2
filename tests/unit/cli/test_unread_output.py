"""Output that is piped to a program which ends early, as ``| head`` does."""

import os
import subprocess
import sys

import pytest

from megatron_spear.cli import main

EXAMPLES = ("-m", "megatron_spear.cli.main", "examples")
# A command that shows what it does as training does, with a thread that prints and a warning.
SHOWS = (
    "-c",
    """
import logging, time
from megatron_spear.cli import main
from megatron_spear.tracking.progress import Console

def run(arguments):
    with Console(heartbeat_s=0.01) as console, console.bar("games", 1):
        logging.getLogger().addHandler(console.log_handler())
        time.sleep(0.2)
        logging.warning("a warning ends nothing")
        console.phase("Warm start")
    return 0

main.run = run
main.main([])
""",
)


@pytest.mark.parametrize("words", [EXAMPLES, SHOWS])
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_it_ends_with_one_line_and_no_traceback(words: tuple[str, ...], unbuffered: str) -> None:
    nobody_reads, output = os.pipe()
    os.close(nobody_reads)
    try:
        done = subprocess.run(
            [sys.executable, *words],
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
