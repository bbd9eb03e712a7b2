"""Every layout gives on recorded trajectories what one rank gives: log-probs, gradients, weights
after training, state.

All layouts of one number of ranks run one after the other in the same processes; each test then
looks at one of them.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_matrix import DENSE, exported, exported_gradient, worst

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.recorded import recorded_samples
from megatron_spear.testing.tiny import VOCAB, tiny_hf_folder

STEPS = 3
TEMPERATURE = 0.9


recorded = cache(recorded_samples)


def run_layouts(
    folder: Path, layouts: dict[str, dict[str, Any]], with_state: bool = True
) -> dict[str, Any]:
    """On every rank: each layout's log-probs, gradient, reports and weights; with ``with_state``
    also the weights that it saved and loaded."""
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    results: dict[str, Any] = {}
    for name, changes in layouts.items():
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)

        def make(section: PolicySection = section, ctx: Any = ctx) -> MegatronPolicy:
            optimizer = OptimizerSection(lr=1e-4, schedule="cosine", clip_grad=0.5)
            return MegatronPolicy.from_hf(folder, section, optimizer, 10, ctx)

        policy = make()
        packed, loss = None, None
        if ctx.is_controller:
            packed = pack(
                *recorded(folder, temperature=TEMPERATURE),
                data_parallel=ctx.data_size,
                tokens_per_microbatch=150,
                pad_multiple=policy.pad_multiple,
                sequence_multiple=policy.sequence_multiple,
                microbatch_multiple=policy.microbatch_multiple,
            )
            loss = PolicyLoss.from_sections(
                AlgorithmSection(), ReplaySection().loss, temperature=TEMPERATURE
            )
        logprobs = policy.logprobs(packed, TEMPERATURE, with_entropy=True)
        untrained = exported(policy)
        reports = [policy.train_step(packed, loss)]
        gradient = exported_gradient(policy)
        reports += [policy.train_step(packed, loss) for _ in range(STEPS - 1)]
        results[name] = [logprobs, untrained, gradient, reports, exported(policy)]
        if with_state:
            state = folder / f"state-{name}"
            policy.save(state)
            other = make()
            other.load(state)
            results[name].append(exported(other))
        parallel.destroy(keep_world=True)
    return results


def load_one(folder: Path, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """One rank: the weights of states that other layouts saved."""
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    ctx = parallel.initialize(PolicySection(), seed=0, timeout_s=60)
    policies = {
        split: MegatronPolicy.from_hf(
            folder, PolicySection(distributed_optimizer=split), OptimizerSection(), 10, ctx
        )
        for split in (False, True)
    }
    loaded = {}
    for name in names:
        policy = policies["distributed" in name]
        policy.load(folder / f"state-{name}")
        assert policy.num_steps == STEPS
        loaded[name] = exported(policy)
    return loaded


@cache
def results_of(world_size: int, tied: bool, root: Path) -> dict[str, Any]:
    folder = root / f"tied-{tied}"
    names = {k: v for k, (ranks, v) in DENSE.items() if ranks == world_size} or {"one": {}}
    return run_ranks(run_layouts, world_size, folder, names, tied, timeout_s=240)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for tied in (False, True):
        tiny_hf_folder(root / f"tied-{tied}", num_hidden_layers=4, tie_word_embeddings=tied)
    return root


every_layout = pytest.mark.parametrize("name", DENSE)
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@tied_or_not
@every_layout
def test_equals_one_rank(name: str, tied: bool, root: Path) -> None:
    one = results_of(1, tied, root)["one"]
    got = results_of(DENSE[name][0], tied, root)[name]
    assert_equal(got, one)


def assert_equal(got: Any, one: Any) -> None:
    """What ``run_layouts`` gave for a layout is what it gave for one rank."""
    for ours, theirs in zip(got[0], one[0], strict=True):  # log-probs, entropies
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert worst(got[1], one[1]) == 0.0  # import and export
    assert worst(got[2], one[2]) < 1e-6  # gradients, clipped to a norm of 0.5
    for key, gradient in one[2].items():
        difference = np.linalg.norm(got[2][key] - gradient) / np.linalg.norm(gradient)
        assert difference < 1e-5, f"gradient of {key} differs by {difference}"
    for ours, theirs in zip(got[3], one[3], strict=True):
        assert abs(ours["loss/total"] - theirs["loss/total"]) < 1e-6
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-5)  # some are sums around 0
    assert worst(got[4], one[4]) < 1e-5  # after three optimizer steps
    assert worst(one[4], one[1]) > 1e-4  # which did something


@every_layout
def test_state_survives_and_loads_on_one_rank(name: str, root: Path) -> None:
    got = results_of(DENSE[name][0], True, root)[name]
    assert worst(got[5], got[4]) == 0.0
    for layout in DENSE:
        results_of(DENSE[layout][0], True, root)
    assert worst(loaded_on_one(root)[name], got[4]) == 0.0


@cache
def loaded_on_one(root: Path) -> dict[str, dict[str, np.ndarray]]:
    return run_ranks(load_one, 1, root / "tied-True", list(DENSE), timeout_s=120)[0]


def split_logprobs(rank_width: int) -> tuple[float, float]:
    """Worst difference of values and gradients of the vocab-parallel log-prob, in float64."""
    import torch.distributed as dist

    from megatron_spear.algorithms.logprobs import token_logprobs

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    draw = torch.Generator().manual_seed(0)
    whole = 5 * torch.randn(17, VOCAB, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (17,), generator=draw)
    padded = torch.cat((whole, torch.full((17, 2 * rank_width - VOCAB), 99.0)), 1)
    columns = slice(rank * rank_width, (rank + 1) * rank_width)
    mine = padded[:, columns].clone().requires_grad_()
    whole.requires_grad_()
    p, h = token_logprobs(mine, labels, vocab_size=VOCAB, group=group, entropy_grad=True)
    want = whole.log_softmax(-1)
    want_p, want_h = want.gather(1, labels[:, None]).squeeze(1), -(want.exp() * want).sum(-1)
    values = max((p - want_p).abs().max().item(), (h - want_h).abs().max().item())
    (p.square() + 2 * h).sum().backward()
    (want_p.square() + 2 * want_h).sum().backward()
    full = torch.cat((whole.grad, torch.zeros(17, 2 * rank_width - VOCAB)), 1)[:, columns]
    return values, (mine.grad - full).abs().max().item()


@pytest.mark.parametrize("rank_width", [106, 300])
def test_split_vocabulary(rank_width: int) -> None:
    """300: the second rank holds nothing but padding."""
    for values, gradients in run_ranks(split_logprobs, 2, rank_width, timeout_s=60):
        assert values < 1e-12 and gradients < 1e-12
