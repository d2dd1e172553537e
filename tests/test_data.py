"imgexp.data against real trees: strange files, strange names, links, no leak from test, and nothing read twice."
import gzip, hashlib, io, json, os, re, shutil, sqlite3, time
from pathlib import Path

import cv2, numpy as np, pytest
from PIL import Image

import imgexp.contents as d
from imgexp.contents import fingerprint
from imgexp.data import Files, keep_subset, read
from imgexp.decoding import BadImage, decode
from imgexp.loader import Loader, normalization
from imgexp.sources import load_images
from imgexp.errors import InputError, RunFailed
from imgexp.start import find_run
from pictures import CLASSES, tree

pytestmark = pytest.mark.usefixtures('project')
SHARED = Path(__file__).resolve().parents[2]/'shared/data'
SMALL = '--size 8 --epochs 1 --batch-size 8 --workers 0 --track off'.split()

def shared(name):
    path = SHARED/name
    if not path.is_dir(): pytest.skip(f'{name} is not here: the shared data are not part of the project')
    return path

def batches(loader): return [(x.numpy(), y.numpy()) for x, y in loader]
def same(a, b): return len(a) == len(b) and all((x == v).all() and (y == w).all() for (x, y), (v, w) in zip(a, b))

# -- strange files

def encoded(image, kind, **kw):
    f = io.BytesIO()
    image.save(f, kind, **kw)
    return f.getvalue()

def picture():
    y, x = np.mgrid[:24, :32]
    return Image.fromarray(np.uint8(np.stack([8*x, 10*y, 255 - 4*x - 4*y], 2)))

def turned(image):
    exif = image.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    return exif

def strange():
    "File name to content: every kind that real collections hold, from one picture."
    rgb, alpha = picture(), picture()
    alpha.putalpha(200)
    return {'plain.jpg': encoded(rgb, 'JPEG', quality=95), 'cmyk.jpg': encoded(rgb.convert('CMYK'), 'JPEG', quality=95),
            'gray.jpg': encoded(rgb.convert('L'), 'JPEG'), 'progressive.jpg': encoded(rgb, 'JPEG', progressive=True, quality=95),
            'exif.jpg': encoded(rgb, 'JPEG', exif=turned(rgb), quality=95), 'gif named.jpg': encoded(rgb, 'GIF'),
            'png named.jpeg': encoded(rgb, 'PNG'), 'jpeg named.png': encoded(rgb, 'JPEG', quality=95),
            'rgba.png': encoded(alpha, 'PNG'), 'palette.png': encoded(rgb.quantize(64), 'PNG'),
            'palette with transparency.png': encoded(rgb.quantize(64), 'PNG', transparency=0),
            'gray with alpha.png': encoded(alpha.convert('LA'), 'PNG'), 'one bit.png': encoded(rgb.convert('1'), 'PNG'),
            '16 bit.png': encoded(Image.fromarray(np.uint16(np.asarray(rgb.convert('L')))*256), 'PNG'),
            'a.bmp': encoded(rgb, 'BMP'), 'a.webp': encoded(rgb, 'WEBP', quality=95), 'a.tiff': encoded(rgb, 'TIFF'),
            'a.ppm': encoded(rgb, 'PPM'), 'a.gif': encoded(rgb, 'GIF')}

def test_a_comment_before_the_exif_data():
    raw = encoded(picture(), 'JPEG', exif=turned(picture()), quality=95)
    assert decode(raw[:2] + b'\xff\xfe\x00\x06text' + b'\xff' + raw[2:]).shape == decode(raw).shape == (32, 24, 3)

def test_a_link_to_itself(project):
    data = tree(project/'data', 4)
    (data/'circle/loop.png').symlink_to('loop.png')
    with pytest.raises(BadImage, match='circle/loop.png cannot be read'): batches(Loader(load_images(data), 'train', 8, train=False))

DAMAGED = {'zero bytes.png': b'', 'truncated.jpg': encoded(picture(), 'JPEG')[:-90], 'truncated.png': encoded(picture(), 'PNG')[:-90],
           'truncated.gif': encoded(picture(), 'GIF')[:40], 'page.jpg': b'<html>not found</html>', 'zeros.jpg': bytes(500)}

@pytest.mark.parametrize('name', strange())
def test_strange_files_are_upright_and_in_color(name):
    image, wanted = decode(strange()[name]), np.asarray(picture())
    if name == 'exif.jpg': wanted = np.rot90(wanted, -1)
    if re.match('gray|16 bit', name): wanted = np.asarray(picture().convert('L'))[..., None].repeat(3, 2)
    if name == 'one bit.png': wanted = np.asarray(picture().convert('1').convert('RGB'))
    if name in ('rgba.png', 'gray with alpha.png'): wanted = wanted*(200/255) + 255*(55/255)
    assert image.dtype == np.uint8 and image.shape == wanted.shape
    far = abs(image.astype(float) - wanted).mean()
    assert far < {'palette with transparency.png': 20}.get(name, 8), far

@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_files_are_refused(name):
    with pytest.raises(BadImage) as e: decode(DAMAGED[name])
    wanted = {'zero bytes.png': 'is empty', 'truncated.jpg': 'is cut short', 'truncated.png': 'is cut short', 'truncated.gif': 'is damaged, .+'}
    assert re.fullmatch(wanted.get(name, 'is not an image that can be read'), str(e.value))

@pytest.fixture
def zoo(project):
    "Two classes, each with all the strange files; one has the damaged ones too."
    for c in ('circle', 'square'):
        (project/'zoo'/c).mkdir(parents=True)
        for name, raw in strange().items(): (project/'zoo'/c/name).write_bytes(raw)
    for name, raw in DAMAGED.items(): (project/'zoo/square'/name).write_bytes(raw)
    return project/'zoo'

@pytest.mark.parametrize('workers', [0, 2])
def test_strange_files_train_end_to_end(launcher, project, zoo, workers):
    job = launcher.imgexp('train', *SMALL, '--data', zoo, '--bad', 'skip', '--workers', workers, root=project)
    assert job.wait() == 0, job.err
    run = find_run('', project/'runs')
    assert set(run.metrics['skipped']) == {f'square/{n}' for n in DAMAGED}
    assert run.metrics['valid']['top1']['n'] + sum(run.history.images) <= 2*len(strange())
    job = launcher.imgexp('predict', run.name, zoo, root=project)
    assert job.wait() == 0, job.err
    lines = job.out.splitlines()
    assert len(lines) == 1 + 2*len(strange()) + len(DAMAGED)
    assert f'{len(DAMAGED)} of {len(lines) - 1} images could not be read' in job.err

def test_a_batch_of_damaged_files_only(project):
    "Neither a crash nor a shift of the batches that follow."
    data = tree(project/'data', 8)
    for f in (data/'square').iterdir(): f.write_bytes(b'')
    table = load_images(data)
    got = batches(Loader(table, 'train', 8, batch_size=1, bad='skip', workers=1))
    assert sum(len(y) for _, y in got) == (table.labels[table.split('train')] == 0).sum()
    assert normalization(table, 8)[0][0] > 0

def test_all_files_damaged(launcher, project):
    data = tree(project/'data', 8)
    for f in data.rglob('*.png'): f.write_bytes(b'')
    job = launcher.imgexp('train', *SMALL, '--data', data, '--bad', 'skip', root=project)
    assert job.wait() == 1, job.err
    lines = [l for l in job.err.splitlines() if l.strip()]
    assert len(lines) == 1 and 'can be read' in lines[0], job.err

# -- no leak from test

def test_test_images_change_nothing_before_the_end(launcher, project):
    "Other test images, even damaged ones: the same normalization, batches and weights after an epoch."
    data = tree(project/'one/train', 12); tree(project/'one/test', 6, seed=1)
    shutil.copytree(project/'one', project/'two')
    for f in (project/'two/test').rglob('*.png'): cv2.imwrite(str(f), np.full((90, 30, 3), 255, np.uint8))
    a, b = (load_images(project/n) for n in ('one', 'two'))
    assert fingerprint(a) != fingerprint(b)
    assert normalization(a, 8) == normalization(b, 8)
    x, y = (batches(Loader(t, 'train', 8, 8, 'crop-flip', seed=3).at(2)) for t in (a, b))
    assert same(x, y) and not same(batches(Loader(a, 'test', 8)), batches(Loader(b, 'test', 8)))
    told = []
    for name in ('one', 'two'):
        (project/f'root {name}').mkdir()
        job = launcher.imgexp('train', *SMALL, '--data', project/name, root=project/f'root {name}')
        assert job.wait() == 0, job.err
        run = find_run('', project/f'root {name}/runs')
        files = json.loads(next(run.dir.glob('checkpoints/step-*/COMMITTED.json')).read_text())['files']
        told.append((files['model.safetensors']['sha256'], run.history.train_loss.tolist(), run.metrics['valid'], run.metrics['test']))
    assert told[0][:3] == told[1][:3] and told[0][3] != told[1][3]

def test_subsets_leave_valid_and_test_alone():
    table = load_images('digits')
    small = keep_subset(table, 0.1, seed=1)
    for split in ('valid', 'test'): assert (small.items[small.split(split)] == table.items[table.split(split)]).all()

# -- purity

def test_any_number_of_workers_gives_the_same_epochs(project):
    table = load_images(tree(project/'data', 20, CLASSES))
    def loader(workers): return Loader(table, 'train', 16, 10, 'crop-flip', seed=5, workers=workers)
    wanted = [batches(loader(0).at(e)) for e in (0, 1)]
    assert not same(*wanted)
    for workers in (1, 2, 4):
        l = loader(workers)
        for e in (0, 1): assert same(batches(l.at(e)), wanted[e]), workers
        assert same(batches(l.at(1, start=3)), wanted[1][3:]), workers

def test_what_was_drawn_before_changes_nothing(project):
    import random, torch
    table = load_images(tree(project/'data', 10))
    one = batches(Loader(table, 'train', 16, 4, 'crop-flip'))
    random.seed(9); np.random.seed(9); torch.manual_seed(9)
    assert same(batches(Loader(table, 'train', 16, 4, 'crop-flip')), one)
    assert not same(batches(Loader(table, 'train', 16, 4, 'crop-flip', seed=1)), one)

# -- trees

def test_a_class_of_one_image(launcher, project):
    tree(project/'data', 10)
    (project/'data/owl').mkdir()
    shutil.copy(project/'data/circle/000.png', project/'data/owl')
    table = load_images(project/'data')
    assert table.counts().tolist() == [[8, 2, 0], [1, 0, 0], [8, 2, 0]]
    for fraction in (0.01, 0.5, 1): assert keep_subset(table, fraction).counts()[1, 0] == 1
    job = launcher.imgexp('train', *SMALL, '--data', 'data', '--subset', '0.1', root=project)
    assert job.wait() == 0, job.err

def test_empty_class_and_missing_folders(project):
    data = tree(project/'data', 3)
    (data/'owl').mkdir()
    with pytest.raises(InputError, match="class 'owl' in .* has no training image"): load_images(data)
    assert load_images(data, 'circle,square').classes == ['circle', 'square']
    with pytest.raises(InputError, match='no such folder'): load_images(project/'nowhere')
    with pytest.raises(InputError, match='no images in'): load_images(data/'owl')
    shutil.rmtree(data/'square'); shutil.rmtree(data/'owl')
    with pytest.raises(InputError, match='only one class'): load_images(data)

def test_too_few_images_to_validate_on(project):
    with pytest.raises(InputError, match='two is too small for a validation split: at least one class needs three images'): load_images(tree(project/'two', 2))
    assert load_images(tree(project/'three', 3)).counts().tolist() == [[2, 1, 0]]*2

def test_a_class_without_test_images(project):
    tree(project/'data/train', 5); tree(project/'data/test', 2, ['circle'])
    assert load_images(project/'data').counts().tolist() == [[4, 1, 2], [4, 1, 0]]

@pytest.mark.parametrize('name', ['val', 'valid', 'validation', 'Val'])
def test_names_of_the_validation_split(project, name):
    tree(project/'data/Train', 4); tree(project/'data'/name, 2)
    assert load_images(project/'data').counts().tolist() == [[4, 2, 0]]*2

def test_names_with_spaces_accents_and_upper_case(launcher, project):
    data = tree(project/'mes données', 8, ['circle'])
    (data/'circle').rename(data/'Chêne à feuilles')
    tree(data, 8, ['square'])
    (data/'square').rename(data/'犬 and, 猫')
    for i, f in enumerate(sorted(data.rglob('*.png'))): f.rename(f.with_name(f'Bild {i} (größer).' + ('PNG', 'JPG', 'jPeG')[i % 3]))
    for name in ('.DS_Store', '.hidden.png', 'Thumbs.db', 'notes.txt'): (data/'犬 and, 猫'/name).write_bytes(b'no image')
    (data/'.git').mkdir()
    table = load_images(data)
    assert table.classes == ['Chêne à feuilles', '犬 and, 猫'] and table.counts().sum(1).tolist() == [8, 8]
    assert len(batches(Loader(table, 'train', 8, 4))) == 3 and fingerprint(table).startswith('sha256:')
    job = launcher.imgexp('train', *SMALL, '--data', 'mes données', root=project, LC_ALL='C')
    assert job.wait() == 0, job.err

def test_a_name_that_is_not_unicode(project):
    "As old archives bring them."
    data = tree(project/'data', 4)
    try: os.rename(os.fsencode(data/'circle/000.png'), os.fsencode(data/'circle')+b'/caf\xe9.png')
    except OSError: pytest.skip('this file system takes only unicode names')
    table = load_images(data)
    assert len(table) == 8 and fingerprint(table) == fingerprint(table)
    assert sum(len(y) for _, y in batches(Loader(table, 'train', 8))) == 6

def test_links(project):
    "Links to folders and files are followed; a link to nowhere is a file that cannot be read; a circle ends."
    data = tree(project/'real', 6)
    linked = project/'linked'
    linked.mkdir()
    (linked/'circle').symlink_to(data/'circle')
    (linked/'square').mkdir()
    for f in (data/'square').iterdir(): (linked/'square'/f.name).symlink_to(f)
    table = load_images(linked)
    assert table.counts().sum() == 12 and fingerprint(table) == fingerprint(load_images(data))
    assert same(batches(Loader(table, 'train', 8, 4)), batches(Loader(load_images(data), 'train', 8, 4)))
    (project/'alias').symlink_to(linked)
    assert fingerprint(load_images(project/'alias')) == fingerprint(table)
    (linked/'square/again').symlink_to(linked/'square')
    assert len(load_images(linked)) == 12

def test_a_link_to_nowhere(launcher, project):
    data = tree(project/'data', 6)
    (data/'square/gone.png').symlink_to(project/'nowhere.png')
    job = launcher.imgexp('train', *SMALL, '--data', 'data', '--bad', 'skip', root=project)
    assert job.wait() == 0, job.err
    assert list(find_run('', project/'runs').metrics['skipped']) == ['square/gone.png']
    job = launcher.imgexp('train', *SMALL, '--data', 'data', root=project)
    assert job.wait() == 1 and 'square/gone.png cannot be read (No such file or directory)' in job.err, job.err

def test_a_file_that_goes_away(project):
    table = load_images(tree(project/'data', 3))
    (table.source.root/table.items[0]).unlink()
    with pytest.raises(BadImage, match='No such file'): read(table, 0)

# -- the fingerprint

@pytest.fixture
def opened(monkeypatch):
    "Paths whose content was read; all files count as older than two seconds."
    found, real = [], d._digest
    def digest(source, i):
        found.append(source.path(i))
        return real(source, i)
    monkeypatch.setattr(d, '_digest', digest)
    monkeypatch.setattr(d, 'CLOCK', -1)
    return found

def test_the_fingerprint_reads_nothing_twice(project, opened):
    data = tree(project/'data', 5)
    first = fingerprint(load_images(data))
    assert len(opened) == len(set(opened)) == 10
    opened.clear()
    assert fingerprint(load_images(data)) == first and not opened
    cv2.imwrite(str(data/'circle/002.png'), np.zeros((9, 9, 3), np.uint8))
    assert fingerprint(load_images(data)) != first
    assert [Path(f).name for f in opened] == ['002.png']
    opened.clear()
    shutil.copytree(data, project/'copy')
    assert fingerprint(load_images(project/'copy')) == fingerprint(load_images(data)) and len(opened) == 10

@pytest.mark.parametrize('change', ['content', 'name', 'class', 'added', 'removed', 'swapped', 'renamed', 'rewritten', 'linked'])
def test_what_changes_the_fingerprint(project, change, opened):
    "Also where size and time stay: files that exchange their names, or are rewritten, and a link that leads elsewhere."
    data, other = tree(project/'data', 4), project/'other.png'
    a, b, link = data/'circle/000.png', data/'circle/001.png', data/'square/link.png'
    size = max(a.stat().st_size, b.stat().st_size)
    for f in (a, b, other):
        f.write_bytes((f if f.exists() else b).read_bytes().ljust(size, b'\0'))
        os.utime(f, ns=(10**18, 10**18))
    link.symlink_to(a)
    first = fingerprint(load_images(data))
    if change == 'renamed': a.rename(data/'spare'); b.rename(a); (data/'spare').rename(b)
    if change == 'rewritten':
        a.write_bytes(other.read_bytes()); os.utime(a, ns=(10**18, 10**18))
    if change == 'linked': link.unlink(); link.symlink_to(other)
    if change == 'content': a.write_bytes(a.read_bytes() + b'\0')
    if change == 'name': a.rename(data/'circle/zero.png')
    if change == 'class': a.rename(data/'square/zero.png')
    if change == 'added': shutil.copy(a, data/'circle/copy.png')
    if change == 'removed': a.unlink()
    if change == 'swapped':
        one, two = a.read_bytes(), b.read_bytes()
        a.write_bytes(two); b.write_bytes(one)
    assert fingerprint(load_images(data)) != first

def test_what_does_not_change_the_fingerprint(project):
    data = tree(project/'data', 4)
    first = fingerprint(load_images(data))
    for f in data.rglob('*.png'): os.utime(f, (1, 1))
    (data/'circle/notes.txt').write_text('nothing')
    data.rename(project/'moved')
    assert fingerprint(load_images(project/'moved')) == first

def test_a_file_written_just_now_is_read_again(project, monkeypatch):
    "A clock of 10 ms, or of two seconds, does not tell a second write from the first."
    data = tree(project/'data', 4)
    file, real = data/'circle/000.png', d.file_state
    def coarse(file): return ' '.join(t if k in (0, 3) else str(int(t)//10**9*10**9) for k, t in enumerate(real(file).split()))
    monkeypatch.setattr(d, 'file_state', coarse)
    now = time.time()
    if now % 1 > 0.5: time.sleep(1 - now % 1)  # both writes within one second
    file.write_bytes(file.read_bytes())
    first, state = fingerprint(load_images(data)), d.file_state(file)
    file.write_bytes(file.read_bytes()[::-1])
    assert d.file_state(file) == state and fingerprint(load_images(data)) != first

def test_a_file_that_changes_while_it_is_read(project, monkeypatch):
    "Content and state belong together; a file that is being written is named."
    file, real, writes = project/'a.png', d.file_state, [b'two', b'six']
    file.write_bytes(b'one')
    def state(path):
        out = real(path)
        if writes: file.write_bytes(writes.pop(0))
        return out
    monkeypatch.setattr(d, 'file_state', state)
    source = Files(project, np.array(['a.png'], object))
    assert d._digest(source, 0)[1] == hashlib.sha256(b'six').digest()
    writes += [bytes([i]) for i in range(9)]
    with pytest.raises(RunFailed, match='a.png changes while it is being read: wait until it is completely written'): d._digest(source, 0)

@pytest.mark.parametrize('state', ['damaged', 'read-only', 'a folder', 'other table'])
def test_a_cache_that_cannot_be_used(project, state):
    "It is only a cache: the fingerprint is computed without it."
    data = tree(project/'data', 4)
    wanted = fingerprint(load_images(data))
    file = d.cache_dir()/'contents.sqlite'
    file.unlink()
    if state == 'damaged': file.write_bytes(b'no database at all'*100)
    if state == 'read-only':
        db = sqlite3.connect(file)
        db.execute('create table files (path text primary key, state text, sha blob) without rowid')
        db.commit(); db.close()
        file.chmod(0o444); file.parent.chmod(0o555)
    if state == 'a folder': file.mkdir()
    if state == 'other table':
        db = sqlite3.connect(file)
        db.execute('create table files (wrong text)')
        db.commit(); db.close()
    try: assert fingerprint(load_images(data)) == wanted
    finally: file.parent.chmod(0o755)

# -- real collections

def test_fashion_mnist(monkeypatch):
    "Named relatively, as a person would from the checkout."
    path = shared('fashion-mnist')
    monkeypatch.chdir(path.parents[1])
    table = load_images('data/fashion-mnist')
    assert table.counts().tolist() == [[4800, 1200, 1000]]*10
    with gzip.open(path/'train-images-idx3-ubyte.gz') as f: raw = f.read()
    first = table.source.pixels[np.flatnonzero(table.splits != 2)[0]]
    assert (first.ravel() == np.frombuffer(raw, np.uint8, 784, 16)).all()
    images, labels = next(iter(Loader(table, 'train', 28, 64)))
    assert images.shape == (64, 28, 28, 3) and (images[..., 0] == images[..., 2]).all()
    assert keep_subset(table, 0.1).counts().tolist() == [[480, 1200, 1000]]*10

def test_fashion_mnist_from_the_checkout(monkeypatch):
    shared('fashion-mnist')
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    assert len(load_images('../shared/data/fashion-mnist')) == 70_000

def test_clothing():
    table = load_images(shared('clothing'))
    assert table.counts().sum(0).tolist() == [3068, 341, 372] and len(table.classes) == 10
    assert table.classes[0] == 'dress' and table.classes[-1] == 't-shirt'
    images, labels = next(iter(Loader(table, 'test', 224, 16)))
    assert images.shape == (16, 224, 224, 3) and images.float().std() > 20
