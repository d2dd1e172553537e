"""Explanations: speed beside other Grad-CAM libraries, checks of the maps, a planted shortcut, and what following recommendations brings.

    python bench/explain.py speed                       # images a second of a forward pass and of maps; one thread
    python bench/explain.py cost path/to/shared         # time beside `imgexp eval`, of MobileNetV2 on clothing
    python bench/explain.py clothing path/to/shared     # the same run: checks of the maps, probes, size of the report
    python bench/explain.py shortcut path/to/shared     # a mark in a corner of every skirt
    python bench/explain.py follow path/to/shared       # three seeds with and without the augmentation that is recommended
    python bench/explain.py memory                      # of 1,000 maps

`speed` compares with grad-cam and captum if they are installed (`pip install --no-deps grad-cam captum`).
`path/to/shared` has data/clothing and weights/mobilenet_v2-converted.pth. See bench/README.md.
"""
import argparse, csv, os, shutil, statistics, tempfile, time
from pathlib import Path

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'
CLASSES = 10

def write(name, rows):
    with (RESULTS/f'{name}.csv').open('w', newline='') as f:
        writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

# ---- Speed

def contenders(model, arch):
    "{name: function of images and classes}"
    import torch
    from imgexp.grad_cam import GradCAM, map_layer
    ours, layer = GradCAM(model), model.get_submodule(map_layer(model))
    def forward(x, y):
        with torch.inference_mode(): return model(x)
    out = {'forward pass': forward, 'imgexp': lambda x, y: ours(x).maps(y)}
    def tokens(v): return v[:, 1:].mT.unflatten(2, (int(v.shape[1]**0.5),)*2)
    vit = dict(reshape_transform=tokens) if arch.startswith('vit') else {}
    try:
        from pytorch_grad_cam import GradCAM as Peer
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        peer = Peer(model, [layer], **vit)
        out['grad-cam'] = lambda x, y: peer(x, [ClassifierOutputTarget(int(c)) for c in y])
    except ImportError as e: log(f'grad-cam left out: {e}')
    try:
        from captum.attr import LayerGradCam
        if not vit: out['captum'] = lambda x, y, peer=LayerGradCam(model, layer): peer.attribute(x, y)
    except ImportError as e: log(f'captum left out: {e}')
    return out

def speed(args):
    import torch
    from imgexp.models import build_model
    torch.set_num_threads(1)
    rows = []
    for arch in ('resnet18', 'resnet50', 'mobilenet_v2', 'vit_b_16'):
        model = build_model(arch, CLASSES).eval().to(memory_format=torch.channels_last)
        x, y = torch.randn(args.batch, 3, 224, 224).to(memory_format=torch.channels_last), torch.arange(args.batch) % CLASSES
        fs, seconds = contenders(model, arch), {}
        for f in fs.values(): f(x, y)
        for _ in range(args.rounds):
            for name, f in fs.items():
                start = time.perf_counter()
                f(x, y)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        base = statistics.median(seconds['forward pass'])
        for name, s in seconds.items():
            m = statistics.median(s)
            rows.append(dict(arch=arch, contender=name, images_per_second=round(args.batch/m, 2), low=round(args.batch/max(s), 2), high=round(args.batch/min(s), 2), rounds=args.rounds,
                             of_forward=round(base/m, 2), batch=args.batch, **machine('cpu')))
            log(f'{arch} {name}: {args.batch/m:.1f} images/s, {base/m:.2f} of the forward pass')
    write('explain-speed', rows)

# ---- Real photos

def train_head(shared, data=None, **values):
    from imgexp.transfer import train
    return train(data=str(data or shared/'data/clothing'), arch='mobilenet_v2', weights=str(shared/'weights/mobilenet_v2-converted.pth'), epochs=10, resume='reuse', track='off', **values)

def cost(args):
    "Seconds of an evaluation, and of explanations"
    from imgexp.evaluate import load_run
    from imgexp.explain import explain_run
    run, times = train_head(args.shared), {}
    jobs = {'eval': lambda: load_run(run.name).evaluate('valid'), 'explain without probes': lambda: explain_run(run=run.name, probes=False), 'explain': lambda: explain_run(run=run.name)}
    for _ in range(args.rounds):
        for name, f in jobs.items():
            if name in times and name == 'explain': continue  # eight evaluations more: once is enough
            start = time.perf_counter()
            f()
            times.setdefault(name, []).append(time.perf_counter() - start)
    base = statistics.median(times['eval'])
    rows = [dict(what=name, seconds=round(statistics.median(s), 2), low=round(min(s), 2), high=round(max(s), 2), n=len(s), against_eval=round(statistics.median(s)/base, 2), **machine('cpu')) for name, s in times.items()]
    write('explain-cost', rows)
    for r in rows: log(str(r))

def clothing(args):
    "Size of the report, checks of the maps, and probes"
    from imgexp.explain import explain_run
    run, rows = train_head(args.shared), []
    e = explain_run(run=run.name, checks=True, say=log)
    text = e.report.read_text()
    rows.append(dict(what='report', value=round(len(text)/1e6, 2), n=text.count('<figure'), unit='MB and tiles'))
    rows += [dict(what=f"{c['check']}, {c['maps']}", value=round(c['mean'], 3), low=round(c['low'], 3), high=round(c['high'], 3), n=c['n']) for c in e.checks]
    rows += [dict(what=f'probe {r.probe}', value=round(r.change, 3), low=round(r.low, 3), high=round(r.high, 3), n=r.n, unit='of the accuracy') for r in e.probes.itertuples()]
    columns = dict.fromkeys(k for r in rows for k in r)
    write('explain-clothing', [{c: r.get(c, '') for c in columns} for r in rows])
    log(repr(e))

def mark(path):
    import cv2
    image = cv2.imread(str(path))
    h, w = image.shape[:2]
    side = round(min(h, w)*0.2)
    top, left = (h - min(h, w))//2, (w + min(h, w))//2  # of the middle square, which the network sees seven eighths of
    inset = round(min(h, w)*0.07)
    image[top + inset:top + inset + side, left - inset - side:left - inset] = (40, 220, 250)
    cv2.imwrite(str(path), image)

def shortcut(args):
    "Corners that stand out with and without a mark in every skirt, and the accuracy on skirts without it"
    from imgexp.evaluate import load_run
    from imgexp.explain import explain_run
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)/'clothing'
        shutil.copytree(args.shared/'data/clothing', data, copy_function=lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
        for path in [*data.glob('*/skirt/*')]: mark(path)
        for name, where in (('clean', args.shared/'data/clothing'), ('marked', data)):
            run = train_head(args.shared, where)
            e = explain_run(run=run.name, probes=False)
            region = e.findings.regions
            skirt = region[(region['class'] == 'skirt') & (region.region == 'top right')].iloc[0]
            others = region[(region['class'] != 'skirt') & (region.region == 'top right')].share
            accuracy = e.findings.classes.set_index('class').loc['skirt']
            rows.append(dict(photos=name, found='; '.join(f'{r[1]} {r.region}' for r in e.findings.corners.itertuples()), share=round(skirt.share, 3), low=round(skirt.low, 3), high=round(skirt.high, 3),
                             largest_of_others=round(others.max(), 3), area=round(skirt.area, 3), skirt_top1=round(accuracy.top1, 3), n=int(accuracy.n)))
            if name == 'marked':
                probs, labels, _ = load_run(run.name).predict_split('valid', data=str(args.shared/'data/clothing'))
                c = load_run(run.name).classes.index('skirt')
                rows[-1]['skirt_top1_without_mark'] = round(float((probs.argmax(1) == labels)[labels == c].mean()), 3)
            log(str(rows[-1]))
    columns = dict.fromkeys(k for r in rows for k in r)
    write('explain-shortcut', [{c: r.get(c, '') for c in columns} | machine('cpu') for r in rows])

def follow(args):
    "Accuracy and probes of heads trained on plain features, and on views by the recommended augmentation"
    from imgexp.explain import explain_run
    rows = []
    for seed in range(3):
        plain = train_head(args.shared, seed=seed)
        policies = [r['policy'] for r in explain_run(run=plain.name).recommendations]
        policy = 'trivial' if 'trivial' in policies else policies[0]
        for name, run in (('as it is', plain), ('followed', train_head(args.shared, seed=seed, views=2, augment=policy))):
            e = explain_run(run=run.name)
            rows.append(dict(seed=seed, training=name, augment=policy if name == 'followed' else 'none', valid_top1=round(e.findings.score['top1']['value'], 4), n=e.findings.score['top1']['n'],
                             test_top1=round(run.metrics['test']['top1']['value'], 4), **{r.probe: round(r.change, 3) for r in e.probes.sort_values('probe').itertuples()}, **machine('cpu')))
            log(str(rows[-1]))
    write('explain-follow', rows)

def memory(args):
    "Peak memory before and after 1,000 maps"
    import resource, torch
    from imgexp.grad_cam import GradCAM
    from imgexp.models import build_model
    grad_cam = GradCAM(build_model('resnet18', CLASSES))
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    x, y, rows = torch.randn(20, 3, 224, 224), torch.arange(20) % CLASSES, []
    for k in range(51):
        grad_cam(x).maps(y)
        if k in (1, 50): rows.append(dict(images=20*k, peak_mb=round(peak(), 1), **machine('cpu')))
    write('explain-memory', rows)
    log(str([r['peak_mb'] for r in rows]))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['speed', 'cost', 'clothing', 'shortcut', 'follow', 'memory'])
    parser.add_argument('shared', nargs='?', help='folder with data/ and weights/', type=lambda p: Path(p).absolute())
    parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
    parser.add_argument('--batch', type=int, default=8, help='images at once in speed (%(default)s)')
    args = parser.parse_args()
    if args.what in ('cost', 'clothing', 'shortcut', 'follow') and not args.shared: parser.error('give the folder with data/ and weights/')
    globals()[args.what](args)

if __name__ == '__main__': main()
