"""Profile, device, seeds, threads and the report that `setup` prints."""

import random
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch

from course_utils import runtime


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """No course variable set, and threads, plot style and random state as before afterwards."""
    for name in ("COURSE_PROFILE", "COURSE_THREADS", "COURSE_HOME"):
        monkeypatch.setenv(name, "")  # an empty value counts as unset, and is undone at the end
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with matplotlib.rc_context():
        yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("argument", "variable", "cuda", "expected"),
    [
        (None, None, False, "quick"),
        (None, None, True, "full"),
        (None, "", True, "full"),
        (None, "quick", True, "quick"),
        (None, "full", False, "full"),
        ("quick", "full", True, "quick"),
        ("full", "quick", False, "full"),
    ],
)
def test_profile_is_the_argument_else_the_variable_else_what_the_machine_allows(
    monkeypatch, argument, variable, cuda, expected
):
    monkeypatch.setattr(runtime, "_cuda", lambda: cuda)
    if variable is not None:
        monkeypatch.setenv("COURSE_PROFILE", variable)
    name, reason = runtime.profile(argument)
    assert name == expected
    source = "argument" if argument else "COURSE_PROFILE" if variable else "CUDA"
    assert source in reason


def test_a_bad_profile_is_told_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"^the argument asks for the profile 'fast': choose "):
        runtime.profile("fast")
    monkeypatch.setenv("COURSE_PROFILE", "Full")
    with pytest.raises(ValueError, match=r"^COURSE_PROFILE asks for the profile 'Full': choose "):
        runtime.profile()


@pytest.mark.parametrize(
    ("profile", "cuda", "expected"),
    [("quick", True, "cpu"), ("full", True, "cuda"), ("full", False, "cpu")],
)
def test_the_quick_profile_stays_on_the_cpu(monkeypatch, profile, cuda, expected):
    monkeypatch.setattr(runtime, "_cuda", lambda: cuda)
    assert runtime.device(profile) == torch.device(expected)


def test_seed_everything_starts_all_three_generators_anew():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    runtime.seed_everything(7)
    first = draw()
    assert draw() != first
    runtime.seed_everything(7)
    assert draw() == first
    runtime.seed_everything(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_setup_reports_chooses_and_hands_on(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_HOME", "/somewhere/mine")
    course = runtime.setup(profile="quick", threads=2, seed=3)
    assert (course.profile, course.quick, course.seed) == ("quick", True, 3)
    assert course.device == torch.device("cpu")
    assert torch.get_num_threads() == 2
    assert torch.initial_seed() == 3
    assert runtime.profile() == ("quick", "chosen by COURSE_PROFILE"), "child processes follow it"
    report = capsys.readouterr().out
    assert 3 <= len(report.splitlines()) <= 5
    for part in (
        f"torch {torch.__version__.split('+')[0]}",
        "quick",
        "2 threads",
        "/somewhere/mine",
    ):
        assert part in report
    monkeypatch.setenv("COURSE_HOME", "")
    assert "~/.build-prove-scale" in runtime.environment_report()


def test_threads_come_from_the_argument_else_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_THREADS", "3")
    runtime.setup("quick")
    assert torch.get_num_threads() == 3
    runtime.setup("quick", threads=1)
    assert torch.get_num_threads() == 1
    for bad in (0, -1, "two"):
        with pytest.raises(ValueError, match=f"The number of threads is {bad!r}: give a whole"):
            runtime.setup("quick", threads=bad)


def test_setup_imports_no_heavy_module_but_torch():
    code = (
        "import sys; from course_utils.runtime import setup; setup('quick')\n"
        "heavy = {'torchvision', 'transformers', 'sklearn', 'datasets'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
