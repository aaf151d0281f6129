"Descriptions and choices by hand, candidates whose best is known by construction, the pile, kills, processes and Ray."
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from joblib import delayed
from scipy import sparse

import hdfast.selection as selection
from hdfast.clustering import cluster_classes, hierarchy_from_groups
from hdfast.datasets import HELD_OUT, TEST, TRAIN, ImageSet
from hdfast.families import Job, cached_file
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.learners import crop_flip, recipe
from hdfast.networks import Conv, NetworkSpec, Stage, mlp_spec, network_spec
from hdfast.selection import (CNN_CANDIDATES, MLP_CANDIDATES, NetworkSelector, SpecClassifier, SpecRegressor, Trial, apart, choice_rows, choice_scores, choices,
                              describe, in_processes, in_ray, layers_neurons, leave_one_out, make_trial, merge_trials, pile_up, plot_mix,
                              plot_selected, plot_trial, read_pile, specs_for, try_candidates, verdict)
from hdfast.transfer import Candidate, Inputs, pretrain, transfer_hierarchy

short = recipe('one_cycle', epochs=2)
C9 = .5*np.eye(9) + .3*np.kron(np.eye(3), np.full((3, 3), 1/3)) + .2/9
pair = [mlp_spec(4), mlp_spec(8)]


def trial(classes, scores, x=0., parameters=None, held_out=10, **kwargs):
    "A made-up trial, described by one number."
    parameters = parameters or {name: i + 1 for i, name in enumerate(scores)}
    return Trial(**{**dict(images='made up', classes=classes, recipe=asdict(recipe('paper')), seed=0, held_out=held_out, description={'x': x}, scores=scores, parameters=parameters), **kwargs})


def files(folder): return {f: f.stat().st_mtime_ns for f in Path(folder).glob('*.safetensors')}


class Nearest:
    "A chooser that can be followed by hand: the best candidate of the trial whose description is nearest."
    def fit(self, trials, candidates):
        self.trials = trials
        return self
    def predict(self, descriptions): return [min(self.trials, key=lambda t: abs(t.description['x'] - d['x'])).best for d in descriptions]


# descriptions

@st.composite
def confusions(draw):
    K, seed = draw(st.integers(2, 12)), draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).dirichlet(np.full(K, draw(st.sampled_from([.1, 1., 10.]))), K)


@given(confusions(), st.data())
def test_description_has_a_fixed_length_and_is_finite(C, data):
    cluster = data.draw(st.lists(st.sampled_from(range(len(C))), min_size=2, unique=True))
    found = describe(C, cluster, np.arange(1, len(C) + 1))
    assert list(found) == list(describe(C9, (0, 1), [1]*9)) and len(found) == 12
    assert np.isfinite(list(found.values())).all()


@given(confusions(), st.randoms(use_true_random=False))
def test_description_does_not_depend_on_the_order_of_classes(C, random):
    order, counts = list(range(len(C))), np.arange(1, len(C) + 1)
    random.shuffle(order)
    a, b = describe(C, range(len(C)), counts), describe(C[np.ix_(order, order)], range(len(C)), counts[order])
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-9)


def test_description_by_hand():
    C = np.array([[.6, .2, .2], [.1, .7, .2], [0, 0, 1]])
    d, P = describe(C, (0, 1), [30, 10, 5]), np.array([[.75, .25], [.125, .875]])
    assert (d['classes'], d['samples'], d['imbalance']) == (2, 40, 3)
    assert d['kept'] == pytest.approx(.8) and d['mean off-diagonal'] == pytest.approx(.1875) and d['largest off-diagonal'] == pytest.approx(.25)
    assert d['entropy'] == pytest.approx(np.mean([-(p*np.log2(p)).sum() for p in P]))
    assert d['lowest merge'] == d['mean merge'] == d['highest merge'] == pytest.approx(1 - .1875)
    assert d['eigenvalue 2'] == pytest.approx(np.linalg.eigvalsh((P + P.T)/2)[0]) and d['eigenvalue 3'] == 0


def test_a_perfectly_told_cluster_has_no_entropy():
    d = describe(np.eye(4), (0, 1, 2), [5]*4)
    assert (d['entropy'], d['mean off-diagonal'], d['lowest merge'], d['eigenvalue 3']) == (0, 0, 1, 1)


def test_description_of_a_single_class_is_refused():
    with pytest.raises(ValueError, match='single class'): describe(C9, (3,), [1]*9)


def test_description_of_a_sparse_confusion_is_that_of_the_dense_one():
    C = np.array([[.6, .4, 0], [.1, .7, .2], [0, 0, 1]])
    for make in (sparse.csr_array, sparse.coo_matrix): assert describe(make(C), (2, 1), [30, 10, 5]) == pytest.approx(describe(C, (2, 1), [30, 10, 5]))


def test_description_of_raw_counts_is_refused():
    with pytest.raises(ValueError, match='raw counts'): describe(10*C9, (0, 1), [1]*9)


# the best of several

def test_best_is_the_highest_score(): assert trial('ab', dict(a=.6, b=.9, c=.8)).best == 'b'


def test_ties_go_to_fewer_parameters(): assert trial('ab', dict(a=.9, b=.9, c=.8), parameters=dict(a=9, b=5, c=1)).best == 'b'


@given(st.permutations(range(4)))
def test_best_does_not_depend_on_the_order(order):
    scores, parameters = dict(a=.9, b=.8, c=.7, d=.9), dict(a=4, b=3, c=2, d=1)
    names = ['abcd'[i] for i in order]
    assert trial('ab', {n: scores[n] for n in names}, parameters=parameters).best == 'd'


# candidates on images whose best network is known

def _stripes(rng, n, axis, size):
    "Grey stripes of period 4 and random phase: each pixel alone is dark or bright with equal chance, whatever the direction."
    wave = ((np.arange(size)[None] + rng.integers(0, 4, n)[:, None])//2 % 2)*160 + 40
    return np.broadcast_to(np.expand_dims(wave, (1, 3 if axis == 0 else 2)), (n, 3, size, size)).copy()


def _spot(rng, n, channel, size):
    "Noise, but for one pixel that is all of one colour."
    x = rng.integers(0, 256, (n, 3, size, size))
    x[:, :, 5, 5] = 0
    x[:, channel, 5, 5] = 255
    return x


@pytest.fixture(scope='module')
def made():
    "Two classes that only a window of several pixels tells apart, and two that one pixel's colour does."
    rng, n, size = np.random.default_rng(0), 150, 8
    x = np.concatenate([_stripes(rng, n, 0, size), _stripes(rng, n, 1, size), _spot(rng, n, 0, size), _spot(rng, n, 2, size)])
    split = torch.tensor([TRAIN]*90 + [HELD_OUT]*40 + [TEST]*20).repeat(4).to(torch.int8)
    return ImageSet('made', torch.from_numpy(x.astype(np.uint8)), torch.arange(4).repeat_interleave(n), ['lying', 'standing', 'red', 'blue'], split)


near = NetworkSpec('near', [Stage([Conv(1, 8)], pool=False)])                  # sees one pixel at a time, and where it lies
wide = NetworkSpec('wide', [Stage([Conv(5, 16)]), Stage([Conv(3, 32)])], (64,)) # sees several at once


@pytest.fixture(scope='module')
def tried(made, tmp_path_factory):
    h, cache = hierarchy_from_groups([0, 0, 1, 1], made.classes), tmp_path_factory.mktemp('made')
    dls, how = made.dataloaders(bs=16, device='cpu'), recipe('one_cycle', epochs=12, lr=5e-3, bs=16)
    return dls, h, how, cache, try_candidates(dls, h, np.full((4, 4), .25), [near, wide], how, cache=cache)


def test_the_wide_network_is_chosen_where_only_a_wide_window_helps(tried):
    *_, trials = tried
    assert trials[0].classes == ('lying', 'standing') and trials[0].best == 'wide'
    assert trials[0].scores['near'] < .75 and trials[0].scores['wide'] > .9


def test_the_narrow_network_is_chosen_where_a_pixel_says_all(tried):
    *_, trials = tried
    assert trials[1].classes == ('red', 'blue') and trials[1].best == 'near' and trials[1].scores['near'] > .95


def test_scores_are_of_the_held_out_slice(tried, made):
    "By hand from the trained networks, one image at a time"
    dls, h, how, cache, trials = tried
    model = HierarchicalClassifier(h, 'MLP_4', wide, how).fit(dls, cache, progress=False)
    at = [int(i) for i in made.held_out if made.labels[i] < 2]
    x = dls.train.normalize(made.images[at])
    with torch.no_grad(): right = [int(model.experts[0](x[i:i+1]).argmax()) == int(made.labels[k]) for i, k in enumerate(at)]
    assert trials[0].held_out == len(at) == 80 and trials[0].scores['wide'] == pytest.approx(np.mean(right))


def test_test_images_have_no_part_in_the_choice(tried, made):
    dls, h, how, cache, trials = tried
    spoilt = made.images.clone()
    spoilt[made.test] = 0
    other = replace(made, images=spoilt).dataloaders(bs=16, device='cpu')
    again = try_candidates(other, h, np.full((4, 4), .25), [near, wide], how)
    assert [t.scores for t in again] == [t.scores for t in trials]


def test_best_specs_make_a_classifier(tried):
    dls, h, how, cache, trials = tried
    s = NetworkSelector([near, wide], how).fit(dls, h, np.full((4, 4), .25), cache, progress=False)
    before = files(cache)
    model = HierarchicalClassifier(h, 'MLP_4', s.best_specs(dls, h), how).fit(dls, cache, progress=False)
    assert [e.name for e in model.expert_specs] == ['wide', 'near']
    assert all(f in before for f in files(cache)) or len(files(cache)) == len(before) + 1 # the hierarchy classifier at most
    assert {k: v for k, v in files(cache).items() if k in before} == before


def test_a_cluster_without_held_out_images_is_named(made):
    empty = replace(made, split=torch.where((made.split == HELD_OUT) & (made.labels < 2), torch.tensor(TRAIN, dtype=torch.int8), made.split))
    with pytest.raises(ValueError, match=r'cluster 0 \(lying, standing\) has no held-out image'):
        try_candidates(empty.dataloaders(device='cpu'), hierarchy_from_groups([0, 0, 1, 1], made.classes), np.full((4, 4), .25), pair, short)


def test_single_classes_are_not_tried_and_overlap_is(dls, images):
    h = cluster_classes(C9, 3, 8, images.classes)
    assert [len(t.classes) for t in try_candidates(dls, h, C9, pair[:1], short)] == [len(q) for q in h.clusters if len(q) > 1]
    singles = hierarchy_from_groups([0, 0, 0, 0, 0, 0, 0, 1, 2], images.classes)
    assert len(try_candidates(dls, singles, C9, pair[:1], short)) == 1


def test_joint_choice_with_convolutions_trained_elsewhere(images, taxonomy):
    "MLP, CNN and CNN on a shared, frozen body side by side: what transfer finds makes trials to choose and learn from"
    how, small = recipe('one_cycle', epochs=1), NetworkSpec('small', [Stage([Conv(3, 4)])], (8,))
    backbone = pretrain(images, small, how, None, device='cpu')
    candidates = [Candidate('MLP_4'), Candidate(small), Candidate(small, backbone), Candidate(small, backbone, True)]
    dls = backbone.prepare(images.dataloaders(device='cpu'))
    model, _, choice = transfer_hierarchy(Inputs(dls), taxonomy, Candidate('MLP_4'), candidates, how)
    cost = {str(c): c.cost((3, 16, 16), 3) for c in candidates}
    trials = [make_trial(dls, taxonomy, q, C9, how, 0, {n: (s, cost[n]) for n, s in row.items()}) for q, row in enumerate(choice.scores.to_dict('records'))]
    assert [t.scores[t.best] for t in trials] == choice.scores.max(axis=1).tolist()
    picks = choices(trials, [c.named for c in candidates])
    assert set(picks.learned) <= set(cost) and len(cost) == 4 and model.predict(images.images[images.test]).shape == (len(images.test),)


# the pile

def test_the_pile_grows_without_duplicates(tmp_path):
    file, a, b = tmp_path/'pile'/'trials.json', trial('ab', dict(MLP_4=.5, MLP_8=.6)), trial('cd', dict(MLP_4=.7, MLP_8=.6))
    assert [len(pile_up(file, pair, ts)) for ts in ([a], [a], [a, b], [b, a], [replace(a, seed=1)])] == [1, 1, 2, 2, 3]
    assert read_pile(file) == (pair, [a, b, replace(a, seed=1)])


def test_other_folds_and_other_image_sets_are_other_trials():
    a = trial('ab', dict(m=.5))
    assert len(merge_trials([a], [replace(a, images='another fold'), replace(a, recipe={'epochs': 2}), replace(a, description={'x': 1.})])) == 4


def test_scores_of_further_candidates_join(tmp_path):
    a, b = trial('ab', dict(MLP_4=.5)), trial('ab', dict(MLP_8=.6), parameters=dict(MLP_8=9))
    pile_up(tmp_path/'p.json', pair[:1], [a])
    found, = pile_up(tmp_path/'p.json', pair[1:], [b])
    assert found.scores == dict(MLP_4=.5, MLP_8=.6) and found.parameters == dict(MLP_4=1, MLP_8=9)
    assert [s.name for s in read_pile(tmp_path/'p.json')[0]] == ['MLP_4', 'MLP_8']


def test_one_name_for_two_networks_is_refused_and_the_file_stays(tmp_path):
    pile_up(tmp_path/'p.json', pair, [trial('ab', dict(MLP_4=.5))])
    before = (tmp_path/'p.json').read_bytes()
    with pytest.raises(ValueError, match='MLP_4 is the name of two'): pile_up(tmp_path/'p.json', [NetworkSpec('MLP_4', fc=(5,))], [])
    assert (tmp_path/'p.json').read_bytes() == before


def test_a_failure_while_writing_leaves_the_pile_as_it_was(tmp_path, monkeypatch):
    pile_up(tmp_path/'p.json', pair, [trial('ab', dict(MLP_4=.5))])
    before = (tmp_path/'p.json').read_bytes()
    def full(self, *args, **kwargs): raise OSError('no space left on device')
    monkeypatch.setattr(Path, 'replace', full)
    with pytest.raises(OSError): pile_up(tmp_path/'p.json', pair, [trial('cd', dict(MLP_4=.5))])
    assert (tmp_path/'p.json').read_bytes() == before


@pytest.mark.parametrize('text, message', [('{"format": "hdfast.trials.1"}', 'was written by another version of hdfast'), ('{', "isn't JSON"), ('[]', "isn't a pile"), ('{"format": "else"}', "isn't a pile"),
                                           (json.dumps(dict(format='hdfast.trials.2', candidates=[])), 'damaged'),
                                           (json.dumps(dict(format='hdfast.trials.2', candidates=[], trials=[{'images': ''}])), 'damaged')])
def test_a_file_that_is_no_pile_is_refused(tmp_path, text, message):
    (tmp_path/'p.json').write_text(text)
    with pytest.raises(ValueError, match=message): read_pile(tmp_path/'p.json')


def test_two_that_pile_up_at_once_lose_nothing(tmp_path):
    def add(k):
        for i in range(20): pile_up(tmp_path/'p.json', pair, [trial([f'{k}', f'{i}'], dict(MLP_4=.5))])
    with ThreadPoolExecutor(2) as pool: list(pool.map(add, 'ab'))
    assert len(read_pile(tmp_path/'p.json')[1]) == 40


# choosing

def test_a_classifier_learns_a_rule():
    trials = [trial([f'{i}a', f'{i}b'], {'CNN_2': .9 if i < 10 else .5, 'CNN_3': .7}, x=i) for i in range(20)]
    c = SpecClassifier().fit(trials, [network_spec('CNN_2'), network_spec('CNN_3')])
    assert c.predict([{'x': 2.}, {'x': 17.}]) == ['CNN_2', 'CNN_3']


def test_a_regressor_learns_layers_and_neurons():
    best = lambda i: 'MLP_16' if i < 10 else 'MLP_128_128'
    trials = [trial([f'{i}a', f'{i}b'], {s.name: float(s.name == best(i)) for s in MLP_CANDIDATES}, x=i) for i in range(20)]
    r = SpecRegressor().fit(trials, MLP_CANDIDATES)
    assert r.predict([{'x': 1.}, {'x': 18.}]) == ['MLP_16', 'MLP_128_128']


def test_a_regression_takes_the_nearest_candidate():
    class Always:
        def fit(self, X, y): pass
        def predict(self, X): return [[1.6, np.log2(41)]]*len(X)
    r = SpecRegressor(Always()).fit([trial('ab', {s.name: .5 for s in MLP_CANDIDATES})], MLP_CANDIDATES)
    assert r.predict([{'x': 0}]) == ['MLP_32_32'] # 2 layers of 2**5; 2**5.36 was asked for


def test_layers_and_neurons(): assert layers_neurons(mlp_spec(32, 128)) == (2, 6) and layers_neurons(mlp_spec(16)) == (1, 4)


def test_a_network_with_convolutions_is_no_two_numbers():
    with pytest.raises(ValueError, match='CNN_2 has convolutions'): layers_neurons(network_spec('CNN_2'))


def test_leave_one_out_against_a_hand_computation():
    "Nearest neighbours on a line at 0, 1, 4, 6; c shares a class with b, so neither sees the other"
    trials = [trial(['p', 'q'], dict(A=1., B=0.), x=0.), trial(['r', 's'], dict(A=0., B=1.), x=1.),
              trial(['s', 't'], dict(A=1., B=0.), x=4.), trial(['u', 'v'], dict(A=0., B=1.), x=6.)]
    assert [t.best for t in trials] == ['A', 'B', 'A', 'B']
    assert [len(apart(trials, i)) for i in range(4)] == [3, 2, 2, 3]
    assert leave_one_out(trials, pair, Nearest()) == ['B', 'A', 'B', 'A'] # the neighbours are at 1, 0, 6 and 4


def test_leave_one_out_never_sees_a_relative():
    seen = []
    class Spy(Nearest):
        def fit(self, trials, candidates):
            seen.append({c for t in trials for c in t.classes})
            return super().fit(trials, candidates)
    trials = [trial([f'{i % 5}a', f'{i % 5}b'], dict(A=.5), seed=i) for i in range(15)]
    leave_one_out(trials, pair, Spy())
    assert all(not set(t.classes) & s for t, s in zip(trials, seen)) and len(seen) == 15


def test_leave_one_out_leaves_the_chooser_as_it_was():
    trials = [trial([f'{i}a', f'{i}b'], dict(MLP_4=i % 2, MLP_8=1 - i % 2), seed=i, x=float(i)) for i in range(4)]
    s = NetworkSelector(pair, chooser=Nearest()).learn(trials)
    known = [s.chooser.predict([t.description]) for t in trials]
    choices(trials, pair, s.chooser)
    assert [s.chooser.predict([t.description]) for t in trials] == known


def test_with_nothing_left_to_learn_from_the_first_is_taken():
    picks = choices([trial('ab', dict(MLP_4=.5, MLP_8=.9)), trial('bc', dict(MLP_4=.5, MLP_8=.9))], pair)
    assert picks.learned.tolist() == picks['most frequent'].tolist() == ['MLP_4']*2


def test_no_trials_at_all():
    with pytest.raises(ValueError, match='no trials'): choices([], pair)


def test_choices_and_their_scores_by_hand():
    "Three clusters; candidates MLP_4 (cheap) and MLP_8"
    trials = [trial('ab', dict(MLP_4=.5, MLP_8=.9), held_out=10, x=0.), trial('cd', dict(MLP_4=.6, MLP_8=.8), held_out=10, x=1.),
              trial('ef', dict(MLP_4=.7, MLP_8=.4), held_out=20, x=9.)]
    picks = choices(trials, pair, Nearest())
    assert picks.oracle.tolist() == ['MLP_8', 'MLP_8', 'MLP_4'] and picks.learned.tolist() == ['MLP_8', 'MLP_8', 'MLP_8']
    assert picks['most frequent'].tolist() == ['MLP_4', 'MLP_4', 'MLP_8'] # one each for the first two: the first in the list
    assert picks.smallest.tolist() == ['MLP_4']*3
    found = choice_scores(trials, picks)
    assert found.accuracy.to_dict() == pytest.approx({'oracle': (.9 + .8 + 2*.7)/4, 'learned': (.9 + .8 + 2*.4)/4, 'most frequent': (.5 + .6 + 2*.4)/4,
                                                      'random': (.7 + .7 + 2*.55)/4, 'smallest': (.5 + .6 + 2*.7)/4})
    assert found.right[['oracle', 'learned', 'smallest', 'random']].tolist() == pytest.approx([1, 2/3, 1/3, 1/2])
    assert found.parameters[['oracle', 'random']].tolist() == pytest.approx([5/3, 1.5])


@given(st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=2, max_size=8))
def test_no_way_to_choose_scores_above_the_oracle(rows):
    specs = [mlp_spec(4), mlp_spec(8), mlp_spec(16)]
    trials = [trial([f'{i}a', f'{i}b'], {s.name: v/20 for s, v in zip(specs, row)}, x=i) for i, row in enumerate(rows)]
    found = choice_scores(trials, choices(trials, specs, Nearest()))
    assert (found.accuracy <= found.accuracy['oracle'] + 1e-12).all()


def test_choices_among_some_of_the_candidates():
    trials = [trial('ab', dict(MLP_4=.5, MLP_8=.9)), trial('cd', dict(MLP_4=.5, MLP_8=.9))]
    assert choices(trials, pair[:1], Nearest()).oracle.tolist() == ['MLP_4']*2


@pytest.mark.parametrize('learned, said', [(.7, '10.00 points above the'), (.6, 'level with the'), (.5, '10.00 points below the')])
def test_the_verdict_says_it_plainly(learned, said):
    assert said in verdict(pd.DataFrame({'accuracy': {'oracle': .8, 'learned': learned, 'most frequent': .6, 'random': .55}}))


# the selector

@pytest.fixture(scope='module')
def fitted(images, tmp_path_factory):
    dls, h = images.dataloaders(device='cpu', bs=32), hierarchy_from_groups(images.superclasses, images.classes)
    cache = tmp_path_factory.mktemp('fitted')
    return dls, h, cache, NetworkSelector(pair, short).fit(dls, h, C9, cache, progress=False)


def test_predict_trains_nothing(fitted, monkeypatch):
    dls, h, cache, s = fitted
    def refuse(*args, **kwargs): raise AssertionError('a network was trained')
    monkeypatch.setattr(selection.Job, 'build', refuse)
    before = files(cache)
    assert {spec.name for spec in s.predict(dls, h, C9)} <= {'MLP_4', 'MLP_8'} and files(cache) == before


def test_predict_for_clusters_never_seen(fitted, images):
    dls, h, cache, s = fitted
    other = hierarchy_from_groups([0, 1, 2, 0, 1, 2, 0, 1, 3], images.classes)
    assert len(s.predict(dls, other, C9)) == 4
    with pytest.raises(KeyError): s.best_specs(dls, other)


def test_fit_again_adds_only_what_is_new(fitted, images):
    dls, h, cache, s = fitted
    s = NetworkSelector(pair, short).learn(s.trials)
    assert len(s.fit(dls, h, C9, cache, progress=False).trials) == 3
    other = hierarchy_from_groups([0, 0, 1, 1, 1, 2, 2, 2, 2], images.classes)
    assert len(s.fit(dls, other, C9, cache, progress=False).trials) == 6


def test_saved_and_loaded_it_chooses_alike(fitted, tmp_path):
    dls, h, cache, s = fitted
    again = NetworkSelector.load(s.save(tmp_path/'s.json'), recipe=short)
    assert again.trials == s.trials and again.candidates == s.candidates
    assert again.predict(dls, h, C9) == s.predict(dls, h, C9)


def test_nothing_saved_is_a_pickle(fitted, tmp_path): assert json.loads(fitted[3].save(tmp_path/'s.json').read_text())['format'] == 'hdfast.trials.2'


def test_another_network_of_a_known_name_is_refused_on_loading(fitted, tmp_path):
    other = NetworkSpec('MLP_8', fc=(64, 64))
    with pytest.raises(ValueError, match='MLP_8'): NetworkSelector.load(fitted[3].save(tmp_path/'s.json'), [pair[0], other], recipe=short)


def test_scores_on_images_prepared_otherwise_are_other_trials(fitted, images):
    dls, h, cache, s = fitted
    other = images.dataloaders(device='cpu', bs=32, augment=crop_flip)
    with pytest.raises(KeyError): s.best_specs(other, h)
    assert len(merge_trials(s.trials, try_candidates(other, h, C9, pair, recipe(short, epochs=1)))) == 6


def test_one_process_leaves_the_threads_as_they_were(dls, taxonomy):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        try_candidates(dls, taxonomy, C9, pair[:1], short, train=in_processes(1))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_trials_that_lack_a_candidate_are_left_out():
    s = NetworkSelector(pair).learn([trial('ab', dict(MLP_4=.5, MLP_8=.6)), trial('cd', dict(MLP_4=.5))])
    assert [t.classes for t in s.trials] == [('a', 'b')]
    with pytest.raises(ValueError, match='no cluster on which all of MLP_4, MLP_8'): NetworkSelector(pair).learn([trial('cd', dict(MLP_4=.5))])


def test_trials_of_another_recipe_are_left_out_with_a_warning():
    quick = asdict(recipe('paper', epochs=1)) | dict(name='quick try')
    own, other = trial('ab', dict(MLP_4=.5, MLP_8=.6)), trial('cd', dict(MLP_4=.6, MLP_8=.5), recipe=quick)
    with pytest.warns(UserWarning, match='1 of 2 trials are left out: they are of other recipes .*quick try'): s = NetworkSelector(pair).learn([own, other])
    assert s.trials == [own]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="were tried with recipe 'paper'"): NetworkSelector(pair).learn([other])


def test_the_best_are_of_these_images_and_this_seed_and_recipe(dls, taxonomy):
    source, quick = selection._images_of(dls), asdict(recipe(short, epochs=1))
    def made(scores, seed=0, **kwargs):
        return [trial([taxonomy.classes[c] for c in members], scores, seed=seed + 1 + q, **dict(images=source, recipe=asdict(short)) | kwargs) for q, members in enumerate(taxonomy.clusters)]
    own, others = made(dict(MLP_4=.6, MLP_8=.5)), dict(MLP_4=.5, MLP_8=.6)
    with pytest.warns(UserWarning):
        s = NetworkSelector(pair, short).learn([*own, *made(others, recipe=quick), *made(others, images='else'), *made(others, seed=9)])
    assert [spec.name for spec in s.best_specs(dls, taxonomy)] == ['MLP_4']*3
    s.seed = 2
    with pytest.raises(KeyError): s.best_specs(dls, taxonomy)


def test_the_same_cluster_in_another_place_is_another_trial(dls, taxonomy, monkeypatch):
    "There its networks have another seed, and may fare otherwise."
    swapped = replace(taxonomy, clusters=taxonomy.clusters[::-1], home=2 - np.asarray(taxonomy.home))
    s = NetworkSelector(pair, short)
    for h, scores in ((taxonomy, dict(MLP_4=.6, MLP_8=.5)), (swapped, dict(MLP_4=.5, MLP_8=.6))):
        s.learn([trial([h.classes[c] for c in members], scores, images=selection._images_of(dls), recipe=asdict(short), seed=1 + q) for q, members in enumerate(h.clusters)])
    assert [[spec.name for spec in s.best_specs(dls, h)] for h in (taxonomy, swapped)] == [['MLP_4', 'MLP_8', 'MLP_4'], ['MLP_8', 'MLP_8', 'MLP_8']] # the one in the middle stays where it is


def test_the_seed_of_a_trial_is_that_of_its_networks(fitted):
    dls, h, cache, s = fitted
    assert [t.seed for t in s.trials] == [1, 2, 3]


def test_a_sparse_confusion_gives_the_same_trials(dls, taxonomy, tmp_path):
    dense, thin = (try_candidates(dls, taxonomy, C, pair[:1], recipe(short, epochs=1), cache=tmp_path) for C in (C9, sparse.csr_array(C9)))
    assert dense == thin


def test_a_pile_is_loaded_with_the_candidates_of_a_name(tmp_path):
    pile_up(tmp_path/'p.json', MLP_CANDIDATES, [trial('ab', {s.name: .5 for s in MLP_CANDIDATES})])
    assert list(NetworkSelector.load(tmp_path/'p.json', candidates='mlp').candidates) == [s.name for s in MLP_CANDIDATES]


@pytest.mark.parametrize('n_jobs,parts', [(2, 6), (1, 3), (-1, 3*selection.effective_n_jobs(-1))])
def test_as_many_processes_as_cores_where_joblib_says_so(dls, monkeypatch, n_jobs, parts):
    seen = []
    def deal(jobs, n):
        seen.append(n)
        raise KeyboardInterrupt
    monkeypatch.setattr(selection, '_parts', deal)
    with pytest.raises(KeyboardInterrupt): in_processes(n_jobs, 3)([], short)
    assert seen == [parts]


@pytest.mark.parametrize('n', [0, -4])
def test_jobs_need_a_part_to_be_dealt_out_to(n):
    with pytest.raises(ValueError, match=f'one part or more, not to {n}'): selection._parts([1, 2], n)


def test_a_selector_that_has_not_learnt_says_so(dls, taxonomy):
    with pytest.raises(ValueError, match="hasn't learnt yet"): NetworkSelector(pair).predict(dls, taxonomy, C9)


def test_a_hierarchy_of_other_classes_is_refused(fitted, images):
    dls, h, cache, s = fitted
    other = hierarchy_from_groups(images.superclasses, images.classes[::-1])
    with pytest.raises(ValueError, match='other classes'): s.predict(dls, other, C9)
    with pytest.raises(ValueError, match='other classes'): try_candidates(dls, other, C9, pair, short)


def test_clusters_within_clusters_are_refused(fitted, images):
    dls, h, cache, s = fitted
    nested = h.refine(0, hierarchy_from_groups([0, 0, 1], images.classes[:3]))
    with pytest.raises(ValueError, match='Choosing networks takes a hierarchy of one level'): s.predict(dls, nested, C9)


def test_a_confusion_of_other_classes_is_refused(fitted):
    dls, h, cache, s = fitted
    with pytest.raises(ValueError, match='of 10 classes, the data have 9'): s.predict(dls, h, np.full((10, 10), .1))


def test_a_regression_of_cnns_is_refused_before_they_are_trained():
    with pytest.raises(ValueError, match='CNN_2 has convolutions'): NetworkSelector(CNN_CANDIDATES, chooser=SpecRegressor())


def test_two_candidates_of_one_name_are_refused_before_they_are_trained(dls, taxonomy):
    def refuse(*args): raise AssertionError('a network was trained')
    two = [mlp_spec(4), replace(mlp_spec(8), name='MLP_4')]
    with pytest.raises(ValueError, match='MLP_4 is the name of two different networks'): try_candidates(dls, taxonomy, C9, two, short, train=refuse)


def test_scores_of_one_cluster_join_wherever_they_stand():
    a, b = trial('ab', dict(MLP_4=.5)), trial('ab', dict(MLP_8=.6))
    assert merge_trials([a, b], []) == merge_trials([a], [b]) and merge_trials([a, b], [])[0].scores == dict(MLP_4=.5, MLP_8=.6)


def test_seeds_may_be_numbers_of_numpy(tmp_path): assert pile_up(tmp_path/'pile.json', pair, [trial('ab', dict(MLP_4=.5, MLP_8=.6), seed=np.int64(3))])[0].seed == 3


def test_a_random_choice_is_among_the_candidates_alone():
    trials = [trial('ab', dict(MLP_4=.4, MLP_8=.6, MLP_99=0.)), trial('cd', dict(MLP_4=.4, MLP_8=.6, MLP_99=0.))]
    found = choice_scores(trials, choices(trials, pair), candidates=pair)
    assert found.accuracy['random'] == pytest.approx(.5) and found.right['random'] == .5


def test_ray_tasks_write_where_the_caller_reads(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    told = []
    class Ray:
        def remote(self, **options): return lambda f: type('Task', (), dict(remote=staticmethod(lambda stored, part, recipe, folder, products: told.append((folder, products)))))
        def put(self, jobs): return jobs
        def get(self, task): return []
    monkeypatch.setattr(selection, 'fit_networks', lambda jobs, recipe, cache: cache)
    monkeypatch.setattr(selection, '_report', lambda *args: [*args[0]])
    in_ray(Ray(), n_parts=1)([1, 2], short, '~/nets')
    assert told == [(tmp_path/'nets', torch.get_float32_matmul_precision())]


def test_candidates_are_checked():
    with pytest.raises(ValueError, match='needs candidates'): NetworkSelector([])
    with pytest.raises(ValueError, match='no network is called'): NetworkSelector(['CNN_9'])


def test_specs_for_names_the_cluster_that_was_not_tried(taxonomy):
    with pytest.raises(KeyError): specs_for(taxonomy, {}, pair[0])


def test_choice_rows_are_those_of_the_classifier(fitted):
    dls, h, cache, s = fitted
    rows = choice_rows(dls, h, {'one': pair[0], 'best': s.best_specs(dls, h)}, 'MLP_4', short, cache=cache)
    by_hand = HierarchicalClassifier(h, 'MLP_4', s.best_specs(dls, h), short).fit(dls, cache, progress=False).evaluate(dls[2]).table
    assert rows.FC['best'] == by_hand.FC['top-1'] and rows['oracle router']['best'] == by_hand.FC['oracle router']
    assert rows.index.tolist() == ['one', 'best']
    routed = HierarchicalClassifier(h, 'MLP_4', pair[0], short).fit(dls, cache, progress=False)
    sent = np.bincount(routed.cluster_proba(dls[2]).argmax(1), minlength=h.n_clusters)/len(dls[2].dataset)
    inputs = np.prod(routed.shape)
    hand = inputs*4 + 4*h.n_clusters + sum(share*(inputs*4 + 4*len(q)) for share, q in zip(sent, h.clusters) if len(q) > 1) # MLP_4 twice: router and expert
    assert rows.MACs['one'] == pytest.approx(hand, rel=1e-6)
    assert rows.parameters['one'] == sum(p.numel() for net in routed.networks for p in net.parameters())
    assert rows.training_seconds['one'] == sum(net.training_seconds for net in routed.networks) > 0


def test_the_picture_counts():
    ax = plot_mix(pd.DataFrame({'oracle': ['MLP_4', 'MLP_8', 'MLP_8'], 'learned': ['MLP_8']*3}), pair)
    assert [[b.get_width() for b in bars] for bars in ax.containers] == [[1, 2], [0, 3]]


def _texts(ax): return [t.get_text() for t in ax.texts if t.get_text()]


def test_the_picture_of_a_trial_says_what_it_holds():
    found = _texts(plot_trial(trial('ab', dict(MLP_4=.5, MLP_8=.625), parameters=dict(MLP_4=1000, MLP_8=9))))
    assert found == ['a\nb', 'expert\nMLP_8', 'MLP_4: 50.0% right, 1,000 parameters', 'MLP_8: 62.5% right, 9 parameters']


def test_the_picture_of_the_whole_has_a_box_for_each_cluster_and_expert(images):
    h = hierarchy_from_groups([0, 0, 0, 0, 1, 1, 1, 1, 2], images.classes)
    found = _texts(plot_selected(h, ['MLP_4', 'MLP_8', 'MLP_8'], 'MLP_16'))
    assert found[0].endswith('MLP_16') and len(found) == 7 and found[2::2] == ['MLP_4', 'MLP_8', 'no expert']


# kills, processes, Ray

slow = recipe('one_cycle', epochs=12)
several = [mlp_spec(w) for w in (64, 96, 128, 160)]
FIT = f'''
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_selection import C9, NetworkSelector, hierarchy_from_groups, several, slow
from hdfast.datasets import synthetic
images = synthetic(n_groups=3, classes_per_group=3, n_per_class=20, size=16)
dls, h = images.dataloaders(device='cpu', bs=4), hierarchy_from_groups(images.superclasses, images.classes)
NetworkSelector(several, slow).fit(dls, h, C9, sys.argv[1], progress=False)
'''


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(.005)


def test_after_kill_9_only_what_is_missing_is_trained(images, taxonomy, tmp_path):
    run = subprocess.Popen([sys.executable, '-c', FIT, str(tmp_path)], env={**os.environ, 'OMP_NUM_THREADS': '1'}, stderr=subprocess.PIPE)
    wait_for(lambda: files(tmp_path) or run.poll() is not None)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.stderr.read().decode()[-2000:]
    before = files(tmp_path)
    assert 0 < len(before) < 12
    dls = images.dataloaders(device='cpu', bs=4)
    trials = NetworkSelector(several, slow).fit(dls, taxonomy, C9, tmp_path, progress=False).trials
    after = files(tmp_path)
    assert len(after) == 12 and {f: t for f, t in after.items() if f in before} == before
    assert trials == try_candidates(dls, taxonomy, C9, several, slow)


def test_processes_give_the_same_trials(images, taxonomy, tmp_path):
    dls, told = images.dataloaders(device='cpu', bs=32), []
    train = lambda jobs, how, cache, progress: in_processes(2, per_job=2)(jobs, how, cache, lambda *a: told.append(a))
    assert try_candidates(dls, taxonomy, C9, pair, short, cache=tmp_path, train=train) == try_candidates(dls, taxonomy, C9, pair, short)
    assert len(files(tmp_path)) == 6 and told[-1] == (6, 6)


def test_processes_are_not_sent_the_images(images, taxonomy, monkeypatch):
    "All images go into one file, once, and a part is no more than its name and numbers"
    sent, files, whole = [], set(), images.images.numel()
    def weighed(f):
        def task(*args):
            sent.append(len(cloudpickle.dumps(args)))
            files.add((args[0], args[0].stat().st_size))
            return delayed(f)(*args)
        return task
    monkeypatch.setattr(selection, 'delayed', weighed)
    try_candidates(images.dataloaders(device='cpu', bs=32), taxonomy, C9, pair[:1], recipe(short, epochs=1), train=in_processes(2, 2))
    (file, size), = files
    assert len(sent) == 3 and max(sent) < whole/20 and whole < size < 1.5*whole and not file.exists()


def test_processes_without_a_cache(images, taxonomy):
    dls = images.dataloaders(device='cpu', bs=32)
    assert try_candidates(dls, taxonomy, C9, pair[:1], short, train=in_processes(2, 1)) == try_candidates(dls, taxonomy, C9, pair[:1], short)


def _descendants(pid):
    "Process ids below `pid`."
    parent = {}
    for p in Path('/proc').iterdir():
        try: parent[int(p.name)] = int((p/'stat').read_text().rsplit(')', 1)[1].split()[1])
        except (ValueError, OSError): pass
    def below(q): return q in parent and (parent[q] == pid or below(parent[q]))
    return [q for q in parent if below(q)]


def _workers():
    "Ids of our Ray workers that are at work on jobs."
    def title(pid):
        try: return Path(f'/proc/{pid}/cmdline').read_text()
        except OSError: return ''
    return [pid for pid in _descendants(os.getpid()) if title(pid).startswith('ray::_fill')]


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='finds workers in /proc')
def test_ray_gives_the_same_trials_though_a_worker_is_killed(images, taxonomy, tmp_path):
    ray = pytest.importorskip('ray', reason='Ray is an extra: pip install hdfast[ray]')
    from threading import Thread
    dls, killed = images.dataloaders(device='cpu', bs=4), []
    def kill():
        wait_for(lambda: files(tmp_path) and _workers())
        killed.append(_workers()[0])
        os.kill(killed[0], signal.SIGKILL)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80*2**20, log_to_driver=False)
    try:
        thread = Thread(target=kill, daemon=True)
        thread.start()
        trials = try_candidates(dls, taxonomy, C9, several, slow, cache=tmp_path, train=in_ray(ray, n_parts=2))
        thread.join(5)
    finally: ray.shutdown()
    assert killed and len(files(tmp_path)) == 12
    assert trials == try_candidates(dls, taxonomy, C9, several, slow)


def test_a_wrong_confusion_is_refused_before_anything_is_trained(dls, taxonomy):
    for C, message in ((50*np.eye(9), 'divide each row by its sum'), (np.eye(4), 'a confusion of 4 classes and a hierarchy of 9')):
        with pytest.raises(ValueError, match=message): try_candidates(dls, taxonomy, C, ['MLP_6', 'MLP_8'], recipe('one_cycle', epochs=1), train=None)


def test_candidates_that_a_regression_cannot_tell_apart_get_a_classifier():
    alike = ['MLP_16_64', 'MLP_32_32']
    assert isinstance(NetworkSelector(alike).chooser, SpecClassifier) and isinstance(NetworkSelector([NetworkSpec('linear'), 'MLP_8']).chooser, SpecClassifier)
    assert isinstance(NetworkSelector('mlp').chooser, SpecRegressor)
    with pytest.raises(ValueError, match="MLP_16_64 and MLP_32_32 have as many layers"): NetworkSelector(alike, chooser=SpecRegressor())
    with pytest.raises(ValueError, match='no hidden layer'): NetworkSelector([NetworkSpec('linear'), 'MLP_8'], chooser=SpecRegressor())


def test_what_cannot_choose_is_refused_before_anything_is_trained():
    from sklearn.ensemble import RandomForestClassifier
    with pytest.raises(ValueError, match='wrap the RandomForestClassifier'): NetworkSelector(['MLP_8', 'MLP_16'], chooser=RandomForestClassifier())
    with pytest.raises(ValueError, match="'CNN_2' alone leaves nothing to choose"): NetworkSelector('CNN_2')


def test_other_processes_multiply_as_exactly_as_this_one(dls, tmp_path):
    how, jobs, before = recipe('one_cycle', epochs=1), [Job(dls, 'MLP_4', i) for i in range(2)], torch.get_float32_matmul_precision()
    selection._fill(jobs, [1], how, tmp_path, 'high')
    assert torch.get_float32_matmul_precision() == before
    torch.set_float32_matmul_precision('high')
    try: assert [cached_file(job, how, tmp_path).exists() for job in jobs] == [False, True]
    finally: torch.set_float32_matmul_precision(before)
