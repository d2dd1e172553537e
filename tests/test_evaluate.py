"A finished run is evaluated as it was trained and judged: the same figures, whatever experiment made it, and whatever data and machine are like today."
import json, shutil, subprocess, sys
from importlib.util import find_spec

import pytest
from launch import environment, last_line
from pictures import tree
from imgexp.evaluate import evaluate_test, load_run
from imgexp.errors import InputError
from imgexp.runs import Run
from imgexp.start import start_run

pytestmark = pytest.mark.usefixtures('project')
SMALL = dict(size=16, epochs=2, batch_size=16, workers=0, track='off')

def train(experiment, **given):
    from importlib import import_module
    return import_module(f'imgexp.{experiment}').train(**given)

def options(**given): return [f'--{k.replace("_", "-")}={v}' for k, v in given.items()]

def of_chosen_epoch(run): return run.history.set_index('epoch').loc[run.metrics['epoch']]

# -- one rule for ties

@pytest.mark.parametrize('given', [dict(lr=1e-4), dict(ema=0.9, micro_batch=24, label_smoothing=0.1, lr=1e-5, seed=1)], ids=['plain', 'averages'])
def test_history_metrics_and_evaluation_agree_where_logits_tie(project, given):
    "In bf16, to the last image: an epoch's row, metrics.json, and the run evaluated afterwards."
    run = train('train', data='digits', subset=0.2, size=16, epochs=2, precision='bf16', batch_size=100, workers=0, track='off', **given)
    row, valid, kind = of_chosen_epoch(run), run.metrics['valid'], 'ema' if 'ema' in given else 'valid'
    loaded = load_run(run.name)
    assert loaded.precision == 'bf16'
    probs = loaded.predict_split('valid')[0]
    assert ((probs == probs.max(1, keepdims=True)).sum(1) > 1).any(), 'no ties: the test tests nothing'
    assert row[f'{kind}_top1'] == valid['top1']['value'] and row[f'{kind}_loss'] == pytest.approx(valid['loss'], rel=1e-12)
    if kind == 'valid': assert row.valid_top5 == valid['top5']['value']
    assert loaded.evaluate('valid') == valid and loaded.evaluate('test') == run.metrics['test']

@pytest.mark.parametrize('given', [dict(head='logistic'), dict(retrain=1), dict(finetune_epochs=1, finetune_lr=1e-8)],
                         ids=['head', 'blocks', 'fine-tuned in vain'])
def test_transfer_agrees_where_logits_tie(project, given):
    "The frozen part computes in bf16 as it did for the features, the head as it was trained; after fine-tuning the whole network in bf16."
    run = train('transfer', arch='compact_resnet', subset=0.2, size=32, epochs=1, precision='bf16', workers=0, track='off', **{'head': 'linear'} | given)
    row, valid = of_chosen_epoch(run), run.metrics['valid']
    assert (row.valid_top1, row.valid_top5) == (valid['top1']['value'], valid['top5']['value']) and row.valid_loss == pytest.approx(valid['loss'], rel=1e-9)
    again = load_run(run.name).evaluate('valid')
    assert (again['top1'], again['top5']) == (valid['top1'], valid['top5']) and again['loss'] == pytest.approx(valid['loss'], rel=1e-6)

def test_what_auto_meant_is_kept(project, monkeypatch):
    "A run that computed in bf16 is evaluated in bf16 where `auto` would mean fp32."
    import imgexp.learner as learner
    monkeypatch.setattr(learner, '_native_bf16', lambda device: True)
    run = train('train', subset=0.2, precision='auto', **SMALL)
    monkeypatch.setattr(learner, '_native_bf16', lambda device: False)
    loaded = load_run(run.name)
    assert loaded.precision == 'bf16' and loaded.evaluate('valid') == run.metrics['valid']

# -- what is marked is what was chosen

SCRIPTED = {'valid_top1': [.9, .5, .5, .5], 'valid_loss': [4., 3., 2., 1.], 'ema_top1': [.5, .9, .5, .5], 'ema_loss': [4., 4., 1., 2.]}

def rings(figure): return {line.get_xdata()[0] for ax in figure.axes for line in ax.lines if line.get_markerfacecolor() == 'none'}

@pytest.mark.parametrize('best_by, epoch, says', [('valid_loss', 4, 'lowest valid_loss: top-1 50.0%, epoch 4'), ('ema_top1', 2, 'best: top-1 90.0%, epoch 2')])
def test_the_ring_marks_the_chosen_epoch(project, monkeypatch, best_by, epoch, says):
    "curves.png, whatever made an epoch the best."
    import imgexp.callbacks as parts, imgexp.results as module
    real, drawn, plot = parts.History.after_epoch, [], module.plot_curves
    def after_epoch(self):
        real(self)
        self.row |= {k: v[self.row['epoch'] - 1] for k, v in SCRIPTED.items()}
    monkeypatch.setattr(parts.History, 'after_epoch', after_epoch)
    monkeypatch.setattr(module, 'plot_curves', lambda *args: drawn.append(plot(*args)) or drawn[-1])
    run = train('train', subset=0.05, ema=0.9, best_by=best_by, keep_best=1, **SMALL | {'epochs': 4})
    assert run.metrics['epoch'] == epoch and rings(drawn[0]) == {epoch}
    assert drawn[0].axes[1].texts[0].get_text().startswith(says)

# -- images that cannot be decoded

@pytest.fixture
def data(project):
    "Splits train and test, an image of each damaged."
    tree(project/'data/train', 20); tree(project/'data/test', 3, seed=1)
    for name in ('train/square/004.png', 'test/circle/001.png'): (project/'data'/name).write_bytes(b'\x89PNG')
    return project/'data'

def test_a_run_that_skips_is_evaluated_as_it_was_trained(launcher, project, data):
    "And the images that are left out are told and counted; --bad overrides what the run did."
    job = launcher.imgexp('train', *options(data=data, bad='skip', **SMALL), root=project)
    assert job.wait() == 0 and '2 of 46 images cannot be decoded and are left out: ' in job.out, job.err
    run, = (Run(d) for d in (project/'runs').glob('2*'))
    assert run.metrics['test']['top1']['n'] == 5 and run.metrics['test']['skipped'] == 1
    assert set(run.metrics['skipped']) == {'train/square/004.png', 'test/circle/001.png'}
    job = launcher.imgexp('eval', run.name, '--json', root=project)
    assert job.wait() == 0 and last_line(job.err) == '1 of 6 test images cannot be decoded and are left out: test/circle/001.png', job.err
    assert json.loads(job.out) == run.metrics['test']
    job = launcher.imgexp('eval', run.name, '--bad', 'stop', root=project)
    assert job.wait() == 1 and 'test/circle/001.png is cut short' in last_line(job.err) and 'bad=skip' in last_line(job.err), job.err
    job = launcher.imgexp('eval', run.name, '--bad', 'never', root=project)
    assert job.wait() == 2 and "bad='never' is not known: choose stop or skip" in last_line(job.err), job.err

@pytest.mark.parametrize('experiment, given', [('train', {}), ('transfer', dict(arch='compact_resnet'))])
def test_the_test_images_of_a_search(project, data, monkeypatch, experiment, given):
    "Left alone by a run that is compared with others, and looked at once afterwards."
    monkeypatch.setenv('IMGEXP_OBSERVER', 'operator:is_')
    run = train(experiment, data=str(data), bad='skip', **SMALL | given)
    assert run.metrics['test'] is None
    monkeypatch.delenv('IMGEXP_OBSERVER')
    found = evaluate_test(run)
    assert (found['top1']['n'], found['skipped']) == (5, 1) and run.metrics['test'] == found
    shutil.rmtree(data)
    assert evaluate_test(run) == found, 'once'

def test_a_search_without_test_images(project, data):
    run = train('train', data=str(data/'train'), bad='skip', **SMALL | {'epochs': 1})
    assert 'test' not in run.metrics and evaluate_test(run) is None

def test_a_sweep_of_runs_that_skip_ends_well(project, data, launcher):
    "Its best trial is evaluated on the test images that can be decoded."
    from imgexp.sweep import make_sweep
    fixed = {k: {'value': v} for k, v in (SMALL | dict(data=str(data), bad='skip', epochs=1)).items()}
    make_sweep({'name': 's', 'program': '03_train', 'method': 'random', 'metric': {'name': 'val_loss'}, 'parameters': fixed | {'lr': {'values': [0.001, 0.01]}}}, trials=1)
    job = launcher.python('-m', 'imgexp.cli', 'sweep', 'run', 's', root=project)
    assert job.wait() == 0, job.err
    assert json.loads((project/'runs/sweeps/s/best.json').read_text())['test']['top1']['n'] == 5

def test_no_test_image_can_be_decoded(project, data):
    "The run is finished, without an accuracy that there is not."
    for path in (data/'test').glob('*/*.png'): path.write_bytes(b'')
    run = train('train', data=str(data), bad='skip', **SMALL)
    assert run.finished and 'test' not in run.metrics and len(run.metrics['skipped']) == 7
    with pytest.raises(InputError, match='none of the 6 test images of data can be decoded'): load_run(run.name).evaluate('test')

# -- runs of every experiment

def test_runs_of_unknown_notebooks(launcher, project):
    "One clear line; without a name the newest that can be loaded is taken; `runs show` knows them all."
    with pytest.raises(InputError, match='no runs in'): load_run()
    with start_run('99_mine', dict(track='off')) as other: other.finish({'mine': 1})
    with pytest.raises(InputError, match='no finished run can be loaded: the newest, .* of notebook 99_mine, is done'): load_run()
    run = train('train', subset=0.05, **SMALL)
    with start_run('99_mine', dict(track='off', n=2)) as newer: newer.finish({'mine': 1})
    assert load_run().run.name == run.name
    for command in (['eval', newer.name], ['predict', newer.name, '.']):
        job = launcher.imgexp(*command, root=project)
        assert job.wait() == 2 and job.err.count('\n') == 1 and 'is of 99_mine, whose networks cannot be loaded here: choose a run of 03_train, 10_keras_cnn, 20_transfer' in job.err
    assert launcher.imgexp('runs', 'show', newer.name, root=project).wait() == 0

KERAS = '''
import contextlib, io, json, os, shutil, sys
from pathlib import Path
import cv2, numpy as np
from imgexp import keras_cnn, keras_network
from imgexp.cli import main
from imgexp.evaluate import evaluate_test, load_run
from imgexp.errors import InputError
from imgexp.run_table import list_runs
out, rings, real, row = {}, [], keras_cnn.plot_curves, keras_cnn._row
def drawn(*args):
    figure = real(*args)
    rings.extend(line.get_xdata()[0] for ax in figure.axes for line in ax.lines if line.get_markerfacecolor() == 'none')
    return figure
keras_cnn.plot_curves = drawn
keras_cnn._row = lambda *args: row(*args) | {'valid_top1': 0.5}  # equal ones: the first is chosen, although the loss falls
keras_network._native_bf16 = lambda: True
def command(*args):
    text, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(err): code = main([str(a) for a in args])
    return [code, text.getvalue(), err.getvalue()]
given = dict(data='data', bad='skip', size=16, filters=8, dense=16, epochs=2, batch_size=8, track='off')
run = keras_cnn.train(**given)
out['metrics'], out['rings'] = run.metrics, [int(v) for v in set(rings)]
(run.dir/'metrics.json').write_text(json.dumps({k: v for k, v in run.metrics.items() if k != 'test'}))  # as a sweep leaves it
out['search'] = [evaluate_test(run), run.metrics]
keras_network._native_bf16 = lambda: False
out['eval'] = command('eval', run.name, '--json')
out['stop'] = command('eval', run.name, '--bad', 'stop')
out['show'] = command('runs', 'show', run.name)[0]
shutil.copytree('data', 'bright')
for path in Path('bright/train').glob('*/*.png'):
    image = cv2.imread(str(path))
    if image is not None: cv2.imwrite(str(path), 255 - image//8)
out['again'] = command('eval', run.name, '--data', 'bright', '--json')
shutil.rmtree('data'); os.rename('bright', 'data')
out['changed'] = command('eval', run.name)
out['predict'] = command('predict', run.name, 'data/test')
trained = load_run()
out['precision'], out['newest'], out['size'] = trained.precision, trained.run.name == run.name, trained.size
gray = keras_cnn.train(**given | dict(data='digits', subset=0.1, bad='stop', epochs=1))
out['gray'] = command('predict', gray.name, 'data/test')
out['torch'] = 'torch' in sys.modules
print(json.dumps(out))
'''

@pytest.fixture(scope='module')
def keras(tmp_path_factory):
    "What a process without torch finds."
    if not find_spec('keras'): pytest.skip('needs keras')
    root = tmp_path_factory.mktemp('keras')
    tree(root/'data/train', 20); tree(root/'data/test', 3, seed=1)
    for name in ('train/square/004.png', 'test/circle/001.png'): (root/'data'/name).write_bytes(b'\x89PNG')
    done = subprocess.run([sys.executable, '-c', KERAS], env=environment(root), cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

def test_a_keras_run_is_evaluated_as_it_was_trained(keras):
    "By `imgexp eval`, without torch; in the precision that `auto` meant then; images left out are told and counted."
    code, out, err = keras['eval']
    assert code == 0 and json.loads(out) == keras['metrics']['test'] and keras['metrics']['test']['top1']['n'] == 5
    assert last_line(err) == '1 of 6 test images cannot be decoded and are left out: test/circle/001.png'
    assert (keras['precision'], keras['newest'], keras['size'], keras['show'], keras['torch']) == ('bf16', True, 16, 0, False)
    assert keras['stop'][0] == 1 and 'test/circle/001.png is cut short' in keras['stop'][2]

def test_a_keras_run_keeps_its_normalization(keras):
    "Other training images in its folder: told; and the same test images give the same figures."
    code, out, _ = keras['again']
    assert code == 0 and json.loads(out) == keras['metrics']['test']
    code, out, err = keras['changed']
    assert (code, out) == (2, '') and "data='data' has changed since run" in err and 'give the data to evaluate on' in err

def test_a_keras_run_labels_images(keras):
    "The columns of every other run; gray networks are shown color images in gray."
    for name, classes in (('predict', {'circle', 'square'}), ('gray', set('0123456789'))):
        code, out, err = keras[name]
        assert code == 0 and '1 of 6 images could not be read' in err
        lines = [l.split(',') for l in out.splitlines()]
        assert lines[0] == ['file', 'predicted', 'probability', 'error'] and lines[2][0] == 'circle/001.png' and 'cut short' in lines[2][3]
        assert len(lines) == 7 and {l[1] for l in lines[1:]} - {''} <= classes

def test_the_test_images_of_a_keras_search(keras): assert keras['search'] == [keras['metrics']['test'], keras['metrics']]

def test_the_ring_of_a_keras_run(keras): assert keras['rings'] == [keras['metrics']['epoch']] == [1]
