"""The doctor compares what the processes state of themselves, and names what is wrong and what to do."""

from dataclasses import replace

import pytest

from jaxllm.runs import doctor
from jaxllm.runs.doctor import Facts, diagnose, problems, table

GOOD = Facts(
    host="a",
    platform="gpu",
    kind="H100",
    devices=4,
    accelerators=4,
    versions={"python": "3.12", "jax": "0.10.2"},
    clock=100.0,
    memory=64 * 10**9,
    device_memory=80 * 10**9,
    disks={"/runs": 50 * 10**9},
    seen={"/runs": True},
    fingerprints={"tokenizer t.json": "f00"},
    coordinator="a:1234",
)


def test_equal_processes_on_two_hosts_have_no_problem():
    facts = [GOOD, replace(GOOD, host="b", clock=101.0)]
    assert list(problems(facts)) == []
    assert table(facts).splitlines()[:3] == [
        "process  host  devices         free memory  of a device  free disk",
        "0        a     4 x H100 (gpu)  64.0 GB      80.0 GB      50 GB",
        "1        b     4 x H100 (gpu)  64.0 GB      80.0 GB      50 GB",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "cpu"}, "process 1 (b) computes on the CPU of a machine with 4 accelerators: install"),
        ({"host": "a"}, "process 0 (a) sees 4 of 4 devices, which 2 processes of this host share: set CUDA"),
        ({"accelerators": 8}, "the processes of b use 4 of its 8 devices"),
        ({"devices": 2}, "the processes have different numbers of devices (4, 2): give all of them as many"),
        ({"clock": 90.0}, "the clock of process 1 (b) is 10.0 s off process 0's: run NTP"),
        ({"versions": {"python": "3.12", "jax": "0.11"}}, "process 1 has jax 0.11, process 0 has 0.10.2"),
        ({"fingerprints": {"tokenizer t.json": "bar"}}, "tokenizer t.json is another in process 1 (b) than"),
        ({"seen": {"/runs": False}}, "/runs of process 1 (b) is not that of process 0: use a shared disk"),
        ({"disks": {"/runs": -1}}, "/runs cannot be written in process 1 (b)"),
        ({"disks": {"/runs": 10**8}}, "/runs has 0.1 GB free in process 1 (b)"),
    ],
)
def test_what_differs_is_named_with_what_to_do(changes, message):
    found = list(problems([GOOD, replace(GOOD, **{"host": "b", **changes})]))
    assert any(line.startswith(message) for line in found), found


def test_a_coordinator_on_loopback_reaches_no_other_host():
    local = replace(GOOD, coordinator="127.0.0.1:1234")
    (line,) = problems([local, replace(local, host="b")])
    assert line == "the coordinator 127.0.0.1 is loopback, but there are 2 hosts: name a host"


def test_a_single_process_prints_its_table_and_its_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "MATRIX", {"cpu": 8})
    monkeypatch.setattr(doctor, "ALL_REDUCE_MB", 1)
    monkeypatch.setattr(doctor, "FREE_LIMIT", 0)
    (tmp_path / "rows.txt").write_text("some text\n")
    assert diagnose([str(tmp_path / "runs")], None, [str(tmp_path / "rows.txt")]) == 0
    output = capsys.readouterr().out
    for text in ("8 x cpu", "TFLOP/s a device", "all-reduce: 1 MB over 8 devices in", "no problem found"):
        assert text in output
    assert list((tmp_path / "runs").iterdir()) == []
