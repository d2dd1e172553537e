"Subset curves at the command line: continued, extended, evaluated; fixed steps; bad input costs no finished point."
import csv, hashlib, json, re, shutil, signal
from pathlib import Path

import numpy as np
import pytest
from launch import last_line, until
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')
SMALL = '--size 8 --epochs 2 --batch-size 32 --workers 0 --track off'.split()

def points(folder): return list(csv.DictReader((folder/'points.csv').open()))
def runs(project): return sorted((project/'runs').glob('2*-03_train-*'))

def test_train_continue_extend_evaluate_plot(launcher, project):
    folder = project/'curve'
    args = ['curve', 'train', *SMALL, '--checkpoint-dir', folder, '--seeds', '2']
    job = launcher.imgexp(*args, '--subset-sizes', '0.5', '0.25', '0.125', '--epochs', '12', root=project)
    until(lambda: folder.exists() and (folder/'points.csv').exists() and any(r['state'] == 'done' for r in points(folder)), 'the first point')
    job.send(signal.SIGKILL)
    job.wait()
    done = [r['run'] for r in points(folder) if r['state'] == 'done']
    job = launcher.imgexp('curve', 'train', '--checkpoint-dir', folder, '--jobs', '2', root=project)  # the rest is remembered
    assert job.wait() == 0, job.err
    table = points(folder)
    assert [(r['size'], r['seed']) for r in table] == [(s, k) for s in ('0.125', '0.25', '0.5') for k in '01']
    assert {r['state'] for r in table} == {'done'} and len(runs(project)) == 6 and done[0] in [r['run'] for r in table]
    job = launcher.imgexp('curve', 'train', '--checkpoint-dir', folder, '--subset-sizes', '1', root=project)
    assert job.wait() == 0 and len(runs(project)) == 8 and '2 points to train, 6 finished' in job.err, job.err
    job = launcher.imgexp('curve', 'eval', '--checkpoint-dir', folder, root=project)
    assert job.wait() == 0, job.err
    results = json.loads((folder/'results.json').read_text())
    for entry, row in zip(results['points'], points(folder)):  # as each run's own evaluation, to the image
        assert (entry['run'], entry['top1']['value']) == (row['run'], float(row['test_top1']))
        assert entry['top1'] == Run(project/'runs'/row['run']).metrics['test']['top1']
    job = launcher.imgexp('curve', 'plot', '--target', '0.01', root=project, cwd=project)
    assert job.wait() == 2 and 'there is no curve in runs/curves' in job.err  # it is not in runs/curves
    job = launcher.imgexp('curve', 'plot', '--checkpoint-dir', folder, '--target', '0.01', root=project)
    assert job.wait() == 0 and len(job.out.strip().splitlines()) == 3, job.out + job.err
    assert {p.name for p in (folder/'figures').iterdir()} == {'errors.png', 'law.png'}

def test_other_names_of_options_and_the_dry_run(launcher, project):
    job = launcher.imgexp('curve', 'train', '--model', 'compact_resnet', '--num-epochs', '3', '--learning-rate', '0.01', '--size', '8',
                          '--subset-sizes', '1', '0.5', '--dry-run', root=project)
    assert job.wait() == 0 and '4 points to train' in job.err, job.err
    assert not runs(project) and not list((project/'runs').glob('curves/*'))

def test_equal_steps(launcher, project):
    job = launcher.imgexp('curve', 'train', *SMALL, '--subset-sizes', '1,0.1', '--seeds', '1', '--budget', 'steps', root=project)
    assert job.wait() == 0, job.err
    small, large = points(next((project/'runs'/'curves').iterdir()))
    assert small['steps'] == large['steps'] == '68' and float(large['epochs']) == 2 and float(small['epochs']) == 17
    assert len(Run(project/'runs'/small['run']).history) == 2  # validated as often

def test_a_damaged_checkpoint_and_a_half_written_result(launcher, project):
    folder = project/'curve'
    job = launcher.imgexp('curve', 'train', *SMALL, '--checkpoint-dir', folder, '--subset-sizes', '1,0.5,0.25', '--seeds', '1', root=project)
    assert job.wait() == 0, job.err
    runs_of = [project/'runs'/r['run'] for r in points(folder)]
    for weights in (runs_of[1]/'checkpoints').glob('step-*/model.safetensors'): weights.write_bytes(b'half')
    (folder/'results.json').write_text('{"points": [')
    job = launcher.imgexp('curve', 'plot', '--checkpoint-dir', folder, root=project)
    assert job.wait() == 2 and 'results.json is damaged: `imgexp curve eval' in job.err
    job = launcher.imgexp('curve', 'eval', '--checkpoint-dir', folder, root=project)
    assert job.wait() == 1 and 'size 0.5, seed 0' in job.err and 'damaged' in job.err, job.err
    results = json.loads((folder/'results.json').read_text())
    assert [e['size'] for e in results['points']] == [0.25, 1] and [f['size'] for f in results['failed']] == [0.5]
    shutil.rmtree(runs_of[2])
    job = launcher.imgexp('curve', 'eval', '--checkpoint-dir', folder, root=project)
    assert job.wait() == 1 and f'size 1, seed 0: its run {runs_of[2].name} is gone: train it again' in job.err, job.err
    job = launcher.imgexp('curve', 'train', '--checkpoint-dir', folder, root=project)  # the missing point is trained again
    assert job.wait() == 0 and '1 point to train, 2 finished' in job.err, job.err

WRONG = {
    'no size': ('--subset-sizes ,', 'no size'), 'zero': ('--subset-sizes 1,0', '0 is out of range'), 'above 1': ('--subset-sizes 2', '2 is out of range'),
    'twice': ('--subset-sizes 0.5 0.50', '0.5 is there twice'), 'no number': ('--subset-sizes half', 'not all of them are numbers'),
    'a class vanishes': ('--subset-sizes 1,0.001', 'the smallest size is 0.0049'), 'no seed': ('--seeds 0', 'seeds=0 is out of range'),
    'unknown budget': ('--budget images', "budget='images' is not known"), 'small for AlexNet': ('--model alexnet', 'alexnet needs at least 63 px'),
    'steps in parts': ('--steps 1000 --epochs 30', 'give epochs=25'), 'a recipe and steps': ('--recipe quick --budget steps', 'give steps'),
    'sizes forgotten': ('--subset-sizes --dry-run', 'needs fractions'), 'unknown option': ('--epohs 3', 'No such option'), 'other files': ('--checkpoint-dir busy', 'holds other files')}

@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(launcher, project, case):
    args, says = WRONG[case]
    (project/'busy').mkdir()
    (project/'busy'/'notes.txt').touch()
    job = launcher.imgexp('curve', 'train', '--track', 'off', *args.split(), root=project)
    assert job.wait() == 2 and re.search(re.escape(says), last_line(job.err)) and not job.out, job.err
    assert len(job.err.strip().splitlines()) <= 2 and not runs(project) and not list((project/'runs').glob('curves/*'))

def test_a_second_process_and_a_broken_neighbor(launcher, project):
    "A refused process changes nothing; a folder that cannot be read is skipped; JSON is alone on stdout."
    from imgexp.curve_folder import Curve
    (project/'runs'/'curves'/'broken').mkdir(parents=True)
    (project/'runs'/'curves'/'broken'/'curve.json').write_text('{"a": 1}')
    args = ['curve', 'train', *SMALL, '--seeds', '1', '--subset-sizes']
    job = launcher.imgexp(*args, '0.5', '1', '--json', root=project)
    assert job.wait() == 0 and [p['state'] for p in json.loads(job.out)] == ['done', 'done'], job.out + job.err
    folder, = [d for d in (project/'runs'/'curves').iterdir() if d.name != 'broken']
    with Curve(folder).locked():
        job = launcher.imgexp(*args, '0.1', root=project)
        assert job.wait() == 1 and 'is being trained by another process' in last_line(job.err)
    assert json.loads((folder/'curve.json').read_text())['sizes'] == [0.5, 1]
    (folder/'points.csv').write_bytes(b'\xff\xfe')
    job = launcher.imgexp(*args, '0.5', root=project)
    assert job.wait() == 0 and 'skipped: curve.json in' in job.err and len(runs(project)) == 2, job.err
    for command, says in (('eval --split train', "split='train' is not known: choose one of test, valid"), ('plot --form powr', "did you mean 'power'"),
                          ('plot --target 2', 'target=2.0 is out of range')):
        job = launcher.imgexp('curve', *command.split(), '--checkpoint-dir', folder, root=project)
        assert job.wait() == 2 and says in last_line(job.err), job.err

def test_changed_images_and_no_test_split(launcher, project):
    from pictures import tree
    data = tree(project/'data', 20)
    args = ['curve', 'train', *SMALL, '--data', data, '--seeds', '1', '--subset-sizes', '1,0.5', '--checkpoint-dir', project/'curve']
    job = launcher.imgexp(*args, root=project)
    assert job.wait() == 0 and 'has no test images' in job.err and '--split valid' in last_line(job.err), job.err
    job = launcher.imgexp('curve', 'eval', '--checkpoint-dir', project/'curve', root=project)
    assert job.wait() == 2 and 'have no test images: evaluate on valid' in last_line(job.err), job.err
    assert launcher.imgexp('curve', 'eval', '--split', 'valid', '--checkpoint-dir', project/'curve', root=project).wait() == 0
    next(Path(data).rglob('*.png')).unlink()
    job = launcher.imgexp('curve', 'eval', '--split', 'valid', '--checkpoint-dir', project/'curve', root=project)
    assert job.wait() == 2 and 'have changed since it was begun' in last_line(job.err), job.err

def test_other_weights_under_the_same_name_are_another_curve(launcher, project):
    import torch
    from imgexp.models import build_model
    def weights(seed): torch.save(build_model('compact_resnet', 10, size=8, seed=seed).state_dict(), project/'weights.pth')
    args = ['curve', 'train', *SMALL, '--subset-sizes', '0.1', '--seeds', '1', '--weights', 'weights.pth', '--checkpoint-dir', project/'curve']
    weights(0)
    job = launcher.imgexp(*args, root=project, cwd=project)
    assert job.wait() == 0, job.err
    assert launcher.imgexp('curve', 'train', '--seeds', '2', '--checkpoint-dir', project/'curve', root=project, cwd='/').wait() == 0  # from anywhere
    weights(1)
    job = launcher.imgexp(*args, root=project, cwd=project)
    assert job.wait() == 2 and "contents of weights='weights.pth'" in last_line(job.err), job.err

def test_steps_see_the_same_images_as_epochs(project):
    "Two passes as one part of 68 steps: order, crops and mixtures are functions of the pass, so the weights are equal bit for bit."
    import safetensors.torch
    from imgexp.train import train
    common = dict(size=8, batch_size=32, workers=0, track='off', schedule='constant', mixup=0.4, flip='alternating', threads=1, precision='fp32')
    runs = [train(epochs=2, **common), train(epochs=1, steps=68, **common)]
    a, b = (safetensors.torch.load_file(max((r.dir/'checkpoints').glob('step-00000068'))/'model.safetensors') for r in runs)
    assert all((a[k] == b[k]).all() for k in a)

def test_another_rate_is_another_curve(launcher, project):
    folder = project/'curve'
    args = ['curve', 'train', *SMALL, '--checkpoint-dir', folder, '--subset-sizes', '0.1', '--seeds', '1']
    assert launcher.imgexp(*args, root=project).wait() == 0
    job = launcher.imgexp(*args, '--lr', '0.5', root=project)
    assert job.wait() == 2 and 'lr=0.5: curve curve has 0.003: give the same, or another checkpoint_dir' in job.err

@pytest.mark.fast
def test_subsets_are_the_same_on_every_machine():
    "Rows of digits, by hash: they depend on labels and seed alone."
    from imgexp.curve_folder import subset_rows
    from imgexp.sources import load_images
    table = load_images('digits')
    subsets = [subset_rows(table, size, 3) for size in (1/16, 1/4, 1)]
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    shares = [np.bincount(table.labels[rows])/np.bincount(table.labels[subsets[2]]) for rows in subsets[:2]]
    for size, share in zip((1/16, 1/4), shares): assert (abs(share - size)*np.bincount(table.labels[subsets[2]]) <= 0.5).all()
    assert [hashlib.sha256(rows.astype('<i8').tobytes()).hexdigest()[:12] for rows in subsets] == ['6c4a4cb76074', '452470527464', '450b25206e85']

@pytest.mark.fast
def test_wilson_intervals_are_those_of_statsmodels():
    proportion = pytest.importorskip('statsmodels.stats.proportion')
    from imgexp.metrics import wilson
    for correct, n in ((0, 7), (7, 7), (3, 10), (321, 359), (9_000, 10_000)):
        for confidence in (0.8, 0.95, 0.99):
            assert wilson(correct, n, confidence) == pytest.approx(proportion.proportion_confint(correct, n, 1 - confidence, 'wilson'), abs=1e-12)
