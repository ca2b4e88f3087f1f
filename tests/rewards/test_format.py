import pytest

from jaxllm.rewards.format import format


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>2 + 2</think><answer>4</answer>", 1.0),
        ("\n<think>2 +\n2</think>\n\n<answer>\n4</answer>  ", 1.0),
        ("", 0.0),
        ("<think>2 + 2</think>", 0.0),
        ("<answer>4</answer>", 0.0),
        ("<answer>4</answer><think>2 + 2</think>", 0.0),
        ("Well, <think>2 + 2</think><answer>4</answer>", 0.0),
        ("<think>2 + 2</think> so <answer>4</answer>", 0.0),
        ("<think>2 + 2</think><answer>4</answer> done", 0.0),
        ("<think>2 + 2</think><answer>4", 0.0),
        ("<think>2 + 2<answer>4</answer></think>", 0.0),
        ("<think>2 + 2</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think><think>2 + 2</think><answer>4</answer>", 0.0),
        ("<think>2 + 2</think><think>2</think><answer>4</answer>", 0.0),
        ("<Think>2 + 2</Think><answer>4</answer>", 0.0),
        ("<think>2 + 2</think><answer> </answer>", 0.0),
        ("<think>2 + 2</think><answer></answer>", 0.0),
        ("<think>\n\n</think><answer>4</answer>", 0.0),
    ],
)
def test_each_tag_once_in_order_and_nothing_else(completion, score):
    assert format({}, completion) == score


def test_tags_can_be_changed():
    assert format({}, "<a+b>1</a+b> <c>2</c>", tags=("a+b", "c")) == 1.0
    assert format({}, "<think>1</think><answer>2</answer>", tags=("a+b", "c")) == 0.0
