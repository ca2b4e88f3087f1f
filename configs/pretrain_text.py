"""Pretrain on your own text. The dial is the model's size; everything else follows and can be changed.

    python experiments/train.py --config=configs/pretrain_text.py:1m --workdir=runs/pretrained \
        --config.data.train=input.txt

On 2 CPU cores `1m` takes about 3 minutes; `10m` is for a good laptop and half an hour, `60m` and `124m`
are for a GPU (add --config.model.compute_dtype=bfloat16 --config.model.attention=cudnn), the larger
shapes for a mesh (--config.mesh.fsdp=-1).
"""

from ml_collections import ConfigDict, config_dict

from configs.base.models import model

# steps, sequences a step, tokens a sequence, learning rate
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
    config.stage = "pretrain"  # a module of jaxllm/stages
    config.seed = 0  # of the initial weights, the order of the data and the samples
    config.model = model(size)
    steps, batch_size, sequence_length, learning_rate = RECIPES[size]
    config.training = ConfigDict({"steps": steps})
    count = config.training.get_ref("steps")  # what is derived from it follows an override

    config.objective = ConfigDict()
    config.objective.z_loss = 0.0  # weight of logsumexp(logits)^2; 1e-4 keeps large models steady (PaLM)

    config.tokenizer = ConfigDict()
    config.tokenizer.path = config_dict.placeholder(
        str
    )  # a sentencepiece .model; None trains one on the text
    config.tokenizer.vocab_size = config.model.get_ref("vocab_size")  # a smaller text gets fewer
    config.tokenizer.train_bytes = 20_000_000  # of text to train it on

    config.data = ConfigDict()
    # Files (.txt .jsonl, also .gz, .parquet), globs, folders saved by datasets, hf:NAME, or synthetic.
    config.data.train = ("synthetic",)
    config.data.weights = ()  # one a source, to mix them; () takes all of their windows
    config.data.validation = ()  # sources; () holds out a part of train
    config.data.validation_fraction = 0.1
    config.data.text_key = "text"  # column or JSON key of the text
    config.data.synthetic_rows = 20_000  # how many the source "synthetic" writes
    config.data.sequence_length = sequence_length  # tokens
    config.data.batch_size = batch_size  # sequences an optimizer step, over all devices
    config.data.on_bad_row = "stop"  # or "skip": write it to bad_rows.jsonl and continue
    config.data.max_bad_fraction = 0.01  # more bad rows than this stop the run even so
    config.data.cache_dir = "~/.cache/jaxllm"  # tokenised text, kept between runs

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # or "adamw"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.schedule = "wsd"  # "cosine", "linear", "wsd" or "constant", after the warm-up
    config.optimizer.warmup_steps = count // 20
    config.optimizer.decay_fraction = 0.6  # wsd: share of the steps in the final decay
    config.optimizer.final_learning_rate = 0.02  # as a fraction of the peak
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_pattern = "kernel$|table$"  # matrices decay, norms and biases do not
    config.optimizer.clip_norm = 1.0  # None: no clipping
    config.optimizer.muon_momentum = 0.95
    config.optimizer.trainable = ""  # regular expression: train only parameters with it in their path

    config.mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    config.mesh.data = -1  # copies of the model
    config.mesh.fsdp = 1  # parameters split, gathered when used
    config.mesh.tensor = 1  # heads and hidden units split

    config.training.evaluate_at_start = True  # score and sample random weights too, as step 0
    config.training.num_microbatches = 1  # more: less memory, the same gradient
    config.training.log_every = 10
    config.training.evaluate_every = (count + 4) // 5  # 0 is never, for all of these
    config.training.sample_every = (count + 4) // 5
    config.training.checkpoint_every = (count + 4) // 5
    config.training.patience = 0  # evaluations without a better checkpoint.best_metric that end the run
    config.training.target = config_dict.placeholder(float)  # a checkpoint.best_metric that ends the run
    config.training.max_bad_steps = 20  # steps in a row without a finite gradient that end the run
    config.training.hang_timeout = 1800.0  # seconds without a step that end the run

    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 3  # the newest so many
    config.checkpoint.best_metric = config_dict.placeholder(str)  # such as "eval/loss": kept as WORKDIR/best
    config.checkpoint.best_is = "lowest"  # or "highest"

    config.evaluation = ConfigDict()
    config.evaluation.max_rows = 500  # of the held-out windows, from their start; None: all

    config.sample = ConfigDict()
    config.sample.prompts = ("",)  # what to continue; "" starts a document
    config.sample.sampling = ConfigDict()
    config.sample.sampling.max_new_tokens = 100
    config.sample.sampling.temperature = 0.8  # 0 is greedy
    config.sample.sampling.top_k = config_dict.placeholder(int)  # None switches a filter off
    config.sample.sampling.top_p = config_dict.placeholder(float)
    config.sample.sampling.min_p = config_dict.placeholder(float)

    config.wandb_project = config_dict.placeholder(str)  # also log to Weights & Biases
    return config
