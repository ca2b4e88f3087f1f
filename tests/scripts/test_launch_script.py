"""experiments/launch.py fills in the files of launch/, and these relaunch what can resume."""

import subprocess
from pathlib import Path

import pytest

from experiments import launch
from jaxllm.config import run_script
from jaxllm.launch.slurm import RELAUNCH

ROOT = Path(__file__).parents[2]
COMMAND = ["python", "experiments/train.py", "--config.data.train=('a b.txt','c')", "--workdir=/shared/mine"]
VALUES = {
    "tpu_vm": {
        "name": "mine",
        "zone": "us-east5-a",
        "accelerator": "v6e-16",
        "runtime": "v2-alpha-tpuv6e",
        "repository": "https://localhost/jaxllm",
        "nfs": "10.0.0.2:/runs",
    },
    "gke": {
        "name": "mine",
        "image": "jaxllm:tpu",
        "claim": "runs",
        "accelerator": "tpu-v6e-slice",
        "topology": "4x4",
        "hosts": "4",
    },
    "skypilot": {"name": "mine", "accelerators": "H100:8", "bucket": "s3://mine"},
}


def printed(capsys, *flags, command=COMMAND):
    argv = launch.words_as_flags(["launch.py", *flags, "--", *command])
    code = run_script(launch.main, None, launch.define_flags, argv)
    out, err = capsys.readouterr()
    return code, out if code == 0 else err


def filled(capsys, target, command=COMMAND, **values):
    settings = [f"--set={name}={value}" for name, value in (VALUES[target] | values).items()]
    code, text = printed(capsys, f"--target={target}", "--print", *settings, command=command)
    assert code == 0
    assert "{{" not in text
    return text


def test_the_job_set_has_the_slices_the_command_and_the_exit_codes(capsys):
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load(filled(capsys, "gke", slices="2"))["spec"]
    (jobs,) = spec["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == list(RELAUNCH)
    (container,) = job["template"]["spec"]["containers"]
    show = ["bash", "-c", container["command"][2].replace("exec python", "exec printf %s\\|")]
    assert subprocess.run(show, capture_output=True, text=True).stdout == "|".join([*COMMAND[1:], ""])


def test_skypilot_gives_each_node_its_place(capsys):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load(filled(capsys, "skypilot", nodes="2"))
    assert task["num_nodes"] == 2
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == list(RELAUNCH)
    run = task["run"].partition("\n")[2].replace("exec python", "printf '%s '")
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    shown = subprocess.run(
        ["bash", "-c", run], capture_output=True, text=True, env=nodes | {"PATH": "/bin:/usr/bin"}
    )
    assert shown.stdout.endswith("--coordinator=10.0.0.1:8476 --num_processes=2 --process_id=1 ")


GCLOUD = """
echo "$3 $4 $5" >> calls
case "$*" in
  *describe*) [ -f created ] && echo ACTIVE ;;
  *create*) touch created; printf '%s\\n' "$@" > created ;;
  *ssh*) last=${!#}; bash -c "${last#--command=}" ;;
esac
"""


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (75, 2), (78, 1)])
def test_a_tpu_is_created_once_and_its_command_relaunched(capsys, tmp_path, code, starts):
    programs = tmp_path / "bin"
    programs.mkdir()
    run = f"echo start >> starts; [ $(wc -l < starts) -lt 2 ] && exit {code}; exit 0"
    texts = {
        "gcloud": GCLOUD,
        "run": run,
        "git": "mkdir jaxllm; mkdir -p jaxllm/.venv/bin; touch jaxllm/.venv/bin/activate",
        **dict.fromkeys(("sudo", "pip", "sleep"), "true"),
    }
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    script = filled(capsys, "tpu_vm", command=["run", "a b"], slices="2")
    environment = {"PATH": f"{programs}:/bin:/usr/bin"}
    for _ in range(2 if code == 0 else 1):
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == (78 if code == 78 else 0), done.stderr
    assert len((tmp_path / "jaxllm" / "starts").read_text().splitlines()) == starts * (2 if code == 0 else 1)
    assert (tmp_path / "calls").read_text().count("queued-resources create") == 1
    created = (tmp_path / "created").read_text().splitlines()
    assert {"--node-count=2", "--node-prefix=mine", "--spot", "--accelerator-type=v6e-16"} <= set(created)


def test_slurm_prints_the_file_that_it_would_submit(capsys):
    code, text = printed(
        capsys, "--target=slurm", "--print", "--slurm=nodes=2", "--slurm=setup=module load cuda"
    )
    assert code == 0
    assert "#SBATCH --job-name=mine\n" in text
    assert "#SBATCH --output=/shared/mine/logs/slurm-%A_%a.txt\n" in text
    assert "#SBATCH --nodes=2\n" in text
    assert "\nmodule load cuda\n" in text


@pytest.mark.parametrize(
    ("flags", "command", "message"),
    [
        (["--target=gke", "--print", "--set=name=x"], COMMAND, "--set=hosts=..."),
        (["--target=gke", "--print", "--folder=x"], COMMAND, "--folder is for --target=slurm, not gke"),
        (
            ["--target=slurm", "--print", "--set=name=x"],
            COMMAND,
            "--set is for a template, not --target=slurm",
        ),
        (
            ["--target=gke", "--print", "--set=nam=x"],
            COMMAND,
            "--set=nam=: no such place; the file has name,",
        ),
        (
            ["--target=gke", "--print"],
            ["python", "x.py", "--config=configs/no.py:1m"],
            "no.py: no such Python",
        ),
        (["--target=gke", "--print", "--set=name"], COMMAND, "--set=name must be NAME=VALUE"),
        (["--target=gke"], COMMAND, "--target=gke is not submitted from here: add --print"),
        (["--target=gke"], [], "then -- and the command"),
        (["--target=slurm"], ["python", "x.py"], "--folder=FOLDER is missing: the command has no --workdir="),
        (["--target=slurm", "--slurm=node=2"], COMMAND, "--slurm.node: unknown key, did you mean 'nodes'?"),
        (["--target=slurm", "--slurm=nodes=0"], COMMAND, "--slurm.nodes=0 must be at least 1"),
    ],
)
def test_what_is_missing_is_named(capsys, flags, command, message):
    code, text = printed(capsys, *flags, command=command)
    assert code == 78
    assert message in text
    assert text.count("\n") == 1


def test_a_value_without_a_place_is_named(capsys):
    settings = [f"--set={name}={value}" for name, value in VALUES["skypilot"].items()]
    code, text = printed(capsys, "--target=skypilot", "--print", *settings, "--set=zone=a")
    assert (code, "--set=zone=: no such place; the file has name, nodes," in text) == (78, True)


@pytest.mark.parametrize("kind", ["cuda", "tpu"])
def test_an_image_copies_what_exists_and_installs_extras_that_exist(kind):
    import tomllib

    lines = (ROOT / "launch" / f"Dockerfile.{kind}").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = [line.partition("[")[2].partition("]")[0] for line in lines if line.startswith("RUN pip")]
    assert kind in installed.split(",")
    assert set(installed.split(",")) <= extras.keys()
