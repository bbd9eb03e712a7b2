"""The commands of the documentation, as they stand in its pages.

A command is in a fenced ``bash`` block; ``text`` blocks are output. A block that needs what a test
does not have says so in the paragraph before it: ``**Needs GPUs**``.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = ("GPUs", "a Slurm cluster", "a download", "a server", "root")
"""What a block may need, in the words of its page."""

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.S | re.M
)
_NEEDS = re.compile(r"\*\*Needs ([^*]+)\*\*")
_LOOKS_LIKE = re.compile(
    r"^(megatron-spear|python3?|pip|torchrun|pytest|curl|(\./)?tools/\S+\.(sh|py)) +[^\s=|]", re.M
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language, its text, and the paragraph before it."""

    page: str
    line: int
    language: str
    text: str
    before: str

    @property
    def needs(self) -> str:
        """What the page says that the block needs; empty if nothing."""
        found = _NEEDS.search(self.before)
        return found[1] if found else ""


@dataclass(frozen=True)
class Command:
    """One command line: ``words`` as a shell splits them, without comment and line breaks."""

    page: str
    line: int
    words: tuple[str, ...]
    needs: str

    @property
    def text(self) -> str:
        """The words with single spaces: how the table names the command."""
        return " ".join(self.words)

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text[:60]}"


def pages() -> list[Path]:
    """Every page that a user reads."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md"]
    return [*found, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    page = path.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(page):
        before = page[: fence.start()].rstrip().rpartition("\n\n")[2]
        yield Block(
            page=path.relative_to(ROOT).as_posix(),
            line=page.count("\n", 0, fence.start()) + 1,
            language=fence["language"],
            text=fence["text"],
            before="" if before.endswith("```") else before,
        )


def all_blocks(language: str) -> list[Block]:
    """The blocks of one language in all pages."""
    return [block for path in pages() for block in blocks(path) if block.language == language]


def commands(block: Block) -> Iterator[Command]:
    """The command lines of a block; one ends where its quotes and line breaks do.

    Example: ``a 'b c' \\`` and ``d=1   # why`` are one command of three words.
    """
    pending = ""
    for number, line in enumerate(block.text.splitlines(), 1):
        if not pending and (not line.strip() or line.strip().startswith("#")):
            continue
        pending += line.removesuffix("\\") if line.endswith("\\") else line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open: the next line belongs to it
            continue
        pending = ""
        yield Command(block.page, block.line + number, tuple(words), block.needs)
    assert not pending, f"{block.page} line {block.line}: the block ends within a command"


def spans() -> Iterator[tuple[str, str]]:
    """(Page, text) of every inline ``code`` outside the blocks, with single spaces."""
    for path in pages():
        text = _FENCE.sub("", path.read_text(encoding="utf-8"))
        for span in re.findall(r"`([^`]+)`", text):
            yield path.relative_to(ROOT).as_posix(), " ".join(span.split())


def unmarked_commands() -> list[str]:
    """Lines that look like commands in blocks that are not ``bash``: nobody would test them."""
    found = []
    for path in pages():
        for block in blocks(path):
            if block.language not in ("bash", "text", "python", "yaml"):
                found += [f"{block.page}: {hit[0]}" for hit in _LOOKS_LIKE.finditer(block.text)]
    return found
