"""A tiny random model folder and random samples, for tests of the policy and of conversions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spear.types import Origin, Reward, TrainSample, TrajectoryId

VOCAB = 211
"""Not divisible by 2, so that tensor parallelism has to pad."""


def tiny_hf_folder(path: Path, architecture: str = "Qwen3", **changes: Any) -> Any:
    """Save a random float32 model of transformers' ``<architecture>ForCausalLM``; returns it.

    Two layers per default, 4 heads in 2 groups, and of ``Qwen3Moe`` 8 experts, 2 a token; norms and
    biases are random too, so that an exchanged or forgotten tensor shows.
    """
    import transformers

    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    }
    if architecture == "Qwen2":
        values.pop("head_dim")
    if architecture == "Qwen3Moe":
        values |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        values |= {"norm_topk_prob": True}
    config = getattr(transformers, f"{architecture}Config")(**values | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return model


def random_samples(
    count: int = 12, *, shortest: int = 5, longest: int = 60, vocab: int = VOCAB, seed: int = 0
) -> tuple[list[TrainSample], list[np.ndarray], list[Origin]]:
    """What ``pack`` takes: samples, token weights (sum about 1) and origins."""
    draw = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(draw.integers(shortest, longest + 1, count)):
        samples.append(
            TrainSample(
                trajectory_id=TrajectoryId(group=str(number), member=0),
                segment=0,
                num_segments=1,
                prompt_id=str(number),
                token_ids=draw.integers(0, vocab, length).astype(np.int32),
                response_mask=np.ones(length, bool),
                rollout_logprobs=np.zeros(length, np.float32),
                old_logprobs=draw.normal(-5.0, 0.2, length).astype(np.float32),
                advantages=draw.normal(size=length).astype(np.float32),
                reward=Reward(outcome=1.0),
                turn_starts=np.zeros(1, np.int32),
                anchors=(),
                policy_version=0,
            )
        )
    total = sum(len(sample.token_ids) for sample in samples)
    weights = [2 * draw.random(len(s.token_ids)).astype(np.float32) / total for s in samples]
    for weight in weights:
        weight[0] = 0.0
    origins = [Origin.REPLAY if number % 3 == 0 else Origin.ON_POLICY for number in range(count)]
    return samples, weights, origins


def hf_logprobs(model: Any, token_ids: np.ndarray, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs ``[L]`` of one sequence by transformers' own forward, with a gradient."""
    ids = torch.from_numpy(token_ids.astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, :-1].float() / temperature
    picked = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return torch.cat((picked.new_zeros(1), picked))
