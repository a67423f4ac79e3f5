"""A learner's own MultiHeadAttention, once it has passed, runs inside the real encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbformat import v4

from course_utils import notebooks

CHAPTER = Path(__file__).resolve().parents[1] / "notebooks" / "03_attention.ipynb"
PARTS = """
    scaled_dot_product_attention split_heads merge_heads multi_head_attention layer_norm
    feed_forward encoder_block load_bert_layer
""".split()
CELLS = "setup imports real-load real-tokens real-expected real-build real-prove".split()
OWN = '''
class MultiHeadAttention(nn.Module):
    """Written by a learner: one head after the other."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(d_model, d_model))

    def forward(self, x, mask=None):
        outputs = []
        parts = [layer(x).chunk(self.num_heads, dim=-1) for layer in self.layers()]
        for head, (q, k, v) in enumerate(zip(*parts)):
            own = mask
            if mask is not None and mask.ndim == 4:  # one mask for all heads, or one for each
                own = mask[:, head if mask.shape[1] > 1 else 0]
            outputs.append(scaled_dot_product_attention(q, k, v, own))
        return self.output(torch.cat(outputs, dim=-1))

    def layers(self):
        return self.query, self.key, self.value
'''

pytestmark = pytest.mark.slow


def test_the_real_encoder_runs_on_the_learner_s_own_attention():
    notebook = notebooks.read(CHAPTER)  # as shipped: every other exercise is unsolved
    dashed = [slug.replace("_", "-") for slug in PARTS]
    wanted = {*CELLS, *(f"ex-{slug}" for slug in dashed), *(f"check-{slug}" for slug in dashed)}
    notebook.cells = [cell for cell in notebook.cells if cell["id"] in wanted]
    assert {cell["id"] for cell in notebook.cells} == wanted, "cells of the chapter were renamed"
    for cell in notebook.cells:
        if cell["id"] == "ex-multi-head-attention":
            cell.source = OWN.strip()
    whose = "print([hasattr(block.attention, 'layers') for block in own.blocks])"
    notebook.cells.append(v4.new_code_cell(whose, id="whose"))
    execution = notebooks.execute(notebook, CHAPTER.parent, timeout=120, threads=1)
    outputs = {cell["id"]: cell.get("outputs") for cell in execution.notebook.cells}
    assert "passed" in str(outputs["check-multi-head-attention"])
    assert "not attempted" in str(outputs["check-encoder-block"])
    assert outputs["whose"][0].text.strip() == str([True] * 6)
    assert "7 hidden states of 8 sentences agree" in outputs["real-prove"][0].text
