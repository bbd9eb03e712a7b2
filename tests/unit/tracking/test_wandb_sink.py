"""wandb works offline with no network, keeps its id, and says nothing on the console."""

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_spear.tracking.wandb_sink import wandb_mode

URL = "https://api.example.org"


@pytest.fixture
def no_wandb_settings(monkeypatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("no_wandb_settings")
def test_online_needs_a_key(monkeypatch, tmp_path: Path) -> None:
    assert wandb_mode(URL) == "offline"
    (tmp_path / "netrc").write_text("machine github.com login a password b\n")
    assert wandb_mode(URL) == "offline"
    (tmp_path / "netrc").write_text("machine api.example.org login user password key\n")
    assert wandb_mode(URL) == "online"
    (tmp_path / "netrc").write_text("garbage")
    assert wandb_mode(URL) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(URL) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(URL) == "disabled"


_TWO_LAUNCHES = """
    import sys
    from pathlib import Path
    from megatron_spear.tracking.wandb_sink import WandbSink
    for first in (1, 3):
        sink = WandbSink.open(Path(sys.argv[1]), project="p", name="n", config={"run": {"a": 9}})
        for step in (first, first + 1):
            sink.log(step, {"reward/mean": step / 10})
        sink.close()
"""


def test_two_launches_are_one_quiet_offline_run(tmp_path: Path, no_wandb_settings) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_TWO_LAUNCHES), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert files
    found = [record for file in files for record in history(file)]
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    assert [r["reward/mean"] for r in found] == [0.1, 0.2, 0.3, 0.4]


def history(path: Path) -> list[dict[str, float]]:
    """History records of a ``.wandb`` file: LevelDB log framing around protobuf."""
    from wandb.proto import wandb_internal_pb2

    data, at, buffer, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        buffer += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            buffer = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return found
