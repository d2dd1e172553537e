"Zoos: no row is lost or trained twice, whatever dies; states come back bit for bit; a class that cannot be had fails its rows only."
import csv, io, json, os, random, signal, tarfile, threading, time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from launch import gone, until
from PIL import Image
from imgexp import retrieval
from imgexp.errors import InputError, RunBusy, RunFailed
from imgexp.runs import Run
from imgexp.zoo_dataset import ZooDataset
from imgexp.zoo_export import export_zoo, zoo_states
from imgexp.zoo_images import zoo_classes
from imgexp.zoo_params import ZooParams
from imgexp.zoo_runs import run_zoo
from imgexp.zoo_table import find_zoo, plan_zoo

TINY = ['--data', 'digits', '--arch', 'small_cnn', '--size', '28', '--track', 'off']
QUIET = dict(quiet=True, say=lambda text: None)
KILLS = int(os.environ.get('IMGEXP_KILLS', 3))

def rows(path): return list(csv.DictReader(path.open()))
def plan(path, **values):
    p = ZooParams.check(dict(data='digits', arch='small_cnn', size=28, track='off') | values)
    return plan_zoo(path, p, zoo_classes(p))
def weights(zoo): return [{k: v for k, v in torch.load(f, weights_only=True).items()} for f in sorted((zoo/'states').iterdir())]
def same(a, b): return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b))

def test_commands(project, launcher):
    "Plan, run with two workers, extend, export: as a user types them."
    def imgexp(*args): 
        job = launcher.imgexp('zoo', *args, root=project, cwd=project)
        assert job.wait() == 0, job.err
        return job
    job = imgexp('plan', *TINY, '--models', '3', '--max-epoch', '2', '--seed', '4')
    assert 'log-uniform' in job.err and '3 rows, 6 epochs' in job.err and 'at one row at a time' in job.err
    drawn = (project/'sweep.csv').read_text()
    job = imgexp('run', '--jobs', '2')
    assert '3 done of 3 rows' in job.err
    assert [r['status'] for r in rows(project/'sweep.csv')] == ['done']*3
    assert [[r[c] for c in ('row', 'classes', 'seed')] for r in rows(project/'sweep.csv')] == [[r[c] for c in ('row', 'classes', 'seed')] for r in csv.DictReader(drawn.splitlines())]
    assert 'row 0' not in imgexp('run').err
    imgexp('extend', '--models', '4')
    runs = [r['run'] for r in rows(project/'sweep.csv')][:3]
    imgexp('run', 'sweep.csv')
    assert [r['run'] for r in rows(project/'sweep.csv')][:3] == runs and len([*(project/'runs').glob('2*')]) == 4
    (project/'sweep.csv').write_text(drawn + rows_text(project))  # the right half can be lost
    assert json.loads(imgexp('status', '--json').out)[0]['status'] == 'done'
    imgexp('export', 'sweep.csv', 'out')
    zoo = ZooDataset(project/'out')
    assert zoo.damage() == [] and {*zoo.metrics.row} == {0, 1, 2, 3}

def rows_text(project):
    "The line of row 3, without what is derived"
    return [line for line in (project/'sweep.csv').read_text().splitlines() if line.startswith('3,')][0].partition(',done')[0] + ',,,,,,\n'

def test_jobs_do_not_change_the_weights_nor_do_kills(project, launcher):
    "One worker, two workers, and a coordinator whose workers and itself are killed again and again."
    zoos = {}
    for name, jobs in (('one', '1'), ('two', '2'), ('killed', '2')):
        folder = project/name
        folder.mkdir()
        plan(folder/'sweep.csv', models=2*KILLS, max_epoch='3-5' if KILLS <= 3 else '20-24', seed=7)
        def start(): return launcher.imgexp('zoo', 'run', '--jobs', jobs, root=folder, cwd=folder, IMGEXP_CHECK='1')
        job, rng, kills = start(), random.Random(0), 0
        for k in range(KILLS if name == 'killed' else 0):
            time.sleep(rng.uniform(3.5, 6))
            if job.ended(): break
            kills += 1
            import psutil
            children = psutil.Process(job.pid).children(recursive=True)
            if k % 2 and children: rng.choice(children).kill()
            else:
                job.send(signal.SIGKILL)
                job.wait()
                until(lambda: all(gone(c.pid) for c in children), 'the workers to notice')
                job = start()
        assert job.wait() == 0, job.err
        assert kills or name != 'killed', 'it ended too soon'
        assert [r['status'] for r in rows(folder/'sweep.csv')] == ['done']*2*KILLS
        assert len([*(folder/'runs').glob('2*-03_train-*')]) == 2*KILLS, 'no row is trained twice'
        print(name, kills, 'kills')
        os.environ['IMGEXP_ROOT'] = str(folder)
        zoos[name] = weights(export_zoo(find_zoo(folder/'sweep.csv'), folder/'out', 'pth'))
    assert same(zoos['one'], zoos['two']) and same(zoos['one'], zoos['killed'])

def test_a_changed_row_is_a_new_run(project):
    "The old run stays; the others are not trained again; replaced images count as a change."
    zoo = plan(project/'sweep.csv', models=2, max_epoch='1')
    before = run_zoo(zoo, **QUIET)
    text = zoo.path.read_text().splitlines()
    cells = next(csv.reader([text[1]]))
    cells[5] = '0.0123'  # its learning rate
    out = io.StringIO()
    csv.writer(out, lineterminator='').writerow(cells)
    zoo.path.write_text('\n'.join([text[0], out.getvalue(), text[2]]) + '\n')
    messages = []
    zoo = find_zoo(zoo.path)
    after = run_zoo(zoo, quiet=True, say=messages.append)
    assert any('row 0 or its images have changed' in m for m in messages)
    assert after[0]['run'] != before[0]['run'] and after[1] == before[1] and (project/'runs'/before[0]['run']).is_dir()
    assert Run(project/'runs'/after[0]['run']).params['lr'] == 0.0123

def image_folder(folder, classes, n=20, size=28, seed=0):
    rng = np.random.default_rng(seed)
    for c in classes:
        (folder/c).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(folder/c/f'{i:03d}.png')

def test_replaced_images_are_noticed(project):
    image_folder(project/'photos', 'abcd')
    zoo = plan(project/'sweep.csv', data=str(project/'photos'), models=4, max_epoch='1', classes_per_model=3)
    before = run_zoo(zoo, **QUIET)
    image_folder(project/'photos', 'a', n=1, seed=1)
    after = run_zoo(find_zoo(zoo.path), **QUIET)
    changed = [k for k in before if before[k]['run'] != after[k]['run']]
    assert changed == [k for k in before if 'a' in zoo.inputs[k]['classes'].split(',')] and len(changed) == 3

def test_another_split_is_noticed(project):
    "A table that moves an image of a class to another split makes new rows of that class."
    image_folder(project/'photos', 'abc', n=8)
    def labels(moved): (project/'photos/labels.csv').write_text('file,label,split\n' + ''.join(
        f"{c}/{i:03d}.png,{c},{'test' if i == 0 or (c, i) == moved else 'valid' if i == 1 else 'train'}\n" for c in 'abc' for i in range(8)))
    labels(None)
    zoo = plan(project/'sweep.csv', data=str(project/'photos'), models=3, max_epoch='1', classes_per_model=2, resplit='')
    before = run_zoo(zoo, **QUIET)
    labels(('a', 7))
    after = run_zoo(find_zoo(zoo.path), **QUIET)
    assert [k for k in before if before[k]['run'] != after[k]['run']] == [k for k in before if 'a' in zoo.inputs[k]['classes'].split(',')]

def test_the_same_split_in_every_row(project):
    "An image is a test image in every row that has its class."
    from imgexp.trained import run_data
    zoo = plan(project/'sweep.csv', models=4, max_epoch='1')
    split = {}
    for state in run_zoo(zoo, **QUIET).values():
        table = run_data(Run(project/'runs'/state['run']))
        for item, label, s in zip(table.items, table.labels, table.splits):
            assert split.setdefault((table.classes[label], item), s) == s

def test_diverged_rows_stay(project):
    zoo = plan(project/'sweep.csv', models=2, max_epoch='3', optimizers='sgd', learning_rate_sgd='90-100', weight_decay_range='9-10')
    states = run_zoo(zoo, **QUIET)
    assert {s['status'] for s in states.values()} == {'failed'} and all('not finite' in s['error'] for s in states.values())
    assert run_zoo(find_zoo(zoo.path), **QUIET) == states, 'failed rows wait for retry'
    zoo_data = ZooDataset(export_zoo(zoo, project/'out'))
    assert zoo_data.metrics.diverged.all() and {*zoo_data.metrics.state} == {'init'}
    assert len(ZooDataset(project/'out', diverged=False)) == 0
    assert [s['status'] for s in run_zoo(find_zoo(zoo.path), retry=True, **QUIET).values()] == ['failed']*2

# ---- classes that are fetched

IDS = [f'n0000000{k}' for k in range(5)]

@pytest.fixture
def web(project, monkeypatch):
    "A server of one archive for each class, and what was asked of it"
    folder, asked = project/'web', []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for c in IDS:
        with tarfile.open(folder/f'{c}.tar', 'w') as tar:
            for i in range(20):
                out = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8)).save(out, 'JPEG')
                info = tarfile.TarInfo(f'{c}_{i}.JPEG')
                info.size = len(out.getvalue())
                tar.addfile(info, io.BytesIO(out.getvalue()))
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path[1:])
            super().do_GET()
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('IMGEXP_DATA', str(project/'data'))
    monkeypatch.setattr(retrieval, 'class_index', lambda *args, **kw: {c: c for c in IDS})
    yield folder, asked, dict(base_url=f'http://127.0.0.1:{server.server_port}', tries=1, pause=0)
    server.shutdown()
    server.server_close()

@pytest.mark.parametrize('drop', [False, True])
def test_only_needed_classes_are_fetched_each_once(project, web, drop):
    folder, asked, net = web
    zoo = plan(project/'sweep.csv', data='imagenet', classes=','.join(IDS[:4]), models=2, max_epoch='1', drop_images=drop)
    states = run_zoo(zoo, **QUIET, **net)
    needed = {c for r in zoo.inputs.values() for c in r['classes'].split(',')}
    assert [s['error'] for s in states.values()] == ['', ''] and sorted(asked) == sorted(f'{c}.tar' for c in needed)
    if drop:
        assert not [*(project/'sweep/images/full').rglob('*.JPEG')]
        images = [*(project/'sweep/images/28px').rglob('*.png')]
        assert len(images) == 20*len(needed) and min(Image.open(images[0]).size) == 28
    else: assert len([*(project/'data/imagenet/train').rglob('*.JPEG')]) == 20*len(needed)
    zoo.extend(4)
    run_zoo(find_zoo(zoo.path), **QUIET, **net)
    assert len(asked) == len({*asked}) == 4

def test_a_class_that_cannot_be_had_fails_its_rows_only(project, web):
    folder, asked, net = web
    missing = (folder/f'{IDS[0]}.tar').rename(project/'away')
    zoo = plan(project/'sweep.csv', data='imagenet', classes=','.join(IDS[:4]), models=4, max_epoch='1')
    states = run_zoo(zoo, **QUIET, **net)
    for k, s in states.items():
        without = IDS[0] in zoo.inputs[k]['classes']
        assert s['status'] == ('failed' if without else 'done') and (not without or 'HTTP 404' in s['error'])
    missing.rename(folder/f'{IDS[0]}.tar')
    again = run_zoo(find_zoo(zoo.path), retry=True, **QUIET, **net)
    assert [s['status'] for s in again.values()] == ['done']*4

# ---- bad input

def test_two_coordinators_and_two_machines(project, monkeypatch):
    "A second coordinator of this machine is refused; one of another machine leaves alone what is being trained."
    import imgexp.zoo_table as module
    zoo = plan(project/'sweep.csv', models=2, max_epoch='1')
    with zoo.locked():
        with pytest.raises(RunBusy, match='is being trained by another process'): run_zoo(zoo, **QUIET)
        monkeypatch.setattr(module.socket, 'gethostname', lambda: 'elsewhere')
        assert [s['status'] for s in run_zoo(zoo, **QUIET).values()] == ['done']*2

def test_a_row_that_another_machine_trains_is_left_alone(project):
    from imgexp.zoo_rows import train_row
    zoo = plan(project/'sweep.csv', models=1, max_epoch='1')
    run_zoo(zoo, **QUIET)
    run = zoo.run_of(0, zoo.row_id(0, zoo.class_records()))
    (run.dir/'metrics.json').unlink()
    status = json.loads((run.dir/'status.json').read_text())
    (run.dir/'status.json').write_text(json.dumps(status | {'state': 'running', 'machine': 'another', 'host': 'other'}))
    assert train_row(str(zoo.path), '', 0) == {'busy': True}
    assert zoo.states()[0]['status'] == 'running'

def test_a_full_disk(disk, project, monkeypatch):
    monkeypatch.setenv('IMGEXP_ROOT', str(disk.path))
    zoo = plan(disk.path/'sweep.csv', models=3, max_epoch='1')
    import imgexp.zoo_runs as module
    with monkeypatch.context() as m:
        m.setattr(module, 'state_bytes', lambda zoo: 10**9)
        with pytest.raises(InputError, match=r'3 rows need 21.0 GB in .*runs, and .* are free: free some disk space'): run_zoo(zoo, **QUIET)
    with monkeypatch.context() as m:
        m.setattr(module, 'check_room', lambda *args: disk.fill(60_000))
        with pytest.raises(RunFailed, match='No space left on device.*zoo retry'): run_zoo(zoo, **QUIET)
    (disk.path/'filler').unlink()
    states = run_zoo(find_zoo(zoo.path), retry=True, **QUIET)
    states = run_zoo(find_zoo(zoo.path), **QUIET)
    assert [s['status'] for s in states.values()] == ['done']*3

@pytest.mark.parametrize('change, message', [
    (lambda t: t.replace('optimizer', 'optimiser', 1), "no column 'optimizer'"),
    (lambda t: t[:-30], 'line 3: .* columns, the first line has 15'),
    (lambda t: t + t.splitlines()[1] + '\n', 'line 4: row 0 is there twice'),
    (lambda t: t.replace(',adam,', ',adan,').replace(',sgd,', ',adan,'), "line 2: optimizer='adan' is not known: did you mean 'adam"),
], ids=['column', 'torn', 'twice', 'optimizer'])
def test_damaged_tables(project, launcher, change, message):
    zoo = plan(project/'sweep.csv', models=2, max_epoch='1')
    text = zoo.path.read_text()
    zoo.path.write_text(change(text))
    job = launcher.imgexp('zoo', 'run', root=project, cwd=project)
    assert job.wait() == 2 and len(job.err.strip().splitlines()) == 1
    import re
    assert re.search(message, job.err) and 'sweep.csv' in job.err

@pytest.mark.parametrize('args, message', [
    (['--classes', '0,1'], 'classes_per_model=3: 2 classes to choose from'),
    (['--models', '121'], 'has at most 120 rows'),
    (['--classes', '0,1,x'], "unknown class 'x'"),
    (['--optimizers', 'adan'], "unknown optimizer 'adan'"),
    (['--config', 'none.yaml'], 'none.yaml cannot be read'),
    (['--max-epoch', '8-4'], 'max_epoch='),
    (['--resplit', '70/20/20'], 'resplit='), (['--max-epoch', '20000'], 'max_epoch='), (['--learning-rate-sgd', '500'], 'learning_rate=500'),
    (['--out', 'a-file/sweep.csv'], 'a-file cannot be written'),
], ids=lambda v: v[0] if isinstance(v, list) else '')
def test_bad_plans(project, launcher, args, message):
    (project/'a-file').touch()
    job = launcher.imgexp('zoo', 'plan', *TINY, *args, root=project, cwd=project)
    assert job.wait() in (1, 2) and message in job.err and len(job.err.strip().splitlines()) == 1
    assert not (project/'sweep.csv').exists()

def test_exports_of_unfinished_and_damaged_zoos(project):
    zoo = plan(project/'sweep.csv', models=2, max_epoch='1')
    with pytest.raises(InputError, match='is not finished: 2 rows are waiting'): export_zoo(zoo, project/'out')
    states = run_zoo(zoo, **QUIET)
    path = next((project/'runs'/states[1]['run']/'checkpoints').glob('weights-0001.safetensors'))
    whole, scores = path.read_bytes(), path.parent.parent/'states.csv'
    table = scores.read_text()
    def refused(message):
        with pytest.raises(InputError, match=message): export_zoo(zoo, project/'out')
    flipped = bytearray(whole)
    flipped[-1] ^= 0x40
    path.write_bytes(flipped)
    refused('row 1 is damaged .weights-0001.safetensors has changed.*imgexp runs rm')
    path.unlink()
    refused('row 1 is damaged .epoch 1 is missing')
    path.write_bytes(whole)
    scores.write_text('\n'.join(table.splitlines()[:-1]) + '\n')
    refused('row 1 is damaged .epoch 1 is missing')
    scores.write_text(table)
    assert not (project/'out').exists()
    with pytest.raises(InputError, match='format='): export_zoo(zoo, project/'out', 'pkl')

def test_states_of_a_row(project):
    "Four names, as many files as there are different epochs, and no checkpoint is left."
    zoo = plan(project/'sweep.csv', models=1, max_epoch='4')
    state = run_zoo(zoo, **QUIET)[0]
    run = Run(project/'runs'/state['run'])
    found = zoo_states(zoo)
    assert ' '.join(m['state'] for _, m in found).split().count('best') == 1
    assert {f.name for f in (run.dir/'checkpoints').iterdir()} == {'index.json', *(f"weights-{m['epoch']:04d}.safetensors" for _, m in found)}
    assert not (run.dir/'figures').is_dir() or not [*(run.dir/'figures').iterdir()]
    with pytest.raises(InputError): __import__('imgexp.train').train.train(extend=run.name, epochs=1, track='off')

def test_retry_after_an_unknown_class_was_corrected(project, launcher):
    "A row with an unknown class fails alone, and `retry` neither hangs nor forgets it."
    zoo = plan(project/'sweep.csv', models=2, max_epoch='1')
    text, wanted = zoo.path.read_text(), zoo.inputs[0]['classes']
    zoo.path.write_text(text.replace(wanted, '0,2,cat', 1))
    def imgexp(*args):
        job = launcher.imgexp('zoo', *args, root=project, cwd=project)
        return job.wait(), job.out + job.err
    code, err = imgexp('run')
    assert code == 0 and 'no such class' in err and '1 done, 1 failed of 2 rows' in err
    assert '1 done, 1 failed of 2 rows' in imgexp('retry')[1]
    code, err = imgexp('run', '--rows', '0')
    assert code == 1, 'no row that was asked for is done'
    zoo.path.write_text(zoo.path.read_text().replace('0,2,cat', wanted))
    assert '2 done of 2 rows' in imgexp('run')[1]
    assert imgexp('export', 'sweep.csv', 'out')[0] == 0
    code, err = imgexp('run', 'out')
    assert code == 2 and 'is an exported zoo' in err and not (project/'out/sweep').exists()

def test_a_class_that_is_gone_fails_only_its_rows(project, tmp_path):
    folder = tmp_path/'im'
    for c in 'abcd':
        (folder/c).mkdir(parents=True)
        for k in range(14): Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 32, 3), np.uint8)).save(folder/c/f'{k}.png')
    zoo = plan(project/'sweep.csv', data=str(folder), models=4, max_epoch='1')
    assert {s['status'] for s in run_zoo(zoo, **QUIET).values()} == {'done'}
    (folder/'a').rename(tmp_path/'a')
    states = run_zoo(find_zoo(zoo.path), **QUIET)
    assert {zoo.inputs[k]['classes']: s['status'] for k, s in states.items()} == {r['classes']: 'failed' if 'a' in r['classes'] else 'done' for r in zoo.inputs.values()}

def test_what_a_config_says_is_exported(project):
    zoo = plan(project/'sweep.csv', models=1, max_epoch='1')
    (project/'other.yaml').write_text(zoo.path.with_suffix('.yaml').read_text().replace('momentum: 0.9', 'momentum: 0.5'))
    zoo.path.with_suffix('.yaml').unlink()
    zoo = find_zoo(zoo.path, str(project/'other.yaml'))
    run_zoo(zoo, config=str(project/'other.yaml'), **QUIET)
    assert ZooDataset(export_zoo(zoo, project/'out')).p.momentum == 0.5 and not (project/'.out.part').exists()

def test_a_signal_while_a_run_begins_does_not_fail_its_row(project, monkeypatch):
    zoo = plan(project/'sweep.csv', models=1, max_epoch='1')
    def terminated(run): raise KeyboardInterrupt('terminated')
    with monkeypatch.context() as m:
        m.setattr(Run, '_record_attempt', terminated)
        with pytest.raises(KeyboardInterrupt): run_zoo(zoo, **QUIET)
    assert Run(next((project/'runs').glob('2*-03_train-*'))).state == 'stopped'
    assert run_zoo(zoo, **QUIET)[0]['status'] == 'done'
