"""The record loses nothing: cut-off files, two processes, a process that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from course_utils.exercises import record


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _pass(slug, source="def f(): ..."):
    record.update(slug, lambda entry: entry.update(state="passed", source=source))


def test_starts_empty_and_leaves_no_trace(home):
    assert record.load() == {}
    assert not home.exists()


def test_round_trip(home):
    _pass("mlp", "übung = 'π'\n")
    _pass("dropout")
    assert list(record.load()) == ["mlp", "dropout"]
    assert record.load()["mlp"]["source"] == "übung = 'π'\n"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_loses_nothing_and_is_set_aside(home, capsys, keep):
    for number in range(5):
        _pass(f"exercise_{number}", "x" * 200)
    path = home / "record.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[: int(keep * len(text))])
    entries = record.load()
    assert [e["state"] for e in entries.values()] == ["passed"] * 5
    assert "damaged and is set aside as record.damaged-1.jsonl; 5 exercises" in (
        capsys.readouterr().out
    )
    assert (home / "record.damaged-1.jsonl").read_bytes() == text[: int(keep * len(text))]
    _pass("one_more")
    assert len(record.load()) == 6
    assert capsys.readouterr().out == "", "whole again: told of once"


def test_cut_at_the_end_of_a_line_is_noticed_too(home):
    _pass("one")
    _pass("two")
    path = home / "record.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert set(record.load()) == {"one", "two"}


def test_both_files_cut_keep_their_whole_lines(home):
    for number in range(4):
        _pass(f"exercise_{number}")
    for name, keep in (("record.jsonl", 0.55), ("record.backup.jsonl", 0.8)):
        path = home / name
        text = path.read_text()
        path.write_text(text[: int(keep * len(text))])
    assert len(record.load()) == 3


def test_garbage_and_a_missing_file(home):
    _pass("one")
    (home / "record.jsonl").write_bytes(os.urandom(500))
    assert set(record.load()) == {"one"}
    _pass("two")
    (home / "record.jsonl").unlink()
    assert set(record.load()) == {"one", "two"}


CHILD = """
import sys
from course_utils.exercises import record
for number in range(40):
    record.update(f"{sys.argv[1]}_{number}", lambda entry: entry.update(state="passed"))
    record.update("both", lambda entry: entry.update(attempts=entry["attempts"] + 1))
"""


def test_two_processes_at_once(home):
    children = [subprocess.Popen([sys.executable, "-c", CHILD, name]) for name in ("a", "b")]
    assert [child.wait() for child in children] == [0, 0]
    entries = record.load()
    assert len(entries) == 81
    assert entries["both"]["attempts"] == 80


def test_a_process_killed_while_writing(home):
    for round_number in range(5):
        child = subprocess.Popen([sys.executable, "-c", CHILD, f"r{round_number}"])
        while not (home / "record.jsonl").exists() or not any(
            slug.startswith(f"r{round_number}_") for slug in record.load()
        ):
            time.sleep(0.01)
        before = record.load()
        child.kill()
        child.wait()
        after = record.load()
        assert all(after[slug]["state"] == entry["state"] for slug, entry in before.items())
    assert not list(home.glob("record.damaged*"))


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("COURSE_HOME", str(blocked / "home"))
    with pytest.raises(record.RecordUnavailable, match="set COURSE_HOME to a folder of yours"):
        _pass("one")


def test_a_folder_that_can_only_be_read_is_read(home, monkeypatch):
    _pass("one")

    def refuse():
        raise record.RecordUnavailable("read only")

    monkeypatch.setattr(record, "_lock", refuse)
    assert record.load()["one"]["state"] == "passed"


def test_the_folder_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_HOME", "~nobody-of-this-name/home")
    assert record.home().name == "home"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COURSE_HOME", "~/with space")
    assert os.name == "nt" or record.home() == tmp_path / "with space"


def test_text_that_utf_8_cannot_hold_is_kept(home):
    _pass("one", "'\ud800'")
    assert record.load()["one"]["source"] == "'\ud800'"


def test_the_file_is_plain_json_lines(home):
    _pass("one")
    lines = [json.loads(line) for line in (home / "record.jsonl").read_text().splitlines()]
    assert lines[0]["slug"] == "one" and lines[1] == {"entries": 1}
