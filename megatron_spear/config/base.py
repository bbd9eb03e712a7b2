"""What every settings class is made of: the frozen base and the ranges of numbers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megatron_spear.user_code import is_code_path

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


def _is_code_path(value: str) -> str:
    if not is_code_path(value):
        raise ValueError(f"got {value!r}, expected 'package.module:Class' or 'FILE.py:Class'")
    return value


CodePath = Annotated[str, AfterValidator(_is_code_path)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
