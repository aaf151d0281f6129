"The command line: what a shell sees of `hdfast`, in this process where possible, and in processes of its own for start-up and kill -9."
import json, os, shutil, signal, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from hdfast import __version__, cli, datasets, experiments, hierarchical, learners, runner
from hdfast.cli import COMMANDS, EXAMPLES, about, main
from hdfast.clustering import ClassHierarchy, cluster_into
from hdfast.datasets import synthetic
from hdfast.hierarchical import HierarchicalClassifier
from hdfast.trunk import TrunkClassifier
from hdfast.trust import CalibratedClassifier, Temperatures

MLPS = ['--flat', 'MLP_30', '--router', 'MLP_10', '--expert', 'MLP_10', '--size', 16, '--device', 'cpu', '--clusters', 3]
SHORT = [*MLPS, '--recipe', 'one_cycle', '--epochs', 8]


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    "One cache of decoded images for all of these tests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HDFAST_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.delenv('HDFAST_DEBUG', raising=False)
        yield


@pytest.fixture(scope='module')
def family(image_folder, tmp_path_factory):
    "What `hdfast decompose` makes of the folder, with overlapping clusters"
    out = tmp_path_factory.mktemp('cli')/'family'
    assert main(['decompose', image_folder, '--out', out, '--gamma', 3, *SHORT]) == 0
    return out


@pytest.fixture
def copy(family, tmp_path): return Path(shutil.copytree(family/'model', tmp_path/'model'))


def refused(capsys, *argv, status=2):
    "The one line on standard error with which a command ends"
    capsys.readouterr()
    assert main(argv) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('hdfast: '), lines
    return lines[0]


def shell(*argv, **kwargs):
    "A process of its own that runs the command"
    program = [sys.executable, '-c', 'import sys; from hdfast.cli import main; sys.exit(main())', *map(str, argv)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


# ---- help

@pytest.mark.parametrize('argv', [[], ['--help'], ['-h'], ['help']])
def test_help_names_every_command_with_an_example(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    for name in COMMANDS: assert f'\n  {name} ' in text and EXAMPLES[name] in text


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command(name, capsys):
    assert main([name, '--help']) == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert COMMANDS[name].__doc__ in text and f'Example: {EXAMPLES[name]}' in text and '--traceback' in text
    assert '--pdb' not in text


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'hdfast {__version__}\n'


def test_help_and_version_do_not_wait_for_torch():
    code = ("import sys; from hdfast.cli import main; main([]); main(['--version']); [main([c, '--help']) for c in ('reproduce', 'decompose', 'predict', 'bench')]; "
            "assert not {'torch', 'fastai', 'pandas', 'matplotlib'} & {*sys.modules}")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


def test_about():
    assert [about(s) for s in (0, 59, 60, 130, 3600, 5400.1, 86400)] == [
        'under a minute', 'under a minute', 'about 1 minute', 'about 2 minutes', 'about 1 hour', 'about 2 hours', 'about 1 day']
    assert [about(s) for s in (3540, 3599, 84000, 86399, 10*86400)] == ['about 59 minutes', 'about 1 hour', 'about 23 hours', 'about 1 day', 'about 10 days']


# ---- decompose

def test_decompose_is_the_library(family, image_folder):
    images = datasets.image_folder(image_folder, 16)
    dls = images.dataloaders(device='cpu')
    how = learners.recipe('one_cycle', epochs=8)
    same = hierarchical.decompose(dls, 3, 3., 'MLP_30', 'MLP_10', 'MLP_10', how, progress=False)
    loaded, x = HierarchicalClassifier.load(family/'model'), images.images[images.test]
    assert loaded.hierarchy == same.classifier.hierarchy == ClassHierarchy.from_json((family/'hierarchy.json').read_text())
    np.testing.assert_allclose(loaded.predict_proba(x), same.classifier.predict_proba(x), atol=1e-6) # fused in other company
    C = pd.read_csv(family/'confusion.csv', index_col='class')
    assert tuple(C.index) == tuple(C.columns) == images.classes
    np.testing.assert_allclose(C, same.confusion, atol=1e-5)
    table = same.classifier.evaluate(dls[2], same.flat)
    np.testing.assert_allclose(pd.read_csv(family/'evaluation.csv', index_col='routing').loc[table.table.index], table.table, atol=1e-5)
    np.testing.assert_allclose(pd.read_csv(family/'clusters.csv', index_col='cluster'), table.clusters, atol=1e-5)


def test_decompose_leaves_its_files_and_where_the_model_came_from(family):
    assert sorted(f.name for f in family.iterdir()) == ['clusters.csv', 'confusion.csv', 'dendrogram.png', 'dendrogram.svg',
                                                        'evaluation.csv', 'hierarchy.json', 'model', 'networks']
    made = json.loads((family/'model'/'classifier.json').read_text())['provenance']
    assert made['profile'] == 'decompose' and made['flat'] == 'MLP_30' and len(made['fingerprint']) == 16 and made['versions']['hdfast'] == __version__


def test_decompose_says_what_it_does_and_how_long_it_takes(family, image_folder, capsys):
    assert main(['decompose', image_folder, '--out', family, '--gamma', 3, *SHORT]) == 0
    out, err = capsys.readouterr()
    for step in range(1, 6): assert f'[{step}/5]' in out
    assert 'under a minute in all' in out and 'trained before' in out and 'flat net' in out and f'hdfast predict {family}' in out
    assert '\r' not in out and '█' not in out and err == ''


def test_decompose_of_a_named_set_without_clusters(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(datasets.IMAGE_SETS, 'synthetic', lambda **kwargs: datasets.synthetic(2, 1, 20, **kwargs))
    assert main(['decompose', 'synthetic', '--out', tmp_path/'out', '--flat', 'MLP_10', '--expert', 'MLP_10', '--size', 16, '--epochs', 1, '--device', 'cpu']) == 0
    assert '2 classes in 1 clusters' in capsys.readouterr().out # the square root of 2; no router is trained
    assert len(list((tmp_path/'out'/'networks').glob('*.safetensors'))) == 2
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path/'grey.png')
    assert predicted(capsys, tmp_path/'out', tmp_path/'grey.png')[0]['cluster'] == 0


def test_corrupt_files_of_a_named_set_can_be_left_out_too(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, 'image_folder', lambda *args, **kwargs: asked.append(kwargs['skip_corrupt']) or synthetic(n_per_class=10))
    for f in ('_fastai_folder', '_imagenet_folder', '_drawn_classes', '_fetched', '_folded'): monkeypatch.setattr(datasets, f, lambda *args: args[0])
    for name in (n for n in datasets.IMAGE_SETS if n != 'synthetic'): cli._images(name, None, 0, True, None)
    assert asked == [True]*6
    assert cli._images('synthetic', None, 0, True, None).n_classes == 24


def test_a_run_that_is_stopped_leaves_the_results_of_an_earlier_one_together(family, image_folder, tmp_path, monkeypatch):
    out = shutil.copytree(family, tmp_path/'family')
    before = {f.relative_to(out): f.read_bytes() for f in out.rglob('*') if f.is_file() and f.parent.name != 'networks'}
    def stopped(*args): raise KeyboardInterrupt
    monkeypatch.setattr(cli._Apart, 'fit', stopped)
    assert main(['decompose', image_folder, '--out', out, '--clusters', 2, *[a for a in SHORT if a not in ('--clusters', 3)]]) == 130
    assert {f: (out/f).read_bytes() for f in before} == before


@pytest.mark.parametrize('mode, reason', [('F', 'it has 32 bits a pixel'), ('bomb', 'exceeds limit')])
def test_predict_says_why_an_image_cannot_be_read(family, tmp_path, monkeypatch, capsys, mode, reason):
    file = tmp_path/'picture.tiff'
    Image.fromarray(np.zeros((20, 20), np.float32 if mode == 'F' else np.uint8)).save(file)
    if mode == 'bomb': monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    line = refused(capsys, 'predict', family, file)
    assert str(file) in line and reason in line


def test_a_doubt_between_clusters_that_both_hold_a_class_is_none_about_the_class():
    h = ClassHierarchy(['a', 'b', 'c'], [(0, 1, 2), (0, 2)], [0, 0, 1], np.array([[0, 1, .1, 2], [2, 3, .2, 3]]), 2, 3.)
    class Undecided:
        hierarchy = h
        def _clusters_and_classes(self, images, k): return np.array([[.6, .4]]), np.array([[.5, .3, .2]])
    (cluster, named), = cli._answers(Undecided(), [np.zeros((3, 4, 4), np.uint8)], 3)
    assert cluster == 0 and named == [('a', .5), ('b', .18), ('c', .2)] # in the order of what `evaluate` counts


def test_corrupt_files_stop_it_or_are_left_out(image_folder, tmp_path, capsys):
    folder = tmp_path/'pictures'
    for c in sorted(image_folder.iterdir())[:3]: shutil.copytree(c, folder/c.name)
    bad = folder/'amber-1'/'notes.png'
    bad.write_text('not a picture')
    argv = ['decompose', folder, '--out', tmp_path/'out', *SHORT]
    line = refused(capsys, *argv)
    assert str(bad) in line and '--skip-corrupt' in line and 'skip_corrupt' not in line
    assert not (tmp_path/'out').exists()
    assert main([*argv, '--skip-corrupt']) == 0
    out, err = capsys.readouterr()
    assert '3 classes' in out
    assert err.startswith('hdfast: left out 1 of 61 files') and len(err.splitlines()) == 1


def test_kill_and_go_on(image_folder, tmp_path, capsys):
    "kill -9 in the middle of training; the same command then needs only the networks that are missing"
    argv = ['decompose', image_folder, '--out', tmp_path/'out', *MLPS, '--epochs', 30]
    networks, start = tmp_path/'out'/'networks', time.monotonic()
    process = shell(*argv)
    while not (networks.exists() and list(networks.glob('*.safetensors'))) and process.poll() is None and time.monotonic() < start + 120:
        time.sleep(.02)
    assert process.poll() is None and networks.exists(), process.stderr.read()
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL and '[2/5]' in out and err == '' # no library's warning either
    before = {f.name: f.stat().st_mtime_ns for f in networks.glob('*.safetensors')}
    assert before and not (tmp_path/'out'/'model').exists()
    assert main(argv) == 0
    after = {f.name: f.stat().st_mtime_ns for f in networks.glob('*.safetensors')}
    assert 'trained before' in capsys.readouterr().out and len(after) > len(before)
    assert {name: after[name] for name in before} == before
    assert main([*argv[:3], tmp_path/'whole', *argv[4:]]) == 0
    one, other = (load_file(tmp_path/d/'model'/'model.safetensors') for d in ('out', 'whole'))
    assert one.keys() == other.keys()
    for k in one: np.testing.assert_array_equal(one[k], other[k])


# ---- predict

def predicted(capsys, *argv):
    capsys.readouterr()
    assert main(['predict', *argv, '--json']) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_is_load_and_predict(family, image_folder, capsys):
    files = sorted(image_folder.rglob('*.png'))
    model, x = HierarchicalClassifier.load(family/'model'), datasets.decode(files, 16)
    rows, classes = predicted(capsys, family, image_folder, '--top', 2), model.hierarchy.classes
    probs = model.cluster_proba(x) @ model.hierarchy.holds * model.predict_proba(x) # of the clusters that hold a class, and of the class
    assert [r['path'] for r in rows] == list(map(str, files))
    assert [r['class'] for r in rows] == [classes[c] for c in model.predict(x)]
    np.testing.assert_allclose([r['probability'] for r in rows], probs.max(1), atol=2e-6)
    np.testing.assert_allclose([[c['probability'] for c in r['top']] for r in rows], np.sort(probs, 1)[:, :-3:-1], atol=2e-6)
    for r in rows: assert classes.index(r['class']) in model.hierarchy.clusters[r['cluster']]


def test_predict_asks_each_network_once_for_a_batch(family, image_folder, monkeypatch):
    asked, own = [], HierarchicalClassifier._run
    def run(self, net, take, rows):
        asked.append(id(net))
        return own(self, net, take, rows)
    monkeypatch.setattr(HierarchicalClassifier, '_run', run)
    assert main(['predict', family, image_folder/'amber-1']) == 0
    assert asked and len(asked) == len(set(asked))


@pytest.mark.parametrize('terminal', [False, True])
def test_epochs_are_told_by_a_bar_or_by_five_lines(terminal, monkeypatch, capsys):
    monkeypatch.setattr(cli, '_terminal', lambda: terminal)
    report = cli._epoch_reporter(10)
    for epoch in range(10): report(epoch, 1.)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'training loss' in line]
    assert len(lines) == (0 if terminal else 5)


def test_predict_takes_the_model_too_and_files_and_folders(family, image_folder, copy, capsys):
    one, folder = sorted((image_folder/'amber-2').iterdir())[3], image_folder/'amber-1'
    rows = predicted(capsys, family, one, folder)
    assert [r['path'] for r in rows] == [str(one), *map(str, sorted(folder.iterdir()))]
    assert predicted(capsys, copy, one, folder) == rows
    all_, model = predicted(capsys, family, one, '--top', 99)[0], HierarchicalClassifier.load(family/'model')
    assert {model.hierarchy.classes.index(c['class']) for c in all_['top']} == {*model.hierarchy.clusters[all_['cluster']]} # the expert knows no others
    assert main(['predict', str(family), str(one)]) == 0
    first = rows[0]
    assert capsys.readouterr().out.startswith(f"{one}: {first['class']} {first['probability']:.1%} (cluster {first['cluster']}), ")


@pytest.mark.parametrize('trunk, clusters', [('CNN_2', ['--clusters', 3]), ('wide', []), ('slim', ['--clusters', 3])])
def test_router_and_experts_on_one_trunk(trunk, clusters, image_folder, tmp_path, capsys):
    out, settings = tmp_path/'family', ['--flat', 'MLP_30', '--trunk', trunk, '--size', 16, *clusters, '--epochs', 1, '--device', 'cpu']
    assert main(['decompose', image_folder, '--out', out, *settings]) == 0
    said = capsys.readouterr().out
    assert f'on the convolutions of {trunk}' in said and 'recipe one_cycle' in said
    assert 'epoch 1 of 1: training loss' in said.partition('[4/5]')[2] # the trunk's own epochs are told
    photo = next(p for p in sorted(Path(image_folder).rglob('*')) if p.suffix in ('.png', '.jpg'))
    assert main(['predict', out, photo, '--json']) == 0
    said, model = json.loads(capsys.readouterr().out), HierarchicalClassifier.load(out/'model')
    assert type(model) is TrunkClassifier and (clusters or model.hierarchy.max_size == 5)
    h, probs = model.hierarchy, model.predict_proba(datasets.decode([photo], 16), k=model.hierarchy.n_clusters)[0] # all experts
    assert said['class'] == h.classes[probs.argmax()] and said['probability'] == pytest.approx(probs.max(), abs=2e-6)
    assert probs.argmax() in h.clusters[said['cluster']]
    CalibratedClassifier(model, Temperatures(1., (1.,)*h.n_clusters, 1.)).save(tmp_path/'calibrated') # is asked in the same way
    assert main(['predict', tmp_path/'calibrated', photo, '--json']) == 0
    assert json.loads(capsys.readouterr().out) == said


def test_a_saved_model_of_one_form_gives_way_to_the_other(image_folder, tmp_path):
    common = ['decompose', image_folder, '--out', tmp_path/'family', '--flat', 'MLP_30', '--size', 16, '--clusters', 3, '--epochs', 1, '--device', 'cpu']
    for own, kind in ((['--router', 'MLP_10', '--expert', 'MLP_10'], HierarchicalClassifier), (['--trunk', 'CNN_2'], TrunkClassifier)):
        assert main([*common, *own]) == 0
        assert type(HierarchicalClassifier.load(tmp_path/'family'/'model')) is kind


def test_a_file_beside_the_older_model_is_named_before_anything_is_trained(family, image_folder, tmp_path, capsys):
    (old := tmp_path/'family').mkdir()
    shutil.copytree(family/'model', old/'model')
    (old/'model'/'README').write_text('mine')
    assert 'other than a saved classifier' in refused(capsys, 'decompose', image_folder, '--out', old, *SHORT)
    assert [f.name for f in old.iterdir()] == ['model'] and (old/'model'/'README').exists()


def test_predict_answers_the_readable_images(family, image_folder, tmp_path, capsys):
    good, half = next((image_folder/'amber-3').iterdir()), tmp_path/'half.png'
    half.write_bytes(good.read_bytes()[:100])
    assert main(['predict', family, half, good, tmp_path/'gone.png']) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f'{good}: ') and len(out.splitlines()) == 1
    assert err.splitlines() == [f'hdfast: {half}: no readable image', f'hdfast: {tmp_path}/gone.png: No such file or directory']
    assert main(['predict', family, half]) == 2 and capsys.readouterr().out == ''


def test_predict_passes_hidden_files(family, image_folder, tmp_path, capsys):
    (tmp_path/'x'/'.thumbs').mkdir(parents=True)
    for name in ('.hidden.png', '.thumbs/1.png', 'seen.png'): shutil.copy(next((image_folder/'amber-1').iterdir()), tmp_path/'x'/name)
    assert [r['path'] for r in predicted(capsys, family, tmp_path/'x')] == [str(tmp_path/'x'/'seen.png')]


def test_predict_passes_what_file_managers_leave(family, image_folder, tmp_path, capsys):
    (tmp_path/'x').mkdir()
    for name in ('Thumbs.db', 'desktop.ini'): (tmp_path/'x'/name).write_text('none of ours')
    shutil.copy(next((image_folder/'amber-1').iterdir()), tmp_path/'x'/'seen.png')
    assert [r['path'] for r in predicted(capsys, family, tmp_path/'x')] == [str(tmp_path/'x'/'seen.png')]


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such file names')
def test_a_name_that_cannot_be_printed_stops_nothing(family, image_folder, tmp_path):
    for name in (b'1.png', b'2_caf\xe9.png', b'3.png'): shutil.copy(next((image_folder/'amber-1').iterdir()), os.path.join(os.fsencode(tmp_path), name))
    run = shell('predict', family, tmp_path, env=os.environ | {'PYTHONIOENCODING': 'utf-8:strict'})
    out, err = run.communicate()
    assert run.returncode == 0 and len(out.splitlines()) == 3 and r'caf\udce9' in out, err


def test_a_terminal_without_our_characters_stops_nothing(image_folder, tmp_path):
    run = shell('decompose', image_folder, '--out', tmp_path/'out', *SHORT, env=os.environ | {'PYTHONIOENCODING': 'cp1252'})
    out, err = run.communicate()
    assert run.returncode == 0 and (tmp_path/'out'/'model').is_dir() and r'\u251c\u2500' in out, err


def test_a_warning_is_said_once_and_characters_that_a_font_lacks_in_one_line(capsys):
    with warnings.catch_warnings():
        cli._own_warnings()
        for text in ('few images', 'Glyph 29483 missing from font(s) DejaVu Sans.', 'few images', 'Glyph 9 missing from font(s) DejaVu Sans.'):
            warnings.showwarning(UserWarning(text), UserWarning, 'a.py', 1)
    assert capsys.readouterr().err.splitlines() == ['hdfast: few images', 'hdfast: the font of the dendrogram lacks characters of some class names']


# ---- bad input

BAD = {
    'no such command': (['decompse'], "no command 'decompse'; there are reproduce, decompose, predict"),
    'an option first': (['--out', 'x'], "no command '--out'"),
    'profile': (['reproduce', '--profile', 'fast'], "no profile 'fast'; there are smoke, cpu, paper"),
    'benchmark': (['bench', '--only', 'horses'], 'no benchmark horses; there are loader'),
    'profile of bench': (['bench', '--profile', 'fast'], 'benchmarks have the profiles smoke, cpu and paper'),
    'bench into a file': (['bench', '--out', '{file}'], 'is a file'),
    'experiment': (['reproduce', '--only', 'table_9'], 'no experiment table_9; it has mlp_synthetic'),
    'jobs': (['reproduce', '--jobs', '0'], '--jobs 0: at least one'),
    'timeout': (['reproduce', '--timeout', '0'], '--timeout 0: it is a number of minutes'),
    'device of reproduce': (['reproduce', '--device', 'abacus'], "'cpu' always works"),
    'reproduce into a file': (['reproduce', '--out', '{file}'], 'is a file'),
    'unknown option': (['reproduce', '--fast'], 'unrecognized arguments: --fast (hdfast reproduce --help'),
    'no --out': (['decompose', '{folder}'], 'required: --out'),
    'no number': (['decompose', '{folder}', '--out', '{new}', '--size', 'large'], "--size: invalid int value: 'large'"),
    'no folder': (['decompose', '{new}', '--out', '{new}'], 'neither a folder nor one of the image sets synthetic'),
    'a file for a folder': (['decompose', '{file}', '--out', '{new}'], 'neither a folder nor'),
    'an empty folder': (['decompose', '{empty}', '--out', '{new}'], 'no class folders in'),
    'a class folder': (['decompose', '{folder}/amber-1', '--out', '{new}'], 'no class folders in'),
    'one class': (['decompose', '{one}', '--out', '{new}'], 'one class only, amber-1'),
    'too few images': (['decompose', '{few}', '--out', '{new}'], 'no held-out images'),
    'out is a file': (['decompose', '{folder}', '--out', '{file}'], 'is a file'),
    'out among the images': (['decompose', '{folder}', '--out', '{folder}/out'], 'choose a folder elsewhere'),
    'out has another model': (['decompose', '{folder}', '--out', '{taken}'], 'other than a saved classifier'),
    'trunk and router': (['decompose', '{folder}', '--out', '{new}', '--trunk', 'CNN_2', '--router', 'CNN_2'], 'leave --router and --expert out'),
    'unknown trunk': (['decompose', '{folder}', '--out', '{new}', '--trunk', 'wid'], "made for sharing are wide and slim"),
    'trunk': (['decompose', '{folder}', '--out', '{new}', '--trunk', 'MLP_10'], 'at least one must stay in the trunk'),
    'network': (['decompose', '{folder}', '--out', '{new}', '--router', 'CNN_9'], "no network is called 'CNN_9'"),
    'recipe': (['decompose', '{folder}', '--out', '{new}', '--recipe', 'slow'], "no recipe 'slow'; there are paper, one_cycle"),
    'epochs': (['decompose', '{folder}', '--out', '{new}', '--epochs', '0'], 'epochs must be a whole number, at least 1'),
    'size': (['decompose', '{folder}', '--out', '{new}', '--size', '0'], '--size 0'),
    'size for the network': (['decompose', '{folder}', '--out', '{new}', '--size', '8'], 'CNN_1 needs images of at least 16'),
    'gamma': (['decompose', '{folder}', '--out', '{new}', '--gamma', '0'], '--gamma 0: it must be positive'),
    'gamma nan': (['decompose', '{folder}', '--out', '{new}', '--gamma', 'nan'], '--gamma nan: it must be positive'),
    'gamma inf': (['decompose', '{folder}', '--out', '{new}', '--gamma', 'inf'], '--gamma inf: it must be positive and finite'),
    'no clusters': (['decompose', '{folder}', '--out', '{new}', '--clusters', '0'], '--clusters 0'),
    'clusters': (['decompose', '{folder}', '--out', '{new}', '--size', '16', '--clusters', '10'], "9 classes can't make 10 clusters"),
    'seed': (['decompose', '{folder}', '--out', '{new}', '--seed', '-1'], '--seed -1'),
    'device': (['decompose', '{folder}', '--out', '{new}', '--size', '16', '--device', 'abacus'], "'cpu' always works"),
    'no image': (['predict', '{family}'], 'required: IMAGE'),
    'no model': (['predict', '{new}', '{file}'], 'no classifier.json'),
    'not a model': (['predict', '{folder}', '{file}'], 'no classifier.json'),
    'a pickle': (['predict', '{new}.pkl', '{file}'], 'run any code'),
    'top': (['predict', '{family}', '{folder}', '--top', '0'], '--top 0'),
    'nothing in the folder': (['predict', '{family}', '{empty}'], 'holds no images')}


@pytest.fixture(scope='module')
def places(family, image_folder, tmp_path_factory):
    "Folders and files to be refused"
    tmp = tmp_path_factory.mktemp('places')
    for d in ('empty', 'taken/model'): (tmp/d).mkdir(parents=True)
    for f in ('file', 'taken/model/thesis.txt'): (tmp/f).write_text('important')
    shutil.copytree(image_folder/'amber-1', tmp/'one'/'amber-1')
    for c in ('amber-1', 'amber-2'):
        (tmp/'few'/c).mkdir(parents=True)
        for f in sorted((image_folder/c).iterdir())[:2]: shutil.copy(f, tmp/'few'/c)
    return dict(folder=image_folder, family=family, new=tmp/'new') | {d: tmp/d for d in ('empty', 'taken', 'file', 'one', 'few')}


@pytest.mark.parametrize('name', BAD)
def test_bad_input(name, places, capsys):
    argv, message = BAD[name]
    line = refused(capsys, *(a.format(**places) for a in argv))
    assert message in line
    assert not (places['new']/'networks').exists() and (places['taken']/'model'/'thesis.txt').read_text() == 'important'


def test_damaged_models(copy, image_folder, capsys):
    image, weights, about = next((image_folder/'amber-1').iterdir()), copy/'model.safetensors', copy/'classifier.json'
    whole, text = weights.read_bytes(), about.read_text()
    for damage in (whole[:200], b'', b'\xff'*500):
        weights.write_bytes(damage)
        assert f'{weights} is damaged' in refused(capsys, 'predict', copy, image)
    weights.unlink()
    assert 'no model.safetensors' in refused(capsys, 'predict', copy, image)
    weights.write_bytes(whole)
    for damage in (text[:-30], '', '{"format": "hdfast.HierarchicalClassifier.1"}'):
        about.write_text(damage)
        assert f'{about} is damaged' in refused(capsys, 'predict', copy, image)
    about.write_text(text.replace('Classifier.1"', 'Classifier.9"'))
    assert "'hdfast.HierarchicalClassifier.9'" in refused(capsys, 'predict', copy, image)
    about.write_text(text)
    assert main(['predict', copy, image]) == 0


def test_a_loss_that_is_not_a_number_names_the_network(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(learners.RECIPES, 'paper', replace(learners.RECIPES['paper'], lr=1e20))
    line = refused(capsys, 'decompose', image_folder, '--out', tmp_path/'out', *MLPS)
    assert line.startswith('hdfast: the loss of the flat network became')


def test_traceback_on_request(capsys, monkeypatch):
    argv = ['reproduce', '--only', 'table_9']
    assert main([*argv, '--traceback']) == 2
    assert 'Traceback' in (err := capsys.readouterr().err) and err.splitlines()[-1].startswith('hdfast: ')
    monkeypatch.setenv('HDFAST_DEBUG', '1')
    assert main(argv) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_mistakes_of_ours_are_not_hidden(monkeypatch):
    def wrong(*args): raise RuntimeError('a mistake')
    monkeypatch.setattr(runner, 'select', wrong)
    with pytest.raises(RuntimeError, match='a mistake'): main(['reproduce'])


def test_ctrl_c(image_folder, family, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(HierarchicalClassifier, 'fit', stop)
    line = refused(capsys, 'decompose', image_folder, '--out', tmp_path/'out', *SHORT, status=130)
    assert line == 'hdfast: stopped; the same command goes on where it stopped'
    assert (tmp_path/'out'/'hierarchy.json').exists() and len(list((tmp_path/'out'/'networks').glob('*.safetensors'))) == 2
    monkeypatch.setattr(HierarchicalClassifier, 'load', stop)
    assert refused(capsys, 'predict', family, 'x.png', status=130) == 'hdfast: stopped'


def test_bad_input_in_a_shell():
    process = shell('predict', 'family')
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, '')
    assert err == 'hdfast: predict: the following arguments are required: IMAGE (hdfast predict --help explains)\n'


# ---- reproduce

@pytest.fixture
def runs(monkeypatch):
    "`reproduce` of the library replaced by a record of its arguments; set `.found` to choose what it returns"
    class Runs:
        found, called = {'mlp_synthetic': {}}, []
        def __call__(self, *args, **settings):
            self.called = self.called + [(*args, {k: v for k, v in settings.items() if k != 'say'})]
            return self.found
    runs = Runs()
    monkeypatch.setattr(runner, 'reproduce', runs)
    monkeypatch.setattr(cli, 'find_spec', lambda name: True)
    return runs


def test_reproduce_says_what_it_will_do(runs, capsys):
    assert main(['reproduce', '--only', 'mlp_synthetic']) == 0
    out = capsys.readouterr().out
    assert 'Profile smoke: 1 experiment, mlp_synthetic' in out and 'Results go to runs/smoke' in out
    assert main(['reproduce', '--only', 'cnn_cifar100', 'mlp_cifar100', '--only', 'mlp_caltech101', '--profile', 'paper', '--out', 'there',
                 '--jobs', 4, '--device', 'cpu', '--timeout', 2, '--again']) == 0
    assert '3 experiments, mlp_caltech101, mlp_cifar100, cnn_cifar100' in capsys.readouterr().out
    assert runs.called == [('smoke', ['mlp_synthetic'], Path('runs/smoke'), dict(jobs=1, device=None, timeout=None, again=False)),
        ('paper', ['cnn_cifar100', 'mlp_cifar100', 'mlp_caltech101'], Path('there'), dict(jobs=4, device='cpu', timeout=120, again=True))]


def test_reproduce_fails_with_1(runs):
    runs.found = {'mlp_synthetic': {}, 'cnn_synthetic': RuntimeError('no')}
    assert main(['reproduce']) == 1


def test_absent_images_are_a_failure_only_if_asked_for_by_name(runs):
    runs.found = {'mlp_synthetic': {}, 'cnn_imagenet100': runner.NotRunHere('no images')}
    assert main(['reproduce', '--profile', 'paper']) == 0
    assert main(['reproduce', '--profile', 'paper', '--only', 'cnn_imagenet100']) == 1


def test_reproduce_needs_papermill(runs, monkeypatch, capsys):
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    assert "pip install 'hdfast[reproduce]'" in refused(capsys, 'reproduce')
    assert runs.called == []


def test_list(runs, tmp_path, capsys):
    for name, parameters in (('mlp_caltech101', dict(runs=2)), ('memory', {})):
        (tmp_path/f'{name}.json').write_text(json.dumps(dict(parameters=parameters, provenance=dict(profile='cpu'))))
    for name, text in dict(mlp_cifar100='{', audit='{}').items(): (tmp_path/f'{name}.json').write_text(text)
    assert main(['reproduce', '--list', '--out', tmp_path]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ['name', 'regenerates', 'profiles', 'result'] and [r[0] for r in rows[1:]] == list(experiments.EXPERIMENTS)
    assert ['mlp_caltech101', 'Table', '3', 'cpu,', 'paper', 'cpu,', '2', 'runs'] in rows and ['mlp_caltech256', 'Table', '5', 'cpu,', 'paper', '-'] in rows
    assert [r[-1] for r in rows if r[0] in ('memory', 'mlp_cifar100', 'audit')] == ['unreadable', 'cpu', 'unreadable']
    assert runs.called == []


# ---- bench

def ratio(what, ratio, **more): return dict(what=what, side='ours', over='theirs', ratio=ratio, min=ratio/2, max=2*ratio, n=3, aim=None) | more


@pytest.fixture
def timed(monkeypatch):
    "The runner replaced by one that gives these results; `.tasks` are the names of what it was asked to run, and whether again"
    class Timed:
        found, tasks = {}, []
        def __call__(self, runner_, tasks):
            self.tasks = self.tasks + [(t.name, t.parameters['profile'], runner_.again, runner_.jobs) for t in tasks]
            return {t.name: self.found[t.name] for t in tasks}
    timed = Timed()
    monkeypatch.setattr(runner.Runner, 'run_all', lambda self, tasks: timed(self, tasks))
    timed.found = {n: dict(ratios=[ratio(n, 2.)]) for n in experiments.EXPERIMENTS if n.startswith('benchmark_')}
    return timed


def test_bench_runs_every_benchmark_anew_and_gathers_the_ratios(timed, tmp_path, capsys):
    timed.found['benchmark_speed'] = dict(ratios=[ratio('perceptrons', 21.26, aim=20.), ratio('images', 1234.)])
    assert main(['bench', '--out', tmp_path/'b']) == 0
    assert timed.tasks == [(n, 'cpu', True, 1) for n in timed.found]
    out, table = capsys.readouterr().out, pd.read_csv(tmp_path/'b'/'bench.csv')
    assert list(table.columns) == ['benchmark', 'what', 'side', 'over', 'ratio', 'min', 'max', 'n', 'aim']
    assert set(table.benchmark) == {n.removeprefix('benchmark_') for n in timed.found} and len(table) == len(timed.found) + 1
    row, = (line.split() for line in out.splitlines() if ' perceptrons ' in line)
    assert row == ['speed', 'perceptrons', 'ours', 'theirs', '21.3', '10.6', '42.5', '3', '20'] and '1,234' in out


def test_bench_takes_short_and_long_names_and_a_profile(timed, tmp_path):
    assert main(['bench', '--only', 'loader', 'benchmark_speed', '--profile', 'paper', '--out', tmp_path]) == 0
    assert sorted(timed.tasks) == [('benchmark_loader', 'paper', True, 1), ('benchmark_speed', 'paper', True, 1)]


def test_a_benchmark_that_fails_leaves_the_others_in_the_table(timed, tmp_path, capsys):
    timed.found['benchmark_loader'] = RuntimeError('no')
    assert main(['bench', '--only', 'loader', 'speed', '--out', tmp_path]) == 1
    assert list(pd.read_csv(tmp_path/'bench.csv').benchmark) == ['speed']


def test_the_confusion_that_was_written_is_one(family):
    C = pd.read_csv(family/'confusion.csv', index_col=0)
    assert cluster_into(C.values, 3, classes=C.columns).n_classes == len(C)


@pytest.mark.parametrize('args,what', [(['decompose', '', '--out', 'x'], 'FOLDER'), (['decompose', 'synthetic', '--out', ''], '--out'), (['predict', ''], 'FOLDER'), (['predict', 'x', ''], 'IMAGES')])
def test_an_empty_path_is_not_the_current_folder(capsys, tmp_path, monkeypatch, args, what):
    monkeypatch.chdir(tmp_path)
    assert main(args if args[0] == 'predict' and len(args) > 2 else [*args, *(['a.png'] if args[0] == 'predict' else [])]) == 2
    assert f'{what} is empty; for the current folder write .' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_files_in_linked_folders_are_found_once_even_if_a_link_leads_back(tmp_path):
    from hdfast.cli import _files
    (tmp_path/'elsewhere'/'deep').mkdir(parents=True)
    (tmp_path/'mix'/'.hidden').mkdir(parents=True)
    for f in ('elsewhere/deep/a.png', 'mix/b.png', 'mix/.hidden/c.png'): (tmp_path/f).touch()
    (tmp_path/'mix'/'cat').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'elsewhere'/'back').symlink_to(tmp_path/'mix')
    (tmp_path/'mix'/'dog').symlink_to(tmp_path/'elsewhere')
    assert [*_files([tmp_path/'mix'])] == [tmp_path/'mix'/'b.png', tmp_path/'mix'/'cat'/'deep'/'a.png']


@pytest.mark.parametrize('text,said', [('Unable to allocate 306 TiB', 'Unable to allocate 306 TiB'), ('', 'out of memory')])
def test_too_little_memory_is_one_line(capsys, monkeypatch, text, said):
    def full(*args, **kwargs): raise MemoryError(text)
    monkeypatch.setattr(datasets, 'image_set', full)
    assert main(['decompose', 'synthetic', '--out', 'x']) == 2 and capsys.readouterr().err == f'hdfast: {said}\n'


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    from hdfast.cli import _files
    (tmp_path/'lost').mkdir()
    (tmp_path/'a.png').touch()
    listed = Path.iterdir
    def iterdir(self):
        if self.name == 'lost': raise PermissionError(13, 'Permission denied')
        return listed(self)
    monkeypatch.setattr(Path, 'iterdir', iterdir)
    assert [*_files([tmp_path])] == [tmp_path/'a.png']
