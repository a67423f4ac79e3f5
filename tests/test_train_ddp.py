"""The program under torchrun: killed anywhere it ends with the weights of a run that was not.

A control for each thing that a checkpoint holds shows that the comparison can fail.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from course_utils import train_ddp
from course_utils.processes import launch

ROOT = Path(__file__).resolve().parents[1]
LINUX = sys.platform == "linux"
ON_LINUX = [pytest.mark.slow, pytest.mark.skipif(not LINUX, reason="looks for orphans in /proc")]
ON_LINUX += [pytest.mark.must_run_in_ci] * LINUX
SHORT = ("--epochs", "2", "--every", "10")  # 2 · 23 steps, checkpoints after 10, 20, 30 and 40

# The same program, with a fault inside the second checkpoint of the first attempt.
SABOTAGED = """
import io, os, signal, sys, torch
from course_utils import train_ddp

place, first = sys.argv.pop(1), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
rank, calls = os.environ["RANK"], []
save, replace, barrier = torch.save, os.replace, torch.distributed.barrier

def die_at(name):
    calls.append(name)
    if first and place == name and calls.count(name) == 2:
        sys.stdout.flush()
        os.kill(os.getpid(), 9)

def save_half(value, file, **options):
    if options:  # a tensor within what is sent from rank to rank
        return save(value, file, **options)
    whole = io.BytesIO()
    save(value, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    die_at("rank 0, file half written")
    file.write(whole.getvalue()[len(whole.getvalue()) // 2 :])

def replace_and_die(*paths):
    die_at("rank 0, file not renamed yet")
    replace(*paths)
    die_at("rank 0, file just renamed")

def barrier_or_die(*args, **kwargs):
    die_at(f"rank {rank}, waiting for the file")
    return barrier(*args, **kwargs)

torch.save, os.replace, torch.distributed.barrier = save_half, replace_and_die, barrier_or_die
train_ddp.run()
"""


class Run:
    """What came of one torchrun: its return code, result, output, and whether it left anything."""

    def __init__(self, folder, *command, processes=2, restarts=3, seconds=120):
        folder.mkdir(parents=True, exist_ok=True)
        mark, port, result = uuid.uuid4().hex, free_port(), folder / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--nproc-per-node", str(processes)]
        launcher += ["--max-restarts", str(restarts), *command, "--result", str(result)]
        environment = os.environ | {"COURSE_TEST_MARK": mark, "PYTHONPATH": str(ROOT)}
        agent = subprocess.Popen(
            launcher, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self.out, self.err = agent.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"torchrun took more than {seconds} s: {agent.communicate()}")
        self.code, self.orphans, self.port_is_free = agent.returncode, marked(mark), can_bind(port)
        for pid in self.orphans:
            os.kill(pid, signal.SIGKILL)
        self.result = json.loads(result.read_text()) if result.exists() else None


def marked(mark):
    """The processes whose environment holds the mark: all that a run started, whoever their parent
    is by now."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:  # ended in between
            continue
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_bind(port):
    """Whether a server could listen there now; connections that are closing do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def program(*arguments):
    return "-m", "course_utils.train_ddp", *arguments


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, *program(*SHORT, "--checkpoint", str(folder / "run.pt")))
    assert run.code == 0, run.err
    assert run.result["restarts"] == 0 and run.result["world_size"] == 2
    return run.result


def assert_recovered(run, undisturbed):
    assert run.code == 0, run.err
    assert "exitcode: -9" in run.err, "nobody was killed"
    assert run.result == undisturbed | {"restarts": 1}
    assert run.orphans == [] and run.port_is_free


# Before any checkpoint; just before one, just after one; at the end of an epoch, and of the run.
KILLS = ("0:3", "1:10", "0:11", "1:23", "0:24", "1:46")
PLACES = ("rank 0, file half written", "rank 0, file not renamed yet", "rank 0, file just renamed")
PLACES += ("rank 1, waiting for the file",)


class TestKilledWithSIGKILL:
    pytestmark = ON_LINUX

    @pytest.mark.parametrize("kill", KILLS)
    def test_after_a_step(self, kill, undisturbed, tmp_path):
        checkpoint = ("--checkpoint", str(tmp_path / "run.pt"))
        run = Run(tmp_path, *program(*SHORT, *checkpoint, "--kill", kill))
        assert_recovered(run, undisturbed)
        done = (int(kill.split(":")[1]) - 1) // 10 * 10
        assert f"2 processes on cpu, {done} steps done" in run.out

    @pytest.mark.parametrize("place", PLACES)
    def test_while_a_checkpoint_is_written(self, place, undisturbed, tmp_path):
        sabotaged = tmp_path / "sabotaged.py"
        sabotaged.write_text(SABOTAGED)
        checkpoint = ("--checkpoint", str(tmp_path / "run.pt"))
        run = Run(tmp_path, str(sabotaged), place, *SHORT, *checkpoint)
        assert_recovered(run, undisturbed)
        done = 10 if "half" in place or "not renamed" in place else "[12]0"
        assert re.search(f"2 processes on cpu, {done} steps done", run.out)

    def test_without_a_checkpoint_it_begins_anew(self, undisturbed, tmp_path):
        run = Run(tmp_path, *program(*SHORT, "--kill", "1:30"))
        assert_recovered(run, undisturbed)
        assert run.out.count(" 0 steps done") == 2

    def test_without_restarts_it_fails_and_leaves_nothing(self, tmp_path):
        run = Run(tmp_path, *program(*SHORT, "--kill", "0:5"), restarts=0)
        assert run.code != 0 and run.result is None
        assert "exitcode: -9" in run.err
        assert run.orphans == [] and run.port_is_free


def train(folder, wrapper, checkpoint, edit=None, epochs=3):
    """One run in this rank's process; the digest of its weights. `edit` changes the checkpoint."""
    import random

    import torch.distributed as dist

    path = f"{folder}/{checkpoint}"
    if edit is not None and dist.get_rank() == 0:
        content = torch.load(path, weights_only=True)
        edit(content)
        torch.save(content, path)
    dist.barrier()
    random.seed(dist.get_rank() + 100), torch.manual_seed(dist.get_rank() + 100)
    args = train_ddp.parse_arguments(["--epochs", str(epochs), "--every", "15"])
    args.checkpoint = path
    x, y = (tensor[:400] for tensor in train_ddp.load_tensors(True, "quick"))
    model = torch.nn.Sequential(train_ddp.Dropout(0.2), train_ddp.MLP(64, 16, 10))
    ddp = train_ddp.wrap(model, wrapper)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 21)
    start = train_ddp.resume(path, model, optimizer, scheduler)
    train_ddp.train(args, ddp, model, optimizer, scheduler, x, y, start)
    return train_ddp.weights_digest(model)


def forget_rng(checkpoint):
    state = torch.Generator().manual_seed(9).get_state()
    checkpoint["rng"] = [entry | {"torch": state} for entry in checkpoint["rng"]]


def swap_rng(checkpoint):
    checkpoint["rng"].reverse()


def forget_optimizer(checkpoint):
    for state in checkpoint["optimizer"]["state"].values():
        state["exp_avg"].zero_(), state["exp_avg_sq"].zero_(), state["step"].zero_()


def forget_scheduler(checkpoint):
    checkpoint["scheduler"]["last_epoch"] = 0


def forget_position(checkpoint):
    checkpoint["step"] = 0


def forget_epoch(checkpoint):
    checkpoint["epoch"] -= 1


def unchanged(checkpoint):
    pass


# 3 epochs of 7 steps: the only checkpoint is written after step 15, the first of the last epoch.
EDITS = (forget_rng, swap_rng, forget_optimizer, forget_scheduler, forget_position, forget_epoch)


class TestTheComparisonCanFail:
    @pytest.mark.parametrize("wrapper", ["bucketed", "naive", "torch"])
    def test_resumed_is_bitwise_uninterrupted(self, wrapper, tmp_path):
        whole = launch(train, 2, tmp_path, wrapper, "run.pt")
        assert launch(train, 2, tmp_path, wrapper, "run.pt", unchanged) == whole
        assert whole[0] == whole[1]

    @pytest.mark.parametrize("edit", EDITS)
    def test_a_checkpoint_that_lacks_something_gives_other_weights(self, edit, tmp_path):
        whole = launch(train, 2, tmp_path, "bucketed", "run.pt")
        changed = launch(train, 2, tmp_path, "bucketed", "run.pt", edit)
        assert changed[0] != whole[0]
        assert changed[0] == changed[1], "the ranks still agree with one another"

    def test_the_ranks_draw_different_dropout(self, tmp_path):
        whole = launch(train, 2, tmp_path, "bucketed", "run.pt")
        assert len(set(whole)) == 1
        rng = torch.load(tmp_path / "run.pt", weights_only=True)["rng"]
        assert len(rng) == 2 and not torch.equal(rng[0]["torch"], rng[1]["torch"])


def resume_alone(path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    try:
        return train_ddp.resume(path, model, optimizer, scheduler)
    except SystemExit as stop:
        return str(stop)


def resume_where_only_one_rank_sees_the_file(folder):
    import torch.distributed as dist

    return resume_alone(f"{folder}/{dist.get_rank()}.pt")


def save(path, model):
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    train_ddp.save_checkpoint(path, model, optimizer, scheduler, 3, 4)


class TestSentences:
    def test_a_checkpoint_is_taken_up(self, tmp_path):
        path = tmp_path / "run.pt"
        launch(save, 1, path, torch.nn.Linear(2, 2))
        assert launch(resume_alone, 1, path) == [(3, 4)]
        assert launch(resume_alone, 1, tmp_path / "other.pt") == [(0, 0)]

    def test_of_another_number_of_processes(self, tmp_path):
        launch(save, 1, tmp_path / "run.pt", torch.nn.Linear(2, 2))
        for said in launch(resume_alone, 2, tmp_path / "run.pt"):
            assert "was written by 1 processes and these are 2: start 1, or give" in said

    def test_of_another_network(self, tmp_path):
        launch(save, 1, tmp_path / "run.pt", torch.nn.Linear(3, 2))
        (said,) = launch(resume_alone, 1, tmp_path / "run.pt")
        assert "run.pt does not fit the network of this run" in said

    def test_damaged(self, tmp_path):
        (tmp_path / "run.pt").write_bytes(b"PK\3\4 not all of it")
        (said,) = launch(resume_alone, 1, tmp_path / "run.pt")
        assert "cannot be read as a checkpoint" in said and "remove it to start anew" in said

    def test_on_storage_that_is_not_shared(self, tmp_path):
        launch(save, 2, tmp_path / "0.pt", torch.nn.Linear(2, 2))
        for said in launch(resume_where_only_one_rank_sees_the_file, 2, tmp_path):
            assert "Not all ranks find" in said and "where all machines see" in said

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--epochs", "0"], "'0' is not a whole number from 1 on"),
            (["--every", "often"], "'often' is not a whole number from 1 on"),
            (["--kill", "1"], "'1' is not RANK:STEP, like 1:30"),
            (["--wrapper", "fsdp"], "invalid choice: 'fsdp'"),
            (["--dropout", "1.5"], "'1.5' is not a number from 0 to 1"),
            (["--lr", "nan"], "'nan' is not a number from 0 to 1"),
            (["--checkpoint", "/no/such/run.pt"], "there is no folder /no/such: make it first"),
        ],
    )
    def test_bad_arguments(self, arguments, sentence, capsys):
        with pytest.raises(SystemExit):
            train_ddp.parse_arguments(arguments)
        assert sentence in capsys.readouterr().err

    def test_the_arguments_are_explained(self, capsys):
        with pytest.raises(SystemExit):
            train_ddp.parse_arguments(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "--kill RANK:STEP for tests: in the first attempt, RANK gets a SIGKILL" in text
        assert "--checkpoint PATH write it, go on from it" in text


def named_twice(path):
    """The name that each rank finds in a store where a dead attempt has left its own."""
    import torch.distributed as dist

    store = dist.FileStore(path, 2)
    rank = dist.get_rank()
    names = []
    for late in (0, 1):  # in each attempt another rank comes late, and finds the other's new number
        if rank == late:
            time.sleep(0.3)
        names.append(train_ddp.attempt_name(store, rank, 2, 20))
        dist.barrier()
    return names


def test_all_ranks_of_an_attempt_agree_on_its_name_and_attempts_differ(tmp_path):
    first, second = launch(named_twice, 2, str(tmp_path / "store"))
    assert first == second
    assert first[0] != first[1]


def named_alone(path):
    """Of a world of two of which the other has died: its number is there, it is not."""
    import torch.distributed as dist

    store = dist.FileStore(path, 1)
    store.set("number/1", "of a dead process"), store.set("seen/1", "what it saw")
    try:
        train_ddp.attempt_name(store, 0, 2, 1)
    except SystemExit as stop:
        return str(stop)


def test_a_rank_does_not_wait_for_a_dead_one_for_ever(tmp_path):
    (said,) = launch(named_alone, 1, str(tmp_path / "store"))
    assert said == "rank 0 has waited 1 seconds for the others to start."


@pytest.mark.slow
def test_alone_it_is_a_world_of_one(tmp_path):
    command = [sys.executable, *program("--epochs", "1", "--result", str(tmp_path / "r.json"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 processes on cpu, 0 steps done")
    assert json.loads((tmp_path / "r.json").read_text())["world_size"] == 1
