"""Two hundred bad answers to every exercise get a verdict and a sentence, never an exception."""

from __future__ import annotations

import inspect
import itertools
import os
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings

from course_utils.exercises import judge, registry
from course_utils.exercises.engine import diagnose
from course_utils.exercises.sandbox import Sandbox
from course_utils.exercises.sandbox import judge as judge_in

EXERCISES = list(registry().values())
FORKED = 20  # one answer in so many is judged in a fork, which costs more than most judgements
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([(3,), (2, 3), (), (0,), (5, 3, 2)]).map(torch.ones),
    st.sampled_from([torch.float16, torch.int64, torch.complex64]).map(
        lambda dtype: torch.ones(3, dtype=dtype)
    ),
    st.just(float("nan")),
    st.builds(object),
)
ERRORS = st.sampled_from(
    [ValueError, KeyError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration]
)


def _returning(value):
    return lambda *args, **kwargs: value


def _raising(error):
    def answer(*args, **kwargs):
        raise error("no")

    return answer


def _generator(*args, **kwargs):
    yield 1


def _endless(*args, **kwargs):
    while True:
        pass


def _exits(*args, **kwargs):
    import os

    os._exit(1)


def _recursive(*args, **kwargs):
    return _recursive(*args, **kwargs)


def _echo(*args, **kwargs):
    return args[0] if args else None


def _spoils(*args, **kwargs):
    """Changes every tensor that it is given, and global state."""
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    for arg in args:
        if isinstance(arg, torch.Tensor):
            arg.data.zero_()


class _NoArguments:
    def __call__(self, *args):
        return self


class _Hostile:
    def __getattr__(self, name):
        raise RuntimeError("no attributes")

    def __repr__(self):
        raise RuntimeError("no text")

    def __call__(self, *args, **kwargs):
        return self


def _module(value):
    class Answer(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()

        def forward(self, *args, **kwargs):
            return value

    return Answer


def _function(forward, backward):
    class Answer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            return forward if not callable(forward) else forward(*args)

        @staticmethod
        def backward(ctx, *grads):
            return backward

    return Answer


CANDIDATES = st.one_of(
    VALUES,
    VALUES.map(_returning),
    ERRORS.map(_raising),
    VALUES.map(_module),
    st.builds(_function, st.one_of(VALUES, st.just(_echo)), VALUES),
    st.sampled_from([_generator, _exits, _recursive, _echo, _spoils, _NoArguments, _Hostile()]),
    st.sampled_from([int, dict, torch.nn.Linear, torch.nn.Module, print, len, torch.sum, type]),
    st.builds(iter, st.just([1])),
)


@pytest.fixture(scope="module")
def staying():
    """A worker that judges in itself, as on macOS and Windows."""
    sandbox = Sandbox(fork=False)
    yield sandbox
    sandbox.stop()


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.slug)
def test_garbage_gets_a_sentence(exercise, monkeypatch, staying):
    """All of it in each exercise; in a fork those that end it, and of the rest others each time."""
    monkeypatch.setenv("COURSE_TIME_LIMIT", "4")
    number = itertools.count(EXERCISES.index(exercise))

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CANDIDATES)
    def every_candidate(candidate):
        if next(number) % FORKED == 0 or candidate is _exits or type(candidate) is _Hostile:
            verdict = judge(exercise.slug, candidate)
        else:
            verdict = judge_in(exercise, candidate, staying)
            assert "problem" not in verdict.details, "it must be judged, not only survived"
        assert verdict.state in ("wrong", "not attempted"), verdict
        first = verdict.message.splitlines()[0]
        assert len(first) > 20 and first.rstrip()[-1:], first

    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
    every_candidate()
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()) == before


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.slug)
def test_endless_loop_is_stopped(exercise, monkeypatch):
    monkeypatch.setenv("COURSE_TIME_LIMIT", "1")
    answer = _endless
    if isinstance(exercise.reference, type) and issubclass(
        exercise.reference, torch.autograd.Function
    ):
        answer = _function(_endless, None)
    verdict = judge(exercise.slug, answer)
    assert verdict.state == "wrong"
    assert "did not come to an end" in verdict.message


# --- on several processes -----------------------------------------------------------------------

ON_RANKS = [e for e in EXERCISES if "on_ranks" in inspect.getsource(e.observe)]


def _right_alone(reference, otherwise):
    """Right in a world of one process, where answers are screened, and garbage on two."""

    def answer(*args, **kwargs):
        if dist.get_world_size() == 1:
            return reference(*args, **kwargs)
        return otherwise(*args, **kwargs)

    return answer


def _leaves(*args, **kwargs):
    os._exit(0)


def _sends_to_nobody(*args, **kwargs):
    dist.send(torch.ones(2), 7)


def _alone_in_a_collective(*args, **kwargs):
    if dist.get_rank() == 1:
        dist.broadcast(torch.ones(2), 1)


OTHERWISE = [
    _returning(None),
    _returning(torch.ones(0)),
    _returning("nothing"),
    _echo,
    _raising(ValueError),
    _raising(SystemExit),
    _module(None),
    _leaves,
    _sends_to_nobody,
    _alone_in_a_collective,
]


@pytest.mark.slow
@pytest.mark.parametrize("exercise", ON_RANKS, ids=lambda e: e.slug)
def test_garbage_on_real_processes_gets_a_sentence(exercise):
    """Ten that pass the screen; not looked for in the catalogue, which other tests go through."""
    bare = replace(exercise, misconceptions=())
    for otherwise in OTHERWISE:
        verdict = diagnose(bare, _right_alone(exercise.reference, otherwise))
        assert verdict.state == "wrong", otherwise
        first = verdict.message.splitlines()[0]
        assert len(first) > 20, first
    assert not dist.is_initialized()
