"""What a terminal shows of a step, at any width and with any text in it."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from megatron_spear.testing.hand_made import make_trajectory, make_turn
from megatron_spear.testing.hostile_texts import hostile_text
from megatron_spear.tracking.bars import StepsBar
from megatron_spear.tracking.live_view import LiveView
from megatron_spear.tracking.trajectory_text import plain, trajectory_lines
from megatron_spear.types import Reward, ScoredTrajectory

METRICS = {
    "rollout/success": 0.25,
    "rollout/action_tokens": 1000.0,
    "train/tokens": 900.0,
    "replay/rows": 24.0,
    "policy/entropy": 0.2291,
    "time/step_s": 4.0,
    "time/rollout_s": 2.0,
    "time/old_logprobs_s": 0.5,
    "time/current_logprobs_s": 0.3,
    "time/train_s": 0.9,
    "time/weight_sync_s": 0.1,
}


def _example(action: str = "take mug 1", kind: str = "look_at_obj_in_light") -> ScoredTrajectory:
    turns = [make_turn(f"go to desk {i}") for i in range(3)] + [make_turn(action)]
    trajectory = make_trajectory("g", 0, (turns,), won=True)
    prompt = replace(trajectory.prompt, kind=kind)
    reward = Reward(outcome=1.0, intrinsic=0.03, format=-0.125)
    return ScoredTrajectory(trajectory=replace(trajectory, prompt=prompt), reward=reward)


def _view(doing: tuple[str, str] = ("step 3", "rollout"), **steps: Any) -> LiveView:
    view = LiveView(lambda: doing)
    view.done, view.total, view.rate = 12, 48, 0.36
    view.note = "rollout: 7 trajectories"
    view.evaluated(0, 0.125)
    view.add(METRICS, _example(**steps))
    view.add({**METRICS, "rollout/success": 0.75}, _example(**steps))
    return view


def _lines(shown: Any, width: int) -> list[str]:
    """What is on the screen, without colours."""
    file = io.StringIO()
    RichConsole(file=file, width=width, force_terminal=True, color_system=None).print(shown)
    return file.getvalue().splitlines()


def test_a_wide_screen_has_it_all() -> None:
    lines = _lines(_view(), 120)
    assert lines[0].startswith("step 12/48 ━") and lines[0].rstrip().endswith(
        "25%  2.8 s each  ETA 1 min 40 s"
    )
    rollout, logprobs, train, weights, evaluation = lines[1:6]
    assert rollout.startswith("> rollout ") and rollout.rstrip().endswith(
        " 50%   2.00 s 7 trajectories"
    )
    assert logprobs.startswith("  log-probs ") and logprobs.rstrip().endswith("20%   0.80 s")
    assert train.rstrip().endswith("22%   0.90 s") and weights.rstrip().endswith("2%   0.10 s")
    assert evaluation.startswith("  evaluation ") and evaluation.rstrip().endswith("0%   0.00 s")
    assert lines[6:] == [
        "success 0.500 (mean of 2 steps)   panel 0.125 before",
        "replayed 24   entropy 0.2291   500 sampled tokens/s   1,000 trained tokens/s",
        "last  look_at_obj_in_light: won after 4 turns; outcome 1, intrinsic 0.03, format -0.125",
        "      ... go to desk 1 > go to desk 2 > take mug 1",
    ]


def test_a_narrow_screen_has_the_same_lines_cut() -> None:
    lines = _lines(_view(), 60)
    assert all(cell_len(line) <= 60 for line in lines)
    assert lines[1].startswith("> rollout ") and "━" in lines[1] and "50%" in lines[1]
    assert lines[6:8] == ["success 0.500 (mean of 2 steps)", "panel 0.125 before"]
    assert lines[9] == "last  look_at_obj_in_light: won after 4 turns; outcome 1, i…"
    assert len(lines) == 11


@pytest.mark.parametrize("width", [1, 10, 20, 40, 200])
def test_no_width_breaks_it(width: int) -> None:
    lines = _lines(_view(), width)
    assert all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("doing", "row"),
    [
        (("step 3", "old_logprobs"), "log-probs"),
        (("step 3", "train"), "train"),
        (("step 3", "weight_sync"), "weights"),
        (("Evaluation at step 3", ""), "evaluation"),
        (("checkpoint of step 3", ""), "other"),
        (("", ""), ""),
    ],
)
def test_what_goes_on_now_is_marked(doing: tuple[str, str], row: str) -> None:
    marked = [line.split()[1] for line in _lines(_view(doing), 120) if line.startswith("> ")]
    assert marked == [row] * bool(row)


def test_what_has_no_row_is_told_in_words() -> None:
    lines = _lines(_view(("checkpoint of step 3", "")), 120)
    assert lines[6].startswith("> other ") and lines[6].rstrip().endswith(" checkpoint of step 3")


def test_an_evaluation_has_its_share_and_its_result() -> None:
    view = _view()
    view.evaluated(12, 0.375, 4.0)
    view.add(METRICS)
    lines = _lines(view, 120)
    # Three steps of 4 s, and 4 s in between.
    assert lines[5].startswith("  evaluation ") and "25%" in lines[5]
    assert lines[6] == "success 0.417 (mean of 3 steps)   panel 0.125 before, 0.375 at step 12"
    assert "take mug 1" in lines[9], "a step without a trajectory leaves the one before"


def test_before_the_first_step_there_are_only_bars() -> None:
    view = LiveView(lambda: ("step 1", "rollout"))
    view.total = 48
    lines = [line.rstrip() for line in _lines(view, 120)]
    assert lines[0].startswith("step 0/48") and lines[1].startswith("> rollout")
    assert [line for line in lines[6:] if line] == []


@pytest.mark.parametrize("width", [60, 120])
def test_hostile_text_stays_in_its_line(width: int) -> None:
    expected = len(_lines(_view(), width))
    for number in range(150):
        text = hostile_text(number)
        lines = _lines(_view(action=text, kind=text), width)
        assert len(lines) == expected, repr(text)
        assert all(cell_len(line) <= width for line in lines), repr(text)
        assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in "".join(lines)), repr(text)


def test_markup_and_escape_codes_are_text() -> None:
    lines = _lines(_view(action="[red]\x1b[2J\x1b]0;title\x07[/red]\r\ndone"), 120)
    assert lines[-1].endswith("> [red] [2J ]0;title [/red] done")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("go\x1b[2J to\n  desk", "go [2J to desk"),
        ("\u202eabc\u200f", "abc"),
        ("\ud800x", "x"),
        ("e" + "\u0301" * 9, "é\u0301"),
        ("\u0301" * 9, ""),
        ("左 🦆", "左 🦆"),
        ("x" * 999, "x" * 300),
    ],
)
def test_plain_text(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_a_trajectory_of_one_empty_turn() -> None:
    trajectory = make_trajectory("g", 0, ((make_turn(""),),))
    scored = ScoredTrajectory(trajectory=trajectory, reward=Reward(outcome=0.0))
    assert trajectory_lines(scored) == (
        "prompt-g: not won after 1 turn; outcome 0, intrinsic 0, format 0",
        "(empty)",
    )


class _Broken(Mapping[str, float]):
    """Metrics that raise whoever looks at them, but for the few beside the bar."""

    def __contains__(self, key: object) -> bool:
        return False

    def __getitem__(self, key: str) -> float:
        raise KeyError(key)

    def __iter__(self) -> Any:
        raise ArithmeticError("broken")

    def __len__(self) -> int:
        return 1


def test_what_cannot_be_shown_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    moved: list[int] = []
    bar = StepsBar(lambda bar: moved.append(bar.done), 4, 0)
    for _ in range(2):
        bar.finished(_Broken())
    assert moved == [1, 2], "the steps are counted all the same"
    assert caplog.messages == ["the live view leaves something out: ArithmeticError: broken"]


def test_a_view_that_cannot_be_drawn_is_the_bar_as_a_line() -> None:
    bar = StepsBar(lambda bar: None, 4, 0)
    bar.finished(METRICS)
    bar.view.total = None  # type: ignore[assignment]
    (line,) = _lines(bar, 120)
    assert line.startswith("step 1/4 (25%), ") and line.endswith("entropy 0.2291")
