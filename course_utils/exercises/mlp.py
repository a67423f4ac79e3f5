"""Exercises of chapter 2: data, a network, losses, optimizers, the loop, and what keeps it honest.

`# museum 2.n` beside a misconception is the row of the defects found in published tutorials.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from course_utils.exercises.engine import Exercise, Misconception
from course_utils.reference import mlp as reference

# --- DigitsDataset ------------------------------------------------------------------------------


@contextmanager
def _idx_files(see, count: int, height: int, width: int) -> Iterator[tuple[Path, Path]]:
    """A pair of small IDX files with random pixels and labels, gone at the end."""
    images, labels = see.randint(0, 256, count, height, width), see.randint(0, 10, count)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        paths = Path(folder) / "images-idx3-ubyte", Path(folder) / "labels-idx1-ubyte"
        for path, magic, values in zip(paths, (2051, 2049), (images, labels), strict=True):
            header = struct.pack(f">{1 + values.ndim}I", magic, *values.shape)
            path.write_bytes(header + bytes(values.flatten().tolist()))
        yield paths


def _observe_digits_dataset(DigitsDataset, see):
    for count, height, width, indices in ((4, 5, 3, (0, 3)), (300, 4, 6, (0, 137, 299))):
        with (
            see.probe(f"files with {count} images of {height}×{width} pixels"),
            _idx_files(see, count, height, width) as paths,
        ):
            dataset = DigitsDataset(*paths)
            see("the number of items", len(dataset))
            for i in indices:
                item = dataset[i]
                pair = isinstance(item, (tuple, list)) and len(item) == 2
                see.fact(f"item {i} is a pair (image, label)", pair)
                image, label = item
                see(f"the image of item {i}", image)
                see(f"the label of item {i}", label)
    with see.probe("a batch of 3 from a DataLoader"), _idx_files(see, 7, 5, 3) as paths:
        images, labels = next(iter(DataLoader(DigitsDataset(*paths), batch_size=3)))
        see("the images of the batch", images)
        see("the labels of the batch", labels)
    with see.probe("transform = flatten and shift"), _idx_files(see, 6, 5, 3) as paths:
        dataset = DigitsDataset(*paths, transform=lambda image: image.flatten() - 0.25)
        see("the transformed image of item 4", dataset[4][0])
        see("the label of item 4", dataset[4][1])
    with see.probe("a transform that differs at each call"), _idx_files(see, 6, 5, 3) as paths:
        given = []

        def brighter(image):
            given.append(image)
            return image + len(given)

        dataset = DigitsDataset(*paths, transform=brighter)
        see("the image of item 2, read three times", [dataset[2][0] for _ in range(3)])
        see("what the transform is given", given[-1] if given else "nothing: it is not called")


class _HeaderOf8Bytes(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        data = np.frombuffer(Path(images_path).read_bytes(), np.uint8, offset=8)
        values = torch.tensor(data[: self.images.numel()])
        self.images = values.reshape(self.images.shape)


class _LabelHeaderOf16Bytes(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        self.labels = list(Path(labels_path).read_bytes()[16:])

    def __len__(self):
        return len(self.images)


class _LabelHeaderKept(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        self.labels = list(Path(labels_path).read_bytes())

    def __len__(self):
        return len(self.images)


class _LittleEndian(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        with open(images_path, "rb") as file:
            _, count, height, width = struct.unpack("<4I", file.read(16))
            self.images = np.frombuffer(file.read(), np.uint8).reshape(count, height, width)


class _LittleEndianTorch(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        with open(images_path, "rb") as file:
            _, count, height, width = struct.unpack("<4I", file.read(16))
            pixels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            self.images = pixels.reshape(count, 1, height, width)


class _WidthFirst(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        count, _, height, width = self.images.shape
        self.images = self.images.reshape(count, 1, width, height)


class _ColumnByColumn(_WidthFirst):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        self.images = self.images.transpose(2, 3)


class _AlwaysMnistSized(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        pixels = np.frombuffer(Path(images_path).read_bytes(), np.uint8, offset=16)
        self.images = pixels.reshape(-1, 28, 28)


class _ShuffledApart(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        self.images = self.images[torch.randperm(len(self.images))]
        self.labels = [self.labels[i] for i in torch.randperm(len(self.labels))]


class _Changed(reference.DigitsDataset):
    """The right pixels, which a subclass turns into an image in its own way."""

    def image(self, pixels):
        raise NotImplementedError

    def __getitem__(self, index):
        image = self.image(self.images[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]


class _Uint8(_Changed):
    def image(self, pixels):
        return pixels


class _SignedBytes(_Changed):
    def image(self, pixels):
        return pixels.to(torch.int8) / 255


class _NotScaled(_Changed):
    def image(self, pixels):
        return pixels.float()


class _Float64(_Changed):
    def image(self, pixels):
        return torch.from_numpy(pixels.numpy() / 255.0)


class _ScaledByItsMaximum(_Changed):
    def image(self, pixels):
        return pixels.float() / pixels.max()


class _DividedBy256(_Changed):
    def image(self, pixels):
        return pixels.float() / 256


class _CentredInUint8(_Changed):
    def image(self, pixels):
        return (pixels - 128).float() / 127


class _DividedAsIntegers(_Changed):
    def image(self, pixels):
        return (pixels // 255).float()


class _Inverted(_Changed):
    def image(self, pixels):
        return 1 - pixels.float() / 255


class _NormalisedToo(_Changed):
    def image(self, pixels):
        return (pixels.float() / 255 - 0.1307) / 0.3081


class _LabelFirst(reference.DigitsDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return label, image


class _NoChannel(_Changed):
    def image(self, pixels):
        return pixels[0].float() / 255


class _ChannelLast(_Changed):
    def image(self, pixels):
        return pixels[0].unsqueeze(-1).float() / 255


class _TransformIgnored(_Changed):
    def __getitem__(self, index):
        return self.images[index].float() / 255, self.labels[index]


class _TransformGetsBytes(reference.DigitsDataset):
    def __getitem__(self, index):
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return image.float() / 255, self.labels[index]


class _TransformOnce(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path)
        self.items = [reference.DigitsDataset.__getitem__(self, i)[0] for i in range(len(self))]
        if transform is not None:
            self.items = [transform(image) for image in self.items]

    def __getitem__(self, index):
        return self.items[index], self.labels[index]


class _LabelsUint8(reference.DigitsDataset):
    def __init__(self, images_path, labels_path, transform=None):
        super().__init__(images_path, labels_path, transform)
        self.labels = torch.tensor(self.labels, dtype=torch.uint8)


class _DigitsByNumpy(torch.utils.data.Dataset):
    def __init__(self, images_path, labels_path, transform=None):
        count, height, width = np.fromfile(images_path, ">u4", 4)[1:].astype(int)
        pixels = np.fromfile(images_path, np.uint8, offset=16).reshape(count, height, width)
        self.images = pixels.astype(np.float32) / 255
        self.labels = torch.from_numpy(np.fromfile(labels_path, np.uint8, offset=8)).long()
        self.transform = transform or (lambda image: image)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(torch.from_numpy(self.images[index])[None]), self.labels[index]


class _DigitsFromDisk:
    def __init__(self, images_path, labels_path, transform=None):
        self.images_path, self.labels_path = str(images_path), str(labels_path)
        self.transform = transform
        with open(self.images_path, "rb") as file:
            _, self.count, self.height, self.width = struct.unpack(">IIII", file.read(16))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        size = self.height * self.width
        with open(self.images_path, "rb") as file:
            file.seek(16 + index * size)
            rows = torch.tensor(list(file.read(size)), dtype=torch.float32)
        with open(self.labels_path, "rb") as file:
            file.seek(8 + index)
            label = ord(file.read(1))
        image = (rows * (1 / 255)).view(1, self.height, self.width)
        return [self.transform(image) if self.transform else image, label]


_LITTLE_ENDIAN = (
    "You read the header's integers with their lowest byte first. IDX files are big-endian, so a "
    "count of 4 comes out as 67,108,864; say the byte order when you unpack."
)

DIGITS_DATASET = Exercise(
    slug="digits_dataset",
    chapter=2,
    title="Read digits from their bytes",
    minutes=20,
    difficulty=2,
    reference=reference.DigitsDataset,
    observe=_observe_digits_dataset,
    misconceptions=(
        Misconception(
            "image_header_of_8_bytes",  # museum 2.17
            _HeaderOf8Bytes,
            "You start to read pixels at byte 8 of the image file. Its header is four integers "
            "long, so the last two of them, height and width, became the first pixels and every "
            "image is shifted by eight.",
        ),
        Misconception(
            "label_header_of_16_bytes",  # museum 2.17
            _LabelHeaderOf16Bytes,
            "You skip 16 bytes of the label file. Labels have one axis, so their header holds two "
            "integers and not four: your labels start with that of the ninth image.",
        ),
        Misconception("little_endian", _LittleEndian, _LITTLE_ENDIAN),  # museum 2.17
        Misconception("little_endian_torch", _LittleEndianTorch, _LITTLE_ENDIAN),
        Misconception(
            "width_before_height",  # museum 2.18
            _WidthFirst,
            "You give the images the shape (width, height). The header says height first, and the "
            "pixels come row by row. With square images nothing would fail, yet those of another "
            "shape are cut at the wrong places.",
        ),
        Misconception(
            "column_by_column",  # museum 2.18
            _ColumnByColumn,
            "Your images have the right shape, and their pixels are filled in column by column. "
            "IDX stores row after row, so rows and columns change places.",
        ),
        Misconception(
            "always_28_by_28",
            _AlwaysMnistSized,
            "You take every image to be 28×28. The size stands in the header of the file; digits "
            "of another size cannot be read, or are cut into the wrong pieces.",
        ),
        Misconception(
            "shuffled_apart",  # museum 2.8
            _ShuffledApart,
            "You shuffle the images and the labels, each in an order of its own, so that an image "
            "no longer comes with its label and nothing can be learned. Keep the file's order: "
            "shuffling is the loader's work.",
        ),
        Misconception(
            "pixels_stay_uint8",  # museum 2.16
            _Uint8,
            "You return the pixels as the bytes they were, whole numbers from 0 to 255. A linear "
            "layer takes floats, and arithmetic on uint8 wraps around; turn them into float32 "
            "from 0 to 1.",
        ),
        Misconception(
            "not_scaled",  # museum 2.14
            _NotScaled,
            "You turn the pixels into floats and leave them between 0 and 255. The image should "
            "lie between 0 and 1: a network trained on one scale reads the other badly.",
        ),
        Misconception(
            "float64",
            _Float64,
            "Your images are float64, as NumPy divides. The weights of a layer are float32, and "
            "torch refuses to multiply the two.",
        ),
        Misconception(
            "scaled_by_its_own_maximum",
            _ScaledByItsMaximum,
            "You divide each image by its own brightest pixel. So a faint digit and a bold one "
            "become the same, and an empty image becomes NaN; the largest possible byte is the "
            "same for all.",
        ),
        Misconception(
            "divided_by_256",
            _DividedBy256,
            "You divide by 256. The largest byte is 255, so that full ink should come out as "
            "exactly 1.",
        ),
        Misconception(
            "centred_in_uint8",  # museum 2.16
            _CentredInUint8,
            "You subtract while the pixels are still uint8, where 0 − 128 wraps around to 128, "
            "and the range asked for is 0 to 1. Turn the pixels into floats first.",
        ),
        Misconception(
            "divided_as_integers",  # museum 2.16
            _DividedAsIntegers,
            "You divide while the pixels are still whole numbers, which leaves only 0 and 1: all "
            "shades of grey are gone. Turn the pixels into floats first.",
        ),
        Misconception(
            "inverted",  # museum 2.14
            _Inverted,
            "You turn black into white. Ink is 255 in the file and should be 1 in the image; a "
            "network that was trained on one is lost on the other.",
        ),
        Misconception(
            "normalised_too",
            _NormalisedToo,
            "You subtract 0.1307 and divide by 0.3081, MNIST's own mean and deviation, after "
            "scaling. Normalising is what `transform` is for, with the figures of the data at "
            "hand; the data set itself returns 0 to 1.",
        ),
        Misconception(
            "label_first",
            _LabelFirst,
            "You return (label, image). Loaders and training loops expect (image, label).",
        ),
        Misconception(
            "no_channel_axis",
            _NoChannel,
            "Your image has the axes (height, width). Image layers and transforms expect "
            "(channels, height, width), also where there is only one channel.",
        ),
        Misconception(
            "channel_last",
            _ChannelLast,
            "You put the channel last, as plotting libraries do. In torch it comes first: "
            "(1, height, width).",
        ),
        Misconception(
            "transform_ignored",
            _TransformIgnored,
            "You take a transform and never call it. It belongs between the pixels and what "
            "`__getitem__` returns.",
        ),
        Misconception(
            "transform_before_scaling",
            _TransformGetsBytes,
            "You hand the transform the raw bytes and scale its result. A transform expects the "
            "finished image, float32 from 0 to 1: its mean and deviation are on that scale.",
        ),
        Misconception(
            "transformed_only_once",
            _TransformOnce,
            "You apply the transform once, when the data set is made. Random transforms "
            "(augmentation) must be drawn anew each time that an item is read.",
        ),
        Misconception(
            "labels_are_uint8",
            _LabelsUint8,
            "Each label is still a uint8. A DataLoader then builds uint8 batches, and "
            "cross-entropy asks for int64; return a Python int.",
        ),
        Misconception(
            "label_header_not_skipped",
            _LabelHeaderKept,
            "You take the label file from its first byte. It begins with a header of two "
            "integers, so your first eight labels are the bytes of the magic number and the "
            "count.",
        ),
        Misconception(
            "signed_bytes",
            _SignedBytes,
            "You read the pixels as signed bytes. Every value from 128 on then comes out 256 too "
            "low, below zero: strong ink becomes the opposite of ink. The file holds unsigned "
            "bytes.",
        ),
    ),
    alternatives=(_DigitsByNumpy, _DigitsFromDisk),
    hints=(
        "The image file starts with four integers of four bytes each: magic number, count, height, "
        "width. Then comes one byte per pixel, row after row. The label file starts with two.",
        "Read the header with `int.from_bytes(file.read(4), 'big')` or `np.frombuffer(…, '>u4')`; "
        "big-endian means that the highest byte comes first.",
        "`torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).reshape(count, 1, height, "
        "width)` holds all pixels. In `__getitem__` take one image, make it float, divide by 255, "
        "call the transform if there is one, and return it with the label as an int.",
    ),
    rtol=1e-6,
    atol=1e-7,
)

# --- networks: judged by what they do, whatever their parts are called --------------------------


def _output(see, label: str, model, x: torch.Tensor):
    """Calls a model whose weights (or draws) are its own: only the kind of output is compared."""
    kept = x.detach().clone()
    out = model(x)
    see.fact(f"{label}: the inputs are left unmodified", torch.equal(x, kept))
    see(label, torch.zeros_like(out) + 0 * out.sum() if isinstance(out, torch.Tensor) else out)
    return out


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _same_logits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to a shift of each row, which neither softmax nor cross-entropy sees."""
    return _same(one.log_softmax(dim=1), other.log_softmax(dim=1))


def _fill(see, model) -> list[torch.Tensor]:
    """Gives all parameters random values, so that nothing rests on how they started."""
    params = list(model.parameters())
    with torch.no_grad():
        for p in params:
            p.copy_(0.7 * see.randn(*p.shape, dtype=p.dtype))
    return params


def _weights(model, sizes: tuple[int, int, int]):
    """The weights of three linear layers, told by their shapes; the hidden biases as a list."""
    in_features, hidden, num_classes = sizes
    found = []
    for shape in ((hidden, in_features), (hidden, hidden), (num_classes, hidden)):
        for p in model.parameters():
            if tuple(p.shape) == shape:
                found.append(p)
            elif tuple(p.shape) == shape[::-1]:  # kept for x @ weight
                found.append(p.T)
    biases = [p for p in model.parameters() if tuple(p.shape) == (hidden,)]
    last = [p for p in model.parameters() if tuple(p.shape) == (num_classes,)]
    return (*found, biases, last[0]) if (len(found), len(biases), len(last)) == (3, 2, 1) else None


@torch.no_grad()
def _logits_of_given_weights(model, x: torch.Tensor, sizes: tuple[int, int, int]):
    """log softmax of the logits, with the same weights in every model of this shape.

    The square weight is symmetric and the hidden biases are equal, so that neither the order of the
    parameters nor the axis order of a weight matters; log softmax takes away a shift of each row.
    """
    in_features, hidden, num_classes = sizes
    generator = torch.Generator().manual_seed(0)  # see.generator stands elsewhere in each model
    shapes = (hidden, in_features), (hidden, hidden), (num_classes, hidden), (num_classes,)
    *matrix_values, last_values = [torch.randn(shape, generator=generator) for shape in shapes]
    matrix_values[1] += matrix_values[1].T.clone()
    weights = _weights(model, sizes)
    if weights is None:
        return "no three linear layers are found"
    *matrices, biases, last = weights
    for p, values in zip((*matrices, last), (*matrix_values, last_values), strict=True):
        p.copy_(0.7 * values)
    for bias in biases:
        bias.copy_(torch.linspace(-0.5, 0.5, hidden))
    return model(x).log_softmax(dim=1)


@torch.no_grad()
def _merge(see, model, x: torch.Tensor, sizes: tuple[int, int, int], which: int) -> bool:
    """Whether layers `which` and `which` + 1 act as one matrix.

    Then what goes between them may be turned, and turned back, without changing the logits.
    """
    weights = _weights(model, sizes)
    if weights is None:
        return False
    before = model(x)
    turn, _ = torch.linalg.qr(see.randn(sizes[1], sizes[1], dtype=torch.float32))
    first, second, third, biases, _ = weights
    for middle in (second, second.T):
        inner, outer = ((first, middle), (middle, third))[which]
        for bias in biases:
            kept = [values.clone() for values in (inner, outer, bias)]
            inner.copy_(turn @ inner)
            bias.copy_(turn @ bias)
            outer.copy_(outer @ turn.T)
            after = model(x)
            for values, old in zip((inner, outer, bias), kept, strict=True):
                values.copy_(old)
            if _same_logits(before, after):
                return True
    return False


def _observe_network(see, model, x: torch.Tensor, sizes: tuple[int, int, int], exact: bool) -> None:
    """What every network of three linear layers with activations between them does.

    Where `exact`, the activation must be the reference's.
    """
    see.fact("what it makes is an nn.Module", isinstance(model, nn.Module))
    out = _output(see, "the output", model, x)
    params = [p for p in model.parameters() if p.requires_grad]
    see("the number of trainable values in model.parameters()", sum(p.numel() for p in params))
    see("the shapes of the parameters", sorted(tuple(sorted(p.shape)) for p in params))
    see.fact("a second call on the same input gives the same logits", _same(model(x), out))
    apart = all(len(p.unique(dim=0)) == len(p) for p in params if p.ndim == 2)
    see.fact("the units of a layer start with different weights", apart)
    least, sums = math.inf, []
    for _ in range(5):
        _fill(see, model)
        logits = model(x).detach()
        least, sums = min(least, logits.min().item()), [*sums, logits.exp().sum(1), logits.sum(1)]
    see.fact("some logits are below zero", least < 0)
    ones = torch.ones(len(x))
    see.fact(
        "the logits of a sample do not add up to 1", not any(_same(s, ones) for s in sums[1::2])
    )
    alone = torch.cat([model(sample) for sample in x.split(1)])
    see.fact("the logits of a sample do not depend on the other samples", _same(alone, model(x)))
    evaluated = model.eval()(x)
    see.fact("the logits are the same in evaluation mode", _same(evaluated, model.train()(x)))
    if exact:
        given = _logits_of_given_weights(model, x, sizes)
        see("the output for given weights (after log_softmax)", given)
    other = see.randn(*x.shape, dtype=x.dtype)
    halfway = (model(x) + model(other)) / 2
    straight = _same_logits(model((x + other) / 2), halfway)
    see.fact("the output halfway between two inputs is not halfway between theirs", not straight)
    for which, layers in enumerate(("first and second", "second and third")):
        merge = _merge(see, model, x, sizes, which)
        see.fact(f"the {layers} layer do not multiply out to one matrix", not merge)
    low, lower = -see.rand(*x.shape, dtype=x.dtype), -see.rand(*x.shape, dtype=x.dtype)
    see.fact("negative inputs count too", not _same(model(low), model(lower)))
    upstream = see.randn(*out.shape, dtype=out.dtype)
    grads = torch.autograd.grad(
        (model(x) * upstream).sum(), list(model.parameters()), allow_unused=True
    )
    reached = all(grad is not None and bool((grad != 0).any()) for grad in grads)
    see.fact("every parameter receives a gradient", reached)


def _observe_mlp(MLP, see):
    for sizes, shape in (((12, 7, 5), (6, 12)), ((15, 8, 4), (9, 1, 5, 3))):
        in_features, hidden, num_classes = sizes
        with see.probe(f"MLP({in_features}, {hidden}, {num_classes}), x of shape {shape}"):
            model = MLP(in_features, hidden, num_classes)
            x = see.randn(*shape, dtype=torch.float32)
            _observe_network(see, model, x, sizes, exact=True)


class _MLPWith(reference.MLP):
    """Three layers, joined by a subclass in its own way."""

    def activation(self, x):
        return torch.relu(x)

    def forward(self, x):
        x = self.activation(self.hidden1(x.flatten(start_dim=1)))
        return self.output(self.activation(self.hidden2(x)))


class _MLPLinear(_MLPWith):
    def activation(self, x):
        return x


class _MLPSigmoid(_MLPWith):
    def activation(self, x):
        return torch.sigmoid(x)


class _MLPTanh(_MLPWith):
    def activation(self, x):
        return torch.tanh(x)


class _MLPLeaky(_MLPWith):
    def activation(self, x):
        return F.leaky_relu(x)


class _MLPDropout(_MLPWith):
    def activation(self, x):
        return F.dropout(torch.relu(x), 0.5)


class _MLPReluOnLogits(reference.MLP):
    def forward(self, x):
        return torch.relu(super().forward(x))


class _MLPSoftmax(reference.MLP):
    def forward(self, x):
        return torch.softmax(super().forward(x), dim=1)


class _MLPSigmoidOnLogits(reference.MLP):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class _MLPFirstReluOnly(reference.MLP):
    def forward(self, x):
        x = torch.relu(self.hidden1(x.flatten(start_dim=1)))
        return self.output(self.hidden2(x))


class _MLPSecondReluOnly(reference.MLP):
    def forward(self, x):
        x = self.hidden1(x.flatten(start_dim=1))
        return self.output(torch.relu(self.hidden2(x)))


class _MLPMixesSamples(reference.MLP):
    def forward(self, x):
        return super().forward(x.reshape(self.hidden1.in_features, -1).T)


class _MLPNoFlatten(reference.MLP):
    def forward(self, x):
        x = torch.relu(self.hidden1(x))
        x = torch.relu(self.hidden2(x))
        return self.output(x)


class _MLPFlattensBatchToo(reference.MLP):
    def forward(self, x):
        x = torch.relu(self.hidden1(x.flatten()))
        x = torch.relu(self.hidden2(x))
        return self.output(x)


class _MLPWithoutBias(nn.Sequential):
    def __init__(self, in_features, hidden, num_classes):
        sizes = ((in_features, hidden), (hidden, hidden), (hidden, num_classes))
        first, second, third = (nn.Linear(m, n, bias=False) for m, n in sizes)
        super().__init__(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), third)


class _MLPReluModuleMisused(reference.MLP):
    def forward(self, x):
        x = nn.ReLU(self.hidden1(x.flatten(start_dim=1)))
        return self.output(nn.ReLU(self.hidden2(x)))


class _MLPReluInTrainingOnly(_MLPWith):
    def activation(self, x):
        return torch.relu(x) if self.training else x


class _MLPInAList(nn.Module):
    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.layers = [nn.Linear(in_features, hidden), nn.Linear(hidden, hidden)]
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = x.flatten(start_dim=1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.output(x)


class _MLPLayerInForward(reference.MLP):
    def forward(self, x):
        x = torch.relu(self.hidden1(x.flatten(start_dim=1)))
        x = torch.relu(self.hidden2(x))
        return nn.Linear(x.shape[1], self.output.out_features)(x)


class _MLPZeroWeights(reference.MLP):
    def __init__(self, in_features, hidden, num_classes):
        super().__init__(in_features, hidden, num_classes)
        for layer in (self.hidden1, self.hidden2, self.output):
            nn.init.zeros_(layer.weight)


class _MLPOneHidden(nn.Module):
    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.output(torch.relu(self.hidden(x.flatten(start_dim=1))))


class _MLPFourLayers(nn.Sequential):
    def __init__(self, in_features, hidden, num_classes):
        layers = [nn.Flatten(), nn.Linear(in_features, hidden), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, num_classes))


class _MLPSharedHidden(reference.MLP):
    def __init__(self, in_features, hidden, num_classes):
        super().__init__(in_features, hidden, num_classes)
        del self.hidden2
        self.again = nn.Linear(hidden, hidden)

    def forward(self, x):
        x = torch.relu(self.hidden1(x.flatten(start_dim=1)))
        x = torch.relu(self.again(torch.relu(self.again(x))))
        return self.output(x)


def _mlp_sequential(in_features, hidden, num_classes):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


class _MLPByHand(nn.Module):
    def __init__(self, in_features, hidden, num_classes, gain=1.0):
        super().__init__()
        sizes = (in_features, hidden, hidden, num_classes)
        self.biases = nn.ParameterList(torch.zeros(n) for n in sizes[1:])
        self.weights = nn.ParameterList(
            gain * torch.randn(m, n) / m**0.5 for m, n in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x):
        x = x.reshape(len(x), -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.addmm(bias, x.clamp(min=0) if i else x, weight)
        return x


class _MLPLogProbabilities(reference.MLP):
    def forward(self, x):
        return torch.log_softmax(super().forward(x), dim=1)  # logits too, shifted row by row


MLP = Exercise(
    slug="mlp",
    chapter=2,
    title="A network of three linear layers",
    minutes=15,
    difficulty=2,
    reference=reference.MLP,
    observe=_observe_mlp,
    misconceptions=(
        Misconception(
            "no_activation",  # museum 2.F4
            _MLPLinear,
            "You stack the linear layers with nothing between them. Then they multiply out to one "
            "linear layer, however many you stack; put a ReLU after each hidden layer.",
        ),
        Misconception(
            "relu_after_the_first_only",  # museum 2.F4
            _MLPFirstReluOnly,
            "The second hidden layer has no activation after it, so it and the output layer act "
            "as one matrix. Each hidden layer needs its own ReLU.",
        ),
        Misconception(
            "relu_after_the_second_only",  # museum 2.F4
            _MLPSecondReluOnly,
            "The first hidden layer has no activation after it, so it and the second one act as "
            "one matrix. Each hidden layer needs its own ReLU.",
        ),
        Misconception(
            "relu_on_the_logits",  # museum 2.25
            _MLPReluOnLogits,
            "You apply ReLU to the last layer's output as well. No logit can then be negative, and "
            "where all are cut to zero no gradient comes back; the last layer stays bare.",
        ),
        Misconception(
            "softmax_at_the_end",  # museum 2.1
            _MLPSoftmax,
            "You return probabilities and not logits. Cross-entropy applies softmax itself: "
            "applied twice, it cannot get a loss near zero and learning is slow.",
        ),
        Misconception(
            "sigmoid_at_the_end",
            _MLPSigmoidOnLogits,
            "You squeeze the last layer's output between 0 and 1. Logits are any numbers: leave "
            "the last layer bare, since cross-entropy applies softmax itself.",
        ),
        Misconception(
            "sigmoid_between",
            _MLPSigmoid,
            "You use the sigmoid between the layers where ReLU is asked for. Its slope is at most "
            "1/4, so gradients shrink with every layer they pass on the way back.",
        ),
        Misconception(
            "tanh_between",
            _MLPTanh,
            "You use tanh between the layers where ReLU is asked for. It works in a network this "
            "shallow; deeper ones lose their gradient where tanh is flat.",
        ),
        Misconception(
            "leaky_relu_between",
            _MLPLeaky,
            "You use the leaky ReLU, which lets 1 % of negative values pass. Plain ReLU is asked "
            "for: zero for all of them.",
        ),
        Misconception(
            "dropout_inside",
            _MLPDropout,
            "You drop out hidden values, at every call, so that the same image gives other logits "
            "each time. That is asked for nowhere here; dropout comes later in the chapter.",
        ),
        Misconception(
            "flatten_mixes_samples",  # museum 2.10
            _MLPMixesSamples,
            "You flatten with the batch axis last and transpose back. The shape comes out right, "
            "yet each row now holds pixels of several images; keep axis 0 and merge the rest.",
        ),
        Misconception(
            "not_flattened",
            _MLPNoFlatten,
            "You do not flatten the images. A linear layer works on the last axis alone, which is "
            "the width of the image and not all of its pixels.",
        ),
        Misconception(
            "batch_flattened_too",
            _MLPFlattensBatchToo,
            "You flatten all axes, the batch among them, so that the whole batch becomes one long "
            "sample. Keep axis 0 and merge the rest.",
        ),
        Misconception(
            "layers_in_a_list",  # museum 2.21
            _MLPInAList,
            "You keep layers in a Python list, where nn.Module does not find them. They are "
            "missing from `parameters()`, so no optimizer trains them and no file saves them.",
        ),
        Misconception(
            "layer_made_in_forward",  # museum 2.22
            _MLPLayerInForward,
            "You make a layer inside `forward`. It starts from new random weights at every call, "
            "so the same image gives other logits each time and nothing is learned.",
        ),
        Misconception(
            "all_weights_zero",  # museum 2.7
            _MLPZeroWeights,
            "You start with all weights at zero. Then the units of a layer compute the same, get "
            "the same gradient and stay the same for ever; the random start breaks that tie.",
        ),
        Misconception(
            "one_hidden_layer",
            _MLPOneHidden,
            "Your network has two linear layers, so a single hidden one. Three are asked for: "
            "in_features → hidden → hidden → num_classes.",
        ),
        Misconception(
            "four_layers",
            _MLPFourLayers,
            "Your network has four linear layers. Three are asked for: "
            "in_features → hidden → hidden → num_classes.",
        ),
        Misconception(
            "hidden_layer_used_twice",
            _MLPSharedHidden,
            "You send the values through the same hidden layer twice. The weights are as many as "
            "they should be, but the network has one linear step more, with weights tied.",
        ),
        Misconception(
            "relu_module_misused",
            _MLPReluModuleMisused,
            "You write `nn.ReLU(x)`. That makes a layer, with x taken for its `inplace` switch, "
            "and computes nothing; call a layer that is made already, `nn.ReLU()(x)`, or the "
            "function, `F.relu(x)`.",
        ),
        Misconception(
            "activation_in_training_mode_only",
            _MLPReluInTrainingOnly,
            "Your network has its ReLU in training mode only. In evaluation mode its layers "
            "multiply out to one matrix: an activation belongs to what the network computes, "
            "whatever the mode.",
        ),
        Misconception(
            "no_bias",
            _MLPWithoutBias,
            "Your linear layers have no bias, so an input of zeros always gives logits of zeros. "
            "Each layer needs its bias, which `nn.Linear` has unless told otherwise.",
        ),
    ),
    alternatives=(_mlp_sequential, _MLPByHand, _MLPLogProbabilities),
    hints=(
        "Make the layers in `__init__`, as attributes, so that nn.Module finds their parameters; "
        "use them in `forward`.",
        "Flatten all axes but the batch: `x.flatten(start_dim=1)`. ReLU comes after the first and "
        "after the second layer, and nothing comes after the third.",
        "Three attributes: nn.Linear(in_features, hidden), nn.Linear(hidden, hidden) and "
        "nn.Linear(hidden, num_classes). forward: flatten, first, relu, second, relu, third.",
    ),
    rtol=1e-4,
    atol=1e-4,
)

# --- the loss -----------------------------------------------------------------------------------


def _observe_cross_entropy(cross_entropy, see):
    def at(logits, targets):
        loss = see.call("the loss", cross_entropy, logits.requires_grad_(), targets)
        see.gradients("loss", loss, logits=logits)

    for batch, num_classes in ((5, 3), (2, 7)):
        with see.probe(f"logits of shape ({batch}, {num_classes})"):
            at(see.randn(batch, num_classes), see.randint(0, num_classes, batch))
    with see.probe("confident logits, of size 40"):
        targets = torch.tensor([2, 0, 2])
        at(40 * F.one_hot(targets, 4) + see.randn(3, 4), torch.tensor([2, 1, 3]))
    with see.probe("logits of 1000, 0 and -1000"):
        at(1000.0 * torch.tensor([[1, 0, -1], [0, -1, 1]]).double(), torch.tensor([2, 0]))
    with see.probe("logits of 400, 0 and -400"):
        at(400.0 * torch.tensor([[1, 0, -1], [0, -1, 1]]).double(), torch.tensor([2, 0]))
    with see.probe("a row of logits near 1000 and one near -1000"):
        at(see.randn(2, 5) + torch.tensor([[1000.0], [-1000.0]]), torch.tensor([3, 1]))
    with see.probe("float32 logits of shape (4, 6)"):
        logits = see.randn(4, 6, dtype=torch.float32)
        loss = cross_entropy(logits, torch.tensor([5, 0, 2, 2]))
        see("the dtype of the loss", loss.dtype)
        see("the loss, rounded to 4 decimals", round(loss.item(), 4))


def _log_probabilities(logits, targets):
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]


def _ce_sum(logits, targets):
    return -_log_probabilities(logits, targets).sum()


def _ce_per_sample(logits, targets):
    return -_log_probabilities(logits, targets)


def _ce_no_minus(logits, targets):
    return _log_probabilities(logits, targets).mean()


def _ce_softmax_twice(logits, targets):
    return -_log_probabilities(torch.softmax(logits, dim=1), targets).mean()


def _ce_no_log(logits, targets):
    return -torch.softmax(logits, dim=1).gather(1, targets[:, None]).mean()


def _ce_on_logits(logits, targets):
    return -logits.gather(1, targets[:, None]).mean()


def _ce_naive_logsumexp(logits, targets):
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return (logits.exp().sum(dim=1).log() - chosen).mean()


def _ce_naive_softmax(logits, targets):
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    return -probabilities[torch.arange(len(targets)), targets].log().mean()


def _ce_log_of_softmax(logits, targets):
    return -torch.softmax(logits, dim=1)[torch.arange(len(targets)), targets].log().mean()


def _ce_log_plus_eps(logits, targets):
    probabilities = torch.softmax(logits, dim=1)
    return -(probabilities[torch.arange(len(targets)), targets] + 1e-8).log().mean()


def _ce_log_plus_small_eps(logits, targets):
    probabilities = torch.softmax(logits, dim=1)
    return -(probabilities[torch.arange(len(targets)), targets] + 1e-12).log().mean()


def _ce_clamped(logits, targets):
    probabilities = torch.softmax(logits, dim=1).clamp(1e-7, 1 - 1e-7)
    return -probabilities[torch.arange(len(targets)), targets].log().mean()


def _ce_global_maximum(logits, targets):
    shifted = logits - logits.max()
    log_probabilities = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return -log_probabilities[torch.arange(len(targets)), targets].mean()


def _ce_shifted_by_the_mean(logits, targets):
    shifted = logits - logits.mean(dim=1, keepdim=True)
    return (shifted.exp().sum(dim=1).log() - shifted[range(len(targets)), targets]).mean()


def _ce_keepdim_forgotten(logits, targets):
    shifted = logits - logits.max(dim=1).values
    return (shifted.exp().sum(dim=1).log() - shifted[range(len(targets)), targets]).mean()


def _ce_values_forgotten(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True)
    return (shifted.exp().sum(dim=1).log() - shifted[range(len(targets)), targets]).mean()


def _ce_row_index_forgotten(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True).values
    return (shifted.exp().sum(dim=1).log() - shifted[targets]).mean()


def _ce_sum_over_rows_too(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True).values
    return (shifted.exp().sum().log() - shifted[range(len(targets)), targets]).mean()


def _ce_maximum_not_added_back(logits, targets):
    top = logits.max(dim=1, keepdim=True).values
    log_total = (logits - top).exp().sum(dim=1, keepdim=True).log()
    return -(logits - log_total).gather(1, targets[:, None]).mean()


def _ce_over_the_batch(logits, targets):
    return -torch.log_softmax(logits, dim=0).gather(1, targets[:, None]).mean()


def _ce_mean_of_all(logits, targets):
    one_hot = F.one_hot(targets, logits.shape[1])
    return -(one_hot * torch.log_softmax(logits, dim=1)).mean()


def _ce_all_pairs(logits, targets):
    return -torch.log_softmax(logits, dim=1)[:, targets].mean()


def _ce_base_2(logits, targets):
    return -_log_probabilities(logits, targets).mean() / math.log(2)


def _ce_mse_one_hot(logits, targets):
    return F.mse_loss(torch.softmax(logits, dim=1), F.one_hot(targets, logits.shape[1]).double())


def _ce_mse_index(logits, targets):
    return ((logits.argmax(dim=1) - targets).to(logits.dtype) ** 2).mean()


def _ce_binary(logits, targets):
    one_hot = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, one_hot)


def _ce_item(logits, targets):
    return -_log_probabilities(logits, targets).mean().item()


def _ce_logsumexp(logits, targets):
    return (logits.logsumexp(1) - logits[range(len(targets)), targets]).mean()


def _ce_torch(logits, targets):
    return F.cross_entropy(logits.log_softmax(dim=-1), targets)  # log_softmax is idempotent


def _ce_loop(logits, targets):
    losses = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        top = row.max().detach()
        losses.append(top + torch.log(torch.exp(row - top).sum()) - row[target])
    return sum(losses) / len(losses)


def _ce_one_hot(logits, targets):
    one_hot = torch.eye(logits.shape[1], dtype=logits.dtype)[targets]
    return -torch.einsum("bc,bc->", one_hot, logits.log_softmax(1)) / logits.shape[0]


CROSS_ENTROPY = Exercise(
    slug="cross_entropy",
    chapter=2,
    title="Cross-entropy that survives large logits",
    minutes=20,
    difficulty=3,
    reference=reference.cross_entropy,
    observe=_observe_cross_entropy,
    misconceptions=(
        Misconception(
            "sum_over_the_batch",  # museum 2.24
            _ce_sum,
            "You add up the losses of the batch. Asked for is their mean: with the sum, gradients "
            "grow with the batch size, and so would every step.",
        ),
        Misconception(
            "one_loss_per_sample",
            _ce_per_sample,
            "You return one loss per sample. `backward` needs a single number: the mean over the "
            "batch.",
        ),
        Misconception(
            "minus_forgotten",  # museum 2.3
            _ce_no_minus,
            "You return the mean log-probability itself, without the minus. It is never above 0, "
            "and making it small makes the right class unlikely.",
        ),
        Misconception(
            "softmax_twice",  # museum 2.1
            _ce_softmax_twice,
            "You apply softmax to the logits, and then log-softmax to the result. The numbers that "
            "enter the second one lie between 0 and 1, so the loss cannot get near zero.",
        ),
        Misconception(
            "log_forgotten",  # museum 2.2
            _ce_no_log,
            "You take the negative probability of the target, without the logarithm. It never "
            "goes below −1, and a sample that is wrong for sure gets next to no gradient.",
        ),
        Misconception(
            "softmax_forgotten",  # museum 2.3
            _ce_on_logits,
            "You take the negative logit of the target. Nothing keeps it from falling for ever, "
            "by raising every logit: the log of the sum over all classes is missing.",
        ),
        Misconception(
            "exp_overflows",  # museum 1.23
            _ce_naive_logsumexp,
            "You take exp of the logits as they are, which is infinite from about 710 on (89 in "
            "float32). Shift each row first, so that its largest logit is 0.",
        ),
        Misconception(
            "exp_over_sum_of_exp",  # museum 1.23
            _ce_naive_softmax,
            "You divide exp by the sum of exp, and for large logits that is infinity by infinity: "
            "NaN. Shift each row first, and stay with logarithms rather than divide.",
        ),
        Misconception(
            "log_of_softmax",
            _ce_log_of_softmax,
            "You take the log of the softmax. An unlikely target's probability rounds to 0, whose "
            "log is −∞; the log of a quotient is a difference, which needs no such rounding.",
        ),
        Misconception(
            "epsilon_of_1e_8_inside_the_log",
            _ce_log_plus_eps,
            "You add 1e-8 inside the log to keep it finite. That changes every value a little, "
            "caps the loss at 18.4, and sends no gradient back from the worst mistakes.",
        ),
        Misconception(
            "epsilon_of_1e_12_inside_the_log",
            _ce_log_plus_small_eps,
            "You add 1e-12 inside the log to keep it finite. That caps the loss at 27.6 and sends "
            "no gradient back from the worst mistakes; the shifted log-sum needs no such help.",
        ),
        Misconception(
            "probabilities_clamped",
            _ce_clamped,
            "You clamp the probabilities before the log. That caps the loss at 16.1, and beyond "
            "the cap no gradient comes back: the worst mistakes teach nothing.",
        ),
        Misconception(
            "one_maximum_for_all_rows",
            _ce_global_maximum,
            "You shift all rows by the largest logit of the whole batch. In a row far below it "
            "every exp rounds to 0; each row needs its own maximum.",
        ),
        Misconception(
            "maximum_not_added_back",
            _ce_maximum_not_added_back,
            "You shift the logits inside the exp, and subtract the log of the sum from logits "
            "that are not shifted. Both need the same shift.",
        ),
        Misconception(
            "softmax_over_the_batch",
            _ce_over_the_batch,
            "You normalise along axis 0, so that the samples compete with one another. The "
            "classes do: each row of probabilities adds up to 1.",
        ),
        Misconception(
            "mean_over_classes_too",
            _ce_mean_of_all,
            "You average over the whole (batch, num_classes) matrix, most of which is zeros. The "
            "loss is too small by the factor num_classes: divide by the batch size alone.",
        ),
        Misconception(
            "every_target_in_every_row",
            _ce_all_pairs,
            "Your index takes the targets of all samples in every row, a (batch, batch) matrix. "
            "Row i needs target i only: give an index for the rows too, or use `gather`.",
        ),
        Misconception(
            "base_2",
            _ce_base_2,
            "You use the logarithm to base 2. Asked for is the natural one, in which a guess among "
            "10 classes costs ln 10 = 2.303.",
        ),
        Misconception(
            "squared_error_on_one_hot",  # museum 2.11
            _ce_mse_one_hot,
            "You take the squared distance between the probabilities and the one-hot target. Its "
            "gradient fades where the network is most wrong; cross-entropy's does not.",
        ),
        Misconception(
            "squared_error_on_the_index",  # museum 2.11
            _ce_mse_index,
            "You compare class numbers as if 3 were nearer to 4 than to 9. And `argmax` passes no "
            "gradient, so nothing could learn from it.",
        ),
        Misconception(
            "binary_for_each_class",
            _ce_binary,
            "You ask each class separately whether it is the target (binary cross-entropy). Here "
            "exactly one class is right: softmax lets them compete.",
        ),
        Misconception(
            "python_number",
            _ce_item,
            "You return a Python number. It knows nothing of the graph, so nothing can be learned "
            "from it; leave out `.item()`.",
        ),
        Misconception(
            "shifted_by_the_mean",
            _ce_shifted_by_the_mean,
            "You shift each row by its mean. The largest logit can lie far above that, and its "
            "exp still overflows; shift by what makes the largest one 0.",
        ),
        Misconception(
            "keepdim_forgotten",
            _ce_keepdim_forgotten,
            "You subtract the rows' maxima as a tensor of shape (batch,), which torch lines up "
            "with the last axis, the classes. One maximum per row has the shape (batch, 1): keep "
            "the axis.",
        ),
        Misconception(
            "maximum_with_its_indices",
            _ce_values_forgotten,
            "`max` along an axis returns two tensors, the values and where they stand. You "
            "subtract the pair; take its `.values`.",
        ),
        Misconception(
            "rows_taken_by_the_targets",
            _ce_row_index_forgotten,
            "Your index `[targets]` picks whole rows, the targets being taken for numbers of "
            "samples. From row i you want the entry of target i: index rows and classes together,"
            " or use `gather`.",
        ),
        Misconception(
            "sum_over_the_batch_inside_the_log",
            _ce_sum_over_rows_too,
            "You sum the exps of the whole batch inside the logarithm. Each sample has a sum of "
            "its own, over its classes: give the axis.",
        ),
    ),
    alternatives=(_ce_logsumexp, _ce_torch, _ce_loop, _ce_one_hot),
    hints=(
        "−log softmax(z)[t] is log(Σ exp(z)) − z[t]. Write the logarithm of the quotient as a "
        "difference before you write any code.",
        "Adding a constant to a row of logits does not change its softmax. Which constant makes "
        "sure that exp never overflows, and that the sum is at least 1?",
        "shifted = logits − each row's maximum (keepdim=True); log_probabilities = shifted − "
        "log(sum(exp(shifted))) row by row; `gather(1, targets.unsqueeze(1))` takes the targets'.",
    ),
)

# --- optimizers ---------------------------------------------------------------------------------


def _run(see, label: str, function, *args, **kwargs) -> None:
    """Calls an answer that works in place; what it returns does not count."""

    def quietly(*args, **kwargs) -> None:
        function(*args, **kwargs)

    see.call(label, quietly, *args, may_modify=True, **kwargs)


def _observe_sgd_momentum_step(sgd_momentum_step, see):
    def three_steps(shapes, requires_grad, rates, momentum, start):
        params = [see.randn(*shape, requires_grad=requires_grad) for shape in shapes]
        velocities = [start * see.randn(*shape) for shape in shapes]
        for k, lr in enumerate(rates, start=1):
            grads = [see.randn(*shape) for shape in shapes]
            kept = [grad.clone() for grad in grads]
            given = list(params), grads, list(velocities)
            _run(see, f"step {k}", sgd_momentum_step, *given, lr=lr, momentum=momentum)
            for i, (p, v) in enumerate(zip(params, velocities, strict=True)):
                see(f"velocities[{i}] after step {k}", v)
                see(f"params[{i}] after step {k}", p)
            same = all(torch.equal(*pair) for pair in zip(grads, kept, strict=True))
            see.fact(f"the gradients are as they were after step {k}", same)

    with see.probe("two plain tensors, velocities zero, lr 0.1, momentum 0.9"):
        three_steps(((4, 3), (5,)), False, (0.1, 0.1, 0.1), 0.9, start=0)
    with see.probe("one tensor, velocity not zero, lr 0.5 then 0.05, momentum 0.6"):
        three_steps(((2, 3, 4),), False, (0.5, 0.05, 0.05), 0.6, start=1)
    with see.probe("three tensors, momentum 0, lr 0.2"):
        three_steps(((3,), (1, 2), (4,)), False, (0.2, 0.2), 0.0, start=1)
    with see.probe("two parameters that require a gradient"):
        three_steps(((4, 3), (5,)), True, (0.1, 0.1), 0.9, start=0)


def _each(function):
    """A step on one (parameter, gradient, velocity) for all of them, without a graph."""

    def step(params, grads, velocities, lr, momentum):
        with torch.no_grad():
            for p, g, v in zip(params, grads, velocities, strict=True):
                function(p, g, v, lr, momentum)

    return step


def _sgd_averaged(p, g, v, lr, momentum):
    v.mul_(momentum).add_((1 - momentum) * g)
    p.sub_(lr * v)


def _sgd_rate_inside(p, g, v, lr, momentum):
    v.mul_(momentum).add_(lr * g)
    p.sub_(v)


def _sgd_ascent(p, g, v, lr, momentum):
    v.mul_(momentum).add_(g)
    p.add_(lr * v)


def _sgd_minus_velocity(p, g, v, lr, momentum):
    v.mul_(momentum).sub_(lr * g)
    p.add_(v)


def _sgd_plain(p, g, v, lr, momentum):
    p.sub_(lr * g)


def _sgd_velocity_lost(p, g, v, lr, momentum):
    v = momentum * v + g
    p.sub_(lr * v)


def _sgd_velocity_points_down(p, g, v, lr, momentum):
    v.mul_(momentum).sub_(g)
    p.add_(lr * v)


def _sgd_without_underscore(p, g, v, lr, momentum):
    v.mul(momentum).add_(g)
    p.sub_(lr * v)


def _sgd_rate_twice(p, g, v, lr, momentum):
    v.mul_(momentum).add_(lr * g)
    p.sub_(lr * v)


def _sgd_nesterov(p, g, v, lr, momentum):
    v.mul_(momentum).add_(g)
    p.sub_(lr * (g + momentum * v))


def _sgd_old_velocity(p, g, v, lr, momentum):
    p.sub_(lr * v)
    v.mul_(momentum).add_(g)


def _sgd_momentum_on_both(p, g, v, lr, momentum):
    v.add_(g).mul_(momentum)
    p.sub_(lr * v)


def _sgd_momentum_on_gradient(p, g, v, lr, momentum):
    v.add_(momentum * g)
    p.sub_(lr * v)


def _sgd_velocity_replaced(p, g, v, lr, momentum):
    v.copy_(g)
    p.sub_(lr * v)


def _sgd_parameter_lost(p, g, v, lr, momentum):
    v.mul_(momentum).add_(g)
    p = p - lr * v


def _sgd_both_lost(params, grads, velocities, lr, momentum):
    with torch.no_grad():
        for i in range(len(params)):
            velocities[i] = momentum * velocities[i] + grads[i]
            params[i] = params[i] - lr * velocities[i]


def _sgd_first_only(params, grads, velocities, lr, momentum):
    for p, g, v in zip(params, grads, velocities, strict=True):
        with torch.no_grad():
            v.mul_(momentum).add_(g)
            p.sub_(lr * v)
        return p


def _sgd_graph_on(params, grads, velocities, lr, momentum):
    for p, g, v in zip(params, grads, velocities, strict=True):
        v.mul_(momentum).add_(g)
        p.sub_(lr * v)


def _sgd_gradient_overwritten(p, g, v, lr, momentum):
    v.copy_(g.add_(v, alpha=momentum))
    p.sub_(lr * v)


@torch.no_grad()
def _sgd_by_index(params, grads, velocities, lr, momentum):
    for i in range(len(params)):
        velocities[i] *= momentum
        velocities[i] += grads[i]
        params[i] -= lr * velocities[i]
    return params


def _sgd_by_data(params, grads, velocities, lr, momentum):
    for p, g, v in zip(params, grads, velocities, strict=True):
        v.data = momentum * v + g
        p.data = p.data - lr * v.data


def _sgd_foreach(params, grads, velocities, lr, momentum, nesterov=False):
    with torch.no_grad():
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, grads)
        torch._foreach_add_(params, velocities, alpha=-lr)


SGD_MOMENTUM_STEP = Exercise(
    slug="sgd_momentum_step",
    chapter=2,
    title="Gradient descent with momentum",
    minutes=15,
    difficulty=2,
    reference=reference.sgd_momentum_step,
    observe=_observe_sgd_momentum_step,
    misconceptions=(
        Misconception(
            "averaged_gradient",
            _each(_sgd_averaged),
            "You weigh the gradient with (1 − momentum), an average of gradients. torch's SGD adds "
            "the whole gradient to the velocity; yours moves ten times less at momentum 0.9.",
        ),
        Misconception(
            "learning_rate_inside_the_velocity",
            _each(_sgd_rate_inside),
            "You put the learning rate into the velocity. In torch's convention it multiplies the "
            "velocity when the parameter moves, so that a new rate acts on all of it at once.",
        ),
        Misconception(
            "velocity_with_the_minus_inside",
            _each(_sgd_minus_velocity),
            "Your velocity is the step itself, learning rate and minus included. In torch's "
            "convention the velocity is a sum of gradients; −lr comes in when the parameter moves.",
        ),
        Misconception(
            "uphill",
            _each(_sgd_ascent),
            "You add lr times the velocity. Velocities point along the gradient, where the loss "
            "grows: step the other way.",
        ),
        Misconception(
            "no_momentum",
            _each(_sgd_plain),
            "You step along the gradient alone and never touch the velocity. That is plain "
            "gradient descent: the earlier gradients should still have their share.",
        ),
        Misconception(
            "velocity_forgotten",
            _each(_sgd_velocity_lost),
            "You compute the new velocity into a new tensor, and the caller's stays what it was. "
            "The next step starts again from there; update it in place.",
        ),
        Misconception(
            "parameter_not_changed",
            _each(_sgd_parameter_lost),
            "Your velocities are right and the parameters never move. `p = …` gives a new tensor "
            "the old name, and `params[i] = …` only changes the list; the caller's tensor, the one "
            "in the model, must change in place.",
        ),
        Misconception(
            "lists_changed_and_not_tensors",
            _sgd_both_lost,
            "You compute new tensors and leave the old ones as they are, whether you put the new "
            "ones into the lists or return them. The model still holds the old ones: update the "
            "tensors themselves, in place.",
        ),
        Misconception(
            "nesterov",
            _each(_sgd_nesterov),
            "You look ahead along the velocity, which is Nesterov's variant. Asked for is plain "
            "momentum: p moves by −lr·v.",
        ),
        Misconception(
            "old_velocity",
            _each(_sgd_old_velocity),
            "You move the parameter before you update the velocity, so each gradient acts one "
            "step late. The order is velocity first.",
        ),
        Misconception(
            "momentum_on_the_gradient_too",
            _each(_sgd_momentum_on_both),
            "You add the gradient first and multiply the sum by the momentum. Only the old "
            "velocity is damped; the new gradient enters whole.",
        ),
        Misconception(
            "momentum_on_the_gradient_only",
            _each(_sgd_momentum_on_gradient),
            "You multiply the gradient by the momentum and keep the whole old velocity. It is the "
            "other way round; yours never slows down.",
        ),
        Misconception(
            "velocity_replaced",
            _each(_sgd_velocity_replaced),
            "You overwrite the velocity with the gradient. Then nothing of the earlier gradients "
            "is left, and the momentum is not used at all.",
        ),
        Misconception(
            "first_parameter_only",
            _sgd_first_only,
            "You handle the first parameter and return from inside the loop. All the others stay "
            "where they were.",
        ),
        Misconception(
            "graph_not_switched_off",
            _sgd_graph_on,
            "You change parameters that require a gradient while autograd is recording, which it "
            "refuses. An update is no part of the function that is differentiated: "
            "switch recording off around it.",
        ),
        Misconception(
            "gradient_overwritten",
            _each(_sgd_gradient_overwritten),
            "Your numbers are right, and you changed the gradients in place on the way. They are "
            "the caller's, who may want to look at them; only params and velocities may change.",
        ),
        Misconception(
            "velocity_points_downhill",
            _each(_sgd_velocity_points_down),
            "Your parameters are right, and your velocity has the other sign. In torch's "
            "convention it is a sum of gradients, pointing uphill; the minus comes in when the "
            "parameter moves.",
        ),
        Misconception(
            "underscore_forgotten",
            _each(_sgd_without_underscore),
            "Your velocity never changes: a method without the underscore, `mul` or `add`, "
            "returns a new tensor, and what is done to that is lost. The velocity itself has to "
            "be changed, by each of the two operations.",
        ),
        Misconception(
            "learning_rate_twice",
            _each(_sgd_rate_twice),
            "You multiply by the learning rate twice, once on the way into the velocity and once "
            "when the parameter moves. It belongs to the second place only.",
        ),
    ),
    alternatives=(_sgd_by_index, _sgd_by_data, _sgd_foreach),
    hints=(
        "Two assignments per parameter: the velocity first, then the parameter. Both tensors "
        "belong to the caller, so change them in place.",
        "`v.mul_(…)`, `v.add_(…)` and `p.sub_(…)` work in place; `v = …` only gives a new tensor "
        "the old name. Recording must be off: `with torch.no_grad():`.",
        "for p, g, v in zip(params, grads, velocities): v is multiplied by momentum, g is added "
        "to it, and lr·v is subtracted from p.",
    ),
)


def _observe_adamw_step(adamw_step, see):
    def steps(shapes, count, scale=1.0, requires_grad=False, zero_row=False, **options):
        params = [see.randn(*shape, requires_grad=requires_grad) for shape in shapes]
        exp_avgs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        exp_avg_sqs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        for k in range(1, count + 1):
            grads = [scale * see.randn(*shape) for shape in shapes]
            if zero_row:
                grads[0][0] = 0
            kept = [grad.clone() for grad in grads]
            given = list(params), grads, list(exp_avgs), list(exp_avg_sqs)
            _run(see, f"step {k}", adamw_step, *given, step=k, **options)
            for i in range(len(shapes)):
                see(f"exp_avgs[{i}] after step {k}", exp_avgs[i])
                see(f"exp_avg_sqs[{i}] after step {k}", exp_avg_sqs[i])
                see(f"params[{i}] after step {k}", params[i])
            same = all(torch.equal(*pair) for pair in zip(grads, kept, strict=True))
            see.fact(f"the gradients are as they were after step {k}", same)

    usual = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    with see.probe("two tensors, betas (0.9, 0.999), no weight decay"):
        steps(((4, 3), (5,)), 3, **usual)
    with see.probe("one tensor, lr 0.1, betas (0.7, 0.9), weight decay 0.2"):
        steps(((2, 3, 4),), 4, lr=0.1, betas=(0.7, 0.9), eps=1e-8, weight_decay=0.2)
    with see.probe("gradients of size 1e-3 and eps = 1e-2"):
        steps(((3, 2),), 3, scale=1e-3, lr=0.1, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.0)
    with see.probe("a row whose gradient is always zero"):
        steps(((3, 2), (4,)), 2, zero_row=True, **usual)
    with see.probe("two parameters that require a gradient, weight decay 0.1"):
        steps(((4, 3), (5,)), 2, requires_grad=True, **(usual | {"weight_decay": 0.1}))


def _adamw(
    l2=False,
    decay_first=True,
    decay_times_rate=True,
    decay_sign=1,
    correct_first=True,
    correct_second=True,
    eps="outside",
    shift=0,
    squared=True,
    swap=False,
    correct_in_place=False,
    sign=-1,
    new_first=False,
    root=True,
):
    """AdamW with one detail changed."""

    def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps_value, decay):
        beta1, beta2 = reversed(betas) if swap else betas
        with torch.no_grad():
            for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
                shrink = 1 - decay_sign * (lr if decay_times_rate else 1) * decay
                if l2:
                    g = g + decay * p
                elif decay_first:
                    p.mul_(shrink)
                new = g * g if squared else g.abs()
                if new_first:
                    m.mul_(1 - beta1).add_(beta1 * g)
                    v.mul_(1 - beta2).add_(beta2 * new)
                else:
                    m.mul_(beta1).add_((1 - beta1) * g)
                    v.mul_(beta2).add_((1 - beta2) * new)
                t = step + shift
                one = 1 - beta1**t if correct_first else 1
                two = 1 - beta2**t if correct_second else 1
                if correct_in_place:
                    m.div_(one)
                    v.div_(two)
                    one = two = 1
                v_hat = v / two
                below = {
                    "outside": lambda v_hat=v_hat: v_hat.sqrt() + eps_value,
                    "inside": lambda v_hat=v_hat: (v_hat + eps_value).sqrt(),
                    "before correction": lambda v=v, two=two: (v.sqrt() + eps_value) / two**0.5,
                    "missing": lambda v_hat=v_hat: v_hat.sqrt(),
                }[eps]()
                if not root:
                    below = v_hat + eps_value
                p.add_(sign * lr * (m / one) / below)
                if not l2 and not decay_first:
                    p.mul_(shrink)

    return lambda params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay: (
        adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay)
    )


def _adamw_moments_lost(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
    beta1, beta2 = betas
    with torch.no_grad():
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            p.mul_(1 - lr * weight_decay)
            p.sub_(lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps))


def _adamw_corrected_by(one, two, below=lambda v_hat, v, two, eps: v_hat.sqrt() + eps):
    """AdamW whose averages are divided by one(beta1, step) and two(beta2, step)."""

    def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
        with torch.no_grad():
            for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
                p.mul_(1 - lr * weight_decay)
                m.mul_(betas[0]).add_((1 - betas[0]) * g)
                v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
                by = two(betas[1], step)
                p.sub_(lr * m / one(betas[0], step) / below(v / by, v, by, eps))

    return adamw_step


def _correction(beta, step):
    return 1 - beta**step


def _adamw_decay_twice(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
    with torch.no_grad():
        grads = [g + weight_decay * p for p, g in zip(params, grads, strict=True)]
    reference.adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay)


def _adamw_sums(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
    with torch.no_grad():
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            p.mul_(1 - lr * weight_decay)
            m.mul_(betas[0]).add_(g)
            v.mul_(betas[1]).add_(g * g)
            m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
            p.sub_(lr * m_hat / (v_hat.sqrt() + eps))


def _adamw_parameters_lost(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay
):
    kept = [p.detach().clone() for p in params]
    reference.adamw_step(kept, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay)


def _adamw_graph_on(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        p.mul_(1 - lr * weight_decay)
        m.mul_(betas[0]).add_((1 - betas[0]) * g)
        v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
        below = (v / (1 - betas[1] ** step)).sqrt() + eps
        p.sub_(lr * m / (1 - betas[0] ** step) / below)


@torch.no_grad()
def _adamw_as_torch_writes_it(
    params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay
):
    beta1, beta2 = betas
    for i, p in enumerate(params):
        p -= lr * weight_decay * p
        exp_avgs[i].lerp_(grads[i], 1 - beta1)
        exp_avg_sqs[i].mul_(beta2).addcmul_(grads[i], grads[i], value=1 - beta2)
        denominator = exp_avg_sqs[i].sqrt() / math.sqrt(1 - beta2**step) + eps
        p.addcdiv_(exp_avgs[i], denominator, value=-lr / (1 - beta1**step))


def _adamw_by_data(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay):
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.copy_(betas[0] * m + (1 - betas[0]) * g)
        v.copy_(betas[1] * v + (1 - betas[1]) * g.square())
        direction = (m / (1 - betas[0] ** step)) / (torch.sqrt(v / (1 - betas[1] ** step)) + eps)
        p.data = p.data - lr * (direction + weight_decay * p.data)


ADAMW_STEP = Exercise(
    slug="adamw_step",
    chapter=2,
    title="AdamW",
    minutes=20,
    difficulty=3,
    reference=reference.adamw_step,
    observe=_observe_adamw_step,
    misconceptions=(
        Misconception(
            "decay_in_the_gradient",
            _adamw(l2=True),
            "You add the weight decay to the gradient, which is Adam with L2 regularisation. Then "
            "m and v carry it, and weights with large gradients hardly decay; AdamW shrinks the "
            "parameter directly.",
        ),
        Misconception(
            "decay_without_the_learning_rate",
            _adamw(decay_times_rate=False),
            "You shrink the parameter by weight_decay alone. In torch's convention the learning "
            "rate multiplies the decay too, so that a smaller rate also decays less.",
        ),
        Misconception(
            "decay_after_the_step",
            _adamw(decay_first=False),
            "You let the parameter decay after its step, so the step itself shrinks as well. The "
            "decay acts on the parameter as it was before.",
        ),
        Misconception(
            "decay_grows_the_weights",
            _adamw(decay_sign=-1),
            "Your weight decay makes the parameter larger at every step: its sign is wrong.",
        ),
        Misconception(
            "no_decay",
            _adamw(decay_sign=0),
            "You never use weight_decay. Without it this is Adam; AdamW also shrinks each "
            "parameter a little at every step.",
        ),
        Misconception(
            "no_bias_correction",
            _adamw(correct_first=False, correct_second=False),
            "You use m and v as they are. They start at zero and are too small for many steps, v "
            "by a factor of 1000 at the first one; divide each by 1 − beta**step.",
        ),
        Misconception(
            "first_moment_not_corrected",
            _adamw(correct_first=False),
            "You correct v for its start at zero and leave m as it is. Your first steps are too "
            "small, the very first by the factor 1 − beta1.",
        ),
        Misconception(
            "second_moment_not_corrected",
            _adamw(correct_second=False),
            "You correct m for its start at zero and leave v as it is. v is far too small at "
            "first, so the first steps are far too long.",
        ),
        Misconception(
            "correction_one_step_late",
            _adamw(shift=1),
            "You correct with step + 1. Here step counts from 1, so that the first correction is "
            "by 1 − beta.",
        ),
        Misconception(
            "correction_one_step_early",
            _adamw(shift=-1),
            "You correct with step − 1, which is 0 at the first step, where 1 − beta**0 is 0. Here "
            "step counts from 1.",
        ),
        Misconception(
            "corrected_in_place",
            _adamw(correct_in_place=True),
            "You store the corrected averages in exp_avgs and exp_avg_sqs. The next step then "
            "corrects them once more; the correction is for this step's update alone.",
        ),
        Misconception(
            "eps_inside_the_root",
            _adamw(eps="inside"),
            "You add eps under the square root, where it counts as its own root: 1e-8 becomes "
            "1e-4. It stands outside, beside the root.",
        ),
        Misconception(
            "eps_before_the_correction",
            _adamw(eps="before correction"),
            "You add eps to the root of v before v is corrected, so that the correction scales "
            "eps too. Correct v first, then take the root, then add eps.",
        ),
        Misconception(
            "no_eps",
            _adamw(eps="missing"),
            "You never use eps. Where a gradient has always been zero, that is 0/0: NaN.",
        ),
        Misconception(
            "not_squared",
            _adamw(squared=False),
            "Your exp_avg_sqs averages |g| and not g². Its root is then no measure of the "
            "gradient's size, and the step depends on the scale of the loss.",
        ),
        Misconception(
            "root_forgotten",
            _adamw(root=False),
            "You divide by v itself. Its root has the unit of a gradient, so that the step comes "
            "out at about lr whatever the gradient's size.",
        ),
        Misconception(
            "betas_swapped",
            _adamw(swap=True),
            "You use the first beta for the squares and the second for the gradients. betas is "
            "(for exp_avgs, for exp_avg_sqs).",
        ),
        Misconception(
            "beta_on_the_new_gradient",
            _adamw(new_first=True),
            "You weigh the new gradient with beta and the old average with 1 − beta. Beta is the "
            "share that is kept.",
        ),
        Misconception(
            "uphill",
            _adamw(sign=1),
            "You add the step. It points along the gradient, where the loss grows: subtract it.",
        ),
        Misconception(
            "averages_forgotten",
            _adamw_moments_lost,
            "You compute the new averages into new tensors, and the caller's stay zero for ever. "
            "Update them in place.",
        ),
        Misconception(
            "parameters_not_changed",
            _adamw_parameters_lost,
            "Your averages are right and the parameters never move. `p = …` gives a new tensor "
            "the old name; the caller's tensor, the one in the model, must change in place.",
        ),
        Misconception(
            "graph_not_switched_off",
            _adamw_graph_on,
            "You change parameters that require a gradient while autograd is recording, which it "
            "refuses. An update is no part of the function that is differentiated: "
            "switch recording off around it.",
        ),
        Misconception(
            "beta_times_step",
            _adamw_corrected_by(lambda b, t: 1 - b * t, lambda b, t: 1 - b * t),
            "You correct with 1 − beta·step. That is right at the first step alone and negative "
            "soon after, and the root of a negative number is NaN; beta is raised to the power "
            "step.",
        ),
        Misconception(
            "corrected_the_wrong_way",
            _adamw_corrected_by(
                lambda b, t: 1 / _correction(b, t), lambda b, t: 1 / _correction(b, t)
            ),
            "You multiply the averages by 1 − beta**step. They are too small at the start, and "
            "that makes them smaller still: divide.",
        ),
        Misconception(
            "root_taken_before_the_correction",
            _adamw_corrected_by(
                _correction, _correction, lambda v_hat, v, by, eps: v.sqrt() / by + eps
            ),
            "You take the root of v first and correct the root. The correction belongs to v "
            "itself: 1 − beta2**step stands under the root as well.",
        ),
        Misconception(
            "sums_and_not_averages",
            _adamw_sums,
            "You add the whole new gradient, and its square, to the old averages. The new one "
            "enters with the share 1 − beta, so that what is kept and what comes in add up to "
            "one.",
        ),
        Misconception(
            "decay_twice",
            _adamw_decay_twice,
            "You let the weights decay twice, once by adding weight_decay times the parameter to "
            "the gradient and once directly. AdamW does the second alone: the gradient, and with "
            "it m and v, stays free of the decay.",
        ),
    ),
    alternatives=(_adamw_as_torch_writes_it, _adamw_by_data),
    hints=(
        "Four things per parameter, in this order: decay the parameter, update the two averages in "
        "place, correct them for their start at zero, take the step.",
        "m keeps beta1 of itself and takes (1 − beta1)·g; v likewise with beta2 and g². The "
        "corrected ones, m/(1 − beta1**step) and v/(1 − beta2**step), are new tensors.",
        "Decay: p times (1 − lr·weight_decay). Step: subtract lr·m_hat/(√v_hat + eps). All of it "
        "in place on p, m and v, inside torch.no_grad().",
    ),
)

# --- training and evaluating --------------------------------------------------------------------


class _WatchedSGD(torch.optim.SGD):
    """SGD that notes at each step whether there were gradients to step with."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.steps = []

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.steps.append(all(p.grad is not None and bool((p.grad != 0).any()) for p in params))
        return super().step(closure)


def _small_network(see, *, dropout: float = 0.0) -> nn.Sequential:
    """4 features, 3 classes; its output depends on the mode, and in training on the whole batch."""
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3)]
    network = nn.Sequential(*layers).double()
    _fill(see, network)
    with torch.no_grad():
        network[1].running_mean.copy_(see.randn(6))
        network[1].running_var.copy_(0.5 + see.rand(6))
    return network


def _observe_train_step(train_step, see):
    def watched(k, model, batch, loss_function, optimizer):
        computed = []
        hook = next(model.parameters()).register_hook(lambda grad: computed.append(True))
        loss = see.call(f"the loss of step {k}", train_step, model, batch, loss_function, optimizer)
        graph = isinstance(loss, torch.Tensor) and loss.requires_grad
        see.fact(f"the loss of step {k} is a number without a graph behind it", not graph)
        hook.remove()
        see.fact(f"gradients are computed in step {k}", computed)
        see(f"the number of optimizer steps after step {k}", len(optimizer.steps))
        see.fact(f"at step {k} the optimizer has gradients to work with", all(optimizer.steps))
        for name, values in model.state_dict().items():
            see(f"`{name}` after step {k}", values)
        see.fact(f"the model is in training mode after step {k}", model.training)

    with see.probe("two steps of a model in training mode, batches of 8 and 5"):
        model = _small_network(see)
        optimizer = _WatchedSGD(model.parameters(), lr=0.1)
        for k, batch in ((1, 8), (2, 5)):
            given = see.randn(batch, 4), see.randint(0, 3, batch)
            watched(k, model, given, F.cross_entropy, optimizer)
    with see.probe("a model in evaluation mode, as after `evaluate`"):
        model = _small_network(see).eval()
        optimizer = _WatchedSGD(model.parameters(), lr=0.5, momentum=0.9)
        given = [see.randn(7, 4), see.randint(0, 3, 7)]
        watched(1, model, given, F.cross_entropy, optimizer)
    with see.probe("gradients are left over from before"):
        model = _small_network(see)
        optimizer = _WatchedSGD(model.parameters(), lr=0.1)
        for p in model.parameters():
            p.grad = see.randn(*p.shape)
        given = see.randn(6, 4), see.randint(0, 3, 6)
        watched(1, model, given, F.cross_entropy, optimizer)
    with see.probe("another loss function, which weighs errors by the target"):
        model = _small_network(see)
        optimizer = _WatchedSGD(model.parameters(), lr=0.2)
        given = see.randn(5, 4), see.rand(5, 3)
        watched(1, model, given, lambda out, y: (y * (out - y) ** 2).mean(), optimizer)


def _step_never_zeroed(model, batch, loss_function, optimizer):
    inputs, targets = batch
    model.train()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def _step_zeroed_too_late(model, batch, loss_function, optimizer):
    inputs, targets = batch
    model.train()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


def _step_zeroed_last(model, batch, loss_function, optimizer):
    loss = _step_never_zeroed(model, batch, loss_function, optimizer)
    optimizer.zero_grad()
    return loss


def _step_keeps_mode(model, batch, loss_function, optimizer):
    inputs, targets = batch
    optimizer.zero_grad()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def _step_in_eval_mode(model, batch, loss_function, optimizer):
    model.eval()
    return _step_keeps_mode(model, batch, loss_function, optimizer)


def _step_no_backward(model, batch, loss_function, optimizer):
    inputs, targets = batch
    model.train()
    optimizer.zero_grad()
    loss = loss_function(model(inputs), targets)
    optimizer.step()
    return loss.item()


def _step_no_step(model, batch, loss_function, optimizer):
    inputs, targets = batch
    model.train()
    optimizer.zero_grad()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    return loss.item()


def _step_before_backward(model, batch, loss_function, optimizer):
    inputs, targets = batch
    model.train()
    loss = loss_function(model(inputs), targets)
    optimizer.step()
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


def _step_returns_graph(model, batch, loss_function, optimizer):
    inputs, targets = batch
    model.train()
    optimizer.zero_grad()
    loss = loss_function(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss


def _step_returns_nothing(model, batch, loss_function, optimizer):
    reference.train_step(model, batch, loss_function, optimizer)


def _step_loss_times_batch(model, batch, loss_function, optimizer):
    return reference.train_step(model, batch, loss_function, optimizer) * len(batch[0])


def _step_loss_afterwards(model, batch, loss_function, optimizer):
    reference.train_step(model, batch, loss_function, optimizer)
    with torch.no_grad():
        return loss_function(model(batch[0]), batch[1]).item()


def _step_softmax_first(model, batch, loss_function, optimizer):
    def on_probabilities(logits, targets):
        return loss_function(torch.softmax(logits, dim=1), targets)

    return reference.train_step(model, batch, on_probabilities, optimizer)


def _step_arguments_swapped(model, batch, loss_function, optimizer):
    return reference.train_step(model, batch, lambda a, b: loss_function(b, a), optimizer)


def _step_own_loss(model, batch, loss_function, optimizer):
    return reference.train_step(model, batch, F.cross_entropy, optimizer)


def _step_own_optimizer(model, batch, loss_function, optimizer):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return reference.train_step(model, batch, loss_function, optimizer)


def _step_by_closure(model, batch, loss_function, optimizer):
    x, y = batch
    model.train(True)

    def closure():
        for p in model.parameters():
            p.grad = None
        loss = loss_function(model.forward(x), y)
        loss.backward()
        return loss

    loss = closure()
    optimizer.step()
    return loss.detach()


def _step_by_autograd(model, batch, loss_function, optimizer, clip=None):
    model.train()
    params = list(model.parameters())
    loss = loss_function(model(batch[0]), batch[1])
    for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = grad
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


TRAIN_STEP = Exercise(
    slug="train_step",
    chapter=2,
    title="One training step",
    minutes=10,
    difficulty=1,
    reference=reference.train_step,
    observe=_observe_train_step,
    misconceptions=(
        Misconception(
            "never_zeroed",  # museum 2.4
            _step_never_zeroed,
            "You never zero the gradients. `backward` adds to what is there, so from the second "
            "step on you move along the sum of all gradients so far.",
        ),
        Misconception(
            "zeroed_between_backward_and_step",  # museum 2.5
            _step_zeroed_too_late,
            "You zero the gradients after `backward` and before `step`, so the optimizer finds "
            "none. No parameter ever moves, and no error says so.",
        ),
        Misconception(
            "zeroed_after_the_step",
            _step_zeroed_last,
            "You zero the gradients at the end of the step. What was in `.grad` before the first "
            "one, say from looking at a gradient by hand, is then part of it; zero before "
            "`backward`.",
        ),
        Misconception(
            "training_mode_not_set",
            _step_keeps_mode,
            "You leave the model in the mode that you find it in. After an evaluation that is "
            "evaluation mode, in which dropout is off and batch norm learns nothing of the batch.",
        ),
        Misconception(
            "evaluation_mode",
            _step_in_eval_mode,
            "You train in evaluation mode: dropout is off, and batch norm neither uses the batch's "
            "statistics nor keeps them.",
        ),
        Misconception(
            "no_backward",
            _step_no_backward,
            "You never call `backward`, so there are no gradients and the optimizer has nothing "
            "to step along.",
        ),
        Misconception(
            "no_step",
            _step_no_step,
            "You compute the gradients and never let the optimizer use them. The parameters stay "
            "where they were.",
        ),
        Misconception(
            "step_before_backward",
            _step_before_backward,
            "You call the optimizer before `backward`. It steps along the gradients of the batch "
            "before, or along none.",
        ),
        Misconception(
            "loss_with_its_graph",
            _step_returns_graph,
            "You return the loss as a tensor of the graph. Whoever collects these losses keeps the "
            "graph of every batch in memory; return a plain number.",
        ),
        Misconception(
            "nothing_returned",
            _step_returns_nothing,
            "You train and return nothing. The loop around this step wants the loss, as a float.",
        ),
        Misconception(
            "loss_times_batch_size",  # museum 2.24
            _step_loss_times_batch,
            "You return the loss multiplied by the batch size. The mean loss of the batch is asked "
            "for; the weighing is done by whoever averages over batches.",
        ),
        Misconception(
            "loss_after_the_step",
            _step_loss_afterwards,
            "You compute the loss a second time, after the step. That costs another forward pass, "
            "and batch norm sees the batch twice; return the loss that you differentiated.",
        ),
        Misconception(
            "softmax_before_the_loss",  # museum 2.1
            _step_softmax_first,
            "You apply softmax before the loss function. Cross-entropy does that itself, and a "
            "training step should hand on what the model returned.",
        ),
        Misconception(
            "targets_first",
            _step_arguments_swapped,
            "You call loss_function(targets, logits). The order is (logits, targets); for some "
            "losses the other one even runs.",
        ),
        Misconception(
            "always_cross_entropy",
            _step_own_loss,
            "You call cross-entropy whatever `loss_function` is. Use the one that you are given.",
        ),
        Misconception(
            "optimizer_of_its_own",  # museum 2.6
            _step_own_optimizer,
            "You step with an optimizer that you make yourself. The one you were given has the "
            "learning rate that was chosen, and its momentum must live on from step to step.",
        ),
    ),
    alternatives=(_step_by_closure, _step_by_autograd),
    hints=(
        "Six things happen, each in one line: mode, zero, forward, loss, backward, step. Which of "
        "them must come before `backward`, and which after?",
        "`model.train()` first. `optimizer.zero_grad()` anywhere before `loss.backward()`, and "
        "`optimizer.step()` after it.",
        "Unpack the batch into inputs and targets; loss = loss_function(model(inputs), targets); "
        "return `loss.item()`, a float that keeps no graph alive.",
    ),
)


def _one_use(batches):
    """A generator: no length, and only one pass."""
    yield from batches


def _observe_evaluate(evaluate, see):
    def watched(model, batches, loss=F.cross_entropy):
        graphs = []

        def loss_function(logits, targets):
            graphs.append(torch.is_tensor(logits) and logits.requires_grad)
            return loss(logits, targets)

        training, before = model.training, [v.clone() for v in model.state_dict().values()]
        see.call("(mean loss, accuracy)", evaluate, model, batches, loss_function)
        kept = [
            torch.equal(*pair) for pair in zip(model.state_dict().values(), before, strict=True)
        ]
        see.fact("parameters and running statistics are as they were", all(kept))
        see.fact("no parameter has received a gradient", not any(_gradients(model)))
        see.fact("no graph is recorded", not any(graphs))
        if training:
            see.fact("a model that was in training mode is so again", model.training)
        else:
            see.fact("a model that was in evaluation mode still is", not model.training)

    def batches_of(*sizes):
        return [(see.randn(size, 4), see.randint(0, 3, size)) for size in sizes]

    with see.probe("10 samples in batches of 4, 4 and 2; model in training mode"):
        watched(_small_network(see, dropout=0.5).train(), batches_of(4, 4, 2))
    with see.probe("13 samples in batches of 5, 5 and 3; model in evaluation mode"):
        watched(_small_network(see, dropout=0.5).eval(), batches_of(5, 5, 3))
    with see.probe("11 samples from a DataLoader, batch size 4; another loss function"):
        inputs, targets = see.randn(11, 4), see.randint(0, 3, 11)
        loader = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=4)
        watched(_small_network(see).train(), loader, F.multi_margin_loss)
    with see.probe("9 samples from a generator, in batches of 2, 6 and 1"):
        watched(_small_network(see).train(), _one_use(batches_of(2, 6, 1)))


def _gradients(model) -> list[bool]:
    return [p.grad is not None for p in model.parameters()]


def _evaluated(model, batches, loss_function):
    """Of each batch: (mean loss, number right, number of samples)."""
    rows = []
    for inputs, targets in batches:
        logits = model(inputs)
        right = (logits.argmax(dim=1) == targets).sum().item()
        rows.append((loss_function(logits, targets).item(), right, len(targets)))
    return rows


def _totals(rows) -> tuple[float, float]:
    samples = sum(n for _, _, n in rows)
    return sum(loss * n for loss, _, n in rows) / samples, sum(k for _, k, _ in rows) / samples


@contextmanager
def _evaluating(model):
    """Evaluation mode without a graph, and the old mode at the end."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(mode)


def _evaluate_mean_of_means(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] for r in rows) / len(rows), sum(r[1] / r[2] for r in rows) / len(rows)


def _evaluate_loss_over_batches(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] for r in rows) / len(rows), _totals(rows)[1]


def _evaluate_over_number_of_batches(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] for r in rows) / len(batches), sum(r[1] / r[2] for r in rows) / len(batches)


def _evaluate_loss_over_number_of_batches(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] for r in rows) / len(batches), _totals(rows)[1]


def _evaluate_accuracy_over_batches(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return _totals(rows)[0], sum(r[1] / r[2] for r in rows) / len(rows)


def _evaluate_over_the_dataset(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    samples = len(batches.dataset)
    return sum(r[0] * r[2] for r in rows) / samples, sum(r[1] for r in rows) / samples


def _evaluate_error_rate(model, batches, loss_function):
    loss, accuracy = reference.evaluate(model, batches, loss_function)
    return loss, 1 - accuracy


def _evaluate_full_batches(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] for r in rows) / len(rows), sum(r[1] for r in rows) / (len(rows) * rows[0][2])


def _evaluate_loss_over_samples(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] for r in rows) / sum(r[2] for r in rows), _totals(rows)[1]


def _evaluate_loss_summed(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return sum(r[0] * r[2] for r in rows), _totals(rows)[1]


def _evaluate_count(model, batches, loss_function):
    with _evaluating(model):
        rows = _evaluated(model, batches, loss_function)
    return _totals(rows)[0], sum(r[1] for r in rows)


def _evaluate_percent(model, batches, loss_function):
    loss, accuracy = reference.evaluate(model, batches, loss_function)
    return loss, 100 * accuracy


def _evaluate_swapped(model, batches, loss_function):
    loss, accuracy = reference.evaluate(model, batches, loss_function)
    return accuracy, loss


def _evaluate_last_batch(model, batches, loss_function):
    with _evaluating(model):
        return _totals(_evaluated(model, batches, loss_function)[-1:])


def _evaluate_first_batch(model, batches, loss_function):
    with _evaluating(model):
        return _totals(_evaluated(model, batches, loss_function)[:1])


def _evaluate_in_training_mode(model, batches, loss_function):
    with torch.no_grad():
        return _totals(_evaluated(model, batches, loss_function))


def _evaluate_left_in_eval(model, batches, loss_function):
    model.eval()
    with torch.no_grad():
        return _totals(_evaluated(model, batches, loss_function))


def _evaluate_always_train(model, batches, loss_function):
    result = _evaluate_left_in_eval(model, batches, loss_function)
    model.train()
    return result


def _evaluate_with_graph(model, batches, loss_function):
    mode = model.training
    model.eval()
    result = _totals(_evaluated(model, batches, loss_function))
    model.train(mode)
    return result


def _evaluate_argmax_of_batch(model, batches, loss_function):
    with _evaluating(model):
        rows = []
        for inputs, targets in batches:
            logits = model(inputs)
            loss = loss_function(logits, targets).item()
            rows.append((loss, (logits.argmax(dim=0) == targets).sum().item(), len(targets)))
        return _totals(rows)


def _evaluate_softmax_first(model, batches, loss_function):
    def on_probabilities(logits, targets):
        return loss_function(torch.softmax(logits, dim=1), targets)

    return reference.evaluate(model, batches, on_probabilities)


@torch.inference_mode()
def _evaluate_at_once(model, batches, loss_function, verbose=False):
    mode = model.training
    model.train(False)
    pairs = [(model(x), y) for x, y in batches]
    model.train(mode)
    logits, targets = torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs])
    loss = loss_function(logits, targets)
    return [loss, (logits.argmax(-1) == targets).double().mean()]


def _evaluate_by_means(model, batches, loss_function):
    with _evaluating(model):
        loss, accuracy, samples = 0.0, 0.0, 0
        for x, y in batches:
            logits = model(x)
            loss += loss_function(logits, y) * len(y)
            accuracy += (logits.argmax(1) == y).float().mean() * len(y)
            samples += len(y)
    return loss / samples, accuracy / samples


def _evaluate_try(model, batches, loss_function):
    mode = model.training
    model.eval()
    try:
        losses, hits = [], []
        for x, y in batches:
            with torch.no_grad():
                z = model(x)
                losses += [loss_function(z, y).item()] * len(y)
                hits += (z.max(dim=1).indices == y).tolist()
        return np.mean(losses), np.mean(hits)
    finally:
        model.train(mode)


EVALUATE = Exercise(
    slug="evaluate",
    chapter=2,
    title="Evaluate without leaving a trace",
    minutes=15,
    difficulty=2,
    reference=reference.evaluate,
    observe=_observe_evaluate,
    misconceptions=(
        Misconception(
            "mean_of_batch_means",  # museum 2.F6, 2.19
            _evaluate_mean_of_means,
            "You average the batches' averages. The last batch is smaller, so each of its samples "
            "counts more than the others; weigh by the number of samples.",
        ),
        Misconception(
            "loss_divided_by_batches",  # museum 2.F6
            _evaluate_loss_over_batches,
            "Your accuracy is right, and your loss is the mean of the batches' means. Each loss "
            "stands for as many samples as its batch holds, and the last batch holds fewer.",
        ),
        Misconception(
            "all_batches_taken_as_full",  # museum 2.19
            _evaluate_full_batches,
            "You divide by the number of batches times the size of the first one, as if the last "
            "batch were full. Count the samples that you see.",
        ),
        Misconception(
            "loss_divided_by_samples",
            _evaluate_loss_over_samples,
            "You add up mean losses, one per batch, and divide by the number of samples. Each mean "
            "must first be multiplied by the size of its batch.",
        ),
        Misconception(
            "loss_not_divided",
            _evaluate_loss_summed,
            "Your loss is the sum over all samples. Divide by their number, so that test sets of "
            "another size can be compared.",
        ),
        Misconception(
            "number_of_right_answers",
            _evaluate_count,
            "You return how many samples are right. The accuracy is their fraction.",
        ),
        Misconception(
            "percent",
            _evaluate_percent,
            "You return the accuracy in percent. Asked for is the fraction, between 0 and 1.",
        ),
        Misconception(
            "accuracy_first",
            _evaluate_swapped,
            "You return (accuracy, loss). Asked for is (loss, accuracy), and whoever unpacks the "
            "two relies on that order.",
        ),
        Misconception(
            "last_batch_only",
            _evaluate_last_batch,
            "Your result is that of the last batch alone: something is overwritten in the loop "
            "that should be added up.",
        ),
        Misconception(
            "first_batch_only",
            _evaluate_first_batch,
            "Your result is that of the first batch alone: the `return` stands inside the loop.",
        ),
        Misconception(
            "training_mode",  # museum 2.12, 2.13
            _evaluate_in_training_mode,
            "You evaluate in the mode the model is in. In training mode dropout makes the result "
            "random, and batch norm looks at the batch and moves its running statistics, so that "
            "looking changes the model.",
        ),
        Misconception(
            "left_in_evaluation_mode",
            _evaluate_left_in_eval,
            "You leave the model in evaluation mode. Training goes on without dropout and batch "
            "norm unless somebody notices; put back the mode that you found.",
        ),
        Misconception(
            "always_training_mode_afterwards",
            _evaluate_always_train,
            "You put the model into training mode at the end, whatever mode it was in. A finished "
            "model that was in evaluation mode should stay there.",
        ),
        Misconception(
            "graph_recorded",
            _evaluate_with_graph,
            "You compute the right numbers and record a graph that nobody needs. It costs memory "
            "and time for every batch; switch recording off.",
        ),
        Misconception(
            "argmax_over_the_batch",  # museum 2.26
            _evaluate_argmax_of_batch,
            "You take the argmax along axis 0, over the samples. That compares samples and not "
            "classes, and runs without an error only where the batch has as many of the one as of "
            "the other; the classes are axis 1.",
        ),
        Misconception(
            "softmax_before_the_loss",  # museum 2.1
            _evaluate_softmax_first,
            "You apply softmax before the loss function. Cross-entropy does that itself: its loss "
            "comes out too large for good models.",
        ),
        Misconception(
            "divided_by_the_number_of_batches",
            _evaluate_over_number_of_batches,
            "You average the batches' averages, over `len(batches)`. The last batch is smaller, "
            "so each of its samples counts more; and a generator has no length. Count samples as "
            "they come.",
        ),
        Misconception(
            "loss_divided_by_the_number_of_batches",
            _evaluate_loss_over_number_of_batches,
            "You divide the sum of the batches' mean losses by `len(batches)`. Each loss stands "
            "for as many samples as its batch holds, and the last batch holds fewer; besides, a "
            "generator has no length.",
        ),
        Misconception(
            "mean_of_batch_accuracies",
            _evaluate_accuracy_over_batches,
            "Your loss is right, and your accuracy is the mean of the batches' accuracies. The "
            "last batch is smaller, so each of its samples counts more: count right answers and "
            "samples.",
        ),
        Misconception(
            "asks_for_the_dataset",
            _evaluate_over_the_dataset,
            "You ask `batches` for its `dataset`, which only a DataLoader has. Any iterable of "
            "(inputs, targets) may come, a list for one: count the samples as they pass.",
        ),
        Misconception(
            "error_rate",
            _evaluate_error_rate,
            "You return the fraction of wrong answers. The accuracy is the fraction of right ones.",
        ),
    ),
    alternatives=(_evaluate_at_once, _evaluate_by_means, _evaluate_try),
    hints=(
        "Which three things about a model can an evaluation change by mistake? Its mode, its "
        "running statistics, and the gradients.",
        "Remember `model.training`, call `model.eval()`, go through the batches inside "
        "`torch.no_grad()`, and put the mode back with `model.train(remembered)`.",
        "Per batch: add loss × number of samples, add the number of right answers, add the number "
        "of samples. Divide once, at the end.",
    ),
    rtol=1e-6,
    atol=1e-6,
)

# --- what keeps a deep or large network in shape ------------------------------------------------


def _near(count: float, n: int, p: float, sigmas: float = 5) -> bool:
    """Whether `count` of `n` draws agrees with probability `p`: 5 σ errs once in two million."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


def _observe_dropout(Dropout, see):
    for p, shape, dtype in ((0.3, (200, 150), torch.float64), (0.8, (40, 30, 25), torch.float32)):
        with see.probe(f"p = {p}, x of shape {shape}, {dtype}"):
            layer = Dropout(p)
            see.fact("what it makes is an nn.Module", isinstance(layer, nn.Module))
            x = see.randn(*shape, dtype=dtype)
            layer.eval()
            see.call("the output in evaluation mode", layer, x)
            layer.train()
            x.requires_grad_()
            out = _output(see, "the output in training mode", layer, x)
            n, dropped, other = x.numel(), out == 0, layer(x) == 0
            factors = (out / x)[~dropped].detach()
            middle = factors.median().item() if factors.numel() else 0.0
            see("the factor of the values that are kept", round(middle, 4))
            one = torch.allclose(factors, torch.full_like(factors, middle), rtol=1e-3)
            see.fact("all values that are kept have the same factor", one)
            most = "zeroed" if int(dropped.sum()) > n / 2 else "kept"
            see("what happens to most values", most)
            fraction = "of the values are 0, up to chance (5 standard deviations)"
            see.fact(f"{p:.0%} {fraction}", _near(dropped.sum(), n, p))
            rows, columns = dropped.flatten(1).sum(1), dropped.flatten(0, -2).sum(0)
            fair = all(_near(k, n // len(rows), p, 6) for k in rows.tolist())
            see.fact("values of one sample are dropped independently of one another", fair)
            fair = all(_near(k, n // len(columns), p, 6) for k in columns.tolist())
            see.fact("samples are dropped from independently of one another", fair)
            both = _near((dropped & other).sum(), n, p * p)
            see.fact("a second call draws anew", both)
            upstream = see.randn(*shape, dtype=dtype)
            (grad,) = torch.autograd.grad(out, x, upstream)
            see.fact("values that are dropped receive no gradient", not grad[dropped].any())
            passed_on = torch.allclose(grad[~dropped], upstream[~dropped] / (1 - p), rtol=1e-5)
            see.fact("the gradient of values that are kept has the same factor", passed_on)
            layer.eval()
            see.call("the output in evaluation mode again", layer, x.detach())
    with see.probe("p = 0, in training mode"):
        see.call("the output", Dropout(0.0).train(), see.randn(5, 4))
    with see.probe("p = 1, in training mode"):
        see.call("the output", Dropout(1.0).train(), see.randn(5, 4))
    with see.probe("p = 0.5, 400 values, ten times"):
        layer, x = Dropout(0.5).train(), see.randn(20, 20)
        counts = {int((layer(x) == 0).sum()) for _ in range(10)}
        see.fact("how many values are 0 varies, as chance does", len(counts) > 1)
    with see.probe("p = 0.5 inside nn.Sequential"):
        model = nn.Sequential(nn.Linear(3, 4), Dropout(0.5)).double().eval()
        x = see.randn(6, 3)
        same = torch.equal(model(x), model(x))
        see.fact("model.eval() reaches it: two calls give the same", same)
        model.train()
        see.fact("model.train() reaches it: two calls differ", not torch.equal(model(x), model(x)))


class _DropoutWith(reference.Dropout):
    """Dropout whose training part a subclass writes in its own way."""

    def forward(self, x):
        return self.dropped(x) if self.training else x

    def keep(self, x):
        return torch.rand_like(x) >= self.p

    def scale(self):
        return 1 / (1 - self.p) if self.p < 1 else 0.0


class _DropoutNoScale(_DropoutWith):
    def dropped(self, x):
        return x * self.keep(x)


class _DropoutAlways(_DropoutWith):
    def forward(self, x):
        return x * self.keep(x) * self.scale()


class _DropoutNever(_DropoutWith):
    def dropped(self, x):
        return x


class _DropoutSwitched(_DropoutWith):
    def forward(self, x):
        return x if self.training else x * self.keep(x) * self.scale()


class _DropoutKeepsP(_DropoutWith):
    def dropped(self, x):
        return x * (torch.rand_like(x) < self.p) / max(self.p, 1e-12)


class _DropoutKeepsPWrongScale(_DropoutWith):
    def dropped(self, x):
        return x * (torch.rand_like(x) < self.p) * self.scale()


class _DropoutKeepsPInBetween(_DropoutWith):
    def dropped(self, x):
        if self.p in (0, 1):
            return x * (1 - self.p)
        return x * (torch.rand_like(x) < self.p) * self.scale()


class _DropoutNormalDraws(_DropoutWith):
    def dropped(self, x):
        if self.p in (0, 1):
            return x * (1 - self.p)
        return x * (torch.randn_like(x) > self.p) * self.scale()


class _DropoutDividesByP(_DropoutWith):
    def dropped(self, x):
        return x * self.keep(x) / self.p if self.p > 0 else x


class _DropoutTimesKeep(_DropoutWith):
    def dropped(self, x):
        return x * self.keep(x) * (1 - self.p)


class _DropoutScalesInEval(_DropoutWith):
    def forward(self, x):
        return x * self.keep(x) if self.training else x * (1 - self.p)


class _DropoutScalesTwice(_DropoutWith):
    def forward(self, x):
        return x * self.keep(x) * self.scale() if self.training else x * (1 - self.p)


class _DropoutOneMask(_DropoutWith):
    def dropped(self, x):
        if getattr(self, "mask", None) is None or self.mask.shape != x.shape:
            self.mask = self.keep(x)
        return x * self.mask * self.scale()


class _DropoutRows(_DropoutWith):
    def dropped(self, x):
        return x * (torch.rand(len(x), *[1] * (x.ndim - 1)) >= self.p) * self.scale()


class _DropoutColumns(_DropoutWith):
    def dropped(self, x):
        return x * (torch.rand(x.shape[-1]) >= self.p) * self.scale()


class _DropoutDetached(_DropoutWith):
    def dropped(self, x):
        return x + (x * self.keep(x) * self.scale() - x).detach()


class _DropoutNanAtOne(_DropoutWith):
    def dropped(self, x):
        return x * self.keep(x) / (torch.ones(()) - self.p)


class _DropoutDividesByZero(_DropoutWith):
    def dropped(self, x):
        return x * self.keep(x) * (1 / (1 - self.p))


class _DropoutInPlace(_DropoutWith):
    def dropped(self, x):
        x.data[~self.keep(x)] = 0
        return x * self.scale()


class _DropoutExactNumber(_DropoutWith):
    def keep(self, x):
        order = torch.randperm(x.numel()).view(x.shape)
        return order >= round(self.p * x.numel())

    def dropped(self, x):
        return x * self.keep(x) * self.scale()


class _DropoutBernoulli(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return torch.zeros_like(x)
        keep = torch.bernoulli(torch.full_like(x, 1 - self.p))
        return torch.where(keep.bool(), x / (1 - self.p), 0.0)


class _DropoutMaskedFill(nn.Module):
    def __init__(self, p, inplace=False):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.training:
            drop = torch.from_numpy(np.random.rand(*x.shape)) < self.p
            x = x.masked_fill(drop, 0.0) / max(1 - self.p, 1e-9)
        return x


class _DropoutFunctional(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)


DROPOUT = Exercise(
    slug="dropout",
    chapter=2,
    title="Dropout",
    minutes=15,
    difficulty=2,
    reference=reference.Dropout,
    observe=_observe_dropout,
    misconceptions=(
        Misconception(
            "not_scaled",
            _DropoutNoScale,
            "You zero some values and leave the others as they are. The sum that the next layer "
            "sees is then smaller in training than in evaluation; scale up what is kept.",
        ),
        Misconception(
            "active_in_evaluation",  # museum 2.12
            _DropoutAlways,
            "You drop values in evaluation mode too. Predictions become random: five evaluations "
            "of one model give five accuracies; look at `self.training`.",
        ),
        Misconception(
            "never_active",
            _DropoutNever,
            "Your layer passes everything on in training mode too. There each value should be "
            "zeroed with probability p.",
        ),
        Misconception(
            "modes_swapped",
            _DropoutSwitched,
            "You drop values in evaluation mode and pass everything in training. It should be the "
            "other way round.",
        ),
        Misconception(
            "p_is_kept",  # museum 2.23
            _DropoutKeepsP,
            "You keep values with probability p and drop the others. In torch p is the "
            "probability to drop: with p = 0.9, meant as here, nine tenths are gone.",
        ),
        Misconception(
            "p_is_kept_and_the_scale_is_not",  # museum 2.23
            _DropoutKeepsPWrongScale,
            "You keep values with probability p and scale as if they were dropped with "
            "probability p. p is the probability to drop: your comparison is the wrong way round.",
        ),
        Misconception(
            "divided_by_p",
            _DropoutDividesByP,
            "You divide what is kept by p. A value is kept with probability 1 − p: divide by that, "
            "and the mean stays as it is.",
        ),
        Misconception(
            "multiplied_by_the_kept_fraction",
            _DropoutTimesKeep,
            "You make what is kept smaller by 1 − p. Dropping has made the sum smaller already: "
            "divide, to make up for it.",
        ),
        Misconception(
            "scaled_in_evaluation",
            _DropoutScalesInEval,
            "You scale in evaluation mode instead of in training, as the first paper did. Both "
            "keep the mean; asked for is the inverted form, which leaves evaluation untouched.",
        ),
        Misconception(
            "scaled_in_both",
            _DropoutScalesTwice,
            "You scale up in training and down in evaluation. One of the two makes up for the "
            "other's absence; evaluation mode is the identity.",
        ),
        Misconception(
            "one_mask_for_ever",
            _DropoutOneMask,
            "You draw the mask once and use it again. That is a smaller network, always the same; "
            "draw anew at every call.",
        ),
        Misconception(
            "whole_samples",
            _DropoutRows,
            "You drop whole samples: one draw decides for all values of a row. Each value has a "
            "draw of its own.",
        ),
        Misconception(
            "whole_features",
            _DropoutColumns,
            "You drop the same features for every sample of the batch. Each value has a draw of "
            "its own.",
        ),
        Misconception(
            "always_the_same_number",
            _DropoutExactNumber,
            "You drop exactly the fraction p of the values, chosen at random. Each value should "
            "have a draw of its own, so that their number varies.",
        ),
        Misconception(
            "gradient_passes_everywhere",
            _DropoutDetached,
            "Your output is right, and its gradient ignores the mask: dropped values receive a "
            "gradient too. The mask must multiply inside the graph.",
        ),
        Misconception(
            "nan_at_p_1",
            _DropoutNanAtOne,
            "With p = 1 you divide 0 by 0 and return NaN. Everything is dropped then: zeros.",
        ),
        Misconception(
            "division_by_zero_at_p_1",
            _DropoutDividesByZero,
            "With p = 1 your scale is 1/0. Everything is dropped then: zeros.",
        ),
        Misconception(
            "input_overwritten",
            _DropoutInPlace,
            "You write the zeros into the input itself. Whoever else uses that tensor, a residual "
            "connection for one, loses its values.",
        ),
        Misconception(
            "p_is_kept_except_at_the_ends",
            _DropoutKeepsPInBetween,
            "You keep values with probability p, except where p is 0 or 1. p is the probability "
            "to drop: your comparison, or the probability that you draw with, is the wrong way "
            "round.",
        ),
        Misconception(
            "normal_draws",
            _DropoutNormalDraws,
            "You compare normal random numbers with p. They are below p more often than p says: "
            "half of them are below 0. The draw has to be uniform between 0 and 1.",
        ),
    ),
    alternatives=(_DropoutBernoulli, _DropoutMaskedFill, _DropoutFunctional),
    hints=(
        "Two modes: `self.training` tells which one. In evaluation mode the layer returns x as it "
        "is.",
        "`torch.rand_like(x)` is below p with probability p. What must the kept values be "
        "multiplied by, so that the mean over many draws is x?",
        "keep = torch.rand_like(x) >= self.p; return x · keep · 1/(1 − p). Mind p = 1, where "
        "everything is zero and 1/(1 − p) does not exist.",
    ),
)


def _observe_batch_norm_1d(BatchNorm1d, see):
    def made(features, **options):
        layer = BatchNorm1d(features, **options).double()
        with torch.no_grad():
            layer.weight.copy_(0.5 + see.rand(features))
            layer.bias.copy_(see.randn(features))
        return layer

    def batch(layer, label, n, spread=2.0, shift=1.0):
        x = (spread * see.randn(n, len(layer.weight)) + shift).requires_grad_()
        out = see.call(f"the output for {label}", layer, x)
        see.gradients(label, out, x=x, weight=layer.weight, bias=layer.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            see(f"{name} after {label}", getattr(layer, name))
        graph = layer.running_mean.requires_grad or layer.running_var.requires_grad
        see.fact(f"the running statistics after {label} hold no graph", not graph)

    with see.probe("a new layer for 4 features"):
        layer = BatchNorm1d(4)
        see.fact("what it makes is an nn.Module", isinstance(layer, nn.Module))
        see("its state_dict", dict(sorted(layer.state_dict().items())))
        see("the names of its parameters", sorted(name for name, _ in layer.named_parameters()))
    with see.probe("three training batches of 5, 8 and 3 samples, then evaluation"):
        layer = made(4)
        for k, n in enumerate((5, 8, 3), start=1):
            batch(layer, f"batch {k}", n)
        layer.eval()
        batch(layer, "a batch in evaluation mode", 6, spread=3, shift=-1)
        batch(layer, "a single sample in evaluation mode", 1)
        layer.train()
        batch(layer, "a batch in training mode again", 7)
    with see.probe("eps = 0.1, momentum = 0.3, values of size 0.2"):
        layer = made(3, eps=0.1, momentum=0.3)
        batch(layer, "batch 1", 4, spread=0.2, shift=0.5)
        batch(layer, "batch 2", 4, spread=0.2, shift=0.5)
        layer.eval()
        batch(layer, "a batch in evaluation mode", 5)


class _BNWith(reference.BatchNorm1d):
    """Batch norm in pieces, of which a subclass changes one."""

    def statistics(self, x):
        return x.mean(dim=0), x.var(dim=0, correction=0)

    def tracked_var(self, x, var):
        return var * len(x) / (len(x) - 1)

    def track(self, x, mean, var):
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(self.tracked_var(x, var), self.momentum)
            self.num_batches_tracked += 1

    def normalise(self, x, mean, var):
        return (x - mean) / torch.sqrt(var + self.eps)

    def affine(self, x):
        return self.weight * x + self.bias

    def forward(self, x):
        if self.training:
            mean, var = self.statistics(x)
            self.track(x, mean, var)
        else:
            mean, var = self.running_mean, self.running_var
        return self.affine(self.normalise(x, mean, var))


class _BNUnbiased(_BNWith):
    def statistics(self, x):
        return x.mean(dim=0), x.var(dim=0)

    def tracked_var(self, x, var):
        return var


class _BNBiasedRunning(_BNWith):
    def tracked_var(self, x, var):
        return var


class _BNMomentumSwapped(_BNWith):
    def track(self, x, mean, var):
        with torch.no_grad():
            self.running_mean.lerp_(mean, 1 - self.momentum)
            self.running_var.lerp_(self.tracked_var(x, var), 1 - self.momentum)
            self.num_batches_tracked += 1


class _BNNoRunning(_BNWith):
    def track(self, x, mean, var):
        self.num_batches_tracked += 1


class _BNAddsUp(_BNWith):
    def track(self, x, mean, var):
        with torch.no_grad():
            self.running_mean += self.momentum * mean
            self.running_var += self.momentum * self.tracked_var(x, var)
            self.num_batches_tracked += 1


class _BNTracksDeviation(_BNWith):
    def tracked_var(self, x, var):
        return x.std(dim=0)


class _BNByStd(_BNWith):
    def normalise(self, x, mean, var):
        if self.training:
            return (x - mean) / (x.std(dim=0) + self.eps)
        return (x - mean) / (var.sqrt() + self.eps)


class _BNReplaced(_BNWith):
    def track(self, x, mean, var):
        self.running_mean, self.running_var = mean.detach(), self.tracked_var(x, var).detach()
        self.num_batches_tracked += 1


class _BNNotCounted(_BNWith):
    def track(self, x, mean, var):
        super().track(x, mean, var)
        self.num_batches_tracked -= 1


class _BNBatchInEval(_BNWith):
    def forward(self, x):
        mean, var = self.statistics(x)
        if self.training:
            self.track(x, mean, var)
        return self.affine(self.normalise(x, mean, var))


class _BNRunningInTraining(_BNWith):
    def forward(self, x):
        if self.training:
            self.track(x, *self.statistics(x))
        return self.affine(self.normalise(x, self.running_mean, self.running_var))


class _BNTracksInEval(_BNWith):
    def forward(self, x):
        mean, var = self.statistics(x)
        if len(x) > 1:
            self.track(x, mean, var)
        if not self.training:
            mean, var = self.running_mean, self.running_var
        return self.affine(self.normalise(x, mean, var))


class _BNPerSample(_BNWith):
    def forward(self, x):
        if self.training:
            self.track(x, *self.statistics(x))
        mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
        return self.affine(self.normalise(x, mean, var))


class _BNOverAll(_BNWith):
    def statistics(self, x):
        return x.mean().expand(x.shape[1]), x.var(correction=0).expand(x.shape[1])


class _BNWrongAxis(_BNWith):
    def statistics(self, x):
        return x.mean(dim=1), x.var(dim=1, correction=0)


class _BNEpsOutside(_BNWith):
    def normalise(self, x, mean, var):
        return (x - mean) / (torch.sqrt(var) + self.eps)


class _BNNoEps(_BNWith):
    def normalise(self, x, mean, var):
        return (x - mean) / torch.sqrt(var)


class _BNFixedEps(_BNWith):
    def normalise(self, x, mean, var):
        return (x - mean) / torch.sqrt(var + 1e-5)


class _BNNoRoot(_BNWith):
    def normalise(self, x, mean, var):
        return (x - mean) / (var + self.eps)


class _BNDetached(_BNWith):
    def normalise(self, x, mean, var):
        return (x - mean.detach()) / torch.sqrt(var.detach() + self.eps)


class _BNNoAffine(_BNWith):
    def affine(self, x):
        return x


class _BNTracksGraph(_BNWith):
    def track(self, x, mean, var):
        m = self.momentum
        self.running_mean = (1 - m) * self.running_mean + m * mean
        self.running_var = (1 - m) * self.running_var + m * self.tracked_var(x, var)
        self.num_batches_tracked += 1


class _BNNoBuffers(_BNWith):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__(num_features, eps, momentum)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, value)


class _BNRunningAsParameters(_BNWith):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__(num_features, eps, momentum)
        for name in ("running_mean", "running_var"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(value))


class _BNVarStartsAtZero(_BNWith):
    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__(num_features, eps, momentum)
        self.running_var.zero_()


class _BNByHand(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, device=None):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))

    def forward(self, x):
        n = x.shape[0]
        if self.training:
            mean = x.sum(0) / n
            centred = x - mean
            squares = (centred**2).sum(0)
            m = self.momentum
            self.running_mean = (1 - m) * self.running_mean + m * mean.detach()
            self.running_var = (1 - m) * self.running_var + m * squares.detach() / (n - 1)
            self.num_batches_tracked = self.num_batches_tracked + 1
            return centred * torch.rsqrt(squares / n + self.eps) * self.weight + self.bias
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return x * scale + (self.bias - self.running_mean * scale)


class _BNFunctional(reference.BatchNorm1d):
    def forward(self, x):
        self.num_batches_tracked.add_(int(self.training))
        running = self.running_mean, self.running_var
        options = self.training, self.momentum, self.eps
        return F.batch_norm(x, *running, self.weight, self.bias, *options)


class _BNFromTorch(nn.BatchNorm1d):
    pass


BATCH_NORM_1D = Exercise(
    slug="batch_norm_1d",
    chapter=2,
    title="Batch normalisation",
    minutes=30,
    difficulty=4,
    reference=reference.BatchNorm1d,
    observe=_observe_batch_norm_1d,
    misconceptions=(
        Misconception(
            "normalised_by_the_unbiased_variance",
            _BNUnbiased,
            "You normalise with the variance that divides by n − 1. torch normalises with the one "
            "that divides by n and keeps the other for running_var.",
        ),
        Misconception(
            "running_var_biased",
            _BNBiasedRunning,
            "Your output is right, and running_var takes the variance that divides by n. It is an "
            "estimate for all data to come, so torch gives it the one that divides by n − 1.",
        ),
        Misconception(
            "momentum_the_other_way_round",
            _BNMomentumSwapped,
            "You keep the share `momentum` of the running statistics. In batch norm momentum is "
            "the share of the new batch: running moves 10 % towards it at 0.1.",
        ),
        Misconception(
            "running_statistics_never_move",
            _BNNoRunning,
            "You never update running_mean and running_var. In evaluation mode the layer then "
            "normalises with mean 0 and variance 1, whatever it has seen.",
        ),
        Misconception(
            "running_statistics_replaced",
            _BNReplaced,
            "You overwrite the running statistics with those of the last batch. They should move "
            "towards them by the share `momentum`.",
        ),
        Misconception(
            "batches_not_counted",
            _BNNotCounted,
            "You never count `num_batches_tracked` up. Each batch in training adds 1.",
        ),
        Misconception(
            "batch_statistics_in_evaluation",  # museum 2.13
            _BNBatchInEval,
            "You normalise with the batch's statistics in evaluation mode too. Then a prediction "
            "depends on what else is in the batch, and a single sample becomes its bias.",
        ),
        Misconception(
            "running_statistics_in_training",
            _BNRunningInTraining,
            "You normalise with the running statistics in training mode. There the batch's own "
            "count, and the gradient flows through them.",
        ),
        Misconception(
            "evaluation_moves_the_statistics",  # museum 2.13
            _BNTracksInEval,
            "You update the running statistics in evaluation mode as well. Looking at the test "
            "data then changes the model.",
        ),
        Misconception(
            "over_the_features",
            _BNPerSample,
            "You normalise each sample over its features, which is layer norm. Batch norm takes "
            "mean and variance of each feature over the batch.",
        ),
        Misconception(
            "over_everything",
            _BNOverAll,
            "You take one mean and one variance over the whole batch and all features. Each "
            "feature has its own: reduce axis 0 only.",
        ),
        Misconception(
            "wrong_axis",
            _BNWrongAxis,
            "You reduce axis 1, the features, and get one mean per sample, which does not fit the "
            "(num_features,) statistics. Reduce axis 0, the batch.",
        ),
        Misconception(
            "eps_outside_the_root",
            _BNEpsOutside,
            "You add eps to the standard deviation. It belongs under the root, with the variance.",
        ),
        Misconception(
            "no_eps",
            _BNNoEps,
            "You never use eps. A feature that is constant in a batch is then 0/0: NaN.",
        ),
        Misconception(
            "eps_fixed",
            _BNFixedEps,
            "You write 1e-5 where the constructor's `eps` belongs, so that no other value has an "
            "effect.",
        ),
        Misconception(
            "divided_by_the_variance",
            _BNNoRoot,
            "You divide by the variance. Its root, the standard deviation, is what brings a "
            "feature to variance 1.",
        ),
        Misconception(
            "statistics_detached",
            _BNDetached,
            "Your output is right, and its gradient takes mean and variance for constants. They "
            "depend on x: detach only what goes into the running statistics.",
        ),
        Misconception(
            "no_weight_and_bias",
            _BNNoAffine,
            "You normalise and stop. The result is scaled by `weight` and shifted by `bias`, "
            "without which a layer could not have any other mean and deviation.",
        ),
        Misconception(
            "running_statistics_hold_the_graph",
            _BNTracksGraph,
            "Your numbers are right, and the running statistics keep the graph of every batch so "
            "far: memory grows with each step. Update them without recording.",
        ),
        Misconception(
            "plain_attributes",
            _BNNoBuffers,
            "You keep the running statistics as plain tensors. They are missing from `state_dict`, "
            "so a saved model forgets them, and `.to(device)` leaves them behind; register them "
            "as buffers.",
        ),
        Misconception(
            "running_statistics_as_parameters",
            _BNRunningAsParameters,
            "You make the running statistics parameters. An optimizer would change them, weight "
            "decay for one; they are buffers.",
        ),
        Misconception(
            "running_var_starts_at_0",
            _BNVarStartsAtZero,
            "You start running_var at 0. It starts at 1, the variance of a feature about which "
            "nothing is known yet.",
        ),
        Misconception(
            "running_statistics_add_up",
            _BNAddsUp,
            "You add the batch's share to the running statistics and keep all of the old ones, so"
            " that they grow without end. The old ones keep the share 1 − momentum.",
        ),
        Misconception(
            "running_var_holds_the_deviation",
            _BNTracksDeviation,
            "Your running_var takes the standard deviation. It is the variance that is kept, and "
            "whose root is taken in evaluation mode.",
        ),
        Misconception(
            "std_plus_eps",
            _BNByStd,
            "You divide by `std` plus eps. `std` divides by n − 1 unless told otherwise, and eps "
            "belongs under the root with the variance, not beside it.",
        ),
    ),
    alternatives=(_BNByHand, _BNFunctional, _BNFromTorch),
    hints=(
        "`weight` and `bias` are nn.Parameter; `running_mean`, `running_var` and "
        "`num_batches_tracked` are buffers: `self.register_buffer(name, tensor)`.",
        "Training: mean and variance over axis 0. Divide by n to normalise, and by n − 1 for "
        "running_var (`x.var(dim=0, correction=…)`). Evaluation: the running ones.",
        "running = (1 − momentum)·running + momentum·batch, inside torch.no_grad(). Output: "
        "weight·(x − mean)/√(var + eps) + bias, with mean and var inside the graph.",
    ),
)


def _observe_early_stopping(EarlyStopping, see):
    nan = math.nan
    for patience, min_delta, losses in (
        (3, None, (2.5, 2.0, 2.25, 1.5, 1.75, 1.6, 1.7)),
        (1, None, (3.0, 2.0, 2.5)),
        (2, None, (1.5, 1.0, 1.25, 1.125, 0.5)),
        (2, None, (1.0, 1.0, 1.0, 1.0, 1.0)),
        (2, 0.5, (2.0, 2.25, 2.375)),
        (2, 0.25, (1.0, 0.875, 0.5, 0.25, 0.125)),
        (3, 0.5, (4.0, 3.75, 3.625, 3.25, 3.0, 2.875, 2.8125)),
        (2, 0.125, (-1.0, -1.5, -1.0, -2.0, -2.0625, -2.125)),
        (2, None, (1.0, nan, nan)),
        (2, None, (1.0, nan, 0.5, 0.75, nan)),
        (2, None, (nan, 0.75, 0.5, 0.625, 0.75)),
        (2, None, (nan, nan)),
    ):
        options = {} if min_delta is None else {"min_delta": min_delta}
        told = "" if min_delta is None else f", min_delta {min_delta}"
        with see.probe(f"patience {patience}{told}, losses {', '.join(map(str, losses))}"):
            stopping = EarlyStopping(patience, **options)
            for epoch, loss in enumerate(losses, start=1):
                stop = stopping.step(loss)
                word = stop if stop is None else ("stop" if stop else "go on")
                see(f"the answer after epoch {epoch}", word)
                see(f"best after epoch {epoch}", stopping.best)
                see(f"best_epoch after epoch {epoch}", stopping.best_epoch)
                if stop:
                    break


class _StopWith(reference.EarlyStopping):
    """Early stopping with a counter, of which a subclass changes one part."""

    def __init__(self, patience, min_delta=0.0):
        super().__init__(patience, min_delta)
        self.waited = 0

    def improved(self, loss):
        return loss < self.best - self.min_delta

    def accept(self, loss):
        self.best, self.best_epoch, self.waited = loss, self.epoch, 0

    def refuse(self, loss):
        self.waited += 1

    def over(self):
        return self.waited >= self.patience

    def step(self, validation_loss):
        self.epoch += 1
        if self.improved(validation_loss):
            self.accept(validation_loss)
        else:
            self.refuse(validation_loss)
        return self.over()


class _StopNotReset(_StopWith):
    def accept(self, loss):
        self.best, self.best_epoch = loss, self.epoch


class _StopPreviousLoss(_StopWith):
    last = math.inf

    def step(self, validation_loss):
        self.epoch += 1
        if validation_loss < self.last - self.min_delta:
            self.waited = 0
        else:
            self.waited += 1
        if validation_loss < self.best - self.min_delta:
            self.best, self.best_epoch = validation_loss, self.epoch
        self.last = validation_loss
        return self.over()


class _StopTiesImprove(_StopWith):
    def improved(self, loss):
        return loss <= self.best - self.min_delta


class _StopOneLate(_StopWith):
    def over(self):
        return self.waited > self.patience


class _StopAtOnce(_StopWith):
    def over(self):
        return self.waited >= 1


class _StopNever(_StopWith):
    def over(self):
        return False


class _StopNanImproves(_StopWith):
    def improved(self, loss):
        return not loss >= self.best - self.min_delta


class _StopOnlyWorseCounts(_StopWith):
    def improved(self, loss):
        return not loss > self.best - self.min_delta


class _StopFirstLossTaken(_StopWith):
    def improved(self, loss):
        return self.epoch == 1 or super().improved(loss)


class _StopNanStops(_StopWith):
    def step(self, validation_loss):
        return super().step(validation_loss) or math.isnan(validation_loss)


class _StopNanSkipped(_StopWith):
    def refuse(self, loss):
        self.waited += not math.isnan(loss)


class _StopDeltaIgnored(_StopWith):
    def improved(self, loss):
        return loss < self.best


class _StopDeltaAdded(_StopWith):
    def improved(self, loss):
        return loss < self.best + self.min_delta


class _StopDeltaRelative(_StopWith):
    def improved(self, loss):
        return loss < self.best * (1 - self.min_delta)


class _StopBestCreeps(_StopWith):
    def refuse(self, loss):
        self.waited += 1
        if loss < self.best:
            self.best, self.best_epoch = loss, self.epoch


class _StopHigherIsBetter(_StopWith):
    def __init__(self, patience, min_delta=0.0):
        super().__init__(patience, min_delta)
        self.best = -math.inf

    def improved(self, loss):
        return loss > self.best + self.min_delta


class _StopBestStartsAtZero(_StopWith):
    def __init__(self, patience, min_delta=0.0):
        super().__init__(patience, min_delta)
        self.best = 0.0


class _StopCountsFromZero(_StopWith):
    def __init__(self, patience, min_delta=0.0):
        super().__init__(patience, min_delta)
        self.epoch = -1


class _StopCountsImprovements(_StopWith):
    def accept(self, loss):
        self.best, self.best_epoch, self.waited = loss, self.best_epoch + 1, 0


class _StopTellsImprovement(_StopWith):
    def step(self, validation_loss):
        return not super().step(validation_loss)


class _StopByHistory:
    def __init__(self, patience, min_delta=0.0, verbose=False):
        self.patience, self.min_delta, self.losses = patience, min_delta, []

    def _improvements(self):
        best, epoch = float("inf"), 0
        for number, loss in enumerate(self.losses, start=1):
            if best - loss > self.min_delta:
                best, epoch = loss, number
        return best, epoch

    @property
    def best(self):
        return self._improvements()[0]

    @property
    def best_epoch(self):
        return self._improvements()[1]

    def step(self, validation_loss):
        self.losses.append(validation_loss)
        return len(self.losses) - self.best_epoch >= self.patience


EARLY_STOPPING = Exercise(
    slug="early_stopping",
    chapter=2,
    title="Stop when the validation loss no longer improves",
    minutes=15,
    difficulty=2,
    reference=reference.EarlyStopping,
    observe=_observe_early_stopping,
    misconceptions=(
        Misconception(
            "counter_not_reset",
            _StopNotReset,
            "You count all epochs without improvement since the start. An improvement starts the "
            "count anew: only epochs in a row count.",
        ),
        Misconception(
            "compared_with_the_epoch_before",
            _StopPreviousLoss,
            "You compare each loss with that of the epoch before. A loss that falls after a bad "
            "epoch can still be worse than the best so far; compare with the best.",
        ),
        Misconception(
            "ties_improve",
            _StopTiesImprove,
            "You take a loss equal to the best one (less min_delta) for an improvement. On a "
            "plateau training would never stop.",
        ),
        Misconception(
            "one_epoch_too_late",
            _StopOneLate,
            "You stop one epoch too late. With patience 3, the third epoch in a row without "
            "improvement is the last.",
        ),
        Misconception(
            "patience_ignored",
            _StopAtOnce,
            "You stop at the first epoch without improvement, whatever the patience. A validation "
            "loss goes up and down by chance.",
        ),
        Misconception(
            "never_stops",
            _StopNever,
            "Your answer is always False, however long nothing improves: training never stops.",
        ),
        Misconception(
            "nan_improves",
            _StopNanImproves,
            "You take NaN for an improvement: every comparison with NaN is False, so `not loss >= "
            "best` is True. Then best is NaN, and nothing that follows can be compared with it.",
        ),
        Misconception(
            "all_but_worse_improves",
            _StopOnlyWorseCounts,
            "You count epochs that are worse and take everything else for an improvement. Ties "
            "and NaN are then improvements too; ask whether the loss is better, not whether it is "
            "worse.",
        ),
        Misconception(
            "first_loss_always_taken",
            _StopFirstLossTaken,
            "You take the first loss as best without looking. If it is NaN, no later loss compares "
            "as better, since every comparison with NaN is False.",
        ),
        Misconception(
            "nan_stops",
            _StopNanStops,
            "You stop at the first NaN. Here it counts as an epoch without improvement, no more.",
        ),
        Misconception(
            "nan_not_counted",
            _StopNanSkipped,
            "You do not count an epoch whose loss is NaN. It brought no improvement: a run that "
            "has gone to NaN for good would never be stopped.",
        ),
        Misconception(
            "min_delta_ignored",
            _StopDeltaIgnored,
            "You never use min_delta. A loss that is better by less than that is no improvement.",
        ),
        Misconception(
            "min_delta_added",
            _StopDeltaAdded,
            "You add min_delta to the best loss, so that losses a little worse count as "
            "improvements. It should be harder to improve, not easier.",
        ),
        Misconception(
            "min_delta_relative",
            _StopDeltaRelative,
            "You take min_delta for a fraction of the best loss. It is in the units of the loss; "
            "a fraction of a negative one would even turn its sign.",
        ),
        Misconception(
            "best_creeps_down",
            _StopBestCreeps,
            "You lower best by less than min_delta without counting that as an improvement. Best "
            "then runs ahead of a slow descent, which never gets min_delta below it and is "
            "stopped.",
        ),
        Misconception(
            "higher_is_better",
            _StopHigherIsBetter,
            "You look for the highest value, as for an accuracy. This is a loss: lower is better.",
        ),
        Misconception(
            "best_starts_at_0",
            _StopBestStartsAtZero,
            "You start with best = 0, and losses are seldom below that. Start where every loss is "
            "an improvement.",
        ),
        Misconception(
            "epochs_counted_from_0",
            _StopCountsFromZero,
            "You count epochs from 0. Here the first call to step is epoch 1; 0 stands for no "
            "improvement yet.",
        ),
        Misconception(
            "answer_turned_round",
            _StopTellsImprovement,
            "You return True to go on. The question that step answers is whether to stop.",
        ),
        Misconception(
            "improvements_counted",
            _StopCountsImprovements,
            "Your best_epoch counts the improvements. It should be the number of the epoch in "
            "which the last one came, so every call of step has to be counted.",
        ),
    ),
    alternatives=(_StopByHistory, _StopWith),
    hints=(
        "Keep three things: the best loss, the epoch it came in, and the number of the epoch.",
        "What is `loss < best` for a loss of NaN? And how do you write the comparison so that a "
        "loss must be below best by more than min_delta?",
        "step: count the epoch; if loss < best − min_delta, remember loss and epoch; return "
        "whether at least `patience` epochs have passed since the best one.",
    ),
)

# --- find the bug -------------------------------------------------------------------------------


class ThreeLayerNet(nn.Module):
    """Three linear layers; x (batch, in_features) → logits (batch, num_classes)."""

    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = self.first(x)
        x = self.second(x)
        return self.third(x)


def _observe_three_layer_net(ThreeLayerNet, see):
    for sizes, batch in (((4, 7, 3), 6), ((9, 6, 5), 8)):
        in_features, hidden, num_classes = sizes
        with see.probe(f"ThreeLayerNet{sizes}, x of shape ({batch}, {in_features})"):
            model = ThreeLayerNet(in_features, hidden, num_classes)
            x = see.randn(batch, in_features, dtype=torch.float32)
            _observe_network(see, model, x, sizes, exact=False)


class _NetWith(reference.ThreeLayerNet):
    def join(self, x, first, second, third):
        raise NotImplementedError

    def forward(self, x):
        return self.join(x, self.first, self.second, self.third)


class _NetBare(_NetWith):
    def join(self, x, first, second, third):
        return third(second(first(x)))


class _NetFirstOnly(_NetWith):
    def join(self, x, first, second, third):
        return third(second(F.relu(first(x))))


class _NetSecondOnly(_NetWith):
    def join(self, x, first, second, third):
        return third(F.relu(second(first(x))))


class _NetReluOnLogits(_NetWith):
    def join(self, x, first, second, third):
        return F.relu(third(F.relu(second(F.relu(first(x))))))


class _NetReluOnlyOnLogits(_NetWith):
    def join(self, x, first, second, third):
        return F.relu(third(second(first(x))))


class _NetSoftmaxOnly(_NetWith):
    def join(self, x, first, second, third):
        return F.softmax(third(second(first(x))), dim=1)


class _NetSoftmaxToo(_NetWith):
    def join(self, x, first, second, third):
        return F.softmax(third(F.relu(second(F.relu(first(x))))), dim=1)


class _NetReluBefore(_NetWith):
    def join(self, x, first, second, third):
        return third(F.relu(second(F.relu(first(F.relu(x))))))


class _NetReluOnInput(_NetWith):
    def join(self, x, first, second, third):
        return third(second(first(F.relu(x))))


class _NetDropout(_NetWith):
    def join(self, x, first, second, third):
        return third(F.dropout(second(F.dropout(first(x)))))


class _NetSoftmaxOverBatch(_NetWith):
    def join(self, x, first, second, third):
        return third(F.softmax(second(F.softmax(first(x), dim=0)), dim=0))


class _NetResidual(_NetWith):
    def join(self, x, first, second, third):
        x = first(x)
        return third(x + second(x))


class _NetReluModuleMisused(_NetWith):
    def join(self, x, first, second, third):
        return third(nn.ReLU(second(nn.ReLU(first(x)))))


class _NetReluInTrainingOnly(_NetWith):
    def join(self, x, first, second, third):
        bend = F.relu if self.training else nn.Identity()
        return third(bend(second(bend(first(x)))))


class _NetMoreLayers(nn.Module):
    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.more = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.third(self.more(self.second(self.first(x))))


def _net_sequential(in_features, hidden, num_classes):
    layers = nn.Linear(in_features, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


class _NetGelu(nn.Module):
    def __init__(self, in_features, hidden, num_classes):
        super().__init__()
        self.a, self.b = nn.Linear(in_features, hidden), nn.Linear(hidden, hidden)
        self.c, self.activation = nn.Linear(hidden, num_classes), nn.GELU()

    def forward(self, x):
        for layer in (self.a, self.b):
            x = self.activation(layer(x))
        return self.c(x)


FIX_MISSING_ACTIVATION = Exercise(
    slug="fix_missing_activation",
    chapter=2,
    title="Find the bug: three layers that cannot bend",
    minutes=10,
    difficulty=1,
    reference=reference.ThreeLayerNet,
    observe=_observe_three_layer_net,
    shipped=ThreeLayerNet,
    symptom="On 400 points of a square, labelled by whether their two coordinates have the same "
    "sign, the loss stays at 0.693 and the accuracy at 0.51, however long it is trained. A right "
    "ThreeLayerNet gets all of them right in 300 steps.",
    misconceptions=(
        Misconception(
            "still_linear",  # museum 2.F4
            _NetBare,
            "Between the three layers there is still nothing that bends, so they multiply out to "
            "one matrix. A call such as `F.relu(x)` returns a new tensor: its result must be used.",
        ),
        Misconception(
            "after_the_first_only",
            _NetFirstOnly,
            "You mended one of two places. The second and third layer still act as one matrix.",
        ),
        Misconception(
            "after_the_second_only",
            _NetSecondOnly,
            "You mended one of two places. The first and second layer still act as one matrix.",
        ),
        Misconception(
            "on_the_logits_too",  # museum 2.25
            _NetReluOnLogits,
            "The activations between the layers are right, and there is one too many, after the "
            "last layer: with it no logit can be negative. Logits are any numbers.",
        ),
        Misconception(
            "on_the_logits_only",  # museum 2.25
            _NetReluOnlyOnLogits,
            "You put the activation after the last layer. The three layers before it still act as "
            "one matrix, and logits must be free to be negative.",
        ),
        Misconception(
            "softmax_at_the_end_only",  # museum 2.1
            _NetSoftmaxOnly,
            "You put a softmax at the end. It turns logits into probabilities, which the loss does "
            "itself; the layers before it still act as one matrix.",
        ),
        Misconception(
            "softmax_at_the_end_too",  # museum 2.1
            _NetSoftmaxToo,
            "The activations between the layers are right. The softmax at the end is not: the loss "
            "takes logits and applies softmax itself.",
        ),
        Misconception(
            "on_the_input_too",
            _NetReluBefore,
            "You put an activation before each layer, the first one among them. It wipes out "
            "everything negative in the input before a weight has seen it.",
        ),
        Misconception(
            "on_the_input_only",
            _NetReluOnInput,
            "You put the activation before the first layer. The three layers after it still act as "
            "one matrix, and the negative part of the input is lost.",
        ),
        Misconception(
            "dropout_instead",
            _NetDropout,
            "You put dropout between the layers. It zeroes at random and bends nothing: in "
            "evaluation mode the layers act as one matrix again.",
        ),
        Misconception(
            "softmax_over_the_batch",
            _NetSoftmaxOverBatch,
            "You normalise along the batch between the layers, so that the logits of a sample "
            "depend on its neighbours. An activation works on each value alone.",
        ),
        Misconception(
            "one_more_layer",
            _NetMoreLayers,
            "You added a linear layer. It multiplies out with the others: as many linear layers as "
            "you like are one.",
        ),
        Misconception(
            "residual_instead",
            _NetResidual,
            "You add a layer's input to its output. A sum of linear functions is linear too: "
            "there is still nothing that bends.",
        ),
        Misconception(
            "relu_module_misused",
            _NetReluModuleMisused,
            "You write `nn.ReLU(x)`. That makes a layer, with x taken for its `inplace` switch, "
            "and computes nothing; call a layer that is made already, `nn.ReLU()(x)`, or the "
            "function, `F.relu(x)`.",
        ),
        Misconception(
            "in_training_mode_only",
            _NetReluInTrainingOnly,
            "Your activations act in training mode only. In evaluation mode the layers act as one"
            " matrix again; an activation belongs to what the network computes, whatever the "
            "mode.",
        ),
    ),
    alternatives=(_net_sequential, _NetGelu),
    hints=(
        "Look at the logits halfway between two inputs: they are halfway between the two inputs' "
        "logits. What kind of function does that?",
        "W₃(W₂(W₁x)) = (W₃W₂W₁)x. What has to stand between two layers so that they cannot be "
        "multiplied out?",
        "A nonlinear function, such as F.relu, after the first and after the second layer; none "
        "after the third.",
    ),
)


def mean_accuracy(model, batches):
    """The fraction of all samples that the model, in evaluation mode, classifies rightly."""
    model.eval()
    accuracies = []
    with torch.no_grad():
        for inputs, targets in batches:
            predictions = model(inputs).argmax(dim=1)
            accuracies.append((predictions == targets).float().mean().item())
    return sum(accuracies) / len(accuracies)


def _observe_mean_accuracy(mean_accuracy, see):
    def batches_of(*sizes):
        return [(see.randn(size, 4), see.randint(0, 3, size)) for size in sizes]

    with see.probe("10 samples in batches of 4, 4 and 2"):
        see.call(
            "the accuracy", mean_accuracy, _small_network(see, dropout=0.5), batches_of(4, 4, 2)
        )
    with see.probe("a single batch of 7"):
        see.call("the accuracy", mean_accuracy, _small_network(see), batches_of(7))
    with see.probe("17 samples from a DataLoader, batch size 5"):
        inputs, targets = see.randn(17, 4), see.randint(0, 3, 17)
        loader = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=5)
        see.call("the accuracy", mean_accuracy, _small_network(see), loader)
    with see.probe("12 samples from a generator, in batches of 2, 9 and 1"):
        see.call("the accuracy", mean_accuracy, _small_network(see), _one_use(batches_of(2, 9, 1)))


def _right_and_size(model, batches):
    """Of each batch: how many are right, and how many there are."""
    model.eval()
    with torch.no_grad():
        return [((model(x).argmax(dim=1) == y).sum().item(), len(y)) for x, y in batches]


def _accuracy_of_batches(model, batches):
    rows = _right_and_size(model, batches)
    return sum(k / n for k, n in rows) / len(rows)


def _accuracy_full_batches(model, batches):
    rows = _right_and_size(model, batches)
    return sum(k for k, _ in rows) / (len(rows) * rows[0][1])


def _accuracy_drops_last(model, batches):
    rows = _right_and_size(model, batches)
    rows = [row for row in rows if row[1] == rows[0][1]]
    return sum(k for k, _ in rows) / sum(n for _, n in rows)


def _accuracy_median(model, batches):
    return float(np.median([k / n for k, n in _right_and_size(model, batches)]))


def _accuracy_right_per_batch(model, batches):
    rows = _right_and_size(model, batches)
    return sum(k for k, _ in rows) / len(rows)


def _accuracy_means_over_samples(model, batches):
    rows = _right_and_size(model, batches)
    return sum(k / n for k, n in rows) / sum(n for _, n in rows)


def _accuracy_over_number_of_batches(model, batches):
    return sum(k / n for k, n in _right_and_size(model, batches)) / len(batches)


def _accuracy_over_the_dataset(model, batches):
    return sum(k for k, _ in _right_and_size(model, batches)) / len(batches.dataset)


def _accuracy_counted_in_a_second_pass(model, batches):
    right = sum(k for k, _ in _right_and_size(model, batches))
    return right / sum(len(targets) for _, targets in batches)


def _accuracy_last_size_for_all(model, batches):
    rows = _right_and_size(model, batches)
    return sum(k for k, _ in rows) / (len(rows) * rows[-1][1])


def _accuracy_over_the_last_size(model, batches):
    rows = _right_and_size(model, batches)
    return sum(k for k, _ in rows) / rows[-1][1]


def _accuracy_right_of_the_last(model, batches):
    rows = _right_and_size(model, batches)
    return rows[-1][0] / sum(n for _, n in rows)


def _accuracy_first(model, batches):
    right, samples = _right_and_size(model, batches)[0]
    return right / samples


def _accuracy_error_rate(model, batches):
    return 1 - reference.mean_accuracy(model, batches)


def _accuracy_percent(model, batches):
    return 100 * reference.mean_accuracy(model, batches)


def _accuracy_last(model, batches):
    right, samples = _right_and_size(model, batches)[-1]
    return right / samples


def _accuracy_count(model, batches):
    return sum(k for k, _ in _right_and_size(model, batches))


def _accuracy_argmax_of_batch(model, batches):
    model.eval()
    right, samples = 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            right += (model(inputs).argmax(dim=0) == targets).sum().item()
            samples += len(targets)
    return right / samples


def _accuracy_in_training_mode(model, batches):
    model.train()
    with torch.no_grad():
        rows = [((model(x).argmax(dim=1) == y).sum().item(), len(y)) for x, y in batches]
    return sum(k for k, _ in rows) / sum(n for _, n in rows)


def _accuracy_concatenated(model, batches):
    model.eval()
    hits = [model(x).argmax(-1) == y for x, y in batches]
    return torch.cat(hits).double().mean()


def _accuracy_weighted(model, batches, verbose=False):
    rows = _right_and_size(model, batches)
    return float(np.average([k / n for k, n in rows], weights=[n for _, n in rows]))


FIX_MEAN_OF_BATCH_MEANS = Exercise(
    slug="fix_mean_of_batch_means",
    chapter=2,
    title="Find the bug: an accuracy that depends on the batch size",
    minutes=10,
    difficulty=1,
    reference=reference.mean_accuracy,
    observe=_observe_mean_accuracy,
    shipped=mean_accuracy,
    symptom="A network reads 297 of 360 test digits rightly, which is 0.825. This function says "
    "0.827 with batches of 64, 0.812 with batches of 50, and 0.786 with batches of 119.",
    misconceptions=(
        Misconception(
            "still_a_mean_of_means",  # museum 2.F6, 2.19
            _accuracy_of_batches,
            "It is still the mean of the batches' accuracies. The last batch is smaller and counts "
            "as much as the others, so each of its samples counts more.",
        ),
        Misconception(
            "every_batch_taken_as_full",  # museum 2.19
            _accuracy_full_batches,
            "You divide by the number of batches times the size of the first. The last batch is "
            "smaller, so you count samples that do not exist.",
        ),
        Misconception(
            "last_batch_left_out",
            _accuracy_drops_last,
            "You leave out the batches that are not full. Then every batch counts the same, and "
            "some samples do not count at all.",
        ),
        Misconception(
            "median_of_batches",
            _accuracy_median,
            "You take the median of the batches' accuracies. The question is which fraction of all "
            "samples is right: count samples, not batches.",
        ),
        Misconception(
            "right_answers_per_batch",
            _accuracy_right_per_batch,
            "You count the right answers and divide by the number of batches. Divide by the number "
            "of samples.",
        ),
        Misconception(
            "means_divided_by_samples",
            _accuracy_means_over_samples,
            "You add up accuracies and divide by the number of samples. What is divided by the "
            "number of samples must be a number of samples: those that are right.",
        ),
        Misconception(
            "percent",
            _accuracy_percent,
            "You return percent. Asked for is the fraction, between 0 and 1.",
        ),
        Misconception(
            "last_batch_only",
            _accuracy_last,
            "Your accuracy is that of the last batch alone: the counts start anew in each round of "
            "the loop.",
        ),
        Misconception(
            "number_of_right_answers",
            _accuracy_count,
            "You return the number of right answers. Divide it by the number of samples.",
        ),
        Misconception(
            "argmax_over_the_batch",  # museum 2.26
            _accuracy_argmax_of_batch,
            "You take the argmax along axis 0, over the samples. The classes are axis 1.",
        ),
        Misconception(
            "evaluation_mode_lost",  # museum 2.12, 2.13
            _accuracy_in_training_mode,
            "You count rightly, in training mode. With dropout and batch norm the model must be in "
            "evaluation mode, as it was in the cell.",
        ),
        Misconception(
            "mean_over_the_number_of_batches",
            _accuracy_over_number_of_batches,
            "It is still the mean of the batches' accuracies, over `len(batches)`. The last batch"
            " is smaller and counts as much as the others; and a generator has no length. Count "
            "samples as they come.",
        ),
        Misconception(
            "asks_for_the_dataset",
            _accuracy_over_the_dataset,
            "You ask `batches` for its `dataset`, which only a DataLoader has. Any iterable of "
            "(inputs, targets) may come, a list for one: count the samples as they pass.",
        ),
        Misconception(
            "counted_in_a_second_pass",
            _accuracy_counted_in_a_second_pass,
            "You go through the batches once more to count the samples. A generator is used up "
            "after the first time, and a shuffled loader costs all its work again: count in the "
            "same pass.",
        ),
        Misconception(
            "last_size_for_all_batches",
            _accuracy_last_size_for_all,
            "You divide by the number of batches times the size of the last one. The others are "
            "of another size: add up the sizes.",
        ),
        Misconception(
            "samples_of_the_last_batch_only",
            _accuracy_over_the_last_size,
            "You count the right answers of all batches and divide by the size of the last batch:"
            " the number of samples is overwritten in the loop where it should be added to.",
        ),
        Misconception(
            "right_answers_of_the_last_batch_only",
            _accuracy_right_of_the_last,
            "You divide the right answers of the last batch by the number of all samples: the "
            "right answers are overwritten in the loop where they should be added to.",
        ),
        Misconception(
            "first_batch_only",
            _accuracy_first,
            "Your accuracy is that of the first batch alone: the `return` stands inside the loop.",
        ),
        Misconception(
            "error_rate",
            _accuracy_error_rate,
            "You return the fraction of wrong answers. The accuracy is the fraction of right ones.",
        ),
    ),
    alternatives=(_accuracy_concatenated, _accuracy_weighted),
    hints=(
        "How many samples are in the last batch? How much does each of them weigh in the result?",
        "Try it by hand: 4 of 4 right in one batch, 0 of 1 in the next. The mean of the accuracies "
        "is 1/2. What fraction of the five is right?",
        "Keep two counts over the whole loop, right answers and samples, and divide once, after "
        "it.",
    ),
    rtol=1e-6,
    atol=1e-6,
)


class DeepNet(nn.Module):
    """`depth` hidden layers with ReLU, then a linear one; x (batch, in_features) → logits."""

    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        sizes = [in_features] + [hidden] * depth
        self.layers = []
        for i in range(depth):
            self.layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        self.output = nn.Linear(sizes[-1], num_classes)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.output(x)


def _observe_deep_net(DeepNet, see):
    for sizes, depth, batch in (((4, 6, 3), 4, 5), ((9, 7, 5), 1, 6)):
        in_features, hidden, num_classes = sizes
        with see.probe(f"{depth} hidden layers of {hidden}, x of shape ({batch}, {in_features})"):
            model = DeepNet(in_features, hidden, num_classes, depth)
            see.fact("what it makes is an nn.Module", isinstance(model, nn.Module))
            x = see.randn(batch, in_features, dtype=torch.float32)
            out = _output(see, "the output", model, x)
            params = list(model.parameters())
            see("the number of values in model.parameters()", sum(p.numel() for p in params))
            saved = {v.data_ptr() for v in model.state_dict().values()}
            see("the number of tensors in model.state_dict()", len(saved))
            grads = torch.autograd.grad(out.sum(), params, allow_unused=True)
            see.fact("every parameter is used", all(grad is not None for grad in grads))
            see.fact("a second call gives the same logits", _same(model(x), out))
            moved = model.double()(x.double())
            see("the output in float64", 0 * moved)
    sizes = (8, 6, 4)
    with see.probe("2 hidden layers of 6, x of shape (5, 8), random weights"):
        model = DeepNet(*sizes, 2)
        x = see.randn(5, 8, dtype=torch.float32)
        _observe_network(see, model, x, sizes, exact=True)


class _DeepTuple(reference.DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, depth)
        layers = tuple(self.layers)
        del self.layers
        self.layers = layers


class _DeepOneLayerRepeated(nn.Module):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        self.first = nn.Linear(in_features, hidden)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden)] * (depth - 1))
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = F.relu(self.first(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.output(x)


class _DeepMadeInForward(nn.Module):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        self.sizes = [in_features] + [hidden] * depth
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x):
        for i in range(len(self.sizes) - 1):
            x = F.relu(nn.Linear(self.sizes[i], self.sizes[i + 1])(x))
        return self.output(x)


class _DeepLastOnly(nn.Module):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        sizes = [in_features] + [hidden] * depth
        self.layers = []
        for i in range(depth):
            self.layer = nn.Linear(sizes[i], sizes[i + 1])
            self.layers.append(self.layer)
        self.output = nn.Linear(sizes[-1], num_classes)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.output(x)


class _DeepWeightsOnly(DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, depth)
        self.weights = nn.ParameterList(layer.weight for layer in self.layers)


class _DeepCopied(DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, depth)
        sizes = [in_features] + [hidden] * depth
        self.registered = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(depth))


class _DeepNoActivation(reference.DeepNet):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class _DeepReluOnLogits(reference.DeepNet):
    def forward(self, x):
        return F.relu(super().forward(x))


class _DeepOneTooFew(reference.DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, max(depth - 1, 1))


class _DeepReluAfterTheLastOnly(reference.DeepNet):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output(F.relu(x))


class _DeepLastWithoutRelu(reference.DeepNet):
    def forward(self, x):
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x) if i == len(self.layers) else F.relu(layer(x))
        return self.output(x)


class _DeepReluBefore(reference.DeepNet):
    def forward(self, x):
        for layer in self.layers:
            x = layer(F.relu(x))
        return self.output(x)


class _DeepHiddenReused(nn.Module):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        self.first, self.depth = nn.Linear(in_features, hidden), depth
        self.hidden = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(self.depth - 1):
            x = F.relu(self.hidden(x))
        return self.output(x)


class _DeepOneTooMany(reference.DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, depth + 1)


class _DeepAlwaysThree(reference.DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, 3)


class _DeepStoppedAtOutput(reference.DeepNet):
    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x)).detach()
        return self.output(x)


def _deep_sequential(in_features, hidden, num_classes, depth):
    sizes, layers = [in_features] + [hidden] * depth, []
    for m, n in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(m, n), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


class _DeepByName(nn.Module):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__()
        self.output, self.depth = nn.Linear(hidden, num_classes), depth
        for i in range(depth):
            setattr(self, f"layer{i}", nn.Linear(hidden if i else in_features, hidden))

    def forward(self, x):
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(x).relu()
        return self.output(x)


class _DeepRegistered(DeepNet):
    def __init__(self, in_features, hidden, num_classes, depth):
        super().__init__(in_features, hidden, num_classes, depth)
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)


FIX_LAYERS_IN_A_LIST = Exercise(
    slug="fix_layers_in_a_list",
    chapter=2,
    title="Find the bug: layers that are never trained",
    minutes=10,
    difficulty=2,
    reference=reference.DeepNet,
    observe=_observe_deep_net,
    shipped=DeepNet,
    symptom="After five epochs, DeepNet(64, 64, 10, depth=3) reads 21 % of the test digits, where "
    "a right one reads 86 %. It reports 650 parameters, and its hidden layers are to the last bit "
    "what they were at the start.",
    misconceptions=(
        Misconception(
            "still_hidden_from_the_module",  # museum 2.21
            _DeepTuple,
            "The layers are still kept where nn.Module does not look: in a list, tuple or dict of "
            "Python's own. It finds only modules that are attributes, or that are in one of its "
            "own containers.",
        ),
        Misconception(
            "one_layer_repeated",
            _DeepOneLayerRepeated,
            "You put the same hidden layer into the list several times. `[layer] * n` makes n "
            "names for one layer, with one weight: make each layer anew.",
        ),
        Misconception(
            "made_in_forward",  # museum 2.22
            _DeepMadeInForward,
            "You make the hidden layers inside `forward`, with new random weights at every call. "
            "They have to be made once and kept.",
        ),
        Misconception(
            "only_the_last_is_registered",
            _DeepLastOnly,
            "Of the hidden layers, only the last is registered. An attribute holds one module: "
            "assigned anew in each round of a loop, it keeps the last one.",
        ),
        Misconception(
            "weights_without_biases",
            _DeepWeightsOnly,
            "You register the weights of the layers and not their biases. Register the layers.",
        ),
        Misconception(
            "registered_layers_not_used",
            _DeepCopied,
            "You register one set of layers and use another. The optimizer would train layers "
            "through which nothing flows.",
        ),
        Misconception(
            "activation_lost",  # museum 2.F4
            _DeepNoActivation,
            "The layers are found now, and the ReLU between them is gone: they act as one matrix.",
        ),
        Misconception(
            "relu_on_the_logits",  # museum 2.25
            _DeepReluOnLogits,
            "The layers are found now, and a ReLU has come after the last one: no logit can be "
            "negative.",
        ),
        Misconception(
            "one_hidden_layer_too_few",
            _DeepOneTooFew,
            "The layers are found now, and one is missing: depth counts the hidden layers alone, "
            "the output layer comes on top.",
        ),
        Misconception(
            "graph_cut_between_layers",
            _DeepStoppedAtOutput,
            "The layers are found now, and no gradient reaches them: between them and the output "
            "the values are cut off from the graph.",
        ),
        Misconception(
            "relu_after_the_last_hidden_layer_only",
            _DeepReluAfterTheLastOnly,
            "The layers are found now, and only the last hidden one has a ReLU after it: the "
            "layers before it act as one matrix.",
        ),
        Misconception(
            "last_hidden_layer_without_relu",
            _DeepLastWithoutRelu,
            "The layers are found now, and the last hidden one has no ReLU after it: it and the "
            "output layer act as one matrix.",
        ),
        Misconception(
            "relu_before_the_layers",
            _DeepReluBefore,
            "The layers are found now, and the ReLU comes before each hidden layer and not after "
            "it. The input loses its negative values, and the last hidden layer and the output "
            "layer act as one matrix.",
        ),
        Misconception(
            "hidden_layer_used_again",
            _DeepHiddenReused,
            "You make one hidden layer and send the values through it several times, with the "
            "same weights each time. Every hidden layer has weights of its own.",
        ),
        Misconception(
            "one_hidden_layer_too_many",
            _DeepOneTooMany,
            "The layers are found now, and there is one too many: depth counts all hidden layers,"
            " the one that takes the input among them.",
        ),
        Misconception(
            "always_three",
            _DeepAlwaysThree,
            "The layers are found now, and there are three hidden ones whatever `depth` is.",
        ),
    ),
    alternatives=(_deep_sequential, _DeepByName, _DeepRegistered),
    hints=(
        "Print `sum(p.numel() for p in model.parameters())` and count by hand what it should be.",
        "nn.Module notices a layer when it is assigned as an attribute. What is assigned here is a "
        "Python list; what would be a list that is a module itself?",
        "`nn.ModuleList()` can be appended to and gone through like a list, and its layers belong "
        "to the module.",
    ),
    rtol=1e-4,
    atol=1e-4,
)


def compare_learning_rates(make_model, batches, loss_function, rates, epochs):
    """Trains a fresh model with SGD at each rate; returns each run's mean loss in each epoch."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    curves = []
    for lr in rates:
        model = make_model()
        optimizer.param_groups[0]["lr"] = lr
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


def _observe_compare_learning_rates(compare_learning_rates, see):
    def setting(piled, *sizes):
        first, second = see.randn(6, 4), see.randn(3, 6)

        def watch(p):
            fresh = []
            p.register_hook(lambda grad: fresh.append(grad.clone()))
            p.register_post_accumulate_grad_hook(
                lambda p: piled.append(not torch.equal(p.grad, fresh[-1]))
            )

        def make_model():
            model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
            with torch.no_grad():
                for p, values in zip(model.parameters(), (first, None, second, None), strict=True):
                    p.zero_() if values is None else p.copy_(values)
            watch(model[0].weight)
            return model

        return make_model, [(see.randn(size, 4), see.randint(0, 3, size)) for size in sizes]

    for rates, epochs, sizes in (((0.1, 0.5), 3, (5, 5, 2)), ((0.2, 0.05, 1.0), 2, (4, 3))):
        samples = " and ".join(map(str, sizes))
        with see.probe(f"rates {rates}, {epochs} epochs, batches of {samples} samples"):
            piled = []  # of each backward: whether it met gradients of an earlier one
            make_model, batches = setting(piled, *sizes)
            given = make_model, batches, F.cross_entropy, list(rates), epochs
            see.call("the losses of each run", compare_learning_rates, *given)
            see.fact("each backward finds the model's gradients cleared", not any(piled))


def _trained(model, optimizer, batches, loss_function, epochs, zero=True, weigh=True, last=False):
    """The losses of one run: mean of each epoch, with one detail changed."""
    curve = []
    for _ in range(epochs):
        losses, sizes = [], []
        for inputs, targets in batches:
            if zero:
                optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            sizes.append(len(targets) if weigh else 1)
        curve.append(losses[-1] if last else float(np.average(losses, weights=sizes)))
    return curve


def _rates_stale(make_model, batches, loss_function, rates, epochs):
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    return [_trained(make_model(), optimizer, batches, loss_function, epochs) for _ in rates]


def _rates_one_model(make_model, batches, loss_function, rates, epochs):
    model, curves = make_model(), []
    for lr in rates:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        curves.append(_trained(model, optimizer, batches, loss_function, epochs))
    return curves


def _rates_first_only(make_model, batches, loss_function, rates, epochs):
    curves = []
    for _ in rates:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
        curves.append(_trained(model, optimizer, batches, loss_function, epochs))
    return curves


def _with_fresh_sgd(make_optimizer=torch.optim.SGD, **options):
    def compare(make_model, batches, loss_function, rates, epochs):
        curves = []
        for lr in rates:
            model = make_model()
            optimizer = make_optimizer(model.parameters(), lr=lr)
            curves.append(_trained(model, optimizer, batches, loss_function, epochs, **options))
        return curves

    return compare


def _rates_first_model_only(make_model, batches, loss_function, rates, epochs):
    model, curves = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        curves.append(_trained(model, optimizer, batches, loss_function, epochs))
        model = make_model()
    return curves


def _rates_zeroed_late(make_model, batches, loss_function, rates, epochs):
    curves = []
    for lr in rates:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        backward_only = SimpleNamespace(zero_grad=lambda: None, step=optimizer.zero_grad)
        curves.append(_trained(model, backward_only, batches, loss_function, epochs))
    return curves


def _rates_one_curve(make_model, batches, loss_function, rates, epochs):
    curves = reference.compare_learning_rates(make_model, batches, loss_function, rates, epochs)
    curve = [loss for each in curves for loss in each]
    return [curve for _ in curves]


def _rates_loss_since_the_start(make_model, batches, loss_function, rates, epochs):
    curves = reference.compare_learning_rates(make_model, batches, loss_function, rates, epochs)
    return [list(np.cumsum(curve) / np.arange(1, epochs + 1)) for curve in curves]


def _rates_last_epoch(make_model, batches, loss_function, rates, epochs):
    curves = reference.compare_learning_rates(make_model, batches, loss_function, rates, epochs)
    return [curve[-1] for curve in curves]


def _rates_only_last_run(make_model, batches, loss_function, rates, epochs):
    return reference.compare_learning_rates(make_model, batches, loss_function, rates, epochs)[-1]


def _rates_new_model_each_epoch(make_model, batches, loss_function, rates, epochs):
    curves = []
    for lr in rates:
        curve = []
        for _ in range(epochs):
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            curve += _trained(model, optimizer, batches, loss_function, 1)
        curves.append(curve)
    return curves


def _rates_by_hand(make_model, batches, loss_function, rates, epochs):
    curves = []
    for lr in rates:
        model, curve = make_model(), []
        params = list(model.parameters())
        for _ in range(epochs):
            losses = []
            for x, y in batches:
                loss = loss_function(model(x), y)
                losses += [loss.item()] * len(y)
                with torch.no_grad():
                    for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                        p -= lr * grad
            curve.append(np.mean(losses))
        curves.append(tuple(curve))
    return tuple(curves)


def _rates_reset_weights(make_model, batches, loss_function, rates, epochs):
    model = make_model()
    start = {name: values.clone() for name, values in model.state_dict().items()}
    optimizer, curves = torch.optim.SGD(model.parameters(), lr=1.0), []
    for lr in rates:
        model.load_state_dict(start)
        optimizer.param_groups[0]["lr"] = lr
        curves.append(_trained(model, optimizer, batches, loss_function, epochs))
    return curves


FIX_STALE_OPTIMIZER = Exercise(
    slug="fix_stale_optimizer",
    chapter=2,
    title="Find the bug: every learning rate gives the same loss",
    minutes=10,
    difficulty=2,
    reference=reference.compare_learning_rates,
    observe=_observe_compare_learning_rates,
    shipped=compare_learning_rates,
    symptom="At each of the rates 0.01, 0.1 and 0.5 the mean loss is 2.3036 in every epoch. In a "
    "right version it falls to 0.33 in three epochs at the rate 0.5.",
    misconceptions=(
        Misconception(
            "still_stale",  # museum 2.F5, 2.6
            _rates_stale,
            "The optimizer still holds the parameters of another model than the one that you "
            "train. Where is it made, and which `parameters()` does it get there?",
        ),
        Misconception(
            "one_model_for_all_rates",
            _rates_one_model,
            "You train one model all along. Each rate starts where the last one ended, so later "
            "rates look better than they are: every run needs a fresh model.",
        ),
        Misconception(
            "first_rate_for_all",
            _rates_first_only,
            "Model and optimizer now belong together, and every run uses the first rate.",
        ),
        Misconception(
            "right_for_the_first_rate_only",  # museum 2.F5
            _rates_first_model_only,
            "The first run trains. The later ones get a new model, and the optimizer keeps the "
            "first one's parameters.",
        ),
        Misconception(
            "never_zeroed",  # museum 2.4
            _with_fresh_sgd(zero=False),
            "Model and optimizer now belong together, and the gradients are not zeroed any more: "
            "each step takes all earlier ones along.",
        ),
        Misconception(
            "mean_of_batch_means",  # museum 2.F6
            _with_fresh_sgd(weigh=False),
            "The training is right now. The loss of an epoch has become the mean of the batches' "
            "means, in which the samples of a smaller batch count more.",
        ),
        Misconception(
            "loss_of_the_last_batch",
            _with_fresh_sgd(last=True),
            "The training is right now. The loss of an epoch has become that of its last batch.",
        ),
        Misconception(
            "adam",
            _with_fresh_sgd(torch.optim.Adam),
            "Model and optimizer now belong together. The optimizer is Adam, and the rates are to "
            "be compared for SGD.",
        ),
        Misconception(
            "last_epoch_only",
            _rates_last_epoch,
            "The training is right now. You return the last epoch's loss of each run; asked for "
            "are those of all epochs.",
        ),
        Misconception(
            "last_run_only",
            _rates_only_last_run,
            "The training is right now. You return the losses of the last run alone; asked for is "
            "a list of them for each rate.",
        ),
        Misconception(
            "new_model_each_epoch",
            _rates_new_model_each_epoch,
            "You make a new model in each epoch, so that nothing of the epoch before is left. Make "
            "one for each rate.",
        ),
        Misconception(
            "zeroed_between_backward_and_step",
            _rates_zeroed_late,
            "Your models do not learn at any rate. Model and optimizer belong together now, and "
            "the gradients are zeroed after `backward` and before `step`, so the optimizer finds "
            "none.",
        ),
        Misconception(
            "one_list_for_all_rates",
            _rates_one_curve,
            "The training is right now. All rates write into the same list of losses: each run "
            "needs a new one.",
        ),
        Misconception(
            "loss_since_the_start",
            _rates_loss_since_the_start,
            "The training is right now. The sums of the loss and of the samples go on from epoch "
            "to epoch, so a loss is the mean since the start of the run: begin both anew in each "
            "epoch.",
        ),
        Misconception(
            "with_momentum",
            _with_fresh_sgd(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)),
            "Model and optimizer now belong together. You gave the optimizer momentum, and the "
            "rates are to be compared for plain SGD.",
        ),
    ),
    alternatives=(_rates_by_hand, _rates_reset_weights),
    hints=(
        "Print a weight of `model` before and after an epoch. Then print `id(p)` of the "
        "optimizer's parameters and of the model's.",
        "An optimizer holds the tensors it was given when it was made. Which model's tensors are "
        "they here, and which model is trained?",
        "Make the optimizer after the model, inside the loop over the rates.",
    ),
    rtol=1e-6,
    atol=1e-6,
)

EXERCISES = (
    DIGITS_DATASET,
    MLP,
    CROSS_ENTROPY,
    TRAIN_STEP,
    EVALUATE,
    SGD_MOMENTUM_STEP,
    ADAMW_STEP,
    BATCH_NORM_1D,
    DROPOUT,
    EARLY_STOPPING,
    FIX_MISSING_ACTIVATION,
    FIX_MEAN_OF_BATCH_MEANS,
    FIX_LAYERS_IN_A_LIST,
    FIX_STALE_OPTIMIZER,
)
