"imgexp.check: each kind of fault is found under its name, and nothing else is; how near is near; the command."
import dataclasses, hashlib, io, json, os, re, shutil, time, weakref
from pathlib import Path

import cv2, numpy as np, pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import imgexp.check as c
from imgexp.check import (FINDINGS, NEAR, channel_means, check, duplicates, hamming, leaks, near_groups, phash, show_sizes,
                          survey)
from imgexp.data import Images, from_arrays
from imgexp.decoding import decode
from imgexp.folders import from_folders
from imgexp.samples import shapes
from imgexp.sources import load_images
from imgexp.errors import InputError

pytestmark = pytest.mark.usefixtures('project')
SHARED = Path(__file__).resolve().parents[2]/'shared/data'

@pytest.fixture(scope='session')
def clothing():
    path = SHARED/'clothing'
    if not path.is_dir(): pytest.skip('clothing is not here: the shared data are not part of the project')
    return from_folders(path)

# -- a clean tree, and ways to spoil it

PHOTOS = load_sample_images().images
def photo(k, side=120):
    "A piece of one of scikit-learn's two photos; another k, another piece."
    y, x = divmod(k//2, 4)
    return Image.fromarray(PHOTOS[k % 2][100*y:100*y + side, 140*x:140*x + side])

def encoded(image, kind='JPEG', **kw):
    f = io.BytesIO()
    image.save(f, kind, **({'quality': 95} if kind == 'JPEG' else {}) | kw)
    return f.getvalue()

def put(root, name, raw):
    path = root/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw if isinstance(raw, bytes) else encoded(raw))

@pytest.fixture(scope='session')
def clean(tmp_path_factory):
    "Three classes with 12 training and 4 test images each."
    root, drawn = tmp_path_factory.mktemp('clean')/'tree', shapes(160, size=64)
    for label, name in enumerate(drawn.classes[:3]):
        for i, row in enumerate(np.flatnonzero(drawn.labels == label)):
            image = Image.fromarray(drawn.source.pixels[row])
            put(root, f'{"train" if i < 12 else "test"}/{name}/{i:02d}.png', encoded(image, 'PNG'))
    return root

@pytest.fixture
def root(clean, tmp_path): return Path(shutil.copytree(clean, tmp_path/'tree'))

def found(report): return {(f.kind, f['item'] or f['class']) for _, f in report.findings.iterrows()}
def twice(kind, *items): return {(kind, i) for i in items}

def test_a_clean_tree(clean):
    report = check(clean)
    assert len(report) == 0 and not len(report.table()) and not len(report.kinds())
    assert repr(report) == '48 images, 3 classes: no problems found' and 'no problems found' in report._repr_html_()
    report.sheet()

def turned(image):
    exif = image.getexif()
    exif[0x112] = 6
    return exif

def deep(image): return np.uint16(np.asarray(image))*256

A, B, C = 'train/circle/', 'train/ellipse/', 'test/circle/'
IMAGES = {  # what is put as train/circle/x.…: suffix, content, kinds, words of the detail
    'empty': ('.jpg', b'', ['unreadable'], 'is empty'),
    'cut short': ('.jpg', encoded(photo(0))[:-500], ['unreadable'], 'cut short'),
    'cut short png': ('.png', encoded(photo(0), 'PNG')[:-500], ['unreadable'], 'cut short'),
    'a web page': ('.jpg', b' <!doctype html><html>404</html>', ['unreadable'], 'is a web page'),
    'zeros': ('.jpg', bytes(5000), ['unreadable'], 'not an image'),
    'png named jpg': ('.jpg', encoded(photo(0), 'PNG'), ['wrong extension'], 'holds PNG'),
    'jpeg named png': ('.PNG', encoded(photo(0)), ['wrong extension'], 'holds JPEG'),
    'gif named png': ('.png', encoded(photo(0), 'GIF'), ['wrong extension', 'odd mode'], 'holds GIF'),
    'grayscale': ('.jpg', encoded(photo(0).convert('L')), ['odd mode'], 'is L, most are RGB'),
    'cmyk': ('.jpg', encoded(photo(0).convert('CMYK')), ['odd mode'], 'is CMYK'),
    'palette': ('.png', encoded(photo(0).quantize(64), 'PNG'), ['odd mode'], 'is P,'),
    'rgba': ('.png', encoded(photo(0).convert('RGBA'), 'PNG'), ['odd mode'], 'is RGBA'),
    '16 bit': ('.png', encoded(Image.fromarray(deep(photo(0).convert('L'))), 'PNG'), ['odd mode'], 'is 16 bit'),
    '16 bit color': ('.png', cv2.imencode('.png', deep(photo(0)))[1].tobytes(), ['odd mode'], 'is 16 bit'),
    'turned': ('.jpg', encoded(photo(0), exif=turned(photo(0))), ['turned'], 'EXIF orientation 6'),
    'tiny': ('.jpg', encoded(photo(0).resize((40, 31))), ['tiny'], 'is 40 × 31 px'),
    'tall': ('.jpg', encoded(photo(0).resize((40, 400))), ['long'], 'is 40 × 400 px'),
    'wide': ('.jpg', encoded(photo(0).resize((161, 40))), ['long'], 'is 161 × 40 px'),
    'one color': ('.jpg', encoded(Image.new('RGB', (64, 64), (200, 30, 30))), ['one color'], 'one color')}

@pytest.mark.parametrize('name', IMAGES)
def test_a_strange_image(root, name):
    suffix, raw, kinds, says = IMAGES[name]
    put(root, f'{A}x{suffix}', raw)
    report = check(root)
    assert found(report) == {(k, f'{A}x{suffix}') for k in kinds}
    assert all(says in text for text in (report.table().detail.iloc[0], repr(report), report._repr_html_()))
    severity = FINDINGS[kinds[0]][0]
    assert report.count(severity) == len(kinds) and f'49 images, 3 classes: {len(kinds)} {severity}' in report.summary

NORMAL = {'webp': encoded(photo(0), 'WEBP', quality=90), 'tiff': encoded(photo(0), 'TIFF'),
          'bmp': encoded(photo(0), 'BMP'), 'ppm': encoded(photo(0), 'PPM'), 'JPEG': encoded(photo(0)), 
          'jpe': encoded(photo(0), progressive=True), 'jpg': encoded(photo(0).resize((160, 40))),
          'png': encoded(photo(0).resize((32, 32)), 'PNG')}

@pytest.mark.parametrize('suffix', NORMAL)
def test_a_normal_image(root, suffix):
    "Formats that are what their names say; the limits of size and shape."
    put(root, f'{A}x.{suffix}', NORMAL[suffix])
    assert not found(check(root))

def test_a_link_to_nowhere(root):
    (root/A/'x.jpg').symlink_to(root/'gone.jpg')
    report = check(root)
    assert found(report) == {('unreadable', A + 'x.jpg')} and 'cannot be read (No such file' in repr(report)

def small(k): return encoded(photo(k).resize((80, 80)), quality=60)
GROUPS = {  # name: content of each file, kind, sign between the names
    'in a class': ({A + 'x.jpg': photo(0), A + 'y.jpg': photo(0)}, ['duplicate'], ' = '),
    'saved again without loss': ({A + 'x.png': encoded(photo(0), 'PNG'), A + 'z.bmp': encoded(photo(0), 'BMP'),
                                  A + 'y.png': encoded(photo(0), 'PNG', compress_level=0)}, ['duplicate'], ' = '),
    'in two classes': ({A + 'x.jpg': photo(0), B + 'y.jpg': photo(0)}, ['two labels'], ' = '),
    'in train and test': ({A + 'x.jpg': photo(0), C + 'y.jpg': photo(0)}, ['leak'], ' = '),
    'in train and test as two classes': ({B + 'x.jpg': photo(0), C + 'y.jpg': photo(0)}, ['leak', 'two labels'], ' = '),
    'near in a class': ({A + 'x.jpg': photo(0), A + 'y.jpg': small(0)}, ['near duplicate'], ' ≈ '),
    'near in two classes': ({A + 'x.jpg': photo(0), B + 'y.jpg': small(0)}, ['near two labels'], ' ≈ '),
    'near in train and test': ({A + 'x.jpg': photo(0), C + 'y.jpg': small(0)}, ['near leak'], ' ≈ '),
    'upright and turned by EXIF': ({A + 'x.jpg': encoded(photo(0).transpose(Image.Transpose.ROTATE_270), quality=80),
                                    C + 'y.jpg': encoded(photo(0), exif=turned(photo(0)))}, ['near leak', 'turned'], ' ≈ ')}

@pytest.mark.parametrize('name', GROUPS)
def test_a_picture_that_comes_again(root, name):
    files, kinds, sign = GROUPS[name]
    for item, raw in files.items(): put(root, item, raw)
    report = check(root)
    assert found(report) - twice('turned', C + 'y.jpg') == {f for k in kinds if k != 'turned' for f in twice(k, *files)}
    assert sign.join(sorted(files)) in repr(report)
    for _, f in report.table().query('kind in @kinds and kind != "turned"').iterrows():
        assert any(other in f.detail for other in set(files) - {f['item']}), 'the other name stands beside each'
    assert len(report) == len(kinds)

@pytest.mark.parametrize('splits', [('train', 'valid'), ('valid', 'test'), ('train', 'test')])
def test_leaks_between_any_two_splits(root, splits):
    for i in range(18): put(root, f'valid/{("circle", "ellipse", "square")[i % 3]}/v{i}.jpg', photo(i))
    names = [f'{s}/circle/same{i}.jpg' for i, s in enumerate(splits)]
    for name in names: put(root, name, photo(19))
    report = check(root)
    assert found(report) == twice('leak', *names) and ' = '.join(sorted(names)) in repr(report)
    assert sorted(leaks(report.survey).item) == sorted(names)

def test_a_picture_in_three_places_is_one_finding(root):
    names = [A + 'x.jpg', A + 'y.jpg', C + 'z.jpg']
    for name in names: put(root, name, photo(0))
    put(root, C + 'small.jpg', small(0))
    report = check(root)
    assert found(report) == twice('leak', *names) | twice('near leak', *names, C + 'small.jpg') and len(report) == 2
    assert 'and 1 more' in repr(report)

def test_pictures_of_one_color_are_not_near_each_other(root):
    for i in range(4):
        image = np.full((64, 64, 3), 250 - 9*i, np.uint8)
        image[:20, :20] += 1  # what nobody sees is the same in all
        put(root, f'{A}{i}x.png', encoded(Image.fromarray(image), 'PNG'))
    assert found(check(root)) == {('one color', f'{A}{i}x.png') for i in range(4)}

# -- classes

def test_a_class_with_few_images(root):
    for i in range(9): put(root, f'train/rare/{i}.jpg', photo(i))
    assert found(check(root)) == {('few images', 'rare'), ('missing in split', 'rare')}
    put(root, 'train/rare/9.jpg', photo(9)); put(root, 'test/rare/0.jpg', photo(10))
    assert not found(check(root)), 'ten are enough'

def test_less_than_a_tenth_of_the_median():
    n = [400, 400, 400, 39]
    pixels = np.random.default_rng(0).integers(0, 256, (sum(n), 40, 40), np.uint8)
    report = check(from_arrays(pixels, np.repeat(range(4), n)))
    assert found(report) == {('few images', '3')} and 'has 39 training images (median: 400)' in repr(report)

def test_a_class_whose_images_are_all_unreadable(root):
    for i in range(12): put(root, f'train/broken/{i}.jpg', b'')
    put(root, 'test/broken/0.jpg', photo(0))
    report = check(root)
    assert ('empty class', 'broken') in found(report) and report.count('error') == 13
    for path in (root/'train').glob('*/*'): path.write_bytes(b'')
    assert check(root).count('error') == 48 + 4

def test_what_most_images_are_is_not_strange(tmp_path):
    "A collection of small gray turned pictures: the color one is odd, the large one isn't."
    for i in range(24):
        side = 20 if i % 12 < 11 else 90
        image = photo(i % 24, 90).resize((side, side)).convert('RGB' if i == 5 else 'L')
        put(tmp_path, f'{"ab"[i//12]}/{i}.jpg', encoded(image, exif=turned(image)))
    report = check(tmp_path)
    assert {f for f in found(report) if not f[0].startswith('near')} == {('odd mode', 'a/5.jpg')}, report

def test_a_drawn_validation_split_leaks_nothing(clean, tmp_path):
    "A duplicate among the training images is a duplicate, whatever part of them imgexp validates on."
    shutil.copytree(clean/'train', tmp_path/'train')
    for path in sorted((tmp_path/'train/circle').iterdir()): shutil.copy(path, path.with_name(f'{path.stem} copy.png'))
    table = load_images(tmp_path/'train')
    train, valid = ({n.replace(' copy', '') for n in table.items[table.split(s)]} for s in ('train', 'valid'))
    assert train & valid, 'the draw does part doubles'
    report = check(table)
    assert {k for k, _ in found(report)} == {'duplicate'} and len(report) == 12
    assert set(survey(table).split) == {'train'} and not len(leaks(survey(table)))

def test_faulty_class_lists_are_refused(root, tmp_path):
    put(root, 'test/stranger/0.jpg', photo(0))
    with pytest.raises(InputError, match="class 'stranger' has no folder among the training images"): check(root)
    with pytest.raises(InputError, match='no such folder'): check('nowhere')

def test_a_table_made_in_the_notebook_of_the_data():
    "There the class `Images` is another than the library's."
    table = shapes(400, size=16)
    methods = {k: getattr(Images, k) for k in ('__len__', 'split', 'take', 'counts')}
    Other = dataclasses.make_dataclass('Images', [f.name for f in dataclasses.fields(table)], namespace=methods)
    report = check(Other(**vars(table)))
    assert len(report.survey) == 400
    assert channel_means(report.survey).n.tolist() == np.bincount(table.splits).tolist()
    assert 'n = 400, 1 size' in show_sizes(report.survey).axes[0].get_title()

def test_images_in_memory():
    drawn = shapes(160, size=40)
    pixels = np.concatenate([drawn.source.pixels, drawn.source.pixels[:2]])
    splits = np.r_[np.arange(160) >= 120, True, True]*2
    report = check(from_arrays(pixels, np.r_[drawn.labels, drawn.labels[0], 5], drawn.classes, splits))
    assert twice('leak', 'train/circle/0', 'test/circle/160') < found(report)
    assert twice('two labels', 'train/ellipse/1', 'test/hexagon/161') < found(report)
    assert set(report.survey['format']) == {'array'}

# -- the survey

def test_the_survey_tells_what_the_files_hold(root):
    put(root, A + 'x.jpg', encoded(photo(0).resize((100, 60)), exif=turned(photo(0))))
    looked = survey(load_images(root))
    row = looked[looked.item == A + 'x.jpg'].iloc[0]
    raw = (root/A/'x.jpg').read_bytes()
    assert row[['class', 'split', 'format', 'mode', 'orientation', 'why']].tolist() == ['circle', 'train', 'JPEG', 'RGB', 6, '']
    assert (row.height, row.width, row.bytes, row.sha256) == (100, 60, len(raw), hashlib.sha256(raw).hexdigest())
    pixels = decode(raw)/255
    assert np.allclose(row[c._CHANNELS].astype(float), [*pixels.mean((0, 1)), *pixels.std((0, 1))], atol=1e-5)
    assert looked.index.tolist() == list(range(49))

def test_threads_and_samples_change_nothing(root):
    table = load_images(root)
    whole, part = survey(table, workers=4), survey(table, n=10)
    assert whole.equals(survey(table, workers=1)) and len(part) == 10
    assert part.astype(object).equals(whole.loc[part.index].astype(object))

def test_no_pixels_are_kept(root, monkeypatch):
    "A picture is let go before its thread takes the next."
    alive, most = weakref.WeakSet(), []
    class Watched(np.ndarray): __hash__ = object.__hash__
    def watched(raw):
        image = decode(raw).view(Watched)
        alive.add(image); most.append(len(alive))
        return image
    monkeypatch.setattr(c, 'decode', watched)
    survey(load_images(root), workers=2)
    assert len(most) == 48 and max(most) <= 4, max(most)

def test_the_survey_is_small(clean):
    looked = survey(from_folders(clean))
    assert looked.memory_usage(deep=True).sum()/len(looked) < 800  # bytes an image

@pytest.mark.parametrize('where', ['reading', 'bar'])
def test_an_interruption_ends_it(clean, monkeypatch, where):
    seen = []
    def survey_image(table, row):
        seen.append(row)
        if where == 'reading' and len(seen) == 5: raise KeyboardInterrupt
        time.sleep(.001)
        return {}
    def update(bar, n):
        if where == 'bar': raise KeyboardInterrupt
    monkeypatch.setattr(c, '_survey_image', survey_image)
    monkeypatch.setattr('tqdm.tqdm.update', update)
    table = from_folders(clean)
    with pytest.raises(KeyboardInterrupt): survey(table.take(np.arange(4000) % len(table)), workers=2)
    assert len(seen) < 1000

def test_a_bar_in_a_terminal_only(clean, monkeypatch, capfd):
    survey(from_folders(clean))
    assert capfd.readouterr() == ('', '')
    monkeypatch.setattr('sys.stderr', terminal := io.StringIO())
    terminal.isatty = lambda: True
    survey(from_folders(clean))
    assert 'checking' in terminal.getvalue() and '48' in terminal.getvalue()

def test_names_that_are_no_unicode(root):
    try: put(root, A + 'x\udcff.jpg', b'')
    except OSError: pytest.skip('this file system has no such names')
    report = check(root)
    assert found(report) == {('unreadable', A + 'x\\xff.jpg')}
    for text in (repr(report), report._repr_html_(), report.table().to_csv(), report.table().to_json()): text.encode()
    report.sheet()

def test_the_data_stay_as_they_are(root):
    def state(): return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob('*') if p.is_file()}
    before = state()
    check(root).sheet()
    assert state() == before

# -- how near is near

def brute(words):
    "{(i, j): bits} of all near pairs"
    return {(i, j): d for i in range(len(words)) for j, d in enumerate(hamming(words[i], words)) if i != j and d <= NEAR}

def test_near_groups_finds_what_comparing_all_finds():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 16, (40, 16), np.uint16)[rng.integers(0, 40, 500)]
    flips = rng.random((500, 256)) < rng.choice([0, .01, .03, .05], (500, 1))
    words ^= np.packbits(flips, axis=1).view('>u2').astype(np.uint16)
    pairs, (group, like, bits) = brute(words), near_groups(words)
    nearest = [min([d for (a, _), d in pairs.items() if a == i], default=None) for i in range(500)]
    assert [None if l < 0 else b for l, b in zip(like, bits)] == nearest
    assert all(bits[i] == hamming(words[i], words[like[i]]) for i in np.flatnonzero(like >= 0))
    assert all(group[a] == group[b] for a, b in pairs) and 1 < sum(n is None for n in nearest) < 250
    alone = [i for i in range(500) if nearest[i] is None]
    assert len(set(group[alone])) == len(alone)

@pytest.mark.parametrize('word', range(16))
def test_one_word_in_common_is_enough(word):
    words = np.random.default_rng(word).integers(0, 1 << 16, (300, 16), np.uint16)
    words[9] = words[200] ^ (np.arange(16) != word)
    assert near_groups(words)[1][[9, 200]].tolist() == [200, 9] and hamming(words[9], words[200]) == 15

def test_near_groups_is_not_quadratic(monkeypatch):
    n, compared = 20_000, []
    def counted(a, b):
        compared.append(len(a))
        return hamming(a, b)
    monkeypatch.setattr(c, 'hamming', counted)
    near_groups(np.random.default_rng(0).integers(0, 1 << 16, (n, 16), np.uint16))
    assert sum(compared) < n*n/2/1000
    compared.clear()
    near_groups(np.random.default_rng(0).integers(0, 2, (n, 16), np.uint16))  # many alike
    assert sum(compared) <= 16*64*n

def saved(image, quality):
    return decode(cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())

def scaled(image, width, height=None, how=cv2.INTER_AREA):
    h, w = image.shape[:2]
    if height is None: width, height = round(w*width), round(h*width)
    return saved(cv2.resize(image, (width, height), interpolation=how), 75)

def cropped(image, k):
    y, x = (n//k for n in image.shape[:2])
    return saved(image[y:-y, x:-x], 75)

AGAIN = {  # share of photos within NEAR bits after it: at least, at most
    'quality 30': (lambda i: saved(i, 30), 1, 1), 'half the size': (lambda i: scaled(i, .5), 1, 1),
    '1.5 times the size': (lambda i: scaled(i, 1.5, how=cv2.INTER_CUBIC), 1, 1),
    '64 px': (lambda i: scaled(i, 64/min(i.shape[:2])), .95, 1),
    'a square of 224 px': (lambda i: scaled(i, 224, 224), 1, 1),
    '0.3 times, with aliases': (lambda i: scaled(i, .3, how=cv2.INTER_LINEAR), .9, 1),
    'brighter': (lambda i: saved(np.uint8(np.minimum(i*1.15 + 5, 255)), 75), .9, 1),
    'cropped by 2 %': (lambda i: cropped(i, 50), 0, .2), 'mirrored': (lambda i: saved(i[:, ::-1], 95), 0, .05)}

def test_photos_that_were_saved_again(clothing):
    n = int(os.environ.get('IMGEXP_PHOTOS', 60))  # the notebook's numbers are of 200
    rows = np.random.default_rng(0).choice(len(clothing), n, replace=False)
    images = [decode((clothing.source.root/clothing.items[r]).read_bytes()) for r in rows]
    def found(change): return np.mean([hamming(phash(i), phash(change(i))) <= NEAR for i in images])
    share = {name: found(change) for name, (change, *_) in AGAIN.items()}
    print(share)
    assert all(low <= share[name] <= high for name, (_, low, high) in AGAIN.items()), share

def test_photos_of_like_things_are_not_near(clothing):
    "7.1 million pairs, of which one is near: the same photo, in two classes."
    report = check(clothing)
    assert found(report) == twice('near two labels', 'train/shorts/6075b4a5-5b1a-4ce0-aea0-9dbfbca7c35c.jpg',
                                  'train/skirt/637a56e4-7fa6-4f75-8859-0f8902461554.jpg')
    assert duplicates(report.survey).bits.tolist() == [0, 0]
    assert report.summary == '3,781 images, 10 classes: 1 warning'
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(''.join(report.survey.phash)), np.uint8))
    bits = bits.reshape(-1, 256)*np.float32(2) - 1
    apart = (256 - bits @ bits.T)[np.triu_indices(len(bits), 1)]/2
    assert np.sort(apart)[:4].tolist() == [0, 40, 48, 50] and len(apart) == 7_146_090

# -- the sheet

def test_the_sheet_shows_each_kind(root):
    for name in ('empty', 'tiny', 'grayscale'): put(root, f'{A}{name}.jpg', IMAGES[name][1])
    for name in ('a', 'b'): put(root, f'{A}{name}.jpg', photo(0))
    for i in range(30): put(root, f'train/rare/{i}.jpg', photo(3 + i) if i < 3 else b'')
    report = check(root)
    fig = report.sheet()
    texts = [t.get_text() for t in fig.axes[0].texts]
    pictures = 0
    for _, k in report.findings[report.findings.row >= 0].groupby('kind', observed=True):
        assert f'{k.kind.iloc[0]}\n{k.finding.nunique()}' in texts
        pictures += sum(report.survey.why[k.row[:6]] == '')
    assert 'is empty' in texts and any('rare' in t for t in texts)
    f = io.BytesIO()
    fig.savefig(f)
    assert len(f.getvalue()) < 60_000 and len(fig.axes[0].images) == pictures > 3

# -- the command

def run(launcher, project, *args, cwd=None):
    job = launcher.imgexp('data', 'check', *args, root=project, cwd=cwd)
    return job.wait(), job.out, job.err

@pytest.fixture
def spoiled(root):
    put(root, A + 'x.jpg', b''); put(root, A + 'y.jpg', photo(0)); put(root, C + 'z.jpg', photo(0))
    return root

def test_the_command(launcher, project, spoiled):
    code, out, err = run(launcher, project, 'tree', cwd=spoiled.parent)
    lines = out.splitlines()
    assert (code, err) == (0, '') and lines[-1] == '51 images, 3 classes: 2 errors'
    assert re.fullmatch(r'unreadable +error +1  train/circle/x.jpg is empty', lines[1])
    assert re.fullmatch(r'leak +error +1  test/circle/z.jpg = train/circle/y.jpg', lines[2])

def test_strict(launcher, project, spoiled, clean):
    assert run(launcher, project, spoiled, '--strict')[0] == 1
    assert run(launcher, project, clean, '--strict')[:2] == (0, '48 images, 3 classes: no problems found\n')
    (spoiled/C/'z.jpg').unlink(); (spoiled/A/'y.jpg').unlink(); (spoiled/A/'x.jpg').write_bytes(IMAGES['tiny'][1])
    code, out, _ = run(launcher, project, spoiled, '--strict')
    assert code == 1 and out.endswith('1 warning\n'), 'a warning is enough'

def test_files_for_programs(launcher, project, spoiled):
    csv, sheet = project/'found.csv', project/'found.png'
    code, out, err = run(launcher, project, spoiled, '--json', '--strict', '--csv', 'found.csv', '--sheet', sheet)
    assert code == 1 and '51 images, 3 classes: 2 errors' in err
    assert 'found.csv written' in err and f'{sheet} written' in err
    rows = json.loads(out)
    assert [(r['finding'], r['kind'], r['item']) for r in rows] == [
        (1, 'unreadable', A + 'x.jpg'), (2, 'leak', C + 'z.jpg'), (2, 'leak', A + 'y.jpg')]
    assert set(rows[0]) == {'finding', 'kind', 'severity', 'item', 'class', 'split', 'detail'}
    lines = csv.read_text().splitlines()
    assert lines[0] == 'finding,kind,severity,item,class,split,detail' and len(lines) == 4
    assert Image.open(sheet).format == 'PNG'

def test_the_command_takes_names(launcher, project):
    code, out, _ = run(launcher, project, 'digits')
    assert code == 0 and out == '1,797 images, 10 classes: no problems found\n'

WRONG = {'no folder': (['nowhere'], "data='nowhere': no such folder"),
         'not fetched': (['imagenette-160'], 'is not fetched yet: `imgexp data fetch imagenette'),
         'csv in no folder': (['tree', '--csv', 'no/found.csv'], 'no/found.csv cannot be written .*No such file'),
         'csv is a folder': (['tree', '--csv', 'tree'], 'tree cannot be written .*directory'),
         'csv but no sheet': (['tree', '--csv', 'found.csv', '--sheet', 'no/found.png'], 'no/found.png cannot be'),
         'csv but no data': (['nowhere', '--csv', 'found.csv'], 'no such folder'),
         'sheet of no kind': (['tree', '--sheet', 'found.txt'], 'found.txt: give a name that ends in .png'),
         'unknown class': (['odd'], "class 'stranger' has no folder among the training images"),
         'no name': ([], 'Missing argument')}

@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(launcher, project, root, monkeypatch, case):
    args, says = WRONG[case]
    monkeypatch.setenv('IMGEXP_DATA', str(project/'data'))
    shutil.copytree(root, project/'odd'); put(project/'odd', 'test/stranger/0.jpg', photo(0))
    before = sorted(project.rglob('*'))
    code, out, err = run(launcher, project, *args, cwd=project)
    assert code == 2 and not out and err.count('\n') == 1 and err.startswith('imgexp: ') and re.search(says, err), err
    assert sorted(project.rglob('*')) == before, 'nothing is left behind'
