"""A model of plain text is prompted with the text itself, by the methods of a chat template."""

import pytest

from jaxllm.data.chat_template import PlainTextTemplate
from jaxllm.errors import ConfigError


def test_a_prompt_is_a_bos_and_the_contents_joined_by_newlines(tokenizer):
    template = PlainTextTemplate(tokenizer)
    messages = [{"role": "system", "content": "Ada"}, {"role": "user", "content": "left the <|end|>"}]
    assert template.prompt(messages) == [tokenizer.bos_id, *tokenizer.encode("Ada\nleft the <|end|>")]


def test_it_stops_at_eos_and_has_no_source(tokenizer):
    template = PlainTextTemplate(tokenizer)
    assert template.stop_ids == (tokenizer.eos_id,)
    assert template.source is None


def test_conversations_cannot_be_encoded(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match="conversations need a chat template"):
        PlainTextTemplate(tokenizer).encode(messages, loss_on="assistant")
