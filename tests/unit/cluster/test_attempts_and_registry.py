"""The folder of an attempt, and files of others that are half there."""

import json
from pathlib import Path

from fake_programs import new_attempt

from megatron_spear.cluster.registry import Registration, register, registrations, unregister


def engine(index: int, address: str, launch: int = 0) -> Registration:
    return Registration(role="engine", index=index, address=address, node="n", pid=1, launch=launch)


def test_a_registration_is_read_back_replaced_and_removed(tmp_path: Path) -> None:
    for one in (engine(1, "http://b"), engine(0, "http://a"), engine(10, "http://c")):
        register(tmp_path, one)
    assert [r.index for r in registrations(tmp_path, "engine")] == [0, 1, 10]
    register(tmp_path, engine(1, "http://d", launch=1))
    assert registrations(tmp_path, "engine")[1] == engine(1, "http://d", launch=1)
    unregister(tmp_path, "engine", 1)
    unregister(tmp_path, "engine", 1)
    assert [r.index for r in registrations(tmp_path, "engine")] == [0, 10]
    assert registrations(tmp_path, "trainer") == []


def test_half_written_registrations_are_passed_over_and_the_others_read(tmp_path: Path) -> None:
    register(tmp_path, engine(0, "http://a"))
    whole = (tmp_path / "engine_0.json").read_text()
    (tmp_path / "engine_1.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "engine_2.json").write_text("")
    (tmp_path / "engine_3.json").write_text('{"role": "engine"}')
    (tmp_path / "engine_4.json.tmp").write_text(whole)
    assert [r.index for r in registrations(tmp_path, "engine")] == [0]
    (tmp_path / "engine_1.json").write_text(whole.replace('"index": 0', '"index": 1'))
    assert [r.index for r in registrations(tmp_path, "engine")] == [0, 1]


def test_what_is_said_in_an_attempt_is_read_there(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    assert (attempt.model(), attempt.num_done(), attempt.failures()) == (None, 0, [])
    attempt.tell_model(tmp_path / "m")
    attempt.mark_done(0)
    attempt.mark_done(11)
    attempt.mark_failed("trainer", 1, "status 1")
    assert attempt.model() == tmp_path / "m"
    assert attempt.num_done() == 2
    assert attempt.failures() == ["trainer_1: status 1"]
    (attempt.path / "model.json").write_text(json.dumps({"path": "/x"})[:-3])
    (attempt.done / "trainer_3.tmp").touch()
    assert (attempt.model(), attempt.num_done()) == (None, 2)


def test_the_secret_is_the_owners_and_differs_between_attempts(tmp_path: Path) -> None:
    one, other = new_attempt(tmp_path), new_attempt(tmp_path)
    assert one.secret_file.stat().st_mode & 0o077 == 0
    assert len(one.secret_file.read_text().strip()) == 64
    assert one.secret_file.read_text() != other.secret_file.read_text()
