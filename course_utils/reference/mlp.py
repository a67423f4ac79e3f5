"""Worked answers of chapter 2: a network that reads handwritten digits, and how it is trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class DigitsDataset(torch.utils.data.Dataset):
    """Images and labels from a pair of IDX files, unpacked, as MNIST comes in.

    Item i is (image, label): image float32 (1, height, width) from 0 to 1, handed through
    `transform` where there is one; label an int. An IDX file is a header of big-endian 32-bit
    integers (a magic number, then the size of each axis) and then one byte per value, the last axis
    fastest. Images: magic number 2051, count, height, width. Labels: magic number 2049, count.
    Raises ValueError where a file is of the other kind or the two counts differ.

    Source: the file formats at http://yann.lecun.com/exdb/mnist/.
    """

    def __init__(self, images_path, labels_path, transform=None):
        with open(images_path, "rb") as file:
            magic, count, height, width = (int.from_bytes(file.read(4), "big") for _ in range(4))
            pixels = bytearray(file.read())
        with open(labels_path, "rb") as file:
            labels_magic, labels_count = (int.from_bytes(file.read(4), "big") for _ in range(2))
            self.labels = list(file.read())  # the items of a bytes object are ints
        if (magic, labels_magic) != (2051, 2049):
            raise ValueError(f"magic numbers {magic}, {labels_magic}: expected 2051, 2049.")
        if count != labels_count:
            raise ValueError(f"{count} images and {labels_count} labels: one label per image.")
        pixels = torch.frombuffer(pixels, dtype=torch.uint8)  # a quarter of what float32 takes
        self.images = pixels.reshape(count, 1, height, width)
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index].float() / 255  # (1, height, width)
        if self.transform is not None:
            image = self.transform(image)
        return image, self.labels[index]


class MLP(nn.Module):
    """Three linear layers with ReLU between them: a multi-layer perceptron.

    x: (batch, ...) with in_features values per sample → logits (batch, num_classes).
    """

    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.hidden1 = nn.Linear(in_features, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = x.flatten(start_dim=1)  # (batch, in_features)
        x = torch.relu(self.hidden1(x))  # (batch, hidden)
        x = torch.relu(self.hidden2(x))
        return self.output(x)  # (batch, num_classes): logits, so no activation


def cross_entropy(logits, targets):
    """Mean over the batch of −log softmax(logits)[target]; a 0-dim tensor.

    logits: (batch, num_classes), of any size; targets: int64 (batch,).
    """
    # a row may be shifted without changing its softmax: with its largest at 0, exp stays finite
    shifted = logits - logits.max(dim=1, keepdim=True).values
    log_probabilities = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    chosen = log_probabilities.gather(1, targets.unsqueeze(1))  # (batch, 1)
    return -chosen.mean()


def sgd_momentum_step(params, grads, velocities, lr, momentum):
    """One step of gradient descent with momentum, in place: v ← μv + g, then p ← p − lr·v.

    params, grads, velocities: lists of tensors of pairwise equal shape; params may require a
    gradient; velocities start at zero. Source: the documentation of torch.optim.SGD, whose
    convention keeps lr out of the velocity.
    """
    with torch.no_grad():
        for p, g, v in zip(params, grads, velocities, strict=True):
            v.mul_(momentum).add_(g)
            p.sub_(lr * v)


def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
    """One step of AdamW, in place on params, exp_avgs (of g) and exp_avg_sqs (of g²).

    Lists of tensors of pairwise equal shape; params may require a gradient; step counts from 1;
    betas is (beta1, beta2). Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization
    (2019), Algorithm 2, with the learning rate multiplying the decay as in torch.optim.AdamW.
    """
    beta1, beta2 = betas
    with torch.no_grad():
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            p.mul_(1 - lr * weight_decay)  # decoupled: the decay never enters m and v
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            m_hat = m / (1 - beta1**step)  # m and v start at zero: undo the pull towards it
            v_hat = v / (1 - beta2**step)
            p.sub_(lr * m_hat / (v_hat.sqrt() + eps))


def train_step(model, batch, loss_function, optimizer):
    """One optimizer step on one batch; returns the loss before the step as a float.

    batch: (inputs, targets); loss_function(logits, targets) → 0-dim tensor. Leaves the model in
    training mode.
    """
    inputs, targets = batch
    model.train()
    optimizer.zero_grad()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluate(model, batches, loss_function):
    """(mean loss per sample, accuracy) of the model in evaluation mode, as floats.

    batches: any iterable of (inputs, targets); loss_function(logits, targets) → mean over its
    batch. The model is left in the mode it was in. Raises ValueError where there is no sample.
    """
    was_training = model.training
    model.eval()
    total_loss, correct, samples = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            logits = model(inputs)  # (batch, num_classes)
            total_loss += loss_function(logits, targets).item() * len(targets)
            correct += (logits.argmax(dim=1) == targets).sum().item()
            samples += len(targets)
    model.train(was_training)
    if samples == 0:
        raise ValueError("batches held no sample: was it a generator that had been used up?")
    return total_loss / samples, correct / samples


class Dropout(nn.Module):
    """In training, zeroes each value with probability p and scales the others by 1 / (1 − p).

    Draws anew at every call; the identity in evaluation mode. p = 1 zeroes everything.
    Source: Srivastava et al., Dropout (2014), section 10, in the form that scales while training.
    """

    def __init__(self, p=0.5):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}: it is a probability, from 0 to 1.")
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand_like(x) >= self.p  # True with probability 1 − p
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return x * keep * scale


class BatchNorm1d(nn.Module):
    """Normalises each feature over the batch, then scales by `weight` and shifts by `bias`.

    x: (batch, num_features). In training, with the batch's mean and biased variance, which also
    move the buffers: running ← (1 − momentum)·running + momentum·batch, with the unbiased variance.
    In evaluation mode, with the running statistics. Raises ValueError for one sample in training.
    Source: Ioffe and Szegedy, Batch Normalization (2015), Algorithm 1; torch.nn.BatchNorm1d, whose
    state_dict has the same keys.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        if self.training:
            if len(x) < 2:
                raise ValueError("a batch of one sample has no variance: give two or more.")
            mean, var = x.mean(dim=0), x.var(dim=0, correction=0)  # (num_features,)
            with torch.no_grad():  # bookkeeping, not part of the output
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(dim=0, correction=1), self.momentum)
                self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        normalised = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight * normalised + self.bias


class EarlyStopping:
    """Says when the validation loss has not improved for `patience` epochs in a row.

    step(validation_loss), once after each epoch, returns True when training should stop. An
    improvement is a loss below `best` by more than `min_delta`; NaN is none. `best` is the loss of
    the last improvement (infinity before), `best_epoch` the epoch it came in, counted from 1
    (0 before). Raises ValueError for a patience below 1.
    Source: Goodfellow, Bengio and Courville, Deep Learning (2016), Algorithm 7.1.
    """

    def __init__(self, patience, min_delta=0.0):
        if patience < 1:
            raise ValueError(f"patience is {patience}: give a whole number from 1 on.")
        self.patience, self.min_delta = patience, min_delta
        self.epoch, self.best, self.best_epoch = 0, math.inf, 0

    def step(self, validation_loss):
        self.epoch += 1
        if validation_loss < self.best - self.min_delta:  # False for NaN
            self.best, self.best_epoch = validation_loss, self.epoch
        return self.epoch - self.best_epoch >= self.patience


class ThreeLayerNet(nn.Module):
    """Three linear layers and what makes them more than one; x (batch, in_features) → logits."""

    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = F.relu(self.first(x))  # (batch, hidden)
        x = F.relu(self.second(x))
        return self.third(x)  # (batch, num_classes)


def mean_accuracy(model, batches):
    """The fraction of all samples that the model, in evaluation mode, classifies rightly."""
    model.eval()
    correct, samples = 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            predictions = model(inputs).argmax(dim=1)  # (batch,)
            correct += (predictions == targets).sum().item()
            samples += len(targets)
    return correct / samples


class DeepNet(nn.Module):
    """`depth` hidden layers with ReLU, then a linear one; x (batch, in_features) → logits."""

    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        sizes = [in_features] + [hidden] * depth
        self.layers = nn.ModuleList()
        for i in range(depth):
            self.layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        self.output = nn.Linear(sizes[-1], num_classes)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))  # (batch, hidden)
        return self.output(x)  # (batch, num_classes)


def compare_learning_rates(make_model, batches, loss_function, rates, epochs):
    """Trains a fresh model with SGD at each rate; returns each run's mean loss in each epoch.

    make_model() → a new model; batches: a list of (inputs, targets), gone through once per epoch;
    the result is a list with one list of `epochs` floats per rate.
    """
    curves = []
    for lr in rates:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        curve = []
        for _ in range(epochs):
            total_loss, samples = 0.0, 0
            for inputs, targets in batches:
                optimizer.zero_grad()
                loss = loss_function(model(inputs), targets)
                loss.backward()
                optimizer.step()
                total_loss += loss.item() * len(targets)
                samples += len(targets)
            curve.append(total_loss / samples)
        curves.append(curve)
    return curves
