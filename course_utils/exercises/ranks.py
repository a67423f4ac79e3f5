"""Observing an answer on several processes: chapter 5's part between an exercise and the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..processes import Outcome, run, told
from .engine import Elsewhere, Observer, Raised

SECONDS = 8.0  # for one probe; an answer as a whole has COURSE_TIME_LIMIT
GLOO = ("gloo/", "Connection closed", "connection")
BROKEN_OFF = (
    "gloo broke off: the ranks' calls do not fit together (tensors of other sizes, another order, "
    "another operation), or a rank ended early"
)


def on_ranks(see: Observer, world_size: int, scenario: Callable, answer: Any, *args: Any) -> None:
    """Runs scenario(answer, see, *args) on every rank, each with a `see` of its own.

    What the ranks record is recorded here, label by label, as "label (rank 0)", "label (rank 1)" …;
    an exception on a rank, a deadlock or the end of a process ends the probe as the answer's own.
    Scenarios are functions of an exercise module; `see.randn` and its kind give every rank the same
    values, and torch's own generator starts alike on all of them.
    """
    outcome = run(
        _observe, world_size, see.exercise.slug, see.name, scenario, answer, args, seconds=SECONDS
    )
    ranks = [outcome.results.get(rank) for rank in range(world_size)]
    raised = {r: seen["raised"] for r, seen in enumerate(ranks) if seen and "raised" in seen}
    broken = {r: error for r, error in raised.items() if any(mark in error.text for mark in GLOO)}
    raised = {r: error for r, error in raised.items() if r not in broken}
    if broken and not raised:  # which rank sees it first, and its port, are a matter of luck
        raise Elsewhere(_raised("RankError", BROKEN_OFF, world_size))
    if outcome.problem and not raised:
        raise Elsewhere(_failure(outcome, world_size))
    if outcome.problem:  # the others wait for it, or were ended by it
        ranks = [seen for seen in ranks if seen]
    labels = dict.fromkeys(label for seen in ranks for label in seen or ())
    for label in labels:
        for rank, seen in enumerate(ranks):
            if seen and label in seen and label != "raised" and not outcome.problem:
                see(f"{label} (rank {rank})", seen[label])
    if raised:
        first = min(raised)
        who = "on every rank" if len(raised) == world_size else f"on rank {first}"
        where = f"{who}, {raised[first].where}" if raised[first].where else who
        raise Elsewhere(replace(raised[first], where=where))


def _observe(slug: str, name: str, scenario: Callable, answer: Any, args: tuple) -> dict:
    """One rank's observations, by label."""
    from . import find

    see = Observer(find(slug), name=name)
    with see.probe("on this rank"):
        scenario(answer, see, *args)
    return see.seen["on this rank"]


def _failure(outcome: Outcome, world_size: int) -> Raised:
    """The story of ranks that did not all come to an end, told so that it is always the same."""
    texts = [error["text"] for error in outcome.errors.values()]
    if outcome.problem == "deadlock":
        kind, text = "Deadlock", told(outcome, world_size)
    elif outcome.problem == "time":
        kind, text = "TimeoutError", f"the processes were stopped after {SECONDS:g} s"
    elif 0 in outcome.died.values():
        kind, text = "RankError", "a rank left its Python process (`os._exit` or the like)"
    elif outcome.died or any(mark in text for text in texts for mark in GLOO):
        kind, text = "RankError", BROKEN_OFF
    else:
        first = min(outcome.errors)
        kind, text = outcome.errors[first]["type"], outcome.errors[first]["text"]
    return _raised(kind, text, world_size)


def _raised(kind: str, text: str, world_size: int) -> Raised:
    on = f"on {world_size} processes"
    return Raised(kind, text, where="", arguments=on, not_written_yet=False)
