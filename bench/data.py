"""Speed of loading: imgexp's loader beside others, on the same JPEG files, with the same work, in turn (A B A B …).

    python bench/data.py path/to/class/folders --only loaders --repeats 5

Each contender lives in a process of its own, which waits while the others have their turn. Prints the tables and writes
their rows, with the machine, into bench/results/data.csv. See bench/README.md.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
from tables import compare, machine, met, save, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'bench'/'results'/'data.csv'
IMAGES, BATCH, WORKERS, SIZE, SCALE = 12_000, 64, 2, 224, (0.35, 1.)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def listed(folder):
    "IMAGES paths and labels: the files of the class folders, again and again"
    classes = sorted(d.name for d in Path(folder).iterdir() if d.is_dir())
    files = [(str(f), c) for c, name in enumerate(classes) for f in sorted((Path(folder)/name).iterdir())]
    return [files[i % len(files)] for i in range(IMAGES)]

# ---- Contenders: folder -> an iterable of batches, one pass each time it is iterated; len(batch) is known from its labels

def _torch_loader(dataset, **kw):
    from torch.utils.data import DataLoader
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, **kw)

def _image_folder(folder, transform, **kw):
    from torchvision.datasets import ImageFolder
    dataset = ImageFolder(folder, transform, **kw)
    dataset.samples = [dataset.samples[i % len(dataset.samples)] for i in range(IMAGES)]
    return dataset

def usual(folder):
    from torchvision import transforms as T
    return _torch_loader(_image_folder(folder, T.Compose([
        T.RandomResizedCrop(SIZE, SCALE), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])))

def usual_uint8(folder):
    from torchvision import transforms as T
    return _torch_loader(_image_folder(folder, T.Compose([
        T.RandomResizedCrop(SIZE, SCALE), T.RandomHorizontalFlip(), T.PILToTensor()])))

def torchvision_io(folder):
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2
    change = v2.Compose([v2.RandomResizedCrop(SIZE, SCALE, antialias=True), v2.RandomHorizontalFlip()])
    return _torch_loader(_image_folder(folder, change, loader=lambda path: decode_jpeg(read_file(path), ImageReadMode.RGB)))

def timm(folder):
    from timm.data import create_loader
    whole = create_loader(_image_folder(folder, None), (3, SIZE, SIZE), BATCH, is_training=True, use_prefetcher=True, scale=SCALE,
                          color_jitter=None, interpolation='bilinear', num_workers=WORKERS, persistent_workers=True,
                          device=__import__('torch').device('cpu'))
    return whole.loader  # uint8; its prefetcher would normalize, as the network's side does here

def fastai(folder):
    from fastai.vision.all import (CategoryBlock, DataBlock, Flip, ImageBlock, RandomResizedCrop)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda path: Path(path).parent.name, splitter=lambda items: (range(len(items)), []),
                      batch_tfms=Flip(0.5), item_tfms=RandomResizedCrop(SIZE, min_scale=SCALE[0]))
    return block.dataloaders([path for path, _ in listed(folder)], bs=BATCH, num_workers=WORKERS, device='cpu', persistent_workers=True).train

def spdl(folder):
    import random, spdl.io
    from spdl.pipeline import PipelineBuilder
    from spdl.io import get_video_filter_desc
    files = listed(folder)
    def decode(item):
        part, ratio = random.uniform(*SCALE), 2**random.uniform(np.log2(3/4), np.log2(4/3))
        crop = (f"crop=w='min(iw,sqrt(iw*ih*{part*ratio}))':h='min(ih,sqrt(iw*ih*{part/ratio}))'"
                f":x='(iw-ow)*{random.random()}':y='(ih-oh)*{random.random()}'")
        change = f"{crop},scale={SIZE}:{SIZE}:flags=bilinear,format=pix_fmts=rgb24{',hflip' if random.random() < .5 else ''}"
        return spdl.io.decode_packets(spdl.io.demux_image(item[0]), filter_desc=change), item[1]
    def batch(items):
        images, labels = zip(*items)
        return spdl.io.to_torch(spdl.io.convert_frames(list(images))), labels
    class Loader:
        def __iter__(self):
            order = random.sample(files, len(files))
            made = (PipelineBuilder().add_source(order).pipe(decode, concurrency=WORKERS, output_order='input').aggregate(BATCH)
                    .pipe(batch).add_sink(2).build(num_threads=WORKERS + 1))
            with made.auto_stop(): yield from made
    return Loader()

def webdataset(folder):
    import tarfile
    import webdataset as wds
    from torchvision import transforms as T
    place = Path(tempfile.mkdtemp())
    with wds.ShardWriter(str(place/'%05d.tar'), maxcount=1000, verbose=0) as out:
        for i, (path, c) in enumerate(listed(folder)): out.write({'__key__': f'{i:06d}', 'jpg': Path(path).read_bytes(), 'cls': c})
    change = T.Compose([T.RandomResizedCrop(SIZE, SCALE), T.RandomHorizontalFlip(), T.PILToTensor()])
    shards = sorted(map(str, place.glob('*.tar')))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode('pil').to_tuple('jpg', 'cls').map_tuple(change, int).batched(BATCH)
    return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)

def hugging_face(folder):
    import datasets, torch
    from torchvision import transforms as T
    change = T.Compose([T.RandomResizedCrop(SIZE, SCALE), T.RandomHorizontalFlip(), T.PILToTensor()])
    data = datasets.load_dataset('imagefolder', data_dir=str(folder), split='train', cache_dir=tempfile.mkdtemp())
    data.set_transform(lambda rows: {'image': [change(i.convert('RGB')) for i in rows['image']], 'label': rows['label']})
    data = data.select([i % len(data) for i in range(IMAGES)])
    collate = lambda rows: (torch.stack([r['image'] for r in rows]), torch.tensor([r['label'] for r in rows]))
    return _torch_loader(data, collate_fn=collate)

def _tf_augmented(images, decode):
    "Crop, flip and batches in tf.data, from a data set of (image or file content, label)"
    import tensorflow as tf
    def change(image, label):
        shape = tf.image.extract_jpeg_shape(image) if decode else tf.shape(image)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([1, 0, 4]), area_range=SCALE, aspect_ratio_range=(3/4, 4/3), use_image_if_no_bounding_boxes=True)
        if decode: part = tf.image.decode_and_crop_jpeg(image, tf.concat([begin[:2], size[:2]], 0), channels=3)
        else: part = tf.slice(image, begin, size)
        part = tf.image.resize(part, (SIZE, SIZE), antialias=True)
        return tf.image.random_flip_left_right(part), label
    made = images.map(change, num_parallel_calls=WORKERS).batch(BATCH).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size, options.threading.max_intra_op_parallelism = WORKERS, 1
    return made.with_options(options)

def keras_directory(folder):
    import keras, tensorflow as tf
    files = keras.utils.image_dataset_from_directory(folder, image_size=(533, 400), batch_size=None, shuffle=True, verbose=False)
    return _tf_augmented(files.repeat().take(IMAGES), decode=False)

def tf_data(folder):
    import tensorflow as tf
    paths, labels = zip(*listed(folder))
    files = tf.data.Dataset.from_tensor_slices((list(paths), list(labels))).shuffle(IMAGES)
    return _tf_augmented(files.map(lambda p, c: (tf.io.read_file(p), c), num_parallel_calls=WORKERS), decode=True)

def _imgexp(table, size=SIZE, workers=WORKERS):
    from imgexp.loader import Loader
    rows = np.arange(IMAGES) % len(table)
    class Epochs:
        loader, epoch = Loader(table.take(rows), 'train', size, BATCH, 'crop-flip', workers=workers), 0
        def __iter__(self):
            self.epoch += 1
            return iter(self.loader.at(self.epoch))
    return Epochs()

def _packed(folder, kind, size):
    from imgexp.packs import from_pack, pack
    place = Path(tempfile.gettempdir())/'imgexp-bench'
    return from_pack(pack(folder, size, kind, place, tell=lambda line: None))

def imgexp_folders(folder):
    from imgexp.data import from_folders
    return _imgexp(from_folders(folder))

def imgexp_jpeg(folder): return _imgexp(_packed(folder, 'jpeg', 256))
def imgexp_raw(folder): return _imgexp(_packed(folder, 'raw', 256))

def imgexp_resident(folder, pack='memory-64', workers=0):
    from imgexp.data import from_folders
    from imgexp.packs import packed
    return _imgexp(packed(from_folders(folder), 64, pack, tell=lambda line: None), 64, workers)

LOADERS = {
    'ImageFolder, Pillow, float32 (the usual loader)': usual, 'ImageFolder, Pillow, uint8': usual_uint8,
    'torchvision.io, transforms v2, uint8': torchvision_io, 'timm, uint8': timm, 'fastai': fastai, 'spdl, uint8': spdl,
    'webdataset, uint8': webdataset, 'Hugging Face datasets, uint8': hugging_face,
    'Keras image_dataset_from_directory': keras_directory, 'tf.data, decode_and_crop_jpeg': tf_data,
    'imgexp, class folders': imgexp_folders, 'imgexp, pack of 256 px JPEG': imgexp_jpeg,
    'imgexp, pack of 256 px raw': imgexp_raw, 'imgexp, resident, 64 px': imgexp_resident,
    'imgexp, resident at 128 px, seen at 64': partial(imgexp_resident, pack='memory-128')}

# ---- A contender's process: a pass for every line that comes in

def serve(name, folder):
    "Print the images a second of a pass over all images, for each line on stdin."
    loader = LOADERS[name](folder)
    for _ in sys.stdin:
        began, n = time.perf_counter(), 0
        for batch in loader: n += len(batch[1])
        print(json.dumps(n/(time.perf_counter() - began)), flush=True)
        assert n > IMAGES - BATCH, f'{name} gave {n} images'

class Contender:
    "A contender in a process of its own; calling it makes a pass"
    def __init__(self, name, folder):
        import torch  # noqa: in the page cache before the children need it
        self.name, env = name, os.environ | {'PYTHONWARNINGS': 'ignore', 'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
        self.err = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen([sys.executable, __file__, str(folder), '--serve', name], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.err, text=True, env=env, cwd=ROOT)
    def __call__(self):
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            try: return float(line)
            except ValueError: pass  # something that a library printed
        self.err.seek(0)
        sys.exit(f'bench: {self.name!r} failed:\n{self.err.read()[-2000:]}')
    def close(self):
        self.process.stdin.close()
        self.process.terminate()

def loaders(folder, repeats, only=()):
    "Images a second of every contender, in turn"
    names = [n for n in LOADERS if not only or any(o in n for o in only)]
    contenders = {n: Contender(n, folder) for n in names}
    values = {n: [] for n in names}
    try:
        for k in range(repeats + 1):
            for name, run in contenders.items():
                speed = run()
                if k: values[name].append(speed)
                print(f'{name}: {speed:,.0f} images/s', file=sys.stderr, flush=True)
    finally:
        for c in contenders.values(): c.close()
    return values

# ---- Training from memory: images a second of a loop on random tensors, and on a resident data set

def training(folder):
    "{source: images a second of 30 steps}: ResNet-18 at 64 px, as in bench/train.py's hand-written loop"
    import torch, torchvision
    import torch.nn.functional as F
    from imgexp.train import choose_precision, to_input
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).train().to(memory_format=torch.channels_last)
    opt, bf16 = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), choose_precision('auto', 'cpu') == 'bf16'
    epochs = imgexp_resident(folder)
    for _ in epochs: pass  # everything is decoded once
    random = [(torch.randint(0, 256, (BATCH, 64, 64, 3), dtype=torch.uint8), torch.randint(0, 10, (BATCH,)))]*33
    def speed(batches, steps=30, warm=3):
        for k, (images, labels) in enumerate(batches):
            if k == warm: began = time.perf_counter()
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16): out = model(to_input(images, (MEAN, STD)))
            F.cross_entropy(out.float(), labels).backward()
            opt.step()
            opt.zero_grad()
            if k + 1 == warm + steps: return steps*BATCH/(time.perf_counter() - began)
    return {'random tensors': lambda: speed(random), 'imgexp, resident, 64 px': lambda: speed(epochs)}

# ---- What a fresh process needs

def fresh(code, *args):
    "What `code` prints as JSON, in a Python of its own"
    done = subprocess.run([sys.executable, '-c', 'import sys, time; start = time.perf_counter()\n' + code, *map(str, args)], cwd=ROOT/'bench',
                          capture_output=True, text=True)
    if done.returncode: sys.exit(f'bench: {done.stderr.strip()}')
    return json.loads(done.stdout.splitlines()[-1])

MEMORY = '''
import json, psutil, data
data.WORKERS = int(sys.argv[3])
loader = data.LOADERS[sys.argv[2]](sys.argv[1])
def megabytes(): m = psutil.Process().memory_full_info(); return m.uss/1e6
def epoch():
    for _ in loader: pass
    return megabytes()
print(json.dumps([epoch() for _ in range(5)]))
'''

FIRST = '''
import json, imgexp.loader, imgexp.packs, torch
imported = time.perf_counter()
next(iter(imgexp.loader.Loader(imgexp.packs.load_images(sys.argv[1]), 'train', 224, 64, 'crop-flip', workers=2)))
print(json.dumps(time.perf_counter() - imported))
'''

INDEX = '''
import json, psutil, pyarrow, imgexp.packs
def megabytes(): return psutil.Process().memory_info().rss/1e6
imported, before = time.perf_counter(), megabytes()
table = imgexp.packs.load_images(sys.argv[1])
assert len(table) == 1_281_167
print(json.dumps([time.perf_counter() - imported, megabytes() - before]))
'''

def large_index(folder, n=1_281_167, classes=1000):
    "A pack as large as ImageNet, without its images: 1,500 files of a few bytes stand for them"
    import pyarrow as pa
    from imgexp.packs import FORMAT
    folder.mkdir(parents=True, exist_ok=True)
    labels, k = np.sort(np.arange(n) % classes), np.arange(n)
    items = [f'train/n{c:08d}/n{c:08d}_{i}.JPEG' for c, i in zip(labels.tolist(), k.tolist())]
    ones = np.full(n, 256, np.int32)
    index = pa.table({'item': pa.array(items, pa.large_string()), 'label': pa.array(labels, pa.int32()), 'split': pa.array(np.zeros(n, np.int8)),
                      'height': ones, 'width': ones, 'sha256': pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), n, [None, pa.py_buffer(np.repeat(k[:, None], 4, 1).tobytes())]),
                      'error': pa.nulls(n, pa.large_string())}, metadata={'build': 'large'})
    with pa.ipc.new_file(str(folder/'index.arrow'), index.schema) as f: f.write(index.combine_chunks())
    files = [f'images-{k:05d}.arrow' for k in range(1500)]
    for name in files: (folder/name).write_bytes(b'none')
    about = {'format': FORMAT, 'build': 'large', 'name': 'large', 'kind': 'jpeg', 'size': 256, 'images': n, 'classes': [f'n{c:08d}' for c in range(classes)],
             'rows': 1000, 'bytes': 0, 'files': dict.fromkeys([*files, 'index.arrow'], '')}
    (folder/'pack.json').write_text(json.dumps(about))
    return folder

def own_rows(table, values):
    "A row for each (contender, values, target); ratio: last over first"
    for name, own, target in values:
        row = dict(table=table, contender=name, n=len(own), median=statistics.median(own), min=min(own), max=max(own), ratio=own[-1]/own[0],
                   ratio_min='', ratio_max='', target=target)
        yield {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()} | {'met': met(row)}

# ---- Tables: folder, repeats -> rows

def table_loaders(folder, repeats, only):
    values = loaders(folder, repeats, only)
    rows = list(compare('loaders', values, TARGETS))
    ours = 'imgexp, class folders'
    if not only:  # the best of the others, round by round
        others = {k: v for k, v in values.items() if not k.startswith('imgexp')}
        uint8 = values['ImageFolder, Pillow, uint8']
        best = max(others, key=lambda k: statistics.median(others[k]))
        rows += list(compare('loaders against uint8', {'ImageFolder, Pillow, uint8': uint8, ours: values[ours]}, {ours: 'ratio >= 1.4'}))
        rows += list(compare('loaders against the best peer', {best: others[best], ours: values[ours]}, {ours: 'ratio >= 1'}))
    return rows

def table_training(folder, repeats, only):
    contenders, values = training(folder), {}
    for k in range(repeats + 1):
        for name, run in contenders.items():
            if speed := run(): values.setdefault(name, []).extend([speed]*(k > 0))
    return list(compare('training', values, {'imgexp, resident, 64 px': 'ratio >= 0.95'}))

def table_memory(folder, repeats, only):
    cases = [('imgexp, class folders', 2), ('imgexp, class folders', 8), ('imgexp, pack of 256 px JPEG', 2), ('imgexp, pack of 256 px raw', 2)]
    return list(own_rows('memory after each epoch, MB', [(f'{name}, {w} workers', fresh(MEMORY, folder, name, w), 'ratio <= 1.05') for name, w in cases]))

def table_start(folder, repeats, only):
    place = {k: str(_packed(folder, k, 256).pack.path) for k in ('jpeg', 'raw')}
    rows = [(f'first batch from a pack, {k}', [fresh(FIRST, p) for _ in range(repeats)], 'median <= 1.5') for k, p in place.items()]
    with tempfile.TemporaryDirectory() as d:
        large = large_index(Path(d)/'large')
        opened = [fresh(INDEX, large) for _ in range(repeats)]
    rows.append(('index of 1,281,167 images: seconds', [s for s, _ in opened], 'median <= 2'))
    rows.append(('index of 1,281,167 images: MB', [m for _, m in opened], 'median <= 300'))
    return list(own_rows('start', rows))

def accuracy(folder, pack, seed, weights):
    "Test top-1 of a frozen MobileNetV2 with a new head, from images in this form"
    args = ['--data', folder, '--arch', 'mobilenet_v2', '--weights', weights, '--retrain', 0, '--size', SIZE, '--subset', 0.5, '--epochs', 2,
            '--batch-size', 64, '--seed', seed, '--pack', pack, '--track', 'off', '--resume', 'never']
    with tempfile.TemporaryDirectory() as root:
        env = os.environ | {'IMGEXP_ROOT': root, 'IMGEXP_DATA': str(Path(tempfile.gettempdir())/'imgexp-bench-data')}
        for kind in ('jpeg', 'raw'):
            if pack.startswith(kind): subprocess.run([sys.executable, '-m', 'imgexp.cli', 'data', 'pack', folder, '--kind', kind], env=env, check=True, capture_output=True)
        subprocess.run([sys.executable, '-m', 'imgexp.cli', 'train', *map(str, args)], env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads(next(Path(root).glob('runs/*/metrics.json')).read_text())['test']['top1']['value']

def table_accuracy(folder, repeats, only):
    forms = {'class folders': 'off', 'pack of 256 px JPEG': 'jpeg-256', 'pack of 256 px raw': 'raw-256'}
    values = {name: [] for name in forms}
    for seed in range(repeats):
        for name, pack in forms.items():
            values[name].append(accuracy(folder.parent if folder.name == 'train' else folder, pack, seed, WEIGHTS))
            print(f'{name}, seed {seed}: {values[name][-1]:.1%}', file=sys.stderr, flush=True)
    return list(compare('test top-1', values, {}))

WEIGHTS = 'imagenet'
TARGETS = {'imgexp, class folders': 'ratio >= 2', 'imgexp, pack of 256 px JPEG': 'ratio >= 5', 'imgexp, pack of 256 px raw': 'ratio >= 10',
           'imgexp, resident, 64 px': 'ratio >= 30'}
TABLES = {'loaders': table_loaders, 'loaders against uint8': None, 'loaders against the best peer': None, 'training': table_training,
          'memory after each epoch, MB': table_memory, 'start': table_start, 'test top-1': None}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', help='class folders of JPEG files')
    parser.add_argument('--only', default='loaders,training,memory,start', help='tables, separated by commas (%(default)s; also accuracy)')
    parser.add_argument('--contenders', default='', help='parts of names, separated by commas: only these loaders, the first is compared with')
    parser.add_argument('--repeats', type=int, default=5, help='rounds that count (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    parser.add_argument('--weights', default='imagenet', help="of MobileNetV2, for the table accuracy: a file, or imagenet (%(default)s)")
    parser.add_argument('--serve', help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    if not folder.is_dir(): parser.error(f'{args.folder}: no such folder')
    if args.serve: return serve(args.serve, folder)
    globals()['WEIGHTS'] = args.weights if args.weights == 'imagenet' else str(Path(args.weights).resolve())
    rows, tables = [], {'loaders': table_loaders, 'training': table_training, 'memory': table_memory, 'start': table_start, 'accuracy': table_accuracy}
    for name in args.only.split(','):
        if name not in tables: parser.error(f"--only: no table {name}; there are {', '.join(tables)}")
    for name in args.only.split(','):
        new = [r | machine('cpu') for r in tables[name](folder, args.repeats, tuple(c for c in args.contenders.split(',') if c))]
        if not args.dry and not args.contenders: save(new, RESULTS, TABLES)
        rows += new
    show(rows)

if __name__ == '__main__': main()
