"""The HTML file: markup, styles, program and data in one, in which no text can become a program.

All data is compressed and in base64, so nothing in it can end an element. The page's
Content-Security-Policy allows this one script and this one style sheet, by their hashes, and no
request at all.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

_ASSETS = resources.files("megatron_spear.report").joinpath("assets")
_STYLES = ("page.css", "chart.css", "viewer.css")
_PROGRAMS = (
    "dom.js",
    "data.js",
    "state.js",
    "focus.js",
    "scales.js",
    "series.js",
    "cursor.js",
    "chart.js",
    "curves.js",
    "overview.js",
    "rows.js",
    "list.js",
    "tokens.js",
    "trajectory.js",
    "replayed.js",
    "follow.js",
    "main.js",
)
"""In the order in which the program needs them."""

_LEVEL = 6


def page_parts(
    title: str, data: Mapping[str, Any], listing: Mapping[str, Any], chunks: Sequence[bytes]
) -> Iterator[str]:
    """The file in pieces: the frame, what the curves need, the program, then the listing
    and the chunks. So the curves are drawn before the trajectories are read."""
    style, program = style_sheet(), program_text()
    frame = _ASSETS.joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(program)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    before, behind = frame.split("<!--data-->")
    before = before.replace("{policy}", policy).replace("{style}", style)
    yield before.replace("{title}", _escaped(title))
    yield _block("data", pack_data(data))
    yield f"<script>{program}</script>\n"
    yield _block("listing", pack_data(listing))
    for number, chunk in enumerate(chunks):
        yield _block(f"chunk-{number}", chunk)
    yield behind


def pack_data(data: Any) -> bytes:
    """Plain data as compressed JSON; ValueError for a number that is not finite."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode("ascii"), _LEVEL, mtime=0)


def program_text() -> str:
    """All JavaScript of the page: one strict function around the modules."""
    modules = (_ASSETS.joinpath(name).read_text(encoding="utf-8") for name in _PROGRAMS)
    return "(() => {\n'use strict';\n" + "\n".join(modules) + "\n})();\n"


def style_sheet() -> str:
    """All CSS of the page."""
    return "\n".join(_ASSETS.joinpath(name).read_text(encoding="utf-8") for name in _STYLES)


def _block(name: str, packed: bytes) -> str:
    """Data that a browser keeps and does not run."""
    text = base64.b64encode(packed).decode("ascii")
    return f'<script type="application/gzip" id="{name}">{text}</script>\n'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _escaped(text: str) -> str:
    """Text for the markup, in ASCII; half a surrogate pair becomes a question mark."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return html.escape(whole).encode("ascii", "xmlcharrefreplace").decode("ascii")
