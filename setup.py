"""Builds the package from `settings.ini`, the one place where its name, version and requirements stand."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
words = lambda key: cfg.get(key, '').split()

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    author=cfg['author'], keywords=cfg['keywords'], python_requires=f">={cfg['min_python']}",
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['dst_smolvlm', 'dst_smolvlm.*']),
    package_data={'dst_smolvlm': ['conf/*.yaml', 'conf/**/*.yaml', 'conf/accelerate/slurm.sh']},
    install_requires=words('requirements'),
    extras_require={name: words(f'{name}_requirements') for name in ('dev', 'lab', 'lora', 'qlora', 'semantic')},
    classifiers=['Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12'],
)
