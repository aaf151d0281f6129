"Average linkage: scipy's where there are no ties, and the same in any order of the classes where there are."
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.cluster.hierarchy import cophenet, is_valid_linkage, linkage
from scipy.spatial.distance import squareform

from hdfast.linkage import average_linkage, merge_heights, pair_hash


def distances(K, rng, levels=None):
    "A random distance matrix; with `levels`, of so few different values that nearly all are tied."
    D = np.triu(rng.random((K, K)) if levels is None else rng.integers(1, levels + 1, (K, K))/levels, 1)
    return D + D.T


seeds = st.integers(0, 2**32 - 1)


@given(st.integers(2, 25), seeds)
def test_without_ties_it_is_scipys_average_linkage(K, seed):
    D = distances(K, np.random.default_rng(seed))
    Z, want = average_linkage(D), linkage(squareform(D), 'average')
    assert np.array_equal(Z[:, [0, 1, 3]], want[:, [0, 1, 3]])
    assert np.allclose(Z[:, 2], want[:, 2], rtol=0, atol=1e-12)


def test_it_reproduces_scipys_own_vector():
    data = pytest.importorskip('scipy.cluster.tests.hierarchy_test_data', reason="this build of scipy comes without its tests")
    assert np.allclose(average_linkage(squareform(data.ytdist)), data.linkage_ytdist_average, rtol=0, atol=5e-9) # printed there to 8 decimals


def test_it_is_scipys_on_the_points_of_scipys_tests():
    data = pytest.importorskip('scipy.cluster.tests.hierarchy_test_data', reason="this build of scipy comes without its tests")
    D = np.linalg.norm(data.X[:, None] - data.X[None], axis=-1)
    assert np.allclose(average_linkage((D + D.T)/2), linkage(data.X, 'average'), rtol=0, atol=1e-12)


@given(st.integers(2, 20), st.integers(1, 4), seeds)
def test_a_merge_is_as_high_as_the_mean_distance_of_its_two_groups(K, levels, seed):
    D = distances(K, np.random.default_rng(seed), levels)
    Z, members = average_linkage(D), {i: [i] for i in range(K)}
    assert is_valid_linkage(Z)
    for i, (r, s, height, size) in enumerate(Z):
        assert height == pytest.approx(D[np.ix_(members[int(r)], members[int(s)])].mean(), abs=1e-8)
        members[K + i] = members.pop(int(r)) + members.pop(int(s))
        assert size == len(members[K + i])
    assert (np.diff(Z[:, 2]) >= 0).all()


@given(st.integers(2, 20), st.integers(1, 4), seeds)
def test_the_tree_is_the_same_in_any_order_of_the_classes_however_many_ties(K, levels, seed):
    rng = np.random.default_rng(seed)
    D, order, names = distances(K, rng, levels), rng.permutation(K), np.array([f'class {i}' for i in range(K)])
    def merges(Z, names):
        groups = [frozenset([n]) for n in names]
        for r, s in Z[:, :2].astype(int): groups.append(groups[r] | groups[s])
        return groups[len(names):]
    one, two = average_linkage(D, names), average_linkage(D[np.ix_(order, order)], names[order])
    assert set(merges(one, names)) == set(merges(two, names[order]))
    assert np.allclose(squareform(cophenet(one))[np.ix_(order, order)], squareform(cophenet(two)), atol=1e-9)


def test_a_thousand_classes_that_are_all_tied_make_the_same_tree_in_any_order():
    K, order = 1000, np.random.default_rng(0).permutation(1000)
    D, names = 1 - np.eye(K), np.array([f'class {i}' for i in range(K)])
    def sizes_by_name(names):
        Z = average_linkage(D, names)
        groups = [frozenset([n]) for n in names]
        for r, s in Z[:, :2].astype(int): groups.append(groups[r] | groups[s])
        return {g for g in groups if len(g) < 50}
    assert sizes_by_name(names) == sizes_by_name(names[order])


@given(st.lists(st.text(max_size=5), min_size=1, max_size=12, unique=True).filter(lambda x: all(s.isprintable() for s in x)), st.randoms(use_true_random=False))
def test_the_number_of_a_pair_depends_on_its_two_names_alone(names, random):
    h, shuffled = pair_hash(names), random.sample(names, len(names))
    other, at = pair_hash(shuffled), [shuffled.index(n) for n in names]
    assert np.array_equal(h, h.T) and not np.diag(h).any() and (h >= 0).all() and (h < 1).all()
    assert np.array_equal(h, other[np.ix_(at, at)])


def test_the_numbers_of_pairs_are_spread_evenly():
    h = pair_hash(range(200))[np.triu_indices(200, 1)]
    assert len(np.unique(h)) == len(h)
    assert abs(h.mean() - .5) < .01 and abs(np.corrcoef(h[:-1], h[1:])[0, 1]) < .03


def test_heights_come_from_the_distances_and_not_from_the_nudge():
    D = .5*(1 - np.eye(6))
    assert average_linkage(D, list('abcdef'))[:, 2].tolist() == [.5]*5
    assert merge_heights(D, average_linkage(D, list('abcdef'), nudge=1e-3)).tolist() == [.5]*5


@pytest.mark.parametrize('D, want', [([[0.]], np.zeros((0, 4))), ([[0, .3], [.3, 0]], [[0, 1, .3, 2]])], ids=['one', 'two'])
def test_one_and_two_classes(D, want): assert np.array_equal(average_linkage(D), want)


@pytest.mark.parametrize('D, message', [
    ([[0, -1], [-1, 0]], 'negative'),
    ([[0, np.nan], [np.nan, 0]], 'NaN'),
    ([[0, np.inf], [np.inf, 0]], 'infinite'),
    ([[0, .5], [.4, 0]], 'symmetric'),
    ([[.1, .5], [.5, 0]], 'diagonal'),
    ([[0, .5, .5], [.5, 0, .5]], 'square'),
    ([.5, .5, .5], 'square'),
    (np.zeros((0, 0)), 'square'),
], ids=['negative', 'NaN', 'infinite', 'asymmetric', 'diagonal', 'not square', 'condensed', 'empty'])
def test_what_is_no_distance_matrix_is_refused_with_its_fault_named(D, message):
    with pytest.raises(ValueError, match=message): average_linkage(D)


def test_names_must_be_distinct_and_as_many_as_classes():
    D = 1 - np.eye(3)
    with pytest.raises(ValueError, match='distinct'): average_linkage(D, ['a', 'b', 'a'])
    with pytest.raises(ValueError, match='2 class names for 3'): average_linkage(D, ['a', 'b'])
