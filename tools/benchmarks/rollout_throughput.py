"""Sampled tokens a second: the embedded engine against transformers' ``generate`` with scores.

Both draw the same number of tokens with a log-prob for each, from the same random weights (Qwen3,
about 5 million parameters, fp32), in interleaved rounds of one process. No stop token, so lengths
are forced. ``generate`` keeps no cache between turns.

    python tools/benchmarks/rollout_throughput.py --threads 1 --rounds 3
"""

import argparse
import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging as transformers_logging

from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine


@dataclass(frozen=True, kw_only=True)
class Workload:
    """``batch`` conversations of ``turns`` turns: a prompt, answers, observations between them."""

    name: str
    batch: int
    turns: int
    prompt: int
    answer: int
    observation: int

    @property
    def sampled(self) -> int:
        """Tokens drawn in one round."""
        return self.batch * self.turns * self.answer

    def prompts(self, vocab: int, seed: int, group: int) -> np.ndarray:
        """int64 ``[batch, prompt]``; every ``group`` neighbours are equal."""
        rng = np.random.default_rng(seed)
        return np.repeat(rng.integers(0, vocab, (self.batch // group, self.prompt)), group, 0)

    def observations(self, vocab: int, seed: int) -> np.ndarray:
        """int64 ``[turns, batch, observation]``."""
        rng = np.random.default_rng(seed + 1)
        return rng.integers(0, vocab, (self.turns, self.batch, self.observation))


def save_model(folder: str, args: argparse.Namespace) -> None:
    """Write a random model; prints its size."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, fp32")


def run_generate(model: Any, work: Workload, vocab: int, group: int, seed: int) -> None:
    """One round with ``generate``; log-probs from the scores, the whole context anew each turn."""
    torch.manual_seed(seed)
    context = torch.from_numpy(work.prompts(vocab, seed, group))
    observations = torch.from_numpy(work.observations(vocab, seed))
    for turn in range(work.turns):
        output = model.generate(  # without gradients of its own accord
            context,
            attention_mask=torch.ones_like(context),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=work.answer,
            return_dict_in_generate=True,
            output_scores=True,
        )
        drawn = output.sequences[:, context.shape[1] :]
        assert drawn.shape == (work.batch, work.answer)
        logprobs = torch.log_softmax(torch.stack(output.scores, 1), -1)
        assert torch.isfinite(logprobs.gather(2, drawn[..., None])).all()
        context = torch.cat((output.sequences, observations[turn]), 1)


def run_embedded(engine: EmbeddedEngine, work: Workload, vocab: int, group: int, seed: int) -> None:
    """One round with the embedded engine: each conversation is a coroutine with its session."""
    prompts, observations = work.prompts(vocab, seed, group), work.observations(vocab, seed)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=work.answer)

    async def converse(row: int) -> None:
        session, context = f"{seed}/{row}", prompts[row].astype(np.int32)
        for turn in range(work.turns):
            request = GenerationRequest(
                session=session, token_ids=context, sampling=sampling, seed=(seed, row, turn)
            )
            answer = await engine.generate(request)
            assert len(answer.token_ids) == work.answer
            context = np.concatenate((context, answer.token_ids, observations[turn, row]))
        engine.release(session)

    async def all_rows() -> None:
        await asyncio.gather(*(converse(row) for row in range(work.batch)))

    asyncio.run(all_rows())


def measure(
    work: Workload, ways: dict[str, Callable[[int], None]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(tokens a second, tokens a CPU second) of every way, in interleaved rounds after a warm-up.

    On a machine shared with others the second figure says more.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way(1000 * round_)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if round_:
                rates[name].append((work.sampled / wall, work.sampled / cpu))
    return rates


def table_row(work: Workload, rates: dict[str, list[tuple[float, float]]]) -> str:
    """Medians over the rounds; ratios are medians and ranges of the rounds' ratios."""
    cells = [work.name]
    for name in ("generate", "embedded"):
        cells.append(f"{statistics.median(wall for wall, _ in rates[name]):.0f}")
    for clock in (0, 1):
        pairs = zip(rates["embedded"], rates["generate"], strict=True)
        ratios = sorted(new[clock] / old[clock] for new, old in pairs)
        cells.append(f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse arguments, measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("hidden", 256), ("ffn", 768), ("layers", 6), ("heads", 4), ("kv-heads", 2),
        ("vocab", 512), ("batch", 32), ("rounds", 3), ("threads", 1), ("group", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    works = (
        Workload(
            name="single turn", batch=args.batch, turns=1, prompt=64, answer=64, observation=0
        ),
        Workload(name="8 turns", batch=args.batch, turns=8, prompt=64, answer=8, observation=16),
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        engine = EmbeddedEngine.from_hf(
            folder, max_slots=args.batch, max_context=512, deadline_s=600.0
        )
    print(f"batch {args.batch}, group {args.group}, {args.threads} thread(s), {args.rounds} rounds")
    print("| workload | generate tok/s | embedded tok/s | ratio | ratio by CPU time |")
    print("|---|---|---|---|---|")
    for work in works:
        rates = measure(
            work,
            {
                "generate": partial(run_generate, model, work, args.vocab, args.group),
                "embedded": partial(run_embedded, engine, work, args.vocab, args.group),
            },
            args.rounds,
        )
        print(table_row(work, rates), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process (both ways, imports included): {peak:.0f} MiB")
    print(f"engine: {engine.stats}")


if __name__ == "__main__":
    main()
