"The runner: broken pages end in named failures, what needs them is blocked, the rest goes on, and the same command resumes."
import json, multiprocessing, os, random, shutil, signal, subprocess, sys, threading, time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

papermill = pytest.importorskip('papermill')
psutil = pytest.importorskip('psutil')

from hdfast import runner
from hdfast.experiments import EXPERIMENTS, Experiment, by_gamma
from hdfast.runner import NotRunHere, PageFailure, Runner, Task, check_page, page_version, page_parameters, reproduce, select, tasks_of

PAGES = runner.pages_folder
PARAMETERS = "name = 'page'\nsteps = 3\nruns = 1\nfirst = 0\nnetworks = ''\nprofile = 'smoke'\nout = '.'"
SAVE = """import json, pathlib
out = pathlib.Path(out)
(out/f'{name}.csv').write_text(f'steps,first\\n{steps},{first}\\n')
(out/f'{name}.json').write_text(json.dumps(dict(name=name, parameters=dict(steps=steps), provenance=dict(profile=profile))))"""


def write_page(file, *cells, parameters=PARAMETERS, tags=('parameters',)):
    "A notebook with a parameters cell and `cells`"
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={'tags': list(tags)}), *map(nbformat.v4.new_code_cell, cells)]
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, file)


@pytest.fixture
def pages(tmp_path, monkeypatch):
    "A folder of pages in place of the repository's; call it to add a page and its experiment"
    folder = tmp_path/'experiments'
    folder.mkdir()
    (folder/'paper.json').write_text('{}')
    monkeypatch.setattr(runner, 'pages_folder', folder)
    monkeypatch.setattr(runner, 'EXPERIMENTS', {})
    monkeypatch.setattr(runner, 'repository', tmp_path)
    def add(name, *cells, needs=(), alone=False, parameters=None, **given):
        write_page(folder/f'{name}.ipynb', *cells, **given)
        e = Experiment(name, '', f'{name}.ipynb', dict(name=name) | (parameters or {}), {'smoke': {}}, tuple(needs), alone)
        runner.EXPERIMENTS[name] = e
        return e
    return add


@pytest.fixture
def lines(): return []


@pytest.fixture
def run(tmp_path, lines):
    "Run all pages there are"
    return lambda **settings: reproduce('smoke', None, tmp_path/'out', device='cpu', say=lines.append, **settings)


def why(found, name):
    assert isinstance(found[name], PageFailure), found[name]
    return str(found[name])


# ---- before a kernel starts

@pytest.mark.parametrize('given, message', [
    (dict(tags=()), "0 cells tagged 'parameters'"),
    (dict(parameters=PARAMETERS + '\nimport os'), 'may hold nothing but lines such as'),
    (dict(parameters=PARAMETERS.replace('steps = 3', 'steps = 1 + x')), 'may hold nothing but lines such as'),
    (dict(parameters="name = 'page'\nout = ''"), 'has no parameter profile'),
    (dict(parameters=PARAMETERS.replace("out = '.'", 'out = 1')), 'is of another kind')])
def test_a_page_with_unfit_parameters_is_refused(pages, run, monkeypatch, given, message):
    pages('good', SAVE)
    nb = pages('page', SAVE)
    write_page(runner.pages_folder/nb.page, SAVE, **given)
    monkeypatch.setattr(runner, 'PageProcess', None) # nothing may start
    with pytest.raises(ValueError, match=message): run()


PAPERMILL = Path(papermill.__file__).parent/'tests'/'notebooks'

def of_papermill(name):
    "One of the notebooks that papermill is tested with"
    if not (file := PAPERMILL/f'{name}.ipynb').exists(): pytest.skip(f"the installed papermill lacks {file.name} of its tests")
    return file


NO_CELL, NOT_PLAIN, OTHERS = "has 0 cells tagged 'parameters'", 'may hold nothing but lines such as', 'has no parameter name, out, profile'

@pytest.mark.parametrize('name, message', [*((n, NO_CELL) for n in (
    'binder blank-vscode broken broken1 broken2 keyboard_interrupt line_magic_error no_parameters read_check sysexit sysexit0 sysexit1 systemexit '
    'test_autosave test_logging test_notebooknode_io').split()), ('complex_parameters', NOT_PLAIN),
    *((n, OTHERS) for n in 'nb_version_4.4 notimplemented_translator report_mode_test result_no_exec simple_execute'.split())])
def test_papermills_own_notebooks_are_refused_as_they_are(pages, run, monkeypatch, name, message):
    pages('good', SAVE)
    shutil.copy(of_papermill(name), runner.pages_folder/pages('page', SAVE).page)
    monkeypatch.setattr(runner, 'PageProcess', None) # nothing may start
    with pytest.raises(ValueError, match=f'page.ipynb {message}'): run()


def test_two_parameters_cells_are_refused(tmp_path):
    write_page(tmp_path/'page.ipynb', SAVE)
    nb = nbformat.read(tmp_path/'page.ipynb', 4)
    nb.cells[1].metadata.tags = ['parameters']
    nbformat.write(nb, tmp_path/'page.ipynb')
    with pytest.raises(ValueError, match='2 cells tagged'): page_parameters(tmp_path/'page.ipynb')


@pytest.mark.parametrize('given, message', [({'step': 1}, 'no parameter step; it has first, gammas, name, names'), ({'steps': '3'}, "steps = '3' is of another kind"),
    ({'steps': True}, 'another kind'), ({'steps': 3.5}, 'another kind'), ({'name': ['page']}, 'another kind'), ({'gammas': ['3']}, "gammas = ['3'] is of another kind"),
    ({'gammas': [3, True]}, 'another kind'), ({'names': ['a', 1]}, 'another kind'), ({'gammas': 3}, 'another kind')])
def test_unknown_and_mistyped_parameters(tmp_path, given, message):
    write_page(tmp_path/'page.ipynb', SAVE, parameters=PARAMETERS + "\ngammas = [0, 3]\nnames = ['a']")
    check_page(tmp_path/'page.ipynb', dict(gammas=[2.5, 3], names=['b', 'c'], steps=4))
    with pytest.raises(ValueError, match=message.replace('[', r'\[')): check_page(tmp_path/'page.ipynb', given)


def test_every_experiment_of_the_registry_can_be_planned(tmp_path):
    for profile in runner.PROFILES:
        for e in select(profile):
            assert all(n in EXPERIMENTS and profile in EXPERIMENTS[n].profiles for n in e.needs)
            assert tasks_of(e, profile, tmp_path, jobs=4)[-1].name == e.name


@pytest.mark.parametrize('profile, only, names', [
    ('cpu', ['Table 8'], ['cnn_cifar100', 'cnn_cifar100_overlap']), ('smoke', ['table 1', 'audit'], ['architectures', 'audit']),
    ('cpu', ['Table 10'], ['selection_cnn_caltech101', 'selection_joint_cifar100', 'selection_joint_caltech101', 'pretrain_cifar100', 'transfer_caltech101']),
    ('paper', ['Fig. 7b', 'cnn_imagenet100'], ['cnn_imagenet100', 'cnn_imagenet200'])])
def test_tables_and_figures_stand_for_their_experiments(profile, only, names):
    assert [e.name for e in select(profile, only)] == names


def test_every_table_and_figure_of_the_paper_can_be_asked_for():
    for name in [*(f'Table {i}' for i in range(1, 17)), *(f'Fig. {i}' for i in (1, 2, 3, 4, 5, '6a', '6b', '7a', '7b'))]: assert select('paper', [name])


@pytest.mark.parametrize('wrong', ['Table 11', 'Table 17', 'Fig. 7'])
def test_what_a_profile_lacks_is_named(wrong):
    with pytest.raises(ValueError, match=f"profile cpu has no experiment {wrong}; it has .*; 'Table 8' stands for"): select('cpu', ['Table 4', wrong])


# ---- failures

@pytest.mark.parametrize('counts, why', [
    ([1, 2, 3], None), ([None, 2, 3], None), ([1, None, 3], None),                          # a message got lost; the kernel has counted the cell
    ([1, 2, None], 'code cell 3 did not run'), ([None, None, None], 'code cell 1 did not run'),
    ([1, None, 2], 'code cell 2 did not run'), ([None, 1, 2], 'code cell 1 did not run')])  # the kernel's count leaves one out
def test_a_cell_has_run_if_it_or_a_later_one_was_counted(tmp_path, counts, why):
    cells = [nbformat.v4.new_code_cell('x = 1', execution_count=n, metadata=dict(papermill=dict(status='completed'))) for n in counts]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'copy.ipynb')
    assert runner._cell_error(tmp_path/'copy.ipynb') == why


FAULTS = {
    'exception': ("raise ValueError('no such luck')", 'code cell 2 failed: ValueError: no such luck'),
    'exit_0': ('import sys; sys.exit(0)', 'code cell 2 ended the page early by sys.exit(0)'),
    'exit_1': ('import sys; sys.exit(1)', 'code cell 2 ended the page early by sys.exit(1)'),
    'exit': ('raise SystemExit', 'code cell 2 ended the page early by sys.exit(0)'),
    'ctrl_c': ('raise KeyboardInterrupt', 'code cell 2 failed: KeyboardInterrupt'),
    'dead_kernel': ('import os; os._exit(3)', 'its kernel died'),
    'killed_kernel': ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'its kernel died'),
    'full_disk': ("import errno; raise OSError(errno.ENOSPC, 'No space left on device')", 'No space left on device'),
    'no_result': ('1', 'the page ended without writing no_result.json')}


@pytest.fixture(scope='module')
def faults(tmp_path_factory):
    "What one run of all faulty pages found, and its folder"
    tmp = tmp_path_factory.mktemp('faults')
    (tmp/'paper.json').write_text('{}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, 'pages_folder', tmp)
        patch.setattr(runner, 'EXPERIMENTS', {n: Experiment(n, '', f'{n}.ipynb', dict(name=n), {'smoke': {}}) for n in FAULTS})
        for name, (fault, _) in FAULTS.items(): write_page(tmp/f'{name}.ipynb', fault, *[SAVE][:name != 'no_result'])
        yield reproduce('smoke', None, tmp/'out', device='cpu', say=str, jobs=2), tmp/'out'


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_has_a_name(faults, name):
    found, out = faults
    text = why(found, name)
    assert FAULTS[name][1] in text and (out/'pages'/f'.{name}.part.ipynb').exists() and f'.{name}.part.ipynb' in text


@pytest.mark.parametrize('bad, starts', [(2, 3), (9, 3)])
def test_a_kernel_that_ends_before_the_first_cell_is_started_anew(pages, run, tmp_path, monkeypatch, bad, starts):
    pages('page', SAVE)
    count, spec, own = tmp_path/'count', tmp_path/'jupyter'/'kernels'/'python3'/'kernel.json', tmp_path/'kernel.py'
    own.write_text(f"""import os, sys
with open({str(count)!r}, 'a') as f: f.write('x')
if os.stat({str(count)!r}).st_size <= {bad}: sys.exit('Address already in use')
os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])""")
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(dict(argv=[sys.executable, str(own), '-f', '{connection_file}'], display_name='', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'jupyter'))
    found = run()
    assert count.stat().st_size == starts
    if bad < starts: assert found['page']['name'] == 'page'
    else: assert 'its kernel ended before the first cell' in why(found, 'page')


def test_all_faulty_pages_were_tried(faults): assert list(faults[0]) == list(FAULTS)


PAPERMILLS = {
    'keyboard_interrupt': 'code cell 2 failed: KeyboardInterrupt',
    'broken': 'code cell 2 failed: SyntaxError: Missing parentheses', 'broken1': 'code cell 3 failed: AssertionError', 'broken2': 'code cell 3 failed: ',
    'line_magic_error': 'code cell 2 failed: UsageError', 'read_check': 'code cell 3 failed: AssertionError', 'test_logging': "code cell 4 failed: ModuleNotFoundError: No module named 'ggplot'",
    'sysexit': 'code cell 3 ended the page early by sys.exit(0)', 'sysexit0': 'code cell 3 ended the page early by sys.exit(0)',
    'sysexit1': 'code cell 3 ended the page early by sys.exit(1)', 'systemexit': 'code cell 3 ended the page early by sys.exit(0)'}


def fitted(notebook, file):
    "Give a notebook a parameters cell in front and, at its end, the code that saves"
    nb = nbformat.v4.upgrade(nbformat.read(notebook, 4))
    nb.cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={'tags': ['parameters']}), *nb.cells, nbformat.v4.new_code_cell(SAVE)]
    nbformat.write(nb, file)


def interrupt(copy):
    "Send the kernel of a page Ctrl-C until it ends, from the time that its second cell runs"
    def second():
        with suppress(OSError, ValueError): return json.loads(copy.read_text())['cells'][2]['metadata']['papermill']['status'] # behind the parameters and those put in
    def kernel():
        with suppress(psutil.Error):
            mill, = (p for p in psutil.Process().children() if str(copy) in p.cmdline())
            return mill.children()
    if wait_for(lambda: second() == 'running'):
        while kernels := kernel():
            with suppress(psutil.Error): kernels[0].send_signal(signal.SIGINT)
            time.sleep(.5)


@pytest.fixture(scope='module')
def papermills(tmp_path_factory):
    "What one run of papermill's broken notebooks found, each with a page that needs it, and of one that isn't broken, also with such a page"
    tmp = tmp_path_factory.mktemp('papermills')
    there = [n for n in (*PAPERMILLS, 'no_parameters') if (PAPERMILL/f'{n}.ipynb').exists()]
    (tmp/'paper.json').write_text('{}')
    experiments = {}
    for name in there:
        fitted(PAPERMILL/f'{name}.ipynb', tmp/f'{name}.ipynb')
        write_page(tmp/f'after_{name}.ipynb', SAVE)
        for n, needs in ((name, ()), (f'after_{name}', (name,))): experiments[n] = Experiment(n, '', f'{n}.ipynb', dict(name=n), {'smoke': {}}, needs)
    watcher = threading.Thread(target=interrupt, args=[tmp/'out'/'pages'/'.keyboard_interrupt.part.ipynb'], daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, 'pages_folder', tmp)
        patch.setattr(runner, 'EXPERIMENTS', experiments)
        watcher.start()
        return reproduce('smoke', None, tmp/'out', device='cpu', say=str, jobs=2)


@pytest.mark.slow
@pytest.mark.parametrize('name', PAPERMILLS)
def test_papermills_broken_notebooks_have_named_failures(papermills, name):
    of_papermill(name)
    text = why(papermills, name)
    assert text.startswith(PAPERMILLS[name]) and f'.{name}.part.ipynb' in text
    assert why(papermills, f'after_{name}') == f'blocked: it needs {name}'


@pytest.mark.slow
def test_the_one_of_papermills_notebooks_that_is_whole_goes_on(papermills):
    of_papermill('no_parameters')
    assert papermills['no_parameters']['name'] == 'no_parameters' and papermills['after_no_parameters']['name'] == 'after_no_parameters'


RESULTS = {
    'early': (SAVE + "\nimport time; time.sleep(.05); (out/'early_figure.svg').write_text('')", 'early_figure.svg was written after early.json'),
    'half': (SAVE + "\n(out/'half.json').write_text('{')", 'half.json or its table cannot be read'),
    'no_table': (SAVE + "\n(out/'no_table.csv').unlink()", 'no_table.json or its table cannot be read'),
    'empty': (SAVE.replace("\\n{steps},{first}", ''), 'the table of empty.json is empty'),
    'bare': (SAVE.replace(', provenance=dict(profile=profile)', ''), 'bare.json lacks provenance'),
    'other': (SAVE.replace('dict(steps=steps)', 'dict(steps=4)'), 'other.json was made with steps = 4, not 2')}


@pytest.mark.parametrize('name', RESULTS)
def test_a_result_must_hold(tmp_path, name):
    cell, message = RESULTS[name]
    parameters = dict(name=name, steps=2, first=0, profile='smoke', out=str(tmp_path))
    exec(SAVE, dict(parameters))
    before = runner._stamp(tmp_path/f'{name}.json')
    exec(cell, dict(parameters))
    with pytest.raises(PageFailure, match=message): runner._check_result(Task(name, None, parameters), before)


def test_a_result_that_holds(tmp_path, monkeypatch):
    parameters = dict(name='page', steps=2, first=0, profile='smoke', out=str(tmp_path))
    (tmp_path/'page_figure.svg').write_text('')
    exec(SAVE, dict(parameters))
    monkeypatch.setattr(runner, 'EXPERIMENTS', {'page_two': None})
    time.sleep(.02)
    (tmp_path/'page_two.json').write_text('') # another experiment's
    assert runner._check_result(Task('page', None, parameters), None)['parameters'] == {'steps': 2}


def test_an_old_result_is_no_result(pages, run, tmp_path):
    e = pages('page', SAVE)
    assert run()['page']['name'] == 'page'
    write_page(runner.pages_folder/e.page, 'import sys; sys.exit(0)')
    assert 'sys.exit(0)' in why(run(), 'page')
    write_page(runner.pages_folder/e.page, '1')
    assert 'without writing' in why(run(), 'page')


def test_a_page_that_takes_too_long_is_stopped_with_all_it_started(pages, run, tmp_path):
    pages('slow', f"import subprocess, time; p = subprocess.Popen(['sleep', '300']); open('{tmp_path}/pid', 'w').write(str(p.pid)); time.sleep(300)")
    assert 'not done after 6 s' in why(run(timeout=6), 'slow')
    assert not psutil.pid_exists(int((tmp_path/'pid').read_text()))


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() or not Path('/proc/mounts').exists(), reason='a full disk is made by mounting a tmpfs, as root on Linux')
def test_a_full_disk(pages, run, tmp_path):
    (tmp_path/'out').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', tmp_path/'out'], capture_output=True).returncode: pytest.skip('mount is not allowed here')
    try:
        pages('page', "open(f'{out}/big.bin', 'wb').write(bytes(2**20))", SAVE)
        assert 'no space left on' in str(run()['page']).lower()
    finally: subprocess.run(['umount', '-l', tmp_path/'out'], check=True)


def test_a_disk_that_is_full_for_the_runner_itself(pages, run, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    pages('page', SAVE)
    monkeypatch.setattr(runner, 'write_aside', full)
    assert 'No space left on device' in str(run()['page'])


def test_what_needs_a_failure_is_blocked_and_the_rest_goes_on(pages, run, lines):
    pages('bad', 'raise ValueError')
    pages('child', SAVE, needs=['bad'])
    pages('grandchild', SAVE, needs=['child'])
    pages('good', SAVE)
    pages('after', SAVE, needs=['good'])
    found = run(jobs=2)
    assert 'blocked: it needs bad' in why(found, 'child') and 'blocked: it needs child' in why(found, 'grandchild')
    assert found['good']['name'] == 'good' and found['after']['name'] == 'after'
    write_page(runner.pages_folder/'bad.ipynb', SAVE)
    lines.clear()
    assert all(isinstance(o, dict) for o in run(jobs=2).values())
    assert len([line for line in lines if 'finished before' in line]) == 2 # the same command runs what is missing


def test_absent_images_are_no_failure(pages, run, lines, capsys):
    pages('absent', "from hdfast.datasets import image_set", "image_set('imagenet', path='nowhere')")
    pages('child', SAVE, needs=['absent'])
    pages('bad', 'raise FileNotFoundError')
    pages('both', SAVE, needs=['absent', 'bad'])
    pages('good', SAVE)
    found = run(jobs=2)
    assert {n: type(o) for n, o in found.items()} == dict(absent=NotRunHere, child=NotRunHere, bad=PageFailure, both=PageFailure, good=dict)
    assert why(found, 'absent').startswith('not run here: images absent: nothing in nowhere: ImageNet has to be downloaded by hand')
    assert why(found, 'child') == why(found, 'absent') and why(found, 'both') == 'blocked: it needs absent, bad'
    assert 'absent: not run here: images absent: nothing in' in '\n'.join(lines)
    printed = capsys.readouterr().out
    assert '2 of 5 experiments not run here, for lack of images: absent, child; once' in printed and '2 of 5 failed: bad, both;' in printed


# ---- what is finished, and who waits

def test_finished_pages_are_not_run_again(pages, run, tmp_path, lines):
    e = pages('page', SAVE + "\nprint('at work')")
    work = lambda: [line.strip() for line in lines].count('at work')
    run(); run()
    assert work() == 1 and any('finished before' in line for line in lines)
    run(again=True)
    assert work() == 2
    write_page(runner.pages_folder/e.page, SAVE + "\nprint('at work') # changed")
    run()
    assert work() == 3
    for i, (file, text) in enumerate({'page.json': '{}', 'page.csv': 'number'}.items(), 4):
        (tmp_path/'out'/file).write_text(text) # not what the page wrote
        run()
        assert work() == i
    (tmp_path/'out'/'page.csv').unlink()
    run()
    assert work() == 6
    (tmp_path/'out'/'page_notes.txt').write_text('') # somebody else's
    (tmp_path/'out'/'page_old').mkdir()
    run()
    assert work() == 6
    receipt = tmp_path/'out'/'pages'/'page.json'
    for text in ('{}', '[]', '{"written": 3}', json.dumps(json.loads(receipt.read_text()) | dict(written={'page.gone': ''}))):
        receipt.write_text(text) # no receipt
        assert not runner.finished(tasks_of(runner.EXPERIMENTS['page'], 'smoke', tmp_path/'out')[-1], tmp_path/'out', 'cpu')


def test_a_page_whose_code_is_edited_while_it_runs_is_not_finished(pages, run, tmp_path, lines):
    page = tmp_path/'experiments'/'page.ipynb'
    edit = f"import pathlib; p = pathlib.Path({str(page)!r}); once = p.read_text(); p.write_text(once.replace('# as it was', '# edited'))\nprint('at work') # as it was"
    pages('page', SAVE, edit)
    found = run()
    assert isinstance(found['page'], dict) and any('edited while it ran' in line for line in lines)
    run(); run()
    assert [line.strip() for line in lines].count('at work') == 2


@pytest.mark.parametrize('folder', ['{name}', '}{', 'a {steps} b', 'o😀'])
def test_any_folder_takes_results(pages, tmp_path, folder):
    pages('page', SAVE, "assert rate == 1e-5 and type(rate) is float", parameters=dict(rate=1e-5))
    write_page(runner.pages_folder/'page.ipynb', SAVE, "assert rate == 1e-5 and type(rate) is float", parameters=PARAMETERS + '\nrate = .5')
    found = reproduce('smoke', None, tmp_path/folder, device='cpu', say=print)
    assert found['page']['name'] == 'page' and (tmp_path/folder/'pages'/'page.ipynb').exists()


def test_pages_that_run_alone_have_all_cores_and_their_whole_time(tmp_path, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    r, page = Runner(tmp_path, jobs=2, device='cpu'), Path('page.ipynb')
    alone, shared = (Task(name, page, dict(profile='smoke'), alone=name == 'alone') for name in ('alone', 'shared'))
    assert 'OMP_NUM_THREADS' in r.environment(shared) and 'OMP_NUM_THREADS' not in r.environment(alone)
    tasks = [replace(t, name=f'{t.name}{i}') for t in (alone, shared) for i in range(4)]
    monkeypatch.setattr(Runner, 'timings', lambda self: {self.key(t): 3600 for t in tasks})
    assert r.forecast(tasks[:4]) == 'about 4:00:00 left' and r.forecast(tasks[4:]) == 'about 2:00:00 left'
    said = []
    r.say = said.append
    r.tell(tasks[0], {tasks[0].name: {}}, 8, tasks[:1]) # the other seven were finished before
    assert said[0].endswith('; nothing left')


def test_a_page_runs_again_after_one_that_it_builds_on(pages, run, lines):
    source = pages('source', SAVE)
    pages('page', SAVE + "\nprint('at work')", needs=['source'])
    work = lambda: [line.strip() for line in lines].count('at work')
    run(); run()
    assert work() == 1
    write_page(runner.pages_folder/source.page, SAVE.replace('name=name, ', 'name=name, made=2, ')) # another result
    run(); run()
    assert work() == 2


@pytest.mark.parametrize('jobs', [1, 2])
def test_when_nobody_reads_what_is_said_pages_end(pages, run, monkeypatch, jobs):
    def gone(line): raise BrokenPipeError(line)
    pages('brief', SAVE)
    if jobs == 2: pages('lengthy', 'import time; time.sleep(300)', SAVE)
    start = time.time()
    with pytest.raises(BrokenPipeError): reproduce('smoke', None, runner.pages_folder.parent/'out', device='cpu', say=gone, jobs=jobs)
    assert time.time() - start < 100


def test_page_version_follows_imports(pages):
    e = pages('page', 'from hdfast.linkage import average_linkage')
    before = page_version(page := runner.pages_folder/e.page)
    write_page(page, 'from hdfast.hierarchical import HierarchicalClassifier')
    assert page_version(page) != before
    write_page(page, 'from hdfast.linkage import average_linkage')
    assert page_version(page) == before
    assert runner._imported('from hdfast.linkage import a\nfrom .datasets import b\nfrom .. import c\nfrom torch import nn') == {'linkage', 'datasets'}


def test_runs_are_split_and_put_together(pages, run, tmp_path, lines):
    cell = "import pathlib\np = pathlib.Path(networks or out + '/networks'); p.mkdir(exist_ok=True)\n" \
           "for i in range(first, first + runs): print('trained' if not (p/str(i)).exists() else 'found', i); (p/str(i)).write_text('')"
    pages('page', cell, SAVE, parameters=dict(runs=3))
    assert run(jobs=3)['page']['name'] == 'page'
    assert sorted(line for line in lines if '|' in line) == ['page | found 0', 'page | found 1', 'page | found 2',
                                                             'page.1 | trained 0', 'page.2 | trained 1', 'page.3 | trained 2']
    assert sorted(f.name for f in (tmp_path/'out').glob('page.*')) == ['page.csv', 'page.json']
    lines.clear()
    run(jobs=3)
    assert not [line for line in lines if '|' in line]


def test_a_part_that_fails_blocks_the_whole(pages, run):
    pages('page', "assert first != 1", SAVE, parameters=dict(runs=2))
    assert 'blocked: it needs page.2' in why(run(jobs=2), 'page')


def test_overlap_factors_are_split_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'pages_folder', PAGES)
    e = EXPERIMENTS['mlp_cifar100']
    *parts, whole = tasks_of(e, 'paper', tmp_path, jobs=2)
    assert [t.parameters['gammas'] for t in parts] == [[0], [3], [5]]*3 and [t.parameters['first'] for t in parts] == [0]*3 + [1]*3 + [2]*3
    assert all(t.parameters['runs'] == 1 and t.parameters['name'] == t.name and t.parameters['networks'] == str(tmp_path/'networks') for t in parts)
    assert [t.needs for t in parts[3:6]] == [(), ('mlp_cifar100.2.1',), ('mlp_cifar100.2.1',)] # the first trains what they share
    assert whole.needs == tuple(t.name for t in parts) and whole.parameters['gammas'] == [0, 3, 5] and whole.parameters['runs'] == 3
    assert len(tasks_of(e, 'paper', tmp_path, jobs=1)) == len(tasks_of(EXPERIMENTS['cnn_cifar100'], 'cpu', tmp_path, jobs=2)) == 1


def test_a_part_takes_as_long_as_the_same_part_of_other_runs(tmp_path, monkeypatch):
    r = Runner(tmp_path, jobs=1, device='cpu')
    task = lambda name: Task(name, Path('page.ipynb'), dict(profile='cpu'))
    known = {'page.1.1': 100, 'page.1.2': 10, 'page.2.1': 140, 'page.3': 7, 'page.10': 9, 'other.1.1': 5}
    monkeypatch.setattr(Runner, 'timings', lambda self: {self.key(task(name)): s for name, s in known.items()})
    expected = lambda name: r.expected(task(name), r.timings())
    assert expected('page.1.1') == 100 and expected('page.3.1') == 120 and expected('page.2.2') == 10 and expected('page.4') == 8
    assert expected('page') is expected('page.1.3') is expected('another.1.1') is None
    assert r.forecast([task('page.3.1'), task('page.3.2')]) == 'about 02:10 left'
    assert r.forecast([task('page.3.1'), task('page')]) == 'about 02:00 left, without 1 page(s) never timed here'


def test_what_most_time_hangs_on_starts_first(pages, run, tmp_path, lines):
    for name, needs in dict(brief=(), lengthy=(), key=(), door=['key']).items(): pages(name, SAVE, needs=needs)
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'timings.json').write_text(json.dumps({f'smoke, {runner.device_name("cpu")}, 1 job(s): {name}': s for name, s in dict(brief=1, lengthy=8, key=2, door=7).items()}))
    run()
    ended = [line.split(']')[1].split(':')[0].strip() for line in lines if line.startswith('[')]
    assert ended == ['key', 'lengthy', 'door', 'brief']


def test_what_was_timed_meanwhile_counts_too(tmp_path, monkeypatch):
    r, known, begun = Runner(tmp_path, jobs=1, device='cpu'), {}, []
    tasks = [Task(f'page.{i}.{j}', Path('page.ipynb'), dict(profile='cpu')) for i in (1, 2) for j in (1, 2)]
    def run(self, task):
        begun.append(task.name)
        known[self.key(task)] = 50 if task.name.endswith('.2') else 5
        return {}
    r.say = str
    monkeypatch.setattr(Runner, 'run', run)
    monkeypatch.setattr(Runner, 'timings', lambda self: known)
    monkeypatch.setattr(runner, 'finished', lambda *_: False)
    assert len(r.run_all(tasks)) == 4 and begun == ['page.1.1', 'page.1.2', 'page.2.2', 'page.2.1']


def test_what_waits_counts_where_nothing_was_timed(pages, run, lines):
    for name, needs in dict(leaf=(), key=(), door=['key']).items(): pages(name, SAVE, needs=needs)
    run()
    assert [line.split(']')[1].split(':')[0].strip() for line in lines if line.startswith('[')][0] == 'key'


@pytest.mark.parametrize('failing, done, needed', [('[]', ['page.1.1 | [0]', 'page.1.2 | [3]', 'page.1.3 | [5]', 'page | [0, 3, 5]'], None), ('[3]', ['page.1.1 | [0]', 'page.1.3 | [5]'], 'page.1.2'),
                                                   ('[0]', [], 'page.1.1, page.1.2, page.1.3')])
def test_the_others_wait_for_the_first_overlap_factor(pages, tmp_path, lines, failing, done, needed):
    e = pages('page', parameters=dict(runs=1, gammas=[0, 3, 5]))
    write_page(runner.pages_folder/e.page, f'assert gammas != {failing}\nprint(gammas)', SAVE, parameters=PARAMETERS + '\ngammas = [0]')
    runner.EXPERIMENTS['page'] = replace(e, profiles={'cpu': {}}, split=by_gamma)
    found = reproduce('cpu', None, tmp_path/'out', device='cpu', jobs=2, say=lines.append)
    said = [line for line in lines if '|' in line]
    assert sorted(said) == sorted(done) and said[:1] == done[:1], '\n'.join(lines)
    if needed: assert why(found, 'page') == f'blocked: it needs {needed}'


def test_a_foreign_file_of_an_experiments_name_costs_the_summary_alone(pages, run, tmp_path, capsys):
    pages('page', SAVE)
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'mlp_cifar100.json').write_text('{}')
    assert isinstance(run()['page'], dict)
    assert "no summary: " + str(tmp_path/'out'/'mlp_cifar100.json') + " isn't a result of mlp_cifar100" in capsys.readouterr().out


def test_jobs_run_at_once_and_alone_runs_alone(pages, run, tmp_path):
    cell = f"import time, pathlib; now = time.time(); time.sleep(2); pathlib.Path('{tmp_path}/' + name + '.txt').write_text(f'{{now}} {{time.time()}}')"
    for name in ('a', 'b', 'timed'): pages(name, cell, SAVE, alone=name == 'timed')
    run(jobs=3)
    a, b, timed = ([*map(float, (tmp_path/f'{n}.txt').read_text().split())] for n in ('a', 'b', 'timed'))
    assert max(a[0], b[0]) < min(a[1], b[1]) and timed[0] > max(a[1], b[1])


def test_two_runners_do_not_do_the_same_work(pages, tmp_path, start):
    pages('page', f"""import pathlib, time
tmp = pathlib.Path({str(tmp_path)!r})
print('at work')
(tmp/'begun').touch()
while not (tmp/'go').exists(): time.sleep(.1)""", SAVE)
    log = tmp_path/'out.log' # of both
    first = start(tmp_path/'out')
    assert wait_for(lambda: (tmp_path/'begun').exists() or not first.is_alive()) and first.is_alive()
    second = start(tmp_path/'out')
    assert wait_for(lambda: 'page: another runner is at it, waiting' in log.read_text() or not second.is_alive()) and second.is_alive()
    (tmp_path/'go').touch()
    assert ended(first) == ended(second) == 0
    said = log.read_text()
    assert said.count('at work') == 1 and said.count('finished before') == 1 and said.count('1/1') == 2


def test_the_device_reaches_the_page(pages, run, lines):
    pages('page', "import os; print('device', os.environ['HDFAST_DEVICE'])", SAVE)
    run()
    assert '  device cpu' in lines


def test_the_time_left_is_learnt(pages, run, lines):
    pages('page', SAVE)
    pages('next', SAVE)
    run()
    assert any('without' not in line and 'time left unknown' in line for line in lines)
    run(again=True)
    assert any('[1/2]' in line and 'about 00:0' in line for line in lines)


# ---- stopping the runner

PROGRAM = """import sys
from hdfast import runner
from hdfast.experiments import Experiment
from pathlib import Path
runner.pages_folder, runner.EXPERIMENTS = Path(sys.argv[1]), {'page': Experiment('page', '', 'page.ipynb', dict(name='page'), {'smoke': {}})}
found = runner.reproduce('smoke', None, sys.argv[2], device='cpu')
sys.exit(not isinstance(found['page'], dict))"""


def runner_process(*argv):
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell's background job, such as the tests may be, ignores Ctrl-C, and so would its children
    return subprocess.Popen([sys.executable, '-c', PROGRAM, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def children_end(family, seconds=15):
    gone, alive = psutil.wait_procs(family, timeout=seconds)
    return not alive


def wait_for(f, seconds=300):
    end = time.monotonic() + seconds
    while not f() and time.monotonic() < end: time.sleep(.05)
    return f()


@pytest.mark.parametrize('how', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_a_runner_that_is_stopped_leaves_nothing_running(pages, tmp_path, how):
    pages('page', f"open('{tmp_path}/begun', 'w').close(); import time; time.sleep(300)", SAVE)
    process = runner_process(runner.pages_folder, tmp_path/'out')
    assert wait_for((tmp_path/'begun').exists), process.communicate(timeout=1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2 # papermill and its kernel
    process.send_signal(getattr(signal, how))
    out, err = process.communicate(timeout=30)
    assert process.returncode and children_end(family)
    if how == 'SIGINT': assert 'stopped; not finished: page' in out


FRESH = multiprocessing.get_context('forkserver') # forks from one process that has imported all there is to import
FRESH.set_forkserver_preload(['hdfast.runner', 'nbformat', 'pytest'])

def at_work(folder, out, parameters):
    "What a runner's process does; it tells a log beside `out`"
    sys.stdout = open(f'{out}.log', 'a', buffering=1)
    runner.pages_folder, runner.EXPERIMENTS = folder, {'page': Experiment('page', '', 'page.ipynb', dict(name='page') | parameters, {'smoke': {}})}
    sys.exit(not isinstance(reproduce('smoke', None, out, device='cpu')['page'], dict))


def kill_all(process):
    "kill -9 a runner and all that it started"
    with suppress(psutil.NoSuchProcess):
        for p in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess): p.kill()
    process.join()


def ended(process):
    "Exit status of a runner's process, once it has ended"
    process.join(900)
    return process.exitcode


@pytest.fixture
def start():
    "Start a runner's process, which doesn't outlive the test"
    processes = []
    def start(out, **parameters):
        processes.append(process := FRESH.Process(target=at_work, args=(runner.pages_folder, out, parameters)))
        process.start()
        return process
    yield start
    for p in processes: kill_all(p)


STEPS = """import os, pathlib, random, time
p = pathlib.Path(out)/'networks'; p.mkdir(exist_ok=True)
for i in range(400):
    if not (p/str(i)).exists():
        number = str(random.Random(i).random())
        with open(p/f'.{i}', 'w') as part:
            part.write(number[:5]); part.flush()
            if pathlib.Path(SLOWLY).exists(): time.sleep(.1)
            part.write(number[5:])
        os.rename(p/f'.{i}', p/str(i))
steps = sum(float((p/str(i)).read_text()) for i in range(400))"""


def kept(out):
    "What is in the cache: time and content of each file"
    return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (out/'networks').glob('[!.]*')}


@pytest.mark.slow
def test_kill_9_at_ten_moments_then_the_same_numbers(pages, tmp_path, start):
    pages('page', STEPS.replace('SLOWLY', repr(str(tmp_path/'slowly'))), SAVE.replace('dict(steps=steps)', '{}'))
    whole, out = start(tmp_path/'whole'), tmp_path/'out'
    assert ended(whole) == 0
    (tmp_path/'slowly').touch()
    moments, before, torn = random.Random(0), {}, 0
    for _ in range(10):
        process, nth = start(out), len(before) + 1
        begun = lambda: any((out/'networks'/name).exists() for name in (f'.{nth}', str(nth)))
        assert wait_for(lambda: begun() or not process.is_alive())
        time.sleep(moments.uniform(0, .9))
        assert process.is_alive()
        kill_all(process)
        after = kept(out)
        assert len(before) < len(after) < 400 and before.items() <= after.items() and not (out/'page.json').exists()
        before, torn = after, torn + (out/'networks'/f'.{len(after)}').exists()
    assert torn > 5 # of the kills fell into a step
    (tmp_path/'slowly').unlink()
    assert ended(start(out)) == 0 and before.items() <= kept(out).items()
    for f in ('page.csv', 'page.json'): assert (out/f).read_bytes() == (tmp_path/'whole'/f).read_bytes()


TIMED = {'seconds', 'images per second', 'images/s', 'images_a_second', 'training s', 'training_seconds', 'wall_seconds'} # what no two runs share

def untimed(file):
    "A table without the columns that no two runs share"
    table = pd.read_csv(file)
    return table.drop(columns=TIMED & {*table})


def numbers(out):
    "What a page has written, without provenance and times"
    about = json.loads((out/'page.json').read_text())
    assert about.pop('provenance') and about.pop('wall_seconds')
    return about, *(untimed(out/f).to_csv() for f in ('page.csv', 'page_runs.csv')), *((out/f).read_bytes() for f in ('page.svg', 'page_dendrogram.svg', 'page_confusion.svg'))


@pytest.mark.slow
def test_kill_9_of_a_page_that_trains_then_the_same_numbers(pages, tmp_path, start):
    shutil.copy(PAGES/'hierarchy.ipynb', runner.pages_folder/pages('page').page)
    train = lambda out: start(tmp_path/out, dataset='synthetic', family='mlp', n_clusters=6, gammas=[0, 3, 5], epochs=12, runs=2)
    whole, out = train('whole'), tmp_path/'out'
    moments, found = random.Random(0), [{}]
    for least in (1, 5): # the flat network is the first, and a hierarchy's are kept together
        process = train('out')
        assert wait_for(lambda: len(kept(out)) >= max(least, len(found[-1]) + 1) or not process.is_alive())
        time.sleep(moments.uniform(0, .5))
        assert process.is_alive()
        kill_all(process)
        found.append(kept(out))
        assert not (out/'page.json').exists()
    assert ended(train('out')) == 0 and ended(whole) == 0
    found.append(kept(out))
    assert all(len(a) < len(b) and a.items() <= b.items() for a, b in zip(found, found[1:])) # nothing was trained twice, and each time something was missing
    weights = lambda files: {name: content[8 + int.from_bytes(content[:8], 'little'):] for name, (_, content) in files.items()} # without the head, which has the seconds
    assert weights(found[-1]) == weights(kept(tmp_path/'whole')) and numbers(out) == numbers(tmp_path/'whole')


def test_pictures_of_another_experiment_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'EXPERIMENTS', EXPERIMENTS)
    for name in ('cnn_cifar100.json', 'cnn_cifar100_dendrogram.svg', 'cnn_cifar100.svg', 'cnn_cifar100_overlap.svg', 'cnn_cifar100_overlap_confusion.svg', 'cnn_cifar1000.svg'): (tmp_path/name).touch()
    assert [f.name for f in runner._files_of(tmp_path/'cnn_cifar100.json')] == ['cnn_cifar100.json', 'cnn_cifar100.svg', 'cnn_cifar100_dendrogram.svg']


def test_tasks_take_a_folder_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'pages_folder', PAGES)
    assert tasks_of(EXPERIMENTS['memory'], 'smoke', str(tmp_path))[0].parameters['out'] == str(tmp_path)


# ---- all smoke pages, killed again and again

def smoke_run(out):
    "`hdfast reproduce` of all smoke pages whose numbers aren't times, two at once"
    names = [e.name for e in select('smoke') if not e.name.startswith('benchmark_')]
    command = ['from hdfast.cli import main; raise SystemExit(main())', 'reproduce', '--profile', 'smoke', '--jobs', '2', '--device', 'cpu', '--only', *names, '--out', out]
    with open(f'{out}.log', 'a') as log: return subprocess.Popen([sys.executable, '-c', *map(str, command)], stdout=log, stderr=log)


@pytest.mark.skipif('HDFAST_LONG' not in os.environ, reason='takes a quarter of an hour on two cores: HDFAST_LONG=1 runs it')
def test_ten_kills_at_random_moments_of_all_smoke_pages_change_no_number(tmp_path):
    began, whole = time.monotonic(), smoke_run(tmp_path/'whole')
    assert whole.wait(1800) == 0
    longest, rng, reached = (time.monotonic() - began)/5, random.Random(0), 0
    for _ in range(10):
        process = smoke_run(tmp_path/'killed')
        with suppress(subprocess.TimeoutExpired): process.wait(rng.uniform(5, longest))
        if process.poll() is not None: break # all done before the tenth
        for p in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess): p.kill()
        process.wait()
        reached += 1
    assert reached >= 5 and smoke_run(tmp_path/'killed').wait(1800) == 0
    files = {f.name for f in (tmp_path/'whole').glob('*.csv')}
    assert len(files) > 20 and files == {f.name for f in (tmp_path/'killed').glob('*.csv')}
    for name in sorted(files - {'summary.csv'}):
        pd.testing.assert_frame_equal(*(untimed(tmp_path/which/name) for which in ('whole', 'killed')), obj=name)
