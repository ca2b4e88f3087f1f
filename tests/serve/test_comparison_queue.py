"""A choice is on disk once it is acknowledged; each pair goes to as many raters as wanted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxllm.data.preferences import pair
from jaxllm.errors import DataError
from jaxllm.serve.comparison_queue import ChoiceError, Comparison, ComparisonQueue, agreement
from jaxllm.serve.preferences import PreferenceFile

ROOT = Path(__file__).parents[2]


def prompt(text):
    return [{"role": "user", "content": text}]


def comparison(text="Well?"):
    checkpoints = [{"path": "a", "hash": "1"}, {"path": "b", "hash": "2"}]
    return Comparison(
        prompt(text), [f"{text} Yes.", f"{text} No."], [5, 6], checkpoints, {"temperature": 1.0}
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "preferences.jsonl"


@pytest.fixture
def open_queue(path):
    """(raters_per_pair=1, prompts=()) -> a queue on the file, as after a start; closes the one before."""
    opened = []

    def open_queue(raters_per_pair=1, prompts=()):
        close()
        opened.append(PreferenceFile(path))
        return ComparisonQueue(opened[-1], prompts, raters_per_pair)

    def close():
        while opened:
            opened.pop().close()

    yield open_queue
    close()


def filled(queue, count):
    for i in range(count):
        queue.add(comparison(f"Number {i}?"), from_prompts=False)
    return queue


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def choose(queue, rater, choice):
    """A rater chooses the answer that contains the text `choice`, or "tie" or "bad"."""
    offer = queue.offer(rater)
    chosen = choice if choice in ("tie", "bad") else [choice in text for text in offer.answers].index(True)
    queue.choose(offer.id, rater, chosen)
    return offer


def test_a_row_is_complete_and_a_reward_model_reads_the_choice(open_queue, path):
    queue = filled(open_queue(), 20)
    for _ in range(20):
        choose(queue, "ann", "Yes")
    orders = set()
    for row in read(path):
        _, messages, chosen, rejected = pair(row)
        assert messages == row["prompt"]
        assert ("Yes" in chosen["content"], "No" in rejected["content"]) == (True, True)
        # Seeds and checkpoints are in the order of the answers.
        by_answer = zip(row["answers"], row["seeds"], row["checkpoints"], strict=True)
        assert {("Yes" in text, seed, checkpoint["path"]) for text, seed, checkpoint in by_answer} == {
            (True, 5, "a"),
            (False, 6, "b"),
        }
        assert row["rater"] == "ann"
        assert row["sampling"] == {"temperature": 1.0}
        assert row["time"].endswith("+00:00")
        orders.add(row["choice"])
    assert orders == {0, 1}, "the order is random"


def test_a_pair_goes_to_as_many_raters_as_wanted_and_to_each_once(open_queue):
    queue = filled(open_queue(raters_per_pair=2), 3)
    first = [queue.offer(rater).comparison.id for rater in ("ann", "bob", "cem")]
    assert first[0] == first[1] != first[2]
    assert queue.offer("ann").comparison.id == first[0], "the same until a choice is made"
    seen = {rater: [] for rater in ("ann", "bob", "cem")}
    for rater in [*seen] * 3:
        if queue.offer(rater):
            seen[rater].append(choose(queue, rater, "Yes").comparison.id)
    chosen = [id for ids in seen.values() for id in ids]
    assert sorted(map(chosen.count, set(chosen))) == [2, 2, 2]
    assert all(len(ids) == len(set(ids)) for ids in seen.values())


def test_the_pair_of_a_rater_who_left_goes_to_another(open_queue, monkeypatch):
    queue = filled(open_queue(), 1)
    assert queue.offer("ann")
    assert queue.offer("bob") is None
    monkeypatch.setattr("jaxllm.serve.comparison_queue.LEASE", 0.0)
    assert queue.offer("bob").comparison is queue.offer("ann").comparison


def test_an_id_is_recorded_once(open_queue, path):
    queue = filled(open_queue(), 2)
    offer = queue.offer("ann")
    queue.choose(offer.id, "ann", 0)
    queue.choose(offer.id, "ann", 0)  # the acknowledgement was lost
    for rater, choice in (("ann", 1), ("bob", 0)):
        with pytest.raises(ChoiceError, match="already made here"):
            queue.choose(offer.id, rater, choice)
    with pytest.raises(ChoiceError, match="no longer open"):
        queue.choose("no such id", "ann", 0)
    open_queue().choose(offer.id, "ann", 0)
    assert len(read(path)) == 1


def test_undo_removes_the_raters_own_last_row(open_queue, path):
    queue = filled(open_queue(), 4)
    mine = [choose(queue, "ann", "Yes"), choose(queue, "ann", "No")]
    choose(queue, "bob", "tie")
    with path.open("a") as file:
        file.write('{"prompt": "From", "chosen": "another", "rejected": "hand"}\n')
    queue.choose(queue.offer("ann").id, "ann", "bad")
    queue.undo("ann")
    again = queue.undo("ann")
    assert again.answers == mine[1].answers
    assert again.id != mine[1].id
    rows = read(path)
    assert [row.get("rater") for row in rows] == ["ann", "bob", None]
    queue.choose(again.id, "ann", 0)
    assert queue.progress("ann")["mine"] == 2
    with pytest.raises(ChoiceError, match="no choice to undo"):
        queue.undo("eve")


def test_a_start_resumes_from_the_file(open_queue):
    prompts = [prompt(f"Number {i}?") for i in (0, 1, 2, 2)]
    queue = open_queue(2, prompts)
    assert queue.progress("ann")["of"] == 6
    taken = queue.take_prompt()
    assert queue.progress("ann")["of"] == 6, "a prompt in progress counts"
    queue.add(comparison(taken[0]["content"]))
    choose(queue, "ann", "Yes")
    queue = open_queue(2, prompts)
    assert queue.prompts == prompts[1:3]
    assert queue.progress("ann") | {"agreement": None} == {
        "mine": 1, "done": 1, "of": 6, "rows": 1, "agreement": None
    }  # fmt: skip
    assert queue.offer("ann") is None
    for _ in range(20):  # the same choice, whatever the order shown
        choose(queue, "bob", "Yes")
        assert queue.progress("bob")["agreement"]["share"] == 1
        queue.undo("bob")
        del queue.offers["bob"]


def test_many_raters_at_once_lose_and_mix_nothing(open_queue, path):
    queue, raters = filled(open_queue(raters_per_pair=3), 20), [f"rater {i}" for i in range(12)]

    def work(rater):
        while queue.offer(rater):
            choose(queue, rater, "Yes" if rater[-1] in "02468" else "No")
            if rater == "rater 3":
                queue.undo(rater)
                choose(queue, rater, "bad")

    threads = [threading.Thread(target=work, args=(rater,)) for rater in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read(path)
    assert len(rows) == 60
    assert len({(row["comparison"], row["rater"]) for row in rows}) == 60
    for row in rows:
        if row["rater"] == "rater 3":
            assert row["choice"] == "bad"
        else:
            assert ("Yes" in row["answers"][row["choice"]]) == (row["rater"][-1] in "02468")


# Agreement


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], (0, None, None)),
        ([{"a": 0}, {"b": 1}], (0, None, None)),  # no pair with two raters
        ([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0}], (2, 1.0, 1.0)),
        ([{"a": 0, "b": 0}, {"a": 0, "b": 0}], (2, 1.0, None)),  # kappa is undefined without variation
        # 1/2 are equal, as expected by chance.
        ([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0, "b": 1}, {"a": 1, "b": 0}], (4, 0.5, 0.0)),
        # 1 of 3 pairs is equal; the shares 4/6, 1/6, 1/6 give 18/36 by chance.
        ([{"a": 0, "b": 0, "c": "tie"}, {"a": 0, "b": 0, "c": 1}], (2, 1 / 3, -1 / 3)),
    ],
)
def test_agreement_is_the_share_of_equal_choices_and_kappa_corrects_for_chance(labels, expected):
    assert agreement(labels) == pytest.approx(expected)


# The file

# As a server of an earlier version wrote it.
ROW = """{"prompt": [{"role": "user", "content": "Well?"}], "answers": ["Well? No.", "Well? Yes."], \
"choice": 1, "rater": "ann", "seeds": [6, 5], "sampling": {"temperature": 1.0}, \
"checkpoints": [{"path": "b", "hash": "2"}, {"path": "a", "hash": "1"}], \
"time": "2025-11-28T17:23:22+00:00", "comparison": "aB3_-xYz0123", "id": "q"}
"""


def test_a_file_of_an_earlier_version_is_read_and_its_format_kept(open_queue, path):
    path.write_text(ROW)
    queue = open_queue(2, [prompt("Well?"), prompt("And?")])
    assert queue.prompts == [prompt("And?")]
    assert queue.progress("ann")["mine"] == 1
    choose(queue, "bob", "Yes")
    before, after = read(path)
    assert list(after) == list(before)
    assert queue.progress("ann")["agreement"]["share"] == 1
    assert queue.undo("ann").answers == before["answers"]


def test_an_incomplete_last_line_is_removed_at_the_next_start(open_queue, path):
    choose(filled(open_queue(), 1), "ann", "Yes")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:70])
    queue = open_queue()
    assert queue.file.cut_off == whole[:70]
    assert path.read_bytes() == whole
    choose(filled(queue, 1), "bob", "No")
    assert len(read(path)) == 2


def test_a_complete_last_row_without_a_newline_stays(open_queue, path):
    row = b'{"prompt": "From", "chosen": "another", "rejected": "hand"}'
    path.write_bytes(row)
    queue = open_queue()
    assert queue.file.cut_off == b""
    choose(filled(queue, 1), "ann", "Yes")
    assert path.read_bytes().startswith(row + b"\n")
    assert len(read(path)) == 2


def test_undo_keeps_the_link_and_the_mode_of_the_file(open_queue, path, tmp_path):
    target = tmp_path / "elsewhere.jsonl"
    target.touch()
    target.chmod(0o664)
    path.symlink_to(target)
    queue = filled(open_queue(), 1)
    choose(queue, "ann", "Yes")
    queue.undo("ann")
    assert path.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o664
    choose(queue, "ann", "No")
    assert len(read(target)) == 1
    with pytest.raises(DataError, match="another server"):
        PreferenceFile(target)


def test_a_row_edited_by_hand_is_not_undone(open_queue, path):
    choose(filled(open_queue(2), 1), "ann", "Yes")
    choose(open_queue(2), "bob", "Yes")
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second.replace('Yes', 'Perhaps')}\n")
    queue = open_queue(2)
    with pytest.raises(ChoiceError, match="edited"):
        queue.undo("bob")
    assert len(read(path)) == 2
    queue.undo("ann")
    assert "Perhaps" in read(path)[0]["answers"][read(path)[0]["choice"]]


def test_a_full_disk_is_an_error_and_leaves_no_incomplete_line(open_queue, path, monkeypatch):
    queue = filled(open_queue(), 1)
    offer = queue.offer("ann")

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            queue.choose(offer.id, "ann", 0)
    assert path.read_bytes() == b""
    queue.choose(offer.id, "ann", 0)
    assert len(read(path)) == 1


def test_two_servers_do_not_share_a_file(open_queue, path, tmp_path):
    open_queue()
    with pytest.raises(DataError, match="another server"):
        PreferenceFile(path)
    with pytest.raises(DataError, match="does not exist"):
        PreferenceFile(tmp_path / "no" / "file.jsonl")


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_comparison_queue import comparison
from jaxllm.serve.comparison_queue import ComparisonQueue
from jaxllm.serve.preferences import PreferenceFile
queue = ComparisonQueue(PreferenceFile(Path({path!r})), [], 1)
for i in range(10**6):
    queue.add(comparison(f"Number {{i}} " + "x" * 10_000), from_prompts=False)
    offer = queue.offer("ann")
    queue.choose(offer.id, "ann", 0)
    print(offer.id, flush=True)
    if i % 3 == 2:
        print("undo", flush=True)
        queue.undo("ann")
        del queue.offers["ann"]
        print("undone", flush=True)
"""


def test_a_killed_server_loses_no_acknowledged_row(path, open_queue):
    code = WRITER.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path))
    for lines in (63, 64):  # after a choice, and in the middle of an undo
        before = [row["id"] for row in open_queue().file.rows]
        open_queue().file.close()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        words = [process.stdout.readline().strip() for _ in range(lines)]
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        words += process.stdout.read().split()
        process.wait()
        process.stdout.close()
        expected, undoing = list(before), None
        for word in words:
            if word == "undo":
                undoing = expected[-1]
            elif word == "undone":
                expected.remove(undoing)
                undoing = None
            else:
                expected.append(word)
        found = [row["id"] for row in open_queue().file.rows]
        if undoing is not None and undoing not in found:
            expected.remove(undoing)
        assert found[: len(expected)] == expected
        assert len(found) <= len(expected) + 1  # one row may be written and not yet acknowledged
