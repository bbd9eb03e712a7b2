"""Which store a path names, as which checkpoint, also while the run goes on."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_spear.config.load import dump_config, load_config
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.trainer import replay_of_run
from megatron_spear.trainer.replay_of_run import read_store, tokenizer_folder
from megatron_spear.trainer.replay_report import best_rows, store_in_words


def _commit(run: Path, step: int, store: ReplayStore | None) -> None:
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    hooks = {} if store is None else {"built_in.self_imitation": {"store": store.state_dict()}}
    state = {"progress": {"policy_version": step}, "hooks": hooks}
    (folder / "trainer.json").write_text(json.dumps(state))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Rows 0 and 1 of step 1, checkpoint 1; 0 taken, row 2 of step 2, checkpoint 2; row 3."""
    run = tmp_path / "run"
    store = ReplayStore(run / "replay", 10)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config(None, [f"run.dir={run}"])))
    store.add([[make_sample(member=i, policy_version=0, advantage=i)] for i in range(2)])
    _commit(run, 1, store)
    store.take([0])
    store.add([[make_sample(member=2, policy_version=1, advantage=0.5)]])
    _commit(run, 2, store)
    store.add([[make_sample(member=3, policy_version=2)]])
    return run


def _rows(found: replay_of_run.FoundStore) -> list[int]:
    rows: list[int] = found.contents.rows["row_ids"].tolist()
    return rows


def test_the_newest_checkpoint_or_the_one_asked_for(run: Path) -> None:
    found = read_store(run)
    assert (_rows(found), found.checkpoint, found.num_newer) == ([1, 2, 3], 2, 1)
    assert (found.policy_version, found.version_now) == (2, 2)
    for older in (read_store(run, 1), read_store(run / "checkpoints" / "step_1")):
        assert (_rows(older), older.policy_version) == ([0, 1, 2, 3], 1)
        assert older.num_newer == 2
    assert _rows(read_store(run / "replay")) == [1, 2, 3], "the run is beside it"
    alone = run.parent / "copied"
    shutil.copytree(run / "replay", alone)
    found = read_store(alone)
    assert (_rows(found), found.run, found.checkpoint) == ([0, 1, 2, 3], None, None)
    assert "no checkpoint says" in "\n".join(store_in_words(found, 3))


def test_it_is_told_in_words(run: Path) -> None:
    found = read_store(run)
    text = "\n".join(store_in_words(found, 3))
    assert "as checkpoint step_2 has it (policy version 2), and 1 rows written since" in text
    listed = [line.split()[:2] for line in best_rows(found, 2)[2:]]
    assert listed == [["1", "1"], ["3", "1"]]


def test_a_run_that_prunes_meanwhile_is_read_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its newest checkpoint was 1 when it was looked for, and files of that are gone."""
    (run / "replay" / "segment-00000001.bin").rename(run / "moved")
    newest = iter([2])
    real = replay_of_run.newest_checkpoint
    calls: list[int] = []

    def look(path: Path) -> int:
        calls.append(1)
        if len(calls) == 2:  # after the first reading
            (run / "moved").rename(run / "replay" / "segment-00000001.bin")
            _commit(run, 3, ReplayStore(run / "replay", 10))
        return next(newest, None) or real(path)

    monkeypatch.setattr(replay_of_run, "newest_checkpoint", look)
    found = read_store(run)
    assert (found.checkpoint, found.contents.faults) == (3, ())


def test_a_file_that_stays_missing_is_a_fault(run: Path) -> None:
    (run / "replay" / "segment-00000001.bin").unlink()
    assert "missing" in read_store(run).contents.faults[0]


def test_a_store_that_never_got_a_row(run: Path) -> None:
    shutil.rmtree(run / "replay")
    _commit(run, 4, ReplayStore(run / "replay", 10))
    found = read_store(run)
    assert (_rows(found), found.contents.faults) == ([], ())
    assert "live      0 rows" in "\n".join(store_in_words(found, 3))


def test_paths_that_have_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_store(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no replay store here"):
        read_store(tmp_path)
    with pytest.raises(ConfigError, match="leave --checkpoint out"):
        read_store(run / "checkpoints" / "step_1", 2)
    with pytest.raises(CheckpointError, match=r"step_7/trainer\.json cannot be read"):
        read_store(run, 7)
    shutil.copytree(run / "replay", tmp_path / "alone")
    with pytest.raises(ConfigError, match="no checkpoint to choose"):
        read_store(tmp_path / "alone", 1)
    _commit(run, 9, None)
    with pytest.raises(CheckpointError, match=r"replay\.enabled=false"):
        read_store(run)


def test_the_tokenizer_of_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model"):
        tokenizer_folder(None)
    with pytest.raises(ConfigError, match="--model"):
        tokenizer_folder(run)
    given = tmp_path / "given"
    given.mkdir()
    (given / "tokenizer.json").write_text("{}")
    config = load_config(None, [f"run.dir={run}", f"model.path={given}"])
    (run / "config.yaml").write_text(dump_config(config))
    assert tokenizer_folder(run) == given
    (run / "model").mkdir()
    (run / "model" / "tokenizer.json").write_text("{}")
    assert tokenizer_folder(run) == run / "model"
