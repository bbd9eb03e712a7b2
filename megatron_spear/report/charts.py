"""Which curves a report draws: a table of charts over the names of ``metrics.jsonl``."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_spear.metrics import phases


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart: ``series`` are (metric, legend) pairs in one ``unit``.

    ``stacked`` charts add their series up; ``log`` ones start with a logarithmic axis; the axis of
    a ``from_zero`` one includes 0. ``note`` says how to read it.
    """

    title: str
    series: tuple[tuple[str, str], ...]
    unit: str = ""
    stacked: bool = False
    log: bool = False
    from_zero: bool = False
    note: str = ""


ROLLOUT_RATE = "throughput/rollout_tokens_per_s"
TRAIN_RATE = "throughput/train_tokens_per_s"
STEP_RATE = "throughput/step_tokens_per_s"
"""Made of other metrics (``runs``)."""

_FIXED = (
    Chart(
        title="Success",
        series=(("rollout/success", "training"), ("eval/success", "panel")),
        unit="share won",
        from_zero=True,
        note="The panel is a fixed set of held-out tasks.",
    ),
    Chart(
        title="Reward by part",
        series=(
            ("reward/mean", "total"),
            ("reward/outcome", "outcome"),
            ("reward/intrinsic", "intrinsic, before mu"),
            ("reward/format", "format"),
        ),
        note="total = outcome + mu x intrinsic + format.",
    ),
    Chart(
        title="Entropy",
        series=(("policy/entropy", "on-policy rows"), ("replay/entropy", "replayed rows")),
        unit="nats a token",
        from_zero=True,
    ),
    Chart(
        title="Log-prob gap of engine and trainer",
        series=(("mismatch/logprob_gap_mean", "mean"), ("mismatch/max_logprob_gap", "largest")),
        unit="nats",
        log=True,
        note="Of the same token under the same weights; rounding only, if all is well.",
    ),
    Chart(
        title="Drift in a step",
        series=(("policy/kl", "on-policy rows"), ("replay/kl", "replayed rows")),
        unit="nats a token",
    ),
    Chart(
        title="Clipped and dropped shares",
        series=(
            ("policy/clip_fraction", "clipped"),
            ("policy/dual_clip_fraction", "dual clip"),
            ("replay/clip_fraction", "clipped, replay"),
            ("replay/dual_clip_fraction", "dual clip, replay"),
            ("replay/cov_dropped_fraction", "by covariance, replay"),
            ("replay/ratio_dropped_fraction", "by ratio, replay"),
        ),
        unit="share of tokens",
        from_zero=True,
    ),
    Chart(
        title="Replayed rows",
        series=(
            ("replay/rows", "replayed"),
            ("replay/inserted", "inserted"),
            ("replay/stored", "in the store"),
        ),
        unit="rows",
        from_zero=True,
    ),
    Chart(
        title="Age of replayed rows",
        series=(("replay/age_mean", "mean"), ("replay/age_max", "oldest")),
        unit="policy versions",
        from_zero=True,
    ),
    Chart(
        title="Kept share of replay candidates",
        series=(("replay/kept_fraction", "kept"),),
        unit="share",
        from_zero=True,
        note="Candidates whose recalibrated advantage is positive.",
    ),
    Chart(
        title="Replay baseline and advantage",
        series=(
            ("replay/p50", "median of group means"),
            ("replay/baseline_mean", "baseline, mean"),
            ("replay/advantage_mean", "advantage, mean"),
        ),
        unit="reward",
    ),
    Chart(
        title="Schedules",
        series=(
            ("curriculum/replay_weight", "gamma, of the replay loss"),
            ("curriculum/intrinsic_weight", "mu, of the intrinsic reward"),
        ),
        unit="weight",
        from_zero=True,
    ),
    Chart(
        title="Turns and tool calls",
        series=(
            ("rollout/turns_mean", "turns"),
            ("rollout/tool_calls_mean", "tool calls"),
            ("replay/tool_calls_mean", "tool calls, replayed rows"),
        ),
        unit="a trajectory",
        from_zero=True,
    ),
    Chart(
        title="Turns that count",
        series=(
            ("rollout/valid_fraction", "valid turns"),
            ("rollout/tool_success_fraction", "calls that succeed"),
            ("rollout/truncated_fraction", "truncated trajectories"),
            ("filter/marked_fraction", "rows marked by filters"),
        ),
        unit="share",
        from_zero=True,
    ),
    Chart(
        title="Groups",
        series=(
            ("filter/num_groups", "played"),
            ("filter/num_kept_groups", "learned from"),
            ("filter/num_resampled_groups", "replaced"),
        ),
        unit="groups",
        from_zero=True,
    ),
    Chart(
        title="Loss",
        series=(("loss/policy", "policy"), ("loss/replay", "replay"), ("loss/kl", "KL")),
    ),
    Chart(
        title="Gradient norm",
        series=(("optimizer/grad_norm", "before clipping"),),
        from_zero=True,
    ),
    Chart(title="Learning rate", series=(("optimizer/lr", "learning rate"),), from_zero=True),
    Chart(
        title="Tokens a second",
        series=(
            (ROLLOUT_RATE, "sampled, of rollout time"),
            (TRAIN_RATE, "trained, of training time"),
            (STEP_RATE, "sampled, of all time"),
        ),
        unit="tokens/s",
        from_zero=True,
    ),
    Chart(
        title="Work that replay adds",
        series=(
            ("work/replay_train_fraction", "of training"),
            ("work/replay_step_fraction", "of the step"),
        ),
        unit="share",
        from_zero=True,
    ),
    Chart(
        title="Lag of rollouts",
        series=(("rollout/lag_mean", "mean"),),
        unit="policy versions",
        from_zero=True,
    ),
)
_KINDS = "eval/success_"
_BUCKETS = "curriculum/share_"


def charts_for(names: Iterable[str]) -> tuple[Chart, ...]:
    """The charts that these metrics can fill, each with the series it has.

    Success by kind of task and the time by phase have as many series as there are names.
    """
    known = set(names)
    charts = []
    for chart in (_FIXED[0], _by_kind(known), *_FIXED[1:], _shares(known), _phases(known)):
        series = tuple(pair for pair in chart.series if pair[0] in known)
        if series:
            charts.append(replace(chart, series=series))
    return tuple(charts)


def _by_kind(names: set[str]) -> Chart:
    return Chart(
        title="Panel by kind of task",
        series=_named(names, _KINDS),
        unit="share won",
        from_zero=True,
    )


def _shares(names: set[str]) -> Chart:
    return Chart(
        title="Tasks drawn, by kind",
        series=_named(names, _BUCKETS),
        unit="share",
        from_zero=True,
    )


def _phases(names: set[str]) -> Chart:
    return Chart(
        title="Time by phase",
        series=tuple((f"time/{phase}_s", phase.replace("_", " ")) for phase in phases(names)),
        unit="s a step",
        stacked=True,
        from_zero=True,
    )


def _named(names: set[str], prefix: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, name.removeprefix(prefix).replace("_", " "))
        for name in sorted(names)
        if name.startswith(prefix)
    )
