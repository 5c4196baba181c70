"""Pipelines against those of transformers, on perturbed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from reference import SMALL, perturbed

import jaxptm
from jaxptm.data.tokenizer import train_wordpiece
from jaxptm.types import JaxptmError

TEXTS = [
    "The cat [MASK] on the mat.",
    "[MASK] dog sat on a log, and the other dog slept under the old log all day long.",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("model")
    sentences = [
        "The cat sat on the mat.",
        "A dog sat on a log.",
        "The other dog slept under the old log all day long, and",
    ]
    tokenizer = train_wordpiece(sentences * 4, 120)
    perturbed("BertForMaskedLM", noise=0.3, **{**SMALL, "vocab_size": len(tokenizer)}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return jaxptm.pipeline("fill-mask", directory), transformers.pipeline("fill-mask", str(directory), device="cpu")


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        assert ours["score"] == pytest.approx(theirs["score"], abs=2e-6)
        assert {key: ours[key] for key in ours if key != "score"} == {
            key: theirs[key] for key in theirs if key != "score"
        }
    else:
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)


@pytest.mark.parametrize("text", [*TEXTS, "[MASK] cat sat on [MASK] mat", TEXTS, [TEXTS[0]]])
def test_fill_mask_answers_as_transformers_does(pair: tuple[Any, Any], text: Any) -> None:
    ours, theirs = pair
    assert_same(ours(text), theirs(text))
    assert_same(ours(text, top_k=2), theirs(text, top_k=2))


def test_targets(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert_same(ours(TEXTS[0], targets=["sat", "dog"]), theirs(TEXTS[0], targets=["sat", "dog"]))
    assert_same(ours(TEXTS[0], targets="sat"), theirs(TEXTS[0], targets="sat"))


def test_batches_do_not_matter(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    texts = TEXTS * 3
    for one, many in zip([ours(text) for text in texts], ours(texts, batch_size=4), strict=True):
        np.testing.assert_allclose([answer["score"] for answer in one], [answer["score"] for answer in many], rtol=1e-5)


def test_bad_input(pair: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = pair
    with pytest.raises(JaxptmError, match=r"'no mask here' holds no mask token: write \[MASK\]"):
        ours("no mask here")
    with pytest.raises(JaxptmError, match="the model takes 40; shorten the text"):
        ours("[MASK] " + "cat " * 60)
    with pytest.raises(JaxptmError, match="targets: 'elephant': not single tokens"):
        ours(TEXTS[0], targets=["elephant"])
    with pytest.raises(JaxptmError, match="top_k is 0"):
        ours(TEXTS[0], top_k=0)
    with pytest.raises(JaxptmError, match="there is no pipeline 'fly'; there is fill-mask"):
        jaxptm.pipeline("fly", tmp_path)
