"""The text of each sampled token, such that joined they are the whole text."""

from collections.abc import Callable, Sequence

from megatron_spear.types import TokenArray

_HALF = "\ufffd"
"""What a tokenizer decodes a part of a character to."""


class TokenTexts:
    """Texts of tokens, by a tokenizer's ``decode`` (ids -> text, special tokens included).

    Most tokens decode alone to what they are in a text, and are looked up. Where that does not add
    up, tokens are decoded behind the one before: a character spread over several tokens is the text
    of the last of them, the others are "", and a blank that only shows behind another token is
    kept. Where even that does not add up, each is what it is alone.

    Example (byte-level BPE, a duck of four bytes): tokens `` a``, three and one bytes give
    ``(" a", "", "🦆")``.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._alone: dict[int, str] = {}

    def whole(self, tokens: Sequence[int] | TokenArray) -> str:
        """The text of all the tokens."""
        return self._decode([int(token) for token in tokens])

    def of(self, tokens: Sequence[int] | TokenArray) -> tuple[str, tuple[str, ...]]:
        """The whole text of the tokens, and a text for each."""
        ids = [int(token) for token in tokens]
        whole = self._decode(ids)
        alone = tuple(self._text_alone(token) for token in ids)
        if "".join(alone) == whole:
            return whole, alone
        behind = self._one_behind_the_other(ids)
        return whole, behind if "".join(behind) == whole else alone

    def _text_alone(self, token: int) -> str:
        text = self._alone.get(token)
        if text is None:
            text = self._alone[token] = self._decode([token])
        return text

    def _one_behind_the_other(self, ids: list[int]) -> tuple[str, ...]:
        texts: list[str] = []
        start, before = 0, ""  # the text of the tokens from ``start`` on that have theirs
        for end in range(1, len(ids) + 1):
            now = self._decode(ids[start:end])
            if now.endswith(_HALF) and end < len(ids):
                texts.append("")
                continue
            texts.append(now.removeprefix(before))
            start = end - 1
            before = self._decode(ids[start:end])
        return tuple(texts)
