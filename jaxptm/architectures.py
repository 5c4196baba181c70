"""Which family a model is of, which head it has and how large it is: as config.json says, or a training config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxptm.config import validate
from jaxptm.hf import files
from jaxptm.models import FAMILIES, PRESETS, Family
from jaxptm.nn.model import ModelConfig
from jaxptm.types import JaxptmError


def read_family(directory: Path) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json of a model directory."""
    hf_config = files.read_json(directory / "config.json")
    name = hf_config.get("model_type")
    if name not in FAMILIES:
        raise JaxptmError(f"{directory / 'config.json'}: model_type {name!r} is not one of {', '.join(FAMILIES)}.")
    return FAMILIES[name], hf_config


def read_config(family: Family, hf_config: Mapping[str, Any], directory: Path) -> ModelConfig:
    """Our config from a config.json."""
    path = directory / "config.json"
    try:
        return validate(family.config, family.from_hf(hf_config), str(path))
    except (ValueError, ValidationError) as error:
        raise JaxptmError(f"{path}: {error}.") from error


def model_config(
    model: str | Mapping[str, Any], vocab_size: int | None, pad_token_id: int | None = None
) -> tuple[Family, ModelConfig]:
    """The model of a training config: a preset, a directory or hub name, or `{preset: ..., field: value}`.

    Args:
        vocab_size: of the tokenizer, if there is one; a preset takes it unless the fields say otherwise, as it does
            `pad_token_id`.

    Raises:
        JaxptmError: no such preset or field, or a vocabulary smaller than the tokenizer's.
    """
    fields = {"preset": model} if isinstance(model, str) else dict(model)
    preset = fields.pop("preset", None)
    of_tokenizer = {"vocab_size": vocab_size, "pad_token_id": pad_token_id}
    of_tokenizer = {name: value for name, value in of_tokenizer.items() if value is not None}
    if preset in PRESETS:
        family, config = PRESETS[preset]
        fields = {**config.model_dump(), **of_tokenizer, **fields}
    elif preset is not None:
        try:
            directory = files.resolve(preset)
        except JaxptmError as error:
            raise JaxptmError(f"model: {preset!r} is no preset ({', '.join(PRESETS)}); {error}") from error
        family, hf_config = read_family(directory)
        fields = {**read_config(family, hf_config, directory).model_dump(), **fields}
    else:
        name = fields.pop("family", "bert")
        if name not in FAMILIES:
            raise JaxptmError(f"model.family: {name!r} is not one of {', '.join(FAMILIES)}.")
        family = FAMILIES[name]
        fields = {**of_tokenizer, **fields}
    config = validate(family.config, fields, "model")
    if config.vocab_size < (vocab_size or 0):
        raise JaxptmError(
            f"model.vocab_size: {config.vocab_size} is too small for the tokenizer's {vocab_size} entries."
        )
    return family, config


def check_vocabulary(tokenizer: Any, config: ModelConfig, source: str) -> None:
    """Raises JaxptmError where the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise JaxptmError(
            f"{source}: the tokenizer has {len(tokenizer)} entries, the model's vocabulary {config.vocab_size}; "
            "they do not belong together."
        )


def declared_task(family: Family, hf_config: Mapping[str, Any], directory: Path) -> str | None:
    """The task of the head that config.json declares."""
    declared = hf_config.get("architectures") or []
    tasks = [task for task, architecture in family.architectures.items() if architecture in declared]
    if len(tasks) == 1:
        return tasks[0]
    kinds = ", ".join(family.architectures.values())
    raise JaxptmError(
        f"{directory / 'config.json'}: `architectures: {declared}` names {'several heads' if tasks else 'no head'} of "
        f"{family.model_type}; write there which one it is, of {kinds} (in Python, pass the task)."
    )
