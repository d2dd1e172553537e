"""Speed of training and of imports, side by side: the contenders of a table take turns (A B A B …) in one process.

    python bench/train.py --only step,imports --repeats 5

Prints the table and writes its rows, with the machine, into bench/results/train.csv. See bench/README.md.
"""
import argparse, gc, importlib, json, os, subprocess, sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from peers import GROUP, Task, handwritten, imgexp_fit, callback_seconds, peers
from tables import alone, compare, forget, in_turn, machine, save, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'bench'/'results'/'train.csv'

# ---- Tables: the parsed command line -> rows

def table_step(args):
    task = Task('resnet18', 64, 64, args.steps, args.device, 'adamw')
    seconds = measure('step', {'hand-written loop, same precision': partial(handwritten, task),
                               'imgexp.fit': partial(imgexp_fit, task)}, args)
    return compare('step', seconds, {'imgexp.fit': 'ratio <= 1.05'})

ALONE = 'import torch, torchvision, pandas, matplotlib.pyplot, cv2; from fastai.learner import Learner'

def fresh_import(statement):
    "Seconds that `statement` takes in a new Python, its start and end excluded."
    code = f'import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: sys.exit(f'bench: `{statement}` failed: {done.stderr.strip()}')
    return float(done.stdout.split()[-1])

def table_imports(args):
    seconds = measure('imports', {'torch, torchvision, Learner, pandas, matplotlib, cv2': partial(fresh_import, ALONE),
                       'import imgexp.train': partial(fresh_import, 'import imgexp.train'),
                       'import imgexp': partial(fresh_import, 'import imgexp')}, args)
    return compare('imports', seconds, {'import imgexp.train': 'ratio <= 1.25', 'import imgexp': 'median <= 0.3'})

SETTINGS = {'rn18-64': ('resnet18', 64, 64), 'rn18-128': ('resnet18', 128, 32), 'rn50-128': ('resnet50', 128, 32),
            'rn50-224': ('resnet50', 224, 256)}  # network, px, images a step; the last one is for a GPU

def table_peers(setting, args):
    "Images a second; ratio: the first contender's over this one's"
    task = Task(*SETTINGS[setting], args.steps, args.device)
    found, same = peers(task, args.data), 'hand-written loop, same precision' + ', compile'*(args.device == 'cuda')
    seconds = measure(f'peers-{setting}', {name: partial(peer.run, task) for name, peer in found.items()}, args)
    frameworks = ('fastai Learner, bf16', 'Lightning Trainer, bf16-mixed') if task.precision == 'bf16' else ('fastai Learner', 'Lightning Trainer')
    targets = {same: 'ratio >= 0.971'} | dict.fromkeys(frameworks, 'ratio > 1')  # at our precision
    return compare(f'peers-{setting}', {k: [task.batch/s for s in v] for k, v in seconds.items()}, targets, over=True)

def table_memory(setting, args):
    "Peak of each contender in a fresh process, MB"
    def peak_of(name):
        command = [sys.executable, __file__, '--only', f'memory-{setting}', '--child', name]
        command += ['--device', args.device, '--data', args.data]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode: sys.exit(f'bench: {name!r} failed:\n{done.stderr[-2000:]}')
        return json.loads(done.stdout.splitlines()[-1])
    found = peers(Task(*SETTINGS[setting], GROUP, args.device), args.data)
    values = measure(f'memory-{setting}', {name: (partial(peak_of, name), 1) for name, peer in found.items() if peer.imports}, args, warm=0)
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
    setting = SETTINGS['rn18-64']
    def run():
        step = imgexp_fit(Task(*setting, 2*GROUP, args.device))
        total, spent = callback_seconds(Task(*setting, round(args.minutes*60/EPOCHS/step), args.device), EPOCHS)
        share = {k: 100*spent[k]/total for k in ('checkpoints', 'history')}
        return {'checkpoints and history': sum(share.values())} | share
    found = measure('overhead', {'run': (run, 3)}, args, warm=0)['run']
    values = {f'{k}, % of the time': [v[k] for v in found] for k in found[0]}
    return alone('overhead', values, {'checkpoints and history, % of the time': 'median < 2'})

TABLES = {'step': table_step, 'imports': table_imports,
          **{f'peers-{s}': partial(table_peers, s) for s in SETTINGS},
          **{f'memory-{s}': partial(table_memory, s) for s in SETTINGS}, 'overhead': table_overhead}

# ---- Measuring and telling

def measure(table, contenders, args, warm=1):
    "{contender: seconds of each round}; the contenders take turns, after one round that is not counted."
    def tidied(run):
        def measured():
            tidy(args.device)
            return run()
        return measured
    found = {k: v if isinstance(v, tuple) else (v, args.repeats) for k, v in contenders.items()}
    settings = {'device': args.device, 'steps': args.steps, 'minutes': args.minutes, 'data': args.data}
    return in_turn(table, {k: (tidied(run), n) for k, (run, n) in found.items()}, args.repeats, warm, settings, not args.dry)

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
        if not args.dry:
            save(new, RESULTS, TABLES)
            forget(name)
        rows += new
    print(file=sys.stderr)
    show(rows)

if __name__ == '__main__': main()
