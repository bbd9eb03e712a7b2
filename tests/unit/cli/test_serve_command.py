"""``megatron-spear serve`` as a user gives it: what it says, how it stops, its exit status."""

import http.client
import json
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from megatron_spear.background import in_background
from megatron_spear.cli.main import main
from megatron_spear.testing.serve import serve_in_process
from megatron_spear.testing.tiny import tiny_hf_folder


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, words)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_hf_folder(path)
    return path


def test_a_taken_port_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run("no/such/folder", "--port", port) == 1
    told = capsys.readouterr().err
    assert f"error: cannot serve at 127.0.0.1:{port}: another process has it" in told
    assert "Traceback" not in told
    assert run("no/such/folder", "--host", "192.0.2.1") == 1


def test_mistakes_are_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("no/such/folder", "--port", 0), "no config.json"),
        ((folder, "--port", 0, "--max-context", 4096), "max_position_embeddings"),
        ((folder, "--port", 0, "--custom-weight-loader", "no.where"), "no.where: No module"),
        (
            (folder, "--port", 0, "--quantization", "fp8", "--custom-weight-loader", "os.getcwd"),
            "leave one of them out",
        ),
        ((folder, "--port", 70000), "expected 0 to 65535"),
        ((folder, "--max-slots", 0), "expected 1 or more"),
        ((folder, "--deadline-s", "inf"), "expected seconds above 0"),
        ((folder, "--threads", -1), "expected 0 or more"),
    ):
        assert run(*words) == 2
        told = capsys.readouterr().err
        assert message in told and "Traceback" not in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly_and_fails_what_runs(folder: Path, number: int) -> None:
    with serve_in_process(folder) as served:
        parts = urlsplit(served.url)

        def generate() -> tuple[int, bytes]:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 250}}
            connection.request("POST", "/generate", body=json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()

        running = [in_background(generate, "generate") for _ in range(8)]
        time.sleep(0.1)
        began = time.monotonic()
        served.process.send_signal(number)
        assert served.process.wait(20) == 0
        assert time.monotonic() - began < 15.0
        for future in running:
            try:
                status, answer = future.result(20)
            except OSError:  # it came after the signal
                continue
            assert status == 200 or (status == 503 and b"closed" in answer)
        assert served.process.stdout is not None
        assert served.process.stdout.read() == "", "one line, and that was the first"
