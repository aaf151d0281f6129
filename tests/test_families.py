"The training engine: whatever it fuses, records or keeps, the networks are those of a Learner, one by one."
import os, random, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import wraps
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fastai.vision.all import ImageDataLoaders, aug_transforms
from hypothesis import given, settings, strategies as st
from torch import nn

import hdfast.families as families
from hdfast.clustering import cluster_into
from hdfast.families import (Job, _practise, _record, _Steps, _train_fused, _train_recorded, bar_over, code_hash, code_version, feature_dataloaders, features, fit_network,
                             fit_networks, network_key, train)
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.learners import (Normalization, SkipValidation, ViewDataLoaders, build_network, class_view, cluster_view, computed_in, crop_flip, input_shape, mlp_learner, network_learner,
                             recipe, training_loader)
from hdfast.networks import network_spec, seeded
from hdfast.trunk import flat_network

HOW = {'paper': recipe('paper', epochs=2, bs=32), 'one_cycle': recipe('one_cycle', epochs=3, bs=16)}
recipes = pytest.mark.parametrize('how', HOW.values(), ids=list(HOW))
CPU = torch.device('cpu')
dry_cnn = replace(network_spec('CNN_3'), dropout=0.)


def weights(net): return torch.cat([v.detach().flatten().float() for v in net.state_dict().values()])

def same(a, b): return torch.equal(weights(a), weights(b))

def gap(a, b): return (weights(a) - weights(b)).abs().max().item()

def one_by_one(jobs, how): return [train(job.build(), job.dls, how, job.seed, job.name) for job in jobs]

def part(dls, classes, n):
    "A view of some classes with `n` training samples only"
    view = class_view(dls, classes)
    ds = view.train.dataset
    return ViewDataLoaders(view.train.new(ds.select(ds.index[:n], ds.targets[:n], ds.vocab)), *view.loaders[1:], device=view.device)


# ---- the lean loop is a Learner's

def by_learner(dls, spec, how, seed):
    learn = network_learner(dls, spec, seed=seed, metrics=None, cbs=SkipValidation())
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(how, seed=seed)
    return learn.model

def by_loop(dls, spec, how, seed): return train(build_network(spec, len(dls.vocab), input_shape(dls), seed), dls, how, seed)


@recipes
@pytest.mark.parametrize('spec', ['MLP_8', 'CNN_3'])
@pytest.mark.parametrize('augment', [None, crop_flip], ids=['plain', 'augmented'])
def test_the_loop_gives_a_learners_network_to_the_bit(images, how, spec, augment):
    dls = class_view(images.dataloaders(device='cpu', augment=augment), [1, 4, 5])
    assert same(by_learner(dls, spec, how, 3), by_loop(dls, spec, how, 3))


@recipes
def test_the_loop_gives_a_learners_network_with_weight_decay(dls, how):
    how = replace(how, wd=.1)
    assert same(by_learner(dls, 'MLP_8', how, 0), by_loop(dls, 'MLP_8', how, 0))


def test_the_loop_gives_a_learners_network_on_a_users_loaders(image_folder):
    dls = ImageDataLoaders.from_folder(image_folder, valid_pct=.2, seed=0, bs=32, num_workers=0, device='cpu')
    assert same(by_learner(dls, 'CNN_3', HOW['one_cycle'], 5), by_loop(dls, 'CNN_3', HOW['one_cycle'], 5))


@recipes
def test_in_bfloat16_the_loop_gives_a_learners_network_to_the_bit_and_another_than_in_float32(dls, how):
    rounded, view = replace(how, precision='bfloat16'), class_view(dls, range(3))
    net = by_loop(view, 'CNN_3', rounded, 2)
    assert same(by_learner(view, 'CNN_3', rounded, 2), net) and not same(by_loop(view, 'CNN_3', how, 2), net)
    assert 'forward' not in vars(net) and all(p.dtype == torch.float32 for p in net.parameters())


def test_recorded_steps_take_the_precision_too(dls):
    rounded, view = replace(HOW['paper'], precision='bfloat16'), class_view(dls, range(3))
    net = build_network(dry_cnn, 3, input_shape(view), seed=2).train()
    with computed_in(rounded, net, CPU): _train_recorded([net], [training_loader(view, rounded.bs, 2)], rounded, ['one'], CPU)
    assert gap(net, by_loop(view, dry_cnn, rounded, 2)) < 1e-6


def test_perceptrons_are_trained_in_float32_whatever_the_precision(dls):
    assert same(*[by_loop(dls, 'MLP_8', replace(HOW['paper'], precision=p), 0) for p in ('float32', 'bfloat16')])


def test_the_precision_is_part_of_the_key(dls):
    assert len({network_key(Job(dls, 'CNN_3'), replace(HOW['paper'], precision=p)) for p in ('float32', 'bfloat16')}) == 2


def test_the_key_knows_whether_samples_are_shuffled_and_how_products_are_made(dls):
    key = lambda: network_key(Job(dls, 'CNN_3'), HOW['paper'])
    keys, shuffle, precision = [key()], dls.train.shuffle, torch.get_float32_matmul_precision()
    try:
        dls.train.shuffle = False
        keys.append(key())
        torch.set_float32_matmul_precision('medium')
        keys.append(key())
    finally:
        dls.train.shuffle = shuffle
        torch.set_float32_matmul_precision(precision)
    assert len({*keys}) == 3 and key() == keys[0]


def test_features_are_made_where_the_body_is(dls):
    "and not where the images are"
    body, images = nn.Sequential(nn.Conv2d(3, 2, 3)).to('meta'), torch.zeros(5, 3, 8, 8)
    seen = []
    body.register_forward_pre_hook(lambda m, x: seen.append(x[0].device.type))
    with pytest.raises(NotImplementedError): families.features(body, images, torch.Tensor.float) # nothing comes back from there
    assert seen == ['meta']


def test_numbers_of_numpy_and_torch_are_told_apart_in_the_key(dls):
    keys = [network_key(Job(dls, 'CNN_3'), replace(HOW['paper'], lr=lr)) for lr in (np.float32(.1), np.float32(.01), torch.tensor(.5), torch.tensor(.25), np.float64(.1), .1)]
    assert len({*keys}) == 5 and keys[4] == keys[5]
    assert network_key(Job(dls, 'CNN_3', seed=np.int64(3)), HOW['paper']) == network_key(Job(dls, 'CNN_3', seed=3), HOW['paper'])
    for n in (object(), np.ones(1), 'a'):
        with pytest.raises(TypeError, match="can't be written as JSON"): families.plain_number(n)


def test_training_leaves_the_global_random_state_alone(dls):
    before = torch.get_rng_state()
    by_loop(dls, 'CNN_3', HOW['paper'], 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_are_reported_with_their_last_loss(dls):
    heard = []
    net = build_network('MLP_8', 9, (3, 16, 16), 0)
    train(net, dls, HOW['one_cycle'], on_epoch=lambda epoch, loss: heard.append((epoch, loss)))
    assert [e for e, _ in heard] == [0, 1, 2] and all(isinstance(loss, float) and loss > 0 for _, loss in heard)


# ---- fused perceptrons are those trained one by one

@given(subsets=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True), min_size=2, max_size=5), bs=st.integers(5, 70),
       which=st.sampled_from(list(HOW)), wd=st.sampled_from([0., .1]), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_fused_perceptrons_are_those_trained_one_by_one(images, subsets, bs, which, wd, seed):
    dls, how = images.dataloaders(device='cpu'), replace(HOW[which], bs=bs, wd=wd)
    jobs = [Job(class_view(dls, classes), 'MLP_7_5', seed + i) for i, classes in enumerate(subsets)]
    assert max(map(gap, _train_fused(jobs, how), one_by_one(jobs, how))) < 1e-6


@recipes
@pytest.mark.parametrize('sizes', [(20, 9, 13), (16, 16), (17, 33), (1, 30), (5, 4)], ids=['unequal', 'exact', 'last of one', 'a single sample', 'one batch'])
def test_fused_perceptrons_with_all_kinds_of_last_batches(dls, how, sizes):
    how = replace(how, bs=16)
    jobs = [Job(part(dls, range(i, i + 4), n), 'MLP_7_5', i) for i, n in enumerate(sizes)]
    assert [len(job.dls.train.dataset) for job in jobs] == list(sizes)
    assert max(map(gap, _train_fused(jobs, how), one_by_one(jobs, how))) < 1e-6


@recipes
def test_fused_perceptrons_start_from_given_weights(dls, how):
    given = build_network('MLP_7_5', 1, (3, 16, 16), 9).state_dict()
    first = {k: v for k, v in given.items() if k.startswith('head.fc1')}
    jobs = [Job(class_view(dls, [0, 1]), 'MLP_7_5', weights=first), Job(class_view(dls, [2, 3, 4]), 'MLP_7_5', 1)]
    fused = _train_fused(jobs, how)
    assert max(map(gap, fused, one_by_one(jobs, how))) < 1e-6
    assert gap(fused[0], _train_fused([replace(jobs[0], weights=None), jobs[1]], how)[0]) > 1e-3


def test_fused_perceptrons_answer_in_eval_mode(dls):
    jobs = [Job(class_view(dls, c), 'MLP_7', i) for i, c in enumerate(([0, 1], [2, 3]))]
    assert not any(net.training for net in _train_fused(jobs, HOW['paper']))


# ---- recorded steps, which run on a CPU as well, without the recording

def recorded(jobs, how):
    nets = [job.build() for job in jobs]
    return whole([error or net.eval() for net, error in zip(nets, _train_recorded(nets, [training_loader(job.dls, how.bs, job.seed) for job in jobs], how, [job.name for job in jobs], CPU))])


def whole(nets):
    "Networks, if none of them diverged."
    for net in nets:
        if isinstance(net, FloatingPointError): raise net
    return nets


def fused(jobs, how): return whole(_train_fused(jobs, how))


@recipes
@pytest.mark.parametrize('spec', ['MLP_7_5', dry_cnn], ids=['MLP', 'CNN'])
def test_recorded_steps_are_those_of_the_loop(dls, how, spec):
    how = replace(how, wd=.01)
    jobs = [Job(class_view(dls, c), spec, i) for i, c in enumerate(([0, 1, 2], [3, 4, 5, 6, 7], [8]))]
    assert max(map(gap, recorded(jobs, how), one_by_one(jobs, how))) < 1e-6


@pytest.mark.parametrize('n', [1, 15, 16, 17, 32])
def test_recorded_steps_with_all_kinds_of_last_batches(dls, n):
    how = replace(HOW['one_cycle'], bs=16)
    job = Job(part(dls, range(4), n), 'MLP_7_5', 1)
    assert gap(*recorded([job], how), *one_by_one([job], how)) < 1e-6


def one_step(dls):
    "A training of a single step"
    how = replace(HOW['one_cycle'], epochs=1)
    steps = _Steps(build_network(dry_cnn, 4, (3, 16, 16), 1).train(), training_loader(part(dls, range(4), 9), how.bs, 1), how, CPU)
    assert len(steps) == 1
    return steps


def test_practice_before_recording_stays_on_the_first_step(dls):
    steps = one_step(dls)
    _practise(steps, 9)
    assert steps.at.item() == 0 and steps.losses.item() > 0


def test_recording_a_single_step_leaves_everything_as_it_was(dls, monkeypatch):
    steps = one_step(dls)
    state = lambda: torch.cat([t.flatten() for t in (*steps.params, *(t for ts in steps.rule.state for t in ts), steps.at, steps.losses)])
    before = state().clone()
    with monkeypatch.context() as m:
        m.setattr(families.torch, 'cuda', MagicMock())
        _record(steps)
    assert torch.equal(state(), before)


def test_a_recorded_network_alone_has_the_loops_dropout(dls):
    job = Job(class_view(dls, [1, 2, 3]), 'CNN_3', 4)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net, = recorded([job], HOW['paper'])
    assert gap(net, *one_by_one([job], HOW['paper'])) < 1e-6


@recipes
def test_batch_normalisation_is_trained_as_a_learner_does(dls, how):
    new = lambda: flat_network(dry_cnn, 3, (3, 16, 16), batch_norm=True, seed=2)
    view = class_view(dls, [0, 3, 6])
    learn = network_learner(view, 'MLP_8', metrics=None, cbs=SkipValidation())
    learn.model = new()
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(how, seed=2)
    loop, steps = train(new(), view, how, 2), new().train()
    _train_recorded([steps], [training_loader(view, how.bs, 2)], how, ['it'], CPU)
    assert same(learn.model, loop) and gap(steps, loop) < 1e-5


# ---- on a GPU

def share_apart(net, other, first):
    "How far two networks lie apart, as a share of how far the other has come from where it started: the larger of weights and running statistics"
    kinds = [lambda net: net.parameters()] + [lambda net: (b for b in net.buffers() if b.is_floating_point())]*any(True for _ in net.buffers())
    away = lambda a, b, kind: sum((x - y).norm()**2 for x, y in zip(kind(a), kind(b)))**.5
    return max((away(net, other, kind)/away(other, first, kind)).item() for kind in kinds)


def as_in(spec, view, seed):
    "A network with batch normalisation, or of a specification"
    return flat_network(dry_cnn, len(view.vocab), (3, 16, 16), batch_norm=True, seed=seed).to(view.device) if spec == 'normed' else Job(view, spec, seed).build()


@recipes
@pytest.mark.parametrize('spec, precision, tolerance', [('MLP_7_5', 'float32', .01), (dry_cnn, 'float32', .1), ('normed', 'float32', .1), (dry_cnn, 'bfloat16', .3)],
                         ids=['MLP', 'CNN', 'batch norm', 'CNN in bfloat16'])
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here, on which steps are recorded as CUDA graphs')
def test_on_a_gpu_recorded_and_fused_steps_are_those_of_the_loop(images, monkeypatch, how, spec, precision, tolerance):
    dls, how, recordings = images.dataloaders(device='cuda'), replace(how, wd=.01, precision=precision), []
    monkeypatch.setattr(families, '_record', lambda steps: recordings.append(steps) or _record(steps))
    views = [class_view(dls, c) for c in ([0, 1, 2], [3, 4, 5, 6, 7], [7, 8])]
    new = lambda: [as_in(spec, view, i) for i, view in enumerate(views)]
    trained = lambda: [train(net, view, how, i) for i, (net, view) in enumerate(zip(new(), views))]
    if how.optimizer == 'sgd': tolerance /= 5 # Adam makes more of rounding
    apart = lambda nets: max(map(share_apart, nets, loop, new()))
    with monkeypatch.context() as m:
        m.setattr(families, 'can_be_recorded', lambda dls: False)
        loop = trained()
    assert not recordings
    assert apart(trained()) < tolerance and len(recordings) == 3
    if spec == 'normed': return
    together = fit_networks([Job(view, spec, i) for i, view in enumerate(views)], how) # fused, or side by side
    assert apart(together) < tolerance and len(recordings) == (3 if spec == 'MLP_7_5' else 6)


# ---- lists of jobs

def test_networks_come_in_the_order_of_their_jobs_however_they_are_trained(dls):
    specs = ['MLP_7', dry_cnn, 'MLP_7', 'MLP_9', 'MLP_7', dry_cnn, 'MLP_9']
    jobs = [Job(class_view(dls, [i, i + 1, i + 2][:1 + i % 3]), spec, i) for i, spec in enumerate(specs)]
    heard = []
    nets = fit_networks(jobs, HOW['paper'], progress=lambda done, all: heard.append((done, all)))
    assert max(map(gap, nets, one_by_one(jobs, HOW['paper']))) < 1e-6
    assert heard == [(i, 7) for i in range(1, 8)]


def test_perceptrons_alike_are_fused_and_others_are_not(dls, monkeypatch):
    fused = []
    monkeypatch.setattr(families, '_train_fused', lambda jobs, how: fused.append([job.spec for job in jobs]) or _train_fused(jobs, how))
    fit_networks([Job(class_view(dls, [i, i + 1]), spec, i) for i, spec in enumerate(['MLP_7', 'MLP_9', 'MLP_7', dry_cnn, 'MLP_5'])], HOW['paper'])
    assert fused == [['MLP_7', 'MLP_7']]


def test_the_bar_catches_up_with_what_is_done(monkeypatch):
    at = []
    def bar(steps, leave):
        for i in steps:
            at.append(i)
            yield i
        at.append(len(steps))
    monkeypatch.setattr(families, 'progress_bar', bar)
    show, seen = bar_over(10), []
    for done in (1, 6, 6, 10, 10):
        show(done, 10)
        seen.append(at[-1])
    assert seen == [1, 6, 6, 10, 10]


def test_no_jobs_give_no_networks(tmp_path): assert fit_networks([], HOW['paper'], tmp_path) == []


def test_only_what_the_cache_lacks_is_trained(dls, tmp_path, monkeypatch):
    jobs = [Job(class_view(dls, [i, i + 1]), 'MLP_7', i) for i in range(5)]
    first = fit_networks([jobs[3], jobs[1]], HOW['paper'], tmp_path)
    trained = []
    monkeypatch.setattr(families, '_train_fused', lambda jobs, how: trained.extend(job.seed for job in jobs) or _train_fused(jobs, how))
    nets = fit_networks(jobs, HOW['paper'], tmp_path)
    assert trained == [0, 2, 4] and same(nets[3], first[0]) and same(nets[1], first[1])
    fit_networks(jobs, HOW['paper'], tmp_path)
    assert trained == [0, 2, 4]


def test_the_cache_keeps_how_long_training_took(dls, tmp_path):
    jobs = [Job(class_view(dls, [i, i + 1]), spec, i) for i, spec in enumerate(['MLP_7', 'MLP_7', 'CNN_3'])]
    nets, seconds = families.timed(lambda: fit_networks(jobs, HOW['paper'], tmp_path))
    fused, again, convolutional = (net.training_seconds for net in nets)
    assert fused == again > 0 < convolutional and fused + again + convolutional < seconds
    assert [net.training_seconds for net in fit_networks(jobs, HOW['paper'], tmp_path)] == [net.training_seconds for net in nets]
    assert families.fit_network(jobs[2].dls, 'CNN_3', HOW['paper'], 2, cache=tmp_path).training_seconds == convolutional


def twice(f):
    "What two that call a function at the same time get."
    with ThreadPoolExecutor(2) as pool: return [call.result(60) for call in [pool.submit(f) for _ in range(2)]]


def test_two_that_want_the_same_networks_at_once_train_them_once(dls, tmp_path, monkeypatch):
    trained = []
    def slowly(f):
        def g(*args, **kwargs):
            trained.append(f)
            time.sleep(.3) # until the other one has looked into the cache
            return f(*args, **kwargs)
        return g
    for name in ('train', '_train_fused'): monkeypatch.setattr(families, name, slowly(getattr(families, name)))
    assert same(*twice(lambda: fit_network(dls, 'MLP_4', HOW['paper'], cache=tmp_path))) and len(trained) == 1
    jobs = [Job(class_view(dls, [i, i + 1]), 'MLP_7', i) for i in range(3)]
    assert all(map(same, *twice(lambda: fit_networks(jobs, HOW['paper'], tmp_path)))) and len(trained) == 2
    twice(lambda: fit_network(dls, 'MLP_4', HOW['paper'])) # nobody waits where nothing is kept
    assert len(trained) == 4


def test_lists_that_share_a_network_wait_for_that_one_alone(dls, tmp_path, monkeypatch):
    trained = []
    def alone(jobs, how):
        trained.extend(job.seed for job in jobs)
        time.sleep(.3)
        return families._train_alone.as_before(jobs, how)
    alone.as_before = families._train_alone
    monkeypatch.setattr(families, '_train_alone', alone)
    shared, *own = [Job(class_view(dls, [i, i + 1]), dry_cnn, i) for i in range(5)]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(fit_networks, jobs, HOW['paper'], tmp_path) for jobs in ([shared, *own[:2]], [shared, *own[2:]])]
        a, b = (call.result(60) for call in calls)
    assert sorted(trained) == [0, 1, 2, 3, 4] and same(a[0], b[0])


@pytest.mark.parametrize('error', [OSError(37, 'No locks available'), NotImplementedError()])
def test_where_files_cannot_be_locked_everybody_trains(dls, tmp_path, monkeypatch, error):
    def acquire(self, *args, **kwargs): raise error
    monkeypatch.setattr(families.FileLock, 'acquire', acquire)
    net = fit_network(dls, 'MLP_4', HOW['paper'], cache=tmp_path)
    assert same(net, fit_network(dls, 'MLP_4', HOW['paper'])) and len([*tmp_path.glob('*.safetensors')]) == 1


@pytest.mark.parametrize('cache', ['', None])
def test_no_folder_is_no_cache(dls, cache): assert same(fit_network(dls, 'MLP_4', HOW['paper'], cache=cache), fit_networks([Job(dls, 'MLP_4')], HOW['paper'], cache)[0])


def test_another_pytorch_trains_anew(dls, monkeypatch):
    key = families.network_key(job := Job(dls, 'CNN_3'), HOW['paper'])
    monkeypatch.setattr(torch, '__version__', '99')
    assert families.network_key(job, HOW['paper']) != key


RESUME = """
import sys
from hdfast import families
from hdfast.datasets import synthetic
from hdfast.learners import class_view, recipe
dls = synthetic(n_groups=3, classes_per_group=3, n_per_class=20, size=16).dataloaders(device='cpu')
jobs = [families.Job(class_view(dls, [i, i + 1]), 'CNN_3', i, f'network {i}') for i in range(6)]
train = families.train
def told(*args, **kwargs):
    print('train', args[4], flush=True)
    return train(*args, **kwargs)
families.train = told
for net in families.fit_networks(jobs, recipe('one_cycle', epochs=3), sys.argv[1]): print('sum', sum(p.double().sum().item() for p in net.parameters()))
"""

def test_a_run_that_was_killed_goes_on_and_trains_nothing_twice(tmp_path):
    run = lambda folder: subprocess.Popen([sys.executable, '-c', RESUME, str(tmp_path/folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = lambda out, what: [line for line in out.splitlines() if line.startswith(what)]
    with run('killed') as killed:
        for line in killed.stdout:
            if line.strip() == 'train network 3': break
        killed.send_signal(signal.SIGKILL)
    kept = {f.name: f.read_bytes() for f in (tmp_path/'killed').glob('[!.]*')}
    assert len(kept) == 3
    with run('killed') as again: out, err = again.communicate()
    assert again.returncode == 0, err
    assert lines(out, 'train') == [f'train network {i}' for i in (3, 4, 5)]
    assert all((tmp_path/'killed'/name).read_bytes() == content for name, content in kept.items())
    with run('whole') as whole: undisturbed, _ = whole.communicate()
    assert lines(out, 'sum') == lines(undisturbed, 'sum') and len(lines(out, 'sum')) == 6


# ---- jobs and keys

@pytest.mark.parametrize('weights, message', [({'head.fc9.weight': torch.zeros(1)}, 'expert 7 has no weight head.fc9.weight; it has head.fc1.weight'),
                                              ({'head.fc1.bias': torch.zeros(4)}, r'head.fc1.bias has shape \(4,\), in expert 7 it is \(8,\)')])
def test_weights_that_do_not_fit_are_named(dls, weights, message):
    with pytest.raises(ValueError, match=message): fit_networks([Job(dls, 'MLP_8', 0, 'expert 7', weights)], HOW['paper'])


def test_weights_to_start_from_are_part_of_the_key(dls):
    key = lambda **weights: network_key(Job(dls, 'MLP_8', weights={k.replace('_', '.'): v for k, v in weights.items()}), HOW['paper'])
    assert len({key(), key(head_bias=torch.zeros(8)), key(head_bias=torch.ones(8)), key(head_out=torch.zeros(8))}) == 4


def test_a_job_leaves_the_weights_it_starts_from_as_they_were(dls):
    first = {'head.fc1.bias': torch.ones(8)}
    fit_networks([Job(dls, 'MLP_8', weights=first)], HOW['paper'])
    assert torch.equal(first['head.fc1.bias'], torch.ones(8))


CODE = '"About."\nimport torch\n\ndef f(x):\n    "Twice."\n    return 2*x\n\nclass C:\n    "It."\n    async def g(self):\n        "Go."\n        return "a"\n'

@pytest.mark.parametrize('old, new', [('return 2*x', 'return 2 * x # why'), ('"About."', '"Other."'), ('"Twice."', '"Double."'), ('"It."', '"That."'),
                                      ('\n\ndef', '\n\n\n# f\ndef'), ('"Go."', '"Went."')])
def test_prose_does_not_change_the_hash_of_code(old, new): assert code_hash(CODE.replace(old, new)) == code_hash(CODE)


@pytest.mark.parametrize('old, new', [('2*x', '3*x'), ('2*x', '2*y'), ('return "a"', 'return "b"'), ('import torch', 'import numpy'), ('f(x)', 'f(x=1)')])
def test_code_changes_its_hash(old, new): assert code_hash(CODE.replace(old, new)) != code_hash(CODE)


def test_the_hash_of_code_is_the_same_under_every_python(): assert code_hash(CODE, 'x = None') == 'fe846475c07b'


def test_the_version_is_of_the_code_that_was_imported(tmp_path, monkeypatch):
    before = code_version('families')
    monkeypatch.setattr(families.networks, '__file__', str(tmp_path/'networks.py')) # as if all modules were edited
    (tmp_path/'families.py').write_text(CODE)
    assert code_version('families') == before != code_hash(CODE)


def test_the_version_is_of_the_modules_that_make_networks_batches_and_steps():
    assert len({code_version(*names) for names in (('networks',), ('learners',), ('families',), ('networks', 'learners', 'families'))}) == 4


# ---- a loss that isn't finite

@pytest.fixture
def spoiled(dls):
    "Jobs on features, of which those of class 4 aren't finite; the network in the middle sees them"
    clean = feature_dataloaders(dls, nn.AvgPool2d(4))
    clean.train.dataset.images[clean.train.dataset.index[clean.train.dataset.targets == 4]] = torch.nan
    return [Job(class_view(clean, c), 'MLP_7', i, f'expert {i}') for i, c in enumerate(([0, 1, 2], [3, 4], [5, 6]))]


ENGINES = {'loop': one_by_one, 'fused': fused, 'recorded': recorded}

@pytest.mark.parametrize('engine', ENGINES.values(), ids=list(ENGINES))
def test_a_loss_that_is_not_finite_names_network_epoch_and_batch(spoiled, engine):
    how = recipe('paper', epochs=2, bs=4)
    order = training_loader(spoiled[1].dls, 4, 1).order()[0]
    first = next(i for i, b in enumerate(order.split(4)) if (spoiled[1].dls.train.dataset.targets[b] == 1).any())
    with pytest.raises(FloatingPointError, match=f'the loss of expert 1 became nan in epoch 1, batch {first + 1}:'): engine(spoiled, how)


def test_a_network_that_diverges_leaves_those_before_it_in_the_cache(dls, tmp_path):
    jobs = [Job(class_view(dls, [i, i + 1]), dry_cnn, i, f'expert {i}') for i in range(2)]
    bad = replace(jobs[1], weights={k: torch.full_like(v, torch.nan) for k, v in jobs[1].build().state_dict().items()})
    with pytest.raises(FloatingPointError, match='expert 1'): fit_networks([jobs[0], bad], HOW['paper'], tmp_path)
    assert len(list(tmp_path.glob('[!.]*'))) == 1


def test_a_network_that_diverges_leaves_those_beside_it_in_the_cache(spoiled, tmp_path):
    how = recipe('paper', epochs=2, bs=4)
    sound = [replace(job, weights=None) for job in (spoiled[0], spoiled[2])]
    with pytest.raises(FloatingPointError, match='expert 1'): fit_networks(spoiled, how, tmp_path)
    assert all(families.cached_file(job, how, tmp_path).exists() for job in sound) and not families.cached_file(spoiled[1], how, tmp_path).exists()
    assert max(map(gap, fit_networks(sound, how, tmp_path), one_by_one(sound, how))) < 1e-6


def test_too_many_networks_for_the_memory_are_trained_in_halves(dls, monkeypatch):
    jobs, asked = [Job(class_view(dls, [i, i + 1]), dry_cnn, i, f'expert {i}') for i in range(5)], []
    def short(nets, *args):
        asked.append(len(nets))
        if len(nets) > 2: raise torch.OutOfMemoryError('CUDA out of memory')
        return _train_recorded(nets, *args)
    monkeypatch.setattr(families, '_train_recorded', short)
    nets = families._train_side_by_side(jobs, HOW['paper'])
    assert asked == [5, 2, 3, 1, 2] and max(map(gap, nets, one_by_one(jobs, HOW['paper']))) < 1e-4
    monkeypatch.setattr(families, '_train_recorded', lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory')))
    with pytest.raises(torch.OutOfMemoryError): families._train_side_by_side(jobs[:1], HOW['paper'])


@pytest.mark.parametrize('engine', [fused, one_by_one], ids=['fused', 'loop'])
def test_what_the_last_step_left_has_to_predict(dls, engine):
    jobs = [Job(part(dls, [i, i + 1], 8), 'MLP_8', i, f'expert {i}') for i in range(2)]
    with pytest.raises(FloatingPointError, match="predictions of expert 0 aren't finite"): engine(jobs, recipe('paper', epochs=1, lr=1e38))


# ---- features

class Mean(nn.Module):
    "The mean of each channel, with something that differs in training"
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(.5)
    def forward(self, x): return self.drop(x).mean((2, 3), keepdim=True)


def test_features_are_what_the_body_makes_of_each_sample_in_eval_mode(dls):
    body = Mean()
    made = feature_dataloaders(dls, body)
    for ours, theirs in zip(made.loaders, dls.loaders):
        ours, theirs = ours.new(shuffle=False), theirs.new(shuffle=False)
        for (f, y), (x, z) in zip(ours, theirs, strict=True):
            assert torch.equal(y, z) and torch.allclose(f, x.mean((2, 3), keepdim=True), atol=1e-6)
    assert body.training


@pytest.mark.parametrize('bs', [1, 7, 1000])
def test_features_do_not_depend_on_the_batches_they_are_made_in(dls, bs):
    images, inputs = dls.train.dataset.images, dls.train.inputs
    parts = [features(Mean(), part, inputs) for part in images.split(bs)]
    assert torch.allclose(torch.cat(parts), features(Mean(), images, inputs), atol=1e-6)


def test_bodies_that_differ_give_keys_that_differ(dls):
    key = lambda body: network_key(Job(feature_dataloaders(dls, body), 'MLP_8'), HOW['paper'])
    def conv(seed, stride=2):
        with seeded(seed): return nn.Conv2d(3, 2, 3, stride)
    assert key(conv(0)) == key(conv(0))
    bodies = [conv(0), conv(1), conv(0, stride=1), nn.MaxPool2d(2), nn.AvgPool2d(2)]
    assert len({*map(key, bodies), network_key(Job(dls, 'MLP_8'), HOW['paper'])}) == 6


def test_features_of_images_normalised_otherwise_have_another_key(dls):
    other = ViewDataLoaders(*[dl.new(normalize=Normalization((.5,)*3, (.2,)*3)) for dl in dls.loaders], device='cpu')
    key = lambda dls: network_key(Job(feature_dataloaders(dls, nn.AvgPool2d(4)), 'MLP_8'), HOW['paper'])
    assert key(dls) != key(other)


def test_views_of_features_are_views(dls, taxonomy):
    made = feature_dataloaders(dls, nn.AvgPool2d(4))
    few, many = class_view(made, [5, 1]), cluster_view(made, taxonomy)
    assert input_shape(few) == (3, 4, 4) and list(few.vocab) == [dls.vocab[5], dls.vocab[1]] and len(many.vocab) == 3
    assert few.train.dataset.images is made.train.dataset.images
    assert torch.equal(many.valid.dataset.targets, torch.tensor(taxonomy.home.copy())[dls.valid.dataset.targets])


def test_heads_on_different_features_are_not_mixed_up(dls, tmp_path):
    a, b = feature_dataloaders(dls, nn.AvgPool2d(4)), feature_dataloaders(dls, nn.MaxPool2d(4))
    jobs = [Job(class_view(made, c), 'MLP_7', i) for i, (made, c) in enumerate([(a, [0, 1]), (b, [0, 1]), (a, [2, 3, 4]), (b, [2, 3, 4])])]
    nets = fit_networks(jobs, HOW['paper'], tmp_path)
    assert max(map(gap, nets, one_by_one(jobs, HOW['paper']))) < 1e-6
    assert all(map(same, fit_networks(jobs, HOW['paper'], tmp_path), nets)) and len(list(tmp_path.glob('[!.]*'))) == 4


def test_features_of_features_go_on(dls):
    twice = feature_dataloaders(feature_dataloaders(dls, nn.AvgPool2d(2)), nn.AvgPool2d(2))
    once = feature_dataloaders(dls, nn.AvgPool2d(4))
    assert torch.allclose(twice.train.dataset.images, once.train.dataset.images, atol=1e-6)


def test_making_features_leaves_frozen_parts_of_the_body_as_they_are(dls):
    body = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(.5)).train()
    body[0].eval()
    feature_dataloaders(dls, body)
    assert body.training and [m.training for m in body] == [False, True]


def test_features_need_an_image_set_without_augmentation(images, image_folder):
    with pytest.raises(ValueError, match="ImageSet's own DataLoaders"):
        feature_dataloaders(ImageDataLoaders.from_folder(image_folder, valid_pct=.2, bs=8, num_workers=0, device='cpu'), Mean())
    with pytest.raises(ValueError, match="can't be augmented"): feature_dataloaders(images.dataloaders(device='cpu', augment=crop_flip), Mean())


# ---- what isn't known to the cache isn't cached

def test_an_augmentation_is_known_by_all_that_it_does(images, monkeypatch):
    key = lambda f: network_key(Job(images.dataloaders(device='cpu', augment=f), 'MLP_4'), HOW['paper'])
    wrapped = wraps(crop_flip)(lambda x, g: crop_flip(x, g, 1))
    with pytest.raises(ValueError, match='give the augmentation a name'): key(wrapped)
    before = key(shifted)
    monkeypatch.setattr(sys.modules[__name__], 'SHIFT', 1)
    assert key(shifted) != before


SHIFT = 2
def shifted(x, g): return crop_flip(x, g, SHIFT)


def test_random_numbers_of_the_caller_stay_as_they_are(images, image_folder):
    files = ImageDataLoaders.from_folder(image_folder, valid_pct=.2, bs=8, num_workers=0, device='cpu', batch_tfms=aug_transforms(size=16))
    for dls in (images.dataloaders(device='cpu'), files):
        states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        before = states()
        fit_networks([Job(dls, 'MLP_4', seed=s) for s in (0, 1)], recipe(HOW['paper'], epochs=1))
        mlp_learner(dls, 4).fit_recipe(recipe(HOW['paper'], epochs=1))
        assert states() == before


def test_features_are_made_for_loaders_over_the_same_images(images):
    one, other = images.dataloaders(device='cpu'), replace(images, images=images.images.flip(0)).dataloaders(device='cpu')
    with pytest.raises(ValueError, match='different images'): feature_dataloaders(ViewDataLoaders(one.train, other.valid, device='cpu'), nn.Flatten())


def test_images_elsewhere_are_not_recorded(dls):
    assert families.can_be_recorded(dls)
    dls.device = torch.device('meta')
    assert not families.can_be_recorded(dls)


class Aug:
    def __init__(self, pad): self.pad = pad
    def apply(self, x, g): return crop_flip(x, g, pad=self.pad)


def test_augmentation_is_known_by_its_text(images, monkeypatch):
    key = lambda f: network_key(Job(images.dataloaders(device='cpu', augment=f), 'MLP_4'), HOW['paper'])
    assert key(crop_flip) == key(crop_flip) != key(None)
    with pytest.raises(ValueError, match="can't be cached"): key(Aug(1).apply)
    before = key(crop_flip)
    monkeypatch.setattr(families, 'getsource', lambda f: 'another text')
    assert key(crop_flip) != before


def test_whole_numbers_of_numpy_are_numbers_in_a_key(dls):
    import numpy as np
    job, how = Job(dls, 'MLP_4', seed=3), recipe('paper', epochs=5)
    assert network_key(replace(job, seed=np.int64(3)), replace(how, epochs=np.int64(5))) == network_key(job, how)


# ---- settings of the process

def test_the_precision_of_products_is_known_by_either_of_its_names(dls):
    code = """
import torch
from hdfast.datasets import synthetic
from hdfast.families import Job, multiplied_as, network_key, product_precision
from hdfast.learners import recipe
job = Job(synthetic(2, 2, 10, size=8).dataloaders(device='cpu'), 'MLP_4')
said = [product_precision()]
torch.backends.cuda.matmul.fp32_precision = 'tf32'
said.append(product_precision())
with multiplied_as('high'): inside = product_precision()
torch.set_float32_matmul_precision('highest')
with multiplied_as(said[1]): as_told, here = product_precision(), network_key(job, recipe('paper'))
print(said[0], said[1] != said[0], inside, as_told == said[1], product_precision(), here != network_key(job, recipe('paper')))
"""
    ran = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert ran.stdout.split() == ['highest', 'True', 'high', 'True', 'highest', 'True'], ran.stderr


def test_comparing_convolutions_changes_no_other_setting(monkeypatch):
    cudnn = torch.backends.cudnn
    for deterministic in (False, True):
        monkeypatch.setattr(cudnn, 'deterministic', deterministic)
        before = cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark
        with families._compared_convolutions(True): assert (cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark) == (*before[:3], not deterministic)
        assert (cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark) == before


def test_layers_that_may_decide_in_python_are_not_recorded():
    class Own(nn.Module):
        def forward(self, x): return x
    assert families._is_known(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()))
    assert not families._is_known(nn.Sequential(Own())) and not families._is_known(nn.BatchNorm2d(4, momentum=None))


shift, table, helped, weights_of, kind = 1, [1, 2], {'b', 'a'}, torch.ones(2), torch.Tensor
def helper(x): return x + shift
def other(x): return x - shift
def augmentation(x, g): return torch.stack([helper(r) for r in x if isinstance(r, kind)]) + table[0]*len(helped)*weights_of[0]

def test_the_key_of_an_augmentation_knows_what_it_calls(monkeypatch):
    texts = [families._function_text(augmentation)]
    assert families._function_text(augmentation) == texts[0]
    for name, value in (('helper', other), ('table', [1, 3]), ('helped', {'c'}), ('shift', 2), ('weights_of', torch.zeros(2))):
        monkeypatch.setitem(globals(), name, value)
        texts.append(families._function_text(augmentation))
    assert len(set(texts)) == 6


def test_weights_are_as_readable_as_other_files(dls, tmp_path):
    before = os.umask(0o022)
    try:
        fit_network(dls, 'MLP_4', HOW['paper'], cache=tmp_path)
        HierarchicalClassifier(cluster_into(np.eye(9), 3, None, list(dls.vocab)), 'MLP_4', 'MLP_4', HOW['paper']).fit(dls, progress=False).save(tmp_path/'m')
    finally: os.umask(before)
    files = [*tmp_path.glob('*.safetensors'), tmp_path/'m'/'model.safetensors']
    assert len(files) == 2 and all(f.stat().st_mode & 0o777 == 0o644 for f in files)
