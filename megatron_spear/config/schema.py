"""The run configuration: every setting of a run, typed, frozen, with its unit and range.

A class takes its own section, never ``RunConfig``. The YAML files in ``examples/`` set what differs
from the defaults here; ``megatron-spear check-config FILE`` prints the result.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_spear.types import TASK_TYPES, TaskType

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """What the run is called, where it writes and how long it is."""

    name: str = "run"
    """Name shown in logs and by wandb."""
    dir: Path = Path("runs/run")
    """Run directory: config, metrics, checkpoints, summary."""
    seed: NonNegativeInt = 0
    """Seed of everything that is drawn in RL (games, sampling)."""
    steps: PositiveInt = 40
    """Trainer steps in total; a resumed run continues up to the same number."""
    stop_after: PositiveInt | None = None
    """Stop cleanly after this many steps in total (a partial run, to be resumed); None = never."""
    hang_limit_s: PositiveFloat = 3600.0
    """Longest wait without progress; then the process prints who was waited for and all stacks, and
    exits with status 70. Must be above the longest rollout stage, for which other ranks wait."""
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


class PolicySection(Section):
    """The Megatron-Core policy: layout, precision, batches. Data parallel = world size / (TP x
    PP)."""

    tensor_parallel: PositiveInt = 1
    """Ranks one layer is split over; divides heads, KV groups and the world size."""
    pipeline_parallel: PositiveInt = 1
    """Ranks the layers are split over; divides the number of layers."""
    sequence_parallel: bool = False
    """Split the norms' activations along the sequence too (needs tensor_parallel > 1)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of parameters and activations."""
    tokens_per_microbatch: PositiveInt = 4096
    """Most tokens packed into one micro-batch, per data-parallel rank."""
    optimizer: OptimizerSection = OptimizerSection()
    """Optimizer of the RL steps."""


class GeneratorSection(Section):
    """Size of generated games."""

    min_receptacles: Annotated[int, Field(ge=8, le=40)] = 8
    """Fewest receptacles in a room."""
    max_receptacles: Annotated[int, Field(ge=8, le=40)] = 12
    """Most receptacles in a room."""
    min_objects: Annotated[int, Field(ge=4, le=80)] = 8
    """Fewest movable objects in a room."""
    max_objects: Annotated[int, Field(ge=4, le=80)] = 14
    """Most movable objects in a room."""

    @model_validator(mode="after")
    def _ordered(self) -> "GeneratorSection":
        for low, high in (("min_receptacles", "max_receptacles"), ("min_objects", "max_objects")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}; "
                    f"expected {low} <= {high}"
                )
        return self


class WindowHistory(Section):
    """Each turn's prompt is rendered anew from the task and the last ``window`` steps."""

    window: PositiveInt
    """Steps of history in the prompt (the paper uses 2)."""


class AlfworldSection(Section):
    """ALFWorld household games, played by the native engine."""

    type: Literal["alfworld"] = "alfworld"
    """Which environment."""
    games: Path | None = None
    """Folder of games with splits (official ``game.tw-pddl`` tree, or packed
    ``<split>.jsonl[.xz]``). One file has no splits: ``sft`` and ``evaluate`` take it whole,
    ``train`` refuses it, since its panel must not be trained on. None = games are generated fresh
    for every step."""
    train_split: str = "train"
    """Split to train on, where ``games`` is a folder with splits."""
    eval_split: str = "valid_seen"
    """Split to evaluate on, where ``games`` is a folder with splits."""
    task_types: tuple[TaskType, ...] = TASK_TYPES
    """Task types played."""
    max_receptacles: PositiveInt | None = None
    """Leave out loaded games with more receptacles; None = take all."""
    skip_unsolvable: bool = False
    """Leave out games marked unsolvable (an official download has some) instead of refusing
    them."""
    generator: GeneratorSection = GeneratorSection()
    """Size of generated games; read when ``games`` is None."""
    history: Literal["full"] | WindowHistory = "full"
    """``full``: the conversation grows; ``{window: k}``: each prompt shows the last k steps."""
    prompt: Literal["compact", "official"] = "compact"
    """``compact``: task and observation only, the answer is the action. ``official``: the paper's
    prompt with admissible actions, <think> and <action> tags."""
    max_turns: PositiveInt = 20
    """Turns after which a game is over (paper: 50)."""


class RolloutSection(Section):
    """How trajectories are made."""

    engine: Literal["embedded"] = "embedded"
    """The rollout engine."""
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
    """Contexts the engine holds at once; further ones wait."""
    env_workers: PositiveInt = 1
    """Environment worker processes."""
    env_deadline_s: PositiveFloat = 30.0
    """Deadline of one environment call."""
    engine_deadline_s: PositiveFloat = 300.0
    """Deadline of one generation."""


class GigpoSection(Section):
    """GiGPO's step-level part (arXiv 2505.10978); read with ``algorithm.advantage: gigpo`` only."""

    step_weight: NonNegativeFloat = 1.0
    """Weight of a turn's advantage in its step group, beside the trajectory's in its group."""
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm"
    """Subtract a group's mean, or also divide by its standard deviation; for both parts."""
    discount: Fraction = 0.95
    """Discount of later turns' rewards, per turn."""


class AlgorithmSection(Section):
    """Advantages, policy loss, filters. Defaults are Dr.BoT's, SPEAR's baseline
    (arXiv 2509.22601)."""

    advantage: Literal["grpo", "rloo", "reinforce_pp_baseline", "gigpo"] = "grpo"
    """What a reward is compared with: the group's mean (grpo; gigpo adds turns with the same
    anchor), the other members' mean (rloo), or the group's mean, whitened over the step's tokens
    (reinforce_pp_baseline)."""
    normalize_std: bool = False
    """Divide by the group's standard deviation (GRPO's original form; false is Dr. GRPO). With
    ``advantage: grpo`` only."""
    gigpo: GigpoSection = GigpoSection()
    """GiGPO's own settings."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """Upper clip of the ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] = 10.0
    """Bound of the loss for negative advantages: -advantage * dual_clip."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "seq-mean-token-sum-norm"
    """How token losses are averaged into one number."""
    norm_length: PositiveInt = 128
    """Constant length that ``seq-mean-token-sum-norm`` divides by, in tokens."""
    keep_groups_fraction: Fraction = 0.75
    """Share of groups kept, those with the highest reward spread."""
    old_logprobs: Literal["policy", "engine"] = "policy"
    """Denominator of the ratio: recomputed by the policy before the update, or the engine's own
    (saves a forward pass; right where engine and policy agree, as in fp32 on one machine)."""
    mini_batches: PositiveInt = 1
    """Optimizer steps a trainer step."""


class CovarianceClipSection(Section):
    """SPEAR's covariance clipping (Eq. 18-21): tokens drawn from a band lose their gradient."""

    fraction: Fraction = 0.02
    """Share of tokens dropped, at most."""
    low: float = 2.0
    """Lower end of the covariance band, exclusive."""
    high: float = 60.0
    """Upper end of the covariance band, exclusive."""


class ReplaySection(Section):
    """Self-imitation replay (Eq. 2-5)."""

    enabled: bool = True
    """Replay at all; False = plain on-policy training."""
    capacity: PositiveInt = 512
    """Most trajectories kept; the oldest go first."""
    max_age: NonNegativeInt = 5
    """Oldest replayed trajectory, in policy versions."""
    rows_per_step: PositiveInt = 24
    """Most trajectories replayed in one trainer step; each is replayed once."""
    baseline: Literal["p50"] = "p50"
    """Recalibration: reward minus the median of recent group means (Eq. 2)."""
    baseline_history: PositiveInt = 80
    """Group means in that history."""
    covariance_clip: CovarianceClipSection | None = CovarianceClipSection()
    """Covariance clipping of replayed tokens; None = none."""
    require_valid_action: bool = True
    """Only trajectories with at least one valid action enter."""


class CurriculumSection(Section):
    """SPEAR's schedules (Eq. 13-14)."""

    replay_weight: NonNegativeFloat = 1.0
    """gamma at the end of the warm-up."""
    replay_warmup_steps: NonNegativeInt = 15
    """Trainer steps of gamma's cosine warm-up; 0 = full from the start."""
    intrinsic_weight: NonNegativeFloat = 1.0
    """mu at the start."""
    intrinsic_decay_steps: NonNegativeInt = 20
    """Trainer steps of mu's cosine decay; 0 = no intrinsic reward."""


class RewardSection(Section):
    """What a trajectory earns."""

    success: float = 1.0
    """Outcome of a won game; a lost one gets 0."""
    intrinsic_per_action: NonNegativeFloat = 0.01
    """Intrinsic reward per distinct valid action (before mu)."""
    intrinsic_max: NonNegativeFloat = 0.1
    """Most intrinsic reward of one trajectory (before mu)."""
    invalid_action_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of a turn with an invalid action (paper: 0.1, where a win earns 10)."""


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
    """Mean number of places searched before the demonstration goes to the right one."""
    decision_weight: PositiveFloat = 1.0
    """Loss weight of an action's first token, which says what kind of action it is."""
    observation_weight: Fraction = 0.3
    """Loss weight of observation tokens (1 for the other tokens of actions)."""
    optimizer: OptimizerSection = OptimizerSection(
        lr=2e-3, schedule="cosine", min_lr=2e-4, warmup_steps=20, beta2=0.98
    )
    """Optimizer of the warm start."""


class EvaluationSection(Section):
    """The fixed panel of games."""

    games: PositiveInt = 64
    """Games on the panel."""
    seed: NonNegativeInt = 20260101
    """Seed of the panel's generated games and of its sampling; never trained on."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 = greedy."""
    every: NonNegativeInt = 0
    """Also evaluate every this many steps; 0 = only before and after."""


class CheckpointSection(Section):
    """Run checkpoints (resumable), one directory commit each."""

    every: NonNegativeInt = 20
    """Trainer steps between checkpoints; 0 = only at the end or at a clean stop."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class TrackingSection(Section):
    """Where metrics go besides ``metrics.jsonl`` in the run directory."""

    wandb: bool = True
    """Write to wandb: online when an API key is present, else offline."""
    project: str = "megatron-spear"
    """wandb project."""
    progress: bool = True
    """Progress bars on a terminal; plain lines otherwise."""


class RunConfig(Section):
    """Everything a run needs."""

    run: RunSection = RunSection()
    """Name, directory, seed, length."""
    resume: Path | None = None
    """A run directory to continue."""
    model: ModelSection = ModelSection()
    """The initial policy."""
    policy: PolicySection = PolicySection()
    """Megatron layout and optimizer."""
    env: AlfworldSection = AlfworldSection()
    """The environment."""
    rollout: RolloutSection = RolloutSection()
    """The rollout stage."""
    reward: RewardSection = RewardSection()
    """The reward parts."""
    algorithm: AlgorithmSection = AlgorithmSection()
    """Advantages and loss."""
    replay: ReplaySection = ReplaySection()
    """Self-imitation replay."""
    curriculum: CurriculumSection = CurriculumSection()
    """Schedules."""
    sft: SftSection = SftSection()
    """Warm start."""
    evaluation: EvaluationSection = EvaluationSection()
    """Panel."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Run checkpoints."""
    tracking: TrackingSection = TrackingSection()
    """Sinks."""
