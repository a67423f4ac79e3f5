"""`judge`: runs an answer in a process of its own and says what became of it.

The learner's kernel only sends the answer (by cloudpickle) and waits: a kernel that is interrupted,
an answer that never ends and an answer that kills its process leave it as it was. See `worker`.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import linecache
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..processes import packed
from .engine import WRONG, Exercise, TimeUp, Verdict, diagnose, kept_state, misfit
from .source import functions_of
from .worker import CATALOGUE, receive, send

DEFAULT_LIMIT = 10.0  # seconds
START_LIMIT = 120.0  # seconds for the worker to import torch on a slow disk
FORK = sys.platform == "linux"


def time_limit() -> float:
    """Seconds an answer may take: `COURSE_TIME_LIMIT`, else 10."""
    text = os.environ.get("COURSE_TIME_LIMIT", "")
    try:
        limit = float(text) if text else DEFAULT_LIMIT
    except ValueError:
        limit = -1.0
    if not 0 < limit <= 86_400:
        print(f"COURSE_TIME_LIMIT is {text!r}, not a number of seconds up to a day: using 10.")
        return DEFAULT_LIMIT
    return limit


class _Gone(Exception):
    """The worker ended or did not answer in time; `args[0]` says which."""


class Sandbox:
    """A worker process, started when first needed and replaced when it is lost."""

    def __init__(self, fork: bool = FORK) -> None:
        self.fork = fork
        self.lock = threading.RLock()
        self.process: subprocess.Popen | None = None
        self.replies: queue.Queue = queue.Queue()
        self.owner = 0
        self.ready = False
        self.failure = ""  # why the worker could not start, in its own words

    def start(self) -> None:
        """Starts the worker without waiting until it is ready."""
        with self.lock:
            if self.process and self.process.poll() is None and self.owner == os.getpid():
                return
            code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
            code += "from course_utils.exercises.worker import main; main(sys.argv[2] == 'fork')"
            mode = "fork" if self.fork else "stay"
            environment = os.environ | {
                f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")
            }
            environment["CUDA_VISIBLE_DEVICES"] = ""  # answers are judged on the CPU
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(_path()), mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            self.owner, self.replies, self.ready = os.getpid(), queue.Queue(), False
            # Without its buffer, whose lock would be held for ever in a fork of this process.
            replies, self.process.stdout = self.process.stdout.detach(), None
            reader = threading.Thread(target=_read, args=(replies, self.replies), daemon=True)
            reader.start()

    def stop(self) -> None:
        """Ends the worker, and with it the answer that it is running."""
        with self.lock:
            if self.process and self.owner == os.getpid():
                try:
                    self.process.stdin.close()  # the worker kills its child and leaves
                    self.process.wait(2 if self.fork else 0)
                except (OSError, subprocess.TimeoutExpired):
                    self.process.kill()
                    self.process.wait()
            self.process = None

    def ask(self, request: dict) -> dict:
        """Sends one request; on any failure the worker is replaced at the next one."""
        with self.lock:
            self.start()
            try:
                if not self.ready:
                    self.failure = self._next(START_LIMIT)
                    if self.failure:
                        raise _Gone("start")
                    self.ready = True
                send(self.process.stdin, request)
                reply = self._next(request["limit"] + request["patience"])
                if "problem" in reply and not self.fork:  # what is broken stays so
                    self.stop()
                return reply
            except (_Gone, OSError) as gone:
                self.stop()
                problem = gone.args[0] if isinstance(gone, _Gone) and self.ready else "start"
                return {"problem": problem, "signal": 0, "text": self.failure}
            except BaseException:  # an interrupt: the reply on its way is nobody's
                self.stop()
                raise

    def _next(self, seconds: float):
        end = time.monotonic() + seconds
        while True:
            try:
                # In slices: an interrupt does not end a long wait on every platform.
                reply = self.replies.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() > end:
                    raise _Gone("time") from None
            else:
                if reply is None:
                    raise _Gone("died")
                return reply


def _path() -> list[str]:
    """Where the worker finds the same packages, this one first of all."""
    return [str(Path(__file__).resolve().parents[2]), *(str(p) or os.getcwd() for p in sys.path)]


def _read(stream, replies: queue.Queue) -> None:
    try:
        with stream:
            while True:
                replies.put(receive(stream))
    except Exception:  # the other side is gone, or what came is no reply
        replies.put(None)


SANDBOX = Sandbox()
atexit.register(SANDBOX.stop)


def judge(exercise: Exercise, candidate: Any, sandbox: Sandbox = SANDBOX) -> Verdict:
    """Judges `candidate`; shows and records nothing, and raises nothing whatever it does.

    Only an interrupt by the learner (KeyboardInterrupt) leaves this function as an exception.
    """
    limit = time_limit()
    try:
        sentence = misfit(exercise, candidate)
        if sentence is not None:
            return Verdict(WRONG, sentence)
        try:
            with _time_up_after(limit):
                body, sources = packed(candidate), _sources(candidate)
        except Exception:  # what cannot be sent is judged here, with fewer safeguards
            with sandbox.lock:
                reply = _here(exercise, candidate, limit)
        else:
            request = {"slug": exercise.slug, "candidate": body, "sources": sources, "limit": limit}
            # A worker that forks sees to the limit itself. One that does not may have to start
            # interpreters for chapter 5's ranks, which import torch.
            starts = 30.0 if exercise.chapter == 5 else 0.0
            request["patience"] = CATALOGUE + 5.0 if sandbox.fork else starts
            reply = sandbox.ask(request)
            if reply.get("problem") == "unpickle":
                with sandbox.lock:
                    reply = _here(exercise, candidate, limit)
    except TimeUp:
        reply = {"problem": "time"}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reply = {"problem": "broken", "text": type(error).__name__}
    return _verdict(exercise, reply, limit)


def _verdict(exercise: Exercise, reply: dict, limit: float) -> Verdict:
    problem = reply.get("problem")
    if problem is None:
        verdict, printed = reply["verdict"], reply["printed"]
        if not printed:
            return verdict
        details = verdict.details | {"printed": printed, "characters": reply["characters"]}
        return replace(verdict, details=details)
    if problem == "time":
        text = (
            f"`{exercise.name}` did not come to an end within {limit:g} seconds and was stopped: "
        )
        text += "look for a loop whose condition never becomes false."
    elif problem == "start":
        text = f"`{exercise.name}` could not be judged: the checking process did not start "
        text += f"({reply['text'] or 'no reason given'}). Your answer is not lost: check again, "
        text += "after `make env` if the reason is a missing package."
    elif problem == "broken":
        text = f"`{exercise.name}` could not be judged: reading what it is or did raised "
        text += f"{reply['text']}. Does it change torch or Python itself, or return something odd?"
    elif reply.get("signal"):
        name = signal.Signals(reply["signal"]).name
        text = f"`{exercise.name}` ended the checking process ({name}): it used up the memory or "
        text += "the stack, or crashed below Python."
    else:
        text = f"`{exercise.name}` ended its Python process (`os._exit` or the like)."
    return Verdict(WRONG, text, details={"problem": problem})


# --- what is sent -------------------------------------------------------------------------------


def _sources(candidate: Any) -> dict[str, list[str]]:
    """The text of the answer's cells, which the worker cannot read, for error messages."""
    files = {function.__code__.co_filename for function in functions_of(candidate)}
    return {name: linecache.getlines(name) for name in files}


# --- what cannot be sent ------------------------------------------------------------------------


def _here(exercise: Exercise, candidate: Any, limit: float) -> dict:
    """Judges in this process: for answers that hold a lock, a compiled function, an open file."""
    from .engine import MAX_PRINTED
    from .worker import CappedText

    printed = CappedText(MAX_PRINTED)
    away = torch.get_default_device().type != "cpu"
    with kept_state(), torch.inference_mode(False), torch.device("cpu") if away else nullcontext():
        torch.set_default_dtype(torch.float32)  # as in the worker, whatever the learner chose
        sys.stdout = sys.stderr = printed
        with _time_up_after(limit):
            verdict = diagnose(exercise, candidate)
    return {"verdict": verdict, "printed": printed.kept, "characters": printed.total}


@contextmanager
def _time_up_after(seconds: float) -> Iterator[None]:
    """Raises TimeUp in this thread when the time is over, again and again until it is heeded."""
    done = threading.Event()
    target = threading.get_ident()

    def insist() -> None:
        pause = seconds
        while not done.wait(pause):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(target), ctypes.py_object(TimeUp)
            )
            pause = 0.05

    insisting = threading.Thread(target=insist, daemon=True)
    insisting.start()
    try:
        yield
    finally:
        done.set()
        insisting.join()
