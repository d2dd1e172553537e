"""How readable is the house? Counts what a reader meets: private names that cross modules, long cells, long lines, large modules, names used twice.

    python tests/counts.py          # the table; `make check` prints it
"""
import ast, json, re, statistics, sys
from pathlib import Path

from imgexp.experiments import EXPERIMENTS

ROOT = Path(__file__).resolve().parent.parent
LONG_CELL, LONG_LINE, LARGE_MODULE = 40, 120, 400

def modules(root=ROOT): return {p.stem: p for p in sorted((root/'imgexp').glob('[!_]*.py'))}

def cells(root=ROOT):
    "(notebook, number of the cell, source) of every code cell, but for parameters cells, which are generated"
    for path in sorted((root/'nbs').glob('*.ipynb')):
        for k, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
            if cell['cell_type'] == 'code' and 'parameters' not in cell['metadata'].get('tags', []): yield path.stem, k, ''.join(cell['source'])

def _imports(tree):
    "Imports of imgexp's own modules: (module, name)"
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        module = node.module or ''
        if node.level or module.startswith('imgexp.'): yield from ((module.removeprefix('imgexp.'), a.name) for a in node.names)

def private_imports(root=ROOT):
    "['batch imports runs._headline', …]"
    return [f'{name} imports {module}.{what}' for name, path in modules(root).items()
            for module, what in _imports(ast.parse(path.read_text(encoding='utf-8'))) if what.startswith('_')]

def long_cells(root=ROOT):
    "['06b_study cell 11: 52 lines', …]"
    sizes = ((nb, k, len(source.strip().splitlines())) for nb, k, source in cells(root))
    return [f'{nb} cell {k}: {n} lines' for nb, k, n in sizes if n > LONG_CELL]

def exported_sizes(root=ROOT):
    "Lines of each exported cell, without the line `#| export`"
    sources = (source.strip().splitlines() for _, _, source in cells(root))
    return [len(lines) - 1 for lines in sources if lines and re.match(r'#\|\s*exports?$', lines[0]) and not _only_imports(lines)]

def _only_imports(lines): return all(re.match(r'(from|import|#|\s|$|.*\)$)', line) for line in lines)

def long_lines(root=ROOT):
    "Lengths of the generated lines over 120 characters, `__all__` aside"
    lines = (line for path in modules(root).values() for line in path.read_text(encoding='utf-8').splitlines())
    return [len(line) for line in lines if len(line) > LONG_LINE]

def code_lines(path):
    "Lines of code of a module: no blanks, comments, cell markers, imports, docstrings of the module, or docments"
    text = path.read_text(encoding='utf-8')
    tree, lines = ast.parse(text), text.splitlines()
    aside = {k for k, line in enumerate(lines, 1) if not line.strip() or line.lstrip().startswith('#')}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)): aside |= {*range(node.lineno, node.end_lineno + 1)}
        elif isinstance(node, ast.FunctionDef): aside |= {k for k in range(node.lineno + 1, node.body[0].lineno) if '#' in lines[k - 1]}
        elif isinstance(node, ast.Assign) and any(getattr(t, 'id', '') == '__all__' for t in node.targets): aside |= {*range(node.lineno, node.end_lineno + 1)}
    if ast.get_docstring(tree): aside |= {*range(1, tree.body[0].end_lineno + 1)}
    return len(lines) - len(aside)

def public_names(root=ROOT):
    "{public name: modules that define it}"
    out = {}
    for name, path in modules(root).items():
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
                for public in ast.literal_eval(node.value): out.setdefault(public, []).append(name)
    return out

def repeated_names(root=ROOT):
    "Public names of several modules, but for what every experiment has: its record and `train`"
    return {k: v for k, v in public_names(root).items() if len(v) > 1 and k not in ('train', 'EXPERIMENT')}

def names_of(module, root=ROOT):
    "Names that a module imports from imgexp, and from how many modules"
    found = list(_imports(ast.parse(modules(root)[module].read_text(encoding='utf-8'))))
    return len(found), len({m for m, _ in found})

def mentions(notebook, root=ROOT):
    "Modules that name an experiment's notebook in their code, its own aside: places that a new experiment would have to touch"
    own = next(p.stem for p in modules(root).values() if f'nbs/{notebook}.ipynb' in p.read_text(encoding='utf-8'))
    def texts(path): return {n.value for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.Constant)}
    return [name for name, path in modules(root).items() if name not in (own, 'setup') and notebook in texts(path)]

def declared(root=ROOT):
    "{parameter of 03_train: how often a default is written by hand for it}"
    text = '\n'.join(path.read_text(encoding='utf-8') for path in modules(root).values())
    table = re.findall(r'^    (\w+): (?:int|float|bool|str) = param\(', modules(root)['setup'].read_text(encoding='utf-8') + text, re.M)
    return {name: len(re.findall(rf'^    {name}: (?:int|float|bool|str) = param\(', text, re.M)) for name in dict.fromkeys(table)}

def table(root=ROOT):
    "(what is counted, number, details)"
    sizes, lines, large = exported_sizes(root), long_lines(root), {n: k for n, p in modules(root).items() if (k := code_lines(p)) > LARGE_MODULE}
    names, of = names_of('train', root)
    yield 'private names imported across modules', len(private_imports(root)), '; '.join(private_imports(root)[:8])
    yield f'code cells over {LONG_CELL} lines', len(long_cells(root)), '; '.join(long_cells(root)[:8])
    yield 'median lines of an exported cell', statistics.median(sizes), f'{len(sizes)} cells, 90% of them at most {sorted(sizes)[len(sizes)*9//10]}'
    yield f'generated lines over {LONG_LINE} characters', len(lines), f'longest {max(lines, default=0)}'
    yield f'modules over {LARGE_MODULE} lines of code', len(large), ', '.join(f'{n} {k}' for n, k in sorted(large.items(), key=lambda v: -v[1]))
    yield 'names that 03_train imports', names, f'from {of} modules'
    yield 'public names in several modules', len(repeated_names(root)), ', '.join(f'{k} ({", ".join(v)})' for k, v in repeated_names(root).items())
    named = sorted({module for notebook in EXPERIMENTS for module in mentions(notebook, root)})
    yield 'modules that name an experiment', len(named), ', '.join(named)
    yield 'code lines in all', sum(map(code_lines, modules(root).values())), f'{len(modules(root))} modules'

if __name__ == '__main__':
    rows = list(table())
    for what, n, details in rows: print(f'{what:42}{n:>8}  {details[:200] if "--all" not in sys.argv else details}')
