"""RoBERTa, XLM-R, ELECTRA, GPT-2, ALBERT and DistilBERT against transformers: every head, both directions."""

from __future__ import annotations

import json
import math
import re
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

from jaxptm.models import FAMILIES, PRESETS
from jaxptm.models.albert import AlbertConfig
from jaxptm.models.electra import ElectraConfig
from jaxptm.models.gpt2 import Gpt2Config
from jaxptm.models.params import abstract_params, flatten, initialise, stacked, unstacked
from jaxptm.models.roberta import RobertaConfig
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel, forward_flops
from jaxptm.nn.text_config import TextConfig
from jaxptm.pretrained import from_pretrained
from jaxptm.types import JaxptmError

TOLERANCE = 2e-5
NEW = [family for family in oracle.CLASSES if family != "bert"]
LANGUAGE_MODELS = [
    (family, task)
    for family in NEW
    for task in ("masked-lm", "causal-lm", "replaced-token", "pretraining")
    if task in oracle.CLASSES[family]
    if (family, task) != ("albert", "masked-lm")  # a part of its pretraining
]
ODD: dict[str, dict[str, Any]] = {
    "roberta": {"pad_token_id": 3, "type_vocab_size": 1, "hidden_size": 60, "num_attention_heads": 3, "num_labels": 5},
    "electra": {"embedding_size": 32, "hidden_act": "gelu_new", "num_labels": 5, "type_vocab_size": 3},
    "gpt2": {"hidden_act": "relu", "num_labels": 5, "hidden_size": 60, "num_attention_heads": 3, "layer_norm_eps": 0.1},
    "albert": {"hidden_act": "gelu", "num_hidden_layers": 5, "num_labels": 5, "type_vocab_size": 1},
    "distilbert": {"hidden_act": "relu", "num_labels": 5, "hidden_size": 60, "num_attention_heads": 3},
}
SHAPES: dict[str, tuple[str, list[str | None], dict[str, Any]]] = {
    # A generator: narrower than the embeddings that it shares with the discriminator.
    "generator": ("electra", ["masked-lm"], {"embedding_size": 32, "hidden_size": 16, "num_attention_heads": 1}),
    # ALBERT projects its embeddings even where it need not.
    "as wide as its embeddings": ("albert", [None, "masked-lm", "pretraining"], {"embedding_size": 32}),
    "odd and narrow": (
        "electra",
        [None, "replaced-token", "masked-lm"],
        {"hidden_size": 60, "num_attention_heads": 3, "embedding_size": 24, "hidden_act": "relu"},
    ),
}
CASES = [
    *((family, task, {}) for family in NEW for task in oracle.CLASSES[family]),
    *((family, task, ODD[family]) for family in ODD for task in oracle.CLASSES[family]),
    ("xlm-roberta", "masked-lm", {"pad_token_id": 3, "layer_norm_eps": 1e-5, "hidden_act": "relu"}),
    *((family, task, {"tie_word_embeddings": False}) for family, task in LANGUAGE_MODELS if task != "replaced-token"),
    *((family, "sequence-classification", {"num_labels": 1}) for family in NEW),
    *((family, None, {"pooler": False}) for family in ("roberta", "xlm-roberta", "albert")),
    *((family, task, config) for family, tasks, config in SHAPES.values() for task in tasks),
]


def names_of(cases: list[tuple[str, str | None, dict[str, Any]]]) -> list[str]:
    kinds = {id(config): "odd" for config in ODD.values()} | {id(config): name for name, (*_, config) in SHAPES.items()}
    return [f"{family}-{task}-{kinds.get(id(config), ' '.join(config) or 'plain')}" for family, task, config in cases]


def case(task: str | None, config: dict[str, Any]) -> dict[str, Any]:
    # transformers sizes these heads, too, by the number of labels; they have two.
    return {k: v for k, v in config.items() if k != "num_labels" or task not in ("question-answering", "pretraining")}


def inputs(config: Any, task: str | None, *, explicit: bool) -> dict[str, np.ndarray]:
    """As the oracle's; where the mask is 0 the ids are padding, and nowhere else.

    Args:
        explicit: give positions and types; otherwise the models' defaults are compared.
    """
    arrays = oracle.inputs(config, task)
    pad, mask = config.pad_token_id, arrays["attention_mask"]
    ids = arrays["input_ids"]
    arrays["input_ids"] = np.where(mask == 1, np.where(ids == pad, pad + 1, ids), pad)
    if (config.model_type, task) == ("distilbert", "multiple-choice"):
        del arrays["position_ids"]  # which transformers does not take apart
    return arrays if explicit else {name: arrays[name] for name in ("input_ids", "attention_mask")}


def assert_agree(ours: Any, theirs: Any, arrays: dict[str, np.ndarray]) -> None:
    """Every output and hidden state, at padding as well."""
    for name, difference in oracle.differences(oracle.run(ours, arrays), oracle.outputs(theirs, arrays)):
        assert difference < TOLERANCE, name


@pytest.mark.parametrize(("family", "task", "config"), CASES, ids=names_of(CASES))
def test_outputs_and_both_directions(family: str, task: str | None, config: dict[str, Any], tmp_path: Path) -> None:
    config = case(task, config)
    theirs = oracle.saved(tmp_path / "theirs", task, family, **config)
    ours = from_pretrained(tmp_path / "theirs", "auto")
    assert (ours.task, ours.family.model_type) == (task, family)
    assert_agree(ours, theirs, inputs(theirs.config, task, explicit=not config))

    ours.save_pretrained(tmp_path / "ours")
    # Every name of the state dict, tied tensors among them.
    oracle.assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), oracle.names(theirs))
    if config.get("pooler", True):  # transformers reports the pooler that such a checkpoint cannot have
        again = oracle.reopened(tmp_path / "ours", task, family)
        oracle.assert_equal(oracle.names(again), oracle.names(theirs))
        before, after = (model.config.to_dict() | {"_name_or_path": ""} for model in (theirs, again))
        # What transformers has no key for: the shares of ELECTRA's generator, an epsilon that DistilBERT fixes.
        own = {"electra": {"generator_size", "generator_layers"}, "distilbert": {"layer_norm_eps"}}
        own["gpt2"] = {"classifier_dropout"}  # a null, which is what its absence means
        assert set(after) - set(before) <= own.get(family, set())
        assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("family", NEW)
def test_what_the_inputs_are_where_nothing_is_said(family: str, tmp_path: Path) -> None:
    """Neither a mask; and a call of the model, which is compiled, agrees too."""
    theirs = oracle.saved(tmp_path, family=family)
    arrays = {"input_ids": oracle.inputs(theirs.config)["input_ids"]}
    ours = from_pretrained(tmp_path)(**arrays, output_hidden_states=True)
    for name, difference in oracle.differences(ours, oracle.outputs(theirs, arrays)):
        assert difference < TOLERANCE, name


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_names_each_parameter_of_both_sides_once(family: str, tied: bool) -> None:
    kind = FAMILIES[family]
    assert dict(kind.architectures) == oracle.CLASSES[family]
    for task in kind.architectures:
        options = {"pooler": task is None} if kind.config().pooler else {}
        config = kind.config(**oracle.SIZES, **narrow(family), tie_word_embeddings=tied, **options)
        table = kind.table(config, task)
        ours = [path for row in table.rows for path in row.paths]
        assert len(ours) == len(set(ours))
        assert set(ours) == set(flatten(abstract_params(TextModel(config, task))))
        rows = {row.theirs for row in table.rows}
        assert len(rows) == len(table.rows)
        prefix = kind.prefix if task is None else ""
        state = oracle.model(task, family, tie_word_embeddings=tied).state_dict()
        assert table.names == {f"{prefix}{name}" for name in state}
        assert not rows & (set(table.tied) | set(table.dead))
        assert (set(table.tied.values()) | set(table.dead.values())) <= rows


def narrow(family: str) -> dict[str, Any]:
    return {"embedding_size": 20} if family in ("electra", "albert") else {}


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "gpt2", "distilbert"])
def test_no_embeddings_of_another_width_where_no_projection_can_be_saved(family: str) -> None:
    with pytest.raises(
        ValueError, match="`embedding_size` 16 is not `hidden_size` 32, and this family has no projection"
    ):
        FAMILIES[family].config(**oracle.SIZES, embedding_size=16)
    assert FAMILIES[family].config(**oracle.SIZES, embedding_size=32).embedding_width == 32


# Gradients


@pytest.mark.parametrize(("family", "task"), LANGUAGE_MODELS)
def test_gradients_agree_with_torch(family: str, task: str, tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, task, family)
    model, arrays = from_pretrained(tmp_path, task), oracle.inputs(theirs.config)
    # Torch keeps the row of padding from learning, in the table of tokens and in RoBERTa's of positions.
    for name in ("input_ids", "position_ids"):
        arrays[name] = np.where(arrays[name] == theirs.config.pad_token_id, 5, arrays[name])
    rng, real = np.random.default_rng(1), arrays["attention_mask"] == 1
    vocabulary = 2 if task == "replaced-token" else theirs.config.vocab_size
    labels, weights = rng.integers(0, vocabulary, real.shape), (rng.random(real.shape) < 0.5) & real
    # Nor is there a gradient to agree on in a row of nothing but padding, whose pair has a logit all the same.
    pairs, order = np.flatnonzero(real.any(axis=1)), rng.integers(0, 2, 3)

    out = theirs(**{name: torch.tensor(array) for name, array in arrays.items()})
    if task == "replaced-token":
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            out.logits, torch.tensor(labels, dtype=torch.float32), reduction="none"
        )
    else:
        logits = (out.prediction_logits if task == "pretraining" else out.logits).transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    value = (losses * torch.tensor(weights)).sum()
    if task == "pretraining":
        value = value + torch.nn.functional.cross_entropy(out.sop_logits[pairs], torch.tensor(order))
    value.backward()

    def loss(params: Any) -> Any:
        out = model.module.apply({"params": params}, **{name: jnp.asarray(array) for name, array in arrays.items()})
        if task == "replaced-token":
            return (jax.nn.softplus(jnp.where(labels == 1, -out["logits"], out["logits"])) * weights).sum()
        words = jax.nn.log_softmax(out["prediction_logits" if task == "pretraining" else "logits"])
        total = -(jnp.take_along_axis(words, jnp.asarray(labels)[..., None], axis=-1)[..., 0] * weights).sum()
        if task == "pretraining":
            total -= jax.nn.log_softmax(out["sop_logits"])[pairs, order].mean()
        return total

    found, gradient = jax.value_and_grad(loss)(model.params)
    assert found == pytest.approx(value.item(), rel=1e-5)
    gradients = flatten(gradient)
    expected = {
        path: part
        for row in FAMILIES[family].table(model.config, task).rows
        for path, part in zip(row.paths, row.operation.load(theirs.get_parameter(row.theirs).grad.numpy()), strict=True)
    }
    assert expected.keys() == gradients.keys()
    for path, part in expected.items():
        # A key's bias shifts all scores of a query alike: its gradient is zero, but for its kernel's rounding.
        scale = np.abs(expected[path.replace("key/bias", "key/kernel")]).max()
        assert scale > 1e-3, path
        assert np.abs(gradients[path] - part).max() <= 1e-4 * scale, path


# What single families do


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_roberta_counts_positions_by_padding_ids(pad: int, tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, "masked-lm", "roberta", pad_token_id=pad, max_position_embeddings=14 + pad)
    ours = from_pretrained(tmp_path, "masked-lm")
    assert ours.config.max_length == 13
    ids = np.random.default_rng(0).integers(4, 67, (4, 13))  # the first row is as long as the table
    ids[1, [2, 3, 9]] = pad  # padding inside a row does not count, whatever the mask says
    ids[2, 6:] = pad
    ids[3] = pad
    for arrays in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": (ids != pad).astype(np.int64)}):
        assert_agree(ours, theirs, arrays)
    with pytest.raises(JaxptmError, match="the input is 14 tokens long, the model takes 13"):
        ours(input_ids=np.full((1, 14), 5))


@pytest.mark.parametrize("task", [None, "causal-lm"])
def test_gpt2_pads_on_the_left(task: str | None, tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, task, "gpt2")
    mask = np.ones((4, 13), np.int64)
    mask[1, :6] = 0
    mask[2, :12] = 0
    mask[3] = 0
    positions = np.where(mask == 0, 1, np.cumsum(mask, axis=1) - 1)  # as generate of transformers counts
    arrays = {"input_ids": oracle.inputs(theirs.config)["input_ids"], "attention_mask": mask, "position_ids": positions}
    assert_agree(from_pretrained(tmp_path, task), theirs, arrays)


@pytest.mark.parametrize("masked", [True, False])
def test_gpt2_classifies_a_row_by_its_last_token(masked: bool, tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, "sequence-classification", "gpt2", pad_token_id=4)
    ids = np.random.default_rng(0).integers(5, 67, (4, 13))
    ids[0, [0, 5]] = 4  # not behind the last token
    ids[1, 6:], ids[2], ids[3, :8] = 4, 4, 4
    arrays = {"input_ids": ids} | ({"attention_mask": (ids != 4).astype(np.int64)} if masked else {})
    assert_agree(from_pretrained(tmp_path, "auto"), theirs, arrays)


def test_gpt2_without_padding_classifies_by_the_mask(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, "sequence-classification", "gpt2", pad_token_id=None)
    ours, ids = from_pretrained(tmp_path, "auto"), np.random.default_rng(0).integers(0, 67, (1, 13))
    assert_agree(ours, theirs, {"input_ids": ids})
    # transformers takes no second row here; each of several equals the row alone.
    mask = np.ones((4, 13), np.int64)
    mask[1, 6:], mask[2, 1:] = 0, 0
    together = oracle.run(ours, {"input_ids": ids.repeat(4, axis=0), "attention_mask": mask})["logits"]
    for row, length in enumerate(mask.sum(axis=1)):
        alone = oracle.outputs(theirs, {"input_ids": ids[:, :length]})["logits"]
        np.testing.assert_allclose(together[row], alone[0], atol=TOLERANCE)


def test_models_without_token_types_take_zeros_and_nothing_else(tmp_path: Path) -> None:
    oracle.saved(tmp_path, family="distilbert")
    ours = from_pretrained(tmp_path)
    ids = np.full((1, 4), 5)
    np.testing.assert_array_equal(
        ours(input_ids=ids, token_type_ids=0 * ids).last_hidden_state, ours(input_ids=ids).last_hidden_state
    )
    with pytest.raises(JaxptmError, match="`token_type_ids` goes from 1 to 1; the model tells no types apart"):
        ours(input_ids=ids, token_type_ids=ids // ids)


# Other names, other heads


OLD_NAMES = {
    "roberta": ("masked-lm", {"roberta.embeddings.position_ids": np.arange(32)[None]}),
    "xlm-roberta": ("masked-lm", {"roberta.embeddings.position_ids": np.arange(32)[None]}),
    "electra": ("replaced-token", {"electra.embeddings.position_ids": np.arange(32)[None]}),
    "albert": ("pretraining", {"albert.embeddings.position_ids": np.arange(32)[None]}),
    "distilbert": ("masked-lm", {}),
    "gpt2": (
        "causal-lm",
        {f"transformer.h.{layer}.attn.bias": np.tril(np.ones((1, 1, 32, 32), bool)) for layer in range(2)}
        | {f"transformer.h.{layer}.attn.masked_bias": np.array(-1e4, np.float32) for layer in range(2)},
    ),
}


@pytest.mark.parametrize("family", NEW)
def test_names_of_old_versions_and_of_bare_models(family: str, tmp_path: Path) -> None:
    """Norms of TensorFlow, buffers, names without the prefix, and no second copy of what is tied."""
    task, buffers = OLD_NAMES[family]
    theirs = oracle.saved(tmp_path, task, family)
    expected = flatten(from_pretrained(tmp_path, task).params)
    tied = FAMILIES[family].table(from_pretrained(tmp_path, task).config, task).tied
    prefix = f"{theirs.base_model_prefix}."
    old = {
        re.sub("LayerNorm.weight$", "LayerNorm.gamma", re.sub("LayerNorm.bias$", "LayerNorm.beta", name)): tensor
        for name, tensor in (oracle.names(theirs) | buffers).items()
        if name not in tied
    }
    old = {name.removeprefix(prefix): tensor for name, tensor in old.items()}
    assert family == "gpt2" or any(name.endswith("LayerNorm.gamma") for name in old)
    assert not any(name.startswith(prefix) for name in old)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in old.items()}, tmp_path / "model.safetensors")
    oracle.assert_equal(flatten(from_pretrained(tmp_path, task).params), expected)
    del old[next(name for name in old if "bias" in name and "attn.bias" not in name)]
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in old.items()}, tmp_path / "model.safetensors")
    with pytest.raises(JaxptmError, match=r"missing +\S*bias"):
        from_pretrained(tmp_path, task)


@pytest.mark.parametrize(
    ("family", "task", "other", "absent"),
    [
        ("roberta", "masked-lm", "sequence-classification", ["classifier", "pooler"]),
        ("roberta", "sequence-classification", "masked-lm", ["mlm_head"]),
        ("xlm-roberta", "masked-lm", "question-answering", ["qa_head"]),
        ("electra", "masked-lm", "replaced-token", ["replaced_token_head"]),
        ("electra", "replaced-token", "multiple-choice", ["classifier", "pooler"]),
        ("gpt2", "causal-lm", "sequence-classification", ["classifier"]),
        ("albert", "pretraining", "sequence-classification", ["classifier"]),
        ("albert", "masked-lm", "pretraining", ["nsp_head", "pooler"]),
        ("distilbert", "masked-lm", "sequence-classification", ["classifier", "pooler"]),
        ("distilbert", "masked-lm", None, []),
        ("gpt2", None, "causal-lm", []),
    ],
)
def test_another_head_begins_at_random_and_it_is_said_so(
    family: str,
    task: str | None,
    other: str | None,
    absent: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    oracle.saved(tmp_path / "theirs", task, family)
    model, kept = (
        from_pretrained(tmp_path / "theirs", other),
        flatten(from_pretrained(tmp_path / "theirs", task).params),
    )
    said = f"{tmp_path / 'theirs'} has no {', '.join(absent)}: initialised at random, to be trained."
    assert caplog.messages == ([said] if absent else [])
    ours = flatten(model.params)
    old = {path for path in ours if path.split("/")[0] not in absent}
    oracle.assert_equal({path: ours[path] for path in old}, {path: kept[path] for path in old})
    new = [leaf for path, leaf in ours.items() if path not in old and path.endswith("kernel")]
    assert len(new) >= len(absent)
    assert all(0.01 < leaf.std() < 0.03 for leaf in new)
    model.save_pretrained(tmp_path / "ours")
    oracle.reopened(tmp_path / "ours", other, family)


def test_heads_that_a_family_does_not_have(tmp_path: Path) -> None:
    oracle.saved(tmp_path, "masked-lm", "electra")
    with pytest.raises(JaxptmError, match="electra has no head for the task 'causal-lm'; it has None, masked-lm"):
        from_pretrained(tmp_path, "causal-lm")


# Sizes


RELEASED = {
    # Parameters of the released models without a head, with the pooler where they have one.
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "xlm-roberta-base": 278_043_648,
    "xlm-roberta-large": 559_890_432,
    "electra-small++": 13_483_008,
    "electra-base": 108_891_648,
    "electra-large": 334_092_288,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "albert-base": 11_683_584,
    "albert-large": 17_683_968,
    "albert-xlarge": 58_724_864,
    "albert-xxlarge": 222_595_584,
    "distilbert-base": 66_362_880,
}
UNRELEASED = {
    # Layers, width, heads, width of the embeddings, positions.
    "roberta-tiny": (2, 128, 2, 128, 514),
    "roberta-mini": (4, 256, 4, 256, 514),
    "roberta-small": (4, 512, 8, 512, 514),
    "electra-tiny": (4, 128, 2, 64, 512),
    "electra-small": (12, 256, 4, 128, 512),
    "gpt2-tiny": (2, 128, 2, 128, 512),
    "gpt2-mini": (4, 256, 4, 256, 512),
}


@pytest.mark.parametrize("preset", [*RELEASED, *UNRELEASED])
def test_parameter_counts_of_the_presets(preset: str) -> None:
    family, config = PRESETS[preset]
    shapes = flatten(abstract_params(family.module(config, None)))
    counted = sum(math.prod(leaf.shape) for leaf in shapes.values())
    kind = getattr(transformers, oracle.CLASSES[family.model_type][None])
    with torch.device("meta"):
        theirs = kind(kind.config_class(**family.to_hf(config)))
    assert counted == sum(parameter.numel() for parameter in theirs.parameters())
    if preset in RELEASED:
        assert counted == RELEASED[preset]
    else:
        sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        assert (*sizes, config.embedding_width, config.max_position_embeddings) == UNRELEASED[preset]
        assert config.intermediate_size == 4 * config.hidden_size


def test_every_preset_is_counted() -> None:
    text = {name: family.model_type for name, (family, _) in PRESETS.items() if family.module is TextModel}
    assert {*RELEASED, *UNRELEASED} == {name for name, family in text.items() if family != "bert"}
    heads = {"roberta-large": 16, "electra-large": 16, "gpt2-xl": 25, "gpt2-large": 20, "albert-xxlarge": 64}
    assert {name: PRESETS[name][1].num_attention_heads for name in heads} == heads


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("electra-small", (12, 64, 1, 256, 128)),
        ("electra-small++", (12, 256, 4, 1024, 128)),
        ("electra-base", (12, 256, 4, 1024, 768)),
        ("electra-large", (24, 256, 4, 1024, 1024)),
    ],
)
def test_the_sizes_of_generators(preset: str, sizes: tuple[int, ...]) -> None:
    """google-research/electra, run_pretraining.py `get_generator_config`, and the released generators."""
    config = PRESETS[preset][1]
    made = config.generator()
    assert isinstance(made, ElectraConfig)
    found = (made.num_hidden_layers, made.hidden_size, made.num_attention_heads, made.intermediate_size)
    assert (*found, made.embedding_size) == sizes
    assert made.generator() == made
    same = ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_act", "hidden_dropout_prob")
    assert all(getattr(made, name) == getattr(config, name) for name in same)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generator_size": 0.7}, "model.generator_size: 0.7 of the width 256 is 179, which 2 heads do not divide"),
        ({"generator_layers": 0.01}, "num_hidden_layers: input should be greater than 0, not 0"),
        ({"generator_size": 0.001}, "hidden_size: input should be greater than 0, not 0"),
    ],
)
def test_generators_that_cannot_be(fields: dict[str, float], message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        ElectraConfig(**fields).generator()


def test_half_the_layers_make_a_generator() -> None:
    made = ElectraConfig(generator_layers=0.5, generator_size=1.0).generator()
    assert (made.num_hidden_layers, made.hidden_size, made.embedding_size) == (6, 256, 128)


# config.json


@pytest.mark.parametrize("family", NEW)
def test_defaults_of_config_json_are_those_of_transformers(family: str) -> None:
    kind = FAMILIES[family]
    defaults = getattr(transformers, oracle.CLASSES[family][None]).config_class().to_dict()
    silent = kind.config(**kind.from_hf({}))
    if family == "gpt2":  # ours follows the other dropout where nothing is said
        assert silent.embedding_dropout_prob is None
        silent = silent.model_copy(update={"embedding_dropout_prob": silent.hidden_dropout_prob})
    assert kind.config(**kind.from_hf(defaults)) == silent


@pytest.mark.parametrize("family", NEW)
def test_config_json_both_ways(family: str) -> None:
    kind = FAMILIES[family]
    fields: dict[str, Any] = {
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.5,
        "classifier_dropout": 0.75,
        "initializer_range": 0.125,
        "hidden_act": "relu",
        "pad_token_id": 7,
        "num_labels": 3,
        "tie_word_embeddings": False,
    }
    fields |= {} if family == "distilbert" else {"layer_norm_eps": 1e-3}
    fields |= {"embedding_dropout_prob": 0.375} if family == "gpt2" else {}
    theirs = getattr(transformers, oracle.CLASSES[family][None]).config_class(**oracle.theirs(family, fields))
    ours = kind.config(**kind.from_hf(theirs.to_dict()))
    assert {name: getattr(ours, name) for name in fields} == fields
    assert {name: getattr(ours, name) for name in oracle.SIZES} == oracle.SIZES
    assert kind.config(**kind.from_hf(kind.to_hf(ours))) == ours
    again = type(theirs)(**kind.to_hf(ours)).to_dict()
    names = {"architectures", "bos_token_id", "eos_token_id"}  # not of the sizes
    assert {k: again[k] for k in theirs.to_dict() if k not in names} == {
        k: v for k, v in theirs.to_dict().items() if k not in names
    }
    assert kind.fixed
    for key in kind.fixed:
        with pytest.raises(ValueError, match=f"`{key}: other` is not supported, only"):
            kind.from_hf({**theirs.to_dict(), key: "other"})
        kind.from_hf({name: value for name, value in theirs.to_dict().items() if name != key})


@pytest.mark.parametrize("family", oracle.CLASSES)
def test_dropout_of_the_heads(family: str) -> None:
    """No output shows it: the rates of the modules above the encoder."""
    rates = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.5}
    own = {"electra": {"summary_last_dropout": 0.375}, "distilbert": {"qa_dropout": 0.375}}.get(family, {})
    for classifier in (0.75, None) if family not in ("albert", "distilbert") else (0.75,):
        for task in oracle.CLASSES[family]:
            if task in (None, "masked-lm", "causal-lm", "replaced-token"):  # without a classifier
                continue
            theirs = oracle.model(task, family, **rates, **own, classifier_dropout=classifier)
            ours = FAMILIES[family].config(**FAMILIES[family].from_hf(theirs.config.to_dict()))
            above = {
                module.p
                for name, module in theirs.named_modules()
                if isinstance(module, torch.nn.Dropout) and not name.startswith(f"{theirs.base_model_prefix}.")
            }
            assert (above or {0.0}) == {ours.head_dropout(task)}, (task, classifier)


def test_gpt2_without_an_inner_width_has_four_times_its_width() -> None:
    from_hf = FAMILIES["gpt2"].from_hf
    for theirs in ({}, {"n_inner": None}):
        assert Gpt2Config(**from_hf({"n_embd": 48, "n_head": 4, **theirs})).intermediate_size == 192
    assert Gpt2Config(**from_hf({"n_embd": 48, "n_head": 4, "n_inner": 50})).intermediate_size == 50


def test_distilbert_has_one_epsilon() -> None:
    with pytest.raises(ValueError, match="layer_norm_eps"):
        FAMILIES["distilbert"].config(layer_norm_eps=1e-5)


def test_the_size_of_the_generator_is_kept_in_config_json(tmp_path: Path) -> None:
    oracle.saved(tmp_path / "theirs", "replaced-token", "electra")
    path = tmp_path / "theirs" / "config.json"
    assert from_pretrained(tmp_path / "theirs", "auto").config.generator_size == 0.25
    path.write_text(json.dumps(json.loads(path.read_text()) | {"generator_size": 0.5, "generator_layers": 0.75}))
    from_pretrained(tmp_path / "theirs", "auto").save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["generator_size"], written["generator_layers"]) == (0.5, 0.75)
    again = from_pretrained(tmp_path / "ours", "auto").config
    assert (again.generator_size, again.generator_layers) == (0.5, 0.75)


# How it is computed


SMALL: dict[str, TextConfig] = {
    "albert": AlbertConfig(**{**oracle.SIZES, "num_hidden_layers": 3}, embedding_size=20),
    "gpt2": Gpt2Config(**oracle.SIZES),
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("albert", {"scan": True}),
        ("albert", {"remat": True}),
        ("albert", {"scan": True, "remat": "dots"}),
        ("gpt2", {"scan": True, "remat": "dots"}),
    ],
)
def test_scan_and_remat_change_nothing(family: str, options: dict[str, Any]) -> None:
    config = SMALL[family]
    params = oracle.random_params(abstract_params(TextModel(config)))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 67, (4, 13)))

    def loss(params: Any, execution: Execution) -> Any:
        params = stacked(params) if execution.scan else params
        out = TextModel(config, None, execution).apply({"params": params}, ids, output_hidden_states=True)
        return jnp.sum(jnp.sin(out["last_hidden_state"])), out["hidden_states"]

    (_, states), slope = jax.value_and_grad(loss, has_aux=True)(params, Execution())
    (_, found), same_slope = jax.value_and_grad(loss, has_aux=True)(params, Execution(**options))
    assert len(found) == config.num_hidden_layers + 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max())), same_slope, slope)
    operations = oracle.equations(lambda params: loss(params, Execution(**options))[0], params)
    assert ("scan" in [operation.primitive.name for operation in operations]) == ("scan" in options)
    assert oracle.computes_products_again(operations) == ("remat" in options)


def test_albert_has_one_layer_whatever_is_asked() -> None:
    params = oracle.random_params(abstract_params(TextModel(SMALL["albert"])))
    assert set(params["encoder"]) == {"shared_layer"}
    for same in (stacked(params), unstacked(params), unstacked(stacked(params))):
        assert jax.tree.structure(same) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, same, params)


INITIAL = {"num_attention_heads": 2, "hidden_size": 64, "vocab_size": 800}


@pytest.mark.parametrize(
    ("config", "task", "residual", "cut"),
    [
        (Gpt2Config(**INITIAL, num_hidden_layers=8), "causal-lm", 4, False),
        (RobertaConfig(**INITIAL, num_hidden_layers=2), "masked-lm", 1, False),
        (ElectraConfig(**INITIAL, num_hidden_layers=2), "replaced-token", 1, True),
    ],
    ids=["gpt2", "roberta", "electra"],
)
def test_initial_parameters(config: TextConfig, task: str, residual: float, cut: bool) -> None:
    """GPT-2: a normal, that of the projections onto the residual stream over sqrt(2 layers). ELECTRA: as BERT."""
    params = flatten(initialise(TextModel(config, task), jax.random.key(0, impl="rbg")))
    projections = 0
    for path, leaf in params.items():
        leaf = np.asarray(leaf)
        match path.rpartition("/")[2]:
            case "bias":
                assert not leaf.any(), path
            case "scale":
                assert (leaf == 1).all(), path
            case _:
                adds = path.endswith(("attention/output/kernel", "mlp/down/kernel"))
                projections += adds
                # A normal that is cut at two deviations has 0.87963 of its deviation left.
                expected = 0.02 / (residual if adds else 1) * (0.87962566 if cut else 1)
                assert abs(leaf.std() / expected - 1) < 5 / (2 * leaf.size) ** 0.5, path
                assert abs(leaf.mean()) < 5 * expected / leaf.size**0.5, path
                if leaf.size > 2000:  # of so many, some lie outside, unless they are cut off
                    assert (np.abs(leaf).max() > 2.1 * expected / (0.87962566 if cut else 1)) == (not cut), path
    assert projections == 2 * config.num_hidden_layers


@pytest.mark.parametrize(("family", "task"), [(f, t) for f in NEW for t in oracle.CLASSES[f]])
def test_operations_are_counted(family: str, task: str | None) -> None:
    kind = FAMILIES[family]
    config = kind.config(**oracle.SIZES, **narrow(family), **({"pooler": False} if kind.config().pooler else {}))
    module, rows, length, predictions = TextModel(config, task), 3, 8, 2
    ids = jnp.zeros((rows, 1, length) if task == "multiple-choice" else (rows, length), jnp.int32)
    positions = jnp.zeros((rows, predictions), jnp.int32)

    def forward(params: Any) -> Any:
        return module.apply({"params": params}, ids, mlm_positions=positions)

    counted = oracle.product_flops(oracle.equations(forward, abstract_params(module)))
    # The columns of a classifier are too few to count.
    columns = {
        "sequence-classification": 2 * rows,
        "multiple-choice": rows,
        "pretraining": 2 * rows,
        "token-classification": 2 * rows * length,
        "question-answering": 2 * rows * length,
    }
    counted -= 2 * config.hidden_size * columns.get(str(task), 0)
    assert forward_flops(config, task, rows, length, predictions) == counted


def test_a_bfloat16_gpt2_stays_near_and_computes_norms_and_softmax_in_float32(tmp_path: Path) -> None:
    theirs = oracle.saved(tmp_path, "causal-lm", "gpt2")
    model, arrays = from_pretrained(tmp_path, "causal-lm", dtype="bfloat16"), oracle.inputs(theirs.config)
    out, expected = oracle.run(model, arrays), oracle.outputs(theirs, arrays)
    assert {state.dtype for state in out["hidden_states"]} == {jnp.dtype(jnp.bfloat16)}
    assert out["logits"].dtype == jnp.float32
    error = np.asarray(out["logits"]) - expected["logits"]
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.03 * np.std(expected["logits"])

    seen: dict[str, set[str]] = {}
    ids = jnp.zeros((2, 8), jnp.int32)
    for operation in oracle.equations(lambda params: model.module.apply({"params": params}, ids, ids), model.params):
        seen.setdefault(operation.primitive.name, set()).update(str(operand.aval.dtype) for operand in operation.invars)
    assert seen["exp"] == {"float32"}  # softmax
    assert seen["rsqrt"] == {"float32"}  # layer norm
    assert seen["dot_general"] == {"bfloat16"}
