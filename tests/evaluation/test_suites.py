"""Suites: one format for questions, checked before a model is loaded; scores of every question; metrics with
standard errors."""

import json

import jax
import numpy as np
import pytest

from experiments import evaluate
from jaxllm.config import run_script
from jaxllm.data.chat import last_span_start
from jaxllm.data.preferences import encode_completion
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.suite_model import windows
from jaxllm.evaluation.suites import Result, metrics, read_results, read_suites
from jaxllm.rollout.score import next_token_log_probs
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint

CHOICES = [
    {"prompt": "one and two?", "choices": ["Yes, one.", "No, never two."], "answer": 0},
    {"prompt": "six and ten?", "choices": ["No, never ten.", "Yes, six."], "answer": "Yes, six."},
    {"prompt": "two and nine?", "choices": ["Yes, two.", "No, never nine.", "Maybe"], "answer": "B"},
]
QUESTIONS = [{"prompt": f"{word} and four?", "answer": f"Yes,  {word}."} for word in ("one", "six", "ten")]
TEXTS = [{"text": "Yes, one. No, never two. " * 9}, {"text": "six and ten"}]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(*flags):
    return run_script(evaluate.main, None, evaluate.define_flags, ["evaluate.py", *map(str, flags)])


# The format


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "cut', "JSON"),
        ({"prompt": "a?"}, "no 'choices', 'answer' or 'text' among prompt"),
        ({"choices": ["a", "b"], "answer": 0}, "no 'prompt' or 'messages'"),
        ({"prompt": "a?", "choices": ["a"], "answer": 0}, "'choices' must be a list of at least two texts"),
        ({"prompt": "a?", "choices": ["a", ""], "answer": 0}, "'choices' must be a list of at least two"),
        (
            {"prompt": "a?", "choices": ["a", "b"], "answer": 2},
            "'answer' is 2; it must be one of 2 choices",
        ),
        ({"prompt": "a?", "choices": ["a", "b"], "answer": "C"}, "'answer' is \"C\"; it must be one of"),
        ({"prompt": "a?", "choices": ["a", "b"]}, "no 'answer' among prompt, choices"),
        ({"prompt": "a?", "choices": ["a"], "answer": 0}, "'choices' must be a list of at least two"),
        ({"prompt": "a?", "choices": ["a", "a"], "answer": 0}, "two of the 'choices' are equal"),
        ({"prompt": "a?", "choices": ["a", "b", "a"], "answer": 0}, "two of the 'choices' are equal"),
        ({"prompt": "a?", "answer": None}, "'answer' is null"),
        ({"prompt": "a?", "answer": []}, "'answer' is []"),
        ({"question": "a?"}, "among question; set --rename=THEIRS=OURS"),
        ({"text": ""}, "'text' is empty"),
        ({"text": 3}, "'text' is a number, not a text"),
        (
            {"prompt": "a?", "answer": "4"},
            "'choices', then 'answer' checked by 'exact_match': make two files",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_before_the_model_is_loaded(tmp_path, capsys, row, problem):
    file = write(tmp_path / "suite.jsonl", [CHOICES[0], row])
    assert run("--checkpoint=/no/such/run", f"--suite={file}") == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}:2: ")
    assert problem in line


def test_an_answer_is_an_index_a_choice_or_a_letter(tmp_path):
    (suite,) = read_suites([str(write(tmp_path / "arc-easy.v2.jsonl", CHOICES))])
    assert (suite.name, suite.kind) == ("arc_easy", "choices")
    assert [question.answer for question in suite.questions] == [0, 1, 1]


def test_equal_questions_have_ids_of_their_own_that_do_not_depend_on_their_place(tmp_path):
    a, b = CHOICES[:2]
    ids = []
    for name, rows in (("x", [a, b, a]), ("y", [b, a, a])):
        (suite,) = read_suites([str(write(tmp_path / f"{name}.jsonl", rows))])
        ids.append([question.id for question in suite.questions])
    assert ids[0] == [ids[1][1], ids[1][0], ids[1][2]]
    assert len(set(ids[0])) == 3


def test_suites_need_names_of_their_own_and_known_checks(tmp_path):
    file = str(write(tmp_path / "a.jsonl", QUESTIONS))
    with pytest.raises(ConfigError, match="2 suites are called 'a'"):
        read_suites([file, file])
    with pytest.raises(ConfigError, match="did you mean 'math_answer'"):
        read_suites([file], check="math_answr")
    with pytest.raises(DataError, match="empty"):
        read_suites([str(write(tmp_path / "empty.jsonl", []))])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((), "--input=FILE (or --suite=FILE) is missing"),
        (("--input=x", "--suite=x"), "--input=FILE and --suite exclude each other"),
        (("--suite=x", "--reference=y"), "--reference is not read with --suite"),
        (("--suite=x", "--rewards=length,format"), "--rewards names the one function"),
    ],
)
def test_flags_that_a_suite_does_not_read_are_refused(flags, line, capsys):
    assert run("--checkpoint=x", *flags) == 78
    assert line in capsys.readouterr().err


# Metrics


def test_a_metric_is_a_mean_over_questions_with_its_standard_error():
    results = [Result(str(i), {"accuracy": x}, {}) for i, x in enumerate((1.0, 0.0, 1.0, 1.0, None))]
    assert metrics(results) == pytest.approx({"accuracy": 0.75, "accuracy_se": 0.25})
    texts = [Result(str(i), {"bits_per_byte": x}, {}) for i, x in enumerate(((8.0, 4.0), (4.0, 8.0)))]
    # residuals 8 - 4 and 4 - 8; sqrt(32 / 1 / 2) / 6
    assert metrics(texts) == pytest.approx({"bits_per_byte": 1.0, "bits_per_byte_se": 4 / 6})


def test_windows_score_every_token_once_with_as_much_context_as_fits():
    found = [(list(context), list(rest)) for context, rest in windows(list(range(1, 8)), 0, 3)]
    assert found == [([0], [1, 2, 3]), ([3], [4, 5, 6]), ([4, 5, 6], [7])]


# What a model makes of questions


@pytest.fixture(scope="module")
def log_prob(chat_model):
    """(ids, start) -> log-prob in nats of ids[start:], in a batch of one, on one device."""
    loaded = load_checkpoint(str(chat_model))
    score = jax.jit(lambda tokens: next_token_log_probs(loaded.params, tokens, model=loaded.model).log_probs)

    def total(ids, start):
        tokens = np.zeros((1, loaded.model.config.max_length), np.int32)
        tokens[0, : len(ids)] = ids
        return float(score(tokens)[0, start - 1 : len(ids) - 1].sum())

    return total, loaded


@pytest.fixture(scope="module")
def measured(chat_model, tmp_path_factory):
    """The output of evaluate.py on three suites, with and without a chat template, and its folders."""
    folder = tmp_path_factory.mktemp("suites")
    files = {"mc": CHOICES, "qa": QUESTIONS, "text": TEXTS}
    names = ",".join(str(write(folder / f"{name}.jsonl", rows)) for name, rows in files.items())
    flags = (f"--checkpoint={chat_model}", "--max_new_tokens=8")
    assert run(*flags, f"--suite={names}") == 0
    plain = folder / "plain"
    plain.mkdir()
    assert run(*flags, f"--suite={folder / 'mc.jsonl'}", "--plain", f"--output={plain}") == 0
    return chat_model / "suites", plain


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_choice_is_scored_as_the_whole_completion_of_a_chat(measured, log_prob):
    total, loaded = log_prob
    template = checkpoint_template(loaded)
    for question, row in zip(CHOICES, rows_of(measured[0] / "mc" / "30.jsonl"), strict=True):
        encoded = [
            encode_completion(
                template,
                [{"role": "user", "content": question["prompt"]}],
                {"role": "assistant", "content": choice},
            )
            for choice in question["choices"]
        ]
        expected = [total(ids, last_span_start(mask)) for ids, mask in encoded]
        np.testing.assert_allclose(row["log_probs"], expected, rtol=1e-4)
        per_byte = np.array(expected) / [len(choice) for choice in question["choices"]]
        picked = [int(np.argmax(expected)), int(np.argmax(per_byte))]
        assert row["picked"] == picked
        assert list(row["scores"].values()) == [pick == row["answer"] for pick in picked]


def test_a_choice_follows_a_plain_prompt_after_a_space(measured, log_prob):
    total, loaded = log_prob
    for question, row in zip(CHOICES, rows_of(measured[1] / "mc.jsonl"), strict=True):
        prompt = loaded.tokenizer.encode(question["prompt"])
        for choice, found in zip(question["choices"], row["log_probs"], strict=True):
            ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(f"{question['prompt']} {choice}")]
            assert found == pytest.approx(total(ids, len(prompt) + 1), rel=1e-4)


def test_a_text_is_scored_in_bits_a_byte_with_its_end(measured, log_prob):
    total, loaded = log_prob
    rows, tokenizer = rows_of(measured[0] / "text" / "30.jsonl"), loaded.tokenizer
    bits, num_bytes = rows[1]["scores"]["bits_per_byte"]
    ids = [tokenizer.bos_id, *tokenizer.encode("six and ten"), tokenizer.eos_id]
    assert (bits, num_bytes) == (pytest.approx(-total(ids, 1) / np.log(2), rel=1e-4), 11)
    assert rows[0]["tokens"] > loaded.model.config.max_length  # it is scored in several windows


def test_a_completion_is_right_where_it_is_the_answer_but_for_white_space(measured):
    rows = rows_of(measured[0] / "qa" / "30.jsonl")
    pairs = zip(QUESTIONS, rows, strict=True)
    right = [row["completions"][0].split() == question["answer"].split() for question, row in pairs]
    assert [row["scores"]["exact_match"] for row in rows] == right
    assert any(right)  # the model was trained on these chats
    results = list(read_results(measured[0] / "qa" / "30.jsonl"))
    assert metrics(results)["exact_match"] == np.mean(right)


def test_prompts_that_lose_their_beginning_are_counted_and_samples_give_pass_at_k(
    chat_model, tmp_path, capsys
):
    long = {"prompt": "many " * 99 + "one and four?", "answer": "Yes, one."}
    file = write(tmp_path / "long.jsonl", [*QUESTIONS, long])
    flags = ("--samples=4", "--temperature=1", "--max_new_tokens=8", f"--output={tmp_path}")
    assert run(f"--checkpoint={chat_model}", f"--suite={file}", *flags) == 0
    output = capsys.readouterr().out
    assert "note: long: 1 of 4 prompts lose their beginning: more than 56 tokens" in output
    for row in read_results(tmp_path / "long.jsonl"):
        assert list(row.scores) == ["exact_match", "pass@2", "pass@4"]
        assert row.scores["exact_match"] <= row.scores["pass@2"] <= row.scores["pass@4"]
