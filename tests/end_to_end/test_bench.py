"""`dsgd bench` on this machine: real processes, every channel, nothing left."""

from __future__ import annotations

from tests.end_to_end.conftest import User

CLUSTER = "name: NAME\nservers: 2\nworkers: 2\n"


def test_every_channel_is_measured_and_nothing_is_left(user: User) -> None:
    user.write(CLUSTER)
    done = user.dsgd("bench", "--json", "--size=64KB", "--workers=2", "--for=0.05")
    assert done.code == 0, done.err
    rows = [line for line in done.lines if line["type"] == "bench"]
    assert [row["channel"] for row in rows if row["bytes"] == 64_000] == [
        *("shm", "tcp", "tcp, plain", "grpc")
    ]
    for row in rows:
        assert "error" not in row
        assert row["workers"] == 2
        assert 0 < row["gb_per_s"] < 1000
        assert row["of_socket"] > 0 < row["of_memcpy"]
        assert row["worker_cpu_s_per_gb"] > 0
        assert row["server_memory_bytes"] > 1e6
    summary = done.lines[-1]
    assert summary["parameters"] == 9610
    assert len(summary["meaning"]) == 4
    assert all("with 9610 parameters a step costs" in said for said in summary["meaning"])
    user.assert_nothing_left()


def test_a_table_for_people(user: User) -> None:
    user.write(CLUSTER)
    done = user.dsgd("bench", "--size=64KB", "--channel=grpc", "--for=0.05")
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.split()[:3] == ["CHANNEL", "SIZE", "TIME"]
    assert [line.split()[:3:2] for line in lines[:2]] == [["grpc", "KB"], ["grpc", "KB"]]
    assert lines[2].startswith("with 9610 parameters a step costs")
    assert "stopped 5/5, 0 left" in done.err


def test_what_is_no_size_is_wrong_usage(user: User) -> None:
    user.write(CLUSTER)
    done = user.dsgd("bench", "--size=much")
    assert done.code == 2
    assert "'much' is not a size: write 32KB, 1MiB, 100MB" in done.err
    assert "no such channel" in user.dsgd("bench", "--channel=pigeon").err
