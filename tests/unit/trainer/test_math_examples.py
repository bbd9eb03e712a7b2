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
