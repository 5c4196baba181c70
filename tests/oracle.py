"""The oracle: small models of transformers with noise on every parameter.

Fresh weights are blind: norms start at one and biases at zero, so that swapped rows of a weight table pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

CLASSES = {
    None: "BertModel",
    "masked-lm": "BertForMaskedLM",
    "pretraining": "BertForPreTraining",
    "next-sentence": "BertForNextSentencePrediction",
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "multiple-choice": "BertForMultipleChoice",
    "question-answering": "BertForQuestionAnswering",
}
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


def bert(task: str | None = None, *, seed: int = 0, noise: float = 0.15, **config: Any) -> Any:
    """A torch BERT in evaluation mode; `config` are fields of its config.json."""
    torch.manual_seed(seed)
    pooler = {} if config.pop("pooler", True) else {"add_pooling_layer": False}
    config = {**SIZES, "attn_implementation": "eager", **config}
    model = getattr(transformers, CLASSES[task])(transformers.BertConfig(**config), **pooler).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def saved(directory: Path, task: str | None = None, **config: Any) -> Any:
    """The same, saved in `directory`."""
    model = bert(task, **config)
    model.save_pretrained(directory)
    return model


def inputs(
    config: Any, task: str | None = None, *, rows: int = 4, length: int = 13, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random ids: one row whole, one padded, one all padding; position ids that are not 0, 1, ..."""
    rng = np.random.default_rng(seed)
    shape = (rows // 2, 2, length) if task == "multiple-choice" else (rows, length)
    mask = np.ones((rows, length), np.int64)
    mask[1, length // 2 :] = 0
    mask[2] = 0
    return {
        "input_ids": rng.integers(0, config.vocab_size, shape),
        "attention_mask": mask.reshape(shape),
        "token_type_ids": rng.integers(0, config.type_vocab_size, shape),
        "position_ids": rng.integers(0, config.max_position_embeddings, shape),
    }


def outputs(model: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The model's outputs as numpy arrays, hidden states among them."""
    with torch.no_grad():
        out = model(**{name: torch.tensor(array) for name, array in arrays.items()}, output_hidden_states=True)
    return {
        name: tuple(part.numpy() for part in value) if isinstance(value, tuple) else value.numpy()
        for name, value in out.items()
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

    def within(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from within(inner)

    return list(within(jax.make_jaxpr(function)(*arguments).jaxpr))


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
