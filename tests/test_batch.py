"Batches as real processes: killed, stopped, repeated; no run twice, nothing lost."
import json, signal
from pathlib import Path

import nbformat, pytest
from launch import last_line, until
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')

SLOW_JOB = '''
import os, signal, time
from pathlib import Path
def work(name, seconds=0, deaths=0):
    "Takes so long; kills its own process the first `deaths` times"
    with open('began', 'a') as f: f.write(f'{name}\\n')
    if open('began').read().split().count(name) <= deaths: os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end: time.sleep(0.02)
    except KeyboardInterrupt:
        Path(f'{name}.stopped').touch()
        raise
    return name
'''

@pytest.fixture
def jobs(project, monkeypatch):
    "Makes jobs of a module that workers find in the working folder"
    from imgexp.workers import Job
    monkeypatch.chdir(project)
    (project/'slow_job.py').write_text(SLOW_JOB)
    return lambda *many: [Job('slow_job:work', values, values['name']) for values in many]

def began(): return Path('began').read_text().split() if Path('began').exists() else []

def test_results_come_in_order(jobs):
    from imgexp.workers import run_jobs
    found = run_jobs(jobs(dict(name='a', seconds=0.5), dict(name='b'), dict(name='c')), n=2)
    assert [r.value for r in found] == ['a', 'b', 'c'] and {r.state for r in found} == {'done'}

def test_a_worker_that_dies_is_replaced(jobs):
    from imgexp.workers import run_jobs
    found = run_jobs(jobs(dict(name='a', deaths=2), dict(name='b', deaths=3), dict(name='c')), n=2)
    assert [r.state for r in found] == ['done', 'failed', 'done']
    assert found[1].error.startswith('its process was killed by SIGKILL')
    assert began().count('a') == 3 and began().count('b') == 3

def test_workers_go_when_the_parent_is_killed(launcher, jobs, project):
    "They stop as if asked to: a training would write a checkpoint."
    jobs()
    code = 'import sys; sys.path.insert(0, "."); from imgexp.workers import Job, run_jobs; run_jobs([Job("slow_job:work", dict(name=n, seconds=60)) for n in "ab"], n=2)'
    job = launcher.python('-c', code, root=project)
    until(lambda: len(began()) == 2, 'both jobs to begin')
    job.send(signal.SIGKILL)
    until(lambda: all(Path(f'{n}.stopped').exists() for n in 'ab'), 'the workers to stop')

PARAMETERS = "rate: float = 0.1  # any\nseed: int = 0  # any\nsteps: int = 2  # of a fifth of a second\nresume: str = 'auto'  # or reuse"
EXPERIMENT = '''
import time
from imgexp.params import *
from imgexp.start import *
p = params()
run = start_run('demo', p | {'track': 'off'})
if not run.finished:
    for step in range(len(run.history), p.steps):
        time.sleep(0.2)
        run.log(dict(epoch=step + 1, step=step + 1, train_loss=p.rate))
    value = 1 - 0.1/p.rate
    run.finish({'test': {'top1': {'value': value, 'low': 0, 'high': 1, 'n': 10}}, 'seconds': 0.2*p.steps})
'''

@pytest.fixture
def demo(project):
    "An experiment that fails where rate is 0"
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(EXPERIMENT)]
    kernel = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python 3'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project/'demo.ipynb')
    return project

def batch(launcher, root, *args): return launcher.python('-m', 'imgexp.cli', 'batch', 'demo.ipynb', *args, root=root)
def found(root): return [Run(d) for d in sorted((root/'runs').glob('2*')) if d.is_dir()]

def test_only_what_failed_is_run_again(launcher, demo):
    grid = ['-p', 'rate', '0.5,0', '-p', 'seed', '0,1', '--jobs', '2']
    job = batch(launcher, demo, *grid, '--json')
    assert job.wait() == 1, job.err
    rows = json.loads(job.out)
    assert [(r['rate'], r['seed'], r['state']) for r in rows] == [(0.5, 0, 'done'), (0.5, 1, 'done'), (0.0, 0, 'failed'), (0.0, 1, 'failed')]
    assert 'ZeroDivisionError' in rows[2]['error'] and rows[0]['test_top1'] == 0.8
    assert sorted(r.state for r in found(demo)) == ['done', 'done', 'failed', 'failed']
    assert all((r.dir/'notebook.ipynb').exists() for r in found(demo)) and not list((demo/'runs').glob('.*demo*'))
    again = batch(launcher, demo, *grid)
    assert again.wait() == 1 and '2 finished, 2 failed (--retry runs them again)' in again.err
    before = {r.name: r.status['beat'] for r in found(demo)}
    assert batch(launcher, demo, *grid, '--retry').wait() == 1
    assert {r.name for r in found(demo) if r.status['beat'] != before[r.name]} == {r.name for r in found(demo) if r.state == 'failed'}

def test_asked_to_stop(launcher, demo):
    "SIGTERM reaches the kernels; the same command goes on where they stopped."
    slow = ['-p', 'steps', '50', '-p', 'seed', '0,1,2', '--jobs', '2']
    job = batch(launcher, demo, *slow)
    until(lambda: len(found(demo)) == 2 and all(len(r.history) > 2 for r in found(demo)), 'two runs to be under way')
    job.send(signal.SIGTERM)
    assert job.wait() == 75, job.err
    assert last_line(job.err) == 'terminated; the same command continues'
    assert [r.state for r in found(demo)] == ['stopped', 'stopped']
    steps = [len(r.history) for r in found(demo)]
    assert batch(launcher, demo, *slow).wait() == 0
    assert [r.state for r in found(demo)] == ['done']*3 and [list(r.history.step) for r in found(demo)] == [list(range(1, 51))]*3
    assert max(steps) < 50

def test_a_killed_worker_and_its_kernel(launcher, demo):
    "The batch goes on without them, and the run with its history."
    import psutil
    job = batch(launcher, demo, '-p', 'steps', '30')
    until(lambda: found(demo) and len(found(demo)[0].history) > 2, 'the run to be under way')
    worker, = psutil.Process(job.pid).children()
    for p in (*worker.children(recursive=True), worker): p.kill()
    assert job.wait() == 0, job.err
    run, = found(demo)
    assert run.state == 'done' and list(run.history.step) == list(range(1, 31)) and run.status['continued'] == 1

def test_two_machines_whose_processes_have_the_same_number(launcher, demo):
    "As in two containers: each job is credited with its own run, and has its own notebook."
    code = """import json, os, sys
os.getpid = lambda: 1
from imgexp.notebooks import execute
print(json.dumps([execute('demo.ipynb', {'seed': s, 'steps': 4}) for s in map(int, sys.argv[1:])]))"""
    jobs = {seeds: launcher.python('-c', code, *seeds, root=demo) for seeds in [(31, 33), (32, 34)]}
    for seeds, job in jobs.items():
        assert job.wait() == 0, job.err
        runs = [Run(told['run']) for told in json.loads(job.out)]
        assert [r.params['seed'] for r in runs] == list(seeds) and [r.state for r in runs] == ['done']*2
        for r in runs: assert f'seed = {r.params["seed"]}' in (r.dir/'notebook.ipynb').read_text()

def test_dry_run(launcher, demo):
    job = batch(launcher, demo, '-p', 'seed', '0,1', '--dry-run')
    assert job.wait() == 0 and '2 jobs: 2 to run\n' in job.err and not found(demo)
    assert batch(launcher, demo).wait() == 0
    job = batch(launcher, demo, '-p', 'seed', '0,1,2', '-p', 'steps', '2,20', '--dry-run', '--json')
    assert job.wait() == 0 and '6 jobs: 5 to run, 1 finished\n' in job.err
    assert [r['action'] for r in json.loads(job.out)] == ['reuse', *['run']*5] and len(found(demo)) == 1

@pytest.mark.parametrize('args, told', {
    'unknown parameter': (['demo.ipynb', '-p', 'rat', '1'], "unknown parameter 'rat': did you mean 'rate'?"),
    'wrong type': (['demo.ipynb', '-p', 'seed', '0,x'], "seed='x' is not a whole number"),
    'no values': (['demo.ipynb', '-p', 'seed'], '-p seed: give a name and its values'),
    'unknown notebook': (['03_trian'], "unknown notebook '03_trian': did you mean '03_train'?"),
    'no experiment': (['00g_runs'], 'has no cell with the tag "parameters"'),
    'no jobs': (['demo.ipynb', '--jobs', '0'], 'imgexp batch --help'),
    'value that is refused': (['10_keras_cnn', '-p', 'activation', 'relu,tanh', '--dry-run'], "activation='tanh' is not known: choose one of relu, silu, gelu, mish"),
    'half a list': (['demo.ipynb', '-p', 'seed', '[0,1'], "seed='[0,1' is not a valid JSON list"),
}.values())
def test_bad_input(launcher, demo, args, told):
    job = launcher.imgexp('batch', *args, root=demo)
    assert job.wait() == 2 and told in last_line(job.err), job.err
    assert 'Traceback' not in job.err and not found(demo)

def test_threads_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    from imgexp.workers import worker_environments
    assert [s['CUDA_VISIBLE_DEVICES'] for s in worker_environments(3, 8, ['0', '1'])] == ['0', '1', '0']
    assert {s['OMP_NUM_THREADS'] for s in worker_environments(3, 8, [])} == {'2'} and 'CUDA_VISIBLE_DEVICES' not in worker_environments(1, 8, [])[0]

def test_runs_of_another_notebook_are_not_taken(launcher, demo):
    "The name of one ends in the name of the other, and so do their runs'."
    (demo/'my-demo.ipynb').write_bytes((demo/'demo.ipynb').read_bytes().replace(b"start_run('demo'", b"start_run('my-demo'"))
    job = launcher.imgexp('batch', 'my-demo.ipynb', '-p', 'seed', '0', root=demo)
    assert job.wait() == 0, job.err
    job = batch(launcher, demo, '-p', 'seed', '0', '--dry-run')
    assert job.wait() == 0 and '1 job: 1 to run' in job.err, job.err

def test_a_point_that_another_process_runs(launcher, demo):
    "It is planned as such and tried last: it fails with that reason while the other lives, and is reused or continued after."
    first = batch(launcher, demo, '-p', 'steps', '400')
    until(lambda: [r for r in found(demo) if r.state == 'running' and len(r.history)], 'a run')
    job = batch(launcher, demo, '-p', 'steps', '400,1')
    assert job.wait() == 1 and '2 jobs: 1 to run, 1 running in another process' in job.err, job.err
    lines = [l for l in job.err.splitlines() if l[:2] in ('1/', '2/')]
    assert 'steps=1:' in lines[0] and 'belongs to process' in lines[1], job.err
    first.send(signal.SIGTERM)
    assert first.wait() == 75 and sorted(r.state for r in found(demo)) == ['done', 'stopped']

def test_equal_points_and_long_values(launcher, demo):
    "Values are compared after their conversion; a value may be longer than any file name."
    job = batch(launcher, demo, '-p', 'rate', '0.1,1e-1,0.2', '-p', 'resume', 'auto', '--dry-run')
    assert job.wait() == 0 and '2 jobs' in job.err, job.err
    job = launcher.imgexp('batch', '03_train', '-p', 'classes', json.dumps([','.join(f'n{k:08d}' for k in range(30))]), '--dry-run', root=demo)
    assert job.wait() == 0 and '1 job: 1 to run' in job.err, job.err

def test_the_last_line_of_a_dead_process_is_its_own(project):
    "Not that of the job which the same process had run before."
    from imgexp.workers import Job, run_jobs
    failed, died = run_jobs([Job('statistics:mean', {'data': []}), Job('os:_exit', {'status': 3})], 1, tries=1)
    assert failed.error.startswith('statistics.StatisticsError') and died.error == 'its process ended with status 3'
