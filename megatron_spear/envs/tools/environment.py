"""The base of environments with tools. A whole one of your own, in one file::

    class Shop(ToolEnvironment):
        def start(self, seed, options):
            self._item, self._cents = options["item"], options["cents"]
            return f"What does one {self._item} cost, in cents?"

        def price(self, item: str) -> str:
            if item != self._item:
                raise ToolFailure(f"there is no {item}")
            return str(self._cents)

        def finish(self, content):
            won = content == str(self._cents)
            return Outcome(reward=float(won), won=won)

        tools = (Tool("price", "Price of an item in cents.", {...}, price),)

`testing.market_environment` is a longer one; `testing.environments.check_environment` checks that
yours keeps to the contract. The view for it is ``ToolView(Shop.tools)``.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.envs.tools.parsing import ParsedCall, parse_answer
from megatron_spear.envs.tools.texts import middle_left_out, plain, shortened
from megatron_spear.envs.tools.tool import Tool, ToolFailure
from megatron_spear.errors import EnvironmentFault, SpearError

_NOTHING = "That was neither a tool call nor an answer."


class Outcome(NamedTuple):
    """What an answer without calls led to.

    ``over`` = the task has ended; ``valid`` = the answer had the form that was asked for;
    ``observation`` is read where the task goes on.
    """

    reward: float = 0.0
    won: bool = False
    over: bool = True
    valid: bool = True
    observation: str = ""


class _Done(NamedTuple):
    """One call as it was answered; ``formed`` says that it named a tool and fitting arguments."""

    text: str
    succeeded: bool
    formed: bool


class ToolEnvironment(TextEnvironment):
    """Reads a whole answer, runs its calls in order and replies to each.

    A subclass gives ``tools``, ``start`` and ``finish``, and may give ``state`` and ``close``. A
    tool may set ``outcome`` to end the task; calls after that are refused.

    ``info`` holds ``won``, ``valid`` and what ``state`` gives; after a step also ``replies`` (the
    text for each call) and ``tool_calls`` (a call that named no tool, did not fit its schema or
    failed has ``succeeded`` False). The observation is the replies, joined by line breaks. Faults
    of the model are never exceptions; a SpearError of a tool (a sandbox that died) is one, because
    it says nothing about the policy.
    """

    tools: Sequence[Tool] = ()
    """What can be called; their functions get the environment first."""
    max_reply_chars: int = 8000
    """Longest reply to one call; the middle of a longer one is left out."""

    outcome: Outcome | None = None
    """How the task ended; None while it goes on."""

    _running = False

    @abstractmethod
    def start(self, seed: int, options: Mapping[str, Any]) -> str:
        """Begin the task of ``options``; gives the first observation. Raises DataError for options
        that are no task."""

    @abstractmethod
    def finish(self, content: str) -> Outcome:
        """Take an answer without calls, which ends the task as a rule. ``content`` is the text
        without thoughts, never empty."""

    def state(self) -> dict[str, Any]:
        """More for ``info``, ``anchor`` say."""
        return {}

    def close(self) -> None:
        """Free what the environment holds: nothing."""

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Start the task of ``options``."""
        self.outcome = None
        observation = plain(self.start(seed, options))
        self._running = True
        return observation, {"won": False, "valid": True, **self.state()}

    def step(self, action: str) -> StepResult:
        """Run the calls of a whole answer, or take it as the final one where it has none."""
        if not self._running:
            raise EnvironmentFault(
                "step outside a task: call reset before the first and after the last turn."
            )
        answer = parse_answer(action)
        done = [self._call(call) for call in answer.calls]
        outcome = self.outcome if done else self._answered(answer.content)
        if outcome is None:
            outcome = Outcome(over=False)
        self._running = not outcome.over
        replies = [reply.text for reply in done]
        info = {
            "won": outcome.won,
            "valid": outcome.valid and all(reply.formed for reply in done),
            "replies": replies,
            "tool_calls": [
                {"name": call.name, "arguments": call.text, "succeeded": reply.succeeded}
                for call, reply in zip(answer.calls, done, strict=True)
            ],
            **self.state(),
        }
        observation = "\n".join(replies) or plain(outcome.observation)
        return StepResult(observation, float(outcome.reward), outcome.over, False, info)

    def _answered(self, content: str) -> Outcome:
        """The outcome of an answer without calls."""
        if not content:
            return Outcome(over=False, valid=False, observation=_NOTHING)
        return self.finish(content)

    def _call(self, call: ParsedCall) -> _Done:
        """Run one call."""
        tool = next((tool for tool in self.tools if tool.name == call.name), None)
        if call.error is not None:
            return _refused(call.error)
        if self.outcome is not None:
            return _refused("the task has ended")
        if tool is None:
            known = ", ".join(tool.name for tool in self.tools)
            return _refused(f'there is no tool "{shortened(call.name)}"; there are: {known}')
        if (problem := tool.problem(call.arguments)) is not None:
            return _refused(f"{tool.name}: {problem}")
        try:
            reply, succeeded = str(tool.function(self, **call.arguments)), True
        except ToolFailure as failure:
            reply, succeeded = str(failure), False
        except SpearError:
            raise
        except Exception as error:  # noqa: BLE001 - hostile arguments: told the model, counted
            reply, succeeded = f"error: {tool.name}: {type(error).__name__}: {error}", False
        return _Done(middle_left_out(plain(reply), self.max_reply_chars), succeeded, True)


def _refused(reason: str) -> _Done:
    return _Done(f"error: {plain(reason)}", succeeded=False, formed=False)
