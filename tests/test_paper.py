"nbs/experiments/paper.json against the text of the paper, cell by cell. The text comes from a PDF, so each table is found by what stands before and after it."
import json
import re
from pathlib import Path

import pytest

from hdfast.experiments import pages_folder, paper_table

TEXT = Path(__file__).resolve().parents[2]/'shared'/'paper'/'paper.txt'
PAPER = json.loads((pages_folder/'paper.json').read_text(encoding='utf-8'))
TABLES = PAPER['tables']
NUMBER = re.compile(r'\d+(?:\.\d+)?')

# where a table begins and ends in the text
SPANS = {
    'Table 1': ('Net\tCNN_1', 'Table 1. Pre-defined'), 'Table 2': ('Net\tCNN_{TL_1}', '4.2. Results'),
    'Table 3': ('Table 3. Performance', 'Note: Top line'), 'Table 4': ('onns on Carreen-101', 'Table 4. Performance'),
    'Table 5': ('Table 5. Performance', 'Table 6. Performance'), 'Table 6': ('Table 6. Performance', 'Table 7. Performance'),
    'Table 7': ('Table 7. Performance', 'Table 8. Performance'), 'Table 8': ('Table 8. Performance', 'formed using the linkage'),
    'Table 9': ('Table 9. Performance', 'The non-adaptive'), 'Table 10': ('Table 10. Performance', 'We believe'),
    'Table 11': ('Table 11. Performance', 'Table 11. demonstrates'), 'Table 12': ('Network\tCNN_{TL_1}', 'The baseline VGG-f'),
    'Table 13': ('Table 13. Comparison', 'pared to the best'), 'Table 14': ('Table 14. Memory', '\n0.\n'),
    'Table 15': ('hierarchy classifier CNN_{TL_3} . MEMORY', 'Table 16. Memory'), 'Table 16': ('Table 16. Memory', 'Note: Worst case')}


@pytest.fixture(scope='module')
def text():
    if not TEXT.exists(): pytest.skip(f"the paper's text isn't beside the checkout ({TEXT.relative_to(TEXT.parents[2])})")
    return TEXT.read_text(encoding='utf-8')


def block(text, table):
    begin, end = SPANS[table]
    at = text.index(begin)
    return text[at:text.index(end, at)]


def lines(text, table):
    "Lines of a table as lists of cells, without network and dataset names (which hold digits)"
    plain = re.sub(r'CNN_(\{TL_\d\}|\d)|CalTech-\d+|CIFAR-\d+', 'name', block(text, table))
    return [line.split('\t') for line in plain.splitlines() if '\t' in line]


def numbers(cells): return NUMBER.findall(' '.join(map(str, cells)))


def tokens(cells): return re.findall(r'NA|\d+(?:\.\d+)?', ' '.join(cells))


def printed(v): return 'NA' if v is None else f'{v:g}'


def test_every_table_of_the_paper_is_there():
    assert list(TABLES) == list(SPANS) == [f'Table {i}' for i in range(1, 17)]


@pytest.mark.parametrize('table', SPANS)
def test_caption(table, text):
    squeeze = lambda s: re.sub(r'\s', '', s)
    caption, found = squeeze(TABLES[table]['caption']), squeeze(text)
    # the text has cut some captions in two, or garbled one end
    assert any(part in found for part in (caption, caption[:40], caption[-40:]))


def test_the_layers_of_table_1(text):
    rows = [['', TABLES['Table 1']['input']], *TABLES['Table 1']['rows']]
    found = numbers(sum((line for line in lines(text, 'Table 1')), []))
    depth, rest = found[:5], found[5:]
    assert depth == numbers(rows[1][1:])
    assert rest == sum((numbers(r) for r in [rows[0], *rows[2:]]), [])


def test_the_layers_of_table_2(text):
    rows = [['', TABLES['Table 2']['input']], *TABLES['Table 2']['rows']]
    found = numbers(sum(lines(text, 'Table 2'), []))
    assert sorted(found) == sorted(sum(map(numbers, rows), []))  # strides stand on a line of their own


@pytest.mark.parametrize('table', [f'Table {i}' for i in range(3, 9)])
def test_hierarchies(table, text):
    found = [t for t in map(tokens, lines(text, table)) if len(t) > 1]
    rows = TABLES[table].get('printed_rows', TABLES[table]['rows'])
    flat, *others = rows
    expected = [['1', 'NA', 'NA', 'NA', printed(flat['FC'])]]
    expected += [[printed(r[k]) for k in ('C', 'gamma', 'HC', 'FC')] for r in others]
    assert found == expected


def test_what_is_aimed_at_for_table_8_comes_from_tables_9_and_10():
    flat, disjoint = paper_table('Table 8')['rows']
    nine, ten = paper_table('Table 9')['rows'], paper_table('Table 10')['rows'][2]
    assert flat['FC'] == nine[0]['accuracy'] == ten['CNN_1']
    assert disjoint['FC'] == nine[3]['accuracy'] == ten['Hierarchical model']
    assert disjoint['C'] == nine[3]['clusters'] == 30


def test_table_9(text):
    rows = [[printed(r[k]) for k in ('no', 'clusters', 'accuracy')] for r in TABLES['Table 9']['rows']]
    assert [t for t in map(tokens, lines(text, 'Table 9')) if t] == rows


def test_table_10(text):
    columns = ['CNN_1', 'Hierarchical model', 'Adaptive network selection', 'Adaptive transfer learning', 'Joint model']
    *_, caltech, cifar = lines(text, 'Table 10')
    found = [*zip(*(tokens([c]) for c in caltech[1:])), tuple(tokens(cifar[1:]))]  # two rows share a line
    assert found == [tuple(printed(r[c]) for c in columns) for r in TABLES['Table 10']['rows']]


def test_table_11(text):
    rows = [[printed(r[k]) for k in ('clusters', 'accuracy')] for r in TABLES['Table 11']['rows']]
    assert [t for t in (tokens(line[1:]) for line in lines(text, 'Table 11')) if t] == rows


def test_table_12(text):
    *_, line = lines(text, 'Table 12')  # one line; each cell has the three numbers of a network
    assert [numbers([c]) for c in line[1:]] == [[r['params'], r['data'], r['total']] for r in TABLES['Table 12']['rows']]


def test_table_13(text):
    found = [numbers(line[1:]) for line in lines(text, 'Table 13')]
    assert [f for f in found if f] == [[r['accuracy'], r['memory'], r['layers']] for r in TABLES['Table 13']['rows']]


def layer_rows(table):
    "The rows of an appendix table as the text has them"
    for r in TABLES[table]['rows']:
        if r['output'] and r['kernel'] and r['params']:
            yield [str(v) for v in (r['layer'], r['function'], *r['output'], r['data'], *r['kernel'], r['params'])]


@pytest.mark.parametrize('table, n', [('Table 14', 21), ('Table 15', 18), ('Table 16', 21)])
def test_layers_of_the_appendix(table, n, text):
    found = [line for line in block(text, table).splitlines() if re.match(r'\d\t\w+', line)]
    expected = list(layer_rows(table))
    assert [line.split('\t') for line in found] == expected
    assert len(expected) == n


@pytest.mark.parametrize('table', ['Table 14', 'Table 16'])
def test_totals_of_the_appendix(table, text):
    total, = [line for line in block(text, table).splitlines() if line.startswith('Total')]
    assert numbers([total]) == list(TABLES[table]['total'].values())


def test_what_is_left_of_the_end_of_table_15(text):
    rows, total = TABLES['Table 15']['rows'][-4:], TABLES['Table 15']['total']
    whole = text[text.index('\n0.\n'):text.index('Table 16. Memory')]
    assert f'{"".join(r["function"] + ("" if r["function"] != "prob" else " ") + r["data"] for r in rows)}{total["data"]}' in whole
    assert numbers(whole.split('ImageNet')[0].split('\n')) == ['0', rows[-1]['params'], total['params']]


@pytest.mark.parametrize('table', ['Table 14', 'Table 15', 'Table 16'])
def test_headers_of_the_appendix(table, text): # one of them has become "MEN 10RY"
    assert f"RY:{TABLES[table]['header']}MB" in re.sub(r'\s', '', text)


@pytest.mark.parametrize('figure', PAPER['figures'])
def test_figures(figure, text):
    about = PAPER['figures'][figure]
    assert about['caption'] in text and str(about['classes']) in numbers([about['caption']])


@pytest.mark.parametrize('name', PAPER['text'])
def test_quotations(name, text):
    about, squeeze = PAPER['text'][name], lambda s: re.sub(r'\s+', ' ', s)
    assert squeeze(about['text']) in squeeze(text)
    values = [str(v) for k, v in about.items() if k not in ('where', 'text') for v in (v if isinstance(v, list) else [v])]
    words = {'six': '6', 'four': '4', 'five': '5'}
    assert set(values) <= set(numbers([about['text']])) | {n for w, n in words.items() if w in about['text']}


def test_every_number_of_a_layer_table_is_a_string_where_digits_matter():
    for table in ('Table 12', 'Table 13', 'Table 14', 'Table 15', 'Table 16'):
        for row in TABLES[table]['rows']:
            for k in ('params', 'data', 'total', 'memory', 'accuracy'): assert isinstance(row.get(k, ''), (str, type(None)))
