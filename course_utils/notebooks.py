"""The chapters' notebooks as files: run, solve, compare and grade them (`check`: notebook_rules).

    python -m course_utils.notebooks run notebooks/01_autograd.ipynb

`run` is the only writer of a chapter's outputs, so that running an unchanged chapter again changes
no byte of it. An exercise is a code cell with metadata {"exercise": slug}.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from .exercises.engine import Exercise

IGNORED, MAY_RAISE = "nbval-ignore-output", "raises-exception"
_PYTHON = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
METADATA = {"kernelspec": _PYTHON, "language_info": {"name": "python"}}
_KEPT_METADATA = ("exercise", "jupyter", "tags")
_WIDGET = "application/vnd.jupyter.widget-view+json"
_ADDRESS = re.compile(r"(?<= at )0x[0-9a-fA-F]+")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """A notebook that cannot be used as asked; the message is a sentence for its user."""


class Execution(NamedTuple):
    """What `execute` returns."""

    notebook: NotebookNode
    seconds: float  # wall time, with the start of the kernel
    peak_bytes: int  # of the kernel and its child processes, never less than what they took


# --- files --------------------------------------------------------------------------------------


def read(path: str | Path) -> NotebookNode:
    """The notebook in a file. Raises NotebookError where there is none or it is something else."""
    from nbformat import v4

    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise NotebookError(
            f"There is no file {path}: give the path of a notebook, as notebooks/01_autograd.ipynb."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise NotebookError(f"{path} cannot be read as a notebook: {reason}.") from None
    try:
        notebook = v4.reads(text)
        whole = notebook.nbformat == 4
        for cell in notebook.cells:
            whole &= isinstance(cell.source, str) and isinstance(cell.metadata, dict)
            whole &= cell.cell_type != "code" or isinstance(cell.outputs, list)
    except Exception:  # JSON cut off, or JSON of something else
        whole = False
    if not whole:
        raise NotebookError(
            f"{path} is no notebook (JSON with cells, nbformat 4), or it is cut off: "
            "open it in JupyterLab and save it again, or take a fresh copy."
        )
    return notebook


def write(notebook: NotebookNode, path: str | Path) -> None:
    """Write a notebook the one way in which all of them are written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(as_text(notebook), "utf-8", newline="\n")
    except OSError as error:
        raise NotebookError(f"{path} cannot be written: {error.strerror}.") from None


def as_text(notebook: NotebookNode) -> str:
    from nbformat import v4

    return v4.writes(notebook).rstrip("\n") + "\n"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercise_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in code_cells(notebook) if "exercise" in cell.metadata]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def where(cell: NotebookNode) -> str:
    """A cell by its id and the first line of its source."""
    first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
    return f"cell {cell.get('id', 'without an id')!r} (`{first[:60]}`)"


# --- the solved form ----------------------------------------------------------------------------


def solve(path: str | Path, out: str | Path | None = None) -> NotebookNode:
    """The solved form: each exercise cell holds the reference's source, and no outputs.

    Written to `out` where that is given. Raises NotebookError for a file that is no notebook and
    for a slug that the course does not have.
    """
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    for cell in exercise_cells(notebook):
        try:
            exercise = exercise_of(cell)
        except NotebookError as error:
            raise NotebookError(f"{path}, {error}") from None
        cell.source = inspect.getsource(exercise.reference).rstrip("\n")
    if out is not None:
        write(notebook, out)
    return notebook


def exercise_of(cell: NotebookNode) -> Exercise:
    from .exercises import find

    try:
        return find(str(cell.metadata["exercise"]))
    except KeyError as error:
        raise NotebookError(f"{where(cell)}: {error.args[0]}") from None


# --- running ------------------------------------------------------------------------------------


def environment(home: str | Path, *, threads: int = 1, strict: bool = False) -> dict[str, str]:
    """The environment variables with which a notebook gives the same output on every machine."""
    package = str(Path(__file__).resolve().parents[1])
    dropped = ("COURSE_STRICT", "MPLBACKEND", "PYTHONHASHSEED", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {
        **kept,
        "COURSE_HOME": str(home),
        "COURSE_PROFILE": "quick",
        "COURSE_PROGRESS": "0",
        "COURSE_THREADS": str(threads),
        "IPYTHONDIR": str(Path(home) / "ipython"),  # without the user's startup files
        "OMP_NUM_THREADS": str(threads),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger warns on the kernel's stderr
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        **({"COURSE_STRICT": "1"} if strict else {}),
    }


def execute(
    notebook: NotebookNode,
    folder: str | Path,
    strict: bool = False,
    timeout: float = 300,
    *,
    threads: int = 1,
    home: str | Path | None = None,
    stop_at_errors: bool = True,
) -> Execution:
    """Run a copy of `notebook` in `folder`, with a kernel of this Python.

    `timeout` is in seconds for the whole notebook; `home` is the folder of the record, by default
    an empty temporary one. Raises NotebookError, naming the cell, where a cell raises (unless it is
    tagged raises-exception, or `stop_at_errors` is False), the time is up, or the kernel died.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbformat import from_dict

    notebook = copy.deepcopy(notebook)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    current, peak, start = None, 0, time.monotonic()

    def began(cell: NotebookNode, **_) -> None:
        nonlocal current
        current = cell

    def ended(**_) -> None:
        nonlocal peak
        peak = max(peak, _peak_bytes(client.km.provisioner.pid))

    client = NotebookClient(
        notebook,
        km=_kernel_manager(),
        allow_errors=not stop_at_errors,
        log=_silent(),  # it would say what is raised below once more
        on_cell_start=began,
        on_cell_executed=ended,
        resources={"metadata": {"path": str(folder)}},
        startup_timeout=120,
        timeout_func=lambda cell: max(1, int(start + timeout - time.monotonic())),
    )
    client.owns_km = True  # the kernel ends with the notebook
    empty = tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True)
    with nullcontext(home) if home else empty as home:
        variables = environment(home, threads=threads, strict=strict)
        try:
            client.execute(env=variables, stderr=subprocess.DEVNULL)  # the kernel's own log
        except CellExecutionError as error:
            lines = _ANSI.sub("", error.traceback).splitlines()
            arrows = [line for line in lines if re.match("-+> ", line)]
            failure = "\n    ".join([f"{error.ename}: {_ANSI.sub('', error.evalue)}", *arrows[-3:]])
            raise NotebookError(f"{where(current)}: {failure}") from None
        except CellTimeoutError:
            raise NotebookError(
                f"{where(current)}: still running after {timeout:.0f} s, the time-out of a notebook"
            ) from None
        except DeadKernelError:
            raise NotebookError(f"{where(current)}: the kernel died") from None
        except RuntimeError as error:
            if current is not None:
                raise
            raise NotebookError(f"the kernel did not start: {error}") from None
        for cell in code_cells(notebook):
            text = json.dumps(cell.outputs).replace(json.dumps(str(home))[1:-1], "COURSE_HOME")
            cell.outputs = [from_dict(output) for output in json.loads(text)]
    return Execution(notebook, time.monotonic() - start, peak)


def _silent() -> logging.Logger:
    logger = logging.getLogger("course_utils.notebooks.nbclient")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    return logger


def _kernel_manager():
    """A manager whose kernel is this Python, whatever the user's kernelspec "python3" says."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(resource_dir="", **get_kernel_dict())

    return AsyncKernelManager(kernel_spec_manager=ThisPython())


def _peak_bytes(pid: int) -> int:
    """The sum of the largest sizes so far of a process and its children, an upper bound.

    The children load the libraries that the process has loaded, whose pages are the same ones; they
    are counted once. Where the system keeps no such marks (macOS), the sizes of now.
    """
    import psutil

    total = 0
    with suppress(psutil.NoSuchProcess):
        kernel = psutil.Process(pid)
        for process in [kernel, *kernel.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, FileNotFoundError):  # a child that has just ended
                total += _largest_size(process, of_files=process is kernel)
    return total


def _largest_size(process, of_files: bool) -> int:
    """In bytes; without `of_files` less the pages of files, as libraries are."""
    status = Path(f"/proc/{process.pid}/status")
    text = status.read_text() if status.exists() else ""
    largest, files = (re.search(rf"{name}:\s+(\d+) kB", text) for name in ("VmHWM", "RssFile"))
    if largest and files:
        return 1024 * (int(largest[1]) - (0 if of_files else int(files[1])))
    now = process.memory_info()
    return getattr(now, "peak_wset", now.rss)


# --- the canonical form -------------------------------------------------------------------------


def canonical(notebook: NotebookNode) -> NotebookNode:
    """A copy without what changes from run to run: timing, widget state, addresses, editor's marks.

    Ids, tags and execution counts stay; pieces of one stream become one output.
    """
    from nbformat import from_dict

    notebook = copy.deepcopy(notebook)
    notebook.metadata = from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in _KEPT_METADATA if key in cell.metadata}
        cell.metadata = from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = _outputs(cell.outputs, cell.execution_count)
    return notebook


def _outputs(outputs: list[NotebookNode], execution_count: int | None = None):
    """Outputs in their canonical form."""
    from nbformat import from_dict

    merged: list[dict] = []
    for output in json.loads(_ADDRESS.sub("0x...", json.dumps(outputs))):
        if output["output_type"] == "execute_result":
            output["execution_count"] = execution_count
        output.get("data", {}).pop(_WIDGET, None)
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            merged.append(output)
    return [from_dict(output) for output in merged]


def run(path: str | Path, *, timeout: float = 600, fresh: bool = False) -> Execution:
    """Execute a notebook as it stands and write it back in its canonical form.

    A cell tagged nbval-ignore-output keeps the committed output while its source is the committed
    one, so that timings and versions make no diff; `fresh` takes the new output there too.
    """
    path = Path(path)
    done = execute(read(path), path.resolve().parent, timeout=timeout)
    notebook = canonical(done.notebook)
    committed = {} if fresh else _committed(path)
    for cell in code_cells(notebook):
        before = committed.get(cell.get("id"))
        if IGNORED in tags(cell) and before and before.outputs and before.source == cell.source:
            cell.outputs = _outputs(before.outputs, cell.execution_count)
    write(notebook, path)
    return done._replace(notebook=notebook)


def _committed(path: Path) -> dict[str, NotebookNode]:
    """The code cells of the version in git's HEAD by id; none where there is no such version."""
    from nbformat import v4

    try:
        command = ["git", "show", f"HEAD:./{path.name}"]
        shown = subprocess.run(command, cwd=path.parent, capture_output=True)
        cells = code_cells(v4.reads(shown.stdout.decode())) if shown.returncode == 0 else []
    except Exception:  # no git, or something else was committed under this name
        return {}
    return {cell.get("id"): cell for cell in cells}


# --- comparing ----------------------------------------------------------------------------------


def compare(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """How a stored notebook differs from a run of it; an empty list where it does not.

    Every code cell has run, in order, nothing was written to stderr, no cell failed, and outputs
    are equal except in cells tagged nbval-ignore-output. Of images only the presence counts.
    """
    old_cells, new_cells = code_cells(stored), code_cells(fresh)
    if not old_cells:
        return ["it has no code cells, so nothing was run"]
    if [c.source for c in stored.cells] != [c.source for c in fresh.cells]:
        return ["the run is of other cells than those stored"]
    found = []
    for number, (old, new) in enumerate(zip(old_cells, new_cells, strict=True), 1):
        place = where(old)
        for name, cell in (("stored", old), ("fresh", new)):
            if cell.execution_count is None:
                found.append(f"{place}: never run in the {name} notebook")
            elif cell.execution_count != number:
                found.append(
                    f"{place}: out of order in the {name} notebook: cell {number} has "
                    f"execution count {cell.execution_count}"
                )
            found += [f"{place}: {problem} ({name})" for problem in unwanted(cell)]
        if IGNORED not in tags(old):
            found += [
                f"{place}: {text}"
                for text in _differing(_outputs(old.outputs), _outputs(new.outputs))
            ]
        elif new.outputs and not old.outputs:
            found.append(f"{place}: no stored output, and the run has some")
    return found


def unwanted(cell: NotebookNode) -> Iterator[str]:
    """Outputs that no cell of a chapter may have."""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            yield f"output on stderr: {output.text.strip().splitlines()[:1]}"
        if output.output_type == "error" and MAY_RAISE not in tags(cell):
            yield f"an error: {output.ename}: {output.evalue}"


def _differing(old: list[dict], new: list[dict]) -> Iterator[str]:
    for position, (one, other) in enumerate(zip_longest(old, new, fillvalue={}), 1):
        one, other = _parts(one), _parts(other)
        for part in sorted(one.keys() | other.keys()):
            if part not in one or part not in other:
                yield f"output {position} has {part} only {'stored' if part in one else 'fresh'}"
            elif one[part] != other[part]:
                lines = zip_longest(*(str(each[part]).splitlines(True) for each in (one, other)))
                was, now = next(pair for pair in lines if pair[0] != pair[1])
                yield f"output {position}, {part}: stored {was!r:.160}, fresh {now!r:.160}"


def _parts(output: dict) -> dict:
    """What is compared of an output: kind of part → value."""
    kind = output.get("output_type")
    if kind is None:
        return {}
    if kind == "stream":
        return {output["name"]: output["text"]}
    if kind == "error":
        return {"error": f"{output['ename']}: {output['evalue']}"}
    data = {
        mime: "" if mime.startswith("image/") else value for mime, value in output["data"].items()
    }
    return {kind: "", "metadata": json.dumps(output["metadata"], sort_keys=True), **data}


# --- grading ------------------------------------------------------------------------------------


def grade(path: str | Path, *, timeout: float = 600) -> dict[str, str]:
    """Run a learner's notebook with an empty record: slug → state of each of its exercises.

    Cells that fail do not stop the rest. Raises NotebookError for a file that is no notebook.
    """
    from .exercises import record

    notebook, before = read(path), os.environ.get("COURSE_HOME")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        try:
            folder = Path(path).resolve().parent
            execute(notebook, folder, timeout=timeout, home=home, stop_at_errors=False)
        except NotebookError as error:
            print(f"{path} was run only as far as {error}", file=sys.stderr)
        os.environ["COURSE_HOME"] = home
        try:
            entries = record.load()
        finally:
            if before is None:
                del os.environ["COURSE_HOME"]
            else:
                os.environ["COURSE_HOME"] = before
    slugs = [str(cell.metadata["exercise"]) for cell in exercise_cells(notebook)]
    return {slug: entries.get(slug, {}).get("state", "not attempted") for slug in slugs}


# --- the command line ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m course_utils.notebooks", description="Run, check, compare, solve notebooks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "execute and write canonically"),
        ("check", "the static rules"),
        ("compare", "execute and compare with the stored outputs"),
        ("solve", "write solved forms into a folder"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("files", nargs="+", type=Path, metavar="FILE")
        if name == "run":
            command.add_argument("--fresh", action="store_true", help="renew ignored outputs too")
        if name == "solve":
            command.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        from .notebook_rules import check

        problems = check(arguments.files)
        print("\n".join(problems) or f"{len(arguments.files)} notebooks follow the rules.")
        return 1 if problems else 0
    failed = False
    for path in arguments.files:
        try:
            if arguments.command == "solve":
                solve(path, arguments.output / path.name)
                continue
            if arguments.command == "run":
                done, differences = run(path, fresh=arguments.fresh), []
            else:
                stored = read(path)
                done = execute(stored, path.parent, timeout=600)
                differences = compare(stored, done.notebook)
        except NotebookError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        for difference in differences:
            print(f"{path}: {difference}")
        failed |= bool(differences)
        cells, memory = len(code_cells(done.notebook)), done.peak_bytes / 1e9
        print(f"{path}: {cells} code cells, {done.seconds:.1f} s, peak {memory:.2f} GB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
