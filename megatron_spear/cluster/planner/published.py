"""Published figures: four fix the planner's constants, others check them.

Settings are those of the sources, with two assumptions where these say nothing: lengths are
log-normal with ``job.LENGTH_SPREAD``, and prompts have ``figures.PROMPT`` tokens. Pretraining runs
of Megatron-LM are taken with one sequence a micro-batch and a plain pipeline, which their table
leaves open. docs/planner-times.md has the table with errors, and how it was made.
"""

from dataclasses import replace
from math import sqrt

from megatron_spear.cluster.planner.efficiency import CONSTANTS, Constants
from megatron_spear.cluster.planner.figures import (
    Figure,
    Prediction,
    RlRun,
    decoding,
    machines,
    model,
    pretraining,
    update,
    whole_update,
)
from megatron_spear.cluster.planner.machines import Ranks
from megatron_spear.cluster.planner.training import Trainer, logprob_time, train_time
from megatron_spear.conversion.shape import ModelShape

LLAMA_8B = model(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = model(80, 8192, 28672, 64, 8, 128256)
LLAMA_405B = model(126, 16384, 53248, 128, 8, 128256)
QWEN_4B = model(36, 2560, 9728, 32, 8, 151936)
QWEN_32B = model(64, 5120, 25600, 64, 8, 151936)
QWEN_30B_A3B = model(48, 2048, 768, 32, 4, 151936, experts=128, chosen=8)
QWEN_235B_A22B = model(94, 4096, 1536, 64, 4, 151936, experts=128, chosen=8)
QWEN_397B_A17B = model(60, 4096, 1024, 32, 2, 248320, experts=512, chosen=11, head=256)
GPT_OSS_120B = model(36, 2880, 2880, 64, 8, 201088, experts=128, chosen=4, head=64)
DEEPSEEK_V3 = model(61, 7168, 2048, 128, 128, 129280, experts=256, chosen=9)


def _gpt(layers: int, hidden: int, heads: int) -> ModelShape:
    """Megatron-LM's GPT: an MLP of two products of 4 hidden is one of three of 8/3."""
    return replace(
        model(layers, hidden, hidden, heads, heads, 131072, head=hidden // heads),
        ffn_size=hidden * 8 // 3,
    )


def _teraflops(predict: Prediction, shape: ModelShape, length: int) -> Prediction:
    """Model TFLOP/s a GPU as Megatron-LM counts them: attention to all tokens, seen or not."""
    per_layer = shape.hidden_size * 4 * shape.num_heads * shape.head_dim
    per_layer += 3 * shape.hidden_size * shape.ffn_size
    flops = 6 * (shape.num_layers * per_layer + shape.hidden_size * shape.vocab_size)
    flops += 12 * shape.num_layers * shape.num_heads * shape.head_dim * length
    return lambda constants: predict(constants) * flops / 1e12


MEGATRON = "github.com/NVIDIA/Megatron-LM README, images/model_table.png (H100, bf16, 4,096 tokens)"
BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md"
VLLM = "buildkite.com/vllm/performance-benchmark/builds/9515 (8 prompts of 32, answers of 128)"
NEMO_3 = "nvidia-nemo.github.io/blog/2025/07/21/nemo-rl-v0.3, github.com/NVIDIA-NeMo/RL issue 959"
NEMO = "github.com/NVIDIA-NeMo/RL docs/about/performance-summary.md"
RESHARD = "github.com/NVIDIA-NeMo/RL docs/design-docs/nccl-reshard-refit.md"


def _gpt_figure(
    name: str, sizes: tuple[int, int, int], ranks: Ranks, batch: int, published: float
) -> Figure:
    shape = _gpt(*sizes)
    run = pretraining(shape, ranks, batch=batch, length=4096, hides_tensor_exchange=True)
    return Figure(
        name=f"GPT {name}, {ranks.world_size} GPUs, training",
        published=published,
        unit="TFLOP/s/GPU",
        source=MEGATRON,
        predict=_teraflops(run, shape, 4096),
    )


PRETRAINING = (
    _gpt_figure("1.7B", (24, 2048, 16), Ranks(data=48), 192, 408.8),
    replace(
        _gpt_figure("7.1B", (30, 4096, 32), Ranks(tensor=2, data=48), 192, 465.9),
        role="fixes",
        constant="matmul",
    ),
    _gpt_figure("16B", (32, 6144, 48), Ranks(tensor=4, data=48), 192, 489.1),
    _gpt_figure("32B", (48, 7168, 56), Ranks(tensor=8, data=48), 192, 459.6),
    _gpt_figure("70B", (84, 8192, 64), Ranks(tensor=8, pipeline=2, data=48), 384, 419.7),
    _gpt_figure("177B", (96, 12288, 96), Ranks(tensor=8, pipeline=6, data=48), 1152, 432.8),
    _gpt_figure("462B", (112, 18432, 144), Ranks(tensor=8, pipeline=16, data=48), 3072, 459.9),
)


def _bridge(name: str, published: float, release: str, run: Prediction, note: str = "") -> Figure:
    return Figure(
        name=f"{name}, training",
        published=published,
        unit="tokens/s/GPU",
        source=f"{BRIDGE}, {release}, DGX-H100",
        predict=run,
        role="miss" if note else "check",
        note=note,
    )


BRIDGED = (
    _bridge(
        "Llama 3 8B FP8, 8 GPUs",
        14451,
        "25.11",
        pretraining(LLAMA_8B, Ranks(data=8), batch=128, length=8192, fp8=True),
    ),
    _bridge(
        "Llama 3 70B FP8, 64 GPUs",
        1602,
        "25.11",
        pretraining(
            LLAMA_70B,
            Ranks(tensor=4, pipeline=8, virtual=5, data=2),
            batch=128,
            length=8192,
            fp8=True,
            hides_tensor_exchange=True,
        ),
    ),
    _bridge(
        "Llama 3.1 405B FP8, 1,024 GPUs",
        292,
        "25.11",
        pretraining(
            LLAMA_405B,
            Ranks(tensor=8, pipeline=8, context=2, virtual=8, data=8),
            batch=512,
            length=8192,
            fp8=True,
            hides_tensor_exchange=True,
        ),
    ),
    _bridge(
        "GPT-OSS 120B bf16, 64 GPUs",
        5824,
        "26.04.01",
        pretraining(GPT_OSS_120B, Ranks(pipeline=4, data=16, expert=8), batch=1280, length=4096),
    ),
    _bridge(
        "Qwen3 30B-A3B FP8, 16 GPUs, EP8",
        9058,
        "26.02.01",
        pretraining(
            QWEN_30B_A3B,
            Ranks(pipeline=2, virtual=12, data=8, expert=8),
            batch=1024,
            length=4096,
            fp8=True,
        ),
    ),
    _bridge(
        "Qwen3 30B-A3B FP8, 16 GPUs, EP16",
        8960,
        "26.04.01",
        pretraining(QWEN_30B_A3B, Ranks(data=16, expert=16), batch=1024, length=4096, fp8=True),
        note="sends a token to a node once, for all its experts there (HybridEP); the planner "
        "reckons with a plain all-to-all, as the policy does it",
    ),
    _bridge(
        "Qwen3 235B-A22B FP8, 256 GPUs, EP32",
        1712,
        "26.04.01",
        pretraining(
            QWEN_235B_A22B,
            Ranks(tensor=2, pipeline=8, virtual=4, data=16, expert=32),
            batch=8192,
            length=4096,
            fp8=True,
        ),
        note="the experts' exchange of one micro-batch runs beside another's products; the policy "
        "has none of that",
    ),
)

DECODING = (
    Figure(
        name="Llama 3.1 8B, H200, vLLM, latency",
        published=0.8334,
        unit="s",
        source=VLLM,
        predict=decoding(LLAMA_8B, 1, "h200", contexts=8, prompt=32, answer=128),
        role="fixes",
        constant="decode_layer_s",
    ),
    Figure(
        name="Llama 3 70B, 4 H200, vLLM, latency",
        published=2.0775,
        unit="s",
        source=VLLM,
        predict=decoding(LLAMA_70B, 4, "h200", contexts=8, prompt=32, answer=128),
    ),
)

GRPO_8B = RlRun(
    shape=LLAMA_8B,
    ranks=Ranks(pipeline=2, data=4),
    tensor=1,
    engines=8,
    prompts=64,
    answer=795,
    longest=3996,
    packed=4096,
    logprob_packs=4,
)
GRPO_70B = replace(
    GRPO_8B,
    shape=LLAMA_70B,
    ranks=Ranks(tensor=4, pipeline=4, data=4),
    tensor=4,
    engines=16,
    answer=398,
)


def _phase(name: str, published: float, predict: Prediction) -> Figure:
    return Figure(name=name, published=published, unit="s", source=NEMO_3, predict=predict)


PHASES = (
    replace(
        _phase("Llama 3.1 8B GRPO, 8 GPUs, generation", 58, GRPO_8B.rollout_s),
        role="fixes",
        constant="decode_context_s",
    ),
    _phase("Llama 3.1 8B GRPO, 8 GPUs, training", 28, GRPO_8B.train_s),
    _phase("Llama 3.1 8B GRPO, 8 GPUs, log-probs", 18, GRPO_8B.logprobs_s),
    _phase("Llama 3.1 70B GRPO, 64 GPUs, generation", 84, GRPO_70B.rollout_s),
    _phase("Llama 3.1 70B GRPO, 64 GPUs, training", 28, GRPO_70B.train_s),
    _phase("Llama 3.1 70B GRPO, 64 GPUs, log-probs", 18, GRPO_70B.logprobs_s),
    _phase("Llama 3.1 70B GRPO, 64 GPUs, step", 147, GRPO_70B.total_s),
)

GRPO_30B = replace(
    GRPO_8B,
    shape=QWEN_30B_A3B,
    ranks=Ranks(data=32, expert=8),
    tensor=2,
    engines=16,
    answer=3103,
)
GRPO_32B = replace(
    GRPO_8B,
    shape=QWEN_32B,
    ranks=Ranks(tensor=4, pipeline=4, data=2),
    tensor=4,
    engines=8,
    answer=3151,
    logprob_packs=1,
)
GRPO_235B = RlRun(
    shape=QWEN_235B_A22B,
    ranks=Ranks(tensor=2, context=2, pipeline=8, data=4, expert=16),
    tensor=16,
    engines=8,
    prompts=16,
    answer=5598,
    longest=8092,
    packed=8192,
    updates=1,
    recompute=True,
)
GRPO_671B = replace(
    GRPO_235B,
    shape=DEEPSEEK_V3,
    ranks=Ranks(pipeline=16, data=16, expert=16),
    tensor=32,
    answer=601,
    longest=1436,
    packed=1536,
)


def _step(name: str, published: float, release: str, run: RlRun, note: str = "") -> Figure:
    return Figure(
        name=f"{name}, step",
        published=published,
        unit="s",
        source=f"{NEMO}, {release}; examples/configs/recipes/llm/performance",
        predict=run.total_s,
        role="miss" if note else "check",
        note=note,
    )


_GB200 = (
    "the shares of peaks are those of Hopper; on Blackwell less of its peak seems to be got, in "
    "these runs of the first releases that knew it"
)

STEPS = (
    _step(
        "Llama 3.1 8B GRPO, 16 GPUs",
        92.8,
        "0.5",
        replace(
            GRPO_8B,
            ranks=Ranks(pipeline=2, data=8),
            engines=16,
            answer=919,
            recompute=True,
            logprob_packs=2,
        ),
    ),
    _step("Qwen3 32B GRPO, 32 GPUs", 376, "0.5", GRPO_32B),
    _step("Qwen3 30B-A3B GRPO, 32 GPUs", 192, "0.6", GRPO_30B),
    _step("Qwen3 235B-A22B GRPO, 128 GPUs", 395, "0.6", GRPO_235B),
    _step(
        "Qwen3 235B-A22B GRPO, 256 GPUs",
        312,
        "0.6",
        replace(
            GRPO_235B,
            ranks=Ranks(tensor=2, context=2, pipeline=8, data=8, expert=16),
            engines=16,
            answer=5613,
        ),
    ),
    _step(
        "Llama 3.1 8B GRPO, 8 + 8 GPUs, 1 step ahead",
        64.8,
        "0.5",
        replace(
            GRPO_8B,
            ranks=Ranks(data=8),
            engines=8,
            answer=1023,
            recompute=True,
            logprob_packs=2,
            memory=0.8,
            max_lag=1,
        ),
    ),
    _step(
        "Qwen3 32B GRPO, 32 + 32 GPUs, 1 step ahead",
        200,
        "0.5",
        replace(GRPO_32B, memory=0.8, max_lag=1),
    ),
    _step(
        "Qwen3 30B-A3B GRPO, 16 + 16 GPUs, 1 step ahead",
        152,
        "0.6",
        replace(
            GRPO_30B,
            ranks=Ranks(pipeline=2, data=8, expert=8),
            engines=8,
            memory=0.8,
            max_lag=1,
        ),
    ),
    _step(
        "Qwen3 235B-A22B GRPO, 128 + 128 GPUs, 1 step ahead",
        231,
        "0.6",
        replace(
            GRPO_235B,
            ranks=Ranks(tensor=4, pipeline=8, data=4, expert=16),
            tensor=8,
            engines=16,
            answer=5621,
            memory=0.88,
            max_lag=1,
        ),
    ),
    _step(
        "Qwen3 30B-A3B GRPO, 128 + 64 GPUs, 8 steps ahead",
        34.5,
        "0.6",
        replace(GRPO_30B, ranks=Ranks(data=128, expert=8), engines=32, memory=0.8, max_lag=8),
        note="full engines bind, and their host work a token is that of NeMo-RL 0.3; later "
        "servers take less",
    ),
    _step(
        "DeepSeek-V3 671B GRPO, 256 GPUs",
        134,
        "0.6",
        GRPO_671B,
        note="three quarters of the prediction are the update, at 10 GB/s as of release 0.3",
    ),
    _step(
        "Qwen3 30B-A3B GRPO, 16 GB200",
        221,
        "0.6",
        replace(
            GRPO_30B,
            ranks=Ranks(data=16, expert=16),
            tensor=1,
            engines=16,
            answer=3099,
            chip="gb200",
            node=72,
        ),
        note=_GB200,
    ),
    _step(
        "Llama 3.1 8B GRPO, 8 GB200",
        91.0,
        "0.5",
        replace(
            GRPO_8B,
            ranks=Ranks(data=8),
            answer=966,
            recompute=True,
            logprob_packs=2,
            chip="gb200",
            node=72,
        ),
    ),
    _step(
        "Qwen3 32B GRPO, 16 GB200",
        381,
        "0.5",
        replace(
            GRPO_32B,
            ranks=Ranks(tensor=2, data=8),
            tensor=1,
            engines=16,
            answer=3153,
            chip="gb200",
            node=72,
        ),
        note=_GB200,
    ),
)


def _update(name: str, published: float, run: Prediction, note: str = "") -> Figure:
    return Figure(
        name=f"{name}, weight update",
        published=published,
        unit="s",
        source=RESHARD,
        predict=run,
        role="miss" if note else "check",
        note=note,
    )


UPDATES = (
    replace(
        _update(
            "Qwen3 30B-A3B bf16",
            0.87,
            update(QWEN_30B_A3B, Ranks(pipeline=2, data=8, expert=8), 8, 2, whole_share=0.05),
        ),
        role="fixes",
        constant="sync_layer_s",
    ),
    _update(
        "DeepSeek-V3 671B bf16",
        2.61,
        update(DEEPSEEK_V3, Ranks(pipeline=16, data=16, expert=16), 32, 8, whole_share=0.024),
    ),
    _update(
        "Qwen3.5 397B-A17B bf16",
        2.07,
        update(
            QWEN_397B_A17B,
            Ranks(tensor=8, pipeline=8, data=4, expert=32),
            16,
            16,
            whole_share=0.026,
        ),
    ),
    _update(
        "DeepSeek-V3 671B bf16, GB200",
        2.26,
        update(
            DEEPSEEK_V3,
            Ranks(pipeline=16, data=16, expert=16),
            32,
            8,
            whole_share=0.024,
            chip="gb200",
        ),
    ),
    _update(
        "Qwen3 4B bf16",
        0.275,
        update(QWEN_4B, Ranks(data=8), 8, 1, whole_share=0.331),
        note="0.2 s lie outside bytes, of the 30B-A3B 0.6: a layer without experts takes less, "
        "and a second constant would want a second figure",
    ),
    replace(
        _update(
            "Qwen2.5 32B, whole tensors, verl",
            14.2,
            whole_update(QWEN_32B, 4, 4),
            note="software decides: from half the bytes a second (verl) to twice (miles)",
        ),
        source="github.com/verl-project/verl docs/advance/delta_weight_sync.md (nccl, 2 + 2 nodes)",
    ),
    replace(
        _update(
            "Qwen3 30B-A3B, whole tensors, verl",
            7.0,
            whole_update(QWEN_30B_A3B, 2, 15),
        ),
        source="github.com/verl-project/verl verl/checkpoint_engine/README.md (NCCL, 4 x 8 H100)",
    ),
    replace(
        _update(
            "Qwen3 30B-A3B, whole tensors, miles",
            2.67,
            whole_update(QWEN_30B_A3B, 8, 2),
            note="as above",
        ),
        source="github.com/radixark/miles docs/advanced/p2p-weight-transfer.md (NCCL, 2 + 2 nodes)",
    ),
)

QWEN_1_5B = replace(model(28, 1536, 8960, 12, 2, 151936), tied=True)
OWN_TOKENS = 62_192


def _own_trainer(constants: Constants) -> Trainer:
    return Trainer(
        model=QWEN_1_5B,
        ranks=Ranks(),
        machines=machines(constants, "h200"),
        microbatch_tokens=OWN_TOKENS / 4,
        keys=1500,
        distributed_optimizer=False,
    )


OWN = (
    Figure(
        name="Qwen2.5 1.5B bf16, one H200, training",
        published=1.51,
        unit="s",
        source="docs/benchmarks.md, One GPU (this project; no TransformerEngine)",
        predict=lambda constants: train_time(_own_trainer(constants), OWN_TOKENS).total_s,
    ),
    Figure(
        name="Qwen2.5 1.5B bf16, one H200, log-probs",
        published=OWN_TOKENS / 128_289,
        unit="s",
        source="docs/benchmarks.md, One GPU (this project; no TransformerEngine)",
        predict=lambda constants: logprob_time(_own_trainer(constants), OWN_TOKENS).total_s,
    ),
)

FIGURES: tuple[Figure, ...] = (
    *OWN,
    *PRETRAINING,
    *BRIDGED,
    *DECODING,
    *PHASES,
    *STEPS,
    *UPDATES,
)


def solved(constants: Constants = CONSTANTS) -> Constants:
    """The constants that make each fixing figure exact, one after the other until none moves."""
    fixing = [figure for figure in FIGURES if figure.role == "fixes"]
    for _ in range(6):
        for figure in fixing:
            constants = replace(constants, **{figure.constant: _solution(figure, constants)})
    return constants


def _solution(figure: Figure, constants: Constants) -> float:
    """The value of the figure's constant at which its error is 0; errors are monotonic in it."""
    present: float = getattr(constants, figure.constant)
    low, high = present / 10, present * 10

    def error(value: float) -> float:
        return figure.error(replace(constants, **{figure.constant: value}))

    rising = error(high) > error(low)
    for _ in range(60):
        middle = sqrt(low * high)
        if (error(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return middle
