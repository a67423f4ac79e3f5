"""The chapters, as shipped and solved; and that a notebook which is not whole is found out.

Budgets (seconds and GB of a chapter, quick profile, two cores) stand in budgets.json. A budget of
time is a promise that `make bench` reports on; here five times as much is the time-out.
"""

from __future__ import annotations

import ast
import base64
import copy
import inspect
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import pytest
from nbformat import v4

from course_utils import notebooks
from course_utils.__main__ import main
from course_utils.exercises import CHAPTERS, judge, record, registry
from course_utils.notebook_rules import check
from course_utils.notebooks import NotebookError, code_cells, compare, execute, exercise_cells

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = json.loads((ROOT / "tests" / "budgets.json").read_text("utf-8"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


# --- the chapters -------------------------------------------------------------------------------


def test_every_chapter_has_a_notebook_and_a_budget():
    names = [f"{number:02}_{chapter}" for number, chapter in enumerate(CHAPTERS, 1)]
    assert [path.stem for path in NOTEBOOKS] == names == list(BUDGETS)


@pytest.mark.slow
@pytest.mark.must_run_in_ci
@EACH
def test_shipped_notebook_runs_to_the_stored_outputs(path):
    stored, budget = notebooks.read(path), BUDGETS[path.stem]
    done = execute(stored, path.parent, timeout=5 * budget["seconds"])
    assert compare(stored, done.notebook) == []
    assert done.peak_bytes <= budget["gigabytes"] * 1e9


@pytest.mark.slow
@pytest.mark.must_run_in_ci
@EACH
def test_solved_notebook_passes_every_check(path, empty_record):
    solved, budget = notebooks.solve(path), BUDGETS[path.stem]
    timeout = 5 * budget["seconds"]
    done = execute(solved, path.parent, strict=True, timeout=timeout, home=empty_record)
    states = {slug: entry["state"] for slug, entry in record.load().items()}
    assert states == dict.fromkeys(_slugs(solved), "passed")
    assert [text for cell in code_cells(done.notebook) for text in notebooks.unwanted(cell)] == []
    assert done.peak_bytes <= budget["gigabytes"] * 1e9


@EACH
def test_notebook_follows_the_rules(path):
    assert check([path]) == []


@EACH
def test_notebook_is_whole(path):
    """Every exercise of the chapter stands in it once, in order, and it ends as chapters do."""
    notebook, number = notebooks.read(path), int(path.stem[:2])
    assert _slugs(notebook) == [e.slug for e in registry().values() if e.chapter == number]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = [line for line in text.splitlines() if line.startswith("##")]
    assert "Further reading" in headings[-1]


@EACH
def test_stubs_are_not_attempted(path):
    """Each exercise cell, run with the imports that stand before it, is not yet an answer."""
    space, states = {"__name__": "__main__"}, {}
    for cell in code_cells(notebooks.read(path)):
        if "exercise" in cell.metadata:
            exercise = registry()[cell.metadata["exercise"]]
            exec(compile(cell.source, f"<{exercise.slug}>", "exec", dont_inherit=True), space)
            states[exercise.slug] = judge(exercise.slug, space[exercise.name]).state
        else:
            imports = [part for part in _statements(cell) if isinstance(part, _IMPORTS)]
            exec(compile(ast.Module(imports, []), "<imports>", "exec"), space)
    assert states == dict.fromkeys(states, "not attempted")
    assert states


def test_nothing_is_defined_twice():
    """In two notebooks, or in a notebook and what it can import; an exercise has its reference."""
    patterns = (
        "reference/*.py",
        "data/*.py",
        "training.py",
        "plots.py",
        "runtime.py",
        "learner.py",
    )
    files = [path for pattern in patterns for path in (ROOT / "course_utils").glob(pattern)]
    package = {name for path in files for name in _defined(path)}
    seen: dict[str, str] = {}
    twice = []
    for path in NOTEBOOKS:
        notebook = notebooks.read(path)
        for cell in code_cells(notebook):
            for name in _names(_statements(cell)):
                if name in package and "exercise" not in cell.metadata:
                    twice.append(f"{path.name} and the package define {name}")
                if seen.setdefault(name, path.name) != path.name:
                    twice.append(f"{seen[name]} and {path.name} define {name}")
    assert twice == []


_IMPORTS = (ast.Import, ast.ImportFrom)


def _slugs(notebook) -> list[str]:
    return [cell.metadata["exercise"] for cell in exercise_cells(notebook)]


def _statements(cell) -> list[ast.stmt]:
    """A cell's statements without magics and shell commands."""
    lines = (line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
    return ast.parse("\n".join(lines)).body


def _names(body: list[ast.stmt]) -> list[str]:
    return [part.name for part in body if isinstance(part, (ast.FunctionDef, ast.ClassDef))]


def _defined(path: Path) -> list[str]:
    return _names(ast.parse(path.read_text("utf-8")).body)


# --- a notebook that is not whole is found out --------------------------------------------------


def _png() -> str:
    """One white pixel."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0\xff")), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        parts.append(struct.pack(">I", len(data)) + kind + data + checksum)
    return base64.b64encode(b"".join(parts)).decode()


FIGURE = f"""from IPython.display import display

metadata = {{"image/png": {{"alt": "a white pixel"}}}}
display({{"image/png": "{_png()}"}}, metadata=metadata, raw=True)
display({{"text/plain": "Look at: the pixel"}}, raw=True)"""


def _made():
    """A notebook of a few cells, not yet run."""
    cells = [
        v4.new_markdown_cell("# Made up\n\nSee [the end](#The-end).", id="title"),
        v4.new_code_cell("x = [3, 1, 2]", id="list"),
        v4.new_code_cell("print(sorted(x))\nprint('sorted')", id="sorted"),
        v4.new_code_cell("import time\n\ntime.perf_counter()", id="clock"),
        v4.new_code_cell(FIGURE, id="figure"),
        v4.new_markdown_cell("## The end", id="end"),
        v4.new_code_cell("x.append(object())\nx", id="append"),
    ]
    cells[3].metadata["tags"] = ["nbval-ignore-output"]
    return notebooks.canonical(v4.new_notebook(cells=cells))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The made notebook after `run`."""
    path = tmp_path_factory.mktemp("made") / "made.ipynb"
    notebooks.write(_made(), path)
    notebooks.run(path)
    return notebooks.read(path)


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """The gate for shipped notebooks; what is not run again is what has the same sources."""
    folder, runs = tmp_path_factory.mktemp("gate"), {}

    def judged(notebook) -> list[str]:
        sources = json.dumps([cell.source for cell in notebook.cells])
        if sources not in runs:
            runs[sources] = execute(notebook, folder, timeout=60).notebook
        return compare(notebook, runs[sources])

    return judged


def _cell(notebook, name: str):
    return next(cell for cell in notebook.cells if cell.id == name)


def test_whole_notebook_is_found_whole(whole, gate, tmp_path):
    assert gate(whole) == []
    notebooks.write(whole, tmp_path / "whole.ipynb")
    assert check([tmp_path / "whole.ipynb"]) == []


def test_running_again_changes_nothing(whole, tmp_path):
    """But the ignored output: it is kept only where git knows it."""
    first, again = tmp_path / "first.ipynb", tmp_path / "again.ipynb"
    notebooks.write(whole, first)
    notebooks.write(whole, again)
    notebooks.run(again)
    texts = []
    for path in (first, again):
        clock = _cell(notebooks.read(path), "clock").outputs[0].data["text/plain"]
        texts.append(path.read_text("utf-8"))
        assert texts[-1].count(clock) == 1
        texts[-1] = texts[-1].replace(clock, "…")
    assert texts[0] == texts[1]


def test_ignored_output_of_a_committed_source_is_kept(whole, tmp_path, monkeypatch):
    path = tmp_path / "made.ipynb"
    notebooks.write(whole, path)
    monkeypatch.setattr(notebooks, "_committed", lambda path: {c.id: c for c in code_cells(whole)})
    before = path.read_bytes()
    notebooks.run(path)
    assert path.read_bytes() == before
    changed = copy.deepcopy(whole)
    _cell(changed, "clock").source += "  # changed"
    notebooks.write(changed, path)
    after = notebooks.run(path).notebook
    assert _cell(after, "clock").outputs != _cell(whole, "clock").outputs


def _empty(notebook):
    notebook.cells = []


def _only_text(notebook):
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def _without_outputs(notebook):
    for cell in code_cells(notebook):
        cell.outputs = []


def _stripped(notebook):
    """As nbstripout leaves it. nbval compares nothing where the count is missing, and passes it."""
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None


def _without_counts(notebook):
    """nbval passes this one too, whatever the outputs are."""
    for cell in code_cells(notebook):
        cell.execution_count = None


def _stopped_halfway(notebook):
    for cell in code_cells(notebook)[3:]:
        cell.outputs, cell.execution_count = [], None


def _reordered_outputs(notebook):
    one, other = _cell(notebook, "sorted"), _cell(notebook, "append")
    one.outputs, other.outputs = other.outputs, one.outputs


def _run_out_of_order(notebook):
    one, other = _cell(notebook, "list"), _cell(notebook, "sorted")
    one.execution_count, other.execution_count = other.execution_count, one.execution_count


def _one_character(notebook):
    output = _cell(notebook, "sorted").outputs[0]
    output.text = output.text.replace("2", "4")


def _last_newline(notebook):
    output = _cell(notebook, "sorted").outputs[0]
    output.text = output.text.removesuffix("\n")


def _image_lost(notebook):
    """nbval ignores images altogether."""
    del _cell(notebook, "figure").outputs[0]


def _alt_text_changed(notebook):
    _cell(notebook, "figure").outputs[0].metadata["image/png"]["alt"] = "a black pixel"


def _source_changed(notebook):
    _cell(notebook, "list").source = "x = [3, 1, 5]"


def _warns(notebook):
    _cell(notebook, "list").source += "\nimport sys\n\nprint('careful', file=sys.stderr)"


def _stored_stderr(notebook):
    """In a cell whose output is ignored, where nbval does not look."""
    _cell(notebook, "clock").outputs.append(v4.new_output("stream", name="stderr", text="oh"))


def _stored_error(notebook):
    _cell(notebook, "clock").outputs = [v4.new_output("error", ename="E", evalue="oh")]


def _ignored_output_lost(notebook):
    _cell(notebook, "clock").outputs = []


MUTATIONS = [
    _empty,
    _only_text,
    _without_outputs,
    _stripped,
    _without_counts,
    _stopped_halfway,
    _reordered_outputs,
    _run_out_of_order,
    _one_character,
    _last_newline,
    _image_lost,
    _alt_text_changed,
    _source_changed,
    _warns,
    _stored_stderr,
    _stored_error,
    _ignored_output_lost,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__.strip("_"))
def test_mutation_is_found(whole, gate, mutate):
    mutant = copy.deepcopy(whole)
    mutate(mutant)
    assert gate(mutant)


@pytest.mark.parametrize("keep", [0, 0.4, 0.999])
def test_cut_off_file_is_told_in_a_sentence(whole, tmp_path, keep):
    path = tmp_path / "cut.ipynb"
    text = notebooks.as_text(whole)
    path.write_text(text[: int(keep * (len(text) - 2))], "utf-8")
    with pytest.raises(NotebookError, match="is no notebook .* or it is cut off"):
        notebooks.read(path)
    assert len(check([path])) == 1


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def half(n):\n    return n / 0\n\nhalf(2)", "ZeroDivisionError: division by zero"),
        # nbval notices a dead kernel only when the time-out of the cell is over.
        ("import os\n\nos._exit(3)", "the kernel died"),
        ("while True: pass", "still running after 4 s"),
    ],
    ids=["error", "dead kernel", "endless"],
)
def test_run_that_fails_names_the_cell(tmp_path, source, told):
    notebook = _made()
    notebook.cells.append(v4.new_code_cell(source, id="last-one"))
    path = tmp_path / "made.ipynb"
    notebooks.write(notebook, path)
    before = path.read_bytes()
    with pytest.raises(NotebookError) as failure:
        notebooks.run(path, timeout=4 if "while" in source else 60)
    text = str(failure.value)
    assert "'last-one'" in text and source.splitlines()[0] in text and told in text
    assert len(text.splitlines()) <= 4
    assert path.read_bytes() == before


def test_kernel_gets_the_environment_and_this_process_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    monkeypatch.setenv("COURSE_PROFILE", "full")
    names = ("STRICT", "PROFILE", "PROGRESS", "THREADS")
    source = f"import os, sys\nprint(*(os.environ.get('COURSE_' + n) for n in {names}))\n"
    source += "print(os.listdir(os.environ['COURSE_HOME']), os.path.samefile(os.getcwd(), '.'))\n"
    source += "print(os.path.basename(os.getcwd()), sys.executable)"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source, id="one")])
    (tmp_path / "folder").mkdir()
    before = dict(os.environ)
    done = execute(notebook, tmp_path / "folder", threads=3)
    assert dict(os.environ) == before
    lines = done.notebook.cells[0].outputs[0].text.splitlines()
    assert lines[0] == "None quick 0 3"
    assert lines[1] == "['ipython'] True"
    assert lines[2] == f"folder {sys.executable}"
    strict = execute(notebook, tmp_path, strict=True)
    assert strict.notebook.cells[0].outputs[0].text.startswith("1 quick")


def test_peak_memory_is_measured(tmp_path):
    source = "x = bytearray(300_000_000)\nx[::4096] = b'1' * len(x[::4096])\ndel x"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source, id="one")])
    assert 0.3e9 < execute(notebook, tmp_path).peak_bytes < 0.6e9


# --- exercises: solved, graded, ruled ------------------------------------------------------------

CHECK_CELL = """from course_utils import check

unbroadcast = check("unbroadcast", unbroadcast)"""
STUB = """def unbroadcast(grad: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    \"\"\"The gradient for an input of shape `shape` that was broadcast.\"\"\"
    raise NotImplementedError"""


def _with_exercise(answer: str = STUB):
    cells = [
        v4.new_markdown_cell("# Made up", id="title"),
        v4.new_code_cell("import torch", id="imports"),
        v4.new_code_cell(answer, id="ex-unbroadcast", metadata={"exercise": "unbroadcast"}),
        v4.new_code_cell(CHECK_CELL, id="check-unbroadcast"),
        v4.new_code_cell("unbroadcast(torch.ones(2, 3), (3,))", id="use"),
    ]
    return notebooks.canonical(v4.new_notebook(cells=cells))


@pytest.fixture(scope="module")
def with_exercise(tmp_path_factory):
    """A notebook with one exercise, as shipped, after `run`."""
    path = tmp_path_factory.mktemp("exercise") / "made.ipynb"
    notebooks.write(_with_exercise(), path)
    notebooks.run(path)
    return path


def test_solved_form_differs_in_the_exercise_cell_only(with_exercise, tmp_path):
    out = tmp_path / "solved.ipynb"
    notebooks.solve(with_exercise, out)
    shipped, solved = notebooks.read(with_exercise), notebooks.read(out)
    assert "2., 2., 2." in str(_cell(shipped, "use").outputs)
    reference = registry()["unbroadcast"].reference
    assert _cell(solved, "ex-unbroadcast").source + "\n" == inspect.getsource(reference)
    for cell in code_cells(shipped):
        cell.outputs, cell.execution_count = [], None
    _cell(shipped, "ex-unbroadcast").source = _cell(solved, "ex-unbroadcast").source
    assert shipped == solved


def test_solved_form_passes_strictly_and_the_shipped_one_does_not(with_exercise, tmp_path):
    execute(notebooks.solve(with_exercise), tmp_path, strict=True)
    with pytest.raises(NotebookError, match="check-unbroadcast.*NotPassed: unbroadcast"):
        execute(notebooks.read(with_exercise), tmp_path, strict=True)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("def unbroadcast(grad, shape):\n    return grad", "wrong"),
        ("def unbroadcast(grad, shape):\n    return grad.sum_to_size(shape)", "passed"),
        ("1 / 0", "not attempted"),
    ],
    ids=["wrong", "right", "error"],
)
def test_grade(tmp_path, answer, state, empty_record):
    notebooks.write(_with_exercise(answer), tmp_path / "mine.ipynb")
    assert notebooks.grade(tmp_path / "mine.ipynb") == {"unbroadcast": state}
    assert os.environ["COURSE_HOME"] == str(empty_record)
    assert record.load() == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "There is no file"),
        ("{", "is no notebook"),
        ('{"cells": 3, "nbformat": 4}', "is no notebook"),
        ('{"cells": [], "nbformat": 3, "metadata": {}}', "is no notebook"),
        ("slug", "there is no exercise 'unbrodcast'; did you mean unbroadcast"),
    ],
    ids=["missing", "no JSON", "no cells", "old", "unknown slug"],
)
def test_what_cannot_be_solved_is_told_in_a_sentence(tmp_path, capsys, text, told):
    path = tmp_path / "file.ipynb"
    if text == "slug":
        notebook = _with_exercise()
        _cell(notebook, "ex-unbroadcast").metadata["exercise"] = "unbrodcast"
        notebooks.write(notebook, path)
    elif text is not None:
        path.write_text(text, "utf-8")
    assert notebooks.main(["solve", str(path), "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1
    assert main(["solve", str(path), "-o", str(tmp_path / "out.ipynb")]) == 2


def _breach(name: str, source: str):
    def mutate(notebook):
        _cell(notebook, name).source = source

    return mutate


def _no_check(notebook):
    notebook.cells.remove(_cell(notebook, "check-unbroadcast"))


def _twice_an_id(notebook):
    _cell(notebook, "use").id = "imports"


def _editors_id(notebook):
    _cell(notebook, "use").id = "6f1c2a9e-0b57-4a52-9d67-0fdd1d4f7a4e"


def _tagged_to_skip(notebook):
    _cell(notebook, "use").metadata["tags"] = ["nbval-skip"]


def _timed(notebook):
    _cell(notebook, "use").metadata["execution"] = {"iopub.execute_input": "2025-01-01T00:00:00Z"}


def _figure_without(part: str):
    def mutate(notebook):
        image = v4.new_output("display_data", {"image/png": _png(), "text/plain": "Figure: white"})
        caption = v4.new_output("display_data", {"text/plain": "Look at: the pixel"})
        if part != "alt":
            image.metadata["image/png"] = {"alt": "white"}
        _cell(notebook, "use").outputs = [image] if part == "caption" else [image, caption]

    return mutate


def _too_large(notebook):
    _cell(notebook, "title").source += "\n" + "a " * 250_000


BREACHES = {
    "another name": (_breach("ex-unbroadcast", "def unbroad(grad, shape): ..."), "defines unbroad"),
    "another signature": (
        _breach("ex-unbroadcast", "def unbroadcast(grad, size): ..."),
        "is (grad, size), and the reference's is (grad, shape)",
    ),
    "more than the stub": (_breach("ex-unbroadcast", STUB + "\n\nx = 1"), "and nothing else"),
    "no check": (_no_check, "does not call check"),
    "another check": (
        _breach("check-unbroadcast", "check('unbroadcast', torch.sum)"),
        "does not call check",
    ),
    "id twice": (_twice_an_id, "have the id 'imports'"),
    "editor's id": (_editors_id, "says nothing"),
    "skip tag": (_tagged_to_skip, "unknown tag 'nbval-skip'"),
    "nbval comment": (_breach("use", "# NBVAL_IGNORE_OUTPUT\n1"), "use a cell tag"),
    "timing": (_timed, "not in canonical form"),
    "long cell": (_breach("use", "x = 1\n" * 25 + "x"), "26 lines; 25 is the most"),
    "no alt text": (_figure_without("alt"), "without alt text"),
    "no caption": (_figure_without("caption"), "without a caption"),
    "too large": (_too_large, "500,000 is the most"),
    "dead link": (_breach("title", "# Made up\n\n[here](nowhere.md)"), "leads nowhere"),
    "dead anchor": (_breach("title", "# Made up\n\n[here](#nowhere)"), "no heading"),
    "image without alt": (_breach("title", "# Made up\n\n![](made.ipynb)"), "alt text"),
    "path of a machine": (_breach("use", "open('/home/someone/x')"), "absolute path"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_breach_of_a_rule_is_found(with_exercise, breach):
    """Each one in a copy of a notebook that had none."""
    assert check([with_exercise]) == []
    mutate, told = BREACHES[breach]
    notebook, path = notebooks.read(with_exercise), with_exercise.with_name("breach.ipynb")
    mutate(notebook)
    notebooks.write(notebook, path)
    assert any(told in problem for problem in check([path]))
