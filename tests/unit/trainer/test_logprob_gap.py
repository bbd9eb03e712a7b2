"""Gaps of log-probs with known numbers, and how they are told."""

import numpy as np
import pytest

from megatron_spear.testing.hand_made import make_sample, make_trajectory, make_turn
from megatron_spear.trainer.logprob_gap import gap_text, samples_of, token_gaps


def _decode(token_ids: list[int]) -> str:
    return " ".join(f"w{i}\n" for i in token_ids)


def test_only_sampled_tokens_count() -> None:
    samples = [make_sample(mask=[0, 1, 1]), make_sample("h", 1, mask=[0, 0, 1])]
    policy = [np.array([9, -0.5, -0.75], np.float32), np.array([9, 9, -0.25], np.float32)]
    gaps = token_gaps(samples, policy)
    assert gaps.gap.tolist() == [0.0, 0.25, -0.25]
    assert gaps.position.tolist() == [1, 2, 2] and gaps.sample.tolist() == [0, 0, 1]
    assert gaps.mean == pytest.approx(0.5 / 3)


def test_the_text_by_hand() -> None:
    samples = [make_sample(mask=[0] + [1] * 99)]
    policy = np.full(100, -0.5, np.float32)
    policy[70], policy[3] = -1.5, -0.25
    gaps = token_gaps(samples, [policy])
    lines = gap_text(gaps, samples, _decode, 1, allowed=0.3)
    text = "\n".join(lines)
    assert "tokens            99 in 1 contexts" in text
    assert f"mean {1.25 / 99:.2e} nats, max 1.00e+00" in text
    assert f"min {np.exp(-1):.4f}" in text and f"max {np.exp(0.25):.4f}" in text
    assert f"{2 / 99:.2%} outside 0.8 to 1.2" in text
    (near,) = [line for line in lines if line.startswith("0 to 63 ")]
    (far,) = [line for line in lines if line.startswith("64 to 255 ")]
    assert near.split()[3:] == ["63", f"{0.25 / 63:.2e}", "2.50e-01"]
    assert far.split()[3:] == ["36", f"{1 / 36:.2e}", "1.00e+00"]
    worst = lines[lines.index("worst tokens, with the text before them") + 1 :]
    assert worst[0] == "+1.00e+00: policy -1.5000, engine -0.5000, token 70 of g/0"
    assert worst[1].startswith('    "w70\\n" after "w54\\n') and worst[1].endswith('w69\\n"')
    assert lines[-1].startswith("normal: ")
    assert gap_text(gaps, samples, _decode, 1, allowed=0.01)[-1].startswith("NOT NORMAL: ")


def test_trajectories_become_samples_of_their_segments() -> None:
    trajectory = make_trajectory("a", 2, ((make_turn(), make_turn()), (make_turn(),)))
    empty = make_trajectory("b", 0, ((make_turn(num_tokens=0, action=""),),))
    first, second = samples_of([trajectory, empty])
    assert (first.segment, second.segment, first.num_segments) == (0, 1, 2)
    assert first.token_ids.tolist() == [7, 1, 2, 7, 1, 2]
    assert first.rollout_logprobs.tolist() == [0, -0.5, -0.5, 0, -0.5, -0.5]
    assert str(first.trajectory_id) == "a/2"
