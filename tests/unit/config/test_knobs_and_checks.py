"""The schema as knobs, what makes two runs the same, and combinations that cannot work."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_spear.config.check import check_config
from megatron_spear.config.fingerprint import (
    RESUME_MAY_DIFFER,
    config_differences,
    config_hash,
)
from megatron_spear.config.knobs import schema_paths
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError


def test_every_knob_is_documented_and_described() -> None:
    knobs = {knob.path: knob for knob in schema_paths()}
    kinds = {kind for knob in knobs.values() for kind in knob.types}
    for section in {RunConfig, *(kind for kind in kinds if issubclass(kind, BaseModel))}:
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name} has no docstring"
    for knob in knobs.values():
        assert "<class" not in knob.expected, f"{knob.path}: {knob.expected}"
        assert "typing" not in knob.expected, f"{knob.path}: {knob.expected}"
    size = knobs["rollout.group_size"]
    assert (size.expected, size.types, size.is_section) == ("an integer >= 1", (int,), False)
    assert knobs["env.generator.min_objects"].expected == "an integer >= 4 and <= 80"
    assert knobs["replay.ratio_filter"].expected.endswith(", or null")
    assert knobs["sft.optimizer"].is_section
    assert "env.history.window" in knobs
    kinds_of_loss = "'clipped', or 'clip_cov', or 'kl_cov', or 'gpg'"
    assert knobs["algorithm.loss.type"].expected == kinds_of_loss
    assert not knobs["hooks"].is_section and knobs["hooks[]"].is_section
    assert knobs["hooks"].expected == f"a list, each entry {knobs['hooks[]'].expected}"
    assert (knobs["hooks[].name"].types, knobs["hooks[].settings"].expected) == ((str,), "a map")
    assert (knobs["hooks[].name"].parent, knobs["hooks[]"].parent) == ("hooks[]", "hooks")


def test_free_keys_exist_and_leave_the_hash_alone() -> None:
    paths = {knob.path for knob in schema_paths()}
    assert set(RESUME_MAY_DIFFER) <= paths
    base = load_config()
    free = load_config(
        None,
        ["run.name=x", "run.dir=y", "run.stop_after=2", "policy.tensor_parallel=2",
         "checkpoint.keep=9", "tracking.wandb=false", "rollout.env_workers=4"],
    )  # fmt: skip
    assert config_hash(free) == config_hash(base)
    assert config_differences(base, free) == ()
    told = {d.path for d in config_differences(base, free, everything=True)}
    assert {"run.dir", "checkpoint.keep", "policy.tensor_parallel"} <= told


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "env.history={window: 2}",
        "sft.optimizer.lr=1",
        "hooks=[{name: a, path: m:A}]",
    ],
)
def test_everything_else_changes_the_hash(override: str) -> None:
    base, other = load_config(), load_config(None, [override])
    assert config_hash(base) != config_hash(other)
    assert config_differences(base, other)


def test_a_run_may_get_longer_where_no_step_depends_on_their_number() -> None:
    def run(steps: int, schedule: str = "constant") -> RunConfig:
        return load_config(None, [f"run.steps={steps}", f"policy.optimizer.schedule={schedule}"])

    assert config_differences(run(40), run(41)) == ()
    assert config_hash(run(40)) == config_hash(run(41))
    assert [d.path for d in config_differences(run(40), run(41), everything=True)] == ["run.steps"]
    for old, new in ((run(41), run(40)), (run(40, "cosine"), run(41, "cosine"))):
        assert [str(d) for d in config_differences(old, new)] == [
            f"run.steps: was {old.run.steps}, now {new.run.steps}"
        ]
    assert config_hash(run(40, "cosine")) != config_hash(run(41, "cosine"))


@pytest.mark.parametrize(
    "other",
    [
        "[]",
        "[{name: b, path: m:A, settings: {x: 1}}, {name: c, path: m:C}]",
        "[{name: a, path: m:B, settings: {x: 1}}, {name: c, path: m:C}]",
        "[{name: a, path: m:A, settings: {x: 2}}, {name: c, path: m:C}]",
        "[{name: c, path: m:C}, {name: a, path: m:A, settings: {x: 1}}]",
    ],
)
def test_hooks_their_settings_and_their_order_are_what_a_run_is(other: str) -> None:
    base = "[{name: a, path: m:A, settings: {x: 1}}, {name: c, path: m:C}]"
    one, two = (load_config(None, [f"hooks={text}"]) for text in (base, other))
    assert config_hash(one) != config_hash(two)
    (difference,) = config_differences(one, two)
    assert str(difference).startswith("hooks: was [{'name': 'a', 'path': 'm:A', 'settings': {'x':")


def test_the_hash_is_stable_across_processes() -> None:
    code = (
        "from megatron_spear.config.fingerprint import config_hash;"
        "from megatron_spear.config.load import load_config;"
        "import sys; print(config_hash(load_config())); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == config_hash(load_config())


def test_the_defaults_work_on_one_rank() -> None:
    assert check_config(load_config(), 1) == []


MATH = ("env.type=math_code", "rollout.env_deadline_s=60")
FUSION = (
    *("env.type=math_code", "env.sandbox.timeout_s=5", "env.sandbox.url=http://a:1"),
    "env.sandbox.backend=sandbox_fusion",
)
SERVED = ("rollout.engine=sglang", "rollout.servers=[http://a:1]")


@pytest.mark.parametrize(
    ("overrides", "world_size", "told"),
    [
        (["policy.tensor_parallel=2"], 3, "world size 3 is not a multiple of"),
        (["policy.context_parallel=2"], 1, "start 2 ranks"),
        (["policy.sequence_parallel=true"], 1, "needs policy.tensor_parallel > 1"),
        (["policy.tensor_parallel=4"], 4, "num_kv_heads=2 is not a multiple of"),
        (["policy.pipeline_parallel=3"], 3, "num_layers=4 is not a multiple of"),
        (["policy.expert_parallel=2"], 2, "the model has no experts"),
        (["model.path=/m", "policy.expert_parallel=2"], 1, "a pipeline stage of 1 ranks"),
        (["model.tiny.hidden_size=130"], 1, "hidden_size=130 is not a multiple of"),
        (["model.tiny.hidden_size=132"], 1, "is odd"),
        (["rollout.max_new_tokens=512"], 1, "leaves no room for a prompt"),
        (
            [*FUSION, "rollout.env_deadline_s=75"],
            1,
            "=75 is not above the 75 s of 1 call(s) of env.max_calls_per_turn, each of "
            "env.sandbox.timeout_s, 60 s of waiting for the server and 10 s of grace",
        ),
        ([*MATH, "env.sandbox.timeout_s=50"], 1, "each of env.sandbox.timeout_s and 10 s of grace"),
        ([*MATH, "env.prompt=official"], 1, "needs a model whose chat template lists tools"),
        ([*MATH, "env.problems=[a.jsonl]"], 1, "env.problems are for a model that reads English"),
        ([*MATH, "env.demonstrations=[a.jsonl]"], 1, "env.demonstrations are for a model"),
        (["reward.failure=1"], 1, "reward.failure=1 is not below reward.success=1"),
        (["rollout.servers=[http://a:1]"], 1, "rollout.engine=embedded has no servers"),
        (["rollout.engine=sglang"], 1, "needs rollout.servers"),
        ([*SERVED, "rollout.servers=[a:1]"], 1, "expected a URL"),
        ([*SERVED, "rollout.servers=[http://a:1,http://a:1]"], 1, "twice"),
        (
            [*SERVED, "weight_sync.transport=in_process"],
            1,
            "does not go with rollout.engine=sglang",
        ),
        (["weight_sync.transport=broadcast"], 1, "does not go with rollout.engine=embedded"),
        (["weight_sync.precision=fp8"], 1, "is for servers that hold FP8"),
        ([*SERVED, "weight_sync.deadline_s=3600"], 1, "is not below run.hang_limit_s"),
        ([*SERVED, "rollout.colocated=true", "rollout.max_lag=1"], 1, "rollout.max_lag=0"),
        (["rollout.colocated=true"], 1, "rollout.colocated=true is for servers"),
        (
            [*SERVED, "weight_sync.engine_expert_parallel=2"],
            1,
            "weight_sync.transport=sharded only",
        ),
        (["policy.tokens_per_microbatch=100"], 1, "fits no micro-batch"),
        (["rollout.group_size=1"], 1, "advantage 0 everywhere"),
        (["algorithm.keep_groups_fraction=0"], 1, "keeps no group"),
        (["algorithm.mini_batches=65"], 1, "above the 64 trajectories"),
        (["algorithm.advantage=gigpo", "algorithm.normalize_std=true"], 1, "algorithm.gigpo.mode"),
        (["replay.capacity=8"], 1, "rows_per_step=24 is above"),
        (["replay.reuse=true", "replay.release=burst"], 1, "a burst forgets what it leaves"),
        (["replay.decay=0.5"], 1, "read with replay.baseline=decay only, and it is p50"),
        (
            [
                "algorithm.compat=official",
                "algorithm.official.tree=math",
                "replay.enabled=false",
                "algorithm.aggregation=group-mean-token-mean",
            ],
            1,
            "has no algorithm.aggregation=group-mean-token-mean",
        ),
        (["replay.gradient_norms=true", "replay.combine=separate_step"], 1, "its own norm"),
        (
            ["algorithm.old_logprobs=engine", "algorithm.off_policy_correction.mode=token-mask"],
            1,
            "never computes the policy's",
        ),
        (["curriculum.tasks={enabled: true, min_share: 0.2}"], 1, "use at most 0.167"),
        (
            ["curriculum.tasks.enabled=true", "algorithm.dynamic_sampling_rounds=1"],
            1,
            "plays a step in several rounds",
        ),
        (
            ["curriculum.tasks.enabled=true", "env.task_types=[look_at_obj_in_light]"],
            1,
            "and there is one",
        ),
        (["policy.optimizer.min_lr=1"], 1, "policy.optimizer.min_lr=1 is above"),
        (["sft.optimizer.beta2=1"], 1, "sft.optimizer.beta2=1 never forgets"),
        (["sft.steps=5"], 1, "above the 5 steps"),
        (["run.stop_after=50"], 1, "never happens"),
        (
            ["hooks=[{name: a, path: m:A}, {name: b, path: m:A}, {name: a, path: m:B}]"],
            1,
            "hooks: hooks[0], hooks[2] have the same name 'a'; give each another one",
        ),
    ],
)
def test_what_cannot_work_is_told(overrides: list[str], world_size: int, told: str) -> None:
    lines = check_config(load_config(None, overrides), world_size)
    assert len(lines) == 1, lines
    assert told in lines[0]


def test_a_sandbox_servers_queue_fits_the_environments_deadline() -> None:
    assert check_config(load_config(None, [*FUSION, "rollout.env_deadline_s=76"]), 1) == []
    (line,) = check_config(
        load_config(None, [*FUSION, "env.max_calls_per_turn=2", "rollout.env_deadline_s=149"]), 1
    )
    assert "the 150 s of 2 call(s)" in line


OFFICIAL = (
    "algorithm.compat=official",
    "algorithm.loss.type=clip_cov",
    "replay.combine=separate_step",
    "replay.ratio_filter=null",
    "env.history={window: 2}",
)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("env.history=full", "has rows of a turn; set env.history={window: 2}"),
        ("env.history=rendered", "has rows of a turn; set env.history={window: 2}"),
        ("algorithm.official.tree=math", "has rows of a trajectory; set env.history=full"),
        ("algorithm.off_policy_correction.mode=token-mask", "corrects no mismatch"),
        ("replay.combine=joint", "set replay.combine=separate_step"),
        ("replay.ratio_filter={low: 0.1}", "set replay.ratio_filter=null"),
        ("replay.baseline=batch_mean", "has no replay.baseline=batch_mean; use p50 or decay"),
        ("replay.baseline=per_prompt", "has no replay.baseline=per_prompt"),
        ("replay.baseline=none", "has no replay.baseline=none"),
        ("replay.require_tool_call=true", "set replay.require_tool_call=false"),
    ],
)
def test_what_the_official_mode_does_not_do_is_told(override: str, told: str) -> None:
    assert check_config(load_config(None, OFFICIAL), 1) == []
    (line,) = check_config(load_config(None, [*OFFICIAL, override]), 1)
    assert told in line
    off = [*OFFICIAL, "replay.enabled=false", override]
    assert len(check_config(load_config(None, off), 1)) == (0 if "replay." in override else 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["replay.release=burst", "replay.capacity=8"],  # rows_per_step (24) is not read
        [*OFFICIAL, "replay.capacity=8"],
        [*OFFICIAL, "replay.baseline=decay", "replay.decay=0.5"],
        ["replay.baseline=decay"],
        ["replay.baseline=decay", "replay.decay=0.5"],
        ["replay.baseline=none", "replay.release=burst", "replay.require_tool_call=true"],
    ],
)
def test_replay_settings_that_work(overrides: list[str]) -> None:
    assert check_config(load_config(None, overrides), 1) == []


@pytest.mark.parametrize("value", ["0", "1.1", "-1"])
def test_decay_is_above_zero_and_at_most_one(value: str) -> None:
    with pytest.raises(ConfigError, match=r"replay\.decay: got .*expected a number > 0 and <= 1"):
        load_config(None, ["replay.baseline=decay", f"replay.decay={value}"])


def test_an_evaluation_has_no_policy() -> None:
    same = "hooks=[{name: a, path: m:A}, {name: a, path: m:B}]"
    training = ["policy.tensor_parallel=2", "rollout.group_size=1", "replay.capacity=8", same]
    config = load_config(None, training)
    assert check_config(config, 1, "evaluate") == []
    assert len(check_config(config, 1, "sft")) == 3
    (line,) = check_config(load_config(None, ["rollout.max_new_tokens=512"]), 1, "evaluate")
    assert "leaves no room for a prompt" in line


def test_one_file_of_games_is_not_trained_on_and_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.touch()
    config = load_config(None, [f"env.games={file}"])
    (line,) = check_config(config, 1)
    assert f"env.games={file} is one file, which has no splits" in line
    assert "a folder with train.jsonl[.xz] and valid_seen.jsonl[.xz]" in line
    assert check_config(config, 1, "sft") == check_config(config, 1, "evaluate") == []
    assert check_config(load_config(None, [f"env.games={tmp_path}"]), 1) == []


def test_a_loaded_model_has_its_own_shape() -> None:
    config = load_config(None, ["policy.tensor_parallel=4", "model.path=/m"])
    assert check_config(config, 4) == []
    off = load_config(None, ["replay.enabled=false", "replay.capacity=8"])
    assert check_config(off, 1) == []
    unread = load_config(None, ["curriculum.tasks.min_share=1"])
    assert check_config(unread, 1) == []
