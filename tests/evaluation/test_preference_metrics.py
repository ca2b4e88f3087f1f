"""Figures of reward models and of DPO, worked out by hand for a few pairs."""

import numpy as np
import pytest

from jaxllm.batches import PairBatch
from jaxllm.evaluation.preference import PairScores, dpo_metrics, fraction, mean, reward_metrics, score_pairs
from jaxllm.losses import bradley_terry_loss, dpo_loss


def pair_scores(scores, lengths, margin=0.0, ref_log_probs=0.0) -> PairScores:
    scores = np.array(scores, float)
    shape = scores.shape
    return PairScores(
        scores,
        np.array(lengths, float),
        np.broadcast_to(np.array(margin, float), shape[:1]),
        np.broadcast_to(np.array(ref_log_probs, float), shape),
    )


FIVE = pair_scores(
    [[2, 1], [0, 1], [3, 3], [5, 1], [1, 0]],  # right, wrong, a tie, right, right
    [[9, 4], [9, 4], [4, 9], [4, 9], [6, 6]],  # the chosen one is longer, longer, shorter, shorter, as long
)


def test_the_accuracy_of_a_reward_model_takes_a_tie_for_wrong():
    found = reward_metrics(FIVE)
    assert found["eval/accuracy"] == pytest.approx(3 / 5)
    assert found["eval/accuracy_se"] == pytest.approx((0.6 * 0.4 / 5) ** 0.5)


def test_accuracy_is_told_apart_by_which_answer_is_longer():
    found = reward_metrics(FIVE)
    assert found["eval/accuracy_longer_chosen"] == pytest.approx(1 / 2)
    assert found["eval/accuracy_shorter_chosen"] == pytest.approx(1 / 2)
    assert found["eval/accuracy_longer_chosen_se"] == pytest.approx((0.25 / 2) ** 0.5)
    all_longer = reward_metrics(pair_scores([[2, 1], [0, 1], [1, 0]], [[2, 1]] * 3))
    assert all_longer["eval/accuracy_longer_chosen"] == pytest.approx(2 / 3)


def test_the_length_baseline_counts_a_tie_as_a_half():
    found = reward_metrics(FIVE)
    hits = np.array([1, 1, 0, 0, 0.5])
    assert found["eval/length_baseline"] == pytest.approx(hits.mean())
    assert found["eval/length_baseline_se"] == pytest.approx(hits.std(ddof=1) / 5**0.5)


def test_margin_loss_and_spread_of_the_rewards():
    found = reward_metrics(FIVE._replace(margin=np.array([0, 0, 0.5, 0, 0])))
    differences = np.array([1, -1, 0, 4, 1])
    assert found["eval/margin"] == pytest.approx(1.0)
    assert found["eval/margin_se"] == pytest.approx(differences.std(ddof=1) / 5**0.5)
    losses = np.log1p(np.exp([-1, 1, 0.5, -4, -1]))
    assert found["eval/loss"] == pytest.approx(losses.mean())
    assert found["eval/loss_se"] == pytest.approx(losses.std(ddof=1) / 5**0.5)
    assert found["eval/reward_mean"] == pytest.approx(17 / 10)
    assert found["eval/reward_std"] == pytest.approx(np.std([2, 1, 0, 1, 3, 3, 5, 1, 1, 0]))


def test_the_loss_is_that_of_training():
    margin = np.array([0.5, 0, 1, 2, 0], np.float32)
    expected, _ = bradley_terry_loss(*FIVE.scores.astype(np.float32).T, margin=margin)
    found = reward_metrics(FIVE._replace(margin=margin))["eval/loss"]
    assert found == pytest.approx(float(expected.mean), rel=1e-6)


def test_where_no_pair_is_of_a_kind_its_accuracy_is_not_a_number():
    found = reward_metrics(pair_scores([[2, 1], [0, 1]], [[1, 2], [2, 2]]))
    assert np.isnan(found["eval/accuracy_longer_chosen"])
    assert np.isnan(found["eval/accuracy_longer_chosen_se"])
    assert found["eval/accuracy_shorter_chosen"] == 1.0


def test_one_pair_has_no_standard_error_of_a_mean():
    found = reward_metrics(pair_scores([[2, 1]], [[1, 2]]))
    assert np.isnan(found["eval/margin_se"])
    assert found["eval/margin"] == 1.0


def test_huge_rewards_have_a_finite_loss():
    assert reward_metrics(pair_scores([[-1e5, 1e5]], [[1, 2]]))["eval/loss"] == pytest.approx(2e5)


def test_standard_errors_cover_the_truth_as_often_as_they_should():
    draw = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(500):
        values = draw.random(200)
        for i, (found, error) in enumerate((fraction(values < 0.3), mean(values))):
            hits[i] += abs(found - (0.3, 0.5)[i]) < 2 * error
    assert ((hits >= 460) & (hits <= 490)).all()  # 95.4% of 500 is 477


# DPO

OPTIONS = {"beta": 0.1, "variant": "sigmoid", "label_smoothing": 0.0, "length_normalized": False}
LOG_PROBS = pair_scores(
    [[-10, -20], [-30, -12], [-7, -7]],
    [[5, 4], [6, 3], [2, 2]],
    ref_log_probs=[[-12, -18], [-25, -12], [-7, -7]],
)


def test_implicit_rewards_are_beta_times_the_gain_over_the_reference():
    found = dpo_metrics(LOG_PROBS, **OPTIONS)
    assert found["eval/rewards/chosen"] == pytest.approx(0.1 * (2 - 5 + 0) / 3)
    assert found["eval/rewards/rejected"] == pytest.approx(0.1 * (-2 + 0 + 0) / 3)
    margins = 0.1 * np.array([4, -5, 0])
    assert found["eval/rewards/margins"] == pytest.approx(margins.mean())
    assert found["eval/rewards/margins_se"] == pytest.approx(margins.std(ddof=1) / 3**0.5)
    assert found["eval/rewards/accuracies"] == pytest.approx(1 / 3)  # a tie is wrong
    assert found["eval/rewards/accuracies_se"] == pytest.approx((2 / 9 / 3) ** 0.5)
    assert found["eval/loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean())


@pytest.mark.parametrize(
    ("variant", "label_smoothing", "length_normalized"),
    [
        ("sigmoid", 0.1, False),
        ("robust", 0.1, False),
        ("ipo", 0.0, True),
        ("ipo", 0.0, False),
        ("sppo", 0.0, False),
    ],
)
def test_every_figure_is_that_of_the_training_loss(variant, label_smoothing, length_normalized):
    options = {"beta": 0.2, "variant": variant, "label_smoothing": label_smoothing}
    lengths = dict(zip(("chosen_length", "rejected_length"), LOG_PROBS.completion_lengths.T, strict=True))
    columns = [*LOG_PROBS.scores.T, *LOG_PROBS.ref_log_probs.T]
    _, expected = dpo_loss(
        *(column.astype(np.float32) for column in columns),
        **options,
        **(lengths if length_normalized else {}),
    )
    found = dpo_metrics(LOG_PROBS, **options, length_normalized=length_normalized)
    assert {name: found[f"eval/{name}"] for name in expected} == pytest.approx(
        {name: float(value.mean) for name, value in expected.items()}, rel=1e-5
    )


def test_a_policy_that_is_its_reference_has_loss_log_2_and_margin_0():
    found = dpo_metrics(LOG_PROBS._replace(ref_log_probs=LOG_PROBS.scores), **OPTIONS)
    assert found["eval/loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert found["eval/rewards/margins"] == found["eval/rewards/accuracies"] == 0


# From batches


def batch(weights, first=0) -> PairBatch:
    """Pairs numbered from `first` on: the number is the first token, and what they are scored by."""
    count = len(weights)
    numbers = np.arange(first, first + count, dtype=np.int32)
    tokens = np.broadcast_to(numbers[:, None, None], (count, 2, 8))
    lengths = np.stack([5 + numbers % 3, 4 + numbers % 2], axis=1).astype(np.int32)
    weights = np.array(weights, np.float32)
    return PairBatch(
        tokens, np.full(count, 2, np.int32), lengths, numbers / 2, weights, 1.0 * tokens[:, :, 0]
    )


def by_number(params, batch):
    return params * batch.tokens[:, :, 0].astype(np.float32) + np.array([0, 1], np.float32)


def test_pairs_without_weight_are_left_out_of_everything():
    batches = [batch([1, 0, 2]), batch([0.5, 0, 0], first=3)]
    found = score_pairs(10.0, batches, by_number, lambda: None)
    np.testing.assert_array_equal(found.scores, [[0, 1], [20, 21], [30, 31]])
    np.testing.assert_array_equal(found.completion_lengths, [[3, 2], [5, 2], [3, 3]])  # without the prompt
    np.testing.assert_array_equal(found.margin, [0, 1, 1.5])
    np.testing.assert_array_equal(found.ref_log_probs, [[0, 0], [2, 2], [3, 3]])
    assert found.scores.dtype == np.float64


def test_check_may_end_it_between_batches():
    scored = []

    def score(params, batch):
        scored.append(batch)
        return by_number(params, batch)

    def check():
        if len(scored) == 2:
            raise KeyError

    with pytest.raises(KeyError):
        score_pairs(1.0, [batch([1])] * 5, score, check)
    assert len(scored) == 2


def test_values_of_one_group_count_once_in_the_standard_error():
    """1, 1 and 0 of one prompt, 0 of another: mean 1/2, sums of deviations 1/2 and -1/2."""
    values, groups = np.array([1.0, 1.0, 0.0, 0.0]), np.array([5, 5, 5, 9])
    assert mean(values, groups) == pytest.approx((0.5, np.sqrt(2 / 1 * (0.25 + 0.25)) / 4))
    assert fraction(values == 1, groups) == pytest.approx(mean(values, groups))
    twice = np.repeat([1.0, 0.0, 3.0], 2)
    assert mean(twice, np.repeat([0, 1, 2], 2)) == pytest.approx(mean(np.array([1.0, 0.0, 3.0])))
    assert np.isnan(mean(values, np.zeros(4, int))[1])


def test_groups_of_one_value_each_change_nothing():
    values = np.array([1.0, 0.0, 3.0])
    assert mean(values, np.array([2, 0, 1])) == mean(values)
    assert fraction(values > 0, np.array([2, 0, 1])) == fraction(values > 0)


def test_pairs_of_one_prompt_count_once():
    repeated = FIVE._replace(prompts=np.array([0, 1, 2, 3, 3]))
    right = np.array([1.0, 0, 0, 1, 1])
    assert reward_metrics(repeated)["eval/accuracy_se"] == pytest.approx(mean(right, repeated.prompts)[1])
    assert reward_metrics(repeated)["eval/accuracy"] == reward_metrics(FIVE)["eval/accuracy"]
