"Packaging from settings.ini, with the standard library and setuptools alone."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']


def lines(key): return cfg[key].split('\n')[1:]


stages = {2: '2 - Pre-Alpha', 3: '3 - Alpha', 4: '4 - Beta', 5: '5 - Production/Stable'}
reproduce = lines('reproduce_requirements')

setup(
    name=cfg['name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    license_expression=cfg['license'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        f"Development Status :: {stages[int(cfg['status'])]}",
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[cfg['name']],
    install_requires=lines('requirements'),
    extras_require=dict(
        reproduce=reproduce,
        dev=reproduce + lines('dev_requirements'),
        ray=lines('ray_requirements'),
    ),
    entry_points=dict(
        console_scripts=lines('console_scripts'),
        nbdev=[f"{cfg['name']}={cfg['name']}._modidx:d"],
    ),
    zip_safe=False,
)
