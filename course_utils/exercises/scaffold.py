"""The pieces of a new exercise, for `python -m course_utils new-exercise CHAPTER NAME`."""

from __future__ import annotations

import re

TEMPLATE = '''\
# 1. course_utils/reference/{chapter}.py: the worked answer, which learners are shown
def {name}(x: torch.Tensor) -> torch.Tensor:
    """What it computes. x: (batch, features) float; returns (batch, features)."""
    return ...


# 2. course_utils/exercises/{chapter}.py: how an answer is judged; add {constant} to EXERCISES
def _observe_{slug}({name}, see):
    for shape in ((5, 3), (2, 4, 3)):
        with see.probe(f"x of shape {{shape}}"):
            x = see.randn(*shape, requires_grad=True)
            out = see.call("the output", {name}, x)
            see.gradients("the output", out, x=x)


{constant} = Exercise(
    slug="{slug}", chapter=..., title="...", minutes=10, difficulty=2,
    reference=reference.{name},
    observe=_observe_{slug},
    misconceptions=(Misconception("what_they_did", _what_they_did, "You ... The cost is ..."),),
    alternatives=(_another_right_way,),
    hints=("A nudge.", "Nearly the answer."),
)

# 3. notebooks/..._{chapter}.ipynb: a cell with metadata {{"exercise": "{slug}"}} with the stub
def {name}(x: torch.Tensor) -> torch.Tensor:
    """What it computes. x: (batch, features) float; returns (batch, features)."""
    raise NotImplementedError

# ... and the cell below it
{name} = check("{slug}", {name})
'''


WORDS = ("LoRA", "AdamW")  # words of the field whose capitals do not begin new ones


def slug_of(name: str) -> str:
    """AddBias → add_bias, BatchNorm1d → batch_norm_1d, MLP → mlp, LoRALinear → lora_linear.

    A function's name, as macro_f1, is its slug.
    """
    if name.islower():
        return name
    for word in WORDS:
        name = name.replace(word, word.capitalize())
    text = re.sub(r"([a-z])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    return re.sub(r"([a-zA-Z])(\d)", r"\1_\2", text).lower()


def scaffold(chapter: str, name: str) -> str:
    """The three pieces as text, with the names filled in."""
    slug = slug_of(name)
    return TEMPLATE.format(chapter=chapter, name=name, slug=slug, constant=slug.upper())
