"The store: nothing that was committed is ever lost, whatever dies; damage is found; what comes back is what went in."
import fcntl, json, os, threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch
from imgexp.errors import InputError, RunBusy, RunFailed
from imgexp.files import read_json, write_json
from imgexp.manifests import Origin
from imgexp.models import build_model
from imgexp.store import Store
from imgexp.tensor_files import TensorFile, from_torch, read_tensor_file

def state(seed, shared=3, own=2, n=2000):
    "Tensors of a snapshot: some that all have, some of its own."
    common, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    tensors = {f'shared.{k}': common.standard_normal(n) for k in range(shared)} | {f'own.{k}': rng.standard_normal(n) for k in range(own)}
    return {k: torch.from_numpy(v.astype(np.float32)) for k, v in tensors.items()}
def file_of(tensors): return TensorFile({k: from_torch(k, v) for k, v in tensors.items()}, {})
def add(store, name, seed): return store.add_tensors(name, file_of(state(seed)), Origin(), threads=1)
def whole(store, seeds):
    "Every snapshot is there, and every tensor is what was added."
    snapshots = store.snapshots()
    for name, s in snapshots.items():
        loaded = store.load(name)
        for k, v in state(seeds[name]).items(): assert torch.equal(loaded[k], v), (name, k)
    return set(snapshots)

def dying(action, k):
    "Whether a process that runs `action` reaches its end; it dies at its k-th change of the disk."
    pid = os.fork()
    if pid == 0:
        left = [k]
        def count(f):
            def g(*args, **kw):
                left[0] -= 1
                if left[0] == 0: os._exit(9)
                return f(*args, **kw)
            return g
        try:
            for name in ('replace', 'unlink', 'fsync', 'mkdir', 'open'): setattr(os, name, count(getattr(os, name)))
            action()
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    return code == 0

@pytest.mark.parametrize('action', ['add', 'rm', 'gc'])
def test_a_crash_at_any_point(tmp_path, action):
    "What was committed stays whole, and the same command then succeeds."
    seeds, points = {'a': 1, 'b': 2, 'c': 3, 'new': 4}, 0
    for k in range(1, 200):
        folder = tmp_path/f'{k}'
        store = Store(folder, create=True)
        for name in 'abc': add(store, name, seeds[name])
        if action == 'gc': store.rm('c')
        do = {'add': lambda: add(Store(folder), 'new', 4), 'rm': lambda: Store(folder).rm('b'), 'gc': lambda: Store(folder).gc()}[action]
        ended = dying(do, k)
        names = whole(store, seeds)
        assert names >= ({'a', 'c'} if action == 'rm' else {'a', 'b'} if action == 'gc' else {'a', 'b', 'c'})
        if action != 'rm' or 'b' in names: do()
        store.gc()
        expected = {'add': {*seeds}, 'rm': {'a', 'c'}, 'gc': {'a', 'b'}}[action]
        assert whole(store, seeds) == expected and store.verify() == {}
        assert len([*store.objects]) == 3 + 2*len(expected) and not [*folder.rglob('.*.part')]
        points += 1
        if ended: break
    assert ended and points > {'add': 10, 'rm': 1, 'gc': 2}[action]

def _add_many(folder, first):
    store = Store(folder)
    for seed in range(first, first + 12): add(store, f's{seed}', seed)
    return len(store)

def test_concurrent_additions_and_collections(tmp_path):
    "Adding the same and other snapshots from four processes while garbage is collected."
    folder = tmp_path/'store'
    store, stop = Store(folder, create=True), threading.Event()
    collected = []
    def collect():
        while not stop.is_set(): collected.append(store.gc())
    with ProcessPoolExecutor(4) as pool:
        jobs = [pool.submit(_add_many, folder, first) for first in (0, 6, 0, 20)]
        thread = threading.Thread(target=collect)
        thread.start()
        for job in jobs: job.result()
        stop.set()
        thread.join()
    assert whole(store, {f's{k}': k for k in range(40)}) == {f's{k}' for k in [*range(18), *range(20, 32)]}
    assert store.verify() == {} and collected

def test_a_flipped_bit_names_those_it_harms(tmp_path):
    store = Store(tmp_path/'store', create=True)
    for k in range(3): add(store, f's{k}', k)
    ids = {k: id for k, (_, id) in store.find('s1').tensors.items()}
    for key, harmed in (('shared.0', ['s0', 's1', 's2']), ('own.1', ['s1'])):
        path = store.objects.path(ids[key])
        good = path.read_bytes()
        for bit in np.random.default_rng(0).integers(0, 8*len(good), 25):
            damaged = bytearray(good)
            damaged[bit//8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert store.verify() == {ids[key]: harmed}, bit
        damaged = bytearray(good)
        damaged[len(good)//2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RunFailed, match='is damaged: `imgexp store verify`'): store.load('s1')
        add(store, 's1', 1)  # what is there is not written again
        assert store.verify(drop=True) == {ids[key]: harmed}
        add(store, 's1', 1)
        assert store.verify() == {}

def test_garbage_is_not_collected_while_a_manifest_is_damaged(tmp_path):
    store = Store(tmp_path/'store', create=True)
    for k in range(2): add(store, f's{k}', k)
    path = store.path('s1')
    good = path.read_text()
    path.write_text(good[:-200])
    for call in (store.gc, store.ls, store.verify, lambda: store.load('s1')):
        with pytest.raises(InputError, match='manifest of snapshot s1 is damaged: restore'): call()
    assert torch.equal(store.load('s0')['own.0'], state(0)['own.0'])
    store.rm('s1')
    store.gc()
    add(store, 's1', 1)
    assert whole(store, {'s0': 0, 's1': 1}) == {'s0', 's1'}

def test_a_full_disk_refuses_cleanly(tmp_path, monkeypatch):
    store = Store(tmp_path/'store', create=True)
    add(store, 's0', 0)
    class Full:
        f_bavail, f_frsize = 100, 1
    monkeypatch.setattr(os, 'statvfs', lambda path: Full)
    with pytest.raises(RunFailed, match='free some disk space, then the same command continues'): add(store, 's1', 1)
    monkeypatch.undo()
    import imgexp.tensor_objects as module
    real, written = module.encode_tensor, []
    def encode(tensor, f):
        if written: raise OSError(28, 'No space left on device')
        written.append(real(tensor, f))
    monkeypatch.setattr(module, 'encode_tensor', encode)
    with pytest.raises(RunFailed, match='free some disk space'): add(store, 's1', 1)
    monkeypatch.undo()
    assert not [*store.dir.rglob('.*.part')] and whole(store, {'s0': 0}) == {'s0'}
    add(store, 's1', 1)
    assert whole(store, {'s0': 0, 's1': 1}) == {'s0', 's1'}

def test_published_weights_are_a_parent(tmp_path, monkeypatch):
    "torchvision's files are known to runs by their name, which holds the beginning of their hash."
    import hashlib, imgexp.weights as weights
    torch.save(build_model('resnet18', 10).state_dict(), tmp_path/'net.pth')
    digest = hashlib.sha256((tmp_path/'net.pth').read_bytes()).hexdigest()
    path = (tmp_path/'net.pth').rename(tmp_path/f'resnet18-{digest[:8]}.pth')
    monkeypatch.setattr(weights, 'download_weights', lambda url, name: path)
    store = Store(tmp_path/'store', create=True)
    base, = store.add('imagenet', 'base', 'resnet18')
    assert path.name in base.snapshot.files and base.snapshot.origin.classes == [str(k) for k in range(10)]
    add(store, 'other', 1)
    store.add_tensors('tuned', file_of(state(2)), Origin(parent=path.name))
    assert store.ls().parent.to_dict() == {'base': '', 'other': '', 'tuned': 'base'}
    wrong = path.rename(tmp_path/'resnet18-00000000.pth')  # a name is no proof
    assert store.add_file(wrong, 'wrong', 'resnet18').snapshot.files == [f'sha256:{digest[:16]}']

def test_vision_transformers(tmp_path):
    "Their size is in their position embedding; images of another size are refused in one line."
    from imgexp.prefix_tree import build_trees
    store = Store(tmp_path/'store', create=True)
    torch.save(build_model('vit_b_32', 3, size=96).state_dict(), tmp_path/'vit.pth')
    store.add_file(tmp_path/'vit.pth', arch='vit_b_32')
    assert store.find('vit').origin.size == 96 and len(store.show('vit')) == 14
    with torch.inference_mode(): assert store.network('vit')(torch.rand(1, 3, 96, 96)).shape == (1, 3)
    assert build_trees(store.snapshots())[0].size == 96
    with pytest.raises(InputError, match='snapshot vit cannot take images of 64 px .*: leave out size'): build_trees(store.snapshots(), 64)

def test_adding_again_and_removing_at_once(tmp_path, monkeypatch):
    "A snapshot that is removed while its file is added again does not half come back."
    store = Store(tmp_path/'store', create=True)
    add(store, 's0', 0)
    import imgexp.manifests as module
    real = module.write_json
    waiting = []
    def write(path, value):
        if not waiting:  # between reading the manifest and writing it again
            waiting.append(threading.Thread(target=Store(store.dir).rm, args=('s0',)))
            waiting[0].start()
            waiting[0].join(0.5)
        real(path, value)
    monkeypatch.setattr(module, 'write_json', write)
    module.add_file_id(store, 's0', 'sha256:x')
    waiting[0].join()
    assert len(store) == 0

def test_busy(tmp_path, monkeypatch):
    "Collecting garbage waits for those who read, and says so in the end."
    store = Store(tmp_path/'store', create=True)
    add(store, 's0', 0)
    fd = os.open(store.dir/'lock', os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    import imgexp.manifests as module
    now = iter(range(0, 10**6, 30))
    monkeypatch.setattr(module.time, 'monotonic', lambda: next(now))
    with pytest.raises(RunBusy, match='is in use by another process'): store.gc()
    monkeypatch.undo()
    assert len(store.load('s0')) == 5
    os.close(fd)
    store.gc()

def test_files(tmp_path):
    "Every type and shape, from both formats, comes back as the same file that safetensors writes."
    store = Store(tmp_path/'store', create=True)
    tensors = {'f': torch.randn(1000, 300), 'h': torch.randn(7).half(), 'b': torch.randn(3, 3).bfloat16(), 'n': torch.tensor(3), 'e': torch.zeros(0, 4),
               't': torch.tensor([True, False]), 'u': torch.arange(9, dtype=torch.uint8), 'd': torch.randn(5, dtype=torch.float64),
               'strided': torch.randn(4, 6).T, 'channels_last': torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    torch.save(tensors, tmp_path/'net.pth')
    plain = {k: v.contiguous() for k, v in tensors.items()}
    safetensors.torch.save_file(plain, tmp_path/'net.safetensors', {'note': 'ü'})
    assert store.add_file(tmp_path/'net.pth', 'from-torch').snapshot.id == store.add_file(tmp_path/'net.safetensors').snapshot.id
    store.get('net', tmp_path/'out.safetensors')
    assert (tmp_path/'out.safetensors').read_bytes() == (tmp_path/'net.safetensors').read_bytes()
    store.get('from-torch', tmp_path/'out.safetensors')
    assert (tmp_path/'out.safetensors').read_bytes() == safetensors.torch.save(plain)
    loaded = store.load('net')
    for k, v in plain.items(): assert loaded[k].dtype == v.dtype and torch.equal(loaded[k], v), k
    part = store.get('net', tmp_path/'part.safetensors', only='f,h')
    assert {*read_tensor_file(tmp_path/'part.safetensors').tensors} == {'f', 'h'} and part not in store.find('net').files

def test_half_precision_bases(tmp_path):
    "A base in half precision comes back in half precision; what was frozen in training counts as the base's."
    store = Store(tmp_path/'store', create=True)
    for name, dtype in (('half', torch.float16), ('bf16', torch.bfloat16)):
        base = {k: v.to(dtype) for k, v in state(0).items()}
        torch.save(base, tmp_path/f'{name}.pth')
        store.add_file(tmp_path/f'{name}.pth')
        tuned = {k: v.float() + k.startswith('own') for k, v in base.items()}
        store.add_tensors(f'{name}-tuned', file_of(tuned), Origin(parent=store.find(name).files[0]))
        assert all(torch.equal(v, base[k]) and v.dtype == dtype for k, v in store.load(name).items())
        assert {*store.load(f'{name}-tuned', changed=True)} == {'own.0', 'own.1'}
        assert torch.equal(store.load(f'{name}-tuned')['shared.0'], base['shared.0'].float())

def test_reading_a_part_leaves_the_rest_alone(tmp_path, monkeypatch):
    store = Store(tmp_path/'store', create=True)
    add(store, 's0', 0)
    import imgexp.store as module
    read = []
    monkeypatch.setattr(module, 'get_object', lambda objects, id, spec, out: read.append(id))
    store.load('s0', only='own.*')
    assert len(read) == 2

def test_memory_of_reading(tmp_path, launcher):
    "At most the model, and the larger of 10% and 64 MB."
    code = '''
import resource, sys, torch
from imgexp.store import Store
from imgexp.tensor_files import TensorFile, from_torch
from imgexp.manifests import Origin
store = Store('store', create=True)
if sys.argv[1] == 'add': store.add_tensors('big', TensorFile({f'w{k}': from_torch('w', torch.randn(20_000_000)) for k in range(4)}, {}), Origin())
else:
    store.add_tensors('small', TensorFile({'w': from_torch('w', torch.ones(9))}, {}), Origin()); store.load('small')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.argv[1] == 'load': kept = store.load('big')
    else: store.get('big', 'out.safetensors')
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)'''
    for what, limit in (('add', None), ('load', 320 + 64), ('get', 80 + 64)):
        job = launcher.python('-c', code, what, root=tmp_path, cwd=tmp_path)
        assert job.wait() == 0, job.err
        if limit: assert int(job.out)/1000 < limit*1.03, (what, job.out)

def test_runs_and_lineage(project, launcher):
    "A run's weights, with all that is known; restored accuracy is trained accuracy; the exported file makes it a parent."
    from imgexp.train import train
    from imgexp.transfer import train as transfer
    from imgexp.trained import read_network, weights_path
    base = train(data='shapes', arch='compact_resnet', size=32, epochs=1, subset=0.2, track='off', augment='none')
    path, kind = weights_path(base)
    tuned = transfer(data='digits', arch='compact_resnet', weights=str(path/f'{kind}.safetensors'), size=32, retrain=2, epochs=2, track='off',
                     precision='fp32', keep_weights='1')
    store = Store(create=True)
    store.add(base.name, name='base')
    added, = store.add(str(tuned.dir), name='tuned')
    o, table = added.snapshot.origin, store.show('tuned')
    assert (o.arch, o.retrain, o.data, o.run, o.size, len(o.classes)) == ('compact_resnet', 2, 'digits', tuned.name, 32, 10)
    assert o.metrics['test']['top1'] == tuned.metrics['test']['top1'] and store.ls().parent['tuned'] == 'base'
    assert table.as_parent.tolist() == [True, True, False, False, False]
    first, = store.add(tuned.name, name='tuned-1', checkpoint=min(p.stem for p in (tuned.dir/'checkpoints').glob('weights-*')))
    assert first.snapshot.origin.metrics == {} and first.snapshot.id != added.snapshot.id
    reference, _ = read_network(tuned, 'best')
    for k, v in reference.state_dict().items(): assert torch.equal(v, store.network('tuned').state_dict()[k])
    from imgexp.evaluate import load_run
    trained = load_run(tuned.name)
    trained.model = trained.net = store.network('tuned')
    assert trained.evaluate('test')['top1'] == tuned.metrics['test']['top1']  # restored accuracy is trained accuracy
    id = store.get('tuned', project/'tuned.safetensors')
    child = transfer(data='shapes-sketch', arch='compact_resnet', weights=str(project/'tuned.safetensors'), size=32, epochs=1, track='off', subset=0.2)
    assert child.depends['weights'] == id
    store.add(child.name, name='child')
    assert store.ls().parent['child'] == 'tuned'
    (path/f'{kind}.safetensors').write_bytes((path/f'{kind}.safetensors').read_bytes()[:-1])
    with pytest.raises(InputError, match='is damaged'): store.add(base.name, name='again')

def test_bad_input_at_the_command_line(project, launcher):
    "One line each, exit status 2 (1 for a disk), and the store as it was."
    torch.save(build_model('resnet18', 10).state_dict(), project/'r18.pth')
    (project/'text.pth').write_text('no weights')
    job = launcher.imgexp('store', 'add', 'r18.pth', '--arch', 'resnet18', root=project, cwd=project)
    assert job.wait() == 0, job.err
    assert 'r18 (' in job.out and '122 tensors' in job.out
    before = sorted(p.name for p in (project/'runs/store').rglob('*'))
    for args, message in {
            ('add', 'none.pth'): 'none.pth', ('add', 'text.pth'): 'damaged or not a weights file', ('add', 'r18.pth', '--name', 'x', '--arch', 'resnet34'): 'not the tensors of arch=resnet34',
            ('add', 'r18.pth', '--name', 'a/b'): 'letters, digits', ('add', 'r18.pth', '--arch', 'resnet19'): 'did you mean',
            ('get', 'r19'): "no snapshot 'r19': did you mean r18", ('get', 'r18', '--out', 'x.pth'): 'ends in .safetensors', ('get', 'r18', '--only', 'zz*'): 'no such tensor',
            ('get', 'r18', '--changed'): 'parent', ('show', 'unknown'): 'imgexp store ls', ('rm', 'unknown'): 'no snapshot', ('rm', '../store'): 'no snapshot', ('get', '../store'): 'no snapshot', ('ls', '--store', 'nowhere'): 'is not a store',
            ('export', '.'): 'exists', ('add', 'r18.pth', '--store', '.'): 'holds other files'}.items():
        job = launcher.imgexp('store', *args, root=project, cwd=project)
        assert job.wait() == 2 and job.err.count('\n') == 1 and message in job.err, (args, job.err)
    assert sorted(p.name for p in (project/'runs/store').rglob('*')) == before
    write_json(project/'runs/store/store.json', read_json(project/'runs/store/store.json') | {'format': 99})
    job = launcher.imgexp('store', 'ls', root=project, cwd=project)
    assert job.wait() == 2 and 'has format 99' in job.err and 'install a newer imgexp' in job.err

def test_commands(project, launcher):
    for k in range(2): safetensors.torch.save_file(state(k), project/f's{k}.safetensors')
    def imgexp(*args):
        job = launcher.imgexp('store', *args, root=project, cwd=project)
        assert job.wait() == 0, job.err
        return job.out
    imgexp('add', 's0.safetensors', 's1.safetensors')
    assert [r['name'] for r in json.loads(imgexp('ls', '--json'))] == ['s0', 's1']
    assert json.loads(imgexp('stat', '--json'))['snapshots'] == 2
    assert json.loads(imgexp('show', 's0', '--json'))['name'] == 's0'
    imgexp('get', 's0', '--out', 'back.safetensors')
    assert (project/'back.safetensors').read_bytes() == (project/'s0.safetensors').read_bytes()
    imgexp('export', 'all')
    assert sorted(p.name for p in (project/'all').iterdir()) == ['s0.safetensors', 's1.safetensors', 'snapshots.csv']
    imgexp('rm', 's1')
    assert imgexp('gc').startswith('2 files removed')
    imgexp('verify')
