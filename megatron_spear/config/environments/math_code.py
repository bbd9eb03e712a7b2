"""Settings of math with a code interpreter."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from megatron_spear.config.base import Fraction, PositiveFloat, PositiveInt, Section
from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.config.environments.sandbox import SandboxSection
from megatron_spear.errors import ConfigError

ArithmeticKind = Literal["sum", "product", "mixed", "remainder", "range"]

GRADER_CLOCK_FACTOR = 6.0
"""What ``grader_limit_s`` may take by the clock, on a busy machine."""
SANDBOX_GRACE_S = 10.0
"""How late a sandbox's answer may be before it counts as broken (`envs.sandbox.local.GRACE_S`)."""
SANDBOX_QUEUE_S = 60.0
"""How long a program may wait for a SandboxFusion server (`envs.sandbox.fusion.QUEUE_S`)."""


class ArithmeticSection(Section):
    """Generated problems."""

    kinds: tuple[ArithmeticKind, ...] = ("sum", "product", "mixed", "remainder", "range")
    """What they ask for."""
    largest: Annotated[int, Field(ge=9, le=1_000_000)] = 99
    """Largest number in them; the dividend of a remainder goes up to its square."""
    guesses: Fraction = 0.0
    """Share of demonstrations made of them that guess a digit instead of calling, as models do that
    have not learned to trust a tool; it is for RL to find out what pays."""


class MathCodeSection(EnvironmentSection):
    """Math problems with a Python interpreter as a tool."""

    type: Literal["math_code"] = "math_code"
    """Which environment."""
    problems: tuple[Path, ...] | None = None
    """Files to train on, ``.jsonl`` or ``.parquet`` (docs/math.md), or folders of them; each file's
    name is the kind of its problems. Those that the panel's files have too are left out. None =
    problems are generated fresh for every step."""
    eval_problems: tuple[Path, ...] | None = None
    """Files or folders of the panel; None = generated problems, which are never trained on."""
    demonstrations: tuple[Path, ...] | None = None
    """Files or folders of recorded conversations with the tool that the warm start learns, in an
    order of its own each epoch (docs/math.md); None = generated problems are solved for it."""
    arithmetic: ArithmeticSection = ArithmeticSection()
    """Generated problems; read where ``problems`` or ``eval_problems`` is None."""
    prompt: Literal["compact", "official"] = "compact"
    """``compact``: the problem alone. ``official``: instructions, and the tool as the model's chat
    template lists it."""
    max_turns: PositiveInt = 8
    """Answers after which an attempt is over (paper: 8)."""
    sandbox: SandboxSection = SandboxSection()
    """What runs the programs (paper: 30 s, 1024 MB)."""
    max_calls_per_turn: PositiveInt = 1
    """Calls of the interpreter that run in one answer; further ones are refused."""
    max_output_chars: PositiveInt = 8000
    """Longest output shown; the middle of a longer one is left out."""
    stderr_lines: PositiveInt = 10
    """Last lines of stderr shown where a program failed."""
    prelude: str = ""
    """Python text put before the code of each call (the released code has its common imports
    there)."""
    grader: Literal["tolerant", "official_strict"] = "tolerant"
    """``tolerant``: the answer has the right value (math-verify where it is installed, else exact
    numbers and spelling). ``official_strict``: the last box within the last 100 characters is
    spelled exactly as the known answer."""
    grader_limit_s: PositiveFloat = 5.0
    """CPU seconds in which math-verify must have compared an answer, or it is wrong; by the clock
    it may take six times as long."""

    def with_panel(self, source: str) -> Self:
        """All problems of a file or folder."""
        path = Path(source).expanduser()
        if not path.exists():
            raise ConfigError(
                f"--panel {source}: no such file or folder; expected problems as .jsonl or "
                ".parquet, or a folder of them"
            )
        return self.model_copy(update={"eval_problems": (path,)})

    @property
    def task_kinds(self) -> tuple[str, ...]:
        """The kinds of generated problems, or the names of the files."""
        if self.problems is None:
            return tuple(dict.fromkeys(self.arithmetic.kinds))
        return tuple(dict.fromkeys(_stems(self.problems)))


def _stems(paths: tuple[Path, ...]) -> list[str]:
    """Names of the files at the paths without their suffix."""
    found: list[str] = []
    for path in (path.expanduser() for path in paths):
        files = sorted(path.glob("*")) if path.is_dir() else [path]
        found += [file.stem for file in files if file.suffix in (".jsonl", ".parquet")]
    return found
