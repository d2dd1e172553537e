"Explanations: the report says what is there, learns nothing from test images, and writes the same bytes twice."
import json, re

import cv2
import numpy as np
import pytest
import torch

from imgexp.checkpoints import read_weights
from imgexp.errors import InputError
from imgexp.evaluate import load_run
from imgexp.explain import explain_run
from imgexp.explain_report import sentences
from imgexp.class_augment import read_recommendations
from imgexp.samples import shapes
from imgexp.train import train
from imgexp.transfer import train as train_head
from imgexp.trained import weights_path

pytestmark = pytest.mark.usefixtures('project')
SMALL = dict(arch='compact_resnet', size=32, lr=0.01, augment='none', batch_size=32, precision='fp32', track='off', workers=0, figures=False)

def photos(folder, change=lambda image, label: image, classes=('circle', 'square', 'cross', 'arrow'), n=400):
    "A folder of drawn photos; `change` may mark them."
    table = shapes(n*10//len(classes), size=32)
    for row in range(len(table)):
        name = table.classes[table.labels[row]]
        if name not in classes: continue
        path = folder/('train', 'valid', 'test')[table.splits[row]]/name
        path.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path/f'{row}.png'), change(table.source.read(row).copy(), name)[..., ::-1])
    return folder

def mark(image, name):
    if name == 'square': image[:7, -7:] = 255
    return image

def test_report(project):
    run = train(data='digits', epochs=2, **SMALL)
    e = explain_run(run=run.name, per_class=2)
    files = {f.name: f.read_bytes() for f in e.folder.iterdir()}
    assert {*files} == {'report.html', 'explain.json', 'recommendations.json'}
    facts = json.loads(files['explain.json'])
    assert facts['top1'] == load_run(run.name).evaluate('valid')['top1'] and facts['n'] == len(facts['images'])
    assert sum(i['true'] == i['predicted'] for i in facts['images']) == round(facts['top1']['value']*facts['n'])
    page = files['report.html'].decode()
    assert str(project) not in page and 'http' not in re.sub(r'http-equiv', '', page) and page.count('<figure') <= 10*(4 + 10)
    assert max(len(f) for f in re.findall(r'<figure.*?</figure>', page)) < 5000
    again = load_run(run.name).explain(per_class=2)
    assert {f.name: f.read_bytes() for f in again.folder.iterdir()} == files and again.folder == e.folder
    assert explain_run(run=run.name, per_class=1).folder != e.folder

def test_nothing_is_learned_from_test_images(project, tmp_path):
    run = train(data='digits', epochs=1, **SMALL)
    e = explain_run(run=run.name, split='test', per_class=1)
    assert e.recommendations is None and {f.name for f in e.folder.iterdir()} == {'report.html', 'explain.json'}
    valid = explain_run(run=run.name, per_class=1).folder/'recommendations.json'
    read_recommendations(valid, run_classes := load_run(run.name).classes)
    forged = tmp_path/'r.json'
    forged.write_text(json.dumps(json.loads(valid.read_text()) | {'split': 'test'}))
    with pytest.raises(InputError, match='must come from validation images'): read_recommendations(forged, run_classes)

def test_a_mark_in_a_corner_is_found(project, tmp_path):
    "And nothing where there is none."
    def corners(name, change):
        run = train(data=str(photos(tmp_path/name, change)), epochs=12, **SMALL)
        e = explain_run(run=run.name, per_class=1, probes=False)
        return [(r[1], r.region) for r in e.findings.corners.itertuples()], e
    found, e = corners('marked', mark)
    assert ('square', 'top right') in found and {c for c, _ in found} == {'square'}
    assert any('The maps of square lie in the top right corner' in s for s in sentences(e.findings))
    assert not corners('clean', lambda image, name: image)[0]

def test_maps_of_kept_weights_leave_the_training_alone(project):
    def weights(run): return [read_weights(*weights_path(run, name))[0] for name in ('best', 'last')]
    kw = dict(data='digits', epochs=2, keep_weights='0,1', **SMALL)
    plain, drawn = train(**kw), train(**kw, explain=3, resume='never')
    assert all(torch.equal(a[k], b[k]) for a, b in zip(weights(plain), weights(drawn)) for k in a)
    assert (drawn.dir/'figures/maps.png').stat().st_size > 1000 and not (plain.dir/'figures/maps.png').exists()
    head = train_head(data='digits', arch='compact_resnet', size=32, epochs=2, explain=3, track='off', workers=0)
    assert (head.dir/'figures/maps.png').exists()

def test_names_are_escaped(project, tmp_path):
    folder = tmp_path/'evil'
    for split in ('train', 'valid', 'test'):
        for c in ('<script>alert(1)', 'a&b"'):
            (folder/split/c).mkdir(parents=True)
            for k in range(6): cv2.imwrite(str(folder/split/c/f'<b>{k}.png'), np.random.default_rng(k).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    run = train(data=str(folder), epochs=1, **SMALL)
    page = explain_run(run=run.name, per_class=2).report.read_text()
    assert '<script>alert' not in page and '&lt;script&gt;alert(1)' in page and '<b>0.png' not in page and 'a&b"' not in page

@pytest.mark.parametrize('args, message', [
    (['--classes', 'seven'], "'seven' is not a class of the network: choose from 0, 1"), (['--layer', 'layer9'], "layer='layer9' is not known"), (['--split', 'train'], 'split='),
    (['--checkpoint', 'first'], "has no checkpoint 'first'"), (['--per-class', '0'], 'per_class=0'), (['--out', 'map.png'], '--out is for a photo'),
    (['photo.png'], 'give --out map.png'), (['none.png', '--out', 'map.png'], 'no such image'), (['text.jpg', '--out', 'map.png'], 'not an image that can be read'), (['text.jpg', '--out', 'map.png', '--split', 'test'], '--split is for the images of a split'),
    (['.', '--out', 'map.png'], 'is a folder'), (['--check'], 'the grid game needs photos of four classes'),
    (['text.jpg', '--out', 'map.gif'], 'ends in .png'), (['--layer', 'fc'], 'not a map')])
def test_bad_input(project, launcher, args, message):
    run = train(data='digits', subset=0.1, epochs=1, **SMALL)
    (project/'text.jpg').write_text('no image')
    job = launcher.imgexp('explain', run.name, *args, root=project, cwd=project)
    assert job.wait() == 2 and message in job.err and 'Traceback' not in job.err and job.err.strip().splitlines()[-1].startswith('imgexp: '), job.err
    assert not (run.dir/'explain').exists() and not (project/'map.png').exists()

def test_data_that_changed_or_went(project, launcher, tmp_path):
    folder = photos(tmp_path/'photos', n=80)
    run = train(data=str(folder), epochs=1, **SMALL)
    def fails(message):
        job = launcher.imgexp('explain', run.name, root=project, cwd=project)
        assert job.wait() == 2 and message in job.err and job.err.count('\n') <= 2, job.err
    first = next((folder/'train').rglob('*.png'))
    first.unlink()
    fails('are missing or have changed')
    folder.rename(tmp_path/'elsewhere')
    fails('are missing or have changed')

def test_a_keras_run_has_no_maps(project, launcher):
    from imgexp.start import start_run
    with start_run('10_keras_cnn', dict(data='digits', track='off')) as run: run.finish({})
    job = launcher.imgexp('explain', run.name, root=project, cwd=project)
    assert job.wait() == 2 and job.err.count('\n') == 1, job.err
    (project/'a.png').touch()
    job = launcher.imgexp('explain', run.name, 'a.png', '--out', 'map.png', root=project, cwd=project)
    assert job.wait() == 2 and 'maps need a PyTorch network' in job.err, job.err

def test_checks_use_photos_of_all_classes(monkeypatch):
    "Rows of a table are in the order of their classes, so the first ones would be of two."
    import imgexp.map_checks as m
    from imgexp.models import build_model
    labels, seen = np.repeat(np.arange(10), 20), []
    monkeypatch.setattr(m, 'insertion_deletion', lambda model, images, maps, labels, norm: seen.extend(labels) or {})
    m.check_maps(build_model('compact_resnet', 10, size=32), np.zeros((200, 32, 32, 3), np.uint8), labels, m.draw_mosaics(np.eye(10)[labels], labels, 200), ((0.5,)*3, (0.5,)*3), n_images=20)
    assert np.bincount(seen, minlength=10).tolist() == [2]*10

def test_a_gain_is_not_called_noise():
    from imgexp.probes import probe_table
    from imgexp.recommendations import recommend
    labels = np.zeros(200, int)
    predictions = {'': (np.arange(200) < 40).astype(int), 'gray': labels}
    refused = recommend(probe_table(predictions, labels), predictions, labels, ['a', 'b'])[1]
    assert refused[0]['reason'].endswith('no loss') and '−20.0 points' in refused[0]['reason']

def test_channel_maps_are_those_of_their_photos():
    "The best rows of each channel, found over several batches, keep their own activations."
    import torch
    from types import SimpleNamespace
    from imgexp.split_maps import Channels
    rng = np.random.default_rng(0)
    activations, labels = rng.random((30, 5, 2, 2)).astype(np.float32), rng.integers(0, 3, 30)
    channels = Channels(3, 5, top=4)
    for rows in np.split(np.arange(30), 3):
        a = torch.from_numpy(activations[rows])
        channels.add(SimpleNamespace(activations=a, channel_weights=lambda targets: torch.ones(len(targets), 5)), torch.from_numpy(labels[rows]), rows)
    for c in range(5):
        best = np.argsort(-activations[:, c].mean((1, 2)))[:4]
        assert channels.rows[c].tolist() == best.tolist()
        np.testing.assert_array_equal(channels.maps[c], activations[best, c])
