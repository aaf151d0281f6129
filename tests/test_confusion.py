"Confusion, distance and posterior matrices: distributions in, distributions out, and errors that say what is wrong."
import numpy as np
import pytest
import torch
from scipy import sparse
from hypothesis import given, strategies as st

from hdfast.confusion import check_confusion, confusion_matrix, distance_matrix, similarity_matrix, sparse_confusion_matrix, posterior_matrix, toy_classes, toy_confusion


@st.composite
def predictions(draw, max_classes=7, max_samples=30):
    "Targets, probabilities and K, where some classes may be absent and some probabilities exactly 0 or tied."
    K, n = draw(st.integers(1, max_classes)), draw(st.integers(1, max_samples))
    targets = np.array(draw(st.lists(st.integers(0, K-1), min_size=n, max_size=n)))
    weights = np.array(draw(st.lists(st.lists(st.integers(0, 4), min_size=K, max_size=K), min_size=n, max_size=n)), dtype=float)
    weights[weights.sum(1) == 0, 0] = 1
    return targets, weights/weights.sum(1, keepdims=True), K


@st.composite
def confusions(draw, max_classes=7):
    K = draw(st.integers(1, max_classes))
    w = np.array(draw(st.lists(st.lists(st.integers(0, 5), min_size=K, max_size=K), min_size=K, max_size=K)), dtype=float)
    w[w.sum(1) == 0, 0] = 1
    return w/w.sum(1, keepdims=True)


# ---- confusion_matrix

@given(predictions(), st.booleans())
def test_rows_are_distributions_in_float64(p, soft):
    targets, probs, K = p
    C = confusion_matrix(targets, probs, K, soft=soft)
    assert C.shape == (K, K) and C.dtype == np.float64
    assert (C >= 0).all() and np.allclose(C.sum(1), 1, rtol=0, atol=1e-12)


@given(predictions())
def test_soft_is_the_mean_probability_of_each_true_class(p):
    targets, probs, K = p
    C = confusion_matrix(targets, probs, K)
    for c in set(targets): assert np.allclose(C[c], probs[targets == c].mean(0), atol=1e-12)


@given(predictions())
def test_hard_is_the_share_of_decisions(p):
    targets, probs, K = p
    C = confusion_matrix(targets, probs, K, soft=False)
    for c in set(targets):
        decided = probs[targets == c].argmax(1)
        assert np.allclose(C[c], [(decided == j).mean() for j in range(K)], atol=1e-12)


@given(predictions(), st.booleans())
def test_an_absent_class_is_never_confused(p, soft):
    targets, probs, K = p
    C = confusion_matrix(targets, np.pad(probs, ((0, 0), (0, 1))), K + 1, soft=soft)
    assert C[K].tolist() == [0]*K + [1]
    for c in set(range(K)) - set(targets): assert C[c].tolist() == np.eye(K + 1)[c].tolist()


@given(predictions(), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(p, soft, random):
    targets, probs, K = p
    order = random.sample(range(len(targets)), len(targets))
    assert np.allclose(confusion_matrix(targets, probs, K, soft), confusion_matrix(targets[order], probs[order], K, soft), atol=1e-12)


def test_hard_and_soft_agree_on_certain_predictions():
    targets, decided = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    probs = np.eye(3)[decided]
    assert np.array_equal(confusion_matrix(targets, probs, 3), confusion_matrix(targets, probs, 3, soft=False))


def test_lists_arrays_and_float32_tensors_give_the_same_matrix():
    targets, probs = [0, 1, 1], [[.5, .5], [.25, .75], [1, 0]]
    want = confusion_matrix(targets, probs, 2)
    assert np.array_equal(confusion_matrix(np.array(targets, np.uint8), np.array(probs), 2), want)
    assert np.array_equal(confusion_matrix(torch.tensor(targets), torch.tensor(probs), 2), want)


def test_float32_softmax_is_accepted_and_gives_a_confusion_matrix():
    probs = torch.randn(400, 100, generator=torch.Generator().manual_seed(0)).mul(20).softmax(1)
    check_confusion(confusion_matrix(torch.arange(400) % 100, probs, 100))


@pytest.mark.parametrize('targets, probs, message', [
    ([0, 1], [[2., -1.], [.5, .5]], 'look like logits'),
    ([0, 1], [[2., 3.], [.5, .5]], 'must sum to 1'),
    ([0, 1], [[np.nan, 1.], [.5, .5]], 'NaN'),
    ([0, 1], [[np.inf, 0.], [.5, .5]], 'infinite'),
    ([0, 1], [[.2, .3, .5], [.2, .3, .5]], r'must be \(2, 2\)'),
    ([0, 1, 1], [[.5, .5], [.5, .5]], r'must be \(3, 2\)'),
    ([0, 2], [[.5, .5], [.5, .5]], r'0\.\.1'),
    ([0, -1], [[.5, .5], [.5, .5]], r'0\.\.1'),
    ([[0, 1]], [[.5, .5]], 'one class id per sample'),
], ids=['logits', 'unnormalised', 'NaN', 'infinite', 'too many classes', 'too few rows', 'target too large', 'target negative', 'targets 2-d'])
def test_bad_predictions_are_refused(targets, probs, message):
    with pytest.raises(ValueError, match=message): confusion_matrix(targets, probs, 2)


def test_logits_of_a_few_classes_are_refused_too():
    with pytest.raises(ValueError, match='sums to 9, more than 1: pass softmax'): sparse_confusion_matrix([([0, 1], [[7., 2.], [.3, .1]], [[0, 1], [1, 0]])], 2)


def test_targets_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match='integer'): confusion_matrix([0., .5], [[.5, .5], [.5, .5]], 2)


# ---- check_confusion, distance_matrix, posterior_matrix

bad_matrices = pytest.mark.parametrize('C, message', [
    ([[40, 10], [5, 45]], 'raw counts'),
    ([[0, 0], [5, 45]], 'raw counts'),
    ([[.5, .4], [.5, .5]], 'row 0 .*sums to 0.9'),
    ([[.5, .5], [np.nan, 1]], 'NaN.* row 1'),
    ([[.5, .5], [np.inf, 1]], 'infinite'),
    ([[.5, .5], [1.5, -.5]], 'negative.* row 1'),
    ([[.5, .5]], r'square.*\(1, 2\)'),
    ([.5, .5], r'square.*\(2,\)'),
    (np.zeros((0, 0)), 'empty'),
], ids=['counts', 'counts with an empty row', 'rows not normalised', 'NaN', 'infinite', 'negative', 'not square', '1-d', 'empty'])


@bad_matrices
@pytest.mark.parametrize('f', [distance_matrix, posterior_matrix])
def test_what_is_no_confusion_matrix_is_refused_with_its_fault_named(f, C, message):
    with pytest.raises(ValueError, match=message): f(C)


@given(confusions())
def test_distance_is_symmetric_zero_on_the_diagonal_and_between_0_and_1(C):
    D = distance_matrix(C)
    assert D.dtype == np.float64
    assert np.array_equal(D, D.T) and not np.diag(D).any() and (D >= 0).all() and (D <= 1).all()


@given(confusions())
def test_distance_is_one_minus_the_mean_confusion_of_both_directions(C):
    D = distance_matrix(C)
    off = ~np.eye(len(C), dtype=bool)
    assert np.allclose(D[off], (1 - (C + C.T)/2)[off], atol=1e-12)


@given(confusions())
def test_columns_of_the_posterior_are_distributions_by_bayes_rule(C):
    P = posterior_matrix(C)
    assert np.allclose(P.sum(0), 1, atol=1e-12) and (P >= 0).all()
    for j in range(len(C)):
        if C[:, j].any(): assert np.allclose(P[:, j]*C[:, j].sum(), C[:, j], atol=1e-12)
        else: assert P[:, j].tolist() == np.eye(len(C))[j].tolist()


def test_the_input_is_left_as_it_was():
    C = np.array([[0., 1], [0, 1]])
    distance_matrix(C), posterior_matrix(C), check_confusion(C)
    assert C.tolist() == [[0, 1], [0, 1]]


def test_the_toy_example_is_a_confusion_matrix_of_its_classes():
    assert check_confusion(toy_confusion()).shape == (len(toy_classes),)*2


# ---- sparse

@given(predictions(), st.integers(1, 5))
def test_the_sparse_matrix_of_all_probabilities_is_the_soft_one_however_they_are_batched(p, parts):
    targets, probs, K = p
    batches = zip(np.array_split(targets, parts), np.array_split(probs, parts))
    got = sparse_confusion_matrix([(y, x) for y, x in batches if len(y)], K, k=K)
    assert np.allclose(got.toarray(), confusion_matrix(targets, probs, K), atol=1e-12)


@given(predictions(), st.integers(1, 3))
def test_a_row_moves_by_at_most_twice_the_share_that_is_dropped(p, k):
    targets, probs, K = p
    got, want = sparse_confusion_matrix([(targets, probs)], K, k=k).toarray(), confusion_matrix(targets, probs, K)
    assert np.allclose(got.sum(1), 1, atol=1e-12)
    for c in set(targets):
        dropped = 1 - np.sort(probs[targets == c], axis=1)[:, -k:].sum(1).mean()
        assert np.abs(got[c] - want[c]).sum() <= 2*dropped + 1e-9


@given(confusions())
def test_similarity_is_one_minus_distance(C):
    assert np.allclose(1 - similarity_matrix(sparse.csr_array(C)).toarray() - np.eye(len(C)), distance_matrix(C), atol=1e-12)


def test_distances_of_a_sparse_matrix_are_refused():
    with pytest.raises(ValueError, match='similarity_matrix'): distance_matrix(sparse.csr_array(np.eye(3)))


def test_the_posterior_is_dense():
    with pytest.raises(ValueError, match='toarray'): posterior_matrix(sparse.csr_array(np.eye(3)))
