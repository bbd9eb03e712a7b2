"""The page of an experiment: tables in Markdown, made from the results alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from estimates import (
    Amount,
    common_amount,
    difference,
    estimate,
    in_pairs,
    table_at,
    table_over,
    trainer_steps,
)
from experiment import Experiment
from outcome import Array, Outcome

Arms = Mapping[str, Sequence[Outcome]]
Pair = tuple[Sequence[Outcome], Sequence[Outcome]]
"""The runs of an arm and of the arm that it is compared with, of the same seeds."""

_STAGES = 3
_BY_STAGE = (
    ("policy/entropy", "entropy", "{:.3f}"),
    ("rollout/turns_mean", "turns", "{:.1f}"),
    ("rollout/tool_calls_mean", "tool calls", "{:.2f}"),
    ("rollout/tool_success_fraction", "of them worked", "{:.2f}"),
)


def page(experiment: Experiment, arms: Arms, pictures: Sequence[str], command: str) -> str:
    """All tables. ``pictures`` are paths beside the page, ``command`` what makes it."""
    games = len(next(iter(arms.values()))[0].evaluations[0].won)
    panels = sorted({run.panel_sha256 for runs in arms.values() for run in runs})
    made, planned = (
        sum(map(len, arms.values())),
        sum(len(experiment.seeds_of(a)) for a in experiment.arms),
    )
    missing = (
        f"**{made} of {planned} runs are there; the rest is to come.** " if made < planned else ""
    )
    parts = [
        f"# {experiment.title}",
        f"{missing}Made by `{command}` from the results in this folder; intervals are 95 %, by "
        "bootstrap over seeds and then games, differences paired by seed and game; those of two "
        "seeds or more that leave 0 out are bold. The pictures' bands, from three seeds on, are "
        "Student's t. "
        f"Panel: {games} tasks that no run trains on, sha256 {panels[0][:8]}...",
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
        "## Success on the panel",
        '"Mean over training" is over all evaluations but that of the warm start: less noisy than '
        "the last one, and higher where success comes sooner.",
        _success(experiment, arms),
        "## Differences",
        _differences(experiment, arms),
        "## How the policy explores",
        f"Means over seeds in each third of training ({_STAGES} stages).",
        _stages(experiment, arms),
        "## What it costs",
        _costs(experiment, arms),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _success(experiment: Experiment, arms: Arms) -> str:
    rows = []
    for name, runs in arms.items():
        last = common_amount(runs, trainer_steps)
        end = table_at(runs, trainer_steps, last)
        seeds = ", ".join(f"{share:.3f}" for share in np.nanmean(end, axis=1))
        before = float(np.nanmean(table_at(runs, trainer_steps, 0.0)))
        title = experiment.arms[name].title
        over = estimate(table_over(runs))
        rows.append([title, str(len(runs)), f"{before:.3f}", str(estimate(end)), seeds, str(over)])
    return _table(
        ["arm", "seeds", "warm start", "at the end", "each seed", "mean over training"], rows
    )


def _differences(experiment: Experiment, arms: Arms) -> str:
    measures: tuple[tuple[str, Amount], ...] = (
        ("equal trainer steps", trainer_steps),
        ("equal environment steps", lambda run: run.environment_steps),
        ("equal trained tokens", lambda run: run.trained_tokens),
    )
    rows = []
    for pair in experiment.compare:
        if pair.arm in arms and pair.reference in arms:
            both = in_pairs(arms[pair.arm], arms[pair.reference])
            cells = [_difference(both, amount) for _, amount in measures]
            cells.append(_shown(both, table_over))
            titles = (experiment.arms[name].title for name in (pair.arm, pair.reference))
            aim = f"{pair.aim:+.2f}" if pair.aim is not None else ""
            rows.append([" minus ".join(titles), str(len(both[0])), *cells, aim, pair.published])
    names = (name for name, _ in measures)
    head = ["difference", "seeds", *names, "mean over training", "aim", "paper"]
    return _table(head, rows)


def _difference(both: Pair, amount: Amount) -> str:
    """The difference at the most work that both have done."""
    if not both[0]:
        return "no seed in common"
    at = common_amount([run for runs in both for run in runs], amount)
    return _shown(both, lambda runs: table_at(runs, amount, at))


def _shown(both: Pair, table: Callable[[Sequence[Outcome]], Array]) -> str:
    """The difference of two arms' tables; bold where 0 is outside, unless there is one seed alone,
    whose interval knows nothing of seeds."""
    if not both[0]:
        return "no seed in common"
    found = difference(*(table(runs) for runs in both))
    is_sure = (found.low > 0 or found.high < 0) and len(both[0]) > 1
    return f"**{found.signed}**" if is_sure else found.signed


def _stages(experiment: Experiment, arms: Arms) -> str:
    rows = []
    for name, runs in arms.items():
        cells = []
        for metric, _, form in _BY_STAGE:
            series = np.array([run.steps[metric] for run in runs], dtype=np.float64)
            stages = np.array_split(series, min(_STAGES, series.shape[1]), axis=1)
            means = [np.nanmean(stage) for stage in stages]
            cells.append(" / ".join(form.format(mean) for mean in means))
        rows.append([experiment.arms[name].title, *cells])
    return _table(["arm", *(label for _, label, _ in _BY_STAGE)], rows)


def _costs(experiment: Experiment, arms: Arms) -> str:
    rows = []
    for name, runs in arms.items():
        extra, train = (
            100 * np.nanmean([np.array(run.steps[m], dtype=np.float64) for run in runs])
            for m in ("work/replay_step_fraction", "work/replay_train_fraction")
        )
        rows.append(
            [
                experiment.arms[name].title,
                f"{np.mean([run.environment_steps[-1] for run in runs]) / 1e3:.1f}",
                f"{np.mean([run.trained_tokens[-1] for run in runs]) / 1e6:.2f}",
                f"{np.mean([run.total('replay/rows')[-1] for run in runs]):.0f}",
                f"{extra:.1f} %",
                f"{train:.1f} %",
            ]
        )
    return _table(
        [
            "arm",
            "environment steps, thousands",
            "trained tokens, millions",
            "replayed trajectories",
            "replay's FLOPs beside the step's others (paper: 10 to 25 %)",
            "replay's share of the training FLOPs",
        ],
        rows,
    )
