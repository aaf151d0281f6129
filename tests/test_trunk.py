"One trunk and many heads: exactness of the fused heads, the likelihood, routing, and saving."
from dataclasses import replace
import json, time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hdfast import trunk
from hdfast.clustering import ClassHierarchy, hierarchy_from_groups
from hdfast.hierarchical import HierarchicalClassifier, combine
from hdfast.learners import probabilities, recipe
from hdfast.networks import Conv, NetworkSpec, Stage, network_spec
from hdfast.memory import family_memory
from hdfast.trunk import (SLIM, TRUNKS, WIDE, Balanced, ClassLikelihood, FusedHeads, TrunkClassifier, TrunkSpec, features_shape, flat_network, multiplications, normed_trunk, re_estimate,
                          shared_trunk, trunk_spec)

net_spec = NetworkSpec('little', [Stage([Conv(3, 8)]), Stage([Conv(3, 8)])])
spec = trunk_spec(net_spec, shared=(), router=(8,), expert=(6,), dropout=0)
how = recipe('one_cycle', epochs=2, bs=32)


@pytest.fixture
def overlapping(taxonomy): # nine classes in three clusters; class 0 in all, 4 in two
    return ClassHierarchy(taxonomy.classes, [(0, 1, 2), (0, 3, 4, 5), (0, 4, 6, 7, 8)], taxonomy.home, taxonomy.linkage, 5, gamma=3)


tied = replace(spec, tied=True)


@pytest.fixture
def tied_model(dls, overlapping): return TrunkClassifier(overlapping, tied, how).fit(dls)


@pytest.fixture
def model(dls, overlapping): return TrunkClassifier(overlapping, spec, how).fit(dls)


@st.composite
def covers(draw): # clusters that hold all of K classes, with overlap
    K, n = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    sets = [set(draw(st.lists(st.integers(0, K-1), max_size=4))) for _ in range(n)]
    for k in range(K): sets[k % n].add(k)
    return K, [tuple(sorted(s)) for s in sets if s]


@given(covers(), st.integers(0, 99))
def test_product_probabilities_sum_to_one(cover, seed):
    K, clusters = cover
    torch.manual_seed(seed)
    log_p = 3*torch.randn(5, len(clusters))
    heads = FusedHeads(NetworkSpec('head', fc=(4,)), (7,), list(map(len, clusters)))
    log_q = heads(torch.randn(5, 7)).log_softmax(2)
    P = ClassLikelihood(clusters, K)(log_p.log_softmax(1), log_q)
    assert P.shape == (5, K) and torch.allclose(P.exp().sum(1), torch.ones(5), atol=1e-5)


@given(covers(), st.integers(0, 99))
def test_likelihood_is_the_full_product_of_combine(cover, seed):
    K, clusters = cover
    torch.manual_seed(seed)
    p, heads = torch.randn(5, len(clusters)).softmax(1), FusedHeads(NetworkSpec('head'), (7,), list(map(len, clusters)))
    log_q = heads(torch.randn(5, 7)).log_softmax(2)
    P = ClassLikelihood(clusters, K)(p.log(), log_q).exp()
    follow = combine(p, lambda i, rows: log_q[i, rows, :len(clusters[i])].exp(), clusters, K, k=len(clusters))
    assert torch.allclose(P, follow, atol=1e-5)


@pytest.mark.parametrize('batch_norm', [False, True])
@pytest.mark.parametrize('stages', [(), (Stage([Conv(3, 4), Conv(3, 6)]),)])
def test_fused_heads_equal_separate_ones(stages, batch_norm):
    torch.manual_seed(0)
    shape, sizes = ((5, 8, 8) if stages else (11,)), [3, 1, 4, 2]
    heads = FusedHeads(NetworkSpec('head', stages, fc=((6, 5), 4), dropout=.5), shape, sizes, batch_norm)
    heads.train()(torch.randn(16, *shape)) # batch normalisation has seen something
    x, heads = torch.randn(7, *shape), heads.eval()
    for i, n in enumerate(sizes): assert torch.allclose(heads(x)[i, :, :n], heads.separate(i)(x), atol=1e-5)


def test_tied_heads_start_as_the_softmax_of_the_scores_of_classes(dls, taxonomy):
    net, (x, y) = shared_trunk(taxonomy, tied, (3, 16, 16), seed=1), dls.train.one_batch()
    z = net.heads.router(net.body(x))[0]
    assert torch.allclose(net(x), z.log_softmax(1), atol=1e-5)
    F.cross_entropy(net(x), y).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.heads.experts.out.weight.grad.abs().sum() > 0


def test_tied_heads_are_equation_2_of_their_parts(tied_model, dls):
    net, h = tied_model.net, tied_model.hierarchy
    with torch.no_grad():
        x = torch.cat([x for x, _ in dls[2]])
        f = net.body(x)
        z = net.heads.router(f)[0]
        p = torch.stack([z[:, m].logsumexp(1) for m in h.clusters], 1).softmax(1)
        q = [(z[:, m] + net.heads.experts(f)[i, :, :len(m)]).softmax(1) for i, m in enumerate(h.clusters)]
    for k in (1, 2, 3):
        wanted = combine(p, lambda i, rows: q[i][rows], h.clusters, 9, k)
        assert np.allclose(tied_model.predict_proba(dls[2], k=k), wanted, atol=1e-5)
    assert np.allclose(probabilities(net, dls[2])[0], wanted, atol=1e-5)


def test_tied_heads_are_saved_and_counted_once(tied_model, images, tmp_path):
    assert np.array_equal(TrunkClassifier.load(tied_model.save(tmp_path/'tied')).predict_proba(images.images[:5]), tied_model.predict_proba(images.images[:5]))
    stored = lambda e: sum(v.numel() for v in e.parameters())
    net = tied_model.net
    own = sum(stored(net.heads.experts.separate(q)) for q in range(3))
    assert tied_model.cost()['parameters'] == stored(net.body) + stored(net.heads.router) + own
    with torch.no_grad(): f = net.body(x := torch.zeros(1, 3, 16, 16))
    parts = (net.heads.router, *map(net.heads.experts.separate, range(3)))
    assert tied_model.cost(3)['macs'] == multiplications(net.body, x) + sum(multiplications(part, f) for part in parts)


def test_tied_heads_without_convolutions_of_their_own():
    with pytest.raises(ValueError, match='CNN_2 router begins with convolutions: tied heads are fully connected'):
        trunk_spec('CNN_2', shared=(), private=1, tied=True)


def test_superfluous_outputs_have_no_probability_and_no_gradient():
    heads = FusedHeads(NetworkSpec('head'), (4,), [3, 1])
    q = heads(torch.randn(6, 4)).softmax(2)
    assert (q[1, :, 1:] == 0).all()
    q[1, :, 0].log().sum().backward()
    assert torch.isfinite(heads.out.weight.grad).all() and (heads.out.weight.grad[1, :, 1:] == 0).all()


def test_gradients_of_the_joint_loss_are_those_of_the_explicit_sum(dls, overlapping):
    x, y = dls.train.one_batch()
    a, b = (shared_trunk(overlapping, spec, (3, 16, 16), seed=1) for _ in range(2))
    F.cross_entropy(a(x), y).backward()
    f = b.body(x)
    p, experts, h = b.heads.log_p(f).exp(), [b.heads.experts(f)[q, :, :len(m)].softmax(1) for q, m in enumerate(overlapping.clusters)], overlapping
    P = [sum(p[i, q]*experts[q][i, m.index(k)] for q, m in enumerate(h.clusters) if k in m) for i, k in enumerate(y.tolist())]
    (-torch.stack(P).log().mean()).backward()
    for (name, v), w in zip(a.named_parameters(), b.parameters()): assert torch.allclose(v.grad, w.grad, atol=1e-5), name


def test_pace_multiplies_the_gradient_of_the_experts_alone(dls, taxonomy):
    x, y = dls.train.one_batch()
    grads = []
    for pace in (1, 4):
        net = shared_trunk(taxonomy, trunk_spec(net_spec, shared=(), router=(), expert=(6,), dropout=0, pace=pace), (3, 16, 16), seed=1)
        F.cross_entropy(net(x), y).backward()
        grads.append({k: v.grad for k, v in net.named_parameters()})
    for k, g in grads[0].items():
        factor = 4 if k.startswith('heads.experts') else 1
        assert torch.allclose(factor*g, grads[1][k], atol=1e-6), k


def test_top_1_equals_combine_on_the_fused_outputs(model, dls):
    x = torch.cat([x for x, _ in dls[2]])
    with torch.no_grad():
        f = model.net.body(x)
        p, q = model.net.heads.log_p(f).exp(), model.net.heads.experts(f).softmax(2)
    for k in (1, 2, 3):
        wanted = combine(p, lambda i, rows: q[i, rows, :len(model.hierarchy.clusters[i])], model.hierarchy.clusters, 9, k)
        assert np.allclose(model.predict_proba(dls[2], k=k), wanted, atol=1e-5)


def test_top_1_asks_one_expert_per_image(model, dls):
    asked = []
    for e in model.experts: e.register_forward_hook(lambda m, x, y: asked.append(len(y)))
    model.predict(dls[2])
    assert sum(asked) == len(dls[2].dataset)


def test_full_product_is_the_network_itself(model, dls):
    assert np.allclose(model.predict_proba(dls[2], k=3), probabilities(model.net, dls[2])[0], atol=1e-5)


def test_save_and_load_change_no_bit(model, images, tmp_path):
    again = TrunkClassifier.load(model.save(tmp_path/'m'))
    assert (again.predict_proba(images.images, k=3) == model.predict_proba(images.images, k=3)).all()
    assert again.spec == model.spec and again.hierarchy == model.hierarchy
    model.save(tmp_path/'m') # its own folder may be replaced


def test_a_folder_says_which_kind_of_classifier_it_holds(model, dls, taxonomy, tmp_path):
    assert type(HierarchicalClassifier.load(model.save(tmp_path/'trunk'))) is TrunkClassifier
    plain = HierarchicalClassifier(taxonomy, 'MLP_4', 'MLP_4', how).fit(dls, progress=False).save(tmp_path/'plain')
    with pytest.raises(ValueError, match='describes a HierarchicalClassifier, which is no TrunkClassifier'): TrunkClassifier.load(plain)
    written = json.loads((tmp_path/'plain'/'classifier.json').read_text())
    (tmp_path/'plain'/'classifier.json').write_text(json.dumps(written | {'format': 'hdfast.Later.2'}))
    with pytest.raises(ValueError, match='hdfast.Later.2'): HierarchicalClassifier.load(plain)


def test_frozen_trunk_does_not_move_and_a_started_one_does(dls, taxonomy):
    flat = flat_network(net_spec, 9, (3, 16, 16))
    for frozen in (True, False):
        net = TrunkClassifier(taxonomy, spec, how).fit(dls, start=flat, frozen=frozen).net
        same = [torch.equal(v, net.body.body.state_dict()[k]) for k, v in flat.body.state_dict().items()]
        assert all(same) if frozen else not any(same)


@pytest.mark.parametrize('frozen', [False, True])
def test_a_caller_hears_of_every_epoch(dls, taxonomy, frozen):
    told, flat = [], flat_network(net_spec, 9, (3, 16, 16))
    TrunkClassifier(taxonomy, spec, how).fit(dls, on_epoch=lambda epoch, loss: told.append((epoch, loss)), start=flat, frozen=frozen)
    assert [epoch for epoch, _ in told] == [0, 1] and all(0 < loss < 10 for _, loss in told)


def test_frozen_features_train_the_same_heads_as_the_whole_network_would(dls, taxonomy):
    flat = flat_network(net_spec, 9, (3, 16, 16))
    model = TrunkClassifier(taxonomy, spec, how).fit(dls, start=flat, frozen=True)
    assert np.allclose(model.predict_proba(dls[2], k=3), probabilities(model.net, dls[2])[0], atol=1e-5)


def test_cache_gives_the_same_network_and_knows_its_settings(dls, taxonomy, tmp_path):
    fit = lambda **kwargs: TrunkClassifier(taxonomy, trunk_spec(net_spec, shared=(), router=(), expert=(4,), **kwargs), how).fit(dls, tmp_path)
    first, again, other = fit(), fit(), fit(drop=.1)
    assert len(list(tmp_path.glob('*.safetensors'))) == 2
    assert all(torch.equal(v, again.net.state_dict()[k]) for k, v in first.net.state_dict().items())
    assert not torch.equal(first.net.body.body.conv1.weight, other.net.body.body.conv1.weight)


def test_two_that_want_the_same_trunk_at_once_train_it_once(dls, taxonomy, tmp_path, monkeypatch):
    trained, as_before = [], TrunkClassifier._train
    def slowly(*args):
        trained.append(args)
        time.sleep(.3) # until the other one has looked into the cache
        return as_before(*args)
    monkeypatch.setattr(TrunkClassifier, '_train', slowly)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(TrunkClassifier(taxonomy, spec, how).fit, dls, tmp_path) for _ in range(2)]
        one, other = (call.result(60).net.state_dict() for call in calls)
    assert len(trained) == 1 and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize('last,message', [(nn.Linear(768, 1), r'shape \(8, 1\)'), (nn.Linear(768, 10), r'shape \(8, 10\)'), (nn.Sequential(nn.Linear(768, 9), nn.Softmax(1)), 'gives probabilities')])
def test_a_teacher_scores_these_classes(dls, taxonomy, last, message):
    with pytest.raises(ValueError, match=message): TrunkClassifier(taxonomy, spec, how).fit(dls, teachers=nn.Sequential(nn.Flatten(), last))


def test_a_start_has_convolutions(dls, taxonomy):
    with pytest.raises(ValueError, match='start is a Linear without a `body`'): TrunkClassifier(taxonomy, spec, how).fit(dls, start=nn.Linear(3, 2))


def test_re_estimate_keeps_classes_and_trunk_and_changes_the_hierarchy_in_its_own_light(model, dls):
    refined = re_estimate(TrunkClassifier(model.hierarchy, spec, how).fit(dls), dls)
    assert refined.hierarchy.classes == model.hierarchy.classes and refined.hierarchy.max_size == model.hierarchy.max_size
    assert np.allclose(refined.predict_proba(dls[2], k=refined.hierarchy.n_clusters).sum(1), 1, atol=1e-5)


def test_cost_is_trunk_router_and_the_dearest_experts(dls, taxonomy):
    model = TrunkClassifier(taxonomy, trunk_spec(net_spec, shared=(), router=(), expert=()), how).fit(dls)
    convolutions, features = 27*8*256 + 72*8*64, 8*4*4
    assert model.cost()['macs'] == convolutions + features*3 + features*3
    assert model.cost(3)['macs'] == convolutions + features*3 + 3*features*3
    assert model.cost()['parameters'] == (27*8 + 8) + (72*8 + 8) + (features + 1)*(3 + 9)


def test_private_stages_leave_the_shared_ones(taxonomy):
    s = trunk_spec(net_spec, shared=(), router=(), expert=(4,), private=1, batch_norm=True, drop=.1)
    net = shared_trunk(taxonomy, s, (3, 16, 16))
    assert net.heads.experts.body.conv1.weight.shape == (24, 8, 3, 3)
    assert TrunkSpec.from_dict(json.loads(json.dumps(s.to_dict()))) == s


def test_predictions_with_folded_batch_normalisation_are_those_of_the_network(dls, taxonomy):
    model = TrunkClassifier(taxonomy, trunk_spec(net_spec, shared=(5,), router=(), expert=(4,), batch_norm=True, drop=.1), how).fit(dls)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model._body.modules()) and any(isinstance(m, torch.nn.BatchNorm2d) for m in model.net.modules())
    with torch.no_grad(): own = torch.cat([model.net(x) for x, _ in dls[2]]).exp()
    assert np.abs(model.predict_proba(dls[2], k=taxonomy.n_clusters) - own.cpu().numpy()).max() < 1e-5


def test_the_normed_trunk_can_be_changed():
    assert normed_trunk() == trunk_spec('CNN_2', router=(), batch_norm=True, tied=True) and TrunkClassifier(hierarchy_from_groups([0, 0, 1])).spec == normed_trunk()
    assert normed_trunk(network_spec('CNN_1'), batch_norm=False, tied=False, expert=(8,)) == trunk_spec('CNN_1', router=(), expert=(8,))
    assert normed_trunk('wide') == normed_trunk(WIDE) == trunk_spec(WIDE, shared=(256,), router=(), batch_norm=True, tied=True)
    assert TRUNKS == {'wide': WIDE, 'slim': SLIM}


def test_the_slim_trunk_has_fewer_filters_on_the_large_map_and_the_same_elsewhere():
    wide, slim = WIDE.stages, normed_trunk('slim').trunk.stages
    assert slim[0].convs[0].filters < wide[0].convs[0].filters and slim[1:] == wide[1:]
    wide, slim = (multiplications(flat_network(spec, 10, (3, 32, 32)), torch.zeros(1, 3, 32, 32)) for spec in (WIDE, SLIM))
    assert wide - slim == 8*32*32*27 + 8*32*16*16*9 # its own, and those of the layer that reads them


def test_one_cluster_and_clusters_of_one_class(dls, taxonomy, images):
    for home in ([0]*9, list(range(9))):
        clusters = [tuple(np.flatnonzero(np.array(home) == q)) for q in sorted(set(home))]
        h = ClassHierarchy(taxonomy.classes, clusters, home, taxonomy.linkage, 9)
        assert TrunkClassifier(h, spec, how).fit(dls).predict(images.images[:4]).shape == (4,)


def test_a_cluster_of_one_class_has_no_expert(dls, taxonomy):
    h = ClassHierarchy(taxonomy.classes, [(0, 1, 2, 3, 4, 5), (6, 7), (8,)], [0]*6 + [1]*2 + [2], taxonomy.linkage, 9)
    model = TrunkClassifier(h, spec, how).fit(dls)
    assert model.experts[2] is None
    assert np.allclose(model.predict_proba(dls[2], k=3), probabilities(model.net, dls[2])[0], atol=1e-5)
    single = sum(v.numel() for v in model.net.heads.experts.separate(2).parameters())
    whole = sum(v.numel() for part in (model.net.body, model.net.heads.router, *map(model.net.heads.experts.separate, range(3))) for v in part.parameters())
    assert model.cost()['parameters'] == whole - single


def test_fit_refuses_what_it_would_ignore(dls, taxonomy):
    flat = flat_network(net_spec, 9, (3, 16, 16))
    other = ClassHierarchy(taxonomy.classes[::-1], taxonomy.clusters, taxonomy.home, taxonomy.linkage, 9)
    with pytest.raises(ValueError, match='of other classes than the data: '): TrunkClassifier(other, spec, how).fit(dls)
    with pytest.raises(ValueError, match='learn from the labels alone'): TrunkClassifier(taxonomy, spec, how).fit(dls, start=flat, frozen=True, balanced=True)
    with pytest.raises(ValueError, match='must have learned before: give start'): TrunkClassifier(taxonomy, spec, how).fit(dls, frozen=True)
    with pytest.raises(ValueError, match='not its shared layers'):
        TrunkClassifier(taxonomy, trunk_spec(net_spec, shared=(8,)), how).fit(dls, start=flat)


def test_further_levels_are_refused(taxonomy):
    inner = hierarchy_from_groups([0, 0, 1], [taxonomy.classes[i] for i in taxonomy.clusters[0]])
    with pytest.raises(ValueError, match='TrunkClassifier takes a hierarchy of one level.*within cluster 0'):
        TrunkClassifier(replace(taxonomy, children=(inner, None, None)), spec, how)


def test_the_account_of_separate_networks_sends_to_cost(taxonomy):
    with pytest.raises(ValueError, match=r'TrunkClassifier.*use its \.cost\(\)'): family_memory(TrunkClassifier(taxonomy, spec, how), size=16)


def test_asking_for_the_shape_leaves_every_layer_as_it_was():
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).eval()).train()
    body[1].eval() # frozen
    assert features_shape(body, (3, 8, 8)) == (4, 6, 6)
    assert body.training and body[0].training and not body[1].training


def test_flat_network_takes_the_same_changes(dls):
    net = flat_network(net_spec, 9, (3, 16, 16), batch_norm=True, drop=.2)
    assert [type(m).__name__ for m in net.body] == ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d', 'Dropout']*2
    assert multiplications(net.eval(), torch.zeros(1, 3, 16, 16)) == multiplications(flat_network(net_spec, 9, (3, 16, 16)), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize('wrong, message', [(dict(private=2), 'at least one must stay'), (dict(private=1), 'leave its shared layers out'),
                                            (dict(drop=1.), 'below 1'), (dict(pace=0), 'pace must be positive')])
def test_impossible_specs_say_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message): trunk_spec(net_spec, **wrong)


def test_separating_heads_draws_no_random_numbers():
    layer = nn.Conv2d(4, 8, 3, padding=1)
    state = torch.get_rng_state()
    part = trunk._slice(layer, 1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(part.weight, layer.weight[4:]) and part.padding == (1, 1)


class Mine(TrunkClassifier): "A kind of classifier of one's own."

def test_a_kind_of_ones_own_has_a_key_of_its_own(taxonomy, dls):
    spec, how = trunk_spec('CNN_2', shared=(8,), router=(), expert=()), recipe('one_cycle', epochs=1)
    mine, ours = Mine(taxonomy, spec, how), TrunkClassifier(taxonomy, spec, how)
    assert mine._key(dls, [], []) == mine._key(dls, [], []) != ours._key(dls, [], [])


def test_a_teacher_may_be_of_bfloat16(taxonomy, dls):
    m, teacher = TrunkClassifier(taxonomy, trunk_spec('CNN_2', shared=(8,), router=(), expert=()), recipe('one_cycle', epochs=1)), nn.Linear(3, 2)
    assert m._key(dls, [teacher], []) != m._key(dls, [teacher.bfloat16()], [])


def test_a_kind_of_ones_own_can_be_loaded_as_what_it_is_or_as_what_it_comes_from(model, tmp_path):
    folder = model.save(tmp_path/'m')
    assert type(HierarchicalClassifier.load(folder)) is TrunkClassifier and type(Mine.load(folder)) is Mine


def test_what_has_no_training_image_cannot_be_balanced():
    with pytest.raises(ValueError, match='no training image of class 1, 3'): Balanced(nn.Identity(), [3, 0, 2, 0])


def test_a_classifier_answers_alike_while_its_network_is_in_training_mode(dls, taxonomy, images):
    model = TrunkClassifier(taxonomy, normed_trunk(net_spec, shared=(8,), expert=(6,)), how).fit(dls)
    want = model.predict_proba(images.images[:20], k=3)
    model.net.train()
    assert np.array_equal(model.predict_proba(images.images[:20], k=3), want) and model.net.training and model.net.body.training


@pytest.mark.parametrize('change', [lambda net: net.load_state_dict({k: 1.5*v if v.is_floating_point() else v for k, v in net.state_dict().items()}),
                                    lambda net: [p.data.mul_(1.5) for p in net.body.parameters()]], ids=['loaded', 'trained by fastai'])
def test_a_network_that_was_trained_on_is_the_one_that_answers(dls, taxonomy, images, tmp_path, change):
    model = TrunkClassifier(taxonomy, normed_trunk(net_spec, shared=(8,), expert=(6,)), how).fit(dls)
    before = model.predict_proba(images.images[:20], k=3)
    change(model.net)
    after = model.predict_proba(images.images[:20], k=3)
    model.save(tmp_path/'m')
    assert not np.allclose(after, before) and np.array_equal(after, TrunkClassifier.load(tmp_path/'m').predict_proba(images.images[:20], k=3))


def test_a_teacher_need_not_be_in_a_list_and_must_be_a_network(dls, taxonomy):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 9))
    one, many = (TrunkClassifier(taxonomy, spec, how).fit(dls, teachers=t).net.state_dict() for t in (teacher, iter([teacher])))
    assert all(torch.equal(one[k], many[k]) for k in one)
    with pytest.raises(ValueError, match="a str isn't a network"): TrunkClassifier(taxonomy, spec, how).fit(dls, teachers=['CNN_1'])


def test_a_name_is_no_trunk(taxonomy):
    with pytest.raises(ValueError, match="'CNN_2' is no TrunkSpec"): TrunkClassifier(taxonomy, 'CNN_2')


def test_the_cost_of_more_clusters_than_there_are_is_refused(model):
    for k in (0, -1, 4):
        with pytest.raises(ValueError, match='there are 3 clusters'): model.cost(k)
