"""By how much checkpoints differ: by hand, of every pair of kinds, and what cannot be compared."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_spear.conversion import differences
from megatron_spear.conversion.convert import Layout, hf_to_megatron
from megatron_spear.conversion.differences import change_of, find_differences
from megatron_spear.conversion.torch_dist import BlockWriter, Place, write_description
from megatron_spear.errors import CheckpointError
from megatron_spear.testing.tiny import tiny_hf_folder

WEIGHTS = "model.safetensors"


def _folder(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    save_file(dict(tensors), path / WEIGHTS)
    return path


def test_the_example_by_hand() -> None:
    found = change_of("w", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]))
    assert (found.max_abs, found.mean_abs, found.norm, found.first_norm) == (1.0, 0.5, 1.0, 5.0)
    assert (found.relative, found.num_changed, found.bitwise) == (0.2, 1, False)


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_pieces_do_not_matter(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "_PIECE", piece)
    first, second = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    found, off = change_of("w", first, second), (second - first).abs()
    assert found.max_abs == off.max().item()
    assert found.mean_abs == pytest.approx(off.mean().item(), rel=1e-12)
    assert found.relative == pytest.approx((off.norm() / first.norm()).item(), rel=1e-12)


def test_what_is_not_a_number() -> None:
    strange = torch.tensor([math.nan, math.inf, 1.0])
    assert change_of("w", strange, strange.clone()).bitwise
    found = change_of("w", torch.ones(3), torch.tensor([1.0, math.nan, 2.0]))
    assert math.isnan(found.max_abs) and math.isnan(found.relative) and not found.bitwise
    assert change_of("w", torch.zeros(2), torch.ones(2)).relative == math.inf
    zeros = change_of("w", torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (zeros.bitwise, zeros.relative) == (False, 0.0), "a sign is a bit"
    rounded = change_of("w", torch.tensor([0.1]), torch.tensor([0.1]).bfloat16())
    assert rounded.dtypes == ("float32", "bfloat16") and 0 < rounded.relative < 0.004


def test_folders_of_any_model(tmp_path: Path) -> None:
    one = _folder(tmp_path / "a", {
        "layer.10.w": torch.ones(2), "layer.9.w": torch.ones(2), "gone": torch.ones(1),
        "other": torch.ones(2, 3),
    })  # fmt: skip
    two = _folder(tmp_path / "b", {
        "layer.10.w": torch.ones(2), "layer.9.w": torch.tensor([1.0, 3.0]), "new": torch.ones(1),
        "other": torch.ones(3, 2),
    })  # fmt: skip
    found = find_differences(one, two)
    assert (found.only_first, found.only_second) == (("gone",), ("new",))
    (misfit,) = found.misfits
    assert (misfit.name, misfit.why) == ("other", "shapes (2, 3) and (3, 2)")
    assert [change.name for change in found.changes] == ["layer.9.w", "layer.10.w"]
    assert [change.bitwise for change in found.changes] == [False, True]
    assert found.relative(optimizer=False) == pytest.approx(2 / 2)
    assert not found.equal and find_differences(one, one).equal


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_both_kinds_and_all_layouts(architecture: str, tmp_path: Path) -> None:
    """A changed layer is told by its name of either kind, whatever layout wrote it."""
    hf = tmp_path / "hf"
    tiny_hf_folder(hf, architecture)
    expert = Layout(expert=2) if architecture == "Qwen3Moe" else Layout(tensor=2)
    hf_to_megatron(hf, tmp_path / "one", Layout())
    hf_to_megatron(hf, tmp_path / "two", expert)
    split = find_differences(tmp_path / "one", tmp_path / "two")
    assert split.equal
    padded = ("embedding.word_embeddings.weight: 211 and 212 rows",)
    assert split.padded[:1] == (padded if architecture == "Qwen3" else ())
    assert find_differences(hf, tmp_path / "two").equal
    tensors = load_file(hf / WEIGHTS)
    (name,) = [n for n in tensors if n.endswith("layers.1.self_attn.o_proj.weight")]
    tensors[name][0, 0] += 1.0
    save_file(tensors, hf / WEIGHTS, metadata={"format": "pt"})
    hf_to_megatron(hf, tmp_path / "changed", expert)
    for pair, changed in (
        ((hf, tmp_path / "one"), name),
        ((tmp_path / "one", tmp_path / "changed"),
         "decoder.layers.1.self_attention.linear_proj.weight"),
    ):  # fmt: skip
        found = find_differences(*pair)
        assert [c.name for c in found.changes if not c.bitwise] == [changed]
        assert not found.equal and not found.misfits
        assert found.relative(optimizer=True) == 0.0


def test_the_optimizers_state_is_apart(tmp_path: Path) -> None:
    folders = []
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        with (folder / "__0_0.distcp").open("wb") as file:
            writer = BlockWriter(file, "__0_0.distcp")
            for key, tensor in {
                "weight": torch.ones(4),
                "optimizer.state.exp_avg.weight": torch.full((4,), value),
                "optimizer.state.step": torch.tensor(value),
            }.items():
                shape = tuple(tensor.shape)
                writer.tensor(Place(key=key, index=(), shape=shape), (0,) * len(shape), tensor)
        write_description(folder, writer.blocks)
        folders.append(folder)
    found = find_differences(*folders)
    assert found.relative(optimizer=False) == 0.0
    assert found.relative(optimizer=True) == pytest.approx(1.0)
    assert {c.name: c.max_abs for c in found.changes if not c.bitwise} == {
        "optimizer.state.exp_avg.weight": 1.0, "optimizer.state.step": 1.0
    }  # fmt: skip


def test_a_damaged_tensor_is_told_and_the_others_compared(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    tiny_hf_folder(hf)
    hf_to_megatron(hf, tmp_path / "one", Layout(tensor=2))
    hf_to_megatron(hf, tmp_path / "two", Layout(tensor=2))
    victim = tmp_path / "two" / "__1_0.distcp"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    found = find_differences(tmp_path / "one", tmp_path / "two")
    assert found.misfits and found.changes and not found.equal
    assert "damaged or cut off" in found.misfits[0].why


def test_bad_input(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    tiny_hf_folder(hf)
    hf_to_megatron(hf, tmp_path / "there", Layout())
    bare = _folder(tmp_path / "bare", load_file(hf / WEIGHTS))
    (tmp_path / "there" / "config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"has a config\.json; give .* --config"):
        find_differences(bare, tmp_path / "there")
    assert find_differences(bare, tmp_path / "there", config=hf).equal
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        find_differences(tmp_path, hf)
