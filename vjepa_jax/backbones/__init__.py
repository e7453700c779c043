"""Backbones: a volume, or the kept tokens of it, in; Features out."""
