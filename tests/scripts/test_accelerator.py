"""benchmarks/accelerator.py, in small on the CPU: parts are measured apart, and one that fails is noted."""

import json
import sys

import pytest

from benchmarks import accelerator


def test_parts_fit_into_eight_minutes():
    assert sum(accelerator.LIMITS.values()) <= 480


def test_a_part_that_fails_or_takes_too_long_is_noted_and_the_others_are_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(accelerator.LIMITS, accelerator.decode, 0.01)
    monkeypatch.setitem(accelerator.PARTS, "broken", accelerator.grpo)  # not known to its process
    output = tmp_path / "figures.json"
    parts = ["broken", "decode", "matmul"]
    monkeypatch.setattr(sys, "argv", ["", "--small", f"--output={output}", "--parts", *parts])
    accelerator.main()
    figures = json.loads(output.read_text())
    assert list(figures) == parts
    assert "invalid choice: 'broken'" in figures["broken"]["failed"]
    assert figures["decode"]["failed"] == "took more than 0.01 s"
    assert figures["matmul"]["tflops"] > 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == parts


@pytest.mark.parametrize("platform", accelerator.KERNELS)
def test_configs_of_every_part_ask_for_attention_that_the_platform_has(platform, monkeypatch):
    from jaxllm.models.config import runs_on

    monkeypatch.setattr(accelerator, "platform", lambda: platform)
    for size in ("124m", "llama3.2_1b", "qwen3_0.6b"):
        config = accelerator.configured(f"pretrain_text.py:{size}", **accelerator.on_accelerator(small=False))
        assert runs_on(config.model, platform)
        assert config.model.compute_dtype == "bfloat16"


def test_a_train_step_is_measured_beside_what_was_planned():
    figures = accelerator.attention(small=True)["xla"]
    first, last = figures["loss"]
    assert last < first
    assert figures["grad_norm"] > 0
