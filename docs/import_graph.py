"""Print the modules by layer with the arrows between packages; and the files that a batch visits.

    python docs/import_graph.py                  # exit code 1 if an arrow points upwards or there is a cycle
    python docs/import_graph.py --visits         # trains three tiny models for 2 steps: a minute or two
    python docs/import_graph.py --root=CHECKOUT  # either of another version, to compare

A look-up by name counts as an import: a string that is the dotted path of a module or the file name of a
script, and `f"jaxllm.stages.{name}"` for every module of that folder.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("jaxllm", "configs", "experiments")

# Packages from the lowest layer to the highest. One imports only from layers below its own.
LAYERS = (
    (
        "jaxllm.batches",
        "jaxllm.length_groups",
        "jaxllm.config_versions",
        "jaxllm.errors",
        "jaxllm.files",
        "jaxllm.losses",
        "jaxllm.random_streams",
        "jaxllm.toy_world",
    ),
    ("jaxllm.caches", "jaxllm.config", "jaxllm.launch", "jaxllm.parallel", "jaxllm.store"),
    ("jaxllm.data", "jaxllm.models"),
    ("jaxllm.rollout", "jaxllm.training"),
    ("jaxllm.command_line", "jaxllm.runs"),
    ("jaxllm.rewards",),
    ("jaxllm.evaluation",),
    ("jaxllm.rl",),
    ("jaxllm.stages",),
    ("jaxllm.plan", "jaxllm.sweep", "jaxllm.synthesize"),
    ("jaxllm.report", "jaxllm.serve"),
    ("jaxllm.pipeline",),
    ("configs", "experiments"),
)
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}

MODULE_PATH = re.compile(rf"({'|'.join(TOPS)})(\.\w+)+\.?")
SCRIPT = re.compile(r"\w+\.py")

Tree = Mapping[str, set[str]]  # a module -> dotted names that it imports
Arrows = Mapping[str, set[str]]  # a module -> modules of this repository that it imports


# Reading the imports


def read_names(module: str, source: str) -> set[str]:
    """Dotted names of all that a module imports or looks up, wherever in it; "jaxllm.stages.*" for a folder.

    A package's own module is called "jaxllm.stages.__init__" here. A module may name the package that it lies
    in, for the files there: whoever imports the module has imported that package.
    """
    found, package = set(), module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=name, names=names, level=level):
                base = importlib.util.resolve_name("." * level + (name or ""), package)
                found |= {f"{base}.{alias.name}" for alias in names}
            case ast.Constant(value=str(text)) if MODULE_PATH.fullmatch(text) and text != package:
                found.add(f"{text}*" if text.endswith(".") else text)
            case ast.Constant(value=str(text)) if SCRIPT.fullmatch(text):
                found.add(f"experiments.{text.removesuffix('.py')}")
    return found


def read_tree(root: Path) -> dict[str, set[str]]:
    """Every module of jaxllm, configs and experiments with the names that it imports."""
    paths = [path for top in TOPS for path in (root / top).rglob("*.py")]
    sources = {".".join(path.relative_to(root).with_suffix("").parts): path.read_text() for path in paths}
    tree = {}
    for module, source in sources.items():
        names = read_names(module, source)
        folders = {name for name in names if name.endswith(".*")}
        found = {each for folder in folders for each in found_in(folder.removesuffix(".*"), sources)}
        tree[module.removesuffix(".__init__")] = (names - folders) | found
    return tree


def found_in(folder: str, sources: Mapping[str, str]) -> set[str]:
    """The modules that a look-up by name in a folder can find: those with a function of their own name, as
    rewards have; all of them where there is none, as in jaxllm/stages."""
    modules = {each for each in sources if each.rpartition(".")[0] == folder} - {f"{folder}.__init__"}
    own = {each for each in modules if f"\ndef {each.rpartition('.')[2]}(" in sources[each]}
    return own or modules


def make_arrows(tree: Tree) -> dict[str, set[str]]:
    """The names of a tree as modules: `jaxllm.losses.Weighted` is in `jaxllm.losses`."""
    return {module: {m for name in names if (m := module_of(name, tree))} for module, names in tree.items()}


def module_of(name: str, tree: Tree) -> str | None:
    """The module of ours that a dotted name is, or is in."""
    while name and name not in tree:
        name = name.rpartition(".")[0]
    return name if name not in ("", "jaxllm") else None  # jaxllm/__init__.py holds the version only


def package_of(module: str) -> str:
    """`jaxllm.losses` of `jaxllm.losses.dpo`; `configs` and `experiments` are one package each."""
    first, *rest = module.split(".")
    return ".".join((first, *rest[:1])) if first == "jaxllm" else first


# Checking them


def violations(arrows: Arrows) -> Iterator[str]:
    """A line for each module without a layer, each arrow that does not point downwards, and each cycle."""
    for package in sorted({package_of(module) for module in arrows} - LAYER.keys() - {"jaxllm"}):
        yield f"{package} has no layer"
    for module, imported in sorted(arrows.items()):
        above = LAYER.get(package_of(module), len(LAYERS))
        for name in sorted(imported):
            other = package_of(name)
            if other != package_of(module) and LAYER.get(other, -1) >= above:
                yield f"{module} imports {name}, which is not of a lower layer"
    for cycle in cycles(arrows):
        yield f"a cycle of {len(cycle)} modules: {', '.join(cycle)}"


def cycles(arrows: Arrows) -> list[list[str]]:
    """The largest sets of modules each of which reaches all others of its set."""
    reached = {module: reach(module, arrows) for module in arrows}
    found = {frozenset(n for n in reached[m] if m in reached[n]) for m in arrows if m in reached[m]}
    return sorted(sorted(cycle) for cycle in found)


def reach(module: str, arrows: Arrows) -> set[str]:
    """All that importing `module` imports, directly or not; itself only where it is in a cycle."""
    reached, new = set(), set(arrows.get(module, ()))
    while new:
        reached |= new
        new = {name for each in new for name in arrows.get(each, ())} - reached
    return reached


def print_graph(arrows: Arrows) -> None:
    """The layers from the highest to the lowest: each package, its modules and the packages it imports."""
    packages: dict[str, list[str]] = {}
    for module in sorted(arrows.keys() - {"jaxllm"}):
        packages.setdefault(package_of(module), []).append(module)
    for package in sorted(packages, key=lambda each: (-LAYER.get(each, len(LAYERS)), each)):
        modules = packages[package]
        names = [each.removeprefix(f"{package}.") for each in modules if each != package]
        print_wrapped(
            f"{LAYER.get(package, '?'):>2}  {package.removeprefix('jaxllm.'):17}", names or ["(one file)"]
        )
        below = {package_of(name) for module in modules for name in arrows[module]} - {package}
        if below:
            print_wrapped(f"{'->':>20} ", sorted(each.removeprefix("jaxllm.") for each in below))


def print_wrapped(label: str, names: list[str]) -> None:
    """A label and the names to the right of it, on lines of 110 characters."""
    print(textwrap.fill(" ".join(names), 110, initial_indent=label, subsequent_indent=" " * len(label)))


# The files that a batch visits

# No part of the way from a file of data to the gradient: FILE:FUNCTION, today's names and those before the
# code was moved from experiments/ into jaxllm/.
LEFT_OUT = re.compile(
    "|".join(
        (
            # The process: its config, its folder, its checkpoints, its metrics, its end.
            r"jaxllm/(config|config_versions|errors|files|command_line)\.py",
            r"jaxllm/training/(run_folder|checkpoint|metrics|watchdog|watch|early_stopping|best)\.py",
            # The run, which puts the parts together once: model, step, initial weights, tokenizer, template.
            r"jaxllm/runs/(train|program|weights|checkpoints|context)\.py",
            r"experiments/(train|program|weights|loading)\.py",
            r"experiments/run\.py:(?!RowFeed)",
            # Numbers that follow from a config.
            r"jaxllm/(models|rl|runs)/config\.py",
            r"experiments/(train_config|rollout_config)\.py",
            # A reward by its name, once.
            r"jaxllm/rewards/load\.py",
            # Evaluation, samples, warnings and the start-up report.
            r"jaxllm/(runs|rl)/hooks\.py",
            r"experiments/rollout_hooks\.py",
            r"jaxllm/(rl|rollout)/health\.py",
            r"jaxllm/data/show\.py",
            # What comes after the gradient.
            r"jaxllm/training/optimizer\.py",
            # A method that does nothing, called as the run starts.
            r"jaxllm/training/(batch_source|feed)\.py",
        )
    )
)

# Calls in whose course the train step is traced, and the first call after it has run.
COMPILING = re.compile(r"(jaxllm/runs|experiments)/program\.py:Program\.compile")
AFTER_STEP = re.compile(r".*\.(after_step|observe)")

# Tiny, and nothing but training.
FLAGS = (
    "model.num_layers=1",
    "data.sequence_length=64",
    "data.validation_fraction=0",
    "sample.prompts=",
    "checkpoint.best_metric=none",
    "training.steps=2",
    "training.evaluate_at_start=false",
    "training.evaluate_every=0",
    "training.sample_every=0",
    "training.checkpoint_every=0",
)

# Run by the processes of reward functions when they start, since its folder is on their path.
SITECUSTOMIZE = """
import sys
def visit(frame, event, _, seen=set()):
    file, caller = frame.f_code.co_filename, frame.f_back
    if event == "call" and file.startswith({root!r}) and file not in seen:
        if caller is not None and "<module>" not in (frame.f_code.co_name, caller.f_code.co_name):
            seen.add(file)
            print(file, file=open({record!r}, "a"))
sys.setprofile(visit)
"""


class Visits:
    """The files whose functions are called, in the order of their first calls: on the host, and in the train
    step, which is traced before the first batch is made. Each with its functions that other files call."""

    def __init__(self, root: Path):
        self.root = f"{root}/"
        self.host: dict[str, set[str]] = {}
        self.step: dict[str, set[str]] = {}
        self.files = self.host

    def begin(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, made to begin the record when it is called."""

        def begun(*args: Any, **kwargs: Any) -> Any:
            threading.setprofile(self.visit)  # of threads to come: they read ahead
            sys.setprofile(self.visit)
            return function(*args, **kwargs)

        return begun

    def file_of(self, frame: FrameType) -> str | None:
        """The path of a frame's file, if it is one of ours."""
        file = frame.f_code.co_filename.removeprefix(self.root)
        return file if file.startswith(TOPS) else None

    def visit(self, frame: FrameType, event: str, _: Any) -> None:
        """Called for every call and return while the record is on."""
        file = self.file_of(frame)
        if file is None or event not in ("call", "return"):
            return
        name = frame.f_code.co_qualname
        if COMPILING.fullmatch(f"{file}:{name}"):
            self.files = self.step if event == "call" else self.host
        if AFTER_STEP.fullmatch(name):
            sys.setprofile(None)
            threading.setprofile(None)
        elif event == "call" and not LEFT_OUT.match(f"{file}:{name}"):
            caller = frame.f_back
            if caller is not None and "<module>" in (name, caller.f_code.co_name):
                return  # an import
            functions = self.files.setdefault(file, set())
            while caller is not None and self.file_of(caller) is None:
                caller = caller.f_back
            if caller is None or self.file_of(caller) != file:
                functions.add(name)

    def print(self, title: str, *, workers: list[str]) -> None:
        """All files, each once, with the number of their functions that other files call."""
        host = dict.fromkeys((*self.host, *workers))
        step = [file for file in self.step if file not in host]
        entries = {
            file: len(self.host.get(file, set()) | self.step.get(file, set())) for file in (*host, *step)
        }
        folders = Counter(file.split("/")[1] for file in entries)
        counts = ", ".join(f"{count} in {folder}" for folder, count in folders.most_common())
        print(f"\n{title} visits {len(entries)} files ({counts}).")
        print("A number is that of the file's functions that other files call.")
        for label, files in (("from the file to a batch", host), ("then, in the train step", step)):
            print(f"  {label}")
            for file in files:
                print(f"    {file} {'(in the process of a reward)' if file in workers else entries[file]}")


def print_visits(root: Path) -> None:
    """Train tiny models of a checkout, and print the files that a batch and a prompt visit."""
    sys.path.insert(0, str(root))
    import jax

    script = importlib.import_module("experiments.train")
    try:
        find_stage = importlib.import_module("jaxllm.stages").find_stage
    except ImportError:
        find_stage = importlib.import_module("experiments.program").find_stage
    run_script = importlib.import_module("jaxllm.config").run_script

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        worker_file = Path(folder) / "worker.txt"
        (Path(folder) / "sitecustomize.py").write_text(
            SITECUSTOMIZE.format(root=f"{root}/", record=str(worker_file))
        )
        sys.path.insert(1, folder)

        def train(config: str, data: str, *flags: str) -> None:
            fields = [f"--config.{field}" for field in (*FLAGS, f"data.train={folder}/{data}")]
            argv = ["train.py", f"--config={root}/configs/{config}.py:tiny", *fields, *flags]
            with contextlib.redirect_stdout(io.StringIO()):
                if run_script(script.main, script.config_class, script.define_flags, argv):
                    sys.exit(f"{config} has failed")

        def visits(stage: str, *arguments: str) -> Visits:
            jax.clear_caches()  # what is compiled already would not be traced, and so not visited
            record, module = Visits(root), find_stage(stage)
            module.load = record.begin(module.load)
            train(*arguments)
            return record

        os.environ["JAXLLM_CACHE_DIR"] = f"{folder}/cache"  # empty: what is cached is not visited
        batch = visits("pretrain", "pretrain_text", "text.txt", f"--workdir={folder}/pretrained")
        batch.print("A pretraining batch", workers=[])
        train("sft_chat", "chats.jsonl", f"--workdir={folder}/sft")
        prompt = visits(
            "grpo",
            "grpo_problems",
            "problems.jsonl",
            f"--workdir={folder}/grpo",
            f"--init_from={folder}/sft",
            "--config.rollout.group_size=2",
            "--config.rollout.sampling.max_new_tokens=8",
        )
        workers = [line.removeprefix(f"{root}/") for line in worker_file.read_text().splitlines()]
        workers = [file for file in workers if file.startswith(TOPS) and not LEFT_OUT.match(f"{file}:")]
        prompt.print("A GRPO prompt", workers=list(dict.fromkeys(workers)))


def write_data(folder: Path) -> None:
    """Text, conversations and problems, a hundred rows each."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    pairs = [(first, second) for first in words for second in words]
    (folder / "text.txt").write_text("".join(f"{a} and {b} are {c}. " for a, b in pairs for c in words))
    for name, column in (("chats", "completion"), ("problems", "answer")):
        rows = [json.dumps({"prompt": f"{a} and {b}?", column: f"{i}"}) for i, (a, b) in enumerate(pairs)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))


def main() -> int:
    """Print what the flags ask for; 1 if the graph has a violation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to read")
    parser.add_argument("--visits", action="store_true", help="print the files that a batch visits instead")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if arguments.visits:
        print_visits(root)
        return 0
    arrows = make_arrows(read_tree(root))
    print_graph(arrows)
    found = list(violations(arrows))
    print("\n".join(found) or "no cycle, no upward arrow")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
