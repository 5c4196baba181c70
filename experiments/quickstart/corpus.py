"""The English that ships with every Python, as a text corpus: what its documentation strings and help topics say.

    python experiments/quickstart/corpus.py runs/quickstart/corpus.txt

The sources of the standard library are parsed, never imported. One document is a module or a topic, documents are
separated by a blank line, one line is a paragraph of prose. Code, signatures, tables and markup stay behind.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
LEFT_OUT = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "idle_test",
}
# Words that every English sentence is full of and code is not.
FUNCTION_WORDS = set(
    "a an and are as at be but by can do does for from has have if in into is it its may must not of on or so than "
    "that the their then there these they this to was were when where which will with you your".split()
)
CODE = re.compile(r">>>|\.\.\. |::=|^\s*\.\. |[{}\\|]|={2}|-{3}|\*{3}|\+-|->|\w=\w|\w_\w+_\w+_|[\w)]\[\w", re.MULTILINE)
MARKUP = [
    (re.compile(r":[a-z:+-]+:`~?([^`<]*?)(?: *<[^`>]*>)?`"), r"\1"),  # :class:`~text <target>`
    (re.compile(r"`([^`']*)'"), r"\1"),  # `old' quotes
    (re.compile(r"`+([^`]*)`+(?:__?(?!\w))?"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"(?<!\w)[\"']([\w.@]+(?:\(\))?)[\"'](?!\w)"), r"\1"),  # help topics write "name" for code
    (re.compile(r" ?\[\d+\]_?"), ""),
    (re.compile(r"::$"), ":"),
]
BULLET = re.compile(r"^(?:[*+•-]|\(?\d{1,2}[.)]|\(?[a-z]\)) +")


def documents(library: Path) -> Iterator[list[str]]:
    """The paragraphs of each module under `library`, in order of path, then of each help topic; no paragraph twice."""
    seen: set[str] = set()
    for text in [*module_texts(library), *topic_texts(library)]:
        fresh = [paragraph for paragraph in paragraphs(text) if paragraph not in seen]
        fresh = list(dict.fromkeys(fresh))
        seen.update(fresh)
        if fresh:
            yield fresh


def module_texts(library: Path) -> Iterator[str]:
    """All docstrings of each module, in the order of its source."""
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            yield "\n\n".join(docstrings(path))


def docstrings(path: Path) -> Iterable[str]:
    """The docstrings of the module, its classes and its functions; none when the file is no Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [text for node in definitions(tree) if (text := ast.get_docstring(node))]


def definitions(node: ast.AST) -> Iterator[Documented]:
    """`node` and the classes and functions inside it, in the order of the source."""
    if isinstance(node, Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):  # no definition hides in an expression
            yield from definitions(child)


def topic_texts(library: Path) -> Iterator[str]:
    """The texts behind `help("topic")`."""
    path = library / "pydoc_data" / "topics.py"
    if path.is_file():
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                topics = ast.literal_eval(node.value)
                yield from (topics[name] for name in sorted(topics))


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text` that are English prose, each on one line and without markup."""
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        for item in split_items(textwrap.dedent(block)):
            if CODE.search(item):
                continue
            line = " ".join(item.split())
            for pattern, replacement in MARKUP:
                line = pattern.sub(replacement, line)
            if is_prose(line):
                yield line


def split_items(block: str) -> Iterator[str]:
    """Cuts `block` where a list item begins, and where the indentation changes after the end of a sentence."""
    lines: list[str] = []
    margin: int | None = 0
    for line in block.strip("\n").split("\n"):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        bullet = BULLET.match(text)
        if margin is None and not bullet:
            margin = indent  # the second line of an item sets its margin
        if lines and (bullet or (indent != margin and lines[-1].endswith((".", ":", "!", "?")))):
            yield " ".join(lines)
            lines = []
        margin = None if bullet else indent
        lines.append(text[bullet.end() :] if bullet else text)
    yield " ".join(lines)


def is_prose(line: str) -> bool:
    """Whether `line` is English sentences: enough words, ordinary ones among them, and hardly any other signs."""
    words = re.findall(r"[A-Za-z][a-z']*(?![\w(.]\w)", line)
    ordinary = {word.lower() for word in words} & FUNCTION_WORDS
    letters = sum(char.isalpha() or char == " " for char in line)
    sentence = line[:1].isupper() or (line[-1:] == "." and len(ordinary) >= 3)
    return sentence and len(words) >= 6 and len(ordinary) >= 2 and letters >= 0.9 * len(line)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/quickstart/corpus.py FILE")
    target = Path(sys.argv[1])
    found = list(documents(Path(sysconfig.get_path("stdlib"))))
    if not found:
        sys.exit(
            f"{sysconfig.get_path('stdlib')}: this Python comes without the sources of its library; use another one."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join("\n".join(document) for document in found) + "\n"
    target.write_text(text, encoding="utf-8")
    lines, words = sum(map(len, found)), len(text.split())
    print(f"{target}: {len(found):,} documents, {lines:,} paragraphs, {words:,} words, {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
