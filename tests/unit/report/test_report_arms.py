"""Runs go together by their settings, or as the user says."""

from pathlib import Path

import pytest

from megatron_spear.errors import ConfigError
from megatron_spear.report.arms import arms_of
from megatron_spear.report.runs import read_run
from megatron_spear.testing.recorded_runs import made_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds with replay, two without, one of another length of answers."""
    place = tmp_path_factory.mktemp("arms")
    plain = ("replay.enabled=false",)
    return [
        made_run(place / "a0", seed=0, steps=2, recorded=False),
        made_run(place / "b0", seed=0, steps=2, settings=plain, recorded=False),
        made_run(place / "a1", seed=1, steps=2, recorded=False),
        made_run(place / "b1", seed=1, steps=2, settings=plain, recorded=False),
        made_run(place / "c", steps=2, settings=("run.name=mine", *plain), recorded=False),
    ]


def test_equal_settings_but_the_seed_are_one_arm(folders: list[Path]) -> None:
    runs = [read_run(folder) for folder in folders]
    arms = arms_of(runs, {})
    assert [arm.runs for arm in arms] == [(0, 2), (1, 3, 4)], "a name and a folder do not count"
    assert [arm.name for arm in arms] == ["replay.enabled=True", "replay.enabled=False"]
    assert arms[0].differing == {"replay.enabled": True}


def test_the_user_may_say_what_goes_together(folders: list[Path]) -> None:
    runs = [read_run(folder) for folder in folders]
    arms = arms_of(runs, {"mixed": [folders[0], folders[1]]})
    assert (arms[0].name, arms[0].runs) == ("mixed", (0, 1))
    assert [arm.runs for arm in arms[1:]] == [(2,), (3, 4)]


def test_a_run_is_in_one_group_only(folders: list[Path]) -> None:
    runs = [read_run(folder) for folder in folders]
    with pytest.raises(ConfigError, match="is in the groups one and two; expected one"):
        arms_of(runs, {"one": folders[:2], "two": folders[1:3]})


def test_settings_of_another_version_still_group(tmp_path: Path) -> None:
    for name, seed in (("x", 1), ("y", 2)):
        folder = made_run(tmp_path / name, seed=seed, steps=1, recorded=False)
        with (folder / "config.yaml").open("a") as file:
            file.write("gone: {in: later}\n")
    (arm,) = arms_of([read_run(tmp_path / "x"), read_run(tmp_path / "y")], {})
    assert arm.runs == (0, 1) and arm.differing == {}


def test_runs_without_settings_are_not_averaged(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / name, steps=1, recorded=False) for name in ("x", "y")]
    for folder in folders:
        (folder / "config.yaml").unlink()
    arms = arms_of([read_run(folder) for folder in folders], {})
    assert [(arm.name, arm.runs) for arm in arms] == [("x", (0,)), ("y", (1,))]
