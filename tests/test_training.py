"""fit, History and batches: what is counted, in which order, and what is told."""

import math

import pytest
import torch
from torch import nn

from course_utils import training
from course_utils.training import History, batches, fit


def test_batches_go_through_every_sample_once_in_a_new_order_each_time():
    x, y = torch.arange(10), torch.arange(10) * 10
    loader = batches(x, y, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    passes = [list(loader) for _ in range(3)]
    for one in passes:
        assert [len(rows) for rows, _ in one] == [4, 4, 2] and len(loader) == 3
        assert sorted(torch.cat([rows for rows, _ in one]).tolist()) == list(range(10))
        assert all(torch.equal(labels, rows * 10) for rows, labels in one)
    orders = [torch.cat([rows for rows, _ in one]).tolist() for one in passes]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    again = batches(x, y, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert torch.cat([rows for rows, _ in again]).tolist() == orders[0]


def test_batches_in_order_without_shuffle():
    x = torch.randn(5, 2, 3)
    got = list(batches(x, torch.arange(5), 5))
    assert len(got) == 1 and torch.equal(got[0][0], x)
    assert [labels.tolist() for _, labels in batches(x, torch.arange(5), 2)] == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_batches_leave_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    list(batches(torch.zeros(9), torch.zeros(9), 2, True, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_say_what_does_not_fit():
    with pytest.raises(ValueError, match="x has 3 samples and y has 2"):
        batches(torch.zeros(3), torch.zeros(2), 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(torch.zeros(3), torch.zeros(3), 0)


def step(model, batch, loss_function, optimizer):
    x, y = batch
    optimizer.zero_grad()
    loss = loss_function(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def mean_squares(model, loader, loss_function):
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        return loss_function(model(x), y).item(), 0.5


@pytest.fixture
def line():
    """A line to learn, y = 3x - 1, with its network, optimizer and loaders."""
    torch.manual_seed(0)
    x = torch.randn(90, 1)
    loader = batches(x, 3 * x - 1, 20, shuffle=True)
    model = nn.Linear(1, 1)
    return model, loader, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)


def test_fit_trains_and_measures(line):
    model, loader, loss, optimizer = line
    history = fit(
        model, loader, loss, optimizer, 12, train_step=step, evaluate=mean_squares,
        validation=loader,
    )  # fmt: skip
    assert history.epochs == 12 == len(history.validation_loss) == len(history.seconds)
    assert history.validation_loss[-1] < 1e-4 < history.validation_loss[0]
    assert torch.allclose(model.weight, torch.tensor([[3.0]]), atol=0.01)
    assert history.validation_accuracy == [0.5] * 12
    assert min(history.seconds) > 0


def test_fit_weighs_batches_by_their_samples(line):
    model, _, loss, optimizer = line
    loader = batches(torch.zeros(5, 1), torch.zeros(5, 1), 2)  # batches of 2, 2 and 1
    losses = iter([1.0, 2.0, 6.0])
    history = fit(model, loader, loss, optimizer, 1, train_step=lambda *_: next(losses))
    assert history.train_loss == [(2 * 1 + 2 * 2 + 1 * 6) / 5]  # 2.4; the mean of means is 3
    assert history.validation_loss == []


def test_fit_calls_things_in_order_and_in_training_mode(line):
    model, _, loss, optimizer = line
    calls = []

    class Told:
        def __init__(self, name, answers=()):
            self.name, self.answers = name, iter(answers)

        def step(self, *arguments):
            calls.append((self.name, *arguments))
            return next(self.answers, None)

    def evaluate(model, loader, loss_function):
        calls.append(("evaluate", loader, loss_function))
        model.eval()  # as a careless evaluation leaves it
        return torch.tensor(float(len(calls))), 0.25

    def train_step(model, batch, loss_function, optimizer):
        calls.append(("train", model.training, loss_function, optimizer))
        return 0.0

    loader, validation = batches(torch.zeros(2, 1), torch.zeros(2, 1), 2), object()
    history = fit(
        model, loader, loss, optimizer, 5, train_step=train_step, evaluate=evaluate,
        validation=validation, scheduler=Told("scheduler"),
        early_stopping=Told("stop", [False, True]),
    )  # fmt: skip
    epoch = [("train", True, loss, optimizer), ("scheduler",), ("evaluate", validation, loss)]
    assert calls == [*epoch, ("stop", 3.0), *epoch, ("stop", 7.0)]
    assert history.validation_loss == [3.0, 7.0] and history.epochs == 2
    assert all(type(value) is float for value in history.validation_loss)
    assert model.training


@pytest.mark.parametrize(("keep_best", "epoch"), [(False, 4), (True, 2)])
def test_fit_can_keep_the_best_weights(line, keep_best, epoch):
    model, loader, loss, optimizer = line
    measured, weights = iter([(math.nan, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, 0.0)]), {}

    def evaluate(model, *_):
        weights[len(weights) + 1] = model.weight.item()
        return next(measured)

    fit(model, loader, loss, optimizer, 4, train_step=step, evaluate=evaluate, validation=[0],
        keep_best=keep_best)  # fmt: skip
    assert len(set(weights.values())) == 4
    assert model.weight.item() == weights[epoch]


def test_fit_says_what_is_missing(line):
    model, loader, loss, optimizer = line
    with pytest.raises(ValueError, match="train_batches gave no batch in epoch 2: .*generator"):
        fit(model, iter(list(loader)), loss, optimizer, 3, train_step=step)
    with pytest.raises(ValueError, match="evaluate and validation together"):
        fit(model, loader, loss, optimizer, 1, train_step=step, validation=loader)
    with pytest.raises(ValueError, match="give fit validation too"):
        fit(model, loader, loss, optimizer, 1, train_step=step, early_stopping=object())


def test_the_best_epoch():
    history = History(
        train_loss=[3.0, 2.0, 1.0],
        validation_loss=[math.nan, 0.5, 0.5],
        validation_accuracy=[0.9, 0.7, 0.8],
    )
    second = {"epoch": 2, "train_loss": 2.0, "validation_loss": 0.5, "validation_accuracy": 0.7}
    assert history.best() == second
    assert history.best("validation_accuracy")["epoch"] == 1
    assert history.best("train_loss")["epoch"] == 3
    assert History(train_loss=[1.0, 0.5, 0.7]).best() == {"epoch": 2, "train_loss": 0.5}
    with pytest.raises(ValueError, match="no best epoch by train_loss"):
        History(train_loss=[math.nan]).best()


@pytest.fixture
def clock(monkeypatch):
    """A clock that each look moves on by `tick` seconds, and a record of the bars shown."""

    class Bar:
        shown = []

        def __init__(self, total, initial, **options):
            self.total, self.n, self.options, self.open = total, initial, options, True
            Bar.shown.append(self)

        def set_description_str(self, text, refresh):
            self.text = text

        def update(self):
            self.n += 1

        def close(self):
            self.open = False

    class Clock:
        now, tick, bars = 0.0, 0.0, Bar.shown

        def look(self):
            self.now += self.tick
            return self.now

    clock = Clock()
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(training.time, "perf_counter", clock.look)
    monkeypatch.setattr(training, "_somebody_watches", lambda: True)
    return clock


def test_no_bar_in_the_first_two_seconds(line, clock):
    clock.tick = 0.01
    fit(*line, 4, train_step=step)  # 20 batches
    assert clock.bars == []


def test_a_bar_after_two_seconds_that_leaves_nothing_behind(line, clock):
    clock.tick = 0.3
    fit(*line, 4, train_step=step)
    (bar,) = clock.bars
    assert bar.total == bar.n == 20 and not bar.open
    assert bar.options["leave"] is False and bar.text == "epoch 4/4"
    fit(*line, 4, train_step=step, progress=False)
    assert len(clock.bars) == 1


def test_an_early_end_is_not_shown_as_a_failure(line, clock):
    clock.tick = 1

    class AtOnce:
        def step(self, *_):
            return True

    fit(*line, 4, train_step=step, evaluate=mean_squares, validation=line[1],
        early_stopping=AtOnce())  # fmt: skip
    (bar,) = clock.bars
    assert bar.total == bar.n == 5, "tqdm paints a bar red that closes before its total"


@pytest.mark.parametrize(
    ("variables", "watched"),
    [({}, True), ({"COURSE_PROGRESS": "0"}, False), ({"CI": "true"}, False)],
)
def test_who_watches(monkeypatch, variables, watched):
    for name in ("COURSE_PROGRESS", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training.sys, "stderr", type("Terminal", (), {"isatty": lambda _: True})())
    assert training._somebody_watches() is watched


def test_nobody_watches_a_pipe(monkeypatch):
    for name in ("COURSE_PROGRESS", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(training.sys, "stderr", type("Pipe", (), {"isatty": lambda _: False})())
    assert training._somebody_watches() is False


def test_length_grouped_batches_hold_every_row_once_and_pad_little():
    lengths = [8 + (37 * row) % 50 for row in range(203)]
    generator = torch.Generator().manual_seed(0)
    first, second = (training.length_grouped(lengths, 8, generator, pool=5) for _ in range(2))
    for epoch in (first, second):
        assert sorted(row for rows in epoch for row in rows) == list(range(203))
        assert sorted(len(rows) for rows in epoch) == [3] + [8] * 25
    assert first != second
    assert [lengths[rows[0]] for rows in first] != sorted(lengths[rows[0]] for rows in first)

    def padded(epoch):
        return sum(len(rows) * max(lengths[row] for row in rows) for rows in epoch)

    plain = [list(range(start, min(start + 8, 203))) for start in range(0, 203, 8)]
    assert sum(lengths) < padded(first) < 0.85 * padded(plain)


def test_progress_hands_on_every_item():
    assert list(training.progress([3, 1, 2], "counting")) == [3, 1, 2]
    assert list(training.progress([])) == []
