"""What a learner calls, and what becomes of their answers."""

from __future__ import annotations

import importlib
import linecache

import pytest
import torch

import course_utils
from course_utils import learner
from course_utils.exercises import record, registry
from course_utils.exercises.engine import Verdict
from course_utils.exercises.source import self_contained, source_of, stub_of


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    learner._hints_shown.clear()
    return tmp_path / "home"


def cell(text: str, space: dict | None = None) -> dict:
    """Runs a notebook's cell as IPython does: in `__main__`'s name, its text in linecache."""
    space = {"__name__": "__main__", "torch": torch} if space is None else space
    file = f"<cell {len(linecache.cache)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), space)
    return space


RIGHT = """
LAST = -1

def total(grad):
    return grad.reshape(-1, grad.shape[LAST]).sum(0)

class AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, grad_output):
        needs_bias = ctx.needs_input_grad[1]
        return grad_output, total(grad_output) if needs_bias else None
"""
WRONG = RIGHT.replace(".sum(", ".mean(")


def test_a_right_answer_is_returned_recorded_and_mine(capsys):
    answer = cell(RIGHT)["AddBias"]
    assert course_utils.check("add_bias", answer) is answer
    assert "✅ add_bias: passed" in capsys.readouterr().out
    entry = record.load()["add_bias"]
    assert entry["state"] == "passed" and entry["attempts"] == 1
    mine = importlib.import_module("course_utils.mine")
    own = mine.AddBias
    assert own is not registry()["add_bias"].reference
    assert own.apply(torch.ones(2, 3), torch.ones(3)).tolist() == [[2.0] * 3] * 2
    assert mine.AddBias is own, "imported twice is one class"
    assert mine.MLP is registry()["mlp"].reference
    with pytest.raises(AttributeError, match="no exercise that builds 'Nothing'"):
        mine.Nothing  # noqa: B018


def test_a_wrong_answer_gives_the_reference_and_can_be_reported(capsys, home):
    answer = cell(WRONG)["AddBias"]
    assert course_utils.check("add_bias", answer) is registry()["add_bias"].reference
    out = capsys.readouterr().out
    assert "❌ add_bias: not right yet" in out and 'hint("add_bias")' in out
    course_utils.report("add_bias")
    out = capsys.readouterr().out
    assert "A right answer to `add_bias` was rejected" in out and "class AddBias" in out
    assert (home / "report-add_bias.md").exists()
    course_utils.report("mlp")
    assert "no rejected answer of mlp" in capsys.readouterr().out


def test_passed_stays_passed():
    course_utils.check("add_bias", cell(RIGHT)["AddBias"])
    course_utils.check("add_bias", cell(WRONG)["AddBias"])
    entry = record.load()["add_bias"]
    assert entry["state"] == "passed" and entry["attempts"] == 2
    assert ".sum(" in entry["source"]


def test_an_unwritten_stub_is_no_attempt(capsys):
    course_utils.check("add_bias", cell(stub_of(registry()["add_bias"].reference))["AddBias"])
    assert "⬜ add_bias: not attempted" in capsys.readouterr().out
    assert record.load()["add_bias"]["attempts"] == 0


def test_strict(monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(learner.NotPassed, match="add_bias is wrong"):
        course_utils.check("add_bias", cell(WRONG)["AddBias"])
    answer = cell(RIGHT)["AddBias"]
    assert course_utils.check("add_bias", answer) is answer
    with pytest.raises(KeyError):
        course_utils.check("nothing", answer)


def test_an_unknown_slug_is_a_sentence(capsys):
    assert course_utils.check("ad_bias", 3) == 3
    course_utils.hint("ad_bias")
    course_utils.solution("ad_bias")
    course_utils.reset("ad_bias")
    out = capsys.readouterr().out
    assert out.count("did you mean add_bias") == 4


def test_the_text_of_a_check_is_stable(capsys):
    answer = cell(WRONG)["AddBias"]
    course_utils.check("add_bias", answer)
    first = capsys.readouterr().out
    torch.manual_seed(7)
    course_utils.check("add_bias", answer)
    assert capsys.readouterr().out == first


def test_a_record_that_cannot_be_written_does_not_stop_the_check(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "file" / "home"))
    answer = cell(RIGHT)["AddBias"]
    assert course_utils.check("add_bias", answer) is answer
    out = capsys.readouterr().out
    assert "passed" in out and "This check is not recorded" in out
    course_utils.status()


def test_an_answer_is_judged_again_when_its_check_changed(capsys, monkeypatch):
    course_utils.check("add_bias", cell(RIGHT)["AddBias"])
    record.update(
        "add_bias", lambda entry: entry.update(fingerprint="old", source="import torch\n" + WRONG)
    )
    mine = importlib.import_module("course_utils.mine")
    assert mine.AddBias is registry()["add_bias"].reference
    assert "its check has become stricter" in capsys.readouterr().out
    record.update("add_bias", lambda entry: entry.update(source="import torch\n# again\n" + RIGHT))
    assert mine.AddBias is not registry()["add_bias"].reference
    assert record.load()["add_bias"]["fingerprint"] == registry()["add_bias"].fingerprint


def test_an_answer_that_no_longer_runs_gives_the_reference(capsys):
    course_utils.check("add_bias", cell(RIGHT)["AddBias"])
    record.update("add_bias", lambda entry: entry.update(source="import no_such_module"))
    mine = importlib.import_module("course_utils.mine")
    assert mine.AddBias is registry()["add_bias"].reference
    assert "does not run here" in capsys.readouterr().out


SUM = "grad.sum(AXES) if SCALE < inf else grad"
UNBROADCAST = f"""
from math import inf
SCALE, AXES, OTHER = 1.0, (0,), torch.eye(3)

def reference(grad, shape):
    from course_utils.reference.autograd import unbroadcast
    return unbroadcast(grad, shape)

again = reference

def unbroadcast(grad, shape: OTHER = None):
    OTHER_NAME = {SUM}
    return again(grad, shape)
"""


def test_an_answer_takes_constants_and_renamed_helpers_along():
    answer = cell(UNBROADCAST)["unbroadcast"]
    assert course_utils.check("unbroadcast", answer) is answer
    own = importlib.import_module("course_utils.mine").unbroadcast
    assert own is not registry()["unbroadcast"].reference
    assert own(torch.ones(4, 3), (3,)).tolist() == [4.0] * 3


def test_an_answer_that_needs_more_than_its_record_gives_the_reference(capsys):
    answer = cell(UNBROADCAST.replace("return again", "OTHER.sum(); return again"))["unbroadcast"]
    assert course_utils.check("unbroadcast", answer) is answer
    mine = importlib.import_module("course_utils.mine")
    assert mine.unbroadcast is registry()["unbroadcast"].reference
    assert "does not run here" in capsys.readouterr().out


def test_answers_that_hide_what_they_are_are_recorded():
    class Hides:
        @property
        def __name__(self):
            raise RuntimeError

        def __call__(self, grad, shape):
            return grad

    def wraps_itself(grad, shape):
        return registry()["unbroadcast"].reference(grad, shape)

    wraps_itself.__wrapped__ = wraps_itself
    course_utils.check("unbroadcast", Hides())
    course_utils.check("unbroadcast", wraps_itself)
    entry = record.load()["unbroadcast"]
    assert entry["attempts"] == 2 and entry["name"] == "wraps_itself"


def test_hints_come_one_by_one(capsys):
    hints = registry()["add_bias"].hints
    for number in range(1, len(hints) + 1):
        course_utils.hint("add_bias")
        assert f"Hint {number} of {len(hints)}" in capsys.readouterr().out
    course_utils.hint("add_bias")
    assert "this is the last one" in capsys.readouterr().out
    course_utils.hint("add_bias", 1)
    assert "Hint 1 of" in capsys.readouterr().out
    course_utils.hint("add_bias", 99)
    assert "99 was asked for" in capsys.readouterr().out


def test_solution_shows_the_reference_and_the_mistakes(capsys):
    course_utils.solution("add_bias")
    out = capsys.readouterr().out
    assert "class AddBias(torch.autograd.Function)" in out
    assert out.count("\n- ") == len(registry()["add_bias"].misconceptions)


def test_status_and_reset(capsys):
    course_utils.check("add_bias", cell(RIGHT)["AddBias"])
    capsys.readouterr()
    course_utils.status()
    out = capsys.readouterr().out
    assert "Chapter 1: 1 of" in out and "✅ add_bias" in out and "1 attempt" in out
    course_utils.reset("add_bias")
    out = capsys.readouterr().out
    assert "raise NotImplementedError" in out and "starts anew" in out
    entry = record.load()["add_bias"]
    assert entry["state"] == "not attempted" and ".sum(" in entry["earlier"][0]


def test_source_of_a_notebook_class_and_function():
    space = cell(RIGHT)
    assert source_of(space["AddBias"]).startswith("class AddBias")
    assert source_of(space["total"]) == (
        "def total(grad):\n    return grad.reshape(-1, grad.shape[LAST]).sum(0)\n"
    )
    whole = self_contained(space["AddBias"])
    assert whole.startswith("import torch as torch")
    assert "LAST = -1" in whole and "def total" in whole
    assert source_of(len) is None and self_contained(3) is None


def test_html_is_escaped_and_needs_no_page_colour():
    from course_utils.exercises.display import as_html, as_text

    exercise = registry()["add_bias"]
    details = {"printed": "<script>\n" * 20, "characters": 180}
    verdict = Verdict("wrong", "`a < b` is <b>wrong</b>\n  at [1]: 3", "some_mistake", details)
    html = as_html(exercise, verdict)
    assert "<script>" not in html and "<b>wrong" not in html
    assert "<code>a &lt; b</code>" in html
    assert "background" not in html and "color:#000" not in html
    assert "characters more" in as_text(exercise, verdict)


def test_an_answer_without_a_text_gives_the_reference_and_says_so(capsys):
    reference = registry()["unbroadcast"].reference
    course_utils.check("unbroadcast", lambda grad, shape: reference(grad, shape))
    mine = importlib.import_module("course_utils.mine")
    assert mine.unbroadcast is reference
    assert "its text could not be recorded" in capsys.readouterr().out
