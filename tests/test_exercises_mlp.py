"""The references of chapter 2 against torch and torchvision, and the figures in its symptoms."""

from __future__ import annotations

import math
import struct

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.data.digits import idx_paths
from course_utils.exercises import find
from course_utils.reference import mlp
from course_utils.training import batches


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- data ---------------------------------------------------------------------------------------


def write_idx(folder, name, count, seed):
    """Random images of 5×3 pixels and labels, under the names that torchvision looks for."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 5, 3), generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    paths = folder / f"{name}-images-idx3-ubyte", folder / f"{name}-labels-idx1-ubyte"
    folder.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">4I", 2051, count, 5, 3)
    paths[0].write_bytes(head + bytes(images.flatten().tolist()))
    paths[1].write_bytes(struct.pack(">2I", 2049, count) + bytes(labels.tolist()))
    return paths


def test_digits_dataset_reads_what_torchvision_reads(tmp_path):
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    raw = tmp_path / "MNIST" / "raw"
    paths = {True: write_idx(raw, "train", 300, 0), False: write_idx(raw, "t10k", 299, 1)}
    for train in (True, False):
        ours = mlp.DigitsDataset(*paths[train])
        theirs = MNIST(tmp_path, train=train, transform=ToTensor(), download=False)
        assert len(ours) == len(theirs)
        for i in range(len(ours)):
            image, label = ours[i]
            assert image.dtype == torch.float32 and torch.equal(image, theirs[i][0])
            assert type(label) is int and label == theirs[i][1]


def test_digits_dataset_reads_the_course_s_own_digits():
    dataset = mlp.DigitsDataset(*idx_paths(train=False, profile="quick"))
    image, label = dataset[0]
    assert (len(dataset), image.shape, image.max().item()) == (360, (1, 8, 8), 1.0)
    assert label in range(10)


def test_digits_dataset_refuses_other_files_in_a_sentence(tmp_path):
    images, labels = write_idx(tmp_path, "a", 4, 0)
    _, five = write_idx(tmp_path, "b", 5, 0)
    with pytest.raises(ValueError, match="expected 2051, 2049"):
        mlp.DigitsDataset(labels, images)
    with pytest.raises(ValueError, match="4 images and 5 labels"):
        mlp.DigitsDataset(images, five)


# --- loss and optimizers ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 40.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (32, 10)])
def test_cross_entropy_is_torch_s(shape, scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, shape[1], shape[:1])
    ours, theirs = mlp.cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    close(ours, theirs)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    close(*(torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, theirs)))


def quadratic_and_more(params):
    """A function of several parameters with gradients of different sizes."""
    return sum((k * p**2 + p.sin() * 10**-k).sum() for k, p in enumerate(params, start=1))


@pytest.mark.parametrize(
    ("ours", "make_theirs", "buffers"),
    [
        (
            lambda k, p, g, v: mlp.sgd_momentum_step(p, g, v, 0.05, 0.9),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            1,
        ),
        (
            lambda k, p, g, m, v: mlp.adamw_step(p, g, m, v, k, 0.05, (0.8, 0.99), 1e-6, 0.1),
            lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
            2,
        ),
    ],
    ids=["sgd_momentum_step", "adamw_step"],
)
def test_twenty_steps_are_torch_s(ours, make_theirs, buffers):
    torch.manual_seed(0)
    start = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    params, their_params = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    state = [[torch.zeros_like(p) for p in start] for _ in range(buffers)]
    theirs = make_theirs(their_params)
    for step in range(1, 21):
        grads = list(torch.autograd.grad(quadratic_and_more(params), params))
        ours(step, params, grads, *state)
        theirs.zero_grad()
        quadratic_and_more(their_params).backward()
        theirs.step()
        for one, other in zip(params, their_params, strict=True):
            close(one, other)
    assert not torch.equal(params[0], start[0])


# --- training and evaluating --------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def test_train_step_is_the_loop_written_out():
    models = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    for step in range(5):
        torch.manual_seed(step)
        batch = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
        torch.manual_seed(100 + step)
        loss = mlp.train_step(models[0], batch, F.cross_entropy, optimizers[0])
        torch.manual_seed(100 + step)
        models[1].zero_grad()
        expected = F.cross_entropy(models[1](batch[0]), batch[1])
        expected.backward()
        optimizers[1].step()
        assert type(loss) is float and loss == pytest.approx(expected.item(), abs=1e-12)
        for one, other in zip(*(m.state_dict().values() for m in models), strict=True):
            close(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_the_whole_set_at_once_and_leaves_no_trace(training):
    model = network().train(training)
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randint(0, 3, (50,))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    results = [mlp.evaluate(model, batches(x, y, size), F.cross_entropy) for size in (7, 16, 50)]
    assert model.training is training
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    expected = F.cross_entropy(model(x), y).item(), (model(x).argmax(1) == y).double().mean().item()
    for result in results:
        assert result == pytest.approx(expected, abs=1e-12)
        assert mlp.mean_accuracy(model, batches(x, y, 7)) == pytest.approx(expected[1])


def test_evaluate_says_when_there_was_nothing():
    with pytest.raises(ValueError, match="held no sample"):
        mlp.evaluate(network(), iter([]), F.cross_entropy)


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_torch_s_distribution(p):
    n, x = 40_000, torch.linspace(1, 2, 40_000, dtype=torch.float64)
    bound = 5 * math.sqrt(n * p * (1 - p))
    for layer in (mlp.Dropout(p), nn.Dropout(p)):  # torch's own passes the same test
        torch.manual_seed(0)
        one, other = layer(x), layer(x)
        assert abs((one == 0).sum().item() - n * p) <= bound
        close(one[one != 0], x[one != 0] / (1 - p))
        both, pair = ((one == 0) & (other == 0)).sum().item(), p * p
        assert abs(both - n * pair) <= 5 * math.sqrt(n * pair * (1 - pair))
        assert torch.equal(layer.eval()(x), x)


def test_dropout_at_the_edges():
    x = torch.randn(5, 4)
    assert torch.equal(mlp.Dropout(0.0)(x), x)
    assert torch.equal(mlp.Dropout(1.0)(x), torch.zeros_like(x))
    with pytest.raises(ValueError, match="probability"):
        mlp.Dropout(1.5)


@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "momentum": 0.3}])
def test_batch_norm_1d_is_torch_s_over_many_batches(options):
    torch.manual_seed(0)
    theirs = nn.BatchNorm1d(4, **options).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = mlp.BatchNorm1d(4, **options).double()
    ours.load_state_dict(theirs.state_dict())
    for step, n in enumerate((5, 8, 3, 2, 16)):
        for layer in (ours, theirs):
            layer.train(step != 3)
        x = (3 * torch.randn(n, 4, dtype=torch.float64) + 1).requires_grad_()
        outputs = ours(x), theirs(x)
        close(*outputs)
        upstream = torch.randn_like(x)
        gradients = [
            torch.autograd.grad(out, (x, layer.weight, layer.bias), upstream)
            for out, layer in zip(outputs, (ours, theirs), strict=True)
        ]
        for one, other in zip(*gradients, strict=True):
            close(one, other, 1e-10)
        for name, values in theirs.state_dict().items():
            close(ours.state_dict()[name], values)
    theirs.load_state_dict(ours.state_dict())


def test_batch_norm_1d_refuses_one_sample_as_torch_does():
    for layer in (mlp.BatchNorm1d(4), nn.BatchNorm1d(4)):
        with pytest.raises(ValueError):
            layer(torch.randn(1, 4))
        assert layer.eval()(torch.randn(1, 4)).shape == (1, 4)


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stop", "best", "best_epoch"),
    [
        (2, 0.0, [3.0, 2.0, 2.5, 1.0, 1.0, 1.0], 6, 1.0, 4),
        (1, 0.0, [3.0, 3.0], 2, 3.0, 1),
        (2, 0.5, [3.0, 2.75, 2.25, 2.0, 1.75], 5, 2.25, 3),
        (2, 0.0, [math.nan, 2.0, math.nan, math.nan], 4, 2.0, 2),
        (3, 0.0, [math.nan] * 3, 3, math.inf, 0),
        (2, 0.0, [4.0, 3.0, 2.0, 1.0], None, 1.0, 4),
    ],
)
def test_early_stopping(patience, min_delta, losses, stop, best, best_epoch):
    stopping = mlp.EarlyStopping(patience, min_delta)
    answers = [stopping.step(loss) for loss in losses]
    assert answers == [epoch == stop for epoch in range(1, len(losses) + 1)]
    assert (stopping.best, stopping.best_epoch) == (best, best_epoch)


def test_early_stopping_needs_patience():
    with pytest.raises(ValueError, match="from 1 on"):
        mlp.EarlyStopping(0)


# --- the figures in the symptoms of the bugs to find --------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """(train images, train labels, test images, test labels) of the quick profile."""
    tensors = []
    for train in (True, False):
        dataset = mlp.DigitsDataset(*idx_paths(train, "quick"))
        tensors += [dataset.images.float() / 255, torch.tensor(dataset.labels)]
    return tensors


def trained(model, x, y, lr, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(epoch)
        for batch in batches(x, y, 32, shuffle=True, generator=generator):
            mlp.train_step(model, batch, F.cross_entropy, optimizer)
    return model


def test_symptom_of_the_missing_activation():
    exercise, results = find("fix_missing_activation"), []
    for net_class in (exercise.shipped, exercise.reference):
        torch.manual_seed(0)
        x = 2 * torch.rand(400, 2) - 1
        y = (x[:, 0] * x[:, 1] > 0).long()
        net = net_class(2, 16, 2)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(300):
            mlp.train_step(net, (x, y), F.cross_entropy, optimizer)
        results.append(mlp.evaluate(net, [(x, y)], F.cross_entropy))
    (loss, accuracy), (_, right) = results
    assert "0.693" in exercise.symptom and loss == pytest.approx(0.693, abs=0.001)
    assert "0.51" in exercise.symptom and accuracy == pytest.approx(0.51, abs=0.01)
    assert right > 0.99


def test_symptom_of_the_mean_of_batch_means(digits):
    exercise, (x, y, test_x, test_y) = find("fix_mean_of_batch_means"), digits
    torch.manual_seed(0)
    model = trained(mlp.MLP(64, 64, 10), x, y, lr=0.1, epochs=3)
    right = exercise.reference(model, batches(test_x, test_y, 64))
    assert f"{round(right * 360)} of 360" in exercise.symptom
    for size in (64, 50, 119):
        told = exercise.shipped(model, batches(test_x, test_y, size))
        assert f"{told:.3f} with batches of {size}" in exercise.symptom.replace("and ", "")
        assert told != pytest.approx(right, abs=1e-3)


def test_symptom_of_the_layers_in_a_list(digits):
    exercise, (x, y, test_x, test_y) = find("fix_layers_in_a_list"), digits
    test_set = batches(test_x.flatten(1), test_y, 64)
    for net_class, percent in ((exercise.shipped, 21), (exercise.reference, 86)):
        torch.manual_seed(0)
        net = net_class(64, 64, 10, depth=3)
        start = net.layers[0].weight.clone()
        trained(net, x.flatten(1), y, lr=0.5, epochs=5)
        assert f"{percent} %" in exercise.symptom
        assert 100 * mlp.mean_accuracy(net, test_set) == pytest.approx(percent, abs=2)
        assert torch.equal(start, net.layers[0].weight) is (net_class is exercise.shipped)
        count = sum(p.numel() for p in net.parameters())
        assert (f"{count} parameters" in exercise.symptom) is (net_class is exercise.shipped)


def test_symptom_of_the_stale_optimizer(digits):
    exercise, (x, y, _, _) = find("fix_stale_optimizer"), digits

    def make_model():
        torch.manual_seed(0)
        return mlp.MLP(64, 64, 10)

    train_set = list(batches(x, y, 32))
    given = make_model, train_set, F.cross_entropy, [0.01, 0.1, 0.5], 3
    assert {f"{loss:.4f}" for curve in exercise.shipped(*given) for loss in curve} == {"2.3036"}
    assert "2.3036" in exercise.symptom and "0.33" in exercise.symptom
    assert exercise.reference(*given)[2][2] == pytest.approx(0.33, abs=0.02)
