"What experiments keep: a result that grows by further runs, and says which commit made which of them."
import json

import pandas as pd
import pytest

from hdfast.experiments import caption, earlier_result, load_result, provenance, save_result

WANTED = dict(dataset='caltech101', seed=0, epochs=3, how='paper', variants=['a', 'b'])


def made(sha): return provenance('smoke') | dict(git_sha=sha, git_dirty=False)


def keep(folder, rows, about, runs): save_result(folder, 'r', pd.DataFrame(rows), pd.DataFrame(rows), about | dict(parameters=WANTED | dict(runs=runs)))


def rows_of(*folds): return [dict(run=f'fold {i}', model=m, FC=i + .5) for i in folds for m in 'ab']


def test_without_an_earlier_result_there_is_nothing(tmp_path):
    assert earlier_result('', 'r', WANTED | dict(runs=2), made('x')) == ([], dict(provenance=made('x')))
    with pytest.raises(FileNotFoundError, match="r hasn't been run"): earlier_result(tmp_path, 'r', WANTED | dict(runs=2), made('x'))


def test_a_result_grows_twice_and_every_run_keeps_its_commit(tmp_path):
    keep(tmp_path, rows_of(0), dict(provenance=made('first'), diverged=['something']), 1)
    for sha, there, runs in (('second', 1, 3), ('third', 3, 4)):
        rows, about = earlier_result(tmp_path, 'r', WANTED | dict(runs=runs), made(sha))
        assert rows == rows_of(*range(there)) and about['diverged'] == ['something']
        keep(tmp_path, rows + rows_of(*range(there, runs)), about, runs)
    about = load_result(tmp_path, 'r')[1]
    assert [(e['git_sha'], e['runs']) for e in about['provenance']['earlier']] == [('first', ['fold 0']), ('second', ['fold 1', 'fold 2'])]
    assert caption(about).endswith('commit third; fold 0 by first; fold 1, fold 2 by second')
    assert json.loads((tmp_path/'r.json').read_text())['provenance']['git_sha'] == 'third'


@pytest.mark.parametrize('change, message', [(dict(epochs=4), 'made with epochs 3, not 4'), (dict(variants=['a']), r"made with variants \['a', 'b'\], not"),
    (dict(how='one_cycle'), "how 'paper', not 'one_cycle'"), (dict(runs=2), 'has fold 0, fold 1: nothing to go on from'), (dict(dataset='cifar100'), 'nothing to go on from for seed 0')])
def test_only_runs_made_in_the_same_way_are_taken(tmp_path, change, message):
    keep(tmp_path, rows_of(0, 1), dict(provenance=made('x')), 2)
    with pytest.raises(ValueError, match=message): earlier_result(tmp_path, 'r', WANTED | dict(runs=3) | change, made('y'))


@pytest.mark.parametrize('what, other', [('profile', 'cpu'), ('device', 'abacus'), ('arithmetic', 'float16')])
def test_other_circumstances_are_refused(tmp_path, what, other):
    keep(tmp_path, rows_of(0), dict(provenance=made('x')), 1)
    with pytest.raises(ValueError, match=f'made with {what}'): earlier_result(tmp_path, 'r', WANTED | dict(runs=2), made('y') | {what: other})


def test_runs_that_do_not_begin_with_the_first_are_refused(tmp_path):
    keep(tmp_path, rows_of(1), dict(provenance=made('x')), 1)
    with pytest.raises(ValueError, match='has fold 1: nothing to go on from for fold 0, fold 1'): earlier_result(tmp_path, 'r', WANTED | dict(runs=2), made('y'))
