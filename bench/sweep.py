"""What the sweep engine itself costs: trials with 8 parameters that do nothing but report 7 times. Given class folders (train, validation,
test), also how many trials of a Keras CNN an hour holds, in a sweep and as they are usually run.

    python bench/sweep.py --trials 1000 --jobs 2
    python bench/sweep.py --only "trials an hour" --images path/to/clothing

`trials an hour` goes on where it was interrupted. Prints the table and writes its rows, with the machine, into bench/results/sweep.csv. See bench/README.md.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

from tables import alone, compare, forget, in_turn, machine, save, show

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'sweep.csv'
PARAMETERS = {f'x{k}': {'distribution': 'log_uniform_values', 'min': 1e-4, 'max': 1.} for k in range(4)} | {
    f'c{k}': {'values': ['a', 'b', 'c']} for k in range(4)}
EARLY = {'early_terminate': {'type': 'hyperband', 'min_iter': 8, 'eta': 3}}
SWEEPS = {'random': ({'method': 'random'}, 'journal'), 'random, hyperband': ({'method': 'random'} | EARLY, 'journal'),
          'random, SQLite': ({'method': 'random'}, 'sqlite'), 'bayes': ({'method': 'bayes'}, 'journal')}
HOUR, MEMORY = 'trials an hour', 'memory after each of 50 Keras trials, MB'
SMALL = {'filters': {'values': [16, 32]}, 'strategy': {'values': ['same', 'half']}, 'filter_size': {'value': 3}, 'size': {'value': 64}}  # the usual way takes minutes for a larger one

class Report:
    "What a `Run` tells a sweep"
    name, params = 'nothing', {}
    def __init__(self): self.rows = []
    def history_rows(self): return ['valid_loss'], self.rows

def nothing(**values):
    "A trial's program"
    from imgexp.trials import observe
    run = Report()
    for epoch in range(7):
        row = {'valid_loss': values['x0'] + 1/(epoch + 1)}
        run.rows.append([str(v) for v in row.values()])
        observe(run, row)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--trials', type=int, default=1000, help='(%(default)s)')
    parser.add_argument('--jobs', type=int, default=2, help='workers (%(default)s)')
    parser.add_argument('--only', default='', help='tables whose names begin so')
    parser.add_argument('--images', help='a folder with train, validation and test, of class folders')
    parser.add_argument('--rounds', type=int, default=5, help='of `trials an hour`, each with a trial a worker (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    args = parser.parse_args()
    os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])
    sys.path.insert(0, str(HERE))
    tables = {name: partial(measure, name, given, storage, args) for name, (given, storage) in SWEEPS.items()} | {MEMORY: memory}
    if args.images: tables[HOUR] = partial(trials_an_hour, args)
    for name, table in tables.items():
        if not name.startswith(args.only): continue
        began = time.monotonic()
        rows = table()
        show(rows)
        print(f'{name}: {(time.monotonic() - began)/60:.1f} minutes', file=sys.stderr)
        if args.dry: continue
        save([r | machine('cpu') for r in rows], RESULTS, [*SWEEPS, MEMORY, HOUR])
        forget(name)

def measure(name, given, storage, args):
    from imgexp.sweep import make_sweep, run_sweep
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        config = given | {'metric': {'name': 'val_loss'}, 'program': 'sweep:nothing', 'parameters': PARAMETERS}
        sweep, began = make_sweep(config, 'nothing', trials=args.trials, storage=storage), time.perf_counter()
        run_sweep('nothing', args.jobs, say=lambda text: None)
        wall = time.perf_counter() - began
        own = [1000*r['seconds'] for r in sweep.rows()]
        assert len(own) == args.trials
    return [*alone(name, {'a trial, ms': own, f'a trial of the last tenth, ms': own[-len(own)//10:], f'{args.trials} trials on {args.jobs} workers, s': [wall]},
                   {'a trial, ms': 'median <= 100', f'{args.trials} trials on {args.jobs} workers, s': 'median < 120'})]

def keras_trial(**values):
    "A trial of a small Keras CNN; what memory the worker holds after it goes into a file"
    import psutil
    from imgexp.keras_cnn import train
    from imgexp.start import runs_dir
    run = train(**values)
    with open(runs_dir()/'memory', 'a') as f: print(psutil.Process().memory_full_info().uss/1e6, file=f)
    return run

def memory(trials=50):
    "One worker, networks of all kinds; the first ten trials bring in what stays"
    from imgexp.keras_cnn import SPACE
    from imgexp.start import runs_dir
    from imgexp.sweep import make_sweep, run_sweep
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        parameters = SPACE | {k: {'value': v} for k, v in dict(size=16, subset=0.3, epochs=2, filters=32, track='off').items()}
        make_sweep({'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': 'sweep:keras_trial', 'parameters': parameters}, 'memory', trials=trials)
        run_sweep('memory', 1)
        held = [float(line) for line in (runs_dir()/'memory').read_text().split()]
    return [*compare(MEMORY, {'trials 11 to 20': held[10:20], f'trials {trials - 9} to {trials}': held[-10:]}, {f'trials {trials - 9} to {trials}': 'ratio <= 1.05'})]

class Serving:
    "`usual_trial.py` in as many processes as the sweep has workers, a thread each as the sweep's trials; they start with the first trials and stay"
    def __init__(self, images, jobs, policy): self.command, self.jobs, self.held, self.err = [sys.executable, str(HERE/'usual_trial.py'), images, '--serve', '--policy', policy], jobs, [], tempfile.TemporaryFile('w+')
    def __call__(self, points):
        env = os.environ | dict.fromkeys(('OMP_NUM_THREADS', 'TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS'), '1')
        while len(self.held) < self.jobs: self.held.append(subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.err, text=True, env=env))
        for process, point in zip(self.held, points): print(json.dumps(point), file=process.stdin, flush=True)
        return [self._answer(process) for process in self.held]
    def _answer(self, process):
        while line := process.stdout.readline():
            if line.startswith('{'): return json.loads(line)['valid_top1']
        self.err.seek(0)
        sys.exit(f'bench: a process of usual_trial.py ended:\n{self.err.read()[-2000:]}')
    def close(self):
        for process in self.held: process.stdin.close(); process.wait()

def trials_an_hour(args):
    "The same trials in turn, as many as there are workers: in a sweep whose workers stay, in scripts that stay with the images in memory, and in a script a trial"
    from imgexp.workers import Local
    from imgexp.keras_cnn import SPACE
    from imgexp.keras_network import layer_type
    from imgexp.sweep import make_sweep, run_sweep
    class Staying(Local):
        def __exit__(self, *_): pass
    images = str(Path(args.images).resolve())
    parameters = SPACE | SMALL | {'data': {'value': images}, 'track': {'value': 'off'}}
    config = {'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': '10_keras_cnn', 'parameters': parameters}
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        def sweep_of(number): return make_sweep(config, f'hour-{number}', trials=args.jobs, seed=number)
        workers = Staying(args.jobs, sweep_of(0).threads)
        policies = ['mixed_bfloat16', 'float32'] if layer_type('auto') == 'mixed_bfloat16' else ['float32']
        served = {f'{args.jobs} scripts that stay, images cached, {policy}': Serving(images, args.jobs, policy) for policy in policies}
        def points(number): return [sweep_of(number).point(k) for k in range(args.jobs)]
        def ours(number):
            run_sweep(sweep_of(number).name, args.jobs, executor=workers, say=lambda text: None)
            return [r['value'] for r in sweep_of(number).rows()]
        ways = {'imgexp sweep': ours} | {k: lambda number, run=run: run(points(number)) for k, run in served.items()} | {
            'a script a trial': lambda number: [usual_trial(images, p) for p in points(number)]}
        def timed(way):
            def run(number):
                began = time.perf_counter()
                top1 = way(number)
                return {'an hour': 3600*args.jobs/(time.perf_counter() - began), 'top1': top1}
            return run
        settings = {'images': images, 'jobs': args.jobs}
        try: found = in_turn(HOUR, {k: timed(w) for k, w in ways.items()}, args.rounds, settings=settings, keep=not args.dry, numbered=True)
        finally:
            workers.close()
            for run_ in served.values(): run_.close()
    rates = {k: [v['an hour'] for v in values] for k, values in found.items()}
    whole = {f'{k}, all rounds': [len(v)/sum(1/r for r in v)] for k, v in rates.items()}
    return [*compare(HOUR, rates, {}, over=True), *compare(HOUR, whole, {}, over=True),
            *alone(HOUR, {f'validation top-1, {k}': [t for v in values for t in v['top1']] for k, values in found.items()}, {})]

def usual_trial(images, values):
    done = subprocess.run([sys.executable, HERE/'usual_trial.py', images, json.dumps(values)], capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])['valid_top1']

if __name__ == '__main__': main()
