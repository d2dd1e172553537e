"""What the sweep engine itself costs: trials with 8 parameters that do nothing but report 7 times.

    python bench/sweep.py --trials 1000 --jobs 2

Prints the table and writes its rows, with the machine, into bench/results/sweep.csv. See bench/README.md.
"""
import argparse, os, sys, tempfile, time
from pathlib import Path

from tables import alone, machine, save, show

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'sweep.csv'
PARAMETERS = {f'x{k}': {'distribution': 'log_uniform_values', 'min': 1e-4, 'max': 1.} for k in range(4)} | {
    f'c{k}': {'values': ['a', 'b', 'c']} for k in range(4)}
EARLY = {'early_terminate': {'type': 'hyperband', 'min_iter': 8, 'eta': 3}}
SWEEPS = {'random': ({'method': 'random'}, 'journal'), 'random, hyperband': ({'method': 'random'} | EARLY, 'journal'),
          'random, SQLite': ({'method': 'random'}, 'sqlite'), 'bayes': ({'method': 'bayes'}, 'journal')}

class Report:
    "What a `Run` tells a sweep"
    name, enough = 'nothing', ''
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
    parser.add_argument('--only', default='', help='sweeps whose names begin so')
    args = parser.parse_args()
    os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])
    sys.path.insert(0, str(HERE))
    rows = []
    for name, (given, storage) in SWEEPS.items():
        if name.startswith(args.only): rows += measure(name, given, storage, args)
    show(rows)
    save([r | machine('cpu') for r in rows], RESULTS, SWEEPS)

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

if __name__ == '__main__': main()
