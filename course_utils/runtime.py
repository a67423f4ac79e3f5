"""What a run is made of: profile, device, seeds, threads, and a report of the environment."""

from __future__ import annotations

import os
import platform
import random
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PROFILES = ("quick", "full")


class Profile(NamedTuple):
    """The size of the run, "quick" or "full", and why it is that one."""

    name: str
    reason: str


@dataclass(frozen=True)
class Course:
    """What `setup` settled: the profile, where tensors live, and the seed."""

    profile: str
    device: torch.device
    seed: int

    @property
    def quick(self) -> bool:
        return self.profile == "quick"


def profile(choice: str | None = None) -> Profile:
    """The profile: `choice`, else COURSE_PROFILE, else "full" where CUDA is found, else "quick".

    Raises ValueError, in a sentence, for any other name.
    """
    for name, source in ((choice, "the argument"), (os.environ.get("COURSE_PROFILE"), None)):
        if name:  # an empty variable counts as unset
            if name not in PROFILES:
                raise ValueError(
                    f"{source or 'COURSE_PROFILE'} asks for the profile {name!r}: "
                    'choose "quick" or "full".'
                )
            return Profile(name, f"chosen by {source or 'COURSE_PROFILE'}")
    if _cuda():
        return Profile("full", "a CUDA GPU was found; COURSE_PROFILE=quick is the small one")
    return Profile("quick", "no CUDA GPU was found; COURSE_PROFILE=full is the large one")


def device(choice: str | None = None) -> torch.device:
    """Where tensors live: the CPU in the quick profile, in the full one CUDA where it is found.

    The quick profile stays on the CPU beside a GPU too, because its numbers are those stored in the
    notebooks.
    """
    import torch

    return torch.device("cuda" if profile(choice).name == "full" and _cuda() else "cpu")


def seed_everything(seed: int) -> None:
    """Start the random numbers of Python, NumPy and torch (all devices) from `seed`."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def environment_report(choice: str | None = None) -> str:
    """Versions, device, threads, profile and record folder in four lines, to paste into a question.

    Versions are read from the installed packages' metadata, so that none is imported but torch.
    """
    import torch

    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "torchvision", "transformers"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    name, reason = profile(choice)
    where, threads = device(choice), torch.get_num_threads()
    if where.type == "cuda":
        where = f"{where} ({torch.cuda.get_device_name()})"
    return "\n".join(
        (
            f"{', '.join(versions)} on {platform.system()} {platform.machine()}",
            f"Profile {name}: {reason}.",
            f"Device {where}, {threads} thread{'s' if threads > 1 else ''} "
            f"on {os.cpu_count()} processors.",
            f"Your answers are kept in {home} (set by COURSE_HOME)."
            if (home := os.environ.get("COURSE_HOME"))
            else "Your answers are kept in ~/.build-prove-scale (COURSE_HOME sets another folder).",
        )
    )


_profile = profile  # setup's argument hides the function


def setup(profile: str | None = None, threads: int | None = None, seed: int = 0) -> Course:
    """Begin a chapter: choose the profile, fix threads and seeds, set the plot style, report.

    `threads` (else COURSE_THREADS, else 1 in the quick profile and torch's own choice in the full
    one) is the number torch computes with: the same number gives the same sums. A `profile` given
    here is set as COURSE_PROFILE, so that what follows in this process, and the processes it
    starts, use it too.
    """
    import torch

    from course_utils import plots

    chosen = _profile(profile)
    threads = threads if threads is not None else os.environ.get("COURSE_THREADS") or None
    if threads is None and chosen.name == "quick":
        threads = (
            1  # small tensors gain nothing from two, and two on busy cores wait for each other
        )
    if threads is not None:
        torch.set_num_threads(_positive(threads))
    if profile:
        os.environ["COURSE_PROFILE"] = profile
    seed_everything(seed)
    plots.use_style()
    print(environment_report(profile))
    return Course(chosen.name, device(profile), seed)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _positive(threads: int | str) -> int:
    try:
        number = int(threads)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(
            f"The number of threads is {threads!r}: give a whole number from 1 on, "
            "as setup(threads=2) or COURSE_THREADS=2."
        )
    return number
