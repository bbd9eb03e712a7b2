"""The manifest of a large checkpoint takes long to check, and the watchdog lets it."""

import hashlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spear.errors import CheckpointError
from megatron_spear.heartbeats.heart import Heart, begin
from megatron_spear.trainer import manifest

LIMIT_S, PART_S, PARTS = 1.5, 0.25, 10


class _Slow:
    """A sha256 that takes a while for each part, as a busy file system does."""

    def __init__(self, data: bytes = b"") -> None:
        self._digest = hashlib.sha256(data)
        self.hexdigest = self._digest.hexdigest

    def update(self, part: memoryview) -> None:
        time.sleep(PART_S)
        self._digest.update(part)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read by 10 bytes."""
    monkeypatch.setattr(manifest, "_CHUNK", 10)


@pytest.mark.usefixtures("small_parts")
def test_a_check_that_goes_on_may_take_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(10 * PARTS)))
    manifest.write_manifest(tmp_path, 3)
    monkeypatch.setattr(manifest, "hashlib", SimpleNamespace(sha256=_Slow))
    ended: list[int] = []
    began = time.monotonic()
    with Heart(LIMIT_S, rank=0, world_size=1, folder=None, end=ended.append):
        begin("Policy and engine")
        manifest.check_manifest(tmp_path, 3)
    assert ended == [] and time.monotonic() - began > LIMIT_S


@pytest.mark.usefixtures("small_parts")
def test_files_are_hashed_whole_whatever_their_size(tmp_path: Path) -> None:
    contents = {f"{size}.bin": bytes(range(size)) for size in (0, 1, 9, 10, 11, 20, 95)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    manifest.write_manifest(tmp_path, 3)
    text = (tmp_path / manifest.MANIFEST).read_text()
    assert all(hashlib.sha256(content).hexdigest() in text for content in contents.values())
    (tmp_path / "95.bin").write_bytes(contents["95.bin"][:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"95\.bin has sha256"):
        manifest.check_manifest(tmp_path, 3)
