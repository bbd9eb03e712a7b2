"""Read ALFWorld games from the official download or from packed row files.

Two layouts are read, recognised by what lies at the path:

- **tree**: ``.../<split>/<task folder>/<trial>/game.tw-pddl`` as ``alfworld-download`` leaves it;
  each file is a JSON with ``pddl_domain``, ``grammar``, ``pddl_problem``, ``solvable`` and
  ``walkthrough``. As in ALFWorld's own loader, folders of movable-receptacle and sliced-object
  tasks are no games.
- **packed**: ``<split>.jsonl.xz`` (or ``.jsonl``), one row ``{id, task, walkthrough, solvable,
  problem}`` a game; a folder of such files, or one file.
"""

import hashlib
import json
import logging
import lzma
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_spear.envs.alfworld.engine import act
from megatron_spear.envs.alfworld.game import Game, GameFile, GameState, parse_game
from megatron_spear.envs.alfworld.pddl import parse_problem
from megatron_spear.envs.alfworld.planner import walkthrough
from megatron_spear.envs.alfworld.rules_check import check_domain, check_grammar, task_from_grammar
from megatron_spear.errors import DataError
from megatron_spear.types import TASK_TYPES

logger = logging.getLogger(__name__)

GAME_FILE_NAME = "game.tw-pddl"
PACKED_SUFFIXES = (".jsonl.xz", ".jsonl")

_UNSUPPORTED_FOLDER = re.compile(r"movable|Sliced")
_ADVICE = (
    "Expected a folder with <split>/<task>/<trial>/game.tw-pddl (run `alfworld-download`), a "
    "folder with <split>.jsonl.xz, or one such file."
)


def load_games(
    path: str | Path,
    *,
    split: str | None = None,
    task_types: Collection[str] | None = None,
    max_receptacles: int | None = None,
    skip_unsolvable: bool = False,
) -> list[GameFile]:
    """The games at ``path`` in a fixed order (sorted folders, rows as they stand).

    Args:
        path: a tree, a packed folder, or one game or packed file.
        split: ``train``, ``valid_seen``, ``valid_unseen``, ..; None reads every split there is. One
            file has no splits and is read whole.
        task_types: keep these of `TASK_TYPES`; None keeps all.
        max_receptacles: keep games with at most this many receptacles to go to.
        skip_unsolvable: leave games marked unsolvable out, as ALFWorld's own loader does, instead
        of raising.

    Raises:
        DataError: for a missing or unreadable source, for the first bad game, or when no game is
        left.
    """
    unknown = sorted(set(task_types or ()) - set(TASK_TYPES))
    if unknown or (task_types is not None and not task_types):
        raise DataError(
            f"task_types has {unknown or 'nothing'}; expected some of {', '.join(TASK_TYPES)}."
        )
    games: list[GameFile] = []
    num_read = 0
    for game in iter_games(path, split=split, skip_unsolvable=skip_unsolvable):
        num_read += 1
        if task_types is not None and game.task_type not in task_types:
            continue
        if max_receptacles is not None and game.num_receptacles > max_receptacles:
            continue
        games.append(game)
    if 0 < len(games) < num_read:
        what = "games by task type or number of receptacles"
        logger.info("%s: left out %d of %d %s", path, num_read - len(games), num_read, what)
    if not games:
        raise DataError(
            f"{path}: no game is left of {num_read} read (split={split}, task_types={task_types}, "
            f"max_receptacles={max_receptacles}). Widen the filters or point at another split."
        )
    return games


def iter_games(
    path: str | Path, *, split: str | None = None, skip_unsolvable: bool = False
) -> Iterator[GameFile]:
    """The games at ``path`` one by one, read as they are asked for; raises like `load_games`."""
    left_out = 0
    for file in game_files(path, split=split):
        for game in _file_games(file, skip_unsolvable):
            left_out += not game.solvable
            if game.solvable:
                yield game
    if left_out:
        logger.info("%s: left out %d games marked unsolvable", path, left_out)


def game_files(path: str | Path, *, split: str | None = None) -> list[Path]:
    """The files that `iter_games` reads, in its order; raises `DataError` where there are none."""
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such file or folder. {_ADVICE}")
    if root.is_file():
        return [root]
    packed = [root / f"{split or '*'}{suffix}" for suffix in PACKED_SUFFIXES]
    packed_files = sorted(file for pattern in packed for file in root.glob(pattern.name))
    return packed_files or _tree_files(root, split)


def games_sha256(path: str | Path, *, split: str | None = None) -> str:
    """sha256 (hex) over names and bytes of the game files at ``path``, wherever they lie."""
    digest = hashlib.sha256()
    for file in game_files(path, split=split):
        parts = 3 if file.name == GAME_FILE_NAME else 1
        digest.update("/".join(file.resolve().parts[-parts:]).encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def require_winnable(game: GameFile) -> Game:
    """The parsed game; `DataError` unless its recorded walkthrough or one of the planner's wins.

    Takes the parsing of the game (some ms) and about 0.1 ms, without a walkthrough 0.6 ms.
    """
    parsed = parse_game(game)
    state = GameState(parsed)
    for action in game.walkthrough:
        act(state, action)
    if not state.won:
        walkthrough(game)
    return parsed


def _file_games(file: Path, skip_unsolvable: bool) -> Iterator[GameFile]:
    """The games of one file; those marked unsolvable too, with ``skip_unsolvable``."""
    if file.name.endswith(PACKED_SUFFIXES):
        found = _packed_games(file)
    elif file.suffix == ".tw-pddl":
        found = iter([_tree_game(file)])
    else:
        raise DataError(f"{file}: the name says nothing about the format. {_ADVICE}")
    for where, game in found:
        if not (game.solvable or skip_unsolvable):
            raise DataError(
                f"{where}: game {game.id} is marked unsolvable (solvable is false); expected "
                "solvable games. Remove it, or set env.skip_unsolvable=true."
            )
        yield game


def _packed_games(file: Path) -> Iterator[tuple[str, GameFile]]:
    num_rows = 0
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        num_rows += 1
        where = f"{file}, row {number}"
        game = GameFile.from_fields(_json_object(line, where), where)
        _check_problem(game, where)
        yield where, game
    if num_rows == 0:
        raise DataError(f"{file}: empty; expected one JSON row a game. Fetch the file again.")


def _lines(file: Path) -> Iterator[str]:
    opener = lzma.open if file.suffix == ".xz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            yield from stream
    except (EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"{file}: the xz data are truncated or damaged ({error}); expected a whole .jsonl.xz "
            "file. Copy or fetch it again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); expected UTF-8 text.") from None


def _tree_files(root: Path, split: str | None) -> list[Path]:
    tree = root if split is None else _split_folder(root, split)
    found = sorted(tree.rglob(GAME_FILE_NAME))
    files = [
        file
        for file in found
        if not any(_UNSUPPORTED_FOLDER.search(part) for part in file.relative_to(tree).parts)
    ]
    if not files:
        raise DataError(f"{tree}: no {GAME_FILE_NAME} and no packed file inside. {_ADVICE}")
    if len(files) < len(found):
        what = "games of movable-receptacle or sliced-object tasks"
        logger.debug("%s: left out %d %s", tree, len(found) - len(files), what)
    return files


def _split_folder(root: Path, split: str) -> Path:
    """``<root>/<split>``, one folder deeper as in ``$ALFWORLD_DATA``, or the root if so named."""
    if (root / split).is_dir():
        return root / split
    deeper = sorted(folder for folder in root.glob(f"*/{split}") if folder.is_dir())
    if len(deeper) == 1:
        return deeper[0]
    if len(deeper) > 1:
        found = ", ".join(map(str, deeper))
        raise DataError(
            f"{root}: split {split!r} is in several folders: {found}. Point at one of them."
        )
    if root.name == split:
        return root
    there = sorted(entry.name for entry in root.iterdir())[:10]
    raise DataError(f"{root}: no split {split!r}; the folder holds {there or 'nothing'}. {_ADVICE}")


def _tree_game(file: Path) -> tuple[str, GameFile]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); expected UTF-8 JSON.") from None
    where = str(file)
    data = _json_object(content, where)
    for name in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(name), str):
            raise DataError(
                f"{where}: the text {name!r} is missing; expected pddl_domain, grammar, "
                "pddl_problem, solvable and walkthrough. Fetch it again with `alfworld-download`."
            )
    check_domain(data["pddl_domain"], f"{where} (pddl_domain)")
    check_grammar(data["grammar"], f"{where} (grammar)")
    values = {
        "id": "/".join(file.resolve().parts[-3:-1]),
        "task": task_from_grammar(data["grammar"], f"{where} (grammar)"),
        "walkthrough": data.get("walkthrough") or [],
        "problem": data["pddl_problem"],
    }
    if "solvable" in data:
        values["solvable"] = data["solvable"]
    game = GameFile.from_fields(values, where)
    _check_problem(game, where)
    return where, game


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object a game.") from None
    if not isinstance(data, dict):
        raise DataError(f"{where}: a JSON {type(data).__name__}; expected one JSON object a game.")
    return data


def _check_problem(game: GameFile, where: str) -> None:
    """Find a broken problem text at load; the full reading of a sound one (ms) waits for play."""
    text = game.problem
    lowered = text.lower()
    looks_sound = text.count("(") == text.count(")") and all(
        section in lowered for section in ("(:objects", "(:init", "(:goal")
    )
    if not looks_sound:
        parse_problem(text, where)
