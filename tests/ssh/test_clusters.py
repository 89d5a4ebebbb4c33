"""Clusters of machines that have nothing but python3: shipping, faults, teardown, real sshd."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dsgd_cli.learning.adapters import load_model
from dsgd_cli.learning.datasets import Dataset, digits
from dsgd_cli.learning.evaluate import evaluate
from tests.end_to_end.conftest import REPOSITORY, User, wait_until
from tests.launcher.test_environment import make_wheel
from tests.ssh.hosts import Hosts, assert_nothing_left, require

pytestmark = [pytest.mark.ssh, pytest.mark.timeout(180)]

CLUSTER = """
name: lab
hosts: [HOSTS]
servers: 2
workers: 4
lease: 3s
train:
  until: {accuracy: 0.97, max_epochs: 100}
"""
NEVER = "accuracy: 1.0, loss: 0.0, max_time: 5m"
PART = "/root/part.npz"
ENDLESS = CLUSTER.replace("accuracy: 0.97, max_epochs: 100", NEVER)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launcher's cache for the module, so that wheels are downloaded once."""
    return tmp_path_factory.mktemp("launcher-cache")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    require()
    with Hosts(2) as two:
        yield two


@pytest.fixture
def user(tmp_path: Path, wheels: Path, hosts: Hosts) -> Iterator[User]:
    """Somebody whose key the hosts accept; nothing of theirs is left there afterwards."""
    hosts.make_home(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("DSGD_", "XDG_", "SSH_"))
    }
    env |= {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(wheels),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONPATH": str(REPOSITORY),
        "NO_COLOR": "1",
    }
    before = hosts.snapshots()
    somebody = User(folder, "lab", env)
    yield somebody
    for process in somebody.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for host in hosts:
        host.plug()
    wait_until(lambda: not any(daemons(host) for host in hosts), 15, "the hosts' processes end")
    assert_nothing_left(before, hosts.snapshots())


def write(user: User, hosts: Hosts, text: str = CLUSTER) -> None:
    user.write(text.replace("HOSTS", ", ".join(host.address for host in hosts)))


def daemons(host) -> list[str]:  # type: ignore[no-untyped-def]
    """The processes of dsgd on a host, seen from outside."""
    return [str(p) for p in host.processes() if "dsgd" in str(p)]


def training(user: User, hosts: Hosts):  # type: ignore[no-untyped-def]
    """An endless training that has made progress."""
    write(user, hosts, ENDLESS)
    return started(user)


def started(user: User, epochs: int = 0):  # type: ignore[no-untyped-def]
    """A training that has made progress, and has so many epochs behind it."""
    process = user.start("train", "--json")
    assert process.stdout is not None
    for line in process.stdout:
        if '"progress"' in line and json.loads(line)["epoch"] >= epochs:
            return process
    pytest.fail(process.communicate()[1])


def test_bare_hosts_get_what_they_need_once_and_train(user: User, hosts: Hosts) -> None:
    write(user, hosts)
    first = user.dsgd("train", "--json", timeout_s=120)
    assert first.code == 0, first.err
    assert first.err.count(": sending ") == 2
    assert first.summary["value"] >= 0.97
    assert (first.summary["stopped"], first.summary["left"]) == (7, 0)
    model = load_file(user.folder / first.summary["run_dir"] / "model.safetensors")
    assert sum(array.size for array in model.values()) == 64 * 128 + 128 + 128 * 10 + 10
    second = user.dsgd("train", "--json")
    assert second.code == 0, second.err
    assert "sending" not in second.err
    assert not any(daemons(host) for host in hosts)


def test_processes_are_spread_and_addressed_as_the_hosts_are_reached(
    user: User, hosts: Hosts
) -> None:
    write(user, hosts)
    up = user.dsgd("up", "--json")
    assert up.code == 0, up.err
    where = {row[0]: (row[1], row[3]) for row in up.lines[-1]["table"]}
    a, b = (host.address for host in hosts)
    assert where["server/1"][0] == b
    assert where["server/1"][1].startswith(f"{b}:")
    assert {p: host for p, (host, _) in where.items() if p.startswith("worker")} == {
        "worker/0": a,
        "worker/1": a,
        "worker/2": b,
        "worker/3": b,
    }
    assert user.dsgd("up", "--json").lines[-1]["started"] == 0
    down = user.dsgd("down", "--json")
    assert (down.code, down.lines[-1]["stopped"], down.lines[-1]["left"]) == (0, 7, [])


def test_where_a_firewall_filters_tcp_the_run_goes_on_over_grpc_and_says_so(
    user: User, hosts: Hosts
) -> None:
    a, b = hosts
    text = CLUSTER.replace("servers: 2", f"servers: {{count: 1, on: [{b.address}]}}")
    write(user, hosts, text.replace("workers: 4", f"workers: {{count: 2, on: [{a.address}]}}"))
    up = user.dsgd("up", "--json")
    assert up.code == 0, up.err
    where = {row[0]: row[3] for row in up.lines[-1]["table"]}
    grpc = {where[process].rpartition(":")[2] for process in ("server/0", "coordinator/0")}
    ports = {name.rpartition(":")[2] for name in b.listening() if name.startswith("tcp")} - grpc
    assert ports, "no port but gRPC's"
    for port in ports:
        b.filter_port(int(port))
    try:
        train = user.dsgd("train", "--json", timeout_s=120)
    finally:
        for port in ports:
            b.open_port(int(port))
    assert train.code == 0, train.err
    assert train.summary["value"] >= 0.97
    said = "server/0: no tcp channel: the port does not answer within 3 s (is it filtered"
    assert train.out.count(said) == 2, train.out  # each worker's


def test_another_laptop_with_only_the_file_takes_it_down(
    user: User, hosts: Hosts, tmp_path: Path
) -> None:
    write(user, hosts)
    assert user.dsgd("up").code == 0
    assert all(daemons(host) for host in hosts)
    other = User(user.folder, "lab", {**user.env, "XDG_STATE_HOME": str(tmp_path / "other")})
    down = other.dsgd("down", "--json")
    assert (down.code, down.lines[-1]["stopped"]) == (0, 7)


def test_kill_9_of_the_launcher_leaves_nothing_within_the_lease(user: User, hosts: Hosts) -> None:
    process = training(user, hosts)
    assert all(daemons(host) for host in hosts)
    process.kill()
    began = time.monotonic()
    wait_until(lambda: not any(daemons(host) for host in hosts), 3 + 5, "the hosts clean up")
    assert time.monotonic() - began > 0.5


def test_a_pulled_cable_leaves_nothing_on_either_side_and_ends_the_run(
    user: User, hosts: Hosts
) -> None:
    process = training(user, hosts)
    hosts[1].unplug()
    wait_until(lambda: not daemons(hosts[1]), 3 + 5, "the host without a cable cleans up")
    run = user.finish(process, timeout_s=60)  # it held a server: the run cannot go on
    assert run.code == 6, run.err
    assert hosts[1].address in run.err
    assert "(lease)" in run.err
    assert run.summary["outcome"] == "failed"
    wait_until(lambda: not daemons(hosts[0]), 3 + 5, "the other host")


def test_a_run_goes_on_without_a_host_that_only_had_workers(user: User, hosts: Hosts) -> None:
    servers = f"servers: {{count: 2, on: {hosts[0].address}}}"
    text = ENDLESS.replace("servers: 2", servers).replace("max_time: 5m", "max_time: 15s")
    write(user, hosts, text)
    process = user.start("train", "--json", "--allow-unconverged")
    assert process.stdout is not None
    next(line for line in process.stdout if '"progress"' in line)
    hosts[1].unplug()
    run = user.finish(process, timeout_s=90)
    assert run.code == 9, run.err  # trained to the end, and that host could not be checked
    assert run.summary["outcome"] == "stopped"
    assert run.summary["left"] == 1
    epochs = [r for r in user.metrics(run.summary["run_dir"]) if r["kind"] == "epoch"]
    assert len(epochs) > 5
    assert all(r["distinct"] == r["n"] for r in epochs)


def test_down_with_an_unreachable_host_is_9_and_says_when_its_lease_ends(
    user: User, hosts: Hosts
) -> None:
    write(user, hosts, CLUSTER.replace("lease: 3s", "lease: 3s\nidle_timeout: 20s"))
    assert user.dsgd("up").code == 0
    hosts[1].unplug()
    down = user.dsgd("down", timeout_s=60)
    assert down.code == 9, down.err
    assert hosts[1].address in down.err
    assert "lease" in down.err
    assert not daemons(hosts[0])
    assert daemons(hosts[1])
    wait_until(lambda: not daemons(hosts[1]), 25, "the end of its lease")


def test_ctrl_c_brings_the_model_home(user: User, hosts: Hosts) -> None:
    process = training(user, hosts)
    process.send_signal(signal.SIGINT)
    run = user.finish(process, timeout_s=20)
    assert run.code == 130, run.err
    assert run.summary["left"] == 0
    assert load_file(user.folder / run.summary["run_dir"] / "model.safetensors")


def test_a_route_that_is_closed_between_worker_and_server_is_named(
    user: User, hosts: Hosts
) -> None:
    write(user, hosts)
    hosts[1].blackhole(hosts[0].address)
    try:
        run = user.dsgd("train", "--json", timeout_s=60)
    finally:
        hosts[1].heal(hosts[0].address)
    assert run.code == 4, run.err
    assert "worker/" in run.err
    assert hosts[0].address in run.err
    assert "advertise" in run.err


def test_a_model_of_ones_own_travels(user: User, hosts: Hosts) -> None:
    write(user, hosts)
    user.write(
        "import numpy as np\n"
        "def init(rng, example): return {'w': np.zeros((64, 10))}\n"
        "def predict(params, x): return x.reshape(len(x), -1) @ params['w']\n"
        "def gradients(params, x, y):\n"
        "    x = x.reshape(len(x), -1)\n"
        "    p = np.exp(x @ params['w'])\n"
        "    p /= p.sum(axis=1, keepdims=True)\n"
        "    p[np.arange(len(y)), y] -= 1\n"
        "    return 1.0, {'w': x.T @ p / len(y)}\n",
        "model.py",
    )
    settings = ("--set", "train.model=model.py", "--set", "train.until.accuracy=0.9")
    run = user.dsgd("train", "--json", *settings)
    assert run.code == 0, run.err
    assert run.err.count(": sending ") == 2


def test_a_folder_of_images_travels_with_what_reads_it(user: User, hosts: Hosts) -> None:
    write(user, hosts)
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green")):
        (user.folder / "photos" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 100, (8, 9, 3), np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(user.folder / "photos" / name / f"{i}.png")
    settings = ("--set", "train.model=softmax", "--set", "train.data={images: photos}")
    run = user.dsgd("train", "--json", *settings, timeout_s=120)
    assert run.code == 0, run.err
    assert run.err.count(": sending ") == 2
    again = user.dsgd("train", "--json", *settings, timeout_s=60)
    assert again.code == 0, again.err
    assert "sending" not in again.err


def test_what_a_model_imports_travels_with_its_requirements(user: User, hosts: Hosts) -> None:
    """To hosts that have neither pip nor an index, and only to those with workers."""
    write(user, hosts)
    make_wheel(user.folder, "ten", "1.0")
    user.write("ten\n", "requirements.txt")
    user.env["PIP_FIND_LINKS"] = f"{os.environ.get('PIP_FIND_LINKS', '')} {user.folder}".strip()
    user.write(
        "import numpy as np\n"
        "import ten\n"
        "def init(rng, example): return {'w': np.zeros(99)}\n"
        "def predict(params, x): return np.zeros((len(x), 1))\n"
        "def gradients(params, x, y): return float(ten.__version__), {'w': np.zeros(99)}\n",
        "model.py",
    )
    settings = ["--set", "train.model=model.py", "--set", "train.until={max_epochs: 1, loss: 2}"]
    settings += ["--set", f"workers.on={hosts[0].address}"]
    run = user.dsgd("train", "--json", *settings)
    assert run.code == 6 and "No module named 'ten'" in run.err
    assert "env: {requirements: requirements.txt}" in run.err
    settings += ["--set", "env.requirements=requirements.txt"]
    run = user.dsgd("train", "--json", *settings)
    assert run.code == 0, run.err
    assert run.summary["value"] == 1.0
    assert "getting the packages of requirements.txt" in run.err
    assert run.err.count(": sending ") == 1


def test_the_same_machine_twice_is_refused(user: User, hosts: Hosts) -> None:
    write(user, hosts)
    one = hosts[0].address
    twice = f"hosts=[{{name: a, address: {one}}}, {{name: b, address: {one}, port: 22}}]"
    run = user.dsgd("train", "--json", "--set", twice)
    assert run.code in (3, 4)
    assert "same machine" in run.err


def test_a_host_that_does_not_exist_is_4_and_the_other_is_left_alone(
    user: User, hosts: Hosts
) -> None:
    user.write(CLUSTER.replace("HOSTS", f"{hosts[0].address}, {hosts.unused_address()}"))
    run = user.dsgd("train", "--json", timeout_s=60)
    assert run.code == 4, run.err
    assert hosts.unused_address() in run.err
    assert not daemons(hosts[0])


def test_no_secret_is_on_a_command_line_or_in_an_environment(user: User, hosts: Hosts) -> None:
    write(user, hosts)
    assert user.dsgd("up").code == 0
    seen = 0
    for host in hosts:
        for process in host.processes():
            if "dsgd" not in str(process):
                continue
            seen += 1
            for name in ("cmdline", "environ"):
                text = Path(f"/proc/{process.pid}/{name}").read_bytes()
                assert b"PRIVATE KEY" not in text
                assert b"BEGIN CERTIFICATE" not in text
    assert seen >= 7
    assert user.dsgd("down").code == 0


@pytest.fixture
def parts(hosts: Hosts) -> Iterator[list[Dataset]]:
    """The digits, two thirds of them on one host and the others on the other, in the same place."""
    data, made = digits(), []
    for host, here, held_out in (
        (hosts[0], slice(950), slice(240)),
        (hosts[1], slice(950, None), slice(240, None)),
    ):
        x, x_test = np.asarray(data.x[here]), np.asarray(data.x_test[held_out])
        part = Dataset("part", x, data.y[here], x_test, data.y_test[held_out])
        arrays = {name: getattr(part, name) for name in ("x", "y", "x_test", "y_test")}
        np.savez(host.root / PART.lstrip("/"), **arrays)
        made.append(part)
    yield made
    for host in hosts:
        (host.root / PART.lstrip("/")).unlink()


@pytest.mark.parametrize(
    "algorithm",
    [
        "downpour",
        "synchronous",
        "{synchronous: {backup_workers: 1}}\n  optimizer: {adagrad: {clip_norm: 1.0}}",
        "stale_synchronous",
        "sandblaster",
    ],
    ids=["downpour", "synchronous", "backup", "stale", "sandblaster"],
)
def test_each_host_has_examples_of_its_own(
    user: User, hosts: Hosts, parts: list[Dataset], algorithm: str
) -> None:
    data = f"train:\n  data: {{npz: 'host:{PART}', per_host: true}}\n  algorithm: {algorithm}"
    write(user, hosts, CLUSTER.replace("train:", data))
    run = user.dsgd("train", "--json", timeout_s=120)
    assert run.code == 0, run.err
    assert run.summary["outcome"] == "converged"
    folder = user.folder / run.summary["run_dir"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    n = sum(part.examples for part in parts)
    assert epochs
    assert {(line["examples"], line["distinct"], line["n"]) for line in epochs} == {(n, n, n)}
    frozen = [record for record in records if record.get("frozen")][-1]
    assert {worker // 2 for worker in frozen["worker"]} == {0, 1}  # one of each host
    # What is said of the model is true of all held-out examples together.
    model = load_model("builtin", "mlp", {"hidden": [128]})
    params = load_file(folder / "model.safetensors")
    x, y = (np.concatenate([getattr(p, name) for p in parts]) for name in ("x_test", "y_test"))
    expected = evaluate(model, params, x, y)
    assert run.summary["value"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert run.summary["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_hosts_whose_examples_do_not_fit_together(
    user: User, hosts: Hosts, parts: list[Dataset]
) -> None:
    """One host has no nines: its network would have nine outputs."""
    last = parts[1]
    few, held_out = last.y != 9, last.y_test != 9
    arrays = {"x": last.x[few], "y": last.y[few]}
    arrays |= {"x_test": last.x_test[held_out], "y_test": last.y_test[held_out]}
    np.savez(hosts[1].root / PART.lstrip("/"), **arrays)
    data = f"train:\n  data: {{npz: 'host:{PART}', per_host: true}}"
    write(user, hosts, CLUSTER.replace("train:", data))
    run = user.dsgd("train")
    assert run.code == 6, run.err
    assert "differ in their tensors" in run.err
    assert "the examples of each host (`per_host`) must have the same form" in run.err
    alike = user.folder / "cluster.yaml"
    alike.write_text(alike.read_text().replace(", per_host: true", ""))
    run = user.dsgd("train")
    assert run.code == 6, run.err
    assert "differ in their training examples" in run.err
    assert "per_host" in run.err


def test_workers_that_have_their_hosts_examples_alone_come_back(
    user: User, hosts: Hosts, parts: list[Dataset]
) -> None:
    data = f"train:\n  data: {{npz: 'host:{PART}', per_host: true}}"
    text = CLUSTER.replace("train:", data).replace(
        "accuracy: 0.97, max_epochs: 100", "max_epochs: 250"
    )
    write(user, hosts, text)
    process = started(user, epochs=1)
    theirs = {"worker/2", "worker/3"}
    workers = [each.pid for each in hosts[1].processes() if theirs & set(each.cmdline)]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    folder = user.folder / summary["run_dir"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lost = [record["process"] for record in records if record.get("event") == "lost"]
    assert set(lost) == theirs
    n = sum(part.examples for part in parts)
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert len(epochs) == 250
    assert all(line["distinct"] == line["n"] == n <= line["examples"] for line in epochs)


@pytest.mark.slow
def test_when_a_host_with_examples_of_its_own_is_gone_the_run_ends_with_what_it_has(
    user: User, hosts: Hosts, parts: list[Dataset]
) -> None:
    a, b = hosts
    data = f"train:\n  data: {{npz: 'host:{PART}', per_host: true}}"
    text = ENDLESS.replace("train:", data).replace(
        "servers: 2", f"servers: {{count: 2, on: [{a.address}]}}"
    )
    write(user, hosts, text)
    process = started(user, epochs=1)
    b.unplug()
    out, err = process.communicate(timeout=150)
    b.plug()
    assert process.returncode == 6, err
    assert "no worker/2 or worker/3 for 60 s: nobody has its examples" in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["outcome"] == "failed"
    model = load_file(user.folder / summary["run_dir"] / "model.safetensors")
    assert all(np.isfinite(array).all() for array in model.values())
