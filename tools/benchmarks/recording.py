"""What recording a step's trajectories costs, with made-up ones of a large run.

    python tools/benchmarks/recording.py --recorded 8

Seconds of CPU time between a step's end and the next one's start, and bytes on disk. Numbers and
words are drawn, so the files are larger than those of a real run, which repeat themselves.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_spear.config.method import AlgorithmSection
from megatron_spear.conversion.word_tokenizer import make_tokenizer
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.trainer.hooks.recording import RecordingHook
from megatron_spear.types import (
    Coefficients,
    Prompt,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    Segment,
    Status,
    StepContext,
    StepReport,
    TrainSample,
    Trajectory,
    TrajectoryGroup,
    TrajectoryId,
    Turn,
    VersionSpan,
)

_WORDS = 4000
_OBSERVATION = 100


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="sampled tokens a trajectory")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--recorded", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    options = parser.parse_args()
    words = ["".join(chr(97 + (i // 26**k) % 26) for k in range(3)) for i in range(_WORDS)]
    renderer = ChatRenderer(make_tokenizer(words))
    draw = np.random.default_rng(0)
    groups = [_group(draw, f"0.1/{i}", options) for i in range(options.groups)]
    samples = [_sample(m) for group in groups for m in group.members]
    print(
        f"{options.groups} x {options.group_size} trajectories of {options.tokens} sampled tokens"
    )
    print("recorded groups   CPU seconds   MB on disk")
    for recorded in options.recorded:
        texts = TokenTexts(renderer.text_of)
        with tempfile.TemporaryDirectory() as folder:
            hook = RecordingHook(
                Path(folder),
                recorded,
                algorithm=AlgorithmSection(),
                group_size=options.group_size,
                texts=texts,
            )
            seconds = _step(hook, groups, samples)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"{recorded:15d}   {seconds:11.2f}   {size / 1e6:10.2f}")


def _step(hook: RecordingHook, groups: list[TrajectoryGroup], samples: list[TrainSample]) -> float:
    ctx = StepContext(
        step=1,
        policy_version=0,
        coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
        seed=0,
    )
    scored = tuple(
        ScoredGroup(
            group_id=group.group_id,
            prompt=group.prompt,
            members=tuple(
                ScoredTrajectory(trajectory=member, reward=Reward(outcome=float(member.won)))
                for member in group.members
            ),
        )
        for group in groups
    )
    started = time.process_time()
    hook.on_played(ctx, tuple(groups))
    hook.on_scored(ctx, scored)
    hook.on_samples(ctx, samples)
    hook.on_step_end(ctx, StepReport(step=1, policy_version=1, metrics={}))
    return time.process_time() - started


def _group(draw: np.random.Generator, name: str, options: argparse.Namespace) -> TrajectoryGroup:
    prompt = Prompt(prompt_id=name, env="made up")
    members = []
    for member in range(options.group_size):
        turns = tuple(_turn(draw, options.tokens // options.turns) for _ in range(options.turns))
        members.append(
            Trajectory(
                id=TrajectoryId(group=name, member=member),
                prompt=prompt,
                segments=(Segment(turns=turns),),
                status=Status.COMPLETED,
                won=bool(member % 2),
            )
        )
    return TrajectoryGroup(group_id=name, prompt=prompt, members=tuple(members))


def _turn(draw: np.random.Generator, num_tokens: int) -> Turn:
    return Turn(
        observation_tokens=draw.integers(100, _WORDS, _OBSERVATION).astype(np.int32),
        action_tokens=draw.integers(100, _WORDS, num_tokens).astype(np.int32),
        action_logprobs=-draw.exponential(0.5, num_tokens).astype(np.float32),
        finish_reason="stop",
        versions=(VersionSpan(0, num_tokens),),
        text="made up",
        observation="what the environment says, some 400 letters of it" * 8,
    )


def _sample(trajectory: Trajectory) -> TrainSample:
    (segment,) = trajectory.segments
    mask = segment.response_mask
    return TrainSample(
        trajectory_id=trajectory.id,
        segment=0,
        num_segments=1,
        prompt_id=trajectory.prompt.prompt_id,
        token_ids=segment.token_ids,
        response_mask=mask,
        rollout_logprobs=segment.rollout_logprobs,
        old_logprobs=segment.rollout_logprobs + np.float32(0.001),
        advantages=np.where(mask, 0.5 if trajectory.won else -0.5, 0.0).astype(np.float32),
        reward=Reward(outcome=float(trajectory.won)),
        turn_starts=segment.turn_starts,
        anchors=("",) * len(segment.turns),
        policy_version=0,
    )


if __name__ == "__main__":
    main()
