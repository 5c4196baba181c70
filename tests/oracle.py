"""The oracle: small models of transformers with noise on every parameter.

Fresh weights are blind: norms start at one and biases at zero, so that swapped rows of a weight table pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

TUNED = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
ENCODER = {None: "Model", "masked-lm": "ForMaskedLM", "multiple-choice": "ForMultipleChoice", **TUNED}
NAMES: dict[str, tuple[str, dict[str | None, str]]] = {
    "bert": ("Bert", {**ENCODER, "pretraining": "ForPreTraining", "next-sentence": "ForNextSentencePrediction"}),
    "roberta": ("Roberta", ENCODER),
    "xlm-roberta": ("XLMRoberta", ENCODER),
    "electra": ("Electra", {**ENCODER, "replaced-token": "ForPreTraining"}),
    "gpt2": ("GPT2", {None: "Model", "causal-lm": "LMHeadModel", **TUNED}),
    "albert": ("Albert", {**ENCODER, "pretraining": "ForPreTraining"}),
    "distilbert": ("DistilBert", ENCODER),
}
CLASSES = {
    family: {task: f"{prefix}{suffix}" for task, suffix in heads.items()} for family, (prefix, heads) in NAMES.items()
}
"""What transformers calls the model of each family and task."""
KEYS = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "hidden_dropout_prob": "resid_pdrop",
        "embedding_dropout_prob": "embd_pdrop",
        "attention_probs_dropout_prob": "attn_pdrop",
        "layer_norm_eps": "layer_norm_epsilon",
    },
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    "albert": {"classifier_dropout": "classifier_dropout_prob"},
}
"""BERT's key of config.json -> the family's, where they differ."""
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
USUAL: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 20},
    "albert": {"embedding_size": 20},
    "gpt2": {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}
"""What a small model of the family has beside these sizes."""


def model(task: str | None = None, family: str = "bert", *, seed: int = 0, noise: float = 0.15, **config: Any) -> Any:
    """A torch model in evaluation mode; `config` are fields of its config.json, called as BERT calls them."""
    kind = getattr(transformers, CLASSES[family][task])
    pooler = {} if config.pop("pooler", True) else {"add_pooling_layer": False}
    torch.manual_seed(seed)
    model = kind(kind.config_class(**theirs(family, config), attn_implementation="eager"), **pooler).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def theirs(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json of a small model: `config` over `SIZES`, as the family calls them."""
    fields = {**SIZES, **USUAL.get(family, {}), **config}
    return {KEYS.get(family, {}).get(name, name): value for name, value in fields.items()}


def saved(directory: Path, task: str | None = None, family: str = "bert", **config: Any) -> Any:
    """The same, saved in `directory`."""
    made = model(task, family, **config)
    made.save_pretrained(directory)
    return made


def inputs(
    config: Any, task: str | None = None, *, rows: int = 4, length: int = 13, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random ids: one row whole, one padded, one all padding; position ids that are not 0, 1, ..."""
    rng = np.random.default_rng(seed)
    shape = (rows // 2, 2, length) if task == "multiple-choice" else (rows, length)
    mask = np.ones((rows, length), np.int64)
    mask[1, length // 2 :] = 0
    mask[2] = 0
    arrays = {"input_ids": rng.integers(0, config.vocab_size, shape), "attention_mask": mask.reshape(shape)}
    if getattr(config, "type_vocab_size", 0):
        arrays["token_type_ids"] = rng.integers(0, config.type_vocab_size, shape)
    return arrays | {"position_ids": rng.integers(0, config.max_position_embeddings, shape)}


def outputs(model: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The model's outputs as numpy arrays, hidden states among them."""
    with torch.no_grad():
        out = model(**{name: torch.tensor(array) for name, array in arrays.items()}, output_hidden_states=True)
    return {
        name: tuple(part.numpy() for part in value) if isinstance(value, tuple) else value.numpy()
        for name, value in out.items()
        if name not in ("cache", "past_key_values")
    }


def run(model: Any, arrays: Mapping[str, np.ndarray], **options: Any) -> dict[str, Any]:
    """The outputs of a `jaxptm.pretrained.Model`, hidden states among them, computed op by op.

    An op of one shape is compiled once for all tests, a whole model anew for each of them.
    """
    ids = {name: jnp.asarray(array) for name, array in arrays.items()}
    return model.module.apply({"params": model.params}, **ids, output_hidden_states=True, **options)


def random_params(shapes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Parameters of these shapes, scales about one and all else about zero, without compiling an initialisation."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def equations(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The primitive operations of a function of arrays, those of the functions it calls included."""

    return list(_within(jax.make_jaxpr(function)(*arguments).jaxpr))


def _within(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _within(inner)


def computes_products_again(operations: list[Any]) -> bool:
    """Whether one of `equations` is a part of the model with products that the backward pass may compute again."""
    return any(
        inner.primitive.name == "dot_general"
        for operation in operations
        if operation.primitive.name.startswith(("remat", "checkpoint"))
        for inner in _within(getattr(operation.params["jaxpr"], "jaxpr", operation.params["jaxpr"]))
    )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The largest absolute difference of each output."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        pairs = zip(ours[name], value, strict=True) if isinstance(value, tuple) else [(ours[name], value)]
        for index, (a, b) in enumerate(pairs):
            assert a.shape == b.shape, name
            yield f"{name}[{index}]", float(np.abs(np.asarray(a, np.float64) - b).max())


def names(model: Any) -> dict[str, np.ndarray]:
    """Its state dict as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def reopened(directory: Path, task: str | None, family: str = "bert") -> Any:
    """The torch model of a directory that jaxptm wrote; it fits without a word."""
    model, report = getattr(transformers, CLASSES[family][task]).from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """The same names, types and values to the bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def product_flops(operations: list[Any]) -> int:
    """Floating point operations of the matrix products among these (see `equations`), two a multiply-add."""
    counted = 0
    for operation in operations:
        if operation.primitive.name == "dot_general":
            (contracted, _), _ = operation.params["dimension_numbers"]
            inner = math.prod(operation.invars[0].aval.shape[axis] for axis in contracted)
            counted += 2 * inner * math.prod(operation.outvars[0].aval.shape)
    return counted
