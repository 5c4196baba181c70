"""Attention by the kernels against XLA's, and both against a computation in float64."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxptm.ops.attention import attention, fits_tiles, runs_tiles
from jaxptm.ops.dropout import kept

MASKS = ["none", "padding", "rows", "causal"]


def inputs(rows: int, queries: int, keys: int, heads: int, width: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Queries, keys, values, and the gradient of what they mix."""
    rng = np.random.default_rng(queries + keys)
    return [jnp.asarray(rng.normal(size=(rows, n, heads, width)), dtype) for n in (queries, keys, keys, queries)]


def masked(kind: str, rows: int, queries: int, keys: int) -> jax.Array | None:
    rng = np.random.default_rng(7)
    match kind:
        case "padding":
            return jnp.asarray(np.arange(keys) < rng.integers(1, keys, (rows, 1)))[:, None, None]
        case "rows":  # one query sees nothing
            return jnp.asarray(rng.random((rows, 1, queries, keys)) < 0.6).at[0, 0, 3].set(False)
        case "causal":
            return jnp.asarray(np.tril(np.ones((queries, keys), bool)))[None, None]
    return None


def with_gradients(
    tiled: bool, arrays: list[jax.Array], mask: jax.Array | None, rate: float, causal: bool = False
) -> list[jax.Array]:
    """What is mixed, and the gradients of queries, keys and values."""
    *operands, slope = arrays
    rng = jax.random.key(3) if rate else None
    function = partial(attention, mask=mask, rng=rng, rate=rate, causal=causal, tiled=tiled)
    out, backward = jax.vjp(function, *operands)
    return [out, *backward(slope)]


def in_float64(arrays: list[jax.Array], mask: jax.Array | None, rate: float) -> list[np.ndarray]:
    """The same from the equations of `ops.tiles`, without a tile."""
    query, key, value, slope = (np.asarray(x, np.float64) for x in arrays)
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("bqhw,bkhw->bhqk", query, key) * scale
    seen = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask), scores.shape)
    scores = np.where(seen, scores, np.finfo(np.float32).min)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    drops = np.asarray(kept(jax.random.key(3), rate, weights.shape)) / (1 - rate) if rate else np.ones(weights.shape)
    out = np.einsum("bhqk,bkhw->bqhw", drops * weights, value)
    to_weights = drops * np.einsum("bqhw,bkhw->bhqk", slope, value)
    to_scores = seen * weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) * scale
    return [
        out,
        np.einsum("bhqk,bkhw->bqhw", to_scores, key),
        np.einsum("bhqk,bqhw->bkhw", to_scores, query),
        np.einsum("bhqk,bqhw->bkhw", drops * weights, slope),
    ]


@pytest.mark.parametrize("tiled", [False, True], ids=["xla", "tiles"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("kind", MASKS)
def test_agrees_with_float64(kind: str, rate: float, tiled: bool) -> None:
    arrays, mask = inputs(2, 70, 100, 3, 16), masked(kind, 2, 70, 100)
    found = jax.jit(partial(with_gradients, tiled, rate=rate, causal=kind == "causal"))(arrays, mask)
    for ours, expected in zip(found, in_float64(arrays, mask, rate), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys", "width"), [(64, 64, 32), (128, 192, 64), (1, 130, 16), (65, 1, 16)])
def test_every_length_and_width(queries: int, keys: int, width: int) -> None:
    arrays, mask = inputs(1, queries, keys, 2, width), masked("padding", 1, queries, max(keys, 2))
    mask = None if keys == 1 else mask
    ours, xlas = (jax.jit(partial(with_gradients, tiled, rate=0.5))(arrays, mask) for tiled in (True, False))
    for one, other in zip(ours, xlas, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_half_precision_is_no_worse_than_xlas() -> None:
    arrays = inputs(2, 130, 130, 2, 64, jnp.bfloat16)
    mask = masked("rows", 2, 130, 130)
    ours, xlas = (jax.jit(partial(with_gradients, tiled, rate=0.1))(arrays, mask) for tiled in (True, False))
    for one, other, exact in zip(ours, xlas, in_float64(arrays, mask, 0.1), strict=True):
        assert one.dtype == jnp.bfloat16
        errors = [np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact) for x in (one, other)]
        assert errors[0] < 1.1 * errors[1] < 0.02


@pytest.mark.parametrize("shape", [(4, 2), (8, 1), (1, 8)], ids=str)
def test_devices_compute_their_rows_and_heads_and_gather_nothing(shape: tuple[int, int]) -> None:
    arrays, mask = inputs(8, 64, 64, 8, 16), masked("rows", 8, 64, 64)
    assert mask is not None
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    by_head = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    step = jax.jit(
        partial(with_gradients, True, rate=0.1),
        in_shardings=([by_head] * 4, NamedSharding(mesh, PartitionSpec("data"))),
    )
    compiled = step.lower(arrays, mask).compile()
    gathered = re.findall(r"\S+ = f32\[([\d,]+)\]\S* (?:all-gather|all-to-all|all-reduce)\(", compiled.as_text())
    assert not gathered
    found = compiled(jax.device_put(arrays, by_head), jax.device_put(mask, NamedSharding(mesh, PartitionSpec("data"))))
    for ours, expected in zip(found, in_float64(arrays, mask, 0.1), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)
        assert ours.sharding.is_equivalent_to(by_head, 4)


def test_rows_alone_may_be_divided_with_a_mask_for_all() -> None:
    arrays, mask = inputs(8, 64, 64, 2, 16), masked("causal", 8, 64, 64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, copies = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    step = jax.jit(partial(with_gradients, True, rate=0.1), in_shardings=([rows] * 4, copies))
    for ours, expected in zip(step(arrays, mask), in_float64(arrays, mask, 0.1), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_causal_kernels_leave_out_what_no_query_of_a_tile_sees() -> None:
    *operands, _ = inputs(1, 192, 192, 2, 16)
    query, key, value = operands
    mask = masked("causal", 1, 192, 192)
    hidden = [query, *(x.at[:, 128:].set(jnp.nan) for x in (key, value))]
    found = attention(*hidden, mask, causal=True, tiled=True)
    assert np.isfinite(found[:, :128]).all() and np.isnan(found[:, 128:]).all()
    np.testing.assert_allclose(found[:, :128], attention(*operands, mask)[:, :128], atol=2e-5)
    slope = jnp.ones_like(query).at[:, :64].set(jnp.nan)  # of queries that see no later key
    _, backward = jax.vjp(partial(attention, mask=mask, causal=True, tiled=True), *operands)
    to_query, to_key, _ = backward(slope)
    assert np.isfinite(to_query[:, 64:]).all() and np.isfinite(to_key[:, 64:]).all() and np.isnan(to_key[:, :64]).all()
    with pytest.raises(ValueError, match="causal"):
        attention(*operands, causal=True)


def test_without_dropout_there_is_none() -> None:
    query, key, value, _ = inputs(1, 8, 8, 1, 16)
    plain = attention(query, key, value)
    np.testing.assert_array_equal(attention(query, key, value, rng=jax.random.key(0)), plain)
    np.testing.assert_array_equal(attention(query, key, value, rate=0.5), plain)
    assert not attention(query, key, value, rng=jax.random.key(0), rate=1.0).any()


@pytest.mark.parametrize(
    ("dtype", "queries", "width", "fits"),
    [
        (jnp.bfloat16, 128, 64, True),
        (jnp.float16, 2, 16, True),
        (jnp.float32, 128, 64, False),
        (jnp.bfloat16, 1, 64, False),
        (jnp.bfloat16, 128, 48, False),
        (jnp.bfloat16, 128, 256, False),
    ],
)
def test_what_the_kernels_are_for(dtype: Any, queries: int, width: int, fits: bool) -> None:
    assert fits_tiles(jnp.zeros((1, queries, 2, width), dtype)) == fits


@pytest.mark.parametrize(
    ("backend", "capability", "runs"),
    [
        ("gpu", "8.0", True),
        ("gpu", "12.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx90a", False),
        ("cpu", None, False),
        ("tpu", None, False),
    ],
)
def test_where_the_kernels_run(
    monkeypatch: pytest.MonkeyPatch, backend: str, capability: str | None, runs: bool
) -> None:
    device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert runs_tiles.__wrapped__() == runs


@pytest.mark.parametrize("kind", ["padding", "causal"])
def test_triton_takes_the_kernels(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Nothing is compiled here: Pallas translates them for a GPU that is not there.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shapes = [jax.ShapeDtypeStruct((2, 96, 4, 64), jnp.bfloat16)] * 4
    mask = jax.ShapeDtypeStruct((2, 1, 96 if kind == "causal" else 1, 96), jnp.bool_)
    unchecked = [
        jax.export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "triton_kernel_call")
    ]
    step = jax.jit(partial(with_gradients, True, rate=0.1, causal=kind == "causal"))
    try:
        exported = jax.export.export(step, platforms=["cuda"], disabled_checks=unchecked)(shapes, mask)
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("jax 0.11 asks which GPU it is for")
    assert len(re.findall("custom_call @.*triton", exported.mlir_module())) == 3
