"""Settings on a command line, ``a.b=c``, ``--a.b=c`` or ``--a.b c``, beside a command's own
options."""

import os
from collections.abc import Collection, Sequence

_FLAGS = ("--help", "--version", "--dry-run", "--force", "--json")
_OPTIONS = ("--model", "--attempt", "--gpus", "--chip", "--mean-length")


def split_settings(
    arguments: Sequence[str], options: Collection[str] = _OPTIONS
) -> tuple[list[str], list[str]]:
    """What a command's parser is to see (its ``options`` among it), and the settings.

    Example: ``["a.yaml", "--run.steps", "3", "--model", "m"]`` gives ``["a.yaml", "--model=m"]``
    and ``["--run.steps=3"]``.
    """
    words = _joined(arguments)
    settings = [word for word in words if _is_setting(word, options)]
    return [word for word in words if not _is_setting(word, options)], settings


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--a.b c`` as ``--a.b=c``, so that no value is taken for the YAML file."""
    words: list[str] = []
    for word in arguments:
        before = words[-1] if words else ""
        waits = before.startswith("--") and "=" not in before and before not in _FLAGS
        if waits and not word.startswith("--"):
            words[-1] = f"{before}={word}"
        else:
            words.append(word)
    return words


def _is_setting(word: str, options: Collection[str]) -> bool:
    if word.startswith("--"):
        return word.partition("=")[0] not in (*_FLAGS, *options)
    return "=" in word and not os.path.exists(word)
