"""The FP8 state of the process and the contexts that set it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..common.recipe import DelayedScaling, Recipe


class FP8GlobalStateManager:
    """Whether linears run in FP8 now, by which recipe, and whether new weights are held in it."""

    enabled = False
    recipe: Recipe | None = None
    parameters = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return cls.parameters

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        return cls.recipe or DelayedScaling()


@contextmanager
def _setting(**values: Any) -> Iterator[None]:
    before = {name: getattr(FP8GlobalStateManager, name) for name in values}
    try:
        for name, value in values.items():
            setattr(FP8GlobalStateManager, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(FP8GlobalStateManager, name, value)


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
) -> Iterator[None]:
    """Inside, TE's linears run in FP8."""
    assert not calibrating, "the stand-in does not calibrate"
    with _setting(enabled=enabled, recipe=fp8_recipe):
        yield


@contextmanager
def fp8_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Inside, weights of new linears are held in FP8."""
    with _setting(parameters=enabled, recipe=recipe):
        yield
