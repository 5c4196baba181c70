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

    After an error in between `directory` is as it was before, and not there if it was not. What is old goes when what
    is new is in its place.

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
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    written = [entry.name for entry in folder.iterdir()]
    for name in written:
        if (directory / name).is_dir():  # which nothing can take the place of in one go
            (directory / name).replace(folder / f"{name}.old")
        (folder / name).replace(directory / name)
    for old in directory.iterdir():
        if old.name not in written and re.fullmatch(replaces, old.name):
            old.unlink()
    shutil.rmtree(folder)
