"""How chapter 5 is judged: on real processes, each with its own copy of the answer.

An answer is first tried in a world of one process, in this one: what is wrong there needs no other
process. Then `on_ranks` runs a scenario on two or more. `# museum 5.n` beside a misconception is
the row of the defects found in published tutorials.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from course_utils import processes
from course_utils.exercises.engine import Exercise, Misconception, _EndProbe
from course_utils.exercises.ranks import on_ranks
from course_utils.processes import alone, calls
from course_utils.reference import ddp as reference

# --- what several of them observe with ----------------------------------------------------------

SENDS, RECEIVES = ("send", "isend"), ("recv", "irecv")
LATE = 0.1  # seconds; the other ranks need microseconds to be in their calls


@contextmanager
def _followed():
    """Inside: the work of the asynchronous calls that nobody has waited for yet."""
    unwaited, plain = {}, processes._Work

    class Followed(plain):
        def __init__(self, work, call):
            super().__init__(work, call)
            self._number = len(calls())
            unwaited[self._number] = self  # kept: gloo drops a message whose work is dropped

        def wait(self, *args, **kwargs):
            unwaited.pop(self._number, None)
            return super().wait(*args, **kwargs)

        def __getattr__(self, name):  # a future, or a look whether it is complete
            unwaited.pop(self._number, None)
            return super().__getattr__(name)

    processes._Work = Followed
    try:
        yield unwaited
    finally:
        processes._Work = plain


def _waited(see, answer):
    """`answer`; where it leaves a call that may go on, the probe ends: what it left is chance."""

    def followed(*args):
        with _followed() as unwaited:
            result = answer(*args)
        names = sorted((work._call.name for work in unwaited.values()), key="isend".__eq__)
        if names:
            see(f"an asynchronous {names[0]} that nobody waited for", True)
            raise _EndProbe
        return result

    return followed


def _everyone_but(late):
    """Whether this is not rank `late`, which goes on when the others are in their calls."""
    dist.barrier()
    if dist.get_rank() == late:
        time.sleep(LATE)
    return dist.get_rank() != late


def _mine(see, *shape):
    """This rank's values; those of the other ranks are others."""
    return see.randn(dist.get_world_size(), *shape)[dist.get_rank()].clone()


# --- shard_indices ------------------------------------------------------------------------------


def _observe_shard_indices(shard_indices, see):
    def shards(n, world_size, epoch, seed, when=""):
        for rank in range(world_size):
            label = f"the samples of rank {rank}{when}"
            samples = see.call(label, shard_indices, n, rank, world_size, epoch, seed)
            plain = not any(isinstance(sample, torch.Tensor) for sample in samples)
            see.fact(f"{label} are whole numbers and not tensors", plain)

    with see.probe("12 samples, 3 ranks, epoch 0, seed 0"):
        shards(12, 3, 0, 0)
    with see.probe("12 samples, 4 ranks, epoch 3, seed 8"):
        shards(12, 4, 3, 8)
    with see.probe("9 samples, 2 ranks, epochs 0 to 2, seed 21"):
        for epoch in range(3):
            shards(9, 2, epoch, 21, f" in epoch {epoch}")
    with see.probe("13 samples, 5 ranks, epoch 1, seed 2"):
        shards(13, 5, 1, 2)
    with see.probe("21 samples, 4 ranks, epoch 5, seed 3"):
        shards(21, 4, 5, 3)
    with see.probe("3 samples, 8 ranks, epoch 1, seed 4"):
        shards(3, 8, 1, 4)
    with see.probe("1 sample, 8 ranks"):
        shards(1, 8, 2, 1)
    with see.probe("7 samples, one process alone"):
        shards(7, 1, 2, 6)
    with see.probe("10 samples, 2 ranks, while training draws random numbers too"):
        torch.rand(5)  # else seeding anew would look like putting the state back
        state, seed = torch.get_rng_state(), torch.initial_seed()
        shards(10, 2, 1, 3)
        same = torch.equal(torch.get_rng_state(), state)
        see.fact("torch's own random state is as it was before the call", same)
        see.fact("torch's own generator has the seed that it had", torch.initial_seed() == seed)


def _shards_with(
    seed_of=lambda seed, epoch, rank: seed + epoch,
    order_of=lambda n, seed: torch.randperm(
        n, generator=torch.Generator().manual_seed(seed)
    ).tolist(),
    total_of=lambda n, world_size: math.ceil(n / world_size) * world_size,
    extended=lambda order, total: list(islice(cycle(order), total)),
    part=lambda order, rank, world_size: order[rank::world_size],
    shown=lambda indices: indices,
):
    """Another seed, shuffle, length, padding, or another part of the order."""

    def shard_indices(n, rank, world_size, epoch, seed):
        order = order_of(n, seed_of(seed, epoch, rank))
        order = extended(order, total_of(n, world_size))
        return shown(part(order, rank, world_size))

    return shard_indices


def _globally_seeded(n, seed):
    torch.manual_seed(seed)
    return torch.randperm(n).tolist()


def _seeded_back(n, seed):
    before = torch.initial_seed()
    order = _globally_seeded(n, seed)
    torch.manual_seed(before)
    return order


def _numpy_shuffled(n, seed):
    return np.random.default_rng(seed).permutation(n).tolist()


def _python_shuffled(n, seed):
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def _block(order, rank, world_size):
    size = len(order) // world_size
    return order[rank * size : (rank + 1) * size]


def _shards_unshuffled(n, rank, world_size, epoch, seed):
    return _shards_with(order_of=lambda n, seed: list(range(n)))(n, rank, world_size, epoch, seed)


_shards_epoch_forgotten = _shards_with(seed_of=lambda seed, epoch, rank: seed)
_shards_seed_forgotten = _shards_with(seed_of=lambda seed, epoch, rank: epoch)
_shards_seeded_by_rank = _shards_with(seed_of=lambda seed, epoch, rank: seed + epoch + rank)
_shards_unseeded = _shards_with(order_of=lambda n, seed: torch.randperm(n).tolist())
_shards_globally_seeded = _shards_with(order_of=_globally_seeded)
_shards_seeded_back = _shards_with(order_of=_seeded_back)
_shards_numpy = _shards_with(order_of=_numpy_shuffled)
_shards_generator_unseeded = _shards_with(
    order_of=lambda n, seed: torch.randperm(n, generator=torch.Generator()).tolist()
)
_shards_epoch_times_seed = _shards_with(seed_of=lambda seed, epoch, rank: epoch * seed)
_shards_padded_twice = _shards_with(extended=lambda order, total: (3 * order)[:total])
_shards_list_of_tensors = _shards_with(shown=lambda indices: [torch.tensor(i) for i in indices])
_shards_python = _shards_with(order_of=_python_shuffled)
_shards_blocks = _shards_with(part=_block)
_shards_everything = _shards_with(part=lambda order, rank, world_size: order)
_shards_unpadded = _shards_with(extended=lambda order, total: order)
_shards_dropped = _shards_with(total_of=lambda n, world_size: n // world_size * world_size)
_shards_whole_round = _shards_with(
    total_of=lambda n, world_size: (n // world_size + 1) * world_size
)
_shards_padded_once = _shards_with(
    extended=lambda order, total: order + order[: total - len(order)]
)
_shards_padded_from_end = _shards_with(
    extended=lambda order, total: (
        list(islice(cycle(order), total))
        if total == len(order)
        else order + (order * total)[-(total - len(order)) :]
    )
)
_shards_padded_with_last = _shards_with(
    extended=lambda order, total: order + order[-1:] * (total - len(order))
)
_shards_padded_with_zero = _shards_with(
    extended=lambda order, total: order + [0] * (total - len(order))
)
_shards_padded_in_order = _shards_with(
    extended=lambda order, total: order + [i % len(order) for i in range(total - len(order))]
)
_shards_from_rank_one = _shards_with(
    part=lambda order, rank, world_size: order[(rank - 1) % world_size :: world_size]
)
_shards_sorted = _shards_with(shown=sorted)
_shards_tensor = _shards_with(shown=torch.tensor)


def _shards_own_beginning(n, rank, world_size, epoch, seed):
    """Each rank makes its own part longer, by a sample that it has already."""
    order = reference.shard_indices(n, 0, 1, epoch, seed)
    own, size = order[rank::world_size] or order[:1], math.ceil(n / world_size)
    return (own * size)[:size]


def _shards_padded_then_shuffled(n, rank, world_size, epoch, seed):
    total = math.ceil(n / world_size) * world_size
    padded = [i % n for i in range(total)]
    order = reference.shard_indices(total, 0, 1, epoch, seed)
    return [padded[i] for i in order][rank::world_size]


def _shards_shuffled_apart(n, rank, world_size, epoch, seed):
    """The same samples on the same rank in every epoch, in another order."""
    total = math.ceil(n / world_size) * world_size
    own = [i % n for i in range(total)][rank::world_size]
    return [own[i] for i in reference.shard_indices(len(own), 0, 1, epoch, seed)]


def _shards_of_group(n, rank, world_size, epoch, seed):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return reference.shard_indices(n, rank, world_size, epoch, seed)


def _shards_by_sampler(n, rank, world_size, epoch, seed):
    from torch.utils.data import DistributedSampler

    sampler = DistributedSampler(range(n), world_size, rank, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def _shards_by_modulo(n, rank, world_size, epoch, seed):
    g = torch.Generator()
    g.manual_seed(epoch + seed)
    order = torch.randperm(n, generator=g)
    return [order[i % n].item() for i in range(rank, n + (-n) % world_size, world_size)]


def _shards_by_view(n, rank, world_size, epoch, seed, device="cpu"):
    order = torch.randperm(n, generator=torch.Generator(device).manual_seed(seed + epoch))
    steps = -(-n // world_size)
    order = order.repeat(steps * world_size // n + 1)[: steps * world_size]
    return tuple(order.view(steps, world_size)[:, rank].tolist())


def _shards_by_while(n, rank, world_size, epoch, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + epoch)
        order = list(torch.randperm(n).numpy())
    first = list(order)
    while len(order) % world_size:
        order += first[: world_size - len(order) % world_size]
    return [int(sample) for place, sample in enumerate(order) if place % world_size == rank]


SHARD_INDICES = Exercise(
    slug="shard_indices",
    chapter=5,
    title="Which samples a rank goes through",
    minutes=15,
    difficulty=2,
    reference=reference.shard_indices,
    observe=_observe_shard_indices,
    misconceptions=(
        Misconception(
            "same_samples_everywhere",  # museum 5.1
            _shards_everything,
            "You give every rank the whole order. All of them then compute the same gradients, and "
            "world_size processes take as long as one: a rank takes only its own part.",
        ),
        Misconception(
            "not_shuffled",
            _shards_unshuffled,
            "You hand out the samples in the order of the data set. Without a shuffle every epoch "
            "has the same batches, and a data set that is sorted by class has one-sided ones.",
        ),
        Misconception(
            "epoch_forgotten",  # museum 5.22
            _shards_epoch_forgotten,
            "You seed with the seed alone, so that every epoch has the order of the first (this is "
            "also what a forgotten `set_epoch` does). The epoch belongs into the seed.",
        ),
        Misconception(
            "seed_forgotten",
            _shards_seed_forgotten,
            "You seed with the epoch alone: runs with different seeds see their data in the same "
            "order, so that repeating a run with another seed tells less than it seems.",
        ),
        Misconception(
            "every_rank_shuffles_for_itself",
            _shards_seeded_by_rank,
            "You seed each rank differently. The parts then belong to different orders: some "
            "samples stand on two ranks, and others on none. The ranks agree without a message "
            "only if all of them shuffle alike.",
        ),
        Misconception(
            "not_seeded",
            _shards_unseeded,
            "You shuffle with whatever random state the process has. The ranks' states differ, so "
            "their parts overlap and leave samples out: the seed and the epoch must decide alone.",
        ),
        Misconception(
            "global_random_state_seeded",  # museum 5.26
            _shards_globally_seeded,
            "You seed torch's global generator to shuffle. From there on all ranks draw the same "
            "dropout masks and augmentations, the same again after every start of an epoch. Give "
            "the shuffle a generator of its own.",
        ),
        Misconception(
            "generator_never_seeded",
            _shards_generator_unseeded,
            "You make a generator and never seed it: a new torch.Generator always starts from the "
            "same number, so that neither the seed nor the epoch has any influence on the order.",
        ),
        Misconception(
            "epoch_times_seed",
            _shards_epoch_times_seed,
            "You multiply the seed by the epoch. In epoch 0, and with seed 0 in every epoch, that "
            "is 0 whatever the other is; DistributedSampler combines the two in another way.",
        ),
        Misconception(
            "random_state_seeded_back",
            _shards_seeded_back,
            "You seed torch's global generator for the shuffle, and again with the old seed "
            "afterwards. That sets it back to where the program began, not to where it was: "
            "training then draws the same numbers over again. Give the shuffle a generator of its "
            "own.",
        ),
        Misconception(
            "numpy_shuffle",
            _shards_numpy,
            "You shuffle with NumPy. That is a shuffle too, but not the one that is asked for: the "
            "order should be DistributedSampler's, which is torch.randperm's.",
        ),
        Misconception(
            "python_shuffle",
            _shards_python,
            "You shuffle with Python's `random`. That is a shuffle too, but not the one that is "
            "asked for: the order should be DistributedSampler's, which is torch.randperm's.",
        ),
        Misconception(
            "blocks",
            _shards_blocks,
            "You give each rank one block of the order. Every sample is there once, but "
            "DistributedSampler deals the order out like cards: one sample to each rank in turn.",
        ),
        Misconception(
            "not_padded",  # museum 5.28
            _shards_unpadded,
            "You leave the order as long as it is, so that some ranks have a sample more. They "
            "take one more step, whose all_reduce waits for ranks that are already done.",
        ),
        Misconception(
            "rest_dropped",
            _shards_dropped,
            "You drop what does not divide by world_size. Then up to world_size - 1 samples are "
            "left out of the epoch (with fewer samples than ranks: all). The order is made longer "
            "here, not shorter; the other is `drop_last=True`.",
        ),
        Misconception(
            "always_one_round_more",
            _shards_whole_round,
            "You add a round also where the number of samples is a multiple of world_size already, "
            "so every rank repeats a sample for nothing. Look at how you round up.",
        ),
        Misconception(
            "padded_once",
            _shards_padded_once,
            "You extend the order by its beginning only once. With fewer samples than missing "
            "places that is not enough: 3 samples on 8 ranks need the order almost three times.",
        ),
        Misconception(
            "padded_twice",
            _shards_padded_twice,
            "You extend the order by itself a fixed number of times: three times its length is not "
            "enough for 1 sample on 8 ranks. How often must follow from n and world_size.",
        ),
        Misconception(
            "padded_from_the_end",
            _shards_padded_from_end,
            "You fill up with the samples from the end of the order. The missing places are taken "
            "by those from its beginning, as if it started again.",
        ),
        Misconception(
            "padded_with_the_last",
            _shards_padded_with_last,
            "You repeat the last sample until the order is long enough. Up to world_size - 1 times "
            "the same sample weighs more than need be; the order goes on from its beginning.",
        ),
        Misconception(
            "padded_with_sample_zero",
            _shards_padded_with_zero,
            "You fill up with sample 0. In every epoch it is the one that counts several times; "
            "the places go to the first samples of the shuffled order, others in every epoch.",
        ),
        Misconception(
            "padded_in_the_order_of_the_data",
            _shards_padded_in_order,
            "You fill up with samples 0, 1, …, those with which the data set begins. It is the "
            "shuffled order that goes on from its beginning.",
        ),
        Misconception(
            "padded_before_the_shuffle",
            _shards_padded_then_shuffled,
            "You fill up the samples first, and shuffle afterwards. That is a permutation of "
            "another length, so another order altogether: shuffle n samples, then extend.",
        ),
        Misconception(
            "each_rank_pads_itself",
            _shards_own_beginning,
            "You extend each rank's part by its own beginning. What is missing at the end of the "
            "order is taken from the beginning of the order, before it is dealt out.",
        ),
        Misconception(
            "shuffled_after_dealing",
            _shards_shuffled_apart,
            "You deal out the samples first and shuffle each rank's part. A rank then has the same "
            "samples in every epoch, and never sees the others: shuffle first.",
        ),
        Misconception(
            "ranks_counted_from_one",
            _shards_from_rank_one,
            "You give each rank the part of its left neighbour. Ranks are counted from 0: rank r "
            "begins at place r of the order.",
        ),
        Misconception(
            "sorted",
            _shards_sorted,
            "You return the right samples in ascending order. The order in which a rank goes "
            "through its samples is a part of the shuffle.",
        ),
        Misconception(
            "returns_a_tensor",
            _shards_tensor,
            "You return a tensor. A data set is indexed with Python's int, so a list of int is "
            "asked for; a tensor has a method that makes one.",
        ),
        Misconception(
            "returns_tensors_in_a_list",
            _shards_list_of_tensors,
            "You return a list of tensors with one number each: list(tensor) makes that. A list of "
            "Python's int is asked for, and a tensor has a method that makes one.",
        ),
        Misconception(
            "asks_the_process_group",
            _shards_of_group,
            "You ask torch.distributed for the rank and the world size, although both are handed "
            "in. Here is no process group: this function needs no other process, and can be tried "
            "for every rank in one.",
        ),
    ),
    alternatives=(_shards_by_sampler, _shards_by_modulo, _shards_by_view, _shards_by_while),
    hints=(
        "All ranks make the same order, without a message: what must the seed be made of, and what "
        "not? A torch.Generator of its own keeps the rest of the program undisturbed.",
        "Round n up to a multiple of world_size. How many samples are missing, and what if more "
        "are missing than there are?",
        "Repeat the order as often as needed, cut it to the rounded length, and take a slice with "
        "a start and a step.",
    ),
)

# --- all_reduce_mean ----------------------------------------------------------------------------


def _observe_all_reduce_mean(all_reduce_mean, see):
    with see.probe("one process alone, a tensor of shape (4, 3)"), alone():
        tensor = see.randn(4, 3)
        mean = see.call("the mean", _waited(see, all_reduce_mean), tensor)
        see.fact("the mean is a new tensor", mean.data_ptr() != tensor.data_ptr())
        see.call("the mean of another tensor", _waited(see, all_reduce_mean), see.randn(4, 3))
        columns = see.randn(3, 5)[:, ::2]
        see.call("the mean of every other column", _waited(see, all_reduce_mean), columns)
        see.fact("the mean requires no gradient, as the tensor does not", not mean.requires_grad)
    for world_size, shapes in ((2, ((5, 2), ())), (3, ((4,), (2, 3)))):
        if not see.agrees:
            return
        what = " and ".join(map(str, shapes))
        also = ", then zeros on rank 1" if world_size == 3 else ", then rank 1 calls later"
        with see.probe(f"{world_size} processes, each with tensors of shapes {what}{also}"):
            on_ranks(see, world_size, _means_of, all_reduce_mean, shapes)


def _means_of(all_reduce_mean, see, shapes):
    for shape in shapes:
        see.call(f"the mean, {shape},", _waited(see, all_reduce_mean), _mine(see, *shape))
    if dist.get_world_size() == 2:  # the mean of two whole numbers is exact
        whole = see.randint(-9, 10, 2, 3, 2)[dist.get_rank()].float()
        see.call("the mean in float32", _waited(see, all_reduce_mean), whole)
        tensor = _mine(see, 6)
        if _everyone_but(1):
            see.call("the mean, when rank 1 calls later,", all_reduce_mean, tensor)
        else:
            all_reduce_mean(tensor)
    else:
        some = _mine(see, 4) * (dist.get_rank() != 1)
        see.call("the mean where rank 1 has zeros", _waited(see, all_reduce_mean), some)


def _mean_with(
    reduce=lambda total: dist.all_reduce(total),
    divide=lambda total, tensor: total / dist.get_world_size(),
    copy=torch.clone,
):
    """Another collective, another divisor, or another copy."""

    def all_reduce_mean(tensor):
        total = copy(tensor)
        reduce(total)
        return divide(total, tensor)

    return all_reduce_mean


_mean_sum = _mean_with(divide=lambda total, tensor: total)
_mean_own = _mean_with(divide=lambda total, tensor: tensor.clone())
_mean_own_share = _mean_with(divide=lambda total, tensor: tensor / dist.get_world_size())
_mean_in_place = _mean_with(copy=lambda tensor: tensor)
_mean_in_place_and_back = _mean_with(
    copy=lambda tensor: tensor,
    divide=lambda total, tensor: total.div_(dist.get_world_size()),
)
_mean_of_two = _mean_with(divide=lambda total, tensor: total / 2)
_mean_twice_divided = _mean_with(
    reduce=lambda total: dist.all_reduce(total, op=dist.ReduceOp.AVG),
)
_mean_floored = _mean_with(divide=lambda total, tensor: total // dist.get_world_size())
_mean_of_elements = _mean_with(divide=lambda total, tensor: (total / dist.get_world_size()).mean())
_mean_by_size = _mean_with(divide=lambda total, tensor: total / dist.get_world_size() / len(tensor))
_mean_largest = _mean_with(
    reduce=lambda total: dist.all_reduce(total, op=dist.ReduceOp.MAX),
    divide=lambda total, tensor: total,
)
_mean_on_rank_zero_only = _mean_with(reduce=lambda total: dist.reduce(total, 0))
_mean_not_waited = _mean_with(reduce=lambda total: dist.all_reduce(total, async_op=True))
_mean_of_rank_zero = _mean_with(
    reduce=lambda total: dist.broadcast(total, 0), divide=lambda total, tensor: total
)


def _mean_returned_by_collective(tensor):
    total = tensor / dist.get_world_size()
    return dist.all_reduce(total)


def _mean_of_what_is_returned(tensor):
    total = dist.all_reduce(tensor.clone())
    return total / dist.get_world_size()


def _mean_without_zeros(tensor):
    total = tensor.clone()
    if total.abs().sum() > 0:
        dist.all_reduce(total)
    return total / dist.get_world_size()


def _mean_of_a_row(tensor):
    total = tensor.view(-1).clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).view(tensor.shape)


def _mean_with_gradient(tensor):
    return reference.all_reduce_mean(tensor).requires_grad_()


def _mean_called_by_rank_zero(tensor):
    total = tensor.clone()
    if dist.get_rank() == 0:
        dist.all_reduce(total)
    return total / dist.get_world_size()


def _mean_one_list_entry(tensor):
    """One tensor that stands in the list world_size times."""
    parts = [torch.zeros_like(tensor)] * dist.get_world_size()
    dist.all_gather(parts, tensor)
    return sum(parts) / len(parts)


def _mean_as_float32(tensor):
    return reference.all_reduce_mean(tensor.float())


def _mean_for_rank_zero(tensor):
    total = reference.all_reduce_mean(tensor)
    return total if dist.get_rank() == 0 else None


def _mean_by_gather(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts).mean(dim=0)


def _mean_by_avg(tensor):
    mean = tensor.detach().clone()
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    return mean


def _mean_waited(tensor, group=None):
    share = tensor / dist.get_world_size(group)
    work = dist.all_reduce(share, group=group, async_op=True)
    work.wait()
    return share


def _mean_reduced_and_sent(tensor):
    total = 1 * tensor
    dist.reduce(total, dst=0)
    total /= dist.get_world_size()
    dist.broadcast(total, src=0)
    return total


class _MeanModule(nn.Module):
    """Called as a function is."""

    def forward(self, tensor):
        future = dist.all_reduce(kept := tensor.clone(), async_op=True).get_future()
        future.wait()
        return kept / dist.get_world_size()


ALL_REDUCE_MEAN = Exercise(
    slug="all_reduce_mean",
    chapter=5,
    title="The mean over all processes",
    minutes=10,
    difficulty=1,
    reference=reference.all_reduce_mean,
    observe=_observe_all_reduce_mean,
    misconceptions=(
        Misconception(
            "sum",  # museum 5.2
            _mean_sum,
            "You return the sum. With gradients that makes every step world_size times as long, as "
            "if the learning rate had been multiplied. all_reduce adds; the rest is yours.",
        ),
        Misconception(
            "own_tensor",  # museum 5.30
            _mean_own,
            "You return this rank's own tensor: the others' values are not in it. If you reduce a "
            "copy, the result is in the copy.",
        ),
        Misconception(
            "own_tensor_divided",  # museum 5.30
            _mean_own_share,
            "You return this rank's own tensor, divided by the number of ranks. What you divide "
            "does not hold the sum: it has gone into a copy, or is not there yet.",
        ),
        Misconception(
            "input_is_overwritten",
            _mean_in_place,
            "You reduce the caller's tensor itself, which holds the sum afterwards. all_reduce "
            "writes into what it is given: give it a copy.",
        ),
        Misconception(
            "input_becomes_the_mean",
            _mean_in_place_and_back,
            "You turn the caller's tensor into the mean, and return it. The mean is right, but the "
            "caller has lost its own values; the result should be a new tensor.",
        ),
        Misconception(
            "always_two",
            _mean_of_two,
            "You divide by 2, whatever the number of processes. Ask torch.distributed how many "
            "there are: there may be one, or a thousand.",
        ),
        Misconception(
            "divided_twice",
            _mean_twice_divided,
            "You divide twice, before the sum and after it (ReduceOp.AVG divides too), so that the "
            "result is too small by the number of ranks. One of the two is enough.",
        ),
        Misconception(
            "divided_by_length_too",  # museum 5.3
            _mean_by_size,
            "You divide by the number of ranks and by the length of the tensor as well. The mean "
            "is over the ranks only; where a loss is a mean over a batch, that division is done.",
        ),
        Misconception(
            "mean_over_elements",
            _mean_of_elements,
            "You average over the elements too, and one number is left. The mean is over the "
            "ranks, for each element by itself: the result has the tensor's shape.",
        ),
        Misconception(
            "whole_numbers",
            _mean_floored,
            "You divide with //, which rounds every mean down to a whole number. A mean of "
            "floating-point numbers needs the other division.",
        ),
        Misconception(
            "largest",
            _mean_largest,
            "You return the largest of the ranks' values, element by element. Look at the "
            "operation that you hand to the collective: the mean is made from the sum.",
        ),
        Misconception(
            "rank_zero_of_all",
            _mean_of_rank_zero,
            "You send rank 0's tensor to all. The ranks agree afterwards, but what the others had "
            "is lost: a broadcast copies, it does not add.",
        ),
        Misconception(
            "reduced_to_rank_zero",
            _mean_on_rank_zero_only,
            "Only rank 0 gets the mean: a reduce leaves the sum on one rank, and what the others' "
            "tensors hold after it is unfinished. Every rank needs the result.",
        ),
        Misconception(
            "returned_on_rank_zero",
            _mean_for_rank_zero,
            "You return the mean on rank 0 only, and None on the other ranks. All of them go on "
            "with it: every rank returns the same mean.",
        ),
        Misconception(
            "not_waited",  # museum 5.10
            _mean_not_waited,
            "You start an asynchronous all_reduce and read its tensor without waiting. What is in "
            "it then depends on who was faster: look at what the call returns.",
        ),
        Misconception(
            "returns_what_the_collective_returns",
            _mean_returned_by_collective,
            "Your function returns None. all_reduce returns None too: a collective writes its "
            "result into the tensor that it was given, and that is where you find it.",
        ),
        Misconception(
            "goes_on_with_what_the_collective_returns",
            _mean_of_what_is_returned,
            "You go on with what all_reduce returns, which is None. A collective writes its result "
            "into the tensor that it was given: keep a name for that one.",
        ),
        Misconception(
            "view_of_the_input",
            _mean_of_a_row,
            "You make the tensor flat with view(), which fails where its numbers do not lie side "
            "by side, as in every other column of a matrix. The mean needs no other shape at all.",
        ),
        Misconception(
            "result_requires_gradient",
            _mean_with_gradient,
            "Your mean requires a gradient, although the tensor that was handed in does not. What "
            "is made from it later would be recorded in a graph that nobody asked for.",
        ),
        Misconception(
            "one_tensor_many_times",
            _mean_one_list_entry,
            "You gather into a list that holds one and the same tensor world_size times, so that "
            "each rank's values overwrite those before; the last rank's are left. `[t] * n` "
            "copies a reference: every rank needs a tensor of its own to be gathered into.",
        ),
        Misconception(
            "float32",
            _mean_as_float32,
            "You return float32 where the tensors are float64. That costs half of the digits: the "
            "result has the dtype of the tensor.",
        ),
        Misconception(
            "collective_on_rank_zero",  # museum 5.27
            _mean_called_by_rank_zero,
            "You call the collective on rank 0 only. It waits there for the others, who never "
            "come: a collective is called by every rank of the group, or by none.",
        ),
        Misconception(
            "zeros_do_not_take_part",
            _mean_without_zeros,
            "A rank whose tensor is all zeros does not call the collective, and the others wait "
            "for it. Whether a collective is called must not depend on a rank's own values.",
        ),
    ),
    alternatives=(
        _mean_by_gather,
        _mean_by_avg,
        _mean_waited,
        _mean_reduced_and_sent,
        _MeanModule(),
    ),
    hints=(
        "dist.all_reduce writes the sum over the ranks into the tensor that it is given. What "
        "happens to the caller's tensor if you hand it in?",
        "dist.get_world_size() says how many ranks there are. Every rank calls the collective.",
        "Clone the tensor, all_reduce the clone, and return it divided by the world size.",
    ),
)

# --- ring_all_reduce ----------------------------------------------------------------------------


def _observe_ring_all_reduce(ring_all_reduce, see):
    with see.probe("one process alone, a tensor of shape (2, 3)"), alone():
        tensor = see.randn(2, 5)[:, ::2]  # whose flatten() is a copy
        total = see.call("the sum", _to_nobody(see, ring_all_reduce), tensor)
        _no_collective(see)
        see.fact("the sum is a new tensor", total.data_ptr() != tensor.data_ptr())
    for world_size, shapes in (
        (3, ((3, 2), (7,), (2, 4), (2,))),
        (2, ((4, 2), ())),
        (4, ((2, 3, 3),)),
    ):
        if not see.agrees:
            return
        what = ", ".join(map(str, shapes))
        also = ", in the end rank 1 calls later" if world_size == 2 else ""
        with see.probe(f"{world_size} processes, each with a tensor of shape {what}{also}"):
            on_ranks(see, world_size, _rings, ring_all_reduce, shapes)


def _to_nobody(see, ring_all_reduce):
    """The answer in a world of one, where gloo's own words on a message to oneself vary."""

    def followed(tensor):
        try:
            return ring_all_reduce(tensor)
        except RuntimeError:
            if any(call.name in SENDS for call in calls()):
                see("a message that a process without neighbours sends", True)
                raise _EndProbe from None
            raise

    return followed


def _no_collective(see, what="", begun=0):
    others = {call.name for call in calls()[begun:]} - {*SENDS, *RECEIVES, "barrier"}
    allowed = "send, recv, isend, irecv and batch_isend_irecv"
    see.fact(f"{what}no collective is called, only {allowed}", not others)


def _rings(ring_all_reduce, see, shapes):
    """Beside the sum only what is asked for: to whom, from whom, how many chunks, how large."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    dist.barrier()  # all are connected: a rank that fails early is noticed by its neighbours
    tensors = {f"{shape}": _mine(see, *shape) for shape in shapes}
    if world_size == 2:
        whole = see.randint(-9, 10, 2, 4, 2)
        tensors["(4, 2), float32"] = whole[rank].float()
        large = 2**60 + whole + torch.arange(8).view(4, 2)
        tensors["(4, 2), int64"] = large[rank].clone()
    for name, tensor in tensors.items():
        begun, what = len(calls()), f"shape {name}: "
        total = see.call(f"the sum, {name},", _waited(see, ring_all_reduce), tensor)
        if tensor.dtype == torch.int64:
            exact = torch.equal(total, large.sum(dim=0))
            see.fact(f"{what}every digit of sums beyond 2**60 is right", exact)
        _no_collective(see, what, begun)
        sent = [call for call in calls()[begun:] if call.name in SENDS]
        got = [call for call in calls()[begun:] if call.name in RECEIVES]
        see.fact(
            f"{what}a rank sends to its right neighbour only", all(c.peer == right for c in sent)
        )
        from_left = all(call.peer in (left, None) for call in got)
        see.fact(f"{what}a rank receives from its left neighbour only", from_left)
        n = tensor.numel()
        longest = math.ceil(n / world_size)
        short = all(call.bytes <= longest * tensor.element_size() for call in sent)
        see.fact(f"{what}no message is longer than {longest} of the {n} numbers", short)
        if n >= world_size:  # else some chunks are empty, which need not be sent
            see(f"{what}the number of chunks that a rank sends", len(sent))
    if world_size == 2:
        tensor = _mine(see, 6)
        if _everyone_but(1):
            see.call("the sum, when rank 1 calls later,", ring_all_reduce, tensor)
        else:
            ring_all_reduce(tensor)


def _exchanged(outgoing, incoming, right, left):
    sending = dist.isend(outgoing, right)
    dist.recv(incoming, left)
    sending.wait()


def _sent_first(outgoing, incoming, right, left):
    dist.send(outgoing, right)
    dist.recv(incoming, left)


def _not_waited(outgoing, incoming, right, left):
    dist.isend(outgoing, right)
    dist.irecv(incoming, left)


def _send_not_waited(outgoing, incoming, right, left):
    dist.isend(outgoing, right)
    dist.recv(incoming, left)


def _sent_first_only_by_others(outgoing, incoming, right, left):
    if dist.get_rank() == 0:
        dist.recv(incoming, left)
        dist.send(outgoing, right)
    else:
        dist.send(outgoing, right)
        dist.recv(incoming, left)


def _sent_in_a_batch(outgoing, incoming, right, left):
    pair = dist.P2POp(dist.irecv, incoming, left), dist.P2POp(dist.isend, outgoing, right)
    for work in dist.batch_isend_irecv(list(pair)):
        work.wait()


def _added(mine, incoming):
    mine += incoming


def _replaced(mine, incoming):
    mine.copy_(incoming)


def _ring_with(
    flat=lambda tensor: tensor.detach().clone().flatten(),
    cut=lambda total, world_size: total.tensor_split(world_size),
    steps=lambda world_size: 2 * (world_size - 1),
    places=lambda rank, step, world_size: (rank - step, rank - step - 1),
    neighbours=lambda rank, world_size: ((rank + 1) % world_size, (rank - 1) % world_size),
    exchange=_exchanged,
    early=_added,
    late=_replaced,
    adds=lambda step, world_size: step < world_size - 1,
    shaped=lambda total, tensor: total.reshape(tensor.shape),
):
    """The ring with another cut, direction, schedule, or another use of what arrives."""

    def ring_all_reduce(tensor):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        right, left = neighbours(rank, world_size)
        total = flat(tensor)
        chunks = cut(total, world_size)
        for step in range(steps(world_size)):
            there, here = (p % world_size for p in places(rank, step, world_size))
            incoming = torch.zeros_like(chunks[here])
            exchange(chunks[there], incoming, right, left)
            (early if adds(step, world_size) else late)(chunks[here], incoming)
        return shaped(total, tensor)

    return ring_all_reduce


_ring_blocking = _ring_with(exchange=_sent_first)
_ring_not_waited = _ring_with(exchange=_not_waited)
_ring_send_not_waited = _ring_with(exchange=_send_not_waited)
_ring_one_round = _ring_with(steps=lambda world_size: world_size - 1)
_ring_one_step_short = _ring_with(steps=lambda world_size: max(0, 2 * world_size - 3))
_ring_two_steps_more = _ring_with(steps=lambda world_size: 2 * world_size)
_ring_added_twice = _ring_with(late=_added)
_ring_adds_once_more = _ring_with(adds=lambda step, world_size: step <= world_size - 1)
_ring_rest_in_the_last = _ring_with(
    cut=lambda total, world_size: total.tensor_split(
        [i * (len(total) // world_size) for i in range(1, world_size)]
    )
)
_ring_never_added = _ring_with(early=_replaced)
_ring_in_place = _ring_with(flat=lambda tensor: tensor.flatten())
_ring_flat = _ring_with(shaped=lambda total, tensor: total)
_ring_mean = _ring_with(
    shaped=lambda total, tensor: (total / dist.get_world_size()).reshape(tensor.shape)
)
_ring_to_the_left = _ring_with(
    neighbours=lambda rank, world_size: ((rank - 1) % world_size, (rank + 1) % world_size),
    places=lambda rank, step, world_size: (rank + step, rank + step + 1),
)
_ring_not_closed = _ring_with(
    neighbours=lambda rank, world_size: (rank + 1, rank - 1),
)
_ring_by_chunk = _ring_with(cut=lambda total, world_size: total.chunk(world_size))
_ring_rest_lost = _ring_with(
    cut=lambda total, world_size: total[: len(total) // world_size * world_size].view(
        world_size, -1
    )
)
_ring_even_only = _ring_with(cut=lambda total, world_size: total.view(world_size, -1))
_ring_by_rows = _ring_with(
    flat=lambda tensor: tensor.detach().clone(), shaped=lambda total, tensor: total
)


def _ring_whole_tensor(tensor):
    """All of the tensor, once round the ring."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total, passed_on = tensor.clone(), tensor.clone()
    for _ in range(world_size - 1):
        incoming = torch.empty_like(tensor)
        _exchanged(passed_on, incoming, (rank + 1) % world_size, (rank - 1) % world_size)
        total += incoming
        passed_on = incoming
    return total


def _ring_with_a_neighbour(tensor):
    """What is enough for two processes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    incoming = torch.zeros_like(tensor)
    if world_size > 1:
        _exchanged(tensor.clone(), incoming, (rank + 1) % world_size, (rank - 1) % world_size)
    return tensor + incoming


def _ring_not_copied_alone(tensor):
    return tensor if dist.get_world_size() == 1 else reference.ring_all_reduce(tensor)


def _ring_in_float64(tensor):
    return reference.ring_all_reduce(tensor.double()).to(tensor.dtype)


def _ring_in_float32(tensor):
    return reference.ring_all_reduce(tensor.float()).to(tensor.dtype)


def _ring_by_all_reduce(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _ring_everyone_to_everyone(tensor):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = tensor.clone()
    for distance in range(1, world_size):
        incoming = torch.empty_like(tensor)
        to, of = (rank + distance) % world_size, (rank - distance) % world_size
        _exchanged(tensor.clone(), incoming, to, of)
        total += incoming
    return total


def _ring_two_loops(tensor):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = tensor.numel()
    ends = [n * i // world_size for i in range(world_size + 1)]
    flat = tensor.reshape(-1).clone()
    at = [slice(ends[i], ends[i + 1]) for i in range(world_size)]
    for shift in (0, 1):
        for step in range(world_size - 1):
            out, into = (rank - step + shift) % world_size, (rank - step - 1 + shift) % world_size
            got = flat.new_empty(flat[at[into]].shape)
            work = dist.irecv(got, src=(rank - 1) % world_size)
            dist.send(flat[at[out]].contiguous(), dst=(rank + 1) % world_size) if (
                rank % 2 == 0
            ) else dist.isend(flat[at[out]], dst=(rank + 1) % world_size).wait()
            work.wait()
            flat[at[into]] = got if shift else flat[at[into]] + got
    return flat.view_as(tensor)


def _ring_padded(tensor):
    """Chunks of one length, filled up with zeros."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = tensor.numel()
    rows = torch.zeros(world_size, -(-n // world_size), dtype=tensor.dtype)
    rows.view(-1)[:n] = tensor.flatten()
    for step in range(2 * world_size - 2):
        got = torch.empty_like(rows[0])
        work = dist.isend(rows[(rank - step) % world_size].clone(), (rank + 1) % world_size)
        dist.recv(got)
        work.wait()
        row = (rank - step - 1) % world_size
        rows[row] = rows[row] + got if step < world_size - 1 else got
    return rows.view(-1)[:n].view(tensor.shape)


_ring_rank_zero_last = _ring_with(exchange=_sent_first_only_by_others)
_ring_in_a_batch = _ring_with(exchange=_sent_in_a_batch)
_ring_from_one_further = _ring_with(
    places=lambda rank, step, world_size: (rank - step + 1, rank - step)
)


RING_ALL_REDUCE = Exercise(
    slug="ring_all_reduce",
    chapter=5,
    title="All-reduce round a ring",
    minutes=30,
    difficulty=4,
    reference=reference.ring_all_reduce,
    observe=_observe_ring_all_reduce,
    misconceptions=(
        Misconception(
            "not_waited",  # museum 5.10
            _ring_not_waited,
            "You start to receive and use the chunk at once. It is there only after wait(); before "
            "that you add whatever the buffer held.",
        ),
        Misconception(
            "send_not_waited",
            _ring_send_not_waited,
            "You start to send and never wait for it. isend returns at once, and what it returns "
            "is the message on its way: thrown away early, the message may never arrive, and the "
            "right neighbour waits for ever.",
        ),
        Misconception(
            "only_the_first_round",
            _ring_one_round,
            "You stop after the first round of world_size - 1 steps. Each rank then has one chunk "
            "with the whole sum, and the others only in part: the sums have to go round once more.",
        ),
        Misconception(
            "one_step_short",
            _ring_one_step_short,
            "You stop one step too early, so that on each rank one chunk is not complete. A chunk "
            "needs world_size - 1 steps to collect its sum, and as many to reach every rank.",
        ),
        Misconception(
            "two_steps_more",
            _ring_two_steps_more,
            "You take 2 world_size steps. The sums are complete after 2 (world_size - 1): the last "
            "two bring chunks that every rank has already.",
        ),
        Misconception(
            "second_round_adds",
            _ring_added_twice,
            "You add in the second round too. What arrives there is a complete sum, in which your "
            "own share is already: it takes the place of what you have.",
        ),
        Misconception(
            "adds_once_too_often",
            _ring_adds_once_more,
            "You add in world_size steps instead of world_size - 1. What arrives in the last of "
            "them is a complete sum already, in which your own share is: from there on it "
            "replaces. Count the steps of the first round from 0.",
        ),
        Misconception(
            "no_sum_goes_round",
            _ring_never_added,
            "Your result holds chunk 0 of rank 0, chunk 1 of rank 1, and so on, without any sum. "
            "Either the first round replaces chunks where it should add to them, or the second "
            "begins with a chunk whose sum is on another rank: write down, for 3 ranks, which "
            "chunk is complete where after the first round.",
        ),
        Misconception(
            "input_is_overwritten",
            _ring_in_place,
            "You add into the caller's tensor. flatten() and reshape() give a view where they can, "
            "which shares the memory: the ring needs a copy to work on.",
        ),
        Misconception(
            "flat_result",
            _ring_flat,
            "You return the sum as one long row. The chunks were cut from the flattened tensor, "
            "and the result should have the shape that the tensor had.",
        ),
        Misconception(
            "mean",
            _ring_mean,
            "You divide by the number of ranks. This all-reduce returns the sum, as "
            "dist.all_reduce does; the division is another function's.",
        ),
        Misconception(
            "the_other_way_round",
            _ring_to_the_left,
            "You send to the left and receive from the right. The sum is the same, but the ring "
            "was to turn the other way: the right neighbour of rank r is rank r + 1.",
        ),
        Misconception(
            "ring_not_closed",
            _ring_not_closed,
            "You do not close the ring: the last rank sends to world_size, and rank 0 receives "
            "from -1. There are no such ranks; after the last comes the first.",
        ),
        Misconception(
            "torch_chunk",
            _ring_by_chunk,
            "You cut with torch.chunk, which may return fewer chunks than you ask for: 4 numbers "
            "in 3 chunks are 2 and 2. Here each rank needs one, be it empty; another function of "
            "torch keeps the number.",
        ),
        Misconception(
            "rest_left_out",
            _ring_rest_lost,
            "You leave out the numbers that do not fill the last chunk: they keep this rank's own "
            "values. Where n is not a multiple of world_size, some chunks are longer by one.",
        ),
        Misconception(
            "rest_in_the_last_chunk",
            _ring_rest_in_the_last,
            "You put all that is left over into the last chunk. Each step takes as long as the "
            "longest message of all ranks: 8 numbers on 3 ranks are 3, 3 and 2, not 2, 2 and 4. "
            "The lengths may differ by one.",
        ),
        Misconception(
            "only_multiples",
            _ring_even_only,
            "You cut into equal chunks, and that fails as soon as the number of elements is not a "
            "multiple of world_size. Some chunks may be shorter by one, or empty.",
        ),
        Misconception(
            "cut_along_rows",
            _ring_by_rows,
            "You cut the tensor along its first axis. A rank then sends too much where the rows do "
            "not divide well, and a number without axes cannot be cut at all: flatten first.",
        ),
        Misconception(
            "whole_tensor_round_the_ring",
            _ring_whole_tensor,
            "You send the whole tensor round the ring. The sum is right, but a rank sends "
            "(world_size - 1) n numbers instead of 2 (world_size - 1) / world_size n: 512 times as "
            "many with 1,024 ranks. Cut it into chunks first.",
        ),
        Misconception(
            "one_neighbour_only",
            _ring_with_a_neighbour,
            "You exchange the whole tensor with your neighbours once. That is a sum over two "
            "ranks: with more, what stands further off never arrives.",
        ),
        Misconception(
            "dist_all_reduce",
            _ring_by_all_reduce,
            "You call a collective of torch.distributed. This exercise is to build one yourself: "
            "from send and recv (or isend, irecv, batch_isend_irecv) between neighbours.",
        ),
        Misconception(
            "everyone_to_everyone",
            _ring_everyone_to_everyone,
            "You send the whole tensor to every other rank. The sum is right, but the traffic "
            "grows with the number of ranks; in a ring a rank speaks to its right neighbour only.",
        ),
        Misconception(
            "not_copied_alone",
            _ring_not_copied_alone,
            "With one process you return the caller's tensor itself. The result is a new tensor in "
            "every world: who writes to it must not change what was handed in.",
        ),
        Misconception(
            "in_float64",
            _ring_in_float64,
            "You convert to float64 for the sum. For float32 that doubles every message, and whole "
            "numbers above 2**53 lose digits: send the tensor in the dtype that it has.",
        ),
        Misconception(
            "in_float32",
            _ring_in_float32,
            "You convert to float32 for the sum, which costs a float64 tensor half of its digits. "
            "Buffers and chunks have the dtype of the tensor.",
        ),
        Misconception(
            "everyone_sends_first",
            _ring_blocking,
            "Every rank begins with a blocking send, which ends when the other side receives; and "
            "nobody gets as far as receiving. One of the two must be started without waiting.",
        ),
    ),
    alternatives=(
        _ring_two_loops,
        _ring_padded,
        _ring_rank_zero_last,
        _ring_in_a_batch,
        _ring_from_one_further,
    ),
    hints=(
        "Cut a flat copy into world_size chunks. In step 0 rank r sends chunk r to the right; "
        "what arrives from the left is chunk r - 1, to which it adds its own. Which chunk does it "
        "send next?",
        "In step s a rank sends chunk r - s and receives chunk r - s - 1, modulo world_size. After "
        "world_size - 1 steps what arrives is complete: it replaces instead of being added. A "
        "blocking send on all ranks at once never ends: start with isend or irecv.",
        "total.tensor_split(world_size) gives views, so that writing to a chunk writes to total. "
        "Each step: isend, recv into a buffer like the chunk, wait for the send, add or copy. At "
        "the end reshape total.",
    ),
)

# --- find the bug: the log that stops the training ----------------------------------------------


def logged_loss(loss):
    """The mean of the ranks' losses: a float on rank 0, which writes the log, None elsewhere.

    loss: 0-dim tensor; it is left as it is.
    """
    if dist.get_rank() != 0:
        return None
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _observe_logged_loss(logged_loss, see):
    with see.probe("one process alone"), alone():
        loss = see.randn(3, requires_grad=True).square().mean()
        logged = see.call("what it returns", _waited(see, logged_loss), loss)
        see.fact("what it returns is a Python number", isinstance(logged, float))
    for world_size in (2, 3):
        if not see.agrees:
            return
        also = "one that is NaN on rank 1" if world_size == 2 else "one that is 0 on rank 1"
        with see.probe(f"{world_size} processes, two losses one after the other, then {also}"):
            on_ranks(see, world_size, _losses, logged_loss)


def _losses(logged_loss, see):
    for name in ("the first loss", "the second loss"):
        weight = see.randn(4, requires_grad=True)
        loss = (weight * _mine(see, 4)).square().sum()
        logged = see.call(f"what it returns for {name}", _waited(see, logged_loss), loss)
        see.fact(
            f"what it returns for {name} is a Python number on rank 0, and None elsewhere",
            isinstance(logged, float) if dist.get_rank() == 0 else logged is None,
        )
        see.gradients(name, loss, weight=weight)
    made = {(call.name, call.peer) for call in calls()}
    elsewhere = {("reduce", rank) for rank in range(1, dist.get_world_size())}
    see.fact("the sum is made on rank 0", not made or not made <= elsewhere)
    loss = _mine(see).abs()
    if dist.get_world_size() == 2:
        if _everyone_but(1):
            see.call("what it returns when rank 1 calls later", logged_loss, loss)
        else:
            logged_loss(loss)
    # A rank that takes no part in this one must have nothing left to call.
    odd = torch.nan if dist.get_world_size() == 2 else 0.0
    loss = _mine(see).abs() * (odd if dist.get_rank() == 1 else -2 * dist.get_rank() + 1)
    see.call(f"what it returns where the loss of rank 1 is {odd:g}", logged_loss, loss)


def _logged_with(
    copy=lambda loss: loss.detach().clone(),
    reduce=lambda total: dist.all_reduce(total),
    shown=lambda total, rank, world_size: total.item() / world_size if rank == 0 else None,
):
    """Another copy, another collective, or another one who is told."""

    def logged_loss(loss):
        total = copy(loss)
        reduce(total)
        return shown(total, dist.get_rank(), dist.get_world_size())

    return logged_loss


def _logged_only_if(rank_calls):
    def logged_loss(loss):
        total = loss.detach().clone()
        if rank_calls(dist.get_rank()):
            dist.all_reduce(total)
        return total.item() / dist.get_world_size() if dist.get_rank() == 0 else None

    return logged_loss


_logged_on_zero = _logged_only_if(lambda rank: rank == 0)
_logged_without_zero = _logged_only_if(lambda rank: rank != 0)
_logged_own = _logged_with(
    reduce=lambda total: None,
    shown=lambda total, rank, world_size: total.item() if rank == 0 else None,
)
_logged_own_share = _logged_with(reduce=lambda total: dist.all_reduce(total.clone()))
_logged_sum = _logged_with(
    shown=lambda total, rank, world_size: total.item() if rank == 0 else None
)
_logged_everywhere = _logged_with(shown=lambda total, rank, world_size: total.item() / world_size)
_logged_zero_elsewhere = _logged_with(
    shown=lambda total, rank, world_size: total.item() / world_size if rank == 0 else 0.0
)
_logged_by_last = _logged_with(
    shown=lambda total, rank, world_size: (
        total.item() / world_size if rank == world_size - 1 else None
    )
)
_logged_by_the_others = _logged_with(
    shown=lambda total, rank, world_size: total.item() / world_size if rank else None
)
_logged_tensor = _logged_with(
    shown=lambda total, rank, world_size: total / world_size if rank == 0 else None
)
_logged_in_place = _logged_with(copy=lambda loss: loss.detach())
_logged_twice_divided = _logged_with(
    reduce=lambda total: dist.all_reduce(total, op=dist.ReduceOp.AVG)
)
_logged_of_two = _logged_with(
    shown=lambda total, rank, world_size: total.item() / 2 if rank == 0 else None
)
_logged_reduced_to_last = _logged_with(
    reduce=lambda total: dist.reduce(total, dist.get_world_size() - 1)
)
_logged_not_waited = _logged_with(reduce=lambda total: dist.all_reduce(total, async_op=True))


def _logged_if_finite(loss):
    if not torch.isfinite(loss):
        return None
    return reference.logged_loss(loss)


def _logged_if_not_zero(loss):
    total = loss.detach().clone()
    if total != 0:
        dist.all_reduce(total)
    return total.item() / dist.get_world_size() if dist.get_rank() == 0 else None


def _logged_by_reduce(loss):
    mean = loss.detach() / dist.get_world_size()
    dist.reduce(mean, 0)
    return float(mean) if not dist.get_rank() else None


def _logged_by_gather(loss):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = [torch.zeros_like(loss) for _ in range(world_size)] if rank == 0 else None
    dist.gather(loss.detach(), losses, dst=0)
    if rank == 0:
        return torch.stack(losses).mean().item()


def _logged_by_mean(loss):
    mean = reference.all_reduce_mean(loss.detach()).item()
    return mean if dist.get_rank() == 0 else None


def _logged_by_objects(loss):
    losses = [None] * dist.get_world_size()
    dist.all_gather_object(losses, loss.item())
    return sum(losses) / len(losses) if dist.get_rank() == 0 else None


def _logged_as_float32(loss, dst=0):
    total = torch.tensor([loss.item()])
    work = dist.all_reduce(total, async_op=True)
    work.wait()
    return (total / dist.get_world_size()).tolist()[0] if dist.get_rank() == dst else None


FIX_COLLECTIVE_ON_RANK_ZERO = Exercise(
    slug="fix_collective_on_rank_zero",
    chapter=5,
    title="Find the bug: the log that stops the training",
    minutes=10,
    difficulty=1,
    reference=reference.logged_loss,
    observe=_observe_logged_loss,
    rtol=1e-6,  # a number for the log: float32 will do
    atol=1e-7,
    shipped=logged_loss,
    symptom="With losses 1.0 and 2.0 on two processes, rank 0 should log 1.5. It logs nothing: "
    "after 0.5 s without any movement rank 0 is still waiting in all_reduce, while rank 1 has "
    "long finished.",
    misconceptions=(
        Misconception(
            "collective_on_rank_zero",  # museum 5.27
            _logged_on_zero,
            "You call the collective on rank 0 only. It waits for every rank of the group, and the "
            "others never come (after 30 minutes, gloo's default, it gives up). All ranks take "
            "part; only what is done with the result may depend on the rank.",
        ),
        Misconception(
            "own_loss",  # museum 5.25
            _logged_own,
            "You return rank 0's own loss. That no longer hangs, but the log shows one shard of "
            "the data, 1 / world_size of it, as if it were all.",
        ),
        Misconception(
            "own_share",  # museum 5.30
            _logged_own_share,
            "You divide rank 0's own loss by the number of ranks. What you read does not hold the "
            "sum: it has gone into a copy, or is not there yet when you read.",
        ),
        Misconception(
            "sum",  # museum 5.2
            _logged_sum,
            "You return the sum of the losses. The curve in the log then rises with the number of "
            "processes: 4 of them show four times the loss of one.",
        ),
        Misconception(
            "always_two",
            _logged_of_two,
            "You divide by 2, whatever the number of processes. Ask torch.distributed how many "
            "there are.",
        ),
        Misconception(
            "divided_twice",
            _logged_twice_divided,
            "You divide twice: ReduceOp.AVG has divided by the number of ranks already. One of the "
            "two divisions is enough.",
        ),
        Misconception(
            "everywhere",
            _logged_everywhere,
            "You return the mean on every rank. Each of them would write it into the log, which "
            "then has every line world_size times; all but rank 0 should return None.",
        ),
        Misconception(
            "zero_elsewhere",
            _logged_zero_elsewhere,
            "You return 0.0 on the ranks that do not write the log. That looks like a loss, and a "
            "good one; None says that there is nothing to write.",
        ),
        Misconception(
            "last_rank_logs",
            _logged_by_last,
            "The last rank gets the number, and rank 0 gets None. It is rank 0 that writes the "
            "log.",
        ),
        Misconception(
            "none_on_rank_zero",
            _logged_by_the_others,
            "Rank 0 gets None. Either no number is returned at all, or the question for the rank "
            "is the wrong way round: it is rank 0 that writes the log (0 counts as False).",
        ),
        Misconception(
            "reduced_to_the_last_rank",
            _logged_reduced_to_last,
            "You reduce to another rank than the one that reads the sum. What the tensor holds on "
            "rank 0 afterwards is not promised to anybody: with gloo it happens to be right. The "
            "destination of a reduce is the rank that needs the result.",
        ),
        Misconception(
            "returns_a_tensor",
            _logged_tensor,
            "You return a tensor. A log wants a Python number, which says the same on every device "
            "and holds no memory; a tensor of one element has a method that gives it.",
        ),
        Misconception(
            "loss_is_overwritten",
            _logged_in_place,
            "You reduce into the loss itself: detach() shares its memory, so that it holds the sum "
            "of the ranks afterwards. It belongs to the training step: reduce a copy.",
        ),
        Misconception(
            "not_waited",  # museum 5.10
            _logged_not_waited,
            "You start an asynchronous all_reduce and read the number without waiting. It may be "
            "this rank's own loss or the sum, whichever was faster.",
        ),
        Misconception(
            "nan_takes_no_part",
            _logged_if_finite,
            "A rank whose loss is NaN does not call the collective, and the others wait for it. "
            "Whether a collective is called must not depend on a rank's own loss; that the mean is "
            "NaN then is worth a line in the log.",
        ),
        Misconception(
            "collective_everywhere_else",
            _logged_without_zero,
            "Now all ranks but rank 0 call the collective, and wait for rank 0. A collective has "
            "to be called by every rank of the group: it must not stand under a question for the "
            "rank at all.",
        ),
        Misconception(
            "zero_takes_no_part",
            _logged_if_not_zero,
            "A rank whose loss is 0 does not call the collective, and the others wait for it. "
            "Whether a collective is called must not depend on a rank's own loss.",
        ),
    ),
    alternatives=(
        _logged_by_reduce,
        _logged_by_gather,
        _logged_by_mean,
        _logged_by_objects,
        _logged_as_float32,
    ),
    hints=(
        "Go through the function once as rank 0 and once as rank 1, and note every collective that "
        "each of them calls. What is rank 0 waiting for?",
        "A collective is called by all ranks of the group, also by those that do not need its "
        "result. Which line must not depend on the rank, and which one may?",
        "Clone and all_reduce on every rank first; ask for the rank after that.",
    ),
)

# --- broadcast_parameters -----------------------------------------------------------------------


class _Scale(nn.Module):
    """A parameter, and buffers of several kinds; one of them is not in the state_dict."""

    def __init__(self, features):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(features, dtype=torch.float64))
        self.register_buffer("running_mean", torch.empty(features, dtype=torch.float64))
        self.register_buffer("num_batches", torch.tensor(0))
        self.register_buffer("cosines", torch.empty(2, 3, dtype=torch.float64), persistent=False)


class _Model(nn.Module):
    """Parameters of several shapes at several depths: frozen, tied, without axes."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.empty((), dtype=torch.float64))
        self.shift = nn.Parameter(torch.empty(2, dtype=torch.float64))
        self.words = nn.Embedding(5, 3, dtype=torch.float64)
        self.body = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), _Scale(4))
        self.frozen = nn.Linear(4, 3, bias=False, dtype=torch.float64).requires_grad_(False)
        self.head = nn.Linear(3, 5, dtype=torch.float64)
        self.head.weight = self.words.weight


def _filled(see, model, rank, world_size):
    """Other values on every rank, and the same in every implementation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(see.randn(world_size, *parameter.shape)[rank])
        for buffer in model.buffers():
            values = see.randn(world_size, *buffer.shape)[rank]
            buffer.copy_(100 * values if buffer.dtype == torch.int64 else values)
    return model


def _observe_broadcast_parameters(broadcast_parameters, see):
    with see.probe("one process alone"), alone():
        _broadcast(broadcast_parameters, see)
    for world_size, src in ((2, ()), (3, (1,)), (3, (2,))):
        if not see.agrees:
            return
        where = f"src={src[0]}" if src else "from rank 0, which src is by default"
        with see.probe(f"{world_size} processes, {where}"):
            on_ranks(see, world_size, _broadcast, broadcast_parameters, *src)


def _broadcast(broadcast_parameters, see, *src):
    model = _filled(see, _Model(), dist.get_rank(), dist.get_world_size())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = see.randn(*parameter.shape)
    grads = {p: p.grad.clone() for p in model.parameters() if p.requires_grad}
    before = dict(model.named_parameters(remove_duplicate=False))
    places = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    _waited(see, broadcast_parameters)(model, *src)
    after = dict(model.named_parameters(remove_duplicate=False))
    same = after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    see.fact("the parameters are the same objects as before", same)
    if not same:  # the rest is about those that were there
        raise _EndProbe
    for name, parameter in model.named_parameters():
        see(f"{name} afterwards", parameter.detach())
    for name, buffer in model.named_buffers():
        see(f"the buffer {name} afterwards", buffer)
    kept = [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == places
    see.fact("parameters and buffers lie in the memory where they were", kept)
    see("whether they require a gradient", {n: p.requires_grad for n, p in after.items()})
    see.fact("they are still leaves of the graph", all(p.is_leaf for p in after.values()))
    kept = all(p.grad is not None and torch.equal(p.grad, grads[p]) for p in grads)
    see.fact("gradients are left as they were", kept)
    trains = all(part.training for part in model.modules())
    see.fact("the module is still in train mode, as it was before", trains)


def _broadcast_with(
    tensors=lambda module: [*module.parameters(), *module.buffers()],
    source=lambda src: src,
    send=lambda tensor, src: dist.broadcast(tensor.detach(), src),
):
    """Other tensors, another source, or another way to send."""

    def broadcast_parameters(module, src=0):
        for tensor in tensors(module):
            send(tensor, source(src))

    return broadcast_parameters


def _mean_of_floats(tensor, src):
    if tensor.is_floating_point():
        dist.all_reduce(tensor.detach())
        tensor.detach().div_(dist.get_world_size())
    else:
        dist.broadcast(tensor, src)


def _sum_of_all(tensor, src):
    dist.all_reduce(tensor.detach())


def _thawed(tensor, src):
    tensor.requires_grad_(False)
    dist.broadcast(tensor, src)
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(True)


def _frozen_for_good(tensor, src):
    dist.broadcast(tensor.requires_grad_(False), src)


def _only_by_source(tensor, src):
    if dist.get_rank() == src:
        dist.broadcast(tensor.detach(), src)


_broadcast_only_parameters = _broadcast_with(tensors=lambda module: list(module.parameters()))
_broadcast_state_dict = _broadcast_with(tensors=lambda module: module.state_dict().values())
_broadcast_trainable = _broadcast_with(
    tensors=lambda module: [
        *(p for p in module.parameters() if p.requires_grad),
        *module.buffers(),
    ]
)
_broadcast_own_level = _broadcast_with(
    tensors=lambda module: [*module.parameters(recurse=False), *module.buffers(recurse=False)]
)
_broadcast_first = _broadcast_with(tensors=lambda module: [next(module.parameters())])
_broadcast_float_buffers = _broadcast_with(
    tensors=lambda module: [
        t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()
    ]
)
_broadcast_from_zero = _broadcast_with(source=lambda src: 0)
_broadcast_from_last = _broadcast_with(source=lambda src: dist.get_world_size() - 1)
_broadcast_own_rank = _broadcast_with(
    send=lambda tensor, src: tensor.detach().copy_(tensor.detach())
)
_broadcast_copies = _broadcast_with(
    send=lambda tensor, src: dist.broadcast(tensor.detach().clone(), src)
)
_broadcast_mean = _broadcast_with(send=_mean_of_floats)
_broadcast_sum = _broadcast_with(send=_sum_of_all)
_broadcast_thawed = _broadcast_with(send=_thawed)
_broadcast_frozen = _broadcast_with(send=_frozen_for_good)
_broadcast_by_source = _broadcast_with(send=_only_by_source)
_broadcast_not_waited = _broadcast_with(
    send=lambda tensor, src: dist.broadcast(tensor.detach(), src, async_op=True)
)


def _broadcast_new_parameters(module, src=0):
    """New Parameter objects in place of the old ones; an optimizer made before has the old ones."""
    new = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in new:
                values = parameter.detach().clone()
                dist.broadcast(values, src)
                new[parameter] = nn.Parameter(values, parameter.requires_grad)
            setattr(part, name, new[parameter])
    for buffer in module.buffers():
        dist.broadcast(buffer, src)


def _broadcast_directly(module, src=0):
    """As one message for each kind of number, and copied back."""
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.broadcast(flat, src)
        for tensor, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(values.view(tensor.shape))


@torch.no_grad()
def _broadcast_by_object(module, src=0):
    tensors = [*module.buffers(), *module.parameters()]
    message = [[tensor.clone() for tensor in tensors] if dist.get_rank() == src else None]
    dist.broadcast_object_list(message, src=src)
    for tensor, values in zip(tensors, message[0], strict=True):
        tensor.copy_(values)


def _broadcast_by_sum(module, src=0):
    """All others add zeros."""
    for tensor in (*module.parameters(), *module.buffers()):
        if dist.get_rank() != src:
            tensor.data.zero_()
        dist.all_reduce(tensor.data)
    return module


def _broadcast_waited(module, src=0):
    works = [
        dist.broadcast(tensor.data, src=src, async_op=True)
        for part in module.modules()
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    ]
    for work in works:
        work.wait()


def _broadcast_by_assignment(module, src=0):
    """New memory behind the old parameters."""
    for tensor in (*module.parameters(), *module.buffers()):
        values = tensor.data.clone()
        dist.broadcast(values, src)
        tensor.data = values


def _broadcast_in_eval(module, src=0):
    reference.broadcast_parameters(module.eval(), src)


def _broadcast_without_gradients(module, src=0):
    module.zero_grad()
    reference.broadcast_parameters(module, src)


@torch.no_grad()
def _broadcast_by_messages(module, src=0):
    for tensor in (*module.parameters(), *module.buffers()):
        if dist.get_rank() == src:
            for rank in set(range(dist.get_world_size())) - {src}:
                dist.send(tensor, rank)
        else:
            dist.recv(tensor, src)


BROADCAST_PARAMETERS = Exercise(
    slug="broadcast_parameters",
    chapter=5,
    title="Start from the same weights",
    minutes=10,
    difficulty=2,
    reference=reference.broadcast_parameters,
    observe=_observe_broadcast_parameters,
    misconceptions=(
        Misconception(
            "nothing_sent",  # museum 5.4
            _broadcast_own_rank,
            "The ranks keep the parameters that they were made with: nothing that rank src has "
            "reaches them. Averaged gradients move all ranks by the same step, so ranks that start "
            "apart stay apart. If you broadcast a copy, what arrives is in the copy.",
        ),
        Misconception(
            "buffers_forgotten",  # museum 5.19
            _broadcast_only_parameters,
            "You send the parameters and leave the buffers. A batch norm's running statistics are "
            "buffers: with others on each rank the same model gives other answers in eval mode.",
        ),
        Misconception(
            "state_dict_only",
            _broadcast_state_dict,
            "You send what is in the state_dict. Buffers that were registered with "
            "persistent=False are not in it, and stay as each rank had them: ask the module for "
            "its buffers.",
        ),
        Misconception(
            "frozen_forgotten",
            _broadcast_trainable,
            "You skip the parameters that require no gradient. They take part in the forward pass "
            "all the same: frozen layers that differ make the ranks different models.",
        ),
        Misconception(
            "whole_numbers_forgotten",
            _broadcast_float_buffers,
            "You skip the tensors of whole numbers. A counter such as num_batches_tracked is a "
            "buffer too, and should be what it is on rank src.",
        ),
        Misconception(
            "own_level_only",
            _broadcast_own_level,
            "You send the parameters that belong to the module itself and not those of the modules "
            "inside it, which in most networks are all. Look at what recurse=False does.",
        ),
        Misconception(
            "first_parameter_only",  # museum 5.6
            _broadcast_first,
            "You send the first parameter and stop. The loop has to go through all of them, and "
            "through the buffers.",
        ),
        Misconception(
            "src_ignored",
            _broadcast_from_zero,
            "You always send what rank 0 has. Which rank is copied is the caller's choice: src is "
            "an argument, 0 only by default.",
        ),
        Misconception(
            "from_the_last_rank",  # museum §5
            _broadcast_from_last,
            "You send what the last rank has. The others should get the parameters of rank src.",
        ),
        Misconception(
            "averaged",
            _broadcast_mean,
            "You average instead of copying. The ranks agree afterwards, but on weights that none "
            "of them had: the mean of two initialisations is a smaller one, and of a loaded model "
            "and a new one it is neither.",
        ),
        Misconception(
            "added",
            _broadcast_sum,
            "You add up the ranks' tensors. They agree afterwards, on weights that are far too "
            "large. Another collective copies one rank's tensor to all.",
        ),
        Misconception(
            "new_parameters",  # museum F5
            _broadcast_new_parameters,
            "You put new parameters in the place of the old ones. An optimizer that was made "
            "before holds the old ones and goes on training those: write into the parameters that "
            "are there.",
        ),
        Misconception(
            "thawed",
            _broadcast_thawed,
            "You let every parameter require a gradient afterwards, those too that were frozen. "
            "From there on they are trained; requires_grad should be what it was.",
        ),
        Misconception(
            "frozen_afterwards",
            _broadcast_frozen,
            "You switch requires_grad off and leave it off. The values are right, but backward() "
            "no longer reaches any parameter. There is a way to the values that leaves the "
            "parameter's own setting alone.",
        ),
        Misconception(
            "not_waited",  # museum 5.10
            _broadcast_not_waited,
            "You start asynchronous broadcasts and return before they are done. The first forward "
            "pass may then see old weights: look at what the call returns.",
        ),
        Misconception(
            "new_memory",
            _broadcast_by_assignment,
            "You assign to .data, which gives the old parameters new memory. Whatever shares the "
            "old one (a view, a flat buffer) no longer sees them: write the values where the old "
            "ones are.",
        ),
        Misconception(
            "eval_mode",
            _broadcast_in_eval,
            "You put the module into eval mode and leave it there. Training then goes on without "
            "dropout, and batch norms no longer learn their statistics; sending needs no mode.",
        ),
        Misconception(
            "gradients_deleted",
            _broadcast_without_gradients,
            "You delete the gradients on the way. Values can be sent without touching .grad; when "
            "to zero gradients is decided by the training loop.",
        ),
        Misconception(
            "collective_on_the_source",  # museum 5.27
            _broadcast_by_source,
            "Only rank src calls broadcast. It sends, and the others never receive: each rank "
            "calls it, the source to send and the others to be written to.",
        ),
    ),
    alternatives=(
        _broadcast_directly,
        _broadcast_by_object,
        _broadcast_by_sum,
        _broadcast_waited,
        _broadcast_by_messages,
    ),
    hints=(
        "dist.broadcast(tensor, src) sends on rank src, and writes into the tensor everywhere "
        "else. Which tensors make a model what it is? Not all of them are trained.",
        "module.parameters() and module.buffers() go through the modules inside as well. A "
        "parameter that requires a gradient should be written without a record in the graph.",
        "tensor.detach() shares the memory and needs no graph: broadcast that, for each parameter "
        "and each buffer.",
    ),
)

# --- average_gradients --------------------------------------------------------------------------


class _Graded(nn.Module):
    """Parameters with gradients of their own making. `first` and `second` have one shape."""

    def __init__(self):
        super().__init__()
        for name, shape in (("bias", (5,)), ("first", (3, 4)), ("second", (3, 4)), ("gain", ())):
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=torch.float64)))
        self.inner = nn.Linear(2, 3, dtype=torch.float64)
        self.frozen = nn.Parameter(torch.empty(4, dtype=torch.float64), requires_grad=False)
        self.stale = nn.Parameter(torch.empty(2, dtype=torch.float64), requires_grad=False)


def _graded(see, without=()):
    """A model with other gradients on every rank; `stale` was frozen after it had got one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = _Graded()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(see.randn(world_size, *parameter.shape)[rank])
        gradient = see.randn(world_size, *parameter.shape)[rank].clone()
        if name != "frozen" and name not in without:
            parameter.grad = gradient
    return model


def _observe_average_gradients(average_gradients, see):
    with see.probe("one process alone"), alone():
        _averaged(average_gradients, see, {0: ("inner.weight",)})
    for world_size, missing, what in (
        (
            2,
            {0: ("first",), 1: ("second",)},
            "rank 0 has none for `first`, rank 1 for `second`; then rank 1 calls later",
        ),
        (3, dict.fromkeys(range(3), ("inner.weight",)), "no rank has one for `inner.weight`"),
    ):
        if not see.agrees:
            return
        with see.probe(f"{world_size} processes: first with all gradients, then {what}"):
            on_ranks(see, world_size, _averaged, average_gradients, missing)


def _averaged(average_gradients, see, missing):
    for when in ("", " in the second step"):
        without = missing.get(dist.get_rank(), ()) if when else ()
        model = _graded(see, without)
        values = [parameter.detach().clone() for parameter in model.parameters()]
        begun = len(calls())
        _waited(see, average_gradients)(model)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, parameter in sorted(trained, key=lambda pair: pair[0] in without):
            if dist.get_world_size() == 1 and name in without:  # that it is there: see below
                zeros = parameter.grad is None or not parameter.grad.any()
                see.fact("what takes the place of a missing gradient is zero", zeros)
            else:
                see(f"gradient of {name}{when}", parameter.grad)
        see(f"gradient of the frozen parameter{when}", model.frozen.grad)
        see(f"gradient that a frozen parameter had before{when}", model.stale.grad)
        kept = all(map(torch.equal, model.parameters(), values))
        see.fact(f"the parameters themselves are left as they were{when}", kept)
        see.fact(f"something was sent{when}", len(calls()) > begun or dist.get_world_size() == 1)
    if dist.get_world_size() == 2:
        model = _graded(see)
        others = _everyone_but(1)
        average_gradients(model)
        if others:
            see("gradient of first, when rank 1 calls later", model.first.grad)
            see("gradient of inner.bias, when rank 1 calls later", model.inner.bias.grad)


def _summed(gradient):
    dist.all_reduce(gradient)


def _meant(gradient):
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()


def _gradients_with(
    parameters=lambda module: [p for p in module.parameters() if p.requires_grad],
    missing=torch.zeros_like,
    average=_meant,
):
    """Other parameters, another answer to a missing gradient, or another average."""

    def average_gradients(module):
        for parameter in parameters(module):
            if parameter.grad is None:
                parameter.grad = missing(parameter)
            average(parameter.grad)

    return average_gradients


def _copy_summed(gradient):
    dist.all_reduce(gradient.clone())


def _copy_meant(gradient):
    dist.all_reduce(gradient.clone())
    gradient /= dist.get_world_size()


def _twice_divided(gradient):
    gradient /= dist.get_world_size()
    _meant(gradient)


def _mean_of_its_elements(gradient):
    _meant(gradient)
    gradient.fill_(gradient.mean())


def _meant_on_rank_zero(gradient):
    dist.reduce(gradient, 0)
    if dist.get_rank() == 0:
        gradient /= dist.get_world_size()


def _meant_by_rank_zero(gradient):
    if dist.get_rank() == 0:
        _meant(gradient)


def _sent_by_rank_zero(gradient):
    dist.broadcast(gradient, 0)


def _started(gradient):
    dist.all_reduce(gradient, async_op=True)
    gradient /= dist.get_world_size()


_gradients_summed = _gradients_with(average=_summed)
_gradients_of_two = _gradients_with(
    average=lambda gradient: (dist.all_reduce(gradient), gradient.div_(2))
)
_gradients_twice_divided = _gradients_with(average=_twice_divided)
_gradients_own = _gradients_with(average=_copy_summed)
_gradients_own_share = _gradients_with(average=_copy_meant)
_gradients_alone = _gradients_with(parameters=lambda module: [])
_gradients_of_elements = _gradients_with(average=_mean_of_its_elements)
_gradients_on_rank_zero = _gradients_with(average=_meant_on_rank_zero)
_gradients_by_rank_zero = _gradients_with(average=_meant_by_rank_zero)
_gradients_of_rank_zero = _gradients_with(average=_sent_by_rank_zero)
_gradients_not_waited = _gradients_with(average=_started)
_gradients_first = _gradients_with(parameters=lambda module: [next(module.parameters())])
_gradients_weights = _gradients_with(
    parameters=lambda module: [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
)
_gradients_own_level = _gradients_with(
    parameters=lambda module: [p for p in module.parameters(recurse=False) if p.requires_grad]
)
_gradients_frozen_too = _gradients_with(parameters=lambda module: list(module.parameters()))
_gradients_stale_too = _gradients_with(
    parameters=lambda module: [
        p for p in module.parameters() if p.requires_grad or p.grad is not None
    ]
)
_gradients_skipped = _gradients_with(
    parameters=lambda module: [
        p for p in module.parameters() if p.requires_grad and p.grad is not None
    ]
)
_gradients_missing_last = _gradients_with(
    parameters=lambda module: sorted(
        (p for p in module.parameters() if p.requires_grad), key=lambda p: p.grad is None
    )
)
_gradients_unchecked = _gradients_with(missing=lambda parameter: None)
_gradients_of_ones = _gradients_with(missing=torch.ones_like)


_gradients_of_float32 = _gradients_with(missing=lambda parameter: torch.zeros(parameter.shape))
_gradients_named_weight = _gradients_with(
    parameters=lambda module: [
        p for name, p in module.named_parameters() if p.requires_grad and "weight" in name
    ]
)


def _gradients_without_frozen(module):
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
    reference.average_gradients(module)


def _gradients_of_those_who_have_one(module):
    """Divided by the number of ranks that have a gradient, not by all."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            count = torch.tensor(0.0 if parameter.grad is None else 1.0)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            dist.all_reduce(count)
            parameter.grad /= max(count.item(), 1.0)


def _gradients_none_again(module):
    """Zeros are sent for a missing gradient, and what comes back is thrown away."""
    without = [p for p in module.parameters() if p.grad is None]
    reference.average_gradients(module)
    for parameter in without:
        parameter.grad = None


def _parameters_averaged(module):
    """The parameters instead of their gradients."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            _meant(parameter.data)


def _flat_not_copied_back(module):
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()


def _gradients_in_one_message(module):
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads]) / dist.get_world_size()
    dist.all_reduce(flat)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def _gradients_by_all_reduce_mean(module):
    for _, parameter in module.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            parameter.grad = reference.all_reduce_mean(
                torch.zeros_like(parameter.data) if grad is None else grad
            )


def _gradients_all_started(module, group=None):
    works = []
    for parameter in reversed(list(module.parameters())):
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros(parameter.shape, dtype=parameter.dtype)
            op = dist.ReduceOp.AVG
            works.append(dist.all_reduce(parameter.grad, op=op, group=group, async_op=True))
    [work.wait() for work in works]


@torch.no_grad()
def _gradients_by_gather(module):
    for parameter in filter(lambda p: p.requires_grad, module.parameters()):
        own = parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        parameter.grad = torch.stack(every).mean(0)


AVERAGE_GRADIENTS = Exercise(
    slug="average_gradients",
    chapter=5,
    title="Average the gradients",
    minutes=15,
    difficulty=2,
    reference=reference.average_gradients,
    observe=_observe_average_gradients,
    misconceptions=(
        Misconception(
            "sum",  # museum 5.2
            _gradients_summed,
            "You leave the sum in the gradients. Every step becomes world_size times too long, as "
            "if the learning rate had been multiplied: the mean is asked for.",
        ),
        Misconception(
            "nothing_sent",  # museum 5.5
            _gradients_alone,
            "Nothing is sent: every rank keeps its own gradients, and after one step the ranks "
            "have other weights. Each gradient has to go through a collective.",
        ),
        Misconception(
            "result_left_in_a_copy",  # museum 5.7, 5.30
            _gradients_own,
            "The ranks do communicate, but the gradients are what they were before your call. "
            "clone(), cat() and flatten() may make copies: what is reduced in a copy has to be "
            "written back.",
        ),
        Misconception(
            "own_gradient_divided",  # museum 5.30
            _gradients_own_share,
            "You divide this rank's own gradient by the number of ranks, and the sum is nowhere in "
            "it: it has gone into a copy, or comes too late. The ranks take different steps.",
        ),
        Misconception(
            "always_two",
            _gradients_of_two,
            "You divide by 2, whatever the number of processes. With one process the gradients are "
            "halved, with more than two they are too large: ask for the world size.",
        ),
        Misconception(
            "divided_twice",  # museum 5.3
            _gradients_twice_divided,
            "You divide by the number of ranks twice, so the step is world_size times too short. "
            "Before the sum or after it, but only once.",
        ),
        Misconception(
            "mean_over_elements",
            _gradients_of_elements,
            "You average over the elements of a gradient as well, so that all of them become "
            "equal. The mean is over the ranks, element by element.",
        ),
        Misconception(
            "parameters_averaged",  # museum 5.11
            _parameters_averaged,
            "You average the parameters and leave their gradients alone. With SGD that happens to "
            "come out the same after a step; with AdamW it does not, as each rank's moments see "
            "its own gradients only. It is .grad that has to be averaged.",
        ),
        Misconception(
            "rank_zero_only",
            _gradients_on_rank_zero,
            "Only rank 0 gets the mean: reduce leaves its result on one rank. All ranks take the "
            "step, so all of them need it.",
        ),
        Misconception(
            "gradients_of_rank_zero",
            _gradients_of_rank_zero,
            "You give every rank the gradients of rank 0. The ranks agree, but what the others "
            "have computed is thrown away: that is training on one shard.",
        ),
        Misconception(
            "first_parameter_only",  # museum 5.6
            _gradients_first,
            "You average the gradient of the first parameter and leave all others. The loop has to "
            "go through the whole module.",
        ),
        Misconception(
            "matrices_only",
            _gradients_weights,
            "You leave out the parameters with fewer than two axes: biases and gains. Their "
            "gradients differ between the ranks like all others.",
        ),
        Misconception(
            "named_weight_only",
            _gradients_named_weight,
            "You average only parameters with `weight` in their name. Biases, and parameters that "
            "a module calls otherwise, have gradients that differ between the ranks too.",
        ),
        Misconception(
            "own_level_only",
            _gradients_own_level,
            "You average the gradients of the module's own parameters and not of those inside its "
            "layers. Look at what recurse=False does.",
        ),
        Misconception(
            "frozen_get_zeros",
            _gradients_frozen_too,
            "You treat frozen parameters like the others, so that they have a gradient afterwards "
            "(zeros, where there was none). AdamW's weight decay then shrinks them in every step: "
            "what does not require a gradient is left alone.",
        ),
        Misconception(
            "frozen_averaged",
            _gradients_stale_too,
            "You average whatever has a gradient, also of a parameter that is frozen and still "
            "holds one from before. Ask whether the parameter requires a gradient.",
        ),
        Misconception(
            "frozen_deleted",
            _gradients_without_frozen,
            "You delete the gradient that a frozen parameter still holds. What does not require a "
            "gradient is left alone, with whatever it has.",
        ),
        Misconception(
            "missing_skipped",  # museum 5.8
            _gradients_skipped,
            "You skip a parameter that has no gradient on this rank. Another rank may have one: "
            "then the collectives no longer match, and one rank's `first` is added to another's "
            "`second`, without any error where the shapes agree. Every rank makes the same calls.",
        ),
        Misconception(
            "missing_come_last",  # museum 5.8
            _gradients_missing_last,
            "The order of your calls depends on which gradients a rank has, so that ranks add "
            "gradients of different parameters. Collectives are matched by order alone: every "
            "rank goes through the parameters in the same one.",
        ),
        Misconception(
            "missing_not_expected",
            _gradients_unchecked,
            "You hand .grad to the collective also where it is None, as it is for a parameter that "
            "this rank's loss did not use. Such a rank adds zeros.",
        ),
        Misconception(
            "missing_counts_as_ones",
            _gradients_of_ones,
            "You let a missing gradient count as ones. A parameter that the loss did not use has "
            "no influence on it: its share of the sum is zero.",
        ),
        Misconception(
            "missing_counts_as_float32",
            _gradients_of_float32,
            "You put zeros of torch's default dtype in the place of a missing gradient. A gradient "
            "has the dtype of its parameter, here float64: make the zeros like the parameter.",
        ),
        Misconception(
            "missing_not_counted",
            _gradients_of_those_who_have_one,
            "You divide by the number of ranks that have a gradient. The loss is the mean over all "
            "ranks, and those that do not use the parameter count with zero: divide by the world "
            "size.",
        ),
        Misconception(
            "missing_stays_missing",
            _gradients_none_again,
            "A rank without a gradient takes part, and has none afterwards. The others then step "
            "with this parameter, and it does not: the mean belongs on every rank.",
        ),
        Misconception(
            "not_waited",  # museum 5.10
            _gradients_not_waited,
            "You start an asynchronous all_reduce and go on without waiting for it. What the "
            "gradient holds then depends on who was faster: look at what the call returns.",
        ),
        Misconception(
            "collective_on_rank_zero",  # museum 5.27
            _gradients_by_rank_zero,
            "Only rank 0 calls the collective, and waits there for the others, who never come. "
            "Every rank calls it, for every parameter.",
        ),
    ),
    alternatives=(
        _gradients_in_one_message,
        _gradients_by_all_reduce_mean,
        _gradients_all_started,
        _gradients_by_gather,
    ),
    hints=(
        "One all_reduce for each parameter, in the same order on every rank. Which parameters take "
        "part, and what may differ between ranks: that a gradient is there at all?",
        "Skip what does not require a gradient: that is the same on all ranks. Do not skip what "
        "has none on this rank: give it zeros, so that it can take part.",
        "For each parameter that requires a gradient: where .grad is None put zeros like it; "
        "all_reduce .grad, then divide it by the world size in place.",
    ),
)


# --- what several of them observe with ----------------------------------------------------------


class _Late:
    """An asynchronous all_reduce whose sum is in the tensor once it was waited for, not before.

    What stands there earlier is a matter of luck; here it is always what was there at the call.
    """

    def __init__(self, work, tensor, total, wire):
        self._work, self._tensor, self._total, self._wire = work, tensor, total, wire
        wire.on_the_way += 1

    def _arrive(self, future=None):
        if self._total is not None:
            self._tensor.detach().copy_(self._total)
            self._total = None
            self._wire.on_the_way -= 1
        return [self._tensor]

    def wait(self, *args, **kwargs):
        self._wire.waits += self._wire.in_backward
        done = self._work.wait(*args, **kwargs)
        self._arrive()
        return done

    def is_completed(self):
        done = self._work.is_completed()
        if done:
            self._arrive()
        return done

    def result(self):
        return self._arrive()

    def get_future(self):
        return self._work.get_future().then(self._arrive)

    def __getattr__(self, name):
        return getattr(self._work, name)


@contextmanager
def _late_sums():
    """dist.all_reduce with late sums. What it yields counts the waits while `in_backward`, and the
    sums that nobody has waited for."""
    original = dist.all_reduce
    wire = SimpleNamespace(in_backward=False, waits=0, on_the_way=0)

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if not async_op:
            wire.waits += wire.in_backward
            return original(tensor, op, group)
        total = tensor.detach().clone()
        return _Late(original(total, op, group, True), tensor, total, wire)

    dist.all_reduce = all_reduce
    try:
        yield wire
    finally:
        dist.all_reduce = original


class _Net(nn.Module):
    """One weight used in two layers, a frozen one, one added to activations of its own shape, and
    buffers of which one is in no state_dict. `at` is called when backward comes to a layer."""

    def __init__(self, see):
        super().__init__()
        self.places = nn.Parameter(torch.empty(5, 4))
        self.first = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4, bias=False)
        self.twice = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 2)
        self.register_buffer("shift", torch.empty(4))
        self.register_buffer("scale", torch.empty(2), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.double()
        self.again.weight = self.twice.weight
        self.frozen.requires_grad_(False)
        with torch.no_grad():
            for tensor in [*self.parameters(), self.shift, self.scale]:
                tensor.copy_(see.randn(*tensor.shape))
        self.at = lambda layer: None

    def forward(self, x, shift=0.0, *, factor=1.0):
        h = torch.tanh(self.first(x) + shift) + self.places  # (5, 4)
        h1 = torch.tanh(self.twice(h))
        h2 = torch.tanh(self.again(self.frozen(h1) + self.shift))
        for layer, output in (("first", h), ("twice", h1), ("again", h2)):
            output.register_hook(lambda grad, layer=layer: self.at(layer))
        return self.last(h2) * self.scale * factor  # (5, 2)


def _apart(module):
    """`module` with other values on every rank."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor += dist.get_rank()
    return module


def _see_start(see, module):
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        see(f"{name} at the start", tensor.detach())


def _see_gradients(see, module, when):
    for name, parameter in module.named_parameters():
        see(f"gradient of {name} after {when}", parameter.grad)


def _tell(folder, told):
    """Leaves `told` for the process that observes, which compares the ranks with each other."""
    if folder is not None:
        Path(folder, str(dist.get_rank())).write_text(json.dumps(told))


def _is_there(folder, name, seconds=2.5):
    """Whether the file is there, or comes in time."""
    end = time.monotonic() + seconds
    while not Path(folder, name).exists() and time.monotonic() < end:
        time.sleep(0.001)
    return Path(folder, name).exists()


@contextmanager
def _on_ranks_that_tell(see, world_size, scenario, *args):
    """Runs scenario(*args, folder=...) on the ranks, and yields what each has told."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(see, world_size, partial(scenario, folder=folder), *args)
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        yield [json.loads(file.read_text()) if file.exists() else None for file in files]


def _batch(see):
    """This rank's inputs (5, 3) and a gradient for the outputs (5, 2)."""
    x, upstream = (see.randn(dist.get_world_size(), 5, size) for size in (3, 2))
    return x[dist.get_rank()], upstream[dist.get_rank()]


# --- average_in_one_message ---------------------------------------------------------------------


def _observe_average_in_one_message(average_in_one_message, see):
    four, two = ((4, 3), (), (5,), (2, 1, 3)), ((2, 2), (7,))
    with see.probe(f"one process alone, gradients of shapes {four}"), alone():
        _average_list(average_in_one_message, see, four)
    if not see.agrees:
        return
    for world_size, shapes in ((2, four), (3, two)):
        with see.probe(f"{world_size} processes, gradients of shapes {shapes}"):
            on_ranks(see, world_size, _average_list, average_in_one_message, shapes)


def _average_list(average_in_one_message, see, shapes):
    gradients = [see.randn(dist.get_world_size(), *shape)[dist.get_rank()] for shape in shapes]
    if dist.get_rank() == 1:
        gradients[-1].zero_()  # the other ranks' are not
    given = list(gradients)
    before = len(calls())
    with _late_sums() as wire:
        average_in_one_message(gradients)
    for number, gradient in enumerate(given, 1):
        see(f"gradient {number}", gradient)
    see.fact(
        "the list holds the same tensors as before",
        len(gradients) == len(given)
        and all(one is other for one, other in zip(gradients, given, strict=True)),
    )
    see.fact("the message is waited for", wire.on_the_way == 0)
    if dist.get_world_size() > 1:  # with that many, the values have told what they can
        names = [call.name for call in calls()[before:] if call.name != "barrier"]
        reduced = sum(name.startswith("all_reduce") for name in names)
        see("calls of all_reduce beyond the one", max(0, reduced - 1))
        see("messages of another kind than all_reduce", len(names) - reduced)


def average_in_one_message(gradients):
    """Replace each tensor of a list by its mean over the ranks, in place, with one all_reduce.

    gradients: tensors of any shapes and one dtype, in the same order on all ranks.
    """
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _in_one_message(reduce):
    """An answer that copies back what `reduce` makes of the flat tensor."""

    def average_in_one_message(gradients):
        flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]), gradients)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    return average_in_one_message


def _totalled(flat):
    dist.all_reduce(flat)
    return flat


_one_message_sum = _in_one_message(lambda flat, gradients: _totalled(flat))
_one_message_own = _in_one_message(lambda flat, gradients: flat / dist.get_world_size())
_one_message_without_waiting = _in_one_message(
    lambda flat, gradients: _sent_off(flat) / dist.get_world_size()
)
_one_message_two = _in_one_message(lambda flat, gradients: _totalled(flat) / 2)
_one_message_list = _in_one_message(lambda flat, gradients: _totalled(flat) / len(gradients))
_one_message_floor = _in_one_message(
    lambda flat, gradients: _totalled(flat) // dist.get_world_size()
)
_one_message_whole = _in_one_message(
    lambda flat, gradients: torch.full_like(flat, _mean_over(flat))
)
_one_message_numel = _in_one_message(
    lambda flat, gradients: _totalled(flat) / dist.get_world_size() / flat.numel()
)
_one_message_divided_twice = _in_one_message(
    lambda flat, gradients: _totalled(flat / dist.get_world_size()) / dist.get_world_size()
)
_one_message_single = _in_one_message(
    lambda flat, gradients: (_totalled(flat.float()) / dist.get_world_size()).to(flat.dtype)
)


def _sent_off(flat):
    dist.all_reduce(flat, async_op=True)
    return flat


def _mean_over(flat):
    return (_totalled(flat) / dist.get_world_size()).mean().item()


def _one_message_kept(gradients):
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient = piece.view_as(gradient)


def _one_message_new_list(gradients):
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    gradients[:] = [piece.view_as(g) for g, piece in zip(gradients, pieces, strict=True)]


def _many_messages(gradients):
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()


def _one_message_from_its_start(gradients):
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient in gradients:
        gradient.copy_(flat[: gradient.numel()].view_as(gradient))


def _one_message_first_only(gradients):
    flat = gradients[0].flatten().clone()
    dist.all_reduce(flat)
    gradients[0].copy_(flat.view_as(gradients[0]) / dist.get_world_size())


def _one_message_rank_zero(gradients):
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    if dist.get_rank() == 0:
        pieces = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def _one_message_gathered(gradients):
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    pieces = torch.stack(parts).mean(dim=0).split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _one_message_without_zeros(gradients):
    reference.average_in_one_message([gradient for gradient in gradients if gradient.any()])


def _one_message_that_asks(gradients):
    """The number of ranks is summed in a message of its own."""
    ranks = torch.ones(())
    dist.all_reduce(ranks)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    pieces = (flat / ranks).split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def _one_message_by_place(gradients):
    flat = torch.empty(sum(gradient.numel() for gradient in gradients), dtype=gradients[0].dtype)
    start, places = 0, []
    for gradient in gradients:
        places.append(flat[start : start + gradient.numel()].view(gradient.shape))
        places[-1].copy_(gradient)
        start += gradient.numel()
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    for place, gradient in zip(places, gradients, strict=True):
        gradient.copy_(place)


def _one_message_by_average(gradients):
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    nn.utils.vector_to_parameters(flat, gradients)
    for gradient in gradients:
        gradient += 0
    return gradients


def _one_message_waiting(gradients):
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, async_op=True).wait()
    for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.zero_().add_(mean, alpha=1 / dist.get_world_size())


FIX_SUM_FOR_MEAN = Exercise(
    slug="fix_sum_for_mean",
    chapter=5,
    title="Find the bug: gradients that are too large on every rank",
    minutes=6,
    difficulty=1,
    reference=reference.average_in_one_message,
    observe=_observe_average_in_one_message,
    shipped=average_in_one_message,
    symptom="Two ranks, one with gradients of 1 and one with gradients of 3, both hold 4 after the "
    "call. It should be 2.",
    misconceptions=(
        Misconception(
            "sum",  # museum 5.2
            _one_message_sum,
            "You leave the sum over the ranks in the gradients. It is world_size times the mean, "
            "so that every step of SGD is that much too long; the ranks agree with each other, and "
            "nothing else shows it. Look at what is done between the sum and the copies.",
        ),
        Misconception(
            "own",  # museum 5.5
            _one_message_own,
            "You divide each rank's own gradients, and nothing of the other ranks is in them: no "
            "sum over the ranks is formed. Look at what each rank gets to know of the others.",
        ),
        Misconception(
            "without_waiting",  # museum 5.10
            _one_message_without_waiting,
            "You start the all_reduce and go on without waiting for it. What you divide is this "
            "rank's own gradients, or the sum, as the network pleases; wait for the work that an "
            "asynchronous call returns.",
        ),
        Misconception(
            "always_two",
            _one_message_two,
            "You divide by 2 whatever the number of processes. On three the gradients are half as "
            "large again as they should be; ask the group how many processes it has.",
        ),
        Misconception(
            "length_of_the_list",
            _one_message_list,
            "You divide by the number of gradients in the list. A mean over the ranks divides the "
            "sum by the number of ranks, however many tensors travel in the message.",
        ),
        Misconception(
            "divided_twice",
            _one_message_divided_twice,
            "You divide by the number of processes twice. One division gives the mean, before the "
            "sum or after it (ReduceOp.AVG divides too); two give gradients that are world_size "
            "times too small.",
        ),
        Misconception(
            "divided_by_elements_too",  # museum 5.3
            _one_message_numel,
            "Beside the number of processes you divide by the number of elements (the mean over "
            "the samples is already in each rank's gradient). Only the sum over the ranks is left "
            "to be divided.",
        ),
        Misconception(
            "rounded_down",
            _one_message_floor,
            "You divide with `//`, which rounds every value down to a whole number. Gradients of "
            "the order of 1 become -1, 0 or 1.",
        ),
        Misconception(
            "mean_over_elements",
            _one_message_whole,
            "You give all elements of all gradients one and the same value, the mean over "
            "everything. The mean over the ranks is taken for each element on its own.",
        ),
        Misconception(
            "in_single_precision",
            _one_message_single,
            "You send the gradients as float32. They are float64 here, and come back with seven "
            "digits; the message should have the dtype of the gradients.",
        ),
        Misconception(
            "not_copied_back",  # museum 5.7, 5.30
            _one_message_kept,
            "Your gradients are what they were before the call. The flat tensor is a copy; what "
            "all_reduce and the division do to it reaches no gradient unless it is written into "
            "the tensors of the list, and giving a name in a loop a new value writes nothing.",
        ),
        Misconception(
            "new_list",
            _one_message_new_list,
            "You put new tensors into the list. The parameters' `.grad` still are the old tensors, "
            "with the values of this rank alone; the means have to be written into those.",
        ),
        Misconception(
            "from_its_start",
            _one_message_from_its_start,
            "You fill every gradient from the beginning of the flat tensor. Each has its own part "
            "there, which begins where the one before it ends.",
        ),
        Misconception(
            "first_only",  # museum 5.6
            _one_message_first_only,
            "You average the first gradient of the list only. The others keep the values of their "
            "own rank, and the ranks' weights drift apart from the first step on.",
        ),
        Misconception(
            "rank_zero_only",
            _one_message_rank_zero,
            "Only rank 0 writes the means into its gradients. Every rank takes a step of its own, "
            "so each needs them.",
        ),
        Misconception(
            "one_message_each",
            _many_messages,
            "The means are right, and you send one message for each gradient. The exercise asks "
            "for one all_reduce of one flat tensor: each message costs the same time to start, "
            "however short it is.",
        ),
        Misconception(
            "a_message_to_count_ranks",
            _one_message_that_asks,
            "The means are right, and there is one all_reduce more than the one that carries the "
            "gradients. The group knows how many ranks it has; to ask for that costs no message.",
        ),
        Misconception(
            "gathered",
            _one_message_gathered,
            "The means are right, and you gather the gradients of all ranks instead of summing "
            "them on the way. Each rank then receives and holds world_size times as much; one "
            "all_reduce gives the sum without that.",
        ),
        Misconception(
            "zeros_left_out",
            _one_message_without_zeros,
            "You leave out a gradient that is zero on this rank. On another rank it may not be, "
            "so that the flat tensors differ in length and nothing fits together; every tensor of "
            "the list travels, whatever it holds.",
        ),
    ),
    alternatives=(_one_message_by_place, _one_message_by_average, _one_message_waiting),
    hints=(
        "Run it on two ranks with gradients that you can add in your head, 1 and 3.",
        "all_reduce leaves the sum of the ranks' tensors on every rank. What is between a sum and "
        "a mean?",
        "One division is missing: of the flat tensor by dist.get_world_size(), before its pieces "
        "are copied back.",
    ),
)


# --- prepare_rank -------------------------------------------------------------------------------


class _Samples(torch.utils.data.Dataset):
    """The numbers below n, by a map-style data set that has nothing else, and counts readings."""

    def __init__(self, n):
        self.n, self.reads = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        self.reads += 1
        return (torch.tensor(index),)


def _no_group(group=None):
    raise ValueError(
        "Default process group has not been initialized, please make sure to call "
        "init_process_group."
    )


@contextmanager
def _without_a_group():
    """What the arguments say is all that there is: no process group, and nothing of torchrun."""
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(dist, "get_rank", _no_group),
        mock.patch.object(dist, "get_world_size", _no_group),
        mock.patch.object(dist, "is_initialized", lambda: False),
        mock.patch.object(torch.cuda, "set_device", lambda device: None),
    ):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        yield


def _observe_prepare_rank(prepare_rank, see):
    for n, batch_size, rank, local_rank, world_size, device_type in (
        (23, 2, 5, 1, 6, "cuda"),
        (23, 4, 2, 2, 6, "cuda"),
        (17, 3, 1, 1, 2, "cpu"),
        (8, 5, 0, 0, 1, "xpu"),
    ):
        name = f"rank {rank} of {world_size}, local rank {local_rank}, {n} samples in batches of "
        with see.probe(f"{name}{batch_size}, {device_type!r}"), _without_a_group():
            dataset = _Samples(n)
            before = torch.get_rng_state()
            device, loader = prepare_rank(
                dataset, batch_size, rank, local_rank, world_size, device_type
            )
            same = torch.equal(before, torch.get_rng_state())
            is_device = isinstance(device, torch.device)
            if device_type == "cpu":  # cpu:1 is the CPU too
                device = torch.device(device).type
            see("the device", device)
            see.fact("the device is a torch.device", is_device)
            see.fact("no sample is read before the loader is used", dataset.reads == 0)
            see.fact("torch's random generator is left as it is", same)
            first = [batch.tolist() for (batch,) in loader]
            see("the samples of epoch 0, sorted", sorted(sum(first, [])))
            see("the batches of epoch 0", first)
            sampler = loader.sampler
            if not hasattr(sampler, "set_epoch"):  # it may be inside a batch sampler
                sampler = getattr(loader.batch_sampler, "sampler", None)
            see.fact("the loader's sampler has set_epoch", hasattr(sampler, "set_epoch"))
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(1)
            see("the batches of epoch 1", [batch.tolist() for (batch,) in loader])


def prepare_rank(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    """(device, loader): where this rank computes, and its own part of the data in batches.

    rank counts the processes of all machines, local_rank those of this machine. The device is
    number local_rank of its type, or the CPU where device_type is "cpu". The loader shuffles
    through a DistributedSampler (seed 0), whose set_epoch the training loop calls.
    """
    device = torch.device(device_type)
    return device, torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)


def _device(device_type, number):
    return torch.device("cpu") if device_type == "cpu" else torch.device(device_type, number)


def _prepare_with(
    device=lambda rank, local_rank, device_type: _device(device_type, local_rank),
    sampler=lambda dataset, rank, local_rank, world_size: torch.utils.data.DistributedSampler(
        dataset, num_replicas=world_size, rank=rank
    ),
    loader=lambda dataset, batch_size, sampler, world_size: torch.utils.data.DataLoader(
        dataset, batch_size, sampler=sampler
    ),
):
    def prepare_rank(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
        own = sampler(dataset, rank, local_rank, world_size)
        return device(rank, local_rank, device_type), loader(dataset, batch_size, own, world_size)

    return prepare_rank


def _sampling(**settings):
    """A DistributedSampler with other settings, each of them a function of the ranks."""

    def sampler(dataset, rank, local_rank, world_size):
        told = {"num_replicas": lambda rank, local_rank, world_size: world_size}
        told |= {"rank": lambda rank, local_rank, world_size: rank} | settings
        told = {name: value(rank, local_rank, world_size) for name, value in told.items()}
        return torch.utils.data.DistributedSampler(dataset, **told)

    return sampler


def _shuffled_by_the_loader(dataset, batch_size, sampler, world_size):
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)


def _prepare_alike(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    device = torch.device(device_type)
    return device, torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)


_prepare_same_device = _prepare_with(device=lambda rank, local_rank, kind: torch.device(kind))
_prepare_first_device = _prepare_with(device=lambda rank, local_rank, kind: _device(kind, 0))
_prepare_device_of_rank = _prepare_with(device=lambda rank, local_rank, kind: _device(kind, rank))
_prepare_always_cuda = _prepare_with(
    device=lambda rank, local_rank, kind: torch.device("cuda", local_rank)
)
_prepare_same_data = _prepare_with(loader=_shuffled_by_the_loader)
_prepare_both = _prepare_with(
    loader=lambda dataset, batch_size, sampler, world_size: torch.utils.data.DataLoader(
        dataset, batch_size, sampler=sampler, shuffle=True
    )
)
_prepare_local_part = _prepare_with(
    sampler=_sampling(rank=lambda rank, local_rank, world_size: local_rank)
)
_prepare_first_part = _prepare_with(sampler=_sampling(rank=lambda rank, local_rank, world_size: 0))
_prepare_in_order = _prepare_with(
    sampler=_sampling(shuffle=lambda rank, local_rank, world_size: False)
)
_prepare_seeded_by_rank = _prepare_with(
    sampler=_sampling(seed=lambda rank, local_rank, world_size: rank)
)
_prepare_smaller_batches = _prepare_with(
    loader=lambda dataset, batch_size, sampler, world_size: torch.utils.data.DataLoader(
        dataset, max(1, batch_size // world_size), sampler=sampler
    )
)
_prepare_without_rest = _prepare_with(
    loader=lambda dataset, batch_size, sampler, world_size: torch.utils.data.DataLoader(
        dataset, batch_size, sampler=sampler, drop_last=True
    )
)
_prepare_cut_short = _prepare_with(
    sampler=_sampling(drop_last=lambda rank, local_rank, world_size: True)
)
_prepare_single_samples = _prepare_with(
    loader=lambda dataset, batch_size, sampler, world_size: torch.utils.data.DataLoader(
        dataset, sampler=sampler
    )
)


def _prepare_subset(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    own = torch.utils.data.Subset(dataset, range(rank, len(dataset), world_size))
    loader = torch.utils.data.DataLoader(own, batch_size, shuffle=True)
    return _device(device_type, local_rank), loader


def _prepare_swapped(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    device, loader = reference.prepare_rank(
        dataset, batch_size, rank, local_rank, world_size, device_type
    )
    return loader, device


def _prepare_by_name(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    sampler = torch.utils.data.DistributedSampler(
        dataset, world_size, rank, shuffle=True, seed=0, drop_last=False
    )
    device = torch.device(device_type if device_type == "cpu" else f"{device_type}:{local_rank}")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    return device, torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=False, sampler=sampler, num_workers=0
    )


def _prepare_batch_sampler(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    batches = torch.utils.data.BatchSampler(
        torch.utils.data.DistributedSampler(dataset, world_size, rank), batch_size, drop_last=False
    )
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches)
    return [torch.device(device_type, local_rank), loader]


def _prepare_by_length(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    numbers = range(len(dataset))
    sampler = torch.utils.data.DistributedSampler(numbers, rank=rank, num_replicas=world_size)
    parts = [device_type] if device_type == "cpu" else [device_type, str(local_rank)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, sampler=sampler, generator=torch.Generator().manual_seed(0)
    )
    return torch.device(":".join(parts)), loader


_prepare_from_group = _prepare_with(
    sampler=lambda dataset, rank, local_rank, world_size: torch.utils.data.DistributedSampler(
        dataset
    )
)
_prepare_device_text = _prepare_with(
    device=lambda rank, local_rank, kind: str(_device(kind, local_rank))
)


def _prepare_read(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    samples = list(dataset)
    return reference.prepare_rank(samples, batch_size, rank, local_rank, world_size, device_type)


def _prepare_seeded(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    torch.manual_seed(0)
    return reference.prepare_rank(dataset, batch_size, rank, local_rank, world_size, device_type)


FIX_SAME_DEVICE_AND_DATA = Exercise(
    slug="fix_same_device_and_data",
    chapter=5,
    title="Find the bug: four ranks that do the work of one",
    minutes=10,
    difficulty=2,
    reference=reference.prepare_rank,
    observe=_observe_prepare_rank,
    shipped=prepare_rank,
    symptom="Two machines with two GPUs each train on 12 samples. In one epoch the four ranks go "
    "through 48 samples, each of the 12 four times, and both ranks of a machine compute on its "
    "GPU 0 while GPU 1 has nothing to do.",
    misconceptions=(
        Misconception(
            "same_device_and_data",  # museum 5.1
            _prepare_alike,
            "Every rank gets the same device and the whole data: nothing in what you return "
            "depends on the rank. The ranks compute on one GPU, and world_size times as much as "
            "one process would. Look at which of the arguments are not used.",
        ),
        Misconception(
            "same_data",  # museum 5.1
            _prepare_same_data,
            "The devices are right, and every rank goes through all of the data: the loader "
            "shuffles the whole data set by itself. An epoch costs as much as on one process; look "
            "for the part of the loader that chooses this rank's samples.",
        ),
        Misconception(
            "same_device",
            _prepare_same_device,
            "The data are right, and the device has no number. That means the current one, GPU 0 "
            "for every rank of a machine: they share one card while the others wait.",
        ),
        Misconception(
            "first_device",
            _prepare_first_device,
            "The data are right, and you give every rank device number 0. The ranks of a machine "
            "then share one card while the others wait.",
        ),
        Misconception(
            "device_of_rank",
            _prepare_device_of_rank,
            "You number the devices by `rank`, which counts on from machine to machine. On the "
            "second machine of two with four GPUs each, rank 5 would ask for GPU 5, and there are "
            "only 0 to 3: a device is numbered within its own machine.",
        ),
        Misconception(
            "always_cuda",
            _prepare_always_cuda,
            "You return a CUDA device also where `device_type` is something else. On a machine "
            "without a GPU the first tensor sent there ends the run.",
        ),
        Misconception(
            "part_of_local_rank",
            _prepare_local_part,
            "You choose the samples by `local_rank`, which begins at 0 on every machine. The first "
            "ranks of all machines go through the same samples, and some samples are never seen.",
        ),
        Misconception(
            "part_of_rank_zero",
            _prepare_first_part,
            "Every rank gets the samples of rank 0. An epoch then covers one part in world_size of "
            "the data, world_size times over.",
        ),
        Misconception(
            "sampler_and_shuffle",  # museum 5.23
            _prepare_both,
            "You hand over a sampler and `shuffle=True` as well, which the loader refuses: both "
            "would decide on the order. The sampler shuffles already.",
        ),
        Misconception(
            "in_order",
            _prepare_in_order,
            "Each rank goes through its own samples, and you have switched shuffling off. Every "
            "epoch then has the same batches, in the order of the file.",
        ),
        Misconception(
            "seeded_by_rank",
            _prepare_seeded_by_rank,
            "You give each rank's sampler another seed. Each then cuts its part out of another "
            "shuffled order, so that the parts overlap and some samples are in none; all have to "
            "shuffle alike.",
        ),
        Misconception(
            "smaller_batches",
            _prepare_smaller_batches,
            "You divide `batch_size` by the number of processes. It is the size of this rank's own "
            "batches, as it is handed over.",
        ),
        Misconception(
            "batches_of_one",
            _prepare_single_samples,
            "Your loader gives one sample at a time: `batch_size` does not reach it.",
        ),
        Misconception(
            "without_the_last_batch",
            _prepare_without_rest,
            "Your loader leaves the last batch out where it is not full. Those samples belong to "
            "this rank's part too.",
        ),
        Misconception(
            "cut_short",
            _prepare_cut_short,
            "Your sampler drops samples where their number is no multiple of world_size. Without "
            "that it repeats a few, so that all ranks have equally many and no sample is left out.",
        ),
        Misconception(
            "subset",
            _prepare_subset,
            "You cut out this rank's samples yourself and let the loader shuffle them. A rank then "
            "has the same samples in every epoch, the parts may differ in size, and there is no "
            "`set_epoch`; DistributedSampler does all three.",
        ),
        Misconception(
            "loader_first",
            _prepare_swapped,
            "You return the loader first and then the device. The caller unpacks them as "
            "(device, loader).",
        ),
        Misconception(
            "asks_the_group",
            _prepare_from_group,
            "You have the process group asked for the rank or the number of ranks, and there need "
            "not be one when this function is called. Both are among its arguments; a sampler that "
            "is not told them asks the group.",
        ),
        Misconception(
            "device_as_text",
            _prepare_device_text,
            "You return the name of the device, a string. It has the right number, and the caller "
            "expects a torch.device, which has a `.type` and an `.index`.",
        ),
        Misconception(
            "reads_everything",
            _prepare_read,
            "You read all samples before the loader is made. Every rank then holds the whole data "
            "set in memory; a loader reads those of its own part, batch by batch.",
        ),
        Misconception(
            "seeds_everything",
            _prepare_seeded,
            "You set the seed of torch's own generator. What the ranks draw after that, dropout "
            "masks for one, is then the same on all of them; the sampler has a generator of its "
            "own, with a seed of its own.",
        ),
    ),
    alternatives=(_prepare_by_name, _prepare_batch_sampler, _prepare_by_length),
    hints=(
        "Call it for two different ranks and compare what you get. Which arguments does the cell "
        "never use?",
        "Two repairs: the device needs a number, counted within one machine; the loader needs a "
        "sampler that knows how many ranks there are and which this one is.",
        "torch.device(device_type, local_rank), but for the CPU; and "
        "torch.utils.data.DistributedSampler(dataset, num_replicas=world_size, rank=rank) as the "
        "loader's sampler, in place of shuffle=True.",
    ),
)


# --- shard_loss ---------------------------------------------------------------------------------


def _observe_shard_loss(shard_loss, see):
    with see.probe("one process alone, 5 samples of 4 classes"), alone():
        see("the average of the ranks' losses", _shard_of(shard_loss, see, (5,), 4))
    if not see.agrees:
        return
    for sizes, classes in (((5, 2), 3), ((3, 1, 4), 5), ((4, 0, 3), 4)):
        listed = ", ".join(map(str, sizes[:-1])) + f" and {sizes[-1]}"
        with see.probe(f"{len(sizes)} processes with {listed} samples of {classes} classes"):
            of = (shard_loss, sizes, classes)
            with _on_ranks_that_tell(see, len(sizes), _shard_of, *of) as losses:
                known = None not in losses
                see("the average of the ranks' losses", known and sum(losses) / len(losses))


def _shard_of(shard_loss, see, sizes, classes, folder=None):
    rank, start = dist.get_rank(), sum(sizes[: dist.get_rank()])
    logits = 2 * see.randn(sum(sizes), classes)
    targets = see.randint(0, classes, sum(sizes))[start : start + sizes[rank]]
    logits = logits[start : start + sizes[rank]].clone().requires_grad_()
    kept = logits.detach().clone(), targets.clone()
    with _late_sums():
        loss = shard_loss(logits, targets)
    same = torch.equal(kept[0], logits.detach()) and torch.equal(kept[1], targets)
    see.fact("the logits and targets are left as they are", same)
    kind = type(loss).__name__
    if isinstance(loss, torch.Tensor):
        kind = f"tensor of shape {tuple(loss.shape)}"
    see("the kind of the loss", kind)
    if kind != "tensor of shape ()":
        return None
    _tell(folder, loss.item())
    see.fact("the loss can be differentiated", loss.requires_grad)
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(1.5 * loss, logits, allow_unused=True)
        see("gradient of the logits", gradient)
    return loss.item()


def shard_loss(logits, targets):
    """A loss whose average over the ranks is the mean cross-entropy over all ranks' samples.

    logits: (samples of this rank, classes), targets: int64 (samples of this rank,); ranks may have
    different numbers of samples, some of them none. 0-dim tensor, differentiable.
    """
    return F.cross_entropy(logits, targets)


def _count(n):
    count = torch.tensor(n)
    dist.all_reduce(count)
    return count.item()


def _shard_loss_with(loss):
    """An answer from the sum of this rank's losses, its samples and those of all ranks."""

    def shard_loss(logits, targets):
        total = F.cross_entropy(logits, targets, reduction="sum")
        return loss(total, len(targets), _count(len(targets)))

    return shard_loss


def _shard_mean(logits, targets):
    return F.cross_entropy(logits, targets)


def _shard_mean_or_zero(logits, targets):
    if len(targets) == 0:
        return logits.sum() * 0
    return F.cross_entropy(logits, targets)


_shard_without_world = _shard_loss_with(lambda total, own, n: total / n)
_shard_two = _shard_loss_with(lambda total, own, n: total / n * 2)
_shard_sum = _shard_loss_with(lambda total, own, n: total * dist.get_world_size())
_shard_rounded = _shard_loss_with(lambda total, own, n: total / max(n // dist.get_world_size(), 1))
_shard_weighted = _shard_loss_with(
    lambda total, own, n: total / torch.tensor(float(own)) * own / n * dist.get_world_size()
)
_shard_weighted_without_world = _shard_loss_with(
    lambda total, own, n: total / torch.tensor(float(own)) * own / n
)
_shard_cut = _shard_loss_with(lambda total, own, n: total.detach() * dist.get_world_size() / n)
_shard_number = _shard_loss_with(lambda total, own, n: total.item() * dist.get_world_size() / n)
_shard_twice = _shard_loss_with(
    lambda total, own, n: total * dist.get_world_size() / n / dist.get_world_size() ** 2
)


def _shard_value_of_all(logits, targets):
    """The mean over all samples, of which the gradient is this rank's share only."""
    total = F.cross_entropy(logits, targets, reduction="sum")
    summed = total.detach().clone()
    dist.all_reduce(summed)
    return (total + (summed - total.detach())) / _count(len(targets))


def _shard_value_of_all_scaled(logits, targets):
    return _shard_value_of_all(logits, targets) * dist.get_world_size()


def _shard_elements(logits, targets):
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total * dist.get_world_size() / _count(logits.numel())


def _shard_count_of_rank_zero(logits, targets):
    count = torch.tensor(len(targets))
    dist.broadcast(count, 0)
    return F.cross_entropy(logits, targets, reduction="sum") / count.item()


def _shard_largest(logits, targets):
    count = torch.tensor(len(targets))
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return F.cross_entropy(logits, targets, reduction="sum") / count.item()


def _shard_without_the_empty(logits, targets):
    """Ranks without samples take no part in the count."""
    if len(targets) == 0:
        return logits.sum() * 0
    return reference.shard_loss(logits, targets)


def _shard_without_waiting(logits, targets):
    count = torch.tensor(len(targets))
    dist.all_reduce(count, async_op=True)
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total * dist.get_world_size() / count


def _shard_in_place(logits, targets):
    logits.data.sub_(logits.data.mean())
    return reference.shard_loss(logits, targets)


def _shard_zero_without_graph(logits, targets):
    n = _count(len(targets))
    if len(targets) == 0:
        return torch.zeros((), dtype=logits.dtype, requires_grad=True)
    return F.cross_entropy(logits, targets, reduction="sum") * dist.get_world_size() / n


def _shard_by_share(logits, targets):
    """A share of float32, which has seven digits, and no early return before the count."""
    total = torch.tensor(float(len(targets)))
    dist.all_reduce(total)
    if len(targets) == 0:
        return logits.sum() * 0
    return F.cross_entropy(logits, targets) * (len(targets) * dist.get_world_size() / total)


def _shard_by_scale(logits, targets):
    total = torch.tensor(len(targets))
    dist.all_reduce(total)
    return F.cross_entropy(logits, targets, reduction="sum") * (dist.get_world_size() / total)


def _shard_by_samples_a_rank(logits, targets):
    total = torch.tensor([len(targets)])
    dist.all_reduce(total)
    mean = total / dist.get_world_size()
    return (F.cross_entropy(logits, targets, reduction="sum") / mean).squeeze()


def _shard_by_mean_count(logits, targets):
    count = reference.all_reduce_mean(torch.tensor(float(len(logits))))
    return F.cross_entropy(logits, targets, reduction="sum") / count


def _shard_by_gather(logits, targets):
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(targets))
    losses = -logits.log_softmax(dim=-1).gather(1, targets[:, None])  # (samples, 1)
    return (losses / (sum(counts) / len(counts))).sum()


def _shard_by_average_count(logits, targets):
    count = logits.new_tensor(float(targets.numel()))
    dist.all_reduce(count, op=dist.ReduceOp.AVG)
    return F.nll_loss(logits.log_softmax(-1), targets, reduction="none").sum() / count


def _shard_shown_as_mean(logits, targets):
    """Every rank's loss has the value of the mean over all samples."""
    loss = reference.shard_loss(logits, targets)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - loss.detach())


def _shard_through_the_sum(logits, targets):
    """An all_reduce that autograd knows, whose backward sums the ranks' gradients."""
    from torch.distributed.nn.functional import all_reduce

    total = all_reduce(F.cross_entropy(logits, targets, reduction="sum"))
    return total / _count(len(targets))


FIX_MEAN_OF_SHARD_MEANS = Exercise(
    slug="fix_mean_of_shard_means",
    chapter=5,
    title="Find the bug: samples that count for more on a rank with fewer",
    minutes=10,
    difficulty=3,
    reference=reference.shard_loss,
    observe=_observe_shard_loss,
    shipped=shard_loss,
    symptom="Rank 0 has three samples with a loss of 0.693 each, rank 1 has one with a loss of "
    "3.049. The average of the two ranks' losses is 1.871; the mean over the four samples is "
    "1.282.",
    misconceptions=(
        Misconception(
            "mean_of_means",  # museum 5.12
            _shard_mean,
            "You take the mean over this rank's own samples. Averaged over the ranks that gives "
            "every rank the same weight, so that a sample counts for more where there are fewer of "
            "them; a rank without samples makes it NaN. What should a sample's loss be divided by?",
        ),
        Misconception(
            "mean_of_means_zero_where_empty",
            _shard_mean_or_zero,
            "You take the mean over this rank's own samples, and zero where there are none. A "
            "sample still counts for more on a rank with fewer of them; what should its loss be "
            "divided by?",
        ),
        Misconception(
            "without_world_size",
            _shard_without_world,
            "You divide by the number of samples of all ranks, and the ranks' losses are then "
            "averaged as well: together they come out world_size times too small, and so does the "
            "step. The average over the ranks is still to come, and has to be allowed for.",
        ),
        Misconception(
            "weighted_without_world_size",
            _shard_weighted_without_world,
            "You weight this rank's mean by its share of all samples, and the average over the "
            "ranks divides once more: the result is world_size times too small. On a rank without "
            "samples the mean is NaN, and NaN times zero is NaN.",
        ),
        Misconception(
            "weighted_mean",
            _shard_weighted,
            "You weight this rank's mean by its share of all samples. That is right while every "
            "rank has samples; the mean over none is NaN, and NaN times zero is NaN. Start from a "
            "sum, which is zero there.",
        ),
        Misconception(
            "always_two",
            _shard_two,
            "You allow for two ranks whatever their number. On three the average comes out at two "
            "thirds of what it should be; ask the group.",
        ),
        Misconception(
            "sum",
            _shard_sum,
            "You return a sum over samples and divide by no number of samples. Gradients then grow "
            "with the batch, and the learning rate would have to shrink with it.",
        ),
        Misconception(
            "divided_twice_by_world_size",
            _shard_twice,
            "You divide by the number of processes where you should multiply by it. The average "
            "over the ranks divides by it already, and your factor is there to undo that.",
        ),
        Misconception(
            "rounded_share",
            _shard_rounded,
            "You divide by the average number of samples a rank has, rounded down to a whole "
            "number. With 5 and 2 samples that is 3 and not 3.5; leave the quotient as it is.",
        ),
        Misconception(
            "count_of_rank_zero",
            _shard_count_of_rank_zero,
            "You divide by rank 0's number of samples on every rank. The others have other "
            "numbers; what counts is how many there are in all.",
        ),
        Misconception(
            "largest_count",
            _shard_largest,
            "You divide by the largest number of samples that any rank has. That would be right "
            "where all have as many; with fewer on some ranks the average comes out too small.",
        ),
        Misconception(
            "counts_logits",
            _shard_elements,
            "You count the elements of the logits, which are classes times samples. The result is "
            "too small by the number of classes; count samples.",
        ),
        Misconception(
            "value_of_all_gradient_of_own_share",
            _shard_value_of_all,
            "The value is right, and the gradient is world_size times too small: all_reduce put "
            "the others' losses into your value, but their gradients flow on their own ranks only, "
            "and these gradients are averaged afterwards.",
        ),
        Misconception(
            "gradient_right_value_too_large",
            _shard_value_of_all_scaled,
            "The gradient is right, and the value is not: you add up the losses of all ranks and "
            "multiply by their number too, so that the average of the ranks' losses comes out "
            "world_size times too large.",
        ),
        Misconception(
            "cut_from_the_graph",
            _shard_cut,
            "The value is right, and the graph is cut: no gradient gets from your loss to the "
            "logits. Only the count has to travel, and a count needs no gradient.",
        ),
        Misconception(
            "a_number",
            _shard_number,
            "You return a Python number, on which `backward` cannot be called. The loss of this "
            "rank has to remain a tensor of the graph.",
        ),
        Misconception(
            "empty_ranks_skip_the_count",  # museum 5.27
            _shard_without_the_empty,
            "Ranks without samples return early and take no part in the sum of the counts. The "
            "others wait for them without end: a collective is called by all ranks or by none.",
        ),
        Misconception(
            "empty_rank_without_graph",
            _shard_zero_without_graph,
            "On a rank without samples you return a zero that does not depend on the logits. "
            "No gradient gets to the model there, its hooks do not run, and the other ranks wait "
            "for them; a sum over no samples is a zero that keeps the graph.",
        ),
        Misconception(
            "count_not_waited_for",  # museum 5.10
            _shard_without_waiting,
            "You start the sum of the counts and go on without waiting for it. What you divide by "
            "is this rank's own count, or the sum, as the network pleases; wait for the work that "
            "an asynchronous call returns.",
        ),
        Misconception(
            "changes_the_logits",
            _shard_in_place,
            "The loss is right, and you write into the logits that you are handed. Whoever counts "
            "right answers with them afterwards, or logs them, finds other values; work on a new "
            "tensor.",
        ),
    ),
    rtol=1e-6,  # a count may be divided in float32
    atol=1e-6,
    alternatives=(
        _shard_by_share,
        _shard_by_scale,
        _shard_by_samples_a_rank,
        _shard_by_mean_count,
        _shard_by_gather,
        _shard_by_average_count,
        _shard_shown_as_mean,
        _shard_through_the_sum,
    ),
    hints=(
        "Write down the mean over all samples for 3 samples on rank 0 and 1 on rank 1, and beside "
        "it the average of the two ranks' means. What does each sample's loss get multiplied by?",
        "Every sample's loss is to be divided by the number of samples on all ranks, which the "
        "ranks have to find out together. The average over the ranks divides once more.",
        "All-reduce the count; return the sum of this rank's losses times world_size over it "
        '(`reduction="sum"`, which is also right for no samples).',
    ),
)


# --- NaiveDDP -----------------------------------------------------------------------------------


def _observe_naive_ddp(naive_ddp, see):
    with see.probe("one process alone"), alone():
        _train_naively(naive_ddp, see)
    if not see.agrees:
        return
    for world_size in (2, 3):
        with see.probe(f"{world_size} processes that start from other weights"):
            with _on_ranks_that_tell(see, world_size, _train_naively, naive_ddp) as told:
                see.fact("the ranks communicate during backward", _communicated(told))
        if not see.agrees:
            return


def _communicated(told):
    """Whether messages were seen, or the ranks agree, which tells of others."""
    seen = [messages for messages, _ in filter(None, told)]
    return all(seen) or len({total for _, total in filter(None, told)}) == 1


def _train_naively(naive_ddp, see, folder=None):
    net = _apart(_Net(see))
    ddp = naive_ddp(net)
    see.fact("`.module` is the module itself", ddp.module is net)
    _see_start(see, net)
    kept = [parameter.detach().clone() for parameter in net.parameters()]
    with _late_sums() as wire:
        passes = ("backward", "a second backward, nothing zeroed", "a backward in eval mode")
        for when in passes if dist.get_world_size() == 3 else passes[:2]:
            x, upstream = _batch(see)
            if "eval" in when:  # and every gradient of rank 1 is zero
                net.zero_grad()
                getattr(ddp, "eval", net.eval)()
                upstream = upstream * (dist.get_rank() != 1)
            out = ddp(x, 0.5, factor=1.5)
            see(f"the output before {when}", out)
            messages = _backward_with_notes(net, out, upstream)
            _see_gradients(see, net, when)
            see.fact(f"{when} leaves the parameters as they are", _same(kept, net.parameters()))
            further = max(0, messages["in all"] - 6)
            see(f"messages of {when} beyond one for each parameter", further)
            if dist.get_world_size() > 1:
                see.fact(f"the last layer's gradients are sent during {when}", messages["early"])
            see.fact(f"what {when} sends is waited for", wire.on_the_way == 0)
            kept = [parameter.detach().clone() for parameter in _apart(net).parameters()]
    _tell(folder, (messages["in all"], _sum_of_gradients(net)))


def _backward_with_notes(net, out, upstream):
    """Runs backward, and notes what was sent when it came to the first layer, and in all."""
    before, sent, there = len(calls()), {}, {}

    def at(layer):
        sent[layer] = len(calls()) - before
        there[layer] = None if net.last.weight.grad is None else net.last.weight.grad.clone()

    net.at = at
    out.backward(upstream)
    end = net.last.weight.grad
    # Of messages by other ways than torch.distributed's functions, only what they did is seen.
    averaged = there["first"] is not None and end is not None and torch.equal(there["first"], end)
    return {"early": sent["first"] >= 2 or averaged, "in all": len(calls()) - before}


def _sum_of_gradients(module):
    grads = (parameter.grad for parameter in module.parameters())
    return sum(grad.sum().item() for grad in grads if grad is not None)


def _same(kept, tensors):
    return all(torch.equal(one, other) for one, other in zip(kept, tensors, strict=True))


class _Naive(nn.Module):
    """The right answer in parts, of which each misconception changes one."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        for tensor in self.start():
            self.share(tensor.detach())
        for parameter in self.trained():
            self.hook(parameter)

    def start(self):
        return [*self.module.parameters(), *self.module.buffers()]

    def share(self, tensor):
        dist.broadcast(tensor, 0)

    def trained(self):
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def hook(self, parameter):
        parameter.register_post_accumulate_grad_hook(self.average)

    def average(self, parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class _NaiveUnlikeStart(_Naive):
    def start(self):
        return []


class _NaiveWithoutBuffers(_Naive):
    def start(self):
        return list(self.module.parameters())


class _NaiveStateDict(_Naive):
    def start(self):
        return self.module.state_dict().values()


class _NaiveTrainedOnly(_Naive):
    def start(self):
        return [*self.trained(), *self.module.buffers()]


class _NaiveFromLastRank(_Naive):
    def share(self, tensor):
        dist.broadcast(tensor, dist.get_world_size() - 1)


class _NaiveMeanStart(_Naive):
    def share(self, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        tensor.copy_(total / dist.get_world_size())


class _NaiveOfACopy(_Naive):
    def __init__(self, module):
        import copy

        super().__init__(copy.deepcopy(module))


class _NaiveSum(_Naive):
    def average(self, parameter):
        dist.all_reduce(parameter.grad)


class _NaiveHalf(_Naive):
    def average(self, parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2


class _NaiveDividedTwice(_Naive):
    def average(self, parameter):
        parameter.grad /= dist.get_world_size()
        super().average(parameter)


class _NaiveOwn(_Naive):
    def average(self, parameter):
        parameter.grad /= dist.get_world_size()


class _NaiveWithoutHooks(_Naive):
    def trained(self):
        return []


class _NaiveFirstOnly(_Naive):
    def trained(self):
        return super().trained()[:1]


class _NaiveWeightsOnly(_Naive):
    def trained(self):
        return [parameter for parameter in super().trained() if parameter.ndim > 1]


class _NaiveAll(_Naive):
    def trained(self):
        return list(self.module.parameters())


class _NaiveTwice(_Naive):
    def trained(self):
        named = self.module.named_parameters(remove_duplicate=False)
        return [parameter for _, parameter in named if parameter.requires_grad]


class _NaiveParameter(_Naive):
    def average(self, parameter):
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()


class _NaiveParameterSum(_Naive):
    def average(self, parameter):
        dist.all_reduce(parameter.data)


class _NaiveOnACopy(_Naive):
    def average(self, parameter):
        mean = parameter.grad.clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()


class _NaiveWithoutWaiting(_Naive):
    def average(self, parameter):
        dist.all_reduce(parameter.grad, async_op=True)
        parameter.grad /= dist.get_world_size()


class _NaiveOldGradient(_Naive):
    """A hook that runs before the new gradient is added to .grad."""

    def hook(self, parameter):
        parameter.register_hook(lambda grad: self.average(parameter))


class _NaiveOldGradientIfAny(_Naive):
    def hook(self, parameter):
        def hook(grad):
            if parameter.grad is not None:
                self.average(parameter)

        parameter.register_hook(hook)


class _NaiveHookInPlace(_Naive):
    def hook(self, parameter):
        def hook(grad):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()

        parameter.register_hook(hook)


class _NaiveLastOnly(_Naive):
    """The closure's name means the last parameter by the time that the hooks run."""

    def __init__(self, module):
        super().__init__(module)
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda _: self.average(parameter)  # noqa: B023
                )

    def hook(self, parameter):
        pass


class _NaiveAtTheEnd(_Naive):
    """All gradients are averaged when backward is over."""

    def hook(self, parameter):
        self.queued = False

        def ask(parameter):
            if not self.queued:
                self.queued = True
                torch.autograd.Variable._execution_engine.queue_callback(self.average_all)

        parameter.register_post_accumulate_grad_hook(ask)

    def average_all(self):
        self.queued = False
        for parameter in self.trained():
            self.average(parameter)


class _NaiveHooksInForward(_Naive):
    """Registers its hooks again at every forward."""

    def hook(self, parameter):
        pass

    def forward(self, *args, **kwargs):
        for parameter in self.trained():
            parameter.register_post_accumulate_grad_hook(self.average)
        return super().forward(*args, **kwargs)


class _NaiveRankZero(_Naive):
    def average(self, parameter):
        if dist.get_rank() == 0:
            super().average(parameter)


class _NaiveWithoutKeywords(_Naive):
    def forward(self, x):
        return self.module(x)


class _NaiveKeywordsDropped(_Naive):
    def forward(self, *args, **kwargs):
        return self.module(*args)


class _NaiveFirstArgument(_Naive):
    def forward(self, *args, **kwargs):
        return self.module(args[0], **kwargs)


class _NaiveInTraining(_Naive):
    def average(self, parameter):
        if self.training:
            super().average(parameter)


class _NaiveSkipsZeros(_Naive):
    def average(self, parameter):
        if parameter.grad.any():
            super().average(parameter)


class _NaiveOfRankZero(_Naive):
    def average(self, parameter):
        dist.broadcast(parameter.grad, 0)


class _NaiveOnce(_Naive):
    """Each parameter is averaged in the first backward only."""

    def average(self, parameter):
        self.done = getattr(self, "done", set())
        if parameter not in self.done:
            self.done.add(parameter)
            super().average(parameter)


class _NaiveAsksForRanks(_Naive):
    def average(self, parameter):
        ranks = torch.ones(())
        dist.all_reduce(ranks)
        dist.all_reduce(parameter.grad)
        parameter.grad /= ranks


class _NaiveByTensorHook(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.averaged)

    def averaged(self, grad):
        mean = grad / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class _NaiveByNode(nn.Module):
    """Hooks on the nodes that add to .grad, which have to be kept alive; objects broadcast."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        tensors = [tensor.data for tensor in [*module.parameters(), *module.buffers()]]
        values = [tensors if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(values, src=0)
        for tensor, value in zip(tensors, values[0], strict=True):
            tensor.copy_(value)
        self.nodes = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
                node.register_hook(self.hook_for(parameter))
                self.nodes.append(node)

    def hook_for(self, parameter):
        def hook(*_):
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)

        return hook

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def _naive_with_late_waits(module):
    """Asynchronous messages, for which the end of backward waits."""
    works = []

    def finish():
        for parameter, work in works:
            work.wait()
            parameter.grad.mul_(1 / dist.get_world_size())
        works.clear()

    def send(parameter):
        if not works:
            torch.autograd.Variable._execution_engine.queue_callback(finish)
        works.append((parameter, dist.all_reduce(parameter.grad, async_op=True)))

    for parameter in module.parameters():
        dist.broadcast(parameter.data, 0)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(send)
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)
    wrapped = nn.Sequential(module)
    wrapped.module = module
    wrapped.forward = module.forward
    return wrapped


NAIVE_DDP = Exercise(
    slug="naive_ddp",
    chapter=5,
    title="Gradients averaged by hooks",
    minutes=25,
    difficulty=3,
    reference=reference.NaiveDDP,
    observe=_observe_naive_ddp,
    misconceptions=(
        Misconception(
            "unlike_start",  # museum 5.4
            _NaiveUnlikeStart,
            "The ranks start from different weights: rank 0's do not get into the tensors of the "
            "others. They then take the same steps from different places, and never meet. (Where "
            "you broadcast a copy, what arrives lands in a copy.)",
        ),
        Misconception(
            "without_buffers",
            _NaiveWithoutBuffers,
            "The parameters are the same on all ranks at the start, the buffers are not. Running "
            "statistics of batch norm and the like are part of what a model computes.",
        ),
        Misconception(
            "state_dict_only",
            _NaiveStateDict,
            "You send what is in the state_dict. A buffer registered with `persistent=False` is "
            "not in it, and stays different on every rank; ask the module for its parameters and "
            "buffers.",
        ),
        Misconception(
            "frozen_not_sent",
            _NaiveTrainedOnly,
            "At the start you send only parameters that are trained. The frozen ones differ from "
            "rank to rank, and with them all that the layers behind them compute.",
        ),
        Misconception(
            "from_the_last_rank",
            _NaiveFromLastRank,
            "All ranks start alike, from the weights of the last rank. They should be rank 0's, "
            "which is the one that loads a checkpoint.",
        ),
        Misconception(
            "mean_at_the_start",
            _NaiveMeanStart,
            "All ranks start from the mean of their weights. The mean of two networks is as a rule "
            "neither of them nor a good one, and whole numbers in buffers are rounded; rank 0's "
            "values should go to all.",
        ),
        Misconception(
            "copy_of_the_module",
            _NaiveOfACopy,
            "You wrap a copy of the module. Whoever made the optimizer or saves the weights holds "
            "the original, which is then never trained; `.module` has to be the module itself.",
        ),
        Misconception(
            "sum",  # museum 5.2
            _NaiveSum,
            "You leave the sum over the ranks in `.grad`. It is world_size times the mean, and so "
            "is the step; the ranks agree with each other, so that nothing else shows it.",
        ),
        Misconception(
            "always_two",
            _NaiveHalf,
            "You divide by 2 whatever the number of processes. On three the gradients are half as "
            "large again as they should be; ask the group how many processes it has.",
        ),
        Misconception(
            "divided_twice",  # museum 5.3
            _NaiveDividedTwice,
            "You divide by the number of processes twice. One division gives the mean, before the "
            "sum or after it (ReduceOp.AVG divides too); two give gradients that are world_size "
            "times too small.",
        ),
        Misconception(
            "own",
            _NaiveOwn,
            "Your hook divides this rank's own gradient and asks no other rank for theirs. The "
            "ranks drift apart with smaller steps.",
        ),
        Misconception(
            "never_averaged",  # museum 5.5
            _NaiveWithoutHooks,
            "Each rank keeps its own gradients after backward: no hook averages them. The ranks "
            "are the same at the start only, and drift apart from the first step on.",
        ),
        Misconception(
            "first_parameter_only",  # museum 5.6
            _NaiveFirstOnly,
            "Only the first parameter's gradient is averaged. The others keep the gradients of "
            "their own rank; every parameter that requires a gradient needs a hook.",
        ),
        Misconception(
            "last_parameter_only",
            _NaiveLastOnly,
            "Every hook averages the last parameter, whichever it was registered on. A function "
            "made in a loop looks the loop's variable up when it runs, and then the loop is over; "
            "the hook is handed its own parameter.",
        ),
        Misconception(
            "weights_only",
            _NaiveWeightsOnly,
            "You average the gradients of matrices and leave out those of vectors, the biases. "
            "Each rank's biases then go their own way.",
        ),
        Misconception(
            "hook_on_frozen",
            _NaiveAll,
            "You register a hook on every parameter. On one that requires no gradient torch "
            "refuses it, for its hook could never run; leave the frozen ones out.",
        ),
        Misconception(
            "tied_twice",
            _NaiveTwice,
            "A weight that two layers share gets two hooks, and its gradient travels twice. The "
            "mean of means is the same mean, and costs a message more; `parameters()` lists a "
            "shared parameter once.",
        ),
        Misconception(
            "hooks_in_forward",
            _NaiveHooksInForward,
            "Every forward registers the hooks once more. In the second step each gradient travels "
            "twice, in the third three times; a hook stays where it was registered, so that once, "
            "in __init__, is enough.",
        ),
        Misconception(
            "averages_the_parameter",
            _NaiveParameter,
            "Your hook averages the parameters and leaves the gradients as they are. All ranks "
            "have the same parameters at that time, so that nothing changes, and each then takes "
            "its own step.",
        ),
        Misconception(
            "sums_the_parameter",
            _NaiveParameterSum,
            "Your hook adds up the parameters of all ranks, so that backward multiplies the "
            "weights by world_size; the gradients stay as they are. It is `.grad` that has to "
            "travel.",
        ),
        Misconception(
            "average_of_a_copy",  # museum 5.30
            _NaiveOnACopy,
            "Your hook averages a copy of the gradient, and `.grad` keeps this rank's own values. "
            "The mean has to be written into `.grad`; or returned, from a hook that was registered "
            "with `register_hook`.",
        ),
        Misconception(
            "without_waiting",  # museum 5.10
            _NaiveWithoutWaiting,
            "You start the all_reduce and go on without waiting for it. What you divide is this "
            "rank's own gradient or half of a sum, as the network pleases; wait for the work that "
            "an asynchronous call returns.",
        ),
        Misconception(
            "before_it_is_there",
            _NaiveOldGradient,
            "Your hook uses `.grad` before backward has put anything there. A hook registered with "
            "`register_hook` is handed the new gradient and runs before it is added to `.grad`; "
            "one registered with `register_post_accumulate_grad_hook` runs after.",
        ),
        Misconception(
            "one_step_late",
            _NaiveOldGradientIfAny,
            "You average what `.grad` held before this backward, and the new gradient never "
            "travels. Your hook runs too early, before the new gradient is added to `.grad`: those "
            "of `register_hook` do, and those of a module may; there is a kind that runs after.",
        ),
        Misconception(
            "changes_its_argument",
            _NaiveHookInPlace,
            "Your hook writes into the gradient that it is handed. Where the parameter was added "
            "to activations of the same shape, that tensor is their gradient too, and the layers "
            "before them get the ranks' mean in place of their own; return a new tensor, or work "
            "on `.grad` when it is there.",
        ),
        Misconception(
            "at_the_end",
            _NaiveAtTheEnd,
            "The means are right, and they are formed when backward is over. The hook of each "
            "parameter should average it as soon as it is there, while backward still computes the "
            "others.",
        ),
        Misconception(
            "without_keywords",
            _NaiveWithoutKeywords,
            "Your forward takes no keywords. The module may be called with several arguments, and "
            "with keywords, and all of them are to be handed on.",
        ),
        Misconception(
            "keywords_dropped",
            _NaiveKeywordsDropped,
            "Your forward accepts keywords and does not hand them on to the module, which then "
            "computes with its defaults and raises no error.",
        ),
        Misconception(
            "first_argument_only",
            _NaiveFirstArgument,
            "Your forward hands on the first of its arguments only. The module may be called with "
            "several, and those that it has defaults for are lost without an error.",
        ),
        Misconception(
            "only_in_training_mode",
            _NaiveInTraining,
            "In eval mode your hooks average nothing. The mode changes what layers like dropout "
            "compute; whether there are gradients to average is settled by backward, which can run "
            "in either mode.",
        ),
        Misconception(
            "rank_zero_gradient",
            _NaiveOfRankZero,
            "You give every rank the gradient of rank 0. The ranks agree, and the samples of all "
            "the others are thrown away.",
        ),
        Misconception(
            "first_backward_only",
            _NaiveOnce,
            "The first backward is right, and no later one is: each gradient is averaged once and "
            "then never again. A hook should do its work in every backward pass.",
        ),
        Misconception(
            "two_messages_each",
            _NaiveAsksForRanks,
            "The gradients are right, and you send two messages for each parameter. One carries "
            "the gradient; what the other brings can be had without a message.",
        ),
        Misconception(
            "zero_gradient_not_sent",  # museum 5.27
            _NaiveSkipsZeros,
            "Your hook sends nothing where the gradient is zero. On another rank it may not be, "
            "and that rank waits without end: a collective is called by all ranks or by none.",
        ),
        Misconception(
            "rank_zero_only",  # museum 5.27
            _NaiveRankZero,
            "Only rank 0 calls all_reduce, and waits for the others without end. A collective is "
            "called by all ranks or by none.",
        ),
    ),
    alternatives=(_NaiveByTensorHook, _NaiveByNode, _naive_with_late_waits),
    hints=(
        "Two parts: at the start every rank gets what rank 0 has, buffers too; then each "
        "parameter that requires a gradient gets a hook. Which kind of hook runs when `.grad` is "
        "there?",
        "dist.broadcast(tensor.detach(), 0) for parameters and buffers. The hook is handed the "
        "parameter and does what average_gradients does for one of them.",
        "In __init__: parameter.register_post_accumulate_grad_hook(self._average) for those with "
        "requires_grad. In _average: all_reduce of parameter.grad, then divide it by the number "
        "of processes, in place.",
    ),
)


# --- hook_gradients -----------------------------------------------------------------------------


def _observe_hook_gradients(hook_gradients, see):
    with see.probe("one process alone"), alone():
        _hooked(hook_gradients, see)
    if not see.agrees:
        return
    for world_size in (2, 3):
        with see.probe(f"{world_size} processes, each with gradients of its own"):
            with _on_ranks_that_tell(see, world_size, _hooked, hook_gradients) as told:
                see.fact("the ranks communicate during backward", _communicated(told))
        if not see.agrees:
            return


def _hooked(hook_gradients, see, folder=None):
    net = _apart(_Net(see))
    kept = [parameter.detach().clone() for parameter in net.parameters()]
    hook_gradients(net)
    see.fact("the call leaves the parameters as they are", _same(kept, net.parameters()))
    with _late_sums() as wire:
        for when in ("backward", "a second backward, nothing zeroed"):
            x, upstream = _batch(see)
            before = len(calls())
            net(x).backward(upstream)
            messages = len(calls()) - before
            see.fact(f"{when} leaves the parameters as they are", _same(kept, net.parameters()))
            _see_gradients(see, net, when)
            see.fact(f"what {when} sends is waited for", wire.on_the_way == 0)
    _tell(folder, (messages, _sum_of_gradients(net)))


def hook_gradients(module):
    """From now on, backward() leaves the mean over the ranks in the gradient of each parameter.

    Parameters that do not require a gradient get no hook; the parameters themselves stay as they
    are. Returns nothing.
    """

    def average(parameter):
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def _hooking(average, trained=lambda module: [p for p in module.parameters() if p.requires_grad]):
    """An answer with the hook `average`, and the parameters that get it."""

    def hook_gradients(module):
        for parameter in trained(module):
            parameter.register_post_accumulate_grad_hook(average)

    return hook_gradients


def _mean_into(tensor):
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()


def _sum_parameter(parameter):
    dist.all_reduce(parameter.data)


def _average_both(parameter):
    _mean_into(parameter.grad)
    _mean_into(parameter.data)


def _average_sum(parameter):
    dist.all_reduce(parameter.grad)


def _average_half(parameter):
    dist.all_reduce(parameter.grad)
    parameter.grad /= 2


def _average_twice_divided(parameter):
    parameter.grad /= dist.get_world_size()
    _mean_into(parameter.grad)


def _average_own(parameter):
    parameter.grad /= dist.get_world_size()


def _average_copy(parameter):
    _mean_into(parameter.grad.clone())


def _average_by_broadcast(parameter):
    dist.broadcast(parameter.grad, 0)


def _average_without_waiting(parameter):
    dist.all_reduce(parameter.grad, async_op=True)
    parameter.grad /= dist.get_world_size()


def _average_sum_only(parameter):
    dist.all_reduce(parameter.grad)
    parameter.data /= dist.get_world_size()


def _average_division_only(parameter):
    dist.all_reduce(parameter.data)
    parameter.grad /= dist.get_world_size()


_hook_sum_repaired = _hooking(_average_sum_only)
_hook_division_repaired = _hooking(_average_division_only)
_hook_matrices = _hooking(
    lambda parameter: _mean_into(parameter.grad),
    lambda module: [p for p in module.parameters() if p.requires_grad and p.ndim > 1],
)
_hook_parameter = _hooking(lambda parameter: _mean_into(parameter.data))
_hook_parameter_sum = _hooking(_sum_parameter)
_hook_both = _hooking(_average_both)
_hook_sum = _hooking(_average_sum)
_hook_half = _hooking(_average_half)
_hook_twice_divided = _hooking(_average_twice_divided)
_hook_own = _hooking(_average_own)
_hook_copy = _hooking(_average_copy)
_hook_broadcast = _hooking(_average_by_broadcast)
_hook_without_waiting = _hooking(_average_without_waiting)
_hook_right = _hooking(lambda parameter: _mean_into(parameter.grad))
_hook_first = _hooking(
    lambda parameter: _mean_into(parameter.grad), lambda module: [next(module.parameters())]
)
_hook_frozen = _hooking(
    lambda parameter: _mean_into(parameter.grad), lambda module: module.parameters()
)


def _hook_last(module):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _: _mean_into(parameter.grad)  # noqa: B023
            )


def _hook_too_early(module):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, parameter=parameter: _mean_into(parameter.grad))


def _hook_one_step_late(module):
    def hook_for(parameter):
        def hook(grad):
            if parameter.grad is not None:
                _mean_into(parameter.grad)

        return hook

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(hook_for(parameter))


def _hook_in_place(module):
    def hook(grad):
        _mean_into(grad)

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(hook)


def _hook_averages_at_once(module):
    for parameter in module.parameters():
        if parameter.grad is not None:
            _mean_into(parameter.grad)


def _hook_broadcasts_too(module):
    for parameter in module.parameters():
        dist.broadcast(parameter.data, 0)
    _hook_right(module)


def _hook_once(module):
    """Each hook removes itself when it has run."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            handles = []

            def average(parameter, handles=handles):
                _mean_into(parameter.grad)
                handles.pop().remove()

            handles.append(parameter.register_post_accumulate_grad_hook(average))


def _hook_by_tensor(module):
    def average(grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    return [p.register_hook(average) for p in module.parameters() if p.requires_grad]


def _hook_by_gather(module):
    def average(parameter):
        parts = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.grad)
        parameter.grad = torch.stack(parts).mean(dim=0)

    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            if parameter.requires_grad and not parameter._post_accumulate_grad_hooks:
                parameter.register_post_accumulate_grad_hook(average)


def _hook_by_node(module):
    nodes = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            node = parameter.view_as(parameter).grad_fn.next_functions[0][0]

            def average(*_, parameter=parameter):
                dist.all_reduce(parameter.grad, async_op=True).wait()
                parameter.grad.div_(dist.get_world_size())

            node.register_hook(average)
            nodes.append(node)
    module._nodes = nodes


FIX_HOOK_REDUCES_PARAMETER = Exercise(
    slug="fix_hook_reduces_parameter",
    chapter=5,
    title="Find the bug: hooks that run, and ranks that drift apart",
    minutes=8,
    difficulty=2,
    reference=reference.hook_gradients,
    observe=_observe_hook_gradients,
    shipped=hook_gradients,
    symptom="Two ranks start from the same weight, 1. After backward rank 0 has a gradient of 1 "
    "and rank 1 one of 3; both should have 2. Messages were sent, and no error is raised.",
    misconceptions=(
        Misconception(
            "averages_the_parameter",
            _hook_parameter,
            "Your hook averages the parameters of the ranks and leaves each rank's gradient as it "
            "is. Where the parameters are the same already, nothing happens at all, and each rank "
            "takes its own step; look at what the hook hands to all_reduce.",
        ),
        Misconception(
            "sums_the_parameter",
            _hook_parameter_sum,
            "Your hook adds up the parameters of all ranks: backward makes the weights world_size "
            "times as large, and the gradients stay those of each rank. Look at what the hook "
            "hands to all_reduce.",
        ),
        Misconception(
            "averages_both",
            _hook_both,
            "The gradients are right, and your hook still averages the parameters as well. "
            "Backward should not change the parameters: that is the optimizer's part.",
        ),
        Misconception(
            "broadcasts_the_parameters",
            _hook_broadcasts_too,
            "You give all ranks the parameters of rank 0. This function should leave the "
            "parameters as they are; bringing the ranks to one start is another's part.",
        ),
        Misconception(
            "sum",  # museum 5.2
            _hook_sum,
            "You leave the sum over the ranks in `.grad`. It is world_size times the mean, and so "
            "is the step.",
        ),
        Misconception(
            "always_two",
            _hook_half,
            "You divide by 2 whatever the number of processes. On three the gradients are half as "
            "large again as they should be; ask the group how many processes it has.",
        ),
        Misconception(
            "divided_twice",
            _hook_twice_divided,
            "You divide by the number of processes twice. One division gives the mean, before the "
            "sum or after it (ReduceOp.AVG divides too); two give gradients that are world_size "
            "times too small.",
        ),
        Misconception(
            "own",
            _hook_own,
            "Your hook divides this rank's own gradient, and nothing of the other ranks gets into "
            "it. Look at what all_reduce is handed, if it is called at all.",
        ),
        Misconception(
            "average_of_a_copy",  # museum 5.30
            _hook_copy,
            "Your hook averages a copy of the gradient, and `.grad` keeps this rank's own values. "
            "The mean has to be written into `.grad`.",
        ),
        Misconception(
            "rank_zero_gradient",
            _hook_broadcast,
            "You give every rank the gradient of rank 0. The ranks agree, and the samples of all "
            "the others are thrown away.",
        ),
        Misconception(
            "without_waiting",  # museum 5.10
            _hook_without_waiting,
            "You start the all_reduce and go on without waiting for it. What you divide is this "
            "rank's own gradient or half of a sum; wait for the work that an asynchronous call "
            "returns.",
        ),
        Misconception(
            "first_parameter_only",  # museum 5.6
            _hook_first,
            "Only the first parameter gets a hook. The gradients of all others stay those of their "
            "own rank.",
        ),
        Misconception(
            "last_parameter_only",
            _hook_last,
            "Every hook averages the last parameter, whichever it was registered on. A function "
            "made in a loop looks the loop's variable up when it runs, and then the loop is over; "
            "the hook is handed its own parameter.",
        ),
        Misconception(
            "hook_on_frozen",
            _hook_frozen,
            "You register a hook on parameters that require no gradient too, which torch refuses. "
            "Leave the frozen ones out.",
        ),
        Misconception(
            "before_it_is_there",
            _hook_too_early,
            "Your hook uses `.grad` before backward has put anything there. A hook registered with "
            "`register_hook` runs before the new gradient is added to `.grad`; the one in the cell "
            "as it was shipped runs after.",
        ),
        Misconception(
            "one_step_late",
            _hook_one_step_late,
            "You average what `.grad` held before this backward, and the new gradient never "
            "travels. Your hook runs too early, before the new gradient is added to `.grad`: those "
            "of `register_hook` do, and those of a module may; there is a kind that runs after.",
        ),
        Misconception(
            "changes_its_argument",
            _hook_in_place,
            "Your hook writes into the gradient that it is handed. Where the parameter was added "
            "to activations of the same shape, that tensor is their gradient too, and the layers "
            "before them get the ranks' mean in place of their own; return a new tensor, or work "
            "on `.grad` when it is there.",
        ),
        Misconception(
            "averages_at_once",
            _hook_averages_at_once,
            "During backward nothing is sent: what you average, if anything, is what `.grad` holds "
            "at the moment of the call. A hook has to be registered that runs whenever a new "
            "gradient is there.",
        ),
        Misconception(
            "works_once",
            _hook_once,
            "Your hooks do their work in one backward pass only. The gradients of every later pass "
            "stay on their own rank.",
        ),
        Misconception(
            "sum_repaired_only",
            _hook_sum_repaired,
            "You repaired half of the hook: the gradients are summed over the ranks, and the "
            "division still goes to the parameters, which shrink with every backward pass. Sum and "
            "division belong to one tensor.",
        ),
        Misconception(
            "division_repaired_only",
            _hook_division_repaired,
            "You repaired half of the hook: each rank's own gradient is divided, and it is still "
            "the parameters that are summed over the ranks. Sum and division belong to one tensor.",
        ),
        Misconception(
            "matrices_only",
            _hook_matrices,
            "You average the gradients of matrices and leave out those of vectors, the biases. "
            "Each rank's biases then go their own way.",
        ),
    ),
    alternatives=(_hook_by_tensor, _hook_by_gather, _hook_by_node),
    hints=(
        "Print on each rank, before and after backward, the parameter and its gradient. Which of "
        "them does the hook change?",
        "The hook is handed the parameter, not its gradient. What has to be the same on all ranks "
        "when the optimizer takes its step?",
        "Both lines of the hook name the wrong tensor: it is parameter.grad that should be "
        "all-reduced and divided.",
    ),
)

# --- BucketedDDP --------------------------------------------------------------------------------


class _Small(nn.Module):
    """float32, with a parameter that is one number; returns two tensors."""

    def __init__(self, see):
        super().__init__()
        for name, shape in (("weight", (3, 2)), ("bias", (2,)), ("gain", ())):
            setattr(self, name, nn.Parameter(see.randn(*shape, dtype=torch.float32)))

    def forward(self, x):
        hidden = torch.tanh(x @ self.weight + self.bias)  # (5, 2)
        return self.gain * hidden, hidden


class _Branches(nn.Module):
    """Three layers of equal size, of which a forward uses those that it is told, in that order."""

    def __init__(self, see):
        super().__init__()
        for name in "abc":
            weight = nn.Parameter(see.randn(3, 2))
            setattr(self, name, weight)

    def forward(self, x, order):
        out = 0.0
        for name in order:
            out = out + torch.tanh(x @ getattr(self, name))
        return out  # (5, 2)


def _observe_bucketed_ddp(bucketed_ddp, see):
    for bucket_bytes in (128, 80, 208, 1, None):
        size = f"{bucket_bytes} bytes" if bucket_bytes else "the size it has by default"
        with see.probe(f"one process alone, buckets of {size}"), alone():
            _step_in_buckets(bucketed_ddp, see, bucket_bytes)
    with see.probe("one process alone, parameters used in other orders, and not all"), alone():
        _use_branches(bucketed_ddp, see, (("abc",), ("bca",), ("ca",), ("b",)))
    with see.probe("one process alone, three backward passes of which two in no_sync"), alone():
        _accumulate_in_buckets(bucketed_ddp, see)
    with see.probe("one process alone, a parameter that step 2 uses first"), alone():
        _use_branches(bucketed_ddp, see, (("b",), ("acb",)), 96)
    with see.probe("one process alone, a parameter used inside no_sync only"), alone():
        _use_in_no_sync(bucketed_ddp, see)
    with see.probe("one process alone, float32 parameters, one of them a number"), alone():
        _use_small(bucketed_ddp, see)
    if not see.agrees:
        return
    with see.probe("2 processes that start from other weights"):
        with _on_ranks_that_tell(see, 2, _step_in_buckets, bucketed_ddp, 128):
            pass
    if not see.agrees:
        return
    with see.probe("3 processes that use the parameters in different orders, and not all"):
        uses = (("abc", "bca", "cab"), ("ab", "b", "ba"), ("c", "a", "b"))
        on_ranks(see, 3, _use_branches, bucketed_ddp, uses)
    with see.probe("2 processes, three backward passes of which two in no_sync"):
        on_ranks(see, 2, _accumulate_in_buckets, bucketed_ddp)


def _messages(since):
    return [call for call in calls()[since:] if call.name == "all_reduce"]


def _step_in_buckets(bucketed_ddp, see, bucket_bytes, folder=None):
    """Two steps: what becomes of the gradients, how they were cut up, and when they were sent.

    Rank 1 begins its first backward when rank 0 has told that its own is over, which it never is
    where backward waits for a message.
    """
    net = _apart(_Net(see))
    ddp = bucketed_ddp(net) if bucket_bytes is None else bucketed_ddp(net, bucket_bytes)
    see.fact("`.module` is the module itself", ddp.module is net)
    _see_start(see, net)
    with _late_sums() as wire:
        for step in ("step 1", "step 2"):
            net.zero_grad()
            x, upstream = _batch(see)
            begin = len(calls())
            out = ddp(x, 0.5, factor=1.5)
            see(f"the output of {step}", out)
            start, sent = len(calls()), {}
            net.at = lambda layer, start=start, sent=sent: sent.update({layer: _messages(start)})
            free = dist.get_rank() == 0 or _is_there(folder, "0")
            wire.in_backward = True
            out.backward(upstream)
            wire.in_backward = False
            _tell(folder, step)
            sent["end"] = _messages(start)
            ddp.finish()
            _see_gradients(see, net, step)
            messages = _messages(start)
            see(f"bytes of the messages of {step}, in order", [call.bytes for call in messages])
            for layer, place in (
                ("again", "the last layer's gradients are there"),
                ("twice", "one of the two uses of the shared weight is through"),
                ("first", "the shared weight's gradient is there"),
                ("end", "backward is over"),
            ):
                see(f"messages sent in {step} when {place}", len(sent[layer]))
            see.fact(
                f"all messages of {step} are asynchronous", all(call.is_async for call in messages)
            )
            see.fact(f"backward of {step} waits for no message", wire.waits == 0)
            see.fact(f"rank 0 comes through backward of {step} without the others", free)
            names = [c.name for c in calls()[begin:] if c.name not in ("all_reduce", "barrier")]
            see(f"messages of {step} that are no buckets", len(names))


def _use_in_no_sync(bucketed_ddp, see):
    net = _Branches(see)
    ddp = bucketed_ddp(net, 96)
    with _late_sums():
        x, upstream = _batch(see)
        with ddp.no_sync():
            ddp(x, "ab").backward(upstream)
        x, upstream = _batch(see)
        ddp(x, "a").backward(upstream)
        ddp.finish()
        _see_gradients(see, net, "a pass with a and b inside no_sync and one with a only")


def _use_small(bucketed_ddp, see):
    net, other = _Small(see), _Small(see)
    ddp, other_ddp = bucketed_ddp(net, 12), bucketed_ddp(other, 12)
    x = see.randn(5, 3, dtype=torch.float32)
    upstream = see.randn(5, 2, dtype=torch.float32)
    with _late_sums():
        start, out = len(calls()), ddp(x)
        see("the outputs", out)
        out[0].backward(upstream)
        ddp.finish()
        _see_gradients(see, net, "a step")
        see("bytes of the messages, in order", [call.bytes for call in _messages(start)])
        net.zero_grad()
        getattr(ddp, "eval", net.eval)()
        start = len(calls())
        ddp(x)[0].backward(upstream)
        see("messages sent by backward in eval mode", len(_messages(start)))
        with torch.no_grad():
            ddp(x)
        ddp.finish()
        see("messages with a forward between backward and finish()", len(_messages(start)))
        _see_gradients(see, net, "a step with a forward between backward and finish()")
        with ddp.no_sync():
            start = len(calls())
            other_ddp(x)[0].backward(upstream)
            sent = len(_messages(start))
        see("messages of another net's backward inside no_sync of this one", sent)
        other_ddp.finish()


def _use_branches(bucketed_ddp, see, uses, bucket_bytes=48):
    net = _Branches(see)
    rank = dist.get_rank()
    ddp = bucketed_ddp(net, bucket_bytes)
    with _late_sums():
        for step, orders in enumerate(uses, 1):
            net.zero_grad()
            x, upstream = _batch(see)
            start = len(calls())
            ddp(x, orders[rank]).backward(upstream)
            ddp.finish()
            see(f"bytes of the messages of step {step}", [c.bytes for c in _messages(start)])
            _see_gradients(see, net, f"step {step}")


class _Interrupted(Exception):
    """Raised inside no_sync by whoever uses it."""


def _accumulate_in_buckets(bucketed_ddp, see):
    net = _Net(see)
    ddp = bucketed_ddp(net, 128)
    with _late_sums():
        start = len(calls())
        x, upstream = _batch(see)
        with ddp.no_sync():
            ddp(x).backward(upstream)
        x, upstream = _batch(see)
        out = ddp(x)
        with ddp.no_sync():
            out.backward(upstream)
        _see_gradients(see, net, "two backward passes inside no_sync")
        see("messages sent by two backward passes inside no_sync", len(_messages(start)))
        x, upstream = _batch(see)
        ddp(x).backward(upstream)
        sent = len(_messages(start))
        ddp.finish()
        _see_gradients(see, net, "one more backward pass, and finish()")
        see("messages sent by the backward pass after no_sync", sent)
        see("messages sent in all", len(_messages(start)))
        net.zero_grad()
        comes_out = False
        try:
            with ddp.no_sync():
                raise _Interrupted
        except _Interrupted:
            comes_out = True
        see.fact("an exception inside no_sync comes out of it", comes_out)
        start = len(calls())
        x, upstream = _batch(see)
        ddp(x).backward(upstream)
        sent = len(_messages(start))
        ddp.finish()
        _see_gradients(see, net, "an exception inside no_sync and one more step")
        see("messages sent by backward after an exception inside no_sync", sent)


class _Bucketed(nn.Module):
    """The right answer in parts, of which each misconception changes one."""

    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module, self.bucket_bytes, self.synchronise = module, bucket_bytes, True
        for tensor in self.start():
            dist.broadcast(tensor.detach(), 0)
        self.buckets = self.cut(self.listed())
        for parameter in self.trained():
            self.hook(parameter)
        self.begin()

    def start(self):
        return [*self.module.parameters(), *self.module.buffers()]

    def trained(self):
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def listed(self):
        return self.trained()[::-1]

    def size(self, parameter):
        return parameter.numel() * parameter.element_size()

    def fits(self, bucket, parameter):
        return sum(map(self.size, [*bucket, parameter])) <= self.bucket_bytes

    def cut(self, parameters):
        buckets = []
        for parameter in parameters:
            if not buckets or not self.fits(buckets[-1], parameter):
                buckets.append([])
            buckets[-1].append(parameter)
        return buckets

    def hook(self, parameter):
        parameter.register_post_accumulate_grad_hook(self.arrived)

    def begin(self):
        self.there, self.sent = set(), []

    def arrived(self, parameter):
        if self.synchronise:
            self.there.add(parameter)
            self.send_what_is_ready()

    def ready(self, bucket):
        return self.there.issuperset(bucket)

    def send_what_is_ready(self):
        while len(self.sent) < len(self.buckets) and self.ready(self.buckets[len(self.sent)]):
            self.send(self.buckets[len(self.sent)])

    def gradient(self, parameter):
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def send(self, bucket):
        flat = torch.cat([self.gradient(parameter).flatten() for parameter in bucket])
        self.sent.append((bucket, flat, self.reduce(flat)))

    def reduce(self, flat):
        return dist.all_reduce(flat, async_op=True)

    def send_the_rest(self):
        for bucket in self.buckets[len(self.sent) :]:
            self.send(bucket)

    def wait(self):
        for _, _, work in self.sent:
            work.wait()

    def divide(self, flat):
        return flat / dist.get_world_size()

    def store(self, parameter, mean):
        parameter.grad = mean.clone()

    def finish(self):
        self.send_the_rest()
        self.wait()
        for bucket, flat, _ in self.sent:
            pieces = self.divide(flat).split([parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                self.store(parameter, piece.view_as(parameter))
        self.begin()

    @contextmanager
    def no_sync(self):
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class _BucketedUnlikeStart(_Bucketed):
    def start(self):
        return []


class _BucketedWithoutBuffers(_Bucketed):
    def start(self):
        return list(self.module.parameters())


class _BucketedTrainedOnly(_Bucketed):
    def start(self):
        return [*self.trained(), *self.module.buffers()]


class _BucketedSum(_Bucketed):
    def divide(self, flat):
        return flat


class _BucketedHalf(_Bucketed):
    def divide(self, flat):
        return flat / 2


class _BucketedDividedTwice(_Bucketed):
    def reduce(self, flat):
        flat /= dist.get_world_size()
        return super().reduce(flat)


class _BucketedKept(_Bucketed):
    """What arrived stays in the buckets."""

    def store(self, parameter, mean):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class _BucketedWithoutWaiting(_Bucketed):
    def wait(self):
        pass


class _BucketedWaitsForLast(_Bucketed):
    def wait(self):
        self.sent[-1][2].wait()


class _Done:
    def wait(self):
        pass


class _BucketedBlocking(_Bucketed):
    def reduce(self, flat):
        dist.all_reduce(flat)
        return _Done()


class _BucketedWaitsAtOnce(_Bucketed):
    def reduce(self, flat):
        work = super().reduce(flat)
        work.wait()
        return work


class _BucketedAllInFinish(_Bucketed):
    def send_what_is_ready(self):
        pass


class _BucketedForward(_Bucketed):
    def listed(self):
        return self.trained()


class _BucketedOne(_Bucketed):
    def fits(self, bucket, parameter):
        return True


class _BucketedEach(_Bucketed):
    def fits(self, bucket, parameter):
        return False


class _BucketedElements(_Bucketed):
    def size(self, parameter):
        return parameter.numel()


class _BucketedFourBytes(_Bucketed):
    def size(self, parameter):
        return 4 * parameter.numel()


class _BucketedOverfull(_Bucketed):
    """A bucket is closed when it has reached the size."""

    def fits(self, bucket, parameter):
        return sum(map(self.size, bucket)) < self.bucket_bytes


class _BucketedNeverFull(_Bucketed):
    def fits(self, bucket, parameter):
        return sum(map(self.size, [*bucket, parameter])) < self.bucket_bytes


class _BucketedFirstFit(_Bucketed):
    """Goes back to any bucket that has room."""

    def cut(self, parameters):
        buckets = []
        for parameter in parameters:
            for bucket in buckets:
                if self.fits(bucket, parameter):
                    bucket.append(parameter)
                    break
            else:
                buckets.append([parameter])
        return buckets


class _BucketedByArrival(_Bucketed):
    """Gradients go into the bucket in the order in which they come; the rest in finish()."""

    def begin(self):
        super().begin()
        self.open = []

    def arrived(self, parameter):
        if self.synchronise:
            self.there.add(parameter)
            if self.open and not self.fits(self.open, parameter):
                self.close()
            self.open.append(parameter)

    def close(self):
        if self.open:
            self.send(self.open)
        self.open = []

    def send_the_rest(self):
        for parameter in self.listed():
            if parameter not in self.there:
                self.arrived(parameter)
        self.close()


class _BucketedOutOfOrder(_Bucketed):
    """Every bucket is sent as soon as it is complete, whatever came before."""

    def begin(self):
        super().begin()
        self.gone = set()

    def send_what_is_ready(self):
        for number, bucket in enumerate(self.buckets):
            if number not in self.gone and self.ready(bucket):
                self.gone.add(number)
                self.send(bucket)

    def send_the_rest(self):
        for number, bucket in enumerate(self.buckets):
            if number not in self.gone:
                self.send(bucket)


class _BucketedWorksOnce(_Bucketed):
    """What has arrived is not forgotten after a step."""

    def begin(self):
        self.sent = []
        if not hasattr(self, "there"):
            self.there = set()


class _BucketedNeverBegins(_Bucketed):
    """The buckets of the first step count as sent in all later ones."""

    def begin(self):
        if not hasattr(self, "sent"):
            super().begin()


class _BucketedTooEarly(_Bucketed):
    """A bucket goes with the first of its gradients."""

    def ready(self, bucket):
        return any(parameter in self.there for parameter in bucket)


class _BucketedFrozenToo(_Bucketed):
    def listed(self):
        return list(self.module.parameters())[::-1]


class _BucketedHooksFrozen(_Bucketed):
    def trained(self):
        return list(self.module.parameters())


class _BucketedTiedTwice(_Bucketed):
    def listed(self):
        named = self.module.named_parameters(remove_duplicate=False)
        return [parameter for _, parameter in named if parameter.requires_grad][::-1]


class _BucketedSkipsNone(_Bucketed):
    """Where this rank had no gradient, it gets none."""

    def store(self, parameter, mean):
        if parameter.grad is not None:
            parameter.grad.copy_(mean)


class _BucketedWithoutZeros(_Bucketed):
    """Only what is there is sent."""

    def gradient(self, parameter):
        return torch.zeros(0, dtype=parameter.dtype) if parameter.grad is None else parameter.grad

    def finish(self):
        self.send_the_rest()
        self.wait()
        for bucket, flat, _ in self.sent:
            there = [parameter for parameter in bucket if parameter.grad is not None]
            pieces = self.divide(flat).split([parameter.numel() for parameter in there])
            for parameter, piece in zip(there, pieces, strict=True):
                parameter.grad.copy_(piece.view_as(parameter))
        self.begin()


class _BucketedWithoutRest(_Bucketed):
    def send_the_rest(self):
        pass


class _BucketedStale(_Bucketed):
    """Flat tensors kept between steps, in which what is not written is what was there before."""

    def gradient(self, parameter):
        if not hasattr(self, "old"):
            self.old = {p: torch.zeros_like(p) for p in self.trained()}
        if parameter.grad is not None:
            self.old[parameter] = parameter.grad.clone()
        return self.old[parameter]


class _BucketedNewest(_Bucketed):
    """Hooks that are handed the gradient of this backward pass, without what is in .grad."""

    def hook(self, parameter):
        def hook(grad):
            if self.synchronise:
                self.newest[parameter] = grad
                self.arrived(parameter)

        parameter.register_hook(hook)

    def begin(self):
        super().begin()
        self.newest = {}

    def gradient(self, parameter):
        return self.newest.get(parameter, torch.zeros_like(parameter))


class _BucketedAlwaysSynchronised(_Bucketed):
    @contextmanager
    def no_sync(self):
        yield


class _BucketedNeverAgain(_Bucketed):
    @contextmanager
    def no_sync(self):
        self.synchronise = False
        yield


class _BucketedUnlessRaised(_Bucketed):
    @contextmanager
    def no_sync(self):
        self.synchronise = False
        yield
        self.synchronise = True


class _BucketedAskedInForward(_Bucketed):
    """Whether a backward pass synchronises is settled when its forward runs."""

    def forward(self, *args, **kwargs):
        self.settled = self.synchronise
        return super().forward(*args, **kwargs)

    def arrived(self, parameter):
        if self.settled:
            self.there.add(parameter)
            self.send_what_is_ready()


class _BucketedNotesInNoSync(_Bucketed):
    """Inside no_sync the hooks send nothing, and note what has arrived all the same."""

    def arrived(self, parameter):
        self.there.add(parameter)
        if self.synchronise:
            self.send_what_is_ready()


class _BucketedSendsAfterwards(_Bucketed):
    """no_sync ends with what it put off."""

    @contextmanager
    def no_sync(self):
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True
            self.finish()


class _BucketedCountsOn(_Bucketed):
    """Counts down to zero, and is not set back."""

    def begin(self):
        self.sent = []
        if not hasattr(self, "left"):
            self.left = [len(bucket) for bucket in self.buckets]

    def arrived(self, parameter):
        if self.synchronise:
            for number, bucket in enumerate(self.buckets):
                self.left[number] -= sum(parameter is other for other in bucket)
            while len(self.sent) < len(self.buckets) and self.left[len(self.sent)] == 0:
                self.send(self.buckets[len(self.sent)])


class _BucketedWithoutKeywords(_Bucketed):
    def forward(self, *args):
        return self.module(*args)


class _BucketedRankZero(_Bucketed):
    """The means go to rank 0 only."""

    def store(self, parameter, mean):
        if dist.get_rank() == 0:
            super().store(parameter, mean)
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class _BucketedFromLastRank(_Bucketed):
    def start(self):
        for tensor in super().start():
            dist.broadcast(tensor.detach(), dist.get_world_size() - 1)
        return []


class _BucketedEightBytes(_Bucketed):
    def size(self, parameter):
        return 8 * parameter.numel()


class _BucketedInDouble(_Bucketed):
    def gradient(self, parameter):
        return super().gradient(parameter).double()

    def store(self, parameter, mean):
        parameter.grad = mean.to(parameter.dtype)


class _BucketedForgetsUnused(_Bucketed):
    """Zeros for what the last backward did not bring, though earlier ones may have."""

    def gradient(self, parameter):
        return parameter.grad if parameter in self.there else torch.zeros_like(parameter)


class _BucketedEmptiesIncomplete(_Bucketed):
    """Zeros for all of a bucket that is not complete."""

    def send_the_rest(self):
        for bucket in self.buckets[len(self.sent) :]:
            if not self.ready(bucket):
                for parameter in bucket:
                    parameter.grad = None
            self.send(bucket)


class _BucketedEverArrived(_Bucketed):
    """A bucket waits for those of its parameters that have had a gradient before."""

    def begin(self):
        self.known = getattr(self, "known", set()) | getattr(self, "there", set())
        super().begin()

    def ready(self, bucket):
        return self.there.issuperset(p for p in bucket if p in self.known or not self.known)


class _BucketedSwallows(_Bucketed):
    @contextmanager
    def no_sync(self):
        self.synchronise = False
        try:
            yield
        except Exception:
            pass
        finally:
            self.synchronise = True


class _BucketedWithoutNumbers(_Bucketed):
    def trained(self):
        return [parameter for parameter in super().trained() if parameter.ndim > 0]


class _BucketedInTraining(_Bucketed):
    def arrived(self, parameter):
        if self.training:
            super().arrived(parameter)


class _BucketedBeginsInForward(_Bucketed):
    def forward(self, *args, **kwargs):
        super().begin()
        return super().forward(*args, **kwargs)


class _BucketedFirstOutput(_Bucketed):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _BucketedOneSwitch(_Bucketed):
    """The switch of no_sync belongs to the class."""

    on = True

    def arrived(self, parameter):
        if _BucketedOneSwitch.on:
            super().arrived(parameter)

    @contextmanager
    def no_sync(self):
        _BucketedOneSwitch.on = False
        try:
            yield
        finally:
            _BucketedOneSwitch.on = True


class _BucketedSendsBuffers(_Bucketed):
    def forward(self, *args, **kwargs):
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)
        return super().forward(*args, **kwargs)


class _BucketedSendsParameters(_Bucketed):
    def finish(self):
        super().finish()
        for parameter in self.module.parameters():
            dist.broadcast(parameter.detach(), 0)


class _BucketedKeywordsDropped(_Bucketed):
    def forward(self, *args, **kwargs):
        return self.module(*args)


class _BucketedFirstArgument(_Bucketed):
    def forward(self, *args, **kwargs):
        return self.module(args[0], **kwargs)


class _BucketedOneAtATime(_Bucketed):
    """A hook sends one bucket at most."""

    def send_what_is_ready(self):
        if len(self.sent) < len(self.buckets) and self.ready(self.buckets[len(self.sent)]):
            self.send(self.buckets[len(self.sent)])


class _BucketedWaitsForPrevious(_Bucketed):
    def send(self, bucket):
        if self.sent:
            self.sent[-1][2].wait()
        super().send(bucket)


class _BucketedCountsInNoSync(_Bucketed):
    """Counts down inside no_sync too, beyond zero."""

    def begin(self):
        self.sent, self.left = [], [len(bucket) for bucket in self.buckets]

    def arrived(self, parameter):
        for number, bucket in enumerate(self.buckets):
            self.left[number] -= sum(parameter is other for other in bucket)
        while self.synchronise and len(self.sent) < len(self.buckets):
            if self.left[len(self.sent)] != 0:
                break
            self.send(self.buckets[len(self.sent)])


class _BucketedViews(nn.Module):
    """Flat tensors kept between steps, of which the gradients become parts."""

    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module, self.silent = module, False
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)
        groups, taken = [[]], 0
        for parameter in list(module.parameters())[::-1]:
            if parameter.requires_grad:
                if groups[-1] and taken + parameter.nbytes > bucket_bytes:
                    groups.append([])
                    taken = 0
                groups[-1].append(parameter)
                taken += parameter.nbytes
        self.flats, self.views, self.works, self.waiting = [], {}, [], []
        for number, group in enumerate(groups):
            flat = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype)
            self.flats.append(flat)
            pieces = flat.split([p.numel() for p in group])
            for parameter, piece in zip(group, pieces, strict=True):
                self.views[parameter] = piece.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(self.hook_for(number))
        self.sizes = [len(group) for group in groups]
        self.waiting = list(self.sizes)

    def hook_for(self, number):
        def hook(parameter):
            if self.silent:
                return
            self.gather(parameter)
            self.waiting[number] -= 1
            while len(self.works) < len(self.flats) and self.waiting[len(self.works)] == 0:
                self.launch()

        return hook

    def gather(self, parameter):
        view = self.views[parameter]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad is not view:
            view.copy_(parameter.grad)
        parameter.grad = view

    def launch(self):
        self.works.append(dist.all_reduce(self.flats[len(self.works)], async_op=True))

    def finish(self):
        sent = sum(self.sizes[: len(self.works)])
        for parameter in list(self.views)[sent:]:
            self.gather(parameter)
        while len(self.works) < len(self.flats):
            self.launch()
        for work, flat in zip(self.works, self.flats, strict=True):
            work.wait()
            flat.div_(dist.get_world_size())
        self.works, self.waiting = [], list(self.sizes)

    @contextmanager
    def no_sync(self):
        before, self.silent = self.silent, True
        try:
            yield self
        finally:
            self.silent = before

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class _BucketedFutures(nn.Module):
    """Hooks on the nodes that add to .grad; futures that divide; nothing kept but indices."""

    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module, self.on = module, True
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        self.ps = [p for p in module.parameters() if p.requires_grad][::-1]
        self.bucket_of, number, used = [], 0, 0
        for p in self.ps:
            size = p.numel() * p.element_size()
            if used and used + size > bucket_bytes:
                number, used = number + 1, 0
            used += size
            self.bucket_of.append(number)
        self.nodes = []
        for index, p in enumerate(self.ps):
            node = p.expand_as(p).grad_fn.next_functions[0][0]
            node.register_hook(lambda *_, index=index: self.notice(index))
            self.nodes.append(node)
        self.seen, self.futures = set(), []

    def notice(self, index):
        if not self.on:
            return
        self.seen.add(index)
        last = self.bucket_of[-1]
        while (next_bucket := len(self.futures)) <= last and all(
            i in self.seen for i, b in enumerate(self.bucket_of) if b == next_bucket
        ):
            self.post(next_bucket)

    def members(self, bucket):
        return [p for p, b in zip(self.ps, self.bucket_of, strict=True) if b == bucket]

    def post(self, bucket):
        world = dist.get_world_size()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.members(bucket)]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        future = dist.all_reduce(flat, async_op=True).get_future()
        self.futures.append(future.then(lambda done: done.value()[0] / world))

    def finish(self):
        for bucket in range(len(self.futures), self.bucket_of[-1] + 1):
            self.post(bucket)
        for bucket, future in enumerate(self.futures):
            mean, start = future.wait(), 0
            for p in self.members(bucket):
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.copy_(mean[start : start + p.numel()].view(p.shape))
                start += p.numel()
        self.seen, self.futures = set(), []

    class _Silence:
        def __init__(self, ddp):
            self.ddp = ddp

        def __enter__(self):
            self.ddp.on = False

        def __exit__(self, *error):
            self.ddp.on = True

    def no_sync(self):
        return self._Silence(self)

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def _bucketed_by_closure(module, bucket_bytes=25 * 2**20):
    """Tensor hooks, which see the new gradient before it is added to .grad; divided beforehand."""
    state = {"on": True, "totals": {}, "works": []}
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    buckets = []
    for parameter in reversed(list(filter(lambda p: p.requires_grad, module.parameters()))):
        full = not buckets or sum(p.nbytes for p in buckets[-1]) + parameter.nbytes > bucket_bytes
        buckets.append([parameter]) if full else buckets[-1].append(parameter)

    def send():
        bucket = buckets[len(state["works"])]
        now = [p.grad if p not in state["totals"] else state["totals"][p] for p in bucket]
        now = [torch.zeros_like(p) if g is None else g for p, g in zip(bucket, now, strict=True)]
        flat = torch._utils._flatten_dense_tensors(now).div_(dist.get_world_size())
        state["works"].append((dist.all_reduce(flat, async_op=True), flat, now))

    def hook_for(parameter):
        def hook(grad):
            if state["on"]:
                total = grad if parameter.grad is None else parameter.grad + grad
                state["totals"][parameter] = total
                while len(state["works"]) < len(buckets):
                    if not all(p in state["totals"] for p in buckets[len(state["works"])]):
                        break
                    send()

        return hook

    for bucket in buckets:
        for parameter in bucket:
            parameter.register_hook(hook_for(parameter))

    def finish():
        while len(state["works"]) < len(buckets):
            send()
        for bucket, (work, flat, like) in zip(buckets, state["works"], strict=True):
            work.wait()
            means = torch._utils._unflatten_dense_tensors(flat, like)
            for parameter, mean in zip(bucket, means, strict=True):
                parameter.grad = mean
        state["totals"].clear()
        state["works"].clear()

    @contextmanager
    def no_sync():
        state["on"] = False
        try:
            yield
        finally:
            state["on"] = True

    class Wrapped:
        def __call__(self, *args, **kwargs):
            return module(*args, **kwargs)

    wrapped = Wrapped()
    wrapped.module, wrapped.finish, wrapped.no_sync = module, finish, no_sync
    return wrapped


class _BucketedCounting(nn.Module):
    """A counter per bucket, set back in finish(); the average is formed by the sum itself."""

    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module = module
        self.accumulating = False
        objects = [module.state_dict()]
        dist.broadcast_object_list(objects, src=0)
        module.load_state_dict(objects[0])
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
        self.buckets, self.place, free = [], {}, -1
        for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
            free -= parameter.nbytes
            if free < 0:
                self.buckets.append([])
                free = bucket_bytes - parameter.nbytes
            self.place[id(parameter)] = len(self.buckets) - 1
            self.buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(self.count)
        self.counts, self.flats, self.works = [0] * len(self.buckets), [], []

    def count(self, parameter):
        if self.accumulating:
            return
        self.counts[self.place[id(parameter)]] += 1
        for number in range(len(self.works), len(self.buckets)):
            if self.counts[number] < len(self.buckets[number]):
                break
            self.send(number)

    def send(self, number):
        for parameter in self.buckets[number]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = nn.utils.parameters_to_vector([p.grad for p in self.buckets[number]])
        self.flats.append(flat)
        self.works.append(dist.all_reduce(flat, op=dist.ReduceOp.AVG, async_op=True))

    def finish(self):
        for number in range(len(self.works), len(self.buckets)):
            self.send(number)
        while self.works:
            self.works.pop(0).wait()
            bucket, flat = self.buckets[-len(self.flats)], self.flats.pop(0)
            nn.utils.vector_to_parameters(flat, [p.grad for p in bucket])
        self.counts = [0] * len(self.buckets)

    @contextmanager
    def no_sync(self):
        self.accumulating = True
        try:
            yield
        finally:
            self.accumulating = False

    def forward(self, *inputs, **named):
        return self.module(*inputs, **named)


BUCKETED_DDP = Exercise(
    slug="bucketed_ddp",
    chapter=5,
    title="Gradients that travel in buckets while backward computes",
    minutes=50,
    difficulty=5,
    reference=reference.BucketedDDP,
    observe=_observe_bucketed_ddp,
    misconceptions=(
        Misconception(
            "unlike_start",  # museum 5.4
            _BucketedUnlikeStart,
            "The ranks start from different weights: rank 0's do not get into the tensors of the "
            "others. Averaged gradients keep ranks together that are together, and bring none "
            "there.",
        ),
        Misconception(
            "without_buffers",
            _BucketedWithoutBuffers,
            "The parameters are the same on all ranks at the start, the buffers are not. Running "
            "statistics of batch norm and the like are part of what a model computes.",
        ),
        Misconception(
            "frozen_not_sent",
            _BucketedTrainedOnly,
            "At the start you send only parameters that are trained. The frozen ones differ from "
            "rank to rank, and with them all that the layers behind them compute.",
        ),
        Misconception(
            "sum",  # museum 5.2
            _BucketedSum,
            "You leave the sum over the ranks in `.grad`. It is world_size times the mean, and so "
            "is the step; the ranks agree with each other, so that nothing else shows it.",
        ),
        Misconception(
            "always_two",
            _BucketedHalf,
            "You divide by 2 whatever the number of processes. Ask the group how many it has.",
        ),
        Misconception(
            "divided_twice",
            _BucketedDividedTwice,
            "You divide by the number of processes twice. One division gives the mean, before the "
            "sum or after it (ReduceOp.AVG divides too); two give gradients that are world_size "
            "times too small.",
        ),
        Misconception(
            "not_copied_back",  # museum 5.7
            _BucketedKept,
            "The buckets are summed, and `.grad` still holds this rank's own gradients. A bucket "
            "is a copy of the gradients: when its sum has come, each part of it has to go back to "
            "its parameter.",
        ),
        Misconception(
            "rank_zero_only",
            _BucketedRankZero,
            "Only rank 0 gets the means back into its gradients. Every rank takes the step, so "
            "each needs them.",
        ),
        Misconception(
            "without_waiting",  # museum 5.10
            _BucketedWithoutWaiting,
            "`finish()` reads the buckets without waiting for them. What stands there is this "
            "rank's own gradients, or the sum, as the network pleases; an asynchronous call "
            "returns a work, and only its `wait()` says that the sum is there.",
        ),
        Misconception(
            "waits_for_the_last_only",
            _BucketedWaitsForLast,
            "`finish()` waits for the last bucket only. That one may come before the others; "
            "every bucket is waited for before it is read.",
        ),
        Misconception(
            "blocking",
            _BucketedBlocking,
            "The gradients are right, and each bucket is sent by a call that returns only when "
            "the sum is there. Backward stands still meanwhile, so that nothing overlaps; "
            "all_reduce has an asynchronous form.",
        ),
        Misconception(
            "waits_in_the_hook",
            _BucketedWaitsAtOnce,
            "The gradients are right, and you wait for each bucket right after sending it, while "
            "backward stands still. Keep the works and wait for them in `finish()`.",
        ),
        Misconception(
            "all_in_finish",
            _BucketedAllInFinish,
            "The gradients are right, and nothing is sent before `finish()`. When backward is over "
            "there is nothing left to compute while the messages travel; a bucket goes as soon as "
            "its last gradient is there.",
        ),
        Misconception(
            "in_the_order_of_parameters",
            _BucketedForward,
            "You fill the buckets in the order of the parameters. Backward begins with the last "
            "layer, so that the first bucket is complete only when it ends, and all others wait "
            "for it.",
        ),
        Misconception(
            "one_bucket",
            _BucketedOne,
            "All gradients of this net travel in one bucket, also where `bucket_bytes` is much "
            "smaller than they are. It is complete only when backward is over, so that nothing "
            "overlaps.",
        ),
        Misconception(
            "one_bucket_each",
            _BucketedEach,
            "Every gradient has a bucket of its own. That is a message for each parameter again, "
            "and each message costs the same time to start; fill a bucket as long as it stays "
            "within `bucket_bytes`.",
        ),
        Misconception(
            "counts_elements",
            _BucketedElements,
            "You count elements where `bucket_bytes` counts bytes. A float32 has 4 of them and a "
            "float64 has 8, so that your buckets are that much too large.",
        ),
        Misconception(
            "four_bytes",
            _BucketedFourBytes,
            "You reckon 4 bytes for every element. These gradients are float64 and have 8; a "
            "tensor can be asked for its element_size().",
        ),
        Misconception(
            "overfull",
            _BucketedOverfull,
            "You close a bucket when it has reached `bucket_bytes`, so that it may hold more. A "
            "parameter that would take it beyond the limit opens the next bucket.",
        ),
        Misconception(
            "never_quite_full",
            _BucketedNeverFull,
            "A bucket that would be filled to the last byte is not: you keep it below "
            "`bucket_bytes`. Exactly so many are within the limit.",
        ),
        Misconception(
            "first_with_room",
            _BucketedFirstFit,
            "You put a parameter into any earlier bucket that has room. That bucket then has to "
            "wait for a gradient that comes late; only the last bucket is filled further.",
        ),
        Misconception(
            "by_arrival",  # museum 5.8
            _BucketedByArrival,
            "You fill the buckets with gradients as they come. Where two ranks use the parameters "
            "in different orders, or not all of them, one rank's bucket is added to another "
            "bucket of the other; what belongs together has to be settled beforehand.",
        ),
        Misconception(
            "out_of_order",  # museum 5.8
            _BucketedOutOfOrder,
            "You send each bucket when it is complete, whatever the order. Two ranks may complete "
            "them in different orders, and then one's bucket is added to another bucket of the "
            "other, without an error where the sizes are the same; a bucket waits for those before "
            "it.",
        ),
        Misconception(
            "works_once",
            _BucketedWorksOnce,
            "The first step is right. In the next you still take all of its gradients for arrived, "
            "so that every bucket goes with the first hook, before its gradients are there; "
            "`finish()` has to put everything back to the beginning.",
        ),
        Misconception(
            "counts_on",
            _BucketedCountsOn,
            "The gradients are right, and from the second step on nothing is sent while backward "
            "computes: what you count goes on from where the last step left it. `finish()` has to "
            "put everything back to the beginning.",
        ),
        Misconception(
            "sent_for_ever",
            _BucketedNeverBegins,
            "The first step is right. In the next all buckets still count as sent: nothing "
            "travels, and the gradients of the first step come back. `finish()` has to put "
            "everything back to the beginning.",
        ),
        Misconception(
            "too_early",
            _BucketedTooEarly,
            "You send a bucket when the first of its gradients is there. The others are not in it "
            "yet; it has to be complete.",
        ),
        Misconception(
            "frozen_in_a_bucket",
            _BucketedFrozenToo,
            "Parameters that require no gradient are in your buckets. None ever comes for them, so "
            "that their bucket, and all behind it, is not sent before `finish()`; and they have a "
            "gradient of zeros afterwards.",
        ),
        Misconception(
            "hook_on_frozen",
            _BucketedHooksFrozen,
            "You register a hook on parameters that require no gradient too, which torch refuses. "
            "Leave the frozen ones out.",
        ),
        Misconception(
            "tied_twice",
            _BucketedTiedTwice,
            "A weight that two layers share stands in the buckets twice, and its gradient travels "
            "twice. `parameters()` lists a shared parameter once.",
        ),
        Misconception(
            "none_stays_none",
            _BucketedSkipsNone,
            "A parameter without a gradient has none after `finish()` either. It counts as zeros, "
            "and another rank may have a gradient for it: the mean goes to all ranks, so that all "
            "take the same step.",
        ),
        Misconception(
            "none_left_out",
            _BucketedWithoutZeros,
            "A parameter without a gradient is left out of its bucket. On a rank that has one the "
            "bucket is longer, and the sums do not fit together; it counts as zeros.",
        ),
        Misconception(
            "rest_not_sent",
            _BucketedWithoutRest,
            "`finish()` does not send the buckets that are still incomplete after backward. A rank "
            "that did not use some parameter never sends its bucket, and those that did wait for "
            "it without end.",
        ),
        Misconception(
            "old_values",
            _BucketedStale,
            "Where a parameter has no gradient in this step, its bucket still holds the one of an "
            "earlier step, which is sent again. Such a part has to be set to zero.",
        ),
        Misconception(
            "newest_only",
            _BucketedNewest,
            "You send the gradient of the last backward pass only. What earlier passes inside "
            "`no_sync()` accumulated in `.grad` is lost; a bucket takes what is in `.grad` when "
            "the new gradient has been added.",
        ),
        Misconception(
            "always_synchronised",  # museum 5.15
            _BucketedAlwaysSynchronised,
            "`no_sync()` changes nothing: backward inside it sends buckets all the same, and they "
            "hold gradients that are not complete.",
        ),
        Misconception(
            "noted_inside_no_sync",
            _BucketedNotesInNoSync,
            "Inside `no_sync()` you send nothing, and note the gradients as arrived all the same. "
            "The next backward then takes every bucket for complete at its first hook, and sends "
            "it before its gradients are there.",
        ),
        Misconception(
            "sent_at_the_end_of_no_sync",
            _BucketedSendsAfterwards,
            "You send the gradients when `no_sync()` ends. That is a message for each micro-batch "
            "again; they should stay where they are, and travel once, with the backward pass that "
            "comes after.",
        ),
        Misconception(
            "never_again",  # museum 5.17
            _BucketedNeverAgain,
            "After `no_sync()` nothing is sent any more while backward computes. What it switches "
            "off has to be switched on again at its end.",
        ),
        Misconception(
            "not_after_an_exception",
            _BucketedUnlessRaised,
            "Where an exception leaves `no_sync()`, sending stays switched off. A context manager "
            "puts things back whichever way its block ends.",
        ),
        Misconception(
            "settled_in_forward",  # museum 5.16
            _BucketedAskedInForward,
            "Whether backward sends anything is settled when forward runs. It should be settled "
            "when backward runs: it sends nothing inside `no_sync()`, also where forward ran "
            "before.",
        ),
        Misconception(
            "without_keywords",
            _BucketedWithoutKeywords,
            "Your forward takes no keywords. The module may be called with any arguments.",
        ),
        Misconception(
            "keywords_dropped",
            _BucketedKeywordsDropped,
            "Your forward accepts keywords and does not hand them on to the module, which then "
            "computes with its defaults and raises no error.",
        ),
        Misconception(
            "first_argument_only",
            _BucketedFirstArgument,
            "Your forward hands on the first of its arguments only. The module may be called with "
            "several, and those that it has defaults for are lost without an error.",
        ),
        Misconception(
            "first_output_only",
            _BucketedFirstOutput,
            "Your forward returns the first of the module's outputs only. Whatever the module "
            "returns, a tuple too, is to be handed back as it is.",
        ),
        Misconception(
            "from_the_last_rank",
            _BucketedFromLastRank,
            "All ranks start alike, from the weights of the last rank. They should be rank 0's, "
            "which is the one that loads a checkpoint.",
        ),
        Misconception(
            "buffers_in_every_forward",
            _BucketedSendsBuffers,
            "Your forward sends the buffers each time. That is a message a buffer in every step, "
            "which all ranks wait for; here they are sent once, at the start.",
        ),
        Misconception(
            "parameters_in_every_finish",
            _BucketedSendsParameters,
            "`finish()` sends all parameters as well. They are the same on all ranks already, "
            "since all take the same steps from one start, and this doubles the traffic and more; "
            "only the buckets have to travel.",
        ),
        Misconception(
            "eight_bytes",
            _BucketedEightBytes,
            "You reckon 8 bytes for every element. That is right for float64; a float32 has 4, "
            "and your buckets hold half of what they could. A tensor can be asked for its "
            "element_size().",
        ),
        Misconception(
            "sent_in_double",
            _BucketedInDouble,
            "You send float32 gradients as float64. That is twice the bytes and no more digits; a "
            "bucket should have the dtype of its gradients.",
        ),
        Misconception(
            "numbers_left_out",
            _BucketedWithoutNumbers,
            "A parameter that is a single number, of no dimensions, is in none of your buckets. "
            "Its gradient stays on its own rank, and the ranks' weights drift apart.",
        ),
        Misconception(
            "zeros_for_what_came_earlier",
            _BucketedForgetsUnused,
            "You send zeros for every parameter that the last backward did not use. It may have "
            "a gradient from an earlier pass inside `no_sync()`, which is lost; what counts is "
            "what is in `.grad`.",
        ),
        Misconception(
            "zeros_for_incomplete_buckets",
            _BucketedEmptiesIncomplete,
            "Where a bucket is incomplete after backward, you drop all gradients in it. Some of "
            "them are there, from this pass or from one inside `no_sync()`; only a gradient that "
            "is None counts as zeros.",
        ),
        Misconception(
            "waits_for_what_came_before",
            _BucketedEverArrived,
            "A bucket of yours waits only for parameters that have had a gradient in an earlier "
            "step. One that is used for the first time later comes when its bucket has gone; the "
            "list of what is awaited is the same in every step.",
        ),
        Misconception(
            "only_in_training_mode",
            _BucketedInTraining,
            "In eval mode nothing is sent while backward computes. The mode changes what layers "
            "like dropout compute; only `no_sync()` says that nothing is to be sent.",
        ),
        Misconception(
            "forgotten_in_forward",
            _BucketedBeginsInForward,
            "Forward puts everything back to the beginning. A forward between backward and "
            "`finish()`, to compute a metric, then makes `finish()` send buckets that have been "
            "sent already; it is `finish()` that ends a step.",
        ),
        Misconception(
            "one_switch_for_all",
            _BucketedOneSwitch,
            "`no_sync()` of one wrapper switches off all others too. Two nets may be trained side "
            "by side; the switch should belong to the object and not to its class.",
        ),
        Misconception(
            "swallows_exceptions",
            _BucketedSwallows,
            "An exception inside `no_sync()` disappears there: the code after the block goes on as "
            "if nothing had happened. Put the switch back and let the exception pass.",
        ),
        Misconception(
            "one_bucket_a_hook",
            _BucketedOneAtATime,
            "A hook of yours sends one bucket at most. Where several have been waiting for the one "
            "before them, all of them can go at once; look at what is asked once and should be "
            "asked until it is no longer so.",
        ),
        Misconception(
            "waits_for_the_previous",
            _BucketedWaitsForPrevious,
            "The gradients are right, and before a bucket is sent you wait for the one before it, "
            "while backward stands still. The order in which they are sent is enough; keep the "
            "works and wait for them in `finish()`.",
        ),
        Misconception(
            "counted_inside_no_sync",
            _BucketedCountsInNoSync,
            "Inside `no_sync()` you count the gradients that arrive, and send nothing. The count "
            "is off in the backward pass after it, so that no bucket goes before `finish()`.",
        ),
    ),
    alternatives=(_BucketedViews, _BucketedFutures, _bucketed_by_closure, _BucketedCounting),
    hints=(
        "Settle in __init__ which parameters are in which bucket, the same on all ranks. What has "
        "to be remembered during backward is which gradients are there and how many buckets have "
        "been sent.",
        "A hook on each parameter notes its gradient as arrived; then, while the next bucket in "
        "the order is complete, send it: torch.cat of the flattened gradients, "
        "dist.all_reduce(flat, async_op=True), and keep (flat, work). An attribute that no_sync() "
        "sets and puts back makes the hook do nothing.",
        "finish(): send the buckets that are left, zeros for each gradient that is None; for each "
        "bucket work.wait(), divide by the number of processes, split by the parameters' numel() "
        "and give each parameter its piece as .grad; then forget what had arrived and what was "
        "sent.",
    ),
)


# --- what several of them observe with ----------------------------------------------------------


def _with_values(see, module):
    """`module` in float64 with parameters of order 1, the same on every rank."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(see.randn(*parameter.shape) / 2)
    return module


def _raised(see, probe):
    """Whether the probe ended in an exception: what hangs once need not hang again."""
    return "raised" in see.seen[probe]


@contextmanager
def _folder():
    """An empty folder for as long as a probe lasts."""
    folder = tempfile.mkdtemp(prefix="course-files-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mean_of_gradients(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


# --- fix_no_sync_on_last_batch ------------------------------------------------------------------


def accumulate_shards(ddp, micro_batches, loss_function):
    """Leave in .grad the mean over this step's micro-batches and over the ranks."""
    with ddp.no_sync():
        for x, y in micro_batches:
            (loss_function(ddp(x), y) / len(micro_batches)).backward()


class _Traced(nn.Module):
    """Two layers, with a note of every forward pass and of the beginning of every backward pass."""

    def __init__(self, see):
        super().__init__()
        self.hidden, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.log = []
        _with_values(see, self)

    def forward(self, x):
        self.log.append("forward")
        logits = self.out(torch.tanh(self.hidden(x)))
        if logits.requires_grad:
            logits.register_hook(lambda grad: self.log.append("backward"))
        return logits


def _sent(log, bucket):
    """DistributedDataParallel's own averaging, with a note that it happens."""
    log.append("the gradients travel")
    mean = bucket.buffer()
    dist.all_reduce(mean)  # waits at once: a rank that is left alone here is found at once
    mean /= dist.get_world_size()
    future = torch.futures.Future()
    future.set_result(mean)
    return future


def _accumulated(accumulate_shards, see, micro_batches, earlier=False):
    """One call on this rank, of micro-batches of 2 samples."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    module = _Traced(see)
    ddp = nn.parallel.DistributedDataParallel(module)
    ddp.register_comm_hook(module.log, _sent)
    through, in_force = [], []
    ddp.register_forward_pre_hook(lambda *_: through.append(1))
    module.out.weight.register_hook(lambda _: in_force.append(not ddp.require_backward_grad_sync))
    x = see.randn(micro_batches, world_size, 2, 5)
    y = see.randint(0, 3, micro_batches, world_size, 2)
    if earlier:
        for parameter in module.parameters():
            parameter.grad = see.randn(*parameter.shape)
    own = [(x[i, rank], y[i, rank]) for i in range(micro_batches)]
    before, given = len(calls()), list(own)
    accumulate_shards(ddp, given, F.cross_entropy)
    moved = sum(call.bytes > 8 for call in calls()[before:])
    for name, parameter in module.named_parameters():
        see(f"the gradient of {name}", parameter.grad)
    times = module.log.count("the gradients travel")
    see("how often the gradients travelled", times)
    if times != 1:  # a right answer never comes here: why not
        see("forward passes through ddp", len(through))
        if through:
            see("no_sync() was on when backward ran", str(in_force))
    see("how much else was sent", moved - times)
    see("what happened, in order", " → ".join(module.log))
    kept = len(given) == len(own) and all(a is b for a, b in zip(given, own, strict=False))
    see.fact("the list of micro-batches stays as it is", kept)
    see.fact("ddp synchronises afterwards as before", ddp.require_backward_grad_sync)
    if not kept or not ddp.require_backward_grad_sync:
        return
    x = see.randn(micro_batches + 1, world_size, 2, 5)
    y = see.randint(0, 3, micro_batches + 1, world_size, 2)
    module.log.clear()
    own = [(x[i, rank], y[i, rank]) for i in range(micro_batches + 1)]
    accumulate_shards(ddp, own, _smoothed)
    second = f"after a second call, with {micro_batches + 1} micro-batches and another loss"
    for name, parameter in module.named_parameters():
        see(f"the gradient of {name} {second}", parameter.grad)
    see(f"what happened, in order, {second}", " → ".join(module.log))


def _smoothed(logits, y):
    return F.cross_entropy(logits, y, label_smoothing=0.3)


def _observe_accumulate_shards(accumulate_shards, see):
    with see.probe("one process alone, 3 micro-batches"), alone():
        _accumulated(accumulate_shards, see, 3)
    with see.probe("one process alone, 1 micro-batch; there were gradients before"), alone():
        _accumulated(accumulate_shards, see, 1, earlier=True)
    if not see.agrees:
        return
    first = "2 processes, 4 micro-batches each"
    with see.probe(first):
        on_ranks(see, 2, _accumulated, accumulate_shards, 4)
    if _raised(see, first):
        return
    with see.probe("3 processes, 2 micro-batches each; there were gradients before"):
        on_ranks(see, 3, _accumulated, accumulate_shards, 2, True)


def _shards(scale=lambda losses, n: losses / n, silent=lambda i, n: i < n - 1, before=None):
    """accumulate_shards with another division, other silent micro-batches, or something before."""

    def accumulate_shards(ddp, micro_batches, loss_function):
        n = len(micro_batches)
        if before is not None:
            before(ddp)
        for i, (x, y) in enumerate(micro_batches):
            with ddp.no_sync() if silent(i, n) else nullcontext():
                scale(loss_function(ddp(x), y), n).backward()

    return accumulate_shards


_shards_never_sent = _shards(silent=lambda i, n: True)
_shards_always_sent = _shards(silent=lambda i, n: False)
_shards_first_sent = _shards(silent=lambda i, n: i > 0)
_shards_undivided = _shards(scale=lambda loss, n: loss)
_shards_by_ranks_too = _shards(scale=lambda loss, n: loss / n / dist.get_world_size())
_shards_zeroed = _shards(before=lambda ddp: ddp.zero_grad())
_shards_of_four = _shards(
    scale=lambda loss, n: loss / 4, silent=lambda i, n: (i + 1) % 4 != 0 and i < n - 1
)


def _shards_no_sync_around_backward(ddp, micro_batches, loss_function):
    *first, (x, y) = micro_batches
    for early_x, early_y in first:
        loss = loss_function(ddp(early_x), early_y) / len(micro_batches)
        with ddp.no_sync():
            loss.backward()
    (loss_function(ddp(x), y) / len(micro_batches)).backward()


def _shards_through_module(ddp, micro_batches, loss_function):
    for x, y in micro_batches:
        (loss_function(ddp.module(x), y) / len(micro_batches)).backward()


def _shards_reusing_variables(ddp, micro_batches, loss_function):
    with ddp.no_sync():
        for x, y in micro_batches[:-1]:
            (loss_function(ddp(x), y) / len(micro_batches)).backward()
    (loss_function(ddp(x), y) / len(micro_batches)).backward()


def _shards_last_twice(ddp, micro_batches, loss_function):
    with ddp.no_sync():
        for x, y in micro_batches:
            (loss_function(ddp(x), y) / len(micro_batches)).backward()
    (loss_function(ddp(x), y) / len(micro_batches)).backward()


def _shards_last_forward_inside(ddp, micro_batches, loss_function):
    with ddp.no_sync():
        for x, y in micro_batches[:-1]:
            (loss_function(ddp(x), y) / len(micro_batches)).backward()
        x, y = micro_batches[-1]
        loss = loss_function(ddp(x), y) / len(micro_batches)
    loss.backward()


def _shards_popped(ddp, micro_batches, loss_function):
    share = 1 / len(micro_batches)
    last_x, last_y = micro_batches.pop()
    with ddp.no_sync():
        for x, y in micro_batches:
            (share * loss_function(ddp(x), y)).backward()
    (share * loss_function(ddp(last_x), last_y)).backward()


def _shards_left_silent(ddp, micro_batches, loss_function):
    for i, (x, y) in enumerate(micro_batches):
        ddp.require_backward_grad_sync = i == len(micro_batches) - 1
        (loss_function(ddp(x), y) / len(micro_batches)).backward()
    ddp.require_backward_grad_sync = False


def _shards_of_cross_entropy(ddp, micro_batches, loss_function):
    reference.accumulate_shards(ddp, micro_batches, F.cross_entropy)


def _shards_zeroed_in_loop(ddp, micro_batches, loss_function):
    *first, (x, y) = micro_batches
    with ddp.no_sync():
        for early_x, early_y in first:
            ddp.zero_grad()
            (loss_function(ddp(early_x), early_y) / len(micro_batches)).backward()
    ddp.zero_grad()
    (loss_function(ddp(x), y) / len(micro_batches)).backward()


def _shards_divided_at_the_end(ddp, micro_batches, loss_function):
    *first, (x, y) = micro_batches
    with ddp.no_sync():
        for early_x, early_y in first:
            loss_function(ddp(early_x), early_y).backward()
    loss_function(ddp(x), y).backward()
    for parameter in ddp.parameters():
        parameter.grad /= len(micro_batches)


def _shards_last_undivided(ddp, micro_batches, loss_function):
    *first, (x, y) = micro_batches
    with ddp.no_sync():
        for early_x, early_y in first:
            (loss_function(ddp(early_x), early_y) / len(micro_batches)).backward()
    loss_function(ddp(x), y).backward()


def _shards_last_forgotten(ddp, micro_batches, loss_function):
    with ddp.no_sync():
        for x, y in micro_batches[:-1]:
            (loss_function(ddp(x), y) / len(micro_batches)).backward()


def _shards_sent_by_hand(ddp, micro_batches, loss_function):
    with ddp.no_sync():
        for x, y in micro_batches:
            (loss_function(ddp(x), y) / len(micro_batches)).backward()
    _mean_of_gradients(ddp.parameters())


def _shards_sent_twice(ddp, micro_batches, loss_function):
    reference.accumulate_shards(ddp, micro_batches, loss_function)
    _mean_of_gradients(ddp.parameters())


def _shards_in_one_batch(ddp, micro_batches, loss_function):
    x = torch.cat([x for x, _ in micro_batches])
    y = torch.cat([y for _, y in micro_batches])
    loss_function(ddp(x), y).backward()


def _shards_one_backward(ddp, micro_batches, loss_function):
    losses = []
    for i, (x, y) in enumerate(micro_batches):
        with ddp.no_sync() if i < len(micro_batches) - 1 else nullcontext():
            losses.append(loss_function(ddp(x), y))
    torch.stack(losses).mean().backward()


def _shards_rank_zero_sends(ddp, micro_batches, loss_function):
    *first, (x, y) = micro_batches
    with ddp.no_sync():
        for early_x, early_y in first:
            (loss_function(ddp(early_x), early_y) / len(micro_batches)).backward()
    with nullcontext() if dist.get_rank() == 0 else ddp.no_sync():
        (loss_function(ddp(x), y) / len(micro_batches)).backward()


def _shards_by_number(ddp, micro_batches, loss_function):
    for number, (x, y) in enumerate(micro_batches, 1):
        quiet = ddp.no_sync() if number < len(micro_batches) else nullcontext()
        with quiet:
            loss = loss_function(ddp(x), y)
            loss = loss / len(micro_batches)
            loss.backward()


def _shards_early_through_module(ddp, micro_batches, loss_function):
    share = 1 / len(micro_batches)
    while len(micro_batches) > 1:
        (x, y), *micro_batches = micro_batches
        (share * loss_function(ddp.module(x), y)).backward()
    [(x, y)] = micro_batches
    loss_function(ddp(x), y).mul(share).backward()


def _shards_by_flag(ddp, micro_batches, loss_function):
    for i in range(len(micro_batches)):
        ddp.require_backward_grad_sync = i == len(micro_batches) - 1
        x, y = micro_batches[i]
        loss = loss_function(ddp(x), y)
        loss.backward(torch.full_like(loss, 1 / len(micro_batches)))


def _shards_forward_in_no_sync(ddp, micro_batches, loss_function):
    total = 0.0
    for x, y in micro_batches[:-1]:
        with ddp.no_sync():
            out = ddp(x)
        loss = loss_function(out, y) / len(micro_batches)
        loss.backward()
        total += loss.item()
    x, y = micro_batches[-1]
    loss = loss_function(ddp(x), y) / len(micro_batches)
    loss.backward()
    return total + loss.item()


FIX_NO_SYNC_ON_LAST_BATCH = Exercise(
    slug="fix_no_sync_on_last_batch",
    chapter=5,
    title="Find the bug: ranks that drift apart",
    minutes=10,
    difficulty=2,
    reference=reference.accumulate_shards,
    observe=_observe_accumulate_shards,
    shipped=accumulate_shards,
    symptom="Two ranks accumulate four micro-batches of 8 digits each. Their gradients should be "
    "the same afterwards, and differ by up to 0.125; no error is raised.",
    misconceptions=(
        Misconception(
            "never_sent",  # museum 5.17, the shipped defect
            _shards_never_sent,
            "You never let the gradients travel: the last micro-batch too is inside no_sync(). "
            "Every rank keeps the gradients of its own data, takes its own step, and from then on "
            "the ranks train different models. One backward pass has to synchronise.",
        ),
        Misconception(
            "sent_every_time",  # museum 5.15
            _shards_always_sent,
            "You let the gradients travel in every backward pass. The result is right, but with "
            "four micro-batches everything is sent four times instead of once. Only the last "
            "backward pass needs the other ranks.",
        ),
        Misconception(
            "forward_through_module",  # museum 5.14
            _shards_through_module,
            "You call ddp.module instead of ddp. Then DistributedDataParallel never sees the "
            "forward pass, prepares nothing for backward, and no gradient travels: every rank "
            "keeps its own.",
        ),
        Misconception(
            "last_forward_in_no_sync",
            _shards_last_forward_inside,
            "You run the last forward pass inside no_sync() and only its backward pass outside. "
            "DistributedDataParallel decides in its forward pass whether the gradients will "
            "travel, so nothing is sent.",
        ),
        Misconception(
            "loop_variables_reused",
            _shards_reusing_variables,
            "You use the loop's x and y once more after the loop: that is the last but one "
            "micro-batch again, and the last is never used. With a single micro-batch the loop "
            "has not even given them a value.",
        ),
        Misconception(
            "last_batch_twice",
            _shards_last_twice,
            "Your loop runs over all the micro-batches, and then the last one is used once more. "
            "It counts twice in the mean, and the others once.",
        ),
        Misconception(
            "list_emptied",
            _shards_popped,
            "You take micro-batches out of the caller's list. The gradients are right, but whoever "
            "looks at the list afterwards, for a log or for a second epoch, finds some missing.",
        ),
        Misconception(
            "left_silent",
            _shards_left_silent,
            "You leave DistributedDataParallel's synchronisation switched off when you are done. "
            "An ordinary backward pass later sends nothing, and the ranks drift apart there.",
        ),
        Misconception(
            "cross_entropy_written_out",
            _shards_of_cross_entropy,
            "You use cross entropy whatever loss_function is. With another loss the gradients are "
            "those of a loss that nobody asked for.",
        ),
        Misconception(
            "no_sync_around_backward",  # museum 5.16
            _shards_no_sync_around_backward,
            "You put no_sync() around backward() and leave the forward pass outside. "
            "DistributedDataParallel decides in its forward pass whether the gradients will "
            "travel, so this has no effect: they are sent for every micro-batch.",
        ),
        Misconception(
            "first_batch_sent",
            _shards_first_sent,
            "You let the gradients travel in the first backward pass instead of the last. What the "
            "later micro-batches add stays on its own rank, and the ranks drift apart.",
        ),
        Misconception(
            "not_divided",  # museum 5.18
            _shards_undivided,
            "You add up the gradients of the micro-batches' mean losses without dividing: with "
            "four micro-batches the gradient is four times too long. What is asked for is the mean "
            "over the whole step.",
        ),
        Misconception(
            "divided_by_world_size_too",
            _shards_by_ranks_too,
            "You divide by the number of ranks as well. DistributedDataParallel already averages "
            "over the ranks, so the gradient comes out world_size times too short.",
        ),
        Misconception(
            "zeroed_before",
            _shards_zeroed,
            "You drop the gradients that were there before. This function adds to them; when to "
            "start from zero is the training loop's decision.",
        ),
        Misconception(
            "zeroed_in_the_loop",
            _shards_zeroed_in_loop,
            "You zero the gradients between the micro-batches, so only the last one's are left: "
            "the work on the others is thrown away, and what was there before is gone too.",
        ),
        Misconception(
            "divided_at_the_end",
            _shards_divided_at_the_end,
            "You divide the gradients themselves after the last backward pass. That also divides "
            "what was in .grad before this call, which is not part of this step's mean.",
        ),
        Misconception(
            "last_batch_not_divided",
            _shards_last_undivided,
            "You divide the early micro-batches' losses and forget the last one's. It counts as "
            "much as all the others together and more.",
        ),
        Misconception(
            "last_batch_forgotten",
            _shards_last_forgotten,
            "You leave out the last micro-batch. Its samples never count, and since the others are "
            "inside no_sync() the gradients never travel.",
        ),
        Misconception(
            "sent_by_hand",
            _shards_sent_by_hand,
            "You keep everything inside no_sync() and send the gradients by hand after the last "
            "backward pass. Then nothing travels while backward still computes; "
            "DistributedDataParallel overlaps both if the last micro-batch is left to it.",
        ),
        Misconception(
            "sent_twice",
            _shards_sent_twice,
            "You average the gradients over the ranks once more by hand. They are already the "
            "same everywhere, so nothing changes except that they are sent a second time.",
        ),
        Misconception(
            "one_large_batch",
            _shards_in_one_batch,
            "You put the micro-batches together into one batch. The gradient is right, but "
            "accumulation exists because that batch does not fit into memory: let one micro-batch "
            "after another go forward and backward.",
        ),
        Misconception(
            "one_backward_pass",
            _shards_one_backward,
            "You run all forward passes first and then one backward pass through their mean. All "
            "the micro-batches' graphs are held in memory at once, which accumulation is there to "
            "avoid: let each go backward before the next goes forward.",
        ),
        Misconception(
            "only_rank_zero_sends",
            _shards_rank_zero_sends,
            "You let the gradients travel on rank 0 only. A collective needs every rank: rank 0 "
            "waits for gradients that the others never send.",
        ),
        Misconception(
            "four_written_out",
            _shards_of_four,
            "You divide by 4, whatever the number of micro-batches is. Take it from the list: with "
            "3 or with 1 the gradient comes out too short.",
        ),
    ),
    alternatives=(
        _shards_by_number,
        _shards_early_through_module,
        _shards_by_flag,
        _shards_forward_in_no_sync,
    ),
    hints=(
        "Call it on two ranks with different data and compare the ranks' gradients. In which "
        "backward pass do they learn of one another?",
        "no_sync() says: this time only accumulate. For which of the micro-batches is that right, "
        "and for which not?",
        "Split the list into all but the last micro-batch, which run inside no_sync(), and the "
        "last, whose forward and backward pass run after the with block. Both divide alike.",
    ),
)


# --- fix_clipping_before_reduction --------------------------------------------------------------


def clipped_step(module, loss, optimizer, max_norm):
    """One step with gradients averaged over the ranks, whose norm is clipped to max_norm."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    optimizer.step()
    return norm.item()


class _PartlyFrozen(nn.Module):
    """Three layers, of which the first is frozen."""

    def __init__(self, see):
        super().__init__()
        self.frozen, self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        _with_values(see, self)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(torch.tanh(self.frozen(x)))))


def _clipped(clipped_step, see, norms, adam=False):
    """Two steps on this rank, from stale gradients, with the given largest norms."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    module = _PartlyFrozen(see)
    learning = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.3, momentum=0.9)
    if adam:  # two groups; the frozen layer is among them, and weight decay would move it
        groups = [[*module.frozen.parameters(), *module.hidden.parameters()]]
        groups += [list(module.out.parameters())]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.3)
    for parameter in learning:  # left from an earlier step
        parameter.grad = see.randn(*parameter.shape)
    sent, start = [], len(calls())
    for number, max_norm in enumerate(norms, 1):
        x, y = see.randn(world_size, 3, 6), see.randn(world_size, 3, 2)
        losses = [(1 + 2 * r) * ((module(x[r]) - y[r]) ** 2).mean() for r in range(world_size)]
        if number == 1:  # the same for all answers: later the weights are the answer's own
            mean = torch.autograd.grad(sum(losses) / world_size, learning, retain_graph=True)
            true = torch.cat([gradient.flatten() for gradient in mean]).norm().item()
        loss = losses[rank]
        value = loss.item()
        label = f"the norm that step {number} returns"
        norm = see.call(label, clipped_step, module, loss, optimizer, max_norm, may_modify=True)
        for name, parameter in module.named_parameters():
            see(f"{name} after step {number}", parameter)
        see.fact(f"the loss given to step {number} stays as it is", loss.item() == value)
        sent.append(len(calls()) - start - sum(sent))
        if number == 1 and norm is not None and abs(norm - true) < 1e-5 * true:
            exact = abs(norm - true) < 1e-10 * true  # more than float32 can hold
            see.fact("float64 gradients keep their precision on the way", exact)
    see.fact("the second step sends no more often than the first", sent[1] <= sent[0])
    if not see.agrees:  # which mistakes are the same for the weights
        norms = [
            parameter.grad.norm().item() for parameter in learning if parameter.grad is not None
        ]
        see("the gradients' norms afterwards", norms)


def _sent_in_a_step(clipped_step, see):
    """What one step sends: looked at where an answer is wrong, to tell what is wrong."""
    module = _PartlyFrozen(see)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = (1 + 2 * dist.get_rank()) * module(see.randn(3, 6)).square().mean()
    clipped_step(module, loss, optimizer, 1e4)
    see("what was sent", [str(call) for call in calls()])
    norms = [p.grad.norm().item() for p in module.parameters() if p.grad is not None]
    see("the gradients' norms afterwards", norms)


def _observe_clipped_step(clipped_step, see):
    with see.probe("one process alone, momentum"), alone():
        _clipped(clipped_step, see, (50.0, 0.1))
    if not see.agrees:
        return
    first = "2 processes, momentum, a norm that is clipped and one that is not"
    with see.probe(first):
        on_ranks(see, 2, _clipped, clipped_step, (0.5, 500.0))
    if _raised(see, first):
        return
    with see.probe("3 processes, AdamW, norms that are clipped"):
        on_ranks(see, 3, _clipped, clipped_step, (2.0, 0.25), True)
    if not see.agrees:
        with see.probe("2 processes: what one step sends"):
            on_ranks(see, 2, _sent_in_a_step, clipped_step)


def _clip(parameters, max_norm):
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def _step_with(clip=_clip, average=_mean_of_gradients, zero=True):
    """clipped_step with another way to clip, to average, or without zeroing."""

    def clipped_step(module, loss, optimizer, max_norm):
        if zero:
            optimizer.zero_grad()
        loss.backward()
        average(list(module.parameters()))
        norm = clip(list(module.parameters()), max_norm)
        optimizer.step()
        return float(norm)

    return clipped_step


def _with_gradient(parameters):
    return [parameter for parameter in parameters if parameter.grad is not None]


def _gradients_added(parameters):
    for parameter in _with_gradient(parameters):
        dist.all_reduce(parameter.grad)


def _half_of_sum(parameters):
    for parameter in _with_gradient(parameters):
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2


def _mean_in_float32(parameters):
    for parameter in _with_gradient(parameters):
        mean = parameter.grad.float()
        dist.all_reduce(mean)
        parameter.grad.copy_(mean / dist.get_world_size())


def _first_gradient(parameters):
    _mean_of_gradients(_with_gradient(parameters)[:1])


def _mean_of_copies(parameters):
    for parameter in _with_gradient(parameters):
        mean = parameter.grad.clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()


def _on_rank_zero(parameters):
    if dist.get_rank() == 0:
        _mean_of_gradients(parameters)


def _to_rank_zero(parameters):
    for parameter in _with_gradient(parameters):
        dist.reduce(parameter.grad, 0)
        if dist.get_rank() == 0:
            parameter.grad /= dist.get_world_size()


def _rank_zeros_gradient(parameters):
    for parameter in _with_gradient(parameters):
        dist.broadcast(parameter.grad, 0)


def _clip_each(parameters, max_norm):
    norm = torch.nn.utils.get_total_norm([p.grad for p in _with_gradient(parameters)])
    for parameter in _with_gradient(parameters):
        _clip([parameter], max_norm)
    return norm


def _clip_values(parameters, max_norm):
    norm = torch.nn.utils.get_total_norm([p.grad for p in _with_gradient(parameters)])
    torch.nn.utils.clip_grad_value_(parameters, max_norm)
    return norm


def _clip_nothing(parameters, max_norm):
    return _clip(parameters, float("inf"))


def _clip_always(parameters, max_norm):
    norm = _clip(parameters, float("inf"))
    for parameter in _with_gradient(parameters):
        parameter.grad *= max_norm / (norm + 1e-6)
    return norm


def _clip_then_measure(parameters, max_norm):
    _clip(parameters, max_norm)
    return _clip(parameters, float("inf"))


def _clip_by_ranks(parameters, max_norm):
    return _clip(parameters, max_norm / dist.get_world_size())


def _clip_sum_of_norms(parameters, max_norm):
    norm = sum(parameter.grad.norm() for parameter in _with_gradient(parameters))
    for parameter in _with_gradient(parameters):
        parameter.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
    return norm


_step_sum = _step_with(average=_gradients_added)
_step_halved = _step_with(average=_half_of_sum)
_step_in_float32 = _step_with(average=_mean_in_float32)
_step_own = _step_with(average=lambda parameters: None)
_step_first_only = _step_with(average=_first_gradient)
_step_rank_zero = _step_with(average=_on_rank_zero)
_step_reduced_to_zero = _step_with(average=_to_rank_zero)
_step_copies = _step_with(average=_mean_of_copies)
_step_rank_zeros_data = _step_with(average=_rank_zeros_gradient)
_step_each = _step_with(clip=_clip_each)
_step_values = _step_with(clip=_clip_values)
_step_nothing = _step_with(clip=_clip_nothing)
_step_always = _step_with(clip=_clip_always)
_step_norm_after = _step_with(clip=_clip_then_measure)
_step_by_ranks = _step_with(clip=_clip_by_ranks)
_step_sum_of_norms = _step_with(clip=_clip_sum_of_norms)
_step_not_zeroed = _step_with(zero=False)


def _step_clipped_first(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), max_norm)
    _mean_of_gradients(module.parameters())
    optimizer.step()
    return norm.item()


def _step_averaged_last(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    _mean_of_gradients(module.parameters())
    return norm.item()


def _step_divided_after_clipping(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    _gradients_added(module.parameters())
    norm = _clip(module.parameters(), max_norm)
    for parameter in _with_gradient(module.parameters()):
        parameter.grad /= dist.get_world_size()
    optimizer.step()
    return norm.item()


def _step_clipped_twice(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    _clip(module.parameters(), max_norm)
    _mean_of_gradients(module.parameters())
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


def _step_by_own_norm(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), float("inf"))
    _mean_of_gradients(module.parameters())
    for parameter in _with_gradient(module.parameters()):
        parameter.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
    optimizer.step()
    return norm.item()


def _step_with_zeros(module, loss, optimizer, max_norm):
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss.backward()
    _mean_of_gradients(module.parameters())
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


def _step_with_hooks(module, loss, optimizer, max_norm):
    reference.hook_gradients(module)
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


def _step_first_group(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    _mean_of_gradients(module.parameters())
    norm = _clip(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()
    return norm.item()


def _step_loss_overwritten(module, loss, optimizer, max_norm):
    norm = reference.clipped_step(module, loss, optimizer, max_norm)
    dist.all_reduce(loss.detach())
    return norm


def _step_clipped_last(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    _mean_of_gradients(module.parameters())
    optimizer.step()
    return _clip(module.parameters(), max_norm).item()


def _step_own_norm_returned(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), float("inf"))
    _mean_of_gradients(module.parameters())
    _clip(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


def _step_mean_of_norms(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), float("inf"))
    _mean_of_gradients(module.parameters())
    norm = reference.all_reduce_mean(norm)
    for parameter in _with_gradient(module.parameters()):
        parameter.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
    optimizer.step()
    return norm.item()


def _step_zeroed_after_backward(module, loss, optimizer, max_norm):
    loss.backward()
    optimizer.zero_grad()
    _mean_of_gradients(module.parameters())
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


def _step_loss_averaged(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    value = loss.detach().clone()
    dist.all_reduce(value)
    loss.backward()
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


def _step_weights_averaged(module, loss, optimizer, max_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(module.parameters(), max_norm)
    optimizer.step()
    for parameter in module.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    return norm.item()


def _step_in_one_message(module, loss, optimizer, max_norm):
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.zero_grad(set_to_none=True)
    gradients = torch.autograd.grad(loss, parameters)
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    norm = flat.norm()
    flat *= torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    pieces = flat.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    optimizer.step()
    return norm


def _step_by_gathering(module, loss, optimizer, max_norm, norm_type=2.0):
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    for group in optimizer.param_groups:
        for parameter in _with_gradient(group["params"]):
            parts = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, parameter.grad)
            parameter.grad = torch.stack(parts).mean(dim=0)
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm, norm_type)
    optimizer.step()
    return float(norm)


def _step_through_rank_zero(module, loss, optimizer, max_norm):
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    (loss / dist.get_world_size()).backward()
    works = [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]
    for work in works:
        work.wait()
    norm = sum(parameter.grad.square().sum() for parameter in parameters).sqrt().item()
    if norm + 1e-6 > max_norm:
        with torch.no_grad():
            for parameter in parameters:
                parameter.grad.mul_(max_norm / (norm + 1e-6))
    optimizer.step()
    return norm


FIX_CLIPPING_BEFORE_REDUCTION = Exercise(
    slug="fix_clipping_before_reduction",
    chapter=5,
    title="Find the bug: a gradient norm for every rank",
    minutes=10,
    difficulty=2,
    reference=reference.clipped_step,
    observe=_observe_clipped_step,
    shipped=clipped_step,
    symptom="With max_norm 1 one process finds the norm 2.633 on 40 samples. Two ranks with 20 of "
    "them each return 0.337 and 5.198, and their weights after the step are off by 0.018.",
    rtol=1e-6,  # clip_grad_norm_ adds 1e-6 to the norm
    atol=1e-7,
    misconceptions=(
        Misconception(
            "clipped_before_averaging",  # museum 5.13, the shipped defect
            _step_clipped_first,
            "You clip on every rank before the ranks average. Each rank scales its own gradient by "
            "its own factor, so a rank with a long gradient loses its weight in the mean, and the "
            "norm differs from rank to rank. What is to be clipped is the mean.",
        ),
        Misconception(
            "sum_for_mean",  # museum 5.2
            _step_sum,
            "You add up the ranks' gradients and do not divide by their number. The norm you clip "
            "and return is world_size times too large, and the step is too long wherever it is not "
            "clipped.",
        ),
        Misconception(
            "not_averaged",  # museum 5.5
            _step_own,
            "You never average over the ranks. Every rank takes the step of its own data, and "
            "after one step the ranks hold different weights.",
        ),
        Misconception(
            "averaged_after_the_step",  # museum 5.9
            _step_averaged_last,
            "You average the gradients after the optimizer has taken its step. The ranks have "
            "already moved apart, each by its own gradient, and what you send then is not used: "
            "the next step zeroes it.",
        ),
        Misconception(
            "divided_by_two",
            _step_halved,
            "You divide by 2, whatever the number of ranks is. With one process the gradient is "
            "half as long as it should be, with three it is too long: ask for the world size.",
        ),
        Misconception(
            "divided_after_clipping",
            _step_divided_after_clipping,
            "You clip the sum of the ranks' gradients and divide by their number afterwards. The "
            "sum is world_size times too long for max_norm, so you clip what should not be, and "
            "the norm that you return is that of the sum.",
        ),
        Misconception(
            "clipped_twice",
            _step_clipped_twice,
            "You clip on every rank and then once more after averaging. The first clipping "
            "already changes the mean: a rank with a long gradient loses its weight in it. Clip "
            "once, what all ranks share.",
        ),
        Misconception(
            "clipped_by_own_norm",
            _step_by_own_norm,
            "You measure the norm before the ranks average and shorten the mean by it. Every rank "
            "shortens the same gradient by another factor, and their weights drift apart.",
        ),
        Misconception(
            "first_group_only",
            _step_first_group,
            "You clip the parameters of the optimizer's first group. An optimizer may have several "
            "groups, and the norm meant here is that of all the module's gradients together.",
        ),
        Misconception(
            "zeros_for_frozen",
            _step_with_zeros,
            "You give frozen parameters a gradient of zeros. An optimizer leaves a parameter alone "
            "only if its gradient is None; with zeros the weight decay of AdamW shrinks it.",
        ),
        Misconception(
            "hooks_pile_up",
            _step_with_hooks,
            "You register hooks in every call and never remove them. The second step averages "
            "every gradient twice, the thousandth a thousand times: the numbers are right, and "
            "training becomes slower and slower.",
        ),
        Misconception(
            "sent_in_float32",
            _step_in_float32,
            "You send float64 gradients as float32 and lose half of their digits on the way. What "
            "travels should have the dtype of the gradients.",
        ),
        Misconception(
            "loss_overwritten",
            _step_loss_overwritten,
            "You run a collective on the loss that you were given, and it overwrites the caller's "
            "tensor: a log that reads it afterwards shows another number. Send a copy, or nothing.",
        ),
        Misconception(
            "copies_averaged",  # museum 5.30
            _step_copies,
            "You average copies of the gradients over the ranks and do not put the result back. "
            "The optimizer steps with .grad, which still holds each rank's own gradient.",
        ),
        Misconception(
            "loss_averaged",  # museum 5.5
            _step_loss_averaged,
            "You average the loss over the ranks, which changes a number in the log and nothing "
            "else: the gradients are those of each rank's own data. They have to travel.",
        ),
        Misconception(
            "first_parameter_only",  # museum 5.6
            _step_first_only,
            "You average the gradient of one parameter only. The others keep each rank's own "
            "gradient, and their weights drift apart.",
        ),
        Misconception(
            "mean_on_rank_zero_only",
            _step_reduced_to_zero,
            "You bring the mean to rank 0 only. The other ranks step with what is left in their "
            "own gradients, and their weights drift away from rank 0's.",
        ),
        Misconception(
            "gradients_of_rank_zero",
            _step_rank_zeros_data,
            "You give all ranks the gradients of rank 0. The ranks stay equal, but the data of all "
            "the others has no effect: that is training on rank 0's part alone.",
        ),
        Misconception(
            "weights_averaged",  # museum 5.11
            _step_weights_averaged,
            "You let each rank clip and step with its own gradient and average the weights "
            "afterwards. Each rank clips by its own norm, and an optimizer such as AdamW keeps "
            "different moments on every rank: the gradients have to be averaged, before both.",
        ),
        Misconception(
            "stepped_before_clipping",
            _step_clipped_last,
            "You clip after the optimizer has taken its step. The weights have already moved by "
            "the full gradient; what you clip is not used any more.",
        ),
        Misconception(
            "each_parameter_by_itself",
            _step_each,
            "You clip each parameter's gradient by itself. The norm meant here is that of all of "
            "them together, so that the whole gradient is shortened and keeps its direction.",
        ),
        Misconception(
            "values_clipped",
            _step_values,
            "You clip the single values to ±max_norm. That changes the direction of the gradient, "
            "and a gradient of many small values stays longer than max_norm.",
        ),
        Misconception(
            "not_clipped",
            _step_nothing,
            "You measure the norm and do not clip: the step is as long as the gradient, whatever "
            "max_norm says.",
        ),
        Misconception(
            "always_scaled",
            _step_always,
            "You scale the gradient to max_norm also where it is shorter. Clipping leaves short "
            "gradients alone; otherwise small steps near the minimum become long ones.",
        ),
        Misconception(
            "norm_after_clipping",
            _step_norm_after,
            "You return the norm after clipping, which is never more than max_norm. The norm "
            "before clipping is what shows in a log that training is about to diverge.",
        ),
        Misconception(
            "own_norm_returned",
            _step_own_norm_returned,
            "You take the right step and return the norm of this rank's own gradient, measured "
            "before the ranks averaged: another number on every rank, and none of them the norm "
            "that was clipped.",
        ),
        Misconception(
            "mean_of_norms",
            _step_mean_of_norms,
            "You clip by the mean of the ranks' norms. The norm of a mean is shorter than the mean "
            "of the norms wherever the gradients disagree, so you shorten too much.",
        ),
        Misconception(
            "sum_of_norms",
            _step_sum_of_norms,
            "You add up the norms of the single parameters. The norm of all of them together is "
            "the root of the sum of their squares, which is shorter.",
        ),
        Misconception(
            "max_norm_by_world_size",
            _step_by_ranks,
            "You clip to max_norm / world_size. The gradient is already the mean over the ranks, "
            "and max_norm is meant for it as it is.",
        ),
        Misconception(
            "gradients_not_zeroed",
            _step_not_zeroed,
            "You do not zero the gradients before backward(), which adds to what is there: the "
            "last step's gradients count again.",
        ),
        Misconception(
            "zeroed_after_backward",
            _step_zeroed_after_backward,
            "You zero the gradients after backward() and so throw away what it has just computed. "
            "The optimizer finds nothing to step with.",
        ),
        Misconception(
            "only_rank_zero_averages",  # museum 5.27
            _step_rank_zero,
            "You let only rank 0 take part in the averaging. A collective needs every rank: rank 0 "
            "waits for ever for the others.",
        ),
    ),
    alternatives=(_step_in_one_message, _step_by_gathering, _step_through_rank_zero),
    hints=(
        "One process with the whole batch clips once. Which gradient does it clip, and do the two "
        "ranks clip the same one?",
        "The norm that is returned should be the same on all ranks. At which place in the function "
        "are the ranks' gradients the same?",
        "The order is: zero, backward, average over the ranks, clip, step. Two of these stand the "
        "wrong way round.",
    ),
)
# --- global_accuracy ----------------------------------------------------------------------------


class _Guesses(nn.Module):
    """A linear classifier that notes whom it is asked about; in train mode it answers otherwise.

    The first of a sample's values is its number.
    """

    def __init__(self, see, classes):
        super().__init__()
        self.inner = nn.Dropout(0.0)  # its mode has to change too
        self.weight = see.randn(8, classes)
        self.asked, self.largest, self.modes, self.graphs = [], 0, set(), set()

    def forward(self, x):
        x = x.flatten(1)  # (batch, 8)
        self.asked += x[:, 0].long().tolist()
        self.largest = max(self.largest, len(x))
        self.modes |= {self.training, self.inner.training}
        self.graphs.add(torch.is_grad_enabled())
        logits = x[:, 1:] @ self.weight[1:]
        return logits.roll(1, dims=-1) if self.training else logits


def _evaluated(global_accuracy, see, folder, n, classes, batch_size, training=True):
    """One evaluation of n samples of shape (2, 4), of which some 70 % are right."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = _Guesses(see, classes).train(training)
    x = see.randn(n, 2, 4)
    x[:, 0, 0] = torch.arange(n)
    best = (x.flatten(1)[:, 1:] @ model.weight[1:]).argmax(dim=-1)
    wrong = torch.arange(n) % 7 % 4 == 0  # the last samples differ from the mean of all
    y = torch.where(wrong, (best + 1) % classes, best)
    torch.manual_seed(100 + rank)  # as in training: dropout differs from rank to rank
    see.call("the accuracy", global_accuracy, model, x, y, batch_size)
    most = -(-n // world_size)
    see.fact(f"no rank evaluates more than {most} of the {n} samples", len(model.asked) <= most)
    see.fact(f"no batch is larger than {batch_size}", model.largest <= batch_size)
    if model.largest > batch_size:
        see("the largest batch", model.largest)
    see.fact("the model is in eval mode meanwhile", True not in model.modes)
    see("whether the model is in train mode afterwards", (model.training, model.inner.training))
    see.fact("the model is called without a graph", True not in model.graphs)
    see.fact("gradients are enabled again afterwards", torch.is_grad_enabled())
    torch.set_grad_enabled(True)
    (Path(folder) / f"{rank}").write_text(
        json.dumps(model.asked)
    )  # no collective: the last may hang


def _how_often(see, folder, n):
    """What the ranks' notes say about each sample."""
    asked = [number for file in Path(folder).iterdir() for number in json.loads(file.read_text())]
    times = [asked.count(number) for number in range(n)]
    see("how often each sample was evaluated, on all ranks together", times)


def _observe_global_accuracy(global_accuracy, see):
    with see.probe("one process alone: 11 samples in batches of 4"), _folder() as folder, alone():
        _evaluated(global_accuracy, see, folder, 11, 3, 4)
        _how_often(see, folder, 11)
    with see.probe("one process alone: 6 samples, a model in eval mode"), _folder() as folder:
        with alone():
            _evaluated(global_accuracy, see, folder, 6, 4, 10, training=False)
    with see.probe("one process alone: 600 samples in batches of 100"), _folder() as folder:
        with alone():
            _evaluated(global_accuracy, see, folder, 600, 3, 100)
    if not see.agrees:
        return
    probes = (
        ("2 processes: 13 samples in batches of 3", 2, (13, 4, 3)),
        ("3 processes: 10 samples in batches of 2, a model in eval mode", 3, (10, 3, 2, False)),
        ("3 processes: 2 samples in batches of 5", 3, (2, 4, 5)),
    )
    for name, world_size, sizes in probes:
        with see.probe(name), _folder() as folder:
            on_ranks(see, world_size, _evaluated, global_accuracy, folder, *sizes)
            _how_often(see, folder, sizes[0])
        if _raised(see, name):
            return


def _strided(n):
    return torch.arange(dist.get_rank(), n, dist.get_world_size())


def _padded(n):
    order = torch.arange(n)
    rest = -n % dist.get_world_size()
    return torch.cat([order, order.repeat(rest)[:rest]])[dist.get_rank() :: dist.get_world_size()]


def _without_rest(n):
    share = n // dist.get_world_size()
    return torch.arange(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def _everything(n):
    return torch.arange(n)


def _shuffled(n):
    return torch.randperm(n)[dist.get_rank() :: dist.get_world_size()]


def _rest_to_the_last(n):
    rank, world_size, share = dist.get_rank(), dist.get_world_size(), n // dist.get_world_size()
    return torch.arange(n)[rank * share : None if rank == world_size - 1 else (rank + 1) * share]


def _ratio(correct, mine, n):
    dist.all_reduce(correct)
    return correct.item() / n


def _accuracy_with(part=_strided, batched=True, combine=_ratio, after="was", mode=False):
    """global_accuracy with another part, mode, or way to put the ranks' counts together."""

    @torch.no_grad()
    def global_accuracy(model, x, y, batch_size):
        training = model.training
        if mode is not None:
            model.train(mode)
        mine = part(len(y))
        correct = torch.zeros((), dtype=torch.int64)
        for places in mine.split(batch_size if batched else max(1, len(mine))):
            if len(places):
                correct += (model(x[places]).argmax(dim=-1) == y[places]).sum()
        if after is not None:
            model.train(training if after == "was" else after)
        return combine(correct, len(mine), len(y))

    return global_accuracy


def _mean_of_shares(correct, mine, n):
    share = torch.tensor(correct.item() / mine if mine else 0.0, dtype=torch.float64)
    dist.all_reduce(share)
    return share.item() / dist.get_world_size()


def _counted(correct, mine, n):
    both = torch.tensor([correct.item(), mine])
    dist.all_reduce(both)
    return (both[0] / both[1]).item()


def _by_own_part(correct, mine, n):
    dist.all_reduce(correct)
    return correct.item() / max(1, mine)


def _by_ranks_and_all(correct, mine, n):
    dist.all_reduce(correct)
    return correct.item() / n / dist.get_world_size()


def _on_rank_zero_alone(correct, mine, n):
    dist.reduce(correct, 0)
    return correct.item() / n if dist.get_rank() == 0 else None


def _reduced(correct, mine, n):
    dist.reduce(correct, 0)
    return correct.item() / n


def _gathered_on_rank_zero(correct, mine, n):
    if dist.get_rank() == 0:
        dist.all_reduce(correct)
    return correct.item() / n


def _left_when_empty(correct, mine, n):
    if not mine:
        return 0.0
    return _ratio(correct, mine, n)


_accuracy_padded = _accuracy_with(part=_padded, combine=_counted)
_accuracy_padded_by_n = _accuracy_with(part=_padded)
_accuracy_without_rest = _accuracy_with(part=_without_rest)
_accuracy_without_rest_counted = _accuracy_with(part=_without_rest, combine=_counted)
_accuracy_everywhere = _accuracy_with(part=_everything, combine=lambda c, m, n: c.item() / n)
_accuracy_mean_of_shares = _accuracy_with(combine=_mean_of_shares)
_accuracy_by_own_part = _accuracy_with(combine=_by_own_part)
_accuracy_by_ranks_too = _accuracy_with(combine=_by_ranks_and_all)
_accuracy_own_share = _accuracy_with(combine=lambda c, m, n: c.item() / max(1, m))
_accuracy_own_count = _accuracy_with(combine=lambda c, m, n: c.item() / n)
_accuracy_rank_zero = _accuracy_with(combine=_on_rank_zero_alone)
_accuracy_rank_zero_calls = _accuracy_with(combine=_gathered_on_rank_zero)
_accuracy_empty_leaves = _accuracy_with(combine=_left_when_empty)
_accuracy_reduced = _accuracy_with(combine=_reduced)
_accuracy_shuffled = _accuracy_with(part=_shuffled)
_accuracy_rest_to_the_last = _accuracy_with(part=_rest_to_the_last)
_accuracy_in_a_byte = _accuracy_with(combine=lambda c, m, n: _ratio(c.to(torch.uint8), m, n))
_accuracy_one_batch = _accuracy_with(batched=False)
_accuracy_train_mode = _accuracy_with(mode=None)
_accuracy_stays_in_eval = _accuracy_with(after=None)
_accuracy_always_trains = _accuracy_with(after=True)
_accuracy_percent = _accuracy_with(combine=lambda c, m, n: 100 * _ratio(c, m, n))
_accuracy_hits = _accuracy_with(combine=lambda c, m, n: int(_ratio(c, m, 1)))


def _accuracy_with_graph(model, x, y, batch_size):
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64)
    for places in _strided(len(y)).split(batch_size):
        if len(places):
            correct += (model(x[places]).argmax(dim=-1) == y[places]).sum()
    model.train(training)
    return _ratio(correct, len(places), len(y))


def _accuracy_by_32(model, x, y, batch_size):
    return reference.global_accuracy(model, x, y, 32)


def _accuracy_gradients_left_off(model, x, y, batch_size):
    torch.set_grad_enabled(False)
    return reference.global_accuracy(model, x, y, batch_size)


@torch.no_grad()
def _accuracy_last_batch_dropped(model, x, y, batch_size):
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64)
    for places in _strided(len(y)).split(batch_size):
        if len(places) == batch_size:
            correct += (model(x[places]).argmax(dim=-1) == y[places]).sum()
    model.train(training)
    return _ratio(correct, len(places), len(y))


@torch.no_grad()
def _accuracy_sent_per_batch(model, x, y, batch_size):
    training = model.training
    model.eval()
    correct = 0
    for places in _strided(len(y)).split(batch_size):
        hits = (model(x[places]).argmax(dim=-1) == y[places]).sum()
        dist.all_reduce(hits)
        correct += hits.item()
    model.train(training)
    return correct / len(y)


@torch.no_grad()
def _accuracy_mean_of_batches(model, x, y, batch_size):
    training = model.training
    model.eval()
    shares = []
    for places in _strided(len(y)).split(batch_size):
        if len(places):
            shares.append((model(x[places]).argmax(dim=-1) == y[places]).double().mean())
    model.train(training)
    totals = torch.tensor([sum(shares), len(shares)], dtype=torch.float64)
    dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


@torch.no_grad()
def _accuracy_rank_zero_works(model, x, y, batch_size):
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64)
    if dist.get_rank() == 0:
        for inputs, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            correct += (model(inputs).argmax(dim=-1) == targets).sum()
    model.train(training)
    dist.broadcast(correct, 0)
    return correct.item() / len(y)


def _accuracy_in_blocks(model, x, y, batch_size):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs, targets = x.tensor_split(world_size)[rank], y.tensor_split(world_size)[rank]
    training = model.training
    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(targets), batch_size):
            logits = model(inputs[start : start + batch_size])
            hits = logits.max(dim=1).indices.eq(targets[start : start + batch_size])
            correct += hits.sum().item()
    if training:
        model.train()
    counts = [None] * world_size
    dist.all_gather_object(counts, correct)
    return sum(counts) / len(y)


def _accuracy_by_loader(model, x, y, batch_size):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    subset = torch.utils.data.Subset(torch.utils.data.TensorDataset(x, y), range(len(y)))
    subset.indices = list(subset.indices)[rank::world_size]
    counts = torch.zeros(2, dtype=torch.float64)
    was = model.training
    model.eval()
    try:
        for inputs, targets in torch.utils.data.DataLoader(subset, batch_size):
            with torch.no_grad():
                best = model(inputs).softmax(dim=-1).argmax(dim=-1)
            counts[0] += (best == targets).sum()
            counts[1] += len(targets)
    finally:
        model.train(was)
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


@torch.no_grad()
def _accuracy_of_chunks(model, x, y, batch_size):
    size = -(-len(y) // dist.get_world_size())
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    mode, hits = model.training, [torch.zeros(0, dtype=torch.bool)]
    model.train(False)
    for inputs, targets in zip(x[mine].split(batch_size), y[mine].split(batch_size), strict=True):
        hits.append(model(inputs).argmax(-1) == targets)
    model.train(mode)
    right = torch.cat(hits).float().sum()
    dist.reduce(right, dst=0)
    dist.broadcast(right, src=0)
    return (right / len(y)).item()


GLOBAL_ACCURACY = Exercise(
    slug="global_accuracy",
    chapter=5,
    title="One accuracy for all ranks",
    minutes=15,
    difficulty=2,
    reference=reference.global_accuracy,
    observe=_observe_global_accuracy,
    rtol=1e-6,  # a quotient of float32 is as right
    misconceptions=(
        Misconception(
            "padded",  # museum 5.24
            _accuracy_padded,
            "You make the ranks' parts equally long by giving out some samples twice, as "
            "DistributedSampler does. For training that hardly matters; here the repeated samples "
            "count twice in the accuracy.",
        ),
        Misconception(
            "padded_and_divided_by_n",
            _accuracy_padded_by_n,
            "You give out some samples twice, so that the parts are equally long, count all "
            "hits, and divide by the number of different samples: the accuracy can pass 1.",
        ),
        Misconception(
            "mean_of_ranks",  # museum 5.25
            _accuracy_mean_of_shares,
            "You average the ranks' accuracies. Where the parts have different sizes a sample "
            "of the smaller part counts more, and a rank without samples has no accuracy at all. "
            "What adds up over the ranks are counts.",
        ),
        Misconception(
            "mean_of_batches",
            _accuracy_mean_of_batches,
            "You average the accuracies of the batches. A last batch that is smaller counts as "
            "much as a full one; count right answers and divide once, at the end.",
        ),
        Misconception(
            "own_part_only",  # museum 5.25
            _accuracy_own_share,
            "You return the accuracy on this rank's own part. Every rank reports another number, "
            "and none of them is that of all samples.",
        ),
        Misconception(
            "own_count_over_all",
            _accuracy_own_count,
            "You divide this rank's own hits by the number of all samples. The other ranks' hits "
            "are missing: the ranks have to add up their counts.",
        ),
        Misconception(
            "divided_by_own_part",
            _accuracy_by_own_part,
            "You divide the hits of all ranks by the number of samples of this rank. The result is "
            "about world_size times too large.",
        ),
        Misconception(
            "divided_by_world_size_too",
            _accuracy_by_ranks_too,
            "You divide by the number of ranks as well. The hits are a sum over all samples, not a "
            "mean over ranks; dividing by the number of samples is all there is to do.",
        ),
        Misconception(
            "rest_left_out",
            _accuracy_without_rest,
            "You give every rank n // world_size samples, so the rest is never evaluated, and "
            "divide by all of them: those left out count as wrong.",
        ),
        Misconception(
            "rest_left_out_and_not_counted",
            _accuracy_without_rest_counted,
            "You give every rank n // world_size samples. The rest is left out, and the accuracy "
            "is that of another, smaller set; with fewer samples than ranks nothing is left.",
        ),
        Misconception(
            "every_rank_everything",
            _accuracy_everywhere,
            "You evaluate all samples on every rank. The number is right, but every rank does all "
            "the work, and 8 ranks take as long as one: each should take its own part.",
        ),
        Misconception(
            "rank_zero_does_it_all",
            _accuracy_rank_zero_works,
            "You evaluate everything on rank 0 and send the result to the others, which wait "
            "meanwhile. The number is right; the work should be shared.",
        ),
        Misconception(
            "reduced_to_rank_zero",
            _accuracy_reduced,
            "You bring the sum to rank 0 only, and the other ranks divide what is left in their "
            "own tensor. They return other numbers than rank 0, and where one of them decides by "
            "it when to stop, the ranks part.",
        ),
        Misconception(
            "shuffled_on_each_rank",
            _accuracy_shuffled,
            "You take your part of a random order that every rank draws for itself. The ranks' "
            "random states differ in training, so some samples are evaluated twice and others "
            "never. No random order is needed here.",
        ),
        Misconception(
            "rest_to_the_last_rank",
            _accuracy_rest_to_the_last,
            "You give every rank n // world_size samples and the last one the rest as well. With "
            "fewer samples than ranks it does everything; deal out so that no part is longer than "
            "another by more than one sample.",
        ),
        Misconception(
            "count_overflows",
            _accuracy_in_a_byte,
            "You count hits in a dtype of 8 bits. From 256 on the count starts at 0 again; int64 "
            "has room for all of them.",
        ),
        Misconception(
            "with_a_graph",
            _accuracy_with_graph,
            "You call the model with gradients enabled. Every batch then keeps its activations for "
            "a backward pass that never comes, which costs memory and time.",
        ),
        Misconception(
            "gradients_left_off",
            _accuracy_gradients_left_off,
            "You switch gradients off and never on again. The next training step fails, because "
            "its loss has no graph; switch them off for the evaluation only.",
        ),
        Misconception(
            "last_batch_dropped",
            _accuracy_last_batch_dropped,
            "You leave out the last batch where it is smaller than the others. Its samples are "
            "never evaluated, and yet they are among those that you divide by.",
        ),
        Misconception(
            "result_on_rank_zero_only",
            _accuracy_rank_zero,
            "You bring the sum to rank 0 only. The other ranks return nothing; if one of them "
            "decides by this number when to stop, the ranks part.",
        ),
        Misconception(
            "only_rank_zero_calls",  # museum 5.27
            _accuracy_rank_zero_calls,
            "You call the collective on rank 0 only. It needs every rank: rank 0 waits for ever "
            "for counts that the others never send.",
        ),
        Misconception(
            "empty_rank_leaves",
            _accuracy_empty_leaves,
            "You return early on a rank that has no samples. The others wait for it in their "
            "collective: a rank with nothing to count still has to send its 0.",
        ),
        Misconception(
            "sent_after_every_batch",  # museum 5.28
            _accuracy_sent_per_batch,
            "You call the collective once for every batch. Ranks with unequal parts have unequal "
            "numbers of batches, and the one with more waits for ever in its last call. Add up on "
            "the rank first, and communicate once.",
        ),
        Misconception(
            "batch_size_ignored",
            _accuracy_one_batch,
            "Your batches do not follow batch_size: this rank's whole part goes through the model "
            "at once. batch_size is the limit of what fits into memory.",
        ),
        Misconception(
            "batches_of_32",
            _accuracy_by_32,
            "Your batches do not follow batch_size: they have 32 samples whatever it is. With a "
            "smaller limit that is more than what fits into memory.",
        ),
        Misconception(
            "train_mode",
            _accuracy_train_mode,
            "You leave the model in the mode that it was in. In train mode dropout removes "
            "activations and batch norm uses the batch's own statistics: switch to eval mode.",
        ),
        Misconception(
            "stays_in_eval_mode",
            _accuracy_stays_in_eval,
            "You switch to eval mode and never back. The epochs that follow train without dropout "
            "and with frozen batch norm statistics.",
        ),
        Misconception(
            "always_train_mode_afterwards",
            _accuracy_always_trains,
            "You switch to train mode at the end, also where the model was in eval mode. Remember "
            "the mode that you found, and put that one back.",
        ),
        Misconception(
            "percent",
            _accuracy_percent,
            "You return per cent. The share that is asked for is a number from 0 to 1.",
        ),
        Misconception(
            "number_of_hits",
            _accuracy_hits,
            "You return how many samples are right. What is asked for is their share: divide by "
            "the number of all samples.",
        ),
    ),
    alternatives=(_accuracy_in_blocks, _accuracy_by_loader, _accuracy_of_chunks),
    hints=(
        "Which two numbers, added up over the ranks, give the accuracy over all samples? One of "
        "them every rank knows without asking.",
        "Cut the samples so that each is in exactly one rank's part, x[rank::world_size] for "
        "example; the parts may differ in size. Count hits on each rank, and add the counts up in "
        "one all_reduce that every rank calls, also one without samples.",
        "Remember model.training, model.eval(), loop over x[mine].split(batch_size) and the "
        "targets under no_grad, sum (logits.argmax(-1) == targets), put the mode back, "
        "all_reduce the count, divide by len(y).",
    ),
)
# --- checkpoints --------------------------------------------------------------------------------

PATH = os.path.join("run", "last.pt")  # in the folder of the probe, where the answer runs
KEYS = ("model", "optimizer", "scheduler", "rng", "epoch", "step")


class _Network(nn.Module):
    """Two layers with dropout, and a buffer that every forward pass changes."""

    def __init__(self, generator):
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
        self.batches = self.batches + 1
        return self.out(self.drop(torch.tanh(self.hidden(x - self.mean))))


class _Training:
    """All that a checkpoint is made of. Its steps need torch's random numbers and Python's."""

    def __init__(self, seed):
        self.model = _Network(torch.Generator().manual_seed(seed))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)

    @property
    def parts(self):
        return self.model, self.optimizer, self.scheduler

    def step(self, x):
        loss = (random.uniform(0.5, 2.0) * self.model(x) - x[:, :2]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        _mean_of_gradients(self.model.parameters())
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


def _randomness(seed=None):
    """The states of torch's and Python's random numbers on this rank, seeded first if asked."""
    if seed is not None:
        torch.manual_seed(seed + dist.get_rank())
        random.seed(2 * seed + dist.get_rank())
    return {"torch": torch.get_rng_state(), "python": random.getstate()}


def _whose(states, key, state):
    """The rank whose state this is; -1 if nobody's."""
    for rank, known in enumerate(states):
        if key == "python" and isinstance(state, (tuple, list)) and len(state) == 3:
            version, numbers, rest = state
            if (version, tuple(numbers), rest) == known[key]:
                return rank
        elif key == "torch" and isinstance(state, torch.Tensor) and torch.equal(state, known[key]):
            return rank
    return -1


def _shared(states):
    """One object of every rank, in order."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, states)
    return gathered


@contextmanager
def _at(folder):
    """Work in `folder`, so that error messages show the same short path always."""
    back = os.getcwd()
    os.chdir(folder)
    os.makedirs("run", exist_ok=True)
    try:
        yield
    finally:
        os.chdir(back)


def _step_in_file():
    """The step of the checkpoint under PATH, or why there is none."""
    if not os.path.exists(PATH):
        return "no file"
    try:
        return torch.load(PATH, weights_only=False)["step"]
    except Exception:
        return "a broken file"


# --- save_checkpoint ----------------------------------------------------------------------------


def _put_old():
    """An older checkpoint under PATH; returns its bytes."""
    torch.save({"step": 5, "epoch": 1, "model": {"weight": torch.arange(2000.0)}}, PATH)
    return Path(PATH).read_bytes()


@contextmanager
def _saving(then):
    """Inside, torch.save of a dict is then(obj, target, save) with the true torch.save as `save`.

    Pickling a tensor, to send it to another rank for example, calls torch.save too.
    """
    save = torch.save

    def patched(obj, f, *args, **kwargs):
        if isinstance(obj, dict):
            then(obj, f, partial(save, *args, **kwargs))
        else:
            save(obj, f, *args, **kwargs)

    torch.save = patched
    try:
        yield
    finally:
        torch.save = save


def _half(obj, target, save):
    """Writes the first half of what torch.save would."""
    body = io.BytesIO()
    save(obj, body)
    piece = body.getvalue()[: body.tell() // 2]
    if hasattr(target, "write"):
        target.write(piece)
        target.flush()
    else:
        Path(target).write_bytes(piece)


def _contents(see, training, states):
    """What the file holds, beside what the training is made of."""
    see.fact("there is a file under the path", os.path.isfile(PATH))
    if not os.path.isfile(PATH):
        return
    checkpoint = torch.load(PATH, weights_only=False)
    see.fact("the file holds a dict", isinstance(checkpoint, dict))
    see("keys that the file lacks", ", ".join(key for key in KEYS if key not in checkpoint))
    for key in ("model", "optimizer", "scheduler", "epoch", "step"):
        if key in checkpoint:
            see(f"what the file has under {key!r}", checkpoint[key])
    entries = checkpoint.get("rng")
    see.fact("there is a list under 'rng'", isinstance(entries, (list, tuple)))
    if not isinstance(entries, (list, tuple)):
        return
    see("the number of ranks under 'rng'", len(entries))
    for key in ("torch", "python"):
        own = [entry.get(key) if isinstance(entry, dict) else None for entry in entries]
        ranks = [_whose(states, key, state) for state in own]
        see(f"the ranks whose {key!r} states stand under 'rng' (-1: no rank's)", ranks)
        if -1 in ranks:  # nobody's: what they are
            see(f"the kind of the {key!r} states", str([type(state).__name__ for state in own]))


class _Watch:
    """Notes what happens to files on rank 0 and forbids the other ranks to write."""

    active = None
    heard = False

    def __init__(self, patience):
        self.rank, self.path, self.folder = dist.get_rank(), os.path.abspath(PATH), os.getcwd()
        self.renamed_from, self.was_there, self.patience = [], True, patience
        self.order, self.alone = [], False

    def __enter__(self):
        _Watch.active, self.true_save, self.true_sleep = self, torch.save, time.sleep
        torch.save = self._save
        if self.rank != 0:  # who sleeps instead of waiting for rank 0 is too early
            time.sleep = lambda seconds: self.true_sleep(min(seconds, 0.001))
        if not _Watch.heard:
            _Watch.heard = True
            sys.addaudithook(lambda event, args: _Watch.active and _Watch.active.hear(event, args))
        return self

    def __exit__(self, *_):
        _Watch.active, torch.save, time.sleep = None, self.true_save, self.true_sleep

    def _save(self, obj, f, *args, **kwargs):
        name = f if isinstance(f, (str, os.PathLike)) else getattr(f, "name", "")
        if self.rank != 0 and name:
            raise PermissionError("only rank 0 may write")
        if isinstance(obj, dict):
            self.order.append(f"writes after {len(calls())} calls")
        if isinstance(name, (str, os.PathLike)) and os.path.abspath(name) == self.path:
            self._wait()
        self.true_save(obj, f, *args, **kwargs)

    def _wait(self):
        """Until all other ranks have returned, which right ones do not."""
        end = time.monotonic() + self.patience
        others = [f"returned-{rank}" for rank in range(1, dist.get_world_size())]
        while time.monotonic() < end and not self.alone:
            time.sleep(0.005)
            self.alone = all(map(os.path.exists, others))

    def hear(self, event, args):
        if event == "open" and isinstance(args[2], int):
            writes, args = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), args[:1]
        else:
            writes = event in ("os.rename", "os.remove", "os.truncate", "os.link", "os.symlink")
        if not writes:
            return
        names = [os.path.abspath(os.fspath(a)) for a in args if isinstance(a, (str, os.PathLike))]
        if not any(name.startswith(self.folder) for name in names):
            return
        if self.rank != 0:
            raise PermissionError("only rank 0 may write")
        if names[-1] == self.path:
            self.was_there = self.was_there and event != "os.remove" and os.path.exists(self.path)
            if event == "os.rename":
                self.renamed_from.append(os.path.dirname(names[0]))
                self.order.append(f"renames after {len(calls())} calls")
                self._wait()


def _saved(save_checkpoint, see, folder, patience):
    """Rank 0 is slow: it puts the file in place when all others that do not wait are gone."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with _at(folder):
        training = _Training(3)
        _randomness(50)
        training.step(see.randn(world_size, 5, 4)[rank])
        if rank == 0:
            _put_old()
        states = _shared(_randomness())
        with _Watch(patience) as watch:
            save_checkpoint(PATH, *training.parts, 4, 9)
        if patience:
            see("the step in the file at the moment at which this rank returns", _step_in_file())
        if rank != 0:
            Path(f"returned-{rank}").touch()
        if watch.alone:  # the others did not wait: why not
            see("what rank 0 does", ", ".join(watch.order))
        see.fact("saving draws no random numbers", _own(states) == rank)
        if rank == 0:
            see.fact("the old checkpoint is there until the new one is", watch.was_there)
            same = os.path.dirname(watch.path) in watch.renamed_from
            see.fact("a file of the same folder is renamed", same)
            _contents(see, training, states)


def _own(states):
    """The rank whose random states torch and Python have now; -1 if these are no rank's."""
    ranks = {_whose(states, key, state) for key, state in _randomness().items()}
    return ranks.pop() if len(ranks) == 1 else -1


def _twice(save_checkpoint, see, training):
    """The disk is full at the first try, half-way through the file; the second try succeeds.

    What is on the disk half-way is what a process leaves that is killed then.
    """
    old, states, targets = _put_old(), [], []
    os.link(PATH, "other name")

    def whole():
        return os.path.exists(PATH) and Path(PATH).read_bytes() == old

    def fail(obj, target, save):
        _half(obj, target, save)
        states.append(whole())
        raise OSError("No space left on device")

    def note(obj, target, save):
        targets.append(type(target).__name__)
        save(obj, target)

    with _saving(fail):
        try:
            save_checkpoint(PATH, *training.parts, 3, 8)
        except OSError:
            pass
    see.fact("the old checkpoint is whole while torch.save is half-way", all(states))
    see.fact("the old checkpoint is whole after torch.save has failed", whole())
    with _saving(note):
        save_checkpoint(PATH, *training.parts, 3, 8)
    see("the step in the file after the second try", _step_in_file())
    kept = Path("other name").read_bytes() == old
    see.fact("the old file is replaced, not written into", kept)
    if not kept:  # how was it written
        see("the targets of torch.save", str(targets))


def _observe_save_checkpoint(save_checkpoint, see):
    with see.probe("one process alone; the folder is empty"), _folder() as folder, alone():
        with _at(folder):
            training = _Training(1)
            _randomness(20)
            for x in see.randn(3, 5, 4):
                training.step(x)
            states = [_randomness()]
            save_checkpoint(PATH, *training.parts, 2, 3)
            _contents(see, training, states)
            see("the files in the folder afterwards", ", ".join(sorted(os.listdir("run"))))
    if not see.agrees:
        return
    with see.probe("one process alone; the disk is full at the first try"), _folder() as folder:
        with alone(), _at(folder):
            _twice(save_checkpoint, see, _Training(2))
    if not see.agrees:
        return
    first = "2 processes with random states of their own; rank 0 is slow"
    with see.probe(first), _folder() as folder:
        on_ranks(see, 2, _saved, save_checkpoint, folder, 0.25)
    if _raised(see, first):
        return
    with see.probe("3 processes"), _folder() as folder:
        on_ranks(see, 3, _saved, save_checkpoint, folder, 0.0)


def _gathered_states():
    return _shared({"torch": torch.get_rng_state(), "python": random.getstate()})


def _write_aside(checkpoint, path):
    torch.save(checkpoint, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def _on_first_rank(write, checkpoint, path):
    if dist.get_rank() == 0:
        write(checkpoint, path)
    dist.barrier()


def _save_with(
    model=lambda model: model.state_dict(),
    states=_gathered_states,
    write=_write_aside,
    where=_on_first_rank,
    change=lambda checkpoint: checkpoint,
):
    """save_checkpoint with another content, or another way to write it."""

    def save_checkpoint(path, net, optimizer, scheduler, epoch, step):
        checkpoint = {"model": model(net), "optimizer": optimizer.state_dict()}
        checkpoint |= {"scheduler": scheduler.state_dict(), "rng": states()}
        checkpoint |= {"epoch": epoch, "step": step}
        where(write, change(checkpoint), path)

    return save_checkpoint


def _without(*keys):
    return lambda checkpoint: {k: v for k, v in checkpoint.items() if k not in keys}


def _write_in_place(checkpoint, path):
    torch.save(checkpoint, path)


def _write_after_removing(checkpoint, path):
    torch.save(checkpoint, f"{path}.partial")
    if os.path.exists(path):
        os.remove(path)
    os.rename(f"{path}.partial", path)


def _write_and_copy(checkpoint, path):
    torch.save(checkpoint, f"{path}.partial")
    shutil.copyfile(f"{path}.partial", path)
    os.remove(f"{path}.partial")


def _write_with_leftover(checkpoint, path):
    torch.save(checkpoint, f"{path}.partial")
    shutil.copyfile(f"{path}.partial", path)


def _write_elsewhere(checkpoint, path):
    other = os.path.join(tempfile.gettempdir(), f"checkpoint-{os.getpid()}.partial")
    torch.save(checkpoint, other)
    os.replace(other, path)


def _write_by_bytes(checkpoint, path):
    body = io.BytesIO()
    torch.save(checkpoint, body)
    Path(path).write_bytes(body.getvalue())


def _where_nobody_waits(write, checkpoint, path):
    if dist.get_rank() == 0:
        write(checkpoint, path)


def _where_barrier_first(write, checkpoint, path):
    dist.barrier()
    if dist.get_rank() == 0:
        write(checkpoint, path)


def _where_others_sleep(write, checkpoint, path):
    if dist.get_rank() == 0:
        write(checkpoint, path)
    else:
        time.sleep(0.3)


def _where_everybody_writes(write, checkpoint, path):
    write(checkpoint, path)
    dist.barrier()


def _where_each_has_a_file(write, checkpoint, path):
    write(checkpoint, f"{path}.rank{dist.get_rank()}")
    dist.barrier()


def _where_barrier_on_rank_zero(write, checkpoint, path):
    if dist.get_rank() == 0:
        write(checkpoint, path)
        dist.barrier()


def _renamed_after_barrier(path_of=lambda path: f"{path}.partial"):
    def save_checkpoint(path, model, optimizer, scheduler, epoch, step):
        states = _gathered_states()
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint |= {"scheduler": scheduler.state_dict(), "rng": states}
        checkpoint |= {"epoch": epoch, "step": step}
        if dist.get_rank() == 0:
            torch.save(checkpoint, path_of(path))
        dist.barrier()
        if dist.get_rank() == 0:
            os.replace(path_of(path), path)

    return save_checkpoint


def _own_state():
    return {"torch": torch.get_rng_state(), "python": random.getstate()}


def _torch_states():
    return _shared({"torch": torch.get_rng_state()})


def _seeds():
    return _shared({"torch": torch.initial_seed(), "python": random.getstate()})


_save_no_optimizer = _save_with(change=_without("optimizer"))
_save_no_scheduler = _save_with(change=_without("scheduler"))
_save_no_rng = _save_with(change=_without("rng"))
_save_no_position = _save_with(change=_without("epoch", "step"))
_save_next_epoch = _save_with(change=lambda c: {**c, "epoch": c["epoch"] + 1})
_save_swapped = _save_with(change=lambda c: {**c, "epoch": c["step"], "step": c["epoch"]})
_save_others_sleep = _save_with(where=_where_others_sleep)
_save_torch_only = _save_with(states=_torch_states)
_save_seeds = _save_with(states=_seeds)
_save_rank_zeros_state = _save_with(states=lambda: [_own_state()])
_save_own_state_for_all = _save_with(states=lambda: [_own_state()] * dist.get_world_size())
_save_state_without_list = _save_with(states=_own_state)
_save_parameters = _save_with(model=lambda model: dict(model.named_parameters()))
_save_object = _save_with(model=lambda model: model)
_save_in_place = _save_with(write=_write_in_place)
_save_by_bytes = _save_with(write=_write_by_bytes)
_save_after_removing = _save_with(write=_write_after_removing)
_save_and_copy = _save_with(write=_write_and_copy)
_save_with_leftover = _save_with(write=_write_with_leftover)
_save_elsewhere = _save_with(write=_write_elsewhere)
_save_nobody_waits = _save_with(where=_where_nobody_waits)
_save_barrier_first = _save_with(where=_where_barrier_first)
_save_everybody = _save_with(where=_where_everybody_writes)
_save_each_a_file = _save_with(where=_where_each_has_a_file)
_save_barrier_on_rank_zero = _save_with(where=_where_barrier_on_rank_zero)
_save_renamed_after_barrier = _renamed_after_barrier()


def _save_gathered_on_rank_zero(path, model, optimizer, scheduler, epoch, step):
    if dist.get_rank() == 0:
        reference.save_checkpoint(path, model, optimizer, scheduler, epoch, step)
    else:
        dist.barrier()


def _save_by_gather(path, model, optimizer, scheduler, epoch, step):
    first = dist.get_rank() == 0
    states = [None] * dist.get_world_size() if first else None
    own = {"python": random.getstate(), "torch": torch.random.get_rng_state()}
    dist.gather_object(own, states, dst=0)
    if first:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.update(rng=states, epoch=epoch, step=step, world_size=len(states))
        aside = Path(path).with_name("aside")
        torch.save(checkpoint, aside)
        aside.rename(path)
    done = torch.zeros(1)
    dist.broadcast(done, 0)


def _save_by_mkstemp(path, model, optimizer, scheduler, epoch, step):
    folder = os.path.dirname(os.path.abspath(path))
    generator = torch.get_rng_state()
    everyone = [torch.empty_like(generator) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, generator)
    pythons = _shared(random.getstate())
    try:
        if dist.get_rank() == 0:
            number, name = tempfile.mkstemp(dir=folder)
            pairs = zip(everyone, pythons, strict=True)
            checkpoint = {
                "model": {key: value.clone() for key, value in model.state_dict().items()},
                "optimizer": copy.deepcopy(optimizer.state_dict()),
                "scheduler": scheduler.state_dict(),
                "rng": [{"torch": one, "python": other} for one, other in pairs],
                "epoch": epoch,
                "step": step,
            }
            try:
                with os.fdopen(number, "wb") as file:
                    torch.save(checkpoint, file)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
    finally:
        dist.monitored_barrier()


def _save_from_memory(path, model, optimizer, scheduler, epoch, step):
    checkpoint = {"rng": tuple(_gathered_states()), "epoch": epoch, "step": step}
    checkpoint["model"] = model.state_dict()
    checkpoint["optimizer"] = optimizer.state_dict()
    checkpoint["scheduler"] = scheduler.state_dict()
    if not dist.get_rank():
        body = io.BytesIO()
        torch.save(checkpoint, body)
        aside = Path(str(path) + ".new")
        aside.write_bytes(body.getbuffer())
        shutil.move(aside, path)
    dist.all_reduce(torch.zeros(()))


SAVE_CHECKPOINT = Exercise(
    slug="save_checkpoint",
    chapter=5,
    title="A checkpoint that is complete and never half written",
    minutes=20,
    difficulty=3,
    reference=reference.save_checkpoint,
    observe=_observe_save_checkpoint,
    rtol=0.0,  # bit for bit
    atol=0.0,
    misconceptions=(
        Misconception(
            "no_optimizer",
            _save_no_optimizer,
            "You leave out the optimizer's state. AdamW would go on with moments of zero and a "
            "step count of zero, so the first steps after resuming are not those of the run that "
            "was interrupted.",
        ),
        Misconception(
            "no_scheduler",
            _save_no_scheduler,
            "You leave out the scheduler's state. After resuming the learning rate would start "
            "its schedule from the beginning.",
        ),
        Misconception(
            "no_random_states",
            _save_no_rng,
            "You leave out the random states. Dropout draws other masks after resuming, and the "
            "run is another one from its first step on.",
        ),
        Misconception(
            "no_position",
            _save_no_position,
            "You leave out epoch and step. Nobody can tell afterwards where in the data to go on.",
        ),
        Misconception(
            "next_epoch",
            _save_next_epoch,
            "You store epoch + 1. The numbers given already say where to go on, and a whole epoch "
            "would be skipped.",
        ),
        Misconception(
            "epoch_and_step_swapped",
            _save_swapped,
            "You store the epoch as the step and the step as the epoch. The run goes on at another "
            "place of the data than the one that it had reached.",
        ),
        Misconception(
            "torch_state_only",
            _save_torch_only,
            "You store torch's random state and not Python's. Whatever draws from `random`, an "
            "augmentation for example, goes on differently.",
        ),
        Misconception(
            "seed_for_state",
            _save_seeds,
            "You store the seed that torch started with. Seeding again starts the random numbers "
            "from the beginning; what is needed is the state that they have reached.",
        ),
        Misconception(
            "rank_zeros_state_only",
            _save_rank_zeros_state,
            "You store the random states of rank 0 only. The other ranks draw other numbers, and "
            "theirs are lost: rank 0 has to collect all of them before it writes.",
        ),
        Misconception(
            "own_state_for_all",
            _save_own_state_for_all,
            "You store rank 0's random states once for every rank. After resuming all ranks draw "
            "the same dropout masks, which they did not before. Collect each rank's own.",
        ),
        Misconception(
            "state_without_a_list",
            _save_state_without_list,
            'You store one dict of random states under "rng". It is a list with one entry for '
            "every rank, also where there is one rank.",
        ),
        Misconception(
            "parameters_only",
            _save_parameters,
            "You store the parameters and forget the buffers. The running statistics of batch norm "
            "live in buffers; state_dict() holds both.",
        ),
        Misconception(
            "model_itself",
            _save_object,
            "You store the model itself. Such a file can be read only where the same class stands "
            "in the same module, and not at all with weights_only=True; store its state_dict().",
        ),
        Misconception(
            "written_in_place",
            _save_in_place,
            "You write straight to the path. If the process dies while it writes, the old "
            "checkpoint is already gone and the new one is not whole: nothing is left.",
        ),
        Misconception(
            "bytes_written_in_place",
            _save_by_bytes,
            "You prepare the bytes in memory and then write them over the old file. Writing takes "
            "time too: a process that dies meanwhile leaves half a file.",
        ),
        Misconception(
            "removed_before_renaming",
            _save_after_removing,
            "You remove or rename the old checkpoint before the new one has its name. In between "
            "there is none under the path; a rename replaces the old file in one step, without "
            "being asked to.",
        ),
        Misconception(
            "copied_over",
            _save_and_copy,
            "You copy the finished file over the old one. Copying writes piece by piece, so a "
            "process that dies meanwhile leaves half a file; renaming takes one step.",
        ),
        Misconception(
            "copied_and_left",
            _save_with_leftover,
            "You copy the finished file to its place and leave the first one lying there. One file "
            "is to remain; and copying writes piece by piece, where renaming takes one step.",
        ),
        Misconception(
            "written_in_another_folder",
            _save_elsewhere,
            "You write to another folder first. A rename takes one step only within one file "
            "system; from another one it fails, or becomes a copy that can be interrupted.",
        ),
        Misconception(
            "nobody_waits",
            _save_nobody_waits,
            "You let the other ranks return while rank 0 still writes; sleeping for a while is not "
            "waiting, since writing may take longer. A rank that reads the file then finds the "
            "old checkpoint, or none.",
        ),
        Misconception(
            "barrier_before_writing",
            _save_barrier_first,
            "You let the ranks wait for one another before rank 0 writes, not after it. They "
            "return while the file is not there yet.",
        ),
        Misconception(
            "renamed_after_the_barrier",
            _save_renamed_after_barrier,
            "You let the ranks wait until the file is written, and rename it afterwards. Under the "
            "path a rank that has returned still finds the old checkpoint, or none.",
        ),
        Misconception(
            "other_ranks_write",
            _save_everybody,
            "You let other ranks than rank 0 write. Ranks that write one file write into one "
            "another's pieces, and one renames what another has not finished; with separate files "
            "the checkpoint is several files and not one. Rank 0 alone does it for all.",
        ),
        Misconception(
            "a_file_for_every_rank",
            _save_each_a_file,
            "You write one file for every rank, under other names than the path. Model and "
            "optimizer are the same everywhere, so one file, under the path given, holds it all.",
        ),
        Misconception(
            "gathered_on_rank_zero_only",  # museum 5.27
            _save_gathered_on_rank_zero,
            "You collect the random states in code that only rank 0 runs. A collective needs every "
            "rank: the others are somewhere else, and nobody comes on.",
        ),
        Misconception(
            "barrier_on_rank_zero_only",  # museum 5.27
            _save_barrier_on_rank_zero,
            "You call the barrier on rank 0 only. It waits there for ever for the others, which "
            "have long returned.",
        ),
    ),
    alternatives=(_save_by_gather, _save_by_mkstemp, _save_from_memory),
    hints=(
        "Which of the six things in the file differ from rank to rank? Those have to reach rank 0 "
        "before it writes, by a collective that every rank calls.",
        "all_gather_object collects any Python object. For the file: torch.save to "
        'f"{path}.partial", and os.replace, which swaps a file in one step.',
        "In this order: every rank gathers its {torch, python} states; rank 0 alone builds the "
        "dict, writes it aside and renames it; every rank calls dist.barrier().",
    ),
)


# --- load_checkpoint ----------------------------------------------------------------------------


def _put(training, epoch, step):
    """A checkpoint under PATH, written without the answer's or the reference's help."""
    states = _shared(_randomness())
    if dist.get_rank() == 0:
        parts = dict(zip(KEYS, (part.state_dict() for part in training.parts), strict=False))
        torch.save({**parts, "rng": states, "epoch": epoch, "step": step}, PATH)
    dist.barrier()
    return states


def _goes_on_from(states, before, key):
    """Whose random state torch or Python goes on from, in words."""
    now = _randomness()[key]
    rank = _whose(states, key, now)
    if rank >= 0:
        return f"rank {rank}'s from the file"
    same = _whose([before], key, now) == 0
    return "the one before the call" if same else "another one"


@contextmanager
def _reading(targets):
    """Inside, torch.load notes whether it was told where to read to."""
    load = torch.load

    def noted(f, map_location=None, *args, **kwargs):
        targets.append(map_location is not None)
        return load(f, map_location, *args, **kwargs)

    torch.load = noted
    try:
        yield
    finally:
        torch.load = load


def _fails(load_checkpoint, training):
    try:
        load_checkpoint(PATH, *training.parts)
    except Exception:
        return True
    return False


def _loaded(load_checkpoint, see, folder, steps, epoch):
    """A run is interrupted after some steps; another one, from other weights, goes on with it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with _at(folder):
        x = see.randn(steps + 3, world_size, 5, 4)[:, rank]
        training = _Training(1)
        _randomness(50)
        for number in range(steps):
            training.step(x[number])
        states = _put(training, epoch, steps)
        losses = [training.step(x[number]) for number in range(steps, steps + 3)]
        other = _Training(2)
        before, targets = _randomness(90), []
        with _reading(targets):
            see.call("the returned (epoch, step)", load_checkpoint, PATH, *other.parts)
        see("the model's state", other.model.state_dict())
        see("the optimizer's state", other.optimizer.state_dict())
        see("the scheduler's state", other.scheduler.state_dict())
        whose = {key: _goes_on_from(states, before, key) for key in ("torch", "python")}
        see("the random state that torch goes on from", whose["torch"])
        see("the random state that Python goes on from", whose["python"])
        see.fact("the model is in train mode as before", other.model.training)
        if world_size == 1:  # with more of them, who removes it first is a matter of luck
            see.fact("the file is there afterwards", os.path.exists(PATH))
            see.fact("the file is read onto the CPU", all(targets))
        if "another one" in whose.values():  # any losses may come now
            return
        resumed = [other.step(x[number]) for number in range(steps, steps + 3)]
        see("the losses of the next steps", resumed)
        see("the model's state after them", other.model.state_dict())
        see.fact("the losses are bit for bit those of the uninterrupted run", resumed == losses)


def _observe_load_checkpoint(load_checkpoint, see):
    with see.probe("one process alone: no file yet"), _folder() as folder, alone(), _at(folder):
        training = _Training(1)
        states = [_randomness(30)]
        see.call("the returned (epoch, step)", load_checkpoint, PATH, *training.parts)
        see.fact("the random states stay as they are", _own(states) == 0)
        see("the learning rate", training.optimizer.param_groups[0]["lr"])
    with see.probe("one process alone: interrupted after 3 steps"), _folder() as folder, alone():
        _loaded(load_checkpoint, see, folder, 3, 1)
    with see.probe("one process alone: half a file"), _folder() as folder, alone(), _at(folder):
        training = _Training(1)
        _put(training, 1, 3)
        Path(PATH).write_bytes(Path(PATH).read_bytes()[:3000])
        see.fact("a damaged file is an error", _fails(load_checkpoint, training))
    if not see.agrees:
        return
    first = "2 processes: interrupted after 4 steps"
    with see.probe(first), _folder() as folder:
        on_ranks(see, 2, _loaded, load_checkpoint, folder, 4, 2)
    if _raised(see, first):
        return
    with see.probe("3 processes: interrupted after 5 steps"), _folder() as folder:
        on_ranks(see, 3, _loaded, load_checkpoint, folder, 5, 7)


def _load_with(
    model=lambda model, checkpoint: model.load_state_dict(checkpoint["model"]),
    optimizer=lambda optimizer, checkpoint: optimizer.load_state_dict(checkpoint["optimizer"]),
    scheduler=lambda scheduler, checkpoint: scheduler.load_state_dict(checkpoint["scheduler"]),
    which=lambda states: states[dist.get_rank()],
    use=lambda own: (torch.set_rng_state(own["torch"]), random.setstate(own["python"])),
    result=lambda checkpoint: (checkpoint["epoch"], checkpoint["step"]),
    missing=lambda: (0, 0),
):
    """load_checkpoint with another treatment of one of its parts."""

    def load_checkpoint(path, net, optim, schedule):
        if missing is not None and not os.path.exists(path):
            return missing()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model(net, checkpoint)
        optimizer(optim, checkpoint)
        scheduler(schedule, checkpoint)
        use(which(checkpoint["rng"]))
        return result(checkpoint)

    return load_checkpoint


def _nothing(*_):
    return None


def _replayed(scheduler, checkpoint):
    for _ in range(checkpoint["step"]):
        scheduler.step()


def _in_eval_mode(model, checkpoint):
    model.load_state_dict(checkpoint["model"])
    model.eval()


def _parameters_only(model, checkpoint):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(checkpoint["model"][name])


def _settings_only(optimizer, checkpoint):
    for group, saved in zip(
        optimizer.param_groups, checkpoint["optimizer"]["param_groups"], strict=True
    ):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _new_parameters(model, checkpoint):
    for name, tensor in checkpoint["model"].items():
        owner, _, last = name.rpartition(".")
        if owner:
            setattr(model.get_submodule(owner), last, nn.Parameter(tensor))
        else:
            setattr(model, last, tensor)


_load_nothing = _load_with(model=_nothing)
_load_no_optimizer = _load_with(optimizer=_nothing)
_load_settings_only = _load_with(optimizer=_settings_only)
_load_no_scheduler = _load_with(scheduler=_nothing)
_load_replayed = _load_with(scheduler=_replayed)
_load_no_rng = _load_with(use=_nothing)
_load_torch_only = _load_with(use=lambda own: torch.set_rng_state(own["torch"]))
_load_python_only = _load_with(use=lambda own: random.setstate(own["python"]))
_load_seeded = _load_with(use=lambda own: (torch.manual_seed(0), random.seed(0)))
_load_rank_zeros_state = _load_with(which=lambda states: states[0])
_load_last_state = _load_with(which=lambda states: states[-1])
_load_next_epoch = _load_with(result=lambda c: (c["epoch"] + 1, c["step"]))
_load_next_step = _load_with(result=lambda c: (c["epoch"], c["step"] + 1))
_load_torch_seeded = _load_with(
    use=lambda own: (torch.manual_seed(dist.get_rank()), random.setstate(own["python"]))
)
_load_from_epochs_start = _load_with(result=lambda c: (c["epoch"], 0))
_load_swapped = _load_with(result=lambda c: (c["step"], c["epoch"]))
_load_epoch_only = _load_with(result=lambda c: c["epoch"])
_load_must_exist = _load_with(missing=None)
_load_none_when_missing = _load_with(missing=lambda: None)
_load_one_when_missing = _load_with(missing=lambda: (1, 0))
_load_in_eval_mode = _load_with(model=_in_eval_mode)
_load_parameters_only = _load_with(model=_parameters_only)
_load_new_parameters = _load_with(model=_new_parameters)


def _load_whatever_happens(path, model, optimizer, scheduler):
    try:
        return reference.load_checkpoint(path, model, optimizer, scheduler)
    except Exception:
        return 0, 0


def _load_and_remove(path, model, optimizer, scheduler):
    found = reference.load_checkpoint(path, model, optimizer, scheduler)
    dist.barrier()
    if dist.get_rank() == 0 and os.path.exists(path):
        os.remove(path)
    return found


def _load_anywhere(path, model, optimizer, scheduler):
    if not os.path.exists(path):
        return 0, 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"][dist.get_rank()]["torch"])
    random.setstate(saved["rng"][dist.get_rank()]["python"])
    return saved["epoch"], saved["step"]


def _floating_only(model, checkpoint):
    floating = {k: v for k, v in checkpoint["model"].items() if v.is_floating_point()}
    model.load_state_dict(floating, strict=False)


_load_floating_only = _load_with(model=_floating_only)


def _load_on_rank_zero(path, model, optimizer, scheduler):
    if dist.get_rank() == 0:
        return reference.load_checkpoint(path, model, optimizer, scheduler)
    return 0, 0


def _load_and_broadcast(path, model, optimizer, scheduler):
    found = [(0, 0)]
    if dist.get_rank() == 0:
        found = [reference.load_checkpoint(path, model, optimizer, scheduler)]
    dist.broadcast_object_list(found, 0)
    reference.broadcast_parameters(model)
    return found[0]


def _load_by_try(path, model, optimizer, scheduler):
    try:
        saved = torch.load(path, map_location=torch.device("cpu"), weights_only=False)
    except FileNotFoundError:
        return [0, 0]
    for part, key in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
        part.load_state_dict(saved[key])
    own = saved["rng"][dist.get_rank()]
    random.setstate(own["python"])
    torch.random.set_rng_state(own["torch"].cpu())
    return [saved["epoch"], saved["step"]]


def _load_in_order(path, model, optimizer, scheduler, strict=True):
    dist.barrier()
    if not Path(path).is_file():
        return (0, 0)
    with open(path, "rb") as file:
        saved = torch.load(file, map_location="cpu")
    scheduler.load_state_dict(saved["scheduler"])
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"], strict=strict)
    states = saved["rng"][dist.get_rank()]
    torch.default_generator.set_state(states["torch"])
    version, numbers, rest = states["python"]
    random.setstate((version, tuple(numbers), rest))
    dist.barrier()
    return int(saved["epoch"]), int(saved["step"])


def _load_by_copying(path, model, optimizer, scheduler):
    if not os.path.exists(path):
        return 0, 0
    saved = torch.load(path, map_location="cpu", mmap=True)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(saved["model"][name])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"][dist.get_rank()]["torch"].clone())
    random.setstate(saved["rng"][dist.get_rank()]["python"])
    return saved["epoch"], saved["step"]


LOAD_CHECKPOINT = Exercise(
    slug="load_checkpoint",
    chapter=5,
    title="Go on as if nothing had happened",
    minutes=15,
    difficulty=2,
    reference=reference.load_checkpoint,
    observe=_observe_load_checkpoint,
    rtol=0.0,  # bit for bit
    atol=0.0,
    misconceptions=(
        Misconception(
            "missing_file_raises",
            _load_must_exist,
            "You read the file without asking whether there is one. The very first start of a "
            "training has none, and begins at epoch 0, step 0.",
        ),
        Misconception(
            "none_when_missing",
            _load_none_when_missing,
            "You return None where there is no file. The training loop wants two numbers in any "
            "case: epoch 0, step 0.",
        ),
        Misconception(
            "epoch_1_when_missing",
            _load_one_when_missing,
            "You start at epoch 1 where there is no file. Epochs are counted from 0 here, and the "
            "first one would be skipped.",
        ),
        Misconception(
            "model_not_loaded",
            _load_nothing,
            "The model does not get its state and goes on with the weights that it was initialised "
            "with. Either nothing was loaded, for example because the names do not match and "
            "strict=False hides it, or you assigned to the name `model`, which changes nothing "
            "outside the function.",
        ),
        Misconception(
            "every_error_swallowed",
            _load_whatever_happens,
            "You take every error for a missing file. A damaged checkpoint then starts the "
            "training anew without a word, and the next save overwrites what could have been "
            "rescued: only the missing file means (0, 0).",
        ),
        Misconception(
            "file_removed",
            _load_and_remove,
            "You remove the checkpoint after reading it. If the run is interrupted again before "
            "the next save, all is lost.",
        ),
        Misconception(
            "read_anywhere",
            _load_anywhere,
            "You read the file without saying onto which device. Tensors go back to where they "
            "were saved from: on a machine with 8 GPUs all eight ranks fill the memory of GPU 0. "
            "Read onto the CPU; load_state_dict copies to where the values belong.",
        ),
        Misconception(
            "floating_entries_only",
            _load_floating_only,
            "You load the floating-point entries only. Integer buffers, such as batch norm's count "
            "of batches, stay at their initial values, and strict=False hides it.",
        ),
        Misconception(
            "next_step",
            _load_next_step,
            "You return step + 1. The file already says where to go on, and one batch would never "
            "be seen.",
        ),
        Misconception(
            "torch_seeded_again",
            _load_torch_seeded,
            "torch's random state is none of those in the file: you seed again, or draw from it, "
            "after it was restored. The masks that dropout draws then differ from those of the "
            "uninterrupted run.",
        ),
        Misconception(
            "parameters_only",
            _load_parameters_only,
            "You copy the parameters and forget the buffers, such as the running statistics of "
            "batch norm. The file holds both.",
        ),
        Misconception(
            "new_parameters",
            _load_new_parameters,
            "You put new parameters into the model. The optimizer still holds the old ones and "
            "updates those, so the model never changes again; copy the values instead.",
        ),
        Misconception(
            "eval_mode",
            _load_in_eval_mode,
            "You switch the model to eval mode, as one does for inference. Training goes on here, "
            "and it would go on without dropout.",
        ),
        Misconception(
            "optimizer_not_loaded",
            _load_no_optimizer,
            "You do not give the optimizer its state. AdamW starts again with moments of zero and "
            "counts its steps from 1, so the next step is not that of the interrupted run.",
        ),
        Misconception(
            "optimizer_settings_only",
            _load_settings_only,
            "You restore the optimizer's settings, such as the learning rate, and not its moments "
            "and step counts, which are the larger part of its state.",
        ),
        Misconception(
            "scheduler_not_loaded",
            _load_no_scheduler,
            "You do not give the scheduler its state. It counts from the beginning again, and the "
            "learning rate falls at the wrong steps.",
        ),
        Misconception(
            "scheduler_replayed",
            _load_replayed,
            "You call the scheduler as often as there were steps. That lowers the learning rate "
            "once more, after the optimizer's state has already brought the lowered one.",
        ),
        Misconception(
            "random_states_not_loaded",
            _load_no_rng,
            "You do not restore the random states. Dropout draws other masks than the interrupted "
            "run would have drawn, and the losses differ from the first step on.",
        ),
        Misconception(
            "torch_state_only",
            _load_torch_only,
            "You restore torch's random state and not Python's. What draws from `random`, an "
            "augmentation for example, goes on differently.",
        ),
        Misconception(
            "python_state_only",
            _load_python_only,
            "You restore Python's random state and not torch's, from which dropout draws.",
        ),
        Misconception(
            "seeded_again",
            _load_seeded,
            "You seed the random numbers anew. They start from a beginning, where the interrupted "
            "run was in the middle of its own; the file holds the states that it had reached.",
        ),
        Misconception(
            "rank_zeros_random_state",
            _load_rank_zeros_state,
            "You give every rank the random states of rank 0. From then on all ranks draw the "
            "same dropout masks; each has an entry of its own in the list.",
        ),
        Misconception(
            "last_ranks_random_state",
            _load_last_state,
            "You give every rank the random states of the last rank. Each has an entry of its own "
            "in the list, at the place that its number says.",
        ),
        Misconception(
            "next_epoch",
            _load_next_epoch,
            "You return epoch + 1. The file says where to go on, and the rest of that epoch would "
            "be skipped.",
        ),
        Misconception(
            "from_the_epochs_start",
            _load_from_epochs_start,
            "You return step 0. The steps of this epoch that are already in the weights would be "
            "taken a second time.",
        ),
        Misconception(
            "epoch_and_step_swapped",
            _load_swapped,
            "You return step and epoch. The order that is asked for is (epoch, step).",
        ),
        Misconception(
            "epoch_only",
            _load_epoch_only,
            "You return the epoch alone. Without the step the training loop cannot go on in the "
            "middle of an epoch.",
        ),
        Misconception(
            "only_rank_zero_loads",
            _load_on_rank_zero,
            "You load on rank 0 only. The other ranks go on from their fresh weights, at step 0: "
            "every rank has to read the file.",
        ),
        Misconception(
            "loaded_and_broadcast",
            _load_and_broadcast,
            "You load on rank 0 and send the others the model. They still lack the optimizer's "
            "and the scheduler's state and their own random states: every rank can read the file.",
        ),
    ),
    alternatives=(_load_by_try, _load_in_order, _load_by_copying),
    hints=(
        "Six things stand in the file. Three of them go to objects by load_state_dict, one is two "
        "random states for each rank, two are returned.",
        'torch.load(path, map_location="cpu", weights_only=True) reads it; os.path.exists says '
        "whether there is anything to read.",
        'Take checkpoint["rng"][dist.get_rank()] and give its two states to torch.set_rng_state '
        "and random.setstate, after everything else.",
    ),
)
# --- sharded_adamw ------------------------------------------------------------------------------


def _kept(optimizer, parameters):
    """How many numbers an optimizer keeps in tensors, besides parameters and gradients.

    Counts whole storages, once each, and none of a single number, as a count of steps is.
    """
    known = parameters + [p.grad for p in parameters if p.grad is not None]
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    found, queue, numbers = {}, deque([optimizer]), {}
    while queue:
        value = queue.popleft()
        if id(value) in found or isinstance(value, (type, ModuleType, str, int, float)):
            continue
        found[id(value)] = value
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            size = storage.nbytes() // value.element_size()
            if storage.data_ptr() not in known and size > 1:
                numbers[storage.data_ptr()] = size
            continue
        if isinstance(value, dict):
            queue += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            queue += value
        elif isinstance(value, FunctionType):
            queue += [cell.cell_contents for cell in value.__closure__ or ()]
            queue += value.__defaults__ or ()
        elif isinstance(value, MethodType):
            queue += [value.__self__, value.__func__]
        elif isinstance(value, partial):
            queue += [value.func, value.args, value.keywords]
        else:
            queue.append(getattr(value, "__dict__", None))
            queue += [getattr(value, name, None) for name in getattr(value, "__slots__", ())]
    return sum(numbers.values())


def _sharded(ShardedAdamW, see, shapes, lacking, settings, steps=3, frozen=None):
    """Some steps on this rank. lacking: (step, number) of parameters without a gradient."""
    parameters = [nn.Parameter(see.randn(*shape)) for shape in shapes]  # the same on all ranks
    if frozen is not None:
        parameters[frozen].requires_grad_(False)
    optimizer = ShardedAdamW(iter(parameters), **settings)
    most, kept = [0], True

    def measure(torchs_own, *_):
        states = [value for state in torchs_own.state.values() for value in state.values()]
        most.append(sum(v.numel() for v in states if torch.is_tensor(v) and v.numel() > 1))

    handle = register_optimizer_step_post_hook(measure)
    try:
        for step in range(1, steps + 1):
            for number, parameter in enumerate(parameters):
                gradient = see.randn(*parameter.shape)
                none = (step, number) in lacking or number == frozen
                parameter.grad = None if none else gradient
            given = [None if p.grad is None else p.grad.clone() for p in parameters]
            optimizer.step()
            for number, parameter in enumerate(parameters):
                see(f"parameter {number} after step {step}", parameter)
                kept = kept and _alike(parameter.grad, given[number])
    finally:
        handle.remove()
    see.fact("step() leaves the gradients as they are", kept)
    afterwards = _kept(optimizer, parameters)
    see("how many numbers of state this rank keeps at most", max(*most, afterwards))
    if max(most) > afterwards > 0:  # dropped again: a right answer has less to begin with
        see("how many are left after the step", afterwards)
    for number, parameter in enumerate(parameters):
        parameter.grad = None if number == frozen else see.randn(*parameter.shape)
    optimizer.zero_grad()
    for number, parameter in enumerate(parameters):
        left = "zeros" if parameter.grad is not None and not parameter.grad.any() else "a gradient"
        left = "None" if parameter.grad is None else left
        see(f"what parameter {number} has in .grad after zero_grad()", left)


def _alike(one, other):
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


SHAPES = ((3, 5), (4,), (2, 3), (10,), (3,))  # 15, 4, 6, 10 and 3 numbers
SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}


def _sent_by_sharded(ShardedAdamW, see):
    """What a step sends: looked at where an answer is wrong, to tell what is wrong."""
    parameters = [nn.Parameter(see.randn(*shape)) for shape in SHAPES]
    optimizer = ShardedAdamW(parameters)
    for parameter in parameters[1:]:
        parameter.grad = see.randn(*parameter.shape)
    before = len(calls())
    optimizer.step()
    see("what is sent", ", ".join(str(call) for call in calls()[before:]))


def _asked_of_broadcast(ShardedAdamW, see):
    """Which broadcasts each rank would call, where the true ones do not fit together."""
    parameters = [nn.Parameter(see.randn(*shape)) for shape in SHAPES]
    optimizer, asked, true = ShardedAdamW(parameters), [], dist.broadcast
    for parameter in parameters:
        parameter.grad = see.randn(*parameter.shape)

    def noted(tensor, *_, **__):
        asked.append(tuple(tensor.shape))

    dist.broadcast = noted
    try:
        optimizer.step()
    finally:
        dist.broadcast = true
    see("how many broadcasts this rank calls", len(asked))
    if len(asked) == len(SHAPES):
        see.fact("they are in the order of the parameters", tuple(asked) == SHAPES)


def _observe_sharded_adamw(ShardedAdamW, see):
    with see.probe("one process alone, settings as they are by default"), alone():
        _sharded(ShardedAdamW, see, SHAPES, (), {})
    with see.probe("one process alone, other settings; a gradient is missing"), alone():
        _sharded(ShardedAdamW, see, SHAPES, ((1, 2), (3, 0)), SETTINGS)
    if not see.agrees:
        return
    first = "2 processes, 5 parameters; some gradients are missing"
    with see.probe(first):
        lacking = ((1, 2), (2, 3), (3, 0))
        on_ranks(see, 2, _sharded, ShardedAdamW, SHAPES, lacking, SETTINGS, 3, 1)
    if _raised(see, first):
        with see.probe("2 processes: the broadcasts that a step asks for"):
            on_ranks(see, 2, _asked_of_broadcast, ShardedAdamW)
        return
    with see.probe("3 processes, 5 parameters"):
        on_ranks(see, 3, _sharded, ShardedAdamW, SHAPES, (), {"lr": 0.1}, 2)
    with see.probe("3 processes, 2 parameters"):
        on_ranks(see, 3, _sharded, ShardedAdamW, ((4, 2), (3,)), (), {"eps": 1e-3}, 2)
    if not see.agrees:
        with see.probe("2 processes: what one step sends"):
            on_ranks(see, 2, _sent_by_sharded, ShardedAdamW)


def _every(numbers, rank, world_size):
    return numbers[rank::world_size]


def _sharded_with(
    deal=_every,
    make=torch.optim.AdamW,
    send=lambda parameter, owner: dist.broadcast(parameter.detach(), owner),
    zero=lambda all_of_them, own: [setattr(p, "grad", None) for p in all_of_them],
    before=lambda parameters: None,
    passed=lambda settings: settings,
    listed=list,
    anew=False,
):
    """ShardedAdamW with another deal, optimizer, way to send, or way to zero the gradients."""

    class ShardedAdamW:
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
            self.params = listed(params)
            kept = list(params) if listed is not list else self.params
            rank, world_size = dist.get_rank(), dist.get_world_size()
            numbers = list(range(len(kept)))
            self.owner = {n: r for r in range(world_size) for n in deal(numbers, r, world_size)}
            self.own = [kept[n] for n in deal(numbers, rank, world_size)]
            settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            self.make = lambda: make(self.own, **passed(settings)) if self.own else None
            self.optimizer = self.make()

        def step(self):
            before(self.params)
            if anew:
                self.optimizer = self.make()
            if self.optimizer is not None:
                self.optimizer.step()
            for number, parameter in enumerate(self.params):
                send(parameter, self.owner.get(number, 0))

        def zero_grad(self):
            zero(self.params, self.own)

    return ShardedAdamW


def _in_blocks(numbers, rank, world_size):
    size = -(-len(numbers) // world_size)
    return numbers[rank * size : (rank + 1) * size]


def _backwards(numbers, rank, world_size):
    return numbers[::-1][rank::world_size]


def _all_of_them(numbers, rank, world_size):
    return numbers


def _all_on_rank_zero(numbers, rank, world_size):
    return numbers if rank == 0 else []


def _without_the_rest(numbers, rank, world_size):
    return numbers[: len(numbers) // world_size * world_size][rank::world_size]


def _mean_of_weights(parameter, owner):
    dist.all_reduce(parameter.data)
    parameter.data /= dist.get_world_size()


def _gradient_sent(parameter, owner):
    if parameter.grad is not None:
        dist.broadcast(parameter.grad, owner)


def _only_the_owner(parameter, owner):
    if owner == dist.get_rank():
        dist.broadcast(parameter.detach(), owner)


def _zeros(all_of_them, own):
    for parameter in all_of_them:
        if parameter.grad is not None:
            parameter.grad.zero_()


def _sharded_gradients_first(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def _coupled(parameters, lr, betas, eps, weight_decay):
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _rate_only(settings):
    return {"lr": settings["lr"]}


_sharded_everywhere = _sharded_with(deal=_all_of_them, send=lambda p, owner: None)
_sharded_unsent = _sharded_with(send=lambda p, owner: None)
_sharded_from_zero = _sharded_with(send=lambda p, owner: dist.broadcast(p.detach(), 0))
_sharded_mean = _sharded_with(send=_mean_of_weights)
_sharded_copies_sent = _sharded_with(
    send=lambda p, owner: dist.broadcast(p.detach().clone(), owner)
)
_sharded_gradients_sent = _sharded_with(send=_gradient_sent)
_sharded_only_owner_sends = _sharded_with(send=_only_the_owner)
_sharded_in_blocks = _sharded_with(deal=_in_blocks)
_sharded_backwards = _sharded_with(deal=_backwards)
_sharded_on_rank_zero = _sharded_with(deal=_all_on_rank_zero)
_sharded_without_rest = _sharded_with(deal=_without_the_rest)
_sharded_adam = _sharded_with(make=_coupled)
_sharded_rate_only = _sharded_with(passed=_rate_only)
_sharded_without_decay = _sharded_with(
    passed=lambda settings: {k: v for k, v in settings.items() if k != "weight_decay"}
)
_sharded_without_betas = _sharded_with(
    passed=lambda settings: {k: v for k, v in settings.items() if k != "betas"}
)
_sharded_anew = _sharded_with(anew=True)
_sharded_zeros = _sharded_with(zero=_zeros)
_sharded_zero_own = _sharded_with(zero=lambda params, own: [setattr(p, "grad", None) for p in own])
_sharded_gradients_added = _sharded_with(before=_sharded_gradients_first)
_sharded_used_up = _sharded_with(listed=lambda params: params)


class _ShardedSameState:
    """Each rank keeps the state of all, and steps its own."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.params = list(params)
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(self.params, **settings)

    def step(self):
        self.optimizer.step()
        for number, parameter in enumerate(self.params):
            dist.broadcast(parameter.detach(), number % dist.get_world_size())

    def zero_grad(self):
        self.optimizer.zero_grad()


class _ShardedDropsState(_ShardedSameState):
    """Steps everything, and drops afterwards what belongs to others."""

    def step(self):
        self.optimizer.step()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        for number, parameter in enumerate(self.params):
            if number % world_size != rank:
                self.optimizer.state.pop(parameter, None)
            dist.broadcast(parameter.detach(), number % world_size)


class _ShardedLearningOnly(reference.ShardedAdamW):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__([p for p in params if p.requires_grad], lr, betas, eps, weight_decay)


class _ShardedOwnFirst(reference.ShardedAdamW):
    def step(self):
        if self.optimizer is not None:
            self.optimizer.step()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        numbers = sorted(range(len(self.params)), key=lambda n: (n % world_size != rank, n))
        for number in numbers:
            dist.broadcast(self.params[number].detach(), number % world_size)


class _ShardedSentFirst(reference.ShardedAdamW):
    def step(self):
        for number, parameter in enumerate(self.params):
            dist.broadcast(parameter.detach(), number % dist.get_world_size())
        if self.optimizer is not None:
            self.optimizer.step()


class _ShardedStepZeroes(reference.ShardedAdamW):
    def step(self):
        super().step()
        self.zero_grad()


class _ShardedZerosForNone(reference.ShardedAdamW):
    def step(self):
        for parameter in self.params:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        super().step()


class _ShardedNeverEmpty:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.params = list(params)
        own = self.params[dist.get_rank() :: dist.get_world_size()]
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(own, **settings)

    def step(self):
        self.optimizer.step()
        for number, parameter in enumerate(self.params):
            dist.broadcast(parameter.detach(), number % dist.get_world_size())

    def zero_grad(self):
        for parameter in self.params:
            parameter.grad = None


class _ShardedCountsSteps:
    """Written out by hand, with one count of steps for all parameters."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.params, self.steps = list(params), 0
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        own = self.params[dist.get_rank() :: dist.get_world_size()]
        self.state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in own]

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for parameter, first, second in self.state:
            if parameter.grad is None:
                continue
            parameter *= 1 - self.lr * self.weight_decay
            first.lerp_(parameter.grad, 1 - self.betas[0])
            second.lerp_(parameter.grad.square(), 1 - self.betas[1])
            mean = first / (1 - self.betas[0] ** self.steps)
            square = second / (1 - self.betas[1] ** self.steps)
            parameter -= self.lr * mean / (square.sqrt() + self.eps)
        for number, parameter in enumerate(self.params):
            dist.broadcast(parameter, number % dist.get_world_size())

    def zero_grad(self):
        for parameter in self.params:
            parameter.grad = None


class _ShardedBySum:
    """The others put zeros in the place of what is not theirs, and the sum is what it should be."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.everything = tuple(params)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.mine = [i % world_size == rank for i in range(len(self.everything))]
        own = [p for p, mine in zip(self.everything, self.mine, strict=True) if mine]
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.inner = [torch.optim.AdamW([p], **settings) for p in own]

    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()
        with torch.no_grad():
            flat = [p if m else 0 * p for p, m in zip(self.everything, self.mine, strict=True)]
            flat = torch.cat([p.flatten() for p in flat])
            dist.all_reduce(flat)
            start = 0
            for p in self.everything:
                p.copy_(flat[start : start + p.numel()].view_as(p))
                start += p.numel()

    def zero_grad(self, set_to_none=True):
        for p in self.everything:
            p.grad = None


class _ShardedByHidingGradients(torch.optim.AdamW):
    """AdamW makes state only for what has a gradient."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(list(params), lr, betas, eps, weight_decay)
        self.listed = self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure=None):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        hidden = {}
        for number, parameter in enumerate(self.listed):
            if number % world_size != rank:
                hidden[parameter], parameter.grad = parameter.grad, None
        super().step(closure)
        for parameter, gradient in hidden.items():
            parameter.grad = gradient
        works = [
            dist.broadcast(parameter.data, number % world_size, async_op=True)
            for number, parameter in enumerate(self.listed)
        ]
        for work in works:
            work.wait()


class _ShardedByHand:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.params, self.state = list(params), {}
        self.settings = lr, *betas, eps, weight_decay

    def _update(self, number, parameter):
        lr, beta1, beta2, eps, weight_decay = self.settings
        if number not in self.state:
            self.state[number] = [0, torch.zeros_like(parameter), torch.zeros_like(parameter)]
        state = self.state[number]
        state[0] += 1
        state[1] = beta1 * state[1] + (1 - beta1) * parameter.grad
        state[2] = beta2 * state[2] + (1 - beta2) * parameter.grad**2
        mean, square = state[1] / (1 - beta1 ** state[0]), state[2] / (1 - beta2 ** state[0])
        new = parameter.data * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps)
        parameter.data = new

    def step(self):
        world_size = dist.get_world_size()
        for number, parameter in enumerate(self.params):
            if parameter.grad is None:
                continue
            if number % world_size == dist.get_rank():
                self._update(number, parameter)
            parts = [torch.empty_like(parameter.data) for _ in range(world_size)]
            dist.all_gather(parts, parameter.data)
            parameter.data = parts[number % world_size]

    def zero_grad(self):
        for parameter in self.params:
            parameter.grad = None


SHARDED_ADAMW = Exercise(
    slug="sharded_adamw",
    chapter=5,
    title="An optimizer whose state is spread over the ranks",
    minutes=25,
    difficulty=4,
    reference=reference.ShardedAdamW,
    observe=_observe_sharded_adamw,
    misconceptions=(
        Misconception(
            "state_everywhere",
            _sharded_everywhere,
            "You keep the state of all parameters on every rank and let each rank step by itself. "
            "The weights come out right, but the memory is that of ordinary AdamW: each rank is "
            "to keep its share only, and to send what it has updated.",
        ),
        Misconception(
            "state_everywhere_and_sent",
            _ShardedSameState,
            "You keep the state of all parameters on every rank and send the parameters as well. "
            "That costs the communication and saves no memory: give torch's AdamW only the "
            "parameters of this rank.",
        ),
        Misconception(
            "not_sent",
            _sharded_unsent,
            "You update each rank's own parameters and do not send them. Every rank goes on with "
            "old values of all that the others have updated.",
        ),
        Misconception(
            "all_from_rank_zero",
            _sharded_from_zero,
            "You send everything from rank 0. What the other ranks have updated is overwritten by "
            "rank 0's old values; each parameter has to come from the rank that updated it.",
        ),
        Misconception(
            "weights_averaged",
            _sharded_mean,
            "You average the parameters over the ranks. Only one rank has updated each of them, "
            "so the mean keeps one world_size-th of the step.",
        ),
        Misconception(
            "copies_sent",  # museum 5.30
            _sharded_copies_sent,
            "You send and receive copies of the parameters, and what arrives in the copies is "
            "dropped. The parameters themselves have to receive.",
        ),
        Misconception(
            "gradients_sent",
            _sharded_gradients_sent,
            "You send gradients, which are the same on all ranks already. What the others lack are "
            "the updated parameters.",
        ),
        Misconception(
            "gradients_added",
            _sharded_gradients_added,
            "You add the gradients up over the ranks first. They are the same on all ranks when "
            "step() is called, so AdamW sees gradients that are world_size times too long.",
        ),
        Misconception(
            "only_the_owner_sends",  # museum 5.27
            _sharded_only_owner_sends,
            "You call broadcast on the rank that owns a parameter and nowhere else. A broadcast is "
            "also how the others receive: every rank has to call it for every parameter.",
        ),
        Misconception(
            "another_order_on_each_rank",
            _ShardedOwnFirst,
            "You broadcast every parameter on every rank, but in an order that differs from rank "
            "to rank. Collectives are matched by the order of the calls alone: the first call of "
            "one rank meets the first call of the other, whatever tensors they hold.",
        ),
        Misconception(
            "sent_before_the_step",
            _ShardedSentFirst,
            "You send the parameters before AdamW has updated them. What the others receive are "
            "the old values, and they miss the last update of all that is not their own.",
        ),
        Misconception(
            "state_dropped_after_the_step",
            _ShardedDropsState,
            "You let every rank step all the parameters and drop the others' state afterwards. At "
            "the moment of the step the memory of ordinary AdamW is needed, and every rank does "
            "all the work: AdamW is to be given this rank's parameters only.",
        ),
        Misconception(
            "step_zeroes_the_gradients",
            _ShardedStepZeroes,
            "Your step() also drops the gradients. That is zero_grad()'s part: whoever looks at "
            "the gradients after the step, for a log of their norms, finds none.",
        ),
        Misconception(
            "zeros_for_none",
            _ShardedZerosForNone,
            "You give a parameter without a gradient one of zeros. AdamW then decays it and moves "
            "it by its old moments; with None it stays as it is.",
        ),
        Misconception(
            "frozen_left_out_before_dealing",
            _ShardedLearningOnly,
            "You leave out the frozen parameters before you deal the list out. From there on the "
            "numbers are shifted: rank r takes number r, r + world_size and so on of the list as "
            "it is given.",
        ),
        Misconception(
            "weight_decay_dropped",
            _sharded_without_decay,
            "You do not pass weight_decay on to AdamW, which then takes the 0.01 that it has by "
            "default, whatever was asked for.",
        ),
        Misconception(
            "betas_dropped",
            _sharded_without_betas,
            "You do not pass betas on to AdamW, which then takes the (0.9, 0.999) that it has by "
            "default, whatever was asked for.",
        ),
        Misconception(
            "dealt_in_blocks",
            _sharded_in_blocks,
            "You give each rank a block of neighbouring parameters. Asked for is every "
            "world_size-th: rank r takes the parameters r, r + world_size and so on.",
        ),
        Misconception(
            "dealt_from_the_end",
            _sharded_backwards,
            "You deal the parameters out from the end of the list. Parameter 0 belongs to rank 0, "
            "parameter 1 to rank 1, and so on.",
        ),
        Misconception(
            "all_on_rank_zero",
            _sharded_on_rank_zero,
            "You leave all of the state and all of the work to rank 0. The state is kept once, but "
            "rank 0 needs as much memory as before, and memory is what sharding is for.",
        ),
        Misconception(
            "rest_left_out",
            _sharded_without_rest,
            "You deal out only as many parameters as divide evenly among the ranks. The last ones "
            "belong to nobody and are never updated.",
        ),
        Misconception(
            "rank_without_parameters",
            _ShardedNeverEmpty,
            "You make torch's AdamW on every rank, also where there are more ranks than "
            "parameters. AdamW does not take an empty list; such a rank only receives.",
        ),
        Misconception(
            "iterable_used_up",
            _sharded_used_up,
            "You keep the iterable that you were given and go through it more than once. "
            "model.parameters() is a generator: after the first time nothing is left in it.",
        ),
        Misconception(
            "adam_with_l2",
            _sharded_adam,
            "You use Adam, whose weight_decay is added to the gradient and divided by the second "
            "moment with it. AdamW shrinks the weights directly.",
        ),
        Misconception(
            "settings_dropped",
            _sharded_rate_only,
            "You pass on the learning rate only. betas, eps and weight_decay stay at what "
            "torch takes by default.",
        ),
        Misconception(
            "state_made_anew",
            _sharded_anew,
            "You make a new AdamW in every step. Its moments start from zero each time, as if "
            "every step were the first.",
        ),
        Misconception(
            "one_count_of_steps",
            _ShardedCountsSteps,
            "You count the steps once for all parameters. torch's AdamW counts them for each "
            "parameter, so one that had no gradient at first is corrected for fewer steps.",
        ),
        Misconception(
            "zero_grad_for_own_only",
            _sharded_zero_own,
            "Your zero_grad() clears the gradients of this rank's own parameters only. Backward "
            "adds to the others, and they grow from step to step.",
        ),
        Misconception(
            "gradients_set_to_zero",
            _sharded_zeros,
            "You fill the gradients with zeros. Asked for is None: it frees their memory, and a "
            "parameter that gets no gradient is then left alone instead of decayed.",
        ),
    ),
    alternatives=(_ShardedBySum, _ShardedByHidingGradients, _ShardedByHand),
    hints=(
        "AdamW keeps two numbers for every number of a parameter that it is given. Which "
        "parameters may each rank's AdamW be given, so that no state is kept twice?",
        "list(params)[rank::world_size] are this rank's own; there may be none. After the step "
        "parameter number i is new on rank i % world_size only.",
        "In step(): step torch's AdamW where there is one, then, on every rank and for every "
        "parameter, dist.broadcast(parameter.detach(), number % world_size).",
    ),
)


EXERCISES = (
    ALL_REDUCE_MEAN,
    FIX_COLLECTIVE_ON_RANK_ZERO,
    RING_ALL_REDUCE,
    SHARD_INDICES,
    FIX_SAME_DEVICE_AND_DATA,
    BROADCAST_PARAMETERS,
    AVERAGE_GRADIENTS,
    FIX_SUM_FOR_MEAN,
    FIX_MEAN_OF_SHARD_MEANS,
    NAIVE_DDP,
    FIX_HOOK_REDUCES_PARAMETER,
    BUCKETED_DDP,
    FIX_NO_SYNC_ON_LAST_BATCH,
    FIX_CLIPPING_BEFORE_REDUCTION,
    GLOBAL_ACCURACY,
    SAVE_CHECKPOINT,
    LOAD_CHECKPOINT,
    SHARDED_ADAMW,
)
