"The short form of `make torture`: all features on, killed at random, also inside the writing of a checkpoint."
import pytest
from torture import FEATURES, torture

pytestmark = pytest.mark.usefixtures('project')

@pytest.mark.parametrize('name,kills', [('everything', 6), ('everything, two processes', 3), ('dropout', 3)])
def test_killed_again_and_again(launcher, tmp_path, name, kills):
    row, = torture([name], kills, seed=1, folder=tmp_path, launcher=launcher)
    assert (row['kills'], row['equal']) == (kills, 'yes')

def test_every_ingredient_has_its_turn():
    "A parameter of `train` that shapes the training, and is in no row of the matrix, would be forgotten here."
    import inspect
    from imgexp.train import train
    aside = set('data classes subset recipe weights size crop epochs batch_size momentum weight_decay best_by seed seed_subset seed_order seed_init '
                'pack max_minutes resume track upload warmup keep_best'.split())
    given = {k for v in FEATURES.values() for k in v}
    assert set(inspect.signature(train).parameters) - aside <= given
