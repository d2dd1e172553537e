"Two processes train as one: the same batches, equal steps, a run that either may continue."
import re, signal, socket, subprocess, sys

import pandas as pd, pytest
from launch import SLOW, environment, last_line, until
from pictures import CLASSES, tree
from imgexp.checkpoints import checkpoints, read_weights
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')
GIVEN = dict(size=12, epochs=3, batch_size=22, augment='trivial', precision='fp32', lr=0.01, schedule='cosine', label_smoothing=0.1, track='off')
EPOCHS, BATCHES = 3, 6  # 128 images to train on, the last batch ragged

NET = '''

import imgexp.setup, imgexp.train as t, torch
from torch import nn
def net(n):
    "Smooth: where rounding moves an activation across the corner of a ReLU, a gradient jumps"
    def norm(): return nn.BatchNorm2d(8) if {normed} else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), norm(), nn.SiLU(), nn.Conv2d(8, 8, 3), norm(), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n))
real = imgexp.setup.build_model
def build(arch, n, *args, **kw):
    known = real(arch, n, *args, **kw)
    torch.manual_seed(0)
    model = net(n)
    model.report, model.arch = known.report, known.arch
    return model
imgexp.setup.build_model = build
'''

def options(data, **given): return ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | {'data': data, 'workers': 0} | given).items())]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def start(launcher, n, root, data, normed=False, more='', **given):
    "n processes, told what torchrun would tell them."
    env = dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port())) if n > 1 else {}
    return [launcher.imgexp(*options(data, **given), root=root, before=NET.format(normed=normed) + more, **env, **(dict(RANK=str(r), LOCAL_RANK=str(r)) if env else {}))
            for r in range(n)]

def run(launcher, *args, **kw):
    jobs = start(launcher, *args, **kw)
    for job in jobs: assert job.wait() == 0, job.err
    return ''.join(job.out for job in jobs)

@pytest.fixture(scope='module')
def data(tmp_path_factory): return tree(tmp_path_factory.mktemp('parallel')/'data', 40, CLASSES)

def the_run(root):
    found = [d for d in (root/'runs').glob('*') if d.is_dir()]
    assert len(found) == 1, found
    return found[0]

def outcome(root):
    "Weights of the last checkpoint, history"
    there = Run(the_run(root))
    return read_weights(checkpoints(there)[0])[0], there.history

def close(a, b, eps=1e-5):
    "Weights equal within `eps` of their size, the same history"
    (w, h), (v, g) = a, b
    for k in w:
        if w[k].is_floating_point(): assert (w[k] - v[k]).norm() <= eps*w[k].norm() + 1e-7, (k, (w[k] - v[k]).norm()/w[k].norm())
        else: assert (w[k] == v[k]).all(), k
    for k in ('epoch', 'step', 'images'): assert list(h[k]) == list(g[k]), k
    for k in ('train_loss', 'valid_loss'): pd.testing.assert_series_equal(h[k], g[k], rtol=max(eps, 1e-5)*10, atol=0)

@pytest.fixture(scope='module')
def alone(launcher, data, tmp_path_factory):
    root = tmp_path_factory.mktemp('alone')
    run(launcher, 1, root, data)
    return root

def test_two_processes_make_the_steps_of_one(launcher, project, data, alone):
    out = run(launcher, 2, project, data)
    close(outcome(project), outcome(alone))
    assert out.count('epoch 1/3') == 1, 'each line is told once'
    assert outcome(project)[1].images.iloc[-1] == EPOCHS*128

def test_mixup_and_parts_of_a_batch(launcher, project, data, tmp_path):
    "Partners stay together; each process takes its share in parts; averages too."
    given = dict(mixup=0.4, cutmix=1.0, erase=0.5, micro_batch=4, clip=0.5, ema=0.9)
    other = tmp_path/'one'
    other.mkdir()
    run(launcher, 2, project, data, **given)
    run(launcher, 1, other, data, **given)
    close(outcome(project), outcome(other))

def test_batch_norm_sees_the_whole_batch(launcher, project, data, tmp_path):
    given, other = dict(normed=True, optimizer='sgd', lr=0.05), tmp_path/'one'  # AdamW divides by the gradient, and so blows up what is rounded
    other.mkdir()
    run(launcher, 2, project, data, **given)
    run(launcher, 1, other, data, **given)
    close(outcome(project), outcome(other))

DIE = '''
import imgexp.learner, imgexp.setup, os, signal
class Die(imgexp.learner.StatefulCallback):
    order = 70
    def after_batch(self):
        if self.learn.training and self.schedule.done == {step} - 1:
            if {save}: self.learn.checkpoints.save(self.learn.epoch, self.dls.train.batch + 1)
            if int(os.environ['RANK']) == {rank}: {act}
real_make = imgexp.setup.make_learner
def make(*args, **kw):
    learn = real_make(*args, **kw)
    learn.add_cb(Die())
    return learn
imgexp.setup.make_learner = make
'''

@pytest.mark.parametrize('rank', [0, 1])
def test_one_process_killed_the_others_end_and_either_number_continues(launcher, project, data, alone, rank):
    more = DIE.format(step=BATCHES + 3, rank=rank, save=True, act='os.kill(os.getpid(), signal.SIGKILL)')
    jobs = start(launcher, 2, project, data, more=more)
    assert jobs[rank].wait() == -signal.SIGKILL
    assert jobs[1 - rank].wait() == 1
    assert last_line(jobs[1 - rank].err) == 'imgexp: another process of this training ended: the same command continues from the last checkpoint'
    there = Run(the_run(project))
    assert there.state == ('failed' if rank else 'died')
    out = run(launcher, 1 if rank else 2, project, data)
    assert f'continuing {there.name} at epoch 2, batch 3' in out
    close(outcome(project), outcome(alone))

def test_one_process_is_asked_to_stop(launcher, project, data, alone):
    "All stop at the same step; the checkpoint is whole; the same command continues."
    more = DIE.format(step=BATCHES + 2, rank=1, save=False, act='os.kill(os.getpid(), signal.SIGTERM)')
    jobs = start(launcher, 2, project, data, more=more)
    assert [job.wait() for job in jobs] == [75, 75], jobs[0].err
    assert last_line(jobs[0].err) == 'another process was asked to stop; the same command continues'
    assert Run(the_run(project)).state == 'stopped'
    run(launcher, 2, project, data)
    close(outcome(project), outcome(alone))

@pytest.mark.parametrize('normed', [False, True], ids=['plain', 'batch norm'])
def test_a_process_without_images(launcher, project, data, tmp_path, normed):
    "The last batch has two images, which are partners: two of three processes have none."
    given, other = dict(batch_size=42, epochs=2, normed=normed, mixup=0.4, optimizer='sgd'), tmp_path/'one'  # AdamW would blow up what is rounded
    other.mkdir()
    run(launcher, 3, project, data, **given)
    run(launcher, 1, other, data, **given)
    close(outcome(project), outcome(other))

@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    folder = tree(tmp_path_factory.mktemp('broken')/'data', 40, CLASSES)
    for path in sorted(folder.rglob('*.png'))[::50]: path.write_bytes(b'\x89PNG')
    return folder

def test_skipped_images_of_all_processes(launcher, project, broken, tmp_path):
    other = tmp_path/'one'
    other.mkdir()
    run(launcher, 2, project, broken, bad='skip')
    run(launcher, 1, other, broken, bad='skip')
    close(outcome(project), outcome(other))
    skipped = [Run(the_run(r)).metrics['skipped'] for r in (project, other)]
    assert skipped[0] == skipped[1] and len(skipped[0]) >= 2

def test_the_cause_in_another_process_is_told(launcher, project, broken):
    jobs = start(launcher, 2, project, broken)
    assert [job.wait() for job in jobs] == [1, 1]
    told = Run(the_run(project)).status['error']
    assert re.search(r'is cut short: fix or remove it.*bad=skip', told), told

def test_bad_input_is_refused_by_all(launcher, project, data):
    jobs = start(launcher, 2, project, data, arch='resnet1000')
    for job in jobs:
        assert job.wait() == 2
        assert last_line(job.err).startswith("imgexp: arch='resnet1000' is not known")
    assert not list((project/'runs').glob('2*'))

def test_a_run_that_another_has_is_refused_by_all(launcher, project, data):
    hold = "imgexp.train.fit_run = lambda *a: __import__('time').sleep(1000)\n"
    owner, = start(launcher, 1, project, data, more=hold)
    until(lambda: list((project/'runs').glob('2*/status.json')), 'the run to begin')
    jobs = start(launcher, 2, project, data, more='from functools import partial; imgexp.setup.start_run = partial(imgexp.setup.start_run, wait=0.5)\n')
    for job in jobs:
        assert job.wait() == 1
        assert re.search('belongs to process', last_line(job.err))
    owner.send(signal.SIGKILL)

SLOW_END = '''
real_finish_run = t.finish_run
def finish_run(run, *args, **kw):
    import time, os, pathlib
    if os.environ['RANK'] == '0':
        time.sleep(2)
        pathlib.Path('others').write_text(str(sum(os.path.exists(f'/proc/{p}') for p in pids())))
    return real_finish_run(run, *args, **kw)
def pids(): return [int(p.name) for p in pathlib.Path('pids').glob('*')]
import pathlib, os
pathlib.Path('pids').mkdir(exist_ok=True)
pathlib.Path('pids', str(os.getpid())).touch()
t.finish_run = finish_run
'''

def test_no_process_leaves_before_the_run_is_finished(launcher, project, data):
    "torchrun ends the others when one is gone with an error; the first still evaluates and writes."
    run(launcher, 2, project, data, epochs=1, more=SLOW_END)
    assert (project/'others').read_text() == '2'
    assert Run(the_run(project)).state == 'done'

def test_an_interpreter_that_cannot_be_taken_apart_does_no_harm(project):
    "What a thread of torch may do at the end (pytorch#190489)"
    code = 'import os, imgexp.cli\nclass Late:\n    def __del__(self, abort=os.abort): abort()\nos.late = Late()\nimgexp.cli.process()'
    def status(**env): return subprocess.run([sys.executable, '-c', code, 'runs', 'ls'], cwd=project, env=environment(project) | env, capture_output=True).returncode
    assert status(WORLD_SIZE='2', RANK='1') == 0
    assert status() == -signal.SIGABRT, 'the test has a point'

def test_torchrun(project, data, alone):
    "The command itself."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'imgexp.cli', *options(data, epochs=1)]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, timeout=SLOW)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.count('epoch 1/1') == 1 and done.stdout.count('valid top1') == 1
    assert Run(the_run(project)).state == 'done'
