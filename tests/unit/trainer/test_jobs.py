"""What the commands share: which settings count for which, the log's form, the panel's games."""

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.config.load import load_config
from megatron_spear.envs.alfworld.task import fresh_game
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.trainer import build, jobs


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("megatron_spear")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


def test_the_package_speaks_plainly_others_only_when_it_matters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console, controller = jobs._start(load_config(), "train")
    assert controller
    with console:
        logging.getLogger("megatron_spear.x").info("saved %s", "[all]")
        logging.getLogger("megatron_spear.x").debug("a detail")
        logging.getLogger("megatron_spear.x").warning("hm")
        logging.getLogger("elsewhere").info("chatter")
        logging.getLogger("elsewhere").error("oh")
    assert capsys.readouterr().out.splitlines() == [
        "saved [all]",
        "WARNING rank 0 megatron_spear.x: hm",
        "ERROR rank 0 elsewhere: oh",
    ]


def test_records_come_above_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: the record has a line of its own, the bar is drawn again under it."""
    screen = io.StringIO()
    terminal = RichConsole(file=screen, force_terminal=True, width=100)
    console, _ = jobs._start(load_config(), "train")
    monkeypatch.setattr(console, "_rich", terminal)
    monkeypatch.setattr(console, "_is_live", True)
    with console, console.bar("step", 4) as bar:
        bar.advance()
        logging.getLogger("megatron_spear.x").info("saved checkpoint of step 1")
        bar.advance()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    (line,) = [x for x in re.split(r"[\r\n]+", plain) if "saved checkpoint" in x]
    assert line.strip() == "saved checkpoint of step 1"


def test_other_ranks_do_not_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    jobs._start(load_config(), "train")
    logging.getLogger("megatron_spear.x").info("saved")
    logging.getLogger("megatron_spear.x").warning("hm")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "WARNING rank 1 megatron_spear.x: hm\n")


def test_an_evaluation_does_not_ask_for_the_training_layout() -> None:
    config = load_config(None, ["policy.tensor_parallel=2", "policy.pipeline_parallel=2"])
    jobs._start(config, "evaluate")
    with pytest.raises(ConfigError, match="world size 1 is not a multiple"):
        jobs._start(config, "sft")


def test_only_winnable_games_are_played(tmp_path: Path) -> None:
    """On the panel, which is checked as a whole, and in training, where each is when it comes."""
    games = [fresh_game(0, i, ("pick_and_place_simple",), GeneratorSection()) for i in range(2)]
    config = load_config(None, [f"env.games={tmp_path}", "evaluation.games=2"])

    def write() -> None:
        rows = "".join(json.dumps(game.to_fields()) + "\n" for game in games)
        for split in ("train", "valid_seen"):
            (tmp_path / f"{split}.jsonl").write_text(rows)

    write()
    ids = {game.id for game in games}
    assert {prompt.prompt_id for prompt in build.make_panel(config).prompts} == ids
    source = build.training_prompts(config)
    assert {source.at(i).prompt_id for i in range(2)} == ids
    games[1] = replace(games[1], problem=re.sub(r"\(canContain [^)]*\)", "", games[1].problem))
    write()
    with pytest.raises(DataError, match=f"game {games[1].id} cannot be won"):
        build.make_panel(config)
    source = build.training_prompts(config)
    with pytest.raises(DataError, match=f"game {games[1].id} cannot be won"):
        [source.at(i) for i in range(2)]
