"""A whole synthesis: rows in blocks, then the filters, and the files that stages train on."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.config import as_dict, check_local, differences, first_few
from jaxllm.config_versions import stamped, upgrade
from jaxllm.errors import ConfigError, Stopped
from jaxllm.files import to_json, write_file
from jaxllm.random_streams import SYNTHESIS, stream
from jaxllm.synthesize.card import card, counts
from jaxllm.synthesize.config import SynthesizeConfig, is_server
from jaxllm.synthesize.filters import Kept, Overlaps, check_near_duplicates, select
from jaxllm.synthesize.instructions import Instructor, read_seeds
from jaxllm.synthesize.judge import Judge, NoJudge, RewardJudge, RubricJudge
from jaxllm.synthesize.raw_rows import RawRows, Row
from jaxllm.synthesize.server import ServerWriter
from jaxllm.synthesize.writers import Check, LocalWriter, Writer
from jaxllm.training.watchdog import StopRequested, Watchdog
from jaxllm.training.workdir import held

# What may change for rows that are there: how many there are, and which of them are kept.
MAY_DIFFER = ("rows", "filters", "server_requests")
MOST_SEEDS = 1000  # to grow instructions from


class Synthesis:
    """The models of a config, and the rows that they write. A row is a function of the config, its number
    and, where instructions are grown, of the rows in the blocks before."""

    def __init__(self, config: SynthesizeConfig):
        """Raises ConfigError and DataError for all that is wrong, before anything is compiled."""
        self.config = config
        source, size = config.instructions.source, config.block_rows
        needed = {
            "magpie": 0,
            "evolve": 1,
            "self_instruct": config.instructions.examples,
            "file": config.rows,
        }
        most = -(-config.rows // size) * size if source == "file" else MOST_SEEDS
        seeds = []
        if source != "magpie":
            seeds = read_seeds(config.instructions, needed=needed[source], most=most, seed=config.seed)
        writers: dict[str, Writer] = {}

        def writer(path: str | None, field: str) -> Writer:
            assert path is not None
            if path not in writers:
                if is_server(path):
                    writers[path] = ServerWriter(path, field, requests=config.server_requests)
                else:
                    writers[path] = LocalWriter(
                        path, field, dtype=config.dtype, decode_batch_size=config.decode_batch_size
                    )
            return writers[path]

        self.judge: Judge = NoJudge()
        if config.judge.kind == "reward_model":
            self.judge = RewardJudge(config.judge, dtype=config.dtype)
        self.answers = writer(config.answers.model, "answers.model")
        self.models = {"instructions": {}, "answers": self.answers.identity}
        asker = None
        if source != "file":
            asker = writer(config.instructions_model, "instructions.model")
            self.models["instructions"] = asker.identity
        if config.judge.kind == "rubric":
            self.judge = RubricJudge(config.judge, writer(config.judge_model, "judge.model"))
        self.models["judge"] = self.judge.identity
        self.instruct = Instructor(config.instructions, asker, seeds, config.seed)

    def block(self, first: int, before: Sequence[Row], check: Check) -> list[Row]:
        """The rows from `first` on of a whole block, so that all blocks compute the same shapes."""
        config = self.config
        rows = range(first, first + config.block_rows)
        base = stream(jax.random.key(config.seed), SYNTHESIS)
        # Each row's own key gives those of its instruction, its answers and its judge.
        keys = jax.vmap(
            lambda row: jax.random.split(jax.random.fold_in(base, row), config.answers.per_instruction + 2)
        )(np.arange(rows.start, rows.stop))
        earlier = [row["instruction"] for row in before if row["problem"] is None]
        made: list[Row] = []
        for i, each in zip(rows, self.instruct(rows, earlier, keys[:, 0], check), strict=True):
            origin = {} if each.made_from is None else {"made_from": each.made_from}
            problem = each.problem or self.answers.problem(
                question(each.text), config.answers.sampling.max_new_tokens
            )
            made.append({"row": i, "instruction": each.text, **origin, "problem": problem, "answers": []})
        answered = [i for i, row in enumerate(made) if row["problem"] is None]
        if answered:
            self.answer([made[i] for i in answered], keys[np.array(answered), 1:], check)
        return made

    def answer(self, rows: Sequence[Row], keys: jax.Array, check: Check) -> None:
        """Put scored answers into rows; keys [rows, answers + 1]."""
        number, instructions = self.config.answers.per_instruction, [row["instruction"] for row in rows]
        written = self.answers.complete(
            [question(text) for text in instructions],
            group_size=number,
            sampling=self.config.answers.sampling,
            keys=keys[:, :-1].reshape(-1),
            check=check,
        )
        groups = [written[i * number : (i + 1) * number] for i in range(len(rows))]
        texts = [[each.text for each in group] for group in groups]
        judged = self.judge(instructions, texts, keys[:, -1], check)
        for row, group, result in zip(rows, groups, judged, strict=True):
            scored = zip(group, result.scores, strict=True)
            row["answers"] = [{**each._asdict(), "score": score} for each, score in scored]
            if result.verdicts is not None:
                row.update(compared=result.compared, verdicts=result.verdicts)


def question(instruction: str) -> list[dict[str, str]]:
    """The conversation that asks it."""
    return [{"role": "user", "content": instruction}]


def synthesize(config: SynthesizeConfig, workdir: str, *, command: Sequence[str]) -> None:
    """Write the rows that are missing in `workdir`, then the files of those that the filters keep.

    Raises Stopped after a signal: the same command resumes, and writes what it would have written.
    """
    config.check_models()
    check_local(workdir, "--workdir")
    folder = Path(workdir).expanduser().absolute()
    check_near_duplicates(config.filters.near_duplicates)
    overlaps = Overlaps(config.filters.evaluation_sets, config.filters.overlap_words, seed=config.seed)
    with held(folder, "another process writes"), Watchdog(folder, 0) as watchdog:
        check_unchanged(folder, config, None)
        raw = RawRows(folder / "rows.jsonl")
        synthesis = Synthesis(config)
        check_unchanged(folder, config, synthesis.models)
        write_file(folder / "config.json", to_json(stamped(as_dict(config) | {"models": synthesis.models})))
        began = time.perf_counter()
        done, size = len(raw.rows), config.block_rows
        print(f"resumed at row {done}" if done else "fresh set", flush=True)
        progress = Progress(done, config.rows)
        try:
            for first in range(done // size * size, config.rows, size):
                rows = synthesis.block(first, raw.rows[:first], watchdog.check)
                raw.append(rows[len(raw.rows) - first : config.rows - first])
                progress.show(len(raw.rows))
        except StopRequested:
            again = shlex.join(command)
            raise Stopped(f"{len(raw.rows)} of {config.rows} rows are written; resume with {again}") from None
        finally:
            progress.close()
        finish(folder, config, synthesis.models, raw.rows[: config.rows], overlaps)
        seconds = time.perf_counter() - began
        if written := len(raw.rows) - done:
            print(f"{written} rows in {seconds:.0f} s, {60 * written / seconds:.0f} rows a minute")


def check_unchanged(folder: Path, config: SynthesizeConfig, models: dict[str, Any] | None) -> None:
    """ConfigError where the folder holds rows of another config or, where they are given, of other models."""
    file = folder / "config.json"
    if not file.exists():
        if (folder / "rows.jsonl").exists():
            raise ConfigError(f"--workdir={folder}: rows.jsonl has no config.json beside it")
        return
    try:
        saved = upgrade(json.loads(file.read_bytes()))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if (before := saved.pop("models", None)) is None:
        raise ConfigError(f"--workdir={folder} holds a training run, no synthesized set: choose another")
    found = [each for each in differences(saved, as_dict(config)) if not each.is_in(MAY_DIFFER)]
    found += differences(before, models, "models") if models else []
    if found:
        raise ConfigError(
            f"--workdir={folder} has rows of another config: {first_few(found)}; choose another --workdir"
        )


class Progress:
    """A progress bar with rows a minute on a terminal, a line for every block elsewhere."""

    def __init__(self, done: int, rows: int):
        self.start, self.rows, self.began, self.bar = done, rows, time.perf_counter(), None
        if sys.stderr.isatty():
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} rows [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=rows, initial=min(done, rows), bar_format=form, dynamic_ncols=True)

    def show(self, done: int) -> None:
        """So many rows are written."""
        minutes = (time.perf_counter() - self.began) / 60
        rate = (done - self.start) / minutes
        if self.bar is not None:
            self.bar.set_postfix_str(f"{rate:.0f} rows/min", refresh=False)
            self.bar.update(done - self.bar.n)
        else:
            print(f"row {done}/{self.rows}  {rate:.0f} rows/min", flush=True)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


def finish(
    folder: Path, config: SynthesizeConfig, models: dict[str, Any], rows: list[Row], overlaps: Overlaps
) -> None:
    """Filter the rows, and write sft.jsonl, preferences.jsonl, report.json and the card."""
    found = select(rows, config.filters, judged=config.judge.kind != "none", overlaps=overlaps)
    report = {"models": models, **counts(rows, found)}
    sft, preferences = [], []
    for kept in found.kept:
        answers, origin = kept.row["answers"], provenance(config, models, kept)
        asked, best = kept.row["instruction"], answers[kept.best]["text"]
        messages = [*question(asked), {"role": "assistant", "content": best}]
        sft.append({"messages": messages, "provenance": origin})
        if kept.worst is not None:
            pair = {"prompt": asked, "chosen": best, "rejected": answers[kept.worst]["text"]}
            preferences.append({**pair, "provenance": origin})
    for name, made in (("sft.jsonl", sft), ("preferences.jsonl", preferences)):
        write_file(folder / name, "".join(json.dumps(row) + "\n" for row in made).encode())
    write_file(folder / "report.json", to_json(report))
    write_file(folder / "README.md", card(config, report, found).encode())
    for name, reasons in (("answers", found.answers), ("rows", found.rows)):
        dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"{name}: {report[name]} written, {reasons.total()} dropped{dropped and f' ({dropped})'}")
    if not sft:
        print("note: no row is kept: change what the counts above name, such as sampling.max_new_tokens")
    print(
        f"{len(sft)} rows in sft.jsonl, {len(preferences)} pairs in preferences.jsonl: see {folder}/README.md"
    )


def provenance(config: SynthesizeConfig, models: dict[str, Any], kept: Kept) -> dict[str, Any]:
    """Where a row comes from."""
    values, row = as_dict(config), kept.row
    return {
        "row": row["row"],
        "seed": config.seed,
        "instruction": {"source": config.instructions.source, **models["instructions"]}
        | ({} if config.instructions.source == "file" else {"sampling": values["instructions"]["sampling"]})
        | ({"made_from": row["made_from"]} if "made_from" in row else {}),
        "answer": {**models["answers"], "sampling": values["answers"]["sampling"]},
        "judge": {"kind": config.judge.kind, **models["judge"]},
        "scores": [answer["score"] for answer in row["answers"]],
        "chosen": kept.best,
        "rejected": kept.worst,
        **({"verdicts": row["verdicts"]} if "verdicts" in row else {}),
    }
