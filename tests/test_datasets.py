"""Image sets: splits and folds, the decode cache under faults, image folders, named sets."""
import errno, io, json, os, signal, subprocess, sys, tarfile, time, urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from fastai.data.external import fastai_path
from hdfast import datasets
from hdfast.datasets import (HELD_OUT, IMAGE_SETS, TEST, TRAIN, ImagesAbsent, ImageSet, caltech101, caltech256, cifar100, cross_validation, decode,
                             decode_image, fold, hold_out, image_folder, image_set, imagenet, imagenet100, read_images, stratified_split, synthetic)

FASTAI_DATA = fastai_path('data')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache folder of its own for each test"
    monkeypatch.setenv('HDFAST_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def write_images(folder, n, size=16, seed=0, suffix='.png'):
    "`n` images of noise in `folder`; their paths"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    files = [folder/f'{i:04d}{suffix}' for i in range(n)]
    for f, x in zip(files, pixels): Image.fromarray(x).save(f)
    return files


def write_folder(root, classes, n=6, **kwargs):
    "A class folder of `n` images for each of `classes`"
    for k, c in enumerate(classes): write_images(root/c, n, seed=k, **kwargs)
    return root


def blank(labels, n_classes, size=2):
    "An ImageSet of black images"
    return ImageSet('blank', torch.zeros(len(labels), 3, size, size, dtype=torch.uint8), torch.tensor(labels),
                    [f'class {k}' for k in range(n_classes)], torch.zeros(len(labels), dtype=torch.int8))


def leftovers(cache):
    "Files in the cache that aren't finished products"
    return [f.name for f in cache.iterdir() if f.suffix not in ('.npy', '.json', '.lock')]


# ---- splits and folds

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)
shares = st.floats(0, 0.9)


@st.composite
def labelled(draw):
    "Labels in any order, and how many images each class has"
    n = draw(sizes)
    labels = np.repeat(np.arange(len(n)), n)
    return draw(st.permutations(labels.tolist())), n


@given(labelled(), shares, shares, st.integers(0, 2**32))
def test_stratified_split(data, test, held_out, seed):
    labels, n = data
    split = stratified_split(labels, len(n), test, held_out, seed)
    assert split.dtype == torch.int8 and torch.equal(split, stratified_split(labels, len(n), test, held_out, seed))
    for k, m in enumerate(n):
        tr, ho, te = (int(((split == s) & (torch.tensor(labels) == k)).sum()) for s in (TRAIN, HELD_OUT, TEST))
        assert tr + ho + te == m and tr >= 1
        if m == 1: assert tr == 1
        if m >= 2: assert te >= 1 if test else te == 0
        if m >= 3: assert tr + te == m or ho <= m - te - 1
        if held_out and m - te >= 2: assert ho >= 1
        if 0 < te < m - 1 and te > 1: assert abs(te - test*m) <= 0.5 + 1e-9


@given(labelled(), st.integers(0, 9))
def test_a_class_is_split_without_regard_to_the_others(data, seed):
    labels, n = data
    names, labels = [f'c{k}' for k in range(len(n))], np.array(labels)
    split = stratified_split(labels, names, seed=seed).numpy()
    for k, c in enumerate(names):
        alone = stratified_split(np.zeros(n[k], dtype=int), [c], seed=seed).numpy()
        assert (split[labels == k] == alone).all()


@given(labelled(), shares)
def test_hold_out_touches_only_train(data, held_out):
    labels, n = data
    before = stratified_split(labels, len(n), 0.3, 0)
    after = hold_out(labels, before, len(n), held_out)
    assert torch.equal(before == TEST, after == TEST)
    assert ((before == TRAIN) == (after != TEST)).all()


def test_two_images_are_train_and_test():
    assert sorted(stratified_split([0, 0], ['c']).tolist()) == [TRAIN, TEST]


def test_class_without_images_is_named():
    with pytest.raises(ValueError, match='no image for class dog'): stratified_split([0, 0], ['cat', 'dog'])
    with pytest.raises(ValueError, match='labels run from 0 to 2'): stratified_split([0, 2], ['cat', 'dog'])


@pytest.mark.parametrize('share', [-0.1, 1.0, float('nan')])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match='share'): stratified_split([0, 0, 0], ['cat'], test=share)


@given(labelled(), st.integers(2, 7), st.integers(0, 9))
@settings(deadline=None)
def test_cross_validation(data, folds, seed):
    labels, n = data
    s = blank(labels, len(n))
    parts = cross_validation(s, folds, seed=seed)
    tested = sum((p.split == TEST).int() for p in parts)
    single = torch.tensor([n[k] == 1 for k in labels])
    assert len(parts) == folds and (tested[single] == 0).all() and (tested[~single] == 1).all()
    for i, p in enumerate(parts):
        assert p.images is s.images and p.labels is s.labels
        assert torch.equal(p.split, fold(s, i, folds, seed=seed).split)
        te = p.counts().test.to_numpy()
        assert all(m == 1 or m//folds <= t <= -(-m//folds) for m, t in zip(n, te)) # stratified
        assert (p.counts().train > 0).all()


@pytest.mark.parametrize('i, folds', [(6, 6), (-1, 6), (0, 1)])
def test_fold_out_of_range(i, folds):
    with pytest.raises(ValueError, match='fold'): fold(blank([0, 0, 1, 1], 2), i, folds)


# ---- the image set

@pytest.mark.parametrize('change, message', [
    (dict(images=torch.zeros(4, 3, 2, 2)), 'images must be uint8'),
    (dict(images=torch.zeros(4, 1, 2, 2, dtype=torch.uint8)), 'images must be uint8'),
    (dict(labels=torch.zeros(4, dtype=torch.int32)), 'labels must be torch.int64'),
    (dict(labels=torch.zeros(3, dtype=torch.int64)), 'labels must be'),
    (dict(labels=torch.tensor([0, 0, 1, 2])), 'labels run from 0 to 2'),
    (dict(labels=torch.tensor([0, 0, 0, -1])), 'labels run from -1'),
    (dict(labels=torch.zeros(4, dtype=torch.int64)), 'no training image for class class 1'),
    (dict(split=torch.tensor([0, 0, 0, 3], dtype=torch.int8)), 'a split is'),
    (dict(split=torch.tensor([0, 0, 2, 1], dtype=torch.int8)), 'no training image for class class 1'),
    (dict(classes=('a', 'a')), 'occur twice: a'),
    (dict(classes=()), 'no classes'),
    (dict(superclasses=('x',)), '1 superclasses for 2 classes')])
def test_image_set_checks_itself(change, message):
    with pytest.raises(ValueError, match=message): replace(blank([0, 0, 1, 1], 2), **change)


def test_mean_std_and_counts_against_numpy():
    s = synthetic(2, 3, 20, 8)
    x = s.images[s.train].double()/255
    mean, std = s.mean_std(chunk=7)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, x.transpose(0, 1).flatten(1).std(1, correction=0).float(), atol=1e-6, rtol=0)
    assert s.counts().to_numpy().sum() == len(s.images)
    assert sorted(torch.cat([s.train, s.held_out, s.test]).tolist()) == list(range(len(s.images)))


def test_fingerprint_follows_the_content():
    s = blank([0, 0, 1, 1], 2)
    images = s.images.clone()
    images[3, 2, 1, 1] = 1
    others = [replace(s, images=images), replace(s, classes=('a', 'b')), replace(s, superclasses=('a', 'b')),
              replace(s, labels=torch.tensor([0, 1, 1, 1])), replace(s, split=torch.tensor([0, 2, 0, 0], dtype=torch.int8))]
    assert len({o.fingerprint() for o in [s, *others]}) == 6
    assert s.fingerprint() == replace(s, name='other').fingerprint() == blank([0, 0, 1, 1], 2).fingerprint()


def test_size_of_other_shapes():
    s = blank([0, 1], 2)
    assert s.size == 2 and replace(s, images=torch.zeros(2, 3, 4, 5, dtype=torch.uint8)).size == (4, 5)


# ---- the synthetic set

def test_synthetic_is_the_same_for_the_same_seed():
    code = 'from hdfast.datasets import synthetic; print(synthetic(3, 2, 10, 16, seed=5).fingerprint())'
    there = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == synthetic(3, 2, 10, 16, seed=5).fingerprint() != synthetic(3, 2, 10, 16, seed=6).fingerprint()


def test_synthetic_groups_are_closer_within_and_confused_within():
    s = synthetic(n_per_class=60)
    g = np.unique(s.superclasses, return_inverse=True)[1]
    x = torch.nn.functional.avg_pool2d(s.images.float(), 4).flatten(1)
    means = torch.stack([x[s.train][s.labels[s.train] == k].mean(0) for k in range(24)])
    guess = torch.cdist(x[s.test], means).argmin(1).numpy() # nearest mean
    truth = s.labels[s.test].numpy()
    right, right_group = (guess == truth).mean(), (g[guess] == g[truth]).mean()
    assert 0.4 < right < 0.9 and right_group > 0.85 and 1 - right > 2*(1 - right_group)


def test_synthetic_of_thousands_of_classes():
    s = synthetic(500, 4, 3, 8)
    assert s.n_classes == 2000 == len(set(s.classes)) and len(set(s.superclasses)) == 500


# ---- decoding

def test_decode_gives_the_pixels_squashed_and_in_order(tmp_path):
    files = write_images(tmp_path/'a', 5)[::-1]
    assert torch.equal(decode(files, 16), torch.stack([torch.tensor(np.asarray(Image.open(f))).permute(2, 0, 1) for f in files]))
    Image.fromarray(np.zeros((10, 40), np.uint8)).save(tmp_path/'wide.jpg')
    assert decode_image(tmp_path/'wide.jpg', 8).shape == (3, 8, 8)


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', '1', 'CMYK', 'I;16'])
def test_decode_takes_any_colour_mode(tmp_path, mode):
    f = tmp_path/('a.tif' if mode in ('CMYK', 'I;16') else 'a.png')
    Image.new(mode, (9, 7)).save(f)
    assert decode([f], 4).shape == (1, 3, 4, 4)


@pytest.mark.parametrize('mode', ['LA', 'P', 'RGBA'])
def test_what_is_transparent_is_white(tmp_path, mode):
    drawing = Image.new('RGBA', (8, 8), (0, 0, 0, 0)) # the colour below is black, as of most drawings
    drawing.paste((0, 0, 0, 255), (0, 0, 4, 8))
    drawing.convert(mode).save(tmp_path/'a.png')
    assert (decode_image(tmp_path/'a.png', 8)[:, :, :3] == 0).all() and (decode_image(tmp_path/'a.png', 8)[:, :, 5:] == 255).all()


def test_images_are_read_without_a_cache(tmp_path, cache):
    files = write_images(tmp_path/'a', 3)
    assert torch.equal(read_images(files, 16), decode(files, 16, cache=tmp_path/'other')) and read_images(files[0], 8).shape == (1, 3, 8, 8)
    files[1].write_bytes(b'no')
    with pytest.raises(ValueError, match=r'1 of 3 files are no readable images: .*0001\.png; the first: cannot identify') as e: read_images(files, 16)
    assert 'skip_corrupt' not in str(e.value) and not cache.exists()
    with pytest.raises(ValueError, match='no files'): read_images([], 8)
    with pytest.raises(FileNotFoundError): read_images(tmp_path/'gone.png', 8)


def test_second_call_reads_the_cache(tmp_path, cache, monkeypatch):
    files = write_images(tmp_path/'a', 5)
    first = decode(files, 16)
    monkeypatch.setattr(datasets, 'decode_image', None)
    assert torch.equal(decode(files, 16), first) and leftovers(cache) == []


def test_key_follows_time_size_target_and_names(tmp_path):
    files = [str(f) for f in write_images(tmp_path/'a', 3)]
    key = lambda size=16, fs=files: datasets._cache_key(fs, size)
    keys = {key(), key(8), key(fs=files[:2]), key(fs=files[::-1])}
    st_ = os.stat(files[0])
    os.utime(files[0], ns=(st_.st_atime_ns, st_.st_mtime_ns + 1))
    keys.add(key())
    with open(files[0], 'ab') as f: f.write(b'\0')
    os.utime(files[0], ns=(st_.st_atime_ns, st_.st_mtime_ns))
    keys.add(key())
    os.rename(files[2], files[2] + '.png')
    keys.add(key(fs=[*files[:2], files[2] + '.png']))
    assert len(keys) == 7


def test_key_survives_a_move(tmp_path):
    files = write_images(tmp_path/'a'/'x', 2) + write_images(tmp_path/'a'/'xy', 2)
    before = datasets._cache_key([str(f) for f in files], 16)
    (tmp_path/'a').rename(tmp_path/'b')
    assert before == datasets._cache_key([str(f).replace('/a/', '/b/') for f in files], 16)


def test_changed_file_is_decoded_again(tmp_path):
    files = write_images(tmp_path/'a', 3)
    before = decode(files, 16)
    Image.new('RGB', (16, 16), 'white').save(files[1])
    after = decode(files, 16)
    assert (after[1] == 255).all() and torch.equal(after[[0, 2]], before[[0, 2]])


def spoil(tmp_path):
    "Ten images, three of them spoilt in different ways"
    files = write_images(tmp_path/'a', 10)
    files[2].write_text('no image')
    files[5].write_bytes(files[4].read_bytes()[:400])
    files[7].write_bytes(b'')
    return files, [2, 5, 7]


def test_corrupt_files_are_all_named(tmp_path, cache):
    files, bad = spoil(tmp_path)
    for _ in range(2): # also from the cache
        with pytest.raises(ValueError, match='3 of 10 files') as e: decode(files, 16)
        assert all((str(f) in str(e.value)) == (i in bad) for i, f in enumerate(files))
    assert leftovers(cache) == []


def test_corrupt_files_are_skipped_and_counted(tmp_path):
    files, bad = spoil(tmp_path)
    good = [f for i, f in enumerate(files) if i not in bad]
    for _ in range(2):
        with pytest.warns(UserWarning, match='left out 3 of 10'): images = decode(files, 16, skip_corrupt=True)
        assert torch.equal(images, decode(good, 16))


def test_repaired_file_is_read(tmp_path):
    files, bad = spoil(tmp_path)
    with pytest.raises(ValueError): decode(files, 16)
    for i in bad: Image.new('RGB', (16, 16), 'white').save(files[i])
    assert (decode(files, 16)[bad] == 255).all()


def test_what_becomes_readable_is_read(tmp_path, cache, monkeypatch):
    files, bad = spoil(tmp_path)
    with pytest.raises(ValueError, match='3 of 10'): decode(files, 16)
    with monkeypatch.context() as m:
        m.setattr(datasets, 'decode_image', lambda f, size: np.full((3, size, size), 9, np.uint8) if str(f).endswith(files[5].name) else decode_image(f, size))
        with pytest.warns(UserWarning, match='left out 2 of 10'): images = decode(files, 16, skip_corrupt=True)
    assert len(images) == 8 and (images[4] == 9).all() # files 2 and 7 are left out, so file 5 is the fifth
    with pytest.warns(UserWarning, match='left out 2 of 10'): assert torch.equal(decode(files, 16, skip_corrupt=True), images) # and stays
    assert leftovers(cache) == []


def test_at_most_ten_are_named(tmp_path):
    files = [tmp_path/f'{i:02d}.png' for i in range(25)]
    for f in files: f.write_text('no')
    with pytest.raises(ValueError, match=r'25 of 25.*09\.png, \.\.\. \(25 in all\)') as e: decode(files, 8)
    assert '10.png' not in str(e.value)


def test_no_files_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match='no files'): decode([], 8)
    with pytest.raises(FileNotFoundError, match='gone.png'): decode([tmp_path/'gone.png'], 8)


SLOW = '''
import sys, time
from pathlib import Path
from hdfast import datasets
quick = datasets.decode_image
def slow(*args):
    time.sleep(0.002)
    return quick(*args)
datasets.decode_image = slow
images = datasets.decode(sorted(Path(sys.argv[1]).iterdir()), 16)
print(images.long().sum().item())
'''


def start(folder):
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SLOW, str(folder)], stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited too long'
        time.sleep(0.005)


def test_killed_decode_resumes(tmp_path, cache, monkeypatch):
    files = write_images(tmp_path/'a', 2500)
    process = start(tmp_path/'a')
    wait_for(lambda: list(cache.glob('*.json')) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = json.loads(next(cache.glob('*.json')).read_text())['done']
    assert 0 < done < 2500 and list(cache.glob('*.part')) and not list(cache.glob('*.npy'))

    count, quick = [], datasets.decode_image
    monkeypatch.setattr(datasets, 'decode_image', lambda *args: count.append(1) or quick(*args))
    resumed = decode(files, 16)
    assert len(count) == 2500 - done
    assert torch.equal(resumed, decode(files, 16, cache=tmp_path/'other')) and leftovers(cache) == []


def test_interrupted_decode_resumes_with_its_corrupt_files(tmp_path, cache, monkeypatch):
    files = write_images(tmp_path/'a', 700)
    files[3].write_text('no image')
    files[600].write_text('no image')
    quick = datasets.decode_image
    def full(file, size):
        if Path(file) == files[550]: raise OSError(28, 'No space left on device')
        return quick(file, size)
    monkeypatch.setattr(datasets, 'decode_image', full)
    with pytest.raises(OSError, match='No space'): decode(files, 16)
    assert list(cache.glob('*.part'))
    monkeypatch.setattr(datasets, 'decode_image', quick)
    with pytest.raises(ValueError, match='2 of 700'): decode(files, 16)
    with pytest.warns(UserWarning): assert len(decode(files, 16, skip_corrupt=True)) == 698
    assert leftovers(cache) == []


def test_part_shorter_than_its_record(tmp_path, cache, monkeypatch):
    "After a power cut the record may be ahead of the images"
    files = write_images(tmp_path/'a', 600)
    whole = decode(files, 16)
    npy, state = next(cache.glob('*.npy')), next(cache.glob('*.json'))
    npy.with_suffix('.part').write_bytes(npy.read_bytes()[:128 + 100*3*16*16 + 5])
    npy.unlink()
    state.write_text(json.dumps(dict(done=512, corrupt=[])))
    assert torch.equal(decode(files, 16), whole) and leftovers(cache) == []


def test_two_processes_at_once(tmp_path, cache):
    files = write_images(tmp_path/'a', 600)
    both = [start(tmp_path/'a') for _ in range(2)]
    sums = [p.communicate()[0].split()[-1] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sums == [str(decode(files, 16).long().sum().item())]*2
    assert len(list(cache.glob('*.npy'))) == 1 and leftovers(cache) == []


# ---- image folders

def test_image_folder(tmp_path):
    root = write_folder(tmp_path/'pets', ['dog', 'cat'], 10)
    (root/'.hidden').mkdir()
    (root/'cat'/'.DS_Store').write_text('x')
    s = image_folder(root, 16)
    assert (s.name, s.classes, s.superclasses, s.size) == ('pets', ('cat', 'dog'), None, 16)
    assert s.counts().to_numpy().tolist() == [[7, 1, 2]]*2
    x = np.asarray(Image.open(root/'dog'/'0000.png')).transpose(2, 0, 1)
    assert (s.images[s.labels == 1][0].numpy() == x).all()
    assert image_folder(root, 16).fingerprint() == s.fingerprint() != image_folder(root, 16, seed=1).fingerprint()


@pytest.mark.parametrize('name', ['test', 'valid', 'val'])
def test_image_folder_with_its_own_test_part(tmp_path, name):
    write_folder(tmp_path/'pets'/'train', ['dog', 'cat'], 10)
    write_folder(tmp_path/'pets'/name, ['dog', 'cat'], 4)
    assert image_folder(tmp_path/'pets', 16).counts().to_numpy().tolist() == [[9, 1, 4]]*2


def test_image_folder_with_valid_and_test(tmp_path):
    for part, n in (('train', 5), ('valid', 2), ('test', 3)): write_folder(tmp_path/'pets'/part, ['dog', 'cat'], n)
    assert image_folder(tmp_path/'pets', 16).counts().to_numpy().tolist() == [[5, 2, 3]]*2


@pytest.mark.parametrize('parted', [True, False])
def test_image_folder_with_superclasses(tmp_path, parted):
    root = tmp_path/'things'
    for part in ('train', 'test') if parted else ('.',):
        write_folder(root/part/'pets', ['dog', 'cat'])
        write_folder(root/part/'vehicles', ['bus'])
    s = image_folder(root, 16)
    assert s.classes == ('bus', 'cat', 'dog') and s.superclasses == ('vehicles', 'pets', 'pets')


def test_same_class_name_in_two_superclasses(tmp_path):
    for sup in ('plane', 'train'): write_folder(tmp_path/'x'/'train'/sup, ['wing', 'door'] if sup == 'plane' else ['door'])
    s = image_folder(tmp_path/'x', 16)
    assert s.classes == ('plane/door', 'plane/wing', 'train/door') and s.superclasses == ('plane', 'plane', 'train')


def test_a_class_named_train(tmp_path):
    assert image_folder(write_folder(tmp_path/'x', ['bus', 'test', 'train']), 16).classes == ('bus', 'test', 'train')


def test_image_folder_skips_corrupt_files_with_their_labels(tmp_path):
    root = write_folder(tmp_path/'pets', ['cat', 'dog'], 5)
    (root/'cat'/'0001.png').write_text('no image')
    (root/'dog'/'readme.txt').write_text('no image')
    with pytest.raises(ValueError, match='2 of 11 files') as e: image_folder(root, 16)
    assert str(root/'cat'/'0001.png') in str(e.value) and str(root/'dog'/'readme.txt') in str(e.value)
    with pytest.warns(UserWarning, match='2 of 11'): s = image_folder(root, 16, skip_corrupt=True)
    assert s.counts().sum(axis=1).tolist() == [4, 5]
    x = np.asarray(Image.open(root/'cat'/'0002.png')).transpose(2, 0, 1)
    assert (s.images[1].numpy() == x).all()


def test_class_that_loses_all_images_is_named(tmp_path):
    root = write_folder(tmp_path/'pets', ['cat', 'dog'], 2)
    for f in (root/'dog').iterdir(): f.write_text('no image')
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='class dog'): image_folder(root, 16, skip_corrupt=True)


def test_classes_to_take_are_a_list_of_names_or_numbers(tmp_path):
    root = write_folder(tmp_path/'numbers', ['0', '1', '10'], 5)
    assert image_folder(root, 16, classes=[1, 10]).classes == ('1', '10') and image_folder(root, 16, classes={'0', '1'}).classes == ('0', '1')
    for wrong in ('10', [], ()):
        with pytest.raises(ValueError, match='classes are a list with the names of those to take'): image_folder(root, 16, classes=wrong)


def test_folders_that_are_refused(tmp_path):
    root = write_folder(tmp_path/'pets', ['cat', 'dog'])
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere'): image_folder(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='no class folders'): image_folder(root/'cat')
    with pytest.raises(ValueError, match='no folder in .* for class cow'): image_folder(root, classes=['cat', 'cow'])
    (root/'newt').mkdir()
    with pytest.raises(ValueError, match='no images for class newt'): image_folder(root)
    (root/'newt').rmdir()
    write_images(root/'dog'/'more', 2)
    with pytest.raises(ValueError, match='class folder .*dog holds a folder, more'): image_folder(root)
    assert image_folder(root, 16, only='*.png').classes == ('cat', 'dog')
    assert image_folder(root, 16, classes=(c for c in ['cat']), only='0*.png').classes == ('cat',)
    with pytest.raises(ValueError, match=r'class cat: .* holds no \*cat\*'): image_folder(root, 16, only='*cat*') # of file names, not of folders
    write_folder(root/'birds', ['owl'])
    with pytest.raises(ValueError, match='either all do or none'): image_folder(root)


def test_a_superclass_stands_before_the_name_in_every_part(tmp_path):
    for part, sups in (('train', 'AB'), ('test', 'A')):
        for sup in sups: write_folder(tmp_path/'x'/part/sup, ['wing'])
    s = image_folder(tmp_path/'x', 16)
    assert s.classes == ('A/wing', 'B/wing') and s.counts().test.tolist() == [6, 0]


def test_superclasses_in_one_part_only_are_refused_where_names_need_them(tmp_path):
    for sup in 'AB': write_folder(tmp_path/'x'/'train'/sup, ['wing'])
    write_folder(tmp_path/'x'/'test', ['wing'])
    with pytest.raises(ValueError, match='all parts need folders of superclasses'): image_folder(tmp_path/'x', 16)


@pytest.mark.filterwarnings('error')
def test_a_folder_that_is_no_part_is_told_of(tmp_path):
    for part, n in (('train', 10), ('eval', 4)): write_folder(tmp_path/'pets'/part, ['dog', 'cat'], n)
    with pytest.warns(UserWarning, match='left out eval, beside train: folders of parts are called train, training, test'): s = image_folder(tmp_path/'pets', 16)
    assert s.counts().sum().sum() == 20
    write_folder(tmp_path/'pets'/'test', ['dog', 'cat'], 3)
    (tmp_path/'pets'/'eval').rename(tmp_path/'pets'/'val')
    assert image_folder(tmp_path/'pets', 16).counts().to_numpy().tolist() == [[10, 4, 3]]*2


def test_a_test_part_that_cannot_be_read_is_not_made_up(tmp_path):
    write_folder(tmp_path/'pets'/'train', ['dog', 'cat'])
    for f in [f for c in ('dog', 'cat') for f in write_images(tmp_path/'pets'/'test'/c, 2)]: f.write_bytes(b'no')
    with pytest.warns(UserWarning, match='left out 4 of 16'), pytest.raises(ValueError, match='none of the files of the test part'): image_folder(tmp_path/'pets', 16, skip_corrupt=True)


def test_a_class_may_lack_test_images_whether_named_or_not(tmp_path):
    write_folder(tmp_path/'x'/'train', ['cat', 'dog', 'owl'])
    write_folder(tmp_path/'x'/'test', ['cat'])
    assert image_folder(tmp_path/'x', 16).n_classes == 3 and image_folder(tmp_path/'x', 16, classes=['cat', 'dog']).counts().test.tolist() == [6, 0]


def test_the_number_of_classes_may_be_numpys():
    y = np.repeat([0, 1], 10)
    assert hold_out(y, np.zeros(20), y.max() + 1).tolist() == hold_out(y, np.zeros(20), 2).tolist()


def test_test_class_without_training_images(tmp_path):
    write_folder(tmp_path/'x'/'train', ['cat'])
    write_folder(tmp_path/'x'/'test', ['cat', 'cow'])
    with pytest.raises(ValueError, match='no training images for class cow'): image_folder(tmp_path/'x')


# ---- named sets

@pytest.fixture
def no_data(tmp_path, monkeypatch):
    "fastai's folders, empty; and no network"
    monkeypatch.setattr(datasets, 'fastai_path', lambda folder: tmp_path/'fastai'/folder)
    def refuse(*args, **kwargs): raise urllib.error.URLError('no network')
    monkeypatch.setattr(datasets, 'urlopen', refuse)
    return tmp_path/'fastai'


@pytest.mark.parametrize('name, folder, address', [
    ('cifar100', 'cifar100', 'https://s3.amazonaws.com/fast-ai-imageclas/cifar100.tgz'),
    ('caltech101', 'caltech_101', 'https://s3.amazonaws.com/fast-ai-imageclas/caltech_101.tgz'),
    ('caltech256', 'caltech256/256_ObjectCategories', 'https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar'),
    ('imagenet', 'imagenet', 'https://image-net.org/download.php'),
    ('imagenet200', 'imagenet', 'https://image-net.org/download.php')])
def test_missing_set_says_where_it_was_sought(no_data, name, folder, address):
    with pytest.raises(FileNotFoundError) as e: image_set(name)
    assert isinstance(e.value, ImagesAbsent) == (name not in ('cifar100', 'caltech101')) # which download by themselves, or fail
    assert str(no_data/'data'/folder) in str(e.value) and address in str(e.value)
    assert not no_data.exists()


@pytest.fixture
def reachable(no_data, monkeypatch):
    "The same, with a network"
    monkeypatch.setattr(datasets, 'urlopen', lambda *a, **k: nullcontext())
    return no_data


def files_in(folder): return [f for f in folder.rglob('*') if f.is_file() and f.suffix != '.lock']


def test_broken_downloads_leave_nothing(reachable, monkeypatch):
    class HalfArchive:
        def __init__(self, base, archive, data, module): self.archive, self.data = archive, data
        def get(self, url):
            self.archive.mkdir(parents=True)
            (self.archive/'cifar100.tgz.part').write_bytes(b'half')
            (self.data/'cifar100').mkdir()
            raise OSError('connection reset')
    def half_folder(root, download):
        (Path(root)/'caltech256').mkdir()
        (Path(root)/'caltech256'/'256_ObjectCategories.tar').write_bytes(b'half')
        raise RuntimeError('File not found or corrupted.')
    monkeypatch.setattr(datasets, 'FastDownload', HalfArchive)
    monkeypatch.setattr(datasets, 'Caltech256', half_folder)
    for name, reason in (('cifar100', 'connection reset'), ('caltech256', 'corrupted')):
        with pytest.raises(FileNotFoundError, match=reason): image_set(name)
    assert files_in(reachable) == [] and not [d for d in (reachable/'data').rglob('*') if d.is_dir() and d.name != 'caltech256']


def test_an_archive_is_unpacked_as_fastai_would(reachable, tmp_path, monkeypatch):
    write_folder(tmp_path/'made'/'cifar100'/'train', ['a', 'b'], 4)
    (reachable/'archive').mkdir(parents=True)
    with tarfile.open(reachable/'archive'/'cifar100.tgz', 'w:gz') as tar: tar.add(tmp_path/'made'/'cifar100', 'cifar100')
    monkeypatch.setattr(datasets.FastDownload, 'download', lambda self, url, force=False: None) # it is there
    folder = datasets._fastai_folder(datasets.URLs.CIFAR_100, 'cifar100')
    assert folder == reachable/'data'/'cifar100' and len(list(folder.glob('train/*/*.png'))) == 8
    assert datasets.fastai_path('data') == reachable/'data' and sorted(f.name for f in folder.parent.iterdir()) == ['.cifar100.lock', 'cifar100']


def test_a_folder_appears_complete_and_is_fetched_once(reachable):
    folder, calls, seen = reachable/'data'/'cifar100', [], []
    def slow(aside):
        calls.append(aside)
        (aside/'new').mkdir()
        for i in range(5): time.sleep(.02); seen.append(folder.exists()); (aside/'new'/f'{i}.png').touch()
        return aside/'new'
    with ThreadPoolExecutor(3) as pool: list(pool.map(lambda _: datasets._fetched(folder, 'https://x', slow), range(3)))
    assert len(calls) == 1 and not any(seen) and len(list(folder.iterdir())) == 5


@pytest.mark.parametrize('i', [-1, 6])
def test_a_fold_that_there_is_not(i):
    with pytest.raises(ValueError, match=f'fold {i} of 6'): datasets._folded(synthetic(2), i, 6, .1, 0)


def test_caltech256_passes_over_its_litter(tmp_path):
    root = write_folder(tmp_path/'256_ObjectCategories', ['001.ak47', '056.dog', '257.clutter'], 12, suffix='.jpg')
    write_images(root/'056.dog'/'greg', 2, suffix='.jpg')
    (root/'001.ak47'/'RENAME2').write_text('x')
    parts = [caltech256(root, 16, fold=i) for i in range(6)]
    assert parts[0].classes == ('001.ak47', '056.dog', '257.clutter') and len(parts[0].images) == 36
    assert (sum((p.split == TEST).int() for p in parts) == 1).all()


def test_imagenet_draws_are_seeded_and_saved(tmp_path, cache):
    root = tmp_path/'imagenet'
    for part in ('train', 'val'): write_folder(root/part, [f'n{i:08d}' for i in range(9)], 3)
    assert imagenet(root, 16).counts().to_numpy().tolist() == [[2, 1, 3]]*9
    small, large = (imagenet100(root, 16, n=n) for n in (3, 6))
    assert (small.name, small.n_classes) == ('imagenet3', 3) and set(small.classes) < set(large.classes)
    record = cache/'imagenet3-seed0.json'
    assert json.loads(record.read_text())['classes'] == list(small.classes)
    assert any(imagenet100(root, 16, n=3, seed=s).classes != small.classes for s in (1, 2, 3))
    record.write_text(json.dumps(dict(classes=['n00000007', 'n00000008']))) # a list from elsewhere
    assert imagenet100(root, 16, n=3).classes == ('n00000007', 'n00000008')
    with pytest.raises(ValueError, match='has 9 classes, too few to draw 100 from'): imagenet100(root, 16)
    record.write_text(json.dumps(dict(classes=['n00000007', 'n00000010'])))
    with pytest.raises(ValueError, match='imagenet3-seed0.json lists classes that .* lacks: n00000010'): imagenet100(root, 16, n=3)


def test_image_set_by_name_or_path(tmp_path):
    assert image_set('synthetic', n_groups=2, seed=3).fingerprint() == synthetic(2, seed=3).fingerprint()
    assert image_set(write_folder(tmp_path/'pets', ['cat']), size=16).name == 'pets'
    with pytest.raises(ValueError) as e: image_set('cifar-100')
    assert all(name in str(e.value) for name in IMAGE_SETS)


# ---- real images

def needs(folder):
    return pytest.mark.skipif(not (FASTAI_DATA/folder).is_dir(), reason=f'{FASTAI_DATA/folder} is not there')


@needs('cifar100')
def test_some_of_cifar100(tmp_path):
    for part, n in (('train', 30), ('test', 10)):
        for c in ('fish/shark', 'fish/trout', 'flowers/rose'):
            (tmp_path/'some'/part/c).mkdir(parents=True)
            for f in sorted((FASTAI_DATA/'cifar100'/part/c).iterdir())[:n]: (tmp_path/'some'/part/c/f.name).symlink_to(f)
    s = image_folder(tmp_path/'some', 32)
    assert s.counts().to_numpy().tolist() == [[27, 3, 10]]*3 and s.superclasses == ('flowers', 'fish', 'fish')
    assert all(0.05 < v < 0.4 for v in s.mean_std()[1])


@needs('caltech_101')
def test_some_of_caltech101(tmp_path):
    for c in ('BACKGROUND_Google', 'accordion', 'wrench'):
        (tmp_path/'some'/c).mkdir(parents=True)
        for f in sorted((FASTAI_DATA/'caltech_101'/c).iterdir())[:30]: (tmp_path/'some'/c/f.name).symlink_to(f)
    s = image_folder(tmp_path/'some', 64)
    assert s.images.shape == (90, 3, 64, 64) and [int((p.split == TEST).sum()) for p in cross_validation(s)] == [15]*6


@needs('caltech_101')
@pytest.mark.slow
def test_caltech101():
    s = caltech101()
    assert (s.n_classes, len(s.images), s.size) == (102, 9144, 64) and s.classes[0] == 'BACKGROUND_Google'
    assert not torch.equal(s.split, caltech101(fold=1).split)


@needs('cifar100')
@pytest.mark.slow
def test_cifar100():
    s = cifar100()
    assert (s.n_classes, len(set(s.superclasses)), s.size) == (100, 20, 32)
    assert (s.counts().to_numpy() == [450, 50, 100]).all()
    begin = time.time()
    assert cifar100().fingerprint() == s.fingerprint() and time.time() - begin < 10


# ---- pictures and folders of other kinds

def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    ramp = np.tile(np.linspace(300, 60000, 32).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path/'deep.png')
    x = decode_image(tmp_path/'deep.png', 32)
    assert np.array_equal(x, np.stack(3*[(ramp >> 8).astype(np.uint8)]))
    Image.fromarray(np.random.rand(32, 32).astype(np.float32)).save(tmp_path/'float.tif')
    with pytest.raises(ValueError, match='float.tif; the first: it has 32 bits a pixel'): decode([tmp_path/'float.tif'], 32)


def test_a_picture_that_a_camera_marked_as_turned_is_turned(tmp_path):
    upright = Image.new('RGB', (64, 64))
    upright.paste('white', (0, 0, 64, 32))
    upright.save(tmp_path/'up.png')
    marked = Image.Exif()
    marked[0x0112] = 6 # turned by 90 degrees
    upright.rotate(90).save(tmp_path/'phone.jpg', exif=marked, quality=95)
    up, phone = decode([tmp_path/'up.png', tmp_path/'phone.jpg'], 32).int()
    assert (up - phone).abs().float().mean() < 3


def test_other_pictures_of_the_same_names_sizes_and_times_are_not_taken_for_these(tmp_path):
    for name, value in (('a', 0), ('b', 255)):
        (tmp_path/name).mkdir()
        Image.new('RGB', (8, 8), 3*(value,)).save(tmp_path/name/'img.bmp')
        os.utime(tmp_path/name/'img.bmp', (10**9, 10**9))
    assert [decode(tmp_path/name/'img.bmp', 8).unique().tolist() for name in 'ab'] == [[0], [255]]


@pytest.mark.parametrize('train, test, valid', [('Train', 'Test', 'Valid'), ('training', 'testing', 'validation'), ('TRAIN', 'TEST', 'val')])
def test_parts_are_known_by_any_of_their_names(train, test, valid, tmp_path):
    for part, n in ((train, 6), (test, 4), (valid, 2)): write_folder(tmp_path/'set'/part, 'ab', n)
    s = image_folder(tmp_path/'set', 16)
    assert [len(part) for part in (s.train, s.held_out, s.test)] == [12, 4, 8]


def test_a_folder_name_that_is_not_utf8_is_named(tmp_path):
    for c in (b'caf\xe9', b'plain'): write_images(Path(os.fsdecode(os.fsencode(tmp_path/'old') + b'/' + c)), 4)
    with pytest.raises(ValueError, match=r"the folder name 'caf\\udce9' isn't UTF-8"): image_folder(tmp_path/'old', 16)


def test_a_folder_named_like_a_set_is_mentioned(tmp_path, monkeypatch):
    write_folder(tmp_path/'synthetic', ['cat', 'dog'])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match='write ./synthetic'): assert image_set('synthetic', n_per_class=4, size=8).n_classes == 24
    assert image_set('./synthetic', size=8).classes == ('cat', 'dog')


def test_arrays_are_told_from_tensors():
    s = blank([0, 1], 2)
    with pytest.raises(ValueError, match='images must be a torch tensor, not a ndarray'): replace(s, images=s.images.numpy())


def test_no_pixel_is_no_size(tmp_path):
    with pytest.raises(ValueError, match='at least one pixel a side, not 0'): decode(write_images(tmp_path/'a', 2), 0)


def test_two_writers_of_one_process_do_not_share_a_path(tmp_path):
    with datasets.atomically(tmp_path/'f') as a, datasets.atomically(tmp_path/'f') as b:
        assert a != b
        for path, text in ((a, '1'), (b, '2')): path.write_text(text)
    assert (tmp_path/'f').read_text() == '1' and [f.name for f in tmp_path.iterdir()] == ['f'] # the last to end


def test_a_size_is_one_number(tmp_path):
    for ask in (decode, read_images):
        with pytest.raises(ValueError, match=r'one whole number.*not \(16, 24\)'): ask([tmp_path/'x.png'], (16, 24))


def test_a_full_disk_is_not_taken_for_absent_images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'urlopen', lambda *args, **kwargs: io.BytesIO())
    def full(aside): raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match='No space left') as e: datasets._fetched(tmp_path/'images', 'http://there', full)
    assert not isinstance(e.value, FileNotFoundError)
    def broken(aside): raise OSError('connection reset')
    with pytest.raises(FileNotFoundError, match='downloading http://there failed'): datasets._fetched(tmp_path/'images', 'http://there', broken)
