"""Every command of the documentation is run: here in a scratch folder, or by a test that is named;
whatever needs GPUs, a cluster or a download is at least parsed, with all its settings."""

import ast
import contextlib
import json
import lzma
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented_commands import (
    NEEDS,
    ROOT,
    Command,
    all_blocks,
    commands,
    spans,
    unmarked_commands,
)
from documented_table import ELSEWHERE, OTHERS, RUN, Run, run_of
from tiny_runs import run_here

from megatron_spear.cli import convert, evaluate, launch, main, plan, report, serve
from megatron_spear.cli.settings import split_settings
from megatron_spear.config.check import check_config
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError

pytestmark = pytest.mark.timeout(300)

COMMANDS = [command for block in all_blocks("bash") for command in commands(block)]
OURS = [c for c in COMMANDS if c.words[0] in ("megatron-spear", "torchrun")]
RUN_HERE = sorted({c.text: c for c in COMMANDS if not c.needs and run_of(c.text)}.values(), key=str)
REQUESTS = [c for c in COMMANDS if c.words[0] == "curl"]


class Scratch:
    """A folder like a user's clone, in which commands run once each; and the server of one."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self._cache, self._done = folder, cache, set[str]()
        self.url = ""
        self._server: subprocess.Popen[str] | None = None

    def run(self, text: str) -> None:
        """Run a command of the table, those before it first; only its first call does."""
        if text in self._done:
            return
        run, words = run_of(text), _words(text)
        assert run is not None
        for before in run.after:
            self.run(before)
        words = [_swapped(word, run) for word in words]
        words += [*run.more, *([f"model.cache_dir={self._cache}"] if run.cache else [])]
        with contextlib.chdir(self.folder):
            self._run(words, run.status)
        self._done.add(text)

    def close(self) -> None:
        """End the server, which says that it ended well."""
        if self._server is not None:
            self._server.terminate()
            assert self._server.wait(60) == 0

    def _run(self, words: list[str], status: int) -> None:
        if words[0] == "python":
            exec(compile(words[2], "<documented>", "exec"), {})
            return
        if words[-1] == "&":
            self._serve([*words[1:-1], "--port", "0"])
            return
        done = run_here(words[1:])
        assert done.status == status, f"exit status {done.status}\n{done.out}\n{done.err}"

    def _serve(self, words: list[str]) -> None:
        line = [sys.executable, "-m", "megatron_spear.cli.main", *words]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}"}
        self._server = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        assert self._server.stdout is not None
        said = self._server.stdout.readline()
        self.url = said.rpartition(" ")[2].strip()
        assert said.startswith("tiny is served at http://"), said


def _words(text: str) -> list[str]:
    return list(next(c.words for c in COMMANDS if c.text == text))


def _swapped(word: str, run: Run) -> str:
    return run.swap.get(word, word)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a user has by then: the examples, a file of a run's own, two games."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("examples", "tools", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    quickstart = yaml.safe_load((ROOT / "examples/alfworld/quickstart.yaml").read_text())
    (folder / "small.yaml").write_text(yaml.safe_dump(quickstart))
    (folder / "my-run.yaml").write_text(yaml.safe_dump(_my_run()))
    games = folder / "PATH" / "valid_seen.jsonl.xz"
    games.parent.mkdir()
    games.write_bytes(lzma.compress(_two_games().encode()))
    return folder


@pytest.fixture(scope="module")
def scratch(clone: Path, cache: Path) -> Iterator[Scratch]:
    made = Scratch(clone, cache)
    yield made
    made.close()


def _my_run() -> dict[str, Any]:
    """What docs/getting-started.md writes."""
    (block,) = [b for b in all_blocks("yaml") if b.page == "docs/getting-started.md"]
    written: dict[str, Any] = yaml.safe_load(block.text)
    return written


def _two_games() -> str:
    from megatron_spear.config.schema import RunConfig
    from megatron_spear.envs.alfworld.task import fresh_game

    size = RunConfig().env.generator
    games = [fresh_game(7, number, ("look_at_obj_in_light",), size) for number in range(2)]
    return "".join(json.dumps(game.to_fields()) + "\n" for game in games)


@pytest.mark.parametrize("command", RUN_HERE, ids=str)
def test_it_runs(command: Command, scratch: Scratch) -> None:
    scratch.run(command.text)


@pytest.mark.parametrize("command", REQUESTS, ids=str)
def test_a_request_is_answered(command: Command, scratch: Scratch) -> None:
    scratch.run(next(text for text in RUN if text.endswith("&")))
    quiet, url, *data = command.words[1:]
    assert quiet == "-s" and data[:1] in ([], ["-d"])
    body = data[1].encode() if data else None
    place = scratch.url + "/" + url.partition("/")[2]
    with contextlib.chdir(scratch.folder), urllib.request.urlopen(place, body, 30) as answer:
        assert answer.status == 200 and json.loads(answer.read()) is not None


def test_each_is_run_or_says_what_it_needs() -> None:
    untested = [
        f"{command.page}:{command.line}: {command.text}"
        for command in COMMANDS
        if not command.needs
        and command not in REQUESTS
        and run_of(command.text) is None
        and command.text not in {**ELSEWHERE, **OTHERS}
    ]
    assert not untested, "add these to documented_table.py, or say what they need:\n" + "\n".join(
        untested
    )
    assert {c.needs for c in COMMANDS} <= {"", *NEEDS}
    assert len(RUN_HERE) >= 20


def test_the_table_has_nothing_that_is_not_documented() -> None:
    assert {*RUN, *ELSEWHERE, *OTHERS} <= {command.text for command in COMMANDS}


def test_commands_stand_in_blocks_that_are_tested() -> None:
    assert not unmarked_commands(), "mark these blocks as bash, or output as text"


@pytest.mark.parametrize(("text", "named"), ELSEWHERE.items(), ids=list(ELSEWHERE))
def test_the_test_that_runs_it_elsewhere_is_there(text: str, named: tuple[str, str]) -> None:
    place, reason = named
    file, _, function = place.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert reason
    if function:
        tree = ast.parse(source)
        assert function in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    else:
        assert text in source


@pytest.mark.parametrize("command", OURS, ids=str)
def test_its_arguments_and_settings_are_known(command: Command, clone: Path) -> None:
    with contextlib.chdir(clone):
        parse(list(command.words))


def test_commands_within_sentences_are_known_too(clone: Path) -> None:
    named = {text for _, text in spans() if text.startswith("megatron-spear ")}
    whole = [text.split() for text in named if len(text.split()) > 2]
    assert len(whole) >= 5
    with contextlib.chdir(clone):
        for words in whole:
            parse(words)
    assert {text.split()[1] for text in named} <= {*main._COMMANDS, *main._WITH_PARSERS}


@pytest.mark.parametrize(
    "line",
    [
        "train examples/alfworld/quickstart.yaml run.step=3",
        "evaluate MODEL --env alfworld --pannel x",
        "launch slurm examples/alfworld/quickstart.yaml cluster.nodes=2",
        "convert hf-to-megatron A",
        "serve MODEL --slots 3",
    ],
)
def test_a_renamed_setting_or_option_is_found(line: str, clone: Path) -> None:
    with contextlib.chdir(clone), pytest.raises((ConfigError, SystemExit)):
        parse(["megatron-spear", *line.split()])


def parse(words: list[str]) -> None:
    """Arguments through the command's own parser, settings through the schema and its checks;
    SystemExit or ConfigError where one is not known."""
    if words[0] == "torchrun":
        words = ["megatron-spear", "train", *words[words.index("megatron_spear.cli.train") + 1 :]]
    name, arguments = words[1], [word for word in words[2:] if word != "&"]
    parsers: dict[str, Callable[[], Any]] = {
        "convert": convert.build_parser, "serve": serve.build_parser, "plan": plan.build_parser,
        "evaluate": evaluate.build_parser, "launch": launch.build_parser,
        "report": report.build_parser,
    }  # fmt: skip
    if name in ("convert", "serve", "report"):
        parsers[name]().parse_args(arguments)
        return
    parser = parsers.get(name, main.build_parser)()
    options_of = {"evaluate": evaluate._OPTIONS}
    given, settings = split_settings(arguments, *([options_of[name]] if name in options_of else []))
    options, unknown = parser.parse_known_args(given if name in parsers else [name, *given])
    if name == "evaluate":
        named = {"env": options.env, "attempts": options.attempts}
        settings += [f"{evaluate._SETTING_OF[k]}={v}" for k, v in named.items() if v is not None]
    _check(getattr(options, "config", None), [*settings, *unknown], name)


def _check(file: str | None, settings: list[str], name: str) -> None:
    known = file if file is not None and Path(file).is_file() else None
    config = load_config(known, [s for s in settings if not s.startswith("resume=")])
    if known is not None and name in ("launch", "train"):
        ranks = config.cluster.world_size if name == "launch" else config.policy.tensor_parallel
        assert check_config(config, ranks) == []
