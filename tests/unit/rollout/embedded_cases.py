"""Small random models and short cuts for the tests of the embedded engine."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_spear.rollout.engine import Generation, GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "qwen3_moe, weights as they are": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24
    ),
    "llama3-rope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
}


def saved_model(kind: str = "qwen3", seed: int = 0, dtype: str = "float32") -> tuple[Any, Path]:
    """A random Hugging Face model, none of its parameters at its neutral value, and its folder."""
    return _saved_model(kind, seed, dtype)


@functools.cache
def _saved_model(kind: str, seed: int, dtype: str) -> tuple[Any, Path]:
    torch.manual_seed(seed)
    # A copy: saving a model writes its dtype into the config.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    folder = Path(tempfile.mkdtemp(prefix="embedded-test-"))
    model.save_pretrained(folder)
    return model, folder


def make_engine(kind: str = "qwen3", **settings: Any) -> EmbeddedEngine:
    """An engine of 4 slots, 96 tokens of context and a deadline of 20 s unless told otherwise."""
    settings = {"max_slots": 4, "max_context": 96, "deadline_s": 20.0} | settings
    return EmbeddedEngine.from_hf(saved_model(kind)[1], **settings)


def request(
    tokens: Any, session: str = "s", *, new: int = 5, stop: tuple[int, ...] = (), **rest: Any
) -> GenerationRequest:
    """A request with temperature 1 and seed (0,) unless told otherwise."""
    sampling = SamplingParams(
        temperature=rest.get("temperature", 1.0), max_new_tokens=new, stop_token_ids=stop
    )
    return GenerationRequest(
        session=session,
        token_ids=np.array(tokens, np.int32),
        sampling=sampling,
        seed=rest.get("seed", (0,)),
    )


def reference(model: Any, prompt: Any, answer: Generation, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of an answer's tokens from one forward of the Hugging Face model."""
    tokens = torch.tensor([[*map(int, prompt), *answer.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    return logprobs.gather(1, torch.from_numpy(answer.token_ids).long()[:, None])[:, 0].numpy()
