"`pip install .` gives a library that imports and trains outside a checkout, with the notebooks in it."
import json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest
from check import ROOT

SOURCES = 'settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE imgexp nbs _quarto.yml'.split()

def run(*args, cwd, **env):
    "Run a command outside the checkout, and give its result; its messages are the failure."
    keep = {k: v for k, v in os.environ.items() if k not in ('IMGEXP_ROOT', 'PYTHONPATH', 'IN_TEST')}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=keep | env, capture_output=True, text=True)
    assert done.returncode == 0, f'{" ".join(map(str, args))}\n{done.stdout}{done.stderr}'
    return done.stdout

@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The wheel of this checkout, built from a copy so that nothing is left here; needs no network."
    pytest.importorskip('setuptools', '70.1')
    src, dist = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('dist')
    for name in SOURCES:
        if (ROOT/name).is_dir():
            shutil.copytree(ROOT/name, src/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.*'))
        else: shutil.copy2(ROOT/name, src)
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-build-isolation', '--no-deps', '--no-index', '-w', dist, src, cwd=dist)
    return next(dist.glob('*.whl'))

@pytest.fixture(scope='session')
def installed(wheel, tmp_path_factory):
    "The folder in which the wheel is installed."
    lib = tmp_path_factory.mktemp('lib')
    run(sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', lib, wheel, cwd=lib)
    return lib

def test_the_wheel_holds_the_library_the_notebooks_and_nothing_else(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if not re.match(r'imgexp-[^/]*\.dist-info/', n)]
    here = [*(ROOT/'imgexp').glob('*.py')], [*(ROOT/'nbs').glob('*.ipynb')]
    assert sorted(names) == sorted(['imgexp/experiments.json'] + [f'imgexp/{p.name}' for p in here[0]] + [f'imgexp/nbs/{p.name}' for p in here[1]])
    assert wheel.stat().st_size < 10e6

def test_the_wheel_names_its_license_command_and_extras(wheel):
    z = zipfile.ZipFile(wheel)
    info = {n.split('/', 1)[1]: z.read(n).decode() for n in z.namelist() if '.dist-info/' in n}
    assert 'imgexp = imgexp.cli:process' in info['entry_points.txt']
    assert any(n.endswith('LICENSE') for n in info)
    meta = info['METADATA']
    plain = [l for l in meta.splitlines() if l.startswith('Requires-Dist:') and 'extra ==' not in l]
    assert not re.search('tensorflow|keras|nbdev|jupyterlab', ' '.join(plain)), 'the main job needs none of these'
    for extra in ('all', 'keras', 'hub', 'lab', 'deploy', 'dev', 'bench'): assert f'Provides-Extra: {extra}' in meta

def test_imports_outside_a_checkout(installed, tmp_path):
    modules = sorted(p.stem for p in (installed/'imgexp').glob('*.py') if not p.stem.startswith('_'))
    light = [m for m in modules if not m.startswith('keras')]
    code = f'''import importlib, pathlib, imgexp
for m in {light}: importlib.import_module("imgexp." + m)
from imgexp.files import project_root
print(pathlib.Path(imgexp.__file__).parent.resolve()); print(pathlib.Path(project_root()).resolve())'''
    where, root = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()[-2:]
    assert Path(where) == (installed/'imgexp').resolve(), 'the checkout was imported, not the wheel'
    assert Path(root) == tmp_path.resolve(), 'without a checkout the root is the working folder'

@pytest.mark.skipif(not (ROOT/'nbs/03_train.ipynb').exists(), reason='there is no nbs/03_train.ipynb yet')
def test_trains_outside_a_checkout(installed, tmp_path):
    "papermill on the packaged notebook, in an empty folder: the run lands in its runs/."
    run(sys.executable, '-m', 'papermill', installed/'imgexp/nbs/03_train.ipynb', 'out.ipynb', '--no-progress-bar',
        '-p', 'epochs', '1', '-p', 'subset', '0.1', '-p', 'track', 'off', cwd=tmp_path, PYTHONPATH=str(installed))
    statuses = [json.loads(p.read_text()) for p in tmp_path.glob('runs/*/status.json')]
    assert [s['state'] for s in statuses] == ['done']
