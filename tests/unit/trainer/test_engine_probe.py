"""The probe after the first weight update: right weights pass, wrong ones end the run."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.load import load_config
from megatron_spear.errors import EngineError
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.fakes import ScriptedEngine
from megatron_spear.trainer.engine_probe import check_engine, max_logprob_gap


class _Step:
    """A step whose policy gives every token ``logprob``; the scripted engine gives -0.5."""

    policy = SimpleNamespace(shape=SimpleNamespace(vocab_size=50))
    loss = SimpleNamespace(temperature=0.8)

    def __init__(self, logprob: float) -> None:
        self.samples: list[Any] = []
        self._logprob = logprob

    def policy_logprobs(self, samples: Any) -> list[np.ndarray]:
        self.samples = samples
        return [np.full(len(s.token_ids), self._logprob, np.float32) for s in samples]


def _check(step: Any, engine: Any, max_gap: float = 1e-3) -> float:
    with EventLoop("probe") as loop:
        return check_engine(step, (loop, engine), num_probes=3, max_gap=max_gap)


def test_equal_logprobs_pass() -> None:
    step, engine = _Step(-0.5), ScriptedEngine(lambda request: list(range(16)))
    assert _check(step, engine) == 0.0
    assert len(step.samples) == 3 and len({r.session for r in engine.requests}) == 3
    assert all(request.sampling.temperature == 0.8 for request in engine.requests)
    assert all(sample.response_mask.sum() == 16 for sample in step.samples)
    assert engine.released == {request.session for request in engine.requests}


def test_other_weights_end_the_run_with_what_to_look_at() -> None:
    engine = ScriptedEngine(lambda request: list(range(16)))
    with pytest.raises(EngineError, match=r"differ from the policy's by 0\.7 nats.*0\.3"):
        _check(_Step(-1.2), engine, max_gap=0.3)
    assert _check(_Step(-0.7), engine, max_gap=0.3) == pytest.approx(0.2)


def test_an_engine_that_does_not_answer_is_told() -> None:
    def answer(request: Any) -> list[int]:
        raise EngineError("all servers are out")

    with pytest.raises(EngineError, match=r"did not answer a probe.*all servers are out"):
        _check(_Step(-0.5), ScriptedEngine(answer))


def test_the_gap_that_is_allowed() -> None:
    assert max_logprob_gap(load_config(None, [])) == 1e-3
    assert max_logprob_gap(load_config(None, ["policy.precision=bf16"])) == 0.3
    assert max_logprob_gap(load_config(None, ["weight_sync.precision=fp8"])) == 0.3
    assert max_logprob_gap(load_config(None, ["weight_sync.max_logprob_gap=0.05"])) == 0.05
