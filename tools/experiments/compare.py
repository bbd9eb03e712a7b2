#!/usr/bin/env python3
"""Methods x seeds from one warm start, as tables, a picture and a page.

    python tools/experiments/compare.py tools/experiments/alfworld_generated.yaml [--jobs 2]
        [--out DIR] [--work DIR] [--arms NAME,..] [--report-only] [a.b=c ..]

Each finished seed is one small JSON file in ``--out`` (default docs/evidence/NAME); what is there
is not run again, and a run that was cut off goes on from its last checkpoint. Settings at the end
are for all arms, such as the folder of the official games. No seed is left out of a table.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment import ROOT, Experiment, read_experiment
from figures import draw
from outcome import WHERE_NOT_WHAT, Outcome, read_outcome
from pages import page
from running import require_results_of, run_all, seeds_of

from megatron_spear.errors import SpearError
from megatron_spear.files import write_whole

_COMMAND = "python tools/experiments/compare.py tools/experiments/{}.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--arms", metavar="NAME,..", help="run these alone")
    parser.add_argument("--report-only", action="store_true", help="tables of what is there")
    options, further = parser.parse_known_args()
    try:
        sys.exit(_main(options, further))
    except SpearError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        sys.exit(130)


def _main(options: argparse.Namespace, further: list[str]) -> int:
    experiment = read_experiment(options.experiment)
    name = options.experiment.stem
    out = options.out or ROOT / "docs" / "evidence" / name
    config = Path(os.path.relpath(ROOT / experiment.config))
    seeds = seeds_of(experiment, config, further, out, options.work / name)
    require_results_of(seeds)
    problems = []
    if not options.report_only:
        experiment.require_given(further)
        chosen = options.arms.split(",") if options.arms else list(experiment.arms)
        experiment.require_arms(chosen)
        problems = run_all([seed for seed in seeds if seed.arm in chosen], options.jobs)
    arms = _outcomes(experiment, out)
    if arms:
        command = " ".join((_COMMAND.format(name), *_shown(experiment, further)))
        _write(experiment, out, arms, command)
    else:
        print(f"{out}: no result yet")
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _outcomes(experiment: Experiment, out: Path) -> dict[str, list[Outcome]]:
    """What is there, by arm in the experiment's order. Raises SpearError where panels differ."""
    arms: dict[str, list[Outcome]] = {}
    for arm in experiment.arms:
        paths = [out / arm / f"seed-{number}.json" for number in experiment.seeds_of(arm)]
        found = [read_outcome(path) for path in paths if path.is_file()]
        if found:
            arms[arm] = found
    panels = {run.panel_sha256 for runs in arms.values() for run in runs}
    if len(panels) > 1:
        raise SpearError(
            f"{out}: the results were played on {len(panels)} different panels "
            f"({', '.join(sorted(p[:8] for p in panels))}); remove those of other games"
        )
    return arms


def _shown(experiment: Experiment, further: Sequence[str]) -> list[str]:
    """The settings behind the command as the page has them: none of this machine's paths."""
    others = [
        setting
        for setting in further
        if setting.partition("=")[0] not in experiment.needs
        and not setting.startswith(WHERE_NOT_WHAT)
    ]
    return [*(f"{name}=PATH" for name in experiment.needs), *others]


def _write(experiment: Experiment, out: Path, arms: dict[str, list[Outcome]], command: str) -> None:
    titles = {name: arm.title for name, arm in experiment.arms.items()}
    pictures = []
    for name, shown in (experiment.pictures or {"curves": tuple(arms)}).items():
        there = {arm: runs for arm, runs in arms.items() if arm in shown}
        if there:
            pictures.append(f"{name}.png")
            draw(there, titles, out / pictures[-1], experiment.title)
    text = page(experiment, arms, pictures, command)
    write_whole(out / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
