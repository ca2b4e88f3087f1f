"""Random weights written by transformers give the same logits and tokens here, and go back unchanged."""

import json

import jax
import numpy as np
import pytest
from specs import SPECS, settings

from jaxllm.models import build_model, build_scalar_model
from jaxllm.models.hf import load_hf, save_hf
from jaxllm.models.hf.weights import TensorFiles
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig

torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'jaxllm[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers: pip install 'jaxllm[parity]'"
)


def reference(name, head="CausalLM", **changes):
    """A random transformers model with noise on every parameter."""
    family, _ = SPECS[name]
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**settings(name) | changes, attn_implementation="eager")
    head = "LMHeadModel" if (family, head) == ("GPT2", "CausalLM") else f"For{head}"
    torch.manual_seed(0)
    model = getattr(transformers, family.removesuffix("Text") + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokens_of(rows, length, vocab_size=61):
    return np.random.default_rng(0).integers(3, vocab_size, (rows, length))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module", params=list(SPECS))
def folder_and_model(request, tmp_path_factory):
    model = reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def test_logits_equal_those_of_transformers(folder_and_model):
    folder, hf_model = folder_and_model
    config, params = load_hf(folder)
    tokens = tokens_of(2, 64)
    expected = logits_of(hf_model, tokens)
    assert np.std(expected) > 0.5
    logits = jax.jit(build_model(config).logits)(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_an_export_has_the_same_tensors_and_the_same_logits_in_transformers(folder_and_model, tmp_path):
    folder, hf_model = folder_and_model
    save_hf(tmp_path, *load_hf(folder), generation={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    with TensorFiles(folder) as before, TensorFiles(tmp_path) as after:
        common = set(before.slices) & set(after.slices)
        fused = {name for name in before.slices if "qkv_proj" in name or "gate_up_proj" in name}
        assert set(before.slices) - common <= {"lm_head.weight"} | fused  # Phi leaves as a Llama or a Mistral
        for name in common:
            np.testing.assert_array_equal(before.slices[name][:], after.slices[name][:])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = tokens_of(1, 40)
    np.testing.assert_allclose(logits_of(again, tokens), logits_of(hf_model, tokens), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama3.1", "gemma2", "gemma3", "gpt2", "smollm3", "mistral", "phi3", "olmo2"]
)
def test_greedy_tokens_of_padded_prompts_equal_those_of_transformers(name, tmp_path):
    hf_model = reference(name)
    hf_model.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    prompts = [tokens_of(1, length)[0].tolist() for length in (5, 11)]
    sampling = SamplingConfig(0.0, None, None, None, max_new_tokens=64)
    keys = jax.random.split(jax.random.key(0), 2)
    ours = generate(build_model(config), params, prompts, sampling=sampling, stop_ids=(), keys=keys)
    for prompt, completion in zip(prompts, ours.tokens, strict=True):
        with torch.no_grad():
            theirs = hf_model.generate(
                torch.tensor([prompt]),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
            )
        assert list(completion) == theirs[0, len(prompt) :].tolist()


def test_both_dialects_of_config_json_are_the_same_model(tmp_path):
    reference("llama3.1").save_pretrained(tmp_path)
    config, _ = load_hf(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")
    file.write_text(json.dumps(raw))
    assert load_hf(tmp_path)[0] == config


@pytest.mark.parametrize("name", ["llama3.1", "qwen3"])
def test_reward_models_come_in_and_go_out(name, tmp_path):
    hf_model = reference(name, head="SequenceClassification", num_labels=1)
    hf_model.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    tokens = tokens_of(2, 20)
    expected = logits_of(hf_model, tokens)[:, 0]
    rewards = build_scalar_model(config).rewards(params, tokens, np.array([20, 20])).values
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    save_hf(tmp_path / "ours", config, params, generation={"pad_token_id": 0})
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(logits_of(again, tokens)[:, 0], expected, atol=1e-4)
