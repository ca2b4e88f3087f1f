"""pass@k is what drawing k of the answers says on average."""

from itertools import combinations

import numpy as np
import pytest

from jaxllm.evaluation.pass_at_k import pass_at_k

RIGHT = np.tri(7, 6, -1, dtype=bool)[:, ::-1]  # six answers to each of seven prompts, 0 to 6 of them right


@pytest.mark.parametrize("k", range(1, 7))
def test_it_is_the_share_of_all_subsets_with_a_right_answer(k):
    subsets = [list(subset) for subset in combinations(range(6), k)]
    drawn = np.mean([RIGHT[:, subset].any(axis=1) for subset in subsets], axis=0)
    np.testing.assert_allclose(pass_at_k(RIGHT, k), drawn, atol=1e-15)


def test_of_one_answer_it_is_the_mean():
    np.testing.assert_allclose(pass_at_k(RIGHT, 1), RIGHT.mean(axis=1), atol=1e-15)


def test_many_answers_do_not_overflow():
    right = np.arange(20_000) < 2
    assert pass_at_k(right[None], 10_000) == pytest.approx(0.75, abs=1e-4)  # each is drawn half of the times


@pytest.mark.parametrize("k", [1, 2, 3])
def test_answers_that_are_not_known_to_be_right_or_wrong_are_left_out(k):
    known = np.array([True, False, True, False, True, False])
    of_three = [*pass_at_k(RIGHT[:, known], k), np.nan]
    rows = np.vstack([RIGHT, RIGHT[-1]]), np.vstack([np.tile(known, (7, 1)), np.arange(6) < k - 1])
    np.testing.assert_array_equal(pass_at_k(rows[0], k, known=rows[1]), of_three)


@pytest.mark.parametrize("k", [0, 7])
def test_more_draws_than_answers_are_refused(k):
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to the 6 answers there are"):
        pass_at_k(RIGHT, k)
