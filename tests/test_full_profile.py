"""Chapter 2 as the full profile runs it, on real MNIST images: a sample of 7,000 and 1,000 of them.

The sample stands beside the repository, in ../shared/data/mnist/raw; where it is missing, the test
is skipped. Only two lines differ from the chapter: the profile, and the folder of the files.
"""

from __future__ import annotations

import ast
import gzip
from pathlib import Path

import pytest
from nbformat import v4

from course_utils import notebooks

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY.parent / "shared" / "data" / "mnist" / "raw"
NOTEBOOK = REPOSITORY / "notebooks" / "02_mlp.ipynb"
EXERCISES = ("digits_dataset", "mlp", "cross_entropy", "train_step", "evaluate", "dropout")
CELLS = """
    setup imports sizes root header torchvision-compare to-tensors-code split-code normalize-code
    baselines-code mlp-count first-fit recipe final final-table
    final-verdict confusion gallery-code deploy deploy-read
""".split()  # from the bytes to the network that another program loads; the side roads are left out

pytestmark = pytest.mark.slow


@pytest.fixture
def mnist_sample(tmp_path):
    """The folder that torchvision.datasets.MNIST takes as its root."""
    if not list(SAMPLE.glob("*-ubyte.gz")):
        pytest.skip("no sample of MNIST beside the repository (../shared/data/mnist/raw)")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in SAMPLE.glob("*-ubyte.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return tmp_path


def shortened(root: Path):
    """The solved chapter, cut down to CELLS, in the full profile, on the files under `root`."""
    notebook = notebooks.solve(NOTEBOOK)
    dashed = [slug.replace("_", "-") for slug in EXERCISES]
    wanted = {*CELLS, *(f"ex-{slug}" for slug in dashed), *(f"check-{slug}" for slug in dashed)}
    cells = [cell for cell in notebook.cells if cell.get("id") in wanted]
    assert {cell["id"] for cell in cells} == wanted, "cells of chapter 2 were renamed"
    for cell in cells:
        if cell["id"] == "root":
            cell.source = f"root = {str(root)!r}"
    first = v4.new_code_cell("import os; os.environ['COURSE_PROFILE'] = 'full'", id="full")
    before_final = [cell["id"] for cell in cells].index("final")
    chosen = v4.new_code_cell("chosen_p = 0.2", id="chosen")  # the chapter asks the validation part
    facts = "print(dict(n=n, shape=tuple(x_all.shape), accuracies=accuracies.tolist(), "
    facts += "nearest=(nearest_mean(x_exam) == y_exam).float().mean().item(), size=vars(size)))"
    last = v4.new_code_cell(facts, id="facts")
    notebook.cells = [first, *cells[:before_final], chosen, *cells[before_final:], last]
    return notebook


def test_the_full_profile_reads_real_mnist(mnist_sample):
    execution = notebooks.execute(
        shortened(mnist_sample), NOTEBOOK.parent, strict=True, timeout=300, threads=1
    )
    outputs = {cell["id"]: cell.outputs for cell in execution.notebook.cells}
    facts = ast.literal_eval(outputs["facts"][0].text)
    print(f"{execution.seconds:.0f} s, {facts}")  # shown by pytest -rP
    assert facts["shape"] == (7000, 1, 28, 28) and facts["n"] == 1000
    assert facts["size"]["hidden"] == 512, "these are not the sizes of the full profile"
    assert 0.78 < facts["nearest"] < 0.85  # measured 0.816; no random number but the split is in it
    # The goal of 98.3 % is for 60,000 images; these 7,000 gave 0.984, 0.980 and 0.974, where one
    # standard error of 1,000 test images is 0.005.
    assert len(facts["accuracies"]) == 3
    assert min(facts["accuracies"]) > 0.96, "a seed is worse than ever measured"
    assert sum(facts["accuracies"]) / 3 > 0.968
