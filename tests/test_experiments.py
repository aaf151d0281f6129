"What experiments keep: a result that grows by further runs, and says which commit made which of them."
import json, os
from dataclasses import replace

import pandas as pd
import pytest
import torch

from hdfast.experiments import EXPERIMENTS, by_variant, caption, commits, earlier_runs, load_result, pages_folder, provenance, runs_of, save_result, use_device
from hdfast.hdcnn import HDCNN
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.runner import select
from hdfast.trunk import SLIM, WIDE

WANTED = dict(dataset='caltech101', seed=0, epochs=3, how='paper', variants=['a', 'b'])


def folds(*numbers): return [f'fold {i}' for i in numbers]


def made(sha): return provenance('smoke') | dict(git_sha=sha, git_dirty=False)


def rows_of(runs, **more): return [dict(run=run, model=m, FC=i + .5, **more) for i, run in enumerate(runs) for m in 'ab']


def keep(folder, rows, made_by, runs, **about):
    save_result(folder, 'r', pd.DataFrame(rows), pd.DataFrame(rows), dict(parameters=WANTED | dict(runs=runs), provenance=made_by, **about))


def test_without_an_earlier_result_there_is_nothing(tmp_path):
    assert earlier_runs('', 'r', folds(0, 1), WANTED, made('x')) == ([], made('x'))
    with pytest.raises(FileNotFoundError, match="r hasn't been run"): earlier_runs(tmp_path, 'r', folds(0, 1), WANTED, made('x'))


def test_a_result_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    keep(tmp_path, rows_of(folds(0)), made('first'), 1)
    before = {f.name: f.read_text() for f in tmp_path.iterdir()}
    with pytest.raises(TypeError): keep(tmp_path, rows_of(folds(0, 1)), made('second'), 2, best=object())
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == before


def test_a_table_never_stands_beside_the_provenance_of_another(tmp_path, monkeypatch):
    keep(tmp_path, rows_of(folds(0)), made('first'), 1)
    replace_file, done = os.replace, []
    def one_only(a, b):
        if done: raise KeyboardInterrupt
        done.append(b)
        replace_file(a, b)
    monkeypatch.setattr(os, 'replace', one_only)
    with pytest.raises(KeyboardInterrupt): keep(tmp_path, rows_of(folds(0, 1)), made('second'), 2)
    with pytest.raises(FileNotFoundError, match="r hasn't been run: there is no .*r.json$"): load_result(tmp_path, 'r')


@pytest.mark.parametrize('name, profile', [('mlp_synthetic', 'smoke'), ('mlp_cifar100', 'paper')])
def test_a_missing_result_names_a_command_that_there_is(tmp_path, name, profile):
    with pytest.raises(FileNotFoundError, match=f'hdfast reproduce --profile {profile} --only {name} '): load_result(tmp_path, name)


def test_a_folder_whose_name_begins_like_a_set_has_seeds(tmp_path):
    assert [name for name, *_ in runs_of('caltech-birds', 2)] == ['seed 0', 'seed 1'] and [name for name, *_ in runs_of('caltech101', 2)] == ['fold 0', 'fold 1']


def test_a_result_grows_twice_and_every_run_keeps_its_commit(tmp_path):
    old = made('first') | dict(versions=made('')['versions'] | dict(torch='1.0'))
    keep(tmp_path, rows_of(folds(0)), old, 1, wall_seconds=7, diverged=['b'])
    for sha, there, wanted in (('second', folds(0), folds(0, 1, 2)), ('third', folds(0, 1, 2), folds(0, 1, 2, 3))):
        rows, by = earlier_runs(tmp_path, 'r', wanted, WANTED, made(sha))
        assert rows == rows_of(there)
        keep(tmp_path, rows_of(wanted), by, len(wanted))
    about = load_result(tmp_path, 'r')[1]
    assert commits(about['provenance']) == 'first (fold 0), second (fold 1, fold 2), third (fold 3)'
    assert caption(about).endswith(f"torch 1.0 and {made('')['versions']['torch']}, commits first (fold 0), second (fold 1, fold 2), third (fold 3)")
    first = json.loads((tmp_path/'r.json').read_text())['provenance']['earlier'][0]
    assert (first['wall_seconds'], first['diverged']) == (7, ['b'])


def test_costs_are_left_to_the_new_runs(tmp_path):
    keep(tmp_path, rows_of(folds(0), macs=9), made('x'), 1)
    assert earlier_runs(tmp_path, 'r', folds(0, 1), WANTED, made('y'), ['macs'])[0] == rows_of(folds(0))


def test_rows_beyond_the_runs_that_are_told_are_not_believed(tmp_path):
    keep(tmp_path, rows_of(folds(0, 1)), made('x'), 1) # ended between two files
    assert earlier_runs(tmp_path, 'r', folds(0, 1), WANTED, made('y'))[0] == rows_of(folds(0))


@pytest.mark.parametrize('change, message', [(dict(epochs=4), 'made with epochs 3, not 4'), (dict(variants=['a']), r"made with variants \['a', 'b'\], not"),
    (dict(how='one_cycle'), "how 'paper', not 'one_cycle'")])
def test_runs_made_otherwise_are_refused(tmp_path, change, message):
    keep(tmp_path, rows_of(folds(0)), made('x'), 1)
    with pytest.raises(ValueError, match=message): earlier_runs(tmp_path, 'r', folds(0, 1), WANTED | change, made('y'))


@pytest.mark.parametrize('what, other', [('profile', 'cpu'), ('device', 'abacus'), ('arithmetic', 'float16')])
def test_other_circumstances_are_refused(tmp_path, what, other):
    keep(tmp_path, rows_of(folds(0)), made('x'), 1)
    with pytest.raises(ValueError, match=f'made with {what}'): earlier_runs(tmp_path, 'r', folds(0, 1), WANTED, made('y') | {what: other})


def test_the_number_of_threads_may_differ(tmp_path):
    keep(tmp_path, rows_of(folds(0)), made('x') | dict(device='abacus, 1 thread(s)'), 1)
    assert len(earlier_runs(tmp_path, 'r', folds(0, 1), WANTED, made('y') | dict(device='abacus, 4 thread(s)'))[0]) == 2


@pytest.mark.parametrize('written', [{'r.json': '{"a": 1}', 'r.csv': 'a\n1\n'}, {'r.json': '[]', 'r.csv': 'a\n1\n'}, {'r.json': '{', 'r.csv': 'a\n1\n'},
                                     {'r.json': '{"parameters": {}, "provenance": {}}'}, {'r.json': '{"parameters": {}, "provenance": {}}', 'r.csv': ''}], ids=str)
def test_files_that_are_no_result_are_named(tmp_path, written):
    for name, text in written.items(): (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=r"r.json isn't a result of r with its table beside it: move it away"): load_result(tmp_path, 'r')


@pytest.mark.parametrize('there, wanted', [(folds(0, 1), folds(0, 1)), (folds(1), folds(0, 1)), (folds(0), folds(1, 2)), (folds(0), ['seed 0', 'seed 1'])])
def test_only_the_first_of_the_wanted_runs_can_be_gone_on_from(tmp_path, there, wanted):
    keep(tmp_path, rows_of(there), made('x'), len(there))
    with pytest.raises(ValueError, match=f"has {', '.join(there)}: nothing to go on from for {', '.join(wanted)}"): earlier_runs(tmp_path, 'r', wanted, WANTED, made('y'))


def test_a_page_grows_to_what_it_gives_at_once(tmp_path, monkeypatch):
    pytest.importorskip('papermill')
    from hdfast import runner
    small = dict(epochs=1, flats=['CNN_2', 'CNN_3'], variants=['shared trunk, tied'], max_size=4, networks=str(tmp_path/'networks'))
    order = ['run', 'model', 'routing']
    def run(out, **parameters):
        monkeypatch.setattr(runner, 'EXPERIMENTS', {'trunk_synthetic': replace(EXPERIMENTS['trunk_synthetic'], profiles={'smoke': small | parameters})})
        found = runner.reproduce('smoke', None, tmp_path/out, device='cpu', say=str)['trunk_synthetic']
        assert isinstance(found, dict), found
        return pd.read_csv(tmp_path/out/'trunk_synthetic_runs.csv').drop(columns='images_a_second').sort_values(order, ignore_index=True), load_result(tmp_path/out, 'trunk_synthetic')
    run('one', runs=1)
    rows = tmp_path/'one'/'trunk_synthetic_runs.csv'
    pd.read_csv(rows).drop(columns='training_seconds').to_csv(rows, index=False) # as results were before that cost was known
    (grown, (table, about)), (whole, (at_once, _)) = run('grown', runs=2, earlier=str(tmp_path/'one')), run('whole', runs=2)
    costs = ['macs', 'parameters', 'memory', 'training_seconds']
    assert grown[grown.run == 'seed 0'][costs].isna().all(axis=None) and grown[grown.run == 'seed 1'].notna().macs.all()
    pd.testing.assert_frame_equal(grown.drop(columns=costs), whole.drop(columns=costs), rtol=1e-5)
    shown = ['model', 'routing', 'accuracy', 'sd', 'margin', 'margin low', 'above best', 'held-out', 'n']
    pd.testing.assert_frame_equal(table[shown], at_once[shown], rtol=0, atol=1e-3) # rows are read from a file with six digits
    flat = table.routing == 'flat'
    pd.testing.assert_series_equal(table[flat].macs, at_once[flat].macs)
    assert about['provenance']['runs'] == ['seed 1'] and about['provenance']['earlier'][0]['runs'] == ['seed 0']


# what the pages on trunks and on trust share

def variants_of(page):
    "The variants that a page defines"
    cells = [''.join(c['source']) for c in json.loads((pages_folder/page).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    known = dict(HierarchicalClassifier=HierarchicalClassifier, HDCNN=HDCNN, SLIM=SLIM, WIDE=WIDE, pd=pd, variants=[])
    exec(next(c for c in cells if 'VARIANTS = {' in c), known)
    return known['VARIANTS']


def test_both_pages_mean_the_same_networks():
    trunk, trust = variants_of('trunk.ipynb'), variants_of('trust.ipynb')
    assert trust == {v: trunk.get(v) for v in trust}


@pytest.mark.parametrize('profile', ['cpu', 'paper'])
@pytest.mark.parametrize('dataset', ['cifar100', 'caltech101'])
@pytest.mark.parametrize('how', ['paper', 'one_cycle'])
def test_trust_asks_for_the_networks_of_the_trunks(dataset, profile, how):
    trust, trunk = (EXPERIMENTS[n].parameters | EXPERIMENTS[n].profiles[profile] for n in (f'trust_normed_{dataset}_{how}', f'trunk_normed_{dataset}_{how}'))
    same = ['dataset', 'how', 'epochs', 'runs', 'max_size', 'precision']
    assert [trust.get(k) for k in same] == [trunk.get(k) for k in same] and 'CNN_1' in trunk['flats'] and {*trust['variants']} <= {*trunk['variants']}


def test_trust_finds_the_networks_of_the_trunks_and_treats_the_control_as_flat(tmp_path, monkeypatch):
    pytest.importorskip('papermill')
    from hdfast import runner
    small = dict(epochs=1, runs=1, max_size=4, variants=['wide trunk', 'wide trunk, one cluster'], networks=str(tmp_path/'networks'))
    def networks_after(name):
        monkeypatch.setattr(runner, 'EXPERIMENTS', {name: replace(EXPERIMENTS[name], profiles={'smoke': small})})
        found = runner.reproduce('smoke', None, tmp_path, device='cpu', say=str)[name]
        assert isinstance(found, dict), found
        return {f.name for f in (tmp_path/'networks').glob('*.safetensors')}
    there = networks_after('trunk_synthetic')
    assert len(there) == 4 and networks_after('trust_synthetic') == there
    table, curves = load_result(tmp_path, 'trust_synthetic')[0], pd.read_csv(tmp_path/'trust_synthetic_curves.csv')
    ways = {m: list(zip(part.routing, part.temperatures)) for m, part in table.groupby('model')}
    assert ways.keys() == {'CNN_1', *small['variants']} and ways['wide trunk, one cluster'] == ways['CNN_1'] == [('flat', 'as trained'), ('flat', 'single')]
    trunk = pd.read_csv(tmp_path/'trunk_synthetic.csv').query('model == "wide trunk, one cluster"')
    assert table.set_index('model').FC['wide trunk, one cluster'].round(3).eq(trunk.accuracy.iloc[0].round(3)).all()
    by = ['model', 'routing', 'temperatures']
    assert len(curves.groupby(by)) == len(table) and curves.groupby(by)['wanted coverage'].apply(list).map(lambda c: c == [*range(10, 101, 10)]).all()
    least = curves['coverage'] - curves['wanted coverage']
    assert (least > -1e-3).all() and curves[curves['wanted coverage'] == 100].set_index(by)['class accuracy'].sub(table.set_index(by).FC).abs().max() < 1e-3


# trunks, variant by variant

SPLIT_BY_VARIANT = [(e.name, e.parameters | more) for e in EXPERIMENTS.values() if e.split is by_variant for more in e.profiles.values() if more['variants'] != ['all']]

@pytest.mark.parametrize('name, parameters', SPLIT_BY_VARIANT)
def test_parts_of_a_trunk_page_have_all_its_flat_nets_and_variants(name, parameters):
    known, (flat_nets, trunks) = variants_of('trunk.ipynb'), by_variant(parameters)
    assert [v for part in flat_nets + trunks for v in part['variants']] == parameters['variants'] and [n for part in flat_nets for n in part['flats']] == parameters['flats']
    assert all(part['flats'] == parameters['flats'][:1] for part in trunks)
    assert {n for v in parameters['variants'] for n in [known[v].get('start'), *known[v].get('teachers', ())] if n} <= {*parameters['flats']} # else a part trains one of its own


def test_every_variant_of_the_trunk_page_is_trained_and_counted(tmp_path, monkeypatch):
    pytest.importorskip('papermill')
    from hdfast import runner
    small = dict(epochs=1, runs=1, flats=['CNN_1', 'CNN_2'], variants=['all'], max_size=4)
    monkeypatch.setattr(runner, 'EXPERIMENTS', {'trunk_synthetic': replace(EXPERIMENTS['trunk_synthetic'], profiles={'smoke': small})})
    found = runner.reproduce('smoke', None, tmp_path, device='cpu', say=str)['trunk_synthetic']
    assert isinstance(found, dict), found
    table, about = load_result(tmp_path, 'trunk_synthetic')
    hierarchies = table[~table.routing.isin(['flat', 'ensemble'])]
    assert {*hierarchies.model} == {*variants_of('trunk.ipynb')} - {d['model'] for d in about['diverged']} and len(about['diverged']) < 3
    chosen = {*about['winners'], *(m for m, _ in about['met'])}
    assert about['winners'] and not any(w.endswith(('other seed', 'HD-CNN', 'one cluster')) for w in chosen) # neither second seeds nor controls nor others win
    assert table[table.routing != 'ensemble'][['macs', 'parameters', 'memory MB', 'training s', 'images/s']].gt(0).all(axis=None) and len(hierarchies) == 3*hierarchies.model.nunique()


def test_what_diverges_on_the_trunk_page_is_listed_and_the_rest_goes_on(tmp_path, monkeypatch):
    pytest.importorskip('papermill')
    from hdfast import runner
    page, train = (pages_folder/'trunk.ipynb').read_text(encoding='utf-8'), 'def fit_flat(n, dls, s): return fit_network('
    assert page.count(train) == 1
    (tmp_path/'trunk.ipynb').write_text(page.replace(train, "def fit_flat(n, dls, s):\\n    if n == 'CNN_2': raise FloatingPointError('lost')\\n    return fit_network("), encoding='utf-8')
    (tmp_path/'paper.json').write_text('{}')
    small = dict(epochs=1, runs=1, flats=['CNN_1', 'CNN_2', 'CNN_3'], variants=['shared trunk', 'distilled'], max_size=4) # distilled listens to CNN_2
    monkeypatch.setattr(runner, 'pages_folder', tmp_path)
    monkeypatch.setattr(runner, 'EXPERIMENTS', {'trunk_synthetic': replace(EXPERIMENTS['trunk_synthetic'], profiles={'smoke': small})})
    found = runner.reproduce('smoke', None, tmp_path/'out', device='cpu', say=str)['trunk_synthetic']
    assert isinstance(found, dict) and found['diverged'] == [dict(run='seed 0', model=m, error='lost') for m in ('CNN_2', 'distilled')], found
    table = load_result(tmp_path/'out', 'trunk_synthetic')[0]
    assert table.model.drop_duplicates().tolist() == ['CNN_1', 'CNN_3', 'shared trunk']
    best = table[table.routing == 'flat'].accuracy.max()
    assert (table['above best'] - (table.accuracy - best)).abs().max() < 1e-3


def test_parts_of_a_trunk_page_train_all_that_the_whole_needs(tmp_path, monkeypatch):
    pytest.importorskip('papermill')
    from hdfast import runner
    small = dict(epochs=1, runs=1, flats=['CNN_2', 'CNN_3'], variants=['shared trunk', 'shared trunk, tied'], max_size=4)
    def run(out, jobs):
        monkeypatch.setattr(runner, 'EXPERIMENTS', {'trunk_synthetic': replace(EXPERIMENTS['trunk_synthetic'], profiles={'cpu': small})})
        said = []
        found = runner.reproduce('cpu', None, tmp_path/out, device='cpu', jobs=jobs, say=said.append)['trunk_synthetic']
        assert isinstance(found, dict), found
        return said, load_result(tmp_path/out, 'trunk_synthetic')[0].drop(columns=['images/s', 'training s']), {f.name for f in (tmp_path/out/'networks').glob('*.safetensors')}
    said, parted, networks = run('parts', 2)
    _, whole, same = run('whole', 1)
    ended = [line.split('] ')[1].split(':')[0] for line in said if line.startswith('[')]
    assert sorted(ended) == ['trunk_synthetic', *(f'trunk_synthetic.1.{j}' for j in (1, 2, 3, 4))] and ended[-1] == 'trunk_synthetic' and len(networks) == 4
    assert ended.index('trunk_synthetic.1.1') < min(map(ended.index, ('trunk_synthetic.1.3', 'trunk_synthetic.1.4'))) # both flat nets begin at once; variants wait for the first, whose clusters they have
    pd.testing.assert_frame_equal(parted, whole, rtol=1e-4)
    assert networks == same
    written = lambda folder, kind: max(f.stat().st_mtime for f in (tmp_path/'parts'/folder).glob(kind))
    assert written('networks', '*.safetensors') < written('pages/parts', '*.json') # the whole has only to evaluate


# trials of other experiments

def test_a_selector_learns_from_the_trials_of_the_experiments_that_are_named_and_of_no_others(tmp_path, monkeypatch):
    pytest.importorskip('papermill')
    from hdfast import runner
    e, small = EXPERIMENTS['selection_synthetic'], {'smoke': dict(epochs=1, runs=1, clusterings=['learned'], n_clusters=6)}
    def of(name, **more): return replace(e, name=name, parameters=e.parameters | dict(name=name, **more), needs=tuple(more.get('sources', ())), profiles=small)
    monkeypatch.setattr(runner, 'EXPERIMENTS', {'first': of('first'), 'second': of('second', sources=['first']), 'third': of('third')})
    found = runner.reproduce('smoke', None, tmp_path, device='cpu', say=str)
    assert all(isinstance(found[name], dict) for name in ('first', 'second', 'third')), found
    ways = {name: set(load_result(tmp_path, name)[0].experts) for name in found}
    assert ways['first'] == ways['third'] == ways['second'] - {'learned elsewhere'} and 'learned elsewhere' in ways['second'] # whatever lies in the folder


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_device_that_is_not_there_is_an_error_at_once():
    before = torch.get_float32_matmul_precision()
    with pytest.raises((RuntimeError, AssertionError)): use_device('cuda')
    assert torch.get_float32_matmul_precision() == before


def test_a_table_is_made_by_its_own_experiments_and_not_by_those_beside_it():
    assert [e.name for e in select('cpu', ['Table 13'])] == ['memory']
    assert {'trunk_cifar100_one_cycle', 'trunk_hdcnn_cifar100_one_cycle'} <= {e.name for e in select('cpu', ['Beyond 1'])}
