"""Fine-tuning against transformers and torch: losses, gradients, and thirty steps of the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from reference import key_data

from jaxptm.config import OptimizerConfig
from jaxptm.hf.table import load
from jaxptm.models.params import flatten
from jaxptm.objectives import Objective
from jaxptm.objectives.finetune import (
    multiple_choice,
    question_answering,
    sequence_classification,
    token_classification,
)
from jaxptm.optim import optimizer
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.step import gradients, make_evaluate, make_update
from jaxptm.types import TrainState

ROWS, LENGTH = 6, 13
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "one label": ("sequence-classification", {"num_labels": 3, "problem_type": "single_label_classification"}),
    "several labels": ("sequence-classification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "a number": ("sequence-classification", {"num_labels": 1, "problem_type": "regression"}),
    "two numbers": ("sequence-classification", {"num_labels": 2, "problem_type": "regression"}),
    "tokens": ("token-classification", {"num_labels": 4}),
    "choices": ("multiple-choice", {}),
    "spans": ("question-answering", {}),
}


def pair_of(tmp_path: Path, head: str) -> tuple[Any, Model, Objective]:
    task, config = HEADS[head]
    theirs = oracle.saved(tmp_path, task, **STILL, **config)
    ours = from_pretrained(tmp_path, task)
    match task:
        case "sequence-classification":
            return theirs, ours, sequence_classification(ours.module, config["problem_type"])
        case "token-classification":
            return theirs, ours, token_classification(ours.module)
        case "multiple-choice":
            return theirs, ours, multiple_choice(ours.module)
    return theirs, ours, question_answering(ours.module)


def batch_of(head: str, seed: int) -> dict[str, np.ndarray]:
    """Rows of different length with labels of the head."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, 2, LENGTH) if head == "choices" else (ROWS, LENGTH)
    lengths = rng.integers(4, LENGTH + 1, shape[:-1])
    mask = (np.arange(LENGTH) < lengths[..., None]).astype(np.int32)
    batch = {
        "input_ids": (rng.integers(1, oracle.SIZES["vocab_size"], shape) * mask).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": (rng.integers(0, 2, shape) * mask).astype(np.int32),
    }
    match head:
        case "one label":
            batch["labels"] = rng.integers(0, 3, ROWS).astype(np.int32)
        case "several labels":
            batch["labels"] = rng.integers(0, 2, (ROWS, 3)).astype(np.int32)
        case "a number":
            batch["labels"] = rng.normal(size=ROWS).astype(np.float32)
        case "two numbers":
            batch["labels"] = rng.normal(size=(ROWS, 2)).astype(np.float32)
        case "tokens":
            labels = np.where(rng.random(shape) < 0.6, rng.integers(0, 4, shape), -100)
            batch["labels"] = np.where(mask == 1, labels, -100).astype(np.int32)
        case "choices":
            batch["labels"] = rng.integers(0, 2, ROWS).astype(np.int32)
        case "spans":
            batch["start_positions"] = rng.integers(0, 3, ROWS).astype(np.int32)
            batch["end_positions"] = (batch["start_positions"] + rng.integers(0, 2, ROWS)).astype(np.int32)
    return batch


def torch_loss(theirs: Any, batch: dict[str, np.ndarray]) -> torch.Tensor:
    inputs = {name: torch.tensor(values) for name, values in batch.items()}
    for name in ("labels", "start_positions", "end_positions"):
        if name in inputs and inputs[name].dtype == torch.int32:
            inputs[name] = inputs[name].long()
    if getattr(theirs.config, "problem_type", None) == "multi_label_classification":
        inputs["labels"] = inputs["labels"].float()
    loss: torch.Tensor = theirs(**inputs).loss
    return loss


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_torch(head: str, tmp_path: Path) -> None:
    theirs, ours, objective = pair_of(tmp_path, head)
    batch = batch_of(head, 0)
    keys = jax.random.split(jax.random.key(0), ROWS)
    grads, means = jax.jit(lambda params: gradients(objective, params, batch, keys, 1))(ours.params)
    loss = torch_loss(theirs, batch)
    loss.backward()
    assert float(means["loss"].total) == pytest.approx(loss.item(), abs=2e-5)
    tensors = {
        name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
    }
    shapes = {path: leaf.shape for path, leaf in flatten(ours.params).items()}
    expected = load(ours.family.table(ours.config, ours.task), tensors, shapes, source="gradients").params
    found = flatten(grads)
    scale = max(np.linalg.norm(value) for value in expected.values())
    for path, value in expected.items():
        assert np.linalg.norm(found[path] - value) <= 1e-4 * max(np.linalg.norm(value), 1e-2 * scale), path


@pytest.mark.parametrize("head", ["one label", "a number", "spans", "tokens"])
def test_thirty_steps_follow_torch(head: str, tmp_path: Path) -> None:
    theirs, ours, objective = pair_of(tmp_path, head)
    config = OptimizerConfig(name="adamw", learning_rate=5e-4, schedule="linear", warmup=3, weight_decay=0.01)
    transform = optimizer(config, 30, ours.params)
    update = jax.jit(make_update(objective, transform, 1))
    state = TrainState(jnp.zeros((), jnp.int32), ours.params, transform.init(ours.params))
    decays = [parameter for name, parameter in theirs.named_parameters() if parameter.ndim > 1]
    rest = [parameter for name, parameter in theirs.named_parameters() if parameter.ndim == 1]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.999), eps=1e-6)
    warm_then_linear = torch.optim.lr_scheduler.LambdaLR(adamw, lambda at: at / 3 if at < 3 else (30 - at) / 27)
    curve, their_curve = [], []
    for step in range(30):
        batch = batch_of(head, step % 5)
        state, means = update(state, batch, key_data(0))
        curve.append(float(means["loss"].total))
        adamw.zero_grad()
        loss = torch_loss(theirs, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        warm_then_linear.step()
        their_curve.append(loss.item())
    np.testing.assert_allclose(curve, their_curve, atol=1e-3)
    assert np.mean(curve[-5:]) < np.mean(curve[:5])


@pytest.mark.parametrize("head", HEADS)
def test_padding_rows_count_for_nothing_and_predictions_keep_their_order(head: str, tmp_path: Path) -> None:
    _, ours, objective = pair_of(tmp_path, head)
    batch = batch_of(head, 1)
    padded = {name: np.concatenate([values[:4], np.zeros_like(values[4:])]) for name, values in batch.items()}
    if head == "tokens":
        padded["labels"][4:] = -100
    alone = {name: values[:4] for name, values in batch.items()}
    evaluate = make_evaluate(objective)
    terms, scores, said = evaluate(ours.params, padded, jnp.int32(0), key_data(0))
    wanted, wanted_scores, said_alone = evaluate(ours.params, alone, jnp.int32(0), key_data(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (terms, scores), (wanted, wanted_scores))
    halves = make_evaluate(objective, 2)(ours.params, alone, jnp.int32(0), key_data(0))[2]
    for name, values in said_alone.items():
        np.testing.assert_allclose(said[name][:4], values, atol=1e-5)
        np.testing.assert_allclose(halves[name], values, atol=1e-5)


@pytest.mark.parametrize("head", ["one label", "several labels", "tokens"])
def test_class_weights_are_those_of_torch(head: str, tmp_path: Path) -> None:
    task, config = HEADS[head]
    weights = [0.5, 2.0, 1.5, 0.25][: config["num_labels"]]
    theirs, ours, _ = pair_of(tmp_path, head)
    if task == "token-classification":
        objective = token_classification(ours.module, weights)
    else:
        objective = sequence_classification(ours.module, config["problem_type"], weights)
    batch = batch_of(head, 2)
    terms, _ = objective.loss(ours.params, batch, jax.random.split(jax.random.key(0), ROWS), train=False)
    inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask", "token_type_ids")}
    logits, labels = theirs(**inputs).logits, torch.tensor(batch["labels"])
    if head == "several labels":
        loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, labels.float())
    else:
        loss = torch.nn.CrossEntropyLoss(torch.tensor(weights))(logits.flatten(0, -2), labels.flatten().long())
    assert float(objective.total(terms)) == pytest.approx(loss.item(), abs=2e-5)


def test_a_model_runs_once_for_the_loss_and_the_predictions(tmp_path: Path) -> None:
    _, ours, objective = pair_of(tmp_path, "one label")
    batch = batch_of("one label", 0)
    step = jax.jit(make_evaluate(objective)).lower(ours.params, batch, jnp.int32(0), key_data(0)).compile()
    alone = jax.jit(lambda params, batch: objective.predict(params, batch)).lower(ours.params, batch).compile()
    assert step.cost_analysis()["flops"] < 1.3 * alone.cost_analysis()["flops"]
