"""flax_model.msgpack: the models of written_by_flax/ were saved by transformers 4.55.4 (flax 0.10.7, jax 0.6.2).

Every weight was perturbed; `said.npz` holds some inputs (`in_...`) and what transformers' Flax models said to them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict

import jaxptm
from jaxptm.errors import JaxptmError
from jaxptm.hf.files import read_tensors, write_model

WRITTEN = Path(__file__).parent / "written_by_flax"
MODELS = sorted(path.name for path in WRITTEN.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_it_said_in_transformers(name: str, tmp_path: Path) -> None:
    said = np.load(WRITTEN / name / "said.npz")
    inputs = {key.removeprefix("in_"): said[key] for key in said if key.startswith("in_")}
    model = jaxptm.from_pretrained(WRITTEN / name, "auto")
    assert not model.unused
    model.save_pretrained(tmp_path)
    for each in (model, jaxptm.from_pretrained(tmp_path, "auto")):
        with jax.default_matmul_precision("highest"):
            outputs = each(**inputs)
        compared = [key for key in said if key in outputs]
        assert compared
        for key in compared:
            np.testing.assert_allclose(outputs[key], said[key], atol=5e-6, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_shards(name: str, tmp_path: Path) -> None:
    """As transformers wrote them: a file of paths each, and an index of paths."""
    paths = flatten_dict(msgpack_restore((WRITTEN / name / "flax_model.msgpack").read_bytes()), sep="/")
    shards = {path: f"flax_model-0000{1 + number % 2}-of-00002.msgpack" for number, path in enumerate(paths)}
    for file in set(shards.values()):
        (tmp_path / file).write_bytes(msgpack_serialize({path: paths[path] for path in paths if shards[path] == file}))
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    expected = read_tensors(WRITTEN / name)
    found = read_tensors(tmp_path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor)

    index.write_text(json.dumps({"weight_map": shards | {"bert/lost/kernel": file}}))
    with pytest.raises(JaxptmError, match=r"its shards lack bert\.lost\.weight"):
        read_tensors(tmp_path)


def test_safetensors_come_before_it_and_pickles_behind(tmp_path: Path) -> None:
    shutil.copy(WRITTEN / "GPT2LMHeadModel/flax_model.msgpack", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert "transformer.wte.weight" in read_tensors(tmp_path)
    write_model(tmp_path, {}, {"a.weight": np.ones(3)})
    assert set(read_tensors(tmp_path)) == {"a.weight"}


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x93\x01\x02\x03", None])
def test_damage_is_named(content: bytes | None, tmp_path: Path) -> None:
    whole = (WRITTEN / "GPT2LMHeadModel/flax_model.msgpack").read_bytes()
    (tmp_path / "flax_model.msgpack").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(JaxptmError, match=r"flax_model\.msgpack: is no complete file of Flax parameters"):
        read_tensors(tmp_path)
