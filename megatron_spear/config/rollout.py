"""Settings of the rollout stage (engine, sizes, how far it runs ahead) and of its weights."""

from pathlib import Path
from typing import Literal

from megatron_spear.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class RolloutSection(Section):
    """How trajectories are made."""

    engine: Literal["embedded", "sglang", "vllm"] = "embedded"
    """The rollout engine: in this process, or servers (``servers``). ``sglang`` is also what
    ``megatron-spear serve`` speaks."""
    servers: tuple[str, ...] = ()
    """URLs of the engine servers, ``http://host:30000`` say, all of the policy's model; for the
    engines ``sglang`` and ``vllm``. An sglang-router's stands for its workers."""
    max_requests_per_server: PositiveInt = 256
    """Generations a server works on at once; further ones wait in the order in which they came."""
    prompts_per_step: PositiveInt = 8
    """Prompts (games) a trainer step."""
    group_size: PositiveInt = 8
    """Attempts a prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the policy's log-probs use the same."""
    max_new_tokens: PositiveInt = 10
    """Most tokens in one turn's answer."""
    max_context: PositiveInt = 512
    """Most tokens in one context, prompt and answers."""
    max_slots: PositiveInt = 64
    """Attempts played at once, and contexts the embedded engine holds; further ones wait."""
    colocated: bool = False
    """The servers are on the GPUs that train: they give the memory of weights and caches back after
    each rollout stage and take it again before the weight update (SGLang:
    ``--enable-memory-saver``, vLLM: ``--enable-sleep-mode``). Needs max_lag=0."""
    max_lag: NonNegativeInt = 0
    """Policy versions that rollouts may be ahead of training by: the trajectories of step s are
    begun once version s - 1 - max_lag is there. 0 = rollout and training take turns."""
    schedule: Literal["continuous", "deterministic"] = "continuous"
    """What a weight update finds with max_lag > 0: ``continuous``, generations under way, which go
    on with the new weights (``pause_mode``); ``deterministic``, none: it waits until all that was
    begun is whole, so that all trajectories of step s are of version max(0, s - 1 - max_lag) and a
    resumed run is the run that was never stopped."""
    pause_mode: Literal["retract", "abort"] = "retract"
    """What becomes of generations under way when new weights come (with max_lag > 0): ``retract``
    keeps their tokens, each with its version, and goes on with the new weights; ``abort`` draws the
    turn again."""
    env_workers: PositiveInt = 1
    """Environment worker processes."""
    env_deadline_s: PositiveFloat = 30.0
    """Deadline of one environment call."""
    engine_deadline_s: PositiveFloat = 300.0
    """Deadline of one generation, tries included, from when a server or the embedded engine has it
    first."""


class WeightSyncSection(Section):
    """How the policy's weights get into the rollout engines."""

    transport: Literal["auto", "in_process", "disk", "broadcast", "ipc", "sharded"] = "auto"
    """``in_process``: into the embedded engine. To servers: ``disk`` (safetensors in a folder that
    both sides see), ``broadcast`` (whole tensors from rank 0), ``ipc`` (shared memory of one
    machine), ``sharded`` (each rank of a server gets just its slices from the ranks that hold
    them). ``auto`` = in_process for the embedded engine, else broadcast."""
    bucket_bytes: PositiveInt = 512 << 20
    """Tensors sent at once; two buckets are held, one being filled while the other is sent."""
    precision: Literal["model", "fp8"] = "model"
    """What the engines hold: ``model`` = the policy's own, ``fp8`` = linear layers in e4m3 with a
    scale for 128 x 128 values, made before they are sent (the servers must be started so)."""
    engine_expert_parallel: PositiveInt = 1
    """Groups of ranks that each server spreads a mixture's experts over (SGLang: ``--ep-size``);
    ``sharded`` cuts experts accordingly."""
    deadline_s: PositiveFloat = 600.0
    """Longest call of a server in an update (a bucket, the opening, a folder to load), and of
    ``sharded`` the whole update; a server that takes longer is taken out until a later one has
    passed."""
    host: str | None = None
    """Address under which servers reach training rank 0; None = 127.0.0.1 where all servers are on
    this machine, else this machine's name."""
    folder: Path | None = None
    """Folder of ``disk``, which the servers must see under the same path; None = ``weights`` in the
    run directory."""
    max_logprob_gap: PositiveFloat | None = None
    """Largest mean difference between a server's log-probs and the policy's on a probe after the
    first update, above which the run ends; None = 1e-3 in fp32, 0.3 in bf16 or with fp8."""
