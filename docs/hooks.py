"""What MkDocs does not do by itself: pages from outside of docs/, tables of config keys, formulas without JavaScript.

A page keeps the links that work in the repository. On the site a link to another page leads to that page, and one to
a file that is no page (source, JSON) is left as its text.
"""

from __future__ import annotations

import ast
import html
import inspect
import itertools
import json
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

import jaxptm.config

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "experiments/*/README.md")
PICTURES = ("docs/pictures/*.svg", "experiments/*/*.png")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")

KEYS = re.compile(r"<!-- keys: (\w+) (\w*) -->")


def in_repository(page: str) -> str:
    """Where a page of the site lies in the repository: all that is not from outside is in docs/."""
    return page if (ROOT / page).is_file() else f"docs/{page}"


def on_config(config: Any) -> Any:
    """`experiments/*` in `nav` becomes the experiments there are, by the question that heads each."""
    for section in config.nav:
        for name, pages in section.items():
            if not isinstance(pages, list) or "experiments/*" not in pages:
                continue
            found: list[Any] = []
            for page in sorted(ROOT.glob("experiments/*/README.md")):
                title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
                found.append({title: page.relative_to(ROOT).as_posix()})
            place = pages.index("experiments/*")
            section[name] = [*pages[:place], *found, *pages[place + 1 :]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures that lie outside of docs/."""
    for pattern in (*OUTSIDE, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            page = path.relative_to(ROOT).as_posix()
            if not page.startswith("docs/"):
                files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Makes links of the repository links of the site."""
    here = page.file.src_uri

    def relink(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups(default="")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(here)), target))
        known = files.get_file_from_path(there.removeprefix("docs/"))
        if known is not None:
            return f"{picture}[{text}]({posixpath.relpath(known.src_uri, posixpath.dirname(here) or '.')}{anchor})"
        # A link to nothing at all is left for MkDocs to complain of.
        return text if (ROOT / there).exists() else match[0]

    return LINK.sub(relink, KEYS.sub(lambda match: table_of_keys(*match.groups()), markdown))


def table_of_keys(name: str, section: str) -> str:
    """The keys of a config class of jaxptm: what each takes, its default, and what its docstring says."""
    kind = getattr(jaxptm.config, name)
    said: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if issubclass(base, jaxptm.config.Config)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                said[ast.unparse(field.target)] = inspect.cleandoc(str(text.value.value))
    schema = kind.model_json_schema()
    rows = ["| key | takes | default | |", "| --- | --- | --- | --- |"]
    for key, field in schema["properties"].items():
        if key in said or "$ref" not in json.dumps(field):  # a part of its own has its own table
            default = "required" if key in schema.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
            meaning = " ".join(said.get(key, "").split()).replace("|", "\\|")
            rows.append(f"| `{section}{'.' if section else ''}{key}` | {takes(field)} | {default} | {meaning} |")
    return f"{inspect.getdoc(kind)}\n\n" + "\n".join(rows)


def takes(schema: dict[str, Any]) -> str:
    """What a value has to be, in words."""
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(takes(one) for one in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(
            f"`{json.dumps(value)}`".replace('"', "") for value in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return f"list of {takes(schema.get('items', {}))}"
    limits = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f" {sign} {schema[name]:g}" for name, sign in limits.items() if name in schema]
    names = {"boolean": "`true`, `false`", "null": "`null`", "object": "fields"}
    kind = schema.get("type", "any")
    return f"{names.get(kind, kind)}{','.join(bounds)}"


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves."""
    for tag, opening, closing, display in (("span", r"\\\(", r"\\\)", "inline"), ("div", r"\\\[", r"\\\]", "block")):
        content = re.sub(
            rf'<{tag} class="arithmatex">{opening}(.*?){closing}</{tag}>',
            lambda match, display=display: convert(html.unescape(match[1]), display=display),  # type: ignore[misc]
            content,
            flags=re.DOTALL,
        )
    return content
