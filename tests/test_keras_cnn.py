"The Keras CNN as a process: killed at any moment, without torch, the same bits on any number of workers."
import json, signal, subprocess, sys
from importlib.util import find_spec

import pytest
from launch import environment, last_line, until
from imgexp.runs import Run

if not find_spec('keras'): pytest.skip('needs keras', allow_module_level=True)  # not imported: torch may follow, and not after TensorFlow
pytestmark = pytest.mark.usefixtures('project')
GIVEN = dict(subset=0.2, size=16, filters=8, dense=32, batch_norm=True, augment=True, epochs=4, track='off')
CODE = '''
import sys
from imgexp.keras_cnn import train
train(**{given})
assert 'torch' not in sys.modules, 'Keras and torch in one process'
'''

def run_of(root): return next(Run(d) for d in (root/'runs').glob('2*'))
def weights(run):
    from safetensors.numpy import load_file
    return load_file(run.dir/'checkpoints'/'epoch-0004'/'state.safetensors')

def test_killed_and_continued_without_torch(launcher, project, tmp_path):
    "kill -9 while an epoch runs; all that the last checkpoint holds is that of the undisturbed run."
    code, other = CODE.format(given=GIVEN), tmp_path/'other'
    other.mkdir()
    job = launcher.python('-c', code, root=project)
    until(lambda: list(project.glob('runs/2*/checkpoints/epoch-0002/COMMITTED.json')), 'two epochs')
    job.send(signal.SIGKILL)
    job.wait()
    hit = run_of(project)
    assert hit.state == 'died'
    again, whole = launcher.python('-c', code, root=project), launcher.python('-c', code, root=other)
    assert again.wait() == 0 and f'continuing {hit.name} at epoch' in again.out, again.err
    assert whole.wait() == 0, whole.err
    a, b = weights(hit), weights(run_of(other))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert hit.history.drop(columns=['seconds', 'img_per_s', 'peak_mem_mb']).equals(run_of(other).history.drop(columns=['seconds', 'img_per_s', 'peak_mem_mb']))
    assert hit.metrics['test'] == run_of(other).metrics['test']

COMMAND = '''
import sys
from imgexp.cli import main
code = main(['keras-cnn', *sys.argv[1:]])
assert 'torch' not in sys.modules, 'Keras and torch in one process'
sys.exit(code)
'''

def test_the_command(launcher, project):
    "Asked to stop it ends with 75, the same command goes on; several seeds end in a table; bad input is refused in one line."
    args = [f'--{k.replace("_", "-")}={v}' for k, v in GIVEN.items()]
    job = launcher.python('-c', COMMAND, *args, root=project)
    until(lambda: list(project.glob('runs/2*/checkpoints/epoch-0001/COMMITTED.json')), 'an epoch')
    job.send(signal.SIGTERM)
    assert job.wait() == 75 and last_line(job.err) == 'terminated; the same command continues', job.err
    run = run_of(project)
    assert run.state == 'stopped'
    job = launcher.python('-c', COMMAND, *args, '--seeds', '2', root=project)
    assert job.wait() == 0 and f'continuing {run.name} at epoch' in job.out and run.finished, job.err
    assert [line.split()[0] for line in job.out.splitlines()[-4:]] == ['0', '1', 'mean', 'sd'] and '2 seeds, 360 valid, 359 test' in job.out
    for given, says in (('--blocks=9', 'blocks=9: an image of 16 px has room for 4'), ('--dropout=1', 'dropout=1.0 is out of range'),
                        ('--arch=resnet18', 'No such option')):
        job = launcher.python('-c', COMMAND, *args, given, root=project)
        assert job.wait() == 2 and job.err.count('\n') == 1 and says in job.err, job.err

def test_a_sweep_has_the_same_results_on_one_worker_and_on_two(project, monkeypatch):
    "And only its best trial has seen the test images, until somebody asks for another one by itself."
    from imgexp.sweep import make_sweep
    space = {k: {'value': v} for k, v in (GIVEN | {'epochs': 2}).items()} | {'lr': {'distribution': 'log_uniform_values', 'min': 1e-3, 'max': 1e-2}}
    config = {'program': '10_keras_cnn', 'method': 'random', 'metric': {'name': 'val_loss'}, 'parameters': space}
    found = []
    for jobs in (1, 2):
        monkeypatch.setenv('IMGEXP_ROOT', str(project/str(jobs)))
        sweep = make_sweep(config | {'name': 's'}, trials=3)
        done = subprocess.run([sys.executable, '-m', 'imgexp.cli', 'sweep', 'run', 's', '--jobs', str(jobs)], capture_output=True, text=True,
                              env=environment(project/str(jobs)), cwd=project)
        assert done.returncode == 0, done.stderr
        found.append([(r['values'], r['value'], r['state']) for r in sweep.rows()])
        seen = [r.name for r in map(Run, (project/str(jobs)/'runs').glob('2*')) if r.metrics.get('test')]
        best = json.loads((sweep.dir/'best.json').read_text())
        assert seen == [best['run']] and best['test']['top1']['n'] == 359
    assert found[0] == found[1] and len(found[0]) == 3
    other = next(r for r in sweep.rows() if r['run'] != best['run'])
    done = subprocess.run([sys.executable, '-c', CODE.format(given=other['values'] | {'resume': 'reuse'})], capture_output=True, text=True, env=environment(project/'2'), cwd=project)
    assert done.returncode == 0, done.stderr
    run = Run(project/'2/runs'/other['run'])
    assert run.metrics['test']['top1']['n'] == 359 and run.status['continued'] == 0, 'who asks for it outside of the search gets a test accuracy'

@pytest.mark.parametrize('first', ['pass', 'import torch'])
def test_torch_after_tensorflow(project, first):
    "torch's import of triton after TensorFlow's would be a segmentation fault."
    code = f'''
from imgexp.keras_cnn import train
{first}
small = dict(size=16, epochs=1, subset=0.1, track='off')
print(train(**small, filters=8).state)
from imgexp.train import train
print(train(**small).state)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment(project))
    assert done.returncode == 0 and done.stdout.split().count('done') == 2, done.stderr

def test_a_torch_run_is_loaded_after_tensorflow(project):
    "Also where TensorFlow was imported by the user."
    small = "dict(size=16, epochs=1, subset=0.1, track='off')"
    for code in (f'from imgexp.train import train; train(**{small})',
                 "import tensorflow as tf; tf.ones(3) + 1; from imgexp.evaluate import load_run; assert load_run().evaluate('test')['top1']['n'] == 359"):
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment(project))
        assert done.returncode == 0, done.stderr
