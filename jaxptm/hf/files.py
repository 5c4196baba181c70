"""The files of a Hugging Face model directory: config.json, weights in one file or in shards, tokenizer files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxptm.hf.flax import read_flax, torch_name
from jaxptm.types import JaxptmError
from jaxptm.writing import whole_directory, whole_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
POOLING_FILES = ("modules.json", "sentence_*_config.json", "*_Pooling/config.json")
"""How sentence-transformers makes one vector of a text."""
GENERATION_FILES = ("generation_config.json",)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""What is done to audio before a model hears it."""
WEIGHTS = tuple(
    f"{name}{suffix}"
    for name in ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")
    for suffix in ("", ".index.json")
)
STALE_WEIGHTS = ("pytorch_model*.bin*", "flax_model*.msgpack*", "tf_model*.h5*")
"""What may lie beside the files that are written here, and is another's."""
"""In the order in which they are looked for; a pickle comes last."""
SHARDS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""Names of files that a model is written to, as a regular expression."""


def is_run(path: Path) -> bool:
    """Whether it is the directory of a run, finished or not."""
    return (path / "checkpoints").is_dir() and (path / "config.yaml").exists()


def resolve(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """A local model directory: the path itself, the `model/` of a run, or a snapshot of the hub repository.

    Raises:
        JaxptmError: there is no such directory, and the hub cannot be reached or has no such repository.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        own, of_run = path / "config.json", path / "model"
        if own.exists() or (of_run / "config.json").exists():
            return path if own.exists() else of_run
        if is_run(path):
            raise JaxptmError(
                f"{path}: is a run that has not come to its end, and holds no model yet; finish it by `jaxptm train`, "
                f"or take its newest checkpoint: jaxptm convert {path} MODEL."
            )
        return path
    if path.exists():
        raise JaxptmError(f"{path} is a file; name the model directory that holds config.json and the weights.")
    name = str(path_or_hub_id)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise JaxptmError(f"{name}: there is no such directory.")
    from huggingface_hub import snapshot_download

    small = ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES, *POOLING_FILES, *GENERATION_FILES)
    try:
        path = Path(snapshot_download(name, allow_patterns=list(small)))
        for weights in ("model*.safetensors*", "flax_model*.msgpack*", "pytorch_model*.bin*"):
            snapshot_download(name, allow_patterns=[weights])
            if any(path.glob(weights)):
                break
        return path
    except Exception as error:  # huggingface_hub and the HTTP library under it raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JaxptmError(
            f"{name}: no such directory here, and the Hugging Face hub did not give it: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; one sentence with the path where it cannot be had."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JaxptmError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise JaxptmError(f"{path}: is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise JaxptmError(f"{path}: holds no JSON object.")
    return content


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All weights of a directory under their names in safetensors, from the first of `WEIGHTS` that is there.

    Raises:
        JaxptmError: no weights, a shard that the index names is missing, a truncated or foreign file.
    """
    for name in WEIGHTS:
        file = directory / name
        if not file.exists():
            continue
        if not name.endswith(".index.json"):
            return _read_file(file)
        shards = read_json(file).get("weight_map")
        if not isinstance(shards, dict):
            raise JaxptmError(f"{file}: has no `weight_map`; download the checkpoint again.")
        if name.startswith("flax_model"):
            shards = {torch_name(path): shard for path, shard in shards.items()}
        tensors: dict[str, np.ndarray] = {}
        for shard in sorted(set(shards.values())):
            if not (directory / shard).exists():
                raise JaxptmError(
                    f"{file}: names the shard {shard}, which is not there; download the checkpoint again."
                )
            part = _read_file(directory / shard)
            if twice := sorted(set(part) & set(tensors)):
                raise JaxptmError(f"{directory / shard}: {', '.join(twice[:5])}: is in another shard, too.")
            tensors |= part
        lost = sorted(set(shards) - set(tensors))
        if lost:
            raise JaxptmError(f"{file}: its shards lack {', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}.")
        return tensors
    raise JaxptmError(f"{directory}: holds no weights; expected one of {', '.join(WEIGHTS)}.")


@contextmanager
def model_directory(directory: Path) -> Iterator[Path]:
    """A folder to write a model to, which is in `directory` once it is whole, in place of one that was there.

    Raises:
        JaxptmError: the directory cannot be written, for instance because the disk is full.
    """
    from safetensors import SafetensorError

    try:
        with whole_directory(directory, replaces=SHARDS) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise JaxptmError(f"{directory}: the model cannot be written: {error}.") from error


def write_model(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    max_shard_bytes: int = 5 * 10**9,
    companions: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes config.json and safetensors, in shards with an index where they pass `max_shard_bytes`.

    A model that was there before is replaced once the new one is on the disk.

    Args:
        companions: writes to the folder that it is given what belongs beside the weights.

    Raises:
        JaxptmError: the directory cannot be written, for instance because the disk is full.
    """
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        filled += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with model_directory(directory) as folder:
        write_json(folder / "config.json", config)
        for file, shard in zip(names, shards, strict=True):
            save_file(shard, folder / file, metadata={"format": "pt"})
            (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors writes for the owner alone
        if len(shards) > 1:
            index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            total = sum(tensor.nbytes for tensor in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": index}
            write_json(folder / "model.safetensors.index.json", content)
        companions(folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object so that a reader sees the old file or the new one, never half of one."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copies those files of `source` that are named, in folders of the same names."""
    for file in found(source, patterns):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def found(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a directory that are named, by patterns."""
    return [file for pattern in patterns for file in sorted(directory.glob(pattern)) if file.is_file()]


def _read_file(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".bin":
        return _read_pickle(file)
    if file.suffix == ".msgpack":
        return read_flax(file)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except AttributeError as error:  # safetensors asks numpy for a type of that name
        raise JaxptmError(f"{file}: quantised weights are not read: {error}.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise JaxptmError(
            f"{file}: is no complete safetensors file ({error}); it may be truncated, a Git LFS pointer, or foreign. "
            "Download it again."
        ) from error


def import_torch(file: Path) -> Any:
    """torch, which alone reads what it wrote.

    Raises:
        JaxptmError: it is not here.
    """
    try:
        import torch
    except ImportError as error:
        raise JaxptmError(
            f"{file}: needs torch to be read (`pip install torch`), or convert it to model.safetensors where torch is."
        ) from error
    return torch


def _read_pickle(file: Path) -> dict[str, np.ndarray]:
    torch = import_torch(file)
    try:
        # weights_only: tensors are rebuilt, no code of the file runs.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: from_torch(tensor.detach()) for name, tensor in tensors.items()}
    except Exception as error:  # torch raises many kinds here: pickle, zip, runtime and attribute errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JaxptmError(f"{file}: is no checkpoint of plain tensors ({reason}); download it again.") from error


def from_torch(tensor: Any) -> np.ndarray:
    """A tensor on the CPU as numpy has it, bfloat16 by ml_dtypes."""
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
