"""Functions on several processes of this machine, from a notebook, a test or a check.

`launch` runs a function on `world_size` ranks, each a process with the default process group of
torch.distributed ready. On Linux the ranks are forked from a process that has imported torch and
done nothing else (30 to 60 ms); elsewhere they are interpreters of their own that are kept for the
next call. The function travels to them in a file, by cloudpickle, so that it may be defined in a
notebook; what it returns comes back in files. No rank outlives the call, whatever ends it.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import inspect
import io
import json
import linecache
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, BinaryIO

import cloudpickle

FORK = sys.platform == "linux" and os.environ.get("COURSE_RANKS") != "spawn"
STILL = 0.5  # seconds without any movement after which waiting ranks are said to be deadlocked
MAX_RANKS = 16


class RankError(RuntimeError):
    """A rank raised, or its process ended; the text says which and how.

    `rank` is its number, `trace` the traceback as text ("" where the process was ended).
    """

    rank: int = -1
    trace: str = ""


class Deadlock(RankError):
    """The ranks wait for one another, and none can go on."""


@dataclass(frozen=True)
class Call:
    """One call of a collective, or of a send or recv, as one rank made it."""

    name: str  # all_reduce, broadcast, isend, …
    dtype: str  # "" where there is no tensor, as in barrier
    shape: tuple[int, ...]
    peer: int | None  # src or dst where there is one
    bytes: int
    is_async: bool

    def __str__(self) -> str:
        toward = {"send": " to", "isend": " to"}.get(self.name, " from")
        what = f" of {self.dtype} {self.shape}" if self.dtype else ""
        return f"{self.name}{what}" + ("" if self.peer is None else f"{toward} rank {self.peer}")


@dataclass
class Outcome:
    """What became of the ranks: results and errors of those that came to an end, and the rest."""

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, dict] = field(default_factory=dict)  # type, text, trace, unwritten
    died: dict[int, int] = field(default_factory=dict)  # rank → signal, or 0 for an exit
    waiting: dict[int, str] = field(default_factory=dict)  # rank → the call that it was in
    last: dict[int, str] = field(default_factory=dict)  # rank → its last call, ended or not
    printed: dict[int, str] = field(default_factory=dict)
    problem: str = ""  # "", "error", "died", "deadlock", "time", "abandoned"


def launch(
    function: Callable,
    world_size: int = 2,
    *args: Any,
    seconds: float = 60.0,
    watch: bool = True,
    backend: str = "gloo",
) -> list:
    """Run function(*args) on every rank, and return what the ranks returned, in their order.

    Inside, torch.distributed.get_rank() and get_world_size() tell the ranks apart, and LOCAL_RANK
    stands in the environment. The ranks share no memory: each gets a copy of function and args,
    and results come back as copies. What they print is printed here, in the order of the ranks.

    Args:
        seconds: when the ranks are stopped, at the latest.
        watch: note every collective, so that a deadlock is found at once (and `calls` works).
            Costs some 20 µs a call: False where time is measured.
        backend: "gloo", or "nccl" where each rank has a GPU of its own (rank r uses cuda:r).

    Raises:
        RankError: a rank raised, or its process ended; the sentence says which and what.
        Deadlock: all that had not come to an end waited for one another.
        TimeoutError: the time was over.
        ValueError: world_size is not a number from 1 to 16.
    """
    outcome = run(function, world_size, *args, seconds=seconds, watch=watch, backend=backend)
    for rank, text in sorted(outcome.printed.items()):
        for line in text.splitlines():
            print(f"[rank {rank}] {line}")
    error = _as_error(outcome, world_size, seconds)
    if error is not None:
        raise error
    return [outcome.results[rank] for rank in range(world_size)]


def _as_error(outcome: Outcome, world_size: int, seconds: float) -> Exception | None:
    if not outcome.problem:
        return None
    places = told(outcome, world_size)
    if outcome.problem == "time":
        return TimeoutError(f"The ranks were stopped after {seconds:g} seconds: {places}.")
    if outcome.problem == "deadlock":
        return Deadlock(f"The ranks wait for one another, and none can go on: {places}.")
    error = RankError(f"{places[0].upper()}{places[1:]}.")
    error.rank = min(outcome.died or outcome.errors)
    error.trace = outcome.errors.get(error.rank, {}).get("trace", "")
    return error


def told(outcome: Outcome, world_size: int) -> str:
    """What each rank was doing at the end, causes first: "rank 0 was waiting in broadcast of …"."""

    def cause(rank: int) -> tuple[bool, bool]:
        return rank not in outcome.died, rank not in outcome.errors

    ranks = sorted(range(world_size), key=cause)
    return "; ".join(f"rank {rank} {_state(outcome, rank)}" for rank in ranks)


def _state(outcome: Outcome, rank: int) -> str:
    if rank in outcome.died:
        number = outcome.died[rank]
        return f"was ended by {signal.Signals(number).name}" if number else "left its process"
    if rank in outcome.errors:
        error = outcome.errors[rank]
        if outcome.died and "gloo/transport" in error["text"]:
            return "lost its connection"
        return f"raised {error['type']}" + (f": {error['text']}" if error["text"] else "")
    if rank in outcome.results:
        last = outcome.last.get(rank)
        return f"had finished (its last call: {last})" if last else "had finished"
    if rank in outcome.waiting:
        return f"was waiting in {outcome.waiting[rank]}"
    return "was computing"


def run(
    function: Callable,
    world_size: int,
    *args: Any,
    seconds: float = 60.0,
    watch: bool = True,
    backend: str = "gloo",
) -> Outcome:
    """`launch` without printing and raising: the Outcome, whatever became of the ranks."""
    if not isinstance(world_size, int) or not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"world_size is {world_size!r}: give a number from 1 to {MAX_RANKS}.")
    job = Path(tempfile.mkdtemp(prefix="course-ranks-"))
    try:
        (job / "task").write_bytes(packed((function, args)))
        files = {name: linecache.getlines(name) for name in _cells(function, *args)}
        settings = {"world_size": world_size, "seconds": seconds, "watch": watch}
        settings |= {"backend": backend, "sources": files, "path": _path()}
        (job / "settings").write_text(json.dumps(settings))
        if not FORK:
            outcome = _run_job(job, _TEAM.start)
        elif not forking:
            outcome = NURSERY.ask(job)
        elif _seedling is not None and _seedling.owner == os.getpid():
            outcome = _seedling.ask(job)
        else:
            outcome = _run_job(job, _forked)
        for rank in range(world_size):
            output = job / f"output-{rank}"
            if output.exists() and output.stat().st_size:
                outcome.printed[rank] = output.read_text("utf-8", "replace")
            if rank in outcome.results:  # not what came after the end was decided on
                outcome.results[rank] = pickle.loads((job / f"result-{rank}").read_bytes())
        return outcome
    finally:
        shutil.rmtree(job, ignore_errors=True)


def _cells(*values: Any) -> set[str]:
    """The notebook cells in which functions stand, whose lines a traceback wants to show."""
    return {value.__code__.co_filename for value in values if isinstance(value, FunctionType)}


def _path() -> list[str]:
    """Where a rank finds the same packages, this one first of all."""
    return [str(Path(__file__).resolve().parents[1]), *(str(p) or os.getcwd() for p in sys.path)]


# --- what is sent -------------------------------------------------------------------------------

_BY_REFERENCE: dict[str, bool] = {}


def packed(value: Any) -> bytes:
    """`value` as bytes, with all that it uses from files which another process cannot import."""
    own = []
    for name, module in list(sys.modules.items()):
        if name != "__main__" and isinstance(module, ModuleType) and not _installed(name, module):
            try:
                cloudpickle.register_pickle_by_value(module)
            except ValueError:
                continue
            own.append(module)
    try:
        body = io.BytesIO()
        _Pickler(body).dump(value)
        return body.getvalue()
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


class _Pickler(cloudpickle.Pickler):
    """Knows modules that are objects of a class of their own, as torch.backends.cudnn."""

    def reducer_override(self, value: Any) -> Any:
        if issubclass(type(value), ModuleType) and type(value) is not ModuleType:
            return import_module, (value.__name__,)
        if type(value) is FunctionType and value.__module__ == _C10D and value.__name__ in _NAMES:
            return getattr, (import_module(_C10D), value.__name__)  # as it was before `watch`, too
        return super().reducer_override(value)


def _installed(name: str, module: ModuleType) -> bool:
    """Whether another process finds the module too: this package, libraries, built-ins."""
    if name not in _BY_REFERENCE:
        top = name.partition(".")[0]
        file = getattr(module, "__file__", None) or ""
        _BY_REFERENCE[name] = (
            top == "course_utils"
            or top in sys.stdlib_module_names
            or not file
            or "site-packages" in file
            or "dist-packages" in file
        )
    return _BY_REFERENCE[name]


# --- a rank -------------------------------------------------------------------------------------


def _rank(job: Path, rank: int) -> None:
    """One rank's part of a job, from its process group to the file with its result."""
    import torch
    import torch.distributed as dist

    settings = json.loads((job / "settings").read_text())
    world_size, seconds = settings["world_size"], settings["seconds"]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # Accelerate wants to see an address, though the group exists; nobody listens there.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve
    for name, lines in settings["sources"].items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    if settings["watch"]:
        watch(job / f"calls-{rank}")
    try:
        if settings["backend"] == "nccl":
            torch.cuda.set_device(rank)
        store = _store(job, seconds)
        dist.init_process_group(
            settings["backend"],
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        function, args = pickle.loads((job / "task").read_bytes())
        result = function(*args)
        body = cloudpickle.dumps(result)
        name = f"result-{rank}"
    except BaseException as error:
        body, name = json.dumps(_told(error)).encode("utf-8", "replace"), f"error-{rank}"
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    (job / f"{name}.partial").write_bytes(body)
    os.replace(job / f"{name}.partial", job / name)


def _store(job: Path, seconds: float):
    """Where the ranks find each other: a file. No port is taken, and no name is looked up, which
    may take 5 s where a name server does not answer."""
    import torch.distributed as dist

    store = dist.FileStore(str(job / "store"), -1)
    store.set_timeout(timedelta(seconds=seconds))
    return store


def _told(error: BaseException) -> dict:
    try:
        text = str(error).strip()[:2000]
    except BaseException:
        text = ""
    trace = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "text": text, "trace": trace}


# --- what a rank has called ---------------------------------------------------------------------

_CALLS: list[Call] = []
_NAMES = (
    "all_gather all_gather_into_tensor all_gather_object all_reduce all_to_all all_to_all_single "
    "barrier broadcast broadcast_object_list gather gather_object irecv isend monitored_barrier "
    "recv reduce reduce_scatter reduce_scatter_tensor scatter scatter_object_list send"
).split()
_C10D = "torch.distributed.distributed_c10d"
_log = None  # an open file, where someone watches from outside
_depth = 0  # collectives call others; only the outermost is the caller's


def calls() -> list[Call]:
    """The collectives, sends and receives that this rank has called so far, in order."""
    return list(_CALLS)


def watch(log: Path | None = None) -> None:
    """From now on, note what this process calls in torch.distributed; in the file `log` too."""
    global _log
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    _CALLS.clear()
    _log = open(log, "wb", buffering=0) if log else None
    if hasattr(dist.all_reduce, "watched"):
        return
    for name in _NAMES:
        original = getattr(distributed_c10d, name)
        noted = _noted(name, original)
        for module in (dist, distributed_c10d):  # P2POp compares with the functions of the latter
            setattr(module, name, noted)


def _write(line: str) -> None:
    if _log is not None:
        _log.write(line.encode() + b"\n")


def _noted(name: str, original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def noted(*args, **kwargs):
        global _depth
        if _depth:
            return original(*args, **kwargs)
        call = _call(name, signature, args, kwargs)
        _CALLS.append(call)
        _write(f">{call}")
        _depth += 1
        try:
            work = original(*args, **kwargs)
        finally:
            _depth -= 1
            _write("<")
        if not call.is_async or work is None or _from_torch(sys._getframe(1)):
            return work  # torch hands it on to its C++ code, which wants its own class
        return _Work(work, call)

    noted.watched = True
    return noted


def _from_torch(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").startswith("torch.")


def _call(name: str, signature: inspect.Signature, args, kwargs) -> Call:
    import torch

    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # which torch will say
        given = {}
    tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
    tensors += [t for v in given.values() if isinstance(v, list) for t in v[:1]]
    tensor = next((t for t in tensors if isinstance(t, torch.Tensor)), None)
    peer = given.get("src", given.get("dst"))
    for other in ("group_src", "group_dst"):
        peer = given.get(other) if peer is None else peer
    is_async = bool(given.get("async_op")) or name in ("isend", "irecv")
    if tensor is None:
        return Call(name, "", (), peer, 0, is_async)
    dtype = str(tensor.dtype).removeprefix("torch.")
    size = tensor.numel() * tensor.element_size()
    return Call(name, dtype, tuple(tensor.shape), peer, size, is_async)


class _Work:
    """What an asynchronous call returned, with a note of who waits for it."""

    def __init__(self, work: Any, call: Call) -> None:
        self._work, self._call = work, call

    def wait(self, *args, **kwargs):
        _write(f">wait() for {self._call}")
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            _write("<")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


# --- a job, from outside ------------------------------------------------------------------------


def _run_job(job: Path, start: Callable, abandoned: Callable[[], bool] = lambda: False) -> Outcome:
    """Starts the ranks and waits until all have come to an end or none can; then none is left."""
    settings = json.loads((job / "settings").read_text())
    world_size, outcome = settings["world_size"], Outcome()
    ranks = start(job, world_size)
    watcher = _Watcher(job, ranks)
    end = time.monotonic() + settings["seconds"] + (0.0 if FORK else 60.0)  # they import torch
    pause = 0.001
    try:
        while not outcome.problem:
            for rank, process in enumerate(ranks):
                if rank in outcome.errors or rank in outcome.died or rank in outcome.results:
                    continue
                status = process.poll()  # before looking for the file, which comes before the end
                if (job / f"result-{rank}").exists():
                    outcome.results[rank] = None
                elif (job / f"error-{rank}").exists():
                    outcome.errors[rank] = json.loads((job / f"error-{rank}").read_bytes())
                elif status is not None:
                    outcome.died[rank] = max(0, -status)
            ended = {**outcome.results, **outcome.errors, **outcome.died}
            failed = bool(outcome.errors or outcome.died)
            if len(ended) == world_size:
                break
            if watcher.still(set(ended), 0.1 if failed else STILL):
                outcome.problem = "deadlock"
            elif time.monotonic() > end:
                outcome.problem = "time"
            elif abandoned():
                outcome.problem = "abandoned"
            else:
                time.sleep(pause)
                pause = min(pause * 1.1, 0.02)
        outcome.waiting, outcome.last = watcher.waiting(), watcher.last()
        if outcome.problem != "abandoned" and (outcome.errors or outcome.died):
            outcome.problem = "error" if outcome.errors else "died"
        return outcome
    finally:
        for process in ranks:
            process.end(bool(outcome.problem) or len(outcome.results) < world_size)


class _Watcher:
    """Whether anything moves: calls noted, processor time used, threads that want to run."""

    def __init__(self, job: Path, ranks: list) -> None:
        self.files = [job / f"calls-{rank}" for rank in range(len(ranks))]
        self.ranks, self.seen, self.since = ranks, None, time.monotonic()
        self.next = 0.0

    def waiting(self) -> dict[int, str]:
        """Rank → the call that it has begun and not ended."""
        found = {}
        for rank, file in enumerate(self.files):
            try:
                lines = file.read_bytes().splitlines()
            except OSError:
                continue
            if lines and lines[-1].startswith(b">"):
                found[rank] = lines[-1][1:].decode()
        return found

    def last(self) -> dict[int, str]:
        """Rank → the call that it has begun last."""
        found = {}
        for rank, file in enumerate(self.files):
            lines = file.read_bytes().splitlines() if file.exists() else []
            begun = [line for line in lines if line.startswith(b">")]
            if begun:
                found[rank] = begun[-1][1:].decode()
        return found

    def still(self, ended: set[int], seconds: float) -> bool:
        """Whether all ranks but those that ended have waited in a call for so long."""
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + 0.02
        waiting = self.waiting()
        open_ranks = [rank for rank in range(len(self.ranks)) if rank not in ended]
        state = [self.files[rank].stat().st_size for rank in open_ranks if rank in waiting]
        state += [_used(self.ranks[rank].pid) for rank in open_ranks]
        if state != self.seen or any(rank not in waiting for rank in open_ranks):
            self.seen, self.since = state, now
        return now - self.since > seconds


def _used(pid: int) -> Any:
    """Processor time used so far, and something that never repeats while a thread wants to run."""
    try:
        states = []
        for thread in Path(f"/proc/{pid}/task").iterdir():
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            states.append(fields[0])
            states.append(fields[11:13])
        return time.monotonic() if "R" in states or "D" in states else states
    except OSError:
        return None


class _Forked:
    """A rank that was forked from this process."""

    def __init__(self, job: Path, rank: int) -> None:
        self.status: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _die_with_parent(parent)
                _redirect(job / f"output-{rank}")
                _rank(job, rank)
                while True:  # until it is ended: the others may be in the middle of a collective
                    signal.pause()
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def end(self, failed: bool) -> None:
        """Nothing is lost: what the rank has to say stands in its file."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _forked(job: Path, world_size: int) -> list[_Forked]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return [_Forked(job, rank) for rank in range(world_size)]


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _redirect(output: Path) -> None:
    """Standard streams to a file, whatever they were; and none of this process's input."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- the process that forks, for a kernel in which forking is not safe --------------------------

forking = False  # True in processes that have done nothing that a fork of them would miss


class _Nursery:
    """A process that has imported what the ranks need and forks them; started when needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = 0

    def start(self) -> None:
        """Starts it without waiting until it has imported everything."""
        if self.process and self.owner == os.getpid() and self.process.poll() is None:
            return
        loaded = sorted(m for m in sys.modules if m.startswith("course_utils."))
        code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
        code += "from course_utils.processes import serve; serve(json.loads(sys.argv[2]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(_path()), json.dumps(loaded)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_one_thread(),
            start_new_session=True,  # "interrupt kernel" is for the kernel
        )
        self.owner = os.getpid()

    def ask(self, job: Path) -> Outcome:
        with self.lock:
            self.start()
            try:
                self.process.stdin.write(f"{job}\n".encode())
                self.process.stdin.flush()
                while not select.select([self.process.stdout], [], [], 0.2)[0]:
                    pass  # in slices, so that an interrupt ends the wait
                return pickle.load(self.process.stdout)
            except (OSError, EOFError):
                self.stop()
                raise RuntimeError(
                    "The process that starts the ranks has ended; the next call starts another."
                ) from None
            except BaseException:  # an interrupt: the nursery ends the ranks, and itself
                self.stop()
                raise

    def stop(self) -> None:
        process, self.process = self.process, None
        if process and self.owner == os.getpid():
            try:
                process.stdin.close()
                process.wait(5)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()  # its ranks die with it
                process.wait()
            process.stdout.close()


NURSERY = _Nursery()
atexit.register(NURSERY.stop)


class _Seedling:
    """A fork of this process, made before it does what its forks would miss; it forks the ranks."""

    def __init__(self) -> None:
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        parent = os.getpid()
        if os.fork() == 0:
            try:
                _die_with_parent(parent)
                os.close(self.requests)
                os.close(self.replies)
                _take_jobs_from(requests, os.fdopen(replies, "wb"))
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)
        self.owner, self.stream = parent, os.fdopen(self.replies, "rb")

    def ask(self, job: Path) -> Outcome:
        os.write(self.requests, f"{job}\n".encode())
        return pickle.load(self.stream)


_seedling: _Seedling | None = None


@contextmanager
def alone() -> Iterator[None]:
    """A world of one process, this one, with a process group; its calls are noted."""
    global _seedling
    import torch.distributed as dist

    if FORK and forking and (_seedling is None or _seedling.owner != os.getpid()):
        _seedling = _Seedling()  # a fork after this would have the group without its threads
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    watch()
    try:
        yield
    finally:
        if own and not forking and dist.is_initialized():
            dist.destroy_process_group()


def serve(modules: list[str]) -> None:
    """The nursery's life: import, then a job a line, until its input ends."""
    global forking
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    warm_up()
    for module in modules:
        try:
            import_module(module)
        except Exception:  # a rank that needs it will say so
            pass
    forking = True
    _take_jobs_from(requests, replies)


def _take_jobs_from(requests: int, replies: BinaryIO) -> None:
    def abandoned() -> bool:
        return bool(select.select([requests], [], [], 0)[0])

    line = b""
    while piece := os.read(requests, 1 << 12):
        line += piece
        if line.endswith(b"\n"):
            outcome = _run_job(Path(line.decode().strip()), _forked, abandoned)
            line = b""
            if outcome.problem != "abandoned":
                pickle.dump(outcome, replies)
                replies.flush()


def _one_thread() -> dict[str, str]:
    return os.environ | {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}


def warm_up() -> None:
    """Imports what torch imports only when it is first used, so that no rank has to."""
    import torch
    import torch.distributed
    import torch.nn.parallel

    torch.set_num_threads(1)
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad((x * x).sum(), x)
    torch.optim.SGD([x], lr=0.1).step()


# --- ranks where nothing can be forked ----------------------------------------------------------


class _Interpreter:
    """A Python of its own that takes one job after another, as one of its ranks."""

    def __init__(self) -> None:
        code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
        code += "from course_utils.processes import take_jobs; take_jobs()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_one_thread(),
        )
        self.pid = self.process.pid

    def take(self, job: Path, rank: int) -> None:
        self.process.stdin.write((json.dumps([str(job), rank]) + "\n").encode())
        self.process.stdin.flush()

    def poll(self) -> int | None:
        return self.process.poll()

    def end(self, failed: bool) -> None:
        if failed:  # it may be in the middle of anything
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()


class _Team:
    """The interpreters that wait for a job."""

    def __init__(self) -> None:
        self.idle: list[_Interpreter] = []
        self.owner = 0

    def start(self, job: Path, world_size: int) -> list[_Interpreter]:
        if self.owner != os.getpid():
            self.idle, self.owner = [], os.getpid()
        self.idle = [one for one in self.idle if one.poll() is None]
        while len(self.idle) < world_size:
            self.idle.append(_Interpreter())
        ranks = self.idle[:world_size]
        for rank, one in enumerate(ranks):
            one.take(job, rank)
        return ranks

    def stop(self) -> None:
        if self.owner == os.getpid():
            for one in self.idle:
                one.end(failed=True)
        self.idle = []


_TEAM = _Team()
atexit.register(_TEAM.stop)


def take_jobs() -> None:
    """An interpreter's life: one job a line, until its input ends."""
    import torch.distributed as dist

    warm_up()
    streams = sys.stdout, sys.stderr
    for line in io.TextIOWrapper(io.FileIO(os.dup(0)), "utf-8"):
        job, rank = json.loads(line)
        if dist.is_initialized():  # only now: the other ranks may have needed this one's
            dist.destroy_process_group()
        with open(Path(job) / f"output-{rank}", "w", encoding="utf-8") as output:
            sys.stdout = sys.stderr = output
            try:
                _rank(Path(job), rank)
            finally:
                sys.stdout, sys.stderr = streams
