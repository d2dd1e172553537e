"Runs made before the parameters were declared in tables: they are listed, shown, compared, loaded and continued like new ones."
import json, shutil

import pytest
from launch import last_line
from pictures import CLASSES, tree
from imgexp.runs import ADDED, Run
from imgexp.start import diff_params, find_run

pytestmark = pytest.mark.usefixtures('project')
GIVEN = dict(size=12, epochs=2, batch_size=16, workers=0, track='off')
OLD = '''data classes subset recipe arch weights retrain drop_path size sizes augment flip crop mixup cutmix erase epochs batch_size micro_batch
         optimizer lr momentum weight_decay schedule warmup label_smoothing clip ema patience best_by keep_best keep_every keep_weights precision
         compile seed seed_subset seed_order seed_init pack workers bad extend max_minutes resume track upload'''.split()  # as they stood in params.json

def options(data, **more): return ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | {'data': data} | more).items())]
def the_runs(root): return sorted((Run(d) for d in (root/'runs').glob('2*')), key=lambda r: r.name)

def as_before(run):
    "Rewrite a run's params.json as it was written until November 2026."
    path = run.dir/'params.json'
    record = json.loads(path.read_text())
    record['params']['crop'] = record['params'].pop('min_scale')
    assert record['params'].keys() - ADDED['03_train'].keys() == {*OLD}, 'a parameter was added or renamed: an old run has none (imgexp.runs.RENAMED)'
    record['params'] = {k: record['params'][k] for k in OLD}
    record.pop('not_in_id')
    path.write_text(json.dumps(record, indent=1))
    return Run(run.dir)

@pytest.fixture(scope='module')
def data(tmp_path_factory): return tree(tmp_path_factory.mktemp('old')/'data', 20, CLASSES)

@pytest.fixture(scope='module')
def made(launcher, data, tmp_path_factory):
    "A project with two old runs: a finished one, and one that was stopped after its first epoch."
    root = tmp_path_factory.mktemp('made')
    job = launcher.imgexp(*options(data), root=root)
    assert job.wait() == 0, job.err
    stop = '''
import imgexp.callbacks as p
real = p.History.before_train
def before_train(self):
    if self.learn.epoch == 1: os.kill(os.getpid(), signal.SIGKILL)
    real(self)
p.History.before_train = before_train'''
    assert launcher.imgexp(*options(data, seed=1, workers=1), root=root, before=stop).wait() == -9
    for run in the_runs(root): as_before(run)
    return root

@pytest.fixture
def old(project, made):
    shutil.copytree(made/'runs', project/'runs')
    return the_runs(project)

def test_they_are_listed_shown_and_compared(launcher, project, old):
    job = launcher.imgexp('runs', 'ls', '--json', root=project)
    assert job.wait() == 0, job.err
    rows = json.loads(job.out)
    assert [(r['run'], r['state'], r['epochs'], r['seed'], r['workers']) for r in rows] == [(old[0].name, 'done', 2, 0, 0), (old[1].name, 'died', 1, 1, 1)]
    job = launcher.imgexp('runs', 'show', old[0].name, root=project)
    assert job.wait() == 0 and 'test top1' not in job.out and 'valid top1' in job.out and 'epochs=2' in job.out, job.err
    assert old[0].params['min_scale'] == 0.35 and 'crop' not in old[0].params, 'by the name that the parameter has today'
    assert diff_params(*old) == {'seed': (0, 1)}, 'the number of workers does not shape a result'
    job = launcher.imgexp('runs', 'diff', *(r.name for r in old), root=project)
    assert job.wait() == 0 and 'workers' not in job.out and 'seed' in job.out, job.err

def test_they_are_loaded(launcher, project, old, data):
    job = launcher.imgexp('eval', old[0].name, '--split', 'valid', '--json', root=project)
    assert job.wait() == 0 and json.loads(job.out) == old[0].metrics['valid'], job.err
    job = launcher.imgexp('predict', old[0].name, str(data/CLASSES[0]), root=project)
    assert job.wait() == 0 and len(job.out.splitlines()) == 21, job.err

def test_they_are_reused_continued_and_extended(launcher, project, old, data):
    "The same parameters have the same id."
    job = launcher.imgexp(*options(data, resume='reuse'), root=project)
    assert job.wait() == 0 and len(the_runs(project)) == 2 and 'epoch 1/' not in job.out, job.err
    job = launcher.imgexp(*options(data, seed=1), root=project)
    assert job.wait() == 0 and f'continuing {old[1].name} at epoch 2' in job.out and old[1].finished, job.err
    job = launcher.imgexp('train', '--extend', old[0].name, '--epochs', '1', '--track', 'off', root=project)
    assert job.wait() == 0 and find_run('', project/'runs').depends['extend'].startswith(f'{old[0].id} '), job.err
    job = launcher.imgexp(*options(data, seed=2, resume=old[0].name), root=project)
    assert job.wait() == 2 and last_line(job.err).endswith('(seed 0 there, 2 here): give the same ones, or resume=auto'), job.err

@pytest.mark.parametrize('notebook, id', [('03_train', '6e03be0b'), ('20_transfer', '7d6f4e48'), ('10_keras_cnn', '24849784')])
def test_the_same_values_have_the_same_id(notebook, id):
    "All defaults, as the ids were before: another one means that nobody's runs would be continued or reused."
    from imgexp.experiments import find_experiment
    from imgexp.start import run_id
    assert run_id(notebook, find_experiment(notebook).params(), {'data': 'digits'}) == id
