"Backbones read, kept and refused; candidates trained as extractor and as initialisation; the choice between them."
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fastai.torch_core import default_device
from scipy.io import savemat
from scipy.signal import correlate

from hdfast import families, transfer
from hdfast.clustering import hierarchy_from_groups
from hdfast.datasets import ImageSet, synthetic
from hdfast.families import train
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.learners import Normalization, class_view, crop_flip, recipe
from hdfast.networks import SPECS, Conv, NetworkSpec, Stage, network
from hdfast.transfer import (Backbone, Candidate, Inputs, accuracy_on, choose_networks, fit_candidates, load_backbone, pretrain, read_matconvnet,
                             transfer_hierarchy)

tiny = NetworkSpec('tiny', [Stage([Conv(3, 8)]), Stage([Conv(3, 8)])], fc=[12])
how = recipe('one_cycle', epochs=2)
stats = Normalization((.5, .4, .3), (.2, .2, .2))


def backbone(spec=tiny, normalize=stats, seed=0):
    weights = network(spec, 2, 16, seed=seed).body.state_dict()
    return Backbone('random', spec.stages, dict(weights), normalize, dict(source='a test'))

@pytest.fixture
def source(): return backbone()

@pytest.fixture
def inputs(source, dls): return Inputs(source.prepare(dls))


# ---- MatConvNet files

def cell(*items):
    out = np.empty((1, len(items)), dtype=object)
    out[0] = items
    return out

def conv(name, k, c, n, stride=1, pad=0, old=False, seed=0):
    rng = np.random.default_rng([seed, k, c, n])
    w, b = rng.normal(0, .1, (k, k, c, n)).astype(np.float32), rng.normal(0, .1, (1, n)).astype(np.float32)
    return dict(type='conv', name=name, stride=[[stride, stride]], pad=[[pad]*4], **(dict(filters=w, biases=b) if old else dict(weights=cell(w, b))))

def relu(i): return dict(type='relu', name=f'relu{i}')
def norm(i, kind='normalize', param=(5, 2, 1e-4, .75)): return dict(type=kind, name=f'norm{i}', param=[list(map(float, param))])

def pool(i, window=3, stride=2, method='max', pad=(0, 1, 0, 1)):
    return dict(type='pool', name=f'pool{i}', pool=[[window, window]], stride=[[stride, stride]], pad=[list(pad)], method=method)

def vgg_f_layers(old=False, kind='normalize'):
    "The layers of VGG-f in their order, with the fully connected ones narrowed"
    return [conv('conv1', 11, 3, 64, 4, old=old), relu(1), norm(1, kind), pool(1), conv('conv2', 5, 64, 256, 1, 2, old=old), relu(2), norm(2, kind), pool(2, pad=(0,)),
            conv('conv3', 3, 256, 256, 1, 1, old=old), relu(3), conv('conv4', 3, 256, 256, 1, 1, old=old), relu(4),
            conv('conv5', 3, 256, 256, 1, 1, old=old), relu(5), pool(5, pad=(0, 0, 0, 0)), conv('fc6', 6, 256, 16, old=old), relu(6), conv('fc7', 1, 16, 16, old=old), relu(7),
            conv('fc8', 1, 16, 10, old=old), dict(type='softmax', name='prob')]

def mat_file(folder, layers, name='net.mat', average=(124., 117., 104.), **more):
    file = folder/name
    meta = dict(meta=dict(normalization=dict(averageImage=np.full((8, 8, 3), average)))) if average else {}
    savemat(file, dict(layers=cell(*layers), **meta, **more))
    return file


@pytest.mark.parametrize('old,kind', [(False, 'normalize'), (True, 'lrn')])
def test_the_layout_of_vgg_f_gives_the_convolutions_of_every_cnn_tl(tmp_path, old, kind):
    b = load_backbone(mat_file(tmp_path, vgg_f_layers(old, kind), 'vgg-f.mat'))
    assert all(b.differences(SPECS[f'CNN_TL_{i}']) == [] for i in range(1, 6))
    net = network('CNN_TL_5', 3, 64)
    net.load_state_dict({**net.state_dict(), **b.start(SPECS['CNN_TL_5'])})
    assert torch.equal(net.body.conv2.weight, b.weights['conv2.weight']) and b.name == 'vgg-f'


def test_the_imported_stem_is_the_convolution_done_by_hand(tmp_path):
    b = read_matconvnet(mat_file(tmp_path, vgg_f_layers()))
    x = torch.randn(1, 3, 39, 39)
    image, (filters, biases) = x[0].permute(1, 2, 0).numpy(), vgg_f_layers()[0]['weights'][0]
    want = np.stack([sum(correlate(image[..., c], filters[..., c, k], 'valid') for c in range(3))[::4, ::4] + biases[0, k] for k in range(64)])
    np.testing.assert_allclose(b.body().conv1(x)[0].numpy(), want, rtol=1e-4, atol=1e-4)


def test_the_whole_imported_body_follows_matconvnets_formulas(tmp_path):
    "ReLU, normalisation over five channels, a pool whose last window reaches over the edge, and one without padding over an odd side"
    layers = [conv('conv1', 3, 3, 6, 1, 1), relu(1), norm(1), pool(1), conv('conv2', 3, 6, 4, 1, 1), relu(2), pool(2, pad=(0,))]
    b, x = read_matconvnet(mat_file(tmp_path, layers)), 30*torch.randn(1, 3, 10, 10)
    def convolve(x, layer):
        w, bias = layer['weights'][0]
        x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        return np.stack([sum(correlate(x[..., c], w[..., c, k], 'valid') for c in range(x.shape[2])) + bias[0, k] for k in range(w.shape[3])], -1)
    def normalise(x): return x/np.stack([(2 + 1e-4*(x[..., max(c-2, 0):c+3]**2).sum(-1))**.75 for c in range(x.shape[2])], -1)
    def max_pool(x, pad=1):
        x = np.pad(x, ((0, pad), (0, pad), (0, 0)), constant_values=-np.inf)
        n = (len(x) - 3)//2 + 1
        return np.stack([[x[2*i:2*i+3, 2*j:2*j+3].max((0, 1)) for j in range(n)] for i in range(n)])
    h = max_pool(normalise(convolve(x[0].permute(1, 2, 0).numpy(), layers[0]).clip(0)))
    h = max_pool(convolve(h, layers[4]).clip(0), pad=0)
    got = b.body()(x)[0].permute(1, 2, 0).numpy()
    assert got.shape == h.shape
    np.testing.assert_allclose(got, h, rtol=1e-3, atol=1e-4)


def test_the_average_image_is_subtracted_from_pixels_of_0_to_255(tmp_path):
    b = read_matconvnet(mat_file(tmp_path, vgg_f_layers()))
    x = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    np.testing.assert_allclose(b.normalize(x)[0, :, 0, 0].numpy(), [76, 83, 96], atol=1e-3)


def test_older_files_keep_the_average_image_elsewhere_and_as_three_numbers(tmp_path):
    b = read_matconvnet(mat_file(tmp_path, vgg_f_layers(), average=None, normalization=dict(averageImage=[[124., 117., 104.]])))
    np.testing.assert_allclose(b.normalize.mean, np.array([124, 117, 104])/255)


def test_at_224_pixels_the_pools_of_vgg_f_round_as_ours_do(tmp_path):
    body, side = read_matconvnet(mat_file(tmp_path, vgg_f_layers())).body(), lambda n, window, stride, pad: (n + pad - window)//stride + 1
    first, second = side(side(224, 11, 4, 0), 3, 2, 1), side(side(side(224, 11, 4, 0), 3, 2, 1), 3, 2, 0)
    assert (first, second, side(second, 3, 2, 0)) == (27, 13, 6) and body(torch.zeros(1, 3, 224, 224)).shape[2:] == (6, 6)


def test_layers_left_out_are_listed_with_their_shapes(tmp_path):
    assert read_matconvnet(mat_file(tmp_path, vgg_f_layers())).about['left_out'] == ['fc6 16×256×6×6', 'fc7 16×16×1×1', 'fc8 10×16×1×1']


@pytest.mark.parametrize('i,layer,message', [
    (2, dict(type='bnorm', name='bn1'), "layer bn1 is of type 'bnorm'"),
    (2, norm(1, param=(5, 1, 1e-4, .75)), "layer norm1: the normalisation has constants"),
    (3, pool(1, stride=3), "layer pool1: only max-pools with a stride of 2"),
    (3, pool(1, method='avg'), "layer pool1: only max-pools"),
    (3, pool(1, window=5), "window must be 2 or 3 pixels, not 5"),
    (0, conv('conv1', 11, 3, 64) | dict(pad=[[0, 1, 0, 1]]), "layer conv1: pad is"),
    (0, conv('conv1', 11, 3, 64) | dict(stride=[[4, 2]]), "layer conv1: stride is"),
    (3, pool(1, pad=(1, 0, 1, 0)), r"layer pool1: pad is .*can be imported with \(0, 1, 0, 1\) or \(0,\) or \(0, 0, 0, 0\)"),
    (3, pool(1, window=2), r"layer pool1: pad is .*can be imported with \(0,\) or \(0, 0, 0, 0\)"),
    (4, norm(2), 'layer norm2 normalises after a pool'),
    (1, pool(1), 'layer pool1 follows a convolution without a ReLU'),
    (1, conv('conv2', 5, 64, 256, 1, 2), 'layer conv2 follows a convolution without a ReLU'),
    (3, conv('conv2', 5, 64, 64, 1, 2), 'layer conv2 follows a normalisation'),
    (3, norm(2), 'layer norm2 follows a normalisation'),
    (0, conv('conv1', 11, 3, 64, 4) | dict(dilate=[[2, 2]]), 'layer conv1 is dilated'),
    (1, relu(1) | dict(leak=.1), 'layer relu1 is a leaky ReLU'),
    (3, {k: v for k, v in pool(1).items() if k != 'pool'}, 'layer pool1 has no pool')])
def test_layers_that_cannot_be_imported_are_named(tmp_path, i, layer, message):
    layers = vgg_f_layers()
    layers[i] = layer
    with pytest.raises(ValueError, match=message): read_matconvnet(mat_file(tmp_path, layers))


def test_fields_that_a_file_leaves_out_are_matconvnets_own(tmp_path):
    layers = vgg_f_layers()
    for k in ('pad', 'stride'): layers[8].pop(k) # of conv3
    assert read_matconvnet(mat_file(tmp_path, layers)).stages[2].convs[0] == Conv(3, 256, 1, 0)


def test_files_that_are_no_networks_are_refused(tmp_path):
    savemat(tmp_path/'other.mat', dict(a=1))
    (tmp_path/'text.mat').write_text('no MATLAB file, but long enough to have a header of its own ' * 5)
    with pytest.raises(ValueError, match='other.mat has no `layers`'): load_backbone(tmp_path/'other.mat')
    with pytest.raises(ValueError, match="text.mat isn't a MATLAB file up to version 7"): load_backbone(tmp_path/'text.mat')
    with pytest.raises(FileNotFoundError, match='there is no file .*vgg.mat'): load_backbone(tmp_path/'vgg.mat')
    with pytest.raises(ValueError, match='no meta.normalization.averageImage'): load_backbone(mat_file(tmp_path, vgg_f_layers(), average=None))


# ---- folders

def test_a_backbone_survives_a_folder(tmp_path, source):
    again = load_backbone(source.save(tmp_path/'b'))
    assert (again.name, again.stages, again.normalize, again.about) == (source.name, source.stages, source.normalize, source.about)
    assert again.weights.keys() == source.weights.keys() and all(torch.equal(v, source.weights[k]) for k, v in again.weights.items())


def test_saving_again_replaces(tmp_path, source):
    source.save(tmp_path)
    other = backbone(seed=1)
    assert torch.equal(load_backbone(other.save(tmp_path)).weights['conv1.weight'], other.weights['conv1.weight'])
    assert {f.name for f in tmp_path.iterdir()} == {'backbone.json', 'backbone.safetensors'}


@pytest.mark.parametrize('write', ['transfer.Path.write_bytes', 'datasets.os.replace', 'transfer.Path.write_text'])
def test_a_failure_while_saving_leaves_nothing_behind(tmp_path, source, monkeypatch, write):
    def full(*args, **kwargs):
        if write == 'transfer.Path.write_bytes':
            with open(args[0], 'wb') as f: f.write(b'half')
        raise OSError('no space left on device')
    monkeypatch.setattr(f'hdfast.{write}', full)
    with pytest.raises(OSError, match='no space left'): source.save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == (['backbone.safetensors'] if write == 'transfer.Path.write_text' else [])


@pytest.mark.parametrize('name', ['vgg.pkl', 'vgg.pth', 'vgg.pt'])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path/name).write_bytes(b'\x80\x04')
    with pytest.raises(ValueError, match=f'{name} is a pickle'): load_backbone(tmp_path/name)


def test_a_missing_folder_or_file_is_named(tmp_path, source):
    with pytest.raises(FileNotFoundError, match='nowhere has no backbone.json'): load_backbone(tmp_path/'nowhere')
    (source.save(tmp_path)/'backbone.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='has no backbone.safetensors'): load_backbone(tmp_path)


def test_weights_of_another_backbone_are_noticed(tmp_path, source):
    source.save(tmp_path/'a')
    backbone(seed=1).save(tmp_path/'b')
    (tmp_path/'b'/'backbone.safetensors').replace(tmp_path/'a'/'backbone.safetensors')
    with pytest.raises(ValueError, match="isn't the file that backbone.json was written for"): load_backbone(tmp_path/'a')


@pytest.mark.parametrize('spoil', [lambda d: d.pop('spec'), lambda d: d.update(normalize=None), lambda d: d['normalize'].update(mean=[0]), lambda d: d.pop('weights'),
                                   lambda d: d.update(format='other')])
def test_a_spoilt_description_is_a_value_error(tmp_path, source, spoil):
    file = source.save(tmp_path)/'backbone.json'
    d = json.loads(file.read_text())
    spoil(d)
    file.write_text(json.dumps(d))
    with pytest.raises(ValueError): load_backbone(tmp_path)


def test_a_description_cut_short_is_a_value_error(tmp_path, source):
    file = source.save(tmp_path)/'backbone.json'
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match='is damaged'): load_backbone(tmp_path)


# ---- other specs

def test_all_differences_are_named(source):
    other = NetworkSpec('other', [Stage([Conv(5, 8)], norm=True), Stage([Conv(3, 8)], window=3), Stage([Conv(3, 4)], pool=False)])
    assert source.differences(other) == [
        'conv1 is 3×3|8 padding 1 in the backbone, 5×5|8 padding 2 in other', 'pool2 is pool 2×2 in the backbone, pool 3×3 in other',
        'norm1 is absent in the backbone, normalisation in other', 'conv3 is absent in the backbone, 3×3|4 padding 1 in other']
    with pytest.raises(ValueError, match="other can't take the weights of 'random': conv1 is"): Candidate(other, source)


def test_grouping_into_stages_makes_no_difference():
    two = Stage([Conv(3, 8)], pool=False), Stage([Conv(3, 8)])
    one = NetworkSpec('one', [Stage([Conv(3, 8), Conv(3, 8)])])
    assert backbone(NetworkSpec('two', two)).differences(one) == []


def test_weights_that_are_not_whole_are_refused(source):
    weights = {**source.weights, 'conv1.bias': torch.zeros(3), 'fc6.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r"fc6.weight isn't a weight of these layers; conv1.bias has shape \(3,\), not \(8,\)"): replace(source, weights=weights)


def test_freezing_needs_a_backbone():
    with pytest.raises(ValueError, match='tiny has no backbone to be frozen'): Candidate(tiny, frozen=True)


# ---- extractor and initialisation

def task(c, dls, seed=0): return c, dls, seed, str(c)

def test_frozen_convolutions_stay_to_the_bit_while_the_head_learns(inputs, source):
    before = {k: v.clone() for k, v in source.weights.items()}
    c = Candidate(tiny, source, frozen=True)
    [net] = fit_candidates(inputs, [task(c, inputs.images)], how)
    untrained = c.whole(c.job(inputs, inputs.images, 0).build(), inputs.shape)
    assert all(torch.equal(v.cpu(), before[k]) for k, v in net.body.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in source.weights.items())
    assert all(not torch.equal(a, b) for a, b in zip(net.head.state_dict().values(), untrained.head.state_dict().values()))


def test_an_initialisation_starts_from_the_backbone_and_leaves_it(inputs, source):
    c = Candidate(tiny, source)
    assert all(torch.equal(v, source.weights[k]) for k, v in c.job(inputs, inputs.images).build().body.state_dict().items())
    [net] = fit_candidates(inputs, [task(c, inputs.images)], how)
    assert all(not torch.equal(v, source.weights[k]) for k, v in net.body.state_dict().items())


def test_from_scratch_is_the_network_that_the_engine_trains_anyway(inputs):
    [net] = fit_candidates(inputs, [task(Candidate(tiny), inputs.images)], how)
    plain = families.fit_network(inputs.images, tiny, how)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values()))


def test_an_extractor_is_fine_tuning_at_a_learning_rate_of_zero_for_the_convolutions(inputs, source):
    "The same head, the same batches: once on kept features, once through a body whose weights can't move"
    c = Candidate(tiny, source, frozen=True)
    [net] = fit_candidates(inputs, [task(c, inputs.images)], recipe('paper', epochs=3))
    whole = c.whole(c.job(inputs, inputs.images, 0).build(), inputs.shape)
    whole.body.requires_grad_(False)
    tuned = train(whole, inputs.images, recipe('paper', epochs=3), seed=0)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad(): torch.testing.assert_close(net(x), tuned(x), rtol=1e-4, atol=1e-5)


def test_features_are_computed_once_for_all_candidates_clusters_and_epochs(inputs, source, taxonomy, monkeypatch):
    seen, body = [], Backbone.body
    def counting(self):
        made = body(self)
        next(m for m in made if isinstance(m, torch.nn.Conv2d)).register_forward_hook(lambda m, x, out: seen.append(len(out)))
        return made
    monkeypatch.setattr(Backbone, 'body', counting)
    wide = replace(tiny, name='wide', fc=((20,),))
    views = {str(q): class_view(inputs.images, q) for q in taxonomy.clusters}
    choose_networks(inputs, views, [Candidate(tiny, source, True), Candidate(wide, source, True)], how, [1, 2, 3])
    assert sum(seen) == len(inputs.images.train.dataset.images)


def test_features_have_the_samples_and_labels_of_the_view(inputs, source):
    view = class_view(inputs.images, [4, 1])
    got = inputs.view(Candidate(tiny, source, True), view)
    assert list(got.vocab) == list(view.vocab)
    for a, b in zip(got.loaders, view.loaders):
        assert torch.equal(a.dataset.index, b.dataset.index) and torch.equal(a.dataset.targets, b.dataset.targets)
    (f, y), (x, z) = got.valid.one_batch(), view.valid.one_batch()
    assert torch.equal(y, z)
    torch.testing.assert_close(f, source.body()(x), rtol=1e-4, atol=1e-5)


def test_another_normalisation_is_refused(source, dls):
    for frozen in (False, True):
        with pytest.raises(ValueError, match="aren't normalised as 'random' was trained: use backbone.prepare"): Inputs(dls).view(Candidate(tiny, source, frozen))
        with pytest.raises(ValueError, match="aren't normalised"): Inputs(dls).view(Candidate(tiny, source, frozen), source.prepare(dls))


def test_features_of_other_images_are_refused(inputs, source):
    "As many images, and other ones: their rows would be taken for rows of ours"
    other = source.prepare(synthetic(n_groups=3, classes_per_group=3, n_per_class=20, size=16, seed=9).dataloaders(device='cpu'))
    for dls in (other, class_view(other, [0, 1]), inputs.view(Candidate(tiny, source, True))):
        with pytest.raises(ValueError, match="aren't (over the images|normalised)"): inputs.view(Candidate(tiny, source, True), dls)
    assert inputs.view(Candidate(tiny, source), other) is other


def test_other_loaders_of_the_same_images_are_taken(inputs, source, images):
    again = source.prepare(replace(images, images=images.images.clone()).dataloaders(device='cpu', bs=8))
    assert inputs.view(Candidate(tiny, source, True), again).train.dataset.images is inputs.features(source).train.dataset.images


def test_features_are_not_augmented(inputs, source, images):
    moved = class_view(source.prepare(images.dataloaders(device='cpu', augment=crop_flip)), [0, 1])
    with pytest.raises(ValueError, match="features can't be augmented"): inputs.view(Candidate(tiny, source, True), moved)
    assert inputs.view(Candidate(tiny, source), moved) is moved


def test_prepare_changes_the_normalisation_alone(source, dls):
    got = source.prepare(dls)
    assert all(a.dataset is b.dataset and a.normalize == stats and a.shuffle == b.shuffle for a, b in zip(got.loaders, dls.loaders))
    assert dls.train.normalize != stats


def test_the_cache_knows_backbones_apart(inputs, tmp_path, dls):
    "The same head on features of two backbones is two networks"
    for seed in (0, 1):
        fit_candidates(inputs, [task(Candidate(tiny, backbone(seed=seed), frozen), inputs.images) for frozen in (False, True)], how, tmp_path)
    assert len(list(tmp_path.glob('*.safetensors'))) == 4


def test_the_cost_of_an_extractor_is_its_head(source):
    shape, head = (3, 16, 16), (8*4*4 + 1)*12 + 13*5
    assert Candidate(tiny, source, True).cost(shape, 5) == head
    assert Candidate(tiny, source).cost(shape, 5) == Candidate(tiny).cost(shape, 5) == head + (27 + 1)*8 + (72 + 1)*8


# ---- the choice

def coloured(n_classes, n_per_class, size=16, seed=0):
    "Classes that differ in colour alone; shapes and places are noise"
    rng = np.random.default_rng(seed)
    y = torch.arange(n_classes).repeat_interleave(n_per_class)
    hue = torch.linspace(0, 255, n_classes)[y]
    x = torch.stack([hue, 255 - hue, torch.full_like(hue, 128)], 1)[:, :, None, None] + torch.from_numpy(rng.normal(0, 30, (len(y), 3, size, size)))
    split = torch.from_numpy(np.tile(np.repeat([0, 1, 2], [n_per_class//2, n_per_class//4, n_per_class - n_per_class//2 - n_per_class//4]), n_classes)).to(torch.int8)
    return ImageSet('colours', x.clamp(0, 255).to(torch.uint8), y, [f'c{i}' for i in range(n_classes)], split)

def blind(spec=tiny):
    "A backbone that says the same of every image"
    b = backbone(spec)
    return replace(b, name='blind', weights={k: torch.zeros_like(v) for k, v in b.weights.items()})

def colour_sighted(spec=tiny):
    "A backbone that passes mean colours on"
    weights = {k: torch.zeros_like(v) for k, v in backbone(spec).weights.items()}
    for c in range(3):
        weights['conv1.weight'][2*c, c], weights['conv1.weight'][2*c + 1, c] = 1/9, -1/9
    for c in range(6): weights['conv2.weight'][c, c] = 1/9
    return Backbone('colour', spec.stages, weights, stats, {})


@pytest.fixture(scope='module')
def colours(): return coloured(6, 24)


def test_the_initialisation_wins_where_fixed_features_cannot_see(colours):
    "Nothing comes through a fixed body with all weights at zero; the other candidate starts from one that sees colours"
    b = blind()
    inputs = Inputs(b.prepare(colours.dataloaders(device='cpu')))
    candidates = [Candidate(tiny, b, True), Candidate(tiny, colour_sighted())]
    choice = choose_networks(inputs, {'all': inputs.images}, candidates, recipe('one_cycle', epochs=15, lr=1e-2), [0])
    assert [c.role for c in choice.chosen] == ['initialisation']
    assert choice.scores.loc['all', 'tiny extractor'] <= .35 < .6 < choice.scores.loc['all', 'tiny initialisation']


def test_the_extractor_wins_where_training_the_convolutions_destroys_them(colours):
    "At a learning rate that a head on good features bears and the whole network doesn't"
    b = colour_sighted()
    inputs = Inputs(b.prepare(colours.dataloaders(device='cpu')))
    how = recipe('paper', epochs=30, lr=.3)
    choice = choose_networks(inputs, {'all': inputs.images}, [Candidate(tiny, b), Candidate(tiny, b, True)], how, [0])
    assert [c.role for c in choice.chosen] == ['extractor'], choice.scores


def test_ties_go_to_the_cheaper_whatever_the_order(inputs, source, monkeypatch):
    monkeypatch.setattr(transfer, 'accuracy_on', lambda net, dl: .5)
    wide = replace(tiny, name='wide', fc=((40,),))
    candidates = [Candidate(wide, source), Candidate(wide, source, True), Candidate(tiny, source), Candidate(tiny, source, True)]
    for order in (candidates, candidates[::-1]):
        choice = choose_networks(inputs, {'all': inputs.images}, order, recipe(how, epochs=1), [0])
        assert str(choice.chosen[0]) == 'tiny extractor' == choice.scores.columns[0]


def test_candidates_of_one_name_are_refused_before_training(inputs, taxonomy, monkeypatch):
    monkeypatch.setattr(transfer, 'fit_networks', lambda *args: pytest.fail('a network was trained'))
    two = [Candidate(tiny, backbone(seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="two candidates are called 'tiny initialisation'"): choose_networks(inputs, {'all': inputs.images}, two, how, [0])
    with pytest.raises(ValueError, match='two candidates are called'): transfer_hierarchy(inputs, taxonomy, two[0], two, how)


def test_no_candidates_are_refused(inputs, taxonomy):
    with pytest.raises(ValueError, match='no candidate to choose from'): choose_networks(inputs, {'all': inputs.images}, [], how, [0])
    with pytest.raises(ValueError, match='no candidate to choose from'): transfer_hierarchy(inputs, taxonomy, Candidate(tiny), [], how)


def test_choices_of_one_candidate_have_no_better(inputs):
    choice = choose_networks(inputs, {'all': inputs.images}, [Candidate(tiny)], recipe(how, epochs=1), [0])
    with pytest.raises(ValueError, match="two candidates are called 'tiny from scratch'"): choice.or_better(choice)


def test_each_part_keeps_its_best_network(inputs, source):
    views = {'a': class_view(inputs.images, [0, 1, 2]), 'b': class_view(inputs.images, [3, 4])}
    choice = choose_networks(inputs, views, [Candidate(tiny, source), Candidate(tiny, source, True), Candidate(tiny)], how, [1, 2])
    for part, c, net in zip(views, choice.chosen, choice.networks):
        assert accuracy_on(net, views[part].valid) == choice.scores.loc[part, str(c)] == choice.scores.loc[part].max()
    assert choice.counts().sum() == 2


def test_without_held_out_images_the_cheapest_is_taken(source, images):
    none_held_out = replace(images, split=torch.where(images.split == 1, 0, images.split).to(torch.int8))
    inputs = Inputs(source.prepare(none_held_out.dataloaders(device='cpu')))
    choice = choose_networks(inputs, {'all': inputs.images}, [Candidate(tiny, source), Candidate(tiny, source, True)], recipe(how, epochs=1), [0])
    assert choice.chosen[0].role == 'extractor' and choice.scores.isna().all(axis=None)


def test_test_images_have_no_say(inputs, source, images):
    "Labels of the test images are turned around, and the choice is the same"
    def choose(images):
        inputs = Inputs(source.prepare(images.dataloaders(device='cpu')))
        return choose_networks(inputs, {'all': inputs.images}, [Candidate(tiny, source), Candidate(tiny)], how, [0])
    wrong = images.labels.clone()
    wrong[images.test] = images.labels[images.test].flip(0)
    a, b = choose(images), choose(replace(images, labels=wrong))
    assert a.scores.equals(b.scores) and a.chosen == b.chosen


# ---- the hierarchical classifier

def test_a_mixed_family_saves_loads_and_moves(inputs, source, taxonomy, images, tmp_path):
    candidates = [Candidate(tiny, source), Candidate(tiny, source, True)]
    model, router, expert = transfer_hierarchy(inputs, taxonomy, candidates, candidates, how)
    assert [s.name for s in model.expert_specs] == [str(c) for c in expert.chosen] and model.router_spec.name == str(router.chosen[0])
    assert model.normalize == stats
    loaded = HierarchicalClassifier.load(model.save(tmp_path/'model')).to(default_device())
    np.testing.assert_allclose(loaded.predict_proba(images.images), model.predict_proba(images.images), atol=1e-5)


def test_experts_share_no_memory(inputs, source, taxonomy):
    model, *_ = transfer_hierarchy(inputs, taxonomy, Candidate(tiny), Candidate(tiny, source, True), how)
    assert len({e.body.conv1.weight.data_ptr() for e in model.experts} | {source.weights['conv1.weight'].data_ptr()}) == 4


@pytest.mark.parametrize('candidate', [Candidate(tiny), tiny], ids=['candidate', 'network alone'])
def test_a_single_candidate_is_the_plain_family(inputs, taxonomy, candidate):
    model, *_ = transfer_hierarchy(inputs, taxonomy, candidate, [candidate], how, seed=5)
    plain = HierarchicalClassifier(taxonomy, tiny, tiny, how, seed=5).fit(inputs.images, progress=False)
    for a, b in zip((model.router, *model.experts), (plain.router, *plain.experts)):
        assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))


def test_clusters_of_one_class_and_a_single_cluster(inputs, source, images):
    for groups in ([0, 0, 0, 0, 1, 2, 2, 2, 2], [0]*9):
        h = hierarchy_from_groups(list(map(str, groups)), images.classes)
        model, router, expert = transfer_hierarchy(inputs, h, Candidate(tiny, source), [Candidate(tiny, source, True), Candidate(tiny, source)], how)
        assert model.predict(images.images[:7]).shape == (7,)
        assert [e is None for e in model.experts] == [len(q) == 1 for q in h.clusters] and (model.router is None) == (h.n_clusters == 1)


def test_clusters_within_clusters_are_refused(inputs, source, taxonomy):
    child = hierarchy_from_groups(['a', 'b', 'b'], [inputs.images.vocab[c] for c in taxonomy.clusters[0]])
    nested = replace(taxonomy, children=(child, None, None))
    with pytest.raises(ValueError, match='a hierarchy of one level'): transfer_hierarchy(inputs, nested, Candidate(tiny), Candidate(tiny), how)


# ---- pre-training

def test_pretraining_says_where_the_backbone_comes_from(images, tmp_path):
    b = pretrain(images, tiny, recipe(how, epochs=1), device='cpu')
    again = load_backbone(b.save(tmp_path))
    assert again.about == b.about and b.about['source'] == 'synthetic' and b.about['classes'] == list(images.classes)
    assert b.about['recipe']['epochs'] == 1 and b.about['network'] == 'tiny' and set(b.about['accuracy']) == {'held out', 'test'}
    assert b.differences(tiny) == [] and all(v.device.type == 'cpu' for v in b.weights.values())


def test_pretraining_takes_any_function_for_augmentation(images):
    b = pretrain(images, tiny, recipe(how, epochs=1), augment=partial(crop_flip, pad=1), device='cpu')
    assert 'crop_flip' in b.about['augment'] and 'pad=1' in b.about['augment']


def test_home_is_found_in_writing_as_in_reading(source, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert source.save('~/kept') == tmp_path/'kept' and load_backbone('~/kept').about == source.about


def test_pretraining_learns_something_that_transfers():
    source = pretrain(synthetic(4, 4, 60, 16, jitter=.4, seed=1), tiny, recipe('one_cycle', epochs=8, lr=5e-3), augment=None, device='cpu')
    assert source.about['accuracy']['test'] > 2/16
    few = synthetic(3, 3, 30, 16, jitter=.4, test=.6, seed=2)
    inputs = Inputs(source.prepare(few.dataloaders(device='cpu')))
    candidates = [Candidate(tiny), Candidate(tiny, source), Candidate(tiny, source, True)]
    nets = fit_candidates(inputs, [task(c, inputs.images) for c in candidates], recipe('one_cycle', epochs=10, lr=5e-3))
    scratch, start, fixed = [accuracy_on(net, inputs.images[2]) for net in nets]
    assert start > scratch and fixed > 2/9
