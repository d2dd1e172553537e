"""Speed of training and of imports: the contenders of a table are measured in alternation (A B A B …) in one process.

    python bench/train.py --only step,imports --repeats 5

Prints the table and writes its rows, with the machine, to bench/results/train.csv. See bench/README.md.
"""
import argparse, gc, importlib, json, os, subprocess, sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from peers import GROUP, Task, handwritten, imgexp_fit, callback_seconds, peers
from tables import summarize, compare, discard_progress, interleave, machine, save, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'bench'/'results'/'train.csv'

# ---- Tables: command-line arguments -> rows

def table_step(args):
    task = Task('resnet18', 64, 64, args.steps, args.device, 'adamw')
    seconds = measure('step', {'hand-written loop, same precision': partial(handwritten, task),
                               'imgexp.fit': partial(imgexp_fit, task)}, args)
    return compare('step', seconds, {'imgexp.fit': 'ratio <= 1.05'})

DEPENDENCIES = 'import torch, torchvision, pandas, matplotlib.pyplot, cv2; from fastai.learner import Learner'

def fresh_import(statement):
    "Seconds that `statement` takes in a new Python process, excluding startup and exit"
    code = f'import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)'
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    if result.returncode: sys.exit(f'bench: `{statement}` failed: {result.stderr.strip()}')
    return float(result.stdout.split()[-1])

def table_imports(args):
    seconds = measure('imports', {'torch, torchvision, Learner, pandas, matplotlib, cv2':
                                      partial(fresh_import, DEPENDENCIES),
                                  'import imgexp.train': partial(fresh_import, 'import imgexp.train'),
                                  'import imgexp': partial(fresh_import, 'import imgexp')}, args)
    return compare('imports', seconds, {'import imgexp.train': 'ratio <= 1.25', 'import imgexp': 'median <= 0.3'})

SETTINGS = {'rn18-64': ('resnet18', 64, 64), 'rn18-128': ('resnet18', 128, 32), 'rn50-128': ('resnet50', 128, 32),
            'rn50-224': ('resnet50', 224, 256)}  # architecture, px, batch size; the last one is for a GPU

def table_peers(setting, args):
    "Images per second; ratio: the first contender's over this one's"
    task = Task(*SETTINGS[setting], args.steps, args.device)
    contenders = {name: partial(peer.run, task) for name, peer in peers(task, args.data).items()}
    seconds = measure(f'peers-{setting}', contenders, args)
    rates = {k: [task.batch/s for s in v] for k, v in seconds.items()}
    loop = 'hand-written loop, same precision' + ', compile'*(args.device == 'cuda')
    frameworks = ('fastai Learner', 'Lightning Trainer')
    if task.precision == 'bf16': frameworks = ('fastai Learner, bf16', 'Lightning Trainer, bf16-mixed')
    targets = {loop: 'ratio >= 0.971'} | dict.fromkeys(frameworks, 'ratio > 1')  # at the same precision
    return compare(f'peers-{setting}', rates, targets, inverse=True)

def table_memory(setting, args):
    "Peak memory of each contender in a fresh process, MB"
    def peak_of(name):
        command = [sys.executable, __file__, '--only', f'memory-{setting}', '--child', name]
        command += ['--device', args.device, '--data', args.data]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode: sys.exit(f'bench: {name!r} failed:\n{result.stderr[-2000:]}')
        return json.loads(result.stdout.splitlines()[-1])
    task = Task(*SETTINGS[setting], GROUP, args.device)
    contenders = {name: (partial(peak_of, name), 1) for name, peer in peers(task, args.data).items() if peer.imports}
    values = measure(f'memory-{setting}', contenders, args, warmup=0)
    return compare(f'memory-{setting}', values, {})

def child(setting, args):
    "Peak memory in MB of the contender `args.child` in this process, excluding modules and images"
    import psutil
    task = Task(*SETTINGS[setting], GROUP, args.device)
    peer = peers(task, args.data)[args.child]
    for module in peer.imports.split(): importlib.import_module(module)
    before = psutil.Process().memory_info().rss/1e6
    peer.run(task)
    if args.device == 'cuda':
        import torch
        return torch.cuda.max_memory_allocated()/1e6
    return peak_memory() - before

def peak_memory():
    "Peak resident memory of this process, MB"
    try: return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])*1024/1e6
    except (OSError, IndexError): pass
    import resource  # on Linux this would include the parent's
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform == 'darwin' else 1e3)

EPOCHS = 10

def table_overhead(args):
    "Percentage of a run's time spent on checkpoints and history"
    setting = SETTINGS['rn18-64']
    def run():
        step = imgexp_fit(Task(*setting, 2*GROUP, args.device))
        task = Task(*setting, round(args.minutes*60/EPOCHS/step), args.device)
        total, seconds = callback_seconds(task, EPOCHS)
        percent = {k: 100*seconds[k]/total for k in ('checkpoints', 'history')}
        return {'checkpoints and history': sum(percent.values())} | percent
    runs = measure('overhead', {'run': (run, 3)}, args, warmup=0)['run']
    values = {f'{k}, % of the time': [v[k] for v in runs] for k in runs[0]}
    return summarize('overhead', values, {'checkpoints and history, % of the time': 'median < 2'})

TABLES = {'step': table_step, 'imports': table_imports,
          **{f'peers-{s}': partial(table_peers, s) for s in SETTINGS},
          **{f'memory-{s}': partial(table_memory, s) for s in SETTINGS}, 'overhead': table_overhead}

# ---- Measuring and reporting

def measure(table, contenders, args, warmup=1):
    "{contender: seconds of each round}, measured in alternation after the uncounted `warmup` rounds"
    def isolated(run):
        def isolated_run():
            free_memory(args.device)
            return run()
        return isolated_run
    contenders = {k: v if isinstance(v, tuple) else (v, args.repeats) for k, v in contenders.items()}
    contenders = {k: (isolated(run), n) for k, (run, n) in contenders.items()}
    settings = {'device': args.device, 'steps': args.steps, 'minutes': args.minutes, 'data': args.data}
    return interleave(table, contenders, args.repeats, warmup, settings, not args.dry)

def free_memory(device):
    "Free the memory and compiled code of the previous contender"
    gc.collect()
    if device == 'cuda':
        import torch
        torch.compiler.reset()
        torch.cuda.empty_cache()

def select_tables(only, device):
    "Tables selected by the comma-separated names or prefixes `only`"
    if not only: return [t for t in TABLES if '-' not in t or (t.endswith('-224') == (device == 'cuda'))]
    matches = {name: [t for t in TABLES if t == name or t.startswith(f'{name}-')] for name in only.split(',')}
    if unknown := [name for name, tables in matches.items() if not tables]:
        sys.exit(f"bench: --only: no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    return [t for tables in matches.values() for t in tables]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='comma-separated tables, or prefixes of their names: '
                        f"{', '.join(TABLES)} (all but -224; on a GPU all but -64 and -128)")
    parser.add_argument('--repeats', type=int, default=5, help='counted rounds (%(default)s)')
    parser.add_argument('--steps', type=int, default=30, help='timed steps per round, a multiple of 5 (%(default)s)')
    parser.add_argument('--minutes', type=float, default=2, help='length of a run in the table overhead (%(default)s)')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='(%(default)s)')
    parser.add_argument('--data', default='', help='a pack: adds a row of training from it to peers and memory')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1: parser.error('--repeats must be 1 or more')
    if args.steps < GROUP or args.steps % GROUP: parser.error(f'--steps must be a multiple of {GROUP}')
    if args.data: args.data = str(Path(args.data).resolve())
    if args.device == 'cpu': os.environ['CUDA_VISIBLE_DEVICES'] = ''  # otherwise fastai and Keras use a GPU
    names, rows = select_tables(args.only, args.device), []
    if args.child: return print(json.dumps(child(names[0].removeprefix('memory-'), args)))
    if missing := [m for m in ('lightning', 'keras') if not find_spec(m)]:
        if any('-' in n for n in names):
            parser.error(f"{' and '.join(missing)} not installed: pip install -e '.[bench,keras]'")
    for name in names:
        table_rows = [row | machine(args.device) for row in TABLES[name](args)]
        if not args.dry:
            save(table_rows, RESULTS, TABLES)
            discard_progress(name)
        rows += table_rows
    print(file=sys.stderr)
    show(rows)

if __name__ == '__main__': main()
