"""What figures hold."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from vjepa_jax.report import figures


def _scan(title="topcon triton", seed=0, shape=(8, 32, 48), spacing=(0.5, 0.06, 0.1)):
  generator = np.random.default_rng(seed)
  volume = generator.gamma(4.0, 5.0, shape)
  volume[:, 12:18] += 80.0
  return figures.Scan(title, volume, spacing)


def _close(image, colour, tolerance=30):
  return (np.abs(image.astype(int) - np.array(colour)).max(axis=-1) < tolerance).sum()


def test_a_mask_panel_shows_context_and_target():
  scans = [_scan(), _scan("zeiss cirrus", 1, spacing=(np.nan,) * 3)]
  nothing = [[np.zeros((4, 4, 6), int)], [np.zeros((4, 4, 6), int)]]
  targets = [[np.full((4, 4, 6), figures.TARGET)]] * 2
  context = [[np.full((4, 4, 6), figures.CONTEXT)]] * 2
  panels = [figures.mask_panel(scans, m) for m in (nothing, targets, context)]
  assert len({panel.shape for panel in panels}) == 1
  orange = [_close(panel, (0.55 * 213, 0.55 * 94, 0)) for panel in panels]
  blue = [_close(panel, (0, 0.5 * 114, 0.5 * 178)) for panel in panels]
  assert orange[1] > 10 * (orange[0] + 1) and orange[1] > 10 * (orange[2] + 1)
  assert blue[2] > 10 * (blue[0] + 1) and blue[2] > 10 * (blue[1] + 1)


def test_each_mask_group_and_scan_adds_panels():
  masks = np.zeros((4, 4, 6), int)
  one = figures.mask_panel([_scan()], [[masks]])
  two = figures.mask_panel([_scan()], [[masks, masks]])
  tall = figures.mask_panel([_scan(), _scan()], [[masks], [masks]])
  assert two.shape[1] > 1.4 * one.shape[1]
  assert tall.shape[0] > 1.5 * one.shape[0]
  assert one.std() > 20


def test_a_single_section_has_no_en_face_view():
  flat = _scan(shape=(1, 32, 48))
  masks = np.zeros((1, 4, 6), int)
  image = figures.mask_panel([flat], [[masks]])
  assert image.shape[1] < figures.mask_panel([_scan()], [[masks]]).shape[1]
  colours, inside = np.ones((1, 4, 6, 3)), np.ones((1, 4, 6), bool)
  assert figures.pca_panel([flat], [colours], [inside]).std() > 20


def _places(shape=(4, 6, 8), seed=0):
  """Features that follow depth most, then X, then Z."""
  generator = np.random.default_rng(seed)
  z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
  hidden = np.stack([4.0 * y, 2.0 * x, 1.0 * z], axis=-1)
  mixing = np.linalg.qr(generator.normal(size=(16, 3)))[0].T
  return hidden @ mixing + 0.01 * generator.normal(size=(*shape, 16))


def test_colours_do_not_depend_on_the_sign_or_turn_of_features():
  tokens = _places()
  inside = [np.ones(tokens.shape[:3], bool)]
  turn = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]
  plain = figures.token_colours([tokens], inside)[0]
  for other in (-tokens, tokens @ turn, 3.0 * tokens + 7.0):
    turned = figures.token_colours([other], inside)[0]
    np.testing.assert_allclose(turned, plain, atol=1e-4)
  assert plain[0, -1, :, 0].mean() > 0.9 > 0.1 > plain[0, 0, :, 0].mean()


def test_components_are_fitted_on_the_foreground_of_all_volumes():
  tokens = _places()
  inside = np.zeros(tokens.shape[:3], bool)
  inside[:, 2:4] = True
  wild = tokens.copy()
  wild[~inside] += 100.0 * np.random.default_rng(0).normal(size=wild[~inside].shape)
  plain = figures.token_colours([tokens, tokens], [inside, inside])
  other = figures.token_colours([tokens, wild], [inside, inside])
  np.testing.assert_allclose(plain[0], other[0], atol=1e-6)
  np.testing.assert_allclose(plain[1][inside], other[1][inside], atol=1e-6)


def test_few_dimensions_or_constant_features_still_give_colours():
  inside = [np.ones((2, 3, 4), bool)]
  thin = np.random.default_rng(0).normal(size=(2, 3, 4, 2))
  narrow = figures.token_colours([thin], inside)
  constant = figures.token_colours([np.ones((2, 3, 4, 8))], inside)
  for (colours,) in (narrow, constant):
    assert colours.shape == (2, 3, 4, 3) and np.isfinite(colours).all()


def test_pca_panel_darkens_the_background():
  scan = _scan()
  colours = np.ones((4, 4, 6, 3)) * np.array([0.0, 1.0, 0.0])
  inside = np.zeros((4, 4, 6), bool)
  inside[:, :2] = True
  shown = figures.pca_panel([scan], [colours], [inside])
  whole = figures.pca_panel([scan], [colours])
  share = _close(shown, (0, 255, 0)) / _close(whole, (0, 255, 0))
  assert 0.35 < share < 0.6


def _history():
  lines = [{"step": s, "loss": 1.0 / (s + 1), "lr": 1e-3} for s in range(0, 100, 5)]
  for step in (0, 50, 100):
    lines.append({
        "step": step, "probe.accuracy": 0.3 + step / 500, "probe.accuracy.low": 0.25,
        "probe.accuracy.high": 0.6, "probe.intensity": 0.31, "probe.chance": 0.25,
    })
    lines.append({"step": step, "health.std": 0.8, "health.cosine": 0.2,
                  "health.rankme": 40.0, "validation.loss": None})
  return lines


def test_curves_draw_one_panel_for_each_kind_of_number():
  lines = _history()
  whole = figures.curves(lines, title="a run")
  assert whole.dtype == np.uint8 and whole.shape[2] == 3 and whole.std() > 10
  only = figures.curves([{"step": 0, "loss": 1.0}, {"step": 5, "loss": 0.5}])
  assert only.shape[1] < 0.6 * whole.shape[1] and only.shape[0] < 0.6 * whole.shape[0]
  assert _close(whole, (0, 114, 178)) > 200


def test_nothing_to_draw_is_an_error():
  assert not figures.has_curves([{"step": 0, "lr": 1.0}])
  with pytest.raises(ValueError, match="no line of the metrics has loss"):
    figures.curves([{"step": 0, "lr": 1.0}, {"step": 1, "loss": None}])


def test_a_png_reads_back_as_it_was(tmp_path):
  image = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
  (tmp_path / "a.png").write_bytes(figures.encode_png(image))
  found = cv2.imread(str(tmp_path / "a.png"))[..., ::-1]
  np.testing.assert_array_equal(found, image)


def test_without_matplotlib_the_error_names_the_extra():
  code = (
      "import sys; sys.modules['matplotlib'] = None\n"
      "from vjepa_jax.report import figures\n"
      "try: figures.curves([{'step': 0, 'loss': 1.0}])\n"
      "except ImportError as error: print(error)"
  )
  found = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert 'pip install "vjepa_jax[figures]"' in found.stdout


def test_importing_the_drawing_does_not_import_matplotlib():
  code = (
      "import sys; from vjepa_jax.report import figures; "
      "print('matplotlib' in sys.modules, 'jax' in sys.modules)"
  )
  found = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert found.stdout.split() == ["False", "False"]
