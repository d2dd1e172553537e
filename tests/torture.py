"""kill -9 at random moments, over and over, each feature of training alone and all together: does every run end as if undisturbed?

    python tests/torture.py [--kills 20] [--only 'ema;everything'] [--seed 0]

Each run is killed and continued until it is finished; a new run follows until there were so many kills. Half of the kills fall
on a moment of a step (before and after the batch, around the optimizer's step), the others into the writing of a checkpoint, of
the index or of the history: files that are not replaced as a whole are left half-written. Checkpoints are written every three steps. Compared are weights, averages, optimizer, scaler,
schedule, early stopping, random generators, the history (times and memory aside), and the rows of every batch, all bit for bit.
"""
import argparse, csv, json, os, random, shutil, signal, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent/'bench')]
from launch import Launcher
from pictures import CLASSES, tree

RESULTS = HERE.parent/'bench'/'results'/'torture.csv'
GIVEN = dict(size=32, epochs=3, batch_size=22, workers=0, augment='none', track='off')  # 128 images, 6 batches, the last one ragged
VARIES = ['seconds', 'img_per_s', 'peak_mem_mb', 'checkpoint_mb', 'checkpoint_s']

# fp16 and its scaler on the processor, for this test only; slow there, so that where all is on bf16 does the arithmetic
FP16 = "import imgexp.learner; imgexp.learner._OFFERED['cpu'].append('fp16')\n"
SCALED_BF16 = "real_cast = imgexp.learner.autocast; imgexp.learner.autocast = lambda kind, device: real_cast('bf16', device)\n"
EVERYTHING = dict(precision='fp16', micro_batch=8, clip=1.0, schedule='cosine', warmup=0.5, ema=0.9, label_smoothing=0.1, drop_path=0.3, mixup=0.2,
                  cutmix=1.0, erase=0.3, sizes='32-64', patience=3, keep_every=1, keep_weights='1,2', augment='trivial', flip='alternating', lr=0,
                  workers=2)
FEATURES = {
    'nothing': {}, 'fp32': dict(precision='fp32'), 'bf16': dict(precision='bf16'), 'fp16 and scaler': dict(precision='fp16'),
    'micro_batch': dict(micro_batch=8), 'clip': dict(clip=0.5), 'sgd': dict(optimizer='sgd', lr=0.05), 'adam': dict(optimizer='adam'),
    'cosine': dict(schedule='cosine', warmup=0.5), 'linear': dict(schedule='linear'), 'constant': dict(schedule='constant'),
    'LR finder': dict(lr=0), 'ema': dict(ema=0.9), 'label_smoothing': dict(label_smoothing=0.1), 'drop_path': dict(drop_path=0.5),
    'dropout': dict(arch='squeezenet1_1'), 'augment': dict(augment='trivial'), 'flip': dict(augment='crop-flip', flip='alternating'),
    'mixup': dict(mixup=0.4), 'cutmix': dict(cutmix=1.0), 'erase': dict(erase=0.5), 'sizes': dict(sizes='32-64'),
    'patience': dict(patience=1), 'keep_every, keep_weights': dict(keep_every=1, keep_weights='1,2', keep_best=1), 'retrain': dict(retrain=1),
    'workers': dict(workers=2), 'bad': dict(bad='skip'), 'extend': dict(extend='parent', schedule='linear', size=40, momentum=0.8, weight_decay=0), 'compile': dict(compile=True),
    'two processes': dict(), 'everything': EVERYTHING, 'everything, two processes': EVERYTHING}

WATCH = '''
import imgexp.train as t, imgexp.checkpoints as c, imgexp.runs as r, hashlib, safetensors.torch as st, torch
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
            if Path(path).name in {files}:
                with open(path, 'ab') as out: out.write(b'half')
        if Path(path).name in {files} + ['COMMITTED.json', 'index.json', 'history.csv', 'metrics.json', 'status.json']: point('file', begin)
        return f(*args, **kw)
    return g
st.save_file, torch.save, r._write = half(st.save_file, 1), half(torch.save, 1), half(r._write, 0)
c.shutil.copyfile, remove = half(c.shutil.copyfile, 1), c.shutil.rmtree
c.shutil.rmtree = lambda path, **kw: (point('file'), remove(path, **kw)) if Path(path).exists() else None
class Watch(t.Part):
    "Counts the moments of a step, and writes down what each batch holds."
    order, run_valid = 70, False
    def before_batch(self):
        rows = hashlib.sha256(self.dls.train.rows.tobytes()).hexdigest()[:16]
        if hasattr(self.learn, 'schedule'):
            with open('rows{rank}', 'a') as f: f.write(f'{{self.learn.epoch}} {{self.dls.train.batch}} {{rows}}\\\\n')
        point('moment')
    before_step = after_step = after_batch = lambda self: point('moment')
real = t.make_learner
def make(*args, **kw):
    learn = real(*args, **kw)
    learn.add_cb(Watch())
    return learn
t.make_learner = make
find_lr = t.find_lr
t.find_lr = lambda *args, **kw: find_lr(*args, steps=20, **kw)
wanted = c.Checkpoints._wanted
c.Checkpoints._wanted = lambda self, due=False: max(wanted(self), int(due and self.schedule.done % 3 == 0))
'''
FILES = ['model.safetensors', 'ema.safetensors', 'state.pt', '.weights-0001.safetensors.part', '.weights-0002.safetensors.part']  # written in place, within a folder that is renamed when it is whole

class Torture:
    "Runs of one feature in a folder of their own."
    def __init__(self, name, given, data, launcher, folder, chance):
        self.name, self.data, self.launcher, self.folder, self.chance = name, data, launcher, folder, chance
        self.given = GIVEN | {'precision': 'fp32'} | given
        self.processes = 2 if 'two' in name else 1
        self.kills = self.inside = self.runs = 0

    def start(self, root, fatal=None, killed=0):
        env = {}
        if self.processes > 1:
            from test_parallel import free_port
            env = dict(WORLD_SIZE=str(self.processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        args = ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (self.given | {'data': self.data}).items())]
        jobs = []
        for rank in range(self.processes):
            before = FP16 + SCALED_BF16*self.name.startswith('everything') + WATCH.format(fatal=fatal if rank == killed else None, files=FILES, rank=rank).replace('\\\\n', '\\n')
            own = env | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if env else {})
            jobs.append(self.launcher.imgexp(*args, root=root, before=before, TORCHINDUCTOR_CACHE_DIR=str(self.folder/'compiled'), **own))
        return jobs

    def root(self):
        root = self.folder/f'{self.runs}'
        root.mkdir(parents=True)
        self.runs += 1
        if 'extend' in self.given:  # the same parent for all
            parent = self.folder/'parent'
            if not parent.exists():
                parent.mkdir()
                args = ['train', *(f'--{k.replace("_", "-")}={v}' for k, v in (GIVEN | dict(epochs=1, data=self.data, ema=0.9)).items())]
                job = self.launcher.imgexp(*args, root=parent)
                assert job.wait(900) == 0, job.err
                self.given['extend'] = next((parent/'runs').glob('2*')).name
            shutil.copytree(parent/'runs', root/'runs')
        return root

    def undisturbed(self):
        self.whole = self.root()
        for job in self.start(self.whole): assert job.wait(900) == 0, job.err
        self.result = outcome(self.whole, self.processes)

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
        return differences(outcome(root, self.processes), self.result)

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

def torture(names, kills, seed, folder, launcher, tell=print):
    "A row for each feature: kills, how many of them while a checkpoint was written, runs, what differed"
    data = tree(folder/'data', 40, CLASSES)
    broken = tree(folder/'broken', 40, CLASSES)
    next(iter(sorted(broken.rglob('*.png')))).write_bytes(b'\x89PNG')
    for name in names:
        job = Torture(name, dict(FEATURES[name]), broken if name == 'bad' else data, launcher, folder/name.replace(' ', '-'), random.Random(f'{seed} {name}'))
        began, wrong = time.monotonic(), []
        job.undisturbed()
        while job.kills < kills and not wrong: wrong = job.killed(kills)
        row = dict(feature=name, kills=job.kills, inside_writing=job.inside, runs=job.runs - 1, equal='no' if wrong else 'yes', seconds=round(time.monotonic() - began))
        tell(f"{name}: {row['kills']} kills in {row['runs']} runs, {row['inside_writing']} of them into a checkpoint, "
             + (f'DIFFERENT: {wrong[:5]}' if wrong else 'equal') + f", {row['seconds']} s")
        shutil.rmtree(job.folder, ignore_errors=True)
        yield row

def save(row):
    "Put a row into the file, in place of the feature's older one"
    rows = {r['feature']: r for r in csv.DictReader(RESULTS.open())} if RESULTS.exists() else {}
    rows[row['feature']] = row
    with RESULTS.open('w', newline='') as f:
        out = csv.DictWriter(f, list(row), lineterminator='\n')
        out.writeheader(); out.writerows(rows[n] for n in FEATURES if n in rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20, help='for each feature (%(default)s)')
    parser.add_argument('--only', default=';'.join(FEATURES), help='features, separated by semicolons (all)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='do not write the results')
    args = parser.parse_args()
    names = [n.strip() for n in args.only.split(';')]
    if unknown := set(names) - set(FEATURES): parser.error(f"--only: no feature {', '.join(unknown)}; there are {'; '.join(FEATURES)}")
    from tables import machine
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder))
        rows = []
        try:
            for row in torture(names, args.kills, args.seed, Path(folder), launcher, lambda text: print(text, flush=True)):
                rows.append(row)
                if not args.dry: save(row | machine('cpu'))
        finally: launcher.close()
    sys.exit(any(r['equal'] != 'yes' for r in rows))

if __name__ == '__main__': main()
