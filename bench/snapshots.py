"""The populations on which store and search are measured: a base and 35 snapshots of it, by a committed plan.

    python bench/snapshots.py make path/to/shared           # needs data/clothing, data/fashion-mnist, weights/resnet18-64px.pth
    python bench/snapshots.py speed path/to/shared          # ten snapshots, against training with the whole network in every epoch

`make` generates what is missing below runs/ and puts it into runs/store-<distribution>; on two cores this takes eight minutes. The rows,
with the ids of the weights, stand in `results/snapshots-<distribution>.csv`. `speed` writes `results/snapshots-speed.csv` and takes
half an hour. See bench/README.md.
"""
import argparse, csv, os, statistics, tempfile, time
from pathlib import Path

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'
CLOTHES = [('dress', 'hat', 'longsleeve', 'outwear', 'pants'), ('shirt', 'shoes', 'shorts', 'skirt', 't-shirt')]
DATA = [*(('clothing', ','.join(c)) for c in CLOTHES), ('fashion-mnist', '0,1,2,3,4'), ('fashion-mnist', '5,6,7,8,9'), ('shapes', '')]
COMMON = dict(arch='resnet18', weights='../weights/resnet18-64px.pth', size=64, epochs=3, batch_size=64, lr=0.001, max_images='1000,300,500', track='off')
N, SEED = 35, 0

def rows(distribution):
    "The plan: seven snapshots of each of five data sets"
    from imgexp.retrain_draws import count_blocks, draw_retrain
    n_blocks = count_blocks('resnet18')
    for k in range(N):
        data, classes = DATA[k % len(DATA)]
        yield dict(snapshot=k, **COMMON, data=data, classes=classes, retrain=draw_retrain(distribution, n_blocks, SEED, k), seed=SEED + k)

def plan(distribution, folder):
    "Write the plan; the population"
    from imgexp.population import find_population
    path = folder/f'snapshots-{distribution}.csv'
    with path.open('w', newline='') as f:
        table = [*rows(distribution)]
        writer = csv.DictWriter(f, [*table[0]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(table)
    return find_population(str(path))

def make_store(shared, distribution, jobs):
    "Generate what is missing; the store with the base and all snapshots"
    from imgexp.snapshots import generate
    from imgexp.start import runs_dir
    from imgexp.store import Store
    runs = runs_dir().absolute()
    os.environ['IMGEXP_ROOT'] = str(runs.parent)
    os.chdir(Path(shared)/'data')  # the plan's paths are relative to it
    runs.mkdir(exist_ok=True)
    population = plan(distribution, runs)
    found = generate(population, jobs, quiet=True, say=log)
    store = Store(runs/f'store-{distribution}', create=True)
    store.add_file(COMMON['weights'], 'base', 'resnet18', size=64)
    for added in store.add(population.path): log(added)
    return store, population, found

# ---- Speed

SPEED = dict(arch='resnet18', size=64, epochs=10, batch_size=128, lr=0.001, track='off', precision='fp32', workers=0)

def plain(values):
    "The same snapshot by 03_train: the whole network in every epoch"
    from imgexp.train import train
    return train(**values, augment='none', optimizer='adam', schedule='constant', weight_decay=0, keep_best=1, resume='never')

def ours(values):
    from imgexp.transfer import train
    return train(**values, resume='never')

def speed(shared, distributions):
    "Rows of ten snapshots of each distribution, both ways"
    from imgexp.retrain_draws import count_blocks, draw_retrain
    from imgexp.cost import summary
    from imgexp.models import build_model
    shared = Path(shared).absolute()
    for distribution in distributions:
        draws = [draw_retrain(distribution, count_blocks('resnet18'), SEED, k) for k in range(10)]
        times, top1 = {}, {}
        for way in (ours, plain):
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {'IMGEXP_ROOT': folder, 'XDG_CACHE_HOME': folder}
                for k, retrain in enumerate(draws):
                    start = time.perf_counter()
                    run = way(SPEED | dict(data=str(shared/'data/clothing'), weights=str(shared/'weights/resnet18-64px.pth'), retrain=retrain, seed=k))
                    times.setdefault(way.__name__, []).append(time.perf_counter() - start)
                    top1.setdefault(way.__name__, []).append(run.metrics['test']['top1']['value'])
                    log(f'{distribution}, {way.__name__}, retrain {retrain}: {times[way.__name__][-1]:.1f} s, test top-1 {top1[way.__name__][-1]:.3f}')
        work = [summary(build_model('resnet18', 10, size=64), 64).block_multiply_adds]*10
        def per_epoch(blocks, k): return sum(blocks) + 2*sum(blocks[len(blocks) - 1 - k:])  # forward, and twice that backward
        whole = sum(SPEED['epochs']*per_epoch(b, k) for b, k in zip(work, draws))
        cached = sum(SPEED['epochs']*3*sum(b[len(b) - 1 - k:]) for b, k in zip(work, draws)) + sum(sum(work[0][:len(work[0]) - 1 - k]) for k in {*draws})
        gaps = [a - b for a, b in zip(top1['ours'], top1['plain'])]
        yield dict(distribution=distribution, retrain=' '.join(map(str, draws)), ours_s=round(sum(times['ours']), 1), plain_s=round(sum(times['plain']), 1),
                   sooner=round(sum(times['plain'])/sum(times['ours']), 2), bound=round(whole/cached, 2), ours_top1=round(statistics.mean(top1['ours']), 4),
                   plain_top1=round(statistics.mean(top1['plain']), 4), difference=round(statistics.mean(gaps), 4),
                   standard_error=round(statistics.stdev(gaps)/10**0.5, 4), n_test=372, **machine('cpu'))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['make', 'speed'])
    parser.add_argument('shared', help='folder with data/ and weights/')
    parser.add_argument('--jobs', type=int, default=2, help='snapshots trained at once (%(default)s)')
    parser.add_argument('--distributions', nargs='*', default=['top-layers', '25-percent'], help='for speed')
    args = parser.parse_args()
    if args.what == 'speed': return write(RESULTS/'snapshots-speed.csv', [*speed(args.shared, args.distributions)])
    args.shared = str(Path(args.shared).absolute())
    for distribution in ('25-percent', 'top-layers'):
        store, population, found = make_store(args.shared, distribution, args.jobs)
        snapshots = store.snapshots()
        write(RESULTS/f'snapshots-{distribution}.csv', [
            dict(snapshot=r['snapshot'], **{k: population.plan[r['snapshot']].get(k, '') for k in ('data', 'classes', 'retrain', 'seed')},
                 weights_id=snapshots[r['name']].id, valid_top1=r['valid_top1'], test_top1=r['test_top1'], seconds=r['seconds'], **machine('cpu'))
            for r in found])

def write(path, rows):
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

if __name__ == '__main__': main()
