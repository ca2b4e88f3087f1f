"""Adapters that PEFT wrote give the same logits here, and those written here the same in PEFT."""

import jax
import numpy as np
import pytest
from specs import SPECS, settings

from jaxllm.config import parse
from jaxllm.models import ModelConfig, build_model, build_scalar_model
from jaxllm.models.hf.peft import save_peft
from jaxllm.runs.checkpoints import read_adapters, read_config, read_policy

torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'jaxllm[parity]'")
transformers = pytest.importorskip("transformers", reason="parity: pip install 'jaxllm[parity]'")
peft = pytest.importorskip("peft", reason="parity needs peft: pip install 'jaxllm[parity]'")

# PEFT asks for what transformers 5.24 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24))
LORA = {"r": 3, "lora_alpha": 9, "init_lora_weights": False}


def base_model(name, head="CausalLM", **changes):
    family, _ = SPECS[name]
    config = getattr(transformers, f"{family}Config")(
        **settings(name) | {"num_hidden_layers": 2} | changes, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}For{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def read(folder, build=build_model):
    config = parse(ModelConfig, read_config(folder)["model"], "model")
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    return config, read_policy(folder, shapes), read_adapters(folder, shapes)


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("llama2", ["q_proj", "v_proj"], {}),
        ("qwen3", "all-linear", {"use_rslora": True}),
        ("gemma3", ["o_proj", "gate_proj", "down_proj"], {}),
        ("phi3", ["qkv_proj", "gate_up_proj"], {}),
    ],
)
def test_logits_are_equal_in_both_directions(name, targets, options, tmp_path):
    base = base_model(name)
    plain = logits_of(base)
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **LORA, **options)
    )
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs.eval())
    config, params, adapters = read(tmp_path / "theirs")
    logits = jax.jit(build_model(config).logits)(params, TOKENS)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    if name == "phi3":  # whose fused layers have adapters together: written by no other
        return
    save_peft(tmp_path / "ours", config.lora, adapters, tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(again), expected, atol=1e-5)


def test_a_reward_model_keeps_its_head(tmp_path):
    base = base_model("llama2")
    base.save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], **LORA)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs.eval())[:, 0]
    config, params, adapters = read(tmp_path / "theirs", build_scalar_model)
    values = build_scalar_model(config).rewards(params, TOKENS, np.array([24, 24])).values
    np.testing.assert_allclose(values, expected, atol=1e-4)
    save_peft(tmp_path / "ours", config.lora, adapters, tmp_path / "base")
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "ours", num_labels=1)
    np.testing.assert_allclose(logits_of(again.eval())[:, 0], expected, atol=1e-5)
