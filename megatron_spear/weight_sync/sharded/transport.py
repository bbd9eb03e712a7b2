"""The ``sharded`` transport: each engine rank gets just its slices, from training ranks that hold
them.

    all ranks     which servers are there, the plan for as many replicas (kept between updates)
    controller    pause
    all ranks     one lane a replica, side by side: ready? go, slices, done
    all ranks     what became of each lane
    controller    end the update of whole servers and admit them, take out the others; resume
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.slices import TensorSlice
from megatron_spear.errors import ConfigError, EngineError, SpearError, describe
from megatron_spear.weight_sync.export import require_newer
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.servers import UpdateServer, UpdateServers
from megatron_spear.weight_sync.sharded.lane import Lane
from megatron_spear.weight_sync.sharded.link import Deadline
from megatron_spear.weight_sync.sharded.records import Meeting
from megatron_spear.weight_sync.sharded.schedule import ReplicaSchedule, schedules
from megatron_spear.weight_sync.update import Update

logger = logging.getLogger(__name__)
T = TypeVar("T")


class SliceSource(Protocol):
    """What holds a rank's part of the weights: the policy."""

    def local_slices(self) -> Sequence[TensorSlice]:
        """What this rank holds of each Hugging Face tensor; collective."""
        ...


class Ranks(Protocol):
    """This process among the training ranks; ``policy.parallel.ParallelContext`` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def control(self) -> Any:
        """A gloo group of all training ranks."""
        ...


Found = list[tuple[str, int]]
"""Name and number of ranks of each server."""


class Sharded:
    """A ``Transport``; every training rank has one, the controller's with the servers.

    ``host`` is the controller's address for engines and training ranks. ``bucket_bytes`` bounds a
    message; a rank that has to pack keeps two of them for each replica it sends to. ``expert`` is
    the engines' expert parallelism.
    """

    def __init__(
        self,
        *,
        source: SliceSource,
        ranks: Ranks,
        servers: UpdateServers | None,
        model: ModelShape,
        training: TrainingLayout,
        host: str,
        bucket_bytes: int,
        precision: Literal["model", "fp8"],
        deadline_s: float,
        expert: int = 1,
    ) -> None:
        assert (servers is not None) == (ranks.rank == 0), "the controller has the servers"
        self._source, self._ranks, self._servers = source, ranks, servers
        self._model, self._training, self._expert = model, training, expert
        self._host, self._bucket_bytes, self._deadline_s = host, bucket_bytes, deadline_s
        self._fp8 = precision == "fp8"
        self._planned: dict[Any, tuple[ReplicaSchedule, ...]] = {}
        self._lanes: dict[str, Lane] = {}
        self._stores: dict[str, Any] = {}
        self._by_name: dict[str, UpdateServer] = {}
        self._update: Update | None = None
        self._version = -1

    def publish(self, policy_version: int) -> dict[str, float]:
        """Bring the policy's weights into all engines; see ``Transport``."""
        require_newer(policy_version, self._version)
        found = self._from_controller(lambda: self._look(policy_version))
        # From here on: the controller may come later than the others, and nobody's time is up then.
        deadline, started = Deadline(self._deadline_s), time.monotonic()
        done = False
        try:
            slices = {own.name: own for own in self._source.local_slices()}
            planned = self._plan(found, {own.dtype for own in slices.values()})
            meetings = self._from_controller(lambda: self._open(found, planned))
            self._leave_others(meetings)
            sent, problems = self._run(meetings, planned, slices, deadline, policy_version)
            problems = self._all_problems(problems)
            self._drop(problems)
            self._from_controller(lambda: self._finish(problems))
            done = True
        finally:
            if self._update is not None:
                self._update.close(done)
        self._version = policy_version
        if self._update is None:
            return {"weight_sync/bytes": float(sent)}
        return self._update.metrics(sent, time.monotonic() - started)

    def close(self) -> None:
        """Leave all groups."""
        for name in list(self._lanes):
            self._leave(name)

    # What the controller decides, all ranks know.

    def _from_controller(self, make: Callable[[], T]) -> T:
        """The controller's result on all ranks; its error is raised on all."""
        result: Any = None
        if self._servers is not None:
            try:
                result = make()
            except SpearError as error:
                result = error
        if self._ranks.world_size > 1:
            box = [result]
            _together(lambda: dist.broadcast_object_list(box, src=0, group=self._ranks.control))
            result = box[0]
        if isinstance(result, SpearError):
            raise result
        shared: T = result
        return shared

    def _look(self, policy_version: int) -> Found:
        """The servers to update."""
        assert self._servers is not None
        self._update = Update(self._servers, policy_version, self._deadline_s)
        self._by_name = {server.name: server for server in self._update.live}
        found = [(server.name, server.num_ranks) for server in self._update.live]
        if len({num_ranks for _, num_ranks in found}) > 1:
            raise ConfigError(
                f"servers differ in tensor parallelism: {found}; weight_sync.transport=sharded "
                "needs the same on all, or use broadcast"
            )
        return found

    def _plan(self, found: Found, dtypes: set[torch.dtype]) -> tuple[ReplicaSchedule, ...]:
        """The schedules for as many replicas, made once."""
        (dtype,) = dtypes
        key = (len(found), found[0][1], dtype)
        if key not in self._planned:
            engine = EngineLayout(tensor=found[0][1], expert=self._expert, replicas=len(found))
            self._planned[key] = schedules(
                self._model,
                self._training,
                engine,
                dtype=dtype,
                fp8=self._fp8,
                bucket_bytes=self._bucket_bytes,
            )
        return self._planned[key]

    def _open(self, found: Found, planned: Sequence[ReplicaSchedule]) -> dict[str, Meeting]:
        """Stop the engines; where the ranks of each server meet: as before if they are the same."""
        assert self._update is not None
        meetings: dict[str, Meeting] = {}
        self._stores = {}
        for (name, num_ranks), schedule in zip(found, planned, strict=True):
            lane = self._lanes.get(name)
            same = lane is not None and lane.meeting.senders == schedule.senders
            if lane is not None and same and self._by_name[name].serving:
                meetings[name] = lane.meeting
                continue
            store = peer_groups.listen(self._host, timeout_s=self._deadline_s)
            self._stores[name] = store
            meetings[name] = Meeting(
                host=self._host,
                port=store.port,
                name=f"megatron_spear.{uuid.uuid4().hex[:8]}",
                backend="nccl" if self._ranks.device.type == "cuda" else "gloo",
                senders=schedule.senders,
                num_receivers=num_ranks,
                timeout_s=2 * self._deadline_s,
            )
        self._update.pause()
        return meetings

    def _finish(self, problems: dict[str, str]) -> None:
        """Take out servers where anything went wrong, end the update of the others."""
        assert self._update is not None
        update = self._update
        for name, why in problems.items():
            if self._by_name[name] in update.live:
                update.lose(self._by_name[name], why)
        update.refuse_none_left()
        update.each("end of the update", lambda server: server.end_update(update.policy_version))

    # The lanes.

    def _leave_others(self, meetings: dict[str, Meeting]) -> None:
        """Leave groups that do not meet again."""
        for name, lane in list(self._lanes.items()):
            if meetings.get(name) != lane.meeting:
                self._leave(name)

    def _lane(self, name: str, meeting: Meeting, deadline: Deadline) -> Lane:
        """The lane of a meeting."""
        if name not in self._lanes:
            store = self._stores.pop(name, None) or peer_groups.connect(
                meeting.host, meeting.port, timeout_s=deadline.left_s
            )
            self._lanes[name] = Lane(meeting, self._ranks.rank, store, self._ranks.device)
        return self._lanes[name]

    def _run(
        self,
        meetings: dict[str, Meeting],
        planned: Sequence[ReplicaSchedule],
        slices: dict[str, TensorSlice],
        deadline: Deadline,
        policy_version: int,
    ) -> tuple[int, dict[str, str]]:
        """All lanes of this rank side by side: bytes sent, and by server what went wrong."""
        sent: dict[str, int] = {}
        problems: dict[str, str] = {}

        def run(name: str, schedule: ReplicaSchedule) -> None:
            peer_groups.use(self._ranks.device)
            server = self._by_name[name] if self._servers is not None else None
            try:
                lane = self._lane(name, meetings[name], deadline)
                sent[name] = lane.run(schedule, slices, deadline, server, policy_version)
            except Exception as error:  # noqa: BLE001  (told to all ranks, whatever it is)
                problems[name] = f"training rank {self._ranks.rank}: {describe(error)}"
                self._close(name)  # so that nobody waits for this rank; its word stays readable

        threads = [
            threading.Thread(target=run, args=(name, schedule), name=f"weights to {name}")
            for name, schedule in zip(meetings, planned, strict=True)
            if self._ranks.rank in schedule.senders
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # every wait in a lane has the deadline
        return sum(sent.values()), problems

    def _all_problems(self, own: dict[str, str]) -> dict[str, str]:
        """By server what went wrong on any rank."""
        everything: list[Any] = [own]
        if self._ranks.world_size > 1:
            everything = [None] * self._ranks.world_size
            _together(lambda: dist.all_gather_object(everything, own, group=self._ranks.control))
        merged: dict[str, list[str]] = {}
        for found in everything:
            for name, text in found.items():
                merged.setdefault(name, []).append(text)
        return {name: "; ".join(texts) for name, texts in merged.items()}

    def _drop(self, problems: dict[str, str]) -> None:
        """Leave groups in which something went wrong; they are made anew at the next update."""
        for name in problems:
            self._leave(name)

    def _leave(self, name: str) -> None:
        self._close(name)
        self._lanes.pop(name, None)

    def _close(self, name: str) -> None:
        try:
            if name in self._lanes:
                self._lanes[name].close()
        except RuntimeError as error:
            logger.warning("leaving the group with %s: %s", name, error)


def _together(collective: Callable[[], object]) -> None:
    """A collective of the training ranks; EngineError if one of them is gone."""
    try:
        collective()
    except RuntimeError as error:
        raise EngineError(f"a training rank is gone or late: {error}") from error
