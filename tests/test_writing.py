"""What is written is there whole, or what was there before."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxptm.writing import whole_directory, whole_file, write_atomically


def content(directory: Path) -> dict[str, str]:
    return {file.relative_to(directory).as_posix(): file.read_text() for file in directory.rglob("*") if file.is_file()}


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.html"

    def write(text: str, *, breaks: bool = False) -> None:
        with whole_file(path) as partial:
            partial.write_text(text)
            if breaks:
                raise KeyboardInterrupt
            assert path.read_text() == "old"

    for before in ({}, {"page.html": "old"}):
        with pytest.raises(KeyboardInterrupt):
            write("half", breaks=True)
        assert content(tmp_path) == before
        write_atomically(path, "old")
    write("new")
    assert content(tmp_path) == {"page.html": "new"}
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", "text")
    assert content(tmp_path) == {"page.html": "new"}


def test_a_directory_is_filled_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def fill(text: str, *names: str, breaks: bool = False) -> None:
        with whole_directory(target, replaces=r"part-\d") as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            if breaks:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill("half", "part-1", "params/a", breaks=True)
    assert not target.exists()
    fill("old", "part-1", "part-2", "params/a", "params/b")
    (target / "part-ema").write_text("stays")
    before = content(target)
    with pytest.raises(KeyboardInterrupt):
        fill("half", "part-1", "params/c", breaks=True)
    assert content(target) == before
    (target / ".partial").mkdir()  # as a killed process leaves it
    (target / ".partial" / "part-9").write_text("half")
    fill("new", "part-3", "params/c")
    assert content(target) == {"part-ema": "stays", "part-3": "new", "params/c": "new"}


def test_what_is_old_is_not_lost_where_what_is_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part-1").write_text("old")
    (tmp_path / "part-2").write_text("old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):  # noqa: PT012
        patch.setattr(Path, "replace", fails)
        with whole_directory(tmp_path, replaces=r"part-\d") as folder:
            (folder / "part-1").write_text("new")
    kept = {name: text for name, text in content(tmp_path).items() if not name.startswith(".partial")}
    assert kept == {"part-1": "old", "part-2": "old"}
