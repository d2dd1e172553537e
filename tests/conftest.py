"Tests leave no trace: runs go to a temporary folder, and nothing is sent to Weights & Biases."
import os, shutil, tempfile
from pathlib import Path
import pytest

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
