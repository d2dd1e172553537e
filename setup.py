"Packaging from settings.ini: requirements, and one extra for each `<name>_requirements` there."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
extras['all'] = [r for name in ('keras', 'hub', 'lab', 'deploy', 'dev') for r in extras[name]]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license='Apache-2.0', license_files=['LICENSE'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 *(f'Programming Language :: Python :: 3.{v}' for v in range(10, 14))],
    # the notebooks travel in the wheel as imgexp/nbs/*.ipynb
    packages=[*find_packages(include=['imgexp', 'imgexp.*']), 'imgexp.nbs'],
    package_dir={'imgexp.nbs': 'nbs'}, package_data={'imgexp': ['experiments.json'], 'imgexp.nbs': ['*.ipynb']}, include_package_data=False,
    install_requires=cfg['requirements'].split(), extras_require=extras,
    python_requires='>=' + cfg['min_python'], zip_safe=False,
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
