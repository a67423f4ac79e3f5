"""Build · Prove · Scale: PyTorch and Hugging Face, built by hand and proven equal to the libraries.

    from course_utils import setup, check, hint, solution, status

Everything is imported when it is first used: `import course_utils` alone loads no library.
"""

from __future__ import annotations

from importlib import import_module

_WHERE = {
    "setup": "learner",
    "check": "learner",
    "hint": "learner",
    "solution": "learner",
    "status": "learner",
    "reset": "learner",
    "report": "learner",
}
__all__ = [*_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"course_utils has no {name!r}; it has {', '.join(_WHERE)}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
