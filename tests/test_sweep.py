"Sweeps as real processes: killed, stopped, failing, on other storages; every trial once, nothing lost."
import json, os, random, signal, sys, threading, time, types
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launch import kill, last_line, until
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')

PROGRAM = '''
import os, signal, time
from pathlib import Path
from imgexp.start import start_run
def measure(x, kind='a', epochs=3, wait=0., deaths=0, fails=False):
    "A training that takes so long an epoch, and dies so often in its second one"
    if fails and not Path('mended').exists(): raise ValueError('nobody mended it')
    run = start_run('measured', dict(x=x, kind=kind, epochs=epochs, track='off', resume='reuse'))
    if run.finished: return run
    for epoch in range(len(run.history), epochs):
        time.sleep(wait)
        run.log(dict(epoch=epoch + 1, step=epoch + 1, valid_loss=(x - 0.3)**2 + (kind == 'a') + 1/(epoch + 1)))
        if epoch == 1 and run.status['continued'] < deaths: os.kill(os.getpid(), signal.SIGKILL)
        if run.stop_reason: break
    return run.finish({})
def memory(x):
    import psutil
    return {'valid_loss': psutil.Process().memory_info().rss}
'''
BASE = {'method': 'random', 'metric': {'name': 'val_loss', 'goal': 'minimize'}, 'program': 'program:measure',
        'parameters': {'x': {'min': 0., 'max': 1.}, 'kind': {'values': ['a', 'b']}}}

def paths(place): return os.pathsep.join([str(place), *filter(None, [os.environ.get('PYTHONPATH')])])

@pytest.fixture
def place(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setenv('PYTHONPATH', paths(project))
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.delitem(sys.modules, 'program', raising=False)
    (project/'program.py').write_text(PROGRAM)
    return project

def make(config=BASE, name='s', **kw):
    from imgexp.sweep import make_sweep
    return make_sweep(config | {'name': name}, **kw)

def with_values(**values): return BASE | {'parameters': BASE['parameters'] | {k: {'value': v} for k, v in values.items()}}
def quietly(name='s', **kw):
    from imgexp.sweep import run_sweep
    return run_sweep(name, say=lambda text: None, **kw)
def outcome(sweep): return [(r['values'], r['value'], r['state']) for r in sweep.rows()]
def in_process(launcher, place, *args): return launcher.python('-m', 'imgexp.cli', 'sweep', *args, root=place, PYTHONPATH=os.environ['PYTHONPATH'])

def test_the_same_trials_whatever_the_number_of_workers(place):
    one, many = make(name='one', trials=12, seed=3), make(name='many', trials=12, seed=3)
    quietly('one', jobs=1), quietly('many', jobs=3)
    assert outcome(one) == outcome(many) and outcome(one) != outcome(quietly(make(name='other', trials=12, seed=4).name))
    assert len({json.dumps(r['values']) for r in one.rows()}) == 12

def test_a_grid_has_each_point_once(place):
    grid = BASE | {'method': 'grid', 'parameters': {'x': {'values': [0.1, 0.2, 0.1]}, 'kind': {'values': ['a', 'b', 'b']}}}
    sweep = make(grid)
    assert sweep.space.size == 4 and sweep.cap == 4
    quietly(jobs=2)
    assert [r['values'] for r in sweep.rows()] == [{'x': x, 'kind': k} for x in (0.1, 0.2) for k in 'ab']

def test_killed_workers_go_on(place):
    "Each trial's process is killed in its second epoch; the trial goes on, in the same run."
    sweep, calm = make(with_values(deaths=1), 's', trials=4), make(with_values(deaths=0), 'calm', trials=4)
    quietly(jobs=2)
    for run in map(Run, (place/'runs').glob('2*')):
        assert run.state == 'done' and run.status['continued'] == 1 and list(run.history.epoch) == [1, 2, 3]
    quietly('calm')
    assert [(v, s) for _, v, s in outcome(sweep)] == [(v, s) for _, v, s in outcome(calm)]
    assert len(sweep.trials()) == 4

@pytest.mark.parametrize('storage', ['journal', 'sqlite'])
def test_killed_altogether(launcher, place, storage):
    sweep = make(with_values(wait=0.15, epochs=10), trials=4, storage=storage)
    job = in_process(launcher, place, 'run', 's', '--jobs', '2')
    until(lambda: sum(len(t.intermediate_values) for t in sweep.trials()) > 6, 'two trials to be under way')
    job.send(signal.SIGKILL)
    job.wait()
    assert in_process(launcher, place, 'run', 's', '--jobs', '2').wait() == 0
    assert [r['state'] for r in sweep.rows()] == ['done']*4 and [r['trained'] for r in sweep.rows()] == [10]*4
    assert len(list((place/'runs').glob('2*'))) == 4, 'no trial was begun twice'
    assert all(list(Run(place/'runs'/r['run']).history.epoch) == list(range(1, 11)) for r in sweep.rows())

@pytest.mark.parametrize('seed', range(3))
def test_a_storm(launcher, place, seed):
    "Workers, the parent, or all of them are killed at random moments; nothing is lost, nothing is run twice."
    sweep, rng, kills = make(with_values(wait=0.15, epochs=8), trials=8), random.Random(seed), 0
    def progress(): return sum(len(t.intermediate_values) for t in sweep.trials())
    while True:
        before, job = progress(), in_process(launcher, place, 'run', 's', '--jobs', '2')
        until(lambda: progress() > before or job.ended(), 'an epoch, however slow the machine is')
        end = time.monotonic() + rng.uniform(0, 1)
        while time.monotonic() < end and not job.ended(): time.sleep(0.02)
        if job.ended() or kills == 6: break
        workers = psutil.Process(job.pid).children(recursive=True)
        victims = {'worker': workers[:1], 'parent': [psutil.Process(job.pid)], 'all': [psutil.Process(job.pid), *workers]}[rng.choice(['worker', 'parent', 'all'])]
        for v in victims: kill(v.pid)
        kills += 1
        if all(v.pid != job.pid for v in victims): job.send(signal.SIGTERM)
        job.wait()
    assert job.wait() == 0 and kills >= 2, job.err
    points = [sweep.point(k) for k in range(8)]
    assert [r['values'] for r in sweep.rows()] == points and {r['state'] for r in sweep.rows()} == {'done'}, [r['error'] for r in sweep.rows()]
    assert [r['value'] for r in sweep.rows()] == pytest.approx([(p['x'] - 0.3)**2 + (p['kind'] == 'a') + 1/8 for p in points])
    runs = [Run(p) for p in (place/'runs').glob('2*')]
    assert {r.name for r in runs} == {r['run'] for r in sweep.rows()} and len(runs) == 8
    assert all(list(r.history.epoch) == [*range(1, 9)] for r in runs)

def test_two_at_once_share_the_work(launcher, place):
    sweep = make(with_values(wait=0.1, epochs=5), trials=8)
    jobs = [in_process(launcher, place, 'run', 's', '--jobs', '1') for _ in range(2)]
    assert [j.wait() for j in jobs] == [0, 0], [j.err for j in jobs]
    own = [j.err.count(' done in ') for j in jobs]
    assert sum(own) == 8 and min(own) >= 2, own
    assert [r['values'] for r in sweep.rows()] == [sweep.point(k) for k in range(8)] and {r['state'] for r in sweep.rows()} == {'done'}
    assert len(list((place/'runs').glob('2*'))) == 8

FAILING = """
import os, signal
from imgexp.errors import InputError
def measure(how):
    if how == 'number': return {'valid_loss': float('nan')}
    if how == 'impossible': raise InputError('blocks=9: an image of 28 px has room for 4')
    if how == 'memory': raise MemoryError('cannot allocate 90 GiB')
    if how == 'killed': os.kill(os.getpid(), signal.SIGKILL)
    if how == 'error': raise RuntimeError('what went wrong')
    return {'valid_loss': 1.}
"""

def test_trials_that_fail_are_recorded_and_the_sweep_goes_on(launcher, place):
    (place/'failing.py').write_text(FAILING)
    hows = ['good', 'number', 'impossible', 'memory', 'killed', 'error', 'fine']
    sweep = make(BASE | {'method': 'grid', 'program': 'failing:measure', 'parameters': {'how': {'values': hows}}})
    job = in_process(launcher, place, 'run', 's', '--jobs', '1')
    assert job.wait() == 0, job.err
    rows = {r['values']['how']: r for r in sweep.rows()}
    told = {'number': 'reported no finite value of val_loss', 'impossible': 'InputError: blocks=9: an image of 28 px has room for 4',
            'memory': 'MemoryError: cannot allocate 90 GiB', 'killed': 'its process died three times without finishing another epoch', 'error': 'RuntimeError: what went wrong'}
    assert {k: r['state'] for k, r in rows.items()} == {k: 'failed' if k in told else 'done' for k in hows}
    for k, what in told.items(): assert what in rows[k]['error']
    assert json.loads((sweep.dir/'best.json').read_text())['values'] == {'how': 'good'}

def test_a_full_disk(launcher, disk, monkeypatch):
    "What cannot be written is tried again, then told; with room again the same command goes on."
    (disk.path/'program.py').write_text('import imgexp.journal\nimgexp.journal.PATIENCE = 2.\n' + PROGRAM)
    for k, v in {'IMGEXP_ROOT': disk.path, 'PYTHONPATH': paths(disk.path)}.items(): monkeypatch.setenv(k, str(v))
    monkeypatch.syspath_prepend(str(disk.path))
    monkeypatch.delitem(sys.modules, 'program', raising=False)
    sweep = make(with_values(wait=0.1, epochs=10), trials=3)
    def run(): return in_process(launcher, disk.path, 'run', 's', '--jobs', '1')
    job = run()
    until(lambda: len(sweep.trials()) and len(sweep.trials()[0].intermediate_values) > 2, 'a trial to be under way')
    disk.fill(0)
    assert job.wait() == 1 and 'No space left on device' in job.err and 'free some' in job.err, job.err
    (disk.path/'filler').unlink()
    job = run()
    assert job.wait() == 0, job.err
    assert [r['values'] for r in sweep.rows() if r['state'] == 'done'] == [sweep.point(k) for k in range(3)]

@pytest.mark.parametrize('storage', ['journal', 'sqlite'])
def test_a_locked_journal_is_waited_for_and_told(place, storage, monkeypatch):
    import sqlite3
    from filelock import FileLock
    from imgexp import journal
    from imgexp.study import Sweep
    sweep = make(trials=1, storage=storage)
    @contextmanager
    def locked():
        if storage == 'journal':
            with FileLock(sweep.dir/'journal.log.lock', is_singleton=False): yield
        else:
            db = sqlite3.connect(sweep.dir/'journal.db', check_same_thread=False)
            db.execute('begin immediate')
            try: yield
            finally: db.rollback(); db.close()
    monkeypatch.setattr(journal, 'PATIENCE', 0.5)
    patient = Sweep(sweep.dir)
    patient.set_attrs(patient.study.ask().number, a=1)
    with locked(), pytest.raises(journal.StorageFailed, match='lock.*the same command continues'): patient.set_attrs(0, a=2)
    monkeypatch.setattr(journal, 'PATIENCE', 30.)
    patient = Sweep(sweep.dir)
    with locked() as held:
        later = threading.Thread(target=patient.set_attrs, args=(0,), kwargs={'a': 3})
        later.start()
        time.sleep(0.5)
        assert later.is_alive()
    later.join(10)
    assert patient.attr(0, 'a') == 3

def test_asked_to_stop(launcher, place):
    sweep = make(with_values(wait=0.1, epochs=30), trials=3)
    job = in_process(launcher, place, 'run', 's', '--jobs', '2')
    until(lambda: sum(len(t.intermediate_values) > 1 for t in sweep.trials()) == 2, 'two trials to be under way')
    job.send(signal.SIGTERM)
    assert job.wait() == 75 and last_line(job.err) == 'terminated; the same command continues', job.err
    assert all(f'trial {k} (' in job.err for k in (0, 1)), 'told by their numbers'
    status = in_process(launcher, place, 'status', 's', '--json')
    assert status.wait() == 0 and '1 trial to run, 2 to continue' in status.err
    assert in_process(launcher, place, 'run', 's', '--jobs', '2').wait() == 0
    assert outcome(sweep) == outcome(quietly(make(with_values(wait=0., epochs=30), 'calm', trials=3).name)) or \
        [(v, s) for _, v, s in outcome(sweep)] == [(v, s) for _, v, s in outcome(quietly('calm'))]

def test_a_torn_line_of_the_journal(place):
    sweep = make(trials=5)
    quietly()
    journal = sweep.dir/'journal.log'
    whole = journal.read_bytes()
    for cut in (len(whole) - 7, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        from imgexp.trials import _open_sweep
        _open_sweep.cache_clear()
        again = quietly()
        assert [r['values'] for r in again.rows()] == [r['values'] for r in sweep.rows()]
        assert {r['state'] for r in again.rows()} == {'done'}

def test_three_failures_end_it_and_retry_repeats_them(place):
    from imgexp.errors import RunFailed
    from imgexp.sweep import retry_failed
    sweep = make(with_values(fails=True), trials=10)
    with pytest.raises(RunFailed, match='the first 3 trials failed, the last with: ValueError: nobody mended it; fix that'): quietly(jobs=1)
    assert [r['state'] for r in sweep.rows()] == ['failed']*3
    (place/'mended').touch()
    assert retry_failed(sweep) == 3 and retry_failed(sweep) == 0, 'each is repeated once'
    quietly(jobs=2)
    rows = sweep.rows()
    assert len(rows) == 13 and [r['state'] for r in rows[3:]] == ['done']*10
    assert [r['values'] for r in rows[3:6]] == [r['values'] for r in rows[:3]]
    assert [r['values'] for r in rows[6:]] == [sweep.point(k) for k in range(3, 10)], 'repeated trials do not count'

def test_a_common_cause_ends_it_although_another_trial_runs(place):
    sweep = make(trials=40)
    running, *failing = [sweep.ask() for _ in range(4)]
    for claim in failing:
        assert not sweep.end_reason()
        sweep.fail(claim.number, 'the same')
    assert sweep.end_reason() == 'the first 3 trials failed'
    sweep.report(running.number, 1, 0.5)
    assert not sweep.end_reason(), 'what has measured something does not fail like the others'

def test_a_run_that_was_killed_before_it_began_is_taken(place, monkeypatch):
    import program
    run = program.measure(x=0.5)
    for name in ('status.json', 'metrics.json', 'history.csv'): (run.dir/name).unlink()
    assert program.measure(x=0.5).name == run.name and [p.name for p in (place/'runs').glob('2*')] == [run.name]

def test_hyperband_ends_trials(place):
    early = with_values(epochs=9) | {'early_terminate': {'type': 'hyperband', 'min_iter': 1, 'eta': 3}}
    sweep = make(early, trials=12)
    quietly()
    ended = [r for r in sweep.rows() if r['state'] == 'ended early']
    assert ended and all(r['trained'] < 9 for r in ended) and sweep.best()['state'] == 'done' and sweep.best()['trained'] == 9
    assert all(len(Run(place/'runs'/r['run']).history) == r['trained'] for r in sweep.rows())

def test_successive_halving_and_bayes(place):
    early = with_values(epochs=9) | {'method': 'bayes', 'early_terminate': {'type': 'asha', 'min_iter': 1, 'eta': 3}}
    sweep = make(early, trials=25)
    quietly(jobs=2)
    states = [r['state'] for r in sweep.rows()]
    assert states.count('ended early') > 5 and sweep.best()['values']['kind'] == 'b' and abs(sweep.best()['values']['x'] - 0.3) < 0.2

def test_the_target_ends_it(place):
    sweep = make(BASE | {'metric': BASE['metric'] | {'target': 1.0}}, trials=50)
    quietly()
    assert len(sweep.trials()) < 50 and sweep.best()['value'] <= 1.0 and sweep.end_reason() == 'the target is reached' and sweep.remaining() > 0

def test_extended_and_stopped(place):
    from imgexp.sweep import extend_sweep, stop_sweep
    sweep = make(trials=2)
    quietly()
    extend_sweep(sweep, 3)
    quietly()
    assert [r['values'] for r in sweep.rows()] == [sweep.point(k) for k in range(5)]
    extend_sweep(sweep, 3)
    stop_sweep(sweep)
    from imgexp.trials import run_trial
    assert run_trial(str(sweep.dir)) == {'over': 'it was stopped'}

def test_the_same_point_twice_at_once(place):
    "They have the same run: one trains it, the other waits for it."
    (place/'program.py').write_text(PROGRAM.replace("resume='reuse'))", "resume='reuse'), wait=0.1)"))  # refused at once
    sweep = make(with_values(wait=0.1) | {'parameters': {'x': {'values': [0.5]}, 'wait': {'value': 0.2}}}, trials=4)
    quietly(jobs=2)
    assert [r['state'] for r in sweep.rows()] == ['done']*4 and len({r['value'] for r in sweep.rows()}) == 1
    assert len(list((place/'runs').glob('2*'))) == 1

def test_a_run_that_ended_early_is_not_taken_for_a_whole_one(place, monkeypatch):
    early = with_values(epochs=9) | {'early_terminate': {'type': 'hyperband', 'min_iter': 1, 'eta': 3}}
    sweep = make(early, trials=12)
    quietly()
    ended = next(r for r in sweep.rows() if r['state'] == 'ended early')
    import program
    whole = program.measure(**ended['values'])
    assert whole.name != ended['run'] and len(whole.history) == 9 and 'ended' not in whole.metrics

def test_memory_stays_flat(place):
    sweep = make(BASE | {'program': 'program:memory', 'parameters': {'x': {'min': 0., 'max': 1.}}}, trials=50)
    quietly()
    used = [r['value'] for r in sweep.rows()]
    assert max(used[10:]) < 1.05*used[10]

def test_through_wandb(place, monkeypatch):
    "A stand-in of the two calls: the sweep is made with the YAML's words, and each trial gets W&B's values."
    made, logged, configs = [], [], [{'x': 0.25, 'kind': 'b'}, {'x': 0.5, 'kind': 'a'}]
    class Own:
        def __init__(self): self.config = configs.pop(0)
        def __enter__(self): return self
        def __exit__(self, *_): pass
    fake = types.SimpleNamespace(sweep=lambda config, **kw: made.append((config, kw)) or 'abc', init=Own, log=logged.append,
                                 agent=lambda id, function, count, **kw: [function() for _ in range(2)])
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    from imgexp.sweep import run_on_wandb
    sweep = make(BASE | {'project': 'mine'}, trials=2)
    with pytest.raises(Exception, match='needs a login'): run_on_wandb(sweep)
    monkeypatch.setattr('imgexp.sweep.track_mode', lambda track: 'online')
    run_on_wandb(sweep, say=lambda text: None)
    assert made == [(sweep.config, {'project': 'mine'})] and [row['val_loss'] for row in logged][2] == pytest.approx((0.25 - 0.3)**2 + 1/3)
    assert 'IMGEXP_OBSERVER' not in os.environ

def test_a_look_does_not_change_which_sweep_is_the_last(launcher, place):
    make(name='old', trials=1); time.sleep(0.05); make(name='new', trials=1)
    assert in_process(launcher, place, 'status', 'old').wait() == 0
    from imgexp.study import find_sweep
    assert find_sweep().name == 'new'

def test_a_trial_too_many_is_no_failure(place):
    "Two machines asked for the last trial at once: the second one's is taken back."
    sweep = make(trials=1)
    number = sweep.study.ask().number
    sweep.set_attrs(number, surplus=True)
    sweep.fail(number, 'another process claimed the last trial')
    assert sweep.end_reason() == ''

def test_a_grid_has_no_more_trials_than_points(place):
    assert make({**BASE, 'method': 'grid', 'parameters': {'x': {'values': [0.1, 0.2, 0.3]}}}, trials=20).cap == 3

def test_a_corrected_sweep_is_another_one_at_wandb(place):
    sweep = make(trials=2)
    (sweep.dir/'wandb.json').write_text('{"id": "abc"}')
    make(with_values(epochs=5), trials=2)
    assert not (sweep.dir/'wandb.json').exists()

def test_a_trial_that_died_before_it_signed(place, monkeypatch):
    "On a database, where its lock need not be in sight: it is abandoned after the time of a missing heartbeat."
    monkeypatch.setattr('imgexp.claims.STALE', 0.2)
    sweep = make(trials=1, storage=f'sqlite:///{place}/shared.db')
    sweep.study.ask()
    assert sweep.abandoned() == []
    time.sleep(0.3)
    assert sweep.abandoned() == [0]

BAD = {
    'method': ({'method': 'bayse'}, "method='bayse' is not known: did you mean 'bayes'?"),
    'command': ({'command': ['python']}, 'command: trials are started by imgexp'),
    'unknown key': ({'metrics': {}}, "unknown key 'metrics': did you mean 'metric'?"),
    'test metric': ({'metric': {'name': 'test_top1', 'goal': 'maximize'}}, 'test images must not be used to choose'),
    'accuracy minimized': ({'metric': {'name': 'val_accuracy'}}, 'give goal: maximize'),
    'goal': ({'metric': {'name': 'val_loss', 'goal': 'min'}}, "metric.goal='min' is not known: choose one of minimize, maximize"),
    'distribution': ({'parameters': {'lr': {'distribution': 'loguniform', 'min': 1, 'max': 2}}}, "unknown distribution 'loguniform': did you mean"),
    'range': ({'parameters': {'lr': {'min': 2, 'max': 1}}}, 'parameter lr: min=2 must be below max=1'),
    'column': ({'parameters': {'x': {'value': 1}, 'kind': {'value': 'a'}}, 'metric': {'name': 'seconds', 'goal': 'minimize'}}, "'seconds' is a column of the table of trials"),
    'grid of a range': ({'method': 'grid'}, 'parameter x: a grid needs values'),
    'early_terminate': ({'early_terminate': {'type': 'envelope'}}, "early_terminate.type='envelope' is not known: choose one of hyperband, asha"),
    'unknown parameter': ({'program': '10_keras_cnn', 'parameters': {'filter': {'value': 3}}}, "unknown parameter 'filter': did you mean 'filters'?"),
    'wrong type': ({'program': '10_keras_cnn', 'parameters': {'filters': {'value': 'many'}}}, "filters='many' is not a whole number"),
    'value that is refused': ({'program': '10_keras_cnn', 'parameters': {'filters': {'values': [16, 0]}}}, 'filters=0'),
    'word that YAML reads as false': ({'program': '10_keras_cnn', 'parameters': {'track': {'value': False}}}, 'track=False is not text: YAML reads on, off, yes and no as true or false: put the word in quotes'),
    'parameter of sweeps only': ({'program': '10_keras_cnn', 'parameters': {'trials': {'value': 3}}}, "unknown parameter 'trials'"),
    'python file': ({'program': 'train.py'}, "program='train.py': give an experiment like 10_keras_cnn"),
    'unknown program': ({'program': '10_keras_cn'}, "unknown notebook '10_keras_cn': did you mean '10_keras_cnn'?"),
    'no function': ({'program': 'program:meusure'}, "program='program:meusure'"),
    'run_cap': ({'run_cap': 0}, 'run_cap=0 is not a whole number of at least 1'),
    'nothing varies': ({'parameters': {}}, 'parameters is missing or empty'),
}
@pytest.mark.parametrize('changed, told', BAD.values(), ids=BAD)
def test_what_cannot_be_honoured_is_refused_by_name(launcher, place, changed, told):
    (place/'s.yaml').write_text(json.dumps(BASE | changed))
    job = launcher.imgexp('sweep', 'init', 's.yaml', root=place, before='import sys; sys.path.insert(0, ".")')
    assert job.wait() == 2 and told in last_line(job.err), job.err
    assert not (place/'runs'/'sweeps').exists() or not list((place/'runs'/'sweeps').iterdir())

def test_wrong_words(launcher, place):
    make(trials=1)
    (place/'torn.yaml').write_text('method: [')
    for args, told, status in ((['init', 'no.yaml'], 'no.yaml cannot be read', 2), (['init', 'torn.yaml'], 'torn.yaml is not valid YAML, line', 2),
                               (['run', 'sx'], "unknown sweep 'sx': did you mean 's'?", 2), (['run', 's.yaml'], 's.yaml is a file: give the name of a sweep', 2), (['run', 's', '--on', 'moon'], "on='moon' is not known: choose one of local, wandb", 2),
                               (['best', 's'], 'no trial has ended yet', 1), (['export', 's'], 'nothing to export', 2),
                               (['run', 's', '--jobs', '-1'], 'imgexp sweep run --help', 2)):
        job = launcher.imgexp('sweep', *args, root=place)
        assert job.wait() == status and told in last_line(job.err), job.err

def test_the_sweep_file_of_the_readme(place):
    text = (Path(__file__).resolve().parent.parent/'README.md').read_text().split('```yaml')[1].split('```')[0]
    (place/'sweep.yaml').write_text(text)
    from imgexp.sweep import make_sweep
    from imgexp.sweep_config import read_yaml
    sweep = make_sweep(read_yaml(place/'sweep.yaml'), name='s')
    assert (sweep.program, sweep.cap, sweep.varying) == ('10_keras_cnn', 20, ['lr', 'filters'])

def test_no_password_in_a_file(place):
    with pytest.raises(Exception, match='storage contains a password'): make(storage='postgresql://me:secret@host/db')
    with pytest.raises(Exception, match="storage='jurnal' is not known: did you mean 'journal'"): make(storage='jurnal')
    assert not (place/'runs'/'sweeps').exists() or not list((place/'runs'/'sweeps').iterdir())

def test_another_sweep_of_that_name(place):
    make(trials=2)
    assert make(trials=2).name == 's', 'the same one again'
    assert make(BASE | {'method': 'bayes'}, trials=2).config['method'] == 'bayes', 'nothing was measured yet'
    quietly()
    with pytest.raises(Exception, match='sweep s already exists with a different configuration: give --name'): make(BASE, trials=2)

def test_a_trial_at_its_last_epoch_is_done(place):
    sweep = make(with_values(epochs=3) | {'early_terminate': {'type': 'hyperband', 'min_iter': 3, 'eta': 3}}, trials=8)
    quietly()
    assert {r['state'] for r in sweep.rows()} == {'done'}

def test_every_value_of_a_list_is_checked_before_anything_runs(place):
    "Also the middle one of a list with probabilities."
    bad = {'method': 'random', 'program': '10_keras_cnn', 'parameters': {'filters': {'values': [16, 0, 32], 'probabilities': [0.4, 0.2, 0.4]}}}
    with pytest.raises(Exception, match='filters=0'): make(bad)
