"""Checkpoints of the original implementations, rewritten as Hugging Face directories.

Google's BERT and ELECTRA (TensorFlow) and fairseq's wav2vec 2.0 (torch). Nothing here computes: tensors get other names
and other axes, and settings other keys. What a checkpoint holds beyond its model (moments of the optimizer, the step)
is left out; a name that is neither is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from jaxptm.types import JaxptmError

INDEX = ".index"


def find_original(source: str | Path) -> Path | None:
    """The checkpoint that `source` names: a `.pt` file, or what TensorFlow calls `model.ckpt` (a directory with one).

    Returns:
        A `.pt` file or a `.index` file; None where this is neither.

    Raises:
        JaxptmError: a directory with several.
    """
    path = Path(source)
    if path.suffix in (".pt", INDEX) and path.is_file():
        return path
    if path.name and (index := path.with_name(path.name + INDEX)).is_file():
        return index
    if (shard := re.fullmatch(r"(.+)\.data-\d+-of-\d+", path.name)) and path.is_file():
        return find_original(path.with_name(shard.group(1)))
    if not path.exists() and path.suffix in (".pt", ".ckpt", INDEX):
        raise JaxptmError(f"{path}: there is no such checkpoint.")
    if not path.is_dir() or (path / "config.json").exists() or (path / "model" / "config.json").exists():
        return None
    found = sorted([*path.glob(f"*{INDEX}"), *path.glob("*.pt")])
    if len(found) > 1:
        raise JaxptmError(f"{path}: holds {', '.join(file.name for file in found)}; name the one to convert.")
    return found[0] if found else None


def rewrite(checkpoint: Path, directory: Path, part: str = "model") -> list[str]:
    """Writes a checkpoint that `find_original` found as a Hugging Face directory.

    Returns:
        What of it is left out, by its names.

    Args:
        part: "model", or of an ELECTRA its "generator".

    Raises:
        JaxptmError: a file that is missing, damaged or of another model; tensors that no table knows.
    """
    if checkpoint.suffix == INDEX:
        from jaxptm.original.google import rewrite_google

        return rewrite_google(checkpoint.with_suffix(""), directory, part)
    from jaxptm.original.fairseq import rewrite_fairseq

    if part != "model":
        raise JaxptmError(f"--part {part} is for ELECTRA; {checkpoint} is a checkpoint of fairseq.")
    return rewrite_fairseq(checkpoint, directory)
