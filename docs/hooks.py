"""Hooks of mkdocs: add the generated reference pages, and the repository's own pages that the site links to.

Pages link to files of the repository, as readers of the repository need it. In the site, a link to a page or picture leads to
its copy there, and a link to any other file becomes its name.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent.parent))

from docs.reference_pages import PAGES, ROOT

REPOSITORY_PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "README.md",
    "jobs/README.md",
    "jobs/RESULTS.md",
    "infra/README.md",
    "infra/RUNBOOK.md",
)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, the repository's pages, and the pictures that they show."""
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    for path in REPOSITORY_PAGES:
        files.append(File.generated(config, f"repository/{path}", content=(ROOT / path).read_text()))
    for file in list(files.documentation_pages()):
        for picture, _, target, _ in _LINK.findall(file.content_string):
            path = _resolve(file.src_uri, target)
            if picture and not path.startswith("docs/") and files.get_file_from_path(_in_site(path)) is None:
                files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page to the site's copies."""
    here = page.file.src_uri
    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda link: _rewritten(link, here, files), part)
        for part in fences
    )


def _rewritten(link: re.Match[str], here: str, files: Files) -> str:
    picture, words, target, anchor = link.groups(default="")
    path = _in_site(_resolve(here, target))
    if files.get_file_from_path(path) is None:
        return words
    return f"{picture}[{words}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor})"


def _resolve(here: str, target: str) -> str:
    """Return the path in the repository of a link's target."""
    source = here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _in_site(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
