"""Exported networks: speed beside torch, agreement with the run that they are from, and a page with many visitors.

    python bench/deploy.py speed                        # ms for one image, one thread, beside torch
    python bench/deploy.py agree path/to/shared         # 100 files of many kinds: run, export, and the usual preprocessing
    python bench/deploy.py page path/to/shared          # the page in an environment of its own: start, memory, 50 visitors at once

`path/to/shared` has data/clothing and weights/mobilenet_v2-converted.pth. `page` installs the requirements of the export. See bench/README.md.
"""
import argparse, csv, io, os, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np

from tables import log, machine

RESULTS = Path(__file__).resolve().parent/'results'

def write(name, rows):
    with (RESULTS/f'{name}.csv').open('w', newline='') as f:
        writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

# ---- Speed

def speed(args):
    import onnxruntime, torch
    from imgexp.learner import to_input
    from imgexp.models import build_model
    from imgexp.onnx_export import export_onnx
    torch.set_num_threads(1)
    norm, rows = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), []
    images = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    for arch in ('resnet18', 'resnet50', 'mobilenet_v2', 'vit_b_16'):
        model = build_model(arch, 10).eval()
        with tempfile.TemporaryDirectory() as d:
            about = export_onnx(model, norm, Path(d)/'model.onnx', images)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(f'{d}/model.onnx', options, ['CPUExecutionProvider'])
            partial = onnxruntime.RunOptions()
            partial.add_run_config_entry('only_execute_path_to_fetches', '1')
        model = model.to(memory_format=torch.channels_last)
        target = {'targets': np.array([-1])} if about['maps'] == 'target' else {}
        def by_torch():
            with torch.inference_mode(): return model(to_input(torch.from_numpy(images[:1]), norm)).softmax(1)
        fs = {'torch, channels last': by_torch,
              'onnxruntime': lambda: session.run(['probabilities'], {'images': images[:1]} | target, partial),
              'onnxruntime, with maps': lambda: session.run(['probabilities', 'maps'], {'images': images[:1]} | target, partial)}
        seconds = {name: [] for name in fs}
        for f in fs.values(): f(), f()
        for _ in range(args.rounds):
            for name, f in fs.items():
                start = time.perf_counter()
                f()
                seconds[name].append(time.perf_counter() - start)
        base = statistics.median(seconds['torch, channels last'])
        for name, s in seconds.items():
            m = statistics.median(s)
            rows.append(dict(arch=arch, contender=name, ms=round(1000*m, 1), low=round(1000*min(s), 1), high=round(1000*max(s), 1), rounds=args.rounds,
                             times_as_fast=round(base/m, 2), maps=about['maps'], difference=f"{max(about['differences'].values()):.1e}", **machine('cpu')))
            log(f'{arch} {name}: {1000*m:.1f} ms, {base/m:.2f} times as fast')
    write('deploy-speed', rows)

# ---- Agreement

def odd_files(photos, folder, n):
    "Write `n` photos as files of many kinds."
    import cv2
    from PIL import Image
    def exif(im, orientation):
        e = im.getexif()
        e[0x112] = orientation
        return dict(exif=e)
    def alpha(im):
        im = im.copy()
        im.putalpha(Image.fromarray(np.uint8(np.linspace(80, 255, im.size[0]*im.size[1])).reshape(im.size[::-1])))
        return im
    kinds = {
        'JPEG': lambda im, f: im.save(f, 'JPEG', quality=90), 'EXIF-turned': lambda im, f: im.save(f, 'JPEG', quality=90, **exif(im, 6)),
        'mirrored': lambda im, f: im.save(f, 'JPEG', quality=90, **exif(im, 4)), 'CMYK': lambda im, f: im.convert('CMYK').save(f, 'JPEG', quality=90),
        'gray': lambda im, f: im.convert('L').save(f, 'JPEG', quality=90), 'progressive': lambda im, f: im.save(f, 'JPEG', quality=80, progressive=True),
        '16-bit': lambda im, f: f.write(cv2.imencode('.png', np.asarray(im)[..., ::-1].astype(np.uint16)*257)[1].tobytes()),
        'palette': lambda im, f: im.quantize(64).save(f, 'PNG'), 'alpha': lambda im, f: alpha(im).save(f, 'PNG'),
        'WebP': lambda im, f: im.save(f, 'WEBP', quality=85), 'TIFF': lambda im, f: im.save(f, 'TIFF', compression='tiff_deflate'),
        'large PNG': lambda im, f: im.resize((im.width*3, im.height*3)).save(f, 'PNG', compress_level=1), 'GIF': lambda im, f: im.save(f, 'GIF')}
    out = {}
    for i, photo in enumerate(photos[:n]):
        kind, save = [*kinds.items()][i % len(kinds)]
        buffer = io.BytesIO()
        save(Image.open(photo).convert('RGB'), buffer)
        name = f'{i:03}.jpg'  # the library looks at the contents
        (Path(folder)/name).write_bytes(buffer.getvalue())
        out[name] = kind
    return out

def usual_transforms(size):
    "{name: bytes -> uint8 [size, size, 3]} as others write them"
    from PIL import Image
    def crop(raw):  # our crop, resized by Pillow
        im = Image.open(io.BytesIO(raw)).convert('RGB')
        side = min(im.size)*0.875
        x, y = (im.width - side)/2, (im.height - side)/2
        return np.asarray(im.resize((size, size), Image.BILINEAR, (x, y, x + side, y + side)))
    def usual(raw):  # Resize(256), CenterCrop(224)
        im = Image.open(io.BytesIO(raw)).convert('RGB')
        k = round(size/0.875)/min(im.size)
        im = im.resize((round(im.width*k), round(im.height*k)), Image.BILINEAR)
        x, y = (im.width - size)//2, (im.height - size)//2
        return np.asarray(im.crop((x, y, x + size, y + size)))
    def squash(raw): return np.asarray(Image.open(io.BytesIO(raw)).convert('RGB').resize((size, size), Image.BILINEAR))
    return {'the same crop by Pillow': crop, "torchvision's usual transform": usual, 'squashed to a square': squash}

def trained_run(shared):
    from imgexp.evaluate import load_run
    from imgexp.transfer import train
    run = train(data=str(shared/'data/clothing'), arch='mobilenet_v2', weights=str(shared/'weights/mobilenet_v2-converted.pth'), epochs=10,
                precision='fp32', resume='reuse', track='off')
    return load_run(str(run.dir), device='cpu')

def agree(args):
    from imgexp.deploy import export_run
    trained, rows = trained_run(args.shared), []
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/'files'
        folder.mkdir()
        photos = sorted((args.shared/'data/clothing/test').rglob('*.jpg'))
        kinds = odd_files(photos[::max(1, len(photos)//100)], folder, 100)
        model = export_run(run=str(trained.run.dir), out=f'{d}/export').model()
        from imgexp.trained import unlabeled_table
        from imgexp.packs import prepare_like
        table = prepare_like(unlabeled_table(folder, trained.classes), trained.run.depends.get('prepared', ''))
        expected, at, skipped = trained.probabilities(table, 'test', 'skip')
        assert not skipped, skipped
        names = [table.items[r] for r in at]
        def compare(name, files, expected, pixels):
            ours = np.concatenate([model.probabilities(np.stack([pixels(f.read_bytes())])) for f in files])
            d, same = np.abs(ours - expected).max(1), (ours.argmax(1) == expected.argmax(1)).mean()
            rows.append(dict(preprocessing=name, files=len(files), same_answer=round(same, 4), largest_difference=f'{d.max():.2g}', **machine('cpu')))
            log(f'{name}: {same:.1%} of {len(files)} answers, largest difference {d.max():.2g}')
        compare('the export, 100 files of 13 kinds', [folder/n for n in names], expected, model.pixels)
        plain, labels, pictures = trained.predict_split('test')
        files = [Path(pictures.table.source.path(pictures.table.indices[r])) for r in pictures.rows]
        for name, f in {'the export, test photos': model.pixels, **usual_transforms(trained.size)}.items(): compare(name, files, plain, f)
    write('deploy-agree', rows)

# ---- The page

class Visitor:
    "One visitor of the page over HTTP: upload a photo, ask, read the events, fetch the map."
    def __init__(self, url, fn): self.url, self.fn = url, fn
    def answer(self, raw, with_map):
        import requests
        path = requests.post(f'{self.url}/gradio_api/upload', files={'files': ('photo.jpg', raw)}, timeout=60).json()[0]
        name = os.urandom(5).hex()
        photo = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
        joined = requests.post(f'{self.url}/gradio_api/queue/join', json={'data': [photo, with_map], 'fn_index': self.fn, 'session_hash': name}, timeout=60)
        joined.raise_for_status()
        import json
        with requests.get(f'{self.url}/gradio_api/queue/data', params={'session_hash': name}, stream=True, timeout=60) as events:
            for line in events.iter_lines():
                event = json.loads(line[5:]) if line.startswith(b'data:') else {}
                if event.get('msg') != 'process_completed': continue
                bars, sentence, picture = event['output']['data']
                assert event['success'] and bars['label'], sentence
                if with_map: requests.get(picture['url'], timeout=60).raise_for_status()
                return

def page(args):
    import re, requests
    from imgexp.deploy import export_run
    trained = trained_run(args.shared)
    photos = [p.read_bytes() for p in sorted((args.shared/'data/clothing/test').rglob('*.jpg'))[:100]]
    with tempfile.TemporaryDirectory() as d:
        folder = export_run(run=str(trained.run.dir), out=f'{d}/export', space=True).folder
        subprocess.run([sys.executable, '-m', 'venv', f'{d}/venv'], check=True)
        subprocess.run([f'{d}/venv/bin/pip', 'install', '-q', '-r', str(folder/'requirements.txt')], check=True)
        installed = sum(f.stat().st_size for f in Path(f'{d}/venv').rglob('*') if f.is_file() and not f.is_symlink())/1e6
        env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'OMP_NUM_THREADS')}
        rows = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            server = subprocess.Popen([f'{d}/venv/bin/python', 'app.py'], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
            try:
                server.stdout.readline()  # it says where it listens when it is ready
                ready, url = time.perf_counter() - start, 'http://127.0.0.1:7860'
                config = requests.get(f'{url}/config', timeout=20).json()
                visitor = Visitor(url, next(i for i, f in enumerate(config['dependencies']) if len(f['targets']) == 2))
                for with_map in (False, True):
                    seconds, errors = [], []
                    def visit(raw):
                        begun = time.perf_counter()
                        try: visitor.answer(raw, with_map)
                        except Exception as e: errors.append(e)
                        else: seconds.append(time.perf_counter() - begun)
                    threads = [threading.Thread(target=visit, args=(photos[i],)) for i in range(50)]
                    begun = time.perf_counter()
                    for t in threads: t.start()
                    for t in threads: t.join()
                    total = time.perf_counter() - begun
                    memory = int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{server.pid}/status').read_text())[1])/1000
                    rows.append(dict(maps=with_map, visitors=50, errors=len(errors), answers_per_second=round(len(seconds)/total, 1), median_s=round(statistics.median(seconds), 2),
                                     p95_s=round(sorted(seconds)[int(0.95*len(seconds))], 2), ready_s=round(ready, 1), peak_MB=round(memory), installed_MB=round(installed), **machine('cpu')))
                    log(str(rows[-1]))
            finally:
                server.terminate()
                server.wait()
    write('deploy-page', rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['speed', 'agree', 'page'])
    parser.add_argument('shared', type=Path, nargs='?')
    parser.add_argument('--rounds', type=int, default=0, help='(30 of speed, 3 of page)')
    args = parser.parse_args()
    args.rounds = args.rounds or {'speed': 30}.get(args.what, 3)
    {'speed': speed, 'agree': agree, 'page': page}[args.what](args)

if __name__ == '__main__': main()
