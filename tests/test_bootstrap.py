"""`env`, `lab` and `test` on a bare machine, on a half-finished one, and on one that is ready."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course_utils import bootstrap

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "Scripts/python.exe" if os.name == "nt" else "bin/python"


class Machine:
    """A copy of the repository in which installers are recorded instead of run."""

    def __init__(self, root):
        self.root, self.ran, self.says, self.fails = root, [], {}, set()

    def output(self, command):
        """Stands for bootstrap._output: short questions to a Python or to uv."""
        asked = " ".join(command)
        for part, answer in self.says.items():
            if part in asked:
                return answer
        if "version_info" in asked:
            return "3 12\n" if Path(command[0]).exists() else None
        return ""

    def installer(self, command):
        self.ran.append(command)
        if "venv" in command:
            shutil.rmtree(self.root / ".venv", ignore_errors=True)  # --clear
            python = self.root / ".venv" / SCRIPTS
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text("")
            (self.root / ".venv" / "pyvenv.cfg").write_text("version = 3.12.1")
        for part in self.fails:
            if part in command:
                raise bootstrap.Stop(f"{part} failed")

    def run(self, command, environment=None):
        self.ran.append(command)
        return 1 if any(part in " ".join(command[1:]) for part in self.fails) else 0

    def commands(self):
        """What ran, as one word each; forgets it."""
        words = ["venv", "-r", "-e", "check", "format", "pytest", "jupyterlab"]
        found = [next((w for w in words if w in c), c[-1].split()[-1]) for c in self.ran]
        self.ran.clear()
        return [word.replace("fetch_all()", "fetch_all") for word in found]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    machine = Machine(tmp_path)
    monkeypatch.delenv("COURSE_ENV", raising=False)
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "_find_uv", lambda: "/somewhere/uv")
    monkeypatch.setattr(bootstrap, "_output", machine.output)
    monkeypatch.setattr(bootstrap, "_installer", machine.installer)
    monkeypatch.setattr(bootstrap, "_run", machine.run)
    return machine


def test_the_first_run_does_everything_and_the_second_nothing(machine):
    assert bootstrap.env() == 0
    assert machine.commands() == ["venv", "-r", "-e", "fetch_all"]
    assert bootstrap.env() == 0
    assert machine.commands() == []


@pytest.mark.parametrize("step, left", [("-r", ["-r", "-e"]), ("-e", ["-r", "-e"])])
def test_an_interrupted_install_is_taken_up_again(machine, step, left, capsys):
    machine.fails = {step}
    assert bootstrap.env() == 1
    assert f"{step} failed" in capsys.readouterr().err
    machine.fails.clear()
    machine.commands()
    assert bootstrap.env() == 0
    assert machine.commands() == [*left, "fetch_all"]


def test_data_that_could_not_be_fetched_is_told_and_fetched_at_the_next_run(machine, capsys):
    machine.fails = {"fetch_all"}
    assert bootstrap.env() == 1
    assert "Check the network" in capsys.readouterr().err
    machine.commands()
    machine.fails.clear()
    assert bootstrap.env() == 0
    assert machine.commands() == ["fetch_all"]


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock", ".venv/pyvenv.cfg"])
def test_a_change_of_the_dependencies_or_of_python_installs_again(machine, name):
    bootstrap.env()
    machine.commands()
    with (machine.root / name).open("a") as file:
        file.write("\n# changed\n")
    assert not bootstrap.is_current()
    bootstrap.env()
    assert machine.commands() == ["-r", "-e", "fetch_all"]


def test_an_environment_whose_python_is_gone_is_made_anew(machine, capsys):
    bootstrap.env()
    machine.commands()
    (machine.root / ".venv" / SCRIPTS).unlink()
    assert bootstrap.env() == 0
    assert machine.commands() == ["venv", "-r", "-e", "fetch_all"]
    assert "making it anew" in capsys.readouterr().out


def test_a_venv_made_by_hand_is_completed_not_replaced(machine):
    machine.installer(["uv", "venv"])
    machine.commands()
    assert bootstrap.env() == 0
    assert machine.commands() == ["-r", "-e", "fetch_all"]


def test_another_folder_called_venv_is_not_touched(machine, capsys):
    (machine.root / ".venv").mkdir()
    (machine.root / ".venv" / "letter.txt").write_text("keep me")
    assert bootstrap.env() == 1
    assert "is no Python environment" in capsys.readouterr().err
    assert machine.ran == []


def test_packages_other_than_the_locks_are_told_and_not_stamped(machine, capsys):
    machine.says["importlib.metadata"] = "torch 2.13.0+cpu instead of 2.15.0\n"
    assert bootstrap.env() == 1
    assert "torch 2.13.0+cpu instead of 2.15.0" in capsys.readouterr().err
    assert not bootstrap.is_current()


def test_without_uv_pip_does_the_same(machine, monkeypatch):
    monkeypatch.setattr(bootstrap, "_find_uv", lambda: None)
    assert bootstrap.env() == 0
    assert all(command[0] != "/somewhere/uv" for command in machine.ran)
    assert machine.commands() == ["venv", "-r", "-e", "fetch_all"]


def test_a_python_without_venv_is_told_what_to_install(machine, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "_find_uv", lambda: None)
    machine.says["ensurepip"] = None
    assert bootstrap.env() == 1
    assert "apt install python3-venv" in capsys.readouterr().err


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 15, 0)])
def test_an_unsupported_python_names_what_is_needed(machine, monkeypatch, capsys, version):
    monkeypatch.setattr(bootstrap.sys, "version_info", version)
    monkeypatch.setattr(bootstrap, "_find_uv", lambda: None)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    assert bootstrap.env() == 1
    said = capsys.readouterr().err
    assert f"This is Python 3.{version[1]}; the course needs Python 3.10 to 3.14." in said
    assert machine.ran == []


def test_an_unsupported_python_uses_a_supported_one_from_path(machine, monkeypatch):
    other = machine.root / "python3.11"
    other.write_text("")
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda n: str(other) if "3.11" in n else None)
    assert bootstrap.env() == 0
    assert str(other) in machine.ran[0]


def test_outside_of_the_repository_it_says_so(machine, capsys):
    (machine.root / "pyproject.toml").unlink()
    assert bootstrap.env() == 1
    assert "Clone it" in capsys.readouterr().err


def test_an_active_environment_is_used_as_it_stands(machine, monkeypatch):
    monkeypatch.setenv("COURSE_ENV", "active")
    assert bootstrap.env() == 0
    assert [command[0] for command in machine.ran] == [sys.executable]
    assert machine.commands() == ["fetch_all"]
    assert not (machine.root / ".venv").exists()


def test_lab_opens_the_learners_copy_of_chapter_1_and_passes_arguments_on(machine):
    (machine.root / "notebooks").mkdir()
    for name in ("02_mlp.ipynb", "01_autograd.ipynb"):
        (machine.root / "notebooks" / name).write_text('{"cells": []}')
    assert bootstrap.lab(["--no-browser", "--port", "8899"]) == 0
    command = machine.ran[-1]
    assert f"--LabApp.default_url=/lab/tree/{'work'}/01_autograd.ipynb" in command
    assert command[-3:] == ["--no-browser", "--port", "8899"]
    assert sorted(p.name for p in (machine.root / "work").glob("*.ipynb")) == [
        "01_autograd.ipynb",
        "02_mlp.ipynb",
    ]
    bootstrap.lab(["work/02_mlp.ipynb"])
    assert machine.ran[-1][-1] == "work/02_mlp.ipynb"
    assert not any("01_autograd" in part for part in machine.ran[-1])


def test_lab_goes_on_without_the_data(machine, capsys):
    machine.fails = {"fetch_all"}
    assert bootstrap.lab([]) == 0
    assert machine.commands()[-1] == "jupyterlab"


@pytest.mark.parametrize("failing", ["ruff check", "ruff format", "-m pytest"])
def test_test_fails_if_any_part_fails_and_runs_all_parts(machine, failing):
    assert bootstrap.test([]) == 0
    machine.commands()
    machine.fails = {failing}
    assert bootstrap.test(["-k", "some"]) != 0
    assert machine.ran[-1][-2:] == ["-k", "some"]
    assert machine.commands() == ["check", "format", "pytest"]


@pytest.mark.parametrize(
    "said, told",
    [
        ("error: failed to write: No space left on device (os error 28)", "disk is full"),
        ("ERROR: No matching distribution found for torch==2.15.0", "not offered for this Python"),
        ("error: dns error: failed to lookup address information", "could not be reached"),
        ("something unheard of", "failed with exit code 3"),
    ],
)
def test_a_failing_installer_becomes_one_sentence(said, told, capfd):
    with pytest.raises(bootstrap.Stop, match=told):
        bootstrap._installer([sys.executable, "-c", f"import sys; print({said!r}); sys.exit(3)"])
    assert said in capfd.readouterr().out


def test_installers_do_not_see_settings_that_would_mislead_them(monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "elsewhere")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("VIRTUAL_ENV", "another")
    monkeypatch.setenv("PIP_INDEX_URL", "a mirror")
    seen = bootstrap._environment()
    assert "PIP_TARGET" not in seen and "VIRTUAL_ENV" not in seen
    assert seen["PIP_FIND_LINKS"] == ".venv"
    assert seen["PIP_INDEX_URL"] == "a mirror"


def test_the_comparison_with_the_lock_finds_other_and_missing_packages(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(
        f"pytest=={pytest.__version__}\nnumpy==0.1\nno-such-package==1.0\n"
        "torch==0.1 ; python_full_version < '3'\n# a comment\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", bootstrap._COMPARE_WITH_LOCK, str(lock)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("numpy ") and lines[0].endswith("instead of 0.1")
    assert lines[1] == "no-such-package missing instead of 1.0"


def test_bootstrap_needs_only_the_standard_library():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import course_utils.bootstrap, course_utils.learner_copy\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names - set(sys.stdlib_module_names) - {'__main__', 'course_utils'}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    # A Python may preload frozen helpers with leading underscores or encodings' aliases.
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(
    os.environ.get("COURSE_ENV") == "active" or not bootstrap.is_current(),
    reason=".venv is not what the lock says (run `make env`), or COURSE_ENV=active",
)
def test_a_second_run_takes_less_than_five_seconds():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "course_utils", "env"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "is ready" in done.stdout
    assert time.perf_counter() - start < 5
