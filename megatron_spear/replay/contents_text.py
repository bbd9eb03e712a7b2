"""A replay store and its rows in words."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.replay.contents import ReplayContents, RowFacts
from megatron_spear.types import TrainSample

Decode = Callable[[list[int]], str]
"""From token ids to text."""

_COLUMNS = ("min", "median", "mean", "max")


def overview(
    contents: ReplayContents,
    *,
    policy_version: int | None,
    top: int,
) -> list[str]:
    """The store as lines: sizes, a table of what its live rows are, and the ``top`` prompts.

    Ages are counted from ``policy_version`` (None: the newest row's).
    """
    rows = contents.rows
    lines = [
        f"files     {len(contents.files)}, {contents.num_bytes / 1e6:,.2f} MB, "
        f"{contents.num_written:,} rows written",
        f"live      {len(rows):,} rows, {rows['sizes'].sum() / 1e6:,.2f} MB",
        *[f"DAMAGED   {fault}" for fault in contents.faults],
    ]
    if not contents.faults:
        lines.append("checksums all hold")
    if not len(rows):
        return lines
    facts = contents.facts()
    newest = policy_version
    if newest is None:
        newest = int(rows["policy_versions"].max())
    columns = {
        "age (policy versions)": newest - rows["policy_versions"],
        "reward: outcome": rows["outcome"],
        "reward: intrinsic (before mu)": rows["intrinsic"],
        "reward: format": rows["format"],
        "advantage at collection": rows["advantages"],
        "tokens": rows["num_tokens"],
        "segments": np.array([fact.num_segments for fact in facts]),
        "turns": np.array([fact.num_turns for fact in facts]),
        "tool calls": np.array([fact.tool_calls for fact in facts]),
    }
    lines += ["", f"{'':30}" + "".join(f"{name:>10}" for name in _COLUMNS)]
    lines += [_spread(name, values) for name, values in columns.items()]
    return lines + _by_version(contents) + _by_prompt(facts, top)


def row_text(row_id: int, samples: Sequence[TrainSample], decode: Decode) -> list[str]:
    """One row as lines: its rewards, then each segment's context and turns as text."""
    first = samples[0]
    reward, parts = first.reward, dict(first.reward.parts)
    lines = [
        f"row {row_id}: prompt {printable(first.prompt_id)}, group "
        f"{printable(first.trajectory_id.group)}, attempt {first.trajectory_id.member}",
        f"policy version {min(s.policy_version for s in samples)}, "
        f"{sum(len(s.token_ids) for s in samples)} tokens, "
        f"{sum(s.tool_calls for s in samples)} tool calls",
        f"reward: outcome {reward.outcome:g}, intrinsic {reward.intrinsic:g} (before mu), format "
        f"{reward.format:g}; parts {parts}",
    ]
    for sample in samples:
        lines += ["", f"segment {sample.segment + 1} of {sample.num_segments}"]
        lines += _segment_lines(sample, decode)
    return lines


def printable(text: str) -> str:
    """The text with line ends and tabs as they are and other control characters escaped, so that
    no stored text can act on a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _segment_lines(sample: TrainSample, decode: Decode) -> list[str]:
    """Observations and actions in turn; an action is a run of response tokens from a turn's
    start."""
    lines, at = [], 0
    starts = sample.turn_starts.tolist()
    for turn, start in enumerate(starts, 1):
        following = starts[turn] if turn < len(starts) else len(sample.token_ids)
        sampled = _sampled(sample, start, following)
        if start > at:
            lines += [f"--- observation, {start - at} tokens", _decoded(sample, at, start, decode)]
        at = start + int(sampled.sum())
        told = f"--- turn {turn}, {at - start} tokens"
        if at > start:
            told += (
                f", advantage {sample.advantages[start:at].mean():.3g}, log-prob a token: policy "
                f"{sample.old_logprobs[start:at].mean():.3g}, engine "
                f"{sample.rollout_logprobs[start:at].mean():.3g}"
            )
        lines += [told, _decoded(sample, start, at, decode)]
    if at < len(sample.token_ids):
        rest = len(sample.token_ids)
        lines += [f"--- {rest - at} more tokens", _decoded(sample, at, rest, decode)]
    return lines


def _sampled(sample: TrainSample, start: int, end: int) -> npt.NDArray[np.bool_]:
    """bool: the tokens from ``start`` on that the policy sampled without a gap."""
    return np.logical_and.accumulate(sample.response_mask[start:end])


def _decoded(sample: TrainSample, start: int, end: int, decode: Decode) -> str:
    return printable(decode(sample.token_ids[start:end].tolist()))


def _spread(name: str, values: npt.NDArray[np.generic]) -> str:
    numbers = np.asarray(values, np.float64)
    found = (numbers.min(), np.median(numbers), numbers.mean(), numbers.max())
    return f"{name:30}" + "".join(f"{value:>10.4g}" for value in found)


def _by_version(contents: ReplayContents) -> list[str]:
    """Rows and rewards by the policy version they were played with, newest last."""
    rows = contents.rows
    lines = ["", f"{'played by policy version':30}{'rows':>10}{'outcome':>10}{'advantage':>10}"]
    for version in np.unique(rows["policy_versions"]).tolist():
        own = rows[rows["policy_versions"] == version]
        lines.append(
            f"{version:<30}{len(own):>10,}{own['outcome'].mean():>10.3g}"
            f"{own['advantages'].mean():>10.3g}"
        )
    return lines


def _by_prompt(facts: Sequence[RowFacts], top: int) -> list[str]:
    """The prompts with the most rows."""
    found: dict[str, list[float]] = {}
    for fact in facts:
        found.setdefault(fact.prompt_id, []).append(fact.outcome)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    lines = ["", f"{len(found):,} prompts; those with the most rows:"]
    for prompt, outcomes in ordered[:top]:
        lines.append(f"{len(outcomes):>6,}  outcome {np.mean(outcomes):.3g}  {printable(prompt)}")
    return lines
