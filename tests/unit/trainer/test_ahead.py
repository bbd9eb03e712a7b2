"""Rollouts that run ahead: what is begun when, with which prompts, and what a resume begins."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from megatron_spear.config.rollout import RolloutSection
from megatron_spear.curriculum.coefficients import Coefficients
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.errors import EngineError
from megatron_spear.testing.hand_made import make_prompt
from megatron_spear.trainer.ahead import RolloutsAhead
from megatron_spear.types import StepContext, TrajectoryGroup


class _Rollouter:
    """Notes what was begun; each set is done at once, except those in ``held``."""

    def __init__(self, held: tuple[int, ...] = ()) -> None:
        self.begun: list[tuple[int, list[str]]] = []
        self.progress: dict[int, Callable[[int], None]] = {}
        self.futures: dict[int, Future[list[TrajectoryGroup]]] = {}
        self._held = held

    def start(self, prompts: Any, *, seed: tuple[int, ...], progress: Any, **_: Any) -> Any:
        names = [prompt.prompt_id for prompt in prompts]
        self.begun.append((seed[1], names))
        self.progress[seed[1]] = progress
        future = self.futures[seed[1]] = Future()
        if seed[1] not in self._held:
            future.set_result([_group(name) for name in names])
        return future


def _group(name: str) -> TrajectoryGroup:
    return TrajectoryGroup(group_id=name, prompt=make_prompt(name), members=(), failures=())


def _cursor() -> PromptCursor:
    return PromptCursor(FreshPrompts(lambda i: make_prompt(str(i))))


def _ctx(step: int) -> StepContext:
    coefficients = Coefficients(intrinsic_weight=0.0, replay_weight=0.0)
    return StepContext(step=step, policy_version=step - 1, coefficients=coefficients, seed=7)


def _ahead(
    cursor: PromptCursor, max_lag: int = 2, last: int = 5, **settings: Any
) -> tuple[RolloutsAhead, Any]:
    rollouter = _Rollouter()
    section = RolloutSection(prompts_per_step=2, group_size=2, max_lag=max_lag, **settings)
    return RolloutsAhead(rollouter, cursor, section, last), rollouter


def test_sets_begin_as_early_as_the_lag_allows_and_none_after_the_last() -> None:
    ahead, rollouter = _ahead(_cursor())
    begun = []
    for step in range(1, 6):
        positions, groups = ahead.play(_ctx(step))
        first = 2 * (step - 1)
        assert positions == [first, first + 1]
        assert [group.group_id for group in groups] == [f"prompt-{first}", f"prompt-{first + 1}"]
        begun.append([number for number, _ in rollouter.begun])
    assert begun == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_a_resumed_run_begins_the_same_sets_with_the_same_prompts() -> None:
    cursor = _cursor()
    ahead, rollouter = _ahead(cursor)
    ahead.play(_ctx(1))
    saved = json.dumps(cursor.state_dict())
    assert json.loads(saved) == {"consumed": 6, "begun": {"2": [2, 3], "3": [4, 5]}}
    cursor.take(3)  # a further round of step 1, say, after the checkpoint was written
    resumed_cursor = _cursor()
    resumed_cursor.load_state_dict(json.loads(saved))
    resumed, again = _ahead(resumed_cursor)
    resumed.play(_ctx(2))
    assert again.begun[:2] == rollouter.begun[1:3]
    assert again.begun[2] == (4, ["prompt-6", "prompt-7"])


def test_a_run_that_is_made_longer_begins_its_next_sets_where_it_had_ended() -> None:
    """One that was as long from the start has begun sets 3 and 4 in steps 1 and 2."""
    at_step_3 = {}
    for last in (2, 6):
        cursor = _cursor()
        before, _ = _ahead(cursor, max_lag=2, last=last)
        before.play(_ctx(1))
        before.play(_ctx(2))
        after, rollouter = _ahead(cursor, max_lag=2, last=6)
        after.take_back(before.whole())
        after.play(_ctx(3))
        at_step_3[last] = [step for step, _ in rollouter.begun]
    assert at_step_3 == {2: [3, 4, 5], 6: [5]}


def test_without_a_set_under_way_the_state_is_as_ever() -> None:
    cursor = _cursor()
    ahead, _ = _ahead(cursor, max_lag=1, last=1)
    ahead.play(_ctx(1))
    assert cursor.state_dict() == {"consumed": 2}


def test_what_a_set_failed_with_is_raised_in_its_step() -> None:
    ahead, rollouter = _ahead(_cursor(), max_lag=1)
    ahead._rollouter._held = (2,)  # type: ignore[attr-defined]
    ahead.play(_ctx(1))
    rollouter.futures[2].set_exception(EngineError("all servers are out"))
    with pytest.raises(EngineError, match="all servers are out"):
        ahead.play(_ctx(2))


def test_before_an_update_a_deterministic_schedule_waits_for_all_that_was_begun() -> None:
    ahead, rollouter = _ahead(_cursor(), max_lag=1, schedule="deterministic")
    rollouter._held = (2,)
    ahead.play(_ctx(1))
    waited = threading.Event()
    waiting = threading.Thread(target=lambda: (ahead.before_update(), waited.set()))
    waiting.start()
    assert not waited.wait(0.05), "set 2 is of the weights that are about to go"
    rollouter.futures[2].set_exception(EngineError("all servers are out"))
    assert waited.wait(5.0), "what a set failed with is told in its own step"
    waiting.join()
    with pytest.raises(EngineError, match="all servers are out"):
        ahead.play(_ctx(2))


def test_before_an_update_a_continuous_schedule_waits_for_nothing() -> None:
    ahead, rollouter = _ahead(_cursor(), max_lag=1)
    rollouter._held = (2,)
    ahead.play(_ctx(1))
    ahead.before_update()
    assert not rollouter.futures[2].done()


def test_whole_sets_are_taken_back_and_not_played_again() -> None:
    cursor = _cursor()
    ahead, rollouter = _ahead(cursor)
    rollouter._held = (3,)
    ahead.play(_ctx(1))
    whole, saved = ahead.whole(), cursor.state_dict()
    assert list(whole) == [2], "set 3 is not whole yet"
    resumed_cursor = _cursor()
    resumed_cursor.load_state_dict(saved)
    resumed, again = _ahead(resumed_cursor)
    resumed.take_back(whole)
    positions, groups = resumed.play(_ctx(2))
    assert positions == [2, 3] and groups == whole[2]
    assert again.begun == [(3, ["prompt-4", "prompt-5"]), (4, ["prompt-6", "prompt-7"])]
    assert resumed_cursor.begun(3) == [make_prompt("4"), make_prompt("5")]


def test_a_set_that_failed_is_not_whole() -> None:
    ahead, rollouter = _ahead(_cursor(), max_lag=1)
    rollouter._held = (2,)
    ahead.play(_ctx(1))
    rollouter.futures[2].set_exception(EngineError("all servers are out"))
    assert ahead.whole() == {}


def test_progress_counts_the_present_step_and_hears_of_all() -> None:
    ahead, rollouter = _ahead(_cursor(), max_lag=1)
    seen: list[int] = []
    ahead.play(_ctx(1), seen.append)
    rollouter.progress[2](1)
    assert seen == [0], "a later step's attempt is a sign of life, not one of this step"
    rollouter.progress[2](2)
    later: list[int] = []
    ahead.play(_ctx(2), later.append)
    rollouter.progress[3](1)
    assert later == [0]
