"""What a trainer step computes, in tokens and FLOPs, pass by pass and origin by origin.

FLOPs of a forward pass, a multiplication and an addition being two (Kaplan et al. 2020, arXiv
2001.08361, Table 1; Narayanan et al. 2021, arXiv 2104.04473, Eq. 3, is the same but for causality,
the gated MLP and a second forward pass):

    2 * weights * tokens           the layers' matrices: attention projections and gated MLP, or
                                   router and the experts a token goes through
    2 * hidden * vocab * tokens    the output head
    2 * layers * width * sum(L^2)  scores and values, causal: half of 2 * 2 * width * L^2 a layer

where L are the lengths of the sequences and width = heads * head_dim. A backward pass is twice the
forward pass. Norms, softmax, embedding look-ups, the optimizer, padding and activations computed
again are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.types import Origin, TrainSample, TrajectoryGroup

Pass = Literal["rollout", "old_logprobs", "ref_logprobs", "current_logprobs", "train"]


def forward_flops(
    shape: ModelShape, lengths: Sequence[int], num_logits: int | None = None
) -> float:
    """FLOPs of one forward pass over sequences of these lengths.

    The output head is computed for ``num_logits`` tokens; None = all.

    Example: one layer, hidden 2, one head of 2, FFN 3, vocabulary 5 and one sequence of 4 tokens:
    2 * (16 + 18) * 4 + 2 * 2 * 5 * 4 + 2 * 1 * 2 * 16 = 416.
    """
    width = shape.num_heads * shape.head_dim
    projections = shape.hidden_size * (2 * width + 2 * shape.num_groups * shape.head_dim)
    mlp = 3 * shape.hidden_size * shape.ffn_size * max(shape.experts_per_token, 1)
    router = shape.hidden_size * shape.num_experts
    weights = shape.num_layers * (projections + mlp + router)
    tokens = sum(lengths)
    head = shape.hidden_size * shape.vocab_size * (tokens if num_logits is None else num_logits)
    squares = sum(length * length for length in lengths)
    return float(2 * weights * tokens + 2 * head + 2 * shape.num_layers * width * squares)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassWork:
    """One pass over sequences of one origin."""

    name: Pass
    origin: Origin
    tokens: int
    flops: float


def rollout_work(shape: ModelShape, groups: Sequence[TrajectoryGroup]) -> PassWork:
    """The rollout of these groups: each segment's tokens once, logits for the sampled ones.

    That is what an engine computes that keeps its cache over the turns of a segment and shares
    nothing between the members of a group; the embedded engine shares their prompt and computes
    less. Failed attempts are not counted.
    """
    members = [member for group in groups for member in group.members]
    lengths = [segment.num_tokens for member in members for segment in member.segments]
    sampled = sum(member.num_action_tokens for member in members)
    flops = forward_flops(shape, lengths, num_logits=sampled)
    return PassWork(name="rollout", origin=Origin.ON_POLICY, tokens=sum(lengths), flops=flops)


def policy_work(
    shape: ModelShape, name: Pass, samples: Sequence[TrainSample], origins: Sequence[Origin]
) -> list[PassWork]:
    """A pass of the policy, an entry an origin: for log-probs, or ``train`` with its backward."""
    passes, factor = [], 3 if name == "train" else 1
    for origin in Origin:
        pairs = zip(samples, origins, strict=True)
        lengths = [len(sample.token_ids) for sample, own in pairs if own is origin]
        flops = factor * forward_flops(shape, lengths)
        passes.append(PassWork(name=name, origin=origin, tokens=sum(lengths), flops=flops))
    return passes


def work_metrics(passes: Sequence[PassWork]) -> dict[str, float]:
    """``work/...`` of a step from all its passes.

    ``work/<pass>_tokens`` are all tokens of a pass, ``work/replay_tokens`` those of replayed rows
    that were trained. ``work/replay_flops`` is what replay adds: training and current log-probs of
    its rows. ``work/replay_train_fraction`` is its share of the training FLOPs;
    ``work/replay_step_fraction`` is ``replay_flops`` over all the step's other FLOPs (the paper's
    abstract says 0.10 to 0.25).
    """
    metrics = {
        f"work/{name}_tokens": float(sum(p.tokens for p in passes if p.name == name))
        for name in get_args(Pass)
    }
    replayed = [p for p in passes if p.origin is Origin.REPLAY]
    trained = [p for p in replayed if p.name == "train"]
    total, extra = sum(p.flops for p in passes), sum(p.flops for p in replayed)
    train = sum(p.flops for p in passes if p.name == "train")
    return metrics | {
        "work/replay_tokens": float(sum(p.tokens for p in trained)),
        "work/train_flops": train,
        "work/replay_flops": extra,
        "work/step_flops": total,
        "work/replay_train_fraction": sum(p.flops for p in trained) / max(train, 1.0),
        "work/replay_step_fraction": extra / max(total - extra, 1.0),
    }
