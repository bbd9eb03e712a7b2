"""Frames on the socket between the pool and a worker: many calls travel in one write.

A frame is a header (payload length and call id, little endian) and a pickled payload. Frames are
only ever exchanged between a process and the workers it started itself, or with a server after both
have shown that they know the attempt's secret (``env_handshake``).
"""

import pickle
import struct
from typing import Any

_HEADER = struct.Struct("<IQ")
READ_BYTES = 1 << 18
ENDED = (1 << 64) - 1
"""Call id of a server's last frame: ``(True, (how its worker ended, the call it was busy with))``.
"""


def pack(call_id: int, payload: Any) -> bytes:
    """One frame; raises whatever pickle raises when the payload cannot travel."""
    body = pickle.dumps(payload, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body), call_id) + body


class FrameReader:
    """Cuts a byte stream into frames.

    Example: ``feed(pack(7, "a") + pack(8, "b"))`` returns ``[(7, <pickle of "a">), (8, ...)]``;
    half a frame stays until the rest is fed.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames completed by ``data`` as (call id, payload still pickled)."""
        buffer = self._buffer
        buffer += data
        frames, at = [], 0
        while len(buffer) - at >= _HEADER.size:
            length, call_id = _HEADER.unpack_from(buffer, at)
            end = at + _HEADER.size + length
            if len(buffer) < end:
                break
            frames.append((call_id, bytes(buffer[at + _HEADER.size : end])))
            at = end
        del buffer[:at]
        return frames
