"Average linkage: scipy's where there are no ties, and the same in any order of the classes where there are."
from fractions import Fraction

import fastcluster
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import sparse
from scipy.cluster.hierarchy import cophenet, is_valid_linkage, linkage
from scipy.spatial.distance import pdist, squareform

from hdfast.linkage import _compare, _mix, average_linkage, check_similarity, merge_heights, name_hashes, sparse_average_linkage


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
def test_the_hash_of_a_class_depends_on_its_name_alone(names, random):
    shuffled = random.sample(names, len(names))
    one, two = (dict(zip(n, name_hashes(n, len(n)).tolist(), strict=True)) for n in (names, shuffled))
    assert one == two and len(set(one.values())) == len(names)


def test_the_numbers_of_pairs_are_spread_evenly():
    h = name_hashes(None, 200)
    i, j = np.triu_indices(200, 1)
    pairs = _mix(h[i] + h[j])/2.**64
    assert len(np.unique(pairs)) == len(pairs)
    assert abs(pairs.mean() - .5) < .01 and abs(np.corrcoef(pairs[:-1], pairs[1:])[0, 1]) < .03


def test_heights_come_from_the_distances_and_not_from_the_units():
    D = .3*(1 - np.eye(6))
    assert average_linkage(D, list('abcdef'))[:, 2].tolist() == [.3]*5
    assert merge_heights(D, average_linkage(D, list('abcdef'))).tolist() == [.3]*5


@given(st.integers(1, 2**62), st.integers(1, 2**40), st.integers(1, 2**62), st.integers(1, 2**40), st.integers(1, 2**20))
def test_fractions_are_compared_exactly(w1, n1, w2, n2, k):
    assert _compare(w1, n1, w2, n2) == (Fraction(w1, n1) > Fraction(w2, n2)) - (Fraction(w1, n1) < Fraction(w2, n2))
    assert _compare(w1 % 2**42, n1, w1 % 2**42*k, n1*k) == 0 and _compare(w1 % 2**42*k + 1, n1*k, w1 % 2**42, n1) == 1


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


# ---- sparse

def similarity(kind, K, rng):
    "A symmetric sparse similarity without ties."
    def edges(i, j):
        i, j = (i[i != j], j[i != j])
        i, j = np.unique(np.sort(np.stack([i, j]), axis=0), axis=1)
        return sparse.csr_array((np.tile(rng.random(len(i)), 2), (np.r_[i, j], np.r_[j, i])), (K, K))
    some, all_ = rng.integers(0, K, (2, 4*K)), np.arange(K)
    near = (some[0], (some[0] + rng.integers(1, 4, 4*K)**2) % K)
    star, few = (np.zeros(K, dtype=int), all_), (np.repeat(rng.integers(0, K, 3), K), np.tile(all_, 3))
    pairs = {'random': some, 'full': np.triu_indices(K, 1), 'star': star, 'hubs': np.hstack([few, some]), 'ring': near, 'path': (all_[:-1], all_[1:]),
             'star on a graph': np.hstack([star, some]), 'apart': (some[0]//2*2, np.minimum(some[0]//2*2 + 1, K - 1)), 'nothing': ([], [])}[kind]
    return edges(*np.asarray(pairs, dtype=int))


def tree_like(K, rng):
    "Similarity of every pair by how many of their leading bits agree, and a little noise; only what is above .05 is kept."
    bits = np.floor(np.log2(np.maximum(np.arange(K)[:, None] ^ np.arange(K), .5))) + 1
    S = np.triu(.9*2.**-bits*(1 + .1*rng.random((K, K))), 1)
    S = np.where(S > .05, S, 0)
    return sparse.csr_array(S + S.T)


kinds = ['random', 'full', 'star', 'hubs', 'ring', 'path', 'star on a graph', 'apart', 'nothing']


def dense(S): return 1 - S.toarray() - np.eye(S.shape[0])


def groups(Z, names):
    "The groups that come about by merging, as sets of names."
    made = [frozenset([n]) for n in names]
    for r, s in Z[:, :2].astype(int): made.append(made[r] | made[s])
    return made[len(names):]


def assert_is(Z, S):
    "`Z` is the one average linkage of `S`, by scipy and by fastcluster; merges at distance 1 are tied and may differ."
    D = squareform(dense(S), checks=False)
    assert is_valid_linkage(Z) if len(Z) else True
    for want in (linkage(D, 'average'), fastcluster.linkage(D, 'average')):
        m = int((want[:, 2] < 1 - 1e-12).sum())
        assert np.allclose(Z[:, 2], want[:, 2], rtol=0, atol=1e-12)
        assert np.array_equal(Z[:m, [0, 1, 3]], want[:m, [0, 1, 3]])
        assert (Z[m:, 2] == 1).all()


@given(st.sampled_from(kinds), st.integers(2, 60), st.sampled_from([0, 2, 7, 1024]), seeds)
def test_without_ties_the_sparse_tree_is_scipys_and_fastclusters(kind, K, long, seed):
    S = similarity(kind, K, np.random.default_rng(seed))
    assert_is(sparse_average_linkage(S, long=long), S)


@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('long', [0, 30, 1024])
def test_so_it_is_for_some_hundred_classes(kind, long):
    S = similarity(kind, 700, np.random.default_rng(1))
    assert_is(sparse_average_linkage(S, long=long), S)


@pytest.mark.parametrize('K', [16, 100, 512])
def test_so_it_is_for_what_is_already_a_tree(K):
    S = tree_like(K, np.random.default_rng(K))
    assert_is(sparse_average_linkage(S), S)


def counted(K, rng, n=10):
    "Similarity from hard confusion counted on n samples a class: multiples of 1/(2n), nearly all tied."
    C = np.array([rng.multinomial(n, .6*np.eye(K)[i] + .4/K) for i in range(K)])/n
    S = (C + C.T)/2
    np.fill_diagonal(S, 0)
    return sparse.csr_array(S)


@given(st.sampled_from(['counted', 'alike', *kinds]), st.integers(2, 40), seeds)
def test_with_ties_dense_and_sparse_agree_in_any_order_of_the_classes(kind, K, seed):
    rng = np.random.default_rng(seed)
    S = counted(K, rng) if kind == 'counted' else sparse.csr_array(.5*(1 - np.eye(K))) if kind == 'alike' else similarity(kind, K, rng)
    S.data = np.ceil(S.data*4)/4 if kind in kinds else S.data            # of four different values
    order, names = rng.permutation(K), np.array([f'class {i}' for i in range(K)])
    one, two, three = sparse_average_linkage(S, names), sparse_average_linkage(S[order][:, order], names[order]), average_linkage(dense(S), names)
    assert set(groups(one, names)) == set(groups(two, names[order])) == set(groups(three, names))
    assert np.array_equal(one[:, 2], two[:, 2]) and np.allclose(one, three, rtol=0, atol=1e-12)


def test_with_ties_the_clusters_of_two_thousand_classes_are_the_same_in_any_order():
    rng, K = np.random.default_rng(0), 2000
    S, names = counted(K, rng), np.array([f'class {i}' for i in range(K)])
    for long in (8, 1024):
        want = set(groups(sparse_average_linkage(S, names), names))
        for _ in range(3):
            order = rng.permutation(K)
            assert set(groups(sparse_average_linkage(S[order][:, order], names[order], long=long), names[order])) == want


def test_a_merge_with_ties_is_never_nearer_than_what_it_is_made_of():
    S = counted(500, np.random.default_rng(3))
    Z = sparse_average_linkage(S)
    assert is_valid_linkage(Z) and (np.diff(Z[:, 2]) >= 0).all() and Z[-1, 3] == 500


def test_parts_that_share_nothing_join_last_the_smallest_first():
    blocks = sparse.csr_array(sparse.block_diag([.5*(1 - np.eye(n)) for n in (6, 3, 1, 1, 1)]))
    Z = sparse_average_linkage(blocks)
    assert Z[:, 2].tolist() == [.5]*7 + [1]*4
    assert Z[7:, 3].tolist() == [2, 3, 6, 12]


def test_a_star_of_twenty_thousand_is_its_formula():
    K, rng = 20_000, np.random.default_rng(0)
    c, i = rng.random(K - 1), np.arange(1, K)
    S = sparse.csr_array((np.tile(c, 2), (np.r_[i, 0*i], np.r_[0*i, i])), (K, K))
    assert np.allclose(sparse_average_linkage(S)[:, 2], 1 - np.sort(c)[::-1]/i, rtol=0, atol=1e-12)


@pytest.mark.parametrize('K', [1, 2, 3])
def test_an_empty_similarity_joins_everything_at_distance_1(K):
    Z = sparse_average_linkage(sparse.csr_array((K, K)))
    assert Z.shape == (K - 1, 4) and (Z[:, 2] == 1).all()


@pytest.mark.parametrize('form', ['csr', 'csc', 'coo', 'lil', 'dok', 'bsr'])
@pytest.mark.parametrize('make', [sparse.csr_array, sparse.csr_matrix])
def test_any_form_and_type_of_sparse_matrix_will_do(form, make):
    S = similarity('random', 30, np.random.default_rng(0))
    assert np.array_equal(sparse_average_linkage(make(S).asformat(form)), sparse_average_linkage(S))
    low = make(S).astype(np.float32)
    assert np.allclose(sparse_average_linkage(low), sparse_average_linkage(low.astype(np.float64)), rtol=0, atol=0)


def test_entries_given_twice_add_up_and_the_diagonal_does_not_count():
    S = sparse.coo_array(([.1, .2, .3, 9.], ([0, 0, 1, 1], [1, 1, 0, 1])), (2, 2))
    assert np.allclose(sparse_average_linkage(S), [[0, 1, .7, 2]], rtol=0, atol=1e-12)


def test_the_input_is_left_as_it_was():
    S = sparse.coo_array(([.1, .1, 0.], ([0, 1, 1], [1, 0, 1])), (2, 2))
    sparse_average_linkage(S)
    assert S.data.tolist() == [.1, .1, 0] and S.nnz == 3


@pytest.mark.parametrize('S, message', [
    (sparse.csr_array([[0, -.1], [-.1, 0]]), 'negative'),
    (sparse.csr_array([[0, np.nan], [np.nan, 0]]), 'NaN'),
    (sparse.csr_array([[0, np.inf], [np.inf, 0]]), 'infinite'),
    (sparse.csr_array([[0, .5], [.4, 0]]), 'symmetric'),
    (sparse.csr_array([[0, .5], [0, 0]]), 'symmetric'),
    (sparse.csr_array([[0, 7], [7, 0]]), 'above 1'),
    (sparse.csr_array(np.zeros((2, 3))), 'square'),
    (sparse.csr_array((0, 0)), 'square'),
    (np.eye(3), 'not ndarray'),
    ([[0, .5], [.5, 0]], 'not list'),
], ids=['negative', 'NaN', 'infinite', 'asymmetric', 'one-sided', 'counts', 'not square', 'empty', 'dense', 'list'])
def test_what_is_no_sparse_similarity_is_refused_with_its_fault_named(S, message):
    with pytest.raises(ValueError, match=message): sparse_average_linkage(S)
    with pytest.raises(ValueError, match=message): check_similarity(S)


def test_a_sparse_matrix_is_no_distance_matrix():
    with pytest.raises(ValueError, match='sparse_average_linkage'): average_linkage(sparse.csr_array((3, 3)))


def test_names_of_sparse_classes_must_be_distinct_and_as_many_as_classes():
    with pytest.raises(ValueError, match='distinct'): sparse_average_linkage(sparse.csr_array((3, 3)), ['a', 'b', 'a'])
    with pytest.raises(ValueError, match='2 class names for 3'): sparse_average_linkage(sparse.csr_array((3, 3)), ['a', 'b'])


@pytest.mark.parametrize('unit', [1e-13, 1e-9, 1, 1e9])
def test_the_tree_does_not_depend_on_the_unit_of_the_distances(unit):
    x = np.random.default_rng(0).normal(size=(12, 3))
    D = squareform(pdist(x))
    ours = average_linkage(D*unit)
    assert np.array_equal(ours[:, [0, 1, 3]], average_linkage(D)[:, [0, 1, 3]]) and np.allclose(ours[:, 2], average_linkage(D)[:, 2]*unit, rtol=1e-6)
