"""Publishing weights inside one process: all tensors arrive one by one, bytes are counted."""

from collections.abc import Iterable, Iterator

import pytest
import torch

from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.in_process import InProcess

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
}
BYTES = 6 * 4 + 5 * 2


class _Source:
    """A policy on one rank; ``whole`` is False where the tensors arrive elsewhere."""

    def __init__(self, whole: bool = True) -> None:
        self.sent: list[str] = []
        self.ended = False
        self._whole = whole

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, tensor in TENSORS.items():
            self.sent.append(name)
            yield name, tensor if self._whole else None
        self.ended = True


class _Receiver:
    """An engine that keeps what it got and how much of the source had run by then."""

    def __init__(self, source: _Source) -> None:
        self.got: dict[str, torch.Tensor] = {}
        self.version = -1
        self.ahead: list[int] = []
        self._source = source

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
    ) -> None:
        for name, tensor in named_tensors:
            self.got[name] = tensor.clone()
            self.ahead.append(len(self._source.sent))
        self.version = policy_version


def test_the_receiver_gets_every_tensor_one_at_a_time() -> None:
    source = _Source()
    receiver = _Receiver(source)
    calls: list[str] = []
    transport = InProcess(
        source=source,
        receiver=receiver,
        pause=lambda: calls.append("pause"),
        resume=lambda: calls.append("resume"),
    )
    metrics = transport.publish(8)
    assert calls == ["pause", "resume"]
    assert receiver.version == 8 and list(receiver.got) == list(TENSORS)
    assert all(torch.equal(receiver.got[name], tensor) for name, tensor in TENSORS.items())
    assert receiver.ahead == [1, 2], "the next tensor is made when the one before is taken"
    assert metrics == {"weight_sync/bytes": BYTES} and BYTES == 34
    assert source.ended


def test_a_rank_without_receiver_still_takes_part() -> None:
    source = _Source(whole=False)
    assert InProcess(source=source, receiver=None).publish(8) == {"weight_sync/bytes": 0.0}
    assert source.ended and source.sent == list(TENSORS)


class _Refuses(_Receiver):
    """Takes one tensor, then no more."""

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
    ) -> None:
        next(iter(named_tensors))
        raise EngineError("the engine takes no more")


def test_a_refused_update_ends_the_export_and_lets_the_engine_go_on() -> None:
    source = _Source()
    calls: list[str] = []
    transport = InProcess(
        source=source,
        receiver=_Refuses(source),
        pause=lambda: calls.append("pause"),
        resume=lambda: calls.append("resume"),
    )
    with pytest.raises(EngineError, match="the engine takes no more"):
        transport.publish(3)
    assert source.ended and calls == ["pause", "resume"]


def test_a_version_has_to_be_above_all_before() -> None:
    source = _Source()
    transport = InProcess(source=source, receiver=_Receiver(source))
    transport.publish(3)
    for version in (3, 2):
        with pytest.raises(EngineError, match=f"version {version} is published after 3"):
            transport.publish(version)
    transport.publish(4)
