"""A Verdict as stable text and as HTML that reads well on light and on dark pages."""

from __future__ import annotations

import html
import re
import textwrap

from .engine import NOT_ATTEMPTED, PASSED, Exercise, Verdict

MARKS = {PASSED: "✅", "wrong": "❌", NOT_ATTEMPTED: "⬜"}
COLOURS = {PASSED: "#009e73", "wrong": "#d55e00", NOT_ATTEMPTED: "#8c8c8c"}
PRINTED_LINES = 8


def headline(exercise: Exercise, verdict: Verdict) -> str:
    """One line: which exercise, and how it stands."""
    if verdict.state == PASSED:
        return f"{exercise.slug}: passed"
    if verdict.state == NOT_ATTEMPTED:
        return f"{exercise.slug}: not attempted"
    if verdict.misconception:
        return f"{exercise.slug}: not right yet, a known mistake ({verdict.misconception})"
    return f"{exercise.slug}: not right yet"


def what_next(exercise: Exercise, verdict: Verdict) -> str:
    """What the learner can do now."""
    if verdict.state == PASSED:
        return "From here on the course uses your version."
    text = f'Next: hint("{exercise.slug}")'
    if verdict.state == NOT_ATTEMPTED:
        return f"{text}. Until you solve it, the chapter goes on with the reference."
    return f"{text}, or mend the cell above and run it and this one again."


def _printed(verdict: Verdict) -> str:
    text = verdict.details.get("printed", "")
    lines = text.splitlines()[:PRINTED_LINES]
    if not lines:
        return ""
    left_out = verdict.details["characters"] - len("\n".join(lines))
    more = f"\n… and {left_out:,} characters more" if left_out > 1 else ""
    return "\n".join(lines) + more


def as_text(exercise: Exercise, verdict: Verdict) -> str:
    """Without times, addresses or random numbers, so that notebooks can be compared."""
    parts = [f"{MARKS[verdict.state]} {headline(exercise, verdict)}"]
    for line in verdict.message.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 3)
        parts.append(
            textwrap.fill(line.strip(), 96, initial_indent=indent, subsequent_indent=indent)
        )
    if _printed(verdict):
        parts.append("   Your code printed:")
        parts.append(textwrap.indent(_printed(verdict), "   | "))
    parts.append(f"   {what_next(exercise, verdict)}")
    return "\n".join(parts)


def as_html(exercise: Exercise, verdict: Verdict) -> str:
    """Colours only as accents: text keeps the page's own colour."""
    colour = COLOURS[verdict.state]
    first, *rest = verdict.message.splitlines()
    body = f"<div style='margin:4px 0'>{_inline(first)}</div>"
    if rest:
        facts = "\n".join(_inline(line) for line in rest)
        body += f"<div style='white-space:pre-wrap;opacity:.85;margin:4px 0'>{facts}</div>"
    if _printed(verdict):
        body += (
            "<div style='opacity:.85'>Your code printed:</div>"
            f"<pre style='margin:2px 0 2px 12px'>{html.escape(_printed(verdict))}</pre>"
        )
    return (
        f"<div role='status' style='border-left:4px solid {colour};padding:4px 12px;"
        "line-height:1.45;max-width:60em'>"
        f"<div><b>{MARKS[verdict.state]} {html.escape(headline(exercise, verdict))}</b></div>"
        f"{body}<div style='opacity:.85'>{_inline(what_next(exercise, verdict))}</div></div>"
    )


def _inline(text: str) -> str:
    """Escaped, with `code` set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
