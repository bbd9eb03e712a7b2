"""Settings of the machines a run is launched on: nodes and their roles, Slurm, network, checks."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_spear.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

ChipName = Literal["a100", "h100", "h200", "b200", "gb200"]
"""Chips the planner knows (``cluster/planner/chips.py``)."""


class SlurmSection(Section):
    """What the job asks Slurm for."""

    partition: str | None = None
    """Partition; None = the cluster's default."""
    account: str | None = None
    """Account that is charged; None = the user's default."""
    qos: str | None = None
    """Quality of service; None = the default."""
    time_limit: str = "24:00:00"
    """Longest attempt, as Slurm writes it: ``D-HH:MM:SS``, ``HH:MM:SS`` or minutes. The run is
    stopped before and requeued."""
    signal_before_s: PositiveInt = 600
    """Seconds before the time limit at which the run is told to save and stop; longer than a step
    and a save."""
    exclude: tuple[str, ...] = ()
    """Nodes not to use, besides those that a preflight found bad."""
    options: tuple[str, ...] = ()
    """Further ``#SBATCH`` options, ``--constraint=h100`` say."""

    @field_validator("time_limit", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f"got the number {value}; write it in quotes, '24:00:00' say, since YAML takes "
                "24:00:00 for a number"
            )
        return value

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError(f"got {value!r}, expected Slurm's D-HH:MM:SS, HH:MM:SS or minutes")
        return value

    @property
    def time_limit_s(self) -> int:
        """The time limit in seconds."""
        days, _, rest = self.time_limit.rpartition("-")
        numbers = [int(word) for word in rest.split(":")]
        if days:  # days-hours, days-hours:minutes, ...
            hours, minutes, seconds = [*numbers, 0, 0][:3]
        else:  # minutes, minutes:seconds, hours:minutes:seconds
            hours, minutes, seconds = [[0, *numbers, 0], [0, *numbers], numbers][len(numbers) - 1]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @model_validator(mode="after")
    def _has_time_before_the_signal(self) -> "SlurmSection":
        if self.signal_before_s >= self.time_limit_s:
            raise ValueError(
                f"signal_before_s={self.signal_before_s} is not below time_limit="
                f"{self.time_limit} ({self.time_limit_s} s): every attempt would be stopped at its "
                "start; lower the first or raise the second"
            )
        return self

    @field_validator("options")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"got {option!r}, expected one option, --constraint=h100 say")
        return value


class VenvRuntime(Section):
    """A Python environment on a file system that all nodes see."""

    type: Literal["venv"] = "venv"
    """Which way to run."""
    path: Path | None = None
    """The environment's folder; None = that of the command that launches."""


class PyxisRuntime(Section):
    """A container by Slurm's pyxis plugin and enroot."""

    type: Literal["pyxis"]
    """Which way to run."""
    image: str
    """``--container-image``: a registry's image, or a ``.sqsh`` file."""
    mounts: tuple[str, ...] = ()
    """``--container-mounts``, as ``SOURCE:TARGET``; the run directory and the folder of the launch
    are always mounted."""


class ApptainerRuntime(Section):
    """A container by apptainer (singularity)."""

    type: Literal["apptainer"]
    """Which way to run."""
    image: Path
    """The ``.sif`` file."""
    mounts: tuple[str, ...] = ()
    """``--bind``, as ``SOURCE:TARGET``; the run directory and the folder of the launch are always
    mounted."""


Runtime = Annotated[VenvRuntime | PyxisRuntime | ApptainerRuntime, Field(discriminator="type")]


class NetworkSection(Section):
    """How processes find each other and what NCCL and gloo use."""

    interface: str | None = None
    """Interface of NCCL's and gloo's sockets (``NCCL_SOCKET_IFNAME``, ``GLOO_SOCKET_IFNAME``)."""
    ib_hca: str | None = None
    """``NCCL_IB_HCA``: which InfiniBand adapters, ``mlx5`` say."""
    ib_service_level: NonNegativeInt | None = None
    """``NCCL_IB_SL``."""
    ib_timeout: NonNegativeInt | None = None
    """``NCCL_IB_TIMEOUT``."""
    address: str | None = None
    """Address under which the others reach each node; None = the node's name. For one machine that
    plays several nodes: 127.0.0.1."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of all processes."""

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"got {name!r}, expected the name of an environment variable")
        return value


class PreflightSection(Section):
    """What every node is asked before a run starts on it."""

    enabled: bool = True
    """False = start at once."""
    deadline_s: PositiveFloat = 180.0
    """Longest wait for all nodes' answers, and once more for the all-reduce."""
    min_free_gpu_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """Least share of each GPU's memory that must be free."""
    min_shm_bytes: NonNegativeInt = 1 << 30
    """Least free bytes of /dev/shm."""
    min_disk_bytes: NonNegativeInt = 1 << 30
    """Least free bytes where the run directory is."""
    max_clock_skew_s: PositiveFloat = 10.0
    """Largest difference of a node's clock from the middle one of all nodes'."""
    min_allreduce_bytes_per_s: NonNegativeInt = 0
    """Least bandwidth of a short all-reduce over all trainer ranks, 2 (n - 1) / n x bytes / seconds
    for n ranks; 0 = none is measured."""


class EngineServersSection(Section):
    """Engine servers that the launch starts, registers and restarts."""

    count: NonNegativeInt = 0
    """Servers in total, spread evenly over the engine nodes (without any: the trainer nodes). 0 =
    none is started: the embedded engine, or those of ``rollout.servers``."""
    program: Literal["serve", "sglang", "vllm"] = "serve"
    """What is run: ``megatron-spear serve``, or a server of an environment of its own. It goes with
    ``rollout.engine`` (``serve`` speaks as sglang does)."""
    python: Path | None = None
    """The Python that has the server's packages; None = this one."""
    tensor_parallel: PositiveInt = 1
    """GPUs a server; never more than a node has."""
    memory_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85
    """Share of a GPU's memory for weights and KV cache."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the server's command."""
    max_restarts: NonNegativeInt = 5
    """Restarts of one server in an attempt; after that it stays away."""
    start_deadline_s: PositiveFloat = 900.0
    """Longest start of a server, loading included."""


class ClusterSection(Section):
    """The machines: what ``launch`` starts on them and ``plan`` reckons with."""

    chip: ChipName = "h100"
    """The GPU of the nodes, for ``plan``; read where ``gpus_per_node`` is above 0."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs a node; 0 = CPUs and gloo."""
    trainer_nodes: PositiveInt = 1
    """Nodes that train, the first of the job."""
    ranks_per_node: PositiveInt | None = None
    """Trainer ranks a node; None = one a GPU (without GPUs: 1)."""
    engine_nodes: NonNegativeInt = 0
    """Further nodes that only generate; 0 = servers share the trainer nodes."""
    servers: EngineServersSection = EngineServersSection()
    """The engine servers."""
    env_workers: NonNegativeInt = 0
    """Environment worker processes in total, spread over the engine nodes (without any: the trainer
    nodes); 0 = ``rollout.env_workers`` processes of the controller."""
    runtime: Runtime = VenvRuntime()
    """Environment or container of all processes but the engine servers."""
    slurm: SlurmSection = SlurmSection()
    """The job."""
    network: NetworkSection = NetworkSection()
    """Names and sockets."""
    preflight: PreflightSection = PreflightSection()
    """Checks before the start."""
    max_restarts: NonNegativeInt = 10
    """Restarts after crashes in one launch; a crash without a new checkpoint since its start counts
    double, and the third such in a row ends the run whatever is left. Stops cost nothing, but the
    third in a row by the time limit without a new checkpoint ends the run too."""

    @property
    def ranks_on_a_node(self) -> int:
        """Trainer ranks a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Trainer ranks in total."""
        return self.trainer_nodes * self.ranks_on_a_node

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self.trainer_nodes + self.engine_nodes
