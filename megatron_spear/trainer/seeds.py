"""Seeds of generated games: training, warm start and panel can never share one."""

_TRAINING, _WARM_START, _PANEL, _KINDS = 0, 1, 2, 4


def training_games(seed: int) -> int:
    """Seed of the RL steps' games for ``run.seed``."""
    return seed * _KINDS + _TRAINING


def warm_start_games(seed: int) -> int:
    """Seed of the demonstrations' games for ``sft.seed``."""
    return seed * _KINDS + _WARM_START


def panel_games(seed: int) -> int:
    """Seed of the panel's games for ``evaluation.seed``."""
    return seed * _KINDS + _PANEL
