"""The course's data. Nothing is imported, made or downloaded before a function is called."""

from course_utils.data.digits import idx_paths, load_digits, mnist_root

__all__ = ["fetch_all", "idx_paths", "load_digits", "mnist_root"]


def fetch_all() -> None:
    """Make or fetch, and verify, everything that the quick profile needs."""
    print(f"Digits: {mnist_root('quick')}")
