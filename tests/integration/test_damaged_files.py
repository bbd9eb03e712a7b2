"""Any damage to any file of a real checkpoint, or of the replay it needs, is found.

``test_resume`` shows for a few of them that the run then goes on from the checkpoint before.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.errors import CheckpointError
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.faults import flip_bit
from megatron_spear.trainer.commit import CheckpointStore
from megatron_spear.trainer.manifest import MANIFEST, check_manifest

pytestmark = pytest.mark.timeout(300)

SETTINGS = (
    "run.steps=3",
    "algorithm.keep_groups_fraction=1.0",
    "replay.rows_per_step=2",
    "checkpoint.every=1",
    "checkpoint.keep=4",
    "evaluation.games=4",
)


@pytest.fixture(scope="module")
def run_dir(spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with checkpoints of steps 1 to 3 and rows in its replay."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    spear("train", f"run.dir={folder}", *SETTINGS)
    return folder


@pytest.fixture
def store(run_dir: Path, tmp_path: Path) -> CheckpointStore:
    """A copy of its checkpoints."""
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    return CheckpointStore(tmp_path / "checkpoints", keep=4)


def files_of(store: CheckpointStore) -> list[Path]:
    """All files of the newest checkpoint; among them those that matter most."""
    folder = store.folder / "step_3"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.name for path in files}
    assert {MANIFEST, "trainer.json", "policy.json", ".metadata", "metadata.json"} <= names
    assert any(path.suffix == ".distcp" for path in files)
    return files


def newest(store: CheckpointStore) -> int:
    return next(store.whole()).step


def offsets(size: int) -> Iterator[int]:
    """The ends, the middle, and some drawn ones."""
    draw = random.Random(size)
    yield from {0, size // 2, size - 1, *(draw.randrange(size) for _ in range(8))}


def test_one_bit_of_any_file_is_found(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest(store) == 3
    tried = 0
    for file in files_of(store):
        for at in offsets(file.stat().st_size):
            flip_bit(file, at)
            caplog.clear()
            assert newest(store) == 2, (file, at)
            assert file.name in caplog.text and "step_3" in caplog.text
            flip_bit(file, at)
            tried += 1
    assert newest(store) == 3 and tried > 50


def test_a_bit_of_every_byte_of_the_manifest_is_found(store: CheckpointStore) -> None:
    """Also where JSON is free to be written in several ways."""
    manifest = store.folder / "step_3" / MANIFEST
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        for bit in {5, at % 8}:  # bit 5 makes capitals of letters
            manifest.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            with pytest.raises(CheckpointError):
                check_manifest(store.folder / "step_3", 3)
    manifest.write_bytes(whole)
    assert newest(store) == 3


@pytest.mark.parametrize("left", [0, 0.5, -1])
def test_a_truncated_file_is_found(left: float, store: CheckpointStore) -> None:
    for file in files_of(store):
        whole = file.read_bytes()
        os.truncate(file, len(whole) - 1 if left == -1 else int(len(whole) * left))
        assert newest(store) == 2, file
        file.write_bytes(whole)
    assert newest(store) == 3


def test_a_longer_file_is_found(store: CheckpointStore) -> None:
    for file in files_of(store):
        with file.open("ab") as stream:
            stream.write(b"}")
        assert newest(store) == 2, file
        os.truncate(file, file.stat().st_size - 1)
    assert newest(store) == 3


def test_a_missing_file_is_found(store: CheckpointStore) -> None:
    for file in files_of(store):
        aside = store.folder.parent / "aside"
        file.rename(aside)
        assert newest(store) == 2, file
        aside.rename(file)
    assert newest(store) == 3


def test_two_files_that_changed_places_are_found(store: CheckpointStore) -> None:
    first, second, *_ = [path for path in files_of(store) if path.name != MANIFEST]
    aside = store.folder.parent / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    assert newest(store) == 2


def test_a_folder_under_another_steps_name_is_found(store: CheckpointStore) -> None:
    (store.folder / "step_3").rename(store.folder / "step_7")
    assert newest(store) == 2


def test_a_file_that_nobody_wrote_is_told_and_not_read(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It can change nothing that the manifest names, so it costs no steps."""
    (store.folder / "step_3" / "policy" / "note.txt").write_text("kept for the paper")
    assert newest(store) == 3
    assert "policy/note.txt" in caplog.text and "not in its manifest" in caplog.text


def test_damage_to_the_replay_is_found_or_touches_no_row(run_dir: Path, tmp_path: Path) -> None:
    """Every file that the newest checkpoint needs, bit by bit; dead rows are free to rot."""
    state = json.loads((run_dir / "checkpoints" / "step_3" / "trainer.json").read_text())
    saved = state["hooks"]["built_in.self_imitation"]["store"]
    shutil.copytree(run_dir / "replay", tmp_path / "replay")
    expected = rows_of(tmp_path / "replay", saved)
    assert expected
    found = 0
    for file in sorted((tmp_path / "replay").iterdir()):
        needed = any(f"segment-{f['number']:08d}.bin" == file.name for f in saved["files"])
        for at in range(0, file.stat().st_size, 61):
            flip_bit(file, at)
            try:
                assert rows_of(tmp_path / "replay", saved) == expected, (file, at)
            except CheckpointError as error:
                assert needed and file.name in str(error)
                found += 1
            flip_bit(file, at)
    assert found > 20
    for file in saved["files"]:
        name = tmp_path / "replay" / f"segment-{file['number']:08d}.bin"
        name.rename(tmp_path / "aside")
        with pytest.raises(CheckpointError, match=name.name):
            rows_of(tmp_path / "replay", saved)
        (tmp_path / "aside").rename(name)


def rows_of(folder: Path, saved: Any) -> list[bytes]:
    """What a store holds that was taken back from this state."""
    store = ReplayStore(folder, 10_000)
    store.load_state_dict(saved)
    ids = list(store.index().row_ids)
    return [sample.token_ids.tobytes() for samples in store.take(ids) for sample in samples]
