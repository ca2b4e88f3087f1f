"""Instructions, answers and preferences by local models: rows that SFT, reward models and DPO train on.

    python experiments/synthesize.py --config=configs/synthesize.py --workdir=sets/mine \
        --config.answers.model=runs/sft --config.judge.model=runs/reward

WORKDIR gets sft.jsonl (the best answer to each instruction), preferences.jsonl (the best and the worst), and
README.md, their card. The same command again resumes; other filters are applied to the rows that are there.
docs/how-to/synthesize.md has the choices.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Magpie: 1,000 instructions that a chat model samples itself, with 4 answers each."""
    config = ConfigDict()
    config.seed = 0
    config.rows = 1000  # to write, before the filters; 0, of a pipeline: none
    config.block_rows = 64  # written together; what a kill interrupts is written again
    config.decode_batch_size = 64  # completions decoded together
    config.dtype = config_dict.placeholder(str)  # float32, bfloat16; none: bfloat16, on CPUs as trained
    config.server_requests = 8  # to a server at a time

    # magpie: what the model writes as its user, which it must have been trained on (data.loss_on=all);
    # self_instruct: new tasks like some of `seeds`; evolve: harder or rarer versions of `seeds` and of what
    # was evolved before; file: the instructions of `seeds` as they are
    config.instructions = ConfigDict()
    config.instructions.source = "magpie"
    config.instructions.model = config_dict.placeholder(str)  # as answers.model; none: that model
    config.instructions.seeds = ()  # rows with `prompt` or `messages`, of one turn
    config.instructions.rename = ()  # THEIRS=OURS for columns of `seeds`, such as instruction=prompt
    config.instructions.examples = 8  # tasks that a prompt of self_instruct shows
    config.instructions.length = (8, 2000)  # characters, at least and at most; others are not answered
    config.instructions.sampling = sampling(temperature=1.0, max_new_tokens=256)

    # A run folder, RUN/best, a Hugging Face folder, or a server: http://HOST:PORT/v1, or .../v1#MODEL
    config.answers = ConfigDict()
    config.answers.model = config_dict.placeholder(str)
    config.answers.per_instruction = 4
    config.answers.sampling = sampling(temperature=0.8, max_new_tokens=512)

    # reward_model: a run of one; rubric: a chat model scores each answer from 1 to 10, and compares best and
    # worst in both orders; none: the first answer that passes the filters, and no preferences
    config.judge = ConfigDict()
    config.judge.kind = "reward_model"
    config.judge.model = config_dict.placeholder(str)  # rubric: as answers.model; none: that model
    config.judge.normalize = True  # rewards in standard deviations of the reward model's validation set
    config.judge.rubric = (
        "You grade answers of an assistant. A good answer does what the instruction asks, is correct and "
        "complete, and has nothing beside the point."
    )
    config.judge.sampling = sampling(temperature=0.0, max_new_tokens=64)

    config.filters = ConfigDict()
    config.filters.must_end = True  # drop answers that were cut off, without a stop token
    config.filters.answer_length = (1, 4000)  # characters, at least and at most
    config.filters.refusals = (  # drop answers that have one of these in their first 100 characters
        "I cannot",
        "I can't",
        "I'm sorry",
        "I am sorry",
        "I am not able to",
        "As an AI",
    )
    config.filters.copies = True  # drop answers that repeat the instruction
    config.filters.min_score = config_dict.placeholder(float)  # of the best answer; none: any
    config.filters.min_margin = 0.0  # between the scores of a pair
    # Jaccard similarity of 3-word shingles from which an instruction counts as one before it; needs the extra
    # synthesize. none: only instructions that are equal but for case and blanks.
    config.filters.near_duplicates = 0.7
    config.filters.evaluation_sets = ()  # files or other sources that no row may overlap with
    config.filters.overlap_words = 13  # in a row are an overlap; a shorter instruction is one as a whole
    return config


def sampling(*, temperature: float, max_new_tokens: int) -> ConfigDict:
    """As in configs/base/reinforcement.py: without filters."""
    return ConfigDict(
        {
            "temperature": temperature,  # 0: greedy
            "top_k": config_dict.placeholder(int),
            "top_p": config_dict.placeholder(float),
            "min_p": config_dict.placeholder(float),
            "max_new_tokens": max_new_tokens,
        }
    )
