"""The contenders of bench/train.py: each trains one epoch on the images of a `Task` and returns its seconds per step.

Contenders import their framework when called, so importing this module loads none. Keras runs on torch in this
process, and on TensorFlow in a separate one: `python bench/peers.py '{"arch": "resnet18", …}' fp32`.
"""
import contextlib, io, json, logging, os, statistics, subprocess, sys, tempfile, time, warnings
from collections import namedtuple
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import numpy as np

if __name__ == '__main__': os.environ['KERAS_BACKEND'] = 'tensorflow'
else:
    os.environ.setdefault('KERAS_BACKEND', 'torch')
    sys.modules.setdefault('tensorflow', None)  # Keras loads TensorFlow if it is installed, even with torch as its backend

CLASSES, LR, MOMENTUM = 10, 0.01, 0.9
WARMUP, GROUP = 3, 5  # steps before the clock starts; steps between two readings

# ---- Shared by all contenders

@dataclass
class Task:
    "Random images in memory: one epoch of WARMUP + `steps` batches, and a batch for validation"
    arch: str
    size: int   # px
    batch: int  # images per step
    steps: int  # number of timed steps
    device: str = 'cpu'      # or 'cuda'
    optimizer: str = 'sgd'   # with momentum; or 'adamw'
    precision: str = ''      # of contenders not named fp32; '' for imgexp's choice
    pixels: np.ndarray = field(init=False, repr=False)  # uint8 [n + batch, size, size, 3]
    def __post_init__(self):
        if not self.precision:
            from imgexp.learner import choose_precision
            self.precision = choose_precision('auto', self.device)
        self.n = self.batch*(WARMUP + self.steps)
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (self.n + self.batch, self.size, self.size, 3), np.uint8)
        self.targets = np.arange(self.n + self.batch) % CLASSES
        self.images, self.labels = self.pixels[:self.n], self.targets[:self.n]
        self.workers = 0 if self.device == 'cpu' else min(8, os.cpu_count())  # on a CPU they would take cores from the network

class Clock:
    "Times the steps of a training; `seconds` per step is the median over groups of GROUP steps, after WARMUP steps"
    def __init__(self, task): self.device, self.steps, self.done, self.times = task.device, WARMUP + task.steps, 0, []
    def tick(self):
        self.done += 1
        if self.done >= WARMUP and (self.done - WARMUP) % GROUP == 0: self.times.append(self.now())
    def now(self):
        if self.device == 'cuda':
            import torch
            torch.cuda.synchronize()
        return time.perf_counter()
    @property
    def seconds(self):
        assert self.done == self.steps, f'{self.done} steps instead of {self.steps}'
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:]))/GROUP

def new_network(task):
    import torch, torchvision
    torch.manual_seed(0)
    return torchvision.models.get_model(task.arch, num_classes=CLASSES).to(task.device).train()

@contextlib.contextmanager
def silent():
    "Hide what a framework prints, logs and warns, without disabling it"
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with out, err, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

# ---- imgexp

def run_fit(task, callback, epochs=1, pack='', augment='none', **options):
    "Seconds of `imgexp.fit` with all its callbacks and `callback`; `pack`: folder of a pack to train from"
    from imgexp.data import from_arrays
    from imgexp.loader import IMAGENET
    from imgexp.models import build_model
    from imgexp.sources import load_images
    from imgexp.start import start_run
    from imgexp.fit import fit
    from imgexp.learner import make_learner
    if pack:
        table = load_images(pack)
        table = table.take(np.r_[np.resize(table.split('train'), task.n), table.split('valid')[:task.batch]])
    else: table = from_arrays(task.pixels, task.targets, splits=np.arange(len(task.pixels)) >= task.n)
    model = build_model(task.arch, len(table.classes), size=task.size, stem='standard')
    learn = make_learner(table, model, IMAGENET, task.device, size=task.size, batch_size=task.batch, augment=augment, **options)
    learn.add_cb(callback)
    with tempfile.TemporaryDirectory() as root, silent():
        with start_run('bench', {'resume': 'never', 'track': 'off'}, root=root) as run:
            start = time.perf_counter()
            fit(run, learn, epochs=epochs, optimizer=task.optimizer, lr=LR if task.optimizer == 'sgd' else 1e-3)
            return time.perf_counter() - start

def imgexp_fit(task, **options):
    "One epoch of a run; validation and checkpoint are not timed"
    from imgexp.learner import StatefulCallback
    class Ticks(StatefulCallback):
        order, run_valid = 1000, False  # after every other callback
        def after_batch(self): clock.tick()
    clock = Clock(task)
    run_fit(task, Ticks(), **options)
    return clock.seconds

def callback_seconds(task, epochs):
    "(seconds of `fit` over `epochs` epochs, {callback: seconds spent in it})"
    from imgexp.learner import StatefulCallback
    seconds, clock, call = {}, Clock(task), StatefulCallback.__call__
    def timed(callback, event):
        start = clock.now()
        try: return call(callback, event)
        finally: seconds[callback.name] = seconds.get(callback.name, 0.) + clock.now() - start
    with mock.patch.object(StatefulCallback, '__call__', timed): total = run_fit(task, StatefulCallback(), epochs)
    return total, seconds

# ---- Loops without a framework

def handwritten(task, compile=False):
    "Hand-written loop: uint8 batches on the device, normalized; bf16 autocast, channels-last, fused optimizer"
    import torch
    import torch.nn.functional as F
    from imgexp.loader import IMAGENET
    clock, model = Clock(task), new_network(task).to(memory_format=torch.channels_last)
    if task.optimizer == 'adamw': opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    else: opt = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=5e-4, nesterov=True, fused=True)
    if compile: model = torch.compile(model)
    images, labels = (torch.from_numpy(v).to(task.device) for v in (task.images, task.labels))
    mean, std = (torch.tensor(v, device=task.device)*255 for v in IMAGENET)
    for rows in torch.randperm(len(images), device=task.device).split(task.batch):
        x, y = images[rows], labels[rows]
        x = ((x.float() - mean)/std).permute(0, 3, 1, 2)
        with torch.autocast(task.device, torch.bfloat16, enabled=task.precision == 'bf16'): out = model(x)
        F.cross_entropy(out.float(), y).backward()
        opt.step()
        opt.zero_grad()
        clock.tick()
    return clock.seconds

def normalized_loader(task):
    "DataLoader over the same images, converted to float32 and normalized one by one, as in the reference script"
    import torch
    from torchvision import transforms as T
    from imgexp.loader import IMAGENET
    images, labels = torch.from_numpy(task.images).permute(0, 3, 1, 2).contiguous(), task.labels.tolist()
    transform = T.Compose([T.ConvertImageDtype(torch.float), T.Normalize(*IMAGENET)])
    class Dataset(torch.utils.data.Dataset):
        def __len__(self): return len(images)
        def __getitem__(self, i): return transform(images[i]), labels[i]
    return torch.utils.data.DataLoader(Dataset(), task.batch, shuffle=True, num_workers=task.workers,
                                       pin_memory=task.device == 'cuda')

def reference(task):
    "vision/references/classification/train.py at its defaults (fp32, SGD), without augmentation and metrics"
    import torch
    if task.device == 'cuda': torch.backends.cudnn.benchmark = True
    clock, model, loss_func = Clock(task), new_network(task), torch.nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=1e-4)
    for x, y in normalized_loader(task):
        x, y = x.to(task.device), y.to(task.device)
        loss = loss_func(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        clock.tick()
    return clock.seconds

# ---- Other frameworks at their defaults

def autocast_on_cpu(learn):
    "bf16 for fastai's Learner on a CPU: its own `to_bf16` always uses autocast for cuda"
    import torch
    from fastai.vision.all import MixedPrecision
    class OnCPU(MixedPrecision):
        name = 'mixed_precision'
        def before_fit(self):
            super().before_fit()
            self.autocast = torch.autocast('cpu', torch.bfloat16)
    learn.add_cb(OnCPU('bf16'))
    # otherwise each bf16 convolution on a CPU converts the layout
    learn.model.to(memory_format=torch.channels_last)

def fastai(task, bf16=False):
    "Learner with default callbacks, and fastai's loaders, batch transforms and SGD"
    import torch
    from fastai.vision.all import (SGD, Callback, DataLoaders, IntToFloatTensor, Learner, Normalize, TensorCategory,
                                   TensorImage, imagenet_stats)
    pixels, targets = torch.from_numpy(task.pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(task.targets)
    class Dataset:
        def __init__(self, first, end): self.first, self.n = first, end - first
        def __len__(self): return self.n
        def __getitem__(self, i): return TensorImage(pixels[self.first + i]), TensorCategory(targets[self.first + i])
    class Ticks(Callback):
        order, run_valid = 1000, False
        def after_batch(self): clock.tick()
    sets, clock = (Dataset(0, task.n), Dataset(task.n, len(pixels))), Clock(task)
    transforms = [IntToFloatTensor(), Normalize.from_stats(*imagenet_stats, cuda=task.device == 'cuda')]
    loaders = DataLoaders.from_dsets(*sets, bs=task.batch, device=torch.device(task.device), after_batch=transforms,
                                     num_workers=task.workers, pin_memory=task.device == 'cuda')
    learn = Learner(loaders, new_network(task), torch.nn.functional.cross_entropy, partial(SGD, mom=MOMENTUM))
    if bf16: autocast_on_cpu(learn) if task.device == 'cpu' else learn.to_bf16()
    with silent(): learn.fit(1, LR, cbs=Ticks())
    return clock.seconds

def lightning(task, **options):
    "Trainer with its default logger, progress bar and checkpoint"
    import torch
    import lightning as L
    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_network(task)
        def training_step(self, batch, k):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.model(x), y)
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), LR, MOMENTUM)
    class Ticks(L.Callback):
        def on_train_batch_end(self, *args): clock.tick()
    clock = Clock(task)
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as root, silent():
        trainer = L.Trainer(max_epochs=1, accelerator='gpu' if task.device == 'cuda' else 'cpu', devices=1,
                            default_root_dir=root, callbacks=[Ticks()], **options)
        trainer.fit(Net(), normalized_loader(task))
    return clock.seconds

def keras_resnet(arch, size):
    "torchvision's resnet18 or resnet50 layer by layer, for uint8 images; Keras has neither"
    from imgexp.loader import IMAGENET
    from keras import Input, Model, layers as L, ops
    def conv(x, n, k, stride=1, relu=True):
        if k > 1 and stride > 1: x = L.ZeroPadding2D(k//2)(x)  # padding='same' would pad only one side
        x = L.Conv2D(n, k, stride, padding='same' if stride == 1 else 'valid', use_bias=False)(x)
        x = L.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        return L.ReLU()(x) if relu else x
    def block(x, n, stride):
        out, short = n*(1 if arch == 'resnet18' else 4), x
        if stride > 1 or x.shape[-1] != out: short = conv(x, out, 1, stride, relu=False)
        if out == n: x = conv(conv(x, n, 3, stride), n, 3, relu=False)
        else: x = conv(conv(conv(x, n, 1), n, 3, stride), out, 1, relu=False)
        return L.ReLU()(L.Add()([x, short]))
    mean, std = (np.array(v, np.float32)*255 for v in IMAGENET)
    inputs = Input((size, size, 3), dtype='uint8')
    x = (ops.cast(inputs, 'float32') - mean)/std  # Keras' preprocessing layers need TensorFlow
    x = L.MaxPooling2D(3, 2)(L.ZeroPadding2D(1)(conv(x, 64, 7, 2)))
    for k, n in enumerate({'resnet18': (2, 2, 2, 2), 'resnet50': (3, 4, 6, 3)}[arch]):
        for i in range(n): x = block(x, 64*2**k, 2 if k > 0 and i == 0 else 1)
    return Model(inputs, L.Dense(CLASSES, dtype='float32')(L.GlobalAveragePooling2D()(x)))

def keras_fit(task, bf16=False):
    "`compile` and `fit` on arrays, at their defaults; bf16 by Keras' policy, with fp32 logits as in its guide"
    import keras
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy('mixed_bfloat16' if bf16 else 'float32')
    clock, model = Clock(task), keras_resnet(task.arch, task.size)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(LR, momentum=MOMENTUM), loss)
    model.make_train_function()
    step = model.train_function
    def ticking(batch):
        logs = step(batch)
        clock.tick()
        return logs
    model.train_function = ticking  # a callback would keep Keras from running its own callbacks asynchronously
    with silent(): model.fit(task.images, task.labels, batch_size=task.batch)
    keras.config.set_dtype_policy('float32')
    return clock.seconds

def keras_on_torch(task, bf16=False):
    import keras
    assert keras.backend.backend() == 'torch', 'unset KERAS_BACKEND, or set it to torch'
    n_keras = sum(int(np.prod(p.shape)) for p in keras_resnet(task.arch, task.size).trainable_weights)
    n_torch = sum(p.numel() for p in new_network(task).parameters())
    assert n_keras == n_torch, f'{n_keras:,} parameters instead of {n_torch:,}'
    return keras_fit(task, bf16)

def keras_on_tensorflow(task, bf16=False):
    "In a separate process, because TensorFlow and torch would compete for the cores"
    task_values = {k: getattr(task, k) for k in ('arch', 'size', 'batch', 'steps', 'device')} | {'precision': 'fp32'}
    env = {k: v for k, v in os.environ.items() if k != 'KERAS_BACKEND'} | {'TF_CPP_MIN_LOG_LEVEL': '3'}
    done = subprocess.run([sys.executable, __file__, json.dumps(task_values), 'bf16' if bf16 else 'fp32'],
                          env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f'bench: Keras on TensorFlow failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])

# ---- The contenders

# run: Task -> seconds per step; imports: its modules, separated by spaces ('': it runs in another process)
Peer = namedtuple('Peer', 'run imports')

def peers(task, pack=''):
    "{name: Peer}; ratios are to the first one"
    ours, plain, trainer = 'imgexp.train imgexp.packs', 'torch torchvision', 'lightning torchvision'
    contenders = {'imgexp.fit': Peer(imgexp_fit, ours),
                  'plain fp32 loop': Peer(reference, plain),
                  'hand-written loop, same precision': Peer(handwritten, plain),
                  'fastai Learner': Peer(fastai, 'fastai.vision.all torchvision'),
                  'Lightning Trainer': Peer(lightning, trainer),
                  'Keras 3 on torch': Peer(keras_on_torch, 'keras torchvision')}
    if task.device == 'cpu': contenders['Keras 3 on TensorFlow'] = Peer(keras_on_tensorflow, '')
    if task.precision == 'bf16':
        contenders['Lightning Trainer, bf16-mixed'] = Peer(partial(lightning, precision='bf16-mixed'), trainer)
        contenders['fastai Learner, bf16'] = Peer(partial(fastai, bf16=True), 'fastai.vision.all torchvision')
        contenders['Keras 3 on torch, mixed_bfloat16'] = Peer(partial(keras_on_torch, bf16=True), 'keras torchvision')
        if task.device == 'cpu':
            contenders['Keras 3 on TensorFlow, mixed_bfloat16'] = Peer(partial(keras_on_tensorflow, bf16=True), '')
    if task.device == 'cuda':
        contenders = {'imgexp.fit, compile': Peer(partial(imgexp_fit, compile=True), ours),
                      'hand-written loop, same precision, compile':
                          Peer(partial(handwritten, compile=True), plain)} | contenders
    if pack:
        compiled = {'compile': True} if task.device == 'cuda' else {}
        name = ', '.join(['imgexp.fit', *compiled, 'from a pack'])
        contenders[name] = Peer(partial(imgexp_fit, pack=pack, augment='crop-flip', **compiled), ours)
    return contenders

if __name__ == '__main__': print(keras_fit(Task(**json.loads(sys.argv[1])), sys.argv[2] == 'bf16'))
