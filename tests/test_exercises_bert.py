"""The references of chapter 4 against transformers, torch and scikit-learn; figures in symptoms."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import notebooks
from course_utils.data import load_encoder, load_reviews
from course_utils.exercises import bert as catalogue
from course_utils.exercises import find
from course_utils.reference import bert

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "04_bert.ipynb"


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def tokenizer():
    return load_encoder("quick")[1]


@pytest.fixture(scope="module")
def texts():
    return [text for split in load_reviews("quick").values() for text in split["text"]]


# --- what BERT reads ----------------------------------------------------------------------------


def test_wordpiece_is_hugging_face_s_on_every_word_of_the_reviews(tokenizer, texts):
    vocab = tokenizer.get_vocab()
    backend = tokenizer.backend_tokenizer
    words = {
        word
        for text in texts
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(
            backend.normalizer.normalize_str(text)
        )
    }
    words |= {"a" * 100, "a" * 101, "unaffable", "☃", "x☃", "1234567"}
    assert len(words) > 5_000
    assert [w for w in words if bert.wordpiece(w, vocab) != tokenizer.tokenize(w)] == []
    assert sum(len(bert.wordpiece(w, vocab)) > 1 for w in words) > 500


def test_pairs_are_hugging_face_s(tokenizer, texts):
    vocab = tokenizer.get_vocab()
    cut = 0
    for a, b in zip(texts[:300:2], texts[1:300:2], strict=True):
        for second, length in itertools.product((b, None), (7, 21, 41, 65)):
            theirs = tokenizer(a, second, truncation="longest_first", max_length=length)
            pieces = [None if text is None else tokenizer.tokenize(text) for text in (a, second)]
            ours = bert.encode_pair(*pieces, vocab, length)
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours["token_type_ids"] == theirs["token_type_ids"]
            cut += len(ours["input_ids"]) == length
    assert cut > 300


def test_a_batch_is_hugging_face_s(tokenizer, texts):
    from transformers import DataCollatorWithPadding

    examples = [{**tokenizer(text), "label": i % 2} for i, text in enumerate(texts[:7])]
    theirs = DataCollatorWithPadding(tokenizer)([dict(example) for example in examples])
    ours = bert.collate(examples, tokenizer.pad_token_id)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.int64 and torch.equal(tensor, theirs[name]), name


# --- pretraining --------------------------------------------------------------------------------


def rates(inputs, labels, ids, mask_id):
    chosen = labels != -100
    hidden = inputs == mask_id
    share = chosen.double().mean().item()
    kinds = (hidden, ~hidden & (inputs != ids), inputs == ids)
    return [share, *(kind[chosen].double().mean().item() for kind in kinds)]


def test_masks_are_drawn_at_bert_s_rates_like_hugging_face_s(tokenizer):
    from transformers import DataCollatorForLanguageModeling

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, 30_000, (300, 100), generator=generator)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    special = tokenizer.all_special_ids
    inputs, labels = bert.mask_tokens(ids, special, tokenizer.mask_token_id, 30_522, generator)
    assert (labels[:, [0, -1]] == -100).all() and torch.equal(inputs[:, 0], ids[:, 0])
    assert torch.equal(inputs[labels == -100], ids[labels == -100])
    assert torch.equal(labels[labels != -100], ids[labels != -100])

    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(tokenizer)
    theirs = collator([{"input_ids": row} for row in ids])
    asked = 0.15 * ids[:, 1:-1].numel()
    for ours, other, p, n in zip(
        rates(inputs[:, 1:-1], labels[:, 1:-1], ids[:, 1:-1], tokenizer.mask_token_id),
        rates(theirs["input_ids"], theirs["labels"], ids, tokenizer.mask_token_id),
        (0.15, 0.8, 0.1, 0.1),
        (ids[:, 1:-1].numel(), asked, asked, asked),
        strict=True,
    ):
        bound = 5 * math.sqrt(p * (1 - p) / n)
        assert abs(ours - p) < bound and abs(other * (1 if n == asked else 100 / 98) - p) < bound


def test_accuracy_counts_what_was_asked_alone():
    logits = torch.eye(5)[torch.tensor([[1, 2, 3], [4, 0, 1]])]
    labels = torch.tensor([[1, -100, -100], [-100, 0, 2]])
    assert bert.masked_accuracy(logits, labels) == pytest.approx(2 / 3)


# --- the classifier -----------------------------------------------------------------------------


def test_masked_mean_is_the_mean_of_each_text_alone():
    hidden = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.stack(
        [row[: m.sum()].mean(dim=0) for row, m in zip(hidden, mask, strict=True)]
    )
    for kind in (mask, mask.bool()):
        close(bert.masked_mean(hidden, kind), expected)


def tiny(**changes):
    """BertForSequenceClassification with random weights, its norms' and biases' too."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=50, num_attention_heads=3, num_labels=3, **sizes, **changes)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def own(theirs):
    ours = bert.SequenceClassifier(theirs.bert, 3).double().eval()
    ours.pooler.load_state_dict(theirs.bert.pooler.dense.state_dict())
    ours.classifier.load_state_dict(theirs.classifier.state_dict())
    return ours


def test_the_classifier_is_hugging_face_s():
    theirs = tiny()
    ours = own(theirs)
    ids, types = torch.randint(50, (4, 9)), torch.randint(2, (4, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 1])[:, None]).long()
    labels = torch.tensor([2, 0, 1, 1])
    out = theirs(ids, attention_mask=mask, token_type_ids=types, labels=labels)
    logits = ours(ids, mask, types)
    close(logits, out.logits)
    parameters = list(theirs.bert.embeddings.parameters()) + list(theirs.bert.encoder.parameters())
    one = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)
    for grad, other in zip(one, torch.autograd.grad(out.loss, parameters), strict=True):
        close(grad, other)


def test_mean_pooling_does_not_depend_on_neighbours():
    model = bert.SequenceClassifier(tiny().bert, 2, pooling="mean").double().eval()
    short, long = [3, 7, 5], [4, 1, 9, 2, 8, 6, 10]
    close(bert.classify(model, [short, long], 0)[:1], bert.classify(model, [short], 0))
    with pytest.raises(ValueError, match="'max'"):
        bert.SequenceClassifier(model.encoder, 2, pooling="max")


def test_loss_and_predictions_are_hugging_face_s():
    model = tiny()
    batch = {
        "input_ids": torch.randint(50, (4, 9)),
        "attention_mask": torch.ones(4, 9, dtype=torch.long),
        "labels": torch.tensor([2, 0, 1, 1]),
    }
    close(bert.batch_loss(model, batch), model(**batch).loss)
    assert torch.equal(bert.predicted_classes(model, batch), model(**batch).logits.argmax(-1))


# --- training -----------------------------------------------------------------------------------


def test_the_schedule_is_hugging_face_s():
    from transformers import get_linear_schedule_with_warmup

    for warmup, total in ((0, 7), (3, 10), (5, 5), (1, 2)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
        for step in range(total + 3):
            assert bert.warmup_linear(step, warmup, total) == pytest.approx(
                scheduler.get_last_lr()[0], abs=1e-12
            )
            optimizer.step()
            scheduler.step()


def test_what_decays_is_what_decays_in_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny()
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    theirs = Trainer(model, arguments).create_optimizer().param_groups

    def sets(groups):
        return {frozenset(map(id, g["params"])): g["weight_decay"] for g in groups}

    assert sets(bert.weight_decay_groups(model, 0.1)) == sets(theirs)
    model.bert.embeddings.requires_grad_(False)
    left = {id(p) for g in bert.weight_decay_groups(model, 0.1) for p in g["params"]}
    assert left == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("sizes", [(8,), (3, 3, 2), (4, 4, 1), (1, 5)])
def test_accumulation_is_the_big_batch(sizes, max_norm):
    def model():
        return own(tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

    n = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    big = {
        "input_ids": torch.randint(50, (n, 7), generator=generator),
        "attention_mask": torch.ones(n, 7, dtype=torch.long),
        "labels": torch.randint(3, (n,), generator=generator),
    }
    pieces = [dict(zip(big, part, strict=True)) for part in zip(*(t.split(sizes) for t in big.values()), strict=True)]  # fmt: skip  # noqa: E501
    one, other = model(), model()
    losses = []
    for net, batches in ((one, [big]), (other, pieces)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        losses.append([bert.accumulate_step(net, batches, F.cross_entropy, optimizer, max_norm) for _ in range(3)])  # fmt: skip  # noqa: E501
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and losses[0][-1] < losses[0][0]
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        close(p, q, 1e-10)


def test_copies_of_a_text_stay_together():
    texts = [f"Text {i % 37}" + " " * (i % 3) for i in range(100)] + ["text 5", "TEXT\t5"]
    train, test = bert.split_texts(texts, 0.3, torch.Generator().manual_seed(0))
    assert sorted(train + test) == list(range(102))
    train, test = ({" ".join(texts[i].lower().split()) for i in part} for part in (train, test))
    assert not train & test and len(test) == round(0.3 * 37)


def test_freezing_leaves_the_head():
    model = own(tiny())
    bert.freeze_encoder(model)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"pooler", "classifier"}


# --- scores, spans, LoRA ------------------------------------------------------------------------


def test_macro_f1_is_scikit_learn_s():
    from sklearn.metrics import f1_score

    rng = torch.Generator().manual_seed(0)
    for classes, n in ((2, 9), (3, 40), (7, 12)):
        for _ in range(20):
            p, y = (torch.randint(classes, (n,), generator=rng) for _ in range(2))
            theirs = f1_score(y, p, average="macro", labels=range(classes + 1), zero_division=0)
            assert bert.macro_f1(p, y, classes + 1) == pytest.approx(theirs, abs=1e-12)
    constant = torch.zeros(100, dtype=torch.long)
    labels = (torch.arange(100) >= 95).long()
    assert bert.macro_f1(constant, labels, 2) == pytest.approx(0.487, abs=5e-4)


def test_best_span_is_the_best_of_all():
    rng = random.Random(0)
    for _ in range(50):
        n = rng.randint(3, 12)
        start, end = torch.randn(2, n)
        first = rng.randrange(n)
        last = rng.randrange(first, n)
        mask = torch.tensor([first <= i <= last for i in range(n)])
        longest = rng.randint(1, n)
        spans = [
            (i, j) for i in range(first, last + 1) for j in range(i, min(i + longest, last + 1))
        ]
        best = max(spans, key=lambda span: (start[span[0]] + end[span[1]]).item())
        assert bert.best_span(start, end, mask, longest) == best


@pytest.mark.parametrize("bias", [True, False])
def test_lora_starts_as_its_base_and_merges(bias):
    base = nn.Linear(6, 5, bias=bias).double()
    layer = bert.LoRALinear(base, 2, alpha=3).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    with torch.no_grad():
        layer.lora_B.normal_()
    close(layer.merge()(x), layer(x))
    close(layer(x) - base(x), 1.5 * x @ (layer.lora_B @ layer.lora_A).T)
    assert layer.merge().weight.data_ptr() != base.weight.data_ptr()


# --- the figures in the symptoms ----------------------------------------------------------------

# Where the chapter shows the symptom; its stored outputs are compared with fresh ones elsewhere.
SHOWN = {
    "fix_accuracy_of_unmasked": "symptom-accuracy",
    "fix_missing_attention_mask": "symptom-mask",
    "fix_loss_of_model_output": "symptom-output",
    "fix_first_output": "symptom-first",
    "fix_leaky_split": "scraped",
    "fix_freeze_without_effect": "symptom-freeze",
}


@pytest.mark.parametrize("slug", SHOWN)
def test_the_chapter_shows_the_figures_of_the_symptom(slug):
    cells = {cell["id"]: cell for cell in notebooks.read(NOTEBOOK).cells}
    shown = "".join(output.get("text", "") for output in cells[SHOWN[slug]].outputs)
    said = find(slug).symptom
    figures = re.findall(r"\d+\.\d+|\d{1,3}(?:,\d{3})+", said) or re.findall(r"`(.+)`", said)
    assert len(figures) >= 1
    assert all(figure in shown for figure in figures), (figures, shown)


# --- the catalogue ------------------------------------------------------------------------------

MUSEUM = "4.1 4.2 4.3 4.4 4.5 4.6 4.7 4.11 4.12 4.13 4.14 4.15 4.18 4.19 4.20 4.22 4.23 4.25"
MUSEUM = [*MUSEUM.split(), "F12", "F14", "F15", "F16", "F17", "C11", "C14", "C15", "§5"]


@pytest.mark.parametrize("row", MUSEUM)
def test_each_known_defect_of_bert_is_in_the_catalogue(row):
    source = Path(catalogue.__file__).read_text("utf-8")
    listed = re.findall(r"# museum (.+)", source)
    assert any(row in re.split(r"[ ,;]+", line) for line in listed), f"no mistake is row {row}"
