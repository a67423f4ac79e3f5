"""How one answer is judged, and that nothing it does reaches the learner's kernel."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FunctionType

import numpy as np
import pytest
import torch

from course_utils.exercises import judge, registry
from course_utils.exercises.engine import Exercise, Misconception, diagnose, kept_state, unchanged
from course_utils.exercises.sandbox import Sandbox
from course_utils.exercises.sandbox import judge as judge_in
from course_utils.exercises.source import source_of

REFERENCE = registry()["unbroadcast"].reference


def scale(x: torch.Tensor) -> torch.Tensor:
    """Twice x."""
    return 2 * x


def _observe(scale, see):
    for shape in ((4, 3), (2, 5)):
        with see.probe(f"x of shape {shape}"):
            x = see.randn(*shape, requires_grad=True)
            out = see.call("the output", scale, x)
            see.gradients("the output", out, x=x)


TOY = Exercise(
    slug="scale",
    chapter=0,
    title="Scale",
    minutes=1,
    difficulty=1,
    reference=scale,
    observe=_observe,
    misconceptions=(Misconception("tripled", lambda x: 3 * x, "You tripled it."),),
    alternatives=(lambda x: x + x,),
    hints=("double", "twice"),
)


def told(candidate) -> str:
    verdict = diagnose(TOY, candidate)
    assert verdict.state == "wrong"
    return verdict.message


def test_right_answers_in_other_clothes_pass():
    for answer in (lambda x: x + x, functools.partial(torch.mul, 2), lambda x, extra=1: x.mul(2)):
        assert diagnose(TOY, answer).state == "passed"
    assert diagnose(TOY, torch.nn.Sequential(torch.nn.Identity())).state == "wrong"


def test_nothing_passes_where_the_reference_itself_fails():
    def broken(scale, see):
        with see.probe("any"):
            see("one", 1)
            raise OSError("no process could be started")

    verdict = diagnose(replace(TOY, observe=broken), lambda x: 2 * x)
    assert verdict.state == "wrong" and verdict.details == {"problem": "reference"}
    assert verdict.message.startswith("`scale` could not be judged here: the worked answer itself")
    assert "no process could be started" in verdict.message


def test_a_known_mistake_is_named_and_another_is_not():
    verdict = diagnose(TOY, lambda x: x * 3.0)
    assert verdict.misconception == "tripled"
    assert verdict.message.startswith("You tripled it.")
    verdict = diagnose(TOY, lambda x: 3 * x if x.shape[0] == 4 else x)
    assert verdict.misconception is None, "tripled on one probe only is not that mistake"
    assert "1.5 times" in verdict.message


def test_each_kind_of_wrong_has_its_sentence():
    assert "is None: is a `return` missing?" in told(lambda x: None)
    assert "should be Tensor of shape (4, 3), float64, and is 'two'" in told(lambda x: "two")
    assert "should have shape (4, 3), and has shape (3, 4)" in told(lambda x: 2 * x.T)
    assert "should have dtype torch.float64, and has dtype torch.float32" in told(
        lambda x: 2 * x.float()
    )
    assert "cut off from the graph" in told(lambda x: 2 * x.detach())
    assert "the sign is flipped everywhere" in told(lambda x: -2 * x)
    assert "yours are all zero" in told(lambda x: 0 * x)
    assert "of them NaN" in told(lambda x: x * torch.nan)
    assert "+1 off" in told(lambda x: 2 * x + 1)
    assert "modified its input in place" in told(lambda x: x.data.mul_(2) + 0 * x)


def test_values_with_a_wrong_gradient_are_found():
    message = told(lambda x: x + x.detach())
    assert "gradient of x (the output)" in message
    assert "0.5 times" in message
    assert "Right so far on this probe: the output" in message


def test_the_worst_elements_are_listed():
    def one_wrong(x):
        out = 2 * x
        out[1, 2] += 7.0
        return out

    verdict = diagnose(TOY, one_wrong)
    assert "1 wrong value out of 12" in verdict.message
    (place, expected, got) = verdict.details["worst"][0]
    assert place == (1, 2) and got == pytest.approx(expected + 7)


def test_an_exception_is_told_with_line_and_shapes():
    def broken(x):
        return x @ x

    verdict = diagnose(TOY, broken)
    first = verdict.message.splitlines()[0]
    assert first.startswith("`scale` raised RuntimeError on Tensor of shape (4, 3), float64")
    assert "`return x @ x`" in first
    assert verdict.details["error"]["type"] == "RuntimeError"


def test_not_written_yet():
    def stub(x):
        raise NotImplementedError

    def half_written(x):
        if x.shape[0] == 2:
            raise NotImplementedError
        return 2 * x

    assert diagnose(TOY, stub).state == "not attempted"
    verdict = diagnose(TOY, half_written)
    assert verdict.state == "wrong" and "not written yet" in verdict.message
    verdict = judge("dropout", torch.nn.Module)
    assert verdict.state == "wrong", "torch's own NotImplementedError is no stub"


def test_unchanged_sees_through_comments_and_layout_only():
    space = {"torch": torch}
    exec("def f(x):\n    return x + 1", space)
    one = space["f"]
    exec("def f(x):\n    # a remark\n    return (x +\n      1)", space)
    assert unchanged(one, space["f"])
    exec("def f(x):\n    return x + 2", space)
    assert not unchanged(one, space["f"])
    exec("def g(x):\n    return x + 1", space)
    assert not unchanged(one, space["g"])
    assert not unchanged(one, 3)


@pytest.mark.parametrize("slug", [s for s in registry() if s.startswith("fix_")])
@pytest.mark.parametrize("source_at_hand", [True, False])
def test_a_shipped_cell_is_known_again(slug, source_at_hand):
    """As a notebook runs it, and as a program does that has only the compiled cell."""
    shipped = registry()[slug].shipped
    text = f"# as shipped\n{inspect.getsource(shipped)}"
    file = f"<{slug}>"
    if source_at_hand:
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math}
    space |= {"__name__": "__main__", "Callable": Callable, "Sequence": Sequence}
    exec(compile(text, file, "exec", dont_inherit=True), space)
    assert judge(slug, space[shipped.__name__]).state == "not attempted"


# --- what the sandbox keeps away from the kernel -------------------------------------------------


def _everything_goes_wrong(grad, shape):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.sum = None
    random.seed(0)
    np.random.seed(0)
    os.chdir("/")
    os.environ["COURSE_HOME"] = "/nowhere"
    sys.path.clear()
    warnings.simplefilter("error")
    sys.setrecursionlimit(90)
    threading.Thread(target=lambda: [time.sleep(1) for _ in range(100)]).start()
    return REFERENCE(grad, shape)


def _state():
    return (
        torch.get_rng_state().sum().item(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.sum is not None,
        hash(random.getstate()),
        np.random.get_state()[1].sum(),
        os.getcwd(),
        os.environ.get("COURSE_HOME"),
        len(sys.path),
        len(warnings.filters),
        sys.getrecursionlimit(),
        threading.active_count(),
    )


def test_no_state_leaks_into_the_kernel():
    judge("unbroadcast", REFERENCE)  # the worker's reader thread exists from here on
    before = _state()
    assert judge("unbroadcast", _everything_goes_wrong).state == "passed"
    assert _state() == before
    assert judge("unbroadcast", REFERENCE).state == "passed", "nor into the next judgement"


def test_answers_that_run_in_the_kernel_leave_no_state_either():
    before = _state(), torch.get_default_device(), list(sys.path)
    with kept_state():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        sys.path.clear()
        os.chdir("/")
    assert (_state(), torch.get_default_device(), list(sys.path)) == before


def _exits(grad, shape):
    os._exit(0)


def _kills_itself(grad, shape):
    os.kill(os.getpid(), 9)


def _crashes(grad, shape):
    import ctypes

    ctypes.string_at(0)


def _exits_politely(grad, shape):
    sys.exit("done")


def _recurses(grad, shape):
    return _recurses(grad, shape)


def _recurses_below_python(grad, shape):
    sys.setrecursionlimit(10**8)
    return _recurses(grad, shape)


def _interrupts(grad, shape):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (_exits, "ended its Python process"),
        (_kills_itself, "SIGKILL"),
        (_crashes, "SIGSEGV"),
        (_exits_politely, "sys.exit()"),
        (_recurses, "calls itself without end"),
        (_recurses_below_python, "`unbroadcast`"),
        (_interrupts, "KeyboardInterrupt"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.skipif(sys.platform != "linux", reason="answers are forked on Linux only")
def test_an_answer_that_ends_its_process_gets_a_sentence(answer, sentence, monkeypatch):
    monkeypatch.setenv("COURSE_TIME_LIMIT", "3")
    verdict = judge("unbroadcast", answer)
    assert verdict.state == "wrong"
    assert sentence in verdict.message.splitlines()[0]


class _PlainText(str):
    def __repr__(self):
        raise RuntimeError


def _breaks_torch(grad, shape):
    torch.allclose = None
    return REFERENCE(grad, shape)


def _writes_into_every_file(grad, shape):
    for file in range(3, 64):
        try:
            os.write(file, b"\xff" * 64)
        except OSError:
            pass
    return REFERENCE(grad, shape)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda grad, shape: REFERENCE(grad, shape).to_sparse(), "should be an ordinary dense"),
        (lambda grad, shape: torch.nested.nested_tensor([grad]), "is nested Tensor"),
        (lambda grad, shape: 10**5000, "is int beyond 2**1000"),
        (lambda grad, shape: _PlainText("x"), "and is 'x'"),
        (lambda grad, shape: "\ud800", r"\ud800"),
        (lambda grad, shape: REFERENCE(grad, shape) / 0, "of them infinite"),
        (lambda grad, shape: exit(), "sys.exit()"),
        (lambda grad, shape: breakpoint(), "remove `breakpoint()`"),
        (_breaks_torch, "could not be judged: reading what it is or did raised TypeError"),
        (_writes_into_every_file, "ended its Python process"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="answers are forked on Linux only")
def test_odd_answers_get_a_sentence(answer, sentence):
    verdict = judge("unbroadcast", answer)
    assert verdict.state == "wrong"
    assert sentence in verdict.message.splitlines()[0]
    verdict.message.encode("utf-8")
    assert judge("unbroadcast", REFERENCE).state == "passed"


def test_a_class_that_cannot_be_looked_at():
    class Refuses(type):
        def __getattribute__(cls, name):
            raise RuntimeError(name)

    verdict = judge("unbroadcast", Refuses("Hidden", (), {}))
    assert verdict.state == "wrong" and "could not be judged" in verdict.message


def test_what_is_printed_can_be_shown():
    def prints(grad, shape):
        print("\ud800")
        return REFERENCE(grad, shape)

    assert judge("unbroadcast", prints).details["printed"].startswith(r"\ud800")


def test_modules_of_their_own_class_are_sent():
    """torch.backends.cudnn is one, which cloudpickle alone cannot send."""
    from course_utils.processes import packed

    def answer(grad, shape):
        torch.backends.cudnn.deterministic = True
        return REFERENCE(grad, shape)

    assert packed(answer)


@pytest.mark.parametrize("slug", ["unbroadcast", "checkpoint", "batch_norm_1d"])
@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize(
    "surroundings", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")]
)
def test_a_right_answer_passes_whatever_the_notebook_has_set(slug, sent, surroundings):
    answer = registry()[slug].reference
    if not sent:
        lock = threading.Lock()
        if isinstance(answer, type):
            answer = type(answer)(answer.__name__, (answer,), {"lock": lock})
        else:
            answer = functools.partial(lambda lock, *args: REFERENCE(*args), lock)
    torch.set_default_dtype(torch.float64)
    try:
        with surroundings():
            assert judge(slug, answer).state == "passed"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_of_the_kernel_can_judge():
    code = (
        "import os; from course_utils.exercises import judge, registry\n"
        "reference = registry()['unbroadcast'].reference\n"
        "judge('unbroadcast', reference)\n"
        "pid = os.fork()\n"
        "state = judge('unbroadcast', reference).state\n"
        "if pid == 0: os._exit(0 if state == 'passed' else 1)\n"
        "print(state, os.waitpid(pid, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["passed", "0"], done.stderr


def _python_loop(grad, shape):
    while True:
        pass


def _loop_below_python(grad, shape):
    return sum(itertools.count())


def _loop_that_swallows(grad, shape):
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass


@pytest.mark.parametrize("answer", [_python_loop, _loop_below_python, _loop_that_swallows])
def test_an_endless_loop_is_stopped(answer, monkeypatch):
    monkeypatch.setenv("COURSE_TIME_LIMIT", "1")
    start = time.monotonic()
    verdict = judge("unbroadcast", answer)
    assert "did not come to an end within 1 seconds" in verdict.message
    assert time.monotonic() - start < 5
    assert judge("unbroadcast", REFERENCE).state == "passed"


def test_a_bad_time_limit_is_told(monkeypatch, capsys):
    for text in ("soon", "0", "nan", "inf", "1e12"):
        monkeypatch.setenv("COURSE_TIME_LIMIT", text)
        assert judge("unbroadcast", REFERENCE).state == "passed"
        assert f"COURSE_TIME_LIMIT is {text!r}" in capsys.readouterr().out


def _floods(grad, shape):
    for number in range(300_000):
        print(number)
    os.write(1, b"below Python\n")
    return REFERENCE(grad, shape)


def test_output_is_kept_short(capfd):
    verdict = judge("unbroadcast", _floods)
    assert verdict.state == "passed"
    assert verdict.details["printed"].startswith("0\n1\n2\n")
    assert len(verdict.details["printed"]) <= 2_000
    assert verdict.details["characters"] > 1_000_000
    assert capfd.readouterr().out == ""


LOCK = threading.Lock()


@functools.lru_cache
def _cached(grad, shape):
    return REFERENCE(grad, shape)


def test_answers_that_cannot_be_sent_are_judged_too(monkeypatch):
    lock = LOCK

    def holds_a_lock(grad, shape):
        with lock:
            return REFERENCE(grad, shape)

    def loops_with_a_lock(grad, shape):
        with lock:
            while True:
                pass

    assert judge("unbroadcast", holds_a_lock).state == "passed"
    assert judge("unbroadcast", _cached).state == "passed"
    assert judge("unbroadcast", torch.jit.script(_scripted)).state == "wrong"
    monkeypatch.setenv("COURSE_TIME_LIMIT", "1")
    assert "did not come to an end" in judge("unbroadcast", loops_with_a_lock).message


def _scripted(grad: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return grad


def test_answers_may_use_what_stands_beside_them():
    """Helpers and globals of the learner's notebook travel along."""
    space = {"torch": torch, "features": -1}
    exec(
        "def total(g): return g.reshape(-1, g.shape[features]).sum(0)\n"
        "class AddBias(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, bias): return x + bias\n"
        "    @staticmethod\n"
        "    def backward(ctx, g):\n"
        "        need_x, need_bias = ctx.needs_input_grad\n"
        "        return g if need_x else None, total(g) if need_bias else None\n",
        space,
    )
    assert judge("add_bias", space["AddBias"]).state == "passed"


def test_an_interrupt_leaves_a_working_judge(monkeypatch, tmp_path):
    """What 'interrupt kernel' does in the middle of a check."""
    marker = tmp_path / "marker"

    def endless(grad, shape):
        while True:
            marker.write_text("alive")

    monkeypatch.setenv("COURSE_TIME_LIMIT", "30")
    judge("unbroadcast", REFERENCE)
    threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge("unbroadcast", endless)
    assert marker.exists()
    assert time.monotonic() - start < 10
    assert not _running(marker), "the answer goes on"
    assert judge("unbroadcast", REFERENCE).state == "passed"


def _running(marker) -> bool:
    """Whether the file is still being touched."""
    time.sleep(0.5)
    before = marker.stat().st_mtime_ns
    time.sleep(0.5)
    return marker.stat().st_mtime_ns != before


def test_without_fork_a_lost_worker_is_replaced(monkeypatch):
    """The way of macOS and Windows."""
    sandbox = Sandbox(fork=False)
    exercise = registry()["unbroadcast"]
    try:
        assert judge_in(exercise, REFERENCE, sandbox).state == "passed"
        assert judge_in(exercise, _everything_but_patches, sandbox).state == "passed"
        monkeypatch.setenv("COURSE_TIME_LIMIT", "1")
        assert "did not come to an end" in judge_in(exercise, _python_loop, sandbox).message
        monkeypatch.delenv("COURSE_TIME_LIMIT")
        assert judge_in(exercise, REFERENCE, sandbox).state == "passed"
        assert "ended its Python process" in judge_in(exercise, _exits, sandbox).message
        assert judge_in(exercise, REFERENCE, sandbox).state == "passed"
    finally:
        sandbox.stop()


def _everything_but_patches(grad, shape):
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    os.chdir("/")
    return REFERENCE(grad, shape)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_ends_with_its_kernel():
    code = (
        "import os; from course_utils.exercises import judge, registry\n"
        "judge('unbroadcast', registry()['unbroadcast'].reference)\n"
        "from course_utils.exercises.sandbox import SANDBOX\n"
        "print(SANDBOX.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout.split()[-1])
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the worker outlived its kernel by ten seconds")


def test_unknown_slug():
    with pytest.raises(KeyError, match="did you mean .*add_bias"):
        judge("addbias", REFERENCE)
    with pytest.raises(KeyError, match="there is no exercise"):
        judge(["add_bias"], REFERENCE)


def test_import_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import course_utils\n"
        "took = time.perf_counter() - start\n"
        "heavy = {'torch', 'numpy', 'IPython', 'matplotlib', 'torchvision'} & set(sys.modules)\n"
        "print(took, *heavy)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        for _ in range(3)
    ]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.05


def test_an_answer_without_a_name_is_told_where_it_is_right():
    """Right without a mask, wrong with one, in a way that nobody has catalogued."""

    def attention(q, k, v, mask=None):
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.flip(-1), -1e30)
        return scores.softmax(-1) @ v

    verdict = judge("scaled_dot_product_attention", attention)
    assert verdict.state == "wrong" and verdict.misconception is None
    assert "Probe: a mask" in verdict.message
    last = verdict.message.splitlines()[-1]
    assert last.startswith("Right on 8 of 21 probes: ") and "no mask" in last
    assert "Right on" not in judge("merge_heads", lambda x: 3).message


# --- the text of an answer ----------------------------------------------------------------------

MARGIN = {  # definitions in which a line at the margin begins no statement
    "strings": '''def strings(x):
    text = """
def strings(y):
    pass
"""
    return text, (
1), x
''',
    "decorated": """@kept(
    function=None,
)
# a remark
@kept

@kept
def decorated(x):
    return x
""",
    "Held": '''@functools.total_ordering
@(
lambda c: c
)
class Held:
    """
def at_the_margin():
"""

    class Inner:
        """
At the margin.
"""

        def method(self):
            return 5

    def __lt__(self, other):
        return True
''',
    "made": """def made():
    def inner(x):
        return x

    return inner
""",
}
KEPT = "import functools\n\ndef kept(function=None):\n    return function or kept\n"
BRANCHES = "if not functools:\n    pass\nelse:\n    def chosen(x):\n        return x\n"


def test_source_is_found_where_the_margin_misleads():
    file, text = "<margin>", "\n".join([KEPT, *MARGIN.values(), BRANCHES])
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space = {}
    exec(compile(text, file, "exec", dont_inherit=True), space)
    for name, source in MARGIN.items():
        assert source_of(space[name]) == source
    inner = "def inner(x):\n    return x\n"
    assert source_of(space["made"]()) == inner
    assert source_of(space["chosen"]) == inner.replace("inner", "chosen")
    held = source_of(space["Held"].Inner)
    assert held.lstrip().startswith("class Inner:\n") and held.endswith("        return 5\n")
    space["chosen"].__name__ = "another"
    assert source_of(space["chosen"]) is None
    linecache.cache[file] = (9, None, ["def chosen(\n"] * 99, file)
    assert source_of(space["made"]) is None, "the file has changed since"


def test_source_of_a_catalogue_s_answer_is_found_without_parsing_the_catalogue(monkeypatch):
    """Once per check, in the learner's time."""
    sizes, parse = [], ast.parse
    monkeypatch.setattr(ast, "parse", lambda text: sizes.append(len(text)) or parse(text))
    for exercise in registry().values():
        for answer in (exercise.shipped, exercise.misconceptions[-1].implementation):
            if isinstance(answer, type | FunctionType):
                source_of(answer)
    assert len(sizes) > len(registry()) and max(sizes) < 20_000


def _adds(x, y):
    return x + y


def test_a_type_that_torch_does_not_take_is_no_empty_stub():
    """torch raises NotImplementedError itself; a finished answer must not be called a stub."""

    def observe_sum(add, see):
        with see.probe("two numbers"):
            see.call("the sum", add, see.randn(2), see.randn(2))

    fields = {"minutes": 1, "difficulty": 1, "misconceptions": (), "alternatives": (), "hints": ()}
    exercise = Exercise(
        slug="adds", chapter=1, title="Add", reference=_adds, observe=observe_sum, **fields
    )

    def bitwise(x, y):
        return x & y

    def stub(x, y):
        raise NotImplementedError

    verdict = diagnose(exercise, bitwise)
    assert verdict.state == "wrong" and "not implemented for" in verdict.message
    assert diagnose(exercise, stub).state == "not attempted"
