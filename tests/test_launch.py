"""The files in launch/ say what they do: they are parsed, and what can run here is run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_train_ddp import free_port

from course_utils import train_ddp

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
BASH = shutil.which("bash") if os.name == "posix" else None
needs_bash = pytest.mark.skipif(not BASH, reason="needs bash")
PROGRAM = "course_utils.train_ddp"


def text(name):
    return (LAUNCH / name).read_text(encoding="utf-8")


def environment(**settings):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "SLURM_", "MASTER_"))}
    return kept | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | settings


def run(command, **settings):
    return subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=150
    )


def trained(done, result, world_size=2):
    assert done.returncode == 0, done.stderr
    assert f"{world_size} processes on cpu, 0 steps done" in done.stdout
    found = json.loads(result.read_text())
    assert found["world_size"] == world_size
    return found


def test_every_file_is_in_the_readme_and_starts_the_program():
    names = {path.name for path in LAUNCH.iterdir()}
    assert [name for name in names if name not in text("README.md")] == ["README.md"]
    for name in names - {"slurm.sbatch"}:
        assert PROGRAM in text(name) or "course_utils/train_ddp.py" in text(name), name
    assert "launch/torchrun_several_machines.sh" in text("slurm.sbatch")


@needs_bash
@pytest.mark.parametrize(
    "name", ["torchrun_one_machine.sh", "torchrun_several_machines.sh", "slurm.sbatch"]
)
def test_the_scripts_are_bash_and_stop_at_the_first_error(name):
    assert run([BASH, "-n", LAUNCH / name]).stderr == ""
    assert "set -euo pipefail" in text(name)
    if name.endswith(".sh"):
        assert os.access(LAUNCH / name, os.X_OK)


@needs_bash
@pytest.mark.slow
def test_one_machine(tmp_path):
    arguments = ["--epochs", "1", "--result", str(tmp_path / "result.json")]
    done = run([LAUNCH / "torchrun_one_machine.sh", *arguments], PROCESSES="2")
    trained(done, tmp_path / "result.json")


@needs_bash
@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_several_machines_says_what_is_missing(missing):
    settings = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    del settings[missing]
    done = run([LAUNCH / "torchrun_several_machines.sh"], **settings)
    assert done.returncode != 0 and f"{missing}: " in done.stderr


STAND_INS = {
    "scontrol": '[ "$*" = "show hostnames nodes[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
}


@needs_bash
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ip"), reason="needs `ip` (iproute2)")
def test_slurm_with_stand_ins_for_its_commands(tmp_path):
    """A job of one machine; two of them are the business of test_two_machines.py."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!{BASH}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(LAUNCH)
    job = str(free_port() % 20000)
    done = run(
        [BASH, LAUNCH / "slurm.sbatch", "--epochs", "1", "--result", tmp_path / "result.json"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID=job,
        SLURM_JOB_NODELIST="nodes[1-2]",
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    trained(done, tmp_path / "result.json")
    assert (tmp_path / f"train_ddp-{job}.pt").exists()


def test_slurm_asks_for_one_task_on_each_machine():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text("slurm.sbatch"), re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and int(options["nodes"]) > 1
    assert {"job-name", "gpus-per-node", "cpus-per-task", "time", "output", "requeue"} <= set(
        options
    )
    first_command = text("slurm.sbatch").index("set -euo")
    assert text("slurm.sbatch").rindex("#SBATCH") < first_command, "later ones are not read"
    used = set(re.findall(r"\$\{?(SLURM_\w+)", text("slurm.sbatch")))
    documented = {"SLURM_JOB_NODELIST", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_GPUS_ON_NODE"}
    assert used == documented | {"SLURM_SUBMIT_DIR", "SLURM_NODEID"}


@pytest.fixture
def kubernetes():
    return {item["kind"]: item for item in yaml.safe_load_all(text("kubernetes.yaml"))}


def test_kubernetes_has_the_fields_of_a_train_job(kubernetes):
    job, claim = kubernetes["TrainJob"], kubernetes["PersistentVolumeClaim"]
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert set(spec) == {"runtimeRef", "trainer", "runtimePatches"}
    assert spec["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "ClusterTrainingRuntime",
        "name": "torch-distributed",
    }
    fields = {"image", "numNodes", "numProcPerNode", "command", "args", "env", "resourcesPerNode"}
    assert set(trainer) == fields
    gpus = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert trainer["numProcPerNode"] == gpus and trainer["numNodes"] > 1
    assert all(isinstance(entry["value"], str) for entry in trainer["env"])
    assert not any(entry["name"].startswith("PET_") for entry in trainer["env"]), "reserved"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_kubernetes_keeps_the_checkpoint_on_the_shared_volume(kubernetes, tmp_path):
    (patch,) = kubernetes["TrainJob"]["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert (node["name"], container["name"]) == ("node", "node")
    name = kubernetes["PersistentVolumeClaim"]["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == name
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    arguments = kubernetes["TrainJob"]["spec"]["trainer"]["args"]
    arguments = [word.replace(f"{mount['mountPath']}/", f"{tmp_path}/") for word in arguments]
    args = train_ddp.parse_arguments(arguments[arguments.index(PROGRAM) + 1 :])
    assert args.checkpoint.startswith(f"{tmp_path}/") and args.result.startswith(f"{tmp_path}/")


@pytest.mark.slow
def test_kubernetes_command_with_the_variables_that_the_operator_sets(kubernetes, tmp_path):
    trainer = kubernetes["TrainJob"]["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    arguments = [argument.replace("/checkpoints", str(tmp_path)) for argument in trainer["args"]]
    done = run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, "--epochs", "1"],
        PET_NNODES="1",
        PET_NPROC_PER_NODE="2",
        PET_NODE_RANK="0",
        PET_MASTER_ADDR="127.0.0.1",
        PET_MASTER_PORT=str(free_port()),
    )
    trained(done, tmp_path / "result.json")


def test_accelerate_starts_torchrun_with_the_documented_command():
    config = yaml.safe_load(text("accelerate.yaml"))
    assert config["compute_environment"] == "LOCAL_MACHINE"
    assert config["distributed_type"] == "MULTI_GPU" and config["num_machines"] == 1
    command = re.search(r"^#\s+(accelerate launch .*)$", text("accelerate.yaml"), re.MULTILINE)
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = shlex.split(command[1])
    words[words.index("launch/accelerate.yaml")] = str(LAUNCH / "accelerate.yaml")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert args.multi_gpu and args.num_processes == 4
    assert args.module and args.training_script == PROGRAM
    train_ddp.parse_arguments(args.training_script_args)


@pytest.mark.slow
def test_accelerate_launches_two_processes(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", LAUNCH / "accelerate.yaml", "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), "-m", PROGRAM]
    done = run([*command, "--epochs", "1", "--result", str(tmp_path / "result.json")])
    trained(done, tmp_path / "result.json")
