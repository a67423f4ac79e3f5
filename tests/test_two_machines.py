"""Two machines, played by two network namespaces of this one: nothing but a cable joins them.

Each has its own loop-back, its own address and its own torchrun, started by the script in launch/;
they see the same files, as machines with shared storage do.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest
from test_train_ddp import ROOT, SHORT, Run, marked, program

SCRIPT = ROOT / "launch" / "torchrun_several_machines.sh"
ADDRESSES = ("10.77.0.1", "10.77.0.2")

pytestmark = pytest.mark.slow


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def machines():
    """The names of two network namespaces with a veth pair between them; removed in any case."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("bash"):
        pytest.skip("network namespaces need Linux with `ip` (iproute2) and bash")
    name = f"c{uuid.uuid4().hex[:8]}"  # names of interfaces have at most 15 characters
    names = (f"{name}a", f"{name}b")
    try:
        try:
            for machine in names:
                ip("netns", "add", machine)
            ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no right to make network namespaces here: {error.stderr.strip()}")
        for machine, address in zip(names, ADDRESSES, strict=True):
            ip("link", "set", machine, "netns", machine)
            ip("-n", machine, "address", "add", f"{address}/24", "dev", machine)
            ip("-n", machine, "link", "set", machine, "up")
            ip("-n", machine, "link", "set", "lo", "up")
        yield names
    finally:
        for machine in names:  # takes its end of the cable, and so the cable, with it
            subprocess.run(["ip", "netns", "delete", machine], capture_output=True)
        subprocess.run(["ip", "link", "delete", names[0]], capture_output=True)


def train(machines, folder, *arguments):
    """Run the script on both; what each wrote, and the result."""
    mark, common = uuid.uuid4().hex, ("--checkpoint", f"{folder}/run.pt", *arguments)
    settings = {"NNODES": "2", "PROCESSES": "1", "MASTER_ADDR": ADDRESSES[0]}
    settings |= {"PYTHON": sys.executable, "JOB_ID": mark, "COURSE_TEST_MARK": mark}
    agents = []
    for number, machine in enumerate(machines):
        command = ["ip", "netns", "exec", machine, SCRIPT, *SHORT, *common]
        command += ["--result", f"{folder}/two.json"]
        environment = os.environ | settings | {"NODE_RANK": str(number)}
        agents.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        left = marked(mark)
        for pid in left:
            os.kill(pid, 9)
    assert [agent.returncode for agent in agents] == [0, 0], "\n\n".join(said)
    assert left == []
    with open(f"{folder}/two.json") as file:
        return said, json.load(file)


def test_two_machines_train_what_one_does(machines, tmp_path):
    one = Run(tmp_path / "one", *program(*SHORT)).result
    said, two = train(machines, tmp_path)
    assert two == one | {"restarts": two["restarts"]}
    assert "2 processes on cpu, 0 steps done" in said[0] and "processes on" not in said[1]

    # the second machine's process is killed: both begin again, and end with the same weights
    os.unlink(tmp_path / "run.pt")
    said, after = train(machines, tmp_path, "--kill", "1:30")
    assert "exitcode: -9" in said[1] and "20 steps done" in said[0]
    assert after["weights"] == one["weights"]


def test_the_machines_have_no_other_way_to_each_other(machines):
    """Else the test above could pass through the loop-back of this machine."""
    seen = subprocess.run(
        ["ip", "netns", "exec", machines[1], "ip", "-4", "-o", "address"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ADDRESSES[1] in seen and ADDRESSES[0] not in seen and seen.count("inet") == 2
