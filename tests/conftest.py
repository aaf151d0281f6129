"Fixtures shared by the tests. Everything is tiny: images of 16 pixels, nine classes in three groups."
import os
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1') # as `make test` does: with more threads sums are rounded in another order

import pytest
from hypothesis import settings

from hdfast.clustering import hierarchy_from_groups
from hdfast.datasets import synthetic

settings.register_profile('hdfast', max_examples=50, deadline=None)
settings.load_profile('hdfast')


@pytest.fixture(scope='session')
def images(): return synthetic(n_groups=3, classes_per_group=3, n_per_class=20, size=16)


@pytest.fixture
def dls(images): return images.dataloaders(device='cpu', bs=32)


@pytest.fixture(scope='session')
def taxonomy(images): return hierarchy_from_groups(images.superclasses, images.classes)


@pytest.fixture(scope='module') # fastai writes into the folder that it reads, so no two modules share one
def image_folder(images, tmp_path_factory):
    "The same images as PNG files, one folder for each class; every file is named by its row in `images`."
    from PIL import Image
    root = tmp_path_factory.mktemp('pngs')
    for c in images.classes: (root/c).mkdir()
    for i, (x, y) in enumerate(zip(images.images, images.labels)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(root/images.classes[y]/f'{i}.png')
    return root
