"""Functions on several real processes: what comes back, what is told, and that nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from course_utils import processes
from course_utils.exercises import judge
from course_utils.processes import Deadlock, RankError, alone, calls, launch, run

ROOT = Path(__file__).resolve().parents[1]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks cannot import this file
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def family(pid: int) -> set[int]:
    """The processes that descend from `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def ranks_of(pid: int) -> set[int]:
    """Descendants beyond the process that forks them."""
    nursery = processes.NURSERY.process
    return family(nursery.pid) if pid == os.getpid() and nursery else family(pid)


def listening(port: int) -> bool:
    """Whether any process of this machine listens at a TCP port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in _table(name)]
    return any(int(line[1].rpartition(":")[2], 16) == port and line[3] == "0A" for line in lines)


def _table(name: str) -> list[str]:
    path = Path("/proc/net", name)
    return path.read_text().splitlines()[1:] if path.exists() else []


def _sums(x):
    total = x * (dist.get_rank() + 1)
    dist.all_reduce(total)
    print("the sum is", total.tolist())
    return dist.get_rank(), dist.get_world_size(), total


def test_results_and_prints_come_in_the_order_of_ranks(capsys):
    for world_size, factor in ((1, 1), (2, 3), (3, 6)):
        results = launch(_sums, world_size, torch.tensor([1.0, 2.0]))
        assert [result[0] for result in results] == list(range(world_size))
        for _, size, total in results:
            assert size == world_size and total.tolist() == [factor, 2 * factor]
        lines = capsys.readouterr().out.splitlines()
        text = f"the sum is [{factor}.0, {2 * factor}.0]"
        assert lines == [f"[rank {rank}] {text}" for rank in range(world_size)]


def test_a_function_of_a_notebook_cell_travels_with_what_it_uses():
    cell = """
    import torch.distributed as dist
    factor = 7
    def helper(x): return factor * x
    def answer(x): return helper(x) + dist.get_rank()
    """
    space = {"__name__": "__main__"}
    exec(textwrap.dedent(cell), space)
    assert launch(space["answer"], 2, 1) == [7, 8]


def test_ranks_share_no_memory_and_leave_the_arguments_alone():
    mine = torch.zeros(3)
    assert [r.tolist() for r in launch(lambda x: x.add_(1 + dist.get_rank()), 2, mine)] == [
        [1.0] * 3,
        [2.0] * 3,
    ]
    assert mine.tolist() == [0.0] * 3
    big = torch.arange(2_000_000)
    assert torch.equal(launch(lambda: big + dist.get_rank(), 2)[1], big + 1)


def _variables_and_ports():
    """What torchrun would have set, and the ports at which this rank listens for the others."""
    dist.all_reduce(torch.ones(1))
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:")}
    lines = [line.split() for name in ("tcp", "tcp6") for line in _table(name)]
    ports = {line[1].rpartition(":")[2] for line in lines if line[3] == "0A" and line[9] in inodes}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return [os.environ[name] for name in names], {int(port, 16) for port in ports}


@linux
def test_the_environment_is_torchruns_and_no_port_stays_open():
    (first, ports), (second, others) = launch(_variables_and_ports, 2)
    assert (first, second) == (["0", "0", "2"], ["1", "1", "2"])
    assert ports | others and not any(listening(port) for port in ports | others)


def _joined():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    with model.join():
        for _ in range(1 + dist.get_rank()):
            model(torch.ones(1, 2)).sum().backward()
    return model.module.weight.detach()


def test_what_torch_calls_itself_gets_its_own_work():
    """join() hands a Work to C++ code, which takes no other class."""
    one, other = launch(_joined, 2)
    assert torch.equal(one, other)


def _raises_on_one():
    if dist.get_rank() == 1:
        raise ValueError("no such digit")
    dist.all_reduce(torch.ones(2))


@linux
def test_a_rank_that_raises_is_told_first_and_the_other_is_ended():
    with pytest.raises(
        RankError, match=r"^Rank 1 raised ValueError: no such digit; rank 0 was wa"
    ) as told:
        launch(_raises_on_one, 2)
    assert told.value.rank == 1 and "_raises_on_one" in told.value.trace
    assert not ranks_of(os.getpid())


def _only_rank_zero():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(2))


def _one_too_many():
    for _ in range(2 + dist.get_rank()):
        dist.broadcast(torch.ones(4, dtype=torch.float64), src=0)


def _both_send():
    other = 1 - dist.get_rank()
    dist.send(torch.ones(3), other)
    dist.recv(torch.ones(3), other)


def _never_arrives():
    if dist.get_rank() == 1:
        dist.irecv(torch.ones(1), 0).wait()


@linux
@pytest.mark.parametrize(
    ("function", "places"),
    [
        (_only_rank_zero, "rank 0 was waiting in all_reduce of float32 (2,); rank 1 had finished."),
        (
            _both_send,
            "rank 0 was waiting in send of float32 (3,) to rank 1; rank 1 was waiting in",
        ),
        (
            _never_arrives,
            "rank 0 had finished; "
            "rank 1 was waiting in wait() for irecv of float32 (1,) from rank 0.",
        ),
    ],
)
def test_a_deadlock_is_found_at_once_and_told_with_the_call(function, places):
    launch(_sums, 2, torch.ones(1))  # what follows is not the start of the first processes
    start = time.monotonic()
    with pytest.raises(Deadlock) as told:
        launch(function, 2)
    assert time.monotonic() - start < 15  # gloo's own time-out is the time limit of 60 s
    text = str(told.value)
    assert text.startswith("The ranks wait for one another, and none can go on: ")
    assert places in text
    assert not ranks_of(os.getpid())


def test_what_a_finished_rank_called_last_is_told():
    with pytest.raises(
        Deadlock, match=r"rank 0 had finished \(its last call: broadcast of float64"
    ):
        launch(_one_too_many, 2)


def _late(seconds, busy):
    if dist.get_rank() == 1:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not busy:
                time.sleep(0.1)
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_is_late_is_no_deadlock(busy):
    assert launch(_late, 2, 4 * processes.STILL, busy) == [2.0, 2.0]


def _kills_itself():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(2))


def _leaves():
    if dist.get_rank() == 0:
        os._exit(3)


@linux
def test_a_process_that_ends_is_told():
    with pytest.raises(RankError, match="^Rank 1 was ended by SIGKILL; rank 0 ") as told:
        launch(_kills_itself, 2)
    assert told.value.rank == 1
    with pytest.raises(RankError, match="^Rank 0 left its process; rank 1 "):
        launch(_leaves, 2)


def _endless():
    while True:
        pass


@linux
def test_the_time_limit_ends_all_ranks():
    with pytest.raises(TimeoutError, match="stopped after 1 seconds: rank 0 was computing; rank 1"):
        launch(_endless, 2, seconds=1)
    assert not ranks_of(os.getpid())


def test_a_world_without_a_size_is_a_sentence():
    for size in (0, 17, 2.0, "2", None):
        with pytest.raises(ValueError, match=r"give a number from 1 to 16"):
            launch(_sums, size)


def _talks():
    x = torch.ones(2, 3)
    dist.broadcast(x, 0)
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    boxes = [None, None]
    dist.all_gather_object(boxes, "a")
    other = 1 - dist.get_rank()
    received = torch.zeros(5, dtype=torch.float64)
    pair = [
        dist.P2POp(dist.isend, received + 1, other),
        dist.P2POp(dist.irecv, received, other),
    ]
    for work in dist.batch_isend_irecv(pair):
        work.wait()
    dist.barrier()
    return calls(), received.sum().item(), work.is_completed()


def test_calls_are_noted_once_each_with_what_they_carried():
    (noted, received, completed), _ = launch(_talks, 2)
    assert received == 5 and completed
    assert [call.name for call in noted] == [
        "broadcast", "all_reduce", "all_gather_object", "isend", "irecv", "barrier"
    ]  # fmt: skip
    assert noted[0].peer == 0 and noted[0].bytes == 24 and noted[0].shape == (2, 3)
    assert [call.is_async for call in noted[:3]] == [False, True, False]
    assert noted[3].bytes == 40 and noted[3].peer == 1
    assert str(noted[3]) == "isend of float64 (5,) to rank 1"
    assert launch(lambda: calls(), 1, watch=False) == [[]]


def test_a_world_of_one_in_this_process_leaves_no_group_behind():
    with alone():
        assert dist.get_world_size() == 1
        dist.all_reduce(torch.ones(2))
        assert [call.name for call in calls()] == ["all_reduce"]
    assert not dist.is_initialized()


# --- interrupted and killed ---------------------------------------------------------------------


@linux
def test_an_interrupt_ends_the_ranks_and_the_next_call_works(tmp_path):
    code = """
    import os, signal, sys, threading, time
    sys.path.insert(0, sys.argv[1])
    from course_utils.processes import NURSERY, launch
    def endless(marker):
        import torch.distributed as dist
        open(f"{marker}-{dist.get_rank()}", "w").write(str(os.getpid()))
        while True: time.sleep(0.01)
    def interrupt():
        while not all(os.path.exists(f"{sys.argv[2]}-{rank}") for rank in (0, 1)): time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    try:
        launch(endless, 2, sys.argv[2])
    except KeyboardInterrupt:
        pids = [int(open(f"{sys.argv[2]}-{rank}").read()) for rank in (0, 1)]
        print("left:", [pid for pid in pids if os.path.exists(f"/proc/{pid}")])
    print(launch(lambda: 5, 2))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(ROOT), str(tmp_path / "marker")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "left: []\n[5, 5]\n", done.stderr


@linux
@pytest.mark.parametrize("victim", ["kernel", "nursery"])
def test_ranks_do_not_outlive_what_started_them(victim, tmp_path):
    code = """
    import os, sys, time
    sys.path.insert(0, sys.argv[1])
    from course_utils.processes import NURSERY, launch
    def endless(marker):
        import torch.distributed as dist
        open(f"{marker}-{dist.get_rank()}", "w").write(str(os.getpid()))
        while True: time.sleep(0.01)
    NURSERY.start()
    open(sys.argv[2], "w").write(str(NURSERY.process.pid))
    try:
        launch(endless, 2, sys.argv[2])
    except RuntimeError as error:
        print(error)
    """
    marker = tmp_path / "marker"
    script = [sys.executable, "-c", textwrap.dedent(code), str(ROOT), str(marker)]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    try:
        waited = time.monotonic() + 90
        while not all(_written(tmp_path / f"marker-{rank}") for rank in (0, 1)):
            assert time.monotonic() < waited and process.poll() is None
            time.sleep(0.05)
        below = family(process.pid)
        assert len(below) == 3
        os.kill(process.pid if victim == "kernel" else int(marker.read_text()), signal.SIGKILL)
        told, _ = process.communicate(timeout=60)
        if victim == "nursery":
            assert told.startswith("The process that starts the ranks has ended")
        end = time.monotonic() + 10
        while left := {pid for pid in below if _alive(pid)}:
            assert time.monotonic() < end, f"{left} of {below} are left"
            time.sleep(0.05)
    finally:
        process.kill()


def _written(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- where nothing can be forked ----------------------------------------------------------------


@pytest.mark.slow
def test_without_forking_interpreters_are_kept_and_an_answer_is_judged_too():
    code = """
    import os, sys, time
    sys.path.insert(0, sys.argv[1])
    import torch, torch.distributed as dist
    from course_utils import processes
    from course_utils.exercises import find
    from course_utils.exercises.sandbox import Sandbox, judge
    from course_utils.processes import Deadlock, launch
    assert not processes.FORK
    def who(x):
        total = x.clone()
        dist.all_reduce(total)
        print("here")
        return os.getpid(), total.item()
    first = launch(who, 2, torch.ones(1))
    print([total for _, total in first])
    print(launch(who, 2, torch.ones(1)) == first, "the same processes again")
    def hangs():
        if dist.get_rank() == 0: dist.barrier()
    try:
        launch(hangs, 2)
    except Deadlock as deadlock:
        print(deadlock)
    print([total for _, total in launch(who, 2, torch.ones(1))])
    sandbox = Sandbox(fork=False)
    os.environ["COURSE_TIME_LIMIT"] = "60"
    exercise = find("all_reduce_mean")
    print(judge(exercise, exercise.reference, sandbox).state)
    sum_of = next(m for m in exercise.misconceptions if "sum" in m.slug)
    print(judge(exercise, sum_of.implementation, sandbox).misconception == sum_of.slug)
    sandbox.stop()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"COURSE_RANKS": "spawn"},
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[rank")]
    assert lines == [
        "[2.0, 2.0]",
        "True the same processes again",
        "The ranks wait for one another, and none can go on: "
        "rank 0 was waiting in barrier; rank 1 had finished.",
        "[2.0, 2.0]",
        "passed",
        "True",
    ], done.stderr


# --- an answer judged on ranks ------------------------------------------------------------------


def _mean(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def test_a_verdict_says_on_which_rank():
    def first_is_lazy(tensor):
        mean = _mean(tensor)
        return tensor.clone() if dist.get_rank() == 1 else mean

    verdict = judge("all_reduce_mean", first_is_lazy)
    assert verdict.state == "wrong" and "(rank 1)" in verdict.message

    def raises(tensor):
        if dist.get_rank() == 1:
            raise LookupError("nothing here")
        return _mean(tensor)

    verdict = judge("all_reduce_mean", raises)
    assert "raised LookupError" in verdict.message and "on rank 1, in `raises`" in verdict.message
    assert "if dist.get_rank()" not in verdict.message and "nothing here" in verdict.message


def test_an_answer_may_import_the_collective_by_its_name():
    from torch.distributed import all_reduce  # before it is watched, or after

    def answer(tensor):
        total = tensor.clone()
        all_reduce(total)
        return total / dist.get_world_size()

    assert judge("all_reduce_mean", answer).state == "passed"
    with alone():
        verdict = judge("all_reduce_mean", lambda tensor: all_reduce(tensor, "sum"))
    assert "processes.py" not in verdict.message and "in `noted`" not in verdict.message


def test_a_verdict_tells_a_deadlock_and_an_exit():
    def hangs(tensor):
        if dist.get_rank() == 0:
            dist.barrier()
        return _mean(tensor) if dist.get_world_size() == 1 else tensor.clone()

    verdict = judge("all_reduce_mean", hangs)
    assert "never comes to an end on 2 processes" in verdict.message
    assert "rank 0 was waiting in barrier; rank 1 had finished" in verdict.message

    def leaves(tensor):
        if dist.get_world_size() > 1:
            os._exit(0)
        return _mean(tensor)

    assert "left its Python process" in judge("all_reduce_mean", leaves).message


@linux
def test_no_process_outlives_a_judgement():
    judge("all_reduce_mean", _mean)
    before = family(os.getpid())

    def endless(tensor):
        while dist.get_world_size() > 1:
            time.sleep(0.01)
        return _mean(tensor)

    os.environ["COURSE_TIME_LIMIT"] = "2"
    try:
        verdict = judge("all_reduce_mean", endless)
    finally:
        del os.environ["COURSE_TIME_LIMIT"]
    assert "did not come to an end" in verdict.message
    time.sleep(0.2)
    assert family(os.getpid()) <= before
    assert run(_mean, 2, torch.ones(2)).problem == ""


# --- GPUs ---------------------------------------------------------------------------------------


def _on_gpu(device):
    total = torch.full((3,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total)
    return dist.get_backend(), total.cpu().tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_nccl_with_a_rank_on_each_gpu_and_gloo_with_two_ranks_on_one():
    count = min(torch.cuda.device_count(), processes.MAX_RANKS)
    total = [count * (count + 1) / 2] * 3
    assert launch(_on_gpu, count, "cuda", backend="nccl") == [("nccl", total)] * count
    assert launch(_on_gpu, 2, "cuda:0") == [("gloo", [3.0] * 3)] * 2
