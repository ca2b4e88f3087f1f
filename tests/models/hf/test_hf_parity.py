"""Random weights written by transformers give the same logits and tokens here, and go back unchanged."""

import json

import jax
import numpy as np
import pytest
from record import PROMPTS, RECORDED, build, logits_after
from specs import SPECS, settings

from jaxllm.models import build_model, build_scalar_model
from jaxllm.models.hf import load_hf, save_hf
from jaxllm.models.hf.weights import TensorFiles

torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'jaxllm[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers: pip install 'jaxllm[parity]'"
)


def reference(name, head="CausalLM", **changes):
    """A random transformers model with noise on every parameter."""
    family, _ = SPECS[name]
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**settings(name) | changes, attn_implementation="eager")
    if head == "CausalLM":
        family = family.removesuffix("Text")
    head = "LMHeadModel" if (family, head) == ("GPT2", "CausalLM") else f"For{head}"
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config).eval()
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


@pytest.mark.parametrize("name", list(SPECS))
def test_what_is_recorded_is_what_transformers_computes(name):
    """By it test_hf_weights.py holds tokens, logits, cache, padding and packing of every family."""
    recorded, (model, shapes) = json.loads(RECORDED.read_text())[name], build(name)
    assert shapes == recorded["tensors"]
    for prompt, greedy, expected in zip(PROMPTS, recorded["greedy"], recorded["logits"], strict=True):
        logits = logits_after(model, prompt, greedy).numpy()
        assert logits[:-1].argmax(-1).tolist() == greedy
        np.testing.assert_allclose(logits[-1, :8], expected, atol=1e-4)


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


def test_the_text_model_of_gemma_3_with_images_is_that_of_transformers(tmp_path):
    text = settings("gemma3") | {"num_hidden_layers": 3}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager"
    )
    torch.manual_seed(0)
    hf_model = transformers.Gemma3ForConditionalGeneration(config).eval()
    hf_model.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    tokens = tokens_of(1, 20)
    logits = jax.jit(build_model(config).logits)(params, tokens)
    np.testing.assert_allclose(logits, logits_of(hf_model, tokens), atol=1e-4)


@pytest.mark.parametrize("name", ["llama3.1", "gemma3"])
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
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [type(hf_model).__name__] == [type(again).__name__]
    np.testing.assert_allclose(logits_of(again, tokens)[:, 0], expected, atol=1e-4)
