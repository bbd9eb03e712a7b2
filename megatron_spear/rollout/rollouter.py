"""Prompts in, groups of trajectories out: many attempts at once, each a coroutine of its own."""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

from megatron_spear.config.environments.base import History
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import EngineError, EnvironmentFault, EnvironmentsLost, StopRequested
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.drift import TokenDrift
from megatron_spear.rollout.engine import RolloutEngine
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.rollout.slots import Slots
from megatron_spear.rollout.trajectory import Attempt, Stage, play
from megatron_spear.types import Prompt, Status, Trajectory, TrajectoryGroup, TrajectoryId

_LOG = logging.getLogger(__name__)
# An attempt as it was played, and why it failed if it did.
_Outcome = tuple[Trajectory, Exception | None]


class Rollouter:
    """Plays ``group_size`` attempts of each prompt with one engine and one environment pool.

    ``history`` is ``env.history``, see `conversation`. At most ``rollout.max_slots`` attempts run
    at once, which the engine has room for. Engine and pool belong to ``loop``; None = one is run
    for each ``collect_sync``.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        pool: EnvironmentPool,
        renderer: ChatRenderer,
        view: AgentView,
        rollout: RolloutSection,
        *,
        history: History,
        max_turns: int,
        loop: EventLoop | None = None,
    ) -> None:
        self._loop = loop
        self._slots_of = WeakKeyDictionary[asyncio.AbstractEventLoop, Slots]()
        self._stage = Stage(
            engine=engine,
            pool=pool,
            renderer=renderer,
            view=view,
            rollout=rollout,
            history=history,
            max_turns=max_turns,
        )

    async def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: tuple[int, ...],
        temperature: float,
        top_p: float = 1.0,
        progress: Callable[[int], None] | None = None,
        all_may_fail: bool = False,
    ) -> list[TrajectoryGroup]:
        """One group a prompt, in the order of the prompts.

        Draws are keyed by (``seed``, prompt id, member, turn), so they depend neither on timing
        nor on which other prompts are played. ``seed`` is (the run's, step, ...), step 0 in
        evaluations: of all that wait, attempts of the lowest step are played first, so that what
        the present step needs does not wait for sets of later ones. ``temperature`` 0 is greedy;
        ``top_p`` below 1 is for evaluation (``SamplingParams``). ``progress(finished)`` is called
        after every attempt with the number finished so far and may raise StopRequested.

        A failed attempt is logged and goes to ``failures``. Raises what the first attempt failed
        with when all of them failed, unless ``all_may_fail``; EnvironmentsLost, StopRequested and
        cancellation as they come.
        """
        names = _group_names(prompts, seed)
        finished = 0
        slots, step = self._slots(), _step_of(seed)

        async def run(attempt: Attempt) -> _Outcome:
            nonlocal finished
            async with slots.held(step):
                outcome = await self._guarded(attempt)
            finished += 1
            if progress is not None:
                progress(finished)
            return outcome

        outcomes = await _all_of(
            run(_attempt(prompt, *name, member, seed, temperature, top_p))
            for prompt, name in zip(prompts, names, strict=True)
            for member in range(group_size)
        )
        errors = [error for _, error in outcomes if error is not None]
        if errors and len(errors) == len(outcomes) and not all_may_fail:
            raise errors[0]
        played = [trajectory for trajectory, _ in outcomes]
        return [
            _group(prompt, name[0], played[index * group_size : (index + 1) * group_size])
            for index, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]

    def _slots(self) -> Slots:
        """Who may play: more contexts than the engine's slots would push each other's cache out
        between turns. Shared by all collects of a loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._slots_of:
            self._slots_of[loop] = Slots(self._stage.rollout.max_slots)
        return self._slots_of[loop]

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: tuple[int, ...],
        temperature: float,
        progress: Callable[[int], None] | None = None,
    ) -> "Future[list[TrajectoryGroup]]":
        """Begin a ``collect`` on the event loop, for a caller that goes on meanwhile."""
        assert self._loop is not None, "rollouts ahead need an event loop of their own"
        return self._loop.start(
            self.collect(
                prompts,
                group_size=group_size,
                seed=seed,
                temperature=temperature,
                progress=progress,
            )
        )

    def collect_sync(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: tuple[int, ...],
        temperature: float,
        top_p: float = 1.0,
        progress: Callable[[int], None] | None = None,
        all_may_fail: bool = False,
    ) -> list[TrajectoryGroup]:
        """``collect`` for callers in another thread than the event loop's."""
        work = self.collect(
            prompts,
            group_size=group_size,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            progress=progress,
            all_may_fail=all_may_fail,
        )
        return asyncio.run(work) if self._loop is None else self._loop.run(work)

    async def _guarded(self, attempt: Attempt) -> _Outcome:
        """The played attempt, or what stands for it when it failed, with the reason."""
        try:
            return await play(self._stage, attempt), None
        except (EnvironmentsLost, StopRequested):
            raise
        except (EngineError, EnvironmentFault) as error:
            broken = isinstance(error, EngineError)
            status = Status.FAILED_ENGINE if broken else Status.FAILED_TOOL
            _LOG.warning("trajectory %s failed (%s): %s", attempt.id, status, error)
            return _failed(attempt, status, error), error
        except Exception as error:  # noqa: BLE001 - one attempt's defect must not end the run
            _LOG.exception("trajectory %s failed", attempt.id)
            return _failed(attempt, Status.FAILED_PARSE, error), error


async def _all_of(attempts: Iterable[Coroutine[Any, Any, _Outcome]]) -> list[_Outcome]:
    """The outcomes in order; what one of them raises ends the others and is then raised."""
    tasks = [asyncio.create_task(attempt) for attempt in attempts]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _group_names(prompts: Sequence[Prompt], seed: tuple[int, ...]) -> list[tuple[str, int]]:
    """(group id, occurrence) of each prompt: unique even where a prompt comes twice in one call.

    Example: seed (0, 3) and prompts a, b, a give ``0.3/a``, ``0.3/b``, ``0.3/a#1``.
    """
    prefix, seen, names = ".".join(map(str, seed)), Counter[str](), []
    for prompt in prompts:
        occurrence = seen[prompt.prompt_id]
        seen[prompt.prompt_id] += 1
        again = f"#{occurrence}" if occurrence else ""
        names.append((f"{prefix}/{prompt.prompt_id}{again}", occurrence))
    return names


def collected_in(group_id: str) -> int | None:
    """The trainer step whose rollouts made this group; None for a name of another making.

    Example: 3 for ``0.3/a`` and for ``0.3.1/a#1`` (seed 0, step 3, a further round).
    """
    numbers = group_id.partition("/")[0].split(".")
    is_ours = len(numbers) in (2, 3) and all(number.isdecimal() for number in numbers)
    return int(numbers[1]) if is_ours else None


def is_named_after(group_id: str, prompt: Prompt) -> bool:
    """Whether the group of this name was played with this prompt, as far as its id tells.

    Example: ``0.3/a`` and ``0.3/a#1`` are named after the prompt with the id ``a``.
    """
    _, _, name = group_id.partition("/")
    again = name.removeprefix(f"{prompt.prompt_id}#")
    return name == prompt.prompt_id or (again != name and again.isdecimal())


def _step_of(seed: tuple[int, ...]) -> int:
    """The step that draws of this seed are for; 0 for none."""
    return seed[1] if len(seed) > 1 else 0


def _attempt(
    prompt: Prompt,
    group_id: str,
    occurrence: int,
    member: int,
    seed: tuple[int, ...],
    temperature: float,
    top_p: float,
) -> Attempt:
    key = prompt_key(prompt.prompt_id)
    # All members of a group get the same task, so the environment's seed leaves the member out.
    env_digest = hashlib.blake2b(repr((seed, key, occurrence)).encode(), digest_size=4).digest()
    return Attempt(
        id=TrajectoryId(group=group_id, member=member),
        prompt=prompt,
        seed=(*seed, key, occurrence, member),
        step=_step_of(seed),
        env_seed=int.from_bytes(env_digest, "little"),
        temperature=temperature,
        top_p=top_p,
    )


def prompt_key(prompt_id: str) -> int:
    """A prompt's number in seeds: 32 bits of a hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=4).digest(), "little")


def _failed(attempt: Attempt, status: Status, error: Exception) -> Trajectory:
    return Trajectory(
        id=attempt.id,
        prompt=attempt.prompt,
        segments=(),
        status=status,
        info={
            "error": f"{type(error).__name__}: {error}",
            "token_drift": error.num_tokens if isinstance(error, TokenDrift) else 0,
        },
    )


def _group(prompt: Prompt, group_id: str, played: Sequence[Trajectory]) -> TrajectoryGroup:
    return TrajectoryGroup(
        group_id=group_id,
        prompt=prompt,
        members=tuple(t for t in played if not t.status.failed),
        failures=tuple(t for t in played if t.status.failed),
    )
