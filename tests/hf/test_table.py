"""Weight tables run both ways, and say at once what does not fit."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxptm.errors import JaxptmError
from jaxptm.hf.table import KEEP, TRANSPOSE, Loaded, Row, Table, dense, load, norm, save, split

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "transpose", "split"]),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),  # shape of each parameter
        st.integers(1, 4),  # parameters of a split row
        st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
        st.booleans(),  # whether another tensor is tied to this one
        st.booleans(),  # and whether a dead one goes with it
    ),
    min_size=1,
    max_size=6,
)


def build(described: list[Any]) -> tuple[Table, dict[str, np.ndarray]]:
    """A table and parameters that suit it. No number occurs twice, so that no two elements can be mistaken."""
    rows: list[Row] = []
    params: dict[str, np.ndarray] = {}
    for index, (kind, shape, parts, dtype, _, _) in enumerate(described):
        paths = tuple(f"module_{index % 2}/row_{index}/part_{part}" for part in range(parts if kind == "split" else 1))
        numbers = np.arange(len(paths) * math.prod(shape)).astype(dtype)
        params.update(zip(paths, numbers.reshape(len(paths), *shape), strict=True))
        operation = {"keep": KEEP, "transpose": TRANSPOSE, "split": split(len(paths))}[kind]
        rows.append(Row(paths if kind == "split" else paths[0], f"their.{index}", operation))
    tied = {f"tied.{index}": f"their.{index}" for index, (*_, tied, _) in enumerate(described) if tied}
    dead = {f"dead.{index}": f"their.{index}" for index, (*_, dead) in enumerate(described) if dead}
    return Table(rows, tied, dead), params


@given(ROWS)
def test_what_is_saved_is_loaded(described: list[Any]) -> None:
    table, params = build(described)
    tensors = save(table, params)
    assert set(tensors) == table.names
    loaded = load(table, tensors, {path: leaf.shape for path, leaf in params.items()}, source="here")
    assert loaded.params.keys() == params.keys()
    for path, leaf in params.items():
        assert loaded.params[path].dtype == leaf.dtype
        np.testing.assert_array_equal(loaded.params[path], leaf)
    assert loaded.absent == []
    assert loaded.dead.keys() == table.dead.keys()


@given(ROWS)
def test_what_is_loaded_is_saved(described: list[Any]) -> None:
    table, params = build(described)
    tensors = save(table, params)
    for name in table.dead:
        tensors[name] = tensors[name] + np.ones((), tensors[name].dtype)
    loaded = load(table, tensors, {path: leaf.shape for path, leaf in params.items()}, source="here")
    again = save(table, loaded.params) | loaded.dead
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_operations_by_hand() -> None:
    matrix = np.arange(12.0).reshape(2, 6)
    assert KEEP.load(matrix)[0] is matrix
    np.testing.assert_array_equal(TRANSPOSE.load(matrix)[0], matrix.T)
    query, key, value = split(3).load(matrix)
    np.testing.assert_array_equal(query, [[0, 1], [6, 7]])
    np.testing.assert_array_equal(key, [[2, 3], [8, 9]])
    np.testing.assert_array_equal(value, [[4, 5], [10, 11]])


def test_rows_of_a_linear_layer_and_of_a_norm() -> None:
    rows = [*dense("a/b", "x.y"), *norm("a/n", "x.LayerNorm")]
    assert [(row.paths, row.theirs, row.operation) for row in rows] == [
        (("a/b/kernel",), "x.y.weight", TRANSPOSE),
        (("a/b/bias",), "x.y.bias", KEEP),
        (("a/n/scale",), "x.LayerNorm.weight", KEEP),
        (("a/n/bias",), "x.LayerNorm.bias", KEEP),
    ]


TABLE = Table(
    [
        *dense("body/linear", "linear"),
        Row(("body/query", "body/key"), "fused", split(2)),
        Row("head/bias", "head.bias"),
        Row("head/scale", "head.scale"),
    ],
    tied={"copy": "linear.bias"},
    dead={"unread": "head.bias"},
    ignored=(r"buffer\.\d+$",),
)
PARAMS = {
    "body/linear/kernel": np.arange(6.0).reshape(2, 3),
    "body/linear/bias": np.arange(3.0),
    "body/query": np.zeros((4, 2)),
    "body/key": np.ones((4, 2)),
    "head/bias": np.arange(5.0),
    "head/scale": np.arange(5.0),
}


def read(tensors: dict[str, np.ndarray], **options: Any) -> Loaded:
    return load(TABLE, tensors, {path: leaf.shape for path, leaf in PARAMS.items()}, source="model.bin", **options)


def test_every_problem_is_listed() -> None:
    tensors = save(TABLE, PARAMS)
    tensors |= {"linear.weight": np.zeros((2, 3)), "fused": np.zeros((4, 5)), "copy": np.ones(3)}
    tensors |= {
        "surplus": np.zeros(7),
        "buffer.12": np.zeros(1),
        "buffer.12.x": np.zeros(()),
        "other.head": np.zeros(2),
    }
    del tensors["head.scale"], tensors["linear.bias"]
    tensors["linear.bias"] = np.arange(3.0)
    with pytest.raises(JaxptmError) as error:
        read(tensors, heads=["head"], known={"other.head"})
    assert str(error.value).splitlines() == [
        "model.bin: 6 weight(s) do not fit the model:",
        "  mis-shaped linear.weight: [2, 3] in the file, [3, 2] in the model",
        "  mis-shaped fused: [4, 5] in the file, [4, 4] in the model",
        "  missing    head.scale  (for head/scale)",
        "  untied     copy differs from linear.bias, though config.json says they are tied",
        "  unexpected buffer.12.x []",
        "  unexpected surplus [7]",
    ]


def test_a_missing_fused_tensor_names_all_its_parameters() -> None:
    tensors = save(TABLE, PARAMS)
    del tensors["fused"]
    with pytest.raises(JaxptmError, match=r"missing    fused  \(for body/query, body/key\)"):
        read(tensors)


def test_only_a_whole_head_may_be_absent() -> None:
    tensors = {name: tensor for name, tensor in save(TABLE, PARAMS).items() if not name.startswith(("head", "unread"))}
    loaded = read(tensors, heads=["head"])
    assert loaded.absent == ["head"]
    assert set(loaded.params) == {path for path in PARAMS if path.startswith("body/")}
    with pytest.raises(JaxptmError, match="2 weight"):
        read(tensors)
    # What is no head must be there, even if all of it is absent.
    with pytest.raises(JaxptmError, match="missing    fused"):
        read({"head.bias": PARAMS["head/bias"], "head.scale": PARAMS["head/scale"]}, heads=["head"])


def test_a_dead_tensor_is_kept_aside_or_made_up() -> None:
    tensors = save(TABLE, PARAMS)
    np.testing.assert_array_equal(tensors["unread"], PARAMS["head/bias"])
    tensors["unread"] = -tensors["unread"]
    np.testing.assert_array_equal(read(tensors).dead["unread"], -PARAMS["head/bias"])
    del tensors["unread"]
    assert read(tensors).dead == {}


def test_parameters_without_a_row_are_refused() -> None:
    with pytest.raises(JaxptmError, match="no place for the parameters body/extra, head/extra"):
        save(TABLE, PARAMS | {"head/extra": np.zeros(1), "body/extra": np.zeros(1)})


def test_of_shared_tensors_either_name_will_do() -> None:
    table = Table(
        [Row("head/bias", "decoder.bias"), Row("head/scale", "scale")], {"copy": "scale"}, {"old": "decoder.bias"}
    )
    tensors = {"old": np.arange(3.0), "copy": np.arange(2.0)}
    loaded = load(table, tensors, {"head/bias": (3,), "head/scale": (2,)}, source="here")
    np.testing.assert_array_equal(loaded.params["head/bias"], tensors["old"])
    np.testing.assert_array_equal(loaded.params["head/scale"], tensors["copy"])
