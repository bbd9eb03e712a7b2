"""/generate as SGLang has it: tokens, log-probs, finish reasons, what is refused."""

import asyncio

import numpy as np
import pytest
from serve_cases import (
    VOCAB,
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

from megatron_spear.config.schema import TinyModelSection
from megatron_spear.conversion.tiny_model import make_tiny_model
from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.rollout.engines.sampling import seed_key, signed_key
from megatron_spear.testing.serve import serve_in_thread

PROMPT = [5, 9, 2, 44, 17]


def test_an_answer_has_the_models_logprobs_and_sglangs_fields(url):
    answer = done(url, "/generate", ask(PROMPT, 6, rid="mine"))
    meta = answer["meta_info"]
    assert set(answer) == {"text", "output_ids", "meta_info"}
    assert len(answer["output_ids"]) == meta["completion_tokens"] == 6
    assert meta["id"] == "mine" and meta["prompt_tokens"] == 5
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
    assert meta["num_retractions"] == 0 and meta["e2e_latency"] > 0
    assert meta["input_token_logprobs"] == [] and meta["output_token_logprobs_length"] == 6
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert error_of(answer, 0, PROMPT) < 1e-5
    assert error_of(answer, 1, PROMPT) > 0.1


def test_logprobs_are_after_the_temperature_and_of_the_raw_model_when_greedy(url):
    warm = done(url, "/generate", ask(PROMPT, 6, sampling_params={"temperature": 0.5}))
    expected = reference(saved(0)[0], PROMPT, warm["output_ids"], 0.5)
    assert np.abs(logprobs_of(warm) - expected).max() < 1e-5
    greedy = done(url, "/generate", ask(PROMPT, 6, sampling_params={"temperature": 0}))
    assert error_of(greedy, 0, PROMPT) < 1e-5
    again = done(url, "/generate", ask(PROMPT, 6, sampling_params={"temperature": 0}))
    assert again["output_ids"] == greedy["output_ids"]
    assert again["meta_info"]["cached_tokens"] == 4, "all but the token whose logits are needed"


@pytest.mark.parametrize("new", [0, 3])
def test_a_prompt_is_scored_from_its_second_token_on(url, new):
    answer = done(url, "/generate", ask(PROMPT, new, logprob_start_len=0))
    first, *scored = answer["meta_info"]["input_token_logprobs"]
    assert first == [None, PROMPT[0], None]
    assert [entry[1] for entry in scored] == PROMPT[1:]
    expected = reference(saved(0)[0], PROMPT[:1], PROMPT[1:])
    assert np.abs([entry[0] for entry in scored] - expected).max() < 1e-5
    assert len(answer["output_ids"]) == new


def test_a_long_prompt_is_scored_in_pieces(monkeypatch):
    monkeypatch.setattr("megatron_spear.rollout.engines.decoder._SCORED_ROWS", 7)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
    with serve_in_thread(saved(0, "qwen3_moe")[1]) as url:
        answer = done(url, "/generate", ask(tokens, 0, logprob_start_len=0))
    scored = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    expected = reference(saved(0, "qwen3_moe")[0], tokens[:1], tokens[1:])
    assert np.abs(scored - expected).max() < 1e-5


def test_a_batch_is_answered_in_its_order(url):
    prompts = [[1, 2, 3], [4, 5], [6]]
    sampling = [{"max_new_tokens": n, "ignore_eos": True} for n in (2, 3, 4)]
    body = {"input_ids": prompts, "sampling_params": sampling, "rid": ["a", "b", "c"]}
    answers = done(url, "/generate", body)
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
    assert [len(answer["output_ids"]) for answer in answers] == [2, 3, 4]
    assert "output_token_logprobs" not in answers[0]["meta_info"]
    assert len(done(url, "/generate", body | {"rid": "x"})) == 3


def test_the_same_request_draws_the_same_tokens_in_process(url):
    engine = EmbeddedEngine.from_hf(saved(0)[1], max_slots=4, max_context=256, deadline_s=20.0)
    for seed in ((3, 1, 4), (1, 5), (9, 2, 6, 5)):
        inside = asyncio.run(
            engine.generate(
                GenerationRequest(
                    session=str(seed),
                    token_ids=np.array(PROMPT, np.int32),
                    sampling=SamplingParams(max_new_tokens=30),
                    seed=seed,
                )
            )
        )
        key = signed_key(seed_key(seed))
        served = done(url, "/generate", ask(PROMPT, 30, sampling_params={"sampling_seed": key}))
        assert served["output_ids"] == inside.token_ids.tolist()
    drawn = {tuple(done(url, "/generate", ask(PROMPT, 12))["output_ids"]) for _ in range(4)}
    assert len(drawn) > 1, "without a seed every request draws anew"


def test_it_ends_at_a_stop_token_and_at_the_models_own(url):
    free = done(url, "/generate", ask(PROMPT, 12, sampling_params={"sampling_seed": 5}))
    token = free["output_ids"][3]
    sampling = {"sampling_seed": 5, "max_new_tokens": 12, "stop_token_ids": [token]}
    stopped = done(url, "/generate", {"input_ids": PROMPT, "sampling_params": sampling})
    at = free["output_ids"].index(token) + 1
    assert stopped["output_ids"] == free["output_ids"][:at]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    endings = {
        done(url, "/generate", {"input_ids": [i], "sampling_params": {"max_new_tokens": 200}})[
            "meta_info"
        ]["finish_reason"]["type"]
        for i in range(6)
    }
    assert "stop" in endings, "the end token of config.json ends nothing"


def test_text_goes_through_the_tokenizer(tmp_path):
    folder = make_tiny_model(
        tmp_path / "tiny", TinyModelSection(num_layers=1, hidden_size=32), ["look", "around", "mug"]
    )
    with serve_in_thread(folder) as url:
        body = {"text": "look around", "sampling_params": {"max_new_tokens": 5, "sampling_seed": 3}}
        answer = done(url, "/generate", body)
        assert answer["meta_info"]["prompt_tokens"] == 2
        assert answer["text"] != "" or answer["meta_info"]["finish_reason"]["type"] == "stop"
        both = done(url, "/generate", body | {"text": ["look", "mug"]})
        assert [one["meta_info"]["prompt_tokens"] for one in both] == [1, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": [1], "text": "a"}, "both given"),
        ({"text": "a"}, "has no tokenizer"),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
        ({"input_ids": [1, VOCAB]}, f"0..{VOCAB - 1}"),
        ({"input_ids": [-1]}, f"0..{VOCAB - 1}"),
        ({"input_ids": [0.5]}, "no list of integers"),
        ({"input_ids": "1"}, "no list of integers"),
        ({"input_ids": [1], "stream": True}, "stream=True is not supported"),
        ({"input_ids": [1], "top_logprobs_num": 2}, "top_logprobs_num=2"),
        ({"input_ids": [1], "logprob_start_len": 3}, "logprob_start_len=3"),
        ({"input_ids": [1], "return_logprobs": True}, "unknown field return_logprobs"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "Duplicate request IDs detected"),
        ({"input_ids": [1], "sampling_params": {"foo": 1}}, "unknown field `foo`"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p must be in (0, 1], got 0."),
        (
            {"input_ids": [1], "sampling_params": {"top_p": 1.1}},
            "top_p must be in (0, 1], got 1.1.",
        ),
        ({"input_ids": [1], "sampling_params": {"top_k": 50}}, "top_k=50"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "non-negative finite"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens=0"),
        ({"input_ids": [1], "sampling_params": {"sampling_seed": 1 << 63}}, "2^63 - 1"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": "3"}}, "an integer"),
        (
            {"input_ids": [1], "sampling_params": {"ignore_eos": True, "stop_token_ids": [3]}},
            "pass over stop_token_ids",
        ),
        (
            {"input_ids": [1] * 256},
            "The input (256 tokens) is longer than the model's context length (256 tokens).",
        ),
        (
            {"input_ids": [1] * 250, "sampling_params": {"max_new_tokens": 7}},
            "Requested token count exceeds the model's maximum context length of 256 tokens. You "
            "requested a total of 257 tokens",
        ),
    ],
)
def test_mistakes_are_400_and_the_server_lives_on(url, body, message):
    status, answer = call(url, "/generate", body)
    assert status == 400
    assert message in str(answer)
    assert served_by(url) == [0]


def test_what_is_no_json_and_no_route(url):
    assert call(url, "/generate", b"{")[0] == 400
    assert call(url, "/generate", b"[1]")[0] == 400
    assert get(url, "/generates") == (404, {"detail": "Not Found"})
    assert get(url, "/generate") == (405, {"detail": "Method Not Allowed"})


def test_a_rid_that_is_under_way_is_refused(url):
    first = later(done, url, "/generate", ask(PROMPT, 240, rid="a"))
    wait_until(lambda: get(url, "/server_info")[1]["internal_states"][0]["decode_steps"] > 2)
    status, answer = call(url, "/generate", ask(PROMPT, 5, rid="a"))
    assert status == 400 and "Duplicate request ID detected: a" in str(answer)
    assert len(first.result(20)["output_ids"]) == 240


def test_a_client_that_goes_away_leaves_nothing_behind(url):
    import http.client
    import json
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("POST", "/generate", body=json.dumps(ask(PROMPT, 240, rid="gone")))
    wait_until(lambda: get(url, "/server_info")[1]["internal_states"][0]["decode_steps"] > 2)
    connection.close()
    wait_until(lambda: call(url, "/flush_cache")[0] == 200)
    steps = get(url, "/server_info")[1]["internal_states"][0]["decode_steps"]
    assert steps < 239, "it was drawn to its end for nobody"
