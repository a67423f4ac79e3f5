"""conftest.py: skips are counted by reason, and cost what their marks say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import in_shares

TESTS = """
import os

import pytest


@pytest.mark.must_run_in_ci
@pytest.mark.skip(reason="no network")
def test_one(): ...


def test_two():
    pytest.skip("no network")


def test_three():
    pytest.skip("no GPU")


def test_four(tmp_path_factory):
    assert os.listdir(os.environ["COURSE_HOME"]) == []
    assert os.environ["COURSE_HOME"].startswith(str(tmp_path_factory.getbasetemp()))
"""


@pytest.mark.parametrize("ci", [False, True])
def test_skips_are_told_and_fail_where_they_must_not_be(tmp_path, ci):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = must_run_in_ci\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "COURSE_CI")}
    environment |= {"CI": "true"} if ci else {"CI": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if ci:
        assert done.returncode == 1 and "1 passed, 2 skipped, 1 error" in done.stdout
        assert "test_one must run in CI, and was skipped: no network" in done.stdout
    else:
        assert done.returncode == 0 and "1 passed, 3 skipped" in done.stdout
        assert "3 skipped: no network (2); no GPU (1)" in done.stdout


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("slow", "quick"), [(7, 20), (1, 6), (0, 5), (9, 0), (0, 0)])
def test_each_process_begins_with_its_share_of_the_slow_tests(slow, quick, count):
    slow, quick = [f"slow {n}" for n in range(slow)], [f"quick {n}" for n in range(quick)]
    order = in_shares(slow, quick, count)
    assert sorted(order) == sorted(slow + quick), "each test once"
    shares, left = [], list(order)
    for processes in range(count, 0, -1):  # as xdist's worksteal hands them out
        size = len(left) // processes
        shares.append(left[:size])
        left = left[size:]
    if quick and len(slow) < len(quick):
        told = [[test.startswith("slow") for test in share] for share in shares]
        assert all(share == sorted(share, reverse=True) for share in told), "the slow ones first"
        assert max(map(sum, told)) - min(map(sum, told)) <= 1
