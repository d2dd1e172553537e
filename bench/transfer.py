"""How long a head on a frozen network takes: imgexp.transfer beside the usual script, the script that extracts features once, and other libraries.

    python bench/transfer.py path/to/images --weights mobilenet_v2.pth
    python bench/transfer.py path/to/images --weights mobilenet_v2.pth --only frozen-bf16,second

`path/to/images` has train, validation and test, of class folders. Every contender is a process of its own; imports are not counted, everything
else is. The contenders of a table compute at one precision. A table that was interrupted goes on where it was. Prints the tables and writes
their rows, with the machine, into bench/results/transfer.csv. See bench/README.md.
"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

from tables import alone, compare, forget, in_turn, machine, save, show

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'transfer.csv'
EPOCHS, LONG, ONCE = 10, 3, 1  # rounds of what takes more than a minute; of what takes more than four
OURS, EXTRACTED, USUAL = 'imgexp.transfer, empty cache', 'usual script, features extracted once', 'usual script'

# -- contenders, each in a process of its own

def fresh(command, place, **env):
    "What a process prints last, as JSON"
    env = os.environ | {'IMGEXP_ROOT': str(place), 'XDG_CACHE_HOME': str(place), 'WANDB_MODE': 'disabled', 'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''} | env
    env['PYTHONPATH'] = os.pathsep.join([str(HERE), env.get('PYTHONPATH', '')])
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f'bench: {command} failed:\n{done.stderr[-4000:]}')
    return json.loads(done.stdout.splitlines()[-1])

def child(name, place, **kw):
    "What a function of this file, in another process, gives back"
    return fresh(['-c', f'import json, sys, transfer; print(json.dumps(transfer.{name}(**json.loads(sys.argv[1]))))', json.dumps(kw)], place)

def alone_in(name, **kw):
    "A contender: a function of this file, with nothing cached before; gives its seconds"
    def run():
        with tempfile.TemporaryDirectory() as place: return child(name, place, **kw)['seconds']
    return run

def script(images, *more):
    "A contender: usual_transfer.py, all of its epochs; gives its seconds"
    def run():
        with tempfile.TemporaryDirectory() as place: return fresh([HERE/'usual_transfer.py', images, '--epochs', EPOCHS, *more], place)['seconds']
    return run

def ours(experiment='transfer', **given):
    import importlib
    import matplotlib.figure, matplotlib.backends.backend_agg, pandas
    train = importlib.import_module(f'imgexp.{experiment}').train
    began = time.perf_counter()
    run = train(track='off', **given)
    return {'seconds': time.perf_counter() - began, 'test': run.metrics['test']['top1']['value']}

def fastai(images, weights, precision, train_bn=True):
    "The frozen phase of `fine_tune` as `vision_learner` does it; batch norm is trained, as is fastai's default, or not"
    import torch
    from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, create_vision_model, default_split, imagenet_stats
    from torchvision.models import mobilenet_v2
    from peers import autocast_on_cpu
    began = time.perf_counter()
    dls = ImageDataLoaders.from_folder(images, train='train', valid='validation', item_tfms=Resize(224, method='squish'), bs=64, num_workers=2,
                                       batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = Learner(dls, create_vision_model(mobilenet_v2, dls.c, pretrained=False, cut=1), splitter=default_split, train_bn=train_bn)  # `vision_learner` forgets `cut`
    state = torch.load(weights, weights_only=True)
    learn.model[0].load_state_dict({k.replace('features.', '0.'): v for k, v in state.items() if k.startswith('features.')})
    if precision == 'bf16': autocast_on_cpu(learn)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, 2e-3)
    return {'seconds': time.perf_counter() - began}

def keras(images, precision, once=False):
    "Keras' guide to transfer learning, random weights: the base in the loop, or its output computed once, the guide's lighter workflow"
    import numpy as np
    from keras import Input, Model, applications, config, layers, optimizers, utils
    began = time.perf_counter()
    if precision == 'bf16': config.set_dtype_policy('mixed_bfloat16')
    def read(split): return utils.image_dataset_from_directory(f'{images}/{split}', image_size=(224, 224), batch_size=64, verbose=False).prefetch(2)
    train, valid = read('train'), read('validation')
    base = applications.MobileNetV2(weights=None, include_top=False, input_shape=(224, 224, 3))
    base.trainable = False
    x = inputs = Input((224, 224, 3))
    x = layers.GlobalAveragePooling2D()(base(layers.Rescaling(1/127.5, -1)(x), training=False))
    def head(x): return layers.Dense(len(os.listdir(f'{images}/train')), dtype='float32')(layers.Dropout(0.2)(x))
    def fit(model, *data, **more):
        model.compile(optimizers.Adam(), 'sparse_categorical_crossentropy')
        model.fit(*data, epochs=EPOCHS, verbose=0, **more)
    if once:
        trunk, found = Model(inputs, x), []
        for data in (train, valid):
            features, labels = zip(*((trunk.predict_on_batch(x), y) for x, y in data))
            found.append((np.concatenate(features).astype('float32'), np.concatenate(labels)))
        x = inputs = Input(found[0][0].shape[1:])
        fit(Model(inputs, head(x)), *found[0], validation_data=found[1], batch_size=64)
    else: fit(Model(inputs, head(x)), train, validation_data=valid)
    return {'seconds': time.perf_counter() - began}

def sklearn(features):
    "LogisticRegression on the features that usual_transfer.py kept, its C chosen on validation images among eleven, as `head=logistic` does"
    import numpy as np, torch
    from sklearn.linear_model import LogisticRegression
    began = time.perf_counter()
    found = torch.load(features, weights_only=True)
    x, y = ({s: found[s][k].float().numpy() for s in ('train', 'validation', 'test')} for k in (0, 1))
    mean, std = x['train'].mean(0), x['train'].std(0) + 1e-6
    x = {s: (v - mean)/std for s, v in x.items()}
    fits = [LogisticRegression(C=1/(d*len(y['train'])), max_iter=100).fit(x['train'], y['train']) for d in 10.**np.arange(0, -5.5, -0.5)]
    best = max(fits, key=lambda f: f.score(x['validation'], y['validation']))
    return {'seconds': time.perf_counter() - began, 'test': best.score(x['test'], y['test'])}

# -- tables: the parsed command line -> rows

def measured(name, contenders, args, given=()):
    "{contender: seconds of each round}"
    return in_turn(name, contenders, args.rounds, settings={'images': args.images, 'weights': args.weights} | dict(given), keep=not args.dry)

def frozen(args, name, precision):
    "From nothing"
    given = dict(data=args.images, arch='mobilenet_v2', weights=args.weights, size=224, precision=precision)
    usual = partial(script, args.images, '--weights', args.weights, '--precision', precision)
    rounds = args.rounds if precision == 'bf16' else LONG
    found = measured(name, {OURS: (alone_in('ours', **given), rounds), EXTRACTED: (usual('--once'), rounds), USUAL: (usual(), ONCE)}, args)
    yield from compare(name, found, {})

LATER = {'other seed': dict(seed=1), 'other split': {}, 'head=mlp': dict(head='mlp'), 'head=logistic': dict(head='logistic')}
SECOND = {'other seed': 'median <= 5', 'other split': 'median <= 5', 'head=mlp': 'median <= 5'}

def second(args, name, precision):
    "Experiments on a backbone whose features are on the disk, in imgexp's cache or in the script's file"
    given = dict(data=args.images, arch='mobilenet_v2', weights=args.weights, size=224, precision=precision)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        kept = Path(cache)/'features.pt'
        words = ['--weights', args.weights, '--precision', precision, '--once', '--keep', kept]
        child('ours', cache, **given, epochs=1)
        fresh([HERE/'usual_transfer.py', args.images, '--epochs', 1, *words], cache)
        def later(**more): return lambda: child('ours', cache, **given | more, resume='never')['seconds']
        found = measured(name, {f'imgexp.transfer, {k}': later(**(own or dict(data=split_anew(args.images, other)))) for k, own in LATER.items()} | {
            'usual script, features in a file, other seed': script(args.images, *words, '--seed', 1),
            "scikit-learn's LogisticRegression, the same file": lambda: child('sklearn', cache, features=str(kept))['seconds']}, args)
    yield from compare(name, found, {f'imgexp.transfer, {k}': v for k, v in SECOND.items()})

def split_anew(images, place):
    "A folder with the same test images, and the others without a split: imgexp makes one"
    for path in Path(images).glob('*/*/*'):
        new = Path(place)/('test' if path.parts[-3] == 'test' else 'train')/path.parts[-2]/path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    return str(place)

def some(images, place, n=600):
    "A folder with n of the images, the splits in proportion"
    files = sorted(Path(images).glob('*/*/*'))
    for path in random.Random(0).sample(files, min(n, len(files))):
        new = Path(place)/path.relative_to(images)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    return str(place)

def frozen_rn50(args, name, precision):
    with tempfile.TemporaryDirectory() as folder:
        images = some(args.images, folder)
        usual = partial(script, images, '--arch', 'resnet50', '--precision', precision)
        found = measured(name, {OURS: alone_in('ours', data=images, arch='resnet50', size=224, precision=precision), EXTRACTED: usual('--once'), USUAL: (usual(), ONCE)}, args)
    yield from compare(name, found, {})

def retrain_rn18_128(args, name, precision):
    given = dict(data=args.images, arch='resnet18', size=128, epochs=EPOCHS, batch_size=64, precision=precision, retrain=2)
    loop = given | dict(augment='none', optimizer='adam', lr=0.001, schedule='constant', keep_best=1)
    usual = partial(script, args.images, '--arch', 'resnet18', '--size', 128, '--train', 'layer4', '--precision', precision)
    found = measured(name, {OURS: (alone_in('ours', **given), LONG), EXTRACTED: (usual('--once'), LONG),
                            'imgexp.train, the frozen part in the loop': (alone_in('ours', experiment='train', **loop), LONG if precision == 'bf16' else ONCE),
                            USUAL: (usual(), ONCE)}, args)
    yield from compare(name, found, {'imgexp.train, the frozen part in the loop': 'ratio >= 1.6'})

def peers(args, name, precision):
    with tempfile.TemporaryDirectory() as folder:
        images = some(args.images, folder)
        usual = partial(script, images, '--weights', args.weights, '--precision', precision)
        named = dict(images=images, weights=args.weights, precision=precision)
        found = measured(name, {
            OURS: alone_in('ours', data=images, arch='mobilenet_v2', weights=args.weights, size=224, precision=precision), EXTRACTED: usual('--once'),
            'Keras, the base computed once': alone_in('keras', images=images, precision=precision, once=True),
            'Keras, feature extraction': (alone_in('keras', images=images, precision=precision), LONG),
            'fastai fine_tune, frozen phase': (alone_in('fastai', **named), ONCE),
            'fastai fine_tune, frozen phase, train_bn=False': (alone_in('fastai', **named, train_bn=False), ONCE), USUAL: (usual(), ONCE)}, args)
    yield from compare(name, found, {})

def large(n, width, head, precision):
    "A head on n features, which are there: MB at most, seconds, and how fast they are read"
    import resource
    import numpy as np, torch
    import imgexp.transfer as t
    from imgexp.data import Images, Pixels
    from imgexp.features import Features, FeatureCache
    from imgexp.models import build_model
    from imgexp.start import start_run
    rng, kind = np.random.default_rng(0), torch.float32 if precision == 'fp32' else torch.bfloat16
    contents, labels = np.array([f'{i:032}' for i in range(n)], 'S32'), rng.integers(0, 10, n)
    cache = FeatureCache({'generated': [n, width, precision]})
    for rows in np.array_split(np.arange(n), 16): cache.add(contents[rows], (torch.randn(len(rows), width) + torch.from_numpy(labels[rows])[:, None]/5).to(kind))
    began = time.perf_counter()
    cache = FeatureCache(cache.about)  # which has not seen the files
    where = cache.find(contents)
    opened = time.perf_counter() - began
    found = Features(cache, where, {}, 0)
    table = Images(np.arange(n), labels, (rng.random(n) < 0.1).astype(np.int8), [str(c) for c in range(10)], name='generated', source=Pixels(np.zeros((n, 8, 8, 3), np.uint8)))
    t.load_features = lambda *args: ([found], found)
    p = t.TransferParams.check(dict(arch='resnet50', head=head, precision=precision, epochs=2, track='off'))
    model = build_model('resnet50', 10, size=64, retrain=0)
    with start_run('large', p) as run: t.fit_head(run, p, t.make_head_learner(p, table, model, ((0.5,)*3,)*2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    loader = t.FeatureLoader(table, 'train', [found], 64)
    began = time.perf_counter()
    read = sum(x.nbytes for x, _ in loader.at(0))
    return {'mb': peak, 'gb_s': read/1e9/(time.perf_counter() - began), 'open_gb_s': n*width*kind.itemsize/1e9/opened, 'top1': float(run.history.valid_top1.max())}

def memory(args, name, precision, n=100_000, width=2048):
    kinds = {'linear, fp32': ('linear', args.rounds), 'logistic, fp32': ('logistic', ONCE)}
    def run(head):
        def measure():
            with tempfile.TemporaryDirectory() as place: return child('large', place, n=n, width=width, head=head, precision='fp32')
        return measure
    found = measured(name, {k: (run(head), rounds) for k, (head, rounds) in kinds.items()}, args, {'n': n, 'width': width})
    for k, values in found.items():
        names = {f'peak memory, MB: {k}': 'mb', f'features read, GB/s: {k}': 'gb_s', f'features opened and verified, GB/s: {k}': 'open_gb_s'}
        yield from alone(name, {told: [v[c] for v in values] for told, c in names.items()},
                         {f'peak memory, MB: {k}': 'median < 2500', f'features read, GB/s: {k}': 'median >= 1.5'})

BY_PRECISION = {'frozen': frozen, 'peers': peers, 'frozen-rn50': frozen_rn50, 'retrain-rn18-128': retrain_rn18_128}
TABLES = {'second': partial(second, precision='bf16'), **{f'{name}-{p}': partial(f, precision=p) for name, f in BY_PRECISION.items() for p in ('bf16', 'fp32')},
          'memory': partial(memory, precision='fp32')}

def chosen(only, bf16):
    "The tables that words of `only` name, with or without their precision"
    names = [t for t in TABLES if bf16 or not t.endswith('-bf16')]
    found = {w: [t for t in names if t == w or t.removesuffix('-bf16').removesuffix('-fp32') == w] for w in only.split(',') if w}
    if unknown := [w for w, tables in found.items() if not tables]: sys.exit(f"bench: --only: no table {', '.join(unknown)}; there are {', '.join(names)}")
    return [t for tables in found.values() for t in tables] or names

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', help='class folders in train, validation and test')
    parser.add_argument('--weights', default='', help='of MobileNetV2, for the tables frozen, second and peers')
    parser.add_argument('--only', default='', help=f"tables, separated by commas, with or without their precision: {', '.join(TABLES)} (all; bf16 where the processor multiplies it)")
    parser.add_argument('--rounds', type=int, default=5, help='of what takes less than a minute (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    args = parser.parse_args()
    from imgexp.learner import choose_precision
    bf16 = choose_precision('auto', 'cpu') == 'bf16'
    args.images, args.weights = (str(Path(p).resolve()) if p else '' for p in (args.images, args.weights))
    names = chosen(args.only, bf16)
    if not args.weights and (needy := [n for n in names if n.startswith(('frozen-bf16', 'frozen-fp32', 'second', 'peers'))]): parser.error(f"--weights is missing, for {', '.join(needy)}")
    for name in names:
        own = {'precision': 'fp32'} if name == 'second' and not bf16 else {}
        rows = [r | machine('cpu') for r in TABLES[name](args, name, **own)]
        show(rows)
        if args.dry: continue
        save(rows, RESULTS, TABLES)
        forget(name)

if __name__ == '__main__': main()
