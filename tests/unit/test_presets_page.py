"""docs/presets.md shows the presets as they are, with the memory that the estimate gives."""

from pathlib import Path

from transformers import AutoConfig

from megatron_spear.cluster.planner.memory import fullest_rank
from megatron_spear.config.presets.layouts import MAX_RANK_BYTES, PRESETS, Preset
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import model_shape

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"


def row(preset: Preset) -> str:
    policy = PolicySection(**preset.policy)
    tensor, pipeline = policy.tensor_parallel, policy.pipeline_parallel
    experts = policy.expert_parallel
    shape = model_shape(AutoConfig.for_model(**preset.published.config))
    needs = fullest_rank(shape, policy, preset.gpus)
    cells = [
        f"`{preset.name}`",
        *(str(n) for n in (tensor, pipeline, preset.gpus // (tensor * pipeline), experts)),
        f"{policy.tokens_per_microbatch:,}",
        policy.recompute,
        f"{needs.states / 1e9:.1f} + {needs.activations / 1e9:.1f}",
        preset.why,
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_lists_every_preset_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if line.startswith("| `")]
    assert listed == [row(preset) for preset in PRESETS.values()]
    assert f"below {MAX_RANK_BYTES / 1e9:g} GB" in text
