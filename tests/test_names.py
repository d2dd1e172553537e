"A name may hold anything: what is no UTF-8, dollar signs, HTML, a formula, what a terminal obeys. It is shown, and never obeyed."
import csv, io, json, os
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from imgexp.data import Images, from_arrays, keep_classes
from imgexp.look import show_counts
from imgexp.sources import load_images
from imgexp.errors import InputError
from imgexp.start import find_run, start_run
from pictures import tree

pytestmark = pytest.mark.usefixtures('project')
SMALL = '--size 8 --epochs 1 --batch-size 8 --workers 0 --bad skip'.split()
RAW = [os.fsdecode(n) for n in (b'\xe9.png', b'=1+1.png', b'\x1b[31m.png', b'$x$ $.png')]

@pytest.fixture
def images(tmp_path):
    "Class folders and images whose names are no UTF-8; one image of each class cannot be decoded."
    root = tree(tmp_path/'images', 8)
    for old, new in (('circle', b'caf\xe9'), ('square', b'$\\a{$')):
        folder = (root/old).rename(root/os.fsdecode(new))
        for i, name in enumerate(RAW): (folder/f'{i:03d}.png').rename(folder/name)
        (folder/RAW[0]).write_bytes(b'none')
    return root

def ended(job, code=0):
    assert job.wait() == code and 'Traceback' not in job.err, job.err
    return job.out

# -- names that are no UTF-8, and terminals

def test_files_and_classes_that_are_no_utf8(images, project, launcher):
    "Trained with, tracked, evaluated, predicted, packed and checked; CSV files have them as escapes, JSON as they are."
    for k in ('one', 'two'): (project/k).mkdir()
    train = launcher.imgexp('train', '--data', images, *SMALL, '--track', 'offline', root=project)
    check = launcher.imgexp('data', 'check', images, '--csv', 'found.csv', '--sheet', 'sheet.png', root=project)
    pack = launcher.imgexp('data', 'pack', images, '--size', 8, '--dest', project/os.fsdecode(b'\xe9'), root=project)
    transfer = launcher.imgexp('transfer', '--data', images, '--size', 32, '--epochs', 1, '--bad', 'skip', '--track', 'off', root=project/'one')
    stop = launcher.imgexp('train', '--data', images, *SMALL, '--bad', 'stop', '--track', 'off', root=project/'two')
    assert 'top1' in ended(train) and 'tracking' not in train.out + train.err
    run = find_run('', project/'runs')
    assert run.metrics['skipped'].keys() == {r'caf\xe9/\xe9.png', r'$\a{$/\xe9.png'}
    assert r'caf\xe9/\xe9.png is not an image' in ended(check) and r'caf\xe9/\xe9.png' in (project/'found.csv').read_text()
    ended(stop, 1)
    assert r'\xe9.png is not an image' in ended(launcher.imgexp('runs', 'ls', '--json', root=project/'two'))
    assert r'\xe9/images-jpeg-8-' in ended(pack) and 'top1' in ended(transfer)
    jobs = {how: launcher.imgexp('predict', run.name, images, *how.split(), root=project, PYTHONIOENCODING=code)
            for how, code in (('', 'utf-8'), ('--json', 'ascii'))}
    table = pd.read_csv(io.StringIO(ended(jobs['']))).set_index('file')
    assert set(table.predicted.dropna()) <= {r'caf\xe9', r'$\a{$'} and 'not an image' in table.error[r'caf\xe9/\xe9.png']
    assert {os.path.basename(r['file']) for r in json.loads(ended(jobs['--json']))} > set(RAW)

def test_classes_that_are_no_utf8_are_named_as_they_are_shown(images):
    table = load_images(images)
    assert table.classes == [r'$\a{$', r'caf\xe9'] and (Path(table.source.root)/table.items[-1]).exists()
    for name in (r'caf\xe9', os.fsdecode(b'caf\xe9')):
        assert load_images(images, rf'$\a{{$,{name}').classes == keep_classes(table, name + r',$\a{$').classes == table.classes
    (images/r'caf\xe9').mkdir()
    with pytest.raises(InputError, match=r'two class folders of images have the same printable name caf\\xe9: rename'): load_images(images)

def test_a_terminal_obeys_no_name(images, project, launcher):
    "Neither in tables nor in messages, whatever its encoding; what the encoding lacks is an escape."
    (images/'日本').mkdir(); (images/'日本/\x1b[2Ja\u202eb.png').write_bytes(b'none')
    jobs = [launcher.imgexp('data', 'check', images, root=project, PYTHONIOENCODING=code, before=f'for s in (sys.stdout, sys.stderr): s.reconfigure(encoding={code!r}, errors="strict")') for code in ('ascii', 'utf-8')]
    refused = launcher.imgexp('data', 'info', 'x\x1b[31m', root=project), launcher.imgexp('predict', 'x', '/no\x1b[31m', root=project)
    for job, name in zip(jobs, (r'\u65e5\u672c', '日本')):
        out = ended(job)
        assert name + r'/\x1b[2Ja\u202eb.png' in out and '\x1b' not in out
    for job in refused: assert job.wait() == 2 and '\x1b' not in job.err

def test_a_table_that_follows_a_sweep_has_names_as_they_are():
    "What rich takes for a style is a name."
    from imgexp.cli_sweep import _live
    table = pd.DataFrame({'state': ['done'], 'top1': [1.], 'trained': [1], '[/b]': ['[/red]']})
    live = _live(SimpleNamespace(table=lambda: table, best=lambda: {'value': 1.}, metric=SimpleNamespace(name='top1'), varying=['[/b]'], limit=1))
    live.console.file, live.console.width = io.StringIO(), 120
    live.console.print(live.get_renderable())
    assert '[/b]=[/red]' in live.console.file.getvalue()

# -- spreadsheets

def test_no_name_is_a_formula(project, launcher):
    "CSV files have an apostrophe before what a spreadsheet would compute; JSON has names as they are."
    run, photos = start_run('03_train', {'data': 'digits'}), project/'photos'
    names = ['=1+1.png', '+1.png', '-1.png', '@a.png', "'a.png", 'a=b.png']
    photos.mkdir()
    for n in names: (photos/n).write_bytes(b'none')
    run.finish({})
    before = '''
import imgexp.evaluate, pandas
from imgexp.folders import image_files
def predict(self, folder): return pandas.DataFrame({'file': sorted(image_files(folder)), 'predicted': '=cmd', 'probability': -0.5, 'error': None})
imgexp.evaluate.load_run = lambda *args: type('Run', (), {'predict': predict})()
'''
    table, raw = (launcher.imgexp('predict', 'x', photos, *more, root=project, before=before) for more in ([], ['--json']))
    rows = list(csv.reader(io.StringIO(ended(table))))[1:]
    assert sorted(r[0] for r in rows) == sorted([*("'" + n for n in names[:5]), names[5]]) and rows[0][1:3] == ["'=cmd", '-0.5']
    assert sorted(r[0].removeprefix("'") for r in rows) == sorted(r['file'] for r in json.loads(ended(raw))) == sorted(names)
    tree(project/'images', 3)
    for c in ('circle', 'square'): (project/'images'/c).rename(project/'images'/f'={c}')
    ended(launcher.imgexp('data', 'check', 'images', '--csv', 'found.csv', root=project))
    found = list(csv.DictReader((project/'found.csv').open()))
    assert {"'=circle", "'=square"} == {r['class'] for r in found} and found[0]['finding'] == '1'

# -- pictures

MATH = [r'$\a{$', '日 $_$']  # not one of them can be read as mathematics

def sweep_of(name):
    "Four trials, whose names are all the same."
    rows = [dict(trial=i, state='done', value=i/4, values={name: [name, 'b'][i % 2], 'rate': 10**-i, 'n': i % 3}) for i in range(4)]
    kinds = {name: 'categorical', 'rate': 'log_uniform', 'n': 'int_uniform'}
    return SimpleNamespace(rows=lambda: rows, name=name, metric=SimpleNamespace(name=f'{name} of all', lower=False),
                           by_name={k: SimpleNamespace(distribution=d) for k, d in kinds.items()})

def pictures(name, folder):
    "Every picture in which names are drawn"
    from imgexp import metrics, sweep_figures
    from imgexp.check import check
    from imgexp.loader import show_batch
    classes = [f'{name} {i}' for i in range(24)]
    pixels, labels = np.zeros((72, 8, 8), np.uint8), np.arange(72) % 24
    probs = np.eye(24, dtype=np.float32)[(labels + (np.arange(72) > 40)) % 24]*0.9 + 0.1/24
    yield show_counts(from_arrays(pixels, labels, classes))
    yield show_batch(pixels, labels, classes)
    yield metrics.plot_confusion(metrics.confusion(labels, probs.argmax(1), 24), classes)
    yield metrics.plot_confusion(np.eye(5, dtype=int), classes[:5])
    yield metrics.plot_per_class(metrics.per_class(probs, labels, classes))
    yield metrics.plot_predictions(pixels, probs, labels, classes)
    yield metrics.plot_mistakes(pixels, probs, labels, classes)
    root = tree(folder, 3)
    for c in ('circle', 'square'): (root/c).rename(root/f'{name} {c}')
    (root/f'{name} circle'/f'{name}.png').write_bytes(b'none')
    yield check(root).sheet()
    for draw in sweep_figures._PLOTS.values(): yield draw(sweep_of(name), static=True)

@pytest.mark.filterwarnings('ignore:Glyph')
@pytest.mark.parametrize('name', MATH)
def test_dollar_signs_are_drawn(name, tmp_path):
    "A name between dollar signs is no mathematics, in any picture: what is drawn is the name."
    from matplotlib.cbook import is_math_text
    from matplotlib.text import Text
    for i, fig in enumerate(pictures(name, tmp_path/'images')):
        fig.savefig(io.BytesIO())
        texts = [t.get_text() for t in fig.findobj(Text) if '$' in t.get_text()]
        assert texts and not any(map(is_math_text, texts)), (i, texts)

# -- HTML

HTML = '<img src=x onerror=alert(1)>'

class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = set(), ''
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.found.add(tag)
    def handle_data(self, data): self.text += data

def _run(**params):
    run = start_run('03_train', params)
    run.fail(RuntimeError(HTML))
    return run

def _network():
    from imgexp.models import build_model
    import torch
    net = build_model('compact_resnet', 2)
    torch.save(net.state_dict(), f'{HTML}.pth')
    return build_model('compact_resnet', 2, weights=f'{HTML}.pth')

def _summary():
    from imgexp.cost import summary
    net = _network()
    net.arch = HTML
    return summary(net)

def _trained():
    from imgexp.trained import Trained
    return Trained(_run(data=HTML), None, {'arch': HTML, 'classes': [HTML], 'size': 8}, HTML, 'fp32')

def _report():
    from imgexp.check import check
    root = tree(Path(HTML), 3)
    (root/'circle').rename(root/HTML)
    (root/HTML/f'{HTML}.png').write_bytes(b'none')
    return check(root)

def _plan():
    from imgexp.batch import Plan
    return Plan(Path(HTML), [{'data': HTML, HTML: 1}], ['run'], [None])

def _parameters():
    from imgexp.params import Parameters, param
    class Named(Parameters): data: str = param(HTML, HTML)
    return Named.of({'data': HTML + HTML})

def _table_of_runs():
    from imgexp.run_table import list_runs
    _run(data=HTML); _run(data='digits')
    return list_runs()

def _block():
    from imgexp.networks import Block, Blocks
    return Blocks([Block(HTML, [SimpleNamespace()], [])])

def _recipe():
    from imgexp.recipes import Recipe
    return Recipe({HTML: HTML}, HTML, HTML, HTML, HTML)

CARDS = {'parameters': lambda: _parameters(), 'run': lambda: _run(data=HTML), 'runs': _table_of_runs, 'trained': _trained,
         'images': lambda: Images(np.array([HTML], object), np.zeros(1, int), np.zeros(1, np.int8), [HTML], name=HTML), 'weights': lambda: _network().report,
         'summary': _summary, 'block': _block, 'report': _report, 'batch': _plan, 'recipe': _recipe,
         'findings': lambda: _report().table(), 'kinds': lambda: _report().kinds(),
         'prediction': lambda: pd.DataFrame({'file': [HTML], HTML: 1}, index=[HTML])}

@pytest.mark.parametrize('card', CARDS)
def test_no_name_is_html(card, project, monkeypatch):
    "What notebooks show has names as text, wherever they come from: files, folders, classes, weights, runs, checkpoints, parameters, errors."
    monkeypatch.chdir(project)
    seen = Tags(CARDS[card]()._repr_html_())
    assert not seen.found & {'img', 'script'} and '<img src' in seen.text

def test_no_name_is_html_in_plotly():
    "Its labels are HTML, the ticks of parallel coordinates aside; and nothing ends the script of a saved figure."
    from imgexp import sweep_figures
    name = HTML + '</script> $x$'
    def strings(v, key=''):
        if isinstance(v, dict): return [s for k, w in v.items() for s in strings(w, k)]
        if isinstance(v, (list, tuple)): return [s for w in v for s in strings(w, key)]
        return [v] if isinstance(v, str) else []
    for kind, draw in sweep_figures._PLOTS.items():
        fig = draw(sweep_of(name))
        figure = {k: v for k, v in json.loads(fig.to_json()).items() if k == 'data' or k == 'layout'}
        figure['layout'].pop('template')
        if kind == 'parallel':
            assert any(name in d['ticktext'] for d in figure['data'][0]['dimensions'])
            for d in figure['data'][0]['dimensions']: d.pop('ticktext')
        shown = strings(figure)
        assert any('&lt;img' in s for s in shown) and not any('<img' in s or '$' in s for s in shown), kind
        assert name not in fig.to_html(include_plotlyjs=False)
