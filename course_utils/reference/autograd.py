"""Chapter 1: the right answers, as `solution` shows them and as later chapters use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn


def numerical_gradient(
    f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """The gradient of f at x by central differences, 2 * x.numel() calls of f.

    Args:
        f: maps a tensor of x's shape to a scalar tensor (shape ()).
        x: floating point, any shape; left unmodified; may require a gradient.
        eps: half the distance between the two points of each difference, in units of x.

    Returns:
        Tensor of x's shape and dtype.
    """
    point = x.detach().clone()
    grad = torch.zeros_like(point)
    for index in np.ndindex(*point.shape):
        value = point[index].item()
        point[index] = value + eps
        above = f(point).item()
        point[index] = value - eps
        below = f(point).item()
        point[index] = value
        grad[index] = (above - below) / (2 * eps)
    return grad


class Value:
    """A number that remembers its parents and, for each, d(self)/d(parent)."""

    def __init__(self, data, parents=(), local_gradients=()):
        self.data = float(data)
        self.grad = 0.0
        self.parents = parents
        self.local_gradients = local_gradients

    def __repr__(self):
        return f"Value(data={self.data:.4g}, grad={self.grad:.4g})"

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, exponent):  # the exponent is a plain number
        return Value(self.data**exponent, (self,), (exponent * self.data ** (exponent - 1),))

    def exp(self):
        return Value(math.exp(self.data), (self,), (math.exp(self.data),))

    def tanh(self):
        return Value(math.tanh(self.data), (self,), (1 - math.tanh(self.data) ** 2,))

    def relu(self):
        return Value(max(self.data, 0.0), (self,), (float(self.data > 0),))

    __radd__, __rmul__ = __add__, __mul__
    __neg__ = lambda self: self * -1  # noqa: E731
    __sub__ = lambda self, other: self + -other  # noqa: E731
    __rsub__ = lambda self, other: -self + other  # noqa: E731
    __truediv__ = lambda self, other: self * other**-1  # noqa: E731
    __rtruediv__ = lambda self, other: self**-1 * other  # noqa: E731


def backward(root: Value) -> None:
    """Adds d(root)/d(leaf) to the `grad` of every leaf; the other nodes' `grad` is set anew."""
    order, seen = [], set()

    def visit(node):  # parents before children
        if node not in seen:
            seen.add(node)
            for parent in node.parents:
                visit(parent)
            order.append(node)

    visit(root)
    for node in order:
        if node.parents:  # only leaves keep what an earlier call left
            node.grad = 0.0
    root.grad += 1.0
    for node in reversed(order):  # a node's gradient is complete before it is passed on
        for parent, local in zip(node.parents, node.local_gradients, strict=True):
            parent.grad += local * node.grad


def unbroadcast(grad: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Sums the gradient of a broadcast result back to the shape of one input.

    Args:
        grad: gradient with respect to the result, of a shape that `shape` broadcasts to.
        shape: the input's shape before broadcasting.

    Returns:
        Tensor of shape `shape`: each element of the input gets the sum over its copies.
    """
    while grad.ndim > len(shape):  # axes that broadcasting put in front
        grad = grad.sum(0)
    for axis, size in enumerate(shape):
        if size == 1 and grad.shape[axis] != 1:  # axes that it stretched
            grad = grad.sum(axis, keepdim=True)
    return grad


class AddBias(torch.autograd.Function):
    """x + bias for x (..., features) and bias (features,); saves nothing for backward."""

    @staticmethod
    def forward(ctx, x, bias):
        return x + bias  # (..., features)

    @staticmethod
    def backward(ctx, grad_output):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output
        if ctx.needs_input_grad[1]:  # the bias was used once per row
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)  # (features,)
        return grad_x, grad_bias


class Swish(torch.autograd.Function):
    """x * sigmoid(x), any shape; saves only its input; can be differentiated twice.

    Ramachandran, Zoph & Le, "Searching for Activation Functions", 2017 (with beta = 1).
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)  # recomputed: cheaper than keeping it, and part of the graph
        return grad_output * (s + x * s * (1 - s))


class RoundSTE(torch.autograd.Function):
    """Clamps x to [low, high] and rounds; backward acts as if it had only clamped.

    The gradient passes unchanged where low <= x <= high and is 0 elsewhere; `low` and `high` are
    numbers and get None. Bengio, Léonard & Courville, "Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation", 2013.
    """

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward((x >= low) & (x <= high))  # a byte per element
        return x.clamp(low, high).round()

    @staticmethod
    def backward(ctx, grad_output):
        (inside,) = ctx.saved_tensors
        return grad_output * inside, None, None


def hessian_vector_product(
    f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """H v for the Hessian H of f at x, without forming H: two backward passes.

    Args:
        f: maps a tensor of x's shape to a scalar tensor; twice differentiable, not linear.
        x: where; left unmodified, its `.grad` too.
        v: the vector, of x's shape.

    Returns:
        Tensor of x's shape. Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
    """
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    (product,) = torch.autograd.grad(grad, x, grad_outputs=v)
    return product


def clip_grad_norm(
    grads: Sequence[torch.Tensor], max_norm: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Scales all gradients by one factor so that their joint 2-norm is at most max_norm.

    The factor is max_norm / (total_norm + 1e-6), and never above 1. Pascanu, Mikolov & Bengio,
    "On the difficulty of training recurrent neural networks", 2013.

    Args:
        grads: tensors of any shapes; left unmodified.
        max_norm: the largest norm allowed.

    Returns:
        (clipped, total_norm): new tensors in the order of `grads`, and the 2-norm of all elements
        together before clipping (0-dim tensor).
    """
    total_norm = torch.sqrt(sum((grad**2).sum() for grad in grads))
    factor = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    return [grad * factor for grad in grads], total_norm


class Checkpoint(torch.autograd.Function):
    """function(*inputs) without keeping its graph: backward computes it a second time.

    `function` maps tensors to one tensor and may draw random numbers on the CPU. At least one input
    must require a gradient. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.rng_state = torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        return function(*inputs)  # autograd does not record inside forward

    @staticmethod
    def backward(ctx, grad_output):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        rng_state = torch.get_rng_state()
        torch.set_rng_state(ctx.rng_state)  # the same dropout mask as in forward
        with torch.enable_grad():
            output = ctx.function(*inputs)
        torch.set_rng_state(rng_state)
        output.backward(grad_output)  # parameters inside `function` get theirs here
        return None, *(x.grad for x in inputs)


class CopiedAddBias(torch.autograd.Function):
    """x + bias for x (batch, features) and bias (features,)."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(bias)
        return x + bias

    @staticmethod
    def backward(ctx, grad_output):
        grad_x = grad_output.clone()
        grad_bias = grad_output.sum(dim=0)  # (features,)
        return grad_x, grad_bias


class ShiftedLinear(nn.Module):
    """x W^T + shift for x (batch, in_features); the shift (out_features,) starts at 1, is learned.

    The result has shape (batch, out_features).
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.shift = nn.Parameter(torch.ones(out_features))

    def forward(self, x):
        return self.linear(x) + self.shift


def mean_loss(model, batches, loss_function):
    """The mean over batches of loss_function(model(x), y), as a float to print.

    Args:
        batches: a list of pairs (x, y).
    """
    total = 0.0
    for x, y in batches:
        loss = loss_function(model(x), y)
        total += loss.item()  # a number: the batch's graph can go
    return total / len(batches)


class ScaledTanh(torch.autograd.Function):
    """scale * tanh(x) for x of any shape and a number `scale`."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return scale * torch.tanh(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output * ctx.scale * (1 - torch.tanh(x) ** 2), None
