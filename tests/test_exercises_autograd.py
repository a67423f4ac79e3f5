"""Chapter 1's references against torch itself, and what its probes count on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from course_utils.exercises import autograd as exercises
from course_utils.exercises.engine import diagnose
from course_utils.reference import autograd as reference
from course_utils.reference.autograd import Value

DOUBLE = torch.float64


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


def _same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= tolerance).all())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _scaled(x):
    return reference.ScaledTanh.apply(x, -0.7)


def _copied(x, bias):
    return reference.CopiedAddBias.apply(x, bias)


@pytest.mark.parametrize(
    ("ours", "theirs", "shapes"),
    [
        (reference.AddBias.apply, lambda x, bias: x + bias, ((5, 3), (3,))),
        (reference.AddBias.apply, lambda x, bias: x + bias, ((2, 4, 3), (3,))),
        (reference.AddBias.apply, lambda x, bias: x + bias, ((3,), (3,))),
        (_copied, lambda x, bias: x + bias, ((5, 3), (3,))),
        (reference.Swish.apply, F.silu, ((4, 3),)),
        (_scaled, lambda x: -0.7 * torch.tanh(x), ((4, 3),)),
    ],
)
def test_functions_agree_with_autograd(ours, theirs, shapes):
    inputs = tuple(_randn(*shape) for shape in shapes)
    assert _same(ours(*inputs), theirs(*inputs))
    upstream = torch.randn_like(theirs(*inputs))
    for one, other in zip(
        torch.autograd.grad(ours(*inputs), inputs, upstream),
        torch.autograd.grad(theirs(*inputs), inputs, upstream),
        strict=True,
    ):
        assert _same(one, other)
    assert gradcheck(ours, inputs)
    assert gradgradcheck(ours, inputs)


def test_second_derivative_of_swish():
    x = _randn(4, 3)
    both = []
    for function in (reference.Swish.apply, F.silu):
        (grad,) = torch.autograd.grad(function(x), x, torch.ones_like(x), create_graph=True)
        both.append(torch.autograd.grad(grad, x, torch.arange(12.0, dtype=DOUBLE).view(4, 3))[0])
    assert _same(*both)


def test_round_ste_has_the_gradient_of_clamp():
    x = (2 * torch.randn(6, 5, dtype=DOUBLE)).requires_grad_()
    upstream = torch.randn_like(x)
    out = reference.RoundSTE.apply(x, -1.6, 2.3)
    assert _same(out, x.clamp(-1.6, 2.3).round())
    (ours,) = torch.autograd.grad(out, x, upstream)
    assert _same(ours, torch.autograd.grad(x.clamp(-1.6, 2.3), x, upstream)[0])


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_unbroadcast_is_the_gradient_of_expand(shape, data):
    kept = data.draw(st.integers(0, len(shape)))
    small = [data.draw(st.sampled_from([1, size])) for size in shape[kept:]]
    grad = torch.randn(shape, dtype=DOUBLE)
    source = torch.zeros(small, dtype=DOUBLE, requires_grad=True)
    (wanted,) = torch.autograd.grad(source.expand(shape), source, grad)
    assert _same(reference.unbroadcast(grad, tuple(small)), wanted)


def test_numerical_gradient_agrees_with_autograd():
    x, w = _randn(3, 4), torch.randn(4, 2, dtype=DOUBLE)

    def f(x):
        return torch.tanh(x @ w).pow(2).sum()

    (wanted,) = torch.autograd.grad(f(x), x)
    assert _same(reference.numerical_gradient(f, x), wanted, 1e-8)
    assert x.grad is None


def test_hessian_vector_product_agrees_with_the_hessian():
    x, v, w = _randn(3, 2), torch.randn(3, 2, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)

    def f(x):
        return torch.tanh(w @ x).prod(0).sum() + (x**4).sum()

    hessian = torch.autograd.functional.hessian(f, x).reshape(6, 6)
    wanted = (hessian @ v.reshape(6)).reshape(3, 2)
    assert _same(reference.hessian_vector_product(f, x, v), wanted)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 100.0])
def test_clip_grad_norm_agrees_with_torch(max_norm):
    parameters = [_randn(3, 4), _randn(4), _randn()]
    for parameter in parameters:
        parameter.grad = 3 * torch.randn_like(parameter)
    grads = [parameter.grad.clone() for parameter in parameters]
    clipped, total_norm = reference.clip_grad_norm(grads, max_norm)
    assert _same(total_norm, nn.utils.clip_grad_norm_(parameters, max_norm))
    for ours, parameter in zip(clipped, parameters, strict=True):
        assert _same(ours, parameter.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpoint_agrees_with_torch(dropout):
    x, other, weight = _randn(6, 3), _randn(3), _randn(3, 2)
    upstream = torch.randn(6, 2, dtype=DOUBLE)

    def function(x, other):
        return F.dropout(torch.tanh(x * other) @ weight, dropout)

    results = []
    for run in (
        lambda: reference.Checkpoint.apply(function, x, other),
        lambda: checkpoint(function, x, other, use_reentrant=True),
        lambda: function(x, other),
    ):
        for tensor in (x, other, weight):
            tensor.grad = None
        torch.manual_seed(7)
        out = run()
        torch.rand(5)
        out.backward(upstream)
        state = torch.rand(3)  # the same numbers come next
        results.append((out, x.grad, other.grad, weight.grad, state))
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            assert _same(ours, theirs)


# A program on a stack of scalars: every step is an operation on two earlier results.
STEPS = st.lists(
    st.tuples(st.sampled_from("+-*/^trez"), st.integers(0, 30), st.integers(0, 30)),
    min_size=1,
    max_size=14,
)


def _run(program, stack, tanh, relu, exp):
    for operation, i, j in program:
        a, b = stack[i % len(stack)], stack[j % len(stack)]
        result = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: tanh(a) * b,
            "/": lambda a, b: a / (tanh(b) + 2.5),
            "^": lambda a, b: tanh(a) ** 3 + 1.5 * b,
            "t": lambda a, b: tanh(a) - b * 0.25,
            "r": lambda a, b: relu(a) + 2 / (relu(b) + 1.0),
            "e": lambda a, b: exp(tanh(a)) - 0.5,
            "z": lambda a, b: 1.0 - a,
        }[operation](a, b)
        stack.append(result)
    return stack[-1]


@given(STEPS, st.lists(st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3), min_size=3, max_size=3))
@settings(max_examples=150, deadline=None)
def test_scalar_engine_agrees_with_torch(program, numbers):
    ours = [Value(number) for number in numbers]
    theirs = [torch.tensor(number, dtype=DOUBLE, requires_grad=True) for number in numbers]
    root = _run(program, list(ours), Value.tanh, Value.relu, Value.exp)
    other = _run(program, list(theirs), torch.tanh, torch.relu, torch.exp)
    assert math.isclose(root.data, other.item(), rel_tol=1e-9, abs_tol=1e-12)
    for _ in range(2):  # leaves add up, as in torch
        reference.backward(root)
        other.backward(retain_graph=True)
    for leaf, tensor in zip(ours, theirs, strict=True):
        wanted = 0.0 if tensor.grad is None else tensor.grad.item()
        assert math.isclose(leaf.grad, wanted, rel_tol=1e-9, abs_tol=1e-9)


def test_scalar_engine_is_short():
    lines = open(reference.__file__, encoding="utf-8").read().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class Value"))
    end = next(i for i, line in enumerate(lines) if line.startswith("def unbroadcast"))
    assert len([line for line in lines[start:end] if line]) <= 60


def test_symptoms_are_as_told():
    """The numbers that the find-the-bug exercises quote."""
    data = torch.tensor([1.0, 1.5, 2.0, 2.5])
    bias = torch.zeros(1, requires_grad=True)
    for _ in range(100):
        loss = (
            (exercises.CopiedAddBias.apply(torch.zeros(4, 1), bias) - data[:, None]) ** 2
        ).mean()
        (grad,) = torch.autograd.grad(loss, bias)
        with torch.no_grad():
            bias -= 0.1 * grad
    assert loss.item() == 3.375 and grad.item() == 0

    x = torch.randn(256, 3)
    x = x - x.mean(0)
    target = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 4
    layer = exercises.ShiftedLinear(3, 1)
    for _ in range(500):
        loss = F.mse_loss(layer(x), target)
        (grad,) = torch.autograd.grad(loss, layer.linear.weight)
        with torch.no_grad():
            layer.linear.weight -= 0.1 * grad
    assert loss.item() == pytest.approx(9.0, abs=1e-4)

    def nodes(output):
        seen, todo = set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen)

    batches = [(torch.randn(5, 3), torch.randn(5, 1))] * 100
    found = [
        nodes(exercises.mean_loss(nn.Linear(3, 1), batches[:count], F.mse_loss))
        for count in (1, 10, 100)
    ]
    assert found == [7, 43, 403]

    for function, wanted in ((exercises.ScaledTanh, 0.0707), (reference.ScaledTanh, 1.0353)):
        x = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)
        h = x * 1
        (h + function.apply(h, 0.5)).backward(torch.ones(1, dtype=DOUBLE))
        assert x.grad.item() == pytest.approx(wanted, abs=5e-5)
    assert gradcheck(lambda x: exercises.ScaledTanh.apply(x, 0.5), (_randn(4),))  # sees nothing


def _unfinished(ctx, grad_output):
    raise NotImplementedError


def test_half_a_stub_is_wrong_and_says_so():
    half = type("Swish", (reference.Swish,), {"backward": staticmethod(_unfinished)})
    verdict = diagnose(exercises.SWISH, half)
    assert verdict.state == "wrong" and "NotImplementedError" in verdict.message


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_a_mistake_is_named_in_company_of_bad_habits(saving, always):
    """The usual AddBias of the web: saves its inputs, ignores needs_input_grad, takes the mean."""

    class AddBias(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bias):
            if saving:
                ctx.save_for_backward(x, bias)
            return x + bias

        @staticmethod
        def backward(ctx, grad_output):
            if not always and not ctx.needs_input_grad[1]:
                return grad_output, None
            return grad_output, grad_output.mean(0)

    verdict = diagnose(exercises.ADD_BIAS, AddBias)
    assert verdict.misconception is not None
    assert verdict.misconception.startswith("mean_over_first_axis")
    assert ("save inputs" in verdict.message) == saving
    assert ("needs_input_grad" in verdict.message) == always


def test_the_chapter_has_enough_misconceptions():
    assert sum(len(exercise.misconceptions) for exercise in exercises.EXERCISES) >= 70
