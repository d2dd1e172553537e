"Make README.md from nbs/index.ipynb, without Quarto: `python tests/readme.py`, or `make readme`."
import base64, re, sys
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- Made from nbs/index.ipynb by `make readme`; edit that. -->\n\n'
_LINK = re.compile(r'(`[^`\n]*`)|(\]\(|<img [^>]*?src=")([^)\s"]+)')
_ANSI = re.compile(r'\x1b\[[0-9;]*m')

def relink(text):
    "Links of a markdown text in nbs/ as seen from the folder above; code stays as it is."
    def moved(m):
        code, opening, target = m.groups()
        if code or re.match(r'[a-z]+:|#|/', target): return m[0]
        return opening + (target[3:] if target.startswith('../') else f'nbs/{target}')
    parts = re.split(r'(?ms)(^```.*?^```\s*?$)', text)
    return ''.join(p if i % 2 else _LINK.sub(moved, p) for i, p in enumerate(parts))

def output(out, name):
    "One cell output as (markdown, pictures to write); the richest form that GitHub shows."
    if out.output_type == 'error': raise ValueError(f'nbs/index.ipynb holds an error output: {out.ename}: {out.evalue}')
    data = out.get('data', {})
    if 'image/png' in data:
        return f'![](nbs/images/{name}.png)', {f'nbs/images/{name}.png': base64.b64decode(data['image/png'])}
    if 'text/markdown' in data: return relink(data['text/markdown']), {}
    text = _ANSI.sub('', out.get('text') or data.get('text/plain', '')).rstrip()
    return (f'```text\n{text}\n```' if text and len(text.splitlines()) <= 25 else ''), {}

def render(nb):
    "README text of notebook `nb`, and its pictures as {path: bytes}."
    parts, pictures = [], {}
    for i, cell in enumerate(nb.cells):
        source = cell.source.strip()
        if cell.cell_type == 'markdown': parts.append(relink(source)); continue
        if cell.cell_type != 'code' or not source: continue
        directives = set(re.findall(r'(?m)^#\|\s*(.+?)\s*$', source))
        if directives & {'hide', 'include: false'}: continue
        code = re.sub(r'(?m)^#\|.*\n?', '', source).strip()
        if code and not directives & {'echo: false', 'hide_input'}: parts.append(f'```python\n{code}\n```')
        if directives & {'hide_output', 'output: false'}: continue
        for j, out in enumerate(cell.outputs):
            md, pics = output(out, f'index-{i}-{j}')
            pictures |= pics
            if md: parts.append(md)
    return NOTE + '\n\n'.join(p for p in parts if p) + '\n', pictures

def readme(root=ROOT):
    "Files of the README, as {path: bytes}, from the notebook in checkout `root`."
    text, pictures = render(nbformat.read(root/'nbs/index.ipynb', 4))
    return {'README.md': text.encode()} | pictures

if __name__ == '__main__':
    files = readme()
    for old in (ROOT/'nbs/images').glob('index-*.png'):
        if f'nbs/images/{old.name}' not in files: old.unlink()
    for name, content in files.items():
        path = ROOT/name
        if path.exists() and path.read_bytes() == content: continue
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        print(f'wrote {name}', file=sys.stderr)
