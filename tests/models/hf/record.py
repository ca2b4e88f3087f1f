"""What transformers writes and computes for each family, for tests on machines without it.

    python tests/models/hf/record.py

writes recorded.json: config.json, the names and shapes of the tensors, and some logits of weights that
`weights_of` makes from the names alone.
"""

import json
import zlib
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).with_name("recorded.json")
TOKENS = np.random.default_rng(0).integers(3, 61, (1, 40))


def weights_of(tensors):
    """A float32 array for each name and shape: about what a trained model has, norms near one."""
    made = {}
    for name, shape in tensors.items():
        noise = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        made[name] = (noise + ("norm" in name or ".ln_" in name) * name.endswith("weight")).astype(np.float32)
    return made


def record():
    """{name: {"config", "tensors", "logits"}} by transformers."""
    import torch
    import transformers
    from specs import SPECS, settings

    found = {}
    for name, (family, _) in SPECS.items():
        config = getattr(transformers, f"{family}Config")(**settings(name), attn_implementation="eager")
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        family = family.removesuffix("Text")
        model = getattr(transformers, family + head)(config).eval()
        tied = set(model.all_tied_weights_keys)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items() if key not in tied}
        weights = {key: torch.tensor(value) for key, value in weights_of(shapes).items()}
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(TOKENS)).logits[0, -1, :8].tolist()
        written = json.loads(config.to_json_string(use_diff=True)) | {"architectures": [family + head]}
        found[name] = {"config": written, "tensors": shapes, "logits": logits}
    return found


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(record(), indent=1) + "\n")
