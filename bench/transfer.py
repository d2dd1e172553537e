"""How long a head on a frozen network takes: imgexp.transfer against the usual script, and against other ways to do the same.

    python bench/transfer.py path/to/images --weights mobilenet_v2.pth
    python bench/transfer.py path/to/images --weights mobilenet_v2.pth --only frozen,memory

`path/to/images` has train, validation and test, of class folders. Every contender is a process of its own; imports are not counted.
Prints the tables and writes their rows, with the machine, into bench/results/transfer.csv. See bench/README.md.
"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from pathlib import Path

from tables import alone, compare, machine, save, show

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'transfer.csv'
TABLES = ['frozen', 'second', 'frozen-rn50', 'retrain-rn18-128', 'peers', 'memory']
EPOCHS, USUAL, OURS, FP32 = 10, 'usual script, 10 times an epoch', 'imgexp.transfer, empty cache', 'imgexp.transfer, empty cache, fp32'
LATER = {'other seed': dict(seed=1), 'other split': {}, 'head=mlp': dict(head='mlp'), 'head=logistic': dict(head='logistic')}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', help='class folders in train, validation and test')
    parser.add_argument('--weights', help='of MobileNetV2, for the tables frozen, second and peers')
    parser.add_argument('--only', default='frozen,frozen-rn50,retrain-rn18-128,peers,memory', help='tables, separated by commas; frozen makes second too (%(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='(%(default)s)')
    args = parser.parse_args()
    args.images, args.weights = (str(Path(p).resolve()) if p else '' for p in (args.images, args.weights))
    for table in args.only.split(','):
        rows = list(globals()[table.replace('-', '_')](args))
        show(rows)
        save([r | machine('cpu') for r in rows], RESULTS, TABLES)

# -- contenders, each in a process of its own

def child(name, place, **kw):
    "What a function of this file, in another process, gives back"
    env = os.environ | {'IMGEXP_ROOT': str(place), 'XDG_CACHE_HOME': str(place), 'WANDB_MODE': 'disabled', 'TF_CPP_MIN_LOG_LEVEL': '3', 'PYTHONPATH': str(HERE)}
    code = f'import json, sys, transfer; print(json.dumps(transfer.{name}(**json.loads(sys.argv[1]))))'
    done = subprocess.run([sys.executable, '-c', code, json.dumps(kw)], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    print(f'{name} {kw}: {done.stdout.splitlines()[-1]}', flush=True)
    return json.loads(done.stdout.splitlines()[-1])

def usual(images, *more):
    "Seconds of ten epochs and the test, from one epoch after five batches"
    done = subprocess.run([sys.executable, HERE/'usual_transfer.py', images, '--epochs', '1', '--warm-up', '5', *more], capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    print(f'usual_transfer {more}: {told}', flush=True)
    return EPOCHS*told['epochs'][0] + told['evaluation']

def ours(experiment='transfer', **given):
    import importlib
    import matplotlib.figure, matplotlib.backends.backend_agg, pandas
    train = importlib.import_module(f'imgexp.{experiment}').train
    began = time.perf_counter()
    run = train(track='off', **given)
    return {'seconds': time.perf_counter() - began, 'test': run.metrics['test']['top1']['value']}

def fastai(images, weights):
    "The frozen phase of `fine_tune`: an epoch after a tenth of one, ten times; batch norm is trained, as is fastai's default"
    import torch
    from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, ShortEpochCallback, create_vision_model, default_split, imagenet_stats
    from torchvision.models import mobilenet_v2
    dls = ImageDataLoaders.from_folder(images, train='train', valid='validation', item_tfms=Resize(224, method='squish'), bs=64, num_workers=2,
                                       batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = Learner(dls, create_vision_model(mobilenet_v2, dls.c, pretrained=False, cut=1), splitter=default_split)  # as `vision_learner` does; it forgets `cut`
    state = torch.load(weights, weights_only=True)
    learn.model[0].load_state_dict({k.replace('features.', '0.'): v for k, v in state.items() if k.startswith('features.')})
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 2e-3, cbs=ShortEpochCallback(0.1))
        began = time.perf_counter()
        learn.fit_one_cycle(1, 2e-3)
    return {'seconds': EPOCHS*(time.perf_counter() - began)}

def keras(images):
    "The feature extraction of Keras' guide to transfer learning: the second epoch, ten times; random weights"
    from keras import Input, Model, applications, layers, optimizers, utils
    def read(split): return utils.image_dataset_from_directory(f'{images}/{split}', image_size=(224, 224), batch_size=64, verbose=False).prefetch(2)
    train, valid = read('train'), read('validation')
    base = applications.MobileNetV2(weights=None, include_top=False, input_shape=(224, 224, 3))
    base.trainable = False
    x = inputs = Input((224, 224, 3))
    x = base(layers.Rescaling(1/127.5, -1)(x), training=False)
    outputs = layers.Dense(10)(layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x)))
    model = Model(inputs, outputs)
    model.compile(optimizers.Adam(), 'sparse_categorical_crossentropy')
    model.fit(train, validation_data=valid, epochs=1, verbose=0)  # compiled for each size of a batch
    began = time.perf_counter()
    model.fit(train, validation_data=valid, epochs=1, verbose=0)
    return {'seconds': EPOCHS*(time.perf_counter() - began)}

def sklearn(images, weights):
    "LogisticRegression on the cached features, its C chosen on validation images among eleven, as `head=logistic` does"
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from imgexp.features import View, cut, features
    from imgexp.loader import IMAGENET
    from imgexp.models import build_model
    from imgexp.packs import load_images
    began = time.perf_counter()
    table = load_images(images)
    found = features(table, cut(build_model('mobilenet_v2', len(table.classes), weights, 0, 224)), View(224, IMAGENET))
    x, y = ({s: v for s, v in zip(('train', 'valid', 'test'), each)} for each in zip(*((found.take(rows).float().numpy(), table.labels[rows]) for rows in map(table.split, ('train', 'valid', 'test')))))
    mean, std = x['train'].mean(0), x['train'].std(0) + 1e-6
    x = {s: (v - mean)/std for s, v in x.items()}
    fits = [LogisticRegression(C=1/(d*len(y['train'])), max_iter=100).fit(x['train'], y['train']) for d in 10.**np.arange(0, -5.5, -0.5)]
    best = max(fits, key=lambda f: f.score(x['valid'], y['valid']))
    return {'seconds': time.perf_counter() - began, 'test': best.score(x['test'], y['test'])}

# -- tables

def in_turn(rounds, **contenders):
    "Values of each contender, taken in turns"
    out = {k: [] for k in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            with tempfile.TemporaryDirectory() as place: out[name].append(measure(place))
    return out

def seconds(name, **kw): return lambda place: child(name, place, **kw)['seconds']

def frozen(args):
    "From nothing, then experiments on a backbone whose features are there: the usual script needs its time again"
    given = dict(data=args.images, arch='mobilenet_v2', weights=args.weights, size=224)
    first, later = {OURS: [], FP32: [], USUAL: []}, {USUAL: [], **{k: [] for k in (*LATER, 'scikit-learn on the same features')}}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as other:
            first[OURS].append(child('ours', place, **given)['seconds'])
            for name, own in LATER.items(): later[name].append(child('ours', place, **given | (own or dict(data=split_anew(args.images, other))))['seconds'])
            later['scikit-learn on the same features'].append(child('sklearn', place, images=args.images, weights=args.weights)['seconds'])
        with tempfile.TemporaryDirectory() as place: first[FP32].append(child('ours', place, **given, precision='fp32')['seconds'])
        first[USUAL].append(usual(args.images, '--weights', args.weights))
        later[USUAL].append(first[USUAL][-1])
    yield from compare('frozen', first, {USUAL: 'ratio >= 15'})
    yield from compare('second', later, {k: 'ratio >= 200' for k in LATER}, over=True)

def split_anew(images, place):
    "A folder with the same test images, and the others without a split: imgexp makes one, as large as the usual script's epoch"
    for path in Path(images).glob('*/*/*'):
        new = Path(place)/('test' if path.parts[-3] == 'test' else 'train')/path.parts[-2]/path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    return str(place)

def some(images, place, n=600):
    "A folder with n of the images, the splits in proportion"
    files = sorted(Path(images).glob('*/*/*'))
    for path in random.Random(0).sample(files, n):
        new = Path(place)/path.relative_to(images)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    return str(place)

def frozen_rn50(args):
    with tempfile.TemporaryDirectory() as folder:
        images = some(args.images, folder)
        found = in_turn(args.rounds, **{OURS: seconds('ours', data=images, arch='resnet50', size=224), FP32: seconds('ours', data=images, arch='resnet50', size=224, precision='fp32'), USUAL: lambda place: usual(images, '--arch', 'resnet50')})
    yield from compare('frozen-rn50', found, {USUAL: 'ratio >= 20'})

def peers(args):
    with tempfile.TemporaryDirectory() as folder:
        images = some(args.images, folder)
        named = dict(images=images, weights=args.weights)
        found = in_turn(args.rounds, **{
            OURS: seconds('ours', data=images, arch='mobilenet_v2', weights=args.weights, size=224), USUAL: lambda place: usual(images, '--weights', args.weights),
            'fastai fine_tune, frozen phase': seconds('fastai', **named), 'Keras, feature extraction': seconds('keras', images=images),
            'imgexp.features and scikit-learn': seconds('sklearn', **named)})
    yield from compare('peers', found, {})

def retrain_rn18_128(args):
    given = dict(data=args.images, arch='resnet18', size=128, retrain=2, epochs=EPOCHS, batch_size=64)
    loop = given | dict(augment='none', optimizer='adam', lr=0.001, schedule='constant', keep_best=1)
    same, plain = 'same precision, frozen part in the loop (imgexp.train)', USUAL
    found = in_turn(args.rounds, **{OURS: seconds('ours', **given), same: seconds('ours', experiment='train', **loop),
                                    plain: lambda place: usual(args.images, '--arch', 'resnet18', '--size', '128', '--train', 'layer4')})
    yield from compare('retrain-rn18-128', found, {same: 'ratio >= 1.6', plain: 'ratio >= 3'})

def large(n, width, head, precision):
    "A head on n features, which are there: MB at most, seconds, and how fast they are read"
    import resource
    import numpy as np, torch
    import imgexp.transfer as t
    from imgexp.data import Images
    from imgexp.features import Features, FeatureCache
    from imgexp.models import build_model
    from imgexp.runs import check_call, start_run
    rng, kind = np.random.default_rng(0), torch.float32 if precision == 'fp32' else torch.bfloat16
    contents, labels = np.array([f'{i:032}' for i in range(n)], 'S32'), rng.integers(0, 10, n)
    cache = FeatureCache({'generated': [n, width, precision]})
    for rows in np.array_split(np.arange(n), 16): cache.add(contents[rows], (torch.randn(len(rows), width) + torch.from_numpy(labels[rows])[:, None]/5).to(kind))
    began = time.perf_counter()
    cache = FeatureCache(cache.about)  # which has not seen the files
    where = cache.find(contents)
    opened = time.perf_counter() - began
    found = Features(cache, where, {}, 0)
    table = Images(np.arange(n), labels, (rng.random(n) < 0.1).astype(np.int8), [str(c) for c in range(10)], name='generated', pixels=np.zeros((n, 8, 8, 3), np.uint8))
    t.load_features = lambda *args: ([found], found)
    p = check_call(t.train, dict(arch='resnet50', head=head, precision=precision, epochs=2, track='off'), t.ALLOWED)
    model = build_model('resnet50', 10, size=64, retrain=0)
    with start_run('large', p) as run: t.fit_head(run, p, t.make_learner(p, table, model, ((0.5,)*3,)*2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    loader = t.FeatureLoader(table, 'train', [found], 64)
    began = time.perf_counter()
    read = sum(x.nbytes for x, _ in loader.at(0))
    return {'mb': peak, 'gb_s': read/1e9/(time.perf_counter() - began), 'open_gb_s': n*width*kind.itemsize/1e9/opened, 'top1': float(run.history.valid_top1.max())}

def memory(args, n=100_000, width=2048):
    kinds = {'linear, fp32': ('linear', args.rounds), 'logistic, fp32': ('logistic', 1)}
    found = {k: in_turn(rounds, x=lambda place: child('large', place, n=n, width=width, head=head, precision='fp32'))['x'] for k, (head, rounds) in kinds.items()}
    for k, values in found.items():
        names = {f'peak memory, MB: {k}': 'mb', f'features read, GB/s: {k}': 'gb_s', f'features opened and verified, GB/s: {k}': 'open_gb_s'}
        yield from alone('memory', {name: [v[c] for v in values] for name, c in names.items()},
                         {f'peak memory, MB: {k}': 'median < 2500', f'features read, GB/s: {k}': 'median >= 1.5'})

if __name__ == '__main__': main()
