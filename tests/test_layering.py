"""Which module may import what, read from the source: lower layers know nothing of the higher ones."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The longest name that fits a module counts.
LAYERS = {
    "jaxllm.errors": 0,
    "jaxllm.batches": 0,
    "jaxllm.config": 0,
    "jaxllm.losses": 0,
    "jaxllm.models": 1,
    "jaxllm.parallel.sharding": 1,
    "jaxllm.rewards": 1,
    "jaxllm.data": 1,
    "jaxllm.objectives": 2,
    "jaxllm.training": 2,
    "jaxllm.training.loop": 3,
    "jaxllm.rollout": 3,
    "jaxllm.evaluation": 3,
    "configs": 4,
    "experiments": 4,
}

# These are given a model as functions.
WITHOUT_MODELS = ("jaxllm.losses", "jaxllm.objectives", "jaxllm.training")

# Libraries with one door each.
ONLY_IN = {
    "flax": ("jaxllm.models",),
    "ml_collections": ("jaxllm.config", "configs", "experiments"),
    "orbax": ("jaxllm.training.checkpoint",),
}

LOSSES_IMPORT = {"jax", "numpy", "chex"} | sys.stdlib_module_names


def within(module, *places):
    return any(f"{module}.".startswith(f"{place}.") for place in places)


def layer(module):
    names = [name for name in LAYERS if within(module, name)]
    return LAYERS[max(names, key=len)] if names else None


def read_imports(module, source):
    """Dotted names of all that the module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name(
                "." * node.level + (node.module or ""), module.rpartition(".")[0]
            )
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(module, imports):
    if layer(module) is None:
        yield "has no layer"
        return
    for name in imports:
        library = name.partition(".")[0]
        if (layer(name) or 0) > layer(module):
            yield f"imports {name} of a higher layer"
        if within(name, "jaxllm.models") and within(module, *WITHOUT_MODELS):
            yield f"imports {name}, but is to be given functions"
        if library in ONLY_IN and not within(module, *ONLY_IN[library]):
            yield f"imports {name}, which only {ONLY_IN[library]} may"
        if within(module, "jaxllm.losses") and not (
            library in LOSSES_IMPORT or within(name, "jaxllm.losses")
        ):
            yield f"imports {name}, but is to be usable on its own"


def reach(module, tree):
    """All that importing `module` imports; `tree` says what each of our modules imports itself."""
    reached, new = set(), {module}
    while new:
        reached |= new
        ours = {ours for name in new for ours in tree if within(name, ours)}
        new = set().union(*(tree[name] for name in ours)) - reached
    return reached


def reads_data_with_jax(module, tree):
    """Workers that only read data start in a fraction of the time, and touch no device."""
    data = within(module, "jaxllm.data") and not within(module, "jaxllm.data.loader")
    return data and any(within(name, "jax") for name in reach(module, tree))


@pytest.fixture(scope="module")
def tree():
    files = [path for top in ("jaxllm", "configs", "experiments") for path in (ROOT / top).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {
        names[path].removesuffix(".__init__"): read_imports(names[path], path.read_text()) for path in files
    }


def test_every_module_keeps_to_its_layer(tree):
    assert len(tree) > 10
    modules = tree.keys() - {"jaxllm"}
    assert [f"{module} {what}" for module in modules for what in violations(module, tree[module])] == []


def test_data_is_read_without_jax(tree):
    assert [module for module in tree if reads_data_with_jax(module, tree)] == []


@pytest.mark.parametrize(
    ("module", "source", "what"),
    [
        ("jaxllm.losses.dpo", "from jaxllm.objectives import dpo", "higher layer"),
        ("jaxllm.training.step", "from jaxllm.training import loop", "higher layer"),
        ("jaxllm.training.step", "from .loop import train", "higher layer"),
        ("jaxllm.evaluation.perplexity", "import experiments.train", "higher layer"),
        ("jaxllm.objectives.sft", "def f():\n    from jaxllm.models import build_model", "given functions"),
        ("jaxllm.training.step", "import flax.linen as nn", "only ('jaxllm.models',) may"),
        ("jaxllm.models.config", "import ml_collections", "only ('jaxllm.config'"),
        ("jaxllm.training.loop", "import orbax.checkpoint", "only ('jaxllm.training.checkpoint',) may"),
        ("jaxllm.losses.dpo", "import optax", "on its own"),
        ("jaxllm.losses.dpo", "from jaxllm.batches import TokenBatch", "on its own"),
        ("jaxllm.utils", "", "no layer"),
    ],
)
def test_what_breaks_a_layer_is_seen(module, source, what):
    assert what in " ".join(violations(module, read_imports(module, source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxllm.losses.dpo", "import math, jax, numpy\nfrom .aggregate import Weighted"),
        ("jaxllm.models.transformer", "import flax\nfrom jaxllm import sharding"),
        ("jaxllm.training.loop", "from jaxllm.evaluation.perplexity import evaluate"),
        ("experiments.train", "import ml_collections\nfrom jaxllm.models import build_model"),
    ],
)
def test_what_keeps_to_the_layers_is_let_be(module, source):
    assert list(violations(module, read_imports(module, source))) == []


def test_jax_is_seen_behind_another_module():
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
