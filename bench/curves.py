"""Subset curves of real data: record their points, then compare forms by how well they extrapolate.

    python bench/curves.py record path/to/data         # folder with fashion-mnist, tiny40 and clothing; resumable
    python bench/curves.py record path/to/data --only 'fashion-mnist compact_resnet'

Every point trains for the same number of steps, whatever its size, and is a row of `results/subset-curves.csv`. See
bench/README.md.
"""
import argparse, csv
from pathlib import Path

from tables import log, machine

POINTS = Path(__file__).resolve().parent/'results'/'subset-curves.csv'
SEEDS = 2

# {data: (largest size from which to extrapolate, number of such sizes, larger sizes, parameters)}
DATA = {
    'fashion-mnist': (1/16, 6, (0.5, 1.), dict(size=28, steps=3000)),
    'tiny40': (1/8, 5, (0.5, 1.), dict(size=64, steps=2500)),
    'clothing': (1/8, 4, (0.5, 1.), dict(size=64, steps=2000))}
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

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['record'])
    parser.add_argument('data', nargs='?', help='for record: folder with the data sets')
    parser.add_argument('--only', help='curves, separated by ;')
    parser.add_argument('--jobs', type=int, default=2, help='points to train at once (%(default)s)')
    args = parser.parse_args()
    record(args)

if __name__ == '__main__': main()
