"""What becomes of each command of the documentation: run here, run by another test, or neither.

A command that stands in no table and has no **Needs** line before its block fails the test.
"""

from dataclasses import dataclass, field

from tiny_runs import TINY

SMALL = (*TINY, "run.steps=1", "sft.steps=100", "tracking.wandb=false")
"""Behind the settings of a documented run of the ALFWorld quickstart, so that it takes seconds."""
COLD = (
    "model.tiny.hidden_size=32", "model.tiny.num_layers=2", "model.tiny.num_kv_heads=2",
    "model.tiny.ffn_size=64", "sft.enabled=false", "run.steps=1", "run.threads=1",
    "rollout.prompts_per_step=2", "rollout.group_size=2", "env.max_turns=2", "evaluation.games=2",
    "algorithm.mini_batches=1", "tracking.wandb=false",
)  # fmt: skip
"""Behind those of the other quickstarts: without a warm start."""
PLAY = ("evaluation.games=2", "env.max_turns=2", "run.threads=1")


@dataclass(frozen=True)
class Run:
    """Run here, with ``more`` words behind it and ``swap``ped parts of words; ``after`` another."""

    more: tuple[str, ...] = ()
    swap: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    status: int = 0
    """Exit status that the page says it has (1: a plan that does not fit)."""
    cache: bool = False
    """Whether the shared cache of tiny warm starts is used (``model.cache_dir``)."""


_QUICKSTART = "megatron-spear train examples/alfworld/quickstart.yaml"
_SEED1 = f"{_QUICKSTART} run.seed=1 run.dir=runs/seed1"
_NO_REPLAY = f"{_QUICKSTART} run.dir=runs/no-replay replay.enabled=false"
_TO_MEGATRON = (
    "megatron-spear convert hf-to-megatron HF_FOLDER DST --tensor-parallel 8 --pipeline-parallel 2"
)
_TO_HF = "megatron-spear convert megatron-to-hf SRC HF_FOLDER"
_TINY_FOLDER = (
    'python -c from megatron_spear.testing.tiny import tiny_hf_folder; tiny_hf_folder("tiny")'
)
_SERVE_TINY = "megatron-spear serve tiny --max-context 512 &"
RUN: dict[str, Run] = {
    _SEED1: Run(SMALL, cache=True),
    "megatron-spear train resume=runs/seed1": Run(after=(_SEED1,)),
    "megatron-spear sft examples/alfworld/quickstart.yaml": Run(SMALL, cache=True),
    "megatron-spear evaluate runs/seed1 -n 4": Run(PLAY, after=(_SEED1,)),
    "megatron-spear evaluate runs/seed1": Run(PLAY, after=(_SEED1,)),
    "megatron-spear evaluate runs/seed1 --panel PATH/valid_seen.jsonl.xz -n 8 --temperature 0.4": (
        Run(PLAY, after=(_SEED1,))
    ),
    "megatron-spear convert hf-to-megatron runs/seed1/model DST --tensor-parallel 2": Run(
        swap={"DST": "megatron-2"}, after=(_SEED1,)
    ),
    _TO_MEGATRON: Run(swap={"HF_FOLDER": "runs/seed1/model", "8": "2"}, after=(_SEED1,)),
    _TO_HF: Run(swap={"SRC": "DST", "HF_FOLDER": "hf-again"}, after=(_TO_MEGATRON,)),
    "megatron-spear convert verify A B": Run(
        swap={"A": "runs/seed1/model", "B": "hf-again"}, after=(_TO_HF,)
    ),
    "megatron-spear report runs/seed1": Run(after=(_SEED1,)),
    "megatron-spear report runs/seed1 --watch": Run(after=(_SEED1,)),  # it has ended
    "megatron-spear report runs/seed1 runs/no-replay --out two.html": Run(
        after=(_SEED1, _NO_REPLAY)
    ),
    "megatron-spear report --group SPEAR=runs/seed1 --group GRPO=runs/no-replay": Run(
        after=(_SEED1, _NO_REPLAY)
    ),
    "megatron-spear train examples/webshop/quickstart.yaml": Run(COLD),
    "megatron-spear train examples/math_code/quickstart.yaml": Run(
        (*COLD, "env.sandbox.unsafe=true")  # where there is no bubblewrap
    ),
    _NO_REPLAY: Run(SMALL, cache=True),
    "megatron-spear evaluate runs/no-replay -n 4": Run(PLAY, after=(_NO_REPLAY,)),
    "megatron-spear train resume=runs/no-replay": Run(after=(_NO_REPLAY,)),
    (
        "megatron-spear check-config FILE preset=qwen2.5-7b-32gpus "
        "model.path=PATH/Qwen2.5-7B-Instruct"
    ): Run(swap={"FILE": "examples/alfworld/paper.yaml"}),
    "megatron-spear plan my-run.yaml": Run(swap={"my-run.yaml": "small.yaml"}),
    ("megatron-spear plan my-run.yaml --gpus 64 --chip h200 policy.tensor_parallel=4 --json"): Run(
        swap={"my-run.yaml": "small.yaml"}
    ),
    "megatron-spear launch slurm my-run.yaml cluster.trainer_nodes=4 --dry-run": Run(
        swap={"my-run.yaml": "small.yaml"}
    ),
    "megatron-spear inspect replay runs/seed1": Run(after=(_SEED1,)),
    "megatron-spear inspect replay runs/seed1 --best 2": Run(after=(_SEED1,)),
    "megatron-spear inspect replay runs/seed1 --row 1099": Run(swap={"1099": "0"}, after=(_SEED1,)),
    "megatron-spear inspect logprobs runs/seed1 -n 8": Run(
        swap={"8": "2"}, more=("env.max_turns=2",), after=(_SEED1,)
    ),
    "megatron-spear inspect diff runs/seed1/checkpoints/step_40 runs/seed1 --top 3": Run(
        swap={"runs/seed1/checkpoints/step_40": "runs/seed1/checkpoints/step_1"}, after=(_SEED1,)
    ),
    "megatron-spear inspect diff runs/seed1/model runs/seed1": Run(after=(_SEED1,)),
    (
        "megatron-spear inspect plot runs/seed1 runs/no-replay "
        "--metrics rollout/success,policy/entropy,replay/* --smooth 5 --out curves.png"
    ): Run(after=(_SEED1, _NO_REPLAY)),
    "megatron-spear inspect plot runs/seed1 --list": Run(after=(_SEED1,)),
    _TINY_FOLDER: Run(),
    _SERVE_TINY: Run(after=(_TINY_FOLDER,)),
}
"""Commands that the test runs for real in a scratch folder. Those of ``curl`` are sent to the
server of ``serve tiny``, and ``check-config``, ``plan`` and dry runs are run as they stand: neither
need an entry."""


def run_of(text: str) -> Run | None:
    """How a command is run here; None where it is not."""
    as_it_stands = text.startswith(("megatron-spear check-config ", "megatron-spear plan "))
    return RUN.get(text, Run() if as_it_stands or text.endswith(" --dry-run") else None)


ELSEWHERE: dict[str, tuple[str, str]] = {
    "./tools/quickstart.sh": (
        "tests/unit/tools/test_setup_scripts.py::test_setup_installs_and_says_what_it_does",
        "its two lines are tools/setup_env.sh and the command that test_main_job runs, small",
    ),
    "./tools/test.sh": (".ci/run", "CI is this command"),
    f"{_QUICKSTART} env.games=PATH/alfworld run.dir=runs/official-games": (
        "tests/integration/test_real_games.py::test_real_games",
        "needs the official games",
    ),
    "megatron-spear serve runs/seed1/model": (
        "tests/unit/cli/test_serve_command.py::test_a_signal_stops_it_cleanly_and_fails_what_runs",
        "another folder; here `serve tiny` is run",
    ),
    "megatron-spear serve runs/alfworld-quickstart/model --port 30000": (
        "tests/unit/cli/test_serve_command.py::test_a_signal_stops_it_cleanly_and_fails_what_runs",
        "another folder; here `serve tiny` is run",
    ),
    (
        f"{_QUICKSTART} rollout.engine=sglang rollout.servers=[http://127.0.0.1:30000] "
        "weight_sync.transport=broadcast run.dir=runs/through-a-server"
    ): (
        "tests/integration/test_serve_run.py::test_training_through_a_server_gives_the_same_run",
        "the same settings with a server at another port",
    ),
    (
        "torchrun --nproc-per-node 2 -m megatron_spear.cli.train "
        "examples/alfworld/quickstart.yaml policy.tensor_parallel=2 run.dir=runs/two-ranks"
    ): (
        "tests/integration/test_job_layouts.py::test_several_ranks_make_the_warm_start",
        "two ranks under torchrun take 30 s",
    ),
    (
        "megatron-spear evaluate MODEL --env alfworld --panel PATH/json_2.1.1/valid_seen -n 32 "
        "env.prompt=official env.history={window: 2} env.max_turns=50 "
        "rollout.max_new_tokens=512 rollout.max_context=2560"
    ): (
        "tests/integration/test_evaluate_command.py::test_the_result_has_all_numbers",
        "needs the official games and a model that reads them",
    ),
    (
        "megatron-spear evaluate MODEL examples/alfworld/paper.yaml --panel valid_unseen "
        "--top-p 0.6"
    ): (
        "tests/unit/cli/test_evaluate_arguments.py::test_all_options",
        "needs the official games and a model that reads them",
    ),
    (
        "megatron-spear launch local examples/alfworld/quickstart.yaml cluster.ranks_per_node=2 "
        "rollout.engine=sglang cluster.servers.count=2 run.dir=runs/launched"
    ): (
        "tests/integration/test_launch_local.py::"
        "test_an_engine_that_is_killed_comes_back_and_a_stop_saves_the_run",
        "ranks and servers take a minute",
    ),
    "megatron-spear launch local resume=runs/launched": (
        "tests/integration/test_launch_local.py::"
        "test_an_engine_that_is_killed_comes_back_and_a_stop_saves_the_run",
        "ranks and servers take a minute",
    ),
    "megatron-spear train resume=runs/seed1 run.steps=96": (
        "tests/integration/test_resume.py::test_a_run_that_has_ended_goes_on_with_more_steps",
        "other commands of the pages look at the run as it ended first",
    ),
    "megatron-spear launch preflight --attempt RUN/attempt_3": (
        "tests/integration/test_preflight_command.py::"
        "test_a_preflight_that_is_switched_off_asks_nothing",
        "one of several nodes of a job",
    ),
    "megatron-spear train examples/alfworld/official.yaml": (
        "tests/integration/test_official_mode.py::"
        "test_defect_06_a_run_that_replays_evaluates_and_resumes_as_if_not_stopped",
        "needs the official games and a model",
    ),
    "python tools/experiments/compare.py tools/experiments/alfworld_generated.yaml": (
        "tests/integration/test_experiment.py::"
        "test_a_seed_that_was_cut_off_goes_on_and_what_is_there_is_kept",
        "53 runs of minutes; there two small ones",
    ),
    "python tools/check_golden.py PATH/golden": (
        "tests/unit/tools/test_check_golden.py::test_right_cases_pass",
        "the recorded vectors are not part of the repository",
    ),
    "megatron-spear train examples/custom/quickstart.yaml": (
        "tests/integration/test_custom_environment.py::test_the_example_for_two_steps_over_a_stop",
        "run there for two steps",
    ),
    "pip install -e .[webshop]": (
        "tests/unit/tools/test_setup_scripts.py::test_setup_installs_and_says_what_it_does",
        "tools/setup_env.sh installs it with [dev]",
    ),
}
"""Commands that another test runs, or runs the core of: that test, and why it is not run here."""

OTHERS: dict[str, str] = {
    "source .venv/bin/activate": "the shell's",
    "kill %1": "the shell's: ends the server before",
}
"""Words of other programs beside commands of ours."""
