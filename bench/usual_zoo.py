"""One network of a zoo as it is usually trained: ImageFolder, two loader processes, single precision. `bench/zoo.py` measures it.

    python bench/usual_zoo.py path/to/images out --classes dress,hat,pants --epochs 4

Images of the named classes are divided 70/15/15. The states init, early, best and last are saved as state dicts, and the best one is
evaluated on the test images. Prints a line of JSON.
"""
import argparse, copy, json, time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, models, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

class Classes(datasets.ImageFolder):
    "Some of the class folders"
    def __init__(self, folder, classes, transform):
        self.wanted = classes
        super().__init__(folder, transform)
    def find_classes(self, directory): return self.wanted, {c: i for i, c in enumerate(self.wanted)}

def loaders(args):
    scale = (transforms.ToTensor(), transforms.Normalize(MEAN, STD))
    train = transforms.Compose([transforms.RandomResizedCrop(args.size, scale=(0.35, 1)), transforms.RandomHorizontalFlip(), *scale])
    plain = transforms.Compose([transforms.Resize(round(args.size*8/7)), transforms.CenterCrop(args.size), *scale])
    images = {name: Classes(args.folder, args.classes.split(','), t) for name, t in (('train', train), ('plain', plain))}
    order = torch.randperm(len(images['train']), generator=torch.Generator().manual_seed(0)).tolist()
    n = len(order)
    parts = {'train': order[:n*70//100], 'valid': order[n*70//100:n*85//100], 'test': order[n*85//100:]}
    return {s: DataLoader(Subset(images['train' if s == 'train' else 'plain'], rows), args.batch_size, shuffle=s == 'train', num_workers=2)
            for s, rows in parts.items()}

@torch.no_grad()
def accuracy(model, batches):
    model.eval()
    right = [(model(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder')
    parser.add_argument('out', type=Path)
    parser.add_argument('--classes')
    for name, kind, value in (('seed', int, 0), ('size', int, 64), ('epochs', int, 4), ('early', int, 1), ('batch-size', int, 32), ('lr', float, 0.001), ('weight-decay', float, 0.)):
        parser.add_argument(f'--{name}', type=kind, default=value)
    parser.add_argument('--optimizer', default='adam', choices=['adam', 'sgd'])
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True)
    start, batches = time.perf_counter(), loaders(args)
    model = models.resnet18(num_classes=len(args.classes.split(',')))
    if args.optimizer == 'sgd': opt = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, nesterov=True)
    else: opt = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    def save(name, state=None): torch.save(state or model.state_dict(), args.out/f'{name}.pth')
    save('init')
    best = -1., None
    for epoch in range(1, args.epochs + 1):
        model.train()
        for x, y in batches['train']:
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        if epoch == args.early: save('early')
        top1 = accuracy(model, batches['valid'])
        if top1 > best[0]: best = top1, copy.deepcopy(model.state_dict())
    save('last')
    save('best', best[1])
    model.load_state_dict(best[1])
    print(json.dumps({'seconds': time.perf_counter() - start, 'valid_top1': best[0], 'test_top1': accuracy(model, batches['test'])}))

if __name__ == '__main__': main()
