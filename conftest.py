"""Keeps pytest from importing, for its doctests, what needs packages that may be absent."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["torchrec_hilomoe/ops/triton_routing.py"]
