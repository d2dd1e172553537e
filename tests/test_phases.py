"Phases: each starts with the best weights of the one before, and a plan survives being killed anywhere."
import hashlib, json, os, random, shlex, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
import torch
from imgexp.errors import InputError, RunFailed
from imgexp.loader import Preprocessor
from imgexp.phase_plans import PhaseParams, read_plan
from imgexp.phase_runs import find_phases, open_phases, run_phases
from imgexp.runs import Run
from imgexp.samples import shapes
from imgexp.train import train

KILLS = int(os.environ.get('IMGEXP_KILLS', 3))
PLAN = '''
- {name: a fifth, values: {subset: 0.2, size: 20, epochs: 2, lr: 0, optimizer: adam, keep_every: 1}}
- {name: stronger, class_augment: true, values: {subset: 0.2, size: 28, epochs: 2, lr: 0, optimizer: adam, augment: color, mixup: 0.2}}
- {name: everything, values: {size: 28, epochs: 2, ema: 0.9, label_smoothing: 0.1}}
'''
OPTIONS = ['--arch', 'small_cnn', '--data', 'digits', '--track', 'off']
QUIET = dict(say=lambda text: None)

@pytest.fixture
def plan(project):
    (project/'plan.yaml').write_text(PLAN)
    return project/'plan.yaml'

def params(plan, **values): return PhaseParams.check(dict(plan=str(plan), arch='small_cnn', data='digits', track='off') | values)
def pictures(folder, classes, n):
    "A folder of noise, a folder for each class."
    import cv2
    rng = np.random.default_rng(0)
    for c in classes:
        (folder/'train'/c).mkdir(parents=True)
        for k in range(n): cv2.imwrite(str(folder/'train'/c/f'{k}.png'), rng.integers(0, 255, (28, 28, 3), np.uint8))

def weights(folder):
    "Bytes of the best weights of each phase"
    from imgexp.checkpoints import best_weights
    return [hashlib.sha256(best_weights(folder.run(k))[0].read_bytes()).hexdigest() for k in range(1, len(folder.phases) + 1)]

def epochs_done(root):
    "Epochs in the histories of all runs"
    return sum(max(0, f.read_text().count('\n') - 1) for f in root.glob('runs/2*/history.csv'))

def test_killed_anywhere_it_ends_with_the_same_bits(project, launcher, plan):
    "kill -9 after epochs drawn at random, in each phase and between them; the same command continues."
    def run(out): return launcher.imgexp('phases', 'run', str(plan), '--out', out, *OPTIONS, root=project/out, cwd=project)
    for out in ('whole', 'killed'): (project/out).mkdir()
    assert (job := run('whole')).wait() == 0, job.err
    chance, total, phases = random.Random(4), epochs_done(project/'whole'), []
    for target in ((k + chance.random())*total/KILLS for k in range(KILLS)):
        job, moment = run('killed'), None
        while not job.ended():  # some time after the epoch was reached
            if moment is None and epochs_done(project/'killed') >= int(target): moment = time.monotonic() + chance.uniform(0, 1.5)
            if moment is not None and time.monotonic() >= moment: break
            time.sleep(0.02)
        if job.ended(): break
        phases.append(len(json.loads((project/'killed/plan.json').read_text())['runs']) if (project/'killed/plan.json').exists() else 0)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert (job := run('killed')).wait() == 0, job.err
    def found(out):
        info = json.loads((project/out/'plan.json').read_text())
        from imgexp.checkpoints import best_weights
        return [hashlib.sha256(best_weights(Run(project/out/'runs'/name))[0].read_bytes()).hexdigest() for name in info['runs'].values()]
    assert len(found('whole')) == 3 and found('killed') == found('whole')
    assert len([*(project/'killed/runs').glob('2*')]) == 3  # no run was begun twice
    print(f'{len(phases)} kills, in phases {Counter(phases)}')

def test_sigterm_keeps_a_checkpoint_and_says_75(project, launcher, plan):
    job = launcher.imgexp('phases', 'run', str(plan), *OPTIONS, root=project, cwd=project)
    from launch import until
    until(lambda: 'epoch 1/2' in job.out + job.err or job.ended(), 'the first epoch')
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 75, job.err
    again = launcher.imgexp('phases', 'run', str(plan), *OPTIONS, root=project, cwd=project)
    assert again.wait() == 0 and 'everything' in again.out, again.err
    status = launcher.imgexp('phases', 'status', '--json', root=project, cwd=project)
    assert status.wait() == 0 and [r['state'] for r in json.loads(status.out)] == ['done']*3
    report = launcher.imgexp('phases', 'report', root=project, cwd=project)
    assert report.wait() == 0 and 'Phase 3, everything' in report.out and (project/'runs/phases/plan-digits/phases.png').exists(), report.err

def test_targets(project, plan):
    "stop ends with the reason, and the same plan goes on when the target is lowered; warn only says it."
    plan.write_text(PLAN.replace('name: a fifth,', 'name: a fifth, target: 0.99,'))
    said = []
    with pytest.raises(RunFailed, match='target is 99%.*train for longer'): run_phases(params(plan, on_miss='stop'), **QUIET)
    folder = run_phases(params(plan), say=said.append)
    assert any('missed its target' in s for s in said) and folder.run(3).finished
    said.clear()
    run_phases(params(plan, on_miss='continue'), say=said.append)
    assert not any('missed' in s for s in said)

def test_a_changed_plan_is_told(project, plan):
    run_phases(params(plan), **QUIET)
    plan.write_text(PLAN.replace('size: 20, epochs: 2', 'size: 20, epochs: 3'))
    with pytest.raises(InputError, match='phase 1 has run with epochs=2, and the plan now says 3.*--from 2 to keep'): run_phases(params(plan), **QUIET)
    kept = find_phases('plan').run(1).name
    plan.write_text(PLAN.replace('size: 20, epochs: 2', 'size: 20, epochs: 3').replace('ema: 0.9', 'ema: 0.8'))
    folder = run_phases(params(plan, from_phase=2), **QUIET)
    assert folder.run(1).name == kept and folder.run(3).params['ema'] == 0.8
    with pytest.raises(InputError, match='has run with seed'): run_phases(params(plan, seed=1, out=str(folder.dir)), **QUIET)
    with pytest.raises(InputError, match='has 3 phases'): run_phases(params(plan, from_phase=4), **QUIET)

def test_shrink_can_come_later(project, plan):
    "It shapes phases after the first: from_phase trains those again, as new runs, and keeps what each has run with."
    plan.write_text(PLAN.replace('name: a fifth,', 'name: a fifth, target: 0.99,'))
    with pytest.raises(RunFailed): run_phases(params(plan, on_miss='stop'), **QUIET)
    first = find_phases('plan').run(1).name
    folder = run_phases(params(plan, shrink=0.5), **QUIET)  # only phase 1 had run
    before, files = dict(folder.info['runs']), weights(folder)
    assert before['1'] == first and [folder.run(k).params['shrink'] for k in (1, 2, 3)] == [1, 0.5, 0.5]
    with pytest.raises(InputError, match='phase 2 has run with shrink=0.5, here 0.8.*--from 3 to keep phase 2, or --from 2 to train it again'):
        run_phases(params(plan, shrink=0.8), **QUIET)
    assert open_phases(params(plan, shrink=0.8, from_phase=2)).info['runs'] == {'1': first}  # none is shown as one of this plan
    folder = run_phases(params(plan, shrink=0.8, from_phase=2), **QUIET)
    again = dict(folder.info['runs'])
    assert again['1'] == first and not {again['2'], again['3']} & {*before.values()}
    assert [folder.run(k).params['shrink'] for k in (2, 3)] == [0.8, 0.8] and weights(folder)[1:] != files[1:]
    assert run_phases(params(plan, shrink=0.8), **QUIET).info['runs'] == again
    folder = run_phases(params(plan, from_phase=3), **QUIET)
    assert folder.run(2).name == again['2'] and folder.run(3).name != again['3'] and folder.run(3).params['shrink'] == 1
    with pytest.raises(InputError, match='phase 2 has run with shrink=0.8, here 1.0'): run_phases(params(plan), **QUIET)
    with pytest.raises(InputError, match='phase 3 has run with shrink=1.0, here 0.8.*, or --from 3 to train it again$'): run_phases(params(plan, shrink=0.8), **QUIET)
    from imgexp.checkpoints import best_weights
    assert [hashlib.sha256(best_weights(Run(project/'runs'/name))[0].read_bytes()).hexdigest() for name in before.values()] == files

def test_policies_by_class_can_come_later(project, plan):
    file = project/'recommendations.json'
    file.write_text(json.dumps({'schema': 1, 'split': 'valid', 'recommend': [{'policy': 'trivial', 'classes': ['3', '5']}]}))
    before = dict(run_phases(params(plan), **QUIET).info['runs'])
    later = params(plan, class_augment=str(file))
    with pytest.raises(InputError, match="phase 2 has run with class_augment='', here .*--from 2 to train it again"): run_phases(later, **QUIET)
    assert open_phases(later.replace(from_phase=2)).info['runs'] == {'1': before['1']}  # phase 3 will have another parent
    folder = run_phases(later.replace(from_phase=2), **QUIET)
    assert folder.info['runs']['1'] == before['1'] and not {*folder.info['runs'].values()} & {before['2'], before['3']}
    assert [bool(folder.run(k).params['class_augment']) for k in (1, 2, 3)] == [False, True, False]
    assert all(Run(project/'runs'/name).finished for name in before.values())
    assert run_phases(later, **QUIET).info['runs'] == folder.info['runs']

def test_a_plan_from_before_options_were_recorded_by_phase(project, plan):
    folder = run_phases(params(plan, shrink=0.5), **QUIET)
    runs = dict(folder.info['runs'])
    for f in folder.phases:
        for n in ('shrink', 'class_augment'): f.pop(n, None)
    folder.save()
    with pytest.raises(InputError, match='phase 2 has run with shrink=0.5, here 1.0'): run_phases(params(plan), **QUIET)
    assert run_phases(params(plan, shrink=0.5), **QUIET).info['runs'] == runs
    folder = run_phases(params(plan, from_phase=3), **QUIET)
    assert [folder.phases[k]['shrink'] for k in (1, 2)] == [0.5, 1.0]

def test_explaining_sets_policies_by_class(project, plan):
    "The file comes from the parent's validation images; a phase that does not take it goes without."
    def recommend(run):
        from imgexp.explain import explain_run
        file = explain_run(run=run.name).folder/'recommendations.json'
        contents = json.loads(file.read_text())
        assert contents['split'] == 'valid' and contents['run'] == run.name
        file.write_text(json.dumps(contents | {'recommend': [{'policy': 'trivial', 'classes': ['3', '5']}]}))
        return file
    folder = run_phases(params(plan, class_augment='explain'), recommend=recommend, **QUIET)
    assert [bool(folder.run(k).params['class_augment']) for k in (1, 2, 3)] == [False, True, False]
    assert folder.run(2).depends['class_augment']
    with pytest.raises(InputError, match='class_augment=explain is for'): run_phases(params(plan, class_augment='explain', seed=1), **QUIET)

def test_explaining_is_refused_before_anything_is_trained(project, plan):
    with pytest.raises(InputError, match='class_augment=explain is for `imgexp phases run`: here, give recommendations.json'):
        run_phases(params(plan, class_augment='explain'), **QUIET)
    plan.write_text(PLAN.replace('name: a fifth,', 'name: a fifth, class_augment: true,'))
    with pytest.raises(InputError, match='phase 1 follows no run'): run_phases(params(plan, class_augment='explain'), recommend=print, **QUIET)
    assert not (project/'runs').exists() or not [*(project/'runs').glob('2*')]

def test_policies_by_class_leave_other_images_alone():
    "Images of other classes, and all validation images, are those of a training without the file."
    from imgexp.loader import Loader
    table = shapes(200, size=32)
    rows = np.arange(200)
    def made(split, **kw):
        loader = Loader(table, split, 32, 16, augment='color', seed=1, class_policies=kw)
        out = {}
        for images, _ in loader.at(3): out |= dict(zip(loader.rows.tolist(), images.numpy()))
        return out
    changed = {'circle': 'trivial'}
    plain, other = made('train'), made('train', **changed)
    differ = {r for r in plain if (plain[r] != other[r]).any()}
    of_class = {r for r in plain if table.classes[table.labels[r]] == 'circle'}
    assert differ and differ <= of_class and len(differ) > len(of_class)/2
    before, after = made('valid'), made('valid', **changed)
    assert all((before[r] == after[r]).all() for r in before)
    twice = Preprocessor(table, 32, 'color', 1, class_policies=changed)
    a, b = np.empty((200, 32, 32, 3), np.uint8), np.empty((200, 32, 32, 3), np.uint8)
    twice(a, rows, 5); twice(b, rows[::-1].copy(), 5)
    assert (a == b[::-1]).all()

def test_a_start_shrinks_kernels_alone(project):
    parent = train(data='digits', arch='small_cnn', size=28, subset=0.1, epochs=1, track='off')
    from imgexp.evaluate import load_run
    child = train(start=parent.name, shrink=0.4, size=28, epochs=1, subset=0.1, keep_weights='0', track='off', seed=3)
    old, new = (load_run(r.name, c).model.state_dict() for r, c in ((parent, 'best'), (child, 'weights-0000')))
    for k in old:
        if old[k].ndim > 1: assert torch.corrcoef(torch.stack([old[k].flatten(), new[k].flatten()]))[0, 1] > 0.9 and not torch.equal(old[k], new[k])
        else: assert torch.equal(old[k], new[k])
    with pytest.raises(InputError, match='give start too'): train(shrink=0.5)

def test_next_commands_do_what_they_say(project, launcher, plan):
    "Copied into the shell they find the data, the plan and its folder; a plan in runs/phases is continued by its name."
    photos, place = project/'my photos', "it's here"
    plan = plan.rename(project/'my plan.yaml')
    pictures(photos, 'ab', 10)
    def ended(*args):
        job = launcher.imgexp(*args, root=project, cwd=project)
        assert job.wait() == 0, job.err
        found = [line.removeprefix('next: imgexp ') for line in job.err.splitlines() if line.startswith('next: ')]
        return job, shlex.split(found[0]) if found else []
    options = ['--arch', 'small_cnn', '--data', 'my photos', '--track', 'off']
    _, command = ended('phases', 'plan', plan.name, *options, '--seed', '3', '--shrink', '0.9', '--compile', 'false', '--length', '1')
    assert command[:3] == ['phases', 'run', plan.name]
    given = dict(zip(command[3::2], command[4::2]))
    assert given == {'--arch': 'small_cnn', '--data': 'my photos', '--track': 'off', '--seed': '3', '--shrink': '0.9'}
    _, report = ended(*command, '--out', place)
    assert report == ['phases', 'report', place]
    assert 'Phase 3, everything' in ended(*report)[0].out
    runs = json.loads((project/place/'plan.json').read_text())['runs']
    _, report = ended('phases', 'run', place)  # all options from there: nothing is trained anew
    assert json.loads((project/place/'plan.json').read_text())['runs'] == runs and len([*(project/'runs').glob('2*')]) == 3
    _, command = ended('phases', 'plan', place)
    assert command[2] == plan.name and dict(zip(command[3::2], command[4::2])) == given | {'--out': str(project/place)}
    _, report = ended('phases', 'run', plan.name, *options)
    assert report == ['phases', 'report', 'my plan-my photos']
    ended('phases', 'run', report[2], '--from', '2', '--shrink', '0.5')
    folder = find_phases(report[2])
    assert [folder.run(k).params['shrink'] for k in (1, 2, 3)] == [1, 0.5, 0.5] and len([*(project/'runs/phases').iterdir()]) == 1
    assert folder.info['params']['data'] == 'my photos' and 'out' not in folder.info['params']
    job = launcher.imgexp('phases', 'run', report[2], '--shrink', '0.8', root=project, cwd=project)
    assert job.wait() == 2 and 'phase 2 has run with shrink=0.5, here 0.8' in job.err  # --from 2 was for that time
    ended('phases', 'run', report[2])
    assert find_phases(report[2]).info['runs'] == folder.info['runs'] and len([*(project/'runs').glob('2*')]) == 8

def test_the_images_of_a_subset_are_the_same_elsewhere(project, plan):
    "The file that names them doesn't depend on the place of the data, the order of its listing, or hash seeds."
    here, there = project/'here/photos', project/'another/disk/photos'
    pictures(here, ('cat', 'ant', 'bee'), 20)
    for file in sorted(here.rglob('*.png'), reverse=True):
        copy = there/file.relative_to(here)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    code = """
import os, sys
class Listing(list):
    def __enter__(self): return self
    def __exit__(self, *error): pass
def ordered(list_entries, backwards):  # whatever the file system does
    def listed(*args): return Listing(sorted(list_entries(*args), key=lambda e: getattr(e, 'name', e), reverse=backwards))
    return listed
os.scandir, os.listdir = (ordered(f, sys.argv[3] == 'backwards') for f in (os.scandir, os.listdir))
from imgexp.phase_plans import PhaseParams
from imgexp.phase_runs import open_phases
folder = open_phases(PhaseParams(plan=sys.argv[1], data=sys.argv[2], arch='small_cnn'))
print(hash('cat'), next(os.scandir(sys.argv[2] + '/train').__iter__()).name, folder.dir)
"""
    def subsets(data, order, seed):
        env = os.environ | {'IMGEXP_ROOT': str(data.parent), 'PYTHONHASHSEED': seed}
        done = subprocess.run([sys.executable, '-c', code, str(plan), str(data), order], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hashed, first, folder = done.stdout.split()
        return hashed, first, [(Path(folder)/f'images-{k}.txt').read_text() for k in (1, 2)]
    (hash_here, first_here, images), (hash_there, first_there, others) = subsets(here, 'forwards', '1'), subsets(there, 'backwards', '2')
    assert hash_here != hash_there and (first_here, first_there) == ('ant', 'cat')  # the machines do differ
    assert images == others
    names = images[0].splitlines()
    assert len(names) == len({*names}) and all((there/name).is_file() for name in names)
    assert Counter(Path(name).parent.name for name in names) == dict(ant=3, bee=3, cat=3)  # a fifth of 16, as 4 are held out

@pytest.mark.parametrize('args, message', [
    (['run', 'huge'], 'choose from seed'), (['run', 'plan.yaml', '--from', '2'], 'phase 1 is not finished'), (['run', 'plan.yaml', '--on-miss', 'cry'], 'on_miss'),
    (['run', 'plan.yaml', '--length', '0'], 'length=0'), (['run', 'plan.yaml', '--data', 'nowhere'], 'no such folder'), (['status', 'none'], "no plan 'none'"), (['report'], 'no plan yet'),
    (['run', 'small.yaml'], 'phase 1: target=50'), (['run', 'plan.yaml', '--arch', 'resnet99'], 'resnet99'), (['run', 'wide.yaml'], 'at least'), (['run', 'plan.yaml', '--class-augment', 'none.json'], 'no such file')])
def test_bad_input(project, launcher, plan, args, message):
    (project/'small.yaml').write_text('- {target: 50, values: {epochs: 1}}')
    (project/'wide.yaml').write_text('- {values: {epochs: 1, size: 12}}')
    job = launcher.imgexp('phases', *args, *(['--arch', 'small_cnn'] if args[0] == 'run' and '--arch' not in args else []), root=project, cwd=project)
    assert job.wait() == 2 and message in job.err and job.err.strip().splitlines()[-1].startswith('imgexp: '), job.err

def test_a_plan_file_names_its_mistakes(tmp_path):
    (tmp_path/'p.yaml').write_text(PLAN)
    assert [f.name for f in read_plan(tmp_path/'p.yaml')] == ['a fifth', 'stronger', 'everything']

def test_a_start_with_other_splits_is_refused(project, tmp_path):
    "Test images here may have been training images there; a parent of the same splits is taken, with its images."
    folder = tmp_path/'photos'
    pictures(folder, 'ab', 12)
    small = dict(arch='small_cnn', size=28, epochs=1, track='off')
    for data, other in (('digits', dict(resplit='50/25/25')), (str(folder), dict(hold_out=3))):
        parent = train(data=data, **small)
        with pytest.raises(InputError, match=f'{[*other][0]}=.*may have been trained on what are test images here'): train(start=parent.name, **other, size=28, epochs=1)
        with pytest.raises(InputError, match='may have been trained'): train(start=parent.name, data=data, **other, size=28, epochs=1)
        assert train(start=parent.name, size=28, epochs=1, track='off').params['data'] == data

def test_a_started_run_can_be_extended(project):
    "It keeps the stem of the first parent, which another size would not have chosen, and needs that parent no longer."
    small = dict(data='digits', arch='resnet18', subset=0.05, epochs=1, batch_size=16, track='off', figures=False)
    first = train(size=64, **small)
    second = train(start=first.name, size=32, shrink=0.5, **{k: v for k, v in small.items() if k not in ('data', 'arch')})
    import shutil
    shutil.rmtree(first.dir)
    third = train(extend=second.name, epochs=1, track='off', figures=False)
    assert len(third.history) == 1 and third.params['start'] == '' and third.depends['extend']
