"""Accuracy of a head on a frozen network over seeds: heads, networks, augmented views, normalization, bf16.

    python bench/transfer_accuracy.py path/to/images --weights mobilenet_v2=mobilenet_v2.pth,resnet18=resnet18.pth
    python bench/transfer_accuracy.py path/to/images --weights mobilenet_v2=mobilenet_v2.pth --only views --seeds 3

Runs are saved in runs/ as usual, and finished ones are not repeated. Writes a row per run to
`results/transfer-accuracy.csv` and keeps the rows of other runs; nbs/20_transfer.ipynb plots them.
"""
import argparse, csv, json, subprocess, sys
from pathlib import Path

from tables import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'transfer-accuracy.csv'
SIZES = {'resnet18': 64}  # px, for weights trained on small images
TABLES = ['heads', 'normalize', 'views', 'bf16', 'usual', 'finetune']
KEY = ['table', 'data', 'arch', 'head', 'size', 'normalize', 'views', 'finetune_epochs', 'precision', 'seed']

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', help='folder with train, validation and test, each with class folders')
    parser.add_argument('--weights', required=True, help='comma-separated arch=file; only the tables heads and normalize use more than the first')
    parser.add_argument('--only', default=','.join(TABLES), help='comma-separated tables (%(default)s)')
    parser.add_argument('--seeds', type=int, default=5, help='number of seeds (%(default)s)')
    args = parser.parse_args()
    args.archs = dict(pair.split('=') for pair in args.weights.split(','))
    args.arch = next(iter(args.archs))
    for table in args.only.split(','):
        for row in globals()[table](args): save({'table': table, 'data': Path(args.images).name} | row | machine('cpu'))

def train_run(args, seed, **params):
    "A finished run and its row"
    from imgexp.transfer import train
    arch = params.pop('arch', args.arch)
    defaults = dict(data=args.images, arch=arch, weights=args.archs[arch], size=SIZES.get(arch, 224), seed=seed,
                    resume='reuse', track='off')
    run = train(**defaults | params)
    test = run.metrics['test']['top1']
    row = {k: run.params[k] for k in KEY if k in run.params and k not in ('data', 'table')}
    return run, row | dict(epochs=run.params['epochs'], valid_top1=run.metrics['valid']['top1']['value'],
                           test_top1=test['value'], n=test['n'])

def rows(args, **params):
    for seed in range(args.seeds): yield train_run(args, seed, **params)[1]

def heads(args):
    for arch in args.archs:
        for head in ('linear', 'mlp', 'logistic'): yield from rows(args, arch=arch, head=head)

def normalize(args):
    for arch in args.archs:
        for kind in ('weights', 'half', 'data'): yield from rows(args, arch=arch, normalize=kind)

def views(args):
    "Augmented views; with one view per epoch (10) the augmentation never repeats"
    for k in (0, 1, 4, 8, 10): yield from rows(args, views=k)

def finetune(args): yield from rows(args, finetune_epochs=3)

def bf16(args):
    "Fraction of test predictions that change when the same head gets features of the other precision"
    from imgexp.evaluate import load_run
    from imgexp.cutting import cut
    from imgexp.features import View, features
    from imgexp.sources import load_images
    import torch
    table = load_images(args.images)
    test = table.split('test')
    for seed in range(args.seeds):
        run, row = train_run(args, seed, precision='fp32')
        model = load_run(run.name).model.eval().cpu()
        parts, view = cut(model), View(run.params['size'], tuple(map(tuple, load_run(run.name).metadata['norm'])))
        with torch.no_grad(): told = [parts.suffix(features(table, parts, view, kind, splits=('test',)).take(test).float()).argmax(1) for kind in ('fp32', 'bf16')]
        yield row | {'changed': (told[0] != told[1]).float().mean().item()}

def usual(args):
    "The usual script with features extracted once, that is, with the backbone in evaluation mode"
    # training mode would ruin weights whose batch norm is folded into the convolutions
    command = [sys.executable, HERE/'usual_transfer.py', args.images, '--arch', args.arch,
               '--weights', args.archs[args.arch], '--once', '--seeds', str(args.seeds)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode: sys.exit(process.stderr)
    n = sum(1 for _ in Path(args.images).glob('test/*/*'))
    for result in map(json.loads, process.stdout.splitlines()):
        yield dict(arch=args.arch, head='linear', size=224, normalize='weights', views=0, finetune_epochs=0,
                   precision='fp32', seed=result['seed'], epochs=len(result['epochs']), valid_top1=result['valid'],
                   test_top1=result['test'], n=n)

def save(row):
    "Add a row; it replaces an older row of the same run"
    def key(r): return [str(r.get(k, '')) for k in KEY]
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    columns = [*KEY, 'epochs', 'valid_top1', 'test_top1', 'n', 'changed', *machine('cpu')]
    rows = [r for r in old if key(r) != key(row)] + [row]
    rows.sort(key=lambda r: (TABLES.index(r['table']), key(r)))
    with RESULTS.open('w', newline='') as f:
        writer = csv.DictWriter(f, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    shown = ('table', 'arch', 'head', 'views', 'normalize', 'seed', 'valid_top1', 'test_top1')
    print({k: row[k] for k in shown}, row.get('changed', ''), flush=True)

if __name__ == '__main__': main()
