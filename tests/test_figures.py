"What is committed in figures/ is what the pages give: those that train nothing are run again and compared."
import json
import re

import numpy as np
import pandas as pd
import pytest

papermill = pytest.importorskip('papermill')

from hdfast.experiments import pages_folder, repository
from hdfast.runner import reproduce
from hdfast.summary import write_summary

PAGES = ('diagrams', 'architectures', 'memory', 'audit')
DRAWN = ('overview',) # from what is committed: no experiment, since there is nothing to draw in a new folder
COMMITTED = repository/'figures'
FILES = [f.name for n in (*PAGES, *DRAWN) for f in sorted(COMMITTED.glob(f'{n}*')) if f.stem == n or f.stem.startswith(f'{n}_')]
VOLATILE = {'provenance', 'wall_seconds', 'measured'} # where, when and how fast; and memory as a machine measures it


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with the pages' results, made now"
    out = tmp_path_factory.mktemp('figures')
    found = reproduce('smoke', PAGES, out, jobs=2, device='cpu', say=str)
    assert all(isinstance(o, dict) for o in found.values()), found
    for n in DRAWN: papermill.execute_notebook(pages_folder/f'{n}.ipynb', out/f'{n}.ipynb', dict(figures=str(COMMITTED), out=str(out)), kernel_name='python3', progress_bar=False)
    return out


def check_equal(a, b, where=''):
    "AssertionError unless two JSON values are equal, numbers to six digits"
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for k in a: check_equal(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)): check_equal(*pair, f'{where}[{i}]')
    elif isinstance(a, float): assert a == pytest.approx(b, rel=1e-6, nan_ok=True), where
    else: assert a == b, where


def drawing(svg):
    "A drawing without what depends on matplotlib's version: its name, and digits beyond a thousandth"
    text = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.S)
    return re.sub(r'-?\d+\.\d+', lambda m: f'{float(m[0]):.3f}', text)


def test_every_page_has_files(): assert {f'{n}.{kind}' for n in (*PAGES, *DRAWN) for kind in ('csv', 'json')} <= set(FILES) and len([f for f in FILES if f.endswith('.svg')]) == 6


@pytest.mark.parametrize('file', [f for f in FILES if f.endswith('.csv')])
def test_tables(made, file): pd.testing.assert_frame_equal(pd.read_csv(made/file), pd.read_csv(COMMITTED/file), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize('file', [f for f in FILES if f.endswith('.json')])
def test_results(made, file):
    ours, committed = ({k: v for k, v in json.loads((d/file).read_text()).items() if k not in VOLATILE} for d in (made, COMMITTED))
    check_equal(ours, committed, file)


@pytest.mark.parametrize('file', [f for f in FILES if f.endswith('.svg')])
def test_drawings(made, file):
    assert drawing((made/file).read_text()) == drawing((COMMITTED/file).read_text())
    assert (made/file).with_suffix('.png').stat().st_size > 5000


def test_the_comparison_sees_a_change():
    with pytest.raises(AssertionError, match=r'x\.a\[1\]'): check_equal(dict(a=[1, 2.5]), dict(a=[1, 2.51]), 'x')
    check_equal(dict(a=[1, 2.5, np.nan]), dict(a=[1, 2.5 + 1e-9, np.nan]))
    assert drawing('<path d="M 1.23456 2"/>') == drawing('<path d="M 1.23461 2"/>') != drawing('<path d="M 1.24 2"/>')


def test_the_summary_is_that_of_the_committed_results(tmp_path):
    for f in (*COMMITTED.glob('*.json'), *COMMITTED.glob('*.csv'), *COMMITTED.glob('*.svg')): (tmp_path/f.name).symlink_to(f)
    write_summary(tmp_path)
    for file in ('summary.md', 'summary.html'):
        assert (tmp_path/file).read_text(encoding='utf-8') == (COMMITTED/file).read_text(encoding='utf-8'), "results have changed: hdfast.summary.write_summary('figures')"
