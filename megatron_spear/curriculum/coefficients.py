"""The coefficients of one trainer step: the only place where the schedules are read."""

from megatron_spear.config.method import CurriculumSection
from megatron_spear.curriculum.schedules import cosine_decay, cosine_warmup
from megatron_spear.types import Coefficients


def coefficients(step: int, section: CurriculumSection) -> Coefficients:
    """gamma(t) and mu(t) at trainer step ``step`` (1-based), SPEAR Eq. 13-14.

    Read once at the start of a step and carried in ``StepContext``; no other code knows the
    schedules. Example: the defaults at step 10 give intrinsic_weight 0.5 (half of 20 steps) and
    replay_weight 0.75.
    """
    return Coefficients(
        intrinsic_weight=section.intrinsic_weight
        * cosine_decay(step, section.intrinsic_decay_steps),
        replay_weight=section.replay_weight * cosine_warmup(step, section.replay_warmup_steps),
    )
