"Any labeled images: nested and flat folders, tables, Hugging Face data sets, webdataset tars; and what each refuses."
import hashlib, http.server, io, json, shutil, tarfile, threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2, numpy as np, pandas as pd, pytest

import imgexp.contents as contents_module
from imgexp.contents import contents, fingerprint
from imgexp.data import read_stored
from imgexp.describe import describe_images
from imgexp.errors import InputError
from imgexp.experiments import EXPERIMENTS, declared_experiment
from imgexp.folders import warn_once
from imgexp.loader import make_batch
from imgexp.packs import prepare_images
from imgexp.params import from_declarations
from imgexp.sources import download_hub, load_images, open_images
from imgexp.start import find_run, run_id
from imgexp.train import EXPERIMENT
from imgexp.write_packs import build_pack
from launch import last_line

pytestmark = pytest.mark.usefixtures('project', 'heard_anew')
SMALL = '--size 8 --epochs 1 --batch-size 4 --workers 0 --track off'.split()
def quiet(line): pass

@pytest.fixture
def heard_anew():
    warn_once.cache_clear()
    download_hub.cache_clear()

def png(k): return cv2.imencode('.png', np.full((10, 12, 3), 9*k % 256, np.uint8))[1].tobytes()

def files(root, names):
    "Pictures of different grays, one for each name."
    for k, name in enumerate(names):
        path = Path(root)/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
    return Path(root)

def table_of(table): return [(str(i), table.classes[c], int(s)) for i, c, s in zip(table.items, table.labels, table.splits)]

# -- folders

SHOP = [f'{folder}/{i}.png' for folder in ('Fruit/Apple/Gala', 'Fruit/Apple/Golden', 'Fruit/Lime', 'Drinks/Lime', 'Drinks/Cola') for i in range(4)]

def test_nested_folders_are_told_and_chosen(project, capsys):
    shop = files(project/'shop', SHOP)
    assert load_images(shop).classes == ['Drinks', 'Fruit']
    line = capsys.readouterr().err.strip()
    assert line == 'shop: 2 classes, the folders of the first level; their images are in 5 folders: classes_at=leaf makes each of them a class'
    assert load_images(shop, classes_at='2').classes == ['Apple', 'Cola', 'Drinks/Lime', 'Fruit/Lime']
    assert 'several folders are named Lime: their classes are named by their paths, like Drinks/Lime' in capsys.readouterr().err
    leaf = load_images(shop, classes_at='leaf')
    assert leaf.classes == ['Cola', 'Drinks/Lime', 'Fruit/Lime', 'Gala', 'Golden'] and 'classes_at' not in capsys.readouterr().err
    with pytest.raises(InputError, match="classes_at='4': the folders of shop have 3 levels"): load_images(shop, classes_at='4')
    assert load_images(shop, 'Gala,Drinks/Lime', classes_at='leaf').classes == ['Drinks/Lime', 'Gala']
    for row in range(len(leaf)): assert leaf.items[row].startswith({'Gala': 'Fruit/Apple/Gala', 'Golden': 'Fruit/Apple/Golden', 'Cola': 'Drinks/Cola'}.get(leaf.classes[leaf.labels[row]], leaf.classes[leaf.labels[row]]))
    assert fingerprint(leaf) != fingerprint(load_images(shop, classes_at='2')) != fingerprint(load_images(shop))

def test_levels_below_splits(project):
    shop = files(project/'shop', [f'{split}/{name}' for split in ('train', 'val') for name in SHOP])
    table = load_images(shop, classes_at='leaf')
    assert len(table.classes) == 5 and table.counts().tolist() == [[4, 4, 0]]*5
    files(shop, ['val/Fruit/Plum/0.png'])
    with pytest.raises(InputError, match="class 'Fruit/Plum' has no folder among the training images"): load_images(shop, classes_at='leaf')

PETS = [f'{breed}_{i}.png' for breed in ('Abyssinian', 'great_pyrenees') for i in range(1, 6)]

def test_classes_in_file_names(project):
    pets = files(project/'pets', PETS)
    table = load_images(pets, label_from=r'^(.+)_\d+')
    assert table.classes == ['Abyssinian', 'great_pyrenees'] and table.counts().sum(1).tolist() == [5, 5]
    assert all(i.startswith(table.classes[c]) for i, c in zip(table.items, table.labels))
    assert table_of(load_images(files(project/'more', [f'{s}/{n}' for s in ('train', 'test') for n in PETS]), label_from='^(.+)_'))[0] == ('test/Abyssinian_1.png', 'Abyssinian', 2)

REFUSED = {
    'unmatched': (dict(label_from=r'^([A-Z].+)_'), 'does not match 5 of 10 file names in pets, like great_pyrenees_1.png, great_pyrenees_2.png, great_pyrenees_3.png'),
    'no group': (dict(label_from='_'), "label_from='_' has no group: put the class in parentheses"),
    'no expression': (dict(label_from='(_'), "label_from='(_' is not a regular expression"),
    'level': (dict(classes_at='0'), "classes_at='0': give the level of the class folders"),
    'nothing said': ({}, "no images in class folders of pets, but 10 outside of them, like Abyssinian_1.png: make one folder of images per class, or read the classes from a table (data=labels.csv)"),
    'not for folders': (dict(columns='label:breed'), "columns='label:breed' does not apply to class folders")}

@pytest.mark.parametrize('options, message', REFUSED.values(), ids=REFUSED)
def test_what_folders_refuse(project, monkeypatch, options, message):
    monkeypatch.chdir(project)
    files(project/'pets', PETS)
    with pytest.raises(InputError) as e: load_images('pets', **options)
    assert message in str(e.value), str(e.value)

# -- tables

def test_usual_columns_and_formats(project):
    "All of these hold the same; labels are numbers, and stay in numerical order."
    folder = files(project/'photos', [f'img/{i}.png' for i in range(12)])
    names, labels = [f'img/{i}.png' for i in range(12)], [(2, 10, 9)[i % 3] for i in range(12)]
    parts = ['train']*6 + ['val']*3 + ['test']*3
    made = {'a.csv': ('file', 'label', 'split'), 'b.csv': ('Image', 'Category', 'set'), 'c.tsv': ('path', 'species', 'split'), 'd.parquet': ('file_name', 'target', 'split')}
    tables = []
    for file, columns in made.items():
        frame = pd.DataFrame(dict(zip(columns, (names, labels, parts))))
        if file.endswith('.parquet'): frame.to_parquet(folder/file)
        else: frame.to_csv(folder/file, index=False, sep='\t' if file.endswith('.tsv') else ',')
        tables.append(load_images(folder/file))
    pd.DataFrame({'photo': names, 'breed': labels, 'part': parts}).to_csv(folder/'e.csv', sep=';', index=False)
    tables.append(load_images(folder/'e.csv', columns='image:photo, label:breed, split:part'))
    assert tables[0].classes == ['2', '9', '10'] and tables[0].counts().sum(0).tolist() == [6, 3, 3]
    for t in tables: assert table_of(t) == table_of(tables[0]) and fingerprint(t) == fingerprint(tables[0])
    assert read_stored(tables[0], 5) == png(5)

def test_a_folder_with_labels_csv(project):
    folder = files(project/'photos', [f'{i}.png' for i in range(6)])
    (folder/'labels.csv').write_text('file,label\n' + ''.join(f'{i}.png,{"ab"[i % 2]}\n' for i in range(6)))
    assert table_of(load_images(folder)) == table_of(load_images(folder/'labels.csv')) and load_images(folder).name == 'photos'

def test_names_without_their_ending_in_a_folder_beside(project, capsys):
    files(project/'kaggle', [f'train_images/{i}.png' for i in range(6)])
    (project/'kaggle/train.csv').write_text('image_id,label,fold\n' + ''.join(f'{i},{"ab"[i % 2]},{i % 3}\n' for i in range(6)))
    table = load_images(project/'kaggle/train.csv', valid_fold=2)
    assert table.counts().sum(0).tolist() == [4, 2, 0] and read_stored(table, 3) == png(3)
    told = capsys.readouterr().err
    assert 'the images are train_images/0.png and so on' in told
    load_images(project/'kaggle/train.csv')
    assert "column 'fold' numbers folds; they are ignored (valid_fold=0 validates on one)" in capsys.readouterr().err

ROWS = 'file,label\n0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n4.png,cat\n5.png,dog\n'
TABLES = {
    'no label column': (ROWS.replace('label', 'kind'), {}, 'labels.csv has no column of labels: name it with columns=label:NAME (its columns are file, kind'),
    'no file column': (ROWS.replace('file', 'photo'), {}, 'has no column of images: name it with columns=image:NAME'),
    'unknown column': (ROWS, dict(columns='label:labl'), "unknown column of labels.csv 'labl': did you mean 'label'?"),
    'a column twice': (ROWS, dict(columns='label:label,label:file'), 'names two columns of labels: leave one of them out'),
    'unknown role': (ROWS, dict(columns='labels:label'), "columns='labels:label': give pairs like image:photo"),
    'a label missing': (ROWS.replace('3.png,dog', '3.png,'), {}, 'labels.csv: row 4, 3.png, has no label: fill it in, or remove the row'),
    'no labels': ('file,label\n0.png,\n1.png,\n', {}, 'has no labels: `imgexp predict RUN FOLDER` labels images without labels'),
    'files missing': (ROWS + ''.join(f'{i}.png,cat\n' for i in range(20, 27)), {}, '7 of 13 files of photos are missing in .: 20.png, 21.png, 22.png, 23.png, 24.png, …'),
    'two labels': (ROWS + '0.png,dog\n', {}, "labels.csv: 0.png is 'cat' in row 1 and 'dog' in row 7: remove one of them"),
    'two splits': ('file,label,split\n0.png,cat,train\n1.png,dog,train\n0.png,cat,test\n', {}, '0.png is in two splits (rows 1 and 3)'),
    'a split': ('file,label,split\n0.png,cat,train\n1.png,dog,tets\n', {}, "labels.csv: row 2 has split 'tets': splits are called train, training, valid"),
    'a class only in test': ('file,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,owl,test\n', {}, "class 'owl' in . has no training image"),
    'no such fold': ('file,label,fold\n0.png,cat,0\n1.png,dog,1\n2.png,cat,1\n', dict(valid_fold=7), 'valid_fold=7 is not in column fold of labels.csv: it has 0, 1'),
    'fold without a column': (ROWS, dict(valid_fold=0), 'valid_fold=0: labels.csv has no column of folds'),
    'ragged': (ROWS + '6.png\n', {}, 'labels.csv: row 7 has 1 column instead of 2: fill in'),
    'empty': ('', {}, 'labels.csv is empty'),
    'header only': ('file,label\n', {}, 'labels.csv has no rows'),
    'latin-1': (ROWS.replace('label', 'étiquette').encode('latin-1'), {}, 'labels.csv is not UTF-8'),
    'URLs': ('file,label\nhttps://a.org/1.png,cat\nhttps://a.org/2.png,dog\n', {}, 'names URLs: download the images'),
    'not for tables': (ROWS, dict(classes_at='leaf'), "classes_at='leaf' does not apply to a table of files and labels")}

@pytest.mark.parametrize('text, options, message', TABLES.values(), ids=TABLES)
def test_what_tables_refuse(project, monkeypatch, text, options, message):
    monkeypatch.chdir(project)
    files(project/'photos', [f'{i}.png' for i in range(6)])
    (project/'photos/labels.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(project/'photos')
    with pytest.raises(InputError) as e: load_images('labels.csv', **options)
    assert message in str(e.value), str(e.value)

def test_repeated_rows_and_single_images_are_told(project, capsys):
    files(project/'photos', [f'{i}.png' for i in range(6)])
    (project/'photos/labels.csv').write_text(ROWS + '1.png,dog\n' + '5.png,dog\n')
    assert len(load_images(project/'photos')) == 6 and 'skipped 2 repeated rows' in capsys.readouterr().err
    (project/'photos/labels.csv').write_text(ROWS.replace('5.png,dog', '5.png,owl'))
    load_images(project/'photos')
    assert '1 of 3 classes have a single image, which cannot be in training and validation both: owl' in capsys.readouterr().err

def test_a_large_table_opens_without_touching_files(project, monkeypatch):
    n = 100_000
    frame = pd.DataFrame({'file': [f'{i % 1000:03d}/{i:08d}.JPEG' for i in range(n)], 'label': [f'n{i % 1000:08d}' for i in range(n)]})
    frame.to_csv(project/'large.csv', index=False)
    table = open_images(project/'large.csv')
    assert len(table) == n and len(table.classes) == 1000 and (table.labels[:1000] == np.arange(1000)).all()

# -- data.yaml, identity, runs

def test_data_yaml_beside_the_images(project):
    pets = files(project/'pets', PETS)
    (pets/'data.yaml').write_text("label_from: '^(.+)_'\nnc: 2\n")
    assert table_of(load_images(pets)) == table_of(load_images(pets, label_from='^(.+)_'))
    assert load_images(pets, label_from='^(.)').classes == ['A', 'g']
    (pets/'data.yaml').write_text('label_form: x\n')
    with pytest.raises(InputError, match="data.yaml: unknown option 'label_form': did you mean 'label_from'"): load_images(pets)
    (pets/'data.yaml').write_text('columns: label:x\n')
    with pytest.raises(InputError, match='data.yaml: columns=.* does not apply to class folders'): load_images(pets)
    (pets/'data.yaml').write_text('valid_fold: x\n')
    with pytest.raises(InputError, match="data.yaml: valid_fold='x' is not a whole number"): load_images(pets)

def test_options_are_part_of_the_id():
    for notebook in EXPERIMENTS:
        base = declared_experiment(notebook).params()
        ids = {run_id(notebook, base.replace(**change), {'data': 'x'}) for change in
               ({}, {'label_from': '^(.)'}, {'classes_at': 'leaf'}, {'columns': 'label:a'}, {'valid_fold': 0})}
        assert len(ids) == 5

def test_a_run_remembers_how_its_labels_were_found(project, launcher):
    files(project/'pets', PETS)
    (project/'settings.ini').write_text('')
    job = launcher.imgexp('train', '--data', 'pets', '--label-from', '^(.+)_', *SMALL, root=project)
    assert job.wait() == 0, job.err
    run = find_run('', project/'runs')
    assert run.params['label_from'] == '^(.+)_'
    job = launcher.imgexp('eval', run.name, '--split', 'valid', root=project)
    assert job.wait() == 0 and 'n = 2' in job.out, job.err
    files(project/'new', [n.replace('.', '7.') for n in PETS])
    job = launcher.imgexp('eval', run.name, '--split', 'train', '--data', 'new', root=project)
    assert job.wait() == 0, job.err
    job = launcher.imgexp('predict', run.name, 'new', root=project)
    assert job.wait() == 0 and len(job.out.splitlines()) == 11, job.err
    job = launcher.imgexp('eval', run.name, '--label-from', '^(.)', root=project)
    assert job.wait() == 2 and "label_from='^(.)' is for other data" in last_line(job.err), job.err
    job = launcher.imgexp('train', '--data', 'pets', '--label-from', '^(.+', *SMALL, root=project)
    assert job.wait() == 2 and 'is not a regular expression' in last_line(job.err), job.err

# -- inside larger files

def hf_rows(n, start=0, **features):
    from datasets import ClassLabel, Dataset, Features, Image
    features = Features({'image': Image(), 'label': ClassLabel(names=['owl', 'cat', 'dog'])} | features)
    return Dataset.from_dict({'image': [{'bytes': png(start + i), 'path': None} for i in range(n)], 'label': [i % 3 for i in range(n)]}, features)

def test_a_saved_hugging_face_data_set(project):
    from datasets import DatasetDict
    DatasetDict(train=hf_rows(9), validation=hf_rows(3, 9), test=hf_rows(3, 12)).save_to_disk(project/'saved')
    table = load_images(project/'saved')
    assert table.classes == ['owl', 'cat', 'dog'] and table.counts().tolist() == [[3, 1, 1]]*3
    assert [read_stored(table, r) for r in range(15)] == [png(k) for k in range(15)]
    assert contents(table) == [hashlib.sha256(png(k)).digest() for k in range(15)]
    batch = make_batch(table, [0, 14], 8)[0]
    assert (batch == make_batch(replace(prepare_images(table, 8, say=quiet)), [0, 14], 8)[0]).all()
    hf_rows(9).select(range(8, -1, -1)).save_to_disk(project/'turned')
    assert read_stored(load_images(project/'turned'), 0) == png(8)

def test_hashes_of_a_saved_data_set_are_kept_until_it_changes(project, monkeypatch):
    hf_rows(9).save_to_disk(project/'saved')
    for f in (project/'saved').glob('*.arrow'): contents_module.os.utime(f, (1, 1))
    monkeypatch.setattr(contents_module, 'CLOCK', -1.)
    table = load_images(project/'saved')
    first, reads = fingerprint(table), []
    table.source.read = reads.append
    assert fingerprint(table) == first and not reads
    shutil.rmtree(project/'saved')
    hf_rows(9, 1).save_to_disk(project/'saved')
    assert fingerprint(load_images(project/'saved')) != first

def test_parquet_shards_and_hidden_labels(project, capsys, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(project/'hf'))
    folder = project/'shards/data'
    folder.mkdir(parents=True)
    for k in range(2): hf_rows(6, 6*k).to_parquet(folder/f'train-{k:05d}-of-00002.parquet')
    hf_rows(3, 12).map(lambda row: {'label': -1}).to_parquet(folder/'test-00000-of-00001.parquet')
    table = load_images(project/'shards')
    assert len(table) == 12 and table.classes == ['owl', 'cat', 'dog'] and read_stored(table, 11) == png(11)
    assert 'skipped the test split, whose labels are not published' in capsys.readouterr().err
    shutil.copy(folder/'train-00000-of-00002.parquet', project/'one.parquet')
    assert len(open_images(project/'one.parquet')) == 6

def test_several_label_columns_need_a_choice(project):
    from datasets import ClassLabel
    rows = hf_rows(9).rename_column('label', 'fine').add_column('coarse', [0]*5 + [1]*4).cast_column('coarse', ClassLabel(names=['a', 'b']))
    rows.save_to_disk(project/'saved')
    with pytest.raises(InputError, match=r'several columns of classes: choose one with columns=label:NAME .fine, coarse.'): load_images(project/'saved')
    assert load_images(project/'saved', columns='label:coarse').classes == ['a', 'b']

def test_metadata_csv(project):
    for split, n in (('train', 6), ('test', 2)):
        files(project/f'photos/{split}', [f'{i}.png' for i in range(n)])
        (project/f'photos/{split}/metadata.csv').write_text('file_name,label\n' + ''.join(f'{i}.png,{"ab"[i % 2]}\n' for i in range(n)))
    table = load_images(project/'photos')
    assert table_of(table)[1] == ('test/1.png', 'b', 2) and read_stored(table, 7) == png(5)

def tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as t:
        for name, raw in samples:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            t.addfile(member, io.BytesIO(raw))

def test_tars_are_packed_once(project, launcher):
    for split, n in (('train', 8), ('val', 4)):
        for k in range(2): tar(project/f'shards/{split}-{k:03d}.tar', [(f'{split}/{i:04d}.{e}', raw) for i in range(n) for e, raw in
                                                                      (('png', png(i)), ('json', json.dumps({'label': 'ab'[i % 2]}).encode()))])
    tars = load_images(project/'shards')
    assert tars.counts().tolist() == [[8, 4, 0]]*2 and read_stored(tars, 17) == png(1)
    job = launcher.imgexp('data', 'pack', 'shards', '--size', '8', '--dest', 'packs', root=project)
    assert job.wait() == 0, job.err
    table = load_images(project/job.out.strip())
    assert table.counts().tolist() == [[8, 4, 0]]*2
    with pytest.raises(InputError, match=r'train-002.tar does not exist'): build_pack(str(project/'shards/train-{000..002}.tar'), 8, say=quiet)
    tar(project/'bare/train-000.tar', [('0.png', png(0))])
    with pytest.raises(InputError, match='image 0 has no label: a .cls or .json file'): build_pack(project/'bare', 8, say=quiet)

class Hub(http.server.BaseHTTPRequestHandler):
    "The two addresses of the hub that a download needs."
    sha, down = '0123456789abcdef0123456789abcdef01234567', False
    def __init__(self, folder, *args): self.folder = folder; super().__init__(*args)
    def log_message(self, *args): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        path = self.path.partition('?')[0]
        if Hub.down: return self.send_error(503)
        names = sorted(str(f.relative_to(self.folder)) for f in self.folder.rglob('*') if f.is_file())
        if path.startswith('/api/datasets/us/pets/tree/'):
            body = json.dumps([{'type': 'file', 'oid': 'a'*40, 'size': (self.folder/n).stat().st_size, 'path': n} for n in names]).encode()
        elif path.startswith('/api/datasets/us/pets'):
            body = json.dumps({'id': 'us/pets', 'sha': self.sha, 'siblings': [{'rfilename': n} for n in names], 'private': False, 'tags': [], 'downloads': 0, 'likes': 0}).encode()
        elif path.startswith(f'/datasets/us/pets/resolve/{self.sha}/'): body = (self.folder/path.split(self.sha + '/')[1]).read_bytes()
        else: return self.send_error(404)
        self.send_response(200)
        for k, v in {'ETag': '"' + hashlib.sha1(body).hexdigest() + '"', 'X-Repo-Commit': self.sha, 'Content-Length': len(body)}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

def test_a_data_set_of_the_hub(project, monkeypatch, launcher):
    "Downloaded from a local server; the run records the revision, and works without the server from then on."
    source = project/'published'
    (source/'data').mkdir(parents=True)
    hf_rows(9).to_parquet(source/'data/train-00000-of-00001.parquet')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Hub, source))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(project/'hf'), HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_XET='1')
    try:
        job = launcher.python('-m', 'imgexp.cli', 'train', '--data', 'hf:us/pets', *SMALL, root=project, **env)
        assert job.wait() == 0, job.err
        run = find_run('', project/'runs')
        assert run.resolved['data'] == f'hf:us/pets@{Hub.sha}'
        job = launcher.python('-m', 'imgexp.cli', 'train', '--data', 'hf:us/cats', *SMALL, root=project, **env)
        assert job.wait() == 2 and "data='hf:us/cats' cannot be downloaded" in last_line(job.err), job.err
    finally: server.shutdown()
    job = launcher.python('-m', 'imgexp.cli', 'eval', run.name, '--split', 'valid', root=project, **env | {'HF_HUB_OFFLINE': '1'})
    assert job.wait() == 0, job.err

# -- description

def test_description_and_its_command(project, launcher):
    files(project/'shop', SHOP)
    job = launcher.imgexp('data', 'info', 'shop', '--classes-at', 'leaf', root=project)
    assert job.wait() == 0, job.err
    rows = [line.split(None, 1) for line in job.out.splitlines()]
    assert ['classes', '5: Cola 4, Drinks/Lime 4, Fruit/Lime 4, Gala 4, Golden 4'] in rows
    assert rows[-1] == ['train', 'imgexp train --data shop --classes-at leaf']
    assert any('no test split' in text for _, text in rows)
    job = launcher.imgexp(*rows[-1][1].split()[1:], *SMALL, root=project)
    assert job.wait() == 0, job.err
    job = launcher.imgexp('data', 'info', 'shop', '--json', root=project)
    assert job.wait() == 0 and json.loads(job.out)['classes'] == {'Drinks': {'train': 8, 'valid': 0, 'test': 0}, 'Fruit': {'train': 12, 'valid': 0, 'test': 0}}

def test_a_description_names_what_is_unusual(project):
    files(project/'photos', [f'a/{i}.png' for i in range(30)] + ['b/0.png'])
    (project/'photos/a/0.png').write_bytes(b'no image')
    (project/'labels.csv').write_text('file,label\nphotos/a/1.png,a\nphotos/b/0.png,b\nphotos/b/1.png,b\n')
    text = repr(describe_images(project/'photos'))
    for part in ('1 classes have fewer than 10 training images: b 1', '30 times', '1 of 31 sampled images cannot be read: a/0.png cannot be decoded', '12 × 10 px (30 PNG)'): assert part in text, text
    assert '1 files are missing, like photos/b/1.png' in repr(describe_images(project/'labels.csv'))

def test_stored_declarations_are_those_of_the_experiment():
    assert declared_experiment('03_train').params.declarations() == json.loads(json.dumps(EXPERIMENT.params.declarations()))
    assert from_declarations(EXPERIMENT.params.declarations())() == EXPERIMENT.params()

def test_metadata_of_splits_is_checked_too(project):
    files(project/'photos/train', [f'{i}.png' for i in range(6)])
    rows = 'file_name,label\n' + ''.join(f'{i}.png,{"ab"[i % 2]}\n' for i in range(6))
    (project/'photos/train/metadata.csv').write_text(rows + '0.png,b\n')
    with pytest.raises(InputError, match="train/0.png is 'a' in row 1 and 'b' in row 7"): load_images(project/'photos')
    (project/'photos/train/metadata.csv').write_text(rows + '9.png,b\n')
    with pytest.raises(InputError, match='1 of 7 files of photos are missing'): load_images(project/'photos')
    with pytest.raises(InputError, match='valid_fold=1: .*photos has folders for its splits'): load_images(project/'photos', valid_fold=1)

def test_tables_of_the_same_name_have_packs_of_their_own(project, monkeypatch):
    "Named by relative paths from two folders: the second pack does not take the place of the first."
    packs = []
    for place in ('one', 'two'):
        files(project/place/'photos', [f'{i}.png' for i in (range(6) if place == 'one' else reversed(range(6)))])
        (project/place/'photos/labels.csv').write_text(ROWS)
        monkeypatch.chdir(project/place)
        packs.append(build_pack('photos/labels.csv', 8, dest=project/'packs', say=quiet))
    assert packs[0] != packs[1] and all((p/'pack.json').exists() for p in packs)
