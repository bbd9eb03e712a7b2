"""Small things done to texts that a model or a tool wrote."""


def plain(text: str) -> str:
    """The text with lone surrogates replaced by ``?``: what can be tokenised and written to a file.

    A model gets one past its tokenizer as ``"\\ud800"`` in JSON.
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def shortened(text: str, max_chars: int = 80) -> str:
    """At most ``max_chars`` characters of the text, for messages: its start and ``...``."""
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def middle_left_out(text: str, max_chars: int) -> str:
    """The start and the end of a text that is too long, with a line between them that says so.

    Example: 1000 characters at most 100: the first 50, ``[900 characters left out]``, the last 50.
    """
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    gap = f"\n[{len(text) - 2 * half} characters left out]\n"
    return text[:half] + gap + text[len(text) - half :]
