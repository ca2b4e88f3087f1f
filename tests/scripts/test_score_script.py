"""experiments/score.py writes the reward model's rewards, and reports every row that it leaves out."""

import json

import jax
import numpy as np
import pytest

from experiments import score
from jaxllm.config import run_script
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint

PAIRS = [
    {"prompt": "one and two?", "chosen": "Yes, one.", "rejected": "No, never two.", "id": 7},
    {"prompt": "six and ten?", "chosen": "Yes, six.", "rejected": "No, never ten, not once."},
    {"prompt": "two and nine?", "chosen": "No, never nine.", "rejected": "Yes, two."},
]
CHATS = [
    {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "Yes, one."}]},
    {"prompt": "one and four?", "completion": "No, never four."},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reward_of(reward_model):
    """(question, answer) -> the model's reward, in a batch of one."""
    loaded = load_checkpoint(str(reward_model))
    template, score = checkpoint_template(loaded), jax.jit(loaded.model.rewards)

    def reward(question, answer):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = template.encode(messages, loss_on="last").ids
        tokens = np.array([ids + [0] * (64 - len(ids))], np.int32)
        return float(score(loaded.params, tokens, np.array([len(ids)])).values[0])

    return reward


def test_pairs_are_scored_compared_and_written(reward_model, reward_of, run_process, tmp_path):
    bad = [
        '{"prompt": "cut',
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        PAIRS[0] | {"prompt": "seven " * 99},
    ]
    file = write(tmp_path / "pairs.jsonl", [*PAIRS, *bad])
    code, output, errors = run_process(
        "score.py", f"--checkpoint={reward_model}", f"--input={file}", "--output=scores.jsonl"
    )
    assert code == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    metrics = load_checkpoint(str(reward_model)).metadata["metrics"]
    for given, row in zip(PAIRS, rows, strict=True):
        assert given.items() <= row.items()
        for side in ("chosen", "rejected"):
            reward = row[f"{side}_reward"]
            assert reward == pytest.approx(reward_of(given["prompt"], given[side]), abs=1e-5)
            normalized = (reward - metrics["eval/reward_mean"]) / metrics["eval/reward_std"]
            assert row[f"{side}_reward_normalized"] == pytest.approx(normalized)
    first, accuracy, longer, shorter, baseline, preferred = output.splitlines()
    assert first.startswith("3 rows scored, 3 left out; reward ")
    assert accuracy == "accuracy 0.667 ± 0.272"  # the model was trained to prefer "Yes"
    no_error = "(one prompt, or all equal: no error)"
    assert longer == f"accuracy_longer_chosen 0.000 {no_error}"
    assert shorter == f"accuracy_shorter_chosen 1.000 {no_error}"
    assert baseline == "length_baseline 0.333 ± 0.333"
    assert preferred == f"longer_preferred 0.000 {no_error}"
    left_out = [line for line in errors.splitlines() if line.startswith("left out: ")]
    for number, line, why in zip((4, 5, 6), left_out, ("JSON", "identical pair", "max_length"), strict=True):
        assert f"pairs.jsonl:{number}: " in line
        assert why in line


def test_conversations_are_scored_by_their_last_turn(reward_model, reward_of, run_here, tmp_path):
    file = write(tmp_path / "chats.jsonl", CHATS)
    code, output, errors = run_here(
        "score.py", f"--checkpoint={reward_model}", f"--input={file}", "--output=scores.jsonl"
    )
    assert code == 0, errors
    found = [json.loads(line)["reward"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    expected = [reward_of("one?", "Yes, one."), reward_of("one and four?", "No, never four.")]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] > found[1]
    assert (
        output
        == f"2 rows scored, 0 left out; reward {np.mean(found):.4f} ± {abs(np.diff(found)[0]) / 2:.4f}\n"
    )


def test_columns_are_renamed(reward_model, run_here, tmp_path):
    file = write(tmp_path / "theirs.jsonl", [{"question": "one and two?", "good": "Yes, one.", "bad": "No."}])
    flags = f"--checkpoint={reward_model}", f"--input={file}"
    code, output, errors = run_here("score.py", *flags, "--rename=question=prompt,good=chosen,bad=rejected")
    assert (code, errors) == (0, "")
    assert "accuracy 1.000" in output
    code, _, errors = run_here("score.py", *flags)
    assert code == 78
    assert "theirs.jsonl:1: unknown format" in errors.splitlines()[0]
    assert "set --rename=THEIRS=OURS" in errors.splitlines()[0]
    assert errors.splitlines()[-1].endswith("no row can be scored")


def test_bad_input_is_an_error_of_one_line(reward_model, chat_model, tmp_path, capsys):
    file = write(tmp_path / "chats.jsonl", CHATS)
    for flags, code, line in (
        ((f"--checkpoint={reward_model}",), 78, "--input=FILE is missing"),
        ((f"--input={file}",), 78, "--checkpoint=RUN_FOLDER is missing"),
        ((f"--checkpoint={chat_model}", f"--input={file}"), 78, "is not a reward model; pass the run of one"),
        ((f"--checkpoint={reward_model}", f"--input={file}l"), 78, "chats.jsonll"),
        ((f"--checkpoint={reward_model}", f"--input={file}", "--rename=a"), 78, "write THEIRS=OURS"),
        ((f"--checkpoint={reward_model}", f"--input={file}", "--output=no/x"), 78, "no/x"),
        (
            (f"--checkpoint={reward_model}", f"--input={file}", f"--judge={chat_model}"),
            78,
            f"--judge: no row of --input={file} has two 'answers' and a 'choice'",
        ),
    ):
        assert run_script(score.main, None, score.define_flags, ["score.py", *flags]) == code
        (message,) = capsys.readouterr().err.splitlines()
        assert line in message
