"""Transfer learning as in PyTorch's tutorial, and with features extracted once. `bench/transfer.py` measures both.

    python bench/usual_transfer.py path/to/images --weights mobilenet_v2.pth          # PyTorch's tutorial
    python bench/usual_transfer.py path/to/images --weights mobilenet_v2.pth --once   # features extracted once
    python bench/usual_transfer.py path/to/images … --once --keep features.pt         # and saved for reuse

In the tutorial, the backbone is frozen and the head is new; every epoch decodes every image and runs the whole network
in `model.train()`, so the batch-norm statistics drift. With `--once`, the backbone, in evaluation mode and
channels-last, runs once per image, and the trainable part uses its features from memory. `--precision bf16` means
autocast and channels-last in both.

`path/to/images` has the folders train, validation and test. Prints a line of JSON per seed: total seconds (excluding
imports; work shared by the seeds counts for the first), and the test accuracy of the epoch with the best validation.
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

def make_model(arch, weights, n_classes, train=''):
    model = models.get_model(arch)
    if weights: model.load_state_dict(torch.load(weights, weights_only=True))
    for name, p in model.named_parameters(): p.requires_grad = bool(train) and name.startswith(train)
    if hasattr(model, 'fc'): model.fc = nn.Linear(model.fc.in_features, n_classes)
    else: model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, n_classes)
    return model

# ---- As in the tutorial

def usual(args):
    transform = transforms.Compose([transforms.Resize((args.size, args.size)), transforms.ToTensor(),
                                    transforms.Normalize(MEAN, STD)])
    images = {s: datasets.ImageFolder(Path(args.folder)/s, transform) for s in SPLITS}
    batches = {s: DataLoader(d, batch_size=64, shuffle=s == 'train', num_workers=2) for s, d in images.items()}
    model = make_model(args.arch, args.weights, len(images['train'].classes), args.train)
    return (model.to(memory_format=torch.channels_last) if args.precision == 'bf16' else model), batches

# ---- Features extracted once

def split_model(model, train):
    "(frozen backbone, trainable part): the head, or the block named by `train` and everything after it"
    if not hasattr(model, 'fc'):
        return nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten()), model.classifier
    layers = dict(model.named_children())
    layers['fc'] = nn.Sequential(nn.Flatten(), model.fc)
    cut = list(layers).index(train or 'fc')
    return nn.Sequential(*list(layers.values())[:cut]), nn.Sequential(*list(layers.values())[cut:])

@torch.inference_mode()
def extract(backbone, folder, size, precision):
    "(features, labels, classes) of the images in class folders; workers return uint8, normalized batch by batch"
    images = datasets.ImageFolder(folder, v2.Resize((size, size), antialias=True),
                                  loader=lambda path: decode_image(path, ImageReadMode.RGB))
    mean, std = (torch.tensor(v).view(3, 1, 1)*255 for v in (MEAN, STD))
    batches = []
    for x, y in DataLoader(images, batch_size=64, num_workers=2):
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            batches.append((backbone(((x - mean)/std).contiguous(memory_format=torch.channels_last)), y))
    x, y = map(torch.cat, zip(*batches))
    return x, y, images.classes

class TensorBatches:
    "Batches of 64 rows of tensors in memory"
    def __init__(self, x, y, shuffle): self.x, self.y, self.shuffle = x, y, shuffle
    def __iter__(self):
        order = torch.randperm(len(self.x)) if self.shuffle else torch.arange(len(self.x))
        for rows in order.split(64): yield self.x[rows], self.y[rows]

def once(args, features=None):
    "(trainable part, its batches by split, features of all splits); `features` are reused if given or saved"
    saved = Path(args.keep) if args.keep else None
    if features is None and saved and saved.exists(): features = torch.load(saved, weights_only=True)
    n_classes = len(features['classes'] if features else datasets.folder.find_classes(Path(args.folder)/'train')[0])
    weights = args.weights if args.train or not features else ''
    backbone, head = split_model(make_model(args.arch, weights, n_classes, args.train), args.train)
    if features is None:
        backbone = backbone.eval().to(memory_format=torch.channels_last)
        features = {s: extract(backbone, Path(args.folder)/s, args.size, args.precision) for s in SPLITS}
        features = {s: (x, y) for s, (x, y, _) in features.items()} | {'classes': features['train'][2]}
        if saved: torch.save(features, saved)
    if not args.train:  # a linear layer needs no bf16
        features |= {s: (features[s][0].float(), features[s][1]) for s in SPLITS}
    batches = {s: TensorBatches(*features[s], s == 'train') for s in SPLITS}
    return head.to(memory_format=torch.channels_last), batches, features

# ---- Training, the same for both

def run_epoch(model, batches, autocast, optimizer=None):
    "Accuracy over one pass; trains if there is an optimizer"
    n_correct = n = 0
    model.train(optimizer is not None)
    for x, y in batches:
        with torch.set_grad_enabled(optimizer is not None):
            with autocast: out = model(x)
            loss = nn.functional.cross_entropy(out.float(), y)
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        n_correct += (out.argmax(1) == y).sum().item()
        n += len(y)
    return n_correct/max(1, n)

def train(model, batches, epochs, autocast):
    "Train and evaluate; returns seconds of each epoch, best validation accuracy, test accuracy"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seconds, best_accuracy, best_state = [], -1., None
    for _ in range(epochs):
        start = time.perf_counter()
        run_epoch(model, batches['train'], autocast, optimizer)
        accuracy = run_epoch(model, batches['validation'], autocast)
        if accuracy > best_accuracy: best_accuracy, best_state = accuracy, copy.deepcopy(model.state_dict())
        seconds.append(time.perf_counter() - start)
    model.load_state_dict(best_state)
    return {'epochs': seconds, 'valid': best_accuracy, 'test': run_epoch(model, batches['test'], autocast)}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder')
    parser.add_argument('--arch', default='mobilenet_v2', help='a ResNet or a MobileNet of torchvision (%(default)s)')
    parser.add_argument('--weights', default='', help='file with a state dict; random weights without it')
    parser.add_argument('--size', type=int, default=224, help='side of the images in px (%(default)s)')
    parser.add_argument('--epochs', type=int, default=10, help='number of epochs (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='first seed (%(default)s)')
    parser.add_argument('--seeds', type=int, default=1, help='number of seeds (%(default)s)')
    parser.add_argument('--precision', choices=['fp32', 'bf16'], default='fp32', help='(%(default)s)')
    parser.add_argument('--train', default='', help='block to train in addition to the head (layer4)')
    parser.add_argument('--once', action='store_true', help='run the backbone once per image, in evaluation mode')
    parser.add_argument('--keep', default='', help='with --once: file to save the features in, reused if it exists')
    args = parser.parse_args()
    if args.keep and not args.once: parser.error('--keep needs --once')
    bf16 = args.precision == 'bf16' and (bool(args.train) or not args.once)
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=bf16)
    features = None
    for seed in range(args.seed, args.seed + args.seeds):
        start = time.perf_counter()
        torch.manual_seed(seed)
        if args.once: model, batches, features = once(args, features)
        else: model, batches = usual(args)
        result = train(model, batches, args.epochs, autocast)
        print(json.dumps({'seed': seed, 'seconds': time.perf_counter() - start} | result), flush=True)

if __name__ == '__main__': main()
