"Algorithm 1 and `ClassHierarchy`: what holds for every confusion matrix, ties and extremes included."
import json
import math
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt
from scipy import sparse

from hdfast.clustering import (ClassHierarchy, check_one_level, cluster_classes, cluster_into, cluster_recursively, cut_by_size, hierarchy_from_groups, kmeans_clusters,
                               max_size_for, overlap_clusters, spectral_clusters, sub_confusion)
from hdfast.confusion import confusion_matrix, distance_matrix, toy_classes, toy_confusion
from hdfast.linkage import average_linkage


@st.composite
def counted(draw, min_classes=1, max_classes=14, n=10):
    "Hard confusion counted on 10 samples a class: multiples of 0.1, so that nearly all distances are tied."
    K, rng = draw(st.integers(min_classes, max_classes)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    right = draw(st.floats(0, 1))
    return np.array([rng.multinomial(n, right*np.eye(K)[i] + (1 - right)/K) for i in range(K)])/n


@st.composite
def soft(draw, min_classes=1, max_classes=14):
    K, rng = draw(st.integers(min_classes, max_classes)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.dirichlet(np.full(K, draw(st.sampled_from([.1, 1., 10.]))), K)


confusions = st.one_of(counted(), soft())
gammas = st.sampled_from([None, 1e-6, .5, 1, 2, 3, 5, 8, 100, math.inf])
sizes = st.integers(1, 16)
C11 = toy_confusion()


def names(K): return [f'class {i}' for i in range(K)]

def by_name(h): return {frozenset(h.classes[i] for i in q) for q in h.clusters}

def homes_by_name(h): return {frozenset(h.classes[i] for i in np.flatnonzero(h.home == q)) for q in range(h.n_clusters)}

def shuffled(C, classes, seed):
    order = np.random.default_rng(seed).permutation(len(C))
    return C[np.ix_(order, order)], [classes[i] for i in order]


# ---- Algorithm 1

@given(confusions, sizes, gammas)
def test_every_class_has_one_home_and_its_home_holds_it(C, size, gamma):
    h = cluster_classes(C, size, gamma)
    assert h.home.shape == (len(C),) and set(h.home) == set(range(h.n_clusters))
    assert all(c in h.clusters[q] for c, q in enumerate(h.home))


@given(confusions, sizes, gammas)
def test_no_cluster_is_home_to_more_than_max_size_classes(C, size, gamma):
    h = cluster_classes(C, size, gamma)
    assert np.bincount(h.home).max() <= size
    if gamma is None: assert sorted(sum(h.clusters, ())) == list(range(len(C))) and max(map(len, h.clusters)) <= size


@given(confusions, sizes)
def test_only_nodes_with_more_than_max_size_classes_are_split(C, size):
    K, Z = len(C), average_linkage(distance_matrix(C))
    groups = [frozenset([c]) for c in range(K)]
    for r, s in Z[:, :2].astype(int): groups.append(groups[r] | groups[s])
    parent = {c: K + i for i, (r, s) in enumerate(Z[:, :2].astype(int)) for c in (r, s)}
    for q in map(frozenset, cut_by_size(Z, size)):
        node = groups.index(q)
        assert len(q) <= size and (node not in parent or len(groups[parent[node]]) > size)


@given(confusions, sizes)
def test_clusters_are_sorted_and_ordered_by_their_first_class(C, size):
    clusters = cluster_classes(C, size).clusters
    assert all(list(q) == sorted(q) for q in clusters) and [q[0] for q in clusters] == sorted(q[0] for q in clusters)


@given(confusions, sizes, st.sampled_from([1e-6, .5, 1, 3, 8, math.inf]))
def test_overlap_only_adds(C, size, gamma):
    disjoint, h = cluster_classes(C, size), cluster_classes(C, size, gamma)
    assert all(set(a) <= set(b) for a, b in zip(disjoint.clusters, h.clusters, strict=True))
    assert np.array_equal(disjoint.home, h.home)


@given(confusions, sizes, st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2).map(sorted))
def test_more_gamma_only_adds_more(C, size, pair):
    less, more = (cluster_classes(C, size, g).clusters for g in pair)
    assert all(set(a) <= set(b) for a, b in zip(less, more, strict=True))


@given(counted(), sizes, st.sampled_from([.5, 1, 2, 3, 5, 8]))
def test_a_guest_sends_enough_of_its_samples_into_the_cluster(C, size, gamma):
    h = cluster_classes(C, size, gamma)
    for q in range(h.n_clusters):
        for c in range(len(C)):
            routed = sum(round(10*C[c, i]) for i in np.flatnonzero(h.home == q))   # of 10 samples: whole numbers, exact
            assert (c in h.clusters[q]) == (h.home[c] == q or routed*gamma*h.n_clusters >= 10)


def test_overlap_goes_where_the_samples_go_and_not_the_other_way_round():
    C = np.array([[.8, .2, 0, 0], [.1, .7, .2, 0], [0, 0, .8, .2], [0, 0, .1, .9]])
    assert overlap_clusters(C, ((0, 1), (2, 3)), gamma=3) == ((0, 1), (1, 2, 3))


# ---- the order of the classes

@settings(max_examples=100)
@given(st.one_of(counted(), soft()), sizes, gammas, st.integers(0, 9))
def test_the_order_of_the_classes_changes_nothing(C, size, gamma, seed):
    ours, theirs = (cluster_classes(C_, size, gamma, n) for C_, n in [(C, names(len(C))), shuffled(C, names(len(C)), seed)])
    assert by_name(ours) == by_name(theirs) and homes_by_name(ours) == homes_by_name(theirs)


@pytest.mark.parametrize('C', [np.eye(60), np.full((60, 60), 1/60), .7*np.eye(60) + .3/60], ids=['never confused', 'all alike', 'equally confused'])
@pytest.mark.parametrize('gamma', [None, 3])
def test_the_order_of_the_classes_changes_nothing_where_all_are_tied(C, gamma):
    for seed in range(3):
        assert by_name(cluster_classes(C, 7, gamma, names(60))) == by_name(cluster_classes(*_with(shuffled(C, names(60), seed), 7, gamma)))

def _with(shuffled, *args): return shuffled[0], *args, shuffled[1]


def test_the_order_of_the_classes_changes_nothing_from_predictions_on():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 40, 400)
    decided = np.where(rng.random(400) < .6, y, rng.integers(0, 40, 400))
    probs, order = np.eye(40)[decided], rng.permutation(40)
    at = np.argsort(order)
    for soft_ in (True, False):
        one = cluster_classes(confusion_matrix(y, probs, 40, soft_), 6, 4, names(40))
        two = cluster_classes(confusion_matrix(at[y], probs[:, order], 40, soft_), 6, 4, [names(40)[i] for i in order])
        assert by_name(one) == by_name(two)


@settings(max_examples=8)
@given(counted(min_classes=3, max_classes=10), st.integers(2, 4), st.sampled_from([None, 3]), st.integers(0, 9))
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('method', [spectral_clusters, kmeans_clusters])
def test_the_order_of_the_classes_changes_nothing_for_other_methods(method, C, n, gamma, seed):
    n = min(n, len(C))
    ours, theirs = (method(C_, n, gamma, c) for C_, c in [(C, names(len(C))), shuffled(C, names(len(C)), seed)])
    assert by_name(ours) == by_name(theirs) and homes_by_name(ours) == homes_by_name(theirs)


# ---- how many clusters

@given(confusions, st.data())
def test_max_size_for_is_the_smallest_that_comes_nearest(C, data):
    wanted = data.draw(st.integers(1, len(C)))
    made = {m: cluster_classes(C, m).n_clusters for m in range(1, len(C) + 1)}
    nearest = min(abs(n - wanted) for n in made.values())
    fewest = min(n for n in made.values() if abs(n - wanted) == nearest)
    assert max_size_for(C, wanted) == min(m for m, n in made.items() if n == fewest)


@given(confusions, gammas, st.data())
def test_cluster_into_takes_the_max_size_that_comes_nearest(C, gamma, data):
    K, wanted = len(C), data.draw(st.integers(1, len(C)))
    assert cluster_into(C, wanted, gamma, names(K)) == cluster_classes(C, max_size_for(C, wanted, names(K)), gamma, names(K))
    assert cluster_into(C, classes=names(K)) == cluster_into(C, max(1, round(K**.5)), classes=names(K))


@pytest.mark.parametrize('method', [spectral_clusters, kmeans_clusters])
def test_points_are_made_of_a_dense_confusion(method):
    with pytest.raises(ValueError, match='take a dense confusion matrix, not a sparse one: pass C.toarray'): method(sparse.csr_array(C11), 3)


def test_a_fraction_of_a_class_or_cluster_is_refused():
    for f in (lambda: cluster_classes(C11, 2.5), lambda: cluster_classes(C11, float('nan')), lambda: cluster_into(C11, 2.5), lambda: kmeans_clusters(C11, 2.5)):
        with pytest.raises(ValueError, match='whole number'): f()


def test_nothing_to_cluster_is_said_so():
    with pytest.raises(ValueError, match='no classes to group'): hierarchy_from_groups([])
    with pytest.raises(ValueError, match='no clusters to add classes to'): overlap_clusters(np.eye(3), [], 2)


@pytest.mark.parametrize('n', [0, 12, -1])
@pytest.mark.parametrize('f', [max_size_for, cluster_into, spectral_clusters, kmeans_clusters])
def test_an_impossible_number_of_clusters_is_refused(f, n):
    with pytest.raises(ValueError, match="11 classes can't make"): f(C11, n)


# ---- extremes

def test_one_class_makes_one_cluster():
    for h in (cluster_classes([[1.]], 1), cluster_classes([[1.]], 5, gamma=2), spectral_clusters([[1.]], 1), kmeans_clusters([[1.]], 1),
              hierarchy_from_groups(['only']), cluster_recursively([[1.]], [1])):
        assert h.clusters == ((0,),) and h.linkage.shape == (0, 4)
        assert ClassHierarchy.from_json(h.to_json()) == h
    assert max_size_for([[1.]], 1) == 1


def test_two_classes_make_one_cluster_or_two():
    C = [[.7, .3], [.2, .8]]
    assert cluster_classes(C, 1).clusters == ((0,), (1,)) and cluster_classes(C, 2).clusters == ((0, 1),)
    assert cluster_classes(C, 1, gamma=2).clusters == ((0,), (0, 1))            # .3 of class 0 go to 1, above 1/(2*2); .2 the other way, below
    for f in (spectral_clusters, kmeans_clusters): assert [f(C, n).n_clusters for n in (1, 2)] == [1, 2]


@given(confusions)
def test_max_size_1_makes_singletons_and_max_size_K_one_cluster(C):
    K = len(C)
    assert cluster_classes(C, 1).clusters == tuple((c,) for c in range(K))
    for size in (K, K + 1): assert cluster_classes(C, size).clusters == (tuple(range(K)),)


@given(st.integers(1, 20), st.floats(0, 1), sizes, gammas)
def test_equal_distances_are_clustered_within_the_limit(K, right, size, gamma):
    h = cluster_classes(right*np.eye(K) + (1 - right)/K, size, gamma)
    assert np.bincount(h.home).max() <= size


@given(confusions, sizes)
def test_gamma_at_its_extremes(C, size):
    disjoint = cluster_classes(C, size)
    everywhere, nowhere = cluster_classes(C, size, math.inf), cluster_classes(C, size, 1e-9)
    assert everywhere.clusters == (tuple(range(len(C))),)*disjoint.n_clusters
    assert nowhere.clusters == disjoint.clusters
    assert ClassHierarchy.from_json(everywhere.to_json()) == everywhere
    def not_in_json(constant): raise AssertionError(f'{constant} is no number of JSON')
    json.loads(everywhere.to_json(), parse_constant=not_in_json)


@pytest.mark.parametrize('gamma', [0, -1, math.nan])
def test_a_gamma_that_is_not_positive_is_refused(gamma):
    with pytest.raises(ValueError, match='gamma must be positive'): cluster_classes(C11, 4, gamma)


@pytest.mark.parametrize('size', [0, -3])
def test_a_max_size_below_1_is_refused(size):
    with pytest.raises(ValueError, match='at least 1'): cluster_classes(C11, size)


@pytest.mark.parametrize('C, message', [([[40, 10], [5, 45]], 'raw counts'), ([[np.nan, 1], [.5, .5]], 'NaN'), ([[1.5, -.5], [0, 1]], 'negative'), ([[.5, .5]], 'square')])
@pytest.mark.parametrize('f', [lambda C: cluster_classes(C, 2), lambda C: max_size_for(C, 1), lambda C: spectral_clusters(C, 1), lambda C: kmeans_clusters(C, 1),
                               lambda C: cluster_recursively(C, [2]), lambda C: sub_confusion(C, [0]), lambda C: hierarchy_from_groups([0, 1], C=C, gamma=2)],
                         ids=['cluster_classes', 'max_size_for', 'spectral', 'k-means', 'recursively', 'sub_confusion', 'groups'])
def test_every_way_to_clusters_refuses_what_is_no_confusion_matrix(f, C, message):
    with pytest.raises(ValueError, match=message): f(C)


@pytest.mark.parametrize('classes, message', [(['a']*11, 'distinct'), (['a', 'b'], '2 class names for 11')])
def test_names_must_be_distinct_and_as_many_as_classes(classes, message):
    with pytest.raises(ValueError, match=message): cluster_classes(C11, 4, classes=classes)


def test_algorithm_1_finds_the_groups_of_the_toy_example():
    want = {frozenset(toy_classes[:4]), frozenset(toy_classes[4:8]), frozenset(toy_classes[8:])}
    for h in (cluster_classes(C11, 4, classes=toy_classes), spectral_clusters(C11, 3, classes=toy_classes), kmeans_clusters(C11, 3, classes=toy_classes)):
        assert by_name(h) == want


# ---- ClassHierarchy as a value

hierarchies = st.one_of(st.builds(cluster_classes, confusions, sizes, gammas),
                        st.builds(lambda C, s, g: cluster_recursively(C, [s + 3, s], g), confusions, st.integers(1, 4), st.sampled_from([None, 3])))


@given(hierarchies)
def test_json_gives_back_the_same_hierarchy_to_the_bit_with_the_same_hash(h):
    again = ClassHierarchy.from_json(h.to_json())
    assert again == h and hash(again) == hash(h) and again.to_json() == h.to_json()
    assert again.linkage.tobytes() == h.linkage.tobytes() and np.array_equal(again.home, h.home)
    assert (again.classes, again.clusters, again.max_size, again.gamma, again.children) == (h.classes, h.clusters, h.max_size, h.gamma, h.children)


@given(hierarchies)
def test_json_survives_other_writers(h):
    assert ClassHierarchy.from_json(json.dumps(json.loads(h.to_json()), indent=2, sort_keys=True)) == h


def test_names_of_any_script_survive_json():
    h = cluster_classes(np.eye(3), 1, classes=['Eichhörnchen', '狐', 'a "quoted"\n name'])
    assert ClassHierarchy.from_json(h.to_json()).classes == h.classes


def test_hierarchies_that_differ_are_not_equal():
    h = cluster_classes(C11, 4, 6, toy_classes)
    others = [cluster_classes(C11, 4, 5, toy_classes), cluster_classes(C11, 3, 6, toy_classes), cluster_classes(C11, 4, 6), replace(h, max_size=5), 'h', None]
    assert all(h != o for o in others)
    deep = cluster_recursively(C11, [8, 4], classes=toy_classes)
    assert deep != replace(deep, children=None)


@pytest.mark.parametrize('gamma', [6, np.int64(6), np.float32(6)], ids=['int', 'int64', 'float32'])
def test_gamma_is_the_same_number_whatever_its_type(gamma):
    assert cluster_classes(C11, 4, gamma) == cluster_classes(C11, 4, 6.)


def test_it_is_frozen():
    h = cluster_classes(C11, 4)
    with pytest.raises(FrozenInstanceError): h.gamma = 3
    for a in (h.home, h.linkage):
        with pytest.raises(ValueError): a[0] = 1


def test_it_keeps_no_hold_on_the_callers_arrays():
    home, Z = np.array([0, 1]), np.array([[0, 1, .5, 2]])
    h = ClassHierarchy(['a', 'b'], [(0,), (1,)], home, Z, 1)
    home[0], Z[0, 2] = 1, 9
    assert h.home[0] == 0 and h.linkage[0, 2] == .5
    home[:] = 0                                                     # and the caller's arrays can still be written


valid = dict(classes=('a', 'b', 'c'), clusters=((0, 1), (2,)), home=(0, 0, 1), linkage=[[0, 1, .5, 2], [2, 3, 1, 3]], max_size=2)
child = hierarchy_from_groups([0, 1], ['a', 'b'])


def test_the_valid_example_is_valid(): assert ClassHierarchy(**valid, children=(child, None)).n_clusters == 2


@pytest.mark.parametrize('changes, message', [
    (dict(classes=('a', 'b', 'a')), 'distinct'),
    (dict(classes=('a', 'b')), 'home has shape'),
    (dict(classes=(), clusters=(), home=(), linkage=[]), 'at least one class'),
    (dict(home=(0, 0)), 'home has shape'),
    (dict(home=(0, 0, 2)), 'outside'),
    (dict(home=(0, 0, -1)), 'outside'),
    (dict(home=(0, 1, 1)), "'b' has its home in cluster 1"),
    (dict(home=(0, 0, 0), max_size=3), 'no class'),
    (dict(linkage=[[0, 1, .5, 2]]), r'linkage of 3 classes has shape \(2, 4\)'),
    (dict(linkage=[[0, 1, .5, 2]]*3), 'linkage'),
    (dict(clusters=((1, 0), (2,))), 'cluster 0 must be a sorted tuple'),
    (dict(clusters=((0, 0, 1), (2,))), 'cluster 0 must be a sorted tuple'),
    (dict(clusters=((0, 1), (2, 3))), 'cluster 1 must be a sorted tuple'),
    (dict(clusters=((-1, 0, 1), (2,))), 'cluster 0 must be a sorted tuple'),
    (dict(clusters=((0, 1), ())), 'cluster 1 must be a sorted tuple'),
    (dict(max_size=1), 'cluster 0 is home to 2'),
    (dict(clusters=((0, 1), (1, 2))), 'overlap though gamma is None'),
    (dict(children=(None,)), '1 children for 2'),
    (dict(children=(None, child)), 'child of cluster 1 has other classes'),
], ids=str)
def test_a_hierarchy_that_does_not_hold_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message): ClassHierarchy(**{**valid, **changes})


@pytest.mark.parametrize('text', ['', 'hello', '3', 'null', '[]', '{}', '"hdfast.ClassHierarchy.1"', '{"format": "hdfast.ClassHierarchy.2"}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError): ClassHierarchy.from_json(text)


whole = json.loads(ClassHierarchy(**valid).to_json())


@pytest.mark.parametrize('changes', [
    {'home': [0, 0, 5]}, {'home': [[0, 0, 1]]}, {'clusters': [['a'], [2]]}, {'linkage': 'x'}, {'linkage': [[0, 1, .5, 2]]}, {'classes': ['a', 'a', 'b']},
], ids=str)
def test_json_of_a_hierarchy_that_does_not_hold_together_is_refused(changes):
    with pytest.raises(ValueError): ClassHierarchy.from_json(json.dumps({**whole, **changes}))


@pytest.mark.parametrize('changes', [
    {'children': 5}, {'children': [{}, None]}, {'clusters': None}, {'home': None}, {'classes': 5}, {'max_size': None}, {'unknown': 1},
    {'gamma': 'x'}, {'gamma': -1}, {'home': [.9, .2, 1.7]}, {'linkage': [[0, 0, 0, 0]]*2}, {'linkage': [[math.nan]*4]*2},
], ids=str)
def test_json_with_values_of_the_wrong_kind_is_refused(changes):
    with pytest.raises(ValueError): ClassHierarchy.from_json(json.dumps({**whole, **changes}))


@pytest.mark.parametrize('field', ['classes', 'clusters', 'home', 'linkage', 'max_size', 'children'])
def test_json_that_lacks_a_field_is_refused(field):
    with pytest.raises(ValueError): ClassHierarchy.from_json(json.dumps({k: v for k, v in whole.items() if k != field}))


# ---- shown

def test_every_class_is_printed_with_its_cluster_and_guests_after_a_plus():
    h = cluster_classes(C11, 4, 6, toy_classes)
    lines = repr(h).splitlines()[1:]
    assert len(lines) == h.n_clusters
    for q, line in enumerate(lines):
        own, _, guests = line.partition('+')
        assert all((h.classes[c] in own) == (h.home[c] == q) for c in range(11))
        assert all((h.classes[c] in guests) == (c in h.clusters[q] and h.home[c] != q) for c in range(11))


@pytest.mark.parametrize('h', [cluster_classes(C11, 4, 6, toy_classes), spectral_clusters(C11, 3), hierarchy_from_groups([0, 1]*4), cluster_classes(np.eye(100), 9)],
                         ids=['overlap', 'spectral', 'taxonomy', '100 classes'])
def test_the_dendrogram_names_every_class_once(h):
    ax = h.plot()
    assert sorted(t.get_text() for t in ax.get_yticklabels()) == sorted(h.classes)
    plt.close(ax.figure)


def test_labels_of_a_hundred_classes_do_not_overlap_in_the_dendrogram():
    ax = cluster_classes(np.eye(100), 9).plot()
    ax.figure.canvas.draw()
    boxes = sorted((t.get_window_extent() for t in ax.get_yticklabels()), key=lambda b: b.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:]))
    plt.close(ax.figure)


# ---- groups, and clusters within clusters

@given(st.lists(st.sampled_from('abcde'), min_size=1, max_size=15))
def test_given_groups_become_the_clusters(groups):
    h = hierarchy_from_groups(groups)
    assert {frozenset(q) for q in h.clusters} == {frozenset(i for i, g in enumerate(groups) if g == x) for x in groups}
    assert {tuple(q) for q in cut_by_size(h.linkage, h.max_size)} >= {q for q in h.clusters if len(q) == h.max_size}


@given(st.lists(st.sampled_from('abcde'), min_size=1, max_size=15))
def test_in_the_tree_of_given_groups_classes_meet_within_their_group_first(groups):
    K, Z = len(groups), hierarchy_from_groups(groups).linkage
    members = {i: [i] for i in range(K)}
    for i, (r, s, height, _) in enumerate(Z):
        members[K + i] = members.pop(int(r)) + members.pop(int(s))
        assert (len({groups[c] for c in members[K + i]}) == 1) == (height < .75)


def test_overlap_of_given_groups_needs_their_confusion():
    with pytest.raises(ValueError, match='needs the confusion matrix'): hierarchy_from_groups([0, 1], gamma=3)
    h = hierarchy_from_groups([0]*4 + [1]*4 + [2]*3, toy_classes, C11, 6)
    assert h.clusters == cluster_classes(C11, 4, 6, toy_classes).clusters


@given(confusions, st.data())
def test_confusion_within_a_cluster_is_what_is_left_when_nothing_else_can_be_predicted(C, data):
    cluster = sorted(data.draw(st.sets(st.integers(0, len(C) - 1), min_size=1)))
    part = sub_confusion(C, cluster)
    assert np.allclose(part.sum(1), 1, atol=1e-12)
    for a, i in enumerate(cluster):
        left = C[i, cluster].sum()
        assert np.allclose(part[a]*left, C[i, cluster], atol=1e-12) if left else part[a].tolist() == np.eye(len(cluster))[a].tolist()


@settings(max_examples=25)
@given(confusions, st.lists(st.integers(1, 10), min_size=1, max_size=4, unique=True).map(lambda x: sorted(x, reverse=True)), st.sampled_from([None, 3, math.inf]))
def test_recursion_refines_every_cluster_above_a_further_limit_by_its_own_confusion(C, max_sizes, gamma):
    def check(h, C, limits):
        assert h == replace(cluster_classes(C, limits[0], gamma, h.classes), children=h.children)
        for members, child in zip(h.clusters, h.children, strict=True):
            smaller = [size for size in limits[1:] if size < len(members)]
            assert (child is not None) == bool(smaller)
            if child is not None: check(child, sub_confusion(C, members), smaller)
    check(cluster_recursively(C, max_sizes, gamma), C, max_sizes)


def test_a_tree_as_deep_as_there_are_classes_is_drawn():
    n, limit = 1500, sys.getrecursionlimit()
    chain = np.array([[n + i - 1 if i else 0, i + 1, 1 + i, 2 + i] for i in range(n - 1)], float)
    h = replace(hierarchy_from_groups([0]*n), linkage=chain)
    ax = h.plot(plt.figure().add_subplot())
    assert len(ax.get_yticklabels()) == n and sys.getrecursionlimit() == limit
    plt.close(ax.figure)


@settings(max_examples=25)
@given(counted(), st.integers(0, 9))
def test_the_order_of_the_classes_changes_nothing_at_any_level(C, seed):
    def tree(h): return frozenset((frozenset(h.classes[i] for i in q), c and tree(c)) for q, c in zip(h.clusters, h.children))
    ours, theirs = (cluster_recursively(C_, [6, 3, 1], 2, c) for C_, c in [(C, names(len(C))), shuffled(C, names(len(C)), seed)])
    assert tree(ours) == tree(theirs)


def test_refine_puts_a_child_where_it_belongs_and_leaves_the_original():
    h = cluster_classes(C11, 4, classes=toy_classes)
    pets = cluster_classes(sub_confusion(C11, h.clusters[0]), 2, classes=toy_classes[:4])
    assert h.refine(0, pets).children == (pets, None, None) and h.children == (None,)*3
    with pytest.raises(ValueError, match='child of cluster 1'): h.refine(1, pets)


def test_refining_a_cluster_that_does_not_exist_is_an_error():
    with pytest.raises((ValueError, IndexError)): cluster_classes(C11, 4).refine(7, child)


# ---- sparse

@given(st.one_of(counted(), soft()), sizes, gammas)
def test_a_sparse_confusion_matrix_makes_the_same_hierarchy(C, size, gamma):
    dense, sparse_ = cluster_classes(C, size, gamma), cluster_classes(sparse.csr_array(C), size, gamma)
    assert dense.clusters == sparse_.clusters and np.array_equal(dense.home, sparse_.home)
    assert np.allclose(dense.linkage, sparse_.linkage, rtol=0, atol=1e-11)
    assert max_size_for(C, len(dense.clusters)) == max_size_for(sparse.csr_array(C), len(dense.clusters))


def test_a_caterpillar_of_fifty_thousand_classes_is_cut_without_recursion():
    K = 50_000
    Z = np.c_[np.r_[0, np.arange(K, 2*K - 2)], np.arange(1, K), np.linspace(0, 1, K - 1), np.arange(2, K + 1)]
    Z[:, :2].sort(axis=1)
    assert len(cut_by_size(Z, 100)) == K - 99


def test_sparse_confusion_is_taken_or_refused_in_words():
    C = toy_confusion()
    assert np.allclose(sub_confusion(sparse.csr_array(C), [0, 1, 4]), sub_confusion(C, [0, 1, 4]), atol=1e-15)
    deep, dense = (cluster_recursively(M, [8, 4], classes=toy_classes) for M in (sparse.csr_array(C), C))
    assert str(deep) == str(dense) and deep.nested and np.allclose(deep.linkage, dense.linkage)
    for f in (spectral_clusters, kmeans_clusters):
        with pytest.raises(ValueError, match='sparse'): f(sparse.csr_array(C), 3)
        assert f(sparse.csr_array(C), 1).n_clusters == 1


@pytest.mark.parametrize('sizes', [[], [4, 4], [4, 8]])
def test_levels_need_thetas_that_decrease(sizes):
    with pytest.raises(ValueError, match='decreasing'): cluster_recursively(toy_confusion(), sizes)


def test_which_classes_a_cluster_holds():
    h = cluster_classes(toy_confusion(), 4, 3, toy_classes)
    assert h.holds.shape == (h.n_clusters, h.n_classes) and [tuple(np.flatnonzero(row)) for row in h.holds] == list(h.clusters)
    assert not h.nested and check_one_level(h, 'This takes') is None
    deep = cluster_recursively(toy_confusion(), [8, 4])
    with pytest.raises(ValueError, match='^This takes a hierarchy of one level; this one has clusters within cluster 0'): check_one_level(deep, 'This takes')


def test_class_ids_are_whole_numbers():
    h = cluster_classes(np.eye(2), 1)
    with pytest.raises(TypeError, match='integer'): replace(h, clusters=((.9,), (1.2,)))


def test_dollars_in_names_are_no_formula(tmp_path):
    from hdfast.plots import plot_confusion
    names, C = ['in$ide_$', '$', 'b'], np.full((3, 3), 1/3)
    h = cluster_classes(C, 2, classes=names)
    for ax in (h.plot(), plot_confusion(C, h)): ax.figure.savefig(tmp_path/'plot.svg')
    assert 'in\\$ide_\\$' in [label.get_text() for label in h.plot().get_yticklabels()]


@pytest.mark.parametrize('K', [4, 7])
def test_a_confusion_of_other_classes_is_refused(K):
    C = np.full((K, K), 1/K)
    with pytest.raises(ValueError, match=f'C is of {K} classes, and there are 6'): hierarchy_from_groups([0, 0, 0, 1, 1, 1], None, C, 3)


@pytest.mark.parametrize('c', [-1, 3, 10**7])
def test_clusters_of_classes_that_there_are_not_are_refused(c):
    with pytest.raises(ValueError, match=f'the clusters hold class {c}, and C has the classes 0 to 2'): overlap_clusters(np.eye(3), [(0, 1), (2, c)], 3)


def test_overlap_refuses_what_is_no_confusion():
    counts = np.array([[50, 1, 0], [1, 40, 0], [0, 0, 30]])
    clusters = [(0,), (1,), (2,)]
    with pytest.raises(ValueError, match='raw counts'): overlap_clusters(counts, clusters, 3)
    with pytest.raises(ValueError, match='NaN'): overlap_clusters(np.full((3, 3), np.nan), clusters, 3)
    assert overlap_clusters(counts/counts.sum(1, keepdims=True), clusters, 3) == tuple(clusters)
