"""Experiments: what is read, what is compared at equal work, and what the page says."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_spear.errors import ConfigError, DataError

FOLDER = Path(__file__).parents[3] / "tools" / "experiments"

TWO_ARMS = """
title: Two methods
config: examples/alfworld/quickstart.yaml
settings: [run.steps=4]
seeds: 2
first_seed: 7
parts:
  plain: [replay.enabled=false, curriculum.intrinsic_weight=0]
arms:
  grpo: {title: GRPO, settings: [plain, examples/methods/grpo.yaml, algorithm.mini_batches=2]}
  spear: {title: SPEAR, seeds: 1}
compare:
  - {arm: spear, reference: grpo, aim: 0.1, published: "+16.1"}
"""


@pytest.fixture
def tools(experiment_modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    return experiment_modules


@pytest.fixture
def experiment(tools: dict[str, ModuleType], tmp_path: Path) -> Any:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_ARMS)
    return tools["experiment"].read_experiment(path)


def outcome(
    tools: dict[str, ModuleType], won: Sequence[Sequence[float | None]], **changes: Any
) -> Any:
    """A run of 4 steps of 10 trajectories, evaluated at 0, 2 and 4: 2 turns a trajectory in the
    first two steps, 4 in the others; 100 tokens a step."""
    made = tools["outcome"]
    steps = {name: [0.0] * 4 for name in made.METRICS} | {
        "rollout/num_trajectories": [10.0] * 4,
        "rollout/turns_mean": [2.0, 2.0, 4.0, 4.0],
        "work/train_tokens": [100.0] * 4,
        "policy/entropy": [0.4, 0.3, 0.2, 0.123456789],
    }
    values: dict[str, Any] = {
        "arm": "grpo",
        "seed": 0,
        "settings": {"run.steps": 4},
        "panel_sha256": "abcdef0123",
        "wall_s": 10.0,
        "steps": steps,
        "evaluations": tuple(
            made.Evaluation(step=step, won=tuple(row))
            for step, row in zip((0, 2, 4), won, strict=True)
        ),
    }
    return made.Outcome(**values | changes)


def test_an_arm_is_its_parts_and_settings_in_order(experiment: Any) -> None:
    assert experiment.settings_of("grpo") == (
        "run.steps=4",
        "replay.enabled=false",
        "curriculum.intrinsic_weight=0",
        os.path.relpath(FOLDER.parents[1] / "examples" / "methods" / "grpo.yaml"),
        "algorithm.mini_batches=2",
    )
    assert experiment.settings_of("spear") == ("run.steps=4",)
    assert (list(experiment.seeds_of("grpo")), list(experiment.seeds_of("spear"))) == ([7, 8], [7])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[plain,", "[plane,", "'plane' is neither a setting"),
        ("reference: grpo", "reference: gspo", "compare: no arm 'gspo'"),
        ("compare:", "pictures: {one: [gspo]}\ncompare:", "pictures: no arm 'gspo'"),
        ("seeds: 2", "sedes: 2", "sedes"),
        ("arms:", "arms: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_told(
    tools: dict[str, ModuleType], tmp_path: Path, old: str, new: str, said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(TWO_ARMS.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        tools["experiment"].read_experiment(path)


def test_work_is_counted_up_to_each_evaluation(tools: dict[str, ModuleType]) -> None:
    run = outcome(tools, [[0, 0], [1, 0], [1, 1]])
    assert run.environment_steps.tolist() == [0, 40, 120]
    assert run.trained_tokens.tolist() == [0, 200, 400]


def test_a_game_between_two_evaluations_counts_in_proportion(tools: dict[str, ModuleType]) -> None:
    run = outcome(tools, [[0, 0], [1, 0], [1, 1]])
    at = tools["estimates"].won_at
    steps = tools["estimates"].trainer_steps
    assert at(run, steps, 0.0).tolist() == [0, 0]
    assert at(run, steps, 1.0).tolist() == [0.5, 0]
    assert at(run, lambda r: r.environment_steps, 60.0).tolist() == [1, 0.25]
    assert at(run, steps, 4.0).tolist() == [1, 1]
    failed = outcome(tools, [[0, 0], [None, 0], [1, 1]])
    assert at(failed, steps, 4.0).tolist() == [1, 1], "the evaluation before is not asked"


def test_the_mean_over_training_leaves_out_the_warm_start_and_what_failed(
    tools: dict[str, ModuleType],
) -> None:
    runs = [outcome(tools, [[0, 0, 1], [1, None, None], [0, 1, None]])]
    found = tools["estimates"].table_over(runs)
    np.testing.assert_array_equal(found, [[0.5, 1.0, np.nan]])


def test_differences_are_paired(tools: dict[str, ModuleType]) -> None:
    """Games differ much, arms by 0.25 in each: paired, the interval has no width."""
    rng = np.random.default_rng(0)
    reference = rng.random((3, 64)) * 0.75
    estimates = tools["estimates"]
    found = estimates.difference(reference + 0.25, reference)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert estimates.estimate(reference).high - estimates.estimate(reference).low > 0.05


def test_only_seeds_that_both_arms_have_are_compared(
    tools: dict[str, ModuleType], experiment: Any
) -> None:
    """Seed 0 wins nothing, 1 half, 2 all, in both arms; one arm has no seed 0 yet."""
    shares = {0: [0, 0], 1: [1, 0], 2: [1, 1]}
    runs = [outcome(tools, [[0, 0], won, won], seed=seed) for seed, won in shares.items()]
    arms = {"grpo": runs, "spear": runs[1:]}
    row = tools["pages"]._differences(experiment, arms).splitlines()[-1]
    assert row.startswith("| SPEAR minus GRPO | 2 | +0.000 (+0.000 to +0.000) |")
    alone = {"grpo": runs[:1], "spear": runs[2:]}
    row = tools["pages"]._differences(experiment, alone).splitlines()[-1]
    assert row.startswith("| SPEAR minus GRPO | 0 | no seed in common |")


def test_an_interval_knows_seeds_as_well_as_games(tools: dict[str, ModuleType]) -> None:
    """Two seeds that disagree on every game: the mean of a draw is 0, 0.5 or 1."""
    found = tools["estimates"].estimate(np.stack([np.zeros(500), np.ones(500)]))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    with_failures = tools["estimates"].estimate(np.array([[1.0, np.nan, 0.0] * 9]))
    assert with_failures.value == 0.5


def test_a_result_is_read_as_it_was_written(tools: dict[str, ModuleType], tmp_path: Path) -> None:
    run = outcome(tools, [[0, None], [0.5, 0], [1, 1]])
    path = tmp_path / "grpo" / "seed-0.json"
    run.write(path)
    again = tools["outcome"].read_outcome(path)
    assert again.evaluations == run.evaluations
    assert again.steps["policy/entropy"] == [0.4, 0.3, 0.2, 0.123457]
    np.testing.assert_array_equal(again.won, run.won)
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match="is no result of an experiment"):
        tools["outcome"].read_outcome(path)


def test_results_of_other_settings_are_refused(
    tools: dict[str, ModuleType], tmp_path: Path
) -> None:
    require_same = tools["outcome"].require_same
    run = outcome(tools, [[0], [0], [1]])
    require_same(run.settings, {"run.steps": 4}, tmp_path)
    with pytest.raises(ConfigError, match=r"run\.steps: 4 there, 5 here"):
        require_same(run.settings, {"run.steps": 5}, tmp_path)


def test_settings_that_say_where_are_not_part_of_a_result(
    tools: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("run: {steps: 4, dir: somewhere}\nreplay: {capacity: 9, max_age: 5}\n")
    given = tools["outcome"].settings_of(
        config, ["env.games=/data", "run.seed=3", "run.steps=5", "tracking.wandb=false"]
    )
    assert given == {"run.steps": 5, "replay.capacity": 9}
    of_a_model = tools["outcome"].settings_of(config, ["model.path=/models/Qwen3-8B"])
    assert of_a_model["model.path"] == "Qwen3-8B"


def test_the_page_tells_every_seed_and_the_difference(
    tools: dict[str, ModuleType], experiment: Any, tmp_path: Path
) -> None:
    arms = {
        "grpo": [outcome(tools, [[0, 0], [0, 0], [0, 0]], seed=s) for s in (7, 8)],
        "spear": [outcome(tools, [[0, 0], [1, 0], [1, 1]], seed=7)],
    }
    text = tools["pages"].page(experiment, arms, ["curves.png"], "compare two.yaml")
    assert "of 3 runs are there" not in text
    part = tools["pages"].page(
        experiment, {"grpo": arms["grpo"]}, ["curves.png"], "compare two.yaml"
    )
    assert "**2 of 3 runs are there; the rest is to come.**" in part
    assert "| SPEAR | 1 | 0.000 | 1.000 (1.000 to 1.000) | 1.000 | 0.750 (" in text
    none = "0.000 (0.000 to 0.000)"
    assert f"| GRPO | 2 | 0.000 | {none} | 0.000, 0.000 | {none} |" in text
    one = "+1.000 (+1.000 to +1.000)"
    assert f"| SPEAR minus GRPO | 1 | {one} | {one} | {one} | +0.750 (" in text
    assert "| +0.10 | +16.1 |" in text
    more = {**arms, "spear": [*arms["spear"], outcome(tools, [[0, 0], [1, 0], [1, 1]], seed=8)]}
    again = tools["pages"].page(experiment, more, ["curves.png"], "compare two.yaml")
    assert f"| SPEAR minus GRPO | 2 | **{one}** |" in again
    assert "0.350 / 0.200 / 0.123" in text, "entropy by stage"
    tools["figures"].draw(arms, {"grpo": "GRPO", "spear": "SPEAR"}, tmp_path / "c.png", "Two")
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_results_of_two_panels_are_refused(
    tools: dict[str, ModuleType], experiment: Any, tmp_path: Path
) -> None:
    won = [[0], [0], [0]]
    outcome(tools, won, seed=7).write(tmp_path / "grpo" / "seed-7.json")
    outcome(tools, won, seed=8, panel_sha256="99").write(tmp_path / "grpo" / "seed-8.json")
    with pytest.raises(Exception, match="2 different panels"):
        tools["compare"]._outcomes(experiment, tmp_path)


def test_every_committed_experiment_can_be_run(tools: dict[str, ModuleType]) -> None:
    """Names, settings and comparisons of the experiments beside the script, and results of the
    same settings."""
    files = sorted(FOLDER.glob("*.yaml"))
    assert files
    for file in files:
        read = tools["experiment"].read_experiment(file)
        config = tools["experiment"].ROOT / read.config
        out = FOLDER.parents[1] / "docs" / "evidence" / file.stem
        for seed in tools["running"].seeds_of(read, config, (), out, out):
            given = tools["outcome"].settings_of(seed.config, seed.settings)
            if seed.result.is_file():
                kept = tools["outcome"].read_outcome(seed.result)
                assert (kept.arm, kept.seed) == (seed.arm, seed.number)
                tools["outcome"].require_same(kept.settings, given, seed.result)


def test_a_picture_shows_its_arms(
    tools: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, drawn = tmp_path / "two.yaml", []
    path.write_text(f"{TWO_ARMS}pictures: {{one: [grpo], both: [spear, grpo], none: [spear]}}\n")
    read = tools["experiment"].read_experiment(path)
    monkeypatch.setattr(
        tools["compare"], "draw", lambda arms, titles, file, title: drawn.append((file, list(arms)))
    )
    arms = {"grpo": [outcome(tools, [[0, 0], [0, 0], [0, 0]], seed=7)]}
    tools["compare"]._write(read, tmp_path, arms, "compare")
    assert drawn == [(tmp_path / "one.png", ["grpo"]), (tmp_path / "both.png", ["grpo"])]
    page = (tmp_path / "README.md").read_text()
    assert "![one](one.png)\n\n![both](both.png)\n" in page


def test_what_a_command_has_to_give_is_asked_for(
    tools: dict[str, ModuleType], tmp_path: Path
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(f"{TWO_ARMS}needs: [env.games]\n")
    read = tools["experiment"].read_experiment(path)
    read.require_given(["run.steps=1", "env.games=/data"])
    with pytest.raises(ConfigError, match=r"got no env\.games; give env\.games=PATH"):
        read.require_given(["run.steps=1"])
    shown = tools["compare"]._shown(read, ["model.cache_dir=/c", "env.games=/data", "run.steps=1"])
    assert shown == ["env.games=PATH", "run.steps=1"]
    read.require_arms(["spear", "grpo"])
    with pytest.raises(ConfigError, match="no arm spaer; there are grpo, spear"):
        read.require_arms(["spaer"])


@pytest.fixture
def ended(tools: dict[str, ModuleType], experiment: Any, tmp_path: Path) -> Any:
    """A seed whose run has ended, its result not kept yet."""
    (tmp_path / "file.yaml").write_text("run: {steps: 4}\n")
    seeds = tools["running"].seeds_of(
        experiment, tmp_path / "file.yaml", (), tmp_path / "out", tmp_path / "work"
    )
    seed = next(seed for seed in seeds if seed.arm == "spear")
    seed.folder.mkdir(parents=True)
    (seed.folder / "summary.json").write_text("{}")
    (seed.folder / "metrics.jsonl").touch()
    (seed.folder / "config.yaml").write_text("run: {steps: 4, seed: 7}\n")
    return seed


def test_the_result_of_a_run_that_has_ended_is_kept(
    tools: dict[str, ModuleType], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, won = tools["running"], [[0, 0], [0, 0], [1, None]]
    monkeypatch.setattr(running, "collect", lambda *_: outcome(tools, won, arm="spear", seed=7))
    assert running._run(ended) is None
    assert tools["outcome"].read_outcome(ended.result).seed == 7 and not ended.folder.exists()


def test_what_is_not_of_this_experiment_is_told_and_not_kept(
    tools: dict[str, ModuleType], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = tools["running"]
    said = running._run(ended)
    assert said == f"spear seed 7: {ended.folder} has no 'steps'", "an empty summary"
    mine = outcome(tools, [[0], [0], [0]], arm="spear", seed=7)
    monkeypatch.setattr(running, "collect", lambda *_: mine)
    theirs = outcome(tools, [[0], [0], [0]], panel_sha256="99")
    theirs.write(ended.result.parent.parent / "grpo" / "seed-7.json")
    assert "was played on another panel than" in running._run(ended)
    (ended.folder / "config.yaml").write_text("run: {steps: 9}\n")
    said = running._run(ended)
    assert "is of other settings" in said and "run.steps: 9 there, 4 here" in said
    assert ended.folder.is_dir() and not ended.result.exists()


def test_a_file_takes_the_rest_from_its_base(tools: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TWO_ARMS)
    (tmp_path / "own.yaml").write_text(
        "base: two.yaml\ntitle: Own\nparts: {further: [run.steps=9]}\n"
        "arms: {own: {title: own, settings: [plain, further]}}\ncompare: []\n"
    )
    own = tools["experiment"].read_experiment(tmp_path / "own.yaml")
    assert (own.title, own.first_seed, own.compare) == ("Own", 7, ())
    assert list(own.arms) == ["grpo", "spear", "own"]
    assert own.settings_of("own")[1:] == (
        "replay.enabled=false",
        "curriculum.intrinsic_weight=0",
        "run.steps=9",
    )
    (tmp_path / "part.yaml").write_text(
        "base: two.yaml\nonly: [grpo, own]\npictures: {one: [grpo, spear], two: [spear]}\n"
        "settings: [run.steps=8]\narms: {own: {title: own}}\n"
    )
    part = tools["experiment"].read_experiment(tmp_path / "part.yaml")
    assert (list(part.arms), part.compare, part.pictures) == (["grpo", "own"], (), {})
    assert part.settings == ("run.steps=4", "run.steps=8"), "the later one wins"
    (tmp_path / "part.yaml").write_text("base: two.yaml\nonly: [grpo, gspo]\n")
    with pytest.raises(ConfigError, match="only: no arm gspo; there are grpo, spear"):
        tools["experiment"].read_experiment(tmp_path / "part.yaml")
    (tmp_path / "lost.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        tools["experiment"].read_experiment(tmp_path / "lost.yaml")
