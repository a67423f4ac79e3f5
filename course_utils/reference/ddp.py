"""Worked answers of chapter 5: data parallel training, built from collectives.

Every function runs on each of the `world_size` processes of the default group, which share nothing:
what one of them knows of the others, it was sent. All of it also works in a world of one.
"""

from __future__ import annotations

import math
import os
import random
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def shard_indices(n, rank, world_size, epoch, seed):
    """The samples that this rank goes through in one epoch: list of int.

    All ranks shuffle alike: torch.randperm(n) of a generator of its own, seeded with seed + epoch.
    The order is extended from its own beginning, more than once if need be, to a multiple of
    world_size, so that all ranks take as many steps; then every world_size-th sample, from place
    `rank` on. n ≥ 1.

    Source: torch.utils.data.distributed.DistributedSampler, shuffle=True, drop_last=False.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(n, generator=generator).tolist()
    total = math.ceil(n / world_size) * world_size
    order = (order * math.ceil(total / n))[:total]
    return order[rank:total:world_size]


def all_reduce_mean(tensor):
    """The mean of the ranks' tensors, elementwise, the same on every rank: a new tensor.

    tensor: floating point, of one shape and dtype on all ranks; it is left as it is.
    """
    total = tensor.clone()
    dist.all_reduce(total)  # in place: the sum over the ranks
    return total / dist.get_world_size()


def ring_all_reduce(tensor):
    """The sum of the ranks' tensors, by sending to the right neighbour and receiving from the left.

    tensor: any shape, the same on all ranks; left as it is. Rank r's right neighbour is
    (r + 1) % world_size. The flattened tensor is cut into world_size chunks, some of which may be
    shorter by one or empty. First every chunk collects its sum on the way round the ring, then the
    sums go round once more: in 2 (world_size - 1) steps a rank sends 2 (world_size - 1) chunks.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009), section 3.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    total = tensor.detach().clone().flatten()
    chunks = total.tensor_split(world_size)  # views: writing to one writes to total
    for step in range(2 * (world_size - 1)):
        outgoing = chunks[(rank - step) % world_size]
        mine = chunks[(rank - step - 1) % world_size]
        incoming = torch.empty_like(mine)
        sending = dist.isend(outgoing, right)  # a blocking send on all ranks at once never ends
        dist.recv(incoming, left)
        sending.wait()
        if step < world_size - 1:
            mine += incoming  # one more rank's share
        else:
            mine.copy_(incoming)  # complete
    return total.reshape(tensor.shape)


def logged_loss(loss):
    """The mean of the ranks' losses: a float on rank 0, which writes the log, None elsewhere.

    loss: 0-dim tensor; it is left as it is.
    """
    total = loss.detach().clone()
    dist.all_reduce(total)  # every rank takes part, also those that do not need the sum
    if dist.get_rank() == 0:
        return total.item() / dist.get_world_size()
    return None


def broadcast_parameters(module, src=0):
    """Give every rank the parameters and buffers that rank `src` has, in place.

    Parameters stay the same objects, with the same requires_grad.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), src)  # shares its memory, and is no leaf that needs a graph


def average_gradients(module):
    """Replace the gradient of each parameter by its mean over the ranks, in place.

    Where a parameter that requires a gradient has none (.grad is None), this rank adds zeros, since
    another rank may have one; it has a gradient afterwards. Frozen parameters are left alone. The
    other ranks call it too, with parameters in the same order.
    """
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def average_in_one_message(gradients):
    """Replace each tensor of a list by its mean over the ranks, in place, with one all_reduce.

    gradients: tensors of any shapes and one dtype, in the same order on all ranks.
    """
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def prepare_rank(dataset, batch_size, rank, local_rank, world_size, device_type="cuda"):
    """(device, loader): where this rank computes, and its own part of the data in batches.

    rank counts the processes of all machines, local_rank those of this machine. The device is
    number local_rank of its type, or the CPU where device_type is "cpu". The loader shuffles
    through a DistributedSampler (seed 0), whose set_epoch the training loop calls.
    """
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, local_rank)
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=world_size, rank=rank)
    return device, torch.utils.data.DataLoader(dataset, batch_size, sampler=sampler)


def shard_loss(logits, targets):
    """A loss whose average over the ranks is the mean cross-entropy over all ranks' samples.

    logits: (samples of this rank, classes), targets: int64 (samples of this rank,); ranks may have
    different numbers of samples, some of them none. 0-dim tensor, differentiable.
    """
    count = torch.tensor(len(targets), device=logits.device)
    dist.all_reduce(count)  # how many samples there are in all
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total * dist.get_world_size() / count.item()


class NaiveDDP(nn.Module):
    """`module` on every rank, with gradients that are averages over the ranks after backward().

    At the start all ranks get rank 0's parameters and buffers. During backward() a hook on each
    parameter that requires a gradient averages it over the ranks as soon as it is there, one
    all_reduce per parameter. All ranks use the same parameters. `.module` is the module itself.

    Source: Li et al., PyTorch Distributed (2020), section 3.2.1, the naive solution.
    """

    def __init__(self, module):
        super().__init__()
        self.module = module
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    @staticmethod
    def _average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def hook_gradients(module):
    """From now on, backward() leaves the mean over the ranks in the gradient of each parameter.

    Parameters that do not require a gradient get no hook; the parameters themselves stay as they
    are. Returns nothing.
    """

    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


class BucketedDDP(nn.Module):
    """`module` on every rank; gradients travel in buckets while backward() still computes.

    At the start all ranks get rank 0's parameters and buffers. The parameters that require a
    gradient, all of one dtype, are put into buckets in reverse order (that is about the order in
    which backward finishes them), each bucket filled as long as it stays within `bucket_bytes`; a
    larger parameter has one of its own. A bucket whose gradients are all there, and before which
    all others have been sent, is sent by one asynchronous all_reduce. `finish()`, called after
    backward(), sends the rest (a parameter without a gradient counts as zeros), waits, and leaves
    the means in `.grad`. Inside `no_sync()` backward() only accumulates, and `finish()` is not
    called. `.module` is the module itself.

    Source: Li et al., PyTorch Distributed (2020), sections 3.2.2, 3.2.3 and 3.2.4.
    """

    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module, self.buckets, self.synchronise = module, [], True
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0)
        room = 0
        for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
            size = parameter.numel() * parameter.element_size()
            if size > room or not self.buckets:
                self.buckets.append([])
                room = bucket_bytes
            self.buckets[-1].append(parameter)
            room -= size
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._begin()

    def _begin(self):
        self.missing = [{id(parameter) for parameter in bucket} for bucket in self.buckets]
        self.sent = []  # (flat gradients, work) of the buckets so far

    def _arrived(self, parameter):
        if self.synchronise:
            for missing in self.missing:
                missing.discard(id(parameter))
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self._send()

    def _send(self):
        bucket = self.buckets[len(self.sent)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self):
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            flat /= dist.get_world_size()
            pieces = flat.split([parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
        self._begin()

    @contextmanager
    def no_sync(self):
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def accumulate_shards(ddp, micro_batches, loss_function):
    """Leave in the parameters' .grad the mean over this step's micro-batches and over the ranks.

    ddp: a DistributedDataParallel. micro_batches: a list of (x, y), as many on every rank and of
    equal sizes. loss_function(logits, y) is a mean over its samples. One micro-batch after another
    goes forward and backward; the gradients travel once, in the backward pass of the last.
    Gradients that were there before, the same on all ranks, are not zeroed: this adds to them.
    """
    *first, (x, y) = micro_batches
    with ddp.no_sync():
        for early_x, early_y in first:
            (loss_function(ddp(early_x), early_y) / len(micro_batches)).backward()
    (loss_function(ddp(x), y) / len(micro_batches)).backward()


def clipped_step(module, loss, optimizer, max_norm):
    """One step with gradients averaged over the ranks, whose norm is clipped to max_norm.

    loss: this rank's, 0-dim, left as it is. Zeroes the gradients first, computes them, averages
    them over the ranks, clips the norm of all of them together as torch.nn.utils.clip_grad_norm_
    does, and takes the optimizer's step. Returns the norm before clipping, a float, the same on
    every rank.
    """
    optimizer.zero_grad()
    loss.backward()
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    optimizer.step()
    return norm.item()


@torch.no_grad()
def global_accuracy(model, x, y, batch_size):
    """The share of all samples that the model gets right, a float, the same on every rank.

    x: (n, ...), y: int64 (n,), whole on every rank. Each sample is evaluated on exactly one rank,
    in batches of at most batch_size; no rank has more than ceil(n / world_size) of them, and some
    may have none. The model, which returns logits, is in eval mode meanwhile, and afterwards in
    the mode that it was in; it is called without a graph. n ≥ 1.
    """
    was_training = model.training
    model.eval()
    mine = slice(dist.get_rank(), None, dist.get_world_size())  # not padded: nothing counts twice
    correct = torch.zeros((), dtype=torch.int64, device=y.device)
    for inputs, targets in zip(x[mine].split(batch_size), y[mine].split(batch_size), strict=True):
        if len(targets):
            correct += (model(inputs).argmax(dim=-1) == targets).sum()
    model.train(was_training)
    dist.all_reduce(correct)
    return correct.item() / len(y)


def save_checkpoint(path, model, optimizer, scheduler, epoch, step):
    """Write all that training needs to go on as if nothing had happened; every rank calls it.

    One file, by torch.save: a dict with the state_dicts under "model", "optimizer", "scheduler",
    the numbers "epoch" and "step" (where to go on), and under "rng" a list with one entry a rank:
    {"torch": torch.get_rng_state(), "python": random.getstate()}. Rank 0 writes it, to another
    name in the same folder first, and renames it when it is complete, so that under `path` there is
    always a whole checkpoint, old or new. No rank returns before the file is in place.
    """
    own = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    if dist.get_rank() == 0:
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": states,
            "epoch": epoch,
            "step": step,
        }
        partial = f"{path}.partial"
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before the name says so
        os.replace(partial, path)
    dist.barrier()


def load_checkpoint(path, model, optimizer, scheduler):
    """Continue from what `save_checkpoint` wrote: (epoch, step); (0, 0) where there is no file.

    Every rank calls it and reads the file, onto the CPU. The model, optimizer and scheduler get
    their states, torch and Python's `random` the random states of this rank. The file stays; one
    that cannot be read is an error.
    """
    if not os.path.exists(path):
        return 0, 0
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    rng = checkpoint["rng"][dist.get_rank()]
    torch.set_rng_state(rng["torch"])
    random.setstate(rng["python"])
    return checkpoint["epoch"], checkpoint["step"]


class ShardedAdamW:
    """AdamW whose state is spread over the ranks: each keeps that of its own parameters only.

    params: an iterable of the same parameters in the same order on all ranks, with gradients that
    are the same on all ranks when step() is called. Rank r updates the parameters number r,
    r + world_size, … (there may be none) by torch.optim.AdamW, and sends them to the others. A
    parameter without a gradient stays as it is, and step() leaves all gradients as they are.
    zero_grad() sets them to None.

    Source: Rajbhandari et al., ZeRO (2020), section 5.1.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.params = list(params)
        own = self.params[dist.get_rank() :: dist.get_world_size()]
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(own, **settings) if own else None

    def step(self):
        if self.optimizer is not None:
            self.optimizer.step()
        for number, parameter in enumerate(self.params):
            dist.broadcast(parameter.detach(), number % dist.get_world_size())

    def zero_grad(self):
        for parameter in self.params:
            parameter.grad = None
