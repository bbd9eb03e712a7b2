"""Conversions there and back are bitwise; stopped ones go on; broken sources are named."""

import functools
import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_spear.conversion import convert
from megatron_spear.conversion.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_spear.conversion.shards import NOTES, Shard, work_folder
from megatron_spear.conversion.verify import compare
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.testing.tiny import tiny_hf_folder

WEIGHTS = "model.safetensors"
SMALL_FILES = 60_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_hf_folder(tmp_path / "hf")
    return tmp_path / "hf"


def bits_of(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def equal(one: Path, other: Path) -> bool:
    a, b = bits_of(one), bits_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DENSE = [Layout(), Layout(tensor=2), Layout(tensor=4, pipeline=2), Layout(pipeline=2)]
EXPERTS = [Layout(), Layout(expert=2), Layout(tensor=2, pipeline=2, expert=4)]


@pytest.mark.parametrize(
    ("architecture", "layouts"),
    [
        ("Qwen3", DENSE),
        ("Qwen2", DENSE),
        ("Llama", DENSE),
        ("Mistral", DENSE),
        ("Qwen3Moe", EXPERTS),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise(
    architecture: str, layouts: list[Layout], tied: bool, tmp_path: Path
) -> None:
    shape = {"tie_word_embeddings": tied, "num_key_value_heads": 4}
    if architecture == "Mistral":
        shape["sliding_window"] = None
    model = tiny_hf_folder(tmp_path / "hf", architecture, **shape)
    for number, layout in enumerate(layouts):
        there, back = tmp_path / f"megatron{number}", tmp_path / f"back{number}"
        hf_to_megatron(tmp_path / "hf", there, layout, max_file_bytes=SMALL_FILES)
        megatron_to_hf(there, back, max_file_bytes=SMALL_FILES)
        assert len(list(back.glob("model-*.safetensors"))) > 1, "shards are written as they fill"
        assert equal(tmp_path / "hf", back), layout
        for pair in ((tmp_path / "hf", there), (there, back)):
            assert compare(*pair).differences == ()
    ids = torch.arange(12)[None]
    loaded = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_ranks_of_a_layout_have_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "there", Layout(tensor=2, pipeline=2))
    names = {file.name for file in (tmp_path / "there").glob("*.distcp")}
    assert names == {f"__{rank}_0.distcp" for rank in range(4)}


def test_dtype_converts_every_tensor(folder: Path, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "there", Layout(tensor=2), dtype="bf16")
    megatron_to_hf(tmp_path / "there", tmp_path / "back")
    expected, found = bits_of(folder), bits_of(tmp_path / "back")
    assert all(torch.equal(found[n], expected[n].bfloat16()) for n in expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    outcome = compare(folder, tmp_path / "back")
    assert outcome.differences == () and outcome.num_rounded == len(expected)


def test_several_processes_write_the_same(folder: Path, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "there", Layout(tensor=2), processes=2)
    megatron_to_hf(tmp_path / "there", tmp_path / "back")
    assert equal(folder, tmp_path / "back")


class Stopped(Exception):
    """As a kill would: nothing is tidied up."""


def stop_at(number: int, written: list[str], write: Callable[..., Any]) -> Callable[..., Any]:
    """``write``, which is cut off in the middle of the file after ``number`` whole ones."""

    def counting(*args: Any) -> Any:
        file, shard = args[-2:]
        assert isinstance(shard, Shard)
        if len(written) == number:
            file.write(b"half")
            raise Stopped
        written.append(shard.file)
        return write(*args)

    return counting


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stopped_conversion_goes_on(
    damaged: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "there", convert._write_distcp
    again = functools.partial(
        hf_to_megatron, folder, target, Layout(tensor=2), max_file_bytes=SMALL_FILES
    )
    before: list[str] = []
    monkeypatch.setattr(convert, "_write_distcp", stop_at(3, before, write))
    with pytest.raises(Stopped):
        again()
    assert not target.exists() and len(before) == 3
    if damaged:
        with (work_folder(target) / before[0]).open("r+b") as file:
            file.write(b"other")
    after: list[str] = []
    monkeypatch.setattr(convert, "_write_distcp", stop_at(1000, after, write))
    again()
    assert set(before) & set(after) == ({before[0]} if damaged else set())
    assert {f.name for f in target.glob("*.distcp")} == set(before) | set(after)
    assert not work_folder(target).exists() and not (target / NOTES).exists()
    megatron_to_hf(target, tmp_path / "back")
    assert equal(folder, tmp_path / "back")


def test_another_conversion_is_not_continued(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "there", convert._write_distcp
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(convert, "_write_distcp", stop_at(0, [], write))
        hf_to_megatron(folder, target, Layout())
    with pytest.raises(CheckpointError, match=r"other settings or of another source.*Delete it"):
        hf_to_megatron(folder, target, Layout(tensor=2))


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(path / WEIGHTS) | tensors
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, path / WEIGHTS, metadata={"format": "pt"})


def _truncate(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def _rename_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


def _shard_missing(path: Path) -> None:
    names = dict.fromkeys(load_file(path / WEIGHTS), "model-00001-of-00002.safetensors")
    (path / WEIGHTS).rename(path / "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


DOWN = "model.layers.0.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (_shard_missing, r"model-00002-of-00002\.safetensors, which"),
    "truncated shard": (_truncate, r"model\.safetensors is truncated"),
    "NaN": (
        lambda path: change(path, **{DOWN: torch.full((64, 96), torch.nan)}),
        rf"{DOWN} .* has 6144 values that are NaN or infinite",
    ),
    "dtype": (
        lambda path: change(path, **{DOWN: torch.zeros(64, 96).bfloat16()}),
        rf"{DOWN} .* is torch\.bfloat16, config\.json says torch\.float32; give --dtype",
    ),
    "extra": (lambda path: change(path, other=torch.zeros(2)), "1 tensors .* not use: other"),
    "missing": (lambda path: change(path, **{DOWN: None}), f"lacks 1 tensors .*{DOWN}"),
    "shape": (lambda path: change(path, **{DOWN: torch.zeros(2, 3)}), r"has shape \(2, 3\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources_are_named(name: str, folder: Path, tmp_path: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(folder, tmp_path / "there", Layout(tensor=2))
    assert not (tmp_path / "there").exists()


def test_unknown_architecture_names_the_known_ones_and_the_extra(
    folder: Path, tmp_path: Path
) -> None:
    _rename_architecture(folder)
    with pytest.raises(ConfigError, match=r"'gpt2'.*qwen3, .*mistral,.*megatron-spear\[bridge\]"):
        hf_to_megatron(folder, tmp_path / "there", Layout())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=4), r"num_key_value_heads=2 is not a multiple of --tensor-parallel 4"),
        (Layout(pipeline=3), r"num_hidden_layers=2 is not a multiple of --pipeline-parallel 3"),
        (Layout(expert=2), r"--expert-parallel 2, but the model has no experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model(
    layout: Layout, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_to_megatron(folder, tmp_path / "there", layout)


def test_full_disk_keeps_what_was_finished(folder: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE gives a real EFBIG from the kernel."""
    target = tmp_path / "there"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        with pytest.raises(
            CheckpointError, match=r"disk is full .*too large.*\.partial has what was finished"
        ):
            hf_to_megatron(folder, target, Layout(), max_file_bytes=50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not target.exists() and work_folder(target).is_dir()
    hf_to_megatron(folder, target, Layout(), max_file_bytes=50_000)
    assert compare(folder, target).differences == ()


def test_the_target_must_be_new(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        hf_to_megatron(folder, tmp_path / "there", Layout())


def _whole(folder: Path, target: Path) -> Path:
    hf_to_megatron(folder, target, Layout(tensor=2))
    return target


def test_broken_megatron_checkpoints_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \.metadata; expected a torch_dist"):
        megatron_to_hf(folder, tmp_path / "back")
    there = _whole(folder, tmp_path / "there")
    (there / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json; give .* --config"):
        megatron_to_hf(there, tmp_path / "back")
    megatron_to_hf(there, tmp_path / "back", config=folder)
    assert equal(folder, tmp_path / "back")
    content = (there / "__1_0.distcp").read_bytes()
    (there / "__1_0.distcp").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read from .*__1_0\.distcp.*cut off"):
        megatron_to_hf(there, tmp_path / "again", config=folder)
    (there / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"lacks __1_0\.distcp"):
        megatron_to_hf(there, tmp_path / "other", config=folder)


def test_a_checkpoint_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    there = _whole(folder, tmp_path / "there")
    tiny_hf_folder(tmp_path / "wider", intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"linear_fc1.* has shape .*expected .*256"):
        megatron_to_hf(there, tmp_path / "back", config=tmp_path / "wider")


def test_differences_are_told(folder: Path, tmp_path: Path) -> None:
    there = _whole(folder, tmp_path / "there")
    other = load_file(folder / WEIGHTS)[DOWN].clone()
    other[3, 4] += 0.5
    change(folder, **{DOWN: other})
    outcome = compare(folder, there)
    assert outcome.differences == (f"{DOWN}: 1 of 6144 values differ, by up to 0.5",)


def test_a_tensor_too_many_is_told(folder: Path, tmp_path: Path) -> None:
    there = _whole(folder, tmp_path / "there")
    change(folder, other=torch.zeros(2))
    with pytest.raises(CheckpointError, match="1 tensors that the model does not use: other"):
        compare(there, folder)


def test_writers_give_notes_that_json_can_hold(folder: Path, tmp_path: Path) -> None:
    """Else a conversion could not go on in another process."""
    seen: list[Any] = []

    def write(file: BinaryIO, shard: Shard) -> Any:
        file.write(b"x")
        seen.append(shard.file)
        return {"rows": [1, 2]}

    found: dict[str, Any] = {}
    convert.write_shards(
        tmp_path / "t",
        [Shard(file="a", content=None), Shard(file="b", content=None)],
        write,
        lambda work, notes: found.update(notes),
        about={},
    )
    assert found == {"a": {"rows": [1, 2]}, "b": {"rows": [1, 2]}} and seen == ["a", "b"]
