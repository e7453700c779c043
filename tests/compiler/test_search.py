"""The largest size that fits, in few tries."""

import pytest

from vjepa_jax.compiler import search


@pytest.mark.parametrize("largest", [1, 2, 7, 100, 180])
@pytest.mark.parametrize("told", [True, False])
def test_the_largest_size_is_found_in_few_tries(largest, told):
  calls = []

  def measure(size):
    calls.append(size)
    peak = 2.0 + size
    return peak if told or peak <= limit else None

  limit = 2.5 + largest
  found = search.largest_that_fits(measure, limit, most=1024, attempts=30)
  assert found.largest == largest and found.exact
  assert len(calls) == len(set(calls)) and len(calls) <= (6 if told else 21)


def test_thousands_are_found_to_a_percent_even_where_bytes_are_not_linear():
  found = search.largest_that_fits(lambda size: size**2.0, 5000.5**2, attempts=30)
  assert 4950 <= found.largest <= 5000 and len(found.tried) < 20


def test_what_is_known_is_not_asked_again():
  calls = []

  def measure(size):
    calls.append(size)
    return 10.0 * size

  found = search.largest_that_fits(measure, 55.0, tried={8: None, 4: 40.0, 6: 60.0})
  assert (found.largest, calls) == (5, [5])


def test_nothing_fits_is_an_answer_and_so_is_not_knowing():
  assert search.largest_that_fits(lambda size: None, 1.0).largest is None
  found = search.largest_that_fits(lambda size: size**2.0, 1e6, attempts=2)
  assert not found.exact
