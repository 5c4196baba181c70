"""Conversion: beside transformers on the spot, reported tensor by tensor, refused where weights would be made up."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import orbax.checkpoint
import pytest
import speech
import torch
import transformers
from commands import jaxptm
from safetensors.numpy import load_file, save_file

from jaxptm import conversion
from jaxptm.hf import files
from jaxptm.pretrained import Model, Outputs, from_pretrained
from jaxptm.types import JaxptmError


@pytest.mark.parametrize(
    ("family", "task", "to"),
    [
        ("bert", "multiple-choice", "hf"),
        ("roberta", "question-answering", "orbax"),
        ("gpt2", "causal-lm", "hf"),
        ("albert", "pretraining", "hf"),
        ("distilbert", "masked-lm", "hf"),
    ],
)
def test_a_checked_conversion(family: str, task: str, to: str, tmp_path: Path) -> None:
    source, target, report = tmp_path / "source", tmp_path / "target", tmp_path / "deep" / "report.json"
    oracle.saved(source, task, family)
    status, out, err = jaxptm("convert", str(source), str(target), "--to", to, "--check", "--report", str(report))
    assert status == 0, err
    assert "of the largest value from transformers' (at most 1e-04)" in out and f"{report}: the report" in out
    content = json.loads(report.read_text())
    assert all(value < 1e-5 for value in content["difference_from_transformers"].values())
    assert content["source"] == str(source) and content["versions"]["jax"]
    before = load_file(source / "model.safetensors")
    for name, tensor in before.items():
        said = content["tensors"][name]
        assert said["shape"] == list(tensor.shape) and said["dtype"] == "float32"
        assert said["sha256"] == hashlib.sha256(tensor.tobytes()).hexdigest(), name
        assert said["parameters"] or said["same_as"], name
    again = from_pretrained(target, "auto")
    assert content["parameters"] == sum(leaf.size for leaf in conversion.flatten(again.params).values())


def test_a_check_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, report = tmp_path / "source", tmp_path / "target", tmp_path / "report.json"
    oracle.saved(source, "sequence-classification")

    def refused(message: str) -> None:
        status, _, err = jaxptm("convert", str(source), str(target), "--check", "--report", str(report))
        assert status == 1 and message in err and "Traceback" not in err
        assert not target.exists() and not report.exists()

    call = Model.__call__

    def wrong(self: Model, **inputs: Any) -> Outputs:
        return Outputs({name: value + 0.01 for name, value in call(self, **inputs).items()})

    with monkeypatch.context() as patch:
        patch.setattr(Model, "__call__", wrong)
        refused("the model differs from transformers': logits by ")

    def forgetful(directory: str, task: str, **options: Any) -> Model:
        model = from_pretrained(directory, task, **options)
        if Path(directory) != source:
            model.params["classifier"]["dense"]["bias"] = np.zeros(2, np.float32)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "from_pretrained", forgetful)
        refused("these weights are not read back as they were written: classifier/dense/bias")

    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "torch", None)
        refused("--check needs torch, in which transformers computes: pip install torch")


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    oracle.saved(source, "masked-lm")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    status, _, err = jaxptm("convert", str(source), str(target))
    assert status == 1 and "is a BertForTokenClassification without weights for classifier" in err
    assert not target.exists()


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    oracle.saved(tmp_path / "bert")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxptmError, match=r"report\.json: cannot be written: "):
        conversion.convert(str(tmp_path / "bert"), tmp_path / "target", report=tmp_path / "file" / "report.json")
    assert not (tmp_path / "target").exists()


def digest_of(directory: Path) -> dict[str, str]:
    every = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in every}


def edit(directory: Path, **changes: Any) -> None:
    """Changes config.json; a key that is given None is left out."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_half_precision_is_kept(dtype: torch.dtype, to: str, tmp_path: Path) -> None:
    theirs = oracle.model("sequence-classification").to(dtype)
    theirs.save_pretrained(tmp_path / "source")
    _, differences = conversion.convert(str(tmp_path / "source"), tmp_path / "target", to, checked=True)
    assert differences and max(differences.values()) < 1e-5
    if to == "orbax":
        conversion.convert(str(tmp_path / "target"), tmp_path / "hf")
    found = transformers.BertForSequenceClassification.from_pretrained(tmp_path / ("target" if to == "hf" else "hf"))
    assert found.dtype == dtype
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_digits_and_quantised_weights_are_not_lost_silently(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    oracle.saved(source)
    tensors = load_file(source / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"

    def refused(changed: np.ndarray, message: str) -> None:
        save_file(tensors | {name: changed}, source / "model.safetensors")
        with pytest.raises(JaxptmError, match=message):
            conversion.convert(str(source), target)
        assert not target.exists()

    wide = tensors[name].astype(np.float64)
    refused(wide + 1e-12, rf"source: bert\.{name}: float32 has not all their digits")
    refused(wide.astype(np.int8), rf"no floats  bert\.{name}: int8, as quantised weights are")
    save_file(tensors | {name: wide}, source / "model.safetensors")  # float32 holds these
    conversion.convert(str(source), target)
    oracle.assert_equal(load_file(target / "model.safetensors"), tensors)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    oracle.saved(source, "masked-lm")
    tensors = load_file(source / "model.safetensors")
    for name, other in (
        ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
        ("bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ):
        save_file(tensors | {other: tensors[name] + 1}, source / "model.safetensors")
        with pytest.raises(JaxptmError) as error:
            conversion.convert(str(source), target)
        assert f" are both {name}, and differ" in str(error.value) and other in str(error.value)
        assert not target.exists()
        save_file(tensors | {other: tensors[name]}, source / "model.safetensors")  # the same: nothing is lost
        conversion.convert(str(source), target)
        shutil.rmtree(target)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_full_disk_leaves_what_was_there(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, other, target, report = (tmp_path / name for name in ("source", "other", "target", "report.json"))
    oracle.saved(source, "masked-lm")
    oracle.saved(other, "masked-lm", seed=1)
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    options = ("--to", to, "--report", str(report))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def refused() -> None:
        for broken, name in ((shutil, "copyfile"), (files, "write_json"), (conversion, "write_json")):
            with monkeypatch.context() as patch:
                patch.setattr(broken, name, full)
                status, _, err = jaxptm("convert", str(source), str(target), *options)
            assert status == 1 and "cannot be written: " in err and "No space left" in err and "bug" not in err
        if to == "orbax":
            with monkeypatch.context() as patch:
                patch.setattr(orbax.checkpoint.StandardCheckpointer, "save", full)
                status, _, err = jaxptm("convert", str(source), str(target), *options)
            assert status == 1 and f"{target}: the model cannot be written: " in err

    refused()
    assert not target.exists() and not list(tmp_path.glob("report*"))
    assert jaxptm("convert", str(other), str(target), *options)[0] == 0
    before, said = digest_of(target), report.read_bytes()
    refused()
    assert digest_of(target) == before and report.read_bytes() == said and len(list(tmp_path.glob("report*"))) == 1


def test_what_a_model_directory_holds_besides(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    oracle.saved(source)
    for name in ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "generation_config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text('{"a": 1}')
    target.mkdir()
    (target / "model-ema.safetensors").write_text("mine")
    conversion.convert(str(source), target)
    names = {"1_Pooling/config.json", "modules.json", "sentence_bert_config.json"}
    assert set(digest_of(target)) == names | {"config.json", "model.safetensors", "model-ema.safetensors"}
    conversion.convert(str(source), target)  # and again
    oracle.saved(tmp_path / "gpt2", "causal-lm", "gpt2")
    before = digest_of(target)
    with pytest.raises(JaxptmError, match=r"target: holds 1_Pooling/config\.json, .* of another model; delete that"):
        conversion.convert(str(tmp_path / "gpt2"), target)
    assert digest_of(target) == before


def test_where_a_report_cannot_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle.saved(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for report in (tmp_path / "out" / "config.json", Path("bert/../out/r.json"), Path("out")):
        with pytest.raises(JaxptmError, match="lies in out, which the model is written to"):
            conversion.convert("bert", Path("out"), report=report)
    with pytest.raises(JaxptmError, match="folder: cannot be written: it is a directory"):
        conversion.convert("bert", Path("out"), report=Path("folder"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "folder"]


@pytest.mark.parametrize(
    ("family", "task"), [("electra", "replaced-token"), ("roberta", None), ("gpt2", "token-classification")]
)
def test_orbax_has_the_tensors_of_its_head_and_no_others(
    family: str, task: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = oracle.saved(tmp_path / "hf", task, family)
    conversion.convert(str(tmp_path / "hf"), tmp_path / "orbax", "orbax")
    model, _ = conversion.convert(str(tmp_path / "orbax"), tmp_path / "again", report=tmp_path / "report.json")
    assert not model.unused and not caplog.messages
    oracle.assert_equal(
        load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    )
    if task is None:  # and begins with the same head from both
        arrays = oracle.inputs(theirs.config)
        first, second = (from_pretrained(tmp_path / name, "sequence-classification") for name in ("hf", "orbax"))
        np.testing.assert_array_equal(first(**arrays).logits, second(**arrays).logits)


def test_a_tensor_that_orbax_does_not_keep_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    oracle.saved(tmp_path / "untied", "masked-lm", tie_word_embeddings=False)
    conversion.convert(str(tmp_path / "untied"), tmp_path / "hf", report=tmp_path / "report.json")
    tensors = json.loads((tmp_path / "report.json").read_text())["tensors"]
    assert tensors["cls.predictions.bias"]["same_as"] is None
    model, _ = conversion.convert(str(tmp_path / "untied"), tmp_path / "orbax", "orbax", checked=True)
    assert model.unused == ("cls.predictions.bias",) and "left out: cls.predictions.bias" in caplog.text
    tensors = load_file(tmp_path / "untied" / "model.safetensors")
    save_file(tensors | {"cls.predictions.bias": np.zeros((3, 2), np.float32)}, tmp_path / "untied/model.safetensors")
    with pytest.raises(JaxptmError, match=r"mis-shaped cls\.predictions\.bias: \[3, 2\]"):
        conversion.convert(str(tmp_path / "untied"), tmp_path / "other")


def test_a_released_ctc_model_without_an_embedding_for_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = speech.saved(tmp_path / "source", "ctc")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["wav2vec2.masked_spec_embed"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    _, differences = conversion.convert(str(tmp_path / "source"), tmp_path / "target", checked=True)
    assert differences and max(differences.values()) < 1e-5
    assert "there is no wav2vec2.masked_spec_embed: written without masks" in caplog.text
    oracle.assert_equal(load_file(tmp_path / "target" / "model.safetensors"), tensors)
    assert type(theirs).from_pretrained(tmp_path / "target").config.mask_time_prob == 0


def test_config_json_of_a_model_to_convert(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    oracle.saved(source, "causal-lm", "gpt2")
    edit(source, n_head=None, num_attention_heads=4)  # transformers takes either
    model, differences = conversion.convert(str(source), target, checked=True)
    assert model.config.num_attention_heads == 4 and differences  # type: ignore[attr-defined]
    edit(source, n_head=2)
    with pytest.raises(JaxptmError, match="`n_head: 2` and `num_attention_heads: 4` contradict each other"):
        conversion.convert(str(source), target)
    oracle.saved(tmp_path / "bert", "masked-lm")
    edit(tmp_path / "bert", architectures=["BertForMaskedLM", "BertModel"])
    with pytest.raises(JaxptmError, match=r"names several heads of bert; write there which one it is, of BertModel"):
        conversion.convert(str(tmp_path / "bert"), target)
    edit(tmp_path / "bert", architectures=[])
    with pytest.raises(JaxptmError, match=r"names no head of bert; write there which one it is"):
        conversion.convert(str(tmp_path / "bert"), target)
    oracle.saved(tmp_path / "three", "sequence-classification", num_labels=3)
    edit(tmp_path / "three", id2label=None, label2id=None, num_labels=3)
    assert from_pretrained(tmp_path / "three", "auto").config.num_labels == 3


@pytest.mark.parametrize("zero", [False, True])
def test_checks_of_classifiers_without_padding_or_with_a_head_of_zeros(zero: bool, tmp_path: Path) -> None:
    oracle.saved(tmp_path / "source", "sequence-classification", "gpt2", pad_token_id=None, num_labels=3)
    if zero:
        tensors = load_file(tmp_path / "source" / "model.safetensors")
        tensors["score.weight"][:] = 0
        save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    _, differences = conversion.convert(str(tmp_path / "source"), tmp_path / "target", checked=True)
    assert differences and all(value < 1e-5 for value in differences.values())


def test_no_other_file_becomes_a_report(tmp_path: Path) -> None:
    source, target, notes = tmp_path / "source", tmp_path / "target", tmp_path / "notes.json"
    oracle.saved(source)
    notes.write_text('{"mine": 1}')
    before = digest_of(source)
    for taken in (source / "config.json", source / "model.safetensors", notes):
        with pytest.raises(JaxptmError, match=rf"{taken.name}: cannot be written: it is there, and no report of a con"):
            conversion.convert(str(source), target, report=taken)
    assert digest_of(source) == before and notes.read_text() == '{"mine": 1}' and not target.exists()
    for _ in range(2):  # the second in the place of the first
        conversion.convert(str(source), target, report=tmp_path / "report.json")


def test_weights_of_another_model_in_another_format_do_not_stay_beside_it(tmp_path: Path) -> None:
    oracle.saved(tmp_path / "source")
    (tmp_path / "target").mkdir()
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "flax_model.msgpack", "tf_model.h5"):
        stale = tmp_path / "target" / name
        stale.write_text("old")
        with pytest.raises(JaxptmError, match=rf"target: holds {name} of another model; delete that"):
            conversion.convert(str(tmp_path / "source"), tmp_path / "target")
        stale.unlink()


def test_a_check_names_weights_that_are_not_finite(tmp_path: Path) -> None:
    oracle.saved(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] = np.nan
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JaxptmError, match="hold NaN or infinities: encoder/layer_0/mlp/down/bias"):
        conversion.convert(str(tmp_path / "source"), tmp_path / "target", checked=True)
    assert not (tmp_path / "target").exists()
