"""What the sweep engine itself costs: trials with 8 parameters that do nothing but report 7 times. Given class folders (train, validation,
test), also how many trials of a Keras CNN an hour holds, in a sweep and as they are usually run.

    python bench/sweep.py --trials 1000 --jobs 2
    python bench/sweep.py --only "trials an hour" --images path/to/clothing

Prints the table and writes its rows, with the machine, into bench/results/sweep.csv. See bench/README.md.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

from tables import alone, compare, machine, save, show

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
    name, enough, params = 'nothing', '', {}
    def __init__(self): self.rows = []
    def _rows(self): return ['valid_loss'], self.rows

def nothing(**values):
    "A trial's program"
    from imgexp.sweep import watch
    run = Report()
    for epoch in range(7):
        row = {'valid_loss': values['x0'] + 1/(epoch + 1)}
        run.rows.append([str(v) for v in row.values()])
        watch(run, row)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--trials', type=int, default=1000, help='(%(default)s)')
    parser.add_argument('--jobs', type=int, default=2, help='workers (%(default)s)')
    parser.add_argument('--only', default='', help='tables whose names begin so')
    parser.add_argument('--images', help='a folder with train, validation and test, of class folders')
    parser.add_argument('--rounds', type=int, default=5, help='of `trials an hour`, each with a trial a worker (%(default)s)')
    args = parser.parse_args()
    os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])
    sys.path.insert(0, str(HERE))
    rows = []
    for name, (given, storage) in SWEEPS.items():
        if name.startswith(args.only): rows += measure(name, given, storage, args)
    if MEMORY.startswith(args.only): rows += memory()
    if args.images and HOUR.startswith(args.only): rows += trials_an_hour(args)
    show(rows)
    save([r | machine('cpu') for r in rows], RESULTS, [*SWEEPS, MEMORY, HOUR])

def measure(name, given, storage, args):
    from imgexp.sweep import init, run
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        config = given | {'metric': {'name': 'val_loss'}, 'program': 'sweep:nothing', 'parameters': PARAMETERS}
        sweep, began = init(config, 'nothing', trials=args.trials, storage=storage), time.perf_counter()
        run('nothing', args.jobs, tell=lambda text: None)
        wall = time.perf_counter() - began
        own = [1000*r['seconds'] for r in sweep.rows()]
        assert len(own) == args.trials
    return [*alone(name, {'a trial, ms': own, f'a trial of the last tenth, ms': own[-len(own)//10:], f'{args.trials} trials on {args.jobs} workers, s': [wall]},
                   {'a trial, ms': 'median <= 100', f'{args.trials} trials on {args.jobs} workers, s': 'median < 120'})]

def keras_trial(**values):
    "A trial of a small Keras CNN; what memory the worker holds after it goes into a file"
    import psutil
    from imgexp.keras_cnn import train
    from imgexp.runs import runs_dir
    run = train(**values)
    with open(runs_dir()/'memory', 'a') as f: print(psutil.Process().memory_full_info().uss/1e6, file=f)
    return run

def memory(trials=50):
    "One worker, networks of all kinds; the first ten trials bring in what stays"
    from imgexp.keras_cnn import SPACE
    from imgexp.runs import runs_dir
    from imgexp.sweep import init, run
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        parameters = SPACE | {k: {'value': v} for k, v in dict(size=16, subset=0.3, epochs=2, filters=32, track='off').items()}
        init({'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': 'sweep:keras_trial', 'parameters': parameters}, 'memory', trials=trials)
        run('memory', 1)
        held = [float(line) for line in (runs_dir()/'memory').read_text().split()]
    return [*compare(MEMORY, {'trials 11 to 20': held[10:20], f'trials {trials - 9} to {trials}': held[-10:]}, {f'trials {trials - 9} to {trials}': 'ratio <= 1.05'})]

def trials_an_hour(args):
    "The same trials in turn, as many as there are workers: in one sweep whose workers stay, and each in a process that has all cores"
    from imgexp.batch import Local
    from imgexp.keras_cnn import SPACE
    from imgexp.sweep import extend, init, run
    class Staying(Local):
        def __exit__(self, *_): pass
    images, ours, usual = str(Path(args.images).resolve()), [], []
    accuracy = {'imgexp sweep': [], 'a script a trial': []}
    with tempfile.TemporaryDirectory() as root:
        os.environ['IMGEXP_ROOT'] = root
        parameters = SPACE | SMALL | {'data': {'value': images}, 'track': {'value': 'off'}}
        sweep = init({'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': '10_keras_cnn', 'parameters': parameters}, 'hour', trials=args.jobs)
        workers = Staying(args.jobs, sweep.threads)
        for number in range(args.rounds):
            if number: extend(sweep, args.jobs)
            began = time.perf_counter()
            for k in range(number*args.jobs, (number + 1)*args.jobs): accuracy['a script a trial'].append(usual_trial(images, sweep.point(k)))
            usual.append(3600*args.jobs/(time.perf_counter() - began))
            began = time.perf_counter()
            run('hour', args.jobs, executor=workers, tell=lambda text: None)
            ours.append(3600*args.jobs/(time.perf_counter() - began))
            print(f'{usual[-1]:.1f} and {ours[-1]:.1f} trials an hour', flush=True)
        workers.close()
        accuracy['imgexp sweep'] = [r['value'] for r in sweep.rows()]
    def whole(rates): return [len(rates)/sum(1/r for r in rates)]
    return [*compare(HOUR, {'a script a trial': usual, 'imgexp sweep': ours}, {'imgexp sweep': 'ratio >= 2.5'}),
            *compare(HOUR, {'a script a trial, all rounds': whole(usual), 'imgexp sweep, all rounds': whole(ours)}, {'imgexp sweep, all rounds': 'ratio >= 2.5'}),
            *alone(HOUR, {f'validation top-1, {k}': v for k, v in accuracy.items()}, {})]

def usual_trial(images, values):
    done = subprocess.run([sys.executable, HERE/'usual_trial.py', images, json.dumps(values)], capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])['valid_top1']

if __name__ == '__main__': main()
