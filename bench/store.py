"""Size and speed of the store, on real and on drawn populations.

    python bench/store.py path/to/shared        # after bench/snapshots.py make path/to/shared; a minute

Bytes against plain safetensors files, and against a stand-in for the layout of Alsatian (Strassenburg et al. 2025): every block of
every snapshot as a state file and as a pickled module, beside the full .pth. Speeds with one thread, files in the page cache.
Writes `results/store.csv`. See bench/README.md.
"""
import argparse, csv, statistics, tempfile, time
from pathlib import Path

import torch

from tables import log, machine

OUT = Path(__file__).resolve().parent/'results'/'store.csv'

class Counter:
    "A file that only counts its bytes"
    def __init__(self): self.n = 0
    def write(self, data):
        self.n += len(data)
        return len(data)
    def flush(self): pass

def saved_bytes(value):
    f = Counter()
    torch.save(value, f)
    return f.n

def safetensors_bytes(state):
    import safetensors.torch
    return len(safetensors.torch.save({k: v.contiguous() for k, v in state.items()}))

def layered_bytes(model):
    "Bytes of the stand-in: full state, and each block twice"
    from imgexp.networks import blocks
    whole = saved_bytes(model.state_dict())
    for b in blocks(model):
        block = torch.nn.Sequential(*b.modules)
        whole += saved_bytes(block.state_dict()) + saved_bytes(block)
    return whole

def real_population(runs):
    "The store of bench/snapshots.py"
    from imgexp.store import Store
    store = Store(runs/'store-25-percent')
    plain = layered = 0
    for name in store.snapshots():
        model = store.network(name)
        plain, layered = plain + safetensors_bytes(model.state_dict()), layered + layered_bytes(model)
    usage = store.stat()
    stored = sum(f.stat().st_size for f in store.dir.rglob('*') if f.is_file())
    on_disk = sum(f.stat().st_blocks*512 for f in store.dir.rglob('*') if f.is_file())
    return dict(population=f'ResNet-18, base and {len(store) - 1} snapshots, 25-percent', snapshots=len(store), plain_mb=plain/1e6, distinct_mb=usage.distinct/1e6,
                stored_mb=stored/1e6, on_disk_mb=on_disk/1e6, layered_mb=layered/1e6, against_plain=plain/stored, against_layered=layered/stored)

def drawn_population(n=20, arch='vit_l_32', seed=0):
    "Retrained tensors redrawn from a normal distribution: nothing is left of the base in them"
    from imgexp.manifests import Origin
    from imgexp.models import build_model
    from imgexp.networks import block_tensors
    from imgexp.retrain_draws import count_blocks, draw_retrain
    from imgexp.store import Store
    from imgexp.tensor_files import TensorFile, from_torch
    with tempfile.TemporaryDirectory() as folder:
        store, plain = Store(Path(folder)/'store', create=True), 0
        generator = torch.Generator().manual_seed(seed)
        state = {k: 0.02*torch.randn(v.shape, generator=generator) for k, v in build_model(arch, 1000).state_dict().items()}
        groups = [*block_tensors(build_model(arch, 1000)).values()]
        for k in range(-1, n):
            retrain = draw_retrain('25-percent', count_blocks(arch), seed, k) if k >= 0 else -1
            own = [key for keys in groups[len(groups) - 1 - retrain:] for key in keys] if k >= 0 else []
            new = state | {key: 0.02*torch.randn(state[key].shape, generator=generator) for key in own}
            added = store.add_tensors(f'drawn-{k}', TensorFile({n: from_torch(n, v) for n, v in new.items()}, {}), Origin())
            plain += added.snapshot.nbytes
            log(added)
        usage = store.stat()
        stored = usage.stored + usage.manifests
        on_disk = sum(f.stat().st_blocks*512 for f in store.dir.rglob('*') if f.is_file())
        row = dict(population=f'ViT-L/32, base and {n} drawn snapshots, 25-percent', snapshots=n + 1, plain_mb=plain/1e6, distinct_mb=usage.distinct/1e6,
                   stored_mb=stored/1e6, on_disk_mb=on_disk/1e6, against_plain=plain/stored)
        return row | {'get_mb_s': get_speed(store, 'drawn--1', 3)}

def get_speed(store, name, n):
    "MB/s of reading with every hash checked, one thread: median of n"
    size, times = store.find(name).nbytes/1e6, []
    for _ in range(n + 1):
        start = time.perf_counter()
        store.load(name, threads=1)
        times.append(time.perf_counter() - start)
    return size/statistics.median(times[1:])

def speeds(runs, n=7):
    "MB/s of `load`, of adding what is new, and of adding what is there, with one thread"
    from imgexp.manifests import Origin
    from imgexp.store import Store
    from imgexp.tensor_files import read_tensor_file
    store = Store(runs/'store-25-percent')
    name = [*store.snapshots()][-1]
    row = {'get_mb_s': get_speed(store, name, n)}
    new, again = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'copy.safetensors'
        store.get(name, path)
        size = path.stat().st_size/1e6
        for k in range(n + 1):
            target = Store(Path(folder)/f'{k}', create=True)
            for times in (new, again):
                start = time.perf_counter()
                target.add_tensors('x', read_tensor_file(path), Origin(), threads=1)
                times.append(size/(time.perf_counter() - start))
    return row | {'add_mb_s': statistics.median(new[1:]), 'add_again_mb_s': statistics.median(again[1:])}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('shared', help='folder with data/ and weights/')
    parser.parse_args()
    from imgexp.start import runs_dir
    torch.set_num_threads(1)
    rows = [real_population(runs_dir()) | speeds(runs_dir())]
    log(rows[-1])
    rows.append(drawn_population())
    log(rows[-1])
    columns = dict.fromkeys(k for r in rows for k in r)
    with OUT.open('w', newline='') as f:
        writer = csv.DictWriter(f, [*columns, *machine('cpu')], lineterminator='\n')
        writer.writeheader()
        for r in rows: writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} | machine('cpu'))

if __name__ == '__main__': main()
