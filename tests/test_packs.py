"Packs: the same batches as their source, found by content, whole or not there, continued after a kill."
import json, os, re, shutil, signal
from dataclasses import replace
from pathlib import Path

import cv2, numpy as np, pytest
from PIL import Image

import imgexp.write_packs as write_packs
import imgexp.packs as packs
from imgexp.contents import file_state, fingerprint
from imgexp.data import Files, keep_subset, read, read_stored
from imgexp.decoding import BadImage
from imgexp.loader import Loader
from imgexp.write_packs import build_pack
from imgexp.packs import Pack, preparation, prepare_images, prepare_like, presize_for
from imgexp.sources import load_images
from imgexp.errors import InputError, RunFailed
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
    (project/'a file').touch()
    photo(25, (64, 64)).save(root/'cat/square.jpg', quality=95)    # smaller than most presizes here
    photo(26, (200, 90)).save(root/'dog/wide.jpg', quality=95)
    return root

def quiet(line): pass
def batches(table, **kw):
    kw = dict(size=64, batch_size=5, augment='crop-flip', seed=3) | kw
    return [(x.numpy().copy(), y.numpy().copy()) for x, y in Loader(table, **kw).at(1)]
def same(a, b): return len(a) == len(b) and all((x == v).all() and (y == w).all() for (x, y), (v, w) in zip(a, b))

# -- the same batches

@pytest.mark.parametrize('augment', ['none', 'crop-flip'])
@pytest.mark.parametrize('workers', [0, 3])
@pytest.mark.parametrize('size', [24, 64])
def test_a_raw_pack_gives_the_batches_of_the_files_at_its_size(photos, augment, workers, size):
    kw = dict(augment=augment, workers=workers, size=size)
    from_files = batches(replace(load_images(photos), presize=128), **kw)
    assert same(batches(load_images(build_pack(photos, 128, 'raw', say=quiet)), **kw), from_files)
    assert same(batches(prepare_images(load_images(photos), 64, 'memory-128', say=quiet), **kw), from_files)
    assert not same(batches(load_images(photos), **kw), from_files)

def test_a_pack_of_the_files_themselves_gives_the_batches_of_the_files(photos):
    made = load_images(build_pack(photos, 0, 'jpeg', say=quiet))
    assert same(batches(made), batches(load_images(photos))) and preparation(made) == ''
    for i, item in enumerate(made.items): assert read_stored(made, i) == (photos/item).read_bytes()

def test_a_jpeg_pack_is_a_little_off(photos):
    made = load_images(build_pack(photos, 128, 'jpeg', say=quiet))
    a, b = batches(made), batches(replace(load_images(photos), presize=128))
    off = np.concatenate([abs(x.astype(int) - v).mean((1, 2, 3)) for (x, _), (v, _) in zip(a, b)])
    assert 0 < off.mean() < 4 and off.max() < 10
    assert preparation(made) == 'jpeg-128'
    i = list(made.items).index('dog/small.png')
    assert read_stored(made, i) == (photos/'dog/small.png').read_bytes()  # small enough as it is

def test_evaluation_and_training_see_the_presized_image(photos):
    made = load_images(build_pack(photos, 96, 'raw', say=quiet))
    for i, item in enumerate(made.items):
        assert min(read(made, i).shape[:2]) == {'dog/small.png': 30, 'cat/square.jpg': 64, 'dog/wide.jpg': 90}.get(item, 96)
    turned = read(made, list(made.items).index('dog/turned.jpg'))
    assert turned.shape[0] > turned.shape[1]

# -- found by content

def test_found_for_the_whole_for_classes_and_for_subsets(photos, capsys):
    path = build_pack(photos, 96, 'raw', say=quiet)
    table = load_images(photos)
    for t in (table, keep_subset(table, 0.4), load_images(photos, 'cat,dog')):
        got = prepare_images(t, 48)
        told = capsys.readouterr().out
        assert 'images from the pack photos-raw-96-' in told and 'pack=off takes the files' in told
        assert got.source.path == path and list(got.items) == list(t.items) and fingerprint(got) == fingerprint(t)
        assert same(batches(got), batches(replace(t, presize=96)))

def test_moved_photos_are_the_same_photos(photos, project):
    path = build_pack(photos, 96, 'raw', say=quiet)
    os.rename(photos, project/'elsewhere')
    assert prepare_images(load_images(project/'elsewhere'), 64, 'raw-96').source.path == path

@pytest.mark.parametrize('change', ['content', 'new image', 'renamed'])
def test_changed_photos_are_others(photos, change):
    build_pack(photos, 128, 'raw', say=quiet)
    if change == 'content': shutil.copy(photos/'cat/1.jpg', photos/'cat/0.jpg')
    if change == 'new image': shutil.copy(photos/'cat/1.jpg', photos/'cat/new.jpg')
    if change == 'renamed': os.rename(photos/'cat/1.jpg', photos/'cat/one.jpg')
    assert isinstance(prepare_images(load_images(photos), 100).source, Files)
    with pytest.raises(InputError, match='no such pack of photos: `imgexp data pack .* --kind raw --size 128`'):
        prepare_images(load_images(photos), 64, 'raw-128')

def test_a_removed_photo_leaves_a_part_of_the_pack(photos):
    path = build_pack(photos, 128, 'raw', say=quiet)
    (photos/'cat/1.jpg').unlink()
    assert prepare_images(load_images(photos), 100).source.path == path

def test_which_pack(photos):
    table = load_images(photos)
    def chosen(size, how='auto'):
        t = prepare_images(table, size, how, quiet)
        return f"{t.source.about['kind']}-{t.source.size}" if isinstance(t.source, Pack) else preparation(t)
    assert [chosen(32), chosen(96)] == ['presize-64', '']
    for kind, size in (('raw', 64), ('jpeg', 64), ('jpeg', 112), ('raw', 200), ('jpeg', 0)): build_pack(photos, size, kind, say=quiet)
    assert [chosen(s) for s in (32, 98, 150, 175, 180)] == ['raw-64', 'raw-200', 'raw-200', 'raw-200', 'jpeg-0']
    assert chosen(24) == 'presize-48' and chosen(64) == 'presize-128'  # up to 64 px no pack changes what is seen
    assert chosen(180, 'raw-64') == 'raw-64' and chosen(98, 'jpeg-112') == 'jpeg-112' and chosen(98, 'off') == ''
    assert [presize_for(s) for s in (32, 64, 98, 224)] == [64, 128, 112, 256]

@pytest.mark.parametrize('how', ['memory-0', 'memory-5', 'raw-0', 'raw', 'jpeg-1e3', 'zip-64', ''])
def test_packs_that_cannot_be(photos, how):
    with pytest.raises(InputError, match='give auto, off, memory, or a pack by kind and size'): prepare_images(load_images(photos), 64, how)

def test_images_that_would_fill_the_memory_are_shrunk_in_every_epoch(photos, monkeypatch):
    table, told = load_images(photos), []
    kept = prepare_images(table, 32, say=told.append)
    monkeypatch.setattr(packs, '_fits', lambda table: False)
    others = prepare_images(table, 32, say=told.append)
    assert isinstance(others.source, Files) and not isinstance(kept.source, Files) and preparation(kept) == preparation(others)
    assert 'kept in memory' in told[0] and 'half of the free memory' in told[1] and same(batches(kept, size=32), batches(others, size=32))

def test_a_network_is_evaluated_on_images_treated_likewise(photos):
    table = load_images(photos)
    assert prepare_like(table, '') is table
    files, path = prepare_like(table, 'presize-96'), build_pack(photos, 96, 'raw', say=quiet)
    found = prepare_like(table, 'presize-96')
    assert isinstance(files.source, Files) and found.source.path == path and same(batches(files), batches(found))
    with pytest.raises(InputError, match='the pack jpeg-96 of photos is gone: `imgexp data pack .*photos --kind jpeg --size 96` makes it again'):
        prepare_like(table, 'jpeg-96', same_images=True)
    path = build_pack(photos, 96, 'jpeg', say=quiet)
    assert same(batches(prepare_like(table, 'jpeg-96', same_images=True)), batches(load_images(path)))

def test_a_pack_knows_the_contents_and_nothing_is_read_again(photos, monkeypatch):
    import imgexp.contents
    monkeypatch.setattr(imgexp.contents, 'CLOCK', -1)
    path = build_pack(photos, 128, 'raw', say=quiet)
    monkeypatch.setattr(imgexp.contents, '_digest', lambda path: pytest.fail(f'{path} was read again'))
    assert prepare_images(load_images(photos), 100).source.path == path

def test_many_files_of_images_need_no_open_files(photos, monkeypatch):
    monkeypatch.setattr(write_packs, '_images_per_shard', lambda *args: 1)
    table = load_images(build_pack(photos, 96, 'raw', say=quiet))
    inside = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else pytest.skip('needs /proc')
    for i in range(len(table)): read(table, i)
    assert len(os.listdir('/proc/self/fd')) <= inside + 1

# -- one build

def negatives(photos):
    "The same names and sizes, other pictures."
    for f in photos.rglob('*.*'): Image.fromarray(255 - np.asarray(Image.open(f).convert('RGB'))).save(f)

def test_a_pack_that_was_opened_stays_as_it_was(photos, monkeypatch):
    "Packed again or deleted while a training reads it: the old images, to the end."
    monkeypatch.setattr(write_packs, '_images_per_shard', lambda *args: 2)  # images in a file
    path = build_pack(photos, 96, 'raw', say=quiet)
    wanted, opened = batches(load_images(path)), load_images(path)
    read(opened, 0)
    negatives(photos)
    assert build_pack(photos, 96, 'raw', say=quiet) == path
    assert same(batches(opened), wanted) and not same(batches(load_images(path)), wanted)
    new = load_images(path)
    fresh = batches(new)
    shutil.rmtree(path)
    assert same(batches(new), fresh) and same(batches(opened), wanted)

@pytest.mark.parametrize('name', ['index.arrow', 'images-00000.arrow', 'images-00005.arrow'])
def test_packed_again_while_it_is_opened(photos, monkeypatch, name):
    "Index and images are of one build, whichever file the new build arrives before."
    import pyarrow as pa
    monkeypatch.setattr(write_packs, '_images_per_shard', lambda *args: 2)
    path, other = build_pack(photos, 96, 'raw', say=quiet), photos.parent/'other'
    negatives(photos)
    new, real = build_pack(photos, 96, 'raw', other, say=quiet), pa.memory_map
    def slow(place, *args):
        if os.fsdecode(place) == str(path/name) and new.exists():
            os.rename(path, photos.parent/'old')
            os.rename(new, path)
        return real(place, *args)
    monkeypatch.setattr(pa, 'memory_map', slow)
    opened = load_images(path)
    assert not new.exists() and fingerprint(opened) == fingerprint(load_images(photos))
    assert same(batches(opened), batches(replace(load_images(photos), presize=96)))

def test_files_of_two_builds_are_no_pack(photos, monkeypatch):
    "Copied over each other, say: an error, never another image."
    monkeypatch.setattr(write_packs, '_images_per_shard', lambda *args: 4)
    path = build_pack(photos, 96, 'raw', say=quiet)
    negatives(photos)
    other = build_pack(photos, 96, 'raw', photos.parent/'other', say=quiet)
    shutil.copy(other/'images-00001.arrow', path)
    table = load_images(path)
    read(table, 0)
    with pytest.raises(RunFailed, match=r'images-00001.arrow is damaged .it belongs to another build of the pack.: pack it again'): read(table, 4)
    shutil.copy(other/'index.arrow', path)
    with pytest.raises(InputError, match=r'is damaged .index.arrow: it belongs to another build of the pack.: pack it again'): load_images(path)

def test_a_pack_that_goes_away_on_a_network_disk(photos, monkeypatch):
    "What is mapped is lost there: one line that says what to do."
    path = build_pack(photos, 96, 'raw', say=quiet)
    monkeypatch.setattr(packs, 'RECHECK', 0)
    monkeypatch.setattr(packs, 'REMOTE', [packs._disk_kind(path)])
    table = load_images(path)
    read(table, 0)
    negatives(photos)
    build_pack(photos, 96, 'raw', say=quiet)
    with pytest.raises(RunFailed, match='was deleted or packed again while it was being read, .* run the command again'): read(table, 1)

def test_a_training_on_a_pack_that_is_packed_again(launcher, project, photos):
    "Its test images are those that it began with."
    for split, n in (('train', 4), ('test', 2)):
        for c in ('cat', 'dog'):
            (project/'data'/split/c).mkdir(parents=True)
            for i in range(n): shutil.copy(photos/c/f'{i if split == "train" else i + 4}.jpg', project/'data'/split/c)
    small = 'import imgexp.write_packs as p; p._images_per_shard = lambda *args: 1; '
    def packing():
        job = launcher.imgexp('data', 'pack', 'data', '--size', 32, '--kind', 'raw', root=project, before=small)
        assert job.wait() == 0, job.err
        return job.out.strip()
    path = packing()
    args = f'train --data {path} --size 16 --epochs 1 --batch-size 4 --workers 0 --track off --resume never'.split()
    assert launcher.imgexp(*args, root=project).wait() == 0
    job = launcher.imgexp(*args, root=project, before="""import imgexp.train as t, time, pathlib
real = t.finish_run
def finish_run(*args, **kw):
    pathlib.Path('trained').touch()
    while not pathlib.Path('packed').exists(): time.sleep(0.01)
    return real(*args, **kw)
t.finish_run = finish_run""")
    until((project/'trained').exists, 'the end of the training')
    negatives(project/'data')
    assert packing() == path
    (project/'packed').touch()
    assert job.wait() == 0, job.err
    from imgexp.runs import Run
    one, two = (Run(d).metrics['test'] for d in sorted((project/'runs').glob('2*')))
    assert one == two

def test_a_pack_that_was_exchanged_since_a_run(photos):
    "Another pack of the same photos under the name that the run was given: not evaluated on, as the network saw other images."
    path, table = build_pack(photos, 96, 'jpeg', say=quiet), load_images(photos)
    prepared = preparation(load_images(path))
    shutil.rmtree(path)
    os.rename(build_pack(photos, 64, 'raw', say=quiet), path)
    with pytest.raises(InputError, match='holds presize-64, but the run used jpeg-96: `imgexp data pack .*photos --kind jpeg --size 96`'): prepare_like(load_images(path), prepared, same_images=True)
    assert prepare_like(load_images(path), 'presize-64', same_images=True) is not None

# -- what can't be decoded

def test_what_cannot_be_decoded_stays_with_its_reason(photos):
    raw = (photos/'cat/3.jpg').read_bytes()
    (photos/'cat/3.jpg').write_bytes(raw[:len(raw)//2])
    (photos/'dog/3.jpg').write_bytes(b'')
    told = []
    for kind in ('raw', 'jpeg'):
        table = load_images(build_pack(photos, 96, kind, say=told.append))
        for item, why in {'cat/3.jpg': 'is cut short', 'dog/3.jpg': 'is empty'}.items():
            assert any(f'{item} {why}' in line for line in told)
            with pytest.raises(BadImage, match=why): read(table, list(table.items).index(item))
        assert fingerprint(table) == fingerprint(load_images(photos))
        assert sum(len(y) for _, y in batches(table, bad='skip', train=True)) == sum(len(y) for _, y in batches(load_images(photos), bad='skip', train=True))

def test_a_file_that_cannot_be_read_does_not_hide_the_pack(photos):
    (photos/'cat/lost.jpg').symlink_to('nowhere.jpg')
    path = build_pack(photos, 128, 'raw', say=quiet)
    assert prepare_images(load_images(photos), 100).source.path == path and fingerprint(load_images(path)) == fingerprint(load_images(photos))

@pytest.mark.parametrize('kind', ['raw', 'jpeg'])
def test_a_pack_is_checked_like_its_files(photos, kind):
    from imgexp.check import check
    path = build_pack(photos, 96, kind, say=quiet)
    found, wanted = (set(check(p).table().kind) for p in (path, photos))
    assert 'wrong extension' not in found and found <= wanted, found - wanted
    with open(path/'images-00000.arrow', 'r+b') as f: f.seek(5000); f.write(b'oops')
    with pytest.raises(RunFailed, match='images-00000.arrow has changed: pack it again'): check(path)

def test_a_picture_too_long_for_jpeg(photos):
    Image.fromarray(np.zeros((9, 70_000, 3), np.uint8)).save(photos/'cat/long.png')
    table = load_images(build_pack(photos, 8, 'jpeg', say=quiet))
    assert read(table, list(table.items).index('cat/long.png')).shape[0] == 8

def test_damaged_progressive_jpegs_never_show_another_image(photos):
    from imgexp.decoding import decode
    rng, odd = np.random.default_rng(0), 0
    f = photos/'p.jpg'
    photo(3, (128, 96)).save(f, progressive=True)
    raw = f.read_bytes()
    for _ in range(300):
        k = int(rng.integers(2, len(raw)))
        bad, seen = raw[:k] + bytes([int(rng.integers(256))]) + raw[k + 1:], []
        for fill in (0, 255):
            try: seen.append(decode(bad, scratch=lambda n: np.full(n, fill, np.uint8)).copy())
            except BadImage: odd += 1
        assert len(seen) in (0, 2) and (not seen or (seen[0] == seen[1]).all()), k
    assert odd

# -- whole or not there

OLD = 'import imgexp.contents; imgexp.contents.CLOCK = -1\n'  # as if the photos were older than two seconds
SLOW = '''
import imgexp.write_packs, time
real = imgexp.write_packs._packed_image
def slow(*args):
    time.sleep(0.05)
    return real(*args)
imgexp.write_packs._packed_image = slow
imgexp.write_packs._images_per_shard = lambda *args: 3
''' + OLD

def packing(launcher, project, photos, before=SLOW): return launcher.imgexp('data', 'pack', photos, '--size', 96, '--kind', 'raw', root=project, before=before)
def parts(project): return sorted((project/'cache/imgexp/data/packs').glob('.*.part/images-*.arrow'))

def test_killed_and_continued(launcher, project, photos, monkeypatch):
    job = packing(launcher, project, photos)
    until(lambda: len(parts(project)) >= 2, 'two files of images')
    job.send(signal.SIGKILL); job.wait()
    assert packs.list_packs() == [] and isinstance(prepare_images(load_images(photos), 80).source, Files)
    done = {p: p.stat().st_mtime_ns for p in parts(project)}
    changed = done.popitem()[0]
    with open(changed, 'r+b') as f: f.write(b'damaged')  # a disk that lies
    job = packing(launcher, project, photos, before="import imgexp.write_packs; imgexp.write_packs._images_per_shard = lambda *args: 3")
    assert job.wait() == 0, job.err
    path = Path(job.out.strip())
    assert {path/p.name: t for p, t in done.items()}.items() <= {p: p.stat().st_mtime_ns for p in path.glob('*.arrow')}.items()
    assert Pack(path).damage() is None and not list(path.parent.glob('.*'))
    monkeypatch.setattr(write_packs, '_images_per_shard', lambda *args: 3)
    assert same(batches(load_images(path)), batches(replace(load_images(photos), presize=96)))

def test_terminated(launcher, project, photos):
    job = packing(launcher, project, photos)
    until(lambda: parts(project), 'a file of images')
    job.send(signal.SIGTERM)
    assert job.wait() == 75 and 'terminated' in job.err and packs.list_packs() == []

@pytest.mark.parametrize('how', ['saved', 'exchanged', 'saved just now'])
def test_a_photo_that_changed_between_two_attempts(launcher, project, photos, how):
    "Also two of one size and time that exchange their names; and what was just written is packed again, as its clock may be coarse."
    one, two = photos/'cat/0.jpg', photos/'cat/1.jpg'
    for i, f in enumerate((one, two)):  # of one size: a comment fills them
        raw = f.read_bytes()
        f.write_bytes(raw[:2] + b'\xff\xfe' + (fill := 60_000 - len(raw) - 2).to_bytes(2, 'big') + bytes(fill - 2) + raw[2:])
        os.utime(f, ns=(10**18, 10**18))
    assert one.stat().st_size == two.stat().st_size == 60_000
    job = packing(launcher, project, photos, SLOW + 'imgexp.contents.CLOCK = 1e9'*(how == 'saved just now'))
    until(lambda: len(list(parts(project)[0].parent.glob('images-*.json')) if parts(project) else []) >= 1, 'a file of images')
    job.send(signal.SIGKILL); job.wait()
    side = next((project/'cache/imgexp/data/packs').glob('.*.part/images-00000.json'))
    if how == 'exchanged': one.rename(photos/'spare'); two.rename(one); (photos/'spare').rename(two)
    else: photo(99).save(one)
    if how == 'saved just now':  # an unlucky clock: the state is that of the first attempt, as far as that was noted
        told = json.loads(side.read_text())
        told['stamps'] = [[*rest, state and file_state(photos/rest[0])] for *rest, state in told['stamps']]
        side.write_text(json.dumps(told))
    job = packing(launcher, project, photos, before="import imgexp.write_packs; imgexp.write_packs._images_per_shard = lambda *args: 3")
    assert job.wait() == 0, job.err
    assert same(batches(load_images(Path(job.out.strip()))), batches(replace(load_images(photos), presize=96)))

def test_a_photo_that_was_moved_to_another_class_between_two_attempts(launcher, project, photos):
    job = packing(launcher, project, photos)
    until(lambda: len(parts(project)) >= 3, 'three files of images')
    job.send(signal.SIGKILL); job.wait()
    os.rename(photos/'cat/square.jpg', photos/'dog/-.jpg')  # the same place in the table
    job = packing(launcher, project, photos, before="import imgexp.write_packs; imgexp.write_packs._images_per_shard = lambda *args: 3")
    assert job.wait() == 0, job.err
    made = load_images(Path(job.out.strip()))
    assert fingerprint(made) == fingerprint(load_images(photos))
    assert list(made.items) == list(load_images(photos).items) and (made.labels == load_images(photos).labels).all()

def test_killed_before_it_got_its_name(launcher, project, photos):
    "Between pack.json and the name: not a pack yet, and hardly anything is done again."
    job = launcher.imgexp('data', 'pack', photos, '--size', 96, '--kind', 'raw', root=project,
                          before=OLD + "import imgexp.write_packs, signal; imgexp.write_packs.fingerprint = lambda table: os.kill(os.getpid(), signal.SIGKILL)")
    job.wait()
    assert parts(project) and packs.list_packs() == []
    stamps = {p.name: p.stat().st_mtime_ns for p in parts(project)}
    job = launcher.imgexp('data', 'pack', photos, '--size', 96, '--kind', 'raw', root=project)
    assert job.wait() == 0, job.err
    path = Path(job.out.strip())
    assert {p.name: p.stat().st_mtime_ns for p in path.glob('images-*')} == stamps and Pack(path).damage() is None

def test_two_at_once(launcher, project, photos):
    first = packing(launcher, project, photos)
    until(lambda: parts(project), 'a file of images')
    second = packing(launcher, project, photos)
    assert second.wait() == 1 and 'another process is making this pack' in second.err
    assert first.wait() == 0, first.err

def test_again_does_nothing_and_says_so(photos):
    told = []
    path = build_pack(photos, 96, 'jpeg', say=told.append)
    stamp = (path/'pack.json').stat().st_mtime_ns
    assert build_pack(photos, 96, 'jpeg', say=told.append) == path and 'is there already' in told[-1]
    assert (path/'pack.json').stat().st_mtime_ns == stamp

@pytest.mark.parametrize('name', ['index.arrow', 'images-00000.arrow'])
def test_a_damaged_pack(photos, name):
    path = build_pack(photos, 96, 'raw', say=quiet)
    with open(path/name, 'r+b') as f: f.truncate(1000)
    assert name in Pack.damage(type('P', (), {'path': path, 'about': json.loads((path/'pack.json').read_text())})())
    with pytest.raises((InputError, RunFailed), match=f'{name}.*pack it again'): read(load_images(path), 0)
    if name == 'index.arrow': assert isinstance(prepare_images(load_images(photos), 80).source, Files)
    assert build_pack(photos, 96, 'raw', say=quiet) == path and Pack(path).damage() is None  # which is what "pack it again" says
    assert prepare_images(load_images(photos), 80).source.path == path

def test_packs_that_are_not_used_are_reported(photos):
    "Damaged ones, and those of another version; data of another name are not mentioned."
    path, told = build_pack(photos, 128, 'raw', say=quiet), []
    raw = (path/'index.arrow').read_bytes()
    (path/'index.arrow').write_bytes(raw[:1000])
    assert isinstance(prepare_images(load_images(photos), 100, say=told.append).source, Files)
    (path/'index.arrow').write_bytes(raw)
    about = json.loads((path/'pack.json').read_text())
    (path/'pack.json').write_text(json.dumps(about | {'format': 1}))
    assert isinstance(prepare_images(load_images(photos), 100, say=told.append).source, Files)
    assert [line.partition('-raw')[2].partition(' ')[2] for line in told] == [
        'is damaged (index.arrow: Not an Arrow file): pack it again', 'is not used: it is from another version of imgexp, pack it again'], told
    with pytest.raises(InputError, match='was packed by another version of imgexp: pack it again'): load_images(path)
    os.rename(photos, photos.parent/'others')
    prepare_images(load_images(photos.parent/'others'), 100, say=told.append)
    assert len(told) == 2

# -- wrong use

WRONG = {
    'no such folder': ('nowhere', (), 2, 'no such folder'),
    'in memory': ('digits', (), 2, 'digits is in memory already'),
    'kind': ('photos', ('--kind', 'webp'), 2, "kind 'webp'.*jpeg, raw"),
    'size': ('photos', ('--size', '4'), 2, 'size=4: give 8 to 8192 px'),
    'raw without a size': ('photos', ('--size', '0', '--kind', 'raw'), 2, 'size=0: .*goes with kind jpeg'),
    'a file': ('photos/cat/0.jpg', (), 2, 'is a file: give a folder of class folders'),
    'size in words': ('photos', ('--size', 'big'), 2, '--size.*integer'),
    'dest is a file': ('photos', ('--dest', 'a file'), 1, 'a file'),
    'dest among the images': ('photos', ('--dest', 'photos/packs'), 2, 'is inside the folder of images'),
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
    from imgexp.start import find_run
    run = find_run('', project/'runs')
    assert run.depends['prepared'] == 'presize-32' and re.search(r'time: \d+% waiting for images', job.out)
    assert 'images from the pack photos-raw-32-' in job.out
    shutil.rmtree(project/'cache/imgexp/data/packs')  # the photos alone give the same images, and the run is found again
    job = launcher.imgexp(*args, '--resume', 'reuse', root=project)
    assert job.wait() == 0 and len(list((project/'runs').glob('2*'))) == 1, job.err
    job = launcher.imgexp('eval', run.name, '--split', 'valid', '--json', root=project)
    assert job.wait() == 0, job.err
    assert json.loads(job.out)['loss'] == pytest.approx(run.metrics['valid']['loss'], abs=1e-5)

def test_a_pack_made_between_a_kill_and_its_continuation(launcher, project, photos):
    args = 'train --data photos --size 72 --epochs 2 --batch-size 4 --track off'.split()
    job = launcher.imgexp(*args, root=project, before="import imgexp.train as t; t.finish_run = lambda *args: os._exit(1)")
    assert job.wait() == 1
    first = next((project/'runs').glob('2*')).name
    assert launcher.imgexp('data', 'pack', 'photos', '--size', 96, '--kind', 'jpeg', root=project).wait() == 0
    job = launcher.imgexp(*args, root=project)
    assert job.wait() == 0 and re.search(f'run {first} is unfinished, but used other images .*as they are, here jpeg-96.*pack=off continues it', job.out)
    job = launcher.imgexp(*args, '--pack', 'off', root=project)
    assert job.wait() == 0 and len(list((project/'runs').glob('2*'))) == 2, job.err

def test_clothing(project):
    if not (SHARED/'clothing').is_dir(): pytest.skip('clothing is not here: the shared data are not part of the project')
    source = load_images(SHARED/'clothing')
    path = build_pack(SHARED/'clothing', 64, 'raw', say=quiet)
    got = prepare_images(source, 32)
    assert got.source.path == path and Pack(path).damage() is None
    rows = source.split('test')[::31]
    for r in rows: assert (read(got, r) == read(replace(source, presize=64), r)).all()
