"""Names that Megatron imports from TE >= 2.7; its fused router is never switched on here."""

from typing import Any


def _missing(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the stand-in has no fused router")


fused_compute_score_for_moe_aux_loss = _missing
fused_moe_aux_loss = _missing
fused_topk_with_score_function = _missing
