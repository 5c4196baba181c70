"""fairseq's wav2vec 2.0 (facebookresearch/fairseq, models/wav2vec): names and settings.

Pre-trained checkpoints (`wav2vec_small.pt`) become Wav2Vec2ForPreTraining, those fine-tuned with CTC
(`wav2vec_small_100h.pt`) Wav2Vec2ForCTC.
"""

from __future__ import annotations

import argparse
import ast
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxptm.hf.files import from_torch, import_torch, write_json, write_model
from jaxptm.hf.table import renamed
from jaxptm.types import JaxptmError

log = logging.getLogger("jaxptm")

BODY = "w2v_encoder.w2v_model."
"""What the names of the encoder begin with under a CTC head."""
HEAD = "w2v_encoder.proj."
SPELLED = (
    (r"^mask_emb$", "wav2vec2.masked_spec_embed"),
    (r"^feature_extractor\.conv_layers\.(\d+)\.0\.", r"wav2vec2.feature_extractor.conv_layers.\1.conv."),
    (r"^feature_extractor\.conv_layers\.(\d+)\.2\.(1\.)?", r"wav2vec2.feature_extractor.conv_layers.\1.layer_norm."),
    (r"^layer_norm\.", "wav2vec2.feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "wav2vec2.feature_projection.projection."),
    (r"^encoder\.pos_conv\.0\.weight_g$", "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"^encoder\.pos_conv\.0\.weight_v$", "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"^encoder\.pos_conv\.0\.bias$", "wav2vec2.encoder.pos_conv_embed.conv.bias"),
    (r"^encoder\.layer_norm\.", "wav2vec2.encoder.layer_norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"wav2vec2.encoder.layers.\1.layer_norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.", r"wav2vec2.encoder.layers.\1.attention."),
    (r"^encoder\.layers\.(\d+)\.fc1\.", r"wav2vec2.encoder.layers.\1.feed_forward.intermediate_dense."),
    (r"^encoder\.layers\.(\d+)\.fc2\.", r"wav2vec2.encoder.layers.\1.feed_forward.output_dense."),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"wav2vec2.encoder.layers.\1.final_layer_norm."),
    (r"^quantizer\.vars$", "quantizer.codevectors"),
    (r"^final_proj\.", "project_hid."),
)
"""fairseq's names -> Hugging Face's; the quantizer's projection and `project_q` have the same in both."""
SETTINGS = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "activation_fn": "hidden_act",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_bias": "conv_bias",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "encoder_layerdrop": "layerdrop",
    "dropout_input": "feat_proj_dropout",
    "dropout_features": "feat_quantizer_dropout",
}
"""Keys of fairseq's model (Wav2Vec2Config in wav2vec2.py) -> keys of config.json."""
DEFAULTS: dict[str, Any] = {
    "extractor_mode": "default",
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "dropout_features": 0.0,
    "latent_vars": 320,
    "latent_groups": 2,
}
"""What fairseq takes for settings that older checkpoints do not have yet; their sizes are always there."""
MASKS = {
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
}
NORMS = {"default": "group", "layer_norm": "layer"}
UNSUPPORTED = {
    "quantize_input": False,
    "same_quantizer": False,
    "target_glu": False,
    "negatives_from_everywhere": False,
    "pos_conv_depth": 1,
    "quantizer_depth": 1,
    "layer_type": "transformer",
    "conv_pos_batch_norm": False,
    "blank_weight": 0,
}
"""Settings of fairseq that change what the model computes, and the only value that is computed here."""
MODELS = ("wav2vec2", "wav2vec_ctc")
"""What fairseq calls them, as `_name` or as `arch`."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""The first symbols of a head. fairseq calls the blank <s> and swaps it with <pad>; transformers calls it <pad>."""


class Dictionary:
    """Stands in for `fairseq.data.dictionary.Dictionary`, which fine-tuned checkpoints carry along: it does nothing."""


def rewrite_fairseq(checkpoint: Path, directory: Path) -> list[str]:
    """Writes a checkpoint as a Hugging Face directory; see `jaxptm.original.rewrite`.

    Of a model fine-tuned with CTC the letters are read from `dict.ltr.txt` beside it (`ltr` is its task's `labels`).
    """
    content = _read(checkpoint)
    settings = _settings(content, checkpoint)
    tuned = any(name.startswith(BODY) for name in content["model"])
    model = dict(settings)
    if tuned:  # what the encoder was built from is an argument of what was built around it
        pre_trained = _plain(settings.get("w2v_args"))
        if not pre_trained:
            raise JaxptmError(
                f"{checkpoint}: its `w2v_args` is empty, so it does not say what its encoder is; where fairseq is "
                "installed, put there the `cfg` of the pre-trained checkpoint that `w2v_path` names, and save it again."
            )
        model = _plain(pre_trained.get("model", pre_trained)) | _overridden(settings)
    arrays = {name: from_torch(tensor.detach()) for name, tensor in content["model"].items()}
    tensors = renamed(arrays, _hf_name, str(checkpoint))
    _refuse_other_models(settings, checkpoint)
    config = _config(DEFAULTS | model, tensors, checkpoint)
    # A pre-training always hides what it predicts, a fine-tuning where it says so (`Wav2Vec2AsrConfig.apply_mask`).
    hides = model.get("mask_prob", 0.65) or model.get("mask_channel_prob", 0)
    config["apply_spec_augment"] = bool(hides and (not tuned or settings.get("apply_mask", False)))
    config["architectures"] = ["Wav2Vec2ForCTC" if tuned else "Wav2Vec2ForPreTraining"]
    if tuned:
        if "lm_head.weight" not in tensors:
            raise JaxptmError(f"{checkpoint}: has no {HEAD}weight; it is not fine-tuned with CTC.")
        config["vocab_size"] = len(tensors["lm_head.weight"])
        config["final_dropout"] = settings.get("final_dropout", 0.0)
    write_model(directory, config, tensors)
    task = _plain(_plain(content.get("cfg")).get("task")) or settings
    # As the checkpoint was trained; transformers' own copies of the base models normalise audio all the same.
    normalize = bool(task.get("normalize"))
    write_json(
        directory / "preprocessor_config.json",
        {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": 16_000,
            "padding_side": "right",
            "padding_value": 0.0,
            "do_normalize": normalize,
            "return_attention_mask": config["feat_extract_norm"] == "layer",
        },
    )
    if tuned:
        _write_vocabulary(
            checkpoint.parent / f"dict.{task.get('labels') or 'ltr'}.txt", directory, config["vocab_size"]
        )
    return sorted(set(content) - {"model", "cfg", "args"})


def _read(checkpoint: Path) -> dict[str, Any]:
    torch = import_torch(checkpoint)
    try:
        # weights_only: no code of the file runs; besides tensors, a namespace of arguments is let in.
        inert = [argparse.Namespace, (Dictionary, "fairseq.data.dictionary.Dictionary")]
        with torch.serialization.safe_globals(inert):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: pickle, zip, runtime and attribute errors
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise JaxptmError(f"{checkpoint}: is no file that torch wrote, or is damaged; copy it again.") from error
        raise JaxptmError(
            f"{checkpoint}: holds a {foreign.group(1)}, which reading would have to run code for. Where fairseq is "
            "installed, load it and save again what is under `model` and under `cfg` or `args`, as plain dicts."
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
        raise JaxptmError(f"{checkpoint}: holds no `model` of tensors; it is no checkpoint of fairseq.")
    return dict(content)


def _settings(content: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The arguments of the model: under `cfg` since fairseq uses hydra, under `args` before."""
    settings = _plain(_plain(content.get("cfg")).get("model")) or _plain(content.get("args"))
    if not settings:
        raise JaxptmError(f"{checkpoint}: says nothing of its model under `cfg` or `args`.")
    return settings


def _plain(settings: Any) -> dict[str, Any]:
    if isinstance(settings, argparse.Namespace):
        return vars(settings)
    return dict(settings) if isinstance(settings, Mapping) else {}


def _overridden(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a fine-tuning sets anew (fairseq, models/wav2vec/wav2vec2_asr.py, `Wav2VecEncoder`)."""
    names = {
        "dropout": "dropout",
        "activation_dropout": "activation_dropout",
        "attention_dropout": "attention_dropout",
        "dropout_input": "dropout_input",
        "layerdrop": "encoder_layerdrop",
        **{name: name for name in MASKS},
    }
    return {theirs: settings[name] for name, theirs in names.items() if settings.get(name) is not None}


def _hf_name(name: str) -> str:
    name = name.removeprefix(BODY)
    if name.startswith(HEAD):
        return name.replace(HEAD, "lm_head.")
    for pattern, replacement in SPELLED:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _refuse_other_models(settings: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises JaxptmError where the outer settings, of the pre-training or of the head, are of something else."""
    kind = settings.get("_name") or settings.get("arch") or MODELS[0]
    if kind not in MODELS:
        raise JaxptmError(f"{checkpoint}: is a {kind}; of fairseq's models {' and '.join(MODELS)} are read.")
    for key, usual in UNSUPPORTED.items():
        if settings.get(key, usual) != usual:
            raise JaxptmError(f"{checkpoint}: `{key}: {settings[key]}` is not supported, only {usual!r}.")


def _config(model: Mapping[str, Any], tensors: Mapping[str, np.ndarray], checkpoint: Path) -> dict[str, Any]:
    for key, usual in UNSUPPORTED.items():
        if model.get(key, usual) != usual:
            raise JaxptmError(f"{checkpoint}: `{key}: {model[key]}` is not supported, only {usual!r}.")
    try:
        config = {key: model[name] for name, key in SETTINGS.items()}
        if model["extractor_mode"] not in NORMS:
            raise JaxptmError(f"{checkpoint}: `extractor_mode: {model['extractor_mode']}` is not {' or '.join(NORMS)}.")
        config["feat_extract_norm"] = NORMS[model["extractor_mode"]]
        layers = convolutions(model["conv_feature_layers"])
    except KeyError as error:
        raise JaxptmError(f"{checkpoint}: its settings lack {error}.") from error
    except ValueError as error:
        raise JaxptmError(f"{checkpoint}: `conv_feature_layers` is {error}.") from error
    config |= dict(zip(("conv_dim", "conv_kernel", "conv_stride"), map(list, zip(*layers, strict=True)), strict=True))
    # Without any masks transformers has no embedding for what is masked, and fairseq has one.
    config |= {key: model[name] for name, key in MASKS.items() if model.get(name)}
    if "project_q.weight" in tensors:
        config["num_codevector_groups"] = model["latent_groups"]
        config["num_codevectors_per_group"] = model["latent_vars"]
        config["codevector_dim"] = tensors["project_q.weight"].shape[1]
        config["proj_codevector_dim"] = len(tensors["project_q.weight"])
    return {**config, "model_type": "wav2vec2", "layer_norm_eps": 1e-5}


def convolutions(expression: str) -> list[tuple[int, int, int]]:
    """(channels, taps, stride) of each layer, of fairseq's `[(512, 10, 5)] + [(512, 3, 2)] * 4`; nothing is evaluated.

    Raises:
        ValueError: it is something else.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case _:
                return ast.literal_eval(node)

    try:
        layers = [tuple(layer) for layer in value(ast.parse(str(expression).strip(), mode="eval").body)]
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{expression!r}, no list of convolutions") from error
    if not layers or any(len(layer) != 3 or not all(type(size) is int for size in layer) for layer in layers):
        raise ValueError(f"{expression!r}, no list of (channels, taps, stride)")
    return layers


def _write_vocabulary(path: Path, directory: Path, symbols: int) -> None:
    """Writes vocab.json from fairseq's dictionary, a symbol and its count a line."""
    if not path.exists():
        log.warning("%s: is not there; the model comes without its letters, and cannot spell.", path)
        return
    try:
        letters = [line.split(" ")[0] for line in path.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as error:
        raise JaxptmError(f"{path}: is not UTF-8.") from error
    found = len(SPECIAL) + len(letters)
    if found != symbols:
        raise JaxptmError(
            f"{path}: has {len(letters)} letters, which with {len(SPECIAL)} special ones make {found}; the "
            f"head has {symbols} outputs."
        )
    if twice := sorted({letter for letter in letters if letters.count(letter) > 1 or letter in SPECIAL}):
        raise JaxptmError(f"{path}: has {', '.join(twice)} twice, so that an output would have no letter.")
    write_json(directory / "vocab.json", {symbol: index for index, symbol in enumerate([*SPECIAL, *letters])})
