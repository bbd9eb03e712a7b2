"""The bytes of one stored trajectory, and its row in the index.

    record = meta bytes u32 | meta (JSON, padded with blanks) | arrays             (little endian)
    arrays = every sample's token_ids, then every sample's rollout_logprobs, ... as in ``_ARRAYS``

Meta ends at a multiple of 4 and the masks come last, so that the numbers lie aligned. A record has
no checksum of its own: it stands in the index of its file (``segment``).
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_spear.replay.index import key_of
from megatron_spear.types import Reward, TrainSample, TrajectoryId

_META = struct.Struct("<I")
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_ARRAYS = (
    ("token_ids", "<i4", np.int32),
    ("rollout_logprobs", "<f4", np.float32),
    ("old_logprobs", "<f4", np.float32),
    ("advantages", "<f4", np.float32),
    ("turn_starts", "<i4", np.int32),
    ("response_mask", "|b1", np.bool_),
)


def encode(samples: Sequence[TrainSample]) -> list[memoryview]:
    """One record, all segments of one trajectory, in pieces: nothing is copied to join them."""
    first = samples[0]
    arrays = [
        [np.ascontiguousarray(getattr(sample, name), stored) for name, stored, _ in _ARRAYS]
        for sample in samples
    ]
    meta = _to_json(
        {
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
                    "lengths": [len(array) for array in own],
                    "anchors": list(sample.anchors),
                    "policy_version": sample.policy_version,
                    "tool_calls": sample.tool_calls,
                }
                for sample, own in zip(samples, arrays, strict=True)
            ],
        }
    ).encode()
    meta += b" " * (-len(meta) % 4)
    pieces = [array.data for same in zip(*arrays, strict=True) for array in same]
    return [memoryview(_META.pack(len(meta)) + meta), *pieces]


def decode(record: memoryview) -> list[TrainSample]:
    """The samples of one record whose checksum holds; arrays are views into it."""
    (meta_size,) = _META.unpack_from(record)
    offset = _META.size + meta_size
    meta = json.loads(bytes(record[_META.size : offset]))
    arrays: list[dict[str, Any]] = [{} for _ in meta["samples"]]
    for at, (name, stored, dtype) in enumerate(_ARRAYS):
        for saved, found in zip(meta["samples"], arrays, strict=True):
            array = np.frombuffer(record, stored, saved["lengths"][at], offset)
            offset += array.nbytes
            found[name] = array.astype(dtype, copy=False)
    reward = Reward(**meta["reward"])
    return [
        TrainSample(
            trajectory_id=TrajectoryId(group=meta["group"], member=meta["member"]),
            segment=saved["segment"],
            num_segments=meta["num_segments"],
            prompt_id=meta["prompt_id"],
            reward=reward,
            anchors=tuple(saved["anchors"]),
            policy_version=saved["policy_version"],
            tool_calls=saved["tool_calls"],
            **found,
        )
        for saved, found in zip(meta["samples"], arrays, strict=True)
    ]


def describe(samples: Sequence[TrainSample]) -> tuple[float, ...]:
    """What ``ReplayIndex`` holds of one trajectory behind its row id, in that order.

    Example: two segments with advantages (0, 1) and (3), all but the 0 masked, have mean 2.
    """
    first = samples[0]
    total = sum(float(sample.advantages.sum()) for sample in samples)  # 0 outside the mask
    num_masked = sum(int(np.count_nonzero(sample.response_mask)) for sample in samples)
    return (
        min(sample.policy_version for sample in samples),
        first.reward.outcome,
        first.reward.intrinsic,
        first.reward.format,
        total / max(num_masked, 1),
        sum(len(sample.token_ids) for sample in samples),
        key_of(first.prompt_id),
        key_of(str(first.trajectory_id)),
    )
