"""Folders of weights: whole or not there, two kept, loadable, nothing left of a failure."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.errors import EngineError
from megatron_spear.testing.servers import FakeFleet, ServerProcesses
from megatron_spear.testing.tiny import tiny_hf_folder
from megatron_spear.testing.transports import RandomSource
from megatron_spear.weight_sync.disk import Disk
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_hf_folder(path, "Qwen3")
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def processes():
    with ServerProcesses(1) as running:
        yield running


@pytest.fixture
def fleet(processes):
    with FakeFleet(processes.addresses, None) as servers:
        yield servers


def _transport(fleet, model: Path, folder: Path, precision="model", source=None) -> ServerTransport:
    shape = model_shape(load_config(model))
    return ServerTransport(
        source=source or RandomSource(model=shape),
        manifest=Manifest.of_model(shape, precision),
        servers=fleet,
        delivery=Disk(folder=folder, model=model, precision=precision),
        control=None,
        deadline_s=60.0,
    )


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_versions_are_kept(fleet, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    for name in ("9", ".3.writing-77"):  # of a run that was killed and went back to version 2
        (tmp_path / name).mkdir()
    transport = _transport(fleet, model, tmp_path)
    seen = []
    for version in (3, 4, 5):
        transport.publish(version)
        seen.append(_entries(tmp_path))
    assert seen == [["3", "notes.txt"], ["3", "4", "notes.txt"], ["4", "5", "notes.txt"]]
    names = _entries(tmp_path / "5")
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(names)
    transport.close()
    assert _entries(tmp_path) == ["notes.txt"]


def test_transformers_loads_a_version(fleet, model: Path, tmp_path: Path) -> None:
    source = RandomSource(model=model_shape(load_config(model)))
    _transport(fleet, model, tmp_path, source=source).publish(1)
    assert json.loads((tmp_path / "1" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "1", dtype=torch.float32)
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, source.weights[name].float()), name


def test_an_fp8_version_says_so(fleet, model: Path, tmp_path: Path) -> None:
    source = RandomSource(model=model_shape(load_config(model)))
    _transport(fleet, model, tmp_path, "fp8", source).publish(1)
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["dtype"] == "bfloat16"
    with HfReader(tmp_path / "1") as reader:
        kinds = {name: reader.get(name).dtype for name in reader.names}
    assert kinds["model.layers.0.mlp.down_proj.weight"] is torch.float8_e4m3fn
    assert kinds["model.layers.0.mlp.down_proj.weight_scale_inv"] is torch.float32
    assert kinds["model.embed_tokens.weight"] is torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "1",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.float32,
    )
    for name, tensor in loaded.named_parameters():
        exact = source.weights[name].float()
        assert (tensor - exact).norm() < 0.04 * exact.norm(), name


def test_nothing_is_left_of_a_version_that_no_server_took(
    fleet, model: Path, tmp_path: Path
) -> None:
    transport = _transport(fleet, model, tmp_path)
    transport.publish(1)
    fleet.servers[0].fail("load_folder", "refuse")
    with pytest.raises(EngineError, match="told to refuse load_folder"):
        transport.publish(2)
    assert _entries(tmp_path) == ["1"]
    transport.publish(2)
    assert _entries(tmp_path) == ["1", "2"]


def test_a_full_disk_is_told_and_the_engines_go_on(fleet, model: Path, tmp_path: Path) -> None:
    transport = _transport(fleet, model, tmp_path)
    transport.publish(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    try:
        with pytest.raises(EngineError, match=r"2 was not written: the disk is full or a quota"):
            transport.publish(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert _entries(tmp_path) == ["1"]
    assert fleet.servers[0].serving and fleet.events == ["pause", "resume"], "no pause for nothing"


def test_a_folder_that_cannot_be_made_is_told(fleet, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot be written to .*file/weights/1"):
        _transport(fleet, model, tmp_path / "file" / "weights").publish(1)
