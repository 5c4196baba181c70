"""Checksums of the files of a checkpoint, in a list that lies beside its items."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

_NAME = "checksums.json"


def write_checksums(path: Path) -> None:
    """Writes the list of the checkpoint in `path`; it is on disk when this returns."""
    files = sorted(file for item in ("state", "meta") for file in (path / item).rglob("*") if file.is_file())
    checksums = {file.relative_to(path).as_posix(): _checksum(file) for file in files}
    with (path / _NAME).open("w") as file:
        json.dump(checksums, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def damage_of(path: Path) -> str | None:
    """What is wrong with the files of the checkpoint in `path`, or None."""
    try:
        expected = json.loads((path / _NAME).read_text())
        if not isinstance(expected, dict) or not expected:
            return f"{_NAME} names no files"
        for name, checksum in expected.items():
            if _checksum(path / name) != checksum:
                return f"{name} is truncated or altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
