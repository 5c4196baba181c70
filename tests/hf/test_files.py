"""The files of a model directory: what is read, written and refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.numpy import load_file, save_file

from jaxptm.errors import JaxptmError
from jaxptm.hf import files

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.linspace(-3, 3, 8).astype(ml_dtypes.bfloat16),
    "c.weight": np.arange(5, dtype=np.float16),
    "d.ids": np.arange(6, dtype=np.int64),
    "e.scalar": np.float32(2.5).reshape(()),
}


def assert_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray] = TENSORS) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor)


def refused(directory: Path) -> str:
    with pytest.raises(JaxptmError) as error:
        files.read_tensors(directory)
    return str(error.value)


@pytest.mark.parametrize("shard", [10**9, 40, 1])
def test_what_is_written_is_read(shard: int, tmp_path: Path) -> None:
    files.write_model(tmp_path / "new" / "model", {"model_type": "bert"}, TENSORS, max_shard_bytes=shard)
    assert_tensors(files.read_tensors(tmp_path / "new" / "model"))
    assert files.read_json(tmp_path / "new" / "model" / "config.json") == {"model_type": "bert"}
    shards = {10**9: 1, 40: 4, 1: 5}[shard]
    assert len(list((tmp_path / "new" / "model").glob("*.safetensors"))) == shards
    assert not list((tmp_path / "new" / "model").glob("*.partial"))
    for path in (tmp_path / "new" / "model").glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers insists on it


def test_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    files.write_model(tmp_path, {}, {"a": TENSORS["a.weight"].T, "b": TENSORS["a.weight"][:, ::2]})
    written = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(written["a"], TENSORS["a.weight"].T)
    np.testing.assert_array_equal(written["b"], TENSORS["a.weight"][:, ::2])


def test_shards_and_one_file_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "model_card.md").write_text("stays")
    for size, count in ((1, 5), (40, 4), (10**9, 1), (40, 4)):
        files.write_model(tmp_path, {}, TENSORS, max_shard_bytes=size)
        names = {path.name for path in tmp_path.glob("model*")}
        assert len(names) == 1 + count + (count > 1)
        assert_tensors(files.read_tensors(tmp_path))


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_model(tmp_path, {"version": 1}, TENSORS)

    def full(tensors: dict[str, np.ndarray], path: Path, metadata: object) -> None:
        if "00002" in path.name:
            path.write_bytes(b"half")
            raise safetensors.SafetensorError("No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(JaxptmError, match=r"the model cannot be written: No space left on device") as error:
        files.write_model(tmp_path, {"version": 2}, {"other": np.zeros(9), "another": np.zeros(9)}, max_shard_bytes=1)
    assert str(error.value).startswith(f"{tmp_path}: ")
    monkeypatch.undo()
    assert_tensors(files.read_tensors(tmp_path))
    assert files.read_json(tmp_path / "config.json") == {"version": 1}
    files.write_model(tmp_path, {"version": 2}, {"other": np.zeros(9), "another": np.zeros(9)}, max_shard_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(JaxptmError, match=r"the model cannot be written: .*taken"):
        files.write_model(tmp_path / "taken", {}, TENSORS)


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    files.write_model(tmp_path, {}, TENSORS)
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_tensors(files.read_tensors(tmp_path))


def test_torch_files_are_read_bit_by_bit(tmp_path: Path) -> None:
    values = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.linspace(-1, 1, 7).to(torch.bfloat16),
        "c": torch.nn.Parameter(torch.ones(2)),
        "d": torch.arange(3),
    }
    torch.save(values, tmp_path / "pytorch_model.bin")
    found = files.read_tensors(tmp_path)
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.detach().float().numpy())
    assert found["b"].dtype == ml_dtypes.bfloat16


def test_torch_files_in_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(1)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_tensors(files.read_tensors(tmp_path), {"a": np.ones(1, np.float32), "b": np.zeros(1, np.float32)})


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize(
    ("save", "unsafe_load"),
    [
        (torch.save, lambda path: torch.load(path, weights_only=False)),
        (lambda value, path: path.write_bytes(pickle.dumps(value)), lambda path: pickle.loads(path.read_bytes())),
    ],
    ids=["torch", "pickle"],
)
def test_a_malicious_torch_file_is_refused_and_does_not_run(save: Any, unsafe_load: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    save({"weight": Malicious(victim)}, tmp_path / "pytorch_model.bin")
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'pytorch_model.bin'}: is no checkpoint of plain tensors (")
    assert message.endswith("); download it again.")
    assert not victim.exists()
    unsafe_load(tmp_path / "pytorch_model.bin")  # the file is what it is meant to be
    assert victim.exists()


@pytest.mark.parametrize("content", [{"state": {"a": torch.ones(1)}}, [torch.ones(1)], torch.ones(1)])
def test_a_torch_file_of_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "is no checkpoint of plain tensors" in refused(tmp_path)


def test_a_truncated_torch_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:2000])
    assert "is no checkpoint of plain tensors" in refused(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 42\n",
        lambda content: b"\x89PNG\r\n\x1a\n" + bytes(200),
        lambda content: content + b"more",
    ],
    ids=["a byte short", "half", "five bytes", "empty", "a Git LFS pointer", "foreign", "too long"],
)
def test_a_damaged_safetensors_file(damage: Any, tmp_path: Path) -> None:
    files.write_model(tmp_path, {}, TENSORS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = refused(tmp_path)
    assert message.startswith(f"{path}: is no complete safetensors file (")
    assert message.endswith("it may be truncated, a Git LFS pointer, or foreign. Download it again.")


def test_a_missing_shard_and_a_shard_that_lacks_a_tensor(tmp_path: Path) -> None:
    files.write_model(tmp_path, {}, TENSORS, max_shard_bytes=1)
    index = tmp_path / "model.safetensors.index.json"
    save_file({"nothing": np.zeros(1)}, tmp_path / "model-00003-of-00005.safetensors")
    assert refused(tmp_path) == f"{index}: its shards lack c.weight."
    (tmp_path / "model-00003-of-00005.safetensors").unlink()
    assert refused(tmp_path) == (
        f"{index}: names the shard model-00003-of-00005.safetensors, which is not there; download the checkpoint again."
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"metadata": {"total_size": 3}}'])
def test_an_index_without_weight_map(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert refused(tmp_path) == (
        f"{tmp_path / 'model.safetensors.index.json'}: has no `weight_map`; download the checkpoint again."
    )


def test_no_weights(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(f"{tmp_path}: holds no weights; expected one of model.safetensors, ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'a': 1}", "is not JSON: "),
        (b"", "is not JSON: "),
        (b"[1]", "holds no JSON object."),
        (b'{"a": "\xff"}', "is not JSON: "),
    ],
)
def test_json_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(JaxptmError) as error:
        files.read_json(tmp_path / "config.json")
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_directories_that_are_not_there(tmp_path: Path) -> None:
    assert files.resolve(tmp_path) == files.resolve(str(tmp_path)) == tmp_path
    for name in (tmp_path / "absent", "./absent", "../absent", "~/absent", "a/b/c"):
        with pytest.raises(JaxptmError) as error:
            files.resolve(name)
        assert str(error.value) == f"{name}: there is no such directory."
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(
        JaxptmError, match=r"model.safetensors is a file; name the model directory that holds config.json"
    ):
        files.resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["someone/something", "something", "not a name", "-/-"])
def test_hub_names_without_a_network(name: str) -> None:
    with pytest.raises(JaxptmError) as error:
        files.resolve(name)
    message = str(error.value)
    assert message.startswith(f"{name}: no such directory here, and the Hugging Face hub did not give it: ")
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_the_hub_is_asked_for_one_kind_of_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooling = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    there = {"config.json", "vocab.txt", "tf_model.h5", "pytorch_model.bin", kind, "onnx/config.json", *pooling}
    if kind == "model.safetensors":
        there.add("flax_model.msgpack")

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/something"
        for file in there:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert files.resolve("someone/something") == tmp_path
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found - {"onnx/config.json"} == {"config.json", "vocab.txt", kind, *pooling}


def test_the_directory_of_a_run_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert files.resolve(tmp_path) == tmp_path
    (tmp_path / "model/config.json").write_text("{}")
    assert files.resolve(tmp_path) == tmp_path / "model"
    (tmp_path / "config.json").write_text("{}")
    assert files.resolve(tmp_path) == tmp_path


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    files.write_json(path, {"b": 1, "a": "é"})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        files.write_json(path, {"bad": object()})
    assert path.read_bytes() == before
    assert files.read_json(path) == {"a": "é", "b": 1}


def test_tokenizer_files_are_copied_and_no_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vocab.txt", "tokenizer.json", "merges.txt", "model.safetensors", "README.md"):
        (source / name).write_text(name)
    files.copy(source, tmp_path / "target" / "deep", files.TOKENIZER_FILES)
    assert {path.name for path in (tmp_path / "target" / "deep").iterdir()} == {
        "vocab.txt",
        "tokenizer.json",
        "merges.txt",
    }
    assert (source / "vocab.txt").read_text() == "vocab.txt"
