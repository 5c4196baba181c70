"""Files and directories that are there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: its file takes the place of `path` at the end, and is gone after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one go: whatever happens, it holds the old text or the new one, and that on the disk."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_directory(directory: Path, replaces: str = "") -> Iterator[Path]:
    """An empty folder within `directory`, whose entries move up at the end, over those of the same names.

    After an error `directory` is as it was before, and not there if it was not.

    Args:
        replaces: a regular expression of the names of further entries that then make way.
    """
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / ".partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        yield folder
        written = sorted(folder.iterdir())
        for old in directory.iterdir():
            if old != folder and (old.name in {entry.name for entry in written} or re.fullmatch(replaces, old.name)):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for entry in written:
            entry.replace(directory / entry.name)
        folder.rmdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            shutil.rmtree(directory, ignore_errors=True)
        raise
