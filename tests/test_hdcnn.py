"HD-CNN: the average, the coarse sums, the consistency term and the copies, against plain sums."
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hdfast import hdcnn
from hdfast.clustering import ClassHierarchy, hierarchy_from_groups
from hdfast.hdcnn import HDCNN, BuildingBlock, CoarseComponent, HDCNNHeads, copy_into, put_into
from hdfast.learners import class_counts, crop_flip, recipe
from hdfast.networks import Conv, NetworkSpec, Stage
from hdfast.trunk import Balanced, Distilled, FusedHeads, add_to_loss, re_estimate, trunk_spec

little = NetworkSpec('little', [Stage([Conv(3, 8)]), Stage([Conv(3, 8)])])
spec = trunk_spec(little, shared=(), router=(8,), expert=(8,), private=1, dropout=0)
how = recipe('one_cycle', epochs=2, bs=32)


@pytest.fixture
def h(taxonomy): # nine classes in three clusters that overlap
    return ClassHierarchy(taxonomy.classes, [(0, 1, 2), (0, 3, 4, 5), (0, 4, 6, 7, 8)], taxonomy.home, taxonomy.linkage, 5, gamma=3)


def heads_for(h, counts=None):
    coarse = CoarseComponent(h, FusedHeads(NetworkSpec('head'), (5,), [h.n_classes]))
    return HDCNNHeads(h, coarse, FusedHeads(NetworkSpec('head'), (5,), list(map(len, h.clusters))), counts)


def test_average_is_the_plain_double_sum(h):
    torch.manual_seed(0)
    heads, f = heads_for(h).eval(), torch.randn(4, 5)
    fine_probs, coarse_probs = heads.experts(f).softmax(2), heads.router.network(f)[0].softmax(1)
    for i in range(4):
        sums = [sum(coarse_probs[i, j] for j in members) for members in h.clusters]
        wanted = [sum(sums[k]*fine_probs[k, i, members.index(y)] for k, members in enumerate(h.clusters) if y in members)/sum(sums) for y in range(9)]
        assert torch.allclose(heads(f)[i].exp(), torch.stack(wanted), atol=1e-6)


def test_consistency_term_is_added_in_training_only(h):
    torch.manual_seed(0)
    heads, f, y = heads_for(h, counts=[5, 1, 1, 1, 1, 1, 1, 1, 1]), torch.randn(6, 5), torch.arange(6)
    t = torch.tensor([7., 8., 9.])/24 # counts of the classes of each cluster
    B = heads.log_p(f).exp().mean(0)
    plain = F.cross_entropy(heads.eval()(f), y) + 10*(t - B).square().sum()
    wanted = torch.autograd.grad(plain, list(heads.parameters()))
    for g, w in zip(torch.autograd.grad(F.cross_entropy(heads.train()(f), y), list(heads.parameters())), wanted): assert torch.allclose(g, w, atol=1e-6)


@pytest.mark.parametrize('batch_norm', [False, True])
def test_copies_say_what_the_coarse_network_says(batch_norm):
    torch.manual_seed(0)
    head, clusters = NetworkSpec('head', (Stage([Conv(3, 4), Conv(3, 6)]),), fc=(7,), dropout=.5), [(0, 2), (1, 2, 3)]
    coarse, fine = FusedHeads(head, (5, 8, 8), [4], batch_norm), FusedHeads(head, (5, 8, 8), [2, 3], batch_norm)
    coarse(torch.randn(16, 5, 8, 8))
    copy_into(fine, coarse, clusters)
    x = torch.randn(3, 5, 8, 8)
    for q, members in enumerate(clusters):
        assert torch.allclose(fine.eval()(x)[q, :, :len(members)], coarse.eval()(x)[0][:, list(members)], atol=1e-5)


@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('fc', [(8,), (8, 6)])
def test_a_separate_component_goes_back_into_its_own_place(batch_norm, fc):
    head = replace(spec.expert, fc=fc, dropout=.5)
    fine = FusedHeads(head, (5, 8, 8), [2, 3, 2], batch_norm).train()
    fine(torch.randn(16, 5, 8, 8)) # gives batch normalisation its statistics
    x, before = torch.randn(4, 5, 8, 8), fine.eval()(torch.zeros(4, 5, 8, 8))
    net = fine.separate(1).train()
    net(torch.randn(16, 5, 8, 8))
    for v in net.parameters(): torch.nn.init.normal_(v, std=.1)
    put_into(fine, 1, net.eval())
    assert torch.allclose(fine(x)[1], net(x), atol=1e-5)
    after = fine(torch.zeros(4, 5, 8, 8))
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


def watched_fit(model, dls, monkeypatch, step):
    "Fit with `step(name, net, view, recipe)` in place of training"
    monkeypatch.setattr(hdcnn, 'train', lambda net, view, recipe, seed, name, on_epoch=None: step(name, net, view, recipe) or net.eval())
    return model.fit(dls)


def test_each_fine_component_learns_on_all_images_of_its_category_and_of_it_alone(dls, h, monkeypatch):
    seen, places = {}, {f'the fine component of cluster {q}': q for q in range(h.n_clusters)}
    def step(name, net, view, recipe):
        seen[name] = len(view.train.dataset), len(view.vocab), recipe.epochs
        if name in places:
            for v in net.parameters(): torch.nn.init.constant_(v, places[name] + 1)
    net = watched_fit(HDCNN(h, spec, how), dls, monkeypatch, step).net
    counts = class_counts(dls)
    fine = {name: (sum(counts[c] for c in h.clusters[q]), len(h.clusters[q]), 1) for name, q in places.items()}
    whole = sum(counts), h.n_classes
    assert seen == {'the building block': (*whole, 2), **fine, 'HD-CNN': (*whole, 1)} and sum(map(len, h.clusters)) > h.n_classes
    assert all((v == q + 1).all() for q in range(h.n_clusters) for v in net.heads.experts.separate(q).parameters())


def test_the_only_class_of_a_category_has_nothing_to_learn(dls, taxonomy, monkeypatch):
    alone, steps = hierarchy_from_groups([0]*8 + [1], taxonomy.classes), []
    model = watched_fit(HDCNN(alone, spec, how), dls, monkeypatch, lambda name, *_: steps.append(name))
    assert steps == ['the building block', 'the fine component of cluster 0', 'HD-CNN'] and model.predict_proba(dls.valid, k=2).shape[1] == 9


@pytest.mark.parametrize('changes, says', [(dict(tied=True, router=replace(spec.router, stages=()), expert=replace(spec.expert, stages=())), 'neither tied nor paced'),
                                           (dict(pace=2.), 'neither tied nor paced'), (dict(expert=replace(spec.expert, fc=(4,))), 'the same layers')])
def test_specs_that_would_be_ignored_or_fail_later_are_refused(taxonomy, changes, says):
    with pytest.raises(ValueError, match=says): HDCNN(taxonomy, replace(spec, **changes), how)


def test_further_levels_are_refused(taxonomy):
    inner = hierarchy_from_groups([0, 0, 1], [taxonomy.classes[i] for i in taxonomy.clusters[0]])
    with pytest.raises(ValueError, match='HDCNN takes a hierarchy of one level'): HDCNN(replace(taxonomy, children=(inner, None, None)), spec, how)


def test_augmented_images_are_refused_before_anything_is_trained(images, taxonomy):
    told, augmented = [], images.dataloaders(device='cpu', bs=32, augment=crop_flip)
    with pytest.raises(ValueError, match="features can't be augmented"): HDCNN(taxonomy, spec, how).fit(augmented, on_epoch=lambda *a: told.append(a))
    assert not told


def test_it_is_not_trained_on_from_its_trunk(dls, taxonomy):
    with pytest.raises(TypeError, match="HDCNN can't be trained on"): re_estimate(HDCNN(taxonomy, spec, how), dls)


def test_shares_are_those_of_the_training_images_and_are_saved(dls, h, tmp_path):
    model = HDCNN(h, spec, how).fit(dls)
    n = torch.bincount(dls.train.dataset.targets, minlength=9)
    counts = torch.tensor([float(sum(n[list(q)])) for q in h.clusters])
    assert torch.allclose(model.net.heads.shares, counts/counts.sum())
    assert torch.equal(HDCNN.load(model.save(tmp_path/'m')).net.heads.shares, model.net.heads.shares)


def test_trains_predicts_saves_and_loads(dls, h, images, tmp_path):
    model = HDCNN(h, spec, how).fit(dls)
    probs = model.predict_proba(images.images, k=3)
    assert np.allclose(probs.sum(1), 1, atol=1e-5)
    again = HDCNN.load(model.save(tmp_path/'m'))
    assert (again.predict_proba(images.images, k=3) == probs).all()
    assert BuildingBlock(model.net)(torch.zeros(2, 3, 16, 16)).shape == (2, 9)


def test_a_caller_hears_of_the_epochs_of_each_step(dls, h):
    told = []
    HDCNN(h, spec, how).fit(dls, on_epoch=lambda epoch, loss: told.append(epoch))
    assert told == [0, 1, *[0]*h.n_clusters, 0] # building block, fine components, everything


def test_add_to_loss_hands_on_the_scores_and_adds_the_gradient():
    a = torch.randn(4, 3, requires_grad=True)
    y, extra = torch.tensor([0, 1, 2, 0]), lambda: a.square().sum()
    assert torch.equal(add_to_loss(a, extra()), a)
    g, = torch.autograd.grad(F.cross_entropy(add_to_loss(a, extra()), y), a)
    wanted, = torch.autograd.grad(F.cross_entropy(a, y) + extra(), a)
    assert torch.allclose(g, wanted)


def test_distillation_is_the_mixed_loss_and_leaves_the_teacher_alone():
    student, teacher, x, y = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    net = Distilled(student, [teacher], share=.3, temperature=2.)
    assert len(list(net.parameters())) == 2 and torch.equal(net.eval()(x), student(x))
    g = torch.autograd.grad(F.cross_entropy(net.train()(x), y), list(student.parameters()))
    s, t = student(x), teacher(x).detach()
    kl = F.kl_div((s/2).log_softmax(1), (t/2).softmax(1), reduction='batchmean')
    wanted = torch.autograd.grad(.7*F.cross_entropy(s, y) + .3*4*kl, list(student.parameters()))
    for a, b in zip(g, wanted): assert torch.allclose(a, b, atol=1e-6)


def test_balance_adds_the_log_of_the_shares_in_training_only():
    net, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    balanced = Balanced(net, [30, 10])
    assert torch.allclose(balanced.train()(x) - net(x), torch.tensor([.75, .25]).log().expand(3, 2), atol=1e-6)
    assert torch.equal(balanced.eval()(x), net(x))


def test_cluster_probabilities_are_float32_under_bfloat16(taxonomy):
    seeded_scores = torch.randn(1, 200, taxonomy.n_classes, generator=torch.Generator().manual_seed(0))
    coarse = CoarseComponent(taxonomy, nn.Identity())
    f = seeded_scores.bfloat16()
    with torch.autocast('cpu', torch.bfloat16): log_p = coarse(f)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(2), torch.ones(1, 200), atol=1e-5, rtol=0)
