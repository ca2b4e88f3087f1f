"""What the configs of the later stages share: pretraining's, with other data and optimizer settings."""

from ml_collections import ConfigDict, config_dict

from configs import pretrain_text


def base(stage: str, size: str, *, steps: int, batch_size: int, learning_rate: float) -> ConfigDict:
    """The config of a later stage without its objective, its training data and its samples."""
    config = pretrain_text.get_config(size)
    for section in ("objective", "data", "sample"):
        del config[section]
    config.stage = stage
    config.training.steps = steps
    config.optimizer.name = "adamw"  # or "muon"; the milder choice for weights that another optimizer trained
    config.optimizer.learning_rate = learning_rate
    config.optimizer.schedule = "cosine"
    config.optimizer.final_learning_rate = 0.1
    config.optimizer.weight_decay = 0.0  # 0.01 in InstructGPT; too few steps for it to matter

    config.data = ConfigDict()
    # Files (.jsonl, .json, .parquet, ...), globs, folders saved by `datasets`, hf:NAME or synthetic:KIND.
    config.data.train = ("",)
    config.data.weights = ()  # one per source, to mix them; (): each source in proportion to its rows
    config.data.validation = ()  # sources; (): hold out a part of train, all rows of a prompt together
    config.data.validation_fraction = 0.1  # of the train sources, where `validation` is empty; 0: none
    config.data.held_out = config_dict.placeholder(tuple)  # benchmarks: rows with their questions are dropped
    config.data.rename = ()  # "THEIRS=OURS" for each column with another name, such as "question=prompt"
    config.data.template = config_dict.placeholder(str)  # a Jinja file; None: the tokenizer's own
    config.data.template_options = ()  # "NAME=VALUE" for its variables, such as "enable_thinking=false"
    config.data.synthetic_rows = 20_000  # training rows of a synthetic source
    config.data.sequence_length = 256  # tokens
    config.data.batch_size = batch_size  # rows per optimizer step, over all devices
    config.data.on_bad_row = "skip"  # write it to bad_rows.jsonl and continue; or "stop" at the first one
    config.data.max_bad_fraction = 0.02  # a larger fraction of bad rows stops the run
    return config
