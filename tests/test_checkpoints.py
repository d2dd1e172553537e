"Damage and malice: a checkpoint that is not what was written is passed over, and nothing in it is ever executed."
import json, pickle, shutil, signal

import pandas as pd, pytest
from launch import last_line
from pictures import CLASSES, tree
from imgexp.checkpoints import checkpoints, read_index, read_weights
from imgexp.files import seal
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')
GIVEN = dict(size=12, epochs=4, batch_size=16, ema=0.9, keep_weights='1', track='off')
FILES = ['model.safetensors', 'ema.safetensors', 'state.pt', 'COMMITTED.json', 'index.json']

def options(data): return ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | {'data': data, 'workers': 0}).items())]

def the_run(root):
    run, = (root/'runs').glob('2*')
    return Run(run)

def result(run):
    last = checkpoints(run)[0]
    files = json.loads((last/'COMMITTED.json').read_text())['files']
    history = run.history.drop(columns=['seconds', 'img_per_s', 'peak_mem_mb', 'checkpoint_mb', 'checkpoint_s'])
    return [files[f]['sha256'] for f in FILES[:2]], history

@pytest.fixture(scope='module')
def runs(launcher, tmp_path_factory):
    "An undisturbed run, and one that was killed in the fourth epoch: three checkpoints."
    folder = tmp_path_factory.mktemp('damage')
    data = tree(folder/'data', 20, CLASSES)
    for name in ('whole', 'killed'): (folder/name).mkdir()
    die = '''
import imgexp.callbacks as t
real = t.History.before_train
def before_train(self):
    if self.learn.epoch == 3: os.kill(os.getpid(), signal.SIGKILL)
    real(self)
t.History.before_train = before_train'''
    jobs = [launcher.imgexp(*options(data), root=folder/'whole'), launcher.imgexp(*options(data), root=folder/'killed', before=die)]
    assert jobs[0].wait() == 0 and jobs[1].wait() == -signal.SIGKILL, jobs[0].err + jobs[1].err
    assert len(checkpoints(the_run(folder/'killed'))) == 3
    return folder

def truncate(path): path.write_bytes(path.read_bytes()[:-7])
def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 4
    path.write_bytes(raw)
def remove(path): path.unlink()

def copy(runs, project):
    shutil.copytree(runs/'killed'/'runs', project/'runs')
    return the_run(project)

def file_of(run, checkpoint, name): return checkpoint.parent/name if name == 'index.json' else checkpoint/name

@pytest.mark.parametrize('harm', [truncate, flip, remove])
@pytest.mark.parametrize('name', FILES)
def test_the_newest_checkpoint_is_damaged(launcher, project, runs, name, harm):
    "The run continues from the one before, says so, and ends as the undisturbed run."
    run = copy(runs, project)
    newest = checkpoints(run)[0]
    harm(file_of(run, newest, name))
    job = launcher.imgexp(*options(runs/'data'), root=project)
    assert job.wait() == 0, job.err
    if name == 'index.json': assert f'continuing {run.name} at epoch 4' in job.out
    else:
        assert f'continuing {run.name} at epoch 3' in job.out
        assert f'{newest.name}: {name} is' in job.err and 'trying the one before' in job.err
    (weights, history), (weights2, history2) = result(run), result(the_run(runs/'whole'))
    assert weights == weights2
    pd.testing.assert_frame_equal(history, history2, check_exact=True)
    def best(r): return [(b['epoch'], b['ema_top1']) for b in read_index(r)['best']]
    assert best(run) == best(the_run(runs/'whole'))

@pytest.mark.parametrize('name', FILES[:4])
def test_all_checkpoints_are_damaged(launcher, project, runs, name):
    "It refuses rather than start over, and touches nothing."
    run = copy(runs, project)
    for path in checkpoints(run): truncate(path/name)
    before = sorted(p.relative_to(run.dir) for p in run.dir.rglob('*'))
    job = launcher.imgexp(*options(runs/'data'), root=project)
    assert job.wait() == 1
    assert last_line(job.err) == f'imgexp: all 3 checkpoints of run {run.name} are damaged: restore them from a copy, or give resume=never to start over'
    assert before == sorted(p.relative_to(run.dir) for p in run.dir.rglob('*')) and len(run.history) == 3
    assert 'all 3 checkpoints' in the_run(project).status['error']

class Malice:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (str(self.mark), 'w')

@pytest.mark.parametrize('name', FILES)
def test_a_malicious_pickle_is_not_executed(launcher, project, runs, name):
    "In place of any file, with hashes that fit: at most a refusal in one line."
    run, mark = copy(runs, project), project/'executed'
    pickle.loads(pickle.dumps(Malice(project/'proof'))).close()
    assert (project/'proof').exists()  # it would work
    import hashlib
    for newest in checkpoints(run):
        path = file_of(run, newest, name)
        path.write_bytes(pickle.dumps(Malice(mark)))
        if name in FILES[:3]:
            committed = json.loads((newest/'COMMITTED.json').read_text())
            committed['files'][name]['sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
            (newest/'COMMITTED.json').write_text(json.dumps(seal(committed)))
    job = launcher.imgexp(*options(runs/'data'), root=project)
    assert (job.wait() == 0) == (name == 'index.json'), job.err
    assert not mark.exists()
    if name == 'state.pt': assert 'state.pt holds Python objects, which are never unpickled' in last_line(job.err)
    if name in FILES[:2]: assert f'{name} is missing, damaged, or not from a run' in last_line(job.err)
    assert 'Traceback' not in job.err

def test_weights_alone_and_averages_are_loaded(project, runs):
    from imgexp.evaluate import load_run
    run = the_run(runs/'whole')
    best = read_index(run)['best'][0]['name']
    mean, own = (read_weights(run.dir/'checkpoints'/best, k)[0] for k in ('ema', 'model'))
    loaded = load_run(str(run.dir)).model.state_dict()
    assert all((loaded[k] == mean[k]).all() for k in mean) and any((mean[k] != own[k]).any() for k in mean)
    early = load_run(str(run.dir), 'weights-0001').model.state_dict()
    alone = read_weights(run.dir/'checkpoints'/'weights-0001.safetensors')[0]
    assert all((early[k] == alone[k]).all() for k in alone) and any((early[k] != own[k]).any() for k in own)

def test_the_index_of_averages_is_made_anew(project, runs):
    "It still knows whose accuracy made the best."
    run = copy(runs, project)
    before = read_index(run)
    (run.dir/'checkpoints/index.json').unlink()
    after = read_index(run)
    assert before['by'] == after['by'] == 'ema_top1' and before['best'][0] == after['best'][0]

def test_a_loss_that_is_no_number_is_the_worst():
    from imgexp.callbacks import better
    good, bad = dict(valid_top1=0.5, valid_loss=1.), dict(valid_top1=0.5, valid_loss=None)
    assert better('valid_loss', good, bad) and not better('valid_loss', bad, good) and better('valid_top1', good, dict(valid_top1=0.5, valid_loss=float('nan')))
