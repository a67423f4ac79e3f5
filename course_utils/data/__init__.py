"""The course's data. Nothing is imported, made or downloaded before a function is called."""

from course_utils.data.digits import idx_paths, load_digits, mnist_root
from course_utils.data.encoder import (
    encoder_path,
    load_encoder,
    load_encoder_or_miniature,
    random_encoder,
)
from course_utils.data.reviews import load_reviews

__all__ = [
    "encoder_path",
    "fetch_all",
    "idx_paths",
    "load_digits",
    "load_encoder",
    "load_encoder_or_miniature",
    "load_reviews",
    "mnist_root",
    "random_encoder",
]


def fetch_all() -> None:
    """Make or fetch, and verify, everything that the quick profile needs.

    Each thing is tried, also after another has failed. Raises SystemExit with the sentences of
    those that cannot be had: this is what `python -m course_utils env` runs.
    """
    failures = []
    for name, path in (("Digits", mnist_root), ("Encoder", encoder_path)):
        try:
            print(f"{name}: {path('quick')}", flush=True)
        except RuntimeError as error:
            failures.append(str(error))
    if failures:
        raise SystemExit("\n".join(failures))
