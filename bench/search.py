"""Search over 36 ResNet-18 snapshots: exhaustive, successive halving, and halving with shared prefixes.

    python bench/search.py time path/to/shared      # after bench/snapshots.py make path/to/shared; four minutes
    python bench/search.py memory path/to/shared    # peak memory of a process beside what it had before, at several budgets
    python bench/search.py winner path/to/shared    # is the winner as good as the exhaustive one's? 10 draws of images

2,000 images at 64 px, full precision, by the same code: exhaustive is `--exhaustive --share false`, halving is `--share false`.
Writes `results/search.csv`, `results/search-memory.csv` and `results/search-winner.csv`. See bench/README.md.
"""
import argparse, csv, gc, json, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'
TARGETS = {'fashion-mnist': 'fashion-mnist', 'clothing': 'clothing/train'}
DRAWS, IMAGES = 10, 2000

def params(runs, distribution, shared, target, **given):
    from imgexp.search_params import SearchParams
    return SearchParams.check(dict(store=str(runs/f'store-{distribution}'), data=str(Path(shared)/'data'/TARGETS[target]), images=IMAGES, size=64, memory_gb=2) | given)

def time_search(runs, shared, repetitions):
    from imgexp.search import search
    ways = {'exhaustive': dict(exhaustive=True, share=False), 'halving': dict(share=False), 'halving, shared': {}}
    for distribution in ('top-layers', '25-percent'):
        if not (runs/f'store-{distribution}').exists(): continue
        search(params(runs, distribution, shared, 'fashion-mnist', images=150), say=log)  # warm: code, page cache
        results = {}
        for _ in range(repetitions):
            for way, given in ways.items():
                gc.collect()
                results.setdefault(way, []).append(search(params(runs, distribution, shared, 'fashion-mnist', **given), say=log))
                log(f'{distribution}, {way}: {results[way][-1].seconds:.1f} s; {results[way][-1].usage}')
        ours = results['halving, shared']
        for way, rs in results.items():
            r, bound, seconds = rs[0], *(f(rs) for f in (lambda rs: rs[0].bounds, lambda rs: float(np.median([r.seconds for r in rs]))))
            work = {'exhaustive': bound['exhaustive'], 'halving': bound['halving'], 'halving, shared': bound['shared']}[way]
            ours_seconds, ours_work = float(np.median([o.seconds for o in ours])), ours[0].bounds['shared']
            yield dict(distribution=distribution, way=way, snapshots=len(r.rows), images=IMAGES, rounds='; '.join(f'{x.snapshots} on {x.images}' for x in r.rounds),
                       seconds=round(seconds, 2), gmacs=round(work/1e9, 1), ours_sooner=round(seconds/ours_seconds, 2), bound=round(work/ours_work, 2),
                       of_bound=round(seconds/ours_seconds/(work/ours_work), 2), networks_s=round(r.usage.seconds, 2), read_s=round(r.usage.read_seconds, 2),
                       probe_s=round(r.usage.probe_seconds, 2), read_mb=round(r.usage.read_mb), accounted_mb=round(r.usage.peak_mb), best=r.best,
                       probe_top1=r.rows[0]['probe_top1'], repetitions=repetitions,
                       **machine('cpu'))

MEMORY = """
import json, sys, threading, time, psutil
from imgexp.prefix_tree import build_trees
from imgexp.search import search
from imgexp.search_params import SearchParams
from imgexp.sources import load_images
from imgexp.store import Store
p, process, peak = SearchParams.check(json.loads(sys.argv[1])), psutil.Process(), [0]
build_trees(Store(p.store).snapshots(), p.size), load_images(p.data)
before = process.memory_info().rss
def watch():
    while True:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
result = search(p, say=lambda text: None)
print(json.dumps([before/1e6, (peak[0] - before)/1e6, result.usage.peak_mb, result.seconds]))"""

def memory(runs, shared):
    "Peak memory of a fresh process, beside what imports, index and images of the data set take"
    for distribution in ('top-layers', '25-percent'):
        for gb in (0.5, 1., 2.):
            p = params(runs, distribution, shared, 'fashion-mnist', memory_gb=gb)
            out = subprocess.run([sys.executable, '-c', MEMORY, json.dumps(dict(p))], capture_output=True, text=True, check=True).stdout
            before, peak, accounted, seconds = json.loads(out)
            yield dict(distribution=distribution, budget_mb=1000*gb, before_mb=round(before), peak_mb=round(peak), accounted_mb=round(accounted), within=peak <= 1000*gb,
                       seconds=round(seconds, 1), **machine('cpu'))

def winner(runs, shared):
    "From cached features: draws of images, the winner of halving against that of all snapshots on all images"
    from imgexp.data import stratified_order
    from imgexp.halving import halving_rounds, probe
    from imgexp.search import search
    for distribution in ('top-layers', '25-percent'):
        for target in TARGETS:
            if not (runs/f'store-{distribution}').exists(): continue
            pool = search(params(runs, distribution, shared, target, images=6000, exhaustive=True), say=log)
            names, labels = [*pool.features], pool.labels
            for draw in range(DRAWS):
                chosen = np.random.default_rng(draw).permutation(len(labels))[:IMAGES]
                chosen = chosen[stratified_order(labels[chosen])]
                def score(name, n): return probe(pool.features[name][chosen[:n]], labels[chosen[:n]])
                alive = sorted(names)
                full = {n: score(n, len(chosen))[0] for n in names}
                for r in halving_rounds(len(names), len(chosen)):
                    scores = {n: score(n, r.images)[1] for n in alive[:r.snapshots]}
                    alive = sorted(scores, key=lambda n: (scores[n], n))
                alive.sort(key=lambda n: (-full[n], n))  # the last round goes by the accuracy
                best = min(full, key=lambda n: (-full[n], n))
                yield dict(distribution=distribution, target=target, draw=draw, images=len(chosen), winner=alive[0], probe_top1=full[alive[0]], exhaustive_winner=best,
                           exhaustive_top1=full[best], behind=round(full[best] - full[alive[0]], 5), rank=1 + sum(v > full[alive[0]] for v in full.values()),
                           spread=round(float(np.std([*full.values()])), 4), **machine('cpu'))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['time', 'memory', 'winner'])
    parser.add_argument('shared', help='folder with data/')
    parser.add_argument('--repetitions', type=int, default=1, help='of each search (%(default)s)')
    args = parser.parse_args()
    from imgexp.start import runs_dir
    runs, rows = runs_dir().absolute(), []
    path = RESULTS/{'time': 'search.csv', 'memory': 'search-memory.csv', 'winner': 'search-winner.csv'}[args.what]
    measure = {'time': partial(time_search, repetitions=args.repetitions), 'memory': memory, 'winner': winner}[args.what]
    for row in measure(runs, args.shared):
        rows.append(row)
        log({k: v for k, v in row.items() if k not in machine('cpu')})
        with path.open('w', newline='') as f:
            writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

if __name__ == '__main__': main()
