"Tests leave no trace: runs go to a temporary folder, and nothing is sent to Weights & Biases."
import os, shutil, tempfile
from pathlib import Path
import pytest
from launch import Launcher

_made = None

def pytest_configure(config):
    global _made
    if 'IMGEXP_ROOT' not in os.environ: _made = os.environ['IMGEXP_ROOT'] = tempfile.mkdtemp(prefix='imgexp-test-')
    os.environ.setdefault('WANDB_MODE', 'offline')
    os.environ.setdefault('WANDB_SILENT', 'true')
    os.environ.setdefault('MPLBACKEND', 'agg')

def pytest_unconfigure(config):
    if _made:
        shutil.rmtree(_made, ignore_errors=True)
        os.environ.pop('IMGEXP_ROOT', None)

@pytest.fixture(scope='session')
def root():
    "The checkout that holds these tests."
    return Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def launcher(tmp_path_factory):
    "Starts `imgexp …` and papermill as processes of their own."
    launcher = Launcher(tmp_path_factory.mktemp('jobs'))
    yield launcher
    launcher.close()

@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project: runs/ and the cache of file contents lie in a folder of this test."
    monkeypatch.setenv('IMGEXP_ROOT', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path
