"""What the learner did: one small file, `record.jsonl`, in the folder COURSE_HOME.

One line an exercise and a last line that counts them, so that a cut-off file is noticed and its
whole lines are still read. Every write is atomic and under a lock (several kernels may check at
once), and is made twice: `record.backup.jsonl` replaces what a damaged file has lost.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

Entries = dict[str, dict]


class RecordUnavailable(Exception):
    """The record could not be read or written; the message is a sentence for the learner."""


def home() -> Path:
    """The learner's folder: `COURSE_HOME`, else `.build-prove-scale` in the home directory."""
    chosen = os.environ.get("COURSE_HOME")
    return Path(os.path.expanduser(chosen or "~/.build-prove-scale"))


def load() -> Entries:
    """All that is recorded: slug → state, attempts, source of the passing answer, …

    Returns {} where nothing is recorded yet. A damaged file is set aside and told of on the way.
    """
    if not (home() / "record.jsonl").exists() and not (home() / "record.backup.jsonl").exists():
        return {}
    try:
        lock = _lock()
    except RecordUnavailable:  # a folder that may only be read can still be read
        return _read(home() / "record.backup.jsonl")[0] | _read(home() / "record.jsonl")[0]
    with lock:
        return _load()


def update(slug: str, change: Callable[[dict], None]) -> dict:
    """Lets `change` modify the entry of `slug` and writes the record; returns the entry.

    Raises:
        RecordUnavailable: the folder cannot be written, or stays locked by another process.
    """
    with _lock():
        entries = _load()
        entry = entries.setdefault(slug, {"slug": slug, "state": "not attempted", "attempts": 0})
        change(entry)
        text = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries.values())
        text += json.dumps({"entries": len(entries)}) + "\n"
        for name in ("record.jsonl", "record.backup.jsonl"):
            _write(home() / name, text)
        return entry


def now() -> str:
    """The time for an entry: UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _lock():
    from filelock import FileLock, Timeout

    try:
        home().mkdir(parents=True, exist_ok=True)
        lock = FileLock(home() / "record.lock", timeout=20)
        lock.acquire()
    except Timeout:
        text = f"The record in {home()} is locked by another process; this check is not recorded."
        raise RecordUnavailable(text) from None
    except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
        reason = getattr(error, "strerror", None) or error
        text = f"The record in {home()} cannot be written ({reason}): "
        text += "set COURSE_HOME to a folder of yours. This check is not recorded."
        raise RecordUnavailable(text) from None
    return _Held(lock)


class _Held:
    """A lock that is held; a failing write inside becomes a sentence."""

    def __init__(self, lock) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        self.lock.release()
        if isinstance(error, OSError):
            text = f"The record in {home()} cannot be written ({error.strerror}): "
            text += "this check is not recorded."
            raise RecordUnavailable(text) from None


def _load() -> Entries:
    main, backup = home() / "record.jsonl", home() / "record.backup.jsonl"
    entries, whole = _read(main)
    if whole:
        return entries
    kept, _ = _read(backup)
    recovered = kept | entries  # a line of the main file is never older than the backup's
    if main.exists():
        aside = _set_aside(main)
        print(
            f"The record {main} was damaged and is set aside as {aside.name}; "
            f"{len(recovered)} exercise{'s' if len(recovered) != 1 else ''} recovered.",
            file=sys.stdout,
        )
    return recovered


def _read(path: Path) -> tuple[Entries, bool]:
    """The whole lines of a record, and whether that is all of it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}, False
    entries, count = {}, None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("slug"), str) and "state" in entry:
            entries[entry["slug"]] = entry
        elif isinstance(entry, dict) and "entries" in entry:
            count = entry["entries"]
    return entries, count == len(entries)


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"record.damaged-{number}.jsonl")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # What UTF-8 cannot hold is written as JSON writes it.
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
