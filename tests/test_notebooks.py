"""Each notebook runs from its first cell to its last, on small sizes, in a kernel of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from reader import ROOT, SMALL, TEXTS

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"BATCH": 8, "STEPS": 2}
PARAMETERS: dict[str, dict[str, Any]] = {
    "pretrain_bert": {
        **QUICK, "FILES": "corpus.txt", "MODEL": {"preset": "bert-tiny", **SMALL}, "VOCABULARY": 120, "LENGTH": 32,
        "SENTENCE": "the [MASK] is",
    },
    "fine_tune": {
        "MODEL": "my-bert", "TABLE": "reviews.csv", "TEXT": "review", "LABEL": "stars", "EPOCHS": 1, "BATCH": 8,
        "TEXTS": TEXTS[:2],
    },
    "electra": {
        **QUICK, "FILES": "corpus.txt", "VOCABULARY": 120, "LENGTH": 32,
        "MODEL": {"preset": "electra-tiny", **SMALL, "embedding_size": 32, "generator_size": 1.0},
    },
    "transcribe_speech": {**QUICK, "MANIFEST": "train.tsv"},
    "convert_weights": {"SOURCE_MODEL": "my-bert"},
}  # fmt: skip
"""What the tests put in the places of the parameters."""


def tagged(book: Any, tag: str) -> list[int]:
    return [place for place, cell in enumerate(book.cells) if tag in cell.metadata.get("tags", ())]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = nbformat.read(path, as_version=4)
    (install,), (parameters,) = tagged(book, "install"), tagged(book, "parameters")
    names = {line.split(" = ")[0].strip() for line in book.cells[parameters].source.splitlines() if " = " in line}
    small = PARAMETERS[path.stem]
    assert small.keys() <= {name for line in names for name in line.split(", ")}, "the notebook has other parameters"
    book.cells[parameters].source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    del book.cells[install]
    # `!jaxptm` is the command of this environment.
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    # One device: what several change is tested elsewhere, and compiles slower.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(reader)}}).execute()


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_it_is_as_it_was_written(path: Path) -> None:
    """No output of anybody's machine, and every cell of code compiles."""
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            if not cell.source.startswith("!") and "install" not in cell.metadata.get("tags", ()):
                compile(cell.source, str(path), "exec")
