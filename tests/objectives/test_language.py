"""Causal language modelling, and the pair judgement of ALBERT, against transformers + torch."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import pair_batch

from jaxptm.config import CausalLmConfig, MaskedLmConfig
from jaxptm.hf import table as weights
from jaxptm.models import FAMILIES
from jaxptm.models.params import abstract_params, flatten, unflatten
from jaxptm.nn.text import TextModel
from jaxptm.objectives.language import causal_language_model, masked_language_model
from jaxptm.ops.masking import VocabularyTables
from jaxptm.step import gradients, row_keys

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def pair_of(model_type: str, task: str, **config: Any) -> tuple[torch.nn.Module, TextModel, Any]:
    """A model of transformers with noise on every parameter, and ours with the same weights."""
    family = FAMILIES[model_type]
    ours = family.config(**{**SIZES, **config})
    kind = getattr(transformers, family.architectures[task])
    torch.manual_seed(0)
    theirs = kind(kind.config_class(**family.to_hf(ours))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    module = TextModel(ours, task)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    loaded = weights.load(family.table(ours, task), tensors, shapes, source="oracle")
    return theirs, module, jax.tree.map(jnp.asarray, unflatten(loaded.params))


def assert_gradients_agree(model_type: str, module: TextModel, grads: Any, theirs: torch.nn.Module) -> None:
    torch_grads = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    rows = FAMILIES[model_type].table(module.config, module.task).rows
    found = flatten(grads)
    assert {path for row in rows for path in row.paths} == set(found)
    scale = max(float(np.linalg.norm(grad)) for grad in torch_grads.values())
    for row in rows:
        for path, expected in zip(row.paths, row.operation.load(torch_grads[row.theirs]), strict=True):
            size = max(np.linalg.norm(expected), 1e-3 * scale)  # a key's bias has no gradient but rounding
            assert np.linalg.norm(found[path] - expected) <= 1e-4 * size, path


def rows_of_text(separate: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.array([24, 24, 17, 0, 2, 1])
    mask = (np.arange(24) < lengths[:, None]).astype(np.int32)
    batch = {"input_ids": rng.integers(0, 97, (6, 24)).astype(np.int32) * mask, "attention_mask": mask}
    if separate:
        batch["segment_ids"] = (1 + np.cumsum(rng.random((6, 24)) < 0.15, axis=1)).astype(np.int32) * mask
    return batch


@pytest.mark.parametrize("separate", [False, True])
def test_causal_loss_and_gradients_are_those_of_torch(separate: bool) -> None:
    theirs, module, params = pair_of("gpt2", "causal-lm")
    objective, batch = causal_language_model(CausalLmConfig(name="causal-lm"), module), rows_of_text(separate)
    keys = row_keys(jax.random.key(0), batch)
    grads, means = jax.jit(lambda params: gradients(objective, params, batch, keys, 1))(params)

    ids, mask = torch.tensor(batch["input_ids"]).long(), torch.tensor(batch["attention_mask"])
    # By hand: documents kept apart are rows of their own for torch, each with the positions that it had.
    parts = []
    for row in range(len(ids)):
        segments = batch["segment_ids"][row] if separate else batch["attention_mask"][row]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            at = torch.tensor(np.flatnonzero(segments == segment))
            if len(at) > 1:
                logits = theirs(ids[row, at][None], position_ids=at[None]).logits[0, :-1]
                parts.append(torch.nn.functional.cross_entropy(logits, ids[row, at][1:], reduction="none"))
    losses = torch.cat(parts)
    losses.mean().backward()
    assert float(means["clm_loss"].weight) == len(losses)
    assert float(means["clm_loss"].value) == pytest.approx(losses.mean().item(), abs=1e-5)
    assert float(means["token_share"].total) == int(mask.sum())
    assert_gradients_agree("gpt2", module, grads, theirs)
    assert objective.summary({"clm_loss": 2.0}) == {"perplexity": pytest.approx(math.exp(2.0))}


def test_without_borders_the_loss_is_transformers_own() -> None:
    theirs, module, params = pair_of("gpt2", "causal-lm")
    batch = {name: rows[:2] for name, rows in rows_of_text(False).items()}
    objective = causal_language_model(CausalLmConfig(name="causal-lm"), module)
    terms, _ = objective.loss(params, batch, row_keys(jax.random.key(0), batch), train=False)
    ids = torch.tensor(batch["input_ids"]).long()
    assert float(terms["clm_loss"].value) == pytest.approx(theirs(ids, labels=ids).loss.item(), abs=1e-5)


def test_sentence_order_of_albert_is_judged_as_transformers_does() -> None:
    theirs, module, params = pair_of("albert", "pretraining", embedding_size=24, classifier_dropout=0.0)
    # Where every token is special, none is masked, and the loss is that of the pairs.
    tables = VocabularyTables(np.ones(97, bool), np.zeros(97, bool))
    objective = masked_language_model(MaskedLmConfig(name="pretraining"), module, tables, 4, 24)
    batch = pair_batch(np.random.default_rng(0), 6, 24)
    batch["next_sentence_label"][:3] = [0, 1, 1]
    grads, means = jax.jit(lambda params: gradients(objective, params, batch, row_keys(jax.random.key(0), batch), 1))(
        params
    )
    inputs = {name: torch.tensor(batch[name]).long() for name in ("input_ids", "attention_mask", "token_type_ids")}
    out = theirs(**inputs)
    labels = torch.tensor(batch["next_sentence_label"]).long()
    loss = torch.nn.functional.cross_entropy(out.sop_logits, labels)
    loss.backward()
    assert float(means["mlm_loss"].weight) == 0
    assert float(means["loss"].value) == pytest.approx(loss.item(), abs=1e-5)
    right = (out.sop_logits.argmax(-1) == labels).float().mean().item()
    assert float(means["sop_accuracy"].value) == pytest.approx(right, abs=1e-6)
    for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert_gradients_agree("albert", module, grads, theirs)


def test_padding_rows_count_nothing() -> None:
    _, module, params = pair_of("gpt2", "causal-lm")
    objective, batch = causal_language_model(CausalLmConfig(name="causal-lm"), module), rows_of_text(False)
    fuller = {name: np.concatenate([rows, np.zeros_like(rows)]) for name, rows in batch.items()}
    keys = row_keys(jax.random.key(0), fuller)
    one, _ = objective.loss(params, batch, keys[:6], train=False)
    two, _ = objective.loss(params, fuller, keys, train=False)
    assert float(one["clm_loss"].weight) == float(two["clm_loss"].weight)
    assert float(one["clm_loss"].value) == pytest.approx(float(two["clm_loss"].value), rel=1e-6)


def test_with_a_dupe_factor_the_masks_of_a_row_come_back() -> None:
    """Of one mask a row, training asks the same at every step, and evaluation what it always asks."""
    module = TextModel(FAMILIES["bert"].config(**SIZES), "masked-lm")
    special = np.arange(97) < 5
    tables = VocabularyTables(special, np.zeros(97, bool))
    ids = np.random.default_rng(0).integers(5, 97, (6, 24)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    params = masked_language_model(MaskedLmConfig(name="masked-lm"), module, tables, 4, 24).init(jax.random.key(1))

    def losses(train: bool, **options: Any) -> list[float]:
        objective = masked_language_model(MaskedLmConfig(name="masked-lm", **options), module, tables, 4, 24)
        loss = jax.jit(lambda key: objective.loss(params, batch, row_keys(key, batch), train=train)[0]["mlm_loss"])
        return [float(loss(jax.random.key(seed)).value) for seed in range(4)]

    assert len(set(losses(True, dupe_factor=1))) == 1
    assert len(set(losses(True))) == 4
    assert losses(False, dupe_factor=1) == losses(False)
