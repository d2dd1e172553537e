"""Accuracy against training time: recipes for small images from scratch, for several numbers of epochs and seeds.

    python bench/recipes.py path/to/fashion-mnist --epochs 1,4,12,30 --seeds 3

Runs are saved in runs/ as usual: finished ones are not repeated, and a killed one continues. Writes a row per run to
`results/recipes.csv` and keeps the rows of other runs; nbs/02j_recipes.ipynb plots them. Times include training and
validation, from the run's history; close all other programs first.
"""
import argparse, csv
from pathlib import Path

from tables import machine

RESULTS = Path(__file__).resolve().parent/'results'/'recipes.csv'

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', help='folder with the four idx files of Fashion-MNIST')
    parser.add_argument('--recipe', default='scratch-small', help='recipe (%(default)s)')
    parser.add_argument('--size', type=int, default=28, help='side of the images in px (%(default)s)')
    parser.add_argument('--epochs', default='1,4,12,30', help='comma-separated numbers of epochs (%(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='first seed (%(default)s)')
    args = parser.parse_args()
    from imgexp.seeds import summarize_seeds, train_seeds
    from imgexp.train import EXPERIMENT
    for epochs in map(int, args.epochs.split(',')):
        params = dict(data=args.data, recipe=args.recipe, size=args.size, epochs=epochs, seed=args.seed, track='off')
        runs = train_seeds(EXPERIMENT, EXPERIMENT.params.check(params), args.seeds)
        print(summarize_seeds(runs).to_string(na_rep=''))
        save(row(run, args, epochs) for run in runs)

def row(run, args, epochs):
    top1 = run.metrics['test']['top1']
    return dict(recipe=args.recipe, data=Path(args.data).name, size=args.size, epochs=epochs, seed=run.params['seed'],
                test_top1=top1['value'], n=top1['n'], minutes=round(run.metrics['seconds']/60, 2),
                img_per_s=run.metrics['img_per_s']) | machine('cpu')

def save(rows):
    def key(r): return r['recipe'], r['data'], *(int(r[k]) for k in ('size', 'epochs', 'seed'))
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = {key(r): r for r in [*old, *rows]}
    with RESULTS.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(next(iter(rows.values()))), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[k] for k in sorted(rows))

if __name__ == '__main__': main()
