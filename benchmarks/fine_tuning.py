"""Chapter 4's fine-tuning with three seeds: python -m benchmarks.fine_tuning

The code is the chapter's own: its cells with the worked answers, run anew for each seed of the
head's start, the order of the batches and dropout. Beside it the same network from random weights,
trained as in the chapter. About a minute for each training on one quiet thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from course_utils import notebooks

CHAPTER = Path(__file__).resolve().parents[1] / "notebooks" / "04_bert.ipynb"
SEEDS = (0, 1, 2)
EXERCISES = """
    collate masked_mean sequence_classifier warmup_linear weight_decay_groups accumulate_step
""".split()
CELLS = "imports load examples batches library logits-of recipe fine-tune".split()


def chapter_names() -> dict:
    """The names that these cells of the solved chapter define."""
    wanted = {*CELLS, *(f"ex-{slug.replace('_', '-')}" for slug in EXERCISES)}
    cells = [cell for cell in notebooks.solve(CHAPTER).cells if cell["id"] in wanted]
    missing = wanted - {cell["id"] for cell in cells}
    if missing:
        raise RuntimeError(f"{CHAPTER.name} has no cells {', '.join(sorted(missing))} any more.")
    names: dict = {}
    with redirect_stdout(StringIO()):
        for cell in cells:
            exec(compile(cell.source, cell["id"], "exec"), names)
    return names


def accuracies(seeds: tuple[int, ...] = SEEDS) -> Iterator[tuple[str, int, float, float]]:
    """(way, seed, share right on validation, share right on test) of each training."""
    names = chapter_names()
    torch, SequenceClassifier = names["torch"], names["SequenceClassifier"]
    for seed in seeds:
        for way in ("fine-tuned", "from scratch"):
            torch.manual_seed(seed)
            settings = names["recipe"]
            encoder = names["copy"].deepcopy(names["bert"])
            if way == "from scratch":
                encoder = names["BertModel"](names["bert"].config, add_pooling_layer=False)
                settings = {"epochs": 2, "learning_rate": 1e-4}
            model = SequenceClassifier(encoder, 2, pooling="mean").to(names["where"])
            names["fine_tune"](model, names["train"], **settings, seed=seed)
            yield way, seed, *(names["accuracy"](model, names[p]) for p in ("validation", "test"))


def main() -> None:
    found: dict[str, list[float]] = {}
    print(f"{'chapter 4':14} seed  validation   test")
    for way, seed, validation, test in accuracies():
        print(f"{way:14} {seed:4} {validation:11.1%} {test:6.1%}", flush=True)
        found.setdefault(way, []).append(100 * test)
    for way, shares in found.items():
        mean, spread = statistics.mean(shares), statistics.stdev(shares)
        print(f"{way:14} on test: mean {mean:.1f} %, standard deviation {spread:.1f} points")


if __name__ == "__main__":
    main()
