"What is committed in figures/ is what the pages give: those that train nothing are run again and compared, and what they show is compared too."
import ast
import json
import re
from html.parser import HTMLParser

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


class Tables(HTMLParser):
    "The tables in HTML text, each as (rows of its head, rows of its body); a row is a list of texts"
    def __init__(self, html):
        super().__init__()
        self.tables, self.part, self.cell, self.reach = [], 1, None, {} # reach: column -> rows to go and text of a cell that spans rows
        self.feed(html)
    @property
    def row(self): return self.tables[-1][self.part][-1]
    def handle_starttag(self, tag, attrs):
        if tag == 'table': self.tables.append(([], []))
        elif tag in ('thead', 'tbody'): self.part = int(tag == 'tbody')
        elif tag == 'tr':
            self.tables[-1][self.part].append([])
            self.repeat()
        elif tag in ('td', 'th'): self.cell, self.rows = '', int(dict(attrs).get('rowspan', 1))
    def handle_data(self, data):
        if self.cell is not None: self.cell += data
    def handle_endtag(self, tag):
        if tag not in ('td', 'th'): return
        self.reach[len(self.row)] = self.rows - 1, self.cell.strip()
        self.row.append(self.cell.strip())
        self.cell = None
        self.repeat()
    def repeat(self):
        "Put in the cells that reach down from an earlier row"
        while self.reach.get(len(self.row), (0,))[0]:
            left, text = self.reach[len(self.row)]
            self.reach[len(self.row)] = left - 1, text
            self.row.append(text)


def cells(page):
    "The code cells of a page as it is saved"
    return [c for c in json.loads((repository/'nbs'/'experiments'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def shown(cells, *columns):
    "Rows, as dicts, of all tables in the cells' outputs that have these columns"
    outputs = [''.join(o['data']['text/html']) for c in cells for o in c['outputs'] if 'text/html' in o.get('data', {})]
    for head, body in (table for html in outputs for table in Tables(html).tables):
        names = [''.join(column) for column in zip(*head)] # those of an index stand in a line of their own
        if set(columns) <= set(names): yield from (dict(zip(names, row, strict=True)) for row in body)


def alike(text, kept):
    "Whether a cell that is shown, perhaps rounded, is the cell that is kept"
    try: return text == kept or abs(float(text) - float(kept)) <= .5*10.**-len(text.partition('.')[2]) + 1e-4
    except ValueError: return False


def check_shown(page, cells, columns):
    "AssertionError unless the rows that a page shows with `columns` are those of its committed table"
    kept = pd.read_csv(COMMITTED/f'{page}.csv', dtype=str, keep_default_na=False).to_dict('records')
    rows = [*shown(cells, *columns)]
    assert len(rows) == len(kept), f'{page}: {len(rows)} rows are shown, {len(kept)} kept'
    for i, (row, want) in enumerate(zip(rows, kept)):
        assert set(columns) <= want.keys()
        for k in row.keys() & want.keys(): assert alike(row[k], want[k]), f'{page}, row {i}: {k} is shown as {row[k]!r} and kept as {want[k]!r}: run the page again and save it'


SHOWN = dict(diagrams=('cluster', 'disjoint', 'overlapping'), architectures=('table', 'row', 'account', 'printed', 'parameters', 'MACs', 'difference', 'explained'),
             memory=('row', 'account', 'printed', 'difference'), audit=('no', 'finding', 'where', 'verdict'))


@pytest.mark.parametrize('page', PAGES)
def test_a_saved_page_shows_the_committed_table(page): check_shown(page, cells(page), SHOWN[page])


@pytest.mark.parametrize('page', PAGES)
def test_a_committed_result_has_the_parameters_of_its_page(page):
    lines = ast.parse(''.join(next(c for c in cells(page) if 'parameters' in c['metadata'].get('tags', []))['source'])).body
    defaults = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    kept = json.loads((COMMITTED/f'{page}.json').read_text())['parameters']
    assert {k: v for k, v in kept.items() if k in defaults} == {k: v for k, v in defaults.items() if k in kept}
    assert page == 'audit' or defaults.keys() & kept.keys()


def test_a_stale_page_is_seen():
    stale = pd.DataFrame(dict(cluster=range(3), disjoint='cat, dog, fox, wolf', overlapping='cat, dog, fox, wolf'))
    page = lambda n: [dict(outputs=[dict(data={'text/html': [stale[:n].to_html()]})])]
    with pytest.raises(AssertionError, match='diagrams: 2 rows are shown, 3 kept'): check_shown('diagrams', page(2), SHOWN['diagrams'])
    with pytest.raises(AssertionError, match='diagrams, row 0: overlapping is shown as'): check_shown('diagrams', page(3), SHOWN['diagrams'])
    with pytest.raises(AssertionError, match='0 rows are shown'): check_shown('diagrams', [dict(outputs=[])], SHOWN['diagrams'])
    index = stale.assign(n=1.5).set_index(['overlapping', 'cluster'])
    assert [*shown([dict(outputs=[dict(data={'text/html': index.to_html()})])], 'cluster', 'n')][2] == dict(overlapping='cat, dog, fox, wolf', cluster='2', disjoint='cat, dog, fox, wolf', n='1.5')
    assert alike('232.026', '232.0261') and alike('True', 'True') and not alike('232.036', '232.0261') and not alike('cat', '1') and not alike('', '1')


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
