"""Chapter 4 where neither the Hub nor the package index is reached, and the cache is empty."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from course_utils import notebooks

CHAPTER = Path(__file__).resolve().parents[1] / "notebooks" / "04_bert.ipynb"
CLOSED = "http://127.0.0.1:9"


@pytest.mark.slow
def test_the_chapter_goes_on_with_a_miniature(tmp_path, monkeypatch):
    for name in os.environ:
        if name.upper().startswith(("HF_", "PIP_", "UV_", "COURSE_D")) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    for name in ("COURSE_DATA", "HF_HOME", "UV_CACHE_DIR", "PIP_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, f"{CLOSED}/simple")
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    execution = notebooks.execute(notebooks.read(CHAPTER), CHAPTER.parent, timeout=600)
    cells = {cell["id"]: cell for cell in execution.notebook.cells}
    told = "".join(output.get("text", "") for output in cells["load"].outputs)
    assert told.count("could not be had") == 1 and "goes on with a miniature BERT" in told
    assert "\x1b" not in told  # colours of the installer
    code = [cell for cell in cells.values() if cell.cell_type == "code"]
    assert len(code) > 150 and all(cell.execution_count for cell in code)
    said = [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    assert said == []
    table = "".join(output.get("text", "") for output in cells["scores-table"].outputs)
    assert "fine-tuned" in table  # the whole way was gone
    print(f"{execution.seconds:.0f} s\n{told}")  # shown by pytest -rP
