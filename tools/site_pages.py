"""MkDocs hook: pages of the repository that lie outside ``docs/`` are pages of the site too.

Links in Markdown are relative to the file, so that they work where the repository is read. In the
site everything that is in ``docs/`` is at the top, and the other pages keep their place beside it.
"""

import re
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "examples/**/*", "slurm/**/*")
"""What the site takes besides ``docs/``: pages, and the files that they link to."""

_LINK = re.compile(r"(\]\()((?:\.\./)*)(docs/)?")


class _Page(Protocol):
    file: Any


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files outside ``docs/``."""
    from mkdocs.structure.files import File

    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                place = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: _Page, config: Any, files: Any) -> str:
    """Links as the site has them."""
    return site_links(markdown, page.file.src_uri, outside=page.file.generated_by is not None)


def site_links(markdown: str, place: str, *, outside: bool) -> str:
    """The page at ``place`` in the site with links between ``docs/`` and what is ``outside`` it.

    Example: ``[x](../slurm/README.md)`` of ``cluster.md`` becomes ``[x](slurm/README.md)``, and
    ``[x](../../docs/math.md)`` of ``examples/math_code/README.md`` ``[x](../../math.md)``.
    """
    depth = place.count("/")

    def moved(link: re.Match[str]) -> str:
        start, up, docs = link[1], link[2], link[3] or ""
        if outside:
            return start + up + ("" if up == "../" * depth else docs)
        return start + (up[3:] if len(up) > 3 * depth else up) + docs

    return _LINK.sub(moved, markdown)
