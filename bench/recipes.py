"""Accuracy against time: our recipes for small images from scratch, trained for more and more epochs, over several seeds.

    python bench/recipes.py path/to/fashion-mnist --epochs 1,4,12,30 --seeds 3

Runs go to runs/ like all others, finished ones are not repeated, and a killed one continues. Writes `results/recipes.csv`,
a row a run, and keeps the rows of other runs; nbs/02j_recipes.ipynb draws it. Times are those of training and validation, from the
run's history; close everything else first.
"""
import argparse, csv
from pathlib import Path

from tables import machine

RESULTS = Path(__file__).resolve().parent/'results'/'recipes.csv'

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', help='a folder of the four idx files of Fashion-MNIST')
    parser.add_argument('--recipe', default='scratch-small', help='(%(default)s)')
    parser.add_argument('--size', type=int, default=28, help='side of the images in px (%(default)s)')
    parser.add_argument('--epochs', default='1,4,12,30', help='lengths, separated by commas (%(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each length (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the first (%(default)s)')
    args = parser.parse_args()
    from imgexp.seeds import over_seeds, train_seeds
    from imgexp.train import EXPERIMENT
    for epochs in map(int, args.epochs.split(',')):
        given = dict(data=args.data, recipe=args.recipe, size=args.size, epochs=epochs, seed=args.seed, track='off')
        runs = train_seeds(EXPERIMENT, EXPERIMENT.params.check(given), args.seeds)
        print(over_seeds(runs).to_string(na_rep=''))
        save(row(run, args, epochs) for run in runs)

def row(run, args, epochs):
    top1 = run.metrics['test']['top1']
    return dict(recipe=args.recipe, data=Path(args.data).name, size=args.size, epochs=epochs, seed=run.params['seed'], test_top1=top1['value'],
                n=top1['n'], minutes=round(run.metrics['seconds']/60, 2), img_per_s=run.metrics['img_per_s']) | machine('cpu')

def save(rows):
    def key(r): return r['recipe'], r['data'], *(int(r[k]) for k in ('size', 'epochs', 'seed'))
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = {key(r): r for r in [*old, *rows]}
    with RESULTS.open('w', newline='') as f:
        out = csv.DictWriter(f, list(next(iter(rows.values()))), lineterminator='\n')
        out.writeheader(); out.writerows(rows[k] for k in sorted(rows))

if __name__ == '__main__': main()
