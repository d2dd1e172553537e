"Sweeps over machines that go, come back under another name, or wake up late: every trial ends, once, and the sweep with it."
import json, os, signal, sys, time

import psutil, pytest
from launch import kill, until
from test_sweep import PROGRAM, make, paths, with_values
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')

# every process imports this first: a machine with a name of its own, and a beat that a test can wait for
CUSTOM = '''
import os, socket
if 'TEST_MACHINE' in os.environ:
    import imgexp.environment as e
    e.machine_id = lambda: os.environ['TEST_MACHINE']
    import imgexp.runs as r
    r.BEAT, r.STALE = float(os.environ['TEST_BEAT']), float(os.environ['TEST_STALE'])
    socket.gethostname = lambda: os.environ['TEST_HOST']
'''

@pytest.fixture
def place(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setenv('PYTHONPATH', paths(project))
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.delitem(sys.modules, 'program', raising=False)
    (project/'program.py').write_text(PROGRAM)
    (project/'sitecustomize.py').write_text(CUSTOM)
    return project

def on(machine, launcher, place, *args, host='', beat=0.2, stale=60.):
    env = dict(PYTHONPATH=os.environ['PYTHONPATH'], TEST_MACHINE=machine, TEST_HOST=host or machine, TEST_BEAT=str(beat), TEST_STALE=str(stale))
    return launcher.python('-m', 'imgexp.cli', 'sweep', *args, root=place, **env)

def processes(job): return [p.pid for p in psutil.Process(job.pid).children(recursive=True)] + [job.pid]
def kill_all(job):
    for pid in processes(job): kill(pid)
    job.wait()

def under_way(sweep, epochs=2):
    until(lambda: any(len(t.intermediate_values) >= epochs for t in sweep.trials()), 'a trial to be under way')

def test_a_restarted_container(launcher, place):
    "The same machine under another name: its trial goes on at once, since its lock is free, however young its last beat is."
    sweep = make(with_values(wait=0.1, epochs=6), trials=2)
    job = on('box', launcher, place, 'run', 's', '--jobs', '1', host='container-1')
    under_way(sweep)
    kill_all(job)
    job = on('box', launcher, place, 'run', 's', '--jobs', '1', host='container-2')
    assert job.wait(30) == 0, job.err
    assert [r['state'] for r in sweep.rows()] == ['done']*2 and (sweep.dir/'best.json').exists()
    assert '1 trial to run, 1 to continue' in job.err and len(list((place/'runs').glob('2*'))) == 2

def test_another_machine_goes_on(launcher, place):
    "What a machine that is gone left is waited for until it cannot live any more, and then gone on with: best.json, and the best trial evaluated on the test images."
    values = dict(size=12, batch_size=16, subset=0.2, epochs=4, workers=0, track='off')
    sweep = make({'method': 'random', 'program': '03_train', 'metric': {'name': 'val_loss'}, 'parameters': {k: {'value': v} for k, v in values.items()} | {'seed': {'min': 0, 'max': 99}}}, trials=1)
    job = on('gone', launcher, place, 'run', 's', '--jobs', '1', stale=3.)
    under_way(sweep, 1)
    kill_all(job)
    job = on('other', launcher, place, 'run', 's', '--jobs', '1', stale=3.)
    assert job.wait() == 0, job.err
    row, = sweep.rows()
    assert row['state'] == 'done' and row['trained'] == 4 and Run(place/'runs'/row['run']).status['continued'] == 1
    best = json.loads((sweep.dir/'best.json').read_text())
    assert best['run'] == row['run'] and best['test']['top1']['n'] == 359

def test_a_living_machine_is_left_alone(launcher, place, monkeypatch):
    "Its beat tells, longer than a machine without one would be waited for."
    from imgexp.study import Sweep
    monkeypatch.setattr('imgexp.claims.STALE', 2.)
    sweep = make(with_values(wait=0.4, epochs=14), trials=1)
    first = on('one', launcher, place, 'run', 's', '--jobs', '1', stale=2.)
    under_way(sweep)
    assert sweep.attr(0, 'owner')['machine'] == 'one'
    (sweep.dir/'locks'/'0').rename(sweep.dir/'locks'/'seen')  # a lock that cannot be seen from the other machine
    (sweep.dir/'locks'/'0').touch()
    while len(sweep.trial(0).intermediate_values) < 12:
        assert Sweep(sweep.dir).abandoned() == []
        time.sleep(0.1)
    assert first.wait() == 0 and [r['state'] for r in sweep.rows()] == ['done']

@pytest.mark.parametrize('storage', ['journal', 'database'])
def test_a_machine_that_wakes_up(launcher, place, tmp_path, storage):
    "Suspended, its trial taken over and ended by another machine: it writes nothing more of it, says so, and goes on. Over a database without a common folder, too."
    roots = [place, place] if storage == 'journal' else [place, tmp_path/'second']
    url = 'journal' if storage == 'journal' else f'sqlite:///{tmp_path/"shared.db"}'
    roots[1].mkdir(exist_ok=True)
    config = with_values(wait=0.3, epochs=8)
    sweeps = []
    for root in roots:
        os.environ['IMGEXP_ROOT'] = str(root)
        sweeps.append(make(config, trials=1, storage=url))
    os.environ['IMGEXP_ROOT'] = str(place)
    asleep = on('asleep', launcher, roots[0], 'run', 's', '--jobs', '1', stale=2.)
    under_way(sweeps[0])
    for pid in processes(asleep): os.kill(pid, signal.SIGSTOP)
    if storage == 'journal':  # the file system gives its locks back, as a server does
        for lock in [sweeps[0].dir/'locks'/'0', *(place/'runs').glob('2*/lock')]: lock.unlink()
        for lock in ('lock', 'journal.log.lock'): (sweeps[0].dir/lock).unlink(missing_ok=True)  # if it was stopped while it held one
    awake = on('awake', launcher, roots[1], 'run', 's', '--jobs', '1', stale=2.)
    assert awake.wait() == 0, awake.err
    before = sweeps[1].trial(0)
    assert before.state.name == 'COMPLETE' and len(before.intermediate_values) == 8 and before.user_attrs['owner']['host'] == 'awake'
    for pid in processes(asleep): os.kill(pid, signal.SIGCONT)
    assert asleep.wait() == 0, asleep.err
    assert 'taken over by process' in asleep.err and 'on awake after this process missed its heartbeats' in asleep.err
    after = sweeps[1].trial(0)
    assert (after.state, after.values, after.user_attrs) == (before.state, before.values, before.user_attrs) and len(sweeps[1].trials()) == 1
