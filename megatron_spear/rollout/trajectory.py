"""One trajectory: reset, then prompt -> generate -> parse -> step until it ends."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_spear.config.environments.base import WindowHistory
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.views import AgentView, HistoryStep
from megatron_spear.errors import EngineError, EnvironmentFault
from megatron_spear.heartbeats.heart import beat
from megatron_spear.rollout.chat import ChatRenderer, next_tokens
from megatron_spear.rollout.engine import (
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
)
from megatron_spear.rollout.env_pool import EnvironmentPool, Slot
from megatron_spear.types import (
    Prompt,
    Segment,
    Status,
    TokenArray,
    ToolCall,
    Trajectory,
    TrajectoryId,
    Turn,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What all trajectories of a rollouter share."""

    engine: RolloutEngine
    pool: EnvironmentPool
    renderer: ChatRenderer
    view: AgentView
    rollout: RolloutSection
    window: int | None
    max_turns: int

    @property
    def max_context(self) -> int:
        """Most tokens in one context: the setting, or the engine's limit where that is lower."""
        return min(self.rollout.max_context, self.engine.max_context)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Which trajectory to play; ``seed`` keys its draws, ``env_seed`` is its group's."""

    id: TrajectoryId
    prompt: Prompt
    seed: tuple[int, ...]
    env_seed: int
    temperature: float
    top_p: float = 1.0


def window_of(history: str | WindowHistory) -> int | None:
    """The window of ``env.history``; None for the full conversation."""
    return history.window if isinstance(history, WindowHistory) else None


async def play(stage: Stage, attempt: Attempt) -> Trajectory:
    """Play one attempt to its end.

    Ends COMPLETED (the environment terminated), TRUNCATED_TURNS or TRUNCATED_LENGTH (the context is
    full; an action cut by that is kept but not played). Raises EngineError and EnvironmentFault.
    """
    async with stage.pool.slot() as slot:
        player = _Player(stage, attempt, slot)
        try:
            return await player.run()
        finally:
            player.release()


class _Player:
    """The state of one attempt while it is played."""

    def __init__(self, stage: Stage, attempt: Attempt, slot: Slot) -> None:
        self._stage, self._attempt, self._slot = stage, attempt, slot
        self._turns: list[Turn] = []
        self._history: list[HistoryStep] = []
        self._sessions: set[str] = set()
        # The tokens of the full conversation so far; unused in window mode.
        self._context: TokenArray = np.zeros(0, np.int32)
        self._observation = ""
        self._info: Mapping[str, Any] = {}
        self._env_reward = 0.0

    async def run(self) -> Trajectory:
        stage, prompt = self._stage, self._attempt.prompt
        options = {"admissible": stage.view.needs_admissible, **prompt.metadata}
        self._observation, self._info = await stage.pool.reset(
            self._slot, seed=self._attempt.env_seed, options=options
        )
        status = None
        while status is None:
            status = await self._turn()
        return self._trajectory(status)

    def release(self) -> None:
        """Let the engine forget this attempt's contexts."""
        for session in self._sessions:
            self._stage.engine.release(session)

    async def _turn(self) -> Status | None:
        """One generation and the environment's reply; the status once the attempt is over."""
        stage, turn = self._stage, len(self._turns)
        started = time.perf_counter()
        new_tokens = self._new_tokens()
        token_ids = np.concatenate([self._context, new_tokens])
        room = stage.max_context - len(token_ids)
        if room < 1:
            return self._no_room(len(token_ids))
        generation = await self._generate(token_ids, turn, min(room, stage.rollout.max_new_tokens))
        cut = generation.finish_reason == "context" or (
            generation.finish_reason == "length" and room < stage.rollout.max_new_tokens
        )
        text = stage.renderer.decode_action(generation.token_ids)
        action, valid = stage.view.parse(text)
        anchor, observation = str(self._info.get("anchor", "")), self._observation
        status: Status | None = Status.TRUNCATED_LENGTH
        if cut:
            valid = False
        else:
            status = await self._step(action, turn)
            valid = valid and bool(self._info.get("valid", True))
        beat()
        self._turns.append(
            Turn(
                observation_tokens=new_tokens,
                action_tokens=generation.token_ids,
                action_logprobs=generation.logprobs,
                finish_reason=generation.finish_reason,
                versions=generation.versions,
                time_s=time.perf_counter() - started,
                text=text,
                action_text=action,
                valid=valid,
                void=stage.view.void(text),
                tool_calls=() if cut else _tool_calls(self._info),
                anchor=anchor,
                observation=observation,
            )
        )
        if stage.window is None:
            self._context = np.concatenate([token_ids, generation.token_ids])
        return status

    def _new_tokens(self) -> TokenArray:
        """int32 ``[O]``: what the next prompt adds to the context (everything, in window mode)."""
        stage = self._stage
        return next_tokens(
            stage.renderer,
            stage.view,
            self._attempt.prompt.messages,
            self._history,
            self._turns[-1].action_tokens if self._turns else (),
            self._observation,
            self._info,
            stage.window,
        )

    async def _generate(self, token_ids: TokenArray, turn: int, max_new_tokens: int) -> Generation:
        stage, attempt = self._stage, self._attempt
        session = str(attempt.id) if stage.window is None else f"{attempt.id}/{turn}"
        self._sessions.add(session)
        sampling = SamplingParams(
            temperature=attempt.temperature,
            top_p=attempt.top_p,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stage.renderer.stop_token_ids,
        )
        generation = await stage.engine.generate(
            GenerationRequest(
                session=session, token_ids=token_ids, sampling=sampling, seed=(*attempt.seed, turn)
            )
        )
        if stage.window is not None:
            stage.engine.release(session)
            self._sessions.discard(session)
        if not 0 < len(generation.token_ids) == len(generation.logprobs):
            raise EngineError(
                f"a generation has {len(generation.token_ids)} tokens and "
                f"{len(generation.logprobs)} log-probs; expected equally many, at least one"
            )
        return generation

    async def _step(self, action: str, turn: int) -> Status | None:
        stage = self._stage
        result = await stage.pool.step(self._slot, action)
        self._history.append((self._observation, action))
        self._observation, self._info = result.observation, result.info
        self._env_reward += float(result.reward)
        if result.terminated:
            return Status.COMPLETED
        if result.truncated or turn + 1 >= stage.max_turns:
            return Status.TRUNCATED_TURNS
        return None

    def _no_room(self, num_tokens: int) -> Status:
        if not self._turns:
            raise EngineError(
                f"the first prompt has {num_tokens} tokens, which leaves no room to answer in a "
                f"context of {self._stage.max_context}; raise rollout.max_context"
            )
        return Status.TRUNCATED_LENGTH

    def _trajectory(self, status: Status) -> Trajectory:
        if self._stage.window is None:
            segments: tuple[Segment, ...] = (Segment(turns=tuple(self._turns)),)
            # What will be trained on is what the engine saw: its last prompt and answer.
            if not np.array_equal(segments[0].token_ids, self._context):
                raise EngineError(
                    f"the turns of {self._attempt.id} do not add up to its last prompt"
                )
        else:
            segments = tuple(Segment(turns=(turn,)) for turn in self._turns)
        plain = {k: v for k, v in self._info.items() if isinstance(v, str | int | float | bool)}
        return Trajectory(
            id=self._attempt.id,
            prompt=self._attempt.prompt,
            segments=segments,
            status=status,
            env_reward=self._env_reward,
            won=bool(self._info.get("won", False)),
            info=plain,
        )


def _tool_calls(info: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The calls an environment reports, as records; EnvironmentFault where a field is off."""
    calls = info.get("tool_calls", ())
    try:
        return tuple(ToolCall(**call) for call in calls)
    except TypeError as error:
        raise EnvironmentFault(
            f"info['tool_calls'] has {calls!r}, expected dicts of name, arguments and succeeded "
            f"({error}); mend the environment"
        ) from error
