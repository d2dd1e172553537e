"What the benchmarks rest on: measurements that go on, tables of one processor, rivals that do the same work."
import json, subprocess, sys
from pathlib import Path

import numpy as np, pytest

BENCH = Path(__file__).resolve().parent.parent/'bench'
sys.path.insert(0, str(BENCH))
import data, tables

@pytest.fixture
def partial(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'PARTIAL', tmp_path/'partial')

def test_a_table_goes_on_where_it_was_interrupted(partial):
    "No value is measured twice, the order A B A B stays, and a contender that is slow has fewer rounds."
    seen = []
    def contender(name, fails_at=None):
        def run():
            if fails_at == len(seen): raise KeyboardInterrupt
            seen.append(name)
            return float(len(seen))
        return run
    with pytest.raises(KeyboardInterrupt): tables.interleave('t', {'a': contender('a'), 'b': contender('b', 4), 'slow': (contender('slow'), 1)}, 3)
    assert seen == ['a', 'b', 'slow', 'a']
    found = tables.interleave('t', {'a': contender('a'), 'b': contender('b'), 'slow': (contender('slow'), 1)}, 3)
    assert seen == ['a', 'b', 'slow', 'a', 'b', 'a', 'b'] and {k: len(v) for k, v in found.items()} == {'a': 3, 'b': 3, 'slow': 1}
    tables.discard_progress('t')
    assert not list(tables.PARTIAL.iterdir())

def test_a_table_is_not_continued_otherwise(partial, monkeypatch):
    "Values of two processors, of two settings or of other code do not get into one table."
    run = {'a': lambda: 1.}
    tables.interleave('t', run, 1, settings={'images': 'x'})
    with pytest.raises(SystemExit, match='images was x and is y.*delete it'): tables.interleave('t', run, 1, settings={'images': 'y'})
    monkeypatch.setattr(tables, 'machine', lambda device: {'cpu': 'another one'})
    with pytest.raises(SystemExit, match='cpu was .* and is another one'): tables.interleave('t', run, 1, settings={'images': 'x'})
    monkeypatch.undo()

def test_ratios_of_fewer_rounds_are_over_the_median():
    rows = {r['contender']: r for r in tables.compare('t', {'a': [1., 2., 9.], 'b': [2., 4., 18.], 'once': [8.]}, {})}
    assert rows['b']['ratio'] == 2 and rows['once'] | {'ratio': 4., 'ratio_min': 4., 'ratio_max': 4., 'n': 1} == rows['once']

def test_the_readme_holds_what_the_files_hold():
    "`python bench/tables.py` writes it; each of its tables comes from one processor."
    assert tables.readme() == (BENCH/'README.md').read_text(), 'run `python bench/tables.py`'
    rows = [dict(table='t', contender=c, device='cpu', cpu=cpu, cores='2', threads='2', date=day) for c, cpu, day in (('a', 'X', '2026-01-02'), ('b', 'Y', '2026-01-01'))]
    assert [r['contender'] for r in tables.newest(rows)['t']] == ['a']
    with pytest.raises(AssertionError, match='several machines'): tables.markdown('t', rows)

@pytest.fixture
def photo():
    "A JPEG of 400 × 533 px with colors that change slowly"
    import simplejpeg
    y, x = np.mgrid[:533, :400]
    return simplejpeg.encode_jpeg(np.stack([x*255//400, y*255//533, (x + y)*255//933], 2).astype(np.uint8), 95)

@pytest.mark.parametrize('shrunk', [1, 2])
def test_decoders_that_shrink_show_the_same_crop(photo, monkeypatch, shrunk):
    "Pillow with draft and libjpeg-turbo give what Pillow gives from the whole image."
    import io
    from PIL import Image
    box = 60, 40, 300, 280  # top, left, height, width
    monkeypatch.setattr(data, 'SIZE', 112)
    monkeypatch.setattr(data, '_crop', lambda height, width: (box, shrunk))
    monkeypatch.setattr(data.random, 'random', lambda: 1.)  # not mirrored
    image = Image.open(io.BytesIO(photo))
    want = np.asarray(image.crop((40, 60, 320, 360)).resize((112, 112), Image.Resampling.BILINEAR), int)
    drafted = Image.open(io.BytesIO(photo))
    for name, got in {'draft': np.asarray(data._Drafted()(drafted)), 'turbo': data._Turbo()(photo).numpy()}.items():
        assert got.shape == want.shape and abs(got - want).max() <= 6, name
    assert drafted.size == (400//shrunk, -(-533//shrunk))

def test_features_extracted_once_are_those_of_every_epoch(tmp_path, monkeypatch, capsys):
    "The script that keeps features learns the same from the file as from the images, to the last digit."
    import usual_transfer
    from pictures import tree
    for split in usual_transfer.SPLITS: tree(tmp_path/'images'/split, 4)
    told = []
    for _ in range(2):
        monkeypatch.setattr(sys, 'argv', ['usual_transfer', str(tmp_path/'images'), '--arch', 'resnet18', '--size', '32', '--epochs', '2', '--once', '--train', 'layer4', '--keep', str(tmp_path/'kept.pt')])
        usual_transfer.main()
        told.append({k: v for k, v in json.loads(capsys.readouterr().out.splitlines()[-1]).items() if k not in ('seconds', 'epochs')})
    assert (tmp_path/'kept.pt').exists() and told[0] == told[1]

def test_every_script_says_what_it_takes():
    "And its tables have names."
    scripts = ('budget', 'data', 'recipes', 'sweep', 'train', 'transfer', 'transfer_accuracy', 'usual_transfer')
    code = f"import sys\nfor name in {scripts}:\n    sys.argv = [name, '--help']\n    try: __import__(name).main()\n    except SystemExit as e: assert not e.code"
    done = subprocess.run([sys.executable, '-c', code], cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('usage: ') == len(scripts)
