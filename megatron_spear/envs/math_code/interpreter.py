"""Python as a tool: the code of a call made ready to run, and what came of it as a text."""

import re

from megatron_spear.envs.sandbox.execution import Execution
from megatron_spear.envs.tools.tool import ToolFailure

NO_OUTPUT = "(no output; print what you want to see)"
_ENDS = {
    "error": "the program ended with another exit status than 0",
    "timeout": "the program took too long and was stopped",
    "memory": "the program wanted more memory than it may have",
    "killed": "the program was killed",
    "unavailable": "the program was not run",
}
_FENCE = re.compile(r"```[ \t]*(?:[Pp]ython3?|py)?[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def unfenced(code: str) -> str:
    """The code within the first Markdown fence, or all of it where there is none.

    Example: ``"```python\\nprint(1)\\n```"`` gives ``"print(1)"``.
    """
    found = _FENCE.search(code)
    return found[1] if found else code


def output_text(ran: Execution, stderr_lines: int) -> str:
    """What the model reads of a run: what was printed, and after a failure why.

    The released tool shows stdout alone; here the last ``stderr_lines`` lines of stderr follow it
    when the program failed. Raises `ToolFailure` with the same text for a failed run.

    Example: ``print(2)`` and then ``1 / 0`` give ``"2\\nZeroDivisionError: division by zero"`` at
    one line.
    """
    printed = ran.stdout.rstrip()
    if ran.status == "ok":
        return printed or NO_OUTPUT
    told = [line.rstrip() for line in ran.stderr.rstrip().splitlines()][-stderr_lines:]
    if not told:
        told.append(f"error: {_ENDS.get(ran.status, ran.status)}")
    raise ToolFailure("\n".join([printed, *told] if printed else told))
