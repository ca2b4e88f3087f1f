"""data.template_options are part of a run's template: its checkpoints, resumptions and children have them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxllm.data.chat_template import load_template
from jaxllm.data.hf_tokenizer import HFTokenizer
from jaxllm.runs.checkpoints import saved_template
from jaxllm.runs.train import run_template, template_files

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

SOURCE = (
    "{% if not thinks %}{{ style }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STAGE = SimpleNamespace(conversational=True)


@pytest.fixture
def tokenizer() -> HFTokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
    }
    return HFTokenizer(files | {"chat_template.jinja": SOURCE.encode()})


def make(tokenizer, options, *, resumes: Path | None = None, parent: Path | None = None):
    """The template of a run, and its prompt as text."""
    config = SimpleNamespace(data=SimpleNamespace(template=None, template_options=options))
    folder = SimpleNamespace(resuming=resumes is not None, path=resumes, record={"clock": None})
    template = run_template(STAGE, config, tokenizer, folder, SimpleNamespace(parent=parent))
    prompt = template.prompt([{"role": "user", "content": "a"}])
    return template, "".join(map(tokenizer.pieces.__getitem__, prompt)).partition("<|user|>")[0]


def save(tokenizer, template, folder: Path) -> Path:
    folder.mkdir()
    for name, content in template_files(tokenizer, template).items():
        (folder / name).write_bytes(content)
    (folder / "metadata.json").write_text("{}")
    return folder


def test_options_are_kept_by_a_run_its_checkpoints_and_its_children(tokenizer, tmp_path, capsys):
    template, prompt = make(tokenizer, ("thinks=false", "style=brief"))
    assert prompt == "brief"
    run = save(tokenizer, template, tmp_path / "run")
    resumed, prompt = make(tokenizer, ("thinks=false", "style=brief"), resumes=run)
    assert (resumed.source, prompt) == (template.source, "brief")
    assert make(tokenizer, (), parent=run)[1] == "brief"
    assert make(tokenizer, ("style=long",), parent=run)[1] == "long"
    assert make(tokenizer, ("thinks=true",), parent=run)[1] == ""
    used = load_template(tokenizer, saved_template(run), None, ["thinks=true"])  # --template_options
    assert used.prompt([{"role": "user", "content": "a"}])[0] == tokenizer.special_ids["<|user|>"]
    assert capsys.readouterr().out == ""


def test_without_options_the_template_is_the_tokenizers(tokenizer):
    template, _ = make(tokenizer, ())
    assert template_files(tokenizer, template) == {}
