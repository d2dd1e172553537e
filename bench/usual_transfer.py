"""Transfer learning as it is usually written (PyTorch's own tutorial): the trunk's weights are frozen and the head is new; in every epoch
every image is decoded and sent through the whole network in float32, with `model.train()`, so that batch norm's statistics drift.

    python bench/usual_transfer.py path/to/images --arch mobilenet_v2 --weights file.pth

`path/to/images` has train, validation and test. Prints a line of JSON for each seed: seconds of each epoch, and the test accuracy of the
epoch that was best on validation. `bench/transfer.py` runs it. For accuracy alone, the same up to rounding and sooner:

- `--once` decodes the images once and keeps channels last,
- `--still` leaves the trunk in evaluation mode, as careful scripts do, and sends each image through it once, for all seeds.
"""
import argparse, copy, json, time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models, transforms

def head_of(model):
    "The network's last linear layer: (module that holds it, its name there)"
    if hasattr(model, 'fc'): return model, 'fc'
    return model.classifier, str(len(model.classifier) - 1)

def network(arch, weights, n_classes, train=''):
    model = models.get_model(arch)
    if weights: model.load_state_dict(torch.load(weights, weights_only=True))
    for name, p in model.named_parameters(): p.requires_grad = bool(train) and name.startswith(train)
    holder, name = head_of(model)
    setattr(holder, name, nn.Linear(getattr(holder, name).in_features, n_classes))
    return model

def decoded(images):
    x, y = zip(*images)
    return TensorDataset(torch.stack(x), torch.tensor(y))

def loaders(folder, size, once):
    change = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images = {s: datasets.ImageFolder(Path(folder)/s, change) for s in ('train', 'validation', 'test')}
    classes = images['train'].classes
    if once: images = {s: decoded(d) for s, d in images.items()}
    return {s: DataLoader(d, batch_size=64, shuffle=s == 'train', num_workers=0 if once else 2) for s, d in images.items()}, classes

def top(model):
    "What follows the trunk: name and module"
    name = 'fc' if hasattr(model, 'fc') else 'classifier'
    return name, getattr(model, name)

@torch.no_grad()
def sent(model, batches):
    "What the trunk, in evaluation mode, makes of the images of each split: loaders of the same order"
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    setattr(model, top(model)[0], nn.Identity())
    def through(loader):
        x, y = zip(*((model(x), y) for x, y in DataLoader(loader.dataset, batch_size=64, num_workers=loader.num_workers)))
        return TensorDataset(torch.cat(x), torch.cat(y))
    return {s: DataLoader(through(d), batch_size=64, shuffle=s == 'train') for s, d in batches.items()}

def phase(model, batches, optimizer=None, limit=0):
    "Mean accuracy; trains where there is an optimizer"
    right = seen = 0
    model.train(optimizer is not None)
    for k, (x, y) in enumerate(batches):
        if limit and k == limit: break
        if optimizer: optimizer.zero_grad()
        with torch.set_grad_enabled(optimizer is not None):
            out = model(x)
            loss = nn.functional.cross_entropy(out, y)
            if optimizer:
                loss.backward()
                optimizer.step()
        right += (out.argmax(1) == y).sum().item()
        seen += len(y)
    return right/max(1, seen)

def train(model, batches, epochs, warm_up):
    "The seconds of each epoch and of the evaluation, validation and test accuracy"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if warm_up: phase(model, batches['train'], optimizer, warm_up)
    seconds, best, kept = [], -1., None
    for epoch in range(epochs):
        began = time.perf_counter()
        phase(model, batches['train'], optimizer)
        valid = phase(model, batches['validation'])
        if valid > best: best, kept = valid, copy.deepcopy(model.state_dict())
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    model.load_state_dict(kept)
    test = phase(model, batches['test'])
    return {'epochs': seconds, 'evaluation': time.perf_counter() - began, 'valid': best, 'test': test}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder')
    parser.add_argument('--arch', default='mobilenet_v2', help='(%(default)s)')
    parser.add_argument('--weights', default='', help='a state dict; without it, random')
    parser.add_argument('--size', type=int, default=224, help='(%(default)s)')
    parser.add_argument('--epochs', type=int, default=10, help='(%(default)s)')
    parser.add_argument('--seeds', type=int, default=1, help='(%(default)s)')
    parser.add_argument('--train', default='', help='how the names of the parameters begin that are trained beside the head (layer4)')
    parser.add_argument('--warm-up', type=int, default=0, help='batches before the clock starts')
    parser.add_argument('--once', action='store_true', help='decode the images once')
    parser.add_argument('--still', action='store_true', help='the trunk in evaluation mode, each image through it once')
    args = parser.parse_args()
    batches, classes = loaders(args.folder, args.size, args.once)
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = network(args.arch, args.weights, len(classes), args.train)
        if args.still:
            if not seed: batches = sent(model, batches)
            model = top(model)[1]
        if args.once: model = model.to(memory_format=torch.channels_last)
        print(json.dumps({'seed': seed} | train(model, batches, args.epochs, args.warm_up)), flush=True)

if __name__ == '__main__': main()
