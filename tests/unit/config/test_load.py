"""From text to a checked configuration, with every mistake told at once."""

from pathlib import Path

import pytest

from megatron_spear.config.environments.base import WindowHistory
from megatron_spear.config.load import dump_config, load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError
from megatron_spear.types import TASK_TYPES


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


def mistakes(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as told:
        load_config(path, overrides)
    return [line.strip() for line in str(told.value).splitlines()[1:]]


def test_defaults_without_any_source() -> None:
    assert load_config() == RunConfig()


def test_overrides_come_after_the_file_in_three_spellings(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {steps: 5, seed: 1}\nrollout:\n  group_size: 4\n")
    config = load_config(
        path, ["run.steps=6", "--rollout.group_size", "2", "--replay.capacity=64", "run.steps=7"]
    )
    assert (config.run.steps, config.run.seed) == (7, 1)
    assert (config.rollout.group_size, config.replay.capacity) == (2, 64)


def test_values_are_yaml_and_floats_are_lax(tmp_path: Path) -> None:
    path = write(tmp_path, "policy: {optimizer: {lr: 1e-6}}\n")
    config = load_config(
        path,
        [
            "sft.optimizer.lr=1e-5",
            "env.history={window: 2}",
            "replay.ratio_filter=null",
            "env.task_types=[pick_and_place_simple]",
            "--evaluation.temperature",
            "0",
            "reward.success=-1",
        ],
    )
    assert config.policy.optimizer.lr == 1e-6
    assert config.sft.optimizer.lr == 1e-5
    assert config.env.history == WindowHistory(window=2)
    assert config.replay.ratio_filter is None
    assert config.env.task_types == TASK_TYPES[:1]
    assert config.reward.success == -1.0


def test_a_map_keeps_the_defaults_of_its_neighbours() -> None:
    """sft.optimizer has defaults of its own; one changed key must not bring OptimizerSection's."""
    changed = load_config(None, ["sft.optimizer.lr=1e-5"]).sft.optimizer
    assert changed == RunConfig().sft.optimizer.model_copy(update={"lr": 1e-5})
    assert load_config(None, ["sft.optimizer={lr: 1e-5}"]).sft.optimizer == changed


def test_texts_and_paths_are_taken_literally() -> None:
    config = load_config(None, ["run.name=007", "run.dir=2024", "env.games=null"])
    assert (config.run.name, config.run.dir, config.env.games) == ("007", Path("2024"), None)


def test_window_of_the_file_can_be_changed_or_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, "env: {history: {window: 2}}\n")
    assert load_config(path, ["env.history.window=3"]).env.history == WindowHistory(window=3)
    assert load_config(path, ["env.history=full"]).env.history == "full"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "rollout.group_size=eight",
            "rollout.group_size: got 'eight' (text), expected an integer >= 1",
        ),
        ("rollout.group_size=0", "rollout.group_size: got 0 (integer), expected an integer >= 1"),
        ("rollout.group_size=true", "rollout.group_size: got True, expected an integer >= 1"),
        ("run.stop_after=0", "expected an integer >= 1, or null"),
        ("sft.noise=.nan", "sft.noise: got nan (number), expected a number >= 0 and <= 1"),
        ("replay.loss.low=.nan", "got nan (number), expected a number"),
        ("replay.loss.low=70", "low=70 is not below high=60: the band is empty"),
        ("algorithm.loss.type=ppo", "got 'ppo' (text), expected 'clipped', or 'clip_cov', or"),
        (
            "algorithm.loss={type: gpg, clip_low: 0.1}",
            "algorithm.loss.clip_low: algorithm.loss.type=gpg has no such key",
        ),
        ("env.history=3", "expected one of 'full', 'rendered', or a map with keys among window"),
        (
            "env.history={window: 0}",
            "env.history.window: got 0 (integer), expected an integer >= 1",
        ),
        (
            "env.history={windw: 2}",
            "env.history.windw: no such key; did you mean env.history.window?",
        ),
        (
            "env.task_types=[juggle]",
            "env.task_types[0]: got 'juggle' (text), expected one of 'pick_",
        ),
        ("env.generator.max_objects=5", "env.generator: min_objects=8 is above max_objects=5"),
        (
            "rollout.group_sise=3",
            "rollout.group_sise: no such key; did you mean rollout.group_size?",
        ),
        ("group_size=3", "did you mean rollout.group_size?"),
        ("algorithm.capacity=3", "did you mean replay.capacity?"),
        ("run.lr=1e-3", "did you mean sft.optimizer.lr or policy.optimizer.lr?"),
        ("roll_out.group_size=3", "did you mean rollout?"),
        ("policy.optimiser.lr=3", "policy.optimiser: no such key; did you mean policy.optimizer?"),
        ("zzz=3", "zzz: no such key; expected one of run, resume, model"),
        ("replay=null", "replay: got null, expected a map with keys among enabled"),
        ("run.steps=[1", "run.steps: got '[1', not YAML"),
        ("run.steps=", "run.steps: no value"),
        ("run..steps=1", "expected a.b=value"),
        ("run.steps", "expected key=value or --key value"),
        ("--run.steps", "has no value; write --run.steps=VALUE"),
        (
            "hooks=3",
            "hooks: got 3 (integer), expected a list, each entry a map with keys among name, path",
        ),
        ("hooks=[3]", "hooks[0]: got 3 (integer), expected a map with keys among name, path, sett"),
        ("hooks=[{name: a}]", "hooks[0].path: missing, expected a text"),
        ("hooks=[{name: a, pth: m:C}]", "hooks[0].pth: no such key; did you mean hooks[0].path?"),
        ("hooks=[{name: a, of: 3}]", "hooks[0].of: no such key; expected one of name, path, sett"),
        ("hooks=[{name: 7, path: m:C}]", "hooks[0].name: got 7 (integer), expected a text"),
        ("hooks=[{name: My, path: m:C}]", "hooks[0].name: got 'My', expected small letters"),
        ("hooks=[{name: a, path: m.C}]", "hooks[0].path: got 'm.C', expected 'package.module:Cl"),
        (
            "hooks=[{name: a, path: m:C, settings: 3}]",
            "hooks[0].settings: got 3 (integer), expected a map",
        ),
        ("hook=[]", "hook: no such key; did you mean hooks?"),
    ],
)
def test_each_mistake_names_key_value_and_what_is_expected(override: str, expected: str) -> None:
    lines = mistakes(None, override)
    assert any(expected in line for line in lines), lines
    assert override in "".join(lines), "the origin of the value is told"


def test_all_mistakes_are_told_at_once_with_their_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "run:\n  steps: x\n  nme: a\nrollout:\n  group_size: 0\n")
    lines = mistakes(path, "--run.seed", "-1", "bad")
    assert len(lines) == 5
    assert any(
        line.startswith("run.steps: got 'x'") and "(a.yaml line 2)" in line for line in lines
    )
    assert any("did you mean run.name?" in line and "(a.yaml line 3)" in line for line in lines)
    assert any("(override '--run.seed -1')" in line for line in lines)


def test_a_missing_value_does_not_swallow_the_next_option() -> None:
    assert mistakes(None, "--run.steps", "--run.seed", "3") == [
        "override '--run.steps': has no value; write --run.steps=VALUE"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run:\n  steps: [1\nrollout: {}\n", "a.yaml line 3, column"),
        ("- 1\n", "got list at the top, expected a map of sections"),
        ("run: {steps: 1}\nrun: {seed: 1}\n", "run: given twice (a.yaml lines 1 and 2)"),
        ("run:\n  1: 2\n", "run.1: no such key"),
        ("run: 3\n", "run: got 3 (integer), expected a map with keys among name, dir"),
    ],
)
def test_mistakes_of_the_file_itself(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in mistakes(write(tmp_path, text))[0]


def test_a_missing_file_says_where_relative_paths_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = mistakes(Path("nowhere.yaml"))
    assert "nowhere.yaml: cannot be read (No such file or directory)" in line
    assert f"the current directory, {tmp_path}" in line


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == RunConfig()


def test_dump_reads_back_equal_in_schema_order(tmp_path: Path) -> None:
    config = load_config(
        None,
        ["env.history={window: 2}", "policy.optimizer.lr=1e-7", "run.name=1e3", "model.path=/m"],
    )
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    sections = [line[:-1] for line in text.splitlines() if line[0] != " " and line[-1] == ":"]
    order = list(RunConfig.model_fields)
    assert sections == [name for name in order if name in sections]


def test_resume_without_a_file_takes_the_config_of_the_run(tmp_path: Path) -> None:
    first = load_config(None, ["run.steps=9", "run.stop_after=3", "reward.success=2"])
    (tmp_path / "config.yaml").write_text(dump_config(first))
    config = load_config(None, [f"resume={tmp_path}"])
    assert (config.run.steps, config.reward.success) == (9, 2.0)
    assert config.run.stop_after is None, "one launch's stop is not the next one's"
    assert config.run.dir == config.resume == tmp_path


def test_resume_with_a_file_takes_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {dir: runs/x, steps: 4}\n")
    config = load_config(path, [f"--resume={tmp_path}"])
    assert (config.run.steps, config.run.dir) == (4, tmp_path)


TWO_HOOKS = """
hooks:
  - {name: a, path: "m:A"}
  - name: b
    path: ./b.py:B
    settings: {x: {y: [1, two]}, 3: false}
"""


def test_a_list_of_sections_is_read_and_written_back(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TWO_HOOKS))
    assert [(hook.name, hook.module, hook.class_name) for hook in config.hooks] == [
        ("a", "m", "A"),
        ("b", "./b.py", "B"),
    ]
    assert config.hooks[1].settings == {"x": {"y": [1, "two"]}, "3": False}
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_list_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path, TWO_HOOKS)
    config = load_config(path, ["hooks=[{name: c, path: m:C}]"])
    assert [hook.name for hook in config.hooks] == ["c"]
    assert load_config(path, ["hooks=[]"]).hooks == ()


def test_a_key_given_twice_in_an_entry_of_a_list(tmp_path: Path) -> None:
    text = 'hooks:\n- name: a\n  path: "m:A"\n- name: b\n  path: "m:B"\n  path: "m:C"\n'
    told = "hooks[1].path: given twice (a.yaml lines 5 and 6)"
    assert mistakes(write(tmp_path, text)) == [told]


def test_another_type_of_loss_forgets_the_default_ones_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "algorithm: {loss: {type: kl_cov, coef: 0.3}}\n")
    loss = load_config(path).algorithm.loss
    assert (loss.type, loss.coef, loss.fraction) == ("kl_cov", 0.3, 0.002)
    again = load_config(write(tmp_path, dump_config(load_config(path))))
    assert again.algorithm.loss == loss
    assert load_config(path, ["algorithm.loss.type=gpg"]).algorithm.loss.type == "gpg"
    assert load_config(None, ["replay.loss.fraction=0.1"]).replay.loss.low == 2.0
