"imgexp.models: every architecture, every way in which weights can be wrong, and what frozen means."
import copy, hashlib, os, pickle, re, warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest, torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth

from imgexp import models, networks
from imgexp import weights as w
from imgexp.cost import summary
from imgexp.models import build_model, param_groups, trained_params
from imgexp.networks import CompactResNet, archs, blocks, compact_resnet, drop_probs, set_drop_path, set_retrain
from imgexp.weights import weights_id
from imgexp.errors import InputError

WEIGHTS = Path(__file__).resolve().parents[2]/'shared'/'weights'
NAMED = ['alexnet', 'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'mobilenet_v2', 'squeezenet1_1',
         'efficientnet_v2_l', 'vit_l_32']
NORMS = nn.modules.batchnorm._NormBase

class Shapes(TorchFunctionMode):
    "Parameters on the meta device: a network of any size in milliseconds. (`torch.device('meta')` fails in RegNet.)"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones): kwargs['device'] = 'meta'
        return func(*args, **kwargs)

def shapes(*args, **kwargs):
    with Shapes(): return build_model(*args, **kwargs)

def published(arch): return w.published_weights(arch).meta

OWN = ('compact_resnet', 'small_cnn')

def size_of(arch):
    "The image size that torchvision counted at."
    if arch in OWN: return 28
    return getattr(w.published_weights(arch).transforms, 'keywords', {}).get('crop_size', 224)

def one_line(message):
    "Assert that an error's text is one line of readable length."
    assert '\n' not in message and 20 < len(message) < 400, message
    return message

def refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as e: build_model(*args, **kwargs)
    return one_line(str(e.value))

def shared(name):
    path = WEIGHTS/name
    if not path.exists(): pytest.skip(f'{name} is not here: the shared weights are not part of the project')
    return path

# --- architectures ---------------------------------------------------------------------------------------------------

def test_named_architectures_are_known(): assert set(NAMED) <= set(archs()) and 'compact_resnet' in archs()

@pytest.mark.parametrize('arch', archs())
def test_blocks_hold_every_parameter_once(arch):
    model = shapes(arch, 7, size=size_of(arch))
    found = blocks(model)
    ids = [id(p) for b in found for p in b.params]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    head = found[-1].params
    assert head[0].shape[0] == 7 and len(head) <= 2 # the final layer only: weight and, where there is one, bias
    assert all(b.params and b.modules for b in found) and len({b.name for b in found}) == len(found)
    held = {m for b in found for top in b.modules for m in top.modules()}
    leaves = {m for m in model.modules() if not list(m.children())}
    assert leaves <= held # every layer is frozen or trained with some block

FAMILIES = ['convnext_tiny', 'densenet121', 'efficientnet_b0', 'googlenet', 'inception_v3', 'maxvit_t', 'mnasnet1_0',
            'mobilenet_v3_small', 'regnet_x_400mf', 'regnet_y_400mf', 'resnext50_32x4d', 'shufflenet_v2_x1_0', 'swin_t',
            'swin_v2_t', 'vgg11_bn', 'wide_resnet50_2']

@pytest.mark.parametrize('arch', NAMED + FAMILIES)
def test_counts_are_the_published_ones(arch):
    info = summary(shapes(arch, 1000, size=size_of(arch)))
    if arch != 'inception_v3': # whose published count includes an auxiliary head
        assert info.params == published(arch)['num_params']
    assert info.multiply_adds/1e9 == pytest.approx(published(arch)['_ops'], abs=6e-4)
    assert sum(info.block_multiply_adds) == info.multiply_adds

@pytest.mark.parametrize('arch', ['alexnet', 'resnet18', 'resnet34', 'resnet50', 'mobilenet_v2', 'squeezenet1_1',
                                  'compact_resnet'])
def test_forward(arch):
    with torch.no_grad(): logits = build_model(arch, 5, size=64).eval()(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5) and logits.isfinite().all()

@pytest.mark.parametrize('arch', ['resnet101', 'resnet152', 'efficientnet_v2_l', 'vit_l_32'])
def test_forward_of_large_networks_by_shape(arch):
    model = shapes(arch, 5, size=64).eval().to('meta')
    with torch.no_grad(): assert model(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 5)

def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        shapes('googlenet', 3), shapes('inception_v3', 3, size=299)

@pytest.mark.parametrize('arch, size', [('alexnet', 62), ('vit_b_16', 100), ('maxvit_t', 64), ('inception_v3', 64)])
def test_wrong_size(arch, size): refused(f'size={size}: {arch} needs', arch, 3, size=size)

def test_unknown_arch():
    assert 'resnet18' in refused('did you mean', 'resnet-18', 10)
    refused('not known', 'zzz', 10)

def test_no_classes(): refused('n_classes=0', 'resnet18', 0)

def test_compact_is_compact():
    for size in (28, 32, 64):
        model = build_model('compact_resnet', 10, size=size)
        assert sum(p.numel() for p in model.parameters()) <= 1_000_000
        assert model.eval()(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert compact_resnet(10, 28).state_dict().keys() == compact_resnet(10, 64).state_dict().keys()

# --- initialization and stem -----------------------------------------------------------------------------------------

def same(a, b): return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

def test_seed_decides_all_and_disturbs_nobody():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = build_model('resnet18', 10, seed=1, size=64)
    assert torch.rand(3).equal(expected)
    assert same(a, build_model('resnet18', 10, seed=1, size=64))
    b = build_model('resnet18', 10, seed=2, size=64)
    assert not a.conv1.weight.equal(b.conv1.weight) and not a.fc.weight.equal(b.fc.weight)

def test_head_does_not_depend_on_the_weights(tmp_path):
    a = build_model('squeezenet1_1', 4, seed=3, size=64)
    torch.save(build_model('squeezenet1_1', 9, seed=8, size=64).state_dict(), tmp_path/'w.pth')
    b = build_model('squeezenet1_1', 4, tmp_path/'w.pth', seed=3, size=64)
    assert a.classifier[1].weight.equal(b.classifier[1].weight) and not a.features[0].weight.equal(b.features[0].weight)
    assert a.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.1) and not a.classifier[1].bias.any()

@pytest.mark.parametrize('arch, size, stem, kernel', [
    ('resnet18', 32, 'auto', 3), ('resnet18', 33, 'auto', 7), ('resnext50_32x4d', 28, 'auto', 3),
    ('wide_resnet50_2', 32, 'auto', 3), ('resnet18', 28, 'standard', 7), ('resnet18', 64, 'small', 3)])
def test_stem(arch, size, stem, kernel):
    model = shapes(arch, 10, size=size, stem=stem)
    assert model.conv1.kernel_size == (kernel, kernel) and model.conv1.stride == ((1, 1) if kernel == 3 else (2, 2))
    assert isinstance(model.maxpool, nn.Identity if kernel == 3 else nn.MaxPool2d)
    assert model.report.stem == ('small' if kernel == 3 else 'standard')

def test_stem_refused():
    refused("stem='small' is for ResNets", 'alexnet', 10, stem='small')
    refused("stem='tiny': allowed are", 'resnet18', 10, stem='tiny')

# --- weights from files ----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def source(): return build_model('resnet18', 10, seed=7, size=64).eval()

def save(model, path, **kw):
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, path) if path.suffix == '.safetensors' else torch.save(state, path)
    return path

@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_local_weights(source, tmp_path, name):
    path = save(source, tmp_path/name)
    model = build_model('resnet18', 3, path, size=64)
    mine, theirs = model.state_dict(), source.state_dict()
    assert all(mine[k].equal(theirs[k]) for k in theirs if not k.startswith('fc.'))
    assert model.fc.out_features == 3 and model.report.loaded == len(theirs) - 2
    assert 'the file has 10' in repr(model.report) and name in model.report._repr_html_()
    assert weights_id('resnet18', path) == 'sha256:' + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert model.report.weights_id == weights_id('resnet18', path)

def test_a_weights_file_that_is_replaced_once_it_is_loaded(source, tmp_path):
    "The report names what was loaded, not what lies there now."
    path = save(source, tmp_path/'w.pth')
    before = weights_id('resnet18', path)
    model = build_model('resnet18', 3, path, size=64)
    save(torch.nn.Linear(2, 3), path)
    assert model.report.weights_id == before != weights_id('resnet18', path)

def test_head_of_the_same_size_is_new_unless_kept(source, tmp_path):
    path = save(source, tmp_path/'w.pth')
    assert not build_model('resnet18', 10, path, size=64).fc.weight.equal(source.fc.weight)
    assert same(build_model('resnet18', 10, path, size=64, keep_head=True), source)
    assert 'has 10 classes and n_classes=3' in refused('keep_head', 'resnet18', 3, path, size=64, keep_head=True)
    refused('keep_head needs weights', 'resnet18', 3, keep_head=True)

def test_the_stem_is_the_files(tmp_path):
    small = build_model('resnet18', 10, size=28)
    path = save(small, tmp_path/'w.safetensors')
    assert build_model('resnet18', 10, path, size=64).report.stem == 'small'
    assert 'conv1.weight' in refused('1 misshaped', 'resnet18', 10, path, size=64, stem='standard')

def test_wrapped_half_precision_nested(source, tmp_path):
    state = {f'module._orig_mod.{k}': v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    torch.save({'epoch': 3, 'state_dict': state}, tmp_path/'w.pth')
    model = build_model('resnet18', 3, tmp_path/'w.pth', size=64)
    assert all(v.dtype in (torch.float32, torch.int64) for v in model.state_dict().values())
    assert model.layer1[0].conv1.weight.equal(source.layer1[0].conv1.weight.half().float())
    assert 'converted to float32' in repr(model.report)

def test_a_backbone_without_head(source, tmp_path):
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith('fc.')}, tmp_path/'w.pth')
    build_model('resnet18', 3, tmp_path/'w.pth', size=64)
    refused('has no classes', 'resnet18', 3, tmp_path/'w.pth', size=64, keep_head=True)

def test_wrong_architecture(source, tmp_path):
    path = save(source, tmp_path/'r18.pth')
    text = refused('not those of arch=mobilenet_v2', 'mobilenet_v2', 3, path)
    assert 'r18.pth' in text and 'missing' in text and 'unexpected' in text and 'features.0.0.weight' in text
    assert '80 missing (first: layer1.2.conv1.weight)' in refused('arch=resnet34', 'resnet34', 3, path)
    refused('misshaped', 'resnet50', 3, path)

@pytest.mark.parametrize('keep', [0, 100, 0.5, 0.999])
@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_truncated(tmp_path, name, keep):
    data = save(compact_resnet(10), tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(data[:keep if keep > 1 else int(len(data)*keep)])
    assert name in refused('damaged or not a weights file', 'compact_resnet', 10, tmp_path/name, size=28)

def test_not_a_state_dict(tmp_path):
    (tmp_path/'w.pth').write_bytes(b'<html>404</html>')
    refused('damaged or not a weights file', 'resnet18', 10, tmp_path/'w.pth')
    for obj in ({}, [1, 2], {'a': 1}, torch.zeros(3)):
        torch.save(obj, tmp_path/'w.pth')
        refused('no state dict', 'resnet18', 10, tmp_path/'w.pth')
    torch.save(nn.Linear(2, 3), tmp_path/'w.pth')
    refused('never unpickled', 'resnet18', 10, tmp_path/'w.pth')

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def test_pickle_is_not_executed(tmp_path):
    hole = tmp_path/'exploded'
    torch.save({'conv1.weight': Bomb(hole)}, tmp_path/'zip.pth')
    torch.save({'conv1.weight': Bomb(hole)}, tmp_path/'legacy.pth', _use_new_zipfile_serialization=False)
    (tmp_path/'plain.pth').write_bytes(pickle.dumps(Bomb(hole), protocol=2))
    (tmp_path/'plain.safetensors').write_bytes(pickle.dumps(Bomb(hole)))
    for path in tmp_path.glob('*.*'):
        refused('damaged|never unpickled', 'resnet18', 10, path)
        assert not hole.exists()
    refused('never unpickled', 'resnet18', 10, tmp_path/'zip.pth')

def test_no_such_file(tmp_path):
    refused('is not a file: allowed are', 'resnet18', 10, tmp_path/'none.pth')
    refused('is a folder', 'resnet18', 10, tmp_path)
    refused("did you mean 'imagenet'", 'resnet18', 10, 'Imagenet')

# --- layouts of published files --------------------------------------------------------------------------------------

def test_vit_is_resized_and_renamed(tmp_path, monkeypatch):
    def tiny(arch, n_classes, size, small): return VisionTransformer(size, 32, 2, 2, 32, 64, num_classes=n_classes)
    monkeypatch.setattr(models, '_network', tiny)
    model = build_model('vit_b_32', 10, size=64)
    def old(key): return key.replace('mlp.0.', 'mlp.linear_1.').replace('mlp.3.', 'mlp.linear_2.')
    state = {old(k): v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path/'w.pth')
    large = build_model('vit_b_32', 3, tmp_path/'w.pth', size=96)
    assert large.encoder.pos_embedding.shape[1] == 10 and 'from 5 to 10 tokens' in repr(large.report)
    assert large.encoder.layers[1].mlp[3].weight.equal(model.encoder.layers[1].mlp[3].weight)

def test_densenets_old_names(tmp_path):
    model = build_model('densenet121', 10, size=64)
    state = {re.sub(r'(denselayer\d+\.(?:norm|conv))(\d\.)', r'\1.\2', k): v for k, v in model.state_dict().items()}
    assert 'features.denseblock1.denselayer1.norm.1.weight' in state
    torch.save(state, tmp_path/'w.pth')
    again = build_model('densenet121', 10, tmp_path/'w.pth', size=64, keep_head=True)
    assert same(model, again)

def test_auxiliary_heads_are_left_out(tmp_path):
    state = {**build_model('googlenet', 10, size=64).state_dict(), 'aux1.fc2.bias': torch.zeros(10)}
    torch.save(state, tmp_path/'w.pth')
    report = build_model('googlenet', 3, tmp_path/'w.pth', size=64).report
    assert '1 tensors of the auxiliary heads left out' in repr(report)

def test_mnasnet_without_versions(tmp_path):
    path = save(build_model('mnasnet0_5', 10, size=64), tmp_path/'w.safetensors')
    assert build_model('mnasnet0_5', 3, path, size=64).report.loaded

# --- torchvision's weights -------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A torch hub of our own, and a server in place of torchvision's that has a resnet18 under a rightly hashed name."
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    site = tmp_path/'site'
    site.mkdir()
    data = save(build_model('resnet18', 1000, seed=7, size=64), tmp_path/'w.pth').read_bytes()
    (site/f'resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth').write_bytes(data)
    (site/'resnet18-0badbeef.pth').write_bytes(data)
    quiet = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    def publish(name):
        fake = type('Fake', (), dict(url=f'http://127.0.0.1:{server.server_port}/{name}', meta=published('resnet18')))
        for module in (models, w): monkeypatch.setattr(module, 'published_weights', lambda arch, weights='imagenet': fake)
    publish.names, publish.folder = sorted(p.name for p in site.iterdir()), tmp_path/'hub'/'checkpoints'
    yield publish
    server.shutdown()
    server.server_close()

def test_imagenet_is_fetched_once_and_checked(hub):
    name = next(n for n in hub.names if 'badbeef' not in n)
    hub(name)
    model = build_model('resnet18', 10, 'imagenet', size=64)
    assert model.report.loaded == 120 and model.report.source == name and (hub.folder/name).exists()
    assert model.conv1.kernel_size == (7, 7) and weights_id('resnet18', 'imagenet') == name
    with open(hub.folder/name, 'r+b') as f: f.write(b'damage')
    refused('sha-256 does not begin with', 'resnet18', 10, 'imagenet', size=64)

def test_imagenet_with_the_wrong_hash(hub):
    hub('resnet18-0badbeef.pth')
    refused('invalid hash value', 'resnet18', 10, 'imagenet', size=64)
    assert not list(hub.folder.iterdir())

def test_imagenet_not_found(hub):
    hub('resnet18-12345678.pth')
    refused('HTTP Error 404', 'resnet18', 10, 'imagenet', size=64)

def test_imagenet_offline(tmp_path, monkeypatch):
    def offline(*a, **kw): raise OSError('Network is unreachable')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    text = refused('Network is unreachable', 'resnet18', 10, 'imagenet')
    assert 'https://download.pytorch.org/models/resnet18-f37072fd.pth' in text
    assert str(tmp_path/'checkpoints') in text and 'weights=PATH' in text

def test_every_published_name_has_a_hash():
    for arch in archs():
        if arch in OWN: continue
        assert torch.hub.HASH_REGEX.search(weights_id(arch, 'imagenet')), arch

@pytest.mark.parametrize('arch', ['compact_resnet', 'small_cnn'])
def test_own_networks_have_no_published_weights(arch): refused('no published weights', arch, 10, 'imagenet', size=32)

# --- frozen means frozen ---------------------------------------------------------------------------------------------

def step(model, size=64, n=4):
    x, y = torch.randn(n, 3, size, size), torch.arange(n)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=0.01)
    for _ in range(2):
        model.train()
        for m in model.modules(): m.train()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

def changes(model, before): return {k for k, v in model.state_dict().items() if not v.equal(before[k])}

@pytest.mark.parametrize('arch', ['compact_resnet', 'mobilenet_v2', 'shufflenet_v2_x0_5', 'densenet121'])
@pytest.mark.parametrize('k', [0, 2])
def test_frozen_is_bit_identical(arch, k):
    model = build_model(arch, 10, retrain=k, size=64)
    before, found = copy.deepcopy(model.state_dict()), blocks(model)
    step(model)
    of = {m: path for path, m in model.named_modules()}
    own = {f'{of[top]}.' for b in found[len(found) - 1 - k:] for top in b.modules}
    assert changes(model, before) == {key for key in before if key.startswith(tuple(own))}
    assert (k > 0) == any('running_mean' in key for key in changes(model, before))

def test_all_is_trained_by_default():
    model = build_model('compact_resnet', 10, size=32)
    before = copy.deepcopy(model.state_dict())
    step(model, 32)
    assert changes(model, before) == set(before) and len(trained_params(model)) == len(list(model.parameters()))

def test_frozen_survives_copies_and_pickles():
    model = build_model('compact_resnet', 10, retrain=0, size=32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del model
        model = twin
        assert type(twin.stem[0]) is nn.Conv2d and not any(m.training for m in twin.train().stem.modules())
        before = copy.deepcopy(twin.state_dict())
        step(twin, 32)
        assert changes(twin, before) == {'fc.weight', 'fc.bias'}

def test_a_copy_is_independent():
    model = build_model('compact_resnet', 10, retrain=0, size=32)
    twin = copy.deepcopy(model)
    set_retrain(twin, -1)
    twin.train()
    assert twin.stem[1].training and not model.train().stem[1].training

def test_retrain_again():
    model = build_model('compact_resnet', 10, retrain=0, size=32)
    keys = list(model.state_dict())
    model.train()
    set_retrain(model, -1)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    set_retrain(model, 0)
    assert not any(m.training for m in model.train().stem.modules()) and list(model.state_dict()) == keys
    set_retrain(model.eval(), -1)
    assert not any(m.training for m in model.modules())
    most = len(blocks(model)) - 1
    assert len(trained_params(set_retrain(model, most))) == len(list(model.parameters()))
    for k in (most + 1, -2, 0.5):
        with pytest.raises(InputError, match=f'1 to {most}'): set_retrain(model, k)

def test_frozen_dropout_and_stochastic_depth():
    model = build_model('efficientnet_b0', 10, retrain=0, size=64).train()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert model(x).equal(model(x))
    set_retrain(model, 3)
    with torch.no_grad(): assert not model(x).equal(model(x))

def test_summary_leaves_the_model_as_it_was():
    model = build_model('vit_b_32', 10, size=64, retrain=1).train()
    before = [m.training for m in model.modules()]
    info = summary(model)
    assert [m.training for m in model.modules()] == before and torch.backends.mha.get_fastpath_enabled()
    assert info.size == 64 and info.trained == sum(p.numel() for p in trained_params(model)) < info.params
    assert '<table>' in info._repr_html_() and 'conv_proj' in repr(info)

# --- stochastic depth ------------------------------------------------------------------------------------------------

PLAIN = 'alexnet', 'small_cnn', 'densenet', 'googlenet', 'inception', 'shufflenet', 'squeezenet', 'vgg' # nothing is added to a shortcut

def hooked(model): return [h.p for m in model.modules() for h in m._forward_hooks.values() if hasattr(h, 'p')]

def depths(model): return [m.p for m in model.modules() if isinstance(m, StochasticDepth)]

@pytest.mark.parametrize('arch', archs())
def test_drop_path_grows_from_0_or_is_refused(arch):
    model = shapes(arch, 7, size=size_of(arch))
    keys = list(model.state_dict())
    if arch.startswith(PLAIN):
        with pytest.raises(InputError, match=f'{arch} has no residual branches') as e: set_drop_path(model, 0.1)
        assert one_line(str(e.value)) and set_drop_path(model, 0) is model and not drop_probs(model)
        return
    probs = list(drop_probs(set_drop_path(model, 0.1)).values())
    assert probs == pytest.approx([0.1*i/(len(probs) - 1) for i in range(len(probs))]) and len(probs) > 2
    assert {0., *depths(model), *hooked(model)} == {*probs} and list(model.state_dict()) == keys
    set_drop_path(set_drop_path(model, 0.2), 0)
    assert not any([*drop_probs(model).values(), *depths(model)]) and not hooked(model)

@pytest.mark.parametrize('arch, rate', [('convnext_tiny', 0.1), ('swin_t', 0.2), ('swin_v2_t', 0.2), ('maxvit_t', 0.2)])
def test_drop_path_is_torchvisions(arch, rate):
    model = shapes(arch, 7)
    own, named = depths(model), drop_probs(model)
    assert max(own) == rate and depths(set_drop_path(model, rate)) == pytest.approx(own)
    assert drop_probs(model) == pytest.approx(named)

def test_drop_path_of_build_model():
    assert max(drop_probs(shapes('efficientnet_b0', 7)).values()) == 0.2*14/16 # as published
    assert max(drop_probs(shapes('efficientnet_b0', 7, drop_path=0.2)).values()) == 0.2
    assert not any(depths(shapes('efficientnet_b0', 7, drop_path=0.)))
    assert not hooked(shapes('resnet18', 7)) and max(hooked(shapes('resnet18', 7, drop_path=0.3))) == 0.3
    for rate in (-0.5, 1., float('nan')): refused(f'drop_path={rate}: it must be a probab', 'compact_resnet', 7, drop_path=rate)
    refused('squeezenet1_1 has no residual', 'squeezenet1_1', 7, drop_path=0.1)

def passes(model, x, seed=0):
    "What residual branches give in a forward pass, in order, and the logits."
    seen = []
    handles = [m.register_forward_hook(lambda m, args, out: seen.append(out.clone())) # `+=` may follow
               for ends in networks._residuals(model).values() for m in ends]
    torch.manual_seed(seed)
    with torch.no_grad(): logits = model(x)
    for h in handles: h.remove()
    return seen, logits

def lost(branch): return ~branch.flatten(1).any(1) # by image

@pytest.mark.parametrize('arch, size', [
    ('resnet18', 64), ('resnet50', 64), ('compact_resnet', 32), ('mobilenet_v2', 64), ('mobilenet_v3_small', 64),
    ('mnasnet0_5', 64), ('regnet_y_400mf', 64), ('vit_b_32', 64), ('convnext_tiny', 64), ('efficientnet_b0', 64),
    ('efficientnet_v2_s', 64), ('swin_t', 64), ('swin_v2_t', 64), ('maxvit_t', 224)])
def test_a_dropped_block_is_its_shortcut(arch, size, monkeypatch):
    "With all branches dropped, each kind of block gives what it gets (after a ReLU, so ReLU changes nothing)."
    small = dict(compact_resnet=CompactResNet(3, (1, 1, 1), (32, 32, 32)),
                 vit_b_32=VisionTransformer(64, 32, 2, 2, 32, 64, num_classes=3))
    model, seen = (small.get(arch) or build_model(arch, 3, size=size)).train(), []
    for m in model.modules():
        if isinstance(m, NORMS): nn.init.ones_(m.weight), nn.init.ones_(m.bias) # or branches may be zero anyway
    for name, ends in networks._residuals(model).items():
        for m in ends: networks._set_drop_prob(m, 1 - 1e-9)
        model.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append((type(m), x[0].clone(), y)))
    with torch.no_grad(): model(torch.randn(2, 3, size, size))
    whole = [(kind, x.equal(y)) for kind, x, y in seen if x.shape == y.shape]
    assert all(same for _, same in whole)
    assert {kind for kind, _ in whole} == {type(m) for m in model.modules()} & set(networks._BRANCHES)

def test_drop_path_is_by_image_scaled_and_seeded():
    model, x = build_model('resnet18', 10, size=32, drop_path=0.5).train(), torch.randn(16, 3, 32, 32)
    once, again, other = passes(model, x), passes(model, x), passes(model, x, 1)
    assert once[1].equal(again[1]) and not once[1].equal(other[1])
    assert not lost(once[0][0]).any() and 0 < lost(once[0][-1]).sum() < 16
    assert not lost(other[0][-1]).equal(lost(once[0][-1]))
    block, z = model.layer4[1], torch.randn(16, 512, 4, 4)
    dropped = passes(nn.Sequential(block), z)[0][0]
    networks._set_drop_prob(block.bn2, 0.)
    stays, whole = ~lost(dropped), passes(nn.Sequential(block), z)[0][0]
    assert 0 < stays.sum() < 16 and torch.allclose(dropped[stays], 2*whole[stays])

@pytest.mark.parametrize('arch', ['resnet18', 'convnext_tiny', 'mobilenet_v3_small'])
@pytest.mark.parametrize('first', ['retrain', 'drop_path'])
def test_frozen_blocks_do_not_drop(arch, first):
    model, k = build_model(arch, 10, size=64), 3
    for what in (('retrain', 'drop_path') if first == 'retrain' else ('drop_path', 'retrain')):
        set_retrain(model, k) if what == 'retrain' else set_drop_path(model, 0.9)
    for m in model.train().modules(): m.train()
    trained = {b.name for b in blocks(model)[-1 - k:]}
    frozen = [name not in trained for name in drop_probs(model)]
    seen = passes(model, torch.randn(16, 3, 64, 64))[0]
    assert 0 < sum(frozen) < len(frozen) == len(seen)
    assert [bool(lost(branch).any()) for branch in seen] == [not f for f in frozen]

@pytest.mark.parametrize('arch', ['resnet18', 'efficientnet_b0'])
def test_drop_path_goes_with_copies(arch):
    model, x = build_model(arch, 10, size=32, drop_path=0.5).train(), torch.randn(8, 3, 32, 32)
    probs = drop_probs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert drop_probs(twin) == probs and passes(twin, x)[1].equal(passes(copy.deepcopy(model), x)[1])
        twin.eval() # as an average of weights is evaluated while the model goes on training
        assert passes(twin, x, 0)[1].equal(passes(twin, x, 1)[1])
        assert not passes(model, x, 0)[1].equal(passes(model, x, 1)[1])
        set_drop_path(twin, 0)
        assert drop_probs(model) == probs and not any(drop_probs(twin).values())

@pytest.mark.parametrize('arch', ['resnet18', 'mobilenet_v2', 'efficientnet_b0'])
def test_drop_path_in_bf16_and_channels_last(arch):
    model = build_model(arch, 10, size=64, drop_path=0.5).train().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        branches, plain = passes(model, x)[0], passes(set_drop_path(copy.deepcopy(model), 0), x)[0]
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    assert any(lost(b).any() for b in branches) and not any(lost(b).any() for b in plain)
    assert [(b.dtype, b.stride()) for b in branches] == [(b.dtype, b.stride()) for b in plain]
    assert all(p.grad.isfinite().all() for p in model.parameters())

# --- parameter groups ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch, token', [
    ('vit_b_32', 'encoder.pos_embedding'), ('vit_b_32', 'class_token'), ('convnext_tiny', 'features.1.0.layer_scale'),
    ('swin_v2_t', 'features.1.0.attn.logit_scale'), ('swin_t', 'features.1.0.attn.relative_position_bias_table')])
def test_no_decay_for_tokens_and_scales(arch, token):
    model = shapes(arch, 10, size=64)
    decayed, rest = param_groups(model, 0.05)
    assert decayed['weight_decay'] == 0.05 and rest['weight_decay'] == 0
    assert any(p is model.get_parameter(token) for p in rest['params'])
    norms = [m.weight for m in model.modules() if isinstance(m, (nn.LayerNorm, NORMS))]
    assert norms and not {id(p) for p in norms} & {id(p) for p in decayed['params']}
    assert len(decayed['params']) + len(rest['params']) == len(list(model.parameters()))

def test_groups_without_decay():
    groups = param_groups(build_model('compact_resnet', 10, retrain=0, size=32), 0.)
    assert sum(len(g['params']) for g in groups) == 2 and {g['weight_decay'] for g in groups} == {0.}

# --- the shared files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch, name, n', [
    ('mobilenet_v2', 'mobilenet_v2-converted.pth', 1000), ('resnet18', 'resnet18-64px.pth', 200),
    ('squeezenet1_1', 'squeezenet1_1-converted.pth', 1000)])
def test_real_weights(arch, name, n):
    path = shared(name)
    model = build_model(arch, 10, path, retrain=0, size=64)
    assert f'the file has {n}' in model.report.head and len(trained_params(model)) == 2
    kept = build_model(arch, n, path, size=64, keep_head=True).eval()
    with torch.no_grad(): assert kept(torch.randn(2, 3, 64, 64)).softmax(1).max() > 2/n # it has an opinion
    assert all(p.dtype == torch.float32 for p in kept.parameters())

def test_real_weights_of_another_architecture():
    assert 'resnet18-64px.pth' in refused('not those of arch=resnet50', 'resnet50', 10, shared('resnet18-64px.pth'))
