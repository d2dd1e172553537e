"Packs: the same batches as their source, found by content, whole or not there, continued after a kill."
import json, os, re, shutil, signal, time
from dataclasses import replace
from pathlib import Path

import cv2, numpy as np, pytest
from PIL import Image

import imgexp.packs as packs
from imgexp.data import BadImage, fingerprint, from_folders, keep_subset, read, stored
from imgexp.loader import Loader
from imgexp.packs import Pack, as_prepared, enough, from_pack, load_images, pack, packed, preparation
from imgexp.runs import InputError, RunFailed
from launch import until

pytestmark = pytest.mark.usefixtures('project')
SHARED = Path(__file__).resolve().parents[2]/'shared/data'

def photo(i, size=(300, 220)):
    y, x = np.mgrid[:size[1], :size[0]]
    image = np.stack([127 + 120*np.sin(x/(9 + i)), 127 + 120*np.cos(y/(7 + i)), (x + y + 30*i) % 256], 2).astype(np.uint8)
    return Image.fromarray(cv2.GaussianBlur(image, (5, 5), 0))

@pytest.fixture
def photos(project):
    "Two classes of six photos; one of each strange kind among them."
    root = project/'photos'
    for c, name in enumerate(('cat', 'dog')):
        (root/name).mkdir(parents=True)
        for i in range(6): photo(6*c + i).save(root/name/f'{i}.jpg', quality=92)
    photo(20).convert('L').save(root/'cat/gray.jpg')
    photo(21).convert('CMYK').save(root/'cat/cmyk.jpg')
    photo(22).quantize(64).save(root/'dog/palette.png')
    exif = Image.Exif(); exif[0x112] = 6
    photo(23).save(root/'dog/turned.jpg', exif=exif)
    photo(24, (40, 30)).save(root/'dog/small.png')
    return root

def quiet(line): pass
def batches(table, **kw):
    kw = dict(size=64, batch_size=5, augment='crop-flip', seed=3) | kw
    return [(x.numpy().copy(), y.numpy().copy()) for x, y in Loader(table, **kw).at(1)]
def same(a, b): return len(a) == len(b) and all((x == v).all() and (y == w).all() for (x, y), (v, w) in zip(a, b))

# -- the same batches

@pytest.mark.parametrize('augment', ['none', 'crop-flip'])
@pytest.mark.parametrize('workers', [0, 3])
def test_a_raw_pack_gives_the_batches_of_the_files_at_its_size(photos, augment, workers):
    files = replace(load_images(photos), presize=128)
    from_files = batches(files, augment=augment)
    assert same(batches(load_images(pack(photos, 128, 'raw', tell=quiet)), augment=augment, workers=workers), from_files)
    assert same(batches(packed(load_images(photos), 64, 'memory'), augment=augment, workers=workers), from_files)
    assert not same(batches(load_images(photos), augment=augment), from_files)

def test_a_pack_of_the_files_themselves_gives_the_batches_of_the_files(photos):
    made = load_images(pack(photos, 0, 'jpeg', tell=quiet))
    assert same(batches(made), batches(load_images(photos))) and preparation(made) == ''
    for i, item in enumerate(made.items): assert stored(made, i) == (photos/item).read_bytes()

def test_a_jpeg_pack_is_a_little_off(photos):
    made = load_images(pack(photos, 128, 'jpeg', tell=quiet))
    a, b = batches(made), batches(replace(load_images(photos), presize=128))
    off = np.concatenate([abs(x.astype(int) - v).mean((1, 2, 3)) for (x, _), (v, _) in zip(a, b)])
    assert 0 < off.mean() < 4 and off.max() < 10
    assert preparation(made) == 'jpeg-128'
    i = list(made.items).index('dog/small.png')
    assert stored(made, i) == (photos/'dog/small.png').read_bytes()  # small enough as it is

def test_evaluation_and_training_see_the_presized_image(photos):
    made = load_images(pack(photos, 96, 'raw', tell=quiet))
    for i, item in enumerate(made.items):
        assert min(read(made, i).shape[:2]) == (30 if 'small' in item else 96)
    turned = read(made, list(made.items).index('dog/turned.jpg'))
    assert turned.shape[0] > turned.shape[1]

# -- found by content

def test_found_for_the_whole_for_classes_and_for_subsets(photos):
    path = pack(photos, 96, 'raw', tell=quiet)
    table = load_images(photos)
    for t in (table, keep_subset(table, 0.4), load_images(photos, 'cat,dog')):
        got = packed(t, 48)
        assert got.pack.path == path and list(got.items) == list(t.items) and fingerprint(got) == fingerprint(t)
        assert same(batches(got), batches(replace(t, presize=96)))

def test_moved_photos_are_the_same_photos(photos, project):
    path = pack(photos, 96, 'raw', tell=quiet)
    os.rename(photos, project/'elsewhere')
    assert packed(load_images(project/'elsewhere'), 64, 'raw-96').pack.path == path

@pytest.mark.parametrize('change', ['content', 'new image', 'renamed'])
def test_changed_photos_are_others(photos, change):
    pack(photos, 128, 'raw', tell=quiet)
    if change == 'content': shutil.copy(photos/'cat/1.jpg', photos/'cat/0.jpg')
    if change == 'new image': shutil.copy(photos/'cat/1.jpg', photos/'cat/new.jpg')
    if change == 'renamed': os.rename(photos/'cat/1.jpg', photos/'cat/one.jpg')
    assert packed(load_images(photos), 100).pack is None
    with pytest.raises(InputError, match='no such pack of photos: `imgexp data pack .* --kind raw --size 128`'):
        packed(load_images(photos), 64, 'raw-128')

def test_a_removed_photo_leaves_a_part_of_the_pack(photos):
    path = pack(photos, 128, 'raw', tell=quiet)
    (photos/'cat/1.jpg').unlink()
    assert packed(load_images(photos), 100).pack.path == path

def test_which_pack(photos):
    table = load_images(photos)
    def chosen(size, how='auto'):
        t = packed(table, size, how)
        return f"{t.pack.about['kind']}-{t.pack.size}" if isinstance(t.pack, Pack) else preparation(t)
    assert [chosen(32), chosen(96)] == ['presize-64', '']
    for kind, size in (('raw', 64), ('jpeg', 64), ('jpeg', 112), ('raw', 200), ('jpeg', 0)): pack(photos, size, kind, tell=quiet)
    assert [chosen(s) for s in (32, 64, 98, 150, 175, 180)] == ['raw-64', 'raw-200', 'raw-200', 'raw-200', 'raw-200', 'jpeg-0']
    assert chosen(180, 'raw-64') == 'raw-64' and chosen(98, 'jpeg-112') == 'jpeg-112' and chosen(98, 'off') == ''
    assert [enough(s) for s in (32, 64, 98, 224)] == [64, 128, 112, 256]

def test_a_network_is_evaluated_on_images_treated_likewise(photos):
    table = load_images(photos)
    assert as_prepared(table, '') is table and as_prepared(table, 'presize-96').presize == 96
    path = pack(photos, 96, 'jpeg', tell=quiet)
    assert as_prepared(table, 'jpeg-96').pack.path == path and as_prepared(table, 'presize-96').pack is None

# -- what can't be decoded

def test_what_cannot_be_decoded_stays_with_its_reason(photos):
    raw = (photos/'cat/3.jpg').read_bytes()
    (photos/'cat/3.jpg').write_bytes(raw[:len(raw)//2])
    (photos/'dog/3.jpg').write_bytes(b'')
    told = []
    for kind in ('raw', 'jpeg'):
        table = load_images(pack(photos, 96, kind, tell=told.append))
        for item, why in {'cat/3.jpg': 'is cut short', 'dog/3.jpg': 'is empty'}.items():
            assert any(f'{item} {why}' in line for line in told)
            with pytest.raises(BadImage, match=why): read(table, list(table.items).index(item))
        assert fingerprint(table) == fingerprint(load_images(photos))
        assert sum(len(y) for _, y in batches(table, bad='skip', train=True)) == sum(len(y) for _, y in batches(load_images(photos), bad='skip', train=True))

# -- whole or not there

SLOW = '''
import imgexp.packs, time
real = imgexp.packs._packed_image
def slow(*args):
    time.sleep(0.05)
    return real(*args)
imgexp.packs._packed_image = slow
imgexp.packs._rows_each = lambda *args: 3
'''

def packing(launcher, project, photos, before=SLOW): return launcher.imgexp('data', 'pack', photos, '--size', 96, '--kind', 'raw', root=project, before=before)
def parts(project): return sorted((project/'cache/imgexp/data/packs').glob('.*.part/images-*.arrow'))

def test_killed_and_continued(launcher, project, photos, monkeypatch):
    job = packing(launcher, project, photos)
    until(lambda: len(parts(project)) >= 2, 'two files of images')
    job.send(signal.SIGKILL); job.wait()
    assert packs.packs() == [] and packed(load_images(photos), 80).pack is None
    done = {p: p.stat().st_mtime_ns for p in parts(project)}
    changed = done.popitem()[0]
    with open(changed, 'r+b') as f: f.write(b'damaged')  # a disk that lies
    job = packing(launcher, project, photos, before="import imgexp.packs; imgexp.packs._rows_each = lambda *args: 3")
    assert job.wait() == 0, job.err
    path = Path(job.out.strip())
    assert {path/p.name: t for p, t in done.items()}.items() <= {p: p.stat().st_mtime_ns for p in path.glob('*.arrow')}.items()
    assert Pack(path).damage() is None and not list(path.parent.glob('.*'))
    monkeypatch.setattr(packs, '_rows_each', lambda *args: 3)
    assert same(batches(load_images(path)), batches(replace(load_images(photos), presize=96)))

def test_terminated(launcher, project, photos):
    job = packing(launcher, project, photos)
    until(lambda: parts(project), 'a file of images')
    job.send(signal.SIGTERM)
    assert job.wait() == 75 and 'terminated' in job.err and packs.packs() == []

def test_a_photo_that_changed_between_two_attempts(launcher, project, photos):
    job = packing(launcher, project, photos)
    until(lambda: len(parts(project)) >= 1, 'a file of images')
    job.send(signal.SIGKILL); job.wait()
    photo(99).save(photos/'cat/0.jpg')
    job = packing(launcher, project, photos, before="import imgexp.packs; imgexp.packs._rows_each = lambda *args: 3")
    assert job.wait() == 0, job.err
    assert same(batches(load_images(Path(job.out.strip()))), batches(replace(load_images(photos), presize=96)))

def test_two_at_once(launcher, project, photos):
    first = packing(launcher, project, photos)
    until(lambda: parts(project), 'a file of images')
    second = packing(launcher, project, photos)
    assert second.wait() == 1 and 'another process is making this pack' in second.err
    assert first.wait() == 0, first.err

def test_again_does_nothing_and_says_so(photos):
    told = []
    path = pack(photos, 96, 'jpeg', tell=told.append)
    stamp = (path/'pack.json').stat().st_mtime_ns
    assert pack(photos, 96, 'jpeg', tell=told.append) == path and 'is there already' in told[-1]
    assert (path/'pack.json').stat().st_mtime_ns == stamp

@pytest.mark.parametrize('name', ['index.arrow', 'images-00000.arrow'])
def test_a_damaged_pack(photos, name):
    path = pack(photos, 96, 'raw', tell=quiet)
    with open(path/name, 'r+b') as f: f.truncate(1000)
    assert name in Pack.damage(type('P', (), {'path': path, 'about': json.loads((path/'pack.json').read_text())})())
    with pytest.raises((InputError, RunFailed), match=f'{name}.*pack it again'): read(load_images(path), 0)

# -- wrong use

WRONG = {
    'no such folder': ('nowhere', (), 2, 'no such folder'),
    'in memory': ('digits', (), 2, 'digits is held in memory already'),
    'kind': ('photos', ('--kind', 'webp'), 2, "kind 'webp'.*jpeg, raw"),
    'size': ('photos', ('--size', '4'), 2, 'size=4 is out of range: 8 to 8192'),
    'raw without a size': ('photos', ('--size', '0', '--kind', 'raw'), 2, 'size=0 is out of range'),
    'size in words': ('photos', ('--size', 'big'), 2, '--size.*integer'),
    'dest is a file': ('photos', ('--dest', 'photos/cat/0.jpg'), 1, '0.jpg'),
    'not fetched': ('imagenette', (), 2, 'imgexp data fetch imagenette'),
}

@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(launcher, project, photos, case):
    data, options, code, says = WRONG[case]
    job = launcher.imgexp('data', 'pack', data, *options, root=project)
    assert job.wait() == code, job.err
    lines = job.err.strip().splitlines()
    assert len(lines) == 1 and re.search(says, lines[0]) and not job.out, job.err

# -- from the command line to a finished run

def test_a_run_finds_the_pack_and_says_so(launcher, project, photos):
    assert launcher.imgexp('data', 'pack', 'photos', '--size', 32, '--kind', 'raw', root=project).wait() == 0
    args = 'train --data photos --size 16 --epochs 1 --batch-size 4 --track off'.split()
    job = launcher.imgexp(*args, root=project)
    assert job.wait() == 0, job.err
    from imgexp.runs import find_run
    run = find_run('', project/'runs')
    assert run.depends['prepared'] == 'presize-32' and re.search(r'time: \d+% waiting for images', job.out)
    shutil.rmtree(project/'cache/imgexp/data/packs')  # the photos alone give the same images, and the run is found again
    job = launcher.imgexp(*args, '--resume', 'reuse', root=project)
    assert job.wait() == 0 and len(list((project/'runs').glob('2*'))) == 1, job.err
    job = launcher.imgexp('eval', run.name, '--split', 'valid', '--json', root=project)
    assert job.wait() == 0, job.err
    assert json.loads(job.out)['loss'] == pytest.approx(run.metrics['valid']['loss'], abs=1e-5)

def test_clothing(project):
    if not (SHARED/'clothing').is_dir(): pytest.skip('clothing is not here: the shared data are not part of the project')
    source = load_images(SHARED/'clothing')
    path = pack(SHARED/'clothing', 64, 'raw', tell=quiet)
    got = packed(source, 32)
    assert got.pack.path == path and Pack(path).damage() is None
    rows = source.split('test')[::31]
    for r in rows: assert (read(got, r) == read(replace(source, presize=64), r)).all()
