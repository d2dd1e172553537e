"""Phases beside one run of equal compute: the same plan with and without augmentation by class, with shrink and perturb, in one run, and in one run of growing images.

    python bench/phases.py path/to/images --classes cat,dog --seeds 3 --length 0.5
    python bench/phases.py path/to/photos --plan bench/phases_96.yaml

Each finished plan is a row of results/phases.csv, and a row for each class of results/phases_classes.csv; the same command goes on after the last one. See bench/README.md.
"""
import argparse, csv, time
from pathlib import Path

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'/'phases.csv'
CLASSES = RESULTS.with_name('phases_classes.csv')
VARIANTS = {'one run': dict(variant=':one-run'), 'growing images': dict(variant=':growing'), 'three phases': {},
            'three phases, by class': dict(class_augment='explain'), 'three phases, shrink and perturb': dict(shrink=0.4)}

def rows(): return [*csv.DictReader(RESULTS.open())] if RESULTS.exists() else []

def add(path, rows):
    with path.open('a', newline='') as f:
        writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
        if f.tell() == 0: writer.writeheader()
        writer.writerows(rows)

def class_rows(folder, row):
    "A row for each class: test images, those that the last run predicts correctly, and the policy that the class got"
    from imgexp.class_augment import class_policies
    from imgexp.evaluate import load_run
    trained = load_run(folder.run(len(folder.phases)).name)
    probs, labels, _ = trained.predict_split('test')
    hits, classes = probs.argmax(1) == labels, trained.classes
    policies = {}
    for k in range(1, len(folder.phases) + 1): policies |= class_policies(folder.run(k).params['class_augment'], classes)
    return [{n: row[n] for n in ('data', 'plan', 'training', 'seed', 'length')}
            | {'class': c, 'policy': policies.get(c, ''), 'n': int((labels == i).sum()), 'correct': int(hits[labels == i].sum())} for i, c in enumerate(classes)]

def plan_name(plan): return Path(plan).stem

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
    row = dict(data=Path(p.data).name, plan=plan_name(p.plan.partition(':')[0]), train=folder.info['n'], training=name, seed=p.seed, length=p.length,
                valid_top1=round(valid['value'], 4), valid_n=valid['n'], test_top1=round(test['value'], 4), test_n=test['n'],
                first_valid_top1=round(first.metrics['valid']['top1']['value'], 4), first_share_of_time=round(first.metrics['seconds']/sum(folder.run(k).metrics['seconds'] for k in range(1, len(folder.phases) + 1)), 3),
                phases_by_class=by_class, minutes=round(minutes, 1), **machine('cpu'))
    return row, class_rows(folder, row)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data')
    parser.add_argument('--classes', default='')
    parser.add_argument('--plan', default='small', help='as for imgexp phases (%(default)s)')
    parser.add_argument('--seeds', type=int, default=3, help='(%(default)s)')
    parser.add_argument('--length', type=float, default=1., help='factor on the epochs (%(default)s)')
    args = parser.parse_args()
    from imgexp.phase_plans import PhaseParams
    from imgexp.start import runs_dir
    for seed in range(args.seeds):
        for name, options in VARIANTS.items():
            plan, values = args.plan + options.get('variant', ''), {n: v for n, v in options.items() if n != 'variant'}
            key = dict(data=Path(args.data).name, plan=plan_name(args.plan), training=name, seed=str(seed), length=str(args.length))
            if any(all(r[k] == v for k, v in key.items()) for r in rows()): continue
            out = runs_dir()/'phases'/f'{name.replace(" ", "-").replace(",", "")}-{Path(args.data).name}-{seed}'
            row, classes = measured(PhaseParams(plan=plan, data=args.data, classes=args.classes, seed=seed, length=args.length, out=str(out), track='off', threads=1, **values), name)
            add(CLASSES, classes)
            add(RESULTS, [row])
            log(str(row))

if __name__ == '__main__': main()
