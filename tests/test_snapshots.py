"Populations of snapshots: continued after a kill, frozen where they should be, from features that are computed once."
import csv, signal

import pandas as pd
import pytest
import torch
from launch import until
from imgexp.population import PopulationParams, find_population, make_population
from imgexp.runs import Run
from imgexp.snapshots import generate
from imgexp.trained import read_network

pytestmark = pytest.mark.usefixtures('project')
SMALL = '--arch compact_resnet --size 16 --epochs 2 --batch-size 64 --precision fp32 --workers 0 --track off'.split()

@pytest.fixture
def base(project):
    from imgexp.models import build_model
    model = build_model('compact_resnet', 7, size=16)
    for m in model.modules():  # statistics that are not their initial ones
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean += 0.1
    torch.save(model.state_dict(), project/'base.pth')
    return model.state_dict()

def table(folder): return list(csv.DictReader((folder/'snapshots.csv').open()))

def test_a_plan_is_the_same_in_every_process(base, project, launcher):
    args = ['snapshots', 'plan', *SMALL, '--weights', 'base.pth', '--views', '2', '--weight-decay', '0.1']
    texts = set()
    for seed in '123':
        job = launcher.imgexp(*args, root=project, cwd=project, PYTHONHASHSEED=seed)
        assert job.wait() == 0, job.err
        texts.add((project/'runs/snapshots/compact_resnet-25-percent/plan.csv').read_text())
    assert len(texts) == 1

def test_a_changed_row_or_base_is_trained_again(base, project, launcher):
    "A run is a row's only if the row and the base's file are what they were; the others stay."
    plan = 'snapshot,arch,weights,data,retrain,size,epochs,track,max_images\n0,compact_resnet,base.pth,digits,0,16,1,off,"60,30,30"\n1,compact_resnet,base.pth,digits,1,16,1,off,"60,30,30"\n'
    def generate():
        job = launcher.imgexp('snapshots', 'generate', 'plan.csv', root=project, cwd=project)
        assert job.wait() == 0, job.err
        return [r['run'] for r in table(project)]
    (project/'plan.csv').write_text(plan)
    first = generate()
    (project/'plan.csv').write_text(plan.replace('digits,1,', 'digits,2,'))
    status = launcher.imgexp('snapshots', 'status', 'plan.csv', root=project, cwd=project)
    assert status.wait() == 0 and '1 of 2 snapshots are finished' in status.err
    second = generate()
    assert second[0] == first[0] and Run(project/'runs'/second[1]).params['retrain'] == 2
    torch.save({k: v + 0.01 if v.is_floating_point() else v for k, v in base.items()}, project/'base.pth')
    third = generate()
    assert not {*third} & {*second} and len({Run(project/'runs'/r).depends['weights'] for r in (*second, *third)}) == 2

def test_plan_generate_status(base, project, launcher, monkeypatch):
    "A kill loses at most one snapshot; more snapshots extend the plan; finished ones are never repeated."
    def imgexp(*args): return launcher.imgexp('snapshots', *args, root=project, cwd=project)
    plan = ['plan', *SMALL, '--weights', 'base.pth', '--datasets', 'digits,shapes', '--max-images', '300,100,100', '--folder', 'mine']
    job = imgexp(*plan, '--snapshots', '4')
    assert job.wait() == 0 and '4 snapshots; next: imgexp snapshots generate mine' in job.err, job.err
    folder = project/'runs/snapshots/mine'
    job = imgexp('generate', 'mine')
    until(lambda: (folder/'snapshots.csv').exists() and any(r['state'] == 'done' for r in table(folder)), 'the first snapshot', 120)
    job.send(signal.SIGKILL)
    job.wait()
    first = {r['run'] for r in table(folder) if r['state'] == 'done'}
    assert imgexp(*plan, '--snapshots', '5').wait() == 0
    job = imgexp('generate', '--jobs', '2')
    assert job.wait() == 0, job.err
    rows = table(folder)
    assert [r['state'] for r in rows] == ['done']*5 and first <= {r['run'] for r in rows}
    assert len([*(project/'runs').glob('2*-20_transfer-*')]) == 5
    job = imgexp('status', 'mine', '--json')
    assert job.wait() == 0 and '5 of 5 snapshots are finished' in job.err
    for r in rows:
        run = Run(project/'runs'/r['run'])
        assert run.metrics['test']['top1']['n'] == 100 and run.params['max_images'] == '300,100,100'
    monkeypatch.chdir(project)
    again = find_population('mine')
    again.table_path.unlink()
    assert [r['run'] for r in generate(again, quiet=True)] == [r['run'] for r in rows]  # found again, not trained again

def test_frozen_is_the_base_and_the_rest_is_not(base, project):
    from imgexp.networks import block_tensors
    p = PopulationParams.check(dict(arch='compact_resnet', weights=str(project/'base.pth'), size=16, epochs=1, datasets='digits', distribution='0,1,2,3',
                                    snapshots=4, track='off', max_images='200,50,50'))
    for r in generate(make_population(p), quiet=True):
        model, _ = read_network(Run(project/'runs'/r['run']), 'best')
        same = [all(torch.equal(model.state_dict()[k], base[k]) for k in keys) for keys in block_tensors(model).values()]
        assert same == [True]*(4 - r['retrain']) + [False]*(1 + r['retrain'])
        if r['retrain']:  # batch norm of a trained block moves, that of a frozen one does not
            moved = [k for k in base if 'running' in k and not torch.equal(model.state_dict()[k], base[k])]
            assert {k.split('.')[1] for k in moved} == {str(2 - k) for k in range(r['retrain'])}

@pytest.mark.parametrize('views', [0, 2])
def test_features_are_shared(base, project, views):
    "Snapshots with the same base, data and frozen blocks compute no features again, with augmented views neither."
    from imgexp.features import cached
    p = PopulationParams.check(dict(arch='compact_resnet', weights=str(project/'base.pth'), size=16, epochs=2, datasets='digits', distribution='1', views=views,
                                    snapshots=3, track='off', max_images='200,50,50', folder=f'views{views}'))
    population = make_population(p)
    generate(population, quiet=True)
    tables = cached()
    assert len(tables) == (3 if views else 1) and tables.images.sum() == (2*200 + 100 if views else 300)
    seeds = {v['seed'] for v in population.plan.values()}
    assert len(seeds) == 3

def test_a_plan_by_hand(base, project, launcher):
    "A failed row is named and tried again; the others go on."
    (project/'plan.csv').write_text('snapshot,arch,weights,data,retrain,size,epochs,track,classes\n0,compact_resnet,base.pth,digits,0,16,1,off,"0,1"\n'
                                    '7,compact_resnet,base.pth,nowhere,1,16,1,off,\n')
    job = launcher.imgexp('snapshots', 'generate', 'plan.csv', root=project, cwd=project)
    assert job.wait() == 1 and 'nowhere' in job.err and '1 of 2 snapshots are not finished: the same command tries them again' in job.err, job.err
    rows = pd.read_csv(project/'snapshots.csv')
    assert rows.state.tolist() == ['done', 'failed'] and rows.snapshot.tolist() == [0, 7]
    job = launcher.imgexp('store', 'add', 'plan.csv', root=project, cwd=project)
    assert job.wait() == 0 and 'is failed: left out' in job.err + job.out and job.out.count(' tensors, ') == 1, job.err

@pytest.mark.parametrize('args, message', [
    ((), "weights='': snapshots begin with a pretrained base"), (('--weights', 'none.pth'), 'none.pth'), (('--weights', 'base.pth', '--distribution', 'top'), 'allowed are top-layers'),
    (('--weights', 'base.pth', '--distribution', '0,9'), '9 is not possible'), (('--weights', 'base.pth', '--snapshots', '0'), 'snapshots=0'),
    (('--weights', 'base.pth', '--datasets', ','), 'at least one data set'), (('--weights', 'base.pth', '--folder', '.'), 'holds other files')])
def test_bad_plans(base, project, launcher, args, message):
    job = launcher.imgexp('snapshots', 'plan', '--arch', 'compact_resnet', *args, root=project, cwd=project)
    assert job.wait() == 2 and job.err.count('\n') == 1 and message in job.err, job.err
    assert not (project/'runs/snapshots').exists()

def test_wrong_weights_fail_in_one_line(base, project, launcher):
    "When the plan is made; and, with a plan by hand, when it is trained."
    args = '--weights base.pth --arch resnet18 --datasets digits --snapshots 1 --size 32'.split()
    job = launcher.imgexp('snapshots', 'plan', *args, root=project, cwd=project)
    assert job.wait() == 2 and job.err.count('\n') == 1 and 'are not those of arch=resnet18' in job.err, job.err
    (project/'plan.csv').write_text('snapshot,arch,weights,data,retrain,size,epochs,track\n0,resnet18,base.pth,digits,0,32,1,off\n')
    job = launcher.imgexp('snapshots', 'generate', 'plan.csv', root=project, cwd=project)
    assert job.wait() == 1 and 'are not those of arch=resnet18' in job.err and 'Traceback' not in job.err, job.err
    for folder in ('nothing', 'base.pth'):
        job = launcher.imgexp('snapshots', 'generate', folder, root=project, cwd=project)
        assert job.wait() == 2 and job.err.count('\n') == 1, job.err
