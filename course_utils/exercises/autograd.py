"""The exercises of chapter 1: probes, what people really get wrong, other right ways, hints.

A comment `museum 1.n` marks row n of the chapter's list of defects seen in published code.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from course_utils.exercises.engine import Exercise, Misconception
from course_utils.reference import autograd as reference
from course_utils.reference.autograd import Value

# --- shared by several exercises ----------------------------------------------------------------


def _with(base: type, **methods: Callable) -> type:
    """The Function `base` with other static methods.

    It has the name of `base`, and so of a learner's class: torch's messages contain it.
    """
    return type(base.__name__, (base,), {name: staticmethod(m) for name, m in methods.items()})


def _kept(function: Callable, *inputs: Any) -> list[torch.Tensor]:
    """The tensors that function(*inputs) keeps for its backward pass, saved or put on ctx."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = function(*inputs)
    for value in getattr(output.grad_fn, "__dict__", {}).values():
        values = value if isinstance(value, (tuple, list)) else [value]
        kept += [value for value in values if isinstance(value, torch.Tensor)]
    return kept


class _Watched(torch.Tensor):
    """An upstream gradient that counts operations with a smaller result: sums, means, products."""

    reductions = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes = [arg.numel() for arg in args if isinstance(arg, torch.Tensor)]
                _Watched.reductions += any(size > result.numel() for size in sizes)
        return result.as_subclass(cls) if type(result) is torch.Tensor else result


def _values(function: Callable) -> Callable:
    """`function`, where only the values of its result matter and not whether they have a graph."""

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        return result.detach() if isinstance(result, torch.Tensor) else result

    return call


def _edit_in_place(see, apply: Callable, right: Callable) -> None:
    """Edits the input between forward and backward; right(x) computes the same by autograd."""
    x = see.randn(3, 2, requires_grad=True)
    upstream = see.randn(3, 2)
    (wanted,) = torch.autograd.grad(right(x), x, upstream)
    hidden = x * 1
    out = see.call("the output", apply, hidden)
    hidden.mul_(2)
    try:
        out.backward(upstream)
        noticed = torch.allclose(x.grad, wanted)
    except RuntimeError:
        noticed = True
    see.fact("an input edited in place after forward gives an error, not a wrong gradient", noticed)


# --- numerical_gradient -------------------------------------------------------------------------


def _observe_numerical_gradient(numerical_gradient, see):
    numerical_gradient = _values(numerical_gradient)
    with see.probe("f(x) = sum(w * x**3), x of shape (4, 3), eps = 0.1"):
        x, w = see.randn(4, 3), see.randn(4, 3)
        see.call("the gradient", numerical_gradient, lambda x: (w * x**3).sum(), x, eps=0.1)
    with see.probe("f(x) = sum(tanh(A x) * x), x of shape (5,), default eps"):
        x, a = see.randn(5), see.randn(5, 5)
        see.call("the gradient", numerical_gradient, lambda x: (torch.tanh(a @ x) * x).sum(), x)
    with see.probe("f(x) = x**2, x of shape ()"):
        see.call("the gradient", numerical_gradient, lambda x: x**2, see.randn())
    with see.probe("x of shape (3, 2, 4) that requires a gradient, default eps"):
        x, w = see.randn(3, 2, 4, requires_grad=True), see.randn(4, 3)
        see.call("the gradient", numerical_gradient, lambda x: (x @ w).sin().sum(), x)
        see.fact("x still requires a gradient afterwards", x.requires_grad)
        see.fact("x.grad is left as it was", x.grad is None)
    with see.probe("a black box: f(x) = (x.detach()**2).sum(), x of shape (6,)"):
        x = see.randn(6)
        see.call("the gradient", numerical_gradient, lambda x: (x.detach() ** 2).sum(), x)
    with see.probe("x of shape (2, 4), the transpose of another tensor"):
        x, w = see.randn(4, 2).T, see.randn(2, 4)
        see.call("the gradient", numerical_gradient, lambda x: (w * x.exp()).sum(), x, eps=1e-4)


def _forward_difference(f, x, eps=1e-6):
    grad = torch.zeros_like(x.detach())
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(x.numel(), -1):
        step = torch.zeros_like(grad)
        step[tuple(index)] = eps
        grad[tuple(index)] = (f(x.detach() + step).item() - f(x.detach()).item()) / eps
    return grad


def _numerical(difference: Callable) -> Callable:
    """numerical_gradient with `difference(f, x, step, eps)` for each element."""

    def numerical_gradient(f, x, eps=1e-6):
        x = x.detach()
        steps = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
        values = [float(difference(f, x, step, eps)) for step in steps]
        return torch.tensor(values, dtype=x.dtype).reshape(x.shape)

    return numerical_gradient


def _central(f, x, step, eps):
    return (f(x + eps * step) - f(x - eps * step)) / (2 * eps)


def _not_put_back(f, x, eps=1e-6):
    point = x.detach().clone(memory_format=torch.contiguous_format)
    flat, grad = point.view(-1), []
    for i in range(flat.numel()):
        flat[i] += eps
        above = f(point).item()
        flat[i] -= 2 * eps
        grad.append((above - f(point).item()) / (2 * eps))
    return torch.tensor(grad, dtype=x.dtype).reshape(x.shape)


def _copies_not_put_back(f, x, eps=1e-6):
    above, below, grad = x.detach().clone(), x.detach().clone(), torch.zeros_like(x.detach())
    for i in product(*map(range, x.shape)):
        above[i] += eps
        below[i] -= eps
        grad[i] = (f(above).item() - f(below).item()) / (2 * eps)
    return grad


def _in_place_on_x(f, x, eps=1e-6):
    grad = torch.zeros_like(x)
    with torch.no_grad():
        flat, flat_grad = x.view(-1), grad.view(-1)
        for i in range(flat.numel()):
            flat[i] += eps
            above = f(x).item()
            flat[i] -= 2 * eps
            below = f(x).item()
            flat[i] += eps
            flat_grad[i] = (above - below) / (2 * eps)
    return grad


def _flat_view(f, x, eps=1e-6):
    point, grad = x.detach().clone(), torch.zeros_like(x.detach())
    flat, flat_grad = point.view(-1), grad.view(-1)
    for i in range(flat.numel()):
        value = flat[i].item()
        flat[i] = value + eps
        above = f(point).item()
        flat[i] = value - eps
        flat_grad[i] = (above - f(point).item()) / (2 * eps)
        flat[i] = value
    return grad


def _single_precision(f, x, eps=1e-6):
    return _numerical(lambda f, x, step, eps: _central(f, x.float(), step.float(), eps))(f, x, eps)


def _flatten_copies(f, x, eps=1e-6):
    point, grad = x.detach().clone(), torch.zeros_like(x.detach())
    for i in range(x.numel()):
        step = torch.eye(x.numel(), dtype=x.dtype)[i].reshape(x.shape)
        grad.flatten()[i] = float(_central(f, point, step, eps))
    return grad


def _first_axis(f, x, eps=1e-6):
    x = x.detach()
    grad = torch.zeros_like(x)
    for i in range(len(x)):
        above, below = x.clone(), x.clone()
        above[i] += eps
        below[i] -= eps
        grad[i] = (f(above) - f(below)) / (2 * eps)
    return grad


def _by_autograd_instead(f, x, eps=1e-6):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def _in_grid(f, x, eps=1e-6):
    """Another way: the perturbed points are rows of one tensor."""
    x = x.detach()
    moves = eps * torch.eye(x.numel(), dtype=x.dtype)
    points = torch.cat([x.reshape(-1) + moves, x.reshape(-1) - moves]).reshape(-1, *x.shape)
    above, below = torch.stack([f(point) for point in points]).detach().chunk(2)
    return ((above - below) / (2 * eps)).reshape(x.shape)


NUMERICAL_GRADIENT = Exercise(
    slug="numerical_gradient",
    chapter=1,
    title="A gradient without any calculus",
    minutes=10,
    difficulty=2,
    reference=reference.numerical_gradient,
    observe=_observe_numerical_gradient,
    misconceptions=(
        Misconception(  # museum 1.25
            "forward_difference",
            _forward_difference,
            "You compare f(x + eps) with f(x): a forward difference, whose error shrinks only like "
            "eps. Stepping to both sides makes the errors of first order cancel, and what is left "
            "shrinks like eps**2.",
        ),
        Misconception(  # museum 1.25
            "single_precision",
            _single_precision,
            "You evaluate f in float32. At eps = 1e-6 the difference of two float32 values is "
            "mostly rounding error; keep the dtype of x, which is float64 here.",
        ),
        Misconception(
            "divides_by_eps",
            _numerical(lambda f, x, step, eps: 2 * _central(f, x, step, eps)),
            "Your gradient is twice too large everywhere. The two points lie on either side of x: "
            "look at how far apart they are.",
        ),
        Misconception(
            "multiplies_by_eps",
            _numerical(lambda f, x, step, eps: eps**2 * _central(f, x, step, eps)),
            "You write `/ 2 * eps`: Python divides by 2 and then multiplies by eps, so your "
            "gradient is too small by eps**2. Put the whole distance 2 * eps in parentheses.",
        ),
        Misconception(
            "half_steps",
            _numerical(lambda f, x, step, eps: _central(f, x, step, eps / 2)),
            "Your points lie eps / 2 to either side of x. That is a central difference too, but "
            "the one asked for steps a whole eps to either side, and divides by 2 * eps.",
        ),
        Misconception(
            "one_number",
            lambda f, x, eps=1e-6: (f(x + eps) - f(x - eps)) / (2 * eps),
            "You move all elements of x at once and get one number, the sum of all partial "
            "derivatives. A partial derivative moves one element and holds the others, and the "
            "result has one number for each element.",
        ),
        Misconception(
            "steps_all_elements",
            _numerical(lambda f, x, step, eps: _central(f, x, torch.ones_like(x), eps)),
            "You move all elements of x at once, so every entry of your result is the sum of all "
            "partial derivatives. A partial derivative moves one element and holds the others.",
        ),
        Misconception(
            "element_not_put_back",
            _not_put_back,
            "You leave an element shifted when you go on to the next one, so later differences are "
            "taken at another point than x. Put the element's value back first.",
        ),
        Misconception(
            "copies_not_put_back",
            _copies_not_put_back,
            "You make the two copies of x once, and in both the elements stay shifted when you go "
            "on to the next one. Put the values back, or make the copies anew for each element.",
        ),
        Misconception(
            "backward_difference",
            _numerical(lambda f, x, step, eps: (f(x) - f(x - eps * step)) / eps),
            "You compare f(x) with f(x - eps): a one-sided difference, whose error shrinks only "
            "like eps. Stepping to both sides makes the errors of first order cancel.",
        ),
        Misconception(
            "first_axis_only",
            _first_axis,
            "You step through the first axis only, so for a matrix whole rows are moved at once, "
            "and every element of a row gets the sum. x may have any shape, () too: move one "
            "element at a time.",
        ),
        Misconception(
            "asks_autograd",
            _by_autograd_instead,
            "You ask autograd for the gradient. This function is the independent witness against "
            "which autograd is checked: it may only evaluate f, which may be a black box.",
        ),
        Misconception(
            "asks_autograd_for_the_jacobian",
            lambda f, x, eps=1e-6: torch.autograd.functional.jacobian(f, x),
            "You ask autograd for the Jacobian. This function is the independent witness against "
            "which autograd is checked: it may only evaluate f, which may be a black box.",
        ),
        Misconception(
            "writes_into_a_copy",
            _flatten_copies,
            "You write the results into `grad.flatten()`. For a contiguous tensor that is a view; "
            "for a transposed one it is a copy, and your results are thrown away.",
        ),
        Misconception(
            "ignores_eps",
            _numerical(lambda f, x, step, eps: _central(f, x, step, 1e-6)),
            "You step by a fixed distance and ignore the argument `eps`. The caller chooses it: "
            "the best distance depends on f and on the dtype.",
        ),
        Misconception(
            "modifies_x",
            _in_place_on_x,
            "You step on the caller's x itself. Adding and subtracting eps does not give back the "
            "same number in floating point, and x belongs to the caller: step on a copy.",
        ),
        Misconception(
            "view_of_a_transpose",
            _flat_view,
            "You flatten with `view(-1)`, which needs the elements in memory in the order of the "
            "indices; for a transposed x they are not, and a clone keeps its layout.",
        ),
        Misconception(
            "flat_result",
            lambda f, x, eps=1e-6: _numerical(_central)(f, x, eps).reshape(-1),
            "You return the partial derivatives as one flat list. A gradient has the shape of x: "
            "one number for each element, in the same place.",
        ),
    ),
    alternatives=(_numerical(_central), _in_grid),
    hints=(
        "A partial derivative asks how much f moves when one element of x moves. Take one element "
        "at a time.",
        "Copy x (`x.detach().clone()`); for every index set that element to value + eps, call f, "
        "then to value - eps, call f, then put the value back.",
        "`np.ndindex(*x.shape)` gives all indices of any shape, also of shape (); the difference "
        "of the two calls is divided by the distance between the two points, 2 * eps.",
    ),
    rtol=1e-7,  # rounding: 1e-16 / eps
    atol=1e-7,
)


# --- backward -----------------------------------------------------------------------------------


class _CountingValue(Value):
    """Counts how often the local gradients of any node are read."""

    reads = 0

    @property
    def local_gradients(self):
        _CountingValue.reads += 1
        return self._local_gradients

    @local_gradients.setter
    def local_gradients(self, gradients):
        self._local_gradients = gradients


def _observe_backward(backward, see):
    with see.probe("y = a * b + c, each used once"):
        a, b, c = Value(2.0), Value(-3.0), Value(0.5)
        product = a * b
        y = product + c
        backward(y)
        for name, node in {"y": y, "a * b": product, "a": a, "b": b, "c": c}.items():
            see(f"the grad of {name}", node.grad)
    with see.probe("y = tanh(a * b) * 0.7 + c**3, three operations deep"):
        a, b, c = Value(0.8), Value(-0.6), Value(1.3)
        inner = a * b
        outer = inner.tanh()
        y = outer * 0.7 + c**3
        backward(y)
        for name, node in {"a": a, "b": b, "c": c, "tanh(a * b)": outer, "a * b": inner}.items():
            see(f"the grad of {name}", node.grad)
    with see.probe("y = (a * b) * (a + 4), at a = 2, b = 3: both factors are 6"):
        a, b = Value(2.0), Value(3.0)
        backward((a * b) * (a + 4))
        see("the grad of a", a.grad)
        see("the grad of b", b.grad)
    with see.probe("y = a * a, at a = 3"):
        a = Value(3.0)
        backward(a * a)
        see("the grad of a", a.grad)
    with see.probe("b = a**2, c = b + a, y = b * c, at a = 3"):
        a = Value(3.0)
        b = a**2
        c = b + a
        backward(b * c)
        for name, node in {"c": c, "b": b, "a": a}.items():
            see(f"the grad of {name}", node.grad)
    with see.probe("b = a**2, c = exp(b) - a, d = c * b, y = (d + b) / (c + d), at a = 0.7"):
        a = Value(0.7)
        b = a**2
        c = b.exp() - a
        d = c * b
        backward((d + b) / (c + d))
        for name, node in {"d": d, "c": c, "b": b, "a": a}.items():
            see(f"the grad of {name}", node.grad)
    with see.probe("b = a * 3, c = b * 5, d = c + 2, y = b * d, at a = 2: paths of unequal length"):
        a = Value(2.0)
        b = a * 3
        c = b * 5
        backward(b * (c + 2))
        for name, node in {"c": c, "b": b, "a": a}.items():
            see(f"the grad of {name}", node.grad)
    with see.probe("y = a * b * a, a.grad was 0.25 before"):
        a, b = Value(1.5), Value(-2.0)
        a.grad = 0.25
        backward(a * b * a)
        see("the grad of a", a.grad)
        see("the grad of b", b.grad)
    with see.probe("backward(y) twice for y = (a * b).tanh() * a"):
        a, b = Value(0.4), Value(1.1)
        y = (a * b).tanh() * a
        backward(y)
        backward(y)
        see("the grad of a after two calls", a.grad)
        see("the grad of b after two calls", b.grad)
    with see.probe("two results that share the node h = a * b: backward(h * c), backward(h + a)"):
        a, b, c = Value(0.9), Value(-1.7), Value(2.2)
        h = a * b
        first, second = h * c, h + a
        backward(first)
        backward(second)
        for name, node in {"a": a, "b": b, "c": c}.items():
            see(f"the grad of {name} after both", node.grad)
    with see.probe("y is itself a leaf"):
        y = Value(4.0)
        backward(y)
        see("the grad of y", y.grad)
    with see.probe("8 nodes, each the previous one plus itself"):
        nodes = [_CountingValue(1.0)]
        for _ in range(8):
            last = nodes[-1]
            nodes.append(_CountingValue(2 * last.data, (last, last), (1.0, 1.0)))
        _CountingValue.reads = 0
        backward(nodes[-1])
        see("the grad of the first", nodes[0].grad)
        reads = _CountingValue.reads  # 9 where each node passes its gradient on once
        see("the number of times that local_gradients is read (90 or fewer)", max(90, reads))


def _parents_first(root: Value, once: bool = True) -> list[Value]:
    order, seen = [], set()

    def visit(node):
        if once and node in seen:
            return
        seen.add(node)
        for parent in node.parents:
            visit(parent)
        order.append(node)

    visit(root)
    return order


def _preorder(root: Value) -> list[Value]:
    order = []

    def visit(node):
        if node not in order:
            order.append(node)
            for parent in node.parents:
                visit(parent)

    visit(root)
    return order


def _breadth_first(root: Value) -> list[Value]:
    order = [root]
    for node in order:
        order += [parent for parent in dict.fromkeys(node.parents) if parent not in order]
    return order


def _backward(
    order=lambda root: _parents_first(root)[::-1],
    zero=lambda node: bool(node.parents),
    seed=lambda root: 1.0 if root.parents else root.grad + 1.0,
    send=lambda node, parent, local: parent.grad + local * node.grad,
) -> Callable:
    """`backward` with one part replaced."""

    def backward(root):
        nodes = order(root)
        for node in nodes:
            if zero(node):
                node.grad = 0.0
        root.grad = seed(root)
        for node in nodes:
            for parent, local in zip(node.parents, node.local_gradients, strict=True):
                parent.grad = send(node, parent, local)

    return backward


def _by_value(root: Value) -> list[Value]:
    order, seen = [], set()

    def visit(node):
        if node.data not in seen:
            seen.add(node.data)
            for parent in node.parents:
                visit(parent)
            order.append(node)

    visit(root)
    return order[::-1]


def _never(node):
    return False


def _recursion_after_all_parents(root):
    root.grad = 1.0

    def push(node):
        for parent, local in zip(node.parents, node.local_gradients, strict=True):
            parent.grad += local * node.grad
        for parent in node.parents:
            push(parent)

    push(root)


def _recursion_per_path(root):
    root.grad = 1.0

    def push(node):
        for parent, local in zip(node.parents, node.local_gradients, strict=True):
            parent.grad += local * node.grad
            push(parent)

    push(root)


def _queue_per_use(root):
    root.grad = 1.0
    queue = [root]
    for node in queue:
        for parent, local in zip(node.parents, node.local_gradients, strict=True):
            parent.grad += local * node.grad
            queue.append(parent)


def _last_in_first_out(root: Value) -> list[Value]:
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        if node not in order:
            order.append(node)
            stack += node.parents
    return order


def _recursion_with_upstream(root):
    def clear(node):
        if node.parents:
            node.grad = 0.0
        for parent in set(node.parents):
            clear(parent)

    def push(node, upstream):
        node.grad += upstream
        for parent, local in zip(node.parents, node.local_gradients, strict=True):
            push(parent, local * upstream)

    clear(root)
    push(root, 1.0)


def _backward_counting_uses(root):
    """Another way: a node is passed on when all its uses have reported, as torch's engine does."""
    uses, stack, seen = {root: 0}, [root], {root}
    while stack:
        for parent in stack.pop().parents:
            uses[parent] = uses.get(parent, 0) + 1
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    grads, ready = dict.fromkeys(uses, 0.0) | {root: 1.0}, [root]
    while ready:
        node = ready.pop()
        for parent, local in zip(node.parents, node.local_gradients, strict=True):
            grads[parent] += local * grads[node]
            uses[parent] -= 1
            if uses[parent] == 0:
                ready.append(parent)
    for node, grad in grads.items():
        node.grad = node.grad + grad if not node.parents else grad


def _backward_with_stack(root):
    """Another way: the order is found without recursion."""
    order, stack, done = [], [(root, False)], set()
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.insert(0, node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    _backward(order=lambda root: order)(root)


def _backward_keeping_all(root):
    """Another way: every node's grad adds up over calls, as with `retain_grad`."""
    found = {root: 1.0}
    for node in reversed(_parents_first(root)):
        for i, parent in enumerate(node.parents):
            found[parent] = found.get(parent, 0.0) + node.local_gradients[i] * found[node]
    for node, grad in found.items():
        node.grad += grad
    return root


_PREORDER = (
    "You go depth first from the root and pass a node's gradient on when you first meet it. A node "
    "that is used again further on has then already passed on an incomplete gradient. Make sure "
    "that every use of a node comes before the node itself."
)
_BREADTH_FIRST = (
    "You go through the graph level by level from the root. The shortest path decides when a "
    "node's turn comes, but contributions also arrive along longer paths: its gradient is passed "
    "on before it is complete."
)
_PER_PATH = (
    "You recurse into a node's parents each time you come along and pass on all that it has "
    "gathered so far, so its first contributions are passed on again with the later ones. A node's "
    "gradient may be passed on once, when it is complete."
)
_STACK = (
    "You take the next node from a stack and pass its gradient on at once. A node that is used "
    "again further on has then already passed on an incomplete gradient. Make sure that every use "
    "of a node comes before the node itself."
)
_INNER_KEPT = (
    "A second call starts from what the first one left in the inner nodes and passes it on once "
    "more. Only leaves may add up over calls; clear the others first."
)

BACKWARD = Exercise(
    slug="backward",
    chapter=1,
    title="Back-propagation through any graph of scalars",
    minutes=25,
    difficulty=3,
    reference=reference.backward,
    observe=_observe_backward,
    misconceptions=(
        Misconception(  # museum 1.17
            "overwrites_grad",
            _backward(send=lambda node, parent, local: local * node.grad),
            "You set a parent's grad instead of adding to it. A node that is used twice gets a "
            "contribution from each use, and you keep only the last one: a * a at 3 gives 3 "
            "instead of 6.",
        ),
        Misconception(  # museum 1.18
            "depth_first_preorder",
            _backward(order=_preorder),
            _PREORDER,
        ),
        Misconception(
            "depth_first_preorder_and_inner_kept",
            _backward(order=_preorder, zero=_never),
            f"{_PREORDER} Then: {_INNER_KEPT[0].lower()}{_INNER_KEPT[1:]}",
        ),
        Misconception(
            "breadth_first",
            _backward(order=_breadth_first),
            _BREADTH_FIRST,
        ),
        Misconception(
            "breadth_first_and_inner_kept",
            _backward(order=_breadth_first, zero=_never),
            f"{_BREADTH_FIRST} Then: {_INNER_KEPT[0].lower()}{_INNER_KEPT[1:]}",
        ),
        Misconception(
            "stack",
            _backward(order=_last_in_first_out),
            _STACK,
        ),
        Misconception(
            "stack_and_inner_kept",
            _backward(order=_last_in_first_out, zero=_never),
            f"{_STACK} Then: {_INNER_KEPT[0].lower()}{_INNER_KEPT[1:]}",
        ),
        Misconception(
            "queue_per_use",
            _queue_per_use,
            "You put a node into the queue once for each of its uses, and each time its turn comes "
            "it passes on all that it has gathered so far, the first contributions again and "
            "again. A node's gradient may be passed on once, when it is complete.",
        ),
        Misconception(  # museum 1.19
            "recursion_per_path",
            _recursion_per_path,
            _PER_PATH,
        ),
        Misconception(  # museum 1.19
            "recursion_after_all_parents",
            _recursion_after_all_parents,
            _PER_PATH,
        ),
        Misconception(
            "every_path",
            _recursion_with_upstream,
            "Your gradients are right, but you walk every path from the root to each leaf. Their "
            "number doubles with each node that is used twice; a real network would take longer "
            "than your life. Visit each node once, in an order in which its gradient is complete.",
        ),
        Misconception(
            "visits_not_remembered",
            _backward(order=lambda root: _parents_first(root, once=False)[::-1]),
            "Your ordering lists a node once for every path that leads to it, and each time it "
            "passes its gradient on again. Remember which nodes have been visited.",
        ),
        Misconception(
            "not_reversed",
            _backward(order=_parents_first),
            "You walk the sorted nodes from the leaves to the root. When a node's turn comes, "
            "nothing has reached it yet, so hardly anything arrives at the leaves. Gradients flow "
            "the other way.",
        ),
        Misconception(
            "no_seed",
            _backward(seed=lambda root: root.grad),
            "All gradients stay as they were. Nothing flows before d(root)/d(root) stands in "
            "root.grad, and that is 1.",
        ),
        Misconception(  # museum 1.1, in a scalar engine
            "ignores_upstream",
            _backward(send=lambda node, parent, local: parent.grad + local),
            "You add the local derivative alone. The chain rule multiplies it by the gradient that "
            "has arrived at the node; you cannot see the difference one step below the root, "
            "where that gradient is 1.",
        ),
        Misconception(
            "clears_leaves",
            _backward(zero=lambda node: True),
            "You clear the grad of the leaves as well. Leaves add up over several calls, as in "
            "torch: that is what makes gradient accumulation possible, and `zero_grad` necessary.",
        ),
        Misconception(
            "keeps_inner_gradients",
            _backward(zero=_never),
            _INNER_KEPT,
        ),
        Misconception(
            "keeps_all_gradients",
            _backward(zero=_never, seed=lambda root: root.grad + 1.0),
            f"{_INNER_KEPT} Your root adds up as well: the second call starts from 2.",
        ),
        Misconception(
            "equal_numbers_taken_for_one_node",
            _backward(order=_by_value),
            "You remember visited nodes by their value. Two nodes may hold the same number and "
            "still be different nodes: remember the nodes themselves.",
        ),
        Misconception(
            "value_of_the_parent",
            _backward(send=lambda node, parent, local: parent.grad + parent.data * node.grad),
            "You multiply by the parent's value. What the node's gradient has to be multiplied by "
            "is d(node)/d(parent), which the node keeps in `local_gradients`.",
        ),
    ),
    alternatives=(_backward_counting_uses, _backward_with_stack, _backward_keeping_all),
    hints=(
        "A node may pass its gradient on only when everything that uses it has passed on its own. "
        "Which order of the nodes guarantees that?",
        "List the nodes so that parents come before children: visit the parents recursively, then "
        "append the node; remember what has been visited. Then walk the list from its end.",
        "First set grad to 0 for every node that has parents; add 1 to root.grad; then, from the "
        "root down, parent.grad += local * node.grad for each parent and its local gradient.",
    ),
)


# --- unbroadcast --------------------------------------------------------------------------------


def _observe_unbroadcast(unbroadcast, see):
    cases = (
        ((5, 3), (3,)),
        ((4, 3), (4, 3)),
        ((5, 3), (5, 1)),
        ((2, 5, 3), (5, 1)),
        ((3, 3), (3,)),
        ((2, 3, 4), (1, 3, 1)),
        ((2, 3), ()),
        ((4, 2, 5, 3), (5, 3)),
        ((4, 1), (1,)),
        ((3, 1, 2), (3, 1, 1)),
    )
    for given, wanted in cases:
        with see.probe(f"a gradient of shape {given} for an input of shape {wanted}"):
            grad = see.randn(*given)
            see.call("the result", unbroadcast, grad, wanted)


def _reduce_broadcast(reduce: Callable) -> Callable:
    def unbroadcast(grad, shape):
        while grad.ndim > len(shape):
            grad = reduce(grad, 0, False)
        for axis, size in enumerate(shape):
            if size == 1 and grad.shape[axis] != 1:
                grad = reduce(grad, axis, True)
        return grad

    return unbroadcast


def _only_leading(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(0)
    return grad


def _only_stretched(grad, shape):
    for axis, size in enumerate(shape):
        if size == 1:
            grad = grad.sum(axis, keepdim=True)
    return grad


def _keepdim_forgotten(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(0)
    for axis, size in reversed(list(enumerate(shape))):
        if size == 1:
            grad = grad.sum(axis)
    return grad


def _from_the_end(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(-1)
    for axis, size in enumerate(shape):
        if size == 1 and grad.shape[axis] != 1:
            grad = grad.sum(axis, keepdim=True)
    return grad


def _leading_kept(grad, shape):
    lead = grad.ndim - len(shape)
    for axis in range(grad.ndim):
        if axis < lead or shape[axis - lead] == 1:
            grad = grad.sum(axis, keepdim=True)
    return grad


def _keepdim_forgotten_from_the_left(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(0)
    for axis, size in enumerate(shape):
        if size == 1:
            grad = grad.sum(axis)
    return grad


def _one_leading_axis(grad, shape):
    if grad.ndim > len(shape):
        grad = grad.sum(0)
    return _only_stretched(grad, shape)


def _no_axes_is_all_axes_in_two_sums(grad, shape):
    grad = grad.sum(tuple(range(grad.ndim - len(shape))))
    return grad.sum(tuple(i for i, size in enumerate(shape) if size == 1), keepdim=True)


def _no_axes_is_all_axes(grad, shape):
    lead = grad.ndim - len(shape)
    axes = [i for i in range(grad.ndim) if i < lead or shape[i - lead] != grad.shape[i]]
    return grad.sum(axes).reshape(shape)


def _in_one_sum(grad, shape):
    lead = grad.ndim - len(shape)
    axes = [i for i in range(grad.ndim) if i < lead or shape[i - lead] == 1]
    return (grad.sum(axes) if axes else grad).reshape(shape)


def _by_autograd(grad, shape):
    source = torch.zeros(shape, dtype=grad.dtype, requires_grad=True)
    return torch.autograd.grad(source.expand(grad.shape), source, grad)[0]


UNBROADCAST = Exercise(
    slug="unbroadcast",
    chapter=1,
    title="Sum a gradient back to the shape that was broadcast",
    minutes=15,
    difficulty=2,
    reference=reference.unbroadcast,
    observe=_observe_unbroadcast,
    misconceptions=(
        Misconception(  # museum 1.2
            "mean_for_sum",
            _reduce_broadcast(lambda grad, axis, keep: grad.mean(axis, keepdim=keep)),
            "You average over the broadcast axes. The same element was used once per copy, so its "
            "gradient is the sum of the copies' gradients; the mean is too small by their number.",
        ),
        Misconception(
            "only_leading_axes",
            _only_leading,
            "You sum the axes that broadcasting put in front, but not those of size 1 that it "
            "stretched: for shape (5, 1) the last axis also has to come back to 1.",
        ),
        Misconception(
            "only_stretched_axes",
            _only_stretched,
            "You sum the axes of size 1, but leave those that broadcasting put in front of the "
            "shape. Shapes are aligned from the right: surplus axes on the left have to go.",
        ),
        Misconception(  # museum 1.4
            "sums_from_the_right",
            _from_the_end,
            "You remove surplus axes from the right. Broadcasting aligns shapes from the right and "
            "adds axes on the left, so those on the left are summed away; with a square gradient "
            "only the values show the difference.",
        ),
        Misconception(
            "keepdim_forgotten",
            _keepdim_forgotten,
            "A stretched axis gets lost (by `sum` without keepdim, or `squeeze`): (5, 3) for an "
            "input of (5, 1) becomes (5,). The axis has to stay, with size 1.",
        ),
        Misconception(
            "keepdim_forgotten_from_the_left",
            _keepdim_forgotten_from_the_left,
            "A stretched axis gets lost (`sum` without keepdim): (5, 3) for an input of (5, 1) "
            "becomes (5,), and the axes after it change their numbers while you go through them. "
            "The axis has to stay, with size 1.",
        ),
        Misconception(
            "only_one_leading_axis",
            _one_leading_axis,
            "You sum away one axis in front. Broadcasting may have put several there: go on until "
            "the gradient has as many axes as `shape`.",
        ),
        Misconception(
            "leading_axes_kept",
            _leading_kept,
            "You sum the right axes but keep them all with size 1: (5, 3) for an input of (3,) "
            "becomes (1, 3). Axes that broadcasting put in front have to go.",
        ),
        Misconception(
            "only_the_first_axis",
            lambda grad, shape: grad.sum(0),
            "You sum over axis 0, whatever the shapes are. Which axes have to be summed follows "
            "from comparing grad.shape with `shape`; it may be several, or none.",
        ),
        Misconception(
            "unchanged",
            lambda grad, shape: grad,
            "You return the gradient as it came. It has the shape of the result; the input's "
            "gradient has the shape of the input.",
        ),
        Misconception(
            "first_copy",
            _reduce_broadcast(
                lambda grad, axis, keep: grad.narrow(axis, 0, 1) if keep else grad.select(axis, 0)
            ),
            "You keep the gradient of the first copy and throw the others away. Every copy "
            "influences the loss, and the input's gradient adds up all of them.",
        ),
        Misconception(
            "sum_of_everything",
            lambda grad, shape: grad.sum(),
            "You sum over everything. Only the axes that broadcasting created are summed; the "
            "others stay.",
        ),
        Misconception(
            "sum_spread_out",
            lambda grad, shape: grad.sum().expand(shape).clone(),
            "You sum over everything and give each element that total. Only the axes that "
            "broadcasting created are summed; the others keep their own values.",
        ),
        Misconception(
            "no_axes_is_all_axes",
            _no_axes_is_all_axes,
            "Your list of axes is right, but empty when nothing was broadcast, and torch's "
            "`sum` over an empty list of axes sums over all of them. Treat that case apart.",
        ),
        Misconception(
            "no_axes_is_all_axes_in_two_sums",
            _no_axes_is_all_axes_in_two_sums,
            "One of your two lists of axes may be empty, when nothing was put in front or nothing "
            "was stretched, and torch's `sum` over an empty list of axes sums over all of them. "
            "Treat these cases apart.",
        ),
    ),
    alternatives=(lambda grad, shape: grad.sum_to_size(shape), _in_one_sum, _by_autograd),
    hints=(
        "Broadcasting copies elements. What does an element's gradient become when the element is "
        "used in several places?",
        "Two things may have happened: axes were put in front (grad has more axes than `shape`), "
        "and axes of size 1 were stretched. Undo them in this order.",
        "While grad has more axes than `shape`: grad.sum(0). Then, for each axis whose size in "
        "`shape` is 1 and in grad is not: sum over it with keepdim=True.",
    ),
)


# --- AddBias ------------------------------------------------------------------------------------


def _observe_add_bias(AddBias, see):
    for shape in ((5, 3), (4, 4), (2, 5, 3)):
        with see.probe(f"x of shape {shape}, bias of shape {shape[-1:]}"):
            x = see.randn(*shape, requires_grad=True)
            bias = see.randn(shape[-1], requires_grad=True)
            out = see.call("the output", AddBias.apply, x, bias)
            see.gradients("both need one", out, x=x, bias=bias)
    with see.probe("x of shape (3,), without a batch axis"):
        x, bias = see.randn(3, requires_grad=True), see.randn(3, requires_grad=True)
        out = see.call("the output", AddBias.apply, x, bias)
        see.gradients("both need one", out, x=x, bias=bias)
    with see.probe("x of shape (4, 2) needs no gradient, bias does"):
        x, bias = see.randn(4, 2), see.randn(2, requires_grad=True)
        out = see.call("the output", AddBias.apply, x, bias)
        see.gradients("only bias needs one", out, bias=bias)
    with see.probe("x of shape (4, 2) needs a gradient, bias does not"):
        x, bias = see.randn(4, 2, requires_grad=True), see.randn(2)
        out = see.call("the output", AddBias.apply, x, bias)
        (grad,) = torch.autograd.grad(out, x, see.randn(4, 2), allow_unused=True)
        see("gradient of x (only x needs one)", grad)
    with see.probe("x of shape (4, 2) needs a gradient, bias does not: what is computed"):
        x, bias = see.randn(4, 2, requires_grad=True), see.randn(2)
        upstream = see.randn(4, 2).as_subclass(_Watched)
        _Watched.reductions = 0
        torch.autograd.grad(AddBias.apply(x, bias), x, upstream, allow_unused=True)
        sums = _Watched.reductions
        see("the number of sums that backward computes for a bias without a gradient", sums)
    with see.probe("the gradients are differentiated again, x of shape (5, 3)"):
        x, bias = see.randn(5, 3, requires_grad=True), see.randn(3, requires_grad=True)
        out = see.call("the output", AddBias.apply, x, bias)
        upstream = see.randn(5, 3, requires_grad=True)
        grad_x, grad_bias = torch.autograd.grad(out, (x, bias), upstream, create_graph=True)
        see("the gradient of x (create_graph=True)", grad_x)
        see("the gradient of bias (create_graph=True)", grad_bias)
        see.gradients("second derivative, from x", grad_x, upstream=upstream)
        see.gradients("second derivative, from bias", grad_bias, upstream=upstream)
    with see.probe("what is kept for backward, x of shape (5, 3)"):
        x, bias = see.randn(5, 3, requires_grad=True), see.randn(3, requires_grad=True)
        see.fact("no tensor is kept for backward", not _kept(AddBias.apply, x, bias))


def _per_feature(grad):
    return grad.reshape(-1, grad.shape[-1])


def _add_bias(
    grad_bias: Callable, grad_x: Callable = lambda grad: grad, always=False, saving=False
) -> type:
    """AddBias with other gradients, and perhaps with a habit that costs time or memory."""

    def forward(ctx, x, bias):
        if saving:
            ctx.save_for_backward(x, bias)
        return x + bias

    def backward(ctx, grad_output):
        needs_x, needs_bias = ctx.needs_input_grad
        return (
            grad_x(grad_output) if needs_x else None,
            grad_bias(grad_output) if needs_bias or always else None,
        )

    return _with(reference.AddBias, forward=forward, backward=backward)


def _sum_rows(grad):
    return _per_feature(grad).sum(0)


class _AddBiasInPlace(reference.AddBias):
    @staticmethod
    def forward(ctx, x, bias):
        x += bias
        return x


class _AddBiasMarkedDirty(reference.AddBias):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.mark_dirty(x)
        return x.add_(bias)


class _AddBiasOtherInput(reference.AddBias):
    @staticmethod
    def backward(ctx, grad_output):
        grad_x = grad_output if ctx.needs_input_grad[1] else None
        return grad_x, _sum_rows(grad_output) if ctx.needs_input_grad[0] else None


class _AddBiasOnlyBoth(reference.AddBias):
    @staticmethod
    def backward(ctx, grad_output):
        if not all(ctx.needs_input_grad):
            return None, None
        return grad_output, _sum_rows(grad_output)


class _AddBiasWithSetup(Function):
    """Another way: the context is set up apart, `vjp` for `backward`."""

    @staticmethod
    def forward(x, bias):
        return x + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.leading = tuple(range(output.ndim - 1))

    @staticmethod
    def vjp(ctx, grad_output):
        if not ctx.needs_input_grad[1]:
            return grad_output, None
        return grad_output, grad_output.sum(ctx.leading) if ctx.leading else grad_output


class _AddBiasUnreduced(reference.AddBias):  # museum 1.3
    """Right when called through autograd, which sums a gradient to its input's shape."""

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, grad_output if ctx.needs_input_grad[1] else None


class _AddBiasByEinsum(reference.AddBias):
    @staticmethod
    def backward(ctx, grad_output):
        needs_x, needs_bias = ctx.needs_input_grad
        grad_bias = torch.einsum("...f->f", grad_output) if needs_bias else None
        return grad_output.clone() if needs_x else None, grad_bias


_MEAN_OF_ROWS = (
    "You average the rows' gradients for bias. Bias is used once in every row and its gradient "
    "adds up all of them; yours is too small by the number of rows. If the loss is a mean, "
    "`grad_output` already contains the division."
)
_ALWAYS = (
    " And you compute a gradient for bias even when it needs none, as when it is frozen: "
    "`ctx.needs_input_grad` has one bool for each input of forward."
)
_SAVING = (
    " And you save inputs, which backward does not need: the batch stays in memory until the "
    "backward pass, where x + bias keeps 0 bytes. All that backward needs is in grad_output."
)


def _add_bias_misconceptions(
    slug: str, grad_bias: Callable, message: str, sums: bool = True
) -> tuple[Misconception, ...]:
    """One wrong gradient of bias, with each of the two habits that often go with it.

    Whether it is computed `always` can be seen only where it `sums`.
    """
    found = []
    for always in (False, True)[: 1 + sums]:
        for saving in (False, True):
            name = slug + "_always" * always + "_saving" * saving
            answer = _add_bias(grad_bias, always=always, saving=saving)
            found.append(Misconception(name, answer, message + _ALWAYS * always + _SAVING * saving))
    return tuple(found)


ADD_BIAS = Exercise(
    slug="add_bias",
    chapter=1,
    title="Your first custom Function: add a bias",
    minutes=15,
    difficulty=2,
    reference=reference.AddBias,
    observe=_observe_add_bias,
    misconceptions=(
        *_add_bias_misconceptions(  # museum F1, F3
            "zero_bias_gradient",
            lambda grad: grad.new_zeros(grad.shape[-1]),
            "Your backward returns zeros for bias, so it never learns: an offset in the data stays "
            "in the loss for ever. Each element of bias is added once in every row; what does that "
            "make of the rows' gradients?",
            sums=False,
        ),
        *_add_bias_misconceptions(  # museum 1.5
            "no_bias_gradient",
            lambda grad: None,
            "Your backward returns None for bias, which says that it has no gradient: it never "
            "learns. None is for inputs that need no gradient.",
            sums=False,
        ),
        *_add_bias_misconceptions(  # museum 1.2
            "mean_over_rows",
            lambda grad: _per_feature(grad).mean(0),
            _MEAN_OF_ROWS,
        ),
        *_add_bias_misconceptions(
            "mean_of_flattened_rows",
            lambda grad: grad.flatten(0, -2).mean(0),
            _MEAN_OF_ROWS,
        ),
        *_add_bias_misconceptions(
            "mean_over_first_axis",
            lambda grad: grad.mean(0),
            _MEAN_OF_ROWS,
        ),
        *_add_bias_misconceptions(  # museum 1.1
            "bias_gradient_of_ones",
            lambda grad: grad.new_ones(grad.shape[-1]),
            "You return ones for bias, whatever arrives from above. d(output)/d(bias) is 1 in each "
            "row; its gradient is that times `grad_output`, added up over the rows.",
            sums=False,
        ),
        *_add_bias_misconceptions(  # museum 1.4
            "sums_over_features",
            lambda grad: grad.sum(-1),
            "You sum over the last axis, the features. Bias has one element for each feature: that "
            "axis stays, and all others are summed. With a square x the shapes do not tell.",
        ),
        *_add_bias_misconceptions(  # museum 1.4
            "sums_over_axis_1",
            lambda grad: grad.sum(1),
            "You sum over axis 1, which for a matrix are the features. Bias has one element for "
            "each feature, the last axis: that stays, and all others are summed.",
        ),
        *_add_bias_misconceptions(
            "sums_everything",
            lambda grad: grad.sum(),
            "You sum grad_output over all axes, features too, and get one number. Bias has an "
            "element for each feature, and each needs its own sum over the other axes.",
        ),
        *_add_bias_misconceptions(
            "sums_features_without_batch_axis",
            lambda grad: grad.sum(0),
            "Right as long as x has a batch axis. For x of shape (features,) there is nothing to "
            "sum, but `sum(0)` adds up the features, and so does `sum(())`: over an empty list of "
            "axes torch sums everything.",
        ),
        Misconception(  # museum 1.1
            "ignores_upstream",
            _add_bias(
                lambda grad: grad.new_full(grad.shape[-1:], grad[..., 0].numel()),
                torch.ones_like,
            ),
            "You return the derivative of the sum of x + bias and ignore `grad_output`. That is "
            "right only for `.sum().backward()`, where grad_output is all ones; backward "
            "multiplies the local derivative by what arrives from above.",
        ),
        Misconception(  # museum 1.1
            "ones_for_both",
            _add_bias(lambda grad: grad.new_ones(grad.shape[-1]), torch.ones_like),
            "You return ones for both and ignore `grad_output`. The local derivative is 1, and "
            "backward multiplies it by what arrives from above; for bias the rows add up.",
        ),
        Misconception(
            "one_gradient",
            _with(reference.AddBias, backward=lambda ctx, grad: grad),
            "Your backward returns one gradient (a list counts as one: return a tuple). It has to "
            "return one for each argument of forward after ctx: first x, then bias.",
        ),
        Misconception(
            "ignores_needs_input_grad",
            _add_bias(_sum_rows, always=True),
            "All values are right, but you sum a gradient for bias even when bias needs none, "
            "as when it is frozen. `ctx.needs_input_grad` has one bool for each input of forward.",
        ),
        Misconception(  # museum F3
            "saves_inputs",
            _add_bias(_sum_rows, saving=True),
            "All gradients are right, but you save inputs that backward does not need: the batch "
            "stays in memory until the backward pass, where x + bias keeps 0 bytes. All that "
            "backward needs is in the shape of grad_output.",
        ),
        Misconception(  # museum F3
            "saves_inputs_and_ignores_needs_input_grad",
            _add_bias(_sum_rows, always=True, saving=True),
            f"All values are right.{_ALWAYS}{_SAVING}",
        ),
        Misconception(
            "asks_for_the_other_input",
            _AddBiasOtherInput,
            "You mix up the entries of `ctx.needs_input_grad`: they come in the order of forward's "
            "arguments after ctx. When only one input needs a gradient, yours goes missing.",
        ),
        Misconception(
            "only_where_both_need_one",
            _AddBiasOnlyBoth,
            "You return gradients only where both inputs need one. Each entry of "
            "`ctx.needs_input_grad` speaks for one input: ask for each by itself.",
        ),
        Misconception(  # museum 1.6
            "gradients_swapped",
            _with(reference.AddBias, backward=lambda ctx, grad: (_sum_rows(grad), grad)),
            "You return the gradients in the wrong order. Backward returns one for each argument "
            "of forward, in forward's order: first x, then bias.",
        ),
        Misconception(  # museum 1.16
            "in_place_forward",
            _AddBiasInPlace,
            "Your forward adds to x in place: the caller's x is changed, even where it is a leaf "
            "that requires a gradient, and nothing warns of it. Compute a new tensor.",
        ),
        Misconception(  # museum 1.16
            "in_place_marked_dirty",
            _AddBiasMarkedDirty,
            "Your forward works in place and says so with `mark_dirty`. That is honest, but a leaf "
            "that requires a gradient cannot be changed in place. Compute a new tensor.",
        ),
        Misconception(  # museum 1.13
            "detached_gradients",
            _add_bias(lambda grad: _sum_rows(grad.detach()), lambda grad: grad.detach()),
            "Your gradients have the right values but are detached (`.detach()` or `.data`), so a "
            "second derivative through AddBias is lost. Backward's own operations are recorded "
            "when they are needed: leave them in the graph.",
        ),
    ),
    alternatives=(_AddBiasWithSetup, _AddBiasByEinsum, _AddBiasUnreduced),
    hints=(
        "Backward receives the gradient with respect to the output and returns one for each "
        "argument of forward after ctx, in the same order.",
        "x goes into the output unchanged. An element of bias goes into every row: its gradient is "
        "the sum over all axes but the last. Which shapes may grad_output have?",
        "grad_output.reshape(-1, grad_output.shape[-1]).sum(0) for bias, and grad_output itself "
        "for x; each only if its entry of ctx.needs_input_grad is True, else None.",
    ),
)


# --- Swish --------------------------------------------------------------------------------------


def _observe_swish(Swish, see):
    for shape in ((4, 3), (2, 3, 5)):
        with see.probe(f"x of shape {shape}"):
            x = see.randn(*shape, requires_grad=True)
            out = see.call("the output", Swish.apply, x)
            see.gradients("first derivative", out, x=x)
    with see.probe("x = [-1000, -30, 0, 30, 1000]"):
        x = torch.tensor([-1000.0, -30.0, 0.0, 30.0, 1000.0], dtype=torch.float64)
        out = see.call("the output", Swish.apply, x.requires_grad_())
        see.gradients("first derivative", out, x=x)
    with see.probe("the gradient is differentiated again, x of shape (4, 3)"):
        x, upstream = see.randn(4, 3, requires_grad=True), see.randn(4, 3, requires_grad=True)
        out = see.call("the output", Swish.apply, x)
        (grad,) = torch.autograd.grad(out, x, upstream, create_graph=True)
        see("the gradient of x (create_graph=True)", grad)
        see.gradients("second pass", grad, upstream=upstream)
    with see.probe("x's gradient of x's gradient, x of shape (2, 5)"):
        x, upstream = see.randn(2, 5, requires_grad=True), see.randn(2, 5)
        out = see.call("the output", Swish.apply, x)
        (grad,) = torch.autograd.grad(out, x, upstream, create_graph=True)
        see.fact("the gradient depends on x: it can be differentiated", grad.requires_grad)
        see.gradients("second derivative", grad, x=x)
    with see.probe("what is kept for backward, x of shape (5, 3): 120 bytes"):
        x = see.randn(5, 3, requires_grad=True)
        see("the number of bytes kept for backward", sum(t.nbytes for t in _kept(Swish.apply, x)))
        kept = [torch.equal(t.detach().reshape(-1), x.reshape(-1)) for t in _kept(Swish.apply, x)]
        see.fact("what is kept for backward is x itself", kept == [True])
    with see.probe("x of shape (3, 2) is doubled in place between forward and backward"):
        _edit_in_place(see, Swish.apply, F.silu)


def _swish(derivative: Callable) -> type:
    """Swish with another derivative of x."""
    return _with(
        reference.Swish, backward=lambda ctx, grad: grad * derivative(ctx.saved_tensors[0])
    )


def _swish_derivative(x):
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


class _SwishOnCtx(reference.Swish):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * _swish_derivative(ctx.x)


class _SwishSavingSigmoid(reference.Swish):
    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, grad_output):
        x, s = ctx.saved_tensors
        return grad_output * (s + x * s * (1 - s))


class _SwishSavingOutput(reference.Swish):
    @staticmethod
    def forward(ctx, x):
        out = x * torch.sigmoid(x)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        x, out = ctx.saved_tensors
        return grad_output * (out + torch.sigmoid(x) * (1 - out))


class _SwishOutputForInput(reference.Swish):
    @staticmethod
    def forward(ctx, x):
        out = x * torch.sigmoid(x)
        ctx.save_for_backward(out)
        return out


class _SwishSavingDerivative(reference.Swish):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(_swish_derivative(x))
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0]


class _SwishDetached(reference.Swish):
    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * _swish_derivative(ctx.saved_tensors[0].detach())


class _SwishSigmoidDetached(reference.Swish):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x).detach()
        return grad_output * (s + x * s * (1 - s))


class _SwishUpstreamOnOneTerm(reference.Swish):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad_output * s + x * s * (1 - s)


class _SwishNoGrad(reference.Swish):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return grad_output * _swish_derivative(ctx.saved_tensors[0])


class _SwishInPlace(reference.Swish):
    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.mul_(_swish_derivative(ctx.saved_tensors[0]))


def _naive_sigmoid(x):
    return torch.exp(x) / (1 + torch.exp(x))


class _SwishNaive(reference.Swish):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * _naive_sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = _naive_sigmoid(x)
        return grad_output * (s + x * s * (1 - s))


class _SwishOneStep(Function):
    """Another way: the context is set up apart; the derivative is written with the output."""

    @staticmethod
    def forward(x):
        return x / (1 + torch.exp(-x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad_output):
        x = ctx.saved_tensors[0]
        out = x * torch.sigmoid(x)
        return (grad_output * (out + torch.sigmoid(x) * (1 - out)),)


class _SwishByAutograd(reference.Swish):
    """Another way: backward lets autograd differentiate the recomputed output."""

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            out = x * torch.sigmoid(x)
            return torch.autograd.grad(out, x, grad_output, create_graph=again)[0]


class _SwishGradient(Function):
    @staticmethod
    def forward(ctx, x, grad_output):
        ctx.save_for_backward(x, grad_output)
        return grad_output * _swish_derivative(x)

    @staticmethod
    def backward(ctx, grad):
        x, grad_output = ctx.saved_tensors
        s = torch.sigmoid(x)
        second = s * (1 - s) * (2 + x * (1 - 2 * s))
        return grad * grad_output * second, grad * _swish_derivative(x)


class _SwishWithOwnGradient(reference.Swish):
    """Another way: the backward is a Function with its own formula for the second derivative."""

    @staticmethod
    def backward(ctx, grad_output):
        return _SwishGradient.apply(ctx.saved_tensors[0], grad_output)


SWISH = Exercise(
    slug="swish",
    chapter=1,
    title="Swish: save the input and nothing else",
    minutes=20,
    difficulty=3,
    reference=reference.Swish,
    observe=_observe_swish,
    misconceptions=(
        Misconception(  # museum 1.1
            "ignores_upstream",
            _with(
                reference.Swish,
                backward=lambda ctx, grad: _swish_derivative(ctx.saved_tensors[0]),
            ),
            "You return Swish's derivative without multiplying it by `grad_output`. With "
            "`.sum().backward()` that looks right, because grad_output is then all ones.",
        ),
        Misconception(
            "derivative_of_sigmoid",
            _swish(lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
            "You return the derivative of the sigmoid alone. Swish is a product of two functions "
            "of x, so the product rule gives two terms.",
        ),
        Misconception(
            "sigmoid_held_constant",
            _swish(torch.sigmoid),
            "You treat sigmoid(x) as a constant factor: only the first term of the product rule is "
            "there. The sigmoid moves with x too.",
        ),
        Misconception(
            "x_held_constant",
            _swish(lambda x: x * torch.sigmoid(x) * (1 - torch.sigmoid(x))),
            "You treat the factor x as a constant: the term sigmoid(x) of the product rule is "
            "missing.",
        ),
        Misconception(  # museum 1.8
            "one_minus_x",
            _swish(lambda x: torch.sigmoid(x) + x * x * (1 - x)),
            "For the sigmoid's derivative you wrote x * (1 - x) with the input x. The formula "
            "s * (1 - s) is in terms of the sigmoid's output s.",
        ),
        Misconception(
            "saved_tensors_not_unpacked",
            _with(
                reference.Swish,
                backward=lambda ctx, grad: grad * _swish_derivative(ctx.saved_tensors),
            ),
            "`ctx.saved_tensors` is a tuple, also when one tensor was saved: unpack it, with a "
            "comma or an index.",
        ),
        Misconception(  # museum 1.8
            "output_for_input",
            _SwishOutputForInput,
            "You save the output and use it in backward as if it were x. The derivative needs the "
            "input.",
        ),
        Misconception(
            "factor_x_forgotten",
            _swish(lambda x: torch.sigmoid(x) * (2 - torch.sigmoid(x))),
            "In the second term of the product rule the factor x is missing: it is x times the "
            "derivative of the sigmoid.",
        ),
        Misconception(
            "upstream_detached",
            _with(
                reference.Swish,
                backward=lambda ctx, grad: grad.detach() * _swish_derivative(ctx.saved_tensors[0]),
            ),
            "You detach `grad_output`, so the gradient cannot be differentiated with respect to "
            "what comes after Swish, and a second derivative through a deeper network is wrong.",
        ),
        Misconception(
            "sign_of_second_term",
            _swish(lambda x: torch.sigmoid(x) - x * torch.sigmoid(x) * (1 - torch.sigmoid(x))),
            "The second term of your product rule has the wrong sign: the sigmoid grows with x, so "
            "its derivative s * (1 - s) is positive.",
        ),
        Misconception(  # museum 1.13
            "saved_input_detached",
            _SwishDetached,
            "The gradient is right, but the x that you use in backward is cut off the graph "
            "(`.data`, `.detach()` or a copy made in forward), so the second derivative lacks the "
            "part that goes through x. gradcheck does not see this; gradgradcheck does.",
        ),
        Misconception(
            "differentiable_once",
            _SwishNoGrad,
            "Your backward works without recording (`once_differentiable` or `no_grad`), so the "
            "gradient cannot be differentiated again. Its operations are all differentiable: let "
            "autograd record them.",
        ),
        Misconception(
            "saves_derivative",
            _SwishSavingDerivative,
            "You save the derivative that forward computed. The first derivative is right, but "
            "what is computed inside forward is not recorded, so to the second derivative it looks "
            "like a constant. Save the input and compute the rest in backward.",
        ),
        Misconception(
            "sigmoid_detached",
            _SwishSigmoidDetached,
            "You cut sigmoid(x) off from the graph in backward (`.detach()`, `.data`, `no_grad`). "
            "The first derivative is right; for the second the sigmoid is then a constant, and a "
            "part is missing.",
        ),
        Misconception(
            "upstream_on_one_term",
            _SwishUpstreamOnOneTerm,
            "You multiply only the first term of the derivative by `grad_output`. It belongs to "
            "both: put their sum in parentheses.",
        ),
        Misconception(
            "second_term_without_sigmoid",
            _swish(lambda x: torch.sigmoid(x) + x * (1 - torch.sigmoid(x))),
            "Your second term is x * (1 - sigmoid(x)). The derivative of the sigmoid is "
            "sigmoid(x) * (1 - sigmoid(x)): a factor is missing.",
        ),
        Misconception(
            "saves_sigmoid_too",
            _SwishSavingSigmoid,
            "You save x and sigmoid(x). That is twice the memory, and to a second derivative the "
            "saved sigmoid is a constant, because forward does not record. Compute it "
            "again in backward.",
        ),
        Misconception(
            "saves_output_too",
            _SwishSavingOutput,
            "All derivatives are right, but you save the input and the output: twice the memory. "
            "Everything that backward needs can be computed from x.",
        ),
        Misconception(  # museum 1.14
            "input_on_ctx",
            _SwishOnCtx,
            "You keep the input as an attribute of ctx. When somebody edits x in place before "
            "backward, you use the edited values without noticing; `ctx.save_for_backward` checks "
            "that, and also avoids reference cycles.",
        ),
        Misconception(  # museum 1.15
            "modifies_upstream",
            _SwishInPlace,
            "Your backward multiplies `grad_output` in place. Other branches of the graph may hold "
            "the same tensor, and then get your product for their gradient.",
        ),
        Misconception(  # museum 1.23, for the sigmoid
            "exponential_overflows",
            _SwishNaive,
            "Your sigmoid is exp(x) / (1 + exp(x)): for large x that is inf / inf, which is NaN. "
            "`torch.sigmoid` is stable on both sides.",
        ),
    ),
    alternatives=(_SwishOneStep, _SwishByAutograd, _SwishWithOwnGradient),
    hints=(
        "Use the product rule on x * sigmoid(x). With s = sigmoid(x), the derivative of s is "
        "s * (1 - s).",
        "Save x with ctx.save_for_backward(x), and compute s again in backward: what is computed "
        "in backward is recorded and can be differentiated again.",
        "(x,) = ctx.saved_tensors; the gradient is grad_output * (s + x * s * (1 - s)).",
    ),
)


# --- RoundSTE -----------------------------------------------------------------------------------


def _observe_round_ste(RoundSTE, see):
    cases = (((4, 5), -1, 2), ((3, 2, 4), -1.6, 2.3), ((6, 3), 0.5, 1.5))
    for shape, low, high in cases:
        with see.probe(f"x of shape {shape}, low = {low}, high = {high}"):
            x = (2 * see.randn(*shape)).requires_grad_()
            out = see.call("the output", RoundSTE.apply, x, low, high)
            see.gradients("inside and outside the range", out, x=x)
    with see.probe("x on halves and on the limits, low = -2, high = 3"):
        values = [-3.5, -2.5, -2.0, -1.5, -0.5, 0.5, 1.5, 2.5, 3.0, 3.5]
        x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        out = see.call("the output", RoundSTE.apply, x, -2, 3)
        see.gradients("on the limits", out, x=x)


def _inside(x, low, high):
    return (x >= low) & (x <= high)


def _round_ste(
    forward: Callable = lambda x, low, high: x.clamp(low, high).round(),
    inside: Callable = _inside,
    backward: Callable = lambda grad, inside: grad * inside,
) -> type:
    """RoundSTE with one part replaced."""

    def save_and_round(ctx, x, low, high):
        ctx.save_for_backward(inside(x, low, high))
        return forward(x, low, high)

    def pass_through(ctx, grad_output):
        return backward(grad_output, ctx.saved_tensors[0]), None, None

    return _with(reference.RoundSTE, forward=save_and_round, backward=pass_through)


def _clamped(x, low, high):
    return x.clamp(low, high).round()


class _ClampedGradient(reference.RoundSTE):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.limits = low, high
        return _clamped(x, low, high)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.clamp(*ctx.limits), None, None


def _zero_outside(grad, inside):
    grad[~inside] = 0
    return grad


def _chained_comparison(x, low, high):
    return low <= x <= high


class _RoundSTEChainedInBackward(Function):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high).round()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * (ctx.low <= ctx.saved_tensors[0] <= ctx.high), None, None


_CHAINED = (
    "`low <= x <= high` asks Python for one truth value, and a tensor has many; `and`, `if` and "
    "the built-in `min` and `max` do the same. Clamp with `x.clamp`; for the range compare twice "
    "and combine the two masks with `&`, each in parentheses."
)


def _save_all(ctx, x, low, high):
    ctx.save_for_backward(x, low, high)
    return x.clamp(low, high).round()


class _RoundSTESavingX(Function):
    """Another way: x is saved, its context set up apart."""

    @staticmethod
    def forward(x, low, high):
        return torch.round(torch.clip(x, low, high))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        outside = (x < ctx.low) | (x > ctx.high)
        return grad_output.masked_fill(outside, 0), None, None


class _RoundSTECopy(reference.RoundSTE):
    @staticmethod
    def backward(ctx, grad_output):
        (inside,) = ctx.saved_tensors
        grad = grad_output.clone()
        grad[~inside] = 0
        return grad, None, None


class _RoundSTEWhere(Function):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return torch.minimum(torch.maximum(x, x.new_tensor(low)), x.new_tensor(high)).round()

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        return torch.where(x.clamp(low, high) == x, grad_output, 0.0), None, None


ROUND_STE = Exercise(
    slug="round_ste",
    chapter=1,
    title="Round, and let the gradient through",
    minutes=15,
    difficulty=2,
    reference=reference.RoundSTE,
    observe=_observe_round_ste,
    misconceptions=(
        Misconception(
            "true_derivative",
            _round_ste(backward=lambda grad, inside: torch.zeros_like(grad)),
            "Your gradient is zero everywhere. That is the true derivative of rounding, and why "
            "nothing could be learned through it; a straight-through estimator passes the gradient "
            "as if rounding were not there.",
        ),
        Misconception(
            "passes_outside",
            _round_ste(backward=lambda grad, inside: grad.clone()),
            "You pass the gradient everywhere. Outside [low, high] the output does not move with x "
            "at all, and x would drift further and further out: there the gradient is 0.",
        ),
        Misconception(
            "limits_excluded",
            _round_ste(inside=lambda x, low, high: (x > low) & (x < high)),
            "You stop the gradient of elements that lie exactly on low or high. The specification "
            "lets it pass where low <= x <= high; rounded values often lie on a limit.",
        ),
        Misconception(  # museum 1.1
            "ignores_upstream",
            _round_ste(backward=lambda grad, inside: inside.to(grad.dtype)),
            "You return the mask of the range itself. It is the local derivative, and still has to "
            "be multiplied by `grad_output`.",
        ),
        Misconception(
            "rounds_before_clamping",
            _round_ste(forward=lambda x, low, high: x.round().clamp(low, high)),
            "You round first and clamp then. With limits that are not whole numbers the output is "
            "then not rounded: at high = 2.3 you return 2.3.",
        ),
        Misconception(
            "never_clamps",
            _round_ste(forward=lambda x, low, high: x.round()),
            "Your forward rounds but does not clamp: values outside [low, high] have to be brought "
            "to the limit first.",
        ),
        Misconception(
            "rounds_half_up",
            _round_ste(forward=lambda x, low, high: torch.floor(x.clamp(low, high) + 0.5)),
            "You round with floor(x + 0.5), which takes every half upwards. `torch.round` takes "
            "halves to the nearest even number (0.5 to 0, 1.5 and 2.5 to 2), without a bias.",
        ),
        Misconception(
            "truncates",
            _round_ste(forward=lambda x, low, high: x.clamp(low, high).trunc()),
            "You cut off the decimals (`trunc`, `int`) instead of rounding to the nearest whole "
            "number.",
        ),
        Misconception(
            "range_of_rounded_values",
            _round_ste(inside=lambda x, low, high: _inside(x.round(), low, high)),
            "You decide by the rounded x whether it is inside the range. 2.4 rounds to 2, which is "
            "inside [-1.6, 2.3], and yet 2.4 is outside: compare x itself.",
        ),
        Misconception(
            "range_of_the_output",
            _round_ste(inside=lambda x, low, high: _inside(_clamped(x, low, high), low, high)),
            "You decide by the output whether x is inside the range. The output has been clamped, "
            "so it nearly always is, and gradients pass that should not: compare x itself.",
        ),
        Misconception(
            "strict_range_of_the_output",
            _round_ste(
                inside=lambda x, low, high: (
                    (_clamped(x, low, high) > low) & (_clamped(x, low, high) < high)
                )
            ),
            "You stop the gradient where the output lies on a limit. That does catch what was "
            "clamped, but also an x inside the range that was rounded to the limit: compare x "
            "itself.",
        ),
        Misconception(
            "gradient_clamped",
            _ClampedGradient,
            "You clamp the gradient to [low, high]. These are limits for x: where x lies between "
            "them the gradient passes unchanged, elsewhere it is 0.",
        ),
        Misconception(
            "never_rounds",
            _round_ste(forward=lambda x, low, high: x.clamp(low, high)),
            "Your forward clamps but does not round: the output has to be whole numbers, though "
            "still of the dtype of x.",
        ),
        Misconception(  # museum 1.15
            "modifies_upstream",
            _round_ste(backward=_zero_outside),
            "Your backward sets elements of `grad_output` to zero in place. Other branches of the "
            "graph may hold the same tensor and lose their gradient: work on a copy, or multiply.",
        ),
        Misconception(
            "too_few_gradients",
            _with(reference.RoundSTE, backward=lambda ctx, grad: grad * ctx.saved_tensors[0]),
            "Your backward returns one gradient (a list counts as one: return a tuple). It has to "
            "return one for each argument of forward after ctx, and None for low and high, which "
            "are plain numbers.",
        ),
        Misconception(
            "zeros_for_limits",
            _with(
                reference.RoundSTE, backward=lambda ctx, grad: (grad * ctx.saved_tensors[0], 0, 0)
            ),
            "You return 0 for low and high. They are plain numbers and cannot have a gradient, "
            "not even 0: return None for them.",
        ),
        Misconception(
            "chained_comparison",
            _RoundSTEChainedInBackward,
            _CHAINED,
        ),
        Misconception(
            "chained_comparison_in_forward",
            _round_ste(inside=_chained_comparison),
            _CHAINED,
        ),
        Misconception(
            "mask_inverted",
            _round_ste(backward=lambda grad, inside: grad * ~inside),
            "Your mask is inverted: the gradient passes outside the range and stops inside.",
        ),
        Misconception(
            "saves_numbers",
            _with(reference.RoundSTE, forward=_save_all),
            "`ctx.save_for_backward` takes tensors only. Plain numbers such as low and high may be "
            "attributes of ctx: ctx.low = low.",
        ),
        Misconception(
            "upper_limit_only",
            _round_ste(inside=lambda x, low, high: x <= high),
            "You stop the gradient above high, but not below low. The output is constant on both "
            "sides of the range.",
        ),
        Misconception(
            "lower_limit_only",
            _round_ste(inside=lambda x, low, high: x >= low),
            "You stop the gradient below low, but not above high. The output is constant on both "
            "sides of the range.",
        ),
        Misconception(  # museum 1.16
            "clamps_in_place",
            _round_ste(forward=lambda x, low, high: x.clamp_(low, high).round()),
            "Your forward clamps x in place: the caller's tensor is changed. Use `clamp` without "
            "the underscore.",
        ),
    ),
    alternatives=(_RoundSTESavingX, _RoundSTECopy, _RoundSTEWhere),
    hints=(
        "Forward and backward may disagree on purpose: forward clamps and rounds, backward acts as "
        "if it had only clamped.",
        "Backward needs to know which elements of x were inside the range: save x, or save that "
        "mask itself. It returns three things, one for each argument of forward.",
        "inside = (x >= low) & (x <= high); backward returns grad_output * inside, None, None.",
    ),
)


# --- hessian_vector_product ---------------------------------------------------------------------


class _Largest(TorchFunctionMode):
    """Notes the number of elements of the largest tensor that any call of torch returns."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def _observe_hessian_vector_product(hessian_vector_product, see):
    hessian_vector_product = _values(hessian_vector_product)
    with see.probe("f(x) = sum(tanh(A x)) + prod(x), x of shape (5,)"):
        a, x, v = see.randn(4, 5), see.randn(5), see.randn(5)
        see.call("H v", hessian_vector_product, lambda x: torch.tanh(a @ x).sum() + x.prod(), x, v)
        see.fact("x itself still requires no gradient afterwards", not x.requires_grad)
        see.fact("x.grad is left as it was", x.grad is None)
    with see.probe("f(x) = sum(exp(A x / 2)), x of shape (3, 2), not a vector"):
        a, x, v = see.randn(4, 3), see.randn(3, 2), see.randn(3, 2)
        see.call("H v", hessian_vector_product, lambda x: torch.exp(a @ x / 2).sum(), x, v)
    with see.probe("f(x) = sum(sin(w * x) * flip(x)), x and w of shape (4,) require a gradient"):
        x, w, v = see.randn(4, requires_grad=True), see.randn(4, requires_grad=True), see.randn(4)
        x.grad = torch.ones(4, dtype=torch.float64)
        see.call(
            "H v", hessian_vector_product, lambda x: (torch.sin(w * x) * x.flip(0)).sum(), x, v
        )
        see("x.grad, which was ones before", x.grad)
        see.fact("parameters inside f receive no gradient", w.grad is None)
        see.fact("x still requires a gradient afterwards", x.requires_grad)
    with see.probe("f(x) = sum(cos(40 * x)), x of shape (3,), which bends fast"):
        x, v = see.randn(3), see.randn(3)
        see.call("H v", hessian_vector_product, lambda x: torch.cos(40 * x).sum(), x, v)
    with see.probe("f(x) = sum(sin(x) * flip(x)), x of shape (7, 6): how large the tensors get"):
        x, v = see.randn(7, 6), see.randn(7, 6)
        with _Largest() as largest:
            hessian_vector_product(lambda x: (x.sin() * x.flip(0)).sum(), x, v)
        small = largest.elements < x.numel() ** 2
        see.fact("no tensor has as many elements as the Hessian, 42 * 42", small)


def _hvp(second: Callable) -> Callable:
    """hessian_vector_product with second(gradient, x, v) after the first pass."""

    def hessian_vector_product(f, x, v):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
        return second(grad, x, v).detach()

    return hessian_vector_product


def _hvp_by_differences(f, x, v):
    def gradient(point):
        point = point.detach().requires_grad_()
        return torch.autograd.grad(f(point), point)[0]

    return (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5


def _hvp_by_backward(f, x, v):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    (grad * v).sum().backward()
    return x.grad


def _hvp_through_parameters(f, x, v):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    (grad * v).sum().backward()
    return x.grad


def _hvp_adding_up(f, x, v):
    x = x.detach().requires_grad_()
    f(x).backward(create_graph=True)
    (x.grad * v).sum().backward()
    return x.grad


def _hvp_x_as_given(f, x, v):
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(grad, x, v)[0]


def _hvp_on_callers_x(f, x, v):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(grad, x, v)[0]


def _hvp_without_graph(f, x, v):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(f(x), x)
    return torch.autograd.grad(grad, x, v)[0]


def _hvp_by_full_hessian(f, x, v):
    hessian = torch.autograd.functional.hessian(f, x.detach())
    return torch.tensordot(hessian, v, dims=x.ndim)


def _hvp_of_torch(f, x, v):
    return torch.autograd.functional.hvp(f, x.detach(), v)[1]


def _hvp_forward_over_reverse(f, x, v):
    """Another way: the gradient's derivative in the direction v, by forward mode."""
    return torch.func.jvp(torch.func.grad(f), (x.detach(),), (v,))[1]


HESSIAN_VECTOR_PRODUCT = Exercise(
    slug="hessian_vector_product",
    chapter=1,
    title="A Hessian-vector product without the Hessian",
    minutes=15,
    difficulty=3,
    reference=reference.hessian_vector_product,
    observe=_observe_hessian_vector_product,
    misconceptions=(
        Misconception(
            "difference_of_gradients",
            _hvp_by_differences,
            "You compare the gradients at two points near x. That is close where f bends slowly "
            "and off where it bends fast; differentiating the gradient a second time is exact.",
        ),
        Misconception(
            "gradient_times_v",
            _hvp(lambda grad, x, v: grad * v),
            "You multiply the gradient by v element by element. The Hessian is the derivative of "
            "the gradient: the gradient has to be differentiated once more.",
        ),
        Misconception(
            "directional_derivative",
            _hvp(lambda grad, x, v: (grad * v).sum()),
            "You return gradient times v, the slope of f along v: one number. Differentiate that "
            "number with respect to x, and you are there.",
        ),
        Misconception(
            "ignores_v",
            _hvp(lambda grad, x, v: torch.autograd.grad(grad.sum(), x)[0]),
            "You differentiate the sum of the gradient, which is the Hessian times a vector of "
            "ones. v has to weight the gradient's elements before they are differentiated.",
        ),
        Misconception(
            "v_after_second_pass",
            _hvp(lambda grad, x, v: torch.autograd.grad(grad.sum(), x)[0] * v),
            "You multiply by v after the second pass. That weights whole rows of the Hessian that "
            "have been summed already; v belongs into the second pass.",
        ),
        Misconception(
            "only_the_diagonal",
            _hvp(
                lambda grad, x, v: (
                    torch.stack(
                        [
                            torch.autograd.grad(one, x, retain_graph=True)[0].reshape(-1)[i]
                            for i, one in enumerate(grad.reshape(-1))
                        ]
                    ).reshape(x.shape)
                    * v
                )
            ),
            "You use only the second derivative of each element by itself, the Hessian's diagonal. "
            "The elements of x influence one another: the mixed derivatives are missing.",
        ),
        Misconception(
            "outer_product_of_gradients",
            _hvp(lambda grad, x, v: (grad * v).sum() * grad),
            "You multiply v by the outer product of the gradient with itself. That is built from "
            "first derivatives; the Hessian holds second ones.",
        ),
        Misconception(
            "no_create_graph",
            _hvp_without_graph,
            "The second pass finds no graph: the first gradient was computed without recording "
            "how. `torch.autograd.grad` has an argument that makes it record.",
        ),
        Misconception(
            "backward_into_grad",
            _hvp_by_backward,
            "Your second pass is `.backward()`, which writes into `.grad` of x and of everything "
            "else that f uses, on top of what stood there. Ask for the one gradient you want with "
            "`torch.autograd.grad`.",
        ),
        Misconception(
            "switches_on_requires_grad",
            _hvp_on_callers_x,
            "The product is right, but you switched `requires_grad` on in the caller's x, and from "
            "now on everything computed from it records a graph. Work on `x.detach()`.",
        ),
        Misconception(
            "first_gradient",
            _hvp(lambda grad, x, v: grad),
            "You return the gradient of f. It has to be differentiated once more, weighted by v.",
        ),
        Misconception(
            "curvature_along_v",
            _hvp(lambda grad, x, v: (torch.autograd.grad(grad, x, v)[0] * v).sum()),
            "You return v times H v, one number: the curvature along v. The product H v is asked, "
            "of x's shape.",
        ),
        Misconception(
            "gradient_added",
            _hvp_adding_up,
            "Your result is the gradient plus H v: `.grad` still holds the first gradient when the "
            "second `backward` adds to it, and those of the parameters inside f are filled too. "
            "`torch.autograd.grad` returns each by itself.",
        ),
        Misconception(
            "backward_through_parameters",
            _hvp_through_parameters,
            "The product is right, but your second pass is `.backward()`: it also writes into "
            "`.grad` of the parameters that f uses. Ask for the one gradient you want with "
            "`torch.autograd.grad`.",
        ),
        Misconception(
            "x_as_given",
            _hvp_x_as_given,
            "You differentiate with respect to x as it was given. It need not require a gradient; "
            "`x.detach().requires_grad_()` is one that does, and leaves the caller's alone.",
        ),
        Misconception(
            "only_for_vectors",
            _hvp(lambda grad, x, v: torch.autograd.grad(grad @ v, x)[0]),
            "`grad @ v` is a dot product only if both are vectors. x may have any shape: multiply "
            "element by element and sum, or hand v to `torch.autograd.grad` as grad_outputs.",
        ),
        Misconception(
            "builds_the_hessian",
            _hvp_by_full_hessian,
            "The product is right, but you build the whole Hessian for it, one pass for each "
            "element of x. For a million parameters it has 10**12 elements. Two backward passes "
            "give the product without it.",
        ),
        Misconception(
            "hessian_only_for_vectors",
            lambda f, x, v: torch.autograd.functional.hessian(f, x.detach()) @ v,
            "You compute the whole Hessian, which for a million parameters has 10**12 elements, "
            "and multiply it as if x were a vector. Two backward passes give the product for x of "
            "any shape.",
        ),
    ),
    alternatives=(
        _hvp(lambda grad, x, v: torch.autograd.grad((grad * v).sum(), x)[0]),
        _hvp_of_torch,
        _hvp_forward_over_reverse,
    ),
    hints=(
        "H v is the gradient of (gradient · v), with v held constant. That takes two backward "
        "passes and never a matrix.",
        "The first pass has to record what it does, so that it can be differentiated itself: "
        "`create_graph=True`.",
        "x = x.detach().requires_grad_(); grad = torch.autograd.grad(f(x), x, create_graph=True)[0]"
        "; then torch.autograd.grad once more, of grad, with v as grad_outputs.",
    ),
)


# --- clip_grad_norm -----------------------------------------------------------------------------


def _observe_clip_grad_norm(clip_grad_norm, see):
    cases = (
        ("three tensors of shapes (3, 4), (4,), (), above the limit", ((3, 4), (4,), ()), 2.0, 1.0),
        ("tensors of very different size", ((2, 3), (5,)), 1.0, 0.3),
        ("a norm below the limit", ((2, 3), (3,)), 0.1, 2.5),
        ("one tensor of shape (2, 3, 2), just above the limit", ((2, 3, 2),), 1.0, 3.0),
        ("all gradients zero", ((2, 2), (3,)), 0.0, 1.0),
        ("together above the limit, one of them below it", ((2, 3), (5,)), 0.5, 1.5),
        ("together above the limit, each of them below it", ((2, 3), (5,), (3, 2)), 0.2, 5.0),
    )
    for name, shapes, scale, max_norm in cases:
        with see.probe(f"{name}, max_norm = {max_norm}"):
            grads = [scale * 3**i * see.randn(*shape) for i, shape in enumerate(shapes)]
            if len(grads) == 1:
                grads = [grads[0] * 3.3 / grads[0].norm()]
            if name.startswith("together"):  # norms of 0.8, 1.2, … times the limit, or 0.8 each
                share = 0.4 if "one of" in name else 0.0
                norms = [(0.8 + share * i) * max_norm for i in range(len(grads))]
                grads = [g * norm / g.norm() for g, norm in zip(grads, norms, strict=True)]
            before = [grad.clone() for grad in grads]
            result = clip_grad_norm(grads[:], max_norm)
            pair = isinstance(result, (tuple, list)) and len(result) == 2
            see.fact("a pair (clipped, total_norm) is returned", pair)
            see("total_norm", result[1])
            clipped = list(result[0])
            see("the number of clipped tensors", len(clipped))
            for i, grad in enumerate(clipped):
                see(f"clipped[{i}]", grad)
            kept = all(torch.equal(*both) for both in zip(grads, before, strict=True))
            see.fact("the given gradients are left unmodified", kept)
            given = {grad.data_ptr() for grad in grads}
            new = not any(grad.data_ptr() in given for grad in clipped)
            see.fact("the clipped tensors are new ones, also where nothing is clipped", new)


def _norm(grads, order=2.0):
    return torch.stack([grad.norm(order) for grad in grads]).norm(order)


def _clip(
    norm: Callable = _norm,
    factor: Callable = lambda max_norm, norm: (max_norm / (norm + 1e-6)).clamp(max=1.0),
    result: Callable = lambda clipped, norm: (clipped, norm),
) -> Callable:
    """clip_grad_norm with one part replaced."""

    def clip_grad_norm(grads, max_norm):
        total_norm = norm(grads)
        scaled = [grad * factor(max_norm, total_norm) for grad in grads]
        return result(scaled, total_norm)

    return clip_grad_norm


def _clip_each(grads, max_norm):
    factors = [min(1.0, max_norm / (float(grad.norm()) + 1e-6)) for grad in grads]
    return [grad * factor for grad, factor in zip(grads, factors, strict=True)], _norm(grads)


def _clip_in_place(grads, max_norm):
    total_norm = _norm(grads)
    for grad in grads:
        grad.mul_((max_norm / (total_norm + 1e-6)).clamp(max=1.0))
    return grads, total_norm


def _clip_if_needed(grads, max_norm):
    total_norm = _norm(grads)
    if total_norm <= max_norm:
        return grads, total_norm
    return [grad * (max_norm / (total_norm + 1e-6)) for grad in grads], total_norm


def _clip_flat(grads, max_norm):
    """Another way: all elements in one vector."""
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    total_norm = torch.linalg.vector_norm(flat).item()
    if total_norm + 1e-6 > max_norm:
        flat = flat * (max_norm / (total_norm + 1e-6))
    pieces = flat.split([grad.numel() for grad in grads])
    clipped = (piece.reshape(g.shape) for piece, g in zip(pieces, grads, strict=True))
    return tuple(clipped), total_norm


def _clip_with_torch(grads, max_norm):
    holders = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    for holder, grad in zip(holders, grads, strict=True):
        holder.grad = grad.clone()
    total_norm = nn.utils.clip_grad_norm_(holders, max_norm)
    return [holder.grad for holder in holders], total_norm


CLIP_GRAD_NORM = Exercise(
    slug="clip_grad_norm",
    chapter=1,
    title="Clip the norm of all gradients together",
    minutes=10,
    difficulty=2,
    reference=reference.clip_grad_norm,
    observe=_observe_clip_grad_norm,
    misconceptions=(
        Misconception(
            "each_tensor_alone",
            _clip_each,
            "You clip each tensor by its own norm. That changes the ratios between them, and so "
            "the direction of the step; one factor for all keeps the direction.",
        ),
        Misconception(
            "only_tensors_above_the_limit",
            lambda grads, max_norm: (
                [
                    grad * (max_norm / (_norm(grads) + 1e-6))
                    if grad.norm() > max_norm
                    else 1 * grad
                    for grad in grads
                ],
                _norm(grads),
            ),
            "You shorten only those tensors whose own norm is above the limit. The limit is for "
            "all elements together: a gradient may be too long though each of its tensors is "
            "short, and shortening some of them changes the direction of the step.",
        ),
        Misconception(
            "asks_the_largest_tensor",
            lambda grads, max_norm: (
                [
                    grad * (max_norm / (_norm(grads) + 1e-6) if largest > max_norm else 1.0)
                    for largest in [max(grad.norm() for grad in grads)]
                    for grad in grads
                ],
                _norm(grads),
            ),
            "You clip when the largest tensor's norm is above the limit. Many short tensors can be "
            "long together; it is the norm of all of them that has to be compared with max_norm.",
        ),
        Misconception(
            "clips_values",
            lambda grads, max_norm: (
                [grad.clamp(-max_norm, max_norm) for grad in grads],
                _norm(grads),
            ),
            "You clamp each element to [-max_norm, max_norm]. That turns the direction towards the "
            "diagonals and does not bound the norm; all elements have to be scaled by one factor.",
        ),
        Misconception(
            "scales_up_too",
            _clip(factor=lambda max_norm, norm: max_norm / (norm + 1e-6)),
            "You scale gradients up to max_norm as well when their norm is below it. Clipping only "
            "ever shortens: the factor must not exceed 1.",
        ),
        Misconception(
            "square_root_forgotten",
            _clip(norm=lambda grads: sum((grad**2).sum() for grad in grads)),
            "Your norm is the sum of squares: the square root is missing.",
        ),
        Misconception(
            "sum_of_norms",
            _clip(norm=lambda grads: torch.stack([grad.norm() for grad in grads]).sum()),
            "You add the norms of the tensors. The norm of all elements together is the root of "
            "the sum of the squared norms, which is smaller.",
        ),
        Misconception(
            "norms_not_squared",
            _clip(norm=lambda grads: sum(grad.norm() for grad in grads).sqrt()),
            "You take the root of the sum of the tensors' norms. The norms have to be squared "
            "before they are added.",
        ),
        Misconception(
            "length_one",
            _clip(
                factor=lambda max_norm, norm: (
                    1 / (norm + 1e-6) if norm > max_norm else torch.ones_like(norm)
                )
            ),
            "You scale gradients that are too long to length 1. They should get the length "
            "max_norm.",
        ),
        Misconception(
            "clamped_at_the_wrong_end",
            _clip(factor=lambda max_norm, norm: (max_norm / (norm + 1e-6)).clamp(min=1.0)),
            "Your factor is kept from falling below 1, so gradients that are too long stay as they "
            "are and short ones are stretched. It must not rise above 1.",
        ),
        Misconception(
            "largest_norm",
            _clip(norm=lambda grads: torch.stack([grad.norm() for grad in grads]).max()),
            "You take the largest of the tensors' norms. All of them contribute to the norm of all "
            "elements together.",
        ),
        Misconception(
            "largest_element",
            _clip(norm=lambda grads: _norm(grads, torch.inf)),
            "You take the largest absolute element. That is the infinity norm; the 2-norm is the "
            "root of the sum of all squares.",
        ),
        Misconception(
            "sum_of_absolute_values",
            _clip(norm=lambda grads: _norm(grads, 1.0)),
            "You add absolute values. That is the 1-norm; the 2-norm is the root of the sum of all "
            "squares.",
        ),
        Misconception(
            "norm_after_clipping",
            _clip(result=lambda clipped, norm: (clipped, _norm(clipped))),
            "You return the norm after clipping, which is never above max_norm. What one wants to "
            "watch in training is the norm before.",
        ),
        Misconception(
            "no_epsilon",
            _clip(factor=lambda max_norm, norm: (max_norm / norm).clamp(max=1.0)),
            "You divide by the norm alone. The specification divides by total_norm + 1e-6, as "
            "torch does. At norms of order 1 that changes the sixth digit; when all gradients are "
            "zero, it keeps you from dividing by zero.",
        ),
        Misconception(
            "zeroes_large_gradients",
            _clip(factor=lambda max_norm, norm: (norm <= max_norm).double()),
            "When the norm is too large, you set the gradients to zero. Clipping shortens the step "
            "to the limit and keeps its direction.",
        ),
        Misconception(
            "modifies_grads",
            _clip_in_place,
            "You scale the given tensors in place. This version is out of place: the caller's "
            "gradients stay, and new tensors are returned.",
        ),
        Misconception(
            "returns_the_given_tensors",
            _clip_if_needed,
            "All values are right, but where nothing has to be clipped you return the given "
            "tensors themselves. Whoever changes the result in place would then change the "
            "caller's gradients, and only sometimes: return new tensors in every case.",
        ),
        Misconception(
            "returned_in_other_order",
            _clip(result=lambda clipped, norm: (norm, clipped)),
            "You return (total_norm, clipped). The order is (clipped, total_norm).",
        ),
        Misconception(
            "only_the_gradients",
            _clip(result=lambda clipped, norm: clipped),
            "You return the clipped gradients only. Return the pair (clipped, total_norm): the "
            "norm is what tells whether anything was clipped.",
        ),
    ),
    alternatives=(_clip(), _clip_flat, _clip_with_torch),
    hints=(
        "One norm over all elements of all tensors, then one factor for all of them: the direction "
        "of the step stays.",
        "The total norm is the square root of the sum of all squares. The factor is "
        "max_norm / (total_norm + 1e-6), but never above 1.",
        "total_norm = torch.sqrt(sum((g**2).sum() for g in grads)); factor = torch.clamp(…, "
        "max=1.0); return a list of g * factor, and total_norm.",
    ),
)


# --- Checkpoint ---------------------------------------------------------------------------------


def _observe_checkpoint(Checkpoint, see):
    with see.probe("f(x) = tanh(x) * x, x of shape (4, 3)"):
        x = see.randn(4, 3, requires_grad=True)
        out = see.call("the output", Checkpoint.apply, lambda x: torch.tanh(x) * x, x)
        out.backward(see.randn(4, 3))
        see("gradient of x", x.grad)
    with see.probe("f(x, y) = x @ y + x.sum(), shapes (4, 3) and (3, 2), not leaves"):
        x, y = see.randn(4, 3, requires_grad=True), see.randn(3, 2, requires_grad=True)
        out = see.call("the output", Checkpoint.apply, lambda x, y: x @ y + x.sum(), x * 2, y.sin())
        out.backward(see.randn(4, 2))
        see("gradient of x", x.grad)
        see("gradient of y", y.grad)
    with see.probe("a function with parameters: weight (3, 2), bias (2,); two backward passes"):
        weight, bias = see.randn(3, 2, requires_grad=True), see.randn(2, requires_grad=True)
        x = see.randn(5, 3, requires_grad=True)
        for _ in range(2):
            out = Checkpoint.apply(lambda x: torch.tanh(x @ weight + bias), x)
            out.backward(see.randn(5, 2))
        for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
            see(f"gradient of {name}", tensor.grad)
    with see.probe("an input that is an index, and one that needs no gradient"):
        table, index, scale = (
            see.randn(6, 3, requires_grad=True),
            see.randint(0, 6, 4),
            see.randn(3),
        )
        out = see.call(
            "the output", Checkpoint.apply, lambda t, i, s: t[i] ** 2 * s, table, index, scale
        )
        out.backward(see.randn(4, 3))
        see("gradient of the table", table.grad)
    with see.probe("f(x) = dropout(2 * x), x of shape (40, 10)"):
        x, upstream = see.randn(40, 10, requires_grad=True), see.randn(40, 10)
        before = torch.get_rng_state()
        F.dropout(x)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        out = see.call("the output", Checkpoint.apply, lambda x: F.dropout(2 * x), x)
        left = torch.equal(torch.get_rng_state(), after)
        see.fact("the forward pass leaves the random state where the function left it", left)
        torch.rand(7)  # other layers draw numbers, too
        before = torch.get_rng_state()
        out.backward(upstream)
        see.fact("backward drops what forward dropped", torch.equal(x.grad == 0, out == 0))
        see("gradient of x", x.grad)
        same = torch.equal(torch.get_rng_state(), before)
        see.fact("the random state after backward is the one before it", same)
    with see.probe("f(x) = exp(sin(tanh(x))), x of shape (4, 3): what is kept, how often f runs"):
        runs = []

        def function(x):
            runs.append(1)
            return x.tanh().sin().exp()

        x = see.randn(4, 3, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.nbytes) or t, lambda t: t
        ):
            out = Checkpoint.apply(function, x)
        see("the number of bytes kept for backward (x: 96, or fewer)", max(96, sum(kept)))
        see("the number of runs of f in the forward pass", len(runs))
        out.backward(see.randn(4, 3))
        see("the number of runs of f in both passes", len(runs))
        see("gradient of x", x.grad)
    with see.probe("x of shape (3, 2) is doubled in place between forward and backward"):
        _edit_in_place(see, lambda x: Checkpoint.apply(torch.tanh, x), torch.tanh)


def _checkpoint(
    run: Callable = lambda ctx, function, inputs: function(*inputs),
    inputs: Callable = lambda ctx: [
        x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors
    ],
    keep: Callable = lambda ctx, inputs: ctx.save_for_backward(*inputs),
    restore: bool = True,
    put_back: bool = True,
    send: Callable = lambda output, inputs, grad: output.backward(grad),
    returned: Callable = lambda grads: (None, *grads),
) -> type:
    """Checkpoint with one part replaced."""

    def forward(ctx, function, *given):
        ctx.function, ctx.rng_state = function, torch.get_rng_state()
        keep(ctx, given)
        return run(ctx, function, given)

    def backward(ctx, grad_output):
        again = inputs(ctx)
        now = torch.get_rng_state()
        if restore:
            torch.set_rng_state(ctx.rng_state)
        with torch.enable_grad():
            output = ctx.function(*again)
        if put_back:
            torch.set_rng_state(now)
        send(output, again, grad_output)
        return returned([x.grad for x in again])

    return _with(reference.Checkpoint, forward=forward, backward=backward)


def _run_reseeded(ctx, function, inputs):
    torch.manual_seed(0)
    ctx.rng_state = torch.get_rng_state()
    return function(*inputs)


def _run_saving_output(ctx, function, inputs):
    output = function(*inputs)
    ctx.save_for_backward(*inputs, output)
    return output


def _run_and_then_remember(ctx, function, inputs):
    output = function(*inputs)
    ctx.rng_state = torch.get_rng_state()
    return output


def _keep_on_ctx(ctx, inputs):
    ctx.inputs = inputs


def _only_inputs(output, inputs, grad, every=False):
    wanted = [x for x in inputs if x.requires_grad or every]
    for x, found in zip(wanted, torch.autograd.grad(output, wanted, grad), strict=True):
        x.grad = found


class _CheckpointNoGrad(reference.Checkpoint):
    @staticmethod
    def backward(ctx, grad_output):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.random.fork_rng():
            torch.set_rng_state(ctx.rng_state)
            output = ctx.function(*inputs)
        output.backward(grad_output)
        return None, *(x.grad for x in inputs)


class _CheckpointKeepingGraph(Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            ctx.output = function(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        ctx.output.backward(grad_output)
        return None, *(x.grad for x in ctx.inputs)


class _CheckpointForked(Function):
    """Another way: `fork_rng` puts the random state back."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.rng_state = function, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.rng_state)
            inputs = [x.detach() for x in ctx.saved_tensors]
            for x, needs in zip(inputs, ctx.needs_input_grad[1:], strict=True):
                x.requires_grad = needs
            output = ctx.function(*inputs)
        torch.autograd.backward(output, grad_output)
        return (None,) + tuple(x.grad for x in inputs)


class _CheckpointOfTorch(Function):
    """Another way: what `torch.utils.checkpoint(..., use_reentrant=True)` runs."""

    @staticmethod
    def forward(ctx, function, *inputs):
        return CheckpointFunction.forward(ctx, function, True, *inputs)

    @staticmethod
    def backward(ctx, grad_output):
        _, _, *grads = CheckpointFunction.backward(ctx, grad_output)
        return None, *grads


class _CheckpointBySum(reference.Checkpoint):
    """Another way: the upstream gradient becomes weights of a sum."""

    @staticmethod
    def backward(ctx, grad_output):
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.rng_state)
        inputs = []
        with torch.enable_grad():
            for x, needs in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True):
                inputs.append(x.detach().clone().requires_grad_(needs))
            (ctx.function(*inputs) * grad_output).sum().backward()
        torch.set_rng_state(now)
        return None, *(x.grad for x in inputs)


CHECKPOINT = Exercise(
    slug="checkpoint",
    chapter=1,
    title="Activation checkpointing: compute twice, keep nothing",
    minutes=30,
    difficulty=4,
    reference=reference.Checkpoint,
    observe=_observe_checkpoint,
    misconceptions=(
        Misconception(  # museum 1.22
            "mask_redrawn",
            _checkpoint(restore=False, put_back=False),
            "Backward runs the function under another random state than forward did: dropout drops "
            "other elements, and the gradient belongs to another output. Remember the state before "
            "the function runs, and set it before running it again.",
        ),
        Misconception(  # museum 1.22
            "mask_redrawn_and_state_put_back",
            _checkpoint(restore=False),
            "You put the random state back after the second run, but the second run itself starts "
            "from another state than forward did: dropout drops other elements, and the gradient "
            "belongs to another output. Set the state that you noted in forward before it.",
        ),
        Misconception(
            "random_state_not_put_back",
            _checkpoint(put_back=False),
            "Backward leaves the random state as it was during or right after the forward pass, "
            "and not as it found it. From then on the program draws numbers that it has drawn "
            "already, so the next batch gets the same dropout mask. Note the state at the start of "
            "backward, and put that one back.",
        ),
        Misconception(
            "state_remembered_too_late",
            _checkpoint(run=_run_and_then_remember),
            "You remember the random state after the function has run, when it has already drawn "
            "its numbers. The second run then draws others.",
        ),
        Misconception(
            "seed_fixed",
            _checkpoint(run=_run_reseeded),
            "You set a fixed seed before the function runs. Both runs agree, but every call draws "
            "the same mask, and the rest of the program gets the same numbers again and again.",
        ),
        Misconception(
            "graph_kept",
            _CheckpointKeepingGraph,
            "Values and gradients are right, but you run the function with recording on and keep "
            "its output: the graph with all intermediate results stays in memory, which is what a "
            "checkpoint avoids. Keep the inputs only, and run the function again in backward.",
        ),
        Misconception(
            "no_enable_grad",
            _CheckpointNoGrad,
            "You go back from a tensor that was computed without recording. Inside backward "
            "autograd does not record, so nothing is known of how it came about: switch recording "
            "on around the second run.",
        ),
        Misconception(
            "parameters_forgotten",
            _checkpoint(send=_only_inputs),
            "The inputs get their gradients, the parameters inside the function get none, and "
            "they would never learn. `torch.autograd.grad` serves only the tensors it is "
            "given; `backward` on the recomputed output reaches all leaves.",
        ),
        Misconception(
            "no_gradient_given",
            _checkpoint(send=lambda output, inputs, grad: output.backward()),
            "You call `backward` on the recomputed output without a gradient. That works for a "
            "single number only: hand it `grad_output`, the gradient that has arrived.",
        ),
        Misconception(
            "nothing_returned",
            _checkpoint(returned=lambda grads: None),
            "Your backward returns nothing. It has to return one gradient for each argument of "
            "forward after ctx: None for the function, then those of the inputs.",
        ),
        Misconception(
            "output_saved",
            _checkpoint(
                keep=lambda ctx, inputs: None,
                run=_run_saving_output,
                inputs=lambda ctx: [
                    x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors[:-1]
                ],
            ),
            "All gradients are right, but you save the output too, which backward does not need: "
            "it is computed again anyway.",
        ),
        Misconception(
            "parameters_forgotten_all_inputs",
            _checkpoint(send=lambda *given: _only_inputs(*given, every=True)),
            "The inputs get their gradients, the parameters inside the function get none, and "
            "they would never learn; and inputs that need no gradient are refused. `backward` on "
            "the recomputed output reaches all leaves that need one, and no others.",
        ),
        Misconception(
            "all_inputs_require_grad",
            _checkpoint(
                inputs=lambda ctx: [x.detach().requires_grad_() for x in ctx.saved_tensors]
            ),
            "You let every input require a gradient. Indices and other whole numbers cannot, and "
            "for the rest it costs work that nobody asked for: let each require what it did.",
        ),
        Misconception(
            "no_input_requires_grad",
            _checkpoint(inputs=lambda ctx: [x.detach() for x in ctx.saved_tensors]),
            "You detach the inputs and leave it at that: a detached tensor requires no gradient, "
            "so none reaches it. Let it require one where the original did.",
        ),
        Misconception(
            "needs_input_grad_of_the_function",
            _checkpoint(
                inputs=lambda ctx: [
                    x.detach().requires_grad_(needs)
                    for x, needs in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
                ]
            ),
            "You pair the inputs with the entries of `ctx.needs_input_grad` from its beginning. "
            "Its first entry belongs to `function`, the first argument of forward after ctx: the "
            "inputs' entries start at the second.",
        ),
        Misconception(
            "inputs_not_detached",
            _checkpoint(inputs=lambda ctx: list(ctx.saved_tensors)),
            "You run the function again on the saved inputs themselves, which still belong to the "
            "outer graph. The inner backward pass goes on into that graph, on top of what you "
            "return. Detach the inputs first, and let them require gradients as before.",
        ),
        Misconception(  # museum 1.1
            "ignores_upstream",
            _checkpoint(send=lambda output, inputs, grad: output.backward(torch.ones_like(output))),
            "You go back from the sum of the recomputed output, with ones. The gradient that "
            "arrives, `grad_output`, has to be where the inner backward pass starts.",
        ),
        Misconception(  # museum 1.14
            "inputs_on_ctx",
            _checkpoint(
                keep=_keep_on_ctx,
                inputs=lambda ctx: [x.detach().requires_grad_(x.requires_grad) for x in ctx.inputs],
            ),
            "You keep the inputs as an attribute of ctx. When one of them is edited in place "
            "before backward, the second run silently works on other values. "
            "`ctx.save_for_backward` notices.",
        ),
        Misconception(
            "no_entry_for_function",
            _checkpoint(returned=tuple),
            "Backward returns one gradient for each argument of forward after ctx, and the first "
            "argument is the function: it gets None.",
        ),
        Misconception(  # museum 1.5
            "only_first_input",
            _checkpoint(returned=lambda grads: (None, grads[0]) + (None,) * (len(grads) - 1)),
            "Only the first input gets its gradient; for the others you return None.",
        ),
    ),
    alternatives=(_CheckpointForked, _CheckpointOfTorch, _CheckpointBySum),
    hints=(
        "Forward keeps the function, the inputs and the state of the random number generator "
        "(`torch.get_rng_state()`). Backward uses them to run the function once more.",
        "In backward: detach the inputs and let them require gradients as they did; set the random "
        "state; run the function under `torch.enable_grad()`; put the random state back.",
        "output.backward(grad_output) fills x.grad of the detached inputs and of all parameters. "
        "Return None for the function, then x.grad for each input.",
    ),
)


# --- find the bug: a bias that never learns -----------------------------------------------------


class CopiedAddBias(torch.autograd.Function):
    """x + bias for x (batch, features) and bias (features,)."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(bias)
        return x + bias

    @staticmethod
    def backward(ctx, grad_output):
        (bias,) = ctx.saved_tensors
        grad_x = grad_output.clone()
        grad_bias = torch.zeros_like(bias)
        return grad_x, grad_bias


def _observe_copied_add_bias(CopiedAddBias, see):
    for shape in ((5, 3), (4, 4), (2, 6)):
        with see.probe(f"x of shape {shape}, bias of shape {shape[1:]}"):
            x, bias = see.randn(*shape, requires_grad=True), see.randn(shape[1], requires_grad=True)
            out = see.call("the output", CopiedAddBias.apply, x, bias)
            see.gradients("both need one", out, x=x, bias=bias)
    with see.probe("bias of shape (3,) alone needs a gradient, x of shape (5, 3)"):
        x, bias = see.randn(5, 3), see.randn(3, requires_grad=True)
        out = see.call("the output", CopiedAddBias.apply, x, bias)
        see.gradients("only bias needs one", out, bias=bias)


def _copied(grad_bias: Callable, grad_x: Callable = lambda grad: grad) -> type:
    """CopiedAddBias with other gradients."""

    def backward(ctx, grad_output):
        return grad_x(grad_output), grad_bias(grad_output, *ctx.saved_tensors)

    return _with(reference.CopiedAddBias, backward=backward)


FIX_ZERO_BIAS_GRADIENT = Exercise(
    slug="fix_zero_bias_gradient",
    chapter=1,
    title="Find the bug: the bias that never learns",
    minutes=10,
    difficulty=2,
    reference=reference.CopiedAddBias,
    observe=_observe_copied_add_bias,
    misconceptions=(
        Misconception(  # museum F1
            "still_zero",
            _copied(lambda grad, bias: grad.new_zeros(grad.shape[1])),
            "The gradient of bias is still zero for every upstream gradient. Each element of bias "
            "is added once in every row; what does that make of the rows' gradients?",
        ),
        Misconception(  # museum 1.5
            "none_for_bias",
            _copied(lambda grad, bias: None),
            "You return None for bias. It says that bias has no gradient, so it still never "
            "learns.",
        ),
        Misconception(  # museum 1.1
            "ones_for_bias",
            _copied(lambda grad, bias: torch.ones_like(bias)),
            "You return ones for bias whatever arrives from above. The local derivative is 1 in "
            "each row, and `grad_output` has to be multiplied by it and added up over the rows.",
        ),
        Misconception(  # museum 1.1
            "counts_rows",
            _copied(lambda grad, bias: torch.full_like(bias, len(grad))),
            "You return the number of rows. That is the gradient of the output's sum, where every "
            "upstream gradient is 1; in general the rows of `grad_output` are added up.",
        ),
        Misconception(  # museum 1.2
            "mean_over_rows",
            _copied(lambda grad, bias: grad.mean(0)),
            "You average the rows' gradients. Bias is used in every row, and its gradient is their "
            "sum; yours is too small by the number of rows.",
        ),
        Misconception(  # museum 1.4
            "sums_over_features",
            _copied(lambda grad, bias: grad.sum(1)),
            "You sum over axis 1, the features. Bias has one element for each feature: that axis "
            "stays, the batch axis is summed.",
        ),
        Misconception(
            "sums_everything",
            _copied(lambda grad, bias: grad.sum() * torch.ones_like(bias)),
            "You give every element of bias the sum over all of `grad_output`. Each feature has "
            "its own sum, over the batch axis only.",
        ),
        Misconception(
            "one_number",
            _copied(lambda grad, bias: grad.sum()),
            "You sum over all of `grad_output` and get one number. Bias has an element for each "
            "feature, and each needs its own sum, over the batch axis only.",
        ),
        Misconception(
            "first_row",
            _copied(lambda grad, bias: grad[0]),
            "You take the first row of `grad_output`. That has the right shape, but the other rows "
            "use the bias as well.",
        ),
        Misconception(
            "times_bias",
            _copied(lambda grad, bias: (grad * bias).sum(0)),
            "You multiply by the value of bias, as if it were a factor. The derivative of a sum "
            "with respect to a summand is 1.",
        ),
        Misconception(  # museum 1.6
            "gradients_swapped",
            _with(reference.CopiedAddBias, backward=lambda ctx, grad: (grad.sum(0), grad)),
            "The two gradients come back in the wrong order: first that of x, then that of bias.",
        ),
    ),
    alternatives=(
        reference.AddBias,
        _AddBiasUnreduced,
        _copied(lambda grad, bias: torch.ones(len(grad), dtype=grad.dtype) @ grad),
        _copied(lambda grad, bias: sum(grad.unbind())),
    ),
    hints=(
        "Call backward with a random upstream gradient and compare each of the two results with a "
        "numerical gradient. Which one does not depend on the upstream gradient?",
        "The gradient of bias may not be a constant. Every row of the output contains bias once.",
        "Add up the rows: grad_output.sum(dim=0).",
    ),
    shipped=CopiedAddBias,
    symptom="A single bias, 0 at the start, is to learn the offset of the numbers 1, 1.5, 2, 2.5. "
    "The mean squared error is 3.375 at the start and still 3.375 after 100 steps; bias.grad is "
    "exactly 0 all the time.",
)


# --- find the bug: a bias that is not a parameter -----------------------------------------------


class ShiftedLinear(nn.Module):
    """x W^T + shift for x (batch, in_features); the shift (out_features,) starts at 1, is learned.

    The result has shape (batch, out_features).
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.out_features = out_features

    def forward(self, x):
        shift = torch.ones(self.out_features)
        return self.linear(x) + shift


def _sizes(tensors) -> str:
    """The numbers of elements, sorted: (n,) and (1, n) are the same bias."""
    return ", ".join(str(size) for size in sorted(tensor.numel() for tensor in tensors))


def _leaves(output: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that require a gradient in the graph of `output`."""
    found, seen, todo = [], set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return found


def _observe_shifted_linear(ShiftedLinear, see):
    for inputs, outputs in ((3, 2), (4, 5)):
        sizes = f"in_features = {inputs}, out_features = {outputs}"
        with see.probe(f"{sizes}: what is learned"):
            layer = ShiftedLinear(inputs, outputs)
            see("the sizes of all parameters", _sizes(layer.parameters()))
            trainable = all(parameter.requires_grad for parameter in layer.parameters())
            see.fact("all parameters require a gradient", trainable)
        with see.probe(f"{sizes}: what the output depends on"):
            layer = ShiftedLinear(inputs, outputs)
            x = see.randn(6, inputs, dtype=torch.float32)
            leaves, again = _leaves(layer(x)), _leaves(layer(x))
            see("the sizes of all leaves that the output depends on", _sizes(leaves))
            same = {id(leaf) for leaf in leaves} == {id(leaf) for leaf in again}
            see.fact("a second call depends on the same leaves", same)
        with see.probe(f"{sizes}: what is learned, after a forward"):
            layer = ShiftedLinear(inputs, outputs)
            layer(see.randn(6, inputs, dtype=torch.float32))
            see("the sizes of all parameters", _sizes(layer.parameters()))
        with see.probe(f"{sizes}: what is stored"):
            state = ShiftedLinear(inputs, outputs).state_dict()
            see("the sizes of all tensors in state_dict()", _sizes(state.values()))
        with see.probe(f"{sizes}: the shift at the start"):
            layer = ShiftedLinear(inputs, outputs)
            zeros = torch.zeros(1, inputs)
            see("the output for an input of zeros", layer(zeros).detach())
        with see.probe(f"{sizes}: values and gradients"):
            layer = ShiftedLinear(inputs, outputs).double()
            learned = sorted(layer.parameters(), key=lambda parameter: -parameter.numel())
            for parameter in learned:
                parameter.detach().copy_(see.randn(parameter.numel()).view_as(parameter))
            x, upstream = see.randn(6, inputs, requires_grad=True), see.randn(6, outputs)
            out = see.call("the output", layer, x)
            out.backward(upstream)
            see("gradient of x", x.grad)
            for name, parameter in zip(("the weight", "the shift"), learned, strict=False):
                grad = parameter.grad
                see(f"gradient of {name}", grad if grad is None else grad.reshape(-1))


class _ShiftedWith(nn.Module):
    """ShiftedLinear with one part replaced."""

    def __init__(self, in_features, out_features, make, add):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        make(self, out_features)
        self.add = add

    def forward(self, x):
        return self.add(self, self.linear(x))


def _shifted(
    make: Callable = lambda layer, size: setattr(layer, "shift", nn.Parameter(torch.ones(size))),
    add: Callable = lambda layer, hidden: hidden + layer.shift,
) -> Callable:
    return lambda in_features, out_features: _ShiftedWith(in_features, out_features, make, add)


def _make_in_forward(layer, hidden):
    layer.shift = nn.Parameter(torch.ones(hidden.shape[-1], dtype=hidden.dtype))
    return hidden + layer.shift


def _local_parameter(layer, hidden):
    return hidden + nn.Parameter(torch.ones(hidden.shape[-1], dtype=hidden.dtype))


class _ShiftedByLinear(nn.Module):
    """Another way: the bias of nn.Linear is the shift."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        nn.init.ones_(self.linear.bias)

    def forward(self, x):
        return self.linear(x)


class _ShiftedByFunction(nn.Module):
    """Another way: registered by name, added by the chapter's own Function."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.register_parameter("bias", nn.Parameter(torch.ones(out_features)))

    def forward(self, x):
        return reference.AddBias.apply(x @ self.weight.T, self.bias)


class _LinearWithItsBias(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.add_shift(out_features)

    def add_shift(self, out_features):
        self.shift = nn.Parameter(torch.ones(out_features))

    def forward(self, x):
        return self.linear(x) + self.shift


class _LinearWithItsBiasOnly(_LinearWithItsBias):
    def add_shift(self, out_features):
        self.shift = 0.0


class _LinearsOwnBias(_LinearWithItsBias):
    def add_shift(self, out_features):
        self.shift = torch.ones(out_features)


def _two_biases(in_features, out_features):
    layer = _ShiftedByLinear(in_features, out_features)
    nn.init.zeros_(layer.linear.bias)
    layer.shift = nn.Parameter(torch.ones(out_features))
    layer.forward = lambda x: layer.linear(x) + layer.shift
    return layer


FIX_UNREGISTERED_BIAS = Exercise(
    slug="fix_unregistered_bias",
    chapter=1,
    title="Find the bug: the optimizer has never heard of it",
    minutes=10,
    difficulty=2,
    reference=reference.ShiftedLinear,
    observe=_observe_shifted_linear,
    misconceptions=(
        Misconception(  # museum F2
            "constant",
            _shifted(
                make=lambda layer, size: None,
                add=lambda layer, hidden: hidden + hidden.new_ones(hidden.shape[-1]),
            ),
            "The shift is still a plain tensor of ones that nothing learns: it is not among "
            "`parameters()`, so no optimizer moves it and no file stores it.",
        ),
        Misconception(  # museum F2
            "plain_tensor_that_requires_grad",
            _shifted(
                make=lambda layer, size: setattr(
                    layer, "shift", torch.ones(size, requires_grad=True)
                )
            ),
            "The shift requires a gradient and gets one, but nn.Module does not know of it: an "
            "attribute is registered only if it is an nn.Parameter itself. A plain tensor, also a "
            "Parameter inside a list, is missing from `parameters()`, and no optimizer moves it.",
        ),
        Misconception(
            "buffer",
            _shifted(make=lambda layer, size: layer.register_buffer("shift", torch.ones(size))),
            "You registered the shift as a buffer. It is stored and moved to other devices, but "
            "buffers are not among `parameters()` and get no gradient: nothing learns it.",
        ),
        Misconception(
            "made_in_forward",
            _shifted(make=lambda layer, size: None, add=_make_in_forward),
            "You make the parameter in forward. An optimizer built before the first forward does "
            "not know it, and every forward starts again from ones: what was learned is lost. Make "
            "it once, when the layer is made.",
        ),
        Misconception(
            "local_to_forward",
            _shifted(make=lambda layer, size: None, add=_local_parameter),
            "You make the parameter in forward: it is gone when forward returns, and the next call "
            "starts again from ones. nn.Module registers what is assigned to an attribute, and "
            "what is learned has to be made once, in __init__.",
        ),
        Misconception(
            "frozen",
            _shifted(
                make=lambda layer, size: setattr(
                    layer, "shift", nn.Parameter(torch.ones(size), requires_grad=False)
                )
            ),
            "The shift is registered, but with requires_grad=False: it gets no gradient and stays "
            "at ones.",
        ),
        Misconception(  # museum 1.21
            "detached",
            _shifted(add=lambda layer, hidden: hidden + layer.shift.detach()),
            "The shift is a parameter, but forward adds a detached copy (`.detach()`, `.data`): no "
            "gradient finds its way back to it.",
        ),
        Misconception(
            "never_added",
            _shifted(add=lambda layer, hidden: hidden + 1.0),
            "The shift is a parameter now, but forward adds ones instead of using it.",
        ),
        Misconception(
            "starts_at_zero",
            _shifted(
                make=lambda layer, size: setattr(layer, "shift", nn.Parameter(torch.zeros(size)))
            ),
            "The shift is learned now, but it starts at 0. It should start at 1, as in the layer "
            "that you are mending.",
        ),
        Misconception(
            "starts_at_random",
            _LinearWithItsBiasOnly,
            "The bias of nn.Linear can be the shift, but nn.Linear starts it at random numbers. "
            "It should start at 1, as in the layer that you are mending.",
        ),
        Misconception(
            "one_number_for_all",
            _shifted(make=lambda layer, size: setattr(layer, "shift", nn.Parameter(torch.ones(1)))),
            "Your shift is a single number for all outputs. It should have the shape "
            "(out_features,): one for each output.",
        ),
        Misconception(
            "two_biases",
            _two_biases,
            "Your layer learns two biases, that of nn.Linear and the shift, which do the same. "
            "Both follow the same gradient, so together they move twice as fast as one. Keep one.",
        ),
        Misconception(
            "two_biases_one_random",
            _LinearWithItsBias,
            "Your layer learns two biases, that of nn.Linear and the shift. They do the same, and "
            "since nn.Linear starts its own at random numbers, the sum does not start at 1. Keep "
            "one.",
        ),
        Misconception(
            "linears_own_bias",
            _LinearsOwnBias,
            "You let nn.Linear learn a bias and go on adding ones that nothing learns. Together "
            "they can be any offset, but they do not start at 1, since nn.Linear starts its bias "
            "at random numbers. Learn one shift, and let it start at 1.",
        ),
    ),
    alternatives=(_ShiftedByLinear, _ShiftedByFunction, _shifted()),
    hints=(
        "Print `dict(layer.named_parameters())`. What does the optimizer get to see?",
        "What is made in forward is new on every call. A tensor that shall be learned is made "
        "once, in __init__, and wrapped so that nn.Module registers it.",
        "self.shift = nn.Parameter(torch.ones(out_features)) in __init__; forward adds self.shift.",
    ),
    rtol=1e-6,  # the output at the start is float32
    atol=1e-6,
    shipped=ShiftedLinear,
    symptom="The data have an offset of 4. After 500 steps the weights are right, and the mean "
    "squared error stands at 9.0, which is (4 - 1)**2, for ever.",
)


# --- find the bug: memory that grows with every step --------------------------------------------


def mean_loss(model, batches, loss_function):
    """The mean over batches of loss_function(model(x), y), as a float to print.

    Args:
        batches: a list of pairs (x, y).
    """
    total = 0.0
    for x, y in batches:
        loss = loss_function(model(x), y)
        total += loss
    return total / len(batches)


class _Kept:
    """Stands for a tensor that a graph keeps; gone when the graph is."""

    def __init__(self, tensor: torch.Tensor, batch: int) -> None:
        self.tensor, self.batch = tensor, batch


def _observe_mean_loss(mean_loss, see):
    for count in (4, 7):
        with see.probe(f"{count} batches of 5 samples, 3 features"), torch.enable_grad():
            linear = nn.Linear(3, 2).double()
            batches = [(see.randn(5, 3), see.randn(5, 2)) for _ in range(count)]
            see.call("the mean", mean_loss, linear, batches, F.mse_loss)
            see.fact("gradients of parameters stay None", linear.weight.grad is None)
            see.fact("autograd records afterwards as it did before", torch.is_grad_enabled())
    name = "6 batches of 5 samples, 3 features: which graphs are kept"
    with see.probe(name), torch.enable_grad():
        linear = nn.Linear(3, 2).double()
        batches = [(see.randn(5, 3), see.randn(5, 2)) for _ in range(6)]
        kept, at_once = WeakSet(), [0]

        def count(linear, inputs):
            at_once.append(len({tensor.batch for tensor in kept}))

        def keep(tensor):
            kept.add(box := _Kept(tensor.detach(), len(at_once)))
            return box

        linear.register_forward_pre_hook(count)
        linear.weight.grad = torch.ones_like(linear.weight)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
            result = mean_loss(linear, batches, F.mse_loss)
        label = "the largest number of earlier batches whose graph is kept (1 or fewer)"
        see(label, max(1, *at_once))
        see(
            "the number of graphs kept after the function has returned",
            len({t.batch for t in kept}),
        )
        see("the mean", result)
        grad = linear.weight.grad
        kept_grad = grad is not None and bool((grad == 1).all())
        see.fact("gradients that parameters had before are left as they were", kept_grad)


def _mean_loss(add: Callable, result: Callable = lambda total, count: total / count) -> Callable:
    """mean_loss with total = add(total, loss) and result(total, number of batches)."""

    def mean_loss(model, batches, loss_function):
        total = 0.0
        for x, y in batches:
            total = add(total, loss_function(model(x), y))
        return result(total, len(batches))

    return mean_loss


def _stacked_losses(model, batches, loss_function):
    return torch.stack([loss_function(model(x), y) for x, y in batches]).mean().item()


def _without_recording(model, batches, loss_function):
    """Another way: nothing is recorded in the first place."""
    with torch.no_grad():
        return _stacked_losses(model, batches, loss_function)


def _one_by_one(model, batches, loss_function):
    return sum(float(loss_function(model(x), y)) for x, y in batches) / len(batches)


def _recording_left_off(model, batches, loss_function):
    torch.set_grad_enabled(False)
    return _one_by_one(model, batches, loss_function)


def _first_batch_divided(model, batches, loss_function):
    (x, y), *_ = batches
    return loss_function(model(x), y).item() / len(batches)


def _backward_and_zero_grad(model, batches, loss_function):
    total = 0.0
    for x, y in batches:
        loss = loss_function(model(x), y)
        loss.backward()
        total += loss.item()
        model.zero_grad()
    return total / len(batches)


def _backward_and_add(total, loss):
    loss.backward()
    return total + loss.item()


FIX_GROWING_GRAPH = Exercise(
    slug="fix_growing_graph",
    chapter=1,
    title="Find the bug: memory that grows with every batch",
    minutes=10,
    difficulty=2,
    reference=reference.mean_loss,
    observe=_observe_mean_loss,
    misconceptions=(
        Misconception(  # museum 1.24
            "adds_tensors",
            _mean_loss(lambda total, loss: total + loss),
            "You still add up loss tensors. Each brings its whole graph along, so every batch's "
            "intermediate results stay in memory as long as the total does.",
        ),
        Misconception(  # museum 1.24
            "converts_at_the_end",
            _stacked_losses,
            "Your result is a plain number, but it becomes one only at the end (`.item()`, "
            "`float` or `.detach()` on the total or on a list of losses). Until then every batch's "
            "graph is in memory. Turn each loss into a number as soon as you have it.",
        ),
        Misconception(  # museum 1.20
            "frees_by_backward",
            _mean_loss(_backward_and_add),
            "You run backward on every loss. That frees its graph, but it also fills `.grad` of "
            "the parameters, and the next training step would use those gradients. For a "
            "number to print, no backward pass is needed.",
        ),
        Misconception(
            "backward_and_zero_grad",
            _backward_and_zero_grad,
            "You run backward on every loss and clear the gradients again. That frees the graph, "
            "but it doubles the work, and gradients that were there before are lost. For a "
            "number to print, no backward pass is needed.",
        ),
        Misconception(
            "recording_left_off",
            _recording_left_off,
            "The number is right, but you switch recording off (`torch.set_grad_enabled(False)`) "
            "and leave it off: the program's next training step finds no graph. `with "
            "torch.no_grad():` switches it on again at its end.",
        ),
        Misconception(
            "returns_in_the_loop",
            _first_batch_divided,
            "You return after the first batch: the `return` stands inside the loop.",
        ),
        Misconception(
            "sum_not_mean",
            _mean_loss(lambda total, loss: total + loss.item(), lambda total, count: total),
            "You return the sum of the batches' losses. It grows with the number of batches; "
            "divide by it.",
        ),
        Misconception(
            "last_batch_only",
            _mean_loss(lambda total, loss: loss.item(), lambda total, count: total),
            "You return the loss of the last batch: the total is overwritten instead of added to.",
        ),
        Misconception(
            "overwrites_total",
            _mean_loss(lambda total, loss: loss.item()),
            "You overwrite the total in every round, and then divide the last loss by the number "
            "of batches. Add the losses up.",
        ),
        Misconception(
            "running_average_of_two",
            _mean_loss(lambda total, loss: (total + loss.item()) / 2, lambda total, count: total),
            "You average the total so far with the new loss in every round. That weights the last "
            "batch with one half and the first with hardly anything.",
        ),
        Misconception(
            "rounded",
            _mean_loss(lambda total, loss: total + int(loss)),
            "You turn each loss into a whole number (`int`), and lose its decimals.",
        ),
    ),
    alternatives=(
        _without_recording,
        _one_by_one,
        _mean_loss(lambda total, loss: total + loss.detach()),
    ),
    hints=(
        "How many batches' graphs are reachable from `total` after three rounds? Look at "
        "`total.grad_fn` and its `next_functions`.",
        "A sum of tensors remembers its summands. What you print is a number and needs no graph.",
        "`loss.item()` gives the number; add that.",
    ),
    rtol=1e-6,
    shipped=mean_loss,
    symptom="The mean over 1 batch has a graph of 7 nodes behind it, that over 10 batches 43, and "
    "that over 100 batches 403: memory grows with every batch.",
)


# --- find the bug: a gradient that two branches share -------------------------------------------


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
        grad_output *= ctx.scale * (1 - torch.tanh(x) ** 2)
        return grad_output, None


def _observe_scaled_tanh(ScaledTanh, see):
    for shape, scale in (((4, 3), 2.0), ((2, 5, 3), -0.7)):
        with see.probe(f"x of shape {shape}, scale = {scale}"):
            x = see.randn(*shape, requires_grad=True)
            out = see.call("the output", ScaledTanh.apply, x, scale)
            before = x.detach().clone()
            see.gradients("one branch", out, x=x)
            see.fact("backward leaves x as it was", torch.equal(x, before))
    with see.probe("a residual branch, h + ScaledTanh(h), h = 3 x of shape (4, 3)"):
        x = see.randn(4, 3, requires_grad=True)
        h = 3 * x
        see.gradients("two branches", h + ScaledTanh.apply(h, 0.5), x=x)
    with see.probe("a + ScaledTanh(b), a and b of shape (4, 3), added to a.grad and b.grad twice"):
        a, b = see.randn(4, 3, requires_grad=True), see.randn(4, 3, requires_grad=True)
        for _ in range(2):
            (a + ScaledTanh.apply(b, 1.5)).backward(see.randn(4, 3))
        see("gradient of a", a.grad)
        see("gradient of b", b.grad)


def _scaled_tanh(grad_x: Callable) -> type:
    """ScaledTanh with gradient grad_x(grad_output, x, scale)."""

    def backward(ctx, grad_output):
        return grad_x(grad_output, ctx.saved_tensors[0], ctx.scale), None

    return _with(reference.ScaledTanh, backward=backward)


def _tanh_in_place(grad, x, scale):
    return grad * scale * (1 - x.detach().tanh_() ** 2)


def _clone_first(grad, x, scale):
    grad = grad.clone()
    grad *= scale * (1 - torch.tanh(x) ** 2)
    return grad


class _ScaledTanhSavingTanh(Function):
    """Another way: the output's tanh is saved, as torch.tanh does."""

    @staticmethod
    def forward(ctx, x, scale):
        tanh = torch.tanh(x)
        ctx.save_for_backward(tanh)
        ctx.scale = scale
        return scale * tanh

    @staticmethod
    def backward(ctx, grad_output):
        (tanh,) = ctx.saved_tensors
        return torch.mul(grad_output, ctx.scale * (1 - tanh * tanh)), None


FIX_SHARED_UPSTREAM_GRADIENT = Exercise(
    slug="fix_shared_upstream_gradient",
    chapter=1,
    title="Find the bug: the gradient that spoils its neighbour",
    minutes=10,
    difficulty=3,
    reference=reference.ScaledTanh,
    observe=_observe_scaled_tanh,
    misconceptions=(
        Misconception(  # museum 1.15
            "still_in_place",
            _scaled_tanh(lambda grad, x, scale: grad.mul_(scale * (1 - torch.tanh(x) ** 2))),
            "Backward still changes `grad_output` in place. In h + ScaledTanh(h) both branches are "
            "handed the same tensor, so the other branch passes on your product instead of its own "
            "gradient. Make a new tensor.",
        ),
        Misconception(
            "edits_the_saved_input",
            _scaled_tanh(_tanh_in_place),
            "You no longer touch `grad_output`, but now you apply tanh in place to the saved x, "
            "which is the caller's tensor: x is different after backward. A detached tensor shares "
            "its memory with the original.",
        ),
        Misconception(  # museum 1.1
            "ignores_upstream",
            _scaled_tanh(lambda grad, x, scale: scale * (1 - torch.tanh(x) ** 2)),
            "You leave `grad_output` alone by leaving it out. The local derivative has to be "
            "multiplied by it, in a new tensor.",
        ),
        Misconception(
            "only_the_upstream",
            _scaled_tanh(lambda grad, x, scale: grad.clone()),
            "You return a copy of `grad_output` without the local derivative "
            "scale * (1 - tanh(x)**2). Removing the line that multiplied removed the product too.",
        ),
        Misconception(
            "scale_lost",
            _scaled_tanh(lambda grad, x, scale: grad * (1 - torch.tanh(x) ** 2)),
            "The factor `scale` got lost on the way: the output is scale * tanh(x), and its "
            "derivative has the same factor.",
        ),
        Misconception(  # museum 1.8
            "derivative_from_input",
            _scaled_tanh(lambda grad, x, scale: grad * scale * (1 - x**2)),
            "You compute 1 - x**2 with the input. The derivative of tanh is 1 - tanh(x)**2, in "
            "terms of its output.",
        ),
        Misconception(
            "derivative_not_squared",
            _scaled_tanh(lambda grad, x, scale: grad * scale * (1 - torch.tanh(x))),
            "You compute 1 - tanh(x); the derivative of tanh is 1 - tanh(x)**2.",
        ),
        Misconception(
            "one_gradient",
            _with(
                reference.ScaledTanh,
                backward=lambda ctx, grad: (
                    grad * ctx.scale * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)
                ),
            ),
            "Backward now returns one gradient (a list counts as one: return a tuple). It has to "
            "return one for each argument of forward after ctx: None for `scale`, as before.",
        ),
        Misconception(
            "gradient_for_scale",
            _with(
                reference.ScaledTanh,
                backward=lambda ctx, grad: (
                    grad * ctx.scale * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2),
                    (grad * torch.tanh(ctx.saved_tensors[0])).sum(),
                ),
            ),
            "You return a gradient for `scale`. It is a plain number and cannot have one: return "
            "None for it.",
        ),
    ),
    alternatives=(_scaled_tanh(_clone_first), _ScaledTanhSavingTanh),
    hints=(
        "Alone, the Function's gradient is right. Use its input in a second place, and look at "
        "what the other place receives.",
        "An addition hands the very same gradient tensor to both of its inputs. Who may write to "
        "it?",
        "`a *= b` changes the tensor a; `a = a * b` makes a new one.",
    ),
    shipped=ScaledTanh,
    symptom="Alone, the Function's gradient is right. In a residual branch, h + ScaledTanh(h) at "
    "h = 2 with scale = 0.5, the gradient is 0.0707 and should be 1.0353.",
)


EXERCISES = (
    NUMERICAL_GRADIENT,
    BACKWARD,
    UNBROADCAST,
    ADD_BIAS,
    SWISH,
    ROUND_STE,
    HESSIAN_VECTOR_PRODUCT,
    CLIP_GRAD_NORM,
    CHECKPOINT,
    FIX_ZERO_BIAS_GRADIENT,
    FIX_UNREGISTERED_BIAS,
    FIX_GROWING_GRAPH,
    FIX_SHARED_UPSTREAM_GRADIENT,
)
