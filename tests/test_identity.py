"A run's id holds everything that its result depends on, and nothing else."
import inspect, json, subprocess, sys
from importlib import import_module
from importlib.util import find_spec
import pytest
from imgexp.start import run_id

# a parameter's other value; None: tested on its own below
SOURCE = dict.fromkeys(('label_from', 'classes_at', 'columns', 'valid_fold', 'hold_out'))  # they do not apply to embedded images: see test_sources
TRAIN = dict(
    data='shapes', classes='0,1,2', subset=0.5, recipe=None, arch='resnet18', weights=None, retrain=1, drop_path=0.1, size=28, sizes='32-64', augment='color', flip='none',
    min_scale=0.5, mixup=0.2, cutmix=1.0, erase=0.5, epochs=3, batch_size=16, micro_batch=8, optimizer='adam', lr=0.01, momentum=0.8, weight_decay=0.1, schedule='cosine',
    warmup=1.0, label_smoothing=0.1, clip=1.0, ema=0.99, patience=2, best_by='valid_loss', keep_best=1, keep_every=2, keep_weights='1', precision='fp32', compile=True,
    seed=1, seed_subset=1, seed_order=1, seed_init=1, pack='off', workers=1, bad='skip', extend=None, max_minutes=5.0, resume='never', track='off', upload=True, threads=2, steps=40, resplit='60/20/20', head_init='kaiming', states=True, figures=False, explain=2,
    start=None, shrink=None, class_augment=None, lr_limit=0.001, **SOURCE)
TRANSFER = dict(
    data='shapes', classes='0,1,2', subset=0.5, arch='compact_resnet', weights=None, retrain=1, head='mlp', size=48, normalize='half', views=2, augment='color', epochs=3, max_images='50', keep_weights='1',
    batch_size=16, lr=0.01, weight_decay=0.1, finetune_epochs=1, finetune_lr=0.01, cache_gb=1.0, precision='fp32', seed=1, seed_subset=1, seed_order=1, seed_init=1,
    workers=1, bad='skip', resume='never', track='off', resplit='60/20/20', explain=2, **SOURCE)
KERAS = dict(
    data='shapes', classes='0,1,2', subset=0.5, size=28, filters=8, filter_size=5, strategy='half', blocks=2, activation='mish', batch_norm=True, dense=16, dropout=0.1,
    augment=True, batch_size=16, epochs=3, lr=0.01, schedule='cosine', precision='fp32', seed=1, bad='skip', resume='never', track='off', resplit='60/20/20', **SOURCE)

EXEMPT = {'resume', 'track', 'workers', 'max_minutes', 'upload',     # how, where and how long, not what
          'keep_best', 'keep_every', 'keep_weights', 'cache_gb',     # what stays on the disk
          'states', 'figures', 'explain',                            # what is evaluated and drawn at the end
          'bad',                                                     # a run that met a damaged image can go on without it; what it left out is not reused by `stop`
          'threads',                                                 # how the last bits are rounded: told, and kept by a continued run
          'pack',                                                    # `prepared` in what the run depends on, where it changes what the network sees
          'recipe'}                                                  # its values are parameters

def ids(monkeypatch, start, run):
    "The id with which `run` starts."
    found = []
    class Begun(Exception): pass
    def begin(notebook, params, depends=None, **kw):
        found.append(run_id(notebook, params, depends or {}))
        raise Begun
    monkeypatch.setattr(start, begin)
    with pytest.raises(Begun): run()
    return found[0]

def of(experiment, monkeypatch, **values):
    module = import_module(f'imgexp.{experiment}')
    return ids(monkeypatch, f"imgexp.{'setup' if experiment == 'train' else experiment}.start_run", lambda: module.train(**values))

@pytest.mark.parametrize('experiment, changed, base', [
    ('train', TRAIN, dict(epochs=2, track='offline')),
    ('transfer', TRANSFER, dict(epochs=2, views=1, finetune_epochs=2, track='offline'))], ids=['train', 'transfer'])
def test_every_parameter_shapes_the_id(project, monkeypatch, experiment, changed, base):
    "Each changed alone makes another run, but for those that are named as exempt, which do not."
    names = list(inspect.signature(import_module(f'imgexp.{experiment}').train).parameters)
    assert sorted(names) == sorted(changed), 'a new parameter: add another value of it above'
    first = of(experiment, monkeypatch, **base)
    for name, value in changed.items():
        if value is None: continue
        differs = of(experiment, monkeypatch, **base | {name: value}) != first
        assert differs == (name not in EXEMPT), f'{name}={value!r}: ' + ('another id' if differs else 'the same id')

def test_exemptions_are_these():
    "Those of all experiments together; one of them names nothing that is not among its parameters."
    from imgexp.setup import TrainParams
    from imgexp.transfer import TransferParams
    assert set(TrainParams().not_in_id()) | set(TransferParams().not_in_id()) == EXEMPT
    for table in (TrainParams, TransferParams): assert set(table().not_in_id()) == EXEMPT & table.table().keys()

KERAS_IDS = '''
import json, sys
import imgexp.keras_cnn as k
from imgexp.start import run_id
class Begun(Exception): pass
def begin(notebook, params, depends=None, **kw): raise Begun(run_id(notebook, params, depends or {}))
k.start_run = begin
def of(**values):
    try: k.train(**values)
    except Begun as e: return str(e)
print(json.dumps([of(epochs=2), {n: of(**{'epochs': 2, n: v}) for n, v in json.loads(sys.argv[1]).items()}]))
'''

def test_every_parameter_of_keras_shapes_the_id(project):
    if not find_spec('keras'): pytest.skip('needs keras')
    from imgexp import keras_cnn
    names = [n for n in inspect.signature(keras_cnn.train).parameters]
    assert set(keras_cnn.KerasParams().not_in_id()) == EXEMPT & set(names)
    assert sorted(names) == sorted(KERAS), 'a new parameter: add another value of it above'
    done = subprocess.run([sys.executable, '-c', KERAS_IDS, json.dumps({k: v for k, v in KERAS.items() if v is not None})], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, found = json.loads(done.stdout.splitlines()[-1])
    for name, id in found.items(): assert (id != first) == (name not in EXEMPT), name

# -- what a parameter names

MINE = '''from levels import low
def dark(image): return image//low
def invert(image): return 255 - image
'''
SMALL = dict(arch='small_cnn', size=20, subset=0.1, epochs=1, track='off', resume='reuse')

@pytest.fixture
def mine(project, monkeypatch):
    "A folder with functions of the user's own, in which he stands; gives a way to train there in a process of its own."
    (project/'mine.py').write_text(MINE)
    (project/'levels.py').write_text('low = 2\n')
    def train(**values):
        options = [s for k, v in (SMALL | values).items() for s in (f'--{k.replace("_", "-")}', str(v))]
        done = subprocess.run([sys.executable, '-m', 'imgexp.cli', 'train', *options], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return next(l.split()[-1] for l in done.stdout.splitlines() if l.startswith('run '))
    return train

def test_another_function_is_another_run(mine, project):
    "Another function of the same file; another content of a file that it imports."
    first, other = mine(augment='mine:dark'), mine(augment='mine:invert')
    (project/'levels.py').write_text('low = 3\n')
    assert len({first, other, mine(augment='mine:dark')}) == 3

def test_a_run_that_extends_another_holds_its_weights(project):
    "The parent counts by what it ended with, not by its name."
    from imgexp.train import train
    parent = train(**SMALL)
    child = train(**SMALL | dict(extend=parent.name))
    assert child.depends['extend'].startswith(f'{parent.id} ')
    moved = parent.dir.rename(parent.dir.with_name('20200101-000000-03_train-another'))
    assert train(**SMALL | dict(extend=moved.name)).name == child.name
    (moved/'checkpoints').rename(moved/'lost')
    other = train(**SMALL | dict(seed=1))
    (other.dir/'checkpoints').rename(moved/'checkpoints')  # other weights under the same name
    assert train(**SMALL | dict(extend=moved.name)).id != child.id

def test_a_run_that_starts_with_another_holds_its_weights(project):
    "The parent counts by its best weights, not by its name; head and normalization come with them, and nothing else."
    import torch
    from imgexp.evaluate import load_run
    from imgexp.train import train
    parent = train(**SMALL | dict(size=28))
    child = train(**SMALL | dict(start=parent.name, size=32, keep_weights='0', optimizer='sgd'))
    assert child.params['arch'] == parent.params['arch'] and child.depends['weights'] == '' and child.depends['start']
    before, begun = (load_run(run.name, checkpoint) for run, checkpoint in ((parent, 'best'), (child, 'weights-0000')))
    for k, v in before.model.state_dict().items(): assert torch.equal(v, begun.model.state_dict()[k]), k
    assert begun.metadata['norm'] == before.metadata['norm'] and begun.size == 32
    moved = parent.dir.rename(parent.dir.with_name('20200101-000000-03_train-another'))
    assert train(**SMALL | dict(start=moved.name, size=32, optimizer='sgd')).name == child.name
    other = train(**SMALL | dict(seed=1, size=28))
    assert train(**SMALL | dict(start=other.name, size=32, optimizer='sgd')).id != child.id

def test_recommendations_count_by_content(project):
    import json
    from imgexp.train import train
    def trained(name, policy, data=None):
        file = project/name
        file.write_text(json.dumps({'schema': 1, 'split': 'valid', 'recommend': [{'policy': policy, 'classes': ['3']}]} | ({'data': data} if data else {})))
        return train(**SMALL | dict(class_augment=str(file)))
    first = trained('a.json', 'trivial')
    assert trained('b.json', 'trivial').name == first.name and trained('a.json', 'color').id != first.id
    from imgexp.errors import InputError
    with pytest.raises(InputError, match='other images or splits'): trained('a.json', 'trivial', 'another')
