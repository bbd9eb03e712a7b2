"""Math with code for the trainer: problems as prompts, the tool, the view, demonstrations."""

import functools
import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_spear.config.environments.math_code import ArithmeticKind, MathCodeSection
from megatron_spear.config.schema import SftSection
from megatron_spear.data.prompts import FreshPrompts, PoolPrompts, PromptSource
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.family import EnvironmentFamily, Panel, Vocabulary
from megatron_spear.envs.math_code.arithmetic import Arithmetic, fresh_problem
from megatron_spear.envs.math_code.conversations import conversations_sha256, load_conversations
from megatron_spear.envs.math_code.demonstrations import demonstrate, demonstration_environment
from megatron_spear.envs.math_code.problems import (
    Problem,
    load_problems,
    plain_text,
)
from megatron_spear.envs.math_code.prompts import MathView, math_view
from megatron_spear.envs.math_code.vocabulary import PHRASES, math_words
from megatron_spear.envs.sandbox.make import check_sandbox
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import Prompt

logger = logging.getLogger(__name__)

_MOST_REPEATS = 100


class MathCodeFamily(EnvironmentFamily):
    """Problems from files, or generated ones, with a Python interpreter."""

    factory = "megatron_spear.envs.math_code.environment:MathCodeEnvironment"

    def __init__(self, section: MathCodeSection) -> None:
        self._section = section

    @property
    def factory_options(self) -> dict[str, Any]:
        """The environment's settings; a sandbox that cannot work here is a ConfigError."""
        check_sandbox(self._section.sandbox)
        return {**self._tool_options(), "sandbox": self._section.sandbox.model_dump(mode="json")}

    def view(self) -> MathView:
        """The view of ``env.prompt``."""
        return math_view(self._section.prompt)

    def training(self, order_seed: int, made_seed: int) -> PromptSource:
        """The files' problems epoch by epoch, or fresh ones."""
        if self._section.problems is None:
            return self._fresh(made_seed, self._section.arithmetic.kinds)
        return _pool(self._training_problems(), order_seed)

    def training_by_kind(self, order_seed: int, made_seed: int) -> Mapping[str, PromptSource]:
        """By kind of generated problem, or by file."""
        if self._section.problems is None:
            kinds = tuple(dict.fromkeys(self._section.arithmetic.kinds))
            return {kind: self._fresh(made_seed, [kind]) for kind in kinds}
        by_kind: dict[str, list[Problem]] = {kind: [] for kind in self._section.task_kinds}
        for problem in self._training_problems():
            by_kind[problem.kind].append(problem)
        return {kind: _pool(own, order_seed) for kind, own in by_kind.items() if own}

    def panel(self, size: int | None, made_seed: int) -> Panel:
        """Generated problems that are held out, or a spread of the panel's files by id."""
        if self._section.eval_problems is None:
            return _panel(self._held_out(size, made_seed))
        loaded = sorted(load_problems(self._section.eval_problems), key=lambda p: p.id)
        size = len(loaded) if size is None else size
        if len(loaded) < size:
            raise DataError(
                f"evaluation.games: got {size}, but env.eval_problems have {len(loaded)} problems; "
                "lower it or name more files"
            )
        spread = [loaded[i * len(loaded) // size] for i in range(size)]
        return _panel([loaded_prompt(problem) for problem in spread])

    def demonstration(self, section: SftSection, made_seed: int, index: int) -> Demonstration:
        """A recorded conversation, or a generated problem as it is solved with the tool."""
        env = self._section
        if env.demonstrations is not None:
            recorded = _conversations(env.demonstrations)
            epoch, place = divmod(index, len(recorded))
            return recorded[_order(len(recorded), section.seed, epoch)[place]]
        problem = self._problem(made_seed, index, env.arithmetic.kinds)
        played = demonstrate(
            problem,
            random.Random(f"sft/{section.seed}/{index}"),
            demonstration_environment(**self._tool_options()),
            noise=section.noise,
            max_turns=env.max_turns,
            guesses=env.arithmetic.guesses,
        )
        return replace(played, prompt=made_prompt(problem))

    def contents(self) -> dict[str, str]:
        """Of the recorded conversations."""
        paths = self._section.demonstrations
        return {} if paths is None else {"demonstrations": conversations_sha256(paths)}

    def vocabulary(self) -> Vocabulary:
        """The words of generated problems and of the tool's texts; digits are tokens."""
        return Vocabulary(math_words(), PHRASES, roles=("tool",), single_digits=True)

    def _tool_options(self) -> dict[str, Any]:
        env = self._section
        return {
            "grader": env.grader,
            "grader_limit_s": env.grader_limit_s,
            "prelude": env.prelude,
            "max_calls_per_turn": env.max_calls_per_turn,
            "max_output_chars": env.max_output_chars,
            "stderr_lines": env.stderr_lines,
        }

    def _problem(
        self, seed: int, index: int, kinds: Sequence[ArithmeticKind], *, held_out: bool = False
    ) -> Arithmetic:
        largest = self._section.arithmetic.largest
        return fresh_problem(seed, index, kinds, largest, held_out=held_out)

    def _fresh(self, seed: int, kinds: Sequence[ArithmeticKind]) -> PromptSource:
        return FreshPrompts(lambda index: made_prompt(self._problem(seed, index, kinds)))

    def _held_out(self, size: int | None, seed: int) -> list[Prompt]:
        """``size`` different problems that are never trained on."""
        if size is None:
            raise ConfigError(
                "evaluation.games=null takes all problems of the panel's files, and "
                "env.eval_problems=null generates them; give a number"
            )
        found: dict[str, Prompt] = {}
        for index in range(size * _MOST_REPEATS):
            kinds = self._section.arithmetic.kinds
            problem = self._problem(seed, index, kinds, held_out=True)
            found.setdefault(problem.text, made_prompt(problem))
            if len(found) == size:
                return list(found.values())
        raise DataError(
            f"evaluation.games={size}: found {len(found)} different problems up to "
            f"env.arithmetic.largest={self._section.arithmetic.largest}; raise that, or lower this"
        )

    def _training_problems(self) -> list[Problem]:
        assert self._section.problems is not None, "generated problems are made by fresh_problem"
        return _without_panel(self._section.problems, self._section.eval_problems)


def made_prompt(problem: Arithmetic) -> Prompt:
    """A generated problem as a prompt; the same problem always has the same id."""
    return Prompt(
        prompt_id=f"arithmetic/{problem.kind}/{problem.expression}",
        env="math_code",
        kind=problem.kind,
        answer=str(problem.answer),
        metadata={"problem": problem.text, "answer": str(problem.answer)},
    )


def loaded_prompt(problem: Problem) -> Prompt:
    """A loaded problem as a prompt."""
    return Prompt(
        prompt_id=problem.id,
        env="math_code",
        kind=problem.kind,
        answer=problem.answer,
        metadata={"problem": problem.text, "answer": problem.answer},
    )


def _pool(problems: Sequence[Problem], order_seed: int) -> PromptSource:
    return PoolPrompts([loaded_prompt(problem) for problem in problems], order_seed)


def _panel(prompts: Sequence[Prompt]) -> Panel:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_id, dict(prompt.metadata)]).encode())
    return Panel(tuple(prompts), digest.hexdigest())


@functools.lru_cache(maxsize=1)
def _conversations(paths: tuple[Path, ...]) -> list[Demonstration]:
    return load_conversations(paths)


@functools.lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> list[int]:
    """The order of the recorded conversations in an epoch of the warm start."""
    return random.Random(f"sft/{seed}/epoch/{epoch}").sample(range(size), size)


@functools.lru_cache(maxsize=2)
def _without_panel(paths: tuple[Path, ...], panel_paths: tuple[Path, ...] | None) -> list[Problem]:
    """The problems of files but for those of the panel's files."""
    problems = load_problems(paths)
    if panel_paths is None:
        return problems
    held_out = {plain_text(problem.text) for problem in load_problems(panel_paths)}
    kept = [problem for problem in problems if plain_text(problem.text) not in held_out]
    if not kept:
        raise DataError(
            "env.problems: all of its problems are on the panel (env.eval_problems) too; name "
            "other files"
        )
    if len(kept) < len(problems):
        logger.info(
            "left out %d of %d problems: they are on the panel",
            len(problems) - len(kept),
            len(problems),
        )
    return kept
