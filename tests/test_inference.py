"Asking networks in small batches: the same answers, to the bit."
import ctypes, subprocess, sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from hdfast.inference import _halve, _halves, forward, images_at_a_time, keep_memory, predict_in_batches
from hdfast.learners import build_network
from hdfast.trunk import flat_network

NETS = {**{name: lambda name=name, size=32: build_network(name, 7, (3, size, size), 0) for name in ('CNN_1', 'CNN_2', 'CNN_3', 'CNN_4', 'CNN_5', 'MLP')},
        'CNN_TL_5': lambda size=64: build_network('CNN_TL_5', 7, (3, size, size), 0),
        'batch norm': lambda size=32: flat_network('CNN_2', 7, (3, size, size), batch_norm=True, drop=.1)}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad(): yield


@pytest.mark.parametrize('n', [0, 1, 5, 64])
@pytest.mark.parametrize('name', [n for n in NETS if n != 'CNN_TL_5'])
def test_the_answers_are_those_of_the_network_to_the_bit(name, n):
    net, x = NETS[name]().eval(), torch.randn(n, 3, 32, 32)
    assert torch.equal(forward(net, x), net(x))


def test_local_normalisation_and_overlapping_pools_too():
    net, x = NETS['CNN_TL_5']().eval(), torch.randn(3, 3, 64, 64)
    assert torch.equal(forward(net, x), net(x))


def test_a_layer_that_is_used_twice_runs_twice():
    act = nn.ReLU()
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), act, nn.Sequential(nn.Linear(9, 9), act), nn.Linear(9, 5)).eval(), torch.randn(7, 3, 2, 2)
    assert torch.equal(forward(net, x), net(x)) and not torch.equal(net(x), net[4](net[3][0](act(net[1](net[0](x))))))


def test_a_layer_derived_from_one_of_ours_does_as_it_likes():
    class Twice(nn.ReLU):
        def forward(self, x): return 2*x.relu()
    class Shifted(nn.MaxPool2d):
        def forward(self, x): return super().forward(x) - 1
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), Twice(), nn.ReLU(), Shifted(2)).eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(forward(net, x), net(x))


@pytest.mark.parametrize('at', [0, 1, 2])
def test_hooks_are_kept(at):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.MaxPool2d(2))).eval(), torch.randn(2, 3, 8, 8)
    net[at].register_forward_hook(lambda layer, inputs, out: out + 1)
    assert torch.equal(forward(net, x), net(x))


@given(n=st.integers(1, 4), c=st.integers(1, 9), h=st.integers(2, 9), w=st.integers(2, 9), seed=st.integers(0, 99))
def test_halving_is_max_pooling(n, c, h, w, seed):
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed)).to(memory_format=torch.channels_last)
    assert torch.equal(_halve(x), nn.MaxPool2d(2)(x))


def test_halving_keeps_what_is_not_a_number_as_max_pooling_does():
    x = torch.randn(2, 3, 6, 6).masked_fill_(torch.rand(2, 3, 6, 6) > .9, torch.nan)
    assert torch.equal(_halve(x).isnan(), nn.MaxPool2d(2)(x).isnan())


@pytest.mark.parametrize('pool', [nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2)])
def test_other_pools_are_left_to_torch(pool):
    x = torch.randn(8, 32, 17, 17).to(memory_format=torch.channels_last)
    assert _halves(nn.MaxPool2d(2), x) and not _halves(pool, x)
    net = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), pool).to(memory_format=torch.channels_last)
    assert torch.equal(forward(net, x), net(x))


@pytest.mark.parametrize('net', [nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Sequential(nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)),
                                 nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.ReLU()])
def test_inputs_are_never_overwritten(net):
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    assert torch.equal(forward(net, x), net(before)) and torch.equal(x, before)


class Residual(nn.Sequential):
    def forward(self, x): return x + super().forward(x)

@pytest.mark.parametrize('net', [Residual(nn.Linear(5, 5), nn.ReLU()), nn.Sequential(Residual(nn.ReLU(), nn.Linear(5, 5)), nn.ReLU())], ids=['alone', 'within'])
def test_networks_that_are_more_than_a_row_of_layers_are_asked_as_they_are(net):
    x = torch.randn(4, 5)
    assert torch.equal(forward(net, x), net(x))


@given(rows=st.lists(st.integers(0, 19), max_size=70))
@settings(max_examples=20)
def test_answers_come_in_the_order_of_the_rows(rows):
    net, images, rows = NETS['MLP']().eval(), torch.randn(20, 3, 32, 32), torch.tensor(rows, dtype=torch.long)
    assert torch.allclose(predict_in_batches(net, images.__getitem__, rows, (3, 32, 32), 'cpu'), net(images)[rows], atol=1e-5)


def test_no_more_than_a_batch_of_inputs_is_made_at_a_time():
    net, asked = NETS['CNN_1']().eval(), []
    predict_in_batches(net, lambda rows: asked.append(len(rows)) or torch.zeros(len(rows), 3, 32, 32), torch.arange(150), (3, 32, 32), 'cpu')
    assert asked == [64, 64, 22]


def test_batches_are_small_on_a_cpu_and_large_on_a_gpu():
    net = NETS['CNN_1']()
    assert images_at_a_time(net, (3, 32, 32), 'cpu') < images_at_a_time(net, (3, 32, 32), 'cuda:1') <= 4096
    assert images_at_a_time(net, (3, 64, 64), 'cpu') == images_at_a_time(net, (3, 32, 32), 'cpu')//4
    assert images_at_a_time(net, (3, 4096, 4096), 'cpu') == 16 and images_at_a_time(NETS['MLP'](), (3, 4096, 4096), 'cpu') == 256


PAGES = """
import resource, sys, torch
from hdfast.inference import keep_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == 'keep' and not keep_memory(): print(-1), sys.exit()
def turn():
    before = faults()
    torch.ones(2**25)   # 128 MB
    return faults() - before
print(min(turn() for _ in range(8)))
"""

def test_memory_that_is_kept_is_not_asked_for_again():
    def pages(how): return int(subprocess.run([sys.executable, '-W', 'ignore', '-c', PAGES, how], capture_output=True, text=True, check=True).stdout)
    if (kept := pages('keep')) < 0: pytest.skip("this system's allocator is not glibc's")
    assert kept < 100 and pages('as it is') > 1000


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
    assert keep_memory() is False


@pytest.mark.parametrize('limit, asked, kept', [
    (2**31, [(-3, 2**31 - 1), (-1, 2**31 - 1)], True),             # never more than an int of C
    (2**26, [(-3, 2**31 - 1), (-3, 2**25), (-1, 2**31 - 1)], True), # an old glibc takes less
    (0, [(-3, 2**31 - 1), (-3, 2**25)], False)])                    # and the other threshold alone would do harm
def test_thresholds_are_set_together_or_not_at_all(monkeypatch, limit, asked, kept):
    calls = []
    class Libc:
        def mallopt(self, option, value):
            calls.append((option, value))
            return int(option == -1 or value < limit)
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: Libc())
    assert keep_memory(2**32) is kept and calls == asked


class Keeps(nn.Module):
    "Passes on what it is given, and keeps it for another layer."
    def forward(self, x):
        self.kept = x
        return x


class Adds(nn.Module):
    def __init__(self, keeper):
        super().__init__()
        object.__setattr__(self, 'keeper', keeper) # no part of this layer
    def forward(self, x): return x + self.keeper.kept


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 8, 1, 1))
    def forward(self, x): return self.bias


@pytest.mark.parametrize('layers', [lambda k: [nn.Conv2d(3, 8, 3, padding=1), k, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), Adds(k)],
                                    lambda k: [nn.Conv2d(3, 8, 3, padding=1), k, nn.Dropout(), nn.ReLU(), Adds(k)],
                                    lambda k: [nn.Conv2d(3, 8, 3), Bias(), nn.ReLU()], lambda k: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)]],
                         ids=['kept', 'kept through dropout', 'a parameter', 'known'])
def test_a_relu_overwrites_only_what_nobody_else_holds(layers):
    torch.manual_seed(0)
    net, x = nn.Sequential(*layers(Keeps())).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before, want = {k: v.clone() for k, v in net.state_dict().items()}, net(x)
        assert torch.equal(forward(net, x), want)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_forward_of_its_own_and_a_pool_that_gives_indices_are_left_to_the_network():
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    net.forward = lambda x: x + 1
    assert torch.equal(forward(net, x), x + 1)
    class Values(nn.Module):
        def forward(self, pooled): return pooled[0]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True), Values()).eval()
    with torch.no_grad(): assert torch.equal(forward(net, x), net(x))
