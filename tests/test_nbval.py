"""`pytest --nbval`, the public way to test the notebooks, stays green; see nbval.cfg beside this.

The gate is the comparator in test_notebooks.py. nbval misses a notebook whose outputs are stripped
together with its counts, stderr and errors that are stored in an ignored cell, and lost images,
and it waits for the time-out of a cell when the kernel is dead: test_notebooks.py shows that the
comparator finds each of them. In a file of its own, so that it runs beside the gate.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import v4

from course_utils import notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT = 120  # seconds, for the longest training of a chapter on a busy machine


def _nbval(home: Path, *paths: Path) -> subprocess.CompletedProcess:
    """The command of the README, in the environment in which `run` wrote the outputs."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env"]
    command += [f"--nbval-cell-timeout={CELL_TIMEOUT}"]
    command += [f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval.cfg'}"]
    command += ["-q", "--color=no", "-p", "no:xdist", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *map(str, paths)],
        cwd=ROOT,
        env=notebooks.environment(home),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.must_run_in_ci
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_nbval_passes(path, empty_record):
    done = _nbval(empty_record, path)
    cells = len(notebooks.code_cells(notebooks.read(path)))
    assert done.returncode == 0 and f"{cells} passed" in done.stdout, done.stdout[-5000:]


def test_nbval_compares_outputs_and_takes_addresses_for_equal(tmp_path, empty_record):
    cells = [v4.new_code_cell(f"print({n})\nobject()", id=f"cell-{n}") for n in range(2)]
    good = tmp_path / "good.ipynb"
    notebooks.write(v4.new_notebook(cells=cells), good)
    notebooks.run(good)
    changed = notebooks.read(good)
    changed.cells[1].outputs[0].text = "2\n"
    notebooks.write(changed, tmp_path / "changed.ipynb")
    done = _nbval(empty_record, good, tmp_path / "changed.ipynb")
    assert done.returncode == 1 and "1 failed, 3 passed" in done.stdout, done.stdout
    assert "changed.ipynb::Cell 1" in done.stdout
