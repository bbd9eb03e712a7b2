"""TransformerEngine's layers, through the stand-in for it, against the local ones; FP8; the audit.

All cases of one number of ranks run one after the other in the same processes, which alone have the
stand-in; each test then looks at some of them.
"""

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.data.packing import pack
from megatron_spear.errors import ConfigError
from megatron_spear.policy.precision_audit import complaints
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder

MODELS = ("Qwen3", "Qwen2", "Qwen3Moe")
LOCAL, TE = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}
BF16 = {"precision": "bf16"}
SP = {"tensor_parallel": 2, "sequence_parallel": True}
ENDS = {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}
SPLIT = {"distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYERS = 4


def fp8(recipe: str, **changes: Any) -> dict[str, Any]:
    ends = ENDS if recipe == "delayed" else {}
    return BF16 | {"fp8": {"recipe": recipe} | ends | changes}


CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {
        **{f"{model} local": (model, LOCAL) for model in MODELS},
        **{f"{model} TE": (model, TE) for model in MODELS},
        "bf16 local": ("Qwen3", LOCAL | BF16),
        "bf16 TE": ("Qwen3", BF16),  # auto
        "delayed": ("Qwen3", fp8("delayed")),
        "tensorwise": ("Qwen3", fp8("tensorwise")),
        "blockwise": ("Qwen3", fp8("blockwise", format="hybrid")),
        "mxfp8": ("Qwen3", fp8("mxfp8")),
        "tensorwise, recompute": ("Qwen3", fp8("tensorwise") | {"recompute": "full"}),
        "tensorwise, experts": ("Qwen3Moe", fp8("tensorwise")),
        "held, delayed": ("Qwen3", fp8("delayed", parameters=True) | SPLIT),
        "held, experts": ("Qwen3Moe", fp8("blockwise", parameters=True) | SPLIT),
    },
    2: {
        "Qwen3 local": ("Qwen3", LOCAL | SP),
        "Qwen3 TE": ("Qwen3", TE | SP),
        "Qwen3 local CP2": ("Qwen3", LOCAL | {"context_parallel": 2}),
        "Qwen3 TE CP2": ("Qwen3", TE | {"context_parallel": 2}),
        "Qwen2 local": ("Qwen2", LOCAL | {"tensor_parallel": 2}),
        "Qwen2 TE": ("Qwen2", TE | {"tensor_parallel": 2}),
        "Qwen3Moe local": ("Qwen3Moe", LOCAL | SP),
        "Qwen3Moe TE": ("Qwen3Moe", TE | SP),
        "Qwen3Moe local EP2": ("Qwen3Moe", LOCAL | SP | {"expert_parallel": 2}),
        "Qwen3Moe TE EP2": ("Qwen3Moe", TE | SP | {"expert_parallel": 2}),
        "tensorwise VPP2": (
            "Qwen3",
            fp8("tensorwise") | {"pipeline_parallel": 2, "virtual_pipeline": 2},
        ),
        "tensorwise CP2": ("Qwen3", fp8("tensorwise") | {"context_parallel": 2}),
        "held, DP2": ("Qwen3", fp8("tensorwise", parameters=True) | SPLIT),
        "held, overlapped": ("Qwen3", fp8("tensorwise", parameters=True) | SPLIT | OVERLAP),
    },
}
CROSSED = [
    ("Qwen3 TE", "Qwen3 local"),
    ("Qwen3 local", "Qwen3 TE"),
    ("Qwen3Moe TE", "Qwen3Moe local"),
    ("Qwen3Moe local", "Qwen3Moe TE"),
]
STEPS = 3


Found = dict[str, dict[str, Any]]


def run(root: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> tuple[Found, dict[str, Any]]:
    """On every rank, what each case gives (``run_case``), and what is tried besides."""
    from megatron_spear.policy import parallel

    found: Found = {}
    for name, (model, changes) in cases.items():
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)
        found[name] = run_case(root, name, model, section, ctx)
        parallel.destroy(keep_world=True)
    besides: dict[str, Any] = {"refused": refused(root, found)}
    if len(cases) > len(CASES[2]):
        besides |= {f"{saved} in {other}": cross(root, saved, other) for saved, other in CROSSED}
    return found, besides


def cross(root: Path, saved: str, other: str) -> Any:
    """What the next steps report after one case's state is loaded into the other's policy."""
    from megatron_spear.policy import parallel

    model, changes = CASES[1][other]
    section = PolicySection(**changes)
    policy = make(root / model, section, parallel.initialize(section, seed=0, timeout_s=60))
    policy.load(root / f"{saved}-1")
    reports = [policy.train_step(packed_for(policy), WeightedNll()) for _ in range(STEPS - 1)]
    parallel.destroy(keep_world=True)
    return reports


def refused(root: Path, found: Found) -> str:
    """What the audit says of a model whose third layer has a linear of Megatron's own."""
    from megatron_spear.policy import parallel

    layout = {"pipeline_parallel": int("tensorwise VPP2" in found) + 1}
    section = PolicySection(**fp8("tensorwise"), **layout)
    ctx = parallel.initialize(section, seed=0, timeout_s=60)
    with plain_linear_in_layer(2, first=ctx.pipeline_rank * LAYERS // ctx.pipeline_size):
        try:
            make(root / "Qwen3", section, ctx)
        except ConfigError as error:
            return str(error)
        finally:
            parallel.destroy(keep_world=True)
    return "nothing was refused"


@contextlib.contextmanager
def plain_linear_in_layer(layer: int, first: int) -> Iterator[None]:
    """Inside, that layer's ``linear_proj`` is not TransformerEngine's."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    from megatron_spear.policy import transformer_engine

    original = transformer_engine.block_spec

    def block_spec(shape: Any, policy: PolicySection, num_layers: int) -> Any:
        spec = original(shape, policy, num_layers)
        specs = [copy.deepcopy(one) for one in spec.layer_specs]
        if first <= layer < first + num_layers:
            attention = specs[layer - first].submodules.self_attention
            attention.submodules.linear_proj = RowParallelLinear
        spec.layer_specs = specs
        return spec

    transformer_engine.block_spec = block_spec
    try:
        yield
    finally:
        transformer_engine.block_spec = original


def run_case(root: Path, name: str, model: str, section: PolicySection, ctx: Any) -> dict[str, Any]:
    from megatron_spear.policy import precision_audit

    policy = make(root / model, section, ctx)
    packed, loss = packed_for(policy), WeightedNll()
    result = {"untrained": exported(policy), "logprobs": policy.logprobs(packed, 0.9)}
    if section.fp8.recipe != "none":
        with contextlib.suppress(ConfigError):
            policy.keep_reference()
    result["reports"] = [policy.train_step(packed, loss)]
    if not section.distributed_optimizer:
        result["gradient"] = exported_gradient(policy)
    policy.save(root / f"{name}-{ctx.world_size}")
    result["saved"] = exported(policy)
    result["reports"] += [policy.train_step(packed, loss) for _ in range(STEPS - 1)]
    result["seen"] = precision_audit.observe(policy)
    if policy._reference:
        result["reference"] = policy.logprobs(packed, 0.9, reference=True)
        result["now"] = policy.logprobs(packed, 0.9)
    other = make(root / model, section, ctx)
    other.load(root / f"{name}-{ctx.world_size}")
    result["loaded"] = exported(other)
    result["going on"] = [other.train_step(packed, loss) for _ in range(STEPS - 1)]
    result["marked"] = marked(policy)
    return result


def make(folder: Path, section: PolicySection, ctx: Any) -> Any:
    from megatron_spear.policy.policy import MegatronPolicy

    return MegatronPolicy.from_hf(folder, section, OptimizerSection(lr=1e-3), 10, ctx)


def packed_for(policy: Any) -> Any:
    if not policy.ctx.is_controller:
        return None
    return pack(
        *random_samples(),
        data_parallel=policy.ctx.data_size,
        tokens_per_microbatch=200,
        pad_multiple=policy.pad_multiple,
        sequence_multiple=policy.sequence_multiple,
        mix_lengths=policy.mix_lengths,
        microbatch_multiple=policy.microbatch_multiple,
    )


def exported(policy: Any) -> dict[str, np.ndarray]:
    return {n: t.float().numpy().copy() for n, t in policy.export_weights() if t is not None}


def exported_gradient(policy: Any) -> dict[str, np.ndarray]:
    """The clipped gradient of the last step, by way of the weight export."""
    parameters = policy._parameters()
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    result = exported(policy)
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    return result


def marked(policy: Any) -> dict[str, tuple[bool, int, bool]]:
    """By local name, how Megatron takes each matrix: split, along which axis, as dense."""
    from megatron_spear.policy.weights import parameters_of

    return {
        name: (p.tensor_model_parallel, p.partition_dim, getattr(p, "allreduce", True))
        for chunk in policy._chunks
        for name, p in parameters_of(chunk).items()
        if p.dim() == 2 and "router" not in name
    }


@cache
def results_of(ranks: int, root: Path) -> tuple[Found, list[dict[str, Any]]]:
    every = run_ranks(run, ranks, root, CASES[ranks], timeout_s=280, fake_te=True)
    found = every[0][0]
    for name, result in found.items():  # the audit's other pieces of the model
        result["seen"] = sorted({entry for rank, _ in every for entry in rank[name]["seen"]})
    return found, [besides for _, besides in every]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("te")
    for model in MODELS:
        tiny_hf_folder(root / model, model, num_hidden_layers=LAYERS)
    return root


PAIRS = [
    *((1, f"{model} local", f"{model} TE") for model in MODELS),
    *((2, name, name.replace("local", "TE")) for name in CASES[2] if "local" in name),
]
FP8 = [(ranks, name) for ranks in (1, 2) for name, (_, v) in CASES[ranks].items() if "fp8" in v]


def gap(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest relative error of a tensor."""
    assert set(ours) == set(theirs)
    return max(float(np.linalg.norm(ours[k] - v) / np.linalg.norm(v)) for k, v in theirs.items())


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> np.ndarray:
    return np.abs(np.concatenate(ours) - np.concatenate(theirs))


@pytest.mark.parametrize(("ranks", "local", "te"), PAIRS)
def test_equals_local_layers(ranks: int, local: str, te: str, root: Path) -> None:
    found, _ = results_of(ranks, root)
    ours, theirs = found[te], found[local]
    assert distance(ours["logprobs"], theirs["logprobs"]).max() < 2e-5
    assert gap(ours["gradient"], theirs["gradient"]) < 1e-4
    assert gap(ours["saved"], theirs["saved"]) < 1e-3
    assert ours["marked"] == theirs["marked"]
    norms = [[r["grad_norm"] for r in one["reports"]] for one in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(("ranks", "name"), [pair[::2] for pair in PAIRS])
def test_weights_come_out_as_they_went_in(ranks: int, name: str, root: Path) -> None:
    found, _ = results_of(ranks, root)
    with HfReader(root / CASES[ranks][name][0]) as reader:
        for tensor, values in found[name]["untrained"].items():
            assert (reader.get(tensor, values.shape).numpy() == values).all(), tensor


def test_half_precision_equals_local_layers(root: Path) -> None:
    found, _ = results_of(1, root)
    ours, theirs = found["bf16 TE"], found["bf16 local"]
    assert distance(ours["logprobs"], theirs["logprobs"]).mean() < 0.01
    assert gap(ours["gradient"], theirs["gradient"]) < 0.05


@pytest.mark.parametrize(("ranks", "name"), [(r, name) for r in (1, 2) for name in CASES[r]])
def test_a_loaded_state_goes_on_as_the_saved_one(ranks: int, name: str, root: Path) -> None:
    found, _ = results_of(ranks, root)
    went, goes = (
        [r["loss/total"] for r in reports]
        for reports in (found[name]["reports"][1:], found[name]["going on"])
    )
    assert goes == pytest.approx(went, rel=1e-6)


@pytest.mark.parametrize(("saved", "other"), CROSSED)
def test_a_state_loads_into_the_other_layers(saved: str, other: str, root: Path) -> None:
    found, besides = results_of(1, root)
    for key in ("loss/total", "grad_norm"):
        goes = [r[key] for r in besides[0][f"{saved} in {other}"]]
        assert goes == pytest.approx([r[key] for r in found[saved]["reports"][1:]], rel=1e-4)


@pytest.mark.parametrize(("ranks", "name"), FP8)
def test_fp8_trains_near_bf16(ranks: int, name: str, root: Path) -> None:
    model = CASES[ranks][name][0]
    exact = results_of(1, root)[0][f"{model} local"]
    ours = results_of(ranks, root)[0][name]
    losses = [[r["loss/total"] for r in one["reports"]] for one in (ours, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.005) and losses[0][0] > losses[0][2] + 0.1
    error = distance(ours["logprobs"], exact["logprobs"]).mean()
    half, plain = (results_of(1, root)[0][one]["logprobs"] for one in ("bf16 TE", "Qwen3 local"))
    assert 2 * distance(half, plain).mean() < error < 0.1, "FP8 rounds far more than bf16 does"


@pytest.mark.parametrize(("ranks", "name"), FP8)
def test_the_reference_policy_runs_in_fp8_or_is_refused(ranks: int, name: str, root: Path) -> None:
    """Delayed scaling has scales of the present weights' values, so only about the same."""
    result = results_of(ranks, root)[0][name]
    assert ("reference" in result) == ("held" not in name)
    if "reference" in result and ranks == 1:
        error = distance(result["reference"], result["logprobs"]).max()
        assert error < 0.5 if name == "delayed" else error == 0
        assert distance(result["now"], result["logprobs"]).mean() > 0.05


def test_recomputation_changes_nothing(root: Path) -> None:
    found, _ = results_of(1, root)
    again, kept = found["tensorwise, recompute"], found["tensorwise"]
    assert [r["loss/total"] for r in again["reports"]] == [r["loss/total"] for r in kept["reports"]]


def test_backward_multiplies_with_gathered_weights_after_a_save(root: Path) -> None:
    """Saves and exports gather weights that a forward pass would have gathered."""
    found, _ = results_of(2, root)
    for key in ("loss/total", "grad_norm"):
        ours, plain = (
            [r[key] for r in found[f"held, {name}"]["reports"]] for name in ("overlapped", "DP2")
        )
        assert ours == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", [name for _, name in FP8 if "held" in name])
def test_weights_held_in_fp8_come_out_rounded(name: str, root: Path) -> None:
    (ranks,) = (r for r, other in FP8 if other == name)
    model, changes = CASES[ranks][name]
    exact = results_of(1, root)[0][f"{model} local"]["untrained"]
    ours = results_of(ranks, root)[0][name]["untrained"]
    linear = "model.layers.1.self_attn.o_proj.weight"
    error = np.linalg.norm(ours[linear] - exact[linear]) / np.linalg.norm(exact[linear])
    assert 0.01 < error < 0.04, "a float8's relative rounding error is at most 1/16"
    assert len(np.unique(np.abs(ours[linear]))) < 2**7 * (16 if "blockwise" in str(changes) else 1)


@pytest.mark.parametrize(("ranks", "name"), FP8)
def test_the_audit_sees_what_runs(ranks: int, name: str, root: Path) -> None:
    model, changes = CASES[ranks][name]
    section = PolicySection(**changes).fp8
    seen = results_of(ranks, root)[0][name]["seen"]
    linears = {entry.name for entry in seen if entry.layer >= 0}
    expected = {"linear_qkv", "linear_proj"}
    expected |= (
        {"linear_fc1", "linear_fc2"}
        if model == "Qwen3"
        else {"router", "experts.linear_fc1", "experts.linear_fc2"}
    )
    assert linears == expected
    assert list(complaints(seen, section, LAYERS)) == []
    layers = {e.layer for e in seen if e.precision.startswith("fp8") and e.name == "linear_proj"}
    first, last = section.bf16_layers_at_start, LAYERS - section.bf16_layers_at_end
    assert layers == set(range(first, last))
    assert {e.precision for e in seen if e.name == "output_layer"} == {"bf16"}
    assert {e.precision for e in seen if e.name == "router"} <= {"fp32"}
    assert {e.held for e in seen if e.precision.startswith("fp8")} == {section.parameters}


def test_the_audit_stops_all_ranks_for_a_linear_that_is_not_in_fp8(root: Path) -> None:
    texts = [r["refused"] for ranks in (1, 2) for r in results_of(ranks, root)[1]]
    assert len(texts) == 3 and len(set(texts)) == 1
    assert "\n  layer 2 linear_proj: bf16, expected fp8 (tensorwise)\n" in texts[0]
    assert texts[0].count("expected") == 1
