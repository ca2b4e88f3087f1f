"""lm-eval with a model of ours: the numbers of its own `hf` model on the exported checkpoint."""

import json
from types import SimpleNamespace

import pytest

from experiments import evaluate
from jaxllm.config import run_script
from jaxllm.evaluation import lm_eval_tasks
from jaxllm.evaluation.lm_eval_tasks import before, sample_result, task_metrics
from jaxllm.evaluation.suites import read_results

TASKS = {
    "mc": "output_type: multiple_choice\ndoc_to_choice: choices\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "rolling": "output_type: loglikelihood_rolling\n"
    "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]",
    "generated": "output_type: generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 8}\n"
    "metric_list: [{metric: exact_match}]",
}
WORDS = ("one", "two", "six", "ten")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a YAML and its data for each kind of task."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "mc": [
            {"query": f"{a} and {b}?", "choices": [f"Yes, {a}.", "No, never.", b], "gold": i % 3}
            for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
        ],
        "rolling": [{"query": "", "gold": f"Yes, {word}. No, never {word}. " * 9} for word in WORDS],
        "generated": [{"query": f"{word} and four? Yes,", "gold": f" {word}"} for word in WORDS],
    }
    for name, body in TASKS.items():
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: mine_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"test_split: test\ndoc_to_text: query\ndoc_to_target: gold\n{body}\n"
        )
    return folder


@pytest.mark.filterwarnings("ignore")
def test_tasks_have_the_numbers_of_lm_evals_own_model(chat_model, tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    pytest.importorskip("transformers", reason="needs the extra parity")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jaxllm.data.chat_template import PlainTextTemplate
    from jaxllm.evaluation.lm_eval_tasks import measure_tasks
    from jaxllm.evaluation.suite_model import SuiteModel
    from jaxllm.rollout.sampling import SamplingConfig
    from jaxllm.runs.checkpoints import load_checkpoint
    from jaxllm.runs.convert import export_checkpoint

    loaded = load_checkpoint(str(chat_model))
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0, top_k=None, top_p=None, min_p=None)
    model = SuiteModel(loaded, PlainTextTemplate(loaded.tokenizer), sampling=greedy)
    names = [f"mine_{name}" for name in TASKS]
    ours = {task.name: task for task in measure_tasks(model, names, tasks, limit=None)}
    export_checkpoint(str(chat_model), tmp_path / "hf", dtype=None, max_shard_bytes=10**9)
    hf = HFLM(
        pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", max_length=64, add_bos_token=True
    )
    manager = TaskManager(include_path=str(tasks))
    for name in names:
        # Before a whole text lm-eval itself puts BOS, and with add_bos_token it would score a second one.
        hf.add_bos_token = name != "mine_rolling"
        theirs = simple_evaluate(model=hf, tasks=[name], task_manager=manager, bootstrap_iters=1000)
        assert ours[name].metrics == pytest.approx(
            task_metrics(theirs["results"][name]), rel=1e-4, abs=1e-4, nan_ok=True
        )
        for sample, result in zip(theirs["samples"][name], ours[name].results, strict=True):
            assert result.id == sample["doc_hash"]
            assert result.scores == pytest.approx(sample_result(sample).scores, rel=1e-4, abs=1e-4)


def test_scores_of_samples_and_metrics_are_lm_evals_under_our_names():
    values = {
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 1.0,
        "alias": "x",
        "f1_stderr,none": "N/A",
    }
    assert task_metrics(values) == {"acc": 0.5, "acc_se": 0.1, "exact_match_strict": 1.0}
    sample = {
        "doc_hash": "h",
        "metrics": ["acc", "ppl"],
        "acc": 1.0,
        "ppl": (2.0, 3),
        "filtered_resps": ["r"],
    }
    assert sample_result(sample).scores == {"acc": 1.0}
    assert before("a b. c", [".", "b"]) == "a "


def test_a_completion_of_a_context_ends_before_its_stop_text(monkeypatch):
    """JaxLM groups requests by their options and keeps their order; needs no lm-eval."""
    calls = []

    def generate(name, prompts, sampling):
        calls.append((len(prompts), sampling.max_new_tokens, sampling.temperature))
        return SimpleNamespace(texts=[f"{prompt.ids[-1]}. x" for prompt in prompts])

    from jaxllm.rollout.sampling import SamplingConfig

    tokenizer = SimpleNamespace(
        bos_id=0, encode_markup=lambda text: list(map(ord, text)), encode=lambda text: []
    )
    model = SimpleNamespace(
        loaded=SimpleNamespace(tokenizer=tokenizer),
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.0, top_k=None, top_p=None, min_p=None),
        generate=generate,
    )
    long, short = {"until": ["."], "max_gen_toks": 5}, {"until": []}
    requests = [
        SimpleNamespace(args=(text, options)) for text, options in (("a", long), ("b", short), ("c", long))
    ]
    assert lm_eval_tasks.JaxLM(model).generate_until(requests) == ["97", "98. x", "99"]
    assert calls == [(2, 5, 0.0), (1, 256, 0.0)]


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["evaluate.py", "--checkpoint=x", "--suite=lm_eval:arc_easy"]
    assert run_script(evaluate.main, None, evaluate.define_flags, flags) == 78
    assert "needs lm-eval: pip install 'jaxllm[eval]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_script_writes_results_of_tasks(chat_model, tasks, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    flags = [f"--checkpoint={chat_model}", f"--suite_path={tasks}", f"--output={tmp_path}", "--max_rows=3"]
    run = ["evaluate.py", *flags, "--suite=lm_eval:mine_mc"]
    assert run_script(evaluate.main, None, evaluate.define_flags, run) == 0  # with the chat template
    assert "mine_mc/acc" in capsys.readouterr().out
    assert [list(row.scores) for row in read_results(tmp_path / "mine_mc.jsonl")] == [["acc", "acc_norm"]] * 3
    run[-1] = "--suite=lm_eval:nothing"
    assert run_script(evaluate.main, None, evaluate.define_flags, run) == 78
    assert "--suite=lm_eval:nothing: no such task" in capsys.readouterr().err
