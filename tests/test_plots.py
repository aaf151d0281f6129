"Pictures of clusters: one colour for each cluster in all of them, and nothing cut off."
import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from scipy.cluster.hierarchy import dendrogram
from scipy.sparse import csr_array

from hdfast.clustering import cluster_classes, hierarchy_from_groups, palette
from hdfast.confusion import toy_classes, toy_confusion
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.plots import plot_confusion, plot_family, plot_members


def confused(K, seed=0):
    "A random confusion matrix of K classes"
    C = np.random.default_rng(seed).dirichlet(np.full(K, .1), K) + 2*np.eye(K)
    return C/C.sum(1, keepdims=True)


HIERARCHIES = dict(toy=cluster_classes(toy_confusion(), 4, 6, toy_classes), hundred=cluster_classes(confused(100), 6),
                   taxonomy=hierarchy_from_groups(np.arange(40) % 10), one=cluster_classes(np.eye(2), 2),
                   long=cluster_classes(np.eye(20), 20, classes=[f'{i}, a class with a long name' for i in range(20)]))
every = pytest.mark.parametrize('h', HIERARCHIES.values(), ids=HIERARCHIES)


@pytest.fixture(autouse=True)
def closed():
    "Close what a test has drawn"
    yield
    plt.close('all')


def boxes(h):
    "The boxes of a family's picture that stand for experts"
    return [t for t in plot_family(HierarchicalClassifier(h)).texts if t.get_text().startswith(('CNN_3', 'no expert'))]


@every
def test_a_cluster_has_one_colour_in_all_pictures(h):
    in_tree = {label.get_text(): to_hex(label.get_color()).upper() for label in h.plot().get_yticklabels()}
    assert in_tree == {name: h.colours[q] for name, q in zip(h.classes, h.home)}
    dots = [(line.get_ydata()[0], line.get_color()) for line in plot_members(h).lines]
    assert len(dots) == sum(map(len, h.clusters)) and all(colour == h.colours[q] for q, colour in dots)
    assert [to_hex(box.get_bbox_patch().get_edgecolor()).upper() for box in boxes(h)] == list(h.colours[:10])


@every
def test_neighbours_in_the_dendrogram_differ_in_colour(h):
    along = list(dict.fromkeys(h.home[dendrogram(h.linkage, no_plot=True)['leaves']].tolist()))
    colours = [h.colours[q] for q in along]
    assert sorted(along) == list(range(h.n_clusters)) and all(a != b for a, b in zip(colours, colours[1:]))
    assert len(set(colours)) == min(h.n_clusters, len(palette))


def test_a_single_class_has_a_colour(): assert cluster_classes([[1.]], 1).colours == palette[:1]


def test_a_ring_is_a_guest_and_a_filled_dot_at_home():
    h = HIERARCHIES['toy']
    rings = [line for line in plot_members(h).lines if line.get_markerfacecolor() == 'none']
    assert len(rings) == sum(map(len, h.clusters)) - h.n_classes == 4


@every
def test_a_family_fills_its_picture_and_stays_inside(h):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = plot_family(HierarchicalClassifier(h)).figure
        fig.canvas.draw()
    frames = [t.get_bbox_patch().get_window_extent() for t in fig.axes[0].texts if t.get_bbox_patch()]
    assert min(b.x0 for b in frames) >= 0 and min(b.y0 for b in frames) >= 0 and max(b.y1 for b in frames) <= fig.bbox.height
    assert .97*fig.bbox.width < max(b.x1 for b in frames) <= fig.bbox.width
    assert not any(a.overlaps(b) for i, a in enumerate(frames) for b in frames[:i])


def test_names_with_dollars_are_no_formulas():
    h = cluster_classes(np.eye(4)*.6 + .1, 4, classes=['US$', 'A$', '50%$\\%', '100%$'])
    ax = plot_family(HierarchicalClassifier(h, 'MLP_4', 'MLP_4'))
    ax.figure.canvas.draw()
    assert any('US$' in t.get_text() for t in ax.texts)


def test_a_sparse_confusion_is_drawn_as_the_dense_one():
    C = np.eye(4)*.6 + .1
    h = cluster_classes(C, 2)
    pictures = [plot_confusion(c, h).images[0].get_array() for c in (C, csr_array(C))]
    assert np.array_equal(*pictures)


def test_a_confusion_that_is_none_or_of_other_classes_is_refused(taxonomy):
    with pytest.raises(ValueError, match='raw counts'): plot_confusion(np.arange(81).reshape(9, 9), taxonomy)
    with pytest.raises(ValueError, match='a confusion of 12 classes and a hierarchy of 9'): plot_confusion(np.eye(12), taxonomy)
