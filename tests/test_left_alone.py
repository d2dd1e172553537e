"Runs whose test images a search left alone, and that somebody asks for afterwards: they are evaluated, and no mean drops one silently."
import json

import nbformat, pytest
from imgexp.runs import Run
from imgexp.start import start_run

pytestmark = pytest.mark.usefixtures('project')
GIVEN = {'train': ['--size', '12', '--batch-size', '64'], 'transfer': ['--size', '32', '--arch', 'compact_resnet']}
SEARCH = {'IMGEXP_OBSERVER': 'operator:eq'}  # a search watches the run

def args(command, seed): return [command, *GIVEN[command], '--subset', '0.1', '--epochs', '1', '--track', 'off', '--seed', str(seed)]
def result(run): return (run.metrics.get('test') or {}).get('top1')

def searched(launcher, project, *args):
    job = launcher.imgexp(*args, root=project, **SEARCH)
    assert job.wait() == 0, job.err
    run, = [Run(d) for d in (project/'runs').glob('2*')]
    assert run.finished and run.metrics['test'] is None and 'valid' in run.metrics
    return run

@pytest.mark.parametrize('command', GIVEN)
def test_seeds(launcher, project, command):
    "The mean is that of all seeds, the trial of a search among them, whose metrics gain what was missing; it is trained once."
    trial = searched(launcher, project, *args(command, 4))
    job = launcher.imgexp(*args(command, 3), '--seeds', '3', root=project)
    assert job.wait() == 0, job.err
    runs = sorted((Run(d) for d in (project/'runs').glob('2*')), key=lambda r: r.params['seed'])
    assert [r.params['seed'] for r in runs] == [3, 4, 5] and runs[1].name == trial.name and trial.status['continued'] == 0
    values = [result(r)['value'] for r in runs]
    assert result(trial)['n'] == result(runs[0])['n'] == 359
    mean = next(l for l in job.out.splitlines() if l.startswith('mean'))
    assert float(mean.split()[-1]) == pytest.approx(sum(values)/3, abs=1e-4) and '3 seeds, 360 valid, 359 test' in mean
    job = launcher.imgexp('eval', trial.name, '--json', root=project)
    assert job.wait() == 0 and json.loads(job.out)['top1'] == result(trial)

@pytest.mark.parametrize('command', GIVEN)
def test_one_run(launcher, project, command):
    "A single run that is reused tells a test accuracy, too; a search that reuses it still leaves it alone."
    trial = searched(launcher, project, *args(command, 4))
    assert launcher.imgexp(*args(command, 4), '--resume', 'reuse', root=project, **SEARCH).wait() == 0 and result(trial) is None
    job = launcher.imgexp(*args(command, 4), '--resume', 'reuse', root=project)
    assert job.wait() == 0 and 'test top1' in job.out and result(trial)['n'] == 359, job.err

NOTEBOOK = """from imgexp.params import params
from imgexp.train import train
train(size=12, batch_size=64, subset=0.1, epochs=1, track='off', **params())"""

def test_batch(launcher, project):
    "The plan says so, the notebook evaluates it, and it is done once."
    trial = searched(launcher, project, *args('train', 4))
    cells = [nbformat.v4.new_code_cell("seed: int = 0\nresume: str = 'auto'", metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(NOTEBOOK)]
    kernel = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python 3'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project/'03_train.ipynb')
    job = launcher.imgexp('batch', '03_train.ipynb', '-p', 'seed', '4', '--json', root=project)
    assert job.wait() == 0 and '1 finished by a sweep, to be evaluated on the test images' in job.err, job.err
    row, = json.loads(job.out)
    assert row['run'] == trial.name and row['test_top1'] == pytest.approx(result(trial)['value'], abs=1e-4)
    job = launcher.imgexp('batch', '03_train.ipynb', '-p', 'seed', '4', '--dry-run', root=project)
    assert job.wait() == 0 and '1 job: 1 finished' in job.err

def test_a_mean_says_of_how_many(project):
    "Where a value is missing all the same, the foot of the table tells of how many seeds the mean is."
    from imgexp.seeds import summarize_seeds
    def top1(v, n): return {'top1': {'value': v, 'low': 0, 'high': 1, 'n': n}}
    metrics = [{'valid': top1(0.5, 10), 'test': None}, {'valid': top1(0.7, 10), 'test': top1(0.6, 20)}, {'valid': top1(0.6, 9), 'test': top1(0.8, 20)}]
    runs = [start_run('demo', dict(seed=s, track='off')).finish(m) for s, m in enumerate(metrics)]
    table = summarize_seeds(runs)
    assert table.loc['mean', 'run'] == '3 seeds, 9 to 10 valid, 20 test (of 2 seeds only)'
    assert table.loc['mean', 'test_top1'] == pytest.approx(0.7)
