"What pip and nbdev see of the repository: versions that agree, extras, the wheel's contents, an import without the notebook tools."
import ast, json, re, shutil, subprocess, sys, tomllib, zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.stem for p in (ROOT/'hdfast').glob('*.py') if not p.stem.startswith('_'))
NOTEBOOK_TOOLS = ('nbdev', 'execnb', 'IPython', 'ipykernel', 'ipywidgets', 'jupyter', 'jupyter_client', 'jupyter_core', 'jupyterlab', 'notebook', 'nbformat', 'nbclient',
                  'nbconvert', 'papermill')
# distributions whose import name is another
IMPORT_NAMES = {'scikit-learn': 'sklearn', 'pillow': 'PIL', 'pyyaml': 'yaml'}


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini')
    return parser['DEFAULT']


def pyproject(): return tomllib.loads((ROOT/'pyproject.toml').read_text())


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel, opened, built from a copy of what git tracks; with none of the build folder that an earlier build may have left"
    tmp = tmp_path_factory.mktemp('wheel')
    files = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip('not a git checkout')
    for f in files.stdout.splitlines():
        if f.startswith(('figures/', 'nbs/experiments/')) or not (ROOT/f).is_file(): continue
        (tmp/'src'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, tmp/'src'/f)
    run = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp/'out', tmp/'src'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [path] = (tmp/'out').iterdir()
    with zipfile.ZipFile(path) as z: yield z


def metadata(wheel):
    [name] = [n for n in wheel.namelist() if n.endswith('.dist-info/METADATA')]
    return HeaderParser().parsestr(wheel.read(name).decode())


def requirements(wheel, extra=None):
    "Names that the wheel asks for, without an extra or with that one alone"
    reqs = [Requirement(r) for r in metadata(wheel).get_all('Requires-Dist')]
    return {r.name for r in reqs if (r.marker is None if extra is None else r.marker is not None and r.marker.evaluate({'extra': extra}))}


def test_version_and_name_agree(wheel):
    "settings.ini is the source; the copy that nbdev reads in hdfast/__init__.py has to be changed with it"
    [found] = re.findall(r'^__version__ = "(.+)"$', (ROOT/'hdfast/__init__.py').read_text(), re.M)
    assert settings()['version'] == found == metadata(wheel)['Version']
    assert settings()['name'] == pyproject()['project']['name'] == metadata(wheel)['Name']


def test_min_python_agrees(wheel):
    want = f">={settings()['min_python']}"
    assert pyproject()['project']['requires-python'] == want == metadata(wheel)['Requires-Python']


def test_metadata_stands_in_one_place(wheel):
    assert set(pyproject()['project']) == {'name', 'requires-python', 'dynamic'}
    assert metadata(wheel)['License-Expression'] == 'Apache-2.0'
    assert metadata(wheel).get_payload().startswith('<!-- Written by `make readme`')


def test_extras(wheel):
    assert set(metadata(wheel).get_all('Provides-Extra')) == {'reproduce', 'dev', 'ray'}
    reproduce, dev = requirements(wheel, 'reproduce'), requirements(wheel, 'dev')
    assert {'papermill', 'ipykernel'} <= reproduce < dev
    assert {'nbdev', 'jupyterlab', 'pytest', 'hypothesis', 'hiclass'} <= dev
    assert requirements(wheel, 'ray') == {'ray'}
    assert not (requirements(wheel) & (dev | {'ray'})), 'an extra is also required by the library'


def test_every_requirement_has_a_reason(wheel):
    "The owner's list stands in prose, everything further in CHANGELOG.md's table"
    text = (ROOT/'CHANGELOG.md').read_text().lower()
    every = requirements(wheel).union(*(requirements(wheel, e) for e in ('reproduce', 'dev', 'ray')))
    other_spelling = {'torch': 'pytorch'}
    assert not [r for r in sorted(every) if other_spelling.get(r, r) not in text]


def test_wheel_has_the_package_and_nothing_else(wheel):
    tops = {n.split('/')[0] for n in wheel.namelist()}
    assert tops == {'hdfast', f"hdfast-{settings()['version']}.dist-info"}
    assert {Path(n).stem for n in wheel.namelist() if n.startswith('hdfast/')} >= {'__init__', '_modidx', *MODULES}
    assert any(n.endswith('licenses/LICENSE') for n in wheel.namelist())


def test_console_script(wheel):
    [name] = [n for n in wheel.namelist() if n.endswith('entry_points.txt')]
    parser = ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert dict(parser['console_scripts']) == {'hdfast': 'hdfast.cli:main'}


def test_nbdev_keeps_the_parameters_tag():
    "Without it nbdev-clean strips the tag, and papermill then runs with the defaults and says nothing"
    assert 'tags' in pyproject()['tool']['nbdev']['allowed_cell_metadata_keys']


@pytest.mark.parametrize('module', MODULES)
def test_module_comes_from_a_notebook(module):
    "The notebook named in a module exists and exports to that module"
    source = (ROOT/'hdfast'/f'{module}.py').read_text()
    notebooks = set(re.findall(r'^# %% (\.\./nbs/\S+\.ipynb) #', source, re.M))
    assert source.count('AUTOGENERATED! DO NOT EDIT!') == 1 and notebooks
    for nb in notebooks:
        cells = json.loads((ROOT/'hdfast'/nb).read_text())['cells']
        assert any(re.search(rf'^#\|\s*default_exp {module}$', ''.join(c['source']), re.M) for c in cells), f'{nb} does not export to {module}'


def imported(nodes):
    "Top-level names of the packages outside the standard library and hdfast that the import statements in `nodes` ask for"
    for node in nodes:
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        else: continue
        yield from {n.split('.')[0] for n in names} - sys.stdlib_module_names - {'hdfast'}


@pytest.mark.parametrize('module', MODULES)
def test_imports_are_declared(wheel, module):
    "What a module imports is a requirement of the library, or of an extra where the import may fail; none comes along by luck"
    names = lambda *extra: {IMPORT_NAMES.get(r, r) for r in requirements(wheel, *extra)}
    always, extras = names(), names('reproduce') | names('ray')
    tree = ast.parse((ROOT/'hdfast'/f'{module}.py').read_text())
    guarded = [n for t in ast.walk(tree) if isinstance(t, ast.Try) and any(ast.unparse(h.type) == 'ImportError' for h in t.handlers if h.type) for n in t.body]
    assert set(imported(guarded)) <= always | extras
    assert set(imported(n for n in ast.walk(tree) if n not in guarded)) <= always


def test_imports_without_nbdev_and_jupyter():
    "Each module imports in a process where importing a notebook tool is an error"
    code = f'''
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {NOTEBOOK_TOOLS!r}: raise ModuleNotFoundError(f'refused: {{name}}', name=name)
sys.meta_path.insert(0, Refuse())
try: import nbdev
except ModuleNotFoundError: pass
else: sys.exit('nothing was refused: the test tests nothing')
for module in {['hdfast', *(f'hdfast.{m}' for m in MODULES)]!r}: importlib.import_module(module)
print('imported')
'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith('imported\n')


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_saved_outputs_hold_no_error_and_no_path(path):
    "What a reader sees was no failure, and does not name folders of the machine that it ran on"
    if '.ipynb_checkpoints' in path.parts: return
    for cell in json.loads(path.read_text())['cells']:
        outputs = cell.get('outputs', [])
        assert not [o['ename'] for o in outputs if o['output_type'] == 'error'], cell['id']
        text = json.dumps([{k: v for k, v in o.get('data', {}).items() if k.startswith('text/')} or o.get('text') for o in outputs])
        assert not re.search(rf'site-packages|{ROOT}|{Path.home()}|/home/\w|/root/|/Users/', text), cell['id']


def test_readme_is_in_step():
    pytest.importorskip('nbconvert')
    run = subprocess.run([sys.executable, ROOT/'tools/pages.py', 'readme', '--check'], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_readme_links_lead_somewhere():
    "Links to files of the repository, as GitHub follows them; addresses with a scheme are not fetched"
    links = re.findall(r'\]\((?!\w+:|#)([^)\s#]+)', (ROOT/'README.md').read_text())
    assert links and not [link for link in links if not (ROOT/link).exists()]
