"The summary: from result files of every kind, complete or not, lines that say what was measured, how, and what is missing."
import shutil

import numpy as np
import pandas as pd
import pytest

from hdfast.experiments import EXPERIMENTS, repository, save_result
from hdfast.summary import BEYOND, ITEMS, overview, protocol, summary_lines, write_summary

FULL, LESS = '● full', '○ '


def keep(out, name, rows, arithmetic='float32', profile='paper', **parameters):
    "A result file as a page writes it"
    about = dict(parameters=parameters, provenance=dict(profile=profile, device='a CPU', arithmetic=arithmetic, git_sha='0123456789abcdef', git_dirty=False))
    save_result(out, name, pd.DataFrame(rows), pd.DataFrame(rows), about)


def of(out, item): return summary_lines(out).query('item == @item')


def hierarchy_row(gamma, fc, n, **more):
    hc = np.nan if gamma == 'flat' else fc + 10
    return dict(clusters='9', gamma=gamma, routing='top-1', **{'HC home': hc, 'HC home sd': .5, 'HC contains': hc, 'HC contains sd': .5, 'FC': fc, 'FC sd': .5, 'paper HC': np.nan, 'paper FC': 40.}, n=n, **more)


def trunk_row(model, routing, accuracy, margin, n=2, **more):
    row = dict(model=model, routing=routing, accuracy=accuracy, sd=.4, margin=margin, **{'margin low': margin - 1, 'margin high': margin + 1, 'above best': margin - 2},
               clusters=1 if routing == 'flat' else 24, macs=1e7, parameters=262144, **{'macs share': 1 if routing == 'flat' else .38, 'parameter share': 1 if routing == 'flat' else .8}, n=n)
    return row | more


TRUNK = [trunk_row('CNN_1', 'flat', 40, 0), trunk_row('CNN_2', 'flat', 41, 1), trunk_row('shared trunk', 'top-1', 42, 2), trunk_row('shared trunk', 'top-2', 43, 3),
         trunk_row('shared trunk', 'product', 44, 4), trunk_row('HD-CNN', 'product', 45.5, 5.5), trunk_row('all flat nets', 'ensemble', 46, 6)]


# ---- whether a number is of the full protocol

@pytest.mark.parametrize('name, made, arithmetic, n, mark', [
    ('mlp_caltech101', dict(epochs=40, family='mlp'), 'float32', 6, FULL),
    ('mlp_caltech101', dict(epochs=40, family='mlp'), 'float32', 5, '○ 5 of 6 runs'),
    ('mlp_caltech101', dict(epochs=10, family='mlp'), 'float32', 1, '○ 10 of 40 epochs, 1 of 6 runs'),
    ('selection_mlp_cifar100', dict(epochs=40, family='mlp'), 'float32; convolutional networks trained with products in bfloat16', 3, FULL), # it has none
    ('cnn_cifar100', dict(epochs=40, family='cnn'), 'float32; convolutional networks trained with products in bfloat16', 3, '○ bfloat16'),
    ('cnn_cifar100', dict(epochs=40, family='cnn'), 'float32, products in TF32', 3, '● full, products in TF32'),
    ('transfer_imagenet100', dict(epochs=40, size=64, source='x', recipe_name='one_cycle'), 'float32', 1, '○ 64 of 224 pixels, recipe one_cycle, backbone other than VGG-f'),
    ('memory', {}, 'float32', 0, ''), ('mlp_synthetic', dict(epochs=20), 'float32', 1, '')])
def test_what_the_full_protocol_is(name, made, arithmetic, n, mark):
    assert protocol(name, dict(parameters=made, provenance=dict(arithmetic=arithmetic)), n) == mark


@pytest.mark.parametrize('table, name', [(e.table, n) for n, e in EXPERIMENTS.items() if e.table in {f'Table {i}' for i in range(3, 11)}])
def test_every_row_of_tables_3_to_10_has_profile_and_mark(tmp_path, table, name):
    e = EXPERIMENTS[name]
    n, made = e.profiles['paper']['runs'], dict(epochs=40, runs=e.profiles['paper']['runs'], family=e.parameters.get('family', 'cnn'))
    if e.page == 'hierarchy.ipynb': rows = [hierarchy_row(g, 50., n) for g in ['flat', *('disjoint' if g == 0 else str(g) for g in e.parameters['gammas'])]]
    else: rows = [dict(clustering='learned', experts='fixed', accuracy=50., sd=.1, n=n, paper=51.)]
    keep(tmp_path, name, rows, **made)
    lines = summary_lines(tmp_path).query('experiment == @name')
    assert len(lines) and lines.protocol.eq(FULL).all() and lines.profile.eq('paper').all()
    keep(tmp_path, name, [r | dict(n=1) for r in rows], profile='cpu', **made | dict(epochs=10))
    lines = summary_lines(tmp_path).query('experiment == @name')
    assert lines.protocol.str.startswith(LESS + '10 of 40 epochs, 1 of').all() and lines.profile.eq('cpu').all()


def test_both_readings_of_hc_and_the_oracle_are_there(tmp_path):
    rows = [hierarchy_row('flat', 39., 2), hierarchy_row('disjoint', 35., 2), hierarchy_row('3', 34., 2)]
    for r in rows: r |= {'HC contains': np.nan if r['gamma'] == 'flat' else 97., 'HC contains sd': .1, 'paper HC': 50., 'parameters': 5, 'MACs': 7, 'training s': 9}
    runs = [dict(run=run, routing=routing, gamma=gamma, FC=fc) for run, more in (('seed 0', 0), ('seed 1', .02)) for gamma, fc in ((np.nan, .6 + more), (3, .3)) for routing in ('top-1', 'oracle router')]
    about = dict(parameters=dict(epochs=40, runs=2, family='cnn'), provenance=dict(profile='paper', device='a CPU', git_sha='0123456789abcdef', git_dirty=True, versions=dict(torch='2.11')), wall_seconds=12)
    save_result(tmp_path, 'cnn_cifar100', pd.DataFrame(rows), pd.DataFrame(runs), about)
    lines = of(tmp_path, 'Table 8').query('experiment == "cnn_cifar100"').set_index('number')
    assert 'disjoint, HC contains' not in lines.index and lines.verdict['disjoint, HC'] == '5.0 points lower'
    assert lines.ours['γ = 3, HC contains'] == 97 and lines.verdict['γ = 3, HC contains'] == '47.0 points higher' and lines.verdict['γ = 3, HC'] == 'one router for every γ'
    assert lines.ours['disjoint, FC with the oracle router'] == pytest.approx(61) and lines.sd['disjoint, FC with the oracle router'] == pytest.approx(100*np.std([.6, .62], ddof=1))
    assert lines.ours['γ = 3, FC with the oracle router'] == pytest.approx(30) and lines.n['γ = 3, FC with the oracle router'] == 2
    write_summary(tmp_path)
    kept = pd.read_csv(tmp_path/'summary.csv').query('experiment == "cnn_cifar100"').set_index('number').loc['γ = 3, FC']
    assert kept[['parameters', 'MACs', 'training_seconds', 'page_wall_seconds', 'versions', 'git_sha', 'git_dirty', 'n']].tolist() == [5, 7, 9, 12, 'torch 2.11', '0123456789abcdef', True, 2]


def test_the_overview_counts_what_agrees_and_says_how_it_was_made(tmp_path):
    keep(tmp_path, 'mlp_caltech101', [hierarchy_row('flat', 40.5, 6), hierarchy_row('disjoint', 31., 6)], epochs=40, runs=6, family='mlp')
    keep(tmp_path, 'cnn_cifar100', [hierarchy_row('flat', 47., 1)], epochs=10, runs=1, family='cnn')
    for f in (repository/'figures').glob('memory*'): shutil.copy(f, tmp_path)
    short = overview(summary_lines(tmp_path)).set_index('table')
    assert short.loc['Table 3'].tolist() == [3, 2, 1, '-9.0', '● full'] and short.loc['Table 8'].tolist() == [1, 1, 0, '+7.0', '○ in part']
    assert short.loc['Table 11', 'made'] == 'not run here: images of ImageNet absent' and short.loc['Table 12', 'made'] == 'counted'
    assert set(short.index) == {f'Table {i}' for i in range(1, 17)}


def test_clusterings_that_were_left_out_are_named(tmp_path):
    keep(tmp_path, 'cnn_cifar100_overlap', [hierarchy_row('flat', 39., 3), hierarchy_row('disjoint', 35., 3)], epochs=40, runs=3, family='cnn')
    lines = of(tmp_path, 'Table 8').set_index('number')
    assert lines.verdict['γ = 3, HC and FC'] == lines.verdict['γ = 5, HC and FC'] == 'not run yet' and pd.isna(lines.profile['γ = 3, HC and FC'])
    assert lines[lines.experiment == 'cnn_cifar100'].verdict.tolist() == ['not run yet']
    assert lines.protocol['flat, FC'] == FULL and lines.verdict['disjoint, FC'] == '5.0 points lower'


# ---- ImageNet

def test_without_imagenet_its_items_say_so(tmp_path):
    assert of(tmp_path, 'Table 11').verdict.tolist() == ['not run here: images of ImageNet absent']
    write_summary(tmp_path)
    text = (tmp_path/'summary.md').read_text()
    assert '## Fig. 7b: dendrogram, ImageNet\n\nnot run here: images of ImageNet absent.' in text


def test_a_result_on_a_part_of_imagenet_is_not_compared_with_all_of_it(tmp_path):
    keep(tmp_path, 'transfer_imagenet100', [dict(model='flat CNN_TL_1 initialisation', accuracy=55.3, sd=np.nan, macro=55., n=1, paper=55.32)], epochs=40, runs=1, size=224, source='x')
    line = of(tmp_path, 'Table 11').iloc[0]
    assert line.verdict == 'the paper has all 1,000 classes' and line.paper == 55.32 and line.protocol.startswith('○ backbone')


# ---- beyond the paper

def test_calibration_errors_of_flat_net_and_full_products(tmp_path):
    row = {'temperatures': 'each', 'T router': 1.2, 'FC': 45.5, 'calibration error': 2.5, 'calibration error sd': .2, 'NLL': 2.0614, 'accuracy': 70., 'classes, mistakes': 31.26, 'n': 2}
    keep(tmp_path, 'trust_cifar100', [row | dict(model='shared trunk', routing=r) for r in ('product', 'top-1', 'expert alone')], profile='cpu', epochs=24, runs=1)
    line, variants, left = of(tmp_path, 'Beyond 8').to_dict('records')
    assert line['number'] == 'shared trunk, temperatures each' and line['ours'] == 2.5 and line['protocol'] == '24 epochs' and left['verdict'] == 'not run yet'
    assert variants['number'].startswith("further variants of this profile: the paper's hierarchy; ") and variants['verdict'] == 'not run yet'
    assert line['verdict'] == 'accuracy 45.50, NLL 2.061, the smallest group with both the right and the wrong class has 31.3 classes'


def test_a_flat_control_stands_beside_the_hierarchies_on_trust(tmp_path):
    row = {'temperatures': 'single', 'T router': 1.2, 'FC': 70., 'calibration error': 2.5, 'calibration error sd': .2, 'NLL': 1.2, 'accuracy': 80., 'classes, mistakes': 30., 'n': 3}
    keep(tmp_path, 'trust_normed_caltech101_paper', [row | dict(model='one cluster', routing='flat'), row | dict(model='tied', routing='product')], profile='cpu', epochs=40, runs=3)
    lines = of(tmp_path, 'Beyond 9').query('verdict != "not run yet"')
    assert lines.number.tolist() == ['one cluster, temperatures single', 'tied, temperatures single'] and lines.n.tolist() == [3, 3]


def test_the_trunk_stands_beside_the_flat_net(tmp_path):
    keep(tmp_path, 'trunk_cifar100_one_cycle', TRUNK, profile='cpu', epochs=8, runs=2)
    lines, left = (of(tmp_path, 'Beyond 1').query(f'verdict {sign} "not run yet"').set_index('number') for sign in ('!=', '=='))
    assert left.experiment.tolist() == ['trunk_cifar100_one_cycle', ', '.join(f'{which}_cifar100_{how}' for which in ('trunk', 'trunk_best', 'trunk_normed', 'trunk_adaptive', 'trunk_hdcnn', 'trunk_trial') for how in ('one_cycle', 'paper'))[len('trunk_cifar100_one_cycle, '):]]
    assert list(lines.index) == ['CNN_1, flat, accuracy', 'CNN_2, flat, accuracy', 'shared trunk, top-1, accuracy', 'shared trunk, product, accuracy', 'HD-CNN, product, accuracy',
                                 'all flat nets, ensemble, accuracy']
    assert lines.MACs.eq(1e7).all() and lines.parameters.eq(262144).all()
    assert lines.verdict['CNN_1, flat, accuracy'] == 'the flat net to beat'
    assert lines.verdict['shared trunk, product, accuracy'] == '+4.0 points (95 %: +3.0 to +5.0) against the flat net, 38% of its multiplications, 80% of its parameters'
    assert lines.protocol.eq('8 epochs').all() and lines.profile.eq('cpu').all() and lines.n.eq(2).all()
    assert of(tmp_path, 'Beyond 2').verdict.tolist() == ['not run yet']


def test_with_one_run_there_is_no_interval(tmp_path):
    rows = [r | {'margin low': np.nan, 'margin high': np.nan, 'sd': np.nan, 'n': 1} for r in TRUNK]
    keep(tmp_path, 'trunk_caltech101_one_cycle', rows, profile='cpu', epochs=16, runs=1)
    assert '+2.0 points against the flat net' in of(tmp_path, 'Beyond 2').set_index('number').verdict['shared trunk, top-1, accuracy']


def test_hdcnn_as_measured_stands_in_table_13(tmp_path):
    assert 'not run yet' in of(tmp_path, 'Table 13').verdict.tolist()
    keep(tmp_path, 'trunk_cifar100_one_cycle', [TRUNK[0], TRUNK[-2] | {'memory MB': 1.5}, TRUNK[-1]], profile='cpu', epochs=8, runs=2)
    for f in (repository/'figures').glob('memory*'): shutil.copy(f, tmp_path)
    quoted = of(tmp_path, 'Table 13').query('number.str.endswith(", accuracy") and experiment == "memory"')
    assert quoted.paper.tolist() == [55.32, 50.07, 56.06, 67.7, 68.66] and quoted.ours.isna().all() and quoted.verdict.eq('quoted from the paper').all()
    lines = of(tmp_path, 'Table 13').query('verdict != "not run yet" and index not in @quoted.index').set_index('number')
    assert list(lines.index)[-3:] == ['CNN_1, flat, accuracy', 'HD-CNN, product, accuracy', 'HD-CNN, product, memory in MB']
    assert lines.paper['HD-CNN + CE + PC, total'] == 6863 and lines.ours.tolist()[-2:] == [45.5, 1.5] and lines.verdict.iloc[-2] == "other images and networks than the paper's"
    assert of(tmp_path, 'Beyond 4').ours.gt(0).all()
    keep(tmp_path, 'trunk_cifar100_one_cycle', TRUNK[:1], profile='cpu', epochs=8, runs=2)
    assert not of(tmp_path, 'Table 13').experiment.eq('trunk_cifar100_one_cycle').any() # CNN_1 alone has nothing to stand beside


@pytest.mark.parametrize('name, rows, number, verdict', [
    ('benchmark_speed', [dict(what='44 perceptrons', side='fused', over='plain PyTorch', ratio=4.72, min=4.49, max=5.75, n=7, aim=4., reached='yes')],
     '44 perceptrons: fused against plain PyTorch', '4.49 to 5.75; aim 4 reached'),
    ('benchmark_linkage', [dict(what='tree', side='hdfast', over='scipy', ratio=19.4, min=17.8, max=20.2, n=3, aim=np.nan)], 'tree: hdfast against scipy', '17.8 to 20.2'),
    ('benchmark_loader', [dict(what='loading', threads=1, loader=w, images_per_s=9., ratio=r, **{'ratio min': r - 1, 'ratio max': r + 1}) for w, r in (('hdfast', 1.), ('fastai', 12.))],
     'loading, 1 thread(s): hdfast against fastai', '11 to 13')])
def test_speed_is_a_ratio_with_its_range(tmp_path, name, rows, number, verdict):
    keep(tmp_path, name, rows, repeats=5)
    line, = summary_lines(tmp_path).query('experiment == @name').to_dict('records')
    assert (line['number'], line['verdict'], line['ours']) == (number, verdict, rows[-1]['ratio']) and line['n'] == rows[-1].get('n', 5)


# ---- the page

def test_every_item_names_experiments_that_there_are():
    assert {n for i in ITEMS for n in i.experiments} <= EXPERIMENTS.keys() and set(BEYOND) < set(ITEMS)
    paper = {*(f'Table {i}' for i in range(1, 17)), *(f'Fig. {i}' for i in (1, 2, 3, 4, 5, '6a', '6b', '7a', '7b'))}
    assert paper <= {i.name for i in ITEMS}


def test_a_picture_says_from_which_profile_it_is(tmp_path):
    (tmp_path/'cnn_cifar100_dendrogram.svg').write_text('<svg/>')
    write_summary(tmp_path)
    assert 'dendrogram.svg' not in (tmp_path/'summary.md').read_text() # a page that hasn't ended
    keep(tmp_path, 'cnn_cifar100', [hierarchy_row('flat', 39., 1)], profile='cpu', epochs=10, runs=1, family='cnn')
    write_summary(tmp_path)
    text = (tmp_path/'summary.md').read_text()
    assert '(cnn_cifar100_dendrogram.svg)\n\nFrom cnn_cifar100, profile cpu, ○ 10 of 40 epochs, 1 of 3 runs.' in text
    assert 'cnn_cifar100_dendrogram.svg' in (tmp_path/'summary.html').read_text()


def test_the_page_explains_its_marks(tmp_path):
    write_summary(tmp_path)
    for file in ('summary.md', 'summary.html'):
        head = (tmp_path/file).read_text(encoding='utf-8')[:2000]
        assert 'A full circle (●)' in head and 'open circle (○)' in head


def test_variants_of_the_profile_that_a_result_lacks_are_named(tmp_path):
    name, wanted = 'trunk_caltech101_one_cycle', EXPERIMENTS['trunk_caltech101_one_cycle'].profiles['cpu']['variants']
    rows = [TRUNK[0], *(trunk_row(v, 'product', 44, 4) for v in wanted[:-2])]
    keep(tmp_path, name, rows, profile='cpu', epochs=24, runs=1)
    line = of(tmp_path, 'Beyond 2').query('experiment == @name').iloc[-1]
    assert line.number == f'further variants of this profile: {wanted[-2]}; {wanted[-1]}' and pd.isna(line.profile)
    keep(tmp_path, name, rows + [trunk_row(v, 'product', 44, 4) for v in wanted[-2:]], profile='cpu', epochs=24, runs=1)
    assert not of(tmp_path, 'Beyond 2').query('experiment == @name').number.str.contains('further variants').any()


def test_a_table_of_another_version_is_named(tmp_path):
    rows = [{k: v for k, v in hierarchy_row(gamma, 40, 3).items() if k != 'HC contains'} for gamma in ('flat', 'disjoint', '3')]
    keep(tmp_path, 'mlp_cifar100', rows, epochs=40, runs=3)
    with pytest.raises(ValueError, match='mlp_cifar100.csv .*HC contains'): write_summary(tmp_path)


def test_counts_keep_all_their_digits(tmp_path):
    keep(tmp_path, 'mlp_cifar100', [hierarchy_row('flat', 40, 3, parameters=2_503_352, MACs=1_234_567.6)], epochs=40, runs=3)
    write_summary(tmp_path)
    line = next(line for line in (tmp_path/'summary.csv').read_text().splitlines() if 'flat' in line and 'mlp_cifar100' in line)
    assert ',2503352,' in line and ',1234568,' in line


def test_numbers_that_are_illegible_in_the_paper_are_not_counted(tmp_path):
    for f in (repository/'figures').glob('memory*'): shutil.copy(f, tmp_path)
    line = of(tmp_path, 'Table 15').set_index('number').loc['params, layers as printed']
    printed = pd.read_csv(tmp_path/'memory_runs.csv').query('table == "Table 15"').printed_params
    assert line.ours == line.paper == (printed != 'lost').sum() < len(printed)


def test_the_paper_s_numbers_are_shown_as_it_prints_them(tmp_path):
    for f in (repository/'figures').glob('memory*'): shutil.copy(f, tmp_path)
    write_summary(tmp_path)
    text = (tmp_path/'summary.md').read_text()
    assert '| Baseline VGG-f, total | 546.05 | 546 | agrees |' in text and '| CNN_TL_1, total | 546.05 | 546.53 |' in text


def test_rows_that_stand_beside_the_paper_s_have_its_name(tmp_path):
    row = dict(clustering='learned', clusters='45', accuracy=40., sd=.1, n=1, paper=55.12)
    keep(tmp_path, 'selection_joint_caltech101', [row | dict(experts='oracle'), row | dict(experts='random', paper=np.nan), row | dict(experts='flat net', clustering=np.nan, clusters='1')], epochs=10, runs=1, family='joint')
    lines = of(tmp_path, 'Table 10').query('experiment == "selection_joint_caltech101"')
    assert lines.number.tolist() == ['learned clusters, oracle (joint model)', 'learned clusters, random', 'flat net'] and lines.clusters.tolist() == ['45', '45', '1']
