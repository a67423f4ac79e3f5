"""What holds for every exercise of the course, whoever wrote it."""

from __future__ import annotations

import inspect
import os
import pickle
from functools import cache

import pytest
import torch
from filelock import FileLock

from course_utils.exercises import CHAPTERS, engine, judge, registry
from course_utils.exercises.engine import diagnose, first_difference, observe, same_behaviour
from course_utils.exercises.scaffold import slug_of

EXERCISES = list(registry().values())


def each(exercises):
    return pytest.mark.parametrize("exercise", exercises, ids=lambda e: e.slug)


BY_SLUG = each(EXERCISES)


@pytest.fixture(scope="session")
def observed(tmp_path_factory):
    """slug → the catalogue's part of a judgement: what the reference does, and what each
    misconception does; found out once, whichever of the processes of this run needs it first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the run's; each of its processes has a folder below

    @cache
    def found_out(slug):
        file = folder / f"observed-{slug}.pickle"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_bytes(pickle.dumps(_observe_all(registry()[slug])))
        return pickle.loads(file.read_bytes())

    return found_out


def _observe_all(exercise):
    torch.set_num_threads(1)
    expected = observe(exercise, exercise.reference)
    seen = {m.slug: observe(exercise, m.implementation, expected) for m in exercise.misconceptions}
    return expected, seen


def test_there_are_enough_of_them():
    chapters = {e.chapter for e in EXERCISES}
    assert chapters == set(range(1, len(CHAPTERS) + 1))
    for chapter in chapters:
        exercises = [e for e in EXERCISES if e.chapter == chapter]
        assert len(exercises) >= 12
        assert sum(len(e.misconceptions) for e in exercises) >= 70
        assert sum(e.shipped is not None for e in exercises) >= 3


def test_names_are_unique_so_that_mine_can_tell_them_apart():
    names = [e.name for e in EXERCISES]
    assert len(set(names)) == len(names)


@BY_SLUG
def test_is_complete(exercise):
    assert len(exercise.misconceptions) >= 4
    assert len(exercise.alternatives) >= 1
    assert len(exercise.hints) >= 2
    assert 1 <= exercise.difficulty <= 5 and exercise.minutes > 0 and exercise.title
    slugs = [m.slug for m in exercise.misconceptions]
    assert len(set(slugs)) == len(slugs)
    for misconception in exercise.misconceptions:
        assert len(misconception.message) >= 60, (
            f"{misconception.slug}: the message explains little"
        )
    if exercise.slug.startswith("fix_"):
        assert exercise.shipped is not None and exercise.symptom
        assert exercise.shipped.__name__ == exercise.name
    else:
        assert exercise.shipped is None
        assert exercise.slug == slug_of(exercise.name)


@BY_SLUG
def test_reference_passes(exercise):
    verdict = judge(exercise.slug, exercise.reference)
    assert verdict.state == "passed", verdict.message


@pytest.mark.slow
@BY_SLUG
def test_misconceptions_are_rejected_and_named(exercise, observed, monkeypatch):
    """Each of them diagnosed by what it was seen to do; and the first, the last, for which the
    catalogue is searched from end to end, and every 25th judged in every step."""
    last = len(exercise.misconceptions) - 1
    for number, misconception in enumerate(exercise.misconceptions):
        if number % 25 == 0 or number == last:
            _is_named(misconception, judge(exercise.slug, misconception.implementation))
    slugs = {id(m.implementation): m.slug for m in exercise.misconceptions}
    assert len(slugs) == len(exercise.misconceptions), "one implementation stands there twice"
    expected, seen = observed(exercise.slug)

    def known(exercise, implementation, expected=None):
        return seen[slugs[id(implementation)]]

    def behaves_like(exercise, implementation, expected, seen):
        return same_behaviour(known(exercise, implementation), seen, exercise.rtol, exercise.atol)

    monkeypatch.setattr(engine, "_expected", lambda exercise: expected)
    monkeypatch.setattr(engine, "observe", known)
    monkeypatch.setattr(engine, "_behaves_like", behaves_like)
    for misconception in exercise.misconceptions:
        _is_named(misconception, diagnose(exercise, misconception.implementation))


def _is_named(misconception, verdict):
    assert verdict.state == "wrong", f"{misconception.slug}: {verdict.message}"
    assert verdict.misconception == misconception.slug, verdict.message
    assert verdict.message.startswith(misconception.message)


@BY_SLUG
def test_alternatives_pass(exercise):
    for alternative in exercise.alternatives:
        verdict = judge(exercise.slug, alternative)
        assert verdict.state == "passed", f"{alternative}: {verdict.message}"


@each([e for e in EXERCISES if e.shipped is not None])
def test_shipped_bug_is_not_an_attempt(exercise, observed):
    verdict = judge(exercise.slug, exercise.shipped)
    assert verdict.state == "not attempted"
    assert exercise.symptom in verdict.message
    messages = [m.message for m in exercise.misconceptions]
    assert not any(message in verdict.message for message in messages), "the cause is told"
    expected, _ = observed(exercise.slug)
    shipped = observe(exercise, exercise.shipped, expected)
    found = first_difference(expected, shipped, exercise.rtol, exercise.atol)
    assert found is not None, "the shipped cell is right"


@BY_SLUG
def test_probes_tell_everything_apart(exercise, observed):
    """No misconception behaves like the reference, and no two like one another."""
    rtol, atol = exercise.rtol, exercise.atol
    expected, seen = observed(exercise.slug)
    assert not any("raised" in labels for labels in expected.values())
    for slug, got in seen.items():
        found = first_difference(expected, got, rtol, atol)
        assert found is not None, f"{slug} behaves like the reference"
    slugs = list(seen)
    for position, one in enumerate(slugs):
        for other in slugs[position + 1 :]:
            same = same_behaviour(seen[one], seen[other], rtol, atol)
            assert not same, f"no probe tells {one} from {other}"


@each([e for e in EXERCISES if not isinstance(e.reference, type)])
def test_no_constant_answer_passes(exercise):
    """Whatever the reference returned on its first probe is not right on all of them."""
    returned = []

    def spy(*args, **kwargs):
        result = exercise.reference(*args, **kwargs)
        returned.append(result)
        return result

    observe(exercise, spy)
    first = returned[0]  # None where it works in place: then doing nothing is the constant answer
    verdict = judge(exercise.slug, lambda *args, **kwargs: first)
    assert verdict.state == "wrong"


@BY_SLUG
def test_observations_are_reproducible(exercise, observed):
    one, _ = observed(exercise.slug)
    torch.manual_seed(99)
    other = observe(exercise, exercise.reference)
    assert same_behaviour(one, other, exercise.rtol, exercise.atol)


@BY_SLUG
def test_reference_is_documented_and_stands_alone(exercise):
    source = inspect.getsource(exercise.reference)
    assert inspect.getdoc(exercise.reference)
    assert len(source.splitlines()) <= 70
