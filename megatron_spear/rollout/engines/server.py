"""One engine server of any make, as the fleet sees it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import GenerationRequest, PauseMode
from megatron_spear.rollout.engines.http import JsonClient, ServerLost


class Tensor(Protocol):
    """A tensor that will be sent: a ``weight_sync.servers.TensorSpec``, say."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Group(Protocol):
    """Where a process group meets: a ``weight_sync.servers.GroupAddress``, say."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """What a server was started with.

    ``max_context``: most tokens of prompt and answer together; a prompt of one token less still
    gets an answer. ``num_ranks``: processes that each hold a part of the weights.
    """

    max_context: int
    num_ranks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer to one HTTP request.

    ``reason``: ``stop`` (any of the server's stop tokens, the last of ``token_ids``), ``length``,
    or ``abort``: somebody made the server end it. ``labels``: ``(label, number of tokens)`` runs
    that add up to the tokens; one of 0 tokens where there are none.
    """

    token_ids: list[int]
    logprobs: list[float]
    reason: Literal["stop", "length", "abort"]
    labels: list[tuple[str, int]]


class EngineServer(Protocol):
    """One server. Methods raise what ``engines.http`` lists; all but ``generate`` end within a
    deadline."""

    name: str
    """Its URL."""

    async def inspect(self) -> ServerInfo:
        """What it was started with; raises EngineError where such a server cannot be used."""
        ...

    async def label(self) -> str:
        """Which weights it holds, by its own word; also while it is paused. The health check."""
        ...

    async def generate(
        self, request: GenerationRequest, token_ids: list[int], max_new_tokens: int, rid: str
    ) -> Answer:
        """Draw up to ``max_new_tokens`` after ``token_ids`` as the request's sampling says; ``rid``
        names it in ``abort``. It has no deadline: the caller cancels it."""
        ...

    async def abort(self, rid: str) -> None:
        """End a request; an unknown one is fine."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Stop drawing; see ``RolloutEngine.pause``."""
        ...

    async def resume(self) -> None:
        """Go on drawing; fine where it was not paused."""
        ...

    async def release_memory(self) -> None:
        """Give the memory of weights and caches to whoever shares the device; nothing may be
        generating."""
        ...

    async def resume_memory(self) -> None:
        """Take the memory again; weights are undefined until the next whole update."""
        ...

    async def parameter_names(self) -> frozenset[str] | None:
        """See ``weight_sync.servers.UpdateServer``, as for all that follow."""
        ...

    async def begin_update(self) -> None: ...

    async def end_update(self, label: str) -> None: ...

    async def load_folder(self, folder: str, label: str) -> None: ...

    async def relabel(self, label: str) -> None:
        """Give the present weights another label."""
        ...

    async def join_group(self, group: Group, first_rank: int) -> None: ...

    async def leave_group(self, name: str) -> None: ...

    async def receive_broadcast(self, tensors: Sequence[Tensor], group: str) -> None: ...

    async def receive_payloads(
        self, payloads: Sequence[bytes], load_format: str | None
    ) -> None: ...

    async def close(self) -> None:
        """Drop its connections."""
        ...


def malformed(server: str, what: str, got: object) -> EngineError:
    """The error for an answer that a server of this make should not give."""
    return EngineError(
        f"{server} answered {what}: {got!r:.300}; is it of the configured make and version?"
    )


async def weight_version(http: JsonClient, path: str, deadline_s: float) -> str:
    """The label at ``path``; ServerLost for an answer without one."""
    info = await http.get(path, deadline_s=deadline_s)
    if not isinstance(info, dict) or "weight_version" not in info:
        raise ServerLost(str(malformed(http.url, f"{path} with no weight_version", info)))
    return str(info["weight_version"])


def read_generation(server: str, answer: Any, read: Callable[[Any], Answer]) -> Answer:
    """What ``read`` makes of a server's answer; ServerLost where it is of another form."""
    try:
        return read(answer)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = f"a generation that cannot be read ({type(error).__name__}: {error})"
        raise ServerLost(str(malformed(server, what, answer))) from error


def label_runs(spans: Sequence[Mapping[str, Any]], size: int) -> list[tuple[str, int]]:
    """``Answer.labels`` from ``{"version", "start", "end"}`` spans, half-open, of ``size`` tokens.

    Raises ValueError, KeyError or TypeError where they do not follow one another to the end.
    """
    runs, end = [], 0
    for span in spans:
        if span["start"] != end or span["end"] < end:
            raise ValueError(f"weight_versions {spans}")
        runs.append((span["version"], span["end"] - end))
        end = span["end"]
    if end != size:
        raise ValueError(f"weight_versions {spans} of {size} tokens")
    return runs
