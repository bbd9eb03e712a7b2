"""Custom weight loaders of a server: what they write to, and one that does not end."""

import threading

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
    saved,
    send,
    served_by,
    wait_until,
    weights,
)

from megatron_spear.testing.serve import serve_in_thread


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
