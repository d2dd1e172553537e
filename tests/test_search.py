"Searching a store: sharing, halving, spilling and recomputing change the time, never a score."
import numpy as np
import pytest
import torch
from imgexp import snapshot_features as module
from imgexp.errors import InputError
from imgexp.manifests import Origin
from imgexp.models import build_model
from imgexp.networks import block_tensors
from imgexp.prefix_tree import build_trees
from imgexp.search import search
from imgexp.search_params import SearchParams
from imgexp.store import Store
from imgexp.tensor_files import TensorFile, from_torch

QUIET = dict(say=lambda text: None)

@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "A base and seven relatives of it, in two architectures."
    store = Store(tmp_path_factory.mktemp('store')/'store', create=True)
    for arch in ('compact_resnet', 'mobilenet_v2'):
        model = build_model(arch, 10, size=32)
        state, blocks = model.state_dict(), [*block_tensors(model).values()]
        for k in range(4 if arch == 'compact_resnet' else 3):
            generator = torch.Generator().manual_seed(k)
            own = [key for keys in blocks[len(blocks) - 1 - k:] for key in keys]
            new = {key: v + 0.3*v.std()*torch.randn(v.shape, generator=generator) if key in own and v.ndim > 1 else v for key, v in state.items()}
            store.add_tensors(f'{arch}-{k}', TensorFile({n: from_torch(n, v) for n, v in new.items()}, {}), Origin(arch, size=32, classes=[str(c) for c in range(10)]))
    return store

def params(store, **given): return SearchParams.check({'store': str(store.dir), 'data': 'digits', 'images': 400, 'first': 50, 'batch_size': 64} | given)

def test_features_are_those_of_the_network(store):
    "To the last bits of single precision: each snapshot by itself, on the same images."
    p = params(store, exhaustive=True)
    result, target = search(p, **QUIET), module.load_target(p)
    x = module.to_input(target.pixels(32, 0, 400), build_trees(store.snapshots())[0].norm)
    for name, features in result.features.items():
        model = store.network(name)
        with torch.inference_mode(): logits = model(x)
        head = model.fc if hasattr(model, 'fc') else model.classifier[1]
        with torch.inference_mode(): ours = head(torch.from_numpy(features))
        assert torch.allclose(ours, logits, atol=2e-4, rtol=1e-3), name

def test_sharing_changes_no_score(store):
    shared, apart = (search(params(store, exhaustive=True, share=share), **QUIET) for share in (True, False))
    assert [r['name'] for r in shared.rows] == [r['name'] for r in apart.rows]
    assert [r['probe_top1'] for r in shared.rows] == pytest.approx([r['probe_top1'] for r in apart.rows], abs=0.0051)
    assert shared.usage.multiply_adds == pytest.approx(shared.bounds['shared']) and apart.usage.multiply_adds == pytest.approx(apart.bounds['exhaustive'])
    assert apart.bounds == shared.bounds and shared.bounds['shared'] < 0.7*apart.bounds['exhaustive']

def test_finalists_score_as_in_the_exhaustive_search(store):
    quick, full = search(params(store, survivors=3), **QUIET), search(params(store, exhaustive=True), **QUIET)
    scores = {r['name']: r['probe_top1'] for r in full.rows}
    finalists = [r for r in quick.rows if r['finalist']]
    assert len(finalists) == 3 and finalists[0]['probe_loss'] > 0 and [r['probe_top1'] for r in finalists] == pytest.approx([scores[r['name']] for r in finalists], abs=0.0051)
    assert [r['name'] for r in finalists] == sorted((r['name'] for r in finalists), key=lambda n: (-scores[n], n))
    assert quick.usage.multiply_adds == pytest.approx(quick.bounds['shared'])
    assert len(quick.rows) == 7 and [r['rank'] for r in quick.rows] == [*range(1, 8)]
    images = [r['images'] for r in quick.rows]
    assert images == sorted(images, reverse=True) and max(images) == 400

@pytest.mark.parametrize('disk', [1e9, 1e-9], ids=['spill', 'recompute'])
def test_little_memory(store, monkeypatch, disk):
    "A budget below the activations: to the disk where it is fast, computed again where it is slow; the scores are the same."
    plenty = search(params(store, exhaustive=True), **QUIET)
    monkeypatch.setattr(module, 'DISK_MB_S', disk)
    tight = search(params(store, exhaustive=True).replace(memory_gb=(module.RESERVED_MB + plenty.usage.peak_mb/4)/1000), **QUIET)
    scores = {r['name']: r['probe_top1'] for r in plenty.rows}
    assert [r['probe_top1'] for r in tight.rows] == pytest.approx([scores[r['name']] for r in tight.rows], abs=0.0051)
    for name in plenty.features: assert np.allclose(plenty.features[name], tight.features[name], atol=1e-4)
    assert (tight.usage.spilled_mb > 0) == (disk > 1) and (tight.usage.recomputed > 0) == (disk < 1)
    assert tight.usage.peak_mb < plenty.usage.peak_mb

def test_the_budget_is_kept(store):
    "What is accounted for stays within the budget, as long as one chain of parts and the images fit into it."
    for mb in (35, 60):
        assert search(params(store).replace(memory_gb=(module.RESERVED_MB + mb)/1000), **QUIET).usage.peak_mb <= mb

def test_test_images_are_not_touched(store):
    from imgexp.sources import load_images
    table, target = load_images('digits'), module.load_target(params(store, images=10_000))
    test = {*table.items[table.split('test')]}
    assert not test & {*target.table.items} and len(target) == len(table) - len(test)
    smaller = module.load_target(params(store, images=100))
    assert [*smaller.table.items] == [*target.table.items[:100]]

def test_bad_input(store, tmp_path, launcher, project):
    for given, message in {('data', 'nowhere'): 'no such folder', ('classes', '3'): 'needs at least two', ('size', 4): 'at least', ('store', str(tmp_path)): 'is not a store'}.items():
        with pytest.raises(InputError, match=message): search(params(store).replace(**{given[0]: given[1]}), **QUIET)
    with pytest.raises(InputError, match="no snapshot 'x'"): search(params(store), ['x'], **QUIET)
    with pytest.raises(InputError, match='add some first'): search(params(Store(tmp_path/'empty', create=True)), **QUIET)
    job = launcher.imgexp('search', '--store', store.dir, '--data', 'digits', '--images', '5', root=project)
    assert job.wait() == 2 and job.err.count('\n') == 1 and 'images=5' in job.err
    job = launcher.imgexp('search', '--store', store.dir, '--data', 'digits', '--images', '200', '--figure', project/'tree.png', '--json', root=project)
    assert job.wait() == 0 and (project/'tree.png').stat().st_size > 5000 and 'next: imgexp store get' in job.err, job.err
