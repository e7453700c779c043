"""Published weights in and out: names and layouts, nothing of training."""
