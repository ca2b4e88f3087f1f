"""Instruction fine-tuning (SFT) of a pretrained model. The size after the colon is that of this model.

    python experiments/train.py --config=configs/sft_chat.py:1m --workdir=runs/sft \
        --init_from=runs/pretrained --config.data.train=chats.jsonl

Measured as `configs/quickstart.py:sft` (360 steps of 32 x 128 on built-in chats, 2 CPU cores, float32, seed
0): held-out loss 0.455 ± 0.018 nats per token, all of 32 held-out completions end with a stop token; 122 s
alone, 1.3 GB. On 5,000 rows of Alpaca, 400 steps of 8 x 512: 2.77 nats per token (docs/results.md).

Rows are conversations (`messages`, ShareGPT's `conversations`), `prompt` and `completion`, or Alpaca's
`instruction`, `input`, `output`. Chat with the result: python experiments/chat.py --checkpoint=runs/sft
"""

from ml_collections import ConfigDict, config_dict

from configs.base import finetune


def get_config(size: str = "1m") -> ConfigDict:
    """An SFT run: the fields that differ from configs/base/finetune.py."""
    config = finetune.base("sft", size, steps=300, batch_size=16, learning_rate=2e-3)
    config.objective = ConfigDict()
    config.objective.z_loss = 0.0  # weight of logsumexp(logits)^2
    config.objective.neftune_alpha = 0.0  # noise in the embeddings (NEFTune, 2023, with 5); 0: none
    config.objective.dft = False  # weight each token's loss by its probability (Dynamic Fine-Tuning, 2025)

    # To forget less of pretraining, add a source of .txt files or rows of {"text": ...}, and weights.
    config.data.train = ("synthetic:chats",)
    config.data.loss_on = "assistant"  # "last": its last turn only; "all": every token
    config.data.packing = True  # several conversations per row, without attention between them
    config.data.overlong = "drop"  # or "truncate" conversations longer than sequence_length

    config.checkpoint.best_metric = "eval/loss"

    config.sample = ConfigDict()
    config.sample.prompts = ("What is an LLM?",)  # to complete
    config.sample.num_held_out = 32  # held-out prompts to complete, for eval/stopped_fraction
    config.sample.sampling = ConfigDict()
    config.sample.sampling.max_new_tokens = 200
    config.sample.sampling.temperature = 0.0  # greedy
    config.sample.sampling.top_k = config_dict.placeholder(int)
    config.sample.sampling.top_p = config_dict.placeholder(float)
    config.sample.sampling.min_p = config_dict.placeholder(float)
    return config
