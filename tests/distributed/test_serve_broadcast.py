"""A trainer's broadcast into a served engine over gloo, judged by log-probs; and one that fails."""

import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.testing.serve import serve_in_process

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serving"))
from serve_cases import call, done, get, later, saved, served_by, weights

_LIMIT_S = 30.0


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _meeting(name, port):
    """What tells the server where to join."""
    return {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank_offset": 1,
        "world_size": 2,
        "group_name": name,
        "backend": "gloo",
    }


def _join(url, name, port):
    """Rank 0 of a group of this process and the server."""
    joined = later(done, url, "/init_weights_update_group", _meeting(name, port))
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


_DYING_TRAINER = """
import os, sys, time
import torch, torch.distributed as dist
from megatron_spear import peer_groups
group = peer_groups.join(backend="gloo", host="127.0.0.1", port={port}, rank=0, world_size=2,
                         name={name!r}, timeout_s=30.0)
sys.stdin.readline()
dist.broadcast(torch.zeros({size}), src=0, group=group)
time.sleep(0.3)
os._exit(0)
"""


def test_a_trainer_that_dies_in_a_receive_costs_that_update_only(served):
    done(served, "/update_weights_from_disk", {"model_path": str(saved(0)[1])})
    name = uuid.uuid4().hex
    tensors, port = weights(1), _free_port()
    script = _DYING_TRAINER.format(port=port, name=name, size=next(iter(tensors.values())).shape)
    trainer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True)
    done(served, "/init_weights_update_group", _meeting(name, port))
    done(served, "/begin_weight_update")
    body = _described(tensors, name)
    receiving = later(call, served, "/update_weights_from_distributed", body)
    trainer.communicate("send\n", timeout=_LIMIT_S)
    status, answer = receiving.result(_LIMIT_S)
    assert status == 400 and "Failed to receive weights" in answer["message"]
    status, answer = call(served, "/end_weight_update")
    assert status == 400 and "Failed to receive weights" in answer["message"]
    assert served_by(served) == [0], "nothing was written, so the old weights still serve"
    done(served, "/begin_weight_update")
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
    body = _meeting(name, port)
    init, failed = "/init_weights_update_group", "Failed to initialize custom process group: "
    began = time.monotonic()
    both = [later(call, served, init, body) for _ in range(2)]
    answers = [future.result(_LIMIT_S) for future in both]
    taken, lonely = sorted(answers, key=lambda answer: "exists" not in str(answer))
    assert taken[0] == lonely[0] == 400 and "exists" in taken[1]["message"]
    assert taken[1]["message"].startswith(failed) and lonely[1]["message"].startswith(failed)
    assert 3.0 < time.monotonic() - began < 15.0
    for wrong, message in (
        ({"backend": "nccl"}, "give backend gloo"),
        ({"rank_offset": 0}, "1 to 1"),
    ):
        status, answer = call(served, init, body | wrong)
        assert status == 400 and message in answer["message"]


def test_a_server_that_waits_for_a_trainer_still_stops_at_once():
    with serve_in_process(saved(0)[1], "--update-deadline-s", 60) as one:
        name = uuid.uuid4().hex
        group = _join(one.url, name, _free_port())
        done(one.url, "/begin_weight_update")
        body = _described(weights(1), name)
        receiving = later(call, one.url, "/update_weights_from_distributed", body)
        generating = later(call, one.url, "/generate", {"input_ids": [1]})
        time.sleep(0.5)
        began = time.monotonic()
        one.process.terminate()
        assert one.process.wait(_LIMIT_S) == 0
        assert time.monotonic() - began < 20.0
        status, answer = generating.result(_LIMIT_S)
        assert status == 503 and "closed" in answer["error"]["message"]
        assert isinstance(receiving.exception(_LIMIT_S), OSError)
        peer_groups.leave(group)
