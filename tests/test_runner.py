"The runner: broken pages end in named failures, what needs them is blocked, the rest goes on, and the same command resumes."
import json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path

import nbformat
import pytest

pytest.importorskip('papermill')
psutil = pytest.importorskip('psutil')

from hdfast import runner
from hdfast.experiments import EXPERIMENTS, Experiment
from hdfast.runner import PageFailure, Runner, Task, check_page, page_version, page_parameters, reproduce, select, tasks_of

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


def test_two_parameters_cells_are_refused(tmp_path):
    write_page(tmp_path/'page.ipynb', SAVE)
    nb = nbformat.read(tmp_path/'page.ipynb', 4)
    nb.cells[1].metadata.tags = ['parameters']
    nbformat.write(nb, tmp_path/'page.ipynb')
    with pytest.raises(ValueError, match='2 cells tagged'): page_parameters(tmp_path/'page.ipynb')


@pytest.mark.parametrize('given, message', [({'step': 1}, 'no parameter step; it has first, name'), ({'steps': '3'}, "steps = '3' is of another kind"),
    ({'steps': True}, 'another kind'), ({'steps': 3.5}, 'another kind'), ({'name': ['page']}, 'another kind')])
def test_unknown_and_mistyped_parameters(tmp_path, given, message):
    write_page(tmp_path/'page.ipynb', SAVE)
    with pytest.raises(ValueError, match=message.replace('[', r'\[')): check_page(tmp_path/'page.ipynb', given)


def test_every_experiment_of_the_registry_can_be_planned(tmp_path):
    for profile in runner.PROFILES:
        for e in select(profile):
            assert all(n in EXPERIMENTS and profile in EXPERIMENTS[n].profiles for n in e.needs)
            assert tasks_of(e, profile, tmp_path, jobs=4)[-1].name == e.name


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


def test_all_faulty_pages_were_tried(faults): assert list(faults[0]) == list(FAULTS)


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
    (tmp_path/'out'/'page.json').write_text('{}') # not what the page wrote
    run()
    assert work() == 4


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


def test_overlap_factors_are_split_too(tmp_path):
    e = EXPERIMENTS['mlp_cifar100']
    *parts, whole = tasks_of(e, 'paper', tmp_path, jobs=2)
    assert [t.parameters['gammas'] for t in parts] == [[0], [3], [5]]*3 and [t.parameters['first'] for t in parts] == [0]*3 + [1]*3 + [2]*3
    assert all(t.part and t.parameters['runs'] == 1 and t.parameters['name'] == t.name and t.parameters['networks'] == str(tmp_path/'networks') for t in parts)
    assert [t.needs for t in parts[3:6]] == [(), ('mlp_cifar100.2.1',), ('mlp_cifar100.2.1',)] # the first trains what they share
    assert whole.needs == tuple(t.name for t in parts) and whole.parameters['gammas'] == [0, 3, 5] and whole.parameters['runs'] == 3
    assert len(tasks_of(e, 'paper', tmp_path, jobs=1)) == len(tasks_of(EXPERIMENTS['cnn_cifar100'], 'cpu', tmp_path, jobs=2)) == 1


def test_what_most_time_hangs_on_starts_first(pages, run, tmp_path, lines):
    for name, needs in dict(brief=(), lengthy=(), key=(), door=['key']).items(): pages(name, SAVE, needs=needs)
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'timings.json').write_text(json.dumps({f'smoke, {runner.device_name("cpu")}, 1 job(s): {name}': s for name, s in dict(brief=1, lengthy=8, key=2, door=7).items()}))
    run()
    ended = [line.split(']')[1].split(':')[0].strip() for line in lines if line.startswith('[')]
    assert ended == ['key', 'lengthy', 'door', 'brief']


def test_jobs_run_at_once_and_alone_runs_alone(pages, run, tmp_path):
    cell = f"import time, pathlib; now = time.time(); time.sleep(2); pathlib.Path('{tmp_path}/' + name + '.txt').write_text(f'{{now}} {{time.time()}}')"
    for name in ('a', 'b', 'timed'): pages(name, cell, SAVE, alone=name == 'timed')
    run(jobs=3)
    a, b, timed = ([*map(float, (tmp_path/f'{n}.txt').read_text().split())] for n in ('a', 'b', 'timed'))
    assert max(a[0], b[0]) < min(a[1], b[1]) and timed[0] > max(a[1], b[1])


def test_two_runners_do_not_do_the_same_work(pages, tmp_path):
    pages('page', f"import time; time.sleep(3); print('at work')", SAVE)
    said, found = [], []
    work = lambda: found.append(reproduce('smoke', None, tmp_path/'out', device='cpu', say=said.append))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [f['page']['name'] for f in found] == ['page', 'page'] and sum('at work' in s for s in said) == 1
    assert any('another runner is at it' in s for s in said)


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


def wait_for(f, seconds=60):
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


STEPS = """import pathlib, random, time
p = pathlib.Path(out)/'networks'; p.mkdir(exist_ok=True)
total = 0
for i in range(20):
    f = p/str(i)
    if not f.exists():
        time.sleep(.1)
        (part := p/f'.{i}').write_text(str(random.Random(i).random())); part.rename(f)
    total += float(f.read_text())
steps = total"""


@pytest.mark.slow
def test_kill_9_at_ten_moments_then_the_same_numbers(pages, tmp_path):
    pages('page', STEPS, SAVE.replace('dict(steps=steps)', '{}'))
    assert runner_process(runner.pages_folder, tmp_path/'whole').wait(120) == 0
    moments = random.Random(0)
    for _ in range(10):
        process = runner_process(runner.pages_folder, tmp_path/'out')
        time.sleep(4 + 6*moments.random())
        process.kill()
        process.communicate()
    assert runner_process(runner.pages_folder, tmp_path/'out').wait(120) == 0
    for f in ('page.csv', 'page.json'): assert (tmp_path/'out'/f).read_bytes() == (tmp_path/'whole'/f).read_bytes()


PAGES = runner.pages_folder

def test_pictures_of_another_experiment_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'EXPERIMENTS', EXPERIMENTS)
    for name in ('cnn_cifar100.json', 'cnn_cifar100_dendrogram.svg', 'cnn_cifar100.svg', 'cnn_cifar100_overlap.svg', 'cnn_cifar100_overlap_confusion.svg', 'cnn_cifar1000.svg'): (tmp_path/name).touch()
    assert [f.name for f in runner._files_of(tmp_path/'cnn_cifar100.json')] == ['cnn_cifar100.json', 'cnn_cifar100.svg', 'cnn_cifar100_dendrogram.svg']


def test_tasks_take_a_folder_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'pages_folder', PAGES)
    assert tasks_of(EXPERIMENTS['memory'], 'smoke', str(tmp_path))[0].parameters['out'] == str(tmp_path)
