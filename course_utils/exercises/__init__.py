"""All exercises of the course, and how an answer is judged.

from course_utils.exercises import judge, registry
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Exercise, Verdict

CHAPTERS = ("autograd", "mlp", "attention", "bert", "ddp")  # in the order of the notebooks


def registry() -> dict[str, Exercise]:
    """Every exercise by its slug, in the order of the chapters and of their notebooks."""
    return dict(_gathered())


@cache
def _gathered() -> dict[str, Exercise]:
    found: dict[str, Exercise] = {}
    for chapter in CHAPTERS:
        for exercise in import_module(f".{chapter}", __package__).EXERCISES:
            if exercise.slug in found:
                raise ValueError(f"two exercises have the slug {exercise.slug!r}")
            found[exercise.slug] = exercise
    return found


def find(slug: str) -> Exercise:
    """The exercise `slug`; KeyError with the nearest names where there is none."""
    if isinstance(slug, str) and slug in registry():
        return registry()[slug]
    from difflib import get_close_matches

    near = get_close_matches(str(slug), registry(), n=3, cutoff=0.5) or list(registry())[:5]
    raise KeyError(f"there is no exercise {slug!r}; did you mean {', '.join(near)}?")


def judge(slug: str, candidate: Any) -> Verdict:
    """Judges one answer: pure, in a process of its own.

    Shows nothing, records nothing, raises nothing whatever the answer does.

    Args:
        slug: which exercise, as in `registry()`.
        candidate: the learner's function or class.

    Returns:
        Verdict with `.state` ("passed", "wrong" or "not attempted"), `.misconception` (the slug of
        the named mistake, or None), `.message` and `.details`.

    Raises:
        KeyError: there is no exercise `slug`.
    """
    from .sandbox import judge as judge_in_sandbox

    return judge_in_sandbox(find(slug), candidate)
