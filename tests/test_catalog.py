"Fetching through a network that misbehaves, unpacking archives that do, and every official layout in miniature."
import fcntl, gzip, hashlib, io, json, os, pty, re, shutil, struct, subprocess, sys, tarfile, tempfile, termios, threading, time, zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from imgexp import download as download_module, retrieval
from imgexp.catalog import ENTRIES, catalog, info, where
from imgexp.layouts import LAYOUTS
from imgexp.retrieval import fetch
from imgexp.download import BadArchive, FetchError, Remote, download, unpack
from imgexp.errors import InputError

META = Path(__file__).resolve().parents[2]/'shared/data/meta'
BODY = np.random.default_rng(0).integers(0, 256, 400_000, np.uint8).tobytes()
SHA = 'sha256:' + hashlib.sha256(BODY).hexdigest()
FAST = dict(tries=4, timeout=5., pause=0.01)
IMPATIENT = dict(tries=10, timeout=0.5, pause=0.01)

# ---- a server that does what it is told ----

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        net, path = self.server.net, self.path.split('?')[0]
        asked = self.headers.get('Range', '')
        net.log.append((path, asked))
        self.close_connection = True
        if path not in net.files: return self.say(404)
        plan = net.plan.get(path, [])
        try: (plan.pop(0) if plan else good)(self, net.files[path], asked)
        except (BrokenPipeError, ConnectionResetError): pass

    def say(self, code, body=b'', length=None, **headers):
        "Status, headers (_ for -) and body"
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
        if length is not False: self.send_header('Content-Length', str(len(body) if length is None else length))
        self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass

def etag(body): return f'"{hashlib.md5(body).hexdigest()}"'

def answer(h, body, asked, send=None, length=None, tag=None):
    "What a good server says, of which only the first `send` bytes come, with `length` claimed"
    tag = etag(body) if tag is None else tag
    at = int(asked[6:].split('-')[0]) if asked and h.headers.get('If-Range', tag) == tag else 0
    if at >= len(body) and asked: return h.say(416, Content_Range=f'bytes */{len(body)}')
    rest = body[at:]
    headers = dict(ETag=tag) if tag else {}
    if at: headers['Content_Range'] = f'bytes {at}-{len(body) - 1}/{len(body)}'
    h.say(206 if at else 200, rest[:send], len(rest) if length is None else length, **headers)

def good(h, body, asked): answer(h, body, asked)
def only(n, **kw): return lambda h, body, asked: answer(h, body, asked, n, **kw)
def status(code, **headers): return lambda h, body, asked: h.say(code, b'busy', **headers)
def page(h, body, asked): h.say(200, b'<!DOCTYPE html><html><body>Please log in' + b' '*1000, Content_Type='text/html')
def no_ranges(n=None): return lambda h, body, asked: h.say(200, body[:n], len(body))
def claims(length, send=None): return lambda h, body, asked: answer(h, body, asked, send, length)
def wrong_place(h, body, asked): h.say(206, body[100:], ETag=etag(body), Content_Range=f'bytes 100-{len(body) - 1}/{len(body)}')
def out_of_range(h, body, asked): h.say(416, Content_Range=f'bytes */{len(body)}')

def stalls(n):
    def act(h, body, asked):
        answer(h, body, asked, n)
        h.wfile.flush()
        h.server.net.ended.wait(60)
    return act

def trickles(n):
    def act(h, body, asked):
        answer(h, body, asked, n)
        for i in range(100):
            h.wfile.write(body[n + i:n + i + 1]); h.wfile.flush()
            if h.server.net.ended.wait(0.05): break
    return act

def chunked(n):
    "Half of a body in chunks, with no length and no end"
    def act(h, body, asked):
        h.say(200, b'', False, Transfer_Encoding='chunked', ETag=etag(body))
        h.wfile.write(b'%x\r\n' % n + body[:n] + (b'\r\n0\r\n\r\n' if n == len(body) else b'\r\n'))
    return act

class Net:
    "Files, how each is served (one behavior a request, then well), and what was asked"
    def __init__(self):
        self.files, self.plan, self.log, self.ended = {}, {}, [], threading.Event()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads, self.server.net = True, self
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'
    def serve(self, name, body, *plan):
        self.files[f'/{name}'], self.plan[f'/{name}'] = body, list(plan)
        return Remote(f'{self.url}/{name}', len(body), 'sha256:' + hashlib.sha256(body).hexdigest())
    def asked(self, name): return [r for p, r in self.log if p == f'/{name}']
    def close(self):
        self.ended.set(); self.server.shutdown(); self.server.server_close()

@pytest.fixture
def net():
    n = Net()
    yield n
    n.close()

@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv('IMGEXP_DATA', str(tmp_path/'data'))
    return tmp_path/'data'

# ---- downloads ----

def get(remote, folder, **kw): return download(remote, folder, **FAST | kw).read_bytes()

BREAKS = {
    'cut': only(100_000), 'cut at once': only(0), 'stalls': stalls(100_000), 'trickles': trickles(100_000), 'chunked': chunked(100_000),
    'says more than there is': claims(500_000), 'says less than there is': claims(100_000, 100_000), 'ignores ranges': no_ranges(100_000),
    '503': status(503), '429': status(429, Retry_After='0'), '500': status(500),
}

CASES = [(how, known) for how in BREAKS for known in ('published', 'unpublished')
         if (how, known) != ('says less than there is', 'unpublished')]  # which no one can tell: the archive will

@pytest.mark.parametrize('how,known', CASES)
def test_break_then_well(net, tmp_path, how, known):
    "After any break the file is whole, and its name appears only then"
    remote = net.serve('a.bin', BODY, BREAKS[how])
    if known == 'unpublished': remote = Remote(remote.url)
    began = time.monotonic()
    assert get(remote, tmp_path, **(IMPATIENT if how in ('stalls', 'trickles') else {})) == BODY
    assert os.listdir(tmp_path) == ['a.bin'] and time.monotonic() - began < 30
    if how in ('cut', 'stalls', 'trickles', 'chunked'): assert re.match(r'bytes=1000\d\d-', net.asked('a.bin')[1])

def test_many_breaks(net, tmp_path):
    "Attempts that bring something are not counted: fifteen breaks with four tries"
    remote = net.serve('a.bin', BODY, *[only(10_000)]*15)
    assert get(remote, tmp_path) == BODY
    assert len(net.asked('a.bin')) == 16

def test_ranges_ignored(net, tmp_path):
    "A server that always begins at the beginning is believed"
    remote = net.serve('a.bin', BODY, only(100_000), no_ranges())
    assert get(remote, tmp_path) == BODY
    assert net.asked('a.bin') == ['', 'bytes=100000-']

@pytest.mark.parametrize('tagged', [True, False], ids=['etag', 'date'])
def test_file_changed(net, tmp_path, tagged):
    "The file changed between two attempts: no mixture of both, even if the server sends ranges all the same"
    new = BODY[::-1]
    def first(h, body, asked):
        h.say(200, BODY[:100_000], len(BODY), **(dict(ETag='"old"') if tagged else dict(Last_Modified='Mon, 01 Jan 2024 00:00:00 GMT')))
    def careless(h, body, asked):  # ignores If-Range
        at = int(asked[6:-1]) if asked else 0
        tag = dict(ETag='"new"') if tagged else dict(Last_Modified='Tue, 02 Jan 2024 00:00:00 GMT')
        h.say(206 if asked else 200, body[at:], **tag, **(dict(Content_Range=f'bytes {at}-{len(body) - 1}/{len(body)}') if asked else {}))
    net.serve('a.bin', new, first, careless, careless)
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == new
    assert net.asked('a.bin') == ['', 'bytes=100000-', '']

def test_file_changed_at_a_good_server(net, tmp_path):
    "If-Range makes the server send the new file at once"
    def first(h, body, asked): h.say(200, BODY[:100_000], len(BODY), ETag=etag(BODY))
    net.serve('a.bin', BODY[::-1], first)
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == BODY[::-1]
    assert net.asked('a.bin') == ['', 'bytes=100000-']

def test_ranges_in_slices(net, tmp_path):
    "A server may send less than it is asked for, and say so correctly"
    def slice(h, body, asked):
        at = int(asked[6:-1])
        h.say(206, body[at:at + 150_000], ETag=etag(body), Content_Range=f'bytes {at}-{min(at + 150_000, len(body)) - 1}/{len(body)}')
    net.serve('a.bin', BODY, only(100_000), slice, slice)
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == BODY
    assert net.asked('a.bin') == ['', 'bytes=100000-', 'bytes=250000-']

def test_changed_length(net, tmp_path):
    def first(h, body, asked): h.say(200, BODY[:100_000], len(BODY), ETag='"v"')
    net.serve('a.bin', BODY + b'more', first, only(None, tag='"v"'))
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == BODY + b'more'

def test_nothing_to_continue_by(net, tmp_path):
    "Without tag, date or checksum a part is no one's: begin again"
    net.serve('a.bin', BODY, only(100_000, tag=''))
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == BODY
    assert net.asked('a.bin') == ['', '']

def test_answer_for_another_place(net, tmp_path):
    net.serve('a.bin', BODY, only(50_000), wrong_place)
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == BODY

def test_part_of_another_address(net, tmp_path):
    "A part is continued only from the address it came from"
    (tmp_path/'a.bin.part').write_bytes(b'x'*1000)
    (tmp_path/'a.bin.part.json').write_text(json.dumps(dict(url='https://example.org/a.bin', tag='"v"')))
    assert get(net.serve('a.bin', BODY), tmp_path) == BODY
    assert net.asked('a.bin') == ['']

def test_416_when_whole(net, tmp_path):
    "All bytes came, but not the end of the answer: 416 says that nothing is missing"
    remote = net.serve('a.bin', BODY, claims(500_000))
    assert get(Remote(remote.url), tmp_path) == BODY
    assert net.asked('a.bin') == ['', 'bytes=400000-']

def test_416_when_longer(net, tmp_path):
    "The part is longer than the file now is"
    net.serve('a.bin', BODY)
    (tmp_path/'a.bin.part').write_bytes(BODY + b'x'*5000)
    (tmp_path/'a.bin.part.json').write_text(json.dumps(dict(url=f'{net.url}/a.bin', tag=etag(BODY), total=0)))
    assert get(Remote(f'{net.url}/a.bin'), tmp_path) == BODY

def test_416_for_ever(net, tmp_path):
    remote = net.serve('a.bin', BODY, *[out_of_range]*20)
    with pytest.raises(FetchError, match='cannot be fetched'): get(remote, tmp_path)

def test_retry_after(net, tmp_path):
    remote = net.serve('a.bin', BODY, status(429, Retry_After='1'))
    began = time.monotonic()
    assert get(remote, tmp_path) == BODY
    assert time.monotonic() - began > 0.9

def test_busy_for_ever(net, tmp_path):
    remote = net.serve('a.bin', BODY, *[status(503)]*20)
    with pytest.raises(FetchError, match='HTTP 503 Service Unavailable'): get(remote, tmp_path)
    assert len(net.asked('a.bin')) == FAST['tries']

@pytest.mark.parametrize('code', [401, 403, 404, 410])
def test_gone(net, tmp_path, code):
    "One line at once: the address, why, what to do by hand"
    remote = replace(net.serve('a.bin', BODY, status(code)), page='https://example.org/about')
    with pytest.raises(FetchError) as e: get(remote, tmp_path)
    text = str(e.value)
    assert len(net.asked('a.bin')) == 1 and '\n' not in text
    for part in (remote.url, f'HTTP {code}', 'https://example.org/about', f'put a.bin into {tmp_path}'): assert part in text

def test_offline(tmp_path):
    began = time.monotonic()
    with pytest.raises(FetchError, match=r'http://127.0.0.1:9/a.bin cannot be fetched: no connection. By hand: put a.bin into'):
        get(Remote('http://127.0.0.1:9/a.bin'), tmp_path)
    assert time.monotonic() - began < 10

def test_web_page(net, tmp_path):
    remote = net.serve('a.tar', BODY, page)
    with pytest.raises(FetchError, match='the server sent a web page instead of the file'): get(remote, tmp_path)
    assert os.listdir(tmp_path) == []

def test_web_page_later(net, tmp_path):
    "A login page in place of the rest does not cost the part"
    remote = net.serve('a.tar', BODY, only(100_000), page)
    with pytest.raises(FetchError, match='the server sent a web page.*100.0 kB are kept'): get(remote, tmp_path)
    assert get(remote, tmp_path) == BODY
    assert net.asked('a.tar')[2:] == ['bytes=100000-']

def test_not_the_format(net, tmp_path):
    remote = net.serve('a.zip', BODY)
    with pytest.raises(FetchError, match='the content is not a .zip file'): get(remote, tmp_path)

def test_damaged_on_the_way(net, tmp_path):
    "A wrong checksum: once more from the beginning; twice is an error"
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    def damaged(h, body, asked): h.say(200, wrong)
    remote = net.serve('a.bin', BODY, damaged)
    assert get(remote, tmp_path/'once') == BODY
    net.serve('a.bin', BODY, damaged, damaged)
    with pytest.raises(FetchError, match='its sha256 is [0-9a-f]{64}, but [0-9a-f]{64} is published'): get(remote, tmp_path/'twice')
    assert os.listdir(tmp_path/'twice') in ([], ['a.bin.part.json'])

def test_length_is_not_the_published(net, tmp_path):
    remote = replace(net.serve('a.bin', BODY), size=400_001)
    with pytest.raises(FetchError, match='the server offers 400,000 bytes, but 400,001 are published'): get(remote, tmp_path)

def test_first_mebibyte(net, tmp_path):
    long = BODY*3
    net.serve('a.bin', long)
    remote = Remote(f'{net.url}/a.bin', len(long), 'md5-1MiB:' + hashlib.md5(long[:2**20]).hexdigest())
    assert get(remote, tmp_path) == long

def test_disk_full(net, tmp_path, monkeypatch):
    "Free space is looked at before, and a full disk in between leaves the part"
    remote = net.serve('a.bin', BODY, only(100_000))
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda p: usage)
        with pytest.raises(FetchError, match='300.0 kB free, but 400.0 kB are needed: free up space'): get(remote, tmp_path)
    assert not (tmp_path/'a.bin.part').exists()
    calls = []
    def full(*a):  # the first call is that of the note beside the part
        calls.append(a)
        if len(calls) > 1: raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(FetchError, match='No space left on device.*are kept'): get(remote, tmp_path)
    assert get(remote, tmp_path) == BODY and len(net.asked('a.bin'))

def test_there_already(net, tmp_path):
    remote = net.serve('a.bin', BODY)
    get(remote, tmp_path); get(remote, tmp_path)
    assert len(net.asked('a.bin')) == 1

def test_brought_by_hand(net, tmp_path):
    "A file put in place by hand is taken where it is the published one, and never overwritten where it is not"
    remote = net.serve('a.bin', BODY)
    (tmp_path/'a.bin').write_bytes(b'something of mine')
    with pytest.raises(FetchError, match='is not the published file: it has 17 bytes, but 400,000 are published. Remove it'): get(remote, tmp_path)
    assert (tmp_path/'a.bin').read_bytes() == b'something of mine'
    (tmp_path/'a.bin').write_bytes(BODY)
    assert get(remote, tmp_path) == BODY and not net.log

KILLED = "import sys; from imgexp.download import Remote, download; download(Remote(*sys.argv[1:2], int(sys.argv[2]), sys.argv[3]), sys.argv[4])"

def test_killed_and_continued(net, tmp_path):
    "SIGKILL in the middle of a download; the next one asks for the rest"
    remote = net.serve('a.bin', BODY, stalls(200_000))
    job = subprocess.Popen([sys.executable, '-c', KILLED, remote.url, str(remote.size), remote.checksum, str(tmp_path)], stderr=subprocess.DEVNULL)
    part = tmp_path/'a.bin.part'
    until = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until: time.sleep(0.05)
    job.kill(); job.wait()
    have = part.stat().st_size
    assert have > 0 and not (tmp_path/'a.bin').exists()
    assert get(remote, tmp_path) == BODY
    assert net.asked('a.bin') == ['', f'bytes={have}-']

def test_log_is_quiet(net, tmp_path, capsys):
    get(net.serve('a.bin', BODY, *[only(50_000)]*5), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r'\d+ s, .*/s', 'N s', line) for line in lines] == ['a.bin: fetching 400.0 kB', 'a.bin: 400.0 kB in N s']

def test_log_once_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(time, 'monotonic', lambda now=[0]: now.__setitem__(0, now[0] + 1) or now[0])
    bar = download_module.DownloadProgress('a.bin', 200_000)
    for n in range(0, 150_000, 1000): bar.update(n)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith('a.bin: ') and 'min left' in lines[1]

def test_bar_in_a_terminal(net, tmp_path):
    "A bar with rate and time left where a person watches"
    remote = net.serve('a.bin', BODY*4, lambda h, b, a: (answer(h, b, a, 400_000), time.sleep(0.5), h.wfile.write(b[400_000:])))
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    job = subprocess.Popen([sys.executable, '-c', KILLED, remote.url, str(remote.size), remote.checksum, str(tmp_path)], stderr=there, stdout=there)
    job.wait(30); os.close(there)
    text = b''
    try:
        while block := os.read(here, 65536): text += block
    except OSError: pass
    os.close(here)
    assert re.search(rb'a\.bin: +\d+%.*\|.*/1\.60M \[00:0\d<.*B/s\]', text), text

# ---- archives ----

def pack(files, kind='tar'):
    "An archive of {name: bytes}; a tarfile.TarInfo in place of bytes is put in as it is"
    f = io.BytesIO()
    if kind == 'zip':
        with zipfile.ZipFile(f, 'w') as z:
            for name, content in files.items(): z.writestr(name, content)
        return f.getvalue()
    with tarfile.open(fileobj=f, mode='w:gz' if kind == 'tgz' else 'w') as t:
        for name, content in files.items():
            m = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            m.name = name
            if isinstance(content, bytes): m.size = len(content)
            t.addfile(m, io.BytesIO(content) if isinstance(content, bytes) else None)
    return f.getvalue()

def special(kind, target=''):
    m = tarfile.TarInfo()
    m.type, m.linkname = kind, target
    return m

def unpack_bytes(tmp_path, body, name='a.tar', **kw):
    (tmp_path/name).write_bytes(body)
    return unpack(tmp_path/name, tmp_path/'in', **kw)

def link_in_zip():
    m = zipfile.ZipInfo('l')
    m.external_attr = 0o120777 << 16
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z: z.writestr(m, '../../etc')
    return f.getvalue()

ABSOLUTE = f'{tempfile.gettempdir()}/evil-imgexp-{os.getpid()}'
EVIL = {
    'up': ('a.tar', pack({'../evil': b'x'}), "'../evil'"), 'absolute': ('a.tar', pack({ABSOLUTE: b'x'}), repr(ABSOLUTE)),
    'up in zip': ('a.zip', pack({'a/../../evil': b'x'}, 'zip'), "'a/../../evil'"),
    'absolute in zip': ('a.zip', pack({ABSOLUTE: b'x'}, 'zip'), 'outside its folder'),
    'backslashes in zip': ('a.zip', pack({'..\\evil': b'x'}, 'zip'), 'outside its folder'),
    'link out': ('a.tar', pack({'l': special(tarfile.SYMTYPE, '../..'), 'l/evil': b'x'}), "'l'"),
    'hard link out': ('a.tar', pack({'h': special(tarfile.LNKTYPE, '../../evil')}), "'h'"), 'link in zip': ('a.zip', link_in_zip(), "'l'"),
    'device': ('a.tar', pack({'d': special(tarfile.CHRTYPE)}), "'d'"), 'pipe': ('a.tar', pack({'p': special(tarfile.FIFOTYPE)}), "'p'"),
}

@pytest.mark.parametrize('what', EVIL)
def test_evil_archive(tmp_path, what):
    "Nothing outside the folder, no links, no devices; what asks for it is named"
    name, body, named = EVIL[what]
    with pytest.raises(BadArchive, match=re.escape(named)): unpack_bytes(tmp_path, body, name)
    assert sorted(p.name for p in tmp_path.rglob('*')) == sorted([name, 'in'])
    assert not os.path.exists(ABSOLUTE)

def test_links_are_not_made(tmp_path):
    "A link that stays inside is passed over, so that a later file cannot go through it"
    chain = pack({'d': special(tarfile.SYMTYPE, '.'), 'd/l': special(tarfile.SYMTYPE, '..'), 'a.jpg': b'x'})
    try: unpack_bytes(tmp_path, chain)
    except BadArchive: pass
    assert not any(p.is_symlink() for p in tmp_path.rglob('*'))

def test_bounds(tmp_path):
    with pytest.raises(BadArchive, match='more than 3 files'): unpack_bytes(tmp_path, pack({f'{i}': b'' for i in range(5)}), max_files=3)
    with pytest.raises(BadArchive, match=r"more bytes than it should \(at 'bomb'\)"):
        unpack_bytes(tmp_path, pack({'bomb': bytes(5_000_000)}, 'tgz'), 'a.tgz', max_bytes=1_000_000)
    assert sum(p.stat().st_size for p in (tmp_path/'in').rglob('*') if p.is_file()) == 0

@pytest.mark.parametrize('kind,cut', [('tar', 700), ('tar', 1024), ('tgz', 60), ('zip', 60)])
def test_cut_archive(tmp_path, kind, cut):
    "Cut within a file, or exactly between two: a tar without end mark is not whole"
    body = pack({'a.jpg': b'x'*500, 'b.jpg': os.urandom(500)}, kind)
    with pytest.raises(BadArchive): unpack_bytes(tmp_path, body[:cut] if kind == 'tar' else body[:-cut], f'a.{kind}')

def test_wrong_bytes_in_zip(tmp_path):
    body = bytearray(pack({'a.jpg': b'x'*500}, 'zip'))
    body[100] ^= 1
    with pytest.raises(BadArchive, match="damaged after 'a.jpg'"): unpack_bytes(tmp_path, bytes(body), 'a.zip')
    assert not (tmp_path/'in/a.jpg').exists()

def test_unpacking_is_finished_not_started_over(tmp_path):
    files = {f'{i}.jpg': bytes([i])*1000 for i in range(10)}
    assert unpack_bytes(tmp_path, pack(files)) == 10
    (tmp_path/'in/7.jpg').write_bytes(b'half'); (tmp_path/'in/8.jpg').unlink()
    before = {i: (tmp_path/f'in/{i}.jpg').stat().st_ino for i in range(7)}
    assert unpack(tmp_path/'a.tar', tmp_path/'in') == 10
    assert all((tmp_path/'in'/n).read_bytes() == c for n, c in files.items())
    assert before == {i: (tmp_path/f'in/{i}.jpg').stat().st_ino for i in range(7)}

# ---- official layouts, in miniature ----

def mat(**variables):
    from scipy.io import savemat
    f = io.BytesIO()
    savemat(f, variables)
    return f.getvalue()

def cells(items):
    a = np.empty((len(items), 1), object)
    a[:, 0] = items
    return a

def imagenette():
    return {'imagenette2.tgz': pack({'imagenette2/noisy_imagenette.csv': b'', 'imagenette2/.DS_Store': b'x', **{
        f'imagenette2/{s}/{c}/{c}_{i}.JPEG': f'{s}{c}{i}'.encode() for s, n in (('train', 3), ('val', 2)) for c in ('n01440764', 'n02102040') for i in range(n)}}, 'tgz')}

def inaturalist():
    return {'nature_12K.zip': pack({'__MACOSX/x': b'', 'inaturalist_12K/.DS_Store': b'', **{
        f'inaturalist_12K/{s}/{c}/{i}.jpg': b'x%d' % i for s, n in (('train', 3), ('val', 2)) for c in ('Aves', 'Fungi') for i in range(n)}}, 'zip')}

def tiny():
    return {'tiny-imagenet-200.zip': pack({
        'tiny-imagenet-200/wnids.txt': b'n02\nn01\n', 'tiny-imagenet-200/test/images/test_0.JPEG': b'?',
        **{f'tiny-imagenet-200/train/{c}/images/{c}_{i}.JPEG': b'x' for c in ('n01', 'n02') for i in range(3)},
        **{f'tiny-imagenet-200/val/images/val_{i}.JPEG': b'v%d' % i for i in range(4)},
        'tiny-imagenet-200/val/val_annotations.txt': ''.join(f'val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t9\t9\n' for i in range(4)).encode()}, 'zip')}

def cub():
    names = ['001.Black_footed_Albatross/A_1.jpg', '001.Black_footed_Albatross/A_2.jpg', '002.Laysan_Albatross/L_1.jpg', '002.Laysan_Albatross/L_2.jpg']
    table = lambda rows: ''.join(f'{i + 1} {r}\n' for i, r in enumerate(rows)).encode()
    return {'CUB_200_2011.tgz': pack({'attributes.txt': b'', **{f'CUB_200_2011/images/{n}': n.encode() for n in names},
        'CUB_200_2011/images.txt': table(names), 'CUB_200_2011/image_class_labels.txt': table([1, 1, 2, 2]), 'CUB_200_2011/train_test_split.txt': table([0, 1, 1, 0]),
        'CUB_200_2011/classes.txt': table(['001.Black_footed_Albatross', '002.Laysan_Albatross'])}, 'tgz')}

def food():
    ids = {'train': ['pizza/1', 'pizza/2', 'sushi/3'], 'test': ['pizza/4', 'sushi/5']}
    return {'food-101.tar.gz': pack({**{f'food-101/images/{n}.jpg': n.encode() for ns in ids.values() for n in ns},
        **{f'food-101/meta/{s}.txt': '\n'.join(ns).encode() + b'\n' for s, ns in ids.items()}}, 'tgz')}

def dogs():
    names = {'train': ['n02085620-Chihuahua/a_1.jpg', 'n02085782-Japanese_spaniel/b_1.jpg'], 'test': ['n02085620-Chihuahua/a_2.jpg']}
    return {'images.tar': pack({f'Images/{n}': n.encode() for ns in names.values() for n in ns}),
            'lists.tar': pack({f'{s}_list.mat': mat(file_list=cells(ns), labels=np.ones((len(ns), 1))) for s, ns in names.items()})}

def annotations(rows):
    kind = [(n, object) for n in ('bbox_x1', 'class', 'fname')]
    return np.array([(1, c, n) for n, c in rows], kind)

def cars():
    meta = mat(class_names=cells(['AM General Hummer SUV 2000', 'Ram C/V Cargo Van Minivan 2012']).T)
    return {'cars_train.tgz': pack({f'cars_train/0000{i}.jpg': b'tr%d' % i for i in (1, 2)}, 'tgz'),
            'cars_test.tgz': pack({f'cars_test/0000{i}.jpg': b'te%d' % i for i in (1, 2)}, 'tgz'),
            'car_devkit.tgz': pack({'devkit/cars_meta.mat': meta, 'devkit/cars_train_annos.mat': mat(annotations=annotations([('00001.jpg', 2), ('00002.jpg', 1)]))}, 'tgz'),
            'cars_test_annos_withlabels.mat': mat(annotations=annotations([('00001.jpg', 1), ('00002.jpg', 2)]))}

def cifar10():
    rng = np.random.default_rng(0)
    batch = lambda n: np.concatenate([np.arange(n, dtype=np.uint8)[:, None] % 2, rng.integers(0, 256, (n, 3072), np.uint8)], 1).tobytes()
    return {'cifar-10-binary.tar.gz': pack({'cifar-10-batches-bin/batches.meta.txt': b'airplane\nautomobile\n\n',
        **{f'cifar-10-batches-bin/{n}.bin': batch(4) for n in ('data_batch_1', 'data_batch_2', 'test_batch')}}, 'tgz')}

def idx(a): return gzip.compress(bytes([0, 0, 8, a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes())

def fashion():
    pixels = np.arange(4*784, dtype=np.uint64).astype(np.uint8).reshape(4, 28, 28)
    return {f'{p}-{k}-ubyte.gz': idx(a[:n]) for p, n in (('train', 4), ('t10k', 2))
            for k, a in (('images-idx3', pixels), ('labels-idx1', np.array([0, 9, 0, 9], np.uint8)))}

OFFICIAL = {  # name: (files, images of each class in each split)
    'imagenette': (imagenette, {'train': {'n01440764': 3, 'n02102040': 3}, 'valid': {'n01440764': 2, 'n02102040': 2}}),
    'inaturalist12k': (inaturalist, {'train': {'Aves': 3, 'Fungi': 3}, 'test': {'Aves': 2, 'Fungi': 2}}),
    'tiny-imagenet': (tiny, {'train': {'n01': 3, 'n02': 3}, 'valid': {'n01': 2, 'n02': 2}}),
    'cub-birds-200': (cub, {s: {'001.Black_footed_Albatross': 1, '002.Laysan_Albatross': 1} for s in ('train', 'test')}),
    'food-101': (food, {'train': {'pizza': 2, 'sushi': 1}, 'test': {'pizza': 1, 'sushi': 1}}),
    'stanford-dogs': (dogs, {'train': {'n02085620-Chihuahua': 1, 'n02085782-Japanese_spaniel': 1}, 'test': {'n02085620-Chihuahua': 1}}),
    'stanford-cars': (cars, {s: {'AM General Hummer SUV 2000': 1, 'Ram C-V Cargo Van Minivan 2012': 1} for s in ('train', 'test')}),
    'cifar10': (cifar10, {'train': {'airplane': 4, 'automobile': 4}, 'test': {'airplane': 2, 'automobile': 2}}),
    'fashion-mnist': (fashion, {'train': {'T-shirt-top': 2, 'Ankle boot': 2}, 'test': {'T-shirt-top': 1, 'Ankle boot': 1}}),
}

def small(net, name, files=None):
    "The entry `name` with these files in place of the official ones, served"
    files = files or OFFICIAL[name][0]()
    entry = info(name)
    served = {n: net.serve(n, b) for n, b in files.items()}
    assert {r.name for r in entry.files()} == set(files)
    return replace(entry, sizes={'': tuple(served[r.name] for r in entry.files())})

def tree(root): return {s.name: {c.name: len(list(c.iterdir())) for c in s.iterdir()} for s in root.iterdir() if not s.name.startswith('.')}
def contents(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file() and not p.name.startswith('.')}
def bring(entry, **kw): return fetch(entry, **FAST | kw)

@pytest.mark.parametrize('name', OFFICIAL)
def test_layout(net, data, name, capsys):
    "Each official layout becomes class folders; archives are gone; a second fetch does nothing and says so"
    entry = small(net, name)
    place = bring(entry)
    assert place == data/name == where(name) and tree(place) == OFFICIAL[name][1]
    assert sorted(p.name for p in data.iterdir() if not p.name.startswith('.')) == [name]  # nothing else is left
    asked = len(net.log)
    capsys.readouterr()
    assert bring(entry) == place and len(net.log) == asked
    assert capsys.readouterr().err.startswith(f'{name} is already there: ')
    from imgexp.folders import from_folders
    table = from_folders(place)
    assert table.counts().sum(0).tolist() == [sum(tree(place).get(s, {}).values()) for s in ('train', 'valid', 'test')]

def test_the_right_image_in_the_right_place(net):
    assert contents(bring(small(net, 'food-101')))['test/sushi/5.jpg'] == b'sushi/5'
    assert contents(bring(small(net, 'cub-birds-200')))['train/002.Laysan_Albatross/L_1.jpg'] == b'002.Laysan_Albatross/L_1.jpg'
    place = bring(small(net, 'stanford-cars'))
    assert (place/'train/Ram C-V Cargo Van Minivan 2012/00001.jpg').read_bytes() == b'tr1'
    assert (place/'test/AM General Hummer SUV 2000/00001.jpg').read_bytes() == b'te1'
    assert contents(bring(small(net, 'tiny-imagenet')))['valid/n02/val_1.JPEG'] == b'v1'

def test_pixels_survive(net):
    from PIL import Image
    place = bring(small(net, 'fashion-mnist'))
    pixels = np.arange(4*784, dtype=np.uint64).astype(np.uint8).reshape(4, 28, 28)
    assert (np.asarray(Image.open(place/'train/Ankle boot/00003.png')) == pixels[3]).all()
    files = cifar10()
    with tarfile.open(fileobj=io.BytesIO(files['cifar-10-binary.tar.gz'])) as t: raw = t.extractfile('cifar-10-batches-bin/data_batch_2.bin').read()
    place = bring(small(net, 'cifar10', files))
    image = np.asarray(Image.open(place/'train/automobile/data_batch_2-00001.png'))
    assert (image.transpose(2, 0, 1).ravel() == np.frombuffer(raw, np.uint8)[3073 + 1:3073*2]).all()

def test_parquet(net, data):
    "mini-imagenet: files and sha-256 as the hub lists them"
    pa, parquet = pytest.importorskip('pyarrow', reason='pyarrow is not installed: mini-imagenet cannot be read'), pytest.importorskip('pyarrow.parquet')
    kind = pa.schema([('image', pa.struct([('bytes', pa.binary()), ('path', pa.string())])), ('label', pa.int64())], {
        'huggingface': json.dumps({'info': {'features': {'label': {'names': ['n01532829', 'n01558993'], '_type': 'ClassLabel'}}}})})
    rows = []
    for name, n in (('train-00000-of-00002', 4), ('train-00001-of-00002', 2), ('validation-00000-of-00001', 2), ('test-00000-of-00001', 2)):
        f = io.BytesIO()
        parquet.write_table(pa.table({'image': [{'bytes': b'\xff\xd8%d' % i, 'path': 'x'} for i in range(n)], 'label': [i % 2 for i in range(n)]}, kind), f)
        net.serve(f'{name}.parquet', f.getvalue())
        rows.append({'type': 'file', 'path': f'data/{name}.parquet', 'size': len(f.getvalue()), 'lfs': {'oid': hashlib.sha256(f.getvalue()).hexdigest()}})
    net.serve('listing.json', json.dumps(rows).encode())
    place = fetch('mini-imagenet', base_url=net.url, **FAST)
    assert tree(place) == {s: {'n01532829': n, 'n01558993': n} for s, n in (('train', 3), ('valid', 1), ('test', 1))}
    assert (place/'train/n01558993/train-00000-of-00002-00003.jpg').read_bytes() == b'\xff\xd83'

def test_no_pyarrow(net, monkeypatch):
    "Said before gigabytes are fetched"
    monkeypatch.setattr(retrieval, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match='pip install pyarrow'): fetch('mini-imagenet', base_url=net.url)
    assert not net.log

# ---- ImageNet ----

IDS = ['n01440764', 'n01443537', 'n02099601', 'n02012849']
def synset(c, n=3): return pack({f'{c}_{i}.JPEG': f'{c}{i}'.encode() for i in range(n)})

@pytest.fixture
def index(monkeypatch):
    names = dict(zip(IDS, ('tench', 'goldfish', 'golden_retriever', 'crane')))
    monkeypatch.setattr(retrieval, 'class_index', lambda *a, **kw: names)

def test_classes_by_id_and_name(net, data, index):
    for c in IDS: net.serve(f'{c}.tar', synset(c))
    place = fetch('imagenet', classes='n01440764, goldfish,Golden retriever', base_url=net.url, **FAST)
    assert tree(place) == {'train': dict.fromkeys(IDS[:3], 3)}
    assert (place/'train/n02099601/n02099601_1.JPEG').read_bytes() == b'n026099601'.replace(b'6', b'', 1) + b'1'
    assert fetch('imagenet', classes='tench', base_url=net.url) == place and len(net.log) == 3
    fetch('imagenet', classes='tench,crane', base_url=net.url, **FAST)  # one more
    assert set(tree(place)['train']) == set(IDS) and len(net.log) == 4

def test_several_at_once(net, index):
    "Three archives that each wait for the others: one after the other would never end"
    together = threading.Barrier(3, timeout=5)
    def waits(h, body, asked): together.wait(); answer(h, body, asked)
    for c in IDS[:3]: net.serve(f'{c}.tar', synset(c), waits)
    fetch('imagenet', classes=','.join(IDS[:3]), base_url=net.url, **FAST)
    assert not together.broken

def test_classes_by_path(net, data, tmp_path, index):
    "Archives of classes that the user has are read, and left alone"
    for c in IDS[:2]: (tmp_path/f'{c}.tar').write_bytes(synset(c))
    archives = [tmp_path/f'{c}.tar' for c in IDS[:2]]
    assert tree(fetch('imagenet', classes='tench,goldfish', archives=archives, base_url=net.url)) == {'train': dict.fromkeys(IDS[:2], 3)}
    assert all(a.exists() for a in archives) and not net.log

def test_one_class_missing(net, data, index):
    "What came stays, what is missing is said, and the same command brings the rest"
    for c in IDS[:2]: net.serve(f'{c}.tar', synset(c))
    with pytest.raises(FetchError, match=r'n02099601.tar cannot be fetched: HTTP 404'):
        fetch('imagenet', classes=','.join(IDS[:3]), base_url=net.url, jobs=1, **FAST)
    assert where('imagenet') is None and tree(data/'imagenet') == {'train': dict.fromkeys(IDS[:2], 3)}
    net.serve('n02099601.tar', synset('n02099601'))
    fetch('imagenet', classes=','.join(IDS[:3]), base_url=net.url, **FAST)
    assert len(net.asked('n01440764.tar')) == 1 and where('imagenet')

def test_half_unpacked_class(net, data, index, monkeypatch):
    "Stopped within a class: it is not shown, and it is finished, not started over"
    net.serve('n01440764.tar', synset('n01440764', 6))
    real, done = download_module._write_file, []
    def dies(*a):
        if len(done) == 4: raise KeyboardInterrupt
        done.append(a)
        return real(*a)
    monkeypatch.setattr(download_module, '_write_file', dies)
    with pytest.raises(KeyboardInterrupt): fetch('imagenet', classes='tench', base_url=net.url, **FAST)
    assert not (data/'imagenet/train').exists() and where('imagenet') is None
    half = {p.name: p.stat().st_ino for p in (data/'imagenet/.unpacked/n01440764').glob('*.JPEG')}
    assert len(half) == 4
    monkeypatch.setattr(download_module, '_write_file', real)
    place = fetch('imagenet', classes='tench', base_url=net.url, **FAST)
    assert len(net.log) == 1 and tree(place) == {'train': {'n01440764': 6}}
    assert all((place/'train/n01440764'/n).stat().st_ino == i for n, i in half.items())

def test_damaged_class(net, data, index):
    "No checksum is published: a short archive is found by its end mark, removed, and fetched again next time"
    body = synset('n01440764')
    net.serve('n01440764.tar', body, claims(1024, 1024))
    with pytest.raises(BadArchive, match='its end marker is missing.*the same command fetches it again'):
        fetch('imagenet', classes='tench', base_url=net.url, **FAST)
    assert tree(fetch('imagenet', classes='tench', base_url=net.url, **FAST)) == {'train': {'n01440764': 3}}

def official_imagenet(tmp_path):
    "The three archives of ILSVRC2012, and the entry that takes them for the published ones"
    ids = IDS[:2]
    synsets = np.array([(i + 1, c, c, '', 0) for i, c in enumerate(ids)], [(n, object) for n in ('ILSVRC2012_ID', 'WNID', 'words', 'gloss', 'num_children')])
    files = {'ILSVRC2012_img_train.tar': pack({f'{c}.tar': synset(c) for c in ids}),
             'ILSVRC2012_img_val.tar': pack({f'ILSVRC2012_val_{i + 1:08d}.JPEG': b'v%d' % i for i in range(4)}),
             'ILSVRC2012_devkit_t12.tar.gz': pack({'ILSVRC2012_devkit_t12/data/meta.mat': mat(synsets=synsets),
                                                   'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt': b'2\n1\n1\n2\n'}, 'tgz')}
    for n, b in files.items(): (tmp_path/n).write_bytes(b)
    entry = info('imagenet')
    same = tuple(replace(r, size=len(files[r.name]), checksum='md5:' + hashlib.md5(files[r.name]).hexdigest()) for r in entry.files())
    return replace(entry, sizes={'': same}), [tmp_path/n for n in files]

def test_official_imagenet(tmp_path, index):
    entry, archives = official_imagenet(tmp_path)
    place = fetch(entry, archives=archives)
    assert tree(place) == {'train': dict.fromkeys(IDS[:2], 3), 'valid': dict.fromkeys(IDS[:2], 2)}
    assert (place/'valid/n01443537/ILSVRC2012_val_00000001.JPEG').read_bytes() == b'v0'
    assert all(a.exists() for a in archives)
    assert fetch(entry, archives=archives) == place

def test_official_imagenet_of_one_class(tmp_path, index):
    entry, archives = official_imagenet(tmp_path)
    place = fetch(entry, archives=archives[:1], classes='goldfish')
    assert tree(place) == {'train': {'n01443537': 3}}
    assert tree(fetch(entry, archives=archives, classes='goldfish')) == {'train': {'n01443537': 3}, 'valid': {'n01443537': 2}}
    with pytest.raises(InputError, match='does not contain class n02099601'): fetch(entry, archives=archives[:1], classes='n02099601')

def test_imagenet_wrong_use(tmp_path, index):
    entry, archives = official_imagenet(tmp_path)
    with pytest.raises(InputError, match='choose classes'): fetch('imagenet')
    with pytest.raises(InputError, match='ILSVRC2012_devkit_t12.tar.gz: pass that archive too'): fetch(entry, archives=archives[1:2])
    with pytest.raises(FetchError, match='is not the published file'): fetch('imagenet', archives=archives[:1])
    with pytest.raises(InputError, match='no such file'): fetch('imagenet', archives=[tmp_path/'no.tar'])
    with pytest.raises(InputError, match="unknown archive of imagenet 'mine.tar'"):
        (tmp_path/'mine.tar').touch(); fetch('imagenet', archives=[tmp_path/'mine.tar'])

def test_class_names_of_imagenet():
    "The real class index: 1,000 classes, two pairs of the same name"
    path = META/'imagenet/imagenet_class_index.json'
    if not path.is_file(): pytest.skip('the class index of ImageNet is not beside this checkout (../shared/data/meta/imagenet)')
    index = dict(json.loads(path.read_text()).values())
    assert len(index) == 1000 and download_module.mismatch(path, retrieval._INDEX) == ''
    assert retrieval._imagenet_ids(['golden retriever', 'tench'], lambda: index) == ['n02099601', 'n01440764']
    for name in ('crane', 'maillot'):
        with pytest.raises(InputError, match='is 2 classes of ImageNet'): retrieval._imagenet_ids([name], lambda: index)

def test_class_index_is_fetched(net, data, project):
    "It is verified, too."
    net.serve('imagenet_class_index.json', b'{"0": ["n01440764", "tench"]}')
    with pytest.raises(FetchError, match='35,363 are published'): fetch('imagenet', classes='tench', base_url=net.url, **FAST)

# ---- a fetch as a whole ----

def test_real_devkit_of_cars(tmp_path):
    "The real .mat files: 8,144 training images in 196 classes"
    kit = META/'stanford-cars/devkit'
    if not kit.is_dir(): pytest.skip('the devkit of Stanford Cars is not beside this checkout (../shared/data/meta/stanford-cars)')
    from scipy.io import loadmat
    test = loadmat(kit/'cars_test_annos.mat', squeeze_me=True)['annotations']  # the public one has no classes
    (tmp_path/'labels.mat').write_bytes(mat(annotations=annotations([(str(a['fname']), i % 196 + 1) for i, a in enumerate(test)])))
    for folder in ('cars_train', 'cars_test'): (tmp_path/folder).mkdir()
    shutil.copytree(kit, tmp_path/'devkit')
    classes, items = LAYOUTS['cars'](tmp_path, {'cars_test_annos_withlabels.mat': tmp_path/'labels.mat'})
    rows = list(items)
    assert len(classes) == len(set(classes)) == 196 == len({c for _, c, _, _ in rows}) and not any('/' in c for c in classes)
    assert [sum(s == split for s, *_ in rows) for split in ('train', 'valid', 'test')] == list(info('stanford-cars').splits)
    assert sum(c == 'Ram C-V Cargo Van Minivan 2012' and s == 'train' for s, c, *_ in rows) == 41
    assert rows[0][1:] == ('Audi TTS Coupe 2012', '00001.jpg', tmp_path/'cars_train/00001.jpg')

def test_some_classes(net):
    "--classes of an archive that holds them all; a wrong name costs nothing that was fetched"
    entry = small(net, 'food-101')
    with pytest.raises(InputError, match="unknown class 'suhsi': did you mean 'sushi'?"): bring(entry, classes='suhsi')
    assert tree(bring(entry, classes='sushi')) == {'train': {'sushi': 1}, 'test': {'sushi': 1}}
    assert len(net.log) == 1
    assert set(tree(bring(entry))['train']) == {'pizza', 'sushi'}  # the rest later

def test_keep(net, data):
    entry = small(net, 'food-101')
    bring(entry, keep=True)
    assert os.listdir(data/'downloads/food-101') == ['food-101.tar.gz']
    shutil.rmtree(data/'food-101')
    bring(entry)
    assert len(net.log) == 1 and not (data/'downloads').exists()

def test_by_hand(net, data):
    "As the message says: the file is put in place, the same command goes on"
    entry = small(net, 'food-101')
    body = net.files.pop('/food-101.tar.gz')
    with pytest.raises(FetchError) as e: bring(entry)
    folder = re.search(r'put food-101.tar.gz into (\S+) and', str(e.value))[1]
    Path(folder, 'food-101.tar.gz').write_bytes(body)
    assert where('food-101') is None
    assert tree(bring(entry)) == OFFICIAL['food-101'][1]

def test_killed_while_images_move(net, data, monkeypatch):
    entry, real, moved = small(net, 'cub-birds-200'), os.replace, []
    def dies(a, b):
        if 'images' in Path(a).parts:
            if len(moved) == 2: raise KeyboardInterrupt
            moved.append(b)
        return real(a, b)
    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt): bring(entry)
    monkeypatch.setattr(os, 'replace', real)
    monkeypatch.setattr(retrieval, 'unpack', None)  # that is done
    assert where('cub-birds-200') is None
    assert tree(bring(entry)) == OFFICIAL['cub-birds-200'][1] and len(net.log) == 1

def test_not_the_official_layout(net):
    files = {'food-101.tar.gz': pack({'pictures/1.jpg': b'x'}, 'tgz')}
    with pytest.raises(BadArchive, match='contains no meta'): bring(small(net, 'food-101', files))

def test_listed_but_missing(net):
    files = {'food-101.tar.gz': pack({'food-101/images/a/1.jpg': b'x', 'food-101/meta/train.txt': b'a/1\na/2\n', 'food-101/meta/test.txt': b''}, 'tgz')}
    with pytest.raises(BadArchive, match=r'2.jpg \(class a, train\) is listed but not in the archive'): bring(small(net, 'food-101', files))

def test_space_for_all_of_it(net, monkeypatch):
    entry = small(net, 'food-101')
    usage = shutil.disk_usage('/')._replace(free=entry.files()[0].size + 10)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage)
    with pytest.raises(FetchError, match='free up space'): bring(entry)
    assert not net.log

def test_counts_are_compared(net, capsys):
    bring(small(net, 'food-101'))
    assert 'food-101: train has 3 images, but 75,750 are published' in capsys.readouterr().err

def test_two_processes(net, data, capsys):
    "The second waits for the first and finds all of it there"
    entry = small(net, 'food-101')
    net.plan['/food-101.tar.gz'] = [lambda h, b, a: (time.sleep(0.2), answer(h, b, a))]
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(2) as pool: places = [f.result() for f in [pool.submit(bring, entry) for _ in range(2)]]
    assert len(set(places)) == 1 and len(net.log) == 1
    assert 'another process is fetching it; waiting' in capsys.readouterr().err

def test_dest_and_sizes(net, data, tmp_path):
    body = imagenette()['imagenette2.tgz']
    entry = replace(info('imagenette'), sizes={'320': (net.serve('imagenette2-320.tgz', body),)})
    place = bring(entry, size='320', dest=tmp_path/'elsewhere')
    assert place == tmp_path/'elsewhere/imagenette-320' == where('imagenette-320', dest=tmp_path/'elsewhere') and where('imagenette-320') is None

def test_names():
    with pytest.raises(InputError, match="did you mean 'imagewoof'"): fetch('imagewof')
    with pytest.raises(InputError, match='choose from full, 320, 160'): fetch('imagenette', size='64')
    assert fetch('shapes') is None
    assert set(ENTRIES) == {'imagenet', 'inaturalist12k', 'mini-imagenet', 'imagenette', 'imagewoof', 'cub-birds-200', 'food-101', 'stanford-cars',
                            'stanford-dogs', 'cifar10', 'fashion-mnist', 'tiny-imagenet', 'digits', 'shapes'} == set(catalog().index)

@pytest.mark.parametrize('name', ENTRIES)
def test_info(name):
    entry, shown = info(name), repr(info(name))
    json.dumps(entry.facts())
    for text in (entry.license, entry.citation, entry.page, *(r.checksum or 'no checksum published' for s in entry.sizes for r in entry.files(s))):
        assert text in shown
    assert '<table>' in entry._repr_html_()

def test_light():
    "The catalog needs neither torch nor pandas, nor a network library before it is used"
    code = "import sys, imgexp.catalog; print([m for m in ('torch', 'tensorflow', 'pandas', 'scipy', 'requests', 'PIL', 'pyarrow', 'imgexp.data') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
