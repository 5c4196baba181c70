"""The quickstart's corpus: prose goes in as it reads, everything else stays behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.quickstart import corpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The parser reads the file\nand returns a tree.", ["The parser reads the file and returns a tree."]),
        (
            "The first of them is here.\n\nThe second of them is there.",
            ["The first of them is here.", "The second of them is there."],
        ),
        (
            "Call it with :class:`~io.Buffer` or ``None`` and *all* will be **well**.",
            ["Call it with io.Buffer or None and all will be well."],
        ),
        (
            'The "yield" statement is "not" like any of the others.',
            ["The yield statement is not like any of the others."],
        ),
        ("A topic is passed to the `help' command as it is.", ["A topic is passed to the help command as it is."]),
        ("This is how it is done in the library::", ["This is how it is done in the library:"]),
        ("The object is a list of names. [1]_", ["The object is a list of names."]),
        (
            "- This is the first item of the list\n  and it goes on.\n- That is the second item in it.",
            ["This is the first item of the list and it goes on.", "That is the second item in it."],
        ),
        (
            "It is used in the following way:\n    for name in names:\n        print(name)",
            ["It is used in the following way:"],
        ),
        (
            "path: This is the name of the file\n      that is to be opened.",
            ["path: This is the name of the file that is to be opened."],
        ),
    ],
)
def test_prose_is_kept_without_its_markup(text: str, expected: list[str]) -> None:
    assert list(corpus.paragraphs(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Too few words.",
        ">>> the_sum = add(1, 2) if that is what you want\n3",
        "if_stmt ::= if the test is true then a suite of the statements",
        "for name in the_names:\n    if name is not None and name in others: print(name)",
        "+------+------+\n| This | is a table of the values |\n+------+------+",
        "open(file, mode='r', buffering=-1, encoding=None, errors=None)",
        ".. versionadded:: 3.4 that is when this was added to the library",
        "Emulating the types of the library\n**********************************",
        "0x00 0x01 0x02 is the start of a table 0x03 0x04 0x05 0x06 0x07 0x08",
    ],
)
def test_everything_else_is_left_out(text: str) -> None:
    assert list(corpus.paragraphs(text)) == []


def test_documents_follow_the_source_and_never_repeat(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "b.py").write_text('"""The module of the letter b is here."""\n')
    (package / "a.py").write_text(
        '"""This is the module of the letter a."""\n'
        "if True:\n"
        "    class Late:\n"
        '        """A class in it is described here."""\n'
        "        async def run(self):\n"
        '            """The method of it is described here."""\n'
        '        """A string that is not the docstring of anything."""\n'
        'def repeat():\n    """The module of the letter b is here."""\n'
    )
    (package / "old.py").write_text('print "This is not the Python of today."\n')
    (package / "tests" / "test_a.py").write_text('"""This is a test and not a part of it."""\n')
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "topics = {'z': 'This is the last of all of the topics.', 'y': 'This is the one that is before it.'}\n"
    )
    assert list(corpus.documents(tmp_path)) == [
        ["The module of the letter b is here."],
        [
            "This is the module of the letter a.",
            "A class in it is described here.",
            "The method of it is described here.",
        ],
        ["This is the one that is before it."],
        ["This is the last of all of the topics."],
    ]


def test_the_library_of_this_python_is_english(tmp_path: Path) -> None:
    target = tmp_path / "new" / "corpus.txt"
    command = [sys.executable, corpus.__file__, str(target)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = target.read_text(encoding="utf-8")
    assert f"{len(text.split()):,} words" in printed
    assert len(text.split()) > 150_000
    documents = text.strip().split("\n\n")
    assert len(documents) > 300
    lines = [line for document in documents for line in document.split("\n")]
    assert len(set(lines)) == len(lines)
    # The most frequent words are those of English.
    words = re.findall(r"[a-z]+", text.lower())
    assert 0.05 < words.count("the") / len(words) < 0.09
    assert not re.search(r">>>|::=|\x00|\t", text)


def test_a_python_without_sources_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["corpus.py", str(tmp_path / "corpus.txt")])
    with pytest.raises(SystemExit, match="without the sources of its library"):
        corpus.main()
    assert list(tmp_path.iterdir()) == []
