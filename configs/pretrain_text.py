"""Pretrain on your own text. The argument after the colon is the model's size and selects a recipe for it.

    python experiments/train.py --config=configs/pretrain_text.py:1m --workdir=runs/pretrained \
        --config.data.train=input.txt

Measured as the quickstart's first stage (`configs/quickstart.py:pretrain`: this recipe on built-in text, 2
CPU cores, float32): 0.486 ± 0.007 held-out bits per byte, a trigram has 0.845; 0.478 to 0.511 over four
seeds; 122 s alone, 1.4 GB. On tiny Shakespeare, held-out last tenth: 2.25 ± 0.02 in 176 s
(docs/results.md).

`1m` takes minutes on a laptop, `10m` half an hour on a good one; `60m` and `124m` are for a GPU (add
--config.model.compute_dtype=bfloat16 --config.model.attention=cudnn), larger models for several devices
(--config.mesh.fsdp=-1).
"""

from ml_collections import ConfigDict, config_dict

from configs.base.models import model

# steps, sequences per step, tokens per sequence, learning rate
RECIPES = {
    "tiny": (100, 8, 64, 4e-3),
    "1m": (300, 16, 256, 6e-3),
    "10m": (2000, 32, 256, 4e-3),
    "60m": (10_000, 128, 1024, 2e-3),
    "124m": (20_000, 256, 2048, 1.2e-3),
    "qwen3_0.6b": (50_000, 512, 2048, 6e-4),
    "llama3.2_1b": (50_000, 512, 4096, 4e-4),
    "llama3.1_8b": (100_000, 1024, 4096, 2e-4),
}


def get_config(size: str = "1m") -> ConfigDict:
    """Every field of a pretraining run."""
    config = ConfigDict()
    config.stage = "pretrain"  # a module of jaxllm.stages
    config.seed = 0  # of the initial weights, the data order and the samples
    config.model = model(size)
    steps, batch_size, sequence_length, learning_rate = RECIPES[size]
    config.training = ConfigDict({"steps": steps})
    count = config.training.get_ref("steps")  # a reference: values derived from it follow an override

    config.objective = ConfigDict()
    config.objective.z_loss = 0.0  # weight of logsumexp(logits)^2; 1e-4 stabilizes large models (PaLM)

    config.tokenizer = ConfigDict()
    # A sentencepiece .model or a Hugging Face tokenizer folder; None: train one on the text.
    config.tokenizer.path = config_dict.placeholder(str)
    config.tokenizer.vocab_size = config.model.get_ref("vocab_size")  # fewer on a small text
    config.tokenizer.train_bytes = 20_000_000  # of the text, from its start, to train it on

    config.data = ConfigDict()
    # Files (.txt, .jsonl, .json, .parquet, ...), globs, folders saved by `datasets`, hf:NAME, synthetic.
    config.data.train = ("synthetic",)
    config.data.weights = ()  # one per source, to mix them; (): each source in proportion to its windows
    config.data.validation = ()  # sources; (): hold out a part of train
    config.data.validation_fraction = 0.1  # of the train sources, where `validation` is empty; 0: none
    config.data.validation_tokens = config_dict.placeholder(int)  # this many in place of the fraction
    config.data.held_out = config_dict.placeholder(tuple)  # benchmarks: rows with their questions are dropped
    config.data.text_key = "text"  # column of the text
    config.data.synthetic_rows = 20_000  # documents of the source "synthetic"
    config.data.sequence_length = sequence_length  # tokens
    config.data.batch_size = batch_size  # sequences per optimizer step, over all devices
    config.data.on_bad_row = "stop"  # or "skip": write it to bad_rows.jsonl and continue
    config.data.max_bad_fraction = 0.01  # a larger fraction of bad rows stops the run

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # or "adamw"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.schedule = "wsd"  # or "cosine", "linear", "constant"; wsd: constant, then linear
    config.optimizer.warmup_steps = count // 20
    config.optimizer.decay_fraction = 0.6  # wsd: fraction of the steps in the final decay
    config.optimizer.final_learning_rate = 0.02  # as a fraction of the peak
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_pattern = "kernel$|table$"  # matrices decay, norms and biases do not
    config.optimizer.clip_norm = 1.0  # None: no clipping
    config.optimizer.muon_momentum = 0.95
    config.optimizer.trainable = ""  # regular expression: train only parameters whose path has a match
    # The size at which learning_rate was tuned; this one's rates and initial weights follow (muP). None: not.
    config.optimizer.base_width = config_dict.placeholder(int)
    config.optimizer.base_layers = config_dict.placeholder(int)

    config.mesh = ConfigDict()  # devices along each axis; -1: all that are left
    config.mesh.data = -1  # data parallelism: copies of the model
    config.mesh.fsdp = 1  # parameters split, and gathered where they are used
    config.mesh.tensor = 1  # attention heads and hidden units split
    config.mesh.sequence = 1  # tokens of each row split, for sequences that are long

    config.training.evaluate_at_start = True  # evaluate and sample the initial weights too, as step 0
    # Parts of a batch; more use less memory, the gradient is the same.
    config.training.num_microbatches = 4 if size == "10m" else 1
    config.training.log_every = 10
    config.training.evaluate_every = (count + 4) // 5  # steps; 0 is never, for each of these
    config.training.sample_every = (count + 4) // 5
    config.training.checkpoint_every = (count + 4) // 5
    config.training.patience = 0  # evaluations without a better best_metric after which to stop; 0: never
    config.training.target = config_dict.placeholder(float)  # value of best_metric at which to stop
    config.training.max_bad_steps = 20  # non-finite steps in a row after which the run fails
    config.training.hang_timeout = 1800.0  # seconds without a step after which the run exits; 0: never

    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 3  # newest checkpoints to keep
    config.checkpoint.best_metric = config_dict.placeholder(str)  # "eval/loss": best step in WORKDIR/best
    config.checkpoint.best_is = "lowest"  # or "highest"

    config.evaluation = ConfigDict()
    config.evaluation.max_rows = 500  # held-out windows, the first of each source; None: all
    config.evaluation.num_sources = config_dict.placeholder(int)  # of the first sources alone; None: of all
    config.evaluation.suites = ()  # files of questions to measure (docs/how-to/evaluate.md)
    config.evaluation.suites_every = config_dict.placeholder(int)  # steps; None: training.evaluate_every
    config.evaluation.max_new_tokens = 64  # of completions of a suite's prompts, which are greedy

    config.sample = ConfigDict()
    config.sample.prompts = ("",)  # texts to continue; "": the start of a document
    config.sample.sampling = ConfigDict()
    config.sample.sampling.max_new_tokens = 100
    config.sample.sampling.temperature = 0.8  # 0 is greedy
    config.sample.sampling.top_k = config_dict.placeholder(int)  # None: no such filter
    config.sample.sampling.top_p = config_dict.placeholder(float)
    config.sample.sampling.min_p = config_dict.placeholder(float)

    config.wandb_project = config_dict.placeholder(str)  # also log to Weights & Biases
    config.trackio_project = config_dict.placeholder(str)  # also log to trackio, on this machine's disk
    return config
