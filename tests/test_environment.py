"""pyproject.toml, the lock, environment.yml, CI and hooks say the same thing, and nothing local."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from course_utils import bootstrap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DIRECT = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
LOCK = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]


def as_version(pair):
    return ".".join(map(str, pair))


# ---- pyproject.toml ----------------------------------------------------------------------------


def test_dependencies_have_a_lower_bound_and_nothing_else():
    for requirement in DIRECT:
        assert [s.operator for s in requirement.specifier] == [">="], requirement


# The versions that Google Colab ships (image of August 2026).
COLAB = {
    "torch": "2.11", "torchvision": "0.26", "transformers": "5.15", "datasets": "4.0",
    "numpy": "2.1.3", "matplotlib": "3.10", "scikit-learn": "1.6", "ipykernel": "6.17",
    "ipython": "7.34", "ipywidgets": "7.7",
}  # fmt: skip


@pytest.mark.parametrize("name", COLAB)
def test_the_lower_bounds_admit_colab(name):
    (requirement,) = [r for r in DIRECT if r.name == name]
    assert COLAB[name] in requirement.specifier


def test_the_supported_pythons_are_the_same_everywhere():
    oldest, newest = PYTHONS[0], PYTHONS[-1]
    assert (as_version(bootstrap.OLDEST), as_version(bootstrap.NEWEST)) == (oldest, newest)
    assert PROJECT["requires-python"] == f">={oldest}"
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    assert ci["locked"]["strategy"]["matrix"]["python"] == [oldest, newest]
    bounds = ci["bounds"]["strategy"]["matrix"]["include"]
    assert {(b["resolution"], b["python"]) for b in bounds} == {
        ("lowest-direct", oldest),
        ("highest", newest),
    }
    assert f"--python-version {oldest} " in (ROOT / "Makefile").read_text("utf-8")


# ---- requirements.lock -------------------------------------------------------------------------


def locked():
    """Each line of the lock as (name, version, Requirement)."""
    for line in LOCK:
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==", line
        yield canonicalize_name(requirement.name), pin.version, requirement


def test_the_lock_holds_exact_versions_of_the_index_and_nothing_else():
    for _, version, requirement in locked():
        assert requirement.url is None
        assert "+" not in version, f"{requirement}: a local build, not from the index"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_every_dependency_is_locked_once_within_its_bound(python, platform):
    machine = {"linux": "x86_64", "darwin": "arm64", "win32": "AMD64"}[platform]
    where = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "platform_machine": machine,
        "os_name": "nt" if platform == "win32" else "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found = {}
    for name, version, requirement in locked():
        if requirement.marker is None or requirement.marker.evaluate(where):
            assert name not in found, f"{name} is locked twice for Python {python} on {platform}"
            found[name] = version
    for requirement in DIRECT:
        if requirement.marker is not None and not requirement.marker.evaluate(where):
            continue
        name = canonicalize_name(requirement.name)
        assert name in found, f"{name} is not in requirements.lock: run `make lock`"
        assert found[name] in requirement.specifier, f"{name} {found[name]}: run `make lock`"


# ---- environment.yml ---------------------------------------------------------------------------


def test_conda_installs_this_project_and_lists_nothing_a_second_time():
    packages = [d for d in CONDA["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict)]
    assert CONDA["channels"] == ["conda-forge"]
    assert {re.split(r"[ <>=]", p)[0] for p in packages} == {"python", "pip"}
    (line,) = pip
    path, extra = re.fullmatch(r"--editable (\S+?)(?:\[(\w+)\])?", line).groups()
    assert (ROOT / path / "pyproject.toml").resolve() == ROOT / "pyproject.toml"
    assert extra is None or extra in PROJECT["optional-dependencies"]
    assert CONDA["variables"] == {"COURSE_ENV": "active"}


def test_conda_takes_the_same_pythons():
    (python,) = [d for d in CONDA["dependencies"] if str(d).startswith("python")]
    bounds = SpecifierSet(python.removeprefix("python "))
    minors = [f"3.{minor}" for minor in range(0, 30)]
    assert [v for v in minors if v in bounds] == PYTHONS


def test_conda_understands_the_packages():
    rattler = pytest.importorskip("rattler", reason="py-rattler has no wheel for this machine")
    for package in CONDA["dependencies"]:
        if isinstance(package, str):
            assert rattler.MatchSpec(package).name is not None


# ---- CI and hooks ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_follow_githubs_schema(path):
    command = ["check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_workflow():
    assert WORKFLOWS


def test_the_hooks_are_valid_and_local():
    path = ROOT / ".pre-commit-config.yaml"
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    repos = yaml.safe_load(path.read_text("utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_ci_script_is_executable_and_parses():
    subprocess.run(["bash", "-n", ".ci/run"], check=True, cwd=ROOT)
    if sys.platform != "win32":
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


# ---- nothing of one machine --------------------------------------------------------------------

LOCAL = re.compile(
    r"(?<![\w.])/(?:home|Users|root)/(?!someone)\w|[A-Z]:\\+Users\\"  # somebody's folder
    r"|https?://[^\s\"']+/(?:simple|packages)(?:/|\b(?=[\s\"']))"  # a package index
    r"|--(?:extra-)?index-url[ =]\S|--find-links[ =]/"
)


def tracked():
    """The files of the repository, with those that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_holds_a_path_of_this_machine_or_a_registry():
    here = "|".join(re.escape(str(path)) for path in (ROOT, Path.home()) if len(path.parts) > 1)
    here = re.compile(rf"(?<![\w.])(?:{here})(?![\w-])")
    found = []
    for path in tracked():
        data = path.read_bytes()
        if path == Path(__file__).resolve() or b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if LOCAL.search(line) or here.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line, local",
    [
        ("see /home/ann/course", True),
        (r"C:\Users\Ann", True),
        ("pip install --index-" + "url https://mirror.example/x", True),
        ("from https://mirror.example/" + "simple/torch", True),
        ("find it on https://docs.pytorch.org/docs/stable/simple.html", False),
        ("a path such as data/home/x", False),
    ],
)
def test_what_counts_as_local(line, local):
    assert bool(LOCAL.search(line)) is local
