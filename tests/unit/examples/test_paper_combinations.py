"""Every combination of the paper's tasks, methods and layouts: what check-config and plan say."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from megatron_spear.cluster.roles import require_settings
from megatron_spear.cluster.signal_time import signal_warning
from megatron_spear.config.check import check_config
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError

ROOT = Path(__file__).parents[3]
WITHIN_GB = 1.5
"""The planner's formulas may be refined; a layout that needs this much more is another one."""

GIGABYTES = {
    ("qwen2.5-1.5b-8gpus",): 65,
    ("qwen2.5-1.5b-32gpus",): 52,
    ("qwen2.5-7b-8gpus",): 74,
    ("qwen2.5-7b-32gpus",): 66,
    ("qwen2.5-32b-8h200",): 126,
    ("qwen2.5-32b-32gpus",): 77,
    ("qwen2.5-32b-32gpus", "h200"): 125.5,
    ("qwen2.5-32b-128gpus",): 72,
    ("qwen2.5-32b-128gpus", "h200"): 115,
    ("qwen2.5-32b-512gpus",): 74,
    ("qwen2.5-32b-512gpus", "h200"): 113,
    ("qwen3-32b-8h200",): 126,
    ("qwen3-32b-32gpus",): 77,
    ("qwen3-32b-32gpus", "h200"): 125.5,
    ("qwen3-32b-128gpus",): 72,
    ("qwen3-32b-128gpus", "h200"): 115,
    ("qwen3-32b-512gpus",): 74,
    ("qwen3-32b-512gpus", "h200"): 113,
}
"""Expected verdict of each layout, with any task, method and context that is for it: it fits, and
the fullest GPU needs so much."""


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_plans", ROOT / "tools/paper_plans.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
CASES = [(task, *layout) for task in TOOL.METHODS for layout in TOOL.LAYOUTS[task]]


def _verdicts(config: RunConfig) -> tuple[str, str]:
    """(what check-config refuses, what plan refuses), empty where nothing is."""
    try:
        require_settings(config)
    except ConfigError as error:
        return str(error), ""
    return "", "\n".join(TOOL.planned(config)[0])


def _combination(words: str) -> "TOOL.Combination":
    """``task method layout [context]``"""
    task, method, layout, *context = words.split()
    return TOOL.Combination(task=task, method=method, layouts=(layout,), context="".join(context))


def test_all_layouts_are_expected() -> None:
    assert {layouts for _, layouts, _ in CASES} == set(GIGABYTES)
    assert sum(len(list(TOOL.combinations(task))) for task in TOOL.METHODS) == 32 + 32 + 84


@pytest.mark.parametrize(
    ("task", "layouts", "context"), CASES, ids=["-".join([t, c, *ls]) for t, ls, c in CASES]
)
def test_fits_with_every_method(task: str, layouts: tuple[str, ...], context: str) -> None:
    for method in TOOL.METHODS[task]:
        own = TOOL.Combination(task=task, method=method, layouts=layouts, context=context)
        config, refused, plan = TOOL.plan_of(own)
        require_settings(config)
        assert refused == [], method
        assert plan.memory.total / 1e9 == pytest.approx(GIGABYTES[layouts], abs=WITHIN_GB), method
        assert plan.memory.host <= plan.job.chip.host_bytes
        assert plan.job.num_gpus == config.cluster.world_size, "all GPUs do both"
        assert signal_warning(config) is None, method
        assert config.rollout.max_context == plan.job.lengths.longest <= plan.job.shape.max_length


@pytest.mark.parametrize("context", ["", "32k"])
@pytest.mark.parametrize("layout", [names[0] for names in GIGABYTES if "32b" in names[0]])
def test_the_cold_start_fits_where_rl_does(layout: str, context: str) -> None:
    own = TOOL.Combination(
        task="math_code", method="grpo", layouts=(layout,), context=context, cold_start=True
    )
    config = own.config()
    assert _verdicts(config) == ("", "")
    assert config.sft.enabled and config.sft.steps * config.sft.trajectories_per_step == 372 * 32
    assert config.env.demonstrations == (Path("data/retool-sft.parquet"),)


ON_8_H100 = ("cluster.chip=h100", "policy.recompute=full")


@pytest.mark.parametrize(
    ("words", "settings", "command", "told"),
    [
        (
            "math_code drbot-grpo-spear qwen2.5-32b-8h200 32k",
            (*ON_8_H100, "cluster.servers.memory_fraction=0.35", "policy.optimizer_offload=0"),
            "plan",
            ["32.8 B parameters on 8 x h100", "short by 34.", "policy.optimizer_offload=1.0 ("],
        ),
        (
            "math_code grpo qwen3-32b-8h200",
            ("policy.optimizer_offload=0",),
            "plan",
            ["32.8 B parameters on 8 x h200", "short by 34.", "policy.optimizer_offload=1.0 ("],
        ),
        (
            "math_code grpo qwen2.5-32b-8h200",
            ON_8_H100,
            "plan",
            ["short by 5.", "largest: engine on this GPU", "cluster.servers.memory_fraction=0.3 ("],
        ),
        (
            "math_code drbot-grpo qwen2.5-32b-32gpus",
            ("cluster.servers.tensor_parallel=2", "cluster.servers.count=16"),
            "plan",
            ["an engine server of 2 GPU(s) is short by", "raise cluster.servers.tensor_parallel"],
        ),
        (
            "alfworld gigpo-spear qwen2.5-7b-8gpus",
            ("policy.tensor_parallel=8",),
            "plan",
            ["num_attention_heads=28 is not a multiple of policy.tensor_parallel=8"],
        ),
        (
            "webshop grpo qwen2.5-7b-8gpus",
            ("policy.tensor_parallel=1", "policy.sequence_parallel=false"),
            "plan",
            ["7.6 B parameters on 8 x h100", "short by"],
        ),
        (
            "math_code grpo qwen3-32b-128gpus",
            ("rollout.max_context=41000",),
            "plan",
            ["is above the model's max_position_embeddings=40960"],
        ),
        (
            "math_code grpo qwen3-32b-32gpus 32k",
            ("rollout.max_context=34816",),
            "check-config",
            ["the longest context fits no micro-batch"],
        ),
        (
            "webshop drbot-gigpo-spear qwen2.5-7b-32gpus",
            ("weight_sync.transport=sharded",),
            "check-config",
            ["NCCL has no group of a trainer rank and a server on the same GPU"],
        ),
        (
            "webshop drbot-gigpo-spear qwen2.5-7b-32gpus",
            ("rollout.max_lag=1",),
            "check-config",
            ["use rollout.engine=sglang or vllm with rollout.max_lag=0"],
        ),
        (
            "alfworld grpo qwen2.5-1.5b-8gpus",
            ("cluster.servers.count=16",),
            "check-config",
            ["need 16 GPUs a node, and cluster.gpus_per_node=8"],
        ),
        (
            "math_code grpo qwen2.5-32b-32gpus",
            ("cluster.ranks_per_node=5",),
            "check-config",
            ["world size 20 is not a multiple"],
        ),
        (
            "alfworld gigpo qwen2.5-1.5b-8gpus",
            ("algorithm.normalize_std=true",),
            "check-config",
            ["gigpo has algorithm.gigpo.mode"],
        ),
        (
            "math_code grpo qwen2.5-32b-32gpus",
            ("model.path=null",),
            "check-config",
            ["preset=qwen2.5-32b-32gpus is a layout of Qwen/Qwen2.5-32B", "reads English"],
        ),
    ],
)
def test_refused(words: str, settings: Sequence[str], command: str, told: Sequence[str]) -> None:
    checked, planned = _verdicts(_combination(words).config(*settings))
    said = checked if command == "check-config" else planned
    assert (checked == "") is (command == "plan")
    for part in told:
        assert part in said, said


def test_what_each_method_is() -> None:
    """(advantage, std, aggregation, clip, groups, filters, loss, replay, intrinsic)."""
    loose = ("grpo", True, "token-mean", 0.2, 1.0, False)
    tight = ("grpo", False, "seq-mean-token-sum-norm", 0.28, 0.75, True)
    off, on = ("clipped", False, "none"), ("clip_cov", True, "distinct_calls")
    of_gigpo = {"grpo": loose[:2], "gigpo": ("gigpo", False)}
    for method in TOOL.AGENT_METHODS:
        config = _combination(f"alfworld {method} qwen2.5-1.5b-8gpus").config()
        algorithm, replay = config.algorithm, config.replay
        base = tight if method.startswith("drbot") else loose
        first = of_gigpo["gigpo" if "gigpo" in method else "grpo"]
        first = first if base is loose else (first[0], False)
        assert (
            *(algorithm.advantage, algorithm.normalize_std, algorithm.aggregation),
            *(algorithm.loss.clip_high, algorithm.keep_groups_fraction),
            *(algorithm.row_filters.void, algorithm.loss.type),
            *(replay.enabled, config.reward.intrinsic.type),
        ) == (*first, *base[2:], *(on if method.endswith("spear") else off)), method
        if replay.enabled:
            assert replay.loss.clip_high == algorithm.loss.clip_high
            assert (replay.loss.fraction, replay.loss.low, replay.loss.high) == (0.02, 2, 60)
            assert algorithm.loss.fraction == 0.0002


def test_the_tasks_have_the_papers_sizes() -> None:
    """Prompts, group, turns, context, steps, T_warm, T_decay, panel."""
    expected = {
        "alfworld": (32, 8, 50, 2560, 200, 200, 200, 128),
        "webshop": (32, 8, 15, 4608, 350, 200, 200, 128),
        "math_code": (128, 16, 8, 18432, 135, 300, 200, 60),
    }
    for task, sizes in expected.items():
        config = TOOL.plan_of(next(TOOL.combinations(task)))[0]
        rollout, curriculum = config.rollout, config.curriculum
        assert (
            *(rollout.prompts_per_step, rollout.group_size, config.env.max_turns),
            *(rollout.max_context, config.run.steps, curriculum.replay_warmup_steps),
            *(curriculum.intrinsic_decay_steps, config.evaluation.games),
        ) == sizes
        assert (config.replay.capacity, config.replay.baseline_history) == (2048, 10240)
        assert (config.replay.max_age, config.policy.optimizer.lr) == (5, 1e-6)


def test_tasks_alone_are_for_evaluation_and_methods_for_quickstarts_too() -> None:
    for task in TOOL.METHODS:
        assert check_config(load_config(ROOT / f"examples/{task}/paper.yaml"), 1, "evaluate") == []
        for method in TOOL.METHODS[task]:
            over = [str(ROOT / f"examples/methods/{method}.yaml")]
            require_settings(load_config(ROOT / f"examples/{task}/quickstart.yaml", over))


def test_the_readmes_are_current() -> None:
    for place, text in TOOL.readmes().items():
        assert place.read_text(encoding="utf-8") == text, "run python tools/paper_plans.py"
        named = [f"`{method}`" for method in TOOL.METHODS[place.parent.name]]
        assert [name for name in named if name not in text] == []


def test_the_job_scripts_are_current() -> None:
    scripts = TOOL.scripts()
    assert set((ROOT / "slurm/paper").iterdir()) == set(scripts)
    for place, text in scripts.items():
        assert place.read_text(encoding="utf-8") == text, "run python tools/paper_plans.py"
        subprocess.run(["bash", "-n", str(place)], check=True, timeout=10)


def test_one_command_submits_a_run(tmp_path: Path) -> None:
    program = tmp_path / "megatron-spear"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    words = ["alfworld", "gigpo-spear", "qwen2.5-7b-8gpus", "run.seed=3", "--dry-run"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": "/shared/x"}
    environment["SITE"] = "slurm/sites/pyxis.yaml"
    script = str(ROOT / "slurm/paper.sh")
    said = subprocess.run(
        [script, *words], env=environment, capture_output=True, text=True, check=True, timeout=10
    ).stdout.split()
    own = _combination("alfworld gigpo-spear qwen2.5-7b-8gpus")
    name = "alfworld-gigpo-spear-qwen2.5-7b-8gpus"
    assert said == [
        *("launch", "slurm", *own.files, "slurm/sites/pyxis.yaml"),
        *(f"run.name={name}", f"run.dir=/shared/x/{name}", "run.seed=3", "--dry-run"),
    ]
    assert all((ROOT / file).is_file() for file in said[2:6])
    few = subprocess.run([script, "alfworld"], capture_output=True, text=True, timeout=10)
    assert few.returncode == 2 and "usage: " in few.stderr


@pytest.mark.parametrize("runtime", ["venv", "pyxis", "apptainer"])
def test_sites_are_for_every_runtime(runtime: str) -> None:
    site = str(ROOT / f"slurm/sites/{runtime}.yaml")
    cluster = _combination("webshop grpo qwen2.5-1.5b-8gpus").config(site).cluster
    assert cluster.runtime.type == runtime and cluster.slurm.partition == "gpu"
    assert cluster.servers.program == "sglang" and cluster.servers.count == 8
