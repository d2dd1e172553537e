"On an NVIDIA GPU: `python -m pytest tests -m cuda` (part of `make gpu`)."
import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')]

def learner(device, precision='fp32', **kw):
    from imgexp.data import keep_subset
    from imgexp.samples import digits
    from imgexp.learner import make_learner
    from imgexp.loader import normalization
    from imgexp.models import build_model
    table = keep_subset(digits(), 0.3, seed=0)
    model = build_model('compact_resnet', len(table.classes), size=32)
    return make_learner(table, model, normalization(table, 32), device=device, size=32, batch_size=32, precision=precision, **kw)

def trained(project, device, name, **kw):
    from imgexp.fit import fit
    from imgexp.start import start_run
    options = {k: kw.pop(k) for k in ('epochs', 'ema', 'mixup') if k in kw}
    learn, run = learner(device, **kw), start_run(name, dict(track='off', resume='never'))
    fit(run, learn, lr=0.01, **dict(epochs=2) | options)
    return run, learn

def test_the_loader_gives_the_same_batches_as_on_the_processor():
    from imgexp.samples import shapes
    from imgexp.loader import Loader
    here, there = (Loader(shapes(200), 'train', 32, 16, augment='crop-flip', workers=2, device=d, seed=3) for d in ('cpu', 'cuda'))
    for (a, y), (b, z) in zip(here.at(1), there.at(1)): assert b.is_cuda and torch.equal(a, b.cpu()) and torch.equal(y, z.cpu())

def test_a_training_learns_as_on_the_processor(project):
    "The same loss up to rounding after one epoch in fp32."
    (a, _), (b, _) = (trained(project, d, f'on-{d}', epochs=1) for d in ('cpu', 'cuda'))
    assert np.allclose(a.history.train_loss, b.history.train_loss, rtol=0.02)

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_two_trainings_end_alike(project, precision):
    "The kernels of a small ResNet give the same bits twice, so that exact resume can be tested on this GPU."
    (_, a), (_, b) = (trained(project, 'cuda', f'twice-{k}', precision=precision, ema=0.9, mixup=0.2) for k in range(2))
    differ = [k for k, v in a.model.state_dict().items() if not torch.equal(v, b.model.state_dict()[k])]
    assert not differ, f'these tensors differ between two equal trainings: {differ[:5]}'

def test_memory_is_freed(project):
    "A second training in the same process takes no more memory than the first."
    peaks = []
    for k in range(2):
        torch.cuda.reset_peak_memory_stats()
        trained(project, 'cuda', f'memory-{k}', epochs=1)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.05*peaks[0], peaks

def test_a_lack_of_memory_is_recognized():
    from imgexp.learner import is_out_of_memory
    with pytest.raises(Exception) as error: torch.empty(10**15, dtype=torch.uint8, device='cuda')
    assert is_out_of_memory(error.value)
