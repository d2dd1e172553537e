"""Speed of training and of imports, side by side: the contenders of a table take turns (A B A B …) in one process.

    python bench/train.py --only step,plain,imports --repeats 5

Prints the table and writes its rows, with the machine, into bench/results/train.csv. See bench/README.md.
"""
import argparse, gc, importlib, json, os, subprocess, sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from peers import GROUP, Task, handwritten, imgexp_fit, parts_seconds, peers, plain_fp32
from tables import alone, compare, machine, save, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'bench'/'results'/'train.csv'

# ---- Tables: the parsed command line -> rows

def table_step(args):
    task = Task('resnet18', 64, 64, args.steps, args.device, 'adamw')
    seconds = measure({'hand-written loop, same precision': partial(handwritten, task),
                       'imgexp.train.fit': partial(imgexp_fit, task)}, args)
    return compare('step', seconds, {'imgexp.train.fit': 'ratio <= 1.05'})

def table_plain(args):
    task = Task('resnet18', 64, 64, args.steps, args.device, 'adamw')
    seconds = measure({'imgexp.train.fit': partial(imgexp_fit, task),
                       'plain fp32 loop': partial(plain_fp32, task)}, args)
    return compare('plain', seconds, {'plain fp32 loop': 'ratio >= 1.6'})

ALONE = 'import torch, torchvision, pandas, matplotlib.pyplot, cv2; from fastai.learner import Learner'

def fresh_import(statement):
    "Seconds that `statement` takes in a new Python, its start and end excluded."
    code = f'import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: sys.exit(f'bench: `{statement}` failed: {done.stderr.strip()}')
    return float(done.stdout.split()[-1])

def table_imports(args):
    seconds = measure({'torch, torchvision, Learner, pandas, matplotlib, cv2': partial(fresh_import, ALONE),
                       'import imgexp.train': partial(fresh_import, 'import imgexp.train'),
                       'import imgexp': partial(fresh_import, 'import imgexp')}, args)
    return compare('imports', seconds, {'import imgexp.train': 'ratio <= 1.25', 'import imgexp': 'median <= 0.3'})

SETTINGS = {'rn18-64': ('resnet18', 64, 64), 'rn18-128': ('resnet18', 128, 32), 'rn50-128': ('resnet50', 128, 32),
            'rn50-224': ('resnet50', 224, 256)}  # network, px, images a step; the last one is for a GPU

def table_peers(setting, args):
    "Images a second; ratio: the first contender's over this one's"
    task = Task(*SETTINGS[setting], args.steps, args.device)
    found, same = peers(task, args.data), 'hand-written loop, same precision' + ', compile'*(args.device == 'cuda')
    seconds = measure({name: partial(peer.run, task) for name, peer in found.items()}, args)
    targets = {same: 'ratio >= 0.971', 'fastai Learner': 'ratio > 1', 'Lightning Trainer': 'ratio > 1'}
    if args.device == 'cpu': targets['plain fp32 loop'] = 'ratio >= 1.6' if setting == 'rn18-64' else 'ratio >= 2'
    return compare(f'peers-{setting}', {k: [task.batch/s for s in v] for k, v in seconds.items()}, targets, over=True)

def table_memory(setting, args):
    "Peak of each contender in a fresh process, MB"
    values = {}
    for name in peers(Task(*SETTINGS[setting], GROUP, args.device), args.data):
        command = [sys.executable, __file__, '--only', f'memory-{setting}', '--child', name]
        command += ['--device', args.device, '--data', args.data]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode: sys.exit(f'bench: {name!r} failed:\n{done.stderr[-2000:]}')
        values[name] = [json.loads(done.stdout.splitlines()[-1])]
        print('.', end='', file=sys.stderr, flush=True)
    return compare(f'memory-{setting}', values, {})

def child(setting, args):
    "The contender `args.child` in this process: MB at most, less what modules and images take"
    import psutil
    task = Task(*SETTINGS[setting], GROUP, args.device)
    peer = peers(task, args.data)[args.child]
    for module in peer.imports.split(): importlib.import_module(module)
    before = psutil.Process().memory_info().rss/1e6
    peer.run(task)
    if args.device == 'cuda':
        import torch
        return torch.cuda.max_memory_allocated()/1e6
    return peak() - before

def peak():
    "The most memory this process has held, MB"
    try: return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])*1024/1e6
    except (OSError, IndexError): pass
    import resource  # on Linux its number would include the parent's
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform == 'darwin' else 1e3)

EPOCHS = 10

def table_overhead(args):
    "Share of a run's time that its checkpoints and its history take, %"
    setting, values = SETTINGS['rn18-64'], {}
    step = imgexp_fit(Task(*setting, 2*GROUP, args.device))
    task = Task(*setting, round(args.minutes*60/EPOCHS/step), args.device)
    for _ in range(min(args.repeats, 3)):
        total, spent = parts_seconds(task, EPOCHS)
        share = {k: 100*spent[k]/total for k in ('checkpoints', 'history')}
        for name, percent in {'checkpoints and history': sum(share.values()), **share}.items():
            values.setdefault(f'{name}, % of the time', []).append(percent)
        print('.', end='', file=sys.stderr, flush=True)
    return alone('overhead', values, {'checkpoints and history, % of the time': 'median < 2'})

TABLES = {'step': table_step, 'plain': table_plain, 'imports': table_imports,
          **{f'peers-{s}': partial(table_peers, s) for s in SETTINGS},
          **{f'memory-{s}': partial(table_memory, s) for s in SETTINGS}, 'overhead': table_overhead}

# ---- Measuring and telling

def measure(contenders, args):
    "{contender: seconds of each round}; the contenders take turns, after one round that is not counted."
    seconds = {name: [] for name in contenders}
    for k in range(args.repeats + 1):
        for name, run in contenders.items():
            tidy(args.device)
            s = run()
            if k: seconds[name].append(s)
            print('.', end='', file=sys.stderr, flush=True)
    return seconds

def tidy(device):
    "Nothing of the contender before is left to the next one"
    gc.collect()
    if device == 'cuda':
        import torch
        torch.compiler.reset()
        torch.cuda.empty_cache()

def chosen(only, device):
    "Names of the tables that the words of `only` stand for or begin"
    if not only: return [t for t in TABLES if '-' not in t or (t.endswith('-224') == (device == 'cuda'))]
    found = {w: [t for t in TABLES if t == w or t.startswith(f'{w}-')] for w in only.split(',')}
    if unknown := [w for w, tables in found.items() if not tables]:
        sys.exit(f"bench: --only: no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    return [t for tables in found.values() for t in tables]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='tables, or what their names begin with, separated by commas: '
                        f"{', '.join(TABLES)} (all but -224; on a GPU all but -64 and -128)")
    parser.add_argument('--repeats', type=int, default=5, help='rounds that count (%(default)s)')
    parser.add_argument('--steps', type=int, default=30, help='steps timed in a round, a multiple of 5 (%(default)s)')
    parser.add_argument('--minutes', type=float, default=2, help='length of a run of the table overhead (%(default)s)')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='(%(default)s)')
    parser.add_argument('--data', default='', help='a pack: peers and memory get a row of training from it')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1: parser.error('--repeats must be 1 or more')
    if args.steps < GROUP or args.steps % GROUP: parser.error(f'--steps must be a multiple of {GROUP}')
    if args.data: args.data = str(Path(args.data).resolve())
    if args.device == 'cpu': os.environ['CUDA_VISIBLE_DEVICES'] = ''  # fastai and Keras would take a GPU unasked
    names, rows = chosen(args.only, args.device), []
    if args.child: return print(json.dumps(child(names[0].removeprefix('memory-'), args)))
    if missing := [m for m in ('lightning', 'keras') if not find_spec(m)]:
        more = f"{' and '.join(missing)} not installed: pip install -e '.[bench,keras]'"
        if any('-' in n for n in names): parser.error(more)
    for name in names:
        new = [row | machine(args.device) for row in TABLES[name](args)]
        if not args.dry: save(new, RESULTS, TABLES)
        rows += new
    print(file=sys.stderr)
    show(rows)

if __name__ == '__main__': main()
