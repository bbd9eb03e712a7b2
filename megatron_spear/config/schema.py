"""The run configuration: every setting of a run, typed, frozen, with its unit and range.

A class takes its own section, never ``RunConfig``. The YAML files in ``examples/`` set what differs
from the defaults here; ``megatron-spear check-config FILE`` prints the result.
"""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from megatron_spear.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
)
from megatron_spear.config.cluster import ClusterSection
from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.environments.choice import AnyEnvironment
from megatron_spear.config.hooks import HookSection
from megatron_spear.config.method import (
    AlgorithmSection,
    CurriculumSection,
    ReplaySection,
    RewardSection,
)
from megatron_spear.config.presets.layouts import PRESETS, unknown_preset
from megatron_spear.config.rollout import RolloutSection, WeightSyncSection


class RunSection(Section):
    """What the run is called, where it writes and how long it is."""

    name: str = "run"
    """Name shown in logs and by wandb."""
    dir: Path = Path("runs/run")
    """Run directory: config, metrics, checkpoints, summary."""
    seed: NonNegativeInt = 0
    """Seed of everything that is drawn in RL (games, sampling)."""
    steps: PositiveInt = 40
    """Trainer steps in total. A resumed run may have more of them than before where the learning
    rate does not decay (``policy.optimizer.schedule: constant``), never fewer."""
    stop_after: PositiveInt | None = None
    """Stop cleanly after this many steps in total (a partial run, to be resumed); None = never."""
    hang_limit_s: PositiveFloat = 1800.0
    """Longest that a rank may stand still, in seconds; then it prints which ranks are behind and
    all stacks, and exits with status 70. A turn, a micro-batch, a tensor that is loaded or sent,
    each 4 MiB of a checkpoint that is checked and the end of each stage are movements; a rank that
    waits for others waits on while the controller moves, so rollouts may take longer. Must be above
    the longest single piece: an optimizer step's last part, writing or loading the files of a
    checkpoint, and the deadlines of engines, environments and weight updates."""
    threads: NonNegativeInt = 0
    """torch threads a process; 0 = the cores of the machine shared out among its ranks."""


class TinyModelSection(Section):
    """Shape of the tiny Qwen3 model that is made when ``model.path`` is not given."""

    hidden_size: PositiveInt = 128
    """Width of the residual stream; a multiple of ``num_heads``."""
    num_layers: PositiveInt = 4
    """Decoder layers."""
    num_heads: PositiveInt = 4
    """Query heads."""
    num_kv_heads: PositiveInt = 2
    """Key-value groups; divides ``num_heads``."""
    ffn_size: PositiveInt = 512
    """Inner width of the gated MLP."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights."""


class ModelSection(Section):
    """Where the initial policy comes from."""

    path: Path | None = None
    """A Hugging Face folder (config, safetensors, tokenizer). None = make the tiny model."""
    tiny: TinyModelSection = TinyModelSection()
    """Shape of the tiny model; read only when ``path`` is None."""
    cache_dir: Path = Path("runs/cache")
    """Where made models and warm starts are kept for the next run."""


class OptimizerSection(Section):
    """Megatron's Adam and its learning rate."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of the decaying schedules."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    beta1: Fraction = 0.9
    """Adam's first decay."""
    beta2: Fraction = 0.95
    """Adam's second decay."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (AdamW)."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm limit; 0 = none."""


class Fp8Section(Section):
    """Matrix products of the decoder layers in FP8, by TransformerEngine; output layer, router and
    attention itself stay in bf16 or float32."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """How values get their scales: one a tensor from earlier values (``delayed``) or the present
    ones (``tensorwise``), one for 128 values or 128 x 128 of a weight (``blockwise``), one for 32
    values (``mxfp8``). ``none`` = no FP8."""
    format: Literal["hybrid", "e4m3"] | None = None
    """``e4m3`` everywhere, or ``hybrid``: e5m2 for gradients. None = TransformerEngine's own for
    the recipe: hybrid for one scale a tensor, e4m3 for blocks."""
    parameters: bool = False
    """Hold the weights themselves in FP8, with float32 ones in the distributed optimizer."""
    bf16_layers_at_start: NonNegativeInt = 1
    """First decoder layers that stay in bf16."""
    bf16_layers_at_end: NonNegativeInt = 1
    """Last decoder layers that stay in bf16."""


class PolicySection(Section):
    """The Megatron-Core policy: layout, precision, batches. Data parallel = world size / (TP x
    CP x PP)."""

    tensor_parallel: PositiveInt = 1
    """Ranks one layer is split over; divides heads, KV groups and the world size."""
    context_parallel: PositiveInt = 1
    """Ranks the tokens of each sequence are split over, for long contexts: each has its share of
    the activations, and gathers all keys and values in each layer (with recompute it keeps none of
    those). Sequences are padded to multiples of twice this number."""
    pipeline_parallel: PositiveInt = 1
    """Ranks the layers are split over; divides the number of layers."""
    expert_parallel: PositiveInt = 1
    """Ranks the experts of a mixture-of-experts model are spread over; divides the experts and the
    ranks of a pipeline stage (tensor x context x data parallel)."""
    virtual_pipeline: PositiveInt = 1
    """Pieces of the model a pipeline rank holds, in turn with the others', which shortens the wait
    at both ends of a step (needs pipeline_parallel > 1; the product of both divides the number of
    layers). Micro-batches then come in multiples of pipeline_parallel."""
    sequence_parallel: bool = False
    """Split the norms' activations along the sequence too (needs tensor_parallel > 1; models with
    experts need it then)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of parameters and activations."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers: Megatron's with this project's attention and norm (``local``), or
    TransformerEngine's. ``auto`` takes TransformerEngine's in bf16 where it is installed and a
    GPU is there."""
    fp8: Fp8Section = Fp8Section()
    """FP8 training (needs TransformerEngine's layers)."""
    tokens_per_microbatch: PositiveInt = 4096
    """Most tokens packed into one micro-batch, per data-parallel rank (context-parallel ranks share
    them)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept. ``selective``: those inside
    the attention, between its linear layers, which saves little or nothing on a GPU
    (cluster/planner/activations.py). ``full``: all but each layer's input, at the price of a
    second forward pass."""
    distributed_optimizer: bool = False
    """Split the optimizer's state and its work over the data-parallel ranks."""
    optimizer_offload: Fraction = 0.0
    """Share of the parameters whose optimizer state and update are on the CPU: 12 bytes of GPU
    memory a parameter and data-parallel rank less, for a slower step (needs
    distributed_optimizer)."""
    overlap_grad_reduce: bool = False
    """Add gradients up over the data-parallel ranks during the last micro-batch's backward pass."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs (needs distributed_optimizer and
    overlap_grad_reduce)."""
    optimizer: OptimizerSection = OptimizerSection()
    """Optimizer of the RL steps."""


class SftSection(Section):
    """The supervised warm start on planner walkthroughs with recovery noise."""

    enabled: bool = True
    """Make (or take from the cache) a warm start before RL; False = start from ``model.path``."""
    steps: PositiveInt = 300
    """Optimizer steps."""
    trajectories_per_step: PositiveInt = 32
    """Demonstrations a step."""
    seed: NonNegativeInt = 0
    """Seed of the demonstrations; separate from ``run.seed`` so that all seeds share a warm
    start."""
    noise: Fraction = 0.2
    """Chance per turn of an inserted invalid action, answered and not trained on."""
    explore: NonNegativeFloat = 2.0
    """Mean number of places searched (ALFWorld), or products opened in vain (WebShop), before the
    demonstration goes to the right one."""
    decision_weight: PositiveFloat = 1.0
    """Loss weight of an action's first token, which says what kind of action it is."""
    observation_weight: Fraction = 0.3
    """Loss weight of observation tokens (1 for the other tokens of actions)."""
    optimizer: OptimizerSection = OptimizerSection(
        lr=2e-3, schedule="cosine", min_lr=2e-4, warmup_steps=20, beta2=0.98
    )
    """Optimizer of the warm start."""


class EvaluationSection(Section):
    """The fixed panel of games, and how it is played."""

    games: PositiveInt | None = 64
    """Games on the panel; None = all of the loaded split (generated games need a number)."""
    attempts: PositiveInt = 1
    """Attempts a game; success is the mean over games of the share won."""
    seed: NonNegativeInt = 20260101
    """Seed of the panel's generated games and of its sampling; never trained on."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 = greedy."""
    top_p: PositiveFraction = 1.0
    """Draw from the likeliest tokens that make up this share of the probability alone; 1 = from
    all. Training rollouts always draw from all: the loss takes log-probs of the whole
    distribution."""
    every: NonNegativeInt = 0
    """Also evaluate every this many steps; 0 = only before and after."""


class CheckpointSection(Section):
    """Run checkpoints (resumable), one directory commit each."""

    every: NonNegativeInt = 20
    """Trainer steps between checkpoints; 0 = only at the end or at a clean stop."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    async_save: bool = False
    """Write the files while the run goes on: a step waits only until its state has been copied to
    host memory. The first data-parallel rank of each piece of the model holds and writes all of
    that piece (14 bytes a parameter in bf16; with a distributed optimizer 24 for a moment, which a
    save that is waited for takes too), the others nothing. The checkpoint counts one or two steps
    later, when all ranks have written; a kill before that goes back to the one before."""


class TrackingSection(Section):
    """Where metrics go besides ``metrics.jsonl`` in the run directory."""

    wandb: bool = True
    """Write to wandb: online when an API key is present, else offline."""
    project: str = "megatron-spear"
    """wandb project."""
    progress: bool = True
    """A live view on a terminal; plain lines otherwise."""
    curves: bool = True
    """Draw ``curves.png`` at the end of the run, which takes a second."""
    recorded_groups: NonNegativeInt = 8
    """Groups a step whose trajectories are written to ``trajectories/`` in the run directory, token
    by token, with the step's replayed rows (docs/run-directory.md); 0 = none."""


class RunConfig(Section):
    """Everything a run needs."""

    run: RunSection = RunSection()
    """Name, directory, seed, length."""
    resume: Path | None = None
    """A run directory to continue."""
    model: ModelSection = ModelSection()
    """The initial policy."""
    preset: str | None = None
    """A layout for a published model on so many GPUs (docs/presets.md): ``policy.*`` settings that
    those of the file and the command line come over. None = no preset."""
    policy: PolicySection = PolicySection()
    """Megatron layout and optimizer."""
    env: AnyEnvironment = AlfworldSection()
    """The environment."""
    rollout: RolloutSection = RolloutSection()
    """The rollout stage."""
    weight_sync: WeightSyncSection = WeightSyncSection()
    """From policy to engines."""
    reward: RewardSection = RewardSection()
    """The reward parts."""
    algorithm: AlgorithmSection = AlgorithmSection()
    """Advantages and loss."""
    replay: ReplaySection = ReplaySection()
    """Self-imitation replay."""
    curriculum: CurriculumSection = CurriculumSection()
    """Schedules."""
    hooks: tuple[HookSection, ...] = ()
    """The user's own hooks, in the order in which they are called."""
    sft: SftSection = SftSection()
    """Warm start."""
    evaluation: EvaluationSection = EvaluationSection()
    """Panel."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Run checkpoints."""
    tracking: TrackingSection = TrackingSection()
    """Sinks."""
    cluster: ClusterSection = ClusterSection()
    """The machines, for ``launch`` and ``plan``."""

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(unknown_preset(name))
        return name
