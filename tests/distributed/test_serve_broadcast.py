"""A trainer's broadcast into a served engine over gloo, judged by log-probs; and one that fails."""

import socket
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.serve import serve_in_process

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serving"))
from serve_cases import call, done, get, later, saved, served_by, weights

_LIMIT_S = 30.0


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(url, name, port):
    """Rank 0 of a group of this process and the server."""
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    body |= {"group_name": name, "backend": "gloo"}
    joined = later(done, url, "/init_weights_update_group", body)
    group = peer_groups.join(
        backend="gloo",
        host="127.0.0.1",
        port=port,
        rank=0,
        world_size=2,
        name=name,
        timeout_s=_LIMIT_S,
    )
    assert joined.result(_LIMIT_S)["message"] == "Succeeded to initialize custom process group."
    return group


def _described(tensors, name, **more):
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": name,
    } | more


def _broadcast(group, tensors, load_format):
    if load_format is None:
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0, group=group)
    else:
        raw = [tensor.flatten().view(torch.uint8) for tensor in tensors.values()]
        dist.broadcast(torch.cat(raw), src=0, group=group)


@pytest.fixture(scope="module")
def served():
    with serve_in_process(saved(0)[1], "--update-deadline-s", 4) as one:
        yield one.url


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_what_is_broadcast_is_what_the_server_draws_from(served, load_format):
    name, seed = uuid.uuid4().hex, 1 if load_format is None else 2
    group = _join(served, name, _free_port())
    done(served, "/pause_generation", {"mode": "retract"})
    done(served, "/begin_weight_update")
    pairs = list(weights(seed).items())
    for part in (dict(pairs[:9]), dict(pairs[9:])):
        body = _described(part, name, load_format=load_format, weight_version=f"run/{seed}")
        answered = later(done, served, "/update_weights_from_distributed", body)
        _broadcast(group, part, load_format)
        assert answered.result(_LIMIT_S)["success"]
    done(served, "/end_weight_update")
    done(served, "/continue_generation")
    assert served_by(served) == [seed]
    assert get(served, "/model_info")[1]["weight_version"] == f"run/{seed}"
    done(served, "/destroy_weights_update_group", {"group_name": name})
    peer_groups.leave(group)
    assert call(served, "/destroy_weights_update_group", {"group_name": name})[0] == 400


def test_a_wrong_shape_is_received_told_and_healed(served):
    name = uuid.uuid4().hex
    group = _join(served, name, _free_port())
    whole = weights(1)
    broken = whole | {"model.norm.weight": torch.zeros(31)}
    done(served, "/begin_weight_update")
    answered = later(call, served, "/update_weights_from_distributed", _described(broken, name))
    _broadcast(group, broken, None)
    status, answer = answered.result(_LIMIT_S)
    assert status == 400 and "model.norm.weight of shape (31,); expected (32,)" in answer["message"]
    assert call(served, "/end_weight_update")[0] == 400
    assert call(served, "/generate", {"input_ids": [1]})[0] == 503
    done(served, "/begin_weight_update")
    answered = later(done, served, "/update_weights_from_distributed", _described(whole, name))
    _broadcast(group, whole, None)
    answered.result(_LIMIT_S)
    done(served, "/end_weight_update")
    assert served_by(served) == [1]
    done(served, "/destroy_weights_update_group", {"group_name": name})
    peer_groups.leave(group)


def _dies_after_one_tensor(url, name, port):
    """A trainer that leaves in the middle of a broadcast."""
    group = _join(url, name, port)
    tensors = weights(1)
    first = dict(list(tensors.items())[:1])
    done(url, "/begin_weight_update")
    later(call, url, "/update_weights_from_distributed", _described(tensors, name))
    _broadcast(group, first, None)
    time.sleep(0.5)


def test_a_trainer_that_dies_in_a_receive_costs_that_update_only(served):
    done(served, "/update_weights_from_disk", {"model_path": str(saved(0)[1])})
    name = uuid.uuid4().hex
    run_ranks(_dies_after_one_tensor, 1, served, name, _free_port(), timeout_s=_LIMIT_S)
    ended, began = (0, {}), time.monotonic()
    while ended[0] != 400 or "still being received" in ended[1]["message"]:
        ended = call(served, "/end_weight_update")
        assert time.monotonic() - began < 10.0, ended
        time.sleep(0.1)
    assert "Failed to receive weights" in ended[1]["message"]
    assert served_by(served) == [0], "nothing was written, so the old weights still serve"
    done(served, "/begin_weight_update")
    body = _described(weights(1), name)
    status, answer = call(served, "/update_weights_from_distributed", body)
    assert status == 400 and "is broken" in answer["message"]
    assert call(served, "/end_weight_update")[0] == 400
    done(served, "/destroy_weights_update_group", {"group_name": name})
    test_what_is_broadcast_is_what_the_server_draws_from(served, "flattened_bucket")


def test_a_trainer_that_sends_nothing_is_waited_for_until_the_deadline(served):
    name = uuid.uuid4().hex
    group = _join(served, name, _free_port())
    done(served, "/begin_weight_update")
    began = time.monotonic()
    body = _described(weights(1), name, load_format="flattened_bucket")
    waiting = later(call, served, "/update_weights_from_distributed", body)
    assert get(served, "/model_info")[0] == 200, "the server stands still while it receives"
    status, answer = waiting.result(_LIMIT_S)
    assert status == 400 and "Failed to receive weights" in answer["message"]
    assert 3.0 < time.monotonic() - began < 10.0
    assert call(served, "/end_weight_update")[0] == 400
    done(served, "/destroy_weights_update_group", {"group_name": name})
    peer_groups.leave(group)


def test_groups_are_joined_once_in_time_and_with_gloo(served):
    name, port = uuid.uuid4().hex, _free_port()
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    body |= {"group_name": name, "backend": "gloo"}
    init, failed = "/init_weights_update_group", "Failed to initialize custom process group: "
    began = time.monotonic()
    lonely = later(call, served, init, body)
    while True:
        status, answer = call(served, init, body)
        if "exists" in answer["message"]:
            break
        time.sleep(0.05)
    assert status == 400 and answer["message"].startswith(failed)
    status, answer = lonely.result(_LIMIT_S)
    assert status == 400 and answer["message"].startswith(failed)
    assert time.monotonic() - began < 15.0
    for wrong, message in (
        ({"backend": "nccl"}, "give backend gloo"),
        ({"rank_offset": 0}, "1 to 1"),
    ):
        status, answer = call(served, init, body | wrong)
        assert status == 400 and message in answer["message"]
