"""Training tokens per second: the Megatron step against a plain torch loop over the same model.

Both train the same tokens with the same loss and AdamW settings in the same process, in interleaved
rounds, so that a busy machine slows both alike. The plain loop is what one would write by hand:
transformers' model, rows sorted by length, padded batches, cross-entropy, torch AdamW.

    python tools/benchmarks/train_throughput.py --threads 2 --rounds 5
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_spear.algorithms.policy_loss import NllLoss
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.types import Origin, Reward, TrainSample, TrajectoryId


def make_model(path: Path, args: argparse.Namespace) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=args.hidden // 4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(path)


def make_samples(args: argparse.Namespace) -> list[TrainSample]:
    draw = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(draw.integers(50, 300, args.sequences)):
        zeros = np.zeros(length, np.float32)
        samples.append(
            TrainSample(
                trajectory_id=TrajectoryId(group=str(number), member=0),
                segment=0,
                num_segments=1,
                prompt_id=str(number),
                token_ids=draw.integers(0, args.vocab, length).astype(np.int32),
                response_mask=np.ones(length, bool),
                rollout_logprobs=zeros,
                old_logprobs=zeros,
                advantages=zeros,
                reward=Reward(outcome=0.0),
                turn_starts=np.zeros(1, np.int32),
                anchors=(),
                policy_version=0,
            )
        )
    return samples


def plain_loop(path: Path, samples: list[TrainSample], limit: int) -> Callable[[], float]:
    """A closure that takes one optimizer step and gives the loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01
    )
    rows = sorted((s.token_ids for s in samples), key=len, reverse=True)
    batches: list[list[np.ndarray]] = [[]]
    for row in rows:
        if batches[-1] and len(batches[-1][0]) * (len(batches[-1]) + 1) > limit:
            batches.append([])
        batches[-1].append(row)
    weight = 1.0 / sum(len(row) - 1 for row in rows)
    padded = []
    for batch in batches:
        longest = len(batch[0])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full((len(batch), longest), -100)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            labels[i, : len(row) - 1] = ids[i, 1 : len(row)]
            mask[i, : len(row)] = 1
        padded.append((ids, labels, mask))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for ids, labels, mask in padded:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def megatron_loop(path: Path, samples: list[TrainSample], limit: int) -> Callable[[], float]:
    """The same through ``MegatronPolicy``; packing is part of the step."""
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    section = PolicySection(tokens_per_microbatch=limit)
    ctx = parallel.initialize(section, seed=0)
    policy = MegatronPolicy.from_hf(path, section, OptimizerSection(), 1000, ctx)
    total = sum(len(s.token_ids) - 1 for s in samples)
    weights = [np.full(len(s.token_ids), 1.0 / total, np.float32) for s in samples]
    for weight in weights:
        weight[0] = 0.0
    origins = [Origin.ON_POLICY] * len(samples)

    def step() -> float:
        packed = pack(samples, weights, origins, tokens_per_microbatch=limit)
        return policy.train_step(packed, NllLoss())["loss/total"]

    return step


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a round and loop")
    parser.add_argument("--sequences", type=int, default=80)
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_model(path, args)
        samples = make_samples(args)
        tokens = sum(len(s.token_ids) for s in samples)
        loops = {
            "plain torch": plain_loop(path, samples, args.tokens_per_microbatch),
            "megatron": megatron_loop(path, samples, args.tokens_per_microbatch),
        }
        rates: dict[str, list[float]] = {name: [] for name in loops}
        losses: dict[str, list[float]] = {name: [] for name in loops}
        peaks: dict[str, float] = {}
        for name, step in loops.items():  # warm-up, and the peak as each is run first
            losses[name].append(step())
            peaks[name] = peak_gib()
        for _ in range(args.rounds):
            for name, step in loops.items():
                start = time.perf_counter()
                losses[name] += [step() for _ in range(args.steps)]
                rates[name].append(args.steps * tokens / (time.perf_counter() - start))

    print(f"{tokens} tokens in {len(samples)} sequences a step, {args.threads} threads")
    print(f"{'loop':14}{'tok/s median':>14}{'best':>10}{'process peak GiB':>18}{'last loss':>12}")
    for name in loops:
        median, best = statistics.median(rates[name]), max(rates[name])
        print(f"{name:14}{median:14.0f}{best:10.0f}{peaks[name]:18.2f}{losses[name][-1]:12.4f}")
    ratios = [m / p for m, p in zip(rates["megatron"], rates["plain torch"], strict=True)]
    print(
        f"megatron / plain torch: {statistics.median(ratios):.2f}x (median of {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
