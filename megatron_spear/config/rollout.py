"""Settings of the rollout stage: engine, sizes, how far it runs ahead."""

from typing import Literal

from megatron_spear.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class RolloutSection(Section):
    """How trajectories are made."""

    engine: Literal["embedded"] = "embedded"
    """The rollout engine."""
    prompts_per_step: PositiveInt = 8
    """Prompts (games) a trainer step."""
    group_size: PositiveInt = 8
    """Attempts a prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the policy's log-probs use the same."""
    max_new_tokens: PositiveInt = 10
    """Most tokens in one turn's answer."""
    max_context: PositiveInt = 512
    """Most tokens in one context, prompt and answers."""
    max_slots: PositiveInt = 64
    """Contexts the engine holds at once; further ones wait."""
    max_lag: NonNegativeInt = 0
    """Policy versions that rollouts may be ahead of training by: the trajectories of step s are
    begun once version s - 1 - max_lag is there. 0 = rollout and training take turns."""
    pause_mode: Literal["retract", "abort"] = "retract"
    """What becomes of generations under way when new weights come (with max_lag > 0): ``retract``
    keeps their tokens, each with its version, and goes on with the new weights; ``abort`` draws the
    turn again."""
    env_workers: PositiveInt = 1
    """Environment worker processes."""
    env_deadline_s: PositiveFloat = 30.0
    """Deadline of one environment call."""
    engine_deadline_s: PositiveFloat = 300.0
    """Deadline of one generation."""
