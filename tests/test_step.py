"""The training step against torch, and against itself in other layouts."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from reference import SMALL, key_data, pair_batch, perturbed

from jaxptm.config import MaskedLmConfig, OptimizerConfig
from jaxptm.hf.table import load
from jaxptm.models.params import flatten, unflatten
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextEmbeddings, TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.language import masked_language_model
from jaxptm.ops.masking import VocabularyTables, mask_tokens
from jaxptm.optim import optimizer
from jaxptm.parallel import split_rows
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.step import gradients, make_evaluate, make_update
from jaxptm.types import TrainState

LENGTH, MASK = 24, 4
SPECIAL = np.arange(SMALL["vocab_size"]) < 5
CONTINUES = np.arange(SMALL["vocab_size"]) % 3 == 0


def objective_of(model: Model | TextModel, **config: object) -> Objective:
    module = getattr(model, "module", model)
    name = "pretraining" if module.task == "pretraining" else "masked-lm"
    settings = MaskedLmConfig(name=name, **config)
    return masked_language_model(settings, module, VocabularyTables(SPECIAL, CONTINUES), MASK, LENGTH)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Model]:
    theirs = perturbed("BertForPreTraining", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    directory = tmp_path_factory.mktemp("small")
    theirs.save_pretrained(directory)
    return theirs, from_pretrained(directory, "pretraining")


def torch_loss(theirs: torch.nn.Module, batch: dict, keys: jax.Array) -> torch.Tensor:
    """BERT's loss on the masks that the step draws from `keys`: both means as the official script has them."""
    real = batch["attention_mask"].astype(bool)
    mask_keys = jax.vmap(jax.random.split, out_axes=1)(keys)[0]
    masked = mask_tokens(
        mask_keys,
        jnp.asarray(batch["input_ids"]),
        jnp.asarray(real & ~SPECIAL[batch["input_ids"]]),
        word_start=jnp.asarray(~CONTINUES[batch["input_ids"]]),
        lengths=jnp.asarray(real.sum(1)),
        strategy="tokens",
        probability=0.15,
        max_predictions=4,
        mask_id=MASK,
        vocab_size=SMALL["vocab_size"],
    )
    labels = np.full(real.shape, -100)
    for row in range(len(labels)):
        chosen = np.asarray(masked.weights[row]) > 0
        labels[row, np.asarray(masked.positions[row])[chosen]] = np.asarray(masked.labels[row])[chosen]
    out = theirs(
        torch.tensor(np.asarray(masked.input_ids)).long(),
        attention_mask=torch.tensor(batch["attention_mask"]),
        token_type_ids=torch.tensor(batch["token_type_ids"]),
        labels=torch.tensor(labels),
        next_sentence_label=torch.tensor(batch["next_sentence_label"]).long(),
    )
    return out.loss


def row_keys(key: jax.Array, step: int, rows: int) -> jax.Array:
    return jax.random.split(jax.random.fold_in(key, step), rows)


def test_gradients_of_pretraining_are_those_of_torch(small: tuple[torch.nn.Module, Model]) -> None:
    theirs, ours = small
    batch = pair_batch(np.random.default_rng(0), 6, LENGTH)
    keys = row_keys(jax.random.key(3), 0, 6)
    grads, means = jax.jit(lambda params: gradients(objective_of(ours), params, batch, keys, 1))(ours.params)
    theirs.zero_grad()
    loss = torch_loss(theirs, batch, keys)
    loss.backward()
    assert float(means["loss"].total) == pytest.approx(loss.item(), abs=1e-5)

    table = ours.family.table(ours.config, "pretraining")
    tensors = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    shapes = {path: leaf.shape for path, leaf in flatten(ours.params).items()}
    expected = load(table, tensors, shapes, source="gradients").params
    found = flatten(grads)
    assert found.keys() == expected.keys()
    scale = max(np.linalg.norm(value) for value in expected.values())
    for path, value in expected.items():
        if np.linalg.norm(value) > 1e-5 * scale:  # a key's bias has no gradient but rounding
            assert np.linalg.norm(found[path] - value) <= 1e-4 * np.linalg.norm(value), path
        else:
            assert path.endswith("key/bias") and np.linalg.norm(found[path]) < 1e-4 * scale


def test_twenty_steps_follow_torch_adamw(small: tuple[torch.nn.Module, Model], tmp_path: Path) -> None:
    _, ours = small
    theirs = perturbed("BertForPreTraining", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="constant", weight_decay=0.1, clip=1.0)
    decayed = [p for name, p in theirs.named_parameters() if p.ndim > 1]
    rest = [p for name, p in theirs.named_parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-6)

    key = jax.random.key(7)
    transform = optimizer(config, 20, ours.params)
    update = jax.jit(make_update(objective_of(ours), transform, 1))
    state = TrainState(jnp.zeros((), jnp.int32), ours.params, transform.init(ours.params))
    rng = np.random.default_rng(1)
    batches = [pair_batch(rng, 6, LENGTH) for _ in range(4)]
    ours_curve, their_curve = [], []
    for step in range(20):
        batch = batches[step % 4]
        state, means = update(state, batch, jax.random.key_data(key))
        ours_curve.append(float(means["loss"].total))
        adamw.zero_grad()
        loss = torch_loss(theirs, batch, row_keys(key, step, 6))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        their_curve.append(loss.item())
    np.testing.assert_allclose(ours_curve, their_curve, atol=1e-4)
    assert ours_curve[-1] < ours_curve[0]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_changes_nothing(small: tuple[torch.nn.Module, Model], accumulate: int) -> None:
    _, ours = small
    batch = pair_batch(np.random.default_rng(2), 8, LENGTH)
    batch["attention_mask"][3] = batch["input_ids"][3] = 0  # microbatches with unequal numbers of predictions
    keys = row_keys(jax.random.key(0), 5, 8)
    run = jax.jit(lambda parts: gradients(objective_of(ours), ours.params, batch, keys, parts), static_argnums=0)
    (whole, means), (parts, parts_means) = run(1), run(accumulate)
    for name, mean in means.items():
        np.testing.assert_allclose(np.array(parts_means[name]), np.array(mean), rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, parts)


def test_the_weights_pass_of_accumulation_costs_no_model(small: tuple[torch.nn.Module, Model]) -> None:
    _, ours = small
    batch = pair_batch(np.random.default_rng(2), 8, LENGTH)
    keys = row_keys(jax.random.key(0), 5, 8)

    def weights(params: dict) -> dict:
        terms, _ = objective_of(ours).loss(params, batch, keys, train=True)
        return {name: term.weight for name, term in terms.items()}

    hlo = jax.jit(weights).lower(ours.params).compile().as_text()
    assert " dot(" not in hlo and "onednn" not in hlo.lower() and "gemm" not in hlo.lower()


def test_devices_change_nothing(small: tuple[torch.nn.Module, Model]) -> None:
    _, ours = small
    batch = pair_batch(np.random.default_rng(4), 8, LENGTH)
    keys = row_keys(jax.random.key(0), 5, 8)
    run = jax.jit(lambda batch: gradients(objective_of(ours), ours.params, batch, keys, 1))
    alone, means = run(batch)
    mesh = jax.make_mesh(
        (4, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:4]
    )
    spread, spread_means = run(jax.device_put(batch, split_rows(mesh)))
    assert float(means["loss"].total) == pytest.approx(float(spread_means["loss"].total), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.asarray(b), atol=2e-6), alone, spread)


def test_scan_and_remat_change_nothing(small: tuple[torch.nn.Module, Model]) -> None:
    from jaxptm.models.params import stacked, unstacked

    _, ours = small
    batch = pair_batch(np.random.default_rng(4), 4, LENGTH)
    keys = row_keys(jax.random.key(0), 5, 4)

    def run(scan: bool, remat: bool) -> tuple:
        module = TextModel(ours.config, "pretraining", Execution(scan=scan, remat=remat))
        params = stacked(ours.params) if scan else ours.params
        grads, means = jax.jit(lambda p: gradients(objective_of(module), p, batch, keys, 1))(params)
        return unstacked(grads), means

    plain, means = run(False, False)
    for scan, remat in ((True, False), (False, True), (True, True)):
        grads, other = run(scan, remat)
        assert float(other["loss"].total) == pytest.approx(float(means["loss"].total), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), plain, grads)


def test_steps_depend_on_seed_and_step_alone(small: tuple[torch.nn.Module, Model]) -> None:
    _, ours = small
    module = TextModel(ours.config.model_copy(update={"hidden_dropout_prob": 0.1}), "pretraining")
    batch = pair_batch(np.random.default_rng(4), 4, LENGTH)
    sgd = optax.sgd(0.0)

    def losses(seed: int, start: int) -> list[float]:
        update = jax.jit(make_update(objective_of(module), sgd, 1))
        state = TrainState(jnp.asarray(start, jnp.int32), ours.params, sgd.init(ours.params))
        values = []
        for _ in range(3):
            state, means = update(state, batch, key_data(seed))
            values.append(float(means["loss"].total))
        return values

    first = losses(0, 0)
    assert len(set(first)) == 3  # other masks and dropout each step
    assert losses(0, 1)[:2] == first[1:]
    assert losses(1, 0) != first


def test_evaluation_repeats_its_masks_and_counts_padding_rows_out(small: tuple[torch.nn.Module, Model]) -> None:
    _, ours = small
    evaluate = jax.jit(make_evaluate(objective_of(ours)))
    batch = pair_batch(np.random.default_rng(4), 6, LENGTH)
    padded = {name: np.concatenate([rows[:4], np.zeros_like(rows[4:])]) for name, rows in batch.items()}
    first, second = evaluate(ours.params, batch, 0, key_data(9)), evaluate(ours.params, batch, 0, key_data(9))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    objective = objective_of(ours)
    assert float(objective.total(evaluate(ours.params, batch, 1, key_data(9))[0])) != float(objective.total(first[0]))
    terms, scores, _ = evaluate(ours.params, padded, 0, key_data(9))
    assert float(terms["nsp_loss"].weight) == float(scores["nsp_accuracy"].weight) == 4
    keys = jax.random.split(jax.random.fold_in(jax.random.key(9), 0), 6)[:4]
    alone, _ = objective_of(ours).loss(ours.params, {name: rows[:4] for name, rows in batch.items()}, keys, train=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), terms, alone)


def test_masked_lm_learns_without_next_sentences(small: tuple[torch.nn.Module, Model]) -> None:
    _, ours = small
    module = TextModel(ours.config, "masked-lm")
    objective = objective_of(module, masking="words", mask_probability=0.3)
    params = objective.init(jax.random.key(0))
    assert set(params) == {"embeddings", "encoder", "mlm_head"}
    batch = {"input_ids": np.full((4, LENGTH), 7, np.int32), "attention_mask": np.ones((4, LENGTH), np.int32)}
    transform = optax.adam(1e-2)
    update = jax.jit(make_update(objective, transform, 1))
    state = TrainState(jnp.zeros((), jnp.int32), params, transform.init(params))
    for _ in range(30):
        state, means = update(state, batch, key_data(0))
    assert set(means) == {"mlm_loss", "mlm_accuracy", "token_share", "loss", "grad_norm"}
    assert float(means["mlm_loss"].value) < 0.1
    assert unflatten(flatten(state.params)).keys() == params.keys()


def test_tables_learn_in_float32_whatever_the_computation_is(small: tuple[torch.nn.Module, Model]) -> None:
    # Two token types share thousands of tokens: in bfloat16 such sums lose half of themselves.
    _, ours = small
    rows, length = 512, 32
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 97, (rows, length)).astype(np.int32)
    types = np.repeat([[0] * 16 + [1] * 16], rows, axis=0).astype(np.int32)
    push = jnp.asarray(1.0 + 0.1 * rng.standard_normal((rows, length, 32)), jnp.float32)

    def gradient(dtype: str) -> np.ndarray:
        embeddings = TextEmbeddings(ours.config, Execution(dtype=jnp.dtype(dtype)))

        def value(params: dict, ids: jax.Array, types: jax.Array, push: jax.Array) -> jax.Array:
            x = embeddings.apply({"params": params}, ids, types, jnp.arange(length)[None], train=False)
            return jnp.sum(x.astype(jnp.float32) * push)

        grads = jax.jit(jax.grad(value))(ours.params["embeddings"], ids, types, push)
        return np.asarray(grads["token_type"]["embedding"])

    exact, found = gradient("float32"), gradient("bfloat16")
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_microbatches_of_bfloat16_parameters_are_added_in_float32(small: tuple[torch.nn.Module, Model]) -> None:
    _, ours = small
    batch = pair_batch(np.random.default_rng(2), 64, LENGTH)
    keys = row_keys(jax.random.key(0), 5, 64)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.params)
    module = TextModel(ours.config, "pretraining", Execution(param_dtype=jnp.bfloat16))
    run = jax.jit(lambda parts: gradients(objective_of(module), params, batch, keys, parts)[0], static_argnums=0)
    whole, parts = run(1), run(32)
    assert {leaf.dtype for leaf in jax.tree.leaves(parts)} == {jnp.dtype("float32")}
    error = optax.tree.norm(jax.tree.map(jnp.subtract, whole, parts)) / optax.tree.norm(whole)
    assert float(error) < 4e-3  # the rounding of one gradient to bfloat16, not of 32 sums
