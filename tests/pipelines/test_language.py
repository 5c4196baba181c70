"""Masks filled and texts continued, against the pipelines of transformers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pipeline_pairs import assert_close, opened, texts_of_all_lengths
from reference import SMALL, perturbed

import jaxptm
from jaxptm.data.tokenizer import train_bpe, train_wordpiece
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


def test_two_hundred_texts_of_all_lengths(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path, "fill-mask", "BertForMaskedLM")
    texts = [
        f"the [MASK] {text}" if i % 3 else f"the [MASK] [MASK] {text}"
        for i, text in enumerate(texts_of_all_lengths(200, 60))
    ]
    options = {"top_k": 3, "tokenizer_kwargs": {"truncation": True}}
    assert sum(len(ours.model.tokenizer(text)["input_ids"]) > 40 for text in texts) > 50
    assert_close(ours(texts, **options), theirs(texts, **options))


def test_targets(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert_same(ours(TEXTS[0], targets=["sat", "dog"]), theirs(TEXTS[0], targets=["sat", "dog"]))
    assert_same(ours(TEXTS[0], targets="sat"), theirs(TEXTS[0], targets="sat"))


def test_batches_do_not_matter(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    texts = TEXTS * 3
    for one, many in zip([ours(text) for text in texts], ours(texts, batch_size=4), strict=True):
        np.testing.assert_allclose([answer["score"] for answer in one], [answer["score"] for answer in many], rtol=1e-5)


@pytest.mark.parametrize("change", [{"padding_side": "left"}, {"pad_token": None, "eos_token": "[SEP]"}])
def test_rows_are_filled_up_as_the_model_was_trained(pair: tuple[Any, Any], tmp_path: Path, change: Any) -> None:
    ours, theirs = pair
    shutil.copytree(ours.model.source, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    other = jaxptm.pipeline("fill-mask", tmp_path)
    assert {name: getattr(other.model.tokenizer, name) for name in change} == change
    assert_same(other(TEXTS), theirs(TEXTS))


def test_padding_that_is_asked_for_is_not_attended_to(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    options = {"tokenizer_kwargs": {"padding": "max_length", "max_length": 36}}
    assert_same(ours(TEXTS, **options), theirs(TEXTS, **options))


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
    for size in (0, -1):
        with pytest.raises(JaxptmError, match=f"batch_size is {size}, expected at least 1"):
            ours(TEXTS[0], batch_size=size)
    with pytest.raises(JaxptmError, match="there is no pipeline 'fly'; there is fill-mask, text-generation"):
        jaxptm.pipeline("fly", tmp_path)


SENTENCES = ["The cat sat on the mat.", "A dog sat on a log, and the other dog slept under the old log all day long."]
BEGINNINGS = ["The cat", "A dog sat on a log, and the other dog slept", " log", "Smörgås, 猫", "The"]


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("gpt2")
    bpe = json.loads(train_bpe(SENTENCES * 4, 300).backend_tokenizer.to_str())["model"]
    # As published: an end of text, and no padding.
    tokenizer = transformers.GPT2Tokenizer(vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]])
    assert tokenizer.pad_token_id is None
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=96, bos_token_id=end, eos_token_id=end
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return (
        jaxptm.pipeline("text-generation", directory),
        transformers.pipeline("text-generation", str(directory), device="cpu"),
    )


@pytest.mark.parametrize("text", ["The cat", ["The cat"], BEGINNINGS, tuple(BEGINNINGS[:2])])
@pytest.mark.parametrize("full", [True, False])
def test_text_generation_answers_as_transformers_does(generators: tuple[Any, Any], text: Any, full: bool) -> None:
    ours, theirs = generators
    options = {"max_new_tokens": 24, "do_sample": False, "return_full_text": full}
    wanted = theirs(list(text) if isinstance(text, tuple) else text, **options)
    assert ours(text, **options) == wanted
    assert ours(text, batch_size=2, **options) == wanted


def test_several_answers_nest_as_those_of_transformers(generators: tuple[Any, Any]) -> None:
    ours, theirs = generators
    for text in ("The cat", BEGINNINGS[:2]):
        options = {"max_new_tokens": 8, "num_return_sequences": 3}
        mine, others = ours(text, **options), theirs(text, **options)
        if isinstance(text, str):
            mine, others, text = [mine], [others], [text]
        for beginning, answers, wanted in zip(text, mine, others, strict=True):
            assert len(answers) == len(wanted) == 3
            assert len({answer["generated_text"] for answer in answers}) > 1
            for answer in answers:
                assert answer.keys() == wanted[0].keys()
                assert answer["generated_text"].startswith(beginning)


def test_sampled_texts_depend_on_the_seed_and_not_on_the_batches(generators: tuple[Any, Any]) -> None:
    ours, _ = generators
    together = ours(BEGINNINGS, max_new_tokens=12, num_return_sequences=2, seed=3)
    assert together == ours(BEGINNINGS, max_new_tokens=12, num_return_sequences=2, seed=3, batch_size=3)
    assert together != ours(BEGINNINGS, max_new_tokens=12, num_return_sequences=2, seed=4)
    assert together[0] == ours(BEGINNINGS[0], max_new_tokens=12, num_return_sequences=2, seed=3)


def test_an_ended_text_has_no_padding(generators: tuple[Any, Any]) -> None:
    """Some of many texts drawn hot come to the end of text, which is not spelt out, nor is what follows."""
    ours, _ = generators
    answers = ours(["The"] * 8, max_new_tokens=60, temperature=50.0, top_k=None, num_return_sequences=8)
    texts = [answer["generated_text"] for group in answers for answer in group]
    ids = [len(ours.model.tokenizer(text)["input_ids"]) for text in texts]
    assert min(ids) < 50 < max(ids)
    assert not any("<|endoftext|>" in text for text in texts)


def test_where_config_json_is_silent_the_tokenizer_knows_the_end(generators: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = generators
    ours.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    silent = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token_id"}
    path.write_text(json.dumps(silent))
    options = {"max_new_tokens": 60, "temperature": 50.0, "top_k": None, "num_return_sequences": 8}
    assert jaxptm.pipeline("text-generation", tmp_path)("The", **options) == ours("The", **options)


def test_by_default_a_text_grows_as_long_as_the_model_takes(generators: tuple[Any, Any]) -> None:
    """256 tokens where there is room, whatever the texts beside it leave."""
    ours, theirs = generators
    texts = ["The cat", "A dog sat on a log. " * 12, "The", "The cat sat on the mat. " * 4]
    taken = [len(ours.model.tokenizer(text)["input_ids"]) for text in texts]
    assert min(taken) < 5 and 80 < max(taken) < 96
    alone = [theirs(text, do_sample=False, max_new_tokens=96 - n) for text, n in zip(texts, taken, strict=True)]
    assert ours(texts, do_sample=False) == alone
    drawn = ours(texts, seed=1)
    assert drawn == ours(texts, seed=1, batch_size=2)
    assert drawn == [ours(text, seed=1, first=at) for at, text in enumerate(texts)]


def test_the_end_is_that_of_generation_config(
    generators: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = generators
    shutil.copytree(ours.model.source, tmp_path, dirs_exist_ok=True)
    options = {"do_sample": False, "max_new_tokens": 24, "return_full_text": False}
    grown = ours.model.generate([ours.model.tokenizer("The cat")["input_ids"]], max_new_tokens=24)[0, -20:].tolist()
    said = {"eos_token_id": [grown[0], 50256], "pad_token_id": 50257, "num_beams": 1, "top_k": 50}
    path = tmp_path / "generation_config.json"
    for unread in ({}, {"repetition_penalty": 1.5}):
        path.write_text(json.dumps(said | unread))
        model = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
        model.model.generation_config.repetition_penalty = None
        with caplog.at_level(logging.WARNING, logger="jaxptm"):
            found = jaxptm.pipeline("text-generation", tmp_path)
            answers = [found(BEGINNINGS, **options), found(BEGINNINGS, **options)][1]
        assert answers == model(BEGINNINGS, **options, pad_token_id=0) != ours(BEGINNINGS, **options)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == len(unread)
    assert "generation_config.json: is read for eos" in messages[0] and "not for repetition_penalty 1.5" in messages[0]
    path.write_text(json.dumps({"eos_token_id": "end"}))
    with pytest.raises(JaxptmError, match="eos_token_id is 'end', expected an id or a list of ids"):
        jaxptm.pipeline("text-generation", tmp_path)("The cat")


def test_an_end_outside_the_vocabulary_is_never_met(generators: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = generators
    shutil.copytree(ours.model.source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 50256, "pad_token_id": 50256}))
    options = {"do_sample": False, "max_new_tokens": 24}
    theirs = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
    found = jaxptm.pipeline("text-generation", tmp_path)
    assert found(BEGINNINGS, **options) == [theirs(text, **options) for text in BEGINNINGS]
    assert found.model.generate([[5]], max_new_tokens=8).shape == (1, 9)
    with pytest.raises(JaxptmError, match="eos_token_id is 50256, outside the vocabulary"):
        found.model.generate([[5]], max_new_tokens=8, eos_token_id=50256)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text '' is empty: give a beginning"),
        (["The", ""], {}, "the text '' is empty"),
        ("cat " * 100, {}, "tokens, the model takes 96, new ones included; shorten the text"),
        ("The cat", {"max_new_tokens": 96}, "and 96 new ones are .* the model takes 96; shorten the prompt or lower"),
        ("The cat", {"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ("The cat", {"batch_size": -1}, "batch_size is -1, expected at least 1"),
        ("The cat", {"num_return_sequences": 0}, "num_return_sequences is 0"),
        ("The cat", {"num_return_sequences": 2, "do_sample": False}, "more than 1 only with do_sample"),
        ("The cat", {"temperature": 0}, "temperature is 0, expected more than 0"),
        ("The cat", {"top_k": 0}, "top_k is 0, expected at least 1"),
        ("The cat", {"top_p": 1.5}, "top_p is 1.5, expected more than 0 and at most 1"),
    ],
)
def test_what_cannot_be_generated(generators: tuple[Any, Any], text: Any, options: Any, message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        generators[0](text, **options)


def test_a_batch_needs_an_id_to_pad_with(generators: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = generators
    ours.model.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    bare = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("eos_token", "pad_token")}
    path.write_text(json.dumps(bare | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(JaxptmError, match=r"neither a padding token nor an end of text.*set `pad_token`"):
        jaxptm.pipeline("text-generation", tmp_path)(BEGINNINGS, max_new_tokens=2)


def test_an_encoder_generates_nothing(pair: tuple[Any, Any]) -> None:
    with pytest.raises(JaxptmError, match="bert has no head for the task 'causal-lm'"):
        jaxptm.pipeline("text-generation", pair[0].model.source)
