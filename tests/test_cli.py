"""python -m course_utils …"""

from __future__ import annotations

import ast

import nbformat
import pytest

from course_utils.__main__ import main
from course_utils.exercises import registry
from course_utils.exercises.scaffold import scaffold, slug_of


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AddBias", "add_bias"),
        ("RoundSTE", "round_ste"),
        ("MLP", "mlp"),
        ("BatchNorm1d", "batch_norm_1d"),
        ("DigitsDataset", "digits_dataset"),
        ("MultiHeadAttention", "multi_head_attention"),
        ("LoRALinear", "lora_linear"),
        ("ShardedAdamW", "sharded_adamw"),
        ("NaiveDDP", "naive_ddp"),
        ("unbroadcast", "unbroadcast"),
        ("adamw_step", "adamw_step"),
    ],
)
def test_slug_of(name, slug):
    assert slug_of(name) == slug


def test_new_exercise_prints_python(capsys):
    assert main(["new-exercise", "mlp", "GroupNorm"]) == 0
    text = capsys.readouterr().out
    ast.parse(text)
    assert "GROUP_NORM = Exercise(" in text and text == scaffold("mlp", "GroupNorm") + "\n"


def test_new_exercise_wants_a_name(capsys):
    assert main(["new-exercise", "mlp", "3d"]) == 2
    assert "'3d' is no name" in capsys.readouterr().err


def test_solve_writes_the_reference_into_exercise_cells(tmp_path, capsys):
    notebook = nbformat.v4.new_notebook()
    stub = nbformat.v4.new_code_cell("def unbroadcast(grad, shape):\n    raise NotImplementedError")
    stub.metadata["exercise"] = "unbroadcast"
    notebook.cells = [nbformat.v4.new_code_cell("import torch"), stub]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    out = tmp_path / "new folder" / "out.ipynb"
    assert main(["solve", str(tmp_path / "in.ipynb"), "-o", str(out)]) == 0
    solved = nbformat.read(out, as_version=4)
    assert solved.cells[0].source == "import torch"
    space = {}
    exec("import torch", space)
    exec(solved.cells[1].source, space)
    assert space["unbroadcast"](space["torch"].ones(2, 3), (3,)).tolist() == [2.0] * 3


def test_solve_tells_what_is_wrong(tmp_path, capsys):
    assert main(["solve", str(tmp_path / "none.ipynb"), "-o", str(tmp_path / "out.ipynb")]) == 2
    assert "none.ipynb" in capsys.readouterr().err
    (tmp_path / "bad.ipynb").write_text("not a notebook")
    assert main(["solve", str(tmp_path / "bad.ipynb"), "-o", str(tmp_path / "out.ipynb")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_status_lists_every_exercise(capsys):
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert all(slug in out for slug in registry())


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["solve", "a.ipynb", "-o", "b.ipynb", "--fast"])
    assert stop.value.code == 2
    assert "does not take --fast" in capsys.readouterr().err
