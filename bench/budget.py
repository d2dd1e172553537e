"""Training needed by a search: record the full learning curves of a random sweep, then replay searches on them.

    python bench/budget.py record path/to/fashion-mnist   # 80 trials of 7 epochs on a fifth of the images; resumable
    python bench/budget.py replay                         # 200 searches of each kind on the recorded curves

On two cores, `record` takes half an hour and `replay` two minutes. `record` writes a row per trial to
`results/curves.csv`; `replay` writes `results/budget.csv`. See bench/README.md.
"""
import argparse, csv, json, random, statistics
from pathlib import Path

import numpy as np

from tables import summarize, machine, save, show

RESULTS = Path(__file__).resolve().parent/'results'
CURVES, BUDGET = RESULTS/'curves.csv', RESULTS/'budget.csv'
EPOCHS, TRIALS, TOLERANCE = 7, 27, 0.003

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['record', 'replay'])
    parser.add_argument('data', nargs='?', help='for record: folder with the four idx files of Fashion-MNIST')
    parser.add_argument('--trials', type=int, default=80, help='number of trials to record (%(default)s)')
    parser.add_argument('--jobs', type=int, default=0, help='trials to run at once; 0: one per core')
    parser.add_argument('--searches', type=int, default=200, help='number of searches to replay (%(default)s)')
    args = parser.parse_args()
    record(args) if args.what == 'record' else replay(args.searches)

def record(args):
    from imgexp.keras_cnn import SPACE
    from imgexp.runs import Run
    from imgexp.start import runs_dir
    from imgexp.sweep import make_sweep, run_sweep
    fixed = dict(data=args.data, subset=0.2, size=28, track='off', epochs=EPOCHS)
    config = {'method': 'random', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'program': '10_keras_cnn',
              'parameters': SPACE | {k: {'value': v} for k, v in fixed.items()}}
    sweep = run_sweep(make_sweep(config, 'curves', trials=args.trials).name, args.jobs)
    rows = []
    for r in sweep.rows():
        if r['state'] != 'done': continue
        history = Run(runs_dir()/r['run']).history
        values = json.dumps({k: r['values'][k] for k in sweep.varying})
        rows.append({'trial': r['trial'], 'values': values, 'seconds': round(r['seconds'], 1),
                     'curve': ' '.join(f'{v:.5f}' for v in history.valid_top1)} | machine('cpu'))
    with CURVES.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def replay(n):
    rows = csv.DictReader(CURVES.open())
    curves = [(json.loads(r['values']), [*map(float, r['curve'].split())]) for r in rows]
    hyperband = {'type': 'hyperband', 'min_iter': 1, 'eta': 3}
    searches = {'random, all epochs': lambda rng: random_search(curves, rng, {}),
                'random, hyperband': lambda rng: random_search(curves, rng, hyperband),
                'TPE, all epochs': lambda rng: tpe(curves, rng, {}),
                'TPE, hyperband': lambda rng: tpe(curves, rng, hyperband),
                "Optuna's TPE and HyperbandPruner": lambda rng: optuna_search(curves, rng, 'HyperbandPruner'),
                "Optuna's TPE and MedianPruner": lambda rng: optuna_search(curves, rng, 'MedianPruner'),
                'random, successive halving as in Ray Tune': lambda rng: ray_halving(curves, rng)}
    epochs = {name: [] for name in searches}
    for seed in range(n):
        rng = random.Random(seed)
        target = max(max(c) for _, c in rng.sample(curves, TRIALS)) - TOLERANCE
        for name, search in searches.items():
            epochs[name].append(epochs_to_target(search(random.Random(f'{seed} {name}')), target, len(curves)*EPOCHS))
        if seed % 20 == 19:
            print(seed + 1, {k: round(statistics.median(v), 3) for k, v in epochs.items()}, flush=True)
    title = f'training until within {100*TOLERANCE:.1f} points of the best of {TRIALS} trials'
    budget = TRIALS*EPOCHS
    shares = {f'{k}, share of the {budget} epochs': [v/budget for v in vs] for k, vs in epochs.items()}
    targets = {f'{k}, share of the {budget} epochs': 'median <= 0.4' for k in ('random, hyperband', 'TPE, hyperband')}
    baseline = statistics.mean(epochs['random, all epochs'])
    ratios = {f'{k}, mean over random, all epochs': [statistics.mean(v)/baseline] for k, v in epochs.items()}
    rows = [*summarize(title, shares, targets), *summarize(title, {f'{k}, epochs': v for k, v in epochs.items()}, {}),
            *summarize(title, ratios, {})]
    show(rows)
    save([r | machine('cpu') for r in rows], BUDGET, [title])

def epochs_to_target(search, target, max_epochs):
    "Epochs trained until a trial of the search reaches the target; `max_epochs` if none does"
    for n_epochs, value in search:
        if value >= target: return n_epochs
    return max_epochs

def train(curve, others, early):
    "Yield a trial's values until its end or until early termination; its curve is appended to `others`"
    from imgexp.sweep_config import read_stopper
    stopper = read_stopper(early) if early else None
    others.append(values := [])
    for value in curve:
        values.append(value)
        yield value
        if stopper and stopper.should_stop(values, others, False): return

def random_search(curves, rng, early):
    "Yield (epochs trained so far, validation accuracy) after each epoch of a random search"
    n_epochs, others = 0, []
    for _, curve in rng.sample(curves, len(curves)):
        for value in train(curve, others, early): yield (n_epochs := n_epochs + 1), value

def search_space(curves):
    "Optuna's distributions of the recorded parameters"
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    choices = {k: sorted({json.dumps(v[k]) for v, _ in curves}) for k in curves[0][0] if k != 'lr'}
    low, high = (f(v['lr'] for v, _ in curves) for f in (min, max))
    return {k: CategoricalDistribution(v) for k, v in choices.items()} | {'lr': FloatDistribution(low, high, log=True)}

def optuna_values(values): return {k: v if k == 'lr' else json.dumps(v) for k, v in values.items()}

def take_nearest(unused, proposal, space):
    "Remove and return the unused (values, curve) nearest to a proposal"
    low, high = space['lr'].low, space['lr'].high
    return unused.pop(min(range(len(unused)), key=lambda k: distance(unused[k][0], proposal, low, high)))

def optuna_search(curves, rng, pruner):
    "The same with Optuna's own loop: TPE at its defaults, and one of its pruners"
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = dict(min_resource=1, max_resource=EPOCHS, reduction_factor=3) if pruner == 'HyperbandPruner' else {}
    study = optuna.create_study(direction='maximize', pruner=getattr(optuna.pruners, pruner)(**settings),
                                sampler=optuna.samplers.TPESampler(seed=rng.randrange(2**32)))
    n_epochs, unused, space = 0, list(curves), search_space(curves)
    rng.shuffle(unused)
    while unused:
        proposal = study.ask(space)
        values, curve = take_nearest(unused, proposal.params, space)
        study.tell(proposal, state=optuna.trial.TrialState.FAIL)  # ignored by the sampler: the nearest is run instead
        study.enqueue_trial(optuna_values(values))
        trial = study.ask(space)
        for epoch, value in enumerate(curve, 1):
            trial.report(value, epoch)
            yield (n_epochs := n_epochs + 1), value
            if epoch < len(curve) and trial.should_prune(): break
        state = optuna.trial.TrialState
        if epoch < len(curve): study.tell(trial, state=state.PRUNED)
        else: study.tell(trial, max(curve))

def ray_halving(curves, rng, grace=1, factor=4):
    "Random search with the rule of Ray Tune's ASHAScheduler at its defaults, one trial after another"
    rungs = {grace*factor**k: [] for k in range(20) if grace*factor**k < EPOCHS}
    n_epochs = 0
    for _, curve in rng.sample(curves, len(curves)):
        for epoch, value in enumerate(curve, 1):
            yield (n_epochs := n_epochs + 1), value
            recorded = rungs.get(epoch)
            if recorded is None: continue
            cutoff = np.percentile(recorded, 100*(1 - 1/factor)) if recorded else None
            recorded.append(value)
            if cutoff is not None and value < cutoff: break

def tpe(curves, rng, early):
    "The same with TPE: of the unused trials, take the one nearest to Optuna's proposal, configured as in `imgexp.sweep`"
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(multivariate=True, seed=rng.randrange(2**32))
    study = optuna.create_study(direction='maximize', sampler=sampler)
    n_epochs, others, unused, space = 0, [], list(curves), search_space(curves)
    rng.shuffle(unused)
    while unused:
        values, curve = take_nearest(unused, study.ask(space).params, space)
        measured = []
        for value in train(curve, others, early):
            measured.append(value)
            yield (n_epochs := n_epochs + 1), value
        study.add_trial(optuna.trial.create_trial(params=optuna_values(values), distributions=space, value=max(measured)))

def distance(values, proposal, low, high):
    "Number of different choices, plus the difference of the learning rates on a log scale, 0 to 1"
    from math import log
    n_different = sum(json.dumps(v) != proposal[k] for k, v in values.items() if k != 'lr')
    return n_different + abs(log(values['lr']/proposal['lr']))/log(high/low)

if __name__ == '__main__': main()
