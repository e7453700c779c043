"""Linen parts that two or more backbones or objectives share."""
