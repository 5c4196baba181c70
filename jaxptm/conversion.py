"""Weights from one format to another, with a report of every tensor and a comparison with transformers on the spot."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxptm.hf.files import write_json
from jaxptm.metrics import versions
from jaxptm.models.params import flatten
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.nn.text import TextConfig
from jaxptm.original import find_original, rewrite
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.storage import is_remote
from jaxptm.training import restore_model
from jaxptm.types import JaxptmError

log = logging.getLogger("jaxptm")

FORMATS = ("hf", "orbax")
"""Hugging Face's config.json and safetensors; an Orbax checkpoint beside a config.json."""
TOLERANCE = 1e-4
"""Of an output beside transformers', as a share of the largest."""


def convert(
    source: str,
    target: Path,
    to: str = "hf",
    *,
    step: int | None = None,
    part: str = "model",
    checked: bool = False,
    report: Path | None = None,
) -> tuple[Model, dict[str, float] | None]:
    """Writes the model of `source` to `target`, once it has opened whole and, with `checked`, passed `check`.

    Args:
        source: a model directory, a hub name, a run, or a checkpoint of Google's BERT and ELECTRA or of fairseq.
        step: of a run, which checkpoint; default the newest.
        part: of an ELECTRA that holds both: "model" or "generator".
        report: where to write what `describe` says, as JSON.

    Returns:
        The model, and what `check` measured.

    Raises:
        JaxptmError: there is no such model, it does not fit together, `step` or `part` do not apply, or `check` failed.
    """
    if to not in FORMATS:
        raise JaxptmError(f"--to {to}: write {' or '.join(FORMATS)}.")
    if report is not None and (report == target or target in report.parents):
        raise JaxptmError(f"--report {report}: lies in {target}, which the model is written to; name another place.")
    with tempfile.TemporaryDirectory() as rewritten:
        model = _open(source, step, part, Path(rewritten))
        if model.unused:
            log.warning("%s: these of its weights are left out: %s", source, ", ".join(model.unused))
        differences = check(model, to) if checked else None
        if report is not None:  # before the model, which then is not left without it
            write_report(report, describe(model, source, differences))
        save(model, target, to)
    return replace(model, source=target), differences


def _open(source: str, step: int | None, part: str, rewritten: Path) -> Model:
    """Opens what `convert` is given; a checkpoint of another implementation is rewritten to `rewritten` first."""
    is_run = is_remote(source) or (Path(source) / "checkpoints").is_dir()
    original = None if is_run else find_original(source)
    if step is not None and not is_run:
        raise JaxptmError(f"--step is for run directories; {source} holds no checkpoints/.")
    if is_run:
        return restore_model(source, step, part)
    if original is None:
        if part != "model":
            raise JaxptmError(f"--part is for runs and for Google's ELECTRA; {source} is neither.")
        return from_pretrained(source, "auto", complete=True)
    rewrite(original, rewritten, part)
    try:
        return from_pretrained(rewritten, "auto", complete=True)
    except JaxptmError as error:  # names the checkpoint, and not where it lies for a moment
        raise JaxptmError(str(error).replace(str(rewritten), str(original))) from error


def save(model: Model, target: Path, to: str) -> None:
    """Writes a model in a format."""
    (model.save_pretrained if to == "hf" else model.save_orbax)(target)


def check(model: Model, to: str) -> dict[str, float]:
    """Writes a model, reads it again, and runs it beside transformers on rows that are partly padding.

    So jaxptm and transformers make the same of these weights. Whether they are under the right names, transformers
    cannot tell; of checkpoints of other implementations the tests of `jaxptm.original` do.

    Returns:
        Of every output, its largest difference from transformers', as a share of the largest value there.

    Raises:
        JaxptmError: torch is not here, a tensor comes back changed, or an output differs by more than TOLERANCE.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise JaxptmError("--check needs torch, in which transformers computes: pip install torch.") from error
    with tempfile.TemporaryDirectory() as written, tempfile.TemporaryDirectory() as for_transformers:
        save(model, Path(written), to)
        again = from_pretrained(written, model.task)
        before, after = flatten(model.params), flatten(again.params)
        changed = [path for path in before if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))]
        if changed or before.keys() != after.keys():
            raise JaxptmError(f"these weights are not read back as they were written: {', '.join(changed)}.")
        again.save_pretrained(for_transformers)
        kind = getattr(transformers, model.family.architectures[model.task])
        theirs = kind.from_pretrained(for_transformers, dtype=torch.float32).eval()
    inputs = sample_inputs(model)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(value) for name, value in inputs.items()})
    with jax.default_matmul_precision("highest"):
        given = again(output_hidden_states=False, **inputs)
    differences = {}
    for name, ours in given.items():
        if name not in expected:  # what jaxptm alone tells, such as how often a codebook entry is used
            continue
        reference = expected[name].numpy().astype(np.float32)
        differences[name] = float(np.abs(np.asarray(ours, np.float32) - reference).max() / np.abs(reference).max())
    assert differences, f"{kind.__name__} has none of the outputs {', '.join(given)}"
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        said = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise JaxptmError(f"the model differs from transformers': {said} of the largest value, more than {TOLERANCE}.")
    return differences


def sample_inputs(model: Model) -> dict[str, np.ndarray]:
    """Random rows, the later ones padded: tokens [3, L] or [2, 2, L] of answers, or audio [2, T]."""
    rng = np.random.default_rng(0)
    if isinstance(model.config, AudioConfig):
        samples = 40 * model.config.stride + model.config.receptive_field
        audio = rng.normal(size=(2, samples)).astype(np.float32)
        mask = (np.arange(samples) < np.array([[samples], [samples // 2]])).astype(np.int32)
        return {"input_values": np.where(mask, audio, 0).astype(np.float32), "attention_mask": mask}
    assert isinstance(model.config, TextConfig)
    length = min(32, model.max_length)
    shape = (2, 2, length) if model.task == "multiple-choice" else (3, length)
    ids = rng.integers(0, model.config.vocab_size, shape)
    if model.config.pad_token_id is not None:  # RoBERTa counts positions by it
        ids = np.where(ids == model.config.pad_token_id, (ids + 1) % model.config.vocab_size, ids)
    lengths = np.array([length, max(1, length // 2), max(1, length // 3)])[: shape[0]]
    visible = np.arange(length) < lengths.reshape(-1, *[1] * (len(shape) - 1))
    mask = np.ascontiguousarray(np.broadcast_to(visible, shape))
    ids = np.where(mask, ids, model.config.pad_token_id or 0)
    return {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}


def describe(model: Model, source: str, differences: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Every tensor of a model under its name in Hugging Face's files: its parameters here, shape, type and checksum.

    The checksum is the SHA-256 of the bytes as Hugging Face's files hold them (rows first, little-endian).

    Args:
        differences: what `check` gave.
    """
    table = model.family.table(model.config, model.task)
    tensors = {
        name: {
            "parameters": paths,
            "same_as": table.tied.get(name) or table.dead.get(name),
            "shape": tensor.shape,
            "dtype": str(tensor.dtype),
            "sha256": hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest(),
        }
        for name, (tensor, paths) in sorted(model.tensors().items())
    }
    return {
        "source": source,
        "architecture": model.family.architectures[model.task],
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(model.params)),
        "versions": versions(),
        "left_out": list(model.unused),
        "difference_from_transformers": None if differences is None else dict(differences),
        "tensors": tensors,
    }


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Writes what `describe` gave as JSON.

    Raises:
        JaxptmError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except (OSError, ValueError) as error:  # ValueError: a path without a name
        raise JaxptmError(f"{path}: cannot be written: {error}.") from error
