"""The benchmarks run the chapters' own code, so a renamed cell must not pass unseen."""

from __future__ import annotations

import pytest

from benchmarks import data_parallel, fine_tuning

pytestmark = pytest.mark.slow


def test_the_chapter_s_own_cells_train_and_measure(monkeypatch, capsys):
    names = fine_tuning.chapter_names()
    few = names["train"][:8]
    names.update(
        train=few, validation=few[:4], test=few[4:], recipe=names["recipe"] | {"epochs": 1}
    )
    names["bert"] = names["bert"].__class__(names["bert"].config.__class__(
        vocab_size=len(names["vocab"]), hidden_size=24, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=24), add_pooling_layer=False)  # fmt: skip
    monkeypatch.setattr(fine_tuning, "chapter_names", lambda: names)
    fine_tuning.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * 2 + 2 and "standard deviation" in lines[-1]


def test_two_processes_are_measured_beside_one(capsys):
    data_parallel.main(rounds=2, scale=16)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    medians = [float(line[54:].split()[0]) for line in lines[2:]]
    assert all(0.01 < median < 100 for median in medians)


def test_a_ratio_is_taken_round_by_round():
    assert data_parallel.ratios([2, 4, 6, 8, 10], [1, 2, 3, 4, 5]) == (2, 2, 2)
    assert data_parallel.ratios([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])[1] == 3
