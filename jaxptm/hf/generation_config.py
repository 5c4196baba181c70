"""What generation_config.json says of the texts that a model writes, and what of that is read here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxptm.errors import JaxptmError
from jaxptm.hf import files

log = logging.getLogger("jaxptm")

NEUTRAL: Mapping[str, float | None] = {
    "temperature": 1,
    "top_k": 50,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": None,
    "guidance_scale": 1,
}
"""Settings of generation_config.json that change texts and are not read from there, and values that change nothing."""


def read_generation_config(directory: Path | None, hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says, and over it the generation_config.json of a model's directory, if there is one.

    Settings that would change texts and are not read from there are named in a warning.
    """
    path = None if directory is None else directory / files.GENERATION_FILES[0]
    if path is None or not path.exists():
        return hf_config
    own = files.read_json(path)
    unread = [f"{name} {own[name]}" for name in NEUTRAL if own.get(name) not in (None, NEUTRAL[name])]
    if unread:
        log.warning(
            "%s: is read for eos_token_id and pad_token_id alone, not for %s; pass what `generate` takes of these.",
            path,
            ", ".join(unread),
        )
    return {**hf_config, **own}


def declared_tokens(config: Mapping[str, Any], name: str, vocab_size: int, source: str) -> list[int] | None:
    """The ids of `eos_token_id` or `pad_token_id`; None where there is no such key.

    Ids outside the vocabulary are left out, as no text holds them: a small GPT-2 often declares the end of the
    published one.

    Raises:
        JaxptmError: it holds something else than ids.
    """
    if name not in config:
        return None
    value = config[name]
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise JaxptmError(f"{source}: {name} is {value!r}, expected an id or a list of ids.")
    return [token for token in ids if 0 <= token < vocab_size]
