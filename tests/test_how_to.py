"""The pages of docs/how-to work: applied to a copy of the code, their commands run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxllm.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "how-to"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    file: str | None
    text: str


def read_blocks(page):
    return [Block(language, file or None, text) for language, file, text in BLOCK.findall(page)]


def apply_diff(source, diff):
    """The source with each hunk of a diff without line numbers applied; its lines must be there once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " -+" for line in lines), hunk
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(before) == 1, f"{source.count(before)} places have the lines\n{before}"
        source = source.replace(before, after)
    return source


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder with the SFT run of `make smoke`, from random weights, without evaluation and samples."""
    folder = tmp_path_factory.mktemp("smoke")
    fields = ("checkpoint.best_metric=none", "data.validation_fraction=0", "sample.prompts=")
    flags = " ".join(f"--config.{field}" for field in fields)
    run_commands(
        f"python experiments/train.py --config=configs/smoke.py:sft --workdir={folder}/sft {flags}", ROOT
    )
    return folder


@pytest.fixture
def follow(tmp_path, smoke):
    """(page) -> the folder in which it was followed, and what its commands printed."""

    def run(name):
        for each in ("jaxllm", "configs", "experiments"):
            shutil.copytree(ROOT / each, tmp_path / each, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "smoke").symlink_to(smoke)
        output = ""
        for block in read_blocks((PAGES / f"{name}.md").read_text()):
            if block.file is not None:
                path = tmp_path / block.file
                assert path.exists() == (block.language == "diff"), path
                path.parent.mkdir(parents=True, exist_ok=True)
                text = apply_diff(path.read_text(), block.text) if block.language == "diff" else block.text
                path.write_text(text)
            elif block.language == "bash":
                output += run_commands(block.text, tmp_path)
        return tmp_path, output

    return run


def run_commands(script, folder):
    """The commands of a page, in this environment; what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def metrics_of(run):
    """All metrics of a run, by step."""
    return {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("add-*.md")))
def test_a_page_counts_the_files_that_it_touches(page):
    text = (PAGES / f"{page}.md").read_text()
    touched = {block.file for block in read_blocks(text) if block.file and block.file.endswith(".py")}
    assert int(re.search(r"^Touches (\d+) files?\b", text, flags=re.MULTILINE)[1]) == len(touched)
    assert re.search(rf"\({page}\.md\) \| {len(touched)} \|", (PAGES / "index.md").read_text())
    for file in touched:
        edited = {block.language for block in read_blocks(text) if block.file == file}
        assert edited == ({"diff"} if (ROOT / file).exists() else {"python"})


def test_a_loss(follow):
    _, output = follow("add-a-loss")
    assert "5 passed" in output
    assert "Test passed" in output


def test_a_reward(follow):
    folder, _ = follow("add-a-reward")
    last = metrics_of(folder / "runs/distinct")[4]
    assert 0 < last["reward/distinct"] <= 1
    assert last["reward/mean"] == pytest.approx(last["reward/math_answer"] + 0.2 * last["reward/distinct"])


def test_a_preference_variant(follow):
    folder, _ = follow("add-a-preference-variant")
    assert metrics_of(folder / "runs/nca")[0]["eval/loss"] == pytest.approx(1.386, abs=5e-4)


def test_a_stage(follow):
    folder, output = follow("add-a-stage")
    assert "1 passed" in output
    last = metrics_of(folder / "runs/cpo")[2]
    assert last["train/nll"] > 0
    assert "eval/rewards/accuracies" in last
    metadata = json.loads((folder / "runs/cpo/checkpoints/2/metadata.json").read_text())
    assert metadata["model"]["generates"]


def test_a_model_feature(follow):
    _, output = follow("add-a-model-feature")
    assert "2 passed" in output
    assert "memory a device" in output


def test_a_data_format(follow):
    _, output = follow("add-a-data-format")
    assert "4 [dialog]" in output
    assert "step 4/4" in output


def test_a_diff_whose_lines_are_not_there_is_found():
    assert apply_diff("a\nb\nc\n", " a\n-b\n+B\n") == "a\nB\nc\n"
    assert apply_diff("a\nb\n", "-a\n+A\n@@\n b\n+c\n") == "A\nb\nc\n"
    with pytest.raises(AssertionError, match="0 places"):
        apply_diff("a\n", " b\n+c\n")
    with pytest.raises(AssertionError, match="2 places"):
        apply_diff("a\na\n", " a\n+c\n")
