"""experiments/evaluate.py completes a file of prompts, and scores and writes the completions."""

import json
import re
from datetime import datetime
from decimal import Decimal

import jax
import numpy as np
import pytest

from experiments import evaluate
from jaxllm.config import run_script
from jaxllm.data.preferences import encode_completion
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint

QUESTIONS = [
    {"prompt": "What is one?", "answer": "1"},
    {"frage": "What is two?", "answer": "2"},
    {"prompt": "many " * 99, "answer": "3"},
    {"prompt": "Well?", "chosen": "Yes", "rejected": "No", "answer": "4"},
]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return file


def test_every_completion_is_scored_and_written_with_its_row(
    chat_model, reward_model, questions, run_process, tmp_path
):
    (tmp_path / "mine.py").write_text(
        "def even(example, completion):\n    return len(example['answer'] + completion) % 2 == 0\n"
    )
    code, output, errors = run_process(
        "evaluate.py",
        f"--checkpoint={chat_model}",
        f"--input={questions}",
        "--rename=frage=prompt",
        "--rewards=mine.py:even",
        f"--reward_model={reward_model}",
        "--samples=2",
        "--temperature=1",
        "--max_new_tokens=8",
        "--output=answers.jsonl",
    )
    assert code == 0, errors
    assert re.search(r"left out: \S+questions.jsonl:3: .*no room for --max_new_tokens", errors)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["1", "1", "2", "2", "4", "4"]
    loaded = load_checkpoint(str(reward_model))
    template, score = checkpoint_template(loaded), jax.jit(loaded.model.rewards)
    for row in rows:
        assert row["rewards"]["even"] == (len(row["answer"] + row["completion"]) % 2 == 0)
        if row["ended"]:
            prompt = [{"role": "user", "content": row["prompt"]}]
            encoded = encode_completion(template, prompt, {"role": "assistant", "content": row["completion"]})
            lengths = np.array([len(encoded.ids)])
            tokens = np.pad([encoded.ids], ((0, 0), (0, 64 - lengths[0])))  # one width for all
            reward = float(score(loaded.params, tokens, lengths).values[0])
            assert row["rewards"]["model"] == pytest.approx(reward, abs=1e-4)
    even = np.array([row["rewards"]["even"] for row in rows]).reshape(3, 2)
    assert f"pass@1 {even.mean():.4g} ± " in output
    assert f"pass@2 {even.any(1).mean():.4g} ± " in output


def test_the_kl_of_a_checkpoint_is_0_to_itself_and_more_to_another(chat_model, tmp_path, run_here):
    questions = tmp_path / "questions.parquet"
    columns = {"when": datetime(2026, 1, 2), "price": Decimal("18.50"), "raw": b"a", "answer": "1"}
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"What is {word}?", **columns} for word in ("one", "two", "three", "four")]
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), questions)

    def kl(*flags):
        required = (f"--checkpoint={chat_model}", f"--input={questions}", f"--reference={chat_model}")
        more = ("--temperature=1", "--max_new_tokens=8", "--rewards=math_answer", "--output=answers.jsonl")
        code, _, errors = run_here("evaluate.py", *required, *more, *flags)
        assert code == 0, errors
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert {(row["when"], row["price"], row["raw"]) for row in rows} == {
            ("2026-01-02T00:00:00", "18.50", "a")
        }
        return np.array([row["kl"] for row in rows])

    np.testing.assert_allclose(kl(), 0, atol=1e-4)
    untrained = kl("--untrained", "--max_rows=4", "--samples=16")
    assert untrained.mean() > 2 * untrained.std() / np.sqrt(len(untrained))


def test_bad_input_is_an_error_of_one_line(chat_model, reward_model, questions, tmp_path, capsys):
    required = (f"--checkpoint={chat_model}", f"--input={questions}")
    suite = (f"--checkpoint={chat_model}", f"--suite={questions}")
    for flags, line in (
        ((f"--checkpoint={chat_model}",), "--input=FILE (or --suite=FILE) is missing"),
        (
            (f"--checkpoint={reward_model}", f"--input={questions}"),
            "is a reward model and cannot generate",
        ),
        ((*required, "--output=no/x"), "--output=no/x: there is no such folder"),
        ((*required, f"--output={questions.parent}"), f"--output={questions.parent} is a folder"),
        ((*suite, f"--output={questions}"), "is a file: results of suites go to a folder"),
        ((*suite, "--suite_path=no"), "--suite_path has no effect without --suite=lm_eval:TASK"),
        ((*required, "--samples=0"), "--samples=0 must be at least 1"),
        ((*required, "--samples=2", "--temperature=0"), "would generate the same completion every time"),
        ((*required, "--samples=2", "--temperature=1e-39"), "would generate the same completion every time"),
        ((*required, "--reference=x", "--temperature=1e-39"), "--reference needs sampled completions"),
        (
            (*required, "--reference=x", "--top_p=0.9", "--top_k=5"),
            "--reference needs unfiltered completions, from which alone the KL can be estimated: remove "
            "--top_k=5, --top_p=0.9",
        ),
        ((*required, "--max_new_tokens=8", "--rewards=math_answr"), "did you mean 'math_answer'"),
        (
            (*required, "--max_new_tokens=8", f"--reward_model={chat_model}"),
            f"error: --reward_model={chat_model}",
        ),
        ((*required, "--top_p=2"), "error: --top_p=2.0 must be in (0, 1]"),
        ((f"--checkpoint={questions}-no", f"--input={questions}"), "does not exist"),
        (
            (*required, "--max_new_tokens=8", "--rewards=countdown"),
            "failed, on the first 2 rows: reward 'count",
        ),
        ((f"--checkpoint={chat_model}", f"--input={questions}l"), "questions.jsonll"),
    ):
        assert run_script(evaluate.main, None, evaluate.define_flags, ["evaluate.py", *flags]) == 78
        message = capsys.readouterr().err.splitlines()[-1]
        assert line in message
