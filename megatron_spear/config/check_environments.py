"""Settings of single environments that cannot work together with the rest."""

from collections.abc import Iterator

from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.environments.math_code import (
    GRADER_CLOCK_FACTOR,
    SANDBOX_GRACE_S,
    SANDBOX_QUEUE_S,
    MathCodeSection,
)
from megatron_spear.config.schema import RunConfig


def program_deadlines(config: RunConfig) -> Iterator[str]:
    """One step of math with code waits for its programs, or for the grader: were its worker killed
    meanwhile, the worker's other attempts would have to run all their programs again."""
    env, deadline_s = config.env, config.rollout.env_deadline_s
    if not isinstance(env, MathCodeSection):
        return
    queue_s = SANDBOX_QUEUE_S if env.sandbox.backend == "sandbox_fusion" else 0.0
    queue = f", {queue_s:g} s of waiting for the server" if queue_s else ""
    calls, each_s = env.max_calls_per_turn, env.sandbox.timeout_s + queue_s + SANDBOX_GRACE_S
    for seconds, what in (
        (
            calls * each_s,
            f"{calls} call(s) of env.max_calls_per_turn, each of env.sandbox.timeout_s{queue} and "
            f"{SANDBOX_GRACE_S:g} s of grace",
        ),
        (env.grader_limit_s * GRADER_CLOCK_FACTOR, "env.grader_limit_s by the clock"),
    ):
        if seconds >= deadline_s:
            yield (
                f"rollout.env_deadline_s={deadline_s:g} is not above the {seconds:g} s of {what}: "
                "attempts would fail instead of being told; raise the first or lower the others"
            )


def alfworld_games(config: RunConfig) -> Iterator[str]:
    """Games that are trained on are on no panel."""
    env = config.env
    if not isinstance(env, AlfworldSection):
        return
    if env.games is not None and env.games.expanduser().is_file():
        yield (
            f"env.games={env.games} is one file, which has no splits: the panel would be games "
            f"that are trained on; give a folder with {env.train_split}.jsonl[.xz] and "
            f"{env.eval_split or 'valid_seen'}.jsonl[.xz] (sft and evaluate take a file)"
        )
    elif env.games is not None and env.eval_split is None:
        yield (
            f"env.eval_split=null takes all games of {env.games} for the panel, those that are "
            "trained on too; name a split (evaluate takes null)"
        )
