"""Tests and benchmarks on an NVIDIA GPU, in parts of at most eight minutes each: `make gpu`.

    python bench/gpu.py                       # all parts, about 35 minutes
    python bench/gpu.py --only loader,step    # selected parts
    python bench/gpu.py --device cpu --quick --dry   # smoke test with tiny settings, without results

Needs imgexp and its requirements in this Python, with any version of torch; `step` also needs lightning. Rows are
written to bench/results/gpu.csv (those of `step` to train.csv), with the machine. See bench/README.md.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

from tables import summarize, discard_progress, interleave, machine, save, show

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent
RESULTS = HERE/'results'/'gpu.csv'
LIMIT = 8*60  # maximum seconds of a part
IMAGES, SIDE = 4096, 320  # number and side (px) of the synthetic images

# ---- Data: noisy synthetic images with about the entropy of photos, as JPEG files

def drawn_images(folder, n, classes=8):
    "Class folders with `n` JPEG files of 320 px, with about as many bytes per pixel as ImageNet (110 kB at 400 × 350)"
    import cv2, numpy as np
    if (folder/'complete').exists(): return folder/'images'
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder/'images'/('train' if i % 8 else 'valid')/f'{(i//8 + i) % classes}'/f'{i:05}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = cv2.resize(rng.integers(0, 256, (20, 20, 3), np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        noise = cv2.resize(rng.integers(0, 256, (SIDE//2, SIDE//2, 3), np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(path), cv2.addWeighted(coarse, 0.7, noise, 0.3, 0), [cv2.IMWRITE_JPEG_QUALITY, 90])
    (folder/'complete').touch()
    return folder/'images'

def packed_images(folder, images, kind):
    "A pack of the synthetic images at 256 px, `kind` jpeg or raw"
    from imgexp.write_packs import build_pack
    dest = folder/'packs'
    return next(iter(dest.glob(f'*{kind}*')), None) or build_pack(str(images), 256, kind, dest, say=lambda text: None)

# ---- Parts: arguments -> rows

def part_tests(args):
    "The tests marked cuda"
    command = [sys.executable, '-m', 'pytest', str(ROOT/'tests'), '-q', '-m', 'cuda', '-p', 'no:cacheprovider']
    result = subprocess.run(command, cwd=ROOT, timeout=LIMIT)
    return [_passed('tests marked cuda', result.returncode == 0)]

def part_resume(args):
    "Exact resume after kill -9: several training features, each killed six times"
    features = 'nothing;ema;bf16' if not args.quick else 'nothing'
    command = [sys.executable, str(ROOT/'tests'/'torture.py'), '--only', features, '--threads', '2', '--kills', '2' if args.quick else '6', '--dry']
    result = subprocess.run(command, cwd=ROOT, timeout=LIMIT, capture_output=True, text=True)
    print(result.stdout, end='', file=sys.stderr)
    if result.returncode not in (0, 1): sys.exit(f'bench: {result.stderr[-2000:]}')
    rows = [_passed(f'resume, {line.split(",")[0]}: equal bit for bit', ', equal' in line) for line in result.stdout.splitlines() if ' kills in ' in line]
    return rows + [_passed(f'not deterministic: {name}', False) for name in nondeterministic(args.device)]

def nondeterministic(device):
    "Kernels of a training step that have no deterministic version in torch"
    import torch, warnings
    from imgexp.models import build_model
    torch.use_deterministic_algorithms(True, warn_only=True)
    names = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for arch, size in (('resnet18', 64), ('mobilenet_v2', 64), ('vit_b_32', 64)):
            net = build_model(arch, 10, size=size).to(device)
            net(torch.rand(4, 3, size, size, device=device)).sum().backward()
        names |= {str(w.message).split(' does not have')[0][:80] for w in caught if 'does not have a deterministic' in str(w.message)}
    torch.use_deterministic_algorithms(False)
    return sorted(names)

def _passed(name, ok):
    return dict(table='correct', contender=name, n=1, median=int(ok), min=int(ok), max=int(ok), ratio='', ratio_min='',
                ratio_max='', target='median >= 1', met='yes' if ok else 'no')

def part_loader(args):
    "Images per second on the device with 1 to 16 threads, augmented at 224 px"
    folder, images = data(args)
    threads = [t for t in (1, 2, 4, 8, 16) if t <= os.cpu_count()]
    sources = {'class folders': images, 'pack of 256 px JPEG': packed_images(folder, images, 'jpeg'), 'pack of 256 px raw': packed_images(folder, images, 'raw')}
    contenders = {f'{name}, {t} thread{"s"*(t > 1)}': (partial(loader_rate, source, t, args), 3) for name, source in sources.items() for t in threads}
    values = interleave('loader', contenders, 3, 0, settings(args), not args.dry)
    return summarize('loader', values, {f'pack of 256 px raw, {threads[-1]} threads': 'median >= 20000'} if threads[-1] == 16 else {})

def loader_rate(source, threads, args):
    "Images per second over two passes"
    import numpy as np, torch
    from imgexp.loader import Loader
    from imgexp.sources import load_images
    table = load_images(str(source))
    rows = np.resize(table.split('train'), 512 if args.quick else 8192)
    loader = Loader(table.take(rows), 'train', 224, 256, augment='crop-flip', workers=threads, device=args.device, seed=0)
    n, start = 0, None
    for epoch in range(2):
        for x, _ in loader.at(epoch):
            if start is None: start = time.perf_counter()  # the first batch fills the queue
            else: n += len(x)
    if args.device == 'cuda': torch.cuda.synchronize()
    return n/(time.perf_counter() - start)

def part_step(args):
    "Training steps of imgexp and other frameworks: ResNet-50, 224 px, from tensors and from a pack; peak memory"
    folder, images = data(args)
    command = [sys.executable, str(HERE/'train.py'), '--only', 'step' if args.quick else 'peers-rn50-224,memory-rn50-224', '--steps', '5' if args.quick else '15',
               '--repeats', '1' if args.quick else '3', '--device', args.device, '--data', str(packed_images(folder, images, 'raw'))] + ['--dry']*args.dry
    if subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode: sys.exit('bench: the part step failed')
    return []

def apart(call):
    "What a function of this file returns in a process of its own, with empty runs/ and caches"
    with tempfile.TemporaryDirectory() as place:
        code = f'import sys; sys.path.insert(0, {str(HERE)!r}); import gpu, json; print(json.dumps(gpu.{call}))'
        env = os.environ | {'IMGEXP_ROOT': place, 'XDG_CACHE_HOME': place, 'WANDB_MODE': 'disabled'}
        result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=LIMIT)
        if result.returncode: sys.exit(f'bench: {result.stderr[-2000:]}')
        return json.loads(result.stdout.splitlines()[-1])

def part_transfer(args):
    "Transfer with a ResNet-50 (random weights): seconds with an empty cache and with cached features, memory"
    folder, images = data(args)
    def run(): return apart(f'transfer_runs({str(images)!r}, {args.quick})')
    runs = interleave('transfer', {'run': (run, 1 if args.quick else 3)}, 3, 0, settings(args), not args.dry)['run']
    return summarize('transfer', {k: [v[k] for v in runs] for k in runs[0]}, {})

def transfer_runs(images, quick):
    "Measurements of `part_transfer`, in a separate process"
    import torch
    from imgexp.transfer import train
    params = dict(data=images, arch='resnet18' if quick else 'resnet50', size=64 if quick else 224,
                  epochs=2 if quick else 10, track='off')
    def timed(**changes):
        start = time.perf_counter()
        run = train(**params | changes)
        return time.perf_counter() - start, run
    first, run = timed()
    second, _ = timed(seed=1)
    n = sum(run.metrics[s]['top1']['n'] for s in ('valid', 'test') if run.metrics.get(s)) + int(run.history.images.iloc[0])
    mb = torch.cuda.max_memory_allocated()/1e6 if torch.cuda.is_available() else 0.
    return {'empty cache, s': first, 'another seed on cached features, s': second,
            'images of the data set over the first run, images/s': n/first, 'peak memory of the device, MB': mb}

def part_phases(args):
    "Phase 1 of the plan `seed` from a JPEG pack: images a second (FFCV and timm publish theirs for 224 px)"
    folder, images = data(args)
    pack = str(packed_images(folder, images, 'jpeg'))
    def run(): return apart(f'phase_rate({pack!r}, {args.quick})')
    runs = interleave('phases', {'run': (run, 1 if args.quick else 3)}, 3, 0, settings(args), not args.dry)['run']
    return summarize('phases', {k: [v[k] for v in runs] for k in runs[0]}, {})

def phase_rate(pack, quick):
    "Measurements of `part_phases`, in a separate process"
    from imgexp.phase_plans import PLANS
    from imgexp.train import train
    values = PLANS['seed'][0].values | dict(subset=1., epochs=2, lr=1e-3, keep_every=0) | (dict(arch='own_resnet18', size=32, batch_size=16, micro_batch=0) if quick else {})
    history = train(data=pack, track='off', figures=False, **values).history
    seconds, images = history.seconds.diff().iloc[-1], history.images.diff().iloc[-1]
    return {'phase 1 of seed at 128 px, second epoch, images/s': images/seconds}

PARTS = {'tests': part_tests, 'resume': part_resume, 'loader': part_loader, 'step': part_step, 'transfer': part_transfer, 'phases': part_phases}

# ---- Running

def data(args):
    folder = Path(os.environ.get('IMGEXP_BENCH_DATA') or Path(tempfile.gettempdir())/'imgexp-bench')/('quick' if args.quick else 'full')
    return folder, drawn_images(folder, 128 if args.quick else IMAGES)

def settings(args): return {'device': args.device, 'quick': args.quick}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help=f"comma-separated parts: {', '.join(PARTS)} (all)")
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'], help='(%(default)s)')
    parser.add_argument('--quick', action='store_true', help='tiny settings, as a smoke test')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    args = parser.parse_args()
    names = [n for n in args.only.split(',') if n] or list(PARTS)
    if unknown := [n for n in names if n not in PARTS]:
        parser.error(f"--only: no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    import torch
    if args.device == 'cuda' and not torch.cuda.is_available(): return print('imgexp: torch finds no NVIDIA GPU here, so there is nothing to measure')
    failed = []
    for name in names:
        start = time.monotonic()
        print(f'gpu: {name}: {PARTS[name].__doc__}', file=sys.stderr, flush=True)
        rows = [row | machine(args.device) for row in PARTS[name](args)]
        if rows and not args.dry:
            save(rows, RESULTS, ['correct', *PARTS])
            discard_progress(name)
        if rows: show(rows)
        failed += [r['contender'] for r in rows if r['met'] == 'no']
        print(f'gpu: {name}: {(time.monotonic() - start)/60:.1f} minutes', file=sys.stderr, flush=True)
    if failed: print(f"gpu: targets not met: {'; '.join(failed)}", file=sys.stderr)

if __name__ == '__main__': main()
