"""Chapters 2 to 5 as the full profile runs them, as far as that goes without the internet.

Chapter 2: on real MNIST images, a sample of 7,000 and 1,000 of them. The sample stands beside the
repository, in ../shared/data/mnist/raw; where it is missing, the test is skipped. Only two lines
differ from the chapter: the profile, and the folder of the files.

Chapter 3: the sections on the real encoder and on cost, with a BERT of the shape of
bert-base-uncased whose weights are random and whose layers are two, on whatever device is there.

Chapter 4: all but its miniature, with the same stand-in for the encoder, and 200 of the course's
reviews without their slices in the place of rotten_tomatoes.

Chapter 5: its proofs on two processes, on the same sample of MNIST; and on the GPU, where one is
found, those of section 17.
"""

from __future__ import annotations

import ast
import gzip
from pathlib import Path

import pytest
import torch
from nbformat import v4

from course_utils import notebooks

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLE = REPOSITORY.parent / "shared" / "data" / "mnist" / "raw"
DIGITS = REPOSITORY / "notebooks" / "02_mlp.ipynb"
EXERCISES = ("digits_dataset", "mlp", "cross_entropy", "train_step", "evaluate", "dropout")
DIGITS_CELLS = """
    setup imports sizes root header torchvision-compare to-tensors-code split-code normalize-code
    baselines-code mlp-count first-fit recipe final final-table
    final-verdict confusion gallery-code deploy deploy-read
""".split()  # from the bytes to the network that another program loads; the side roads are left out

ATTENTION = REPOSITORY / "notebooks" / "03_attention.ipynb"
PARTS = """
    scaled_dot_product_attention causal_mask padding_mask split_heads merge_heads
    multi_head_attention sinusoidal_positions layer_norm feed_forward encoder_block load_bert_layer
    fix_missing_padding_mask tiled_attention
""".split()
ATTENTION_CELLS = """
    setup imports real-load real-tokens real-expected real-names real-build real-prove
    real-prove-table one-vector-each length-limit-code f11-code padding-mask-after maps
    heads-measured heads-picture explorer live-bytes memory memory-table saved saved-table
    scale-time scale-table scale-picture gpu gpu-table bf16
""".split()

pytestmark = pytest.mark.slow


@pytest.fixture
def mnist_sample(tmp_path):
    """The folder that torchvision.datasets.MNIST takes as its root."""
    if not list(SAMPLE.glob("*-ubyte.gz")):
        pytest.skip("no sample of MNIST beside the repository (../shared/data/mnist/raw)")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in SAMPLE.glob("*-ubyte.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return tmp_path


def shortened(path: Path, exercises, wanted):
    """The solved chapter in the full profile, cut down to these exercises and cells."""
    notebook = notebooks.solve(path)
    dashed = [slug.replace("_", "-") for slug in exercises]
    wanted = {*wanted, *(f"ex-{slug}" for slug in dashed), *(f"check-{slug}" for slug in dashed)}
    notebook.cells = [cell for cell in notebook.cells if cell.get("id") in wanted]
    assert {cell["id"] for cell in notebook.cells} == wanted, f"cells of {path.name} were renamed"
    first = v4.new_code_cell("import os; os.environ['COURSE_PROFILE'] = 'full'", id="full")
    notebook.cells.insert(0, first)
    return notebook


def shortened_digits(root: Path):
    """Chapter 2 from the bytes to the network, on the files under `root`."""
    notebook = shortened(DIGITS, EXERCISES, DIGITS_CELLS)
    cells = notebook.cells
    ids = [cell["id"] for cell in cells]
    cells[ids.index("root")].source = f"root = {str(root)!r}"
    chosen = v4.new_code_cell("chosen_p = 0.2", id="chosen")  # the chapter asks the validation part
    cells.insert(ids.index("final"), chosen)
    facts = "print(dict(n=n, shape=tuple(x_all.shape), accuracies=accuracies.tolist(), "
    facts += "nearest=(nearest_mean(x_exam) == y_exam).float().mean().item(), size=vars(size)))"
    cells.append(v4.new_code_cell(facts, id="facts"))
    return notebook


def test_the_full_profile_reads_real_mnist(mnist_sample):
    execution = notebooks.execute(
        shortened_digits(mnist_sample), DIGITS.parent, strict=True, timeout=300, threads=1
    )
    outputs = {cell["id"]: cell.outputs for cell in execution.notebook.cells}
    facts = ast.literal_eval(outputs["facts"][0].text)
    print(f"{execution.seconds:.0f} s, {facts}")  # shown by pytest -rP
    assert facts["shape"] == (7000, 1, 28, 28) and facts["n"] == 1000
    assert facts["size"]["hidden"] == 512, "these are not the sizes of the full profile"
    assert 0.78 < facts["nearest"] < 0.85  # measured 0.816; no random number but the split is in it
    # The goal of 98.3 % is for 60,000 images; these 7,000 gave 0.984, 0.980 and 0.974, where one
    # standard error of 1,000 test images is 0.005.
    assert len(facts["accuracies"]) == 3
    assert min(facts["accuracies"]) > 0.96, "a seed is worse than ever measured"
    assert sum(facts["accuracies"]) / 3 > 0.968


def test_the_full_profile_runs_an_encoder_of_bert_base_s_shape():
    notebook = shortened(ATTENTION, PARTS, ATTENTION_CELLS)
    ids = [cell["id"] for cell in notebook.cells]
    stand_in = """import course_utils.data
from course_utils.data.encoder import load_encoder, random_encoder
tokenizer = load_encoder("quick")[1]  # the vocabulary of bert-base-uncased too
course_utils.data.load_encoder = lambda: (random_encoder(num_layers=2), tokenizer)"""
    notebook.cells.insert(ids.index("real-load"), v4.new_code_cell(stand_in, id="stand-in"))
    facts = "print(dict(quick=quick, width=config.hidden_size, heads=config.num_attention_heads, "
    facts += "worst=max(at_tokens for at_tokens, _ in single), device=where.type))"
    notebook.cells.append(v4.new_code_cell(facts, id="facts"))
    execution = notebooks.execute(notebook, ATTENTION.parent, strict=True, timeout=300, threads=1)
    outputs = {cell["id"]: cell.get("outputs") for cell in execution.notebook.cells}
    facts = ast.literal_eval(outputs["facts"][0].text)
    print(f"{execution.seconds:.0f} s, {facts}")
    assert not facts["quick"] and (facts["width"], facts["heads"]) == (768, 12)
    assert facts["worst"] < 1e-5  # two layers; the chapter allows 1e-4 for twelve
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    table = "".join(output.get("text", "") for output in outputs["gpu-table"])
    assert ("No GPU in use" in table) is (facts["device"] == "cpu")


BERT = REPOSITORY / "notebooks" / "04_bert.ipynb"
LEFT_OUT = ("micro-", "fill-blank", "qa-", "best-seed", "streaming")
REVIEWS_STAND_IN = """import course_utils.data
from course_utils.data import load_encoder, random_encoder
from course_utils.data.encoder import Loaded
from course_utils.data.reviews import load_reviews as own_reviews
tokenizer = load_encoder("quick")[1]  # the vocabulary of bert-base-uncased too
loaded = Loaded(random_encoder(num_layers=2), tokenizer, True)
course_utils.data.load_encoder_or_miniature = lambda: loaded
def few(rows, count):
    return rows.shuffle(seed=0).select(range(count)).select_columns(["text", "label"])
def stand_in():
    parts = own_reviews("quick")
    return type(parts)({split: few(rows, 200 if split == "train" else 130)
                        for split, rows in parts.items()})
course_utils.data.load_reviews = stand_in"""


def test_the_full_profile_fine_tunes_an_encoder_of_bert_base_s_shape():
    notebook = notebooks.solve(BERT)
    kept = [cell for cell in notebook.cells if not cell["id"].startswith(LEFT_OUT)]
    assert len(notebook.cells) - len(kept) > 20, f"cells of {BERT.name} were renamed"
    full = v4.new_code_cell("import os; os.environ['COURSE_PROFILE'] = 'full'", id="full")
    stand_in = v4.new_code_cell(REVIEWS_STAND_IN, id="stand-in")
    facts = "print(dict(quick=quick, width=bert.config.hidden_size, max_length=max_length, "
    facts += "recipe=recipe, device=where.type, scores=len(scores), "
    facts += "columns=reviews['train'].column_names))"
    notebook.cells = [full, stand_in, *kept, v4.new_code_cell(facts, id="facts")]
    execution = notebooks.execute(notebook, BERT.parent, strict=True, timeout=600, threads=1)
    outputs = {cell["id"]: cell.get("outputs") for cell in execution.notebook.cells}
    facts = ast.literal_eval(outputs["facts"][0].text)
    print(f"{execution.seconds:.0f} s, {facts}")
    assert not facts["quick"] and (facts["width"], facts["max_length"]) == (768, 128)
    assert facts["recipe"]["learning_rate"] == 5e-5 and facts["scores"] >= 5
    assert facts["columns"] == ["text", "label"]
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    table = "".join(output.get("text", "") for output in outputs["half-table"])
    assert ("No GPU in use" in table) is (facts["device"] == "cpu")


DDP = REPOSITORY / "notebooks" / "05_ddp.ipynb"
DDP_PARTS = """
    all_reduce_mean shard_indices broadcast_parameters average_gradients naive_ddp bucketed_ddp
    global_accuracy save_checkpoint load_checkpoint
""".split()
DDP_CELLS = """
    setup imports load digits apart weights-by-step prove-average-code prove-naive
    prove-accuracy-code resume-training resume-proof gpu-gradients gpu-tried
""".split()
OWN_FILES = """import course_utils.data
from pathlib import Path
raw = Path({raw!r})
def own_paths(train, profile=None):
    name = "train" if train else "t10k"
    return raw / f"{{name}}-images-idx3-ubyte", raw / f"{{name}}-labels-idx1-ubyte"
course_utils.data.idx_paths = own_paths"""


def test_the_full_profile_trains_on_two_processes(mnist_sample):
    notebook = shortened(DDP, DDP_PARTS, DDP_CELLS)
    source = OWN_FILES.format(raw=str(mnist_sample / "MNIST" / "raw"))
    ids = [cell["id"] for cell in notebook.cells]
    notebook.cells.insert(ids.index("digits"), v4.new_code_cell(source, id="own-files"))
    facts = "print(dict(quick=quick, shape=tuple(x_train.shape), proofs=len(proof.differences)))"
    notebook.cells.append(v4.new_code_cell(facts, id="facts"))
    execution = notebooks.execute(notebook, DDP.parent, strict=True, timeout=300, threads=1)
    outputs = {cell["id"]: cell.get("outputs") for cell in execution.notebook.cells}
    facts = ast.literal_eval(outputs["facts"][0].text)
    print(f"{execution.seconds:.0f} s, {facts}")
    assert facts == {"quick": False, "shape": (7000, 784), "proofs": 5}
    told = "".join(output.get("text", "") for output in outputs["gpu-tried"])
    assert ("No CUDA GPU" in told) is not torch.cuda.is_available()
