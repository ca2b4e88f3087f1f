"""experiments/report.py on a run or a pipeline: complete, from JSON alone, with generated text escaped."""

import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments import report as script
from jaxllm.command_line import runs_as_flags
from jaxllm.config import load_config, parse, run_script
from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig, flops_per_token
from jaxllm.report import write_report
from jaxllm.report.document import duration, number, with_error
from jaxllm.report.runs import read_run
from jaxllm.report.sections import wrap_command
from jaxllm.stages import find_stage

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>alert(1)</script> | `a` *b* & "c"\n</dd><img src=x onerror=alert(1)>\x1b[31m'
ROWS = [
    {"step": 0, "eval/loss": 6.25, "eval/loss_se": 0.0125},
    {"step": 10, "train/loss": 5.5, "train/tokens": 1280.0, "perf/step_time": 0.5},
    {"step": 20, "train/loss": 3.5, "train/tokens": 2560.0, "perf/step_time": 0.25}
    | {"eval/loss": 3.8765, "eval/loss_se": 0.0314, "eval/bits_per_byte": None},
]
GATES = [
    {"name": "text", "claim": "beats a trigram", "measured": 0.5246, "standard_error": 0.008, "needed": 1.06}
    | {"passed": True, "says": "0.525 bits"},
    {"name": "dpo", "claim": "the score rises", "measured": 0.1, "standard_error": 0.066, "needed": 0.198}
    | {"passed": False, "says": "+0.10 ± 0.07"},
]
SHOWN = {
    "prompts": ["What is an LLM?"],
    "answers": [
        {"name": "random", "kind": "untrained", "texts": [HOSTILE]},
        {"name": "sft", "kind": "fine-tuned", "texts": ["A language model."]},
    ],
}


def config(stage="pretrain", **changes):
    values = json.loads(load_config(f"{ROOT / 'configs' / 'pretrain_text.py'}:tiny").to_json())
    return values | {"stage": stage} | changes


def write_run(folder, values, rows=ROWS, parent=None):
    folder.mkdir(parents=True)
    start = {
        "command": f"python train.py --workdir={folder.name}",
        "git": "f" * 40,
        "versions": {"jax": "1.2"},
    }
    start["devices"] = {"kind": "abacus", "count": 3}
    fingerprints = {"data": "d" * 32, "tokenizer": "e" * 32}
    record = {"id": f"id-{folder.name}", "parent": parent, "fingerprints": fingerprints, "starts": [start]}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "mine", config())


@pytest.fixture
def pipeline(tmp_path):
    """A folder of two stages, the second initialized from the first, and the gates."""
    folder = tmp_path / "quick"
    write_run(folder / "pretrain", config())
    parent = {"path": str(folder / "pretrain" / "checkpoints" / "20"), "hash": "a" * 32}
    write_run(folder / "sft", config("sft", seed=5), parent=parent)
    stages = [
        {"name": "pretrain", "workdir": "pretrain", "parent": None, "command": "python train.py --a"}
        | {"seconds": 61.0, "peak_memory_bytes": 9e8},
        {"name": "sft", "workdir": "sft", "parent": "pretrain", "command": "python train.py --b"}
        | {"seconds": 100.0, "peak_memory_bytes": 1.5e9},
        {"name": "gates", "workdir": "gates", "parent": None, "command": "python gates.py", "seconds": 9.0},
    ]
    whole = {"seed": 0, "command": "python pipeline.py", "seconds": 170.0, "peak_memory_bytes": 1.5e9}
    (folder / "pipeline.json").write_text(json.dumps(whole | {"stages": stages}))
    (folder / "gates.json").write_text(json.dumps({"passed": False, "gates": GATES}))
    (folder / "shown.json").write_text(json.dumps(SHOWN))
    return folder


class Page(HTMLParser):
    """The page as a browser parses it: tags with their attributes, text, and the cells of each row."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.rows, self.in_cell = [], [], [], False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(self.words)


def report(*folders, output=None):
    """The page, its source and the Markdown."""
    source = write_report(folders, output or folders[0]).read_text()
    return Page(source), source, ((output or folders[0]) / "report.md").read_text()


def test_generated_text_is_escaped(pipeline):
    page, _, markdown = report(pipeline)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE.replace("\x1b", "") in page.words  # all except the control character
    (shown,) = (line for line in markdown.splitlines() if "alert(1)" in line)
    assert shown == (
        '| random (untrained) | \\<script\\>alert(1)\\</script\\> \\| \\`a\\` \\*b\\* &amp; "c"<br>'
        "\\</dd\\>\\<img src=x onerror=alert(1)\\>\\[31m |"
    )


def test_the_page_loads_no_external_resource(pipeline):
    page, source, _ = report(pipeline)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags
    assert re.findall(r"https?:|//\w|@import|\bsrc=", source.replace("src=x onerror", "")) == []
    assert {tag for tag, _ in page.tags if tag in ("link", "script", "iframe", "object", "img")} == set()
    links = [value for _, each in page.tags for name, value in each.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)


def test_pictures_share_no_ids_and_take_their_colors_from_the_page(pipeline):
    page, source, _ = report(pipeline)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2  # a loss for each stage
    pictures = "".join(re.findall("<svg.*?</svg>", source, re.DOTALL))
    assert "var(--series-0)" in pictures
    assert "<style" not in pictures  # it would apply to the whole page
    assert re.findall(r": #[0-9a-f]{3,6}", pictures) == []
    used = {attributes["href"][1:] for tag, attributes in page.tags if tag == "use"}
    assert used <= set(ids)


def test_metrics_and_cost_are_those_of_the_run(run):
    page, _, markdown = report(run)
    figures = ["Loss", "nats per token", "eval/loss", "6.250 ± 0.013", "3.877 ± 0.031"]
    assert [*figures, "3.877 ± 0.031 (step 20)"] in page.rows
    each = flops_per_token(
        parse(ModelConfig, config()["model"], "model"), config()["data"]["sequence_length"]
    )
    cost = ["mine", "20", "–", "2,560", f"{2560 * each:.2e}", "8 s", "–"]  # 10 steps of 0.5 s, 10 of 0.25 s
    assert cost in page.rows
    for row in ([*figures, "3.877 ± 0.031 (step 20)"], cost):
        assert f"| {' | '.join(row)} |" in markdown


def test_parameters_and_flops_are_of_all_models_that_train(tmp_path):
    found = {}
    length = config()["data"]["sequence_length"]
    rollout = {"rollout": {"sampling": {"max_new_tokens": length // 4}}}  # the head is on these alone
    for stage, changes in {"pretrain": {}, "reward_model": {}, "ppo": rollout}.items():
        folder = write_run(tmp_path / stage, config(stage, **changes))
        for step in (9, 10):  # the newest counts
            checkpoint = folder / "checkpoints" / str(step)
            checkpoint.mkdir(parents=True)
            shapes = {"params/a": f"float32[2,{step}]", "params/b": "float32[]", "opt_state/a": "float32[7]"}
            (checkpoint / "arrays.json").write_text(json.dumps(shapes))
        found[stage] = read_run(folder, stage)
    assert found["ppo"].parameters == 21
    model = config()["model"]
    head = 6 * model["width"] * model["vocab_size"] * found["ppo"].tokens
    shape = parse(ModelConfig, model, "model")
    reward_model = flops_per_token(shape, length, unembedded=0.0, last_block=0.0)
    assert found["reward_model"].flops == found["ppo"].tokens * reward_model
    assert found["ppo"].flops == pytest.approx(2 * (found["pretrain"].flops - head) + head / 4)


@pytest.mark.parametrize("stage", sorted(path.stem for path in (ROOT / "jaxllm/stages").glob("[!_]*.py")))
def test_each_stage_has_panels(stage):
    assert find_stage(stage).panels


def test_a_run_of_an_unknown_stage_shows_its_loss(tmp_path):
    page, _, _ = report(write_run(tmp_path / "mine", config("distillation")))
    assert ["Loss", "", "eval/loss", "6.250 ± 0.013", "3.877 ± 0.031", "3.877 ± 0.031 (step 20)"] in page.rows


def test_the_report_on_a_pipeline_has_verdict_gates_cost_and_commands(pipeline):
    page, _, markdown = report(pipeline)
    for text in (page.text, markdown):
        assert "1 of 2 gates failed. dpo: +0.10 ± 0.07." in text
        assert "python train.py --b" in text
        assert "Incomplete" not in text
    assert ["text", "passed", "0.5246 ± 0.0080", "1.06", "beats a trigram", "0.525 bits"] in page.rows
    costs = {row[0]: row[5:] for row in page.rows if len(row) == 7}
    assert costs["pretrain"] == ["1 min 1 s", "900 MB"]
    assert costs["gates"] == ["9 s", "–"]
    assert costs["total"] == ["2 min 50 s", "1.50 GB"]


def test_lineage_shows_parent_data_code_and_changed_settings(pipeline):
    page, _, _ = report(pipeline)
    known = ["dddddddddddd", "eeeeeeeeeeee"]
    assert ["pretrain", "id-pretrain", "random weights", "–", *known, "0", "f" * 12] in page.rows
    assert ["sft", "id-sft", "pretrain, step 20", "a" * 12, *known, "5", "f" * 12] in page.rows
    changed = [["setting", "pretrain", "sft"], ["stage", "pretrain", "sft"], ["seed", "0", "5"]]
    assert page.rows[-3:] == changed
    assert "Versions: jax 1.2" in page.text


@pytest.mark.parametrize(
    ("passed", "verdict"),
    [
        ([True, True], "2 of 2 gates passed."),
        ([True, None], "1 of 2 gates passed. 1 could not be measured."),
        ([False, None], "1 of 2 gates failed. text: 0.525 bits. 1 could not be measured."),
    ],
)
def test_the_verdict_counts_what_was_measured(pipeline, passed, verdict):
    gates = [gate | {"passed": each} for gate, each in zip(GATES, passed, strict=True)]
    (pipeline / "gates.json").write_text(json.dumps({"gates": gates}))
    page, _, _ = report(pipeline)
    assert verdict in page.words


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pipeline.json", "quick/pipeline.json"),
        ("gates.json", "quick/gates.json"),
        ("shown.json", "quick/shown.json"),
        ("sft/config.json", "sft/config.json"),
        ("sft/metrics.jsonl", "sft/metrics.jsonl"),
        ("sft/run.json", "sft/run.json"),
    ],
)
@pytest.mark.parametrize(
    "content", [None, "", '{"gates": [', "[]", '{"stages": 3, "gates": 3, "prompts": 3}']
)
def test_missing_or_truncated_files_are_named_and_the_rest_is_shown(pipeline, file, message, content):
    if content is None:
        (pipeline / file).unlink()
    else:
        (pipeline / file).write_text(content)
    page, _, markdown = report(pipeline)
    for heading in ("Curves", "Cost", "Lineage", "Commands"):
        assert heading in page.words
    if content != '{"stages": 3, "gates": 3, "prompts": 3}':  # readable, only without the expected content
        assert re.search(f"Incomplete: .*{re.escape(message)} ", page.text)
        assert message in markdown
    assert ("A language model." in page.words) == (file != "shown.json")
    assert ("beats a trigram" in page.text) == (file != "gates.json")
    assert "id-pretrain" in page.text


def test_unfinished_stages_are_shown(pipeline):
    facts = json.loads((pipeline / "pipeline.json").read_text())
    facts["stages"] = facts["stages"][:1]
    (pipeline / "pipeline.json").write_text(json.dumps(facts))
    page, _, _ = report(pipeline)
    assert "stage sft has not finished" in page.text
    assert "id-sft" in page.text
    shutil.rmtree(pipeline / "pretrain")
    page, _, _ = report(pipeline)
    assert "pretrain/run.json is missing" in page.text


def test_a_pipeline_that_has_just_started_is_shown(pipeline):
    for file in ("pipeline.json", "gates.json", "shown.json"):
        (pipeline / file).unlink()
    (pipeline / "lock").touch()
    page, _, _ = report(pipeline)
    assert "stage pretrain has not finished" in page.text


def test_old_folders_are_shown_under_todays_names(tmp_path):
    folder = tmp_path / "old"
    entries = []
    for name, stage, parent, section, field in (
        ("sft", "sft", "pretrain", "data", {"learn": "assistant"}),
        ("worked", "sft", "sft", "data", {"learn": "last"}),
        ("grpo", "grpo", "worked", "rollout", {"prompts": 4}),
    ):
        values = config(stage)
        write_run(folder / name, values | {section: values.get(section, {}) | field})
        entries.append({"name": name, "workdir": name, "parent": parent, "command": f"python {name}"})
    (folder / "pipeline.json").write_text(json.dumps({"stages": entries}))
    page, _, _ = report(folder)
    headings = "sft", "sft_reasoning (sft)", "grpo"
    assert all(heading in page.words for heading in headings)
    assert ["data.loss_on", "assistant", "last"] in page.rows
    assert ["rollout.num_prompts", "–", "4"] in page.rows
    assert not {"worked", "data.learn", "rollout.prompts"} & {row[0] for row in page.rows}


def test_a_config_of_a_newer_version_is_named(run):
    (run / "config.json").write_text(json.dumps(config() | {"version": 99}))
    page, _, _ = report(run)
    assert "Incomplete: mine/config.json cannot be read: config.json has version 99" in page.text


def test_completions_of_the_first_and_last_evaluation_are_shown(run):
    (run / "evals").mkdir()
    for step, text in ((0, "seven"), (9, "eight"), (10, "nine")):
        row = {"prompt": "4 + 5?", "completion": text, "reward": step / 10}
        (run / "evals" / f"{step}.jsonl").write_text(json.dumps(row) + '\n{"cut')
    page, _, _ = report(run)
    assert page.text.count("4 + 5?") == 1
    assert "seven" in page.words
    assert "nine" in page.words
    assert "eight" not in page.words


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package_gives_the_pip_command(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = r"^the report needs matplotlib and scipy: pip install 'jaxllm\[plot\]'$"
    with pytest.raises(ConfigError, match=message):
        report(run)


def test_commands_are_wrapped_without_changing_them():
    command = f"python 'a script.py' --text='it is' {' '.join(f'--config.field{i}=value' for i in range(9))}"
    lines = wrap_command(command).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 100
    assert shlex.split(wrap_command(command).replace("\\\n", "")) == shlex.split(command)
    assert wrap_command("it's") == "it's"


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.5246, 0.0080, "0.5246 ± 0.0080"),
        (12345.6, 78.9, "12,346 ± 79"),
        (0.6931, 5e-18, "0.6931 ± 0"),
        (1.0, 0.0, "1 ± 0"),
        (0.000123, 0.000789, "0.00012 ± 0.00079"),
        (0.25, None, "0.25"),
        (None, 0.1, "–"),
    ],
)
def test_a_standard_error_has_two_significant_digits(value, error, shown):
    assert with_error(value, error) == shown


def test_other_numbers_are_rounded():
    assert [number(x) for x in (3.14159, 1e-5, 984448, 12345.6, True, "x")] == [
        "3.142",
        "1e-05",
        "984,448",
        "12,346",
        "True",
        "x",
    ]
    assert [duration(x) for x in (59.4, 61, 3720, None)] == ["59 s", "1 min 1 s", "1 h 2 min", "–"]


def test_the_script_takes_folders_and_prints_where_the_report_is(run, run_process):
    code, output, errors = run_process("report.py", "mine", "--output", "there")
    assert (code, output, errors) == (0, "there/report.html\n", "")
    assert (run.parent / "there" / "report.md").exists()


def run_report(*flags):
    return run_script(script.main, None, script.define_flags, runs_as_flags(["report.py", *flags]))


def test_the_report_is_written_into_the_folder_of_one_run_and_beside_several(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    write_run(run.parent / "other", config())
    assert run_report("mine") == run_report("mine", "--run=other") == 0
    assert capsys.readouterr().out.splitlines() == [f"{run}/report.html", "report/report.html"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["empty"], "is not a run folder: it has neither run.json nor pipeline.json"),
        (["mine", "nowhere"], "nowhere is not a run folder"),
        (["."], "nor pipeline.json; it contains mine"),
        (["mine", "mine"], "the same folder is given twice"),
        (["mine", "--output=mine/run.json"], "mine/run.json: "),
        (["--config=x"], "unknown flag"),
        ([], "no run given; pass one or more folders"),
    ],
)
def test_other_arguments_give_one_line_that_names_the_error(run, monkeypatch, capsys, flags, message):
    (run.parent / "empty").mkdir()
    monkeypatch.chdir(run.parent)
    assert run_report(*flags) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
