"""experiments/chat.py as a process: its commands, its input, and its one-line errors."""

import json

from experiments import chat as script
from jaxllm.config import run_script
from jaxllm.data.chat import conversation


def test_it_replies_saves_and_resets(chat_model, run_process, tmp_path):
    save = "/save talk.jsonl"
    lines = ("one and two?", "six and one?", save, "/reset", save, "/laugh", "/exit", "not read\n")
    flags = (f"--checkpoint={chat_model}", "--temperature=0")
    code, output, errors = run_process("chat.py", *flags, stdin="\n".join(lines))
    assert (code, errors) == (0, "")
    first, second, saved, empty, commands = output.splitlines()
    assert saved == "saved to talk.jsonl"
    assert empty == "nothing to save: the conversation is empty"
    assert commands == "commands: /reset, /save FILE.jsonl, /exit"
    (row,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    _, messages = conversation(json.loads(row))
    contents = [message["content"] for message in messages]
    assert contents == ["one and two?", first.strip(), "six and one?", second.strip()]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert first.startswith("Yes")  # as in its training data


def test_invalid_utf8_in_the_input_is_replaced(chat_model, run_process):
    code, output, errors = run_process(
        "chat.py", f"--checkpoint={chat_model}", stdin=b"\xff?\none and two?\n"
    )
    assert (code, errors) == (0, "")
    assert len(output.splitlines()) == 3  # two replies, and the newline at the end of the input


def test_greedy_replies_do_not_depend_on_the_seed(chat_model, run_here):
    flags = (f"--checkpoint={chat_model}", "--temperature=0", "--max_new_tokens=30")
    outputs = {
        run_here("chat.py", *flags, f"--seed={seed}", stdin="A zebra of 77 islands, why not?\n")
        for seed in (0, 1)
    }
    ((code, _, errors),) = outputs
    assert (code, errors) == (0, "")


def test_a_checkpoint_that_cannot_chat_is_an_error_of_one_line(chat_model, reward_model, capsys):
    for checkpoint, code, line in (
        (reward_model, 78, "is a reward model and cannot generate; pass a policy checkpoint"),
        (chat_model.with_name("gone"), 78, "gone does not exist"),
    ):
        arguments = ["chat.py", f"--checkpoint={checkpoint}"]
        assert run_script(script.main, None, script.define_flags, arguments) == code
        (message,) = capsys.readouterr().err.splitlines()
        assert line in message
