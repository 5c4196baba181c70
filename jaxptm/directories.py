"""Where a run keeps its files, and whose directory it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxptm.config import AudioData, ParallelConfig, TextData, TrainConfig, dump_config, load_config
from jaxptm.hosts import exchange, is_main, together
from jaxptm.storage import Mirror, checkpoint_directory, is_remote, local_directory
from jaxptm.types import JaxptmError
from jaxptm.writing import write_atomically

REPORTING = {
    f"train.{key}" for key in ("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep", "export")
}
"""Keys that may change when a run is resumed: its parameters do not depend on them."""
TOKENIZER = "tokenizer"
"""Folder of a run: the tokenizer, or of speech the listener, that its ids are of, kept from its first step on."""
LAYOUT = {"train.accumulate", *(f"parallel.{key}" for key in ParallelConfig.model_fields)}
"""Keys that may change as well, so that a run can go on on other devices: its parameters change by rounding alone."""


def prepared_directory(config: TrainConfig) -> Path:
    """Where the shards lie: `data.prepared`, or beside the run's files under a name made from the data keys.

    Raises:
        JaxptmError: `data.prepared` is an URL, or the data is neither text nor speech.
    """
    data = config.data
    if not isinstance(data, TextData | AudioData):
        raise JaxptmError("there is nothing to prepare: fine-tuning reads its examples when it starts.")
    if data.prepared is None:
        return local_directory(config.out).parent / "prepared" / _fingerprint(data)
    if is_remote(data.prepared):
        raise JaxptmError(f"data.prepared: {data.prepared} has to be a local directory, which can be mapped.")
    return Path(data.prepared)


def claim_directory(config: TrainConfig) -> Mirror:
    """Writes `config.yaml` into the run directory, or checks the one that is there once something has been saved.

    Of a remote run, what it has written so far is brought here first.

    Raises:
        JaxptmError: the directory belongs to another config; every key that differs is named. Or it is out of reach, or
            the processes do not have the same config.
    """
    if len(set(exchange(digest(config.model_dump(mode="json"))))) > 1:
        raise JaxptmError(
            "the processes were started with different configs; give all of them the same file and the same "
            "key.key=value arguments."
        )
    checkpoints, mirror = checkpoint_directory(config.out), Mirror(config.out)
    with together():
        if is_main():
            for name in ("config.yaml", "metrics.jsonl"):
                mirror.pull(name, missing_ok=True)
            _claim(mirror.local, checkpoints, config)
            mirror.push()
    return mirror


def _claim(directory: Path, checkpoints: Path | Any, config: TrainConfig) -> None:
    path = directory / "config.yaml"
    if path.exists() and any(checkpoints.glob("[0-9]*")):
        theirs = leaves(load_config(path).model_dump(mode="json"))
        ours = leaves(config.model_dump(mode="json"))
        free = REPORTING | LAYOUT | {"out"}
        keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and key not in free]
        if keys:
            lines = [f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in keys]
            raise JaxptmError(
                "\n".join([f"{checkpoints.parent} belongs to a run with another config; choose another `out`:", *lines])
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_config(config))
    except OSError as error:
        raise JaxptmError(f"out: {directory} cannot be written: {error.strerror}; choose another `out`.") from error


def _fingerprint(data: TextData | AudioData) -> str:
    if isinstance(data, AudioData):  # transcripts and limits decode nothing again
        return digest({"train": data.train, "eval": data.eval})
    keys = ("files", "eval_files", "text_field", "tokenizer", "tokenizer_model", "vocab_size", "lowercase")
    content = {key: value for key, value in data.model_dump().items() if key in keys}
    return digest(content)


def digest(content: Any) -> str:
    """Names JSON by its content, in 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def leaves(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested fields, by `key.key`."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
