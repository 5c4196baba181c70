"""wav2vec 2.0 and HuBERT against transformers: every head, both styles, both directions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import speech
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxptm.conversion import convert
from jaxptm.models import FAMILIES, PRESETS
from jaxptm.models.params import abstract_params, flatten, initialise, stacked
from jaxptm.nn.audio import AudioModel
from jaxptm.nn.core import Execution
from jaxptm.pretrained import from_pretrained
from jaxptm.types import JaxptmError

TOLERANCE = 5e-5
ODD: dict[str, Any] = {
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "num_conv_pos_embeddings": 7,
    "hidden_act": "relu",
    "feat_extract_activation": "gelu_new",
    "layer_norm_eps": 0.1,
    "mask_time_prob": 0.0,
    "num_labels": 5,
    "use_weighted_layer_sum": True,
}
CASES = [
    (family, task, style)
    for family in speech.CLASSES
    for task in speech.CLASSES[family]
    for style in (*speech.STYLES, "odd")
]


def config_of(style: str) -> dict[str, Any]:
    return ODD if style == "odd" else speech.STYLES[style]


def frames_of(config: Any, samples: int) -> int:
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def assert_agree(ours: Any, theirs: Any, arrays: dict[str, np.ndarray]) -> None:
    """Every output and hidden state, at padding as well."""
    found, expected = oracle.run(ours, arrays), oracle.outputs(theirs, arrays)
    assert set(expected) <= set(found)
    for name, difference in oracle.differences({name: found[name] for name in expected}, expected):
        assert difference < TOLERANCE, name


@pytest.mark.parametrize(("family", "task", "style"), CASES)
def test_outputs_and_both_directions(family: str, task: str | None, style: str, tmp_path: Path) -> None:
    theirs = speech.saved(tmp_path / "theirs", task, family, **config_of(style))
    ours = from_pretrained(tmp_path / "theirs", "auto")
    assert (ours.task, ours.family.model_type) == (task, family)
    for padded in (False, True):
        assert_agree(ours, theirs, speech.inputs(padded=padded))

    ours.save_pretrained(tmp_path / "ours")
    oracle.assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), oracle.names(theirs))
    again = speech.reopened(tmp_path / "ours", task, family)
    oracle.assert_equal(oracle.names(again), oracle.names(theirs))
    before, after = (model.config.to_dict() | {"_name_or_path": ""} for model in (theirs, again))
    assert after == before


@pytest.mark.parametrize("style", [*speech.STYLES, "odd"])
@pytest.mark.parametrize("task", speech.CLASSES["wav2vec2"])
def test_the_table_names_each_parameter_of_both_sides_once(task: str | None, style: str, tmp_path: Path) -> None:
    theirs = speech.saved(tmp_path, task, **config_of(style))
    ours = from_pretrained(tmp_path, task)
    table = ours.family.table(ours.config, task)
    paths = [path for row in table.rows for path in row.paths]
    assert len(paths) == len(set(paths))
    assert set(paths) == set(flatten(abstract_params(AudioModel(ours.config, task))))
    prefix = ours.family.prefix if task is None else ""
    assert {row.theirs for row in table.rows} == {f"{prefix}{name}" for name in theirs.state_dict()}


def test_a_call_is_compiled_and_gives_the_same(tmp_path: Path) -> None:
    theirs = speech.saved(tmp_path, "ctc")
    arrays = speech.inputs(padded=True)
    found = from_pretrained(tmp_path, "ctc")(**arrays)
    np.testing.assert_allclose(found.logits, oracle.outputs(theirs, arrays)["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("style", speech.STYLES)
@pytest.mark.parametrize("padded", [False, True])
def test_masked_frames(style: str, padded: bool, tmp_path: Path) -> None:
    theirs = speech.saved(tmp_path, "contrastive", **speech.STYLES[style])
    ours, arrays = from_pretrained(tmp_path, "contrastive"), speech.inputs(padded=padded)
    count = frames_of(theirs.config, speech.SAMPLES)
    arrays["mask_time_indices"] = np.random.default_rng(1).random((len(speech.LENGTHS), count)) < 0.4
    assert_agree(ours, theirs, arrays)
    out = ours(**arrays)
    assert out.codevector_perplexity == pytest.approx(oracle.outputs(theirs, arrays)["codevector_perplexity"], abs=1e-4)


def test_masked_channels(tmp_path: Path) -> None:
    theirs = speech.saved(tmp_path, mask_time_prob=0.0, mask_feature_prob=0.1)
    ours, arrays = from_pretrained(tmp_path), speech.inputs(padded=False)
    masked = np.random.default_rng(1).random((len(speech.LENGTHS), speech.SIZES["hidden_size"])) < 0.3

    def zero(module: Any, args: Any, out: Any) -> Any:
        return torch.where(torch.tensor(masked)[:, None], 0.0, out[0]), out[1]

    theirs.feature_projection.register_forward_hook(zero)
    found = ours(**arrays, mask_feature_indices=masked).last_hidden_state
    np.testing.assert_allclose(found, oracle.outputs(theirs, arrays)["last_hidden_state"], atol=TOLERANCE)


# Gradients


@pytest.mark.parametrize("style", speech.STYLES)
def test_gradients_of_ctc_agree_with_torch(style: str, tmp_path: Path) -> None:
    import optax

    theirs = speech.saved(tmp_path, "ctc", **speech.STYLES[style])
    arrays = speech.inputs(padded=True)
    ours = from_pretrained(tmp_path, "ctc")
    labels = np.random.default_rng(2).integers(1, 11, (3, 6))
    labels[1, 4:] = labels[2, 1:] = -100
    masked = np.zeros((3, frames_of(theirs.config, speech.SAMPLES)), bool)
    masked[:, 2:5] = True
    hook = lambda module, args, kwargs: (args, kwargs | {"mask_time_indices": torch.tensor(masked)})  # noqa: E731
    theirs.wav2vec2.register_forward_pre_hook(hook, with_kwargs=True)
    out = theirs(**{name: torch.tensor(array) for name, array in arrays.items()}, labels=torch.tensor(labels))
    out.loss.backward()

    lengths = np.array([frames_of(theirs.config, n) for n in speech.LENGTHS])
    padding = np.arange(masked.shape[1])[None] >= lengths[:, None]

    arrays["mask_time_indices"] = masked
    ready = on_device(arrays)

    def loss(params: Any) -> Any:
        logits = ours.module.apply({"params": params}, **ready)["logits"]
        return optax.ctc_loss(logits, padding.astype(np.float32), labels, (labels < 0).astype(np.float32)).sum()

    found, gradient = jax.jit(jax.value_and_grad(loss))(ours.params)
    assert found == pytest.approx(out.loss.item(), rel=1e-5)
    speech.assert_gradients_agree(ours, theirs, gradient)


@pytest.mark.parametrize("style", speech.STYLES)
def test_training_of_the_contrastive_head_agrees_with_torch(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same Gumbel noise: outputs, and gradients of a function of all of them."""
    theirs = speech.saved(tmp_path, "contrastive", **speech.STYLES[style], **speech.NO_DROPOUT).train()
    theirs.set_gumbel_temperature(1.5)
    ours, arrays = from_pretrained(tmp_path, "contrastive"), speech.inputs(padded=True)
    rng, frames = np.random.default_rng(3), frames_of(theirs.config, speech.SAMPLES)
    arrays["mask_time_indices"] = rng.random((3, frames)) < 0.4
    noise = rng.gumbel(size=(3, frames, 3, 7)).astype(np.float32)

    def gumbel_softmax(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        soft = torch.softmax((logits + torch.tensor(noise).reshape(logits.shape)) / tau, dim=-1)
        return torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
    out = theirs(**{name: torch.tensor(array) for name, array in arrays.items()})
    (
        out.projected_states.sin().sum() + out.projected_quantized_states.sin().sum() + out.codevector_perplexity
    ).backward()

    ready = on_device({**arrays, "gumbel_noise": noise})

    def loss(params: Any) -> Any:
        said = ours.module.apply({"params": params}, **ready, train=True, temperature=1.5)
        whole = sum(jnp.sin(said[f"projected_{name}"]).sum() for name in ("states", "quantized_states"))
        return whole + said["codevector_perplexity"], said

    (_, said), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours.params)
    for name in ("projected_states", "projected_quantized_states", "codevector_perplexity"):
        np.testing.assert_allclose(said[name], out[name].detach().numpy(), atol=TOLERANCE, err_msg=name)
    speech.assert_gradients_agree(ours, theirs, gradient)


# Files


def test_the_old_spelling_of_weight_norm(tmp_path: Path) -> None:
    speech.saved(tmp_path, "ctc")
    expected = flatten(from_pretrained(tmp_path, "ctc").params)
    tensors = load_file(tmp_path / "model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        prefix = "wav2vec2.encoder.pos_conv_embed.conv."
        tensors[f"{prefix}{old}"] = tensors.pop(f"{prefix}parametrizations.weight.{new}")
    save_file(tensors, tmp_path / "model.safetensors")
    oracle.assert_equal(flatten(from_pretrained(tmp_path, "ctc").params), expected)


@pytest.mark.parametrize("task", ["ctc", "sequence-classification", None])
def test_a_pretrained_encoder_gets_a_new_head(
    task: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = speech.saved(tmp_path, "contrastive")
    with caplog.at_level(logging.WARNING, "jaxptm"):
        ours = from_pretrained(tmp_path, task)
    said = {"ctc": "has no ctc_head", "sequence-classification": "has no classifier", None: ""}[task]
    assert said in caplog.text and bool(caplog.text) == bool(said)
    hidden = from_pretrained(tmp_path)(**speech.inputs(padded=False)).last_hidden_state
    expected = oracle.outputs(theirs.wav2vec2, speech.inputs(padded=False))["last_hidden_state"]
    np.testing.assert_allclose(hidden, expected, atol=TOLERANCE)
    assert ours(**speech.inputs(padded=True))


def test_a_checkpoint_without_a_mask_embedding_gets_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that fairseq fine-tuned, such as wav2vec2-base-960h, have none."""
    speech.saved(tmp_path, "ctc", mask_time_prob=0.0)
    content = json.loads((tmp_path / "config.json").read_text()) | {"mask_time_prob": 0.05}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "jaxptm"):
        ours = from_pretrained(tmp_path, "ctc")
    assert "has no mask_embedding: initialised at random" in caplog.text
    assert ours.params["mask_embedding"]["embedding"].shape == (1, 32)


@pytest.mark.parametrize("task", ["ctc", None])
@pytest.mark.parametrize("family", speech.CLASSES)
def test_a_mask_embedding_without_masks_is_kept(
    family: str, task: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    speech.saved(tmp_path / "theirs", task, family)
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_time_prob": 0.0}))
    ours = from_pretrained(tmp_path / "theirs", "auto")
    kind = getattr(transformers, speech.CLASSES[family][task])
    assert_agree(ours, kind.from_pretrained(tmp_path / "theirs"), speech.inputs(padded=True))
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert any("masked_spec_embed" in name for name in files[0])
    oracle.assert_equal(*files)
    with caplog.at_level(logging.WARNING):
        convert(str(tmp_path / "theirs"), tmp_path / "orbax", "orbax")
    assert "masked_spec_embed" in caplog.text  # parameters alone go there


@pytest.mark.parametrize("shape", [(0, 800), (1, 0)])
def test_an_input_is_not_empty(shape: tuple[int, int], tmp_path: Path) -> None:
    speech.saved(tmp_path)
    with pytest.raises(JaxptmError, match=r"`input_values` has shape \[., .*\]: give at least one row of samples"):
        from_pretrained(tmp_path)(input_values=np.zeros(shape, np.float32))


def test_orbax_and_back(tmp_path: Path) -> None:
    speech.saved(tmp_path / "theirs", "contrastive")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text("{}")
    ours = from_pretrained(tmp_path / "theirs", "contrastive")
    ours.save_orbax(tmp_path / "orbax")
    again = from_pretrained(tmp_path / "orbax", "auto")
    oracle.assert_equal(flatten(again.params), flatten(ours.params))
    assert (tmp_path / "orbax" / "preprocessor_config.json").read_text() == "{}"


def test_a_new_head_keeps_the_mask_embedding(tmp_path: Path) -> None:
    speech.saved(tmp_path, "ctc")
    old, new = (flatten(from_pretrained(tmp_path, "ctc", new_head=fresh).params) for fresh in (False, True))
    same = {path for path in old if np.array_equal(old[path], new[path])}
    assert set(old) - same == {"ctc_head/dense/kernel", "ctc_head/dense/bias"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"add_adapter": True}, "`add_adapter: True` is not supported, only False"),
        ({"adapter_attn_dim": 16}, "`adapter_attn_dim: 16` is not supported, only None"),
        ({"do_stable_layer_norm": "no"}, r"`do_stable_layer_norm: no` is not one of \[False, True\]"),
        ({"conv_stride": [5, 2]}, "`conv_dim` has 3 entries, `conv_kernel` 3 and `conv_stride` 2; give one a layer"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm"),
        ({"feat_extract_activation": "gelo"}, "`feat_extract_activation` 'gelo' is not one of"),
        (
            {"num_conv_pos_embedding_groups": 5},
            "`hidden_size` 32 is not a multiple of `num_conv_pos_embedding_groups` 5",
        ),
        ({"num_codevector_groups": 5}, "`codevector_dim` 24 is not a multiple of `num_codevector_groups` 5"),
    ],
)
def test_configs_that_cannot_be(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    speech.saved(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | keys
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(JaxptmError, match=message):
        from_pretrained(tmp_path)


def test_a_speech_model_has_no_text_head(tmp_path: Path) -> None:
    speech.saved(tmp_path)
    with pytest.raises(JaxptmError, match="wav2vec2 has no head for the task 'masked-lm'; it has None, ctc"):
        from_pretrained(tmp_path, "masked-lm")
    with pytest.raises(JaxptmError, match="a wav2vec2 does not generate text"):
        from_pretrained(tmp_path).generate(np.ones((1, 4), int), max_new_tokens=1)


# Sizes


SIZES: dict[str, tuple[str | None, float]] = {
    # Head, and parameters in millions (Baevski et al. 2020, section 4.2, and Hsu et al. 2021, table 1: 95 and 317).
    "wav2vec2-base": ("contrastive", 95.0),
    "wav2vec2-large": ("contrastive", 317.4),
    "wav2vec2-large-lv60": ("contrastive", 317.4),
    "hubert-base": (None, 94.4),
    "hubert-large": (None, 315.4),
    "wav2vec2-tiny": ("contrastive", 4.1),
}


@pytest.mark.parametrize("preset", SIZES)
def test_presets_have_their_sizes(preset: str) -> None:
    task, millions = SIZES[preset]
    family, config = PRESETS[preset]
    shapes = jax.tree.leaves(abstract_params(family.module(config, task, Execution())))
    assert sum(leaf.size for leaf in shapes) / 1e6 == pytest.approx(millions, abs=0.06)


def test_every_preset_is_counted() -> None:
    assert set(SIZES) == {name for name, (family, _) in PRESETS.items() if family.module is AudioModel}


@pytest.mark.parametrize("preset", ["wav2vec2-tiny", "wav2vec2-large-lv60", "hubert-base"])
def test_presets_as_configs_of_transformers(preset: str) -> None:
    """Which builds a model of the same names and shapes from what we write."""
    family, config = PRESETS[preset]
    config = config.model_copy(update={"num_hidden_layers": 1})
    for task, name in family.architectures.items():
        kind = getattr(transformers, name)
        with torch.device("meta"):
            theirs = kind(kind.config_class(**family.to_hf(config)))
        rows = family.table(config, task).rows
        shapes = flatten(abstract_params(family.module(config, task, Execution())))
        ours = {
            row.theirs: row.operation.save([np.broadcast_to(np.float32(0), shapes[p].shape) for p in row.paths]).shape
            for row in rows
        }
        prefix = family.prefix if task is None else ""
        assert ours == {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}


def test_a_fresh_model_begins_as_theirs_does() -> None:
    config = FAMILIES["wav2vec2"].config(
        **{
            **FAMILIES["wav2vec2"].from_hf({**speech.SIZES, **speech.QUANTIZER}),
            "hidden_size": 64,
            "conv_dim": (64,) * 3,
        }
    )
    params = flatten(initialise(AudioModel(config, "contrastive"), jax.random.key(0)))

    def deviation(path: str) -> float:
        return float(np.std(params[path]))

    assert deviation("contrastive_head/quantizer/logits/kernel") == pytest.approx(1, rel=0.1)
    assert deviation("embeddings/feature_encoder/conv_1/conv/kernel") == pytest.approx((2 / (3 * 64)) ** 0.5, rel=0.1)
    assert deviation("embeddings/positions/kernel") == pytest.approx(2 / (8 * 64) ** 0.5, rel=0.1)
    assert np.abs(params["embeddings/feature_projection/kernel"]).max() == pytest.approx(1 / 64**0.5, rel=0.1)
    for path in ("mask_embedding/embedding", "contrastive_head/quantizer/embedding"):
        assert 0 <= params[path].min() < 0.1 < 0.9 < params[path].max() <= 1
    norms = np.sqrt((np.asarray(params["embeddings/positions/kernel"]) ** 2).sum((1, 2)))
    np.testing.assert_allclose(params["embeddings/positions/scale"], norms, rtol=1e-6)


def test_scanned_layers_give_the_same(tmp_path: Path) -> None:
    speech.saved(tmp_path, **speech.STYLES["large"])
    ours, arrays = from_pretrained(tmp_path), speech.inputs(padded=False)
    scanned = AudioModel(ours.config, None, Execution(scan=True, remat=True))
    found = scanned.apply({"params": stacked(ours.params)}, **on_device(arrays))
    np.testing.assert_allclose(found["last_hidden_state"], ours(**arrays).last_hidden_state, atol=TOLERANCE)
