"""vLLM's wire format: what is sent for a request, and what is read from an answer."""

import asyncio
import base64
import math

import pytest
import torch
from aiohttp import web
from fleet_cases import ask, limits

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.fleet import Fleet
from megatron_spear.rollout.engines.http import ServerBusy, ServerLost
from megatron_spear.rollout.engines.sampling import seed_key
from megatron_spear.rollout.engines.vllm import VLLMServer, _answer
from megatron_spear.types import VersionSpan
from megatron_spear.weight_sync.servers import GroupAddress, TensorSpec


def generated(size=2, **changes):
    choice = {
        "index": 0,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [10 + i for i in range(size)],
        "logprobs": {
            "content": [
                {"token_id": 10 + i, "logprob": -0.5 - i, "rank": 1, "top_logprobs": []}
                for i in range(size)
            ]
        },
        "weight_versions": [{"version": "default", "start": 0, "end": size}],
    }
    return {"request_id": "r", "choices": [choice | changes]}


def server_info(**changes):
    model = {"max_model_len": 64, "logprobs_mode": "processed_logprobs"}
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    config = {
        "model_config": {k: changes.get(k, v) for k, v in model.items()},
        "parallel_config": {k: changes.get(k, v) for k, v in parallel.items()},
    }
    return {"vllm_config": config, "vllm_env": {}, "system_env": {}}


class Server:
    """vLLM's routes: answers with what is in ``answers``, by path; keeps what came."""

    def __init__(self, **answers):
        self.answers = {
            "/server_info": server_info(),
            "/weight_info": {"weight_version": "default"},
            "/inference/v1/generate": generated(),
            "/reset_prefix_cache": {"success": True},
            "/update_weight_version": {"success": True},
        } | {f"/{path}": answer for path, answer in answers.items()}
        self.calls = []

    async def answer(self, request):
        body = await request.json() if request.can_read_body else None
        self.calls.append((request.path_qs, body))
        answer = self.answers.get(request.path, {"message": "done"})
        if request.path == "/update_weight_version":
            self.answers["/weight_info"] = {"weight_version": body["new_version"]}
        return answer if isinstance(answer, web.Response) else web.json_response(answer)

    def run(self, work):
        async def run():
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", lambda request: self.answer(request))
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            client = VLLMServer(
                f"http://127.0.0.1:{port}",
                update_deadline_s=5.0,
                probe_deadline_s=5.0,
            )
            try:
                return await work(client)
            finally:
                await client.close()
                await runner.cleanup()

        return asyncio.run(run())


def sent(request, token_ids=(3, 1, 4)):
    server = Server()
    server.run(lambda client: client.generate(request, list(token_ids), 8, "rid 1"))
    ((path, body),) = server.calls
    assert path == "/inference/v1/generate"
    return body


def test_a_request_names_all_that_shapes_the_distribution():
    assert sent(ask(2, stop=(5, 6), temperature=0.5, top_p=0.6)) == {
        "request_id": "rid 1",
        "token_ids": [3, 1, 4],
        "sampling_params": {
            "max_tokens": 8,
            "seed": seed_key((7, 2)) & 0x7FFFFFFF,
            "temperature": 0.5,
            "top_p": 0.6,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [5, 6],
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        },
    }


def test_what_goes_on_draws_with_another_seed():
    first, second = (sent(ask(2), ids)["sampling_params"]["seed"] for ids in ([3, 1, 4], [3] * 5))
    assert second == seed_key((seed_key((7, 2)), 2)) & 0x7FFFFFFF != first


def test_tokens_logprobs_and_spans_are_read():
    spans = [{"version": "l/1", "start": 0, "end": 1}, {"version": "l/2", "start": 1, "end": 2}]
    answer = _answer(generated(weight_versions=spans))
    assert answer.token_ids == [10, 11] and answer.logprobs == [-0.5, -1.5]
    assert answer.reason == "length" and answer.labels == [("l/1", 1), ("l/2", 1)]


def test_finish_reasons():
    assert _answer(generated(finish_reason="stop", stop_reason=11)).reason == "stop"
    aborted = generated(finish_reason="abort", token_ids=[], logprobs=None, weight_versions=None)
    assert _answer(aborted).reason == "abort"


def test_a_number_that_is_not_finite_is_nan():
    content = [{"token_id": 10, "logprob": -9999.0}, {"token_id": 11, "logprob": -0.1}]
    answer = _answer(generated(logprobs={"content": content}))
    assert math.isnan(answer.logprobs[0]) and answer.logprobs[1] == -0.1


MALFORMED = {
    "two choices": {"choices": generated()["choices"] * 2},
    "another finish_reason": generated(finish_reason="repetition"),
    "no log-probs": generated(logprobs=None),
    "other tokens": generated(token_ids=[10, 12]),
    "no versions": generated(weight_versions=None),
    "versions too short": generated(weight_versions=[{"version": "l/1", "start": 0, "end": 1}]),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_an_answer_of_another_form_is_a_lost_server(kind):
    server = Server(**{"inference/v1/generate": MALFORMED[kind]})
    with pytest.raises(ServerLost, match="cannot be read"):
        server.run(lambda client: client.generate(ask(), [3, 1, 4], 8, "rid"))


def test_a_server_is_inspected():
    async def work(client):
        return await client.inspect(), await client.label()

    server = Server()
    info, label = server.run(work)
    assert (info.max_context, info.num_ranks, label) == (64, 2, "default")
    assert server.calls[0] == ("/server_info?config_format=json", None)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (server_info(logprobs_mode="raw_logprobs"), "--logprobs-mode processed_logprobs"),
        (server_info(data_parallel_size=2), "one server for each replica"),
        ({"vllm_config": "text"}, "/server_info that cannot be read"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(answer, text):
    with pytest.raises(EngineError, match=text):
        Server(server_info=answer).run(lambda client: client.inspect())


def test_vllms_error_shape():
    body = {"error": {"message": "engine dead", "type": "InternalServerError", "code": 500}}
    server = Server(**{"inference/v1/generate": web.json_response(body, status=500)})
    with pytest.raises(ServerBusy, match="answered 500: engine dead"):
        server.run(lambda client: client.generate(ask(), [3, 1, 4], 8, "rid"))


def test_pauses_and_aborts():
    async def work(client):
        await client.pause("retract")
        await client.pause("abort")
        await client.abort("rid 9")
        await client.resume()

    server = Server()
    server.run(work)
    assert server.calls == [
        ("/pause?mode=keep&clear_cache=true", {}),
        ("/pause?mode=abort&clear_cache=true", {}),
        ("/abort_requests", {"request_ids": ["generate-tokens-rid 9"]}),
        ("/resume", {}),
    ]


RESET = ("/reset_prefix_cache?reset_running_requests=true", {})
SPECS = [
    TensorSpec(name="a.weight", shape=(4, 2), dtype=torch.float32),
    TensorSpec(name="b.weight", shape=(3,), dtype=torch.bfloat16),
]


def test_a_broadcast_is_labelled_when_it_ends():
    async def work(client):
        group = GroupAddress(host="h", port=5, name="g", backend="gloo", world_size=3)
        await client.join_group(group, 1)
        await client.begin_update()
        await client.receive_broadcast(SPECS, "g")
        await client.receive_payloads([b"rank 0", b"rank 1"], None)
        await client.end_update("l/3")
        await client.leave_group("g")

    server = Server()
    server.run(work)
    joined, begun, *received, finished, reset, labelled, left = server.calls
    assert joined == (
        "/init_weight_transfer_engine",
        {
            "init_info": {
                "master_address": "h",
                "master_port": 5,
                "rank_offset": 1,
                "world_size": 3,
                "group_name": "g",
                "group_backend": "gloo",
            }
        },
    )
    tensors = {
        "names": ["a.weight", "b.weight"],
        "dtype_names": ["float32", "bfloat16"],
        "shapes": [[4, 2], [3]],
    }
    encoded = [base64.b64encode(part).decode() for part in (b"rank 0", b"rank 1")]
    payloads = [{"payload": part, "load_format": None} for part in encoded]
    assert received == [
        ("/update_weights", {"update_info": tensors}),
        ("/update_weights", {"update_info": payloads}),
    ]
    assert [begun, finished, reset] == [
        ("/start_weight_update", {}),
        ("/finish_weight_update", {}),
        RESET,
    ]
    assert labelled == ("/update_weight_version", {"new_version": "l/3"})
    assert left == ("/shutdown_weight_transfer_engine", {})


def test_an_update_that_somebody_left_open_is_closed_first():
    async def work(client):
        failed = web.json_response({"error": {"message": "Internal Server Error"}}, status=500)
        server.answers["/start_weight_update"] = failed
        closed = server.answer

        async def answer(request):
            if request.path == "/finish_weight_update":
                server.answers["/start_weight_update"] = {"message": "done"}
            return await closed(request)

        server.answer = answer
        await client.begin_update()

    server = Server()
    server.run(work)
    begin, end = "/start_weight_update", "/finish_weight_update"
    assert [path for path, _ in server.calls] == [begin, end, begin]


def test_a_folder_is_loaded_by_the_workers_and_labelled_after():
    server = Server()
    server.run(lambda client: client.load_folder("/w/7", "l/7"))
    assert server.calls == [
        (
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": "/w/7"}},
        ),
        RESET,
        ("/update_weight_version", {"new_version": "l/7"}),
    ]


def test_contexts_that_are_kept_are_an_error():
    server = Server(reset_prefix_cache={"success": False})
    with pytest.raises(EngineError, match="kept cached contexts"):
        server.run(lambda client: client.end_update("l/7"))
    assert server.calls[-1] == RESET, "it was labelled all the same"


def test_a_fleet_of_vllm_serves():
    async def work(client):
        fleet = Fleet([client], vocab_size=100, limits=limits())
        await fleet.start(wait_s=2.0)
        (member,) = await fleet.reachable()
        label = fleet.labels.label(4)
        await client.load_folder("/w", label)
        await fleet.admit(member, 4)
        spans = [{"version": label, "start": 0, "end": 2}]
        server.answers["/inference/v1/generate"] = generated(weight_versions=spans)
        answer = await fleet.generate(ask(new=2))
        await fleet.close()
        return answer, fleet.max_context

    server = Server()
    answer, max_context = server.run(work)
    assert answer.token_ids.tolist() == [10, 11] and max_context == 64
    assert answer.versions == (VersionSpan(4, 2),) and answer.finish_reason == "length"
