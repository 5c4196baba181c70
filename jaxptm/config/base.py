"""What all configs share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

IGNORED = -100
"""Label of a token that is not asked for, as in PyTorch and transformers."""
RATE = 16_000
"""Samples of audio a second, of all models."""
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every config: unknown keys are refused, types are not coerced, instances are immutable and hashable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
