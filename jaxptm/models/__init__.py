"""The model families, by the `model_type` of their config.json."""

from __future__ import annotations

from jaxptm.models import albert, bert, distilbert, electra, gpt2, roberta
from jaxptm.models.family import Family
from jaxptm.nn.text import TextConfig

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        bert.FAMILY,
        roberta.FAMILY,
        roberta.XLM_FAMILY,
        electra.FAMILY,
        gpt2.FAMILY,
        albert.FAMILY,
        distilbert.FAMILY,
    )
}
PRESETS = {name: (family, config) for family in FAMILIES.values() for name, config in family.presets.items()}

__all__ = ["FAMILIES", "PRESETS", "Family", "family_of"]


def family_of(config: TextConfig) -> Family:
    """The family that a config belongs to."""
    return next(family for family in FAMILIES.values() if type(config) is family.config)
