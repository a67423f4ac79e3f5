"""The rules for a chapter's notebook that show without running it; see `course_utils.notebooks`."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from .notebooks import (
    IGNORED,
    MAY_RAISE,
    NotebookError,
    as_text,
    canonical,
    code_cells,
    exercise_of,
    read,
    tags,
    unwanted,
    where,
)

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from .exercises.engine import Exercise

MAX_LINES, MAX_BYTES = 25, 500_000
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
_ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~$}>-])/(?:home|root|Users|tmp|work|usr|opt|var|mnt|private)/|\b[A-Z]:\\\w"
)


def check(paths: Iterable[str | Path]) -> list[str]:
    """Breaches of the rules for chapters that show without running them, each with its file."""
    return [f"{path}: {problem}" for path in paths for problem in _problems(Path(path))]


def _problems(path: Path) -> Iterator[str]:
    import nbformat

    try:
        notebook = read(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nbformat.validate(copy.deepcopy(notebook))  # it mends ids in place; they are told below
    except (NotebookError, nbformat.ValidationError) as error:
        yield str(error).splitlines()[0]
        return
    size = path.stat().st_size
    if size > MAX_BYTES:
        yield f"{size:,} bytes; {MAX_BYTES:,} is the most"
    if path.read_text("utf-8") != as_text(canonical(notebook)):
        yield f"not in canonical form: `python -m course_utils.notebooks run {path}` writes it"
    ids = [cell.get("id", "") for cell in notebook.cells]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        yield f"{ids.count(name)} cells have the id {name!r}"
    for name in ids:
        if not re.fullmatch(r"[a-z0-9-]{1,40}", name) or re.match(r"[0-9a-f]{8}(-|$)", name):
            yield f"the id {name!r} says nothing: take a short one, as `check-add-bias`"
    if not code_cells(notebook):
        yield "no code cells"
    headings = {_plain(text) for text in _headings(notebook)}
    for cell in notebook.cells:
        rules = [_paths]
        rules += [_code_rules, _figure_rules] if cell.cell_type == "code" else []
        for rule in rules:
            yield from (f"{where(cell)}: {problem}" for problem in rule(cell))
        if cell.cell_type == "markdown":
            for problem in _markdown_rules(cell.source, path.parent, headings):
                yield f"{where(cell)}: {problem}"
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count != number:
            yield (
                f"{where(cell)}: execution count {cell.execution_count} instead of {number}: "
                f"`python -m course_utils.notebooks run {path}`"
            )
            break
    for cell, after in zip_longest(code_cells(notebook), code_cells(notebook)[1:]):
        if "exercise" in cell.metadata:
            for problem in _exercise_rules(cell, after):
                yield f"{where(cell)}: {problem}"


def _code_rules(cell: NotebookNode) -> Iterator[str]:
    lines = cell.source.count("\n") + 1
    if lines > MAX_LINES:
        yield f"{lines} lines; {MAX_LINES} is the most"
    if not cell.source.strip():
        yield "empty code cell"
    if re.search(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.MULTILINE):
        yield "comment marker for nbval: use a cell tag, which learners do not see"
    for tag in tags(cell):
        if tag not in (IGNORED, MAY_RAISE):
            yield f"unknown tag {tag!r}"
    yield from unwanted(cell)


def _figure_rules(cell: NotebookNode) -> Iterator[str]:
    """plots.show stores a figure with its alt text, and right after it its caption."""
    for output, after in zip_longest(cell.outputs, cell.outputs[1:], fillvalue={}):
        for image in [mime for mime in output.get("data", {}) if mime.startswith("image/")]:
            if not output["metadata"].get(image, {}).get("alt", "").strip():
                yield "a figure without alt text: show it with a function of course_utils.plots"
            if not after.get("data", {}).get("text/plain", "").startswith("Look at: "):
                yield "a figure without a caption: show it with a function of course_utils.plots"


def _paths(cell: NotebookNode) -> Iterator[str]:
    texts = [cell.source]
    for output in cell.get("outputs", []):
        texts += [output.get("text", ""), output.get("evalue", "")]
        texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    for text in texts:
        found = _ABSOLUTE_PATH.search(text)
        if found:
            around = text[found.start() : found.start() + 40].split("\n")[0]
            yield f"the absolute path {around!r} of one machine"


def _headings(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield from re.findall(r"^#+\s+(.*)$", cell.source, re.MULTILINE)
            yield from re.findall(r"""<a\s+(?:id|name)=["'](.*?)["']""", cell.source)


def _plain(text: str) -> str:
    """Jupyter and GitHub make other anchors of one heading; both keep letters and digits."""
    return re.sub(r"[\W_]", "", text.lower())


def _markdown_rules(source: str, folder: Path, headings: set[str]) -> Iterator[str]:
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", source, flags=re.DOTALL)
    for alt in re.findall(r"!\[(.*?)\]\(", text):
        if not alt.strip():
            yield "an image without alt text"
    for image in re.findall(r"<img\b[^>]*>", text):
        if not re.search(r"""alt=["'][^"']+""", image):
            yield "an image without alt text"
    links = re.findall(r"\]\(\s*([^)\s]+)", text)
    links += re.findall(r"""\b(?:href|src)=["']([^"']+)""", text)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    for link in links:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        target, _, anchor = link.partition("#")
        if target and not (folder / target).exists():
            yield f"the link {link} leads nowhere"
        if not target and _plain(anchor) not in headings:
            yield f"the link {link} leads to no heading of this notebook"


def _exercise_rules(cell: NotebookNode, after: NotebookNode | None) -> Iterator[str]:
    try:
        exercise = exercise_of(cell)
    except NotebookError as error:
        yield str(error)
        return
    body = _statements(cell)
    if len(body) != 1 or not isinstance(body[0], _DEFINITIONS):
        yield "an exercise cell holds one function or class, and nothing else"
        return
    stub, reference = body[0], ast.parse(inspect.getsource(exercise.reference)).body[0]
    if type(stub) is not type(reference) or stub.name != reference.name:
        yield f"defines {stub.name}, where the reference is `{reference.name}`"
        return
    have, want = _signatures(stub), _signatures(reference)
    for name in have:
        if name not in want:
            yield f"defines {name}, which the reference does not have"
        elif have[name] != want[name]:
            yield f"{name} is ({have[name]}), and the reference's is ({want[name]})"
    missing = [n for n in want if n not in have and not re.match(r"_[^_]", n)]
    if missing and exercise.shipped is None:
        yield f"the reference's {', '.join(missing)} is not in the stub"
    if after is None or not _checks(after, exercise):
        yield f'the next code cell does not call check("{exercise.slug}", {reference.name})'


def _statements(cell: NotebookNode) -> list[ast.stmt]:
    try:
        return ast.parse(cell.source).body
    except SyntaxError:  # a magic; no part of an exercise or a check
        return []


def _signatures(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """Arguments without annotations of a function, or of each method; under a class's own name
    its bases."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base).split(".")[-1] for base in node.bases)
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    else:
        bases, methods = None, [node]
    found = {} if bases is None else {node.name: bases}
    for method in methods:
        arguments = copy.deepcopy(method.args)
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        static = "".join(f"@{ast.unparse(d)} " for d in method.decorator_list)
        found[method.name] = static + ast.unparse(arguments)
    return found


def _checks(cell: NotebookNode, exercise: Exercise) -> bool:
    wanted = ast.dump(ast.parse(f"check({exercise.slug!r}, {exercise.name})").body[0].value)
    nodes = (node for part in _statements(cell) for node in ast.walk(part))
    return any(isinstance(node, ast.Call) and ast.dump(node) == wanted for node in nodes)
