"""The panel of loaded games: all of a file or folder, sorted by id, the same on every machine."""

import json
import lzma
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.alfworld.task import fresh_game, make_panel
from megatron_spear.envs.family import Panel
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import TASK_TYPES

SHARED = Path(__file__).parents[4] / ".." / "shared" / "data" / "alfworld"

PINNED = {
    "valid_seen": (140, "c67c2f07a0da2b9ee147ac7fe1a946f68dc1a25b8432a37928462d8be15feecd"),
    "valid_train": (200, "be76b07841cb7419bd19f23221027a9c0993662ea2b9ecc0709246abab0da43a"),
}
"""Games and sha256 of the panel of each official split that is at hand."""


def panel_of(source: Path | str, size: int | None = None) -> Panel:
    return make_panel(AlfworldSection().with_panel(str(source)), size, seed=0)


def ids_of(panel: Panel) -> list[str]:
    return [prompt.prompt_id for prompt in panel.prompts]


def pack(path: Path, games: Sequence[GameFile]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(game.to_fields()) + "\n" for game in games))
    return path


def official_rows(split: str) -> list[GameFile]:
    path = SHARED / f"{split}.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        return [GameFile.from_fields(json.loads(line), split) for line in stream]


@pytest.fixture(scope="module")
def games() -> list[GameFile]:
    size = AlfworldSection().generator
    return [fresh_game(3, i, TASK_TYPES, size) for i in range(6)]


@pytest.mark.parametrize("split", PINNED)
def test_an_official_split_has_one_panel_everywhere(split: str, tmp_path: Path) -> None:
    size, sha256 = PINNED[split]
    rows = official_rows(split)
    panel = panel_of(SHARED / f"{split}.jsonl.xz")
    assert len(panel.prompts) == size == len(set(ids_of(panel)))
    assert ids_of(panel) == sorted(row.id for row in rows)
    assert panel.sha256 == sha256
    random.Random(1).shuffle(rows)
    shuffled = pack(tmp_path / "elsewhere" / "mine.jsonl", rows)
    assert panel_of(shuffled) == panel == panel_of(shuffled.parent)
    kinds = Counter(prompt.kind for prompt in panel.prompts)
    assert kinds == Counter(row.task_type for row in rows) and set(kinds) == set(TASK_TYPES)


def test_the_official_tree_and_the_packed_rows_are_the_same_panel(
    tmp_path: Path, domain: str
) -> None:
    grammar = (SHARED / "alfred_grammar.twl2").read_text(encoding="utf-8")
    rows = official_rows("valid_seen")[:5]
    root = tmp_path / "json_2.1.1" / "valid_seen"
    for row in rows:
        folder = root / row.id
        folder.mkdir(parents=True)
        entries = {
            "pddl_domain": domain,
            "grammar": grammar.replace("@@TASK@@", row.task),
            "pddl_problem": row.problem,
            "solvable": row.solvable,
            "walkthrough": row.walkthrough,
        }
        (folder / "game.tw-pddl").write_text(json.dumps(entries), encoding="utf-8")
    packed = panel_of(pack(tmp_path / "packed" / "valid_seen.jsonl", rows))
    assert packed == panel_of(root) == panel_of(tmp_path)
    assert len(packed.prompts) == 5


def test_neither_order_nor_place_nor_the_cut_into_files_matters(
    tmp_path: Path, games: list[GameFile]
) -> None:
    panel = panel_of(pack(tmp_path / "a" / "all.jsonl", games))
    assert ids_of(panel) == sorted(game.id for game in games)
    pack(tmp_path / "b" / "z.jsonl", games[:2])
    pack(tmp_path / "b" / "y.jsonl", games[:1:-1])
    assert panel_of(tmp_path / "b") == panel
    pack(tmp_path / "c" / "twice.jsonl", [*games, *games])
    assert panel_of(tmp_path / "c") == panel, "a game counts once"


def test_the_hash_is_of_ids_and_contents(tmp_path: Path, games: list[GameFile]) -> None:
    whole = panel_of(pack(tmp_path / "a.jsonl", games))
    fewer = panel_of(pack(tmp_path / "b.jsonl", games[1:]))
    fields = games[0].to_fields()
    problem = fields["problem"].replace("(define", "(define ", 1)
    changed = GameFile(**{**fields, "problem": problem})
    other = panel_of(pack(tmp_path / "c.jsonl", [changed, *games[1:]]))
    assert len({whole.sha256, fewer.sha256, other.sha256}) == 3
    assert panel_of(tmp_path / "a.jsonl", 3).prompts == whole.prompts[::2], "a number spreads"


def test_a_split_by_its_name(tmp_path: Path, games: list[GameFile]) -> None:
    pack(tmp_path / "valid_seen.jsonl", games[:4])
    pack(tmp_path / "mine.jsonl", games[4:])
    env = AlfworldSection(games=tmp_path)
    own = make_panel(env.with_panel("mine"), None, seed=0)
    assert ids_of(own) == sorted(game.id for game in games[4:])
    assert panel_of(tmp_path / "mine") == own, "FOLDER/SPLIT of packed files"
    assert len(make_panel(env, None, seed=0).prompts) == 4, "the setting's own split"
    with pytest.raises(DataError, match="no split 'absent'"):
        panel_of(tmp_path / "absent")


def test_what_is_no_panel(tmp_path: Path, games: list[GameFile]) -> None:
    with pytest.raises(ConfigError, match=r"--panel mine: no such file or folder.*env.games"):
        AlfworldSection().with_panel("mine")
    file = pack(tmp_path / "a.jsonl", games)
    with pytest.raises(ConfigError, match=r"no split, since env.games is .*a.jsonl"):
        AlfworldSection(games=file).with_panel("mine")
    with pytest.raises(ConfigError, match=r"evaluation.games=null .* generated without end"):
        make_panel(AlfworldSection(), None, seed=0)
