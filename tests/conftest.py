"""What every test gets: an empty record, one thread, no progress bars; and what a skip costs.

A skip is always visible: the last lines of a run count them by reason. Where CI or COURSE_CI is
set, the skip of a test marked `must_run_in_ci` is a failure.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice

import pytest

# Before torch is imported: several test processes with many threads each only wait for one another.
os.environ.update(OMP_NUM_THREADS="1", COURSE_THREADS="1", COURSE_PROGRESS="0")


@pytest.fixture(autouse=True)
def empty_record(tmp_path_factory, monkeypatch):
    """COURSE_HOME: a folder of this test's own, so that no test sees what another one recorded."""
    home = tmp_path_factory.mktemp("course-home")
    monkeypatch.setenv("COURSE_HOME", str(home))
    return home


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Each process begins with its share of the slow tests: one that is left for last would run
    alone while the other processes have nothing to do."""
    slow = [item for item in items if any(map(item.get_closest_marker, ("slow", "browser")))]
    quick = [item for item in items if item not in slow]
    items[:] = in_shares(slow, quick, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def in_shares(slow: list, quick: list, count: int) -> list:
    """In `count` parts of the lengths into which `--dist worksteal` cuts the list at the start;
    what is stolen later comes from the end of a part."""
    rest, order = iter(quick), []
    for part in range(count):
        size = (len(slow) + len(quick) - len(order)) // (count - part)
        own = slow[part::count]
        order += own + list(islice(rest, max(0, size - len(own))))
    return order


def in_ci() -> bool:
    return any(os.environ.get(name, "") not in ("", "0", "false") for name in ("CI", "COURSE_CI"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    expected = hasattr(report, "wasxfail")
    if report.skipped and not expected and in_ci() and item.get_closest_marker("must_run_in_ci"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must run in CI, and was skipped: {_reason(report)}"
    return report


def _reason(report) -> str:
    """Why a test was skipped; `longrepr` is then (file, line, reason)."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter):
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        told = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"{reasons.total()} skipped: {told}", yellow=True)
