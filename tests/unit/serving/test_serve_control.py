"""Pausing, aborting, health and what the server says of itself."""

import numpy as np
import pytest
from serve_cases import (
    ask,
    call,
    done,
    error_of,
    get,
    later,
    logprobs_of,
    reference,
    saved,
    served_by,
    wait_until,
)

PROMPT = [5, 9, 2, 44, 17]


def _steps(url):
    return get(url, "/server_info")[1]["internal_states"][0]["decode_steps"]


def _started(url, new=240, **more):
    """A long generation under way."""
    before = _steps(url)
    running = later(done, url, "/generate", ask(PROMPT, new, **more))
    wait_until(lambda: _steps(url) > before + 3)
    return running


def test_retract_keeps_the_tokens_and_goes_on_with_the_new_weights(url):
    running = _started(url)
    assert done(url, "/pause_generation", {"mode": "retract"})["status"] == "ok"
    steps = _steps(url)
    late = later(done, url, "/generate", ask(PROMPT, 5))
    done(url, "/flush_cache")
    body = {"model_path": str(saved(1)[1]), "weight_version": "v1"}
    done(url, "/update_weights_from_disk", body)
    assert not running.done() and not late.done() and _steps(url) == steps
    done(url, "/continue_generation")
    answer = running.result(20)
    old, new = answer["meta_info"]["weight_versions"]
    assert (old["version"], new["version"]) == ("default", "v1")
    assert old["start"] == 0 and 3 < old["end"] == new["start"] < new["end"] == 240
    assert answer["meta_info"]["weight_version"] == "v1"
    assert answer["meta_info"]["num_retractions"] == 1
    edge, output = old["end"], answer["output_ids"]
    by_old, by_new = (reference(saved(seed)[0], PROMPT, output) for seed in (0, 1))
    assert np.abs(logprobs_of(answer) - by_old)[:edge].max() < 1e-4
    assert np.abs(logprobs_of(answer) - by_new)[edge:].max() < 1e-4
    assert np.abs(logprobs_of(answer) - by_new)[:edge].max() > 0.1
    assert error_of(late.result(20), 1, PROMPT) < 1e-4


def test_abort_answers_with_what_was_drawn_and_holds_what_comes(url):
    running = _started(url, logprob_start_len=0)
    done(url, "/pause_generation", {"mode": "abort"})
    answer = running.result(20)
    expected = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert answer["meta_info"]["finish_reason"] == expected
    assert 3 < len(answer["output_ids"]) < 240
    assert error_of(answer, 0, PROMPT) < 1e-4
    late = later(done, url, "/generate", ask(PROMPT, 5))
    done(url, "/flush_cache")
    assert not late.done()
    done(url, "/continue_generation")
    assert len(late.result(20)["output_ids"]) == 5


def test_pauses_do_not_add_up_and_abort_is_the_default(url):
    running = _started(url)
    done(url, "/pause_generation")
    assert running.result(20)["meta_info"]["finish_reason"]["type"] == "abort"
    done(url, "/pause_generation", {"mode": "retract"})
    done(url, "/continue_generation")
    assert served_by(url) == [0]
    done(url, "/continue_generation")


@pytest.mark.parametrize(("mode", "message"), [("in_place", "reproduce"), ("wait", "not known")])
def test_other_modes_are_refused_with_why(url, mode, message):
    status, answer = call(url, "/pause_generation", {"mode": mode})
    assert status == 400 and message in answer["message"]
    assert served_by(url) == [0]


def test_one_request_or_all_are_aborted(url):
    one, other = _started(url, rid="one"), _started(url, rid="other", new=200)
    assert call(url, "/abort_request", {"rid": "nobody"}) == (200, "")
    assert call(url, "/abort_request", {"rid": ""}) == (200, "")
    assert call(url, "/abort_request", {"rid": "one"}) == (200, "")
    assert one.result(20)["meta_info"]["finish_reason"]["type"] == "abort"
    assert not other.done()
    done(url, "/pause_generation", {"mode": "retract"})
    waiting = later(done, url, "/generate", ask(PROMPT, 5))
    assert call(url, "/abort_request", {"abort_all": True}) == (200, "")
    assert other.result(20)["meta_info"]["finish_reason"]["type"] == "abort"
    wait_until(lambda: waiting.done() or call(url, "/abort_request", {"abort_all": True})[0] != 200)
    assert waiting.result(20)["output_ids"] == []
    assert waiting.result(20)["meta_info"]["weight_versions"] == [
        {"version": "default", "start": 0, "end": 0}
    ]


def test_the_cache_is_flushed_when_nothing_runs(url):
    done(url, "/generate", ask(PROMPT))
    assert done(url, "/generate", ask(PROMPT))["meta_info"]["cached_tokens"] == 4
    status, text = call(url, "/flush_cache")
    assert status == 200 and text.startswith("Cache flushed.")
    assert done(url, "/generate", ask(PROMPT))["meta_info"]["cached_tokens"] == 0
    running = _started(url)
    assert call(url, "/flush_cache") == (400, "Flush cache failed.\n")
    done(url, "/abort_request", {"abort_all": True})
    running.result(20)


def test_a_session_id_keeps_the_cache_of_a_context(url):
    first = done(url, "/generate", ask(PROMPT, 4, session_id="s"))
    context = [*PROMPT, *first["output_ids"], 7]
    second = done(url, "/generate", ask(context, 4, session_id="s"))
    assert second["meta_info"]["cached_tokens"] == len(PROMPT) + 3
    assert error_of(second, 0, context) < 1e-4
    running = _started(url, session_id="s")
    assert len(done(url, "/generate", ask(PROMPT, 4, session_id="s"))["output_ids"]) == 4
    done(url, "/abort_request", {"abort_all": True})
    running.result(20)


def test_health_and_readiness(url):
    paths = ("/health", "/health_generate", "/ready", "/ping")
    assert [get(url, path)[0] for path in paths] == [200] * 4
    running = _started(url)
    assert get(url, "/health")[0] == 200
    done(url, "/pause_generation", {"mode": "retract"})
    assert [get(url, path)[0] for path in paths] == [503, 503, 503, 200]
    assert "paused" in get(url, "/health")[1]
    done(url, "/continue_generation")
    assert [get(url, path)[0] for path in paths] == [200] * 4
    running.result(20)


def test_what_is_served(url):
    status, info = get(url, "/model_info")
    assert status == 200 and info == get(url, "/get_model_info")[1]
    assert info["model_path"] == str(saved(0)[1]) and info["is_generation"] is True
    assert info["weight_version"] == "default" and info["model_type"] == "qwen3"
    status, server = get(url, "/server_info")
    assert status == 200 and server["tp_size"] == server["dp_size"] == 1
    assert server["context_length"] == 256 and server["max_req_input_len"] == 255


def test_a_new_label_aborts_all_unless_told_not_to(url):
    running = _started(url)
    body = {"new_version": "a", "abort_all_requests": False}
    assert done(url, "/update_weight_version", body)["new_version"] == "a"
    assert not running.done()
    done(url, "/update_weight_version", {"new_version": "b"})
    answer = running.result(20)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert [span["version"] for span in answer["meta_info"]["weight_versions"]] == ["default", "a"]
    assert get(url, "/model_info")[1]["weight_version"] == "b"


def test_memory_is_given_back_and_taken_again(url):
    running = _started(url)
    status, answer = call(url, "/release_memory_occupation", {"tags": ["kv_cache"]})
    assert status == 400 and "only when server is idle" in str(answer)
    done(url, "/pause_generation", {"mode": "retract"})
    done(url, "/release_memory_occupation", {"tags": ["kv_cache"]})
    done(url, "/resume_memory_occupation", {"tags": ["kv_cache"]})
    done(url, "/continue_generation")
    assert error_of(running.result(20), 0, PROMPT) < 1e-4
    done(url, "/release_memory_occupation")
    for path, body in (("/generate", ask(PROMPT)), ("/weights_checker", {})):
        status, answer = call(url, path, body)
        assert status in (400, 503) and "released" in str(answer)
    status, answer = call(url, "/begin_weight_update")
    assert status == 400 and "resume_memory_occupation first" in answer["message"]
    done(url, "/resume_memory_occupation")
    status, answer = call(url, "/generate", ask(PROMPT))
    assert status == 503 and "a full update has to follow" in str(answer)
    done(url, "/update_weights_from_disk", {"model_path": str(saved(1)[1])})
    assert served_by(url) == [1]
    status, answer = call(url, "/release_memory_occupation", {"tags": ["kv"]})
    assert status == 400 and "tags ['kv'] are not known" in answer["message"]


def test_released_memory_is_really_free():
    from megatron_spear.rollout.engines.embedded import EmbeddedEngine

    engine = EmbeddedEngine.from_hf(saved(0)[1], max_slots=4, max_context=64, deadline_s=5.0)
    views = engine.weights.views.values()
    assert all(view.untyped_storage().nbytes() for view in views)
    engine.release_memory(["weights", "kv_cache"])
    assert not any(view.untyped_storage().nbytes() for view in views)
    assert engine._cache.storage.untyped_storage().nbytes() == 0
