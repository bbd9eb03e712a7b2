"""Where slices lie in an engine's parameters, what the engine refuses, and what it may import."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.receivers import sglang
from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded.records import HeldTensor

H = 4


def held(
    name: str, rows: tuple[int, int], shape: tuple[int, ...] | None = None, dtype: str = "float32"
) -> HeldTensor:
    """Rows of a matrix with ``H`` columns, of twice as many rows if no shape is given."""
    return HeldTensor(
        name=name, dtype=dtype, shape=shape or (2 * rows[1], H), axis=0, start=rows[0], stop=rows[1]
    )


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_queries_keys_and_values_follow_each_other() -> None:
    fused = numbered(10, H)
    name = "model.layers.0.self_attn."
    tensors = [
        held(name + "v_proj.weight", (2, 4)),
        held(name + "q_proj.weight", (6, 12)),
        held(name + "k_proj.weight", (2, 4)),
    ]
    v, q, k = locate(tensors, {name + "qkv_proj.weight": fused})
    assert torch.equal(q, fused[:6]) and torch.equal(k, fused[6:8]) and torch.equal(v, fused[8:])
    v.fill_(-1.0)
    assert (fused[8:] == -1.0).all(), "views, not copies"


def test_biases_and_columns() -> None:
    name = "model.layers.0."
    bias = numbered(6)
    down = numbered(H, 3)
    columns_of = replace(held(f"{name}mlp.down_proj.weight", (3, 6), (H, 6)), axis=1)
    tensors = [*(held(f"{name}self_attn.{p}_proj.bias", (0, 2), (4,)) for p in "qkv"), columns_of]
    *_, value, columns = locate(
        tensors, {f"{name}self_attn.qkv_proj.bias": bias, f"{name}mlp.down_proj.weight": down}
    )
    assert torch.equal(value, bias[4:]) and columns.shape == (H, 3)


@pytest.mark.parametrize("below", ["", "routed_experts."], ids=["SGLang", "vLLM"])
@pytest.mark.parametrize("up_first", [False, True])
def test_experts_are_numbered_from_the_first_held(below: str, up_first: bool) -> None:
    name = "model.layers.0.mlp.experts."
    w13, w2 = numbered(2, 6, H), numbered(2, H, 3)
    tensors = []
    for expert in (4, 5):
        tensors += [
            held(f"{name}{expert}.gate_proj.weight", (0, 3), (3, H)),
            held(f"{name}{expert}.up_proj.weight", (0, 3), (3, H)),
            held(f"{name}{expert}.down_proj.weight", (0, H), (H, 3)),
        ]
    parameters = {f"{name}{below}w13_weight": w13, f"{name}{below}w2_weight": w2}
    views = locate(tensors, parameters, lambda name: up_first and "w13" in name)
    halves = (w13[1, 3:], w13[1, :3]) if up_first else (w13[1, :3], w13[1, 3:])
    assert torch.equal(views[3], halves[0]) and torch.equal(views[4], halves[1])
    assert torch.equal(views[5], w2[1]) and torch.equal(views[2], w2[0])


def embedding(start: int, stop: int, vocab: int) -> HeldTensor:
    return held("model.embed_tokens.weight", (start, stop), (vocab, H))


@pytest.mark.parametrize(
    ("part", "rows", "fits"),
    [
        (embedding(0, 64, 100), 64, True),
        (embedding(64, 100, 100), 64, True),
        (embedding(0, 100, 100), 128, True),
        (embedding(0, 50, 100), 64, False),  # more rows of the vocabulary belong there
        (embedding(50, 100, 100), 64, False),  # begins elsewhere
        (embedding(0, 100, 100), 64, False),
    ],
)
def test_rows_of_an_embedding(part: HeldTensor, rows: int, fits: bool) -> None:
    parameters = {part.name: numbered(rows, H)}
    if fits:
        (view,) = locate([part], parameters)
        assert torch.equal(view, parameters[part.name][: part.stop - part.start])
    else:
        with pytest.raises(ValueError, match=r"embed_tokens\.weight is \(64, 4\) in the engine"):
            locate([part], parameters)


def test_all_that_does_not_fit_is_told() -> None:
    tensors = [
        held("model.norm.weight", (0, 4), (4,), "bfloat16"),
        held("model.layers.0.mlp.gate_proj.weight", (0, 2)),
        held("model.layers.0.mlp.up_proj.weight", (0, 2)),
        held("unknown.weight", (0, 2)),
        held("model.layers.0.mlp.experts.3.down_proj.weight", (0, H), (H, 3)),
    ]
    parameters = {
        "model.norm.weight": numbered(4),
        "model.layers.0.mlp.gate_up_proj.weight": numbered(6, H),
        "lm_head.weight": numbered(4, H),
        "model.layers.0.mlp.experts.w2_weight": numbered(2, H, 3),
    }
    with pytest.raises(ValueError) as error:
        locate(tensors, parameters)
    told = str(error.value)
    for line in (
        "lm_head.weight is a parameter of the engine that the trainer does not send",
        "model.norm.weight is float32 in the engine and bfloat16 in the trainer",
        "gate_up_proj.weight is (6, 4) in the engine, the trainer sends "
        "model.layers.0.mlp.gate_proj.weight (2, 4) + model.layers.0.mlp.up_proj.weight (2, 4)",
        "unknown.weight: the engine has no unknown.weight",
        "experts.w2_weight has 2 experts; the trainer sends [3]",
    ):
        assert line in told


def test_scales_that_an_engine_chooses_itself_are_left_alone() -> None:
    """SGLang has those of its cache among the parameters of a model in FP8."""
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = [held(name, (0, 4), (4, H)), held(f"{name}_scale_inv", (0, 1), (1, 1))]
    own = {f"model.layers.0.self_attn.attn.{kind}_scale": torch.tensor(3.0) for kind in "kv"}
    sent = {name: numbered(4, H), f"{name}_scale_inv": numbered(1, 1)}
    assert len(locate(tensors, sent | own)) == 2
    assert all(value == 3.0 for value in own.values())
    manifest = Manifest(shapes={name: (4, H)}, quantized=frozenset({name}))
    assert manifest.problem(sent | own) is None, "both ends know the same names"
    with pytest.raises(ValueError, match=r"o_proj\.weight_scale_inv is a parameter"):
        locate(tensors[:1], sent | own)


def test_a_message_that_cannot_be_read_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    """An exception would end SGLang's server."""
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    sglang.load(model, [("x", torch.zeros(3, dtype=torch.uint8))])
    sglang.load(model, [])
    sglang.load(torch.nn.Module(), [("x", torch.zeros(3))])
    assert len(caplog.records) == 3 and "weights were not received" in caplog.text
    assert torch.equal(model.weight, before)


FORBIDDEN = ("pydantic", "megatron.core", "transformers", "safetensors")


def test_the_receivers_import_nothing_heavy() -> None:
    """In the engines' environments this package's other needs are absent or of other versions."""
    code = f"""
import sys
for name in {FORBIDDEN!r}:
    sys.modules[name] = None
import megatron_spear.weight_sync.receivers.sglang
import megatron_spear.testing.engine_rank
own = sorted(m for m in sys.modules if m.startswith("megatron_spear."))
print(*own)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {
        "megatron_spear.background",
        "megatron_spear.peer_groups",
        "megatron_spear.testing",
        "megatron_spear.testing.engine_rank",
        "megatron_spear.weight_sync",
        "megatron_spear.weight_sync.receivers",
        "megatron_spear.weight_sync.receivers.places",
        "megatron_spear.weight_sync.receivers.sglang",
        "megatron_spear.weight_sync.sharded",
        "megatron_spear.weight_sync.sharded.link",
        "megatron_spear.weight_sync.sharded.receiver",
        "megatron_spear.weight_sync.sharded.records",
    }
