"The page of an exported network: every file gets an answer or one sentence, attacks get nothing, and nothing stays."
import hashlib, io, json, os, re, shutil, signal, socket, subprocess, sys, threading, time, zlib
from contextlib import closing, suppress
from pathlib import Path
import numpy as np
import pytest
import requests
from PIL import Image

pytest.importorskip('gradio')
pytest.importorskip('onnxruntime')
from imgexp.app import CannotServe, serve_model
from imgexp.predictor import Model

MARKUP = '<img src=x onerror=alert(1)>'
CLASSES = [MARKUP, '**bold** $x$ `code`', '{{title}} ${1+1}', 'w'*90, 'e\u0301\u202e\ud800', '</script><b>', 'plain', '7', "it's", ' ']
TITLE = '</title><script>alert(2)</script>'

def picture(format='PNG', height=40, width=50, mode='RGB', **options):
    "A colorful image as the bytes of a file"
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.uint8(np.dstack([255*x/width, 255*y/height, 127 + 127*np.sin(x/5)*np.cos(y/7)]))).convert(mode)
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()

def plain(format, width, height, **options):
    out = io.BytesIO()
    Image.new('RGB', (width, height), (90, 120, 30)).save(out, format, **options)
    return out.getvalue()

def png(height, width, depth, color):
    "A PNG of zeros"
    def chunk(kind, data): return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    header = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([depth, color, 0, 0, 0])
    rows = zlib.compress(bytes(height*(1 + width*depth*{0: 1, 2: 3}[color]//8)), 1)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')

def deep_png():
    "A 16-bit PNG of the same image"
    import cv2
    image = cv2.imdecode(np.frombuffer(picture(), np.uint8), cv2.IMREAD_COLOR)
    return cv2.imencode('.png', image.astype(np.uint16)*257)[1].tobytes()

def rotated():
    exif = Image.Exif()
    exif[0x112] = 6
    return picture('JPEG', exif=exif)

LARGE, BROKEN, OTHER = 'too large', 'damaged or cut short', 'not a photo that can be read'
FILES = {  # name: (content, part of the sentence; '' for an answer)
    'bomb.png': (png(13_000, 13_000, 1, 0), LARGE), 'deep.png': (deep_png(), ''), 'text.png': (b'some words', OTHER),
    'empty.jpg': (b'', 'is empty'), 'cut.jpg': (picture('JPEG', 400, 500)[:-2000], BROKEN), 'cut.png': (picture()[:-20], BROKEN),
    'anim.gif': (picture('GIF'), ''), 'cmyk.jpg': (picture('JPEG', mode='CMYK'), ''), 'turned.jpg': (rotated(), ''),
    'one.png': (picture('PNG', 1, 1), ''), 'line.png': (picture('PNG', 1, 20_000), ''), 'wide.jpg': (picture('JPEG', 30, 60_000), ''),
    'a.webp': (picture('WEBP'), ''), 'a.bmp': (picture('BMP'), ''), 'a.tif': (picture('TIFF'), ''), 'clear.png': (picture(mode='RGBA'), ''),
    'a.svg': (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(3)</script></svg>', OTHER), 'page.jpg': (b'<html><script>alert(4)</script>', OTHER),
    'a.heic': (b'\0\0\0\x18ftypheic' + bytes(50), 'HEIC'), 'a.pdf': (b'%PDF-1.7', OTHER), 'a.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n', OTHER),
    'scans.jpg': (picture('JPEG', 1000, 1000, progressive=True)[:-2] + b'\xff\xda'*6000, LARGE), 'large.jpg': (plain('JPEG', 6000, 5000), '')}

SERVE = '''
import sys
log = open(sys.argv[3], 'a', buffering=1)
def audit(event, args):
    if event in ('socket.connect', 'socket.sendto'): log.write(f'{args[1]}\\n')
    if event in ('socket.getaddrinfo', 'socket.gethostbyname'): log.write(f'{args[:1]}\\n')
sys.addaudithook(audit)
import imgexp.app
imgexp.app._MAX_STORED = 60*2**20
imgexp.app.serve_model(sys.argv[1], port=int(sys.argv[2]))
'''

class Server:
    "A page in a process of its own"
    def __init__(self, folder, tmp):
        self.folder, self.tmp, self.connections = Path(folder), tmp/'temporary', tmp/'connections'
        for d in (self.tmp, tmp/'empty'): d.mkdir()
        with closing(socket.socket()) as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.url, self.out, self.err = f'http://127.0.0.1:{self.port}', tmp/'out', tmp/'err'
        env = os.environ | {'TMPDIR': str(self.tmp), 'PYTHONPATH': str(Path(__file__).resolve().parent.parent)}
        env = {k: v for k, v in env.items() if not k.startswith(('GRADIO', 'ORT_')) and k != 'CI'}
        with open(self.out, 'wb') as out, open(self.err, 'wb') as err:
            self.process = subprocess.Popen([sys.executable, '-c', SERVE, folder, str(self.port), self.connections], cwd=tmp/'empty', env=env, stdout=out, stderr=err)
        deadline = time.time() + 60
        while 'http' not in self.out.read_text():
            assert self.process.poll() is None and time.time() < deadline, self.err.read_text()
            time.sleep(0.1)
        self.session = requests.Session()
        self.config = self.get('/config').json()
        self.fn = next(i for i, d in enumerate(self.config['dependencies']) if len(d['targets']) == 2)
    def get(self, path, **options): return self.session.get(self.url + path, timeout=20, **options)
    def post(self, path, **options): return requests.post(self.url + path, timeout=20, **options)
    def raw(self, text):
        "The response to a request as it stands, without a client that tidies it"
        with closing(socket.create_connection(('127.0.0.1', self.port), 10)) as s:
            s.sendall(text.encode())
            return b''.join(iter(lambda: s.recv(65536), b''))
    def upload(self, raw, name='photo.png'): return self.post('/gradio_api/upload', files={'files': (name, raw)})
    def ask(self, photo, with_map=False):
        "The answer to a value of the photo: (classes, sentence, file of the map)"
        name = os.urandom(5).hex()
        joined = self.post('/gradio_api/queue/join', json={'data': [photo, with_map], 'fn_index': self.fn, 'session_hash': name})
        assert joined.ok, joined.text
        with requests.get(self.url + '/gradio_api/queue/data', params={'session_hash': name}, stream=True, timeout=30) as events:
            for line in events.iter_lines():
                if not line.startswith(b'data:'): continue
                event = json.loads(line[5:])
                if event['msg'] == 'process_completed': return self.parts(event)
    def parts(self, event):
        if not event['success']: return None, event['output'], None
        bars, sentence, picture = event['output']['data']
        return bars, re.sub('<[^>]*>', '', sentence), picture
    def answer(self, raw, name='photo.png', with_map=False):
        return self.ask(photo(self.upload(raw, name).json()[0]), with_map)
    def memory(self): return int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{self.process.pid}/status').read_text())[1])/1024
    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(20)

def photo(path, **more): return {'path': path, 'meta': {'_type': 'gradio.FileData'}} | more

@pytest.fixture(scope='module')
def export(tmp_path_factory):
    "An exported network of ten odd classes"
    from imgexp.models import build_model
    from imgexp.onnx_export import export_onnx
    folder = tmp_path_factory.mktemp('secret-export')
    (folder/'examples').mkdir()
    for k in range(4): (folder/f'examples/{k}.jpg').write_bytes(picture('JPEG', 60 + k))
    network, norm = build_model('small_cnn', 10, size=32).eval(), ((0.5,)*3, (0.3,)*3)
    about = export_onnx(network, norm, folder/'model.onnx', np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    groups = ['<b>odd</b>', 'even & more']
    config = {'title': TITLE, 'arch': 'small_cnn', 'classes': CLASSES, 'size': 32, 'presize': 0, 'maps': about['maps'],
              'files': {'model.onnx': hashlib.sha256((folder/'model.onnx').read_bytes()).hexdigest()},
              'accuracy': {'split': 'test', 'top1': {'value': 0.967, 'low': 0.942, 'high': 0.981, 'n': 1359}}, 'not_for': 'Not for <i>anything</i>.',
              'examples': [{'file': f'examples/{k}.jpg', 'class': CLASSES[k], 'group': groups[k % 2]} for k in range(4)]}
    (folder/'config.json').write_text(json.dumps(config))
    return folder

@pytest.fixture(scope='module')
def server(export, tmp_path_factory):
    server = Server(export, tmp_path_factory.mktemp('server'))
    yield server
    with suppress(Exception): server.stop()
    server.process.kill()

def shown(name): return name.encode('utf-8', 'backslashreplace').decode()

# -- photos

@pytest.mark.parametrize('name', FILES)
def test_every_file_gets_an_answer_or_a_sentence(server, export, name):
    raw, sentence = FILES[name]
    bars, said, _ = server.answer(raw, name)
    if sentence: assert sentence in said and not bars and re.fullmatch(r'[^.]*\.', said), said
    else:
        expected = [*Model(export).predict(raw).items()][:5]
        assert [(c['label'], pytest.approx(c['confidence'], abs=1e-5)) for c in bars['confidences']] == [(shown(c), p) for c, p in expected]
        assert said == ''
    assert server.answer(picture())[0], 'a good photo after it'

def test_a_photo_of_many_bytes_is_refused(server):
    refused = server.upload(bytes(30*2**20))
    assert refused.status_code == 413 and refused.text == 'This file is too large: please choose one of at most 20 MB.'
    assert server.answer(picture())[0]

def test_maps(server, export):
    assert server.answer(picture())[2] is None
    bars, _, shown_map = server.answer(picture(), with_map=True)
    got = server.get(shown_map['url'].removeprefix(server.url))
    assert got.content[:3] == b'\xff\xd8\xff' and Image.open(io.BytesIO(got.content)).size == (224, 224)
    from imgexp.app import blend_map
    model = Model(export)
    pixels = model.pixels(picture())
    expected = blend_map(pixels, model.explain(pixels[None])[1][0])
    assert abs(np.asarray(Image.open(io.BytesIO(got.content)), float) - expected).mean() < 4

def test_no_photo_is_no_error(server): assert server.ask(None) == ({}, '', None)

def test_memory_stays(server):
    "A large photo more, after all of those above"
    before = server.memory()
    for raw in (png(6900, 7200, 8, 2), FILES['bomb.png'][0], plain('JPEG', 9000, 5000), plain('JPEG', 9000, 5000, progressive=True)): server.answer(raw)
    assert server.memory() - before < 400 and server.memory() < 800

def test_visitors_at_once(server):
    answers = []
    threads = [threading.Thread(target=lambda k=k: answers.append(server.answer(picture(width=40 + k), with_map=k % 2 > 0))) for k in range(30)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(answers) == 30 and all(bars and not said for bars, said, _ in answers)

# -- attacks

def secrets(server): return ('root:', 'onnx', str(server.folder), 'small_cnn', 'Traceback')

@pytest.mark.parametrize('path', ['/etc/passwd', '{folder}/config.json', '{folder}/examples/0.jpg', '{tmp}/../out', 'file:///etc/passwd', '{url}/config', '{url}/gradio_api/file=/etc/passwd',
                                  'http://localhost:{port}/', 'http://[::1]:{port}/', 'http://192.0.2.1/a.png', '//192.0.2.1/a.png', 'data:image/png;base64,AAAA', '', '\0', 'a'*5000])
@pytest.mark.parametrize('more', [{}, {'meta': None}, {'url': 'http://192.0.2.1/a.png'}, {'is_stream': True}], ids=['plain', 'no meta', 'url', 'stream'])
def test_only_uploads_are_photos(server, path, more):
    "Server files and addresses get an error without a reason, or the sentence for a photo that is not there."
    value = photo(path.format(folder=server.folder, url=server.url, port=server.port, tmp=server.tmp)) | more
    bars, said, shown_map = server.ask({k: v for k, v in value.items() if v is not None}, True)
    assert not bars and not shown_map
    assert said == {'error': None} or said == '' or 'has been deleted' in said, said

@pytest.mark.parametrize('route', ['/file=', '/gradio_api/file=', '/gradio_api/file/', '/file/', '/gradio_api/proxy=', '/proxy=', '/gradio_api/stream/', '/static/', '/assets/', '/gradio_api/custom_component/',
                                   '/gradio_api/upload/', '/svelte/', '/', '//', '/gradio_api/file=file://', '/gradio_api/file={tmp}/..'])
@pytest.mark.parametrize('path', ['/etc/passwd', '../../../../../../etc/passwd', '..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd', '%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd', '{folder}/config.json', '{url}/config', '%00'])
def test_no_other_file_is_served(server, route, path):
    target = (route + path).format(folder=server.folder, url=server.url, tmp=server.tmp)
    got = server.raw(f'GET {target} HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n')
    assert not got.startswith(b'HTTP/1.1 200') and b'root:' not in got and b'"classes"' not in got, got[:300]

@pytest.mark.parametrize('path', ['/docs', '/openapi.json', '/gradio_api/info', '/gradio_api/run/predict', '/gradio_api/call/answer', '/gradio_api/component_server', '/gradio_api/dev/reload', '/monitoring',
                                  '/gradio_api/deep_link', '/login', '/gradio_api/vibe-code', '/gradio_api/startup-events/x'])
def test_routes_that_the_page_does_not_need_are_closed(server, path):
    assert server.get(path).status_code == server.post(path, json={}).status_code == 404

def test_streams_without_an_end(server):
    "200 MB, in pieces that say no length, are not taken."
    def pieces(head=b''):
        yield head
        for _ in range(200):
            sent.append(1)
            yield bytes(2**20)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    for path, kind, first in (('/gradio_api/upload', 'multipart/form-data; boundary=x', head), ('/gradio_api/queue/join', 'application/json', b'{"data": "'),
                              ('/', 'text/plain', b''), ('/config', 'text/plain', b'')):
        sent, before = [], server.memory()
        try: assert not server.post(path, data=pieces(first), headers={'Content-Type': kind}).ok
        except requests.RequestException: pass
        assert server.memory() - before < 60, path
    assert server.answer(picture())[0]
    for length in ('209715200', '-1', 'x', '9'*30):
        head = f'POST /gradio_api/upload HTTP/1.0\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n--x'
        assert re.match(rb'HTTP/1.1 4\d\d', server.raw(head)), length
    assert server.answer(picture())[0]

@pytest.mark.parametrize('name', ['../../../evil.png', '..', '/etc/evil.png', 'a'*400 + '.png', MARKUP + '.png', 'e\u202e\u0301.png', '"\r\nX: y', 'con.png', '.htaccess', "';rm -rf.png", '%2e%2e%2fevil.png'])
def test_names_of_uploads(server, name):
    before = {p for p in server.tmp.parent.iterdir()}
    got = server.upload(picture(), name)
    if got.ok:
        path = Path(got.json()[0])
        assert path.is_file() and path.resolve().is_relative_to(server.tmp) and server.ask(photo(str(path)))[0]
    else: assert got.status_code == 400
    assert {p for p in server.tmp.parent.iterdir()} == before and not list(server.tmp.glob('*evil*'))

def test_odd_questions(server):
    for data in ([], [1], [[], {}], ['x', 'y'], [photo('x'), None, 3], {}, None, [{'path': ['x']}, True], [{'a': [[[[]]]*100]}, False]):
        for fn in (0, server.fn, 99, -1):
            name = os.urandom(5).hex()
            server.post('/gradio_api/queue/join', json={'data': data, 'fn_index': fn, 'session_hash': name})
    assert server.answer(picture())[0]

def test_uploads_are_bounded(server):
    "Uploads that nobody asks about don't fill the disk."
    largest = 0
    for k in range(30):
        server.upload(bytes([k])*(5*2**20), f'{k}.png')
        largest = max(largest, sum(p.stat().st_size for p in server.tmp.rglob('*') if p.is_file()))
    assert 30*2**20 < largest < 61*2**20
    gone = server.upload(picture(), 'first.png').json()[0]
    for k in range(12): server.upload(bytes([k])*(5*2**20), f'{k}.png')
    assert 'has been deleted' in server.ask(photo(gone))[1]
    assert server.answer((server.folder/'examples/0.jpg').read_bytes())[0]
    examples = [d for d in server.config['components'] if d['type'] == 'dataset']
    assert all(Path(row[0]['path']).is_file() for d in examples for row in d['props']['samples']), 'examples stay'

# -- the page

def test_the_page_has_its_names_as_text(server):
    page = server.get('/').text
    assert TITLE not in page and MARKUP not in page and '<script>alert' not in page
    assert "default-src 'self'" in server.get('/').headers['content-security-policy']
    assert not re.search(r'''(?:src|href)=["']?(?:https?:)?//''', page.replace('https://gradio.app/', ''))
    assert 'n = 1,359 test images' in page and str(server.folder) not in page + server.get('/config').text

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

@pytest.fixture(scope='module')
def page(server):
    api = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM: pytest.skip('needs Chromium')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        context = browser.new_context(viewport={'width': 390, 'height': 844}, permissions=['clipboard-read', 'clipboard-write'])
        page = context.new_page()
        page.requested, page.dialogs = [], []
        page.on('request', lambda r: page.requested.append(r.url))
        page.on('dialog', lambda d: (page.dialogs.append(d.message), d.dismiss()))
        page.set_default_timeout(15_000)
        page.goto(server.url)
        page.wait_for_selector('#examples button')
        yield page
        browser.close()

def clear(page):
    if page.locator('#photo [aria-label="Remove Image"]').count(): page.click('#photo [aria-label="Remove Image"]')
    page.wait_for_function("!document.querySelector('#bars')?.innerText.includes('%') && !document.querySelector('#sentence p')")

def choose(page, raw, name='photo.png'): page.set_input_files('#photo input[type=file]', {'name': name, 'mimeType': 'image/png', 'buffer': raw})
def wait_for_bars(page): page.wait_for_function("document.querySelector('#bars')?.innerText.includes('%')")

def test_upload_switch_and_hostile_files_in_a_browser(page, export):
    choose(page, picture())
    wait_for_bars(page)
    top = [shown(c) for c in [*Model(export).predict(picture())][:5]]
    assert [page.evaluate('e => e.textContent', e) for e in page.query_selector_all('#bars dt')] == top
    assert not page.locator('#map img').count()
    page.check('#switch input')
    page.wait_for_selector('#map img')
    page.uncheck('#switch input')
    page.wait_for_selector('#map img', state='detached')
    for name in ('bomb.png', 'text.png', 'cut.jpg', 'deep.png'):
        clear(page)
        choose(page, FILES[name][0], name)
        if FILES[name][1]: page.wait_for_selector(f'#sentence p:has-text("{FILES[name][1]}")')
        else: wait_for_bars(page)
    clear(page)
    choose(page, picture())
    wait_for_bars(page)

def test_paste_in_a_browser(page):
    clear(page)
    page.evaluate('''async bytes => navigator.clipboard.write([new ClipboardItem({'image/png': new Blob([new Uint8Array(bytes)], {type: 'image/png'})})])''', list(picture()))
    page.click('#photo [aria-label="Paste from clipboard"]')
    wait_for_bars(page)

def test_examples_by_keyboard_in_a_browser(page):
    clear(page)
    assert page.locator('#examples .label').all_inner_texts() == ['<b>odd</b>', 'even & more']
    assert page.get_attribute('#examples button >> nth=0', 'title') == MARKUP
    page.focus('#switch input')
    for _ in range(12):
        page.keyboard.press('Tab')
        if page.evaluate("!!document.activeElement.closest('#examples')"): break
    page.keyboard.press('Enter')
    wait_for_bars(page)

def test_the_page_fits_and_asks_nobody_else(page, server):
    "After the tests above: 390 px wide, no dialog from a name, no request to another host"
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert not page.dialogs and page.title() == TITLE and page.inner_text('#title h1') == TITLE
    assert 'Not for <i>anything</i>.' in page.inner_text('#title')
    assert all(u.startswith((server.url, 'data:', 'blob:')) for u in page.requested)

# -- starting and stopping; last, for it ends the server

def test_a_port_in_use_is_one_line(server, export):
    with pytest.raises(CannotServe, match=f'^port {server.port} is in use: choose another one$'): serve_model(export, port=server.port)

def test_nothing_stays_and_nobody_else_was_called(server):
    assert server.answer(picture(), with_map=True)[0]
    assert list(server.tmp.iterdir())
    assert server.stop() == 0
    assert not list(server.tmp.iterdir()), 'uploads'
    assert set(re.findall(r'[\d.:]{7,}|[\w.]+\.\w{2,}', server.connections.read_text())) <= {'127.0.0.1'}
    assert server.err.read_text() == ''
    import imgexp.app
    assert not Path(imgexp.app.__file__).with_suffix('.pyi').exists(), 'written by Gradio'
    first, *lines = server.out.read_text().splitlines()
    assert first == f'{server.url} (Ctrl+C stops)' and lines
    for line in lines: assert re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\d+ (answered|refused|failed),? )+[\d.]+ s \(at most [\d.]+ s\)', line.replace(', ', ' ')), line
