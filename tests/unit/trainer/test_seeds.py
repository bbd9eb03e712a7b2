"""Seeds of games: training, warm start and panel never share one."""

from megatron_spear.trainer.seeds import panel_games, training_games, warm_start_games


def test_no_two_kinds_or_seeds_share_a_seed_of_games() -> None:
    kinds = (training_games, warm_start_games, panel_games)
    made = [kind(seed) for kind in kinds for seed in range(101)]
    assert len(set(made)) == len(made) == 303
    assert min(made) >= 0
