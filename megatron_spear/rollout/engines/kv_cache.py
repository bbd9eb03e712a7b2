"""Keys and values of the contexts an engine holds, one slot a context, and who owns which slot."""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from megatron_spear.types import TokenArray


class KVCache:
    """Preallocated keys and values with the tokens they belong to.

    ``storage`` ``[layers, 2, slots, kv_heads, max_context, head_dim]`` (index 0 keys, 1 values);
    ``tokens`` int32 ``[slots, max_context]`` and ``length`` int64 ``[slots]`` say which tokens a
    slot holds. Positions from ``length`` on hold old but finite numbers: masked, never NaN.

    A slot whose session was released or evicted keeps its tokens until somebody takes it: they can
    still be copied as a shared prefix.
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        max_context: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.storage = torch.zeros(layers, 2, slots, kv_heads, max_context, head_dim, dtype=dtype)
        self.tokens = np.zeros((slots, max_context), np.int32)
        self.length = np.zeros(slots, np.int64)
        self._sessions: dict[str, int] = {}
        self._owner: list[str | None] = [None] * slots
        self._last_used = np.zeros(slots, np.int64)
        self._clock = 0

    def slot_of(self, session: str) -> int | None:
        """The slot that holds a session, or None."""
        return self._sessions.get(session)

    def acquire(self, session: str, busy: Collection[int]) -> int | None:
        """The session's slot: its own, a free one, or that of the idle session used longest ago.

        ``busy`` slots are never taken from their owner. None = all are busy.
        """
        slot = self._sessions.get(session)
        if slot is None:
            slot = self._free_slot(busy)
            if slot is None:
                return None
            previous = self._owner[slot]
            if previous is not None:
                del self._sessions[previous]
            self._owner[slot] = session
            self._sessions[session] = slot
        self._clock += 1
        self._last_used[slot] = self._clock
        return slot

    def release(self, session: str) -> None:
        """Give a session's slot back; unknown sessions are fine."""
        slot = self._sessions.pop(session, None)
        if slot is not None:
            self._owner[slot] = None

    def wipe(self, slot: int) -> None:
        """Forget a slot's content and zero it, after numbers that may not be finite."""
        self.storage[:, :, slot].zero_()
        self.length[slot] = 0

    def clear(self) -> None:
        """Drop every context and owner (the weights changed)."""
        self.length[:] = 0
        self._sessions.clear()
        self._owner = [None] * len(self._owner)

    def free(self) -> None:
        """Drop every context and give the memory back until ``restore``."""
        self.clear()
        self.storage.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Memory for contexts again."""
        self.storage.untyped_storage().resize_(self.storage.numel() * self.storage.itemsize)
        self.storage.zero_()

    def common_prefix(self, token_ids: TokenArray) -> np.ndarray:
        """int64 ``[slots]``: how many of the first tokens each slot holds already."""
        size = len(token_ids)
        same = self.tokens[:, :size] == token_ids
        same &= np.arange(size) < self.length[:, None]
        return np.where(same.all(1), size, same.argmin(1))

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of a slot."""
        assert length <= self.length[slot], "a cache can only get shorter"
        self.length[slot] = length

    def append(self, slot: int, token_ids: TokenArray) -> None:
        """Note that keys and values of further tokens were written."""
        start = int(self.length[slot])
        self.tokens[slot, start : start + len(token_ids)] = token_ids
        self.length[slot] = start + len(token_ids)

    def copy(self, source: int, targets: Sequence[int], start: int, stop: int) -> None:
        """Copy positions ``start..stop`` of a slot to others that hold ``start`` tokens or more."""
        part = self.storage[:, :, source, :, start:stop]
        for target in targets:
            assert self.length[target] >= start, "a copied prefix may leave no gap"
            self.storage[:, :, target, :, start:stop] = part
            self.tokens[target, start:stop] = self.tokens[source, start:stop]
            self.length[target] = stop

    def _free_slot(self, busy: Collection[int]) -> int | None:
        # Low slots first: decoding runs over a range of slots, best without gaps.
        for slot, owner in enumerate(self._owner):
            if owner is None and slot not in busy:
                return slot
        idle = [slot for slot in range(len(self._owner)) if slot not in busy]
        return min(idle, key=lambda slot: self._last_used[slot], default=None)
