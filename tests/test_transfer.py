"A head on a frozen network: the same as through the network, killed and continued, bf16, bad input."
import json
import re
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from imgexp.data import keep_subset
from imgexp.evaluate import load_run
from imgexp.fit import fit
from imgexp.cutting import cut
from imgexp.features import View, features, features_dir, module_id
from imgexp.learner import make_learner
from imgexp.models import build_model
from imgexp.sources import load_images
from imgexp.results import predict_split
from imgexp.runs import Run
from imgexp.start import start_run
from imgexp.transfer import TransferParams, compare, norm_of, train
from launch import last_line
from pictures import tree

pytestmark = pytest.mark.usefixtures('project')
SHARED = Path(__file__).resolve().parents[2]/'shared'
SMALL = dict(size=32, epochs=3, precision='fp32', track='off', subset=0.2)

# -- the same as through the network

@pytest.mark.parametrize('arch, retrain, head', [('resnet18', 0, 'linear'), ('resnet18', 1, 'linear'), ('resnet18', 0, 'mlp'), ('densenet121', 0, 'linear'), ('vgg11_bn', 0, 'linear')])
def test_features_give_what_images_give(project, arch, retrain, head):
    "Same order, same seed: logits equal to 1e-5, the same predictions, the frozen part as it was, batch norm's statistics included."
    run = train(arch=arch, retrain=retrain, head=head, **SMALL | dict(classes='0,1,2,3', epochs=2, subset=0.1, size=16 if arch == 'resnet18' else 32))
    p = TransferParams.of(run.params)
    table = keep_subset(load_images('digits', p.classes), p.subset, p.seed)
    net = build_model(arch, 4, '', retrain, p.size, head=head)
    frozen = module_id(cut(net, retrain).prefix)
    learn = make_learner(table, net, norm_of(p, table), size=p.size, batch_size=p.batch_size, augment='none', precision='fp32', seed=p.seed)
    with start_run('images', dict(track='off')) as other: best = fit(other, learn, epochs=p.epochs, optimizer='adam', lr=p.lr, weight_decay=p.weight_decay, schedule='constant', keep_best=1)
    ours = load_run(run.name)
    assert module_id(cut(net, retrain).prefix) == frozen == module_id(cut(ours.model, retrain).prefix)
    assert best['epoch'] == run.metrics['epoch']
    (theirs, labels, _), (own, labels2, _) = predict_split(learn, 'test'), ours.predict_split('test')
    assert np.array_equal(labels, labels2)
    assert np.array_equal(theirs.argmax(1), own.argmax(1))
    assert np.abs(np.log(theirs) - np.log(own)).max() < 1e-5*max(1, np.abs(np.log(theirs)).max())

def clothing():
    paths = [SHARED/'data/clothing', SHARED/'weights/mobilenet_v2-converted.pth']
    if not all(p.exists() for p in paths): pytest.skip('clothing and its MobileNetV2 are not here: the shared data are not part of the project')
    return map(str, paths)

def test_bf16_hardly_changes_predictions(project):
    "On photos, with a trained backbone: at most 1 % of 372 test images are seen otherwise."
    from imgexp.learner import _native_bf16
    if not _native_bf16('cpu'): pytest.skip('this processor computes bf16 by emulation, at a tenth of the speed')
    data, weights = clothing()
    run = train(data=data, arch='mobilenet_v2', weights=weights, size=224, subset=0.1, head='logistic', precision='fp32', track='off')
    table, found = load_images(data), load_run(run.name)
    parts, test = cut(found.model.cpu()), table.split('test')
    view = View(224, tuple(map(tuple, found.metadata['norm'])))
    with torch.no_grad(): told = [parts.suffix(features(table, parts, view, kind, splits=('test',)).take(test).float()).argmax(1) for kind in ('fp32', 'bf16')]
    assert len(test) == 372 and (told[0] != told[1]).sum() <= 3
    assert run.metrics['test']['top1']['value'] > 0.7

def test_history_and_metrics_tell_the_same(project, capsys):
    "A head is trained and judged in fp32, whatever its features were computed in: bf16 logits are often equal, and any of them could come first."
    for head in ('linear', 'logistic'):
        run = train(head=head, arch='compact_resnet', **SMALL | dict(precision='bf16'))
        assert 'has random weights: give weights=imagenet' in capsys.readouterr().out
        told = run.history.set_index('epoch').loc[run.metrics['epoch']]
        assert told.valid_top1 == pytest.approx(run.metrics['valid']['top1']['value'], abs=1e-6) and told.valid_loss == pytest.approx(run.metrics['valid']['loss'], rel=1e-5)

def test_logistic_sees_all_views_at_once(project):
    "And tells which weight decay it chose."
    from imgexp.transfer import FullBatchLoader, load_features
    run = train(head='logistic', arch='compact_resnet', views=3, **SMALL)
    p, seen = TransferParams.of(run.params), run.history
    assert (seen.images.diff().dropna() == 3*len(keep_subset(load_images('digits'), p.subset, p.seed).split('train'))).all()
    assert np.allclose(seen.weight_decay, 10.**np.arange(0, -5.5, -0.5)) and 'lr' not in seen, 'there is no learning rate'
    table = keep_subset(load_images('digits'), p.subset, p.seed)
    sets, _ = load_features(p, table, cut(build_model(p.arch, 10, '', 0, p.size)), norm_of(p, table))
    loader = FullBatchLoader(table, 'train', sets)
    (x, y), = loader.at(0)
    assert [s.computed for s in sets] == [0]*3 and np.array_equal(table.labels[loader.rows], y)
    assert torch.equal(x, torch.cat([s.take(table.split('train')) for s in sets])) and not torch.equal(*x.tensor_split(3)[:2])

def test_networks_and_heads_in_one_table(project):
    table = compare({'resnet18': '', 'compact_resnet': ''}, ['linear', 'logistic'], **SMALL)
    assert len(table) == 4 and list(table.valid_top1) == sorted(table.valid_top1, reverse=True) and set(table.test_n) == {359}
    again = compare({'resnet18': '', 'compact_resnet': ''}, ['linear', 'logistic'], **SMALL)
    assert set(again.run) == set(table.run), 'finished ones are reused'
    assert len(list(features_dir().glob('*'))) == 2, 'heads share what a network makes of the images'

def test_a_batch_and_the_table_know_what_is_filled_in(project, root):
    "The size that the weights are made for, and logistic's own epochs, are in the run, not in what was asked."
    from imgexp.batch import plan_batch
    from imgexp.run_table import list_runs
    given = dict(subset=0.05, arch='compact_resnet', track='off')
    made = [train(head=head, **given, **more) for head, more in (('linear', dict(epochs=2)), ('logistic', {}))]
    assert [r.params['epochs'] for r in made] == [2, 11] and {r.params['size'] for r in made} == {64}
    table = list_runs(columns=('epochs',))
    assert list(table.epochs) == [2, 11] and table.columns.is_unique
    points = [dict(given, head='linear', epochs=2), dict(given, head='logistic'), dict(given, head='mlp')]
    assert plan_batch(root/'nbs/20_transfer.ipynb', points).actions == ['reuse', 'reuse', 'run']

# -- killed, and continued

GIVEN = dict(size=32, subset=0.2, epochs=3, finetune_epochs=2, batch_size=64, precision='fp32', track='off', retrain=1, arch='compact_resnet')
BATCHES = 4  # an epoch
VARIES = ['seconds', 'img_per_s', 'peak_mem_mb', 'checkpoint_mb', 'checkpoint_s']

def options(**more): return ['transfer', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | more).items())]

def killed_at(step, act): return f'''
import imgexp.callbacks as parts
real, steps = parts.Schedule.after_batch, []
def after_batch(self):
    real(self)
    if self.done == {step}: {act}
parts.Schedule.after_batch = after_batch'''

def only_run(root):
    run, = [Run(d) for d in (root/'runs').glob('2*')]
    return run

def weights(run):
    last = json.loads((run.dir/'checkpoints/index.json').read_text())['last']
    return json.loads((run.dir/'checkpoints'/last/'COMMITTED.json').read_text())['files']['model.safetensors']['sha256']

@pytest.fixture(scope='module')
def undisturbed(launcher, tmp_path_factory):
    root = tmp_path_factory.mktemp('undisturbed')
    job = launcher.imgexp(*options(), root=root, XDG_CACHE_HOME=str(root/'cache'))
    assert job.wait() == 0, job.err
    run = only_run(root)
    assert list(run.history.epoch) == [1, 2, 3, 4, 5] and list(run.history.step) == [BATCHES*e for e in range(1, 6)]
    return run

@pytest.mark.parametrize('step, number', [(2, signal.SIGKILL), (3*BATCHES - 1, signal.SIGTERM), (3*BATCHES + 1, signal.SIGKILL), (3*BATCHES + 2, signal.SIGTERM), (4*BATCHES + 1, signal.SIGKILL)])
def test_killed_and_continued(launcher, project, undisturbed, step, number):
    "In the head's epochs, where fine-tuning begins, and later: weights and history end as if nothing had happened."
    job = launcher.imgexp(*options(), root=project, before='import os, signal' + killed_at(step, f'os.kill(os.getpid(), {int(number)})'))
    assert job.wait() == (75 if number == signal.SIGTERM else -number), job.err
    job = launcher.imgexp(*options(), root=project)
    assert job.wait() == 0, job.err
    run = only_run(project)
    pd.testing.assert_frame_equal(*(r.history.drop(columns=VARIES) for r in (run, undisturbed)), check_exact=True)
    assert weights(run) == weights(undisturbed) and run.metrics['test'] == undisturbed.metrics['test']

def test_fine_tuning_begins_with_the_best_head(project):
    "An epoch at a rate of nothing measures what the best epoch measured, not the last one."
    run = train(arch='resnet18', lr=0.1, finetune_epochs=1, finetune_lr=1e-30, **SMALL | dict(epochs=6))
    head, after = run.history.valid_top1[:6], run.history.valid_top1[6]
    assert head[5] < head.max() and after == pytest.approx(head.max(), abs=1e-6), run.history.valid_top1

def test_told_enough_before_fine_tuning(project, monkeypatch):
    "A sweep ends a trial while its head is trained: it is not fine-tuned either."
    watcher = types.ModuleType('watcher')
    watcher.look = lambda run, row: 'half of the others are better'
    monkeypatch.setitem(sys.modules, 'watcher', watcher)
    monkeypatch.setenv('IMGEXP_OBSERVER', 'watcher:look')
    run = train(finetune_epochs=1, arch='compact_resnet', **SMALL)
    assert run.finished and len(run.history) == 1 and run.metrics['ended'] == 'half of the others are better' and run.metrics['valid']['top1']['n'] == 360

def test_fine_tuning_has_rates_of_its_own(undisturbed):
    "Lower rates towards the input, batch norm's statistics as they were, another optimizer state."
    state = torch.load(sorted((undisturbed.dir/'checkpoints').glob('step-*'))[-1]/'state.pt', weights_only=True)
    scales = [g['lr_scale'] for g in state['optimizer']['param_groups']]
    assert scales[0] == 1 and np.isclose(min(scales), 0.01) and scales == sorted(scales, reverse=True)
    assert (undisturbed.history.lr[:3] == 0.001).all() and (undisturbed.history.lr[3:] < 0.0003).all()
    assert next(iter(state['optimizer']['state'].values()))['step'] == 2*BATCHES

def test_terminated_while_features_are_computed(launcher, project):
    "What is computed is kept; the state is `stopped`, the same command goes on."
    slow = '''
import imgexp.features as f, os, signal
real = f._batches
def batches(*args):
    for k, found in enumerate(real(*args)):
        yield found
        if k == 2: os.kill(os.getpid(), signal.SIGTERM)
f._batches = batches'''
    given = options(finetune_epochs=0, epochs=1)
    job = launcher.imgexp(*given, root=project, before=slow)
    assert job.wait() == 75 and 'Traceback' not in job.err, job.err
    assert only_run(project).status['state'] == 'stopped'
    job = launcher.imgexp('cache', 'ls', '--json', root=project)
    assert job.wait() == 0 and json.loads(job.out)[0]['images'] == 3*64
    job = launcher.imgexp(*given, root=project)
    assert job.wait() == 0, job.err
    job = launcher.imgexp('cache', 'verify', root=project)
    assert job.wait() == 0 and '935 cached images are intact' in job.out, job.out

# -- bad input

WRONG = {
    'retrain too deep': ('--arch resnet18 --size 32 --retrain 9', r'retrain=9: features need frozen blocks; resnet18 has 9 below its head: give 0 to 8'),
    'retrain far too deep': ('--arch resnet18 --size 32 --retrain 500', r'retrain=500: features need frozen blocks; resnet18 has 9 below its head: give 0 to 8'),
    'negative retrain': ('--retrain -1', r'retrain=-1 .*at least 0'),
    'one class': ('--data single', r'only one class \(circle\)'),
    'weights of another architecture': ('--arch squeezenet1_1 --size 32 --weights compact.pth', r'compact.pth.* not those of arch=squeezenet1_1'),
    'unknown head': ('--head lineer', r"head='lineer' is not known: did you mean 'linear'|head='lineer' is not known: choose one of linear, mlp, logistic"),
    'logistic and retrain': ('--arch resnet18 --size 32 --head logistic --retrain 1', r'head=logistic needs .*retrain=0: give head=linear'),
    'mlp on a convolution': ('--arch squeezenet1_1 --size 32 --head mlp', r"head='mlp': squeezenet1_1 ends in a convolution"),
    'no cache': ('--cache-gb 0', r'cache_gb=0.* more than 0'),
    'fp16 on the processor': ('--precision fp16', r"precision='fp16' is not supported on cpu"),
    'too small': ('--arch alexnet --size 32', r'size=32: alexnet needs'),
    'augment': ('--augment crop-flop', r"augment='crop-flop' is not known: did you mean 'crop-flip'"),
    'weights of torchvision': ('--arch resnet18 --weights IMAGENET1K_V2', r"weights='IMAGENET1K_V2': resnet18 has the weights IMAGENET1K_V1, and 'imagenet'"),
    'normalize': ('--normalize imagenet', r"normalize='imagenet' is not known"),
}

@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    shelf = tmp_path_factory.mktemp('shelf')
    tree(shelf/'single', 3, ['circle']); tree(shelf/'two', 20)
    torch.save(build_model('compact_resnet', 2, size=8).state_dict(), shelf/'compact.pth')
    return shelf

def refused(job, code, says):
    assert job.wait() == code, job.err
    lines = [l for l in job.err.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith('imgexp: ') and re.search(says, lines[0]), job.err

@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(launcher, project, shelf, case):
    args, says = WRONG[case]
    refused(launcher.imgexp('transfer', '--track', 'off', *args.split(), root=project, cwd=shelf), 2, says)
    assert not list((project/'runs').glob('2*'))

def test_an_image_that_cannot_be_decoded(launcher, project):
    data = tree(project/'data', 20)
    (data/'circle/003.png').write_bytes(b'<html>404</html>')
    args = ['transfer', '--data', 'data', '--arch', 'compact_resnet', '--size', '16', '--epochs', '2', '--views', '2', '--track', 'off']
    job = launcher.imgexp(*args, root=project)
    assert job.wait() == 1 and 'circle/003.png is not an image' in last_line(job.err) and 'bad=skip' in last_line(job.err), job.err
    assert only_run(project).status['state'] == 'failed'
    job = launcher.imgexp(*args, '--bad', 'skip', root=project)
    assert job.wait() == 0, job.err
    assert job.out.count('images cannot be decoded and are left out: circle/003.png') == 1, job.out
    assert list(only_run(project).metrics['skipped']) == ['circle/003.png']

def test_a_cache_that_cannot_be_written(launcher, project):
    "A file stands where the folder should be."
    (project/'cache').mkdir(exist_ok=True)
    (project/'cache/imgexp').write_text('')
    job = launcher.imgexp(*options(finetune_epochs=0), root=project)
    assert job.wait() == 1 and 'cache/imgexp' in last_line(job.err) and 'Traceback' not in job.err, job.err

def test_a_full_disk(launcher, project, disk):
    "Refused before anything is computed; the same command goes on when there is room."
    disk.fill(left=100_000)
    job = launcher.imgexp(*options(finetune_epochs=0), root=project, XDG_CACHE_HOME=str(disk.path))
    assert job.wait() == 1 and 'free' in last_line(job.err) and 'Traceback' not in job.err, job.err
    (disk.path/'filler').unlink()
    job = launcher.imgexp(*options(finetune_epochs=0), root=project, XDG_CACHE_HOME=str(disk.path))
    assert job.wait() == 0, job.err

def test_damaged_features_are_computed_again_and_told(launcher, project):
    given = options(finetune_epochs=0, epochs=1, retrain=0)
    assert launcher.imgexp(*given, root=project).wait() == 0
    path, = features_dir().glob('*/*.safetensors')
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 1
    path.write_bytes(raw)
    job = launcher.imgexp('cache', 'verify', root=project)
    assert job.wait() == 1 and 'is damaged: deleted' in job.err, job.err
    path.write_bytes(raw)
    job = launcher.imgexp(*given, root=project)
    assert job.wait() == 0 and f'{path.name} is damaged, its images are computed again' in job.out + job.err, (job.out, job.err)
    assert launcher.imgexp('cache', 'verify', root=project).wait() == 0
    job = launcher.imgexp('cache', 'clear', root=project)
    assert job.wait() == 0 and 'MB freed' in job.out and not list(features_dir().glob('*'))

def test_several_seeds_in_one_command(launcher, project):
    args = ['transfer', '--size', '32', '--subset', '0.2', '--epochs', '2', '--track', 'off', '--arch', 'compact_resnet', '--seeds', '2', '--seed', '3']
    job = launcher.imgexp(*args, root=project)
    assert job.wait() == 0, job.err
    assert [l.split()[0] for l in job.out.splitlines() if l[:1] in '34'] == ['3', '4'] and 'mean' in job.out, job.out
    names = sorted(d.name for d in (project/'runs').glob('2*'))
    assert launcher.imgexp(*args, root=project).wait() == 0
    assert sorted(d.name for d in (project/'runs').glob('2*')) == names, 'finished ones are reused'
