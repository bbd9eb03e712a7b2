"""One trajectory: reset, then prompt -> generate -> parse -> step until it ends."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_spear.config.environments.base import History, WindowHistory
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import EngineError, EnvironmentFault
from megatron_spear.heartbeats.heart import beat
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.conversation import Conversation, NextPrompt
from megatron_spear.rollout.drift import SeenTokens, TokenDrift
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
    history: History
    max_turns: int

    @property
    def max_context(self) -> int:
        """Most tokens in one context: the setting, or the engine's limit where that is lower."""
        return min(self.rollout.max_context, self.engine.max_context)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Which trajectory to play; ``seed`` keys its draws, ``env_seed`` is its group's. ``step``
    as in ``GenerationRequest``."""

    id: TrajectoryId
    prompt: Prompt
    seed: tuple[int, ...]
    env_seed: int
    temperature: float
    top_p: float = 1.0
    step: int = 0


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
        self._segments: list[list[Turn]] = []
        self._conversation = Conversation(
            stage.renderer, stage.view, attempt.prompt.messages, stage.history
        )
        self._seen = SeenTokens()
        self._session: str | None = None
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
        """Let the engine forget this attempt's context."""
        if self._session is not None:
            self._stage.engine.release(self._session)
            self._session = None

    async def _turn(self) -> Status | None:
        """One generation and the environment's reply; the status once the attempt is over."""
        stage, turn = self._stage, sum(map(len, self._segments))
        started = time.perf_counter()
        prompt = self._conversation.next_prompt(self._observation, self._info)
        room = stage.max_context - len(prompt.token_ids)
        if room < 1:
            return self._no_room(len(prompt.token_ids))
        generation = await self._generate(prompt, turn, min(room, stage.rollout.max_new_tokens))
        cut = generation.finish_reason == "context" or (
            generation.finish_reason == "length" and room < stage.rollout.max_new_tokens
        )
        text = stage.renderer.decode_action(generation.token_ids)
        said = stage.renderer.opening(prompt.token_ids) + text
        action, valid = stage.view.parse(said)
        self._conversation.answered(generation.token_ids, action)
        anchor, observation = str(self._info.get("anchor", "")), self._observation
        status: Status | None = Status.TRUNCATED_LENGTH
        if cut:
            valid = False
        else:
            status = await self._step(action, turn)
            valid = valid and bool(self._info.get("valid", True))
        beat()
        if prompt.begins_segment:
            self._segments.append([])
        self._segments[-1].append(
            Turn(
                observation_tokens=prompt.new_tokens,
                action_tokens=generation.token_ids,
                action_logprobs=generation.logprobs,
                finish_reason=generation.finish_reason,
                versions=generation.versions,
                time_s=time.perf_counter() - started,
                text=text,
                action_text=action,
                valid=valid,
                void=stage.view.void(said),
                tool_calls=() if cut else _tool_calls(self._info),
                anchor=anchor,
                observation=observation,
            )
        )
        return status

    async def _generate(self, prompt: NextPrompt, turn: int, max_new_tokens: int) -> Generation:
        stage, attempt = self._stage, self._attempt
        if prompt.begins_segment:
            self.release()
        if self._session is None:
            full = stage.history == "full"
            self._session = str(attempt.id) if full else f"{attempt.id}/{turn}"
        sampling = SamplingParams(
            temperature=attempt.temperature,
            top_p=attempt.top_p,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stage.renderer.stop_token_ids,
        )
        request = GenerationRequest(
            session=self._session,
            token_ids=prompt.token_ids,
            sampling=sampling,
            seed=(*attempt.seed, turn),
            step=attempt.step,
        )
        generation = await stage.engine.generate(request)
        if isinstance(stage.history, WindowHistory):
            self.release()
        self._seen.note(
            request.token_ids, generation.token_ids, begins_segment=prompt.begins_segment
        )
        if not 0 < len(generation.token_ids) == len(generation.logprobs):
            raise EngineError(
                f"a generation has {len(generation.token_ids)} tokens and "
                f"{len(generation.logprobs)} log-probs; expected equally many, at least one"
            )
        return generation

    async def _step(self, action: str, turn: int) -> Status | None:
        stage = self._stage
        result = await stage.pool.step(self._slot, action)
        self._observation, self._info = result.observation, result.info
        self._env_reward += float(result.reward)
        if result.terminated:
            return Status.COMPLETED
        if result.truncated or turn + 1 >= stage.max_turns:
            return Status.TRUNCATED_TURNS
        return None

    def _no_room(self, num_tokens: int) -> Status:
        if not self._segments:
            raise EngineError(
                f"the first prompt has {num_tokens} tokens, which leaves no room to answer in a "
                f"context of {self._stage.max_context}; raise rollout.max_context"
            )
        return Status.TRUNCATED_LENGTH

    def _trajectory(self, status: Status) -> Trajectory:
        segments = tuple(Segment(turns=tuple(turns)) for turns in self._segments)
        if drift := self._seen.drift(segments):
            raise TokenDrift(str(self._attempt.id), drift)
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
