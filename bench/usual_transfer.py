"""Transfer learning as it is usually written, and as a good engineer writes it. `bench/transfer.py` measures both.

    python bench/usual_transfer.py path/to/images --arch mobilenet_v2 --weights file.pth            # PyTorch's own tutorial
    python bench/usual_transfer.py path/to/images --arch mobilenet_v2 --weights file.pth --once     # features extracted once
    python bench/usual_transfer.py path/to/images --arch mobilenet_v2 --weights file.pth --once --keep features.pt   # and kept for the next time

The tutorial's way: the trunk's weights are frozen and the head is new; in every epoch every image is decoded and sent through the whole
network with `model.train()`, so that batch norm's statistics drift. With `--once` the trunk, in evaluation mode and channels last, sees every
image once, and what is trained sees its features, which are in memory. `--precision bf16` is autocast and channels last in both.

`path/to/images` has train, validation and test. Prints a line of JSON for each seed: the seconds of all of it (imports excluded; what the
seeds share counts for the first), and the test accuracy of the epoch that was best on validation.
"""
import argparse, copy, json, time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = ('train', 'validation', 'test')

def network(arch, weights, n_classes, train=''):
    model = models.get_model(arch)
    if weights: model.load_state_dict(torch.load(weights, weights_only=True))
    for name, p in model.named_parameters(): p.requires_grad = bool(train) and name.startswith(train)
    if hasattr(model, 'fc'): model.fc = nn.Linear(model.fc.in_features, n_classes)
    else: model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, n_classes)
    return model

# ---- The tutorial's way

def usual(args):
    change = transforms.Compose([transforms.Resize((args.size, args.size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = {s: datasets.ImageFolder(Path(args.folder)/s, change) for s in SPLITS}
    batches = {s: DataLoader(d, batch_size=64, shuffle=s == 'train', num_workers=2) for s, d in images.items()}
    model = network(args.arch, args.weights, len(images['train'].classes), args.train)
    return (model.to(memory_format=torch.channels_last) if args.precision == 'bf16' else model), batches

# ---- Features extracted once

def parts(model, train):
    "The frozen trunk, and what is trained behind it: the head, or the block that `train` names and the head"
    if not hasattr(model, 'fc'): return nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten()), model.classifier
    layers = dict(model.named_children())
    layers['fc'] = nn.Sequential(nn.Flatten(), model.fc)
    at = list(layers).index(train or 'fc')
    return nn.Sequential(*list(layers.values())[:at]), nn.Sequential(*list(layers.values())[at:])

@torch.inference_mode()
def extract(trunk, folder, size, precision):
    "(features, labels) of the images in class folders, and the classes; workers give uint8, which is normalized batch by batch"
    images = datasets.ImageFolder(folder, v2.Resize((size, size), antialias=True), loader=lambda path: decode_image(path, ImageReadMode.RGB))
    mean, std = (torch.tensor(v).view(3, 1, 1)*255 for v in (MEAN, STD))
    found = []
    for x, y in DataLoader(images, batch_size=64, num_workers=2):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            found.append((trunk(((x - mean)/std).contiguous(memory_format=torch.channels_last)), y))
    x, y = map(torch.cat, zip(*found))
    return x, y, images.classes

class InMemory:
    "Batches of tensors"
    def __init__(self, x, y, shuffle): self.x, self.y, self.shuffle = x, y, shuffle
    def __iter__(self):
        order = torch.randperm(len(self.x)) if self.shuffle else torch.arange(len(self.x))
        for rows in order.split(64): yield self.x[rows], self.y[rows]

def once(args, features=None):
    "What is trained, its batches, and the features of all splits, which may be there"
    kept = Path(args.keep) if args.keep else None
    if features is None and kept and kept.exists(): features = torch.load(kept, weights_only=True)
    n_classes = len(features['classes'] if features else datasets.folder.find_classes(Path(args.folder)/'train')[0])
    trunk, head = parts(network(args.arch, args.weights if args.train or not features else '', n_classes, args.train), args.train)
    if features is None:
        trunk = trunk.eval().to(memory_format=torch.channels_last)
        features = {s: extract(trunk, Path(args.folder)/s, args.size, args.precision) for s in SPLITS}
        features = {s: (x, y) for s, (x, y, _) in features.items()} | {'classes': features['train'][2]}
        if kept: torch.save(features, kept)
    if not args.train: features |= {s: (features[s][0].float(), features[s][1]) for s in SPLITS}  # a linear layer needs no bf16
    return head.to(memory_format=torch.channels_last), {s: InMemory(*features[s], s == 'train') for s in SPLITS}, features

# ---- Training, the same for both

def phase(model, batches, autocast, optimizer=None):
    "Mean accuracy; trains where there is an optimizer"
    right = seen = 0
    model.train(optimizer is not None)
    for x, y in batches:
        with torch.set_grad_enabled(optimizer is not None):
            with autocast: out = model(x)
            loss = nn.functional.cross_entropy(out.float(), y)
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        right += (out.argmax(1) == y).sum().item()
        seen += len(y)
    return right/max(1, seen)

def train(model, batches, epochs, autocast):
    "The seconds of each epoch and of the evaluation, validation and test accuracy"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seconds, best, kept = [], -1., None
    for epoch in range(epochs):
        began = time.perf_counter()
        phase(model, batches['train'], autocast, optimizer)
        valid = phase(model, batches['validation'], autocast)
        if valid > best: best, kept = valid, copy.deepcopy(model.state_dict())
        seconds.append(time.perf_counter() - began)
    model.load_state_dict(kept)
    return {'epochs': seconds, 'valid': best, 'test': phase(model, batches['test'], autocast)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder')
    parser.add_argument('--arch', default='mobilenet_v2', help='a ResNet or a MobileNet of torchvision (%(default)s)')
    parser.add_argument('--weights', default='', help='a state dict; without it, random')
    parser.add_argument('--size', type=int, default=224, help='(%(default)s)')
    parser.add_argument('--epochs', type=int, default=10, help='(%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the first (%(default)s)')
    parser.add_argument('--seeds', type=int, default=1, help='(%(default)s)')
    parser.add_argument('--precision', choices=['fp32', 'bf16'], default='fp32', help='(%(default)s)')
    parser.add_argument('--train', default='', help='how the names of the parameters begin that are trained beside the head (layer4)')
    parser.add_argument('--once', action='store_true', help='the trunk in evaluation mode, each image through it once')
    parser.add_argument('--keep', default='', help='with --once: a file that keeps the features, and is used where it is there')
    args = parser.parse_args()
    if args.keep and not args.once: parser.error('--keep needs --once')
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=args.precision == 'bf16' and (bool(args.train) or not args.once))
    features = None
    for seed in range(args.seed, args.seed + args.seeds):
        began = time.perf_counter()
        torch.manual_seed(seed)
        if args.once: model, batches, features = once(args, features)
        else: model, batches = usual(args)
        told = train(model, batches, args.epochs, autocast)
        print(json.dumps({'seed': seed, 'seconds': time.perf_counter() - began} | told), flush=True)

if __name__ == '__main__': main()
