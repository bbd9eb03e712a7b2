"""The few exceptions of the package. Each message says what, got, expected and what to do."""

import os


class SpearError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a
    traceback."""


class ConfigError(SpearError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(SpearError, ValueError):
    """A game, prompt or token file that cannot be read or does not fit."""


class CheckpointError(SpearError, RuntimeError):
    """A checkpoint (Hugging Face folder or run checkpoint) that is missing, truncated or does
    not match."""


class EngineError(SpearError, RuntimeError):
    """A rollout engine that failed, or whose answer breaks its contract."""


class EnvironmentFault(SpearError, RuntimeError):
    """An environment that failed, died or missed its deadline; costs one trajectory, never a
    reward."""


class EnvironmentsLost(SpearError, RuntimeError):
    """Environment workers that cannot be kept alive; ends the run."""


class HookError(SpearError, RuntimeError):
    """A hook that raised, or gave what its point does not take; ends the run."""


class PeerLost(SpearError, RuntimeError):
    """Another trainer rank is gone, so this one cannot go on; says which and what is known of
    it."""


class StopRequested(SpearError):
    """A clean stop was asked for (Ctrl-C, SIGTERM, SIGUSR1); the run can be resumed."""


def describe(error: BaseException) -> str:
    """``Type: message (file:line)`` of the innermost frame, without Python's import machinery."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<frozen importlib"):
            where = f" ({os.path.basename(file)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{where}"
