"""Conversion: beside transformers on the spot, reported tensor by tensor, refused where weights would be made up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from commands import jaxptm
from safetensors.numpy import load_file

from jaxptm import conversion
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
