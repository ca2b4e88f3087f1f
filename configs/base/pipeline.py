"""What the pipelines share: a whole run of each stage, and data, seed and gates for all of them."""

from ml_collections import ConfigDict

from configs import (
    dpo_pairs,
    grpo_problems,
    ppo_preferences,
    pretrain_text,
    reward_model_pairs,
    sft_chat,
)


def base(size: str) -> ConfigDict:
    """A pipeline of models of this size on the synthetic world."""
    config = ConfigDict()
    config.seed = 0  # of every stage, and of the synthetic world

    # What each stage trains on; validation is a part of it, prompt by prompt.
    config.data = ConfigDict()
    config.data.text = ("synthetic:documents",)
    config.data.chats = ("synthetic:chats", "synthetic:drafts")
    config.data.pairs = ("synthetic:preferences",)
    config.data.solutions = ("synthetic:problems",)  # problems with worked solutions, in `completion`
    config.data.problems = ("synthetic:problems",)  # with what the reward reads

    config.pretrain = pretrain_text.get_config(size)
    config.sft = sft_chat.get_config(size)
    config.reward_model = reward_model_pairs.get_config(size)
    config.ppo = ppo_preferences.get_config(size)
    config.dpo = dpo_pairs.get_config(size)
    config.sft_reasoning = sft_chat.get_config(size)
    config.grpo = grpo_problems.get_config(size)
    # One model and one mesh for all of them.
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
        config[stage].data.train = config.data.get_ref(source)

    config.sft_reasoning.data.rename = ("working=completion",)

    config.gates = ConfigDict()  # what must be reached; a gate that the data cannot measure is skipped
    config.gates.must_pass = True  # a failed gate fails the command
    config.gates.prompts = ("synthetic:preferences",)  # held out; with `reference`, for the rubric
    config.gates.max_rows = 1000
    config.gates.max_new_tokens = 100
    config.gates.shown = (
        "What is an LLM?",
        "What is a bridge?",
        "What is rain?",
        "What is 37 + 25?",
        "How much is 58 + 16? Show your working.",
        "Thank you for your help.",
    )
    config.gates.text_share = 0.75  # of a trigram's bits per byte, at most
    config.gates.answer_rise = 0.1  # of the share of right answers, from pretraining to SFT
    config.gates.reward_ceiling = 0.9  # accuracy that label noise allows
    config.gates.reward_share = 0.4  # of the way from 0.5 to the ceiling, at least
    config.gates.preference_errors = 3.0  # standard errors by which the rubric's score must rise
    config.gates.kl_limit = 10.0  # nats an answer from SFT, at most
    config.gates.pass_rise = 0.2  # of held-out pass@1
    config.gates.errors = 5.0  # standard errors by which everything else must differ

    config.expected_seconds = ConfigDict(dict.fromkeys((*sources, "gates"), 0.0))  # 0: not known
    return config


def on_public_data(config: ConfigDict) -> None:
    """Text, conversations, pairs and problems from the hub, with the lengths they need."""
    config.data.text = ("hf:HuggingFaceFW/fineweb-edu:sample-10BT",)
    config.data.chats = ("hf:HuggingFaceTB/smoltalk:all",)
    config.data.pairs = ("hf:trl-lib/ultrafeedback_binarized",)
    config.data.solutions = config.data.problems = ("hf:openai/gsm8k:main",)
    config.sft_reasoning.data.rename = ("question=prompt", "answer=completion")
    config.grpo.data.rename = ("question=prompt",)  # the reward reads `answer`, after its ####
    config.gates.prompts = ("hf:trl-lib/ultrafeedback_binarized::test",)
    config.gates.max_new_tokens = 512
    config.gates.reward_ceiling = 0.8  # what published reward models reach on such pairs

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
    """The pipeline, or for experiments/train.py the run of one of its stages."""
    return config[stage] if stage else config
