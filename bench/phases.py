"""Phases beside one run of equal compute: the same plan with and without augmentation by class, with shrink and perturb, in one run, and in one run of growing images.

    python bench/phases.py path/to/images --classes cat,dog --seeds 3 --length 0.5

Each finished plan is a row of results/phases.csv; the same command goes on after the last one. See bench/README.md.
"""
import argparse, csv, time
from pathlib import Path

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'/'phases.csv'
VARIANTS = {'one run': dict(plan='small:one-run'), 'growing images': dict(plan='small:growing'), 'three phases': dict(plan='small'),
            'three phases, by class': dict(plan='small', class_augment='explain'), 'three phases, shrink and perturb': dict(plan='small', shrink=0.4)}

def rows(): return [*csv.DictReader(RESULTS.open())] if RESULTS.exists() else []

def add(row):
    with RESULTS.open('a', newline='') as f:
        writer = csv.DictWriter(f, [*row], lineterminator='\n')
        if f.tell() == 0: writer.writeheader()
        writer.writerow(row)

def measured(p, name):
    "Row of one plan"
    from imgexp.explain import explain_run
    from imgexp.phase_runs import run_phases
    begun = time.perf_counter()
    folder = run_phases(p, log, lambda run: explain_run(run=run.name).folder/'recommendations.json')
    minutes = (time.perf_counter() - begun)/60
    last, first = folder.run(len(folder.phases)), folder.run(1)
    test, valid = last.metrics['test']['top1'], last.metrics['valid']['top1']
    by_class = sum(bool(folder.run(k).params['class_augment']) for k in range(1, len(folder.phases) + 1))
    return dict(data=Path(p.data).name, classes=len(p.classes.split(',')) if p.classes else '', train=folder.info['n'], training=name, seed=p.seed, length=p.length,
                valid_top1=round(valid['value'], 4), valid_n=valid['n'], test_top1=round(test['value'], 4), test_n=test['n'],
                first_valid_top1=round(first.metrics['valid']['top1']['value'], 4), first_share_of_time=round(first.metrics['seconds']/sum(folder.run(k).metrics['seconds'] for k in range(1, len(folder.phases) + 1)), 3),
                phases_by_class=by_class, minutes=round(minutes, 1), **machine('cpu'))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data')
    parser.add_argument('--classes', default='')
    parser.add_argument('--seeds', type=int, default=3, help='(%(default)s)')
    parser.add_argument('--length', type=float, default=1., help='factor on the epochs (%(default)s)')
    args = parser.parse_args()
    from imgexp.phase_plans import PhaseParams
    from imgexp.start import runs_dir
    for seed in range(args.seeds):
        for name, values in VARIANTS.items():
            key = dict(data=Path(args.data).name, training=name, seed=str(seed), length=str(args.length))
            if any(all(r[k] == v for k, v in key.items()) for r in rows()): continue
            out = runs_dir()/'phases'/f'{name.replace(" ", "-").replace(",", "")}-{Path(args.data).name}-{seed}'
            row = measured(PhaseParams(data=args.data, classes=args.classes, seed=seed, length=args.length, out=str(out), track='off', threads=1, **values), name)
            add(row)
            log(str(row))

if __name__ == '__main__': main()
