"""From the sources of a config to windows: reading, holding out, errors and the report."""

import dataclasses
import json

import numpy as np
import pytest

from jaxllm.batches import TokenBatch
from jaxllm.data.text import TextConfig, load_text, show_targets, text_documents
from jaxllm.errors import ConfigError, DataError


@pytest.fixture
def config(tmp_path, documents) -> TextConfig:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return TextConfig(
        train=(str(path),),
        weights=(),
        validation=(),
        validation_fraction=0.1,
        text_key="text",
        synthetic_rows=10,
        sequence_length=32,
        batch_size=4,
        on_bad_row="stop",
        max_bad_fraction=0.1,
    )


def changed(config, **fields) -> TextConfig:
    return dataclasses.replace(config, **fields)


def stream(windows, tokenizer) -> str:
    """All targets of `windows` as text."""
    return "".join(
        tokenizer.decode(window.targets[window.mask], from_start=False) for part in windows for window in part
    )


def test_every_document_is_trained_on_or_held_out(config, tokenizer, documents):
    data = load_text(config, tokenizer, seed=0)
    train, held_out = stream(data.train, tokenizer), stream(data.validation, tokenizer)
    assert all((text in train) != (text in held_out) for text in documents)
    assert len(train) + len(held_out) == sum(map(len, documents))
    assert 0.05 < len(held_out) / len(train) < 0.2


@pytest.mark.parametrize("cached", [False, True])
def test_bad_rows_that_stop_the_run_are_in_the_file(config, tokenizer, tmp_path, cached):
    with open(config.train[0], "a") as file:
        file.write('{"txt": "lost"}\n')
    if cached:  # by a run that skips them
        load_text(changed(config, on_bad_row="skip"), tokenizer, seed=0)
    with pytest.raises(DataError, match="missing key"):
        load_text(config, tokenizer, seed=0, run_folder=tmp_path / "run")
    (row,) = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(row)["reason"] == "missing key"


def test_with_a_validation_source_all_train_sources_are_trained_on(config, tokenizer, documents, tmp_path):
    (tmp_path / "held.txt").write_text("Eve left.")
    data = load_text(changed(config, validation=(str(tmp_path / "held.txt"),)), tokenizer, seed=0)
    assert stream(data.train, tokenizer) == "".join(documents)
    assert stream(data.validation, tokenizer) == "Eve left."


def test_documents_that_are_held_out_in_another_spelling_are_not_trained_on(
    config, tokenizer, documents, tmp_path
):
    for name, text in (("held", documents[3].upper()), ("named", f" {documents[5]}\n\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    plain = changed(config, validation=(str(tmp_path / "held.txt"),))
    data = load_text(changed(plain, held_out=(str(tmp_path / "named.txt"),)), tokenizer, seed=0)
    kept = [text for i, text in enumerate(documents) if i not in (3, 5)]
    assert stream(data.train, tokenizer) == "".join(kept)
    assert "train.jsonl: 2 documents are not trained on, their text is held out" in data.report
    assert data.fingerprint != load_text(plain, tokenizer, seed=0).fingerprint


def test_validation_on_the_training_file_is_an_error(config, tokenizer):
    with pytest.raises(DataError, match=r"data.train: .*train.jsonl has no row left to train on: .* all 200"):
        load_text(changed(config, validation=config.train), tokenizer, seed=0)


def test_a_fraction_of_zero_means_no_validation(config, tokenizer, documents):
    data = load_text(changed(config, validation_fraction=0.0), tokenizer, seed=0)
    assert data.validation == ()
    assert stream(data.train, tokenizer) == "".join(documents)


def test_a_number_of_tokens_is_held_out_in_place_of_a_fraction(config, tokenizer):
    data = load_text(changed(config, validation_tokens=500), tokenizer, seed=0)
    held_out = sum(windows.num_tokens for windows in data.validation)
    assert 500 <= held_out < 700
    less = load_text(changed(config, validation_tokens=50), tokenizer, seed=0)
    assert less.fingerprint != data.fingerprint != load_text(config, tokenizer, seed=0).fingerprint


def test_a_text_too_short_to_hold_anything_out_is_an_error(config, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("Ada")
    with pytest.raises(
        DataError, match=r"data.validation_fraction=0.1 .* holds no row to validate on; raise it"
    ):
        load_text(changed(config, train=(str(tmp_path / "short.txt"),)), tokenizer, seed=0)


def test_each_source_has_its_own_windows(config, tokenizer, tmp_path):
    (tmp_path / "other.txt").write_text("Finn left the tower.\n" * 50)
    both = changed(config, train=(*config.train, str(tmp_path / "other.txt")), weights=(1.0, 2.0))
    data = load_text(changed(both, validation_fraction=0.0), tokenizer, seed=0)
    assert len(data.train) == 2
    assert data.weights == (1.0, 2.0)
    assert set(stream(data.train[1:], tokenizer).splitlines()) == {"Finn left the tower."}


def test_skipped_rows_are_written_into_the_run_folder(config, tokenizer, tmp_path):
    with open(config.train[0], "a") as file:
        file.write('{"txt": "misspelt"}\n')
    run_folder = tmp_path / "run"
    with pytest.raises(DataError, match=r"train.jsonl:201: missing key"):
        load_text(config, tokenizer, seed=0, run_folder=run_folder)
    skipping = changed(config, on_bad_row="skip")
    for _ in range(2):  # a resumed run finds the tokens in the cache and writes the same
        load_text(skipping, tokenizer, seed=0, run_folder=run_folder)
        rows = [json.loads(line) for line in (run_folder / "bad_rows.jsonl").read_text().splitlines()]
        assert [row["where"] for row in rows] == [f"{config.train[0]}:201"]


def test_text_for_the_tokenizer_comes_from_each_source_in_turn(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n{"no": 1}\n{"text": "a3"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b1"}\n')
    both = changed(config, train=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    assert list(text_documents(both, seed=0)) == ["a1", "b1", "a3"]


def test_the_fingerprint_depends_on_everything_that_changes_a_window(config, tokenizer, tmp_path, documents):
    (tmp_path / "held.txt").write_text("Eve left.")
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "edited.jsonl").write_text(json.dumps({"text": " ".join(documents)}) + "\n")

    def fingerprint(**fields):
        return load_text(changed(config, **fields), tokenizer, seed=0).fingerprint

    assert fingerprint() == fingerprint(train=(str(tmp_path / "moved.jsonl"),))
    others = [
        fingerprint(train=(str(tmp_path / "edited.jsonl"),)),
        fingerprint(validation=(str(tmp_path / "held.txt"),)),
        fingerprint(validation_fraction=0.2),
        fingerprint(sequence_length=16),
        fingerprint(weights=(2.0,)),
    ]
    assert len({fingerprint(), *others}) == 6


def test_the_report_counts_rows_read_kept_and_dropped(config, tokenizer):
    with open(config.train[0], "a") as file:
        file.write('{"text": ""}\n{"txt": "misspelt"}\n')
    data = load_text(changed(config, on_bad_row="skip"), tokenizer, seed=0)
    lines = data.report.splitlines()
    tokens = sum(windows.num_tokens for windows in (*data.train, *data.validation))
    assert f"{config.train[0]}: 202 rows read, 200 kept, 2 dropped (1 empty text, 1 missing key);" in lines[0]
    assert f"{tokens:,} tokens" in lines[0]
    assert lines[1].startswith(
        f"train: {data.train[0].num_tokens:,} tokens in {len(data.train[0]):,} windows, "
    )
    assert lines[1].endswith("% padding")
    assert lines[2].startswith("validation: ")
    assert lines[3].startswith("example (tokens in ⟦ ⟧ are not in the loss): ")
    assert "</s>⟦<s>⟧" in lines[3]


def test_targets_are_shown_with_their_mask(tokenizer):
    targets = [*tokenizer.encode("é\n"), tokenizer.eos_id, tokenizer.bos_id, *tokenizer.encode("ab"), 0]
    mask = np.array([True] * (len(targets) - 4) + [False, False, True, False])
    segments = np.array([1] * (len(targets) - 1) + [0])
    row = TokenBatch(np.array(targets), np.array(targets), mask, segments, segments)
    assert show_targets(row, tokenizer) == "é\\n</s>⟦<s>a⟧b"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ()}, "train is empty; name at least one source"),
        ({"weights": (1.0, 2.0)}, r"weights=\(1.0, 2.0\) must be one positive number for each of the 1"),
        ({"weights": (0.0,)}, r"weights=\(0.0,\) must be one positive number"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore' must be 'stop' or 'skip'"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must lie in \[0, 1\)"),
        ({"max_bad_fraction": -0.1}, r"max_bad_fraction=-0.1 must lie in \[0, 1\)"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"validation_tokens": 1}, "validation_tokens=1 must be at least 2, or none"),
        (
            {"validation_tokens": 9, "validation": ("a",)},
            "validation_tokens holds out a part of",
        ),
        ({"synthetic_rows": 0}, "synthetic_rows=0 must be at least 1"),
    ],
)
def test_an_invalid_field_is_named_in_the_error(config, fields, message):
    with pytest.raises(ConfigError, match=rf"data\.{message}"):
        changed(config, **fields)


def test_a_source_that_cannot_be_opened_is_named_with_its_field(config, tokenizer):
    with pytest.raises(DataError, match=r"data\.train: 'nowhere.txt' does not exist"):
        load_text(changed(config, train=("nowhere.txt",)), tokenizer, seed=0)
    with pytest.raises(DataError, match=r"data\.validation: 'nowhere.txt' does not exist"):
        load_text(changed(config, validation=("nowhere.txt",)), tokenizer, seed=0)


def test_a_source_without_usable_text_reports_its_first_bad_row(config, tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match=r"data.train=.*binary.txt.*no usable text; .*binary.txt:1: .*UTF-8"):
        list(text_documents(changed(config, train=(str(tmp_path / "binary.txt"),)), seed=0))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"data.train=.*empty.txt.*no usable text"):
        list(text_documents(changed(config, train=(str(tmp_path / "empty.txt"),)), seed=0))
