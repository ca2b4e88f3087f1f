"""The pages: links lead somewhere, names exist, every logged metric has a row, the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import errors
from jaxllm.config import load_config, override, parse
from jaxllm.evaluation.completions import ScoredCompletions, completion_metrics
from jaxllm.evaluation.perplexity import RowSums, evaluate
from jaxllm.evaluation.preference import PairScores, dpo_metrics, reward_metrics
from jaxllm.evaluation.suites import METRICS, SUITES
from jaxllm.losses import Weighted
from jaxllm.rewards.pool import Scores
from jaxllm.stages import build_program, find_stage
from jaxllm.training.metrics import to_scalars
from jaxllm.training.watchdog import EXIT_HANG

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = [page for page in PAGES if "how-to" not in page.parts]  # how-tos name files that a reader adds

CONFIGS = (
    "pretrain_text",
    "sft_chat",
    "reward_model_pairs",
    "dpo_pairs",
    "ppo_preferences",
    "grpo_problems",
)
AREAS = "train|eval|perf|rewards?|kl|policy|value|completion|sampler|time|rollout"


def names_of(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


# Links


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target} does not exist"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_no_link_is_broken(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](page.md#a-heading) [b](#none) [c](missing.md) `[d](code.md)`\n")
    assert list(broken_links(page)) == ["#none has no such heading", "missing.md does not exist"]


def test_the_site_builds(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = r'<(?:script|link rel="stylesheet"|img)[^>]*(?:src|href)="https?:'
    pages = list((tmp_path / "site").rglob("*.html"))
    assert [page.name for page in pages if re.search(loaded, page.read_text())] == []


# Files, layers and config fields


@pytest.mark.parametrize("page", REFERENCE, ids=names_of(REFERENCE))
def test_files_exist(page):
    named = re.findall(
        r"\b(?:experiments|configs|benchmarks|jaxllm|tests)/[\w/]+\.(?:py|toml)", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_layers_are_those_of_the_import_graph():
    spec = importlib.util.spec_from_file_location("import_graph", ROOT / "docs/import_graph.py")
    import_graph = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(import_graph)
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    table = {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert table == {name.removeprefix("jaxllm."): layer for name, layer in import_graph.LAYER.items()}


def dotted(config, prefix=""):
    """Every section and field of a ConfigDict by its dotted name."""
    for name in config:
        yield f"{prefix}{name}"
        if hasattr(config[name], "keys"):
            yield from dotted(config[name], f"{prefix}{name}.")


@pytest.fixture(scope="module")
def fields():
    configs = [
        load_config(str(ROOT / f"configs/{name}.py")) for name in (*CONFIGS, "quickstart", "synthesize")
    ]
    return {name for config in configs for name in dotted(config)}


@pytest.mark.parametrize("page", REFERENCE, ids=names_of(REFERENCE))
def test_config_fields_exist(page, fields):
    text = page.read_text()
    sections = "|".join(sorted({name.partition(".")[0] for name in fields if "." in name}))
    named = re.findall(r"--config\.([a-z_]{2,}[\w.]*)=", text)  # --config.a.b=VALUE stands for all
    named += re.findall(rf"`((?:{sections})\.[a-z][\w.]*)(?:=[^`]*)?`", text)
    named = [name for name in named if not name.endswith((".json", ".model"))]
    assert [name for name in named if name not in fields] == []


# Metrics


def documented_metrics():
    """The names in the first columns of the tables of docs/metrics.md, as regular expressions by name."""
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return {
        name: re.compile(re.escape(name).replace("NAME", r"[a-z]\w*").replace("@K", r"@\d+"))
        for name in names
    }


def step_metrics(file, **changes):
    """The names of what a stage's train step returns, as they are logged; nothing is compiled."""
    values = load_config(f"{ROOT}/configs/{file}.py:tiny")
    stage = find_stage(values.stage)
    for name, value in changes.items():
        override(values, stage.Config, f"objective.{name}", value)
    program = build_program(parse(stage.Config, values), jax.devices()[:1])
    _, metrics = jax.eval_shape(program.train_step, program.abstract_state, program.batch_shapes)
    one = Weighted(jnp.float32(1), jnp.float32(1))
    row = to_scalars(dict.fromkeys(metrics, one), "train")
    return row.keys() - {"train/bad_streak"}  # the loop's own


def held_out_metrics():
    """The names of what evaluations return."""
    two = np.arange(4.0).reshape(2, 2)
    pairs = PairScores(two, two, two[0], two)
    dpo = {"beta": 0.1, "variant": "sigmoid", "label_smoothing": 0.0, "length_normalized": False}
    sums = RowSums(*np.ones((4, 2)))
    completions = ScoredCompletions(
        completions=None,
        texts=[],
        tokens=np.zeros((4, 2), np.int32),
        prompt_lengths=np.ones(4, int),
        lengths=np.ones(4),
        truncated=np.zeros(4, bool),
        rewards=np.ones(4),
        scores=Scores(
            np.ones(4),
            {"length": np.ones(4), "model": np.ones(4)},
            applies=np.ones(4, bool),
            failed=np.zeros(4, bool),
            counters={},
            messages=[],
        ),
        seconds=0.0,
    )
    return {
        *reward_metrics(pairs),
        *dpo_metrics(pairs, **dpo),
        *evaluate({}, [None], lambda params, batch: sums, lambda: None),
        *(f"{SUITES}mine/{name}" for name in METRICS),
        *completion_metrics(completions, 1, "eval/"),
        *completion_metrics(completions, 4, "eval/sampled_"),
    }


def literal_metrics():
    """Names that stand in the source as they are logged."""
    source = "".join(path.read_text() for path in sorted((ROOT / "jaxllm").rglob("*.py")))
    return set(re.findall(rf'"((?:{AREAS})/[a-z][\w@]*[a-z\d])"', source)) - {"train/bad_streak"}


@pytest.fixture(scope="module")
def logged():
    options = {
        "pretrain_text": {"z_loss": "1e-4"},
        "sft_chat": {"dft": "true"},
        "grpo_problems": {"kl_coefficient": "0.1"},
    }
    names = literal_metrics() | held_out_metrics() | {"reward/length"}
    for file in CONFIGS:
        names |= step_metrics(file, **options.get(file, {}))
    return {name.removesuffix("_se") for name in names}


def test_every_logged_metric_has_a_row(logged):
    assert len(logged) > 60
    rows = documented_metrics().values()
    assert sorted(name for name in logged if not any(row.fullmatch(name) for row in rows)) == []


def test_every_row_is_a_metric_that_is_logged(logged):
    rows = documented_metrics()
    assert [name for name, row in rows.items() if not any(map(row.fullmatch, logged))] == []


# Exit codes


def test_every_exit_code_has_a_row():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds} | {0, EXIT_HANG}
    table = (ROOT / "docs/checkpoints.md").read_text().partition("## Exit codes")[2]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)} == codes
