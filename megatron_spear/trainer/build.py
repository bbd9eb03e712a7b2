"""From a RunConfig to objects that take their own sections: the only place that sees all of it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.cluster.attempt import Attempt
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.end_tokens import end_token_ids
from megatron_spear.conversion.shape import load_config
from megatron_spear.curriculum.task_sampling import TaskSampler
from megatron_spear.data.buckets import BucketCursor
from megatron_spear.data.prompts import Cursor, PromptCursor, PromptSource
from megatron_spear.envs.family import Panel, family_of
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.replay.spread import divides_by_spread
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.engine import RolloutEngine
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.tracking.recorded_files import FOLDER
from megatron_spear.trainer import seeds
from megatron_spear.trainer.ahead import RolloutsAhead
from megatron_spear.trainer.controller import Controller
from megatron_spear.trainer.engines import MadeEngine, make_engine
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.hooks.curriculum import CurriculumHook
from megatron_spear.trainer.hooks.official_replay import OfficialReplayHook
from megatron_spear.trainer.hooks.recording import RecordingHook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.trainer.loop import SpearStep
from megatron_spear.trainer.registered import environment_workers
from megatron_spear.trainer.transports import make_transport


@dataclass(frozen=True, kw_only=True)
class RolloutStack:
    """What plays games: engine, environment processes and the rollouter over both."""

    loop: EventLoop
    made: MadeEngine
    pool: EnvironmentPool
    rollouter: Rollouter
    renderer: ChatRenderer

    @property
    def engine(self) -> RolloutEngine:
        """What generates."""
        return self.made.engine

    def close(self) -> None:
        """Give up what is under way, end the environment processes and free the engine."""
        try:
            self.loop.cancel_all()
            self.pool.close()
            self.loop.run(self.engine.close())
        finally:
            self.loop.close()


def use_threads(threads: int) -> int:
    """Set torch's threads: as given, or this machine's cores shared out among its ranks."""
    import torch

    if threads == 0:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    torch.set_num_threads(threads)
    return threads


def make_renderer(model: Path) -> ChatRenderer:
    """The chat renderer of a Hugging Face folder; answers stop at all end tokens it names."""
    from transformers import AutoTokenizer

    ends = end_token_ids(model, load_config(model))
    return ChatRenderer(AutoTokenizer.from_pretrained(model), ends)


def make_rollout(
    config: RunConfig,
    model: Path,
    list_urls: Callable[[], Sequence[str]] | None = None,
    attempt: Attempt | None = None,
) -> RolloutStack:
    """Engine, pool and rollouter over the weights of a Hugging Face folder.

    ``list_urls`` names the engine servers that there are when it is called. In an attempt of
    ``launch`` the environment workers are those of ``cluster.env_workers``, if there are any.
    """
    rollout, env = config.rollout, config.env
    family = family_of(env)
    loop = EventLoop("rollout", lambda: use_threads(config.run.threads))
    made = make_engine(rollout, config.weight_sync, model, loop, list_urls)
    num_remote = config.cluster.env_workers if attempt is not None else 0
    pool = EnvironmentPool(
        family.factory,
        options=family.factory_options,
        workers=num_remote or rollout.env_workers,
        deadline_s=rollout.env_deadline_s,
        remote=environment_workers(attempt) if attempt is not None and num_remote else None,
    )
    renderer = make_renderer(model)
    rollouter = Rollouter(
        made.engine,
        pool,
        renderer,
        family.view(),
        rollout,
        history=env.history,
        max_turns=env.max_turns,
        loop=loop,
    )
    return RolloutStack(loop=loop, made=made, pool=pool, rollouter=rollouter, renderer=renderer)


def make_panel(config: RunConfig) -> Panel:
    """The evaluation panel."""
    section = config.evaluation
    return family_of(config.env).panel(section.games, seeds.panel_games(section.seed))


def make_policy(config: RunConfig, model: Path, context: ParallelContext) -> MegatronPolicy:
    """The Megatron policy with the RL optimizer; collective."""
    total = config.run.steps * config.algorithm.mini_batches
    policy = MegatronPolicy.from_hf(model, config.policy, config.policy.optimizer, total, context)
    if config.algorithm.kl.coef:
        policy.keep_reference()
    return policy


def make_step(
    config: RunConfig,
    policy: MegatronPolicy,
    rollout: RolloutStack | None,
    model: Path,
    run_folder: Path,
    own_hooks: Mapping[str, Hook],
) -> SpearStep:
    """The trainer step; ``rollout`` is None on ranks other than the controller.

    ``own_hooks`` are the user's, by name.
    """
    controller = None
    if rollout is not None:
        cursor, measuring = make_cursor(config)
        ahead = None
        if config.rollout.max_lag:
            ahead = RolloutsAhead(rollout.rollouter, cursor, config.rollout, config.run.steps)
        controller = Controller(
            cursor=cursor,
            rollouter=rollout.rollouter,
            hooks=make_hooks(
                config, run_folder, {**measuring, **own_hooks}, TokenTexts(rollout.renderer.text_of)
            ),
            rollout=config.rollout,
            reward=config.reward,
            algorithm=config.algorithm,
            ahead=ahead,
        )
    return SpearStep(
        policy=policy,
        weight_sync=make_transport(
            config.rollout,
            config.weight_sync,
            policy,
            (rollout.loop, rollout.made) if rollout is not None else None,
            virtual_pipeline=config.policy.virtual_pipeline,
            model=model,
            folder=run_folder / "weights",
        ),
        controller=controller,
        loss=PolicyLoss.from_sections(
            config.algorithm, config.replay.loss, temperature=config.rollout.temperature
        ),
        algorithm=config.algorithm,
        replay=config.replay,
        tokens_per_microbatch=config.policy.tokens_per_microbatch,
        share_gpus=config.rollout.colocated,
        engine_memory=rollout.made.memory if rollout is not None else None,
    )


def make_hooks(
    config: RunConfig, run_folder: Path, own_hooks: Mapping[str, Hook], texts: TokenTexts
) -> HookCalls:
    """The run's hooks: the user's first, so that replay's baseline learns, and its store keeps, the
    rewards that are trained on; the recorder, which looks on, last. A dotted name is none that a
    user can give. ``texts`` are those of the policy's tokens."""
    hooks = dict(own_hooks)
    algorithm, group_size = config.algorithm, config.rollout.group_size
    replay = _replay_hook(config, run_folder / "replay")
    if isinstance(replay, OfficialReplayHook):
        hooks["built_in.official_replay"] = replay
    elif replay is not None:
        hooks["built_in.self_imitation"] = replay
    if config.tracking.recorded_groups:
        hooks["built_in.recording"] = RecordingHook(
            run_folder / FOLDER,
            config.tracking.recorded_groups,
            algorithm=algorithm,
            group_size=group_size,
            texts=texts,
            replay=replay,
        )
    return HookCalls(hooks)


def _replay_hook(config: RunConfig, folder: Path) -> OfficialReplayHook | SelfImitationHook | None:
    replay, algorithm = config.replay, config.algorithm
    if not replay.enabled:
        return None
    if algorithm.compat == "official":
        return OfficialReplayHook(replay, algorithm, config.rollout.group_size, folder)
    return SelfImitationHook(replay, folder, divide=divides_by_spread(algorithm))


def make_cursor(config: RunConfig) -> tuple[Cursor, dict[str, Hook]]:
    """What gives the training prompts, and by name the hook that measures for it, if there is one.

    Both share the sampler: the hook writes and saves it, the cursor reads it. The hook comes before
    the user's, which may leave groups out.
    """
    if not config.curriculum.tasks.enabled:
        return PromptCursor(training_prompts(config)), {}
    sources = training_buckets(config)
    sampler = TaskSampler(tuple(sources), config.curriculum.tasks)
    hook = CurriculumHook(sampler, lambda prompt: prompt.kind)
    cursor = BucketCursor(sources, sampler.pick, config.run.seed)
    return cursor, {"built_in.curriculum": hook}


def training_prompts(config: RunConfig) -> PromptSource:
    """The prompts to train on: made fresh, or the loaded ones epoch by epoch."""
    seed = config.run.seed
    return family_of(config.env).training(seed, seeds.training_games(seed))


def training_buckets(config: RunConfig) -> Mapping[str, PromptSource]:
    """The prompts to train on by kind, of those that have any."""
    seed = config.run.seed
    return family_of(config.env).training_by_kind(seed, seeds.training_games(seed))
