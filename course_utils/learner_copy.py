"""The learner's own copies of the notebooks, and how an update of the course reaches them.

`make lab` opens copies in `work/` (ignored by git). `work/.origin/` keeps the version that each
copy came from; when the course's notebook has changed since, a three-way merge by cell id brings
in what is new. A cell that the learner wrote or changed is never touched, only reported.
Standard library only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path


def merge(origin: dict, new: dict, mine: dict) -> tuple[dict, list[str]]:
    """Bring the changes from `origin` to `new` into the learner's notebook `mine`.

    Arguments are notebooks as nested dicts (nbformat 4) and are not modified. A cell whose source
    is as in `origin` becomes the cell of `new`, or goes if `new` has it no more; a cell of `new`
    that `origin` lacks is inserted after its predecessor; everything else of `mine` stays. Where
    the source did not change, outputs of the learner's own run are kept.

    Returns the merged notebook and one sentence for each cell where the course's change and the
    learner's met, so that the learner's was kept.
    """
    was, now = _by_id(origin), _by_id(new)
    cells, notes = {}, []
    for key, cell in _identify(mine, origin, new).items():
        old, coming = was.get(key), now.get(key)
        if coming is not None and _content(cell) == _content(coming):
            cells[key] = _with_own_run(old or coming, coming, cell)
        elif old is not None and _content(cell) == _content(old):
            if coming is not None:
                cells[key] = copy.deepcopy(coming)
        else:
            cells[key] = copy.deepcopy(cell)
            if old is not None and coming is None:
                notes.append(f"{_name(old)} is gone from the course; you changed it, so it stays.")
            elif coming is not None and (old is None or _content(old) != _content(coming)):
                notes.append(f"{_name(coming)} has a new version in the course; yours is kept.")
    theirs = [key for key in now if key in cells or key not in was]
    shared = set(was) & set(now) & set(cells)
    if [key for key in was if key in shared] == [key for key in cells if key in shared]:
        order = _weave(theirs, list(cells))
    else:  # the learner moved cells: their order holds
        order = _weave(list(cells), theirs)
    merged = {**_three_way(origin, new, mine), "cells": []}
    merged["metadata"] = _three_way(*(n.get("metadata", {}) for n in (origin, new, mine)))
    versions = [(n.get("nbformat", 4), n.get("nbformat_minor", 0)) for n in (new, mine)]
    merged["nbformat"], merged["nbformat_minor"] = max(versions)
    for key in order:
        cell = cells[key] if key in cells else copy.deepcopy(now[key])
        if max(versions) >= (4, 5):
            cell["id"] = key
        merged["cells"].append(cell)
    return merged, notes


def refresh(notebooks_dir: Path, work_dir: Path) -> list[str]:
    """Make or update a copy in `work_dir` of each notebook in `notebooks_dir`.

    Before a copy is changed it is saved as `work_dir/.backup/NAME-<n>.ipynb`. Returns sentences
    for the learner; none if there is nothing to tell.
    """
    told = []
    for path in sorted(Path(notebooks_dir).glob("*.ipynb")):
        course, mine_path = path.read_bytes(), Path(work_dir) / path.name
        origin_path = Path(work_dir) / ".origin" / path.name
        new = _parse(course)
        if new is None:
            told.append(
                f"{path.name} of the course is not a readable notebook; restore it with "
                f"`git checkout notebooks/{path.name}`."
            )
            continue
        mine = _parse(mine_path.read_bytes()) if mine_path.exists() else None
        if mine is None:
            if mine_path.exists():
                aside = _backup(mine_path)
                told.append(
                    f"{mine_path.name} was not a readable notebook: it is now {aside}, and you "
                    "have a fresh copy."
                )
            _write(origin_path, course)  # before the copy, so that a copy always has its origin
            _write(mine_path, course)
            continue
        before = origin_path.read_bytes() if origin_path.exists() else b""
        if before == course:
            continue
        origin = _parse(before) or {"cells": []}  # unknown: nothing of the learner's is replaced
        merged, notes = merge(origin, new, mine)
        if merged != mine:
            aside = _backup(mine_path)
            _write(mine_path, json.dumps(merged, indent=1).encode() + b"\n")
            told.append(
                f"{mine_path.name} was brought up to date with the course; "
                f"your version from before is {aside}."
            )
        told += [f"{mine_path.name}: {note}" for note in notes]
        _write(origin_path, course)
    return told


def _source(cell: dict) -> str:
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def _content(cell: dict) -> tuple:
    return cell.get("cell_type"), _source(cell), cell.get("attachments") or {}


def _slug(cell: dict) -> str | None:
    return cell.get("metadata", {}).get("exercise")


def _name(cell: dict) -> str:
    if _slug(cell):
        return f"Exercise `{_slug(cell)}`"
    start = _source(cell).strip().split("\n")[0][:50]
    return f"The cell that began with {start!r}" if start else "An empty cell"


def _by_id(notebook: dict) -> dict[str, dict]:
    return {cell["id"]: cell for cell in notebook.get("cells", []) if "id" in cell}


def _identify(mine: dict, origin: dict, new: dict) -> dict[str, dict]:
    """The learner's cells by id, in order. A cell without one (some editors drop them) or with
    one that stood before gets the id of the course's cell with its source or slug, else its own."""
    course = {**_by_id(origin), **_by_id(new)}
    present = {cell.get("id") for cell in mine["cells"]}
    free = {key: cell for key, cell in course.items() if key not in present}
    found = {}
    for cell in mine["cells"]:
        key = cell.get("id")
        if key is None or key in found:
            matches = [k for k, c in free.items() if _content(c) == _content(cell)]
            if _slug(cell):
                matches += [k for k, c in free.items() if _slug(c) == _slug(cell)]
            if matches and key is None:
                key = matches[0]
                del free[key]
            else:
                key = _new_id(cell, present | course.keys() | found.keys())
        found[key] = cell
    return found


def _new_id(cell: dict, taken: set) -> str:
    number = 0
    while True:
        digest = hashlib.sha256(f"{number} {_source(cell)}".encode("utf-8", "replace")).hexdigest()
        if f"own-{digest[:8]}" not in taken:
            return f"own-{digest[:8]}"
        number += 1


def _three_way(origin: dict, new: dict, mine: dict) -> dict:
    """`new`, with the keys that the learner's side changed since `origin`."""
    changed = {key: mine[key] for key in mine if key not in origin or mine[key] != origin[key]}
    dropped = {key for key in origin if key not in mine}
    return copy.deepcopy({**{k: v for k, v in new.items() if k not in dropped}, **changed})


def _with_own_run(old: dict, new: dict, mine: dict) -> dict:
    """The course's cell, with the learner's outputs if they ran it, and their metadata."""
    cell = copy.deepcopy(new)
    cell["metadata"] = _three_way(*(c.get("metadata", {}) for c in (old, new, mine)))
    run = ("outputs", "execution_count")
    if any(mine.get(key) != old.get(key) for key in run):
        cell.update({key: copy.deepcopy(mine[key]) for key in run if key in mine})
    return cell


def _weave(order: list[str], other: list[str]) -> list[str]:
    """`order`, with what only `other` has put after its predecessor there."""
    woven, previous = list(order), None
    for key in other:
        if key not in woven:
            woven.insert(0 if previous is None else woven.index(previous) + 1, key)
        previous = key
    return woven


def _parse(data: bytes) -> dict | None:
    """The notebook, or None if this is not one."""
    try:
        notebook = json.loads(data)
        notebook.setdefault("metadata", {}).keys()
        notebook.get("nbformat", 4) + notebook.get("nbformat_minor", 0)
        for cell in notebook["cells"]:
            _source(cell) + cell["cell_type"] + cell.get("id", "")
            cell["metadata"].keys()
        return notebook
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _backup(path: Path) -> str:
    """Copy `path` to the first free `.backup/NAME-<n>.ipynb` beside it; return that name."""
    folder = path.parent / ".backup"
    folder.mkdir(exist_ok=True)
    number = 1
    while True:
        aside = folder / f"{path.stem}-{number}{path.suffix}"
        try:
            with aside.open("xb") as file:
                file.write(path.read_bytes())
            return f"{path.parent.name}/.backup/{aside.name}"
        except FileExistsError:
            number += 1


def _write(path: Path, data: bytes) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
