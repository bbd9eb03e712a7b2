"""The same run on several ranks: the layout changes who computes, not what.

Jobs that begin, go on and fail are started by torchrun too; the rest run on forked ranks, which
have imported torch already.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from same_records import check_same_records

from megatron_spear.conversion.word_tokenizer import make_tokenizer
from megatron_spear.envs.alfworld.phrases import NAMES, PHRASES
from megatron_spear.envs.alfworld.vocabulary import alfworld_words
from megatron_spear.testing.tiny import tiny_hf_folder

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("run.steps=2", "policy.optimizer.lr=0.001", "checkpoint.every=1")
Records = Callable[[Path], dict[int, dict[str, Any]]]
Same = Callable[[Path, Path, float], None]

SAME = ("rollout/", "reward/", "replay/rows", "replay/inserted", "train/num_rows", "optimizer/lr")
"""Equal to the last digit but for rounding: the same games, draws and selections."""


@pytest.fixture(scope="module")
def one_rank(spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one-rank") / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS)
    return run_dir


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, "policy.tensor_parallel=2", id="tensor2"),
        pytest.param(2, "policy.pipeline_parallel=2", id="pipeline2", marks=pytest.mark.slow),
        pytest.param(2, "policy.context_parallel=2", id="context2", marks=pytest.mark.slow),
        pytest.param(2, "policy.tensor_parallel=1", id="data2", marks=pytest.mark.slow),
        pytest.param(
            4,
            "policy={tensor_parallel: 2, pipeline_parallel: 2}",
            id="tensor2-pipeline2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_more_ranks_same_run(
    ranks: int,
    layout: str,
    one_rank: Path,
    on_ranks: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Same,
) -> None:
    run_dir = tmp_path / "run"
    done = on_ranks(ranks, f"run.dir={run_dir}", *SETTINGS, layout)
    assert f"{ranks} rank(s)" in done.out
    expected, found = training_records(one_rank), training_records(run_dir)
    assert list(found) == [1, 2]
    for step, record in expected.items():
        assert found[step].keys() == record.keys()
        same = {k: v for k, v in record.items() if k.startswith(SAME)}
        assert {k: found[step][k] for k in same} == pytest.approx(same, rel=1e-6), f"step {step}"
        assert found[step] == pytest.approx(record, rel=1e-3, abs=1e-5), f"step {step}"
    check_same_records(one_rank, run_dir)
    same_weights(one_rank, run_dir, 1e-5)


def test_several_ranks_make_the_warm_start(launch: Callable[..., Any], tmp_path: Path) -> None:
    """One rank writes the folder, all of them start from it: none may look before it is there."""
    settings = (f"run.dir={tmp_path / 'run'}", "run.steps=1", "sft.steps=2")
    launched = launch(*settings, "policy.tensor_parallel=2", ranks=2, cache_dir=tmp_path / "cache")
    done = launched.wait(240)
    assert done.status == 0, done.err
    assert (tmp_path / "run" / "summary.json").is_file()
    assert [p.name[:5] for p in sorted((tmp_path / "cache").iterdir())] == ["tiny-", "warm-"]


@pytest.mark.slow
def test_a_mistake_is_told_by_the_rank_that_found_it(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    """The controller alone reads the folder; no other rank waits for it or hides its message."""
    settings = (f"run.dir={tmp_path / 'run'}", f"model.path={tmp_path / 'absent'}")
    done = launch(*settings, "policy.tensor_parallel=2", ranks=2).wait(120)
    assert done.status != 0
    assert f"error: {tmp_path / 'absent'} has no config.json" in done.err
    assert "[rank1]" not in done.err
    assert done.err.count("Traceback") <= 1, "torchrun's own only"


def test_a_run_goes_on_at_another_layout(
    one_rank: Path,
    launch: Callable[..., Any],
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Same,
) -> None:
    """Step 1 on one rank, step 2 on two tensor-parallel ranks."""
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS, "run.stop_after=1")
    done = launch(f"resume={run_dir}", *SETTINGS, "policy.tensor_parallel=2", ranks=2).wait(240)
    assert done.status == 0, done.err
    record = training_records(one_rank)[2]
    assert training_records(run_dir)[2] == pytest.approx(record, rel=1e-3, abs=1e-5)
    same_weights(one_rank, run_dir, 1e-5)


@pytest.mark.slow
def test_a_run_of_experts_goes_on_with_them_on_two_ranks(
    on_ranks: Callable[..., Any],
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Same,
) -> None:
    """Step 1 on one rank, step 2 with half of the experts on each of two."""
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    tokenizer = make_tokenizer(alfworld_words(), PHRASES, NAMES)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "head_dim": 8, "num_experts": 4}
    tiny_hf_folder(model, "Qwen3Moe", **sizes, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(model)
    settings = (*SETTINGS, f"model.path={model}", "sft.steps=30")
    spear("train", f"run.dir={one}", *settings)
    spear("train", f"run.dir={two}", *settings, "run.stop_after=1")
    on_ranks(2, f"resume={two}", *settings, "policy.expert_parallel=2")
    record = training_records(one)[2]
    assert record["optimizer/grad_norm"] > 0
    assert training_records(two)[2] == pytest.approx(record, rel=1e-3, abs=1e-5)
    same_weights(one, two, 1e-5)
