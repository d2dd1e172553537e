"imgexp.resnets: our ResNet-18 to 152 are torchvision's, to the last bit, and so is everything that is built on them."
import copy, pickle

import pytest, torch, torchvision
from torch.nn.functional import cross_entropy

from imgexp.cost import summary
from imgexp.cutting import cut, segments
from imgexp.errors import InputError
from imgexp.grad_cam import GradCAM, layer_names, map_layer
from imgexp.models import build_model, default_size
from imgexp.networks import archs, block_tensors, blocks, drop_probs
from imgexp.origins import file_origin
from imgexp.resnets import OWN_RESNETS, BasicBlock, BottleneckBlock, ResNet
from imgexp.tensor_files import from_torch
from imgexp.weights import published_weights, weights_id

NAMES = [*OWN_RESNETS]
SMALL = 'own_resnet18', 'own_resnet50' # one of each kind of block
each = pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.fast]*(n in SMALL)) for n in NAMES])
each_kind = pytest.mark.parametrize('name', SMALL)

def theirs(name): return name.removeprefix('own_')

def seeded(build, *args, **kwargs):
    torch.manual_seed(3)
    return build(*args, **kwargs)

def same(a, b): return [*a] == [*b] and all(a[k].equal(b[k]) for k in a)

def same_state(a, b): return same(a.state_dict(), b.state_dict())

def batch(size=64, n=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(5)), torch.arange(n) % 5

def step(model, x, y):
    "Logits and gradients of a step of SGD; the seed is that of what is dropped"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    logits = seeded(model.train(), x)
    cross_entropy(logits, y).backward()
    optimizer.step()
    return {'logits': logits.detach()} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

def pair(name, *args, **kwargs):
    "From `build_model`: ours and torchvision's"
    return build_model(name, *args, **kwargs), build_model(theirs(name), *args, **kwargs)

# --- the network itself ----------------------------------------------------------------------------------------------

@each
def test_equal_to_the_last_bit(name):
    "Initial weights, random numbers drawn, logits, gradients, weights and statistics after a step; state dicts fit."
    a = seeded(OWN_RESNETS[name], 10)
    drawn = torch.get_rng_state()
    b = seeded(torchvision.models.get_model, theirs(name), num_classes=10)
    assert same_state(a, b) and drawn.equal(torch.get_rng_state())
    assert [(k, p.shape) for k, p in a.named_parameters()] == [(k, p.shape) for k, p in b.named_parameters()]
    before, x = copy.deepcopy(a.state_dict()), batch()[0]
    with torch.no_grad(): assert a.eval()(x).equal(b.eval()(x))
    assert same(step(a, *batch()), step(b, *batch())) and same_state(a, b)
    assert not any(v.equal(before[k]) for k, v in a.state_dict().items()) # everything has moved, statistics too
    b.load_state_dict(before, strict=True)
    assert same(b.state_dict(), before) and not same_state(a, b)
    a.load_state_dict(b.state_dict(), strict=True)
    assert same(a.state_dict(), before)

@each
def test_size_and_cost_are_the_published_ones(name):
    with torch.device('meta'): model = OWN_RESNETS[name]()
    info, meta = summary(model), published_weights(name).meta
    assert info.params == meta['num_params'] and info.multiply_adds/1e9 == pytest.approx(meta['_ops'], abs=6e-4)

def test_parameters_of_resnet50():
    with torch.device('meta'): assert sum(p.numel() for p in OWN_RESNETS['own_resnet50']().parameters()) == 25_557_032

def test_odd_sizes():
    a, b = seeded(OWN_RESNETS['own_resnet18'], 4).eval(), seeded(torchvision.models.resnet18, num_classes=4).eval()
    for size in (1, 33, 75):
        with torch.no_grad(): assert a(batch(size)[0]).equal(b(batch(size)[0]))

# --- build_model -----------------------------------------------------------------------------------------------------

def test_listed(): assert set(NAMES) <= set(archs()) and NAMES == [f'own_resnet{n}' for n in (18, 34, 50, 101, 152)]

@each
def test_built_as_torchvisions(name):
    with torch.device('meta'): a, b = pair(name, 5, size=64)
    assert type(a) is ResNet and (a.arch, a.report.arch) == (name, name)
    assert repr(a.report).replace(name, theirs(name)) == repr(b.report)
    assert [(u.name, u.n_params) for u in blocks(a)] == [(u.name, u.n_params) for u in blocks(b)]
    assert block_tensors(a) == block_tensors(b)

@each_kind
def test_small_stem(name):
    a, b = pair(name, 5, size=32)
    assert a.report.stem == 'small' and a.conv1.kernel_size == (3, 3) and same_state(a, b)
    x, y = batch(32)
    assert same(step(a, x, y), step(b, x, y)) and same_state(a, b)

@each_kind
@pytest.mark.parametrize('retrain', [0, 2])
def test_retrain(name, retrain):
    a, b = pair(name, 5, size=64, retrain=retrain)
    before = copy.deepcopy(a.state_dict())
    found, expected = step(a, *batch()), step(b, *batch())
    assert same(found, expected) and same_state(a, b)
    trained = tuple(f'{u.name}.' for u in blocks(a)[-1 - retrain:])
    changed = {k for k, v in a.state_dict().items() if not v.equal(before[k])}
    assert changed == {k for k in before if k.startswith(trained)}

@each_kind
def test_drop_path(name):
    a, b = pair(name, 5, size=64, drop_path=0.5)
    assert drop_probs(a) == drop_probs(b) and max(drop_probs(a).values()) == 0.5
    found, expected = step(a, *batch(n=4)), step(b, *batch(n=4))
    assert same(found, expected) and same_state(a, b)
    x = batch(n=4)[0]
    with torch.no_grad(): assert not seeded(a.train(), x).equal(a(x)) # other branches are dropped
    assert drop_probs(pickle.loads(pickle.dumps(a))) == drop_probs(a)

@each_kind
def test_files_fit_either_way(name, tmp_path):
    "The backbone with a new head, or all of it with keep_head"
    path = tmp_path/'w.pth'
    for saved, arch in zip(pair(name, 6, size=64, seed=8), (theirs(name), name)):
        torch.save(saved.state_dict(), path)
        assert same_state(build_model(arch, 6, path, size=64, keep_head=True), saved)
        new = build_model(arch, 3, path, size=64)
        assert new.layer4[1].conv1.weight.equal(saved.layer4[1].conv1.weight) and new.fc.out_features == 3
    with pytest.raises(InputError, match='not those of arch=own_resnet34'):
        build_model('own_resnet34', 6, path, size=64)

def test_the_stem_is_the_files(tmp_path):
    torch.save(build_model('resnet18', 6, size=32).state_dict(), tmp_path/'w.pth')
    assert build_model('own_resnet18', 6, tmp_path/'w.pth', size=64).report.stem == 'small'

def test_published_weights_are_torchvisions(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for name in NAMES:
        for weights in ('imagenet', 'IMAGENET1K_V1'):
            assert weights_id(name, weights) == weights_id(theirs(name), weights)
            assert default_size(name, weights) == default_size(theirs(name), weights)
    assert default_size('own_resnet50') == 64
    def download(url, dst, hash_prefix, progress): torch.save(torchvision.models.resnet18().state_dict(), dst)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    model = build_model('own_resnet18', 1000, 'imagenet', size=64, keep_head=True)
    assert model.report.source == weights_id('resnet18', 'imagenet') and model.report.loaded == len(model.state_dict())
    with pytest.raises(InputError, match='own_resnet18 has the weights IMAGENET1K_V1'):
        weights_id('own_resnet18', 'IMAGENET1K_V2')

# --- what is built on networks ---------------------------------------------------------------------------------------

@each_kind
def test_grad_cam(name):
    a, b = pair(name, 5, size=64)
    assert map_layer(a) == 'layer4' and {'layer4', 'layer1.0.relu'} <= {*layer_names(a)}
    x, y = batch()
    assert GradCAM(a)(x).maps(y).equal(GradCAM(b)(x).maps(y))

@each_kind
@pytest.mark.parametrize('retrain', [0, 1, 3])
def test_cutting(name, retrain):
    "The parts of ours and torchvision's end at the same place and give the same features."
    a, b = pair(name, 5, size=64)
    x = batch()[0]
    with torch.no_grad():
        ours, other = cut(a.eval(), retrain), cut(b.eval(), retrain)
        assert ours.name == other.name and ours.prefix(x).equal(other.prefix(x))
        assert ours.suffix(ours.prefix(x)).equal(b(x))
    assert len(segments(a)) == len(segments(b))

@pytest.mark.parametrize('size, stem', [(32, 'small'), (64, 'standard')])
def test_the_origin_of_a_file(size, stem):
    specs = {k: from_torch(k, v).spec for k, v in build_model('resnet50', 4, size=size).state_dict().items()}
    origin = file_origin('own_resnet50', specs, 'w.pth')
    assert origin.stem == stem and len(origin.classes) == 4

def test_blocks_say_what_they_are():
    for name, kind in (('own_resnet34', BasicBlock), ('own_resnet50', BottleneckBlock)):
        with torch.device('meta'): found = blocks(OWN_RESNETS[name](5))
        assert [u.kind for u in found] == ['Conv2d', *[kind.__name__]*16, 'Linear']
