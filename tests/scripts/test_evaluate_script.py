"""A checkpoint answers a file of prompts, and its answers are judged."""

import json
import re

import numpy as np
import pytest

from experiments import answer
from jaxllm.evaluation.completions import PlainText
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
from jaxllm.config import run_script
from jaxllm.data.preferences import answered

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


def test_every_answer_is_judged_and_written_beside_its_row(
    chat_model, reward_model, questions, run_process, tmp_path
):
    (tmp_path / "mine.py").write_text(
        "def even(example, completion):\n    return len(example['answer'] + completion) % 2 == 0\n"
    )
    code, output, errors = run_process(
        "answer.py",
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
    template = checkpoint_template(loaded)
    for row in rows:
        assert row["rewards"]["even"] == (len(row["answer"] + row["completion"]) % 2 == 0)
        if row["ended"]:
            asked = [{"role": "user", "content": row["prompt"]}]
            said = answered(template, asked, {"role": "assistant", "content": row["completion"]})
            tokens, lengths = np.array([said.ids]), np.array([len(said.ids)])
            reward = float(loaded.model.rewards(loaded.params, tokens, lengths)[0])
            assert row["rewards"]["model"] == pytest.approx(reward, abs=1e-4)
    even = np.array([row["rewards"]["even"] for row in rows]).reshape(3, 2)
    assert f"pass@1 {even.mean():.4g} ± " in output
    assert f"pass@2 {even.any(1).mean():.4g} ± " in output


def test_the_kl_to_a_checkpoint_is_0_for_itself_and_more_for_another(
    chat_model, questions, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def kl(*flags):
        asked = (f"--checkpoint={chat_model}", f"--input={questions}", f"--reference={chat_model}")
        more = ("--temperature=1", "--max_new_tokens=8", "--output=answers.jsonl", *flags)
        assert run_script(answer.main, None, answer.define_flags, ["answer.py", *asked, *more]) == 0
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        return np.array([row["kl"] for row in rows])

    np.testing.assert_allclose(kl(), 0, atol=1e-4)
    untrained = kl("--untrained", "--max_rows=4", "--samples=16")
    assert untrained.mean() > 2 * untrained.std() / np.sqrt(len(untrained))


def test_a_plain_prompt_is_the_text_alone(chat_model):
    tokenizer = load_checkpoint(str(chat_model)).tokenizer
    plain = PlainText(tokenizer)
    said = [{"role": "user", "content": "What is one?"}]
    assert plain.prompt(said) == [tokenizer.bos_id, *tokenizer.encode("What is one?")]
    assert plain.stop_ids == (tokenizer.eos_id,)


def test_what_cannot_be_answered_is_refused_in_one_line(
    chat_model, reward_model, questions, tmp_path, capsys
):
    asked = (f"--checkpoint={chat_model}", f"--input={questions}")
    for flags, line in (
        ((f"--checkpoint={chat_model}",), "--input=FILE is missing"),
        ((f"--checkpoint={reward_model}", f"--input={questions}"), "is a reward model, which says nothing"),
        ((*asked, "--output=no/x"), "--output=no/x: there is no such folder"),
        ((*asked, "--samples=0"), "--samples=0 must be at least 1"),
        ((*asked, "--samples=2", "--temperature=0"), "would say the same every time"),
        ((*asked, "--max_new_tokens=8", "--rewards=math_answr"), "did you mean 'math_answer'"),
        ((*asked, "--max_new_tokens=8", f"--reward_model={chat_model}"), "not a reward model"),
        ((f"--checkpoint={chat_model}", f"--input={questions}l"), "questions.jsonll"),
    ):
        assert run_script(answer.main, None, answer.define_flags, ["answer.py", *flags]) == 78
        message = capsys.readouterr().err.splitlines()[-1]
        assert line in message
