"""Each row of a source becomes an example, or a line that names the reason why it was dropped."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from example_rows import in_memory

from jaxllm.data.examples import Example, Examples, hold_out
from jaxllm.data.records import Rename
from jaxllm.data.row_cache import Encoder, cached_examples, read_sources
from jaxllm.data.rows import BadRowPolicy, DataConfig, RecordConfig, write_bad_rows
from jaxllm.data.sources import BadRow, Row, Source
from jaxllm.errors import ConfigError, DataError

STOP, SKIP = BadRowPolicy("stop", 0.5), BadRowPolicy("skip", 0.5)


def config(**changes) -> DataConfig:
    defaults = {
        "train": ("a",),
        "weights": (),
        "validation": (),
        "validation_fraction": 0.1,
        "synthetic_rows": 10,
        "sequence_length": 8,
        "batch_size": 2,
        "on_bad_row": "stop",
        "max_bad_fraction": 0.5,
    }
    return DataConfig(**defaults | changes)


numbers = itertools.count()


def source(*values) -> Source:
    def rows():
        for line, value in enumerate(values, 1):
            row = Row(f"a.jsonl:{line}", line, {"word": value})
            yield row.rejected("invalid JSON") if value is None else row

    return Source("a.jsonl", f"hash {next(numbers)}", len(values), rows)  # none is cached


def encode(value) -> Example:
    """A word becomes its letters; "long" is of no use, "wrong" is malformed."""
    if value == "long":
        raise BadRow("longer than a row", fault=False)
    if value == "wrong":
        raise BadRow("wrong type", "a word")
    ids = np.frombuffer(value.encode(), np.uint8).astype(np.int32)
    return Example((ids,), (ids > 0,), group=value, kind="word", numbers=(1.0,))


def words(encode) -> Encoder:
    """An encoder of records of one word."""
    tokenizer = SimpleNamespace(vocab_size=256, hash="letters")
    template = SimpleNamespace(source=None, clock=None)
    return Encoder(lambda record: encode(record["word"]), tokenizer, template)


def records(policy, **changes) -> RecordConfig:
    """A config of such records with this policy."""
    limits = {"on_bad_row": policy.on_bad_row, "max_bad_fraction": policy.max_bad_fraction}
    return RecordConfig(**vars(config(**limits, **changes)), rename=(), template=None)


def read(*values, policy=SKIP, encode=encode, bad_rows=None) -> Examples:
    bad_rows = [] if bad_rows is None else bad_rows
    return cached_examples(source(*values), records(policy), words(encode), Rename(()), bad_rows)


# Bad rows


def test_a_bad_row_stops_the_run_with_file_line_reason_and_fix():
    with pytest.raises(DataError) as error:
        read("one", "wrong", "two", policy=STOP)
    assert str(error.value) == "a.jsonl:2: wrong type (a word); fix the row, or set data.on_bad_row=skip"


def test_a_row_that_the_source_cannot_read_is_bad_too():
    with pytest.raises(DataError, match=r"^a.jsonl:1: invalid JSON; fix the row"):
        read(None, "one", policy=STOP)


def test_reading_stops_at_the_first_bad_row():
    encoded = []

    def encode_some(value):
        encoded.append(value)
        return encode(value)

    with pytest.raises(DataError, match=r"a.jsonl:2: wrong type"):
        read("one", "wrong", "two", policy=STOP, encode=encode_some)
    assert encoded == ["one", "wrong"]


def test_well_formed_rows_that_are_of_no_use_never_stop_a_run():
    found = read("one", "long", "long", "long", policy=BadRowPolicy("stop", 0.0))
    assert found.describe() == (
        "a.jsonl: 4 rows read, 1 kept, 3 dropped (3 longer than a row); formats: 1 [word]; 3 tokens"
    )


def test_skipped_rows_are_counted_by_reason_and_written_to_a_file(tmp_path):
    bad_rows = []
    found = read("one", "wrong", "long", None, "wrong", "two", "three", "four", bad_rows=bad_rows)
    assert str(found.counts) == (
        "8 rows read, 4 kept, 4 dropped (1 invalid JSON, 1 longer than a row, 2 wrong type)"
    )
    write_bad_rows(bad_rows, tmp_path / "run")
    lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [
        ("a.jsonl:2", "wrong type", "a word"),
        ("a.jsonl:3", "longer than a row", ""),
        ("a.jsonl:4", "invalid JSON", ""),
        ("a.jsonl:5", "wrong type", "a word"),
    ]


def test_without_bad_rows_there_is_no_file(tmp_path):
    write_bad_rows(["of a start before\n"], tmp_path)
    write_bad_rows(["", ""], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("on_bad_row", "lines"), [("stop", 1), ("skip", 3)])
def test_bad_rows_that_stop_the_run_are_in_the_file_too(tmp_path, on_bad_row, lines):
    rows = ["good", "wrong", "long", "wrong"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in rows))
    settings = records(BadRowPolicy(on_bad_row, 0.2), train=(str(tmp_path / "rows.jsonl"),))
    with pytest.raises(DataError, match="wrong type"):
        read_sources(settings, words(encode), seed=0, run_folder=tmp_path / "run")
    assert len((tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()) == lines


def test_too_large_a_fraction_of_bad_rows_stops_a_run_that_skips():
    assert len(read("one", "wrong", policy=BadRowPolicy("skip", 0.5)).rows) == 1  # exactly as many as allowed
    with pytest.raises(DataError) as error:
        read("one", "two", "wrong", policy=BadRowPolicy("skip", 0.3))
    assert str(error.value) == (
        "a.jsonl: 1 of 3 rows are bad, more than data.max_bad_fraction=0.3; "
        "fix them or raise it; the first: a.jsonl:3: wrong type (a word)"
    )


def test_a_source_of_bad_rows_stops_the_run_before_it_is_read_to_its_end():
    encoded = []

    def encode_some(value):
        encoded.append(value)
        return encode(value)

    with pytest.raises(DataError, match=r"1000 of 1000 rows are bad"):
        read(*["wrong"] * 5000, encode=encode_some)
    assert len(encoded) == 1000


def test_a_source_without_usable_rows_is_an_error():
    with pytest.raises(DataError, match=r"a.jsonl has no usable row: 2 rows read, 0 kept, 2 dropped"):
        read("long", "long", policy=STOP)


# Fingerprint


def test_the_fingerprint_depends_on_every_token_mask_number_and_group():
    def changed(**changes):
        return read("one", "two", encode=lambda value: encode(value)._replace(**changes)).fingerprint

    ids, loss_mask = (np.arange(3, dtype=np.int32),), (np.array([False, True, True]),)
    known = [
        read("one", "two"),
        read("two", "one"),
        read("one", "two", "two"),
        read("onet", "wo"),
    ]
    found = [each.fingerprint for each in known]
    found += [changed(ids=ids), changed(loss_mask=loss_mask), changed(numbers=(2.0,)), changed(group="a")]
    assert len(set(found)) == len(found)
    assert read("one", "wrong", "two").fingerprint == read("one", "two").fingerprint


# Held out


def examples(count, group=str) -> Examples:
    """`count` rows in as many groups."""
    found = read(*(f"row {i}" for i in range(count)))
    rows = [row._replace(group=group(i)) for i, row in enumerate(found.rows)]
    return Examples("a", in_memory(rows), found.counts, "")


def numbers_of(rows):
    """i of each "row {i}"."""
    return [int(row.ids[0].astype(np.uint8).tobytes().decode().split()[1]) for row in rows]


def test_rows_of_one_group_are_on_one_side_whatever_else_is_read():
    def pairs(i):
        return str(i // 2)

    train, held_out = examples(1000, pairs).split(0.2)
    assert not {i // 2 for i in numbers_of(train)} & {i // 2 for i in numbers_of(held_out)}
    assert 150 < len(held_out) < 250
    fewer = examples(500, pairs).split(0.2)[1]
    assert numbers_of(fewer) == [i for i in numbers_of(held_out) if i < 500]


def test_a_larger_fraction_holds_out_the_same_rows_and_more():
    all_rows = examples(300)
    few, more = (set(numbers_of(all_rows.split(fraction)[1])) for fraction in (0.1, 0.3))
    assert few < more


def test_a_group_with_a_lone_surrogate_can_be_hashed():
    train, _ = examples(1, lambda i: "\ud800").split(0.0)
    assert len(train) == 1


def test_named_validation_sources_are_what_is_validated_on_and_nothing_is_held_out():
    parts = [examples(50), examples(7)]
    train, validation = hold_out(config(validation=("b",)), parts)
    assert [len(rows) for rows in train] == [50]
    assert [len(rows) for rows in validation] == [7]


def test_a_part_of_every_train_source_is_held_out():
    parts = [examples(400), examples(300)]
    train, validation = hold_out(config(train=("a", "b")), parts)
    assert [len(a) + len(b) for a, b in zip(train, validation, strict=True)] == [400, 300]
    assert hold_out(config(validation_fraction=0.0), parts[:1])[1] == []


def test_too_few_rows_to_hold_any_out_is_an_error_with_the_possible_fixes():
    with pytest.raises(
        DataError, match=r"data.validation_fraction=0.001 .* raise it, name a source in data.validation"
    ):
        hold_out(config(validation_fraction=0.001), [examples(3)])


# The config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ()}, "data.train is empty; name at least one source"),
        ({"weights": (0.5, 0.5)}, r"data.weights=\(0.5, 0.5\) must be one positive number for each of the 1"),
        ({"weights": (0.0,)}, r"data.weights=\(0.0,\) must be one positive"),
        ({"on_bad_row": "ignore"}, "data.on_bad_row='ignore' must be 'stop' or 'skip'"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction=1.0 must lie in \[0, 1\)"),
        ({"max_bad_fraction": -0.1}, r"data.max_bad_fraction=-0.1 must lie in \[0, 1\)"),
        ({"synthetic_rows": 0}, "data.synthetic_rows=0 must be at least 1"),
        ({"sequence_length": 0}, "data.sequence_length=0 must be at least 1"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
    ],
)
def test_an_invalid_field_is_named_in_the_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_missing_source_is_named_with_its_field(tmp_path):
    with pytest.raises(DataError, match=r"^data.validation: '.*/none.jsonl' does not exist"):
        config().open(str(tmp_path / "none.jsonl"), "validation", text_key=None, seed=0)


def test_a_synthetic_validation_source_has_validation_fraction_of_the_rows():
    sources = [
        config(synthetic_rows=40).open("synthetic", role, text_key=None, seed=0)
        for role in ("train", "validation")
    ]
    assert [len(list(source.rows())) for source in sources] == [40, 4]
