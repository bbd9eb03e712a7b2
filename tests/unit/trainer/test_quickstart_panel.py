"""The panel the published learning results are measured on stays the same games."""

from pathlib import Path

from megatron_spear.config.load import load_config
from megatron_spear.trainer.build import make_panel

QUICKSTART = Path(__file__).parents[3] / "examples/alfworld/quickstart.yaml"


def test_the_quickstart_panel_of_256_games_is_fixed() -> None:
    """Results on other games do not compare: change this number, and README, knowingly."""
    panel = make_panel(load_config(QUICKSTART, ["evaluation.games=256"]))
    assert len(panel.prompts) == 256
    assert panel.sha256[:16] == "1e86ec4223b73662"
    assert {game.prompt_id.split("-")[0] for game in panel.prompts} == {
        "look_at_obj_in_light",
        "pick_and_place_simple",
        "pick_clean_then_place_in_recep",
        "pick_cool_then_place_in_recep",
        "pick_heat_then_place_in_recep",
        "pick_two_obj_and_place",
    }
