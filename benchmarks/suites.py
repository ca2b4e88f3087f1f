"""lm-eval tasks: our model beside lm-eval's own `hf` model on the exported checkpoint, numbers and seconds.

    python benchmarks/suites.py --checkpoint=runs/quickstart/sft [--questions=FILE.jsonl] [--rounds=3]

Needs the extras `eval` and `parity`. A checkpoint of ours is exported first; a Hugging Face folder is used as
it is. QUESTIONS have `prompt`, `choices` and `answer` (an index); by default they are 1,000 sums with four
choices. From them come three tasks: multiple choice, bits per byte of the right answers, completions of 16
tokens. Each contestant has a process of its own in each round, in turn. Seconds are of the evaluation, with
compilation and without imports and loading: `first`, and `again` in the same process.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONTESTANTS = ("jaxllm", "hf")
BATCH = 64
METRICS = {
    "choices": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "text": "output_type: loglikelihood_rolling\ndoc_to_target: '{{prompt}} {{choices[answer]}}'\n"
    "metric_list: [{metric: bits_per_byte}]",
    "completion": "output_type: generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 16}\n"
    "doc_to_target: '{{choices[answer]}}'\nmetric_list: [{metric: exact_match}]",
}


def sums(count: int) -> list[dict[str, Any]]:
    """Questions with four choices."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(100), draw.randrange(100)
        choices = draw.sample(sorted({a + b, a + b + 1, a + b - 1, a + b + 10}), 4)
        rows.append(
            {
                "prompt": f"How much is {a} + {b}? The answer is",
                "choices": [f"{choice}." for choice in choices],
                "answer": choices.index(a + b),
            }
        )
    return rows


def write_tasks(folder: Path, questions: Path) -> None:
    """A YAML file for each task."""
    for name, metrics in METRICS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: bench_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\n"
            f"test_split: test\ndoc_to_text: prompt\n{metrics}\n"
        )


def contestant(name: str, checkpoint: str, folder: Path) -> dict[str, Any]:
    """The numbers of all tasks, and the seconds of each, twice."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from jaxllm.evaluation.lm_eval_tasks import JaxLM, task_metrics

    if name == "hf":
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=checkpoint, device="cpu", dtype="float32", batch_size=BATCH, add_bos_token=True
        )
    else:
        from jaxllm.data.chat_template import PlainTextTemplate
        from jaxllm.evaluation.suite_model import SuiteModel
        from jaxllm.runs.checkpoints import load_checkpoint

        loaded = load_checkpoint(checkpoint)
        model = JaxLM(SuiteModel(loaded, PlainTextTemplate(loaded.tokenizer)))
    manager = TaskManager(include_path=str(folder))
    found: dict[str, Any] = {"metrics": {}}
    for again in ("first", "again"):
        for task in METRICS:
            # Before a whole text lm-eval itself puts BOS, and with add_bos_token it would score a second one.
            model.add_bos_token = task != "text"
            began = time.perf_counter()
            result = simple_evaluate(
                model=model,
                tasks=[f"bench_{task}"],
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
            found[f"{task}, {again}"] = time.perf_counter() - began
            row = task_metrics(result["results"][f"bench_{task}"])
            found["metrics"] |= {f"{task}/{metric}": x for metric, x in row.items() if metric[-3:] != "_se"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, or a Hugging Face folder")
    parser.add_argument("--questions", type=Path, help="JSONL with prompt, choices and answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.contestant:
        print(json.dumps(contestant(flags.contestant, flags.checkpoint, flags.folder)))
        return
    from jaxllm.files import is_hf_folder
    from jaxllm.runs.convert import export_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder, checkpoint = Path(name), Path(flags.checkpoint)
        if not is_hf_folder(checkpoint):
            checkpoint = folder / "hf"
            export_checkpoint(flags.checkpoint, checkpoint, dtype=None, max_shard_bytes=10**10)
        questions = flags.questions or folder / "sums.json"
        if not flags.questions:
            questions.write_text("".join(json.dumps(row) + "\n" for row in sums(1000)))
        write_tasks(folder, questions.resolve())
        found: dict[str, list[dict[str, Any]]] = {each: [] for each in CONTESTANTS}
        for _ in range(flags.rounds):
            for each in CONTESTANTS:
                command = [sys.executable, __file__, f"--contestant={each}", f"--checkpoint={checkpoint}"]
                done = subprocess.run(
                    [*command, f"--folder={folder}"], stdout=subprocess.PIPE, text=True, check=True
                )
                found[each].append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = (found[each][0]["metrics"] for each in CONTESTANTS)
    for metric, value in ours.items():
        difference = abs(value - theirs[metric])
        print(f"{metric:24s} jaxllm {value:.6f}  hf {theirs[metric]:.6f}  difference {difference:.1e}")
    for part in sorted(found["hf"][0].keys() - {"metrics"}):
        times = {each: [round_[part] for round_ in rounds] for each, rounds in found.items()}
        shown = "  ".join(
            f"{each} {statistics.median(x):.1f} s ({min(x):.1f} to {max(x):.1f})" for each, x in times.items()
        )
        print(f"{part:24s} {shown}")


if __name__ == "__main__":
    main()
