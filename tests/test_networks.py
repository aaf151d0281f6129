"The networks of Tables 1 and 2: shapes, parameter counts by hand, specs, seeds and errors."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from hdfast.networks import SPECS, Conv, NetworkSpec, Stage, mlp_spec, n_parameters, network, network_spec, spec_table, vgg_f_norm

CNNS = [f'CNN_{i}' for i in range(1, 6)]
TLS = [f'CNN_TL_{i}' for i in range(1, 6)]


def meta(name, n_classes, size, **kw):
    with torch.device('meta'):
        return network(name, n_classes, size, **kw)


def test_a_spec_with_numbers_of_numpy_is_written_as_json():
    spec = NetworkSpec('a', [Stage([Conv(np.int64(3), np.int32(8), np.int64(1), np.int64(1))])], [np.int64(5)])
    assert NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec == NetworkSpec('a', [Stage([Conv(3, 8)])], [5])


@pytest.mark.parametrize('net, biases', [(nn.LSTM(3, 4), 2*4*4), (nn.MultiheadAttention(4, 2, add_bias_kv=True), 3*4 + 4 + 2*4), (nn.Linear(3, 4), 4)])
def test_biases_are_known_by_their_names(net, biases):
    net.register_parameter('relative_position_bias_table', nn.Parameter(torch.zeros(7)))
    assert n_parameters(net) - n_parameters(net, bias=False) == biases


def weight_mb(name, n_classes): return 4*n_parameters(meta(name, n_classes, 224), bias=False) / 2**20


def layer_shapes(net, size):
    x, shapes = torch.empty(1, 3, *size, device='meta'), {}
    for part in net:
        for name, m in part.named_children():
            x = m(x)
            shapes[name] = tuple(x.shape[1:])
    return shapes


# ---- Tables 1 and 2, typed in from the paper

TABLE_1 = [
    ('Depth', 6, 6, 6, 8, 10),
    ('Input', *['64×64 RGB']*5),
    ('Conv', '5×5|32', '3×3|32', '7×7|32', '5×5|32', '5×5|32'),
    ('', *['ReLU, Maxpool|2']*5),
    ('Conv', '5×5|32', '3×3|32', '5×5|32', '3×3|32', '3×3|32'),
    ('Conv', '', '', '', '', '3×3|32'),
    ('', *['ReLU, Maxpool|2']*5),
    ('Conv', '5×5|64', '3×3|64', '3×3|64', '3×3|32', '3×3|32'),
    ('Conv', '', '', '', '3×3|64', '3×3|64'),
    ('', *['ReLU, Maxpool|2']*5),
    ('Conv', '5×5|64', '3×3|64', '3×3|64', '3×3|64', '3×3|64'),
    ('Conv', '', '', '', '3×3|64', '3×3|128'),
    ('', *['ReLU, Maxpool|2']*5),
    ('FC', 1024, 512, 256, 512, 512),
    ('', *['ReLU, Dropout']*5),
    ('FC', 512, 256, 128, 128, 256),
    ('FC', '', '', '', '', 128),
    ('', *['ReLU, Dropout']*5),
    ('FC', *'CCCCC')]

TABLE_2 = [
    ('Depth', *[8]*5),
    ('Input', *['224×224 RGB']*5),
    ('Conv', *['11×11|64 Stride:4']*5),
    ('', *['ReLU, Norm, Maxpool|2']*5),  # "Norm" from Tables 14 to 16
    ('Conv', *['5×5|256']*5),
    ('', *['ReLU, Norm, Maxpool|2']*5),
    ('Conv', *['3×3|256']*5),
    ('', *['ReLU']*5),
    ('Conv', *['3×3|256']*5),
    ('Conv', *['3×3|256']*5),
    ('', *['ReLU, Maxpool|2']*5),
    ('FC', 4096, 4096, 2048, 2048, 1024),
    ('', *['ReLU, Dropout']*5),
    ('FC', 4096, 2048, 2048, 1024, 1024),
    ('', *['ReLU, Dropout']*5),
    ('FC', *'CCCCC')]


@pytest.mark.parametrize('names,size,count_output,rows', [(CNNS, 64, False, TABLE_1), (TLS, 224, True, TABLE_2)])
def test_tables_of_the_paper(names, size, count_output, rows):
    t = spec_table(names, size, count_output)
    assert list(t.columns) == names
    assert [tuple(r) for r in t.reset_index().itertuples(index=False)] == rows


@pytest.mark.parametrize('name', [*CNNS, *TLS, 'MLP'])
def test_depth_is_what_is_built(name):
    layers = [m for m in meta(name, 7, 64).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == SPECS[name].depth + 1


# ---- parameters, by hand

def test_cnn_1_parameters_by_hand():
    convs = (5*5*3*32 + 32) + (5*5*32*32 + 32) + (5*5*32*64 + 64) + (5*5*64*64 + 64)
    fc = (64*4*4*1024 + 1024) + (1024*512 + 512) + (512*102 + 102)
    net = network('CNN_1', 102, 64)
    assert n_parameters(net.body) == convs == 181_792
    assert n_parameters(net) == convs + fc == 1_808_518
    assert n_parameters(net, bias=False) == 1_808_518 - (32+32+64+64 + 1024+512+102)


def test_cnn_5_parameters_by_hand():
    convs = ((5*5*3*32 + 32) + 2*(3*3*32*32 + 32) + (3*3*32*32 + 32) + (3*3*32*64 + 64)
             + (3*3*64*64 + 64) + (3*3*64*128 + 128))
    fc = (128*2*2*512 + 512) + (512*256 + 256) + (256*128 + 128) + (128*100 + 100)
    assert n_parameters(network('CNN_5', 100, 32)) == convs + fc


@pytest.mark.parametrize('name,convs,widths', [
    ('CNN_2', 9*(3*32 + 32*32 + 32*64 + 64*64), (512, 256)),
    ('CNN_3', 49*3*32 + 25*32*32 + 9*(32*64 + 64*64), (256, 128)),
    ('CNN_4', 25*3*32 + 9*(32*32 + 32*32 + 32*64 + 64*64 + 64*64), (512, 128))])
def test_weights_by_hand(name, convs, widths):
    net = network(name, 10, 32)
    assert n_parameters(net.body, bias=False) == convs
    assert n_parameters(net.head, bias=False) == 64*2*2*widths[0] + widths[0]*widths[1] + widths[1]*10


def test_mlp_parameters_by_hand():
    n = 3*32*32
    assert n_parameters(network('MLP', 100, 32)) == (n*200 + 200) + (200*150 + 150) + (150*100 + 100)
    assert n_parameters(network('MLP', 5, 32, hidden=[25, 10])) == (n*25 + 25) + (25*10 + 10) + (10*5 + 5)


@pytest.mark.parametrize('name,n_classes,mb', [
    ('CNN_TL_1', 1000, 232.03), ('CNN_TL_3', 89, 97.10), ('CNN_TL_5', 41, 48.56),  # as printed
    ('CNN_TL_2', 41, 184.72), ('CNN_TL_4', 41, 88.56)])                            # printed: 169.1 and 84.56
def test_weights_of_the_transfer_networks(name, n_classes, mb):
    assert round(weight_mb(name, n_classes), 2) == mb


def test_how_the_paper_comes_to_169():
    "Its CNN_TL_2 is fc7 as 2048x2048 and 89 classes."
    wrong = weight_mb('CNN_TL_2', 89) + 4*(2048*2048 - 4096*2048)/2**20
    assert round(wrong, 1) == 169.1


# ---- shapes

def test_shapes_of_table_14():
    shapes = layer_shapes(meta('CNN_TL_1', 1000, 224), (224, 224))
    assert list(shapes) == ['conv1', 'relu1', 'norm1', 'pool1', 'conv2', 'relu2', 'norm2', 'pool2', 'conv3', 'relu3', 'conv4', 'relu4',
                            'conv5', 'relu5', 'pool5', 'flatten', 'fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7', 'out']
    want = dict(conv1=(64, 54, 54), norm1=(64, 54, 54), pool1=(64, 27, 27), conv2=(256, 27, 27), pool2=(256, 13, 13), conv3=(256, 13, 13),
                conv4=(256, 13, 13), conv5=(256, 13, 13), pool5=(256, 6, 6), fc6=(4096,), fc7=(4096,), out=(1000,))
    assert {k: shapes[k] for k in want} == want


@pytest.mark.parametrize('name', [*CNNS, *TLS, 'MLP'])
@pytest.mark.parametrize('extra', [(0, 0), (0, 13), (25, 1)])
def test_any_size_that_survives_the_poolings(name, extra):
    h, w = (SPECS[name].min_size + e for e in extra)
    net = meta(name, 3, (h, w))
    body = net.body(torch.empty(2, 3, h, w, device='meta'))
    assert tuple(body.shape[1:]) == SPECS[name].body_shape((h, w))
    assert net.head(body).shape == (2, 3)


@pytest.mark.parametrize('name,least', [*((n, 16) for n in CNNS), *((n, 39) for n in TLS)])
def test_too_small(name, least):
    assert SPECS[name].min_size == least
    for size in (least - 1, (least - 1, 200), (200, least - 1)):
        with pytest.raises(ValueError, match=f'{name} needs images of at least {least}×{least} pixels, not .*{least-1}'):
            network(name, 10, size)


@given(st.lists(st.builds(Stage, st.lists(st.builds(Conv, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=2),
                          st.booleans(), st.booleans()), max_size=3), st.integers(0, 9), st.integers(0, 9))
def test_size_arithmetic_is_torchs(stages, dh, dw):
    spec = NetworkSpec('drawn', stages, [4])
    h, w = spec.min_size + dh, spec.min_size + dw
    net = meta(spec, 2, (h, w))
    assert tuple(net.body(torch.empty(1, 3, h, w, device='meta')).shape[1:]) == spec.body_shape((h, w))
    if spec.min_size > 1:  # a pixel less and PyTorch itself refuses
        with pytest.raises(RuntimeError):
            net.body(torch.empty(1, 3, spec.min_size - 1, spec.min_size - 1, device='meta'))


@pytest.mark.parametrize('size', [0, -3, 32.5, '32', None, (32,), (32, 32, 3), (32, 0), True])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match='size'):
        network('CNN_1', 10, size)


# ---- layers

def test_norm_is_vgg_fs():
    x = 50*torch.randn(2, 9, 3, 4)
    sums = torch.stack([(x[:, max(0, c-2):c+3]**2).sum(1) for c in range(9)], 1)
    torch.testing.assert_close(vgg_f_norm()(x), x/(2 + 1e-4*sums)**0.75)


def test_one_dropout_after_each_row():
    drops = [k for k, m in meta('CNN_5', 9, 64).head.named_children() if isinstance(m, nn.Dropout)]
    assert drops == ['drop8', 'drop10']
    assert all(m.p == 0.5 for n in [*CNNS, *TLS] for m in meta(n, 9, 64).modules() if isinstance(m, nn.Dropout))
    assert not [m for m in meta('MLP', 9, 64).modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize('name', ['CNN_1', 'CNN_5', 'CNN_TL_5', 'MLP'])
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    net = network(name, 3, 48, seed=0).eval()
    nn.functional.cross_entropy(net(torch.rand(4, 3, 48, 48)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


# ---- seeds

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize('name', ['CNN_2', 'MLP_25_10'])
def test_a_seed_gives_the_same_weights_and_leaves_the_generator_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = network(name, 4, 32, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert same(a, network(name, 4, 32, seed=7))
    assert not same(a, network(name, 4, 32, seed=8))
    b = network(name, 4, 32, seed=0)
    torch.manual_seed(0)
    assert same(b, network(name, 4, 32))           # the weights of PyTorch's own default
    assert not same(b, network(name, 4, 32))       # seed=None draws on


def test_generator_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        network('CNN_1', 0, seed=3)
    assert torch.equal(before, torch.get_rng_state())


# ---- specs

@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS.keys())
def test_json_round_trip(spec):
    again = NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)
    assert str(meta(again, 5, 64)) == str(meta(spec, 5, 64))


def test_specs_differ():
    assert len(set(SPECS.values())) == 11


@pytest.mark.parametrize('d', [{}, {'name': 'x'}, [], None, {**SPECS['CNN_1'].to_dict(), 'more': 1},
                               {**SPECS['CNN_1'].to_dict(), 'stages': [{'convs': [{'window': 3}]}]},
                               {**SPECS['CNN_1'].to_dict(), 'stages': [{'pool': True}]},
                               {**SPECS['CNN_1'].to_dict(), 'stages': 3}])
def test_what_is_no_spec(d):
    with pytest.raises(ValueError, match='spec|stage'):
        NetworkSpec.from_dict(d)


@pytest.mark.parametrize('make,message', [
    (lambda: Conv(0, 3), 'kernel'), (lambda: Conv(3, 2.5), 'filters'), (lambda: Conv(3, 3, 0), 'stride'), (lambda: Conv(3, 3, 1, -1), 'padding'),
    (lambda: Conv('3', 3), 'kernel'), (lambda: Stage([]), 'convs is empty'), (lambda: NetworkSpec('x', fc=[0]), 'hidden width'),
    (lambda: NetworkSpec('x', dropout=1.), 'dropout'), (lambda: NetworkSpec('x', dropout=-.1), 'dropout'),
    (lambda: NetworkSpec('x', stages=[Conv(3, 3)]), 'Stage'), (lambda: Stage([(3, 3)]), 'Conv'), (lambda: mlp_spec(), 'hidden width')])
def test_specs_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_frozen():
    with pytest.raises(AttributeError):
        SPECS['CNN_1'].name = 'mine'


def test_numpys_integers_are_taken():
    spec = mlp_spec(*np.array([25, 10]))
    assert spec == mlp_spec(25, 10) and json.loads(json.dumps(spec.to_dict()))['fc'] == [[25], [10]]
    assert network('MLP', np.int64(4), (np.int64(8), 8), hidden=list(np.array([25, 10])))[-1].out.out_features == 4


def test_mlp_names():
    assert mlp_spec(200, 150) == SPECS['MLP'] == network_spec('MLP_200_150')
    assert network_spec('MLP', hidden=64).name == 'MLP_64'
    assert network_spec(SPECS['CNN_4']) is SPECS['CNN_4']


@pytest.mark.parametrize('name', ['CNN_6', 'cnn_1', '', 'MLP_', 'MLP_x', None, 3, ['CNN_1'], nn.ReLU()])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError, match='CNN_1, CNN_2, .*CNN_TL_5, MLP'):
        network(name, 10)


def test_hidden_is_for_mlps():
    for name in ('CNN_1', SPECS['CNN_1'], 'MLP_25_10'):
        with pytest.raises(ValueError, match="is for 'MLP'"):
            network(name, 10, hidden=[5])
    for hidden in ([], [0], [2.5]):
        with pytest.raises(ValueError, match='hidden width'):
            network('MLP', 10, hidden=hidden)


@pytest.mark.parametrize('n', [0, -1, 2.5, None, '10', True])
def test_n_classes(n):
    with pytest.raises(ValueError, match='n_classes must be a whole number of 1 or more'):
        network('CNN_1', n)


# ---- pools

@given(st.integers(2, 40), st.integers(2, 40))
def test_both_pools_halve_every_side(h, w):
    for window in (2, 3):
        spec = NetworkSpec('pooled', [Stage([Conv(1, 4)], window=window)])
        assert network(spec, 2, (h, w)).body(torch.zeros(1, 3, h, w)).shape[-2:] == (h//2, w//2) == spec.body_shape((h, w))[1:]


def test_a_window_of_three_overlaps():
    x = torch.arange(25.).reshape(1, 1, 5, 5)
    pools = [network(NetworkSpec('p', [Stage([Conv(1, 1)], window=w)]), 2, 5).body.pool1 for w in (2, 3)]
    assert [p(x).flatten().tolist() for p in pools] == [[6, 8, 16, 18], [12, 14, 22, 24]]


@pytest.mark.parametrize('window', [1, 4, 2.5, None])
def test_other_windows_are_refused(window):
    with pytest.raises(ValueError, match="a pool's window must be 2 or 3 pixels"): Stage([Conv(3, 8)], window=window)
