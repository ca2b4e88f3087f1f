"""What the configs of the later stages share: all of pretraining but its data, objective and samples."""

from ml_collections import ConfigDict, config_dict

from configs import pretrain_text


def base(stage: str, size: str, *, steps: int, batch_size: int, learning_rate: float) -> ConfigDict:
    """A config of pretraining with the fields of this stage still to be filled in."""
    config = pretrain_text.get_config(size)
    for section in ("objective", "data", "sample"):
        del config[section]
    config.stage = stage
    config.training.steps = steps
    config.optimizer.name = "adamw"  # gentle with weights that another optimizer trained
    config.optimizer.learning_rate = learning_rate
    config.optimizer.schedule = "cosine"
    config.optimizer.final_learning_rate = 0.1
    config.optimizer.weight_decay = 0.0  # 0.01 in InstructGPT; too few steps for it to matter

    config.data = ConfigDict()
    # Files (.jsonl, also .gz, .parquet), globs, folders saved by datasets, hf:NAME, or synthetic:KIND.
    config.data.train = ("",)
    config.data.weights = ()  # one a source, to mix them; () takes all of their rows
    config.data.validation = ()  # sources; () holds out a part of train, prompt by prompt
    config.data.validation_fraction = 0.1
    config.data.rename = ()  # "theirs=ours" for columns of other names, such as question=prompt
    config.data.template = config_dict.placeholder(str)  # a Jinja file; None: the tokenizer's own
    config.data.synthetic_rows = 20_000  # how many a synthetic source writes
    config.data.sequence_length = 256  # tokens
    config.data.batch_size = batch_size  # rows an optimizer step, over all devices
    config.data.on_bad_row = "skip"  # write it to bad_rows.jsonl and continue; or "stop"
    config.data.max_bad_fraction = 0.02  # more bad rows than this stop the run even so
    return config
