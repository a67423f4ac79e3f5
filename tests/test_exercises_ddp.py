"""The references of chapter 5 on real processes against torch's own; figures in symptoms."""

from __future__ import annotations

import copy
import random
import re
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from course_utils import notebooks
from course_utils.exercises import ddp as catalogue
from course_utils.exercises import find
from course_utils.processes import calls, launch
from course_utils.reference import ddp

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "05_ddp.ipynb"
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks cannot import this file


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


class Tied(nn.Module):
    """Small, with what makes data parallel training hard: tied and frozen weights, a buffer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(5, 7, bias=False)
        self.hidden = nn.Linear(7, 7)
        self.frozen = nn.Linear(7, 7)
        self.out = nn.Linear(7, 5)
        self.tied = nn.Linear(7, 5, bias=False)
        self.tied.weight = nn.Parameter(torch.randn(5, 7))
        self.again = self.tied
        self.register_buffer("shift", torch.randn(7))
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x):
        h = self.frozen(torch.tanh(self.hidden(self.embed(x) + self.shift)))
        h = h + F.linear(self.tied(h), self.tied.weight.T)  # used twice
        return self.out(torch.tanh(h)) + self.again(h)


def data(n=11):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (5, n), generator=generator)


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_are_those_of_distributed_sampler(world_size):
    for n in (1, 2, 3, 10, 11, 64):
        seen = []
        for rank in range(world_size):
            sampler = DistributedSampler(range(n), world_size, rank, seed=5)
            for epoch in (0, 1, 4):
                sampler.set_epoch(epoch)
                mine = ddp.shard_indices(n, rank, world_size, epoch, 5)
                assert mine == list(sampler)
            seen += mine
        assert set(seen) == set(range(n))


def test_each_rank_has_its_own_device_and_part():
    parts = []
    for rank in range(3):
        device, loader = ddp.prepare_rank(range(10), 2, rank, rank % 2, 3)
        assert device == torch.device("cuda", rank % 2)
        parts.append([sample for batch in loader for sample in batch.tolist()])
    assert {len(part) for part in parts} == {4} and set(sum(parts, [])) == set(range(10))
    assert ddp.prepare_rank(range(10), 2, 0, 0, 3, "cpu")[0] == torch.device("cpu")


# --- collectives --------------------------------------------------------------------------------


def _reduced(ring, shapes):
    out = []
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(dist.get_rank())).double()
        kept, expected = x.clone(), x.clone()
        dist.all_reduce(expected)
        before = len(calls())
        got = ring(x)
        assert torch.equal(x, kept) and got.shape == x.shape
        close(got, expected)
        sent = [call for call in calls()[before:] if call.name == "isend"]
        out.append((x.numel(), sum(call.bytes for call in sent), {call.peer for call in sent}))
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_ring_is_all_reduce_and_sends_no_more_than_it_must(world_size):
    shapes = [(), (1,), (2,), (7,), (4, 6), (3, 5, 2)]
    for rank, found in enumerate(launch(_reduced, world_size, ddp.ring_all_reduce, shapes)):
        for count, sent, peers in found:
            steps = 2 * (world_size - 1)
            assert sent <= steps * 8 * -(-count // world_size)
            assert peers <= {(rank + 1) % world_size}
    total, sent, _ = found[4]
    assert sent == 8 * total * 2 * (world_size - 1) // world_size


def _means():
    rank = dist.get_rank()
    own = torch.arange(6.0).double().reshape(2, 3) * (rank + 1)
    module = Tied(rank)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.shape != (7,):
            parameter.grad = torch.full_like(parameter, rank + 1.0)
    if rank == 0:
        module.hidden.bias.grad = None
    else:
        module.hidden.bias.grad = torch.ones_like(module.hidden.bias)
    ddp.average_gradients(module)
    gradients = [own.clone(), own.flatten().clone()]
    ddp.average_in_one_message(gradients)
    ddp.broadcast_parameters(module)
    logged = ddp.logged_loss(torch.tensor(2.0 * rank))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return ddp.all_reduce_mean(own), gradients, grads, module.state_dict(), logged


def test_means_and_broadcasts():
    found = launch(_means, 3)
    wanted = torch.arange(6.0).double().reshape(2, 3) * 2
    start = Tied(0).state_dict()
    for rank, (mean, gradients, grads, state, logged) in enumerate(found):
        close(mean, wanted)
        close(gradients[0], wanted)
        close(gradients[1], wanted.flatten())
        close(grads["out.weight"], torch.full((5, 7), 2.0).double())
        close(grads["hidden.bias"], torch.full((7,), 2 / 3, dtype=torch.float64))
        assert grads["frozen.weight"] is None
        assert state.keys() == start.keys()
        assert all(torch.equal(state[key], start[key]) for key in start)
        assert logged == (2.0 if rank == 0 else None)


# --- training -----------------------------------------------------------------------------------

UNEQUAL = {2: (8, 3), 3: (5, 1, 5)}


def _five_steps(wrapper, optimizer, sizes):
    """The parameters after each of five steps on this rank's part of the batch, and the calls."""
    rank = dist.get_rank()
    module = Tied(rank)
    wrapped = wrapper(module)
    optimizer = optimizer([p for p in module.parameters() if p.requires_grad])
    first = sum(sizes[:rank])
    states, counts = [], []
    for x, y in zip(*data(sum(sizes)), strict=True):
        optimizer.zero_grad()
        before = len(calls())
        mine = slice(first, first + sizes[rank])
        ddp.shard_loss(wrapped(x[mine]), y[mine]).backward()
        if isinstance(wrapped, ddp.BucketedDDP):
            wrapped.finish()
        optimizer.step()
        counts.append(len(calls()) - before)
        states.append(copy.deepcopy(module.state_dict()))
    return states, counts


def _adamw(params):
    return torch.optim.AdamW(params, lr=0.01)


def _momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def _one_process(optimizer, n):
    module = Tied(0)
    optimizer = optimizer([p for p in module.parameters() if p.requires_grad])
    states = []
    for x, y in zip(*data(n), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        states.append(copy.deepcopy(module.state_dict()))
    return states


def _bucketed(module):
    return ddp.BucketedDDP(module, bucket_bytes=400)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("optimizer", [_adamw, _momentum])
@pytest.mark.parametrize("wrapper", [ddp.NaiveDDP, _bucketed, DistributedDataParallel])
def test_every_rank_is_one_process_on_the_whole_batch_after_each_step(
    wrapper, optimizer, world_size
):
    sizes = UNEQUAL[world_size]
    expected = _one_process(optimizer, sum(sizes))
    for states, counts in launch(_five_steps, world_size, wrapper, optimizer, sizes):
        assert len(states) == 5
        for got, wanted in zip(states, expected, strict=True):
            for name in wanted:
                close(got[name], wanted[name])
        if wrapper is ddp.NaiveDDP:
            assert counts == [1 + 6] * 5  # the count of samples, and six parameters that train
        elif wrapper is _bucketed:
            assert counts == [1 + 4] * 5


def _overlap(delays):
    """When the buckets were sent, in calls made before each layer's gradient arrived."""
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    wrapped = ddp.BucketedDDP(module, bucket_bytes=4 * 42)
    seen = []
    for layer in module:
        layer.weight.register_hook(lambda grad: seen.append(len(calls())))
    before = len(calls())
    wrapped(torch.ones(2, 6)).sum().backward()
    return [count - before for count in seen], all(c.is_async for c in calls()[before:])


def test_buckets_travel_while_backward_still_computes():
    for counts, is_async in launch(_overlap, 2, None):
        assert is_async and counts == [0, 1, 2, 3]


def _accumulated():
    torch.manual_seed(7)
    x, y = torch.randn(4, 6, 5).double(), torch.randint(0, 5, (4, 6))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ddp_module = DistributedDataParallel(Tied(rank))
    micro_batches = [(x[i, rank::world_size], y[i, rank::world_size]) for i in range(4)]
    ddp.accumulate_shards(ddp_module, micro_batches, F.cross_entropy)
    alone = Tied(0)
    F.cross_entropy(alone(x.flatten(0, 1)), y.flatten()).backward()
    pairs = zip(ddp_module.module.parameters(), alone.parameters(), strict=True)
    for got, wanted in pairs:
        if wanted.requires_grad:
            close(got.grad, wanted.grad)

    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1)
    module = copy.deepcopy(alone)
    stepped = torch.optim.AdamW(module.parameters(), lr=0.1)
    loss = F.cross_entropy(module(x[0, rank::world_size]), y[0, rank::world_size])
    norm = ddp.clipped_step(module, loss, stepped, 0.01)
    optimizer.zero_grad()
    F.cross_entropy(alone(x[0]), y[0]).backward()
    wanted = nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    optimizer.step()
    close(torch.tensor(norm, dtype=torch.float64), wanted)
    for got, wanted in zip(module.parameters(), alone.parameters(), strict=True):
        close(got, wanted, 1e-9)
    return True


@pytest.mark.parametrize("world_size", [2, 3])
def test_accumulating_and_clipping_are_those_of_one_process(world_size):
    assert launch(_accumulated, world_size) == [True] * world_size


def _accuracy(n):
    x, y = data(max(n, 1))
    x, y = x[0, :n], y[0, :n]
    model = Tied(1).train()
    mine = ddp.global_accuracy(model, x, y, batch_size=2)
    alone = (model(x).argmax(dim=-1) == y).double().mean().item()
    return mine, alone, model.training


@pytest.mark.parametrize("n", [1, 2, 7, 11])
def test_accuracy_counts_every_sample_once(n):
    found = launch(_accuracy, 3, n)
    assert len(set(found)) == 1
    mine, alone, training = found[0]
    assert mine == pytest.approx(alone, abs=1e-15) and training


# --- state --------------------------------------------------------------------------------------


def _train(path, stop_at, resume, forget=()):
    """Nine steps with dropout, saved after each; stopped after some of them, or resumed."""
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    random.seed(rank)
    module = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, 5)).double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    wrapped = ddp.NaiveDDP(module)
    start = 0
    if resume:
        torch.manual_seed(rank)  # as a new process has it
        _, start = ddp.load_checkpoint(path, module, optimizer, scheduler)
        if "position" in forget:
            start = 0
        if "rng" in forget:
            torch.manual_seed(rank)
        if "optimizer" in forget:
            optimizer.state.clear()
    x, y = data()
    for step in range(start, stop_at):
        noise = random.random()
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x[step % 5, rank::2] + noise), y[step % 5, rank::2]).backward()
        optimizer.step()
        scheduler.step()
        ddp.save_checkpoint(path, module, optimizer, scheduler, 0, step + 1)
    return module.state_dict()


def _weights(path, *args, **kwargs):
    states = launch(_train, 2, str(path), *args, **kwargs)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    return states[0]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = _weights(tmp_path / "whole", 9, False)
    for stop in (1, 4):
        path = tmp_path / f"stopped-{stop}"
        _weights(path, stop, False)
        resumed = _weights(path, 9, True)
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    for forgotten in ("position", "rng", "optimizer"):
        path = tmp_path / forgotten
        _weights(path, 4, False)
        resumed = _weights(path, 9, True, (forgotten,))
        assert not all(torch.equal(resumed[key], whole[key]) for key in whole), forgotten
    assert not list(tmp_path.glob("*.partial"))


def _sharded_steps():
    rank = dist.get_rank()
    module, alone = Tied(0), Tied(0)
    settings = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    sharded = ddp.ShardedAdamW(module.parameters(), **settings)
    whole = torch.optim.AdamW(alone.parameters(), **settings)
    x, y = data()
    for step in range(5):
        for network, optimizer in ((module, sharded), (alone, whole)):
            optimizer.zero_grad()
            F.cross_entropy(network(x[step]), y[step]).backward()
            optimizer.step()
        for got, wanted in zip(module.parameters(), alone.parameters(), strict=True):
            close(got, wanted)
    states = sharded.optimizer.state.values() if sharded.optimizer else []
    return rank, sum(state["exp_avg"].numel() for state in states)


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_the_sharded_optimizer_is_adamw_with_its_state_kept_once(world_size):
    if world_size == 12:
        pytest.importorskip("resource")  # more ranks than parameters; too many for small machines
    found = launch(_sharded_steps, world_size)
    trained = sum(p.numel() for p in Tied(0).parameters() if p.requires_grad)
    assert sum(count for _, count in found) == trained
    if world_size > 1:
        assert max(count for _, count in found) < trained


# --- the figures in the symptoms ----------------------------------------------------------------

SHOWN = {  # the cell, and what the symptom says in the words of the cell's output
    "fix_collective_on_rank_zero": (
        "symptom-logged",
        {"waiting in all_reduce": "waiting in all_r"},
    ),
    "fix_sum_for_mean": ("symptom-sum", {"both hold 4": "[4.0, 2.0] for [2.0, 1.0]"}),
    "fix_same_device_and_data": ("symptom-same", {"48 samples": "samples gone through: 48"}),
    "fix_mean_of_shard_means": ("symptom-shares-run", {"1.871": "1.871", "1.282": "1.282"}),
    "fix_hook_reduces_parameter": (
        "symptom-hook",
        {"gradient of 1": "gradient 1.0 for 2.0", "one of 3": "gradient 3.0 for 2.0"},
    ),
    "fix_no_sync_on_last_batch": ("symptom-no-sync", {"0.125": "differ by 0.125"}),
    "fix_clipping_before_reduction": (
        "symptom-clip",
        {"2.633": "norm 2.633", "0.337 and 5.198": "0.337 5.198", "0.018": "off by 0.018"},
    ),
}


@pytest.mark.parametrize("slug", SHOWN)
def test_the_chapter_shows_the_figures_of_the_symptom(slug):
    cells = {cell["id"]: cell for cell in notebooks.read(NOTEBOOK).cells}
    name, figures = SHOWN[slug]
    shown = "".join(output.get("text", "") for output in cells[name].outputs)
    for said, measured in figures.items():
        assert said in find(slug).symptom
        assert measured in shown


def test_every_bug_to_find_shows_its_symptom():
    assert SHOWN.keys() == {e.slug for e in catalogue.EXERCISES if e.shipped is not None}


# --- the catalogue ------------------------------------------------------------------------------

# The rest of the table is not an exercise's: rows 14, 19, 20, 21, 23, 26, 28 and 29 are shown in
# the text (docs/coverage.md).
MUSEUM = [f"5.{row}" for row in (*range(1, 14), *range(15, 19), 22, 24, 25, 27, 30)]


@pytest.mark.parametrize("row", MUSEUM)
def test_each_known_defect_of_data_parallel_training_is_in_the_catalogue(row):
    source = Path(catalogue.__file__).read_text("utf-8")
    listed = re.findall(r"# museum (.+)", source)
    assert any(row in re.split(r"[ ,;]+", line) for line in listed), f"no mistake is row {row}"
