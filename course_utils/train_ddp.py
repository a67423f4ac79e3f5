"""Chapter 2's network on the digits, trained by several processes at once: what torchrun starts.

    torchrun --standalone --nproc-per-node 2 -m course_utils.train_ddp --checkpoint run.pt

The same command works with CPUs (gloo) and with GPUs (NCCL, one per process), on one machine and on
several (see launch/). Started again with the same --checkpoint, by torchrun after a failure or by
hand, it goes on where the last checkpoint was written; on CPUs the final weights are then, bit for
bit, those of a run that nothing interrupted. Started without torchrun it is a world of one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import socket
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from course_utils import runtime
from course_utils.data import idx_paths
from course_utils.mine import (  # the learner's own answers, where there are any
    MLP,
    BucketedDDP,
    DigitsDataset,
    Dropout,
    NaiveDDP,
    global_accuracy,
    load_checkpoint,
    logged_loss,
    save_checkpoint,
    shard_indices,
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("train_ddp", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=positive, default=10, help="times through the training data (%(default)s)")
    add("--batch-size", type=positive, default=32, help="samples per process and step")
    add("--hidden", type=positive, default=64, help="width of the network's two hidden layers")
    add("--dropout", type=fraction, default=0.1, help="share of the pixels zeroed (%(default)s)")
    add("--lr", type=fraction, default=1e-2, help="highest learning rate of AdamW (%(default)s)")
    add("--seed", type=int, default=0, help="weights, order of the samples, dropout (%(default)s)")
    add("--wrapper", choices=("torch", "naive", "bucketed"), default="bucketed", help="which DDP")
    add("--checkpoint", type=in_folder, metavar="PATH", help="write it, go on from it")
    add("--every", type=positive, default=20, help="steps from checkpoint to checkpoint")
    add("--result", type=in_folder, metavar="FILE", help="accuracy, digest of the weights: JSON")
    add("--profile", choices=runtime.PROFILES, help="quick: 8x8 digits; full: MNIST")
    add("--backend", choices=("gloo", "nccl"), help="default: nccl with GPUs, else gloo")
    add("--timeout", type=positive, default=60, help="seconds to wait for the others (%(default)s)")
    text = "for tests: in the first attempt, RANK gets a SIGKILL after STEP steps"
    add("--kill", type=kill_point, metavar="RANK:STEP", help=text)
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def in_folder(text: str) -> str:
    folder = os.path.dirname(os.path.abspath(text))
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"there is no folder {folder}: make it first")
    return text


def kill_point(text: str) -> tuple[int, int]:
    try:
        rank, step = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not RANK:STEP, like 1:30") from None
    return rank, step


def join_group(backend: str, timeout: int) -> None:
    """Become a member of the default process group that torchrun's variables describe.

    CPU tensors travel by gloo also where GPU tensors travel by NCCL.
    """
    wait = timedelta(seconds=timeout)
    if "RANK" not in os.environ:  # not started by torchrun
        store, rank, world_size = dist.HashStore(), 0, 1
    else:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
        store.set_timeout(wait)
        store = dist.PrefixStore(attempt_name(store, rank, world_size, timeout), store)
    if os.name == "posix" and os.environ.get("LOCAL_WORLD_SIZE", "1") == str(world_size):
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # all are on this machine
    backend = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)


def attempt_name(store: dist.Store, rank: int, world_size: int, timeout: int) -> str:
    """A name for this attempt, the same on all its ranks, that no earlier attempt has used.

    torchrun keeps one store for all attempts, so that after a restart a rank may read the address
    of a dead process there and connect to nobody. TORCHELASTIC_RESTART_COUNT does not tell attempts
    apart: every machine counts for itself. So each rank writes down a number of its own and all
    look until they see the same numbers, which is then a sight of living ranks only.

    Source: issue 135712 of pytorch/pytorch describes the fault.
    """
    store.set(f"number/{rank}", uuid.uuid4().hex)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        numbers = b"".join(store.get(f"number/{other}") for other in range(world_size))
        seen = hashlib.sha256(numbers).digest()
        store.set(f"seen/{rank}", seen)
        if all(store.get(f"seen/{other}") == seen for other in range(world_size)):
            return f"attempt/{seen.hex()}"
        time.sleep(0.05)
    sys.exit(f"rank {rank} has waited {timeout} seconds for the others to start.")


def choose_device(backend: str | None, profile: str | None) -> tuple[torch.device, str]:
    """(device, backend) of this process: GPU number LOCAL_RANK, or the CPU."""
    if runtime.device(profile).type == "cpu":
        if backend == "nccl":
            sys.exit("NCCL needs a GPU for each process: leave --backend out, or --profile full.")
        return torch.device("cpu"), "gloo"
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if backend != "gloo" and local_rank >= gpus:
        sys.exit(
            f"Process {local_rank} of this machine has no GPU of its own, there are {gpus}: set "
            "--nproc-per-node to that, or share them with --backend gloo."
        )
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)  # what NCCL and a plain .cuda() use
    return device, backend or "nccl"


def load_tensors(train: bool, profile: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x: float32 (n, 1, height, width), y: int64 (n,), both on the CPU."""
    images, labels = zip(*DigitsDataset(*idx_paths(train, profile)), strict=True)
    return torch.stack(images), torch.tensor(labels)


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "torch":
        return nn.parallel.DistributedDataParallel(model)
    return {"naive": NaiveDDP, "bucketed": BucketedDDP}[wrapper](model)


def resume(path: str | None, model: nn.Module, optimizer, scheduler) -> tuple[int, int]:
    """Where to go on, (epoch, steps done in it), with the states loaded that belong to it.

    Exits with a sentence where the checkpoint is not one that these processes can go on from.
    """
    if path is None:
        return 0, 0
    world_size = dist.get_world_size()
    sizes = [None] * world_size
    dist.all_gather_object(sizes, writers(path))
    if None in sizes and any(sizes):
        sys.exit(f"Not all ranks find {path}: put it where all machines see the same files.")
    if sizes[0] not in (None, world_size):
        sys.exit(
            f"{path} was written by {sizes[0]} processes and these are {world_size}: start "
            f"{sizes[0]}, or give another --checkpoint."
        )
    try:
        return load_checkpoint(path, model, optimizer, scheduler)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{path} does not fit the network of this run: {error}")


def writers(path: str) -> int | None:
    """How many processes wrote this checkpoint; None where there is no file."""
    if not os.path.exists(path):
        return None
    try:
        return len(torch.load(path, map_location="cpu", weights_only=True)["rng"])
    except Exception as error:
        sys.exit(f"{path} cannot be read as a checkpoint ({error}): remove it to start anew.")


def one_step(ddp: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer) -> torch.Tensor:
    """One optimizer step with the mean gradient of all ranks; the loss of this rank's samples."""
    optimizer.zero_grad()
    loss = F.cross_entropy(ddp(x), y)
    loss.backward()
    if hasattr(ddp, "finish"):  # BucketedDDP
        ddp.finish()
    optimizer.step()
    return loss


def train(args, ddp, model, optimizer, scheduler, x, y, start: tuple[int, int]) -> None:
    """From `start` to the end of the last epoch, with a checkpoint every args.every steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first_epoch, skip = start
    for epoch in range(first_epoch, args.epochs):
        mine = torch.tensor(shard_indices(len(x), rank, world_size, epoch, args.seed))
        batches = mine.split(args.batch_size)
        for step, batch in enumerate(batches[skip:], start=skip + 1):
            loss = one_step(ddp, x[batch], y[batch], optimizer)
            scheduler.step()
            total = epoch * len(batches) + step
            kill_if_asked(args.kill, rank, total)
            if total % args.every == 0:
                mean = logged_loss(loss)  # every rank takes part; None but on rank 0
                log(f"epoch {epoch + 1}, step {total}: loss {mean or 0:.3f}")
                if args.checkpoint:
                    save_checkpoint(args.checkpoint, model, optimizer, scheduler, epoch, step)
                    reseed_gpu()
        skip = 0


def reseed_gpu() -> None:
    """A checkpoint holds the random state of the CPU; the GPU's begins anew from it."""
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(torch.randint(2**62, ())))


def kill_if_asked(kill: tuple[int, int] | None, rank: int, step: int) -> None:
    """The fault to recover from: SIGKILL cannot be caught, so nothing is tidied up or saved."""
    if kill == (rank, step) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def log(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: the same for the same bits in the same order."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def report(args, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Accuracy over all ranks' parts of the test data, and a digest of the weights."""
    accuracy = global_accuracy(model, x, y, 256)
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, weights_digest(model))
    if len(set(digests)) > 1:
        sys.exit(f"The ranks have ended with different weights: {digests}.")
    log(f"accuracy {accuracy:.4f}, weights {digests[0][:12]}")
    if args.result and dist.get_rank() == 0:
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        result = {"accuracy": accuracy, "weights": digests[0], "restarts": restarts}
        with open(args.result, "w") as file:
            json.dump(result | {"world_size": len(digests)}, file)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device, backend = choose_device(args.backend, args.profile)
    x, y = (tensor.to(device) for tensor in load_tensors(True, args.profile))
    join_group(backend, args.timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed + rank)  # dropout differs from rank to rank, and so do the weights
    model = nn.Sequential(Dropout(args.dropout), MLP(x[0].numel(), args.hidden, 10)).to(device)
    ddp = wrap(model, args.wrapper)  # from here on the weights are rank 0's everywhere
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    steps = math.ceil(math.ceil(len(x) / world_size) / args.batch_size)  # of an epoch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * args.epochs)
    start = resume(args.checkpoint, model, optimizer, scheduler)
    reseed_gpu()
    log(f"{world_size} processes on {device.type}, {start[0] * steps + start[1]} steps done")
    train(args, ddp, model, optimizer, scheduler, x, y, start)
    report(args, model, *(t.to(device) for t in load_tensors(False, args.profile)))
    dist.destroy_process_group()


def run() -> None:
    """main(), with one sentence where another rank is gone, and an end that cannot go wrong."""
    try:
        main()
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        reason = str(error).split(" This is typically")[0]
        sys.exit(f"rank {os.environ.get('RANK', 0)} has lost the others: {reason}")
    sys.stdout.flush()
    # The group is destroyed, but gloo's threads run on, and when Python shuts down under them one
    # may abort a process that has done all its work (seen in 1 of 24 runs, torch 2.15).
    os._exit(0)


if __name__ == "__main__":
    run()
