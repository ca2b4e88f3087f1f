"""What transformers writes and computes for each family, for tests on machines without it.

    python tests/models/hf/record.py

writes recorded.json: config.json, the names and shapes of the tensors and, with weights that `weights_of`
makes from the names alone, the greedy tokens after two prompts and some logits after the last of them.
"""

import json
import zlib
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).with_name("recorded.json")
PROMPTS = [np.random.default_rng(0).integers(3, 61, length).tolist() for length in (40, 25)]
NEW_TOKENS = 64
MIN_GAP = 2e-4  # between the two highest logits: with less, an error of 1e-4 could choose the token


def weights_of(tensors):
    """A float32 array for each name and shape: about what a trained model has, norms near one."""
    made = {}
    for name, shape in tensors.items():
        noise = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        made[name] = (noise + ("norm" in name or ".ln_" in name) * name.endswith("weight")).astype(np.float32)
    return made


def build(name):
    """(model, names and shapes of its tensors) of a family, by transformers."""
    import torch
    import transformers
    from specs import SPECS, settings

    family, _ = SPECS[name]
    config = getattr(transformers, f"{family}Config")(**settings(name), attn_implementation="eager")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family.removesuffix("Text") + head)(config).eval()
    tied = set(model.all_tied_weights_keys)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if key not in tied}
    weights = {key: torch.tensor(value) for key, value in weights_of(shapes).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model, shapes


def logits_after(model, prompt, greedy):
    """Logits [NEW_TOKENS + 1, V] after the prompt and after each of the tokens that follow it."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + greedy])).logits[0, len(prompt) - 1 :]


def record(name):
    """{"config", "tensors", "greedy", "logits"} of a family."""
    import torch

    model, shapes = build(name)
    written = json.loads(model.config.to_json_string(use_diff=True))
    written["architectures"] = [type(model).__name__]
    found = {"config": written, "tensors": shapes, "greedy": [], "logits": []}
    for prompt in PROMPTS:
        limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None}
        tokens = model.generate(torch.tensor([prompt]), do_sample=False, **limits)
        greedy = tokens[0, len(prompt) :].tolist()
        logits = logits_after(model, prompt, greedy)
        highest = logits[:-1].topk(2).values
        gap = (highest[:, 0] - highest[:, 1]).min().item()
        assert gap > MIN_GAP, f"{name}: greedy tokens are not well-defined, two logits differ by {gap:.1g}"
        found["greedy"].append(greedy)
        found["logits"].append(logits[-1, :8].tolist())
    return found


if __name__ == "__main__":
    from specs import SPECS

    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record(name))}" for name in SPECS)
    RECORDED.write_text(f"{{\n{lines}\n}}\n")
