"""Weights from one format to another, with a report of every tensor and a comparison with transformers on the spot."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxptm.hf.files import (
    GENERATION_FILES,
    POOLING_FILES,
    PROCESSOR_FILES,
    STALE_WEIGHTS,
    TOKENIZER_FILES,
    found,
    is_run,
    write_json,
)
from jaxptm.metrics import versions
from jaxptm.models.params import flatten
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.nn.text_config import TextConfig
from jaxptm.original import find_original, rewrite
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.storage import is_remote
from jaxptm.training import newest_step, restore_model
from jaxptm.types import JaxptmError
from jaxptm.writing import whole_file

log = logging.getLogger("jaxptm")

FORMATS = ("hf", "orbax")
"""Hugging Face's config.json and safetensors; an Orbax checkpoint beside a config.json."""
TOLERANCE = 1e-4
"""Of an output beside transformers', as a share of the largest."""
SHOWN = 20
"""Names of weights that are left out in the warning; a report has all."""


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
        JaxptmError: there is no such model, it does not fit together, `step` or `part` do not apply, `check` failed,
            the target is a run, holds files of another model, or cannot be written, or the report is another file.
    """
    if to not in FORMATS:
        raise JaxptmError(f"--to {to}: write {' or '.join(FORMATS)}.")
    if report is not None and target.resolve() in (report.resolve(), *report.resolve().parents):
        raise JaxptmError(f"--report {report}: lies in {target}, which the model is written to; name another place.")
    of_run = is_remote(source) or is_run(Path(source))
    if of_run and step is None:
        step = newest_step(source)  # by its number, so that an older one is not taken where it is damaged
    with tempfile.TemporaryDirectory() as rewritten:
        model = restore_model(source, step, part) if of_run else _open(source, step, part, Path(rewritten))
        _refuse_to_mix(model, target)
        if to == "orbax":
            model = replace(model, dead={}, unused=(*model.unused, *_not_in_orbax(model)))
        if model.unused:
            shown, more = model.unused[:SHOWN], len(model.unused) - SHOWN
            said = f"{', '.join(shown)}{f' and {more} more' if more > 0 else ''}"
            log.warning("%s: these of its weights are left out: %s", source, said)
        differences = check(model, to) if checked else None
        if report is None:
            save(model, target, to)
            return replace(model, source=target), differences
        with _cannot_write(report):
            if report.is_dir():
                raise IsADirectoryError("it is a directory")
            if report.exists() and not _is_report(report):
                raise FileExistsError("it is there, and no report of a conversion; name another file")
            report.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(report) as partial:  # neither it nor the model is left without the other
            with _cannot_write(report):
                write_json(partial, describe(model, source, differences) | {"step": step, "part": part})
            save(model, target, to)
    return replace(model, source=target), differences


def _not_in_orbax(model: Model) -> list[str]:
    """Tensors that no parameter stands for, and that are no copy of one; Orbax has parameters alone."""
    table, tensors = model.family.table(model.config, model.task), model.tensors()
    return [
        name
        for name, tensor in model.dead.items()
        if name in table.spare or _bytes(tensor) != _bytes(tensors[table.dead[name]][0])
    ]


def _refuse_to_mix(model: Model, target: Path) -> None:
    """Raises JaxptmError where files of another model would stay beside this one, or a run would hide behind it."""
    if is_run(target):
        raise JaxptmError(f"{target}: is the directory of a run; name another one.")
    if model.source is not None and model.source.resolve() == target.resolve():
        return
    every = (*TOKENIZER_FILES, *PROCESSOR_FILES, *POOLING_FILES, *GENERATION_FILES)
    there = {file.relative_to(target).as_posix() for file in found(target, (*every, *STALE_WEIGHTS))}
    if model.source is not None:
        there -= {file.relative_to(model.source).as_posix() for file in found(model.source, model.companions())}
    if there:
        raise JaxptmError(
            f"{target}: holds {', '.join(sorted(there))} of another model; delete that, or name another directory."
        )


def _open(source: str, step: int | None, part: str, rewritten: Path) -> Model:
    """Opens what is no run; a checkpoint of another implementation is rewritten to `rewritten` first."""
    if step is not None:
        raise JaxptmError(f"--step is for run directories; {source} holds no checkpoints/.")
    original = find_original(source)
    if original is None:
        if part != "model":
            raise JaxptmError(f"--part is for runs and for Google's ELECTRA; {source} is neither.")
        return from_pretrained(source, "auto", complete=True, param_dtype=None)
    left_out = rewrite(original, rewritten, part)
    try:
        model = from_pretrained(rewritten, "auto", complete=True, param_dtype=None)
        return replace(model, unused=(*model.unused, *left_out))
    except JaxptmError as error:  # names the checkpoint, and not where it lies for a moment
        said = str(error).replace(str(rewritten / "config.json"), f"{original} (its settings)")
        raise JaxptmError(said.replace(str(rewritten), str(original))) from error


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
        JaxptmError: torch is not here, a weight is not finite, a tensor comes back changed, or an output differs by
            more than TOLERANCE.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise JaxptmError("--check needs torch, in which transformers computes: pip install torch.") from error
    before = flatten(model.params)
    broken = [path for path, leaf in before.items() if not np.isfinite(np.asarray(leaf, np.float32)).all()]
    if broken:
        raise JaxptmError(f"these weights hold NaN or infinities: {', '.join(broken)}.")
    with tempfile.TemporaryDirectory() as written, tempfile.TemporaryDirectory() as for_transformers:
        save(model, Path(written), to)
        again = from_pretrained(written, model.task, param_dtype=None)
        after = flatten(again.params)
        changed = [path for path in before if _bytes(before[path]) != _bytes(after[path])]
        if changed or before.keys() != after.keys():
            raise JaxptmError(f"these weights are not read back as they were written: {', '.join(changed)}.")
        again.save_pretrained(for_transformers)
        kind = getattr(transformers, model.family.architectures[model.task])
        theirs = kind.from_pretrained(for_transformers, dtype=torch.float32).eval()
    if getattr(theirs.config, "pad_token_id", None) is None:  # of several rows it finds the last token by it
        theirs.config.pad_token_id = 0
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
        largest = np.maximum(np.abs(reference).max(), np.finfo(np.float32).tiny)
        differences[name] = float(np.abs(np.asarray(ours, np.float32) - reference).max() / largest)
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
    padding = model.config.pad_token_id or 0  # RoBERTa counts positions by it
    ids = np.where(ids == padding, (ids + 1) % model.config.vocab_size, ids)
    lengths = np.array([length, max(1, length // 2), max(1, length // 3)])[: shape[0]]
    visible = np.arange(length) < lengths.reshape(-1, *[1] * (len(shape) - 1))
    mask = np.ascontiguousarray(np.broadcast_to(visible, shape))
    ids = np.where(mask, ids, padding)
    return {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}


def describe(model: Model, source: str, differences: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Every tensor of a model under its name in Hugging Face's files: its parameters here, shape, type and checksum.

    The checksum is the SHA-256 of the bytes as Hugging Face's files hold them (rows first, little-endian).

    Args:
        differences: what `check` gave.
    """
    table, every = model.family.table(model.config, model.task), model.tensors()

    def same_as(name: str, tensor: np.ndarray) -> str | None:
        original = table.tied.get(name) or table.dead.get(name)
        return original if original is None or _bytes(tensor) == _bytes(every[original][0]) else None

    tensors = {
        name: {
            "parameters": paths,
            "same_as": same_as(name, tensor),
            "shape": tensor.shape,
            "dtype": str(tensor.dtype),
            "sha256": hashlib.sha256(_bytes(tensor)).hexdigest(),
        }
        for name, (tensor, paths) in sorted(every.items())
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


def _is_report(path: Path) -> bool:
    try:
        said = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(said, dict) and {"architecture", "left_out", "tensors"} <= said.keys()


def _bytes(tensor: Any) -> bytes:
    return np.ascontiguousarray(tensor).tobytes()


@contextmanager
def _cannot_write(path: Path) -> Iterator[None]:
    """Names the file in an error."""
    try:
        yield
    except OSError as error:
        raise JaxptmError(f"{path}: cannot be written: {error}.") from error
