"""Weight updates in FP8 blocks, and folders that are stored so."""

import json

import pytest
from safetensors.torch import save_file
from serve_cases import (
    PROMPT,
    ask,
    call,
    done,
    error_of,
    fused,
    get,
    in_two,
    saved,
    send,
    weights,
)

from megatron_spear.conversion.fp8_blocks import CONFIG, SCALE, dequantize, quantize
from megatron_spear.errors import ConfigError
from megatron_spear.testing.serve import serve_in_thread


def in_fp8(tensors):
    """e4m3 and scales for the linear layers, as published; and what they stand for."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        meant[name] = stored[name] = tensor
        if "proj" in name and name.endswith("weight"):
            stored[name], stored[name + SCALE] = quantize(tensor)
            meant[name] = dequantize(stored[name], stored[name + SCALE])
    return stored, meant


@pytest.mark.parametrize("order", [1, -1])
def test_a_quantised_server_takes_fp8_and_nothing_else(order):
    stored, meant = in_fp8(weights(1))
    with serve_in_thread(saved(0)[1], quantization="fp8") as url:
        status, answer = call(url, "/begin_weight_update")
        pairs = dict(list(stored.items())[::order])
        for part in in_two(pairs):
            status, answer = send(url, part, "flattened_bucket")
            assert status == 200, answer
        done(url, "/end_weight_update")
        served = done(url, "/generate", ask(PROMPT, 8))
        with serve_in_thread(saved(0)[1]) as plain:
            done(plain, "/begin_weight_update")
            assert send(plain, meant)[0] == 200
            done(plain, "/end_weight_update")
            body = ask([*PROMPT, *served["output_ids"]], 0, logprob_start_len=0)
            scored = done(plain, "/generate", body)["meta_info"]["input_token_logprobs"]
        expected = [entry[0] for entry in scored[len(PROMPT) :]]
        got = [entry[0] for entry in served["meta_info"]["output_token_logprobs"]]
        assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-5
        assert error_of(served, 1, PROMPT) > 1e-3, "the rounding of FP8 cannot be seen"
        for spoilt, message in (
            (weights(1), "this server is quantised (fp8)"),
            ({k: v for k, v in stored.items() if not k.endswith(SCALE)}, "without the other half"),
        ):
            done(url, "/begin_weight_update")
            status, answer = send(url, spoilt, "flattened_bucket")
            ended = call(url, "/end_weight_update")
            assert ended[0] == 400 and message in ended[1]["message"]


def _fp8_folder(path, seed):
    """A folder as ``convert megatron-to-hf --dtype fp8-block`` writes it."""
    path.mkdir()
    config = json.loads((saved(seed)[1] / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    save_file(in_fp8(weights(seed))[0], path / "model.safetensors")
    return path


def test_a_folder_in_fp8_is_served_and_loaded_as_such(tmp_path):
    first, second = (_fp8_folder(tmp_path / str(seed), seed) for seed in (0, 1))
    with serve_in_thread(first) as url:
        assert get(url, "/server_info")[1]["quantization"] == "fp8"
        assert 1e-3 < error_of(done(url, "/generate", ask(PROMPT)), 0, PROMPT) < 0.5
        before = done(url, "/weights_checker")["ranks"][0]["checksums"]
        assert set(before) == set(fused(weights(0))), "scales are no parameters of their own"
        done(url, "/update_weights_from_disk", {"model_path": str(second)})
        assert 1e-3 < error_of(done(url, "/generate", ask(PROMPT)), 1, PROMPT) < 0.5
        status, answer = call(url, "/update_weights_from_disk", {"model_path": str(saved(2)[1])})
        assert status == 400 and "has no weights in FP8" in answer["message"]
        assert 1e-3 < error_of(done(url, "/generate", ask(PROMPT)), 1, PROMPT) < 0.5
    with serve_in_thread(saved(0)[1], quantization="fp8") as url:
        assert done(url, "/weights_checker")["ranks"][0]["checksums"] == before
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (first / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="weight_block_size"), serve_in_thread(first):
        pass
