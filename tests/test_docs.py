"""Every command and Python snippet of the documentation runs, with small models in the places of large ones."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import jaxptm as command
from reader import ROOT, TEXTS, shortly

import jaxptm
from jaxptm.config import load_config

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CLUSTER = "several_devices"
"""The page whose commands need machines that are not here: its configs and keys are checked, and nothing is run."""
ELSEWHERE = {"make", "pip", "python3", ".", "export", "source"}
"""Programs that are not jaxptm."""


def code_of(page: Path, kind: str) -> list[str]:
    """The blocks of a kind."""
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def blocks(kind: str) -> list[Any]:
    """Those of all pages, with where each stands."""
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(code_of(page, kind))
    ]


def commands(block: str) -> Iterator[list[str]]:
    """The words of each line that is a command of jaxptm.

    Raises:
        AssertionError: a line is none, and of no other program that is known.
    """
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and words[0] == "jaxptm":
            yield words[1:]
        else:
            assert not words or words[0] in ELSEWHERE, line


@pytest.fixture
def here(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a reader's own, so that no block finds what another has left."""
    here = tmp_path / "here"
    shutil.copytree(reader, here, symlinks=True)
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("snippet", blocks("python"))
def test_snippet(snippet: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxptm, "train", shortly)
    exec(compile(snippet, "snippet", "exec"), {"jaxptm": jaxptm, "texts": TEXTS, "np": np})


@pytest.mark.parametrize("snippet", blocks("py"))
def test_snippet_of_another_library(snippet: str) -> None:
    compile(snippet, "snippet", "exec")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != CLUSTER and code_of(page, "bash")], ids=lambda page: page.stem
)
def test_commands(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the top of a page to its end, as somebody types them."""
    for module in ("jaxptm.training", "jaxptm.glue"):
        monkeypatch.setattr(f"{module}.train", shortly)
    for words in commands("\n".join(code_of(page, "bash"))):
        out = words.pop() if ">" in words else None
        words = words[:-1] if out else words
        if "--seeds" in words:  # more runs of the same kind
            words[words.index("--seeds") + 1] = "1"
        status, said, errors = command(*words)
        assert status == 0, f"{shlex.join(words)}\n{errors}"
        if out:
            assert said


@pytest.mark.parametrize("snippet", blocks("bash"))
def test_configs_and_keys_of_commands(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in re.findall(
        r"jaxptm (?:train|prepare) (configs/[\w/.]+)((?: +(?:\\\n *)?[\w.]+=(?:'[^']*'|\S+))*)", snippet
    ):
        load_config(words[0], shlex.split(words[1].replace("\\\n", " ")))


def test_every_page_has_its_links() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)[)#]", prose):
            assert (page.parent / target).exists(), f"{page}: {target}"
