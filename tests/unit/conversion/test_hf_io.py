"""Reading broken folders fails naming what is wrong; written folders load in plain transformers."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.hf_io import (
    HfReader,
    check_complete,
    check_tokenizer,
    write_hf_folder,
)
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.errors import CheckpointError
from megatron_spear.testing.tiny import tiny_hf_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_hf_folder(tmp_path / "hf")
    return tmp_path / "hf"


def check(path: Path) -> None:
    with HfReader(path) as reader:
        table = weight_table(model_shape(load_config(path)))
        check_complete(reader, table)
        for item in table:
            for name, shape in zip(item.sources, item.shapes, strict=True):
                reader.get(name, shape)


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(path / WEIGHTS) | tensors
    save_file({k: v for k, v in state.items() if v is not None}, path / WEIGHTS)


def test_whole_folder_passes(folder: Path) -> None:
    check(folder)


def test_missing_folder_and_files(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        HfReader(folder / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        HfReader(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(folder)


def test_truncated_shard(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        check(folder)


def test_missing_extra_and_wrong_tensors(folder: Path) -> None:
    change(folder, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*model\.norm\.weight"):
        check(folder)
    change(folder, **{"model.norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"shape \(3,\); expected \(64,\)"):
        check(folder)
    change(folder, **{"model.norm.weight": torch.ones(64), "stray": torch.ones(1)})
    with pytest.raises(CheckpointError, match="does not use: stray"):
        check(folder)


def test_sharded_folder_and_its_missing_shard(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / WEIGHTS)
    target = tmp_path / "sharded"
    write_hf_folder(target, folder, state.items(), max_shard_bytes=50_000)
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 2
    check(target)
    with HfReader(target) as reader:
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in state.items())
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        check(target)


def test_written_folder_loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (folder / "tokenizer.json").write_text("{}")
    state = load_file(folder / WEIGHTS)
    stream = [*state.items(), ("of another rank", None)]
    write_hf_folder(tmp_path / "out", folder, stream)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(CheckpointError, match="not empty"):
        write_hf_folder(tmp_path / "out", folder, state.items())


def test_failed_write_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def broken():
        yield "a", torch.ones(1)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_hf_folder(tmp_path / "out", folder, broken())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_full_disk_is_told_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE gives a real EFBIG from the kernel, which safetensors tells in words only."""
    state = load_file(folder / WEIGHTS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        with pytest.raises(CheckpointError, match=r"out was not written: the disk is full.*Free"):
            write_hf_folder(tmp_path / "out", folder, state.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_tokenizer_has_to_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        check_tokenizer(tmp_path, 10)
    vocabulary = {f"w{i}": i for i in range(10)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    check_tokenizer(tmp_path, 10)
    with pytest.raises(CheckpointError, match="ids up to 9, the model has vocab_size 9"):
        check_tokenizer(tmp_path, 9)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_tokenizer(tmp_path, 10)
