"What a person asks of `imgexp train`: a limit of time, several seeds, more epochs, recipes."
import json

import pytest
from launch import last_line
from pictures import CLASSES, tree
from imgexp.checkpoints import checkpoints, read_weights
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')
GIVEN = dict(size=12, epochs=2, batch_size=16, workers=0, track='off')

def options(data, **more): return ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | {'data': data} | more).items())]
def runs_in(root): return [Run(d) for d in sorted((root/'runs').glob('2*')) if d.is_dir()]

@pytest.fixture(scope='module')
def data(tmp_path_factory): return tree(tmp_path_factory.mktemp('training')/'data', 20, CLASSES)

def test_a_limit_of_time(launcher, project, data, tmp_path):
    "The clock runs out in the second epoch: a checkpoint, exit status 75, and the same command continues, with more time or without."
    late = '''
import imgexp.checkpoints as c, time
real, start = c.Checkpoints.after_batch, time.monotonic()
def after_batch(self):
    if self.schedule.done == 6 and self.deadline < 1e300: self.deadline = 0
    real(self)
c.Checkpoints.after_batch = after_batch'''
    job = launcher.imgexp(*options(data, max_minutes=10), root=project, before=late)
    assert job.wait() == 75, job.err
    run, = runs_in(project)
    assert (run.state, last_line(job.err)) == ('stopped', 'the time allowed by max_minutes is over; the same command continues')
    assert checkpoints(run)[0].name == 'step-00000006'
    job = launcher.imgexp(*options(data), root=project)
    assert job.wait() == 0 and f'continuing {run.name} at epoch 2, batch 3' in job.out, job.err
    other = tmp_path/'other'
    other.mkdir()
    assert launcher.imgexp(*options(data), root=other).wait() == 0
    (a, _), (b, _) = (read_weights(checkpoints(r)[0]) for r in (*runs_in(project), *runs_in(other)))
    assert all((a[k] == b[k]).all() for k in a)

def test_several_seeds(launcher, project, data):
    job = launcher.imgexp(*options(data, seed=3), '--seeds', '3', root=project)
    assert job.wait() == 0, job.err
    runs = runs_in(project)
    assert [r.params['seed'] for r in runs] == [3, 4, 5] and all(r.finished for r in runs)
    values = [r.metrics['valid']['top1']['value'] for r in runs]
    table = job.out.splitlines()[-5:]
    assert [line.split()[0] for line in table] == ['3', '4', '5', 'mean', 'sd']
    mean = table[3]
    assert float(mean.split()[-1]) == pytest.approx(sum(values)/3, abs=1e-4) and '3 seeds, 16 valid' in mean
    again = launcher.imgexp(*options(data, seed=3), '--seeds', '3', root=project)
    assert again.wait() == 0 and 'epoch 1/' not in again.out and len(runs_in(project)) == 3, 'nothing is repeated'
    assert again.out.splitlines()[-2:] == job.out.splitlines()[-2:]

def test_a_finished_run_is_extended(launcher, project, data):
    job = launcher.imgexp(*options(data, ema=0.9, augment='trivial'), root=project)
    assert job.wait() == 0, job.err
    parent, = runs_in(project)
    args = ['train', '--extend', parent.name, '--data', str(data), '--epochs', '3', '--schedule', 'linear', '--lr', '0.001', '--track', 'off']
    job = launcher.imgexp(*args, root=project)
    assert job.wait() == 0, job.err
    _, child = runs_in(project)
    import torch
    groups = torch.load(checkpoints(child)[0]/'state.pt', weights_only=True)['optimizer']['param_groups']
    assert [g['betas'][0] for g in groups] == [0.9, 0.9], "the momentum of this run, not where the parent's one-cycle ended"
    assert child.params['extend'] == parent.name and child.params['augment'] == 'trivial' and child.params['ema'] == 0.9 and child.params['size'] == 12
    assert list(child.history.epoch) == [3, 4, 5]
    assert child.history.images.iloc[0] > parent.history.images.iloc[-1]
    assert child.history.lr.iloc[-1] < child.history.lr.iloc[0] <= 0.001
    assert parent.history.train_loss.iloc[-1]*1.2 > child.history.train_loss.iloc[0], 'it begins where the parent ended'
    for given, says in ((['--arch', 'resnet18'], "has 'compact_resnet': leave arch out to extend it"), (['--optimizer', 'sgd'], "has 'adamw': leave optimizer out"),
                        (['--recipe', 'quick'], 'leave out either recipe or extend')):
        job = launcher.imgexp(*args, *given, root=project)
        assert job.wait() == 2 and says in last_line(job.err), job.err
    stopped = Run(project/'runs'/'20200101-000000-03_train-00000000')
    stopped.dir.mkdir()
    (stopped.dir/'params.json').write_text(json.dumps({'params': {}}))
    job = launcher.imgexp('train', '--extend', stopped.name, root=project)
    assert job.wait() == 2 and 'is not finished' in last_line(job.err)
    other = Run(project/'runs'/'20200101-000000-20_transfer-00000000')
    other.dir.mkdir()
    (other.dir/'params.json').write_text(json.dumps({'notebook': '20_transfer', 'params': {}}))
    (other.dir/'status.json').write_text(json.dumps({'state': 'done'}))
    job = launcher.imgexp('train', '--extend', other.name, root=project)
    assert job.wait() == 2 and 'is of 20_transfer: only runs of 03_train can be extended' in last_line(job.err), job.err

def test_a_recipe_and_what_the_user_says(launcher, project, data):
    job = launcher.imgexp('train', '--recipe', 'scratch-small', '--data', str(data), '--size', '12', '--epochs', '1', '--batch-size', '32', '--workers', '0',
                          '--momentum', '0.9', '--track', 'off', root=project)
    assert job.wait() == 0, job.err
    run, = runs_in(project)
    from imgexp.recipes import RECIPES
    values = RECIPES['scratch-small'].values
    assert (run.params['recipe'], run.params['optimizer'], run.params['label_smoothing']) == ('scratch-small', values['optimizer'], values['label_smoothing'])
    assert run.params['lr'] == pytest.approx(values['lr']*32/values['batch_size']) and run.params['epochs'] == 1 and run.params['size'] == 12

def test_a_default_given_explicitly_wins_over_the_recipe(launcher, project, data):
    "20 epochs are the default of `epochs`, and not those of the recipe."
    stop = 'import imgexp.train as t\nfrom imgexp.errors import InputError\ndef load(p, table): raise InputError(f"{p.epochs} epochs, rate {p.lr}")\nt.load_learner = load'
    job = launcher.imgexp('train', '--recipe', 'scratch-small', '--data', str(data), '--epochs', '20', '--lr', '0.003', root=project, before=stop)
    assert job.wait() == 2 and last_line(job.err) == 'imgexp: 20 epochs, rate 0.003'

def test_out_of_memory(launcher, project, data):
    hungry = '''
import imgexp.learner as l, torch
real = l.ImageLearner.forward
def forward(self, net, x):
    if len(x) > 4: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    return real(self, net, x)
l.ImageLearner.forward = forward'''
    job = launcher.imgexp(*options(data), root=project, before=hungry)
    assert job.wait() == 1
    assert last_line(job.err) == 'imgexp: out of memory with 16 images of 12 px at once: try micro_batch=8 (the gradients stay those of the whole batch)'
    assert 'Traceback' not in job.err

def test_early_stopping(launcher, project, data):
    job = launcher.imgexp(*options(data, epochs=9, lr=1e-7, schedule='constant', patience=2), root=project)
    assert job.wait() == 0, job.err
    run, = runs_in(project)
    assert run.finished and len(run.history) < 9 and 'no better valid_top1 in 2 epochs' in job.out

def test_compiling_without_a_compiler(launcher, project, data):
    job = launcher.imgexp(*options(data, compile='true'), root=project, PATH=str(project))
    assert job.wait() == 2
    assert last_line(job.err) == 'imgexp: compile=True needs a C++ compiler on the CPU: install g++ or clang++, or leave compile out'

def test_an_artifact(launcher, project, data):
    "Offline, the best checkpoint's files lie in the run's wandb folder, to be synchronized."
    job = launcher.imgexp(*options(data, epochs=1, track='offline', upload='true'), root=project, WANDB_MODE='offline')
    assert job.wait() == 0, job.err
    assert 'tracking with Weights & Biases stopped' not in job.err
    run, = runs_in(project)
    log = b''.join(p.read_bytes() for p in run.dir.glob('wandb/offline-run-*/run-*.wandb'))
    assert f'{run.name}-checkpoint'.encode() in log and b'model.safetensors' in log

def test_a_kill_of_an_extended_run_of_another_size(launcher, project, data, tmp_path):
    "Normalization stays the parent's, in training, in the checkpoint, and after a kill; part of the parent's name is enough each time."
    job = launcher.imgexp(*options(data), root=project)
    assert job.wait() == 0, job.err
    parent, = runs_in(project)
    other = tmp_path/'other'
    other.mkdir()
    import shutil
    shutil.copytree(project/'runs', other/'runs')
    args = ['train', '--extend', parent.name[:15], '--data', str(data), '--epochs', '2', '--size', '16', '--track', 'off', '--workers', '0']
    kill = '''
import imgexp.callbacks as t
real = t.History.before_train
def before_train(self):
    if self.learn.epoch == 3: os.kill(os.getpid(), signal.SIGKILL)
    real(self)
t.History.before_train = before_train'''
    assert launcher.imgexp(*args, root=project, before=kill).wait() == -9
    again, whole = launcher.imgexp(*args, root=project), launcher.imgexp(*args, root=other)
    assert again.wait() == 0 and whole.wait() == 0, again.err + whole.err
    (a, about), (b, _) = (read_weights(checkpoints(runs_in(root)[-1])[0]) for root in (project, other))
    assert all((a[k] == b[k]).all() for k in a)
    assert about['norm'] == read_weights(checkpoints(parent)[0])[1]['norm'] and about['size'] == 16
    third = launcher.imgexp(*args, root=project)
    third.wait()
    assert len(runs_in(project)) == 3 and 'continuing' not in third.out, 'once more: a new run beside the finished one'

@pytest.mark.parametrize('given,says', [(['--seed', 'x'], "seed='x' is not a whole number: it must be at least 0 and at most 4294967295"), (['--max-minutes', 'soon'], "max_minutes='soon' is not a number: it must be at least 0 and at most 1000000")])
def test_wrong_words_with_seeds(launcher, project, data, given, says):
    job = launcher.imgexp(*options(data), '--seeds', '2', *given, root=project)
    assert job.wait() == 2 and last_line(job.err) == f'imgexp: {says}'

def test_averaged_statistics_fit_averaged_weights(project):
    "As well as statistics measured anew with the averaged weights; those of the raw network do worse."
    import torch
    from imgexp.data import keep_subset
    from imgexp.samples import digits
    from imgexp.loader import normalization
    from imgexp.models import build_model
    from imgexp.start import start_run
    from imgexp.fit import fit
    from imgexp.learner import make_learner, to_input
    table = keep_subset(digits(), 0.5, seed=0)
    norm = normalization(table, 16)
    def learner(): return make_learner(table, build_model('compact_resnet', 10, size=16), norm, size=16, batch_size=32, device='cpu', precision='fp32')
    with start_run('demo', dict(track='off')) as run: fit(run, learner(), epochs=4, lr=0.02, schedule='constant', ema=0.95, momentum=0.9)
    last = checkpoints(run)[0]
    mean, raw = read_weights(last, 'ema')[0], read_weights(last)[0]
    learn = learner()
    def loss(state):
        learn.model.load_state_dict(state)
        learn.model.eval()
        with torch.no_grad(): sums = [torch.nn.functional.cross_entropy(learn.model(to_input(x, norm)), y, reduction='sum') for x, y in learn.dls.valid.at(0)]
        return float(sum(sums))/len(table.split('valid'))
    averaged = loss(mean)
    assert averaged == pytest.approx(run.history.ema_loss.iloc[-1], rel=1e-4)
    foreign = loss({k: raw[k] if 'running' in k else v for k, v in mean.items()})
    norms = [m for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.reset_running_stats(); m.momentum = None
    learn.model.train()
    with torch.no_grad():
        for x, _ in learn.dls.train.at(0): learn.model(to_input(x, norm))
    anew = loss(learn.model.state_dict())
    assert abs(averaged - anew) < abs(foreign - anew), (averaged, anew, foreign)

# -- threads

def test_a_small_network_gets_one_thread(monkeypatch):
    "By a rule of network, size and batch; the variable and the user overrule it."
    import torch
    import imgexp.setup as s
    from imgexp.models import build_model
    small, large = build_model('compact_resnet', 10, size=32), build_model('resnet18', 10, size=64)
    monkeypatch.setattr(s, '_all_threads', 8)
    monkeypatch.setattr(s, 'best_device', lambda: 'cpu')
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert [s.choose_threads(0, m, size, 64) for m, size in ((small, 32), (large, 64))] == [1, 8]
    assert s.choose_threads(0, small, 32, 256) == 8 and s.choose_threads(3, small, 32, 64) == 3
    monkeypatch.setattr(s, 'best_device', lambda: 'cuda')
    assert s.choose_threads(0, small, 32, 64) == torch.get_num_threads()
    monkeypatch.setattr(s, 'best_device', lambda: 'cpu')
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    assert s.choose_threads(0, small, 32, 64) == torch.get_num_threads()

def test_a_continued_run_keeps_its_threads(project, monkeypatch):
    import torch
    import imgexp.setup as s
    from imgexp.train import train
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    before = torch.get_num_threads()
    try:
        given = dict(subset=0.05, size=8, epochs=2, batch_size=16, workers=0, track='off')
        p = s.TrainParams.check(given)
        table = s.load_table(p, lambda line: None)
        with s.start_training(p, table, s.load_learner(p, table)) as run: run.stop()
        assert run.resolved['threads'] == 1
        info = json.loads((run.dir/'params.json').read_text())
        (run.dir/'params.json').write_text(json.dumps(info | {'resolved': info['resolved'] | {'threads': 2}}))
        again = train(**given)
        assert again.name == run.name and again.finished and again.attempts[-1]['threads'] == 2
    finally: torch.set_num_threads(before)
