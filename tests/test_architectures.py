"""The family and the sizes of a model, as a training config says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest

from jaxptm.architectures import model_config
from jaxptm.errors import JaxptmError
from jaxptm.models import FAMILIES, PRESETS
from jaxptm.models.bert import BertConfig
from jaxptm.pretrained import from_pretrained


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with both heads of BERT's pre-training."""
    directory = tmp_path_factory.mktemp("pretraining")
    oracle.saved(directory, "pretraining")
    return directory


def test_presets_take_the_vocabulary_of_the_tokenizer() -> None:
    family, config = model_config("bert-mini", 1234)
    assert family.model_type == "bert"
    assert config == BertConfig(
        vocab_size=1234, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )


def test_presets_take_the_padding_of_the_tokenizer_unless_told_otherwise() -> None:
    assert model_config("roberta-tiny", 1234)[1].pad_token_id == 1
    assert model_config("roberta-tiny", 1234, 0)[1].pad_token_id == 0
    assert model_config({"preset": "roberta-tiny", "pad_token_id": 5}, 1234, 0)[1].pad_token_id == 5
    assert model_config("gpt2-tiny", 1234)[1].pad_token_id is None
    assert model_config({"family": "gpt2", "hidden_size": 96}, 1234)[1].intermediate_size == 384


def test_fields_override_a_preset() -> None:
    _, config = model_config(
        {"preset": "bert-tiny", "hidden_act": "relu", "vocab_size": 5000, "layer_norm_eps": 1e-6}, 1234
    )
    tiny = PRESETS["bert-tiny"][1]
    assert config == tiny.model_copy(update={"hidden_act": "relu", "vocab_size": 5000, "layer_norm_eps": 1e-6})


def test_fields_alone_describe_a_model() -> None:
    assert model_config({"hidden_size": 24, "num_attention_heads": 3}, 99)[1] == BertConfig(
        hidden_size=24, num_attention_heads=3, vocab_size=99
    )
    assert model_config({"family": "bert"}, 99)[1] == BertConfig(vocab_size=99)


def test_a_directory_lends_its_config(pretraining: Path) -> None:
    _, config = model_config(str(pretraining), 60)
    assert config == from_pretrained(pretraining).config
    assert model_config({"preset": str(pretraining), "num_hidden_layers": 5}, 60)[1].num_hidden_layers == 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "bert-huge",
            "model: 'bert-huge' is no preset (bert-tiny, bert-mini, bert-small, bert-medium, bert-base, bert-large, "
            f"{', '.join(list(PRESETS)[6:])}); bert-huge: no such directory here",
        ),
        ({"preset": "bert-tiny", "layers": 3, "hidden_size": 0}, "model: 2 value(s) do not fit:"),
        ({"preset": "bert-tiny", "layers": 3}, "layers: there is no such key"),
        (
            {"preset": "bert-tiny", "hidden_size": 100, "num_attention_heads": 3},
            "is not a multiple of `num_attention_heads` 3",
        ),
        ({"preset": "bert-tiny", "norm": "pre"}, "norm: input should be 'post', not 'pre'"),
        (
            {"preset": "bert-tiny", "vocab_size": 99},
            "model.vocab_size: 99 is too small for the tokenizer's 100 entries.",
        ),
        ({"family": "t5"}, f"model.family: 't5' is not one of {', '.join(FAMILIES)}."),
    ],
)
def test_models_that_cannot_be(model: Any, message: str) -> None:
    with pytest.raises(JaxptmError) as error:
        model_config(model, 100)
    assert message in str(error.value)
