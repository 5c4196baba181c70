"""Labels of texts and of tokens, against the pipelines of transformers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pipeline_pairs import WORDS, assert_close, opened, save_small, texts_of_all_lengths
from reference import SMALL, perturbed

import jaxptm
from jaxptm.data.tokenizer import train_wordpiece
from jaxptm.types import JaxptmError

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "ORG"]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 3, "id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "regression"},
    ],
    ids=["one label", "several labels", "one output", "number"],
)
def test_text_classification_answers_as_transformers_does(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours, theirs = opened(tmp_path, "text-classification", "BertForSequenceClassification", **fields)
    texts = texts_of_all_lengths(200, 60)
    assert_close(ours(texts, truncation=True), theirs(texts, truncation=True))
    for options in ({"top_k": 2}, {"top_k": None}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "none"}):
        for some in (texts[:3], "the cat", ["the cat"], {"text": "the cat", "text_pair": "a dog"}):
            assert_close(ours(some, truncation=True, **options), theirs(some, truncation=True, **options))
    pairs = [{"text": "the cat", "text_pair": text} for text in texts[:5]]
    assert_close(ours(pairs, truncation=True), theirs(pairs, truncation=True))
    mixed = [texts[0], pairs[0], texts[1], texts[2], pairs[1], pairs[2], {"text": texts[3]}]
    assert_close(ours(mixed, truncation=True), [theirs([one], truncation=True)[0] for one in mixed])
    assert ours([]) == []
    assert ours({"text": "the cat", "text_pair": None}) == ours({"text": "the cat"})


def test_a_row_without_tokens_is_an_error(tmp_path: Path) -> None:
    """A tokenizer without special tokens makes none of an empty text."""
    save_small(tmp_path, "BertForSequenceClassification", num_labels=2)
    plain = {
        "tokenizer.json": {"post_processor": None},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, change in plain.items():
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ours = jaxptm.pipeline("text-classification", tmp_path)
    for texts in ([""], ["the cat", ""]):
        with pytest.raises(JaxptmError, match=f"input {len(texts) - 1} is empty: it has no tokens"):
            ours(texts)


def test_wrong_input_of_text_classification(tmp_path: Path) -> None:
    ours, _ = opened(tmp_path, "text-classification", "BertForSequenceClassification", num_labels=2)
    for text, options, message in (
        ("cat " * 60, {}, "62 tokens, the model takes 40; pass truncation=True"),
        ("cat", {"top_k": 0}, "top_k is 0"),
        ("cat", {"function_to_apply": "tanh"}, "'tanh', expected one of sigmoid, softmax, none"),
        ([{"text_pair": "b"}], {}, "is no text; a pair is"),
        ({"text": "a", "text_pairs": "b"}, {}, "is no text; a pair is"),
        ("cat", {"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(JaxptmError, match=message):
            ours(text, **options)


@pytest.fixture(scope="module")
def taggers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    names = dict(enumerate(LABELS))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    directory = tmp_path_factory.mktemp("tagger")
    _, theirs = opened(directory, "token-classification", "BertForTokenClassification", **labels)
    # Drawn at random a model says nearly one thing; about the mean of its logits it says each of them.
    batch = theirs.tokenizer(texts_of_all_lengths(40, 60), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs.model(**batch).logits[batch["attention_mask"].bool()]
        theirs.model.classifier.weight.div_(logits.std(0)[:, None])
        theirs.model.classifier.bias.sub_(logits.mean(0)).div_(logits.std(0))
    theirs.model.save_pretrained(directory)
    return jaxptm.pipeline("token-classification", directory), theirs


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification_answers_as_transformers_does(taggers: tuple[Any, Any], strategy: str) -> None:
    ours, theirs = taggers
    texts = texts_of_all_lengths(200, 60)
    assert {entity["entity"] for text in ours(texts) for entity in text} == set(LABELS) - {"O"}
    options: dict[str, Any] = {"aggregation_strategy": strategy}
    assert_close(ours(texts, **options), theirs(texts, **options))
    for some in ("the cats sat", ["the cats sat"]):
        assert_close(ours(some, **options), theirs(some, **options))
    options["ignore_labels"] = ["PER", "B-PER"]
    assert_close(ours(texts[:20], **options), theirs(texts[:20], **options))
    words = [text.split() for text in texts[:20]]
    split: dict[str, Any] = {"is_split_into_words": True, "delimiter": "  ", "aggregation_strategy": strategy}
    assert_close(ours(words, **split), [theirs([sentence], **split)[0] for sentence in words])
    if strategy != "none":
        options = {"aggregation_strategy": strategy, "stride": 7}
        assert_close(ours(texts, **options), theirs(texts, **options))


def test_wrong_input_of_token_classification(taggers: tuple[Any, Any]) -> None:
    ours, _ = taggers
    for options, message in (
        ({"aggregation_strategy": "best"}, "'best', expected one of none, simple"),
        ({"stride": 4}, "choose an aggregation_strategy"),
        ({"stride": 38, "aggregation_strategy": "simple"}, "stride is 38, expected at least 0"),
    ):
        with pytest.raises(JaxptmError, match=message):
            ours("the cat", **options)
    assert ours([]) == [] and ours("") == []


def test_few_shapes_are_compiled(taggers: tuple[Any, Any]) -> None:
    ours, _ = taggers
    ours.model.__dict__.pop("_apply", None)
    ours(texts_of_all_lengths(200, 60))
    assert ours.model._apply._cache_size() <= 4


def test_next_sentence_is_the_head_of_transformers(tmp_path: Path) -> None:
    tokenizer = train_wordpiece([" ".join(WORDS)] * 4, 90)
    model = perturbed("BertForNextSentencePrediction", noise=0.3, **{**SMALL, "vocab_size": len(tokenizer)})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = jaxptm.pipeline("next-sentence", tmp_path)
    texts = texts_of_all_lengths(60, 7)
    pairs = [{"text": text, "text_pair": other} for text, other in pairwise(texts)]
    wanted = []
    for pair in pairs:
        with torch.no_grad():
            logits = model(**tokenizer(pair["text"], pair["text_pair"], return_tensors="pt")).logits[0]
        # transformers, BertForNextSentencePrediction: 0 is a continuation, 1 a random sentence.
        shares = dict(zip(("is_next", "not_next"), logits.softmax(0).tolist(), strict=True))
        best = max(shares, key=shares.__getitem__)
        wanted.append({"label": best, "score": shares[best]})
    assert_close(ours(pairs), wanted)
    assert_close(ours(pairs[0]), wanted[0])
    assert {answer["label"] for answer in wanted} == {"is_next", "not_next"}
    both = ours(pairs[:3], top_k=None)
    assert all(sum(answer["score"] for answer in answers) == pytest.approx(1) for answers in both)
    for wrong in ("the cat", {"text": "the cat"}, {"text": "the cat", "text_pair": ""}):
        with pytest.raises(JaxptmError, match="is no pair"):
            ours([wrong])


def test_replaced_tokens_are_those_of_the_discriminator_of_transformers(tmp_path: Path) -> None:
    tokenizer = train_wordpiece([" ".join(WORDS), "cats mats, dogs logs."] * 4, 90)
    torch.manual_seed(0)
    config = transformers.ElectraConfig(**{**SMALL, "vocab_size": len(tokenizer)}, embedding_size=16)
    model = transformers.ElectraForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = jaxptm.pipeline("replaced-token", tmp_path)
    texts = texts_of_all_lengths(60, 60)
    found = ours(texts, truncation=True)
    for text, tokens in zip(texts, found, strict=True):
        row = tokenizer(text, truncation=True, max_length=40, return_offsets_mapping=True)
        with torch.no_grad():
            scores = torch.sigmoid(model(torch.tensor([row["input_ids"]])).logits[0])
        assert [token["score"] for token in tokens] == pytest.approx(scores[1:-1].tolist(), abs=1e-4)
        assert [(token["start"], token["end"]) for token in tokens] == row["offset_mapping"][1:-1]
        assert [token["word"] for token in tokens] == tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1]
        assert [token["index"] for token in tokens] == list(range(1, len(scores) - 1))
        assert all(token["replaced"] == (token["score"] >= 0.5) for token in tokens)
    flagged = [token["replaced"] for tokens in found for token in tokens]
    assert 50 < sum(flagged) < len(flagged) - 50
    assert all(token["replaced"] for token in ours(texts[0][:20], threshold=0.0))
    assert ours([]) == []
    with pytest.raises(JaxptmError, match="tokens, the model takes 40; pass truncation=True"):
        ours("cat " * 60)
