"""Google's BERT and ELECTRA: models of transformers under Google's names come back bit for bit, and run as they did."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from bundles import write_bundle

from jaxptm.conversion import convert
from jaxptm.original.google import is_uncased
from jaxptm.pretrained import from_pretrained
from jaxptm.types import JaxptmError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(62))]


def google_name(name: str) -> str:
    """The variable of github.com/google-research/bert for a parameter of transformers, part by part."""
    parts = name.removesuffix(".weight").split(".") if "_embeddings." in name else name.split(".")
    said = []
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        if part == "layer":
            said.append(f"layer_{after}")
        elif part.isdigit():
            continue
        elif "LayerNorm" in parts and part in ("weight", "bias"):
            said.append("gamma" if part == "weight" else "beta")
        else:
            said.append("kernel" if part == "weight" else part)
    return "/".join(said)


SPECIAL = {
    "cls.predictions.bias": "cls/predictions/output_bias",
    "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
    "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
    "qa_outputs.weight": "cls/squad/output_weights",
    "qa_outputs.bias": "cls/squad/output_bias",
    "classifier.weight": "output_weights",
    "classifier.bias": "output_bias",
}


def variables(model: Any) -> dict[str, np.ndarray]:
    """What Google's code would save of a model of transformers, the optimizer's moments among it."""
    found = {}
    bare = f"{model.base_model_prefix}." if model.base_model is model else ""
    for name, parameter in model.named_parameters():
        google = SPECIAL.get(bare + name) or google_name(bare + name)
        value = parameter.detach().numpy()
        found[google] = value.T if google.endswith("/kernel") else value
        found[f"{google}/adam_m"] = np.ones_like(found[google])
    return found | {"global_step": np.array(7)}


def bert(directory: Path, task: str | None, **config: Any) -> Any:
    """Writes a model as Google's code would, and returns it."""
    model = oracle.model(task, hidden_act="gelu", **config)
    write_bundle(directory / "bert_model.ckpt", variables(model), shards=2)
    keys = ("hidden_act", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    keys += ("max_position_embeddings", "type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob")
    sizes = {key: getattr(model.config, key) for key in keys}
    (directory / "bert_config.json").write_text(json.dumps(sizes))
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return model


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("pretraining", {}),
        ("masked-lm", {"pooler": True}),
        ("question-answering", {}),
        ("sequence-classification", {"num_labels": 5}),
        (None, {}),
    ],
)
def test_bert(task: str | None, config: dict[str, Any], tmp_path: Path) -> None:
    google = tmp_path / "uncased_L-2_H-32_A-4"
    theirs = bert(google, task, **config)
    model, differences = convert(str(google), tmp_path / "hf", checked=True, report=tmp_path / "report.json")
    assert model.task == task and differences and max(differences.values()) < 1e-5
    ours = type(theirs).from_pretrained(tmp_path / "hf")
    for name, parameter in theirs.named_parameters():
        assert (ours.get_parameter(name) == parameter).all(), name
    assert model.config.num_labels == theirs.config.num_labels and ours.config.layer_norm_eps == 1e-12
    tokenizer = from_pretrained(tmp_path / "hf", "auto").tokenizer
    assert tokenizer("W3 w4")["input_ids"] == [2, 8, 9, 3]
    report = json.loads((tmp_path / "report.json").read_text())
    query = report["tensors"][f"{'bert.' if task else ''}encoder.layer.0.attention.self.query.weight"]
    assert query["parameters"] == ["encoder/layer_0/attention/query/kernel"] and query["shape"] == [32, 32]


def electra(prefix: Path, *, tied: bool, part: str) -> Any:
    """Discriminator and generator in one checkpoint, as pre-training leaves them; the one of `part`."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "embedding_size": 20, "intermediate_size": 96}
    models = {
        "model": oracle.model("replaced-token", "electra", **sizes),
        "generator": oracle.model(
            "masked-lm", "electra", **{**sizes, "hidden_size": 64, "num_attention_heads": 1}, seed=1
        ),
    }
    found: dict[str, np.ndarray] = {}
    for name, array in variables(models["model"]).items():
        found[name.replace("electra.embeddings", "electra/embeddings").replace("dense_prediction", "dense_1")] = array
    if tied:
        models["generator"].electra.embeddings.load_state_dict(models["model"].electra.embeddings.state_dict())
    for name, array in variables(models["generator"]).items():
        if name.startswith("electra/embeddings/") and tied:
            continue
        if name.startswith("generator_lm_head/"):
            name = name.replace("generator_lm_head/bias", "generator_predictions/output_bias")
        found[name.replace("electra/", "generator/")] = array
    found["generator_predictions/temperature"] = np.float32(1)
    write_bundle(prefix, found)
    return models[part]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("part", ["model", "generator"])
def test_electra(part: str, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = tmp_path / "electra_small" / "electra_small"
    theirs = electra(prefix, tied=tied, part=part)
    with caplog.at_level(logging.WARNING, "jaxptm"):
        model, differences = convert(str(prefix), tmp_path / "hf", part=part, checked=True)
    other = (
        "electra/encoder/layer_0/output/dense/kernel" if part == "generator" else "generator_predictions/output_bias"
    )
    assert other in model.unused and "these of its weights are left out: " in caplog.text
    assert "vocab.txt: is not there; the model comes without a tokenizer" in caplog.text
    assert "attention heads are assumed, of width 64" in caplog.text
    assert differences and max(differences.values()) < 1e-5
    ours = type(theirs).from_pretrained(tmp_path / "hf")
    for name, parameter in theirs.named_parameters():
        assert (ours.get_parameter(name) == parameter).all(), name
    assert ours.config.num_attention_heads == theirs.config.num_attention_heads


def test_heads_of_an_electra_are_said_beside_it_where_they_are_not_those_of_the_released(tmp_path: Path) -> None:
    prefix, target = tmp_path / "google" / "model.ckpt", tmp_path / "hf"
    theirs = oracle.model("replaced-token", "electra", hidden_size=96, num_attention_heads=3, embedding_size=20)
    write_bundle(prefix, {name.replace("dense_prediction", "dense_1"): a for name, a in variables(theirs).items()})
    with pytest.raises(JaxptmError, match=r"how many attention heads share its width of 96; write a config\.json with"):
        convert(str(prefix), target)
    (prefix.parent / "config.json").write_text('{"num_attention_heads": 7}')
    with pytest.raises(
        JaxptmError, match=r"config\.json: `num_attention_heads` is 7; a divisor of the width 96 is exp"
    ):
        convert(str(prefix), target)
    assert not target.exists()
    (prefix.parent / "config.json").write_text('{"num_attention_heads": 3}')
    convert(str(prefix), target, checked=True)
    assert type(theirs).from_pretrained(target).config.num_attention_heads == 3


@pytest.mark.parametrize(
    ("entry", "uncased"), [("the", True), ("The", False), ("é", True), ("##Él", False), ("<S>", True), ("Z", True)]
)
def test_the_vocabulary_says_whether_it_is_uncased(entry: str, uncased: bool) -> None:
    assert is_uncased([*WORDS[:5], entry]) == uncased


def test_the_vocabulary_of_a_cased_model_and_one_that_belongs_to_another(tmp_path: Path) -> None:
    bert(tmp_path / "google", None)
    (tmp_path / "google" / "vocab.txt").write_text("\r\n".join([*WORDS[:-1], "Rome"]))
    convert(str(tmp_path / "google"), tmp_path / "hf")
    tokenizer = from_pretrained(tmp_path / "hf").tokenizer
    assert tokenizer("Rome rome")["input_ids"] == [2, 66, 1, 3]
    (tmp_path / "google" / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    with pytest.raises(JaxptmError, match=r"vocab\.txt: has 68 entries, the model 67; they do not belong together"):
        convert(str(tmp_path / "google"), tmp_path / "again")
    (tmp_path / "google" / "vocab.txt").write_text("\n".join([*WORDS[:-1], WORDS[7]]))
    with pytest.raises(JaxptmError, match=rf"vocab\.txt: has '{WORDS[7]}' twice, so that an entry would be lost"):
        convert(str(tmp_path / "google"), tmp_path / "again")


def test_heads_that_the_model_does_not_have_are_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = variables(bert(tmp_path / "google", "pretraining"))
    found |= {"output_weights": np.ones((3, 32), np.float32), "output_bias": np.ones(3, np.float32)}
    write_bundle(tmp_path / "google" / "bert_model.ckpt", found)
    with caplog.at_level(logging.WARNING, "jaxptm"):
        model, _ = convert(str(tmp_path / "google"), tmp_path / "hf", report=tmp_path / "report.json")
    assert "these of its weights are left out: classifier.bias, classifier.weight" in caplog.text
    assert json.loads((tmp_path / "report.json").read_text())["left_out"] == list(model.unused)
    assert model.tokenizer("w1")["input_ids"] == [2, 6, 3]  # of the directory that was written


def test_what_is_unknown_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    google, target = tmp_path / "google", tmp_path / "hf"
    found = variables(bert(google, "pretraining"))

    def refused(message: str, source: Path = google, **options: Any) -> None:
        with pytest.raises(JaxptmError, match=message):
            convert(str(source), target, **options)
        assert not target.exists()

    write_bundle(google / "bert_model.ckpt", {**found, "bert/encoder/layer_0/adapter/kernel": np.zeros((2, 2))})
    refused(r"bert_model\.ckpt\.index: 1 weight.*\n.*unexpected bert\.encoder\.layer\.0\.adapter\.weight \[2, 2\]")
    lacking = {name: array for name, array in found.items() if "pooler" not in name}
    write_bundle(google / "bert_model.ckpt", lacking)
    refused("is a BertForPreTraining without weights for pooler, and none are made up here")
    write_bundle(google / "bert_model.ckpt", {"albert/x": np.zeros(2)})
    refused("is neither a BERT nor an ELECTRA; it holds albert/x")
    write_bundle(google / "bert_model.ckpt", {"electra/embeddings/word_embeddings": np.zeros((2, 2))})
    refused("lacks 'electra.embeddings.token_type_embeddings.weight', which tells the sizes")
    refused("holds no generator", part="generator")
    write_bundle(google / "bert_model.ckpt", found)
    settings = (google / "bert_config.json").read_text()
    (google / "bert_config.json").write_text(json.dumps({**json.loads(settings), "num_attention_heads": 5}))
    refused(r"bert_model\.ckpt\.index \(its settings\): 1 value.*\n.*`hidden_size` 32 is not a multiple of `num_att")
    (google / "bert_config.json").write_text(settings)
    refused("--part generator is for ELECTRA", part="generator")
    refused("--step is for run directories", step=3)
    refused("--to onnx: write hf or orbax", to="onnx")
    refused("--report .*report.json: lies in .*, which the model is written to", report=target / "report.json")
    refused("nowhere.ckpt: there is no such checkpoint", google / "nowhere.ckpt")
    (google / "bert_config.json").unlink()
    refused(r"bert_config\.json: cannot be read: No such file", google / "bert_model.ckpt.data-00000-of-00001")
    write_bundle(google / "other.ckpt", found)
    refused(r"holds bert_model\.ckpt\.index, other\.ckpt\.index; name the one to convert")
