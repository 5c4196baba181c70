"""The commands that the experiments' pages give: bash reads them, and their configs and keys are checked."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from experiments import arms
from jaxptm.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "experiments").glob("*/README.md"))
PROGRAM = re.compile(r"\b(jaxptm (train|glue|prepare|evaluate|bench)|python experiments/arms\.py) ")


def blocks(page: Path) -> list[str]:
    """Its indented blocks that call jaxptm or the script that trains arms."""
    found = re.findall(r"(?:^|\n\n)((?: {4}.*(?:\n|$))+)", page.read_text(encoding="utf-8"))
    return [block for block in found if PROGRAM.search(block)]


def called(block: str, folder: Path) -> list[list[str]]:
    """What bash calls, loops and variables worked out; every program only says its words."""
    log = folder / "log"
    for name in ("jaxptm", "python", "make"):
        program = folder / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\n" "${{0##*/}}" "$@" "" >> {log}\n')
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", block], env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
    return [call.splitlines() for call in log.read_text().split("\n\n") if call]


def keys(words: list[str]) -> list[str]:
    """Those of a config; what belongs to an option is none."""
    return [word for word in words if re.match(r"[a-z_0-9.]+=", word)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.parent.name)
def test_configs_and_keys_of_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked = 0
    for number, block in enumerate(blocks(page)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for program, *words in called(block, folder):
            if program == "jaxptm" and words[0] in ("train", "glue", "prepare", "bench"):
                given = keys(words[2:])
                if words[0] == "glue" and "--tasks" in words:
                    given.append(f"data.task={words[words.index('--tasks') + 1].split(',')[0]}")
                load_config(words[1], given)
                checked += 1
            elif program == "python" and words[0] == "experiments/arms.py":
                options = {at + 1 for at, word in enumerate(words) if word == "--tuning"}
                tuning = [words[at] for at in options]
                shared = keys([word for at, word in enumerate(words) if at not in options])
                experiment = arms.read(Path(words[1]))
                for arm in experiment.arms:
                    config, *own = experiment.of(arm)
                    load_config(config, [*map(str, own), *shared])
                for compared in experiment.compared.values():
                    if compared.train is not None:
                        beginning = ["init_from=a_model"]
                        load_config(experiment.folder / compared.train, [*beginning, *compared.keys, *tuning])
                checked += 1
    assert checked
