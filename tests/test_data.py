"""The digits: the right pixels, whole files only, no network in the quick profile; fetch_all."""

import gzip
import hashlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from course_utils import data
from course_utils.data import assets, digits

REAL_MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "raw"
NAMES = list(digits.DIGESTS["quick"])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, the quick profile, and a network that refuses every connection."""

    def refuse(*_, **__):
        raise OSError("the test blocks the network")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("COURSE_PROFILE", "quick")
    return tmp_path / "cache"


@pytest.fixture
def real_root(tmp_path):
    """A root with 7,000 + 1,000 images of the real MNIST, unpacked."""
    if not REAL_MNIST.is_dir():
        pytest.skip(f"no real MNIST images at {REAL_MNIST}")
    raw = tmp_path / "real" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in REAL_MNIST.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return tmp_path / "real"


def test_torchvision_reads_the_very_digits_of_scikit_learn():
    from sklearn.datasets import load_digits as load_uci_digits

    train, test = data.load_digits(train=True), data.load_digits(train=False)
    assert train.data.shape == (1437, 8, 8) and test.data.shape == (360, 8, 8)
    pixels = np.concatenate([train.data.numpy(), test.data.numpy()])
    labels = np.concatenate([train.targets.numpy(), test.targets.numpy()])
    assert pixels.min() == 0 and pixels.max() == 255
    ink = np.rint(pixels.astype(float) * 16 / 255).reshape(-1, 64)  # (1797, 64), 0..16 again
    ours = sorted(map(tuple, np.column_stack([labels, ink])))
    uci = load_uci_digits()
    assert ours == sorted(map(tuple, np.column_stack([uci.target, uci.data])))


def test_the_split_is_stratified_and_in_mixed_order():
    for train, share in ((True, 0.8), (False, 0.2)):
        labels = data.load_digits(train=train).targets.numpy()
        counts = np.bincount(labels, minlength=10)
        uci_counts = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
        assert np.abs(counts - share * uci_counts).max() < 1
        assert 0.05 < np.mean(labels[1:] == labels[:-1]) < 0.2, "runs of one class"


def test_a_transform_is_handed_on():
    image, label = data.load_digits(train=True, transform=lambda image: image.size)[0]
    assert image == (8, 8) and label in range(10)


def test_paths_hold_the_bytes_that_a_reader_of_idx_expects():
    images, labels = data.idx_paths(train=False)
    assert images.read_bytes()[:16] == bytes((0, 0, 8, 3, 0, 0, 1, 104, 0, 0, 0, 8, 0, 0, 0, 8))
    assert len(images.read_bytes()) == 16 + 360 * 64
    assert labels.read_bytes()[:8] == bytes((0, 0, 8, 1, 0, 0, 1, 104))
    assert data.idx_paths(train=True)[0].stat().st_size == 16 + 1437 * 64


def test_the_files_are_made_once(monkeypatch, capsys):
    root = data.mnist_root()
    monkeypatch.setattr(digits, "_write_quick", lambda raw: pytest.fail("made a second time"))
    assert data.mnist_root("quick") == root
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["one bit", "cut short", "empty", "gone"])
@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_a_damaged_file_is_set_aside_told_and_made_anew(capsys, name, damage):
    path = data.mnist_root() / "MNIST" / "raw" / name
    good = path.read_bytes()
    bad = {
        "one bit": good[:40] + bytes([good[40] ^ 1]) + good[41:],
        "cut short": good[:-1],
        "empty": b"",
    }
    path.unlink() if damage == "gone" else path.write_bytes(bad[damage])
    data.mnist_root()
    assert path.read_bytes() == good
    told = capsys.readouterr().out
    if damage == "gone":
        assert told == ""
    else:
        assert path.with_name(f"{name}.damaged").read_bytes() == bad[damage]
        assert told.startswith(f"{path} was damaged, or ") and told.count("\n") == 1
        assert told.endswith(f" It is kept as {name}.damaged and made anew.\n")


def test_content_that_is_not_what_the_course_expects_is_refused(monkeypatch):
    content = digits._quick_content()
    monkeypatch.setattr(digits, "_quick_content", lambda: {**content, NAMES[1]: b"other labels"})
    with pytest.raises(RuntimeError, match=f"^{NAMES[1]} in .* differ from what the course"):
        data.mnist_root()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(assets.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        assets.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.glob("*")] == ["file"]


def test_a_cache_that_cannot_be_written_is_told_in_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="^The data cannot be written to .* set COURSE_DATA to"):
        data.mnist_root()


CHILD = """
import sys, time
from pathlib import Path
from course_utils.data import assets, digits
meeting, me = Path(sys.argv[1]), sys.argv[2]
write = digits._write_quick

def slow_write(raw):
    with open(meeting / "made", "a") as log:
        log.write(me + "\\n")
    time.sleep(1)
    write(raw)

digits._write_quick = slow_write
(meeting / f"ready-{me}").touch()
while len(list(meeting.glob("ready-*"))) < 3:
    time.sleep(0.01)
digits.mnist_root("quick")
"""


def test_three_processes_at_once_make_the_files_once(tmp_path, cache):
    damaged = data.mnist_root() / "MNIST" / "raw" / NAMES[0]
    damaged.write_bytes(b"damaged")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, tmp_path, str(i)], stdout=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    told = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len((tmp_path / "made").read_text().split()) == 1
    assert sorted(map(bool, told)) == [False, False, True], told
    assert assets.sha256(damaged) == digits.DIGESTS["quick"][NAMES[0]]


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", None, "home/.cache/build-prove-scale"),
        ("linux", "XDG_CACHE_HOME", "elsewhere/build-prove-scale"),
        ("darwin", None, "home/Library/Caches/build-prove-scale"),
        ("win32", "LOCALAPPDATA", "elsewhere/build-prove-scale"),
        ("linux", "COURSE_DATA", "elsewhere"),
    ],
)
def test_where_the_cache_is(monkeypatch, tmp_path, platform, variable, expected):
    for name in ("COURSE_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert assets.cache_dir() == tmp_path / expected


def test_fetch_all_makes_the_quick_profile_whatever_is_asked_for_elsewhere(
    monkeypatch, cache, capsys
):
    monkeypatch.setenv("COURSE_PROFILE", "full")
    monkeypatch.setattr(data, "encoder_path", lambda profile: f"the {profile} encoder")
    data.fetch_all()
    assert capsys.readouterr().out == f"Digits: {cache / 'quick'}\nEncoder: the quick encoder\n"
    raw = cache / "quick" / "MNIST" / "raw"
    assert {name: assets.sha256(raw / name) for name in NAMES} == digits.DIGESTS["quick"]
    assert not (cache / "full").exists()


def test_fetch_all_fetches_what_it_can_and_ends_with_the_sentences_of_the_rest(monkeypatch, cache):
    def fail(profile):
        raise RuntimeError("No encoder: check the network.")

    monkeypatch.setattr(data, "encoder_path", fail)
    with pytest.raises(SystemExit, match="^No encoder: check the network.$"):
        data.fetch_all()
    assert (cache / "quick" / "MNIST" / "raw" / NAMES[3]).is_file()
    monkeypatch.setattr(data, "mnist_root", fail)
    with pytest.raises(SystemExit, match="^(No encoder: check the network.\n?){2}$"):
        data.fetch_all()


def test_nothing_heavy_is_imported_and_nothing_made_before_it_is_asked_for(cache):
    heavy = {"torch", "torchvision", "transformers", "huggingface_hub", "sklearn", "numpy"}
    code = (
        "import sys, course_utils.data\n"
        f"heavy = {heavy} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not cache.exists()


def test_real_mnist_goes_through_the_same_code(real_root):
    train, test = (data.load_digits(train, "full", root=real_root) for train in (True, False))
    assert train.data.shape == (7000, 28, 28) and test.data.shape == (1000, 28, 28)
    images, _ = data.idx_paths(True, root=real_root)
    assert images.read_bytes()[16:] == train.data.numpy().tobytes()
    assert set(train.targets.tolist()) == set(range(10))
    assert 30 < train.data.float().mean() < 36  # the whole set's mean is 33.3


def test_an_explicit_root_is_never_filled_and_its_faults_are_told(real_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="^There is no file .* Leave root out"):
        data.load_digits(True, root=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    images, labels = data.idx_paths(False, root=real_root)
    images.write_bytes(images.read_bytes()[:-784])
    with pytest.raises(ValueError, match="is 783,232 bytes long, its header promises 784,016"):
        data.load_digits(False, root=real_root)
    shutil.copy(REAL_MNIST / f"{images.name}.gz", images)
    with pytest.raises(ValueError, match="is not an IDX file"):
        data.load_digits(False, root=real_root)


def test_full_without_a_network_says_what_to_do(cache):
    with pytest.raises(RuntimeError) as told:
        data.mnist_root("full")
    sentence = str(told.value)
    assert sentence.startswith("MNIST could not be downloaded (")
    raw = cache / "full" / "MNIST" / "raw"
    for part in (*(f"{name}.gz" for name in NAMES), str(raw), "COURSE_PROFILE=quick", "https://"):
        assert part in sentence
    assert told.value.__suppress_context__


def test_files_that_are_not_mnist_are_not_taken_for_it(real_root, cache, capsys):
    shutil.copytree(real_root, cache / "full")
    with pytest.raises(RuntimeError, match="^MNIST could not be downloaded"):
        data.mnist_root("full")
    assert capsys.readouterr().out.count("was damaged") == 4
    assert not (cache / "full" / "MNIST" / "raw" / NAMES[0]).exists()


def test_packed_files_put_in_place_by_hand_are_used(monkeypatch, real_root, cache):
    """The remedy of the sentence, with the digests of the part of MNIST that is at hand."""
    from torchvision.datasets import MNIST

    unpacked = real_root / "MNIST" / "raw"
    md5 = {
        name: hashlib.md5((REAL_MNIST / f"{name}.gz").read_bytes()).hexdigest() for name in NAMES
    }
    sha256 = {name: assets.sha256(unpacked / name) for name in NAMES}
    monkeypatch.setattr(MNIST, "resources", [(f"{name}.gz", md5[name]) for name in NAMES])
    monkeypatch.setitem(digits.DIGESTS, "full", sha256)
    shutil.copytree(REAL_MNIST, cache / "full" / "MNIST" / "raw", copy_function=shutil.copyfile)
    (cache / "full" / "MNIST" / "raw").chmod(0o755)
    assert len(data.load_digits(True, "full")) == 7000
