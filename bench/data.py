"""Speed of data loading: imgexp and other loaders on the same JPEG files with the same work, in alternation (A B A B …).

    python bench/data.py path/to/class/folders --only loaders --repeats 5

Each contender runs in its own process, which waits while the others are measured. An interrupted table is resumed.
Prints the tables and writes their rows, with the machine, to bench/results/data.csv. See bench/README.md.
"""
import argparse, json, os, random, statistics, subprocess, sys, tempfile, time
from ctypes.util import find_library
from functools import partial
from pathlib import Path

import numpy as np
from tables import compare, discard_progress, interleave, machine, met, save, show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'bench'/'results'/'data.csv'
IMAGES = int(os.environ.get('IMGEXP_BENCH_IMAGES', 12_000))  # images per pass
BATCH, WORKERS, SCALE = 64, 2, (0.35, 1.)
SIZE = int(os.environ.get('IMGEXP_BENCH_SIZE', 224))  # px of the crops
RESIDENT = 64  # px, side of images in memory
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def list_files(folder):
    "IMAGES (path, label) pairs, cycling through the files of the class folders"
    classes = sorted(d.name for d in Path(folder).iterdir() if d.is_dir())
    files = [(str(f), c) for c, name in enumerate(classes) for f in sorted((Path(folder)/name).iterdir())]
    return [files[i % len(files)] for i in range(IMAGES)]

# ---- Contenders: folder -> an iterable of (images, labels) batches, one pass per iteration

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

def _crop(height, width):
    "Random crop (top, left, height, width), and the largest scale 1/k for decoding that leaves SIZE px in the crop"
    import torch
    from torchvision.transforms import RandomResizedCrop
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), SCALE, (3/4, 4/3))
    return (top, left, h, w), next((k for k in (8, 4, 2) if min(h, w) >= k*SIZE), 1)

class _Drafted:
    "Crop and resize an image opened by Pillow; `draft` decodes it at reduced size if the crop allows"
    def __call__(self, image):
        from PIL import Image
        width, height = image.size
        (top, left, h, w), k = _crop(height, width)
        if k > 1: image.draft('RGB', (width//k, height//k))
        x, y = image.width/width, image.height/height
        return image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left*x, top*y, (left + w)*x, (top + h)*y), reducing_gap=None)

def _opened(path):
    from PIL import Image
    return Image.open(path)

def usual_draft(folder):
    from torchvision import transforms as T
    return _torch_loader(_image_folder(folder, T.Compose([_Drafted(), T.RandomHorizontalFlip(), T.PILToTensor()]), loader=_opened))

class _Turbo:
    "The same from the bytes of a JPEG, with libjpeg-turbo and OpenCV"
    def __call__(self, raw):
        import cv2, simplejpeg, torch
        height, width = simplejpeg.decode_jpeg_header(raw)[:2]
        (top, left, h, w), k = _crop(height, width)
        image = simplejpeg.decode_jpeg(raw, 'RGB', min_height=-(-height//k), min_width=-(-width//k))
        y, x = image.shape[0]/height, image.shape[1]/width
        crop = image[round(top*y):round((top + h)*y), round(left*x):round((left + w)*x)]
        interpolation = cv2.INTER_AREA if min(crop.shape[:2]) >= SIZE else cv2.INTER_LINEAR
        crop = cv2.resize(crop, (SIZE, SIZE), interpolation=interpolation)
        if random.random() < 0.5: crop = cv2.flip(crop, 1)
        return torch.from_numpy(crop)

def usual_turbo(folder):
    import cv2
    cv2.setNumThreads(1)
    return _torch_loader(_image_folder(folder, _Turbo(), loader=lambda path: Path(path).read_bytes()))

def torchvision_io(folder):
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2
    transform = v2.Compose([v2.RandomResizedCrop(SIZE, SCALE, antialias=True), v2.RandomHorizontalFlip()])
    return _torch_loader(_image_folder(folder, transform, loader=lambda path: decode_jpeg(read_file(path), ImageReadMode.RGB)))

def timm(folder, draft=False):
    from timm.data import create_loader
    dataset = _image_folder(folder, None, **({'loader': _opened} if draft else {}))
    loader = create_loader(dataset, (3, SIZE, SIZE), BATCH, is_training=True, use_prefetcher=True, scale=SCALE,
                          color_jitter=None, interpolation='bilinear', num_workers=WORKERS, persistent_workers=True,
                          device=__import__('torch').device('cpu'))
    if draft: dataset.transform.transforms[0] = _Drafted()  # in place of its RandomResizedCropAndInterpolation
    return loader.loader  # uint8, without the prefetcher, which would normalize

def fastai(folder):
    from fastai.vision.all import (CategoryBlock, DataBlock, Flip, ImageBlock, RandomResizedCrop)
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda path: Path(path).parent.name, splitter=lambda items: (range(len(items)), []),
                      batch_tfms=Flip(0.5), item_tfms=RandomResizedCrop(SIZE, min_scale=SCALE[0]))
    return block.dataloaders([path for path, _ in list_files(folder)], bs=BATCH, num_workers=WORKERS, device='cpu', persistent_workers=True).train

def spdl(folder):
    import spdl.io
    from spdl.pipeline import PipelineBuilder
    files = list_files(folder)
    def decode(item):
        area, ratio = random.uniform(*SCALE), 2**random.uniform(np.log2(3/4), np.log2(4/3))
        crop = (f"crop=w='min(iw,sqrt(iw*ih*{area*ratio}))':h='min(ih,sqrt(iw*ih*{area/ratio}))'"
                f":x='(iw-ow)*{random.random()}':y='(ih-oh)*{random.random()}'")
        filters = f"{crop},scale={SIZE}:{SIZE}:flags=bilinear,format=pix_fmts=rgb24{',hflip' if random.random() < .5 else ''}"
        return spdl.io.decode_packets(spdl.io.demux_image(item[0]), filter_desc=filters), item[1]
    def batch(items):
        images, labels = zip(*items)
        return spdl.io.to_torch(spdl.io.convert_frames(list(images))), labels
    class Loader:
        def __iter__(self):
            order = random.sample(files, len(files))
            pipeline = (PipelineBuilder().add_source(order).pipe(decode, concurrency=WORKERS, output_order='input').aggregate(BATCH)
                    .pipe(batch).add_sink(2).build(num_threads=WORKERS + 1))
            with pipeline.auto_stop(): yield from pipeline
    return Loader()

def webdataset(folder, turbo=False):
    import webdataset as wds
    from torchvision import transforms as T
    place = Path(tempfile.mkdtemp())
    with wds.ShardWriter(str(place/'%05d.tar'), maxcount=min(1000, IMAGES//4), verbose=0) as out:
        for i, (path, c) in enumerate(list_files(folder)): out.write({'__key__': f'{i:06d}', 'jpg': Path(path).read_bytes(), 'cls': c})
    transform = T.Compose([T.RandomResizedCrop(SIZE, SCALE), T.RandomHorizontalFlip(), T.PILToTensor()])
    shards = sorted(map(str, place.glob('*.tar')))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)
    if not turbo: dataset = dataset.decode('pil')
    dataset = dataset.to_tuple('jpg', 'cls').map_tuple(_Turbo() if turbo else transform, int).batched(BATCH)
    return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)

def hugging_face(folder):
    import datasets, torch
    from torchvision import transforms as T
    transform = T.Compose([T.RandomResizedCrop(SIZE, SCALE), T.RandomHorizontalFlip(), T.PILToTensor()])
    data = datasets.load_dataset('imagefolder', data_dir=str(folder), split='train', cache_dir=tempfile.mkdtemp())
    data.set_transform(lambda rows: {'image': [transform(i.convert('RGB')) for i in rows['image']], 'label': rows['label']})
    data = data.select([i % len(data) for i in range(IMAGES)])
    collate = lambda rows: (torch.stack([r['image'] for r in rows]), torch.tensor([r['label'] for r in rows]))
    return _torch_loader(data, collate_fn=collate)

def _tf_augmented(images, decode, shrink=False):
    "Crop, flip and batch in tf.data, from a data set of (image or encoded JPEG, label)"
    import tensorflow as tf
    def transform(image, label):
        shape = tf.image.extract_jpeg_shape(image) if decode else tf.shape(image)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([1, 0, 4]), area_range=SCALE, aspect_ratio_range=(3/4, 4/3), use_image_if_no_bounding_boxes=True)
        if shrink:  # decode_jpeg can reduce the size; decode_and_crop_jpeg cannot
            side = tf.reduce_min(size[:2])
            ratio = tf.where(side >= 4*SIZE, 4, tf.where(side >= 2*SIZE, 2, 1))
            whole = tf.switch_case(ratio//2, [lambda r=r: tf.image.decode_jpeg(image, channels=3, ratio=r) for r in (1, 2, 4)])
            part = tf.slice(whole, tf.concat([begin[:2]//ratio, [0]], 0), tf.concat([size[:2]//ratio, [3]], 0))
        elif decode: part = tf.image.decode_and_crop_jpeg(image, tf.concat([begin[:2], size[:2]], 0), channels=3)
        else: part = tf.slice(image, begin, size)
        part = tf.image.resize(part, (SIZE, SIZE), antialias=True)
        return tf.image.random_flip_left_right(part), label
    made = images.map(transform, num_parallel_calls=WORKERS).batch(BATCH).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size, options.threading.max_intra_op_parallelism = WORKERS, 1
    return made.with_options(options)

def keras_directory(folder):
    import keras
    files = keras.utils.image_dataset_from_directory(folder, image_size=(533, 400), batch_size=None, shuffle=True, verbose=False)
    return _tf_augmented(files.repeat().take(IMAGES), decode=False)

def tf_data(folder, shrink=False):
    import tensorflow as tf
    paths, labels = zip(*list_files(folder))
    files = tf.data.Dataset.from_tensor_slices((list(paths), list(labels))).shuffle(IMAGES)
    return _tf_augmented(files.map(lambda p, c: (tf.io.read_file(p), c), num_parallel_calls=WORKERS), True, shrink)

def _imgexp(table, size=SIZE, workers=WORKERS, augment='crop-flip'):
    from imgexp.loader import Loader
    rows = np.arange(IMAGES) % len(table)
    class Epochs:
        loader, epoch = Loader(table.take(rows), 'train', size, BATCH, augment, workers=workers), 0
        def __iter__(self):
            self.epoch += 1
            return iter(self.loader.at(self.epoch))
    return Epochs()

def _packed(folder, kind, size):
    from imgexp.write_packs import build_pack
    from imgexp.packs import from_pack
    place = Path(tempfile.gettempdir())/'imgexp-bench'
    return from_pack(build_pack(folder, size, kind, place, say=lambda line: None))

def imgexp_folders(folder, full=False):
    import imgexp.loader
    from imgexp.decoding import decode
    from imgexp.folders import from_folders
    if full: imgexp.loader.decode = lambda raw, height=0, width=0, *more, **kw: decode(raw, 0, 0, *more, **kw)
    return _imgexp(from_folders(folder))

def imgexp_jpeg(folder): return _imgexp(_packed(folder, 'jpeg', 256))
def imgexp_raw(folder): return _imgexp(_packed(folder, 'raw', 256))

# ---- Contenders whose images are in memory, RESIDENT px

def imgexp_resident(folder, pack='memory-64', workers=0, augment='crop-flip'):
    from imgexp.folders import from_folders
    from imgexp.packs import prepare_images
    return _imgexp(prepare_images(from_folders(folder), RESIDENT, pack, say=lambda line: None), RESIDENT, workers, augment)

def _tensors(folder, side=RESIDENT):
    "All images as uint8 [IMAGES, 3, side, side], and their labels"
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2
    resize, images = v2.Resize((side, side), antialias=True), {}
    for path, _ in list_files(folder):
        if path not in images: images[path] = resize(decode_jpeg(read_file(path), ImageReadMode.RGB))
    paths, labels = zip(*list_files(folder))
    return torch.stack([images[p] for p in paths]), torch.tensor(labels)

class _Batched:
    "Shuffled batches of tensors in memory, each passed to `transform`"
    def __init__(self, x, y, transform): self.x, self.y, self.transform = x, y, transform
    def __iter__(self):
        import torch
        for rows in torch.randperm(len(self.x)).split(BATCH): yield self.transform(self.x[rows]), self.y[rows]

def tensors_plain(folder): return _Batched(*_tensors(folder), lambda x: x)

def tensors_grid(folder, side=RESIDENT):
    "Random crop and flip of each image, for the whole batch in one operation, as on a GPU"
    import torch
    import torch.nn.functional as F
    def transform(x):
        n, (low, high) = len(x), np.log2([3/4, 4/3])
        area, shape = torch.empty(n).uniform_(*SCALE), 2**torch.empty(n).uniform_(low, high)
        w, h = (area*shape).sqrt().clamp(max=1), (area/shape).sqrt().clamp(max=1)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = w*(1 - 2*(torch.rand(n) < 0.5).float()), h
        theta[:, 0, 2], theta[:, 1, 2] = (2*torch.rand(n) - 1)*(1 - w), (2*torch.rand(n) - 1)*(1 - h)
        return F.grid_sample(x.float(), F.affine_grid(theta, (n, 3, RESIDENT, RESIDENT), align_corners=False), align_corners=False)
    return _Batched(*_tensors(folder, side), transform)

def tensors_each(folder, workers=0):
    "TensorDataset with torchvision's transforms, image by image"
    import torch
    from torchvision.transforms import v2
    x, y = _tensors(folder)
    transform = v2.Compose([v2.RandomResizedCrop(RESIDENT, SCALE, antialias=True), v2.RandomHorizontalFlip()])
    class Transformed(torch.utils.data.TensorDataset):
        def __getitem__(self, i): return transform(self.tensors[0][i]), self.tensors[1][i]
    return torch.utils.data.DataLoader(Transformed(x, y), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

OURS, FULL = 'imgexp, class folders', 'imgexp, class folders, decoded at full scale'
SHRINKING = {
    'ImageFolder, Pillow with draft, uint8': usual_draft, 'ImageFolder, libjpeg-turbo and OpenCV, uint8': usual_turbo,
    'timm with draft, uint8': partial(timm, draft=True), 'webdataset, libjpeg-turbo and OpenCV, uint8': partial(webdataset, turbo=True)}
LOADERS = {
    'ImageFolder, Pillow, uint8 (the usual loader)': usual_uint8, 'ImageFolder, Pillow, float32': usual,
    'torchvision.io, transforms v2, uint8': torchvision_io, 'timm, uint8': timm, 'fastai': fastai, 'spdl, uint8': spdl,
    'webdataset, uint8': webdataset, 'Hugging Face datasets, uint8': hugging_face,
    'Keras image_dataset_from_directory': keras_directory, 'tf.data, decode_and_crop_jpeg': tf_data, **SHRINKING,
    FULL: partial(imgexp_folders, full=True), OURS: imgexp_folders, 'imgexp, pack of 256 px JPEG': imgexp_jpeg,
    'imgexp, pack of 256 px raw': imgexp_raw}
SMALL = {'ImageFolder, Pillow, uint8 (the usual loader)': usual_uint8, 'torchvision.io, transforms v2, uint8': torchvision_io, 'spdl, uint8': spdl,
         'tf.data, decode_and_crop_jpeg': tf_data, **SHRINKING, 'tf.data, decode_jpeg with a ratio': partial(tf_data, shrink=True),
         FULL: partial(imgexp_folders, full=True), OURS: imgexp_folders}  # with crops small enough for decoding at reduced size
MEMORY_64 = {
    'TensorDataset, transforms v2 image by image': tensors_each, 'TensorDataset, transforms v2 image by image, 2 workers': partial(tensors_each, workers=2),
    'uint8 tensors, cropped and mirrored by grid_sample, batch by batch': tensors_grid, 'imgexp, resident, 64 px': imgexp_resident,
    'uint8 tensors of 128 px, seen at 64 by grid_sample': partial(tensors_grid, side=128),
    'imgexp, resident at 128 px, seen at 64': partial(imgexp_resident, pack='memory-128'),
    'uint8 tensors, not augmented': tensors_plain, 'imgexp, resident, not augmented': partial(imgexp_resident, augment='none')}
CONTENDERS = {'loaders': LOADERS, 'loaders-112': SMALL, 'resident': MEMORY_64}

# ---- A contender's process: one pass per line of standard input

def serve(table, name, folder):
    "For each line on stdin, make a pass over all images and print images per second"
    loader = CONTENDERS[table][name](folder)
    for _ in sys.stdin:
        start, n = time.perf_counter(), 0
        for batch in loader: n, end = n + len(batch[1]), time.perf_counter()  # up to the last batch: tf.data ends its threads for seconds
        print(json.dumps(n/(end - start)), flush=True)
        assert n > IMAGES - BATCH, f'{name} gave {n} images'

class Contender:
    "A contender in its own process, started by the first call; each call makes a pass and returns images per second"
    def __init__(self, table, name, folder):
        self.table, self.name, self.folder, self.process = table, name, folder, None
    def _start(self):
        env = os.environ | {'PYTHONWARNINGS': 'ignore', 'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1',
                            'IMGEXP_BENCH_SIZE': '112' if self.table == 'loaders-112' else '224', 'IMGEXP_BENCH_IMAGES': str(IMAGES)}
        self.err = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen([sys.executable, __file__, str(self.folder), '--only', self.table, '--serve', self.name], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.err, text=True, env=env, cwd=ROOT)
    def __call__(self):
        if self.process is None: self._start()
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            try: return float(line)
            except ValueError: pass  # printed by a library
        self.err.seek(0)
        sys.exit(f'bench: {self.name!r} failed:\n{self.err.read()[-2000:]}')
    def close(self):
        if self.process is None: return
        self.process.stdin.close()
        self.process.terminate()

def speeds(table, folder, args):
    "{contender: images per second of each round}"
    names = [n for n in CONTENDERS[table] if not args.contenders or any(o in n for o in args.contenders.split(','))]
    if not find_library('avutil') and any(n.startswith('spdl') for n in names):
        print('spdl is skipped: it needs FFmpeg', file=sys.stderr)
        names = [n for n in names if not n.startswith('spdl')]
    contenders = {n: Contender(table, n, folder) for n in names}
    try: return interleave(table, contenders, args.repeats, 1, {'folder': str(folder), 'images': IMAGES}, not (args.dry or args.contenders))
    finally:
        for c in contenders.values(): c.close()

# ---- Training from memory: images per second of a loop on random tensors, and on a resident data set

def training(folder):
    "{source: function that returns images per second of 30 steps}: ResNet-18 at 64 px, as in the loop of bench/train.py"
    import torch, torchvision
    import torch.nn.functional as F
    from imgexp.learner import choose_precision, to_input
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).train().to(memory_format=torch.channels_last)
    opt, bf16 = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), choose_precision('auto', 'cpu') == 'bf16'
    epochs = imgexp_resident(folder)
    for _ in epochs: pass  # decode all images
    random = [(torch.randint(0, 256, (BATCH, 64, 64, 3), dtype=torch.uint8), torch.randint(0, 10, (BATCH,)))]*33
    def speed(batches, steps=30, warm=3):
        for k, (images, labels) in enumerate(batches):
            if k == warm: start = time.perf_counter()
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16): out = model(to_input(images, (MEAN, STD)))
            F.cross_entropy(out.float(), labels).backward()
            opt.step()
            opt.zero_grad()
            if k + 1 == warm + steps: return steps*BATCH/(time.perf_counter() - start)
    return {'random tensors': lambda: speed(random), 'imgexp, resident, 64 px': lambda: speed(epochs)}

# ---- Time and memory of a fresh process

def run_code(code, *args):
    "Run `code` in a new Python process; returns its last line of output, parsed as JSON"
    command = [sys.executable, '-c', 'import sys, time\n' + code, *map(str, args)]
    result = subprocess.run(command, cwd=ROOT/'bench', capture_output=True, text=True)
    if result.returncode: sys.exit(f'bench: {result.stderr.strip()}')
    return json.loads(result.stdout.splitlines()[-1])

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
import json, imgexp.loader, imgexp.sources, torch
imported = time.perf_counter()
next(iter(imgexp.loader.Loader(imgexp.sources.load_images(sys.argv[1]), 'train', 224, 64, 'crop-flip', workers=2)))
print(json.dumps(time.perf_counter() - imported))
'''

INDEX = '''
import json, psutil, pyarrow, imgexp.sources
def megabytes(): return psutil.Process().memory_info().rss/1e6
imported, before = time.perf_counter(), megabytes()
table = imgexp.sources.load_images(sys.argv[1])
assert len(table) == 1_281_167
print(json.dumps([time.perf_counter() - imported, megabytes() - before]))
'''

def large_index(folder, n=1_281_167, classes=1000):
    "A pack with an index as large as ImageNet's and 1,500 placeholder files instead of images"
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

def growth_rows(table, values):
    "Yield a row for each (contender, values, target); ratio: last value over first"
    for name, measured, target in values:
        row = dict(table=table, contender=name, n=len(measured), median=statistics.median(measured), min=min(measured),
                   max=max(measured), ratio=measured[-1]/measured[0], ratio_min='', ratio_max='', target=target)
        yield {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()} | {'met': met(row)}

# ---- Tables: folder and command-line arguments -> rows

def table_loaders(folder, args, table='loaders'):
    values = speeds(table, folder, args)
    rows = list(compare(table, values, TARGETS if table == 'loaders' else {}))
    if args.contenders: return rows
    best = max((k for k in values if not k.startswith('imgexp')), key=lambda k: statistics.median(values[k]))  # peer
    return rows + list(compare(f'{table} against the best peer', {k: values[k] for k in (best, FULL, OURS)}, {FULL: 'ratio >= 1', OURS: 'ratio >= 1'}))

def table_resident(folder, args): return list(compare('resident', speeds('resident', folder, args), {}))

def table_training(folder, args):
    values = interleave('training', training(folder), args.repeats, 1, {'folder': str(folder)}, not args.dry)
    return list(compare('training', values, {'imgexp, resident, 64 px': 'ratio >= 0.95'}))

def table_memory(folder, args):
    cases = [('imgexp, class folders', 2), ('imgexp, class folders', 8), ('imgexp, pack of 256 px JPEG', 2), ('imgexp, pack of 256 px raw', 2)]
    return list(growth_rows('memory after each epoch, MB', [(f'{name}, {w} workers', run_code(MEMORY, folder, name, w), 'ratio <= 1.05') for name, w in cases]))

def table_start(folder, args):
    place = {k: str(_packed(folder, k, 256).source.path) for k in ('jpeg', 'raw')}
    rows = [(f'first batch from a pack, {k}', [run_code(FIRST, p) for _ in range(args.repeats)], 'median <= 1.5') for k, p in place.items()]
    with tempfile.TemporaryDirectory() as d:
        large = large_index(Path(d)/'large')
        opened = [run_code(INDEX, large) for _ in range(args.repeats)]
    rows.append(('index of 1,281,167 images: seconds', [s for s, _ in opened], 'median <= 2'))
    rows.append(('index of 1,281,167 images: MB', [m for _, m in opened], 'median <= 300'))
    return list(growth_rows('start', rows))

def accuracy(folder, pack, seed, weights):
    "Test top-1 of a frozen MobileNetV2 with a new head, trained from class folders or a pack"
    args = ['--data', folder, '--arch', 'mobilenet_v2', '--weights', weights, '--retrain', 0, '--size', SIZE, '--subset', 0.5, '--epochs', 2,
            '--batch-size', 64, '--seed', seed, '--pack', pack, '--track', 'off', '--resume', 'never']
    with tempfile.TemporaryDirectory() as root:
        env = os.environ | {'IMGEXP_ROOT': root, 'IMGEXP_DATA': str(Path(tempfile.gettempdir())/'imgexp-bench-data')}
        for kind in ('jpeg', 'raw'):
            if pack.startswith(kind): subprocess.run([sys.executable, '-m', 'imgexp.cli', 'data', 'pack', folder, '--kind', kind], env=env, check=True, capture_output=True)
        subprocess.run([sys.executable, '-m', 'imgexp.cli', 'train', *map(str, args)], env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads(next(Path(root).glob('runs/*/metrics.json')).read_text())['test']['top1']['value']

def table_accuracy(folder, args):
    forms = {'class folders': 'off', 'pack of 256 px JPEG': 'jpeg-256', 'pack of 256 px raw': 'raw-256'}
    values = {name: [] for name in forms}
    for seed in range(args.repeats):
        for name, pack in forms.items():
            values[name].append(accuracy(folder.parent if folder.name == 'train' else folder, pack, seed, args.weights))
            print(f'{name}, seed {seed}: {values[name][-1]:.1%}', file=sys.stderr, flush=True)
    return list(compare('test top-1', values, {}))

TARGETS = {FULL: 'ratio >= 1.4', OURS: 'ratio >= 1.4', 'imgexp, pack of 256 px JPEG': 'ratio >= 3', 'imgexp, pack of 256 px raw': 'ratio >= 7'}
TABLES = {'loaders': table_loaders, 'loaders-112': partial(table_loaders, table='loaders-112'), 'resident': table_resident, 'training': table_training, 'memory': table_memory,
          'start': table_start, 'accuracy': table_accuracy}
ORDER = ['loaders', 'loaders against the best peer', 'loaders-112', 'loaders-112 against the best peer', 'resident', 'training',
         'memory after each epoch, MB', 'start', 'test top-1']

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', help='folder with class folders of JPEG files')
    parser.add_argument('--only', default='loaders,loaders-112,resident,training,memory,start', help='comma-separated tables (%(default)s; also accuracy)')
    parser.add_argument('--contenders', default='', help='comma-separated parts of names: measure only these loaders, without writing results')
    parser.add_argument('--repeats', type=int, default=5, help='counted rounds (%(default)s)')
    parser.add_argument('--dry', action='store_true', help='print, but do not write the results')
    parser.add_argument('--weights', default='imagenet', help='weights of MobileNetV2 for the table accuracy: a file, or imagenet (%(default)s)')
    parser.add_argument('--serve', help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    if not folder.is_dir(): parser.error(f'{args.folder}: no such folder')
    names = args.only.split(',')
    if unknown := [n for n in names if n not in TABLES]:
        parser.error(f"--only: no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    if args.serve: return serve(names[0], args.serve, folder)
    if args.weights != 'imagenet': args.weights = str(Path(args.weights).resolve())
    rows = []
    for name in names:
        start = time.monotonic()
        table_rows = [r | machine('cpu') for r in TABLES[name](folder, args)]
        print(f'{name}: {(time.monotonic() - start)/60:.1f} minutes', file=sys.stderr)
        if not args.dry and not args.contenders:
            save(table_rows, RESULTS, ORDER)
            discard_progress(name)
        rows += table_rows
    show(rows)

if __name__ == '__main__': main()
