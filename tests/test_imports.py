"Modules that lie in the working folder: those that a user names are found, those that have the name of others run nowhere."
import json, sys
from pathlib import Path

import nbformat, pytest
from imgexp.runs import Run

pytestmark = pytest.mark.usefixtures('project')

NAMES = 'statistics', 'random', 'json', 'tempfile', 'numpy', 'filelock', 'torch', 'optuna', 'papermill', 'imgexp'
MINE = '''
import random, statistics, filelock
def measure(x): return {'valid_loss': x + random.random()*0 + statistics.mean([0, 0])}
'''
NOTEBOOK = '''
import random, statistics, filelock, mine
from imgexp.params import *
from imgexp.start import *
p = params()
run = start_run('demo', p | {'track': 'off'})
if not run.finished: run.finish({'valid': {'top1': {'value': mine.measure(0.5)['valid_loss'], 'low': 0, 'high': 1, 'n': 10}}, 'seconds': 0.1})
import os
assert 'PYTHONSAFEPATH' not in os.environ, 'programs that a notebook starts are not concerned'
'''

@pytest.fixture
def place(project):
    "A working folder with modules named like others, each of which leaves a mark when it is imported; and `mine`, which is meant"
    for name in NAMES: (project/f'{name}.py').write_text(f'open({str(project/"hit")!r}, "a").write("{name}\\n")\nraise SystemExit("hostile {name}")')
    (project/'mine.py').write_text(MINE)
    cells = [nbformat.v4.new_code_cell("seed: int = 0\nresume: str = 'auto'", metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(NOTEBOOK)]
    kernel = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python 3'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project/'demo.ipynb')
    sweep = {'method': 'grid', 'metric': {'name': 'val_loss', 'goal': 'minimize'}, 'program': 'mine:measure', 'parameters': {'x': {'values': [0.1, 0.2]}}}
    (project/'s.yaml').write_text(json.dumps(sweep))
    return project

def hit(place): return (place/'hit').read_text() if (place/'hit').exists() else ''
IMGEXP = Path(sys.executable).with_name('imgexp')
ENTRY = pytest.mark.parametrize('entry', [['imgexp'], ['-m', 'imgexp.cli']], ids=['imgexp', 'python -m'])

def start(launcher, place, entry, *args):
    "As the console script does, or as torchrun does"
    return launcher.python(*([IMGEXP] if entry == ['imgexp'] else entry), *args, root=place)

@ENTRY
def test_a_sweep_of_a_function_of_the_working_folder(launcher, place, entry):
    "It is found, in the command and in its workers, and its namesakes of other modules are not imported."
    if entry[0] == '-m': (place/'imgexp.py').unlink()  # Python itself would run it
    job = start(launcher, place, entry, 'sweep', 'init', 's.yaml')
    assert job.wait() == 0, job.err
    job = start(launcher, place, entry, 'sweep', 'run', 's', '--jobs', '1')
    assert job.wait() == 0 and not hit(place), job.err + hit(place)
    assert json.loads((place/'runs/sweeps/s/best.json').read_text())['values'] == {'x': 0.1}

def test_a_batch_of_a_notebook(launcher, place):
    "Neither the workers nor the kernels import them; the notebook finds `mine`."
    job = start(launcher, place, ['imgexp'], 'batch', 'demo.ipynb', '-p', 'seed', '0')
    assert job.wait() == 0 and not hit(place), job.err + hit(place)
    assert [Run(d).metrics['valid']['top1']['value'] for d in (place/'runs').glob('2*')] == [0.5]
