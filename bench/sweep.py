"""Overhead of the sweep engine: trials with 8 parameters that only report 7 times. With `--images`, also the number of
trials of a Keras CNN per hour, in a sweep and as usually run.

    python bench/sweep.py --trials 1000 --jobs 2
    python bench/sweep.py --only "trials an hour" --images path/to/clothing

`trials an hour` resumes after an interruption. Prints the table and writes its rows, with the machine, to
bench/results/sweep.csv. See bench/README.md.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

from tables import summarize, compare, discard_progress, interleave, machine, save, show

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'sweep.csv'
PARAMETERS = {f'x{k}': {'distribution': 'log_uniform_values', 'min': 1e-4, 'max': 1.} for k in range(4)} | {
    f'c{k}': {'values': ['a', 'b', 'c']} for k in range(4)}
EARLY = {'early_terminate': {'type': 'hyperband', 'min_iter': 8, 'eta': 3}}
SWEEPS = {'random': ({'method': 'random'}, 'journal'), 'random, hyperband': ({'method': 'random'} | EARLY, 'journal'),
          'random, SQLite': ({'method': 'random'}, 'sqlite'), 'bayes': ({'method': 'bayes'}, 'journal')}
HOUR, MEMORY = 'trials an hour', 'memory after each of 50 Keras trials, MB'
SMALL = {'filters': {'values': [16, 32]}, 'strategy': {'values': ['same', 'half']}, 'filter_size': {'value': 3},
         'size': {'value': 64}}  # larger networks take minutes in the usual script

class FakeRun:
    "The part of a `Run` that a sweep reads"
    name, params = 'nothing', {}
    def __init__(self): self.rows = []
    def history_rows(self): return ['valid_loss'], self.rows

def nothing(**values):
    "Program of a trial: seven reports without any computation"
    from imgexp.trials import observe
    run = FakeRun()
    for epoch in range(7):
        row = {'valid_loss': values['x0'] + 1/(epoch + 1)}
        run.rows.append([str(v) for v in row.values()])
        observe(run, row)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--trials', type=int, default=1000, help='number of trials (%(default)s)')
    parser.add_argument('--jobs', type=int, default=2, help='workers (%(default)s)')
    parser.add_argument('--only', default='', help='prefix of the tables to measure')
    parser.add_argument('--images', help='folder with train, validation and test, each with class folders')
    parser.add_argument('--rounds', type=int, default=5, help='rounds of `trials an hour`, each with one trial per worker (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    args = parser.parse_args()
    os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])
    sys.path.insert(0, str(HERE))
    tables = {name: partial(measure, name, config, storage, args) for name, (config, storage) in SWEEPS.items()}
    tables[MEMORY] = memory
    if args.images: tables[HOUR] = partial(trials_an_hour, args)
    for name, table in tables.items():
        if not name.startswith(args.only): continue
        start = time.monotonic()
        rows = table()
        show(rows)
        print(f'{name}: {(time.monotonic() - start)/60:.1f} minutes', file=sys.stderr)
        if args.dry: continue
        save([r | machine('cpu') for r in rows], RESULTS, [*SWEEPS, MEMORY, HOUR])
        discard_progress(name)

def measure(name, config, storage, args):
    "Rows of the table `name`: milliseconds per trial, seconds of all trials"
    from imgexp.sweep import make_sweep, run_sweep
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        config = config | {'metric': {'name': 'val_loss'}, 'program': 'sweep:nothing', 'parameters': PARAMETERS}
        sweep, start = make_sweep(config, 'nothing', trials=args.trials, storage=storage), time.perf_counter()
        run_sweep('nothing', args.jobs, say=lambda text: None)
        seconds = time.perf_counter() - start
        ms = [1000*r['seconds'] for r in sweep.rows()]
        assert len(ms) == args.trials
    total = f'{args.trials} trials on {args.jobs} workers, s'
    values = {'a trial, ms': ms, 'a trial of the last tenth, ms': ms[-len(ms)//10:], total: [seconds]}
    return [*summarize(name, values, {'a trial, ms': 'median <= 100', total: 'median < 120'})]

def keras_trial(**values):
    "Trial of a small Keras CNN that appends the memory of its worker, in MB, to a file"
    import psutil
    from imgexp.keras_cnn import train
    from imgexp.start import runs_dir
    run = train(**values)
    with open(runs_dir()/'memory', 'a') as f: print(psutil.Process().memory_full_info().uss/1e6, file=f)
    return run

def memory(trials=50):
    "Memory of one worker over trials of all kinds of networks; the first ten trials are the warmup"
    from imgexp.keras_cnn import SPACE
    from imgexp.start import runs_dir
    from imgexp.sweep import make_sweep, run_sweep
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        parameters = SPACE | {k: {'value': v} for k, v in dict(size=16, subset=0.3, epochs=2, filters=32, track='off').items()}
        config = {'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'},
                  'program': 'sweep:keras_trial', 'parameters': parameters}
        make_sweep(config, 'memory', trials=trials)
        run_sweep('memory', 1)
        megabytes = [float(line) for line in (runs_dir()/'memory').read_text().split()]
    last = f'trials {trials - 9} to {trials}'
    return [*compare(MEMORY, {'trials 11 to 20': megabytes[10:20], last: megabytes[-10:]}, {last: 'ratio <= 1.05'})]

class PersistentScripts:
    "`usual_trial.py --serve` in `jobs` processes of one thread, started with the first trials"
    def __init__(self, images, jobs, policy):
        self.command = [sys.executable, str(HERE/'usual_trial.py'), images, '--serve', '--policy', policy]
        self.jobs, self.processes, self.err = jobs, [], tempfile.TemporaryFile('w+')
    def __call__(self, points):
        env = os.environ | dict.fromkeys(('OMP_NUM_THREADS', 'TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS'), '1')
        while len(self.processes) < self.jobs:
            self.processes.append(subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                   stderr=self.err, text=True, env=env))
        for process, point in zip(self.processes, points): print(json.dumps(point), file=process.stdin, flush=True)
        return [self._result(process) for process in self.processes]
    def _result(self, process):
        while line := process.stdout.readline():
            if line.startswith('{'): return json.loads(line)['valid_top1']
        self.err.seek(0)
        sys.exit(f'bench: a process of usual_trial.py ended:\n{self.err.read()[-2000:]}')
    def close(self):
        for process in self.processes:
            process.stdin.close()
            process.wait()

def trials_an_hour(args):
    "The same trials in a sweep, in persistent scripts that cache the images, and in a script per trial; one per worker"
    from imgexp.workers import Local
    from imgexp.keras_cnn import SPACE
    from imgexp.keras_network import dtype_policy
    from imgexp.sweep import make_sweep, run_sweep
    class PersistentLocal(Local):
        def __exit__(self, *_): pass  # keep the workers for the next sweep
    images = str(Path(args.images).resolve())
    parameters = SPACE | SMALL | {'data': {'value': images}, 'track': {'value': 'off'}}
    config = {'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': '10_keras_cnn', 'parameters': parameters}
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        def sweep_of(number): return make_sweep(config, f'hour-{number}', trials=args.jobs, seed=number)
        workers = PersistentLocal(args.jobs, sweep_of(0).threads)
        policies = ['mixed_bfloat16', 'float32'] if dtype_policy('auto') == 'mixed_bfloat16' else ['float32']
        scripts = {f'{args.jobs} scripts that stay, images cached, {policy}': PersistentScripts(images, args.jobs, policy)
                   for policy in policies}
        def points(number): return [sweep_of(number).point(k) for k in range(args.jobs)]
        def ours(number):
            run_sweep(sweep_of(number).name, args.jobs, executor=workers, say=lambda text: None)
            return [r['value'] for r in sweep_of(number).rows()]
        contenders = {'imgexp sweep': ours} | {
            k: lambda number, run=run: run(points(number)) for k, run in scripts.items()} | {
            'a script a trial': lambda number: [usual_trial(images, p) for p in points(number)]}
        def timed(run_trials):
            def run(number):
                start = time.perf_counter()
                top1 = run_trials(number)
                return {'an hour': 3600*args.jobs/(time.perf_counter() - start), 'top1': top1}
            return run
        settings = {'images': images, 'jobs': args.jobs}
        try:
            results = interleave(HOUR, {k: timed(run) for k, run in contenders.items()}, args.rounds, settings=settings,
                                 save_progress=not args.dry, pass_round=True)
        finally:
            workers.close()
            for script in scripts.values(): script.close()
    rates = {k: [v['an hour'] for v in values] for k, values in results.items()}
    overall = {f'{k}, all rounds': [len(v)/sum(1/r for r in v)] for k, v in rates.items()}
    top1 = {f'validation top-1, {k}': [t for v in values for t in v['top1']] for k, values in results.items()}
    return [*compare(HOUR, rates, {}, inverse=True), *compare(HOUR, overall, {}, inverse=True),
            *summarize(HOUR, top1, {})]

def usual_trial(images, values):
    command = [sys.executable, HERE/'usual_trial.py', images, json.dumps(values)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode: sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])['valid_top1']

if __name__ == '__main__': main()
