"""One small perturbed model behind two pipelines, ours and that of transformers, and inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from reference import SMALL, perturbed

import jaxptm
from jaxptm.data.tokenizer import train_wordpiece

WORDS = "the cat sat on a mat dog log slept under old all day long and other".split()


def texts_of_all_lengths(count: int, longest: int) -> list[str]:
    """Words, words in capitals and with letters of no token, punctuation; from one word to more than a model takes."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        words = [str(rng.choice(WORDS)) for _ in range(1 + number * longest // count)]
        words = [word + str(rng.choice(["", "", "", "s", ".", ",", "猫", "ing"])) for word in words]
        made.append(" ".join(words))
    return [made[i] for i in rng.permutation(count)]


def save_small(directory: Path, architecture: str, **fields: Any) -> None:
    """A perturbed BERT with its tokenizer, whose window is 40 tokens."""
    tokenizer = train_wordpiece([" ".join(WORDS), "cats mats, dogs logs."] * 4, 90)
    tokenizer.model_max_length = 40
    model = perturbed(architecture, noise=0.3, **{**SMALL, "vocab_size": len(tokenizer), **fields})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def opened(directory: Path, task: str, architecture: str, **fields: Any) -> tuple[Any, Any]:
    """Our pipeline and that of transformers over one model of `save_small`."""
    save_small(directory, architecture, **fields)
    return jaxptm.pipeline(task, directory), transformers.pipeline(task, str(directory), device="cpu")


def assert_close(ours: Any, theirs: Any) -> None:
    """Same strings, places and order; scores within 1e-4."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(float(value), abs=1e-4) if key == "score" else value), key
    elif isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_close(mine, other)
    else:
        assert ours == pytest.approx(theirs, abs=1e-4)
