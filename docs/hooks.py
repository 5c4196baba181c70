"""What MkDocs does not do by itself: pages from outside of docs/, and formulas without JavaScript.

A page keeps the links that work in the repository. On the site a link to another page leads to that page, and one to
a file that is no page (source, JSON) is left as its text.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "experiments/*/README.md")
PICTURES = ("docs/pictures/*.svg", "experiments/*/*.png")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


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

    return LINK.sub(relink, markdown)


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
