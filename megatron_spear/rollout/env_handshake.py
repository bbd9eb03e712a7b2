"""Both ends of a connection to an environment server show that they know the secret.

Frames are pickled, and whoever may send a pickle may run code; so nothing is unpickled before this:

    server -> pool   greeting, nonce of the server
    pool -> server   nonce of the pool, HMAC-SHA256(secret, "pool" + both nonces)
    server -> pool   HMAC-SHA256(secret, "server" + both nonces)

It keeps out whoever connects without the secret, on purpose or by mistake. It does not hide or seal
what follows: somebody who can change packets of the cluster's network is not kept out.
"""

import hmac
import secrets
import socket
import time
from pathlib import Path

from megatron_spear.errors import ConfigError

_GREETING = b"megatron-spear environment server 1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_MIN_SECRET_BYTES = 16


def read_secret(path: Path) -> bytes:
    """The secret in a file; ConfigError where others may read it, or where it is no secret."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the secret of environment workers, {path}: {error}") from error
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode {mode:o}); expected 600: chmod it")
    if len(secret) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"{path} holds {len(secret)} bytes, expected {_MIN_SECRET_BYTES} or more; "
            "`megatron-spear launch` makes one for each attempt"
        )
    return secret


def prove_to_server(channel: socket.socket, secret: bytes, limit_s: float) -> None:
    """The pool's side, within ``limit_s``. Raises OSError where the server is none of ours."""
    deadline = time.monotonic() + limit_s
    greeting = _read(channel, len(_GREETING) + _NONCE_BYTES, deadline)
    if not greeting.startswith(_GREETING):
        raise ConnectionError(f"greets with {greeting[:20]!r}; it is no environment server of ours")
    own = secrets.token_bytes(_NONCE_BYTES)
    nonces = greeting[len(_GREETING) :] + own
    channel.sendall(own + _proof(secret, b"pool", nonces))
    answer = _read(channel, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(answer, _proof(secret, b"server", nonces)):
        raise ConnectionError("does not know the secret of this attempt")


def prove_to_pool(channel: socket.socket, secret: bytes, limit_s: float) -> None:
    """The server's side, within ``limit_s``. Raises OSError where the caller is none of ours."""
    deadline = time.monotonic() + limit_s
    own = secrets.token_bytes(_NONCE_BYTES)
    channel.settimeout(limit_s)
    channel.sendall(_GREETING + own)
    answer = _read(channel, _NONCE_BYTES + _PROOF_BYTES, deadline)
    nonces = own + answer[:_NONCE_BYTES]
    if not hmac.compare_digest(answer[_NONCE_BYTES:], _proof(secret, b"pool", nonces)):
        raise ConnectionError("does not know the secret of this attempt")
    channel.sendall(_proof(secret, b"server", nonces))


def _proof(secret: bytes, side: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, side + nonces, "sha256")


def _read(channel: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly ``count`` bytes; OSError at the deadline or where the stream ends before."""
    found = b""
    while len(found) < count:
        channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            data = channel.recv(count - len(found))
        except TimeoutError:
            raise TimeoutError(f"sent {len(found)} of {count} bytes of the handshake") from None
        if not data:
            raise ConnectionError(f"closed the connection after {len(found)} of {count} bytes")
        found += data
    return found
