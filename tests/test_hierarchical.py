"Combining, predicting, evaluating, saving and loading: by hand, by brute force, and against hiclass."
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.vision.all import ImageDataLoaders, get_image_files, parent_label
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

import hdfast.hierarchical as hierarchical
from hdfast.clustering import ClassHierarchy, cluster_classes, cluster_recursively, hierarchy_from_groups
from hdfast.confusion import check_confusion
from hdfast.hierarchical import HierarchicalClassifier, calibration_error, check_replaceable, class_scores, combine, decompose, price, routing_scores
from hdfast import families
from hdfast.families import fit_network
from hdfast.learners import class_view, cluster_view, probabilities, recipe
from hdfast.networks import network
from hdfast.trunk import TrunkClassifier
from hdfast.trust import CalibratedClassifier, Temperatures

short, one_epoch = recipe('one_cycle', epochs=2), recipe('one_cycle', epochs=1)
C9 = .5*np.eye(9) + .3*np.kron(np.eye(3), np.full((3, 3), 1/3)) + .2/9


def fit(h, dls, router='MLP_8', expert='MLP_6', **kwargs): return HierarchicalClassifier(h, router, expert, recipe=short, **kwargs).fit(dls, progress=False)


def hierarchy(kind, images):
    "The hierarchies that a saved classifier may have."
    names = images.classes
    return {'taxonomy': lambda: hierarchy_from_groups(images.superclasses, names),
            'overlap': lambda: cluster_classes(C9, 3, 8, names),
            'singletons': lambda: hierarchy_from_groups(range(9), names),
            'some singletons': lambda: hierarchy_from_groups([0, 0, 0, 0, 0, 1, 2, 3, 3], names),
            'one cluster': lambda: hierarchy_from_groups([0]*9, names),
            'nested': lambda: hierarchy_from_groups([0]*6 + [1]*3, names).refine(0, hierarchy_from_groups([0, 0, 0, 1, 1, 2], names[:6])),
            'nested twice': lambda: cluster_recursively(C9, [6, 3, 2], classes=names),
            'nested and overlapping': lambda: cluster_recursively(C9, [6, 3], 8, names)}[kind]()

KINDS = ['taxonomy', 'overlap', 'singletons', 'some singletons', 'one cluster', 'nested', 'nested twice', 'nested and overlapping']


@pytest.fixture(scope='module')
def fitted(images):
    "A classifier for each kind of hierarchy, trained once."
    made = {}
    def get(kind):
        if kind not in made: made[kind] = fit(hierarchy(kind, images), images.dataloaders(device='cpu', bs=32))
        return made[kind]
    return get


@pytest.fixture
def classifier(fitted): return fitted('overlap')


@pytest.fixture(scope='module')
def test_images(images): return images.images[images.test]


# ---- combine

def asked(q): return lambda i, rows: q[i][rows]


def test_combining_by_hand():
    p, clusters = torch.tensor([[.6, .4], [.3, .7]]), ((0, 1), (1, 2))
    q = [torch.tensor([[.5, .5], [1., 0.]]), torch.tensor([[.9, .1], [.2, .8]])]
    close = lambda got, want: torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)
    close(combine(p, asked(q), clusters, 3), [[.5, .5, 0], [0, .2, .8]])
    close(combine(p, asked(q), clusters, 3, k=2), [[.3, .66, .04], [.3, .14, .56]])
    close(combine(p, asked(q), clusters, 3, k=2, duplicates='max'), [[.3/.7, .36/.7, .04/.7], [.3, .14, .56]])


@st.composite
def opinions(draw):
    "Cluster probabilities, an opinion of every expert, clusters that may overlap, and K."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    K, N = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    h = cluster_classes(rng.dirichlet(np.ones(K), K), draw(st.integers(1, 5)), draw(st.sampled_from([None, 2, 5])))
    soft = lambda n: torch.tensor(rng.dirichlet(np.full(n, draw(st.sampled_from([.2, 1, 5]))), N), dtype=torch.float32)
    return soft(h.n_clusters), [soft(len(q)) for q in h.clusters], h.clusters, K


@given(opinions(), st.data(), st.sampled_from(['sum', 'max']))
def test_combined_probabilities_sum_to_one(o, data, duplicates):
    p, q, clusters, K = o
    out = combine(p, asked(q), clusters, K, data.draw(st.integers(1, len(clusters))), duplicates)
    assert out.shape == (len(p), K) and (out >= 0).all() and torch.allclose(out.sum(1), torch.ones(len(p)), atol=1e-5)


@given(opinions(), st.data(), st.sampled_from(['sum', 'max']))
def test_combining_the_k_best_clusters_is_the_normalised_product_by_brute_force(o, data, duplicates):
    p, q, clusters, K = o
    k = data.draw(st.integers(1, len(clusters)))
    out = combine(p, asked(q), clusters, K, k, duplicates)
    for x in range(len(p)):
        confidences = {c: [0.] for c in range(K)}
        for i in sorted(range(len(clusters)), key=lambda i: -p[x, i])[:k]:
            for j, c in enumerate(clusters[i]): confidences[c].append(float(p[x, i]*q[i][x, j]))
        want = np.array([sum(v) if duplicates == 'sum' else max(v) for v in confidences.values()])
        assert np.allclose(out[x], want/want.sum(), atol=1e-5)


@given(opinions())
def test_top_1_gives_the_routed_clusters_opinion_and_no_mass_elsewhere(o):
    p, q, clusters, K = o
    out = combine(p, asked(q), clusters, K)
    for x, i in enumerate(p.argmax(1)):
        assert torch.allclose(out[x, list(clusters[i])], q[i][x], atol=1e-5)
        assert not out[x, [c for c in range(K) if c not in clusters[i]]].any()


@given(opinions(), st.data())
def test_an_expert_is_asked_once_and_only_about_the_images_that_follow_it(o, data):
    p, q, clusters, K = o
    k, calls = data.draw(st.integers(1, len(clusters))), []
    def assign(i, rows):
        calls.append((i, rows.tolist()))
        return q[i][rows]
    combine(p, assign, clusters, K, k)
    best = [set(sorted(range(len(clusters)), key=lambda i: -row[i])[:k]) for row in p.tolist()]
    assert sorted(calls) == [(i, rows) for i in range(len(clusters)) if (rows := [x for x, b in enumerate(best) if i in b])]


def test_float64_probabilities_are_combined_as_well_as_float32():
    p, q = torch.tensor([[.6, .4]], dtype=torch.float64), [torch.tensor([[.5, .5]], dtype=torch.float64)]*2
    torch.testing.assert_close(combine(p, asked(q), ((0, 1), (1, 2)), 3, k=2), torch.tensor([[.3, .5, .2]]), check_dtype=False)


@pytest.mark.parametrize('n', [4, 9, 30])
def test_of_tied_clusters_the_first_is_followed_as_argmax_says(n):
    out = combine(torch.full((3, n), 1/n), lambda i, rows: torch.ones(len(rows), 1), [(c,) for c in range(n)], n)
    assert out.argmax(1).tolist() == [0]*3


def test_top_1_routing_is_hiclass_with_a_classifier_per_parent_node():
    hiclass = pytest.importorskip('hiclass', reason="hiclass is a dev dependency")
    rng = np.random.default_rng(0)
    clusters = ((0, 3, 5), (1, 2), (4, 6, 7, 8))
    home = {c: i for i, members in enumerate(clusters) for c in members}
    y = np.repeat(np.arange(9), 40)
    centres = rng.normal(size=(3, 6))[[home[c] for c in range(9)]] + .8*rng.normal(size=(9, 6))
    X, unseen = (centres[y] + 1.2*rng.normal(size=(len(y), 6)) for _ in range(2))
    model = hiclass.LocalClassifierPerParentNode(LogisticRegression(max_iter=2000)).fit(X, np.array([[f'cluster {home[c]}', f'class {c}'] for c in y]))
    want = [int(name.removeprefix('class ')) for name in model.predict(unseen)[:, 1]]

    def opinion(node, labels):
        "Probabilities of hiclass' local classifier at `node`, in the order of `labels`."
        local = model.hierarchy_.nodes[node]['classifier']
        names = [str(c).split('::')[-1] for c in local.classes_]
        return torch.tensor(local.predict_proba(unseen)[:, [names.index(label) for label in labels]])
    p = opinion(model.root_, [f'cluster {i}' for i in range(3)]).float()
    q = [opinion(f'cluster {i}', [f'class {c}' for c in members]).float() for i, members in enumerate(clusters)]
    ours = combine(p, asked(q), clusters, 9, k=1).argmax(1).tolist()
    assert ours == want
    assert combine(p, asked(q), clusters, 9, k=3).argmax(1).tolist() != want         # so routing does matter here


# ---- fit

@pytest.mark.parametrize('kind', KINDS)
def test_a_cluster_of_one_class_has_no_expert_and_one_cluster_has_no_router(kind, fitted):
    def check(m):
        assert (m.router is None) == (m.hierarchy.n_clusters == 1)
        for e, members, child in zip(m.experts, m.hierarchy.clusters, m.hierarchy.children, strict=True):
            assert (e is None) == (len(members) == 1) and isinstance(e, HierarchicalClassifier) == (child is not None)
            if child is not None: check(e)
    check(fitted(kind))


@pytest.mark.parametrize('kind', KINDS)
def test_the_price_is_that_of_all_networks_however_deep(kind, fitted):
    m = fitted(kind)
    stored = sum(v.numel() for v in m._state().values())
    assert price(m.networks)['parameters'] == stored
    assert price(m.networks)['training_seconds'] > 0 and np.isnan(price([torch.nn.Linear(2, 2)])['training_seconds'])


def test_router_and_experts_are_the_networks_that_their_views_alone_would_give(images, dls):
    h = hierarchy('overlap', images)
    m = fit(h, dls, seed=5)
    near = lambda a, b: all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert near(m.router, fit_network(cluster_view(dls, h), 'MLP_8', short, seed=5)) # fused, so equal but for rounding
    for q, e in enumerate(m.experts): assert near(e, fit_network(class_view(dls, h.clusters[q]), 'MLP_6', short, seed=5 + 1 + q))


def test_each_cluster_may_have_a_network_of_its_own(images, dls, taxonomy):
    m = fit(taxonomy, dls, expert=['MLP_3', 'MLP_7', 'MLP_5_4'])
    assert [[l.out_features for l in e.head if isinstance(l, torch.nn.Linear)] for e in m.experts] == [[3, 3], [7, 3], [5, 4, 3]]
    with pytest.raises(ValueError, match='2 expert networks for 3 clusters'): HierarchicalClassifier(taxonomy, expert=['MLP', 'MLP'])


def test_an_interrupted_fit_goes_on_where_it_stopped(taxonomy, dls, tmp_path, monkeypatch):
    trained, real = [], families.save_weights
    def save_weights(net, file):
        if len(trained) == 2: raise KeyboardInterrupt
        trained.append(file.name)
        return real(net, file)
    monkeypatch.setattr(families, 'save_weights', save_weights)
    m = HierarchicalClassifier(taxonomy, 'MLP_8', 'MLP_6', recipe=short)
    with pytest.raises(KeyboardInterrupt): m.fit(dls, cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match="isn't trained"): m.predict(torch.zeros(1, 3, 16, 16))
    monkeypatch.setattr(families, 'save_weights', lambda net, file: (trained.append(file.name), real(net, file))[1])
    m.fit(dls, cache=tmp_path, progress=False)
    assert len(trained) == len(set(trained)) == 4                                    # a router and three experts, none of them twice


def test_a_network_that_diverges_is_named_with_its_cluster(taxonomy, dls):
    with pytest.raises(FloatingPointError, match='the hierarchy classifier'):
        HierarchicalClassifier(taxonomy, 'MLP_8', 'MLP_6', recipe('paper', epochs=9, lr=1e9)).fit(dls, progress=False)
    one = hierarchy_from_groups([0]*9, taxonomy.classes)
    with pytest.raises(FloatingPointError, match=rf'the expert of cluster 0 \({taxonomy.classes[0]}'):
        HierarchicalClassifier(one, 'MLP_8', 'MLP_6', recipe('paper', epochs=9, lr=1e9)).fit(dls, progress=False)


@pytest.mark.parametrize('use', [lambda m, x: m.predict(x), lambda m, x: m.predict_proba(x), lambda m, x: m.evaluate(x), lambda m, x: m.save('never'),
                                 lambda m, x: m.to('cpu')], ids=['predict', 'predict_proba', 'evaluate', 'save', 'to'])
def test_what_is_not_trained_says_so(use, taxonomy, dls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="isn't trained yet"): use(HierarchicalClassifier(taxonomy), dls.valid)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('use', [lambda m: m.to('cpu'), lambda m: m.cost(), lambda m: m.save('never')], ids=['to', 'cost', 'save'])
def test_a_trunk_that_is_not_trained_says_so(use, taxonomy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="isn't trained yet"): use(TrunkClassifier(taxonomy))


def test_a_hierarchy_of_other_classes_than_the_datas_is_refused(dls):
    with pytest.raises(ValueError, match='2 and 9 classes'): fit(hierarchy_from_groups([0, 1]), dls)


def test_names_of_networks_and_recipes_are_checked_at_once(taxonomy):
    with pytest.raises(ValueError, match='CNN_9'): HierarchicalClassifier(taxonomy, expert='CNN_9')
    with pytest.raises(ValueError, match='papr'): HierarchicalClassifier(taxonomy, recipe='papr')


# ---- predict

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('duplicates', ['sum', 'max'])
def test_predicted_probabilities_sum_to_one_over_all_classes(kind, duplicates, fitted, test_images):
    m = fitted(kind)
    for k in (1, m.hierarchy.n_clusters):
        P = m.predict_proba(test_images, k=k, duplicates=duplicates)
        assert P.shape == (len(test_images), 9) and (P >= 0).all() and np.allclose(P.sum(1), 1, atol=1e-5)
        assert np.array_equal(m.predict(test_images, k=k, duplicates=duplicates), P.argmax(1))


@pytest.mark.parametrize('kind', ['taxonomy', 'overlap', 'nested twice'])
def test_answers_come_in_the_order_of_the_images_whatever_that_is(kind, fitted, test_images):
    m, order = fitted(kind), np.random.default_rng(0).permutation(len(test_images))
    P = m.predict_proba(test_images)
    assert np.allclose(m.predict_proba(test_images[order]), P[order], atol=1e-5)
    assert np.allclose(np.concatenate([m.predict_proba(x[None]) for x in test_images]), P, atol=1e-5)


@pytest.mark.parametrize('kind', ['overlap', 'nested'])
def test_prediction_in_batches_is_the_same_as_network_by_network(kind, fitted, images):
    m, X = fitted(kind), images.images.repeat(3, 1, 1, 1)                            # 540 images: more than a batch
    x = m.normalize(X)
    def by_hand(m):
        p = m.router(x).softmax(1)
        q = [torch.ones(len(x), 1) if e is None else by_hand(e) if isinstance(e, HierarchicalClassifier) else e(x).softmax(1) for e in m.experts]
        return combine(p, asked(q), m.hierarchy.clusters, m.hierarchy.n_classes)
    with torch.no_grad(): assert np.allclose(m.predict_proba(X), by_hand(m), atol=1e-5)


def test_top_1_puts_mass_on_the_classes_of_the_routed_cluster_alone(classifier, test_images):
    with torch.no_grad(): routed = classifier.router(classifier.normalize(test_images)).argmax(1)
    P = classifier.predict_proba(test_images)
    for row, i in zip(P, routed): assert set(np.flatnonzero(row)) <= set(classifier.hierarchy.clusters[i])


@pytest.mark.parametrize('ask', ['predict', 'predict_proba', 'cluster_proba'])
def test_images_that_are_not_numbers_get_no_answer(classifier, dls, test_images, ask):
    x = dls.train.normalize(test_images[:4])
    x[2, 0, 3, 3] = float('nan')
    with pytest.raises(ValueError, match='no answer for 1 of 4 images, the first at 2: their pixels'): getattr(classifier, ask)(x)


def test_arrays_tensors_normalised_floats_and_loaders_give_the_same_answers(classifier, images, dls, test_images):
    want = classifier.predict_proba(test_images)
    assert np.array_equal(classifier.predict_proba(dls[2]), want)
    assert np.array_equal(classifier.predict_proba(test_images.numpy().copy()), want)
    assert np.array_equal(classifier.predict_proba(classifier.normalize(test_images)), want)
    batches = torch.utils.data.DataLoader([(x, 0) for x in test_images], batch_size=7)
    assert np.allclose(classifier.predict_proba(batches), want, atol=1e-5)


def test_no_images_give_no_answers(classifier, test_images):
    assert classifier.predict_proba(test_images[:0]).shape == (0, 9) and classifier.predict(test_images[:0]).shape == (0,)


@pytest.mark.parametrize('x', [torch.zeros(2, 3, 8, 8), torch.zeros(3, 16, 16), torch.zeros(2, 1, 16, 16), torch.zeros(2, 16, 16, 3)], ids=lambda x: str(tuple(x.shape)))
def test_images_of_another_shape_are_refused(x, classifier):
    with pytest.raises(ValueError, match=r'takes \(N, 3, 16, 16\)'): classifier.predict(x)


@pytest.mark.parametrize('kwargs', [dict(k=0), dict(k=4), dict(duplicates='mean')], ids=str)
def test_a_way_of_combining_that_does_not_exist_is_refused(kwargs, fitted, test_images):
    with pytest.raises(ValueError, match='k=|duplicates'): fitted('taxonomy').predict(test_images, **kwargs)


def test_a_shuffled_loader_is_refused(classifier, dls):
    with pytest.raises(ValueError, match='shuffled'): classifier.predict(dls.train)
    torchs = torch.utils.data.DataLoader([(x, 0) for x in torch.zeros(9, 3, 16, 16)], batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match='shuffled'): classifier.predict(torchs)


def test_a_loader_of_new_images_has_no_targets_and_needs_none(classifier, dls, test_images):
    new = dls.test_dl(list(test_images))
    assert np.array_equal(classifier.predict_proba(new), classifier.predict_proba(test_images))
    with pytest.raises(ValueError, match='needs the true classes'): classifier.evaluate(new)


def test_a_network_in_training_is_asked_in_eval_mode_and_stays_as_it_was(classifier, test_images):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(768), torch.nn.Dropout(), torch.nn.Linear(768, 9))
    net[1].eval() # frozen
    ask = lambda: classifier._run(net, lambda rows: classifier.normalize(test_images[rows]), torch.arange(5))
    assert torch.equal(ask(), ask()) and [m.training for m in net.modules()] == [True, True, False, True, True]


@pytest.mark.parametrize('dtype', [np.float64, np.int64], ids=str)
def test_images_of_another_number_type_are_taken_or_refused_clearly(dtype, classifier, test_images):
    try: assert classifier.predict(test_images.numpy().astype(dtype)).shape == (len(test_images),)
    except (ValueError, TypeError): pass


# ---- evaluate

@pytest.fixture(scope='module')
def evaluations(fitted, images):
    "For each kind of hierarchy: the classifier, the flat net and the evaluation on the test part."
    dls = images.dataloaders(device='cpu', bs=32)
    flat, made = fit_network(dls, 'MLP_16', short), {}
    def get(kind):
        if kind not in made: made[kind] = SimpleNamespace(m=fitted(kind), flat=flat, result=fitted(kind).evaluate(dls[2], flat), y=images.labels[images.test].numpy())
        return made[kind]
    return get


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_lost_is_lost_by_routing_or_by_assignment(kind, evaluations):
    t = evaluations(kind).result.table
    routed = t[t['HC contains'].notna()]
    assert {'top-1', 'free router', 'oracle router'} <= set(routed.index)
    assert np.allclose(1 - routed['FC'], routed['lost by routing'] + routed['lost by assignment'], atol=1e-12)
    assert (routed['lost by routing'] >= -1e-12).all() and (routed['lost by assignment'] >= -1e-12).all()      # so FC <= HC contains under top-1


@pytest.mark.parametrize('kind', KINDS)
def test_a_cluster_that_contains_the_class_is_met_at_least_as_often_as_its_home(kind, evaluations):
    t = evaluations(kind).result.table.loc[['top-1', 'free router', 'oracle router']]
    assert (t['HC contains'] >= t['HC home']).all()
    if evaluations(kind).m.hierarchy.gamma is None: assert (t['HC contains'] == t['HC home']).all()
    assert t.loc['oracle router', ['HC home', 'HC contains']].tolist() == [1, 1] and t.loc['oracle router', 'lost by routing'] == 0


@pytest.mark.parametrize('kind', [k for k in KINDS if 'overlap' not in k])
def test_no_router_beats_the_oracle_where_clusters_are_disjoint(kind, evaluations):
    t = evaluations(kind).result.table
    assert (t.loc['oracle router', 'FC'] >= t.loc[['top-1', 'free router'], 'FC']).all()


@pytest.mark.parametrize('kind', KINDS)
def test_every_row_is_what_prediction_gives(kind, evaluations, test_images):
    e = evaluations(kind)
    acc = lambda P: (np.asarray(P).argmax(1) == e.y).mean()
    n = e.m.hierarchy.n_clusters
    for way, kwargs in {'top-1': {}, 'product, sum': dict(k=n), 'product, max': dict(k=n, duplicates='max')}.items():
        assert e.result.table.loc[way, 'FC'] == pytest.approx(acc(e.m.predict_proba(test_images, **kwargs)))
    with torch.no_grad(): assert e.result.table.loc['flat net', 'FC'] == pytest.approx(acc(e.flat(e.m.normalize(test_images))))
    assert e.result.n == len(test_images)


@pytest.mark.parametrize('kind', KINDS)
def test_clusters_of_the_evaluation_add_up_to_the_whole(kind, evaluations):
    e = evaluations(kind)
    c, top1 = e.result.clusters, e.result.table.loc['top-1']
    assert c['images'].sum() == len(e.y)
    for column, whole in [('FC', top1['FC']), ('routed here', top1['HC home']), ('expert right', e.result.table.loc['oracle router', 'FC'])]:
        assert (c[column]*c['images']).sum()/len(e.y) == pytest.approx(whole)


def test_the_flat_net_of_an_evaluation_sees_images_as_its_loader_normalises_them(classifier, images):
    other = replace(images.dataloaders(device='cpu', bs=32)[2].normalize, std=(.1, .2, .3))
    dls = images.dataloaders(device='cpu', bs=32)
    for dl in dls: dl.normalize = other
    flat = fit_network(dls, 'MLP_8', short)
    probs, y = probabilities(flat, dls[2])
    found = classifier.evaluate(dls[2], flat).table
    assert found.FC['flat net'] == (probs.argmax(1) == y).mean() and found.FC['top-1'] == classifier.evaluate(images.dataloaders(device='cpu')[2]).table.FC['top-1']


def test_evaluation_does_without_the_flat_net(classifier, dls):
    with_flat = classifier.evaluate(dls[2], network('MLP_4', 9, size=16, seed=0)).table
    without = classifier.evaluate(dls[2]).table
    assert set(with_flat.index) - set(without.index) == {'flat net', 'free router'}
    assert with_flat.loc['top-1'].equals(without.loc['top-1'][with_flat.columns])


def test_routing_by_hand():
    h = ClassHierarchy('abc', [(0, 1), (1, 2)], [0, 0, 1], hierarchy_from_groups([0, 0, 1]).linkage, 2, gamma=1.)
    assert routing_scores(np.array([0, 1, 1, 0]), np.array([0, 1, 2, 2]), h) == {'HC home': .5, 'HC contains': .75}


def test_class_scores_by_hand():
    probs = np.array([[.5, .2, .1, .1, .06, .04], [.5, .2, .1, .1, .06, .04], [.1, .6, .1, .1, .1, 0.], [.5, .2, .1, .1, .1, 0.]])
    s = class_scores(probs, np.array([0, 5, 1, 5]))
    assert s['FC'] == .5 and s['FC macro'] == pytest.approx(2/3)                     # class 0: 1, class 1: 1, class 5: 0
    assert s['FC top-5'] == .5                                                       # class 5 is last of six, then of probability zero


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_calibration_error_is_the_weighted_gap_by_brute_force(n, K, seed):
    rng = np.random.default_rng(seed)
    probs, y = rng.dirichlet(np.full(K, .3), n), rng.integers(0, K, n)
    confidence, right, gaps = probs.max(1), probs.argmax(1) == y, 0
    for b in range(15):
        at = (confidence >= b/15) & ((confidence < (b + 1)/15) | (b == 14))
        if at.any(): gaps += at.mean()*abs(confidence[at].mean() - right[at].mean())
    assert calibration_error(probs, y) == pytest.approx(gaps, abs=1e-9)


def test_evaluation_on_a_shuffled_loader_is_refused(classifier, dls, users):
    for m, d in [(classifier, dls), (users.m, users.dls)]:
        with pytest.raises(ValueError, match='shuffled'): m.evaluate(d.train)


def test_evaluation_on_other_classes_is_refused(classifier, dls):
    with pytest.raises(ValueError, match='2 classes'): classifier.evaluate(class_view(dls, [5, 1])[2])


def test_evaluation_on_a_loader_without_names_of_classes_is_refused_in_words(classifier, test_images):
    pairs = torch.utils.data.DataLoader([(x, 0) for x in test_images], batch_size=7)
    with pytest.raises(ValueError, match='names: pass a fastai loader'): classifier.evaluate(pairs)
    with pytest.raises(ValueError, match='names: pass a fastai loader'): classifier.evaluate(test_images)


# ---- save and load

@pytest.mark.parametrize('kind', KINDS)
def test_a_loaded_classifier_predicts_the_same_to_the_bit(kind, fitted, test_images, tmp_path):
    m = fitted(kind)
    again = HierarchicalClassifier.load(m.save(tmp_path/'m'))
    for kwargs in ({}, dict(k=m.hierarchy.n_clusters), dict(k=m.hierarchy.n_clusters, duplicates='max')):
        assert np.array_equal(again.predict_proba(test_images, **kwargs), m.predict_proba(test_images, **kwargs))
    assert again.hierarchy == m.hierarchy and again.normalize == m.normalize and again.recipe == m.recipe and again.seed == m.seed
    assert repr(again) == repr(m)
    assert [s.name for s in again.expert_specs] == [s.name for s in m.expert_specs]


def test_convolutions_come_back_to_the_bit_too(images, dls, test_images, tmp_path):
    m = HierarchicalClassifier(hierarchy('some singletons', images), 'MLP_8', 'CNN_3', one_epoch).fit(dls, progress=False)
    assert np.array_equal(HierarchicalClassifier.load(m.save(tmp_path/'m')).predict_proba(test_images), m.predict_proba(test_images))


def test_a_loaded_classifier_can_be_saved_again_and_is_the_same(classifier, tmp_path):
    one = classifier.save(tmp_path/'one')
    two = HierarchicalClassifier.load(one).save(tmp_path/'two')
    for name in ('classifier.json', 'model.safetensors'): assert (one/name).read_bytes() == (two/name).read_bytes()


def test_the_folder_says_where_the_model_comes_from_and_holds_no_pickle(classifier, tmp_path):
    folder = classifier.save(tmp_path/'a'/'deep'/'folder', provenance={'images': 'synthetic', 'epochs': np.int64(2), 'accuracy': torch.tensor(.5)})
    about = json.loads((folder/'classifier.json').read_text())
    assert about['provenance'] == {'images': 'synthetic', 'epochs': 2, 'accuracy': .5} and {'hdfast', 'torch', 'python'} <= set(about['versions'])
    assert sorted(f.name for f in folder.iterdir()) == ['classifier.json', 'model.safetensors'] and not [f for f in folder.parent.iterdir() if f != folder]


@pytest.mark.parametrize('name', ['learner.pkl', 'model.pth', 'model.pt'])
@pytest.mark.parametrize('exists', [False, True])
def test_a_pickle_is_refused_unread(name, exists, tmp_path):
    if exists: (tmp_path/name).write_bytes(b'cos\nsystem\n(S"touch hacked"\ntR.')
    with pytest.raises(ValueError, match='run any code'): HierarchicalClassifier.load(tmp_path/name)


def test_what_is_no_saved_classifier_is_not_loaded(classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match='no classifier.json'): HierarchicalClassifier.load(tmp_path/'nowhere')
    (tmp_path/'notes.txt').write_text('x')
    with pytest.raises(FileNotFoundError, match='no classifier.json'): HierarchicalClassifier.load(tmp_path)
    (classifier.save(tmp_path/'m')/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no model.safetensors'): HierarchicalClassifier.load(tmp_path/'m')


def edit_json(folder, change):
    d = json.loads((folder/'classifier.json').read_text())
    change(d)
    (folder/'classifier.json').write_text(json.dumps(d))


def edit_weights(folder, change):
    state = load_file(folder/'model.safetensors')
    change(state)
    save_file(state, folder/'model.safetensors')


@pytest.mark.parametrize('format', ['hdfast.HierarchicalClassifier.2', 'other', None])
def test_another_format_is_refused_and_named(format, classifier, tmp_path):
    folder = classifier.save(tmp_path/'m')
    edit_json(folder, lambda d: d.update(format=format))
    with pytest.raises(ValueError, match=f'format .*{format}'): HierarchicalClassifier.load(folder)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('router.head.out.bias'), 'router.head.out.bias is missing'),
    (lambda s: s.update(ghost=torch.zeros(1)), "ghost isn't part of this classifier"),
    (lambda s: s.update({'router.head.out.weight': torch.zeros(7, 7)}), r'router.head.out.weight has shape \(7, 7\), not'),
    (lambda s: [s.pop(k) for k in list(s)], r'\(and \d+ more\)'),
], ids=['missing', 'extra', 'shape', 'all missing'])
@pytest.mark.parametrize('kind', ['overlap', 'nested'])
def test_weights_that_differ_from_the_description_are_named(kind, change, message, fitted, tmp_path):
    folder = fitted(kind).save(tmp_path/'m')
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message): HierarchicalClassifier.load(folder)


def test_weights_of_a_nested_classifier_are_named_by_their_place(fitted, tmp_path):
    folder = fitted('nested').save(tmp_path/'m')
    edit_weights(folder, lambda s: s.pop('expert_0.router.head.out.bias'))
    with pytest.raises(ValueError, match='expert_0.router.head.out.bias is missing'): HierarchicalClassifier.load(folder)


@pytest.mark.parametrize('change', [lambda d: d['router'].update(fc=[[9]]), lambda d: d.update(shape=[3, 20, 20]), lambda d: d['experts'].pop(),
                                    lambda d: d['hierarchy'].update(home=[0]*9), lambda d: d['hierarchy'].update(format='x')],
                         ids=['another router', 'another size', 'an expert less', 'a home outside its cluster', 'no hierarchy'])
def test_a_description_that_differs_from_the_weights_is_refused(change, classifier, tmp_path):
    folder = classifier.save(tmp_path/'m')
    edit_json(folder, change)
    with pytest.raises(ValueError): HierarchicalClassifier.load(folder)


@pytest.mark.parametrize('spoil', [
    lambda f: (f/'classifier.json').write_text('[1]'),
    lambda f: edit_json(f, lambda d: d.pop('router')),
    lambda f: edit_json(f, lambda d: d.update(shape=None)),
    lambda f: edit_json(f, lambda d: d['recipe'].update(unknown=1)),
    lambda f: edit_json(f, lambda d: d.update(normalize={'mean': [0.], 'std': [1.]})),
    lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:100]),
    lambda f: (f/'model.safetensors').write_bytes(b''),
    lambda f: edit_weights(f, lambda s: s.update({k: v.half() for k, v in s.items()})),
], ids=['a list', 'no router', 'no size', 'unknown recipe', 'one channel', 'weights cut off', 'weights empty', 'half precision'])
def test_a_damaged_folder_is_refused_with_a_value_error(spoil, classifier, tmp_path):
    folder = classifier.save(tmp_path/'m')
    spoil(folder)
    with pytest.raises(ValueError): HierarchicalClassifier.load(folder)


@pytest.mark.parametrize('name, content', [('classifier.json', b''), ('classifier.json', b'{"format": '), ('classifier.json', b'\xff\xfe'), ('classifier.json', b'[1]'),
                                           ('model.safetensors', b'short')], ids=str)
def test_a_damaged_file_is_named(name, content, classifier, tmp_path):
    file = classifier.save(tmp_path/'m')/name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f'{file} is damaged'): HierarchicalClassifier.load(file.parent)


def test_a_classifier_of_another_version_that_cannot_be_read_is_named(classifier, tmp_path):
    file = classifier.save(tmp_path/'m')/'classifier.json'
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | dict(recipe=about['recipe'] | dict(momenta=2), versions=about['versions'] | dict(hdfast='99.1'))))
    with pytest.raises(ValueError, match='written by 99.1, this is .*momenta'): HierarchicalClassifier.load(file.parent)


def test_a_classifier_of_another_kind_than_asked_for_is_named(classifier, tmp_path):
    with pytest.raises(ValueError, match='describes a HierarchicalClassifier, which is no CalibratedClassifier: use HierarchicalClassifier.load'):
        CalibratedClassifier.load(classifier.save(tmp_path/'m'))
    edit_json(tmp_path/'m', lambda d: d.update(format='mine.Forest.1'))
    with pytest.raises(ValueError, match='its class has to be imported first'): CalibratedClassifier.load(tmp_path/'m')


def test_saving_replaces_an_older_model(fitted, test_images, tmp_path):
    fitted('taxonomy').save(tmp_path/'m')
    fitted('overlap').save(tmp_path/'m')
    assert HierarchicalClassifier.load(tmp_path/'m').hierarchy == fitted('overlap').hierarchy
    assert [f.name for f in tmp_path.iterdir()] == ['m']
    (tmp_path/'empty').mkdir()
    assert HierarchicalClassifier.load(fitted('overlap').save(tmp_path/'empty'))


def test_a_folder_of_something_else_is_not_overwritten(classifier, tmp_path):
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'chapter.tex').write_text('years of work')
    with pytest.raises(FileExistsError, match='something other'): classifier.save(tmp_path/'thesis')
    assert [f.name for f in tmp_path.rglob('*')] == ['thesis', 'chapter.tex']


@pytest.mark.parametrize('about', [None, '{"of": "another program"}'], ids=['beside a saved model', "another program's classifier.json"])
def test_saving_deletes_nothing_that_it_did_not_write(about, classifier, tmp_path):
    folder = tmp_path/'m'
    if about is None: classifier.save(folder)
    else: folder.mkdir(), (folder/'classifier.json').write_text(about)
    (folder/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='something other'): classifier.save(folder)
    assert (folder/'notes.txt').exists()


def test_a_repository_around_a_saved_model_is_kept(classifier, tmp_path):
    ((folder := classifier.save(tmp_path/'m'))/'.git').mkdir()
    with pytest.raises(FileExistsError, match='something other'): classifier.save(folder)
    assert (folder/'.git').exists()


def calibrated(m): return CalibratedClassifier(m, Temperatures(1., (1.,)*m.hierarchy.n_clusters, 1.))


def test_a_saved_classifier_of_another_kind_is_replaced_too(classifier, tmp_path):
    for m in (classifier, calibrated(classifier), classifier):
        m.save(tmp_path/'m')
        assert type(HierarchicalClassifier.load(tmp_path/'m')) is type(m)


@pytest.mark.parametrize('make, message', [
    (lambda f: (f.parent.mkdir(), f.write_text('a file')), 'something other'),
    (lambda f: (f.mkdir(parents=True), (f/'classifier.json').write_text('{"format": "hdfast.HierarchicalClassifier.1"}')), 'something other'),
    (lambda f: (f.mkdir(parents=True), (f/'.DS_Store').write_text('')), None),
    (lambda f: (f.mkdir(parents=True), (f/'.env').write_text('')), 'something other'),
    (lambda f: f.mkdir(parents=True), None),
    (lambda f: None, None),
], ids=['a file', 'a description alone', 'litter', 'a hidden file', 'empty', 'absent'])
def test_where_a_classifier_can_go_is_known_before_it_is_saved(make, message, classifier, tmp_path):
    make(folder := tmp_path/'deep'/'m')
    if message:
        with pytest.raises(FileExistsError, match=message): check_replaceable(folder)
    else:
        check_replaceable(folder)
        assert HierarchicalClassifier.load(classifier.save(folder))


def test_what_an_earlier_process_left_does_not_stop_a_save(classifier, tmp_path):
    for what in ('part', 'old'): (tmp_path/f'.m.{what}{os.getpid()}').mkdir() # process ids come again, in a container
    assert HierarchicalClassifier.load(classifier.save(tmp_path/'m'))


@pytest.mark.parametrize('older', [False, True])
@pytest.mark.parametrize('broken', ['weights', 'json'])
def test_a_save_that_fails_leaves_the_older_model_or_nothing(older, broken, fitted, test_images, tmp_path, monkeypatch):
    if older: fitted('taxonomy').save(tmp_path/'m')
    def killed(file, data):
        with open(file, 'wb') as f: f.write(b'half')
        raise OSError('no space left')
    with monkeypatch.context() as full:
        if broken == 'weights': full.setattr(Path, 'write_bytes', killed)
        with pytest.raises(OSError if broken == 'weights' else TypeError): fitted('overlap').save(tmp_path/'m', provenance=object() if broken == 'json' else None)
    if older: assert np.array_equal(HierarchicalClassifier.load(tmp_path/'m').predict_proba(test_images), fitted('taxonomy').predict_proba(test_images))
    else: assert not (tmp_path/'m').exists()


def test_after_a_save_that_failed_the_next_one_succeeds(classifier, tmp_path):
    with pytest.raises(TypeError): classifier.save(tmp_path/'m', provenance=object())
    classifier.save(tmp_path/'m')
    assert [f.name for f in tmp_path.iterdir()] == ['m']


def test_a_rename_that_fails_leaves_the_older_model_in_place(fitted, tmp_path, monkeypatch):
    fitted('taxonomy').save(tmp_path/'m')
    real = os.replace
    def replace(a, b):
        if Path(a).name == 'new': raise OSError('cannot rename')
        return real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(OSError): fitted('overlap').save(tmp_path/'m')
    monkeypatch.undo()
    assert HierarchicalClassifier.load(tmp_path/'m').hierarchy == fitted('taxonomy').hierarchy
    assert [f.name for f in tmp_path.iterdir()] == ['m']


def test_whatever_name_can_be_saved_to_can_be_loaded_from(classifier, tmp_path):
    HierarchicalClassifier.load(classifier.save(tmp_path/'resnet.pt'))


# ---- a user's own loaders

@pytest.fixture(scope='module')
def users(image_folder, images):
    "A user's fastai DataLoaders and a classifier fitted on them."
    dls = ImageDataLoaders.from_folder(image_folder, valid_pct=.2, seed=0, bs=32, num_workers=0, device='cpu')
    return SimpleNamespace(dls=dls, m=fit(hierarchy('overlap', images), dls))


def test_a_classifier_fitted_on_a_users_loaders_predicts_from_them_and_from_files(users, image_folder):
    want = users.m.predict_proba(users.dls.valid)
    files = users.dls.valid.dataset.items
    assert np.allclose(users.m.predict_proba(users.dls.test_dl(files)), want, atol=1e-5)
    some = get_image_files(image_folder)[:9]
    assert np.allclose(users.m.predict_proba(users.dls.test_dl(some)), np.concatenate([users.m.predict_proba(users.dls.test_dl([f])) for f in some]), atol=1e-5)


def test_a_classifier_fitted_on_a_users_loaders_is_evaluated_by_the_labels_of_the_files(users):
    labels = [list(users.dls.vocab).index(parent_label(f)) for f in users.dls.valid.dataset.items]
    want = (users.m.predict(users.dls.valid) == labels).mean()
    assert users.m.evaluate(users.dls.valid).table.loc['top-1', 'FC'] == pytest.approx(want)
    assert users.m.evaluate(users.dls.test_dl(users.dls.valid.dataset.items, with_labels=True)).table.loc['top-1', 'FC'] == pytest.approx(want)


def test_a_classifier_fitted_on_a_users_loaders_comes_back_to_the_bit(users, tmp_path):
    again = HierarchicalClassifier.load(users.m.save(tmp_path/'m'))
    assert again.normalize is None and np.array_equal(again.predict_proba(users.dls.valid), users.m.predict_proba(users.dls.valid))


def test_raw_pixels_are_refused_where_only_the_loaders_know_how_to_normalise(users, test_images):
    with pytest.raises(ValueError, match='pass such a loader'): users.m.predict(test_images)


# ---- decompose

@pytest.mark.parametrize('source', ['dls', 'folder'])
def test_decompose_gives_a_flat_net_its_confusion_and_a_trained_family(source, dls, users, images):
    d = dls if source == 'dls' else users.dls
    one, again = (decompose(d, 3, gamma=2, flat='MLP_16', router='MLP_8', expert='MLP_6', recipe=one_epoch, seed=1, progress=False) for _ in range(2))
    assert check_confusion(one.confusion).shape == (9, 9)
    assert one.classifier.hierarchy == cluster_classes(one.confusion, one.classifier.hierarchy.max_size, 2, images.classes)
    assert np.allclose(one.classifier.predict_proba(d.valid).sum(1), 1, atol=1e-5)
    assert np.array_equal(one.classifier.predict_proba(d.valid), again.classifier.predict_proba(d.valid))      # by the seed


def test_decompose_takes_a_flat_net_that_is_trained_already(dls):
    flat = fit_network(dls, 'MLP_16', short)
    before = [p.clone() for p in flat.parameters()]
    family = decompose(dls, flat=flat, router='MLP_8', expert='MLP_6', recipe=short, progress=False)
    assert family.flat is flat and all(torch.equal(a, b) for a, b in zip(before, flat.parameters()))
    assert family.classifier.hierarchy.gamma is None


# ---- early errors, and nothing in the wrong place

@pytest.mark.parametrize('settings, message', [
    (dict(expert='CNN_9'), 'no network is called'), (dict(router='CNN_9'), 'no network is called'), (dict(n_clusters=10), "can't make 10 clusters"),
    (dict(gamma=-1.), 'gamma must be positive'), (dict(expert='CNN_TL_1'), 'needs images of at least')])
def test_decompose_refuses_before_it_trains(settings, message, dls, monkeypatch):
    monkeypatch.setattr(hierarchical, 'fit_network', None) # nothing may be trained
    with pytest.raises(ValueError, match=message): decompose(dls, **{**dict(flat='MLP_8', router='MLP_8', expert='MLP_6', recipe=one_epoch), **settings})


def test_decompose_needs_held_out_images(images):
    dls = images.dataloaders(device='cpu', bs=32)
    dls.loaders = dls.loaders[:1]
    with pytest.raises(ValueError, match='no held-out images'): decompose(dls, flat='MLP_8', router='MLP_8', expert='MLP_6', recipe=one_epoch)


def test_the_home_folder_is_found_and_links_stay_links(classifier, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    assert classifier.save('~/model') == tmp_path/'home'/'model' and not (tmp_path/'~').exists()
    HierarchicalClassifier.load('~/model')
    (tmp_path/'latest').symlink_to(tmp_path/'home'/'model')
    classifier.save('latest', provenance='second')
    assert (tmp_path/'latest').is_symlink() and json.loads((tmp_path/'home'/'model'/'classifier.json').read_text())['provenance'] == 'second'


def test_the_current_folder_is_not_replaced(classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='is the current folder'): classifier.save('.')


def test_no_images_are_no_evaluation(classifier, images):
    empty = images.dataloaders(device='cpu')[2]
    empty.dataset.index = empty.dataset.index[:0]
    with pytest.raises(ValueError, match='nothing to evaluate'): classifier.evaluate(empty)


def test_the_seed_is_that_of_fastai_transforms_too(tmp_path):
    from PIL import Image
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(8): Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 32, 3), dtype=np.uint8)).save(tmp_path/c/f'{i}.png')
    from fastai.vision.all import Resize
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, seed=1, item_tfms=Resize(16), bs=4, device='cpu', num_workers=0) # crops at random
    one, again = (fit_network(dls, 'MLP_8', one_epoch, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters()))


def test_a_device_that_is_not_there_leaves_the_classifier_as_it_was(classifier, test_images):
    before = classifier.predict(test_images)
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)): classifier.to('cuda:99')
    assert classifier.device.type == 'cpu' and (classifier.predict(test_images) == before).all()


def test_loaders_of_bare_images_and_empty_ones(classifier, test_images):
    x = classifier.normalize(test_images[:5])
    plain = torch.utils.data.DataLoader(x, batch_size=2)
    assert (classifier.predict(plain) == classifier.predict(x)).all()
    with pytest.raises(ValueError, match='the loader has no images'): classifier.predict(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:0])))


@pytest.mark.parametrize('k', [0, 3])
def test_as_many_clusters_as_there_are_can_be_followed(k):
    with pytest.raises(ValueError, match=f'k = {k}: 1 to 2 clusters'): combine(torch.tensor([[.6, .4]]), lambda i, rows: torch.ones(len(rows), 1), [(0,), (1,)], 2, k)


def test_a_seed_of_numpy_is_saved_as_a_number(taxonomy, dls, tmp_path):
    m = HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', recipe('paper', epochs=1)).fit(dls, progress=False)
    m.seed = np.int64(3)
    assert HierarchicalClassifier.load(m.save(tmp_path/'m')).seed == 3


@pytest.mark.parametrize('scale', [1, 255], ids=['0 to 255', '0 to 1'])
def test_floats_that_look_like_pixels_are_warned_of(classifier, test_images, scale):
    from fastai.torch_core import TensorImage
    for some in (test_images/scale, TensorImage(test_images/scale), [TensorImage(x/scale) for x in test_images[:3]]):
        with pytest.warns(UserWarning, match='look like pixels'): classifier.predict(some)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        classifier.predict(classifier.normalize(test_images))


def test_scores_take_tensors(classifier, dls):
    p, y = classifier.predict_proba(dls[2]), dls[2].dataset.targets
    assert calibration_error(torch.tensor(p), y) == calibration_error(p, y.numpy())
    assert class_scores(torch.tensor(p), y) == class_scores(p, y.numpy())


def test_an_untrained_classifier_has_no_networks(taxonomy):
    with pytest.raises(ValueError, match="isn't trained yet"): HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4').networks


# what a practitioner may hand over by mistake

@pytest.mark.parametrize('wrong', ['photo.jpg', [Path('a.png')], {'x': 1}, SimpleNamespace()], ids=['name', 'paths', 'dict', 'something'])
def test_what_is_no_image_is_told_from_images(classifier, wrong):
    with pytest.raises(ValueError, match='read_images'): classifier.predict(wrong)


def test_a_list_of_images_is_as_good_as_an_array(classifier, test_images):
    whole = classifier.predict_proba(test_images[:5])
    for some in (list(test_images[:5]), tuple(test_images[:5]), test_images[:5].numpy(), list(test_images[:5].numpy())):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Creating a tensor from a list')
            assert np.array_equal(classifier.predict_proba(some), whole)


def test_batches_of_dicts_are_refused(classifier, test_images):
    loader = torch.utils.data.DataLoader([{'image': x} for x in test_images[:4]], batch_size=2)
    with pytest.raises(ValueError, match="batches are dicts; tuples"): classifier.predict(loader)


@pytest.mark.parametrize('k', [2., 'all', None, 0, 99])
def test_clusters_to_follow_are_a_whole_number(classifier, test_images, k):
    with pytest.raises(ValueError, match='clusters to follow'): classifier.predict(test_images[:2], k=k)


def _with_labels(images, change, **kwargs):
    "Plain loaders of the images, whose labels `change` has altered."
    from fastai.vision.all import DataLoaders
    normalised = (images.images/255 - .5)/.25
    class Some(list): vocab = images.classes
    part = lambda rows: Some((normalised[i], change(int(images.labels[i]))) for i in rows.tolist())
    return DataLoaders.from_dsets(part(images.train), part(images.held_out), bs=16, **kwargs)


@pytest.mark.parametrize('change,message', [(lambda y: torch.tensor(-1 if y == 8 else y), r'have a label outside 0 to 8, such as -1'), (lambda y: torch.tensor(y + 1), 'such as 9'),
                                            (lambda y: torch.eye(9)[y], 'one class id for each is needed'), (lambda y: torch.tensor(y + .5), 'one class id for each is needed')],
                         ids=['without a label', 'from 1', 'one-hot', 'fractions'])
def test_labels_that_are_no_classes_are_refused_before_training(images, taxonomy, monkeypatch, change, message):
    monkeypatch.setattr(families, 'train', lambda *args, **kwargs: pytest.fail('trained'))
    with pytest.raises(ValueError, match=message): HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(_with_labels(images, change), progress=False)
    if 'one class id' not in message: return # the loss of the flat network refuses these
    with pytest.raises(ValueError, match=message): decompose(_with_labels(images, change), 3, flat='MLP_4', router='MLP_4', expert='MLP_4', recipe=one_epoch)


@pytest.mark.parametrize('change', [float, np.float32, lambda y: torch.tensor([y])], ids=['float', 'float32', 'one element'])
def test_whole_numbers_of_any_kind_are_classes(images, taxonomy, change):
    HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(_with_labels(images, change), progress=False)


def test_training_asks_for_no_labels_that_it_does_not_use(images, taxonomy):
    from fastai.vision.all import DataLoaders
    plain, fit = _with_labels(images, int), lambda dls: HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(dls, progress=False)
    fit(DataLoaders(plain.train))
    spoiled = _with_labels(images, lambda y: -1).valid
    fit(DataLoaders(*plain.loaders, spoiled))
    TrunkClassifier(taxonomy, recipe=one_epoch).fit(DataLoaders(plain.train))


def test_held_out_images_that_could_not_be_told_apart_are_refused_before_training(images, monkeypatch):
    monkeypatch.setattr(hierarchical, 'fit_network', lambda *args, **kwargs: pytest.fail('trained'))
    with pytest.raises(ValueError, match='leaves out the last'): decompose(_with_labels(images, torch.tensor, drop_last=True), flat='MLP_4', router='MLP_4', expert='MLP_4')


def test_loaders_without_class_names_are_refused(images, taxonomy):
    from fastai.vision.all import DataLoaders
    plain = [(images.images[i].float(), int(images.labels[i])) for i in images.train.tolist()]
    dls = DataLoaders.from_dsets(plain, plain, bs=16)
    for f in (lambda: decompose(dls), lambda: HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(dls)):
        with pytest.raises(ValueError, match='no class names: give their dataset a `vocab`'): f()


def test_a_class_without_a_training_image_is_named(dls, taxonomy):
    view = dls.train.dataset
    rest = view.targets != 4
    dls.loaders[0] = dls.train.new(view.select(view.index[rest], view.targets[rest], view.vocab))
    with pytest.warns(UserWarning, match=f'no training image of {taxonomy.classes[4]}: no network will ever name'): HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(dls, progress=False)


def test_what_could_not_be_loaded_again_is_not_saved_over_what_can(classifier, tmp_path):
    from copy import deepcopy
    classifier.save(tmp_path/'m')
    before = (tmp_path/'m'/'model.safetensors').read_bytes()
    half = deepcopy(classifier)
    for net in half.networks: net.half()
    other = deepcopy(classifier)
    other.experts[0] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 3))
    class Own(HierarchicalClassifier):
        def __init__(self, one): vars(self).update(vars(one))
    for broken, message in ((half, 'is torch.float16, not torch.float32'), (other, 'is missing'), (Own(classifier), 'TypeError')):
        with pytest.raises(ValueError, match=f"couldn't be loaded again: .*{message}"): broken.save(tmp_path/'m')
    assert (tmp_path/'m'/'model.safetensors').read_bytes() == before


def test_a_flat_network_gives_scores_and_not_probabilities(images, dls, classifier):
    from hdfast.learners import held_out_confusion
    net = fit_network(dls, 'MLP_8', one_epoch)
    for last in (torch.nn.Softmax(1), torch.nn.Sequential(torch.nn.Softmax(1), torch.nn.ReLU())):
        with pytest.raises(ValueError, match='gives probabilities, as after a softmax'): held_out_confusion(torch.nn.Sequential(net, last), dls)
        with pytest.raises(ValueError, match='gives probabilities, as after a softmax'): classifier.evaluate(dls[2], torch.nn.Sequential(net, last))
    np.testing.assert_allclose(held_out_confusion(torch.nn.Sequential(net, torch.nn.LogSoftmax(1)), dls), held_out_confusion(net, dls), atol=1e-6) # its exponentials are the same probabilities
    class Halves(torch.nn.Module):
        def forward(self, x): return net(x).bfloat16()
    np.testing.assert_allclose(held_out_confusion(Halves(), dls), held_out_confusion(net, dls), atol=.02)
    assert classifier.evaluate(dls[2], Halves()).table.FC['flat net'] == pytest.approx(classifier.evaluate(dls[2], net).table.FC['flat net'], abs=.1)
