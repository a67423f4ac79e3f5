"""The learner's own passing answers as imports; the reference where there is none yet.

    from course_utils.mine import AddBias, MLP

Works in notebooks and in child processes alike, because answers come from the record.
"""

from __future__ import annotations

import linecache
from typing import Any

_built: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    from .exercises import registry

    for exercise in registry().values():
        if exercise.name == name:
            return _own(exercise) or exercise.reference
    raise AttributeError(f"the course has no exercise that builds {name!r}")


def _own(exercise) -> Any | None:
    """The recorded answer, judged again when the exercise's probes have changed since."""
    from .exercises import judge, record

    try:
        entry = record.load().get(exercise.slug, {})
    except record.RecordUnavailable as unavailable:
        print(unavailable)
        return None
    source = entry.get("source")
    if entry.get("state") != "passed":
        return None
    if not source:
        if exercise.slug not in _built:
            _built[exercise.slug] = None  # told once
            text = "your answer passed, but its text could not be recorded (a lambda, say)"
            print(f"{exercise.slug}: {text}; using the reference.")
        return None
    if source not in _built:
        _built[source] = None  # told once, not at every import
        answer = _build(exercise.slug, source, entry.get("name", exercise.name))
        if answer is None:
            print(f"{exercise.slug}: your recorded answer does not run here; using the reference.")
        elif entry.get("fingerprint") == exercise.fingerprint:
            _built[source] = answer
        elif judge(exercise.slug, answer).state == "passed":
            record.update(exercise.slug, lambda e: e.update(fingerprint=exercise.fingerprint))
            _built[source] = answer
        else:
            text = "its check has become stricter and your recorded answer no longer passes"
            print(f"{exercise.slug}: {text}; using the reference.")
    return _built[source]


def _build(slug: str, source: str, name: str) -> Any | None:
    from .exercises.source import global_names

    file = f"<your {slug}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {"__name__": __name__}
    try:
        exec(compile(source, file, "exec"), space)
        if not space.keys() >= set(global_names(source)):  # it uses what was not recorded
            return None
    except Exception:
        return None
    return space.get(name)
