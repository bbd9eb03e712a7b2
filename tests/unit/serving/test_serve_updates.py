"""Weight updates through every way in, judged by log-probs, and what refuses them."""

import base64
import json
import os
import threading
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from serve_cases import (
    ask,
    call,
    done,
    error_of,
    get,
    later,
    payload,
    saved,
    served_by,
    wait_until,
    weights,
)

from megatron_spear.conversion.fp8_blocks import CONFIG, SCALE, dequantize, quantize
from megatron_spear.errors import ConfigError
from megatron_spear.testing.serve import serve_in_thread

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load_format", [None, "flattened_bucket", "direct"])
def test_an_update_in_two_parts_is_what_is_drawn_from(load_format, kind):
    new = weights(1, kind)
    with serve_in_thread(saved(0, kind)[1]) as url:
        done(url, "/generate", ask(PROMPT))
        done(url, "/begin_weight_update", {"selector": "all"})
        for part in in_two(fused(new) if load_format == "direct" else new):
            status, answer = send(url, part, load_format, weight_version="run/1", flush_cache=True)
            assert status == 200 and answer["message"] == "Success Weight version updated to run/1."
        done(url, "/end_weight_update")
        answer = done(url, "/generate", ask(PROMPT))
        assert error_of(answer, 1, PROMPT, kind) < 1e-5
        assert answer["meta_info"]["cached_tokens"] == 0, "a context of the old weights was used"
        assert answer["meta_info"]["weight_version"] == "run/1"
        assert get(url, "/model_info")[1]["weight_version"] == "run/1"


def test_from_disk(url):
    body = {"model_path": str(saved(1)[1]), "weight_version": "disk"}
    answer = done(url, "/update_weights_from_disk", body)
    assert answer == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to disk.",
        "num_paused_requests": 0,
    }
    assert served_by(url) == [1]
    assert get(url, "/model_info")[1]["model_path"] == str(saved(1)[1])


def test_what_runs_comes_to_its_end_before_an_update_without_a_pause(url):
    running = later(done, url, "/generate", ask(PROMPT, 120))
    wait_until(lambda: get(url, "/server_info")[1]["internal_states"][0]["decode_steps"] > 3)
    updating = later(
        done,
        url,
        "/update_weights_from_disk",
        {"model_path": str(saved(1)[1]), "weight_version": "b"},
    )
    late = later(done, url, "/generate", ask(PROMPT, 120))
    answer = running.result(20)
    assert len(answer["output_ids"]) == 120 and error_of(answer, 0, PROMPT) < 1e-4
    updating.result(20)
    meta = late.result(20)["meta_info"]
    assert len(meta["weight_versions"]) == 1, "it began before the update and went on after it"


def test_what_does_not_end_in_time_is_not_updated_under():
    with serve_in_thread(saved(0)[1], update_deadline_s=0.05) as url:
        running = later(done, url, "/generate", ask(PROMPT, 240))
        wait_until(lambda: get(url, "/server_info")[1]["internal_states"][0]["decode_steps"] > 3)
        for path, body in (
            ("/begin_weight_update", {}),
            ("/update_weights_from_disk", {"model_path": str(saved(1)[1])}),
        ):
            status, answer = call(url, path, body)
            assert status == 400 and "pause_generation first" in answer["message"]
        assert error_of(running.result(30), 0, PROMPT) < 1e-4
        assert served_by(url) == [0]


def test_abort_all_requests_does_not_wait(url):
    running = later(done, url, "/generate", ask(PROMPT, 240))
    wait_until(lambda: get(url, "/server_info")[1]["internal_states"][0]["decode_steps"] > 3)
    body = {"model_path": str(saved(1)[1]), "abort_all_requests": True}
    done(url, "/update_weights_from_disk", body)
    assert running.result(20)["meta_info"]["finish_reason"]["type"] == "abort"
    assert served_by(url) == [1]


def test_requests_wait_while_a_session_is_open(url):
    first, second = in_two(weights(1))
    done(url, "/begin_weight_update")
    assert send(url, first)[0] == 200
    waiting = later(done, url, "/generate", ask(PROMPT))
    done(url, "/pause_generation", {"mode": "retract"})
    done(url, "/continue_generation")
    assert send(url, second)[0] == 200
    assert not waiting.done(), "it was drawn from mixed weights"
    done(url, "/end_weight_update")
    assert error_of(waiting.result(20), 1, PROMPT) < 1e-5


def test_a_pause_outlasts_a_session(url):
    done(url, "/pause_generation", {"mode": "retract"})
    done(url, "/begin_weight_update")
    assert send(url, weights(1))[0] == 200
    done(url, "/end_weight_update")
    waiting = later(done, url, "/generate", ask(PROMPT))
    done(url, "/flush_cache")
    assert not waiting.done()
    done(url, "/continue_generation")
    assert error_of(waiting.result(20), 1, PROMPT) < 1e-5


def test_a_session_that_waits_for_generations_takes_no_other_call(url):
    running = later(done, url, "/generate", ask(PROMPT, 240))
    wait_until(lambda: get(url, "/server_info")[1]["internal_states"][0]["decode_steps"] > 3)
    beginning = later(done, url, "/begin_weight_update")
    busy = "another call of this weight-update session is under way"
    wait_until(lambda: busy in send(url, {})[1]["message"])
    status, answer = call(url, "/end_weight_update")
    assert status == 400 and busy in answer["message"] and not beginning.done()
    assert len(running.result(20)["output_ids"]) == 240
    beginning.result(20)
    status, answer = call(url, "/release_memory_occupation")
    assert status == 400 and "a weight update is open" in str(answer)
    assert send(url, weights(1))[0] == 200
    done(url, "/end_weight_update")
    assert served_by(url) == [1]


def test_an_empty_session_changes_nothing(url):
    done(url, "/begin_weight_update")
    done(url, "/end_weight_update")
    assert served_by(url) == [0]


def test_sessions_are_begun_and_ended_once(url):
    between = "must run between begin_weight_update() and end_weight_update()"
    status, answer = send(url, weights(1))
    told = {"success": False, "message": f"update_weights_from_tensor {between}"}
    assert (status, answer) == (400, told)
    body = {"names": [], "dtypes": [], "shapes": []}
    status, answer = call(url, "/update_weights_from_distributed", body)
    assert status == 400 and answer["message"] == f"update_weights_from_distributed {between}"
    status, answer = call(url, "/end_weight_update")
    assert status == 400
    assert answer["message"] == (
        "no weight-update session is open; call begin_weight_update() first"
    )
    done(url, "/begin_weight_update")
    taken = "a weight-update session is already open; call end_weight_update() first"
    for path, body in (
        ("/begin_weight_update", {}),
        ("/update_weights_from_disk", {"model_path": str(saved(1)[1])}),
    ):
        status, answer = call(url, path, body)
        assert status == 400 and answer["message"] == taken
    done(url, "/end_weight_update")
    assert served_by(url) == [0]


def _broken(weights):
    def lacks(w):
        del w["model.norm.weight"]

    def unknown(w):
        w["model.norm.bias"] = torch.zeros(32)

    def shape(w):
        w["model.norm.weight"] = torch.zeros(31)

    return {"lacks": lacks, "unknown": unknown, "shape": shape}[weights]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lacks", "the weights lack 1 of 24 parameters: model.norm.weight"),
        ("unknown", "model.norm.bias, which this model does not have"),
        ("shape", "model.norm.weight of shape (31,); expected (32,)"),
    ],
)
@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_a_half_done_update_serves_nobody_until_a_whole_one(url, load_format, what, message):
    broken = weights(1)
    _broken(what)(broken)
    done(url, "/begin_weight_update")
    waiting = later(call, url, "/generate", ask(PROMPT))
    status, answer = send(url, broken, load_format, weight_version="bad")
    if what == "lacks":
        assert status == 200
    else:
        assert status == 400 and answer["message"].startswith("Failed to update parameter online:")
        assert message in answer["message"] and "discard the whole weights" in answer["message"]
        again, told = send(url, weights(1))
        assert again == 400 and "this weight-update session failed" in told["message"]
    status, answer = call(url, "/end_weight_update")
    assert status == 400 and message in answer["message"]
    assert waiting.result(20)[0] == 503
    status, answer = call(url, "/generate", ask(PROMPT))
    assert status == 503 and "was not completed" in answer["error"]["message"]
    assert get(url, "/health")[0] == get(url, "/ready")[0] == 503
    assert get(url, "/model_info")[1]["weight_version"] == "default"
    done(url, "/begin_weight_update")
    assert send(url, weights(2), weight_version="good")[0] == 200
    done(url, "/end_weight_update")
    assert served_by(url) == [2]
    assert get(url, "/model_info")[1]["weight_version"] == "good"


def test_two_versions_in_one_session_are_refused(url):
    first, second = in_two(weights(1))
    done(url, "/begin_weight_update")
    assert send(url, first, weight_version="a")[0] == 200
    status, answer = send(url, second, weight_version="b")
    assert status == 400 and "one session is one version" in answer["message"]
    assert send(url, second)[0] == 200
    done(url, "/end_weight_update")
    assert get(url, "/model_info")[1]["weight_version"] == "a"


def test_a_folder_that_does_not_fit_changes_nothing(url, tmp_path):
    status, answer = call(url, "/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert status == 400 and answer["message"].startswith("Failed to get weights iterator: ")
    assert answer["num_paused_requests"] == 0
    other = str(saved(0, "qwen3_moe")[1])
    status, answer = call(url, "/update_weights_from_disk", {"model_path": other})
    assert status == 400 and "lack" in answer["message"]
    assert served_by(url) == [0]


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda: "no base64!", "not base64"),
        (lambda: payload([1, 2]), "no list of (name, tensor)"),
        (lambda: payload(_Evil()), "Blocked unsafe global (posix.mkdir)"),
        (lambda: payload([("a", torch.ones(2))])[:-20], "no pickle that can be read"),
        (lambda: 7, "not base64"),
    ],
)
def test_bad_payloads_change_nothing(url, body, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(url, "/begin_weight_update")
    status, answer = call(
        url, "/update_weights_from_tensor", {"serialized_named_tensors": [body()]}
    )
    assert status == 400 and message in answer["message"]
    assert not list(tmp_path.iterdir())
    assert call(url, "/end_weight_update")[0] == 400
    assert served_by(url) == [0], "nothing was written, so the old weights still serve"


def test_shared_memory_is_refused_by_name(url):
    raw = bytes(ForkingPickler.dumps([("a", torch.ones(2))]))
    done(url, "/begin_weight_update")
    body = {"serialized_named_tensors": [base64.b64encode(raw).decode()]}
    status, answer = call(url, "/update_weights_from_tensor", body)
    assert status == 400 and "(ForkingPickler)" in answer["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/update_weights_from_tensor", {"serialized_named_tensors": []}, "has 0 entries"),
        ("/update_weights_from_tensor", {}, "serialized_named_tensors is missing"),
        (
            "/update_weights_from_tensor",
            {"serialized_named_tensors": ["AAAA"], "load_format": "a.b"},
            "Unknown load_format=a.b",
        ),
        ("/update_weights_from_tensor", {"weights": 1}, "unknown field weights"),
        ("/begin_weight_update", {"selector": "draft"}, "selector 'draft'"),
        (
            "/update_weights_from_distributed",
            {"names": ["a"], "dtypes": ["float32"], "shapes": [[2]], "group_name": "nogroup"},
            "Failed to receive weights: Group nogroup not in []. "
            "Please call `init_weights_update_group` first.",
        ),
        (
            "/update_weights_from_distributed",
            {"names": ["a"], "dtypes": ["float33"], "shapes": [[2]]},
            "dtype 'float33'",
        ),
        (
            "/update_weights_from_distributed",
            {"names": ["a"], "dtypes": ["float32"], "shapes": [[1 << 40]]},
            "values in one bucket",
        ),
        ("/destroy_weights_update_group", {}, "The group to be destroyed does not exist."),
        ("/weights_checker", {"action": "reset"}, "action 'reset'"),
        ("/update_weights_from_disk", {"model_path": "a", "keep_pause": True}, "keep_pause"),
    ],
)
def test_mistakes_around_updates_are_400(url, path, body, message):
    if path != "/begin_weight_update" and path != "/update_weights_from_disk":
        done(url, "/begin_weight_update")
    status, answer = call(url, path, body)
    assert status == 400 and message in answer["message"]


def test_checksums_are_of_sglangs_parameters_and_follow_the_weights(url):
    status, answer = get(url, "/weights_checker")
    assert status == 200 and answer["success"]
    (rank,) = answer["ranks"]
    assert set(rank["checksums"]) == set(fused(weights(0)))
    assert rank["parallelism_info"][0]["tp_size"] == 1
    done(url, "/update_weights_from_disk", {"model_path": str(saved(1)[1])})
    other = done(url, "/weights_checker", {"action": "checksum"})["ranks"][0]
    changed = {n for n, each in rank["checksums"].items() if other["checksums"][n] != each}
    assert changed == set(rank["checksums"])
    assert other["per_gpu_checksum"] != rank["per_gpu_checksum"]


def load_by_hand(model, named_tensors):
    """A custom loader: writes to SGLang's parameters; raises for a name it does not know."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in named_tensors:
            parameters[name].copy_(tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_loader_writes_to_sglangs_parameters(kind):
    name = f"{load_by_hand.__module__}.load_by_hand"
    with serve_in_thread(saved(0, kind)[1], custom_weight_loaders=(name,)) as url:
        done(url, "/begin_weight_update")
        status, _ = send(url, fused(weights(1, kind)), name, weight_version="mine")
        assert status == 200
        done(url, "/end_weight_update")
        answer = done(url, "/generate", ask(PROMPT))
        assert error_of(answer, 1, PROMPT, kind) < 1e-5
        assert answer["meta_info"]["weight_version"] == "mine"
        done(url, "/begin_weight_update")
        status, answer = send(url, {"nobody": torch.ones(1)}, name)
        assert status == 400 and "KeyError: 'nobody'" in answer["message"]
        assert call(url, "/end_weight_update")[0] == 400
        assert call(url, "/generate", ask(PROMPT))[0] == 503


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


def test_an_update_that_is_never_ended_is_waited_for_within_the_deadline():
    with serve_in_thread(saved(0)[1], deadline_s=0.5) as url:
        done(url, "/begin_weight_update")
        status, answer = call(url, "/generate", ask(PROMPT))
        assert status == 503 and "took more than 0.5 s" in answer["error"]["message"]
        assert "a weight update is open" in answer["error"]["message"]
        done(url, "/end_weight_update")
        assert served_by(url) == [0]


def _slow_loader(model, named_tensors):
    _RELEASED.wait(20)


_RELEASED = threading.Event()


def test_a_loader_that_does_not_end_is_told_and_waited_for(monkeypatch):
    monkeypatch.setattr("megatron_spear.serving.updates._GRACE_S", 0.0)
    name = f"{_slow_loader.__module__}._slow_loader"
    settings = {"custom_weight_loaders": (name,), "update_deadline_s": 0.3}
    with serve_in_thread(saved(0)[1], **settings) as url:
        done(url, "/begin_weight_update")
        status, answer = send(url, {"a": torch.ones(1)}, name)
        assert status == 400 and "not received within 0.3 s" in answer["message"]
        status, answer = call(url, "/end_weight_update")
        assert status == 400 and "wait for its answer" in answer["message"]
        _RELEASED.set()
        wait_until(lambda: "given up" in call(url, "/end_weight_update")[1]["message"])
        assert call(url, "/generate", ask(PROMPT))[0] == 503
        done(url, "/update_weights_from_disk", {"model_path": str(saved(1)[1])})
        assert served_by(url) == [1]
