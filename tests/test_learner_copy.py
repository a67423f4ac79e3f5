"""An update of the course reaches the learner's copies and never costs them a cell."""

import copy
import json

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils.learner_copy import merge, refresh


def cell(key, source, kind="code", slug=None, outputs=None):
    made = {"id": key, "cell_type": kind, "metadata": {}, "source": source}
    if slug:
        made["metadata"]["exercise"] = slug
    if kind == "code":
        made |= {"outputs": [stream(outputs)] if outputs else [], "execution_count": None}
    return made


def stream(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def notebook(*cells):
    return {
        "cells": list(cells),
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def sources(nb):
    return [c["source"] for c in nb["cells"]]


def by_id(nb):
    return {c["id"]: c for c in nb["cells"]}


# ---- properties over random notebooks and edits ------------------------------------------------

KEYS = [f"cell-{n}" for n in range(7)]
SOURCES = ["", "x = 1", "x = 2", "# text", "def f():\n    return 3"]
cells = st.builds(
    cell,
    st.sampled_from(KEYS),
    st.sampled_from(SOURCES),
    st.sampled_from(["code", "code", "markdown"]),
    st.sampled_from([None, None, "add_bias", "swish"]),
    st.sampled_from([None, "1", "2"]),
)
notebooks = st.lists(cells, max_size=7, unique_by=lambda c: c["id"]).map(lambda c: notebook(*c))


@st.composite
def edited(draw, base, own):
    """`base` after random deletions, changes, new outputs, moves and new cells."""
    result = [copy.deepcopy(c) for c in base["cells"] if draw(st.integers(0, 4)) != 0]
    for c in result:
        if draw(st.integers(0, 3)) == 0:
            c["source"] = draw(st.sampled_from(SOURCES))
        if c["cell_type"] == "code" and draw(st.integers(0, 3)) == 0:
            c["outputs"], c["execution_count"] = [stream("3")], draw(st.integers(1, 9))
        if draw(st.integers(0, 5)) == 0:
            c["metadata"]["collapsed"] = True
    if draw(st.integers(0, 3)) == 0:
        result = draw(st.permutations(result))
    for n in range(draw(st.integers(0, 3))):
        key = f"{own}-{n}"
        new = cell(key, draw(st.sampled_from([*SOURCES, f"{own} = {n}"])), outputs=f"{own}")
        result.insert(draw(st.integers(0, len(result))), new)
    return notebook(*result)


@st.composite
def updates(draw):
    origin = draw(notebooks)
    return origin, draw(edited(origin, "new")), draw(edited(origin, "own"))


def content(c):
    return c["cell_type"], c["source"]


@given(updates())
def test_nothing_the_learner_wrote_is_lost_or_altered(update):
    origin, new, mine = update
    merged, _ = merge(origin, new, mine)
    was, now, found = by_id(origin), by_id(new), by_id(merged)
    for c in mine["cells"]:
        key = c["id"]
        if key not in was or content(was[key]) != content(c):
            assert content(found[key]) == content(c)
            if key not in now or content(now[key]) != content(c):
                assert found[key] == c  # outputs and metadata too


@given(updates())
def test_the_learner_gets_all_that_is_new_and_nothing_that_is_gone(update):
    origin, new, mine = update
    merged, notes = merge(origin, new, mine)
    was, now, had, found = map(by_id, (origin, new, mine, merged))
    changed_by_both = 0
    for key, c in now.items():
        if key not in was:
            assert content(found[key]) == content(c)
        elif key in had and content(had[key]) == content(was[key]):
            assert content(found[key]) == content(c)
        elif key not in had:
            assert key not in found
        else:
            changed_by_both += content(was[key]) != content(c) != content(had[key])
    for key in was.keys() - now.keys():
        kept = key in had and content(had[key]) != content(was[key])
        assert (key in found) == kept
        changed_by_both += kept
    assert len(notes) == changed_by_both


@given(updates())
def test_a_second_merge_changes_nothing(update):
    origin, new, mine = update
    merged, _ = merge(origin, new, mine)
    assert merge(new, new, merged) == (merged, [])


@given(updates())
def test_no_update_no_change_and_no_edit_the_course_itself(update):
    origin, new, mine = update
    assert merge(origin, origin, mine) == (mine, [])
    assert merge(origin, new, origin) == (new, [])


@given(updates())
def test_the_merged_notebook_is_valid_and_the_inputs_are_left_alone(update):
    before = copy.deepcopy(update)
    merged, _ = merge(*update)
    assert update == before
    nbformat.validate(merged)
    assert len(by_id(merged)) == len(merged["cells"])


@given(updates(), st.sampled_from(["no ids", "equal ids"]))
def test_cells_without_an_id_or_with_the_same_one_are_kept(update, damage):
    origin, new, mine = update
    for c in mine["cells"]:
        if damage == "no ids":
            del c["id"]
        else:
            c["id"] = "same"
    merged, _ = merge(origin, new, mine)
    nbformat.validate(merged)
    written = {c["source"] for c in mine["cells"]} - {c["source"] for c in origin["cells"]}
    assert written <= set(sources(merged))


# ---- single rules, each on the smallest example ------------------------------------------------


def test_a_new_cell_follows_its_predecessor_and_own_cells_stay_where_they_were():
    origin = notebook(cell("a", "a"), cell("b", "b"), cell("c", "c"))
    new = notebook(cell("a", "a"), cell("n", "new"), cell("b", "b"), cell("c", "c"))
    mine = notebook(cell("a", "a"), cell("b", "b"), cell("o", "own"), cell("c", "c"))
    assert sources(merge(origin, new, mine)[0]) == ["a", "new", "b", "own", "c"]


def test_a_new_order_of_the_course_is_taken_unless_the_learner_moved_cells():
    origin = notebook(cell("a", "a"), cell("b", "b"), cell("c", "c"))
    new = notebook(cell("c", "c"), cell("a", "a"), cell("b", "b"))
    mine = notebook(cell("a", "a"), cell("o", "own"), cell("b", "b"), cell("c", "c"))
    assert sources(merge(origin, new, mine)[0]) == ["c", "a", "own", "b"]
    moved = notebook(cell("b", "b"), cell("a", "a"), cell("c", "c"))
    assert sources(merge(origin, new, moved)[0]) == ["b", "a", "c"]


def test_outputs_of_the_learners_own_run_stay_while_the_source_is_the_same():
    origin = notebook(cell("a", "a", outputs="old"), cell("b", "b", outputs="old"))
    new = notebook(cell("a", "a", outputs="new"), cell("b", "b, changed", outputs="new"))
    ran = notebook(cell("a", "a", outputs="mine"), cell("b", "b", outputs="mine"))
    assert [c["outputs"][0]["text"] for c in merge(origin, new, ran)[0]["cells"]] == ["mine", "new"]
    assert [c["outputs"][0]["text"] for c in merge(origin, new, origin)[0]["cells"]] == ["new"] * 2


def test_the_slug_is_named_where_course_and_learner_both_changed_a_cell():
    origin = notebook(cell("a", "stub", slug="add_bias"), cell("b", "stub 2", slug="swish"))
    new = notebook(cell("a", "better stub", slug="add_bias"))
    mine = notebook(cell("a", "answer", slug="add_bias"), cell("b", "answer 2", slug="swish"))
    merged, notes = merge(origin, new, mine)
    assert sources(merged) == ["answer", "answer 2"]
    assert notes == [
        "Exercise `add_bias` has a new version in the course; yours is kept.",
        "Exercise `swish` is gone from the course; you changed it, so it stays.",
    ]


def test_source_as_list_or_string_is_the_same_source():
    origin = notebook(cell("a", ["x = 1\n", "y = 2"]))
    new, mine = notebook(cell("a", "z = 3")), notebook(cell("a", "x = 1\ny = 2"))
    assert sources(merge(origin, new, mine)[0]) == ["z = 3"]


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    course, work = tmp_path / "notebooks", tmp_path / "work"
    course.mkdir()
    origin = notebook(cell("a", "stub", slug="add_bias"), cell("b", "text", "markdown"))
    (course / "01_autograd.ipynb").write_text(json.dumps(origin), "utf-8")
    assert refresh(course, work) == []
    return course / "01_autograd.ipynb", work / "01_autograd.ipynb"


def read(path):
    return json.loads(path.read_text("utf-8"))


def again(folders):
    return refresh(folders[0].parent, folders[1].parent)


def test_a_copy_is_made_once_and_then_left_alone(folders):
    course, mine = folders
    assert mine.read_bytes() == course.read_bytes()
    mine.write_text(json.dumps(notebook(cell("a", "é answer"))), "utf-8")
    before = mine.read_bytes()
    assert again(folders) == []
    assert mine.read_bytes() == before
    assert not (mine.parent / ".backup").exists()


def test_an_update_is_merged_told_and_backed_up(folders):
    course, mine = folders
    mine.write_text(json.dumps(notebook(cell("a", "answer"), cell("b", "text", "markdown"))))
    before = mine.read_bytes()
    new = notebook(cell("a", "new stub", slug="add_bias"), cell("b", "better", "markdown"))
    course.write_text(json.dumps(new))
    told = again(folders)
    assert sources(read(mine)) == ["answer", "better"]
    assert (mine.parent / ".backup" / "01_autograd-1.ipynb").read_bytes() == before
    assert "work/.backup/01_autograd-1.ipynb" in told[0]
    assert "add_bias" in told[1] and len(told) == 2
    assert again(folders) == []


def test_backups_are_numbered_and_never_overwritten(folders):
    course, mine = folders
    for n in range(1, 4):
        before = mine.read_bytes()
        course.write_text(json.dumps(notebook(cell("a", f"stub {n}"))))
        again(folders)
        assert (mine.parent / ".backup" / f"01_autograd-{n}.ipynb").read_bytes() == before
    assert len(list((mine.parent / ".backup").iterdir())) == 3


DAMAGED = ["", "{", "[]", '{"cells": 3}', '{"cells": [{"source": 1}]}', '{"cells": [null]}']
DAMAGED += ["\udcff", '{"cells": [], "metadata": []}', '{"cells": [], "nbformat": "x"}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_copy_is_set_aside_and_told(folders, text):
    course, mine = folders
    mine.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = mine.read_bytes()
    told = again(folders)
    assert "not a readable notebook" in told[0] and ".backup/01_autograd-1.ipynb" in told[0]
    assert (mine.parent / ".backup" / "01_autograd-1.ipynb").read_bytes() == before
    assert mine.read_bytes() == course.read_bytes()


@pytest.mark.parametrize("origin", [None, "", "{"])
def test_without_a_readable_origin_nothing_of_the_learners_is_replaced(folders, origin):
    course, mine = folders
    kept = mine.parent / ".origin" / mine.name
    kept.unlink() if origin is None else kept.write_text(origin)
    mine.write_text(json.dumps(notebook(cell("a", "answer", slug="add_bias"))))
    course.write_text(json.dumps(notebook(cell("a", "stub 2", slug="add_bias"), cell("n", "new"))))
    told = again(folders)
    assert sources(read(mine)) == ["answer", "new"]
    assert "add_bias" in told[-1]


def test_an_interrupted_update_is_finished_at_the_next_start(folders, monkeypatch):
    course, mine = folders
    mine.write_text(json.dumps(notebook(cell("a", "answer"), cell("b", "text", "markdown"))))
    course.write_text(json.dumps(notebook(cell("a", "stub"), cell("b", "better", "markdown"))))
    origin = (mine.parent / ".origin" / mine.name).read_bytes()
    again(folders)
    (mine.parent / ".origin" / mine.name).write_bytes(origin)  # as if it had stopped before this
    merged = mine.read_bytes()
    again(folders)
    assert mine.read_bytes() == merged


def test_a_damaged_course_notebook_leaves_the_copy_alone(folders):
    course, mine = folders
    before = mine.read_bytes()
    course.write_text("<<<<<<< HEAD")
    assert "git checkout notebooks/01_autograd.ipynb" in again(folders)[0]
    assert mine.read_bytes() == before
