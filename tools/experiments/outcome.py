"""What is kept of a finished run: one JSON file a seed, small enough to be committed.

``steps`` has a list for each of ``METRICS``, one value a trainer step; ``evaluations`` the panel
at several steps, ``won`` the share of attempts won, game by game. ``settings`` are those
that are no defaults (paths aside), so that results of other settings are not taken for one's own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.config.sources import leaves
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.files import write_whole
from megatron_spear.tracking.evaluations import read_evaluations
from megatron_spear.tracking.jsonl import METRICS_FILE, read_metrics

Array = npt.NDArray[np.float64]

METRICS = (
    "rollout/success",
    "rollout/num_trajectories",
    "rollout/turns_mean",
    "rollout/tool_calls_mean",
    "rollout/tool_success_fraction",
    "rollout/failed",
    "reward/mean",
    "policy/entropy",
    "policy/clip_fraction",
    "filter/zero_spread_fraction",
    "mismatch/logprob_gap_mean",
    "replay/rows",
    "replay/age_mean",
    "replay/p50",
    "work/train_tokens",
    "work/replay_tokens",
    "work/replay_train_fraction",
    "work/replay_step_fraction",
    "time/rollout_s",
    "time/train_s",
    "time/step_s",
)
WHERE_NOT_WHAT = ("run.dir", "run.name", "run.seed", "run.threads", "model.cache_dir", "tracking")
"""Settings that are no part of a result, with all below them."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The panel after ``step`` trainer steps."""

    step: int
    won: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished seed of one arm."""

    arm: str
    seed: int
    settings: Mapping[str, Any]
    panel_sha256: str
    wall_s: float
    steps: Mapping[str, Sequence[float | None]]
    evaluations: tuple[Evaluation, ...]

    def total(self, name: str) -> Array:
        """[E] running total of a metric at the evaluations (0 at step 0); missing values are 0."""
        values = [0.0 if value is None else value for value in self.steps[name]]
        return self._at_evaluations(np.asarray(values))

    @property
    def environment_steps(self) -> Array:
        """[E] turns played in training up to each evaluation."""
        turns = self._series("rollout/turns_mean") * self._series("rollout/num_trajectories")
        return self._at_evaluations(turns)

    @property
    def trained_tokens(self) -> Array:
        """[E] tokens trained on up to each evaluation, replayed ones included."""
        return self.total("work/train_tokens")

    @property
    def won(self) -> Array:
        """[E, G] share of attempts won; NaN where all attempts at a game failed."""
        return np.array([evaluation.won for evaluation in self.evaluations], dtype=np.float64)

    def _series(self, name: str) -> Array:
        return np.array(self.steps[name], dtype=np.float64)

    def _at_evaluations(self, values: Array) -> Array:
        totals = np.concatenate([[0.0], np.cumsum(values)])
        chosen: Array = totals[[evaluation.step for evaluation in self.evaluations]]
        return chosen

    def write(self, path: Path) -> None:
        """As compact JSON, whole or not at all."""
        record = {
            "arm": self.arm,
            "seed": self.seed,
            "settings": self.settings,
            "panel_sha256": self.panel_sha256,
            "wall_s": round(self.wall_s, 1),
            "evaluations": [{"step": e.step, "won": _shares(e.won)} for e in self.evaluations],
            "steps": {name: [_short(v) for v in values] for name, values in self.steps.items()},
        }
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_outcome(path: Path) -> Outcome:
    """Raises DataError where the file is none of ``Outcome.write``."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        evaluations = tuple(
            Evaluation(step=e["step"], won=tuple(e["won"])) for e in record.pop("evaluations")
        )
        return Outcome(**record, evaluations=evaluations)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is no result of an experiment ({error!r}); without it its seed is run anew"
        ) from None


def collect(arm: str, seed: int, settings: Mapping[str, Any], run: Path) -> Outcome:
    """What a finished run comes to. Raises DataError where a step is missing from its metrics."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    records = {record["step"]: record for record in read_metrics(run / METRICS_FILE)}
    numbers = range(1, summary["steps"] + 1)
    missing = [n for n in numbers if "rollout/success" not in records.get(n, {})]
    if missing:
        raise DataError(f"{run}: metrics.jsonl lacks the steps {missing}; remove this folder")
    panel = read_evaluations(run / "evaluations.jsonl")
    return Outcome(
        arm=arm,
        seed=seed,
        settings=settings,
        panel_sha256=summary["panel_sha256"],
        wall_s=summary["wall_s"],
        steps={name: [records[n].get(name) for n in numbers] for name in METRICS},
        evaluations=tuple(Evaluation(step=e.step, won=e.won) for e in panel),
    )


def settings_of(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What defines a run: dotted path to value where it is not the default, without paths and
    without what says where a run goes. Raises ConfigError as ``load_config`` does.

    Example: a file with ``run: {steps: 9}`` and ``["env.games=DIR"]`` give ``{"run.steps": 9}``;
    of the games the panel's hash tells. Of the starting model its folder's name is kept.
    """
    checked, defaults = load_config(config, overrides), dict(leaves(RunConfig().model_dump()))
    plain = dict(leaves(checked.model_dump(mode="json")))
    found = {
        path: plain[path]
        for path, value in sorted(leaves(checked.model_dump()))
        if not path.startswith(WHERE_NOT_WHAT)
        and not isinstance(value, Path)
        and (path not in defaults or value != defaults[path])
    }
    if checked.model.path is not None:
        found["model.path"] = checked.model.path.name
    return found


def require_same(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError where a result or a run on disk, ``path``, is of other settings."""
    differences = [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise ConfigError(
            f"{path} is of other settings:\n"
            + "\n".join(differences)
            + "\nwhat to do: set these back, remove it, or give another --out and --work"
        )


def _short(value: float | None) -> float | int | None:
    """Six significant digits are plenty for a curve."""
    if value is None:
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _shares(won: Sequence[float | None]) -> list[float | int | None]:
    return [_short(share) for share in won]
