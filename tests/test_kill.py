"Killed, stopped, interrupted, asked for twice: the run goes on where it was, and ends as if nothing had happened."
import json, os, re, signal, socket, time
from datetime import datetime, timedelta

import nbformat, pandas as pd, pytest
from launch import SLOW, TRAIN, environment, gone, kill, last_line, until
from pictures import CLASSES, tree

pytestmark = pytest.mark.usefixtures('project')
EPOCHS, BATCHES = 6, 8  # 160 images, a fifth of them for validation, 16 a batch
GIVEN = dict(size=12, epochs=EPOCHS, batch_size=16, augment='trivial', flip='alternating', mixup=0.2, cutmix=1.0, erase=0.25,
             ema=0.9, micro_batch=6, clip=1.0, label_smoothing=0.1, schedule='cosine', warmup=0.5, track='off')
VARIES = ['seconds', 'img_per_s', 'peak_mem_mb', 'checkpoint_mb', 'checkpoint_s']

def options(data, **more): return ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | {'data': data, 'workers': 0} | more).items())]
def injected(data): return [a for k, v in (GIVEN | {'data': data, 'workers': 0}).items() for a in ('-p', k, v)]

def runs_in(root): return sorted(d for d in (root/'runs').glob('*') if d.is_dir())
def the_run(root):
    found = runs_in(root)
    assert len(found) == 1, found
    return found[0]

def status(run):
    try: return json.loads((run/'status.json').read_text())
    except FileNotFoundError: return {}

def rows(root):
    "Epochs in the history of the only run, so far."
    for run in runs_in(root):
        if (run/'history.csv').exists(): return max(0, len((run/'history.csv').read_text().splitlines()) - 1)
    return 0

def committed(run):
    "What the last checkpoint holds: file name to sha-256, and the history without times."
    last = json.loads((run/'checkpoints/index.json').read_text())['last']
    files = json.loads((run/'checkpoints'/last/'COMMITTED.json').read_text())['files']
    return files['model.safetensors']['sha256'] + files['ema.safetensors']['sha256'], pd.read_csv(run/'history.csv').drop(columns=VARIES, errors='ignore')

def state(run):
    import torch
    last = json.loads((run/'checkpoints/index.json').read_text())['last']
    return torch.load(run/'checkpoints'/last/'state.pt', weights_only=True)

def same(run, other):
    "Bit-identical weights, the same history, each epoch once."
    (weights, history), (weights2, history2) = committed(run), committed(other)
    assert list(history.epoch) == list(range(1, EPOCHS + 1))
    pd.testing.assert_frame_equal(history, history2, check_exact=True)
    assert weights == weights2
    numbers = [json.loads((r/'metrics.json').read_text()) for r in (run, other)]
    for m in numbers: m.pop('seconds'); m.pop('img_per_s')
    assert numbers[0] == numbers[1]

def finish(job, root, other):
    assert job.wait() == 0, job.err
    run = the_run(root)
    assert status(run)['state'] == 'done' and not status(run)['error']
    same(run, other)
    assert not list((run/'checkpoints').glob('.*')), 'leftovers of a checkpoint'
    return run

@pytest.fixture(scope='module')
def data(tmp_path_factory): return tree(tmp_path_factory.mktemp('kill')/'data', 40, CLASSES)

@pytest.fixture(scope='module')
def undisturbed(launcher, data, tmp_path_factory):
    "The run that all others must equal."
    root = tmp_path_factory.mktemp('undisturbed')
    job = launcher.imgexp(*options(data), root=root)
    assert job.wait() == 0, job.err
    run = the_run(root)
    assert state(run)['parts']['schedule']['done'] == EPOCHS*BATCHES
    same(run, run)
    return run

# -- papermill

HOLD = '''
import os, sys, threading, time
def hold():
    while not hasattr(sys.modules.get('imgexp.loader'), 'Loader'): time.sleep(0.01)
    Loader, seen = sys.modules['imgexp.loader'].Loader, set()
    real = Loader.__iter__
    def batches(self):
        for batch in real(self):
            if self.split == 'train' and not isinstance(self.table.source, sys.modules['imgexp.data'].Pixels):
                seen.add((self.batches.epoch, self.batch))  # after an epoch some are shown again, to measure statistics
                if len(seen) == {after} + 1:
                    open('holding', 'w').write(str(os.getpid()))
                    while not os.path.exists('go'): time.sleep(0.02)
            yield batch
    Loader.__iter__ = batches
threading.Thread(target=hold, daemon=True).start()
'''

def hold(after): return HOLD.format(after=after)

def held(root, job):
    "Wait until the training waits for us; gives the number of the process that trains."
    def there():
        assert not job.ended(), job.err
        return (root/'holding').exists() and (root/'holding').read_text()
    pid = int(until(there, 'the training to be held'))
    (root/'holding').unlink()
    return pid

@pytest.fixture(scope='module')
def holding(tmp_path_factory):
    "A folder for PYTHONPATH with which every process waits for `go` in the middle of the third epoch that it trains."
    folder = tmp_path_factory.mktemp('holding')
    (folder/'sitecustomize.py').write_text(hold(2*BATCHES + 3))
    return folder

@pytest.fixture(scope='module', autouse=True)
def papermill(request, launcher, data, holding, tmp_path_factory):
    "The first of three starts: it takes many seconds until training begins, and so it begins before the other tests."
    if not any('papermill' in i.name for i in request.session.items if i.path == request.path): return
    root = tmp_path_factory.mktemp('papermill')
    return root, launcher.papermill(*injected(data), root=root, PYTHONPATH=str(holding))

# -- imgexp train

DIE = '''
import imgexp.setup as s
from imgexp.learner import StatefulCallback
class Die(StatefulCallback):
    "At a step of the training, do something."
    order = 70
    def after_batch(self):
        if self.learn.training and hasattr(self.learn, 'schedule') and self.schedule.done == {step} - 1 and not self.learn.first_epoch: {act}
real = s.make_learner
def make_learner(*args, **kw):
    learn = real(*args, **kw)
    learn.add_cb(Die())
    return learn
s.make_learner = make_learner
'''

def at(step, act): return DIE.format(step=step, act=act)

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('step', [3, 3*BATCHES + 4], ids=['before the first checkpoint', 'in the fourth epoch'])
def test_sigkill_of_imgexp_train(launcher, project, data, undisturbed, step, workers):
    args = options(data, workers=workers)
    job = launcher.imgexp(*args, root=project, before=at(step, 'os.kill(os.getpid(), signal.SIGKILL)'))
    assert job.wait() == -signal.SIGKILL
    assert rows(project) == step//BATCHES
    job = launcher.imgexp(*args, root=project)
    finish(job, project, undisturbed)
    assert (f'continuing {the_run(project).name} at epoch 4' in job.out) == (step > BATCHES)

def test_sigkill_after_a_checkpoint_within_an_epoch(launcher, project, data, undisturbed):
    act = ('self.learn.checkpoints.save(self.learn.epoch, self.learn.iter + 1); os.kill(os.getpid(), signal.SIGKILL)')
    job = launcher.imgexp(*options(data), root=project, before=at(2*BATCHES + 4, act))
    assert job.wait() == -signal.SIGKILL
    job = launcher.imgexp(*options(data), root=project)
    finish(job, project, undisturbed)
    assert f'continuing {the_run(project).name} at epoch 3, batch 4' in job.out

def test_sigkill_while_a_checkpoint_within_an_epoch_is_written(launcher, project, data, undisturbed):
    "Nobody writes that step again: what is left of it goes with the next checkpoint."
    act = "setattr(__import__('torch'), 'save', lambda *a: os.kill(os.getpid(), signal.SIGKILL)), self.learn.checkpoints.save(self.learn.epoch, self.learn.iter + 1)"
    job = launcher.imgexp(*options(data), root=project, before=at(2*BATCHES + 4, act))
    assert job.wait() == -signal.SIGKILL, job.err
    assert list((the_run(project)/'checkpoints').glob('.*'))
    finish(launcher.imgexp(*options(data), root=project), project, undisturbed)

@pytest.mark.parametrize('given', [dict(lr=0), dict(arch='squeezenet1_1', size=32)], ids=['LR finder', 'dropout'])
def test_sigkill_where_chance_matters(launcher, project, data, given):
    "The rate is found once, and kept; the generator that dropout draws from is put back."
    runs = []
    for name, before in (('killed', at(2*BATCHES + 2, 'os.kill(os.getpid(), signal.SIGKILL)')), ('whole', '')):
        root = project/name
        root.mkdir()
        args = options(data, **given | dict(epochs=3))
        job = launcher.imgexp(*args, root=root, before=before)
        if before:
            assert job.wait() == -signal.SIGKILL, job.err
            job = launcher.imgexp(*args, root=root)
        assert job.wait() == 0, job.err
        runs.append(the_run(root))
        assert ('lr=' in job.out) == (name == 'whole' and 'lr' in given)
    (weights, history), (weights2, history2) = map(committed, runs)
    pd.testing.assert_frame_equal(history, history2, check_exact=True)
    assert weights == weights2 and history.lr.max() > 0

def test_what_auto_meant_is_kept_and_a_change_of_threads_is_told(launcher, project, data):
    "Begun where `auto` is fp32 with two threads, continued where it would be bf16, with one: precision stays, threads are told."
    begin, go_on = (f'import imgexp.learner, torch; imgexp.learner._native_bf16 = lambda device: {bf16}; torch.set_num_threads({n})\n' for bf16, n in ((False, 2), (True, 1)))
    args = options(data, epochs=2)
    job = launcher.imgexp(*args, root=project, before=begin + at(BATCHES + 3, 'os.kill(os.getpid(), signal.SIGKILL)'))
    assert job.wait() == -signal.SIGKILL, job.err
    job = launcher.imgexp(*args, root=project, before=go_on + "import imgexp.setup as s; real = s.fit\ndef fit(run, learn, **kw): print('computes in', learn.precision); return real(run, learn, **kw)\ns.fit = fit\n")
    assert job.wait() == 0, job.err
    run = the_run(project)
    assert 'computes in fp32' in job.out and json.loads((run/'params.json').read_text())['resolved'] == {'precision': 'fp32', 'threads': 2}
    assert 'threads 2 before, 1 now' in job.err and 'precision' not in job.err
    assert [a['threads'] for a in json.loads((run/'env.json').read_text())['attempts']] == [2, 1]

@pytest.mark.parametrize('name', ['model.safetensors', 'state.pt', 'COMMITTED.json', 'index.json', 'history.csv'])
def test_sigkill_while_a_checkpoint_is_written(launcher, project, data, undisturbed, name):
    "At each of its files; what was half-written is passed over and cleared away."
    before = f'''
import imgexp.files, imgexp.runs, safetensors.torch as st, torch
from pathlib import Path
def die(path):
    if os.path.basename(path) == {name!r} and len(list(Path(path).parent.parent.glob('**/COMMITTED.json'))) >= 3:
        open(path, 'ab').write(b'half'); os.kill(os.getpid(), signal.SIGKILL)
def wrapped(f, which):
    def g(*args, **kw): die(getattr(args[which], 'name', args[which])); return f(*args, **kw)
    return g
st.save_file = wrapped(st.save_file, 1)
torch.save = wrapped(torch.save, 1)
imgexp.files.write_text = imgexp.runs.write_text = wrapped(imgexp.files.write_text, 0)
'''
    job = launcher.imgexp(*options(data), root=project, before=before)
    assert job.wait() == -signal.SIGKILL, job.err
    assert 1 <= rows(project) < EPOCHS
    if name in ('index.json', 'history.csv'):  # never written in place: here it is, so that reading it must cope
        file = next((project/'runs').glob(f'*/**/{name}'))
        file.write_bytes(file.read_bytes().removesuffix(b'half'))
    finish(launcher.imgexp(*options(data), root=project), project, undisturbed)

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_asked_to_stop(launcher, project, data, undisturbed, number):
    "At the next step a checkpoint is written; the state is `stopped`, the exit status 75."
    act = f'os.kill(os.getpid(), {int(number)})'
    job = launcher.imgexp(*options(data), root=project, before=at(BATCHES + 5, act))
    assert job.wait() == 75, job.err
    run = the_run(project)
    why = {signal.SIGINT: 'interrupted', signal.SIGTERM: 'terminated'}[number]
    assert status(run)['state'] == 'stopped' and status(run)['error'].startswith(why)
    assert last_line(job.err) == f'{why}; the same command continues' and 'Traceback' not in job.err
    s = state(run)
    assert s['epoch'] == 1 and s['batch'] in (5, 6) and s['parts']['schedule']['done'] == BATCHES + s['batch']
    job = launcher.imgexp(*options(data), root=project)
    finish(job, project, undisturbed)
    assert f'at epoch 2, batch {s["batch"] + 1}' in job.out

def test_a_signal_from_outside(launcher, project, data, undisturbed):
    "While a thread loads images."
    job = launcher.imgexp(*options(data, workers=1), root=project, before=hold(2*BATCHES + 3))
    assert held(project, job) == job.pid
    job.send(signal.SIGTERM)
    (project/'go').touch()
    assert job.wait() == 75, job.err
    run = the_run(project)
    assert status(run)['state'] == 'stopped' and 2 <= rows(project) < EPOCHS
    finish(launcher.imgexp(*options(data), root=project), project, undisturbed)

@pytest.mark.parametrize('where', ['load_learner', 'find_lr', 'predict'])
def test_asked_to_stop_outside_the_loop(launcher, project, data, undisturbed, where):
    "Before there is a run there is none to mark; while the LR finder or the evaluation is at work the run is `stopped`."
    args, module = options(data, lr=0 if where == 'find_lr' else 0.003), {'load_learner': 'train', 'predict': 'results'}.get(where)
    before = f'''
import imgexp.{module} as t
def {where}(*args, **kw): os.kill(os.getpid(), signal.SIGTERM); signal.pause()
t.{where} = {where}''' if where != 'find_lr' else '''
import imgexp.lr_finder as t
t._LRSweep.before_batch = lambda self: os.kill(os.getpid(), signal.SIGTERM)'''
    job = launcher.imgexp(*args, root=project, before=before)
    assert job.wait() == 75, job.err
    assert last_line(job.err).startswith('terminated')
    if where == 'load_learner': return
    assert status(the_run(project))['state'] == 'stopped'
    if where == 'predict': finish(launcher.imgexp(*args, root=project), project, undisturbed)

# -- in Lab

def test_interrupting_the_kernel(project, data, holding, undisturbed):
    "The stop button: the cell ends, the state is `stopped`, a checkpoint is kept; the cell run again continues."
    from jupyter_client.manager import start_new_kernel
    cells = [c for c in nbformat.read(TRAIN, 4).cells if c.cell_type == 'code']
    first = next(i for i, c in enumerate(cells) if 'parameters' in c.metadata.get('tags', []))
    given = '\n'.join(f'{k} = {v!r}' for k, v in (GIVEN | {'data': str(data), 'workers': 0}).items())
    names = 'import imgexp.train; globals().update(vars(imgexp.train))'
    imports = [c.source for c in cells[:first] if re.search(r'(?m)^(import|from) ', c.source) and '#| export' not in c.source]
    manager, client = start_new_kernel(kernel_name='python3', env=environment(project, PYTHONPATH=str(holding)), cwd=str(project))
    try:
        def once(source): return client.execute_interactive(source, timeout=SLOW, output_hook=lambda m: None)['content']
        def run(source):  # for a moment after an error the kernel turns down what it is asked
            return until(lambda: (found := once(source))['status'] != 'aborted' and found, 'the kernel to take a cell')
        for source in (names, *(i for i in imports if 'get_ipython' not in i), cells[first].source, f'# Parameters\n{given}'):
            found = run(source)
            assert found['status'] == 'ok', found
        rest = [c.source for c in cells[first + 1:] if 'project.cleanup' not in c.source]
        training = next(i for i, c in enumerate(rest) if re.search(r'(?m)^best = fit_run\(', c))
        for source in rest[:training]:
            found = run(source)
            assert found['status'] == 'ok', found
        client.execute(rest[training])
        until((project/'holding').exists, 'two epochs')
        manager.interrupt_kernel()
        (project/'go').touch()
        reply = client.get_shell_msg(timeout=SLOW)['content']
        assert (reply['status'], reply['ename']) == ('error', 'Stopped'), reply
        folder = the_run(project)
        assert status(folder)['state'] == 'stopped' and status(folder)['error'].startswith('interrupted')
        assert list((folder/'checkpoints').glob('step-*/COMMITTED.json')) and rows(project) < EPOCHS
        for source in rest[training:]:
            found = run(source)
            assert found['status'] == 'ok', found
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert status(folder)['state'] == 'done'
    same(folder, undisturbed)

# -- who has the run

def test_two_ask_at_once(launcher, project, data, undisturbed):
    "One gets the run; the other is told who has it."
    before = 'from functools import partial; imgexp.setup.start_run = partial(imgexp.setup.start_run, wait=0.5)\n'
    hold = 'import time; real_fit = imgexp.setup.fit\ndef fit(*a, **k):\n  while not os.path.exists("go"): time.sleep(.05)\n  return real_fit(*a, **k)\nimgexp.setup.fit = fit'
    jobs = [launcher.imgexp(*options(data), root=project, before=before + hold) for _ in range(2)]
    until(lambda: any(j.ended() for j in jobs), 'one to be told')
    loser, winner = sorted(jobs, key=lambda j: not j.ended())
    assert loser.wait() == 1 and not winner.ended()
    run = the_run(project)
    assert status(run)['pid'] == winner.pid
    assert last_line(loser.err).startswith(f'imgexp: run {run.name} belongs to process {winner.pid} on {socket.gethostname()}')
    assert 'wait for it, stop it, or give resume=never' in last_line(loser.err)
    (project/'go').touch()
    finish(winner, project, undisturbed)

def elsewhere(run, seconds):
    "As if another machine were working on it, whose heart beat so many seconds ago."
    beat = (datetime.now().astimezone() - timedelta(seconds=seconds)).isoformat(timespec='seconds')
    status = run.dir/'status.json'
    status.write_text(json.dumps(run.status | dict(state='running', host='elsewhere', machine='another', pid=4711, beat=beat, ended=None)))
    os.utime(status, (time.time() - seconds,)*2)

def test_a_run_of_another_machine(project):
    from imgexp.errors import RunBusy
    from imgexp.start import start_run
    p = dict(lr=0.1, track='off')
    run = start_run('demo', p).stop()
    elsewhere(run, seconds=5)
    assert run.state == 'running'
    began = time.monotonic()
    with pytest.raises(RunBusy, match='belongs to process 4711 on elsewhere'): start_run('demo', p, wait=30)
    assert time.monotonic() - began < 20, 'another machine is not waited for'
    elsewhere(run, seconds=61)
    assert run.state == 'died'
    again = start_run('demo', p)
    assert again.name == run.name and again.status['host'] == socket.gethostname() and again.status['pid'] == os.getpid()
    again.finish({})

def test_the_beat_goes_on(project, monkeypatch):
    import imgexp.runs as r
    from imgexp.start import start_run
    monkeypatch.setattr(r, 'BEAT', 0.05)
    stamps = iter(range(10**6))
    monkeypatch.setattr(r, 'timestamp', lambda: str(next(stamps)))
    run = start_run('demo', dict(track='off'))
    first = run.status['beat']
    until(lambda: int(run.status['beat']) > int(first) + 3, 'the heart to beat', 60)
    run.stop()
    last = run.status['beat']
    time.sleep(0.3)
    assert run.status['beat'] == last

# -- what became of papermill

def test_sigkill_of_papermill_then_of_its_kernel(papermill, launcher, data, holding, undisturbed):
    root, job = papermill
    kernel = held(root, job)
    run = the_run(root)
    assert kernel == status(run)['pid'] != job.pid and rows(root) == 2
    job.send(signal.SIGKILL)
    job = launcher.papermill(*injected(data), root=root, PYTHONPATH=str(holding))  # at once: the orphaned kernel is waited for
    until(lambda: gone(kernel), 'the orphaned kernel to end')
    kernel = held(root, job)
    assert (status(run)['continued'], status(run)['state'], status(run)['pid'], rows(root)) == (1, 'running', kernel, 4)
    kill(kernel)
    assert job.wait() != 0
    assert status(run)['state'] == 'running' and rows(root) == 4  # nobody was left to say otherwise; the lock tells
    from imgexp.runs import Run
    assert Run(run).state == 'died'
    job = launcher.papermill(*injected(data), root=root)
    assert finish(job, root, undisturbed) == run
    assert status(run)['continued'] == 2
