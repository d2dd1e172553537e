"Exports: the folder gives the answers of its run without torch and imgexp, says what is true, and leaves nothing half done."
import base64, json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('onnxruntime', reason="needs pip install 'imgexp[deploy]'")
from imgexp.deploy import export_run, exported_folder
from imgexp.download import FetchError
from imgexp.errors import InputError, RunFailed
from imgexp.evaluate import load_run
from imgexp.models import build_model
from imgexp.onnx_export import export_onnx
from imgexp.predictor import BadExport, Model
from imgexp.runs import Run
from imgexp.samples import shapes
from imgexp.train import train

SMALL = dict(arch='compact_resnet', size=80, lr=0.01, augment='none', batch_size=32, precision='fp32', track='off', workers=0, figures=False)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A run on drawn photos, and its export."
    root = tmp_path_factory.mktemp('project')
    before, os.environ['IMGEXP_ROOT'] = os.environ.get('IMGEXP_ROOT'), str(root)
    try:
        run = train(data='shapes', classes='circle,square,cross', subset=0.5, epochs=5, **SMALL)
        yield run, export_run(run=run.name, space=True)
    finally:
        if before is None: del os.environ['IMGEXP_ROOT']
        else: os.environ['IMGEXP_ROOT'] = before

def files_of_all_kinds(folder):
    "The same drawing as files that a camera, a scanner or a browser would send."
    folder.mkdir()
    y, x = np.mgrid[:300, :400]
    picture = np.uint8(np.where(((x - 220)**2 + (y - 140)**2 < 90**2)[..., None], [230, 60, 40], np.stack([x*0.6, y*0.8, 0*x + 90], 2)))
    im = Image.fromarray(picture)
    turned = im.getexif()
    turned[0x112] = 6
    alpha = im.copy()
    alpha.putalpha(Image.fromarray(np.uint8(x % 256)))
    for name, image, kind, options in [
            ('plain', im, 'JPEG', {}), ('turned', im, 'JPEG', {'exif': turned}), ('cmyk', im.convert('CMYK'), 'JPEG', {}), ('gray', im.convert('L'), 'JPEG', {}),
            ('large', im.resize((3000, 2250)), 'JPEG', {}), ('progressive', im, 'JPEG', {'progressive': True}), ('palette', im.quantize(32), 'PNG', {}),
            ('alpha', alpha, 'PNG', {}), ('webp', im, 'WEBP', {}), ('tiff', im, 'TIFF', {'compression': 'tiff_deflate'}), ('gif', im, 'GIF', {}), ('small', im.resize((50, 40)), 'PNG', {}),
            ('narrow', im.resize((900, 70)), 'PNG', {}), ('bmp', im, 'BMP', {})]:
        image.save(folder/f'{name}.{"jpg" if kind == "JPEG" else kind.lower()}', kind, **options)
    cv2.imwrite(str(folder/'deep.png'), picture[..., ::-1].astype(np.uint16)*257)
    return folder

def test_files_of_all_kinds_get_the_answers_of_the_run(made, tmp_path):
    run, exported = made
    folder, trained = files_of_all_kinds(tmp_path/'files'), load_run(str(run.dir), device='cpu')
    theirs = trained.predict(folder)
    assert len(theirs) == 15 and theirs.error.isna().all()
    model = exported.model()
    for row in theirs.itertuples():
        answer = model.predict(folder/row.file)
        assert next(iter(answer)) == row.predicted and abs(answer[row.predicted] - row.probability) < 1e-4, row.file

def test_presize_is_part_of_the_preprocessing(made, tmp_path, monkeypatch):
    monkeypatch.setenv('IMGEXP_ROOT', str(tmp_path))
    table = shapes(120, size=200)
    for row in range(len(table)):
        path = tmp_path/'photos'/('train', 'valid', 'test')[table.splits[row]]/table.classes[table.labels[row]]
        path.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path/f'{row}.png'), table.source.read(row)[..., ::-1])
    run = train(data=str(tmp_path/'photos'), pack='memory', epochs=1, **SMALL)
    assert run.depends['prepared'].startswith('presize-')
    said = []
    exported = export_run(run=run.name, say=said.append)
    assert exported.config['presize'] and not exported.config['examples'] and 'license' in ' '.join(said)
    trained, files = load_run(str(run.dir), device='cpu'), files_of_all_kinds(tmp_path/'files')
    for row in trained.predict(files).itertuples():
        assert abs(exported.model().predict(files/row.file)[row.predicted] - row.probability) < 1e-4, row.file

def alone(folder, code, **env):
    "Run code in the folder of an export, where torch and imgexp cannot be imported."
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'imgexp', 'fastai', 'fastcore', 'pandas', 'matplotlib']));"
    return subprocess.run([sys.executable, '-c', blocked + code], cwd=folder, capture_output=True, text=True, env=os.environ | {'PYTHONDONTWRITEBYTECODE': '1'} | env)

def test_classes_of_imagenet_have_names_and_groups(tmp_path, monkeypatch):
    monkeypatch.setenv('IMGEXP_ROOT', str(tmp_path))
    ids = {'n02012849': 'circle', 'n02123045': 'square', 'n03126707': 'star5'}  # a crane, a tabby, another crane
    table = shapes(90, size=48)
    for row in range(len(table)):
        wnid = next((i for i, c in ids.items() if c == table.classes[table.labels[row]]), None)
        if wnid is None: continue
        path = tmp_path/'photos'/('train', 'valid', 'test')[table.splits[row]]/wnid
        path.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path/f'{row}.png'), table.source.read(row)[..., ::-1])
    run = train(data=str(tmp_path/'photos'), epochs=1, **SMALL | {'size': 32, 'arch': 'small_cnn'})
    index = {f'n{k:08}': 'other' for k in range(1000)}
    keys = [*index]
    for number, wnid, name in ((134, 'n02012849', 'crane'), (281, 'n02123045', 'tabby'), (517, 'n03126707', 'crane')): keys[number] = wnid
    index = {k: {'n02123045': 'tabby'}.get(k, 'crane' if k in ids else 'other') for k in keys}
    monkeypatch.setattr('imgexp.deploy.class_index', lambda **kw: index)
    exported = export_run(run=run.name, examples=str(tmp_path/'photos/valid'), out=str(tmp_path/'named'))
    names = ['crane (n02012849)', 'tabby', 'crane (n03126707)']
    assert exported.config['classes'] == names and exported.config['ids'] == [*ids]
    assert {(e['class'], e['group']) for e in exported.config['examples']} == {*zip(names, ('birds', 'cats', 'things'))}
    photo = next((tmp_path/'photos/valid').rglob('*.png'))
    theirs, answer = load_run(str(run.dir), device='cpu').predict(photo), exported.model().predict(photo)
    assert next(iter(answer)) == names[[*ids].index(theirs.predicted[0])]
    assert 'tabby' in (tmp_path/'named/README.md').read_text() and 'n02123045' not in (tmp_path/'named/README.md').read_text()

    def unreachable(**kw): raise FetchError('no network')
    monkeypatch.setattr('imgexp.deploy.class_index', unreachable)
    said = []
    assert export_run(say=said.append, run=run.name, out=str(tmp_path/'ids')).config['classes'] == [*ids]
    assert any('no network' in s for s in said)

def test_groups_of_imagenet_hold_the_classes_that_they_name():
    from pathlib import Path
    from imgexp.imagenet_classes import imagenet_groups
    path = Path(__file__).resolve().parents[2]/'shared/data/meta/imagenet/imagenet_class_index.json'
    if not path.exists(): pytest.skip("ImageNet's class index is not here: the shared data are not part of the project")
    index = dict(json.loads(path.read_text()).values())
    group = {index[c]: g for c, g in imagenet_groups(index, index).items()}
    for name, expected in {'goldfish': 'fish', 'puffer': 'fish', 'albatross': 'birds', 'axolotl': 'amphibians', 'sidewinder': 'reptiles', 'isopod': 'invertebrates',
                           'lycaenid': 'insects', 'Mexican_hairless': 'dogs', 'timber_wolf': 'wild dogs', 'cheetah': 'cats', 'sloth_bear': 'bears', 'koala': 'other mammals',
                           'giant_panda': 'other mammals', 'guinea_pig': 'rodents and rabbits', 'llama': 'hoofed mammals', 'indri': 'primates', 'dogsled': 'vehicles', 'yawl': 'vehicles',
                           'violin': 'musical instruments', 'eggnog': 'food', 'volcano': 'landscapes', 'groom': 'people', 'ear': 'plants and fungi', 'abacus': 'things', 'bubble': 'things'}.items():
        assert group[name] == expected, name

def test_the_folder_needs_neither_torch_nor_imgexp(made, tmp_path):
    run, exported = made
    photo = next((exported.folder/'examples').iterdir())
    done = alone(exported.folder, f'import json; from model import load, predict; print(json.dumps([predict({str(photo)!r}), load().explain(load().pixels({str(photo)!r})[None])[1].shape]))')
    assert done.returncode == 0, done.stderr
    answer, shape = json.loads(done.stdout)
    assert answer == pytest.approx(exported.model().predict(photo)) and shape[0] == 1
    label = next(e['class'] for e in exported.config['examples'] if e['file'].endswith(photo.name))
    assert next(iter(answer)) == label
    script = subprocess.run([sys.executable, 'model.py', str(photo)], cwd=exported.folder, capture_output=True, text=True)
    assert script.returncode == 0 and label in script.stdout
    broken = tmp_path/'broken.jpg'
    broken.write_bytes(b'\xff\xd8\xff')
    script = subprocess.run([sys.executable, 'model.py', str(broken)], cwd=exported.folder, capture_output=True, text=True)
    assert script.returncode == 1 and script.stderr.strip() == f'{broken}: is cut short'

def test_weights_and_description(made):
    import safetensors.torch
    run, exported = made
    weights = safetensors.torch.load_file(exported.folder/'model.safetensors')
    expected = load_run(str(run.dir), device='cpu').model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in weights)
    config = exported.config
    assert config['run'] == run.name and config['accuracy'] == {'split': 'test', 'top1': run.metrics['test']['top1']}
    present = {p.relative_to(exported.folder).as_posix() for p in exported.folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert {*config['files']} == present - {'config.json'}
    assert max(config['differences'].values()) <= 1e-4
    texts = ''.join((exported.folder/n).read_text() for n in present if n.endswith(('.py', '.md', '.json', '.txt')))
    assert str(run.dir.parent) not in texts and not re.search(rf'\b{re.escape(os.uname().nodename)}\b', texts)
    card, pinned = (exported.folder/'README.md').read_text(), (exported.folder/'requirements.txt').read_text()
    assert re.search(r'(?m)^sdk_version: "?\'?(\d+\.\d+\.\d+)', card)[1] == re.search(r'(?m)^gradio==(.*)$', pinned)[1]

def test_other_weights_have_no_accuracy(made, tmp_path):
    "The metrics of a run are of its best weights: neither page nor card may show them for others."
    import shutil
    from imgexp.checkpoints import read_index
    run = Run(shutil.copytree(made[0].dir, tmp_path/made[0].name, ignore=shutil.ignore_patterns('export')))
    index = read_index(run)
    other = next(b['name'] for b in index['best'][::-1] if b['name'] != index['best'][0]['name'])
    exported = export_run(run=str(run.dir), checkpoint=other)
    assert exported.config['accuracy'] is None and made[1].config['accuracy']
    assert exported.config['weights'] != made[1].config['weights']
    claim = f"Top-1 on test images: {run.metrics['test']['top1']['value']:.1%}"
    assert claim in (made[1].folder/'README.md').read_text() and claim not in (exported.folder/'README.md').read_text()

def test_examples_carry_no_metadata(made):
    for file in (made[1].folder/'examples').iterdir():
        with Image.open(file) as im: assert not im.getexif() and not im.info.get('icc_profile')

@pytest.mark.parametrize('arch', ['mobilenet_v3_small', 'densenet121', 'swin_t'])
def test_architectures(arch, tmp_path):
    "One with two linear layers, whose map needs a gradient, and two that end in pooling and a linear layer, the second with masks that it fills in."
    images = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    about = export_onnx(build_model(arch, 5, size=64), ((0.5,)*3, (0.2,)*3), tmp_path/'model.onnx', images)
    assert about['maps'] == {'mobilenet_v3_small': 'target'}.get(arch, 'all') and max(about['differences'].values()) < 1e-4

def test_a_changed_file_is_noticed(made, tmp_path):
    import shutil
    folder = tmp_path/'export'
    shutil.copytree(made[1].folder, folder)
    with open(folder/'model.onnx', 'r+b') as f:
        f.seek(2000)
        f.write(b'changed')
    with pytest.raises(BadExport, match='has changed since the export'): Model(folder)
    with pytest.raises(InputError, match='has changed since the export'): exported_folder(str(folder))
    (folder/'model.onnx').unlink()
    with pytest.raises(InputError, match='is missing'): exported_folder(str(folder))

def test_refusals_write_nothing(made, tmp_path, monkeypatch):
    run, exported = made
    def refused(message, **values):
        with pytest.raises(InputError, match=message): export_run(**{'run': str(run.dir), 'out': str(tmp_path/'export')} | values)
        assert not [p for p in tmp_path.iterdir() if 'export' in p.name]
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('')
    refused('holds other files', out=str(tmp_path/'mine'))
    (tmp_path/'groups.csv').write_text('class,superclass\ntrousers,legs\n')
    refused("'trousers' is not a class of the network: choose from circle, square, cross", superclasses=str(tmp_path/'groups.csv'))
    refused('no such folder', examples=str(tmp_path/'none'))
    refused('has no checkpoint', checkpoint='step-99999999')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['groups.csv', 'mine']
    for notebook, state, message in [('10_keras_cnn', 'done', 'only PyTorch networks can be exported'), ('03_train', 'stopped', 'is not finished')]:
        other = tmp_path/f'20260101-000000-{notebook}-12345678'
        other.mkdir()
        (other/'params.json').write_text(json.dumps({'notebook': notebook, 'id': '12345678', 'params': {}}))
        (other/'status.json').write_text(json.dumps({'state': state}))
        refused(message, run=str(other))

def test_an_earlier_export_is_replaced_whole(made, monkeypatch):
    run, exported = made
    from imgexp import deploy
    before = {p: p.read_bytes() for p in exported.folder.rglob('*') if p.is_file()}
    def fails(*args, **kwargs): raise RunFailed('the disk is full')
    monkeypatch.setattr(deploy, 'model_card', fails)
    with pytest.raises(RunFailed): export_run(run=run.name, space=True)
    assert {p: p.read_bytes() for p in exported.folder.rglob('*') if p.is_file()} == before
    assert not [*run.dir.glob('.export*')]

class Hub(BaseHTTPRequestHandler):
    "What Hugging Face answers to an upload, as far as it is asked."
    def log_message(self, *args): pass
    def answer(self, status, value):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header('content-type', 'application/json')
        self.send_header('content-length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_GET(self): self.answer(200, {'id': 'me/shapes', 'sha': 'f'*40, 'siblings': []})
    def do_POST(self):
        body, hub = self.rfile.read(int(self.headers.get('content-length', 0))), self.server
        hub.tokens.add(self.headers.get('authorization'))
        if hub.status != 200: return self.answer(hub.status, {'error': 'refused'})
        if self.path.endswith('/repos/create'):
            hub.created = json.loads(body)
            return self.answer(200, {'url': f'http://127.0.0.1:{hub.server_port}/spaces/me/shapes'})
        if '/preupload/' in self.path:
            return self.answer(200, {'files': [{'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None} for f in json.loads(body)['files']]})
        if '/commit/' in self.path:
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file': hub.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            return self.answer(200, {'commitUrl': f'http://127.0.0.1:{hub.server_port}/spaces/me/shapes/commit/' + 'f'*40, 'commitOid': 'f'*40, 'hookOutput': ''})
        self.answer(200, {})

def push(folder, port, token='hf_' + 'a'*34):
    code = f'''
from imgexp.deploy import push_export
from imgexp.errors import RunFailed
try: print(push_export({str(folder)!r}, 'me/shapes'))
except RunFailed as e: print('refused:', e)'''
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))} | {
        'HF_ENDPOINT': f'http://127.0.0.1:{port}', 'HF_TOKEN': token, 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '*'}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=200)

def test_push(made):
    folder = made[1].folder
    hub = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    hub.files, hub.tokens, hub.status, hub.created = {}, set(), 200, {}
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        done = push(folder, hub.server_port)
        assert done.stdout.strip() == f'http://127.0.0.1:{hub.server_port}/spaces/me/shapes', done.stderr
        assert hub.created['type'] == 'space' and hub.created['sdk'] == 'gradio' and hub.tokens == {'Bearer hf_' + 'a'*34}
        assert hub.files == {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
        assert 'hf_' not in done.stdout + done.stderr
        hub.status = 403
        done = push(folder, hub.server_port)
        assert 'no right to write there' in done.stdout and done.stdout.count('\n') == 1 and 'hf_' not in done.stdout + done.stderr
    finally:
        hub.shutdown()
        hub.server_close()
    done = push(folder, hub.server_port)
    assert 'refused: Hugging Face cannot be reached' in done.stdout and 'can be uploaded later' in done.stdout
