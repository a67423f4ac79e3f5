"""Handwritten digits in MNIST's own file format, small (quick profile) or whole (full profile).

Quick: the 1,797 digits of 8×8 pixels that scikit-learn ships, written once as IDX files, so that
`torchvision.datasets.MNIST` reads them through the code it reads the real MNIST with. They are the
test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI repository,
https://doi.org/10.24432/C50P49): 13 writers. The split below puts digits of one writer on both
sides, so its test accuracy says little about a new writer.

Full: MNIST (LeCun, Cortes and Burges, 1998): 60,000 and 10,000 digits of 28×28 pixels, downloaded
and unpacked by torchvision. The file format is described at http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import http.client
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from course_utils import runtime
from course_utils.data import assets

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchvision.datasets import MNIST

FILES = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
DIGESTS = {
    "quick": {
        "train-images-idx3-ubyte": (
            "1147f18b75759ae767c08585c1cdfefdecb4a66bc2e47ea4729c78da3a957341"
        ),
        "train-labels-idx1-ubyte": (
            "a640bc1646331fc94d96bb6e121d17b2a5226400ed2a406951e2629f4ae7826e"
        ),
        "t10k-images-idx3-ubyte": (
            "bd48f923e71af1ab89a3f663a3682f07072ac1727913f6183d928fef152afd2f"
        ),
        "t10k-labels-idx1-ubyte": (
            "c222375a9d2b6200141a0e8248760ea446f7bda541eb4324e9a6a31529ae2c1c"
        ),
    },
    "full": {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
}


def mnist_root(profile: str | None = None) -> Path:
    """The folder to hand to `torchvision.datasets.MNIST(root, download=False)`.

    The files below it (`MNIST/raw/…`) are made or downloaded where they are missing, and verified.
    Raises ValueError for an unknown profile, RuntimeError (in a sentence, with the remedy) where
    the files cannot be had.
    """
    name = runtime.profile(profile).name
    root = assets.cache_dir() / name  # a folder each: torchvision asks only whether files exist
    raw = root / "MNIST" / "raw"
    make = {"quick": lambda: _write_quick(raw), "full": lambda: _download_full(root, raw)}[name]
    assets.ensure(raw, DIGESTS[name], make)
    return root


def idx_paths(
    train: bool, profile: str | None = None, root: str | Path | None = None
) -> tuple[Path, Path]:
    """The IDX files of the images and of the labels, of the training or of the test set.

    With `root`, the files under `root/MNIST/raw` are taken as they are and nothing is downloaded;
    raises FileNotFoundError or ValueError, in a sentence, where one is missing or cut short.
    """
    raw = (mnist_root(profile) if root is None else Path(root)) / "MNIST" / "raw"
    images, labels = (raw / name for name in FILES[bool(train)])
    if root is not None:
        _check_length(images)
        _check_length(labels)
    return images, labels


def load_digits(
    train: bool,
    profile: str | None = None,
    root: str | Path | None = None,
    transform: Callable | None = None,
) -> MNIST:
    """The digits as a `torchvision.datasets.MNIST`, which imports torchvision (seconds).

    `.data` is uint8 (n, height, width) from 0, paper, to 255, ink; `.targets` is int64 (n,).
    """
    images, _ = idx_paths(train, profile, root)  # says what is wrong before the long import
    from torchvision.datasets import MNIST

    return MNIST(images.parents[2], train=train, transform=transform, download=False)


def _quick_content() -> dict[str, bytes]:
    """The four files of the quick profile: name → bytes."""
    import numpy as np
    from sklearn.datasets import load_digits as load_uci_digits

    digits = load_uci_digits()
    ink = digits.images.astype(np.uint32)  # (1797, 8, 8), 0..16
    images = ((ink * 255 + 8) // 16).astype(np.uint8)  # 0..255, rounded to the nearest
    labels = digits.target.astype(np.uint8)  # (1797,)

    # Stratified: every fifth of the shuffled digits in the order of their classes is a test digit.
    # numpy promises never to change the stream of RandomState, so the split stays what it is.
    random = np.random.RandomState(0)
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.isin(np.arange(len(labels)), by_class[::5])
    order = random.permutation(len(labels))  # anew: every fifth would leave the classes spread out

    content = {}
    for train in (True, False):
        rows = order[is_test[order] != train]
        images_name, labels_name = FILES[train]
        content[images_name] = struct.pack(">4I", 0x803, len(rows), 8, 8) + images[rows].tobytes()
        content[labels_name] = struct.pack(">2I", 0x801, len(rows)) + labels[rows].tobytes()
    return content


def _write_quick(raw: Path) -> None:
    for name, content in _quick_content().items():
        assets.write_atomically(raw / name, content)


def _download_full(root: Path, raw: Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(root, download=True)  # its mirrors and its checksums of the packed files
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        packed = ", ".join(f"{name}.gz" for name in DIGESTS["full"])
        raise RuntimeError(
            f"MNIST could not be downloaded ({reason}). Put {packed} (a copy is at "
            f"{MNIST.mirrors[0]}) into {raw} and run this again, or set COURSE_PROFILE=quick "
            "to go on with the small digits that are already here."
        ) from None


def _check_length(path: Path) -> None:
    """Raise, in a sentence, where an IDX file is missing or not as long as its header says."""
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}: an explicit root must hold MNIST/raw/ with the four "
            "unpacked IDX files. Leave root out to let the course find or make them."
        )
    with path.open("rb") as file:
        head = file.read(16)
    axes = head[3] if len(head) >= 4 else 0
    if head[:3] != b"\0\0\x08" or not 1 <= axes <= 3 or len(head) < 4 + 4 * axes:
        raise ValueError(f"{path} is not an IDX file of bytes (it starts with {head[:4]!r}).")
    sizes = struct.unpack_from(f">{axes}I", head, 4)
    expected = 4 + 4 * axes + math.prod(sizes)
    if (found := path.stat().st_size) != expected:
        raise ValueError(
            f"{path} is {found:,} bytes long, its header promises {expected:,}: unpack it again."
        )
