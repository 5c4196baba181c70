"""Masks filled and texts continued, against the pipelines of transformers."""

from __future__ import annotations

import json
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
    ours, _ = generators
    default = ours("The cat", do_sample=False)
    taken = len(ours.model.tokenizer("The cat")["input_ids"])
    assert default == ours("The cat", do_sample=False, max_new_tokens=96 - taken)  # 256 where there is room


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text '' is empty: give a beginning"),
        (["The", ""], {}, "the text '' is empty"),
        ("cat " * 100, {}, "tokens, the model takes 96, new ones included; shorten the text"),
        ("The cat", {"max_new_tokens": 96}, "and 96 new ones are .* the model takes 96; shorten the prompt or lower"),
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
