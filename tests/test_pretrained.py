"""Weights and configs in and out: exact both ways, across heads and formats, one clear error where they do not fit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxptm.architectures import check_vocabulary
from jaxptm.errors import JaxptmError
from jaxptm.models import PRESETS
from jaxptm.models.bert import BertConfig
from jaxptm.models.params import abstract_params, flatten, stacked, unflatten
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel
from jaxptm.pretrained import Model, Outputs, from_pretrained

HEADS = [task for task in oracle.CLASSES["bert"] if task is not None]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "."]


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with both heads of BERT's pre-training."""
    directory = tmp_path_factory.mktemp("pretraining")
    oracle.saved(directory, "pretraining")
    return directory


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the encoder alone, whose names lack the prefix `bert.`."""
    directory = tmp_path_factory.mktemp("bare")
    oracle.saved(directory)
    return directory


@pytest.fixture(scope="module")
def masked_lm(pretraining: Path) -> Model:
    return from_pretrained(pretraining, "masked-lm")


@pytest.fixture
def copy(pretraining: Path, tmp_path: Path) -> Path:
    """A copy of `pretraining` that a test may damage."""
    return shutil.copytree(pretraining, tmp_path / "model")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Exact both ways


@pytest.mark.parametrize(
    ("task", "config"),
    [
        *((task, {}) for task in oracle.CLASSES["bert"]),
        ("masked-lm", {"tie_word_embeddings": False}),
        ("pretraining", {"tie_word_embeddings": False}),
        ("sequence-classification", {"num_labels": 1}),
        ("token-classification", {"num_labels": 5}),
        (None, {"pooler": False}),
    ],
)
def test_import_and_export_are_bit_exact(task: str | None, config: dict[str, Any], tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path / "theirs", task, **config)
    model = from_pretrained(tmp_path / "theirs", "auto")
    assert model.task == task
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    # Every name of the state dict, tied tensors and a dead bias among them.
    oracle.assert_equal(written, oracle.names(theirs))
    if config.get("pooler", True):  # transformers reports the pooler that such a checkpoint cannot have
        oracle.assert_equal(oracle.names(oracle.reopened(tmp_path / "ours", task)), oracle.names(theirs))
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert again.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict()


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("task", [None, "pretraining"])
def test_export_and_import_are_bit_exact(task: str | None, scan: bool, tmp_path: Path) -> None:
    family, _ = PRESETS["bert-tiny"]
    config = BertConfig(**oracle.SIZES, hidden_act="relu", tie_word_embeddings=False)
    params = oracle.random_params(abstract_params(TextModel(config, task)))
    module = TextModel(config, task, Execution(scan=scan))
    Model(family, config, task, module, stacked(params) if scan else params).save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, "auto")
    assert (again.task, again.config) == (task, config)
    oracle.assert_equal(flatten(again.params), flatten(params))
    oracle.reopened(tmp_path, task)


def test_dead_parameters_come_back_as_they_were(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path / "theirs", "masked-lm", tie_word_embeddings=False)
    state = oracle.names(theirs)
    assert not np.array_equal(state["cls.predictions.bias"], state["cls.predictions.decoder.bias"])
    from_pretrained(tmp_path / "theirs", "masked-lm").save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    np.testing.assert_array_equal(written["cls.predictions.bias"], state["cls.predictions.bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_exactly_and_can_be_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = oracle.model("masked-lm").to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    expected = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    from_pretrained(tmp_path / "theirs", "masked-lm").save_pretrained(tmp_path / "ours")
    oracle.assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), expected)
    assert oracle.reopened(tmp_path / "ours", "masked-lm").dtype == torch.float32
    if dtype == torch.bfloat16:
        kept = from_pretrained(tmp_path / "theirs", "masked-lm", param_dtype="bfloat16")
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(kept.params)} == {"bfloat16"}
        kept.save_pretrained(tmp_path / "kept")
        again = oracle.reopened(tmp_path / "kept", "masked-lm")
        assert again.dtype == torch.bfloat16
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_config_json_keeps_what_jaxptm_does_not_read(copy: Path, tmp_path: Path) -> None:
    labels = {"0": "sad", "1": "glad", "2": "neither"}
    extra = {
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
        "task_specific_params": {"a": [1, {"b": None}]},
        "problem_type": "single_label_classification",
    }
    edit(copy / "config.json", lambda config: config.update(extra, torch_dtype="float16", num_labels=3))
    model = from_pretrained(copy, "sequence-classification")
    assert model.config.num_labels == 3
    model.save_pretrained(tmp_path / "ours")
    before, after = (json.loads((path / "config.json").read_text()) for path in (copy, tmp_path / "ours"))
    assert {key: after[key] for key in extra} == extra
    assert after["architectures"] == ["BertForSequenceClassification"]
    # What old versions wrote beside `dtype` and `id2label` would contradict them once the model has changed.
    assert set(before) - set(after) == {"torch_dtype", "num_labels"}
    assert oracle.reopened(tmp_path / "ours", "sequence-classification").config.id2label[1] == "glad"


@pytest.mark.parametrize(("before", "after"), [(5, 2), (5, 3), (2, 5)])
def test_another_number_of_labels_replaces_their_names(before: int, after: int, copy: Path, tmp_path: Path) -> None:
    names = {str(index): f"name {index}" for index in range(before)}
    edit(
        copy / "config.json",
        lambda config: config.update(id2label=names, label2id={v: int(k) for k, v in names.items()}),
    )
    from_pretrained(copy, "token-classification", num_labels=after).save_pretrained(tmp_path / "ours")
    assert oracle.reopened(tmp_path / "ours", "token-classification").config.num_labels == after


def test_a_head_of_two_does_not_inherit_five_labels(copy: Path, tmp_path: Path) -> None:
    edit(copy / "config.json", lambda config: config.update(id2label={str(index): str(index) for index in range(5)}))
    from_pretrained(copy, "question-answering").save_pretrained(tmp_path / "ours")
    oracle.reopened(tmp_path / "ours", "question-answering")


def test_tokenizer_files_travel_along(copy: Path, tmp_path: Path) -> None:
    (copy / "vocab.txt").write_text("\n".join(VOCABULARY))
    transformers.BertTokenizerFast(vocab=str(copy / "vocab.txt"), do_lower_case=False).save_pretrained(copy)
    (copy / "notes.txt").write_text("stays behind")
    model = from_pretrained(copy, "masked-lm")
    model.save_pretrained(tmp_path / "copied")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copied" / name).read_bytes() == (copy / name).read_bytes()
    assert not (tmp_path / "copied" / "notes.txt").exists()
    assert model.tokenizer("the cats sat.")["input_ids"] == [2, 5, 6, 7, 8, 9, 3]
    model.save_pretrained(tmp_path / "used")
    model.save_orbax(tmp_path / "orbax")
    model.save_pretrained(copy)  # in its own place
    for directory in ("copied", "used", "orbax", copy):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / directory)
        assert again("The cats sat.")["input_ids"] == [2, 1, 6, 7, 8, 9, 3], directory


# Other heads, other formats


@pytest.mark.parametrize("task", oracle.CLASSES["bert"])
def test_a_pretraining_checkpoint_opens_as_every_task(
    task: str | None, pretraining: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = oracle.names(oracle.model("pretraining"))
    ours = flatten(from_pretrained(pretraining, task).params)
    np.testing.assert_array_equal(
        ours["encoder/layer_1/mlp/up/kernel"].T, state["bert.encoder.layer.1.intermediate.dense.weight"]
    )
    if "pooler/dense/bias" in ours:
        np.testing.assert_array_equal(ours["pooler/dense/bias"], state["bert.pooler.dense.bias"])
    fresh = {
        "sequence-classification": "classifier",
        "token-classification": "classifier",
        "multiple-choice": "classifier",
        "question-answering": "qa_head",
    }
    warnings = [f"{pretraining} has no {fresh[task]}: initialised at random, to be trained."] if task in fresh else []
    assert caplog.messages == warnings


@pytest.mark.parametrize(
    ("task", "absent"), [("masked-lm", "mlm_head"), ("next-sentence", "nsp_head"), ("question-answering", "qa_head")]
)
def test_a_bare_encoder_opens_with_a_new_head(
    task: str, absent: str, bare: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = from_pretrained(bare, task, seed=1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == [f"{bare} has no {absent}: initialised at random, to be trained."]
    encoder, ours = flatten(from_pretrained(bare).params), flatten(model.params)
    new = {path for path in ours if path.startswith(f"{absent}/")}
    assert set(ours) - set(encoder) == new
    assert new
    oracle.assert_equal(
        {path: ours[path] for path in ours if path not in new},
        {path: encoder[path] for path in ours if path not in new},
    )
    kernel = f"{absent}/dense/kernel"
    assert 0.01 < ours[kernel].std() < 0.03
    model.save_pretrained(tmp_path)
    oracle.reopened(tmp_path, task)


def test_a_new_head_depends_on_the_seed(bare: Path) -> None:
    one, same, other = (from_pretrained(bare, "next-sentence", seed=seed).params["nsp_head"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["dense"]["kernel"], same["dense"]["kernel"])
    assert (one["dense"]["kernel"] != other["dense"]["kernel"]).all()


def test_an_encoder_without_pooler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = oracle.saved(tmp_path, pooler=False)
    model = from_pretrained(tmp_path)
    arrays = oracle.inputs(theirs.config)
    assert set(oracle.run(model, arrays)) == {"last_hidden_state", "hidden_states"}
    assert not caplog.messages
    from_pretrained(tmp_path, "sequence-classification")
    assert caplog.messages == [f"{tmp_path} has no classifier, pooler: initialised at random, to be trained."]


def test_names_of_old_versions(copy: Path) -> None:
    expected = flatten(from_pretrained(copy, "pretraining").params)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(copy / "model.safetensors").items()
    }
    assert "bert.encoder.layer.0.output.LayerNorm.gamma" in tensors
    tensors["bert.embeddings.position_ids"] = np.arange(32)[None]
    save_file(tensors, copy / "model.safetensors")
    oracle.assert_equal(flatten(from_pretrained(copy, "pretraining").params), expected)


def test_tied_tensors_may_be_present_or_absent(copy: Path) -> None:
    expected = flatten(from_pretrained(copy, "masked-lm").params)
    tensors = load_file(copy / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    save_file(tensors, copy / "model.safetensors")
    oracle.assert_equal(flatten(from_pretrained(copy, "masked-lm").params), expected)
    tensors = {name: tensor for name, tensor in tensors.items() if ".decoder." not in name}
    save_file(tensors, copy / "model.safetensors")
    oracle.assert_equal(flatten(from_pretrained(copy, "masked-lm").params), expected)


def test_a_torch_file_is_read_without_running_it(copy: Path) -> None:
    expected = flatten(from_pretrained(copy, "pretraining").params)
    (copy / "model.safetensors").unlink()
    torch.save(oracle.model("pretraining").state_dict(), copy / "pytorch_model.bin")
    oracle.assert_equal(flatten(from_pretrained(copy, "pretraining").params), expected)


def test_shards_of_transformers_open(tmp_path: Path) -> None:
    model = oracle.model("pretraining")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = from_pretrained(tmp_path, "auto")
    assert ours.task == "pretraining"
    ours.save_pretrained(tmp_path / "ours")
    oracle.assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), oracle.names(model))


def test_transformers_opens_our_shards(pretraining: Path, tmp_path: Path) -> None:
    model = from_pretrained(pretraining, "pretraining")
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    expected = oracle.names(oracle.model("pretraining"))
    oracle.assert_equal(oracle.names(oracle.reopened(tmp_path, "pretraining")), expected)
    oracle.assert_equal(flatten(from_pretrained(tmp_path, "pretraining").params), flatten(model.params))
    # Saved again in one file, nothing of the shards stays to contradict it.
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    oracle.assert_equal(oracle.names(oracle.reopened(tmp_path, "pretraining")), expected)


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        ("bert", "pretraining", {}),
        ("bert", None, {"pooler": False}),
        ("bert", "masked-lm", {"tie_word_embeddings": False}),
        # Heads with names of their own, a qkv in one tensor, a layer that all share.
        ("roberta", "sequence-classification", {"num_labels": 5}),
        ("electra", "replaced-token", {}),
        ("gpt2", "causal-lm", {"tie_word_embeddings": False}),
        ("albert", "pretraining", {}),
        ("distilbert", "sequence-classification", {}),
    ],
)
def test_orbax_both_ways(family: str, task: str | None, config: dict[str, Any], tmp_path: Path) -> None:
    oracle.saved(tmp_path / "hf", task, family, **config)
    model = from_pretrained(tmp_path / "hf", task)
    model.save_orbax(tmp_path / "orbax")
    assert not list((tmp_path / "orbax").glob("*.safetensors"))
    again = from_pretrained(tmp_path / "orbax", "auto")
    assert (again.task, again.config) == (model.task, model.config)
    oracle.assert_equal(flatten(again.params), flatten(model.params))


def test_an_orbax_checkpoint_opens_as_other_tasks(
    pretraining: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = from_pretrained(pretraining, "pretraining")
    model.save_orbax(tmp_path)
    for task in (None, "masked-lm"):
        ours = flatten(from_pretrained(tmp_path, task).params)
        oracle.assert_equal(ours, {path: leaf for path, leaf in flatten(model.params).items() if path in ours})
    assert not caplog.messages
    from_pretrained(tmp_path, "token-classification", num_labels=3)
    assert caplog.messages == [f"{tmp_path} has no classifier: initialised at random, to be trained."]


def test_an_orbax_checkpoint_that_does_not_fit(pretraining: Path, tmp_path: Path) -> None:
    from_pretrained(pretraining, "masked-lm").save_orbax(tmp_path)
    edit(tmp_path / "config.json", lambda config: config.update(num_hidden_layers=1, intermediate_size=50))
    with pytest.raises(JaxptmError) as error:
        from_pretrained(tmp_path, "masked-lm")
    assert (
        "mis-shaped bert.encoder.layer.0.intermediate.dense.weight: [48, 32] in the file, [50, 32] in the model"
        in str(error.value)
    )
    assert "unexpected encoder/layer_1/mlp/up/kernel [32, 48]" in str(error.value)


def test_an_orbax_checkpoint_of_eight_devices_opens_on_one(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path / "hf", num_hidden_layers=1)
    from_pretrained(tmp_path / "hf", mesh=jax.make_mesh((8,), ("data",))).save_orbax(tmp_path / "orbax")
    script = (
        "import sys; from jaxptm.pretrained import from_pretrained; "
        "print(from_pretrained(sys.argv[1]).params['pooler']['dense']['bias'].sum())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "orbax")]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(oracle.names(theirs)["pooler.dense.bias"].sum()), abs=1e-5)


def test_one_directory_holds_one_model(pretraining: Path, tmp_path: Path) -> None:
    model = from_pretrained(pretraining)
    model.save_pretrained(tmp_path / "hf")
    model.save_orbax(tmp_path / "orbax")
    with pytest.raises(JaxptmError, match="holds a model in Hugging Face's format; choose another directory"):
        model.save_orbax(tmp_path / "hf")
    with pytest.raises(JaxptmError, match="holds a model in Orbax's format; choose another directory"):
        model.save_pretrained(tmp_path / "orbax")


@pytest.mark.parametrize("task", [None, "masked-lm", "next-sentence"])
def test_auto_takes_the_declared_task(task: str | None, copy: Path) -> None:
    edit(copy / "config.json", lambda config: config.update(architectures=["Unknown", oracle.CLASSES["bert"][task]]))
    assert from_pretrained(copy, "auto").task == task


def test_a_mesh_gets_a_copy_on_every_device(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, num_hidden_layers=1)
    model = from_pretrained(tmp_path, mesh=jax.make_mesh((8,), ("data",)))
    leaf = model.params["pooler"]["dense"]["kernel"]
    assert len(leaf.sharding.device_set) == 8
    assert leaf.is_fully_replicated
    ids = np.arange(16).reshape(2, 8)
    out = model(input_ids=ids)
    expected = oracle.outputs(theirs, {"input_ids": ids})
    np.testing.assert_allclose(out.pooler_output, expected["pooler_output"], atol=1e-5)


# What the model refuses


def refused(directory: Path, task: str | None = "pretraining", **options: Any) -> str:
    with pytest.raises(JaxptmError) as error:
        from_pretrained(directory, task, **options)
    return str(error.value)


def test_weights_that_do_not_fit_are_listed_at_once(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    del tensors["bert.embeddings.LayerNorm.weight"]
    tensors["bert.pooler.dense.weight"] = np.zeros((32, 31), np.float32)
    tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)
    tensors["cls.predictions.decoder.bias"] = np.ones(67, np.float32)
    save_file(tensors, copy / "model.safetensors")
    assert refused(copy).splitlines() == [
        f"{copy}: 5 weight(s) do not fit the model:",
        "  missing    bert.embeddings.LayerNorm.weight  (for embeddings/norm/scale)",
        "  missing    bert.encoder.layer.1.output.dense.bias  (for encoder/layer_1/mlp/down/bias)",
        "  mis-shaped bert.pooler.dense.weight: [32, 31] in the file, [32, 32] in the model",
        "  untied     cls.predictions.decoder.bias differs from cls.predictions.bias, "
        "though config.json says they are tied",
        "  unexpected bert.encoder.layer.2.output.dense.bias [32]",
    ]


def test_a_head_that_is_there_in_part_is_not_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["cls.seq_relationship.bias"]
    save_file(tensors, copy / "model.safetensors")
    assert "missing    cls.seq_relationship.bias  (for nsp_head/dense/bias)" in refused(copy)


def test_another_number_of_labels_than_the_head_has(tmp_path: Path) -> None:
    oracle.saved(tmp_path, "sequence-classification", num_labels=3)
    message = refused(tmp_path, "sequence-classification", num_labels=2)
    assert "mis-shaped classifier.weight: [3, 32] in the file, [2, 32] in the model" in message
    assert "num_labels: input should be greater than 0, not 0" in refused(
        tmp_path, "sequence-classification", num_labels=0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not one of bert"),
        ({"model_type": None}, "model_type None is not one of bert"),
        (
            {"position_embedding_type": "relative_key"},
            "`position_embedding_type: relative_key` is not supported, only 'absolute'",
        ),
        ({"is_decoder": True}, "`is_decoder: True` is not supported, only False"),
        ({"hidden_act": "gulp"}, "`hidden_act` 'gulp' is not one of gelu, gelu_new"),
        ({"num_attention_heads": 5}, "`hidden_size` 32 is not a multiple of `num_attention_heads` 5"),
        ({"vocab_size": "many"}, "vocab_size: input should be a valid integer, not 'many'"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob: input should be less than or equal to 1, not 1.5"),
    ],
)
def test_a_config_json_that_asks_for_something_else(changes: dict[str, Any], message: str, copy: Path) -> None:
    edit(copy / "config.json", lambda config: config.update(changes))
    said = refused(copy)
    assert said.startswith(f"{copy / 'config.json'}: ")
    assert message in said


def test_config_json_is_missing_or_broken(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert f"{copy / 'config.json'}: is not JSON: " in refused(copy)
    (copy / "config.json").unlink()
    assert refused(copy) == f"{copy / 'config.json'}: cannot be read: No such file or directory."


def test_unknown_tasks(copy: Path) -> None:
    assert refused(copy, "translation") == (
        "bert has no head for the task 'translation'; it has None, masked-lm, pretraining, next-sentence, "
        'sequence-classification, token-classification, multiple-choice, question-answering (or "auto").'
    )
    edit(copy / "config.json", lambda config: config.update(architectures=["BertLMHeadModel"]))
    assert "`architectures: ['BertLMHeadModel']` names no head of bert; write there which one" in refused(copy, "auto")


def test_a_vocabulary_larger_than_the_model(copy: Path) -> None:
    (copy / "vocab.txt").write_text("\n".join(VOCABULARY + [f"word{i}" for i in range(58)]))
    model = from_pretrained(copy)
    with pytest.raises(JaxptmError) as error:
        model.tokenizer  # noqa: B018
    assert str(error.value) == (
        f"{copy}: the tokenizer has 68 entries, the model's vocabulary 67; they do not belong together."
    )
    check_vocabulary(range(67), model.config, "equal is fine")


def test_a_model_without_tokenizer(pretraining: Path) -> None:
    model = from_pretrained(pretraining)
    made = Model(model.family, model.config, None, model.module, model.params)
    with pytest.raises(JaxptmError, match="this model came without a tokenizer"):
        made.tokenizer  # noqa: B018
    with pytest.raises(JaxptmError, match="no tokenizer here"):
        model.tokenizer  # noqa: B018


ROW = np.ones((2, 8), np.int64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "give the model `input_ids`, an integer array of shape [batch, length]."),
        ({"attention_mask": ROW}, "give the model `input_ids`, an integer array of shape [batch, length]."),
        ({"input_ids": ROW[0]}, "`input_ids` has shape [8], expected [batch, length]."),
        ({"input_ids": ROW[None]}, "`input_ids` has shape [1, 2, 8], expected [batch, length]."),
        ({"input_ids": ROW[:, :0]}, "`input_ids` has shape [2, 0]: give at least one row of at least one token."),
        ({"input_ids": ROW[:0]}, "`input_ids` has shape [0, 8]: give at least one row of at least one token."),
        ({"input_ids": ROW * 67}, "`input_ids` goes from 67 to 67; the model takes 0 to 66."),
        ({"input_ids": ROW * -1}, "`input_ids` goes from -1 to -1; the model takes 0 to 66."),
        ({"input_ids": ROW * 1.0}, "`input_ids` holds float64, expected integers."),
        ({"input_ids": [["the", "cat"]]}, "`input_ids` holds <U3, expected integers."),
        ({"input_ids": np.ones((1, 33), int)}, "the input is 33 tokens long, the model takes 32; truncate it"),
        ({"input_ids": ROW, "attention_mask": ROW[:, :7]}, "`attention_mask` has shape [2, 7], `input_ids` [2, 8]."),
        ({"input_ids": ROW, "attention_mask": ROW * 2}, "`attention_mask` goes from 2 to 2; the model takes 0 to 1."),
        ({"input_ids": ROW, "token_type_ids": ROW * 2}, "`token_type_ids` goes from 2 to 2; the model takes 0 to 1."),
        ({"input_ids": ROW, "position_ids": ROW * 32}, "`position_ids` goes from 32 to 32; the model takes 0 to 31."),
        ({"input_ids": ROW, "mlm_positions": ROW * 8}, "`mlm_positions` goes from 8 to 8; the model takes 0 to 7."),
        ({"input_ids": ROW, "mlm_positions": ROW[:1]}, "`mlm_positions` has shape [1, 8], `input_ids` [2, 8]."),
        ({"input_ids": ROW, "mlm_positions": ROW[:, 0]}, "`mlm_positions` has shape [2], `input_ids` [2, 8]."),
        ({"input_ids": ROW, "labels": ROW}, "the model has no input `labels`, only input_ids, token_type_ids"),
    ],
)
def test_inputs_that_do_not_fit(arrays: dict[str, Any], message: str, masked_lm: Model) -> None:
    with pytest.raises(JaxptmError) as error:
        masked_lm(**arrays)
    assert message in str(error.value)


def test_multiple_choice_has_one_more_axis(masked_lm: Model) -> None:
    with pytest.raises(JaxptmError, match=r"`input_ids` has shape \[2, 8\], expected \[batch, choices, length\]"):
        replace(masked_lm, task="multiple-choice")(input_ids=ROW)


def test_outputs_by_key_and_by_attribute() -> None:
    out = Outputs(last_hidden_state=1, pooler_output=2)
    assert out["pooler_output"] == out.pooler_output == 2
    with pytest.raises(AttributeError, match="no output 'logits', only last_hidden_state, pooler_output"):
        out.logits  # noqa: B018


def test_parameters_without_a_row_are_not_lost_silently(pretraining: Path, tmp_path: Path) -> None:
    model = from_pretrained(pretraining)
    extra = unflatten({**flatten(model.params), "adapter/kernel": jnp.zeros((2, 2))})
    with pytest.raises(JaxptmError, match="the weight table has no place for the parameters adapter/kernel"):
        Model(model.family, model.config, None, model.module, extra).save_pretrained(tmp_path)
