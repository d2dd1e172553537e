"The cache of features: bounded, damaged, killed, shared; and a search over heads on it."
import os
import shutil
import signal
import time
from dataclasses import replace
import cv2
import numpy as np
import pytest
import torch
from imgexp.cutting import cut
from imgexp.features import PREPROCESSING_VERSION, View, _lock, _make_room, features, features_dir
from imgexp.learner import to_input
from imgexp.loader import make_batch
from imgexp.models import build_model
from imgexp.sources import load_images
from imgexp.errors import InputError, RunFailed
from pictures import tree

pytestmark = pytest.mark.usefixtures('project')
VIEW = View(32, ((0.5,)*3, (0.5,)*3))

@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return cut(build_model('compact_resnet', 10, retrain=0))

def stored(): return sorted(features_dir().glob('*/*.safetensors'))

@pytest.mark.parametrize('arch, size', {'resnet18': 64, 'mobilenet_v3_small': 64, 'squeezenet1_1': 64, 'densenet121': 64, 'vit_b_32': 64, 'convnext_tiny': 64,
                                        'swin_t': 64, 'googlenet': 64, 'shufflenet_v2_x0_5': 64, 'vgg11_bn': 64}.items())
def test_the_parts_are_the_network_folded_or_not(arch, size):
    from imgexp.features import fuse
    net = build_model(arch, 5, size=size, retrain=0).eval()
    parts, x = cut(net), torch.randn(2, 3, size, size)
    with torch.no_grad():
        whole, features = net(x), parts.prefix(x)
        assert torch.equal(whole, parts.suffix(features))
        assert (fuse(parts.prefix)(x) - features).abs().max() <= 1e-5*features.abs().max()

def test_too_large_for_the_cache(parts):
    with pytest.raises(InputError, match='cache_gb=0.0001: the features of 1,797 images take .*: give cache_gb=1'):
        features(load_images('digits'), parts, VIEW, 'fp32', cache_gb=1e-4)
    with pytest.raises(InputError, match='the features of 1,797 images in 20 views take 23.0 MB: give cache_gb=1, or fewer views'):
        features(load_images('digits'), parts, VIEW, 'fp32', cache_gb=0.02, n_views=20)
    assert not stored()

def test_what_was_used_last_stays(parts):
    table = load_images('digits')
    one, two = (features(table.take(np.arange(k, k + 100)), parts, VIEW, 'fp32') for k in (0, 100))
    old, new = stored()
    os.utime(new, (1, 1))
    _make_room(old.stat().st_size*1.5/1e9, set())
    assert stored() == [old]
    _make_room(0., {old})
    assert stored() == [old]

def test_a_damaged_file_is_computed_again(parts):
    table, told = load_images('digits').take(np.arange(50)), []
    before = features(table, parts, VIEW, 'fp32').take(np.arange(50)).clone()
    path, = stored()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    again = features(table, parts, VIEW, 'fp32', say=told.append)
    assert again.computed == 50 and torch.equal(again.take(np.arange(50)), before) and 'damaged' in told[0]

def test_an_image_that_cannot_be_decoded(parts, tmp_path):
    folder = tree(tmp_path/'images')
    bad = sorted((folder/'circle').iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:40])
    table = load_images(folder)
    with pytest.raises(RunFailed, match='000.png'): features(table, parts, VIEW, 'fp32')
    found = features(table, parts, VIEW, 'fp32', bad='skip')
    assert list(found.skipped) == [os.path.join('circle', '000.png')] and (found.where[:, 0] < 0).sum() == 1 and found.computed == len(table) - 1

def test_what_others_delete_while_images_are_computed(parts, monkeypatch):
    "Another process makes room, or the cache is deleted by hand: no image is without features afterwards, and nothing is computed twice."
    import imgexp.features as f
    monkeypatch.setattr(f, 'FILE_SECONDS', 0)  # a file a batch
    table, add, written = load_images('digits').take(np.arange(400)), f.FeatureCache.add, []
    def deleting(self, *args):
        add(self, *args)
        written.append(1)
        if len(written) in deleted: shutil.rmtree(self.dir)
    deleted = []
    expected = features(table, parts, VIEW, 'fp32').take(np.arange(400)).clone()
    shutil.rmtree(stored()[0].parent)
    monkeypatch.setattr(f.FeatureCache, 'add', deleting)
    for deleted in ([3], range(100)):
        written.clear()
        found = features(table, parts, VIEW, 'fp32')
        assert found.computed == 400 and torch.equal(found.take(np.arange(400)), expected)
        shutil.rmtree(features_dir(), ignore_errors=True)

REPEATED = '''
import time
until = time.monotonic() + 2
while time.monotonic() < until:
    if imgexp.cli.main(sys.argv[1:]): os._exit(1)
'''

def test_clearing_while_features_are_computed(parts, launcher, project, monkeypatch):
    "Two processes clear the cache, others list and verify it: nobody ends in a traceback, and no image is without features."
    import imgexp.features as f
    monkeypatch.setattr(f, 'FILE_SECONDS', 0)
    table = load_images('digits').take(np.arange(150))
    expected = features(table, parts, VIEW, 'fp32').take(np.arange(150)).clone()
    others = [launcher.imgexp('cache', k, root=project, before=REPEATED) for k in ('clear', 'clear', 'ls', 'verify')]
    while not all(job.ended() for job in others):
        assert torch.equal(features(table, parts, VIEW, 'fp32', say=lambda text: None).take(np.arange(150)), expected)
    for job in others: assert job.wait() == 0 and 'Traceback' not in job.err, job.err

def test_data_sets_of_one_backbone_share_the_bound(parts):
    "The least recently used goes, also where it lies beside what is used."
    table = load_images('digits')
    one, two = (features(table.take(np.arange(k, k + 100)), parts, VIEW, 'fp32', cache_gb=1e-4) for k in (0, 100))
    assert len(stored()) == 1 and (two.where[:, 0] >= 0).all() and one.take(np.arange(100)).isfinite().all(), 'what is mapped stays'
    assert features(table.take(np.arange(100, 200)), parts, VIEW, 'fp32').computed == 0

def test_a_cache_of_somebody_else_can_be_read(parts, monkeypatch):
    "Read-only, and all features there: nothing is written, nothing fails."
    table = load_images('digits').take(np.arange(100))
    features(table, parts, VIEW, 'fp32')
    def refuse(*args, **kw): raise PermissionError(13, 'Permission denied')
    for name in ('utime', 'unlink'): monkeypatch.setattr(os, name, refuse)
    assert features(table, parts, VIEW, 'fp32', cache_gb=1e-9).computed == 0
    monkeypatch.setattr(os, 'open', refuse)  # of the lock
    with pytest.raises(RunFailed, match='cannot be written .Permission denied'): features(load_images('digits').take(np.arange(200)), parts, VIEW, 'fp32')

@pytest.mark.parametrize('how', ['rewritten', 'exchanged', 'written just now'])
def test_an_image_that_changes_meanwhile_is_not_kept(parts, tmp_path, monkeypatch, how):
    "Its features would stand under the content that it had before; also where size and time stay, and where a coarse clock shows no change at all."
    import imgexp.contents as d
    import imgexp.features as f
    folder, contents, state = tree(tmp_path/'images'), f.item_contents, f.file_state
    one, two = sorted((folder/'circle').iterdir())[1:3]
    for p in (one, two):
        p.write_bytes(p.read_bytes().ljust(3000, b'\0'))
        os.utime(p, (10**9, 10**9))
    def coarse(path): return '3000 0 0 0' if how == 'written just now' and path == str(one) else state(path)
    monkeypatch.setattr(f, 'file_state', coarse)
    monkeypatch.setattr(d, 'CLOCK', 1e12 if how == 'written just now' else -1)
    def then_changed(table):
        out = contents(table)
        if how == 'exchanged': one.rename(folder/'spare'); two.rename(one); (folder/'spare').rename(two)
        else: cv2.imwrite(str(one), np.full((20, 20, 3), 77, np.uint8))
        return out
    monkeypatch.setattr(f, 'item_contents', then_changed)
    with pytest.raises(RunFailed, match=f'features of {2 if how == "exchanged" else 1} images are missing again'): features(load_images(folder), parts, VIEW, 'fp32')
    monkeypatch.setattr(f, 'item_contents', contents)
    table = load_images(folder)
    found = features(table, parts, VIEW, 'fp32')
    assert found.computed == (2 if how == 'exchanged' else 1)
    images = torch.from_numpy(make_batch(table, np.arange(len(table)), 32)[0])
    with torch.inference_mode(): wanted = parts.prefix.eval()(to_input(images, VIEW.norm))
    assert torch.allclose(found.take(np.arange(len(table))), wanted, atol=1e-5)

def test_images_that_exchange_their_names(parts, tmp_path, monkeypatch):
    "Of one size and time: each has its own features afterwards, and none is computed again."
    import imgexp.contents as d
    monkeypatch.setattr(d, 'CLOCK', -1)
    folder = tree(tmp_path/'images')
    one, two = sorted((folder/'circle').iterdir())[1:3]
    for p in (one, two):
        p.write_bytes(p.read_bytes().ljust(3000, b'\0'))
        os.utime(p, (10**9, 10**9))
    table = load_images(folder)
    before = features(table, parts, VIEW, 'fp32').take(np.arange(len(table))).clone()
    one.rename(folder/'spare'); two.rename(one); (folder/'spare').rename(two)
    after = features(table, parts, VIEW, 'fp32')
    a, b = (list(table.items).index(f'circle/{p.name}') for p in (one, two))
    assert after.computed == 0 and torch.equal(after.take([a, b]), before[[b, a]]) and not torch.equal(before[a], before[b])

def test_other_versions_of_libraries_compute_anew(parts, monkeypatch):
    "What decodes and what computes is part of the key."
    import imgexp.features as f
    table, known = load_images('digits').take(np.arange(20)), f.library_versions()
    assert features(table, parts, VIEW, 'fp32').computed == 20 and features(table, parts, VIEW, 'fp32').computed == 0
    for name in known:
        monkeypatch.setattr(f, 'library_versions', lambda: known | {name: 'next'})
        assert features(table, parts, VIEW, 'fp32').computed == 20

def test_too_little_memory_for_a_batch(parts):
    "Halves, and halves of them; one line where a single image is too large."
    prefix, seen = parts.prefix, []
    class Small(torch.nn.Module):
        def __init__(self, most): super().__init__(); self.inner, self.most = prefix, most
        def forward(self, x):
            seen.append(len(x))
            if len(x) > self.most: raise torch.OutOfMemoryError('CUDA out of memory.')
            return self.inner(x)
    table = load_images('digits').take(np.arange(70))
    plain = features(table, parts, VIEW, 'fp32').take(np.arange(70))
    halved = features(table, replace(parts, prefix=Small(20)), VIEW, 'fp32').take(np.arange(70))
    assert seen == [64, 32, 16, 16, 32, 16, 16, 6] and torch.allclose(plain, halved, atol=1e-5)
    with pytest.raises(RunFailed, match='out of memory with a single image of 32 px'): features(load_images('digits').take(np.arange(70, 80)), replace(parts, prefix=Small(0)), VIEW, 'fp32')

def test_clear_touches_nothing_else(parts):
    from imgexp.features import clear
    features(load_images('digits').take(np.arange(50)), parts, VIEW, 'fp32')
    (features_dir().parent/'data').mkdir()
    for key in ('../data', '..', '/', '*', 'x'):
        with pytest.raises(InputError, match='imgexp cache ls'): clear(key)
    assert stored() and (features_dir().parent/'data').exists()
    folder, told = stored()[0].parent, []
    with _lock(folder.name): assert clear(say=told.append) == 0
    assert told == [f'{folder.name[:8]} is kept: another process is computing or clearing these features'] and stored()
    for name, age in (('.left.part', 3600), ('.young.part', 5)):
        (folder/name).write_bytes(b'half')
        os.utime(folder/name, (time.time() - age,)*2)
    features(load_images('digits').take(np.arange(51)), parts, VIEW, 'fp32')
    assert [p.name for p in folder.glob('.*.part')] == ['.young.part'], 'what a killed process left is gone, what another machine may be writing stays'
    (folder/'.young.part').unlink()
    assert clear(folder.name[:6]) > 0 and not folder.exists()

EXTRACT = '''
import sys, time
import imgexp.features as f
from imgexp.cutting import cut
from imgexp.models import build_model
from imgexp.sources import load_images
f.FILE_SECONDS = 0
add = f.FeatureCache.add
def slow(self, *args):
    add(self, *args)
    print('written', flush=True)
    time.sleep(float(sys.argv[1]))
f.FeatureCache.add = slow
found = f.features(load_images('digits'), cut(build_model('compact_resnet', 10, retrain=0)), f.View(32, ((0.5,)*3, (0.5,)*3)), 'fp32')
print('computed', found.computed)
'''

def test_killed_and_continued(parts):
    import subprocess, sys
    def start(wait): return subprocess.Popen([sys.executable, '-c', EXTRACT, str(wait)], stdout=subprocess.PIPE, text=True)
    job = start(30)
    assert 'written\n' in job.stdout  # reads up to it
    job.send_signal(signal.SIGKILL); job.wait()
    assert len(stored()) == 1
    both = [start(0.01), start(0.01)]
    computed = [int(job.communicate(timeout=120)[0].split()[-1]) for job in both]
    assert sorted(computed) == [0, 1797 - 64], 'the two share the work, and nothing is computed twice'

def test_views_follow_the_image_not_its_place(parts):
    table = load_images('shapes').take(np.arange(20))
    moved = replace(VIEW, augment='crop-flip', number=1)
    one = features(table, parts, moved, 'fp32')
    fewer = features(table.take(np.arange(19, 9, -1)), parts, moved, 'fp32')
    assert fewer.computed == 0 and torch.equal(fewer.take(np.arange(10)), one.take(np.arange(19, 9, -1)))
    assert features(table, parts, replace(moved, number=2), 'fp32').computed == 20

def test_a_mirrored_image_is_another_view(parts):
    "Digits are never mirrored, photos are: the same pixels don't share their views."
    table, moved = load_images('digits').take(np.arange(20)), replace(VIEW, augment='crop-flip')
    one = features(table, parts, moved, 'fp32')
    two = features(replace(table, mirror=True), parts, moved, 'fp32')
    assert two.computed == 20 and not torch.equal(one.take(np.arange(20)), two.take(np.arange(20)))

def test_images_are_made_as_the_key_says(tmp_path):
    "Whoever changes how images are decoded, cut or resized raises `imgexp.features.PREPROCESSING_VERSION`, or cached features would be those of other images; then new values belong here."
    y, x = np.mgrid[0:300, 0:420]
    image = np.stack([(x//20 + y//20)%2*200, y*255//300, x*255//420], 2).astype(np.uint8)  # blue, green, red
    for split in ('train', 'valid', 'test'):
        (tmp_path/'images'/split/'a').mkdir(parents=True); (tmp_path/'images'/split/'b').mkdir()
        for c in 'ab': cv2.imwrite(str(tmp_path/'images'/split/c/'0.png'), image); cv2.imwrite(str(tmp_path/'images'/split/c/'1.jpg'), image)
    made = {size: make_batch(load_images(tmp_path/'images'), [0, 1], size)[0].astype(int) for size in (16, 64, 224)}
    assert PREPROCESSING_VERSION == 2
    known = {16: [[42, 71, 130], [98, 71, 88], [155, 71, 88]], 64: [[37, 65, 19], [97, 65, 124], [157, 65, 124]], 224: [[47, 72, 162], [100, 72, 0], [153, 72, 0]]}
    for size, values in known.items():
        png, jpeg = made[size]
        assert np.abs(png[size//4, ::size//3][:3] - values).max() <= 2, (size, png[size//4, ::size//3][:3].tolist())
        assert np.abs(png - jpeg).mean() < 10
    moved = make_batch(load_images(tmp_path/'images'), [0], 64, 'crop-flip', seed=1, epoch=2)[0][0, 16, ::21][:3].astype(int)
    assert np.abs(moved - [[207, 63, 9], [155, 63, 197], [103, 63, 200]]).max() <= 2
    digit = make_batch(load_images('digits'), [0], 32)[0][0, 5:30:7, 4:30:6, 0].astype(int)
    assert np.abs(digit - [[0, 196, 186, 193, 26], [36, 184, 5, 143, 48], [46, 127, 4, 156, 46], [18, 193, 135, 146, 0]]).max() <= 2

def test_a_search_over_heads(project, parts):
    from imgexp.sweep import make_sweep, run_sweep
    space = {k: {'value': v} for k, v in dict(subset=0.2, size=32, epochs=2, precision='fp32', track='off').items()} | {'head': {'values': ['linear', 'logistic', 'mlp']}}
    sweep = run_sweep(make_sweep({'program': '20_transfer', 'method': 'grid', 'metric': {'name': 'val_accuracy', 'goal': 'maximize'}, 'parameters': space, 'name': 'heads'}).name, say=lambda text: None)
    assert {r['state'] for r in sweep.rows()} == {'done'}, [r['error'] for r in sweep.rows()]
    assert len(list(features_dir().glob('*'))) == 1, 'all heads see the same features'
