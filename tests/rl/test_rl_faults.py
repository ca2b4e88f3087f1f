"""RL runs with faulty rewards, prompts or completions, and RL runs that a signal stops."""

import os
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rl_runs import arrays_of, make_config, make_policy, rows_of, run

from jaxllm.errors import ConfigError, DataError, Stopped
from jaxllm.rl import rollouts
from jaxllm.rl.hooks import samples_hook

REWARDS = '''
import os, signal, time

calls = 0

def once(name):
    """Whether this is the first time, in any process."""
    try:
        os.close(os.open(f"{__file__}.{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def hangs(example, completion):
    if "boxed" not in completion and once("hung"):  # not in the trial before the run
        time.sleep(60)
    return 1.0

def raises(example, completion):
    raise ValueError("no such luck")

def not_a_number(example, completion):
    return float("nan")

def text(example, completion):
    return "1.0"

def zero(example, completion):
    return 0.0

def nothing(example, completion):
    return None

def two(example, completion):
    return [1.0, 2.0]

def one(example, completion):
    return 1.0

def stops_the_run(example, completion):
    """Stops the run in the 24th call and does not return."""
    global calls
    calls += 1
    if calls == 24 and once("stopped"):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    return len(completion)
'''
NO_STOP = {"stop_ids": ()}
QUIET = {"training__evaluate_every": 0, "training__checkpoint_every": 0, "training__evaluate_at_start": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, and a policy that ends its completions."""
    folder = tmp_path_factory.mktemp("faults")
    make_policy(folder)
    return folder


@pytest.fixture
def rewards(tmp_path):
    """A file of faulty rewards."""
    file = tmp_path / "faulty.py"
    file.write_text(REWARDS)
    return file


def configure(folder, functions, stage="grpo", **changes):
    usual = {"data__train": folder / "prompts.jsonl", "reward__functions": functions}
    if stage == "ppo":
        usual |= {"reward__model": None, "reward__weights": 1.0, "rollout__group_size": 1}
        usual |= {"rollout__num_prompts": 16, "objective__critic_warmup": 0}
    return make_config(stage, **(usual | changes))


def train_run(folder, workdir, *args, **changes):
    return run(configure(folder, *args, **changes), workdir, init_from=folder / "policy")


# Rewards


def test_a_reward_that_fails_is_counted_and_replaced_by_error_reward(folder, rewards, tmp_path, capsys):
    names = ("hangs", "raises", "not_a_number", "text", "nothing")
    changes = {"reward__functions": ",".join(f"{rewards}:{name}" for name in names)}
    changes |= {"reward__weights": "1,1,10,100,1000", "reward__error_reward": -2.0, "reward__time_limit": 0.5}
    rows = rows_of(train_run(folder, tmp_path / "r", None, **changes, **QUIET, training__steps=4))
    for step, timeouts in ((2, 1), (4, 0)):
        row = rows[step]
        assert row["reward/timeouts"] == timeouts
        assert row["reward/errors"] == 3 * 16
        hung = (16 - 3 * timeouts) / 16  # one of 16 rewards is -2 instead of 1
        assert row["reward/hangs"] == pytest.approx(hung)
        assert row["reward/raises"] == row["reward/not_a_number"] == row["reward/text"] == -2
        assert row["reward/nothing"] is None  # None abstains, which is no error
        assert row["reward/mean"] == pytest.approx(hung - 2 * 111)
    shown = [
        line for line in capsys.readouterr().out.splitlines() if "(given reward.error_reward=-2.0)" in line
    ]
    assert sum("reward 'raises': " in line for line in shown) == 1, shown
    assert len(shown) == len(set(shown)) == 4


@pytest.mark.parametrize(("names", "errors"), [(("nothing",), 0), (("nothing", "raises"), 16)])
def test_completions_without_a_reward_train_nothing(folder, rewards, tmp_path, capsys, names, errors):
    changes = QUIET | {"optimizer__weight_decay": 0.1, "objective__entropy_coefficient": 0.1}
    changes |= {"reward__functions": ",".join(f"{rewards}:{name}" for name in names)}
    changes |= {"reward__weights": ",".join("1" for _ in names)}
    row = rows_of(train_run(folder, tmp_path / "r", None, **changes, training__steps=2))[2]
    assert row["reward/mean"] is None
    assert row["reward/errors"] == errors
    assert row["completion/left_out_fraction"] == 1
    assert row["train/skipped_steps"] == 2
    assert arrays_of(tmp_path / "r", "params/") == arrays_of(folder / "policy", "params/")
    assert ("(left out)" in capsys.readouterr().out) == bool(errors)


def test_a_reward_with_several_values_ends_the_run_and_is_named(folder, rewards, tmp_path):
    with pytest.raises(ConfigError, match=r"faulty.py:two': returned a list of 2 values; it must"):
        train_run(folder, tmp_path / "r", f"{rewards}:two", **QUIET)


def test_a_reward_file_that_cannot_be_read_is_an_error_before_anything_is_compiled(folder, tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def reward(example, completion):\n    return (\n")
    with pytest.raises(ConfigError, match=r"broken.py:2: SyntaxError: '\(' was never closed$"):
        train_run(folder, tmp_path / "r", f"{tmp_path}/broken.py:reward")
    assert "compiling" not in capsys.readouterr().out


def test_rewards_that_all_fail_are_an_error_before_anything_is_compiled(folder, rewards, tmp_path, capsys):
    changes = QUIET | {"reward__weights": "1,1"}
    with pytest.raises(ConfigError, match="every call failed, on the first 4 rows: reward 'raises': Val"):
        train_run(folder, tmp_path / "r", f"{rewards}:raises,countdown", **changes)
    assert "compiling" not in capsys.readouterr().out


# Prompts


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(folder, rewards, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text(
        (folder / "prompts.jsonl").read_text() + f'{{"prompt": "{"word " * 40}", "answer": "0"}}\n'
    )
    changes = QUIET | {"data__train": tmp_path / "some.jsonl", "training__steps": 2}
    train_run(folder, tmp_path / "r", f"{rewards}:one", **changes)
    report = capsys.readouterr().out
    assert "61 rows read, 60 kept" in report
    assert "1 dropped (1 longer than data.sequence_length - rollout.sampling.max_new_tokens" in report


def test_prompts_that_are_all_too_long_are_an_error_of_one_line(folder, rewards, tmp_path):
    changes = {"data__sequence_length": 8, "rollout__sampling__max_new_tokens": 6}
    with pytest.raises(
        DataError,
        match=r"has no usable row: .*\(60 longer than data.sequence_length - rollout",
    ) as raised:
        train_run(folder, tmp_path / "r", f"{rewards}:one", **changes)
    assert "\n" not in str(raised.value)


# Completions


def test_one_completion_a_prompt_is_enough_for_reinforce_plus_plus(folder, rewards, tmp_path, capsys):
    changes = {"rollout__group_size": 1, "rollout__num_prompts": 16, "training__steps": 2}
    changes |= QUIET | {"objective__advantage": "reinforce_plus_plus", "reward__weights": "1,1"}
    functions = f"{folder}/mine.py:vowels,{rewards}:zero"
    row = rows_of(train_run(folder, tmp_path / "r", functions, **changes))[2]
    assert row["train/grad_norm"] > 0
    assert "reward 'zero' gave 0 to all 16 completions of the first rollout" in capsys.readouterr().out
    assert "reward/zero_std_fraction" not in row


def test_equal_rewards_give_no_gradient_and_a_warning(folder, rewards, tmp_path, capsys):
    row = rows_of(train_run(folder, tmp_path / "r", f"{rewards}:one", **QUIET, training__steps=2))[2]
    assert row["reward/zero_std_fraction"] == 1
    assert row["train/grad_norm"] == row["train/loss"] == 0
    assert arrays_of(tmp_path / "r", "params/") == arrays_of(folder / "policy", "params/")
    assert "step 2: 100% of the groups have equal rewards" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_masked_truncated_completions_give_no_gradient_and_a_warning(
    folder, tmp_path, capsys, monkeypatch, stage
):
    collect = rollouts.collect
    monkeypatch.setattr(rollouts, "collect", lambda *args, **options: collect(*args, **options | NO_STOP))
    changes = QUIET | {"rollout__mask_truncated": True, "training__steps": 4}
    row = rows_of(train_run(folder, tmp_path / "r", f"{folder}/mine.py:vowels", stage, **changes))[4]
    assert row["completion/truncated_fraction"] == 1
    assert row["train/grad_norm"] == row["train/loss"] == 0
    assert row["completion/left_out_fraction"] == 1
    assert row["train/skipped_steps"] == 4
    prefix = "params/policy/" if stage == "ppo" else "params/"
    assert arrays_of(tmp_path / "r", prefix) == arrays_of(folder / "policy", "params/")
    assert capsys.readouterr().out.count("100% of the completions do not end") == 1


# Signals


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """An uninterrupted run."""
    rewards = tmp_path_factory.mktemp("rewards") / "faulty.py"
    rewards.write_text(REWARDS)
    rewards.with_name("faulty.py.stopped").touch()
    return train_run(folder, rewards.with_name("whole"), f"{rewards}:stops_the_run")


def assert_same(workdir, expected):
    assert rows_of(workdir) == rows_of(expected)
    assert arrays_of(workdir) == arrays_of(expected)
    for file in expected.glob("evals/*"):
        assert (workdir / "evals" / file.name).read_text() == file.read_text()


def test_a_run_stopped_while_a_reward_hangs_resumes_exactly(folder, rewards, tmp_path, uninterrupted):
    changes = {"reward__time_limit": 60.0}
    with pytest.raises(Stopped) as raised:
        train_run(folder, tmp_path / "r", f"{rewards}:stops_the_run", **changes)
    assert raised.value.exit_code == 75
    assert rewards.with_name("faulty.py.stopped").exists()
    assert_same(train_run(folder, tmp_path / "r", f"{rewards}:stops_the_run", **changes), uninterrupted)


@pytest.mark.parametrize(
    "call", [1, 2, 3, 4], ids=["evaluation at the start", "first rollout", "second rollout", "evaluation"]
)
def test_a_run_stopped_while_decoding_resumes_exactly(
    folder, rewards, tmp_path, uninterrupted, monkeypatch, call
):
    calls, collect = [], rollouts.collect

    def interrupted(*args, check, **options):
        calls.append(check)

        def check_late():
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            check()

        return collect(*args, check=check_late, **options)

    monkeypatch.setattr(rollouts, "collect", interrupted)
    rewards.with_name("faulty.py.stopped").touch()
    with pytest.raises(Stopped):
        train_run(folder, tmp_path / "r", f"{rewards}:stops_the_run")
    assert len(calls) == call
    assert_same(train_run(folder, tmp_path / "r", f"{rewards}:stops_the_run"), uninterrupted)


def test_a_table_that_an_interruption_cost_is_said(capsys):
    """A run that resumes repeats the samples of its step, but not the rollout before."""
    config = SimpleNamespace(sample=SimpleNamespace(prompts=()), training=SimpleNamespace(sample_every=4))
    context: Any = SimpleNamespace(program=SimpleNamespace(config=config), template=None, tokenizer=None)
    source: Any = SimpleNamespace(last=None)
    for step in (0, 4):
        assert samples_hook(context, source).run(step, cast(Any, None)) == {}
    assert capsys.readouterr().out.startswith("step 4: samples/ has no table of its rollout")
