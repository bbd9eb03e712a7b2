"""The engine servers and environment workers of a launch, as the trainer finds them."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.registry import registration, registrations
from megatron_spear.config.schema import RunConfig
from megatron_spear.deadlines import StopFlag
from megatron_spear.errors import EngineError, SpearError, StopRequested
from megatron_spear.rollout.env_handshake import read_secret
from megatron_spear.rollout.env_remote import RemoteWorkers
from megatron_spear.tracking.progress import Console

log = logging.getLogger(__name__)

_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredEngines:
    """The servers that are registered in an attempt; ``count`` were asked for."""

    attempt: Attempt
    count: int

    def urls(self) -> list[str]:
        """Those that can be reached now. One that was started again has another URL."""
        return [found.address for found in registrations(self.attempt.registry, "engine")]

    def wait(self, deadline_s: float, stop: StopFlag, beat: Callable[[str], None]) -> list[str]:
        """The URLs once all are there, or of those that are after ``deadline_s``.

        Others may come later. Raises EngineError where none is, StopRequested at a clean stop.
        """
        give_up = time.monotonic() + deadline_s
        while len(urls := self.urls()) < self.count:
            if stop:
                raise StopRequested(f"{stop.reason} while engine servers were starting")
            if time.monotonic() > give_up:
                break
            beat(f"engine servers: {len(urls)} of {self.count}")
            time.sleep(_LOOK_S)
        if not urls:
            raise EngineError(
                f"none of {self.count} engine servers has registered within {deadline_s:g} s; "
                f"their logs are in {self.attempt.path / 'log'}"
            )
        if len(urls) < self.count:
            log.warning(
                "%d of %d engine servers have registered within %g s; the others join when they do",
                len(urls),
                self.count,
                deadline_s,
            )
        return urls

    def own_host(self) -> str | None:
        """The address of the node that the controller is on; None if it has not been said."""
        found = registrations(self.attempt.registry, "trainer")
        return found[0].address.rpartition(":")[0] if found else None


def find_servers(
    config: RunConfig, attempt: Attempt | None, controller: bool, stop: StopFlag, console: Console
) -> tuple[RunConfig, Callable[[], list[str]] | None]:
    """The settings with the servers that ``launch`` has started for them, and what lists them later
    on; collective. Without such servers the settings as they are."""
    section = config.cluster.servers
    if attempt is None or not section.count:
        return config, None
    from megatron_spear.trainer.ranks import broadcast

    engines = RegisteredEngines(attempt=attempt, count=section.count)
    found: tuple[list[str], str | None] | SpearError = ([], None)
    if controller:
        console.phase("Waiting for engine servers")
        try:
            urls = engines.wait(section.start_deadline_s, stop, console.beat)
            found = urls, engines.own_host()
        except (StopRequested, EngineError) as error:
            found = error
    found = broadcast(found)
    if isinstance(found, SpearError):
        raise found
    return _with_servers(config, *found), engines.urls


def environment_workers(attempt: Attempt) -> RemoteWorkers:
    """How to reach the environment workers of an attempt, wherever they are at the time."""

    def address(index: int) -> str | None:
        found = registration(attempt.registry, "environment", index)
        return found.address if found is not None else None

    return RemoteWorkers(address=address, secret=read_secret(attempt.secret_file))


def _with_servers(config: RunConfig, urls: list[str], host: str | None) -> RunConfig:
    """The settings with these servers, which find the controller at ``host`` unless it is set."""
    sync = config.weight_sync
    if sync.host is None:
        sync = sync.model_copy(update={"host": host})
    rollout = config.rollout.model_copy(update={"servers": tuple(urls)})
    return config.model_copy(update={"rollout": rollout, "weight_sync": sync})
