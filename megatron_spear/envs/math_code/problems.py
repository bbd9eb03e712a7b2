"""Read math problems and their answers from the published files.

| form | where | read from a row |
|---|---|---|
| ``problem`` | AIME, AMC, MATH-500 | ``problem``, ``answer``, ``id`` where there is one |
| ``question`` | GSM8K | ``question``, and what follows ``####`` in ``answer`` |
| ``prompt`` | DAPO-Math-17k | the user's message of ``prompt``, ``reward_model.ground_truth``, \
``extra_info.index`` |

A file is ``.jsonl`` (each form) or ``.parquet`` (`parquet`). Its name without the suffix is the
kind of its problems, so that success is told for each file, and the beginning of their ids: files
of one name in two folders are refused where their problems would share ids. Rows that repeat an
index or, without one, a text are left out: DAPO-Math-17k is published with each problem a hundred
times.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
# Around each problem of DAPO-Math-17k stands how to answer, in another form than asked for here.
_ASKED_BEFORE = "Solve the following math problem step by step."
_ASKED_AFTER = "\n\nRemember to put your answer on its own line after"
_FORMS = (
    'a row with "problem" and "answer", with "question" and "answer" (GSM8K), or with "prompt", '
    '"reward_model" and "extra_info" (DAPO-Math-17k)'
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; ``kind`` is its file's name without suffix.

    Example: ``Problem("aime24-01", "aime24", "Every morning Aya goes ...", "204")``.
    """

    id: str
    kind: str
    text: str
    answer: str


def load_problems(paths: Sequence[Path]) -> list[Problem]:
    """The problems of the files, or of all files in the folders, in order, none twice.

    Raises DataError for a path without problems, for the first row that cannot be read and for an
    id of two problems.
    """
    found: dict[str, Problem] = {}
    files: dict[str, Path] = {}
    for file in problem_files(paths):
        read = 0
        for problem in _file_problems(file):
            read += 1
            if found.setdefault(plain_text(problem.text), problem) is not problem:
                continue
            if problem.id in files:
                raise DataError(
                    f"{file}: its problem {problem.id} is not the one that has this id in "
                    f"{files[problem.id]}; an id is the file's name with the row's id or number, "
                    "so give the files different names (or their rows ids of their own)"
                )
            files[problem.id] = file
        if not read:
            raise DataError(f"{file}: has no problem; expected {_FORMS}. Fetch the file again.")
    return list(found.values())


def problem_files(
    paths: Sequence[Path], setting: str = "env.problems or env.eval_problems"
) -> list[Path]:
    """The files at the paths of ``setting``: each file named, and those in each folder by name.

    Raises DataError where there are none.
    """
    files: list[Path] = []
    for path in (path.expanduser() for path in paths):
        inside = sorted(f for f in path.glob("*") if f.suffix in SUFFIXES) if path.is_dir() else []
        if not inside and (path.suffix not in SUFFIXES or not path.is_file()):
            what = "a folder without them" if path.is_dir() else "no such file"
            what = (
                f"a file of another kind ({path.suffix or 'no suffix'})" if path.is_file() else what
            )
            raise DataError(
                f"{path}: {what}; expected a file {' or '.join(SUFFIXES)}, or a folder of such "
                f"files. Correct {setting}."
            )
        files += inside or [path]
    return list(dict.fromkeys(files))


def plain_text(text: str) -> str:
    """The text without what two copies of one problem differ in: letter case and white space."""
    return " ".join(text.split()).casefold()


def _file_problems(file: Path) -> Iterator[Problem]:
    """The problems of one file; rows that repeat an index are left out."""
    if file.suffix == ".parquet":
        from megatron_spear.envs.math_code.parquet import parquet_rows

        rows: Iterable[tuple[int, Mapping[str, Any]]] = parquet_rows(file)
    else:
        rows = json_rows(file, _FORMS)
    seen: set[str] = set()
    for number, row in rows:
        problem = read_row(row, file.stem, number, f"{file}, row {number}")
        if problem.id not in seen:
            seen.add(problem.id)
            yield problem


def json_rows(file: Path, expected: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(1-based number, row) of each line that is not empty; ``expected`` says what a row has."""
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{file}, row {number}: no JSON ({error}); expected {expected}"
                    ) from None
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); expected UTF-8 text") from None


def read_row(row: Any, kind: str, number: int, where: str) -> Problem:
    """One row of any of the forms; DataError says ``where`` and what is wrong."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: got a {type(row).__name__}; expected {_FORMS}")
    identity = row.get("id")
    if "problem" in row:
        text, answer = row["problem"], row.get("answer")
    elif "question" in row:
        text, answer = row["question"], _after_hashes(row.get("answer"), where)
    elif "prompt" in row:
        text, answer, identity = _published_row(row, where)
    else:
        keys = ", ".join(map(str, list(row)[:8])) or "nothing"
        raise DataError(f"{where}: got a row with {keys}; expected {_FORMS}")
    text, answer = _text("problem", text, where), _text("answer", answer, where)
    name = str(number) if identity is None else str(identity)
    return Problem(name if name.startswith(kind) else f"{kind}/{name}", kind, text, answer)


def _text(name: str, value: Any, where: str) -> str:
    """A text without white space around it; numbers are taken too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: the {name} is {value!r}; expected a text")
    return value.strip()


def _after_hashes(answer: Any, where: str) -> str:
    """GSM8K's final answer; the thousands' commas go: they are no part of the number."""
    _, mark, last = str(answer).rpartition("####")
    if not mark:
        raise DataError(
            f'{where}: the answer of a "question" has no ####; expected the steps, "####" and the '
            "final answer, as in GSM8K"
        )
    return last.strip().replace(",", "")


def _published_row(row: Mapping[str, Any], where: str) -> tuple[str, Any, Any]:
    """(problem, answer, index) of a row of DAPO-Math-17k."""
    prompt, reward_model = row["prompt"], row.get("reward_model")
    said = [
        message.get("content")
        for message in (prompt if isinstance(prompt, list | tuple) else ())
        if isinstance(message, Mapping) and message.get("role") == "user"
    ]
    if len(said) != 1 or not isinstance(said[0], str):
        raise DataError(
            f'{where}: "prompt" has {len(said)} messages of the user; expected a list of '
            '{"role": .., "content": ..} with one'
        )
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise DataError(
            f'{where}: "reward_model" is {reward_model!r}; expected {{"ground_truth": answer, ..}}'
        )
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    return _unwrapped(said[0]), reward_model["ground_truth"], index


def _unwrapped(text: str) -> str:
    """The problem without the published instructions around it, which ask for ``Answer: ..``."""
    if text.startswith(_ASKED_BEFORE):
        _, found, rest = text.partition("\n\n")
        text = rest if found else text
    return text.partition(_ASKED_AFTER)[0]
