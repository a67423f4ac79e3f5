"""The process in which answers run; `sandbox` starts it and talks to its `main`.

It imports torch once and then forks one child for each answer, so that an answer may hang, exit,
crash, flood the output, start threads or change torch itself, and nothing of it stays. Where
forking is unsafe (macOS) or missing (Windows) the answer runs in the worker, which puts global
state back and which the parent process replaces when it hangs or dies.

Requests and replies are pickles behind their length, on standard input and standard output.
"""

from __future__ import annotations

import io
import linecache
import os
import pickle
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

CATALOGUE = 60.0  # seconds to look for the mistake, once the answer itself has come to its end
EXTRA_MEMORY = 4 << 30  # bytes that an answer may take beyond what the worker holds


class CappedText(io.TextIOBase):
    """A text stream that keeps the beginning of what an answer prints and counts the rest."""

    def __init__(self, limit: int) -> None:
        self.limit, self.kept, self.total = limit, "", 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.total += len(text)
        if len(self.kept) < self.limit:
            kept = text[: self.limit - len(self.kept)]
            self.kept += kept.encode("utf-8", "backslashreplace").decode("utf-8")
        return len(text)


def send(stream: BinaryIO, message: object) -> None:
    body = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.flush()


def receive(stream: BinaryIO) -> object:
    """The next message; raises EOFError when the other side is gone."""
    head = _exactly(stream, 8)
    return pickle.loads(_exactly(stream, struct.unpack("<Q", head)[0]))


def _exactly(stream: BinaryIO, count: int) -> bytes:
    """Reads on where an unbuffered pipe gives less than was asked for (64 KiB at a time)."""
    body = bytearray()
    while len(body) < count:
        piece = stream.read(count - len(body))
        if not piece:
            raise EOFError
        body += piece
    return bytes(body)


def evaluate(request: dict, ended: Callable[[], None] = lambda: None) -> dict:
    """Judges the answer in this process: {"verdict": …, "printed": …, "characters": …}."""
    from . import registry
    from .engine import MAX_PRINTED, diagnose, kept_state

    printed = CappedText(MAX_PRINTED)
    try:
        with kept_state():
            sys.stdout = sys.stderr = printed
            for name, lines in request["sources"].items():
                linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
            try:
                candidate = pickle.loads(request["candidate"])
            except Exception:
                return {"problem": "unpickle"}
            verdict = diagnose(registry()[request["slug"]], candidate, ended)
    except BaseException as error:
        return {"problem": "broken", "text": type(error).__name__}
    return {"verdict": verdict, "printed": printed.kept, "characters": printed.total}


def _child(request: dict, pipe: int, others: tuple[int, ...]) -> None:
    """Runs in a forked child; never returns. `others`: open files that are not an answer's."""
    try:
        os.setsid()
        for other in others:
            os.close(other)
        _limit(request["limit"])
        own = os.getpid()
        try:
            # An empty reply says that the answer has come to its end; the time limit is for that.
            reply = pickle.dumps(evaluate(request, lambda: os.write(pipe, bytes(8))))
        except BaseException as error:
            reply = pickle.dumps({"problem": "broken", "text": type(error).__name__})
        if os.getpid() == own:  # not in a process that the answer forked
            with os.fdopen(pipe, "wb") as stream:
                stream.write(struct.pack("<Q", len(reply)) + reply)
    finally:
        os._exit(0)


def _limit(seconds: float) -> None:
    """No core dump, no more memory than is sensible, and an end even if the worker is killed."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(seconds + CATALOGUE) + 5
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _in_child(request: dict, requests: BinaryIO, replies: BinaryIO) -> dict:
    """Judges in a forked child that is killed when its time is over."""
    end = time.monotonic() + request["limit"]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(request, writing, (reading, requests.fileno(), replies.fileno()))
    os.close(writing)
    answer, reply = b"", {"problem": "died"}
    while True:
        ready, _, _ = select.select([reading, requests], [], [], max(0.0, end - time.monotonic()))
        if requests in ready:  # the learner's process is gone or wants no answer any more
            reply = {"problem": "abandoned"}
            break
        if not ready:
            reply = {"problem": "time"}
            break
        piece = os.read(reading, 1 << 16)
        answer += piece
        while answer[:8] == bytes(8):
            answer, end = answer[8:], time.monotonic() + CATALOGUE
        if len(answer) >= 8 and len(answer) - 8 == struct.unpack("<Q", answer[:8])[0]:
            try:
                reply = pickle.loads(answer[8:])
            except Exception:  # the answer wrote into the pipe too
                pass
            break
        if not piece:
            _let_end(pid)
            break
    os.close(reading)
    for kill, target in ((os.killpg, pid), (os.kill, pid)):
        try:
            kill(target, signal.SIGKILL)
        except OSError:  # it has ended, or has not yet made its own group
            pass
    _, status = os.waitpid(pid, 0)
    if reply == {"problem": "died"}:
        reply["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return reply


def _let_end(pid: int) -> None:
    """Waits a second at most, so that a process that ends by itself is not said to be killed."""
    for _ in range(100):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.01)


def _import_all() -> None:
    """Everything that torch imports only when it is first used, so that no child has to."""
    import torch

    from .. import processes
    from . import registry

    processes.forking = processes.FORK  # nothing here has threads that a fork would miss
    processes.watch()  # before an answer is read that has imported a collective by its name
    torch.set_num_threads(1)
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad((x * x).sum(), x)
    torch.optim.SGD([x], lr=0.1).step()
    torch.func.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))
    registry()


def main(fork: bool) -> None:
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # nothing that an answer writes may get among the replies
        os.dup2(nothing, stream)
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # "interrupt kernel" is for the parent
    try:
        _import_all()
    except Exception as error:
        send(replies, f"{type(error).__name__}: {error}")
        return
    send(replies, "")
    while True:
        try:
            request = receive(requests)
        except EOFError:
            return
        reply = _in_child(request, requests, replies) if fork else evaluate(request)
        if reply == {"problem": "abandoned"}:
            return
        send(replies, reply)
