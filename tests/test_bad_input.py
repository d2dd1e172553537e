"Bad input: one clear last line, the right exit status, no half-made run, nothing lost."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from launch import last_line
from pictures import tree

pytestmark = pytest.mark.usefixtures('project')
SMALL = '--size 8 --epochs 2 --batch-size 8 --workers 0 --track off'.split()

def runs_in(project):
    "Directories of runs, whole or not."
    folder = project/'runs'
    return sorted(d for d in folder.iterdir() if d.is_dir()) if folder.is_dir() else []

def status(run): return json.loads((run/'status.json').read_text())

def refused(job, code, says):
    "The message of a command that was refused: one line, nothing else on stderr."
    assert job.wait() == code, job.err
    lines = [l for l in job.err.splitlines() if l.strip()]
    assert len(lines) == 1, f'more than one line on stderr: {job.err}'
    assert re.search(says, lines[0]), lines[0]
    assert lines[0].startswith('imgexp: ') and len(lines[0]) < 400
    assert not job.out
    return lines[0]

# -- through papermill, where it differs

@pytest.fixture(scope='module', autouse=True)
def through_papermill(request, launcher, tmp_path_factory):
    "Each start takes many seconds: they begin before the other tests of this file, and are looked at after them."
    if not any('papermill' in i.name for i in request.session.items if i.path == request.path): return
    root = tmp_path_factory.mktemp('papermill')
    data = tree(root/'data', 10)
    (data/'square/004.png').write_bytes((data/'square/004.png').read_bytes()[:60])
    small = '-p size 8 -p epochs 2 -p batch_size 8 -p workers 0 -p track off'.split()
    given = {'unknown': ['-p', 'epohs', '3'], 'range': ['-p', 'subset', '1.5'], 'image': [*small, '-p', 'data', 'data']}
    roots = {k: root/k for k in given}
    for k in roots: roots[k].mkdir()
    (roots['image']/'data').symlink_to(data)
    return {k: (launcher.papermill(*args, root=roots[k]), roots[k]) for k, args in given.items()}

# -- wrong use: refused before there is a run

WRONG = {
    'unknown parameter': ('--epohs 3', r'--epohs.*--epochs.*imgexp train --help'),
    'unknown command': (None, r"bogus.*--help"),
    'no number of epochs': ('--epochs 0', r'epochs=0 .*at least 1 and at most 10000'),
    'epochs in words': ('--epochs many', r"epochs='many' is not a whole number"),
    'half an epoch': ('--epochs 2.5', r"epochs='2.5' is not a whole number"),
    'subset 0': ('--subset 0', r'subset=0.* more than 0 and at most 1'),
    'subset 1.5': ('--subset 1.5', r'subset=1.5 .* more than 0 and at most 1'),
    'subset in words': ('--subset half', r"subset='half' is not a number"),
    'lr not a number': ('--lr nan', r'lr=nan .*at least 0 and at most 100'),
    'negative seed': ('--seed -1', r'seed=-1 .*at least 0'),
    'size 4': ('--size 4', r'size=4 .*at least 8 and at most 1024'),
    'precision': ('--precision int4', r"precision='int4' .*auto, fp32, bf16"),
    'track': ('--track maybe', r"track='maybe' .*auto, online, offline, off"),
    'no such folder': ('--data no/such/folder', r"data='no/such/folder': no such folder or file, .*digits"),
    'a file, not a folder': ('--data a.txt', r"data='a.txt'"),
    'no images': ('--data empty', r'no images in .*empty.*one folder of images per class'),
    'empty class folders': ('--data hollow', r'no images in .*hollow'),
    'images without class folders': ('--data loose', r'no images in class folders of loose, but 1 outside .*one folder of images per class'),
    'one class': ('--data single', r'only one class \(circle\) in .*single.* at least two'),
    'one class left': ('--data two --classes square', r'only one class \(square\)'),
    'unknown class': ('--data two --classes circle,sqare', r"unknown class 'sqare': did you mean 'square'"),
    'empty class': ('--data gap', r"class 'square' in .*gap has no training image: .*classes="),
    'no train folder': ('--data untrained', r'untrained has .*but no train folder'),
    'test class unknown': ('--data odd', r"class 'emu' has no folder among the training images"),
    'idx cut short': ('--data cutidx', r'train-images-idx3-ubyte.* is cut short'),
    'unknown arch': ('--arch resnet81', r"arch='resnet81' is not known.*resnet18"),
    'small for alexnet': ('--arch alexnet --size 32', r'size=32: alexnet needs'),
    'unknown recipe': ('--recipe rn50-fcv-16', r"recipe='rn50-fcv-16' is not known: did you mean 'rn50-ffcv-16'\? Choose one of quick, "),
    "a recipe's rate for another optimizer": ('--recipe scratch-small --optimizer adamw', r"optimizer='adamw': the learning rate of recipe=scratch-small is for sgd: give lr too"),
    'recipe and extend': ('--recipe quick --extend nothing', r"no run 'nothing'"),
    'extend no run': ('--extend 2019', r"no run '2019' in .*imgexp runs ls"),
    'warm-up without an end': ('--warmup 2', r'warmup=2 .*less than epochs=2'),
    'sizes no multiples': ('--sizes 33-64', r"sizes='33-64' has 33, .*multiples of 32"),
    'sizes for a transformer': ('--arch vit_b_32 --size 32 --sizes 64', r"sizes='64': vit_b_32 takes images of one size"),
    'sizes too small': ('--arch alexnet --size 64 --sizes 32', r'size=32: alexnet needs'),
    'fp16 on the processor': ('--precision fp16', r"precision='fp16' is not supported on cpu: choose fp32 or bf16"),
    'best by what is not averaged': ('--best-by ema_top1', r"best_by='ema_top1' needs averaged weights: give ema"),
    'no epochs': ('--keep-weights 1,b', r"keep_weights='1,b' .*separated by commas"),
    'no seeds': ('--seeds 0', r'--seeds.*imgexp train --help'),
    'negative time': ('--max-minutes -1', r'max_minutes=-1.0 .*at least 0'),
    'drop_path 1': ('--drop-path 1', r'drop_path=1.0 .*less than 1'),
    'drop_path without branches': ('--arch squeezenet1_1 --size 32 --drop-path 0.1', r'drop_path=0.1: squeezenet1_1'),
    'retrain too many blocks': ('--retrain 99', r'retrain=99: .*blocks'),
    'weights of another architecture': ('--arch squeezenet1_1 --size 32 --weights compact.pth', r'compact.pth.* not those of arch=squeezenet1_1'),
    'weights cut short': ('--weights cut.pth', r"weights='cut.pth' is damaged or not a weights file.*fetch or save it again"),
    'safetensors cut short': ('--weights cut.safetensors', r"weights='cut.safetensors' is damaged or not a weights file.*fetch or save it again"),
    'no weights there': ('--weights nowhere.pth', r"weights='nowhere.pth' is not a file.*'imagenet'"),
    'weights from the web that are none': ('--weights imagenet', r"weights='imagenet': compact_resnet has no published weights"),
    'no such run': ('--resume 20200101-nothing', r"no run '20200101-nothing'.*imgexp runs ls"),
}

@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "Everything that the cases below name."
    import struct, torch
    from safetensors.torch import save_file
    from imgexp.models import build_model
    shelf = tmp_path_factory.mktemp('shelf')
    tree(shelf/'two', 5); tree(shelf/'single', 3, ['circle']); tree(shelf/'gap', 3, ['circle'])
    tree(shelf/'odd/train', 3); tree(shelf/'odd/test', 3, ['circle'])
    tree(shelf/'untrained/test', 3)
    for d in ('empty', 'hollow/circle', 'hollow/square', 'gap/square', 'loose', 'odd/test/emu', 'cutidx'): (shelf/d).mkdir(parents=True)
    shutil.copy(shelf/'two/circle/000.png', shelf/'loose')
    (shelf/'a.txt').write_text('no data')
    for name, shape in (('images-idx3', (9, 4, 4)), ('labels-idx1', (9,))):
        (shelf/f'cutidx/train-{name}-ubyte').write_bytes(bytes([0, 0, 8, len(shape)]) + struct.pack(f'>{len(shape)}I', *shape) + b'\0'*8)
    state = build_model('compact_resnet', 2, size=8).state_dict()
    torch.save(state, shelf/'compact.pth'); save_file(state, shelf/'compact.safetensors')
    for kind in ('pth', 'safetensors'):
        whole = (shelf/f'compact.{kind}').read_bytes()
        (shelf/f'cut.{kind}').write_bytes(whole[:len(whole)//2])
    return shelf

@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(launcher, project, shelf, case):
    args, says = WRONG[case]
    args = ['bogus'] if args is None else ['train', *SMALL, *args.split()]
    refused(launcher.imgexp(*args, root=project, cwd=shelf), 2, says)
    assert runs_in(project) == []

def test_the_installed_command(project, shelf):
    "The real `imgexp` beside this python, as a person starts it."
    command = Path(sys.executable).with_name('imgexp')
    if not command.exists(): pytest.skip('imgexp is not installed beside this python')
    done = subprocess.run([command, 'train', '--data', 'nowhere'], cwd=shelf, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith("imgexp: data='nowhere': no such folder") and done.stderr.count('\n') == 1
    assert runs_in(project) == []
    done = subprocess.run([command, '--version'], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r'imgexp \d+\.\d+\.\d+\n', done.stdout)

def test_resume_of_a_run_with_other_parameters(launcher, project, shelf):
    args = ['train', *SMALL, '--data', 'two']
    job = launcher.imgexp(*args, root=project, cwd=shelf)
    assert job.wait() == 0, job.err
    run, = runs_in(project)
    before = {f.name: f.read_bytes() for f in run.glob('*.json')}
    refused(launcher.imgexp(*args, '--lr', '0.2', '--resume', run.name, root=project, cwd=shelf), 2,
            rf'{run.name} was started with other parameters \(lr 0.003 there, 0.2 here\): .*resume=auto')
    assert runs_in(project) == [run] and before == {f.name: f.read_bytes() for f in run.glob('*.json')}

# -- failures once there is a run

def failed(job, project, says, code=1):
    "The run that failed; its status says what stderr says."
    assert job.wait() == code, job.err
    run = runs_in(project)[-1]
    s = status(run)
    assert s['state'] == 'failed' and s['ended'], s
    line = last_line(job.err)
    assert re.search(says, line), line
    assert line.removeprefix('imgexp: ').partition(': ')[2] in s['error'], (line, s)
    assert re.search(says, s['error']), s['error']
    return run

@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_decoded(launcher, project, workers):
    data = tree(project/'data', 10)
    bad = {'circle/003.png': b'', 'square/005.png': b'<html>404</html>'}
    for name, raw in bad.items(): (data/name).write_bytes(raw)
    args = ['train', *SMALL, '--data', 'data', '--workers', workers]
    job = launcher.imgexp(*args, root=project)
    failed(job, project, r'(circle/003|square/005).png is (empty|not an image).*: fix or remove it, or skip such images with bad=skip')
    assert 'Traceback' not in job.err
    job = launcher.imgexp(*args, '--bad', 'skip', root=project)
    assert job.wait() == 0, job.err
    metrics = json.loads((runs_in(project)[-1]/'metrics.json').read_text())
    assert set(metrics['skipped']) == set(bad)
    assert metrics['skipped']['circle/003.png'] == 'is empty'

def test_an_undecodable_test_image_keeps_the_training(launcher, project):
    "Found after the last epoch: the run failed, and its checkpoints are there."
    tree(project/'data/train', 6); tree(project/'data/test', 3, seed=1)
    (project/'data/test/circle/001.png').write_bytes(b'\x89PNG')
    job = launcher.imgexp('train', *SMALL, '--data', 'data', root=project)
    run = failed(job, project, r'test/circle/001.png is cut short')
    assert len((run/'history.csv').read_text().splitlines()) == 3
    assert json.loads((run/'checkpoints/index.json').read_text())['best']

def test_a_loss_that_is_no_number(launcher, project):
    args = ['train', *SMALL, '--data', tree(project/'data', 10), '--optimizer', 'sgd', '--lr', '100', '--precision', 'fp32']
    before = ('real = imgexp.learner.F.cross_entropy\n'
              'imgexp.learner.F.cross_entropy = lambda *a, **k: real(*a, **k)*float("nan")')
    job = launcher.imgexp(*args, root=project, before=before)
    failed(job, project, r'train_loss is not finite in epoch 1, batch 1: try a smaller lr \(now 4\), clip=1, or precision=fp32')
    assert 'Traceback' not in job.err

def test_an_error_of_the_program_is_told_with_its_traceback(launcher, project):
    args = ['train', *SMALL, '--data', tree(project/'data', 10)]
    before = 'def broken(*a, **kw): raise RuntimeError("first line\\nwhat went wrong")\nimgexp.train.finish_run = broken'
    job = launcher.imgexp(*args, root=project, before=before)
    failed(job, project, 'what went wrong')
    assert 'Traceback' in job.err
    job = launcher.imgexp(*args, root=project)  # nothing was lost: it continues, and only evaluates
    assert job.wait() == 0, job.err
    assert len(runs_in(project)) == 1 and 'epoch 1/2' not in job.out
    assert status(runs_in(project)[0])['state'] == 'done'

# -- disks

def test_runs_on_a_read_only_disk(launcher, project, disk, shelf):
    disk.read_only()
    says = r'runs cannot be written \(Read-only file system\): make it writable, or set IMGEXP_ROOT to another folder'
    refused(launcher.imgexp('train', *SMALL, '--data', 'two', root=disk.path, cwd=shelf), 2, says)
    assert list(disk.path.iterdir()) == []

def test_runs_of_somebody_else(launcher, project, shelf):
    "Without root, permission bits do it; root becomes nobody first."
    folder = project/'runs'
    folder.mkdir(mode=0o755)
    before = ''
    if os.geteuid() == 0: before = 'os.setgroups([]); os.setgid(65534); os.setuid(65534)'
    else: folder.chmod(0o555)
    for parent in (project, *project.parents):
        if os.geteuid() == 0 and parent.stat().st_uid == 0 and not parent.stat().st_mode & 1: parent.chmod(parent.stat().st_mode | 0o711)
    job = launcher.imgexp('train', *SMALL, '--data', 'shapes', root=project, before=before)
    refused(job, 2, r'runs cannot be written \(Permission denied\): make it writable')
    folder.chmod(0o755)
    assert runs_in(project) == []

def test_disk_full_at_the_start(launcher, disk, shelf):
    "No half-made run stays behind."
    (disk.path/'runs').mkdir()
    disk.fill(0)
    job = launcher.imgexp('train', *SMALL, '--data', 'two', root=disk.path, cwd=shelf)
    refused(job, 2, r'runs cannot be written \(No space left on device\): free some disk space')
    assert runs_in(disk.path) == []
    (disk.path/'filler').unlink()
    assert launcher.imgexp('train', *SMALL, '--data', 'two', root=disk.path, cwd=shelf).wait() == 0

@pytest.fixture(scope='module')
def undisturbed(launcher, shelf, tmp_path_factory):
    "A run with room enough, and the size of its first checkpoint in bytes."
    root = tmp_path_factory.mktemp('undisturbed')
    job = launcher.imgexp('train', *SMALL, '--data', 'two', root=root, cwd=shelf)
    assert job.wait() == 0, job.err
    run, = runs_in(root)
    first = min((run/'checkpoints').glob('step-*'))
    return run, {f.name: -(-f.stat().st_size//4096)*4096 for f in first.iterdir()}

@pytest.mark.parametrize('place', ['model.safetensors', 'state.pt', 'COMMITTED.json', 'index.json'])
def test_disk_full_while_a_checkpoint_is_written(launcher, disk, shelf, undisturbed, place):
    "The second checkpoint finds the disk full at each of its files in turn; with room again, the same command continues."
    good, size = undisturbed
    weights, state = size['model.safetensors'], size['state.pt']
    left = {'model.safetensors': weights//2, 'state.pt': weights + state//2, 'COMMITTED.json': weights + state,
            'index.json': weights + state + 4096}[place]
    fill = f'''
import imgexp.checkpoints as t
real = t.write_checkpoint
def write(folder, *args):
    if t.Path(folder).glob('step-*') and len(list(t.Path(folder).glob('step-*'))) == 1 and not t.Path({str(disk.path)!r}, 'filler').exists():
        s = os.statvfs({str(disk.path)!r})
        with open({str(disk.path/'filler')!r}, 'wb') as f: f.write(b'0'*(s.f_bavail*s.f_frsize - {left}))
    return real(folder, *args)
t.write_checkpoint = write'''
    args = ['train', *SMALL, '--data', 'two']
    job = launcher.imgexp(*args, root=disk.path, cwd=shelf, before=fill)
    run = failed(job, disk.path, r'No space left on device.*free some')
    assert 'Traceback' not in job.err
    assert not list((run/'checkpoints').glob('.*.part'))
    (disk.path/'filler').unlink()
    job = launcher.imgexp(*args, root=disk.path, cwd=shelf)
    assert job.wait() == 0, job.err
    assert runs_in(disk.path) == [run] and 'epoch 1/2' not in job.out
    assert status(run)['state'] == 'done'
    def weights_of(run): return (sorted((run/'checkpoints').glob('step-*'))[-1]/'model.safetensors').read_bytes()
    assert weights_of(run) == weights_of(good)

# -- what papermill made of it

@pytest.mark.parametrize('case,says', [
    ('unknown', "unknown parameter 'epohs': did you mean 'epochs'?"),
    ('range', 'subset=1.5 is out of range: it must be more than 0 and at most 1')])
def test_papermill_wrong_use(through_papermill, case, says):
    job, root = through_papermill[case]
    assert job.wait() == 1
    assert last_line(job.err) == f'InputError: {says}'
    assert runs_in(root) == []

def test_papermill_fails_within_training(through_papermill):
    job, root = through_papermill['image']
    assert job.wait() == 1
    assert len(runs_in(root)) == 1, job.err
    run, = runs_in(root)
    assert last_line(job.err) == f"BadImage: {status(run)['error'].removeprefix('BadImage: ')}"
    assert re.search(r'square/004.png is cut short: fix or remove it.*bad=skip', last_line(job.err))
    assert status(run)['state'] == 'failed' and status(run)['ended']
