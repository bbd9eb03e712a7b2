"""What every environment must keep to, as checks to run against your own (pytest or plain calls).

    from megatron_spear.testing.environments import check_environment

    def test_my_game():
        check_environment(MyGame, options={"level": 3}, actions=["look", "go north"])

Each check makes environments of its own and raises ContractViolation with what was got and
expected.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.testing.contract import ContractViolation, fail

WEIRD_TEXTS = (
    "",
    " \t\n ",
    "\x00",
    "<action></action>",
    "<|im_end|><|im_start|>user",
    "{}%s{0}\\n'\"`$(ls)",
    "左 打开 抽屉",
    "\N{GRINNING FACE}" * 50,
    "\ud800 lone surrogate",
    "go to " * 2000,
)
"""Texts a model may well produce; an environment answers each with ``info["valid"] = False``."""

Make = Callable[[], TextEnvironment]
_INFO_TYPES: Mapping[str, type] = {
    "won": bool,
    "valid": bool,
    "anchor": str,
    "admissible": list,
    "tool_calls": list,
    "replies": list,
}
_CALL_TYPES: Mapping[str, type] = {"name": str, "arguments": str, "succeeded": bool}


def check_environment(
    make: Make, *, options: Mapping[str, Any], actions: Sequence[str], seed: int = 0
) -> None:
    """All checks below. ``actions`` are a few texts the environment understands after reset."""
    check_reset_and_step(make, options=options, actions=actions, seed=seed)
    check_weird_text(make, options=options, seed=seed)
    check_determinism(make, options=options, actions=actions, seed=seed)
    check_reset_again(make, options=options, actions=actions, seed=seed)


def check_reset_and_step(
    make: Make, *, options: Mapping[str, Any], actions: Sequence[str], seed: int = 0
) -> None:
    """``reset`` and ``step`` give the right shapes, and what they give can be pickled."""
    for step in _play(make(), options, actions, seed)[1:]:
        if type(step) is not StepResult:
            fail("step returned", type(step).__name__, "a StepResult")
        if not isinstance(step.reward, float | int) or isinstance(step.reward, bool):
            fail("reward is", repr(step.reward), "a number")
        for name in ("terminated", "truncated"):
            if type(getattr(step, name)) is not bool:
                fail(f"{name} is", repr(getattr(step, name)), "a bool")
        if step.info.get("won") and not step.terminated:
            fail("after winning, terminated is", "False", "True")


def check_weird_text(make: Make, *, options: Mapping[str, Any], seed: int = 0) -> None:
    """No text raises, and none of the weird ones counts as valid."""
    for text in WEIRD_TEXTS:
        try:
            result = _play(make(), options, [text], seed)[-1]
        except ContractViolation:
            raise
        except Exception as error:
            raise ContractViolation(
                f"step({text[:40]!r}) raised {error!r}; expected an observation and valid=False"
            ) from error
        if result.info.get("valid", False):
            fail(f"step({text[:40]!r}) gave valid =", "True", "False")


def check_determinism(
    make: Make, *, options: Mapping[str, Any], actions: Sequence[str], seed: int = 0
) -> None:
    """Two environments with the same seed and options answer the same, text and info."""
    first = _play(make(), options, actions, seed)
    second = _play(make(), options, actions, seed)
    for turn, (one, two) in enumerate(zip(first, second, strict=True)):
        if one != two:
            fail(f"turn {turn} differs between equal seeds:", repr(two), repr(one))


def check_reset_again(
    make: Make, *, options: Mapping[str, Any], actions: Sequence[str], seed: int = 0
) -> None:
    """A used environment, reset, answers like a new one: nothing leaks between trajectories."""
    environment = make()
    first = _play(environment, options, actions, seed, close=False)
    again = _play(environment, options, actions, seed)
    if first != again:
        fail("after a second reset the transcript is", repr(again), repr(first))


def _play(
    environment: TextEnvironment,
    options: Mapping[str, Any],
    actions: Sequence[str],
    seed: int,
    *,
    close: bool = True,
) -> list[Any]:
    """[(observation, info), StepResult, ...] until the end of the actions or of the task."""
    try:
        answer = environment.reset(seed=seed, options=dict(options))
        if not isinstance(answer, tuple) or len(answer) != 2:
            fail("reset returned", repr(answer), "(observation, info)")
        _check_texts(*answer)
        transcript: list[Any] = [answer]
        for action in actions:
            result = environment.step(action)
            _check_texts(result[0], result[-1])
            transcript.append(result)
            if result[2] or result[3]:
                break
        return transcript
    finally:
        if close:
            environment.close()


def _check_texts(observation: Any, info: Any) -> None:
    if not isinstance(observation, str):
        fail("the observation is", repr(observation), "a str")
    if not isinstance(info, dict):
        fail("info is", repr(info), "a dict")
    for name, kind in _INFO_TYPES.items():
        if name in info and type(info[name]) is not kind:
            fail(f"info[{name!r}] is", repr(info[name]), f"a {kind.__name__}")
    for call in info.get("tool_calls", ()):
        found = {key: type(value) for key, value in call.items()} if type(call) is dict else None
        if found != _CALL_TYPES:
            fail("info['tool_calls'] has", repr(call), f"dicts of {', '.join(_CALL_TYPES)}")
    for text in (observation, *info.get("replies", ()), *info.get("admissible", ())):
        if not isinstance(text, str):
            fail("what the model reads has", repr(text), "texts alone")
        if text != text.encode("utf-8", "replace").decode("utf-8"):
            fail("what the model reads has a lone surrogate:", repr(text), "text as UTF-8 has it")
    try:
        same = pickle.loads(pickle.dumps(info)) == info
    except Exception as error:
        raise ContractViolation(
            f"info cannot be pickled ({error}); expected plain values"
        ) from error
    if not same:
        fail("info after pickling is", "different", "the same plain values")
