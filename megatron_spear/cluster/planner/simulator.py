"""Asynchronous rollouts in simulated time: length of a step, who stands idle, age of tokens.

The rules are those of ``trainer/ahead.py``: set s begins once version s - 1 - max_lag is published,
steps take their set whole and in order, and an update pauses the engines. With the schedule
``deterministic`` it waits before until all that was begun is whole.

    trainer    | wait | train 1 | update | train 2 | update | ...
    engines    | set 1, set 2 ........  | pause  | set 2, set 3 ...

All contexts of an engine decode at one speed, which depends on how many they are. So an engine
needs one number, the tokens each of its contexts has got so far (``progress``): one that comes at
progress v with n tokens to go leaves at v + n, and a heap of these says which is the next. An event
costs the logarithm of the contexts, whatever the tokens.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megatron_spear.cluster.planner.long_tail import LongTail


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is simulated.

    ``decode_s[b]`` is the time of a decode step with b contexts in an engine, for b up to the most
    it decodes at once. A trajectory's tokens come in ``num_turns`` equal parts, with ``env_s``
    seconds of environment after each but the last, in which it is in no engine.
    """

    num_engines: int
    decode_s: NDArray[np.float64]
    num_prompts: int
    group_size: int
    lengths: LongTail
    train_s: float
    """Trainer: everything of a step but rollout and update."""
    update_s: float
    """Engines and trainer: one weight update."""
    read_s: float = 0.0
    """Engine: reading what is new in one turn's prompt, while its other contexts wait."""
    reread_s: float = 0.0
    """Engine: reading one context again after an update (``pause_mode: retract``)."""
    num_turns: int = 1
    env_s: float = 0.0
    max_attempts: int | None = None
    """Trajectories played at once; None = all that were begun."""
    max_lag: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        assert self.num_engines > 0 and len(self.decode_s) > 1, "engines have room for a context"
        assert self.num_prompts > 0 and self.group_size > 0 and self.num_turns > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """Means over the measured steps."""

    step_s: float
    tokens_per_s: float
    """Sampled tokens, of all engines."""
    trainer_idle: float
    """Share of the time in which the trainer waits for its set or for the engines."""
    engine_idle: float
    """Share of the engines' time in which they decode nothing, updates included."""
    occupancy: float
    """Contexts an engine decodes, mean over the time, over the most it can."""
    lag_share: tuple[float, ...]
    """Share of trained tokens that are 0, 1, ... versions old."""

    @property
    def mean_lag(self) -> float:
        """Versions a trained token is old."""
        return sum(lag * share for lag, share in enumerate(self.lag_share))

    @property
    def max_lag(self) -> int:
        """Versions the oldest trained token is old."""
        return max((lag for lag, share in enumerate(self.lag_share) if share > 0), default=0)


def simulate(work: Workload, *, steps: int = 8, seed: int = 0) -> Simulated:
    """What ``steps`` trainer steps are like, after those in which the run gets going."""
    return _Simulation(work, seed).run(skip=work.max_lag + 2, steps=steps)


def gain_over_taking_turns(work: Workload, *, steps: int = 8, seed: int = 0) -> float:
    """Steps a second over those of the same machines with max_lag 0, the same lengths drawn."""
    turns = simulate(replace(work, max_lag=0), steps=steps, seed=seed)
    return turns.step_s / simulate(work, steps=steps, seed=seed).step_s


@dataclass(slots=True, eq=False)
class _Attempt:
    """A trajectory under way: ``left`` are the turns after the present one."""

    of_set: int
    turn_tokens: float
    left: int
    start: float = 0.0


@dataclass(slots=True, eq=False)
class _Engine:
    """Contexts that decode at one speed. ``marks`` are (progress, version) at each update."""

    progress: float = 0.0
    time: float = 0.0
    stamp: int = 0
    leaving: list[tuple[float, int, _Attempt]] = field(default_factory=list)
    marks: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    idle_s: float = 0.0
    context_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Leaves:
    """The next context leaves an engine, unless it was touched since (``stamp``)."""

    engine: int
    stamp: int


@dataclass(frozen=True, slots=True)
class _Back:
    """An attempt has its environment's answer."""

    attempt: _Attempt


class _Trained:
    """The trainer is through with its set."""


class _Updated:
    """All engines have the new weights."""


_Event = _Leaves | _Back | _Trained | _Updated


class _Simulation:
    def __init__(self, work: Workload, seed: int) -> None:
        self._work, self._seed = work, seed
        self._slots = len(work.decode_s) - 1
        self._decode_s = work.decode_s.tolist()
        self._engines = [_Engine() for _ in range(work.num_engines)]
        self._contexts = np.zeros(work.num_engines, np.int64)
        self._events: list[tuple[float, int, _Event]] = []
        self._count = 0
        self._fresh: deque[_Attempt] = deque()
        self._ready: deque[_Attempt] = deque()
        self._playing = 0
        self._open: dict[int, int] = {}
        self._lags: dict[int, float] = {}
        self._tokens: dict[int, float] = {}
        self._version, self._now, self._paused = 0, 0.0, False
        self._step, self._training, self._wants_update = 1, False, False
        self._waited_s, self._waits_since = 0.0, 0.0
        self._ends: list[float] = []

    def run(self, *, skip: int, steps: int) -> Simulated:
        """Play until ``skip + steps`` steps are done; measure the last ``steps``."""
        for number in range(1, self._work.max_lag + 2):
            self._begin(number)
        self._admit()
        begun: tuple[float, float, list[tuple[float, float]]] | None = None
        while len(self._ends) < skip + steps:
            self._next()
            if begun is None and len(self._ends) == skip:
                begun = (self._now, self._waited_s, self._spent())
                self._lags.clear()
        assert begun is not None
        return self._measured(steps, *begun)

    def _measured(
        self, steps: int, since: float, waited_s: float, spent: list[tuple[float, float]]
    ) -> Simulated:
        length_s = self._now - since
        now = self._spent()
        idle_s = sum(b[0] - a[0] for a, b in zip(spent, now, strict=True))
        context_s = sum(b[1] - a[1] for a, b in zip(spent, now, strict=True))
        engine_s = length_s * len(self._engines)
        total = sum(self._lags.values())
        oldest = max(self._lags, default=0)
        last = range(self._step - steps, self._step)
        return Simulated(
            step_s=length_s / steps,
            tokens_per_s=sum(self._tokens[number] for number in last) / length_s,
            trainer_idle=(self._waited_s - waited_s) / length_s,
            engine_idle=idle_s / engine_s,
            occupancy=context_s / engine_s / self._slots,
            lag_share=tuple(self._lags.get(lag, 0.0) / total for lag in range(oldest + 1)),
        )

    def _spent(self) -> list[tuple[float, float]]:
        for engine in self._engines:
            self._advance(engine)
        return [(engine.idle_s, engine.context_s) for engine in self._engines]

    def _push(self, time: float, event: _Event) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, event))

    def _next(self) -> None:
        time, _, event = heapq.heappop(self._events)
        if isinstance(event, _Leaves):
            if self._engines[event.engine].stamp != event.stamp:
                return
            self._now = time
            self._leave(event.engine)
        else:
            self._now = time
            if isinstance(event, _Back):
                self._ready.append(event.attempt)
            elif isinstance(event, _Trained):
                self._training, self._wants_update = False, True
                self._waits_since = time
            else:
                self._updated()
        self._trainer()
        self._admit()

    # ---- trainer ----

    def _trainer(self) -> None:
        """Begin what the trainer can begin now: a step, or an update."""
        if self._training or self._paused:
            return
        if self._wants_update:
            if self._work.deterministic and any(self._open.values()):
                return
            for engine in self._engines:
                self._advance(engine)
                engine.stamp += 1
            self._wants_update, self._paused = False, True
            self._waited_s += self._now - self._waits_since
            self._push(self._now + self._work.update_s, _Updated())
        elif self._open.get(self._step) == 0:
            del self._open[self._step]
            self._training = True
            self._waited_s += self._now - self._waits_since
            self._push(self._now + self._work.train_s, _Trained())

    def _updated(self) -> None:
        self._ends.append(self._now)
        for engine in self._engines:
            self._advance(engine)
        self._version, self._paused = self._version + 1, False
        for number, engine in enumerate(self._engines):
            engine.time += self._work.reread_s * len(engine.leaving)
            engine.marks.append((engine.progress, self._version))
            self._expect(number)
        self._step += 1
        self._waits_since = self._now
        self._begin(self._step + self._work.max_lag)

    # ---- rollouts ----

    def _begin(self, number: int) -> None:
        work = self._work
        count = work.num_prompts * work.group_size
        generator = np.random.default_rng((self._seed, number))
        tokens = work.lengths.draw(generator, count)
        self._open[number], self._tokens[number] = count, float(tokens.sum())
        for size in (tokens / work.num_turns).tolist():
            self._fresh.append(_Attempt(number, size, work.num_turns - 1))

    def _admit(self) -> None:
        """Give waiting turns to the engines with the fewest contexts, in the order they came."""
        if self._paused:
            return
        most = self._work.max_attempts
        while self._fresh and (most is None or self._playing < most):
            self._playing += 1
            self._ready.append(self._fresh.popleft())
        touched: set[int] = set()
        while self._ready:
            number = int(self._contexts.argmin())
            if self._contexts[number] >= self._slots:
                break
            engine = self._engines[number]
            self._advance(engine)
            engine.time += self._work.read_s
            attempt = self._ready.popleft()
            attempt.start = engine.progress
            self._count += 1
            leaves = engine.progress + attempt.turn_tokens
            heapq.heappush(engine.leaving, (leaves, self._count, attempt))
            self._contexts[number] += 1
            touched.add(number)
        for number in touched:
            self._expect(number)

    def _leave(self, number: int) -> None:
        engine = self._engines[number]
        self._advance(engine)
        engine.progress, _, attempt = heapq.heappop(engine.leaving)
        self._count_lags(engine, attempt)
        self._contexts[number] -= 1
        self._expect(number)
        if attempt.left:
            attempt.left -= 1
            self._push(self._now + self._work.env_s, _Back(attempt))
            return
        self._playing -= 1
        self._open[attempt.of_set] -= 1

    def _advance(self, engine: _Engine) -> None:
        """Decode up to now."""
        passed = self._now - engine.time
        if passed <= 0:
            return
        contexts = len(engine.leaving)
        if contexts and not self._paused:
            engine.progress += passed / self._decode_s[contexts]
            engine.context_s += passed * contexts
        else:
            engine.idle_s += passed
        engine.time = self._now

    def _expect(self, number: int) -> None:
        engine = self._engines[number]
        engine.stamp += 1
        if engine.leaving:
            tokens = max(0.0, engine.leaving[0][0] - engine.progress)
            at = max(engine.time, self._now) + tokens * self._decode_s[len(engine.leaving)]
            self._push(at, _Leaves(number, engine.stamp))

    def _count_lags(self, engine: _Engine, attempt: _Attempt) -> None:
        """Whose version the turn's tokens are; trained on by version ``of_set - 1``."""
        stop = engine.progress
        for progress, version in reversed(engine.marks):
            start = max(progress, attempt.start)
            if stop > start:
                lag = attempt.of_set - 1 - version
                self._lags[lag] = self._lags.get(lag, 0.0) + stop - start
                stop = start
            if progress <= attempt.start:
                return
