"""Chapter 5, two processes beside one and three ways to average.

python -m benchmarks.data_parallel

All pairs are measured in the same processes, in turns (A B A B …), with one thread each; a median
and its quartiles are printed. While one process computes alone, the other waits in a barrier,
where gloo uses no processor time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from course_utils.processes import launch
from course_utils.reference.ddp import BucketedDDP, NaiveDDP
from course_utils.reference.mlp import MLP

ROUNDS = 15


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Of one step, all ranks together, from the last one's start to the last one's end."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / repeats


def stepper(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A training step on (x, y)."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        if isinstance(network, BucketedDDP):
            network.finish()
        optimizer.step()

    return step


def network(kind: str) -> nn.Module:
    """For images of 28×28: convolutions (28,714 weights), or chapter 2's MLP (669,706)."""
    torch.manual_seed(0)
    if kind == "mlp":
        return MLP(784, 512, 10)
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    last = [nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *last, nn.Flatten(), nn.Linear(64, 10))


def one_and_two(kind: str, batch: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """On each of two ranks: seconds of a step on the whole batch, alone and shared; and of two
    such steps at once that share nothing, which is what the machine can give."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
    alone = stepper(network(kind), x, y)
    shared = nn.parallel.DistributedDataParallel(network(kind))
    together = stepper(shared, x[rank::world_size], y[rank::world_size])
    steps = {"1 process": alone if rank == 0 else lambda: None, "2 processes": together}
    steps["2 that share nothing"] = alone
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(seconds(step, repeats))
    return found


def three_ways(batch: int, width: int, depth: int, rounds: int, repeats: int) -> dict:
    """On each rank: seconds of a step with torch's DDP, BucketedDDP and NaiveDDP."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, width), torch.randint(0, 10, (batch,))

    def tower() -> nn.Module:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    steps = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel(tower()),
        "BucketedDDP": BucketedDDP(tower()),
        "NaiveDDP": NaiveDDP(tower()),
    }
    steps = {name: stepper(wrapped, x, y) for name, wrapped in steps.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(seconds(step, repeats))
    return found


def ratios(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """The quartiles of one / other, round by round: (lower, median, upper)."""
    lower, median, upper = statistics.quantiles(
        [a / b for a, b in zip(one, other, strict=True)], n=4
    )
    return lower, median, upper


def tell(what: str, pair: tuple[float, float, float], bound: str) -> None:
    print(f"{what:54} {pair[1]:5.2f}  ({pair[0]:.2f} … {pair[2]:.2f})  {bound}", flush=True)


def main(rounds: int = ROUNDS, scale: int = 1) -> None:
    print(f"chapter 5: {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}, 2 gloo processes of 1 thread")  # fmt: skip
    print(f"{'':54} ratio  (quartiles)")
    found = launch(one_and_two, 2, "conv", 128 // scale, rounds, 3, seconds=300, watch=False)[0]
    pair = ratios(found["1 process"], found["2 processes"])
    tell("speed-up by a second process, compute-bound step", pair, "at least 1.7")
    twice = [2 * seconds for seconds in found["1 process"]]
    tell("the machine: two steps at once", ratios(twice, found["2 that share nothing"]), "shown")
    found = launch(one_and_two, 2, "mlp", 64 // scale, rounds, 20, seconds=300, watch=False)[0]
    pair = ratios(found["1 process"], found["2 processes"])
    tell("speed-up, communication-bound step", pair, "shown")
    found = launch(three_ways, 2, 256 // scale, 512, 8, rounds, 5, seconds=300, watch=False)[0]
    bucketed = found["BucketedDDP"]
    pair = ratios(bucketed, found["DistributedDataParallel"])
    tell("BucketedDDP over DistributedDataParallel, a step", pair, "at most 1.15")
    tell("NaiveDDP over BucketedDDP, a step", ratios(found["NaiveDDP"], bucketed), "shown")


if __name__ == "__main__":
    main()
