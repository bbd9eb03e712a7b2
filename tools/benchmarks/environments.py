"""Steps and resets a second of each environment on one core, and the memory of many live ones.

Each environment plays tasks of its family over and over in a process of its own, with the actions
of demonstrations where there are any. Memory is what such a process grows by while so many
environments are live, each with a task of its own; the last column is the tasks' size in bytes on
the way there.

    python tools/benchmarks/environments.py                      # all that are installed
    python tools/benchmarks/environments.py alfworld --live 1000

Another family is a line in `FAMILIES`.
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from megatron_spear.config.environments.adapters import GymnasiumSection, ReasoningGymSection
from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.config.environments.custom import CustomSection
from megatron_spear.config.environments.math_code import MathCodeSection
from megatron_spear.config.environments.webshop import WebshopSection
from megatron_spear.config.schema import SftSection
from megatron_spear.envs.family import EnvironmentFamily, family_of
from megatron_spear.errors import ConfigError
from megatron_spear.types import Prompt
from megatron_spear.user_code import load_callable

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER_GAME = f"{EXAMPLES}/custom/number_game.py:NumberGame"
LAKE = {"render_mode": "ansi", "is_slippery": False}


class Case(NamedTuple):
    """A family by its settings, and actions for one that demonstrates nothing."""

    section: Callable[[Path | None], EnvironmentSection]
    actions: Sequence[str] = ()


class Factory(NamedTuple):
    """Makes environments as a worker does."""

    name: str
    options: dict[str, Any]

    def make(self) -> Any:
        """One environment."""
        return load_callable(self.name, f"environment factory {self.name!r}")(**self.options)


FAMILIES: Mapping[str, Case] = {
    "alfworld": Case(lambda games: AlfworldSection(games=games)),
    "webshop": Case(lambda games: WebshopSection()),
    "math_code": Case(lambda games: MathCodeSection()),
    "number_game": Case(lambda games: CustomSection(family=NUMBER_GAME)),
    "gymnasium": Case(
        lambda games: GymnasiumSection(id="FrozenLake-v1", arguments=LAKE),
        ("1", "1", "2", "2", "1", "2"),
    ),
    "reasoning_gym": Case(lambda games: ReasoningGymSection(datasets={"chain_sum": {}})),
}
"""What is measured; other families add a line."""


Played = tuple[dict[str, Any], list[str]]
"""The options of a reset, and actions."""


def tasks(family: EnvironmentFamily, case: Case, count: int) -> list[Played]:
    """Tasks with actions that play them; made by the trainer, as in a run."""
    section = SftSection(noise=0.0)
    try:
        played = [family.demonstration(section, 1, index) for index in range(count)]
    except ConfigError:
        source = family.training(0, 0)
        return [(_options(source.at(index)), list(case.actions)) for index in range(count)]
    return [(_options(one.prompt), [t.action for t in one.turns]) for one in played if one.prompt]


def rates(factory: Factory, played: Sequence[Played], seconds: float) -> tuple[float, float, float]:
    """(Steps a second, first resets a second, resets a second to tasks that were played lately);
    runs in a worker."""
    environment = factory.make()
    first_s, again_s = (
        _timed(lambda: [environment.reset(seed=0, options=own) for own, _ in played])
        for _ in range(2)
    )
    steps, step_s, until = 0, 0.0, time.perf_counter() + seconds
    for options, actions in itertools.cycle(played):
        environment.reset(seed=0, options=options)
        started = time.perf_counter()
        for action in actions:
            steps += 1
            result = environment.step(action)
            if result.terminated or result.truncated:
                break
        step_s += time.perf_counter() - started
        if time.perf_counter() > until:
            break
    return steps / step_s, len(played) / first_s, len(played) / again_s


def live_memory(factory: Factory, tasks: Sequence[bytes]) -> float:
    """MB that a worker grows by while an environment for each task is live."""
    warm = factory.make()
    warm.reset(seed=0, options=pickle.loads(tasks[0]))
    before = _resident_mb()
    live = []
    for task in tasks:
        environment = factory.make()
        environment.reset(seed=0, options=pickle.loads(task))  # as over a worker's socket
        environment.step("look")
        live.append(environment)
    return _resident_mb() - before


def _options(prompt: Prompt) -> dict[str, Any]:
    return {"admissible": True, **prompt.metadata}


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _resident_mb() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


def measured(name: str, args: argparse.Namespace) -> Iterator[str]:
    """The cells of one row."""
    case = FAMILIES[name]
    family = family_of(case.section(args.games))
    factory = Factory(family.factory, dict(family.factory_options))
    source = family.training(0, 0)
    live = [pickle.dumps(_options(source.at(index))) for index in range(args.live)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        played = tasks(family, case, 64)
        for rate in pool.apply(rates, (factory, played, args.seconds)):
            yield f"{rate:,.0f}"
    with context.Pool(1) as pool:
        yield f"{pool.apply(live_memory, (factory, live)):,.0f}"
    yield f"{sum(map(len, live)) / 2**20:,.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(FAMILIES), help=", ".join(FAMILIES))
    parser.add_argument("--games", type=Path, default=None, help="ALFWorld's games; else made ones")
    parser.add_argument("--seconds", type=float, default=3.0, help="of play for each environment")
    parser.add_argument("--live", type=int, default=1000, help="environments live at once")
    args = parser.parse_args()
    os.sched_setaffinity(0, {random.Random(0).choice(sorted(os.sched_getaffinity(0)))})
    print("| environment | steps/s | first resets/s | resets/s again | live MB | tasks MB |")
    print("|---|---|---|---|---|---|")
    for name in args.names:
        try:
            print(f"| {name} | {' | '.join(measured(name, args))} |", flush=True)
        except ConfigError as error:
            print(f"| {name} | left out: {error} |", flush=True)


if __name__ == "__main__":
    main()
