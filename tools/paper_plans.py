#!/usr/bin/env python
"""The paper's combinations of task, method and layout, planned: python tools/paper_plans.py.

Writes what ``megatron-spear plan`` says of each into the examples' READMEs, and a job script for
each task and layout into slurm/paper. A test holds both to be current.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.cli.launch_common import launchable
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.cluster.planner.refusal import refusals
from megatron_spear.cluster.planner.search import Choice, judged
from megatron_spear.cluster.slurm import render, slurm_problems
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
START, END = "<!-- by tools/paper_plans.py -->", "<!-- end -->"
AGENT_METHODS = tuple(
    f"{trick}{base}{spear}"
    for spear in ("", "-spear")
    for trick in ("", "drbot-")
    for base in ("grpo", "gigpo")
)
METHODS = {
    "alfworld": AGENT_METHODS,
    "webshop": AGENT_METHODS,
    "math_code": ("grpo", "drbot-grpo", "drbot-grpo-spear"),
}
"""By task, the files of examples/methods that the paper tries on it."""
_AGENT_LAYOUTS = tuple(
    ((f"qwen2.5-{size}-{gpus}gpus",), "") for size in ("1.5b", "7b") for gpus in (8, 32)
)
_MATH_LAYOUTS = tuple(
    ((f"{model}-{machines}", *chip), context)
    for model in ("qwen2.5-32b", "qwen3-32b")
    for context in ("", "32k")
    for machines in ("8h200", "32gpus", "128gpus", "512gpus")
    for chip in ((), ("h200",))
    if not (machines == "8h200" and chip)
)
LAYOUTS = {"alfworld": _AGENT_LAYOUTS, "webshop": _AGENT_LAYOUTS, "math_code": _MATH_LAYOUTS}
"""By task, (files of examples/layouts, the task's file of another context or nothing)."""
TITLES = {
    "grpo": "GRPO",
    "grpo-spear": "GRPO + SPEAR",
    "drbot-grpo": "Dr.BoT",
    "drbot-grpo-spear": "Dr.BoT + SPEAR",
}
"""Columns of the tables: methods whose steps differ in length (GiGPO's are GRPO's)."""
BEST = {"alfworld": "drbot-gigpo-spear", "webshop": "drbot-gigpo-spear"}
"""The method of the job scripts, where it is not the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """A task with a method on a layout: files that come over each other, the last over all."""

    task: str
    method: str
    layouts: tuple[str, ...]
    context: str = ""
    cold_start: bool = False

    @property
    def files(self) -> list[str]:
        """From the project's root."""
        own = ["paper", *filter(None, [self.context, "cold-start" if self.cold_start else ""])]
        return [
            *(f"examples/{self.task}/{name}.yaml" for name in own),
            f"examples/methods/{self.method}.yaml",
            *(f"examples/layouts/{name}.yaml" for name in self.layouts),
        ]

    def config(self, *settings: str) -> RunConfig:
        """The settings, as every command reads them."""
        first, *further = (str(ROOT / file) for file in self.files)
        return load_config(first, [*further, *settings])


def combinations(task: str) -> Iterator[Combination]:
    """All of a task, layout by layout."""
    for layouts, context in LAYOUTS[task]:
        for method in METHODS[task]:
            yield Combination(task=task, method=method, layouts=layouts, context=context)


@functools.cache
def plan_of(combination: Combination) -> tuple[RunConfig, list[str], Choice]:
    """A combination's settings, what ``plan`` refuses, and its estimate."""
    config = combination.config()
    return config, *planned(config)


def planned(config: RunConfig) -> tuple[list[str], Choice]:
    """What ``plan`` refuses, and its estimate, without the search for better layouts."""
    job = Job.of_config(config, planned_model(config)[1])
    return list(refusals(job)), judged(job)


def table(task: str) -> str:
    """A row for each layout: its files, GPUs, memory of the fullest, seconds of a step."""
    steps = {method: title for method, title in TITLES.items() if method in METHODS[task]}
    lines = [
        f"| layout | GPUs | fullest GPU | {' | '.join(steps.values())} |",
        "|---|---|---|" + "---|" * len(steps),
    ]
    for layouts, context in LAYOUTS[task]:
        plans = {}
        for method in steps:
            own = Combination(task=task, method=method, layouts=layouts, context=context)
            plans[method] = plan_of(own)[2]
        first = plans["drbot-grpo-spear"]
        files = [*filter(None, [context]), *layouts]
        memory = f"{first.memory.total / 1e9:.1f} of {first.memory.limit / 1e9:.0f} GB"
        lines.append(
            f"| {' '.join(f'`{name}`' for name in files)} "
            f"| {first.job.num_gpus} {first.job.chip.name.upper()} | {memory} | "
            + " | ".join(f"{plan.times.total_s:,.0f} s" for plan in plans.values())
            + " |"
        )
    return "\n".join(lines)


def readmes() -> dict[Path, str]:
    """Each example's README with the table as it is now."""
    found = {}
    for task in METHODS:
        place = ROOT / "examples" / task / "README.md"
        before, _, rest = place.read_text(encoding="utf-8").partition(START)
        found[place] = f"{before}{START}\n{table(task)}\n{END}{rest.partition(END)[2]}"
    return found


def scripts() -> dict[Path, str]:
    """Each job script's place and text: what `launch slurm` submits for a task and a layout."""
    found = {}
    for task in METHODS:
        method = BEST.get(task, METHODS[task][-1])
        for layouts, context in LAYOUTS[task]:
            if context or len(layouts) > 1:
                continue  # the same nodes
            own = Combination(task=task, method=method, layouts=layouts)
            first, *further = (str(ROOT / file) for file in own.files)
            name = f"{task}-{method}-{layouts[0]}"
            site = str(ROOT / "slurm/sites/venv.yaml")
            given = [*further, site, f"run.name={name}", f"run.dir=/shared/runs/{name}"]
            folder = Path("/shared/megatron-spear")  # matters to containers alone
            config = launchable(first, given, functools.partial(slurm_problems, folder=folder))
            place = ROOT / "slurm" / "paper" / f"{task}-{layouts[0]}.sbatch"
            found[place] = render(config, config.run.dir, folder)
    return found


if __name__ == "__main__":
    for place, text in {**readmes(), **scripts()}.items():
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")
        print(place.relative_to(ROOT))
