"""Training a network over epochs, with a History to look at afterwards.

The step and the evaluation are arguments: chapter 2 derives both, and a notebook hands in its own.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class History:
    """What happened in each epoch; a list that was not asked for stays empty.

    `train_loss` is the mean over the samples of the losses measured while the network changed, so
    it lags behind `validation_loss`, which is measured at the end of the epoch. `seconds` is the
    time of the training part.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def epochs(self) -> int:
        """The number of epochs that were run."""
        return len(self.train_loss)

    def best(self, by: str | None = None) -> dict[str, float]:
        """The figures of the best epoch, with its number from 1 on as "epoch".

        `by` is the list that decides, of equal epochs the first: the validation loss where there is
        one, else the training loss. Accuracy is best where highest, a loss where lowest.
        Raises ValueError where that list is empty or holds only nan.
        """
        by = by or ("validation_loss" if self.validation_loss else "train_loss")
        sign = -1 if by.endswith("accuracy") else 1
        values = [(sign * v, i) for i, v in enumerate(getattr(self, by)) if not math.isnan(v)]
        if not values:
            raise ValueError(f"There is no best epoch by {by}: it has no value that is a number.")
        _, i = min(values)
        names = ("train_loss", "validation_loss", "validation_accuracy")
        figures = {name: getattr(self, name)[i] for name in names if getattr(self, name)}
        return {"epoch": i + 1, **figures}


class Batches:
    """Mini-batches of tensors in memory; see `batches`."""

    def __init__(self, x, y, batch_size: int, shuffle: bool, generator: torch.Generator | None):
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y has {len(y)}: they must be as many.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give a whole number from 1 on.")
        self.x, self.y, self.batch_size = x, y, batch_size
        self.shuffle, self.generator = shuffle, generator

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n, size = len(self.x), self.batch_size
        if not self.shuffle:
            yield from zip(self.x.split(size), self.y.split(size), strict=True)
            return
        order = torch.randperm(n, generator=self.generator).to(self.x.device)
        for rows in order.split(size):
            yield self.x[rows], self.y[rows]


def batches(
    x: torch.Tensor,
    y: torch.Tensor,
    batch_size: int,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> Batches:
    """Go through (x, y) in mini-batches, by indexing whole tensors instead of single samples.

    x is (n, ...), y is (n, ...). Each `for` is one pass over all samples, in a new order drawn from
    `generator` (on the CPU) when `shuffle`; the last batch may be smaller. `len` counts batches.
    """
    return Batches(x, y, batch_size, shuffle, generator)


def length_grouped(
    lengths: Sequence[int],
    batch_size: int,
    generator: torch.Generator | None = None,
    pool: int = 16,
) -> list[list[int]]:
    """Rows for batches in which the lengths are alike, so that little padding is needed.

    The rows are shuffled, cut into pools of `pool` batches, sorted by length within each pool and
    cut into batches, whose order is shuffled: every row stands in one batch, as in any epoch, and
    what meets what still changes from call to call. One batch may be smaller.
    Source: the option group_by_length of transformers.TrainingArguments.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = pool * batch_size
    rows: list[list[int]] = []
    for start in range(0, len(order), size):
        alike = sorted(order[start : start + size], key=lambda row: lengths[row])
        rows += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def progress(items: Sequence, what: str = "") -> Iterator:
    """Go through a sequence with a bar that appears after two seconds and leaves nothing behind."""
    with _Progress(1, items, True, what) as bar:
        for item in items:
            yield item
            bar.advance(1)


def fit(
    model: nn.Module,
    train_batches: Iterable,
    loss_function: Callable,
    optimizer: Any,
    epochs: int,
    *,
    train_step: Callable,
    evaluate: Callable | None = None,
    validation: Iterable | None = None,
    scheduler: Any = None,
    early_stopping: Any = None,
    keep_best: bool = False,
    progress: bool = True,
) -> History:
    """Train for at most `epochs` passes over `train_batches`, which must allow several passes.

    train_step(model, batch, loss_function, optimizer) -> mean loss of the batch, a number
    evaluate(model, batches, loss_function) -> (mean loss per sample, accuracy), on `validation`
    scheduler.step() is called after every epoch;
    early_stopping.step(validation loss) too, and training ends when it returns True.
    With `keep_best` the model ends with the weights it had in the epoch of the least validation
    loss; else with those of the last epoch.

    The model is in training mode at the start of every epoch and at the end. Epochs' training
    losses are weighted by the number of samples, `len(batch[0])`. Raises ValueError, in a sentence,
    where an argument is missing or an epoch has no batch.
    """
    if (evaluate is None) != (validation is None):
        raise ValueError("fit needs evaluate and validation together, or neither of them.")
    if (early_stopping is not None or keep_best) and validation is None:
        raise ValueError(
            "early_stopping and keep_best look at the validation loss: give fit validation too."
        )
    history, least, kept = History(), math.inf, None
    with _Progress(epochs, train_batches, progress) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            start, total, samples = time.perf_counter(), 0.0, 0
            for batch in train_batches:
                loss = train_step(model, batch, loss_function, optimizer)
                total += float(loss) * len(batch[0])
                samples += len(batch[0])
                bar.advance(epoch)
            if not samples:
                raise ValueError(
                    f"train_batches gave no batch in epoch {epoch}: pass something that can be "
                    "gone through again, as batches(...), a DataLoader or a list, not a generator."
                )
            history.train_loss.append(total / samples)
            history.seconds.append(time.perf_counter() - start)
            if scheduler is not None:
                scheduler.step()
            if validation is not None:
                loss, accuracy = evaluate(model, validation, loss_function)
                history.validation_loss.append(float(loss))
                history.validation_accuracy.append(float(accuracy))
                if keep_best and loss < least:
                    least, kept = float(loss), copy.deepcopy(model.state_dict())
                if early_stopping is not None and early_stopping.step(float(loss)):
                    break
    if kept is not None:
        model.load_state_dict(kept)
    model.train()
    return history


class _Progress:
    """A bar over all batches that appears after two seconds and leaves nothing behind."""

    def __init__(self, epochs: int, train_batches: Iterable, wanted: bool, what: str = ""):
        self.what = what
        self.total = epochs * len(train_batches) if hasattr(train_batches, "__len__") else None
        self.epochs, self.done, self.bar = epochs, 0, None
        self.appears = time.perf_counter() + 2 if wanted and _somebody_watches() else math.inf

    def advance(self, epoch: int) -> None:
        self.done += 1
        if self.bar is None and time.perf_counter() > self.appears:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, initial=self.done, unit="batch", leave=False)
        elif self.bar is not None:
            told = self.what or f"epoch {epoch}/{self.epochs}"
            self.bar.set_description_str(told, refresh=False)
            self.bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.total = self.bar.n  # an early stop is an end, not a failure in red
            self.bar.close()


def _somebody_watches() -> bool:
    """True in a notebook or a terminal, unless COURSE_PROGRESS=0 or CI says that nobody does."""
    if os.environ.get("COURSE_PROGRESS") == "0" or os.environ.get("CI"):
        return False
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())
