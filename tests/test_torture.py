"The short form of `make torture`: all features on, killed at random, also inside the writing of a checkpoint."
import pytest
from torture import FEATURES, torture

pytestmark = pytest.mark.usefixtures('project')

@pytest.mark.parametrize('name,kills', [('everything', 6), ('everything, two processes', 3), ('dropout', 3)])
def test_killed_again_and_again(launcher, tmp_path, name, kills):
    row, = torture([name], kills, seed=1, folder=tmp_path, launcher=launcher)
    assert (row['kills'], row['equal']) == (kills, 'yes')

def test_a_fine_tuned_transfer_on_two_threads(launcher, tmp_path):
    "Features that were half-written, a head, then everything; the undisturbed run has two threads as well."
    row, = torture(['transfer, retrain, fine-tuned'], 2, seed=1, folder=tmp_path, launcher=launcher, threads=(2,))
    assert (row['kills'], row['threads'], row['equal']) == (2, 2, 'yes')

def test_photos_are_taken_from_class_folders(tmp_path):
    "As many as there are drawn shapes; where there are too few, it says so."
    from torture import images
    for k in range(5):
        (tmp_path/'all'/'train'/f'c{k}').mkdir(parents=True)
        for i in range(3 if k == 0 else 41): (tmp_path/'all'/'train'/f'c{k}'/f'{i}.jpg').write_bytes(b'photo')
    data, broken = images(tmp_path, tmp_path/'all')
    assert [len(list(d.iterdir())) for d in sorted(data.iterdir())] == [40]*4 and not (data/'c0').exists()
    assert sum(f.read_bytes() != b'photo' for f in broken.rglob('*.jpg')) == 1
    with pytest.raises(ValueError, match='4 class folders of at least 40 images'): images(tmp_path/'other', tmp_path/'all'/'train'/'c1')

def test_every_ingredient_has_its_turn():
    "A parameter of `train` that shapes the training, and is in no row of the matrix, would be forgotten here."
    import inspect
    from imgexp.train import train
    aside = set('data classes subset recipe weights size min_scale epochs batch_size momentum weight_decay best_by seed seed_subset seed_order seed_init shrink '
                'pack max_minutes resume track upload warmup keep_best threads label_from classes_at columns valid_fold hold_out resplit head_init states figures'.split())
    given = {k for v in FEATURES.values() for k in v}
    assert set(inspect.signature(train).parameters) - aside <= given
