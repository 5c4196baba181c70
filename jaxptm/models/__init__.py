"""The model families, by the `model_type` of their config.json."""

from __future__ import annotations

from jaxptm.models import albert, bert, distilbert, electra, gpt2, roberta, wav2vec2
from jaxptm.models.family import Family
from jaxptm.nn.model import ModelConfig

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
        wav2vec2.FAMILY,
        wav2vec2.HUBERT_FAMILY,
    )
}
PRESETS = {name: (family, config) for family in FAMILIES.values() for name, config in family.presets.items()}

__all__ = ["FAMILIES", "PRESETS", "Family", "family_of"]


def family_of(config: ModelConfig) -> Family:
    """The family that a config belongs to."""
    return next(family for family in FAMILIES.values() if type(config) is family.config)
