"Views, loaders in memory, recipes and training: the right samples with the right labels, and the same network from the same seed."
import pickle
import random
from functools import partial
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.data import PartialDL
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.load import DataLoader as fastai_loader
from fastai.vision.all import (DataLoaders, CategoryBlock, ClassificationInterpretation, DataBlock, ImageBlock, ImageDataLoaders, Normalize, PILImage, RandomSplitter,
                               Resize, aug_transforms, get_image_files, load_learner, parent_label)
from hypothesis import given, strategies as st
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import hdfast.families as families
import hdfast.learners as learners
from hdfast.clustering import cluster_classes, hierarchy_from_groups
from hdfast.datasets import HELD_OUT, TRAIN, ImageSet, synthetic
from hdfast.families import Job, feature_dataloaders, fit_network, network_key, save_weights
from hdfast.hierarchical import HierarchicalClassifier, decompose
from hdfast.trunk import TrunkClassifier
from hdfast.learners import (RECIPES, accuracy_on, ImageDL, training_loader, ImageView, Normalization, ViewDataLoaders, batch_sizes, build_network, class_counts, class_view, cluster_view, cnn_learner, computed_in, cnn_tl_learner, crop_flip, held_out_confusion, is_shuffled,
                             mlp_learner, network_learner, probabilities, recipe)

one_epoch = recipe('one_cycle', epochs=1)


def weights(net): return torch.cat([p.detach().flatten() for p in net.state_dict().values()])

def same(a, b): return torch.equal(weights(a), weights(b))

def file_of(ds, i): return Path(ds.dataset.items[int(ds.index[i])])

def rows(ds):
    "For each sample of a view: its row in the image set."
    return ds.index.tolist() if isinstance(ds, ImageView) else [int(file_of(ds, i).stem) for i in range(len(ds))]


@pytest.fixture
def from_folder(image_folder): return ImageDataLoaders.from_folder(image_folder, valid_pct=.2, seed=0, bs=32, num_workers=0, device='cpu')


@pytest.fixture
def data_block(image_folder):
    return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.2, seed=1), item_tfms=Resize(20),
                     batch_tfms=[*aug_transforms(size=20), Normalize.from_stats([.5]*3, [.25]*3)]).dataloaders(image_folder, bs=32, num_workers=0, device='cpu')


sources = pytest.mark.parametrize('source', ['dls', 'from_folder', 'data_block'])


# ---- views: which samples, which labels

@sources
@pytest.mark.parametrize('classes', [[4, 1], [0], [8, 3, 5, 0], list(range(9))])
def test_a_class_view_holds_every_sample_of_its_classes_numbered_in_the_given_order(source, classes, images, request):
    dls = request.getfixturevalue(source)
    view = class_view(dls, classes)
    assert list(view.vocab) == [images.classes[c] for c in classes] and view.c == len(classes)
    for whole, part in zip(dls.loaders, view.loaders, strict=True):
        got = {r: classes[int(y)] for r, y in zip(rows(part.dataset), part.dataset.targets, strict=True)}
        assert got == {r: int(images.labels[r]) for r in rows(learners.as_view(whole.dataset)) if images.labels[r] in classes}


@sources
def test_a_cluster_view_holds_every_sample_labelled_by_the_home_of_its_class(source, images, request):
    dls = request.getfixturevalue(source)
    h = cluster_classes(np.eye(9)*.5 + np.full((9, 9), .5/9), 3, gamma=20, classes=images.classes)
    assert sum(map(len, h.clusters)) > 9                                            # they overlap: home decides
    view = cluster_view(dls, h)
    assert view.c == len(view.vocab) == h.n_clusters
    for whole, part in zip(dls.loaders, view.loaders, strict=True):
        assert rows(part.dataset) == rows(learners.as_view(whole.dataset))
        assert part.dataset.targets.tolist() == h.home[images.labels[rows(part.dataset)]].tolist()


@sources
def test_a_view_of_a_view_is_a_view(source, images, request):
    outer = [7, 2, 5, 0]
    inner = class_view(class_view(request.getfixturevalue(source), outer), [3, 1])
    assert list(inner.vocab) == [images.classes[0], images.classes[2]]
    for dl in inner.loaders: assert [images.classes[images.labels[r]] for r in rows(dl.dataset)] == [inner.vocab[int(y)] for y in dl.dataset.targets]
    h = hierarchy_from_groups(['x', 'y', 'x', 'y'], [images.classes[c] for c in outer])
    for dl in cluster_view(class_view(request.getfixturevalue(source), outer), h).loaders:
        assert dl.dataset.targets.tolist() == [h.home[outer.index(images.labels[r])] for r in rows(dl.dataset)]


@sources
def test_batches_hold_each_sample_of_a_view_exactly_once_with_its_label(source, images, request):
    view = class_view(request.getfixturevalue(source), [6, 0, 3])
    for dl in view.loaders:
        assert dl.bs <= len(dl.dataset) and len(dl) == -(-len(dl.dataset)//dl.bs)
        batches = list(dl)
        assert len(batches) == len(dl)
        labels = torch.cat([torch.as_tensor(y) for _, y in batches])
        assert torch.bincount(labels, minlength=3).tolist() == torch.bincount(dl.dataset.targets, minlength=3).tolist()


def test_batches_in_memory_are_the_normalised_images_in_order(dls, images):
    mean, std = (v[:, None, None] for v in images.mean_std())
    for dl, index in zip(list(dls.loaders)[1:], (images.held_out, images.test), strict=True):
        x, y = (torch.cat(o) for o in zip(*dl))
        assert torch.allclose(x, (images.images[index]/255 - mean)/std, atol=1e-5) and torch.equal(y, images.labels[index])


def test_training_batches_are_shuffled_anew_each_epoch_and_keep_image_and_label_together(dls, images):
    mean, std = (v[:, None, None] for v in images.mean_std())
    row = {x.numpy().tobytes(): i for i, x in enumerate(images.images)}
    epochs = []
    for _ in range(2):
        x, y = (torch.cat(o) for o in zip(*dls.train))
        seen = [row[p.numpy().tobytes()] for p in ((x*std + mean)*255).round().to(torch.uint8)]
        assert sorted(seen) == images.train.tolist() and y.tolist() == images.labels[seen].tolist()
        epochs.append(seen)
    assert epochs[0] != epochs[1] and images.train.tolist() not in epochs


def test_images_of_a_folder_view_are_the_files_themselves(from_folder):
    for dl in class_view(from_folder, [4, 1]).loaders:
        for i in range(len(dl.dataset)):
            assert parent_label(file_of(dl.dataset, i)) == dl.vocab[int(dl.dataset[i][1])]
            assert np.array_equal(np.array(dl.dataset[i][0]), np.array(PILImage.create(file_of(dl.dataset, i))))


def test_a_view_keeps_the_transforms_of_a_data_block_and_augments_training_alone(data_block):
    view = class_view(data_block, [2, 5])
    x = next(iter(view.valid))[0]
    assert x.shape[1:] == (3, 20, 20) and x.min() < -.1                                             # resized and normalised
    assert torch.equal(x, next(iter(view.valid))[0])
    whole = [torch.cat([torch.as_tensor(x).flatten(1).sum(1) for x, _ in view.train]).sort().values for _ in range(2)]
    assert not torch.allclose(*whole)                                                               # the same samples in another order would sort alike


def test_no_pixel_is_copied(dls, images, taxonomy):
    at = images.images.data_ptr()
    views = [dls, cluster_view(dls, taxonomy), class_view(dls, [1, 2]), class_view(class_view(dls, [1, 2]), [0])]
    assert {dl.dataset.images.data_ptr() for v in views for dl in v.loaders} == {at}


labels = st.lists(st.integers(0, 5), min_size=1, max_size=30)
mappings = st.lists(st.integers(-1, 4), min_size=6, max_size=6)


def a_view(labels): return ImageView(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), torch.arange(len(labels)), torch.tensor(labels), 'abcdef')


@given(labels, mappings, st.lists(st.integers(-1, 3), min_size=5, max_size=5))
def test_relabelling_twice_is_relabelling_by_the_composition(labels, f, g):
    twice = a_view(labels).relabel(f, 'vwxyz').relabel(g, 'pqrs')
    once = a_view(labels).relabel([-1 if i < 0 else g[i] for i in f], 'pqrs')
    assert twice.index.tolist() == once.index.tolist() and twice.targets.tolist() == once.targets.tolist() and twice.vocab == once.vocab


@given(labels, mappings)
def test_relabelling_drops_what_is_mapped_to_minus_one_and_keeps_the_rest_in_order(labels, f):
    view = a_view(labels)
    new = view.relabel(f, 'vwxyz')
    assert list(zip(new.index.tolist(), new.targets.tolist())) == [(i, f[y]) for i, y in enumerate(labels) if f[y] >= 0]
    assert view.targets.tolist() == labels
    assert a_view(labels).relabel(range(6), 'abcdef').targets.tolist() == labels


# ---- views: what is refused

@sources
@pytest.mark.parametrize('classes', [[], [9], [-1], [0, 99]])
def test_class_ids_that_do_not_exist_are_refused(source, classes, request):
    with pytest.raises(ValueError, match=r'0\.\.8'): class_view(request.getfixturevalue(source), classes)


def test_a_view_without_training_samples_is_refused_and_its_classes_named(dls):
    train = dls.train.dataset
    empty = dls.train.new(train.select(train.index[train.targets != 4], train.targets[train.targets != 4], train.vocab))
    dls.loaders[0] = empty
    with pytest.raises(ValueError, match=f'no training sample of {train.vocab[4]}'): class_view(dls, [4])
    assert len(class_view(dls, [4, 5]).train.dataset) > 0


@sources
def test_a_hierarchy_of_other_classes_is_refused_and_the_difference_named(source, images, request):
    dls, others = request.getfixturevalue(source), list(images.classes)
    others[3] = 'zebra'
    with pytest.raises(ValueError, match=f"class 3 is 'zebra' in one and '{images.classes[3]}'"): cluster_view(dls, hierarchy_from_groups([0]*9, others))
    with pytest.raises(ValueError, match='2 and 9 classes'): cluster_view(dls, hierarchy_from_groups([0, 1]))


def test_a_class_given_twice_is_refused(dls):
    with pytest.raises(ValueError): class_view(dls, [1, 1])


# ---- loaders

@pytest.mark.parametrize('n_train, bs', [(1, 128), (5, 128), (33, 32), (64, 32), (7, 3)])
def test_batches_are_no_larger_than_the_samples_and_drop_none(n_train, bs):
    labels, split = torch.zeros(n_train + 2, dtype=torch.long), torch.tensor([TRAIN]*n_train + [HELD_OUT]*2, dtype=torch.int8)
    dls = ImageSet('x', torch.zeros(n_train + 2, 3, 4, 4, dtype=torch.uint8), labels, ('only',), split).dataloaders(bs=bs, device='cpu')
    sizes = [len(y) for _, y in dls.train]
    assert sizes == batch_sizes(n_train, bs) and len(sizes) == len(dls.train) and dls.train.bs == min(bs, n_train)


@given(n=st.integers(0, 2000), bs=st.integers(1, 300))
def test_batches_are_few_and_equal(n, bs):
    sizes = batch_sizes(n, bs)
    assert sum(sizes) == n and len(sizes) == -(-n//bs) and sizes == sorted(sizes, reverse=True) and (not n or max(sizes) <= bs and max(sizes) - min(sizes) <= 1)


def test_no_batch_of_fastais_own_loaders_is_a_remainder(image_folder):
    dls = ImageDataLoaders.from_folder(image_folder, valid_pct=.2, seed=1, item_tfms=Resize(16), bs=32, device='cpu', num_workers=0)
    n = len(dls.train_ds)
    sizes = [len(y) for _, y in training_loader(dls, n - 1, 0)] # one image would be left over
    assert sum(sizes) == n and len(sizes) == 2 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize('n', [np.int64(3), np.int32(3)])
def test_numbers_of_numpy_are_numbers(dls, n):
    assert type(recipe('paper', epochs=n, bs=n).bs) is int
    assert training_loader(dls, n, np.int64(3)).rng.random() == training_loader(dls, n, 3).rng.random()


@pytest.mark.parametrize('n', [1, 5])
def test_a_network_is_trained_on_fewer_samples_than_a_batch(n):
    labels, split = torch.arange(2).repeat(n + 1), torch.tensor([TRAIN]*2*n + [HELD_OUT]*2, dtype=torch.int8)
    images = torch.arange(2, dtype=torch.uint8).mul(200).repeat(n + 1)[:, None, None, None].expand(-1, 3, 4, 4)
    dls = ImageSet('x', images, labels, ('dark', 'light'), split).dataloaders(device='cpu')
    net = fit_network(dls, 'MLP_8', recipe('paper', epochs=12, lr=.1))
    assert (probabilities(net, dls.valid)[0].argmax(1) == [0, 1]).all()


def test_a_view_gets_back_to_the_wanted_batch_size(dls):
    small = class_view(dls, [0])
    assert small.train.bs < 32 and small.train.new(dls.train.dataset).bs == 32


def test_normalising_leaves_what_it_is_given():
    x = torch.full((1, 3, 2, 2), 255.)
    assert Normalization((.5,)*3, (.5,)*3)(x).eq(1).all() and x.eq(255).all()


def test_normalising_and_back_gives_the_same_pixels():
    x = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    n = Normalization((.5, .4, .3), (.2, .25, .3))
    assert torch.equal((n.decode(n(x))*255).round().to(torch.uint8), x)
    assert torch.allclose(n(x), (x/255 - torch.tensor(n.mean)[:, None, None])/torch.tensor(n.std)[:, None, None], atol=1e-5)


@given(st.integers(1, 5), st.integers(3, 9), st.integers(3, 9), st.integers(0, 4), st.integers(0, 2**31))
def test_crop_flip_shifts_by_at_most_pad_and_mirrors_and_does_nothing_else(n, h, w, pad, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 256, (n, 3, h, w), generator=g, dtype=torch.uint8)
    before, out = x.clone(), crop_flip(x, g, pad)
    assert out.shape == x.shape and out.dtype == torch.uint8 and torch.equal(x, before)
    for a, b in zip(x, out):
        wide = torch.nn.functional.pad(a, [pad]*4)
        crops = [wide[:, i:i+h, j:j+w] for i in range(2*pad + 1) for j in range(2*pad + 1)]
        assert any(torch.equal(b, c) or torch.equal(b, c.flip(-1)) for c in crops)


def test_crop_flip_mirrors_about_half_and_uses_every_shift():
    x = torch.zeros(4000, 3, 9, 9, dtype=torch.uint8)
    x[:, :, 4, 4], x[:, :, 4, 5] = 100, 200
    out = crop_flip(x, torch.Generator().manual_seed(0), pad=2)[:, 0]
    mirrored = (out == 200).int().argmax(2).max(1).values < (out == 100).int().argmax(2).max(1).values
    assert .45 < mirrored.float().mean() < .55
    assert (out == 100).any(0).sum() == 25                                             # 5 rows by 5 columns


def test_augmentation_touches_training_batches_alone(images):
    plain, augmented = images.dataloaders(device='cpu'), images.dataloaders(device='cpu', augment=crop_flip)
    for dl, other in zip(list(plain.loaders)[1:], list(augmented.loaders)[1:]): assert torch.equal(next(iter(dl))[0], next(iter(other))[0])
    plain.train.rng, augmented.train.rng = random.Random(0), random.Random(0)
    (x, y), (x_aug, y_aug) = next(iter(plain.train)), next(iter(augmented.train))
    assert torch.equal(y, y_aug) and not torch.equal(x, x_aug)
    assert class_view(augmented, [0]).train.augment is crop_flip


# ---- recipes

def test_the_recipe_called_paper_is_the_papers():
    r = RECIPES['paper']
    assert (r.epochs, r.lr, r.schedule, r.optimizer, r.wd, r.bs) == (40, .01, 'constant', 'sgd', 0, 128)
    sgd = learners.optimizers['sgd']([[torch.nn.Parameter(torch.zeros(1))]], lr=.01)
    assert sgd.hypers[0]['mom'] == .9


@pytest.mark.parametrize('name, changes, message', [('papr', {}, 'there are paper, one_cycle'), ('paper', dict(schedule='cosine'), 'schedule'),
                                                    ('paper', dict(optimizer='lion'), 'sgd, adam'), ('paper', dict(precision='float16'), 'float32, bfloat16'), ('paper', dict(epochs=0), 'epochs must be a whole number, at least 1, not 0'),
                                                    ('paper', dict(epochs=2.5), 'epochs must be a whole number'), ('paper', dict(bs=0), 'bs must be'), ('paper', dict(bs=12.), 'bs must be')])
def test_a_recipe_that_makes_no_sense_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message): recipe(name, **changes)


def test_constant_sgd_with_momentum_is_what_the_recipe_does(dls):
    net = fit_network(dls, 'MLP_4', recipe('paper', epochs=2, bs=50), seed=5)
    ours = network_learner(dls, 'MLP_4', seed=5).model
    opt, loss = torch.optim.SGD(ours.parameters(), lr=.01, momentum=.9), torch.nn.CrossEntropyLoss()
    dls.train.rng, dls.train.bs = random.Random(5), 50
    for _ in range(2):
        for x, y in dls.train:
            opt.zero_grad()
            loss(ours(x), y).backward()
            opt.step()
    assert torch.allclose(weights(net), weights(ours), atol=1e-6)


@pytest.mark.parametrize('changes', [dict(epochs=2), dict(lr=.02), dict(schedule='one_cycle'), dict(optimizer='adam'), dict(wd=.5), dict(bs=16)], ids=str)
def test_every_field_of_a_recipe_has_its_effect(dls, changes):
    base = recipe('paper', epochs=1)
    assert not same(fit_network(dls, 'MLP_4', base), fit_network(dls, 'MLP_4', recipe(base, **changes)))


# ---- the same seed, the same network

@pytest.mark.parametrize('spec', ['MLP_8', 'CNN_3'])                                  # CNN_3 has dropout
@pytest.mark.parametrize('augment', [None, crop_flip])
def test_the_same_seed_gives_the_same_network_bit_for_bit(images, spec, augment):
    def fit(seed, disturbance):
        torch.manual_seed(disturbance), np.random.seed(disturbance), random.seed(disturbance)
        view = class_view(images.dataloaders(device='cpu', augment=augment), [0, 1])
        list(view.train)                                                              # what was drawn before doesn't matter
        return fit_network(view, spec, recipe('one_cycle', epochs=1, bs=16), seed=seed)
    one, again, other = fit(3, 0), fit(3, 1), fit(4, 0)
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize('source', ['from_folder'])
def test_the_same_seed_gives_the_same_network_on_a_users_loaders(source, request):
    one, again = (fit_network(class_view(request.getfixturevalue(source), [0, 1]), 'MLP_8', one_epoch, seed=3) for _ in range(2))
    assert same(one, again)


def test_training_leaves_the_global_random_state_of_torch_alone(dls):
    before = torch.get_rng_state()
    fit_network(dls, 'CNN_3', one_epoch)
    assert torch.equal(before, torch.get_rng_state())


# ---- NaN

def test_a_loss_that_is_not_finite_is_an_error_that_names_the_network(dls):
    with pytest.raises(FloatingPointError, match='loss of the expert of cluster 7 became .*epoch'):
        fit_network(dls, 'MLP_8', recipe('paper', epochs=9, lr=1e9), name='the expert of cluster 7')


def test_a_network_that_diverged_is_not_cached(dls, tmp_path):
    with pytest.raises(FloatingPointError): fit_network(dls, 'MLP_8', recipe('paper', epochs=9, lr=1e9), cache=tmp_path)
    assert not list(tmp_path.rglob('*.safetensors'))


def test_a_network_that_diverges_in_its_last_step_is_an_error_too(dls):
    view = class_view(dls, [0, 1])                                                    # one batch
    with pytest.raises(FloatingPointError): fit_network(view, 'MLP_8', recipe('paper', epochs=1, lr=1e38))


# ---- the cache

def test_a_network_from_the_cache_is_the_same_to_the_bit_and_is_not_trained_again(dls, tmp_path, monkeypatch):
    view = class_view(dls, [2, 3])
    one = fit_network(view, 'CNN_3', one_epoch, seed=1, cache=tmp_path/'new')
    monkeypatch.setattr(families, 'train', lambda *args, **kwargs: pytest.fail('trained again'))
    again = fit_network(view, 'CNN_3', one_epoch, seed=1, cache=tmp_path/'new')
    assert same(one, again) and not again.training
    assert np.array_equal(probabilities(one, view.valid)[0], probabilities(again, view.valid)[0])


def test_everything_that_determines_the_weights_changes_the_key(images):
    def key(images=images, classes=(0, 1), spec='MLP_8', recipe=one_epoch, seed=0, augment=None):
        return network_key(Job(class_view(images.dataloaders(device='cpu', augment=augment), classes), spec, seed), recipe)
    def changed(**tensors): return replace(images, **tensors)
    brighter, resplit, relabelled = images.images.clone(), images.split.clone(), images.labels.clone()
    brighter[images.train[0], 0, 0, 0] ^= 1
    resplit[images.train[0]] = HELD_OUT
    relabelled[images.train[0]] = 1
    keys = [key(), key(classes=(1, 0)), key(classes=(0, 1, 2)), key(spec='MLP_9'), key(recipe=recipe(one_epoch, lr=.5)), key(recipe=recipe(one_epoch, epochs=2)),
            key(seed=1), key(augment=crop_flip), key(changed(images=brighter)), key(changed(split=resplit)), key(changed(labels=relabelled)),
            key(synthetic(3, 3, 20, size=24))]
    assert len(set(keys)) == len(keys)
    assert key() == key() == key(changed())


def view_without_source(pixels, body=None):
    loaders = [ImageDL(ImageView(pixels, torch.arange(4), torch.tensor([0, 1, 0, 1]), 'ab'), shuffle=s, device='cpu') for s in (True, False)]
    dls = ViewDataLoaders(*loaders, device='cpu')
    return dls if body is None else feature_dataloaders(dls, body)


@pytest.mark.parametrize('body', [None, torch.nn.AvgPool2d(2)], ids=['images', 'features'])
def test_images_that_nothing_tells_from_others_are_not_cached(body, tmp_path):
    with pytest.raises(ValueError, match='fingerprint.*ImageSet.dataloaders.*`source`'):
        fit_network(view_without_source(torch.rand(4, 3, 4, 4), body), 'MLP_4', one_epoch, cache=tmp_path)
    fit_network(view_without_source(torch.rand(4, 3, 4, 4), body), 'MLP_4', one_epoch)


def test_an_augmentation_without_a_name_of_its_own_is_not_cached(images):
    for f in (lambda x, g: x, partial(crop_flip, pad=1)):
        with pytest.raises(ValueError, match='give the augmentation a name'): network_key(Job(images.dataloaders(device='cpu', augment=f), 'MLP_8'), one_epoch)


def test_what_is_in_other_loaders_cannot_be_known_so_they_are_not_cached(from_folder, tmp_path):
    with pytest.raises(ValueError, match='only networks on an ImageSet can be cached'): fit_network(from_folder, 'MLP_8', one_epoch, cache=tmp_path)


def half_written(file, data):
    "What a full disk makes of a write."
    with open(file, 'wb') as f: f.write(data[:len(data)//2])
    raise OSError('no space left')


def test_a_write_that_fails_midway_leaves_no_network_and_the_next_call_goes_on(dls, tmp_path, monkeypatch):
    view = class_view(dls, [0, 1])
    with monkeypatch.context() as full:
        full.setattr(Path, 'write_bytes', half_written)
        with pytest.raises(OSError, match='no space'): fit_network(view, 'MLP_8', one_epoch, cache=tmp_path)
    assert not list(tmp_path.glob('[!.]*'))
    one = fit_network(view, 'MLP_8', one_epoch, cache=tmp_path)
    assert [f.name for f in tmp_path.glob('[!.]*')] == [f"{network_key(Job(view, 'MLP_8'), one_epoch)}.safetensors"]
    assert same(one, fit_network(view, 'MLP_8', one_epoch, cache=tmp_path))


def test_a_write_that_fails_leaves_the_older_file_whole(tmp_path, monkeypatch):
    net, file = torch.nn.Linear(2, 2), tmp_path/'net.safetensors'
    net.training_seconds = 1
    save_weights(net, file)
    before = file.read_bytes()
    monkeypatch.setattr(Path, 'write_bytes', half_written)
    with pytest.raises(OSError, match='no space'): save_weights(net, file)
    assert file.read_bytes() == before


# ---- probabilities

def test_probabilities_come_in_the_loaders_order_and_leave_the_mode_of_the_network(dls):
    net = cnn_learner(dls, 'CNN_3').model.train()
    probs, y = probabilities(net, dls.valid)
    assert net.training and np.array_equal(y, dls.valid.dataset.targets)
    assert np.allclose(probs.sum(1), 1, atol=1e-5) and np.array_equal(probs, probabilities(net, dls.valid)[0])      # no dropout
    with torch.no_grad(): want = torch.cat([net.eval()(x).softmax(1) for x, _ in dls.valid])
    assert np.allclose(probs, want, atol=1e-6)


@sources
def test_a_shuffled_loader_is_refused(source, request):
    dls = request.getfixturevalue(source)
    with pytest.raises(ValueError, match='shuffled'): probabilities(mlp_learner(dls, 4).model, dls.train)


FOUR = TensorDataset(torch.rand(4, 3), torch.arange(4))
BY_SAMPLER = [RandomSampler(FOUR), SubsetRandomSampler(range(4)), WeightedRandomSampler([1.]*4, 4), DistributedSampler(FOUR, 1, 0)]

@pytest.mark.parametrize('options', [dict(shuffle=True), dict(batch_size=None, shuffle=True), *[dict(sampler=s) for s in BY_SAMPLER],
                                     *[dict(batch_sampler=BatchSampler(s, 2, False)) for s in BY_SAMPLER]])
def test_a_shuffled_loader_of_torch_is_refused(options):
    dl = DataLoader(FOUR, **options)
    assert is_shuffled(dl)
    with pytest.raises(ValueError, match='shuffled'): probabilities(torch.nn.Linear(3, 2), dl)


def test_a_loader_of_torch_that_is_not_shuffled_is_taken():
    net, dl = torch.nn.Linear(3, 2), DataLoader(FOUR, 3)
    assert not is_shuffled(dl) and not is_shuffled([])
    assert np.allclose(probabilities(net, dl)[0], net(FOUR.tensors[0]).softmax(1).detach()) and probabilities(net, dl)[1].tolist() == [0, 1, 2, 3]


def test_frozen_parts_stay_frozen_when_a_network_is_asked_and_when_it_fails(dls):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(3*16*16), torch.nn.Linear(3*16*16, 9))
    net[1].eval()
    modes = lambda: [m.training for m in net]
    probabilities(net, dls.valid)
    assert modes() == [True, False, True]
    net.append(torch.nn.Linear(1, 1))
    with pytest.raises(RuntimeError): probabilities(net, dls.valid)
    assert modes() == [True, False, True, True]


def test_the_training_samples_are_seen_without_augmentation_when_not_shuffled(images):
    a, b = (images.dataloaders(device='cpu', augment=f).train.new(shuffle=False) for f in (None, crop_flip))
    assert torch.equal(next(iter(a))[0], next(iter(b))[0])


def without_held_out(dls, classes):
    "The same loaders with held-out samples of these classes only"
    v = dls.valid.dataset
    keep = torch.isin(v.targets, torch.tensor(classes, dtype=torch.long))
    return ViewDataLoaders(dls.train, dls.valid.new(v.select(v.index[keep], v.targets[keep], v.vocab)), device='cpu')


def test_without_a_held_out_image_there_is_no_confusion(dls):
    with pytest.raises(ValueError, match='dls.valid has no images: the confusion is measured on a held-out slice'):
        held_out_confusion(mlp_learner(dls, 4).model, without_held_out(dls, []))


def test_classes_without_a_held_out_image_are_named(dls, recwarn):
    net = mlp_learner(dls, 4).model
    held_out_confusion(net, dls)
    assert not [w for w in recwarn if 'held-out' in str(w.message)]
    with pytest.warns(UserWarning, match=f'no held-out image of {dls.vocab[3]}, {dls.vocab[8]}: '):
        C = held_out_confusion(net, without_held_out(dls, [0, 1, 2, 4, 5, 6, 7]))
    assert C[3, 3] == C[8, 8] == 1 and C[0, 0] < 1


@sources
def test_training_images_are_counted(source, request):
    view = class_view(request.getfixturevalue(source), [4, 1])
    assert class_counts(view).tolist() == [(view.train.dataset.targets == k).sum() for k in (0, 1)]


# ---- they are fastai's

def test_learning_learns_what_there_is_to_learn(dls):
    learn = mlp_learner(dls, 32)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(recipe('one_cycle', epochs=8))
    assert learn.recorder.values[-1][-1] > 3/9                                       # chance is 1/9; the metric is accuracy on the held-out slice
    assert learn.validate()[1] == learn.recorder.values[-1][-1]


@pytest.mark.parametrize('make', [lambda d: mlp_learner(d), lambda d: mlp_learner(d, 7, 5), lambda d: cnn_learner(d), lambda d: cnn_learner(d, 'CNN_5')])
def test_factories_take_size_and_classes_from_the_data(make, dls, from_folder, data_block):
    for d in (class_view(dls, [0, 1, 2]), from_folder, data_block):
        x, _ = d.valid.one_batch()
        assert make(d).model.eval()(x).shape == (len(x), len(d.vocab))


def test_transfer_networks_have_their_factory_too():
    d = synthetic(1, 2, 5, size=64).dataloaders(device='cpu')
    x, _ = d.valid.one_batch()
    assert cnn_tl_learner(d, 'CNN_TL_5').model.eval()(x).shape == (len(x), 2)


@sources
def test_the_learning_rate_finder_and_show_batch_work(source, request):
    d = class_view(request.getfixturevalue(source), [1, 2])
    learn = mlp_learner(d, 4)
    with learn.no_bar(), learn.no_logging(): assert 0 < learn.lr_find(show_plot=False, num_it=8).valley < 10
    for dl in list(d.loaders)[:2]:
        dl.show_batch(max_n=2)
        shown = {ax.get_title() for ax in plt.gcf().axes}
        assert shown and shown <= set(d.vocab)
        plt.close()


def test_callbacks_of_fastai_work(dls, tmp_path):
    stop, save = EarlyStoppingCallback(monitor='accuracy', min_delta=2, patience=1), SaveModelCallback(monitor='valid_loss', fname='best')
    learn = mlp_learner(dls, 4, cbs=[stop, save], path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(9, 1e-3)
    assert len(learn.recorder.values) == 2                                           # no accuracy is better by 2, so it stops after the second epoch
    best = min(v[1] for v in learn.recorder.values)
    learn.remove_cbs([stop, save])
    with learn.no_bar(): assert learn.validate()[0] == pytest.approx(best, abs=1e-6)


@sources
def test_predictions_of_fastai_come_in_the_order_of_the_view(source, request):
    view = class_view(request.getfixturevalue(source), [4, 1, 7])
    learn = mlp_learner(view, 4)
    with learn.no_bar(): preds, y = learn.get_preds()
    want, targets = probabilities(learn.model, view.valid)
    assert np.allclose(preds, want, atol=1e-6) and np.array_equal(y, targets)


@sources
def test_the_confusion_matrix_of_fastai_has_a_row_for_each_class(source, request):
    learn = mlp_learner(class_view(request.getfixturevalue(source), [4, 1, 7]), 4)
    with learn.no_bar(): assert ClassificationInterpretation.from_learner(learn).confusion_matrix().shape == (3, 3)


@sources
def test_the_samples_with_the_largest_losses_are_shown_with_their_labels(source, request):
    view = class_view(request.getfixturevalue(source), [4, 1, 7])
    learn = mlp_learner(view, 4)
    with learn.no_bar():
        told = ClassificationInterpretation.from_learner(learn)
        losses, at, items = told.top_losses(3, items=True)
        inputs, _, targets, _, again = told[at]
        told.plot_top_losses(3)
    assert torch.equal(again, losses) and [str(o).split()[1] for o in items] == [f'{i}:' for i in at.tolist()]
    want = [view.valid.dataset[int(i)] for i in at]
    assert targets.tolist() == [int(y) for _, y in want] and len(inputs) == 3
    if source == 'dls': assert torch.equal(torch.as_tensor(inputs), view.valid.inputs(torch.stack([torch.as_tensor(x) for x, _ in want])))
    assert {ax.get_title().split('/')[1].strip() for ax in plt.gcf().axes} <= set(view.vocab)
    plt.close()


@sources
def test_a_learner_predicts_one_image(source, images, image_folder, request):
    view = class_view(request.getfixturevalue(source), [4, 1, 7])
    item = images.images[0] if source == 'dls' else next(image_folder.rglob('*.png'))
    with mlp_learner(view, 4).no_bar() as learn: assert learn.predict(item)[0] in view.vocab


@sources
def test_new_items_are_predicted_and_shown(source, images, image_folder, request):
    view = class_view(request.getfixturevalue(source), [4, 1, 7])
    items = list(images.images[:5]) if source == 'dls' else sorted(image_folder.rglob('*.png'))[:5]
    learn, dl = mlp_learner(view, 4), view.test_dl(items, bs=2)
    assert [len(x) for x, in dl] == [2, 2, 1] and len(view.test_dl(items).dataset) == 5
    with learn.no_bar(): preds, targets = learn.get_preds(dl=dl)
    with torch.no_grad(): want = torch.cat([learn.model.eval()(x).softmax(1) for x, in dl])
    assert targets is None and torch.allclose(torch.as_tensor(preds), torch.as_tensor(want), atol=1e-6)
    dl.show_batch(max_n=2)
    plt.close()
    with pytest.raises(ValueError, match='labels'): view.test_dl(items, with_labels=True)


def test_new_items_in_memory_are_a_dataset(dls, images):
    ds = dls.test_dl(list(images.images[:2])).dataset
    assert len(ds[1]) == 1 and torch.equal(torch.as_tensor(ds[1][0]), images.images[1]) and len(ds.new_empty()) == 0


@sources
def test_a_learner_on_a_view_is_exported_and_loaded(source, tmp_path, request):
    view = class_view(request.getfixturevalue(source), [4, 1, 7])
    learn = mlp_learner(view, 4, path=tmp_path)
    learn.export('x.pkl')
    assert same(load_learner(tmp_path/'x.pkl').model, learn.model)


# ---- a user's own loaders, not through a view

def test_the_flat_network_drops_no_sample_of_a_users_loaders(from_folder, monkeypatch):
    seen, loss = [], families.F.cross_entropy
    monkeypatch.setattr(families.F, 'cross_entropy', lambda x, y: (seen.append(len(y)), loss(x, y))[1])
    fit_network(from_folder, 'MLP_4', recipe('paper', epochs=1, bs=100))
    assert sum(seen) == len(from_folder.train.dataset)


def test_the_flat_network_is_trained_on_a_users_loaders_with_fewer_samples_than_a_batch(image_folder):
    few = ImageDataLoaders.from_folder(image_folder, valid_pct=.2, seed=0, bs=512, num_workers=0, device='cpu')
    fit_network(few, 'MLP_4', one_epoch)


class PlainDataset(torch.utils.data.Dataset):
    "Images and labels, as someone writes a dataset for PyTorch."
    def __init__(self, images, rows): self.x, self.y = images.images[rows]/255., images.labels[rows]
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i], self.y[i]


def plain_loaders(images): return DataLoaders(*[fastai_loader(PlainDataset(images, rows), bs=32, shuffle=rows is images.train) for rows in (images.train, images.held_out)])


@pytest.mark.parametrize('train', [lambda dls, h: fit_network(dls, 'CNN_2', replace(one_epoch, precision='bfloat16')), lambda dls, h: network_learner(dls, 'MLP_4').fit_recipe(one_epoch).model,
                                   lambda dls, h: HierarchicalClassifier(h, 'MLP_4', 'MLP_4', one_epoch).fit(dls).predict_proba(dls.valid),
                                   lambda dls, h: TrunkClassifier(h, recipe=one_epoch).fit(dls).predict_proba(dls.valid)], ids=['network', 'learner', 'hierarchy', 'trunk'])
def test_loaders_without_a_device_give_batches_on_the_cpu(images, taxonomy, monkeypatch, train):
    monkeypatch.setattr(PlainDataset, 'vocab', list(images.classes), raising=False)
    assert plain_loaders(images).device is None
    train(plain_loaders(images), taxonomy)


def test_training_leaves_the_callers_loaders_as_they_were(dls):
    fit_network(dls, 'MLP_4', recipe('paper', epochs=1, bs=7))
    assert dls.train.bs == 32


def test_a_forward_that_a_network_has_of_its_own_comes_back(dls):
    net = build_network('CNN_3', 4, (3, 32, 32), seed=0)
    net.forward = own = lambda x: x
    for precision in ('float32', 'bfloat16'):
        with computed_in(recipe('paper', precision=precision), net, 'cpu'): assert (net.forward is own) == (precision == 'float32')
        assert net.forward is own


# ---- what fastai asks of loaders

def test_predictions_over_training_images_come_in_their_order(dls):
    learn = network_learner(dls, 'MLP_4', seed=0)
    probs, y = learn.get_preds(dl=dls.train)
    assert torch.equal(torch.as_tensor(y), dls.train.dataset.targets)
    expected, _ = probabilities(learn.model, dls.train.new(shuffle=False))
    assert np.allclose(probs, expected, atol=1e-6) and dls.train.shuffle


def test_an_exported_learner_holds_no_images(dls, tmp_path):
    learn = network_learner(dls, 'MLP_4', seed=0)
    learn.path = tmp_path
    learn.export('learner.pkl')
    size = sum(p.numel() for p in learn.model.parameters())*4
    assert (tmp_path/'learner.pkl').stat().st_size < size + 60_000 < dls.train.dataset.images.numel() + 60_000


@pytest.mark.parametrize('change', [lambda x: x.float()/255, lambda x: x[:, :8], lambda x: x.permute(1, 2, 0)], ids=['floats', 'cropped', 'channels last'])
def test_items_that_are_no_such_images_are_refused(dls, images, change):
    items = [*images.images[:3]]
    assert len(dls.test_dl(items).dataset) == 3
    with pytest.raises(ValueError, match=r'these loaders take torch.uint8 of shape \(3, 16, 16\)'): dls.test_dl([items[0], change(items[1])])


@pytest.mark.parametrize('given', [dict(batch_tfms=aug_transforms(size=16)), dict(item_tfms=[Resize(16)]), dict(batch_tfms=[Normalize.from_stats([.5]*3, [.5]*3, cuda=False)])], ids=['augmentation', 'items', 'normalisation'])
def test_transforms_of_fastai_are_refused_where_they_would_do_nothing(images, taxonomy, given):
    dls = images.dataloaders(device='cpu')
    for event, tfms in dict(after_item=given.get('item_tfms', []), after_batch=given.get('batch_tfms', [])).items(): dls.add_tfms(tfms, event, loaders=[0, 2])
    no = pytest.raises(ValueError, match="take no transforms of fastai's, such as .*pass `augment`")
    with no: next(iter(dls.train))
    with no: fit_network(dls, 'MLP_4', one_epoch)
    with no: network_key(Job(dls, 'MLP_4'), one_epoch)
    with no: feature_dataloaders(dls, torch.nn.Flatten())
    with no: cnn_learner(dls, 'CNN_2').fit_recipe(one_epoch)
    model = HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(images.dataloaders(device='cpu'))
    with no: model.predict_proba(dls[2])
    with no: model.fit(dls)


def test_given_indices_are_what_a_loader_gives(dls):
    some = dls[2].new(get_idxs=lambda: [5, 3, 8])
    (x, y), = some
    assert torch.equal(x, next(iter(dls[2]))[0][[5, 3, 8]]) and y.tolist() == dls[2].dataset.targets[[5, 3, 8]].tolist()


@pytest.mark.parametrize('bs, least', [(4, .5), (7, .25), (20, .5), (128, .5)])
def test_the_last_batch_of_a_users_loader_is_not_much_smaller(bs, least):
    class Loader:
        wgts = partial_n = None
        def __init__(self, n): self.dataset = range(n)
        def new(self, bs, drop_last):
            self.bs = bs
            return self
    class Loaders: pass
    for n in range(1, 2000):
        dls = Loaders()
        dls.train = Loader(n)
        got = training_loader(dls, bs, 0).bs
        assert min(n, bs)/2 <= got <= bs and (n%got or got)/got >= least


def test_a_part_that_is_drawn_anew_is_shuffled(from_folder): assert is_shuffled(PartialDL(from_folder.valid_ds, partial_n=6, bs=4, shuffle=False))


def test_augmentation_at_test_time_works_on_views_of_a_users_loaders(image_folder):
    files = ImageDataLoaders.from_folder(image_folder, valid_pct=.2, seed=0, bs=32, num_workers=0, device='cpu', batch_tfms=aug_transforms(size=16))
    view = class_view(files, [0, 1, 2])
    learn = mlp_learner(view, 4)
    with learn.no_bar(): p, y = learn.tta(n=2)
    assert len(p) == len(view.valid.dataset)


def test_augmentation_at_test_time_works_in_memory(images):
    seen = []
    dls = images.dataloaders(bs=32, device='cpu', augment=lambda x, g: (seen.append(len(x)), crop_flip(x, g))[1])
    learn = mlp_learner(class_view(dls, [0, 1, 2]), 4)
    with learn.no_bar(): (augmented, plain), y = learn.tta(n=2, beta=None)
    with learn.no_bar(): again, _ = learn.get_preds()
    assert sum(seen) == 2*len(y) and torch.equal(plain, again) and not torch.equal(augmented, plain)
    assert learn.dls.valid.dataset.split_idx is None


def test_a_learner_can_be_pickled_after_training(dls):
    learn = mlp_learner(dls, 4)
    with learn.no_bar(): learn.fit_recipe(one_epoch)
    assert pickle.loads(pickle.dumps(learn)).opt_func.func is learn.opt_func.func


def test_loaders_with_weights_are_refused(from_folder):
    train = from_folder.train.new()
    train.wgts = np.ones(len(train.dataset))
    odd = type(from_folder)(train, from_folder.valid, path=from_folder.path, device='cpu')
    for use in (lambda: class_view(odd, [0, 1]), lambda: learners.training_loader(odd, 8, 0)):
        with pytest.raises(ValueError, match='would lose its weights'): use()


# ---- what is refused when a network is asked

class Says(nn.Module):
    "A network that gives what it was told."
    def __init__(self, what):
        super().__init__()
        self.what = what
    def forward(self, x): return self.what(x)


@pytest.mark.parametrize('what, message', [(lambda x: x.new_zeros(len(x), 20), r'outputs of shape \(.*, 20\); a number for each of 9 classes'), (lambda x: (x.new_zeros(len(x), 9),), 'gives a tuple'),
                                           (lambda x: x.new_full((len(x), 9), float('nan')), 'no answer for'), (lambda x: x.new_zeros(len(x)), 'outputs of shape')])
def test_what_is_no_answer_is_refused(dls, classifier_of, what, message):
    for ask in (probabilities, accuracy_on): 
        with pytest.raises(ValueError, match=message): ask(Says(what), dls[2])
    with pytest.raises(ValueError, match=message): classifier_of(dls).evaluate(dls[2], Says(what))


@pytest.fixture
def classifier_of(taxonomy): return lambda dls: HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', one_epoch).fit(dls, progress=False)


def test_what_is_no_network_is_refused_and_its_network_named(dls, taxonomy, classifier_of):
    trunk = TrunkClassifier(taxonomy, recipe=one_epoch)
    trunk.net = trunk.fit(dls).net
    for given, part in ((trunk, 'net'), (mlp_learner(dls, 4), 'model')):
        for ask in (lambda g: probabilities(g, dls[2]), lambda g: held_out_confusion(g, dls), lambda g: decompose(dls, 3, flat=g, router='MLP_4', expert='MLP_4')):
            with pytest.raises(ValueError, match=f"a {type(given).__name__} isn't a network of PyTorch: pass its `{part}`"): ask(given)
    with pytest.raises(ValueError, match='a Learner'): classifier_of(dls).evaluate(dls[2], mlp_learner(dls, 4))


def test_a_loader_that_leaves_out_its_last_samples_is_refused(from_folder, classifier_of):
    part, model = from_folder.train.new(shuffle=False, bs=10), classifier_of(from_folder)
    assert part.drop_last and len(part.dataset) % 10
    whole = part.new(drop_last=False)
    for ask in (lambda dl: probabilities(mlp_learner(from_folder, 4).model, dl)[1], model.predict):
        with pytest.raises(ValueError, match='leaves out the last'): ask(part)
        assert len(ask(whole)) == len(part.dataset)
    torchs = DataLoader(TensorDataset(torch.zeros(9, 3, 16, 16)), batch_size=2, drop_last=True)
    with pytest.raises(ValueError, match='leaves out the last 1 of 9 samples'): model.predict(torchs)


def test_an_empty_loader_is_refused(dls):
    with pytest.raises(ValueError, match='no samples'): probabilities(mlp_learner(dls, 4).model, dls.valid.new(dls.valid.dataset.new_empty()))


def test_a_learning_rate_of_numpy_is_a_number(dls): assert recipe('paper', lr=np.float32(.5)) == recipe('paper', lr=.5)


@pytest.mark.parametrize('field,value', [('lr', -.01), ('lr', 0), ('lr', float('nan')), ('lr', float('inf')), ('wd', -1), ('wd', float('nan')), ('wd', float('inf'))])
def test_a_rate_that_trains_nothing_or_uphill_is_refused(field, value):
    with pytest.raises(ValueError, match=f'{field} must be'): recipe('paper', **{field: value})


@pytest.mark.parametrize('wrong', [None, 3, dict(lr=1)])
def test_a_recipe_is_a_name_or_a_recipe(wrong):
    with pytest.raises(ValueError, match='a recipe is one of paper, one_cycle, or a Recipe'): recipe(wrong)


@pytest.mark.parametrize('bs', [0, -5, 2.5])
def test_a_batch_has_at_least_one_image(images, bs):
    with pytest.raises(ValueError, match='bs must be a whole number, at least 1'): images.dataloaders(bs=bs, device='cpu')


def test_a_learner_takes_another_loss(dls):
    loss = nn.CrossEntropyLoss(label_smoothing=.1)
    assert learners.mlp_learner(dls, 8, loss_func=loss).loss_func is loss


def test_files_are_told_from_images(dls):
    for some in (['a.png'], [Path('a.png')]):
        with pytest.raises(ValueError, match=r'a.png is a file: these loaders take images, as `read_images\(files, size\)` makes'): dls.test_dl(some)


def test_a_loader_of_unknown_length_is_not_asked_for_it(dls):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([])
    learners.check_whole(DataLoader(Stream(), batch_size=2))


def test_rates_may_be_written_as_text(): assert recipe('paper', lr='1e-3', wd=0).lr == .001 # as YAML gives them
