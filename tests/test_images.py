"Damaged images are refused, whole ones are read whatever else their files hold, and no image is left out without a word."
import io, os, random, re, struct, sys, types, zlib
from pathlib import Path

import cv2, numpy as np, pytest
from PIL import Image, features

from imgexp import decoding
from imgexp.check import check
from imgexp.data import read
from imgexp.decoding import BadImage, decode
from imgexp.folders import from_folders, image_files, image_suffixes
from imgexp.download import unpack
from imgexp.write_packs import build_pack
from imgexp.sources import load_images
from imgexp.start import find_run
from pictures import tree

pytestmark = pytest.mark.usefixtures('project')
SHARED = Path(__file__).resolve().parents[2]/'shared/data'
SMALL = '--size 8 --epochs 1 --batch-size 8 --workers 0 --track off'.split()
END = b'\xff\xd9'

def encoded(image, kind='JPEG', **kw):
    f = io.BytesIO()
    image.save(f, kind, **kw)
    return f.getvalue()

def photo():
    "Soft shapes and noise, as a camera sees them: 20 to 40 kB as a JPEG."
    rng = np.random.default_rng(0)
    soft = cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (400, 300), interpolation=cv2.INTER_CUBIC)
    return Image.fromarray(np.uint8(np.clip(soft + rng.normal(0, 9, soft.shape), 0, 255)))

def with_orientation(n):
    exif = Image.Exif()
    exif[0x112] = n
    return exif

PHOTO = photo()
LAYOUTS = {'baseline': encoded(PHOTO), 'progressive': encoded(PHOTO, progressive=True), 'gray': encoded(PHOTO.convert('L')),
           'cmyk': encoded(PHOTO.convert('CMYK')), 'turned': encoded(PHOTO, exif=with_orientation(6)),
           'restarts': encoded(PHOTO, restart_marker_rows=2), 'full color': encoded(PHOTO, subsampling=0)}

def segment(code, body): return b'\xff' + bytes([code]) + struct.pack('>H', len(body) + 2) + body
def scan(raw):
    at = 2
    while raw[at + 1] != 0xda: at += 2 + int.from_bytes(raw[at + 2:at + 4], 'big')
    return at + 2 + int.from_bytes(raw[at + 2:at + 4], 'big')

def zeroed(raw, share, n): at = scan(raw) + int((len(raw) - scan(raw) - n)*share); return raw[:at] + bytes(n) + raw[at + n:]
def cut(raw, share): return raw[:scan(raw) + int((len(raw) - scan(raw))*share)]
OTHER = encoded(PHOTO.transpose(Image.Transpose.ROTATE_180), quality=85)
DAMAGE = {'4 kB zeroed': lambda r: zeroed(r, .4, 4096), '512 B zeroed': lambda r: zeroed(r, .7, 512), '4 kB zeroed at the end': lambda r: zeroed(r, 1, 4096)[:-2] + END,
          '512 B missing': lambda r: r[:len(r)//2] + r[len(r)//2 + 512:], 'cut': lambda r: cut(r, .9), 'cut, with an end marker': lambda r: cut(r, 1/3) + END,
          'another photo begins': lambda r: cut(r, .5) + OTHER, "the other half is another photo's": lambda r: cut(r, .5) + OTHER[len(OTHER)//2:]}

# -- damage

UNSEEN = {('512 B zeroed', 'progressive'), ("the other half is another photo's", 'full color')}  # what follows is a valid picture, by chance

@pytest.mark.parametrize('layout, damage', [(l, d) for l in LAYOUTS for d in DAMAGE if (d, l) not in UNSEEN])
def test_damaged_jpegs_are_refused(layout, damage):
    raw = LAYOUTS[layout]
    assert decode(raw).shape == ((400, 300, 3) if layout == 'turned' else (300, 400, 3))
    with pytest.raises(BadImage, match='is damaged: |is cut short'): decode(DAMAGE[damage](raw))
    with pytest.raises(BadImage): decode(DAMAGE[damage](raw), 40, 40)

def test_64_zeros_in_a_photo_are_refused_but_zeros_of_an_even_area_are_not():
    raw = LAYOUTS['baseline']
    for k in range(20):
        with pytest.raises(BadImage, match='is damaged'): decode(zeroed(raw, k/20, 64))
    for image in (Image.new('RGB', (640, 480), 'white'), Image.new('L', (640, 480), 128)):
        even = encoded(image, optimize=True)
        assert bytes(64) in even and np.ptp(decode(even)) < 3

def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused():
    raw, at = LAYOUTS['progressive'], [m.start() for m in re.finditer(b'\xff\xda', LAYOUTS['progressive'])]
    assert len(at) > 3
    for k in at[1:]:
        with pytest.raises(BadImage, match='is cut short: it lacks scans'): decode(raw[:k] + END)

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
def middle(raw, new): return raw[:len(raw)//2] + new + raw[len(raw)//2 + len(new):]
def png_cut():
    raw = encoded(PHOTO, 'PNG', compress_level=1)
    at = raw.index(b'IDAT') - 4
    return raw[:at] + chunk(b'IDAT', raw[at + 8:at + 20_000]) + chunk(b'IEND', b'')
DAMAGED = {'png': middle(encoded(PHOTO, 'PNG'), bytes(64)), 'png, half of it': png_cut(), 'tiff': middle(encoded(PHOTO, 'TIFF', compression='tiff_adobe_deflate'), bytes(64)),
           'gif': encoded(PHOTO, 'GIF')[:20_000], 'bmp': encoded(PHOTO, 'BMP')[:-999], 'webp': encoded(PHOTO, 'WEBP')[:-999], 'ppm': encoded(PHOTO, 'PPM')[:-999]}

@pytest.mark.parametrize('kind', DAMAGED)
def test_other_damaged_files_are_refused(kind):
    with pytest.raises(BadImage, match='is damaged: |is cut short'): decode(DAMAGED[kind])

def test_damaged_photos_stop_a_training_or_are_skipped_and_told(launcher, project):
    "In a training, in a check, in a prediction, and in packs."
    folder = tree(project/'data', 8)
    for name, how in {'circle/a.jpg': '4 kB zeroed', 'square/b.jpg': 'cut, with an end marker'}.items(): (folder/name).write_bytes(DAMAGE[how](LAYOUTS['baseline']))
    unread = check(folder).findings.query('kind == "unreadable"')
    assert unread['item'].tolist() == ['circle/a.jpg', 'square/b.jpg'] and unread.detail.str.startswith('is damaged: ').all()
    for size, kind in ((0, 'jpeg'), (16, 'jpeg'), (16, 'raw')):
        told = []
        table = load_images(build_pack(folder, size, kind, say=told.append))
        assert all(any(f'{n} is damaged' in line for line in told) for n in ('circle/a.jpg', 'square/b.jpg')), told
        with pytest.raises(BadImage, match='is damaged'): read(table, table.items.tolist().index('circle/a.jpg'))
    job = launcher.imgexp('train', *SMALL, '--data', folder, root=project)
    assert job.wait() == 1 and re.search(r'/[ab].jpg is damaged: .*bad=skip', job.err.splitlines()[-1]), job.err
    job = launcher.imgexp('train', *SMALL, '--data', folder, '--bad', 'skip', root=project)
    assert job.wait() == 0 and re.search(r'^data: 18 images \(\d+ train, \d+ valid\)', job.out, re.M), (job.out, job.err)
    job = launcher.imgexp('predict', find_run('', project/'runs').name, folder, root=project)
    assert job.wait() == 0 and '2 of 18 images could not be read' in job.err, job.err
    job = launcher.imgexp('predict', find_run('', project/'runs').name, folder/'circle/a.jpg', root=project)
    assert job.wait() == 1 and '1 of 1 images could not be read' in job.err, job.err

# -- samplings that libjpeg-turbo has no name for

def coded(value, codes):
    "A difference as in a JPEG: the code of its size, then its bits."
    size = abs(value).bit_length()
    code = next(c for c, s in codes.items() if s == size)
    return code + (f'{value if value > 0 else value + 2**size - 1:0{size}b}' if size else '')

def striped(sampling, colors):
    "A JPEG of 8 x 4 MCUs of such a sampling; each block is even, and its brightness random: the tables are Pillow's."
    plain, rng, bits, before = encoded(Image.new('RGB', (8, 8)), subsampling=0), random.Random(0), '', [0]*3
    tables = decoding._restart_intervals(plain)[2]
    end = {c: next(k for k, v in tables[c][1].items() if v == 0) for c in (0, 1)}
    for _ in range(32):
        for c, n in ((0, sampling[0]*sampling[1]), (1, 1), (2, 1)):
            for _ in range(n):
                value = rng.randrange(-60, 60) if c == 0 or colors else 0
                bits += coded(value - before[c], tables[min(c, 1)][0]) + end[min(c, 1)]
                before[c] = value
    bits += '1'*(-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits)//8, 'big').replace(b'\xff', b'\xff\0')
    frame = segment(0xc0, struct.pack('>BHHB', 8, 8*4*sampling[1], 8*8*sampling[0], 3) + bytes([1, sampling[0]*16 + sampling[1], 0, 2, 0x11, 1, 3, 0x11, 1]))
    head = plain[:plain.index(b'\xff\xc0')]
    rest = plain[plain.index(b'\xff\xc4'):scan(plain)]
    return head + frame + rest + body + END

@pytest.mark.parametrize('sampling', [(3, 1), (4, 2), (3, 2)])
def test_odd_samplings_are_read_and_checked(sampling):
    raw = striped(sampling, True)
    image = decode(raw)
    assert image.shape == (32*sampling[1], 64*sampling[0], 3) and len(np.unique(image.reshape(-1, 3), axis=0)) > 30
    assert (decode(raw + bytes(99)) == image).all()
    at = scan(raw)
    for bad in (raw[:-12] + END, raw[:at + 20] + raw[at + 40:], raw[:at + 20] + raw[at:at + 9] + raw[at + 20:]):
        with pytest.raises(BadImage, match='is damaged'): decode(bad)

# -- whole files

def start(raw, more): return raw[:2] + more + raw[2:]
THUMBNAIL = encoded(PHOTO.resize((80, 60)))
SCAN = scan(LAYOUTS['baseline'])
WHOLE = {'a video behind it': lambda r: r + b'\0\0\0\x18ftypmp42' + random.Random(0).randbytes(100_000), 'zeros behind it': lambda r: r + bytes(70_000),
         'another photo behind it': lambda r: r + OTHER, 'a thumbnail': lambda r: start(r, segment(0xe1, b'Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0' + THUMBNAIL)),
         'markers in a comment': lambda r: start(r, segment(0xfe, END + b'\xff\xda\0\0')), 'zeros in the EXIF data': lambda r: start(r, segment(0xe1, b'Exif\0\0' + bytes(20_000))),
         'fill bytes': lambda r: start(r, b'\xff'*5)[:-2] + b'\xff'*9 + END, 'zeros before the end': lambda r: r[:-2] + bytes(4096) + END,
         'half a color profile': lambda r: start(r, segment(0xe2, b'ICC_PROFILE\0\1\3' + bytes(99))), 'version 2.01': lambda r: r.replace(b'JFIF\0\1\1', b'JFIF\0\2\1', 1),
         'odd numbers at its scan': lambda r: r[:SCAN - 3] + b'\1\5\x11' + r[SCAN:]}

@pytest.mark.parametrize('what', WHOLE)
def test_whole_photos_are_read(what):
    raw = LAYOUTS['baseline']
    odd = WHOLE[what](raw)
    assert odd != raw and (decode(odd) == decode(raw)).all()
    if 'behind' in what:
        for layout in ('progressive', 'turned', 'cmyk'): assert (decode(WHOLE[what](LAYOUTS[layout])) == decode(LAYOUTS[layout])).all()

def test_two_pictures_in_one_file_and_bytes_behind_a_png():
    two = encoded(PHOTO, 'MPO', save_all=True, append_images=[PHOTO.resize((50, 50))])
    assert (decode(two) == decode(LAYOUTS['baseline'])).all()
    for behind in (b'\n', b'IEND', bytes(9000)): assert (decode(encoded(PHOTO, 'PNG') + behind) == np.asarray(PHOTO)).all()

@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_turned_photos_are_as_opencv_turns_them(mode):
    for n in range(10):
        raw = encoded(PHOTO.convert(mode), exif=with_orientation(n))
        assert (decode(raw) == cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR_RGB)).all(), n

def photos(name, n):
    folder = SHARED/name
    if not folder.is_dir(): pytest.skip(f'{name} is not here: the shared data are not part of the project')
    files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg'))
    return [p.read_bytes() for p in random.Random(0).sample(files, n)]

@pytest.mark.parametrize('name', ['clothing', 'tiny40'])
def test_real_photos(name):
    "Of 200, all are read, alone and as motion photos, and none once it is damaged."
    rng, accepted = random.Random(1), []
    for raw in photos(name, 200):
        assert (decode(raw + rng.randbytes(9000)) == decode(raw)).all()
        for how, f in {'zeros': lambda r: zeroed(r, rng.random(), 512), 'cut': lambda r: cut(r, 1/3) + END, 'joined': lambda r: cut(r, .5) + raw}.items():
            try: decode(f(raw)); accepted.append(how)
            except BadImage: pass
    assert not accepted, accepted

# -- which files are images

def make(project, **files):
    folder = tree(project/'data', 3)
    for name, raw in files.items(): (folder/name.replace('__', '/').replace('_', '.')).write_bytes(raw)
    return folder

def test_endings_that_are_read(project):
    folder = make(project, circle__a_jfif=encoded(PHOTO), square__b_WebP=encoded(PHOTO, 'WEBP'), square__c_pbm=encoded(PHOTO.convert('1'), 'PPM'))
    table = from_folders(folder)
    assert len(table) == 9 and not {'unreadable', 'wrong extension'} & set(check(folder).findings.kind)

@pytest.mark.skipif(not features.check('avif'), reason='this Pillow reads no AVIF')
def test_avif(project):
    folder = make(project, circle__a_avif=encoded(PHOTO, 'AVIF', quality=90), square__b_avif=encoded(PHOTO, 'AVIF')[:-3000])
    table = from_folders(folder)
    assert abs(read(table, 3).astype(int) - np.asarray(PHOTO)).mean() < 6
    assert check(folder).findings.query('kind == "unreadable"')['item'].tolist() == ['square/b.avif']

HEIC = b'\0\0\0\x18ftypheic' + bytes(500)

def test_images_with_an_ending_that_is_not_read_are_told_once(launcher, project, capsys):
    from_folders(make(project, circle__a_txt=b'a note', circle__b_heic=HEIC, square__c_heic=HEIC, square__d_tmp=encoded(PHOTO), square__e=encoded(PHOTO, 'PNG')))
    from_folders(project/'data')
    line = ('data: skipped 4 images with an unsupported extension (2 .heic, 1 .tmp, 1 without an extension; the first is circle/b.heic): '
            'convert or rename them; `pip install pillow-heif` makes HEIC readable')
    assert capsys.readouterr().err.splitlines() == [line]
    job = launcher.imgexp('train', *SMALL, '--data', 'data', root=project)
    assert job.wait() == 0 and job.err.count(line) == 1, job.err
    for command in (['data', 'check', 'data'], ['predict', find_run('', project/'runs').name, 'data']):
        job = launcher.imgexp(*command, root=project)
        job.wait()
        assert job.err.splitlines().count(line) == 1 and '.heic' not in job.out, job.err

def test_images_in_no_class_folder_are_told(project, capsys):
    folder = tree(project/'data/train', 3).parent
    (folder/'extra').mkdir(); (folder/'test').mkdir(); (folder/'notes').mkdir()
    for name in ('a.png', 'test/1.jpg', 'test/2.heic', 'extra/3.jpg', 'notes/4.txt'): (folder/name).write_bytes(encoded(PHOTO))
    assert len(from_folders(folder)) == 6
    assert capsys.readouterr().err.splitlines() == ['data: skipped 3 images outside the class folders (the first is a.png)',
                                                    'data: skipped folders with images that are not splits: extra']

def test_heic_is_read_where_its_plugin_is_installed(project, monkeypatch, capsys):
    "A stand-in for pillow-heif: it registers an opener, which reads the JPEG behind the header."
    from PIL import JpegImagePlugin
    class Heif(JpegImagePlugin.JpegImageFile):
        format = 'HEIF'
        def _open(self): self.fp = io.BytesIO(self.fp.read()[24:]); super()._open()
    def register_heif_opener(): Image.register_open('HEIF', Heif, lambda head: head[4:12] == b'ftypheic')
    with pytest.raises(BadImage, match='is a HEIC image: pip install pillow-heif'): decode(HEIC)
    plugin = types.ModuleType('pillow_heif')
    plugin.register_heif_opener, plugin.__spec__ = register_heif_opener, types.SimpleNamespace(name='pillow_heif')
    monkeypatch.setitem(sys.modules, 'pillow_heif', plugin)
    for f in (decoding.reads_heic, image_suffixes): f.cache_clear()
    try:
        table = from_folders(make(project, circle__a_heic=HEIC[:24] + encoded(PHOTO)))
        assert (read(table, 3) == decode(encoded(PHOTO))).all() and not capsys.readouterr().err
    finally:
        monkeypatch.undo()
        Image.OPEN.pop('HEIF', None); Image.ID.remove('HEIF')
        for f in (decoding.reads_heic, image_suffixes): f.cache_clear()

def test_no_other_file_is_taken_for_an_image(project, capsys):
    folder = tree(project/'data', 3)
    os.mkfifo(folder/'circle/pipe')
    for i in range(30): (folder/f'circle/{i}.xml').write_text('BM<annotation/>')
    for name, raw in {'a.mp4': b'\0\0\0\x18ftypmp42', 'b.wav': b'RIFF\0\0\0\0WAVE', 'c': b'', '.hidden.heic': HEIC}.items(): (folder/'square'/name).write_bytes(raw)
    assert len(from_folders(folder)) == len(image_files(folder)) == 6 and not capsys.readouterr().err

def test_links_in_an_archive_are_counted(tmp_path, capsys):
    import tarfile
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        (tmp_path/'1.png').write_bytes(encoded(PHOTO, 'PNG'))
        t.add(tmp_path/'1.png', 'a/1.png')
        for name, kind, target in (('a/2.png', tarfile.SYMTYPE, '1.png'), ('a/3.png', tarfile.LNKTYPE, 'a/1.png')):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            t.addfile(link)
    assert unpack(tmp_path/'a.tar', tmp_path/'out') == 1
    assert [p.name for p in (tmp_path/'out').rglob('*.png')] == ['1.png']
    assert capsys.readouterr().err.splitlines() == ['a.tar: skipped 2 links (the first is a/2.png → 1.png)']
