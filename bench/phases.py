"""Phases beside one run of equal compute: the same plan with and without augmentation by class, with shrink and perturb, in one run, and in one run of growing images.

    python bench/phases.py path/to/images --classes cat,dog --seeds 3 --length 0.5
    python bench/phases.py path/to/photos --plan bench/phases_96.yaml

Each finished plan is a row of results/phases.csv, and a row for each class of results/phases_classes.csv; the same command goes on after the last one. See bench/README.md.
"""
import argparse, csv, time
from itertools import product
from pathlib import Path

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'/'phases.csv'
CLASSES = RESULTS.with_name('phases_classes.csv')

def rows(): return [*csv.DictReader(RESULTS.open())] if RESULTS.exists() else []

def add(path, rows):
    with path.open('a', newline='') as f:
        writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
        if f.tell() == 0: writer.writeheader()
        writer.writerows(rows)

def plan_name(plan): return Path(plan.partition(':')[0]).stem

def class_rows(runs, row):
    "A row for each class: test images, those that the last run predicts correctly, and the policy that the class got"
    from imgexp.class_augment import class_policies
    from imgexp.evaluate import load_run
    trained = load_run(runs[-1].name)
    probs, labels, _ = trained.predict_split('test')
    hits, policies = probs.argmax(1) == labels, {}
    for run in runs: policies |= class_policies(run.params['class_augment'], trained.classes)
    return [{n: row[n] for n in ('data', 'plan', 'training', 'seed', 'length')}
            | {'class': c, 'policy': policies.get(c, ''), 'n': int((labels == i).sum()), 'correct': int(hits[labels == i].sum())} for i, c in enumerate(trained.classes)]

def result(p, name, runs, n, minutes):
    "Row of what a plan, or a training, ended with"
    last, first = runs[-1], runs[0]
    test, valid = last.metrics['test']['top1'], last.metrics['valid']['top1']
    return dict(data=Path(p.data).name, plan=plan_name(p.plan), train=n, training=name, seed=p.seed, length=p.length,
                valid_top1=round(valid['value'], 4), valid_n=valid['n'], test_top1=round(test['value'], 4), test_n=test['n'],
                first_valid_top1=round(first.metrics['valid']['top1']['value'], 4), first_share_of_time=round(first.metrics['seconds']/sum(run.metrics['seconds'] for run in runs), 3),
                phases_by_class=sum(bool(run.params['class_augment']) for run in runs), minutes=round(minutes, 1), **machine('cpu'))

def advice(run):
    from imgexp.explain import explain_run
    return explain_run(run=run.name).folder/'recommendations.json'

def measured(p, name):
    "Row of a plan, and rows of its classes"
    from imgexp.phase_runs import run_phases
    begun = time.perf_counter()
    folder = run_phases(p, log, advice)
    runs = [folder.run(k) for k in range(1, len(folder.phases) + 1)]
    row = result(p, name, runs, folder.info['n'], (time.perf_counter() - begun)/60)
    return row, class_rows(runs, row)

def advised(p, name):
    "The same for a plan of one run, trained again with the augmentation by class that its explanation recommends; None if there is none"
    from imgexp.errors import InputError
    from imgexp.phase_runs import run_phases
    from imgexp.train import train
    folder = run_phases(p, log)
    try: run = train(**folder.run(1).params | {'class_augment': str(advice(folder.run(1))), 'resume': 'reuse'})
    except InputError as e: return log(f'{name}: {e}')
    row = result(p, name, [run], folder.info['n'], run.metrics['seconds']/60)
    return row, class_rows([run], row)

VARIANTS = {'one run': dict(variant=':one-run'), 'growing images': dict(variant=':growing'), 'three phases': {},
            'three phases, by class': dict(values=dict(class_augment='explain')), 'three phases, shrink and perturb': dict(values=dict(shrink=0.4)),
            'growing images, by class': dict(variant=':growing', measure=advised)}

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
    data = Path(args.data).name
    for seed, (name, options) in product(range(args.seeds), VARIANTS.items()):
        key = dict(data=data, plan=plan_name(args.plan), training=name, seed=str(seed), length=str(args.length))
        if any(all(r[k] == v for k, v in key.items()) for r in rows()): continue
        measure, variant, values = options.get('measure', measured), options.get('variant', ''), options.get('values', {})
        plan = name.partition(',')[0] if measure is advised else name.replace(',', '')
        out = runs_dir()/'phases'/f'{plan.replace(" ", "-")}-{data}-{seed}'
        p = PhaseParams(plan=args.plan + variant, data=args.data, classes=args.classes, seed=seed, length=args.length, out=str(out), track='off', threads=1, **values)
        if not (done := measure(p, name)): continue
        row, classes = done
        add(CLASSES, classes)
        add(RESULTS, [row])
        log(str(row))

if __name__ == '__main__': main()
