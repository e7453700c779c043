"""What pictures of volumes in time hold."""

import numpy as np
import pytest

from vjepa_jax.data import phantom_embryos
from vjepa_jax.report import canvas, timelines

STAGES = phantom_embryos.STAGES
BLUE, ORANGE, VIOLET = (0, 114, 178), (213, 94, 0), (138, 95, 191)
SPACING = (2.2, 1.8, 1.8)


def _near(image, colour, tolerance=40):
  """bool [H, W], where a picture has about a colour."""
  return np.abs(image.astype(int) - np.array(colour)).max(axis=-1) < tolerance


def _body(mask):
  """Pixels of the strips, without the legend beneath and the bar at the right."""
  return mask[:-70, :850]


def _without_bar(image):
  return image[:, : int(0.84 * image.shape[1])]


def _embryo(truth=None, decoded=None, said=None, name="one", minutes=None):
  flat = np.full(24, 2)
  truth, decoded, said = (flat if s is None else s for s in (truth, decoded, said))
  minutes = np.arange(24.0) if minutes is None else minutes
  return timelines.Timeline(name, minutes, np.eye(8)[said], truth, decoded)


def _draw(*embryos):
  return timelines.timeline(embryos or [_embryo()], STAGES)


def _height(mask):
  """Where up the picture, counted from below, its marked pixels are."""
  return mask.shape[0] - np.flatnonzero(mask.any(axis=1)).mean()


def test_each_line_moves_with_its_own_stages_alone():
  low, high = np.full(24, 1), np.full(24, 6)
  apart = dict(truth=np.full(24, 0), decoded=np.full(24, 3), said=np.full(24, 4))
  for name, colour, tolerance in (
      ("truth", (224, 134, 64), 45), ("decoded", BLUE, 40), ("said", VIOLET, 25)
  ):
    down, up = (
        _body(_near(_draw(_embryo(**(apart | {name: stages}))), colour, tolerance))
        for stages in (low, high)
    )
    assert down.sum() > 200 and up.sum() > 200
    assert _height(up) - _height(down) > 60, name


def test_an_unknown_truth_is_not_drawn():
  known, half = np.full(24, 6), np.full(24, 6)
  half[12:] = -1
  drawn = [
      _body(_near(_draw(_embryo(truth=truth)), (224, 134, 64), 45)).sum()
      for truth in (known, half, np.full(24, -1))
  ]
  assert drawn[0] > 1000 and drawn[2] == 0
  assert 0.45 < drawn[1] / drawn[0] < 0.55


def test_time_points_that_are_missing_are_left_white():
  all_ = _draw(_embryo(said=np.full(24, 7)))
  missing = np.r_[0:8, 20:24]
  gap = _draw(timelines.Timeline(
      "one", missing.astype(float), np.eye(8)[np.full(12, 7)], np.full(12, 2),
      np.full(12, 2),
  ))
  for colour in ((137, 137, 137), BLUE):  # What is certain, and a line.
    share = _body(_near(gap, colour, 30)).sum() / _body(_near(all_, colour, 30)).sum()
    assert 0.4 < share < 0.6


def test_probability_darkens_its_stage():
  sure, unsure = _embryo(said=np.full(24, 7)), _embryo(said=np.full(24, 7))
  object.__setattr__(unsure, "probabilities", np.full((24, 8), 1 / 8))
  strip = slice(30, 45), slice(200, 700)  # The uppermost stage.
  dark, light = (_draw(e)[strip].astype(int) for e in (sure, unsure))
  assert np.median(light) - np.median(dark) > 60


def test_embryos_are_stacked_on_one_scale_of_minutes():
  one = _embryo()
  short = _embryo(name="two", minutes=np.linspace(0, 11.5, 24))
  assert _draw(one, one).shape[0] > 1.6 * _draw(one).shape[0]
  both = _body(_near(_draw(one, short), BLUE, 30))
  rows = np.flatnonzero(both.any(axis=1))
  widths = [both[rows[0]].sum(), both[rows[-1]].sum()]
  assert 0.45 < widths[1] / widths[0] < 0.55


def test_confusion_shades_by_the_share_of_a_row():
  matrix = np.diag([10, 1000, 10])
  image = timelines.confusion(matrix, "abc")
  dark = _near(_without_bar(image), (8, 48, 107), 15)
  moved = timelines.confusion(np.roll(matrix, 1, axis=1), "abc")
  other = _near(_without_bar(moved), (8, 48, 107), 15)
  # All three are as dark, whatever their counts are.
  assert 0.7 < dark.any(axis=1).mean() < 0.95
  assert (dark & ~other).sum() > 0.8 * dark.sum()


def test_a_stage_that_never_was_leaves_an_empty_row():
  matrix = np.diag([5, 0, 5])
  image = timelines.confusion(matrix, "abc")
  assert np.isfinite(image).all()
  full = timelines.confusion(np.diag([5, 5, 5]), "abc")
  dark = [_near(_without_bar(i), (8, 48, 107), 15).sum() for i in (image, full)]
  assert 0.6 < dark[0] / dark[1] < 0.72


def test_embedding_colours_follow_stages_and_unknown_ones_are_grey():
  points = np.random.default_rng(0).normal(size=(80, 2))
  minutes = np.arange(80.0)
  draw = lambda stages: timelines.embedding(points, stages, minutes, STAGES, "PCA")
  first, last, unknown = (draw(np.full(80, s)) for s in (0, 7, -1))
  left = slice(40, 430), slice(60, 500)
  dark, yellow = (68, 1, 84), (253, 231, 37)
  for image, here, not_here in ((first, dark, yellow), (last, yellow, dark)):
    assert _near(image[left], here).sum() > 500
    assert _near(image[left], not_here).sum() == 0
  assert _near(unknown[left], dark).sum() == _near(unknown[left], yellow).sum() == 0
  # Time has the same colours whatever the stages are.
  right = slice(40, 430), slice(650, 1050)
  np.testing.assert_array_equal(first[right], last[right])
  assert _near(first[right], (252, 253, 191)).sum() > 20


def _clip(times=3, shape=(16, 32, 32)):
  movie, _ = phantom_embryos.embryo(np.random.default_rng(0))
  volume = movie[20 : 20 + times].astype(np.float32)
  volume = (volume - volume.mean()) / volume.std()
  hidden = np.zeros(volume.shape, bool)
  hidden[:, :, 16:] = True
  return volume, np.where(hidden, 0, volume), volume.copy(), hidden


def _rows_of(clip, spacing=SPACING):
  """The rows of panels of a clip; they lie where those of a black clip do."""
  image = timelines.reconstruction_panel(*clip, spacing)
  black = [np.zeros_like(part) for part in clip]
  filled = timelines.reconstruction_panel(*black, spacing)[:, 70:] < 10
  inside = filled.all(axis=2).mean(axis=1) > 0.8
  edges = np.flatnonzero(np.diff(np.r_[0, inside.astype(int), 0])).reshape(-1, 2)
  assert len(edges) == (2 if len(clip[0]) == 1 else 6)
  columns = filled.all(axis=2)[edges[0, 0] + 5]
  return [image[a:b, 70:][:, columns] for a, b in edges]


def test_the_visible_row_is_dark_where_hidden():
  original, visible, rebuilt, *along_y = _rows_of(_clip())
  lower = lambda panel: panel[len(panel) // 2 + 2 : -2]
  dark = (23, 26, 51)
  assert _near(lower(visible), dark, 6).mean() > 0.9
  assert _near(visible[2 : len(visible) // 2 - 2], dark, 6).mean() < 0.05
  for other in (original, rebuilt, *along_y):  # Along Y each line has visible voxels.
    assert _near(other, dark, 6).mean() < 0.05
  # What was rebuilt perfectly looks as the original, but for a line of pixels.
  rows = min(len(rebuilt), len(original)) - 2
  assert np.abs(rebuilt[:rows].astype(int) - original[:rows]).mean() < 2


def test_the_prediction_is_shown_where_hidden_and_nowhere_else():
  volume, visible, rebuilt, hidden = _clip()
  wrong = np.full_like(rebuilt, 50.0)  # Also where nobody asks for it.
  original, _, shown = _rows_of((volume, visible, wrong, hidden))[:3]
  middle = len(shown) // 2
  white = (shown[middle + 2 : -2] > 250).all(axis=-1)
  assert white.mean() > 0.9
  upper = slice(2, middle - 2)
  assert np.abs(shown[upper].astype(int) - original[upper]).mean() < 2


def test_what_was_neither_shown_nor_asked_for_is_dark_in_both():
  volume, visible, rebuilt, hidden = _clip()
  hidden[:, :, 24:] = False  # Still 0 in what is visible.
  _, visible, rebuilt = _rows_of((volume, visible, rebuilt, hidden))[:3]
  for panel in (visible, rebuilt):
    assert _near(panel[int(0.8 * len(panel)) : -2], (23, 26, 51), 6).mean() > 0.9
  middle = rebuilt[int(0.55 * len(rebuilt)) : int(0.7 * len(rebuilt))]
  assert _near(middle, (23, 26, 51), 6).mean() < 0.1


def test_panels_have_the_proportions_of_the_specimen():
  clip = _clip(times=1)
  sizes = []
  for spacing in (SPACING, (4.4, 1.8, 1.8), (np.nan,) * 3):
    sizes.append([len(rows) for rows in _rows_of(clip, spacing)])
  depth, deep, voxels = (b / a for a, b in sizes)
  np.testing.assert_allclose(
      [depth, deep, voxels], [35.2 / 57.6, 70.4 / 57.6, 0.5], rtol=0.05
  )


def test_a_single_volume_has_its_three_pictures_side_by_side():
  one = timelines.reconstruction_panel(*_clip(times=1), SPACING)
  two = timelines.reconstruction_panel(*_clip(times=2), SPACING)
  assert one.shape[1] > 1.2 * one.shape[0] and two.shape[0] > 1.2 * two.shape[1]
  many = _clip(times=40)
  few = [part[:16] for part in many]
  wide = timelines.reconstruction_panel(*many, SPACING).shape
  assert wide == timelines.reconstruction_panel(*few, SPACING).shape


def _colourful(image):
  """bool [H, W] without the bar: neither grey nor white."""
  image = _without_bar(image).astype(int)
  return image.max(axis=-1) - image.min(axis=-1) > 60


def test_attention_is_coloured_where_it_goes_and_nowhere_where_it_is_even():
  volume = _clip(times=2)[0]
  even = np.full((2, 2, 4, 4), 1 / 32)
  assert not _colourful(timelines.attention_panel(volume, even, SPACING)).any()
  found = []
  for place in ((0, 0, 0), (1, 3, 3)):
    looks = np.full((2, 2, 4, 4), 0.01)
    looks[(1, *place)] = 0.69
    marks = _colourful(timelines.attention_panel(volume, looks, SPACING))
    assert marks.sum() > 200
    middle = marks.shape[1] // 2
    assert marks[:, middle:].sum() > 5 * marks[:, : middle - 20].sum()
    found.append(marks)
  upper = slice(20, int(0.43 * len(found[0])))  # The projection along Z.
  assert _height(found[0][upper]) > _height(found[1][upper]) + 30


@pytest.mark.parametrize("size, count, patch", [(10, 4, None), (12, 2, (8, 8, 8))])
def test_patches_that_go_beyond_the_volume_keep_their_size(size, count, patch):
  volume = np.random.default_rng(0).normal(size=(1, size, 32, 32))
  looks = np.full((1, count, 4, 4), 1e-6)
  looks[0, -1] = 1.0  # The last patch along Z is not whole.
  image = timelines.attention_panel(volume, looks, (1.0, 1.0, 1.0), patch)
  marks = _colourful(image)
  runs = np.flatnonzero(np.diff(np.r_[0, marks.any(axis=1).astype(int), 0]))
  along_z, along_y, along_x = np.diff(runs.reshape(-1, 2), axis=1).ravel()
  left = size - (count - 1) * (8 if patch else 3)
  np.testing.assert_allclose([along_y, along_x], along_z * left / 32, atol=2)


def test_attention_of_several_frames_lies_over_their_middle():
  volume = np.zeros((4, 8, 8, 8))
  volume[[1, 3], 4, 4, 4] = 1.0
  even = np.full((2, 1, 1, 1), 1.0)
  image = timelines.attention_panel(volume, even, SPACING)
  dark = timelines.attention_panel(0 * volume, even, SPACING)
  assert image.shape == dark.shape and (image != dark).any()


def test_pictures_are_stacked_on_white():
  wide, narrow = np.zeros((4, 9, 3), np.uint8), np.full((2, 5, 3), 7, np.uint8)
  found = canvas.stack([wide, narrow])
  assert found.shape == (6, 9, 3) and found.dtype == np.uint8
  assert (found[:4] == 0).all() and (found[4:, :5] == 7).all()
  assert (found[4:, 5:] == 255).all()
  with pytest.raises(ValueError, match="no picture"):
    canvas.stack([])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: timelines.timeline([], STAGES), "no embryo"),
        (lambda: timelines.timeline([_embryo()], STAGES[:5]), "8 stages, there are 5"),
        (lambda: _embryo(truth=np.full(24, 8)), "truth holds 8..8.*-1..7"),
        (lambda: _embryo(decoded=np.full(24, -1)), "decoded holds -1..-1.*0..7"),
        (lambda: _embryo(truth=np.zeros(3, int)), r"'one'.*truth \(3,\)"),
        (lambda: _embryo(minutes=np.zeros(24)), "must rise"),
        (lambda: timelines.confusion(np.eye(3), "ab"), r"\(3, 3\) must be \(2, 2\)"),
        (
            lambda: timelines.embedding(
                np.zeros((3, 2)), np.full(3, 9), np.zeros(3), STAGES, "PCA"
            ), "9..9, there are 8",
        ),
        (
            lambda: timelines.embedding(
                np.zeros((3, 3)), np.zeros(3, int), np.zeros(3), STAGES, "PCA"
            ), r"points \(3, 3\)",
        ),
        (
            lambda: timelines.reconstruction_panel(
                *_clip()[:3], np.zeros((3, 2)), SPACING
            ), r"\(3, 2\); they must be",
        ),
        (
            lambda: timelines.attention_panel(
                np.zeros((1, 4, 4, 4)), np.zeros((2, 1, 1, 1)), SPACING
            ), "no more than T",
        ),
        (
            lambda: timelines.attention_panel(
                np.zeros((2, 4, 4, 4)), np.zeros((2, 1, 1, 1)), (1, 1)
            ), r"\(dz, dy, dx\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
