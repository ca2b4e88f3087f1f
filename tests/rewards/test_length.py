from jaxllm.rewards.length import length


def test_the_reward_falls_from_one_to_zero_at_the_limit():
    scores = [length({}, " two  words\n" * pairs, limit=8) for pairs in range(6)]
    assert scores == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
