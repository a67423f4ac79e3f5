"""Proving that two computations agree: a printed verdict for each, and a table of the differences.

A verdict is the same on every machine; a difference is rounding, and differs between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class Proof:
    """Collects comparisons; `differences` maps each to (the largest difference, tolerance)."""

    def __init__(self) -> None:
        self.differences: dict[str, tuple[float, float]] = {}

    def equal(
        self,
        what: str,
        ours: torch.Tensor | Sequence[torch.Tensor],
        theirs: torch.Tensor | Sequence[torch.Tensor],
        tolerance: float,
    ) -> None:
        """Print whether all of ours are within the tolerance of theirs, and demand it.

        A tensor, or as many tensors as there are on the other side, of the same shapes. The
        difference is relative to the largest entry of theirs where that is above 1. Raises
        AssertionError, in a sentence, where shapes differ or the difference is larger or NaN.
        """
        ours, theirs = ([x] if hasattr(x, "shape") else list(x) for x in (ours, theirs))
        shapes = [[tuple(tensor.shape) for tensor in side] for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise AssertionError(f"{what}: the shapes are {shapes[0]} and {shapes[1]}.")
        largest = 0.0
        for a, b in zip(ours, theirs, strict=True):
            a, b = a.detach().cpu(), b.detach().cpu()
            if not a.is_floating_point():
                a, b = a.double(), b.double()  # booleans cannot be subtracted, bytes wrap around
            if not a.numel():
                continue
            off = (a - b).abs_().max().item() / max(1.0, b.max().item(), -b.min().item())
            largest = max(largest, math.inf if math.isnan(off) else off)
        self.differences[what] = largest, tolerance
        print(f"{what:50} within {tolerance:.0e}: {largest <= tolerance}")
        if not largest <= tolerance:
            raise AssertionError(f"{what}: {largest:.2g} apart, which is more than {tolerance:g}.")

    def table(self) -> None:
        """Print the largest differences themselves; they differ between machines."""
        print(f"{'':50} {'max |difference|':>16} {'tolerance':>10}")
        for what, (difference, tolerance) in self.differences.items():
            print(f"{what:50} {difference:16.1e} {tolerance:10.0e}")
