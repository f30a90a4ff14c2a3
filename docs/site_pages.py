"""Pages of the documentation's site that lie elsewhere in the repository, and links that lead out of the site.

A hook of MkDocs, and an extension of the reader of docstrings (``mkdocs.yml``). Pages are written for the repository,
where their links lead to files; on the site a link to a file that is no page keeps its text alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from griffe import Extension

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository, and the names of their pages; all pages lie in one folder."""


def site_links(text: str, source: str) -> str:
    """Return the text of a page with the links of the site.

    Args:
        text: Markdown.
        source: The page's path in the repository.

    >>> site_links("[a](docs/reading.md#x) [b](src/calm/model.py) ![c](docs/birds.png) [d](https://d.org)", "README.md")
    '[a](reading.md#x) b ![c](birds.png) [d](https://d.org)'
    """

    def link(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups()
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / target)).as_posix()
        page = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return words if page is None else f"{mark}[{words}]({page}{anchor or ''})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)  # code stays as it is
    pattern = r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]*)(#[^)]*)?\)"
    return "".join(part if part.startswith("```") else re.sub(pattern, link, _lists(part)) for part in parts)


def _lists(text: str) -> str:
    """Return text whose lists Python-Markdown reads as CommonMark does: it wants what belongs to an item four spaces
    in, and a blank line between an item's last paragraph or table and the next item."""
    deeper = re.sub(r"^ {2,3}(?=\S)", "    ", text, flags=re.M)
    return re.sub(r"(\n\n(?: {4}\S.*\n)+)(?=- )", r"\1\n", deeper)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere."""
    from mkdocs.structure.files import File

    for source, page in ELSEWHERE.items():
        content = site_links((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links of the pages in docs/ to where they are on the site."""
    return markdown if page.file.src_uri in ELSEWHERE.values() else site_links(markdown, f"docs/{page.file.src_uri}")


class Examples(Extension):
    """Doctests at the end of docstrings become examples, which are shown as code."""

    def on_object(self, *, obj: Any, **options: Any) -> None:
        """Indent the doctests of an object's docstring below a heading."""
        if obj.docstring is not None:
            text, mark, tests = obj.docstring.value.partition("\n>>> ")
            if mark:
                lines = f">>> {tests}".splitlines()
                obj.docstring.value = "\n".join([text, "", "Examples:", *(f"    {line}".rstrip() for line in lines)])
