"""What the pipelines share: a run of each stage, and their common model, data, seed and gates."""

from ml_collections import ConfigDict

from configs import (
    dpo_pairs,
    grpo_problems,
    ppo_preferences,
    pretrain_text,
    reward_model_pairs,
    sft_chat,
    synthesize,
)
from jaxllm.errors import ConfigError


def base(size: str) -> ConfigDict:
    """A pipeline with a model of this size on built-in synthetic data."""
    config = ConfigDict()
    config.seed = 0  # of every stage and of the synthetic data

    # What each stage trains on. A part is held out for validation, all rows of a prompt together.
    config.data = ConfigDict()
    config.data.text = ("synthetic:documents",)
    config.data.chats = ("synthetic:chats", "synthetic:drafts")
    config.data.pairs = ("synthetic:preferences",)
    config.data.solutions = ("synthetic:problems",)  # problems with worked solutions
    config.data.problems = ("synthetic:problems",)  # problems with the columns that the rewards read

    config.pretrain = pretrain_text.get_config(size)
    config.sft = sft_chat.get_config(size)
    config.reward_model = reward_model_pairs.get_config(size)
    config.ppo = ppo_preferences.get_config(size)
    config.dpo = dpo_pairs.get_config(size)
    config.sft_reasoning = sft_chat.get_config(size)
    config.grpo = grpo_problems.get_config(size)
    # All stages share one model and one mesh.
    config.model, config.mesh = config.pretrain.model, config.pretrain.mesh

    sources = {
        "pretrain": "text",
        "sft": "chats",
        "reward_model": "pairs",
        "ppo": "pairs",
        "dpo": "pairs",
        "sft_reasoning": "solutions",
        "grpo": "problems",
    }
    for stage, source in sources.items():
        config[stage].model, config[stage].mesh = config.model, config.mesh
        config[stage].seed = config.get_oneway_ref("seed")
        config[stage].data.train = config.data.get_oneway_ref(source)

    config.sft_reasoning.data.rename = ("working=completion",)

    # A set that the SFT model writes and the reward model judges. No stage trains on it.
    config.synthesize = synthesize.get_config()
    config.synthesize.rows = 0
    config.synthesize.seed = config.get_oneway_ref("seed")
    config.synthesize.instructions.source = "file"
    config.synthesize.instructions.seeds = config.data.get_oneway_ref("chats")

    config.gates = ConfigDict()  # thresholds; gates that the data cannot measure are skipped
    config.gates.must_pass = True  # exit with an error if a gate fails
    config.gates.prompts = ("synthetic:preferences",)  # held out; the rubric needs their `reference`
    config.gates.max_rows = 1000  # prompts, from the first
    config.gates.max_new_tokens = 100  # per completion
    config.gates.shown = (  # prompts that every model completes for the report
        "What is an LLM?",
        "What is a bridge?",
        "What is rain?",
        "What is 37 + 25?",
        "How much is 58 + 16? Show your working.",
        "Thank you for your help.",
    )
    config.gates.text_share = 0.75  # bits per byte of pretraining / of a trigram model, at most
    config.gates.answer_rise = 0.1  # of the fraction of right answers, pretraining to SFT, at least
    config.gates.reward_ceiling = 0.9  # the highest accuracy that label noise allows
    config.gates.reward_share = 0.4  # of the reward model's way from 0.5 to the ceiling, at least
    config.gates.preference_errors = 3.0  # standard errors by which PPO and DPO must raise the rubric's score
    config.gates.kl_limit = 10.0  # KL of PPO and DPO to SFT, nats per completion, at most
    config.gates.pass_rise = 0.2  # of held-out pass@1 by GRPO, at least
    config.gates.errors = 5.0  # standard errors by which all other gates must be passed

    config.expected_seconds = ConfigDict(dict.fromkeys((*sources, "synthesize", "gates"), 0.0))  # 0: unknown
    return config


def on_public_data(config: ConfigDict) -> None:
    """Use text, conversations, pairs and problems from the Hugging Face Hub, with the lengths they need."""
    config.data.text = ("hf:HuggingFaceFW/fineweb-edu:sample-10BT",)
    config.data.chats = ("hf:HuggingFaceTB/smoltalk:all",)
    config.data.pairs = ("hf:trl-lib/ultrafeedback_binarized",)
    config.data.solutions = config.data.problems = ("hf:openai/gsm8k:main",)
    config.sft_reasoning.data.rename = ("question=prompt", "answer=completion")
    config.grpo.data.rename = ("question=prompt",)  # the reward reads the number after `####` in `answer`
    config.gates.prompts = ("hf:trl-lib/ultrafeedback_binarized::test",)
    config.gates.max_new_tokens = 512
    config.gates.reward_ceiling = 0.8  # the accuracy of published reward models on such pairs

    config.sft.data.sequence_length = 2048
    config.reward_model.data.sequence_length = config.dpo.data.sequence_length = 1024
    config.ppo.data.sequence_length = 1024
    config.ppo.rollout.sampling.max_new_tokens = config.ppo.sample.sampling.max_new_tokens = 512
    config.sft_reasoning.data.sequence_length = 1024
    config.grpo.data.sequence_length = 768
    config.grpo.rollout.sampling.max_new_tokens = config.grpo.sample.sampling.max_new_tokens = 512
    config.grpo.sample.group_size = 4
    config.grpo.evaluation.max_rows = 500


def part(config: ConfigDict, stage: str) -> ConfigDict:
    """The whole pipeline for ""; or the config of one stage, for experiments/train.py, or of `synthesize`."""
    if not stage:
        return config
    parts = [name for name in config if hasattr(config[name], "keys")]
    stages = [name for name in parts if {"stage", "instructions"} & set(config[name].keys())]
    if stage not in stages:
        raise ConfigError(f"no stage {stage!r}: choose one of {', '.join(stages)}")
    return config[stage]
