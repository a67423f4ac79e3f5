"""What an exercise is, and how one answer is told from another by what it does.

`diagnose` runs an answer and the reference on the same probes and compares what was observed, in
order. On a difference it runs the catalogue of misconceptions on the same probes; the one whose
observations equal the answer's on all of them is named. Nothing here protects against an answer
that hangs or kills its process: that is `sandbox`'s part.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import os
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch

from .source import source_of

PASSED, WRONG, NOT_ATTEMPTED = "passed", "wrong", "not attempted"
MAX_PRINTED = 2_000  # characters of an answer's own output that are kept


@dataclass(frozen=True)
class Misconception:
    """A plausible wrong implementation, and what to tell the learner whose answer behaves so."""

    slug: str
    implementation: Any
    message: str


@dataclass(frozen=True)
class Verdict:
    """What `judge` says of one answer; `message` starts with one clear sentence."""

    state: str
    message: str
    misconception: str | None = None
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Exercise:
    """One exercise: everything but its stub, which stands in the chapter's notebook.

    Args:
        observe: ``observe(implementation, see)`` drives an implementation and records through
            `see` (an `Observer`) what it does. The same function judges the reference, the
            learner's answer and every misconception.
        rtol, atol: two floating-point observations agree when
            ``|expected - got| <= atol + rtol * |expected|``.
        shipped: for find-the-bug exercises, the wrong object that stands in the notebook's cell.
        symptom: for find-the-bug exercises, what goes wrong, without saying why.
    """

    slug: str
    chapter: int
    title: str
    minutes: int
    difficulty: int
    reference: Any
    observe: Callable[[Any, Observer], None]
    misconceptions: tuple[Misconception, ...]
    alternatives: tuple[Any, ...]
    hints: tuple[str, ...]
    rtol: float = 1e-9
    atol: float = 1e-10
    shipped: Any = None
    symptom: str = ""

    @property
    def name(self) -> str:
        """The name that the learner's answer has in the notebook."""
        return self.reference.__name__

    @property
    def fingerprint(self) -> str:
        """Changes whenever the chapter's probes may have, so that old answers are judged again."""
        source = inspect.getsource(sys.modules[self.observe.__module__])
        return hashlib.sha256(f"{self.slug}\n{source}".encode()).hexdigest()[:16]


# --- what is observed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SeenTensor:
    """A tensor as it was when observed."""

    values: torch.Tensor
    requires_grad: bool

    def __str__(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return f"Tensor of shape {tuple(self.values.shape)}, {dtype}"


@dataclass(frozen=True)
class SeenObject:
    """Anything without values to compare: only its type counts."""

    type_name: str

    def __str__(self) -> str:
        return self.type_name


@dataclass(frozen=True)
class Raised:
    """An exception that left the answer's code."""

    type_name: str
    text: str
    where: str
    arguments: str
    not_written_yet: bool

    def same_as(self, other: Raised) -> bool:
        return (self.type_name, self.text) == (other.type_name, other.text)


@dataclass(frozen=True)
class Difference:
    """How one observation differs from the expected one."""

    kind: str  # none, type, shape, dtype, device, graph, length, keys, value
    sentence: str
    worst: tuple = ()

    @property
    def ends_probe(self) -> bool:
        """What the probe would do next with a thing of the wrong kind means nothing."""
        return self.kind != "value"


def snapshot(value: Any) -> Any:
    """Copies `value` so that later changes in place do not reach the observation."""
    if isinstance(value, (SeenTensor, SeenObject)):  # observed in another process
        return value
    if isinstance(value, torch.Tensor):
        if value.is_nested:  # has no shape
            return SeenObject("nested Tensor")
        return SeenTensor(value.detach().clone(), value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool):
        value = int.__int__(value)  # subclasses may compare and print as they like
        return value if value.bit_length() < 1000 else SeenObject("int beyond 2**1000")
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, (bool, complex, bytes)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(snapshot(item) for item in value)
    if isinstance(value, dict):
        return {str(key): snapshot(item) for key, item in value.items()}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return SeenObject(type(value).__name__)


def describe(seen: Any) -> str:
    """A few words for an observed value, for sentences."""
    if isinstance(seen, np.ndarray):
        return f"ndarray of shape {seen.shape}, {seen.dtype}"
    if isinstance(seen, tuple) and all(isinstance(item, (int, float, str)) for item in seen):
        return _short(repr(seen), 60)
    if isinstance(seen, tuple):
        inside = ", ".join(describe(item) for item in seen[:4])
        return _short(f"{len(seen)} value{'' if len(seen) == 1 else 's'} ({inside})", 120)
    if isinstance(seen, float):
        return f"{seen:.6g}"
    if isinstance(seen, dict):
        return f"dict with keys {', '.join(list(seen)[:6])}"
    return _clean(str(seen) if isinstance(seen, (SeenTensor, SeenObject)) else repr(seen))[:200]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _clean(text: str) -> str:
    """Without addresses, so that the same mistake always prints the same text; fit for UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return re.sub(r"0x[0-9a-fA-F]{4,}", "0x…", text)


def compare(expected: Any, got: Any, rtol: float, atol: float) -> Difference | None:
    """The first way in which `got` differs from `expected`; None where they agree.

    Kinds are settled before values, and shapes before anything could broadcast.
    """
    number = (bool, int, float)
    if isinstance(expected, SeenTensor) and isinstance(got, SeenTensor):
        return _compare_tensors(expected, got, rtol, atol)
    if isinstance(expected, number) and isinstance(got, SeenTensor) and got.values.ndim == 0:
        got = got.values.item()  # a number is a number in whichever clothes
    if isinstance(got, number) and isinstance(expected, SeenTensor):
        if expected.values.ndim == 0 and not expected.requires_grad:
            expected = expected.values.item()
    if got is None and expected is not None:
        return Difference("none", "is None: is a `return` missing?")
    if isinstance(expected, bool):
        if isinstance(got, number) and expected == bool(got):
            return None
        if isinstance(got, bool):
            return Difference("value", f"should be {expected}, and is {got}")
    elif isinstance(expected, number) and isinstance(got, number):
        pair = [torch.tensor(float(number), dtype=torch.float64) for number in (expected, got)]
        if torch.allclose(pair[1], pair[0], rtol=rtol, atol=atol, equal_nan=True):
            return None
        return Difference("value", f"should be {expected:.6g}, and is {got:.6g}")
    if isinstance(expected, tuple) and isinstance(got, tuple):
        if len(expected) != len(got):
            text = f"should hold {len(expected)} values, and holds {len(got)}"
            return Difference("length", text)
        for position, (one, other) in enumerate(zip(expected, got, strict=True)):
            difference = compare(one, other, rtol, atol)
            if difference is not None:
                sentence = f"differs at position {position}, which {difference.sentence}"
                return Difference(difference.kind, sentence, difference.worst)
        return None
    if isinstance(expected, dict) and isinstance(got, dict):
        if expected.keys() != got.keys():
            text = f"should have the keys {sorted(expected)}, and has {sorted(got)}"
            return Difference("keys", text)
        for key in expected:
            difference = compare(expected[key], got[key], rtol, atol)
            if difference is not None:
                sentence = f"differs at key {key!r}, which {difference.sentence}"
                return Difference(difference.kind, sentence, difference.worst)
        return None
    if type(expected) is not type(got):
        return Difference("type", f"should be {describe(expected)}, and is {describe(got)}")
    if isinstance(expected, np.ndarray):
        return _compare_tensors(
            SeenTensor(torch.from_numpy(expected), False),
            SeenTensor(torch.from_numpy(got), False),
            rtol,
            atol,
        )
    if expected != got:
        kind = "type" if isinstance(expected, SeenObject) else "value"
        return Difference(kind, f"should be {describe(expected)}, and is {describe(got)}")
    return None


def _compare_tensors(expected, got, rtol, atol) -> Difference | None:
    want, have = expected.values, got.values
    if want.shape != have.shape:
        text = f"should have shape {tuple(want.shape)}, and has shape {tuple(have.shape)}"
        return Difference("shape", text)
    if want.dtype != have.dtype:
        text = f"should have dtype {want.dtype}, and has dtype {have.dtype}"
        return Difference("dtype", text)
    if want.device != have.device:
        return Difference("device", f"should be on {want.device}, and is on {have.device}")
    if want.layout != have.layout:
        return Difference("type", f"should be {_layout(want)}, and is {_layout(have)}")
    if expected.requires_grad and not got.requires_grad:
        text = "is cut off from the graph: it no longer requires a gradient (`.detach()`, "
        text += "`.data`, `.item()`, `no_grad` or a new tensor made from values do that)"
        return Difference("graph", text)
    if torch.allclose(_wide(have), _wide(want), rtol=rtol, atol=atol, equal_nan=True):
        return None
    if want.ndim == 0:
        digits = 6 if f"{want.item():.6g}" != f"{have.item():.6g}" else 12
        text = f"should be {want.item():.{digits}g}, and is {have.item():.{digits}g}"
        return Difference("value", text)
    sentence, worst = _worst(_wide(want), _wide(have), rtol, atol)
    if want.dtype == torch.bool:
        worst = tuple((place, bool(one), bool(other)) for place, one, other in worst)
    return Difference("value", sentence, worst)


def _layout(values: torch.Tensor) -> str:
    return "an ordinary dense tensor" if values.layout == torch.strided else str(values.layout)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _worst(want, have, rtol, atol) -> tuple[str, tuple]:
    """A sentence on a difference in values, and the three worst elements."""
    bad = ~torch.isclose(have, want, rtol=rtol, atol=atol, equal_nan=True)
    error = torch.where(bad, (have - want).abs().nan_to_num(torch.inf), -1.0).flatten()
    order = error.argsort(descending=True, stable=True)[: min(3, int(bad.sum()))]
    places = [tuple(map(int, np.unravel_index(int(i), tuple(want.shape)))) for i in order]
    # Adding 0 makes 0 out of -0, which nobody needs to see.
    worst = tuple((place, want[place].item() + 0, have[place].item() + 0) for place in places)
    sentence = (
        f"has {int(bad.sum())} wrong value{'s' if bad.sum() > 1 else ''} out of {bad.numel()}"
    )
    return sentence + _pattern(want, have, rtol, atol), worst


def _pattern(want, have, rtol, atol) -> str:
    """What all the wrong values have in common, where they do."""

    def close(other) -> bool:
        return bool(torch.allclose(have, other, rtol=max(rtol, 1e-6), atol=atol))

    if have.isnan().any() and not want.isnan().any():
        return f" ({int(have.isnan().sum())} of them NaN)"
    if have.isinf().any() and not want.isinf().any():
        return f" ({int(have.isinf().sum())} of them infinite)"
    if have.abs().max() == 0:
        return " (yours are all zero)"
    if close(-want):
        return " (the sign is flipped everywhere)"
    if close(want):
        return f" (nearly right: the largest difference is {(have - want).abs().max():.1e})"
    largest = want.abs().argmax()
    if want.numel() > 1 and want.abs().max() > 0:
        ratio = have.flatten()[largest] / want.flatten()[largest]
        if close(ratio * want):
            digits = 4 if f"{ratio:.4g}" != "1" else 8
            return f" (yours are everywhere {ratio:.{digits}g} times what they should be)"
        shift = have.flatten()[largest] - want.flatten()[largest]
        if close(want + shift):
            return f" (yours are everywhere {shift.item():+.4g} off)"
    if want.ndim == 2 and want.shape[0] == want.shape[1] and close(want.T):
        return " (yours is the transpose of what it should be)"
    return ""


# --- how it is observed -------------------------------------------------------------------------


class TimeUp(BaseException):
    """The time limit is over; not an Exception, so that answers seldom catch it."""


class _EndProbe(Exception):
    """Leaves a probe whose last observation was of the wrong kind."""


class Elsewhere(Exception):
    """What an answer did in another process, to be recorded as if it had happened here."""

    def __init__(self, raised: Raised) -> None:
        super().__init__(raised.text)
        self.raised = raised


class _Unlike(Exception):
    """Leaves the observing of a misconception that is not the one looked for."""


class Observer:
    """`see`: what an exercise's `observe` function records with.

    Args:
        expected: the reference's observations, which tell when a probe must stop; None while the
            reference itself is observed.
        like: observations to find again; the first probe that shows others raises _Unlike.
        name: what the implementation is called, which torch repeats in some error messages.
    """

    def __init__(
        self,
        exercise: Exercise,
        expected: Observations | None = None,
        like: Observations | None = None,
        name: str = "",
    ) -> None:
        self.exercise = exercise
        self.name = name
        self.expected = expected
        self.like = like
        self.seen: Observations = {}
        self.agrees = True  # with what is expected, in all that was observed so far
        self.generator = torch.Generator()
        self._probe = ""
        self._arguments = ""

    @contextmanager
    def probe(self, name: str) -> Iterator[None]:
        """One input to try: seeds every generator; an exception inside is the answer's."""
        if name in self.seen:
            raise ValueError(f"{self.exercise.slug}: two probes are called {name!r}")
        seed = len(self.seen) + 1
        self._probe, self._arguments, self.seen[name] = name, "", {}
        self.generator.manual_seed(1000 + seed)
        torch.default_generator.manual_seed(seed)  # alone: queueing for the GPU costs 1 ms
        random.seed(seed)
        np.random.seed(seed)
        try:
            with torch.enable_grad():
                yield
        except _EndProbe:
            pass
        except (TimeUp, _Unlike):
            raise
        except Elsewhere as error:
            self.agrees, self.seen[name]["raised"] = False, error.raised
        except BaseException as error:  # sys.exit() and the like are observations too
            self.agrees = False
            self.seen[name]["raised"] = _raised(
                error, _short(self._arguments, 200), self.name, self.exercise
            )
        if self.like is not None:
            self._must_agree(self.like.get(name, {}), self.seen[name])

    def _must_agree(self, like: dict, seen: dict) -> None:
        """Leaves a misconception as soon as it shows anything else than what is looked for."""
        if not same_behaviour({"": like}, {"": seen}, self.exercise.rtol, self.exercise.atol):
            raise _Unlike

    def __call__(self, label: str, value: Any) -> Any:
        """Records `value` under `label`, and ends the probe if it is of the wrong kind."""
        record = self.seen[self._probe]
        if label in record:
            raise ValueError(f"{self.exercise.slug}: {label!r} is observed twice in one probe")
        record[label] = snapshot(value)
        if self.like is not None:
            like = self.like.get(self._probe, {})
            pair = {label: like[label]} if label in like else {}, {label: record[label]}
            self._must_agree(*pair)
        if self.expected is not None:
            expected = self.expected.get(self._probe, {})
            if label in expected and not isinstance(expected[label], Raised):
                difference = compare(
                    expected[label], record[label], self.exercise.rtol, self.exercise.atol
                )
                self.agrees = self.agrees and difference is None
                if difference is not None and difference.ends_probe:
                    raise _EndProbe
            elif label not in expected:
                self.agrees = False
        return value

    def fact(self, statement: str, holds: Any) -> None:
        """Records whether a statement that is true of right answers holds."""
        self(statement, bool(holds))

    def call(self, label: str, function: Callable, *args, may_modify: bool = False, **kwargs):
        """Calls the answer, records what it returns and that its arguments were left alone."""
        given = [describe(snapshot(arg)) for arg in args]
        given += [f"{key}={describe(snapshot(value))}" for key, value in kwargs.items()]
        self._arguments = f"on {', '.join(given)}" if given else "without arguments"
        inputs = list(_tensors((args, kwargs)))
        before = [tensor.detach().clone() for tensor in inputs]
        result = function(*args, **kwargs)
        if not may_modify:
            kept = all(_identical(*pair) for pair in zip(inputs, before, strict=True))
            self(f"{label}: the inputs are left unmodified", kept)
        return self(label, result)

    def gradients(self, label: str, output: torch.Tensor, **inputs: torch.Tensor):
        """Records the gradients of `inputs` for a random upstream gradient of `output`."""
        upstream = torch.randn(output.shape, generator=self.generator, dtype=output.dtype)
        self._arguments = (
            f"in backward, with the upstream gradient a {describe(snapshot(upstream))}"
        )
        sent = upstream.clone()
        grads = torch.autograd.grad(output, tuple(inputs.values()), sent, allow_unused=True)
        for name, grad in zip(inputs, grads, strict=True):
            self(f"gradient of {name} ({label})", grad)
        self(
            f"the upstream gradient is left unmodified ({label})", bool(torch.equal(sent, upstream))
        )
        return grads

    def randn(self, *shape: int, requires_grad: bool = False, dtype=torch.float64) -> torch.Tensor:
        """Standard normal values, the same for every implementation."""
        values = torch.randn(shape, generator=self.generator, dtype=dtype)
        return values.requires_grad_(requires_grad)

    def rand(self, *shape: int, requires_grad: bool = False, dtype=torch.float64) -> torch.Tensor:
        """Uniform values in [0, 1), the same for every implementation."""
        values = torch.rand(shape, generator=self.generator, dtype=dtype)
        return values.requires_grad_(requires_grad)

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers in [low, high), the same for every implementation."""
        return torch.randint(low, high, shape, generator=self.generator)


Observations = dict[str, dict[str, Any]]


def _identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


_OURS = str(Path(__file__).resolve().parent)
_NOTING = str(Path(__file__).resolve().parents[1] / "processes.py")  # what notes collectives
_LIBRARIES = (str(Path(torch.__file__).parent), os.path.dirname(os.__file__))


def _by_raise(error: BaseException) -> bool:
    """Whether Python's `raise` raised it: torch's own operations raise NotImplementedError too, for
    types that they do not take."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _raised(error: BaseException, arguments: str, name: str, exercise: Exercise) -> Raised:
    frames = traceback.extract_tb(error.__traceback__)
    last_in_torch = bool(frames) and frames[-1].filename.startswith(_LIBRARIES[0])
    learners = [
        frame
        for frame in frames
        if not frame.filename.startswith((*_LIBRARIES, _NOTING, "<frozen"))
        and Path(frame.filename).parent != Path(_OURS)
    ]
    where = ""
    if learners:
        line = f": `{learners[-1].line}`" if learners[-1].line else ""
        where = f"in `{learners[-1].name}`, line {learners[-1].lineno}{line}"
    try:
        text = _clean(str(error)).strip()[:500]
    except BaseException:  # an exception's own __str__ may be the answer's code
        text = "(its message could not be read)"
    if len(name) > 2:  # the same mistake in a class of another name is the same mistake
        text = re.sub(rf"\b{re.escape(name)}(?=Backward|\b)", exercise.name, text)
    unwritten = isinstance(error, NotImplementedError) and not last_in_torch and _by_raise(error)
    return Raised(type(error).__name__, text, where, arguments, unwritten)


@contextmanager
def kept_state() -> Iterator[None]:
    """Puts back all global state that an answer may change."""
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()
    flags = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    anomaly = torch.is_anomaly_enabled()
    device, path = torch.get_default_device(), list(sys.path)
    folder, streams, depth = os.getcwd(), (sys.stdout, sys.stderr), sys.getrecursionlimit()
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(rng[0])
        random.setstate(rng[1])
        np.random.set_state(rng[2])
        torch.set_default_dtype(flags[0])
        if torch.get_num_threads() != flags[1]:
            torch.set_num_threads(flags[1])
        torch.set_grad_enabled(flags[2])
        if torch.are_deterministic_algorithms_enabled() != deterministic:  # importing half of torch
            torch.use_deterministic_algorithms(deterministic)
        if torch.is_anomaly_enabled() != anomaly:
            torch.autograd.set_detect_anomaly(anomaly)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        sys.path[:] = path
        os.chdir(folder)
        sys.stdout, sys.stderr = streams
        sys.setrecursionlimit(depth)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)


def observe(exercise: Exercise, implementation: Any, expected: Observations | None = None):
    """All that `implementation` does on the exercise's probes: probe → label → observation."""
    see = Observer(exercise, expected, name=_own_name(implementation))
    with kept_state():
        exercise.observe(implementation, see)
    return see.seen


@cache
def _expected(exercise: Exercise) -> Observations:
    """What the reference does, observed once in each process."""
    return observe(exercise, exercise.reference)


def _own_name(implementation: Any) -> str:
    """The name of a function or class; "" for other callables, whose attributes are not safe."""
    if issubclass(type(implementation), (type, FunctionType)):
        return implementation.__name__
    return ""


def _behaves_like(exercise: Exercise, implementation: Any, expected, seen: Observations) -> bool:
    """Whether `implementation` does what was seen, on all probes; stops where it does not."""
    see = Observer(exercise, expected, like=seen, name=_own_name(implementation))
    try:
        with kept_state():
            exercise.observe(implementation, see)
    except _Unlike:
        return False
    return see.seen.keys() == seen.keys()


def first_difference(expected: Observations, got: Observations, rtol: float, atol: float):
    """(probe, label, expected, got, Difference or Raised) where they first differ, or None."""
    for probe, wanted in expected.items():
        have = got.get(probe, {})
        for label, value in wanted.items():
            if label not in have:
                break
            if isinstance(value, Raised) and isinstance(have[label], Raised):
                if value.same_as(have[label]):
                    continue
                return probe, label, value, have[label], have[label]
            difference = compare(value, have[label], rtol, atol)
            if difference is not None:
                return probe, label, value, have[label], difference
        for label in have:
            if label not in wanted:
                value = have[label]
                if not isinstance(value, Raised):
                    value = Difference("value", "was not expected")
                return probe, label, None, have[label], value
        if len(have) < len(wanted):
            label = next(label for label in wanted if label not in have)
            return probe, label, wanted[label], None, Difference("type", "was not reached")
    return None


def same_behaviour(one: Observations, other: Observations, rtol: float, atol: float) -> bool:
    """Whether two implementations did the same on all probes, in both directions."""
    return (
        first_difference(one, other, rtol, atol) is None
        and first_difference(other, one, rtol, atol) is None
    )


# --- the verdict --------------------------------------------------------------------------------


def misfit(exercise: Exercise, candidate: Any) -> str | None:
    """A sentence if `candidate` cannot be an answer at all, whatever it does."""
    kind, given = type(candidate), type(candidate).__name__
    reference = exercise.reference
    if candidate is None:
        return f"`{exercise.name}` is None: pass the {_kind(reference)} itself to `check`."
    if isinstance(reference, type) and issubclass(reference, torch.autograd.Function):
        if not issubclass(kind, type) or not issubclass(candidate, torch.autograd.Function):
            given = f"{'the class' if issubclass(kind, type) else 'a value'} {_name_of(candidate)}"
            return (
                f"`{exercise.name}` should be a subclass of torch.autograd.Function with static "
                f"methods `forward` and `backward`, and is {given}."
            )
    elif not callable(candidate):
        article = "an" if given[:1] in "aeiou" else "a"
        return (
            f"`{exercise.name}` should be a {_kind(reference)}, and is {article} {given}: "
            f"pass the {_kind(reference)} itself, without calling it."
        )
    return None


def _kind(reference: Any) -> str:
    return "class" if isinstance(reference, type) else "function"


def _name_of(candidate: Any) -> str:
    if issubclass(type(candidate), type):
        return candidate.__name__
    return f"of type {type(candidate).__name__}"


def unchanged(shipped: Any, candidate: Any) -> bool:
    """Whether a find-the-bug cell is as it was shipped: comments and layout do not count.

    Compares syntax trees; where the answer's source is not at hand, compiled code.
    """
    try:
        theirs = source_of(candidate)
        if theirs is not None:
            return ast.dump(ast.parse(theirs)) == ast.dump(ast.parse(source_of(shipped)))
        code = _code(candidate)
        return code == _code(shipped) or code == _code(_as_in_a_cell(shipped))
    except Exception:
        return False


def _as_in_a_cell(shipped: Any) -> Any:
    """Its source compiled alone: CPython 3.11 compiles `torch.ones()` otherwise where torch is
    imported in the same file."""
    space = dict(vars(sys.modules[shipped.__module__]))
    exec(compile(source_of(shipped), "<cell>", "exec", dont_inherit=True), space)
    return space[shipped.__name__]


def _code(value: Any) -> Any:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, type):
        methods = {k: v for k, v in vars(value).items() if not k.startswith("__annotate")}
        members = {k: _code(v) for k, v in methods.items() if _is_code(v)}
        return value.__name__, [base.__name__ for base in value.__bases__], members
    code = value if isinstance(value, CodeType) else value.__code__
    constants = tuple(_code(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    defaults = getattr(value, "__defaults__", None)
    return code.co_name, code.co_code, code.co_names, code.co_varnames, constants, defaults


def _is_code(value: Any) -> bool:
    return isinstance(value, (FunctionType, staticmethod, classmethod))


def diagnose(
    exercise: Exercise, candidate: Any, ended: Callable[[], None] = lambda: None
) -> Verdict:
    """Judges an answer in this process: passed, wrong (named where possible) or not attempted.

    `ended` is called when the answer has done its part; what follows is the catalogue's.
    """
    sentence = misfit(exercise, candidate)
    if sentence is not None:
        return Verdict(WRONG, sentence)
    if exercise.shipped is not None and unchanged(exercise.shipped, candidate):
        text = f"Not attempted yet: the cell is as it was shipped. {exercise.symptom}"
        return Verdict(NOT_ATTEMPTED, text.strip())
    rtol, atol = exercise.rtol, exercise.atol
    expected = _expected(exercise)
    for probe, labels in expected.items():
        if "raised" in labels:  # no processes can be started, say: then nothing can be compared
            error = labels["raised"]
            text = f"`{exercise.name}` could not be judged here: the worked answer itself raised "
            text += f"{error.type_name}: {error.text}. Your answer is not lost.\nProbe: {probe}."
            return Verdict(WRONG, text, details={"problem": "reference"})
    seen = observe(exercise, candidate, expected)
    ended()
    found = first_difference(expected, seen, rtol, atol)
    if found is None:
        return Verdict(PASSED, f"`{exercise.name}` is right: {_count(seen)}.")
    first = next(iter(next(iter(seen.values())).values()), None)
    if isinstance(first, Raised) and first.not_written_yet:
        text = f"Not attempted yet: `{exercise.name}` still raises NotImplementedError."
        return Verdict(NOT_ATTEMPTED, text)
    text, details = _explain(exercise, found, seen)
    for misconception in exercise.misconceptions:
        if _behaves_like(exercise, misconception.implementation, expected, seen):
            text = f"{misconception.message}\n{text}"
            return Verdict(WRONG, text, misconception.slug, details)
    return Verdict(WRONG, text + _what_holds(expected, seen, rtol, atol), None, details)


def _what_holds(expected: Observations, seen: Observations, rtol: float, atol: float) -> str:
    """The probes on which an answer without a name is right, which narrows down what is wrong."""
    right = [
        probe
        for probe, labels in expected.items()
        if probe in seen and same_behaviour({probe: labels}, {probe: seen[probe]}, rtol, atol)
    ]
    if not right:
        return ""
    more = f"; and {len(right) - 3} more" if len(right) > 3 else ""
    return f"\nRight on {len(right)} of {len(expected)} probes: {'; '.join(right[:3])}{more}."


def _count(seen: Observations) -> str:
    observations = sum(len(labels) for labels in seen.values())
    probes = f"{len(seen)} probe{'s' if len(seen) > 1 else ''}"
    return f"{observations} observations on {probes} agree with the reference"


# What to add where an exception's own text does not tell a learner what to do.
REMARKS = {
    "SystemExit": "`sys.exit()` would end the notebook's kernel: return a result instead",
    "RecursionError": "it calls itself without end: look for the case that should stop it",
    "MemoryError": "it asked for more memory than an answer may use",
    "BdbQuit": "the debugger has no keyboard here: remove `breakpoint()`",
}


def _explain(exercise: Exercise, found, seen: Observations) -> tuple[str, dict]:
    """The sentence on the first difference, and the same as data."""
    probe, label, expected, got, difference = found
    details = {"probe": probe, "observation": label}
    name = exercise.name
    if isinstance(difference, Raised):
        details["error"] = {"type": difference.type_name, "text": difference.text}
        details["error"]["where"] = difference.where
        on = f" {difference.arguments}" if difference.arguments else ""
        if difference.type_name == "Deadlock":
            text = f"`{name}` never comes to an end{on}: the processes wait for one another"
        elif difference.not_written_yet:
            text = f"A part of `{name}` is not written yet: it raised NotImplementedError{on}"
        else:
            text = f"`{name}` raised {difference.type_name}{on}"
        remark = REMARKS.get(difference.type_name, "")
        says = ": ".join(part for part in (remark, difference.text) if part)
        text += f" ({difference.where})" if difference.where else ""
        text += f": {says}" if says else "."
    else:
        details |= {"kind": difference.kind, "expected": describe(expected), "got": describe(got)}
        details["worst"] = difference.worst
        if expected is True and got is False:
            text = f"`{name}` fails a check that a right answer passes: {label}."
            if "inputs are left unmodified" in label:
                text = f"`{name}` modified its input in place: work on a copy, or out of place."
            elif label.startswith("the upstream gradient is left unmodified"):
                text = f"The backward of `{name}` modified the upstream gradient in place: other "
                text += "branches of the graph use the same tensor."
        else:
            sentence = difference.sentence
            if difference.kind == "none" and label.startswith("gradient"):
                sentence = "is None: no gradient arrives there"
            text = f"With `{name}`, {label} {sentence}"
            text += "" if text.endswith("?") else "."
    text += f"\nProbe: {probe}."
    for place, want, have in getattr(difference, "worst", ()):
        if not isinstance(want, bool):
            digits = 6 if f"{want:.6g}" != f"{have:.6g}" else 12
            want, have = (f"{value:.{digits}g}" for value in (want, have))
        text += f"\n  at {list(place)}: expected {want}, got {have}"
    right = list(seen[probe])
    right = [
        r
        for r in right[: right.index(label) if label in right else None]
        if "left unm" not in r and not r.startswith(("the list of", "its parameter"))
    ]
    if right:
        text += f"\nRight so far on this probe: {'; '.join(right[-4:])}."
    return text, details
