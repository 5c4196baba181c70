"""TensorFlow's checkpoints: one that TensorFlow 2.21 wrote, and any that could be."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from bundles import write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxptm.original.tensor_bundle import read_entries, read_tensors
from jaxptm.types import JaxptmError

WRITTEN = Path(__file__).parent / "written_by_tensorflow" / "model.ckpt"


def read(prefix: Path) -> dict[str, np.ndarray]:
    shards, entries = read_entries(prefix)
    return read_tensors(prefix, entries, shards)


def expected() -> dict[str, np.ndarray]:
    """What `tf.compat.v1.train.Saver` was given for the files beside this one."""
    rng = np.random.default_rng(7)
    found: dict[str, np.ndarray] = {}
    for layer in range(12):
        for name, shape in (
            ("attention/self/query/kernel", (3, 2)),
            ("attention/self/query/bias", (3,)),
            ("output/LayerNorm/gamma", (3,)),
        ):
            found[f"bert/encoder/layer_{layer}/{name}"] = rng.normal(size=shape).astype(np.float32)
    return found | {
        "global_step": np.array(123456789),
        "half": rng.normal(size=(2, 1, 2)).astype(np.float16),
        "double": rng.normal(size=(1,)),
        "count": np.array(-7, np.int32),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape
        assert ours[name].tobytes() == array.tobytes(), name


def test_what_tensorflow_wrote() -> None:
    same(read(WRITTEN), expected())


NUMBERS = st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.float16]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text("abz/_0", min_size=1, max_size=40), NUMBERS, max_size=30),
    st.integers(1, 3),
    st.integers(1, 40),
)
def test_any_tensors_in_any_blocks_and_files(tensors: dict[str, np.ndarray], shards: int, keys: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "model.ckpt-100"
        write_bundle(prefix, tensors, shards=shards, keys=keys)
        same(read(prefix), tensors)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    prefix = tmp_path / "model.ckpt"
    tensors = {name: array for name, array in expected().items() if array.ndim}
    write_bundle(prefix, tensors, shards=2)
    index, data = tmp_path / "model.ckpt.index", tmp_path / "model.ckpt.data-00001-of-00002"
    whole = index.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(JaxptmError, match=message):
            read(prefix)

    for content, message in (
        (whole[:-1], r"model\.ckpt\.index: is no index of a TensorFlow checkpoint, or damaged \(it does not end"),
        (whole[:20] + whole[60:], "or damaged"),
        (b"", "it does not end as one does"),
    ):
        index.write_bytes(content)
        refused(message)
    write_bundle(prefix, tensors, shards=2, compression=1)
    refused(r"it is compressed")
    write_bundle(prefix, tensors, shards=2)
    data.write_bytes(data.read_bytes()[:-1])
    refused(r"data-00001-of-00002: ends within")
    data.unlink()
    refused(r"data-00001-of-00002: cannot be read: No such file or directory")
    with pytest.raises(JaxptmError, match=r"nowhere\.index: cannot be read"):
        read(tmp_path / "nowhere")
