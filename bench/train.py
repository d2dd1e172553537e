"""Speed of training and of imports, side by side: the contenders of a table take turns (A B A B …) in one process.

    python bench/train.py --only step,plain,imports --repeats 5

Prints the table and writes its rows, with the machine, into bench/results/train.csv. See bench/README.md.
"""
import argparse, contextlib, gc, io, statistics, subprocess, sys, tempfile, time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
from tables import compare, machine, save, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'bench'/'results'/'train.csv'
CLASSES, SIZE, BATCH = 10, 64, 64  # classes, px, images a step
WARM, GROUP = 3, 5  # steps before the clock starts; steps between two looks at it

# ---- What all training contenders share

Task = namedtuple('Task', 'images labels device precision')  # uint8 [n, h, w, 3], int64 [n]

def make_task(steps, device):
    "Images in memory: one epoch of WARM + `steps` batches."
    from imgexp.train import choose_precision
    rng, n = np.random.default_rng(0), BATCH*(WARM + steps)
    images = rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
    return Task(images, np.arange(n) % CLASSES, device, choose_precision('auto', device))

class Clock:
    "Is told of each step done; `seconds` a step: the median over groups of GROUP steps, the first WARM left out."
    def __init__(self, task): self.device, self.done, self.marks = task.device, 0, []
    def tick(self):
        self.done += 1
        if self.done >= WARM and (self.done - WARM) % GROUP == 0: self.marks.append(self.now())
    def now(self):
        if self.device == 'cuda':
            import torch
            torch.cuda.synchronize()
        return time.perf_counter()
    @property
    def seconds(self): return statistics.median(b - a for a, b in zip(self.marks, self.marks[1:]))/GROUP

def new_network(task):
    import torch, torchvision
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=CLASSES).to(task.device).train()

# ---- Training contenders: Task -> seconds a step

def imgexp_fit(task):
    "One epoch of `imgexp.train.fit`, all its parts attached; validation and checkpoint are not timed."
    from imgexp.data import from_arrays
    from imgexp.loader import IMAGENET
    from imgexp.models import build_model
    from imgexp.runs import start_run
    from imgexp.train import Part, fit, make_learner
    class Ticks(Part):
        order, run_valid = 1000, False  # after every other part
        def after_batch(self): clock.tick()
    clock, n = Clock(task), len(task.images)
    pixels, labels = (np.concatenate([v, v[:BATCH]]) for v in (task.images, task.labels))
    table = from_arrays(pixels, labels, splits=np.arange(n + BATCH) >= n)  # the last batch again: validation
    model = build_model('resnet18', CLASSES, size=SIZE, stem='standard')
    learn = make_learner(table, model, IMAGENET, SIZE, BATCH, 'none', task.precision, device=task.device)
    learn.add_cb(Ticks())
    with tempfile.TemporaryDirectory() as root, silent():
        with start_run('bench', {'resume': 'never', 'track': 'off'}, root=root) as run:
            fit(run, learn, epochs=1, optimizer='adamw', lr=1e-3)
    return clock.seconds

def handwritten(task):
    "The same work without a framework: uint8 batches, normalized, bf16 autocast, channels last, fused AdamW."
    import torch
    import torch.nn.functional as F
    from imgexp.loader import IMAGENET
    clock, model = Clock(task), new_network(task).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images, labels = torch.from_numpy(task.images), torch.from_numpy(task.labels)
    mean, std = (torch.tensor(v, device=task.device)*255 for v in IMAGENET)
    for rows in torch.randperm(len(images)).split(BATCH):
        x, y = (v[rows].to(task.device, non_blocking=True) for v in (images, labels))
        x = ((x.float() - mean)/std).permute(0, 3, 1, 2)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.precision == 'bf16'): out = model(x)
        F.cross_entropy(out.float(), y).backward()
        opt.step()
        opt.zero_grad()
        clock.tick()
    return clock.seconds

def plain_fp32(task):
    "A usual script: float32 [n, 3, h, w], normalized beforehand; no autocast, no channels last, AdamW's defaults."
    import torch
    import torch.nn.functional as F
    clock, model = Clock(task), new_network(task)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = (torch.from_numpy(task.images).permute(0, 3, 1, 2).contiguous().float()/255 - 0.45)/0.225
    labels = torch.from_numpy(task.labels)
    for rows in torch.randperm(len(images)).split(BATCH):
        x, y = images[rows].to(task.device), labels[rows].to(task.device)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        clock.tick()
    return clock.seconds

@contextlib.contextmanager
def silent():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): yield

# ---- Importing contenders: -> seconds of the import, in a fresh process

ALONE = 'import torch, torchvision, pandas, matplotlib.pyplot, cv2; from fastai.learner import Learner'

def fresh_import(statement):
    "Seconds that `statement` takes in a new Python, its start and end excluded."
    code = f'import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: sys.exit(f'bench: `{statement}` failed: {done.stderr.strip()}')
    return float(done.stdout.split()[-1])

# ---- Tables: name -> (contenders, the first is what the others are compared with; {contender: target})

def step(task): return {'hand-written loop, same precision': partial(handwritten, task),
                        'imgexp.train.fit': partial(imgexp_fit, task)}

def plain(task): return {'imgexp.train.fit': partial(imgexp_fit, task),
                         'plain fp32 loop': partial(plain_fp32, task)}

def imports(task): return {'torch, torchvision, Learner, pandas, matplotlib, cv2': partial(fresh_import, ALONE),
                           'import imgexp.train': partial(fresh_import, 'import imgexp.train'),
                           'import imgexp': partial(fresh_import, 'import imgexp')}

TABLES = {'step': (step, {'imgexp.train.fit': 'ratio <= 1.05'}),
          'plain': (plain, {'plain fp32 loop': 'ratio >= 1.6'}),
          'imports': (imports, {'import imgexp.train': 'ratio <= 1.25', 'import imgexp': 'median <= 0.3'})}

# ---- Measuring and telling

def measure(contenders, repeats):
    "{contender: seconds of each round}; the contenders take turns, after one round that is not counted."
    seconds = {name: [] for name in contenders}
    for k in range(repeats + 1):
        for name, run in contenders.items():
            gc.collect()
            s = run()
            if k: seconds[name].append(s)
            print('.', end='', file=sys.stderr, flush=True)
    return seconds

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(TABLES), help='tables, separated by commas (all: %(default)s)')
    parser.add_argument('--repeats', type=int, default=5, help='rounds that count (%(default)s)')
    parser.add_argument('--steps', type=int, default=30, help='steps timed in a round, a multiple of 5 (%(default)s)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    args = parser.parse_args()
    names = args.only.split(',')
    if unknown := set(names) - set(TABLES):
        parser.error(f"--only: no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    if args.repeats < 1: parser.error('--repeats must be 1 or more')
    if args.steps < GROUP or args.steps % GROUP: parser.error(f'--steps must be a multiple of {GROUP}')
    task, rows = make_task(args.steps, args.device), []
    for name in names:
        contenders, targets = TABLES[name]
        seconds = measure(contenders(task), args.repeats)
        new = [row | machine(args.device) for row in compare(name, seconds, targets)]
        if not args.dry: save(new, RESULTS, TABLES)
        rows += new
    print(file=sys.stderr)
    show(rows)

if __name__ == '__main__': main()
