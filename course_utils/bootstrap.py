"""`env`, `lab` and `test`: what make and, on Windows, `py -m course_utils …` run.

Standard library only, and nothing newer than Python 3.8: this file runs before anything is
installed, and has to be read by an old Python to tell its user which one is needed.

`COURSE_ENV=active` uses the Python that is running as it stands and installs nothing: for conda,
where environment.yml did the work, and for CI jobs that test other versions than the lock's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = (3, 10), (3, 14)  # what torch has wheels for
WINDOWS = os.name == "nt"

# Settings that would send packages elsewhere than into .venv, or take them from elsewhere
# than the index. Indexes, proxies and certificates of the machine stay as they are.
MISLEADING = (
    "PYTHONHOME PYTHONPATH VIRTUAL_ENV CONDA_PREFIX UV_PYTHON UV_SYSTEM_PYTHON UV_FIND_LINKS "
    "UV_CONSTRAINT UV_OVERRIDE UV_TARGET UV_PREFIX UV_TORCH_BACKEND UV_RESOLUTION UV_PRERELEASE "
    "UV_NO_DEPS UV_REQUIRE_HASHES PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_CONSTRAINT "
    "PIP_PYTHON PIP_REQUIREMENT PIP_REQUIRE_HASHES PIP_NO_BINARY PIP_PRE PIP_NO_BUILD_ISOLATION"
).split()

# Run inside .venv after an install: prints each package that is not what the lock says.
_COMPARE_WITH_LOCK = """
import sys
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement
for line in open(sys.argv[1], encoding="utf-8"):
    line = line.split("#")[0].strip()
    if line and ((wanted := Requirement(line)).marker is None or wanted.marker.evaluate()):
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = "missing"
        if found != str(wanted.specifier)[2:]:
            print(f"{wanted.name} {found} instead of {str(wanted.specifier)[2:]}")
"""

# Lines of uv and pip that name every package once more.
_NOISE = (
    " + ",
    " - ",
    " ~ ",
    "Requirement already",
    "Ignoring ",
    "Installing collected",
    "Success",
)

# What an installer says when it fails, and the one sentence that helps.
_REMEDIES = (
    (
        ("No space left", "os error 28", "not enough space on the disk", "os error 112"),
        "The disk is full: the packages need about 10 GB with their download cache. "
        "Free some space, then run the same command again; it goes on where it stopped.",
    ),
    (
        ("no wheels", "No matching distribution", "not a supported wheel", "no version of"),
        "A package is not offered for this Python and this machine: use a 64-bit Python "
        "3.10 to 3.14 on Linux, Windows, or a Mac with Apple silicon and macOS 14 or later; or "
        "the course on Colab.",
    ),
    (
        ("Permission denied", "Access is denied", "os error 13", "os error 5"),
        "A file could not be written: close programs that use the .venv folder (JupyterLab, an "
        "editor), check that the course's folder is yours, then run the same command again.",
    ),
    (
        ("error sending request", "dns error", "Failed to fetch", "Connection", "timed out", "SSL"),
        "The package index could not be reached: check the network (and HTTPS_PROXY, if you use "
        "a proxy), then run the same command again; what has been downloaded is kept.",
    ),
)


class Stop(Exception):
    """A sentence for the user: what is wrong and what to do."""


def env() -> int:
    """Create `.venv` with the locked packages and fetch the data; return an exit code."""
    if code := _prepare():
        return code
    if not _active():
        print("The environment in .venv is ready.", flush=True)
    return 0


def lab(argv: list[str]) -> int:
    """`env`, then JupyterLab on the learner's own copy of chapter 1; return an exit code."""
    from course_utils.learner_copy import refresh

    try:
        _install()
    except Stop as stop:
        return _tell(stop)
    try:
        _fetch()
    except Stop as stop:
        _tell(stop)  # the first chapters work without it
    copies = ROOT / "work"
    try:
        for sentence in refresh(ROOT / "notebooks", copies):
            print(sentence, flush=True)
    except OSError as error:
        return _tell(Stop(f"Your copies in the work folder cannot be brought up to date: {error}"))
    command = [_python(), "-m", "jupyterlab", "--log-level=WARN", "--ServerApp.answer_yes=True"]
    command.append(f"--ServerApp.root_dir={ROOT}")
    first = sorted(path.name for path in copies.glob("*.ipynb"))[:1]
    if first and not any(argument.endswith(".ipynb") for argument in argv):
        command.append(f"--LabApp.default_url=/lab/tree/{copies.name}/{first[0]}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container there is often no other user
    print("Starting JupyterLab; its address follows. Ctrl-C here ends it.", flush=True)
    return _run([*command, *argv])


def test(argv: list[str]) -> int:
    """`env`, then lint, format check and pytest with `argv`; return an exit code."""
    if code := _prepare():
        return code
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUTF8="1")
    failed = []
    for part in (["check"], ["format", "--check"]):
        if _run([_python(), "-m", "ruff", *part, "."], environment):
            failed.append("ruff " + part[0])
            print(f"{failed[-1]} failed (above); the tests run all the same.", flush=True)
    pytest = [_python(), "-m", "pytest", "-n", "2", "--dist", "worksteal", *argv]
    code = _run(pytest, environment)
    if failed:
        print(f"Failed besides the tests: {', '.join(failed)}.", file=sys.stderr, flush=True)
    return code or (1 if failed else 0)


def bench(argv: list[str]) -> int:
    """`env`, then the benchmarks, one thread each; return an exit code."""
    if code := _prepare():
        return code
    environment = dict(os.environ, OMP_NUM_THREADS="1", COURSE_THREADS="1", PYTHONUTF8="1")
    return _run([_python(), "-m", "benchmarks", *argv], environment)


def _prepare() -> int:
    """Install and fetch what is missing; an exit code, and where it is not 0 the reason is told."""
    try:
        _install()
        _fetch()
    except Stop as stop:
        return _tell(stop)
    return 0


def is_current() -> bool:
    """Whether `.venv` holds a complete install of what pyproject.toml and the lock say now."""
    return _read(_venv() / "course-installed") == _install_key() and Path(_python()).exists()


def _venv() -> Path:
    return ROOT / ".venv"


def _active() -> bool:
    return os.environ.get("COURSE_ENV") == "active"


def _python() -> str:
    if _active():
        return sys.executable
    return str(_venv() / ("Scripts/python.exe" if WINDOWS else "bin/python"))


def _tell(stop: Stop) -> int:
    print(f"\n{stop}", file=sys.stderr, flush=True)
    return 1


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _install_key() -> str:
    """Changes with the dependencies, with .venv's Python, and when the folder was moved."""
    files = [_read(ROOT / name) for name in ("pyproject.toml", "requirements.lock")]
    return _hash(*files, _read(_venv() / "pyvenv.cfg"), str(ROOT))


def _data_key() -> str:
    """Changes when .venv or what is to be fetched changes."""
    sources = sorted((ROOT / "course_utils" / "data").glob("*.py"))
    return _hash(_install_key(), *(_read(path) for path in sources))


def _install() -> None:
    """Bring .venv to the lock's state. The stamp is written last, so that a run that was
    interrupted is taken up again."""
    if _active():
        return
    if not (ROOT / "pyproject.toml").exists():
        raise Stop(
            f"There is no pyproject.toml in {ROOT}: `env`, `lab` and `test` work in a copy of the "
            "course's repository. Clone it and run the command there."
        )
    if is_current():
        return
    (_venv() / "course-installed").unlink(missing_ok=True)
    uv = _find_uv()
    if not _works(_python()):
        _create(uv)
    print(
        "Installing the course's packages into .venv with "
        f"{'uv' if uv else 'pip'} (the first time: one to ten minutes, about 6 GB on Linux).",
        flush=True,
    )
    # Compiled ahead, as pip does: every later start of Python is faster, above all in tests.
    compiled = [uv, "pip", "install", "--compile-bytecode", "--python", _python()]
    install = compiled if uv else _pip()
    # The lock is complete, so nothing has to be resolved here.
    _installer([*install, "--no-deps", "-r", str(ROOT / "requirements.lock")])
    _installer([*install, "--no-deps", "-e", str(ROOT)])
    differing = _output([_python(), "-c", _COMPARE_WITH_LOCK, str(ROOT / "requirements.lock")])
    if differing is None or differing.strip():
        raise Stop(
            "The installed packages are not those of requirements.lock: "
            f"{', '.join((differing or 'they cannot be listed').split(chr(10))[:5]).strip(', ')}. "
            "A setting of pip or uv on this machine interferes (`pip config list`, uv.toml); "
            "remove it, or delete the .venv folder and run the same command again."
        )
    (_venv() / "course-installed").write_text(_install_key(), "utf-8")


def _fetch() -> None:
    """Fetch what the quick profile needs, once for each state of course_utils/data."""
    if _active() or _read(_venv() / "course-data") != _data_key():
        print("Fetching the data of the quick profile.", flush=True)
        if _run([_python(), "-c", "from course_utils.data import fetch_all; fetch_all()"]):
            raise Stop(
                "The data could not be fetched (the reason is above). Check the network and run "
                "the same command again; the environment itself is ready."
            )
        if not _active():
            (_venv() / "course-data").write_text(_data_key(), "utf-8")


def _works(python: str) -> bool:
    """Whether `python` starts and is one of the supported versions."""
    found = _output([python, "-I", "-c", "import sys; print(*sys.version_info[:2])"])
    try:
        return found is not None and OLDEST <= tuple(map(int, found.split())) <= NEWEST
    except ValueError:
        return False


def _base_python(uv: str | None) -> str:
    """The Python to make .venv from: this one if it is supported, else another on PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        if other and _works(other):
            return other
    if uv:
        return "3.12"  # uv finds or downloads it
    raise Stop(
        f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; the course needs Python "
        "3.10 to 3.14. Install one from python.org (or your package manager), then run "
        f"`{'py -3.12' if WINDOWS else 'python3.12'} -m course_utils env`, "
        "or `make env PYTHON=python3.12`."
    )


def _create(uv: str | None) -> None:
    if (_venv() / "pyvenv.cfg").exists():
        print("The .venv folder is incomplete or its Python is gone: making it anew.", flush=True)
    elif _venv().exists() and any(_venv().iterdir()):
        raise Stop(f"{_venv()} exists and is no Python environment: move it away, then try again.")
    base = _base_python(uv)
    if uv:
        _installer([uv, "venv", "--clear", "--python", base, str(_venv())])
    elif _output([base, "-I", "-c", "import venv, ensurepip"]) is None:
        raise Stop(
            f"The Python at {base} cannot make environments (its venv module is missing). On "
            "Debian or Ubuntu: `sudo apt install python3-venv`; or install uv; then run the same "
            "command again."
        )
    else:
        _installer([base, "-m", "venv", "--clear", str(_venv())])


def _find_uv() -> str | None:
    uv = shutil.which("uv")
    return uv if uv and _output([uv, "--version"]) is not None else None


def _pip() -> list[str]:
    if _output([_python(), "-m", "pip", "--version"]) is None:  # an environment made by uv
        _installer([_python(), "-m", "ensurepip", "--upgrade"])
    return [_python(), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]


def _environment() -> dict:
    kept = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    # Overrides `find-links` of a pip.conf, which could offer another build of a locked version;
    # an empty value would not, and one with a space in it would be split.
    kept["PIP_FIND_LINKS"] = ".venv"
    return kept


def _installer(command: list[str]) -> None:
    """Run an installer, show what it says, and turn its failure into a sentence."""
    said = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    try:
        for line in process.stdout:
            said.append(line)
            if not line.startswith(_NOISE):
                print(line, end="", flush=True)
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise Stop("Interrupted; run the same command again to go on.") from None
    if code:
        told = "".join(said)
        for signs, remedy in _REMEDIES:
            if any(sign in told for sign in signs):
                raise Stop(remedy)
        raise Stop(
            f"`{' '.join(command[:4])} …` failed with exit code {code}; its last words are above. "
            "Run the same command again; if it fails again, delete the .venv folder first."
        )


def _output(command: list[str]) -> str | None:
    """What a short command printed, or None if it failed."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _run(command: list[str], environment: dict | None = None) -> int:
    """Run in the repository's root with this terminal; Ctrl-C is the child's to answer."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
