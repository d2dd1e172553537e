"""Time to train a head on a frozen network: imgexp.transfer, the usual script, a script that extracts features once,
and other libraries.

    python bench/transfer.py path/to/images --weights mobilenet_v2.pth
    python bench/transfer.py path/to/images --weights mobilenet_v2.pth --only frozen-bf16,second

`path/to/images` has train, validation and test, each with class folders. Each contender runs in its own process; times
exclude imports and include everything else. All contenders of a table use the same precision. An interrupted table is
resumed. Prints the tables and writes their rows, with the machine, to bench/results/transfer.csv. See
bench/README.md.
"""
import argparse, json, os, random, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

from tables import summarize, compare, discard_progress, interleave, machine, save, show

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'transfer.csv'
EPOCHS, LONG, ONCE = 10, 3, 1  # LONG, ONCE: rounds of contenders that take more than one minute, more than four
OURS, EXTRACTED, USUAL = 'imgexp.transfer, empty cache', 'usual script, features extracted once', 'usual script'

# -- contenders, each in its own process

def run_json(command, folder, **env):
    "Run Python with runs and caches in `folder`; returns the last line of its output, parsed as JSON"
    env = os.environ | {'IMGEXP_ROOT': str(folder), 'XDG_CACHE_HOME': str(folder), 'WANDB_MODE': 'disabled',
                        'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''} | env
    env['PYTHONPATH'] = os.pathsep.join([str(HERE), env.get('PYTHONPATH', '')])
    result = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)
    if result.returncode: sys.exit(f'bench: {command} failed:\n{result.stderr[-4000:]}')
    return json.loads(result.stdout.splitlines()[-1])

def run_function(name, folder, **kw):
    "Result of a function of this file, called in another process"
    code = f'import json, sys, transfer; print(json.dumps(transfer.{name}(**json.loads(sys.argv[1]))))'
    return run_json(['-c', code, json.dumps(kw)], folder)

def uncached(name, **kw):
    "Contender: seconds of a function of this file, with an empty cache"
    def run():
        with tempfile.TemporaryDirectory() as folder: return run_function(name, folder, **kw)['seconds']
    return run

def script(images, *options):
    "Contender: seconds of usual_transfer.py"
    def run():
        command = [HERE/'usual_transfer.py', images, '--epochs', EPOCHS, *options]
        with tempfile.TemporaryDirectory() as folder: return run_json(command, folder)['seconds']
    return run

def ours(experiment='transfer', **params):
    "An experiment of imgexp"
    import importlib
    import matplotlib.figure, matplotlib.backends.backend_agg, pandas  # imports that a run makes later
    train = importlib.import_module(f'imgexp.{experiment}').train
    start = time.perf_counter()
    run = train(track='off', **params)
    return {'seconds': time.perf_counter() - start, 'test': run.metrics['test']['top1']['value']}

def fastai(images, weights, precision, train_bn=True):
    "The frozen phase of fastai's `fine_tune` as in `vision_learner`; by default it trains batch norm"
    import torch
    from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, create_vision_model, default_split, imagenet_stats
    from torchvision.models import mobilenet_v2
    from peers import autocast_on_cpu
    start = time.perf_counter()
    dls = ImageDataLoaders.from_folder(images, train='train', valid='validation', item_tfms=Resize(224, method='squish'), bs=64, num_workers=2,
                                       batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = Learner(dls, create_vision_model(mobilenet_v2, dls.c, pretrained=False, cut=1), splitter=default_split, train_bn=train_bn)  # `vision_learner` forgets `cut`
    state = torch.load(weights, weights_only=True)
    learn.model[0].load_state_dict({k.replace('features.', '0.'): v for k, v in state.items() if k.startswith('features.')})
    if precision == 'bf16': autocast_on_cpu(learn)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, 2e-3)
    return {'seconds': time.perf_counter() - start}

def keras(images, precision, once=False):
    "Keras' transfer-learning guide with random weights: base in the loop, or (`once`) its output computed once"
    import numpy as np
    from keras import Input, Model, applications, config, layers, optimizers, utils
    start = time.perf_counter()
    if precision == 'bf16': config.set_dtype_policy('mixed_bfloat16')
    def read(split): return utils.image_dataset_from_directory(f'{images}/{split}', image_size=(224, 224), batch_size=64, verbose=False).prefetch(2)
    train, valid = read('train'), read('validation')
    base = applications.MobileNetV2(weights=None, include_top=False, input_shape=(224, 224, 3))
    base.trainable = False
    x = inputs = Input((224, 224, 3))
    x = layers.GlobalAveragePooling2D()(base(layers.Rescaling(1/127.5, -1)(x), training=False))
    def head(x): return layers.Dense(len(os.listdir(f'{images}/train')), dtype='float32')(layers.Dropout(0.2)(x))
    def fit(model, *data, **kw):
        model.compile(optimizers.Adam(), 'sparse_categorical_crossentropy')
        model.fit(*data, epochs=EPOCHS, verbose=0, **kw)
    if once:
        backbone, data = Model(inputs, x), []
        for batches in (train, valid):
            features, labels = zip(*((backbone.predict_on_batch(x), y) for x, y in batches))
            data.append((np.concatenate(features).astype('float32'), np.concatenate(labels)))
        x = inputs = Input(data[0][0].shape[1:])
        fit(Model(inputs, head(x)), *data[0], validation_data=data[1], batch_size=64)
    else: fit(Model(inputs, head(x)), train, validation_data=valid)
    return {'seconds': time.perf_counter() - start}

def sklearn(features):
    "LogisticRegression on the features saved by usual_transfer.py; C is chosen among eleven, as in `head=logistic`"
    import numpy as np, torch
    from sklearn.linear_model import LogisticRegression
    start = time.perf_counter()
    splits = torch.load(features, weights_only=True)
    x, y = ({s: splits[s][k].float().numpy() for s in ('train', 'validation', 'test')} for k in (0, 1))
    mean, std = x['train'].mean(0), x['train'].std(0) + 1e-6
    x = {s: (v - mean)/std for s, v in x.items()}
    fits = [LogisticRegression(C=1/(d*len(y['train'])), max_iter=100).fit(x['train'], y['train']) for d in 10.**np.arange(0, -5.5, -0.5)]
    best = max(fits, key=lambda f: f.score(x['validation'], y['validation']))
    return {'seconds': time.perf_counter() - start, 'test': best.score(x['test'], y['test'])}

# -- tables: command-line arguments -> rows

def measure(name, contenders, args, extra_settings=()):
    "{contender: value of each round}"
    settings = {'images': args.images, 'weights': args.weights} | dict(extra_settings)
    return interleave(name, contenders, args.rounds, settings=settings, save_progress=not args.dry)

def frozen(args, name, precision):
    "A head on a frozen network, with nothing cached"
    params = dict(data=args.images, arch='mobilenet_v2', weights=args.weights, size=224, precision=precision)
    usual = partial(script, args.images, '--weights', args.weights, '--precision', precision)
    rounds = args.rounds if precision == 'bf16' else LONG
    values = measure(name, {OURS: (uncached('ours', **params), rounds), EXTRACTED: (usual('--once'), rounds), USUAL: (usual(), ONCE)}, args)
    yield from compare(name, values, {})

VARIANTS = {'other seed': dict(seed=1), 'other split': {}, 'head=mlp': dict(head='mlp'), 'head=logistic': dict(head='logistic')}
SECOND_TARGETS = {'other seed': 'median <= 5', 'other split': 'median <= 5', 'head=mlp': 'median <= 5'}

def second(args, name, precision):
    "Further experiments on cached features: in imgexp's cache, or in the script's file"
    params = dict(data=args.images, arch='mobilenet_v2', weights=args.weights, size=224, precision=precision)
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        features = Path(cache)/'features.pt'
        options = ['--weights', args.weights, '--precision', precision, '--once', '--keep', features]
        run_function('ours', cache, **params, epochs=1)
        run_json([HERE/'usual_transfer.py', args.images, '--epochs', 1, *options], cache)
        def cached(**changes):
            return lambda: run_function('ours', cache, **params | changes, resume='never')['seconds']
        contenders = {f'imgexp.transfer, {k}': cached(**(changes or dict(data=resplit(args.images, other))))
                      for k, changes in VARIANTS.items()} | {
            'usual script, features in a file, other seed': script(args.images, *options, '--seed', 1),
            "scikit-learn's LogisticRegression, the same file":
                lambda: run_function('sklearn', cache, features=str(features))['seconds']}
        values = measure(name, contenders, args)
    yield from compare(name, values, {f'imgexp.transfer, {k}': v for k, v in SECOND_TARGETS.items()})

def resplit(images, place):
    "A folder of links with the same test images and train and validation merged, so that imgexp makes a new split"
    for path in Path(images).glob('*/*/*'):
        new = Path(place)/('test' if path.parts[-3] == 'test' else 'train')/path.parts[-2]/path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    return str(place)

def sample_images(images, place, n=600):
    "A folder of links to `n` random images, in the same class folders"
    files = sorted(Path(images).glob('*/*/*'))
    for path in random.Random(0).sample(files, min(n, len(files))):
        new = Path(place)/path.relative_to(images)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    return str(place)

def frozen_rn50(args, name, precision):
    with tempfile.TemporaryDirectory() as folder:
        images = sample_images(args.images, folder)
        usual = partial(script, images, '--arch', 'resnet50', '--precision', precision)
        values = measure(name, {OURS: uncached('ours', data=images, arch='resnet50', size=224, precision=precision), EXTRACTED: usual('--once'), USUAL: (usual(), ONCE)}, args)
    yield from compare(name, values, {})

def retrain_rn18_128(args, name, precision):
    params = dict(data=args.images, arch='resnet18', size=128, epochs=EPOCHS, batch_size=64, precision=precision, retrain=2)
    loop = params | dict(augment='none', optimizer='adam', lr=0.001, schedule='constant', keep_best=1)
    usual = partial(script, args.images, '--arch', 'resnet18', '--size', 128, '--train', 'layer4', '--precision', precision)
    values = measure(name, {OURS: (uncached('ours', **params), LONG), EXTRACTED: (usual('--once'), LONG),
                            'imgexp.train, the frozen part in the loop': (uncached('ours', experiment='train', **loop), LONG if precision == 'bf16' else ONCE),
                            USUAL: (usual(), ONCE)}, args)
    yield from compare(name, values, {'imgexp.train, the frozen part in the loop': 'ratio >= 1.6'})

def peers(args, name, precision):
    with tempfile.TemporaryDirectory() as folder:
        images = sample_images(args.images, folder)
        usual = partial(script, images, '--weights', args.weights, '--precision', precision)
        options = dict(images=images, weights=args.weights, precision=precision)
        values = measure(name, {
            OURS: uncached('ours', data=images, arch='mobilenet_v2', weights=args.weights, size=224, precision=precision), EXTRACTED: usual('--once'),
            'Keras, the base computed once': uncached('keras', images=images, precision=precision, once=True),
            'Keras, feature extraction': (uncached('keras', images=images, precision=precision), LONG),
            'fastai fine_tune, frozen phase': (uncached('fastai', **options), ONCE),
            'fastai fine_tune, frozen phase, train_bn=False': (uncached('fastai', **options, train_bn=False), ONCE), USUAL: (usual(), ONCE)}, args)
    yield from compare(name, values, {})

def large(n, width, head, precision):
    "A head on `n` generated features: peak memory, speed of reading and opening them, and accuracy"
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
    start = time.perf_counter()
    cache = FeatureCache(cache.about)  # a new object that has not opened the files
    where = cache.find(contents)
    open_seconds = time.perf_counter() - start
    found = Features(cache, where, {}, 0)
    table = Images(np.arange(n), labels, (rng.random(n) < 0.1).astype(np.int8), [str(c) for c in range(10)], name='generated', source=Pixels(np.zeros((n, 8, 8, 3), np.uint8)))
    t.load_features = lambda *args: ([found], found)
    p = t.TransferParams.check(dict(arch='resnet50', head=head, precision=precision, epochs=2, track='off'))
    model = build_model('resnet50', 10, size=64, retrain=0)
    with start_run('large', p) as run: t.fit_head(run, p, t.make_head_learner(p, table, model, ((0.5,)*3,)*2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    loader = t.FeatureLoader(table, 'train', [found], 64)
    start = time.perf_counter()
    read = sum(x.nbytes for x, _ in loader.at(0))
    return {'mb': peak, 'gb_s': read/1e9/(time.perf_counter() - start), 'open_gb_s': n*width*kind.itemsize/1e9/open_seconds, 'top1': float(run.history.valid_top1.max())}

def memory(args, name, precision, n=100_000, width=2048):
    kinds = {'linear, fp32': ('linear', args.rounds), 'logistic, fp32': ('logistic', ONCE)}
    def contender(head):
        def run():
            with tempfile.TemporaryDirectory() as folder:
                return run_function('large', folder, n=n, width=width, head=head, precision='fp32')
        return run
    contenders = {k: (contender(head), rounds) for k, (head, rounds) in kinds.items()}
    for k, values in measure(name, contenders, args, {'n': n, 'width': width}).items():
        keys = {f'peak memory, MB: {k}': 'mb', f'features read, GB/s: {k}': 'gb_s',
                f'features opened and verified, GB/s: {k}': 'open_gb_s'}
        yield from summarize(name, {row: [v[key] for v in values] for row, key in keys.items()},
                         {f'peak memory, MB: {k}': 'median < 2500', f'features read, GB/s: {k}': 'median >= 1.5'})

BY_PRECISION = {'frozen': frozen, 'peers': peers, 'frozen-rn50': frozen_rn50, 'retrain-rn18-128': retrain_rn18_128}
TABLES = {'second': partial(second, precision='bf16'), **{f'{name}-{p}': partial(f, precision=p) for name, f in BY_PRECISION.items() for p in ('bf16', 'fp32')},
          'memory': partial(memory, precision='fp32')}

def select_tables(only, bf16):
    "Tables selected by the comma-separated names `only`, with or without precision; all by default"
    names = [t for t in TABLES if bf16 or not t.endswith('-bf16')]
    matches = {word: [t for t in names if word in (t, t.removesuffix('-bf16').removesuffix('-fp32'))]
               for word in only.split(',') if word}
    if unknown := [word for word, tables in matches.items() if not tables]:
        sys.exit(f"bench: --only: no table {', '.join(unknown)}; choose from {', '.join(names)}")
    return [t for tables in matches.values() for t in tables] or names

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', help='folder with train, validation and test, each with class folders')
    parser.add_argument('--weights', default='', help='file with weights of MobileNetV2, for the tables frozen, second and peers')
    parser.add_argument('--only', default='', help='comma-separated tables, with or without precision: '
                        f"{', '.join(TABLES)} (all; bf16 if the processor supports it)")
    parser.add_argument('--rounds', type=int, default=5, help='rounds of contenders that take less than a minute (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    args = parser.parse_args()
    from imgexp.learner import choose_precision
    bf16 = choose_precision('auto', 'cpu') == 'bf16'
    args.images, args.weights = (str(Path(p).resolve()) if p else '' for p in (args.images, args.weights))
    names = select_tables(args.only, bf16)
    pretrained = [n for n in names if n.startswith(('frozen-bf16', 'frozen-fp32', 'second', 'peers'))]
    if pretrained and not args.weights: parser.error(f"{', '.join(pretrained)} needs --weights")
    for name in names:
        overrides = {'precision': 'fp32'} if name == 'second' and not bf16 else {}
        rows = [r | machine('cpu') for r in TABLES[name](args, name, **overrides)]
        show(rows)
        if args.dry: continue
        save(rows, RESULTS, TABLES)
        discard_progress(name)

if __name__ == '__main__': main()
