"""SGLang's wire format: what is sent for a request, and what is read from an answer."""

import asyncio
import base64
import math

import pytest
import torch
from fleet_cases import ask, sglang

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.http import RequestRefused, ServerLost
from megatron_spear.rollout.engines.sampling import seed_key, signed_key
from megatron_spear.rollout.engines.sglang import _answer
from megatron_spear.testing.fake_sglang import FakeSGLang
from megatron_spear.weight_sync.servers import GroupAddress, TensorSpec


def with_server(work, **settings):
    """What ``work(client, fake)`` gives."""

    async def run():
        fake = FakeSGLang(**settings)
        await fake.start()
        client = sglang(fake.url)
        try:
            return await work(client, fake)
        finally:
            await client.close()
            await fake.kill()

    return asyncio.run(run())


def sent(request, token_ids=(3, 1, 4), new=8):
    async def work(client, fake):
        await client.generate(request, list(token_ids), new, "rid 1")
        return fake.bodies("/generate")[0]

    return with_server(work)


def test_a_request_names_all_that_shapes_the_distribution():
    assert sent(ask(2, stop=(5, 6), temperature=0.5, top_p=0.6)) == {
        "rid": "rid 1",
        "session_id": "session 2",
        "input_ids": [3, 1, 4],
        "return_logprob": True,
        "stream": False,
        "sampling_params": {
            "max_new_tokens": 8,
            "sampling_seed": signed_key(seed_key((7, 2))),
            "temperature": 0.5,
            "top_p": 0.6,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [5, 6],
            "ignore_eos": False,
        },
    }


def test_the_models_end_tokens_are_switched_off_where_nothing_shall_stop():
    assert sent(ask(0))["sampling_params"]["ignore_eos"] is True


def test_a_session_name_with_quotes_is_sent_as_it_is():
    assert sent(ask(0, session='a "b"\n'))["session_id"] == 'a "b"\n'


def generated(size=3, *, reason=None, **meta):
    drawn = [[-0.5 - i, 10 + i, None] for i in range(size)]
    return {
        "output_ids": [10 + i for i in range(size)],
        "meta_info": {
            "finish_reason": reason or {"type": "length", "length": size},
            "weight_version": "l/2",
            "output_token_logprobs": drawn,
            **meta,
        },
    }


def test_tokens_logprobs_and_spans_are_read():
    spans = [{"version": "l/1", "start": 0, "end": 2}, {"version": "l/2", "start": 2, "end": 3}]
    answer = _answer(generated(weight_versions=spans))
    assert answer.token_ids == [10, 11, 12] and answer.logprobs == [-0.5, -1.5, -2.5]
    assert answer.reason == "length" and answer.labels == [("l/1", 2), ("l/2", 1)]


def test_without_spans_all_tokens_are_of_the_present_weights():
    assert _answer(generated()).labels == [("l/2", 3)]


def test_finish_reasons():
    assert _answer(generated(reason={"type": "stop", "matched": 12})).reason == "stop"
    assert _answer(generated(reason={"type": "length", "length": 3})).reason == "length"
    aborted = {"type": "abort", "message": "Abort in waiting queue"}
    answer = {"output_ids": [], "meta_info": {"finish_reason": aborted, "weight_version": "l/2"}}
    assert _answer(answer).reason == "abort"


def test_numbers_that_are_not_finite_are_nan():
    assert math.isnan(
        _answer(
            generated(output_token_logprobs=[[None, 10, None]] * 3) | {"output_ids": [10] * 3}
        ).logprobs[0]
    )
    broken = _answer(generated(reason={"type": "stop", "matched": "NaN happened"}))
    assert all(map(math.isnan, broken.logprobs))


MALFORMED = {
    "no meta_info": {"text": "hello"},
    "no object": ["hello"],
    "another finish_reason": generated(reason={"type": "tool"}),
    "no log-probs": generated(output_token_logprobs=None),
    "other tokens": generated() | {"output_ids": [10, 11]},
    "a hole in the spans": generated(
        weight_versions=[{"version": "l/1", "start": 1, "end": 3}],
    ),
    "spans too short": generated(weight_versions=[{"version": "l/1", "start": 0, "end": 2}]),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_an_answer_of_another_form_is_a_lost_server(kind):
    async def work(client, fake):
        fake._answer = lambda drawing, reason: MALFORMED[kind]
        await client.generate(ask(0), [3, 1, 4], 8, "rid")

    with pytest.raises(ServerLost, match="cannot be read"):
        with_server(work)


def test_a_server_is_inspected():
    async def work(client, fake):
        return await client.inspect(), await client.label()

    info, label = with_server(work, max_context=2042, tp_size=4)
    assert (info.max_context, info.num_ranks, label) == (2042, 4, "default")


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"tp_size": 1, "max_req_input_len": 9, "dp_size": 2}, "start one server for each"),
        ({"tp_size": 1}, "no tp_size and max_req_input_len"),
        ([], "no tp_size and max_req_input_len"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(info, text):
    async def work(client, fake):
        client._http.get = lambda path, deadline_s: _later(info)
        await client.inspect()

    with pytest.raises(EngineError, match=text):
        with_server(work)


async def _later(value):
    return value


def test_pauses_and_aborts():
    async def work(client, fake):
        await client.pause("retract")
        await client.abort("rid 9")
        await client.resume()
        return fake.calls

    assert with_server(work) == [
        ("/pause_generation", {"mode": "retract"}),
        ("/abort_request", {"rid": "rid 9"}),
        ("/continue_generation", {}),
    ]


SPECS = [
    TensorSpec(name="a.weight", shape=(4, 2), dtype=torch.float32),
    TensorSpec(name="b.weight", shape=(3,), dtype=torch.bfloat16),
]


def test_a_broadcast_is_labelled_when_it_ends():
    async def work(client, fake):
        group = GroupAddress(host="h", port=5, name="g", backend="gloo", world_size=3)
        await client.join_group(group, 1)
        await client.begin_update()
        await client.receive_broadcast(SPECS, "g")
        assert fake.label == "default"
        await client.end_update("l/3")
        assert fake.label == "l/3"
        await client.leave_group("g")
        return fake.calls

    assert with_server(work) == [
        (
            "/init_weights_update_group",
            {
                "master_address": "h",
                "master_port": 5,
                "rank_offset": 1,
                "world_size": 3,
                "group_name": "g",
                "backend": "gloo",
            },
        ),
        ("/begin_weight_update", {}),
        (
            "/update_weights_from_distributed",
            {
                "names": ["a.weight", "b.weight"],
                "dtypes": ["float32", "bfloat16"],
                "shapes": [[4, 2], [3]],
                "group_name": "g",
                "load_format": "flattened_bucket",
                "flush_cache": False,
            },
        ),
        ("/end_weight_update", {}),
        ("/flush_cache", {}),
        ("/update_weight_version", {"new_version": "l/3", "abort_all_requests": False}),
        ("/destroy_weights_update_group", {"group_name": "g"}),
    ]


def test_payloads_travel_as_base64():
    async def work(client, fake):
        await client.begin_update()
        await client.receive_payloads([b"rank 0", b"rank 1"], "my.loader")
        return fake.calls[-1]

    assert with_server(work) == (
        "/update_weights_from_tensor",
        {
            "serialized_named_tensors": [
                base64.b64encode(b).decode() for b in (b"rank 0", b"rank 1")
            ],
            "load_format": "my.loader",
            "flush_cache": False,
        },
    )


def test_a_folder_is_labelled_by_the_call_itself():
    async def work(client, fake):
        await client.load_folder("/w/7", "l/7")
        return fake.calls

    body = {"model_path": "/w/7", "weight_version": "l/7", "flush_cache": True}
    assert with_server(work) == [("/update_weights_from_disk", body)]


def test_an_update_that_somebody_left_open_is_closed_first():
    async def work(client, fake):
        fake.in_update = True
        await client.begin_update()
        return fake.in_update, [path for path, _ in fake.calls]

    begin, end = "/begin_weight_update", "/end_weight_update"
    assert with_server(work) == (True, [begin, end, begin])


def test_a_refused_update_says_why():
    async def work(client, fake):
        await client.receive_payloads([b""], None)

    with pytest.raises(RequestRefused, match="must run between begin_weight_update"):
        with_server(work)


def test_an_answer_without_success_is_an_error():
    async def work(client, fake):
        client._http.post = lambda path, body: _later({"message": "hm"})
        await client.relabel("l/1")

    with pytest.raises(EngineError, match="/update_weight_version with no success"):
        with_server(work)


def test_parameter_names_are_those_of_the_checksums():
    async def work(client, fake):
        return await client.parameter_names()

    assert with_server(work) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_memory_is_given_and_taken_back():
    async def work(client, fake):
        await client.release_memory()
        await client.resume_memory()
        return fake.calls

    assert with_server(work) == [
        ("/release_memory_occupation", {"tags": ["weights", "kv_cache"]}),
        ("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]}),
    ]
