"""How much training a search needs: full learning curves of a random sweep are recorded once, and searches are then replayed on them.

    python bench/budget.py record path/to/fashion-mnist      # 80 trials of 7 epochs on a fifth of the images, half an hour on two cores; it can be interrupted
    python bench/budget.py replay                            # 200 searches of each kind on the recorded curves, two minutes

`record` writes `results/curves.csv`, a row a trial; `replay` writes `results/budget.csv`. See bench/README.md.
"""
import argparse, csv, json, random, statistics
from pathlib import Path

from tables import alone, machine, save, show

RESULTS = Path(__file__).resolve().parent/'results'
CURVES, BUDGET = RESULTS/'curves.csv', RESULTS/'budget.csv'
EPOCHS, TRIALS, POINTS = 7, 27, 0.003

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['record', 'replay'])
    parser.add_argument('data', nargs='?', help='`record`: a folder of the four idx files of Fashion-MNIST')
    parser.add_argument('--trials', type=int, default=80, help='to record (%(default)s)')
    parser.add_argument('--jobs', type=int, default=0, help='at once; 0: as many as there are cores')
    parser.add_argument('--searches', type=int, default=200, help='to replay (%(default)s)')
    args = parser.parse_args()
    record(args) if args.what == 'record' else replay(args.searches)

def record(args):
    from imgexp.keras_cnn import SPACE
    from imgexp.runs import Run
    from imgexp.start import runs_dir
    from imgexp.sweep import make_sweep, run_sweep
    parameters = SPACE | {'data': {'value': args.data}, 'subset': {'value': 0.2}, 'size': {'value': 28}, 'track': {'value': 'off'}, 'epochs': {'value': EPOCHS}}
    config = {'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': '10_keras_cnn', 'parameters': parameters}
    sweep = run_sweep(make_sweep(config, 'curves', trials=args.trials).name, args.jobs)
    rows = []
    for r in sweep.rows():
        if r['state'] != 'done': continue
        history = Run(runs_dir()/r['run']).history
        rows.append({'trial': r['trial'], 'values': json.dumps({k: r['values'][k] for k in sweep.varying}), 'seconds': round(r['seconds'], 1),
                     'curve': ' '.join(f'{v:.5f}' for v in history.valid_top1)} | machine('cpu'))
    with CURVES.open('w', newline='') as f:
        out = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        out.writeheader(); out.writerows(rows)

def replay(n):
    curves = [(json.loads(r['values']), [*map(float, r['curve'].split())]) for r in csv.DictReader(CURVES.open())]
    early = {'type': 'hyperband', 'min_iter': 1, 'eta': 3}
    searches = {'random, all epochs': lambda rng: random_search(curves, rng, {}), 'random, hyperband': lambda rng: random_search(curves, rng, early),
                'TPE, all epochs': lambda rng: tpe(curves, rng, {}), 'TPE, hyperband': lambda rng: tpe(curves, rng, early)}
    needed = {name: [] for name in searches}
    for seed in range(n):
        rng = random.Random(seed)
        target = max(max(c) for _, c in rng.sample(curves, TRIALS)) - POINTS
        for name, search in searches.items(): needed[name].append(until(search(random.Random(f'{seed} {name}')), target, len(curves)*EPOCHS))
        if seed % 20 == 19: print(seed + 1, {k: round(statistics.median(v), 3) for k, v in needed.items()}, flush=True)
    title = f'training until within {100*POINTS:.1f} points of the best of {TRIALS} trials'
    shares = {k: [v/(TRIALS*EPOCHS) for v in vs] for k, vs in needed.items()}
    rows = [*alone(title, {f'{k}, share of the {TRIALS*EPOCHS} epochs': v for k, v in shares.items()},
                   {f'{k}, share of the {TRIALS*EPOCHS} epochs': 'median <= 0.4' for k in ('random, hyperband', 'TPE, hyperband')}),
            *alone(title, {f'{k}, epochs': v for k, v in needed.items()}, {}),
            *alone(title, {f'{k}, mean over random, all epochs': [statistics.mean(v)/statistics.mean(needed['random, all epochs'])] for k, v in needed.items()}, {})]
    show(rows)
    save([r | machine('cpu') for r in rows], BUDGET, [title])

def until(search, target, most):
    "Epochs that a search trains until one of its trials reaches the target; all where none does"
    for spent, value in search:
        if value >= target: return spent
    return most

def train(curve, others, early):
    "A trial's epochs one after the other, to its end or to where the sweep's engine would end it; the curves so far are kept in `others`"
    from imgexp.sweep_config import Metric, read_stopper
    stopper = read_stopper(early, Metric('valid_top1', 'valid_top1', False)) if early else None
    others.append(own := [])
    for value in curve:
        own.append(value)
        yield value
        if stopper and stopper.ends(own, others, False): return

def random_search(curves, rng, early):
    "Yields (epochs trained, what was measured) after each epoch"
    spent, others = 0, []
    for _, curve in rng.sample(curves, len(curves)):
        for value in train(curve, others, early): yield (spent := spent + 1), value

def tpe(curves, rng, early):
    "The same; of the recorded trials that are left, the one is taken that is nearest to what Optuna proposes, as `imgexp.sweep` has it propose"
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = {k: sorted({json.dumps(v[k]) for v, _ in curves}) for k in curves[0][0] if k != 'lr'}
    study = optuna.create_study(direction='maximize', sampler=optuna.samplers.TPESampler(multivariate=True, seed=rng.randrange(2**32)))
    low, high = (f(v['lr'] for v, _ in curves) for f in (min, max))
    spent, others, left = 0, [], list(curves)
    rng.shuffle(left)
    space = {k: optuna.distributions.CategoricalDistribution(v) for k, v in names.items()} | {'lr': optuna.distributions.FloatDistribution(low, high, log=True)}
    while left:
        wish = study.ask(space).params
        study_values, curve = left.pop(min(range(len(left)), key=lambda k: distance(left[k][0], wish, low, high)))
        seen = []
        for value in train(curve, others, early):
            seen.append(value)
            yield (spent := spent + 1), value
        study.add_trial(optuna.trial.create_trial(params={k: v if k == 'lr' else json.dumps(v) for k, v in study_values.items()}, distributions=space, value=max(seen)))

def distance(values, wish, low, high):
    from math import log
    return sum(json.dumps(v) != wish[k] for k, v in values.items() if k != 'lr') + abs(log(values['lr']/wish['lr']))/log(high/low)

if __name__ == '__main__': main()
