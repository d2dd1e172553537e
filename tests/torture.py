"""kill -9 at random moments, over and over, each feature of training alone and all together: does every run end as if undisturbed?

    python tests/torture.py [--kills 20] [--only 'ema;everything'] [--threads 1,2] [--photos path/to/class/folders] [--seed 0]
    python tests/torture.py --threads 2 --since 2026-11-27     # goes on: rows that were made on this processor since then are not made again

Each run is killed and continued until it is finished; a new run follows until there were so many kills. Half of the kills fall
on a moment of a step (before and after the batch, around the optimizer's step), the others into the writing of a checkpoint, of
the index, of the history or of cached features: files that are not replaced as a whole are left half-written. Checkpoints are written every
three steps; by the Keras CNN, every epoch. Compared are weights, averages, optimizer, scaler,
schedule, early stopping, random generators, the history (times and memory aside), and the rows of every batch, all bit for bit; the undisturbed
run has the same number of threads and the same images: drawn shapes, or some of the photos.
"""
import argparse, csv, json, random, shutil, signal, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent/'bench')]
from launch import Launcher
from pictures import CLASSES, tree

RESULTS = HERE.parent/'bench'/'results'/'torture.csv'
GIVEN = dict(size=32, epochs=3, batch_size=22, workers=0, augment='none', track='off')  # 128 images, 6 batches, the last one ragged
VARIES = ['seconds', 'img_per_s', 'peak_mem_mb', 'checkpoint_mb', 'checkpoint_s']

# fp16 and its scaler on the processor, for this test only; slow there, so that where all is on bf16 does the arithmetic
FP16 = "import imgexp.learner; imgexp.learner._SUPPORTED['cpu'].append('fp16')\n"
SCALED_BF16 = "real_cast = imgexp.learner.autocast; imgexp.learner.autocast = lambda kind, device: real_cast('bf16', device)\n"
EVERYTHING = dict(precision='fp16', micro_batch=8, clip=1.0, schedule='cosine', warmup=0.5, ema=0.9, label_smoothing=0.1, drop_path=0.3, mixup=0.2,
                  cutmix=1.0, erase=0.3, sizes='32-64', patience=3, keep_every=1, keep_weights='1,2', augment='trivial', flip='alternating', lr=0,
                  workers=2, steps=21)
FEATURES = {
    'nothing': {}, 'fp32': dict(precision='fp32'), 'bf16': dict(precision='bf16'), 'fp16 and scaler': dict(precision='fp16'),
    'micro_batch': dict(micro_batch=8), 'clip': dict(clip=0.5), 'sgd': dict(optimizer='sgd', lr=0.05), 'adam': dict(optimizer='adam'),
    'cosine': dict(schedule='cosine', warmup=0.5), 'linear': dict(schedule='linear'), 'constant': dict(schedule='constant'),
    'LR finder': dict(lr=0), 'ema': dict(ema=0.9), 'label_smoothing': dict(label_smoothing=0.1), 'drop_path': dict(drop_path=0.5),
    'dropout': dict(arch='squeezenet1_1'), 'augment': dict(augment='trivial'), 'flip': dict(augment='crop-flip', flip='alternating'),
    'mixup': dict(mixup=0.4), 'cutmix': dict(cutmix=1.0), 'erase': dict(erase=0.5), 'sizes': dict(sizes='32-64'),
    'patience': dict(patience=1), 'keep_every, keep_weights': dict(keep_every=1, keep_weights='1,2', keep_best=1), 'explain': dict(explain=4, keep_weights='0,1'), 'retrain': dict(retrain=1),
    'workers': dict(workers=2), 'steps': dict(steps=21, mixup=0.4, augment='crop-flip'), 'bad': dict(bad='skip'), 'extend': dict(extend='parent', schedule='linear', size=40, momentum=0.8, weight_decay=0),
    'start': dict(start='parent', schedule='linear', size=40, lr=0, lr_limit=1e-3), 'class_augment': dict(augment='crop-flip', class_augment='trivial'), 'compile': dict(compile=True),
    'two processes': dict(), 'everything': EVERYTHING, 'everything, two processes': EVERYTHING}
TRANSFER = dict(arch='compact_resnet', epochs=3, batch_size=22, size=32, precision='fp32', track='off', workers=0)
KERAS = dict(size=32, epochs=4, batch_size=22, filters=8, dense=32, track='off')
EXPERIMENTS = {  # other experiments: which, and what it is given
    'transfer': ('transfer', TRANSFER), 'transfer, bf16': ('transfer', TRANSFER | dict(precision='bf16', retrain=1)), 'transfer, views': ('transfer', TRANSFER | dict(views=2, workers=2)),
    'transfer, retrain, fine-tuned': ('transfer', TRANSFER | dict(retrain=1, finetune_epochs=2, augment='trivial')),
    'transfer, logistic': ('transfer', TRANSFER | dict(head='logistic')),
    'Keras CNN': ('keras', KERAS | dict(batch_norm=True, augment=True, schedule='cosine')), 'Keras CNN, bf16': ('keras', KERAS | dict(precision='bf16', activation='mish'))}
ROWS = [*FEATURES, *EXPERIMENTS]

POINTS = '''
import imgexp.files, imgexp.runs, os, signal
from pathlib import Path
fatal, seen = {fatal}, dict(moment=0, file=0)  # the kind of point, and which of them
def point(kind, before_death=lambda: None):
    seen[kind] += 1
    if fatal == (kind, seen[kind]):
        before_death()
        os.kill(os.getpid(), signal.SIGKILL)
def half(f, which):
    def g(*args, **kw):
        path = getattr(args[which], 'name', args[which])
        def begin():
            Path('inside').touch()
            if Path(path).name in {files} or features(path):
                with open(path, 'ab') as out: out.write(b'half')
        if Path(path).name in {files} + ['COMMITTED.json', 'index.json', 'history.csv', 'metrics.json', 'status.json'] or features(path): point('file', begin)
        return f(*args, **kw)
    return g
def features(path): return 'features' in Path(path).parts and Path(path).suffix == '.part'
imgexp.files.write_text = imgexp.runs.write_text = half(imgexp.files.write_text, 0)
'''
WATCH = POINTS + '''
import imgexp.fit, imgexp.setup as s, imgexp.transfer as tr, imgexp.checkpoints as c, hashlib, safetensors.torch as st, torch
torch.set_num_threads({threads})
st.save_file, torch.save = half(st.save_file, 1), half(torch.save, 1)
c.shutil.copyfile, remove = half(c.shutil.copyfile, 1), c.shutil.rmtree
c.shutil.rmtree = lambda path, **kw: (point('file'), remove(path, **kw)) if Path(path).exists() else None
class Watch(tr.StatefulCallback):
    "Counts the moments of a step, and writes down what each batch holds."
    order, run_valid = 70, False
    def before_batch(self):
        rows = hashlib.sha256(self.dls.train.rows.tobytes()).hexdigest()[:16]
        if hasattr(self.learn, 'schedule'):
            with open('rows{rank}', 'a') as f: f.write(f'{{self.learn.epoch}} {{self.dls.train.batch}} {{rows}}\\\\n')
        point('moment')
    before_step = after_step = after_batch = lambda self: point('moment')
def watched(real):
    def make(*args, **kw):
        learn = real(*args, **kw)
        learn.add_cb(Watch())
        return learn
    return make
s.make_learner, tr.make_head_learner, tr.make_learner = map(watched, (s.make_learner, tr.make_head_learner, tr.make_learner))
find_lr = imgexp.fit.find_lr
imgexp.fit.find_lr = lambda *args, **kw: find_lr(*args, steps=20, **kw)
action = c.Checkpoints._action
c.Checkpoints._action = lambda self, mid_epoch=False: max(action(self), int(mid_epoch and self.schedule.done % 3 == 0))
import imgexp.features
imgexp.features.FILE_MB = 0.01  # a file of features for each batch
'''
WATCH_KERAS = POINTS + '''
import imgexp.keras_cnn, keras, safetensors.numpy as sn
sn.save_file = half(sn.save_file, 1)
class Watch(keras.callbacks.Callback):
    on_train_batch_begin = on_train_batch_end = lambda self, batch, logs=None: point('moment')
fit = keras.Model.fit
keras.Model.fit = lambda *args, callbacks=(), **kw: fit(*args, callbacks=[*callbacks, Watch()], **kw)
imgexp.keras_cnn.train(**{given})
'''
FILES = ['model.safetensors', 'ema.safetensors', 'state.pt', 'state.safetensors', '.weights-0001.safetensors.part', '.weights-0002.safetensors.part']  # written in place, within a folder that is renamed when it is whole

class Torture:
    "Runs of one feature, on so many threads, in a folder of their own."
    def __init__(self, name, data, launcher, folder, chance, threads=1):
        self.name, self.data, self.launcher, self.folder, self.chance, self.threads = name, data, launcher, folder, chance, threads
        self.experiment, given = EXPERIMENTS.get(name) or ('train', GIVEN | {'precision': 'fp32'} | FEATURES[name])
        self.given = dict(given)
        self.processes = 2 if 'two' in name else 1
        self.kills = self.inside = self.runs = 0

    def start(self, root, fatal=None, killed=0):
        env = dict(XDG_CACHE_HOME=str(root/'cache'), **dict.fromkeys(('OMP_NUM_THREADS', 'TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS'), str(self.threads)))
        if self.experiment == 'keras':
            code = WATCH_KERAS.format(fatal=fatal, files=FILES, given=self.given | {'data': str(self.data)})
            return [self.launcher.python('-c', code, root=root, TF_CPP_MIN_LOG_LEVEL='3', CUDA_VISIBLE_DEVICES='', **env)]
        if self.processes > 1:
            from test_parallel import free_port
            env |= dict(WORLD_SIZE=str(self.processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        args, jobs = [self.experiment, *self._options(self.given | {'data': self.data})], []
        for rank in range(self.processes):
            watch = WATCH.format(fatal=fatal if rank == killed else None, files=FILES, rank=rank, threads=self.threads).replace('\\\\n', '\\n')
            own = env | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if self.processes > 1 else {})
            jobs.append(self.launcher.imgexp(*args, root=root, before=FP16 + SCALED_BF16*self.name.startswith('everything') + watch,
                                             TORCHINDUCTOR_CACHE_DIR=str(self.folder/'compiled'), **own))
        return jobs

    def _options(self, given): return [f'--{k.replace("_", "-")}={v}' for k, v in given.items()]

    def root(self):
        root = self.folder/f'{self.runs}'
        root.mkdir(parents=True)
        self.runs += 1
        if 'class_augment' in self.given:
            file = self.folder/'recommendations.json'
            classes = sorted(c.name for c in Path(self.data).iterdir())[:1]
            file.write_text(json.dumps({'schema': 1, 'split': 'valid', 'recommend': [{'policy': 'trivial', 'classes': classes}]}))
            self.given['class_augment'] = str(file)
        if option := next(iter({'extend', 'start'} & self.given.keys()), None):  # the same parent for all
            parent = self.folder/'parent'
            if not parent.exists():
                parent.mkdir()
                threads = f'import torch; torch.set_num_threads({self.threads})'
                job = self.launcher.imgexp('train', *self._options(GIVEN | dict(epochs=1, data=self.data, ema=0.9)), root=parent, before=threads)
                assert job.wait(900) == 0, job.err
                self.given[option] = next((parent/'runs').glob('2*')).name
            shutil.copytree(parent/'runs', root/'runs')
        return root

    def undisturbed(self):
        self.whole = self.root()
        for job in self.start(self.whole): assert job.wait(900) == 0, job.err
        self.result = self.outcome(self.whole)

    def killed(self, most):
        "One run, killed and continued until it is finished; True if it ended as the undisturbed one"
        root = self.root()
        while True:
            kind = self.chance.choice(['moment', 'file'])
            fatal = (kind, self.chance.randrange(1, dict(moment=40, file=20)[kind])) if self.kills < most else None
            jobs = self.start(root, fatal, self.chance.randrange(self.processes))
            codes = [job.wait(900) for job in jobs]
            if all(c == 0 for c in codes): break
            assert -signal.SIGKILL in codes, '\n'.join(j.err for j in jobs)
            self.kills += 1
            self.inside += (root/'inside').exists()
            (root/'inside').unlink(missing_ok=True)
        return differences(self.outcome(root), self.result)

    def outcome(self, root): return keras_outcome(root) if self.experiment == 'keras' else outcome(root, self.processes)

def the_run(root):
    from imgexp.runs import Run
    found = sorted(d for d in (root/'runs').glob('2*') if d.is_dir())
    return Run(found[-1])

def outcome(root, processes):
    "All that has to be equal, by name"
    import torch
    from imgexp.checkpoints import checkpoints, read_weights
    run = the_run(root)
    last = checkpoints(run)[0]
    state = torch.load(last/'state.pt', weights_only=True)
    state['parts']['history'].pop('seconds')
    files = {p.name: read_weights(last, p.stem)[0] for p in last.glob('*.safetensors')}
    alone = {p.name: read_weights(p)[0] for p in sorted((run.dir/'checkpoints').glob('weights-*'))}
    seen = [rows(root/f'rows{k}') for k in range(processes)]
    metrics = {k: v for k, v in run.metrics.items() if k not in ('seconds', 'img_per_s')}
    index = json.loads((run.dir/'checkpoints/index.json').read_text())
    return dict(checkpoint=last.name, weights=files, alone=alone, state=state, history=run.history.drop(columns=VARIES, errors='ignore').to_dict('list'),
                metrics=metrics, rows=seen, best=index['best'], kept=index['kept'])

def keras_outcome(root):
    "All that has to be equal of a Keras run, by name; its weights, optimizer and generators are in the same file"
    from safetensors.torch import load_file
    run = the_run(root)
    files = {p.parent.name: load_file(p) for p in sorted((run.dir/'checkpoints').glob('epoch-*/state.safetensors'))}
    assert files and all((run.dir/'checkpoints'/name/'COMMITTED.json').exists() for name in files)
    metrics = {k: v for k, v in run.metrics.items() if k not in ('seconds', 'img_per_s')}
    return dict(weights=files, history=run.history.drop(columns=VARIES, errors='ignore').to_dict('list'), metrics=metrics,
                index=json.loads((run.dir/'checkpoints/index.json').read_text()))

def bits(tensor): return tensor.detach().contiguous().reshape(-1).numpy().tobytes(), tuple(tensor.shape)

def rows(path):
    "What each batch held, by epoch and batch; the same however often it was made"
    out = {}
    for line in path.read_text().splitlines():
        key, value = line.rsplit(' ', 1)
        assert out.setdefault(key, value) == value, f'batch {key} was made of other images when it was made again'
    return out

def differences(a, b, path=''):
    "Where two outcomes are not the same, bit for bit"
    import torch
    if isinstance(a, torch.Tensor): return [] if a.dtype == b.dtype and bits(a) == bits(b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys(): return [f'{path}: {sorted(map(str, a.keys() ^ b.keys()))}']
        return [d for k in a for d in differences(a[k], b[k], f'{path}/{k}')]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return [f'{path}: {len(a)} and {len(b)}']
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{path}/{k}')]
    return [] if a == b or (a != a and b != b) else [f'{path}: {a} and {b}']

def photos(folder, source, per_class=40):
    "Some photos of four classes, as many as there are drawn shapes; raises ValueError where there are too few"
    source = Path(source)/'train' if (Path(source)/'train').is_dir() else Path(source)
    classes = {d.name: sorted(f for f in d.iterdir() if f.is_file()) for d in sorted(source.iterdir()) if d.is_dir()}
    chosen = [c for c, files in classes.items() if len(files) >= per_class][:len(CLASSES)]
    if len(chosen) < len(CLASSES): raise ValueError(f'{source}: photos need {len(CLASSES)} class folders of at least {per_class} images')
    for c in chosen:
        (folder/c).mkdir(parents=True, exist_ok=True)
        for f in random.Random(0).sample(classes[c], per_class): shutil.copy(f, folder/c/f.name)
    return folder

def images(folder, source):
    "Images to train on, and the same with a damaged one"
    data, broken = ((photos(folder/name, source) if source else tree(folder/name, 40, CLASSES)) for name in ('data', 'broken'))
    next(f for f in sorted(broken.rglob('*')) if f.is_file()).write_bytes(b'\x89PNG')
    return data, broken

def torture(names, kills, seed, folder, launcher, tell=print, threads=(1,), source='', done=()):
    "A row for each feature and number of threads: kills, how many of them while a file was written, runs, what differed; `source`: photos instead of drawn shapes"
    data, broken = images(folder, source)
    kind = 'photos' if source else 'drawn shapes'
    for name, n in ((name, n) for name in names for n in threads):
        if (name, kind, str(n)) in done: tell(f'{name}, {kind}, threads {n}: is there'); continue
        job = Torture(name, broken if name == 'bad' else data, launcher, folder/f"{name.replace(' ', '-')}-{n}", random.Random(f'{seed} {name} {n}'), n)
        began, wrong = time.monotonic(), []
        job.undisturbed()
        while job.kills < kills and not wrong: wrong = job.killed(kills)
        row = dict(feature=name, data=kind, threads=n, kills=job.kills, inside_writing=job.inside, runs=job.runs - 1, equal='no' if wrong else 'yes', seconds=round(time.monotonic() - began))
        tell(f"{name}, {kind}, threads {n}: {row['kills']} kills in {row['runs']} runs, {row['inside_writing']} of them into a file, "
             + (f'DIFFERENT: {wrong[:5]}' if wrong else 'equal') + f", {row['seconds']} s")
        shutil.rmtree(job.folder, ignore_errors=True)
        yield row

def saved(): return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []

def save(row):
    "Put a row into the file, in place of an older one of the same feature, images, threads and processor"
    def key(r): return r['cpu'], r['data'], str(r['threads']), r['feature']
    rows = {key(r): r for r in [*saved(), row] if r['feature'] in ROWS}
    with RESULTS.open('w', newline='') as f:
        out = csv.DictWriter(f, list(row), lineterminator='\n')
        out.writeheader(); out.writerows(sorted(rows.values(), key=lambda r: (*key(r)[:3], ROWS.index(r['feature']))))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20, help='for each row (%(default)s)')
    parser.add_argument('--only', default=';'.join(ROWS), help='features, separated by semicolons (all)')
    parser.add_argument('--threads', default='1,2', help='numbers of threads, separated by commas: a row for each (%(default)s)')
    parser.add_argument('--photos', default='', help='class folders, four of them with 40 images: train on these instead of drawn shapes')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (%(default)s)')
    parser.add_argument('--since', default='', help='a day (2026-11-27): rows of this processor and number of kills made since then are not made again')
    parser.add_argument('--dry', action='store_true', help='do not write the results')
    args = parser.parse_args()
    names, threads = [n.strip() for n in args.only.split(';')], [int(n) for n in args.threads.split(',')]
    if unknown := set(names) - set(ROWS): parser.error(f"--only: no feature {', '.join(unknown)}; there are {'; '.join(ROWS)}")
    from tables import machine
    cpu, began = machine('cpu')['cpu'], time.monotonic()
    done = {(r['feature'], r['data'], r['threads']) for r in saved() if args.since and r['cpu'] == cpu and r['date'] >= args.since and int(r['kills']) >= args.kills}
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder))
        rows = []
        try:
            for row in torture(names, args.kills, args.seed, Path(folder), launcher, lambda text: print(text, flush=True), threads, args.photos, done):
                rows.append(row)
                if not args.dry: save(row | {k: v for k, v in machine('cpu').items() if k != 'threads'})
        finally: launcher.close()
    print(f'{(time.monotonic() - began)/60:.1f} minutes')
    sys.exit(any(r['equal'] != 'yes' for r in rows))

if __name__ == '__main__': main()
