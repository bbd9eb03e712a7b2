"""Shared memory: handles for every rank, torch's settings as they were, nothing left behind."""

import gc
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from megatron_spear.errors import EngineError
from megatron_spear.testing.servers import FakeFleet, ServerProcesses
from megatron_spear.testing.transports import MODEL, RandomSource
from megatron_spear.weight_sync.ipc import Ipc
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport

CPU = torch.device("cpu")


@pytest.fixture
def fleet():
    with ServerProcesses(2) as processes, FakeFleet(processes.addresses, None) as servers:
        yield servers


def _transport(fleet: FakeFleet) -> ServerTransport:
    return ServerTransport(
        source=RandomSource(),
        manifest=Manifest.of_model(MODEL, "model"),
        servers=fleet,
        delivery=Ipc(bucket_bytes=6000, device=CPU),
        control=None,
        deadline_s=60.0,
    )


def _shared() -> set[Path]:
    """This process's."""
    gc.collect()
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def test_a_payload_is_small_and_of_sglangs_form(fleet: FakeFleet, monkeypatch) -> None:
    payloads: list[bytes] = []
    receive = fleet.servers[0].receive_payloads

    def note(sent, load_format, policy_version):
        payloads.extend(sent)
        assert load_format == "flattened_bucket"
        return receive(sent, load_format, policy_version)

    monkeypatch.setattr(fleet.servers[0], "receive_payloads", note)
    _transport(fleet).publish(0)
    assert len(payloads) > 2 and max(map(len, payloads)) < 4000, "handles, not tensors"
    assert all(b"rebuild_storage_filename" in payload for payload in payloads)
    assert all(b"rebuild_storage_fd" not in payload for payload in payloads)


def test_torchs_sharing_strategy_stays(fleet: FakeFleet) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    _transport(fleet).publish(0)
    assert torch.multiprocessing.get_sharing_strategy() == before == "file_descriptor"


def test_what_a_refusing_server_never_read_goes_with_the_next_update(fleet: FakeFleet) -> None:
    before = _shared()
    transport = _transport(fleet)
    transport.publish(0)
    assert _shared() == before
    fleet.servers[1].fail("receive_payloads", "refuse")
    transport.publish(1)
    assert len(_shared() - before) == 1
    transport.publish(2)
    assert _shared() == before


def test_no_shared_memory_is_told(fleet: FakeFleet) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(
            EngineError, match=r"no shared memory of 6288 bytes .* weight_sync.bucket_bytes"
        ):
            _transport(fleet).publish(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert fleet.events == ["pause", "resume"]


def test_a_pickle_is_made_of_what_sglang_lets_through() -> None:
    """Names of the standard library and torch only: its unpickler refuses others."""
    import pickletools

    from megatron_spear.weight_sync.buckets import pack
    from megatron_spear.weight_sync.ipc import payload_of

    (bucket,) = pack([("w", torch.ones(2))], 8, lambda size: torch.empty(size, dtype=torch.uint8))
    payload = payload_of(bucket)
    strings = [
        arg
        for op, arg, _ in pickletools.genops(payload)
        if op.name in ("SHORT_BINUNICODE", "GLOBAL")
    ]
    modules = {text.split(".")[0] for text in strings if isinstance(text, str) and "." in text}
    assert modules <= {"torch", "types", "collections"}
    read = pickle.loads(payload)
    (spec,) = read["metadata"]
    assert (spec.name, spec.start_idx, spec.end_idx, spec.numel) == ("w", 0, 8, 8)
    assert read["flattened_tensor"].view(torch.float32).tolist() == [1.0, 1.0]
