"Memory and compute: the paper's networks by hand arithmetic, anybody's network against other counts, families, measurements."
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hdfast.clustering import hierarchy_from_groups
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.memory import MB, family_memory, measured_peak, network_memory
from hdfast.networks import SPECS, mlp_spec, n_parameters, network

CONVS = 4*(11*11*3*64 + 5*5*64*256 + 3*(3*3*256*256))/2**20  # MB of the convolutions that all CNN_TL share


def meta(make, *args, **kw):
    with torch.device('meta'): return make(*args, **kw)


def model(name, **kw): return meta(getattr(torchvision.models, name), **kw)


# ---- the paper's networks, by hand

def test_convolutions_of_the_transfer_networks():
    assert CONVS == pytest.approx(8.4011, abs=5e-5)


# 6×6×256 features = 9,216 = 9 * 2^10, so fc6 with w units holds 36*w/1024 MB, and fc7 with v units 4*w*v/2^20
@pytest.mark.parametrize('name, classes, fc6, fc7, out', [
    ('CNN_TL_1', 1000, 144, 64, 15.625), ('CNN_TL_2', 41, 144, 32, 0.3203125), ('CNN_TL_3', 89, 72, 16, 0.6953125),
    ('CNN_TL_4', 41, 72, 8, 0.16015625), ('CNN_TL_5', 41, 36, 4, 0.16015625)])
def test_exact_mb_of_the_transfer_networks(name, classes, fc6, fc7, out):
    m = network_memory(name, classes, 224)
    assert m.param_mb == pytest.approx(CONVS + fc6 + fc7 + out, abs=1e-9)
    assert m.layers.set_index('layer').param_mb[['head.fc6', 'head.fc7', 'head.out']].tolist() == [fc6, fc7, out]


def test_data_of_cnn_tl_1_by_hand():
    conv1, pool1, conv2, rest, pool5 = 54*54*64, 27*27*64, 27*27*256, 13*13*256, 6*6*256
    values = 224*224*3 + 3*conv1 + pool1 + 3*conv2 + rest + 6*rest + pool5 + 4*4096 + 1000
    m = network_memory('CNN_TL_1', 1000, 224)
    assert m.data_mb == pytest.approx(4*values/2**20, abs=1e-9)
    assert round(m.data_mb, 3) == 6.28


def test_macs_of_cnn_2_by_hand():
    convs = 32*32*32*(3*9) + 16*16*32*(32*9) + 8*8*64*(32*9) + 4*4*64*(64*9)
    assert network_memory('CNN_2', 30, 32).macs == convs + 2*2*64*512 + 512*256 + 256*30


def test_layers_of_a_small_network():
    layers = network_memory('CNN_3', 7, 16).layers
    assert layers.layer.tolist()[:4] == ['input', 'body.conv1', 'body.relu1', 'body.pool1']
    row = layers.set_index('layer').loc['body.conv1']
    assert (row.output, row.kernel, row.params, row.data_mb*MB) == ('32×16×16', '7×7×3×32', 7*7*3*32, 4*32*16*16)
    assert layers.kernel.tolist()[-1] == '128×7'


@settings(max_examples=15)
@given(st.sampled_from(list(SPECS)), st.integers(2, 50), st.integers(39, 70), st.booleans())
def test_parameters_are_those_of_the_live_network(name, classes, size, bias):
    live = meta(network, name, classes, size)
    assert network_memory(name, classes, size, bias=bias).layers.params.sum() == n_parameters(live, bias)


@pytest.mark.parametrize('batch', [2, 7, 50])
def test_data_and_macs_grow_with_the_batch(batch):
    one, many = network_memory('CNN_2', 5, 16), network_memory('CNN_2', 5, 16, batch=batch)
    assert (many.macs, many.param_mb) == (batch*one.macs, one.param_mb)
    assert many.data_mb == pytest.approx(batch*one.data_mb)


def test_bfloat16_is_half():
    full, half = (network_memory('CNN_4', 9, 32, bias=True, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert (half.param_mb, half.data_mb) == (full.param_mb/2, full.data_mb/2)


def test_flops_are_two_for_each_mac():
    m = network_memory('CNN_2', 5, 16)
    assert m.flops == 2*m.macs == 2*m.layers.macs.sum()


# ---- anybody's network

class Grouped(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3, 12, 3, groups=3, stride=2), nn.Conv2d(12, 12, 3, groups=12, padding=1),
                                         nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2), nn.Conv2d(6, 4, 3, dilation=2))


NETS = {'vgg16': lambda: model('vgg16'), 'resnet18': lambda: model('resnet18'), 'mobilenet': lambda: model('mobilenet_v3_small'),
        'squeezenet': lambda: model('squeezenet1_1'), 'vit': lambda: model('vit_b_16'), 'grouped': lambda: meta(Grouped), 'CNN_TL_1': lambda: meta(network, 'CNN_TL_1', 1000, 224)}


class Products(nn.Module):
    "A vector of weights, and two halves of the input by a bilinear layer."
    def __init__(self):
        super().__init__()
        self.v, self.bilinear = nn.Parameter(torch.zeros(12)), nn.Bilinear(5, 7, 4)
    def forward(self, x):
        x = x.flatten(1)
        return torch.cat([self.bilinear(x[:, :5], x[:, 5:]), (x @ self.v)[:, None]], 1)

def test_products_with_a_vector_and_of_two_inputs_are_counted():
    m = network_memory(Products(), size=(3, 2, 2), batch=3)
    assert m.macs == 3*(12 + 4*5*7 + 4*7)                             # x[:, :5] times the weights, then times x[:, 5:]


@pytest.mark.parametrize('name', NETS)
def test_flops_are_those_of_torch(name):
    net = NETS[name]().eval()
    with FlopCounterMode(display=False) as count, torch.no_grad(): net(torch.empty(2, 3, 224, 224, device='meta'))
    assert network_memory(net, size=224, batch=2).flops == count.get_total_flops() > 0


@pytest.mark.parametrize('name', NETS)
def test_macs_by_module_are_those_of_the_textbook(name):
    "Outputs times weights for each, over all calls of convolutions and linear layers; products outside of them (attention) are left out"
    net, total = NETS[name]().eval(), 0

    def count(m, args, out):
        nonlocal total
        each = out.numel() if not isinstance(m, nn.ConvTranspose2d) else args[0].numel()
        total += each*m.weight[0].numel()
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)): m.register_forward_hook(count)
    with torch.no_grad(): net(torch.empty(1, 3, 224, 224, device='meta'))
    layers = network_memory(NETS[name](), size=224).layers
    kinds = ['Conv2d', 'Linear', 'ConvTranspose2d', 'NonDynamicallyQuantizableLinear']
    assert layers[layers.kind.isin(kinds)].macs.sum() == total


@pytest.mark.parametrize('name', NETS)
def test_every_parameter_is_counted_once(name):
    net = NETS[name]()
    assert network_memory(net, size=224, bias=True).layers.params.sum() == sum(p.numel() for p in net.parameters())


def test_known_sizes():
    assert network_memory(model('vgg16'), 1000, 224, bias=True).layers.params.sum() == 138_357_544
    assert network_memory(model('resnet18'), 1000, 224, bias=True).layers.params.sum() == 11_689_512


@pytest.mark.parametrize('name, weights', [('vgg16', 'VGG16_Weights'), ('resnet18', 'ResNet18_Weights'), ('mobilenet_v3_small', 'MobileNet_V3_Small_Weights'),
                                           ('efficientnet_b0', 'EfficientNet_B0_Weights'), ('convnext_tiny', 'ConvNeXt_Tiny_Weights')])
def test_what_torchvision_publishes(name, weights):
    published = getattr(torchvision.models, weights).IMAGENET1K_V1.meta  # _ops are billions of multiply-adds
    m = network_memory(model(name), 1000, 224, bias=True)
    assert m.layers.params.sum() == published['num_params']
    assert m.macs/1e9 == pytest.approx(published['_ops'], abs=2e-3)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))
def test_macs_of_a_convolution_by_counting(groups, in_each, out_each, kernel, stride, padding, dilation):
    net = nn.Conv2d(groups*in_each, groups*out_each, kernel, stride, padding, dilation, groups)
    out = net(torch.zeros(1, groups*in_each, 12, 12))
    row = network_memory(net, size=(groups*in_each, 12, 12)).layers.iloc[-1]
    assert row.macs == out.numel()*in_each*kernel**2 and row.data_mb*MB == 4*out.numel()
    assert row.params == groups*out_each*in_each*kernel**2


class Mixed(nn.Module):
    "A network that turns autocast on for a part of itself, and off for another"
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4*36, 2)
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16): x = self.conv(x)
        with torch.autocast(x.device.type, enabled=False): return self.out(x.flatten(1).float())


def test_a_network_with_autocast_inside_is_followed_as_if_it_had_none():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4*36, 2))
    mixed, plain = network_memory(Mixed(), size=8), network_memory(plain, size=8)
    assert (mixed.macs, mixed.param_mb, mixed.peak_mb) == (plain.macs, plain.param_mb, plain.peak_mb)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert Mixed()(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_a_script_cannot_be_followed():
    with pytest.warns((FutureWarning, DeprecationWarning), match='jit'): net = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="can't be followed.*not supported on ScriptModules"): network_memory(net, size=8)


def test_a_live_network_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4*36, 2))
    net[2].eval()
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    network_memory(net, 2, 8)
    assert all(torch.equal(v, before[k]) and v.device.type == 'cpu' for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_live_network_is_left_as_it_was_when_it_fails():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="Sequential can't be followed"): network_memory(net, size=8)
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Twice(nn.Module):
    "One convolution and one ReLU, each used twice; an addition; two outputs, one of them a view"
    def __init__(self, inplace=False):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.ReLU(inplace)

    def forward(self, x):
        y = self.act(self.conv(x))
        z = self.act(self.conv(y)) + x
        return z, {'flat': z.flatten(1), 'sum': F.relu(z)}


def test_a_module_used_twice_stores_once_and_works_twice():
    rows = network_memory(Twice(), size=4).layers
    convs = rows[rows.layer == 'conv']
    assert (convs.params.tolist(), convs.macs.tolist()) == ([81, 0], [16*81, 16*81])
    assert (convs.data_mb*MB).tolist() == [4*48, 4*48]


def test_operations_between_modules_have_rows_and_views_have_none():
    rows = network_memory(Twice(), size=4).layers
    assert rows.kind.tolist() == ['', 'Conv2d', 'ReLU', 'Conv2d', 'ReLU', 'add', 'relu']
    assert network_memory(Twice(), size=4).data_mb*MB == 7*4*48


def test_an_in_place_relu_makes_no_data():
    rows = network_memory(Twice(inplace=True), size=4).layers
    assert rows[rows.kind == 'ReLU'].data_mb.sum() == 0


def test_weights_shared_by_two_modules_belong_to_the_first():
    a, b = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
    b.weight = a.weight
    m = network_memory(nn.Sequential(nn.Flatten(), a, b), size=2)
    assert m.layers.params.tolist()[-2:] == [144, 0] and m.macs == 288


class Spare(nn.Module):
    "A bare parameter and a head that isn't called"
    def __init__(self):
        super().__init__()
        self.scale, self.spare, self.used = nn.Parameter(torch.ones(3, 1, 1)), nn.Linear(10, 10), nn.Conv2d(3, 1, 1, bias=False)

    def forward(self, x): return self.used(x*self.scale)


def test_parameters_without_a_layer_come_last():
    rows = network_memory(Spare(), size=2, bias=True).layers
    assert rows[rows.kind == 'elsewhere'][['layer', 'params']].values.tolist() == [['', 3], ['spare', 110]]


def test_a_layer_with_several_outputs_counts_them_all():
    net = nn.Sequential(nn.Flatten(1, 2), nn.LSTM(5, 7, batch_first=True))
    lstm = network_memory(net, size=(2, 3, 5)).layers.iloc[-1]
    assert lstm.output == '6×7, 1×7, 1×7' and lstm.data_mb*MB == 4*(6*7 + 7 + 7)
    assert lstm.params == 4*7*(5 + 7) and lstm.macs == 6*4*7*(5 + 7)


def test_buffers_are_named_beside_parameters():
    m = network_memory(nn.Sequential(nn.BatchNorm2d(3)), size=2)
    assert m.buffer_mb*MB == 4*3 + 4*3 + 8


@pytest.mark.parametrize('call, says', [
    (lambda: network_memory('CNN_1', size=32), 'how many classes'), (lambda: network_memory(Grouped(), 3, 32), 'outputs, not 3'),
    (lambda: network_memory('CNN_1', 3, 8), 'needs images of at least'), (lambda: network_memory('CNN_9', 3, 8), 'no network is called')])
def test_errors(call, says):
    with pytest.raises(ValueError, match=says): call()


# ---- families

WORDS = [f'class {i}' for i in range(12)]


def family(*sizes): return hierarchy_from_groups(sum(([i]*n for i, n in enumerate(sizes)), []), WORDS[:sum(sizes)])


def test_a_family_stores_all_of_its_networks():
    m = family_memory(family(5, 4, 3), 'CNN_2', 'CNN_3', 32)
    alone = network_memory('CNN_2', 3, 32).param_mb + sum(network_memory('CNN_3', n, 32).param_mb for n in (5, 4, 3))
    assert m.param_mb['stored', 'separate'] == pytest.approx(alone)


def test_experts_share_a_body_among_themselves_but_not_with_another_kind():
    m, body = family_memory(family(5, 4, 3), 'CNN_2', 'CNN_3', 32), network_memory(meta(network, 'CNN_3', 5, 32).body, size=32)
    assert m.param_mb['stored', 'separate'] - m.param_mb['stored', 'shared'] == pytest.approx(2*body.param_mb)
    assert m.macs['one image', 'shared'] == m.macs['one image', 'separate']


def test_a_body_shared_with_the_router_is_computed_once():
    m, body = family_memory(family(5, 4, 3), 'CNN_2', 'CNN_2', 32), network_memory(meta(network, 'CNN_2', 5, 32).body, size=32)
    assert m.macs['one image', 'separate'] - m.macs['one image', 'shared'] == pytest.approx(body.macs)
    assert m.param_mb['one image', 'separate'] - m.param_mb['one image', 'shared'] == pytest.approx(body.param_mb)


def test_a_cluster_of_one_class_has_no_network():
    m = family_memory(family(5, 1), 'CNN_2', 'CNN_3', 32)
    assert m.param_mb['stored', 'separate'] == pytest.approx(network_memory('CNN_2', 2, 32).param_mb + network_memory('CNN_3', 5, 32).param_mb)
    assert m.experts['stored', 'separate'] == 1


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda r: sum(r) > .01), st.integers(1, 80))
def test_a_batch_touches_more_than_an_image_and_no_more_than_is_stored(routing, batch):
    m = family_memory(family(5, 4, 3), 'CNN_2', 'CNN_3', 16, batch=batch, routing=routing)
    for how in ('separate', 'shared'):
        one, many, all_ = (m.param_mb[q, how] for q in ('one image', f'batch of {batch}', 'stored'))
        assert one - 1e-9 <= many <= all_ + 1e-9
        assert m.experts[f'batch of {batch}', how] <= min(batch, 3) + 1e-9
    assert (m.param_mb.xs('shared', level=1) <= m.param_mb.xs('separate', level=1) + 1e-9).all()


def test_expected_experts_are_those_of_simulated_batches():
    routing = torch.tensor([.6, .3, .1])
    seen = torch.multinomial(routing, 5*20_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(-1, 5)
    simulated = torch.stack([(seen == i).any(1) for i in range(3)]).float().sum(0).mean().item()
    m = family_memory(family(5, 4, 3), 'CNN_2', 'CNN_3', 16, batch=5, routing=routing)
    assert m.experts['batch of 5', 'separate'] == pytest.approx(simulated, abs=.02)


def test_the_largest_expert_is_the_worst_case():
    specs = ['CNN_3', 'CNN_1', 'CNN_3']
    m = family_memory(family(5, 4, 3), 'CNN_2', specs, 32)
    worst = network_memory('CNN_2', 3, 32).param_mb + network_memory('CNN_1', 4, 32).param_mb
    assert m.param_mb['one image, largest expert', 'separate'] == pytest.approx(worst)


def test_a_classifier_brings_its_own_networks(dls, taxonomy):
    model = HierarchicalClassifier(taxonomy, mlp_spec(6), [mlp_spec(5), mlp_spec(4), mlp_spec(3)], recipe='paper')
    with pytest.raises(ValueError, match='give size'): family_memory(model)
    model.shape = (3, 16, 16)  # as training sets it
    m = family_memory(model)
    stored = sum(network_memory(s, 3, 16).param_mb for s in (mlp_spec(6), mlp_spec(5), mlp_spec(4), mlp_spec(3)))
    assert m.param_mb['stored', 'separate'] == pytest.approx(stored)


def test_a_classifier_that_accounts_for_itself_is_sent_there():
    class Shared:
        hierarchy, router_spec, expert_specs, shape = family(3, 2), mlp_spec(6), [mlp_spec(5)]*2, (3, 16, 16)
        def cost(self): return {}
    with pytest.raises(ValueError, match=r'the parts of a Shared .* use its \.cost\(\)'): family_memory(Shared())


@pytest.mark.parametrize('kw, says', [(dict(router='CNN_2', expert='CNN_3'), 'give size'), (dict(router='CNN_2', expert=['CNN_3'], size=32), '1 expert networks for 2 clusters'),
                                      (dict(router='CNN_2', expert='CNN_3', size=32, routing=[1, -1]), 'routing must be 2 shares')])
def test_family_errors(kw, says):
    with pytest.raises(ValueError, match=says): family_memory(family(3, 2), **kw)


# ---- against measurement

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here'))]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['CNN_1', 'CNN_5', 'MLP'])
def test_the_peak_is_what_torch_reports(name, device):
    net, account = network(name, 20, 32, seed=0).to(device), network_memory(name, 20, 32, batch=64)
    assert measured_peak(net, 32, 64, device) == pytest.approx(account.peak_mb, rel=.3)


def test_keeping_every_output_measures_as_the_data_of_the_account():
    "Autograd keeps what layers put out, so a forward pass with gradients must hold at least the outputs of convolutions"
    net, kept = network('CNN_2', 20, 32, seed=0), []
    for m in net.modules():
        if not list(m.children()): m.register_forward_hook(lambda m, a, out: kept.append(out))
    x = torch.zeros(8, 3, 32, 32)
    net.eval()(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, *kept)}
    assert sum(storages.values())/MB == pytest.approx(network_memory('CNN_2', 20, 32, batch=8).data_mb)
