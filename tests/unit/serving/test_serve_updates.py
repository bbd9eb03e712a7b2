"""Weight updates through every way in, judged by log-probs, and what refuses them."""

import base64
import os
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from serve_cases import (
    KINDS,
    PROMPT,
    ask,
    call,
    done,
    error_of,
    fused,
    get,
    in_two,
    later,
    payload,
    saved,
    send,
    served_by,
    wait_until,
    weights,
)

from megatron_spear.testing.serve import serve_in_thread


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


def test_memory_shared_by_file_descriptor_is_refused(url):
    raw = bytes(ForkingPickler.dumps([("a", torch.ones(2))]))
    done(url, "/begin_weight_update")
    body = {"serialized_named_tensors": [base64.b64encode(raw).decode()]}
    status, answer = call(url, "/update_weights_from_tensor", body)
    assert status == 400 and "shared by name" in answer["message"]


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


def test_an_update_that_is_never_ended_is_waited_for_within_the_deadline():
    with serve_in_thread(saved(0)[1], deadline_s=3.0) as url:
        done(url, "/begin_weight_update")
        status, answer = call(url, "/generate", ask(PROMPT))
        assert status == 503 and "took more than 3.0 s" in answer["error"]["message"]
        assert "a weight update is open" in answer["error"]["message"]
        done(url, "/end_weight_update")
        assert served_by(url) == [0]
