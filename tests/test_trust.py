"Temperatures, calibrated classifiers, answers that stop at the cluster, and distances of mistakes: cases worked out by hand."
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdfast.clustering import ClassHierarchy, cluster_recursively, hierarchy_from_groups
from hdfast.hierarchical import HierarchicalClassifier, calibration_error
from hdfast.learners import recipe
from hdfast.networks import Conv, NetworkSpec, Stage, mlp_spec
from hdfast.trunk import TrunkClassifier, trunk_spec
from hdfast.trust import (CalibratedClassifier, Opinions, Temperatures, calibrate, cluster_sums, coverage_area, fit_temperature, fit_temperatures,
                          group_distances, meeting_heights, meeting_sizes, mistake_distances, negative_log_likelihood, opinions,
                          plot_reliability, plot_stop_curve, reliability, stop_at_cluster, stop_curve, temper, threshold_for)

how, little = recipe('one_cycle', epochs=2, bs=32), NetworkSpec('little', [Stage([Conv(3, 8)]), Stage([Conv(3, 8)])])
toy = hierarchy_from_groups([0, 0, 1, 1, 1], 'abcde')


@pytest.fixture
def overlapping(taxonomy): # class 0 in all clusters, 4 in two
    return ClassHierarchy(taxonomy.classes, [(0, 1, 2), (0, 3, 4, 5), (0, 4, 6, 7, 8)], taxonomy.home, taxonomy.linkage, 5, gamma=3)


def separate(h): return HierarchicalClassifier(h, mlp_spec(8), mlp_spec(6), how)
def trunk(h): return TrunkClassifier(h, trunk_spec(little, shared=(), router=(8,), expert=(6,), dropout=0), how)


@pytest.fixture(params=[separate, trunk], ids=['separate networks', 'trunk'])
def new_model(request): return request.param


def random_probs(seed, n=200, K=5, scale=3.): return torch.from_numpy(scale*np.random.default_rng(seed).normal(size=(n, K))).softmax(1).numpy()


def own_likelihoods(probs, seed):
    "Classes drawn with just these probabilities."
    return (probs.cumsum(1) > np.random.default_rng(seed).random(len(probs))[:, None]).argmax(1)


def random_opinions(h, seed, n=400, zeros=()):
    "Opinions with classes drawn from their own product."
    rng = np.random.default_rng(seed)
    p = torch.from_numpy(rng.normal(size=(n, h.n_clusters))*2).softmax(1)
    q = [torch.from_numpy(rng.normal(size=(n, len(c)))*2).softmax(1) for c in h.clusters]
    o = Opinions(h, p, lambda i, rows: q[i][rows])
    return Opinions(h, p, o.ask, own_likelihoods(o.joint(h.n_clusters), seed))


# one temperature

def test_temperature_of_probabilities_is_that_of_scores():
    z = torch.randn(7, 4, dtype=torch.float64)
    assert torch.allclose(temper(z.softmax(1), 2.5), (z/2.5).softmax(1))


def test_temperature_2_takes_the_square_root_and_zeros_stay():
    assert np.allclose(temper(np.array([[.64, .36, 0.]]), 2), [[.8/1.4, .6/1.4, 0]])


@pytest.mark.parametrize('t', [0, -1, np.inf, np.nan])
def test_impossible_temperatures_are_refused(t):
    with pytest.raises(ValueError, match='must be positive'): temper(np.array([[.5, .5]]), t)
    with pytest.raises(ValueError, match='must be positive'): Temperatures(1., (1., t), 1.)


def test_fitted_temperature_by_hand():
    assert fit_temperature([[.9, .1]]*4, [0, 0, 0, 1]) == pytest.approx(2, abs=1e-3)
    assert fit_temperature([[.75, .25]]*10, [0]*9 + [1]) == pytest.approx(.5, abs=1e-3)


@given(st.integers(0, 99), st.floats(.3, 4))
def test_fitted_temperature_undoes_a_temperature(seed, t):
    honest = random_probs(seed)
    y = own_likelihoods(honest, seed)
    at_best = fit_temperature(honest, y)
    assert fit_temperature(temper(honest, t), y) == pytest.approx(at_best/t, rel=2e-3)


@given(st.integers(0, 99))
def test_no_temperature_nearby_is_better(seed):
    probs, y = random_probs(seed), np.random.default_rng(seed + 1).integers(0, 5, 200) % 3
    t = fit_temperature(probs, y)
    at = lambda t: negative_log_likelihood(temper(probs, t), y)
    assert at(t) <= min(at(t*f) for f in (.5, .9, 1.1, 2) if 1/20 <= t*f <= 20) + 1e-9


def test_nothing_wrong_and_nothing_right_end_at_the_ends_of_the_range():
    assert fit_temperature([[.6, .4]]*5, [0]*5) == pytest.approx(1/20, rel=1e-2)
    assert fit_temperature([[.6, .4]]*5, [1]*5) == pytest.approx(20, rel=1e-2)


scored = pytest.mark.parametrize('score', [calibration_error, negative_log_likelihood, reliability, coverage_area, fit_temperature, lambda P, y: threshold_for(P, y, .5),
                                           lambda P, y: stop_curve(P, P, y, hierarchy_from_groups([0, 1]))],
                                 ids=['calibration_error', 'negative_log_likelihood', 'reliability', 'coverage_area', 'fit_temperature', 'threshold_for', 'stop_curve'])

@scored
@pytest.mark.parametrize('P,y,message', [([[3., -1.], [2., 0.]], [0, 1], 'these look like logits'), ([[3., 1.], [2., 0.]], [0, 1], 'these look like logits'), ([[np.nan, 1.], [0., 1.]], [0, 1], 'NaN or infinite'),
                                         ([[.5, .5]]*2, [0], '1 classes for confidences'), ([[.5, .5]]*2, [0, -1], 'targets run from -1'), ([[.5, .5]]*2, [0, 2], 'to 2')])
def test_what_is_scored_are_confidences_with_a_class_each(score, P, y, message):
    with pytest.raises(ValueError, match=message): score(np.array(P), np.array(y))


def test_fit_needs_a_class_for_each_image():
    with pytest.raises(ValueError, match='0 classes for confidences'): fit_temperature(np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match=r'1 classes for confidences of shape \(2, 2\)'): fit_temperature([[.5, .5]]*2, [0])


def test_likelihood_by_hand_and_its_floor():
    assert negative_log_likelihood(np.array([[.5, .5], [.25, .75]]), [0, 0]) == pytest.approx(1.5*np.log(2))
    assert 87 < negative_log_likelihood(np.array([[1., 0.]]), [1]) < 88


def test_reliability_by_hand():
    probs = np.array([[.9, .1], [.92, .08], [.45, .55], [.6, .4]])
    table = reliability(probs, np.array([0, 1, 1, 0]), bins=10)
    assert table.index.tolist() == [5, 6, 9] and table.share.tolist() == [.25, .25, .5]
    assert np.allclose(table.confidence, [.55, .6, .91]) and table.accuracy.tolist() == [1, 1, .5]


@given(st.integers(0, 99))
def test_reliability_adds_up_to_the_calibration_error(seed):
    probs, y = random_probs(seed), np.random.default_rng(seed).integers(0, 5, 200)
    t = reliability(probs, y)
    assert (t.share*abs(t.confidence - t.accuracy)).sum() == pytest.approx(calibration_error(probs, y))


# a family's opinions and temperatures

def test_joint_keeps_the_cluster_s_probability():
    q = [torch.tensor([[.9, .1]]), torch.tensor([[.2, .3, .5]])]
    o = Opinions(toy, torch.tensor([[.4, .6]]), lambda i, rows: q[i][rows])
    assert np.allclose(o.joint(), [[0, 0, .12, .18, .3]]) and np.allclose(o.joint(2), [[.36, .04, .12, .18, .3]])
    with pytest.raises(ValueError, match='there are 2 clusters'): o.joint(3)


def test_temperatures_by_hand():
    # the router says .9 and is right in 3 of 4 (T = 2), expert 0 says 16/17 and is right in 4 of 5 (T = 2), expert 1 says .8 of two and is right in 4 of 5 (T = 1)
    h, y = hierarchy_from_groups([0, 0, 1, 1], 'abcd'), np.repeat([0, 1, 2, 3], 20)
    right_cluster, right_class = np.tile([1, 1, 1, 0], 20).astype(bool), np.tile([1, 1, 1, 1, 0], 16).astype(bool)
    first = lambda is_first, right, says: torch.from_numpy(np.where(is_first == right, says, 1 - says))
    pair = lambda v: torch.stack([v, 1 - v], 1)
    q = [pair(first(y % 2 == 0, right_class, says)) for says in (16/17, .8)]
    o = Opinions(h, pair(first(y < 2, right_cluster, .9)), lambda i, rows: q[i][rows], y)
    t = fit_temperatures(o, least=40)
    assert np.allclose([t.router, *t.experts], [2, 2, 1], atol=1e-3)
    shared = fit_temperatures(o, 'shared')
    assert set(shared.experts) == {shared.shared} == {t.shared} and 1 < t.shared < 2 and shared.router == pytest.approx(2, abs=1e-3)
    assert fit_temperatures(o, least=41) == shared


def test_an_expert_without_a_mistake_shares_the_others_temperature():
    o = random_opinions(toy, 0)
    clear = lambda i, rows: o.ask(i, rows) if i else temper(torch.nn.functional.one_hot(torch.from_numpy(o.y)[rows].clamp(max=1), 2)*.2 + .4, 1)
    t = fit_temperatures(Opinions(toy, o.p, clear, o.y), least=5)
    assert t.experts[0] == t.shared != t.experts[1]


def test_single_classes_and_single_clusters_have_temperature_1():
    y, one = np.array([0, 1, 1]), lambda i, rows: torch.ones(len(rows), 1)
    t = fit_temperatures(Opinions(hierarchy_from_groups([0, 1], 'ab'), torch.tensor([[.6, .4]]*3), one, y))
    assert t.shared == 1 and t.experts == (1, 1) and t.router != 1
    all_in_one = hierarchy_from_groups([0, 0], 'ab')
    assert fit_temperatures(Opinions(all_in_one, torch.ones(3, 1), lambda i, rows: torch.full((len(rows), 2), .5), y)).router == 1


def test_an_expert_without_images_shares_the_others_temperature():
    o = random_opinions(toy, 1)
    few = np.flatnonzero(o.y > 1)
    t = fit_temperatures(Opinions(toy, o.p[few], lambda i, rows: o.ask(i, torch.from_numpy(few)[rows]), o.y[few]), least=1)
    assert t.experts[0] == t.shared == pytest.approx(t.experts[1])


@given(st.integers(0, 30))
def test_temperatures_of_disjoint_clusters_are_best_for_the_product(seed):
    o = random_opinions(toy, seed)
    t = fit_temperatures(o, least=1)
    at = lambda t: negative_log_likelihood(o.tempered(t).joint(2), o.y)
    best = at(t)
    for f in (.8, 1.25):
        assert best <= at(Temperatures(t.router*f, t.experts, t.shared)) + 1e-9
        for i in range(2): assert best <= at(Temperatures(t.router, [v*(f if i == j else 1) for j, v in enumerate(t.experts)], t.shared)) + 1e-9


def test_router_of_overlapping_clusters_is_fitted_to_the_sum(overlapping):
    o = random_opinions(overlapping, 3, n=2000)
    assert fit_temperatures(o).router == pytest.approx(1, abs=.1) # the classes are drawn from the sum, so nothing is to be corrected
    home = fit_temperature(o.p, overlapping.home[o.y])
    assert home > 1.2 # which a fit to the home clusters doesn't see


def test_router_of_overlapping_clusters_is_best_for_the_product(overlapping):
    o = random_opinions(overlapping, 4, n=1000)
    y = np.where(np.arange(1000) % 3, o.y, np.roll(o.y, 1)) # a third of the classes are of other images, so that p and q are wrong
    sharp = Opinions(overlapping, temper(o.p, .4), o.ask, y)
    t = fit_temperatures(sharp)
    at = lambda f: negative_log_likelihood(sharp.tempered(Temperatures(t.router*f, t.experts, t.shared)).joint(3), sharp.y)
    assert t.router < 19 and at(1) < min(at(.97), at(1.03))


def test_tempered_by_hand():
    o = Opinions(toy, torch.tensor([[.9, .1]]), lambda i, rows: (torch.tensor([[.8, .2]]), torch.tensor([[1., 0, 0]]))[i][rows])
    found = o.tempered(Temperatures(2., (.5, 3.), 1.)).joint(2)
    assert np.allclose(found, [[.75*16/17, .75/17, .25, 0, 0]])


def test_bad_requests_are_refused():
    o = random_opinions(toy, 0)
    with pytest.raises(ValueError, match="'each' or 'shared'"): fit_temperatures(o, 'all')
    with pytest.raises(ValueError, match='with labels'): fit_temperatures(Opinions(toy, o.p, o.ask))


# a calibrated classifier

def test_calibration_keeps_top_1_answers_and_sums(new_model, taxonomy, dls):
    model = new_model(taxonomy).fit(dls)
    sure = calibrate(model, dls.valid, least=1)
    a, b = opinions(model, dls[2]), opinions(sure, dls[2])
    assert (a.p.argmax(1) == b.p.argmax(1)).all() and not torch.allclose(a.p, b.p)
    assert (sure.predict(dls[2]) == model.predict(dls[2])).all()
    assert np.allclose(sure.predict_proba(dls[2], k=3).sum(1), 1, atol=1e-5)
    assert np.allclose(b.joint(3), sure.predict_proba(dls[2], k=3), atol=1e-6)


def test_calibration_never_makes_the_held_out_likelihood_worse(new_model, taxonomy, dls):
    model = new_model(taxonomy).fit(dls)
    at = lambda m: negative_log_likelihood(m.predict_proba(dls.valid, k=3), dls.valid.dataset.targets.numpy())
    assert at(calibrate(model, dls.valid, least=1)) <= at(model) + 1e-5
    assert at(calibrate(model, dls.valid, 'shared')) <= at(model) + 1e-5


def test_temperature_1_changes_nothing(new_model, overlapping, dls):
    model = new_model(overlapping).fit(dls)
    same = CalibratedClassifier(model, Temperatures(1., (1.,)*3, 1.))
    for k in (1, 3): assert np.allclose(same.predict_proba(dls[2], k=k), model.predict_proba(dls[2], k=k), atol=1e-6)
    assert np.allclose(same.evaluate(dls[2]).table.FC, model.evaluate(dls[2]).table.FC)


def test_save_and_load(new_model, overlapping, dls, tmp_path, images):
    sure = calibrate(new_model(overlapping).fit(dls), dls.valid, least=1)
    again, x = HierarchicalClassifier.load(sure.save(tmp_path/'sure')), images.images[images.test]
    assert type(again) is CalibratedClassifier and again.temperatures == sure.temperatures and type(again.model) is type(sure.model) and again.hierarchy == overlapping
    assert (again.predict_proba(x, k=3) == sure.predict_proba(x, k=3)).all()
    again.save(tmp_path/'sure') # a saved one may be replaced
    with pytest.raises(ValueError, match='describes a CalibratedClassifier, which is no TrunkClassifier'): TrunkClassifier.load(tmp_path/'sure')


def test_unknown_kinds_are_refused_on_loading(taxonomy, dls, tmp_path):
    file = calibrate(separate(taxonomy).fit(dls), dls.valid).save(tmp_path/'sure')/'classifier.json'
    file.write_text(file.read_text().replace('hdfast.HierarchicalClassifier.1', 'elsewhere.Other.1'))
    with pytest.raises(ValueError, match="'elsewhere.Other.1': it was written by a newer hdfast"): CalibratedClassifier.load(tmp_path/'sure')


def test_nested_classifiers_are_tempered_as_one_expert(dls, images):
    C = np.full((9, 9), .01) + .3*(np.arange(9)[:, None]//6 == np.arange(9)//6) + .5*(np.arange(9)[:, None]//3 == np.arange(9)//3)
    h = cluster_recursively(C/C.sum(1, keepdims=True), (6, 3), None, images.classes)
    assert any(h.children)
    model = separate(h).fit(dls)
    sure = calibrate(model, dls.valid, least=1)
    assert (sure.predict(dls[2]) == model.predict(dls[2])).all() and np.allclose(sure.predict_proba(dls[2], k=2).sum(1), 1, atol=1e-5)


def test_mistakes_that_no_temperature_can_mend_sharpen_nothing(taxonomy):
    "A nested expert rules classes out: then sharper answers cost nothing where it is wrong"
    y = np.repeat(np.arange(9), 20)
    q = [np.full((180, 3), .1) for _ in range(3)]
    for i in range(3):
        for row in range(60*i, 60*i + 60): q[i][row, y[row] % 3] = .8
        q[i][60*i:60*i + 10] = 0, .9, .1 # of class 0 in this cluster, which is ruled out
    o = Opinions(taxonomy, torch.eye(3).repeat_interleave(60, 0)*.7 + .1, lambda i, rows: torch.tensor(q[i])[rows], y)
    found = fit_temperatures(o, least=1)
    assert found == Temperatures(1., (1., 1., 1.), 1.)
    q[1][70] = .2, .7, .1 # a mistake that tells
    assert fit_temperatures(o, least=1).experts[1] != 1


def test_a_calibrated_classifier_is_not_trained_and_needs_all_temperatures(taxonomy, dls):
    model = separate(taxonomy)
    with pytest.raises(ValueError, match='2 temperatures for the experts of 3 clusters'): CalibratedClassifier(model, Temperatures(1., (1., 1.), 1.))
    with pytest.raises(TypeError, match='fit the model'): CalibratedClassifier(model, Temperatures(1., (1.,)*3, 1.)).fit(dls)
    with pytest.raises(ValueError, match="isn't trained yet"): calibrate(model, dls.valid)


# stop at the cluster

five = np.array([[.5, .3, .1, .1, 0], [.1, .2, .3, .2, .2], [.35, .05, .2, .2, .2], [.2, .2, .6, 0, 0]]) # of classes ab | cde


def test_cluster_sums_by_hand():
    assert np.allclose(cluster_sums(five, toy), [[.8, .2], [.3, .7], [.4, .6], [.4, .6]])


def test_answers_by_hand():
    found = stop_at_cluster(five, cluster_sums(five, toy), toy, .5)
    assert found.level.tolist() == ['class', 'cluster', 'cluster', 'class'] and found.id.tolist() == [0, 1, 1, 2]
    assert found.answer.tolist() == ['a', 'c or d or e', 'c or d or e', 'c'] and np.allclose(found.confidence, [.5, .7, .6, .6])


def test_curve_by_hand():
    # true a, c, a, d: classes right yes yes yes no; clusters right yes yes no yes
    c = stop_curve(five, cluster_sums(five, toy), np.array([0, 2, 0, 3]), toy, [.9, .5, .3])
    two, three = 1 - np.log(2)/np.log(5), 1 - np.log(3)/np.log(5)
    assert c.coverage.tolist() == [0, .5, 1]
    assert np.isnan(c['class accuracy'][0]) and c['class accuracy'].tolist()[1:] == [.5, 1*.75]
    assert c['cluster accuracy'].tolist()[:2] == [.75, .5] and np.isnan(c['cluster accuracy'][2])
    assert c.accuracy.tolist() == [.75, .5, .75]
    assert np.allclose(c.information, [(two + three + three)/4, (1 + three)/4, .75])


def test_the_curve_asks_once_who_holds_which_class(monkeypatch):
    asked, holds = [], ClassHierarchy.holds.fget
    monkeypatch.setattr(ClassHierarchy, 'holds', property(lambda h: asked.append(h) or holds(h)))
    p = cluster_sums(five, toy)
    asked.clear()
    stop_curve(five, p, np.array([0, 2, 0, 3]), toy)
    assert len(asked) == 1


def test_usual_thresholds_go_from_no_class_to_all():
    probs = random_probs(0)
    c = stop_curve(probs, cluster_sums(probs, toy), np.zeros(200, dtype=int), toy)
    assert len(c) == 102 and c.coverage.iloc[0] == 0 and c.coverage.iloc[-1] == 1 and (np.diff(c.coverage) >= 0).all()


def test_no_expert_is_needed_below_the_threshold():
    o = random_opinions(toy, 5)
    assert (o.joint().max(1) <= o.p.numpy().max(1) + 1e-12).all()


def test_area_by_hand():
    y = np.array([0, 2, 1, 3]) # by confidence: .6 wrong, .5 right, .35 wrong, .3 right
    assert coverage_area(five, y) == pytest.approx(np.mean([0, 1/2, 1/3, 2/4]))


@given(st.integers(0, 99), st.integers(1, 4))
def test_order_of_images_plays_no_part(seed, decimals):
    rng = np.random.default_rng(seed)
    probs, y, order = random_probs(seed, 30).round(decimals), rng.integers(0, 5, 30), rng.permutation(30)
    assert coverage_area(probs, y) == pytest.approx(coverage_area(probs[order], y[order]))


def test_threshold_by_hand():
    y = np.array([0, 2, 1, 2]) # by confidence: .6 right, .5 right, .35 wrong, .3 right
    assert threshold_for(five, y, 1.) == .5 and threshold_for(five, y, .75) == .3 and threshold_for(five, y, .7) == .3
    assert threshold_for(np.array([[.6, .4], [.6, .4]]), np.array([0, 1]), .5) == .6


@given(st.integers(0, 99), st.floats(.2, 1.), st.integers(1, 3))
def test_threshold_gives_the_accuracy_with_the_highest_coverage(seed, wish, decimals):
    probs, y = random_probs(seed, 40).round(decimals), np.random.default_rng(seed).integers(0, 5, 40)
    confidence, right = probs.max(1), probs.argmax(1) == y
    good = [t for t in np.unique(confidence) if right[confidence >= t].mean() >= wish - 1e-9]
    if good: assert threshold_for(probs, y, wish) == min(good)
    else:
        with pytest.raises(ValueError, match='no threshold gives'): threshold_for(probs, y, wish)


def test_without_images_there_is_no_threshold():
    with pytest.raises(ValueError, match='no images'): threshold_for(np.empty((0, 5)), np.empty(0, dtype=int), .5)


@pytest.mark.parametrize('wish', [0, 1.1, 90])
def test_impossible_wishes_are_refused(wish):
    with pytest.raises(ValueError, match='must lie above 0 and be 1 at most'): threshold_for(five, np.zeros(4, dtype=int), wish)


# distances of mistakes

def test_meeting_points_by_hand():
    # a and c meet at .2, b and d at .4, the two pairs at .7
    Z = np.array([[0, 2, .2, 2], [1, 3, .4, 2], [4, 5, .7, 4]])
    h = ClassHierarchy('abcd', [(0, 2), (1, 3)], [0, 1, 0, 1], Z, 2)
    assert np.allclose(meeting_heights(h), [[0, .7, .2, .7], [.7, 0, .7, .4], [.2, .7, 0, .7], [.7, .4, .7, 0]])
    assert np.array_equal(meeting_sizes(h), [[0, 4, 2, 4], [4, 0, 4, 2], [2, 4, 0, 4], [4, 2, 4, 0]])


def test_a_single_class_meets_nobody():
    h = hierarchy_from_groups([0], 'a')
    assert meeting_heights(h).tolist() == meeting_sizes(h).tolist() == [[0]]


def test_group_distances_by_hand():
    assert group_distances(['x', 'y', 'x']).tolist() == [[0, 2, 1], [2, 0, 2], [1, 2, 0]]


def test_mistakes_by_hand():
    D = group_distances([0, 0, 1])
    found = mistake_distances(D, [0, 1, 2, 0], [0, 0, 0, 2]) # right, near, far, far
    assert found == pytest.approx({'mistakes': 5/3, 'all': 5/4, 'guess': (3*1.5 + 2)/4})
    assert np.isnan(mistake_distances(D, [0], [0])['mistakes']) and mistake_distances(D, [0], [0])['all'] == 0


# ---- what calibration must not do

def test_images_of_other_classes_are_refused(new_model, taxonomy, images, dls):
    from dataclasses import replace
    model = new_model(taxonomy).fit(dls)
    other = replace(images, classes=images.classes[::-1], superclasses=None).dataloaders(device='cpu')
    with pytest.raises(ValueError, match='hierarchy is of other classes'): calibrate(model, other.valid)


def test_without_a_mistake_nothing_is_learnt():
    n = 60
    p, q = torch.tensor([[.9, .1]]).expand(n, 2), [torch.tensor([[.6, .4]]), torch.tensor([[.5, .3, .2]])]
    right = Opinions(toy, p, lambda i, rows: q[i].expand(len(rows), -1), np.zeros(n, int))
    assert fit_temperatures(right) == Temperatures(1., [1., 1.], 1.)
    wrong = Opinions(toy, p, right.ask, np.r_[np.ones(20, int), np.zeros(n - 20, int)]) # the expert is at fault, not the router
    assert fit_temperatures(wrong).router == 1. and fit_temperatures(wrong).experts[0] != 1.


def test_confidences_and_clusters_are_not_mixed_up():
    P = random_probs(0)
    with pytest.raises(ValueError, match='not of 5 classes and 2 clusters'): stop_at_cluster(cluster_sums(P, toy), P, toy, .5)


def test_logits_and_nans_are_refused():
    logits, y = np.random.default_rng(0).normal(size=(54, 9)), np.arange(54) % 9
    for ask in (lambda: fit_temperature(logits, y), lambda: temper(logits, 2.), lambda: temper(torch.tensor(logits), 2.)):
        with pytest.raises(ValueError, match='look like logits'): ask()
    with pytest.raises(ValueError, match='NaN'): fit_temperature(np.full((54, 9), np.nan), y)


@pytest.fixture
def classifier(dls, overlapping): return separate(overlapping).fit(dls)


def test_a_calibrated_classifier_is_calibrated_anew(classifier, dls):
    once = calibrate(classifier, dls.valid)
    twice = calibrate(once, dls.valid)
    assert twice.model is classifier and twice.temperatures == once.temperatures


def test_tensors_are_taken_and_dollars_in_names_drawn(classifier, dls):
    P, p, y = classifier.predict_proba(dls[2], k=3), classifier.cluster_proba(dls[2]), dls[2].dataset.targets
    h = classifier.hierarchy
    assert stop_curve(torch.tensor(P), torch.tensor(p), y, h).equals(stop_curve(P, p, y.numpy(), h))
    assert coverage_area(torch.tensor(P), y) == coverage_area(P, y.numpy()) and threshold_for(P, y, .1) == threshold_for(P, y.numpy(), .1)
    assert np.array_equal(cluster_sums(torch.tensor(P), h), cluster_sums(P, h)) and reliability(torch.tensor(P), y).equals(reliability(P, y.numpy()))
    for ax in (plot_reliability({r'$\frac$': reliability(P, y)}), plot_stop_curve({r'$\frac$': stop_curve(P, p, y, h)})): ax.figure.canvas.draw()
