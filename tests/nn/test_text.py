"""Text models: packing, padding, positions of the language-model head, and the count of their operations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxptm.models.bert import BertConfig
from jaxptm.models.gpt2 import Gpt2Config
from jaxptm.models.params import abstract_params, stacked
from jaxptm.nn import core
from jaxptm.nn.core import Execution, encoder_products
from jaxptm.nn.text import TextEmbeddings, TextModel, _chosen, empty_caches, forward_flops, queries_of_last_layer
from jaxptm.nn.text_config import TASKS, TextConfig
from jaxptm.ops.attention import attention
from jaxptm.types import Params

CONFIG = BertConfig(**oracle.SIZES, hidden_dropout_prob=0.25)
VOCABULARY = CONFIG.vocab_size
ROWS, LENGTH = 4, 13  # of all tests, so that their ops are compiled once


@pytest.fixture(scope="module")
def params() -> Params:
    return oracle.random_params(abstract_params(TextModel(CONFIG, "pretraining")))


def run(params: Params, input_ids: Any, task: str | None = "pretraining", **options: Any) -> Any:
    return TextModel(CONFIG, task).apply({"params": params}, jnp.asarray(input_ids), **options)


def ids(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, shape or (ROWS, LENGTH)))


def test_a_packed_row_equals_its_documents_alone(params: Params) -> None:
    first, second = ids(), ids(seed=1)
    row = jnp.concatenate([first, second], axis=1)
    segments = jnp.asarray([[1] * LENGTH + [2] * (LENGTH - 3) + [0] * 3] * ROWS)
    mask = (segments > 0).astype(jnp.int32)
    packed = run(params, row, segment_ids=segments, attention_mask=mask, output_hidden_states=True)
    alone = run(params, first, output_hidden_states=True)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, 2 * LENGTH), (ROWS, LENGTH))
    shifted = run(params, second, position_ids=positions, attention_mask=mask[:, LENGTH:], output_hidden_states=True)
    for together, one, two in zip(*(out["hidden_states"] for out in (packed, alone, shifted)), strict=True):
        np.testing.assert_allclose(together[:, :LENGTH], one, atol=2e-5)
        np.testing.assert_allclose(together[:, LENGTH:-3], two[:, :-3], atol=2e-5)
    np.testing.assert_allclose(packed["prediction_logits"][:, :LENGTH], alone["prediction_logits"], atol=5e-5)
    # Without segments the documents do see each other.
    mixed = run(params, row, attention_mask=mask)
    assert np.abs(mixed["prediction_logits"][:, :LENGTH] - alone["prediction_logits"]).max() > 0.1


def test_what_stands_in_padding_changes_no_token(params: Params) -> None:
    row = ids()
    mask = jnp.asarray([[1] * 13, [1] * 6 + [0] * 7, [0, 0] + [1] * 11, [1] * 12 + [0]])
    other = jnp.where(mask == 1, row, ids(seed=7))
    types = jnp.where(mask == 1, 0, 1)
    # With scores in the hundreds, a key that is merely made unlikely would be seen.
    params = jax.tree.map_with_path(lambda path, leaf: leaf * 100 if "query" in str(path) else leaf, params)
    before = run(params, row, attention_mask=mask)
    after = run(params, other, attention_mask=mask, token_type_ids=types)
    real = np.asarray(mask, bool)
    np.testing.assert_array_equal(before["prediction_logits"][real], after["prediction_logits"][real])
    assert (before["prediction_logits"][~real] != after["prediction_logits"][~real]).any(axis=-1).all()


def test_padding_a_row_changes_no_token(params: Params) -> None:
    row = ids()
    padded = jnp.concatenate([row, jnp.zeros_like(row)], axis=1)
    mask = jnp.asarray([[1] * LENGTH + [0] * LENGTH] * ROWS)
    alone, out = run(params, row), run(params, padded, attention_mask=mask)
    np.testing.assert_allclose(out["prediction_logits"][:, :LENGTH], alone["prediction_logits"], atol=5e-5)
    np.testing.assert_allclose(out["seq_relationship_logits"], alone["seq_relationship_logits"], atol=5e-5)


def test_a_row_of_nothing_but_padding_stays_finite(params: Params) -> None:
    out = run(params, ids(), attention_mask=jnp.zeros((ROWS, LENGTH), jnp.int32))
    assert all(np.isfinite(value).all() for value in out.values())


@pytest.mark.parametrize("task", ["masked-lm", "pretraining"])
def test_the_language_model_head_runs_at_chosen_positions(task: str, params: Params) -> None:
    row, positions = ids(), jnp.asarray([[0, 5, 12], [3, 3, 1], [12, 0, 2], [4, 5, 6]])
    name = "logits" if task == "masked-lm" else "prediction_logits"
    whole = run(params, row, task)
    chosen = run(params, row, task, mlm_positions=positions)
    assert chosen[name].shape == (ROWS, 3, VOCABULARY)
    np.testing.assert_allclose(chosen[name], np.take_along_axis(whole[name], positions[..., None], axis=1), atol=2e-5)
    if task == "pretraining":
        np.testing.assert_allclose(chosen["seq_relationship_logits"], whole["seq_relationship_logits"], atol=2e-5)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (CONFIG, "masked-lm"),
        (CONFIG, "pretraining"),
        (CONFIG, "next-sentence"),
        (CONFIG, "sequence-classification"),
        (CONFIG, "multiple-choice"),
        (Gpt2Config(**oracle.SIZES), "causal-lm"),
        (Gpt2Config(**oracle.SIZES), "sequence-classification"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_last_layer_computes_what_the_head_looks_at(config: TextConfig, task: str) -> None:
    """The same logits and gradients as where all of its output is wanted, in padded rows of packed documents."""
    module, shape = TextModel(config, task), (2, 2, LENGTH) if task == "multiple-choice" else (ROWS, LENGTH)
    inputs = {
        "attention_mask": jnp.asarray([[1] * 13, [1] * 6 + [0] * 7, [1] * 11 + [0] * 2, [1] * 12 + [0]]),
        "segment_ids": jnp.asarray([[1] * 13, [1] * 6 + [0] * 7, [1] * 4 + [2] * 7 + [0] * 2, [1] + [2] * 11 + [0]]),
    }
    inputs = {name: value.reshape(shape) for name, value in inputs.items()}
    if task in ("masked-lm", "pretraining", "causal-lm"):
        inputs["mlm_positions"] = jnp.asarray([[0, 5, 12], [3, 3, 1], [12, 0, 2], [4, 5, 6]])

    def loss(params: Params, every: bool) -> Any:
        out = module.apply({"params": params}, ids(*shape), **inputs, output_hidden_states=every)
        logits = {name: value for name, value in out.items() if name != "hidden_states"}
        return sum(jnp.sin(value).sum() for value in logits.values()), logits

    params = oracle.random_params(abstract_params(module))
    (_, logits), slope = jax.value_and_grad(loss, has_aux=True)(params, False)
    (_, expected), whole_slope = jax.value_and_grad(loss, has_aux=True)(params, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), logits, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())), slope, whole_slope)
    rows_of_products = [
        oracle.product_flops(oracle.equations(lambda params, every=every: loss(params, every)[0], params))
        for every in (False, True)
    ]
    queries = queries_of_last_layer(task, LENGTH, 3)
    every = encoder_products(config, LENGTH, LENGTH) - encoder_products(config, LENGTH, queries)
    assert rows_of_products[1] - rows_of_products[0] == 2 * ROWS * every > 0


def test_token_type_and_position_tables_are_used(params: Params) -> None:
    row = ids()
    plain = run(params, row)["prediction_logits"]
    numbers = jnp.broadcast_to(jnp.arange(LENGTH), row.shape)
    for name, value in {"token_type_ids": numbers % 2, "position_ids": numbers[:, ::-1]}.items():
        changed = run(params, row, **{name: value})["prediction_logits"]
        assert np.abs(changed - plain).max() > 0.1
    same = run(params, row, position_ids=numbers, token_type_ids=jnp.zeros_like(row))["prediction_logits"]
    np.testing.assert_array_equal(same, plain)


def test_token_types_are_looked_up_with_their_gradient_and_others_are_not_a_number(params: Params) -> None:
    table = params["embeddings"]["token_type"]["embedding"]
    types = ids() % len(table)
    slope = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, LENGTH, table.shape[-1])), jnp.float32)
    ours, looked_up = (jax.vjp(lambda t, f=f: f(t, types), table) for f in (_chosen, lambda t, i: t[i]))
    np.testing.assert_array_equal(ours[0], looked_up[0])
    np.testing.assert_allclose(ours[1](slope)[0], looked_up[1](slope)[0], atol=1e-5)
    assert np.isnan(_chosen(table, types + len(table))).all()


def test_logits_are_float32_and_the_products_of_their_gradient_are_not(params: Params) -> None:
    module = TextModel(CONFIG, "masked-lm", Execution(dtype=jnp.bfloat16))
    of_task = {name: part for name, part in params.items() if name in ("embeddings", "encoder", "mlm_head")}

    def loss(params: Params) -> Any:
        logits = module.apply({"params": params}, ids())["logits"]
        assert logits.dtype == jnp.float32
        return jnp.sin(logits).sum()

    of_vocabulary = [
        operation
        for operation in oracle.equations(jax.grad(loss), of_task)
        if operation.primitive.name == "dot_general"
        and VOCABULARY in (*operation.invars[0].aval.shape, *operation.invars[1].aval.shape)
    ]
    assert len(of_vocabulary) == 3
    assert all(operand.aval.dtype == jnp.bfloat16 for operation in of_vocabulary for operand in operation.invars)


def test_choices_are_scored_one_by_one() -> None:
    module = TextModel(CONFIG, "multiple-choice")
    params = oracle.random_params(abstract_params(module))
    row = ids(2, 2, LENGTH)
    together = module.apply({"params": params}, row)["logits"]
    assert together.shape == (2, 2)
    single = module.apply({"params": params}, row.reshape(4, 1, LENGTH))["logits"]
    np.testing.assert_allclose(together.reshape(4, 1), single, atol=2e-5)


def test_embedding_dropout_preserves_the_mean(params: Params) -> None:
    module = TextEmbeddings(CONFIG, Execution())
    variables = {"params": params["embeddings"]}
    row, positions = ids(1, 6), jnp.arange(6)[None]
    expected = np.asarray(module.apply(variables, row, row * 0, positions, train=False))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4000)
    drop = jax.jit(
        jax.vmap(lambda key: module.apply(variables, row, row * 0, positions, train=True, rngs={"dropout": key}))
    )
    ratios = np.asarray(drop(keys)) / expected[None]
    assert abs((ratios == 0).mean() - 0.25) < 0.003
    np.testing.assert_allclose(ratios[ratios != 0], 4 / 3, rtol=1e-4)
    np.testing.assert_allclose(ratios.mean(axis=0), 1, atol=5 * (1 / 3 / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("task", "rate", "classifier_dropout", "expected"),
    [
        ("sequence-classification", 0.5, None, True),
        ("sequence-classification", 0.5, 0.0, False),
        ("token-classification", 0.0, 0.5, True),
        ("multiple-choice", 0.5, None, True),
        ("question-answering", 0.5, 0.5, False),
        ("next-sentence", 0.5, 0.5, False),
    ],
)
def test_which_heads_have_dropout(task: str, rate: float, classifier_dropout: float | None, expected: bool) -> None:
    """As in transformers: only the heads that are called classifiers, at their own rate or the encoder's."""
    config = CONFIG.model_copy(update={"hidden_dropout_prob": rate, "classifier_dropout": classifier_dropout})
    module = TextModel(config, task)
    params = oracle.random_params(abstract_params(module))
    # With dead norms nothing that is dropped in the encoder reaches the head.
    params["encoder"]["layer_1"]["mlp_norm"]["scale"] *= 0
    shape = (2, 2, LENGTH) if task == "multiple-choice" else (ROWS, LENGTH)
    one, other = (
        next(
            iter(
                module.apply(
                    {"params": params}, ids(*shape), train=True, rngs={"dropout": jax.random.key(seed, impl="rbg")}
                ).values()
            )
        )
        for seed in (0, 1)
    )
    assert bool((one != other).any()) == expected


@pytest.mark.parametrize("task", ["masked-lm", "pretraining", "token-classification"])
def test_operations_are_counted(task: str) -> None:
    rows, length, predictions = 3, 10, 4
    module = TextModel(CONFIG, task)
    batch = jnp.zeros((rows, length), jnp.int32)
    positions = jnp.zeros((rows, predictions), jnp.int32)

    def forward(params: Params) -> Any:
        return module.apply({"params": params}, batch, mlm_positions=positions)

    counted = oracle.product_flops(oracle.equations(forward, abstract_params(module)))
    # The two columns of a classifier are too few to count.
    classifier = {"masked-lm": 0, "pretraining": rows, "token-classification": rows * length}[task]
    counted -= 2 * classifier * CONFIG.hidden_size * 2
    assert forward_flops(CONFIG, task, rows, length, predictions) == counted


def test_tasks_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=f"task 'translation' is not one of {', '.join(TASKS)}"):
        abstract_params(TextModel(CONFIG, "translation"))


# Causal models

CAUSAL = Gpt2Config(**oracle.SIZES)


@pytest.fixture(scope="module")
def causal() -> Params:
    return oracle.random_params(abstract_params(TextModel(CAUSAL, "causal-lm")))


def decode(params: Params, input_ids: Any, dtype: Any = jnp.float32, **options: Any) -> Any:
    return TextModel(CAUSAL, "causal-lm", Execution(dtype)).apply({"params": params}, input_ids, **options)


def in_pieces(params: Params, pieces: list[int], room: int, dtype: Any, mask: Any, positions: Any) -> Any:
    """Logits [B, L, V], hidden states and the caches after a row that is fed piece by piece."""
    caches = empty_caches(CAUSAL, Execution(dtype), ROWS, room)
    parts, at = [], 0
    for size in pieces:
        options = {"position_ids": positions[:, at : at + size], "attention_mask": mask, "output_hidden_states": True}
        out = decode(params, ids()[:, at : at + size], dtype, caches=caches, **options)
        caches = out.pop("caches")
        parts.append(out)
        at += size
        assert {int(cache.start) for cache in caches} == {at}
    assert at == LENGTH
    return jax.tree.map(lambda *piece: np.concatenate([np.asarray(x, np.float32) for x in piece], 1), *parts), caches


def test_attention_is_told_what_is_causal(monkeypatch: pytest.MonkeyPatch, causal: Params, params: Params) -> None:
    told = set()

    def noted(*arguments: Any, **options: Any) -> Any:
        told.add(options["causal"])
        return attention(*arguments, **options)

    monkeypatch.setattr(core, "attention", noted)
    decode(causal, ids())
    assert told == {True}
    told.clear()
    # In a cache a query's place is not that of its key.
    caches = empty_caches(CAUSAL, Execution(), ROWS, LENGTH)
    decode(causal, ids(), caches=caches, attention_mask=jnp.ones((ROWS, LENGTH), jnp.int32))
    run(params, ids())
    assert told == {False}


def test_a_later_token_changes_nothing_before_it(causal: Params) -> None:
    row = ids()
    before = decode(causal, row, output_hidden_states=True)
    for at in (1, 7, LENGTH - 1):
        changed = row.at[:, at].set((row[:, at] + 1) % VOCABULARY)
        after = decode(causal, changed, output_hidden_states=True)
        for one, other in zip(*((out["logits"], *out["hidden_states"][1:]) for out in (before, after)), strict=True):
            np.testing.assert_array_equal(one[:, :at], other[:, :at])
            assert (one[:, at:] != other[:, at:]).any(axis=-1).all()


def test_a_packed_row_of_a_causal_model_equals_its_documents_alone(causal: Params) -> None:
    first, second = ids(), ids(seed=1)
    positions = jnp.broadcast_to(jnp.tile(jnp.arange(LENGTH), 2), (ROWS, 2 * LENGTH))
    segments = jnp.asarray([[1] * LENGTH + [2] * LENGTH] * ROWS)
    row = jnp.concatenate([first, second], axis=1)
    packed = decode(causal, row, segment_ids=segments, position_ids=positions)["logits"]
    np.testing.assert_allclose(packed[:, :LENGTH], decode(causal, first)["logits"], atol=2e-5)
    np.testing.assert_allclose(packed[:, LENGTH:], decode(causal, second)["logits"], atol=2e-5)


@pytest.mark.parametrize(
    ("pieces", "room"), [([LENGTH], LENGTH), ([4, 1, 4, 4], LENGTH + 7), ([9, 1, 1, 1, 1], LENGTH + 7)], ids=str
)
def test_a_row_in_pieces_equals_the_row_at_once(pieces: list[int], room: int, causal: Params) -> None:
    mask = np.ones((ROWS, LENGTH), np.int32)
    mask[1, :6], mask[2, :10] = 0, 0  # prompts are padded on the left
    positions = jnp.asarray(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    options = {"position_ids": positions, "output_hidden_states": True}
    whole = decode(causal, ids(), attention_mask=jnp.asarray(mask), **options)
    wide = jnp.asarray(np.pad(mask, ((0, 0), (0, room - LENGTH)), constant_values=1))
    found, caches = in_pieces(causal, pieces, room, jnp.float32, wide, positions)
    scale = np.std(whole["logits"])
    np.testing.assert_allclose(found["logits"][mask == 1] / scale, whole["logits"][mask == 1] / scale, atol=1e-5)
    for one, other in zip(found["hidden_states"], whole["hidden_states"], strict=True):
        np.testing.assert_allclose(one[mask == 1], np.asarray(other)[mask == 1], atol=2e-5)
    for cache in caches:
        assert cache.key.shape == cache.value.shape == (ROWS, room, 4, 8)
        assert not cache.key[:, LENGTH:].any() and not cache.value[:, LENGTH:].any()
        assert cache.key[:, :LENGTH].any(axis=-1).all()


def test_a_row_in_pieces_stays_near_in_bfloat16(causal: Params) -> None:
    mask, positions = jnp.ones((ROWS, LENGTH), jnp.int32), jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    exact = np.asarray(decode(causal, ids())["logits"])
    at_once = np.asarray(decode(causal, ids(), jnp.bfloat16)["logits"])
    found, caches = in_pieces(causal, [9, 1, 1, 1, 1], LENGTH, jnp.bfloat16, mask, positions)
    assert {cache.key.dtype for cache in caches} == {jnp.dtype(jnp.bfloat16)}
    error = np.sqrt(np.mean((at_once - exact) ** 2))
    assert 1e-4 < error < 0.05 * exact.std()
    assert np.sqrt(np.mean((found["logits"] - exact) ** 2)) < 2 * error


def test_scanned_layers_take_no_caches(causal: Params) -> None:
    scanned = Execution(scan=True)
    module = TextModel(CAUSAL, "causal-lm", scanned)
    caches = empty_caches(CAUSAL, scanned, ROWS, LENGTH)
    with pytest.raises(ValueError, match="a scanned module takes no caches; use one with scan=False"):
        module.apply({"params": stacked(causal)}, ids(), caches=caches)
