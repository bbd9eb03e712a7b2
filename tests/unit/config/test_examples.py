"""The examples that come along: listed, copied whole, never over somebody's changes."""

from pathlib import Path

import pytest

from megatron_spear.cli import main
from megatron_spear.config.examples import copy_examples, list_examples, shipped_folder
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_all_are_listed_with_a_sentence() -> None:
    found = list_examples()
    assert [example.name for example in found] == sorted(
        path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml")
    )
    assert all(example.summary.endswith(".") and len(example.summary) > 20 for example in found)


def test_a_copy_has_every_file_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(["examples", "copy"]) == 0
    files = [
        path
        for path in sorted(EXAMPLES.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    copied = [path for path in sorted((tmp_path / "examples").rglob("*")) if path.is_file()]
    assert [p.read_bytes() for p in copied] == [p.read_bytes() for p in files]
    assert f"{len(files)} new files" in capsys.readouterr().out
    (tmp_path / "examples" / "alfworld" / "README.md").unlink()
    assert copy_examples(tmp_path / "examples") == 1


def test_changed_files_are_left_alone(tmp_path: Path) -> None:
    copy_examples(tmp_path)
    mine = tmp_path / "alfworld" / "quickstart.yaml"
    mine.write_text("run: {steps: 1}\n")
    (tmp_path / "webshop" / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"other files.*alfworld/quickstart\.yaml.*nothing"):
        copy_examples(tmp_path)
    assert mine.read_text() == "run: {steps: 1}\n"
    assert not (tmp_path / "webshop" / "README.md").exists()


def test_a_missing_example_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"megatron-spear examples copy"):
        load_config("examples/alfworld/quickstart.yaml")
    with pytest.raises(ConfigError) as other:
        load_config("examples/alfworld/mine.yaml")
    assert "examples copy" not in str(other.value)


def test_a_list_takes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got the folder .*; `megatron-spear examples copy "):
        main.run(["examples", "list", str(tmp_path)])


def test_the_list_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["examples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("alfworld/quickstart.yaml ") for line in lines)
    assert "examples copy" in lines[-1]
    assert shipped_folder() == EXAMPLES
