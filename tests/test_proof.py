"""A proof that could not fail would prove nothing."""

from __future__ import annotations

import pytest
import torch

from course_utils.proof import Proof


def test_what_agrees_is_said_and_kept(capsys):
    proof = Proof()
    proof.equal("the same", torch.ones(3), torch.ones(3) + 1e-8, 1e-6)
    proof.equal("two tensors", [torch.ones(2), torch.zeros(1)], (torch.ones(2), torch.zeros(1)), 0)
    large = 1e9 * torch.ones(1)
    proof.equal("large entries, so a relative difference", large + 64, large, 1e-6)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(line.endswith("True") for line in said)
    assert proof.differences["two tensors"] == (0.0, 0)
    proof.table()
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (torch.ones(3), torch.ones(3) + 1e-3, "apart"),
        (torch.ones(1), torch.ones(3), "shapes"),  # must not be broadcast
        ([torch.ones(3)], [torch.ones(3), torch.ones(3)], "shapes"),
        ([], [torch.ones(3)], "shapes"),
        (torch.tensor([float("nan")]), torch.ones(1), "apart"),
        ([torch.ones(2), torch.tensor([0.0, float("nan")])], [torch.ones(2)] * 2, "apart"),
    ],
)
def test_what_differs_is_refused(ours, theirs, told):
    with pytest.raises(AssertionError, match=told):
        Proof().equal("what", ours, theirs, 1e-6)


def test_whole_numbers_and_truths_are_compared_too():
    proof = Proof()
    proof.equal("bytes", torch.tensor([3], dtype=torch.uint8), torch.tensor([3]).byte(), 0)
    for ours, theirs in ((torch.tensor([3]).byte(), torch.tensor([4]).byte()),
                         (torch.tensor([True]), torch.tensor([False]))):  # fmt: skip
        with pytest.raises(AssertionError, match="apart"):
            proof.equal("differ", ours, theirs, 0.1)
