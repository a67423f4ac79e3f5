"""The table of what is taught where, and the README, name only what is there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "coverage.md"
TOPICS = range(1, 90)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _anchors(notebook: Path) -> set[str]:
    """The headings of a notebook in the form in which JupyterLab links to them."""
    cells = nbformat.read(notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {heading.strip().replace("`", "").replace(" ", "-") for heading in headings}


def test_every_topic_has_a_row_that_leads_somewhere():
    rows = dict(
        re.findall(r"^\| (\d+) \| .* \| [CSM–] \| (.+) \|$", TABLE.read_text("utf-8"), re.M)
    )
    assert [int(number) for number in rows] == list(TOPICS)
    assert all(LINK.search(where) for where in rows.values())


@pytest.mark.parametrize("page", [TABLE, ROOT / "README.md"], ids=lambda path: path.name)
def test_every_link_inside_the_repository_resolves(page):
    links = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = unquote(link).partition("#")
        target = (page.parent / file).resolve()
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link
