"""How the trainer finds the engine servers of its launch."""

import threading
import time
from pathlib import Path

import pytest

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.registry import Registration, register
from megatron_spear.config.load import load_config
from megatron_spear.deadlines import StopFlag
from megatron_spear.errors import EngineError, StopRequested
from megatron_spear.tracking.progress import Console
from megatron_spear.trainer.registered import RegisteredEngines, find_servers

SERVERS = ("rollout.engine=sglang", "cluster.servers.count=2")


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt.begin(tmp_path)


def add(attempt: Attempt, role: str, index: int, address: str) -> None:
    found = Registration(role=role, index=index, address=address, node="n", pid=1)
    register(attempt.registry, found)


def test_it_waits_until_all_are_there(attempt: Attempt) -> None:
    add(attempt, "engine", 1, "http://b:2")
    later = threading.Timer(0.2, add, (attempt, "engine", 0, "http://a:1"))
    later.start()
    told: list[str] = []
    engines = RegisteredEngines(attempt=attempt, count=2)
    assert engines.wait(10.0, StopFlag(), told.append) == ["http://a:1", "http://b:2"]
    assert told[0] == "engine servers: 1 of 2"
    later.join()


def test_after_the_deadline_it_goes_on_with_those_that_are_there(attempt: Attempt) -> None:
    add(attempt, "engine", 1, "http://b:2")
    (attempt.registry / "engine_0.json").write_text('{"role": "eng')
    engines = RegisteredEngines(attempt=attempt, count=2)
    began = time.monotonic()
    assert engines.wait(0.1, StopFlag(), lambda text: None) == ["http://b:2"]
    assert time.monotonic() - began < 2.0
    assert engines.urls() == ["http://b:2"]


def test_without_any_it_says_where_to_look(attempt: Attempt) -> None:
    engines = RegisteredEngines(attempt=attempt, count=2)
    with pytest.raises(EngineError, match="none of 2 engine servers has registered") as caught:
        engines.wait(0.0, StopFlag(), lambda text: None)
    assert str(attempt.path / "log") in str(caught.value)


def test_a_stop_ends_the_wait(attempt: Attempt) -> None:
    stop = StopFlag()
    stop.request("SIGTERM")
    with pytest.raises(StopRequested, match="SIGTERM while engine servers were starting"):
        RegisteredEngines(attempt=attempt, count=1).wait(60.0, stop, lambda text: None)


def test_the_settings_name_the_servers_and_the_controllers_host(attempt: Attempt) -> None:
    for index in (0, 1):
        add(attempt, "engine", index, f"http://n{index}:1")
    add(attempt, "trainer", 0, "n7:4000")
    config = load_config(None, SERVERS)
    found, list_urls = find_servers(config, attempt, True, StopFlag(), Console(enabled=False))
    assert found.rollout.servers == ("http://n0:1", "http://n1:1")
    assert found.weight_sync.host == "n7"
    assert list_urls is not None
    add(attempt, "engine", 1, "http://n1:9")
    assert list_urls() == ["http://n0:1", "http://n1:9"]
    own = load_config(None, [*SERVERS, "weight_sync.host=other"])
    assert find_servers(own, attempt, True, StopFlag(), Console(enabled=False))[0].weight_sync.host


def test_without_a_launch_or_servers_of_it_nothing_changes(attempt: Attempt) -> None:
    console = Console(enabled=False)
    for config, launch in ((load_config(None, SERVERS), None), (load_config(None), attempt)):
        assert find_servers(config, launch, True, StopFlag(), console) == (config, None)
