"""What a learner calls: `setup`, `check`, `hint`, `solution`, `status`, `reset`, `report`."""

from __future__ import annotations

import inspect
import os
import platform
import textwrap
from collections.abc import Callable
from typing import Any

from .exercises import find, judge, record, registry
from .exercises.display import MARKS, as_html, as_text
from .exercises.engine import NOT_ATTEMPTED, PASSED, Exercise, Verdict
from .exercises.source import self_contained, source_of, stub_of

_hints_shown: dict[str, int] = {}


class NotPassed(AssertionError):
    """Raised by `check` under COURSE_STRICT=1 for anything but a right answer."""


def setup(*args: Any, **options: Any):
    """Prepares the notebook (see `runtime.setup`) and, meanwhile, the process for checks."""
    from . import runtime
    from .exercises.sandbox import SANDBOX

    SANDBOX.start()
    return runtime.setup(*args, **options)


def check(slug: str, candidate: Any) -> Any:
    """Judges an answer, shows and records the verdict.

    Args:
        slug: the exercise, as in its check cell.
        candidate: the function or class itself, not called.

    Returns:
        `candidate` if it passed, else the reference, so that the chapter goes on either way.

    Raises:
        NotPassed: the answer did not pass and the environment variable COURSE_STRICT is 1.
    """
    try:
        exercise = find(slug)
    except KeyError as error:
        if _strict():
            raise
        print(f"check: {error.args[0]}")
        return candidate
    verdict = judge(slug, candidate)
    _show(as_text(exercise, verdict), as_html(exercise, verdict))
    try:
        _record(exercise, candidate, verdict)
    except record.RecordUnavailable as unavailable:
        print(unavailable)
    if verdict.state == PASSED:
        return candidate
    if _strict():
        raise NotPassed(f"{slug} is {verdict.state}: {verdict.message}")
    return exercise.reference


def hint(slug: str, number: int | None = None) -> None:
    """Shows the next hint, from a nudge to nearly the answer; `number` (from 1) picks one."""
    if (exercise := _found(slug, "hint")) is None:
        return
    count = len(exercise.hints)
    if number is None:
        number = min(_hints_shown.get(slug, 0) + 1, count)
    if not isinstance(number, int) or not 1 <= number <= count:
        print(f"hint: {slug} has hints 1 to {count}, and {number!r} was asked for.")
        return
    _hints_shown[slug] = number
    more = f'hint("{slug}") again shows the next one' if number < count else "this is the last one"
    text = textwrap.fill(exercise.hints[number - 1], 96)
    print(f"Hint {number} of {count} ({more}):\n{text}")


def solution(slug: str) -> None:
    """Shows the reference's own source, and what others trip over."""
    if (exercise := _found(slug, "solution")) is None:
        return
    source = inspect.getsource(exercise.reference)
    lines = [f"- {m.message}" for m in exercise.misconceptions]
    heading = "Mistakes that the check knows:"
    wrapped = "\n".join(textwrap.fill(line, 96, subsequent_indent="  ") for line in lines)
    comment = f"One right way to write `{exercise.name}`; any other that behaves the same passes."
    markdown = f"{comment}\n\n```python\n{source}```\n\n**{heading}**\n\n" + "\n".join(lines)
    _show(f"{comment}\n\n{source}\n{heading}\n{wrapped}", markdown, "text/markdown")


def status() -> None:
    """Shows the whole course at a glance: each exercise, its state, attempts and length."""
    entries = _entries()
    text, rows, chapter = [], [], None
    for exercise in registry().values():
        if exercise.chapter != chapter:
            chapter = exercise.chapter
            here = [e for e in registry().values() if e.chapter == chapter]
            passed = sum(_state(entries, e) == PASSED for e in here)
            title = f"Chapter {chapter}: {passed} of {len(here)} passed"
            text.append(title)
            rows.append(f"<tr><th colspan=5 style='text-align:left'>{title}</th></tr>")
        state = _state(entries, exercise)
        attempts = entries.get(exercise.slug, {}).get("attempts", 0)
        tries = f"{attempts} attempt{'' if attempts == 1 else 's'}" if attempts else ""
        line = f"  {MARKS[state]} {exercise.slug:<30} {exercise.minutes:>3} min   {tries}"
        text.append(line.rstrip())
        cells = (MARKS[state], exercise.slug, exercise.title, f"{exercise.minutes} min", tries)
        rows.append("<tr>" + "".join(f"<td style='text-align:left'>{c}</td>" for c in cells))
    _show("\n".join(text), f"<table>{''.join(rows)}</table>")


def reset(slug: str) -> None:
    """Starts one exercise anew: forgets its state and prints its stub; old answers are kept."""
    if (exercise := _found(slug, "reset")) is None:
        return

    def forget(entry: dict) -> None:
        if entry.get("source"):
            entry.setdefault("earlier", []).append(entry["source"])
        entry.update(state=NOT_ATTEMPTED, attempts=0, source=None)

    try:
        record.update(slug, forget)
    except record.RecordUnavailable as unavailable:
        print(unavailable)
    _hints_shown.pop(slug, None)
    shipped = exercise.shipped
    stub = inspect.getsource(shipped) if shipped is not None else stub_of(exercise.reference)
    print(f"{slug} starts anew. The cell as it was:\n\n{textwrap.dedent(stub)}")


def report(slug: str) -> None:
    """Writes a report of an answer that you think was wrongly rejected, to paste into an issue."""
    if (exercise := _found(slug, "report")) is None:
        return
    entry = _entries().get(slug, {})
    if not entry.get("rejected"):
        print(f"report: no rejected answer of {slug} is recorded; run its check cell first.")
        return
    import torch

    rejected = entry["rejected"]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, "
    versions += f"{platform.system()}, probes {exercise.fingerprint}"
    text = (
        f"### A right answer to `{slug}` was rejected\n\n{versions}\n\n"
        f"```python\n{rejected['source'] or '(source not at hand)'}\n```\n\n"
        f"The check said:\n\n```text\n{rejected['message']}\n```\n\nWhy I think it is right: \n"
    )
    path = record.home() / f"report-{slug}.md"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        print(f"{text}\nAdd one sentence and paste it into a new issue.")
        return
    print(f"{text}\nSaved as {path}; add one sentence and paste it into a new issue.")


def _strict() -> bool:
    return os.environ.get("COURSE_STRICT") == "1"


def _found(slug: str, caller: str) -> Exercise | None:
    try:
        return find(slug)
    except KeyError as error:
        print(f"{caller}: {error.args[0]}")
        return None


def _entries() -> record.Entries:
    try:
        return record.load()
    except record.RecordUnavailable as unavailable:
        print(unavailable)
        return {}


def _state(entries: record.Entries, exercise: Exercise) -> str:
    state = entries.get(exercise.slug, {}).get("state", NOT_ATTEMPTED)
    return state if state in MARKS else NOT_ATTEMPTED


def _record(exercise: Exercise, candidate: Any, verdict: Verdict) -> None:
    """An attempt counts when something was attempted; a passed answer stays passed."""

    def change(entry: dict) -> None:
        if verdict.state == NOT_ATTEMPTED:
            return
        entry["attempts"] = entry.get("attempts", 0) + 1
        entry.setdefault("first_attempt", record.now())
        if verdict.state == PASSED:
            entry["passed_at"] = entry.get("passed_at") or record.now()
            name = _read(lambda: candidate.__name__)
            named = isinstance(name, str) and name.isidentifier()
            entry["name"] = name if named else exercise.name
            entry["source"] = _read(lambda: self_contained(candidate))
            entry["fingerprint"] = exercise.fingerprint
        else:
            source = _read(lambda: source_of(candidate))
            entry["rejected"] = {"source": source, "message": verdict.message}
            if verdict.misconception:
                met = entry.setdefault("misconceptions", [])
                met.append(verdict.misconception)
        if entry["state"] != PASSED:
            entry["state"] = verdict.state

    record.update(exercise.slug, change)


def _read(what: Callable[[], Any]) -> Any:
    """What can be learnt about an answer; None where its own code raises on being looked at."""
    try:
        return what()
    except KeyboardInterrupt:
        raise
    except BaseException:
        return None


def _show(text: str, rich: str, kind: str = "text/html") -> None:
    """Rich where a notebook shows it, plain text elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(text)
        return
    if get_ipython() is None:
        print(text)
    else:
        display({"text/plain": text, kind: rich}, raw=True)
