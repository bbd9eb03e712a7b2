"""The math examples' settings work together, and the quickstart's panel stays what it is."""

from pathlib import Path

from megatron_spear.config.check import check_config
from megatron_spear.config.load import load_config
from megatron_spear.envs.family import family_of
from megatron_spear.trainer.seeds import panel_games

EXAMPLES = Path(__file__).parents[3] / "examples/math_code"


def test_the_quickstart_works_on_one_rank() -> None:
    config = load_config(EXAMPLES / "quickstart.yaml")
    assert check_config(config, 1) == []
    assert (config.reward.success, config.reward.failure) == (1.0, -1.0)


def test_the_quickstart_panel_is_fixed() -> None:
    """Results on other problems do not compare: change this number knowingly."""
    config = load_config(EXAMPLES / "quickstart.yaml")
    panel = family_of(config.env).panel(256, panel_games(config.evaluation.seed))
    assert len(panel.prompts) == 256
    assert panel.sha256[:16] == "31eb739df50dda4e"
    assert {p.kind for p in panel.prompts} == {"sum", "product", "mixed", "remainder", "range"}


def test_the_paper_setting_works_on_its_ranks() -> None:
    config = load_config(EXAMPLES / "qwen2.5-32b.yaml")
    cluster = config.cluster
    assert check_config(config, cluster.trainer_nodes * cluster.ranks_per_node) == []
    assert config.env.task_kinds == ("dapo-math-17k",)
    assert (config.env.max_turns, config.env.sandbox.timeout_s) == (8, 30.0)
    assert config.rollout.max_context == 2048 + config.rollout.max_new_tokens
