"""What a rater chose is on disk once it is acknowledged, and stays theirs; pairs go to as many as wanted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxllm.serve.board import ComparisonQueue, Comparison, Refused, agreement
from jaxllm.serve.preferences import PreferenceFile
from jaxllm.data.preferences import pair
from jaxllm.errors import DataError

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
def open_board(path):
    """(raters_per_pair=1, prompts=()) -> a board on the file, as after a start; the one before is closed."""
    opened = []

    def open_board(raters_per_pair=1, prompts=()):
        close()
        opened.append(PreferenceFile(path))
        return ComparisonQueue(opened[-1], prompts, raters_per_pair)

    def close():
        while opened:
            opened.pop().close()

    yield open_board
    close()


def filled(board, count):
    for i in range(count):
        board.add(comparison(f"Number {i}?"), from_prompts=False)
    return board


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge(board, rater, choice):
    """Let a rater choose one of the answers by its text, "tie" or "bad"."""
    offer = board.offer(rater)
    chosen = choice if choice in ("tie", "bad") else [choice in text for text in offer.answers].index(True)
    board.choose(offer.id, rater, chosen)
    return offer


def test_a_row_says_all_there_is_and_a_reward_model_reads_the_choice(open_board, path):
    board = filled(open_board(), 20)
    for _ in range(20):
        judge(board, "ann", "Yes")
    orders = set()
    for row in read(path):
        _, asked, chosen, rejected = pair(row)
        assert asked == row["prompt"]
        assert ("Yes" in chosen["content"], "No" in rejected["content"]) == (True, True)
        # What belongs to an answer stands where the answer does.
        by_answer = zip(row["answers"], row["seeds"], row["checkpoints"], strict=True)
        assert {("Yes" in text, seed, made["path"]) for text, seed, made in by_answer} == {
            (True, 5, "a"),
            (False, 6, "b"),
        }
        assert row["rater"] == "ann"
        assert row["sampling"] == {"temperature": 1.0}
        assert row["time"].endswith("+00:00")
        orders.add(row["choice"])
    assert orders == {0, 1}, "the order is random"


def test_a_pair_goes_to_as_many_raters_as_wanted_and_to_each_once(open_board):
    board = filled(open_board(raters_per_pair=2), 3)
    first = [board.offer(rater).comparison.id for rater in ("ann", "bob", "cem")]
    assert first[0] == first[1] != first[2]
    assert board.offer("ann").comparison.id == first[0], "the same until it is judged"
    seen = {rater: [] for rater in ("ann", "bob", "cem")}
    for rater in [*seen] * 3:
        if board.offer(rater):
            seen[rater].append(judge(board, rater, "Yes").comparison.id)
    judged = [id for ids in seen.values() for id in ids]
    assert sorted(map(judged.count, set(judged))) == [2, 2, 2]
    assert all(len(ids) == len(set(ids)) for ids in seen.values())


def test_who_left_without_a_choice_is_not_waited_for(open_board, monkeypatch):
    board = filled(open_board(), 1)
    assert board.offer("ann")
    assert board.offer("bob") is None
    monkeypatch.setattr("jaxllm.serve.board.LEASE", 0.0)
    assert board.offer("bob").comparison is board.offer("ann").comparison


def test_an_id_is_taken_once(open_board, path):
    board = filled(open_board(), 2)
    offer = board.offer("ann")
    board.choose(offer.id, "ann", 0)
    board.choose(offer.id, "ann", 0)  # the acknowledgement was lost
    for rater, choice in (("ann", 1), ("bob", 0)):
        with pytest.raises(Refused, match="made here already"):
            board.choose(offer.id, rater, choice)
    with pytest.raises(Refused, match="not open any more"):
        board.choose("no such id", "ann", 0)
    open_board().choose(offer.id, "ann", 0)
    assert len(read(path)) == 1


def test_undo_takes_the_raters_own_last_row_out_of_the_file(open_board, path):
    board = filled(open_board(), 4)
    mine = [judge(board, "ann", "Yes"), judge(board, "ann", "No")]
    judge(board, "bob", "tie")
    with path.open("a") as file:
        file.write('{"prompt": "From", "chosen": "another", "rejected": "hand"}\n')
    board.choose(board.offer("ann").id, "ann", "bad")
    board.undo("ann")
    again = board.undo("ann")
    assert again.answers == mine[1].answers
    assert again.id != mine[1].id
    rows = read(path)
    assert [row.get("rater") for row in rows] == ["ann", "bob", None]
    board.choose(again.id, "ann", 0)
    assert board.progress("ann")["mine"] == 2
    with pytest.raises(Refused, match="no choice of yours"):
        board.undo("eve")


def test_a_start_goes_on_where_the_file_ends(open_board):
    prompts = [prompt(f"Number {i}?") for i in (0, 1, 2, 2)]
    board = open_board(2, prompts)
    assert board.progress("ann")["of"] == 6
    asked = board.take_prompt()
    assert board.progress("ann")["of"] == 6, "one that is being answered counts"
    board.add(comparison(asked[0]["content"]))
    judge(board, "ann", "Yes")
    board = open_board(2, prompts)
    assert board.prompts == prompts[1:3]
    assert board.progress("ann") | {"agreement": None} == {
        "mine": 1, "done": 1, "of": 6, "rows": 1, "agreement": None
    }  # fmt: skip
    assert board.offer("ann") is None
    for _ in range(20):  # shown in another order, it is the same choice
        judge(board, "bob", "Yes")
        assert board.progress("bob")["agreement"]["share"] == 1
        board.undo("bob")
        del board.offers["bob"]


def test_many_raters_at_once_lose_and_mix_nothing(open_board, path):
    board, raters = filled(open_board(raters_per_pair=3), 20), [f"rater {i}" for i in range(12)]

    def work(rater):
        while board.offer(rater):
            judge(board, rater, "Yes" if rater[-1] in "02468" else "No")
            if rater == "rater 3":
                board.undo(rater)
                judge(board, rater, "bad")

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
        ([{"a": 0}, {"b": 1}], (0, None, None)),  # nobody judged the same
        ([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0}], (2, 1.0, 1.0)),
        ([{"a": 0, "b": 0}, {"a": 0, "b": 0}], (2, 1.0, None)),  # always the same says nothing
        # By chance 1/2 would be equal, and 1/2 are.
        ([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0, "b": 1}, {"a": 1, "b": 0}], (4, 0.5, 0.0)),
        # 1 of 3 pairs is equal; shares 4/6, 1/6, 1/6 give chance 18/36.
        ([{"a": 0, "b": 0, "c": "tie"}, {"a": 0, "b": 0, "c": 1}], (2, 1 / 3, -1 / 3)),
    ],
)
def test_agreement_is_the_share_of_equal_choices_and_kappa_what_is_beyond_chance(labels, expected):
    found = agreement(labels)
    assert found["comparisons"] == expected[0]
    assert (found["share"], found["kappa"]) == pytest.approx(expected[1:])


# The file


def test_a_half_written_last_line_is_cut_off_at_the_next_start(open_board, path):
    judge(filled(open_board(), 1), "ann", "Yes")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:70])
    board = open_board()
    assert board.file.cut_off == whole[:70]
    assert path.read_bytes() == whole
    judge(filled(board, 1), "bob", "No")
    assert len(read(path)) == 2


def test_a_whole_last_row_without_its_line_end_stays(open_board, path):
    row = b'{"prompt": "From", "chosen": "another", "rejected": "hand"}'
    path.write_bytes(row)
    board = open_board()
    assert board.file.cut_off == b""
    judge(filled(board, 1), "ann", "Yes")
    assert path.read_bytes().startswith(row + b"\n")
    assert len(read(path)) == 2


def test_undo_keeps_the_link_and_the_mode_of_the_file(open_board, path, tmp_path):
    target = tmp_path / "elsewhere.jsonl"
    target.touch()
    target.chmod(0o664)
    path.symlink_to(target)
    board = filled(open_board(), 1)
    judge(board, "ann", "Yes")
    board.undo("ann")
    assert path.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o664
    judge(board, "ann", "No")
    assert len(read(target)) == 1
    with pytest.raises(DataError, match="another server"):
        PreferenceFile(target)


def test_a_row_edited_by_hand_is_not_taken_back(open_board, path):
    judge(filled(open_board(2), 1), "ann", "Yes")
    judge(open_board(2), "bob", "Yes")
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second.replace('Yes', 'Perhaps')}\n")
    board = open_board(2)
    with pytest.raises(Refused, match="edited"):
        board.undo("bob")
    assert len(read(path)) == 2
    board.undo("ann")
    assert "Perhaps" in read(path)[0]["answers"][read(path)[0]["choice"]]


def test_a_full_disk_is_no_acknowledgement_and_leaves_no_half_line(open_board, path, monkeypatch):
    board = filled(open_board(), 1)
    offer = board.offer("ann")

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            board.choose(offer.id, "ann", 0)
    assert path.read_bytes() == b""
    board.choose(offer.id, "ann", 0)
    assert len(read(path)) == 1


def test_two_servers_do_not_share_a_file(open_board, path, tmp_path):
    open_board()
    with pytest.raises(DataError, match="another server"):
        PreferenceFile(path)
    with pytest.raises(DataError, match="there is no folder"):
        PreferenceFile(tmp_path / "no" / "file.jsonl")


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_serve_board import comparison
from jaxllm.serve.board import ComparisonQueue
from jaxllm.serve.preferences import PreferenceFile
board = ComparisonQueue(PreferenceFile(Path({path!r})), [], 1)
for i in range(10**6):
    board.add(comparison(f"Number {{i}} " + "x" * 10_000), from_prompts=False)
    offer = board.offer("ann")
    board.choose(offer.id, "ann", 0)
    print(offer.id, flush=True)
    if i % 3 == 2:
        print("undo", flush=True)
        board.undo("ann")
        del board.offers["ann"]
        print("undone", flush=True)
"""


def test_killed_in_the_middle_every_acknowledged_row_is_there(path, open_board):
    code = WRITER.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(path))
    for lines in (63, 64):  # after a choice, and in the middle of an undo
        before = [row["id"] for row in open_board().file.rows]
        open_board().file.close()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        said = [process.stdout.readline().strip() for _ in range(lines)]
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read().split()
        process.wait()
        process.stdout.close()
        expected, undoing = list(before), None
        for word in said:
            if word == "undo":
                undoing = expected[-1]
            elif word == "undone":
                expected.remove(undoing)
                undoing = None
            else:
                expected.append(word)
        found = [row["id"] for row in open_board().file.rows]
        if undoing is not None and undoing not in found:
            expected.remove(undoing)
        assert found[: len(expected)] == expected
        assert len(found) <= len(expected) + 1  # one that was written and not yet acknowledged
