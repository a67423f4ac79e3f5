"""Real kernels, as a learner uses them: stopped in the middle of a check, and two at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

from course_utils.exercises import record

RIGHT = """
import torch
from course_utils import check
from course_utils.exercises import registry
right = registry()["unbroadcast"].reference

def endless(grad, shape):
    open("{marker}", "w").close()
    while True:
        pass
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Two kernels with one record; yields them with their clients and the marker's path."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COURSE_TIME_LIMIT", "60")
    marker = tmp_path / "marker"
    managers = [KernelManager(kernel_name="python3") for _ in range(2)]
    clients = []
    try:
        for manager in managers:
            manager.start_kernel()
            client = manager.blocking_client()
            clients.append(client)
            client.start_channels()
            client.wait_for_ready(timeout=120)
        for client in clients:
            run(client, RIGHT.format(marker=marker.as_posix()))
        yield managers, clients, marker
    finally:
        for client in clients:
            client.stop_channels()
        for manager in managers:
            if manager.has_kernel:
                manager.shutdown_kernel(now=True)


def run(client, code: str) -> str:
    """Runs a cell to its end; its status, "ok" or "error"."""
    return client.execute_interactive(code, timeout=120, output_hook=lambda _: None)["content"][
        "status"
    ]


def start_endless_check(client, marker) -> None:
    """Begins a check that does not end, and returns when the answer is running."""
    # after an error a kernel aborts what it finds waiting: that may be the test's next cell
    client.execute('check("unbroadcast", endless)', stop_on_error=False)
    until = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < until, "the answer did not start"
        time.sleep(0.05)


def test_interrupted_in_the_middle_of_a_check(kernels):
    (manager, _), (client, _), marker = kernels
    assert run(client, 'check("unbroadcast", right)') == "ok"
    start_endless_check(client, marker)
    start = time.monotonic()
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
    assert run(client, 'assert check("unbroadcast", right) is right') == "ok", "still usable"
    assert time.monotonic() - start < 40
    assert record.load()["unbroadcast"]["state"] == "passed"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a kernel as POSIX does")
def test_killed_in_the_middle_of_a_check(kernels):
    (manager, _), (client, other), marker = kernels
    assert run(client, 'check("unbroadcast", right)') == "ok"
    start_endless_check(client, marker)
    os.kill(manager.provisioner.pid, signal.SIGKILL)
    assert record.load()["unbroadcast"]["state"] == "passed"
    assert run(other, 'assert check("unbroadcast", right) is right') == "ok"
    assert record.load()["unbroadcast"]["attempts"] == 2


def test_two_kernels_check_at_once(kernels):
    _, clients, _ = kernels
    cell = 'for _ in range(15): assert check("unbroadcast", right) is right'
    for client in clients:
        client.execute(cell)
    for client in clients:
        assert run(client, "pass") == "ok"
    entry = record.load()["unbroadcast"]
    assert entry["state"] == "passed" and entry["attempts"] == 30


RANKS = """
import os, time
import torch.distributed as dist
from course_utils.processes import launch

def endless_ranks(marker):
    with open(f"{marker}-{dist.get_rank()}.partial", "w") as file:
        file.write(str(os.getpid()))
    os.replace(f"{marker}-{dist.get_rank()}.partial", f"{marker}-{dist.get_rank()}")
    while True:
        time.sleep(0.01)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_cell_leaves_no_rank(kernels):
    (manager, _), (client, _), marker = kernels
    assert run(client, RANKS) == "ok"
    files = [Path(f"{marker}-{rank}") for rank in (0, 1)]
    client.execute(f"launch(endless_ranks, 2, {str(marker)!r})", stop_on_error=False)
    until = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < until, "the ranks did not start"
        time.sleep(0.05)
    manager.interrupt_kernel()
    assert client.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
    assert not [file for file in files if Path("/proc", file.read_text()).exists()]
    assert run(client, "assert launch(dist.get_rank, 2) == [0, 1]") == "ok"
