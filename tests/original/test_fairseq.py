"""fairseq's wav2vec 2.0: models of transformers under fairseq's names come back bit for bit, and run as they did."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import speech
import torch
import transformers

from jaxptm.conversion import convert
from jaxptm.original.fairseq import convolutions
from jaxptm.types import JaxptmError

DROPOUTS = {
    "layerdrop": 0.05,
    "hidden_dropout": 0.11,
    "attention_dropout": 0.12,
    "activation_dropout": 0.13,
    "feat_proj_dropout": 0.14,
    "feat_quantizer_dropout": 0.15,
}
LETTERS = "| E T A O N".split()


def made(task: str, style: str) -> Any:
    vocabulary = {"vocab_size": 4 + len(LETTERS)} if task == "ctc" else {}
    return speech.model(task, **speech.STYLES[style], **DROPOUTS, **vocabulary)


def fairseq_name(name: str, layer_norms: bool) -> str:
    """The name in fairseq's Wav2Vec2Model (models/wav2vec/wav2vec2.py) of a parameter of transformers."""
    parts = name.split(".")
    match parts:
        case ["wav2vec2", "masked_spec_embed"]:
            return "mask_emb"
        case ["wav2vec2", "feature_extractor", _, index, "conv", leaf]:
            return f"feature_extractor.conv_layers.{index}.0.{leaf}"
        case ["wav2vec2", "feature_extractor", _, index, "layer_norm", leaf]:
            return f"feature_extractor.conv_layers.{index}.2.{'1.' if layer_norms else ''}{leaf}"
        case ["wav2vec2", "feature_projection", "layer_norm", leaf]:
            return f"layer_norm.{leaf}"
        case ["wav2vec2", "feature_projection", "projection", leaf]:
            return f"post_extract_proj.{leaf}"
        case ["wav2vec2", "encoder", "pos_conv_embed", "conv", *rest]:
            last = {"original0": "weight_g", "original1": "weight_v", "bias": "bias"}[rest[-1]]
            return f"encoder.pos_conv.0.{last}"
        case ["wav2vec2", "encoder", "layer_norm", leaf]:
            return f"encoder.layer_norm.{leaf}"
        case ["wav2vec2", "encoder", "layers", index, *rest]:
            inner = {
                "attention": "self_attn",
                "layer_norm": "self_attn_layer_norm",
                "final_layer_norm": "final_layer_norm",
                "intermediate_dense": "fc1",
                "output_dense": "fc2",
            }
            rest = rest[1:] if rest[0] == "feed_forward" else rest
            return ".".join(["encoder", "layers", index, inner[rest[0]], *rest[1:]])
        case ["quantizer", "codevectors"]:
            return "quantizer.vars"
        case ["project_hid", leaf]:
            return f"final_proj.{leaf}"
        case ["lm_head", leaf]:
            return f"proj.{leaf}"
    return name


def settings(config: Any) -> dict[str, Any]:
    """fairseq's Wav2Vec2Config of a model of transformers."""
    first, *others = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    return {
        "_name": "wav2vec2",
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "activation_fn": "gelu",
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "encoder_layerdrop": config.layerdrop,
        "dropout_input": config.feat_proj_dropout,
        "dropout_features": config.feat_quantizer_dropout,
        "final_dim": config.proj_codevector_dim,
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_feature_layers": f"[{first}] + {others} * 1",
        "conv_bias": config.conv_bias,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "mask_prob": 0.65,
        "mask_length": 7,
        "mask_channel_prob": 0.25,
        "mask_channel_length": 9,
        "latent_vars": config.num_codevectors_per_group,
        "latent_groups": config.num_codevector_groups,
        "latent_dim": config.codevector_dim,
        "quantize_input": False,
        "same_quantizer": False,
        "target_glu": False,
    }


class Dictionary:
    """What fairseq saves the letters in."""

    def __init__(self) -> None:
        self.symbols = LETTERS


Dictionary.__module__ = "fairseq.data.dictionary"


def content_of(task: str, style: str, *, hydra: bool = True, **changed: Any) -> tuple[dict[str, Any], Any]:
    """What fairseq would save of a model of transformers, and that model."""
    model = made(task, style)
    tensors = {fairseq_name(name, style == "large"): value.detach() for name, value in model.named_parameters()}
    arguments = settings(model.config) | changed
    if task == "ctc":
        tensors = {
            f"w2v_encoder.{name}" if name.startswith("proj.") else f"w2v_encoder.w2v_model.{name}": value
            for name, value in tensors.items()
        }
        # What fine-tuning sets anew; the encoder's own dropouts are those of pre-training.
        before = arguments | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
        arguments = {
            "_name": "wav2vec_ctc",
            "w2v_args": {"model": before, "task": {}} if hydra else argparse.Namespace(**before),
            "dropout": 0.11,
            "attention_dropout": 0.12,
            "activation_dropout": 0.13,
            "dropout_input": 0.14,
            "layerdrop": 0.05,
            "final_dropout": 0.07,
            **{key: value for key, value in arguments.items() if key.startswith("mask_")},
        }
    beside = {"optimizer_history": [{"num_updates": 3}], "extra_state": {}, "task_state": {"target": Dictionary()}}
    task_settings = {"normalize": style == "large"}
    if hydra:
        return {"model": tensors, "cfg": {"model": arguments, "task": task_settings}, "args": None, **beside}, model
    return {"model": tensors, "args": argparse.Namespace(**arguments, **task_settings), **beside}, model


def save(content: Any, path: Path) -> None:
    """Writes a checkpoint, `Dictionary` under the name that it has in fairseq, and the letters beside it."""
    module = types.ModuleType("fairseq.data.dictionary")
    module.Dictionary = Dictionary  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
            patch.setitem(sys.modules, name, module)
        torch.save(content, path)
    lines = (f"{letter} {9 - at}\n" for at, letter in enumerate(LETTERS))
    (path.parent / "dict.ltr.txt").write_text("".join(lines))


@pytest.mark.parametrize(
    ("task", "style", "hydra"),
    [("contrastive", "base", True), ("contrastive", "large", False), ("ctc", "base", False), ("ctc", "large", True)],
)
def test_wav2vec2(task: str, style: str, hydra: bool, tmp_path: Path) -> None:
    content, theirs = content_of(task, style, hydra=hydra)
    save(content, tmp_path / "wav2vec_small.pt")
    model, differences = convert(str(tmp_path / "wav2vec_small.pt"), tmp_path / "hf", checked=True)
    assert model.task == task and differences and max(differences.values()) < 2e-5
    ours = type(theirs).from_pretrained(tmp_path / "hf")
    for name, parameter in theirs.named_parameters():
        assert (ours.get_parameter(name) == parameter).all(), name
    sizes = speech.SIZES.keys() - {"vocab_size", "classifier_proj_size"}  # of other heads
    sizes |= speech.QUANTIZER.keys() if task == "contrastive" else set()
    for key in (*sizes, *speech.STYLES["large"], *DROPOUTS):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    heard = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    assert (heard.do_normalize, heard.return_attention_mask) == (style == "large", style == "large")
    if task == "ctc":
        said = json.loads((tmp_path / "hf" / "vocab.json").read_text())
        assert said == {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
        assert ours.config.final_dropout == 0.07
    masks = {"mask_time_prob": 0.65, "mask_time_length": 7, "mask_feature_prob": 0.25, "mask_feature_length": 9}
    for key, value in masks.items():
        assert getattr(ours.config, key) == value, key


def test_settings_that_an_old_checkpoint_lacks_are_those_of_fairseq(tmp_path: Path) -> None:
    """The first release had neither `cfg` nor, among its arguments, what came later (fairseq, issue 3526)."""
    content, theirs = content_of("contrastive", "base", hydra=False)
    for name in ("extractor_mode", "conv_bias", "layer_norm_first", "dropout_features", "dropout_input"):
        delattr(content["args"], name)
    save(content, tmp_path / "old.pt")
    model, _ = convert(str(tmp_path / "old.pt"), tmp_path / "hf")
    for name, parameter in theirs.named_parameters():
        assert (type(theirs).from_pretrained(tmp_path / "hf").get_parameter(name) == parameter).all(), name
    assert model.config.feat_extract_norm == "group" and model.config.feat_quantizer_dropout == 0  # type: ignore[attr-defined]


class Foreign:
    """What a checkpoint must not bring along."""


def test_what_is_unknown_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, target = tmp_path / "w2v.pt", tmp_path / "hf"

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(JaxptmError, match=message):
            convert(str(path), target, **options)
        assert not target.exists()

    whole, _ = content_of("contrastive", "base")
    save(whole, path)
    refused("--part generator is for ELECTRA", part="generator")
    model = whole["cfg"]["model"]
    save(whole | {"model": {**whole["model"], "target_glu.0.weight": torch.zeros(2)}}, path)
    refused(r"w2v\.pt: 1 weight.*\n.*unexpected target_glu\.0\.weight \[2\]")
    save(whole | {"model": {name: tensor for name, tensor in whole["model"].items() if name != "mask_emb"}}, path)
    refused(r"w2v\.pt: is a Wav2Vec2ForPreTraining without weights for mask_embedding, and none are made up here")
    save(whole | {"cfg": None}, path)
    refused("says nothing of its model under `cfg` or `args`")
    save(whole | {"cfg": {"model": {"extractor_mode": "default"}}}, path)
    refused("its settings lack 'encoder_layers'")
    save(whole | {"cfg": Foreign()}, path)
    refused(r"holds a \S+\.Foreign, which reading would have to run code for. Where fairseq is installed, load it")
    save(whole | {"cfg": {"model": model | {"extractor_mode": "weird"}}}, path)
    refused("`extractor_mode: weird` is not default or layer_norm")
    save(whole | {"model": {"x": 1}}, path)
    refused("holds no `model` of tensors")
    path.write_bytes(path.read_bytes()[:500])
    refused("or is damaged")
    save({"weights": 1}, path)
    refused("holds no `model` of tensors; it is no checkpoint of fairseq")
    save(content_of("contrastive", "base", target_glu=True)[0], path)
    refused("`target_glu: True` is not supported, only False")
    save(content_of("contrastive", "base", conv_feature_layers="__import__('os').getcwd()")[0], path)
    refused("`conv_feature_layers` is .*no list of convolutions")
    tuned, _ = content_of("ctc", "base")
    save(tuned | {"cfg": {"model": tuned["cfg"]["model"] | {"w2v_args": None}}}, path)
    refused("its `w2v_args` is empty, so it does not say what its encoder is")
    save(tuned, path)
    for name, value in (("blank_weight", 5.0), ("_name", "hubert_ctc")):
        save(tuned | {"cfg": {"model": tuned["cfg"]["model"] | {name: value}}}, path)
        refused("`blank_weight: 5.0` is not supported" if name == "blank_weight" else "is a hubert_ctc; of fairseq's")
    body = "w2v_encoder.w2v_model.mask_emb"
    save(tuned | {"model": tuned["model"] | {"mask_emb": tuned["model"][body] + 1}}, path)
    refused(r"mask_emb and .*mask_emb are both wav2vec2\.masked_spec_embed, and differ")
    save(tuned, path)
    (tmp_path / "dict.ltr.txt").write_text("| 9\nT 8\nT 7\nA 6\nO 5\nN 4\n")
    refused(r"dict\.ltr\.txt: has T twice, so that an output would have no letter")
    (tmp_path / "dict.ltr.txt").write_text("| 1\n")
    refused(r"dict\.ltr\.txt: has 1 letters, which with 4 special ones make 5; the head has 10 outputs")
    save(tuned | {"criterion": {}, "last_optimizer_state": {}}, path)
    (tmp_path / "dict.ltr.txt").unlink()
    with caplog.at_level(logging.WARNING, "jaxptm"):
        model, _ = convert(str(path), target)
    assert "the model comes without its letters" in caplog.text
    assert {"criterion", "last_optimizer_state"} <= set(model.unused)


def test_whether_anything_is_hidden_in_training_is_kept(tmp_path: Path) -> None:
    for at, (task, changed, hidden) in enumerate(
        (("contrastive", {}, True), ("contrastive", {"mask_prob": 0.0, "mask_channel_prob": 0.0}, False))
    ):
        save(content_of(task, "base", **changed)[0], tmp_path / "w2v.pt")
        convert(str(tmp_path / "w2v.pt"), tmp_path / str(at))
        assert json.loads((tmp_path / str(at) / "config.json").read_text())["apply_spec_augment"] is hidden


def test_convolutions_are_read_and_not_run() -> None:
    assert convolutions("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2") == [
        (512, 10, 5),
        *[(512, 3, 2)] * 4,
        *[(512, 2, 2)] * 2,
    ]
    for wrong in ("[]", "[(1, 2)]", "[(1, 2, 3.0)]", "5", "print(1)", "[(1, 2, 3)] * [(1, 2, 3)]", "[(1,"):
        with pytest.raises(ValueError, match="no list of"):
            convolutions(wrong)
