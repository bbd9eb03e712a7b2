"""Two tiny models of one shape, and a small HTTP client, for the tests of the server."""

import base64
import functools
import http.client
import json
import pickle
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_spear.background import in_background
from megatron_spear.conversion.hf_io import HfReader

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 60,
}
_CONFIGS = {
    "qwen3": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    ),
}


@functools.cache
def saved(seed: int = 0, kind: str = "qwen3") -> tuple[Any, Path]:
    """A random model and its folder; log-probs of two seeds are far apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_CONFIGS[kind]()).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder = Path(tempfile.mkdtemp(prefix="serve-test-"))
    model.save_pretrained(folder)
    return model, folder


def weights(seed: int, kind: str = "qwen3") -> dict[str, torch.Tensor]:
    """The parameters of ``saved`` by Hugging Face name."""
    with HfReader(saved(seed, kind)[1]) as reader:
        return {name: reader.get(name).clone() for name in reader.names}


def call(url: str, path: str, body: Any = None, *, method: str = "POST") -> tuple[int, Any]:
    """(status, JSON or text) of a request; ``body`` bytes are sent as they are."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        raw = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        connection.request(method, path, body=None if method == "GET" else raw)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text


def done(url: str, path: str, body: Any = None) -> Any:
    """The answer of a request that has to succeed."""
    status, answer = call(url, path, body)
    assert status == 200, answer
    return answer


def get(url: str, path: str) -> tuple[int, Any]:
    return call(url, path, method="GET")


def later(function: Any, *args: Any) -> "Future[Any]":
    """A call in a thread."""
    return in_background(lambda: function(*args), "call")


def ask(tokens: Any, new: int = 6, **more: Any) -> dict[str, Any]:
    """A body for /generate with log-probs that ends at ``new`` tokens only."""
    sampling = {"max_new_tokens": new, "ignore_eos": True} | more.pop("sampling_params", {})
    return {
        "input_ids": tokens,
        "sampling_params": sampling,
        "return_logprob": True,
    } | more


def logprobs_of(answer: Any) -> np.ndarray:
    return np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])


def reference(model: Any, prompt: list[int], output: list[int], temperature: float = 1.0) -> Any:
    """Log-probs of the output's tokens by transformers' own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return logprobs.gather(1, torch.tensor(output)[:, None])[:, 0].numpy()


def error_of(answer: Any, seed: int, prompt: list[int], kind: str = "qwen3") -> float:
    """The largest distance of an answer's log-probs from those of a model."""
    expected = reference(saved(seed, kind)[0], prompt, answer["output_ids"])
    return float(np.abs(logprobs_of(answer) - expected).max())


def served_by(url: str, prompt: tuple[int, ...] = (5, 9, 2, 44, 17)) -> list[int]:
    """Which of the models 0, 1, 2 the server's log-probs are of."""
    answer = done(url, "/generate", ask(list(prompt), 8))
    return [seed for seed in (0, 1, 2) if error_of(answer, seed, list(prompt)) < 1e-4]


def payload(tensors: Any) -> str:
    """What update_weights_from_tensor takes."""
    return base64.b64encode(pickle.dumps(tensors, protocol=4)).decode()


def wait_until(condition: Any, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


PROMPT = [5, 9, 2, 44, 17]
KINDS = ["qwen3", "qwen3_moe"]


def flattened(tensors):
    """A bucket as SGLang's clients make it."""
    parts, records, at = [], [], 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8)
        record = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "numel": len(raw)}
        records.append(SimpleNamespace(**record, start_idx=at, end_idx=at + len(raw)))
        parts.append(raw)
        at += len(raw)
    return payload({"flattened_tensor": torch.cat(parts), "metadata": records})


def send(url, tensors, load_format=None, **more):
    """One part, by update_weights_from_tensor."""
    make = flattened if load_format == "flattened_bucket" else lambda t: payload(list(t.items()))
    body = {"serialized_named_tensors": [make(tensors)], "load_format": load_format} | more
    return call(url, "/update_weights_from_tensor", body)


def in_two(tensors):
    pairs = list(tensors.items())
    return dict(pairs[:7]), dict(pairs[7:])


def fused(tensors):
    """The same weights under SGLang's names."""
    made = dict(tensors)
    for i in range(2):
        prefix = f"model.layers.{i}."
        for name, parts in (
            ("self_attn.qkv_proj.weight", [f"self_attn.{x}_proj.weight" for x in "qkv"]),
            ("mlp.gate_up_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
        ):
            if prefix + parts[0] in made:
                made[prefix + name] = torch.cat([made.pop(prefix + part) for part in parts])
        experts = [f"{prefix}mlp.experts.{e}." for e in range(4)]
        if f"{experts[0]}up_proj.weight" in made:
            pairs = [
                torch.cat([made.pop(f"{e}gate_proj.weight"), made.pop(f"{e}up_proj.weight")])
                for e in experts
            ]
            made[f"{prefix}mlp.experts.w13_weight"] = torch.stack(pairs)
            downs = [made.pop(f"{e}down_proj.weight") for e in experts]
            made[f"{prefix}mlp.experts.w2_weight"] = torch.stack(downs)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in made:
            made[name] = torch.cat([made[name], torch.zeros(3, 32)])
    return made
