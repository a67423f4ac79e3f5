"""Files the course needs beside its code: where they are kept, and how they are verified.

Every file is compared with its SHA-256 digest each time it is asked for. A file that differs is set
aside under another name, told in a sentence and made (or downloaded) anew; it is never used.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """The folder for data: `COURSE_DATA` where it is set, else one in the user's cache folder."""
    chosen = os.environ.get("COURSE_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "build-prove-scale"


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    with _replacing(path) as file:
        file.write(content)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file in the same way. A link would be damaged together with what it leads to."""
    with open(source, "rb") as original, _replacing(path) as file:
        shutil.copyfileobj(original, file, 1 << 20)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is whole."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def ensure(folder: Path, digests: dict[str, str], make: Callable[[], None]) -> None:
    """See to it that `folder` holds the files named in `digests`, whole and unchanged.

    Where one is missing or damaged, `make()` is called once to write what is missing into `folder`,
    in one process at a time. Raises RuntimeError, in a sentence, where the folder cannot be written
    or the files differ from their digests even after that.
    """
    if not _unfit(folder, digests):
        return
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise RuntimeError(
            f"The data cannot be written to {folder} ({error}): "
            "set COURSE_DATA to a folder that you may write to."
        ) from None
    with lock:
        for name in _unfit(folder, digests):  # looked at again: another process may have made them
            path = folder / name
            if path.exists():
                aside = path.with_name(f"{name}.damaged")
                os.replace(path, aside)
                print(
                    f"{path} was damaged, or comes from another version of the course. "
                    f"It is kept as {aside.name} and made anew."
                )
        if _unfit(folder, digests):
            make()
        if unfit := _unfit(folder, digests):
            raise RuntimeError(
                f"{', '.join(unfit)} in {folder} differ from what the course expects even after "
                "they were made anew: please report this, with the output of setup()."
            )


def _unfit(folder: Path, digests: dict[str, str]) -> list[str]:
    """The names of the files that are missing or differ from their digest."""
    return [
        name
        for name, digest in digests.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
