"""Which module may import what, read from the source; and where the names of stages may stand."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load_import_graph():
    spec = importlib.util.spec_from_file_location("import_graph", ROOT / "docs" / "import_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


graph = load_import_graph()

# Of what these train or score, they know functions only.
WITHOUT_MODELS = ("jaxllm.losses", "jaxllm.training")

# Libraries that only some folders import.
ONLY_IN = {
    "flax": ("jaxllm.models",),
    "ml_collections": ("jaxllm.config", "configs", "experiments"),
    "orbax": ("jaxllm.training.checkpoint",),
}

LOSSES_IMPORT = {"jax", "numpy", "chex"} | sys.stdlib_module_names

LONGEST_SCRIPT = 120  # lines

# Where a stage is named: where it is, in the configs that choose it and the recipe that runs all of them.
STAGE_NAMES_IN = ("jaxllm.stages", "jaxllm.pipeline", "configs")
# (module, name) -> what else is called so there.
OTHER_MEANINGS = {
    ("jaxllm.losses.grpo", "grpo"): "a variant of the loss",
    ("experiments.evaluate", "reward_model"): "a flag",
    ("jaxllm.synthesize.config", "reward_model"): "a kind of judge",
    ("jaxllm.synthesize.run", "reward_model"): "a kind of judge",
}


def within(module, *places):
    return any(f"{module}.".startswith(f"{place}.") for place in places)


def broken_rules(module, names):
    """What a module imports that no layer forbids."""
    for name in names:
        library = name.partition(".")[0]
        if within(name, "jaxllm.models") and within(module, *WITHOUT_MODELS):
            yield f"imports {name}, but must be given functions"
        if library in ONLY_IN and not within(module, *ONLY_IN[library]):
            yield f"imports {name}, which only {ONLY_IN[library]} may"
        if within(module, "jaxllm.losses") and not (
            library in LOSSES_IMPORT or within(name, "jaxllm.losses")
        ):
            yield f"imports {name}, but must be usable on its own"


def reads_data_with_jax(module, tree):
    """Processes that only read data start in a fraction of the time, and touch no device."""
    data = within(module, "jaxllm.data") and not within(module, "jaxllm.data.loader")
    reached = {module} | graph.reach(module, graph.make_arrows(tree))
    return data and any(within(name, "jax") for ours in reached for name in tree[ours])


def stage_names(module, source, stages):
    """Lines with a string that is the name of a stage, where none may stand."""
    if within(module, *STAGE_NAMES_IN):
        return
    parsed = ast.parse(source)
    allowed = set()
    if module == "jaxllm.runs.checkpoints":  # what the checkpoints of the first version were, by their stage
        tables = [node for node in parsed.body if ast.unparse(node).startswith("VERSION_1")]
        allowed = {node for table in tables for node in ast.walk(table)}
    for node in ast.walk(parsed):
        is_name = isinstance(node, ast.Constant) and node.value in stages and node not in allowed
        if is_name and (module, node.value) not in OTHER_MEANINGS:
            yield f"{module}:{node.lineno}: {node.value!r}"


@pytest.fixture(scope="module")
def tree():
    return graph.read_tree(ROOT)


def test_arrows_point_downwards_and_make_no_cycle(tree):
    assert len(tree) > 100
    assert list(graph.violations(graph.make_arrows(tree))) == []


def test_libraries_are_imported_where_they_belong(tree):
    assert [f"{module} {what}" for module in tree for what in broken_rules(module, tree[module])] == []


def test_data_is_read_without_jax(tree):
    assert [module for module in tree if reads_data_with_jax(module, tree)] == []


def test_look_ups_by_name_are_arrows(tree):
    assert graph.read_names("jaxllm.a", "find(f'jaxllm.stages.{name}')") == {"jaxllm.stages.*"}
    arrows = graph.make_arrows(tree)
    assert {"jaxllm.stages.sft", "jaxllm.stages.grpo"} <= arrows["jaxllm.stages"]
    assert {"jaxllm.rewards.length", "jaxllm.rewards.math_answer"} <= arrows["jaxllm.rewards.load"]
    assert "jaxllm.rewards.pool" not in arrows["jaxllm.rewards.load"]  # not a reward
    assert "jaxllm.rewards.worker" in arrows["jaxllm.rewards.pool"]
    assert "jaxllm.toy_world.rubric" in arrows["jaxllm.pipeline.completions"]


def test_scripts_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "experiments").glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_SCRIPT} == {}


def test_names_of_stages_stand_in_few_places(tree):
    stages = {path.stem for path in (ROOT / "jaxllm" / "stages").glob("[!_]*.py")}
    assert len(stages) >= 6
    found = []
    for module in tree:
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found += stage_names(module, path.read_text(), stages)
    assert found == []


# What is not allowed is found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxllm.losses.dpo", "from jaxllm.stages import dpo"),
        ("jaxllm.training.step", "def f():\n    from jaxllm.runs.program import Program"),
        ("jaxllm.training.step", "from ..runs import program"),
        ("jaxllm.training.step", "from jaxllm.rollout.generate import generate"),  # beside it
        ("jaxllm.evaluation.perplexity", "import experiments.train"),
        ("jaxllm.runs.program", "SCORE = 'jaxllm.evaluation.perplexity.score'"),
        ("jaxllm.pipeline.run", "command = [sys.executable, scripts / 'train.py']"),
    ],
)
def test_an_arrow_upwards_is_found(tree, module, source):
    changed = tree | {module: graph.read_names(module, source)}
    found = [line for line in graph.violations(graph.make_arrows(changed)) if line.startswith(f"{module} ")]
    assert "not of a lower layer" in " ".join(found)


def test_a_module_without_a_layer_is_found(tree):
    assert "jaxllm.utils has no layer" in graph.violations(graph.make_arrows(tree | {"jaxllm.utils": set()}))


def test_a_cycle_is_found():
    arrows = {"jaxllm.data.a": {"jaxllm.data.b"}, "jaxllm.data.b": {"jaxllm.data.c", "jaxllm.data.d"}}
    arrows |= {"jaxllm.data.c": {"jaxllm.data.a"}, "jaxllm.data.d": set()}
    assert graph.cycles(arrows) == [["jaxllm.data.a", "jaxllm.data.b", "jaxllm.data.c"]]
    (line,) = graph.violations(arrows)
    assert line == "a cycle of 3 modules: jaxllm.data.a, jaxllm.data.b, jaxllm.data.c"


@pytest.mark.parametrize(
    ("module", "source", "what"),
    [
        ("jaxllm.training.step", "def f():\n    from jaxllm.models import build_model", "given functions"),
        ("jaxllm.training.step", "import flax.linen as nn", "only ('jaxllm.models',) may"),
        ("jaxllm.models.config", "import ml_collections", "only ('jaxllm.config'"),
        ("jaxllm.training.loop", "import orbax.checkpoint", "only ('jaxllm.training.checkpoint',) may"),
        ("jaxllm.losses.dpo", "import optax", "on its own"),
        ("jaxllm.losses.dpo", "from jaxllm.batches import TokenBatch", "on its own"),
    ],
)
def test_a_library_in_the_wrong_place_is_found(module, source, what):
    assert what in " ".join(broken_rules(module, graph.read_names(module, source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxllm.losses.dpo", "import math, jax, numpy\nfrom .aggregate import Weighted"),
        ("jaxllm.models.transformer", "import flax\nfrom jaxllm.parallel import sharding"),
        ("jaxllm.stages.sft", "from jaxllm.evaluation.perplexity import evaluate"),
        ("jaxllm.toy_world.language", "from importlib import resources\nresources.files('jaxllm.toy_world')"),
        ("experiments.train", "import ml_collections\nfrom jaxllm.models import build_model"),
    ],
)
def test_what_is_allowed_passes(tree, module, source):
    names = graph.read_names(module, source)
    assert list(broken_rules(module, names)) == []
    found = graph.violations(graph.make_arrows(tree | {module: names}))
    assert set(found) <= set(graph.violations(graph.make_arrows(tree)))


def test_jax_is_found_behind_another_module():
    tree = {
        "jaxllm.data.text": {"jaxllm.data.pack.windows"},
        "jaxllm.data.pack": {"jax.numpy"},
        "jaxllm.data.loader": {"jax"},
        "jaxllm.data.chat": {"numpy", "jaxtyping"},
    }
    assert [module for module in tree if reads_data_with_jax(module, tree)] == [
        "jaxllm.data.text",
        "jaxllm.data.pack",
    ]


def test_the_name_of_a_stage_is_found():
    source = "VERSION_1 = {'sft': 1}\nif stage == 'sft':\n    pass"
    assert list(stage_names("jaxllm.runs.train", source, {"sft"})) == [
        "jaxllm.runs.train:1: 'sft'",
        "jaxllm.runs.train:2: 'sft'",
    ]
    assert list(stage_names("jaxllm.runs.checkpoints", source, {"sft"})) == [
        "jaxllm.runs.checkpoints:2: 'sft'"
    ]
    assert list(stage_names("jaxllm.stages.grpo", source, {"sft"})) == []
