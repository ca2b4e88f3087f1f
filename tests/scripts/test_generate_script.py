"""experiments/generate.py continues prompts, by seed, and reports truncation and bad flags."""

import pytest

from experiments import generate
from jaxllm.config import run_script

SEPARATOR = "-" * 20


@pytest.fixture
def run_generate(chat_model, capsys, one_device):
    """(*flags) -> the texts that are printed, and stderr."""

    def run(*flags):
        arguments = ["generate.py", f"--checkpoint={chat_model}", *flags]
        assert run_script(generate.main, None, generate.define_flags, arguments) == 0
        captured = capsys.readouterr()
        return captured.out.removesuffix("\n").split(f"\n{SEPARATOR}\n"), captured.err

    return run


def test_every_prompt_is_continued_by_the_seed(run_generate):
    flags = ("--prompt=one and", "--prompt=six\x1b\x07 and", "--num_samples=2", "--max_new_tokens=8")
    (texts, errors), (again, _), (other, _) = (
        run_generate(*flags, "--temperature=3", f"--seed={seed}") for seed in (0, 0, 1)
    )
    assert errors == ""
    # Without the control characters: no text may change the terminal.
    assert [text.lstrip("\n")[:7] for text in texts] == ["one and", "one and", "six and", "six and"]
    assert texts[0] != texts[1]
    assert texts == again != other
    greedy, _ = run_generate(*flags, "--temperature=0")
    assert greedy[0].strip() == greedy[1].strip() != "one and"


def test_a_continuation_truncated_at_the_models_max_length_is_reported(run_generate):
    flags = ("--prompt=one and", "--max_new_tokens=64", "--temperature=3", "--num_samples=3")
    texts, errors = run_generate(*flags)  # at this temperature hardly any ends by itself
    assert len(texts) == 3
    assert set(errors.splitlines()) == {"note: truncated at model.max_length=64 tokens"}


def test_bad_flags_are_errors_of_one_line(chat_model, reward_model, capsys):
    for flags, code, line in (
        ((f"--checkpoint={chat_model}", "--num_samples=0"), 78, "--num_samples=0 must be at least 1"),
        ((f"--checkpoint={chat_model}", "--temperature=-1"), 78, "temperature"),
        ((), 78, "--checkpoint=RUN_FOLDER is missing"),
        ((f"--checkpoint={reward_model}",), 78, "is a reward model and cannot generate; pass a policy"),
        ((f"--checkpoint={chat_model}/gone",), 78, "gone does not exist"),
    ):
        arguments = ["generate.py", *flags]
        assert run_script(generate.main, None, generate.define_flags, arguments) == code
        (message,) = capsys.readouterr().err.splitlines()
        assert line in message
