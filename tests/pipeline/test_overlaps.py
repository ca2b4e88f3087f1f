"""No stage of a pipeline trains on what another stage, or a gate, is evaluated on: overlaps are counted."""

import dataclasses
import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from jaxllm.config import load_config, override, parse
from jaxllm.data import chat, preferences, prompts
from jaxllm.data.examples import hold_out
from jaxllm.data.held_out import text_key
from jaxllm.data.loss_mask import Encoded
from jaxllm.data.row_cache import Encoder, read_sources
from jaxllm.errors import DataError
from jaxllm.pipeline.completions import HELD_OUT, PipelineCompletions
from jaxllm.pipeline.config import PARENTS, PipelineConfig
from jaxllm.pipeline.held_out import write_held_out

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
STAGES = [name for name in PARENTS if name != "pretrain"]


class OneToken:
    """A chat template that encodes every text as one token, since these tests are about the questions."""

    renders_tools = False
    source = clock = None

    def prompt(self, messages, **_):
        return [zlib.crc32(repr(messages).encode()) >> 1]

    def encode(self, messages, loss_on, tools):
        return Encoded([0, *self.prompt(messages)], [False, True])


class Questions(NamedTuple):
    """`text_key`s of the user's turns in training rows, by stage, and of evaluated first questions."""

    trained: dict[str, set[int]]
    evaluated: dict[str, set[int]]


def make_config(rows, **changes):
    """The quickstart with so many rows of each source in SFT, and 200 in the other stages."""
    config = load_config(str(QUICKSTART))
    for name in STAGES:
        override(config, PipelineConfig, f"{name}.data.synthetic_rows", str(rows if name == "sft" else 200))
    for field, text in changes.items():
        override(config, PipelineConfig, field.replace("__", "."), str(text))
    return parse(PipelineConfig, config)


def encoder(data):
    """The encoder of the stage with this config."""
    if isinstance(data, chat.ChatConfig):
        return chat.encoder(data, SimpleNamespace(), OneToken())
    if isinstance(data, preferences.PreferenceConfig):
        return preferences.encoder(data, OneToken())
    return prompts.encoder(data, OneToken(), 1)


def keys(rows, turns):
    """The `text_key` of each question of these rows, and of so many of its turns (None: all)."""
    columns = rows.columns
    for i in rows.index:
        yield int(columns.group_keys[i])
        asked = columns.turn_keys[columns.turn_starts[i] : columns.turn_starts[i + 1]]
        yield from asked[:turns].tolist()


def read_questions(config, folder) -> Questions:
    """What the stages and the gates of a pipeline read, each as it does."""
    write_held_out(config, folder)
    trained, evaluated = {}, {}
    for name in STAGES:
        data = dataclasses.replace(getattr(config, name).data, held_out=(str(folder / HELD_OUT),))
        encode = Encoder(encoder(data), SimpleNamespace(vocab_size=2**31, hash=""), OneToken())
        train, validation = hold_out(data, read_sources(data, encode, seed=config.seed, run_folder=None))
        trained[name] = {key for rows in train for key in keys(rows, None)}
        evaluated[name] = {key for rows in validation for key in keys(rows, 1)}
        assert trained[name]
        assert evaluated[name]
    asked = PipelineCompletions(config.gates, folder, config.seed).prompts(OneToken(), 1)
    messages = [prompts.question_messages(each.row, config.ppo.data)[1] for each in asked]
    evaluated["gates"] = {text_key(chat.opening(each)) for each in messages}
    return Questions(trained, evaluated)


def overlaps(found) -> dict[tuple[str, str], int]:
    """How many questions of one are trained on in the other."""
    return {
        (stage, by): len(trained & evaluated)
        for stage, trained in found.trained.items()
        for by, evaluated in found.evaluated.items()
        if trained & evaluated
    }


def test_the_built_in_data_has_no_overlap(tmp_path):
    found = read_questions(make_config(1500), tmp_path)
    assert overlaps(found) == {}
    assert len(found.evaluated["gates"]) > 400


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def shared(tmp_path):
    """Files of the same 300 questions, each in its own spelling, and gates on some of them."""
    asked = [f"What is {i} + {i % 7}?" for i in range(300)]
    chats = [
        {"messages": exchange("Hi!", "Hello!") + exchange(text.upper(), "A sum.")} for text in asked[::2]
    ]
    chats += [{"prompt": f" {text}", "completion": "A sum."} for text in asked]
    pairs = [{"prompt": text.replace(" + ", "  + "), "chosen": "a", "rejected": "b"} for text in asked]
    problems = [{"question": text, "answer": "1", "working": "So 1."} for text in asked]
    gates = [{"prompt": text.lower()} for text in asked[:90]]
    files = {"chats": chats, "pairs": pairs, "problems": problems, "gates": gates}
    return {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_files(shared, **changes):
    files = {
        "data__chats": "chats",
        "data__pairs": "pairs",
        "data__solutions": "problems",
        "data__problems": "problems",
    }
    fields = {field: shared[name] for field, name in files.items()} | {"gates__prompts": shared["gates"]}
    fields |= {
        "sft_reasoning__data__rename": "question=prompt,working=completion",
    }
    fields |= {"grpo__data__prompt_format": "Solve: {question}", "grpo__data__validation_fraction": 0.3}
    return make_config(10, **fields | changes)


def test_files_that_share_questions_have_no_overlap(shared, tmp_path):
    found = read_questions(with_files(shared), tmp_path)
    assert overlaps(found) == {}
    assert len(found.evaluated["gates"]) == 90
    assert all(len(trained) > 100 for trained in found.trained.values())


def test_gates_on_the_first_training_pairs_take_these_from_training(shared, tmp_path):
    found = read_questions(with_files(shared, gates__prompts=shared["pairs"], gates__max_rows=50), tmp_path)
    assert overlaps(found) == {}
    assert len(found.evaluated["gates"]) == 50


def test_gates_on_all_training_pairs_are_an_error(shared, tmp_path):
    with pytest.raises(DataError, match=r"chats.jsonl has no row left to train on: .* data.held_out"):
        read_questions(with_files(shared, gates__prompts=shared["pairs"]), tmp_path)
