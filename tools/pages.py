"README.md from nbs/index.ipynb, and every notebook as an HTML page: nbconvert alone, no quarto."
import argparse, difflib, os, posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NBS, README, DOCS = ROOT/'nbs', ROOT/'README.md', ROOT/'_docs'
NOTE = '<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook, not this file. -->\n\n'
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
ECHOLESS = re.compile(r'^#\|\s*echo:\s*false\s*$', re.M) # of a cell of which only the output is shown
HIDDEN = re.compile(r'^#\|\s*(hide|default_exp\b.*)\s*$', re.M)
# [text](target) and ![text](target); addresses with a scheme and anchors on the page stay as they are
LINK = re.compile(r'(\]\()(?!\w+:|#|/)([^)\s]+)')


def prepare(path, relink):
    "The notebook at `path` as a reader sees it: without hidden cells and directives, its markdown links passed through `relink`"
    nb = nbformat.read(path, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and HIDDEN.search(c.source))]
    for c in nb.cells:
        if c.cell_type == 'code' and ECHOLESS.search(c.source): c.metadata['transient'] = {'remove_source': True} # as nbconvert's own preprocessors say it
        if c.cell_type == 'code': c.source = DIRECTIVE.sub('', c.source).strip('\n')
        else: c.source = LINK.sub(lambda m: m[1] + relink(m[2]), c.source)
    return nb


def readme_text():
    "README.md's text: links are turned to start at the repository's root"
    nb = prepare(NBS/'index.ipynb', lambda link: posixpath.normpath(posixpath.join('nbs', link)))
    for c in nb.cells:
        for o in c.get('outputs', []):
            if any(k.startswith('image/') for k in o.get('data', {})):
                sys.exit(f'pages: cell {c.id} of nbs/index.ipynb shows an image as output; save it under figures/ and link to it')
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r'<style.*?</style>\n?', '', body, flags=re.S)
    body = re.sub(r'[ \t]+$', '', body, flags=re.M)
    return NOTE + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def readme(check):
    "Write README.md, or with `check` fail and show the difference where it is not what the notebook gives"
    new, old = readme_text(), README.read_text(encoding='utf-8') if README.exists() else ''
    if not check:
        part = README.with_suffix('.part')
        part.write_text(new, encoding='utf-8')
        os.replace(part, README)
        print(f'{README.relative_to(ROOT)}: {len(new.splitlines())} lines')
    elif new != old:
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'what nbs/index.ipynb gives'))
        sys.exit('pages: README.md is not in step with nbs/index.ipynb: run `make readme` and commit it')
    else: print('README.md is in step with nbs/index.ipynb')


def html():
    "Write each notebook under nbs/ to _docs/, images embedded, links between notebooks turned to the pages"
    exporter = HTMLExporter(embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True)
    paths = [p for p in sorted(NBS.rglob('*.ipynb')) if not any(s[0] in '._' for s in p.relative_to(NBS).parts)]
    for p in paths:
        nb = prepare(p, lambda link: re.sub(r'\.ipynb(?=$|#)', '.html', link))
        title = next((c.source.split('\n')[0].lstrip('# ') for c in nb.cells if c.cell_type == 'markdown'), p.stem)
        page, _ = exporter.from_notebook_node(nb, dict(metadata=dict(name=title, path=str(p.parent))))
        to = DOCS/p.relative_to(NBS).with_suffix('.html')
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page, encoding='utf-8')
        print(to.relative_to(ROOT))
    print(f'{len(paths)} pages; start at {DOCS.relative_to(ROOT)}/index.html')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=['readme', 'html'])
    parser.add_argument('--check', action='store_true', help='readme: write nothing, fail if README.md is not in step')
    args = parser.parse_args()
    if args.what == 'readme': readme(args.check)
    else: html()
