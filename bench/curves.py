"""Laws of learning curves: does the band cover the truth, and which form extrapolates real curves best?

    python bench/curves.py coverage                    # 500 synthetic curves of each form
    python bench/curves.py record path/to/data         # folder with fashion-mnist, tiny40 and clothing; resumable
    python bench/curves.py extrapolate                 # large sizes of the recorded curves, predicted from the small ones

On two cores, `coverage` takes half an hour and `record` three hours; each recorded point is a row of
`results/subset-curves.csv`, and trains for the same number of steps, whatever its size. See bench/README.md.
"""
import argparse, csv, statistics
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'
POINTS, COVERAGE, EXTRAPOLATION = (RESULTS/f'{name}.csv' for name in ('subset-curves', 'curve-coverage', 'curve-extrapolation'))
SEEDS = 2

# ---- Coverage

CHANCE, N_TEST, RUNS = 0.9, 10_000, 3
CASES = [('power', 6), ('power-floor', 6), ('m4', 6), ('m4', 8), ('logarithmic', 6), ('arctan', 6), ('algebraic', 6)]  # form, sizes

def sizes_of(k): return 60_000/2.**np.arange(k - 1, -1, -1)
CURVES = {  # parameters of each form, for sizes relative to the geometric mean of six
    'power': dict(beta=0.15, c=0.4), 'power-floor': dict(beta=0.12, c=0.5, floor=0.05),
    'm4': dict(beta=0.3, c=0.5, floor=0.04, alpha=1., chance=CHANCE), 'logarithmic': dict(level=0.2, slope=0.05, shift=0.05),
    'arctan': dict(floor=0.03, slope=2., shift=0.5), 'algebraic': dict(floor=0.08, slope=6., power=0.8)}

def true_error(form, n):
    from imgexp.laws import FORMS
    return FORMS[form].curve(np.asarray(n, float)/np.exp(np.log(sizes_of(6)).mean()), **CURVES[form])

def observe(error, n, common, runs, rng):
    """Errors of runs, [runs, sizes]: the spread of seeds is 1.5% of the error, and more for few images; half of the
    binomial variance of the test images is common to all runs"""
    binomial = error*(1 - error)/N_TEST
    seed = (0.015*error)**2 + 0.0009*error*(1 - error)*120/n
    return error + common*np.sqrt(binomial/2) + rng.normal(size=(runs, len(error)))*np.sqrt(seed + binomial/2)

def draw(form, k, seed):
    "Fit one synthetic curve: chosen form, whether band and prediction band hold the truth at four times the largest size, widths"
    from imgexp.extrapolation import fit_law, measure
    rng, n = np.random.default_rng([seed, [*CURVES].index(form)]), sizes_of(k)
    ahead = n[-1:]*4
    common = rng.normal()
    errors, truth = observe(true_error(form, n), n, common, RUNS, rng), true_error(form, ahead)
    new = observe(truth, ahead, rng.normal(), 1, rng)[0, 0]
    law = fit_law(measure(np.tile(n, RUNS), errors.ravel(), 10, N_TEST))
    (low,), (high,) = law.band(ahead)
    (new_low,), (new_high,) = law.band(ahead, observed=True)
    return law.form, low <= truth[0] <= high, new_low <= new <= new_high, (high - low)/truth[0]

def coverage(args):
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for form, k in CASES:
            draws = list(pool.map(draw, [form]*args.draws, [k]*args.draws, range(args.draws), chunksize=10))
            chosen = Counter(d[0] for d in draws)
            wrong, n_wrong = max(((f, n) for f, n in chosen.items() if f != form), key=lambda v: v[1], default=('', 0))
            rows.append(dict(form=form, sizes=k, draws=len(draws), band=np.mean([d[1] for d in draws]), new_observation=np.mean([d[2] for d in draws]),
                             width=round(statistics.median(d[3] for d in draws), 3), chosen=chosen[form]/len(draws),
                             most_frequent_other=wrong, other=n_wrong/len(draws)) | machine('cpu'))
            log(rows[-1])
    write(COVERAGE, rows)

def write(path, rows):
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

# ---- Real curves

# {data: (largest size from which to extrapolate, number of such sizes, larger sizes, parameters)}
DATA = {
    'fashion-mnist': (1/16, 6, (0.5, 1.), dict(size=28, steps=6000)),
    'clothing': (1/8, 4, (0.5, 1.), dict(size=64, steps=2000)),
    'tiny40': (1/8, 5, (0.5, 1.), dict(size=64, steps=4000))}
N_CLASSES = {'fashion-mnist': 10, 'tiny40': 40, 'clothing': 10}
ARCHS = ('compact_resnet', 'shufflenet_v2_x0_5')
COMMON = dict(epochs=5, batch_size=64, threads=1, track='off', workers=0, resume='reuse')

def curves(): return {f'{data} {arch}': (data, arch) for arch in ARCHS for data in DATA}

def sizes(data):
    largest, n, larger, _ = DATA[data]
    return [*(largest/2**k for k in reversed(range(n))), *larger]

def record(args):
    from imgexp.workers import Local, run_jobs, Job
    rows = list(csv.DictReader(POINTS.open())) if POINTS.exists() else []
    recorded = {(r['curve'], float(r['subset']), int(r['seed'])) for r in rows}
    keys = [(curve, size, seed) for curve, (data, _) in curves().items() for seed in range(SEEDS)
            for size in sizes(data) if curve in (args.only or curve).split(';')]
    keys = [k for k in keys if k not in recorded]
    jobs = [Job('curves:train_point', {'data': args.data, 'curve': c, 'subset': size, 'seed': seed}, f'{c} {size:g} seed {seed}')
            for c, size, seed in keys]
    def on_result(result, k):
        log(f'{result.job.name}: {result.state} in {result.seconds:.0f} s {result.error}')
        if result.state == 'done': append(result.value)
    run_jobs(jobs, args.jobs, Local(args.jobs, threads=1), on_result)

def append(row):
    "Add a row to the file"
    is_new = not POINTS.exists()
    with POINTS.open('a', newline='') as f:
        writer = csv.DictWriter(f, list(row), lineterminator='\n')
        if is_new: writer.writeheader()
        writer.writerow(row)

def train_point(data, curve, subset, seed):
    "Train a point; its row"
    from imgexp.train import train
    name, arch = curves()[curve]
    run = train(data=str(Path(data)/name), arch=arch, subset=subset, seed=seed, **COMMON | DATA[name][3])
    test, valid = run.metrics['test'], run.metrics['valid']
    n = int(sum_train(run))
    return dict(curve=curve, subset=subset, n=n, seed=seed, run=run.name, steps=run.params['steps'],
                valid_top1=valid['top1']['value'], test_top1=test['top1']['value'], test_top5=test['top5']['value'],
                n_test=test['top1']['n'], seconds=round(run.metrics['seconds'], 1)) | machine('cpu')

def sum_train(run):
    "Number of training images of a run"
    from imgexp.data import keep_subset
    from imgexp.trained import run_data
    return len(keep_subset(run_data(run), run.params['subset'], run.params['seed']).split('train'))

def extrapolate(args):
    "Predict the large sizes of each recorded curve from the small ones: each form, the chosen law, the plain power law"
    from imgexp.extrapolation import fit_law, measure
    from imgexp.laws import FORMS
    points, rows = list(csv.DictReader(POINTS.open())), []
    for curve, (data, _) in curves().items():
        of_curve = [r for r in points if r['curve'] == curve]
        small, n_test = DATA[data][0], int(of_curve[0]['n_test']) if of_curve else 0
        if {float(r['subset']) for r in of_curve} != {*sizes(data)}: continue  # not all sizes are recorded yet
        fitted = [r for r in of_curve if float(r['subset']) <= small]
        measured = measure([int(r['n']) for r in fitted], [1 - float(r['test_top1']) for r in fitted], N_CLASSES[data], n_test)
        laws = {'chosen': fit_law(measured)} | {f: fit_law(measured, f) for f in FORMS if FORMS[f].n_params < len(measured.n)}
        for size in DATA[data][2]:
            at = [r for r in of_curve if float(r['subset']) == size]
            n, truth = int(at[0]['n']), np.mean([1 - float(r['test_top1']) for r in at])
            for name, law in laws.items():
                (low,), (high,) = law.band([n])
                rows.append(dict(curve=curve, largest=int(measured.n[-1]), n=n, runs=len(at), truth=round(truth, 5), form=name,
                                 is_form=law.form, predicted=round(law.error(n), 5), low=round(low, 5), high=round(high, 5),
                                 off_by=round(abs(np.log(law.error(n)/truth)), 4)) | machine('cpu'))
    write(EXTRAPOLATION, rows)
    for name in dict.fromkeys(r['form'] for r in rows):
        log(f"{name:12} off by {np.mean([r['off_by'] for r in rows if r['form'] == name]):.3f} (mean of |log ratio|), truth in "
            f"the band {sum(r['low'] <= r['truth'] <= r['high'] for r in rows if r['form'] == name)} of {sum(r['form'] == name for r in rows)}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['coverage', 'record', 'extrapolate'])
    parser.add_argument('data', nargs='?', help='for record: folder with the data sets')
    parser.add_argument('--only', help='curves, separated by ;')
    parser.add_argument('--jobs', type=int, default=2, help='processes (%(default)s)')
    parser.add_argument('--draws', type=int, default=500, help='for coverage: curves of each form (%(default)s)')
    args = parser.parse_args()
    {'coverage': coverage, 'record': record, 'extrapolate': extrapolate}[args.what](args)

if __name__ == '__main__': main()
