"""The coefficients of one trainer step: the only place where the schedules are read."""

from megatron_spear.config.method import CurriculumSection
from megatron_spear.curriculum.schedules import DECAYS, WARMUPS
from megatron_spear.types import Coefficients


def coefficients(step: int, section: CurriculumSection) -> Coefficients:
    """gamma(t) and mu(t) at trainer step ``step`` (1-based), SPEAR Eq. 13-14 by default.

    Read once at the start of a step and carried in ``StepContext``; no other code knows the
    schedules. Example: the defaults at step 10 give intrinsic_weight 0.5 (half of 20 steps) and
    replay_weight 0.75.
    """
    decay, warmup = DECAYS[section.intrinsic_schedule], WARMUPS[section.replay_schedule]
    return Coefficients(
        intrinsic_weight=section.intrinsic_weight * decay(step, section.intrinsic_decay_steps),
        replay_weight=section.replay_weight * warmup(step, section.replay_warmup_steps),
    )
