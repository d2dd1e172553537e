"Weights & Biases: an offline run holds everything, a failure harms nothing, no secret is written."
import json, struct, sys

import pandas as pd, pytest
from imgexp.start import find_run, start_run
from imgexp.tracker import track_mode

pytestmark = pytest.mark.usefixtures('project')
wandb = pytest.importorskip('wandb')
KEY = '0123456789abcdef'*2 + '01234567'  # of the form of a real one, known to nobody
RUN = "run('demo', dict(lr=0.1, track='offline'))"

@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    "wandb writes below this test's folder, says nothing, and knows no user."
    for name in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_BASE_URL', 'WANDB_DIR'): monkeypatch.delenv(name, raising=False)
    for name in ('WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR', 'WANDB_DATA_DIR'): monkeypatch.setenv(name, str(tmp_path/'wandb-own'))
    monkeypatch.setenv('NETRC', str(tmp_path/'no-netrc'))
    monkeypatch.setenv('HOME', str(tmp_path))

# -- reading what was written: a log in LevelDB's format, after a header of seven bytes, of protobuf records

BLOCK, HEADER = 32768, 7  # bytes; a record's own header: checksum 4, length 2, type 1
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

def records(path):
    "The records of a .wandb file."
    from wandb.proto.wandb_internal_pb2 import Record
    raw, at, parts, found = path.read_bytes(), HEADER, b'', []
    assert raw[:4] == b':W&B'
    while at + 7 <= len(raw):
        if BLOCK - at % BLOCK < 7:  # too little room in this block for a header
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack('<HB', raw[at + 4:at + 7])
        if kind == 0 or at + 7 + length > len(raw): break  # the rest is not written yet
        parts = (b'' if kind in (FULL, FIRST) else parts) + raw[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST): found.append(Record.FromString(parts))
    return found

def values(items):
    "Keys and values of a record; a value that is a dictionary comes in parts."
    out = {}
    for item in items:
        *folders, name = item.nested_key or [item.key]
        part = out
        for f in folders: part = part.setdefault(f, {})
        part[name] = json.loads(item.value_json)
    return out

def offline(run):
    "Everything in a run's offline directories, oldest first: config, history rows, summary, exit code, files below."
    folders = sorted((run.dir/'wandb').glob('offline-run-*'))
    out = {'folders': folders, 'config': {}, 'history': [], 'summary': {}, 'exit': []}
    for folder in folders:
        for r in records(next(folder.glob('run-*.wandb'))):
            kind = r.WhichOneof('record_type')
            if kind == 'run':
                out['id'] = r.run.run_id
                out['config'] |= values(r.run.config.update)
            if kind == 'history': out['history'].append(values(r.history.item))
            if kind == 'summary': out['summary'] |= values(r.summary.update)
            if kind == 'exit': out['exit'].append(r.exit.exit_code)
    return out

def picture():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot([1, 2])
    plt.close(fig)
    return fig

METRICS = {'checkpoint': 'best', 'test': {'top1': {'value': 0.91, 'low': 0.88, 'high': 0.93, 'n': 341}, 'loss': 0.3}, 'seconds': 3.2}

def row(epoch): return dict(epoch=epoch, step=10*epoch, images=100*epoch, train_loss=2/epoch, valid_top1=0.1*epoch, note='x'*20_000)

def logged(run):
    for epoch in (1, 2, 3): run.log(row(epoch))
    run.figure('curves', picture())
    run.finish(METRICS)
    return run

# -- what an offline run holds

def test_an_offline_run_holds_everything(capfd):
    run = logged(start_run('demo', dict(lr=0.1, arch='tiny', track='offline')))
    out, err = capfd.readouterr()
    assert not out and not err, 'wandb talks'
    kept = offline(run)
    assert len(kept['folders']) == 1 and kept['exit'] == [0] and kept['id'] == run.name
    assert kept['config']['lr'] == 0.1 and kept['config']['arch'] == 'tiny'
    rows = [r for r in kept['history'] if 'epoch' in r]
    assert [{k: r.get(k) for k in row(1)} for r in rows] == [row(e) for e in (1, 2, 3)]
    table = pd.DataFrame(rows)
    for k in ('epoch', 'step', 'images', 'train_loss', 'valid_top1'): assert table[k].tolist() == run.history[k].tolist(), k
    for k, v in {'test/top1/value': 0.91, 'test/top1/n': 341, 'test/loss': 0.3, 'seconds': 3.2, 'checkpoint': 'best'}.items():
        assert kept['summary'][k] == v
    image = next(r['figures/curves'] for r in kept['history'] if 'figures/curves' in r)
    assert image['_type'] == 'image-file'
    assert (kept['folders'][0]/'files'/image['path']).read_bytes() == (run.dir/'figures/curves.png').read_bytes()

def test_the_reader_can_tell(tmp_path):
    "It joins what is split over blocks (the notes above are longer than half a block), and sees what is missing."
    run = logged(start_run('demo', dict(track='offline')))
    path = next(run.dir.glob('wandb/offline-run-*/*.wandb'))
    assert path.stat().st_size > BLOCK
    whole = len(records(path))
    path.write_bytes(path.read_bytes()[:BLOCK//2])
    assert 0 < len(records(path)) < whole

def test_a_training_holds_everything(launcher, project):
    args = '--data shapes --classes circle,square --size 8 --epochs 2 --workers 0 --track offline'.split()
    job = launcher.imgexp('train', *args, root=project)
    assert job.wait() == 0, job.err
    assert not job.err
    run = find_run('', project/'runs')
    kept = offline(run)
    table = pd.DataFrame([r for r in kept['history'] if 'epoch' in r])
    for k in run.history: assert table[k].tolist() == run.history[k].tolist(), k
    pictures = {k for r in kept['history'] for k in r if k.startswith('figures/')}
    assert pictures == {f'figures/{f.stem}' for f in (run.dir/'figures').glob('*.png')} and len(pictures) >= 3
    assert kept['summary']['test/top1/value'] == run.metrics['test']['top1']['value']
    assert kept['summary']['valid/top5/n'] == run.metrics['valid']['top5']['n']

def test_failed_and_continued():
    "A failed run says so; continued, it is the same run in W&B."
    run = start_run('demo', dict(track='offline'))
    run.log(row(1))
    run.fail(RuntimeError('out of memory'))
    kept = offline(run)
    assert kept['exit'] == [1] and len([r for r in kept['history'] if 'epoch' in r]) == 1
    again = start_run('demo', dict(track='offline'))
    again.log(row(2)); again.finish(METRICS)
    kept = offline(again)
    assert len(kept['folders']) == 2 and kept['exit'] == [1, 0] and kept['id'] == run.name
    assert [r['epoch'] for r in kept['history'] if 'epoch' in r] == [1, 2]

# -- failures

def said(capfd):
    err = capfd.readouterr().err
    return [l for l in err.splitlines() if 'tracking with Weights & Biases stopped' in l]

def whole(run): return run.state == 'done' and len(run.history) == 3 and (run.dir/'figures/curves.png').exists() and run.metrics == METRICS

def broken(*args, **kw): raise RuntimeError('the server burns\nand a second line')

@pytest.mark.parametrize('where', ['init', 'log', 'Image', 'finish', 'summary'])
def test_a_failure_is_said_once_and_harms_nothing(monkeypatch, capfd, where):
    class Fake:
        def log(self, row): broken() if where == 'log' else None
        def finish(self, exit_code): broken() if where == 'finish' else None
        @property
        def summary(self): return broken() if where == 'summary' else {}
    monkeypatch.setattr(wandb, 'init', lambda **kw: broken() if where == 'init' else Fake())
    monkeypatch.setattr(wandb, 'Image', broken if where == 'Image' else lambda path: path)
    run = logged(start_run('demo', dict(track='offline')))
    assert whole(run)
    line, = said(capfd)
    assert 'RuntimeError: the server burns' in line and 'the run continues' in line

def test_a_failure_without_a_message(monkeypatch, capfd):
    def init(**kw): raise KeyError
    monkeypatch.setattr(wandb, 'init', init)
    run = logged(start_run('demo', dict(track='offline')))
    assert whole(run) and len(said(capfd)) == 1

def test_without_wandb(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # import wandb raises ImportError
    assert whole(logged(start_run('demo', dict(track='offline'))))
    assert len(said(capfd)) == 1

def test_auto_without_wandb_says_nothing(monkeypatch, capfd):
    monkeypatch.delenv('PYTEST_CURRENT_TEST', raising=False); monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert track_mode('auto') == 'off'
    assert whole(logged(start_run('demo', dict(track='auto'))))
    assert not said(capfd)

def test_the_users_interrupt_is_no_failure_of_the_tracker(monkeypatch):
    def init(**kw): raise KeyboardInterrupt
    monkeypatch.setattr(wandb, 'init', init)
    with pytest.raises(KeyboardInterrupt): start_run('demo', dict(track='offline'))

# -- what is not written, and when nothing is

def test_no_secret_in_any_file(monkeypatch):
    monkeypatch.setenv('WANDB_API_KEY', KEY)
    run = logged(start_run('demo', dict(track='offline')))
    files = [f for f in run.dir.rglob('*') if f.is_file()]
    assert len(files) > 8
    for f in files:
        raw = f.read_bytes()
        for secret in (KEY, KEY[:12], KEY[-12:]): assert secret.encode() not in raw, f

def test_off_makes_no_directory(monkeypatch):
    monkeypatch.setattr(wandb, 'init', broken)
    for track in ('off', 'auto'):  # auto is off under tests
        run = logged(start_run('demo', dict(track=track, resume='never')))
        assert whole(run) and not (run.dir/'wandb').exists()

def test_auto(monkeypatch, tmp_path):
    "Off under tests; else what WANDB_MODE says; else online for those who have logged in, offline for others."
    assert track_mode('auto') == 'off'
    assert track_mode('offline') == 'offline' and track_mode('online') == 'online'
    def outside(**env):
        with monkeypatch.context() as m:
            m.delenv('PYTEST_CURRENT_TEST', raising=False); m.delenv('IN_TEST', raising=False)
            for k, v in env.items(): m.setenv(k, v)
            return track_mode('auto')
    assert outside(IN_TEST='1') == 'off'
    assert outside() == 'offline'
    assert outside(WANDB_API_KEY=KEY) == 'online'
    assert outside(WANDB_API_KEY=KEY, WANDB_MODE='offline') == 'offline'
    assert outside(WANDB_MODE='disabled') == 'off'
    saved = tmp_path/'netrc'
    saved.write_text(f'machine api.wandb.ai\n  login user\n  password {KEY}\n')
    saved.chmod(0o600)
    assert outside(NETRC=str(saved)) == 'online'
    (tmp_path/'.netrc').write_text(saved.read_text()); (tmp_path/'.netrc').chmod(0o600)
    assert outside() == 'offline'  # NETRC names another file
    monkeypatch.delenv('NETRC')
    assert outside() == 'online'
    assert outside(WANDB_BASE_URL='https://own.example.com:8080/x') == 'offline'
