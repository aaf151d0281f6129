"Experiments on images that have to be fetched by hand, end to end on small folders of the same layout: CalTech-256 and ImageNet."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip('papermill')

from hdfast import runner
from hdfast.experiments import EXPERIMENTS, load_result
from hdfast.runner import NotRunHere, reproduce
from hdfast.summary import summary_lines

OBJECTS = '001.ak47 056.dog 072.fire-truck 087.goldfish 126.ladder 257.clutter'.split()


def write_jpegs(folder, name, n, mean, rng, side=(72, 64)):
    "`n` pictures of coloured noise about a `mean` of 3x3 pixels"
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.clip(mean + rng.normal(0, 25, mean.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize(side).save(folder/name.format(i + 1))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder of fastai's with both sets in it, which pages find by $FASTAI_HOME; and their cache"
    home, rng = tmp_path_factory.mktemp('fastai'), np.random.default_rng(0)
    objects, net = home/'data'/'caltech256'/'256_ObjectCategories', home/'data'/'imagenet'
    for c in OBJECTS: write_jpegs(objects/c, f'{c[:3]}_{{:04}}.jpg', 12, rng.uniform(0, 255, (3, 3, 3)), rng)
    (objects/'056.dog'/'greg').mkdir() # so in the published archive
    (objects/'056.dog'/'greg'/'vision309').write_text('')
    (objects/'126.ladder'/'RENAME2').write_text('')
    for i in range(201):
        mean, wnid = rng.uniform(0, 255, (3, 3, 3)), f'n{1440764 + 7*i:08d}'
        for part, n in (('train', 4), ('val', 2)): write_jpegs(net/part/wnid, f'{wnid}_{{}}.JPEG', n, mean, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FASTAI_HOME', str(home))
        patch.setenv('HDFAST_CACHE', str(home/'cache'))
        yield home


@pytest.fixture(scope='module')
def run(home, tmp_path_factory):
    "Run an experiment of the registry with other parameters; what the runner found, and the folder"
    shared = tmp_path_factory.mktemp('out')
    def run(name, out=shared, **parameters):
        small = {name: replace(EXPERIMENTS[name], profiles={'smoke': parameters | dict(epochs=1)}, needs=())}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, 'EXPERIMENTS', small)
            return reproduce('smoke', None, out, device='cpu', say=str)[name], out
    return run


@pytest.mark.parametrize('family, item', [('mlp', 'Table 5'), ('cnn', 'Table 6')])
def test_caltech_256(run, family, item):
    found, out = run(name := f'{family}_caltech256', n_clusters=2, gammas=[0, 3], runs=1)
    assert isinstance(found, dict), found
    table, about = load_result(out, name)
    assert about['parameters']['dataset'] == 'caltech256' and about['parameters']['epochs'] == 1
    assert table.gamma.tolist() == ['flat', 'disjoint', '3'] and table['paper FC'].notna().all() and table.n.eq(1).all()
    assert '257.clutter' in str(about['hierarchies']['fold 0']) # the clutter is a class like any other
    picture = (out/f'{name}_dendrogram.svg').read_text()
    assert all(f'<!-- {c} -->' in picture for c in OBJECTS)
    if family == 'cnn': assert 'cnn_caltech256_dendrogram.svg' in (out/'summary.md').read_text() # Fig. 6b
    lines = summary_lines(out).query("item == @item")
    assert lines.experiment.eq(name).all() and lines.protocol.dropna().str.startswith('○ 1 of 40 epochs, 1 of 6 runs').all() and lines.protocol.notna().sum() == 8


@pytest.mark.slow
def test_caltech_256_with_experts_chosen_from_all_candidates(run):
    found, out = run('selection_joint_caltech256', n_clusters=3, runs=1)
    assert isinstance(found, dict), found
    table, about = load_result(out, 'selection_joint_caltech256')
    assert table.fillna({'clustering': ''}).set_index(['clustering', 'experts']).paper.dropna().to_dict() == {
        ('', 'flat net'): 36.21, ('learned', 'fixed'): 28.34, ('learned', 'oracle of CNNs'): 29.54, ('learned', 'oracle'): 36.54}
    assert table.accuracy.between(0, 100).all() and about['networks'] == 17*len(about['chosen'])
    assert set(', '.join(c['classes'] for c in about['chosen']).split(', ')) <= {*OBJECTS}
    lines = summary_lines(out).query("experiment == 'selection_joint_caltech256'")
    assert lines.item.eq('Table 10').all() and lines.protocol.eq('○ 1 of 40 epochs, 1 of 6 runs').all() and lines.paper.notna().sum() == 4


@pytest.mark.parametrize('n', [100, 200])
def test_imagenet_dendrogram(run, n):
    found, out = run(name := f'cnn_imagenet{n}', runs=1)
    assert isinstance(found, dict), found
    table, about = load_result(out, name)
    assert len(about['hierarchies']['seed 0']) and table.gamma.tolist() == ['flat', 'disjoint']
    picture = (out/f'{name}_dendrogram.svg').read_text()
    assert picture.count('<!-- n0') == n # a leaf for each class that was drawn
    assert f'{name}_dendrogram' in (out/'summary.md').read_text()


@pytest.mark.slow
def test_imagenet_transfer(run):
    few = dict(size=40, options=dict(seed=0, n=6), bs=8)
    found, out = run('pretrain_imagenet100', network='CNN_TL_5', **few)
    assert isinstance(found, dict), found
    found, out = run('transfer_imagenet100', flat='CNN_TL_5', router='CNN_TL_5', experts=['CNN_TL_5'], n_clusters=2, runs=1, **few)
    assert isinstance(found, dict), found
    paper = pd.read_csv(out/'transfer_imagenet100.csv').set_index('model').paper
    assert paper.dropna().to_dict() == {'flat CNN_TL_5 initialisation': 55.32, 'CNN_TL_5 extractor': 50.27, 'adaptive transfer': 56.06}
    lines = summary_lines(out).query("item == 'Table 11'")
    left, lines = (lines[lines.experiment.eq('transfer_imagenet200') == which] for which in (True, False))
    assert left.verdict.tolist() == ['not run yet']
    assert lines.verdict.eq('the paper has all 1,000 classes').all() and lines.protocol.str.contains('40 of 224 pixels').all()


def test_without_images_a_page_is_not_run_and_says_where_they_were_sought(run, tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    found, out = run('cnn_imagenet200', tmp_path/'out', runs=1)
    assert isinstance(found, NotRunHere)
    assert f"not run here: images absent: nothing in {tmp_path/'data'/'imagenet'}: ImageNet has to be downloaded by hand" in str(found)
    assert 'not run here: images of ImageNet absent' in (out/'summary.md').read_text()
