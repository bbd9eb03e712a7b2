"""The bytes of one replay segment file: trajectories with their arrays, each with a checksum.

    file    = MAGIC (8 bytes) | record | record | ...
    record  = crc32 u32 | meta bytes u32 | payload bytes u64 | payload        (little endian)
    payload = meta (JSON) | arrays of every sample, in the order of ``_ARRAYS``, without padding

``payload bytes`` counts meta and arrays; the crc covers the payload. Files are written once, whole,
and never changed.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_spear.errors import CheckpointError
from megatron_spear.types import Reward, TrainSample, TrajectoryId

MAGIC = b"MSREPL01"
RESTORE = "restore the file, or resume the run: it goes back to a checkpoint that does not need it"
"""What to do about a damaged file."""

_HEADER = struct.Struct("<IIQ")
_ARRAYS = (
    ("token_ids", "<i4", np.int32),
    ("response_mask", "|b1", np.bool_),
    ("rollout_logprobs", "<f4", np.float32),
    ("old_logprobs", "<f4", np.float32),
    ("advantages", "<f4", np.float32),
    ("turn_starts", "<i4", np.int32),
)


def encode(samples: Sequence[TrainSample]) -> bytes:
    """One record: all segments of one trajectory."""
    first = samples[0]
    meta = {
        "group": first.trajectory_id.group,
        "member": first.trajectory_id.member,
        "prompt_id": first.prompt_id,
        "num_segments": first.num_segments,
        "reward": {
            "outcome": first.reward.outcome,
            "intrinsic": first.reward.intrinsic,
            "format": first.reward.format,
            "parts": dict(first.reward.parts),
        },
        "samples": [
            {
                "segment": sample.segment,
                "lengths": [len(getattr(sample, name)) for name, _, _ in _ARRAYS],
                "anchors": list(sample.anchors),
                "policy_version": sample.policy_version,
                "tool_calls": sample.tool_calls,
            }
            for sample in samples
        ],
    }
    meta_bytes = json.dumps(meta, separators=(",", ":")).encode()
    pieces = [meta_bytes]
    for sample in samples:
        for name, stored, _ in _ARRAYS:
            pieces.append(np.asarray(getattr(sample, name)).astype(stored).tobytes())
    payload = b"".join(pieces)
    return _HEADER.pack(zlib.crc32(payload), len(meta_bytes), len(payload)) + payload


def decode(record: bytes, source: str) -> list[TrainSample]:
    """The samples of one record; CheckpointError naming ``source`` if its checksum does not match.

    The arrays are read-only views into ``record``.
    """
    payload, meta = _open(memoryview(record), source)
    reward = Reward(**meta["reward"])
    offset = _HEADER.unpack_from(record)[1]
    samples = []
    for saved in meta["samples"]:
        arrays: dict[str, Any] = {}
        for (name, stored, dtype), length in zip(_ARRAYS, saved["lengths"], strict=True):
            array = np.frombuffer(payload, np.dtype(stored), length, offset)
            offset += array.nbytes
            arrays[name] = array.astype(dtype, copy=False)
        samples.append(
            TrainSample(
                trajectory_id=TrajectoryId(group=meta["group"], member=meta["member"]),
                segment=saved["segment"],
                num_segments=meta["num_segments"],
                prompt_id=meta["prompt_id"],
                reward=reward,
                anchors=tuple(saved["anchors"]),
                policy_version=saved["policy_version"],
                tool_calls=saved["tool_calls"],
                **arrays,
            )
        )
    return samples


def split_records(content: bytes, source: str) -> Iterator[tuple[int, int]]:
    """(offset, size) of each record of a whole file; CheckpointError if it is cut or not ours."""
    if content[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{source}: not a replay segment of this version (starts with {content[:8]!r}, "
            f"expected {MAGIC!r}); {RESTORE}"
        )
    offset = len(MAGIC)
    while offset < len(content):
        if len(content) - offset < _HEADER.size:
            raise _truncated(source, offset, _HEADER.size, len(content))
        size = _HEADER.size + _HEADER.unpack_from(content, offset)[2]
        if len(content) - offset < size:
            raise _truncated(source, offset, size, len(content))
        yield offset, size
        offset += size


def _open(record: memoryview, source: str) -> tuple[memoryview, dict[str, Any]]:
    if len(record) < _HEADER.size:
        raise _truncated(source, 0, _HEADER.size, len(record))
    checksum, meta_size, payload_size = _HEADER.unpack_from(record)
    payload = record[_HEADER.size :]
    if len(payload) != payload_size or zlib.crc32(payload) != checksum:
        raise CheckpointError(
            f"{source}: a replay record is corrupt (its crc32 or length does not match); {RESTORE}"
        )
    meta: dict[str, Any] = json.loads(bytes(payload[:meta_size]))
    return payload, meta


def _truncated(source: str, offset: int, needed: int, length: int) -> CheckpointError:
    return CheckpointError(
        f"{source}: truncated: a record at byte {offset} needs {needed} bytes, the file ends at "
        f"{length}; {RESTORE}"
    )
