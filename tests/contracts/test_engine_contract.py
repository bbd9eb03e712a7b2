"""Every rollout engine keeps to the contract, and the contract finds what breaks it."""

import dataclasses
import itertools
from typing import get_args

import numpy as np
import pytest

from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.contract import ContractViolation
from megatron_spear.testing.engines import (
    check_answers,
    check_draws,
    check_engine,
    check_errors,
    check_finish_reasons,
    check_pause,
    check_sessions,
    check_top_p,
    check_weights,
)
from megatron_spear.testing.fakes import ScriptedEngine
from megatron_spear.testing.serve import serve_in_process
from megatron_spear.testing.served_engines import ServedEngines
from megatron_spear.testing.tiny import tiny_hf_folder
from megatron_spear.trainer.engines import SERVERS, make_engine
from megatron_spear.types import VersionSpan


@pytest.fixture(scope="module")
def loop():
    with EventLoop("checks") as running:
        yield running


@pytest.fixture(scope="module", params=["Qwen3", "Qwen3Moe"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_hf_folder(path, request.param)
    return path


def test_the_embedded_engine_keeps_the_contract(loop, folder):
    settings = RolloutSection(max_context=64, max_slots=8)
    with HfReader(folder) as reader:
        check_engine(
            loop,
            lambda: make_engine(settings, WeightSyncSection(), folder, loop).engine,
            update=lambda engine, version: engine.load_weights(
                ((key, reader.get(key)) for key in reader.names), version
            ),
        )


def test_a_served_engine_keeps_the_contract(loop, folder):
    with (
        serve_in_process(folder, "--max-context", 64) as served,
        ServedEngines(loop, "sglang", [served.url], folder) as engines,
    ):
        check_engine(loop, engines.make, update=engines.update)


def test_every_engine_of_the_schema_can_be_made():
    engines = get_args(RolloutSection.model_fields["engine"].annotation)
    assert {"embedded", *SERVERS} == set(engines)


def _script(request):
    """64 tokens that depend on the prompt, and on the seed unless one token alone can be drawn."""
    seed = request.seed if request.sampling.temperature and request.sampling.top_p > 0.1 else ()
    entropy = [*request.token_ids.tolist(), *seed]
    return np.random.default_rng(entropy).integers(1, 21, 64).tolist()


class _Scripted(ScriptedEngine):
    """A scripted engine as the checks make it: ``_script`` and 64 tokens of context."""

    def __init__(self):
        super().__init__(_script, max_context=64)

    async def generate(self, request):
        return self.spoil(request, await super().generate(request))

    def spoil(self, request, answer):
        return answer


def _set_version(engine, version):
    engine.load_weights(iter(()), version)


def test_the_scripted_engine_keeps_the_contract(loop):
    check_engine(loop, _Scripted, update=_set_version)


class _LooseTypes(_Scripted):
    def spoil(self, request, answer):
        return dataclasses.replace(answer, token_ids=answer.token_ids.astype(np.int64))


class _LogprobMissing(_Scripted):
    def spoil(self, request, answer):
        return dataclasses.replace(answer, logprobs=answer.logprobs[1:])


class _Probabilities(_Scripted):
    def spoil(self, request, answer):
        return dataclasses.replace(answer, logprobs=np.exp(answer.logprobs))


class _SwallowsTheStop(_Scripted):
    def spoil(self, request, answer):
        if answer.finish_reason != "stop":
            return answer
        return dataclasses.replace(
            answer, token_ids=answer.token_ids[:-1], logprobs=answer.logprobs[:-1]
        )


class _CallsItLength(_Scripted):
    def spoil(self, request, answer):
        return dataclasses.replace(answer, finish_reason="length")


class _SharedStream(_Scripted):
    """Draws in the order of the requests."""

    def __init__(self):
        super().__init__()
        numbers = itertools.count()
        self._answer = lambda request: (
            np.random.default_rng(next(numbers)).integers(1, 21, 64).tolist()
        )


class _IgnoresTheSeed(_Scripted):
    def __init__(self):
        super().__init__()
        self._answer = lambda request: list(range(1, 65))


class _GoesByTheSession(_Scripted):
    """Mixes what it keeps of a session into the answer."""

    def __init__(self):
        super().__init__()
        self._answer = lambda request: [20 - (request.session in self._kept), *_script(request)]
        self._kept = set()

    def spoil(self, request, answer):
        self._kept.add(request.session)
        return answer


class _IgnoresTopP(_Scripted):
    async def generate(self, request):
        sampling = dataclasses.replace(request.sampling, top_p=1.0)
        return await super().generate(dataclasses.replace(request, sampling=sampling))


class _OneTopPForAll(_Scripted):
    """What one request asks for holds for those that come after it."""

    def __init__(self):
        super().__init__()
        self._lowest = 1.0

    async def generate(self, request):
        self._lowest = min(self._lowest, request.sampling.top_p)
        sampling = dataclasses.replace(request.sampling, top_p=self._lowest)
        return await super().generate(dataclasses.replace(request, sampling=sampling))


class _OldVersion(_Scripted):
    def spoil(self, request, answer):
        return dataclasses.replace(answer, versions=(VersionSpan(0, len(answer.token_ids)),))


class _AnswersAnything(_Scripted):
    def spoil(self, request, answer):
        return answer

    async def generate(self, request):
        sampling = dataclasses.replace(request.sampling, max_new_tokens=5, temperature=1.0)
        return await super().generate(dataclasses.replace(request, sampling=sampling))


class _NeverCloses(_Scripted):
    async def close(self):
        pass


class _GoesOnWhilePaused(_Scripted):
    async def pause(self, mode):
        pass


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_answers, _LooseTypes, "int64"),
        (check_answers, _LogprobMissing, "one a token"),
        (check_answers, _Probabilities, "<= 0"),
        (check_finish_reasons, _SwallowsTheStop, "with 'stop'"),
        (check_finish_reasons, _CallsItLength, "with 'stop'"),
        (check_draws, _SharedStream, "same seed"),
        (check_draws, _IgnoresTheSeed, "12 seeds"),
        (check_top_p, _IgnoresTopP, "top_p 1e-6"),
        (check_top_p, _OneTopPForAll, "tokens of 1"),
        (check_sessions, _GoesByTheSession, "release"),
        (check_errors, _AnswersAnything, "max_new_tokens 0 was answered"),
        (check_errors, _NeverCloses, "after close"),
    ],
)
def test_contract_finds_what_is_broken(loop, check, broken, message):
    with pytest.raises(ContractViolation, match=message):
        check(loop, broken)


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_weights, _OldVersion, "versions"),
        (check_pause, _OldVersion, "versions"),
        (check_pause, _GoesOnWhilePaused, "held back"),
    ],
)
def test_contract_finds_what_is_broken_at_an_update(loop, check, broken, message):
    with pytest.raises(ContractViolation, match=message):
        check(loop, broken, _set_version)
