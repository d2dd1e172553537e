"Every notebook is what the design asks for, and the library is what the notebooks say."
import ast, base64, io, json, os, re, shutil, subprocess, sys, tokenize
from pathlib import Path
import nbformat, pytest
from check import ROOT, differences
from counts import long_cells, private_imports
from readme import _LINK, render

pytestmark = pytest.mark.fast

EXPERIMENTS = '03 10 20 30 40 41 42 50 60 70 71 80'.split()    # notebooks that papermill runs
MAY_TAKE = EXPERIMENTS + ['01k']                            # others that may have a parameters cell
HEAVY_MODULES = 'resnets networks weights models cost parallel learner callbacks checkpoints sync parents recipes lr_finder fit results setup train phase_runs phases cutting features transfer prefix_tree snapshot_features search zoo_rows zoo_runs zoo_export zoo_dataset weight_predictors zoo grad_cam split_maps probes recommendations map_checks explain_report explain map_strips onnx_export deploy'.split()  # import torch
HEAVY = 'torch tensorflow keras wandb optuna ray gradio'.split()

NOTEBOOKS = sorted(ROOT.glob('nbs/*.ipynb'))
ORDER = [p.stem.partition('_')[2] for p in NOTEBOOKS if p.stem != 'index']  # imports go upwards only
MODULES = [p for p in sorted(ROOT.glob('imgexp/*.py')) if not p.name.startswith('_')]
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
each_module = pytest.mark.parametrize('path', MODULES, ids=[p.stem for p in MODULES])

def read(path): return nbformat.read(path, 4)
def number(path): return path.stem.partition('_')[0]
def code(path): return [c for c in read(path).cells if c.cell_type == 'code']
def outputs(path): return [(c, o) for c in code(path) for o in c.outputs]
def fail(lines):
    if lines: pytest.fail('\n'.join(lines), pytrace=False)

def first(cell): return (cell.source.strip().splitlines() or [''])[0][:80]

# -- the notebooks as files

@each_notebook
def test_is_valid_and_in_python(path):
    nb = read(path)
    nbformat.validate(nb)
    spec = nb.metadata.get('kernelspec', {})
    assert (spec.get('name'), spec.get('language')) == ('python3', 'python'), f'{path.name}: papermill needs the kernelspec'

@each_notebook
def test_parameters_tag(path):
    "Exactly one cell of an experiment has the tag `parameters`, and `p = params(...)` follows it."
    tagged = [i for i, c in enumerate(read(path).cells) if 'parameters' in c.metadata.get('tags', [])]
    if number(path) in EXPERIMENTS: assert len(tagged) == 1, f'{path.name}: {len(tagged)} cells have the tag `parameters`, not 1'
    elif number(path) in MAY_TAKE: assert len(tagged) <= 1
    else: assert not tagged, f'{path.name} is no experiment: remove the tag `parameters`'

@each_notebook
def test_parameters_are_flat_literals(path):
    "`name: type = literal  # what it is`, and nothing papermill's --help-notebook would lose: no `|`, no `=` in the comment."
    for cell in code(path):
        if 'parameters' not in cell.metadata.get('tags', []): continue
        lines = [l for l in cell.source.splitlines() if l.strip() and not l.lstrip().startswith('#')]
        for line in lines:
            comment = line.partition(' #')[2]
            node = ast.parse(line).body[0]
            assert isinstance(node, ast.AnnAssign), f'{path.name}: not `name: type = literal`: {line}'
            ast.literal_eval(node.value)
            assert comment.strip(), f'{path.name}: say what it is in a comment: {line}'
            assert '|' not in line and '=' not in comment, f"{path.name}: a | or a comment with = hides it from papermill's help: {line}"

@each_notebook
def test_parameters_hide_nothing(path):
    "In the notebook a parameter is a global: one that has the name of a function would take its place."
    cells = [c.source for c in code(path)]
    tagged = [c.source for c in code(path) if 'parameters' in c.metadata.get('tags', [])]
    names = {n.target.id for source in tagged for n in ast.parse(source).body if isinstance(n, ast.AnnAssign)}
    tops = [n for source in cells if '#| export' in source for n in ast.parse(source).body]
    known = {a.asname or a.name for n in tops if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    known |= {n.name for n in tops if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert not names & known, f'{path.name}: parameters {names & known} hide what the exported code calls'

@each_notebook
def test_no_trace_of_a_launcher(path):
    nb = read(path)
    assert 'papermill' not in nb.metadata, f'{path.name} was saved by papermill: keep its outputs out of nbs/'
    fail([f'{path.name}: papermill metadata in cell: {first(c)}' for c in nb.cells if 'papermill' in c.metadata])
    fail([f'{path.name}: a cell with papermill\'s tag {t!r}: {first(c)}' for c in nb.cells
          for t in c.metadata.get('tags', []) if t == 'injected-parameters'])

@each_notebook
def test_outputs_are_fit_to_read(path):
    "No errors, no warnings."
    bad = [f'{path.name}: error output of cell: {first(c)}' for c, o in outputs(path) if o.output_type == 'error']
    bad += [f'{path.name}: a warning in the output of cell: {first(c)}' for c, o in outputs(path)
            if o.output_type == 'stream' and 'Warning: ' in o.text]
    fail(bad)

ABSOLUTE = re.compile(r'''(?<![\w.~/-])/(?:home|root|tmp|work|Users|var|opt|mnt|usr/lib|content)/[^\s"'<>]*|(?<!\w)[A-Z]:\\[\w\\]+|site-packages''')

def texts(o):
    if o.output_type == 'stream': yield o.text
    for mime, value in o.get('data', {}).items():
        if mime.startswith('text/'): yield value

def test_the_pattern_of_absolute_paths():
    for text in ('/home/me/x', 'in /tmp/a', "'/root/x'", '(/Users/me/y)', r'C:\Users\me', 'File /usr/lib/python3', '"/work/a"'):
        assert ABSOLUTE.search(text), text
    for text in ('nbs/images/run.png', 'https://host/home/page', 'images/tmp/a', 'runs/20260101', 'and/or', './tmp/x'):
        assert not ABSOLUTE.search(text), text

@each_notebook
def test_no_absolute_paths_in_outputs(path):
    bad = []
    for c, o in outputs(path):
        for text in texts(o):
            found = ABSOLUTE.search(text) or re.search(re.escape(str(ROOT)) + '|' + re.escape(str(Path.home())) + '/', text)
            if found: bad.append(f'{path.name}: {found[0]!r} in the output of cell: {first(c)}')
    fail(bad)

@each_notebook
def test_outputs_are_small(path):
    sizes = [(len(base64.b64decode(o.data['image/png'])), c) for c, o in outputs(path) if 'image/png' in o.get('data', {})]
    fail([f'{path.name}: a picture of {n/1000:.0f} kB (at most 60: smaller figsize or dpi) in cell: {first(c)}' for n, c in sizes if n > 60_000])
    total = sum(len(json.dumps(o)) for _, o in outputs(path))
    assert total < 1_000_000, f'{path.name}: outputs of {total/1e6:.1f} MB'

@each_notebook
def test_is_executed(path):
    "A reader on the web sees results: a cell that ends with a name, picture or table has its output."
    shown = [c for c in code(path) if not re.search(r'(?m)^#\|\s*(hide|export|eval: false|default_exp|hide_output)', c.source)]
    if shown: assert any(c.outputs for c in shown), f'{path.name} has no outputs: run it before committing'

@each_notebook
def test_experiments_run_without_the_developers_tools(path):
    "papermill runs every cell, in an environment made by `make train`: without nbdev and pytest, and it must not re-export."
    if number(path) not in EXPERIMENTS: return
    bad = [f'{path.name}: cell uses {m[0]}: {first(c)}' for c in code(path)
           if (m := re.search(r'\b(nbdev_export|import nbdev|from nbdev|import pytest|from execnb)\b', c.source))]
    fail(bad)

def test_nothing_else_lies_in_nbs():
    "An executed copy saved in nbs/ would take over its module at the next export."
    known = re.compile(r'(\d\d[a-z]?_[a-z0-9_]+|index)\.ipynb|_quarto\.yml|images|nbdev\.yml|sidebar\.yml|[._].*')
    fail([f'nbs/{p.name} does not belong there' for p in sorted((ROOT/'nbs').iterdir()) if not known.fullmatch(p.name)])
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml'

def test_each_notebook_owns_the_module_of_its_name():
    found = {}
    for path in NOTEBOOKS:
        exp = [m[1] for c in code(path) for m in re.finditer(r'(?m)^#\|\s*default_exp\s+(\S+)', c.source)]
        if path.stem != 'index': assert exp == [path.stem.partition('_')[2]], f'{path.name} exports to {exp}'
        found |= {e: path.name for e in exp}
    assert sorted(found) == sorted(p.stem for p in MODULES), 'modules and notebooks differ: make export'

def test_clean_exported_and_readme():
    fail(differences())

def test_a_stale_parameters_cell_is_told_and_mended(tmp_path, monkeypatch):
    "With the command that mends it; what that writes is clean, and changes nothing else."
    import check
    from params_cells import stale
    assert not stale()
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*', 'images', '_quarto.yml'))
    (tmp_path/'imgexp').mkdir()
    shutil.copy(ROOT/'imgexp/experiments.json', tmp_path/'imgexp')
    path = tmp_path/'nbs/03_train.ipynb'
    whole = path.read_text(encoding='utf-8')
    path.write_text(whole.replace('epochs: int = 20', 'epochs: int = 21'), encoding='utf-8')
    monkeypatch.setattr(check, 'remade', lambda root: {str(p.relative_to(root)): p.read_bytes() for p in check.files(root)})
    monkeypatch.setattr(check, 'readme', lambda root: {})
    assert differences(tmp_path) == ['nbs/03_train.ipynb does not have the parameters of their tables (mend: make export)']
    assert stale(tmp_path) == {path: whole}

def test_how_the_readme_is_made():
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    png = new_output('display_data', {'image/png': base64.b64encode(b'PNG').decode(), 'text/plain': '<Figure>'})
    text, pictures = render(new_notebook(cells=[
        new_markdown_cell('see [a](00g_runs.ipynb), [b](../LICENSE), [c](https://x.org/y), `[d](e)`\n\n```\n[f](g)\n```'),
        new_code_cell('#| hide\nsecret()'), new_code_cell('#| echo: false\nplot()', outputs=[png]),
        new_code_cell('1 + 1', outputs=[new_output('execute_result', {'text/plain': '2'}, execution_count=1)])]))
    assert 'see [a](nbs/00g_runs.ipynb), [b](LICENSE), [c](https://x.org/y), `[d](e)`\n\n```\n[f](g)\n```' in text
    assert 'secret' not in text and 'plot' not in text
    assert '```python\n1 + 1\n```\n\n```text\n2\n```' in text
    assert pictures == {'nbs/images/index-2-0.png': b'PNG'} and '![](nbs/images/index-2-0.png)' in text

LINKED = [*NOTEBOOKS, ROOT/'README.md', ROOT/'runs/README.md']
@pytest.mark.parametrize('path', LINKED, ids=[str(p.relative_to(ROOT)) for p in LINKED])
def test_links_lead_somewhere(path):
    text = path.read_text() if path.suffix == '.md' else '\n\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown')
    text = re.sub(r'(?ms)^```.*?^```', '', text)
    targets = [m[3].partition('#')[0] for m in _LINK.finditer(text) if m[3] and not re.match(r'[a-z]+:|#', m[3])]
    fail([f'{path.relative_to(ROOT)} links to {t}, which does not exist' for t in targets if not (path.parent/t).exists()])

def test_the_map_lists_every_notebook_in_order():
    listed = re.findall(r'^\| \[\**(\w+)\**\]\(\1\.ipynb\) \| `imgexp\.(\w+)` \|', '\n'.join(c.source for c in read(ROOT/'nbs/index.ipynb').cells), re.M)
    assert [n for n, _ in listed] == [p.stem for p in NOTEBOOKS if p.stem != 'index'] and [m for _, m in listed] == ORDER

CARD = re.compile(r'test top1.*?([\d.]+)% \(([\d.]+)% to ([\d.]+)%, n = ([\d,]+)\)')

@pytest.mark.parametrize('stem', ['03_train', '10_keras_cnn', '20_transfer'])
def test_results_in_the_text_are_those_that_are_stored(stem):
    "The first cell tells the result of the notebook as it stands; the run's card holds it."
    path = ROOT/f'nbs/{stem}.ipynb'
    cards = [CARD.search(''.join(o.get('data', {}).get('text/html', ''))) for c, o in outputs(path)]
    value, low, high, n = next(m.groups() for m in reversed(cards) if m)
    said = f'{value}% of {n} test images, 95% interval {low} to {high}'
    assert said in read(path).cells[0].source, f'{stem}: the stored run has {said}'

def test_the_house_in_numbers():
    "No private name of another module, no cell of more than forty lines; the other counts are printed by `make check`."
    fail(private_imports() + long_cells())

# -- the library

def imports(path):
    "Modules of imgexp that a module imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['imgexp' if node.level else '', node.module]))
            names = [f'{base}.{a.name}' for a in node.names] if base == 'imgexp' else [base]
        else: continue
        yield from (n.split('.')[1] for n in names if n.startswith('imgexp.'))

@each_module
def test_imports_go_upwards(path):
    assert path.stem in ORDER, f'{path.stem} is exported by no notebook'
    above = ORDER[:ORDER.index(path.stem)]
    fail([f'{path.stem} imports {n}, which does not stand above it' for n in imports(path) if n in ORDER and n not in above])

@pytest.mark.parametrize('name', ['', *(m for m in ORDER if m not in HEAVY_MODULES)], ids=lambda m: m or 'imgexp')
def test_import_is_light(name):
    code = f"import sys, imgexp{'.' + name if name else ''}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing imgexp{'.' + name if name else ''} imports {done.stdout.strip()}"

def star_imports(path): return [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']

@each_module
def test_no_star_imports(path): assert not star_imports(path)

def undocumented(source):
    "What lacks its one-line docstring, or the comment beside a parameter of a function or constructor; tiny methods may."
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    def check(node, name, method=False):
        if not ast.get_docstring(node) and not table(node): yield f'line {node.lineno}: {name} has no docstring'
        if isinstance(node, ast.ClassDef):
            for n in node.body:
                if not isinstance(n, ast.FunctionDef): continue
                if n.name == '__init__': yield from params(n, name, True)
                elif not n.name.startswith(('_', 'before_', 'after_')) and not ast.get_docstring(n) and n.end_lineno - n.lineno > 2 and not overrides(node):
                    yield f'line {n.lineno}: {name}.{n.name} has no docstring'
        else: yield from params(node, name, method)
    def params(f, name, method):
        a = f.args
        all_ = [*a.posonlyargs, *a.args, *a.kwonlyargs][1 if method else 0:]
        plain = [x for x in all_ if not x.arg.startswith('_') and not (x.annotation and re.search(r'\bPath\b|^[A-Z]\w+$', ast.unparse(x.annotation)))]  # a type that says all
        if any('.command(' in ast.unparse(d) for d in f.decorator_list): return  # typer's help= documents these
        crowded = sum(x.lineno == f.lineno for x in all_) > 1  # several parameters in the line of `def`; a pair like h, w may share one
        bare = [x.arg for x in plain if x.lineno not in comments or crowded and x.lineno == f.lineno]
        if bare: yield f'line {f.lineno}: {name}: no comment beside {", ".join(bare)} (one parameter a line, what it is beside it)'
    def table(node): return isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith(('Params', 'Parameters')) for b in node.bases)  # its fields have their help
    def overrides(cls): return any(ast.unparse(b).split('.')[-1] in ('Callback', 'Module', 'Sampler', 'Dataset', 'Protocol') for b in cls.bases)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            patched = isinstance(node, ast.FunctionDef) and any('patch' in ast.unparse(d) for d in node.decorator_list)
            if patched and node.args.args and ast.unparse(node.args.args[0].annotation or node).startswith('_'): continue  # of a private class
            yield from check(node, node.name, patched)

def test_undocumented_finds_what_lacks():
    assert list(undocumented('def f(a, b): pass')) == [
        'line 1: f has no docstring', 'line 1: f: no comment beside a, b (one parameter a line, what it is beside it)']
    assert not list(undocumented('def f(\n  a, # px\n  b=1, # count\n):\n  "Does."'))
    assert not list(undocumented('def _f(a): pass'))

@each_module
def test_public_things_are_documented(path):
    fail([f'{path.stem}, {line}' for line in undocumented(path.read_text())])

@each_module
def test_functions_are_short(path):
    "Forty lines at most, the list of parameters aside: longer ones grow into two, or by @patch."
    lengths = {n.name: n.end_lineno - n.body[0].lineno + 2 for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
    fail([f'{path.stem}: {name} has {lines} lines' for name, lines in lengths.items() if lines > 40])
